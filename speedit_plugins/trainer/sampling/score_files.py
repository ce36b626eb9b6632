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
from speedit_plugins.trainer.evaluation.metrics import MetricValue
from speedit_plugins.trainer.logging.loggers import open_boards
from speedit_plugins.trainer.sampling.stage_scores import StageScores


def write_scores(
    path: Path,
    measured: Sequence[MetricValue],
    *,
    samples: str,
    reference: str | None,
    stages: Sequence[StageScores] = (),
) -> None:
    """Writes test.json: the figures, what was compared, and a part for each set of a cascade's stages."""
    content: dict[str, Any] = {"figures": _rows(measured), "samples": samples, "reference": reference}
    if stages:
        content["stages"] = {
            each.about.name: {
                **asdict(each.about),
                "figures": _rows(each.measured),
                "samples": str(Path(each.samples).absolute()),
                "reference": each.reference,
            }
            for each in stages
        }
    write_whole(path, f"{json.dumps(content, indent=2)}\n".encode())


def _rows(measured: Sequence[MetricValue]) -> dict[str, dict[str, Any]]:
    return {
        metric.name: {
            "value": metric.value,
            "features": metric.features,
            "num_samples": metric.num_samples,
            "num_reference": metric.num_reference,
            **metric.details,
        }
        for metric in measured
    }


def show_scores(config: ExperimentConfig, measured: list[MetricValue], samples: str) -> None:
    """Puts the figures on the run's boards, where the samples are inference's of one of its steps."""
    path = Path(samples).absolute()
    step = re.match(r"step_(\d+)_", path.name)
    if step is None or path.parent != (Path(config.experiment_dir) / results.INFERENCE).absolute():
        return
    for logger in open_boards(config):
        logger.add(int(step[1]), {f"test/{metric.name}": metric.value for metric in measured})
        logger.close(is_failed=False)
