"""What the trainer asks of a model, whoever wrote it.

Dims: `B` batch, `C` channels, `F` frames, `s` edge, `L` caption tokens, `D` width of a text encoder.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from speedit_plugins.trainer.condition import Condition


def input_shape(model: nn.Module) -> tuple[int, ...]:
    """One sample of what the model denoises: (C, s, s), of a video model (C, F, s, s)."""
    edge, frames = cast(int, model.input_size), getattr(model, "num_frames", None)
    time = () if frames is None else (cast(int, frames),)
    return (cast(int, model.in_channels), *time, edge, edge)


def split_extra(condition: Condition, extra_channels: int) -> tuple[Tensor | None, Condition]:
    """What is concatenated to x, "extra" (B, E, ...), and the rest: labels, other named tensors, or None.

    Raises:
        ValueError: the model wants extra channels and gets none, or others, or gets some and wants none.
    """
    extra = condition.get("extra") if isinstance(condition, Mapping) else None
    got = 0 if extra is None else extra.shape[1]
    if got != extra_channels:
        raise ValueError(f"the model needs {extra_channels} extra channels in its condition, got {got}")
    if extra is None or not isinstance(condition, Mapping):
        return None, condition
    rest = {name: value for name, value in condition.items() if name != "extra"}
    return extra, rest.get("label") if rest.keys() <= {"label"} else rest


def example_inputs(
    model: nn.Module, batch_size: int, *, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    """A call's arguments on the meta device: x (B, *input_shape), timestep (B,), the condition it takes."""
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
    return x, index, condition
