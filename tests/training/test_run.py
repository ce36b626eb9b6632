"""The phases through the installed command line. Tests with signals start processes of their own."""

import json
import random
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Job
from runs import arguments, last_step, small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close

from speedit_plugins.cli import main
from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.evaluation.npz import read_npz, write_npz
from speedit_plugins.trainer.results import numbered
from speedit_plugins.trainer.training import train

CONFIG = ["-c", "configs/image/digits/speedit.yaml"]


def speedit(phase: str, folder: Path, **changes: object) -> int:
    return main([*CONFIG, "-p", phase, *arguments(folder, **changes)])


def start(folder: Path, **changes: object) -> Job:
    return Job([sys.executable, "tools/main.py", *CONFIG, "-p", "train", *arguments(folder, **changes)])


def kill_after(seconds: float, folder: Path, **changes: object) -> None:
    """Kills a run this long after its first save, in a step or in a later save, unless it has ended."""
    before = checkpoints.newest(folder / "checkpoints")
    with start(folder, **changes) as job:
        job.until(lambda: checkpoints.newest(folder / "checkpoints") != before or job.has_ended)
        time.sleep(seconds)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert speedit("train", folder, enable_tensorboard_log=True) == 0
    return folder


def test_train_says_where_its_results_lie(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert speedit("train", tmp_path) == 0
    out, err = capfd.readouterr()
    assert "policy speedit: boundary 642 of 1000 timesteps, mean weight 0.5815" in out
    assert "accelerations" not in out
    for name in ("loss.png", "metrics.jsonl", "checkpoints/step_0000020"):
        assert (tmp_path / name).exists()
        assert str(tmp_path / name) in out
    # The last line of the progress bar has steps, loss, rate and the time left.
    assert "20/20" in err
    assert "loss=" in err
    assert "step/s" in err or "s/step" in err
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert {"loss", "mse", "vb", "uniform_mse", "mse_per_bin", "grad_norm", "lr", "steps_per_second"} <= set(
        rows[0]
    )


def test_sample_draws_a_column_per_class(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert speedit("sample", trained, samples_per_class=2) == 0
    grid = np.asarray(Image.open(trained / "samples.png"))
    assert grid.shape == (2 * 66 + 2, 10 * 66 + 2)
    assert f"sample grid  {trained}/samples.png" in capfd.readouterr().out


def test_samples_are_a_function_of_the_seed_and_earlier_ones_are_kept(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    grids, weights = [], trained / "checkpoints" / "step_0000020"
    for seed, name in ((1, "samples.png"), (1, "samples_0001.png"), (2, "samples_0002.png")):
        assert speedit("sample", tmp_path, seed=seed, ckpt_path=weights) == 0
        grids.append(np.asarray(Image.open(tmp_path / name)))
        assert f"sample grid  {tmp_path}/{name}" in capfd.readouterr().out
    assert np.array_equal(grids[0], grids[1])
    assert not np.array_equal(grids[0], grids[2])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "samples.png")), grids[0])


def test_inference_and_test_go_from_images_to_a_named_distance(
    trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert speedit("inference", trained, num_samples=30, per_proc_batch_size=20) == 0
    folder = trained / "inference" / "step_0000020_ddpm4_n30_cfg1_seed0"
    images = read_npz(folder.with_suffix(".npz"))
    assert images.shape == (30, 8, 8, 1)
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [*(f"{i:06d}.png" for i in range(30)), "labels.jsonl"]
    assert np.array_equal(np.asarray(Image.open(files[25])), images[25, ..., 0])
    assert speedit("test", trained, enable_tensorboard_log=True) == 0
    metrics = json.loads((trained / "test.json").read_text())["figures"]
    names = ("fid", "kid", "precision", "recall", "density", "coverage")
    assert list(metrics) == [f"{name}[digit_classifier]" for name in names]
    for metric in metrics.values():
        assert (metric["features"], metric["num_samples"], metric["num_reference"]) == (
            "digit_classifier",
            30,
            1797,
        )
    assert metrics["fid[digit_classifier]"]["value"] > 0
    # The boards of the training show them at the step of the samples, and keep what they had.
    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    for name in names:
        (event,) = events.Scalars(f"test/{name}[digit_classifier]")
        assert event.step == 20
        assert event.value == pytest.approx(metrics[f"{name}[digit_classifier]"]["value"], rel=1e-6)
    assert [event.step for event in events.Scalars("train/loss")] == [5, 10, 15, 20]
    out = capfd.readouterr().out
    assert "(features digit_classifier; 30 samples, 1797 reference; few for 32 dimensions" in out


def test_the_distance_of_a_set_to_itself_is_zero(trained: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), dtype=np.uint8)
    write_npz(tmp_path / "same.npz", images)
    same = str(tmp_path / "same.npz")
    (tmp_path / "test.json").write_text("earlier")
    assert speedit("test", tmp_path, reference=same, samples=same, features="{type: pixels@8}") == 0
    assert (tmp_path / "test_0001.json").read_text() == "earlier"
    metrics = json.loads((tmp_path / "test.json").read_text())["figures"]
    # Rounding of an eigendecomposition in float64 with 64 dimensions.
    assert abs(metrics["fid[pixels@8]"]["value"]) < 1e-6
    for name in ("precision", "recall", "coverage"):
        assert metrics[f"{name}[pixels@8]"]["value"] == 1.0


def test_an_official_checkpoint_and_a_safetensors_file_can_be_sampled(trained: Path, tmp_path: Path) -> None:
    file = trained / "checkpoints" / "step_0000020" / "ema.safetensors"
    assert speedit("sample", tmp_path, ckpt_path=file) == 0
    assert speedit("sample", trained) == 0
    newest = numbered(trained / "samples.png")[-1]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "samples.png")), np.asarray(Image.open(newest)))


