import json
import math
import mmap
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy
from speedit_plugins.trainer.diffusion.gaussian_process import LossTerms
from speedit_plugins.trainer.logging.images import save_loss_curve
from speedit_plugins.trainer.logging.timestep_profile import NUM_RANGES
from speedit_plugins.trainer.logging.tracking import (
    NUM_BINS,
    LossWindow,
    SilentTracker,
    Tracker,
    peak_memory_bytes,
    read_metrics,
)


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
    # Five standard errors of the mean of 500 batches, estimated from their spread.
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
    nothing = seen.summary()
    assert nothing["mse_per_bin"] == [None] * NUM_BINS
    assert all(math.isnan(nothing[key]) for key in ("loss", "mse", "vb", "uniform_mse"))


def test_the_alignment_is_the_mean_of_the_samples_that_have_one() -> None:
    # An alignment that ends between two summaries: the second batch has none.
    policy = build_policy("uniform", NoiseSchedule.linear(100))
    seen = window(policy, 2)
    draw = TimestepDraw(torch.tensor([0, 9]), torch.tensor([0.0, 0.09]), torch.ones(2))
    for alignment in (torch.tensor([0.25, 0.75]), None):
        seen.add(draw, LossTerms(torch.ones(2), torch.ones(2), torch.zeros(2), alignment))
    assert seen.summary()["alignment"] == 0.5
    seen.add(draw, terms_of(draw, torch.ones(2)))
    assert "alignment" not in seen.summary()


def test_the_loss_of_a_range_of_timesteps_has_its_mean_and_standard_deviation() -> None:
    policy = build_policy("uniform", NoiseSchedule.linear(100))
    seen = window(policy, 4)
    # A range has five timesteps. Three samples in two batches are in the first range, one in the last.
    for index, loss in (([0, 4], [1.0, 2.0]), ([2, 99], [6.0, 7.0])):
        place, terms = torch.tensor(index), torch.tensor(loss)
        draw = TimestepDraw(place, place / 100, torch.ones(2))
        seen.add(draw, LossTerms(loss=terms, mse=0 * terms, vb=0 * terms))
    row = seen.summary()
    assert row["loss_per_timestep"] == [3.0, *[None] * (NUM_RANGES - 2), 7.0]
    # 1, 2 and 6 have the mean 3 and the squared deviations 4, 1 and 9.
    spread = row["loss_std_per_timestep"]
    assert spread[0] == pytest.approx(math.sqrt(14 / 3))
    assert spread[1:] == [*[None] * (NUM_RANGES - 2), 0.0]
    assert seen.summary()["loss_per_timestep"] == [None] * NUM_RANGES


def test_ranks_that_add_up_their_sums_once_see_the_means_of_all_samples() -> None:
    policy = build_policy("speedit", NoiseSchedule.linear(100))
    draw = policy.draw(8, generator=torch.Generator().manual_seed(0))
    # Sums of small whole numbers are exact in any order.
    mse = torch.arange(1.0, 9.0)
    lone, first, second = (window(policy, 8) for _ in range(3))
    lone.add(draw, LossTerms(2 * mse, mse, mse - 1))
    for seen, rows in ((first, slice(0, 3)), (second, slice(3, 8))):
        part = TimestepDraw(draw.index[rows], draw.time[rows], draw.weight[rows])
        seen.add(part, LossTerms(2 * mse[rows], mse[rows], mse[rows] - 1))
    sent: list[torch.Tensor] = []
    second.summary(lambda sums: sent.append(sums.clone()))
    found, wanted = first.summary(lambda sums: sums.add_(sent[0])), lone.summary()
    assert len(sent) == 1
    # The correction's quotients are rounded, so their sum depends on the order, by float64's 2e-16.
    assert_close(found.pop("uniform_mse"), wanted.pop("uniform_mse"), rtol=1e-14, atol=0)
    assert found == wanted
    assert math.isnan(first.summary()["loss"])


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
        with Tracker(tmp_path, total_steps=20, start_step=start) as tracker:
            for step in steps:
                tracker.log(step, ROW)
    assert [row["step"] for row in read_metrics(tmp_path)] == [5, 10, 12, 15]


