"""Checks that need two real processes: run under torchrun by test_distributed.py, all in one launch.

    torchrun --standalone --nproc_per_node 2 tests/distributed_checks.py OUT_FOLDER

Every function `check_...` of the modules, or those named behind the folder, is called on both ranks with a
folder of its own; rank 0 writes results.json, a list of failures (empty: passed) by name.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

# torchrun starts this file by itself.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import distributed_faults
import distributed_numbers
import distributed_tasks
from runs import small_config

from speedit_plugins.trainer.parallel.runtime import Runtime, launch


def checks_of(*modules: ModuleType) -> dict[str, Callable[[Runtime, Path], None]]:
    return {
        name: check for module in modules for name, check in vars(module).items() if name.startswith("check_")
    }


CHECKS = checks_of(distributed_numbers, distributed_faults)
TASKS = checks_of(distributed_tasks)


def main() -> None:
    out = Path(sys.argv[1])
    wanted = sys.argv[2:] or [*CHECKS, *TASKS]
    runtime = launch(small_config(out))
    results = {}
    for name, check in {**CHECKS, **TASKS}.items():
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
        (out / "results.json").write_text(json.dumps(results, indent=1))
    runtime.close()


if __name__ == "__main__":
    main()
