"""Sampling and a race, with the measurements of `benchmarks.speed.sampling_calls` and `benchmarks.race`."""

from benchmarks.gpu import plan
from benchmarks.gpu.job import Job

# Share of the part's time that the race plans with. The rest is for imports and its figure.
RACE_SHARE = 0.7


def measure_sampling(job: Job) -> None:
    """Says how few calls are as good as the reference's, and their seconds; nothing without the reference."""
    if not (job.hosts / plan.SPEED).is_dir():
        job.say("Left out: it needs the reference's checkout.", {})
        return
    from benchmarks.speed import sampling_calls
    from benchmarks.speed.throughput import sampling_table

    numbers = {"num_steps": 800, "num_samples": 500, "num_noises": 3}
    if job.is_small:
        numbers = {"num_steps": 20, "num_samples": 20, "num_noises": 2}
    calls = {"ddim": (5,), "dpm": (5,)} if job.is_small else sampling_calls.CALLS
    found = sampling_calls.measure(job.hosts, **numbers, calls=calls, device=job.device)
    job.say(sampling_table(found), {"seconds": found.seconds, "level": found.level})


def run_race(job: Job) -> None:
    """Says the report of a race of flows; nothing without SiT."""
    if not (job.hosts / plan.SIT).is_dir():
        job.say("Left out: it needs SiT's checkout.", {})
        return
    from benchmarks.race.__main__ import main

    out = job.folder / "race"
    main([*race_options(job), "--out", str(out)])
    job.say((out / "report.md").read_text(encoding="utf-8"), {"options": race_options(job)})


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
    return [*common, "ours, stack", *data, "--minutes", minutes, "--calls", "9", "--turns", "12"]
