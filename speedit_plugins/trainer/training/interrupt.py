"""Turns Ctrl-C and SIGTERM into a request to stop after the current step."""

import signal
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """A context that stores the name of the first SIGINT or SIGTERM in `signal_name`.

    Args:
        is_launched: whether a launcher started the process. A terminal sends Ctrl-C to all processes, and
            the launcher sends it again; so later signals are ignored, and the launcher ends a process that
            hangs. In a single process the second signal acts as usual.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, *, is_launched: bool = False) -> None:
        self.signal_name: str | None = None
        self._is_launched = is_launched
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._request) for number in self.signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name
        if not self._is_launched:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
