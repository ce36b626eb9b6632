"""A rectified flow whose network predicts x_0: its loss and its samples, against closed forms."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.policies.policy import TimestepDraw
from speedit_plugins.registry import PROCESSES, build
from speedit_plugins.trainer.diffusion.flow import RectifiedFlow
from speedit_plugins.trainer.diffusion.gaussian_process import Noised
from speedit_plugins.trainer.diffusion.sampling import sample

FLOW, OF_DATA = RectifiedFlow(), RectifiedFlow(prediction_type="x0")
# Both sides of 0.05, below which a time divides as 0.05 does.
TIMES = [0.01, 0.04, 0.06, 0.5, 0.99]
SHAPES = [(5, 4, 4, 4), (5, 4, 3, 4, 4)]


def randn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(times: list[float]) -> TimestepDraw:
    time = torch.tensor(times)
    return TimestepDraw((1000 * time).long(), time, torch.arange(1.0, 1 + len(times)), "mse")


def noised(shape: tuple[int, ...]) -> Noised:
    return OF_DATA.corrupt(randn(shape, 0), drawn(TIMES), noise=randn(shape, 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_the_error_of_x_0_over_the_squared_time(shape: tuple[int, ...]) -> None:
    batch, prediction = noised(shape), randn(shape, 2)
    terms = OF_DATA.loss(prediction, batch, drawn(TIMES))
    error = (prediction - batch.x_0).square().flatten(1).mean(1)
    wanted = error / torch.tensor(TIMES, dtype=torch.float64).clamp(min=0.05).square()
    # The model's timestep, and so the time, is float32.
    assert_close(terms.mse, wanted, rtol=1e-6, atol=0)
    assert_close(terms.loss, torch.arange(1.0, 6.0) * wanted, rtol=1e-6, atol=0)
    assert not OF_DATA.loss(batch.x_0, batch, drawn(TIMES)).loss.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_the_flows_loss_of_the_velocity_of_the_prediction(shape: tuple[int, ...]) -> None:
    prediction, noise = randn(shape, 2), randn(shape, 1)
    draw = drawn([0.06, 0.1, 0.5, 0.7, 0.99])
    batch, other = (flow.corrupt(randn(shape, 0), draw, noise=noise) for flow in (OF_DATA, FLOW))
    assert torch.equal(batch.x_t, other.x_t)
    t = draw.time.double().reshape(-1, *[1] * (len(shape) - 1))
    wanted = FLOW.loss((other.x_t - prediction) / t, other, draw)
    assert_close(OF_DATA.loss(prediction, batch, draw).loss, wanted.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_point_mass_is_sampled_exactly_from_times_that_divide_as_themselves(sampler: str) -> None:
    point = randn((4, 4, 4), 3)
    found = sample(
        lambda x, timestep, condition: point.expand_as(x),
        OF_DATA,
        randn(SHAPES[0], 0),
        sampler=sampler,
        num_steps=20,
    )
    # Times are float32.
    assert_close(found, point.expand_as(found), rtol=0, atol=1e-5)


def test_below_the_least_divisor_a_step_goes_a_share_of_the_way_to_x_0() -> None:
    noise = randn(SHAPES[0], 0)
    found = sample(lambda x, *_: torch.zeros_like(x), OF_DATA, noise, sampler="euler", num_steps=50)
    # Down to t = 0.04 the solution is t noise. Each of the last two steps, of 0.02, leaves 1 - 0.02 / 0.05.
    assert_close(found, 0.04 * 0.6**2 * noise, rtol=1e-4, atol=0)


def test_the_exact_x_0_and_the_exact_velocity_of_gaussian_data_give_the_same_samples() -> None:
    mean, std = 0.3, 0.5

    def x_0(x: Tensor, timestep: Tensor, condition: object) -> Tensor:
        t = timestep.double().reshape(-1, 1, 1, 1) / 1000
        gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
        return mean + gain * (x - (1 - t) * mean)

    def velocity(x: Tensor, timestep: Tensor, condition: object) -> Tensor:
        return (x - x_0(x, timestep, condition)) / (timestep.double().reshape(-1, 1, 1, 1) / 1000)

    for options in ({"sampler": "euler"}, {"sampler": "heun"}, {"sampler": "euler", "clip_sample": True}):
        ours, theirs = (
            sample(model, process, randn(SHAPES[0], 0), num_steps=20, **options)
            for model, process in ((x_0, OF_DATA), (velocity, FLOW))
        )
        assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_guidance_of_x_0_is_guidance_of_the_velocity() -> None:
    noise, condition = randn(SHAPES[0], 0), torch.arange(1, 6)

    def x_0(x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        return x.sin() * label.reshape(-1, 1, 1, 1)

    def velocity(x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        return (x - x_0(x, timestep, label)) / (timestep.reshape(-1, 1, 1, 1).double() / 1000)

    ours, theirs = (
        sample(
            model,
            process,
            noise,
            sampler="euler",
            num_steps=4,
            condition=condition,
            null_condition=torch.zeros(5, dtype=torch.int64),
            guidance_scale=3.0,
        )
        for model, process in ((x_0, OF_DATA), (velocity, FLOW))
    )
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_policies_see_a_flow_and_an_unknown_prediction_is_named() -> None:
    assert OF_DATA.prediction_type == "flow"
    with pytest.raises(ValueError, match=r"no prediction_type 'x_0'; did you mean 'x0'\?; known: flow, x0"):
        build(PROCESSES, {"type": "RectifiedFlow", "prediction_type": "x_0"})
    with pytest.raises(ValueError, match="prediction needs shape"):
        OF_DATA.velocity(torch.zeros(2, 3), torch.zeros(2, 4), torch.tensor([math.pi, 1]))
