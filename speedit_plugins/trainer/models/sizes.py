"""Registers models by size. DiT, Latte, SiT and MDT share S, B, L and XL, each with patches of 2, 4 or 8."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import nn

from speedit_plugins.registry import MODELS

# Source: table 1 of Peebles and Xie 2022, arXiv:2212.09748. Latte has the same sizes.
SIZES = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}
PATCH_SIZES = (2, 4, 8)
MLP_RATIO = 4.0
# Side of Stable Diffusion's latent of an image of 256 x 256 pixels.
INPUT_SIZE = 32


def register_sizes(
    name: str,
    model: type[nn.Module],
    *,
    sizes: Mapping[str, Mapping[str, int]] = SIZES,
    patch_sizes: Sequence[int] = PATCH_SIZES,
) -> None:
    """Registers the model in every size, as `{name}-{size}/{patch_size}`: "DiT-S/2" to "DiT-XL/8"."""
    for size, widths in sizes.items():
        for patch_size in patch_sizes:
            MODELS.register_module(
                name=f"{name}-{size}/{patch_size}", module=_sized(model, {**widths, "patch_size": patch_size})
            )


def with_defaults(
    model: type[nn.Module],
    parent: type[nn.Module],
    defaults: Mapping[str, Any] | None = None,
    *,
    without: Collection[str] = (),
) -> None:
    """Gives a model that passes its options on the signature of its parent, with these defaults.

    The registry checks a config against the signature, by name and type. What the parent lacks is added: the
    model's own parameters, and names that have a default here.

    Args:
        model: takes its own parameters, and `**options` for its parent.
        parent: has a signature.
        defaults: name -> default in place of the parent's.
        without: parameters of the parent that the model does not take.
    """
    taken = {name: p for name, p in inspect.signature(parent).parameters.items() if name not in without}
    if "__init__" in vars(model):
        own = inspect.signature(model).parameters
        taken |= {name: p for name, p in own.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    else:

        def __init__(self: Any, *args: Any, **options: Any) -> None:  # noqa: N807 - the model's own
            super(model, self).__init__(*args, **options)

        model.__init__ = __init__  # type: ignore[method-assign]  # its parent's must keep its signature
    for name, default in (defaults or {}).items():
        fresh = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=type(default))
        taken[name] = taken.get(name, fresh).replace(default=default)
    receiver = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    # It belongs to the constructor. So a subclass that writes its own constructor has its own signature.
    model.__init__.__signature__ = inspect.Signature([receiver, *taken.values()])  # type: ignore[attr-defined]  # inspect reads it


def _sized(model: type[nn.Module], size: Mapping[str, int]) -> Callable[..., nn.Module]:
    """A builder of the model in one size. It takes the arguments that the size leaves open."""
    fixed: dict[str, Any] = {"mlp_ratio": MLP_RATIO, **size}

    def build(input_size: int = INPUT_SIZE, **options: Any) -> nn.Module:
        return model(input_size=input_size, **fixed, **options)

    own = inspect.signature(model).parameters
    parameters = [parameter for name, parameter in own.items() if name not in fixed]
    parameters = [p.replace(default=INPUT_SIZE) if p.name == "input_size" else p for p in parameters]
    # As above.
    build.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect reads it
    # So that a config with these sizes in place of the name is known as the same model.
    build.model, build.fixed = model, fixed  # type: ignore[attr-defined]  # attributes of a function
    return build
