"""Seam E in the training steps of VideoX-Fun and Open-Sora-Plan 1.5: their edited lines, and a tiny model.

Whole trainings of these need CUDA and large models. Here the lines from the noise to the loss run as the
launcher edits them, beside the formulas of what they should give.
"""

import ast
import math
import os
import runpy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.hosts.edits.sigma_edits import SIGMA_CALLS, edited_sigmas
from speedit_plugins.hosts.sigma_calls import SigmaCalls

VIDEOX = "aigc-apps+VideoX-Fun"
# A script -> the shape of a sample as the lines have it, and the latents' size by which it shifts its table.
SCRIPTS = {
    "wan2.1/train.py": (4, 3, 4, 4),
    "wan2.2/train.py": (4, 3, 4, 4),
    "qwenimage/train.py": (600, 8),
    "z_image/train.py": (4, 1, 4, 4),
}
B, T = 512, 1000
# Decided on log-SNR, and weighs.
WEIGHED = {"density": {"type": "log_snr_normal", "mean": 1.0}, "weighting": "min_snr"}


def checkout(folder: str) -> Path:
    path = Path(os.environ["SPEEDIT_HOSTS"]) / folder
    if not path.is_dir():
        pytest.skip(f"no checkout {folder}")
    return path


def lines_of(tree: ast.Module, first: str, last: str) -> list[ast.stmt]:
    """The statements of the block that has both, from the one that begins with `first` on to `last`."""
    for node in ast.walk(tree):
        for block in (getattr(node, "body", None), getattr(node, "orelse", None)):
            if not isinstance(block, list):
                continue
            texts = [ast.unparse(each) for each in block]
            starts = [n for n, text in enumerate(texts) if text.startswith(first)]
            ends = [n for n, text in enumerate(texts) if text.startswith(last)]
            if starts and ends:
                return block[starts[0] : ends[0] + 1]
    raise AssertionError(f"no block from {first!r} to {last!r}")


def ran(statements: list[ast.stmt], names: dict[str, Any]) -> SimpleNamespace:
    """The names after the statements."""
    scope = dict(names)
    with mock.patch("torch.cuda.device", return_value=nullcontext()):
        exec(compile(ast.Module(statements, []), "script", "exec"), scope)
    return SimpleNamespace(**scope)


def common(shape: tuple[int, ...], seed: int = 0, **options: Any) -> dict[str, Any]:
    """What every script has around its lines. A batch is B samples of this shape."""
    torch.manual_seed(seed)
    args = {"weighting_scheme": "none", "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, **options}
    device = torch.device("cpu")
    return {
        **{"torch": torch, "np": np, "math": math, "F": functional, "nn": nn},
        "compute_density_for_timestep_sampling": compute_density_for_timestep_sampling,
        "compute_loss_weighting_for_sd3": compute_loss_weighting_for_sd3,
        "args": SimpleNamespace(**args),
        "latents": torch.randn(B, *shape),
        "accelerator": SimpleNamespace(device=device, unwrap_model=lambda model: model),
    }


def videox(path: Path, *, is_uniform: bool, **changed: Any) -> dict[str, Any]:
    """The names of one of VideoX-Fun's scripts. The model's answer is half of its input."""
    shape = SCRIPTS[f"{path.parent.name}/{path.name}"]
    is_dynamic = "mu=mu" in path.read_text(encoding="utf-8")
    sampling = runpy.run_path(str(path.parents[2] / "videox_fun/utils/discrete_sampler.py"))
    options = {"train_sampling_steps": T, "train_mode": "normal", "motion_sub_loss": False}

    def transformer(**inputs: Any) -> Any:
        half = 0.5 * inputs[next(name for name in ("x", "hidden_states") if name in inputs)]
        # Z-Image's model returns the opposite, in a tuple.
        return (-half,) if "cap_feats" in inputs else half

    transformer.config = SimpleNamespace(patch_size=(1, 2, 2))
    names = common(shape, **{**options, "uniform_sampling": is_uniform, **changed})
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=is_dynamic)
    embeddings = dict.fromkeys(("prompt_embeds", "encoder_attention_mask", "inpaint_latents", "clip_context"))
    return {
        **{**names, **embeddings, "noise_scheduler": scheduler, "transformer3d": transformer},
        **{"bsz": B, "num_frames": 3, "height": 4, "width": 4, "weight_dtype": torch.float32},
        "idx_sampling": sampling["DiscreteSampling"](T, uniform_sampling=is_uniform),
        "torch_rng": torch.Generator().manual_seed(0),
        "vae": SimpleNamespace(latent_channels=4),
    }


def functions_of(tree: ast.Module, *names: str) -> list[ast.stmt]:
    return [each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name in names]