def test_a_last_line_cut_by_a_crash_is_left_out_and_broken_lines_before_it_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]
    assert capsys.readouterr().out == ""
    broken = [b'{"step": ', b"\xff\xfe\x00garbage", b"[1, 2]", b'{"loss": 1}', b'{"step": "4"}', b"[" * 10**5]
    broken += [b'{"step": 6, "loss": "high"}', b"null", b'{"step": true}']
    path.write_bytes(b"\n".join([b'{"step": 1}', *broken, b"\0" * 5000 + b'{"step": 3}', b""]))
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 3}]
    said = f"{path}: 9 of 11 lines cannot be read and are left out, the first is line 2\n"
    assert capsys.readouterr().out == said
    # The run that goes on writes whole lines alone.
    with Tracker(tmp_path, total_steps=4, start_step=3) as tracker:
        tracker.log(4, ROW)
    capsys.readouterr()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3, 4]
    assert capsys.readouterr().out == ""


class Recorder:
    """A logger that keeps everything it gets."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.ends: list[bool] = []

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        self.rows.append((step, dict(scalars)))

    def close(self, *, is_failed: bool) -> None:
        self.ends.append(is_failed)


def test_every_board_gets_the_numbers_of_a_row_by_their_path(tmp_path: Path) -> None:
    loggers = [Recorder(), Recorder()]
    row = {
        "loss": 1.5,
        "skipped_steps": 2,
        "grad_norm": math.inf,
        "time_split": {"data": 0.25, "other": math.nan},
        "mse_per_bin": [3.0, None],
        "note": "no number",
    }
    with Tracker(tmp_path, total_steps=2, start_step=0, loggers=loggers) as tracker:
        tracker.step_done()
        tracker.log(1, row)
    wanted = {
        "train/loss": 1.5,
        "train/skipped_steps": 2,
        "train/time_split/data": 0.25,
        "mse_per_bin/0": 3.0,
    }
    for logger in loggers:
        assert logger.rows == [(1, wanted)]
        assert logger.ends == [False]


def test_a_board_hears_that_a_run_failed(tmp_path: Path) -> None:
    logger = Recorder()
    with (
        pytest.raises(RuntimeError, match="diverged"),
        Tracker(tmp_path, total_steps=2, start_step=0, loggers=[logger]),
    ):
        raise RuntimeError("diverged")
    assert logger.ends == [True]


def test_every_line_is_json_also_where_a_number_is_none(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    row = {**ROW, "loss": math.nan, "grad_norm": -math.inf, "time_split": {"data": math.nan}}
    # Older versions wrote this.
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "grad_norm": Infinity}\n')
    with Tracker(tmp_path, total_steps=2, start_step=1) as tracker:
        tracker.log(2, row)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert first == {"step": 1, "grad_norm": None}
    assert second == {"step": 2, **ROW, "loss": None, "grad_norm": None, "time_split": {"data": None}}


def test_a_loss_curve_has_a_gap_where_every_step_was_skipped(tmp_path: Path) -> None:
    rows = [{**ROW, "step": step, "loss": None if step == 2 else 1.0} for step in range(1, 4)]
    save_loss_curve(rows, tmp_path / "loss.png", title="a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_silent_tracker_takes_the_same_calls_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with SilentTracker() as tracker:
        tracker.step_done()
        tracker.log(1, ROW)
    assert isinstance(tracker, Tracker)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_peak_memory_on_the_cpu_is_the_most_that_was_ever_resident() -> None:
    device, size = torch.device("cpu"), 64 * 2**20
    # The kernel counts in batches per thread, and may drop pages of mapped files in between.
    slack = size // 8
    before = peak_memory_bytes(device)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    assert before >= resident - slack
    # A new mapping, because the allocator may reuse pages that are already resident.
    held = mmap.mmap(-1, before - resident + size)
    torch.frombuffer(held, dtype=torch.uint8).fill_(1)
    assert abs(peak_memory_bytes(device) - (before + size)) <= slack
    held.close()
    assert peak_memory_bytes(device) >= before + size - slack
