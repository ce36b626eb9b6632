"""Finds the weights in what a trainer saved: a state dict, or a dict with one or several under known keys."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

# The sets that a caller may ask for: averaged weights, and those of the last step.
WEIGHT_SETS = ("ema", "model")
# Where trainers keep each of them: DiT, SpeeDiT and EDM; timm, lucidrains, BasicSR, mmengine, Lightning,
# guided-diffusion, DeepSpeed, StyleGAN.
SET_KEYS = {
    "ema": ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "params_ema", "g_ema"),
    "model": (
        "model",
        "state_dict",
        "model_state_dict",
        "model_state",
        "net",
        "network",
        "params",
        "module",
        "weights",
        "generator",
    ),
}
# What DistributedDataParallel and torch.compile put before the names of a model's parameters. Compiled parts
# of a model have the second one inside of their names.
_DDP, _COMPILED = "module.", "_orig_mod."
# Where DiT-3D's trainer and Lightning modules keep their network.
_NETWORK = "model."
# {"model": {"state_dict": {...}}} is as deep as trainers go.
_MAX_DEPTH = 3


def weights_in(content: Any, prefer: str | None) -> tuple[dict[str, Tensor], str]:
    """The weights by name without the prefixes of wrappers, and the keys where they were: "model.state_dict".

    The keys are "" for a bare state dict.

    Args:
        content: what the file holds.
        prefer: "ema" or "model", which of several sets is wanted; None takes averaged weights where there are
            any. A bare state dict has one set.

    Raises:
        ValueError: there are no weights, or several of the wanted kind. The message begins with "holds" or
            "has", for a caller to put the file's name before it.
    """
    keys: list[str] = []
    while not _is_state_dict(content):
        key = _set_key(content, prefer if not keys else None)
        if key is None or len(keys) == _MAX_DEPTH:
            raise ValueError(_nothing_in(content, keys))
        keys.append(key)
        content = content[key]
    return without_wrappers({str(name): tensor.detach() for name, tensor in content.items()}), ".".join(keys)


def without_wrappers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names that the model itself gives them.

    There is no "_orig_mod.", and no "module." or "model." that is before all of them.
    """
    found = {name.replace(_COMPILED, ""): tensor for name, tensor in weights.items()}
    while prefix := next((each for each in (_DDP, _NETWORK) if _all_below(each, found)), None):
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    # Two names that become one are no names of wrappers.
    return found if len(found) == len(weights) else dict(weights)


def _all_below(prefix: str, names: Collection[str]) -> bool:
    return bool(names) and all(name.startswith(prefix) and name != prefix for name in names)


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(map(torch.is_tensor, content.values()))


def _set_key(content: Any, prefer: str | None) -> str | None:
    """The key of the wanted set; None if there is none."""
    if not isinstance(content, Mapping):
        return None
    present = {
        kind: [key for key in keys if isinstance(content.get(key), Mapping)]
        for kind, keys in SET_KEYS.items()
    }
    if prefer is not None and not present[prefer] and any(present.values()):
        raise ValueError(f"has no {prefer!r} weights, got keys {sorted(map(str, content))}")
    found = present[prefer] if prefer else present["ema"] or present["model"]
    if len(found) > 1:
        raise ValueError(f"has weights under {' and '.join(found)}; wanted a file with one of them")
    return found[0] if found else None


def _nothing_in(content: Any, keys: list[str]) -> str:
    where = f" under {'.'.join(keys)}" if keys else ""
    if not isinstance(content, Mapping):
        held = (
            f"one tensor of shape {tuple(content.shape)}"
            if isinstance(content, Tensor)
            else type(content).__name__
        )
    elif content and isinstance(content.get("shadow_params"), list):
        held = "shadow_params, averaged weights without names"
    else:
        names = sorted(map(str, content))
        held = f"keys {names[:8]}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    known = "'ema', 'model', 'state_dict' or another usual key"
    return f"holds {held}{where}; wanted a state dict, or a dict with one under {known}"
