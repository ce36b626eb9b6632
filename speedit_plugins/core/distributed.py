"""What the method needs from other ranks: the losses they saw.

Dims: B rows of this rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(rows: Tensor) -> Tensor:
    """Rows (B, C) of all ranks in rank order, B may differ between ranks; the input itself on one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    size = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    # Collectives need one shape on all ranks: pad to the longest, cut after.
    longest = max(int(s) for s in sizes)
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), rows.shape[1])])
    gathered = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(s)] for part, s in zip(gathered, sizes, strict=True)])
