"""Stand-ins for packages that a host imports and that cannot be imported here."""

import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class StandIns(MetaPathFinder, Loader):
    """Finds a stand-in for each of the named packages and their submodules.

    At the end of sys.meta_path it replaces packages that no other finder knows; at the front, all that are
    named.

    Args:
        names: top-level packages that may be replaced.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._used: set[str] = set()

    @property
    def used(self) -> list[str]:
        """The packages that were replaced so far."""
        return sorted(self._used)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a replaced package or of any submodule of it; None for every other name."""
        top = name.split(".")[0]
        if top not in self._names or (top in sys.modules and top not in self._used):
            return None
        self._used.add(top)
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module that has every attribute."""
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing runs in a stand-in."""


def inert_module(name: str) -> ModuleType:
    """A module that has every attribute, and does nothing."""
    return _Anything(name)


class _Anything(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _InertType(name, (_Inert,), {})


class _InertType(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Inert()


class _Inert(metaclass=_InertType):
    """A class, base class, function or decorator that does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes anything."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Inert()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else self
