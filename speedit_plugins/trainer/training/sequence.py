"""Sequence parallelism in a training: which ranks share the samples of the model."""

from typing import cast

from torch import nn

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.models.layers.sequence import SequenceGroup, check_splits
from speedit_plugins.trainer.parallel.runtime import Runtime


def share_samples(model: nn.Module, config: ExperimentConfig, runtime: Runtime) -> None:
    """Splits the tokens of a model in training over the ranks of this rank's group, if the config says so.

    Raises:
        ValueError: the model cannot, or the runtime has no such groups.
    """
    size = config.sequence_parallel
    if runtime.sequence_size != size:
        raise ValueError(
            f"sequence_parallel: wanted groups of {size} processes that share samples, got groups of"
            f" {runtime.sequence_size}"
        )
    if size > 1:
        check_splits(model, size)
        assert runtime.sequence_group is not None
        model.sequence = SequenceGroup(runtime.sequence_group)  # type: ignore[assignment]  # a plain attribute


def tokens_line(model: nn.Module, config: ExperimentConfig) -> str:
    """What each process holds of a sample, for a dry run; "" without sequence parallelism.

    Raises:
        ValueError: the model cannot share its samples so.
    """
    size = config.sequence_parallel
    if size == 1:
        return ""
    check_splits(model, size)
    tokens = cast(int, model.num_tokens)
    return f"{-(-tokens // size):,} tokens of a sample, {size} processes share it"
