"""The process of one run: stand-ins first, then the host's script, with or without the launcher.

    python -m whole_trainings.child SPEC.json

`runs.Run` writes the spec.
"""

import builtins
import functools
import json
import os
import random
import runpy
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

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
    if spec["packages"] and spec["packages"] not in sys.path:
        sys.path.insert(1, spec["packages"])
    replaced = colossalai_on_cpu.install() if spec["colossalai"] else []
    replaced += stand_ins.install_on_cpu() if spec["on_cpu"] else stand_ins.install_common()
    rank = os.environ.get("RANK", "0")
    replayed = Record.load(Path(f"{spec['replay']}.{rank}.pt")).t if spec["replay"] else None
    recorder = Recorder(spec["model"], replayed)
    recorder.record.stand_ins = replaced
    for name in spec["unused"]:
        sys.modules[name] = inert_module(name)
        recorder.record.stand_ins.append(f"{name} (not used here, and cannot be imported)")
    os.chdir(spec["folder"])
    # As Python starts a script, with PYTHONPATH=. in the checkout.
    sys.path[:1] = [str(Path(spec["script"]).parent), spec["checkout"]]
    recorder.record.stand_ins += _stand_ins_of_host(spec, recorder.record, replayed)
    _watch_host(spec, recorder)
    # What a script leaves to chance, such as the crops of its videos, is the same in every run.
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    code = 1
    try:
        code = _run(spec)
    finally:
        recorder.record.exit_code = code
        recorder.record.samples += stand_ins.SAVED
        recorder.record.save(Path(f"{spec['record']}.{rank}.pt"))
        if dist.is_initialized():
            dist.destroy_process_group()
    return code


def _stand_ins_of_host(
    spec: dict[str, Any], record: Record, replayed: list[torch.Tensor] | None
) -> list[str]:
    """Puts in place what this host alone needs. Returns what was replaced."""
    replaced: list[str] = []
    if spec["stand_ins"]:
        module, _, function = spec["stand_ins"].rpartition(".")
        replaced += getattr(import_module(module), function)()
    if spec["prepare"]:
        prepare = import_module(spec["prepare"]).prepare
        replaced += prepare(record, Path(spec["folder"]), replayed)
    return replaced


def _watch_host(spec: dict[str, Any], recorder: Recorder) -> None:
    """Watches the host's functions as soon as they are imported, and gives small models their names."""
    finder = AfterImport()
    for model in spec["small"]:
        finder.add(model["module"], functools.partial(add_small, model=model))
    watched = {"factories": recorder.watching, "losses": recorder.keeping, "embeddings": recorder.seeing}
    for kind, watching in watched.items():
        for module, function in spec[kind]:
            finder.add(module, functools.partial(watch, function=function, watching=watching))
    sys.meta_path.insert(0, finder)
    if spec["script_class"]:
        watch_script(recorder, *spec["script_class"])


class AfterImport(MetaPathFinder):
    """Changes modules of the host as soon as they are imported, in the host's own order."""

    def __init__(self) -> None:
        self._actions: dict[str, list[Callable[[ModuleType], None]]] = defaultdict(list)

    def add(self, name: str, action: Callable[[ModuleType], None]) -> None:
        """Lets a function have the module of this name after it has run."""
        self._actions[name].append(action)

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of a module that is to be changed; None for any other."""
        spec = PathFinder.find_spec(name, path) if name in self._actions else None
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            for action in self._actions[name]:
                action(module)

        loader.exec_module = executed
        return spec


def watch(module: ModuleType, function: str, watching: Callable[..., Any]) -> None:
    """Puts what a recorder makes of a host's function in its place."""
    setattr(module, function, watching(getattr(module, function)))


def watch_script(recorder: Recorder, name: str, method: str) -> None:
    """Lets a recorder watch a class that a script will define."""
    build_class: Any = builtins.__build_class__

    def build(body: Any, class_name: str, *bases: Any, **options: Any) -> type:
        made = build_class(body, class_name, *bases, **options)
        is_it = class_name == name and made.__module__ == "__main__"
        return recorder.watch_class(made, method) if is_it else made

    setattr(builtins, "__build_class__", build)  # noqa: B010 - mypy: it is final


def add_small(home: ModuleType, model: dict[str, Any]) -> None:
    """Gives a small model of a host its name; see `SmallModel`."""
    table, name = model["table"], model["name"]
    models = getattr(home, table) if table else vars(home)
    # A registry of mmengine has a dict.
    models = getattr(models, "module_dict", models)
    made = getattr(home, model["model"])

    def small(*args: Any, **options: Any) -> Any:
        kept = {key: value for key, value in options.items() if key not in model["ignores"]}
        return made(*args, **{**model["sizes"], **kept})

    models[name] = small


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
