"""Standard output and standard error that may go away: a closed terminal, or a pipe that nobody reads."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

# A pipe without a reader, a terminal that was closed, a device that is gone.
_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESHUTDOWN)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """A context in which printing to a closed terminal or pipe is ignored.

    Other errors of the streams are raised, such as that of a full disk under a log file.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Lasting(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Lasting:
    """A text stream that stays writable after its other end is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes, or drops, the text. Returns its length."""
        with self._kept():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes what can be written."""
        with self._kept():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _GONE:
                raise
            self._lead_nowhere()

    def _lead_nowhere(self) -> None:
        """Gives the stream's file another end. What is buffered, and what C code writes, can go there."""
        with suppress(OSError, io.UnsupportedOperation):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, self._stream.fileno())
            finally:
                os.close(nowhere)
