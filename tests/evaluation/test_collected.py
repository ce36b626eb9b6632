from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from speedit_plugins.trainer.evaluation.collected import (
    FeatureMoments,
    collect,
    load_collected,
    save_collected,
)
from speedit_plugins.trainer.evaluation.features import Pixels, Readings

EVERYTHING = ("gaussian", "spatial", "features", "probabilities")


class Network:
    """An extractor whose features, spatial features and classes are simple functions of the pixels."""

    name = "network"

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1).float()

    def read(self, images: Tensor, *, spatial: bool, probabilities: bool) -> Readings:
        values = self(images)
        return Readings(
            values, values[:, :3] if spatial else None, values.softmax(1) if probabilities else None
        )


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("batch_size", [1, 7, 300, 5000])
def test_the_batch_size_does_not_change_the_statistics(batch_size: int) -> None:
    images = noise(2300, 2, 3, 1)
    got = collect(images.split(batch_size), Network(), num_samples=2300, kinds=EVERYTHING)
    values = images.flatten(1).double().numpy()
    assert got.gaussian is not None
    assert got.spatial is not None
    for gaussian, part in ((got.gaussian, values), (got.spatial, values[:, :3])):
        assert gaussian.num_samples == 2300
        np.testing.assert_allclose(gaussian.mean, part.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(gaussian.covariance, np.cov(part, rowvar=False), rtol=1e-9, atol=1e-6)
    assert torch.equal(got.features, images.flatten(1).float())
    assert torch.equal(got.probabilities, images.flatten(1).float().softmax(1))
    assert got.features.dtype == torch.float32


def test_only_requested_kinds_are_kept() -> None:
    got = collect([noise(10, 2, 2, 1)], Pixels(), num_samples=10, kinds=("gaussian",))
    assert (got.spatial, got.features, got.probabilities) == (None, None, None)


def test_one_batch_is_held_at_a_time() -> None:
    alive: list[int] = []

    class Counted:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    most = []

    def batches() -> object:
        for _ in range(5):
            batch = noise(4, 2, 2, 1)
            batch.counted = Counted()  # type: ignore[attr-defined]  # dies with the batch
            most.append(len(alive))
            yield batch

    collect(batches(), Pixels(), num_samples=20, kinds=("gaussian", "features"))  # type: ignore[arg-type]  # a generator
    # The new batch, and the previous one that the loop variable still refers to.
    assert max(most) <= 2


def test_too_many_features_for_a_covariance_are_refused() -> None:
    images = noise(2, 64, 65, 1)
    with pytest.raises(ValueError, match=r"'pixels' have 4160 dimensions, wanted at most 4096"):
        collect([images], Pixels(), num_samples=2, kinds=("gaussian",))
    assert collect([images], Pixels(), num_samples=2, kinds=("features",)).features is not None


class TestFile:
    def test_saved_statistics_are_read_back_unchanged(self, tmp_path: Path) -> None:
        path = tmp_path / "reference.safetensors"
        images = noise(50, 2, 3, 1)
        written = collect(images.split(8), Network(), num_samples=50, kinds=EVERYTHING)
        save_collected(path, written, features="network", fingerprint="abc")
        read = load_collected(path, features="network", fingerprint="abc", kinds=EVERYTHING)
        for kind in EVERYTHING:
            first, second = getattr(written, kind), getattr(read, kind)
            if isinstance(first, FeatureMoments):
                assert torch.equal(first.mean, second.mean)
                assert torch.equal(first.covariance, second.covariance)
                assert first.num_samples == second.num_samples
            else:
                assert torch.equal(first, second)
        assert [file.name for file in tmp_path.iterdir()] == ["reference.safetensors"]

    def test_other_features_and_other_images_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "reference.safetensors"
        written = collect([noise(5, 2, 2, 1)], Pixels(), num_samples=5, kinds=("gaussian",))
        save_collected(path, written, features="pixels", fingerprint="abc")
        with pytest.raises(
            ValueError, match=r"statistics of other features: features 'pixels', wanted 'pixels@8'"
        ):
            load_collected(path, features="pixels@8", fingerprint="abc", kinds=("gaussian",))
        with pytest.raises(ValueError, match=r"statistics of other images: fingerprint 'abc', wanted 'abd'"):
            load_collected(path, features="pixels", fingerprint="abd", kinds=("gaussian",))
        with pytest.raises(ValueError, match="written for other metrics and has no features; delete it"):
            load_collected(path, features="pixels", fingerprint="abc", kinds=("features",))
        path.write_bytes(b"damaged")
        with pytest.raises(ValueError, match="is damaged or not a file of reference statistics"):
            load_collected(path, features="pixels", fingerprint="abc", kinds=("gaussian",))
