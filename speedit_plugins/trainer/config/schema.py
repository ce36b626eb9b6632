"""The keys of an experiment: name, type, default and range of each, and below it what it means.

The documentation is built from this file and `sections.py`: the text below a key is its entry there. Nothing
here needs torch, so that a wrong config fails before it is imported.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from speedit_plugins.policies.recommended import RECOMMENDED, recommended
from speedit_plugins.trainer.config.accelerations import (
    AlignmentConfig,
    ContrastiveConfig,
    MaskingConfig,
    RoutingConfig,
)
from speedit_plugins.trainer.config.optimizers import OPTIMIZER_FACTS
from speedit_plugins.trainer.config.sections import (
    Component,
    DataConfig,
    DiffusionConfig,
    EmaConfig,
    EvaluationConfig,
    LoraConfig,
    OptimizerConfig,
    SamplerConfig,
    ShardingConfig,
    SuperResolutionConfig,
    limited,
)

PHASES = ("train", "inference", "sample", "test")

# Keys of sections that a registry builds.
COMPONENTS = (
    "model",
    "diffusion.policy",
    "encoder",
    "text_encoder",
    "inpainting",
    "data.dataset",
    "data.validation",
    "features",
)
# Other sections with a `type`, whose keys are fields.
TYPED_SECTIONS = ("diffusion", "sampler", "optimizer", "ema", "alignment", "masking")
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
    "low_resolution",
)


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
    seed: int = limited(0, at_least=0)
    """Seed of weights, data order, timesteps and noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors are. `auto` is CUDA where there is a device."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast under ddp, a model in this type under the other plugins. Master weights, EMA and losses stay
    float32; fp16 scales the loss."""
    allow_tf32: bool = True
    """Allows TF32 products on CUDA."""
    allow_download: bool = False
    """Lets weights come from the hub. false takes local paths and the local cache only."""

    num_classes: int = limited(1000, at_least=0)
    """Number of classes; 0 is unconditional, or conditioned on text."""
    image_size: int = limited(256, at_least=1)
    """Side of an image in pixels."""
    model: Component
    """`type` and parameters of a model, with `path` to saved weights for PixArt, UNet and LatteT2V.
    `num_classes`, `learn_sigma`, `input_size` and `in_channels` are filled in where they are left out."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """The process that is trained, and its policy."""
    encoder: Component = field(default_factory=lambda: {"type": "Pixels"})
    """What turns images into what the model sees: `Pixels`, or `AutoencoderKL` with a path or hub name. For
    shapes it is `Voxels` or `Points`."""
    num_frames: int = limited(0, at_least=0)
    """Frames of a video; 0 is images."""
    voxel_size: int = limited(0, at_least=0)
    """Voxels on a side of the cube that a 3D model sees; 0 is images or videos. `image_size` has no effect
    beside it."""
    num_points: int = limited(0, at_least=0)
    """Points of a cloud, which the model averages in the cube of `voxel_size`; 0 trains on voxels."""
    text_encoder: Component | None = None
    """What turns captions into features: the embedded `MiniLM`, or `TextEncoder` with a path or hub name of
    T5, CLIP or another encoder. null has no captions."""
    caption_dropout_prob: float = limited(0.1, at_least=0, below=1)
    """How often training sees the empty caption in place of the sample's own; guidance needs it."""
    inpainting: Component | None = None
    """Trains a model to fill holes, of `RandomMasks` in space or of `FrameMasks` in time; null has none."""
    super_resolution: SuperResolutionConfig = field(default_factory=SuperResolutionConfig)
    """Trains DiT, Latte or UNet to make samples of their low-resolution versions; see
    docs/cascades.md."""
    data: DataConfig
    """What is trained on."""

    plugin: Literal["ddp", "zero1", "zero2", "gemini", "fsdp2"] = "ddp"
    """How several processes share the work; zero1, zero2 and gemini need ColossalAI."""
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    """How fsdp2 shards."""
    sequence_parallel: int = limited(1, at_least=1)
    """Consecutive processes that share samples, each with a part of their tokens: divides the number of
    processes and the model's heads."""
    distributed_timeout_seconds: float = limited(600.0, above=0)
    """A process that waits longer than this for another one ends the job."""
    compile: bool = False
    """Compiles the model by `torch.compile`; its first step takes a minute or more."""

    max_training_steps: int = limited(0, at_least=0)
    """Optimizer steps of the training; required in train."""
    resume: str = "auto"
    """`auto` goes on from the newest checkpoint in `experiment_dir`, or starts; `never` starts and refuses to
    write over a run; a path goes on from that checkpoint, or from the newest of that run's folder."""
    pretrained: str | None = None
    """Weights that a new training starts from: a file, a checkpoint, or a run's folder with its newest. With
    `lora` they are read again whenever its adapters are."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Trains low-rank adapters in place of all weights."""
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """Keeps predictions away from the targets of other samples."""
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    """Trains on a part of the tokens as well."""
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    """Lets a part of the tokens pass the middle blocks by in training."""
    noise_assignment: Literal["batch", "class"] | None = None
    """Which samples of a rank's batch exchange noise, so that each gets a near one (immiscible diffusion,
    arXiv:2406.12303): all of the `batch`, or those of a `class` among themselves. null leaves the noise."""
    uncertainty: bool = False
    """Divides each loss by a learned estimate of it at its noise level (EDM2, arXiv:2312.02696)."""
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    """Draws features inside the model to those of a teacher."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and its schedule."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Moving average of the weights. Samples are drawn with it, where one is kept."""
    ckpt_every: int = limited(50_000, at_least=1)
    """Steps between checkpoints."""
    keep_last: int = limited(3, at_least=1)
    """Newest checkpoints that are kept."""
    keep_every: int = limited(0, at_least=0)
    """Checkpoints at multiples of this step are kept too; 0 keeps none."""
    async_save: bool = False
    """Writes checkpoints while the training goes on, from copies in memory."""
    max_skipped_steps: int = limited(10, at_least=1)
    """This many steps in a row with a loss or gradient that is not finite end the run."""
    log_every: int = limited(100, at_least=1)
    """Steps between log lines."""
    sample_every: int = limited(0, at_least=0)
    """Steps between sample grids in training; 0 draws none."""
    validate_every: int = limited(0, at_least=0)
    """Steps between measurements of the loss on samples that are not trained on; 0 takes none. They come from
    `data.validation` or `data.held_out_samples`."""
    validate_samples: int = limited(500, at_least=1)
    """Samples of a validation, each at ten timesteps: at most this many of those that there are."""
    evaluate_every: int = limited(0, at_least=0)
    """Steps between evaluations in training. Each draws samples and measures `evaluation.metrics`; 0 makes
    none."""
    evaluate_samples: int = limited(1000, at_least=2)
    """Samples that an evaluation in training draws."""
    keep_best: Literal["val_loss", "fid", "kid"] | None = None
    """Keeps the checkpoint with the lowest value of this, besides those of `keep_last`; `ckpt_path: best`
    draws with it. A step with a new lowest value is saved. null keeps none."""
    profile_every: int = limited(0, at_least=0)
    """Steps between measurements of loss and gradient norm per timestep, taken at log lines; 0 takes none."""
    board_scalars: Literal["few", "all"] = "few"
    """Numbers that TensorBoard and W&B show: the few that most people watch, or everything in
    `metrics.jsonl`."""
    enable_tensorboard_log: bool = True
    """Writes TensorBoard files. `metrics.jsonl` is always written."""
    enable_wandb_log: bool = False
    """Logs to Weights & Biases: needs the extra `wandb` and WANDB_API_KEY, or WANDB_MODE offline or disabled.
    A resumed run goes on in the same W&B run."""
    wandb_project: str = "speedit"
    """Project of the W&B run."""

    ckpt_path: str | None = None
    """The checkpoint that inference and sample draw with, or a run's folder, whose newest is taken. null is
    the newest in `experiment_dir`; `best` is the one of `keep_best`."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How samples are drawn."""
    guidance_scale: float = limited(1.0, at_least=0)
    """Scale of classifier-free guidance; 1 is off."""
    sample_classes: list[int | str] = field(default_factory=list)
    """The columns of a grid, as numbers or names of classes: `[207, cat]`. Needed in sample, and for
    `sample_every`, where there are classes."""
    sample_prompts: list[str] = field(default_factory=list)
    """The columns of a grid where there is text."""
    prompts_file: str | None = None
    """A text file with a prompt a line, in place of `sample_prompts`. inference takes the prompts in turn."""
    inpaint_image: str | None = None
    """The image, video or solid in which sample fills a hole. null fills holes in samples of the dataset."""
    inpaint_mask: str | None = None
    """The hole: an image of the same size that is white where it is to be filled, for a video also a video,
    for a solid voxels that are 1 there."""
    low_resolution: str | None = None
    """npz or folder of low-resolution samples that a super-resolution model enlarges in sample and inference,
    such as those of another run's inference. null takes samples of the data and reduces them."""
    cascade: list[str] = field(default_factory=list)
    """Folders of the runs before this super-resolution run, in their order: the first draws from noise alone,
    and sample and inference go through all of them. Each draws with its newest checkpoint, and with sampler
    and guidance as in the config of its training."""
    score_stages: bool = False
    """Scores the stages of a cascade: inference keeps what each draws, and draws each super-resolution stage
    on inputs from the data as well; test scores the whole and each of these sets."""
    samples_per_class: int = limited(1, at_least=1)
    """The rows of a grid. Without classes, the images of the grid, in rows of 8. With inpainting, the samples
    of the dataset that are filled, and with super-resolution the low-resolution samples that are enlarged."""
    frames_per_second: float = limited(8.0, above=0, at_most=50)
    """Speed of the videos that are written; a GIF plays no faster than 50."""
    num_samples: int = limited(50_000, at_least=1)
    """Images or videos that inference writes. With inpainting, the samples of the dataset that it fills.
    A super-resolution model enlarges its low-resolution samples in turn."""
    per_proc_batch_size: int = limited(32, at_least=1)
    """Samples that are drawn at once, in grids too. Another number draws other samples: noise is that of a
    batch."""

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
    return dataclasses.replace(
        config,
        diffusion=diffusion,
        sampler=sampler,
        evaluation=evaluation,
        optimizer=_settled_optimizer(config.optimizer),
        cascade=[os.path.expanduser(path) for path in config.cascade],
        **paths,
    )


