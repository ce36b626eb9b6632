import pytest
import torch
from torch import Tensor

from speedit_plugins.trainer.data.shapes.solid_digits import SolidDigits
from speedit_plugins.trainer.evaluation.shape_classifier import ShapeClassifier, frechet_shape_distance


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loaded(indices: range, **options: int) -> tuple[Tensor, Tensor]:
    data = SolidDigits(**options)
    samples = [data.load(index, generator(index)) for index in indices]
    shapes = torch.stack([sample.get("voxels", sample.get("points")) for sample in samples])
    return shapes, torch.tensor([sample["label"] for sample in samples])


@pytest.fixture(scope="module", params=[{}, {"num_points": 256}], ids=["voxels", "points"])
def trained(request: pytest.FixtureRequest) -> tuple[ShapeClassifier, Tensor, Tensor]:
    """A classifier, and 200 shapes with labels that it has not seen."""
    return ShapeClassifier(*loaded(range(500), **request.param), epochs=8), *loaded(
        range(900, 1100), **request.param
    )


def test_it_knows_digits_that_it_has_not_seen(trained: tuple[ShapeClassifier, Tensor, Tensor]) -> None:
    classifier, shapes, labels = trained
    # Chance is 0.1, and 4 sigma of 200 guesses above it 0.19.
    assert (classifier.classify(shapes) == labels).double().mean() > 0.5
    assert classifier.accuracy > 0.5
    assert classifier(shapes[:3]).shape == (3, 32)


def test_the_distance_is_0_to_itself_and_rises_with_noise_and_with_missing_classes(
    trained: tuple[ShapeClassifier, Tensor, Tensor],
) -> None:
    classifier, shapes, labels = trained
    # The two factors of a covariance of these features, up to rounding in float64.
    spread = float(classifier(shapes).double().square().sum())
    assert frechet_shape_distance(classifier, shapes, shapes.flip(0)) < 1e-9 * spread
    noise = torch.randn(shapes.shape, generator=generator())
    steps = [frechet_shape_distance(classifier, shapes + level * noise, shapes) for level in (0.1, 0.3, 0.9)]
    assert 0 < steps[0] < steps[1] < steps[2]
    half = torch.randperm(200, generator=generator())
    same = frechet_shape_distance(classifier, shapes[half[:100]], shapes[half[100:]])
    few = frechet_shape_distance(classifier, shapes[labels < 5], shapes[labels >= 5])
    assert same < few


def test_equal_arguments_give_equal_features_and_leave_the_global_state_alone() -> None:
    shapes, labels = loaded(range(60), voxel_size=8)
    state = torch.get_rng_state()
    with torch.inference_mode():
        first, second, other = (ShapeClassifier(shapes, labels, epochs=1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first(shapes), second(shapes))
    assert not torch.equal(first(shapes), other(shapes))


def test_points_count_in_cells_of_the_box_of_the_training() -> None:
    # Ends of the box at 0 and 16, so that a cell is a unit cube.
    corners = torch.tensor([[0.0, 16.0], [0.0, 16.0], [0.0, 16.0]])
    classifier = ShapeClassifier(corners.repeat(10, 1, 1), torch.arange(10) % 2, epochs=1)
    grid = classifier._grids(torch.tensor([[[3.5, 3.2, 99.0], [0.1, 0.9, 5.0], [15.5, 15.1, -7.0]]]))
    found = (grid[0, 0] * 3 / 16**2).round().long()
    assert found.sum() == 3
    assert found[3, 0, 15] == 2
    assert found[15, 5, 0] == 1


def test_what_it_cannot_take_is_refused() -> None:
    shapes, labels = loaded(range(20), voxel_size=8)
    classifier = ShapeClassifier(shapes, labels, epochs=1)
    with pytest.raises(ValueError, match="at least 10 shapes with labels .* got 20 shapes and labels"):
        ShapeClassifier(shapes, labels[:5])
    with pytest.raises(ValueError, match=r"labels 0..K-1, K >= 2, .* got labels 0..0"):
        ShapeClassifier(shapes, torch.zeros(20, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"trained on shapes with 5 axes, got \(2, 3, 4\)"):
        classifier(torch.zeros(2, 3, 4))
    with pytest.raises(
        ValueError, match=r"solids \(S, 1, R, R, R\) or clouds \(S, 3, N\), got \(2, 3, 4, 4\)"
    ):
        classifier(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="finite"):
        classifier(torch.full((1, 1, 8, 8, 8), torch.nan))
