"""The data sets of the benchmark of flows, made from a few images of their kinds."""

import gzip
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.testing import assert_close

Load = Callable[[str], ModuleType]


@pytest.fixture
def folder(load: Load, tmp_path: Path) -> Path:
    """A data folder with 40 images of each kind, and an autoencoder after one step."""
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (40, 28, 28)), np.arange(40) % 10
    for name, kind, values in (("images-idx3", 3, images), ("labels-idx1", 1, labels)):
        header = bytes([0, 0, 8, kind]) + np.array(values.shape, dtype=">i4").tobytes()
        path = tmp_path / f"train-{name}-ubyte.gz"
        path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))
    for vendor in load("flow.sets").VENDORS:
        drawn = random.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"emoji_{vendor}_32.npz", images=drawn)
    shown = torch.cat([load("flow.sets").emoji(tmp_path, vendor, 32) for vendor in ("twitter", "google")])
    load("flow.small_autoencoder").train(shown, tmp_path / "autoencoder", 1, 1e-6, batch_size=4)
    return tmp_path


def test_each_set_has_data_and_spaces_for_its_samples(load: Load, folder: Path) -> None:
    sets = load("flow.sets")
    shapes = {
        "digits_8": (1, 8, 8),
        "fashion_16": (1, 16, 16),
        "fashion_32": (1, 32, 32),
        "emoji_google_16": (3, 16, 16),
        "latents": (4, 8, 8),
        "feature_maps": (80, 4, 4),
        "fashion_16_lora": (1, 16, 16),
    }
    for name, shape in shapes.items():
        found = sets.load_flow_set(name, folder)
        assert found.data.images.shape[1:] == shape
        # The model has whole patches.
        assert shape[-1] % found.shape.patch_size == 0
        for space in found.spaces.values():
            features = space(found.data.images[:3])
            assert features.shape[0] == 3
            # Fewer features than the samples of a distance.
            assert features.shape[1] <= 192
            assert features.isfinite().all()
        if name == "feature_maps":
            channels = found.data.images.transpose(0, 1).flatten(1)
            assert_close(channels.mean(1), torch.zeros(80), atol=1e-4, rtol=0)
            assert_close(channels.std(1), torch.ones(80), atol=1e-4, rtol=0)
        if name == "latents":
            channels = found.data.images.transpose(0, 1).flatten(1)
            assert_close(channels.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
            assert_close(channels.std(1), torch.ones(4), atol=1e-4, rtol=0)
        if name == "fashion_16_lora":
            assert set(found.data.labels.tolist()) == {5, 6, 7, 8, 9}
            assert set(found.start.data.labels.tolist()) == {0, 1, 2, 3, 4}


def test_images_keep_their_size_and_their_frame(load: Load, folder: Path) -> None:
    sets = load("flow.sets")
    framed, plain = (
        sets.fashion(folder, 32).images,
        load("image_sets").load_image_set(str(folder / "train-images-idx3-ubyte.gz"), 28).images,
    )
    assert torch.equal(framed[:, :, 2:-2, 2:-2], plain)
    assert (framed[:, :, :2] == -1).all()


def test_a_file_that_is_not_there_is_named(load: Load, tmp_path: Path) -> None:
    for name, file in (("fashion_8", "train-images-idx3-ubyte.gz"), ("latents", "autoencoder")):
        with pytest.raises(ValueError, match=f"--data-dir needs {file}, got .*flow/sets.py says how"):
            load("flow.sets").load_flow_set(name, tmp_path)
