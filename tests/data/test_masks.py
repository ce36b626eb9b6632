import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speedit_plugins.registry import MASKS, build
from speedit_plugins.trainer.data.holes import IMAGE, VIDEO, VOXELS, draw_hole
from speedit_plugins.trainer.data.images.masks import RandomMasks
from speedit_plugins.trainer.data.videos.frame_masks import FrameMasks


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


@given(seed=st.integers(0, 1000), edge=st.integers(1, 12))
def test_a_hole_in_a_solid_is_a_box_or_tubes(seed: int, edge: int) -> None:
    box = RandomMasks(box_prob=1.0, box_share=(0.25, 0.5)).draw_solid((edge,) * 3, generator(seed))
    sides = [int(box.amax(others).sum()) for others in ((1, 2), (0, 2), (0, 1))]
    assert box.sum() == math.prod(sides)
    assert all(max(1, round(edge / 4)) <= side <= max(1, round(edge / 2)) for side in sides)
    tubes = RandomMasks(box_prob=0.0).draw_solid((edge,) * 3, generator(seed))
    assert tubes.shape == (edge,) * 3
    assert tubes.any()
    assert set(tubes.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("future", {"011111", "001111"}),
        ("past", {"111110", "111100"}),
        ("between", {"011110", "001100"}),
        ("scattered", {format(63 - kept, "06b") for kept in range(64) if kept.bit_count() in (1, 2)}),
    ],
)
def test_holes_in_time_leave_the_frames_of_their_way(way: str, expected: set[str]) -> None:
    masks = build(MASKS, {"type": "FrameMasks", "ways": [way], "given": [1, 2]})
    drawn = [masks.draw_frames(6, generator(seed)) for seed in range(200)]
    found = {"".join(str(int(value)) for value in mask) for mask in drawn}
    # Each of the at most 21 masks is missed by 200 draws with a probability below 1 in 1,000.
    assert found == expected
    assert torch.equal(masks.draw_frames(6, generator(3)), drawn[3])


def test_every_way_is_drawn_as_often() -> None:
    masks = FrameMasks(ways=("future", "past", "between", "scattered"), given=(1, 1))
    found = [tuple(masks.draw_frames(5, generator(seed)).tolist()) for seed in range(2000)]
    # 4 sigma of a binomial frequency of 1/4, and of the 1/20 that each scattered frame has.
    for mask, share in (((0, 1, 1, 1, 0), 0.25), ((0, 1, 1, 1, 1), 0.3), ((1, 1, 0, 1, 1), 0.05)):
        spread = 4 * math.sqrt(share * (1 - share) / 2000)
        assert found.count(mask) / 2000 == pytest.approx(share, abs=spread)


def test_a_hole_in_space_is_the_same_in_all_frames_and_one_in_time_takes_whole_frames() -> None:
    space = draw_hole(RandomMasks(), VIDEO, (3, 8, 6), generator(0))
    assert space.shape == (3, 8, 6)
    assert torch.equal(space, RandomMasks().draw(8, 6, generator(0)).expand(3, 8, 6))
    time = draw_hole(FrameMasks(ways=["future"]), VIDEO, (3, 2, 2), generator(0))
    assert time.flatten(1).tolist() == [[0] * 4, [1] * 4, [1] * 4]
    with pytest.raises(ValueError, match="FrameMasks makes no holes in images; wanted masks with draw"):
        draw_hole(FrameMasks(), IMAGE, (8, 8), generator(0))
    with pytest.raises(ValueError, match="FrameMasks makes no holes in voxels; wanted masks with draw_solid"):
        draw_hole(FrameMasks(), VOXELS, (8, 8, 8), generator(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": []}, "needs ways, each one of future, past, between, scattered, once, got"),
        ({"ways": "future"}, "needs ways, .* got 'future'"),
        ({"ways": ["future", "future"]}, "needs ways, .* got"),
        ({"ways": ["sideways"]}, "needs ways, .* got .'sideways'."),
        ({"given": [0, 1]}, "needs given = .low, high. with 1 <= low <= high, got .0, 1."),
        ({"given": [2, 1]}, "needs given"),
        ({"given": 2}, "needs given"),
    ],
)
def test_frames_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(MASKS, {"type": "FrameMasks", **options})


def test_masks_that_may_leave_no_frame_to_fill_are_refused() -> None:
    for ways, most in ((["future"], 3), (["future", "between"], 6)):
        masks = FrameMasks(ways=ways, given=(1, 3))
        assert masks.draw_frames(most + 1, generator(0)).any()
        with pytest.raises(ValueError, match=f"may give {most} frames, and needs videos of more, got {most}"):
            masks.draw_frames(most, generator(0))


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
