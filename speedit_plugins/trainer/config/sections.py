"""The sections of an experiment's config: name, type, default and range of each key, and what it means.

The documentation is built from this file and `schema.py`, as `schema.py` says. Standard library only.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

# Metrics of the phase test that a training does not measure.
ONLY_IN_TEST = ("clip_score", "psnr", "ssim", "hole_error")
# The metric that a key of `evaluation` belongs to.
METRIC_OF = {
    "kid_subsets": "kid",
    "kid_subset_size": "kid",
    "precision_neighbors": "prdc",
    "density_neighbors": "prdc",
    "score_splits": "inception_score",
    "clip": "clip_score",
}
# Source: `dynamic_thresholding_ratio` of diffusers' schedulers.
DYNAMIC_PERCENTILE = 0.995
# A section that a registry builds: `type` and free keys, checked by its builder's own signature.
Component = dict[str, Any]
# Marks a field that collects the keys of its section that have no field. No key has its name.
REST = "rest"
FLOW = "RectifiedFlow"
FLOW_PREDICTIONS = ("flow", "x0")
# Which keys of `diffusion` are arguments of which kind of process.
FLOW_KEYS = ("prediction_type", "base_density", "logit_mean", "logit_std", "shift")
GAUSSIAN_KEYS = (
    "prediction_type",
    "learn_sigma",
    "noise_schedule",
    "zero_terminal_snr",
    "timestep_respacing",
    "sigma_small",
    "rescale_learned_sigmas",
)


def key_of(field_name: str) -> str:
    """The key of a field. A word that Python keeps for itself is a field with `_` at its end.

    Example:
        >>> key_of("from_"), key_of("to")
        ('from', 'to')
    """
    return field_name.removesuffix("_")


def label(sigma_rel: float) -> str:
    """A length of a power average as file names and messages have it.

    Example:
        >>> label(0.1)
        '0.1'
    """
    return f"{sigma_rel:g}"


def limited(default: Any = dataclasses.MISSING, **limits: float) -> Any:
    """A field with a range, of each item in a sequence: `at_least`, `at_most`, `above`, `below`."""
    return field(default=default, metadata=limits)


def limited_list(default: list[float], **limits: float) -> Any:
    """A list with a range of each item, as `limited`."""
    return field(default_factory=lambda: list(default), metadata=limits)


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The process that is trained: arguments of a registered process, and the timestep policy.

    null is the process's own choice.
    """

    type: str = "SpeeDiffusion"
    """The process: `SpeeDiffusion`, a Gaussian process on a noise schedule, or `RectifiedFlow`, a straight
    path."""
    policy: Component = field(default_factory=lambda: {"type": "recommended"})
    """Which timesteps are drawn and how their losses are weighed: `type` and parameters of a named policy, or
    its parts `density` and `weighting`, with `draw` and `scope`. `recommended` is `auto` for a flow or a
    model of v, and `speedit` for any other. The `mean` of `auto` and of the `spectral` policies is measured
    before the training and saved with its config."""
    diffusion_steps: int = limited(1000, at_least=2)
    """Timesteps T before respacing; the linear schedule needs at least 20. For a flow it is the number of
    rows of the policy's tables."""
    prediction_type: Literal["epsilon", "x0", "v", "flow"] | None = None
    """What the model predicts. null is epsilon, and for a `RectifiedFlow` flow, the velocity. A flow also
    takes x0, and its loss is still the velocity's."""
    learn_sigma: bool | None = None
    """Whether the model predicts a variance too, trained by the variational term. null is true. A
    `RectifiedFlow` has none, and null is false there."""
    noise_schedule: str | None = None
    """`linear`, `scaled_linear` or `cosine`. null is linear; a flow has none."""
    zero_terminal_snr: bool = False
    """Rescales the noise schedule so that its last timestep is noise alone. It needs prediction_type v or x0.
    Sample with `ddpm`, `ddim` or `dpm_solver`: the `ddim_leading` samplers begin before that timestep."""
    timestep_respacing: str = ""
    """Trains on these timesteps only, such as `250` or `ddim50`. For sampling see `sampler.num_steps`."""
    sigma_small: bool = False
    """Takes the smaller of the two fixed variances."""
    rescale_learned_sigmas: bool = False
    """Scales the variational term as IDDPM does."""
    base_density: Literal["uniform", "logit_normal"] = "uniform"
    """The law of a flow's time. The policy multiplies it."""
    logit_mean: float | None = None
    """Mean of the logit-normal law; null is 0."""
    logit_std: float | None = limited(None, above=0)
    """Standard deviation of the logit-normal law; null is 1."""
    shift: float = limited(1.0, above=0)
    """Resolution shift of a flow's time, in training and in sampling. SD3 takes 3 at 1024 x 1024."""

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
    """`ddpm`, `ddim` or `dpm_solver`; `ddim_leading` visits the timesteps of diffusers' pipelines,
    `ddim_leading_1` those of Stable Diffusion's. A flow takes `euler` or `heun`. null is ddpm, or euler."""
    num_steps: int = limited(250, at_least=1)
    """Steps from noise to sample: at most `diffusion.diffusion_steps`; for a flow any number."""
    eta: float = limited(0.0, at_least=0, at_most=1)
    """Share of the noise that the ddim samplers add back at each step; refused for other samplers."""
    guidance_channels: int | None = limited(None, at_least=1)
    """Guides only the first channels; 3 is the variant of DiT's own code. null guides all of them."""
    guidance_schedule: Literal["constant", "power_cosine", "interval"] = "constant"
    """How guidance changes in the course of a sample. `power_cosine`, MDT's, goes from none at noise alone to
    `guidance_scale` at clean data; `interval` guides at the times of `guidance_interval` alone, and saves the
    other model calls without a condition."""
    guidance_power: float | None = limited(None, above=0)
    """Exponent of `power_cosine`: the larger, the later guidance sets in. null is 4, as in MDT's code."""
    guidance_interval: list[float] = limited_list([], at_least=0, at_most=1)
    """First and last time of `interval`, 0 clean and 1 noise: t of a flow, or the timestep divided by
    `diffusion.diffusion_steps`."""
    clip_sample: bool = False
    """Clamps x_0 to [-1, 1] at each step. It is meant for pixels."""
    thresholding: Literal["static", "dynamic"] | None = None
    """How x_0 is kept in [-1, 1] at each step, for pixels. `static` is `clip_sample`. `dynamic`, Imagen's
    (arXiv:2205.11487), scales each sample down by a percentile of its absolute values where that is above 1,
    for large guidance scales. null leaves it to `clip_sample`."""
    dynamic_percentile: float | None = limited(None, above=0, at_most=1)
    """The percentile of `dynamic`, as a share; null is 0.995, as in diffusers."""
    augmentation: float = limited(0.0, at_least=0, at_most=1)
    """Level of the noise on the low-resolution input of a super-resolution model, at most
    `super_resolution.augmentation`. 0 is right for inputs that are data; more repairs those that a stage of a
    cascade has drawn."""

    @property
    def is_clamped(self) -> bool:
        """Whether x_0 is clamped to [-1, 1]."""
        return self.clip_sample or self.thresholding == "static"

    @property
    def percentile(self) -> float | None:
        """The percentile of dynamic thresholding; None without it."""
        if self.thresholding != "dynamic":
            return None
        return DYNAMIC_PERCENTILE if self.dynamic_percentile is None else self.dynamic_percentile


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and its schedule; lengths in optimizer steps. Other keys are parameters of the optimizer."""

    type: str = "AdamW"
    """The optimizer: `AdamW`, `AdamW8bit`, `Adafactor`, `Prodigy`, `AdamWScheduleFree`, `Muon`, or one of
    your own; see docs/training.md. Another type drops `lr`, `min_lr` and the parameters of the old one."""
    lr: float | None = limited(None, above=0)
    """Learning rate after the warm-up. null is the optimizer's own: 1e-4 for AdamW."""
    weight_decay: float | None = limited(None, at_least=0)
    """Decoupled weight decay; null is the optimizer's own, 0."""
    betas: tuple[float, float] | None = limited(None, at_least=0, below=1)
    """Decay rates of the two moments; null is the optimizer's own, [0.9, 0.999]."""
    warmup_steps: int = limited(0, at_least=0)
    """Steps of linear warm-up: step n has n / warmup_steps of the learning rate."""
    schedule: Literal["constant", "linear", "polynomial", "cosine", "warmup_stable_decay"] = "constant"
    """After the warm-up: `constant`, or down to `min_lr` at `max_training_steps` along a line, a power, or
    half a cosine. `warmup_stable_decay` is constant up to the last `decay_steps`."""
    min_lr: float = limited(0.0, at_least=0)
    """Learning rate at the end of the schedule."""
    power: float | None = limited(None, above=0)
    """Exponent of `polynomial`, required there: 1 is a line, 2 falls faster at first."""
    decay_steps: int | None = limited(None, at_least=1)
    """Steps at the end in which `warmup_stable_decay` falls; it needs them."""
    decay_shape: Literal["linear", "cosine", "sqrt"] | None = None
    """How `warmup_stable_decay` falls; null is linear. `sqrt` is 1 - sqrt(share done)."""
    max_grad_norm: float = limited(0.0, at_least=0)
    """Gradients are clipped to this norm; 0 clips nothing."""
    grad_accumulation: int = limited(1, at_least=1)
    """Forward passes per optimizer step."""
    parameters: dict[str, Any] = field(default_factory=dict, metadata={REST: True})


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Moving average of the weights."""

    type: Literal["halflife", "power", "none"] = "halflife"
    """`halflife` forgets at a fixed rate, `power` over a fixed share of the training (EDM2), `none` keeps no
    average: samples are drawn with the weights themselves."""
    halflife_steps: float = limited(6931.0, above=0)
    """Steps in which the share of a step's weights halves. 6931 is the decay of DiT, ln 0.5 / ln 0.9999."""
    ramp: bool = True
    """Limits the decay to (1 + n) / (10 + n) after n steps, so that the average forgets the start sooner."""
    sigma_rel: list[float] = limited_list([0.05, 0.1], above=0, below=0.288)
    """Lengths of `power` averages: standard deviation of the steps in one, as a share of the training so far.
    Samples are drawn with the first."""
    snapshot_every: int = limited(0, at_least=0)
    """Steps between snapshots of `power` averages in `snapshots/`, from which tools/posthoc_ema.py makes
    averages of other lengths; 0 keeps none."""


