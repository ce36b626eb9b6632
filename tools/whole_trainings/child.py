"""The process of one run: stand-ins first, then the host's script, with or without the launcher.

    python -m whole_trainings.child SPEC.json

`runs.Run` writes the spec.
"""

import json
import os
import random
import runpy
import sys
import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

# The contract is part of the test suite.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import numpy as np
import torch
import torch.distributed as dist
from conformance.stand_ins import inert_module

from speedit_plugins import launch
from whole_trainings import colossalai_on_cpu, stand_ins
from whole_trainings.recording import Record, Recorder


def main(spec_path: str) -> int:
    """Runs one spec. Returns the exit code of the launcher, or of the script."""
    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    if spec["packages"]:
        sys.path.insert(0, spec["packages"])
    replaced = colossalai_on_cpu.install() if spec["colossalai"] else []
    replaced += stand_ins.install_common()
    rank = os.environ.get("RANK", "0")
    replayed = Record.load(Path(f"{spec['replay']}.{rank}.pt")).t if spec["replay"] else None
    recorder = Recorder(spec["model"], replayed)
    recorder.record.stand_ins = replaced
    for name in spec["unused"]:
        sys.modules[name] = inert_module(name)
        recorder.record.stand_ins.append(f"{name} (not used here, and cannot be imported)")
    os.chdir(spec["folder"])
    # The script's own folder comes first when it runs; this one is what PYTHONPATH=. gives.
    sys.path.insert(0, spec["checkout"])
    watched = {
        "factories": recorder.watching,
        "losses": recorder.keeping,
        "embeddings": recorder.seeing,
    }
    for kind, watching in watched.items():
        for module, function in spec[kind]:
            made = import_module(module)
            setattr(made, function, watching(getattr(made, function)))
    # What a script leaves to chance, such as the crops of its videos, is the same in every run.
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    code = 1
    try:
        code = _run(spec)
    finally:
        recorder.record.exit_code = code
        recorder.record.save(Path(f"{spec['record']}.{rank}.pt"))
        if dist.is_initialized():
            dist.destroy_process_group()
    return code


def start(spec_path: str, log: str, environment: Mapping[str, str]) -> None:
    """The whole of a forked process: `main`, with its output in a file. It does not return."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # What it was forked from may have put others in their place.
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1, encoding="utf-8")
    os.environ.update(environment)
    code = 1
    try:
        code = main(spec_path)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _run(spec: dict) -> int:
    if spec["launch"] is not None:
        return launch.main([*spec["launch"], spec["script"], *spec["arguments"]])
    sys.argv = [spec["script"], *spec["arguments"]]
    runpy.run_path(spec["script"], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
