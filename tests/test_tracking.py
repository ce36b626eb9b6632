import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.core.policy import TimestepDraw, TimestepPolicy
from speedit_plugins.diffusion.process import LossTerms
from speedit_plugins.engine.tracking import NUM_BINS, LossWindow, Tracker, is_finite, read_metrics


def terms_of(draw: TimestepDraw, mse: torch.Tensor) -> LossTerms:
    return LossTerms(loss=draw.weight * mse, mse=mse, vb=torch.zeros_like(mse))


def window(policy: TimestepPolicy, batch_size: int) -> LossWindow:
    return LossWindow(policy, batch_size=batch_size, device=torch.device("cpu"))


@pytest.mark.parametrize("name", ["uniform", "speedit", "speed", "speed_reference", "logit_normal"])
def test_the_corrected_mse_estimates_the_uniform_mean_for_every_policy(name: str) -> None:
    policy = build_policy(name, NoiseSchedule.linear(100))
    generator = torch.Generator().manual_seed(0)
    mse_of = 1 + torch.arange(100.0) / 100
    seen = window(policy, 64)
    corrected = []
    for _ in range(500):
        draw = policy.draw(64, generator=generator)
        seen.add(draw, terms_of(draw, mse_of[draw.index]))
        law = policy.density_for(64)
        corrected.append((mse_of[draw.index] / (100 * law[draw.index])).mean())
    batches = torch.stack(corrected)
    # Five standard errors of the mean of 500 batches, from their own spread.
    tolerance = float(5 * batches.std() / math.sqrt(len(batches)))
    assert_close(seen.summary()["uniform_mse"], float(mse_of.mean()), atol=tolerance, rtol=0)


def test_means_and_bins_are_those_of_the_samples_and_a_summary_starts_anew() -> None:
    policy = build_policy("uniform", NoiseSchedule.linear(100))
    seen = window(policy, 3)
    index = torch.tensor([0, 9, 95])
    draw = TimestepDraw(index, index / 100, torch.tensor([1.0, 2.0, 3.0]))
    seen.add(draw, LossTerms(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([2.0, 4.0, 9.0]), torch.ones(3)))
    row = seen.summary()
    assert (row["loss"], row["mse"], row["vb"], row["uniform_mse"]) == (3.0, 5.0, 1.0, 5.0)
    assert row["mse_per_bin"] == [3.0, *[None] * (NUM_BINS - 2), 9.0]
    assert seen.summary()["mse_per_bin"] == [None] * NUM_BINS


def test_the_correction_follows_a_policy_that_changes() -> None:
    policy = build_policy(dict(type="clts", curriculum_steps=10), NoiseSchedule.linear(100))
    seen, index = window(policy, 1), torch.tensor([99])
    draw = TimestepDraw(index, index / 100, torch.ones(1))
    for step in (0, 10):
        policy.advance(step)
        seen.add(draw, terms_of(draw, torch.ones(1)))
        assert_close(seen.summary()["uniform_mse"], float(1 / (100 * policy.density[99])))


ROW: dict[str, Any] = {"loss": 1.0, "mse": 2.0, "vb": 0.0, "uniform_mse": 2.0, "mse_per_bin": [None] * 10}


def test_resuming_drops_the_lines_after_the_checkpoint_and_goes_on(tmp_path: Path) -> None:
    for start, steps in ((0, (5, 10, 15)), (10, (12, 15))):
        with Tracker(tmp_path, total_steps=20, start_step=start, tensorboard=False) as tracker:
            for step in steps:
                tracker.log(step, ROW)
    assert [row["step"] for row in read_metrics(tmp_path)] == [5, 10, 12, 15]


def test_a_last_line_cut_by_a_crash_is_left_out_and_damage_before_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]
    path.write_text('{"step": \n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_metrics(tmp_path)


def test_tensorboard_holds_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(tmp_path, total_steps=2, start_step=0, tensorboard=True) as tracker:
        tracker.step_done()
        tracker.log(1, ROW)
        tracker.log(2, {**ROW, "loss": 0.5, "mse_per_bin": [0.25] * 10})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("mse_per_bin/9")] == [(2, 0.25)]


def test_a_row_is_finite_only_if_losses_and_gradient_are() -> None:
    assert is_finite({**ROW, "grad_norm": 1.0})
    assert not is_finite({**ROW, "grad_norm": math.inf})
    assert not is_finite({**ROW, "mse": math.nan, "grad_norm": 1.0})
