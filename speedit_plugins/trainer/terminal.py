"""What a run prints: single lines, and a progress bar that does not get in their way."""

import sys
from typing import NoReturn

from tqdm import tqdm


def say(line: str) -> None:
    """One line to standard output, above a running progress bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def progress(name: str, *, total: int, initial: int = 0, unit: str = "step") -> "tqdm[NoReturn]":
    """A progress bar with rate and time left on standard error; in a log file, a line every half minute."""
    interval = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total,
        initial=initial,
        desc=name,
        unit=unit,
        dynamic_ncols=True,
        mininterval=interval,
        maxinterval=interval,
    )
