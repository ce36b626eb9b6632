"""All ranks see one `experiment_dir`: what rank 0 writes there is on a file system of all machines."""

import os
import socket
import time
from pathlib import Path

from speedit_plugins.trainer.parallel.runtime import Runtime

# A machine may take a folder for unchanged that long, by the default of acdirmax in nfs(5).
NFS_SECONDS = 60.0
_POLL_SECONDS = 0.2


def check_shared(path: Path, text: str | None, runtime: Runtime) -> None:
    """Returns when every rank sees the file that rank 0 has written. Collective.

    Args:
        text: what rank 0 has written; not read on other ranks.

    Raises:
        ValueError: a rank does not see it, or sees another text, for NFS_SECONDS. All ranks raise it.
    """
    if runtime.world_size == 1:
        return
    written, host = runtime.gather_objects((text, socket.gethostname()))[0]
    fault = None
    if not runtime.is_main and not _appears(path, written):
        fault = ValueError(
            f"experiment_dir needs a folder that all processes share, got {path.parent.absolute()} on"
            f" {socket.gethostname()} without the {path.name} that rank 0 wrote on {host}; wanted a path on a"
            " file system of all machines"
        )
    runtime.raise_together(fault)


def _appears(path: Path, text: str) -> bool:
    """Whether the file has this text, now or soon."""
    end = time.monotonic() + NFS_SECONDS
    while _text(path) != text:
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _text(path: Path) -> str | None:
    """What is in the file; None if it cannot be read."""
    try:
        # NFS asks its server again for a folder that is listed.
        os.listdir(path.parent)
        return path.read_text(encoding="utf-8")
    except OSError:
        return None