@dataclass(frozen=True, kw_only=True)
class SuperResolutionConfig:
    """Trains the model to make samples of their low-resolution versions, as a stage of a cascade."""

    factor: int = limited(0, at_least=0)
    """How many times a side of the low-resolution sample is smaller; 0 is no super-resolution."""
    augmentation: float = limited(0.2, at_least=0, at_most=1)
    """Largest level of the noise that training puts on the low-resolution input, 0 none and 1 noise alone:
    each sample's is drawn uniformly up to it, and the model is told it. It keeps a cascade from handing on
    the errors of the stage before."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on frozen weights, those of `pretrained` or `model.path`. Needs the package peft."""

    rank: int = limited(0, at_least=0)
    """Width of each adapter; 0 trains all weights, without adapters."""
    alpha: float | None = limited(None, above=0)
    """The adapters are scaled by alpha / rank; null is the rank."""
    targets: list[str] = field(default_factory=list)
    """Ends of the names of the layers that get adapters. None given takes the projections of the attentions:
    `to_q`, `to_k`, `to_v` and `to_out.0` in networks of diffusers, `attn.qkv` and `attn.proj` in DiT and
    Latte."""


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """How `plugin: fsdp2` shards."""

    replicate: int = limited(1, at_least=1)
    """Groups of processes, each with a whole sharded model: 1 shards over all processes. Take the number of
    machines where the network between them is slow."""
    cpu_offload: bool = False
    """Keeps weights, gradients and moments in the memory of the CPU, and steps there."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    dataset: Component
    """`type` and parameters of a dataset. `image_size`, or `num_frames`, `voxel_size` and `num_points`, are
    filled in from the top."""
    validation: Component | None = None
    """`type` and parameters of the dataset that `validate_every` measures the loss on. null is the samples of
    `held_out_samples`."""
    held_out_samples: int = limited(0, at_least=0)
    """Samples of `dataset` that are not trained on, chosen by the seed; `validate_every` measures the loss on
    them."""
    batch_size: int = limited(at_least=1)
    """Samples of one forward pass, over all processes: a multiple of their number, divided by
    `sequence_parallel`."""
    num_workers: int = limited(0, at_least=0)
    """Loading processes of each training process; 0 loads in the training process itself."""
    prefetch_factor: int | None = limited(None, at_least=1)
    """Batches that each loading process keeps ready; null is 2. It needs `num_workers`."""
    accept_changed: bool = False
    """Go on from a checkpoint though files were added, removed or renamed: at the start of the next epoch."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What test measures, and the numbers in its metrics."""

    metrics: list[str] = field(default_factory=lambda: ["fid", "kid", "prdc"])
    """Any of fid, sfid, kid, prdc, inception_score and clip_score; with inpainting also psnr, ssim and
    hole_error, and with super-resolution psnr and ssim. Shapes take chamfer and earth_mover, of which each
    gives MMD, coverage and 1-NN accuracy, and frechet; by default chamfer."""
    batch_size: int = limited(16, at_least=1)
    """Images that are read and passed through the feature network at once."""
    reference_statistics: str | None = None
    """A safetensors file that keeps what the metrics need of the reference: written by the first test, read
    by later ones."""
    kid_subsets: int = limited(100, at_least=1)
    """Subsets that KID averages over."""
    kid_subset_size: int = limited(1000, at_least=2)
    """Samples in each subset of KID: at most the size of the smaller set."""
    score_splits: int = limited(10, at_least=1)
    """Parts of the Inception Score."""
    precision_neighbors: int = limited(3, at_least=1)
    """Neighbours k of precision and recall."""
    density_neighbors: int = limited(5, at_least=1)
    """Neighbours k of density and coverage."""
    clip: str | None = None
    """The CLIPModel of clip_score: a folder or a hub name."""
