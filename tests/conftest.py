"""What every test may rely on: fixed seeds, no network, and reasons for what is left out."""

import importlib
import ipaddress
import os
import signal
import socket
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# Derandomised: a failing example fails for everybody, and a passing run is not luck. Neither is a time that a
# busy machine takes.
settings.register_profile(
    "speedit", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("speedit")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("markexpr") != "gpu":
        # Before anything asks for a device: `device: auto` is the CPU, in the processes that tests start too.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        # Read when the first product is computed; see `in_one_order` in support/devices.py.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # A job in the background, or under nohup, ignores them, and so would the processes that tests start.
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
    # The same on any number of cores, in the processes that tests start too. Tensors here are small.
    threads = os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(threads))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: several processes, which take file after file, end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("hosts") and not os.environ.get("SPEEDIT_HOSTS"):
        pytest.skip("needs host checkouts: set SPEEDIT_HOSTS to their folder")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and -m gpu")


@pytest.fixture
def load() -> Callable[[str], ModuleType]:
    """Imports a module of benchmarks/ by its name there, such as `race.hosts`.

    Only tests that use one import it: some enter data sets into the registry.
    """
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Nothing reaches beyond this machine: a connection elsewhere is an error that names the address."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(str(address[0])):
            raise OSError(f"tests run without a network, got a connection to {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
