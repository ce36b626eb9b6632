"""Reports a training run in one HTML file: curves, samples over time, policy, config, environment.

    python tools/report.py outputs/digits/speedit
    python tools/report.py RUN_DIR --out FILE

The file contains everything it shows and needs neither network nor JavaScript. It is made from the files in
the run's experiment_dir, and says which of them are missing. The run need not be finished.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from policy_pictures.tables import areas, describe
from run_report import page as html
from run_report.plots import Line, Span, heat_map, line_chart, staircase
from run_report.run import CONFIG, Run, open_run
from run_report.scores import tested
from safetensors import safe_open
from timestep_profile import PROFILE

from speedit_plugins import NoiseSchedule
from speedit_plugins.files import write_whole
from speedit_plugins.trainer import checkpoints, results
from speedit_plugins.trainer.accelerations.summary import in_use
from speedit_plugins.trainer.logging.environment import ENVIRONMENT
from speedit_plugins.trainer.logging.timestep_profile import timestep_ranges
from speedit_plugins.trainer.logging.tracking import EVALUATION, latest
from speedit_plugins.trainer.results import METRICS

MAX_GRIDS = 12


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 or, after an error message on stderr, 2."""
    arguments = _parser().parse_args(argv)
    path = arguments.out or arguments.run / "report.html"
    try:
        run = open_run(arguments.run)
        if path.is_dir() or not path.parent.is_dir():
            raise ValueError(f"--out needs a file in a folder that exists, got {path}")
        text = report(run)
        write_whole(path, text.encode())
    except (ValueError, OSError) as error:
        print(f"report: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{path}  ({len(text) / 2**20:.1f} MB)")
    return 0


def report(run: Run) -> str:
    """The HTML document."""
    step = f"step {run.rows[-1]['step']:,}" if run.rows else "nothing logged yet"
    title = run.config.experiment_name or run.folder.resolve().name
    sections = {
        "Summary": html.facts(summary(run)),
        "Curves": curves(run),
        "Loss and gradient by timestep": by_timestep(run),
        "Samples over time": samples(run),
        "Timestep policy": policy_plots(run),
        "Evaluation": evaluation(run),
        "Config": html.folded(CONFIG, (run.folder / CONFIG).read_text(encoding="utf-8")),
        "Environment": environment(run),
    }
    return html.page(title, f"{run.config.model['type']}, policy {run.policy.name}, {step}", sections)


def summary(run: Run) -> dict[str, str]:
    """The most important facts of the run; '-' if one is unknown."""
    config, last = run.config, latest(run.rows)
    skipped = f", {last['skipped_steps']} skipped" if last.get("skipped_steps") else ""
    trained = _num_trained(run.checkpoint)
    process = config.diffusion.type
    process += f", {config.diffusion.noise_schedule}" if config.diffusion.noise_schedule else ""
    process += ", zero terminal SNR" if config.diffusion.zero_terminal_snr else ""
    pace = [html.short(_median(run, key)) for key in ("steps_per_second", "samples_per_second")]
    return {
        "steps": f"{last.get('step', 0):,} of {config.max_training_steps:,}{skipped}",
        "training time": _duration(_seconds(run)),
        "speed": f"{pace[0]} steps/s, {pace[1]} samples/s (medians of the logged lines)",
        "policy": str(run.policy),
        "accelerations": ", ".join(in_use(config)) or "none",
        "process": f"{process}, T = {run.policy.schedule.num_timesteps}, {config.diffusion.prediction_type}",
        "model": f"{config.model['type']}, "
        + (
            "parameters unknown without a checkpoint"
            if trained is None
            else f"{trained:,} trained parameters"
        ),
        **_task(run),
        "data": f"{config.data.dataset['type']}, batches of {config.data.batch_size}",
        "precision, plugin": f"{config.precision}, {config.plugin}",
        "last loss": html.short(last.get("loss")),
        "last uniform mse": html.short(last.get("uniform_mse")),
        **({"last alignment": html.short(aligned[-1][1])} if (aligned := run.series("alignment")) else {}),
        **({"last validation loss": html.short(last["val_loss"])} if "val_loss" in last else {}),
        "peak memory": _gib(last.get("peak_memory_bytes")),
        "newest checkpoint": "-" if run.checkpoint is None else run.checkpoint.name,
        **{
            name: f"{html.short(metric['value'])} ({metric['num_samples']:,} samples{run.metrics_age})"
            for name, metric in run.test_metrics.items()
        },
    }


