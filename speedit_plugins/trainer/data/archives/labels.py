"""Classes from the labels that a dataset's samples are stored with."""

from collections.abc import Sequence

import torch
from torch import Tensor

# More classes than that are a mistake, such as an id in place of a label.
MOST_CLASSES = 2**20


def numbered(values: Sequence[str], names: Sequence[str] | None = None) -> tuple[tuple[str, ...], Tensor]:
    """Names of the classes, and the class of each value, int64 (N,).

    If all values are whole numbers, they are the classes: the names are `names`, or the numbers from 0 up to
    the largest one. Otherwise the classes are the distinct values, sorted.

    Raises:
        ValueError: a number is too large for a class.
    """
    distinct = sorted(set(values))
    if all(value.isdecimal() for value in distinct):
        numbers = {value: int(value) for value in distinct}
        largest = max(numbers.values(), default=-1)
        most = MOST_CLASSES if names is None else len(names)
        if largest >= most:
            raise ValueError(f"a label must be a class number below {most}, got {largest}")
        classes = tuple(map(str, range(largest + 1))) if names is None else tuple(names)
    else:
        numbers = {value: number for number, value in enumerate(distinct)}
        classes = tuple(distinct)
    return classes, torch.tensor([numbers[value] for value in values], dtype=torch.int64)