def error_of(data: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Mean squared error of each sample, float64 (B,), for an answer that is half of the input."""
    x, s = data.double(), sigmas.double()
    return ((0.5 * ((1 - s) * x + s * noise.double()) - (noise.double() - x)) ** 2).flatten(1).mean(1)


def follows_noise_levels(sigmas: Tensor) -> bool:
    """Whether sigmas have the law of `WEIGHED` in a table without a shift, in three parts of [0, 1]."""
    density = build_policy(WEIGHED, NoiseSchedule.rectified_flow(T), "flow").density
    found = torch.histc(sigmas.double().flatten(), bins=4, min=0, max=1) / B
    wanted = density.view(4, -1).sum(1)
    # A row of a shifted table is up to 3 of 1000 wide.
    room = 4 * (wanted * (1 - wanted) / B).sqrt() + 3 * float(density.max())
    return bool(((found - wanted).abs() < room).all())


@pytest.mark.hosts
@pytest.mark.parametrize("is_uniform", [False, True])
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_step_of_a_script_of_videox_fun(script: str, is_uniform: bool) -> None:
    path = checkout(VIDEOX) / "scripts" / script
    plain = ast.parse(path.read_text(encoding="utf-8"))
    tree, _ = edited_sigmas(plain)

    def step(tree: ast.Module, policy: Any, **changed: Any) -> SimpleNamespace:
        calls = SigmaCalls(policy, generator=torch.Generator().manual_seed(0))
        names = videox(path, is_uniform=is_uniform, **changed) | {SIGMA_CALLS: calls}
        lines = [*functions_of(tree, "calculate_shift"), *lines_of(tree, "noise = ", "loss = loss.mean()")]
        return SimpleNamespace(**{**vars(ran(lines, names)), "calls": calls})

    done = step(tree, WEIGHED)
    assert follows_noise_levels(done.sigmas)
    sigma = done.sigmas.flatten().double()
    # A flow's error is that of the data times 1 / sigma^2, and min(SNR, 5) weighs the latter.
    weight = ((1 - sigma) ** 2).clamp(max=5 * sigma**2)
    wanted = float((weight * error_of(done.latents, done.noise, done.sigmas)).mean())
    # float32: 1e-7 relative to each of the terms.
    assert_close(float(done.loss), wanted, rtol=1e-5, atol=1e-9)
    assert done.calls.policy.num_steps == 1
    # `uniform` keeps the script's own law, and its loss at the same rows to the bit.
    own = step(tree, "uniform")
    rows = (own.sigmas.view(-1, 1) - own.noise_scheduler.sigmas[:T]).abs().argmin(1)
    assert abs(float((rows < T / 2).double().mean()) - 0.5) < 4 * 0.5 / B**0.5
    with mock.patch.dict(globals(), {"compute_density_for_timestep_sampling": lambda **_: (rows + 0.5) / T}):
        names = videox(path, is_uniform=False)
        lines = [*functions_of(plain, "calculate_shift"), *lines_of(plain, "noise = ", "loss = loss.mean()")]
        unedited = ran(lines, names)
    assert torch.equal(unedited.sigmas, own.sigmas)
    assert torch.equal(unedited.loss, own.loss)
    with pytest.raises(ValueError, match="the loss of each sample, and this script does not show it"):
        step(tree, "loss_balanced")
    with pytest.raises(ValueError, match="--weighting_scheme weighs the loss already"):
        step(tree, WEIGHED, weighting_scheme="cosmap")


@pytest.mark.hosts
@pytest.mark.parametrize("has_mask", [False, True])
def test_the_step_of_open_sora_plan(has_mask: bool) -> None:
    path = checkout("PKU-YuanGroup+Open-Sora-Plan") / "opensora/train/train_t2v_diffusers.py"
    plain = ast.parse(path.read_text(encoding="utf-8"))
    tree, sites = edited_sigmas(plain)
    assert [len(sites.draws), len(sites.weights), len(sites.data), len(sites.errors)] == [1, 1, 1, 1]
    mask = torch.ones(B, 3, 4, 4)
    mask[:, :, :, 2:] = 0 if has_mask else 1

    def step(tree: ast.Module, policy: Any, **changed: Any) -> SimpleNamespace:
        calls = SigmaCalls(policy, generator=torch.Generator().manual_seed(0))
        names = common(
            (4, 3, 4, 4), **{"rf_scheduler": True, "noise_offset": 0.0, "snr_gamma": None, **changed}
        )
        names |= {SIGMA_CALLS: calls, "noise_scheduler_copy": FlowMatchEulerDiscreteScheduler(shift=3.0)}
        names |= {"model": lambda x, t, **_: (0.5 * x,), "model_kwargs": {"attention_mask": mask}}
        names |= {"model_input": names["latents"]}
        (get_sigmas,) = [each for each in ast.walk(tree) if getattr(each, "name", "") == "get_sigmas"]
        # The last statement is the branch that makes the loss.
        body = next(each for each in ast.walk(tree) if getattr(each, "name", "") == "run").body
        texts = [ast.unparse(each) for each in body]
        first = next(n for n, text in enumerate(texts) if text.startswith("noise = "))
        last = max(n for n, text in enumerate(texts) if text.startswith("if not args.rf_scheduler"))
        return SimpleNamespace(**{**vars(ran([get_sigmas, *body[first : last + 1]], names)), "calls": calls})

    done = step(tree, WEIGHED)
    assert follows_noise_levels(done.sigmas)
    sigma = done.sigmas.flatten().double()
    seen = slice(None, 2 if has_mask else None)
    parts = [done.model_input[..., seen], done.noise[..., seen]]
    weight = ((1 - sigma) ** 2).clamp(max=5 * sigma**2)
    wanted = float((weight * error_of(*parts, done.sigmas)).mean())
    assert_close(float(done.loss), wanted, rtol=1e-5, atol=1e-9)
    own = step(tree, "uniform")
    with mock.patch.dict(globals(), {"compute_density_for_timestep_sampling": lambda **_: own.u}):
        unedited = step(plain, "uniform")
    assert torch.equal(unedited.sigmas, own.sigmas)
    assert torch.equal(unedited.loss, own.loss)
    fresh = build_policy("loss_balanced", NoiseSchedule.rectified_flow(T), "flow").state_dict()
    learned = step(tree, "loss_balanced").calls.policy.state_dict()
    assert str(learned["density"]) != str(fresh["density"])
    with pytest.raises(ValueError, match="--weighting_scheme weighs the loss already"):
        step(tree, WEIGHED, weighting_scheme="sigma_sqrt")
