"""The keys of an experiment: name, type, default and range of each, and below it what it means.

The documentation is built from this file: the text below a key is its entry there. Nothing here needs torch,
so that a wrong config fails before it is imported.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from speedit_plugins.policies.recommended import RECOMMENDED, recommended

PHASES = ("train", "inference", "sample", "test")

# A section that a registry builds: `type` and free keys, checked by its builder's own signature.
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
    "zero_terminal_snr",
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


def _limited(default: Any = dataclasses.MISSING, **limits: float) -> Any:
    """A field with a range, of each item in a sequence: `at_least`, `at_most`, `above`, `below`."""
    return field(default=default, metadata=limits)


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
    diffusion_steps: int = _limited(1000, at_least=2)
    """Timesteps T before respacing; the linear schedule needs at least 20. For a flow it is the number of
    rows of the policy's tables."""
    prediction_type: Literal["epsilon", "x0", "v", "flow"] | None = None
    """What the model predicts. null is epsilon. `RectifiedFlow` takes flow alone, the velocity, and null is
    flow there."""
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
    logit_std: float | None = _limited(None, above=0)
    """Standard deviation of the logit-normal law; null is 1."""
    shift: float = _limited(1.0, above=0)
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
    num_steps: int = _limited(250, at_least=1)
    """Steps from noise to sample: at most `diffusion.diffusion_steps`; for a flow any number."""
    eta: float = _limited(0.0, at_least=0, at_most=1)
    """Share of the noise that the ddim samplers add back at each step; refused for other samplers."""
    guidance_channels: int | None = _limited(None, at_least=1)
    """Guides only the first channels; 3 is the variant of DiT's own code. null guides all of them."""
    clip_sample: bool = False
    """Clamps x_0 to [-1, 1] at each step. It is meant for pixels."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and its schedule; lengths in optimizer steps."""

    type: Literal["AdamW"] = "AdamW"
    """The optimizer."""
    lr: float = _limited(1e-4, above=0)
    """Learning rate after the warm-up."""
    weight_decay: float = _limited(0.0, at_least=0)
    """Decoupled weight decay."""
    betas: tuple[float, float] = _limited((0.9, 0.999), at_least=0, below=1)
    """Decay rates of the two moments."""
    warmup_steps: int = _limited(0, at_least=0)
    """Steps of linear warm-up: step n has n / warmup_steps of the learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: `constant`, or half a cosine down to `min_lr` at `max_training_steps`."""
    min_lr: float = _limited(0.0, at_least=0)
    """Learning rate at the end of the cosine."""
    max_grad_norm: float = _limited(0.0, at_least=0)
    """Gradients are clipped to this norm; 0 clips nothing."""
    grad_accumulation: int = _limited(1, at_least=1)
    """Forward passes per optimizer step."""


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Moving average of the weights."""

    halflife_steps: float = _limited(6931.0, above=0)
    """Steps in which the share of a step's weights halves. 6931 is the decay of DiT, ln 0.5 / ln 0.9999."""
    ramp: bool = True
    """Limits the decay to (1 + n) / (10 + n) after n steps, so that the average forgets the start sooner."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    dataset: Component
    """`type` and parameters of a dataset. `image_size` and `num_frames` are filled in from the top."""
    batch_size: int = _limited(at_least=1)
    """Samples of one forward pass, over all processes: a multiple of their number."""
    num_workers: int = _limited(0, at_least=0)
    """Loading processes of each training process; 0 loads in the training process itself."""
    prefetch_factor: int | None = _limited(None, at_least=1)
    """Batches that each loading process keeps ready; null is 2. It needs `num_workers`."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What test measures, and the numbers in its metrics."""

    metrics: list[str] = field(default_factory=lambda: ["fid", "kid", "prdc"])
    """Any of fid, sfid, kid, prdc, inception_score and clip_score."""
    batch_size: int = _limited(16, at_least=1)
    """Images that are read and passed through the feature network at once."""
    reference_statistics: str | None = None
    """A safetensors file that keeps what the metrics need of the reference: written by the first test, read
    by later ones."""
    kid_subsets: int = _limited(100, at_least=1)
    """Subsets that KID averages over."""
    kid_subset_size: int = _limited(1000, at_least=2)
    """Samples in each subset of KID: at most the size of the smaller set."""
    score_splits: int = _limited(10, at_least=1)
    """Parts of the Inception Score."""
    precision_neighbors: int = _limited(3, at_least=1)
    """Neighbours k of precision and recall."""
    density_neighbors: int = _limited(5, at_least=1)
    """Neighbours k of density and coverage."""
    clip: str | None = None
    """The CLIPModel of clip_score: a folder or a hub name."""


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One experiment in one phase, checked. Built by `load_config` of `trainer.config.loading`."""

    experiment_dir: str
    """The folder where everything of this experiment is written."""
    experiment_name: str = ""
    """A label for your own use."""
    custom_imports: list[str] = field(default_factory=list)
    """Dotted names of your own modules, imported for what they register; see docs/extending.md.
    `--import NAME` adds one. mmengine's form, a section with `imports`, is read too."""
    seed: int = _limited(0, at_least=0)
    """Seed of weights, data order, timesteps and noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors are. `auto` is CUDA where there is a device."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast under ddp, a cast model under zero1, zero2 and gemini. Master weights, EMA and losses stay
    float32; fp16 scales the loss."""
    allow_tf32: bool = True
    """Allows TF32 products on CUDA."""
    allow_download: bool = False
    """Lets weights come from the hub. false takes local paths and the local cache only."""

    num_classes: int = _limited(1000, at_least=0)
    """Number of classes; 0 is unconditional, or conditioned on text."""
    image_size: int = _limited(256, at_least=1)
    """Side of an image in pixels."""
    model: Component
    """`type` and parameters of a model, with `path` to saved weights for PixArt, UNet and LatteT2V.
    `num_classes`, `learn_sigma`, `input_size` and `in_channels` are filled in where they are left out."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """The process that is trained, and its policy."""
    encoder: Component = field(default_factory=lambda: {"type": "Pixels"})
    """What turns images into what the model sees: `Pixels`, or `AutoencoderKL` with a path or hub name."""
    num_frames: int = _limited(0, at_least=0)
    """Frames of a video; 0 is images."""
    text_encoder: Component | None = None
    """What turns captions into features: the embedded `MiniLM`, or `TextEncoder` with a path or hub name of
    T5, CLIP or another encoder. null has no captions."""
    caption_dropout_prob: float = _limited(0.1, at_least=0, below=1)
    """How often training sees the empty caption in place of the sample's own; guidance needs it."""
    inpainting: Component | None = None
    """Trains DiT or UNet to fill holes, such as those of `RandomMasks`; null does not."""
    data: DataConfig
    """What is trained on."""

    plugin: Literal["ddp", "zero1", "zero2", "gemini"] = "ddp"
    """How several processes share the work; all but ddp need ColossalAI."""
    distributed_timeout_seconds: float = _limited(600.0, above=0)
    """A process that waits longer than this for another one ends the job."""
    compile: bool = False
    """Compiles the model by `torch.compile`; its first step takes a minute or more."""

    max_training_steps: int = _limited(0, at_least=0)
    """Optimizer steps of the training; required in train."""
    resume: str = "auto"
    """`auto` goes on from the newest checkpoint in `experiment_dir`, or starts; `never` starts and refuses to
    write over a run; a path goes on from that checkpoint."""
    pretrained: str | None = None
    """Weights that a new training starts from."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and its schedule."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Moving average of the weights. Samples are drawn with it."""
    ckpt_every: int = _limited(50_000, at_least=1)
    """Steps between checkpoints."""
    keep_last: int = _limited(3, at_least=1)
    """Newest checkpoints that are kept."""
    keep_every: int = _limited(0, at_least=0)
    """Checkpoints at multiples of this step are kept too; 0 keeps none."""
    max_skipped_steps: int = _limited(10, at_least=1)
    """This many steps in a row with a loss or gradient that is not finite end the run."""
    log_every: int = _limited(100, at_least=1)
    """Steps between log lines."""
    sample_every: int = _limited(0, at_least=0)
    """Steps between sample grids in training; 0 draws none."""
    profile_every: int = _limited(0, at_least=0)
    """Steps between measurements of loss and gradient norm per timestep, taken at log lines; 0 takes none."""
    enable_tensorboard_log: bool = True
    """Writes TensorBoard files. `metrics.jsonl` is always written."""
    enable_wandb_log: bool = False
    """Logs to Weights & Biases: needs the extra `wandb` and WANDB_API_KEY, or WANDB_MODE offline or disabled.
    A resumed run goes on in the same W&B run."""
    wandb_project: str = "speedit"
    """Project of the W&B run."""

    ckpt_path: str | None = None
    """The checkpoint that inference and sample draw with; null is the newest in `experiment_dir`."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How samples are drawn."""
    guidance_scale: float = _limited(1.0, at_least=0)
    """Scale of classifier-free guidance; 1 is off."""
    sample_classes: list[int] = field(default_factory=list)
    """The columns of a grid. Needed in sample, and for `sample_every`, where there are classes."""
    sample_prompts: list[str] = field(default_factory=list)
    """The columns of a grid where there is text."""
    prompts_file: str | None = None
    """A text file with a prompt a line, in place of `sample_prompts`. inference takes the prompts in turn."""
    inpaint_image: str | None = None
    """The image in which sample fills a hole."""
    inpaint_mask: str | None = None
    """The hole: an image of the same size that is white where it is to be filled."""
    samples_per_class: int = _limited(1, at_least=1)
    """The rows of a grid. Without classes, the images of the grid, in rows of 8."""
    frames_per_second: float = _limited(8.0, above=0, at_most=50)
    """Speed of the videos that are written; a GIF plays no faster than 50."""
    num_samples: int = _limited(50_000, at_least=1)
    """Images or videos that inference writes."""
    per_proc_batch_size: int = _limited(32, at_least=1)
    """Samples that are drawn at once, in grids too."""

    reference: str | None = None
    """npz or folder that test compares with; null is `data.dataset`."""
    samples: str | None = None
    """npz or folder that test judges; null is what inference wrote in `experiment_dir`."""
    features: Component = field(default_factory=lambda: {"type": "pixels"})
    """`type` and parameters of the feature space of the metrics."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What test measures."""


def settled(config: ExperimentConfig) -> ExperimentConfig:
    """The config with the process's own choice for each None that means it, and ~ as the home folder."""
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
    predicted = diffusion.prediction_type or ("flow" if is_flow else "epsilon")
    policy = diffusion.policy
    if policy.get("type") == RECOMMENDED:
        policy = {**policy, "type": recommended(predicted)}
    return dataclasses.replace(
        diffusion,
        policy=policy,
        prediction_type=predicted,
        learn_sigma=not is_flow if learn_sigma is None else learn_sigma,
        noise_schedule=diffusion.noise_schedule or (None if is_flow else "linear"),
    )
