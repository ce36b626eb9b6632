"""Guidance and its schedules, in every sampler.

Dims: B samples.
"""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.trainer.diffusion.flow import RectifiedFlow
from speedit_plugins.trainer.diffusion.gaussian_process import GaussianProcess
from speedit_plugins.trainer.diffusion.guidance import Guided, guidance_schedule, power_cosine, within
from speedit_plugins.trainer.diffusion.sampling import sample

GAUSSIAN = GaussianProcess(NoiseSchedule.linear(), learn_sigma=False)
FLOW = RectifiedFlow()
SAMPLERS = [
    *((GAUSSIAN, name) for name in ("ddpm", "ddim", "ddim_leading", "ddim_leading_1", "dpm_solver")),
    (FLOW, "euler"),
    (FLOW, "heun"),
]
every_sampler = pytest.mark.parametrize(("process", "sampler"), SAMPLERS, ids=[name for _, name in SAMPLERS])


def shifted_by(x: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
    """A model whose guided prediction shows the scale: the difference of its conditions is a constant."""
    assert condition is not None
    return 0.5 * x + condition.reshape(-1, 1, 1, 1) + timestep.reshape(-1, 1, 1, 1).to(x.dtype) / 2000


def options(**changes: Any) -> dict[str, Any]:
    given, null = torch.tensor([0.3, -0.2]), torch.zeros(2)
    return {"condition": given, "null_condition": null, "guidance_scale": 3.0, "num_steps": 8, **changes}


def drawn(process: Any, sampler: str, model: Any = shifted_by, **changes: Any) -> Tensor:
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    return sample(model, process, noise, sampler=sampler, generator=generator, **options(**changes))


def test_the_power_cosine_equals_its_formula_and_grows_from_noise_to_data() -> None:
    for power in (0.01, 1.0, 4.0):
        for time in (0.0, 0.25, 0.5, 0.999, 1.0):
            wanted = (1 - math.cos((1 - time) ** power * math.pi)) / 2
            assert power_cosine(time, power=power) == pytest.approx(wanted, abs=1e-15)
        assert (power_cosine(1.0, power=power), power_cosine(0.0, power=power)) == (0, 1)
    shares = [power_cosine(time / 100, power=4.0) for time in range(101)]
    assert shares == sorted(shares, reverse=True)


@every_sampler
def test_each_model_call_is_guided_by_the_scale_of_its_time(process: Any, sampler: str) -> None:
    last = 1000.0

    def by_hand(x: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
        """The guided prediction itself, as a model that is called without guidance."""
        time = float(timestep[0]) / last
        scale = 1 + 2 * (1 - math.cos(math.pi * (1 - time) ** 1.5)) / 2
        assert condition is not None
        null = shifted_by(x, timestep, torch.zeros_like(condition))
        return null + scale * (shifted_by(x, timestep, condition) - null)

    found = drawn(process, sampler, guidance_schedule=guidance_schedule("power_cosine", power=1.5))
    wanted = drawn(process, sampler, by_hand, guidance_scale=1.0)
    # Float64; only the place of the sum differs.
    assert_close(found, wanted, rtol=0, atol=1e-10)
    assert (found - drawn(process, sampler)).abs().max() > 0.1


@every_sampler
def test_an_interval_guides_inside_and_calls_the_model_once_outside(process: Any, sampler: str) -> None:
    calls: list[tuple[float, int]] = []

    def counted(x: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
        calls.append((float(timestep[0]) / 1000, len(x)))
        return shifted_by(x, timestep, condition)

    schedule = guidance_schedule("interval", interval=[0.25, 0.7])
    found = drawn(process, sampler, counted, guidance_schedule=schedule)
    assert {number for _, number in calls} == {2, 4}
    for time, number in calls:
        assert number == (4 if 0.25 <= time <= 0.7 else 2)
    whole = drawn(process, sampler, guidance_schedule=guidance_schedule("interval", interval=[0, 1]))
    assert_close(whole, drawn(process, sampler), rtol=0, atol=1e-12)
    assert not torch.equal(found, whole)


def test_the_constant_schedule_is_no_schedule() -> None:
    assert guidance_schedule("constant") is None
    assert guidance_schedule("power_cosine")(0.5) == power_cosine(0.5, power=4.0)
    assert [within(time, interval=(0.2, 0.6)) for time in (0.1, 0.2, 0.6, 0.7)] == [0, 1, 1, 0]


def test_only_the_first_channels_are_guided() -> None:
    def model(x: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
        return shifted_by(x, timestep, condition)

    x, given, null = torch.randn(2, 4, 2, 2), torch.tensor([1.0, 2.0]), torch.zeros(2)
    schedule = partial(power_cosine, power=2.0)
    guided = Guided(model, given, null, 4.0, 3, schedule, 1000.0)
    timestep = torch.tensor([250, 250])
    plain, other = model(x, timestep, given), model(x, timestep, null)
    scale = 1 + 3 * power_cosine(0.25, power=2.0)
    found = guided(x, timestep)
    assert_close(found[:, :3], (other + scale * (plain - other))[:, :3])
    assert torch.equal(found[:, 3:], plain[:, 3:])


def test_an_unknown_schedule_and_one_without_effect_are_refused() -> None:
    with pytest.raises(
        ValueError, match="unknown guidance schedule 'power_cosin'; did you mean 'power_cosine'"
    ):
        guidance_schedule("power_cosin")
    with pytest.raises(ValueError, match="guidance_schedule has no effect at guidance_scale 1"):
        drawn(FLOW, "euler", guidance_scale=1.0, guidance_schedule=guidance_schedule("power_cosine"))
