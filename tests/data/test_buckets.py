import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from speedit_plugins.trainer.data.buckets import checked_sides, nearest_buckets, usable_size, whole_batches
from speedit_plugins.trainer.data.images.fit import center_crop
from speedit_plugins.trainer.data.images.folder import ImageFolder
from speedit_plugins.trainer.data.images.pixels import read_rgb, read_size
from speedit_plugins.trainer.data.loader import ResumableLoader, epoch_order
from speedit_plugins.trainer.models.dit import DiT

SIDES = [[8, 16], [12, 12], [16, 8]]


class Shaped:
    """A dataset whose sample i has label i and an image with (bucket index + 1) columns."""

    def __init__(self, buckets: list[int]) -> None:
        self.size, self.buckets = len(buckets), torch.tensor(buckets)

    def __len__(self) -> int:
        return self.size

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        return {"image": torch.full((1, 1, int(self.buckets[index]) + 1), float(index)), "label": index}


def labels_of(loader: ResumableLoader, count: int) -> list[list[int]]:
    return [next(loader)["label"].tolist() for _ in range(count)]


numbers = st.lists(st.integers(0, 4), min_size=1, max_size=60)


class TestArrangement:
    @given(buckets=numbers, batch_size=st.integers(1, 7), seed=st.integers(0, 2**40))
    def test_batches_fill_up_in_the_order_of_the_epoch(
        self, buckets: list[int], batch_size: int, seed: int
    ) -> None:
        order = epoch_order(len(buckets), seed=seed, epoch=0)
        # The definition, sample by sample: a batch is emitted when its bucket has enough samples.
        waiting: dict[int, list[int]] = {}
        expected: list[int] = []
        for index in order.tolist():
            queue = waiting.setdefault(buckets[index], [])
            queue.append(index)
            if len(queue) == batch_size:
                expected += queue
                queue.clear()
        arranged = whole_batches(order, torch.tensor(buckets), batch_size=batch_size)
        assert arranged.tolist() == expected
        assert usable_size(torch.tensor(buckets), batch_size=batch_size) == len(expected)

    def test_one_bucket_keeps_the_epochs_order(self) -> None:
        order = epoch_order(11, seed=3, epoch=2)
        assert torch.equal(whole_batches(order, torch.zeros(11, dtype=torch.int64), batch_size=4), order[:8])

    @settings(max_examples=50)
    @given(data=st.data(), buckets=numbers, seed=st.integers(0, 2**40))
    def test_nothing_is_lost_or_repeated_when_the_number_of_ranks_changes(
        self, data: st.DataObject, buckets: list[int], seed: int
    ) -> None:
        worlds = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
        largest = max(buckets.count(number) for number in buckets)
        batch_size = math.lcm(*worlds) * data.draw(st.integers(1, 3))
        if largest < batch_size:
            with pytest.raises(ValueError, match=f"at least batch_size = {batch_size} samples"):
                ResumableLoader(Shaped(buckets), batch_size=batch_size)
            return

        def ranks(world_size: int) -> list[ResumableLoader]:
            return [
                ResumableLoader(
                    Shaped(buckets), batch_size=batch_size, seed=seed, rank=rank, world_size=world_size
                )
                for rank in range(world_size)
            ]

        def together(loaders: list[ResumableLoader], count: int) -> list[list[int]]:
            return [sum(row, []) for row in zip(*(labels_of(each, count) for each in loaders), strict=True)]

        first, second = ranks(worlds[0]), ranks(worlds[1])
        per_epoch = first[0].batches_per_epoch
        cut, total = data.draw(st.integers(0, per_epoch + 1)), 2 * per_epoch
        head = together(first, min(cut, total))
        for loader in second:
            loader.load_state_dict(data.draw(st.sampled_from(first)).state_dict())
        batches = head + together(second, total - len(head))
        assert all(len({buckets[index] for index in batch}) == 1 for batch in batches)
        for epoch in range(2):
            order = epoch_order(len(buckets), seed=seed, epoch=epoch)
            wanted = whole_batches(order, torch.tensor(buckets), batch_size=batch_size).tolist()
            assert sum(batches[epoch * per_epoch : (epoch + 1) * per_epoch], []) == wanted

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_a_batch_stacks_samples_of_one_shape(self, num_workers: int) -> None:
        loader = ResumableLoader(Shaped([0, 1] * 5), batch_size=2, num_workers=num_workers)
        batches = [next(loader) for _ in range(loader.batches_per_epoch)]
        # Five samples in each of two buckets make two batches each; the fifth is dropped.
        assert sorted(batch["image"].shape[-1] for batch in batches) == [1, 1, 2, 2]
        assert loader.epoch == 1
        loader.close()


