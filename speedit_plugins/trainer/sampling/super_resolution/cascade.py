"""Cascades: a run draws small samples, and super-resolution runs enlarge them, one after the other.

Source: Ho et al. 2021, arXiv:2106.15282; with captions, Saharia et al. 2022, arXiv:2205.11487.

Dims: N samples, B of them at a time, C channels, F frames (absent for images), h x w pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.loader import STAGE_STREAM, stream_seed
from speedit_plugins.trainer.layouts import layout_of
from speedit_plugins.trainer.models.pretrained.text import CaptionSource
from speedit_plugins.trainer.sampling.conditions import Conditions
from speedit_plugins.trainer.sampling.generator import SampleGenerator, find_weights, load_generator
from speedit_plugins.trainer.sampling.super_resolution.low_resolution_sets import (
    FromStage,
    LowResolutionSet,
    inputs_of,
)
from speedit_plugins.trainer.saved_configs import RUN_CONFIG


def cascade_conditions(
    config: ExperimentConfig,
    generator: SampleGenerator,
    captions: CaptionSource | None,
    conditions: Conditions,
    rows: Tensor,
) -> Conditions:
    """A condition for each of N samples of a cascade's last stage, with what the stages before it draw.

    Args:
        config: of the last stage; `cascade` names the runs before it.
        generator: draws with the last stage.
        captions: the text encoder that all stages share.
        conditions: classes or prompts.
        rows: which of them each sample has, int64 (N,).

    Raises:
        ValueError: a stage has no checkpoint, or does not fit the one before it.
    """
    before = [load_generator(stage, captions=captions)[0] for stage in stages_of(config)]
    return in_turn([*before, generator], _spread(conditions, rows), num_samples=len(rows)).conditions


def in_turn(
    stages: Sequence[SampleGenerator],
    conditions: Conditions,
    *,
    num_samples: int,
    given: LowResolutionSet | None = None,
) -> FromStage:
    """N samples of the last stage, each of which enlarges what the stage before it draws.

    Args:
        stages: at least one, in their order.
        conditions: one for each of the N samples, in their order.
        num_samples: N.
        given: what the first stage enlarges; None draws it from noise alone.

    Raises:
        ValueError: a stage draws another number of channels than the last one.
    """
    samples = given
    for stage in stages:
        _check_channels(stage, stages[-1])
        own = conditions
        if samples is not None:
            own = replace(conditions, inputs=inputs_of(samples, stage.config, stage))
        samples = FromStage(stage, own, num_samples=num_samples)
    assert isinstance(samples, FromStage)
    return samples


def stages_of(config: ExperimentConfig) -> list[ExperimentConfig]:
    """The configs of the runs that `cascade` names, as their trainings left them, each with its own seed.

    There are none without a cascade.

    Raises:
        ValueError: a folder has no run, or a stage does not fit the one before it.
    """
    # Otherwise the noise of two stages would begin with the same numbers.
    return [
        replace(stage, seed=stream_seed(config.seed, STAGE_STREAM, number))
        for number, stage in enumerate(trained_stages(config))
    ]


def trained_stages(config: ExperimentConfig) -> list[ExperimentConfig]:
    """As `stages_of`, with the seeds of their trainings: those decide what was held out.

    Raises:
        ValueError: see `stages_of`.
    """
    found = []
    for number, folder in enumerate(config.cascade):
        path = Path(folder) / RUN_CONFIG
        if not path.is_file():
            raise ValueError(
                f"cascade[{number}] needs the folder of a trained run, got {folder} without {RUN_CONFIG}"
            )
        stage = replace(
            load_config(path, "test"),
            experiment_dir=str(folder),
            ckpt_path=None,
            device=config.device,
            allow_download=config.allow_download,
        )
        found.append(stage)
    if found:
        check_stages([*found, config])
    return found


def stage_weights(config: ExperimentConfig) -> list[Path]:
    """The checkpoint that each stage before the last one draws with: the newest of its run."""
    return [find_weights(stage) for stage in stages_of(config)]


def check_stages(stages: Sequence[ExperimentConfig]) -> None:
    """Nothing, if each stage enlarges what the one before it draws, and the first draws from noise alone.

    Raises:
        ValueError: a stage does not fit the one before it; says which key.
    """
    names = [*(f"cascade[{number}]" for number in range(len(stages) - 1)), "this run"]
    _check_kinds(dict(zip(names, stages, strict=True)))
    first = stages[0]
    if first.super_resolution.factor:
        problem = f"got a super-resolution run, {first.experiment_dir}"
        raise ValueError(f"{names[0]} needs a run that draws from noise alone, {problem}")
    for (name, small), (other, large) in pairwise(list(zip(names, stages, strict=True))):
        factor = large.super_resolution.factor
        if not factor:
            problem = f"got another, {large.experiment_dir}"
            raise ValueError(f"{other} needs a super-resolution run behind {name}, {problem}")
        side, wanted = small.image_size, large.image_size // factor
        if side != wanted:
            raise ValueError(
                f"the stages of cascade do not fit: {name} draws {side} x {side} pixels, and {other} enlarges"
                f" {wanted} x {wanted} to {large.image_size} x {large.image_size}"
            )
        for key in ("num_frames", "num_classes", "text_encoder"):
            ours, theirs = getattr(small, key), getattr(large, key)
            if ours != theirs:
                raise ValueError(
                    f"the stages of cascade do not fit: {name} has {key} {ours!r}, and {other} {theirs!r}"
                )


def _check_kinds(stages: Mapping[str, ExperimentConfig]) -> None:
    """Refuses stages that draw shapes: nothing enlarges them."""
    for name, stage in stages.items():
        if stage.voxel_size:
            got = f"{stage.experiment_dir} that draws {layout_of(stage)}"
            raise ValueError(f"{name} needs a run that draws images or videos, got {got}")


def _check_channels(stage: SampleGenerator, last: SampleGenerator) -> None:
    ours, theirs = stage.encoder.image_channels, last.encoder.image_channels
    if ours != theirs:
        raise ValueError(
            f"the stages of cascade do not fit: {stage.config.experiment_dir} has {ours} channels,"
            f" and the last stage of {theirs}"
        )


def _spread(conditions: Conditions, rows: Tensor) -> Conditions:
    """The conditions of the rows (N,), one after the other, as conditions of N names."""
    names = tuple(conditions.names[row] for row in rows.tolist()) if conditions.names else ()
    return replace(
        conditions,
        names=names,
        titles=names if conditions.titles else (),
        labels=None if conditions.labels is None else conditions.labels[rows],
    )
