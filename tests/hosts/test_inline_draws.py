"""Hosts whose functions are edited: torchtitan's Flux trainer, and the scripts of HunyuanVideo and Mochi."""

import ast
import enum
import importlib
import math
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from conformance import split_step
from conformance.host_imports import checkout, imported
from conformance.split_step import Made, Recorded, SplitHost
from torch import Tensor, nn
from torch.nn import functional

from speedit_plugins import launch
from speedit_plugins.hosts.separate_draws import SeparateDraws
from speedit_plugins.hosts.trainers.inline_draws import (
    INLINE_CALLS,
    SCRIPTS,
    InlineCalls,
    adapt_torchtitan,
    edited_script,
)

SHAPE = (4, 3, 4, 4)


class Model(nn.Module):
    """Returns its input times a number, and keeps what it saw and returned."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor, **_: Any) -> Tensor:
        self.time, self.output = t, x * self.scale
        return self.output


def forced(t: Tensor) -> Any:
    """`torch.rand` returns a given t."""
    return mock.patch.object(torch, "rand", side_effect=lambda *_, **__: t.clone())


@contextmanager
def fresh_stand_in() -> Iterator[SplitHost]:
    module = importlib.reload(importlib.import_module("inline_draw_standin"))

    def step() -> Made:
        torch.manual_seed(3)
        model, plain = Model(), []

        def loss_fn(prediction: Tensor, target: Tensor, count: Tensor) -> Any:
            return functional.mse_loss(prediction, target, reduction="sum") / count, {}

        trainer = module.FluxTrainer(model, loss_fn)
        labels = 2 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
        with mock.patch.object(torch, "randn_like", keeping(plain)):
            loss = trainer.forward_backward_step(input_dict={}, labels=labels)
        errors = ((model.output - (plain[0] - 0.5 * labels)) ** 2).flatten(1).mean(1)
        return Made(model.time, loss.detach(), errors.detach())

    def data() -> Tensor:
        # Half of the images, which are twice as large.
        return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))

    yield SplitHost(partial(adapt_torchtitan, module), step, forced, observed=data)


def keeping(noises: list[Tensor]) -> Callable[..., Tensor]:
    """`torch.randn_like` that keeps what it returns."""
    own = torch.randn_like

    def randn_like(*args: Any, **kwargs: Any) -> Tensor:
        noises.append(own(*args, **kwargs))
        return noises[-1]

    return randn_like


def test_a_trainer_that_draws_under_no_grad() -> None:
    split_step.check(fresh_stand_in, split_step.TRAINING_ONLY)
    with fresh_stand_in() as host:
        host.adapt(Recorded("uniform"))
        with pytest.raises(ValueError, match=r"forward_backward_step has a policy already"):
            host.adapt(Recorded("uniform"))
    with pytest.raises(ValueError, match=r"has no FluxTrainer \(torchtitan Flux\)"):
        adapt_torchtitan(ModuleType("other"), Recorded("uniform"))


MOCHI = """
import sys
from pathlib import Path
import torch
import torch.nn.functional as F

def main():
    torch.manual_seed(0)
    scale = torch.nn.Parameter(torch.tensor(0.5))
    optimizer = torch.optim.SGD([scale], lr=1e-3)
    def get_batch():
        z = torch.randn(1, 3, 2, 4, 4)
        eps = torch.randn_like(z)
        sigma = torch.rand(z.shape[:1], device="cpu", dtype=torch.float32)
        return z, eps, sigma
    rows = []
    for step in range(400):
        with torch.no_grad():
            z, eps, sigma = get_batch()
            z_sigma = (1 - sigma) * z + sigma * eps
            ut = z - eps
        preds = scale * z_sigma
        loss = F.mse_loss(preds.float(), ut)
        loss.backward()
        rows.append((float(sigma), loss.item(), ((preds - ut) ** 2).mean().item()))
        optimizer.step()
        optimizer.zero_grad()
    Path(sys.argv[-1]).write_text(repr(rows))

if __name__ == "__main__":
    main()
