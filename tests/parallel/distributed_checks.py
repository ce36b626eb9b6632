"""Runs the checks that need two real processes. test_distributed.py starts it once under torchrun.

    torchrun --standalone --nproc_per_node 2 tests/parallel/distributed_checks.py OUT_FOLDER

Calls every function `check_...` of the modules, or those named after the folder, on both ranks, with a folder
of its own. Rank 0 writes results.json: for each name a list of failures, empty if the check passed.
"""

import json
import sys
import traceback
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
from distributed_runs import TIMEOUT_SECONDS
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
    results = {}
    for name, check in {**CHECKS, **TASKS, **MESHES}.items():
        if name not in wanted:
            continue
        failure = ""
        try:
            check(runtime, out / name)
        except Exception:
            failure = traceback.format_exc()
        failures = runtime.gather_objects(failure)
        results[name] = [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text]
        if runtime.is_main:
            # Written after each check, so that results are kept if the job ends early.
            (out / "results.json").write_text(json.dumps(results, indent=1))
    runtime.close()


if __name__ == "__main__":
    main()
