"""Faults around a run: signals, dead terminals and workers, full disks, limits, several processes."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from benchmarks.faults.bench import NUM_STEPS, Bench, Fault, Outcome, finished

LONG = "max_training_steps=100000"
# A step of about a second, so that a second signal meets it.
_SLOW = ("model.hidden_size=512", "model.depth=12", "data.batch_size=64")
_WORKER = ("data.num_workers=1", "data.prefetch_factor=2")


def _until_logged(bench: Bench, process: psutil.Popen) -> None:
    """Waits until the run has trained some steps."""
    path = bench.run_folder / "metrics.jsonl"
    while process.poll() is None and not (path.is_file() and path.read_bytes().count(b"\n") > 1):
        time.sleep(0.05)


def _until_saved(bench: Bench, process: psutil.Popen) -> None:
    """Waits until the run has a checkpoint."""
    while process.poll() is None and not _saved_steps(bench):
        time.sleep(0.05)


def _saved_steps(bench: Bench) -> list[int]:
    return [int(path.name[5:12]) for path in (bench.run_folder / "checkpoints").glob("step_???????")]


def signalled(*numbers: int, overrides: Sequence[str] = ()) -> Callable[[Bench], Outcome]:
    """Sends these signals to a training."""

    def act(bench: Bench) -> Outcome:
        process = bench.start(bench.arguments(LONG, "ckpt_every=100000", *overrides))
        _until_logged(bench, process)
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.2)
        return finished(process)

    return act


def _is_saved(bench: Bench) -> str | None:
    found = list((bench.run_folder / "checkpoints").glob("step_*"))
    return None if [path for path in found if path.suffix != ".tmp"] else "no checkpoint was saved"


def _killed_then_resumed(bench: Bench) -> Outcome:
    process = bench.start(bench.arguments(LONG, "ckpt_every=2"))
    _until_saved(bench, process)
    process.kill()
    finished(process)
    return bench.speedit(f"max_training_steps={max(_saved_steps(bench)) + 4}")


def _dead_terminal(bench: Bench) -> Outcome:
    """Trains with a terminal that closes, and goes on without it."""
    ours, theirs = os.openpty()
    process = bench.start(bench.arguments("max_training_steps=400"), stdout=theirs)
    os.close(theirs)
    _until_logged(bench, process)
    os.close(ours)
    outcome = finished(process)
    steps = (bench.run_folder / "metrics.jsonl").read_text().count("\n")
    return Outcome(outcome.returncode, f"{steps} of 400 steps", "")


def _worker_killed(bench: Bench) -> Outcome:
    process = bench.start(bench.arguments(LONG, "ckpt_every=100000", *_WORKER))
    _until_logged(bench, process)
    for child in psutil.Process(process.pid).children():
        if "main.py" in " ".join(child.cmdline()):
            child.send_signal(signal.SIGKILL)
    return finished(process)


def limited(
    limit: str, *overrides: str, phase: str = "train", is_trained: bool = False
) -> Callable[[Bench], Outcome]:
    """Runs a phase under a limit of bash's ulimit."""

    def act(bench: Bench) -> Outcome:
        if is_trained:
            bench.trained()
        return bench.shell(f'ulimit {limit} && exec "$@"', bench.arguments(*overrides, phase=phase))

    return act


def _full_metrics(bench: Bench) -> Outcome:
    """Trains on a disk on which the metrics find no more room. A line of them has about 1 KiB."""
    line = bench.arguments("max_training_steps=200", "ckpt_every=1000")
    return bench.shell('ulimit -f 48 && exec "$@"', line)


def _unreadable_later(bench: Bench) -> Outcome:
    """Trains on images of which one breaks between two steps."""
    from benchmarks.faults.data import make_images, train_on

    root = make_images(bench.folder, 40)
    path = next(iter(sorted(root.rglob("*.png"))))
    path.unlink()
    path.mkdir()
    (path / "x").touch()
    path.rename(path.with_suffix(".d"))
    path.symlink_to("/proc/self/mem")
    return train_on(bench, f"type: ImageFolder, root: {root}, follow_links: true", *_WORKER)


def ranks(line: str, *overrides: str) -> Callable[[Bench], Outcome]:
    """Trains with two processes; `line` is what each of them executes, with "$@" the command."""

    def act(bench: Bench) -> Outcome:
        torchrun = str(Path(sys.executable).with_name("torchrun"))
        launcher = [
            torchrun,
            "--standalone",
            "--nproc_per_node",
            "2",
            "--no-python",
            "bash",
            "-c",
            line,
            "bash",
        ]
        return bench.command([*launcher, *bench.arguments(*overrides)])

    return act


