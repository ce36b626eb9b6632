"""Which processes of a run are gone, by rank and machine, once an exchange between them has failed.

The error of a failed exchange names at most a neighbour. So each process listens on a port, and whoever meets
such an error connects to all others: the kernel answers for a process that lives, however busy it is.

This file imports torch where a run has failed only, since the command line imports it.
"""

import asyncio
import fcntl
import itertools
import json
import os
import re
import socket
import struct
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any

# How gloo, NCCL and the store report a failed collective, mostly because another process has ended.
_LOST_PEER = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|Timed out|TCPStore|Broken pipe")
# A machine that is switched off does not even refuse.
_CONNECT_SECONDS = 5.0
# A process that is just ending may still accept. Its end resets the connection.
_LINGER_SECONDS = 1.0
_STORE_SECONDS = 5.0
_MOST_AT_ONCE = 100
# Linux: the IPv4 address of an interface.
_SIOCGIFADDR = 0x8915


class LostPeerError(RuntimeError):
    """An exchange failed. The message says which processes are gone."""


@dataclass(frozen=True)
class Peer:
    """One process of the run.

    Args:
        machine: the name of its host, and its launcher's number: two launchers may be on one host.
        address: where it listens; None if it has no address that others can reach.
    """

    machine: tuple[str, str]
    address: tuple[str, int] | None


class Peers:
    """All processes of a run, in rank order, and the port at which this one shows that it lives."""

    def __init__(self, rank: int, everyone: Sequence[Peer], run: str, listener: socket.socket | None) -> None:
        self._rank, self._everyone, self._run = rank, everyone, run
        self._listener = listener

    @property
    def num_machines(self) -> int:
        """Number of machines that the processes are on."""
        return len({peer.machine for peer in self._everyone})

    def lost(self) -> list[int]:
        """Ranks that are gone, without those that ended because they had lost others. The others hear it."""
        gone = asyncio.run(self._gone())
        notes: dict[int, list[int]] = _within(_STORE_SECONDS, lambda: self._notes(gone)) or {}
        found = sorted({rank for rank in gone if rank not in notes}.union(*notes.values()))
        _within(_STORE_SECONDS, lambda: self._leave(found))
        return found

    def name(self, ranks: Sequence[int]) -> str:
        """These ranks in words, by machine."""
        said = []
        for machine, group in itertools.groupby(ranks, key=lambda rank: self._everyone[rank].machine):
            own = list(group)
            of_machine = sum(peer.machine == machine for peer in self._everyone)
            listed = f"rank{'s' if len(own) > 1 else ''} {', '.join(map(str, own))}"
            if self.num_machines == 1:
                said.append(listed)
            else:
                is_all = len(own) == of_machine
                said.append(f"machine {machine[0]} ({listed})" if is_all else f"{listed} on {machine[0]}")
        return " and ".join(said)

    def close(self) -> None:
        """Stops listening."""
        if self._listener is not None:
            self._listener.close()

    async def _gone(self) -> list[int]:
        """Ranks whose port does not answer."""
        most = asyncio.Semaphore(_MOST_AT_ONCE)

        async def is_gone(peer: Peer) -> bool:
            if peer.address is None:
                return False
            async with most:
                return not await _answers(peer.address)

        others = [rank for rank in range(len(self._everyone)) if rank != self._rank]
        found = await asyncio.gather(*(is_gone(self._everyone[rank]) for rank in others))
        return [rank for rank, is_lost in zip(others, found, strict=True) if is_lost]

    def _notes(self, ranks: Sequence[int]) -> dict[int, list[int]]:
        """What these ranks had lost when they ended. A rank that ended for another reason is not in it."""
        store = _store()
        keys = {rank: f"{self._run}/{rank}" for rank in ranks}
        return {rank: json.loads(store.get(key)) for rank, key in keys.items() if store.check([key])}

    def _leave(self, lost: Sequence[int]) -> None:
        _store().set(f"{self._run}/{self._rank}", json.dumps(list(lost)))


def meet(rank: int, gather_objects: Callable[[Any], list[Any]]) -> Peers:
    """Begins to listen, and learns where the others do; collective."""
    listener = _listening()
    address = None if listener is None else listener.getsockname()[:2]
    machine = socket.gethostname(), os.environ.get("GROUP_RANK", "")
    everyone = gather_objects((Peer(machine, address), uuid.uuid4().hex))
    return Peers(rank, [peer for peer, _ in everyone], f"speedit/lost/{everyone[0][1]}", listener)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process has ended or does not answer."""
    return isinstance(error, RuntimeError) and bool(_LOST_PEER.search(str(error)))


@contextmanager
def naming_lost(peers: Peers | None) -> Iterator[None]:
    """A context in which the error of a failed exchange says who is gone, if anybody is.

    Raises:
        LostPeerError: in place of that error.
    """
    try:
        yield
    except RuntimeError as error:
        if peers is None or not is_lost_peer(error) or not (lost := peers.lost()):
            raise
        raise LostPeerError(
            f"lost {peers.name(lost)}; if it failed, its own message says why: {error}"
        ) from error


async def _answers(address: tuple[str, int]) -> bool:
    """Whether a process listens there."""
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(*address), _CONNECT_SECONDS)
    except (OSError, asyncio.TimeoutError):
        return False
    try:
        # Nobody writes: a living process lets this wait end, and one that ends closes the connection.
        await asyncio.wait_for(reader.read(1), _LINGER_SECONDS)
    except asyncio.TimeoutError:
        return True
    except OSError:
        return False
    finally:
        writer.close()
    return False


def _listening() -> socket.socket | None:
    """A socket that listens where gloo does, so that the others reach it; None if there is no place."""
    for family, address in _own_addresses():
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.bind((address, 0))
            listener.listen(socket.SOMAXCONN)
        except OSError:
            listener.close()
            continue
        # Else a loading process would answer in the place of this one.
        os.register_at_fork(after_in_child=listener.close)
        return listener
    return None


def _own_addresses() -> Iterator[tuple[socket.AddressFamily, str]]:
    """As gloo chooses: the interface of GLOO_SOCKET_IFNAME, else what the host's name means, or loopback."""
    if names := os.environ.get("GLOO_SOCKET_IFNAME"):
        asked = struct.pack("256s", names.split(",")[0].encode()[:15])
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, asked)
        except OSError:
            return
        yield socket.AF_INET, socket.inet_ntoa(answer[20:24])
        return
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    for family, _, _, _, place in found:
        yield family, str(place[0])
    yield socket.AF_INET, "127.0.0.1"


def _store() -> Any:
    """A connection of our own to the store through which the processes have met."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # missing in the stubs only

    place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Without this look, torch writes lines about each of its attempts.
    socket.create_connection((place, port), _STORE_SECONDS).close()
    return TCPStore(
        place,
        port,
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=_STORE_SECONDS),
    )


def _within(seconds: float, action: Callable[[], Any]) -> Any:
    """What the action returns; None if it fails or takes longer, as where the store is gone too."""
    found: list[Any] = []

    def act() -> None:
        try:
            found.append(action())
        except (OSError, RuntimeError):
            return

    thread = Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
