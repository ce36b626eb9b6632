"""Keys of earlier releases, read as those that took their place. Standard library only."""

from collections.abc import Mapping
from typing import Any

from speedit_plugins.trainer.config.validation import ConfigError

# Arguments of the model UNet before every model had them.
_LORA_KEYS = {"lora_rank": "rank", "lora_targets": "targets"}


def with_lora_section(content: Mapping[str, Any]) -> dict[str, Any]:
    """The config with `model.lora_rank` and `model.lora_targets` of a UNet as `lora.rank` and `lora.targets`.

    Raises:
        ConfigError: the config has both forms of a key.
    """
    model, section = content.get("model"), content.get("lora") or {}
    if not isinstance(model, Mapping) or model.get("type") != "UNet" or not isinstance(section, Mapping):
        return dict(content)
    moved = {new: model[old] for old, new in _LORA_KEYS.items() if old in model}
    for old, new in _LORA_KEYS.items():
        if old in model and new in section:
            raise ConfigError(f"model.{old}", f"is the earlier name of lora.{new}; wanted one of the two")
    if not moved:
        return dict(content)
    if not moved.get("rank", section.get("rank")):
        # Targets without a rank had no effect.
        moved.pop("targets", None)
    kept = {key: value for key, value in model.items() if key not in _LORA_KEYS}
    return {**content, "model": kept, "lora": {**section, **moved}}