def _expanded(path: str | None) -> str | None:
    return None if path is None else os.path.expanduser(path)


def _settled_optimizer(options: OptimizerConfig) -> OptimizerConfig:
    facts = OPTIMIZER_FACTS.get(options.type)
    if facts is None:
        return options
    own = {"lr": facts.lr, **facts.parameters}
    unset: dict[str, Any] = {
        key: own.get(key) for key in ("lr", "weight_decay", "betas") if getattr(options, key) is None
    }
    return dataclasses.replace(options, **unset)


def settled_process(diffusion: DiffusionConfig) -> DiffusionConfig:
    """`settled`, of the section alone."""
    is_flow, learn_sigma = diffusion.is_flow, diffusion.learn_sigma
    predicted = diffusion.prediction_type or ("flow" if is_flow else "epsilon")
    policy = diffusion.policy
    if policy.get("type") == RECOMMENDED:
        # The loss of a flow is that of its velocity, whatever its network predicts.
        policy = {**policy, "type": recommended("flow" if is_flow else predicted)}
    return dataclasses.replace(
        diffusion,
        policy=policy,
        prediction_type=predicted,
        learn_sigma=not is_flow if learn_sigma is None else learn_sigma,
        noise_schedule=diffusion.noise_schedule or (None if is_flow else "linear"),
    )
