"""From a checked config to objects, through the registries.

Dims: B batch, C channels.
"""

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from speedit_plugins.core.policy import TimestepPolicy
from speedit_plugins.data.loader import SampleSource
from speedit_plugins.diffusion.process import GaussianProcess
from speedit_plugins.engine.schema import ExperimentConfig
from speedit_plugins.registry import (
    DATASETS,
    ENCODERS,
    FEATURES,
    MODELS,
    PROCESSES,
    build,
    build_policy,
    check,
)


class Encoder(Protocol):
    """Between images (B, C, H, W) in [-1, 1] and what the model is trained on."""

    channels: int
    downsample: int

    def encode(
        self, images: Tensor, generators: list[torch.Generator] | torch.Generator | None = None
    ) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def fingerprint(self) -> str: ...


def build_device(config: ExperimentConfig) -> torch.device:
    """The device of the run; `auto` is CUDA where there is one.

    Raises:
        ValueError: CUDA is asked for and absent.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda needs a CUDA device, got none; wanted auto or cpu on this machine")
    is_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    return torch.device("cuda" if is_cuda else "cpu")


def build_process(config: ExperimentConfig, *, respaced: bool) -> GaussianProcess:
    """The diffusion process; a sampler wants it without the respacing that training may have."""
    options = config.diffusion.process_config()
    if not respaced:
        options["timestep_respacing"] = ""
    return cast(GaussianProcess, build(PROCESSES, options))


def build_timestep_policy(config: ExperimentConfig, process: GaussianProcess) -> TimestepPolicy:
    """The policy of `diffusion.policy` on the process's schedule."""
    return build_policy(config.diffusion.policy, process.schedule, process.prediction_type)


def build_encoder(config: ExperimentConfig, device: torch.device) -> Encoder:
    """The encoder with its weights, on the device."""
    return cast(Encoder, build(ENCODERS, config.encoder, allow_download=config.allow_download).to(device))


def build_dataset(config: ExperimentConfig, *, augmented: bool = True) -> SampleSource:
    """The dataset; a conditional model needs one with classes it knows.

    Args:
        augmented: False leaves out random flips: the data as they are.

    Raises:
        ValueError: the dataset's classes do not fit num_classes.
    """
    section, given = _dataset_options(config, augmented=augmented)
    dataset = build(DATASETS, section, **given)
    if config.num_classes and not 0 < dataset.num_classes <= config.num_classes:
        raise ValueError(
            f"the dataset has {dataset.num_classes} classes, got num_classes: {config.num_classes};"
            f" wanted {f'at least {dataset.num_classes}' if dataset.num_classes else 'data with classes'}"
        )
    return cast(SampleSource, dataset)


def build_model(config: ExperimentConfig, encoder: Encoder | None = None) -> nn.Module:
    """The model, freshly initialised; with an encoder its sizes are checked against what that gives.

    Raises:
        ValueError: the model's sizes are not known without the encoder, or do not fit it.
    """
    if encoder is None and config.encoder["type"] == "Pixels":
        encoder = build_encoder(config, torch.device("cpu"))
    sizes: dict[str, Any] = {}
    if encoder is not None:
        sizes = {"input_size": config.image_size // encoder.downsample, "in_channels": encoder.channels}
    for key, size in sizes.items():
        if config.model.get(key, size) != size:
            raise ValueError(
                f"model.{key} needs {size}: image_size {config.image_size} through the encoder; got"
                f" {config.model[key]}"
            )
    facts = {"num_classes": config.num_classes, "learn_sigma": config.diffusion.learn_sigma}
    return cast(nn.Module, build(MODELS, {**sizes, **facts, **config.model}))


def describe(config: ExperimentConfig) -> str:
    """Parameters, tokens per sample and training memory of a config, without allocating the model."""
    check(ENCODERS, config.encoder, allow_download=False)
    check(FEATURES, config.features, images=None, labels=None)
    section, given = _dataset_options(config, augmented=True)
    check(DATASETS, section, **given)
    with torch.device("meta"):
        model = build_model(config)
    batch_size = config.data.batch_size
    num_parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Weights, gradients, two AdamW moments and the EMA, 4 bytes each.
    state = 4 * (num_parameters + 4 * trained)
    activations = _gib(saved_bytes(model, config))
    policy = build_timestep_policy(config, build_process(config, respaced=True))
    return "\n".join(
        [
            f"parameters         {num_parameters:,}",
            f"tokens per sample  {model.num_tokens:,}",
            f"training state     {_gib(state)} (weights, gradients, AdamW, EMA in fp32)",
            f"activations        about {activations} kept for the backward pass, batch {batch_size}",
            f"policy             {policy}",
        ]
    )


def _dataset_options(config: ExperimentConfig, *, augmented: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dataset's section, and what the experiment says of it where the section does not."""
    section = dict(config.data.dataset)
    facts: dict[str, Any] = {"class_cond": config.num_classes > 0, "image_size": config.image_size}
    if not augmented:
        section.pop("random_flip", None)
        facts["random_flip"] = False
    return section, {key: value for key, value in facts.items() if key not in section}


def saved_bytes(model: nn.Module, config: ExperimentConfig) -> int:
    """Bytes that autograd keeps between forward and backward of one batch, counted on the meta device.

    Under bf16 and fp16 the whole model counts in it, which autocast does for all but the norms.
    """
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    model = model.to(dtype).train()
    B, size = config.data.batch_size, cast(int, model.input_size)
    storages: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Views share a storage; holding the tensor keeps its address from being given out again.
        storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    x = torch.zeros(B, cast(int, model.in_channels), size, size, device="meta", dtype=dtype)
    t = torch.zeros(B, dtype=torch.int64, device="meta")
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x, t, t if config.num_classes else None)
    kept = {key: tensor for key, tensor in storages.items() if key not in parameters}
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
