"""Named tensors of many samples as shards on disk, written whole and read by sample.

A folder holds `shard_00000.safetensors`, ... and `index.json`, which says what made them. The first dimension
of every tensor in a shard is its samples. A file appears whole or not at all, the index after its shard.

Dims: `B` samples.
"""

import bisect
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from speedit_plugins.files import sha256_of, write_whole

INDEX = "index.json"
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One file of a folder, as it was written; `sha256` in hexadecimal."""

    file: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """What `index.json` says.

    Args:
        made_from: plain JSON values that decide the contents.
        num_samples: of the whole cache.
        tensors: "dtype" and "shape" of one sample's tensors, by name; empty before the first shard.
        shards: those that are done, in the order of their samples.
        format: of the files, FORMAT.
    """

    made_from: dict[str, Any]
    num_samples: int
    tensors: dict[str, dict[str, Any]]
    shards: tuple[Shard, ...]
    format: int = FORMAT

    @property
    def num_done(self) -> int:
        """Samples in the shards that are done."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Size of the shards that are done."""
        return sum(shard.num_bytes for shard in self.shards)


class TensorShards:
    """Reads a finished folder of shards, mapped into memory when a sample of theirs is first asked for.

    Workers may inherit it by fork or get it pickled: they share the pages of the files, not copies.

    Args:
        folder: with `index.json`.
        verify: compare the sha256 of every shard; sizes are always compared.

    Raises:
        ValueError: no index, an unfinished cache, a shard that is missing or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.folder = Path(folder).expanduser()
        self.index = read_index(self.folder)
        if self.index.num_done != self.index.num_samples:
            raise ValueError(
                f"the cache in {self.folder} has {self.index.num_done} of {self.index.num_samples} samples;"
                " the command that made it goes on where it stopped"
            )
        for shard in self.index.shards:
            check_shard(self.folder, shard, verify=verify)
        self._ends = list(accumulate(shard.num_samples for shard in self.index.shards))
        self._mapped: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self.index.num_samples

    def __getstate__(self) -> dict[str, Any]:
        # A pickled tensor is a copy: whoever unpickles this maps the files itself.
        return {**self.__dict__, "_mapped": {}}

    def load(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Copies of one sample's tensors of these names, in the dtypes of the files.

        Raises:
            IndexError: no such sample.
            ValueError: its shard can no longer be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"the cache in {self.folder} has {len(self)} samples, got index {index}")
        number = bisect.bisect_right(self._ends, index)
        if number not in self._mapped:
            self._mapped[number] = _map(self.folder / self.index.shards[number].file)
        row = index - self._ends[number]  # counted from the shard's end, as negative rows are
        # Copies: the map is this process's own, and a write into it would stay.
        return {name: self._mapped[number][name][row].clone() for name in names}


def start_or_resume(folder: Path, *, made_from: Mapping[str, Any], num_samples: int) -> ShardIndex:
    """The index of what is done in the folder: up to the last whole shard, nothing in a new folder.

    Args:
        folder: created where it is missing.
        made_from: see `ShardIndex`, as for `num_samples`.

    Raises:
        ValueError: the folder's cache is made from something else; the message says what differs.
    """
    index = ShardIndex(json.loads(json.dumps(made_from)), num_samples, tensors={}, shards=())
    if not (folder / INDEX).exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_index(folder, index)
        return index
    found = read_index(folder)
    differences = _differences(
        {"num_samples": found.num_samples, **found.made_from}, {"num_samples": num_samples, **index.made_from}
    )
    if differences:
        raise ValueError(
            f"the cache in {folder} is made from something else: {'; '.join(differences)};"
            " wanted another folder, or the old cache deleted"
        )
    for number, shard in enumerate(found.shards):
        try:
            check_shard(folder, shard)
        except ValueError:
            # What follows it is written again as well: the index lists shards without gaps.
            return replace(found, shards=found.shards[:number])
    return found


def append_shard(folder: Path, index: ShardIndex, tensors: Mapping[str, Tensor]) -> ShardIndex:
    """Writes the next shard and the index, each whole or not at all; the index with the shard in it.

    Args:
        folder: the cache's.
        index: of the shards before it.
        tensors: (B, ...) each, with the names, dtypes and shapes of the shards before it.

    Raises:
        ValueError: tensors of unequal first dimension, unlike those before, or more than `num_samples`.
        OSError: a file cannot be written; the shards before it stay as they are.
    """
    counts = {len(tensor) for tensor in tensors.values()}
    if len(counts) != 1 or not 0 < min(counts) <= index.num_samples - index.num_done:
        raise ValueError(
            f"a shard needs tensors of one first dimension in 1..{index.num_samples - index.num_done},"
            f" got {sorted(counts)}"
        )
    layout = {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape[1:])}
        for name, tensor in sorted(tensors.items())
    }
    if index.shards and layout != index.tensors:
        raise ValueError(f"a shard needs tensors like those before, {index.tensors}, got {layout}")
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    file = f"shard_{len(index.shards):05d}.safetensors"
    write_whole(folder / file, content)
    shard = Shard(file, counts.pop(), len(content), hashlib.sha256(content).hexdigest())
    index = replace(index, tensors=layout, shards=(*index.shards, shard))
    _write_index(folder, index)
    return index


def read_index(folder: Path) -> ShardIndex:
    """The index of a folder; the shards are not looked at.

    Raises:
        ValueError: there is none, or it is damaged or of another format.
    """
    path = folder / INDEX
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        index = ShardIndex(**{**content, "shards": tuple(Shard(**shard) for shard in content["shards"])})
    except FileNotFoundError as error:
        raise ValueError(f"no cache in {folder}: it has no {INDEX}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the index {path} is damaged: {type(error).__name__}: {error}") from error
    if index.format != FORMAT:
        raise ValueError(f"the index {path} has format {index.format}, wanted {FORMAT}")
    return index


def check_shard(folder: Path, shard: Shard, *, verify: bool = True) -> None:
    """Raises ValueError unless the shard is there with its size and, with `verify`, its sha256."""
    path = folder / shard.file
    if not path.is_file():
        raise ValueError(f"the shard {path} is missing")
    num_bytes = path.stat().st_size
    if num_bytes != shard.num_bytes:
        raise ValueError(f"the shard {path} is damaged: wanted {shard.num_bytes} bytes, got {num_bytes}")
    if verify and sha256_of(path) != shard.sha256:
        raise ValueError(f"the shard {path} is damaged: its sha256 is not that of {INDEX}")


def _map(path: Path) -> dict[str, Tensor]:
    """The tensors of a shard; their values are read from the file when they are used."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the shard {path} cannot be read: {error}") from error


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], path: str = "") -> list[str]:
    """'key was X, got Y' for each value that differs, by dotted key."""
    lines: list[str] = []
    for key in sorted({*found, *wanted}):
        old, new = (section.get(key, "nothing") for section in (found, wanted))
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f"{path}{key}.")
        elif old != new:
            lines.append(f"{path}{key} was {old}, got {new}")
    return lines


def _write_index(folder: Path, index: ShardIndex) -> None:
    write_whole(folder / INDEX, f"{json.dumps(asdict(index), indent=2)}\n".encode())
