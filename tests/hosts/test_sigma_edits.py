"""The edits of seam E: in small scripts, which then run, and in every file of the checkouts that draws so."""

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch.testing import assert_close

from speedit_plugins import NoiseSchedule, build_policy, launch
from speedit_plugins.hosts.edits.sigma_edits import DENSITY, SIGMA_CALLS, WEIGHTING, edited_sigmas
from speedit_plugins.hosts.sigma_calls import SigmaCalls

N, T = 20_000, 1000
MIN_SNR = {"density": "logit_normal", "weighting": "min_snr"}
DRAWS_SPEED = {"type": "speed", "weighting": "constant"}
# Decided on log-SNR.
NOISE_LEVELS = {"type": "spectral_flow", "mean": 1.0}
# A step as most scripts have it. The model's answer is half of its input.
STEP = """
u = compute_density_for_timestep_sampling(weighting_scheme=args.scheme, batch_size=len(x),
                                          logit_mean=0.0, logit_std=1.0)
rows = (u * 1000).long()
timesteps = scheduler.timesteps[rows]
sigmas = scheduler.sigmas[rows].view(-1, 1)
noisy = (1.0 - sigmas) * x + sigmas * noise
answer = 0.5 * noisy
weights = compute_loss_weighting_for_sd3(weighting_scheme=args.scheme, sigmas=sigmas)
target = noise - x
loss = (weights.float() * (answer.float() - target.float()) ** 2).mean()
"""
OTHER_BRANCH = """
if args.is_uniform:
    rows = draw_rows(len(x))
    rows = rows.long().cpu()
else:
    u = compute_density_for_timestep_sampling("none", len(x))
    rows = (u * 1000).long()
timesteps = scheduler.timesteps[rows]
sigmas = scheduler.sigmas[rows].view(-1, 1)
noisy = (1 - sigmas) * x + sigmas * noise
"""
LATE_TABLE = """
u = compute_density_for_timestep_sampling("none", len(x))
rows = (u * 1000).long()
scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 1000, 1000), mu=args.mu)
timesteps = scheduler.timesteps[rows]
sigmas = scheduler.sigmas[rows].view(-1, 1)
noisy = (1 - sigmas) * x + sigmas * noise
"""


