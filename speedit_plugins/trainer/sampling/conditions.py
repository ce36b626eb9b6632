"""The conditions of samples: classes or prompts, each with a name that a person can read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from speedit_plugins.registry import nearest
from speedit_plugins.trainer import build
from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.latents.cache import LatentCache
from speedit_plugins.trainer.data.loader import LABEL_STREAM, SampleSource, stream_seed
from speedit_plugins.trainer.inputs import with_entries
from speedit_plugins.trainer.models.pretrained.text import CaptionSource, CaptionTable

# Names that a message lists.
_SHOWN = 20


class Inputs(Protocol):
    """What a model is given besides, for each of N samples, such as a low-resolution one."""

    def __len__(self) -> int: ...
    def of(self, rows: Tensor, device: torch.device) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True, eq=False)
class Conditions:
    """Named conditions: `labels` (int64, one per name), or prompts that `captions` encodes, or none.

    `titles` are the names that say more than the number of a class. With `inputs` there is a name for each of
    their samples, or none.
    """

    names: tuple[str, ...] = ()
    titles: tuple[str, ...] = ()
    labels: Tensor | None = None
    captions: CaptionSource | None = None
    inputs: Inputs | None = None

    def of(self, rows: Tensor, device: torch.device) -> Condition:
        """The conditions of the names at `rows` (B,) int64, on the device; None without conditions."""
        named = self._named(rows, device)
        return named if self.inputs is None else with_entries(named, self.inputs.of(rows, device))

    def _named(self, rows: Tensor, device: torch.device) -> Condition:
        if self.labels is not None:
            return self.labels[rows].to(device)
        if self.captions is None:
            return None
        features = self.captions.encode([self.names[row] for row in rows.tolist()])
        return {name: value.to(device) for name, value in features.items()}


def grid_conditions(
    config: ExperimentConfig, captions: CaptionSource | None, classes: Sequence[str] = ()
) -> Conditions:
    """The conditions of a sample grid: `sample_classes`, or the prompts.

    Args:
        classes: names of the classes, by number; empty if they are unknown.

    Raises:
        ValueError: there is no class of a name in `sample_classes`.
    """
    if config.num_classes:
        return _classes([_number(wanted, classes) for wanted in config.sample_classes], classes)
    return _prompted(config, captions)


def all_conditions(
    config: ExperimentConfig, captions: CaptionSource | None, classes: Sequence[str] = ()
) -> Conditions:
    """The conditions of a large set of samples: every class, or the prompts.

    Args:
        classes: see `grid_conditions`.
    """
    if config.num_classes:
        return _classes(range(config.num_classes), classes)
    return _prompted(config, captions)


def random_rows(conditions: Conditions, num_samples: int, *, seed: int) -> Tensor:
    """Which condition each sample of a large set has, int64 (N,): a random class, or the prompts in turn.

    Where there are inputs, they are taken in turn.
    """
    if conditions.inputs is not None:
        return torch.arange(num_samples) % len(conditions.inputs)
    if conditions.labels is None:
        return torch.arange(num_samples) % max(1, len(conditions.names))
    chooser = torch.Generator().manual_seed(stream_seed(seed, LABEL_STREAM))
    return torch.randint(len(conditions.names), (num_samples,), generator=chooser)


def repeats(conditions: Conditions, num_samples: int) -> str | None:
    """A line that says that inputs are too few for the samples, and so are taken again; None if they are not.

    Args:
        conditions: of the samples.
        num_samples: how many are drawn.
    """
    number = num_samples if conditions.inputs is None else len(conditions.inputs)
    if number >= num_samples:
        return None
    return f"{num_samples} samples of {number} low-resolution inputs: inputs are used more than once"


def build_captions(
    config: ExperimentConfig, dataset: SampleSource, device: torch.device
) -> CaptionSource | None:
    """The encoder of the dataset's captions: a table if they are few, else the text encoder itself.

    None if the config has no text encoder. A cache of features needs the text encoder only for the prompts of
    grids and evaluations.

    Raises:
        ValueError: another text encoder made the cached features.
    """
    if isinstance(dataset, LatentCache) and dataset.null_text is not None:
        if dataset.text_encoder != config.text_encoder:
            raise ValueError(
                f"text_encoder needs {dataset.text_encoder}, which made the cached captions, got"
                f" {config.text_encoder}"
            )
        if not config.sample_every and not config.evaluate_every:
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


def _classes(labels: Sequence[int], classes: Sequence[str]) -> Conditions:
    # A model may have room for more classes than the data have.
    names = tuple(classes[label] if label < len(classes) else str(label) for label in labels)
    return Conditions(names, titles=names if classes else (), labels=torch.tensor(list(labels)))


def _number(wanted: int | str, classes: Sequence[str]) -> int:
    """The number of a class that is given by its number or its name."""
    if isinstance(wanted, int):
        return wanted
    if not classes:
        raise ValueError(
            f"sample_classes: got the name {wanted!r}, and neither the checkpoint nor the data name their"
            " classes; wanted numbers"
        )
    if wanted not in classes:
        more = f", and {len(classes) - _SHOWN} more" if len(classes) > _SHOWN else ""
        raise ValueError(
            f"sample_classes: unknown class {wanted!r}{nearest(wanted, classes)}; known:"
            f" {', '.join(classes[:_SHOWN])}{more}"
        )
    return list(classes).index(wanted)


def _prompted(config: ExperimentConfig, captions: CaptionSource | None) -> Conditions:
    if captions is None:
        return Conditions()
    texts = tuple(prompts(config))
    return Conditions(texts, titles=texts, captions=captions)
