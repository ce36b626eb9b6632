"""The identity of a dataset: short digests of what it consists of, and what differs between two of them.

A run and a latent cache keep the identity of their data. It has one digest per block of samples, so that a
message can say where the data changed. Names are relative: moving a folder as a whole changes nothing.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from speedit_plugins.trainer.data.strings import Strings

# Aspect of the data, such as "names" -> "BLOCK:DIGESTS", with the size of a block and a digest for each.
Identity = Mapping[str, str]
# Aspects that decide which sample an epoch gives when, or what a label means to the model.
DECISIVE = ("contents", "names", "classes")
# The aspect that changes when files are copied.
TIMES = "times"
# Hexadecimal digits of a digest: 48 bits, so that a change goes unseen with probability 4e-15.
_DIGITS = 12
_MAX_BLOCKS = 256
_PHRASES = {
    "contents": "the built-in data differ",
    "names": "the names differ",
    "classes": "the classes differ",
    "labels": "the labels differ",
    "captions": "the captions differ",
    "sizes": "files have other sizes",
    "times": "files were written again",
    "latents": "the cached latents differ",
}


@runtime_checkable
class Identified(Protocol):
    """A dataset that knows what it consists of, see `identify`."""

    def identity(self) -> Identity: ...


class Digestible(Protocol):
    """A value for each of N samples; `digest` hashes those from `start` to before `stop`."""

    def __len__(self) -> int: ...

    def digest(self, start: int, stop: int) -> bytes: ...


@dataclass(frozen=True)
class Change:
    """One aspect in which two identities differ; `is_everywhere` if they do in every block."""

    aspect: str
    text: str
    is_everywhere: bool


def identify(**aspects: Digestible | np.ndarray | Sequence[str]) -> dict[str, str]:
    """The identity of a dataset.

    Args:
        aspects: per aspect a value for each of the N samples, or, for "classes", for each class.
    """
    return {aspect: _digests(values) for aspect, values in aspects.items()}


def portable(base: Path, names: Iterable[str]) -> list[str]:
    """Paths that stay the same if the data are moved as a whole.

    Absolute paths become relative to `base`, or, if they lead elsewhere, to the deepest folder they share.
    """
    inner = f"{base}{os.sep}"
    found = [name.removeprefix(inner) for name in names]
    elsewhere = [os.path.dirname(name) for name in found if os.path.isabs(name)]
    if not elsewhere:
        return found
    shared = f"{os.path.commonpath(elsewhere).rstrip(os.sep)}{os.sep}"
    return [name.removeprefix(shared) for name in found]


def differences(saved: Identity, found: Identity, dataset: object = None) -> list[Change]:
    """The aspects that both identities have and in which they differ, the decisive ones first.

    Args:
        saved: the identity as it was.
        found: the identity of `dataset`.
        dataset: names the first sample that differs, with its method `name`; None names none.
    """
    shared = [aspect for aspect in _PHRASES if aspect in saved and aspect in found]
    return [_change(each, saved[each], found[each], dataset) for each in shared if saved[each] != found[each]]


def position_in(
    position: Mapping[str, int],
    saved: Identity | None,
    data: tuple[int, Identity | None, object],
    *,
    arrangement: Mapping[str, int],
    accept_changed: bool,
) -> tuple[dict[str, int], list[str]]:
    """A saved position of a loader, in the data as they are now, and lines about what changed.

    Args:
        position: has "epoch", "offset" and "size".
        saved: the identity saved with it; None in a checkpoint of an earlier version.
        data: number of samples, identity (None if it has none) and the dataset itself.
        arrangement: what else decides the order. Keys that end in "_crc32" are checksums of the data's parts.
        accept_changed: go to the start of the next epoch if the order of samples or the meaning of labels
            changed. It stays the same if only captions, labels, sizes or times of files did.

    Raises:
        ValueError: these changed, and `accept_changed` is False.
    """
    size, found, dataset = data
    changes = differences(saved or {}, found or {}, dataset)
    decisive = [change.text for change in changes if change.aspect in DECISIVE]
    if position["size"] != size:
        decisive.insert(0, f"there were {position['size']} samples and are {size}")
    if accept_changed and any(
        position.get(key) != value for key, value in arrangement.items() if key.endswith("_crc32")
    ):
        decisive.append("samples are in other buckets or chunks")
    notes = [
        f"the data changed since the checkpoint: {change.text}"
        for change in changes
        if change.aspect not in DECISIVE
    ]
    if found is not None and not any(aspect in (saved or {}) and aspect in found for aspect in DECISIVE):
        was = "does not say what data it has seen" if saved is None else "has seen data of another kind"
        notes.append(f"the checkpoint {was}: only the number of samples was compared")
    if not decisive:
        return dict(position), notes
    if not accept_changed:
        raise ValueError(
            f"the saved position belongs to other data: {'; '.join(decisive)}. data.accept_changed: true goes"
            " on with the data as they are, from the start of the next epoch"
        )
    epoch = position["epoch"] + (position["offset"] > 0)
    note = f"the data changed since the checkpoint: {'; '.join(decisive)}: going on with epoch {epoch}"
    return {**position, "epoch": epoch, "offset": 0, "size": size}, [note, *notes]


def _digests(values: Digestible | np.ndarray | Sequence[str]) -> str:
    if not isinstance(values, np.ndarray) and not hasattr(values, "digest"):
        values = Strings(values)
    size = len(values)
    block = 1
    while size > block * _MAX_BLOCKS:
        block *= 2
    digests = (_digest(values, start, min(start + block, size)) for start in range(0, size, block))
    return f"{block}:{''.join(digests)}"


def _digest(values: Digestible | np.ndarray, start: int, stop: int) -> str:
    if isinstance(values, np.ndarray):
        content = values[start:stop].astype("<i8").tobytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()[:_DIGITS]
    return values.digest(start, stop).hex()[:_DIGITS]


def _change(aspect: str, saved: str, found: str, dataset: object) -> Change:
    (was_block, was), (block, now) = (_parsed(text) for text in (saved, found))
    phrase = _PHRASES[aspect]
    if was_block != block or aspect in ("classes", "contents", "latents"):
        return Change(aspect, phrase, is_everywhere=True)
    differ = [number for number, pair in enumerate(zip_longest(was, now)) if pair[0] != pair[1]]
    first = differ[0] * block
    place = f"sample {first}" if block == 1 else f"samples {first} to {first + block - 1}"
    name = getattr(dataset, "name", None)
    named = f", {name(first)}" if callable(name) and differ[0] < len(now) else ""
    count = f"{len(differ)} of {len(now)}" + ("" if block == 1 else f" blocks of {block}")
    text = f"{phrase} ({count}, the first is {place}{named})"
    return Change(aspect, text, is_everywhere=len(differ) == len(now) > 1)


def _parsed(text: str) -> tuple[int, list[str]]:
    block, _, digests = text.partition(":")
    return int(block), [digests[i : i + _DIGITS] for i in range(0, len(digests), _DIGITS)]
