"""`speedit`, but rank 1 fails at its third step, so that no test has to time a failure.

    torchrun --standalone --nproc_per_node 2 failing_main.py {killed,silent} -c CONFIG -p train ...

killed: rank 1 ends at once. silent: it stays and does nothing, and rank 0 waits 5 s for it. The short timeout
begins at that step, because on a busy machine a rank may be late while the ranks start.
"""

import os
import signal
import sys
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import _set_pg_timeout

from speedit_plugins import cli
from speedit_plugins.trainer.training.trainer import Trainer

KIND = sys.argv.pop(1)
FAILURES = {"killed": signal.SIGKILL, "silent": signal.SIGSTOP}
optimizer_step = Trainer.optimizer_step


def failing(trainer: Trainer, *arguments: Any) -> Any:
    if trainer.step == 2:
        if trainer.runtime.rank == 1:
            os.kill(os.getpid(), FAILURES[KIND])
        _set_pg_timeout(timedelta(seconds=5))
    return optimizer_step(trainer, *arguments)


Trainer.optimizer_step = failing  # type: ignore[method-assign]  # for the test
if KIND == "killed":
    # However late torchrun looks, it finds rank 1 gone and rank 0 still running.
    cli.LAUNCHER_SECONDS = 86_400
sys.exit(cli.main())
