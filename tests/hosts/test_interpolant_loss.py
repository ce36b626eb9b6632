"""Losses with an `interpolant`: the contract on stand-ins, and what is refused."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conformance.interpolant import AlignedModel
from conformance.points import check
from interpolant_standins import SEAMS, SelfTraining, SILoss, TokenSILoss, self_training
from torch import Tensor

from speedit_plugins import policy_of, with_policy
from speedit_plugins.hosts.factories import Factory
from speedit_plugins.hosts.objects.interpolant_call import form_of
from speedit_plugins.launch import NoSeamError, main, parsed
from speedit_plugins.policies.policy import TimestepPolicy

IMAGES = torch.zeros(6, 4, 4, 4)
FEATURES = [torch.ones(6, 1, 8)]


@pytest.mark.parametrize("name", SEAMS)
def test_the_contract_holds_on_stand_ins(name: str) -> None:
    assert check(SEAMS[name]) == list(range(1, 12))


class TestTheContractCanFail:
    def test_a_loss_that_draws_after_its_interpolant(self) -> None:
        class Redrawing(SILoss):
            def interpolant(self, t: Tensor) -> Any:
                levels = super().interpolant(t)
                # Not where the policy reads its noise levels.
                if t.dim() == 4:
                    t.copy_(torch.rand_like(t))
                return levels

        loss = with_policy(Redrawing(), "speed")
        with pytest.raises(ValueError, match="the model gets another t than the policy drew"):
            loss(AlignedModel(), IMAGES, zs=FEATURES)

    def test_a_model_that_draws_elsewhere(self) -> None:
        class Elsewhere(SelfTraining):
            def forward(self, x: Any, y: Any, zs: Any, loss_kwargs: Any, time_input: Any = None) -> Any:
                return {"denoising_loss": x.sum()}

        model = with_policy(Elsewhere(), "logit_normal")
        options = {"path_type": "linear", "weighting": "uniform"}
        with pytest.raises(ValueError, match=r"Elsewhere.forward did not call interpolant\(t\)"):
            model(IMAGES, None, FEATURES, options)

    def test_a_loss_of_the_whole_batch(self) -> None:
        class Mean(SILoss):
            def __call__(self, model: Any, images: Tensor, *args: Any, **kwargs: Any) -> Any:
                loss, projection = super().__call__(model, images, *args, **kwargs)
                return loss.mean(), projection

        with pytest.raises(
            ValueError, match=r"returns tuple, wanted .* denoising loss \(6,\) of each sample"
        ):
            with_policy(Mean(), "speed")(AlignedModel(), IMAGES, zs=FEATURES)


class TestWhatTheHostKeeps:
    def test_a_t_that_is_passed_is_trained_on_unweighted(self) -> None:
        t, token = torch.full((6, 1, 1, 1), 0.3), torch.ones(6, 8)
        losses = []
        for loss in (TokenSILoss(), with_policy(TokenSILoss(), "speed")):
            torch.manual_seed(0)
            losses.append(loss(AlignedModel(), IMAGES, zs=FEATURES, cls_token=token, time_input=t)[0])
        assert torch.equal(*losses)

    def test_the_models_attributes_reach_the_loss(self) -> None:
        class Asking(SILoss):
            def __call__(self, model: Any, images: Tensor, *args: Any, **kwargs: Any) -> Any:
                assert model.scale.requires_grad
                return super().__call__(model, images, *args, **kwargs)

        with_policy(Asking(), "speed")(AlignedModel(), IMAGES, zs=FEATURES)


class TestPolicies:
    def test_without_a_name_it_measures_the_data(self) -> None:
        assert policy_of(with_policy(SILoss())).name == "auto"

    def test_a_model_trains_on_the_path_that_its_policy_is_built_for(self) -> None:
        model = with_policy(self_training(), "min_snr")
        # Asked for before the first call, which names the path.
        assert float(policy_of(model).schedule.sigma[-1]) == pytest.approx(0.9995)
        options = {"path_type": "cosine", "weighting": "uniform", "align_only": False}
        with pytest.raises(ValueError, match="built for the path 'linear', got path_type='cosine'"):
            model(IMAGES, None, FEATURES, options)

    def test_a_bad_policy_for_a_model_raises_at_once(self) -> None:
        with pytest.raises(ValueError, match="unknown policy 'sped'"):
            with_policy(self_training(), "sped")

    def test_a_built_policy(self) -> None:
        built = policy_of(with_policy(SILoss(), "jit"))
        assert isinstance(built, TimestepPolicy)
        assert policy_of(with_policy(self_training(), built)) is built

    def test_another_path_is_asked_for_its_prediction_type(self) -> None:
        class Polynomial(SILoss):
            def interpolant(self, t: Tensor) -> Any:
                return 1 - t**2, t**2, -2 * t, 2 * t

        host = Polynomial(path_type="polynomial")
        with pytest.raises(ValueError, match="on the path 'polynomial', .* pass prediction_type"):
            with_policy(host, "min_snr")
        assert policy_of(with_policy(host, "min_snr", prediction_type="v")).name == "min_snr"


REPA = "class SILoss:\n    def interpolant(self, t): ...\n    def __call__(self, model, images): ...\n"


class TestTheLauncherKnowsTheClass:
    @pytest.mark.parametrize(
        ("module", "text", "line", "is_known"),
        [
            ("loss.py", REPA, "from loss import SILoss", True),
            ("loss.py", REPA, "import loss", True),
            # Another project's module of this name, and a script that does not import it.
            ("loss.py", "class SILoss:\n    def forward(self): ...\n", "from loss import SILoss", False),
            ("loss.py", "def focal(): ...\n", "from loss import focal", False),
            ("loss.py", REPA, "import os", False),
            ("loss.py", "no Python", "from loss import SILoss", False),
            # REPA's own model makes no loss.
            (
                "models/sit.py",
                "class SiT:\n    def forward(self, x): ...\n",
                "from models.sit import SiT",
                False,
            ),
        ],
    )
    def test_by_its_methods(self, tmp_path: Path, module: str, text: str, line: str, is_known: bool) -> None:
        (tmp_path / module).parent.mkdir(exist_ok=True)
        (tmp_path / module).write_text(text)
        script = tmp_path / "train.py"
        script.write_text(f"{line}\n")
        if is_known:
            parsed(str(script))
            return
        with pytest.raises(NoSeamError, match="has no seam: it reaches no function of a known host"):
            parsed(str(script))

    def test_a_class_without_the_methods_stays(self) -> None:
        factory = Factory("REPA", "loss", ("SILoss",), methods=("interpolant", "__call__"))
        assert factory.is_class(SILoss)
        assert not factory.is_class(dict)
        assert not factory.is_class(SILoss())
        assert form_of(dict()) is None


LOSS = """
from interpolant_standins import SILoss as Base
class SILoss(Base):
    def interpolant(self, t):
        return super().interpolant(t)
    def __call__(self, model, images, model_kwargs=None, zs=None):
        return super().__call__(model, images, model_kwargs, zs)
