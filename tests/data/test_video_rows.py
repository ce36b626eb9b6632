"""The rows of a table of videos, and what a malformed table is told."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speedit_plugins.trainer.data.videos.table import VideoTable, read_rows

pytest.importorskip("av")


def table(folder: Path, text: str) -> Path:
    (folder / "videos.csv").write_text(text, encoding="utf-8")
    return folder / "videos.csv"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ", line 1: wanted one column 'path', got nothing"),
        ("path,num_frames\na.mp4,3\n", "line 1: wanted one column 'text', got path, num_frames"),
        ("path,text,text\na.mp4,x,y\n", "wanted one column 'text', got path, text, text"),
        ("path,text,fps,fps\na.mp4,x,8,9\n", "wanted one column 'fps', got path, text, fps, fps"),
        ("path,text\n", "has no rows, wanted one row per video"),
        ("path,text\n\n\n", "has no rows"),
        (
            "path,text,num_frames\na,x,3\nb,y,many\n",
            "line 3, column num_frames: got 'many', wanted a whole",
        ),
        (
            "path,text,num_frames\na,x,3.5\n",
            "line 2, column num_frames: got '3.5', wanted a whole number",
        ),
        (
            "path,text,num_frames\na,x,1e30\n",
            "line 2, column num_frames: got '1e30', wanted a whole number > 0, at most 2147483647",
        ),
        ("path,text,height\na,x,-1\n", "line 2, column height: got '-1', wanted a whole number > 0"),
        ("path,text,fps\na,x,inf\n", "line 2, column fps: got 'inf', wanted a number > 0"),
        ("path,text\na,\n", "line 2, column text: got nothing, wanted a text"),
        ("path,text\n ,x\n", "line 2, column path: got nothing, wanted a path"),
        ("path,text\na,x,y\n", "line 2: wanted 2 fields, got 3; text with commas needs quotes"),
        ("path,text\na\n", "line 2: wanted 2 fields, got 1"),
        ('path,text\na,"x\n', "line 2: wanted CSV: unexpected end of data"),
    ],
)
def test_an_error_names_the_place_in_the_table(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"videos\.csv.*{message}"):
        VideoTable(table(tmp_path, text), image_size=8, num_frames=2)


def test_white_space_around_names_and_values_is_stripped(tmp_path: Path) -> None:
    text = ' path,text , label\n a.mp4 ," one, first ", run\nb.mp4,two,run \n'
    rows = read_rows(table(tmp_path, text), ("path", "text", "label"))
    found = [[row[name] for name in ("path", "text", "label")] for row in rows]
    assert found == [["a.mp4", "one, first", "run"], ["b.mp4", "two", "run"]]


def test_a_missing_table_and_another_encoding_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.csv", tmp_path):
        with pytest.raises(ValueError, match=f"must be a CSV file, got {path}"):
            VideoTable(path, image_size=8, num_frames=2)
    (tmp_path / "latin.csv").write_bytes("path,text\na,ü\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.csv must be UTF-8"):
        VideoTable(tmp_path / "latin.csv", image_size=8, num_frames=2)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=60))
def test_any_bytes_give_rows_or_an_error_with_the_name(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "x.csv"
    path.write_bytes(b"path,num_frames\n" + content)
    try:
        outcome = [row["path"].strip() for row in read_rows(path, ["path"])]
    except ValueError as error:
        outcome = ["x.csv" in str(error)]
    assert outcome
    assert all(outcome)
