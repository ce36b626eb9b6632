"""The folder of a run in place of a checkpoint, and steps that are not there."""

import re
import shutil
from pathlib import Path

import pytest
from runs import arguments

from speedit_plugins.cli import main
from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.checkpoints.paths import named_checkpoint
from speedit_plugins.trainer.saved_configs import config_of, named_config


def speedit(phase: str, folder: Path, **changes: object) -> int:
    return main(["-c", "configs/image/digits/speedit.yaml", "-p", phase, *arguments(folder, **changes)])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("run")
    assert speedit("train", folder, max_training_steps=5, ckpt_every=2) == 0
    return folder


def test_a_run_means_its_newest_checkpoint(run: Path) -> None:
    newest = run / "checkpoints" / "step_0000005"
    said: list[str] = []
    for path in (run, run / "checkpoints"):
        assert named_checkpoint(path, "resume", say=said.append) == newest
    assert said == [
        f"resume: {path} has steps 2, 4, 5; the newest is taken, {newest}"
        for path in (run, run / "checkpoints")
    ]
    # A checkpoint and a file are what they are, and nothing is said.
    for path in (newest, newest / "ema.safetensors", run / "checkpoints" / "step_0000002"):
        assert named_checkpoint(path, "resume", say=said.append) == path
    assert len(said) == 2


@pytest.mark.parametrize("name", ["step_0000003", "3", "step_4"])
def test_a_step_that_is_not_there_lists_those_that_are(run: Path, name: str) -> None:
    hint = f"; did you mean {run}/checkpoints/step_0000004?" if name == "step_4" else ""
    message = f"got no {run}/checkpoints/{name}{hint}; {run}/checkpoints has steps 2, 4, 5"
    for key in ("resume", "ckpt_path", "pretrained"):
        with pytest.raises(ValueError, match=f"^{key} needs a checkpoint, {re.escape(message)}$"):
            named_checkpoint(run / "checkpoints" / name, key)


def test_every_key_takes_the_folder_of_a_run(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    newest = run / "checkpoints" / "step_0000005"
    assert (
        speedit("train", tmp_path / "branch", resume=newest / "model.safetensors", max_training_steps=6) == 0
    )
    assert f"going on from {newest}" in capfd.readouterr().out
    assert speedit("train", tmp_path / "other", resume=run, max_training_steps=6) == 0
    assert f"going on from {newest}" in capfd.readouterr().out
    assert speedit("train", tmp_path / "tuned", pretrained=run, max_training_steps=1) == 0
    out = capfd.readouterr().out
    assert f"pretrained: {run} has steps 2, 4, 5" in out
    assert f"fine-tuning from {newest}: " in out
    assert speedit("sample", tmp_path, ckpt_path=run, sample_classes="[1]", samples_per_class=1) == 0
    assert f"with the weights of {newest}" in capfd.readouterr().out
    assert speedit("inference", tmp_path, ckpt_path=run, num_samples=2) == 0
    assert capfd.readouterr().out.count("the newest is taken") == 1
    for phase, key in (("train", "resume"), ("train", "pretrained"), ("sample", "ckpt_path")):
        assert speedit(phase, tmp_path / "x", **{key: run / "checkpoints" / "step_3"}) == 2
        assert "checkpoints has steps 2, 4, 5" in capfd.readouterr().err
    # A bare name is looked for in the run itself.
    assert speedit("sample", run, ckpt_path="step_4") == 2
    assert f"got no step_4; did you mean {run}/checkpoints/step_0000004?" in capfd.readouterr().err
    assert speedit("train", tmp_path / "x", resume="latest") == 2
    assert "got 'latest'; did you mean 'auto'?" in capfd.readouterr().err


def test_weights_know_the_config_of_their_training(tmp_path: Path) -> None:
    run, step = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_0000001"
    for path in (run / "config_train.yaml", step / "config.yaml", run / "posthoc" / "a.safetensors"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    # A checkpoint has the config that it was written with; the run's own is shorter to type.
    for source in (step, step / "ema.safetensors"):
        assert config_of(source) == step / "config.yaml"
        assert named_config(source) == run / "config_train.yaml"
    averaged = run / "posthoc" / "a.safetensors"
    assert config_of(averaged) == named_config(averaged) == run / "config_train.yaml"
    copied = shutil.copytree(step, tmp_path / "elsewhere")
    assert named_config(copied) == copied / "config.yaml"
    assert config_of(run / "foreign.pt") is None
    assert named_config(tmp_path / "foreign.pt") is None


def test_samples_are_refused_that_the_weights_were_not_trained_for(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The training's config is beside the weights. Elsewhere the weights mean what the config says."""
    newest = run / "checkpoints" / "step_0000005"
    drawn = {"sample_classes": "[1]", "samples_per_class": 1, "num_samples": 1}
    for changes, differs in (
        ({"diffusion__prediction_type": "x0"}, "diffusion.prediction_type was 'epsilon', got 'x0'"),
        ({"diffusion__type": "RectifiedFlow"}, "diffusion.type was 'SpeeDiffusion', got 'RectifiedFlow'"),
        ({"model__num_heads": 4}, "model.num_heads was 2, got 4"),
    ):
        message = f"{newest} was trained with another config: {differs}; wanted that of the training:"
        for phase in ("sample", "inference"):
            assert speedit(phase, run, **changes, **drawn) == 2
            assert f"{message} -c {run}/config_train.yaml\n" in capfd.readouterr().err
    assert speedit("sample", tmp_path, ckpt_path=newest / "model.safetensors", **changes, **drawn) == 2
    assert not list(run.glob("samples*")) + list((run / "inference").glob("*"))
    # A shape says more than the first tensors that differ.
    assert speedit("sample", run, model__class_dropout_prob=0.0, **drawn) == 2
    assert "does not fit the model: y_embedder" in (said := capfd.readouterr().err)
    assert f"wanted the model section of the run that wrote the file: -c {run}/config_train.yaml" in said
    options = [f"experiment_dir={run}", "sample_classes=[1]", "samples_per_class=1"]
    assert main(["-c", str(run / "config_train.yaml"), "-p", "sample", *options]) == 0
    shutil.copy(newest / "ema.safetensors", tmp_path / "foreign.safetensors")
    foreign = {"ckpt_path": tmp_path / "foreign.safetensors", **drawn}
    assert speedit("sample", tmp_path, diffusion__prediction_type="x0", **foreign) == 0


def test_a_resumed_run_needs_its_first_weights_no_more(tmp_path: Path, run: Path) -> None:
    shutil.copytree(run, tmp_path / "first")
    assert speedit("train", tmp_path / "tuned", pretrained=tmp_path / "first", max_training_steps=1) == 0
    shutil.rmtree(tmp_path / "first")
    assert speedit("train", tmp_path / "tuned", pretrained=tmp_path / "first", max_training_steps=2) == 0
    assert checkpoints.newest(tmp_path / "tuned" / "checkpoints") is not None
