"""A trained model, or all stages of a cascade, as a folder to draw from without the runs.

FOLDER/stages.json lists the folders of the stages. Each has model.safetensors, the averaged weights with
adapters merged into them, the config.yaml to draw with, classes.json where the classes have names, and
normalization.json of point clouds. What a config names by its path or hub name stays there: text encoder,
autoencoder, and the saved network that a model was built from.

Dims: N samples, B of them at a time, C channels, F frames (absent for images), h x w pixels.
"""

import json
import operator
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from speedit_plugins.files import naming, write_whole
from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.config.loading import load_config, to_yaml
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.sections import LoraConfig
from speedit_plugins.trainer.data.loader import STAGE_STREAM, stream_seed
from speedit_plugins.trainer.models.lora import merge_adapters
from speedit_plugins.trainer.models.pretrained.text import CaptionSource
from speedit_plugins.trainer.sampling.conditions import Conditions, grid_conditions
from speedit_plugins.trainer.sampling.finite import not_finite, not_finite_message
from speedit_plugins.trainer.sampling.generator import SampleGenerator, load_generator
from speedit_plugins.trainer.sampling.super_resolution.cascade import check_stages, in_turn, stages_of
from speedit_plugins.trainer.sampling.super_resolution.low_resolution_sets import FromCaller

INDEX = "stages.json"


class Stages:
    """Draws with the stages of a folder that `write_stages` wrote; `load_stages` makes it.

    Args:
        generators: one for each stage, in their order.
        captions: the text encoder that all stages share.
        classes: names of the classes, by number; empty if they have none.
    """

    def __init__(
        self,
        generators: Sequence[SampleGenerator],
        captions: CaptionSource | None = None,
        *,
        classes: tuple[str, ...] = (),
    ) -> None:
        self.generators, self.captions, self.classes = tuple(generators), captions, classes
        self.config = self.generators[-1].config

    def __call__(
        self,
        conditions: Sequence[int | str] | Tensor = (),
        *,
        low_resolution: Tensor | None = None,
        num_samples: int | None = None,
        seed: int | None = None,
    ) -> list[Tensor]:
        """What each stage draws, the first one first, on the CPU.

        Images and videos are (N, C, [F,] H, W) in [-1, 1], voxels (N, 1, D, H, W) in [-1, 1], and points
        (N, 3, P) in the units of the data. They are those of `-p sample` and `-p inference` for the same
        conditions in the same order, the same seed, and the same `per_proc_batch_size`.

        Args:
            conditions: a class, by number or name, or a caption for each of the N samples. Empty for a model
                without either.
            low_resolution: (N, C, [F,] h, w) in [-1, 1]. What a super-resolution model enlarges that has no
                stage before it.
            num_samples: N, for a model with neither of them.
            seed: of all noise; None is the `seed` of the last stage's config.

        Raises:
            ValueError: an argument is missing, has no effect or does not fit the model; or a sample is not
                finite.
        """
        number = self._number(conditions, low_resolution, num_samples)
        given = None if low_resolution is None else self._given(low_resolution, number)
        stages = self._seeded(self.config.seed if seed is None else seed)
        last = in_turn(stages, self._named(conditions), num_samples=number, given=given)
        drawn: list[list[Tensor]] = [[] for _ in stages]
        for rows in torch.arange(number).split(self.config.per_proc_batch_size):
            # What was given comes before what the stages draw.
            versions = last.versions(rows)[-len(stages) :]
            for stage, kept, samples in zip(stages, drawn, versions, strict=True):
                if num_bad := int(not_finite(samples).sum()):
                    raise ValueError(not_finite_message(num_bad, len(samples), stage.config, stage.source))
                kept.append(samples)
        return [torch.cat(parts) for parts in drawn]

    def _number(
        self, conditions: Sequence[int | str] | Tensor, given: Tensor | None, num_samples: int | None
    ) -> int:
        """N, as the arguments that the model needs say it."""
        what = "class" if self.config.num_classes else "caption" if self.captions is not None else ""
        if isinstance(conditions, str) or (len(conditions) > 0) != bool(what):
            wanted = f"a list with a {what} for each sample" if what else "none: the model takes none"
            raise ValueError(f"conditions: wanted {wanted}, got {conditions!r}")
        enlarges = self.generators[0].config.super_resolution.factor > 0
        if (given is not None) != enlarges:
            wanted = "images for the first stage to enlarge" if enlarges else "None: it draws from noise"
            raise ValueError(f"low_resolution: wanted {wanted}, got {'None' if given is None else 'images'}")
        known = len(conditions) if what else None if given is None else len(given)
        if known is not None and num_samples is not None:
            raise ValueError(f"num_samples: wanted None, as {known} samples are given, got {num_samples}")
        number = num_samples if known is None else known
        if number is None or number < 1:
            raise ValueError(f"num_samples: wanted an int >= 1, got {number}")
        return number

    def _given(self, samples: Tensor, number: int) -> FromCaller:
        first = self.generators[0]
        config = first.config
        side = config.image_size // config.super_resolution.factor
        frames = (config.num_frames,) if config.num_frames else ()
        wanted = (number, first.encoder.image_channels, *frames, side, side)
        if tuple(samples.shape) != wanted:
            raise ValueError(f"low_resolution: wanted {wanted}, got {tuple(samples.shape)}")
        # NaN is in no range.
        if not samples.is_floating_point() or not bool((samples.abs() <= 1).all()):
            low, high = samples.min(), samples.max()
            raise ValueError(f"low_resolution: wanted floats in [-1, 1], got {samples.dtype} {low} to {high}")
        return FromCaller(samples)

    def _seeded(self, seed: int) -> list[SampleGenerator]:
        """The generators with the seeds that `-p sample` gives to the stages of a cascade."""
        *before, last = self.generators
        seeds = [*(stream_seed(seed, STAGE_STREAM, number) for number in range(len(before))), seed]
        return [
            SampleGenerator(
                stage.model,
                stage.process,
                stage.encoder,
                replace(stage.config, seed=own),
                source=stage.source,
                normalization=stage.normalization,
            )
            for stage, own in zip([*before, last], seeds, strict=True)
        ]

    def _named(self, conditions: Sequence[int | str] | Tensor) -> Conditions:
        config = self.config
        if not config.num_classes:
            texts = [str(each) for each in conditions]
            return grid_conditions(replace(config, sample_prompts=texts, prompts_file=None), self.captions)
        # Whole numbers of torch and numpy too.
        labels = [each if isinstance(each, str) else operator.index(each) for each in conditions]
        for label in labels:
            if not isinstance(label, str) and not 0 <= label < config.num_classes:
                raise ValueError(f"conditions: wanted classes in [0, {config.num_classes}), got {label}")
        return grid_conditions(replace(config, sample_classes=labels), self.captions, self.classes)


