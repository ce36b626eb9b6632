"""Stores named tensors of many samples in shards on disk and reads them back sample by sample.

A folder holds `shard_00000.safetensors`, `shard_00001.safetensors`, ... and `index.json`. The index records
what the contents were made from. The first dimension of every tensor in a shard is the sample. Files are
written atomically, the index after the shard it lists.

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
from speedit_plugins.trainer.data.latents.source import CLASSES, IDENTITY, without_places

INDEX = "index.json"
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """One shard file as it was written; `sha256` is in hexadecimal."""

    file: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """Contents of `index.json`.

    Args:
        made_from: JSON values that decide the contents: dataset, encoder, options.
        num_samples: number of samples of the finished cache.
        tensors: "dtype" and "shape" of each tensor of one sample, by name; empty before the first shard.
        shards: finished shards, in order of their samples.
        format: version of the file format, FORMAT.
    """

    made_from: dict[str, Any]
    num_samples: int
    tensors: dict[str, dict[str, Any]]
    shards: tuple[Shard, ...]
    format: int = FORMAT

    @property
    def num_done(self) -> int:
        """Number of samples in finished shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Size of the finished shards."""
        return sum(shard.num_bytes for shard in self.shards)


class TensorShards:
    """Reads samples from a finished folder of shards.

    A shard is memory-mapped when one of its samples is first read. Workers share the mapped pages, whether
    they are forked or spawned.

    Args:
        folder: the folder with `index.json`.
        verify: compare the sha256 of every shard, which reads them all. Sizes are always compared.

    Raises:
        ValueError: there is no index, the cache is unfinished, or a shard is missing or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.folder = Path(folder).expanduser()
        self.index = read_index(self.folder)
        if self.index.num_done != self.index.num_samples:
            raise ValueError(
                f"the cache in {self.folder} is unfinished: it has {self.index.num_done} of"
                f" {self.index.num_samples} samples; run the command that made it again to finish it"
            )
        for shard in self.index.shards:
            check_shard(self.folder, shard, verify=verify)
        self._ends = list(accumulate(shard.num_samples for shard in self.index.shards))
        self._mapped: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self.index.num_samples

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a mapped tensor would copy it; the receiving process maps the files itself.
        return {**self.__dict__, "_mapped": {}}

    def load(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors `names` of one sample, as copies, in the dtypes of the files.

        Raises:
            IndexError: `index` is out of range.
            ValueError: the shard can no longer be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"the cache in {self.folder} has {len(self)} samples, got index {index}")
        number = bisect.bisect_right(self._ends, index)
        if number not in self._mapped:
            self._mapped[number] = _map(self.folder / self.index.shards[number].file)
        row = index - self._ends[number]  # negative: counted from the end of the shard
        # Copies, since a write into the mapped tensor would change later reads.
        return {name: self._mapped[number][name][row].clone() for name in names}


def start_or_resume(folder: Path, *, made_from: Mapping[str, Any], num_samples: int) -> ShardIndex:
    """Opens a folder for writing and returns the index of the shards that are already finished and intact.

    Args:
        folder: created if it is missing.
        made_from: see `ShardIndex`. Where the data lie is not compared if their identity is known, and the
            identity itself is for `check_same_source`.
        num_samples: see `ShardIndex`.

    Raises:
        ValueError: the folder holds a cache made from something else; the message lists the differences.
    """
    index = ShardIndex(json.loads(json.dumps(made_from)), num_samples, tensors={}, shards=())
    if not (folder / INDEX).exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_index(folder, index)
        return index
    found = read_index(folder)
    if IDENTITY in found.made_from and IDENTITY in index.made_from:
        was, now = (without_places(each.made_from) for each in (found, index))
    else:
        was, now = ({**each.made_from, IDENTITY: None} for each in (found, index))
    # Names are part of the identity. A cache of an earlier version has none, and goes on without.
    for each in (was, now):
        each.pop(CLASSES, None)
    differences = _differences({"num_samples": found.num_samples, **was}, {"num_samples": num_samples, **now})
    if differences:
        raise ValueError(
            f"the cache in {folder} was made from something else: {'; '.join(differences)};"
            " use another folder or delete the old cache"
        )
    for number, shard in enumerate(found.shards):
        try:
            check_shard(folder, shard)
        except ValueError:
            # The shards after a damaged one are written again too: the index has no gaps.
            return replace(found, shards=found.shards[:number])
    return found


def append_shard(folder: Path, index: ShardIndex, tensors: Mapping[str, Tensor]) -> ShardIndex:
    """Writes the next shard, then the index, each atomically, and returns the new index.

    Args:
        folder: folder of the cache.
        index: index of the shards written so far.
        tensors: (B, ...) each; names, dtypes and shapes as in the earlier shards.

    Raises:
        ValueError: the first dimensions differ, names, dtypes or shapes differ from earlier shards, or the
            total would exceed `num_samples`.
        OSError: a file cannot be written; earlier shards stay intact.
    """
    counts = {len(tensor) for tensor in tensors.values()}
    if len(counts) != 1 or not 0 < min(counts) <= index.num_samples - index.num_done:
        raise ValueError(
            f"a shard needs tensors with one first dimension in 1..{index.num_samples - index.num_done},"
            f" got {sorted(counts)}"
        )
    layout = {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape[1:])}
        for name, tensor in sorted(tensors.items())
    }
    if index.shards and layout != index.tensors:
        raise ValueError(f"a shard needs the tensors of earlier shards, {index.tensors}, got {layout}")
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    file = f"shard_{len(index.shards):05d}.safetensors"
    write_whole(folder / file, content)
    shard = Shard(file, counts.pop(), len(content), hashlib.sha256(content).hexdigest())
    index = replace(index, tensors=layout, shards=(*index.shards, shard))
    _write_index(folder, index)
    return index


def read_index(folder: Path) -> ShardIndex:
    """Reads the index of a folder without checking the shards.

    Raises:
        ValueError: the index is missing, damaged or of another format.
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
    """Raises ValueError if the shard is missing or has another size or, with `verify`, another sha256."""
    path = folder / shard.file
    if not path.is_file():
        raise ValueError(f"the shard {path} is missing")
    num_bytes = path.stat().st_size
    if num_bytes != shard.num_bytes:
        raise ValueError(f"the shard {path} is damaged: wanted {shard.num_bytes} bytes, got {num_bytes}")
    if verify and sha256_of(path) != shard.sha256:
        raise ValueError(f"the shard {path} is damaged: its sha256 differs from the one in {INDEX}")


def _map(path: Path) -> dict[str, Tensor]:
    """The memory-mapped tensors of a shard; values are read from disk on first use."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the shard {path} cannot be read: {error}") from error


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], path: str = "") -> list[str]:
    """One 'key was X, got Y' per value that differs, with dotted keys for nested values."""
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
