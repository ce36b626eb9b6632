"""Tars written by the package webdataset, read by number."""

import pickle
import tarfile
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tars import add, encoded, generator, level_of, loaded, shards, write

from speedit_plugins.registry import DATASETS, build
from speedit_plugins.trainer.data.archives.web import WebDataset
from speedit_plugins.trainer.data.held_out import hold_out
from speedit_plugins.trainer.data.loader import ResumableLoader


class TestSamples:
    def test_image_class_and_caption_belong_together(self, tmp_path: Path) -> None:
        data = WebDataset(shards(tmp_path), image_size=8, class_cond=True, text=True)
        assert (len(data), data.num_classes, data.classes, data.num_captions) == (15, 3, ("0", "1", "2"), 15)
        for number, sample in enumerate(loaded(data)):
            assert sorted(sample) == ["caption", "image", "label"]
            assert level_of(sample["image"]) == number
            assert (sample["caption"], sample["label"]) == (f"text {number}", number % 3)

    def test_fields_of_json_give_captions_and_named_classes(self, tmp_path: Path) -> None:
        data = WebDataset(
            shards(tmp_path),
            image_size=8,
            class_cond=True,
            text=True,
            caption_key="json:caption",
            label_key="json:label",
        )
        assert data.classes == ("cat", "dog")
        assert data.load(7, generator())["caption"] == "field 7"
        assert data.labels.tolist() == [number % 2 for number in range(15)]

    def test_without_classes_and_text_the_label_is_0(self, tmp_path: Path) -> None:
        data = WebDataset(shards(tmp_path, 1), image_size=8)
        assert (data.classes, {sample["label"] for sample in loaded(data)}) == ((), {0})

    def test_keys_end_at_the_first_dot_and_files_of_a_sample_need_not_follow_each_other(
        self, tmp_path: Path
    ) -> None:
        path = write(
            tmp_path / "x.tar",
            ("./a/one.JPG", encoded(10, kind="JPEG")),
            ("./a/two.seg.png", encoded(90)),
            ("./a/two.webp", encoded(20, kind="WEBP")),
            ("./a/._one.jpg", b"a file system's own record"),
            ("README", b"no sample"),
            ("./a/two.txt", b" second\n"),
            ("./a/one.txt", b"first"),
        )
        data = WebDataset(path, image_size=8, text=True)
        assert [sample["caption"] for sample in loaded(data)] == ["first", "second"]
        assert [level_of(sample["image"]) for sample in loaded(data)] == [10, 20]

    def test_several_images_of_a_sample_need_a_choice(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.tar", ("one.jpg", encoded(9, kind="JPEG")), ("one.png", encoded(200)))
        with pytest.raises(ValueError, match=r"x\.tar, key one: wanted one image, got jpg and png;"):
            WebDataset(path, image_size=8)
        assert level_of(WebDataset(path, image_size=8, image_key="png").load(0, generator())["image"]) == 200

    @pytest.mark.parametrize(
        "root", ["", "*.tar", "{000..002}.tar", "{000,001,002}.tar", ["000.tar", "00[12].tar"]]
    )
    def test_a_root_is_a_folder_a_pattern_or_a_list(self, tmp_path: Path, root: str | list[str]) -> None:
        shards(tmp_path)
        names = [f"{tmp_path}/{root}"] if isinstance(root, str) else [f"{tmp_path}/{part}" for part in root]
        config = {"type": "WebDataset", "root": names if len(names) > 1 else names[0]}
        assert len(build(DATASETS, config, image_size=8, class_cond=False, text=False)) == 15

    def test_buckets_follow_the_images_and_their_sizes_are_kept(self, tmp_path: Path) -> None:
        wide, tall = encoded(1, (16, 8)), encoded(2, (8, 16))
        path = write(tmp_path / "x.tar", ("a.png", wide), ("b.png", tall), ("c.png", b"damaged"))
        options: dict[str, Any] = {"image_size": 8, "buckets": [[8, 16], [16, 8], [8, 8]]}
        for _ in range(2):
            data = WebDataset(path, on_corrupt="skip", **options)
            assert data.buckets is not None
            assert data.buckets.tolist() == [0, 1, 2]
            assert data.load(1, generator())["image"].shape == (3, 16, 8)
            with pytest.raises(ValueError, match=r"corrupt image .*x\.tar, key c: "):
                WebDataset(path, **options)


class TestFaults:
    @pytest.mark.parametrize(
        ("root", "message"),
        [
            ("s3://bucket/{000..099}.tar", r"reads local files, got 's3://.*copy the files to a disk first"),
            ("pipe:curl -s x", r"reads local files, got 'pipe:curl -s x'"),
            ("nowhere/{000..004}.tar", r"5 of 5 names in root have no file: nowhere/000\.tar, .*, \.\.\."),
            ("nowhere/*.tar", r"no file: nowhere/\*\.tar"),
            ("{5..3}.tar", r"the braces in '\{5\.\.3\}\.tar' name no file"),
            ([], r"needs root to be a path, a pattern or a list of them, got \[\]"),
            (3, r"needs root to be a path, a pattern or a list of them, got 3"),
        ],
    )
    def test_a_root_without_local_files_is_refused(self, root: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            WebDataset(root, image_size=8)

    def test_files_of_several_folders_are_not_mixed(self, tmp_path: Path) -> None:
        for name in ("train", "val"):
            write(tmp_path / name / "0.tar", ("a.png", encoded(1)))
        with pytest.raises(ValueError, match=r"\.tar files in the folders .*train, .*val; wanted a pattern"):
            WebDataset(tmp_path, image_size=8)
        assert len(WebDataset(tmp_path / "**" / "*.tar", image_size=8)) == 2

    @pytest.mark.parametrize(
        ("members", "reason"),
        [
            ([("b.txt", b"words"), ("b.cls", b"1")], "samples without image"),
            ([("b.png", encoded(1)), ("b.cls", b"1")], "samples without caption"),
            ([("b.png", encoded(1)), ("b.txt", b"words")], "samples without label"),
            ([("b.png", encoded(1)), ("b.txt", b"words"), ("b.cls", b" ")], "samples with a damaged label"),
        ],
    )
    def test_a_sample_that_lacks_a_part_is_named_or_left_out(
        self, tmp_path: Path, members: list[tuple[str, bytes]], reason: str
    ) -> None:
        path = write(tmp_path / "x.tar", ("a.png", encoded(7)), ("a.txt", b"one"), ("a.cls", b"0"), *members)
        options: dict[str, Any] = {"image_size": 8, "class_cond": True, "text": True}
        with pytest.raises(ValueError, match=rf"WebDataset: {reason}: 1, such as .*x\.tar, key b; "):
            WebDataset(path, **options)
        data = WebDataset(path, on_corrupt="skip", **options)
        assert (len(data), data.left_out) == (1, {reason: 1})
        assert level_of(data.load(0, generator())["image"]) == 7

    def test_a_tar_that_is_cut_off_keeps_its_whole_samples(self, tmp_path: Path) -> None:
        whole = write(tmp_path / "x.tar", *((f"{name}.png", encoded(9)) for name in "abc")).read_bytes()
        header_of_c = whole.index(b"c.png")
        for length in (header_of_c, header_of_c + 100, header_of_c + 520, len(whole.rstrip(b"\0")) + 1):
            path = tmp_path / f"{length}.tar"
            path.write_bytes(whole[:length])
            with pytest.raises(
                ValueError, match=rf"{length}\.tar: (it is cut off at byte {length}|the header)"
            ):
                WebDataset(path, image_size=8)
            data = WebDataset(path, image_size=8, on_corrupt="skip")
            assert data.left_out == {"shards that are not whole": 1}
            assert {level_of(sample["image"]) for sample in loaded(data)} == {9}
            assert len(data) == (3 if length > header_of_c + 520 else 2)

    def test_other_files_are_no_tars(self, tmp_path: Path) -> None:
        good = write(tmp_path / "good.tar", ("a.png", encoded(1)))
        (tmp_path / "empty.tar").write_bytes(b"")
        (tmp_path / "text.tar").write_text("no tar at all" * 100)
        with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
            add(tar, "a.png", encoded(1))
        for name, hint in (("empty", "empty file"), ("text", ""), ("packed", ".*compressed: unpack it once")):
            with pytest.raises(ValueError, match=rf"{name}\.tar is no tar: {hint}"):
                WebDataset(tmp_path / f"{name}.tar", image_size=8)
        data = WebDataset([good, tmp_path / "text.tar"], image_size=8, on_corrupt="skip")
        assert (len(data), data.left_out) == (1, {"shards that cannot be read": 1})

    def test_joined_tars_and_repeated_members_are_named(self, tmp_path: Path) -> None:
        first = write(tmp_path / "1.tar", ("a.png", encoded(1)))
        path = tmp_path / "joined.tar"
        path.write_bytes(first.read_bytes() * 2)
        with pytest.raises(ValueError, match="more data follows its end at byte .* tars joined by cat"):
            WebDataset(path, image_size=8)
        path = write(tmp_path / "twice.tar", ("a.png", encoded(1)), ("a.png", encoded(2)))
        with pytest.raises(ValueError, match=r"parts that appear twice: 1, such as .*twice\.tar, a\.png"):
            WebDataset(path, image_size=8)
        data = WebDataset(path, image_size=8, on_corrupt="skip")
        assert [level_of(sample["image"]) for sample in loaded(data)] == [1]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("b.png", encoded(1)[:40], r"corrupt image .*x\.tar, key b: "),
            ("b.txt", b"\xff\xfe", r"x\.tar, key b: wanted text in txt: UnicodeDecodeError"),
            ("b.txt", b" \n", r"x\.tar, key b: txt is empty"),
        ],
    )
    def test_damage_is_named_or_skipped_and_counted_once(
        self, tmp_path: Path, name: str, content: bytes, message: str
    ) -> None:
        members = {
            f"{key}.{kind}": value for key in "abc" for kind, value in (("png", encoded(5)), ("txt", b"x"))
        }
        path = write(tmp_path / "x.tar", *(members | {name: content}).items())
        with pytest.raises(ValueError, match=message):
            WebDataset(path, image_size=8, text=True).load(1, generator())
        data = WebDataset(path, image_size=8, text=True, on_corrupt="skip")
        loader = ResumableLoader(data, batch_size=3, num_workers=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the workers
            assert all(level_of(image) == 5 for _ in range(4) for image in next(loader)["image"])
        loader.close()
        assert data.num_corrupt == 1

    def test_an_option_without_effect_is_refused(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.tar", ("a.png", encoded(1)))
        with pytest.raises(ValueError, match="caption_key has no effect on a training without text_encoder"):
            WebDataset(path, image_size=8, caption_key="txt")
        with pytest.raises(ValueError, match="shuffle_window >= 1, got 0"):
            WebDataset(path, image_size=8, shuffle_window=0)


class TestOrder:
    def test_a_run_resumes_within_a_shard_on_any_number_of_ranks_and_workers(self, tmp_path: Path) -> None:
        shards(tmp_path, count=4, each=6)

        def levels(count: int, state: dict[str, int] | None = None, **options: Any) -> list[list[int]]:
            data = WebDataset(tmp_path, image_size=8, shuffle_window=2)
            loader = ResumableLoader(data, batch_size=4, seed=5, **options)
            if state is not None:
                loader.load_state_dict(state)
            batches = [list(map(level_of, next(loader)["image"])) for _ in range(count)]
            states.append(loader.state_dict())
            loader.close()
            return batches

        states: list[dict[str, int]] = []
        whole = levels(15)
        # Two and a half epochs: each sees every sample once, in another order.
        epochs = [sum(whole[first : first + 6], []) for first in (0, 6)]
        assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
        assert epochs[0] != epochs[1]
        # Half of an epoch is from two of the four shards.
        assert len({level // 6 for level in epochs[0][:12]}) == 2
        assert levels(4) == whole[:4]
        assert levels(11, states[-1], num_workers=2) == whole[4:]
        halves = [levels(11, states[1], rank=rank, world_size=2, num_workers=rank) for rank in (0, 1)]
        assert [a + b for a, b in zip(*halves, strict=True)] == whole[4:]

    def test_another_window_is_refused_within_an_epoch(self, tmp_path: Path) -> None:
        shards(tmp_path)
        loaders = [
            ResumableLoader(WebDataset(tmp_path, image_size=8, shuffle_window=window), batch_size=2)
            for window in (2, 1)
        ]
        next(loaders[0])
        with pytest.raises(ValueError, match="in the middle of an epoch with chunks and chunks_crc32"):
            loaders[1].load_state_dict(loaders[0].state_dict())

    def test_a_part_keeps_the_order_in_windows_and_what_the_whole_says(self, tmp_path: Path) -> None:
        shards(tmp_path, count=4, each=6)
        write(tmp_path / "extra.tar", ("x.txt", b"no image"))
        data = WebDataset(tmp_path, image_size=8, shuffle_window=1, on_corrupt="skip")
        trained, _ = hold_out(data, 4, seed=0)
        assert trained.left_out == {"samples without image": 1, "held out for validation": 4}
        loader = ResumableLoader(trained, batch_size=1)
        levels = [level_of(next(loader)["image"]) for _ in range(20)]
        # One tar after the other.
        assert len([a for a, b in pairwise(levels) if a // 6 != b // 6]) == 3
        assert loader.identity == data.identity()

    def test_copies_load_the_same(self, tmp_path: Path) -> None:
        data = WebDataset(shards(tmp_path, 1), image_size=8, text=True)
        before = loaded(data)
        copy = pickle.loads(pickle.dumps(data))  # noqa: S301 - what a spawned worker does
        assert [sample["caption"] for sample in loaded(copy)] == [sample["caption"] for sample in before]
