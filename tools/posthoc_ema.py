"""Makes the average of any length from the snapshots of a run that was trained with ema.type power.

    python tools/posthoc_ema.py outputs/mine --sigma-rel 0.03 0.05 0.08
    speedit -c outputs/mine/config_train.yaml -p sample ckpt_path=FILE

Writes a file for each length into RUN_DIR/posthoc. Untrained tensors are those of the newest checkpoint. A
line says how far the profile of the average is from the wanted one. Lengths outside of those in ema.sigma_rel
are farther. Source: Karras et al. 2024, arXiv:2312.02696, section 3.2.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from speedit_plugins.files import replacing
from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.config.sections import label
from speedit_plugins.trainer.saved_configs import CHECKPOINTS, POSTHOC
from speedit_plugins.trainer.training.averages.snapshots import SNAPSHOTS, posthoc_average, read_snapshots


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 or, after an error message on stderr, 2."""
    arguments = _parser().parse_args(argv)
    try:
        for sigma_rel in arguments.sigma_rel:
            path, distance = reconstruct(arguments.run, sigma_rel, step=arguments.step)
            print(f"{path}: sigma_rel {label(sigma_rel)}, profile within {100 * distance:.2g} %")
    except (ValueError, OSError) as error:
        print(f"posthoc_ema: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def reconstruct(run: Path, sigma_rel: float, *, step: int | None = None) -> tuple[Path, float]:
    """Writes the weights averaged over a relative length, whole or not at all.

    Args:
        run: experiment_dir of the training.
        sigma_rel: the length, in (0, 0.2887].
        step: the step of a snapshot; None is the last.

    Returns:
        The file, and the distance of the average's profile relative to the wanted one's norm.

    Raises:
        ValueError: there are no snapshots, none of this step, no checkpoint, or no such length.
    """
    snapshots = read_snapshots(run)
    if not snapshots:
        raise ValueError(
            f"{run / SNAPSHOTS} has no snapshots; wanted a training with ema.type=power and"
            " ema.snapshot_every"
        )
    source = checkpoints.newest_whole(checkpoints.newest_first(run / CHECKPOINTS), only=checkpoints.MODEL)
    if source is None:
        raise ValueError(f"{run} has no checkpoint yet")
    step = snapshots[-1].step if step is None else step
    averages, distance = posthoc_average(snapshots, sigma_rel, step=step)
    untrained = {k: v for k, v in load_file(source / checkpoints.MODEL).items() if k not in averages}
    # It says which weights adapters adapt.
    with safe_open(source / checkpoints.MODEL, framework="pt") as file:
        metadata = file.metadata()
    path = run / POSTHOC / f"step_{step:07d}_{label(sigma_rel)}.safetensors"
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as partial:
        save_file({**untrained, **averages}, partial, metadata=metadata)
    return path, distance


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="posthoc_ema", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="experiment_dir of a training run")
    parser.add_argument(
        "--sigma-rel", type=float, nargs="+", required=True, help="the lengths, in (0, 0.2887]"
    )
    parser.add_argument("--step", type=int, help="step of a snapshot; default: the last")
    return parser


if __name__ == "__main__":
    sys.exit(main())
