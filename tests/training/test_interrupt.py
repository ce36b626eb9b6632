import os
import signal

import pytest

from speedit_plugins.trainer.training.interrupt import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_kept_and_the_previous_handler_takes_the_second(number: signal.Signals) -> None:
    received: list[int] = []
    before = signal.signal(number, lambda n, frame: received.append(n))
    try:
        with StopRequest() as stop:
            assert stop.signal_name is None
            os.kill(os.getpid(), number)
            assert stop.signal_name == number.name
            assert received == []
            os.kill(os.getpid(), number)
            assert received == [number]
    finally:
        signal.signal(number, before)


def test_a_launched_process_leaves_later_signals_to_the_launcher() -> None:
    with StopRequest(is_launched=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_name == "SIGINT"


def test_leaving_restores_the_handlers() -> None:
    before = [signal.getsignal(number) for number in StopRequest.signals]
    with StopRequest():
        assert [signal.getsignal(number) for number in StopRequest.signals] != before
    assert [signal.getsignal(number) for number in StopRequest.signals] == before
