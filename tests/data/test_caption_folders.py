import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from speedit_plugins.trainer.data.images.captions import ImageCaptions

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


class TestFolders:
    @pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
    @pytest.mark.parametrize("below", ["", "train/"])
    def test_metadata_files_are_found(self, root: Path, kind: str, below: str) -> None:
        folder = root / below
        folder.mkdir(exist_ok=True)
        for name in ("a.png", "sub/b.png"):
            save(folder / name, "red")
        rows = [{"file_name": "sub/b.png", "text": "two"}, {"file_name": "a.png", "text": "one"}]
        metadata(folder / f"metadata.{kind}", rows)
        dataset = ImageCaptions(root=folder.parent if below else folder, image_size=8)
        assert [dataset.name(index) for index in range(2)] == [f"{below}sub/b.png", f"{below}a.png"]
        assert [dataset.load(index, generator())["caption"] for index in range(2)] == ["two", "one"]
        # The images of `root` itself, above the metadata file.
        assert dataset.left_out == ({"not in the metadata": 2} if below else {})

    def test_a_folder_in_the_layout_of_hugging_face_may_have_metadata_in_each_class(self, root: Path) -> None:
        for name in ("cat", "dog"):
            save(root / name / "0.png", "red")
            metadata(root / name / "metadata.csv", [{"file_name": "0.png", "text": f"a {name}"}])
        dataset = ImageCaptions(root=root, image_size=8)
        assert [dataset.load(index, generator())["caption"] for index in range(2)] == ["a cat", "a dog"]

    @pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
    def test_the_column_of_captions_may_be_named(self, root: Path, kind: str) -> None:
        rows = [{"path": "a.png", "text": "old", "caption": "also", "prompt": "new"}]
        file = metadata(root / f"list.{kind}", rows)
        dataset = ImageCaptions(file, image_size=8, text_column="prompt")
        assert dataset.load(0, generator())["caption"] == "new"
        with pytest.raises(ValueError, match="'text' or 'caption'"):
            ImageCaptions(file, image_size=8)
        with pytest.raises(ValueError, match="wanted (one column )?'words'"):
            ImageCaptions(file, image_size=8, text_column="words")

    def test_a_text_file_beside_each_image_is_its_caption(self, root: Path) -> None:
        write(root / "a.txt", "\ufeff a red\n thing \n")
        save(root / "a.bmp", "red")
        write(root / "sub" / "b.TXT", "blue")
        write(root / "notes.md", "for people")
        write(root / "spare.txt", "no image")
        dataset = ImageCaptions(root=root, image_size=8)
        assert [dataset.name(index) for index in range(3)] == ["a.bmp", "a.png", "sub/b.png"]
        captions = [dataset.load(index, generator())["caption"] for index in range(3)]
        assert captions == ["a red thing", "a red thing", "blue"]
        assert dataset.left_out == {".md": 1, ".txt without an image": 1}
        chosen = ImageCaptions(root=root, image_size=8, caption_lines="choose")
        assert {chosen.load(0, generator(seed))["caption"] for seed in range(20)} == {"a red", "thing"}
        # Text files with another suffix are used even beside a metadata file.
        write(root / "a.caption", "short")
        write(root / "sub" / "b.caption", "shorter")
        metadata(root / "metadata.csv", [{"file_name": "a.png", "text": "listed"}])
        assert len(ImageCaptions(root=root, image_size=8)) == 1
        assert (
            ImageCaptions(root=root, image_size=8, caption_suffix=".caption").load(2, generator())["caption"]
            == "shorter"
        )

    def test_missing_captions_are_named_or_empty(self, root: Path) -> None:
        with pytest.raises(
            ValueError, match=r"2 images and no captions: .*, or a \.txt file .*such as a\.txt"
        ):
            ImageCaptions(root=root, image_size=8)
        write(root / "a.txt", "\n")
        for number in range(3):
            save(root / f"c{number}.png", "red")
        write(root / "c0.txt", "a caption")
        named = (
            r"4 of 5 images have no caption: a.png \(a.txt is empty\), c1.png \(c1.txt is missing\), .*,"
            r" \.\.\.; missing_captions: empty"
        )
        with pytest.raises(ValueError, match=named):
            ImageCaptions(root=root, image_size=8)
        dataset = ImageCaptions(root=root, image_size=8, missing_captions="empty")
        assert [dataset.load(i, generator())["caption"] for i in range(5)] == ["", "a caption", "", "", ""]

    def test_what_is_not_clear_says_what_is_wanted(self, root: Path) -> None:
        table = write(root / "c.csv", TABLE)
        coco = write(root / "c.json", json.dumps(COCO))
        for arguments, message in (
            ({}, "needs captions_file or root, got neither"),
            ({"captions_file": root}, f"must be a file, got the folder {root}; wanted root: {root}"),
            (
                {"captions_file": table, "caption_suffix": ".txt"},
                "caption_suffix has no effect with the capt",
            ),
            (
                {"captions_file": table, "follow_links": True},
                "follow_links has no effect with the captions_f",
            ),
            ({"captions_file": table, "missing_captions": "empty"}, "missing_captions has no effect on capt"),
            (
                {"captions_file": coco, "text_column": "text"},
                "text_column has no effect on MS-COCO's captions",
            ),
            ({"root": root, "text_column": "text"}, "text_column needs one of metadata.csv, .*, got none"),
            ({"root": root, "caption_suffix": "txt"}, "needs caption_suffix such as '.txt', got 'txt'"),
            ({"root": root, "caption_lines": "first"}, r"caption_lines in \('join', 'choose'\), got 'first'"),
            ({"root": root / "none"}, "needs root to be a folder, got .*none"),
        ):
            with pytest.raises(ValueError, match=message):
                ImageCaptions(**arguments, image_size=8)
        rows = [{"file_name": "a.png", "text": "one"}]
        metadata(root / "metadata.csv", rows)
        with pytest.raises(ValueError, match="caption_lines has no effect on captions from .*metadata.csv"):
            ImageCaptions(root=root, image_size=8, caption_lines="choose")
        metadata(root / "metadata.jsonl", rows)
        with pytest.raises(ValueError, match="has metadata.csv, metadata.jsonl: wanted one of them"):
            ImageCaptions(root=root, image_size=8)
        for split in ("train", "test"):
            save(root / split / "0.png", "red")
        with pytest.raises(
            ValueError, match=r"splits test, train: wanted one of them as root, such as .*train"
        ):
            ImageCaptions(root=root, image_size=8)
        empty = root / "train" / "deep"
        empty.mkdir()
        with pytest.raises(ValueError, match="found no images below .*deep"):
            ImageCaptions(root=empty, image_size=8)

    def test_a_damaged_parquet_or_text_file_is_named(self, root: Path) -> None:
        with pytest.raises(ValueError, match=r"corrupt Parquet file .*list.parquet: ArrowInvalid"):
            ImageCaptions(write(root / "list.parquet", "x" * 100), image_size=8)
        # Its description at the end is whole, a page of captions is not.
        rows = [{"path": "a.png", "text": f"{number} red"} for number in range(1000)]
        damaged = metadata(root / "list.parquet", rows)
        content = damaged.read_bytes()
        damaged.write_bytes(b"\xff" * (len(content) // 2) + content[len(content) // 2 :])
        with pytest.raises(ValueError, match=r"corrupt Parquet file .*list.parquet: OSError"):
            ImageCaptions(damaged, image_size=8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "pyarrow", None)
            with pytest.raises(ImportError, match=r"pip install 'speedit-plugins\[data\]'"):
                ImageCaptions(damaged, image_size=8)
        (root / "a.txt").write_bytes(b"\xff")
        with pytest.raises(ValueError, match=r"a.txt must be UTF-8"):
            ImageCaptions(root=root, image_size=8)
