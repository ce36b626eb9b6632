"""Sampling and a race, with the measurements of `benchmarks.speed.sampling_calls` and `benchmarks.race`."""

import re

import torch

from benchmarks.gpu import plan
from benchmarks.gpu.job import Job

# Share of the part's time that the race plans with. The rest is for imports and its figure.
RACE_SHARE = 0.7


def measure_sampling(job: Job) -> None:
    """Says the pace of samples beside DiT's, and how few calls are as good as the reference's."""
    if (job.hosts / plan.DIT).is_dir():
        _measure_pace(job)
    else:
        job.say("The pace is left out: it needs DiT's checkout.", {})
    if not (job.hosts / plan.SPEED).is_dir():
        job.say("The calls are left out: they need the reference's checkout.", {})
        return
    from benchmarks.speed import sampling_calls
    from benchmarks.speed.throughput import sampling_table

    numbers = {"num_steps": 800, "num_samples": 500, "num_noises": 3}
    if job.is_small:
        numbers = {"num_steps": 20, "num_samples": 20, "num_noises": 2}
    calls = {"ddim": (5,), "dpm": (5,)} if job.is_small else sampling_calls.CALLS
    found = sampling_calls.measure(job.hosts, **numbers, calls=calls, device=job.device)
    job.say(sampling_table(found), {"seconds": found.seconds, "level": found.level})


def _measure_pace(job: Job) -> None:
    from benchmarks.speed import sampling_pace
    from benchmarks.speed.devices import allow_tf32

    allow_tf32()
    samples, rounds = sampling_pace.Samples("DiT-XL/2", 8, 32, 25), 5
    if job.is_small:
        samples, rounds = sampling_pace.Samples("DiT-S/8", 2, 8, 2), 2
    found = sampling_pace.measure(job.hosts / plan.DIT, samples, rounds=rounds, device=job.device)
    job.say(sampling_pace.told(samples, found), {"host": found.host, "ours": found.ours})


def run_race(job: Job) -> None:
    """Says the report of a race of flows; nothing without SiT."""
    if not (job.hosts / plan.SIT).is_dir():
        job.say("Left out: it needs SiT's checkout.", {})
        return
    from benchmarks.race.__main__ import main

    out = job.folder / "race"
    main([*race_options(job), "--out", str(out)])
    text = (out / "report.md").read_text(encoding="utf-8")
    # Its headings are below that of the part.
    job.say(re.sub("^#", "##", text, flags=re.MULTILINE), {"options": race_options(job)})


def race_options(job: Job) -> list[str]:
    """The race's options: on Fashion-MNIST if it is there, else on the embedded digits."""
    common = ["--hosts", str(job.hosts), "--device", job.device, "--peers", "SiT", "--ours", "ours, auto"]
    digits = ["--data", "digits", "--image-size", "16", "--patch-size", "4"]
    if job.is_small:
        sizes = ["--steps", "40", "--num-samples", "100", "--batch-size", "4", "--width", "16"]
        return [*common, *digits, *sizes, "--depth", "1", "--heads", "2", "--calls", "3", "--turns", "2"]
    from benchmarks.flow.sets import FASHION

    data = ["--data-dir", str(job.data)] if (job.data / FASHION).is_file() else digits
    minutes = f"{RACE_SHARE * job.seconds / 60:.2f}"
    threads = str(torch.get_num_threads())
    own = ["--minutes", minutes, "--calls", "9", "--turns", "12", "--threads", threads]
    return [*common, "ours, stack", *data, *own]
