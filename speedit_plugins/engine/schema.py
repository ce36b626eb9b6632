"""The keys of an experiment: names, types, defaults, ranges, and the checks that need no torch.

Standard library only, so that a wrong config fails at once. `docs/configs.md` explains each key.
"""

import dataclasses
import difflib
import math
import operator
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

PHASES = ("train", "inference", "sample", "test")

# A section that a registry builds: `type` and free keys, which its builder's own signature checks.
Component = dict[str, Any]
COMPONENTS = ("model", "diffusion.policy", "encoder", "data.dataset", "features")
# A policy has a `type`, or these parts.
POLICY_PARTS = frozenset({"density", "weighting", "draw", "scope"})

Config = TypeVar("Config")

_LIMITS = {
    "at_least": (">=", operator.ge),
    "at_most": ("<=", operator.le),
    "above": (">", operator.gt),
    "below": ("<", operator.lt),
}


class ConfigError(ValueError):
    """A wrong config: `path` is the dotted key, the message says what, got, wanted."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


def _limited(default: Any = dataclasses.MISSING, **limits: float) -> Any:
    """A field with a range, of each item in a sequence: `at_least`, `at_most`, `above`, `below`."""
    return field(default=default, metadata=limits)


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The process that is trained: arguments of a registered process, and the timestep policy."""

    type: str = "SpeeDiffusion"
    policy: Component = field(default_factory=lambda: {"type": "speedit"})
    noise_schedule: str = "linear"
    diffusion_steps: int = _limited(1000, at_least=1)
    timestep_respacing: str = ""
    prediction_type: Literal["epsilon", "x0", "v"] = "epsilon"
    learn_sigma: bool = True
    sigma_small: bool = False
    rescale_learned_sigmas: bool = False

    def process_config(self) -> Component:
        """`type` and the process's arguments, without the policy: what `registry.build` takes."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "policy"}


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How samples are drawn in inference, sample and training grids."""

    type: Literal["ddpm", "ddim", "dpm_solver"] = "ddpm"
    num_steps: int = _limited(250, at_least=1)
    eta: float = _limited(0.0, at_least=0, at_most=1)
    guidance_channels: int | None = _limited(None, at_least=1)
    clip_sample: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and its schedule; lengths in optimizer steps."""

    type: Literal["AdamW"] = "AdamW"
    lr: float = _limited(1e-4, above=0)
    weight_decay: float = _limited(0.0, at_least=0)
    betas: tuple[float, float] = _limited((0.9, 0.999), at_least=0, below=1)
    warmup_steps: int = _limited(0, at_least=0)
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr: float = _limited(0.0, at_least=0)
    max_grad_norm: float = _limited(0.0, at_least=0)
    grad_accumulation: int = _limited(1, at_least=1)


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Moving average of the weights; 6931 steps of half-life are DiT's decay, ln 0.5 / ln 0.9999."""

    halflife_steps: float = _limited(6931.0, above=0)
    ramp: bool = True


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    dataset: Component
    batch_size: int = _limited(at_least=1)
    num_workers: int = _limited(0, at_least=0)
    prefetch_factor: int | None = _limited(None, at_least=1)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One experiment in one phase, checked. Built by `engine.config.load_config`."""

    experiment_dir: str
    experiment_name: str = ""
    seed: int = _limited(0, at_least=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    allow_tf32: bool = True
    allow_download: bool = False

    num_classes: int = _limited(1000, at_least=0)
    image_size: int = _limited(256, at_least=1)
    model: Component
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    encoder: Component = field(default_factory=lambda: {"type": "Pixels"})
    data: DataConfig

    plugin: Literal["ddp", "zero1", "zero2", "gemini"] = "ddp"
    distributed_timeout_seconds: float = _limited(600.0, above=0)
    compile: bool = False

    max_training_steps: int = _limited(0, at_least=0)
    resume: str = "auto"
    pretrained: str | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    ckpt_every: int = _limited(50_000, at_least=1)
    keep_last: int = _limited(3, at_least=1)
    keep_every: int = _limited(0, at_least=0)
    max_skipped_steps: int = _limited(10, at_least=1)
    log_every: int = _limited(100, at_least=1)
    sample_every: int = _limited(0, at_least=0)
    enable_tensorboard_log: bool = True
    enable_wandb_log: bool = False
    wandb_project: str = "speedit"

    ckpt_path: str | None = None
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guidance_scale: float = _limited(1.0, at_least=0)
    sample_classes: list[int] = field(default_factory=list)
    samples_per_class: int = _limited(1, at_least=1)
    num_samples: int = _limited(50_000, at_least=1)
    per_proc_batch_size: int = _limited(32, at_least=1)

    reference: str | None = None
    samples: str | None = None
    features: Component = field(default_factory=lambda: {"type": "pixels"})


def build_section(schema: type[Config], raw: Any, path: str = "") -> Config:
    """A plain mapping as an instance of `schema`, types and ranges checked.

    Raises:
        ConfigError: an unknown or missing key, a wrong type, a value out of range.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(path or "config", f"wanted a section with keys, got {raw!r}")
    check_keys(schema, raw, path)
    hints, values = get_type_hints(schema), {}
    for entry in fields(cast(Any, schema)):
        key = join(path, entry.name)
        if entry.name in raw:
            values[entry.name] = _checked(raw[entry.name], hints[entry.name], key, entry.metadata)
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise ConfigError(key, f"missing; wanted {describe_type(hints[entry.name])}")
    return schema(**values)


