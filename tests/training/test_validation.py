"""The loss on samples that are not trained on, and the best checkpoint by it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments, small_config, small_trainer
from torch.testing import assert_close
from two_ranks import told as told_by_another

from speedit_plugins.cli import main
from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.checkpoints.best import Best, note_best, read_best
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.data.held_out import Part, hold_out
from speedit_plugins.trainer.data.identity import Identified
from speedit_plugins.trainer.data.images.digits import Digits
from speedit_plugins.trainer.data.images.emoji import Emoji
from speedit_plugins.trainer.data.loader import ResumableLoader
from speedit_plugins.trainer.data.order import ChunkedOrder
from speedit_plugins.trainer.data.summary import data_lines
from speedit_plugins.trainer.data.workers import DataError
from speedit_plugins.trainer.evaluation.pairs import PAIRED
from speedit_plugins.trainer.logging.tracking import Tracker, read_metrics
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.sampling.generator import find_weights
from speedit_plugins.trainer.training import assembly
from speedit_plugins.trainer.training.interrupt import StopRequest
from speedit_plugins.trainer.training.periodic import Measured, Periodic, Snapshot
from speedit_plugins.trainer.training.saving.ending import run_to_end
from speedit_plugins.trainer.training.trainer import Trainer
from speedit_plugins.trainer.training.validation import spread_quantiles

CONFIG = "configs/image/digits/speedit.yaml"
KID = {"evaluation": "{metrics: [kid]}", "evaluate_samples": 8}
OWN = {"data__validation": "Digits", "validate_samples": 24}


def fit(folder: Path, **changes: Any) -> Trainer:
    trainer = small_trainer(folder, **changes)
    with Tracker(folder, total_steps=trainer.config.max_training_steps, start_step=trainer.step) as tracker:
        trainer.fit(tracker, StopRequest())
    return trainer


def measured(trainer: Trainer) -> dict[str, Any]:
    """The row of the trainer's validation, of its averaged weights as they are."""
    validation = next(each for each in trainer.periodic if each.key == "validate_every")
    snapshot = Snapshot(0, trainer.averaged_weights, {}, trainer.engine.untrained(), Runtime())
    return dict(validation.measure(snapshot).row)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16", "optimizer__grad_accumulation": 2},
        {"diffusion__policy": "{type: loss_second_moment, history: 1}", "diffusion__diffusion_steps": 25},
        {"inpainting": "RandomMasks"},
    ],
    ids=["plain", "bf16-accumulation", "learning", "inpainting"],
)
def test_validation_leaves_the_training_as_it_is(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = fit(tmp_path / "plain", log_every=1, max_training_steps=6, **changes)
    validated = fit(tmp_path / "own", log_every=1, max_training_steps=6, validate_every=2, **OWN, **changes)
    assert_close(validated.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)
    rows = [row for row in read_metrics(validated.folder) if "val_loss" not in row]
    for row, wanted in zip(rows, read_metrics(plain.folder), strict=True):
        for key in ("loss", "mse", "uniform_mse", "grad_norm"):
            assert row[key] == wanted[key]
    found = [row for row in read_metrics(validated.folder) if "val_loss" in row]
    assert [row["step"] for row in found] == [2, 4, 6]
    assert all(len(row["val_loss_per_bin"]) == 10 for row in found)


def test_a_validation_is_the_same_each_time_and_for_every_policy_seed_and_batch(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, validate_every=5, **OWN)
    before = torch.get_rng_state()
    row = measured(trainer)
    assert measured(trainer) == row
    assert torch.equal(torch.get_rng_state(), before)
    # The model predicts zero noise at its start, whose mse is that of the noise: equal for all of them.
    for changes in ({"diffusion__policy": "uniform"}, {"seed": 5}, {"data__batch_size": 7}):
        other = small_trainer(tmp_path, validate_every=5, **OWN, **changes)
        # Sums of float32 batches round differently.
        assert_close(measured(other), row, rtol=1e-6, atol=0)
    assert_close(row["val_loss"], sum(row["val_loss_per_bin"]) / 10)
    # A normal's square has variance 2: 4 sigma of the mean over 10 times 24 samples of 64 pixels.
    assert_close(row["val_loss"], 1.0, rtol=0, atol=4 * (2 / (10 * 24 * 64)) ** 0.5)


def test_a_measurement_sees_the_averaged_weights(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, validate_every=5, **OWN)
    row = measured(trainer)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1.0)
    assert measured(trainer) == row
    for part in trainer.ema.slices.values():
        part.values.add_(0.1)
    assert measured(trainer) != row


