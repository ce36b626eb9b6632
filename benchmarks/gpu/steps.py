"""Training steps against peers, with the measurements of `benchmarks.speed.training_steps`."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.job import Job
from benchmarks.peers.training import FLOW_HOSTS, IMAGE_HOSTS, VIDEO_HOSTS, Host
from benchmarks.speed.devices import Setting
from benchmarks.speed.throughput import steps_table, steps_values
from benchmarks.speed.training_steps import Case, Comparison, compare
from speedit_plugins.trainer.logging.throughput import peak_flops

# Counted rounds of steps; fewer if the time ends before.
ROUNDS = 20
# Share of a part's time that the counted rounds of one precision may take. Building the models takes most.
PRECISION_SHARE = 0.15
# Batches as large as in the scripts' published trainings on one card, or nearly; halved if they do not fit.
CASES: Mapping[str, Case] = {
    "dit-b2": Case("DiT-B/2", 64, 32),
    "dit-xl2": Case("DiT-XL/2", 32, 32),
    "latte": Case("Latte-B/2", 4, 32, num_frames=16),
    "sit-b2": Case("DiT-B/2", 64, 32, is_flow=True),
    "compiled": Case("DiT-B/2", 64, 32),
}
SMALL_CASES: Mapping[str, Case] = {
    **dict.fromkeys(CASES, Case("DiT-S/8", 2, 8)),
    "latte": Case("Latte-S/8", 1, 8, num_frames=2),
    "sit-b2": Case("DiT-S/8", 2, 8, is_flow=True),
}
PEERS: Mapping[str, Sequence[Host]] = {
    **dict.fromkeys(CASES, IMAGE_HOSTS[:1]),
    "latte": VIDEO_HOSTS,
    "sit-b2": FLOW_HOSTS,
}


def measure_steps(job: Job) -> None:
    """Says a table for each precision of the part's case. Without a checkout ours are measured alone."""
    case = (SMALL_CASES if job.is_small else CASES)[job.part]
    there = [host for host in PEERS[job.part] if host.is_in(job.hosts)]
    with_compiled = job.part == "compiled"
    if job.is_small:
        # Nothing is compiled: that would take a CPU a minute.
        torch.compiler.set_stance("force_eager")
    for precision in ("bf16",) if with_compiled else ("fp32", "bf16"):
        setting = Setting(job.device, precision, budget_seconds=PRECISION_SHARE * job.seconds)
        found = fitting(
            case,
            lambda case, setting=setting: compare(
                case,
                there,
                job.hosts,
                2 if job.is_small else ROUNDS,
                with_compiled=with_compiled,
                setting=setting,
            ),
        )
        job.say(*told_steps(found, case))
        # The next precision starts with a batch that fits, and without the memory of this one.
        case = found.case
        _free()


def fitting(case: Case, measure: Callable[[Case], Comparison]) -> Comparison:
    """The measurement of the case, with half the batch as often as the device's memory is too small."""
    while True:
        try:
            return measure(case)
        except torch.OutOfMemoryError:
            if case.batch == 1:
                raise
        case = replace(case, batch=case.batch // 2)
        _free()


def told_steps(found: Comparison, wanted: Case) -> tuple[str, dict[str, Any]]:
    """The Markdown of a comparison, and its values; it says if the batch is smaller than wanted."""
    device, peak = found.setting.device, None
    lines = [f"**{found.setting}**, {len(next(iter(found.sides.values())).seconds)} rounds"]
    if device == "cuda":
        name = torch.cuda.get_device_name()
        peak = peak_flops(name, found.setting.precision, allow_tf32=True)
        known = "is not known, so there is no MFU" if peak is None else f"is {peak / 1e12:g} TFLOP/s"
        lines.append(f"The dense peak of {name} in this precision {known}.")
    if found.case != wanted:
        lines.append(f"The device's memory is too small for a batch of {wanted.batch}.")
    table = steps_table(found, None, peak)
    shares = {} if peak is None else {name: found.mfu(name, peak) for name in found.sides}
    return "\n\n".join([*lines, table]), {**steps_values(found), "mfu": shares, "peak_flops": peak}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
