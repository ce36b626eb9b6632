"""The tool from config to cache, and training batches from the cache against batches from the images."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from speedit_plugins.trainer.build import build_dataset, build_text_encoder
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.data.latents.cache import LatentCache, sample_latents
from speedit_plugins.trainer.data.latents.shards import read_index
from speedit_plugins.trainer.data.loader import ResumableLoader
from speedit_plugins.trainer.models.pretrained.autoencoder import Autoencoder
from speedit_plugins.trainer.models.pretrained.text import TextEncoder
from speedit_plugins.trainer.training.assembly import build_trainer

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "cache_latents.py"
NUM_IMAGES = 11

# Runs the tool in a process that kills itself at the n-th rename of a file.
KILLED = """
import os, runpy, signal, sys
from pathlib import Path
number, when, sys.argv = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
rename, count = Path.replace, 0
def replace(path, target):
    global count
    count += 1
    if count == number and when == "after":
        rename(path, target)
    if count == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, target)
Path.replace = replace
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cache_latents", TOOL)
    module = importlib.util.module_from_spec(spec)
    # `dataclass` looks the module up in `sys.modules`.
    sys.modules["cache_latents"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a config with a small autoencoder, and a folder of images in three classes."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("experiment")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=5,
        scaling_factor=0.3,
    ).save_pretrained(folder / "autoencoder")
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 12, 16, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        path = folder / "images" / f"class_{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    content = {
        "experiment_dir": str(folder / "run"),
        "num_classes": 3,
        "image_size": 8,
        "model": {"type": "DiT", "patch_size": 2, "hidden_size": 8, "depth": 1, "num_heads": 2},
        "encoder": {"type": "AutoencoderKL", "path": str(folder / "autoencoder")},
        "data": {"dataset": {"type": "ImageFolder", "root": str(folder / "images")}, "batch_size": 4},
        "max_training_steps": 1,
    }
    (folder / "experiment.yaml").write_text(json.dumps(content))
    return folder / "experiment.yaml"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # A convolution's last bits may depend on the other images of the batch. Half precision keeps 11 bits.
    [("float32", {"atol": 1e-5, "rtol": 1e-5}), ("float16", {"atol": 1e-3, "rtol": 2**-10})],
)
def test_batches_from_the_cache_are_those_of_encoding_on_the_fly(
    tool: ModuleType,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
    tolerance: dict[str, float],
) -> None:
    options = ["--out", str(tmp_path), "--shard-size", "5", "--batch-size", "2", "--dtype", dtype, "--flip"]
    assert tool.main(["-c", str(config), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    num_bytes = sum(len(content) for name, content in files(tmp_path).items() if name.startswith("shard"))
    assert lines[0] == f"{tmp_path}: 11 samples in 3 shards, {num_bytes:,} bytes"
    overrides = [line.strip() for line in lines[-2:]]
    experiment = load_config(config, "train")
    encoder = Autoencoder(experiment.encoder["path"])
    images, cache = (
        build_dataset(load_config(config, "train", ["data.dataset.random_flip=true", *changes]))
        for changes in ([], overrides)
    )
    assert isinstance(cache, LatentCache)
    assert cache.encoder_fingerprint == encoder.fingerprint()
    # Two epochs with random flips.
    loaders = [ResumableLoader(dataset, batch_size=4, seed=3) for dataset in (images, cache)]
    for _ in range(4):
        seen, cached = (next(loader) for loader in loaders)
        assert torch.equal(cached["label"], seen["label"])
        generators = [[torch.Generator().manual_seed(i) for i in range(4)] for _ in range(2)]
        latents = sample_latents(cached["latent_mean"], cached["latent_std"], generators[0])
        assert_close(latents, encoder.encode(seen["image"], generators[1]), **tolerance)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_run_is_resumed_to_the_same_bytes(
    tool: ModuleType, config: Path, tmp_path: Path, when: str
) -> None:
    command = ["-c", str(config), "--shard-size", "4", "--batch-size", "3", "data.num_workers=1"]
    assert tool.main([*command, "--out", str(tmp_path / "whole")]) == 0
    killed = [*command, "--out", str(tmp_path / "killed")]
    # The renames are an empty index, then shard and index in turn. The fourth is the second shard.
    run = subprocess.run(
        [sys.executable, "-c", KILLED, "4", when, str(TOOL), *killed],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == -9, run.stderr
    # The second shard is on disk, and the index is whole but has only the first.
    assert read_index(tmp_path / "killed").num_done == 4
    unlisted = "shard_00001.safetensors" + (".tmp" if when == "before" else "")
    assert set(files(tmp_path / "killed")) == {"index.json", "shard_00000.safetensors", unlisted}
    with pytest.raises(ValueError, match="has 4 of 11 samples"):
        LatentCache(tmp_path / "killed")
    assert tool.main(killed) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_second_run_of_a_finished_cache_encodes_nothing(
    tool: ModuleType, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["-c", str(config), "--out", str(tmp_path)]
    assert tool.main(command) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert tool.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert "  0 of them encoded now" in capsys.readouterr().out


def test_another_config_into_the_same_folder_is_refused_with_what_differs(
    tool: ModuleType, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["-c", str(config), "--out", str(tmp_path), "--batch-size", "2"]
    assert tool.main(command) == 0
    before = files(tmp_path)
    changes = {
        "image_size=12": "image_size was 8, got 12",
        "data.dataset.on_corrupt=skip": "dataset.on_corrupt was nothing, got skip",
        "num_classes=0": "class_cond was True, got False",
        "--flip": "flip was False, got True",
        "--dtype=float16": "dtype was float32, got float16",
        "--shard-size=3": "shard_size was 4096, got 3",
    }
    for change, message in changes.items():
        given = [*command, change]
        if change == "num_classes=0":
            given.append("data.dataset.class_cond=false")
        assert tool.main(given) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: the cache in {tmp_path} was made from something else: ")
        assert message in error
    assert files(tmp_path) == before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_is_named_or_skipped(
    tool: ModuleType, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], num_workers: int
) -> None:
    source = Path(load_config(config, "train").data.dataset["root"])
    for path in source.rglob("*.png"):
        target = tmp_path / "images" / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    damaged = tmp_path / "images" / "class_1" / "4.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    command = [
        "-c",
        str(config),
        f"data.dataset.root={tmp_path / 'images'}",
        f"data.num_workers={num_workers}",
    ]
    assert tool.main([*command, "--out", str(tmp_path / "raise")]) == 2
    assert f"error: corrupt image {damaged}: " in capsys.readouterr().err
    skipping = [*command, "--out", str(tmp_path / "skip"), "data.dataset.on_corrupt=skip"]
    if num_workers:
        assert tool.main(skipping) == 0
    else:
        with pytest.warns(UserWarning, match=f"corrupt image {damaged}"):
            assert tool.main(skipping) == 0
    cache = LatentCache(tmp_path / "skip")
    # Sorted by path, class_1 has 1, 10, 4 and 7 at the indices 4 to 7. The image after 4.png replaces it.
    taken, next_one = (cache.load(i, torch.Generator()) for i in (6, 7))
    assert_close(taken, next_one, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_cached_is_refused(
    tool: ModuleType, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["-c", str(config), "--out", str(tmp_path)]) == 0
    again = ["data.dataset.type=LatentCache", f"data.dataset.root={tmp_path}", "--out", str(tmp_path / "b")]
    assert tool.main(["-c", str(config), *again]) == 2
    assert "needs images, got a dataset of ['label', 'latent_mean', 'latent_std']" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main(["-c", str(config), "--shard-size", "0"])
    assert "wanted an int >= 1, got 0" in capsys.readouterr().err


def test_latents_beyond_half_precision_are_refused(
    tool: ModuleType,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The largest float16 is 65504.
    monkeypatch.setattr(
        Autoencoder,
        "posterior",
        lambda self, images: (torch.full_like(images, 7e4), torch.zeros_like(images)),
    )
    command = ["-c", str(config), "--batch-size", "4"]
    assert tool.main([*command, "--out", str(tmp_path / "half"), "--dtype", "float16"]) == 2
    assert "latent_mean of samples 0..3 is not finite in float16" in capsys.readouterr().err
    assert tool.main([*command, "--out", str(tmp_path / "single")]) == 0


@pytest.mark.parametrize("encoder", ["autoencoder", "pixels"])
def test_training_from_the_cache_follows_training_on_the_fly(
    tool: ModuleType, config: Path, tmp_path: Path, encoder: str
) -> None:
    pixels = ["encoder={type: Pixels}", "model.patch_size=4"] if encoder == "pixels" else []
    # Images and cache draw the same mirrored images.
    assert tool.main(["-c", str(config), "--out", str(tmp_path), "--flip", *pixels]) == 0
    losses = []
    for cached in (
        ["data.dataset.random_flip=true"],
        ["data.dataset={type: LatentCache}", f"data.dataset.root={tmp_path}"],
    ):
        trainer = build_trainer(load_config(config, "train", [*pixels, *cached]))
        for _ in range(3):
            assert not trainer.optimizer_step()[0].is_skipped
        losses.append(trainer.window.summary()["loss"])
    # Rounding of convolutions depends on the batch.
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_training_with_another_encoder_than_the_caches_is_refused(
    tool: ModuleType, config: Path, tmp_path: Path
) -> None:
    assert tool.main(["-c", str(config), "--out", str(tmp_path)]) == 0
    for key, more in (("dataset", []), ("validation", ["validate_every=5", "model.patch_size=4"])):
        cached = f"data.{key}={{type: LatentCache, root: {tmp_path}}}"
        message = rf"^data.{key}: the latents in {tmp_path} were made by another encoder than {{'type': 'Pix"
        with pytest.raises(ValueError, match=message):
            build_trainer(load_config(config, "train", ["encoder={type: Pixels}", cached, *more]))


def test_a_text_run_from_the_cache_follows_the_run_without_it(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = "configs/text_to_image/emoji_pixart.yaml"
    small = ["model.num_layers=1", "model.num_heads=2", "model.head_dim=8", "data.batch_size=4"]
    shared = ["max_training_steps=3", "optimizer.warmup_steps=1"]
    assert tool.main(["-c", config, "--out", str(tmp_path / "cache"), *small]) == 0
    overrides = [line.strip() for line in capsys.readouterr().out.splitlines()[-2:]]
    weights = []
    for number, changes in enumerate(([], overrides)):
        options = [*shared, f"experiment_dir={tmp_path / str(number)}", *small, *changes]
        trainer = build_trainer(load_config(config, "train", options))
        trainer.engine.model.train()
        for _ in range(3):
            trainer.optimizer_step()
        weights.append(dict(trainer.model.state_dict()))
    # Pixels are cached unchanged, and features come from a table, so the runs are equal to the bit.
    assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert weights[0]["null_mask"].sum() == 2  # the empty caption's two special tokens
    with pytest.raises(ValueError, match="text_encoder needs .*'max_length': 16.*got .*'max_length': 12"):
        build_trainer(
            load_config(config, "train", [*options, "text_encoder.max_length=12", "model.text_length=12"])
        )
    whole = files(tmp_path / "cache")
    (tmp_path / "cache" / "null_text.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"null_text.safetensors is missing or damaged"):
        build_trainer(load_config(config, "train", options))
    # The same command again repairs it, as it repairs shards.
    assert tool.main(["-c", config, "--out", str(tmp_path / "cache"), *small]) == 0
    assert files(tmp_path / "cache") == whole


def test_of_several_captions_the_cache_gives_the_one_that_the_dataset_draws(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("one", "two red", "a green thing")
    annotations = []
    for i in range(NUM_IMAGES):
        Image.new("RGB", (40, 32), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
        annotations += [{"image_id": i, "caption": f"{i} {text}"} for text in words[: 1 + i % 3]]
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(NUM_IMAGES)]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    config = "configs/text_to_image/emoji_pixart.yaml"
    dataset = f"{{type: ImageCaptions, captions_file: {tmp_path / 'coco.json'}, random_flip: true}}"
    options = ["--out", str(tmp_path / "cache"), "--flip", "--batch-size", "4", "--shard-size", "8"]
    assert tool.main(["-c", config, *options, f"data.dataset={dataset}"]) == 0
    overrides = [line.strip() for line in capsys.readouterr().out.splitlines()[-2:]]
    experiments = [load_config(config, "train", given) for given in ([f"data.dataset={dataset}"], overrides)]
    encoder = build_text_encoder(experiments[0], torch.device("cpu"))
    assert encoder is not None
    live, cached = (ResumableLoader(build_dataset(each), batch_size=4, seed=3) for each in experiments)
    seen: set[str] = set()
    for _ in range(8):
        one, other = next(live), next(cached)
        assert torch.equal(other["latent_mean"], one["image"])
        expected = encoder.encode(one["caption"])
        # The encoder's last bits depend on the other captions of the batch.
        assert_close(other["text_tokens"], expected["tokens"], atol=1e-5, rtol=1e-5)
        assert torch.equal(other["text_mask"], expected["mask"])
        seen.update(one["caption"])
    # In four epochs some image gets more than one of its captions.
    assert len(seen) > NUM_IMAGES


def test_last_bits_of_the_empty_captions_features_make_no_other_cache(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (32, 32), (20, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "c.csv").write_text("path,text\na.png,a red thing\n")
    dataset = f"{{type: ImageCaptions, captions_file: {tmp_path / 'c.csv'}}}"
    command = ["-c", "configs/text_to_image/emoji_pixart.yaml", "--out", str(tmp_path / "cache")]
    command.append(f"data.dataset={dataset}")
    assert tool.main(command) == 0
    before, encode = files(tmp_path / "cache"), TextEncoder.encode

    def scaled(factor: float) -> None:
        def encode_scaled(self: TextEncoder, captions: list[str]) -> dict[str, torch.Tensor]:
            features = encode(self, captions)
            return {**features, "tokens": factor * features["tokens"]}

        monkeypatch.setattr(TextEncoder, "encode", encode_scaled)

    scaled(1 + 1e-5)
    assert tool.main(command) == 0
    assert files(tmp_path / "cache") == before
    # Another encoder needs another cache, as before.
    scaled(-1.0)
    assert tool.main(command) == 2
    assert "made from something else: null_text_sha256 was" in capsys.readouterr().err
    assert files(tmp_path / "cache") == before
