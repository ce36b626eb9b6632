import math
import os
import sys
from itertools import permutations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.trainer.evaluation.shapes import (
    ShapeScores,
    chamfer_distances,
    earth_mover_distances,
    scores_of,
    shape_scores,
)


def clouds(number: int, points: int, seed: int = 0) -> Tensor:
    return torch.randn(number, 3, points, generator=torch.Generator().manual_seed(seed))


def line(*positions: float) -> Tensor:
    """Clouds of one point each, at these places of the x axis."""
    return torch.tensor([[[place], [0.0], [0.0]] for place in positions])


def squared(first: Tensor, second: Tensor) -> list[list[float]]:
    """Squared distances of the points of two clouds, one by one."""
    return [[float((p.double() - q.double()).square().sum()) for q in second.T] for p in first.T]


def test_chamfer_is_the_mean_squared_distance_to_the_nearest_point_both_ways() -> None:
    first, second = clouds(3, 7), clouds(2, 5, seed=1)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table = squared(one, other)
            forth = sum(map(min, table)) / 7
            back = sum(map(min, zip(*table, strict=True))) / 5
            expected[i, j] = forth + back
    assert_close(chamfer_distances(first, second), expected, rtol=1e-9, atol=0)
    own = chamfer_distances(first, first)
    assert_close(own, chamfer_distances(first, first.clone()), rtol=0, atol=0)
    assert own.diagonal().abs().max() == 0
    # One point at 0, and two at 1 and 3: 1 one way, (1 + 9) / 2 the other.
    apart = torch.tensor([[[1.0, 3.0], [0, 0], [0, 0]]])
    assert chamfer_distances(line(0.0), apart).item() == 1 + 5


def test_earth_mover_is_the_best_of_all_matchings() -> None:
    first, second = clouds(3, 5), clouds(2, 5, seed=1)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table = squared(one, other)
            costs = [
                sum(math.sqrt(table[p][q]) for p, q in enumerate(order)) for order in permutations(range(5))
            ]
            expected[i, j] = min(costs) / 5
    assert_close(earth_mover_distances(first, second), expected, rtol=1e-9, atol=0)
    assert_close(earth_mover_distances(first, first), earth_mover_distances(first, first.clone()))
    # Moving a cloud as a whole costs the length of the move.
    moved = first + torch.tensor([3.0, 0.0, 4.0])[:, None]
    assert_close(earth_mover_distances(first, moved).diagonal().tolist(), [5.0] * 3, rtol=1e-6, atol=0)


def test_scores_of_a_case_worked_by_hand() -> None:
    # Chamfer distances of single points are twice their squared distances.
    samples, reference = line(0.0, 1.0, 10.0), line(0.75, 2.5, 2.75)
    found = shape_scores(samples, reference)
    # The nearest sample is 1 for each of the reference.
    assert_close(found.mmd, 2 * (0.25**2 + 1.5**2 + 1.75**2) / 3)
    # 0 and 1 go to 0.75, 10 goes to 2.75; 2.5 is nobody's.
    assert_close(found.coverage, 2 / 3)
    # 0 and 1 are nearest to 0.75, 10 to 2.75, 0.75 to 1: all foreign. 2.5 and 2.75 have each other.
    assert_close(found.one_nn_accuracy, 2 / 6)
    assert_close(shape_scores(samples, reference, distance="earth_mover").mmd, (0.25 + 1.5 + 1.75) / 3)


def test_copies_have_distance_0_full_coverage_and_accuracy_0() -> None:
    samples = clouds(6, 20)
    assert shape_scores(samples, samples[[3, 1, 0, 2, 5, 4]]) == ShapeScores(0.0, 1.0, 0.0)


def test_one_sample_repeated_covers_one_shape_and_is_told_apart() -> None:
    reference = clouds(8, 20)
    found = shape_scores(reference[:1].repeat(8, 1, 1), reference)
    assert found.coverage == 1 / 8
    assert chamfer_distances(reference, reference)[0].mean().item() == pytest.approx(found.mmd)
    # Each copy has 7 others and the original at distance 0: half. The original has copies nearest. The others
    # are nearer to each other or to the copies, as the distances say.
    own = chamfer_distances(reference, reference).fill_diagonal_(torch.inf)
    others = (own[1:, 1:].amin(dim=1) < own[1:, 0]).double().sum()
    assert_close(found.one_nn_accuracy, float((8 * 0.5 + others) / 16))


