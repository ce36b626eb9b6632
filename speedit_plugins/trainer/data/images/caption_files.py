"""Reads files that list images and their captions: CSV, JSON lines, Parquet, or MS-COCO's JSON."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speedit_plugins.trainer.data.parquet_files import naming_damage, pyarrow_parquet
from speedit_plugins.trainer.data.tables import read_header, read_table

# Names in use for the path and the caption; a file or row has exactly one of each.
PATH_KEYS = ("file_name", "path")
TEXT_KEYS = ("text", "caption")


@dataclass(frozen=True, slots=True)
class Row:
    """One image of a captions file: its place in the file, its path as written there, its captions."""

    where: str
    path: str
    texts: tuple[str, ...]


def read_captions(file: Path, text_column: str | None = None) -> Iterator[Row]:
    """Yields the rows of a captions file, with paths and texts stripped of white space.

    Args:
        file: ends in one of READERS; see `ImageCaptions` for the layouts.
        text_column: name of the column with the captions; None takes "text" or "caption".

    Raises:
        ValueError: the file is missing, has another suffix or no rows, or a row is malformed (the message
            names its line).
        OSError: the system fails to read the file.
    """
    if not file.is_file():
        raise ValueError(f"the captions file must be a file, got {file}")
    if file.suffix.lower() not in READERS:
        raise ValueError(f"a captions file must end in one of {', '.join(READERS)}, got {file}")
    if text_column is not None and file.suffix.lower() == ".json":
        raise ValueError(f"text_column has no effect on MS-COCO's captions in {file}, got {text_column!r}")
    text_keys = TEXT_KEYS if text_column is None else (text_column,)
    is_empty = True
    try:
        for row in READERS[file.suffix.lower()](file, text_keys):
            is_empty = False
            yield _checked(row, file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8: {error}") from error
    if is_empty:
        raise ValueError(f"{file} has no captions, wanted at least one")


def _checked(row: Row, file: Path) -> Row:
    """The row with path and texts stripped; raises ValueError if one of them is empty or not Unicode."""
    place = f"{file}, {row.where}"
    path, texts = row.path.strip(), tuple(text.strip() for text in row.texts)
    if not path:
        raise ValueError(f"{place}: wanted the path of an image, got none")
    if not texts or not all(texts):
        raise ValueError(f"{place}: wanted a text for the image {path!r}, got none")
    try:
        "".join((path, *texts)).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: wanted valid Unicode text, got half a character: {error}") from error
    return Row(row.where, path, texts)


def _read_csv(file: Path, text_keys: Sequence[str]) -> Iterator[Row]:
    path_key, text_key = _columns(read_header(file), text_keys, f"{file}, line 1")
    for line, values in read_table(file, (path_key, text_key)):
        yield Row(f"line {line}", values[path_key], (values[text_key],))


def _read_parquet(file: Path, text_keys: Sequence[str]) -> Iterator[Row]:
    with naming_damage(file):
        table = pyarrow_parquet().ParquetFile(file)
    with table:
        columns = _columns(table.schema_arrow.names, text_keys, str(file))
        for number, content in enumerate(_contents(table, columns, file)):
            where = f"row {number}"
            path, text = (_one_of((name,), content, file, where) for name in columns)
            yield Row(where, path, (text,))


def _contents(table: Any, columns: Sequence[str], file: Path) -> Iterator[dict[str, Any]]:
    """The rows of an open Parquet file."""
    batches = table.iter_batches(columns=list(columns))
    while True:
        with naming_damage(file):
            batch = next(batches, None)
            contents = [] if batch is None else batch.to_pylist()
        if batch is None:
            return
        yield from contents


def _columns(header: Sequence[str], text_keys: Sequence[str], place: str) -> tuple[str, str]:
    """The one column of paths and the one of captions."""
    found = []
    for keys in (PATH_KEYS, text_keys):
        present = [name for name in header if name in keys]
        if len(present) != 1:
            wanted, got = " or ".join(map(repr, keys)), ", ".join(header) or "nothing"
            hint = "; text_column chooses" if keys is not PATH_KEYS and header else ""
            raise ValueError(f"{place}: wanted one column {wanted}, got {got}{hint}")
        found += present
    return found[0], found[1]


def _read_json_lines(file: Path, text_keys: Sequence[str]) -> Iterator[Row]:
    # Split at line feeds only: JSON strings may hold other characters that Python treats as line ends.
    with file.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"line {number}"
            content = _json(line, f"{file}, {where}")
            path, text = (_one_of(keys, content, file, where) for keys in (PATH_KEYS, text_keys))
            yield Row(where, path, (text,))


def _read_coco(file: Path, text_keys: Sequence[str]) -> Iterator[Row]:
    content = _json(file.read_text(encoding="utf-8"), str(file))
    images, annotations = (_list_of(content, name, file) for name in ("images", "annotations"))
    texts: dict[int | str, list[str]] = {}
    for number, image in enumerate(images):
        where = f"images[{number}]"
        key = image.get("id") if isinstance(image, dict) else None
        if not isinstance(key, int | str):
            raise ValueError(f"{file}, {where}: wanted 'id' as int or str, got {key!r}")
        if key in texts:
            raise ValueError(f"{file}, {where}: wanted a unique 'id', got {key!r} again")
        texts[key] = []
    for number, annotation in enumerate(annotations):
        where = f"annotations[{number}]"
        key = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not isinstance(key, int | str) or key not in texts:
            raise ValueError(f"{file}, {where}: wanted 'image_id' to be the id of an image, got {key!r}")
        texts[key].append(_one_of(("caption",), annotation, file, where))
    for number, image in enumerate(images):
        where = f"images[{number}]"
        yield Row(where, _one_of(("file_name",), image, file, where), tuple(texts[image["id"]]))


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    # Deeply nested JSON exceeds the parser's recursion limit.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: wanted JSON: {error}") from error


def _list_of(content: Any, name: str, file: Path) -> list[Any]:
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise ValueError(f"{file} needs a list {name!r}, as in MS-COCO's captions")
    return found


def _one_of(keys: Sequence[str], content: Any, file: Path, where: str) -> str:
    """The text under the one key of `keys` that the object has."""
    wanted = " or ".join(map(repr, keys))
    if not isinstance(content, dict):
        raise ValueError(f"{file}, {where}: wanted an object with {wanted}, got {content!r}")
    present = [key for key in keys if key in content]
    if len(present) != 1:
        raise ValueError(f"{file}, {where}: wanted {wanted}, got {', '.join(content) or 'nothing'}")
    value = content[present[0]]
    if not isinstance(value, str):
        raise ValueError(f"{file}, {where}: wanted {present[0]!r} as str, got {value!r}")
    return value


READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".json": _read_coco,
    ".parquet": _read_parquet,
}