@pytest.mark.parametrize("num_samples", [1, 7])
def test_timesteps_fill_each_range_evenly(num_samples: int) -> None:
    found = spread_quantiles(num_samples)
    assert found.shape == (10, num_samples)
    middles = (torch.arange(10 * num_samples, dtype=torch.float64) + 0.5) / (10 * num_samples)
    assert_close(found.flatten().sort().values, middles)


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_a_broken_sample_ends_the_run_after_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    class Broken(Digits):
        def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
            raise error("a.png is broken")

    monkeypatch.setattr(assembly, "validation_dataset", lambda *_: Broken())
    trainer = small_trainer(tmp_path, max_training_steps=3, validate_every=2, **OWN)
    with (
        Tracker(tmp_path, total_steps=3, start_step=0) as tracker,
        pytest.raises(DataError) as caught,
    ):
        run_to_end(trainer, lambda: trainer.fit(tracker, StopRequest()))
    saved = tmp_path / "checkpoints" / "step_0000002"
    assert str(caught.value) == f"validation: a.png is broken; step 2 is saved as {saved}"
    assert checkpoints.damage(saved, Runtime()) is None
    assert trainer.model.training


def test_a_broken_sample_of_another_rank_is_raised_on_this_one_too(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, validate_every=2, **OWN)
    validation: Any = trainer.periodic[0].measure
    validation._runtime = told_by_another("a.png is broken")
    with pytest.raises(DataError, match=r"^validation: a.png is broken \(on rank 1\)$"):
        measured(trainer)


def test_the_first_process_of_a_machine_lists_the_files_of_both_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Second(Runtime):
        def barrier(self) -> None:
            events.append("wait")

    build_dataset = assembly.build.build_dataset

    def built(*given: Any, **options: Any) -> Any:
        events.append("build")
        return build_dataset(*given, **options)

    monkeypatch.setattr(assembly.build, "build_dataset", built)
    config = small_config(tmp_path, validate_every=2, **OWN)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assembly.build_trainer(config, Second())
    assert events == ["wait", "build", "wait", "build"]
    events.clear()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assembly.build_trainer(config, Second())
    assert events == ["build", "wait", "build", "wait"]


def test_captions_are_counted_with_held_out_samples() -> None:
    class Captioned(Digits):
        max_captions = 5

    for whole, line in ((Emoji(), f"{len(Emoji()) - 9:,}"), (Captioned(), "1,788 samples with up to 5")):
        assert dict(data_lines(hold_out(whole, 9, seed=0)[0], batch_size=4))["captions"] == line
    assert "captions" not in dict(data_lines(hold_out(Digits(), 9, seed=0)[0], batch_size=4))


def test_held_out_samples_are_never_trained_on(tmp_path: Path) -> None:
    whole = Digits()
    trained, held = hold_out(whole, 200, seed=3)
    assert sorted([*trained.indices.tolist(), *held.indices.tolist()]) == list(range(len(whole)))
    assert len(held) == 200
    assert hold_out(whole, 200, seed=4)[1].indices.tolist() != held.indices.tolist()
    trainer = small_trainer(tmp_path, data__held_out_samples=200, seed=3)
    assert isinstance(trainer.loader.dataset, Part)
    assert trainer.loader.dataset.indices.tolist() == trained.indices.tolist()
    lines = dict(data_lines(trainer.loader.dataset, batch_size=16))
    assert (lines["samples"], lines["left out"]) == ("1,597", "held out for validation (200)")
    with pytest.raises(
        ValueError, match="held_out_samples needs to be less than the 1797 samples .* got 1797"
    ):
        small_trainer(tmp_path, data__held_out_samples=1797)


def test_buckets_stay_with_their_samples() -> None:
    class Bucketed(Digits):
        buckets = torch.arange(1797) % 3

    trained, held = hold_out(Bucketed(), 300, seed=0)
    for part in (trained, held):
        assert part.buckets is not None
        assert_close(part.buckets, part.indices % 3)
    assert next(ResumableLoader(trained, batch_size=8))["image"].shape == (8, 1, 8, 8)


