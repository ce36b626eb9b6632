"""Checks that the keys of an experiment agree, in each phase.

Uses the standard library only, like `schema.py`: a contradiction fails before torch is imported.
"""

import re
from dataclasses import fields
from typing import get_args, get_type_hints

from speedit_plugins.trainer.config.acceleration_checks import check_accelerations
from speedit_plugins.trainer.config.schema import PATHS, ExperimentConfig
from speedit_plugins.trainer.config.sections import (
    FLOW,
    FLOW_KEYS,
    FLOW_PREDICTIONS,
    GAUSSIAN_KEYS,
    METRIC_OF,
    ONLY_IN_TEST,
    DiffusionConfig,
    EvaluationConfig,
    SamplerConfig,
)
from speedit_plugins.trainer.config.shape_checks import check_shape_keys
from speedit_plugins.trainer.config.super_resolution_checks import check_super_resolution
from speedit_plugins.trainer.config.training_checks import (
    check_average,
    check_optimizer,
    check_optimizer_keys,
    check_sequence,
    check_sharding,
)
from speedit_plugins.trainer.config.validation import ConfigError

# The names in the schema's `Literal[...] | None`.
_SAMPLERS: tuple[str, ...] = get_args(get_args(get_type_hints(SamplerConfig)["type"])[0])
_FLOW_SAMPLERS = ("euler", "heun")


def check_phase(config: ExperimentConfig, phase: str) -> None:
    """Checks that the keys agree in this phase.

    Raises:
        ConfigError: a key that the phase needs is missing, two keys contradict, or an option has no effect.
    """
    _check_paths(config)
    _check_agreement(config)
    check_optimizer_keys(config.optimizer)
    _check_process(config.diffusion)
    _check_text(config)
    _check_inpainting(config, phase)
    check_shape_keys(config)
    check_super_resolution(config, phase)
    _check_lora(config, phase)
    if phase == "train":
        _check_training(config)
    if phase in ("inference", "sample") or (phase == "train" and _draws_in_training(config)):
        _check_drawing(config, is_grid=phase == "sample" or (phase == "train" and config.sample_every > 0))
    elif phase == "train":
        # What no guidance_scale of a later phase could mend, before hours of training.
        _check_sampler_type(config)
        _check_thresholding(config)
    if phase == "test" and config.ckpt_path is not None:
        raise ConfigError(
            "ckpt_path", "has no effect in test, which compares images; wanted null, or samples=NPZ"
        )


def _draws_in_training(config: ExperimentConfig) -> bool:
    """Whether the training draws samples.

    Raises:
        ConfigError: its process cannot.
    """
    found = [key for key in ("sample_every", "evaluate_every") if getattr(config, key)]
    if found and config.diffusion.timestep_respacing:
        what = "grids" if found[0] == "sample_every" else "samples"
        raise ConfigError(found[0], f"a respaced training process draws no {what}; wanted 0")
    return bool(found)


def _check_drawing(config: ExperimentConfig, *, is_grid: bool) -> None:
    _check_sampler(config)
    _check_classes(config)
    if config.inpainting is not None and config.inpaint_image is None:
        # Images of the dataset are filled, each with its own class or caption.
        return
    if config.super_resolution.factor and not config.cascade:
        # As with holes: low-resolution samples have their own classes or captions.
        return
    if is_grid and config.num_classes and not config.sample_classes:
        raise ConfigError("sample_classes", "wanted at least one class for the grid, got none")
    if config.text_encoder is not None and not config.sample_prompts and config.prompts_file is None:
        raise ConfigError("sample_prompts", "wanted at least one prompt, or prompts_file, got none")


def _check_paths(config: ExperimentConfig) -> None:
    """A `$HOME` in a path would become a folder of that name."""
    for key in PATHS:
        found = re.search(r"\$\{?(\w+)\}?", getattr(config, key) or "")
        if found is not None:
            raise ConfigError(
                key,
                f"environment variables are not replaced in a path, got {found[0]}; wanted"
                f" ${{oc.env:{found[1]}}}, or quotes that let the shell replace it",
            )


