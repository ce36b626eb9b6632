"""Runs the checks that need two real processes. test_distributed.py starts it once under torchrun.

    torchrun --standalone --nproc_per_node 2 tests/parallel/distributed_checks.py OUT_FOLDER

Calls every function `check_...` of the modules, or those named after the folder, on both ranks, with a folder
of its own. Rank 0 writes results.json: for each name a list of failures, empty if the check passed.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

# torchrun starts this file as a script.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import distributed_faults
import distributed_meshes
import distributed_numbers
import distributed_optimizers
import distributed_saves
import distributed_tasks
from distributed_runs import TIMEOUT_SECONDS, run_checks
from runs import small_config

from speedit_plugins.trainer.parallel.runtime import Runtime, launch


def checks_of(*modules: ModuleType) -> dict[str, Callable[[Runtime, Path], None]]:
    return {
        name: check for module in modules for name, check in vars(module).items() if name.startswith("check_")
    }


CHECKS = checks_of(distributed_numbers, distributed_faults, distributed_optimizers, distributed_saves)
TASKS = checks_of(distributed_tasks)
# These need four.
MESHES = checks_of(distributed_meshes)


def main() -> None:
    out = Path(sys.argv[1])
    wanted = sys.argv[2:] or [*CHECKS, *TASKS]
    runtime = launch(small_config(out, distributed_timeout_seconds=TIMEOUT_SECONDS))
    every = {**CHECKS, **TASKS, **MESHES}
    run_checks({name: check for name, check in every.items() if name in wanted}, runtime, out)


if __name__ == "__main__":
    main()
