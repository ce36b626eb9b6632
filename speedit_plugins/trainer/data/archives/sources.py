"""Finds the local files that a dataset's `root` names: a file, a folder, a pattern, or a list of these."""

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

# A scheme such as s3:// or hf://, or one of WebDataset's commands in place of a file.
REMOTE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://|pipe:")
# The text inside the innermost braces: {000..099} or {train,val}.
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
# A file's name as Hugging Face writes it, with the split in front.
SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}")
# An error message names at most this many missing files.
NUM_NAMED = 3

Root = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def find_files(root: Root, *, suffix: str, reader: str) -> list[Path]:
    """The files that `root` names, without repetition: each pattern's files sorted, patterns as given.

    Args:
        root: a file, a folder (all files below it with the suffix, hidden ones left out), a pattern with `*`,
            `?` or `[...]`, names with braces such as `{000..099}.tar`, or a list of these. `~` is the home
            folder.
        suffix: suffix of the files in a folder, such as ".tar".
        reader: the dataset, named in messages.

    Raises:
        ValueError: a remote address, no such file, a pattern that matches nothing, or a folder without files
            or with several splits.
    """
    roots = [root] if isinstance(root, str | os.PathLike) else root
    if not isinstance(roots, Sequence) or not roots:
        raise ValueError(f"{reader} needs root to be a path, a pattern or a list of them, got {root!r}")
    found: dict[Path, None] = {}
    for each in roots:
        if not isinstance(each, str | os.PathLike):
            raise ValueError(f"{reader} needs root to be a path, a pattern or a list of them, got {each!r}")
        text = os.fspath(each)
        check_local(text, reader)
        found |= dict.fromkeys(_named(os.path.expanduser(text), suffix=suffix, reader=reader))
    return list(found)


def check_local(root: str, reader: str) -> None:
    """Raises ValueError if `root` is not a local path."""
    if REMOTE.match(root):
        raise ValueError(
            f"{reader} reads local files, got {root!r}: copy the files to a disk first (aws s3 sync,"
            " gcloud storage rsync, hf download) or mount the bucket, and give root the local path"
        )


def expand_braces(text: str) -> Iterator[str]:
    """Every name that a text with braces means, in order; the text itself if it has none.

    Example:
        >>> list(expand_braces("{08..10}.tar"))
        ['08.tar', '09.tar', '10.tar']
    """
    found = next((part for part in BRACES.finditer(text) if _choices(part[1]) is not None), None)
    if found is None:
        yield text
        return
    for choice in _choices(found[1]) or ():
        yield from expand_braces(text[: found.start()] + choice + text[found.end() :])


def _choices(inside: str) -> Sequence[str] | None:
    """What braces choose from; None if they are part of a name."""
    if bounds := RANGE.fullmatch(inside):
        first, last = bounds.groups()
        # As in bash, a leading zero keeps the width.
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    return inside.split(",") if "," in inside else None


def _named(text: str, *, suffix: str, reader: str) -> list[Path]:
    """The files of one entry of `root`."""
    names = list(itertools.islice(expand_braces(text), 1_000_000))
    if not names:
        raise ValueError(
            f"{reader}: the braces in {text!r} name no file; wanted {{000..099}}, smallest first"
        )
    files: list[Path] = []
    missing: list[str] = []
    for name in names:
        path = Path(name)
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            files += _below(path, suffix=suffix, reader=reader)
        elif matches := sorted(filter(os.path.isfile, glob.glob(name, recursive=True))):
            files += map(Path, matches)
        else:
            missing.append(name)
    if missing:
        named = ", ".join(missing[:NUM_NAMED]) + (", ..." if len(missing) > NUM_NAMED else "")
        total = f"{len(missing)} of {len(names)} names in root have no file" if len(names) > 1 else "no file"
        raise ValueError(f"{reader}: {total}: {named}")
    return files


def _below(folder: Path, *, suffix: str, reader: str) -> list[Path]:
    """The files with the suffix in and below a folder, sorted."""
    found = sorted(
        path
        for path in folder.rglob(f"*{suffix}")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise ValueError(f"{reader} found no {suffix} files below {folder}")
    # Several of either would mix what is kept apart, such as train and test.
    folders = sorted({path.parent for path in found})
    splits = sorted({match[1] for path in found if (match := SPLIT.fullmatch(path.stem))})
    if len(folders) > 1:
        got, wanted = f"in the folders {', '.join(map(str, folders[:NUM_NAMED]))}", folders[-1] / f"*{suffix}"
    elif len(splits) > 1:
        got, wanted = f"of the splits {', '.join(splits)}", folders[0] / f"{splits[-1]}-*{suffix}"
    else:
        return found
    raise ValueError(f"{reader}: {folder} has {suffix} files {got}; wanted a pattern, such as root: {wanted}")
