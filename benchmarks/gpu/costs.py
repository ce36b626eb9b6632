"""What a draw costs, and what a policy adds to other loops, with the measurements of `benchmarks.speed`."""

import torch

from benchmarks.gpu import plan
from benchmarks.gpu.job import Job
from benchmarks.speed import draw_cost, wrapper_overhead
from benchmarks.speed.devices import allow_tf32
from benchmarks.speed.throughput import draw_table


def measure_draw(job: Job) -> None:
    """Says what a draw costs."""
    sizes, repetitions = ((2,), 2) if job.is_small else ((32, 256), 400)
    found = draw_cost.measure(job.hosts, sizes, repetitions, device=job.device)
    medians = {
        str(batch): {name: spread.median for name, spread in row.items()} for batch, row in found.items()
    }
    job.say(draw_table(found), medians)


def measure_wrappers(job: Job) -> None:
    """Says what the wrappers add to steps of other loops."""
    allow_tf32()
    checkout = job.hosts / plan.DIT
    rounds, repetitions, batch, edge = (2, 3, 2, 8) if job.is_small else (15, 500, 32, 32)
    options = wrapper_overhead.Options(
        rounds,
        repetitions,
        torch.get_num_threads(),
        batch,
        edge,
        checkout if checkout.is_dir() else None,
        job.device,
    )
    found = wrapper_overhead.measure(options)
    shares = {name: found.share(timings).median for name, timings in found.seams.items()}
    job.say(f"{wrapper_overhead.answer(found)}\n\n{wrapper_overhead.tables(found)}", shares)
