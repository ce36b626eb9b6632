"""What the phase `test` leaves: test.json, and figures on the boards of the run."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from speedit_plugins.files import write_whole
from speedit_plugins.trainer import results
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.evaluation.metrics import Figures
from speedit_plugins.trainer.logging.loggers import open_boards
from speedit_plugins.trainer.sampling.scores.stage_scores import StageScores


def write_scores(
    path: Path,
    figures: Figures,
    stages: Sequence[StageScores] = (),
) -> None:
    """Writes test.json: the figures, what was compared, and a part for each set of a cascade's stages."""
    content = _content(figures)
    if stages:
        content["stages"] = {
            each.about.name: {**asdict(each.about), **_content(each.figures)} for each in stages
        }
    write_whole(path, f"{json.dumps(content, indent=2)}\n".encode())


def _content(figures: Figures) -> dict[str, Any]:
    rows = {
        metric.name: {
            "value": metric.value,
            "features": metric.features,
            "num_samples": metric.num_samples,
            "num_reference": metric.num_reference,
            **metric.details,
        }
        for metric in figures.measured
    }
    # An absolute path can be found from any folder.
    samples = str(Path(figures.samples).absolute())
    return {"figures": rows, "samples": samples, "reference": figures.reference}


def show_scores(config: ExperimentConfig, figures: Figures) -> None:
    """Puts the figures on the run's boards, if inference of this run drew the samples at one of its steps."""
    path = Path(figures.samples).absolute()
    step = re.match(r"step_(\d+)_", path.name)
    if step is None or path.parent != (Path(config.experiment_dir) / results.INFERENCE).absolute():
        return
    for logger in open_boards(config):
        logger.add(int(step[1]), {f"test/{metric.name}": metric.value for metric in figures.measured})
        logger.close(is_failed=False)
