"""Kills a two-process training again and again, and compares its end with an uninterrupted run's.

Each round launches the run under torchrun. It picks a moment (during the start, between steps, or while a
checkpoint is being written) and a rank, and sends the rank SIGKILL. The next round resumes from the newest
whole checkpoint. After the last kill the run finishes. Its last checkpoint is then compared bit for bit, for
every tensor, with the checkpoint of a run that nobody disturbed, and that waited for each save.

    python -m benchmarks.soak [--kills 40] [--plugin zero2] [--precision fp32] [--async-save] [--json OUT]
        [key=value ...]
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.logging.tracking import read_metrics

CONFIG = "configs/image/digits/speedit.yaml"
# A step takes some 30 ms, and a checkpoint is written about every second.
OPTIONS = (
    "model.hidden_size=64",
    "model.depth=2",
    "data.batch_size=32",
    "max_training_steps=2000",
    "ckpt_every=20",
    "log_every=5",
    "enable_tensorboard_log=false",
)
MOMENTS = ("start", "step", "save")
HANG_SECONDS = 3600  # for a launch that hangs: one takes half a minute, a busy machine ten times that
START_SECONDS = 12.0  # imports and building, on two cores


@dataclass(frozen=True)
class Kill:
    """One launch that was killed.

    Args:
        moment: the moment the kill aimed at.
        rank: the rank that was killed.
        newest_step: newest checkpoint on disk at the launch, 0 for none; it is checked to be whole.
        resumed_step: the step at which the launch said it resumes; None if it was killed before.
        is_unfinished: whether the kill left a half-written checkpoint.
        steps_beyond: steps logged, just before the kill, after that of a checkpoint that was being written;
            None without one. It is more than 0 only if the training went on meanwhile.
    """

    moment: str
    rank: int
    newest_step: int
    resumed_step: int | None
    is_unfinished: bool
    steps_beyond: int | None

    @property
    def is_wrong(self) -> bool:
        """Whether the launch resumed from another checkpoint than the newest."""
        return self.resumed_step not in (None, self.newest_step)


def main() -> None:
    """Prints a line per kill and the verdict; exit code 1 if the runs differ or a checkpoint was lost."""
    arguments = _arguments()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    options = [
        *OPTIONS,
        f"plugin={arguments.plugin}",
        f"precision={arguments.precision}",
        *arguments.overrides,
    ]
    start = time.monotonic()
    print(f"a run left alone, under {arguments.plugin} in {arguments.precision}", flush=True)
    _finish(_launch(folder / "whole", options))
    if arguments.async_save:
        options.append("async_save=true")
    kills = _killed(folder / "killed", options, arguments)
    differences = _differences(folder / "whole", folder / "killed")
    print(f"{_summary(kills)}; {time.monotonic() - start:.0f} s in all")
    print(
        f"different: {', '.join(differences)}" if differences else "the finished runs are equal bit for bit"
    )
    if arguments.json is not None:
        record = {"options": options, "kills": [asdict(kill) for kill in kills], "differences": differences}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if differences or any(kill.is_wrong for kill in kills):
        print(f"both runs are kept in {folder}")
        sys.exit(1)
    shutil.rmtree(folder)


def _killed(folder: Path, options: list[str], arguments: argparse.Namespace) -> list[Kill]:
    """Trains to the end, with kills on the way."""
    chance = random.Random(arguments.seed)
    kills = []
    for number in range(arguments.kills):
        newest = _newest_step(folder)
        # Half-written files of an earlier kill must not count as a save of this launch.
        for leftover in (folder / "checkpoints").glob("*.tmp"):
            shutil.rmtree(leftover)
        job = _launch(folder, options)
        moment, rank = chance.choice(MOMENTS), chance.randrange(2)
        _wait_for(moment, job, folder, chance, save_seconds=arguments.save_seconds)
        processes = _ranks(job)
        if job.poll() is not None:
            raise SystemExit(f"the run ended by itself, before kill {number}:\n{job.communicate()[0]}")
        beyond = _steps_beyond(folder)
        processes[rank].send_signal(signal.SIGKILL)
        output = job.communicate(timeout=HANG_SECONDS)[0]
        said = re.search(r"going on from .*step_(\d+)", output)
        is_unfinished = any((folder / "checkpoints").glob("*.tmp"))
        kills.append(Kill(moment, rank, newest, int(said[1]) if said else None, is_unfinished, beyond))
        print(f"{number + 1:3d}  {kills[-1]}", flush=True)
    newest = _newest_step(folder)
    output = _finish(_launch(folder, options))
    if newest and f"going on from {folder}/checkpoints/step_{newest:07d}" not in output:
        raise SystemExit(f"the last launch did not go on from step {newest}:\n{output}")
    return kills


def _wait_for(
    moment: str, job: subprocess.Popen[str], folder: Path, chance: random.Random, *, save_seconds: float
) -> None:
    """Waits until a random time within that part of the launch."""
    begun = _last_logged(folder)
    _until(lambda: len(_ranks(job)) == 2, job)
    if moment == "start":
        time.sleep(chance.uniform(0, START_SECONDS))
        return
    # When training begins it cuts the metrics back to the checkpoint.
    _until(lambda: _last_logged(folder) not in (None, begun), job)
    if moment == "step":
        time.sleep(chance.uniform(0, 2.0))
        return
    _until(lambda: any((folder / "checkpoints").glob("*.tmp")), job, pause_seconds=0.0005)
    time.sleep(chance.uniform(0, save_seconds))


def _until(condition: Callable[[], bool], job: subprocess.Popen[str], *, pause_seconds: float = 0.02) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not condition() and job.poll() is None:
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing happened for {HANG_SECONDS} s")
        time.sleep(pause_seconds)


def _ranks(job: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The job's training processes, by rank."""
    found = {}
    try:
        for process in psutil.Process(job.pid).children():
            rank = process.environ().get("RANK")
            if rank is not None:
                found[int(rank)] = process
    except psutil.Error:
        return {}
    return found


