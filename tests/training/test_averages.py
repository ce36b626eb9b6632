"""Which average a run keeps: none, another kind, and what reads a checkpoint then."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import arguments, small_config, small_trainer
from safetensors.torch import load_file
from torch.testing import assert_close

from speedit_plugins.cli import main
from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.checkpoints import CheckpointError
from speedit_plugins.trainer.config.validation import ConfigError
from speedit_plugins.trainer.sampling.generator import find_weights, load_generator
from speedit_plugins.trainer.training.assembly import build_trainer
from speedit_plugins.trainer.training.trainer import Trainer

CONFIG = "configs/image/digits/speedit.yaml"
NONE = {"ema": "{type: none}"}
POWER = {"ema": "{type: power, sigma_rel: [0.1, 0.2]}"}


def steps(trainer: Trainer, count: int) -> Trainer:
    trainer.engine.model.train()
    for _ in range(count):
        trainer.optimizer_step()
    return trainer


def averages(trainer: Trainer) -> dict[str, Any]:
    kept = {"": trainer.ema.slices, **trainer.ema.others}
    found = {label: {n: p.values.clone() for n, p in part.items()} for label, part in kept.items()}
    return {**found, "updates": trainer.ema.num_updates}


def files_of(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


def test_a_run_without_an_average_is_sampled_with_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = arguments(tmp_path, max_training_steps=4, sample_every=4, num_samples=2, **NONE)
    for phase in ("train", "sample", "inference"):
        assert main(["-c", CONFIG, "-p", phase, *options]) == 0, capsys.readouterr().err
    path = tmp_path / "checkpoints" / "step_0000004"
    assert "ema.safetensors" not in files_of(path)
    config = small_config(tmp_path, "sample")
    assert find_weights(config) == path
    weights = load_file(path / "model.safetensors")
    assert_close(load_generator(config)[0].model.state_dict(), weights, rtol=0, atol=0)
    # It is also a start for a fine-tuning.
    tuned = build_trainer(small_config(tmp_path / "tuned"), weights=str(path))
    assert_close(tuned.model.state_dict(), weights, rtol=0, atol=0)


def test_without_an_average_the_model_is_the_file_that_must_be_whole(tmp_path: Path) -> None:
    first = steps(small_trainer(tmp_path, **NONE), 1)
    older = first.save()
    newer = steps(first, 1).save()
    model = newer / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    assert checkpoints.newest_whole([newer, older], only=checkpoints.EMA) == older
    # An average that the manifest lists is missed.
    averaged = steps(small_trainer(tmp_path / "averaged"), 1).save()
    (averaged / "ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks ema.safetensors"):
        checkpoints.load(averaged)


def test_the_training_is_the_same_with_any_average_and_with_none(tmp_path: Path) -> None:
    expected = steps(small_trainer(tmp_path), 3).weights()
    for changes in (NONE, POWER):
        assert_close(steps(small_trainer(tmp_path, **changes), 3).weights(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("changes", [NONE, POWER], ids=["none", "power"])
def test_six_steps_equal_three_and_a_resumed_three_bit_for_bit(
    tmp_path: Path, changes: dict[str, str]
) -> None:
    whole = steps(small_trainer(tmp_path, **changes), 6)
    path = steps(small_trainer(tmp_path, **changes), 3).save()
    assert ("ema_0.2.safetensors" in files_of(path)) == (changes is POWER)
    resumed = small_trainer(tmp_path, **changes)
    resumed.restore(path)
    assert_close(averages(steps(resumed, 3)), averages(whole), rtol=0, atol=0)
    assert_close(resumed.weights(), whole.weights(), rtol=0, atol=0)


def test_an_average_may_begin_and_end_with_a_resume_and_both_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = steps(small_trainer(tmp_path, **NONE), 2).save()
    begun = small_trainer(tmp_path)
    begun.restore(without)
    assert (
        "the checkpoint has no average: ema.type halflife begins with its weights" in capsys.readouterr().out
    )
    assert begun.ema.num_updates == 0
    assert_close(begun.averaged_weights(), begun.weights(), rtol=0, atol=0)
    steps(begun, 1)

    ended = small_trainer(tmp_path, **NONE)
    ended.restore(begun.save())
    assert "ema.type is none: the average of the checkpoint is not continued" in capsys.readouterr().out
    assert not ended.ema.slices


def test_a_power_average_does_not_begin_beside_snapshots_of_an_earlier_one(tmp_path: Path) -> None:
    without = steps(small_trainer(tmp_path, **NONE), 2).save()
    earlier = tmp_path / "snapshots" / "step_0000001.safetensors"
    earlier.parent.mkdir()
    earlier.touch()
    with pytest.raises(CheckpointError, match=f"begins would mix its snapshots with {earlier}; move or"):
        small_trainer(tmp_path, **POWER).restore(without)
    # Other averages have no snapshots.
    small_trainer(tmp_path).restore(without)
    earlier.unlink()
    small_trainer(tmp_path, **POWER).restore(without)


def test_an_average_of_another_kind_or_length_is_refused(tmp_path: Path) -> None:
    halved = steps(small_trainer(tmp_path), 1).save()
    with pytest.raises(CheckpointError, match="ema.type was halflife, got power; wanted the same, or none"):
        small_trainer(tmp_path, **POWER).restore(halved)
    first = steps(small_trainer(tmp_path / "power", **POWER), 2)
    path = first.save()
    one = small_trainer(tmp_path, ema="{type: power, sigma_rel: [0.2]}")
    one.restore(path)
    assert_close(averages(one)[""], averages(first)["0.2"], rtol=0, atol=0)
    message = r"ema.sigma_rel was \[0\.1, 0\.2\], got \[0\.1, 0\.05\]; wanted some of these"
    with pytest.raises(CheckpointError, match=message):
        small_trainer(tmp_path, ema="{type: power, sigma_rel: [0.1, 0.05]}").restore(path)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            "{type: none, ramp: false}",
            "ema.ramp: has no effect with type none; wanted it left out, or type half",
        ),
        ("{type: power, halflife_steps: 5}", "ema.halflife_steps: has no effect with type power"),
        ("{snapshot_every: 5}", "ema.snapshot_every: has no effect with type halflife; .*or type power"),
        ("{type: power, sigma_rel: []}", r"ema.sigma_rel: wanted different lengths, at least one, got \[\]"),
        ("{type: power, sigma_rel: [0.1, 0.1]}", "ema.sigma_rel: wanted different lengths"),
        (
            "{type: power, sigma_rel: [0.1, 0.1000001]}",
            r"ema.sigma_rel: wanted lengths that differ in their first six digits, got \[0\.1, 0\.1000001\]",
        ),
        ("{type: power, sigma_rel: [0.3]}", r"ema.sigma_rel\[0\]: wanted float < 0.288, got 0.3"),
        (
            "{type: power, snapshot_every: 50}",
            "ema.snapshot_every: wanted at most max_training_steps = 20, got 50",
        ),
    ],
)
def test_keys_of_another_kind_of_average_are_refused(tmp_path: Path, section: str, message: str) -> None:
    # Of the digits' own section, type none and power leave nothing.
    with pytest.raises(ConfigError, match=message):
        small_config(tmp_path, ema=section)


def test_the_power_average_is_what_a_checkpoint_calls_ema(tmp_path: Path) -> None:
    trainer = steps(small_trainer(tmp_path, **POWER), 2)
    saved = checkpoints.load(trainer.save())
    name = "final_layer.linear.weight"
    assert torch.equal(saved.ema[name], trainer.averaged_weights()[name])
    assert not torch.equal(saved.ema[name], saved.averages["0.2"][name])
    # A short length has a sign in its label.
    short = steps(small_trainer(tmp_path / "short", ema="{type: power, sigma_rel: [0.1, 5e-5]}"), 1).save()
    assert "ema_5e-05.safetensors" in files_of(short)
    assert checkpoints.damage(short) is None
