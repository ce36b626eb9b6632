"""Which sample of the data each enlarged one was made of, kept beside them, for metrics of pairs.

Dims: B images, H x W pixels, C channels.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from speedit_plugins.files import write_whole
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.logging import images
from speedit_plugins.trainer.results import ITEMS
from speedit_plugins.trainer.sampling.conditions import Conditions
from speedit_plugins.trainer.sampling.files.sample_sets import SampleSet
from speedit_plugins.trainer.sampling.super_resolution.low_resolution_sets import (
    FromData,
    LowResolutionInputs,
)


def write_items(conditions: Conditions, rows: Sequence[int], folder: Path, *, suffix: str) -> None:
    """Writes a line for each sample: its file, the item of the data it was made of, and the item's hash.

    Nothing is written for samples that were not made of the data.

    Args:
        conditions: of the samples.
        rows: which of their inputs each sample has.
        folder: where the samples are.
        suffix: of their files.
    """
    inputs = conditions.inputs
    if not isinstance(inputs, LowResolutionInputs) or not isinstance(inputs.samples, FromData):
        return
    data, hashes = inputs.samples, dict[int, str]()
    lines = []
    for number, row in enumerate(rows):
        if row not in hashes:
            hashes[row] = _hash(data.originals(torch.tensor([row])))
        about = {"file_name": f"{number:06d}{suffix}", "item": int(data.items[row]), "sha256": hashes[row]}
        lines.append(json.dumps(about))
    write_whole(folder / ITEMS, "".join(f"{line}\n" for line in lines).encode())


def enlarged_pairs(
    config: ExperimentConfig, samples: SampleSet, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Enlarged samples and what they were made of, each uint8 (B, H, W, C), a batch at a time.

    Raises:
        ValueError: it is not known of a sample, or the data have another one there now.
    """
    folder = None if samples.captions_file is None else samples.captions_file.parent
    path = Path(folder or ".") / ITEMS
    if folder is None or not path.is_file():
        raise ValueError(
            f"metrics of pairs need what {samples.source} was made of, got no {path}; wanted what inference"
            " enlarged of the data, without low_resolution and cascade"
        )
    about = _lines(path, len(samples))
    data = FromData(config, num_samples=1)
    done = 0
    for batch in samples.batches(batch_size):
        given = []
        for name, item, known in about[done : done + len(batch)]:
            original = data.loaded([item]) if 0 <= item < len(data.dataset) else None
            if original is None or _hash(original) != known:
                raise ValueError(
                    f"{samples.source}: the data have another sample in place of that of {name}; wanted the"
                    " dataset, seed and data.held_out_samples of the inference"
                )
            given.append(original)
        yield batch, torch.from_numpy(images.to_uint8(torch.cat(given)))
        done += len(batch)


def _lines(path: Path, count: int) -> list[tuple[str, int, str]]:
    """File name, item and hash of each sample.

    Raises:
        ValueError: a line is none of `write_items`, or there are not `count` of them.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        found = [(str(row["file_name"]), int(row["item"]), str(row["sha256"])) for row in rows]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise ValueError(
            f"{path}: wanted lines with file_name, item and sha256, as inference wrote them"
        ) from None
    if len(found) != count:
        raise ValueError(
            f"metrics of pairs need a line for each of {count} samples, got {len(found)} in {path}"
        )
    return found


def _hash(original: Tensor) -> str:
    """SHA-256 of a sample's pixels in 8 bits."""
    return hashlib.sha256(np.ascontiguousarray(images.to_uint8(original)).tobytes()).hexdigest()
