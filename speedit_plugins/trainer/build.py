"""Builds the objects of a checked config, through the registries."""

from typing import Any, cast

import torch
from torch import nn

from speedit_plugins.policies.advice import warn_if_slow
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.policies.shifted_boundary import with_shifted_boundary
from speedit_plugins.registry import DATASETS, ENCODERS, MASKS, MODELS, PROCESSES, TEXT_ENCODERS, build
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.holes import IMAGE, VIDEO, VOXELS, draw_hole
from speedit_plugins.trainer.data.loader import SampleSource
from speedit_plugins.trainer.diffusion.flow import RectifiedFlow
from speedit_plugins.trainer.diffusion.gaussian_process import GaussianProcess
from speedit_plugins.trainer.inputs import Encoder
from speedit_plugins.trainer.layouts import IDENTITIES, check_layout
from speedit_plugins.trainer.models.pretrained.text import CaptionSource
from speedit_plugins.trainer.models.sides import (
    check_factor,
    check_frames,
    check_one_size,
    check_sides,
    shapes_of,
    stated_patch,
)

Process = GaussianProcess | RectifiedFlow


def build_process(config: ExperimentConfig, *, respaced: bool) -> Process:
    """The diffusion process.

    Args:
        respaced: keep the respacing that training may have; a sampler wants the process without it.
    """
    options = config.diffusion.process_config()
    if not respaced and not config.diffusion.is_flow:
        options["timestep_respacing"] = ""
    return cast(Process, build(PROCESSES, options))


def build_timestep_policy(config: ExperimentConfig, process: Process) -> TimestepPolicy:
    """The policy of `diffusion.policy`, for the noise schedule of the process.

    On a shifted flow the boundary of `speed` moves with the shift, unless the config places it.

    Warns:
        UserWarning: see `warn_if_slow`.
    """
    policy = with_shifted_boundary(config.diffusion.policy, getattr(process, "shift", 1.0))
    built = build_policy(policy, process.schedule, process.prediction_type)
    warn_if_slow(built, process.prediction_type, policy)
    return built


def build_encoder(config: ExperimentConfig, device: torch.device) -> Encoder:
    """The encoder with its weights, on the device."""
    return cast(Encoder, build(ENCODERS, config.encoder, allow_download=config.allow_download).to(device))


def build_text_encoder(config: ExperimentConfig, device: torch.device) -> CaptionSource | None:
    """The text encoder with its weights, on the device; None if the config has none."""
    if config.text_encoder is None:
        return None
    encoder = build(TEXT_ENCODERS, config.text_encoder, allow_download=config.allow_download)
    return cast(CaptionSource, encoder.to(device))


def build_dataset(config: ExperimentConfig, *, augmented: bool = True) -> SampleSource:
    """The dataset.

    Args:
        augmented: False leaves out random flips and crops.

    Raises:
        ValueError: a class-conditional model gets a dataset without classes, or with more than num_classes.
    """
    section, given = dataset_options(config, augmented=augmented)
    dataset = build(DATASETS, section, **given)
    if config.num_classes and not 0 < dataset.num_classes <= config.num_classes:
        raise ValueError(
            f"the dataset has {dataset.num_classes} classes, got num_classes: {config.num_classes};"
            f" wanted {f'at least {dataset.num_classes}' if dataset.num_classes else 'data with classes'}"
        )
    return cast(SampleSource, dataset)


def build_masks(config: ExperimentConfig) -> Any:
    """What makes the holes of `inpainting`, see `draw_hole`; None without it.

    Raises:
        ValueError: the masks do not fit the samples, or one of the buckets.
    """
    if config.inpainting is None:
        return None
    masks = build(MASKS, config.inpainting)
    key = VIDEO if config.num_frames else IMAGE
    shapes = {(*([config.num_frames] if config.num_frames else []), config.image_size, config.image_size)}
    for section in (config.data.dataset, config.data.validation or {}):
        shapes |= {tuple(bucket) for bucket in section.get("buckets") or ()}
    if config.voxel_size:
        key, shapes = VOXELS, {(config.voxel_size,) * 3}
    for shape in sorted(shapes):
        draw_hole(masks, key, shape, torch.Generator().manual_seed(config.seed))
    return masks


