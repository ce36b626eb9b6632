"""Images in Parquet files and in folders that `datasets` saved, both written by Hugging Face's own writer."""

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from speedit_plugins.registry import DATASETS, build
from speedit_plugins.trainer.data.archives.images import StoredImages
from speedit_plugins.trainer.data.archives.parquet import ParquetImages
from speedit_plugins.trainer.data.archives.saved import SavedDataset
from speedit_plugins.trainer.data.loader import ResumableLoader
from speedit_plugins.trainer.data.summary import data_lines

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def encoded(level: int, size: tuple[int, int] = (8, 8)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(content, "PNG")
    return content.getvalue()


def level_of(image: torch.Tensor) -> int:
    """The grey level of a constant image."""
    return round((float(image.mean()) + 1) * 127.5)


def hub_table(levels: range | list[int]) -> Any:
    """Row of level i: class cat or dog by i % 2, caption `text i`."""
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=["cat", "dog"]),
        text=datasets.Value("string"),
    )
    rows = {
        "image": [{"bytes": encoded(level), "path": f"{level}.png"} for level in levels],
        "label": [level % 2 for level in levels],
        "text": [f"text {level}" for level in levels],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def parquet(path: Path, columns: dict[str, list[Any]], rows: int = 100) -> Path:
    """A file without Hugging Face's description, in row groups of so many rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return path


def hub_files(folder: Path, kind: str) -> StoredImages:
    """Ten rows from Hugging Face's writer: two Parquet files, or a DatasetDict."""
    if kind == "parquet":
        (folder / "data").mkdir()
        for number in (0, 1):
            hub_table(range(5 * number, 5 * number + 5)).to_parquet(
                folder / "data" / f"train-0000{number}-of-00002.parquet"
            )
        return ParquetImages(folder / "data", image_size=8, class_cond=True, text=True)
    datasets.DatasetDict(train=hub_table(range(10)), test=hub_table([200])).save_to_disk(folder)
    return SavedDataset(folder, split="train", image_size=8, class_cond=True, text=True)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_image_caption_and_class_of_a_row_belong_together(tmp_path: Path, kind: str) -> None:
    data = hub_files(tmp_path, kind)
    assert (len(data), data.classes, data.num_classes, data.num_captions) == (10, ("cat", "dog"), 2, 10)
    copy = pickle.loads(pickle.dumps(data))  # noqa: S301 - what a spawned worker does
    for number in range(10):
        for each in (data, copy):
            sample = each.load(number, generator())
            assert level_of(sample["image"]) == number
            assert (sample["caption"], sample["label"]) == (f"text {number}", number % 2)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_images_without_captions_have_none(tmp_path: Path, kind: str) -> None:
    assert hub_files(tmp_path, kind).max_captions == 1
    place, options = (tmp_path / "data", {}) if kind == "parquet" else (tmp_path, {"split": "train"})
    data = (ParquetImages if kind == "parquet" else SavedDataset)(place, image_size=8, **options)
    assert "captions" not in dict(data_lines(data, batch_size=2))


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_forked_workers_load_what_the_main_process_does(tmp_path: Path, kind: str) -> None:
    data = hub_files(tmp_path, kind)
    data.load(0, generator())  # files are open when the workers are forked
    epochs = []
    for num_workers in (0, 2):
        loader = ResumableLoader(data, batch_size=2, seed=3, num_workers=num_workers)
        batches = [next(loader) for _ in range(10)]
        loader.close()
        epochs.append(
            [(level_of(i), c) for b in batches for i, c in zip(b["image"], b["caption"], strict=True)]
        )
    assert epochs[0] == epochs[1]
    assert sorted(level for level, _ in epochs[0][:10]) == list(range(10))
    assert all(caption == f"text {level}" for level, caption in epochs[0])


class TestParquet:
    def test_images_are_bytes_or_paths_and_labels_numbers_or_names(self, tmp_path: Path) -> None:
        (tmp_path / "images").mkdir()
        for name in ("a", "b"):
            (tmp_path / "images" / f"{name}.png").write_bytes(encoded(7))
        stored: list[list[Any]] = [
            [encoded(7)] * 2,
            ["images/a.png", str(tmp_path / "images" / "b.png")],
            [{"bytes": None, "path": "images/a.png"}, {"bytes": encoded(7), "path": None}],
        ]
        kinds: list[tuple[list[Any], tuple[str, ...]]] = [
            ([2, 0], ("0", "1", "2")),
            ([2.0, 0.0], ("0", "1", "2")),  # of pandas
            ([True, False], ("0", "1")),
            (["dog", "cat"], ("cat", "dog")),
        ]
        for labels, classes in kinds:
            for number, images in enumerate(stored):
                path = parquet(tmp_path / f"{number}.parquet", {"jpg": images, "kind": labels})
                data = ParquetImages(
                    path, image_size=8, class_cond=True, image_column="jpg", label_column="kind"
                )
                samples = [data.load(index, generator()) for index in (0, 1)]
                assert [level_of(sample["image"]) for sample in samples] == [7, 7]
                assert data.classes == classes
                expected = [str(label if isinstance(label, str) else int(label)) for label in labels]
                assert [classes[sample["label"]] for sample in samples] == expected

    def test_one_of_several_captions_is_drawn_by_the_generator(self, tmp_path: Path) -> None:
        captions = [["one", "two", "three"], ["four"]]
        path = parquet(tmp_path / "x.parquet", {"image": [encoded(1)] * 2, "captions": captions})
        data = ParquetImages(path, image_size=8, text=True, caption_column="captions")
        assert {data.load(0, generator(seed))["caption"] for seed in range(30)} == set(captions[0])
        assert data.load_all(0, generator())["captions"] == captions[0]
        assert data.max_captions == 3

    def test_only_the_row_groups_of_the_window_are_in_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = parquet(tmp_path / "x.parquet", {"image": list(map(encoded, range(24)))}, rows=4)
        data = ParquetImages(path, image_size=8, shuffle_window=2)
        read: list[int] = []
        real = ParquetImages._read_group
        monkeypatch.setattr(
            ParquetImages,
            "_read_group",
            lambda self, group, names: read.append(group) or real(self, group, names),
        )
        loader = ResumableLoader(data, batch_size=4)
        levels = [level for _ in range(6) for level in map(level_of, next(loader)["image"])]
        assert sorted(levels) == list(range(24))
        # Each of the six groups is read once, though samples of two are mixed.
        assert sorted(read) == list(range(6))
        assert len(data._tables) == 2

    def test_buckets_follow_the_images_and_their_sizes_are_kept(self, tmp_path: Path) -> None:
        images = [encoded(1, (16, 8)), encoded(2, (8, 16)), b"damaged"]
        path = parquet(tmp_path / "x.parquet", {"image": images}, rows=2)
        options: dict[str, Any] = {"image_size": 8, "buckets": [[8, 16], [16, 8], [8, 8]]}
        for _ in range(2):
            data = ParquetImages(path, on_corrupt="skip", **options)
            assert data.buckets is not None
            assert data.buckets.tolist() == [0, 1, 2]
            assert data.load(1, generator())["image"].shape == (3, 16, 8)
            with pytest.raises(ValueError, match=r"corrupt image .*x\.parquet, row 2: "):
                ParquetImages(path, **options)

    def test_a_folder_of_several_splits_is_refused(self, tmp_path: Path) -> None:
        for name in ("train-00000-of-00001", "test-00000-of-00001"):
            parquet(tmp_path / f"{name}.parquet", {"image": [encoded(1)]})
        with pytest.raises(
            ValueError, match=r"files of the splits test, train; wanted a pattern, such as root"
        ):
            ParquetImages(tmp_path, image_size=8)
        config = {"type": "ParquetImages", "root": f"{tmp_path}/train-*.parquet"}
        assert len(build(DATASETS, config, image_size=8, class_cond=False, text=False)) == 1

    def test_a_missing_column_is_named_with_the_nearest(self, tmp_path: Path) -> None:
        path = parquet(tmp_path / "x.parquet", {"img": [encoded(1)], "texts": ["a"]})
        with pytest.raises(
            ValueError, match=r"x\.parquet has no column 'image'.*image_column needs one of img"
        ):
            ParquetImages(path, image_size=8)
        with pytest.raises(
            ValueError, match=r"no column 'text'; did you mean 'texts'\?; caption_column needs"
        ):
            ParquetImages(path, image_size=8, image_column="img", text=True)
        with pytest.raises(ValueError, match="label_column has no effect on a training without num_classes"):
            ParquetImages(path, image_size=8, image_column="img", label_column="texts")

    def test_rows_without_a_label_are_named_or_left_out(self, tmp_path: Path) -> None:
        path = parquet(
            tmp_path / "x.parquet", {"image": list(map(encoded, range(4))), "label": [1, None, -1, 0]}
        )
        with pytest.raises(
            ValueError, match=r"samples without a usable label: 2, such as .*x\.parquet, row 1, .*row 2"
        ):
            ParquetImages(path, image_size=8, class_cond=True)
        data = ParquetImages(path, image_size=8, class_cond=True, on_corrupt="skip")
        assert (len(data), data.left_out) == (2, {"samples without a usable label": 2})
        samples = [data.load(index, generator()) for index in (0, 1)]
        assert [(level_of(sample["image"]), sample["label"]) for sample in samples] == [(0, 1), (3, 0)]

    def test_files_that_cannot_be_read_are_named_or_left_out(self, tmp_path: Path) -> None:
        good = parquet(tmp_path / "good.parquet", {"image": [encoded(1)]})
        cut = tmp_path / "cut.parquet"
        for content in (b"", b"no Parquet file", good.read_bytes()[:-20]):
            cut.write_bytes(content)
            with pytest.raises(ValueError, match=r"corrupt Parquet file .*cut\.parquet: ArrowInvalid: "):
                ParquetImages([good, cut], image_size=8)
            data = ParquetImages([good, cut], image_size=8, on_corrupt="skip")
            assert (len(data), data.left_out) == (1, {"files that cannot be read": 1})
        with pytest.raises(ValueError, match="has no samples; left out: 1 files that cannot be read"):
            ParquetImages(cut, image_size=8, on_corrupt="skip")

    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            ("image", encoded(1)[:40], r"corrupt image .*x\.parquet, row 1: "),
            ("image", None, r"x\.parquet, row 1: wanted an image as bytes or a path, got None"),
            ("text", None, r"x\.parquet, row 1: wanted a caption, or a list of captions, got None"),
            ("text", " ", r"x\.parquet, row 1: wanted a caption with words, got ' '"),
        ],
    )
    def test_damage_is_named_or_skipped_and_counted_once(
        self, tmp_path: Path, column: str, value: Any, message: str
    ) -> None:
        columns: dict[str, list[Any]] = {"image": [encoded(5)] * 3, "text": ["words"] * 3}
        columns[column] = [columns[column][0], value, columns[column][2]]
        path = parquet(tmp_path / "x.parquet", columns)
        with pytest.raises(ValueError, match=message):
            ParquetImages(path, image_size=8, text=True).load(1, generator())
        data = ParquetImages(path, image_size=8, text=True, on_corrupt="skip")
        loader = ResumableLoader(data, batch_size=3, num_workers=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the workers
            assert all(level_of(image) == 5 for _ in range(4) for image in next(loader)["image"])
        loader.close()
        assert data.num_corrupt == 1

    def test_a_damaged_row_group_is_skipped(self, tmp_path: Path) -> None:
        path = parquet(tmp_path / "x.parquet", {"image": list(map(encoded, range(1, 5)))}, rows=2)
        content = bytearray(path.read_bytes())
        content[4:20] = bytes(16)  # the header of the first page, behind the file's four-byte name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"corrupt Parquet file .*x\.parquet: "):
            ParquetImages(path, image_size=8).load(0, generator())
        data = ParquetImages(path, image_size=8, on_corrupt="skip")
        with pytest.warns(UserWarning, match="using the next readable sample instead"):
            assert level_of(data.load(0, generator())["image"]) == 3
        assert data.num_corrupt == 2

    def test_other_class_names_in_a_second_file_are_refused(self, tmp_path: Path) -> None:
        hub_table([0, 1]).to_parquet(tmp_path / "a.parquet")
        parquet(tmp_path / "b.parquet", {"image": [encoded(1)], "label": [5]})
        with pytest.raises(ValueError, match=r"b\.parquet has other names of classes than .*a\.parquet"):
            ParquetImages(tmp_path, image_size=8, class_cond=True)

    def test_a_large_row_group_is_warned_of(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("speedit_plugins.trainer.data.archives.parquet.LARGE_BYTES", 10)
        path = parquet(tmp_path / "x.parquet", {"image": [encoded(1)]})
        with pytest.warns(UserWarning, match=r"row group 0 takes .* GiB in every loading process; write the"):
            ParquetImages(path, image_size=8)


class TestSaved:
    def test_a_split_is_chosen_by_name(self, tmp_path: Path) -> None:
        datasets.DatasetDict(train=hub_table([1, 2]), test=hub_table([3])).save_to_disk(tmp_path / "both")
        with pytest.raises(
            ValueError, match="both has several splits, wanted split to be one of train, test"
        ):
            SavedDataset(tmp_path / "both", image_size=8)
        with pytest.raises(ValueError, match="both has no split 'val', wanted one of train, test"):
            SavedDataset(tmp_path / "both", image_size=8, split="val")
        config = {"type": "SavedDataset", "root": str(tmp_path / "both"), "split": "test"}
        data = build(DATASETS, config, image_size=8, class_cond=False, text=False)
        assert level_of(data.load(0, generator())["image"]) == 3
        hub_table([4, 5]).save_to_disk(tmp_path / "one")
        assert len(SavedDataset(tmp_path / "one", image_size=8)) == 2
        with pytest.raises(ValueError, match="one has one dataset without splits, got split 'train'"):
            SavedDataset(tmp_path / "one", image_size=8, split="train")

    def test_a_selection_and_a_format_do_not_matter(self, tmp_path: Path) -> None:
        hub_table(range(6)).select([5, 1, 3]).with_format("numpy").save_to_disk(tmp_path)
        data = SavedDataset(tmp_path, image_size=8, class_cond=True)
        assert [level_of(data.load(index, generator())["image"]) for index in range(3)] == [5, 1, 3]

    def test_other_folders_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"needs root to be a folder that save_to_disk wrote, got .*nowhere"
        ):
            SavedDataset(tmp_path / "nowhere", image_size=8)
        with pytest.raises(ValueError, match=f"needs a folder that save_to_disk wrote, got {tmp_path}: "):
            SavedDataset(tmp_path, image_size=8)
        with pytest.raises(ValueError, match="reads local files, got 's3://bucket/x': copy the files"):
            SavedDataset("s3://bucket/x", image_size=8)

    def test_buckets_captions_and_faults_are_those_of_parquet(self, tmp_path: Path) -> None:
        rows = {
            "image": [encoded(1, (16, 8)), encoded(2, (8, 16)), b"damaged"],
            "label": ["b", "a", None],
            "text": [["one", "two"], ["three"], ["four"]],
        }
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path)
        options: dict[str, Any] = {"image_size": 8, "buckets": [[8, 16], [16, 8], [8, 8]]}
        with pytest.raises(ValueError, match=r"corrupt image .*, row 2: "):
            SavedDataset(tmp_path, **options)
        data = SavedDataset(tmp_path, text=True, on_corrupt="skip", **options)
        assert data.buckets is not None
        assert data.buckets.tolist() == [0, 1, 2]
        assert data.max_captions == 2
        data = SavedDataset(tmp_path, image_size=8, class_cond=True, on_corrupt="skip")
        assert (data.classes, data.labels.tolist()) == (("a", "b"), [1, 0])
        assert data.left_out == {"samples without a usable label": 1}