def load_stages(folder: str | Path, overrides: Sequence[str] = ()) -> Stages:
    """The stages of a folder that `tools/export.py --for-loader` wrote, ready to draw.

    Args:
        folder: the folder.
        overrides: `key=value`, as on the command line, for the config of each stage: `device=cpu`, or
            `text_encoder.path=...` where the text encoder was moved.

    Raises:
        ValueError: the folder is no such folder, or incomplete; or a weight, a config or what it names cannot
            be read.
    """
    places = _stage_folders(Path(folder).expanduser())
    # Phase test asks for no class or prompt.
    configs = [load_config(place / checkpoints.CONFIG, "test", overrides) for place in places]
    if len(configs) > 1:
        check_stages(configs)
    generators: list[SampleGenerator] = []
    captions: CaptionSource | None = None
    for place, config in zip(places, configs, strict=True):
        generator, captions, _ = load_generator(config, place / checkpoints.MODEL, captions=captions)
        generators.append(generator)
    return Stages(generators, captions, classes=checkpoints.class_names(places[-1]))


def write_stages(folder: Path, config: ExperimentConfig) -> list[Path]:
    """Writes the folder: the model of a run, behind the stages of its `cascade`.

    Args:
        folder: is made. A failure leaves it incomplete, without its stages.json.
        config: of the last stage, as for `-p sample`.

    Returns:
        The weights of each stage.

    Raises:
        ValueError: it is an inpainting model, a run has no checkpoint, or a stage does not fit the next one.
    """
    if config.inpainting is not None:
        raise ValueError("load_stages draws no fills of images; wanted inpainting: null")
    sources: list[Path] = []
    generators: list[SampleGenerator] = []
    captions: CaptionSource | None = None
    for stage in [*stages_of(config), config]:
        generator, captions, source = load_generator(stage, captions=captions)
        generators.append(generator)
        sources.append(source)
    names = [f"stage_{number}" for number in range(len(generators))]
    for name, generator, source in zip(names, generators, sources, strict=True):
        _write_stage(folder / name, generator, source)
    write_whole(folder / INDEX, f"{json.dumps({'stages': names}, indent=1)}\n".encode())
    return sources


def _write_stage(folder: Path, generator: SampleGenerator, source: Path) -> None:
    folder.mkdir(parents=True)
    merge_adapters(generator.model)
    weights = {
        name: value.detach().cpu().contiguous() for name, value in generator.model.state_dict().items()
    }
    with naming(folder / checkpoints.MODEL):
        save_file(weights, folder / checkpoints.MODEL)
    drawn = replace(
        generator.config,
        cascade=[],
        low_resolution=None,
        ckpt_path=None,
        pretrained=None,
        lora=LoraConfig(),
        # That of the machine where it is loaded.
        device="auto",
    )
    write_whole(folder / checkpoints.CONFIG, to_yaml(drawn).encode())
    beside = source if source.is_dir() else source.parent
    for name in (checkpoints.CLASSES, checkpoints.NORMALIZATION):
        if (beside / name).is_file():
            shutil.copyfile(beside / name, folder / name)


def _stage_folders(folder: Path) -> list[Path]:
    """The folders of the stages, as the index lists them."""
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(
            f"wanted a folder that tools/export.py --for-loader wrote, got {folder} without {INDEX}"
        )
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    names = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{path}: wanted {{"stages": [names of folders]}}, as tools/export.py writes it')
    places = [folder / name for name in names]
    missing = [name for name, place in zip(names, places, strict=True) if not place.is_dir()]
    if missing or not places:
        raise ValueError(
            f"{folder} is incomplete: wanted the stages of {path.name}, got no {missing or 'stage'}"
        )
    return places
