"""Who is gone, as the processes of a run find out: here processes, or ports alone."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore

from speedit_plugins.trainer.parallel import peers as module
from speedit_plugins.trainer.parallel.peers import LostPeerError, Peer, Peers, meet, naming_lost

RUN = "speedit/lost/test"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports of a test do not end in the very moment in which they are asked."""
    monkeypatch.setattr(module, "_LINGER_SECONDS", 0.1)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


@pytest.fixture
def living() -> Iterator[tuple[str, int]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()


@pytest.fixture
def gone() -> tuple[str, int]:
    """A port at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place: tuple[str, int] = server.getsockname()
        return place


def run_of(rank: int, *places: tuple[str, Any]) -> Peers:
    return Peers(rank, [Peer((name, ""), address) for name, address in places], RUN, None)


def test_ranks_that_do_not_answer_are_named_by_machine(
    living: tuple[str, int], gone: tuple[str, int], store: TCPStore
) -> None:
    a, b, c = ("a", living), ("b", gone), ("c", living)
    named = {
        "machine b (ranks 2, 3)": [a, a, b, b],
        "machine b (rank 1)": [a, b],
        "rank 3 on b": [a, a, ("b", living), b],
        "rank 1 on a and machine b (ranks 2, 3)": [a, ("a", gone), b, b, c],
        # On a single machine its name says nothing.
        "rank 1": [a, ("a", gone)],
        # Nobody can say whether a process without an address lives.
        "": [a, ("b", None)],
    }
    for expected, places in named.items():
        run = run_of(0, *places)
        assert run.name(run.lost()) == expected


def test_a_rank_that_ended_because_of_others_is_not_named_but_they_are(
    living: tuple[str, int], gone: tuple[str, int], store: TCPStore
) -> None:
    places = [("a", living), ("b", gone), ("c", gone)]
    # Rank 1 lost rank 2, told the others, and ended.
    assert run_of(1, ("a", living), ("b", living), ("c", gone)).lost() == [2]
    assert run_of(0, *places).lost() == [2]
    # It is told by what it left, also where its cause answers again.
    assert run_of(0, ("a", living), ("b", gone), ("c", living)).lost() == [2]


def test_without_the_store_those_who_do_not_answer_are_named(
    living: tuple[str, int], gone: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", gone[0])
    monkeypatch.setenv("MASTER_PORT", str(gone[1]))
    assert run_of(0, ("a", living), ("b", gone), ("c", living)).lost() == [1]


def test_only_the_error_of_an_exchange_is_renamed_and_only_if_somebody_is_gone(
    living: tuple[str, int], gone: tuple[str, int], store: TCPStore
) -> None:
    broken = "gloo: Connection closed by peer"

    def failing(peers: Peers | None, message: str) -> None:
        with naming_lost(peers):
            raise RuntimeError(message)

    lost = run_of(0, ("a", living), ("b", gone))
    with pytest.raises(LostPeerError, match=rf"^lost machine b \(rank 1\); if it failed, .* why: {broken}$"):
        failing(lost, broken)
    for peers, message in ((lost, "shapes differ"), (None, broken), (run_of(0, ("a", living)), broken)):
        with pytest.raises(RuntimeError, match=f"^{message}$") as error:
            failing(peers, message)
        assert type(error.value) is RuntimeError


def test_a_killed_process_is_gone_though_its_loading_process_lives(store: TCPStore) -> None:
    ours, theirs = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            own = meet(1, lambda item: [item])
            if os.fork() == 0:
                signal.pause()
            os.write(theirs, str(own._everyone[0].address[1]).encode())  # type: ignore[index]  # it listens
            signal.pause()
        finally:
            # Never on as a second pytest.
            os._exit(1)
    address = "127.0.0.1", int(os.read(ours, 100))
    child = int(Path(f"/proc/{process}/task/{process}/children").read_text())
    peers = run_of(0, ("a", None), ("b", address))
    try:
        while_it_lives = peers.lost()
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert (while_it_lives, peers.lost()) == ([], [1])
    finally:
        os.kill(child, signal.SIGKILL)


def test_it_listens_where_gloo_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for interface, expected in (("lo", "127.0.0.1"), ("lo,other", "127.0.0.1"), ("absent", None)):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
        found = meet(0, lambda item: [item])
        (peer,) = found._everyone
        assert (peer.address and peer.address[0]) == expected
        found.close()
    # A name without an address.
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(module.socket, "gethostname", lambda: "no.such.name.invalid")
    (peer,) = meet(0, lambda item: [item])._everyone
    assert peer.address is not None
    assert peer.address[0] == "127.0.0.1"
    assert peer.machine[0] == "no.such.name.invalid"
