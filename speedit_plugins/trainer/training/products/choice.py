"""Which products of a model's linear layers oneDNN computes: measured once, then kept by the run.

Dims: N rows, I features in, O features out.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.models.interface import example_inputs, without_storage
from speedit_plugins.trainer.models.layers.linear import LEAST_WORK, Linear, Products, has_onednn
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.terminal import say
from speedit_plugins.trainer.training.products.timing import fastest_products

Shape = tuple[int, int, int]
"""(N, I, O)."""


def choose_products(
    model: nn.Module,
    config: ExperimentConfig,
    runtime: Runtime,
    template: nn.Module | None = None,
    *,
    measure: Callable[..., Products] = fastest_products,
) -> None:
    """Gives every `Linear` of the model the faster products, the same on all ranks; collective.

    For a new run, before its first step. There is a choice in float32 on a CPU alone.

    Args:
        template: what computes as the model and has plain parameters, where a sharded model has none; see
            `Engine.template`. None is the model.
        measure: called with N, I and O, once for each different shape.
    """
    start = time.perf_counter()
    shapes: dict[str, Shape] = {}
    if runtime.device.type == "cpu" and config.precision == "fp32" and has_onednn():
        # As many tokens as a rank has: ranks that share samples have parts of them.
        shapes = layer_shapes(template or model, max(1, config.data.batch_size // runtime.world_size))
    fastest = {shape: measure(*shape) for shape in sorted(set(shapes.values()))}
    of_ranks = runtime.gather_objects({name: fastest[shape] for name, shape in shapes.items()})
    # A rank without oneDNN has measured nothing.
    _give(model, of_ranks[0] if all(of_ranks) else {})
    if shapes and runtime.is_main:
        seconds = time.perf_counter() - start
        say(f"linear layers: {describe(model)}, chosen as the fastest here in {seconds:.2f} s")


def layer_shapes(model: nn.Module, batch_size: int) -> dict[str, Shape]:
    """What the model's `Linear` layers see in a batch, by name; without layers too small for oneDNN."""
    shapes: dict[str, Shape] = {}

    def record(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        num_in, num_out = inputs[0].shape[-1], output.shape[-1]
        if output.numel() * num_in >= LEAST_WORK:
            shapes[name] = (output.numel() // num_out, num_in, num_out)

    # ColossalAI's sharded parameters are of other classes, and oneDNN computes with none of these.
    if any(type(layer.weight) is nn.Parameter for layer in _layers(model).values()):
        twin = without_storage(model).eval()
        for name, layer in _layers(twin).items():
            layer.register_forward_hook(partial(record, name))
        with torch.no_grad():
            twin(*example_inputs(twin, batch_size))
    return shapes


def saved_products(model: nn.Module) -> dict[str, list[bool]]:
    """The choice as plain values by the layer's name, without layers that are all torch's."""
    return {name: list(layer.onednn) for name, layer in _layers(model).items() if any(layer.onednn)}


def restore_products(model: nn.Module, saved: Mapping[str, Sequence[bool]], runtime: Runtime) -> None:
    """Gives the layers the choice of the run's start, or torch's if a rank lacks oneDNN; collective."""
    has_all = all(runtime.gather_objects(has_onednn()))
    _give(model, {name: Products(*flags) for name, flags in saved.items()} if has_all else {})
    if saved and not has_all and runtime.is_main:
        say("linear layers: torch's products; the run was started with oneDNN's, which a process lacks here")


def describe(model: nn.Module) -> str:
    """The choice in words, by shape."""
    counts = Counter(
        f"{layer.in_features} x {layer.out_features} ({', '.join(names)})"
        for layer in _layers(model).values()
        if (names := [name for name, is_onednn in layer.onednn._asdict().items() if is_onednn])
    )
    listed = ", ".join(f"{count} of {what}" for what, count in sorted(counts.items()))
    return f"oneDNN's products in {listed}" if listed else "torch's products"


def _give(model: nn.Module, choice: Mapping[str, Products]) -> None:
    for name, layer in _layers(model).items():
        layer.onednn = choice.get(name, Products())
    # A measurement sets the number of threads, and MKL then keeps to it where it would take fewer: a resumed
    # run must do as the run that was measured.
    torch.set_num_threads(torch.get_num_threads())


def _layers(model: nn.Module) -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
