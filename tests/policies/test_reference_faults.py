"""The faults of the SpeeD reference code, numbered as in docs/method.md, are absent here."""

import inspect
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from policy_cases import POLICY_NAMES, build, generator
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from speedit_plugins import NoiseSchedule, TimestepPolicy, build_policy, policies
from speedit_plugins.policies.densities.areas import reflect, reflection_pivot
from speedit_plugins.policies.recipes import speed as recipes

LINEAR = NoiseSchedule.linear()


def reference_change_weights(lam: float) -> np.ndarray:
    """(1 - lam) + (2 lam - 1) minmax(...) for t < 700, without a check of lam."""
    change = np.gradient(1 - np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    scaled = (change - change.min()) / (change.max() - change.min())
    return ((1 - lam) + (2 * lam - 1) * scaled)[:700]


def test_1_the_default_lam_gives_no_negative_weight() -> None:
    # The fault is real: at lam = 5 the weights range from -3.68 to 5, and 315 are negative.
    broken = reference_change_weights(5.0)
    assert (broken.min(), broken.max()) == (pytest.approx(-3.68, abs=5e-3), pytest.approx(5.0))
    assert (broken < 0).sum() == 315
    assert 0.5 <= inspect.signature(recipes.speed).parameters["lam"].default <= 1
    assert (build_policy("speed", LINEAR).weight > 0).all()
    with pytest.raises(ValueError, match=r"lam in \[0.5, 1\], got 5"):
        build_policy({"type": "speed", "lam": 5}, LINEAR)


def test_2_the_default_k_accelerates() -> None:
    density = build_policy("speed", LINEAR).density
    assert float(density[0] / density[-1]) == pytest.approx(5.0)
    with pytest.warns(UserWarning, match="equally often: k = 1"):
        build_policy({"type": "speed", "k": 1.0}, LINEAR)


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.scaled_linear().respaced([round(i * 999 / 285) for i in range(286)]),
        NoiseSchedule.scaled_linear().respaced([round(i * 999 / 49) for i in range(50)]),
        NoiseSchedule.cosine(110),
        NoiseSchedule.cosine(20),
    ],
    ids=["scaled-linear to 286", "scaled-linear to 50", "cosine of 110", "cosine of 20"],
)
def test_3_a_threshold_that_nothing_falls_below_does_not_turn_the_method_off(schedule: NoiseSchedule) -> None:
    # Past the peak no slope per step is below 1e-4, and the argmax of an all-false mask is 0.
    slope = np.gradient(np.sqrt(1 - schedule.alphas_cumprod.numpy()))
    assert not (slope[slope.argmax() :] < 1e-4).any()
    pivot = reflection_pivot(schedule)
    assert pivot > 0.8 * schedule.num_timesteps
    policy = build_policy("speedit", schedule)
    assert float(policy.density.max() / policy.density.min()) > 2


@pytest.mark.parametrize("num_timesteps", [111, 130, 155])
def test_4_a_pivot_at_the_end_does_not_reflect_past_it(num_timesteps: int) -> None:
    schedule = NoiseSchedule.cosine(num_timesteps)
    # The per-step threshold 1e-4 as a slope per u. The first flat index is the last one, so m = T.
    threshold = 1e-4 * num_timesteps
    pivot = reflection_pivot(schedule, threshold=threshold)
    assert pivot == num_timesteps
    assert int(reflect(torch.tensor([0]), pivot, num_timesteps)) == num_timesteps - 1
    policy = build_policy({"type": "speedit_reference", "threshold": threshold}, schedule)
    index = policy.draw(20_000, generator=generator(0)).index
    assert int(index.max()) < num_timesteps


@pytest.mark.parametrize("num_timesteps", [20, 250, 699])
def test_5_short_schedules_get_their_own_boundary(num_timesteps: int) -> None:
    schedule = NoiseSchedule.linear(num_timesteps)
    boundary = build_policy("speed", schedule).boundary_index
    assert boundary is not None
    assert 0.5 * num_timesteps < boundary < num_timesteps
    assert build_policy("speed_reference", schedule).boundary_index == round(0.7 * num_timesteps)
    with pytest.raises(ValueError, match=rf"tau needs to be an index in \(0, {num_timesteps}\], got 700"):
        build_policy({"type": "speed", "tau": 700}, schedule)


