"""What a checkpoint holds, and the names of its files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from speedit_plugins.trainer import saved_configs
from speedit_plugins.trainer.parallel.master_weights import Slice
from speedit_plugins.trainer.parallel.saved_moments import Moments

MODEL, EMA, STATE, CONFIG = "model.safetensors", "ema.safetensors", "state.pt", saved_configs.CONFIG
MANIFEST, CLASSES, NORMALIZATION = "manifest.json", "classes.json", "normalization.json"


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read. The message names it, and the last good one."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds. Only rank 0's values are written, except for `moments`.

    Args:
        model: state dict of the model.
        ema: the state dict with averaged weights; empty if the run keeps no average.
        state: plain values and tensors, at any depth.
        config: the run's config as YAML text.
        moments: this rank's slices of the optimizer's state.
        classes: names of the classes, by number; empty if they have none.
        normalization: a dataclass that undoes the data's own scaling, or None.
        averages: state dicts with further averages, by label.
        metadata: of the files of weights.
    """

    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    state: Mapping[str, Any]
    config: str
    moments: Mapping[str, Slice] = field(default_factory=dict)
    classes: Sequence[str] = ()
    normalization: Any = None
    averages: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read. `moments` are whole flat tensors, each read when it is asked for.

    `ema` is empty if the run kept no average.
    """

    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    state: Mapping[str, Any]
    config: str
    moments: Moments
    averages: Mapping[str, Mapping[str, Tensor]]