def build_model(
    config: ExperimentConfig, encoder: Encoder | None = None, text: CaptionSource | None = None
) -> nn.Module:
    """The model, freshly initialised. With encoders, its sizes are checked against theirs.

    Args:
        config: the config.
        encoder: gives the size and channels of the latents; None takes them from the config.
        text: gives the width and length of caption features, and the features of the empty caption.

    Raises:
        ValueError: a size is missing, in the config and without encoders, or does not fit the encoders; the
            image size or a bucket of the dataset has a side or a number of frames that does not fit; the
            samples are of another layout than the encoder's or the model's.
    """
    check_shapes(config, encoder)
    facts = _facts(config, encoder, text)
    side = "voxel_size" if config.voxel_size else "image_size"
    for key, size in facts.items():
        if config.model.get(key, size) != size:
            raise ValueError(
                f"model.{key} needs {size} for {side} {getattr(config, side)} and these encoders, got"
                f" {config.model[key]}"
            )
    given = {key: value for key, value in facts.items() if key not in config.model}
    model = cast(nn.Module, build(MODELS, config.model, **given))
    if config.super_resolution.factor:
        _tell_level(model, config)
    check_shapes(config, encoder, model)
    _check_conditions(model, config)
    if text is not None:
        cast(Any, model).set_null_text(text.encode([""]))
    return model


def check_shapes(
    config: ExperimentConfig, encoder: Encoder | None = None, model: nn.Module | None = None
) -> None:
    """Nothing, if image size and buckets, or the side of shapes, fit the encoder and the model's patches.

    Args:
        config: the config.
        encoder: None takes its downsampling from the config's sizes.
        model: None takes its patch from the config. A saved network has a patch of its own.

    Raises:
        ValueError: a side or a number of frames does not fit; the message has the key and what would fit.
    """
    check_layout(config)
    sections = {"data.dataset": config.data.dataset, "data.validation": config.data.validation or {}}
    buckets = {f"{key}.buckets": section.get("buckets") for key, section in sections.items()}
    shapes = shapes_of(config.image_size, buckets)
    if config.voxel_size:
        shapes = {"voxel_size": (config.voxel_size, config.voxel_size)}
    patch = stated_patch(config.model) if model is None else int(getattr(model, "patch_size", 1))
    check_sides(shapes, downsample=_downsample(config, encoder), patch=patch)
    check_factor(shapes, config.super_resolution.factor)
    if model is not None:
        check_frames(shapes, model)
        check_one_size(shapes, model, downsample=_downsample(config, encoder))


def _downsample(config: ExperimentConfig, encoder: Encoder | None) -> int:
    """Pixels or voxels for each cell of a latent, on a side: the encoder's, or by the config's sizes."""
    if encoder is not None:
        return encoder.downsample
    size = config.model.get("input_size")
    if config.encoder["type"] in IDENTITIES.values() or not isinstance(size, int) or size < 1:
        return 1
    key = "voxel_size" if config.voxel_size else "image_size"
    side = int(getattr(config, key))
    if side % size:
        raise ValueError(
            f"{key} needs a multiple of model.input_size {size}, the side of a latent, got {side}"
        )
    return side // size


