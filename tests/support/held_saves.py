"""Saves that stay in flight until somebody waits for them, and what they write."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.checkpoints.background import Background


@contextmanager
def held_back() -> Iterator[None]:
    """Inside, a job in the background begins only when somebody waits for its end."""
    start, wait = Background.start, Background.wait
    awaited = threading.Event()

    def held(self: Background, job: Callable[[], object]) -> None:
        awaited.clear()

        def begin() -> None:
            awaited.wait()
            job()

        start(self, begin)

    def released(self: Background, timeout_seconds: float | None = None) -> bool:
        awaited.set()
        return wait(self, timeout_seconds)

    Background.start, Background.wait = held, released  # type: ignore[method-assign]  # restored below
    try:
        yield
    finally:
        awaited.set()
        Background.start, Background.wait = start, wait  # type: ignore[method-assign]  # restored


def files(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint's files. The config and its hash are without `async_save`."""
    found: dict[str, Any] = {file.name: file.read_bytes() for file in path.iterdir()}
    manifest = json.loads(found.pop(checkpoints.MANIFEST))
    del manifest["files"][checkpoints.CONFIG]
    config = yaml.safe_load(found.pop(checkpoints.CONFIG))
    del config["async_save"], config["experiment_dir"]
    return {**found, "manifest": manifest, "config": config}
