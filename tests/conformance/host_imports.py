"""Modules of a host's checkout, imported for a test and forgotten after it."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from conformance.stand_ins import StandIns


def checkout(name: str) -> Path:
    """The folder of a host's checkout, or the test is skipped."""
    folder = Path(os.environ["SPEEDIT_HOSTS"]) / name
    if not folder.is_dir():
        pytest.skip(f"no checkout {name}")
    return folder


@contextlib.contextmanager
def imported(
    module: str,
    folders: Sequence[Path],
    *,
    replaced: Sequence[str] = (),
    unknown: Sequence[str] = (),
    blank: Sequence[str] = (),
    others: Mapping[str, Mapping[str, Any]] | None = None,
    tops: Sequence[str] = (),
) -> Iterator[ModuleType]:
    """A module of a checkout, while the test runs.

    Args:
        module: its dotted name.
        folders: to import it from.
        replaced: packages that are installed, for which there is a stand-in all the same.
        unknown: packages for which there is a stand-in if they are not installed.
        blank: modules of the host itself that a CPU cannot import and that the test does not call.
        others: modules, with the members that the host asks for when it is imported.
        tops: further top-level packages of the host, which are forgotten too.
    """
    others = others or {}
    forgotten = {name.split(".")[0] for name in (module, *replaced, *unknown, *blank, *others, *tops)}
    kept = {name: each for name, each in sys.modules.items() if name.split(".")[0] in forgotten}
    for name in kept:
        del sys.modules[name]
    front, back = StandIns(replaced), StandIns(unknown)
    inert = StandIns([name.split(".")[0] for name in blank])
    try:
        for name in blank:
            sys.modules[name] = inert.create_module(inert.find_spec(name))
            sys.modules[name].__path__ = []
        for name, members in others.items():
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(members)
        sys.path[:0] = map(str, folders)
        sys.meta_path.insert(0, front)
        sys.meta_path.append(back)
        yield import_module(module)
    finally:
        for finder in (front, back):
            sys.meta_path.remove(finder)
        for folder in folders:
            sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] in forgotten]:
            del sys.modules[name]
        sys.modules.update(kept)
