"""Changes of a config, as contestants and arms have them."""

import copy
from collections.abc import Mapping
from typing import Any

# Their types share parameters: every optimizer has a learning rate, every policy a weighting, and all models
# here take DiT's sizes.
SHARING = ("model", "optimizer", "policy")


def merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """`upper` over `lower`, section by section. Changes neither, and shares nothing with them.

    A section with another `type` replaces the one below, so that no parameter of one type reaches another.
    But those of `SHARING` keep what `upper` does not name.
    """
    found = copy.deepcopy(dict(lower))
    for key, value in upper.items():
        if isinstance(value, Mapping):
            below = found.get(key)
            is_kept = isinstance(below, Mapping) and (key in SHARING or not _changes_type(below, value))
            found[key] = merged(below if is_kept else {}, value)
        else:
            found[key] = copy.deepcopy(value)
    return found


def _changes_type(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> bool:
    return "type" in lower and upper.get("type", lower["type"]) != lower["type"]
