"""Checks of the sections in `accelerations.py`: what they need, and what they cannot be combined with."""

from dataclasses import fields

from speedit_plugins.trainer.config.accelerations import AlignmentConfig, MaskingConfig, RoutingConfig
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.validation import ConfigError


def check_accelerations(config: ExperimentConfig) -> None:
    """Checks the accelerations of a training.

    Raises:
        ConfigError: names the key that is missing, or that cannot be combined with another one.
    """
    if config.contrastive.weight and config.data.batch_size < 2:
        raise ConfigError(
            "contrastive.weight",
            f"needs two samples in a batch, got data.batch_size {config.data.batch_size}",
        )
    _check_masking(config)
    _check_routing(config.routing)
    _check_noise_assignment(config)
    if config.uncertainty:
        _check_uncertainty(config)
    _check_alignment(config)


def _check_masking(config: ExperimentConfig) -> None:
    options, defaults = config.masking, MaskingConfig()
    if options.type == "none":
        for key in ("ratio", "spread"):
            if getattr(options, key) != getattr(defaults, key):
                raise ConfigError(f"masking.{key}", "has no effect with masking.type none; wanted type MDT")
        return
    if options.ratio + (options.spread or 0) >= 1:
        raise ConfigError(
            "masking.spread",
            f"wanted ratio + spread < 1, so that tokens are left, got {options.ratio:g} + {options.spread:g}",
        )
    if config.plugin == "gemini":
        raise ConfigError(
            "masking.type",
            "makes two forward passes for a backward pass, which is not tested with plugin gemini; wanted"
            " ddp, zero1, zero2 or fsdp2",
        )


def _check_routing(options: RoutingConfig) -> None:
    """Refuses a route that no token takes. The model is asked for its blocks when it is built."""
    defaults = RoutingConfig()
    if options.keep == 1:
        for field, key in (("from_", "from"), ("to", "to")):
            if getattr(options, field) != getattr(defaults, field):
                raise ConfigError(
                    f"routing.{key}", "has no effect with routing.keep 1; wanted less, such as 0.5"
                )


def _check_noise_assignment(config: ExperimentConfig) -> None:
    kind, batch = config.noise_assignment, config.data.batch_size
    if kind is not None and batch < 2:
        raise ConfigError("noise_assignment", f"needs two samples in a batch, got data.batch_size {batch}")
    if kind == "class" and not config.num_classes:
        raise ConfigError(
            "noise_assignment", "class needs classes, but num_classes is 0; wanted batch or null"
        )


def _check_uncertainty(config: ExperimentConfig) -> None:
    """Refuses what learns the same divisor, and the plugin that has no place for a layer outside the model's
    forward pass."""
    policy = config.diffusion.policy
    weighting = policy.get("weighting", {})
    weighting = weighting.get("type") if isinstance(weighting, dict) else weighting
    if "uncertainty" in (policy.get("type"), weighting):
        raise ConfigError(
            "uncertainty", "beside the policy's weighting of this name: both do the same; wanted one"
        )
    if policy.get("normalize") == "loss":
        raise ConfigError(
            "uncertainty",
            "divides by the loss, as diffusion.policy.normalize: loss does; wanted one of the two",
        )
    if config.plugin == "gemini":
        raise ConfigError(
            "uncertainty",
            "has a layer outside of the model's forward pass; wanted plugin ddp, zero1, zero2 or fsdp2",
        )


# The keys of `alignment` that one type alone reads.
_ALIGNMENT_KEYS = {
    "REPA": ("teacher", "teacher_size"),
    "SRA": ("teacher_layer", "max_interval", "decay"),
}


def _check_alignment(config: ExperimentConfig) -> None:
    options, defaults = config.alignment, AlignmentConfig()
    names = [entry.name for entry in fields(AlignmentConfig) if entry.name != "type"]
    foreign = [key for type_, keys in _ALIGNMENT_KEYS.items() if type_ != options.type for key in keys]
    for key in names if options.type == "none" else foreign:
        if getattr(options, key) != getattr(defaults, key):
            default = getattr(defaults, key)
            wanted = "null" if default is None else default
            raise ConfigError(
                f"alignment.{key}",
                f"has no effect with alignment.type {options.type}; wanted {wanted}",
            )
    if options.type == "none":
        return
    if options.type == "REPA" and options.teacher is None:
        raise ConfigError(
            "alignment.teacher", "REPA wanted embedded, or a vision model of transformers, got null"
        )
    if options.teacher_layer is not None and options.teacher_layer <= options.layer:
        raise ConfigError(
            "alignment.teacher_layer",
            f"wanted a block after alignment.layer {options.layer}, got {options.teacher_layer}",
        )
    _check_alignment_with_others(config)


def _check_alignment_with_others(config: ExperimentConfig) -> None:
    name = f"alignment.type {config.alignment.type}"
    if config.model["type"] == "UNet":
        raise ConfigError(
            "alignment.type", "aligns the tokens of a transformer, and a UNet has none; wanted none"
        )
    if config.plugin == "gemini":
        raise ConfigError(
            "plugin", f"gemini has no whole weights for {name}; wanted ddp, zero1, zero2 or fsdp2"
        )
    if config.alignment.type == "SRA" and config.lora.rank:
        raise ConfigError(
            "lora.rank", f"{name} needs an average of all weights, and adapters train few; wanted 0, or REPA"
        )
