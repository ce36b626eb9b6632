"""The devices of a test that runs on any: the CPU, and a CUDA device under `-m gpu`."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

EVERY_DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@contextmanager
def in_one_order(device: str) -> Iterator[None]:
    """Inside the block, a CUDA device adds up in one order, wherever it has a kernel that does.

    CUBLAS_WORKSPACE_CONFIG, which its products need for that, is set in conftest.py.
    """
    if device == "cpu":
        yield
        return
    # A kernel without a fixed order is a warning: whether it matters is what the test asserts.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
