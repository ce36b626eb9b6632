import csv
import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from speedit_plugins.registry import DATASETS, build
from speedit_plugins.trainer.data.images.caption_files import Row, read_captions
from speedit_plugins.trainer.data.images.captions import ImageCaptions
from speedit_plugins.trainer.data.images.folder import ImageFolder
from speedit_plugins.trainer.data.loader import ResumableLoader

TABLE = 'path,text\na.png,a red thing\nsub/b.png,"two, with a comma"\n'
COCO: dict[str, Any] = {
    "info": {"year": 2014},
    "images": [{"id": 9, "file_name": "sub/b.png"}, {"id": 4, "file_name": "a.png", "height": 8}],
    "annotations": [
        {"image_id": 4, "id": 1, "caption": "a red thing"},
        {"image_id": 9, "id": 2, "caption": "two"},
        {"image_id": 4, "id": 3, "caption": "a thing in red\n"},
    ],
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def save(path: Path, color: str, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def metadata(path: Path, rows: list[dict[str, str]]) -> Path:
    """Writes the rows in the layout that the suffix says."""
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
        return path
    if path.suffix == ".jsonl":
        return write(path, "\n".join(map(json.dumps, rows)))
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    return write(path, text.getvalue())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a red a.png and a blue sub/b.png."""
    save(tmp_path / "a.png", "red")
    save(tmp_path / "sub" / "b.png", "blue")
    return tmp_path


class TestLayouts:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("c.csv", TABLE),
            ("c.csv", "\ufeff" + TABLE.replace("\n", "\r\n\r\n")),
            ("c.CSV", 'num_frames, text ,path\n1, a red thing,a.png\n1,"two, with a comma",sub/b.png'),
            (
                "c.jsonl",
                '{"file_name": "a.png", "text": "a red thing", "width": 8}\n\n'
                '{"path": "sub/b.png", "caption": "two, with a comma\\n"}',
            ),
        ],
    )
    def test_rows_give_their_image_and_caption(self, root: Path, name: str, content: str) -> None:
        dataset = ImageCaptions(write(root / name, content), image_size=8)
        assert (len(dataset), dataset.channels, dataset.num_classes, dataset.image_size) == (2, 3, 0, 8)
        assert dataset.captions is None
        assert dataset.buckets is None
        first, second = dataset.load(0, generator()), dataset.load(1, generator())
        assert set(first) == {"image", "caption"}
        assert (first["caption"], second["caption"]) == ("a red thing", "two, with a comma")
        assert first["image"].dtype == torch.float32
        assert first["image"][:, 0, 0].tolist() == [1.0, -1.0, -1.0]
        assert second["image"][:, 0, 0].tolist() == [-1.0, -1.0, 1.0]

    def test_the_captions_of_a_coco_image_are_equally_likely(self, root: Path) -> None:
        dataset = ImageCaptions(write(root / "c.json", json.dumps(COCO)), image_size=8)
        assert dataset.path(0).name == "b.png"
        used = generator()
        assert dataset.load(0, used)["caption"] == "two"
        assert torch.equal(used.get_state(), generator().get_state())
        captions = [dataset.load(1, generator(seed))["caption"] for seed in range(200)]
        assert set(captions) == {"a red thing", "a thing in red"}
        # 4 sigma of a fair coin thrown 200 times: 4 sqrt(50) = 28.3.
        assert abs(captions.count("a red thing") - 100) <= 28
        assert captions == [dataset.load(1, generator(seed))["caption"] for seed in range(200)]

    def test_images_may_lie_in_another_folder(
        self, root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(root))
        at_home = write(tmp_path_factory.mktemp("home") / "c.csv", "path,text\n~/a.png,one\n")
        assert ImageCaptions(at_home, image_size=8).load(0, generator())["caption"] == "one"
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        table = write(elsewhere / "c.csv", TABLE)
        config = {"type": "ImageCaptions", "captions_file": str(table), "root": str(root), "image_size": 8}
        assert len(build(DATASETS, config)) == 2
        with pytest.raises(ValueError, match=r"2 of 2 images are missing: .*a\.png \(line 2\), .*b\.png"):
            ImageCaptions(table, image_size=8)
        absolute = write(elsewhere / "d.csv", f"path,text\n{root / 'a.png'},a red thing\n")
        assert len(ImageCaptions(absolute, image_size=8)) == 1


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("c.csv", "", r"c\.csv, line 1: wanted one column 'file_name' or 'path', got nothing"),
            (
                "c.csv",
                "path,words\na.png,x\n",
                "line 1: wanted one column 'text' or 'caption', got path, words; te",
            ),
            (
                "c.csv",
                "path,text,text\na.png,x,y\n",
                r"wanted one column 'text' or 'caption', got path, text, text",
            ),
            ("c.csv", "path,text\n", r"c\.csv has no captions, wanted at least one"),
            ("c.csv", "path,text\na.png,x\na.png, \n", "line 3: wanted a text for the image 'a.png', got"),
            ("c.csv", "path,text\n,x\n", "line 2: wanted the path of an image, got none"),
            ("c.csv", "path,text\na.png\n", "line 2: wanted 2 fields, got 1"),
            ("c.csv", "path,text\na.png,x, y\n", "line 2: wanted 2 fields, got 3; text with commas needs"),
            ("c.csv", 'path,text\na.png,"x\n', "line 2: wanted CSV: unexpected end of data"),
            ("c.jsonl", '{"path": "a.png", "text": "x"}\n{"path": \n', r"c\.jsonl, line 2: wanted JSON: "),
            ("c.jsonl", "[1]", r"line 1: wanted an object with 'file_name' or 'path', got \[1\]"),
            ("c.jsonl", '{"path": "a.png", "words": "x"}', "wanted 'text' or 'caption', got path, words"),
            ("c.jsonl", '{"path": "a", "file_name": "b", "text": "x"}', "'file_name' or 'path', got path"),
            ("c.jsonl", '{"path": "a.png", "text": ["x"]}', r"wanted 'text' as str, got \['x'\]"),
            ("c.jsonl", '{"path": "a.png", "text": "\\ud83d"}', "line 1: .*got half a character"),
            ("c.jsonl", "\n", "has no captions"),
            ("c.json", "{\n]", r"c\.json: wanted JSON: .*line 2"),
            ("c.json", "[]", r"c\.json needs a list 'images', as in MS-COCO's captions"),
            ("c.json", '{"images": []}', "needs a list 'annotations'"),
            ("c.json", '{"images": [{"id": null}], "annotations": []}', r"images\[0\].*'id' as int or"),
            ("c.json", '{"images": [{"id": 1}, {"id": 1}], "annotations": []}', r"images\[1\].*got 1 again"),
            ("c.json", '{"images": [{"id": 1}], "annotations": []}', r"\[0\]: wanted 'file_name', got id"),
            (
                "c.json",
                '{"images": [], "annotations": [{"image_id": 7}]}',
                r"annotations\[0\].*an image, got 7",
            ),
            (
                "c.json",
                '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": []}',
                r"images\[0\]: wanted a text for the image 'a\.png', got none",
            ),
            ("c.txt", TABLE, r"must end in one of \.csv, \.jsonl, \.json, \.parquet, got .*c\.txt"),
        ],
    )
    def test_an_error_says_where_and_what_is_wanted(
        self, root: Path, name: str, content: str, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            ImageCaptions(write(root / name, content), image_size=8)

    def test_a_missing_file_and_another_encoding_are_refused(self, root: Path) -> None:
        with pytest.raises(ValueError, match=r"the captions file must be a file, got .*nowhere\.csv"):
            ImageCaptions(root / "nowhere.csv", image_size=8)
        latin = root / "latin.csv"
        latin.write_bytes("path,text\na.png,caf\u00e9\n".encode("latin-1"))
        with pytest.raises(ValueError, match=r"latin\.csv must be UTF-8: .*0xe9"):
            ImageCaptions(latin, image_size=8)

    def test_missing_images_are_counted_and_the_first_are_named(self, root: Path) -> None:
        rows = "".join(f"{number}.png,x\n" for number in range(5))
        table = write(root / "c.csv", f"path,text\na.png,x\n{rows}")
        named = r".*0\.png \(line 3\), .*1\.png \(line 4\), .*2\.png \(line 5\), \.\.\."
        with pytest.raises(ValueError, match=f"5 of 6 images are missing: {named}"):
            ImageCaptions(table, image_size=8)

    def test_bad_options_say_what_is_wanted(self, root: Path) -> None:
        table = write(root / "c.csv", TABLE)
        with pytest.raises(ValueError, match="ImageCaptions needs image_size >= 1, got 0"):
            ImageCaptions(table, image_size=0)
        with pytest.raises(ValueError, match=r"on_corrupt in \('raise', 'skip'\), got 'ignore'"):
            ImageCaptions(table, image_size=8, on_corrupt="ignore")
        with pytest.raises(ValueError, match=r"needs root to be a folder, got .*nowhere"):
            ImageCaptions(table, image_size=8, root=root / "nowhere")
        with pytest.raises(IndexError, match="has 2 images, got index 2"):
            ImageCaptions(table, image_size=8).load(2, generator())


class TestImages:
    def test_pixels_and_flips_equal_those_of_image_folder(self, root: Path) -> None:
        for name in ("a.png", "sub/b.png"):
            pixels = torch.randint(256, (20, 13, 3), generator=generator(len(name)), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / name)
        captioned = ImageCaptions(write(root / "c.csv", TABLE), image_size=8, random_flip=True)
        folder = ImageFolder(root, image_size=8, class_cond=False, random_flip=True)
        for seed in range(20):
            for index in range(2):
                mine, theirs = (d.load(index, generator(seed))["image"] for d in (captioned, folder))
                assert torch.equal(mine, theirs)

    def test_a_damaged_file_is_named_or_replaced_together_with_its_caption(self, root: Path) -> None:
        table = write(root / "c.csv", TABLE)
        (root / "a.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"corrupt image .*a\.png"):
            ImageCaptions(table, image_size=8).load(0, generator())
        dataset = ImageCaptions(table, image_size=8, on_corrupt="skip")
        with pytest.warns(UserWarning, match="using the next readable image instead"):
            sample = dataset.load(0, generator())
        assert sample["caption"] == "two, with a comma"
        assert sample["image"][:, 0, 0].tolist() == [-1.0, -1.0, 1.0]
        assert dataset.num_corrupt == 1

    def test_buckets_follow_the_aspect_ratio(self, root: Path) -> None:
        save(root / "a.png", "red", size=(30, 10))
        dataset = ImageCaptions(write(root / "c.csv", TABLE), image_size=8, buckets=[[8, 8], [4, 16]])
        assert dataset.buckets is not None
        assert dataset.buckets.tolist() == [1, 0]
        assert dataset.load(0, generator())["image"].shape == (3, 4, 16)
        assert dataset.load(1, generator())["image"].shape == (3, 8, 8)

    def test_workers_and_a_pickled_copy_give_the_same_batches(self, root: Path) -> None:
        dataset = ImageCaptions(write(root / "c.json", json.dumps(COCO)), image_size=8, random_flip=True)
        alone = ResumableLoader(dataset, batch_size=2)
        copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - written here
        forked = ResumableLoader(copy, batch_size=2, num_workers=1)
        for _ in range(4):
            mine, theirs = next(alone), next(forked)
            assert mine["caption"] == theirs["caption"]
            assert torch.equal(mine["image"], theirs["image"])
        forked.close()


# White space at the ends would be stripped, and UTF-8 cannot encode surrogates.
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda s: s == s.strip())
# Python 3.10's csv module refuses NUL.
PRINTED = WORDS.filter(lambda s: "\0" not in s)


def read_back(folder: Path, name: str, content: str) -> list[Row]:
    path = folder / name
    path.write_text(content, encoding="utf-8", newline="")
    return list(read_captions(path))


class TestRoundTrips:
    @given(rows=st.lists(st.tuples(PRINTED, PRINTED), min_size=1, max_size=5))
    def test_csv(self, tmp_path_factory: pytest.TempPathFactory, rows: Sequence[tuple[str, str]]) -> None:
        written = io.StringIO()
        csv.writer(written).writerows([("path", "text"), *rows])
        found = read_back(tmp_path_factory.getbasetemp(), "round.csv", written.getvalue())
        assert [(row.path, row.texts) for row in found] == [(path, (text,)) for path, text in rows]

    @given(rows=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5), is_ascii=st.booleans())
    def test_json_lines(
        self, tmp_path_factory: pytest.TempPathFactory, rows: Sequence[tuple[str, str]], is_ascii: bool
    ) -> None:
        lines = [json.dumps({"path": path, "text": text}, ensure_ascii=is_ascii) for path, text in rows]
        found = read_back(tmp_path_factory.getbasetemp(), "round.jsonl", "\n".join(lines))
        expected = [Row(f"line {k}", path, (text,)) for k, (path, text) in enumerate(rows, start=1)]
        assert found == expected

    @given(images=st.dictionaries(WORDS, st.lists(WORDS, min_size=1, max_size=3), min_size=1, max_size=4))
    def test_coco(self, tmp_path_factory: pytest.TempPathFactory, images: dict[str, list[str]]) -> None:
        content = {
            "images": [{"id": number, "file_name": name} for number, name in enumerate(images)],
            "annotations": [
                {"image_id": number, "caption": text}
                for number, texts in enumerate(images.values())
                for text in texts
            ],
        }
        found = read_back(tmp_path_factory.getbasetemp(), "round.json", json.dumps(content))
        assert {row.path: list(row.texts) for row in found} == images

    @given(content=st.binary(max_size=80), suffix=st.sampled_from(["csv", "jsonl", "json"]))
    def test_any_bytes_give_rows_or_an_error_with_the_name(
        self, tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
    ) -> None:
        path = tmp_path_factory.getbasetemp() / f"bytes.{suffix}"
        path.write_bytes({"csv": b"path,text\n", "jsonl": b"", "json": b""}[suffix] + content)
        try:
            message = str(path) * all(row.path and all(row.texts) for row in read_captions(path))
        except ValueError as error:
            message = str(error)
        assert str(path) in message
