"""A small STDiT in Open-Sora's registry. A config names this module in `custom_imports`."""

from importlib import import_module
from typing import Any

STDIT = import_module("opensora.models.stdit.stdit").STDiT
MODELS = import_module("opensora.registry").MODELS
load_checkpoint = import_module("opensora.utils.ckpt_utils").load_checkpoint


def small_stdit(from_pretrained: str | None = None, **options: Any) -> Any:
    """STDiT with two blocks, as the host's own function makes its STDiT-XL/2."""
    model = STDIT(depth=2, hidden_size=64, patch_size=(1, 2, 2), num_heads=4, **options)
    if from_pretrained is not None:
        load_checkpoint(model, from_pretrained)
    return model


MODELS.register_module(name="STDiT-small", module=small_stdit)
