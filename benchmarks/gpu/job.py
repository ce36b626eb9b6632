"""What a part of `benchmarks.gpu` is given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """What a part is given.

    Args:
        part: its name.
        device: cpu or cuda.
        hosts: folder of checkouts; it need not be there.
        data: folder that may have Fashion-MNIST.
        folder: of the run.
        seconds: that the part may take.
        is_small: shapes and counts for a CPU, whose figures mean nothing.
        say: called with Markdown and the values behind it, for each thing found.
    """

    part: str
    device: str
    hosts: Path
    data: Path
    folder: Path
    seconds: float
    is_small: bool
    say: Callable[[str, Mapping[str, Any]], object]
