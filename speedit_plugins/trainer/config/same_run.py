"""Compares a config with that of a checkpoint: the weights must keep their meaning.

Many options change no tensor, so that weights load and then predict something else. The models are looked up
in their registry, as a config leaves most of their options at a default.
"""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, cast

from speedit_plugins.registry import MODELS, TEXT_ENCODERS, Registry, options_of
from speedit_plugins.trainer.config.accelerations import AlignmentConfig
from speedit_plugins.trainer.config.custom_imports import check_same_imports
from speedit_plugins.trainer.config.schema import settled_process
from speedit_plugins.trainer.config.sections import FLOW, DiffusionConfig, SuperResolutionConfig
from speedit_plugins.trainer.config.validation import build_section

# What a process tells its model, or asks of it. Without it: the policy, what the training alone reads, and
# what a sampler may choose, such as the shift of a flow's time, which the model is told.
_ASKED = ("type", "prediction_type", "learn_sigma", "noise_schedule", "zero_terminal_snr", "diffusion_steps")
# A flow's model is told the time itself, not a number of `diffusion_steps`.
_ASKED_OF_FLOWS = ("type", "prediction_type", "learn_sigma")

# Where things lie and how they are computed; and the sizes of a sample, which weights do not depend on.
_PLACES = frozenset(("path", "subfolder", "tokenizer_subfolder", "allow_download"))
_COMPUTATION = frozenset(("dtype", "attention", "gradient_checkpointing"))
_SIZES = frozenset(("input_size", "num_frames", "num_points"))
# Probabilities of the training.
_DROPOUTS = frozenset(("class_dropout_prob",))
# After a difference in layers that only the training has.
_NEW_RUN = "; wanted the former, or a new experiment_dir with pretrained= this checkpoint"


def check_same_run(saved: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Checks that a training may go on: same imports, process, encoders, holes, and meaning of the model.

    `num_classes`, the seed and the number of held out samples must stay too. With `data.accept_changed` that
    number may differ.

    Args:
        saved: plain config of the checkpoint; a key added since it was written is at its default.
        config: plain config of the run that resumes from it.

    Raises:
        ValueError: a key has another value; the message has both values.
    """
    check_same_imports(saved, config.get("custom_imports", []))
    _compare(_trained(saved), _trained(config))
    if not _data(config).get("accept_changed", False):
        _compare(_held_out(saved), _held_out(config))
    _compare(_training_only(saved), _training_only(config), instead=_NEW_RUN)
    _check_same_model(saved, config)


def check_same_meaning(saved: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Checks that samples may be drawn: as `check_same_run`, of what decides what the model is asked for.

    The policy, the encoder and whatever else only the training reads may differ.

    Args:
        saved: plain config of the checkpoint.
        config: plain config of the run that draws with it.

    Raises:
        ValueError: a key has another value; the message has both values.
    """
    _compare(_asked(saved), _asked(config))
    _check_same_model(saved, config)
    was, now = saved.get("text_encoder"), config.get("text_encoder")
    if was is not None and now is not None:
        _check_same_part("text_encoder", TEXT_ENCODERS, was, now, free=_PLACES | _COMPUTATION)


def _compare(was: Mapping[str, Any], now: Mapping[str, Any], *, instead: str = "") -> None:
    """Raises ValueError for the first key with another value, or without one. `instead` ends the message."""
    for key, value in was.items():
        if now.get(key) != value:
            raise ValueError(f"{key} was {value!r}, got {now.get(key)!r}{instead}")


def _trained(config: Mapping[str, Any]) -> dict[str, Any]:
    meant = {f"diffusion.{key}": value for key, value in asdict(_process(config)).items()}
    given = {key: config.get(key) for key in ("encoder", "text_encoder", "inpainting")}
    kept = {key: config[key] for key in ("num_classes", "seed") if key in config}
    return {**meant, **_enlarged(config), **given, **kept}


def _held_out(config: Mapping[str, Any]) -> dict[str, int]:
    return {"data.held_out_samples": _data(config).get("held_out_samples", 0)}


def _data(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], config.get("data", {}))


def _asked(config: Mapping[str, Any]) -> dict[str, Any]:
    process = _process(config)
    keys = _ASKED_OF_FLOWS if process.type == FLOW else _ASKED
    named = {"num_classes": config["num_classes"]} if "num_classes" in config else {}
    return {**{f"diffusion.{key}": getattr(process, key) for key in keys}, **_enlarged(config), **named}


def _process(config: Mapping[str, Any]) -> DiffusionConfig:
    return settled_process(build_section(DiffusionConfig, config["diffusion"], "diffusion"))


def _enlarged(config: Mapping[str, Any]) -> dict[str, Any]:
    low = build_section(SuperResolutionConfig, config.get("super_resolution", {}), "super_resolution")
    return {f"super_resolution.{key}": value for key, value in asdict(low).items()}


def _training_only(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the layers that only the training has: a checkpoint holds them too."""
    alignment = build_section(AlignmentConfig, config.get("alignment", {}), "alignment")
    layers = {f"alignment.{key}": getattr(alignment, key) for key in ("type", "teacher", "projector_width")}
    if alignment.type == "SRA":
        layers["alignment.teacher_layer"] = alignment.last_block
    return {**layers, "uncertainty": config.get("uncertainty", False)}


def _check_same_model(saved: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    free = _PLACES | _COMPUTATION | _SIZES | _DROPOUTS
    _check_same_part("model", MODELS, saved["model"], config["model"], free=free)


def _check_same_part(
    section: str,
    registry: Registry,
    was: str | Mapping[str, Any],
    now: str | Mapping[str, Any],
    *,
    free: Collection[str],
) -> None:
    """Checks that both sections build the same, whether they state an option or leave it at its default.

    An option without a value in one of them is not compared: the experiment or a saved network decides it.

    Args:
        section: the key of both, for the message.
        registry: has their builders.
        was, now: the checkpoint's section and the config's.
        free: options that may differ.

    Raises:
        ValueError: an option differs.
    """
    (before, old), (after, new) = _built(registry, was), _built(registry, now)
    if before != after:
        raise ValueError(f"{section}.type was {options_of(was)['type']!r}, got {options_of(now)['type']!r}")
    for key, value in old.items():
        if key in new and key not in free and value != new[key]:
            raise ValueError(f"{section}.{key} was {value!r}, got {new[key]!r}")


def _built(registry: Registry, section: str | Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What a section builds, and the arguments that are known: its own, a size's, and defaults.

    With the `path` of a saved network its files have the other options, so no default counts.
    """
    options = options_of(section)
    name = options.pop("type")
    builder = registry.get(name)
    known = {} if builder is None else dict(getattr(builder, "fixed", {}))
    if builder is not None and not options.get("path"):
        parameters = inspect.signature(builder).parameters.items()
        known |= {key: each.default for key, each in parameters if each.default is not each.empty}
    known |= options
    # Lists, as YAML has them.
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}
    return getattr(builder, "model", builder) or name, plain
