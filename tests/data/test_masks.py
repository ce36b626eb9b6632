import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speedit_plugins.registry import MASKS, build
from speedit_plugins.trainer.data.images.masks import RandomMasks


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(seed=st.integers(0, 10_000), height=st.integers(1, 40), width=st.integers(1, 40))
def test_a_mask_has_zeros_and_ones_and_a_hole(seed: int, height: int, width: int) -> None:
    mask = RandomMasks().draw(height, width, generator(seed))
    assert mask.shape == (height, width)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert mask.any()


@given(seed=st.integers(0, 1000))
def test_a_box_is_a_rectangle_within_box_share(seed: int) -> None:
    mask = build(MASKS, {"type": "RandomMasks", "box_prob": 1.0, "box_share": (0.25, 0.5)}).draw(
        40, 20, generator(seed)
    )
    rows, columns = (int(mask.amax(axis).sum()) for axis in (1, 0))
    assert mask.sum() == rows * columns
    assert 10 <= rows <= 20
    assert 5 <= columns <= 10


def fits(centres: torch.Tensor, radius: int, hole: torch.Tensor, *, margin: int = 0) -> bool:
    """Whether a disc around one of the centres is inside the hole, ignoring parts outside the image."""
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in hole.shape), indexing="ij")
    return any(
        bool(hole[(rows - row) ** 2 + (columns - column) ** 2 <= radius**2].all())
        for row, column in (centres.nonzero() + margin).tolist()
    )


def test_strokes_are_as_wide_as_the_brush() -> None:
    masks = RandomMasks(box_prob=0.0, num_strokes=1, brush_share=(0.2, 0.2))
    for seed in range(20):
        hole = masks.draw(64, 64, generator(seed)).bool()
        # The hole is a segment with round ends of radius 6.4. A disc of radius 8 does not fit. A disc of
        # radius 5 does: some pixel centre is within sqrt(1/2) of the segment, and 5 + sqrt(1/2) < 6.4.
        assert not fits(hole[8:-8, 8:-8], 8, hole, margin=8)
        assert fits(hole, 5, hole)


def test_a_mask_depends_only_on_the_generator() -> None:
    masks = RandomMasks()
    first, second, other = (masks.draw(16, 16, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box_prob": 2.0}, "needs box_prob in .0, 1., got 2.0"),
        ({"box_share": (0.5, 0.25)}, "needs box_share = .*0 < low <= high <= 1, got .0.5, 0.25"),
        ({"brush_share": (0.0, 0.25)}, "needs brush_share = .*0 < low <= high <= 1, got .0.0, 0.25"),
        ({"box_share": [0.5]}, "needs box_share = .low, high. with .*, got .0.5."),
        ({"brush_share": 0.1}, "needs brush_share = .low, high. with .*, got 0.1"),
        ({"num_strokes": 0}, "needs num_strokes >= 1, got 0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(MASKS, {"type": "RandomMasks", **options})
