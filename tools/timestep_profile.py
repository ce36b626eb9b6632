"""Measures loss and gradient norm of a trained model per range of timesteps.

    python tools/timestep_profile.py outputs/digits/speedit --weights ema
    python tools/timestep_profile.py RUN_DIR --checkpoint RUN_DIR/checkpoints/step_0000400 data.batch_size=256

One batch of training data, with the same noise, is noised to timesteps in each of twenty equal ranges. The
loss is the training loss, weighted by the run's policy; the mse is unweighted; the gradient norm is that of
the mean loss over the batch. Writes timestep_profile.json and timestep_profile.png into RUN_DIR.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inspect_policy import save_figure, write_json

from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.logging.timestep_profile import timestep_ranges
from speedit_plugins.trainer.logging.tracking import plain
from speedit_plugins.trainer.results import CHECKPOINTS
from speedit_plugins.trainer.training.assembly import build_trainer

PROFILE = "timestep_profile.json"
# Runs on several processes are measured in one; their other options are switched off.
_ALONE = {
    **{"plugin": "ddp", "profile_every": "1", "sample_every": "0", "compile": "false"},
    **{"validate_every": "0", "validate_samples": "500", "data.validation": "null"},
    **{"evaluate_every": "0", "evaluate_samples": "1000", "keep_best": "null"},
}
_PANELS = {
    "loss": "loss\n(weight × mse + vb)",
    "mse": "mse\n(unweighted)",
    "grad_norm": "gradient norm\nof the loss",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 or, after an error message on stderr, 2."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        report = measure(
            arguments.run,
            weights=arguments.weights,
            source=arguments.checkpoint,
            overrides=arguments.overrides,
        )
    except (ValueError, OSError) as error:
        print(f"timestep_profile: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(_table(report))
    for path in (arguments.run / PROFILE, (arguments.run / PROFILE).with_suffix(".png")):
        print(f"  {path}")
    return 0


def measure(
    run: Path, *, weights: str = "model", source: Path | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Measures a checkpoint of a run and writes tables and a plot into the run's folder.

    Args:
        run: folder of a training run.
        weights: "model", or "ema" for the averaged weights.
        source: folder of a checkpoint; None uses the newest complete one of the run.
        overrides: `key=value` changes to the run's config.

    Returns:
        The content of the JSON file: step, weights, policy, num_samples, ranges as [first, end) indices, and
        per range loss, mse and grad_norm. A value is None if the range is empty or the value is not finite.

    Raises:
        ValueError: the folder has no training run or no checkpoint, the config does not fit the checkpoint,
            or an override changes a key that this function sets.
    """
    for key in (argument.partition("=")[0] for argument in overrides):
        if key in _ALONE:
            raise ValueError(f"{key} has no effect: a profile is always measured with {key}={_ALONE[key]}")
    path = run / "config_train.yaml"
    if not path.is_file():
        raise ValueError(f"{run} has no training run: there is no {path.name}")
    config = load_config(path, "train", [*overrides, *map("=".join, _ALONE.items())])
    found = source or checkpoints.newest_whole(checkpoints.newest_first(run / CHECKPOINTS))
    if found is None:
        raise ValueError(f"{run} has no checkpoint yet")
    if weights == "ema" and config.ema.type == "none":
        raise ValueError(f"{run} keeps no average (ema.type: none); wanted --weights model")
    trainer = build_trainer(config)
    trainer.restore(found)
    assert trainer.profiler is not None
    chosen = trainer.averaged_weights() if weights == "ema" else trainer.weights()
    profile = trainer.profiler.measure(chosen, trainer.engine.untrained())
    schedule = trainer.objective.process.schedule
    ranges = timestep_ranges(schedule.num_timesteps)
    report = {
        "step": trainer.step,
        "weights": weights,
        "policy": trainer.policy.name,
        "num_samples": config.data.batch_size,
        "ranges": ranges,
        **plain(asdict(profile)),
    }
    write_json(run / PROFILE, report)
    line = f"{weights} weights at step {trainer.step}, {config.data.batch_size} samples"
    panels = {
        label: {line: [value for value, span in zip(report[key], ranges, strict=True) for _ in range(*span)]}
        for key, label in _PANELS.items()
    }
    title = f"{config.experiment_name or run.name}: profile by timestep, policy {trainer.policy.name}"
    save_figure((run / PROFILE).with_suffix(".png"), title, schedule, panels)
    return report


def _table(report: dict[str, Any]) -> str:
    head = f"{report['weights']} weights at step {report['step']}, {report['num_samples']} samples"
    lines = [head, f"{'timesteps':>12}  {'loss':>10}  {'mse':>10}  {'grad norm':>10}"]
    rows = zip(report["ranges"], report["loss"], report["mse"], report["grad_norm"], strict=True)
    for (first, end), *values in rows:
        if first < end:
            shown = ("not finite" if value is None else f"{value:.4g}" for value in values)
            lines.append(f"{first:>6} ..{end - 1:>4}" + "".join(f"  {text:>10}" for text in shown))
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="timestep_profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="experiment_dir of a training run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the config")
    parser.add_argument("--weights", choices=("model", "ema"), default="model", help="default: %(default)s")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="default: the newest one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
