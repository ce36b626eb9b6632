import math
import re

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import PROCESSES, build
from speedit_plugins.trainer.diffusion.augmentation import NoiseAugmentation
from speedit_plugins.trainer.diffusion.flow import RectifiedFlow
from speedit_plugins.trainer.diffusion.gaussian_process import GaussianProcess

PROCESSES_OF_TEST = ("linear", "cosine", "flow")


def process_of(name: str) -> GaussianProcess | RectifiedFlow:
    if name == "flow":
        # The shift is of the training's times, not of the path.
        return RectifiedFlow(shift=3.0)
    options = {"type": "SpeeDiffusion", "noise_schedule": name, "diffusion_steps": 1000}
    return build(PROCESSES, options)


def scales(name: str, level: float) -> tuple[float, float]:
    """alpha and sigma at the level, from the definitions of the processes."""
    if name == "flow":
        return 1 - level, level
    steps = round(level * 1000)
    if name == "linear":
        betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    else:
        # Nichol and Dhariwal 2021, arXiv:2102.09672, equation 17, with betas of at most 0.999.
        f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
        betas = [min(1 - f[i + 1] / f[i], 0.999) for i in range(1000)]
    bar = math.prod(1 - beta for beta in betas[:steps])
    return math.sqrt(bar), math.sqrt(1 - bar)


@pytest.mark.parametrize("name", PROCESSES_OF_TEST)
def test_the_noise_is_that_of_the_process_at_the_level(name: str) -> None:
    augmentation = NoiseAugmentation(process_of(name), largest=1.0)
    generator = torch.Generator().manual_seed(0)
    # One image is 2 everywhere, the other -1.
    x = torch.tensor([2.0, -1.0]).view(2, 1, 1, 1).expand(2, 1, 400, 400)
    for level in (0.001, 0.2, 0.9):
        found = augmentation.corrupt(x, torch.full((2,), level), torch.randn(x.shape, generator=generator))
        alpha, sigma = scales(name, level)
        # 5 sigma of a mean, and of a variance, of 160,000 numbers: 5 / 400 and 5 sqrt(2) / 400.
        assert_close(found.mean((1, 2, 3)), alpha * x[:, 0, 0, 0], rtol=0, atol=5 * sigma / 400)
        variance = torch.full((2,), sigma**2)
        assert_close(found.var((1, 2, 3)), variance, rtol=5 * math.sqrt(2) / 400, atol=0)


@pytest.mark.parametrize("name", PROCESSES_OF_TEST)
def test_level_0_leaves_the_input_to_the_bit(name: str) -> None:
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    augmentation = NoiseAugmentation(process_of(name), largest=0.5)
    found = augmentation.corrupt(x, torch.zeros(3), torch.randn_like(x))
    assert torch.equal(found, x)


@pytest.mark.parametrize("name", PROCESSES_OF_TEST)
def test_levels_are_uniform_up_to_the_largest(name: str) -> None:
    augmentation = NoiseAugmentation(process_of(name), largest=0.2)
    # In the middle of each part, clear of the rounding at its ends.
    uniform = (torch.arange(20_100) + 0.5) / 20_100
    levels = augmentation.levels(uniform)
    assert float(levels.min()) == pytest.approx(0, abs=1e-5)
    assert float(levels.max()) == pytest.approx(0.2, abs=1e-5)
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    # A Gaussian process has 201 levels: half of one's share beside the quantile is 0.0005.
    assert_close(levels.quantile(quantiles), 0.2 * quantiles, rtol=0, atol=6e-4)
    if name != "flow":
        # Every timestep from none to 200 alike: 20,100 / 201.
        _, counts = levels.unique(return_counts=True)
        assert counts.tolist() == [100] * 201


def test_a_level_that_is_not_trained_is_refused() -> None:
    augmentation = NoiseAugmentation(process_of("linear"), largest=0.2)
    assert augmentation.nearest(0.1234) == 0.123
    for level in (0.3, -0.1, math.nan):
        with pytest.raises(ValueError, match=re.escape("needs to be in [0, 0.2]")):
            augmentation.nearest(level)
    with pytest.raises(ValueError, match=re.escape("level in [0, 1], got 1.5")):
        NoiseAugmentation(process_of("linear"), largest=1.5)


def test_a_respaced_process_is_refused() -> None:
    schedule: NoiseSchedule = process_of("linear").schedule.respaced([0, 500, 999])
    with pytest.raises(ValueError, match="without respacing, got 3 of 1000"):
        NoiseAugmentation(GaussianProcess(schedule), largest=0.2)


def test_float64_inputs_keep_their_precision() -> None:
    x: Tensor = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    found = NoiseAugmentation(process_of("linear"), largest=1.0).corrupt(
        x, torch.ones(1), torch.zeros_like(x)
    )
    assert_close(float(found), scales("linear", 1.0)[0], rtol=1e-9, atol=0)