def test_6_respacing_scales_every_threshold() -> None:
    for steps in (25, 100, 250, 500):
        respaced = LINEAR.respaced([round(i * 999 / (steps - 1)) for i in range(steps)])
        spacing = 1000 / steps
        for name in ("speed", "speedit", "open_sora_speed"):
            whole, boundary = build(name, LINEAR).boundary_index, build(name, respaced).boundary_index
            assert whole is not None
            assert boundary is not None
            # The boundary is at the same original timestep, within the spacing on either side.
            original = int(respaced.timesteps[min(boundary, steps - 1)])
            assert abs(original - whole) <= 2 * spacing + 1


def test_7_min_snr_is_not_a_multiple_of_p2() -> None:
    min_snr, p2 = build_policy("min_snr", LINEAR).weight, build_policy("p2", LINEAR).weight
    assert_close(min_snr, torch.minimum(LINEAR.snr, torch.tensor(5.0)) / LINEAR.snr)
    ratio = min_snr / p2
    # The ratio is 5 (SNR + 1) / SNR, near 5, at high SNR, and SNR + 1, near 1, at low SNR.
    assert float(ratio[0]) == pytest.approx(5.0, abs=1e-3)
    assert float(ratio[-1]) == pytest.approx(1.0, abs=1e-3)


def test_8_the_curriculum_ends_in_a_gaussian_not_a_point() -> None:
    policy = build_policy("clts", LINEAR)
    policy.advance(10**9)
    assert float(policy.density.max()) < 0.01
    drawn = policy.draw(2_000, generator=generator(0)).index
    assert len(drawn.unique()) > 500


def test_9_there_is_one_draw_and_every_policy_uses_it() -> None:
    # The reference's masked training step drew its timesteps without the sampler.
    for name in POLICY_NAMES:
        assert type(build(name, LINEAR)) is TimestepPolicy
    texts = {path.name: path.read_text() for path in Path(policies.__path__[0]).glob("*.py")}
    for pattern in (r"TimestepDraw\(", r"torch\.rand(int|perm)?\("):
        assert [name for name, text in texts.items() if re.search(pattern, text)] == ["policy.py"]


@pytest.mark.parametrize("weighting", ["min-snr", "nope", "", None])
def test_10_an_unknown_weighting_is_refused(weighting: str | None) -> None:
    with pytest.raises(ValueError, match=r"unknown weighting .*known: .*change_aware, "):
        build_policy({"density": "uniform", "weighting": {"type": weighting}}, LINEAR)


class OnlyOnMeta(TorchDispatchMode):
    """Fails on any operator whose result is on another device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        parts = result if isinstance(result, tuple | list) else [result]
        assert all(part.is_meta for part in parts if isinstance(part, torch.Tensor)), f"{func} ran elsewhere"
        return result


def test_11_draws_are_made_on_their_device() -> None:
    for name in POLICY_NAMES:
        policy = build(name, LINEAR)
        # The first draw on a device copies the tables to it.
        policy.draw(2, device="meta")
        with OnlyOnMeta():
            draw = policy.draw(16, device="meta")
        assert {part.device.type for part in (draw.index, draw.time, draw.weight)} == {"meta"}
    # A generator on the CPU is refused for a draw on another device.
    with pytest.raises(ValueError, match="needs a generator on meta"):
        build_policy("speedit", LINEAR).draw(2, device="meta", generator=generator(0))


def test_the_boundary_is_a_noise_level() -> None:
    # The faults have one cause: numbers of one schedule written as constants. ln(1/143) = -4.963.
    for schedule in (
        LINEAR,
        NoiseSchedule.scaled_linear(),
        NoiseSchedule.cosine(),
        NoiseSchedule.linear(4000),
    ):
        boundary = build_policy("speed", schedule).boundary_index
        assert boundary is not None
        assert (
            float(schedule.log_snr[boundary - 1]) >= -math.log(143) - 1e-9 > float(schedule.log_snr[boundary])
        )
