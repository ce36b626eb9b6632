"""Trainings of adapters: what a checkpoint holds, and how each later phase finds the weights it adapts."""

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import arguments, small_config, small_trainer, stepped
from safetensors.torch import load_file, save_file
from saved_models import save_pipeline
from torch.testing import assert_close

from speedit_plugins.cli import main
from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.evaluation.npz import read_npz
from speedit_plugins.trainer.models import lora
from speedit_plugins.trainer.models.text_conditioned.unet import UNet
from speedit_plugins.trainer.sampling.generator import load_generator
from speedit_plugins.trainer.training.assembly import build_trainer

DIGITS, SD15 = "configs/image/digits/speedit.yaml", "configs/text_to_image/sd15.yaml"
# No fresh layer is zero after these steps.
SHORT = {"max_training_steps": 2, "data__num_workers": 0, "optimizer__warmup_steps": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run that trained all weights."""
    folder = tmp_path_factory.mktemp("base")
    assert run("train", folder) == 0
    return checkpoints.newest(folder / "checkpoints") or folder


def run(phase: str, folder: Path, **changes: Any) -> int:
    return main(["-c", DIGITS, "-p", phase, *arguments(folder, **{**SHORT, **changes})])


def adapted(base: Path, **changes: Any) -> dict[str, Any]:
    return {**SHORT, "pretrained": base, "lora__rank": 2, "lora__alpha": 3, **changes}


def message(capsys: pytest.CaptureFixture[str], phase: str, folder: Path, **changes: Any) -> str:
    capsys.readouterr()
    assert run(phase, folder, **changes) == 2
    return capsys.readouterr().err


def test_a_run_of_adapters_goes_through_every_phase(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = adapted(base)
    whole = stepped(small_trainer(tmp_path / "whole", **options), 2)
    assert run("train", tmp_path, **{**options, "max_training_steps": 1}) == 0
    assert run("train", tmp_path, **options) == 0
    assert "is not read again" not in capsys.readouterr().out
    first, second = (tmp_path / "checkpoints" / f"step_000000{step}" for step in (1, 2))
    found = load_file(second / checkpoints.MODEL)
    # A resumed run continues to the bit.
    assert_close(found, {name: found[name] for name in whole.weights()}, rtol=0, atol=0)
    assert_close(found, whole.weights(), rtol=0, atol=0)
    assert all(".lora_" in name for name in found)
    frozen = load_file(base / checkpoints.MODEL)
    ratio = sum(t.numel() for t in found.values()) / sum(t.numel() for t in frozen.values())
    assert ratio < 0.05
    assert all((path / checkpoints.EMA).stat().st_size < 30_000 for path in (first, second))

    drawn = {}
    sampling = {"num_samples": 2, "sampler__num_steps": 2}
    for name, changes in {
        "named": options,
        # The file names what was adapted.
        "found": {**options, "pretrained": "null"},
    }.items():
        assert run("inference", tmp_path, **{**changes, **sampling}) == 0
        (npz,) = (tmp_path / "inference").glob("*.npz")
        drawn[name] = read_npz(npz)
        (tmp_path / "inference").rename(tmp_path / name)
    assert np.array_equal(drawn["named"], drawn["found"])
    assert run("sample", tmp_path, **{**options, **sampling}, sample_classes="[1]") == 0
    profile = runpy.run_path("tools/timestep_profile.py")
    assert profile["measure"](tmp_path, weights="ema")["step"] == 2


def test_the_samples_are_those_of_the_trained_weights(base: Path, tmp_path: Path) -> None:
    options = adapted(base)
    trainer = stepped(small_trainer(tmp_path, **options), 2)
    trainer.save()
    expected = {**trainer.model.state_dict(), **trainer.averaged_weights()}
    generator, _, _ = load_generator(small_config(tmp_path, "sample", **options, sample_classes="[1]"))
    assert_close(generator.model.state_dict(), expected, rtol=0, atol=0)


def test_other_weights_than_the_adapted_ones_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = adapted(base)
    assert run("train", tmp_path, **options) == 0
    other = load_file(base / checkpoints.EMA)
    other["blocks.0.mlp.fc1.bias"] += 2**-10
    save_file(other, tmp_path / "other.safetensors")
    changed = {**options, "pretrained": tmp_path / "other.safetensors", "max_training_steps": 3}
    wanted = (
        r"adapts other weights than those of .*other\.safetensors: they have SHA-256 [0-9a-f]{12}, wanted"
    )
    for phase, more in (("train", {}), ("sample", {"sample_classes": "[1]"})):
        said = message(capsys, phase, tmp_path, **{**changed, **more})
        assert re.search(wanted, said)
        assert str(base) in said
    for change, said in (
        (
            {"lora__alpha": 4},
            "made with lora: {rank: 2, alpha: 3, targets: [attn.qkv, attn.proj]}; got lora",
        ),
        ({"lora__rank": 4}, "made with lora: {rank: 2"),
        ({"lora__rank": 0, "lora__alpha": "null"}, "holds adapters without the weights they adapt"),
    ):
        for phase, more in (("train", {"max_training_steps": 3}), ("sample", {"sample_classes": "[1]"})):
            assert said in message(capsys, phase, tmp_path, **{**options, **change, **more})
    # And the reverse: whole weights for a run of adapters.
    whole = message(capsys, "sample", tmp_path, **options, ckpt_path=base, sample_classes="[1]")
    assert "holds whole weights without adapters" in whole
    assert "to adapt these weights, give them as pretrained" in whole
    newest = checkpoints.newest(tmp_path / "checkpoints")
    alone = message(capsys, "train", tmp_path / "next", **{**options, "pretrained": newest})
    assert "holds adapters alone" in alone


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora__rank": 2}, "lora.rank: adapters need trained weights; wanted pretrained or model.path"),
        ({"lora__alpha": 2}, "lora.alpha: has no effect with lora.rank 0"),
        ({"lora__targets": "[attn.qkv]"}, "lora.targets: has no effect with lora.rank 0"),
        ({"lora__rank": -1}, "lora.rank: wanted int >= 0, got -1"),
    ],
)
def test_an_option_without_effect_or_without_weights_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    assert said in message(capsys, "train", tmp_path, **changes)
    assert not (tmp_path / "checkpoints").exists()


def test_embeddings_of_other_classes_are_trained_beside_the_adapters(base: Path, tmp_path: Path) -> None:
    weights = load_file(base / checkpoints.EMA)
    table = "y_embedder.embedding_table.weight"
    weights[table] = weights[table][:5].clone()
    save_file(weights, tmp_path / "file.safetensors")
    options = adapted(tmp_path / "file.safetensors")
    trainer = stepped(small_trainer(tmp_path, **options), 2)
    assert table in trainer.weights()
    path = trainer.save()
    assert table in load_file(path / checkpoints.EMA)
    resumed = small_trainer(tmp_path, **options)
    resumed.restore(path)
    assert_close(resumed.weights(), trainer.weights(), rtol=0, atol=0)


def text_options(parts: Path, folder: Path) -> list[str]:
    places = f"path: {parts}, subfolder: text_encoder, tokenizer_subfolder: tokenizer"
    return [
        f"experiment_dir={folder}",
        "image_size=16",
        f"model={{type: UNet, path: {parts}, input_size: 8, text_width: 16, text_length: 8}}",
        f"encoder={{type: AutoencoderKL, path: {parts}, subfolder: vae}}",
        f"text_encoder={{type: TextEncoder, {places}, max_length: 8, dtype: float32}}",
        "data.dataset={type: Emoji, image_size: 16}",
        "data.batch_size=2",
        "data.num_workers=0",
        "sample_prompts=[red heart]",
        "max_training_steps=2",
        "optimizer.warmup_steps=0",
    ]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float32_adapters(tmp_path: Path, precision: str) -> None:
    parts = save_pipeline(tmp_path / "parts", "UNet")
    options = [*text_options(parts, tmp_path), "lora.rank=2", f"precision={precision}"]
    trainer = build_trainer(load_config(SD15, "train", [*options, "model.gradient_checkpointing=true"]))
    before = {name: value.clone() for name, value in trainer.weights().items()}
    frozen = {name: value.clone() for name, value in trainer.engine.untrained().items()}
    result, _ = trainer.optimizer_step()
    assert not result.is_skipped
    after = trainer.weights()
    # B starts at zero, so that A gets no gradient in the first step.
    assert all((after[name] != before[name]).any() for name in after if ".lora_B." in name)
    assert {value.dtype for value in load_file(trainer.save() / checkpoints.EMA).values()} == {
        torch.float32,
        torch.bool,
    }
    assert_close(trainer.engine.untrained(), frozen, rtol=0, atol=0)


def test_a_checkpoint_of_before_and_its_config_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = save_pipeline(tmp_path / "parts", "UNet")
    earlier = [*text_options(parts, tmp_path / "run"), "model.lora_rank=2", "precision=fp32"]
    config = load_config(SD15, "train", earlier)
    assert (config.lora.rank, "lora_rank" in config.model) == (2, False)
    trainer = stepped(build_trainer(config), 2)
    # As checkpoints were: the frozen weights too, and no record.
    weights = {**trainer.model.state_dict(), **trainer.averaged_weights()}
    path = trainer.save()
    for name in (checkpoints.MODEL, checkpoints.EMA):
        save_file(weights, path / name)
    assert isinstance(trainer.model, UNet)
    generator, _, _ = load_generator(load_config(SD15, "sample", [*earlier, f"ckpt_path={path}"]))
    assert_close(generator.model.state_dict(), weights, rtol=0, atol=0)
    resumed = build_trainer(config)
    resumed.restore(path)
    assert_close(resumed.weights(), {name: weights[name] for name in trainer.weights()}, rtol=0, atol=0)
    other = "holds adapters, made with lora.*alpha: 2.*alpha: 7"
    with pytest.raises(checkpoints.CheckpointError, match=other):
        build_trainer(load_config(SD15, "train", [*earlier, "lora.alpha=7"])).restore(path)
    weights["net.conv_in.bias"] = weights["net.conv_in.bias"] + 1
    save_file(weights, path / checkpoints.MODEL)
    with pytest.raises(checkpoints.CheckpointError, match=r"its frozen net\.conv_in\.bias is another than"):
        build_trainer(config).restore(path)
    with pytest.raises(ValueError, match=r"model.lora_rank: is the earlier name of lora.rank; wanted one"):
        load_config(SD15, "train", [*earlier, "lora.rank=2"])
    # The next checkpoint is without the frozen ones.
    assert set(load_file(resumed.save() / checkpoints.MODEL)) == set(
        lora.without_base(resumed.model, resumed.model.state_dict())
    )


def test_inpainting_adapters_need_a_network_with_channels_for_the_mask(tmp_path: Path) -> None:
    parts = save_pipeline(tmp_path / "parts", "UNet")
    options = [*text_options(parts, tmp_path), "lora.rank=2", "inpainting=RandomMasks"]
    with pytest.raises(
        ValueError, match="lora with inpainting or super_resolution needs a network that has their"
    ):
        build_trainer(load_config(SD15, "train", options))


def test_a_dry_run_counts_the_trained_parameters_alone(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for options in (adapted(base), SHORT):
        assert main(["-c", DIGITS, "-p", "train", "--dry-run", *arguments(tmp_path, **options)]) == 0
        told.append(capsys.readouterr().out)
    trained = [float(re.search(r"  moments +([\d.]+) MiB", text)[1]) for text in told]
    # Those of the adapters, against those of all weights.
    assert trained[0] < 0.3 * trained[1]