def _check_training(config: ExperimentConfig) -> None:
    """Checks the keys of the training loop."""
    if config.max_training_steps < 1:
        raise ConfigError("max_training_steps", f"train wanted int >= 1, got {config.max_training_steps}")
    if config.data.accept_changed and config.resume == "never":
        raise ConfigError("data.accept_changed", "has no effect with resume: never; wanted false")
    if config.data.accept_changed and config.data.held_out_samples:
        problem = "held_out_samples of changed data would be others, some of them trained on; wanted false"
        raise ConfigError("data.accept_changed", problem)
    if config.data.prefetch_factor is not None and config.data.num_workers == 0:
        raise ConfigError("data.prefetch_factor", "has no effect without data.num_workers; wanted null")
    _check_measurements(config)
    check_optimizer(config)
    check_sharding(config)
    check_sequence(config)
    check_average(config)
    check_accelerations(config)


def _check_measurements(config: ExperimentConfig) -> None:
    """Checks the keys of validation, of evaluation in training, and of the best checkpoint."""
    data = config.data
    if config.validate_every and data.validation is None and not data.held_out_samples:
        wanted = "data.validation, a dataset's section, or data.held_out_samples > 0"
        raise ConfigError("validate_every", f"has no samples to measure the loss on; wanted {wanted}")
    # The phase test compares shapes with it.
    if data.validation is not None and not config.validate_every and not config.voxel_size:
        raise ConfigError("data.validation", "has no effect without validate_every; wanted null")
    if data.validation is not None and data.held_out_samples:
        raise ConfigError("data.held_out_samples", "are not measured beside data.validation; wanted 0")
    defaults = {entry.name: entry.default for entry in fields(ExperimentConfig)}
    for key, every in (("validate_samples", "validate_every"), ("evaluate_samples", "evaluate_every")):
        if not getattr(config, every) and getattr(config, key) != defaults[key]:
            problem = f"has no effect without {every}; wanted its default, {defaults[key]}, or {every} > 0"
            raise ConfigError(key, problem)
    if config.evaluate_every:
        _check_evaluation(config.evaluation)
    _check_best(config)


def _check_evaluation(options: EvaluationConfig) -> None:
    """Refuses metrics that a training does not measure, and options of metrics that are not measured."""
    metrics = ", ".join(options.metrics)
    for name in options.metrics:
        if name in ONLY_IN_TEST:
            raise ConfigError("evaluation.metrics", f"train measures no {name}; wanted others, got {metrics}")
    defaults = EvaluationConfig()
    for key, metric in METRIC_OF.items():
        if metric not in options.metrics and getattr(options, key) != getattr(defaults, key):
            raise ConfigError(f"evaluation.{key}", f"has no effect without {metric} in evaluation.metrics")


def _check_best(config: ExperimentConfig) -> None:
    best = config.keep_best
    needed = "validate_every" if best == "val_loss" else "evaluate_every"
    if best is not None and not getattr(config, needed):
        raise ConfigError("keep_best", f"{best} is not measured with {needed}: 0; wanted more, or null")
    if best in ("fid", "kid") and best not in config.evaluation.metrics:
        metrics = ", ".join(config.evaluation.metrics)
        raise ConfigError("keep_best", f"wanted one of evaluation.metrics, {metrics}, or null, got {best}")


def _check_agreement(config: ExperimentConfig) -> None:
    """Keys that components repeat from the top level must have the same value."""
    pairs = (
        ("model.num_classes", config.model, config.num_classes),
        ("model.learn_sigma", config.model, config.diffusion.learn_sigma),
        ("data.dataset.image_size", config.data.dataset, config.image_size),
        ("data.dataset.num_frames", config.data.dataset, config.num_frames),
        ("data.dataset.voxel_size", config.data.dataset, config.voxel_size),
        ("data.dataset.num_points", config.data.dataset, config.num_points),
        ("data.validation.image_size", config.data.validation or {}, config.image_size),
        ("data.validation.num_frames", config.data.validation or {}, config.num_frames),
        ("data.validation.voxel_size", config.data.validation or {}, config.voxel_size),
        ("data.validation.num_points", config.data.validation or {}, config.num_points),
    )
    for key, section, wanted in pairs:
        name = key.rpartition(".")[2]
        if name in section and section[name] != wanted:
            top = "diffusion.learn_sigma" if name == "learn_sigma" else name
            raise ConfigError(key, f"wanted the value of {top}, {wanted!r}, got {section[name]!r}")


