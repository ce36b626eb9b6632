"""Whether mesh files in text hold as much as their headers say: parsers take what is there.

An `.obj` has no such header, and binary files fail in the parser.
"""

from collections.abc import Sequence
from pathlib import Path

# An element of a file: its name, how many there are, and for each property whether it is a list.
_Element = tuple[str, int, list[bool]]


def check_whole(path: Path) -> None:
    """Nothing, if the file is a mesh that a parser could read, and has all that its header promises.

    Raises:
        ValueError: a `.ply` or `.off` in text ends too early.
        OSError: the file cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".off":
        _check_off(path.read_text(encoding="utf-8", errors="replace"))
    elif suffix == ".ply":
        head, _, body = path.read_bytes().partition(b"end_header")
        if b"format ascii" in head:
            _check_ply(head.decode(errors="replace"), body.decode(errors="replace"))


def _check_ply(head: str, body: str) -> None:
    elements: list[_Element] = []
    for words in map(str.split, head.splitlines()):
        if words[:1] == ["element"]:
            name = "vertices" if words[1] == "vertex" else f"{words[1]}s"
            elements.append((name, int(words[2]), []))
        elif words[:1] == ["property"]:
            elements[-1][2].append(words[1] == "list")
    _check_rows(_rows(body), elements)


def _check_off(text: str) -> None:
    told = "\n".join(line.partition("#")[0] for line in text.splitlines())
    # The counts may follow the word directly, as in ModelNet's files.
    rows = _rows(told.partition("OFF")[2])
    vertices, faces = map(int, rows[0][:2])
    _check_rows(rows[1:], [("vertices", vertices, [False] * 3), ("faces", faces, [True])])


def _rows(text: str) -> list[list[str]]:
    return [words for words in map(str.split, text.splitlines()) if words]


def _check_rows(rows: Sequence[list[str]], elements: Sequence[_Element]) -> None:
    """Nothing, if the rows hold these elements, one each."""
    start = 0
    for name, number, are_lists in elements:
        found = rows[start : start + number]
        start += number
        num_whole = len(found) - bool(found and not _is_whole(found[-1], are_lists))
        if num_whole < number:
            raise ValueError(f"it ends after {num_whole:,} of {number:,} {name}")


def _is_whole(words: Sequence[str], are_lists: Sequence[bool]) -> bool:
    """Whether a row has all values of its properties: a list is a number, and as many values."""
    place = 0
    for is_list in are_lists:
        if place >= len(words):
            return False
        place += 1 + (int(float(words[place])) if is_list else 0)
    return place <= len(words)
