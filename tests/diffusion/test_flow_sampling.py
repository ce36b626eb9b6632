"""Sampling a rectified flow: the exact solution for Gaussian data, solvers by hand, errors."""

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.trainer.diffusion.flow import RectifiedFlow
from speedit_plugins.trainer.diffusion.gaussian_process import GaussianProcess
from speedit_plugins.trainer.diffusion.sampling import sample

IMAGE, VIDEO = (2, 4, 4, 4), (2, 4, 3, 4, 4)
MEAN, STD = 0.3, 0.5
FLOW = RectifiedFlow()

Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def randn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def column(timestep: Tensor, x: Tensor) -> Tensor:
    return (timestep.double() / 1000).reshape(-1, *[1] * (x.ndim - 1))


def exact_velocity(x: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
    """E[eps - x_0 | x_t = x] for data N(MEAN, STD^2), as x_0, eps and x_t are jointly Gaussian."""
    t = column(timestep, x)
    gain = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
    return gain * (x - (1 - t) * MEAN) - MEAN


def curved(x: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
    phase = column(timestep, x)
    return torch.sin(2 * x + phase) + x - (0 if condition is None else column(1000 * condition, x))


def grid(num_steps: int, shift: float) -> list[float]:
    even = [1 - j / num_steps for j in range(num_steps + 1)]
    return [shift * u / (1 + (shift - 1) * u) for u in even]


def by_hand(
    model: Model, x: Tensor, nodes: list[float], *, clip: float = math.inf, heun: bool = False
) -> Tensor:
    """Euler's method, or Heun's with an Euler step at the end; x_0 is clamped to [-clip, clip]."""

    def velocity(x: Tensor, t: float) -> Tensor:
        v = model(x, torch.full(x.shape[:1], 1000 * t), None)
        return (x - (x - t * v).clamp(-clip, clip)) / t

    for t, s in zip(nodes, nodes[1:], strict=False):
        v = velocity(x, t)
        if heun and s > 0:
            v = (v + velocity(x + (s - t) * v, s)) / 2
        x = x + (s - t) * v
    return x


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_equals_the_solver_by_hand(sampler: str, shift: float, shape: tuple[int, ...], clip: bool) -> None:
    noise = randn(shape, 0)
    flow = RectifiedFlow(shift=shift)
    got = sample(curved, flow, noise, sampler=sampler, num_steps=7, clip_sample=clip)
    nodes = grid(7, shift)
    bound = 1.0 if clip else math.inf
    expected = by_hand(curved, noise, nodes, clip=bound, heun=sampler == "heun")
    # The schedulers store x and t in float32: 6e-8 per call, amplified by the model's slope of 3.
    assert_close(got, expected, rtol=0, atol=1e-5)
    if clip:
        assert (by_hand(curved, noise, nodes, heun=sampler == "heun") - expected).abs().max() > 0.1


def error(sampler: str, num_steps: int, shift: float) -> float:
    """Largest error of a sample for Gaussian data.

    Along the exact flow (x - (1 - t) MEAN) / sqrt((1 - t)^2 STD^2 + t^2) is constant.
    """
    noise = randn(IMAGE, 0)
    got = sample(exact_velocity, RectifiedFlow(shift=shift), noise, sampler=sampler, num_steps=num_steps)
    return float((got - (MEAN + STD * noise)).abs().max())


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_converges_to_the_gaussian_flow_at_its_order(sampler: str, order: int, shift: float) -> None:
    # With 16 and 64 steps Heun's error is 1e-2 to 1e-4, far above float32. A quarter of the step size leaves
    # 4^-order of the error, up to higher-order terms.
    assert math.log(error(sampler, 16, shift) / error(sampler, 64, shift), 4) == pytest.approx(
        order, abs=0.25
    )


@pytest.mark.parametrize(("sampler", "num_steps"), [("euler", 400), ("heun", 40)])
def test_samples_have_the_mean_and_deviation_of_the_data(sampler: str, num_steps: int) -> None:
    noise = randn((4, 5000), 0)
    got = sample(exact_velocity, FLOW, noise, sampler=sampler, num_steps=num_steps)
    # The exact map is affine, so the moments are those of the noise, scaled. The solver adds 1 % of STD.
    assert float(got.mean()) == pytest.approx(MEAN + STD * float(noise.mean()), abs=0.005)
    assert float(got.std()) == pytest.approx(STD * float(noise.std()), abs=0.005)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_calls_the_model_once_per_step_and_heun_twice_except_at_the_end(shift: float) -> None:
    nodes = grid(5, shift)
    calls = {
        "euler": nodes[:-1],
        "heun": [nodes[0], *(t for t in nodes[1:-1] for _ in range(2))],
    }
    for sampler, expected in calls.items():
        seen: list[float] = []

        def model(x: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
            assert (timestep.shape, timestep.dtype) == ((2,), torch.float32)
            assert (timestep == timestep[0]).all()
            seen.append(float(timestep[0]))  # noqa: B023 - called only within this iteration
            return x

        sample(model, RectifiedFlow(shift=shift), randn(IMAGE, 0), sampler=sampler, num_steps=5)
        assert seen == pytest.approx([1000 * t for t in expected], rel=1e-6)
        assert seen[0] == 1000.0


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("num_steps", [2, 9])
def test_a_constant_velocity_is_followed_from_noise_to_data(sampler: str, num_steps: int) -> None:
    """Every solver is exact on a straight line: the sample is x_0 only if the grid goes from 1 to 0."""
    noise, x_0 = randn(IMAGE, 0), randn(IMAGE, 1)
    got = sample(lambda x, t, c: noise - x_0, FLOW, noise, sampler=sampler, num_steps=num_steps)
    # The schedulers work in float32: 6e-8 per call.
    assert_close(got, x_0, rtol=0, atol=3e-6)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_only_clip_sample_clamps(sampler: str) -> None:
    def to_five(x: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
        return (x - 5.0) / column(timestep, x).to(x.dtype)

    for clip, value in ((False, 5.0), (True, 1.0)):
        noise = randn(IMAGE, 0).float()
        got = sample(to_five, FLOW, noise, sampler=sampler, num_steps=5, clip_sample=clip)
        # The last step ends at the predicted x_0, up to float32.
        assert_close(got, torch.full(IMAGE, value), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_guidance_mixes_the_velocities(sampler: str) -> None:
    noise, condition, null = randn(IMAGE, 0), torch.tensor([0.3, 0.9]), torch.tensor([2.0, 2.0])

    def mixed(x: Tensor, timestep: Tensor, given: Tensor | None) -> Tensor:
        wanted, unwanted = (curved(x, timestep, y) for y in (condition, null))
        return unwanted + 1.5 * (wanted - unwanted)

    guidance = {"condition": condition, "null_condition": null, "guidance_scale": 1.5}
    got = sample(curved, FLOW, noise, sampler=sampler, num_steps=5, **guidance)
    assert_close(got, sample(mixed, FLOW, noise, sampler=sampler, num_steps=5), rtol=0, atol=1e-6)


class TestNamedConditions:
    """Conditions that are named tensors, for both kinds of process."""

    PROCESSES = (("euler", FLOW), ("ddim", GaussianProcess(NoiseSchedule.linear(), learn_sigma=False)))

    @pytest.mark.parametrize(("sampler", "process"), PROCESSES)
    def test_guidance_equals_guidance_with_a_tensor(
        self, sampler: str, process: RectifiedFlow | GaussianProcess
    ) -> None:
        phase, null = torch.tensor([0.3, 0.9]), torch.tensor([2.0, 2.0])
        mask = torch.ones(2, 3, dtype=torch.bool)
        first = mask & torch.tensor([True, False, False])

        def named(x: Tensor, timestep: Tensor, given: Mapping[str, Tensor]) -> Tensor:
            assert given["mask"].tolist() == [*mask.tolist(), *first.tolist()]
            return curved(x, timestep, given["phase"])

        options = {"sampler": sampler, "num_steps": 4, "guidance_scale": 1.5}
        conditions = {
            "condition": {"phase": phase, "mask": mask},
            "null_condition": {"mask": first, "phase": null},
        }
        got = sample(named, process, randn(IMAGE, 0), **conditions, **options)
        plain = {"condition": phase, "null_condition": null}
        expected = sample(curved, process, randn(IMAGE, 0), **plain, **options)
        assert_close(got, expected, rtol=0, atol=0)

    @pytest.mark.parametrize(("sampler", "process"), PROCESSES)
    def test_without_guidance_the_model_gets_the_condition_unchanged(
        self, sampler: str, process: RectifiedFlow | GaussianProcess
    ) -> None:
        given = {"phase": torch.tensor([0.3, 0.9])}
        seen: list[object] = []

        def model(x: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
            seen.append(condition)
            return x

        sample(model, process, randn(IMAGE, 0), condition=given, sampler=sampler, num_steps=2)
        assert [condition is given for condition in seen] == [True, True]

    @pytest.mark.parametrize(
        ("condition", "null", "message"),
        [
            ({"a": torch.zeros(2)}, None, r"got {'a': \(2,\)} and None"),
            ({"a": torch.zeros(2)}, torch.zeros(2), r"got {'a': \(2,\)} and \(2,\)"),
            ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}, r"got {'a': \(2,\)} and {'b': \(2,\)}"),
            ({"a": torch.zeros(2, 3)}, {"a": torch.zeros(2, 1)}, r"got {'a': \(2, 3\)} and {'a': \(2, 1\)}"),
        ],
    )
    def test_a_null_condition_with_other_names_or_shapes_raises(
        self, condition: object, null: object, message: str
    ) -> None:
        options = {"condition": condition, "null_condition": null, "guidance_scale": 2.0}
        with pytest.raises(ValueError, match=f"of the same names and shapes, {message}"):
            sample(curved, FLOW, randn(IMAGE, 0), sampler="euler", num_steps=2, **options)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_the_callback_gets_every_step_and_the_result(sampler: str) -> None:
    steps: list[tuple[int, Tensor]] = []
    options = {"sampler": sampler, "num_steps": 4, "callback": lambda n, x: steps.append((n, x))}
    got = sample(exact_velocity, FLOW, randn(IMAGE, 0), **options)
    assert [number for number, _ in steps] == [1, 2, 3, 4]
    assert steps[-1][1] is got


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_half_precision_is_sampled_in_float32_without_gradients(sampler: str) -> None:
    weight = torch.ones(1, requires_grad=True)

    def half(x: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
        assert x.dtype == torch.float32
        return (weight * x).bfloat16()

    got = sample(half, FLOW, randn(IMAGE, 0).bfloat16(), sampler=sampler, num_steps=3)
    assert (got.dtype, got.requires_grad) == (torch.float32, False)


def test_sampling_twice_gives_the_same_result() -> None:
    first, again = (sample(curved, FLOW, randn(IMAGE, 0), sampler="heun", num_steps=3) for _ in range(2))
    assert_close(first, again, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a RectifiedFlow needs sampler euler or heun, got ddpm"),
        ({"sampler": "eular"}, "unknown sampler 'eular'; did you mean 'euler'"),
        ({"sampler": "euler", "eta": 0.5}, "eta has no effect on euler, only on ddim: needs 0, got 0.5"),
        ({"sampler": "euler", "num_steps": 0}, "num_steps needs to be >= 1, got 0"),
        ({"sampler": "heun", "num_steps": 1}, "num_steps needs to be >= 2, got 1"),
    ],
)
def test_options_that_do_not_fit_raise(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(curved, FLOW, randn(IMAGE, 0), **options)


def test_samplers_and_predictions_for_the_other_kind_of_process_raise() -> None:
    gaussian = GaussianProcess(NoiseSchedule.linear(), learn_sigma=False)
    with pytest.raises(
        ValueError,
        match="a GaussianProcess needs sampler ddpm or ddim or ddim_leading or ddim_leading_1 or dpm_solver",
    ):
        sample(curved, gaussian, randn(IMAGE, 0), sampler="heun")

    def with_variance(x: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
        return torch.cat([x, x], dim=1)

    with pytest.raises(ValueError, match=r"prediction needs shape \(2, 4, 4, 4\)"):
        sample(with_variance, FLOW, randn(IMAGE, 0), sampler="euler", num_steps=2)