def check_keys(schema: type, raw: Mapping[Any, Any], path: str = "") -> None:
    """Unknown keys of `raw` and of the typed sections below it raise, with the nearest known key."""
    hints = get_type_hints(schema)
    for name, value in raw.items():
        if name not in hints:
            message = f"unknown key{_nearest(str(name), hints, path)}; known here: {', '.join(hints)}"
            raise ConfigError(join(path, str(name)), message)
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, Mapping):
            check_keys(cast(type, hints[name]), value, join(path, name))


def key_paths(schema: type = ExperimentConfig, path: str = "") -> dict[str, Any]:
    """Every dotted key with its type, sections before their keys."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(schema).items():
        found[join(path, name)] = hint
        if dataclasses.is_dataclass(hint):
            found.update(key_paths(cast(type, hint), join(path, name)))
    return found


def join(path: str, name: str) -> str:
    """'a.b' of 'a' and 'b'; 'b' below the top."""
    return f"{path}.{name}" if path else name


def describe_type(hint: Any) -> str:
    """A type in the words of a YAML user: 'int', 'one of fp32, bf16', 'list of int', 'str or null'."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else describe_type(part) for part in arguments)
    if origin is list:
        return f"list of {describe_type(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)} {describe_type(arguments[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a section with keys"
    return str(hint.__name__)


def _nearest(name: str, known: Iterable[str], path: str) -> str:
    """'; did you mean X?': a similar key here, else the same key in another section, else nothing."""
    close = [join(path, key) for key in difflib.get_close_matches(name, list(known), n=1)]
    close += [key for key in key_paths() if key.rpartition(".")[2] == name]
    return f"; did you mean {close[0]!r}?" if close else ""


def _checked(value: Any, hint: Any, key: str, limits: Mapping[str, float]) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build_section(cast(type, hint), value, key)
    if origin in (Union, types.UnionType):
        inner = next(part for part in arguments if part is not type(None))
        return None if value is None else _checked(value, inner, key, limits)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(key, f"wanted {describe_type(hint)}, got {value!r}")
        return value
    if origin is dict:
        return _component(value, key)
    if origin in (list, tuple):
        return _sequence(value, hint, key, limits)
    return _scalar(value, hint, key, limits)


def _component(value: Any, key: str) -> Component:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(key, f"wanted a name or a section with `type`, got {value!r}")
    composed = key == "diffusion.policy" and {"density", "weighting"} <= set(value)
    if not composed and not isinstance(value.get("type"), str):
        also = " (or density and weighting)" if key == "diffusion.policy" else ""
        raise ConfigError(key, f"wanted a `type`{also}, got keys {sorted(value)}")
    return dict(value)


def _sequence(value: Any, hint: Any, key: str, limits: Mapping[str, float]) -> Any:
    arguments = get_args(hint)
    fixed = get_origin(hint) is tuple
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or (fixed and len(value) != len(arguments)):
        raise ConfigError(key, f"wanted {describe_type(hint)}, got {value!r}")
    items = [_scalar(item, arguments[0], f"{key}[{i}]", limits) for i, item in enumerate(value)]
    return tuple(items) if fixed else items


