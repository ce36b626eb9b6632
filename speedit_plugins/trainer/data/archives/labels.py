"""Classes from the labels that a dataset's samples are stored with."""

from collections.abc import Sequence

import torch
from torch import Tensor

# More classes than that are a mistake, such as an id in place of a label.
MOST_CLASSES = 2**20


def numbered(values: Sequence[str]) -> tuple[tuple[str, ...], Tensor]:
    """Names of the classes, and the class of each value, int64 (N,).

    If all values are whole numbers, they are the classes: the names are those of 0 up to the largest one.
    Otherwise the classes are the distinct values, sorted.

    Raises:
        ValueError: a number is too large for a class.
    """
    distinct = sorted(set(values))
    if all(value.isdecimal() for value in distinct):
        numbers = {value: int(value) for value in distinct}
        largest = max(numbers.values(), default=-1)
        if largest >= MOST_CLASSES:
            raise ValueError(f"a label must be a class number below {MOST_CLASSES}, got {largest}")
        names = tuple(map(str, range(largest + 1)))
    else:
        numbers = {value: number for number, value in enumerate(distinct)}
        names = tuple(distinct)
    return names, torch.tensor([numbers[value] for value in values], dtype=torch.int64)
