"""What inference of a cascade writes for each stage, so that `test` can score the stages by themselves.

Beside the samples of the whole there is a folder, `..._stages`, with a set for each stage before the last, as
the cascade draws it, and one for each super-resolution stage on inputs from the data. `sets.json` says what
they are. It has an entry for the whole, too.

Dims: N samples, B of them at a time.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from speedit_plugins.files import write_whole
from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.models.pretrained.text import CaptionSource
from speedit_plugins.trainer.sampling.conditions import Conditions
from speedit_plugins.trainer.sampling.generator import SampleGenerator
from speedit_plugins.trainer.sampling.super_resolution.cascade import trained_stages
from speedit_plugins.trainer.sampling.super_resolution.low_resolution_sets import (
    FromStage,
    LowResolutionInputs,
    given_conditions,
)

LIST, WHOLE = "sets.json", "whole"


@dataclass(frozen=True)
class StageSet:
    """One set of samples: its folder in `..._stages`, and who drew it from what.

    Args:
        name: `stage_1`, `stage_2`, ..., `stage_2_from_data`, ..., or `whole`, whose samples are elsewhere.
        number: of the stage, from 1.
        image_size: side of its samples in pixels.
        inputs: what it was given: `noise` alone, what the `stage` before it drew, or `data`.
        run: folder of the stage's run.
        weights: that it was drawn with.
    """

    name: str
    number: int
    image_size: int
    inputs: Literal["noise", "stage", "data"]
    run: str
    weights: str


def stage_sets(generators: Sequence[SampleGenerator]) -> list[StageSet]:
    """The sets of a cascade, stage by stage, each as it draws in the cascade and then on the data.

    Args:
        generators: of its stages, the smallest first.
    """
    found = []
    for number, generator in enumerate(generators, start=1):
        side, run = generator.config.image_size, generator.config.experiment_dir
        about = (str(Path(run).absolute()), str(Path(generator.source).absolute()))
        name = WHOLE if number == len(generators) else f"stage_{number}"
        found.append(StageSet(name, number, side, "noise" if number == 1 else "stage", *about))
        if number > 1:
            found.append(StageSet(f"stage_{number}_from_data", number, side, "data", *about))
    return found


def cascade_of(conditions: Conditions, last: SampleGenerator) -> list[SampleGenerator]:
    """The generators of a cascade's stages, the smallest first.

    Args:
        conditions: of the last stage, see `cascade_conditions`.
        last: draws with it.
    """
    inputs = conditions.inputs
    assert isinstance(inputs, LowResolutionInputs)
    assert isinstance(inputs.samples, FromStage)
    return [*inputs.samples.generators(), last]


def earlier_samples(conditions: Conditions, rows: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Name of a set and samples (B, C, [F,] h, w) of each stage before the last, for the batch drawn last."""
    inputs = conditions.inputs
    assert isinstance(inputs, LowResolutionInputs)
    for number, samples in enumerate(inputs.samples.versions(rows), start=1):
        yield f"stage_{number}", samples


def on_data(
    config: ExperimentConfig,
    generators: Sequence[SampleGenerator],
    captions: CaptionSource | None,
) -> Iterator[tuple[str, SampleGenerator, Conditions]]:
    """For each super-resolution stage: name of the set, a generator, and conditions made of the data.

    The inputs have no noise, as is right for data. A stage draws `num_samples` of the last one's config.

    Args:
        config: of the last stage, with its cascade.
        generators: of all stages, the smallest first.
        captions: the text encoder that the stages share.
    """
    stages = [*trained_stages(config), config]
    for number, (stage, generator) in enumerate(zip(stages[1:], generators[1:], strict=True), start=2):
        alone = _alone(stage, config)
        drawing = SampleGenerator(
            generator.model, generator.process, generator.encoder, alone, source=generator.source
        )
        classes = checkpoints.class_names(Path(generator.source))
        given = given_conditions(alone, drawing, captions, num_samples=config.num_samples, classes=classes)
        yield f"stage_{number}_from_data", drawing, given


def write_list(folder: Path, sets: Sequence[StageSet]) -> None:
    """Writes `sets.json`: what the sets in a folder are."""
    content = json.dumps([asdict(each) for each in sets], indent=2)
    write_whole(folder / LIST, f"{content}\n".encode())


def read_list(folder: Path) -> list[StageSet]:
    """The sets of a folder, from `sets.json`.

    Raises:
        ValueError: there is no such file, or it is not one of `write_list`.
    """
    path = folder / LIST
    if not path.is_file():
        raise ValueError(
            f"score_stages needs the samples of each stage, got no {path}; wanted those of the phase"
            " inference with the same cascade and score_stages: true"
        )
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        found = [StageSet(**row) for row in rows]
    except (ValueError, TypeError):
        found = []
    if not found:
        raise ValueError(f"{path}: wanted a list of sets, as inference writes it")
    return found


def _alone(stage: ExperimentConfig, config: ExperimentConfig) -> ExperimentConfig:
    """A stage's config for inputs from the data, without a cascade: as many samples as those of `config`."""
    return replace(
        stage,
        sampler=replace(stage.sampler, augmentation=0.0),
        cascade=[],
        low_resolution=None,
        score_stages=False,
        num_samples=config.num_samples,
        per_proc_batch_size=config.per_proc_batch_size,
    )
