"""ColossalAI's own ZeRO on a CPU, and what Open-Sora needs of another version of it.

Dims: B batch, N tokens, H heads, D width of a head, S sequences.
"""

import sys
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from speedit_plugins.trainer.parallel.colossal_setup import import_quietly, set_accelerator_of
from whole_trainings.stand_ins import module_with

NAMES = (
    "ColossalAI's checks for a GPU (ZeRO is built on the CPU, without overlapped communication)",
    "HybridAdam (torch.optim.AdamW)",
    "optimizer._param_store of ColossalAI 0.3 (the optimizer itself in 0.5)",
    "xformers.ops.memory_efficient_attention, flash_attn (SDPA with a block mask)",
    "liger_kernel (torch's rms_norm)",
)
ALL_TO_ALL = "dist.all_to_all (all_gather; gloo has none)"


class BlockDiagonalMask:
    """xformers' mask: each sequence of queries sees its own sequence of keys."""

    def __init__(self, queries: list[int], keys: list[int]) -> None:
        rows, columns = (
            torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
            for lengths in (queries, keys)
        )
        self.allowed = rows[:, None] == columns[None]  # (N, N)

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int] | None = None) -> "BlockDiagonalMask":
        """A mask for S lengths of queries and as many of keys."""
        return cls(list(q_seqlen), list(kv_seqlen or q_seqlen))


def attention(q: Tensor, k: Tensor, v: Tensor, p: float = 0.0, attn_bias: Any = None, **_: Any) -> Tensor:
    """Attention of (B, N, H, D), as xformers' memory_efficient_attention."""
    mask = None if attn_bias is None else attn_bias.allowed
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p).transpose(1, 2)


def gathered_all_to_all(outputs: list[Tensor], inputs: list[Tensor], group: Any = None, **_: Any) -> None:
    """`dist.all_to_all` by a gather of everything."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    packed = torch.stack(inputs)
    gathered = [torch.empty_like(packed) for _ in range(size)]
    dist.all_gather(gathered, packed, group=group)
    for output, given in zip(outputs, gathered, strict=True):
        output.copy_(given[rank])


def uncompiled(model: Any = None, **_: Any) -> Any:
    """`torch.compile`, as a function or as a decorator with options."""
    return uncompiled if model is None else model


class RMSNorm:
    """liger_kernel's function: x / rms(x) times a scale, over the last dimension."""

    @staticmethod
    def apply(x: Tensor, scale: Tensor, epsilon: float, *_: Any) -> Tensor:
        """The norm of x, in its dtype."""
        return functional.rms_norm(x, scale.shape, scale, epsilon)


class HybridAdam(torch.optim.AdamW):
    """torch's AdamW, under the name and with the arguments of ColossalAI's fused one."""

    def __init__(self, params: Any, adamw_mode: bool = True, **options: Any) -> None:
        super().__init__(params, **options)


def preload() -> None:
    """Imports ColossalAI for the CPU, which takes seconds."""
    # The trainer of this project needs the same of ColossalAI on a CPU.
    import_quietly()
    set_accelerator_of(torch.device("cpu"))


def install() -> list[str]:
    """Makes ColossalAI run here. Call it before CUDA is stood in for. Returns what was replaced."""
    preload()
    low_level = import_module("colossalai.zero.low_level").LowLevelZeroOptimizer
    low_level._sanity_checks = lambda self: None
    low_level._param_store = property(lambda self: self)
    plugin = import_module("colossalai.booster.plugin").LowLevelZeroPlugin
    start = plugin.__init__

    def without_overlap(self: Any, *args: Any, **options: Any) -> None:
        start(self, *args, **{**options, "overlap_communication": False})

    plugin.__init__ = without_overlap
    import_module("colossalai.nn.optimizer").HybridAdam = HybridAdam
    fmha = module_with("xformers.ops.fmha", BlockDiagonalMask=BlockDiagonalMask)
    ops = module_with("xformers.ops", fmha=fmha, memory_efficient_attention=attention)
    norm = module_with("liger_kernel.ops.rms_norm", LigerRMSNormFunction=RMSNorm)
    rope = module_with("liger_kernel.ops.rope", LigerRopeFunction=None)
    flash = module_with("flash_attn", flash_attn_func=attention)
    for module in (module_with("xformers", ops=ops), ops, fmha, norm, rope, flash):
        sys.modules[module.__name__] = module
    dist.all_to_all = gathered_all_to_all
    torch.compile = uncompiled
    return [*NAMES, ALL_TO_ALL]
