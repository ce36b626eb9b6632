import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from speedit_plugins.trainer.evaluation.neighbors import Manifolds, manifolds, neighbor_distances


def normal(count: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + shift


def one_by_one(samples: Tensor, reference: Tensor, k: int, density_k: int) -> Manifolds:
    """The definitions, computed image by image."""
    fake, real = samples.double().numpy(), reference.double().numpy()

    def radius(points: np.ndarray, index: int, neighbors: int) -> float:
        others = [float(np.linalg.norm(points[index] - p)) for i, p in enumerate(points) if i != index]
        return sorted(others)[neighbors - 1]

    def inside(point: np.ndarray, centres: np.ndarray, radii: list[float]) -> list[bool]:
        return [bool(np.linalg.norm(point - c) <= r) for c, r in zip(centres, radii, strict=True)]

    real_k = [radius(real, i, k) for i in range(len(real))]
    fake_k = [radius(fake, i, k) for i in range(len(fake))]
    real_d = [radius(real, i, density_k) for i in range(len(real))]
    around = [inside(point, real, real_d) for point in fake]
    return Manifolds(
        precision=float(np.mean([any(inside(point, real, real_k)) for point in fake])),
        recall=float(np.mean([any(inside(point, fake, fake_k)) for point in real])),
        density=float(np.sum(around) / (density_k * len(fake))),
        coverage=float(np.mean(np.any(around, axis=0))),
    )


@given(
    num_samples=st.integers(6, 20),
    num_reference=st.integers(6, 20),
    dim=st.integers(1, 6),
    shift=st.sampled_from([0.0, 1.0, 3.0]),
    chunk=st.integers(1, 25),
    seed=st.integers(0, 10**6),
)
def test_metrics_match_their_definitions_for_any_chunk_size(
    num_samples: int, num_reference: int, dim: int, shift: float, chunk: int, seed: int
) -> None:
    samples, reference = normal(num_samples, dim, seed, shift), normal(num_reference, dim, seed + 1)
    expected = one_by_one(samples, reference, 3, 5)
    # Counts are equal exactly: with continuous features, no distance ties with a radius.
    got = manifolds(samples, reference, chunk=chunk)
    assert got.precision == pytest.approx(expected.precision, abs=1e-12)
    assert got.recall == pytest.approx(expected.recall, abs=1e-12)
    assert got.density == pytest.approx(expected.density, abs=1e-12)
    assert got.coverage == pytest.approx(expected.coverage, abs=1e-12)


def test_precision_and_density_use_their_own_k() -> None:
    samples, reference = normal(30, 3, 0), normal(25, 3, 1)
    got = manifolds(samples, reference, precision_neighbors=2, density_neighbors=7)
    assert got == one_by_one(samples, reference, 2, 7)


def test_the_reference_itself_has_full_precision_recall_and_coverage() -> None:
    reference = normal(50, 8, 0, shift=1e3)
    got = manifolds(reference, reference)
    assert (got.precision, got.recall, got.coverage) == (1.0, 1.0, 1.0)
    # Each image is inside its own ball and, on average, inside k others, as each ball contains k others.
    assert got.density == pytest.approx((5 + 1) / 5)


def test_distant_sets_score_zero() -> None:
    got = manifolds(normal(20, 4, 0), normal(20, 4, 1, shift=1e4))
    assert got == Manifolds(0.0, 0.0, 0.0, 0.0)


def test_one_repeated_image_has_high_precision_but_low_recall_and_coverage() -> None:
    reference = normal(100, 4, 0)
    got = manifolds(reference[:1].repeat(60, 1), reference)
    # All samples equal one reference image, and their own balls have radius 0.
    assert got.precision == 1.0
    assert got.recall == 1 / 100
    # It covers itself and the images that have it among their five nearest neighbours.
    centre = reference[0].double()
    distances = torch.cdist(reference.double(), reference.double())
    fifth = distances.sort(dim=1).values[:, 5]
    assert got.coverage == float(((reference.double() - centre).norm(dim=1) <= fifth).double().mean())


def test_neighbours_on_a_line() -> None:
    # The points 0, 1, 3, 7 have their nearest neighbours at distances 1, 1, 2, 4, the second at 3, 2, 3, 6.
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    first, second = neighbor_distances(line, [1, 2], centre=torch.zeros(1).double(), chunk=3)
    assert first.tolist() == [1.0, 1.0, 4.0, 16.0]
    assert second.tolist() == [9.0, 4.0, 9.0, 36.0]


def test_unusable_features_and_numbers_are_refused() -> None:
    samples, reference = normal(10, 3, 0), normal(6, 3, 1)
    with pytest.raises(ValueError, match=r"must both be \(N, D\), got \(10, 3\) and \(6, 2\)"):
        manifolds(samples, reference[:, :2])
    with pytest.raises(ValueError, match="must be finite, got NaN or infinity in"):
        manifolds(samples / 0.0, reference)
    with pytest.raises(
        ValueError, match=r"density_neighbors must be in \[1, 6\) for 10 samples .* of 6, got 6"
    ):
        manifolds(samples, reference, density_neighbors=6)
    with pytest.raises(ValueError, match=r"precision_neighbors must be in \[1, 3\)"):
        manifolds(samples[:3], reference)