def _rank_killed(bench: Bench) -> Outcome:
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    launcher = [torchrun, "--standalone", "--nproc_per_node", "2", "--no-python"]
    process = bench.start([*launcher, *bench.arguments(LONG, "ckpt_every=2")])
    _until_saved(bench, process)
    for child in psutil.Process(process.pid).children():
        if child.environ().get("RANK") == "1":
            child.kill()
    finished(process)
    return bench.speedit(f"max_training_steps={max(_saved_steps(bench)) + 4}")


def _two_trainers(bench: Bench) -> Outcome:
    first = bench.start(bench.arguments(LONG))
    _until_logged(bench, first)
    second = bench.speedit("max_training_steps=6")
    first.send_signal(signal.SIGTERM)
    finished(first)
    return second


def _closed_pipe(bench: Bench) -> Outcome:
    bench.trained()
    line = '"$@" 2>&1 | head -c 1 > /dev/null; exit ${PIPESTATUS[0]}'
    return bench.shell(line, bench.arguments("max_training_steps=40"))


def _reaches_the_end(num_steps: int) -> Callable[[Bench], str | None]:
    def check(bench: Bench) -> str | None:
        place = bench.run_folder / "checkpoints" / f"step_{num_steps:07d}"
        return None if place.is_dir() else f"the training did not reach step {num_steps}"

    return check


SIGNALS: Sequence[Fault] = (
    Fault("Ctrl-C", signalled(signal.SIGINT), ("stopped by SIGINT",), "well", _is_saved),
    Fault("SIGTERM", signalled(signal.SIGTERM), ("stopped by SIGTERM",), "well", _is_saved),
    Fault("SIGHUP, when a connection ends", signalled(signal.SIGHUP), ("SIGHUP",), "well", _is_saved),
    Fault(
        "Ctrl-C twice",
        signalled(signal.SIGINT, signal.SIGINT, overrides=_SLOW),
        ("interrupted|killed", "checkpoint|step"),
        never="nothing was started",
    ),
    Fault("SIGKILL, and the same command again", _killed_then_resumed, ("going on from",), "well"),
    Fault("a terminal that closes", _dead_terminal, ("400 of 400",), "well", _reaches_the_end(400)),
    Fault("a reader that closes the pipe", _closed_pipe, (), "well", _reaches_the_end(40)),
    Fault(
        "a killed loading process", _worker_killed, ("worker|loading process", "memory"), "error", _is_saved
    ),
)

LIMITS: Sequence[Fault] = (
    Fault("metrics that find no more room", _full_metrics, (r"cannot write .*metrics\.jsonl",)),
    Fault(
        "files of at most 8 KiB, in training",
        limited("-f 8"),
        (r"step_0000002|config_train|environment|loss\.png",),
    ),
    Fault(
        "files of at most 1 KiB, in `sample`",
        limited("-f 1", phase="sample", is_trained=True),
        (r"samples\.png|config_sample",),
    ),
    Fault(
        "files of at most 1 KiB, in `inference`",
        limited("-f 1", "num_samples=64", phase="inference", is_trained=True),
        (r"inference|config_inference",),
    ),
    Fault(
        "at most 24 open files, four workers", limited("-n 24", "data.num_workers=4"), ("open files|ulimit",)
    ),
    Fault(
        "too little memory for the model",
        limited("-v 12000000", "model.hidden_size=8192", "model.depth=40"),
        ("memory",),
    ),
    Fault("a file that cannot be read", _unreadable_later, (r"\.png",)),
)

PROCESSES: Sequence[Fault] = (
    Fault("two trainers on one folder", _two_trainers, ("another|in use|already", r"\brun\b")),
    Fault("ranks with different seeds", ranks('exec "$@" seed=$RANK'), ("seed", "0", "1")),
    Fault(
        "ranks with different learning rates",
        ranks('exec "$@" optimizer.lr=1e-$((RANK + 3))'),
        (r"optimizer\.lr", "0.001", "0.0001"),
    ),
    Fault(
        "ranks with different policies",
        ranks('[ $RANK = 0 ] && p=uniform || p=speed; exec "$@" diffusion.policy="{type: $p}"'),
        ("policy", "uniform", "speed"),
    ),
    Fault(
        "ranks with different batches",
        ranks('exec "$@" data.batch_size=$((RANK * 8 + 8))'),
        ("batch_size", "8", "16"),
    ),
    Fault(
        "ranks of which one resumes never",
        ranks('[ $RANK = 0 ] && r=auto || r=never; exec "$@" resume=$r'),
        ("resume", "auto", "never"),
    ),
    Fault("a wrong key on two ranks", ranks('exec "$@" max_steps=3'), ("max_training_steps",)),
    Fault(
        "a batch that two ranks cannot share",
        ranks('exec "$@" data.batch_size=7'),
        ("batch_size", "7"),
    ),
    Fault("a rank that is killed, and one process goes on", _rank_killed, ("going on from",), "well"),
    Fault("`sample` under torchrun", ranks('exec "$@" -p sample'), ("one process",)),
)
assert NUM_STEPS == 4
