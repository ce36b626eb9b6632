"""Checkpoints: folders that are complete or absent, written and read by all ranks together.

`checkpoints/step_0000100/` holds model.safetensors and ema.safetensors (whole float32 weights; with adapters,
the trained ones alone), a file of optimizer moments per rank, state.pt (data position, policy, loss scale,
what the optimizer keeps besides moments: plain values and tensors), config.yaml, classes.json where the data
name their classes, normalization.json of point clouds, and manifest.json with the size and SHA-256 of each
file. Without an average there is no ema.safetensors. If several are kept, others are
ema_<length>.safetensors.
"""

from speedit_plugins.trainer.checkpoints.contents import (
    CLASSES,
    CONFIG,
    EMA,
    MANIFEST,
    MODEL,
    NORMALIZATION,
    STATE,
    CheckpointError,
    Contents,
    Saved,
)
from speedit_plugins.trainer.checkpoints.names import newest, newest_first, step_in_name, step_of
from speedit_plugins.trainer.checkpoints.reading import (
    class_names,
    damage,
    load,
    newest_whole,
    sampled_file,
)
from speedit_plugins.trainer.checkpoints.writing import save

__all__ = [
    "CLASSES",
    "CONFIG",
    "EMA",
    "MANIFEST",
    "MODEL",
    "NORMALIZATION",
    "STATE",
    "CheckpointError",
    "Contents",
    "Saved",
    "class_names",
    "damage",
    "load",
    "newest",
    "newest_first",
    "newest_whole",
    "sampled_file",
    "save",
    "step_in_name",
    "step_of",
]
