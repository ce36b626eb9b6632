"""Checks that need two real processes: run under torchrun by test_distributed.py, all in one launch.

    torchrun --standalone --nproc_per_node 2 tests/distributed_checks.py OUT_FOLDER

Every function `check_...` of the two modules is called on both ranks with a folder of its own; rank 0 writes
results.json, a list of failures (empty: passed) by name.
"""

import json
import sys
import traceback
from pathlib import Path

import distributed_faults
import distributed_numbers
from runs import small_config

from speedit_plugins.engine.runtime import launch

CHECKS = {
    name: check
    for module in (distributed_numbers, distributed_faults)
    for name, check in vars(module).items()
    if name.startswith("check_")
}


def main() -> None:
    out = Path(sys.argv[1])
    wanted = sys.argv[2:]
    runtime = launch(small_config(out))
    results = {}
    for name, check in CHECKS.items():
        if wanted and name not in wanted:
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