def _scalar(value: Any, hint: type, key: str, limits: Mapping[str, float]) -> Any:
    # bool is an int to Python: `batch_size: true` would otherwise mean 1.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int and is_number and float(value).is_integer():
        value = int(value)  # max_training_steps=1e5 arrives as a float
    elif hint is float and is_number and math.isfinite(value):
        value = float(value)
    elif hint not in (bool, str) or not isinstance(value, hint):
        raise ConfigError(key, f"wanted {describe_type(hint)}, got {value!r}")
    for name, limit in limits.items():
        symbol, holds = _LIMITS[name]
        if not holds(value, limit):
            raise ConfigError(key, f"wanted {describe_type(hint)} {symbol} {limit:g}, got {value!r}")
    return value


def check_phase(config: ExperimentConfig, phase: str) -> None:
    """What the keys must say together in this phase.

    Raises:
        ConfigError: a key that the phase needs is missing, two keys contradict, an option has no effect.
    """
    _check_agreement(config)
    if phase == "train":
        _check_training(config)
    if phase in ("inference", "sample") or (phase == "train" and config.sample_every):
        _check_sampler(config)
        _check_classes(config)
        if phase != "inference" and config.num_classes and not config.sample_classes:
            raise ConfigError("sample_classes", "wanted at least one class for the grid, got none")
    if phase == "test" and config.ckpt_path is not None:
        raise ConfigError(
            "ckpt_path", "has no effect in test, which compares images; wanted null, or samples=NPZ"
        )
    if phase == "train" and config.sample_every and config.diffusion.timestep_respacing:
        raise ConfigError("sample_every", "a respaced training process draws no grids; wanted 0")


def _check_training(config: ExperimentConfig) -> None:
    """Keys of the training loop."""
    if config.max_training_steps < 1:
        raise ConfigError("max_training_steps", f"train wanted int >= 1, got {config.max_training_steps}")
    if config.data.prefetch_factor is not None and config.data.num_workers == 0:
        raise ConfigError("data.prefetch_factor", "has no effect without data.num_workers; wanted null")
    options = config.optimizer
    if options.min_lr and options.schedule == "constant":
        raise ConfigError("optimizer.min_lr", "has no effect with schedule constant; wanted 0")
    if options.min_lr > options.lr:
        raise ConfigError("optimizer.min_lr", f"wanted at most lr = {options.lr:g}, got {options.min_lr:g}")
    if options.schedule == "cosine" and options.warmup_steps >= config.max_training_steps:
        limit = f"wanted less than max_training_steps = {config.max_training_steps} with schedule cosine"
        raise ConfigError("optimizer.warmup_steps", f"{limit}, got {options.warmup_steps}")


def _check_agreement(config: ExperimentConfig) -> None:
    """Keys that components repeat from the top must say the same."""
    pairs = (
        ("model.num_classes", config.model, config.num_classes),
        ("model.learn_sigma", config.model, config.diffusion.learn_sigma),
        ("data.dataset.image_size", config.data.dataset, config.image_size),
    )
    for key, section, wanted in pairs:
        name = key.rpartition(".")[2]
        if name in section and section[name] != wanted:
            top = "diffusion.learn_sigma" if name == "learn_sigma" else name
            raise ConfigError(key, f"wanted the value of {top}, {wanted!r}, got {section[name]!r}")


def _check_sampler(config: ExperimentConfig) -> None:
    sampler = config.sampler
    if sampler.eta and sampler.type != "ddim":
        raise ConfigError("sampler.eta", f"has no effect with {sampler.type}; wanted 0, got {sampler.eta}")
    # ddpm and ddim visit both ends of the chain; DPM-Solver takes the clean end as given.
    steps = config.diffusion.diffusion_steps
    least, most = (1, steps - 1) if sampler.type == "dpm_solver" else (2, steps)
    if not least <= sampler.num_steps <= most:
        limit = f"{sampler.type} wanted int in [{least}, {most}] of diffusion.diffusion_steps = {steps}"
        raise ConfigError("sampler.num_steps", f"{limit}, got {sampler.num_steps}")
    if sampler.guidance_channels is not None and config.guidance_scale == 1:
        raise ConfigError("sampler.guidance_channels", "has no effect with guidance_scale 1; wanted null")


def _check_classes(config: ExperimentConfig) -> None:
    if config.num_classes == 0 and config.guidance_scale != 1:
        scale = config.guidance_scale
        raise ConfigError("guidance_scale", f"needs classes, but num_classes is 0; wanted 1, got {scale}")
    for label in config.sample_classes:
        if not 0 <= label < config.num_classes:
            known = f"in [0, {config.num_classes})" if config.num_classes else "an empty list without classes"
            raise ConfigError("sample_classes", f"wanted {known}, got {label}")
