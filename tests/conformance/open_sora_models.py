"""What Open-Sora's schedulers train and sample with in the checks: a small denoiser and a text encoder.

Dims: B batch, C channels, F frames, H and W height and width.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Denoiser(nn.Module):
    """(B, C, F, H, W) -> (B, 2C, F, H, W), other at each t; keeps every t and argument that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.3))
        self.seen: list[Tensor] = []
        self.arguments: list[dict[str, Any]] = []

    def forward(self, x: Tensor, timestep: Tensor, y: Any = None, **kwargs: Any) -> Tensor:
        self.seen.append(timestep.clone())
        self.arguments.append({"y": y, **kwargs})
        phase = (timestep.float() / 1000).view(-1, *[1] * (x.ndim - 1))
        return torch.cat([self.gain * x * (1 + phase), torch.tanh(x + phase)], dim=1)


class TextEncoder:
    """Embeds each prompt by its length."""

    def tokenize_fn(self, prompts: list[str]) -> dict[str, Any]:
        return {"prompts": prompts}

    def encode(self, prompts: list[str]) -> dict[str, Any]:
        return {"y": torch.tensor([[float(len(prompt))] for prompt in prompts])}

    def null(self, n: int) -> Tensor:
        return torch.zeros(n, 1)
