"""What the trainer needs to know about a model, its own or another's.

Dims: `B` batch, `C` channels, `E` extra channels, `F` frames, `s` side, `N` points, `V` voxels on a side,
`L` caption tokens, `D` width of a text encoder.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.model_copies import copy_with
from speedit_plugins.trainer.models.layers.attention import SelfAttention, sdpa

# Level 1 of the noise on a low-resolution input, as it is embedded.
LEVEL_SCALE = 1000.0


def input_shape(model: nn.Module) -> tuple[int, ...]:
    """Shape of one sample that the model denoises: (C, s, s), or (C, F, s, s) for a video model.

    A model of shapes states its own, as `sample_shape`: (C, N) or (C, V, V, V).
    """
    if hasattr(model, "sample_shape"):
        return cast(tuple[int, ...], model.sample_shape)
    edge, frames = cast(int, model.input_size), getattr(model, "num_frames", None)
    time = () if frames is None else (cast(int, frames),)
    return (cast(int, model.in_channels), *time, edge, edge)


def num_tokens(model: nn.Module, latents: Tensor) -> int:
    """Number of tokens in latents (B, C, ...), whose sides may differ from those of `input_size`."""
    whole = cast(int, model.num_tokens) * latents[:, 0].numel()
    return whole // math.prod(input_shape(model)[1:])


def token_blocks(model: nn.Module) -> Sequence[nn.Module]:
    """The model's blocks on tokens, in their order. Empty if its forward pass gives no `hidden_after`."""
    if "hidden_after" not in inspect.signature(model.forward).parameters:
        return ()
    found = getattr(model, "token_blocks", None)
    return cast(Sequence[nn.Module], model.blocks if found is None else found)


def token_width(model: nn.Module) -> int:
    """The width of the tokens after each of `token_blocks`."""
    if hasattr(model, "net"):
        config = cast(Any, model.net).config
        return int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    return int(cast(Tensor, model.pos_embed).shape[-1])


def cut_blocks(model: nn.Module, depth: int) -> None:
    """Takes the `token_blocks` after the first `depth` out of the model, and what goes with them.

    A model with its blocks in lists of its own, as MDTv2, keeps them all.
    """
    net = getattr(model, "net", model)
    for name in ("blocks", "transformer_blocks", "temporal_transformer_blocks"):
        if isinstance(blocks := getattr(net, name, None), nn.ModuleList):
            del blocks[depth:]


def split_extra(condition: Condition, extra_channels: int) -> tuple[Tensor | None, Condition]:
    """Splits a condition into "extra" (B, E, ...), which is concatenated to x, and the rest.

    Returns:
        The extra channels or None, and the rest without "level": labels, named tensors, or None.

    Raises:
        ValueError: the condition has another number of extra channels than the model takes.
    """
    extra = condition.get("extra") if isinstance(condition, Mapping) else None
    got = 0 if extra is None else extra.shape[1]
    if got != extra_channels:
        raise ValueError(f"the model needs {extra_channels} extra channels in its condition, got {got}")
    if extra is None or not isinstance(condition, Mapping):
        return None, condition
    rest = {name: value for name, value in condition.items() if name not in ("extra", "level")}
    return extra, rest.get("label") if rest.keys() <= {"label"} else rest


def level_of(condition: Condition, *, is_told: bool) -> Tensor | None:
    """What a model embeds for "level" of the condition, (B,), 1000 at level 1; None for a model without it.

    The factor is that of a flow's timestep: the features of a timestep tell numbers of this size apart.

    Raises:
        ValueError: a model that is told the level gets none, or another one gets it.
    """
    level = condition.get("level") if isinstance(condition, Mapping) else None
    if (level is not None) != is_told:
        wanted, got = ("a level", "none") if is_told else ("no level", "one")
        raise ValueError(f"the model needs {wanted} of noise in its condition, got {got}")
    return None if level is None else LEVEL_SCALE * level


def example_inputs(
    model: nn.Module, batch_size: int, *, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    """Arguments of a call, on the meta device: x (B, *input_shape), timestep (B,), and the condition."""
    x = torch.empty(batch_size, *input_shape(model), device="meta", dtype=dtype)
    index = torch.empty(batch_size, dtype=torch.int64, device="meta")
    condition: Condition = index if cast(int, model.num_classes) else None
    text_width = getattr(model, "text_width", 0)
    if text_width:
        size = (batch_size, cast(int, model.text_length))
        condition = {
            "tokens": torch.empty(*size, text_width, device="meta", dtype=dtype),
            "mask": torch.ones(size, device="meta", dtype=torch.bool),
        }
    extra = cast(int, getattr(model, "extra_channels", 0))
    if extra:
        named: Mapping[str, Tensor] = {}
        if condition is not None:
            named = {"label": condition} if isinstance(condition, Tensor) else condition
        condition = {**named, "extra": x[:, :1].expand(-1, extra, *x.shape[2:])}
        if getattr(model, "is_told_level", False):
            condition["level"] = torch.empty(batch_size, device="meta")
    return x, index, condition


def without_storage(model: nn.Module) -> nn.Module:
    """A copy on the meta device, with torch's attention: every parameter's shape, and memory for none."""

    def on_meta(own: Tensor) -> Tensor:
        return torch.empty_like(own, device="meta")

    twin = copy_with(model, parameter=on_meta, buffer=on_meta)
    for module in twin.modules():
        if isinstance(module, SelfAttention):
            # Every kernel computes the same, and this one runs on the meta device.
            module.kernel = sdpa
    return twin