def _check_process(diffusion: DiffusionConfig) -> None:
    """Refuses keys of one kind of process in the other kind, where they have no effect."""
    if diffusion.is_flow:
        if diffusion.learn_sigma or diffusion.prediction_type not in FLOW_PREDICTIONS:
            problem = f"{FLOW} wanted learn_sigma null and prediction_type null, flow or x0"
            raise ConfigError("diffusion.type", problem)
        foreign = [key for key in GAUSSIAN_KEYS if key != "prediction_type" and getattr(diffusion, key)]
    else:
        if diffusion.prediction_type == "flow":
            raise ConfigError("diffusion.prediction_type", f"flow is what diffusion.type {FLOW} predicts")
        defaults = {entry.name: entry.default for entry in fields(DiffusionConfig)}
        if diffusion.zero_terminal_snr and diffusion.prediction_type == "epsilon":
            problem = "noise alone does not determine x_0; wanted prediction_type v or x0, got epsilon"
            raise ConfigError("diffusion.zero_terminal_snr", problem)
        own = ("prediction_type",)
        foreign = [key for key in FLOW_KEYS if key not in own and getattr(diffusion, key) != defaults[key]]
    if foreign:
        raise ConfigError(f"diffusion.{foreign[0]}", f"has no effect with diffusion.type {diffusion.type}")


def _check_text(config: ExperimentConfig) -> None:
    if config.text_encoder is None:
        for key in ("sample_prompts", "prompts_file"):
            if getattr(config, key):
                raise ConfigError(key, "has no effect without text_encoder; wanted none")
    elif config.num_classes:
        raise ConfigError("text_encoder", f"wanted num_classes 0 beside it, got {config.num_classes}")
    elif config.sample_prompts and config.prompts_file is not None:
        raise ConfigError("prompts_file", "wanted null beside sample_prompts: one of the two has no effect")


def _check_inpainting(config: ExperimentConfig, phase: str) -> None:
    if config.inpainting is not None:
        _check_pixels(config)
    is_filling = phase == "sample" and config.inpainting is not None
    keys = ("inpaint_image", "inpaint_mask")
    is_given = any(getattr(config, key) is not None for key in keys)
    for key in keys:
        if is_filling and is_given and getattr(config, key) is None:
            raise ConfigError(key, "wanted a path: the image and the mask of its hole, or neither")
        if not is_filling and getattr(config, key) is not None:
            raise ConfigError(key, "has no effect but in sample with inpainting; wanted null")
    if config.inpainting is not None and phase == "train" and config.evaluate_every:
        raise ConfigError("evaluate_every", "draws whole samples, which inpainting does not; wanted 0")


def _check_pixels(config: ExperimentConfig) -> None:
    """Refuses to make holes in what has no pixels and no voxels."""
    if config.num_points:
        problem = "a cloud has no place for each point, so nothing of it can stay as given"
        raise ConfigError("inpainting", f"{problem}; wanted num_points 0, or inpainting null")
    for key in ("dataset", "validation"):
        section = getattr(config.data, key) or {}
        if section.get("type") == "LatentCache":
            problem = "inpainting makes holes in pixels; wanted a dataset of images or videos"
            raise ConfigError(f"data.{key}", f"{problem}, got LatentCache")


def _check_lora(config: ExperimentConfig, phase: str) -> None:
    options = config.lora
    if not options.rank:
        for key in ("alpha", "targets"):
            if getattr(options, key):
                raise ConfigError(f"lora.{key}", "has no effect with lora.rank 0; wanted a rank, or no lora")
    elif phase == "train" and config.pretrained is None and config.model.get("path") is None:
        raise ConfigError("lora.rank", "adapters need trained weights; wanted pretrained or model.path")


def _check_sampler(config: ExperimentConfig) -> None:
    sampler = config.sampler
    _check_sampler_type(config)
    _check_num_steps(config)
    if sampler.guidance_channels is not None and config.guidance_scale == 1:
        raise ConfigError("sampler.guidance_channels", "has no effect with guidance_scale 1; wanted null")
    _check_guidance_schedule(config)
    _check_thresholding(config)


