"""Turns Ctrl-C, SIGTERM and SIGHUP into a request to stop after the current step."""

import signal
from types import FrameType, TracebackType
from typing import Any

# Name of the thread that writes checkpoints while a training goes on, as long as it writes. It is here
# because the command line asks for it, and imports no torch.
WRITER = "speedit checkpoints"


class Interrupted(KeyboardInterrupt):
    """A signal ended what was running. The message, if there is one, says what is lost.

    Args:
        number: the signal, whose exit code is 128 + number.
    """

    def __init__(self, message: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


class StopRequest:
    """A context that stores the name of the first SIGINT, SIGTERM or SIGHUP in `signal_name`.

    A terminal that closes sends SIGHUP, often twice, and some systems SIGTERM after it. So a SIGHUP asks for
    the end of the training, and never ends it at once. Where it is ignored, as under nohup, it stays so.

    Args:
        is_launched: whether a launcher started the process. A terminal sends Ctrl-C to all processes, and
            the launcher sends it again; so later signals are ignored, and the launcher ends a process that
            hangs. In a single process the second SIGINT or SIGTERM acts as usual.
    """

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, *, is_launched: bool = False) -> None:
        self.signal_name: str | None = None
        self._is_launched = is_launched
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in self.signals:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore(*self._previous)

    def line(self, step: int) -> str:
        """What a user reads as the training ends after a step, on the asked rank or another one."""
        return f"{self.signal_name or 'a signal'}: ending after step {step}, which is saved first"

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name
        if not self._is_launched and number != signal.SIGHUP:
            self._restore(signal.SIGINT, signal.SIGTERM)

    def _restore(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            signal.signal(number, self._previous[number])
