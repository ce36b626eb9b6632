"""What --dry-run prints: parameters, tokens, memory and data of a config."""

import dataclasses
import inspect

import torch
from torch import Tensor, nn

from speedit_plugins.registry import DATASETS, ENCODERS, FEATURES, MASKS, TEXT_ENCODERS, check
from speedit_plugins.trainer import build
from speedit_plugins.trainer.config.optimizers import OPTIMIZER_FACTS
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.summary import data_lines
from speedit_plugins.trainer.models.interface import example_inputs
from speedit_plugins.trainer.parallel.optimizers import check_optimizer
from speedit_plugins.trainer.starting_weights import start_from
from speedit_plugins.trainer.training.data_centre import is_centred_by_data
from speedit_plugins.trainer.training.validation import of_validation, training_part


def describe(config: ExperimentConfig) -> str:
    """Parameters, tokens per sample, training memory and data of a config, without allocating the model."""
    check(ENCODERS, config.encoder, allow_download=False)
    check(FEATURES, config.features, images=None, labels=None)
    for registry, section in ((TEXT_ENCODERS, config.text_encoder), (MASKS, config.inpainting)):
        if section is not None:
            check(registry, section, allow_download=False)
    section, given = build.dataset_options(config, augmented=True)
    check(DATASETS, section, **given)
    if config.data.validation is not None:
        section, given = build.dataset_options(of_validation(config), augmented=False)
        check(DATASETS, section, **given)
    with torch.device("meta"):
        model = build.build_model(config)
        start_from(model, None, config)
    batch_size = config.data.batch_size
    num_parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    check_optimizer(config)
    state, what = _training_state(config, num_parameters, trained)
    activations = _gib(saved_bytes(model, config))
    if is_centred_by_data(config):
        policy = f"{config.diffusion.policy}, centred by the data when training starts"
    else:
        policy = str(build.build_timestep_policy(config, build.build_process(config, respaced=True)))
    return "\n".join(
        [
            f"parameters         {num_parameters:,}",
            f"tokens per sample  {model.num_tokens:,}",
            f"training state     {_gib(state)} ({what} in fp32)",
            f"activations        about {activations} kept for backward, batch {batch_size} in one process",
            f"policy             {policy}",
            *(f"{name:<19}{text}" for name, text in _data(config)),
        ]
    )


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


def saved_bytes(model: nn.Module, config: ExperimentConfig) -> int:
    """Bytes that autograd keeps between forward and backward of one batch, counted on the meta device.

    Under bf16 and fp16 the model counts as cast to that precision. Autocast keeps the norms in float32.
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
        model(*inputs)
    kept = {key: tensor for key, tensor in storages.items() if key not in parameters}
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _training_state(config: ExperimentConfig, num_parameters: int, trained: int) -> tuple[int, str]:
    """Bytes that a training holds between steps, in one process, and what they are."""
    facts = OPTIMIZER_FACTS.get(config.optimizer.type)
    num_averages = {"none": 0, "power": len(config.ema.sigma_rel)}.get(config.ema.type, 1)
    # Weights, gradients and averages take 4 bytes each.
    state = 4 * (num_parameters + trained * (1 + num_averages))
    name = config.optimizer.type if facts is not None else f"without the state of {config.optimizer.type}"
    averages = {0: "", 1: ", EMA"}.get(num_averages, f", {num_averages} EMAs")
    state += 0 if facts is None else int(facts.state_bytes * trained)
    return state, f"weights, gradients, {name}{averages}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
