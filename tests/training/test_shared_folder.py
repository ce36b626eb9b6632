"""All ranks see the folder that rank 0 writes in, or all are told."""

import socket
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.training.saving import shared_folder
from speedit_plugins.trainer.training.saving.shared_folder import check_shared


class Second(Runtime):
    """Rank 1 of two. Rank 0 says that it wrote "lock" on node-a, and has no fault."""

    def gather_objects(self, item: Any) -> list[Any]:
        return [None if item is None or isinstance(item, str) else ("lock", "node-a"), item]


RANK_1 = Second(rank=1, world_size=2)


def write(path: Path, text: str) -> Callable[[], object]:
    return lambda: path.write_text(text)


def test_what_rank_0_wrote_is_seen_at_once_or_later(tmp_path: Path) -> None:
    path = tmp_path / "train.lock"
    writer = Timer(0.3, write(path, "lock"))
    writer.start()
    check_shared(path, None, RANK_1)
    assert path.read_text() == "lock"
    check_shared(path, None, RANK_1)
    writer.join()
    # A single process has nobody to ask.
    check_shared(tmp_path / "absent", None, Runtime())


@pytest.mark.parametrize("own", [None, "", "a lock of another training"])
def test_another_folder_at_the_path_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    monkeypatch.setattr(shared_folder, "NFS_SECONDS", 0.0)
    if own is not None:
        (tmp_path / "train.lock").write_text(own)
    with pytest.raises(ValueError, match="that all processes share") as error:
        check_shared(tmp_path / "train.lock", None, RANK_1)
    assert str(error.value) == (
        f"experiment_dir needs a folder that all processes share, got {tmp_path} on {socket.gethostname()}"
        " without the train.lock that rank 0 wrote on node-a; wanted a path on a file system of all machines"
    )
