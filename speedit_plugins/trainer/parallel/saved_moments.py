"""The optimizer's tensors of a checkpoint, assembled from the files of all ranks."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


class Moments(Mapping[str, Tensor]):
    """Whole optimizer tensors by name, assembled from the files of all ranks that saved.

    Each is read when it is asked for: the moments of a large model do not fit into memory beside it.
    """

    def __init__(self, folder: Path) -> None:
        self._files = [
            safe_open(path, framework="pt") for path in sorted(folder.glob("optimizer_*.safetensors"))
        ]
        self._places: dict[str, list[tuple[int, int]]] = {}
        for number, file in enumerate(self._files):
            starts = json.loads(file.metadata()["starts"])
            for name in file.keys():  # noqa: SIM118 - not a mapping
                self._places.setdefault(name, []).append((number, starts[name]))

    def __getitem__(self, name: str) -> Tensor:
        # Every rank wrote the scalars, with start 0.
        parts = {start: self._files[number].get_tensor(name) for number, start in self._places[name]}
        return torch.cat([parts[start] for start in sorted(parts)])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