def test_a_part_keeps_chunks_and_the_identity_of_its_dataset() -> None:
    class Chunked(Digits):
        chunked = ChunkedOrder(torch.arange(1797) // 100, window=2)
        num_corrupt = 3

    whole = Chunked()
    trained, held = hold_out(whole, 300, seed=0)
    for part in (trained, held):
        assert part.chunked is not None
        assert_close(part.chunked.chunks, part.indices // 100)
        assert part.num_corrupt == 3
        assert isinstance(part, Identified)
        assert part.identity() == Digits().identity()
    # Changed data are noticed as without samples held out.
    loader = ResumableLoader(trained, batch_size=8)
    state = {**loader.state_dict(), "identity": {"contents": "1:000000000000"}}
    with pytest.raises(ValueError, match="belongs to other data: the built-in data differ"):
        loader.load_state_dict(state)


def test_a_run_with_held_out_samples_goes_on(tmp_path: Path) -> None:
    options = {"data__held_out_samples": 40, "validate_every": 5}
    whole = fit(tmp_path / "whole", max_training_steps=10, **options)
    fit(tmp_path / "parts", max_training_steps=5, **options)
    resumed = small_trainer(tmp_path / "parts", max_training_steps=10, **options)
    resumed.restore(tmp_path / "parts" / "checkpoints" / "step_0000005")
    with Tracker(resumed.folder, total_steps=10, start_step=5) as tracker:
        resumed.fit(tracker, StopRequest())
    assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    found = [
        [row["val_loss"] for row in read_metrics(run.folder) if "val_loss" in row] for run in (resumed, whole)
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_the_best_checkpoint_is_kept_and_can_be_sampled(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = iter([3.0, 2.0, 5.0, float("nan"), 4.0, 6.0])
    trainer = small_trainer(
        tmp_path, max_training_steps=6, validate_every=1, keep_best="val_loss", keep_last=1, **OWN
    )
    scripted = Periodic("validate_every", 1, lambda snapshot: Measured(scores={"val_loss": next(values)}))
    trainer.periodic = (scripted,)
    with Tracker(tmp_path, total_steps=6, start_step=0) as tracker:
        trainer.fit(tracker, StopRequest())
    names = [path.name for path in checkpoints.newest_first(tmp_path / "checkpoints")]
    assert names == ["step_0000006", "step_0000002"]
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text()) == {
        "checkpoint": "step_0000002",
        "step": 2,
        "score": "val_loss",
        "value": 2.0,
    }
    assert find_weights(small_config(tmp_path, "sample", ckpt_path="best")).name == "step_0000002"
    assert "step 2 has the lowest val_loss so far, 2.0000" in capfd.readouterr().out

    # A run that goes on remembers it.
    again = small_trainer(
        tmp_path, max_training_steps=8, validate_every=1, keep_best="val_loss", keep_last=1, **OWN
    )
    again.restore(tmp_path / "checkpoints" / "step_0000006")
    values = iter([2.5, 1.5])
    again.periodic = (scripted,)
    with Tracker(tmp_path, total_steps=8, start_step=6) as tracker:
        again.fit(tracker, StopRequest())
    names = [path.name for path in checkpoints.newest_first(tmp_path / "checkpoints")]
    assert find_weights(small_config(tmp_path, "sample", ckpt_path="best")).name == "step_0000008"
    assert names[0] == "step_0000008"
    # By another score the noted one stays, until a new one is measured.
    other = small_trainer(
        tmp_path, max_training_steps=10, evaluate_every=10, keep_best="kid", keep_last=1, **KID
    )
    other.restore(tmp_path / "checkpoints" / "step_0000008")
    other.periodic, other.step = (), 10
    other.save()
    assert find_weights(small_config(tmp_path, "sample", ckpt_path="best")).name == "step_0000008"
    shutil.rmtree(tmp_path / "checkpoints" / "step_0000008")
    with pytest.raises(ValueError, match=r"ckpt_path: best .* the one that best.json names is not there"):
        find_weights(small_config(tmp_path, "sample", ckpt_path="best"))


def test_a_dry_run_checks_the_validation_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = arguments(tmp_path, validate_every=5, data__validation="{type: Digits, image_sise: 8}")
    assert main(["-c", CONFIG, "-p", "train", "--dry-run", *options]) == 2
    assert "image_sise" in capfd.readouterr().err


def test_a_run_without_a_best_checkpoint_says_how_to_get_one(tmp_path: Path) -> None:
    fit(tmp_path, max_training_steps=1)
    with pytest.raises(ValueError, match=r"ckpt_path: best .* none is noted in .*checkpoints; .*keep_best"):
        find_weights(small_config(tmp_path, "sample", ckpt_path="best"))


def test_validation_of_another_order_of_classes_is_refused(tmp_path: Path) -> None:
    from PIL import Image

    for root, names in (("train", "abc"), ("val", "ac")):
        for name in names:
            (tmp_path / root / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / root / name / f"{number}.png")
    options = {
        "data__dataset": f"{{type: ImageFolder, root: {tmp_path}/train}}",
        "encoder__channels": 3,
        "model__in_channels": 3,
        "data__batch_size": 2,
        "validate_every": 1,
    }
    fit(
        tmp_path / "run",
        data__validation=f"{{type: ImageFolder, root: {tmp_path}/train}}",
        max_training_steps=1,
        **options,
    )
    with pytest.raises(ValueError, match="data.validation needs the 3 classes .* got 2 of which b differ"):
        small_trainer(tmp_path, data__validation=f"{{type: ImageFolder, root: {tmp_path}/val}}", **options)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["validate_every=5"],
            "validate_every: has no samples to measure the loss on; wanted data.validation",
        ),
        (["data.validation=Digits"], "data.validation: has no effect without validate_every; wanted null"),
        (
            ["validate_every=5", "data.validation=Digits", "data.held_out_samples=5"],
            "data.held_out_samples: are not measured beside data.validation; wanted 0",
        ),
        (
            ["data.accept_changed=true", "data.held_out_samples=5", "validate_every=5"],
            "data.accept_changed: held_out_samples of changed data would be others, some of them trained on",
        ),
        *(
            (
                [f"{kind}_samples=5"],
                f"{kind}_samples: has no effect without {kind}_every; wanted its default, {default}, or"
                f" {kind}_every > 0",
            )
            for kind, default in (("validate", 500), ("evaluate", 1000))
        ),
        (["keep_best=val_loss"], "keep_best: val_loss is not measured with validate_every: 0; wanted more"),
        (["keep_best=fid"], "keep_best: fid is not measured with evaluate_every: 0; wanted more"),
        (
            ["keep_best=kid", "evaluate_every=5", "evaluation.metrics=[fid]"],
            "keep_best: wanted one of evaluation.metrics, fid, or null, got kid",
        ),
        (
            ["evaluate_every=5", "evaluation.metrics=[fid, clip_score]"],
            "evaluation.metrics: train measures no clip_score; wanted others",
        ),
        *(
            (
                ["evaluate_every=5", f"evaluation.metrics=[fid, {name}]"],
                f"evaluation.metrics: train measures no {name}; wanted others, got fid, {name}",
            )
            for name in PAIRED
        ),
        (
            ["evaluate_every=5", "evaluation.metrics=[fid]", "evaluation.kid_subsets=5"],
            "evaluation.kid_subsets: has no effect without kid in evaluation.metrics",
        ),
        (
            ["evaluate_every=5", "diffusion.timestep_respacing='250'"],
            "evaluate_every: a respaced training process draws no samples; wanted 0",
        ),
    ],
)
def test_keys_without_effect_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        load_config(CONFIG, "train", overrides)


def test_a_best_checkpoint_that_is_damaged_or_of_a_later_step_is_not_taken(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / "step_0000005").mkdir(parents=True)
    best = Best("step_0000005", 5, "fid", 2.0)
    note_best(folder, best, Runtime())
    assert read_best(folder) == read_best(folder, "fid", up_to=5) == best
    # Of another figure, or measured after the step that a run goes back to.
    assert read_best(folder, "kid") is None
    assert read_best(folder, "fid", up_to=4) is None
    with pytest.raises(ValueError, match=r"best checkpoint .*step_0000005 is damaged: .*manifest.json"):
        find_weights(small_config(tmp_path, "sample", ckpt_path="best"))
    (folder / "step_0000005").rmdir()
    assert read_best(folder) is None
    (folder / "best.json").write_text("{")
    with pytest.raises(ValueError, match=r"best.json is damaged: .*; delete it"):
        read_best(folder)
