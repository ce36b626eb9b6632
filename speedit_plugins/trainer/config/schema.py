"""The keys of an experiment: names, types, defaults, ranges, and the checks that need no torch.

Standard library only, so that a wrong config fails at once. `docs/configs.md` explains each key.
"""

import dataclasses
import difflib
import math
import operator
import os
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

PHASES = ("train", "inference", "sample", "test")

# A section that a registry builds: `type` and free keys, which its builder's own signature checks.
Component = dict[str, Any]
COMPONENTS = (
    "model",
    "diffusion.policy",
    "encoder",
    "text_encoder",
    "inpainting",
    "data.dataset",
    "features",
)
FLOW = "RectifiedFlow"
# Which keys of `diffusion` are arguments of which kind of process.
FLOW_KEYS = ("base_density", "logit_mean", "logit_std", "shift")
GAUSSIAN_KEYS = (
    "prediction_type",
    "learn_sigma",
    "noise_schedule",
    "timestep_respacing",
    "sigma_small",
    "rescale_learned_sigmas",
)
# Keys of the top that hold a path; of a component its builder expands them.
PATHS = (
    "experiment_dir",
    "resume",
    "pretrained",
    "ckpt_path",
    "prompts_file",
    "inpaint_image",
    "inpaint_mask",
    "reference",
    "samples",
)
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
    """The process that is trained: arguments of a registered process, and the timestep policy.

    None is the process's own choice: `settled` puts it in.
    """

    type: str = "SpeeDiffusion"
    policy: Component = field(default_factory=lambda: {"type": "speedit"})
    diffusion_steps: int = _limited(1000, at_least=2)
    prediction_type: Literal["epsilon", "x0", "v", "flow"] | None = None
    learn_sigma: bool | None = None
    noise_schedule: str | None = None
    timestep_respacing: str = ""
    sigma_small: bool = False
    rescale_learned_sigmas: bool = False
    base_density: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float | None = None
    logit_std: float | None = _limited(None, above=0)
    shift: float = _limited(1.0, above=0)

    @property
    def is_flow(self) -> bool:
        """Whether it is a rectified flow, and not a Gaussian process on a noise schedule."""
        return self.type == FLOW

    def process_config(self) -> Component:
        """`type` and the process's arguments, without the policy: what `registry.build` takes."""
        own = ("type", "diffusion_steps", *(FLOW_KEYS if self.is_flow else GAUSSIAN_KEYS))
        return {key: getattr(self, key) for key in own if getattr(self, key) is not None}


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How samples are drawn in inference, sample and training grids."""

    type: Literal["ddpm", "ddim", "ddim_leading", "ddim_leading_1", "dpm_solver", "euler", "heun"] | None = (
        None
    )
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
class EvaluationConfig:
    """What test measures, and the numbers in its metrics."""

    metrics: list[str] = field(default_factory=lambda: ["fid", "kid", "prdc"])
    batch_size: int = _limited(16, at_least=1)
    reference_statistics: str | None = None
    kid_subsets: int = _limited(100, at_least=1)
    kid_subset_size: int = _limited(1000, at_least=2)
    score_splits: int = _limited(10, at_least=1)
    precision_neighbors: int = _limited(3, at_least=1)
    density_neighbors: int = _limited(5, at_least=1)
    clip: str | None = None


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
    num_frames: int = _limited(0, at_least=0)
    text_encoder: Component | None = None
    caption_dropout_prob: float = _limited(0.1, at_least=0, below=1)
    inpainting: Component | None = None
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
    profile_every: int = _limited(0, at_least=0)
    enable_tensorboard_log: bool = True
    enable_wandb_log: bool = False
    wandb_project: str = "speedit"

    ckpt_path: str | None = None
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guidance_scale: float = _limited(1.0, at_least=0)
    sample_classes: list[int] = field(default_factory=list)
    sample_prompts: list[str] = field(default_factory=list)
    prompts_file: str | None = None
    inpaint_image: str | None = None
    inpaint_mask: str | None = None
    samples_per_class: int = _limited(1, at_least=1)
    frames_per_second: float = _limited(8.0, above=0, at_most=50)
    num_samples: int = _limited(50_000, at_least=1)
    per_proc_batch_size: int = _limited(32, at_least=1)

    reference: str | None = None
    samples: str | None = None
    features: Component = field(default_factory=lambda: {"type": "pixels"})
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


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


def settled(config: ExperimentConfig) -> ExperimentConfig:
    """The config with the process's own choice for each None that stands for it, and ~ as the home folder."""
    diffusion = settled_process(config.diffusion)
    sampler = dataclasses.replace(
        config.sampler, type=config.sampler.type or ("euler" if diffusion.is_flow else "ddpm")
    )
    statistics, clip = config.evaluation.reference_statistics, config.evaluation.clip
    evaluation = dataclasses.replace(
        config.evaluation, reference_statistics=_expanded(statistics), clip=_expanded(clip)
    )
    paths: dict[str, Any] = {key: _expanded(getattr(config, key)) for key in PATHS}
    return dataclasses.replace(config, diffusion=diffusion, sampler=sampler, evaluation=evaluation, **paths)


def _expanded(path: str | None) -> str | None:
    return None if path is None else os.path.expanduser(path)


def settled_process(diffusion: DiffusionConfig) -> DiffusionConfig:
    """`settled`, of the section alone."""
    is_flow, learn_sigma = diffusion.is_flow, diffusion.learn_sigma
    return dataclasses.replace(
        diffusion,
        prediction_type=diffusion.prediction_type or ("flow" if is_flow else "epsilon"),
        learn_sigma=not is_flow if learn_sigma is None else learn_sigma,
        noise_schedule=diffusion.noise_schedule or (None if is_flow else "linear"),
    )


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