"""
INTERPOLANT_TRAIN = """
import torch
from loss import SILoss
from conformance.interpolant import AlignedModel
class Mine(SILoss):
    pass
model, loss_fn = AlignedModel(), {name}(path_type="cosine")
assert isinstance(loss_fn, SILoss)
opt = torch.optim.SGD(model.parameters(), lr=1e-3)
x = torch.zeros(5000, 4, 2, 2)
loss_fn(model, x, {{}}, zs=[torch.ones(5000, 1, 8)])[0].mean().backward()
opt.step()
print("late", float((model.seen[0] > 0.9).float().mean()))
"""


@pytest.mark.parametrize("name", ["SILoss", "Mine"])
def test_the_launcher_puts_a_policy_into_the_class(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loss.py").write_text(LOSS)
    script = tmp_path / "train.py"
    script.write_text(INTERPOLANT_TRAIN.format(name=name))
    # What the script imports is forgotten afterwards.
    monkeypatch.setitem(sys.modules, "loss", ModuleType("loss"))
    del sys.modules["loss"]
    assert main(["--policy", "speed", str(script)]) == 0
    printed = capsys.readouterr()
    assert "REPA, REG, seam B, policy speed: boundary 947 of 1000 timesteps" in printed.err
    # On the cosine path sigma / alpha = tan(pi t / 2), so SNR 1/143 is t = 0.9469. Past 0.9 there are 0.0469
    # of the times, and a fifth of 0.0531: 0.0600 of 0.9575, within 4 binomial sigma.
    assert abs(float(printed.out.split()[-1]) - 0.0600) < 4 * (0.06 / 5000) ** 0.5
