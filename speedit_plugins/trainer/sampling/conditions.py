"""The conditions of samples: classes or prompts, each with a name that a person can read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from speedit_plugins.trainer import build
from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.latents.cache import LatentCache
from speedit_plugins.trainer.data.loader import SampleSource
from speedit_plugins.trainer.models.text import CaptionSource, CaptionTable


@dataclass(frozen=True, eq=False)
class Conditions:
    """Named conditions: `labels` (int64, one per name), or prompts that `captions` encodes, or none."""

    names: tuple[str, ...] = ()
    labels: Tensor | None = None
    captions: CaptionSource | None = None

    def of(self, rows: Tensor, device: torch.device) -> Condition:
        """The conditions of the names at `rows` (B,) int64, on the device; None without conditions."""
        if self.labels is not None:
            return self.labels[rows].to(device)
        if self.captions is None:
            return None
        features = self.captions.encode([self.names[row] for row in rows.tolist()])
        return {name: value.to(device) for name, value in features.items()}


def grid_conditions(config: ExperimentConfig, captions: CaptionSource | None) -> Conditions:
    """The conditions of a sample grid: `sample_classes`, or the prompts."""
    if config.num_classes:
        return _classes(config.sample_classes)
    return _prompted(config, captions)


def all_conditions(config: ExperimentConfig, captions: CaptionSource | None) -> Conditions:
    """The conditions of a large set of samples: every class, or the prompts."""
    if config.num_classes:
        return _classes(range(config.num_classes))
    return _prompted(config, captions)


def build_captions(
    config: ExperimentConfig, dataset: SampleSource, device: torch.device
) -> CaptionSource | None:
    """The encoder of the dataset's captions: a table if they are few, else the text encoder itself.

    None if the config has no text encoder. A cache of features needs the text encoder only for the prompts of
    grids.

    Raises:
        ValueError: another text encoder made the cached features.
    """
    if isinstance(dataset, LatentCache) and dataset.null_text is not None:
        if dataset.text_encoder != config.text_encoder:
            raise ValueError(
                f"text_encoder needs {dataset.text_encoder}, which made the cached captions, got"
                f" {config.text_encoder}"
            )
        if not config.sample_every:
            return CaptionTable([""], dataset.null_text)
    encoder = build.build_text_encoder(config, device)
    few = [] if isinstance(dataset, LatentCache) else getattr(dataset, "captions", None)
    if encoder is None or few is None:
        return encoder
    return CaptionTable.of(encoder, ["", *few, *prompts(config)])


def prompts(config: ExperimentConfig) -> list[str]:
    """The prompts of `sample_prompts`, or the lines of `prompts_file`.

    Raises:
        ValueError: there is no such file, or it has no prompt.
    """
    if config.prompts_file is None:
        return list(config.sample_prompts)
    path = Path(config.prompts_file)
    if not path.is_file():
        raise ValueError(f"prompts_file needs a text file, a prompt a line, got {path}, which is none")
    found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise ValueError(f"prompts_file needs at least one prompt, got {path} without any")
    return found


def null_condition(model: nn.Module, condition: Condition) -> Condition:
    """The condition "no class" or "empty caption" for each sample. Channels concatenated to x stay.

    Raises:
        ValueError: the model was not trained with dropped conditions.
    """
    if condition is None or isinstance(condition, Tensor):
        label = cast(int | None, model.null_label)
        if label is None or condition is None:
            raise ValueError("guidance needs a model with class_dropout_prob > 0; this one has no null label")
        return torch.full_like(condition, label)
    null: dict[str, Condition] = {}
    if "label" in condition:
        null["label"] = null_condition(model, condition["label"])
    if "tokens" in condition:
        stored = cast(Mapping[str, Tensor], model.null_text)
        null |= {name: value.to(condition[name]).expand_as(condition[name]) for name, value in stored.items()}
    return cast(Condition, {**condition, **null})


def _classes(labels: Sequence[int]) -> Conditions:
    return Conditions(tuple(map(str, labels)), labels=torch.tensor(list(labels)))


def _prompted(config: ExperimentConfig, captions: CaptionSource | None) -> Conditions:
    return Conditions() if captions is None else Conditions(tuple(prompts(config)), captions=captions)
