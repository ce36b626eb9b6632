"""Opens Parquet files, and names a damaged one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UnreadableError(ValueError):
    """A Parquet file, or a part of one, cannot be read."""


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Turns pyarrow's errors about a file's contents into one that names it; system errors pass."""
    try:
        yield
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        # pyarrow raises an OSError without an errno for damaged data.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())
        raise UnreadableError(f"corrupt Parquet file {path}: {type(error).__name__}: {reason}") from error


def pyarrow_parquet() -> Any:
    """The module `pyarrow.parquet`.

    Raises:
        ImportError: pyarrow is missing.
    """
    # Imported here because pyarrow is optional and slow to load.
    try:
        from pyarrow import parquet
    except ImportError as error:
        message = "Parquet files need pyarrow: pip install 'speedit-plugins[data]'"
        raise ImportError(message) from error
    return parquet
