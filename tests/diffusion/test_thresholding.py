"""Thresholding of x_0 against diffusers, closed forms, and in every sampler."""

import re

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.diffusion.flow import RectifiedFlow
from speedit_plugins.trainer.diffusion.gaussian_process import GaussianProcess
from speedit_plugins.trainer.diffusion.sampling import sample
from speedit_plugins.trainer.diffusion.thresholding import dynamic, quantile, static

DIGITS, SD = "configs/image/digits/speedit.yaml", "configs/text_to_image/sd15.yaml"


@pytest.mark.parametrize("spread", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("percentile", [0.8, 0.995, 1.0])
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (2, 3, 4, 6, 6)])
def test_dynamic_thresholding_is_that_of_diffusers(
    shape: tuple[int, ...], percentile: float, spread: float
) -> None:
    x_0 = spread * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    # diffusers limits s by sample_max_value; Imagen does not.
    scheduler = DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=percentile, sample_max_value=1e9, clip_sample=False
    )
    assert_close(dynamic(x_0, percentile=percentile), scheduler._threshold_sample(x_0), rtol=1e-6, atol=1e-6)


def test_dynamic_thresholding_scales_a_sample_by_its_own_percentile() -> None:
    # Absolute values 0, 1, 2, 3, 4: their upper quartile is 3. The other sample is inside the range.
    x_0 = torch.tensor([[0.0, -1, 2, 3, -4], [0, 0.1, -0.2, 0.3, 0.9]]).view(2, 1, 1, 5)
    found = dynamic(x_0, percentile=0.75)
    assert_close(found[0, 0, 0], torch.tensor([0, -1 / 3, 2 / 3, 1, -1]))
    assert torch.equal(found[1], x_0[1])


def test_a_percentile_of_1_keeps_all_proportions_and_static_cuts() -> None:
    x_0 = torch.tensor([0.5, -2.0, 4.0]).view(1, 1, 1, 3)
    assert dynamic(x_0, percentile=1.0).flatten().tolist() == [0.125, -0.5, 1]
    assert static(x_0).flatten().tolist() == [0.5, -1, 1]


def test_the_quantile_is_torchs() -> None:
    values = torch.randn(3, 101, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.3, 0.955, 1.0):
        assert_close(quantile(values, share), values.quantile(share, dim=1))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "ddim_leading", "dpm_solver", "euler", "heun"])
def test_every_sampler_ends_at_the_thresholded_x_0(sampler: str) -> None:
    target = torch.tensor([0.0, 1, -2, 4]).view(1, 1, 2, 2).expand(2, 3, 2, 2)
    is_flow = sampler in ("euler", "heun")
    process: GaussianProcess | RectifiedFlow = RectifiedFlow()
    if not is_flow:
        process = GaussianProcess(NoiseSchedule.linear(), prediction_type="x0", learn_sigma=False)

    def model(x: Tensor, timestep: Tensor, condition: object) -> Tensor:
        return (x - target) / (timestep / 1000).view(-1, 1, 1, 1) if is_flow else target

    noise = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    for options, wanted in (
        ({"clip_sample": True}, target.clamp(-1, 1)),
        ({"dynamic_percentile": 1.0}, target / 4),
        ({}, target),
    ):
        found = sample(model, process, noise, sampler=sampler, num_steps=5, **options)
        # The last step ends at x_0, up to float32.
        assert_close(found, wanted, rtol=0, atol=2e-5)


def test_options_that_exclude_each_other_are_refused() -> None:
    process = GaussianProcess(NoiseSchedule.linear(), learn_sigma=False)
    noise = torch.zeros(1, 1, 2, 2)
    for options, message in (
        ({"clip_sample": True, "dynamic_percentile": 0.9}, "clip_sample has no effect beside"),
        ({"dynamic_percentile": 0.0}, "dynamic_percentile needs to be in (0, 1], got 0"),
        ({"dynamic_percentile": 1.5}, "dynamic_percentile needs to be in (0, 1], got 1.5"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            sample(lambda x, t, c: x, process, noise, num_steps=2, **options)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (DIGITS, ["thresholding=dynamic"], "wanted sampler.clip_sample false beside it"),
        (DIGITS, ["thresholding=static"], "clip_sample is static thresholding already"),
        (DIGITS, ["dynamic_percentile=0.9"], "has no effect with thresholding null; wanted null"),
        (SD, ["thresholding=dynamic"], "latents do not lie in [-1, 1]; wanted null, got dynamic"),
        (DIGITS, ["thresholding=imagen"], "wanted one of static, dynamic, got"),
    ],
)
def test_keys_that_do_not_fit_are_refused(config: str, changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(config, "sample", [f"sampler.{change}" for change in changes])


def test_the_keys_are_what_the_sampler_gets() -> None:
    plain = load_config(DIGITS, "sample").sampler
    assert (plain.is_clamped, plain.percentile) == (True, None)
    off = ["sampler.clip_sample=false"]
    named = load_config(DIGITS, "sample", [*off, "sampler.thresholding=static"]).sampler
    assert (named.is_clamped, named.percentile) == (True, None)
    moving = load_config(DIGITS, "sample", [*off, "sampler.thresholding=dynamic"]).sampler
    assert (moving.is_clamped, moving.percentile) == (False, 0.995)
    changed = ["sampler.thresholding=dynamic", "sampler.dynamic_percentile=0.9"]
    assert load_config(DIGITS, "sample", [*off, *changed]).sampler.percentile == 0.9
