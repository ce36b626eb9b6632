"""One layer of a config over another, and what a new `type` leaves behind. Standard library only."""

from collections.abc import Mapping
from typing import Any

from speedit_plugins.trainer.config.key_names import join
from speedit_plugins.trainer.config.switches import is_switched_off

# Kept when a section's `type` changes: facts about the data, the policy, and its number of steps.
_KEPT_ON_TYPE_CHANGE = {
    "model": ("input_size", "in_channels", "num_classes", "learn_sigma"),
    "diffusion": ("policy", "diffusion_steps"),
    # What the trainer does, whatever the optimizer.
    "optimizer": (
        *("warmup_steps", "schedule", "power", "decay_steps", "decay_shape"),
        *("max_grad_norm", "grad_accumulation"),
    ),
}


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """`upper` over `lower`: sections key by key, lists and scalars whole. Changes neither argument.

    A section with another `type` than the one below it replaces that section, so that no parameter of the old
    type reaches the new one. But `model` keeps input_size, in_channels, num_classes and learn_sigma, and
    `diffusion` keeps the policy and diffusion_steps. A section that is switched off replaces it too.
    """
    result = dict(lower)
    for key, value in upper.items():
        here, old = join(path, key), result.get(key)
        if isinstance(value, Mapping):
            kept = old if isinstance(old, Mapping) else {}
            if _changes_type(kept, value, here):
                kept = {name: kept[name] for name in _KEPT_ON_TYPE_CHANGE.get(here, ()) if name in kept}
            result[key] = merge(kept, value, here)
        else:
            result[key] = value
    return result


def left_out(lower: Mapping[str, Any], upper: Mapping[str, Any], path: str = "") -> list[str]:
    """A line for each `type` of `upper` that replaces one of `lower`: the keys that it leaves behind.

    Values that are empty or taken from another key are not listed, nor a section that is switched off.
    """
    lines: list[str] = []
    for key, new in upper.items():
        here, old = join(path, key), lower.get(key)
        if not isinstance(new, Mapping) or not isinstance(old, Mapping):
            continue
        lines += left_out(old, new, here)
        if "type" not in new or not _changes_type(old, new, here) or str(new["type"]).lower() == "none":
            continue
        staying = ("type", *new, *_KEPT_ON_TYPE_CHANGE.get(here, ()))
        gone = [name for name in old if name not in staying and old[name] and "${" not in str(old[name])]
        if gone:
            was = f"{here}.type {old['type']}" if "type" in old else f"the parts of {here}"
            lines.append(f"{here}.type={new['type']} leaves out what belonged to {was}: {', '.join(gone)}")
    return lines


def _changes_type(old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> bool:
    if path == "diffusion.policy" and ("type" in old) != ("type" in new):
        named, composed = (old, new) if "type" in old else (new, old)
        # One part alone is no policy: it replaces that part of the named one.
        return "type" in named and {"density", "weighting"} <= set(composed)
    changes = "type" in old and "type" in new and old["type"] != new["type"]
    # Options of a section below would contradict that it is off.
    return changes or is_switched_off(path, new)
