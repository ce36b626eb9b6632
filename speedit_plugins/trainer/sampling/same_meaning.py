"""Whether a config asks weights for what they were trained to predict."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from speedit_plugins.trainer.checkpoints import CheckpointError
from speedit_plugins.trainer.config.loading import to_yaml
from speedit_plugins.trainer.config.same_run import check_same_meaning
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.saved_configs import config_of, named_config


def check_drawn(source: Path, config: ExperimentConfig) -> None:
    """Checks a config that draws with weights against the config that their training left beside them.

    Weights with none beside them, such as another trainer's, mean what the config says.

    Args:
        source: a checkpoint's folder, or a file of weights.
        config: draws with them.

    Raises:
        ValueError: a key differs; the message has both values, and the config to take. Or the training's
            config cannot be read.
    """
    path = config_of(source)
    if path is None:
        return
    was = _read(path)
    try:
        check_same_meaning(was, yaml.safe_load(to_yaml(config)))
    except ValueError as error:
        problem = f"{source} was trained with another config: {error}"
        raise ValueError(f"{problem}; wanted that of the training: -c {named_config(source)}") from error


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: it holds no config")
    return found