def _check_sampler_type(config: ExperimentConfig) -> None:
    sampler = config.sampler
    fitting = [name for name in _SAMPLERS if (name in _FLOW_SAMPLERS) == config.diffusion.is_flow]
    if sampler.type is not None and sampler.type not in fitting:
        wanted = f"one of {', '.join(fitting)} with diffusion.type {config.diffusion.type}"
        raise ConfigError("sampler.type", f"wanted {wanted}, got {sampler.type}")
    if sampler.eta and not str(sampler.type).startswith("ddim"):
        raise ConfigError("sampler.eta", f"has no effect with {sampler.type}; wanted 0, got {sampler.eta}")


def _check_num_steps(config: ExperimentConfig) -> None:
    sampler = config.sampler
    # ddpm and ddim visit both ends of the chain: at least 2 steps. DPM-Solver takes the clean end as given.
    steps = config.diffusion.diffusion_steps
    if sampler.type == "heun" and sampler.num_steps < 2:
        raise ConfigError("sampler.num_steps", f"heun wanted int >= 2, got {sampler.num_steps}")
    limits = {"dpm_solver": (1, steps - 1), "ddim_leading": (1, steps), "ddim_leading_1": (1, steps - 1)}
    least, most = limits.get(str(sampler.type), (2, steps))
    if not config.diffusion.is_flow and not least <= sampler.num_steps <= most:
        limit = f"{sampler.type} wanted int in [{least}, {most}] of diffusion.diffusion_steps = {steps}"
        raise ConfigError("sampler.num_steps", f"{limit}, got {sampler.num_steps}")


def _check_guidance_schedule(config: ExperimentConfig) -> None:
    sampler, interval = config.sampler, config.sampler.guidance_interval
    schedule = sampler.guidance_schedule
    if schedule != "constant" and config.guidance_scale == 1:
        raise ConfigError("sampler.guidance_schedule", "has no effect with guidance_scale 1; wanted constant")
    if sampler.guidance_power is not None and schedule != "power_cosine":
        raise ConfigError("sampler.guidance_power", f"has no effect with {schedule}; wanted null")
    if interval and schedule != "interval":
        raise ConfigError("sampler.guidance_interval", f"has no effect with {schedule}; wanted []")
    if schedule == "interval" and (len(interval) != 2 or not interval[0] < interval[1]):
        wanted = "two times, the first one less, such as [0, 0.8]"
        raise ConfigError("sampler.guidance_interval", f"wanted {wanted}, got {interval}")


def _check_thresholding(config: ExperimentConfig) -> None:
    sampler = config.sampler
    if sampler.dynamic_percentile is not None and sampler.thresholding != "dynamic":
        got = sampler.thresholding or "null"
        raise ConfigError("sampler.dynamic_percentile", f"has no effect with thresholding {got}; wanted null")
    if sampler.thresholding is None:
        return
    if sampler.clip_sample:
        problem = f"clip_sample is static thresholding already; wanted null, got {sampler.thresholding}"
        if sampler.thresholding == "dynamic":
            problem = "dynamic scales x_0 in place of clamping it; wanted sampler.clip_sample false beside it"
        raise ConfigError("sampler.thresholding", problem)
    if config.encoder["type"] in ("AutoencoderKL", "Points"):
        what = "normalised points" if config.num_points else "latents"
        problem = f"{what} do not lie in [-1, 1]; wanted null, got {sampler.thresholding}"
        raise ConfigError("sampler.thresholding", problem)


def _check_classes(config: ExperimentConfig) -> None:
    if config.num_classes == 0 and config.text_encoder is None and config.guidance_scale != 1:
        scale = config.guidance_scale
        raise ConfigError(
            "guidance_scale", f"needs classes, but num_classes is 0, or text; wanted 1, got {scale}"
        )
    if config.text_encoder is not None and config.guidance_scale != 1 and not config.caption_dropout_prob:
        raise ConfigError("guidance_scale", "needs caption_dropout_prob > 0 in training, got 0; wanted 1")
    for label in config.sample_classes:
        # Whether there is a class of a name is known with the data or the checkpoint.
        if not config.num_classes or (isinstance(label, int) and not 0 <= label < config.num_classes):
            known = f"in [0, {config.num_classes})" if config.num_classes else "an empty list without classes"
            raise ConfigError("sample_classes", f"wanted {known}, got {label!r}")
