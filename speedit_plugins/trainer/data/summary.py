"""What a dataset holds, in a few lines: for a person who is about to train on it.

Dims: N samples, K buckets.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from speedit_plugins.trainer.data.buckets import usable_size

# A line names at most this many classes, buckets or reasons.
NUM_NAMED = 6

Line = tuple[str, str]


def data_lines(
    dataset: Any,
    *,
    batch_size: int,
    accumulation: int = 1,
    shapes: Sequence[Sequence[int]] | None = None,
    num_classes: int | None = None,
) -> list[Line]:
    """(name, text) of each line about a dataset: samples, classes, captions, buckets, steps, left out.

    A dataset needs a length. A line is missing if the dataset does not have the attribute: `classes`,
    `num_classes`, `num_captions`, `buckets` (bucket of each sample), `left_out` (number by reason).

    Args:
        dataset: for the trainer's loader.
        batch_size: samples of one batch over all processes, >= 1.
        accumulation: batches of an optimizer step, >= 1.
        shapes: shape of each bucket, as in the config; None names buckets by number.
        num_classes: classes of the model, to tell those without data; 0 uses none of the data's, and
            None says nothing about them.
    """
    size = len(dataset)
    buckets: torch.Tensor | None = getattr(dataset, "buckets", None)
    lines = [("samples", f"{size:,}"), *_classes(dataset, num_classes), *_captions(dataset, size)]
    if buckets is not None:
        lines += _buckets(buckets, batch_size, shapes)
    lines.append(("steps per epoch", _steps(size, buckets, batch_size, accumulation)))
    left_out: Mapping[str, int] = {k: n for k, n in (getattr(dataset, "left_out", None) or {}).items() if n}
    if left_out:
        lines.append(
            ("left out", _shortened([f"{reason} ({number:,})" for reason, number in left_out.items()]))
        )
    return lines


def skipped_line(counts: Sequence[int | None]) -> str | None:
    """What to say at the end of a run about damaged samples; None if there were none.

    Args:
        counts: `num_corrupt` of the dataset of each process; None for one that does not count.
    """
    known = [count for count in counts if count]
    if not known:
        return None
    # Several processes may have met the same sample.
    least = "" if len(counts) == 1 else "at least "
    return f"skipped {least}{_counted(max(known), 'damaged sample')}; others were used instead"


def _classes(dataset: Any, wanted: int | None) -> list[Line]:
    names = tuple(getattr(dataset, "classes", None) or ())
    number = len(names) or getattr(dataset, "num_classes", 0)
    if not number:
        return []
    if wanted == 0:
        return [("classes", f"none, with num_classes: 0; the data have {number:,}")]
    lines = [("classes", f"{number:,}" + (f" ({_shortened(list(map(str, names)))})" if names else ""))]
    if wanted is not None and wanted > number:
        lines.append(("never trained", f"{wanted - number:,} of num_classes: {wanted}, which have no data"))
    return lines


def _captions(dataset: Any, size: int) -> list[Line]:
    found = getattr(dataset, "captions", None)
    number = getattr(dataset, "num_captions", len(found) if found is not None else 0)
    if number:
        return [("captions", f"{number:,}")]
    most = getattr(dataset, "max_captions", 0)
    return [("captions", f"{size:,} samples with up to {most}")] if most else []


def _buckets(buckets: torch.Tensor, batch_size: int, shapes: Sequence[Sequence[int]] | None) -> list[Line]:
    """The used buckets with their numbers of samples, and those that are too small for a batch."""
    numbers, counts = (values.tolist() for values in buckets.unique(return_counts=True))
    names = [
        " x ".join(map(str, shapes[number])) if shapes is not None else f"number {number}"
        for number in numbers
    ]
    pairs = sorted(zip(counts, names, strict=True), reverse=True)
    lines = [("buckets", _shortened([f"{name} ({count:,})" for count, name in pairs]))]
    starved = [f"{name} ({count:,})" for count, name in pairs if count < batch_size]
    if starved:
        number = _counted(len(starved), "bucket")
        text = f"{number} with fewer samples than a batch ({batch_size}): {_shortened(starved)}"
        lines.append(("never drawn", text))
    return lines


def _steps(size: int, buckets: torch.Tensor | None, batch_size: int, accumulation: int) -> str:
    most = size if buckets is None else int(buckets.bincount().max())
    if most < batch_size:
        whose = "" if buckets is None else " in the largest bucket"
        return f"0 of {batch_size:,} samples; a batch needs {batch_size:,}, {most:,} are there{whose}"
    usable = size if buckets is None else usable_size(buckets, batch_size=batch_size)
    batches = usable // batch_size
    steps = batches / accumulation
    text = f"{steps:,.0f}" if steps == int(steps) else f"{steps:,.2f}"
    each = f"{batch_size:,} samples" + (f" x {accumulation}" if accumulation > 1 else "")
    dropped = size - batches * batch_size
    return f"{text} of {each}" + (f"; {_counted(dropped, 'sample')} left over" if dropped else "")


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _shortened(parts: list[str]) -> str:
    rest = len(parts) - NUM_NAMED
    return ", ".join(parts[:NUM_NAMED]) + (f", and {rest:,} more" if rest > 0 else "")