"""


def test_an_unmodified_script_through_the_launcher(tmp_path: Path) -> None:
    script, out = tmp_path / "train.py", tmp_path / "rows"
    # deepspeed puts --local_rank in front of the launcher's arguments: it is the script's.
    script.write_text(f"import sys\nassert sys.argv[1:2] == ['--local_rank=3'], sys.argv\n{MOCHI}")
    policy = ["--policy", "logit_normal", "--set", "weighting=min_snr"]
    assert launch.main([*policy, "--local_rank=3", str(script), str(out)]) == 0
    rows = torch.tensor(ast.literal_eval(out.read_text()), dtype=torch.float64)
    built = SeparateDraws({"density": "logit_normal", "weighting": "min_snr"}).policy
    time, loss, error = rows.T
    weight = built.weight[(time * 1000).long()]
    assert torch.allclose(loss, weight * error, rtol=1e-5)
    late = float(built.density[500:].sum())
    # 4 sigma of a binomial frequency of 400 draws.
    assert abs(float((time >= 0.5).double().mean()) - late) < 4 * (late * (1 - late) / 400) ** 0.5


def test_another_script_is_no_seam(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "train.py"
    script.write_text(MOCHI.replace("torch.rand(", "torch.empty("))
    assert launch.main([str(script)]) == 2
    assert "has no seam: it reaches no function of a known host" in capsys.readouterr().err


@contextmanager
def fresh_torchtitan() -> Iterator[SplitHost]:
    replaced = ("transformers", "torchvision", "datasets")
    unknown = ("spmd_types", "grain", "tyro", "torchdata", "torchft", "tokenizers", "tensorboard", "wandb")
    blank = [f"torchtitan.distributed.minimal_async_ep{part}" for part in ("", ".api", ".kernels")]
    with imported(
        "torchtitan.models.flux.trainer",
        [checkout("pytorch+torchtitan")],
        replaced=replaced,
        unknown=unknown,
        blank=blank,
    ) as module:
        losses = importlib.import_module("torchtitan.components.loss")
        labels = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
        # What needs a cluster or pretrained encoders; the method itself is the host's.
        module.preprocess_data = lambda batch, **_: {
            "img_encodings": batch["image"],
            "clip_encodings": None,
            "t5_encodings": torch.zeros(4, 2, 3),
        }
        module.annotate_flux_forward_inputs = lambda **_: None
        module.spmd = SimpleNamespace(no_typecheck=nullcontext)

        def step() -> Made:
            torch.manual_seed(3)
            model, noises = Model(), []
            trainer = object.__new__(module.FluxTrainer)
            trainer.device, trainer._dtype = torch.device("cpu"), torch.float32
            trainer.autoencoder = trainer.clip_encoder = trainer.t5_encoder = None
            trainer.parallel_dims = SimpleNamespace(dp_enabled=False, cp_enabled=False, cp=1)
            trainer.config = SimpleNamespace(training=SimpleNamespace(max_context_length=1))
            trainer.ntokens_seen, trainer.train_context = 0, nullcontext
            trainer.model_parts = [lambda img, timesteps, **_: model(img, timesteps)]
            trainer.loss_fn = lambda pred, target, count: (losses.mse_loss(pred, target) / count, {})
            with mock.patch.object(torch, "randn_like", keeping(noises)):
                loss = trainer.forward_backward_step(input_dict={}, labels=labels.clone())
            target = module.pack_latents(noises[0] - labels)
            errors = ((model.output - target) ** 2).flatten(1).mean(1)
            return Made(model.time, loss.detach(), errors.detach())

        yield SplitHost(partial(adapt_torchtitan, module), step, forced, observed=labels.clone)


@pytest.mark.hosts
def test_the_flux_trainer_of_torchtitan() -> None:
    split_step.check(fresh_torchtitan, split_step.TRAINING_ONLY)


def calls_of(recorded: Callable[..., SeparateDraws], hosts: str) -> dict[str, Any]:
    host = next(each for each in SCRIPTS if each.hosts == hosts)
    return {INLINE_CALLS: {hosts: InlineCalls(host, recorded)}}


def functions(tree: ast.Module, names: set[str], namespace: dict[str, Any]) -> dict[str, Any]:
    """The functions and classes of a script, without what the script imports and runs."""
    body = [node for node in tree.body if getattr(node, "name", None) in names]
    exec(compile(ast.fix_missing_locations(ast.Module(body, [])), "train.py", "exec"), namespace)
    return namespace


@dataclass
class HunyuanVideo:
    """The trainer of its script: the host's own two methods, with what they call that needs a GPU replaced.

    Args:
        tree: of the script, edited or not.
        calls: what an edited script finds.
        t: that the host's own draw returns, our time; None lets it draw.
    """

    tree: ast.Module
    calls: dict[str, Any] = field(default_factory=dict)
    t: Tensor | None = None

    def adapt(self, draws_of: Callable[..., SeparateDraws]) -> None:
        changed = edited_script(self.tree)
        assert changed is not None, "the script's functions are not known"
        self.tree, self.calls = changed, calls_of(draws_of, "HunyuanVideo-1.5")

    @contextmanager
    def forced(self, t: Tensor) -> Iterator[None]:
        self.t = t
        yield
        self.t = None

    def trainer(self, model: Model) -> Any:
        namespace: dict[str, Any] = {"torch": torch, "nn": nn, "Enum": enum.Enum, "math": math}
        namespace.update(vars(typing), **self.calls)
        names = {"SNRType", "TimestepSampler", "LinearInterpolationSchedule", "timestep_transform"}
        functions(self.tree, names, namespace)
        (trainer,) = (n for n in self.tree.body if getattr(n, "name", "") == "HunyuanVideoTrainer")
        kept = [n for n in trainer.body if getattr(n, "name", "") in ("prepare_batch", "train_step")]
        functions(ast.Module([ast.ClassDef("Trainer", [], [], kept, [])], []), {"Trainer"}, namespace)
        host, text = namespace["Trainer"](), torch.zeros(4, 1)
        sampler = namespace["TimestepSampler"](T=1000, device=torch.device("cpu"), snr_type="lognorm")
        if self.t is not None:
            # The host shifts its draw by 3 afterwards.
            drawn = 1000 * (self.t / (3 - 2 * self.t))
            sampler.sample = lambda *_, **__: drawn
        config = {"num_train_timesteps": 1000, "train_timestep_shift": 3.0, "dtype": "fp32"}
        config |= {"gradient_accumulation_steps": 1, "max_grad_norm": 0, "learning_rate": 0}
        vars(host).update(
            config=SimpleNamespace(**config),
            device=torch.device("cpu"),
            sp_enabled=False,
            global_step=0,
            sample_task=lambda _: "t2v",
            get_condition=lambda latents, _: latents[:, :0],
            encode_text=lambda prompts, **_: (text, text, None, None),
            byt5_kwargs={"byt5_model": None},
            pipeline=SimpleNamespace(_process_single_byt5_prompt=lambda *_: (text[:1], text[:1])),
            timestep_sampler=sampler,
            noise_schedule=namespace["LinearInterpolationSchedule"](T=1000),
            transformer=lambda x, t, **_: (model(x, t),),
            optimizer=mock.MagicMock(),
            lr_scheduler=mock.MagicMock(),
        )
        return host

    def step(self) -> Made:
        torch.manual_seed(3)
        model, noises, losses, backward = Model(), list[Tensor](), list[Tensor](), Tensor.backward

        def keep(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            losses.append(loss.detach().clone())
            if torch.is_grad_enabled():
                backward(loss, *args, **kwargs)

        with (
            mock.patch.object(torch, "randn_like", keeping(noises)),
            mock.patch.object(Tensor, "backward", keep),
            mock.patch.object(torch, "autocast", return_value=nullcontext()),
        ):
            self.trainer(model).train_step({"latents": videos(), "text": [""] * 4})
        errors = ((model.output - (noises[0] - videos())) ** 2).flatten(1).mean(1)
        return Made(model.time / 1000, losses[0], errors.detach())


def videos() -> Tensor:
    """Latents (4, C, F, H, W)."""
    return torch.randn(4, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1))


@contextmanager
def fresh_hunyuan_video() -> Iterator[SplitHost]:
    path = checkout("Tencent-Hunyuan+HunyuanVideo-1.5") / "train.py"
    host = HunyuanVideo(ast.parse(path.read_text(encoding="utf-8")))
    yield SplitHost(host.adapt, host.step, host.forced, observed=videos)


@pytest.mark.hosts
def test_the_trainer_of_hunyuan_video() -> None:
    split_step.check(fresh_hunyuan_video)


@pytest.mark.hosts
def test_the_script_of_mochi() -> None:
    """Its loop needs the model's weights; its batch and its loss are edited as those of the stand-in."""
    path = checkout("genmoai+mochi") / "demos/fine_tuner/train.py"
    own = path.read_text(encoding="utf-8")
    changed = edited_script(ast.parse(own))
    assert changed is not None
    text = ast.unparse(changed)
    (draw,) = (line.strip() for line in text.splitlines() if ".times(" in line)
    (loss,) = (line.strip() for line in text.splitlines() if ".squared_error(" in line)
    calls = f"{INLINE_CALLS}['Mochi']"
    assert draw == f"sigma = {calls}.times(_speedit_hosts_draw, z)"
    assert loss == f"loss = {calls}.squared_error(F.mse_loss, preds.float(), ut_dit_space)"
    (get_batch,) = (n for n in ast.walk(changed) if getattr(n, "name", "") == "get_batch")
    recorded = Recorded("logit_normal")
    namespace: dict[str, Any] = {"torch": torch, "cast": lambda _, value: value, "Tensor": Tensor}
    namespace.update(calls_of(recorded, "Mochi"), Tuple=tuple, Dict=dict, Any=Any)
    namespace.update(random=SimpleNamespace(random=lambda: 1.0), cfg=mock.MagicMock())
    namespace["cfg"].training.caption_dropout = 0
    z = torch.randn(1, 3, 2, 4, 4)
    namespace["LatentDistribution"] = lambda *_: SimpleNamespace(sample=lambda: z)
    embed = {"y_feat": [torch.zeros(1)], "y_mask": [torch.zeros(1)]}
    namespace["batch"] = ({"mean": 0, "logvar": 0}, embed)
    outer = ast.parse("def main():\n    train_dl_iter = iter([batch])\n    return get_batch()")
    outer.body[0].body.insert(1, get_batch)
    exec(compile(ast.fix_missing_locations(outer), str(path), "exec"), namespace)
    main = namespace["main"]
    with torch.no_grad():
        sigma = main()[3]
    assert [each.shape for each in recorded.observed] == [z.shape]
    assert recorded.made[0].policy.num_steps == 1
    assert sigma.shape == (1,)
