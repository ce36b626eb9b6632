"""The trainings whose plans are compared with what two ranks hold and send."""

from pathlib import Path
from typing import Any

from runs import small_config

from speedit_plugins.trainer.config.schema import ExperimentConfig

# Wide enough that weights count beside activations. The tables of classes have an odd number of rows.
SIZES = {
    "model__hidden_size": 96,
    "model__depth": 3,
    "model__num_heads": 4,
    "model__patch_size": 2,
    "data__batch_size": 32,
}
PLUGINS = ("ddp", "zero1", "zero2", "fsdp2")
CASES: dict[str, dict[str, Any]] = {
    f"{plugin} {precision}": {"plugin": plugin, "precision": precision}
    for plugin in PLUGINS
    for precision in ("fp32", "bf16")
}
# Blocks that compute again, and two batches a step.
AGAIN = {"model__gradient_checkpointing": True, "optimizer__grad_accumulation": 2, "precision": "bf16"}
CASES |= {f"{plugin} again": {"plugin": plugin, **AGAIN} for plugin in ("ddp", "fsdp2")}
CASES["fsdp2 groups"] = {"plugin": "fsdp2", "sharding__replicate": 2}
# Each rank has half of every sample's tokens.
CASES |= {f"{plugin} tokens": {"plugin": plugin, "sequence_parallel": 2} for plugin in ("ddp", "fsdp2")}


def case_config(folder: Path, changes: dict[str, Any], **more: Any) -> ExperimentConfig:
    """The config of a case on the CPU."""
    return small_config(folder, device="cpu", **SIZES, **changes, **more)