def _last_logged(folder: Path) -> int | None:
    rows = read_metrics(folder)
    return rows[-1]["step"] if rows else None


def _steps_beyond(folder: Path) -> int | None:
    """Steps from the checkpoint that is being written to the last one logged; None without one."""
    found = [int(path.stem.removeprefix("step_")) for path in (folder / "checkpoints").glob("*.tmp")]
    return max(0, (_last_logged(folder) or 0) - found[0]) if found else None


def _newest_step(folder: Path) -> int:
    """Step of the newest checkpoint, 0 for none. Every published checkpoint must be whole."""
    found = checkpoints.newest_first(folder / "checkpoints")
    for path in found:
        if reason := checkpoints.damage(path):
            raise SystemExit(f"a published checkpoint is damaged: {path}: {reason}")
    return checkpoints.step_of(found[0]) if found else 0


def _differences(*folders: Path) -> list[str]:
    """Names of the tensors that differ between the last checkpoints of two runs."""
    found = [checkpoints.newest(folder / "checkpoints") for folder in folders]
    whole, killed = (checkpoints.load(path) for path in found if path is not None)
    names = ("model", "ema", "moments")
    different = [
        f"{part}/{name}"
        for part in names
        for name in {*getattr(whole, part), *getattr(killed, part)}
        if not _same(getattr(whole, part), getattr(killed, part), name)
    ]
    keys = {*whole.state, *killed.state}
    return different + [f"state/{key}" for key in keys if not _same(whole.state, killed.state, key)]


def _same(one: Any, other: Any, name: str) -> bool:
    return name in one and name in other and _equal(one[name], other[name])


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return type(one) is type(other) and bool(one == other)


def _summary(kills: list[Kill]) -> str:
    moments = Counter(kill.moment for kill in kills)
    counted = ", ".join(f"{moments[moment]} at {moment}" for moment in MOMENTS)
    return (
        f"{len(kills)} kills ({counted}; {sum(kill.rank == 0 for kill in kills)} of rank 0); "
        f"{sum(kill.steps_beyond is not None for kill in kills)} came while a checkpoint was being written, "
        f"{sum((kill.steps_beyond or 0) > 0 for kill in kills)} of them when later steps were done; "
        f"{sum(kill.is_unfinished for kill in kills)} left one half written; "
        f"{sum(kill.is_wrong for kill in kills)} launches went on from another checkpoint than the newest"
    )


def _launch(folder: Path, options: list[str]) -> subprocess.Popen[str]:
    torchrun = Path(sys.executable).with_name("torchrun")
    launcher = [str(torchrun), "--standalone", "--nproc_per_node", "2", "tools/main.py"]
    return subprocess.Popen(
        [*launcher, "-c", CONFIG, "-p", "train", f"experiment_dir={folder}", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _finish(job: subprocess.Popen[str]) -> str:
    output = job.communicate(timeout=HANG_SECONDS)[0]
    if job.returncode != 0:
        raise SystemExit(f"the run failed:\n{output}")
    return output


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--plugin", default="zero2", choices=("ddp", "zero1", "zero2", "fsdp2"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--seed", type=int, default=0, help="of ranks and moments")
    parser.add_argument("--async-save", action="store_true", help="the killed run saves in the background")
    parser.add_argument(
        "--save-seconds", type=float, default=0.02, help="longest time from a save to its kill"
    )
    parser.add_argument("--json", type=Path, help="write every kill here")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the config")
    return parser.parse_args()


if __name__ == "__main__":
    main()