def test_two_halves_of_one_set_cannot_be_told_apart_and_other_shapes_can() -> None:
    accuracies = []
    for seed in range(40):
        # Spheres of random sizes: sets in one dimension, so that neighbours are near.
        generator = torch.Generator().manual_seed(seed)
        points = torch.nn.functional.normalize(torch.randn(1, 3, 64, generator=generator), dim=1)
        spheres = points * (1 + torch.rand(24, 1, 1, generator=generator))
        accuracies.append(shape_scores(spheres[:12], spheres[12:]).one_nn_accuracy)
    # Under exchangeable labels the chance is 11 / 23; a run's deviation is below 0.5 / sqrt(24 / 2), since
    # neighbours come in pairs at most. 4 sigma of 40 runs is 0.09.
    assert_close(sum(accuracies) / 40, 11 / 23, atol=0.09, rtol=0)
    far = shape_scores(clouds(8, 32), clouds(8, 32, seed=1) + 9)
    assert (far.one_nn_accuracy, far.mmd > 100) == (1.0, True)


def test_progress_counts_the_work() -> None:
    steps: list[int] = []
    shape_scores(clouds(3, 4), clouds(3, 4, seed=1), progress=steps.append)
    assert sum(steps) == 3 + 6 + 3
    steps.clear()
    shape_scores(clouds(3, 4), clouds(3, 4, seed=1), distance="earth_mover", progress=steps.append)
    assert sum(steps) == 3 + 9 + 3


def test_what_cannot_be_compared_is_refused() -> None:
    good = clouds(3, 4)
    broken = good.clone()
    broken[2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="cloud 2 of the second set has points that are NaN"):
        chamfer_distances(good, broken)
    with pytest.raises(ValueError, match=r"must be \(M, 3, N\), got \(3, 4, 3\) for the first set"):
        chamfer_distances(good.mT, good)
    with pytest.raises(ValueError, match="at most 2048, got 2049 and 2049; take fewer"):
        earth_mover_distances(torch.zeros(1, 3, 2049), torch.zeros(1, 3, 2049))
    with pytest.raises(ValueError, match="same number of points, .* got 4 and 5"):
        earth_mover_distances(good, clouds(3, 5))
    with pytest.raises(ValueError, match="the same size, .* got 3 samples and 2 of the reference"):
        shape_scores(good, good[:2])
    with pytest.raises(ValueError, match="at least 2 shapes each, got 1 samples and 1"):
        scores_of(*(torch.zeros(1, 1) for _ in range(3)))
    with pytest.raises(ValueError, match="unknown distance 'cd'; known: chamfer, earth_mover"):
        shape_scores(good, good, distance="cd")


@pytest.mark.hosts
def test_distances_and_scores_are_those_of_pointflow(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(os.environ.get("SPEEDIT_HOSTS") or "") / "stevenygd+PointFlow/metrics/evaluation_metrics.py"
    if not os.environ.get("SPEEDIT_HOSTS") or not source.is_file():
        pytest.skip("needs $SPEEDIT_HOSTS with a checkout stevenygd+PointFlow")
    # Without its CUDA extension it falls back to its own exact distances.
    host: dict[str, Any] = {"__name__": "metrics.evaluation_metrics", "__package__": "metrics"}
    monkeypatch.setitem(sys.modules, "metrics", ModuleType("metrics"))
    exec(compile(source.read_text(), str(source), "exec"), host)
    samples, reference = clouds(7, 24), clouds(7, 24, seed=1) * 1.2
    theirs = host["compute_all_metrics"](samples.mT, reference.mT, batch_size=3)
    for distance, name in (("chamfer", "CD"), ("earth_mover", "EMD")):
        ours = shape_scores(samples, reference, distance=distance)
        assert_close(ours.mmd, float(theirs[f"lgan_mmd-{name}"]), rtol=1e-5, atol=0)
        assert_close(ours.coverage, float(theirs[f"lgan_cov-{name}"]), rtol=1e-5, atol=0)
        assert_close(ours.one_nn_accuracy, float(theirs[f"1-NN-{name}-acc"]), rtol=1e-5, atol=0)