class TestPosition:
    def test_another_batch_size_or_other_buckets_are_refused_within_an_epoch(self) -> None:
        loader = ResumableLoader(Shaped([0, 1] * 4), batch_size=2)
        next(loader)
        state = loader.state_dict()
        with pytest.raises(ValueError, match="an epoch with buckets and batch_size 2, got batch_size 4"):
            ResumableLoader(Shaped([0, 1] * 4), batch_size=4).load_state_dict(state)
        with pytest.raises(ValueError, match="in the middle of an epoch with buckets and buckets_crc32"):
            ResumableLoader(Shaped([1, 0] * 4), batch_size=2).load_state_dict(state)
        with pytest.raises(ValueError, match="an offset that is a multiple of the batch size 2, got 3"):
            loader.load_state_dict({**state, "offset": 3})
        with pytest.raises(ValueError, match="offset <= 8, got 10"):
            loader.load_state_dict({**state, "offset": 10})
        with pytest.raises(ValueError, match=r"needs the keys \['epoch', 'offset', 'seed', 'size'\]"):
            ResumableLoader([{}] * 8, batch_size=2).load_state_dict(state)
        assert loader.state_dict() == state

    def test_other_buckets_are_accepted_at_the_start_of_the_next_epoch(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        loader = ResumableLoader(Shaped([0, 1] * 4), batch_size=2)
        next(loader)
        changed = ResumableLoader(Shaped([1, 0] * 4), batch_size=2, accept_changed=True)
        changed.load_state_dict(loader.state_dict())
        assert (changed.epoch, changed.state_dict()["offset"]) == (1, 0)
        assert "samples are in other buckets or chunks: going on with epoch 1" in capsys.readouterr().out

    def test_batch_size_and_buckets_may_change_at_the_start_of_an_epoch(self) -> None:
        loader = ResumableLoader(Shaped([0, 1] * 4), batch_size=2)
        labels_of(loader, 4)
        other = ResumableLoader(Shaped([0] * 8), batch_size=4)
        other.load_state_dict(loader.state_dict())
        assert sum(labels_of(other, 2), []) == epoch_order(8, seed=0, epoch=1).tolist()

    def test_without_buckets_the_state_has_no_entries_for_them(self) -> None:
        dataset = Shaped([0] * 4)
        dataset.buckets = None
        assert set(ResumableLoader(dataset, batch_size=2).state_dict()) == {"seed", "epoch", "offset", "size"}

    @pytest.mark.parametrize(
        "buckets", [torch.zeros(3, dtype=torch.int64), torch.zeros(4), torch.zeros(4, 1, dtype=torch.int64)]
    )
    def test_buckets_of_another_shape_or_type_are_refused(self, buckets: Tensor) -> None:
        dataset = Shaped([0] * 4)
        dataset.buckets = buckets
        with pytest.raises(ValueError, match=r"needs buckets int64 of shape \(4,\), got torch"):
            ResumableLoader(dataset, batch_size=2)


def save(path: Path, height: int, width: int, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The left half is dark, the right half bright.
    image = Image.new("RGB", (width, height), (40, 40, 40))
    image.paste((200, 200, 200), (width // 2, 0, width, height))
    image.save(path, **options)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four images, each in its own class: a wide, b square, c tall, d wide."""
    for name, sides in {"a": (20, 40), "b": (31, 30), "c": (64, 33), "d": (8, 17)}.items():
        save(tmp_path / name / "0.png", *sides)
    return tmp_path


def load(folder: ImageFolder, index: int) -> dict[str, Any]:
    return folder.load(index, torch.Generator().manual_seed(0))


class TestChoice:
    @given(
        ratios=st.lists(st.floats(0.01, 100), min_size=1, max_size=20),
        sides=st.lists(
            st.tuples(st.integers(1, 64), st.integers(1, 64)),
            min_size=1,
            max_size=6,
            unique_by=lambda pair: pair[0] / pair[1],
        ),
    )
    def test_no_other_bucket_is_nearer(self, ratios: list[float], sides: list[tuple[int, int]]) -> None:
        for ratio, number in zip(ratios, nearest_buckets(torch.tensor(ratios), sides).tolist(), strict=True):
            distances = [abs(math.log(ratio) - math.log(height / width)) for height, width in sides]
            # float32 rounds the ratios to 2^-24, and so the distances.
            assert distances[number] <= min(distances) + 2**-23

    def test_a_ratio_and_its_inverse_choose_mirrored_buckets(self) -> None:
        sides = [(1, 2), (1, 1), (2, 1)]
        # The boundaries between buckets are the geometric means, sqrt(2) and its inverse.
        ratios = torch.tensor([0.1, 0.70, 0.72, 1.0, 1.40, 1.43, 10.0])
        assert nearest_buckets(ratios, sides).tolist() == [0, 0, 1, 1, 1, 2, 2]

    @pytest.mark.parametrize(
        "buckets", [[], 8, [8, 8], [[8, 8, 8]], [[8, 0]], [[8.0, 8]], [[True, 8]], "ab", ["ab"]]
    )
    def test_anything_but_a_list_of_pairs_is_refused(self, buckets: Any) -> None:
        with pytest.raises(ValueError, match=r"buckets must be a list of \[height, width\] in pixels"):
            checked_sides(buckets)

    def test_two_buckets_of_one_ratio_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"different aspect ratios, got \[8, 16\] and \[16, 32\]"):
            checked_sides([[8, 16], [8, 8], [16, 32]])


class TestFolder:
    def test_each_image_has_the_size_of_its_bucket(self, root: Path) -> None:
        folder = ImageFolder(root, image_size=8, buckets=SIDES)
        assert folder.buckets is not None
        assert folder.buckets.tolist() == [0, 1, 2, 0]
        assert folder.image_size == 8
        for index, number in enumerate(folder.buckets.tolist()):
            assert load(folder, index)["image"].shape == (3, *SIDES[number])
        assert ImageFolder(root, image_size=8).buckets is None

    def test_the_loader_and_a_model_accept_the_batches(self, root: Path) -> None:
        loader = ResumableLoader(ImageFolder(root, image_size=8, buckets=SIDES), batch_size=2)
        batch = next(loader)
        # Only the two wide images share a bucket.
        assert sorted(batch["label"].tolist()) == [0, 3]
        model = DiT(8, 2, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=4)
        assert model(batch["image"], torch.zeros(2), batch["label"]).shape == (2, 6, 8, 16)

    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_read_size_gives_the_size_of_the_upright_image(
        self, tmp_path: Path, orientation: int, suffix: str
    ) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = save(tmp_path / f"x.{suffix}", 10, 30, exif=exif)
        height, width = read_size(path)
        assert (height, width) == ((30, 10) if orientation >= 5 else (10, 30))
        assert read_rgb(path).size == (width, height)

    def test_read_size_needs_only_the_header(self, tmp_path: Path) -> None:
        path = save(tmp_path / "x.png", 300, 200)
        # The header ends at byte 33, so nearly all pixel data are cut off.
        path.write_bytes(path.read_bytes()[:60])
        assert read_size(path) == (300, 200)

    def test_a_damaged_header_is_named(self, root: Path) -> None:
        (root / "b" / "0.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"corrupt image .*b/0.png: "):
            ImageFolder(root, image_size=8, buckets=SIDES)

    def test_a_damaged_file_is_replaced_from_its_own_bucket(self, root: Path) -> None:
        (root / "b" / "0.png").write_bytes(b"no image")
        save(root / "e" / "0.png", 12, 12)
        content = (root / "a" / "0.png").read_bytes()
        (root / "a" / "0.png").write_bytes(content[: len(content) // 2])
        folder = ImageFolder(root, image_size=8, on_corrupt="skip", buckets=SIDES)
        assert folder.buckets is not None
        # An image without a readable header counts as square.
        assert folder.buckets.tolist() == [0, 1, 2, 0, 1]
        for index, replacement in ((0, 3), (1, 4)):
            with pytest.warns(UserWarning, match="using the next readable image instead"):
                sample = load(folder, index)
            assert sample["label"] == replacement
            assert torch.equal(sample["image"], load(folder, replacement)["image"])
        assert folder.num_corrupt == 2

    def test_a_bucket_without_a_readable_image_is_named(self, root: Path) -> None:
        (root / "b" / "0.png").write_bytes(b"no image")
        folder = ImageFolder(root, image_size=8, on_corrupt="skip", buckets=SIDES)
        with (
            pytest.warns(UserWarning, match="b/0.png"),
            pytest.raises(ValueError, match=r"all 1 files below .* in the bucket \[12, 12\] are damaged"),
        ):
            load(folder, 1)


class TestCrop:
    @given(
        image=st.tuples(st.integers(1, 90), st.integers(1, 90)),
        target=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    )
    def test_a_crop_has_the_target_size(self, image: tuple[int, int], target: tuple[int, int]) -> None:
        assert center_crop(Image.new("L", image[::-1]), *target).size == target[::-1]

    def test_an_image_with_the_target_ratio_is_only_scaled(self, tmp_path: Path) -> None:
        image = read_rgb(save(tmp_path / "x.png", 16, 32))
        # Halved twice by averaging; no averaged pixel straddles the edge between dark and bright.
        red = np.asarray(center_crop(image, 4, 8))[..., 0]
        np.testing.assert_array_equal(red, [[40] * 4 + [200] * 4] * 4)

    def test_excess_is_cut_equally_on_both_sides(self) -> None:
        pixels = np.arange(20, dtype=np.uint8)[:, None].repeat(8, axis=1)
        # The width fits already. Rows (20 - 12) / 2 = 4 to 15 stay.
        np.testing.assert_array_equal(np.asarray(center_crop(Image.fromarray(pixels), 12, 8)), pixels[4:16])
