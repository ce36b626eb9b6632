"""Sections of a config that are off by default: how they are switched on, and off again.

Standard library only, like `schema.py`.
"""

from collections.abc import Mapping
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


def is_switched_off(path: str, section: Mapping[str, Any]) -> bool:
    """Whether a section says itself that it is off.

    Args:
        path: dotted key of the section.
        section: its keys in one place, such as the command line.
    """
    key, off = SWITCHES.get(path, ("", None))
    return key in section and section[key] == off