def started(text: str, policy: Any, *, batch: int = 4, seed: int = 0, **names: Any) -> SimpleNamespace:
    """The names of a script after it ran with its edits; `calls` is what it called."""
    torch.manual_seed(seed)
    tree, _ = edited_sigmas(ast.parse(dedent(text)))
    x, noise = torch.randn(batch, 3), torch.randn(batch, 3)
    calls = SigmaCalls(policy, generator=torch.Generator().manual_seed(seed))
    given = {DENSITY: compute_density_for_timestep_sampling, WEIGHTING: compute_loss_weighting_for_sd3}
    given |= {"torch": torch, "np": __import__("numpy"), "x": x, "noise": noise, SIGMA_CALLS: calls}
    given |= {"args": SimpleNamespace(scheme="none", mu=1.0, is_uniform=False)}
    given["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scope = {**given, **names}
    exec(compile(tree, "script", "exec"), scope)
    return SimpleNamespace(**{**scope, "calls": scope[SIGMA_CALLS]})


def follows(index: torch.Tensor, density: torch.Tensor) -> bool:
    """Whether the indices (N,) have the density (T,), each tenth within 4 binomial sigmas."""
    wanted = density.double().view(10, -1).sum(1)
    found = torch.bincount(index * 10 // T, minlength=10) / len(index)
    return bool(((found - wanted).abs() <= 4 * (wanted * (1 - wanted) / len(index)).sqrt() + 1e-12).all())


def index_of(sigmas: torch.Tensor, scheduler: Any) -> torch.Tensor:
    """Index of each sigma in a scheduler's table, counted from clean to noise."""
    table = scheduler.sigmas[scheduler.sigmas > 0]
    return T - 1 - (sigmas.view(-1, 1) - table).abs().argmin(1)


def share_above_half(noise: torch.Tensor, law: Any) -> bool:
    """Whether as many noise levels (N, 1) are above 1 / 2 as a law has it in a table without a shift."""
    density = build_policy(law, NoiseSchedule.rectified_flow(T), "flow").density
    wanted, found = float(density[T // 2 :].sum()), float((noise > 0.5).double().mean())
    # A row of the shifted table is up to 3 of 1000 wide.
    return abs(found - wanted) < 4 * (wanted * (1 - wanted) / N) ** 0.5 + 3 * float(density.max())


class TestPlaces:
    def test_a_step_draws_weighs_and_shows_its_data(self) -> None:
        sites = edited_sigmas(ast.parse(STEP))[1]
        numbered = [(sites.draws, 2), (sites.data, 7), (sites.weights, 9), (sites.errors, 11)]
        assert all(lines == [line] for lines, line in numbered)
        assert sites.other_draws == []
        ran = started(STEP, MIN_SNR)
        s = ran.sigmas.double()
        x, noise = ran.x.double(), ran.noise.double()
        error = (0.5 * ((1 - s) * x + s * noise) - (noise - x)) ** 2
        # A flow's error is that of the data times 1 / sigma^2, and min(SNR, 5) weighs the latter.
        weight = ((1 - s) ** 2 / s**2).clamp(max=5.0) * s**2
        assert_close(float(ran.loss), float((weight * error).mean()), rtol=1e-5, atol=0)
        assert ran.calls.policy.num_steps == 1
        assert bool((ran.timesteps == 1000 * ran.sigmas.flatten()).all())

    @pytest.mark.parametrize("shift", [1.0, 3.0])
    def test_a_law_of_noise_levels_is_one_of_sigma(self, shift: float) -> None:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        ran = started(STEP, NOISE_LEVELS, batch=N, scheduler=scheduler)
        assert follows(index_of(ran.sigmas, scheduler), ran.calls.policy.density)
        assert share_above_half(ran.sigmas, NOISE_LEVELS)

    def test_a_law_of_time_is_one_of_rows(self) -> None:
        # As the script's own scheme: the scheduler's shift stays.
        ran = started(STEP, "logit_normal", batch=N)
        density = build_policy("logit_normal", NoiseSchedule.rectified_flow(T), "flow").density
        assert follows(T - 1 - ran.rows, density)

    def test_uniform_is_the_scripts_own_law_and_loss(self) -> None:
        names = {"args": SimpleNamespace(scheme="logit_normal")}
        ran = started(STEP, "uniform", batch=N, **names)
        # u of a logit-normal: half of it is below 1 / 2.
        assert abs(float((ran.u < 0.5).double().mean()) - 0.5) < 4 * 0.5 / N**0.5
        again = started(STEP, "uniform", **{DENSITY: lambda **_: ran.u[:4]}, seed=3)
        torch.manual_seed(3)
        x, noise = torch.randn(4, 3), torch.randn(4, 3)
        sigmas = again.scheduler.sigmas[(ran.u[:4] * 1000).long()].view(-1, 1)
        own = (1.0 - sigmas) * x + sigmas * noise
        assert torch.equal(again.loss, ((0.5 * own - (noise - x)) ** 2).mean())

    def test_the_data_reach_a_policy_that_measures(self) -> None:
        loop = "for _ in range(10):" + STEP.replace("\n", "\n    ") + "\n"
        sizes: list[Any] = []
        policy = "speedit_plugins.policies.policy.TimestepPolicy.observe"
        with mock.patch(policy, lambda _, data: sizes.append(data)):
            ran = started(loop, "auto")
        assert len(sizes) == 10
        assert all(torch.equal(data, ran.x) for data in sizes)
        unseen = loop.replace("(1.0 - sigmas) * x + sigmas * noise", "x + sigmas * (noise - x)")
        with pytest.raises(ValueError, match="8 draws passed, and the host showed none"):
            started(unseen, "auto")

    def test_a_learning_policy_learns_from_the_unweighted_error(self) -> None:
        ran = started(STEP, "loss_balanced", batch=N)
        fresh = build_policy("loss_balanced", NoiseSchedule.rectified_flow(T), "flow").state_dict()
        assert str(ran.calls.policy.state_dict()["density"]) != str(fresh["density"])

    @pytest.mark.parametrize("is_on", [0, 1])
    def test_an_option_to_predict_data_is_asked(self, is_on: int) -> None:
        text = STEP.replace("target = ", "if args.precondition_outputs: pass\ntarget = ")
        args = SimpleNamespace(scheme="none", precondition_outputs=is_on)
        ran = started(text, MIN_SNR, args=args)
        sigma = 1 - ran.calls.policy.schedule.alpha
        snr = ((1 - sigma) ** 2 / sigma**2).clamp(max=5.0)
        wanted = snr if is_on else snr * sigma**2
        assert_close(ran.calls.policy.weight, wanted.double(), rtol=1e-4, atol=0, check_dtype=False)

    def test_without_gradients_all_is_the_scripts_own(self) -> None:
        text = "with torch.no_grad():\n" + "".join(f"    {line}\n" for line in STEP.splitlines()[1:])
        args = SimpleNamespace(scheme="sigma_sqrt")
        ran = started(text, MIN_SNR, args=args)
        torch.manual_seed(0)
        plain: dict[str, Any] = {"x": torch.randn(4, 3), "noise": torch.randn(4, 3), "args": args}
        plain |= {DENSITY: compute_density_for_timestep_sampling, WEIGHTING: compute_loss_weighting_for_sd3}
        exec(text, {"torch": torch, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)} | plain, plain)
        assert torch.equal(ran.loss, plain["loss"])
        assert ran.calls.state_dict() == {}


class TestRefusedForms:
    @pytest.mark.parametrize(
        "lookup",
        [
            "timesteps = u * 1000",
            "timesteps = first.timesteps[rows]\nsigmas = second.sigmas[rows]",
            "timesteps = table[rows]",
        ],
    )
    def test_a_draw_that_is_no_row_of_one_scheduler_stays(self, lookup: str) -> None:
        tree = ast.parse(f"u = {DENSITY}('none', 4)\nrows = (u * 1000).long()\n{lookup}\n")
        changed, sites = edited_sigmas(tree)
        assert changed is tree
        assert (sites.draws, sites.other_draws) == ([], [1])

    @pytest.mark.parametrize("text", [STEP, LATE_TABLE])
    def test_a_window_of_the_rows(self, text: str) -> None:
        windowed = text.replace("(u * 1000).long()", "(u * (900 - 100) + 100).long()")
        with pytest.raises(ValueError, match="looks its timesteps up in other rows"):
            started(windowed, "logit_normal", batch=64)

    def test_a_part_of_the_rows_in_another_branch(self) -> None:
        class Part:
            num_idx = 400

            def __call__(self, number: int) -> torch.Tensor:
                return torch.randint(600, 1000, (number,))

        names = {"args": SimpleNamespace(is_uniform=True), "draw_rows": Part()}
        with pytest.raises(ValueError, match=r"trains on a part of them \(two experts"):
            started(OTHER_BRANCH, "logit_normal", **names)
        # A policy that thins keeps the script's own draws.
        assert int(started(OTHER_BRANCH, DRAWS_SPEED, batch=N, **names).rows.min()) == 600

    def test_weights_of_both(self) -> None:
        args = SimpleNamespace(scheme="sigma_sqrt")
        with pytest.raises(ValueError, match="--weighting_scheme weighs the loss already"):
            started(STEP, MIN_SNR, args=args)
        # A policy that only draws goes with them.
        assert bool(started(STEP, "logit_normal", args=args).loss > 0)

    def test_a_script_without_a_place_for_weights_or_losses(self) -> None:
        without_weights = STEP.replace("compute_loss_weighting_for_sd3", "other_weights")
        names = {"other_weights": compute_loss_weighting_for_sd3}
        with pytest.raises(ValueError, match="no weights that could be the policy's"):
            started(without_weights, MIN_SNR, **names)
        without_error = STEP.replace("weights.float() * (answer.float() - target.float()) ** 2", "loss_of()")
        with pytest.raises(ValueError, match="does not show it"):
            started(without_error, "loss_balanced", loss_of=lambda: torch.ones(1))

    def test_a_batch_that_is_split(self) -> None:
        split = STEP.replace(
            "loss = ", "answer, target = answer[:2], target[:2]\nweights = weights[:2]\nloss = "
        )
        assert started(split, MIN_SNR).calls.policy.num_steps == 1
        with pytest.raises(ValueError, match=r"splits its batch \(prior preservation\)"):
            started(split, "loss_balanced")
        # As in SD3's script: two weights would broadcast over one error.
        whole = STEP.replace("loss = ", "answer, target = answer[:1], target[:1]\nloss = ")
        with pytest.raises(ValueError, match="the weights of 2 samples with the errors of 1"):
            started(whole, MIN_SNR, batch=2)
        assert started(whole, "logit_normal", batch=2).calls.policy.num_steps == 1


class TestForms:
    def test_reversed_data_are_at_sigma_1(self) -> None:
        text = STEP.replace("(1.0 - sigmas) * x + sigmas * noise", "(1.0 - sigmas) * noise + sigmas * x")
        ran = started(text, NOISE_LEVELS, batch=N)
        # Row 0 has sigma 1 and is data here.
        assert follows(ran.rows, ran.calls.policy.density)
        assert share_above_half(1 - ran.sigmas, NOISE_LEVELS)

    @pytest.mark.parametrize("is_uniform", [False, True])
    def test_both_branches_of_a_draw(self, is_uniform: bool) -> None:
        drawn: list[int] = []

        def draw_rows(number: int) -> torch.Tensor:
            drawn.append(number)
            return torch.randint(0, 1000, (number,), dtype=torch.int32)

        assert edited_sigmas(ast.parse(OTHER_BRANCH))[1].draws == [3, 6]
        args = SimpleNamespace(is_uniform=is_uniform)
        ran = started(OTHER_BRANCH, "logit_normal", batch=N, args=args, draw_rows=draw_rows)
        assert follows(index_of(ran.sigmas, ran.scheduler), ran.calls.policy.density)
        # The script's generators go on as they would without the policy.
        assert drawn == [N] * is_uniform

    @pytest.mark.parametrize("mu", [0.0, 1.15])
    def test_a_table_that_is_set_after_the_draw(self, mu: float) -> None:
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        args = SimpleNamespace(mu=mu)
        ran = started(LATE_TABLE, NOISE_LEVELS, batch=N, scheduler=scheduler, args=args)
        assert not torch.equal(ran.sigmas.flatten(), ran.scheduler.sigmas[ran.rows])
        assert bool((ran.timesteps == 1000 * ran.sigmas.flatten()).all())
        assert follows(index_of(ran.sigmas, scheduler), ran.calls.policy.density)
        assert share_above_half(ran.sigmas, NOISE_LEVELS)

    def test_the_boundary_of_speed_moves_with_a_shift_by_resolution(self) -> None:
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        boundaries = []
        for mu in (0.0, 1.15):
            args = SimpleNamespace(mu=mu)
            ran = started(LATE_TABLE, DRAWS_SPEED, scheduler=scheduler, args=args)
            boundaries.append(ran.calls.policy.boundary_index)
        # The share of the script's own draws that it thins stays.
        assert abs(boundaries[0] - boundaries[1]) <= 1

    def test_other_branches_wait_for_the_table_too(self) -> None:
        line = "scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 1000, 1000), mu=1.15)\ntimesteps ="
        text = OTHER_BRANCH.replace("timesteps =", line)
        names = {
            "args": SimpleNamespace(is_uniform=True),
            "draw_rows": lambda n: torch.randint(0, 1000, (n,)),
        }
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        ran = started(text, "logit_normal", batch=N, scheduler=scheduler, **names)
        assert follows(index_of(ran.sigmas, scheduler), ran.calls.policy.density)
        own = started(text, "uniform", batch=N, scheduler=scheduler, **names)
        assert follows(index_of(own.sigmas, scheduler), torch.full((T,), 1 / T))


MODULE = f"""
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import {DENSITY}

class Trainer:
    def __init__(self):
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    def timesteps(self, number):
        u = {DENSITY}("none", number)
        return self.scheduler.timesteps[(u * 1000).long()]
"""
SCRIPT = """
import torch
from project.parts.trainer import Trainer
t = Trainer().timesteps(20000)
weight = torch.nn.Parameter(torch.zeros(1))
weight.sum().backward()
torch.optim.SGD([weight], lr=0.1).step()
torch.save(t, "t.pt")
"""


class TestLauncher:
    @pytest.fixture(autouse=True)
    def project(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        parts = tmp_path / "project" / "parts"
        parts.mkdir(parents=True)
        for folder in (parts, parts.parent):
            (folder / "__init__.py").write_text("")
        (parts / "trainer.py").write_text(MODULE)
        (tmp_path / "train.py").write_text(SCRIPT)
        monkeypatch.chdir(tmp_path)
        yield tmp_path
        for name in [name for name in sys.modules if name.split(".")[0] == "project"]:
            del sys.modules[name]

    def test_a_module_of_the_project_is_found_and_edited(self, capsys: pytest.CaptureFixture[str]) -> None:
        launch.parsed("train.py")
        assert "project" not in sys.modules
        assert launch.main(["--policy", "logit_normal", "train.py"]) == 0
        assert "seam E, policy logit_normal" in capsys.readouterr().err
        sigma = torch.load("t.pt", weights_only=True) / 1000
        # With a shift of 3, sigma is above 1 / 2 where u is above 1 / 4; the module's own share is 0.75.
        wanted = float(build_policy("logit_normal", NoiseSchedule.rectified_flow(T)).density[250:].sum())
        assert abs(float((sigma > 0.5).double().mean()) - wanted) < 4 * 0.35 / N**0.5

    def test_it_draws_alone(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert launch.main(["--policy", "min_snr", "train.py"]) == 2
        assert "no weights that could be the policy's" in capsys.readouterr().err

    def test_a_u_that_looks_up_nothing_is_no_seam(
        self, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text = MODULE.replace("self.scheduler.timesteps[(u * 1000).long()]", "1000 * u")
        (project / "project/parts/trainer.py").write_text(text)
        assert launch.main(["--policy", "logit_normal", "train.py"]) == 2
        assert "no training loss went through the policy" in capsys.readouterr().err


FOLDERS = {
    "huggingface+diffusers/examples": 24,
    "aigc-apps+VideoX-Fun/scripts": 50,
    "PKU-YuanGroup+Open-Sora-Plan/opensora/train": 1,
    "hao-ai-lab+FastVideo": 3,
}
# Its u is sigma itself.
NOT_ROWS = "train_dreambooth_lora_ideogram4.py"


@pytest.mark.hosts
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_of_a_checkout_is_edited(folder: str) -> None:
    root = Path(os.environ["SPEEDIT_HOSTS"]) / folder
    if not root.is_dir():
        pytest.skip(f"no checkout {folder}")
    texts = {path: path.read_text(encoding="utf-8", errors="ignore") for path in root.rglob("*.py")}
    calling = {path: text for path, text in texts.items() if _calls(text, DENSITY)}
    assert len(calling) == FOLDERS[folder]
    for path, text in calling.items():
        _, sites = edited_sigmas(ast.parse(text))
        if path.name == NOT_ROWS:
            assert (sites.draws, len(sites.other_draws)) == ([], 1)
            continue
        # VideoX-Fun draws rows without u in its other branch.
        others = text.count("indices = idx_sampling(")
        assert len(sites.draws) == _calls(text, DENSITY) + others, path
        assert sites.other_draws == [], path
        assert len(sites.weights) == _calls(text, WEIGHTING), path
        # Two modalities, such as sound and pictures, are noised at two draws or at one.
        assert len(sites.data) >= 1, path
        assert len(sites.errors) == text.count("(weighting.float() * ("), path


def _calls(text: str, function: str) -> int:
    """How often a file calls a function."""
    return text.count(f"{function}(") - text.count(f"def {function}(")
