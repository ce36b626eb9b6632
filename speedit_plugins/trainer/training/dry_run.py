"""What --dry-run prints: parameters, tokens, memory and data of a config."""

import dataclasses
import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from speedit_plugins.registry import DATASETS, ENCODERS, FEATURES, TEXT_ENCODERS, check
from speedit_plugins.trainer import build
from speedit_plugins.trainer.accelerations.alignment import PROJECTOR
from speedit_plugins.trainer.accelerations.build import build_accelerations
from speedit_plugins.trainer.accelerations.objective import Acceleration, asked_of
from speedit_plugins.trainer.accelerations.summary import in_use
from speedit_plugins.trainer.accelerations.teachers import EMBEDDED, unread_teacher
from speedit_plugins.trainer.config.optimizers import OPTIMIZER_FACTS
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.yaml_text import one_line
from speedit_plugins.trainer.data.summary import data_lines
from speedit_plugins.trainer.models.interface import example_inputs
from speedit_plugins.trainer.models.training_only import CHILD, layers_of
from speedit_plugins.trainer.parallel.optimizers import check_optimizer
from speedit_plugins.trainer.starting_weights import start_from
from speedit_plugins.trainer.training.data_centre import is_centred_by_data
from speedit_plugins.trainer.training.sequence import tokens_line
from speedit_plugins.trainer.training.validation import of_validation, training_part


def describe(config: ExperimentConfig) -> str:
    """Parameters, tokens per sample, training memory and data of a config, without allocating the model.

    Raises:
        ValueError: a name is unknown, or the model cannot do what the config asks for.
    """
    check(ENCODERS, config.encoder, allow_download=False)
    check(FEATURES, config.features, images=None, labels=None)
    if config.text_encoder is not None:
        check(TEXT_ENCODERS, config.text_encoder, allow_download=False)
    build.build_masks(config)
    section, given = build.dataset_options(config, augmented=True)
    check(DATASETS, section, **given)
    if config.data.validation is not None:
        section, given = build.dataset_options(of_validation(config), augmented=False)
        check(DATASETS, section, **given)
    with torch.device("meta"):
        model = build.build_model(config)
        start_from(model, None, config)
    process = build.build_process(config, respaced=True)
    with torch.device("meta"):
        accelerations = build_accelerations(config, model, process, unread_teacher(config))
    batch_size = config.data.batch_size
    num_parameters, own = _sizes(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    check_optimizer(config)
    state, what = _training_state(config, num_parameters + own, trained, accelerations)
    activations = _gib(saved_bytes(model, config, accelerations))
    if is_centred_by_data(config):
        policy = f"{one_line(config.diffusion.policy)}, centred by the data when training starts"
    else:
        policy = str(build.build_timestep_policy(config, process))
    return "\n".join(
        [
            f"parameters         {num_parameters:,}",
            *([f"training only      {_training_only(model, config, own)}"] if own else []),
            f"tokens per sample  {model.num_tokens:,}",
            *([f"on each process    {shared}"] if (shared := tokens_line(model, config)) else []),
            f"training state     {_gib(state)} ({what} in fp32)",
            f"activations        about {activations} kept for backward, batch {batch_size} in one process",
            f"policy             {policy}",
            *([f"accelerations      {', '.join(used)}"] if (used := in_use(config)) else []),
            *(f"{name:<19}{text}" for name, text in _data(config)),
        ]
    )


def _sizes(model: nn.Module) -> tuple[int, int]:
    """Number of parameters that samples use, and of those that only the training has."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    own = sum(size for name, size in sizes.items() if name.startswith(f"{CHILD}."))
    return sum(sizes.values()) - own, own


def _training_only(model: nn.Module, config: ExperimentConfig, count: int) -> str:
    if config.alignment.type != "REPA" or config.alignment.teacher == EMBEDDED:
        return f"{count:,} parameters"
    # The width of the features is in the teacher's files: it was taken for 1.
    last = cast(nn.Linear, cast(nn.Sequential, layers_of(model)[PROJECTOR])[-1])
    row = last.in_features + 1
    return f"{count - row:,} parameters, and {row:,} for each feature of the teacher, which is not read"


def _data(config: ExperimentConfig) -> list[tuple[str, str]]:
    """What the dataset holds, or why it cannot be used."""
    section = config.data.dataset
    if "verify" in inspect.signature(DATASETS.module_dict[section["type"]]).parameters:
        # Only a training reads all of a cache to verify it.
        data = dataclasses.replace(config.data, dataset={**section, "verify": False})
        config = dataclasses.replace(config, data=data)
    try:
        dataset = training_part(config, build.build_dataset(config))
    except (ValueError, OSError, ImportError) as error:
        return [("data", f"cannot be used: {' '.join(str(error).split())}")]
    return data_lines(dataset, **build.summary_options(config))


def saved_bytes(
    model: nn.Module, config: ExperimentConfig, accelerations: Sequence[Acceleration] = ()
) -> int:
    """Bytes that autograd keeps between forward and backward of one batch, counted on the meta device.

    Under bf16 and fp16 the model counts as cast to that precision. Autocast keeps the norms in float32.

    Args:
        model: on the meta device. It is changed.
        config: gives batch size and precision.
        accelerations: of the training; the passes and layers that they add count too.
    """
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    model = model.to(dtype).train()
    storages: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Views share a storage. While the tensor is held, no other storage gets its address.
        storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    inputs = example_inputs(model, config.data.batch_size, dtype=dtype)
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = model(*inputs, **asked_of(accelerations))
        hidden = found[1] if isinstance(found, tuple) else None
        for each in accelerations:
            each.rehearse(partial(model, *inputs), inputs[0], hidden)
    kept = {key: tensor for key, tensor in storages.items() if key not in parameters}
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _training_state(
    config: ExperimentConfig, num_parameters: int, trained: int, accelerations: Sequence[Acceleration]
) -> tuple[int, str]:
    """Bytes that a training holds between steps, in one process, and what they are."""
    facts = OPTIMIZER_FACTS.get(config.optimizer.type)
    num_averages = {"none": 0, "power": len(config.ema.sigma_rel)}.get(config.ema.type, 1)
    # Weights, gradients and averages take 4 bytes each.
    state = 4 * (num_parameters + trained * (1 + num_averages))
    name = config.optimizer.type if facts is not None else f"without the state of {config.optimizer.type}"
    averages = {0: "", 1: ", EMA"}.get(num_averages, f", {num_averages} EMAs")
    state += 0 if facts is None else int(facts.state_bytes * trained)
    own = _num_bytes([each.state_dict() for each in accelerations])
    teacher = f", {config.alignment.type}'s teacher" if own else ""
    return state + own, f"weights, gradients, {name}{averages}{teacher}"


def _num_bytes(states: Sequence[dict[str, Any]]) -> int:
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
