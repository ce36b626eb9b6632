"""Compares the process and the sampler with the diffusion code in a checkout of facebookresearch/DiT."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.policies.policy import TimestepDraw
from speedit_plugins.trainer.diffusion.gaussian_process import gaussian_process
from speedit_plugins.trainer.diffusion.respacing import space_timesteps
from speedit_plugins.trainer.diffusion.sampling import sample

pytestmark = pytest.mark.hosts

SHAPE = (4, 4, 8, 8)


@pytest.fixture(scope="module")
def reference() -> Any:
    """The package `diffusion` of the checkout, imported under a unique name."""
    package = Path(os.environ.get("SPEEDIT_HOSTS", "")) / "facebookresearch+DiT" / "diffusion"
    if not os.environ.get("SPEEDIT_HOSTS") or not package.is_dir():
        pytest.skip("needs $SPEEDIT_HOSTS/facebookresearch+DiT")
    spec = importlib.util.spec_from_file_location(
        "dit_reference_diffusion", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def randn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wavy(x: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
    """A smooth function in place of a model: noise channels, then variance channels in [-1, 1]."""
    phase = (timestep / 1000 + (0 if condition is None else condition)).reshape(-1, 1, 1, 1)
    return torch.cat([0.9 * x + 0.2 * torch.sin(3 * x + phase), torch.sin(5 * x + phase)], dim=1)


@pytest.mark.parametrize("respacing", ["", "250", "ddim50", "10,20,30"])
@pytest.mark.parametrize("rescale", [False, True])
def test_loss_terms_equal_the_reference(
    reference: Any, monkeypatch: pytest.MonkeyPatch, respacing: str, rescale: bool
) -> None:
    # At t = 0 the reference approximates the normal CDF by a tanh formula, up to 2 % off in bits. With the
    # exact CDF, in float64 to avoid cancellation, everything must agree.
    monkeypatch.setattr(
        sys.modules[reference.__name__ + ".diffusion_utils"], "approx_standard_normal_cdf", torch.special.ndtr
    )
    diffusion = reference.create_diffusion(respacing, rescale_learned_sigmas=rescale)
    process = gaussian_process(timestep_respacing=respacing, rescale_learned_sigmas=rescale)
    T = process.schedule.num_timesteps
    assert diffusion.num_timesteps == T
    index = torch.tensor([0, 1, T // 2, T - 1])
    x_0, noise = randn(SHAPE, 0).clamp(-1, 1).double(), randn(SHAPE, 1).double()
    theirs = diffusion.training_losses(wavy, x_0, index, noise=noise)
    draw = TimestepDraw(index, index / T, torch.ones(4))
    noised = process.corrupt(x_0, draw, noise=noise)
    ours = process.loss(wavy(noised.x_t, noised.timestep), noised, draw)
    # The reference rounds its coefficients to float32 (6e-8); at t = 0 the standard deviation is 0.007.
    for got, name in ((ours.mse, "mse"), (ours.vb, "vb"), (ours.loss, "loss")):
        assert_close(got, theirs[name], rtol=1e-4, atol=1e-6)


def test_250_step_samples_equal_the_reference(reference: Any) -> None:
    noise = randn(SHAPE, 0)
    torch.manual_seed(5)
    theirs = reference.create_diffusion("250").p_sample_loop(
        wavy, SHAPE, noise=noise, clip_denoised=False, device="cpu"
    )
    generator = torch.Generator().manual_seed(5)
    ours = sample(wavy, gaussian_process(), noise, num_steps=250, generator=generator)
    # float32 errors over 250 steps, amplified by 1 / alpha = 157 at the first.
    assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("clip", [False, True])
def test_ddim_samples_equal_the_reference(reference: Any, clip: bool) -> None:
    noise = randn(SHAPE, 0)
    theirs = reference.create_diffusion("50").ddim_sample_loop(
        wavy, SHAPE, noise=noise, clip_denoised=clip, device="cpu"
    )
    ours = sample(wavy, gaussian_process(), noise, sampler="ddim", num_steps=50, clip_sample=clip)
    assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_respacing_keeps_the_reference_timesteps(reference: Any) -> None:
    counts = [[n] for n in range(1, 1001)] + [[10, 20, 30], [1, 300, 1], [7, 0, 5]]
    for sections in counts:
        assert space_timesteps(1000, sections) == sorted(reference.space_timesteps(1000, sections))
    for text in ("250", "ddim25", "ddim50", "ddim250", "4,5,6,7"):
        assert space_timesteps(1000, text) == sorted(reference.space_timesteps(1000, text))
