"""What a table of weights has to be, so that a loss can be multiplied by it.

Dims: T timesteps.
"""

import torch
from torch import Tensor


def check_weights(weight: Tensor, density: Tensor, name: str) -> None:
    """Raises ValueError unless a loss can be weighed by this table (T,), in the float32 that draws return.

    Args:
        weight: of each timestep, (T,).
        density: probability of each timestep, (T,).
        name: of the policy.
    """
    used = weight.float()
    if not (torch.isfinite(used).all() and (used >= 0).all()):
        raise ValueError(
            f"policy {name!r} needs weights >= 0 that are finite in float32, got {weight.min():g} to"
            f" {weight.max():g}"
        )
    if not (used[density > 0] > 0).any():
        raise ValueError(
            f"policy {name!r} needs a weight > 0 in float32 at some timestep that it draws, got at most"
            f" {weight[density > 0].max():g}: nothing would be trained"
        )