def test_fine_tuning_starts_from_the_given_weights(trained: Path, tmp_path: Path) -> None:
    file = trained / "checkpoints" / "step_0000020" / "ema.safetensors"
    assert speedit("train", tmp_path, pretrained=file, max_training_steps=1, optimizer__lr=1e-30) == 0
    tuned = checkpoints.load(tmp_path / "checkpoints" / "step_0000001")
    assert_close(dict(tuned.model), dict(checkpoints.load(file.parent).ema), rtol=0, atol=1e-12)


def test_training_goes_on_by_itself_and_stops_where_it_is_done(trained: Path, tmp_path: Path) -> None:
    assert speedit("train", tmp_path, max_training_steps=5) == 0
    assert speedit("train", tmp_path, max_training_steps=10) == 0
    assert train.train(small_config(tmp_path, max_training_steps=10)) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [5, 10]


@pytest.mark.parametrize(
    ("phase", "changes", "message"),
    [
        ("sample", {}, "no checkpoint in .*checkpoints: train first, or give ckpt_path"),
        ("test", {}, "no npz in .*inference: run the phase inference first"),
        ("train", {"pretrained": "absent.pt"}, "no checkpoint at 'absent.pt'"),
        ("train", {"resume": "absent"}, "resume needs auto, never or a checkpoint's folder, got 'absent'"),
        ("train", {"diffusion__policy": "{type: sped}"}, "unknown policy 'sped'; did you mean 'speed'"),
        (
            "train",
            {"diffusion__policy": "{type: speed, lam: 5}"},
            r"change_aware needs lam in \[0.5, 1\], got 5",
        ),
        ("train", {"model__num_heads": 5}, "num_heads"),
        (
            "train",
            {"diffusion__policy": "{type: speed, k: abc}"},
            "'speed' k needs float, got 'abc'",
        ),
        ("test", {"ckpt_path": "x"}, "ckpt_path: has no effect in test"),
        ("train", {"device": "cuda"}, "needs a CUDA device, got none"),
        ("train", {"experiment_dir": "/proc/nowhere"}, "/proc/nowhere"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], phase: str, changes: dict[str, object], message: str
) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert speedit(phase, tmp_path, **changes) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("speedit: error:")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]


def test_resume_never_and_going_back_are_refused_where_they_would_lose_steps(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "checkpoints").touch()
    assert speedit("train", tmp_path / "taken") == 2
    assert "checkpoints is a file; wanted a folder" in capfd.readouterr().err
    assert speedit("train", tmp_path, max_training_steps=10, ckpt_every=5) == 0
    assert speedit("train", tmp_path, resume="never") == 2
    assert "resume: never would write over the run that holds" in capfd.readouterr().err
    assert speedit("train", tmp_path, resume=tmp_path / "checkpoints" / "step_0000005") == 2
    assert "goes back behind" in capfd.readouterr().err
    assert speedit("train", tmp_path / "branch", resume=tmp_path / "checkpoints" / "step_0000005") == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_finishes_the_step_saves_and_says_how_to_resume(
    tmp_path: Path, number: signal.Signals
) -> None:
    with start(tmp_path, max_training_steps=100_000, log_every=1) as job:
        job.until(lambda: last_step(tmp_path) >= 3)
        job.process.send_signal(number)
        output = job.end()
    assert job.process.returncode == 0, output
    saved = checkpoints.newest(tmp_path / "checkpoints")
    assert saved is not None
    step = checkpoints.step_of(saved)
    assert f"{number.name}: ending after step {step}, which is saved first\n" in output
    assert f"stopped by {number.name} after step {step}\n" in output
    assert str(saved) in output
    assert "run the same command again to go on" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_run_killed_at_random_moments_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    changes: dict[str, object] = {"max_training_steps": 60, "ckpt_every": 3, "optimizer__max_grad_norm": 1.0}
    assert speedit("train", tmp_path / "whole", **changes) == 0
    chance = random.Random(0)
    for _ in range(4):
        kill_after(chance.uniform(0, 0.15), tmp_path / "killed", **changes)
    assert speedit("train", tmp_path / "killed", **changes) == 0
    expected = checkpoints.load(tmp_path / "whole" / "checkpoints" / "step_0000060")
    found = checkpoints.load(tmp_path / "killed" / "checkpoints" / "step_0000060")
    for part in ("model", "ema", "moments"):
        assert_close(dict(getattr(found, part)), dict(getattr(expected, part)), rtol=0, atol=0)
    assert found.state == expected.state


@pytest.mark.parametrize(
    ("phase", "changes", "message"),
    [
        ("sample", {}, "rank 0: error: sample runs in one process, got WORLD_SIZE=8"),
        ("train", {"data__batch_size": 12}, "wanted a multiple of 8 processes, got 12"),
        ("train", {}, "WORLD_SIZE=8 needs MASTER_ADDR, MASTER_PORT too"),
    ],
)
def test_several_processes_need_a_launcher_and_a_batch_to_share(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    phase: str,
    changes: dict[str, object],
    message: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    assert speedit(phase, tmp_path, **changes) == 2
    assert message in capfd.readouterr().err


def test_a_finished_run_says_so_and_keeps_its_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert speedit("train", tmp_path, max_training_steps=3) == 0
    state = tmp_path / "checkpoints" / "step_0000003" / "state.pt"
    written = state.stat().st_mtime_ns
    assert speedit("train", tmp_path, max_training_steps=3) == 0
    assert "nothing to train: the run is at step 3, max_training_steps 3" in capfd.readouterr().out
    assert state.stat().st_mtime_ns == written
