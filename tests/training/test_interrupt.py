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


def test_a_terminal_that_closes_asks_as_often_as_it_likes() -> None:
    received: list[int] = []
    before = {n: signal.signal(n, lambda n, frame: received.append(n)) for n in StopRequest.signals}
    try:
        with StopRequest() as stop:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGHUP)
            # A session that ends sends SIGTERM after it.
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
            assert (stop.signal_name, received) == ("SIGHUP", [])
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == [signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_hangup_that_is_ignored_stays_so() -> None:
    # nohup ignores it.
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal_name is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_launched_process_leaves_later_signals_to_the_launcher() -> None:
    with StopRequest(is_launched=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_name == "SIGINT"


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (None, "a signal")])
def test_the_line_names_the_signal_unless_another_rank_got_it(
    number: signal.Signals | None, name: str
) -> None:
    with StopRequest(is_launched=True) as stop:
        if number is not None:
            os.kill(os.getpid(), number)
        assert stop.line(7) == f"{name}: ending after step 7, which is saved first"


def test_leaving_restores_the_handlers() -> None:
    before = [signal.getsignal(number) for number in StopRequest.signals]
    with StopRequest():
        assert [signal.getsignal(number) for number in StopRequest.signals] != before
    assert [signal.getsignal(number) for number in StopRequest.signals] == before
