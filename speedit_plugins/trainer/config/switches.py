"""Sections and measurements that are off by default: how they are switched on, and off again.

Standard library only, like `schema.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

# The key of each such section that switches it on, and the value at which the section is off.
SWITCHES: dict[str, tuple[str, Any]] = {
    "lora": ("rank", 0),
    "super_resolution": ("factor", 0),
    "contrastive": ("weight", 0),
    "masking": ("type", "none"),
    "routing": ("keep", 1),
    "alignment": ("type", "none"),
}
# null switches these off too, like the keys whose default is null.
OFF_AT_NULL = (*SWITCHES, "uncertainty")
# How often a training measures -> the values of keep_best that it measures.
_MEASUREMENTS = {"validate_every": ("val_loss",), "evaluate_every": ("fid", "kid")}


def is_switched_off(path: str, section: Mapping[str, Any]) -> bool:
    """Whether a section says itself that it is off.

    Args:
        path: dotted key of the section.
        section: its keys in one place, such as the command line.
    """
    key, off = SWITCHES.get(path, ("", None))
    return key in section and section[key] == off


def without_measurements(
    merged: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """A config without what has no effect once a later layer has turned a measurement off.

    Keys that are given beside `evaluate_every: 0`, or in a layer over it, stay: they contradict it.

    Args:
        merged: the layers over each other.
        layers: the lowest one first.

    Returns:
        The config, and by the key that is 0 the dotted keys that went with it.
    """
    result, gone = dict(merged), dict[str, list[str]]()
    for every in _MEASUREMENTS:
        if merged.get(every) != 0:
            continue
        last = max(number for number, layer in enumerate(layers) if every in layer)
        beside = layers[last:]
        names = [key for key in _idle(merged, every) if all(_value(layer, key) is None for layer in beside)]
        for name in names:
            section, _, key = name.rpartition(".")
            if section:
                result[section] = {**result[section], key: None}
            else:
                del result[key]
        if names:
            gone[every] = names
    return result, gone


def _idle(config: Mapping[str, Any], every: str) -> list[str]:
    """The dotted keys of a config that have no effect without the measurement."""
    keys = [every.replace("_every", "_samples")]
    if config.get("keep_best") in _MEASUREMENTS[every]:
        keys.append("keep_best")
    # The phase test compares shapes with it.
    if every == "validate_every" and not config.get("voxel_size"):
        keys.append("data.validation")
    return [key for key in keys if _value(config, key) is not None]


def _value(config: Mapping[str, Any], dotted: str) -> Any:
    """The value of a dotted key; None where there is none."""
    section, _, key = dotted.rpartition(".")
    found = config.get(section) if section else config
    return found.get(key) if isinstance(found, Mapping) else None