def _task(run: Run) -> dict[str, str]:
    """What else than an image the model draws, or what it is given; nothing of a usual one."""
    config, found = run.config, {}
    if config.voxel_size:
        cube = " x ".join([str(config.voxel_size)] * 3)
        found["shapes"] = f"{config.num_points:,} points in" if config.num_points else "solids of"
        found["shapes"] += f" {cube} voxels"
    if factor := config.super_resolution.factor:
        sides = [f"{side} x {side}" for side in (config.image_size // factor, config.image_size)]
        found["super-resolution"] = f"{' to '.join(sides)} pixels"
        found["super-resolution"] += f", noise on the input up to {config.super_resolution.augmentation:g}"
    return found


def curves(run: Run) -> str:
    """Charts of losses, gradient norm, learning rate and speed by step."""
    if not run.rows:
        return html.paragraph(f"{METRICS} has no line yet.", is_quiet=True)
    losses = {
        "loss": "loss (weight × mse + vb + accelerations)"
        if in_use(run.config)
        else "loss (weight × mse + vb)",
        "mse": "mse at the drawn timesteps",
        "uniform_mse": "mse, uniform timesteps",
    }
    if run.series("val_loss"):
        losses["val_loss"] = "validation, mse of the averaged weights"
    lines = [Line(label, run.series(key)) for key, label in losses.items()]
    charts = [
        html.chart(
            "Losses",
            line_chart(lines, x_label="step", y_label="loss", is_log=True),
            labels=list(losses.values()),
        )
    ]
    if aligned := run.series("alignment"):
        line = Line("alignment", aligned)
        drawn = line_chart([line], x_label="step", y_label="mean cosine similarity")
        charts.append(html.chart("Alignment: mean cosine similarity", drawn))
    for key, label, is_log in (
        ("grad_norm", "gradient norm", True),
        ("lr", "learning rate", False),
        ("steps_per_second", "steps per second", False),
    ):
        drawn = line_chart([Line(label, run.series(key))], x_label="step", y_label=label, is_log=is_log)
        charts.append(html.chart(label.capitalize(), drawn))
    return html.group("charts", charts)


def by_timestep(run: Run) -> str:
    """Heat maps by step and timestep, the last logged losses, and the measured profile of a checkpoint."""
    schedule = run.policy.schedule
    charts = [
        _heat_map(run, "loss_per_timestep", "Loss at the drawn timesteps"),
        _last_losses(run, schedule),
        _heat_map(run, "val_loss_per_bin", "Validation: mse, same samples at every timestep"),
        _heat_map(run, "profile_grad_norm", "Gradient norm, same samples at every timestep"),
        _heat_map(run, "profile_mse", "Unweighted mse, same samples at every timestep"),
    ]
    notes = [
        html.paragraph(
            "0 is clean, T is noise. Heat maps show means over equal ranges of timesteps: twenty, and ten of"
            " a validation."
            " Line charts are shaded by the areas of the schedule, as below.",
            is_quiet=True,
        )
    ]
    if not run.series("loss_per_timestep"):
        notes.append(html.paragraph("This run logged no loss per timestep.", is_quiet=True))
    if not run.series("profile_grad_norm"):
        notes.append(
            html.paragraph(
                "The gradient norm per timestep was not logged: profile_every is 0 or was not reached.",
                is_quiet=True,
            )
        )
    profile = run.json(PROFILE)
    if profile is None:
        notes.append(html.paragraph(f"No {PROFILE}: tools/timestep_profile.py writes it.", is_quiet=True))
    else:
        where = f"{profile['weights']} weights, step {profile['step']:,}"
        for key, label in (("loss", "loss"), ("mse", "unweighted mse"), ("grad_norm", "gradient norm")):
            line = Line(label, staircase(profile["ranges"], profile[key]))
            drawn = line_chart([line], x_label="timestep", y_label=label, spans=_spans(schedule))
            charts.append(html.chart(f"{label.capitalize()}, measured: {where}", drawn))
    return "".join(notes) + html.group("charts", [chart for chart in charts if chart])


def samples(run: Run) -> str:
    """The sample grids written during training, evenly selected if there are many, and the final one."""
    grids = sorted((run.folder / results.GRIDS).glob("step_*.png"))
    count = min(MAX_GRIDS, len(grids))
    chosen = [grids[round(i * (len(grids) - 1) / max(1, count - 1))] for i in range(count)]
    # The turning picture of shapes is large, and has neither their names nor sides to compare.
    is_still = run.config.voxel_size > 0
    captions = [f"step {int(path.stem.removeprefix('step_')):,}" for path in chosen]
    shown = [html.image(*each, is_still=is_still) for each in zip(captions, chosen, strict=True)]
    notes = []
    if not grids:
        notes.append("No sample grids were written during training: sample_every is 0 or was not reached.")
    elif count < len(grids):
        notes.append(f"{count} of {len(grids)} grids, evenly selected.")
    finals = results.numbered(run.folder / results.SAMPLES)
    if finals:
        caption = f"{finals[-1].name}, written by the phase sample"
        if stages := run.stages_of_sample:
            caption += f" behind {', '.join(stages)}"
        caption += run.age(finals[-1])
        shown.append(html.image(caption, finals[-1], is_still=is_still))
        if is_still and finals[-1].with_suffix(".gif").is_file():
            shown.append(html.image("The same, turning", finals[-1]))
    else:
        notes.append(f"No {results.SAMPLES}: the phase sample was not run.")
    return "".join(html.paragraph(note, is_quiet=True) for note in notes) + html.group("samples", shown)


def policy_plots(run: Run) -> str:
    """Charts of density, weight and importance by timestep, and the shares of the schedule's areas."""
    policy, schedule = run.policy, run.policy.schedule
    tables = describe(schedule, {policy.name: policy})[policy.name]
    T = schedule.num_timesteps
    charts = []
    for key, scale, title in (
        ("density", T, "Density (uniform = 1)"),
        ("weight", 1, "Weight"),
        ("importance", T, "Importance: density × weight (uniform = 1)"),
    ):
        line = Line(policy.name, [(index, scale * value) for index, value in enumerate(tables[key])])
        drawn = line_chart([line], x_label="timestep", y_label=key, spans=_spans(schedule), x_range=(0, T))
        charts.append(html.chart(title, drawn))
    rows = [
        (
            area,
            f"{share['range'][0]} .. {share['range'][1] - 1}"
            if share["range"][0] < share["range"][1]
            else "empty",
            f"{100 * share['draws']:.1f} %",
            f"{100 * share['importance']:.1f} %",
        )
        for area, share in tables["areas"].items()
    ]
    charts.append(html.table(("area of the schedule", "timesteps", "draws", "importance"), rows))
    return html.paragraph(str(policy)) + html.group("charts", charts)


def evaluation(run: Run) -> str:
    """Curves of what was evaluated in training, and the table of the metrics of the phase test."""
    return _evaluated(run) + tested(run)


def _evaluated(run: Run) -> str:
    """A chart of each figure that `evaluate_every` measured, by step."""
    measured = run.series(EVALUATION)
    names = dict.fromkeys(name for _, figures in measured for name in figures)
    charts = []
    for name in names:
        points = [(step, figures[name]) for step, figures in measured if name in figures]
        drawn = line_chart([Line(name, points)], x_label="step", y_label=name)
        charts.append(html.chart(f"{name}, {run.samples_of_evaluation:,} samples in training", drawn))
    return html.group("charts", charts) if charts else ""


def environment(run: Run) -> str:
    """Table of the environment at the latest start of the training."""
    found = run.json(ENVIRONMENT)
    if found is None:
        return html.paragraph(f"No {ENVIRONMENT}: the run was started by an older version.", is_quiet=True)
    return html.facts({name: str(value) for name, value in found.items()})


def _heat_map(run: Run, key: str, title: str) -> str:
    points = run.series(key)
    if not points:
        return ""
    steps, columns = zip(*points, strict=True)
    drawn = heat_map(
        steps,
        columns,
        y_range=(0, run.policy.schedule.num_timesteps),
        x_label="step",
        y_label="timestep",
        value_label=title,
    )
    return html.chart(title, drawn)


def _last_losses(run: Run, schedule: NoiseSchedule) -> str:
    """Chart of the mean and standard deviation of the loss per timestep, from the last logged line."""
    means, deviations = run.series("loss_per_timestep"), run.series("loss_std_per_timestep")
    if not means or not deviations:
        return ""
    (step, mean), (_, deviation) = means[-1], deviations[-1]
    ranges = timestep_ranges(schedule.num_timesteps)
    upper = [None if m is None else m + d for m, d in zip(mean, deviation, strict=True)]
    floor = -math.inf if any(m is not None and m < 0 for m in mean) else 0.0
    lower = [None if m is None else max(floor, m - d) for m, d in zip(mean, deviation, strict=True)]
    stairs = [staircase(ranges, values) for values in (mean, lower, upper)]
    band = [
        None if low is None else (low, high) for (_, low), (_, high) in zip(stairs[1], stairs[2], strict=True)
    ]
    line = Line("loss", stairs[0], band)
    drawn = line_chart([line], x_label="timestep", y_label="loss", spans=_spans(schedule))
    return html.chart(f"Loss up to step {step:,}: mean ± standard deviation of a sample", drawn)


def _spans(schedule: NoiseSchedule) -> list[Span]:
    return [Span(name, first, end) for name, (first, end) in areas(schedule).items()]


def _num_trained(path: Path | None) -> int | None:
    """Number of trained parameters: those that the optimizer has a state of; None if there are none."""
    trained: set[str] = set()
    for part in [] if path is None else path.glob("optimizer_*.safetensors"):
        with safe_open(part, framework="pt") as tensors:
            trained |= {name.partition("/")[2] for name in tensors.keys()}  # noqa: SIM118 - no mapping
    if path is None or not trained:
        return None
    with safe_open(path / checkpoints.MODEL, framework="pt") as weights:
        names = trained & set(weights.keys())
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in names) or None


def _seconds(run: Run) -> float | None:
    """Wall time of the logged steps; None if no line has it."""
    rows = [row for row in run.rows if "seconds_per_step" in row]
    steps = [0, *(row["step"] for row in rows)]
    pairs = [(row, row["step"] - before) for row, before in zip(rows, steps, strict=False)]
    timed = [row["seconds_per_step"] * count for row, count in pairs if row.get("seconds_per_step")]
    return sum(timed) if timed else None


def _median(run: Run, key: str) -> float | None:
    values = [value for _, value in run.series(key) if value is not None]
    return statistics.median(values) if values else None


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _gib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**30:.2f} GiB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="experiment_dir of a training run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN_DIR/report.html")
    return parser


if __name__ == "__main__":
    sys.exit(main())
