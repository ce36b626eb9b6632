"""Layers that a training gives a model, and that its samples do not need.

They are children of the model, so that they are trained, averaged and saved as the rest of it. Whatever reads
weights to draw or export leaves them out.
"""

from collections.abc import Mapping

from torch import Tensor, nn

CHILD = "training_only"


def add_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Gives the model a layer that only its training uses, as `training_only.{name}`.

    Raises:
        ValueError: there is a layer of this name.
    """
    if not hasattr(model, CHILD):
        model.add_module(CHILD, nn.ModuleDict())
    layers = layers_of(model)
    if name in layers:
        raise ValueError(f"the model has a training-only layer {name} already")
    layers[name] = layer


def layers_of(model: nn.Module) -> nn.ModuleDict:
    """The layers that `add_layer` gave the model; it must have some."""
    layers = getattr(model, CHILD)
    assert isinstance(layers, nn.ModuleDict)
    return layers


def without_layers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that samples need."""
    return {name: value for name, value in weights.items() if not name.startswith(f"{CHILD}.")}
