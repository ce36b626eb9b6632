"""Starts a host's script in processes of its own, and reads what they recorded."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whole_trainings import child, colossalai_on_cpu
from whole_trainings.recording import Record

ROOT = Path(__file__).resolve().parents[2]
# torchrun's variables, for a plain process.
_PLAIN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@dataclass(frozen=True)
class SmallModel:
    """A model of a host with few parameters.

    Args:
        module: of the host, that has the class and the table of its models.
        model: the class.
        name: that a configuration names the small model by.
        sizes: arguments of the class.
        table: the dict of the host's models; "" if they are the module's own functions.
        ignores: arguments of the host's functions that the class does not have.
    """

    module: str
    model: str
    name: str
    sizes: dict[str, Any]
    table: str = ""
    ignores: tuple[str, ...] = ()


@dataclass(frozen=True)
class Script:
    """A host, for all of its runs.

    Args:
        checkout: of the host.
        work: folder for data, specs and results; the scripts run in it.
        model: class name of the model.
        factories: (module, function) pairs that make the object that trains.
        losses: (module, function) pairs that compute the unweighted loss (B,), where the terms have no mse.
        embeddings: (module, function) pairs that embed t, where no object trains.
        colossalai: whether it trains under ColossalAI.
        unused: modules of the host that these trainings do not use and that cannot be imported here.
        needs: requirements for pip. They are installed without what they depend on, in a folder below `work`
            that comes first on the path, so another version of a library is possible; torch stays.
        prepare: dotted name of a module whose `prepare(record, work, replayed)` runs before the
            script. It records the steps, replays the t of another run if there is one, and returns the
            stand-ins.
        on_cpu: whether the host runs on a CPU by itself; it gets no stand-ins then but those of `prepare`.
        script_class: (class, method) of a class in the script itself that makes the loss.
        stand_ins: dotted name of a function that puts in place what this host alone needs, and returns the
            names of what was replaced.
        small: small models, which get a name beside the host's own.
    """

    checkout: Path
    work: Path
    model: str
    factories: tuple[tuple[str, str], ...]
    losses: tuple[tuple[str, str], ...] = ()
    embeddings: tuple[tuple[str, str], ...] = ()
    colossalai: bool = False
    unused: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    prepare: str = ""
    on_cpu: bool = False
    small: tuple[SmallModel, ...] = ()
    script_class: tuple[str, str] | None = None
    stand_ins: str = ""

    def run(self, name: str, script: str, arguments: list[str], **options: Any) -> "Run":
        """Runs one of the host's scripts to its end. `name` is that of the run's files."""
        self.install()
        return Run(self, name, script, arguments, **options).done()

    @property
    def packages(self) -> Path:
        """The folder of what `needs` names."""
        return self.work / "packages"

    def install(self) -> None:
        """Installs what `needs` names, once.

        Raises:
            RuntimeError: pip failed; with its last line.
        """
        if not self.needs or self.packages.is_dir():
            return
        unfinished = self.packages.with_suffix(".part")
        options = ["--quiet", "--no-deps", "--target", str(unfinished)]
        pip = [sys.executable, "-m", "pip", "install", *options, *self.needs]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip install {' '.join(self.needs)}: {done.stderr.strip().splitlines()[-1]}")
        unfinished.rename(self.packages)

    def replaces_imported(self) -> bool:
        """Whether one of its own packages is imported here already, perhaps in another version."""
        return bool(self.needs) and any(path.stem in sys.modules for path in self.packages.iterdir())


@dataclass
class Run:
    """One run of a script.

    Args:
        host: of the script.
        name: of the run's files.
        script: path in the checkout.
        arguments: of the script.
        launch: options of the launcher; None runs the script without it.
        replay: name of the run whose t this one gets; '' for none.
        num_processes: 1 is a single process, more are started by torchrun.
        variables: of the process's environment.
        asserts: whether the host's assertions hold; without, it is `python -O`.
    """

    host: Script
    name: str
    script: str
    arguments: list[str]
    launch: list[str] | None = None
    replay: str = ""
    num_processes: int = 1
    variables: dict[str, str] = field(default_factory=dict)
    asserts: bool = True
    exit_code: int = -1
    seconds: float = 0.0
    records: list[Record] = field(default_factory=list)

    def done(self) -> "Run":
        """Runs it. The output goes to NAME.log in the work folder.

        A single process is forked from this one, which has imported the large libraries already, unless the
        host needs another version of one of these.
        """
        work = self.host.work
        spec = {
            "script": str(self.host.checkout / self.script),
            "arguments": self.arguments,
            "launch": self.launch,
            "factories": self.host.factories,
            "losses": self.host.losses,
            "embeddings": self.host.embeddings,
            "colossalai": self.host.colossalai,
            "model": self.host.model,
            "unused": self.host.unused,
            "prepare": self.host.prepare,
            "on_cpu": self.host.on_cpu,
            "script_class": self.host.script_class,
            "stand_ins": self.host.stand_ins,
            "small": [vars(model) for model in self.host.small],
            "record": str(work / self.name),
            "replay": str(work / self.replay) if self.replay else "",
            "folder": str(work),
            "packages": str(self.host.packages) if self.host.needs else "",
            "checkout": str(self.host.checkout),
        }
        path = work / f"{self.name}.json"
        path.write_text(json.dumps(spec, indent=1), encoding="utf-8")
        started = time.monotonic()
        log = work / f"{self.name}.log"
        if self.num_processes == 1 and not self.host.replaces_imported():
            if self.host.colossalai:
                colossalai_on_cpu.preload()
            forked = multiprocessing.get_context("fork").Process(
                target=child.start, args=(str(path), str(log), {**_PLAIN, **self.variables})
            )
            forked.start()
            forked.join()
            self.exit_code = forked.exitcode or 0
        else:
            with log.open("w", encoding="utf-8") as file:
                done = subprocess.run(
                    self.command(path), stdout=file, stderr=file, env=self.environment(), check=False
                )
            self.exit_code = done.returncode
        self.seconds = time.monotonic() - started
        self.records = [Record.load(work / f"{self.name}.{rank}.pt") for rank in range(self.num_processes)]
        return self

    def command(self, spec: Path) -> list[str]:
        """The command line of one process of its own, or of several."""
        module = ["-m", "whole_trainings.child", str(spec)]
        if self.num_processes == 1:
            return [sys.executable, *module]
        processes = ["--standalone", f"--nproc_per_node={self.num_processes}"]
        return [sys.executable, "-m", "torch.distributed.run", *processes, *module]

    def environment(self) -> dict[str, str]:
        """The environment of these processes: one thread each, no network."""
        path = [str(ROOT), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
        if self.host.needs:
            path.insert(0, str(self.host.packages))
        # Without these variables a trainer that runs on a CPU by itself takes one process.
        plain = _PLAIN if self.num_processes == 1 and not self.host.on_cpu else {}
        environment = {**os.environ, **plain, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
        if self.host.on_cpu:
            environment["ACCELERATE_USE_CPU"] = "1"
        environment.update(self.variables, HF_HUB_OFFLINE="1", PYTHONDONTWRITEBYTECODE="1")
        if not self.asserts:
            environment["PYTHONOPTIMIZE"] = "1"
        return environment

    def last_words(self) -> str:
        """The last line of its output that says something."""
        text = (self.host.work / f"{self.name}.log").read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1][-300:] if lines else ""

    def said(self, words: str) -> bool:
        """Whether its output has these words."""
        return words in (self.host.work / f"{self.name}.log").read_text(encoding="utf-8", errors="replace")