def _facts(config: ExperimentConfig, encoder: Encoder | None, text: CaptionSource | None) -> dict[str, Any]:
    """What the experiment decides about a model, under the names of the models' arguments."""
    facts: dict[str, Any] = {
        "num_classes": config.num_classes,
        "learn_sigma": config.diffusion.learn_sigma,
        "allow_download": config.allow_download,
    }
    if encoder is None and config.encoder["type"] in IDENTITIES.values():
        encoder = build_encoder(config, torch.device("cpu"))
    if encoder is not None:
        side = config.voxel_size or config.image_size
        facts |= {"input_size": side // encoder.downsample, "in_channels": encoder.channels}
    channels = config.model.get("in_channels") if encoder is None else encoder.channels
    if channels is not None and config.inpainting is not None:
        facts["extra_channels"] = 1 + channels
    elif channels is not None and config.super_resolution.factor:
        facts["extra_channels"] = channels
    if text is not None:
        facts |= {"text_width": text.width, "text_length": text.max_length}
    if config.num_frames:
        facts["num_frames"] = config.num_frames
    if config.voxel_size:
        facts["num_points"] = config.num_points
    return facts


def _tell_level(model: nn.Module, config: ExperimentConfig) -> None:
    """Has the model embed the level of the noise on its low-resolution input.

    Raises:
        ValueError: the model cannot.
    """
    if not hasattr(model, "tell_level"):
        raise ValueError(
            f"super_resolution does not fit the model {config.model['type']}; wanted one that takes a"
            " low-resolution input, such as DiT, Latte, SiT, TextDiT, TextLatte or UNet"
        )
    cast(Any, model).tell_level()


def _check_conditions(model: nn.Module, config: ExperimentConfig) -> None:
    """Raises ValueError if the model does not take what the config has, a condition or a prediction."""
    name = config.model["type"]
    predicts, predicted = getattr(model, "predicts", None), config.diffusion.prediction_type
    if predicts not in (None, predicted):
        raise ValueError(
            f"the model {name} predicts {predicts} alone, got diffusion.prediction_type {predicted}; wanted"
            " diffusion.type RectifiedFlow, with prediction_type null"
        )
    if config.num_classes and not model.num_classes:
        raise ValueError(f"num_classes: {config.num_classes} has no effect on the model {name}; wanted 0")
    if (config.text_encoder is not None) != hasattr(model, "text_width"):
        wanted = "null" if config.text_encoder is not None else "one, such as MiniLM"
        raise ValueError(f"text_encoder does not fit the model {name}: wanted {wanted}")
    wants_extra = config.inpainting is not None or config.super_resolution.factor > 0
    if wants_extra != bool(getattr(model, "extra_channels", 0)):
        key = "super_resolution" if config.super_resolution.factor else "inpainting"
        raise ValueError(f"{key} does not fit the model {name} and its extra_channels; wanted both or none")
    if config.num_frames != (getattr(model, "num_frames", None) or 0):
        frames = getattr(model, "num_frames", None) or 0
        raise ValueError(f"num_frames: {config.num_frames} does not fit the model {name}, which has {frames}")


def dataset_options(config: ExperimentConfig, *, augmented: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dataset's section of the config, and what the experiment decides about keys missing there."""
    section = dict(config.data.dataset)
    facts: dict[str, Any] = {
        "class_cond": config.num_classes > 0,
        "text": config.text_encoder is not None,
        "teacher": config.alignment.type == "REPA",
    }
    facts |= _sizes(config)
    if not augmented:
        section.pop("random_flip", None)
        if section.get("fit") == "random_crop":
            del section["fit"]
        facts["random_flip"] = False
    return section, {key: value for key, value in facts.items() if key not in section}


def _sizes(config: ExperimentConfig) -> dict[str, Any]:
    """The sizes of a sample, under the names of the datasets' arguments."""
    if config.voxel_size:
        return {"voxel_size": config.voxel_size, "num_points": config.num_points}
    frames = {"num_frames": config.num_frames} if config.num_frames else {}
    return {"image_size": config.image_size, **frames}


def summary_options(config: ExperimentConfig) -> dict[str, Any]:
    """What `data_lines` takes from a config."""
    return {
        "batch_size": config.data.batch_size,
        "accumulation": config.optimizer.grad_accumulation,
        "shapes": config.data.dataset.get("buckets"),
        "num_classes": config.num_classes,
    }
