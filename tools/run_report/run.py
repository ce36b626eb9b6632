"""Reads the files in the experiment_dir of a training run, for the report."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from run_report.plots import Point
from speedit_plugins import TimestepPolicy
from speedit_plugins.trainer import build, checkpoints, results
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.logging.tracking import read_metrics
from speedit_plugins.trainer.training.saving.saved_state import load_part, read_state

CONFIG = "config_train.yaml"


@dataclass(frozen=True)
class Run:
    """The contents of an experiment_dir; parts are read when first used."""

    folder: Path
    config: ExperimentConfig
    rows: list[dict[str, Any]]

    @cached_property
    def checkpoint(self) -> Path | None:
        return checkpoints.newest(self.folder / results.CHECKPOINTS)

    @cached_property
    def policy(self) -> TimestepPolicy:
        """The timestep policy, in the state of the newest checkpoint."""
        process = build.build_process(self.config, respaced=True)
        policy = build.build_timestep_policy(self.config, process)
        if self.checkpoint is not None:
            state = read_state(self.checkpoint)
            load_part("policy", state, policy.state_dict(), policy.load_state_dict)
        return policy

    @cached_property
    def test_metrics(self) -> dict[str, dict[str, Any]]:
        """Metrics of the phase test by name; empty if it was not run."""
        found = self.json(results.TEST)
        return found["figures"] if found is not None and "figures" in found else {}

    @property
    def samples_of_evaluation(self) -> int:
        """Number of samples that the newest evaluation in training drew; 0 without one."""
        found = self.series("evaluation_samples")
        return int(found[-1][1]) if found else 0

    @property
    def stages_of_sample(self) -> list[str]:
        """The runs before this one whose samples the newest grid of the phase sample enlarges."""
        path = self.folder / "config_sample.yaml"
        return load_config(path, "sample").cascade if path.is_file() else []

    def age(self, path: Path) -> str:
        """A remark if a file of a later phase is older than the newest checkpoint, else ''."""
        newest = self.checkpoint
        if newest is None or not path.exists() or newest.stat().st_mtime <= path.stat().st_mtime:
            return ""
        return f", older than the checkpoint {newest.name}"

    @property
    def metrics_age(self) -> str:
        """The `age` of the samples that the phase test measured."""
        found = self.json(results.TEST)
        samples = None if found is None else found.get("samples")
        return "" if samples is None else self.age(Path(samples))

    def json(self, name: str) -> dict[str, Any] | None:
        """Contents of a JSON file of the run; None if it does not exist.

        Raises:
            ValueError: the file is not JSON, or not an object.
        """
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path} is damaged: wanted an object, got {type(found).__name__}")
        return found

    def series(self, key: str) -> list[Point]:
        """(step, value) for each logged line that has the key."""
        return [(row["step"], row[key]) for row in self.rows if key in row]


def open_run(folder: Path) -> Run:
    """Opens the run in a folder.

    Raises:
        ValueError: the folder is not the experiment_dir of a training run, or its files cannot be read.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is not a run: wanted the experiment_dir of a training run, with {CONFIG}")
    return Run(folder, load_config(path, "train"), read_metrics(folder))
