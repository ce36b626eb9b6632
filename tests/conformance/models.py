"""Small models that the hosts train in the checks.

Dims: B batch, C channels.
"""

from typing import Any

import torch
from torch import Tensor, nn


class SmallModel(nn.Module):
    """A model of one parameter whose answer depends on x and t. It keeps what it is called with.

    Args:
        sigma_axis: where the channels of a learned variance are appended; None appends none.
        answers_tuple: whether the answer comes in a tuple of one.
    """

    def __init__(self, sigma_axis: int | None = None, *, answers_tuple: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.sigma_axis = sigma_axis
        self.answers_tuple = answers_tuple
        self.inputs: list[Tensor] = []
        self.seen: list[Tensor] = []
        self.arguments: list[dict[str, Any]] = []
        self.answers: list[Tensor] = []

    def forward(self, x: Tensor, t: Any = None, *_: Any, timestep: Any = None, **kwargs: Any) -> Any:
        t = timestep if t is None else t
        self.inputs.append(x.detach())
        self.seen.append(t.detach().clone())
        self.arguments.append(kwargs)
        answer = torch.sin(self.scale * x + 0.01 * t.view(-1, *[1] * (x.dim() - 1)))
        if self.sigma_axis is not None:
            answer = torch.cat([answer, 0.3 * answer], dim=self.sigma_axis)
        self.answers.append(answer.detach())
        return (answer,) if self.answers_tuple else answer


class ConditionedUnet(SmallModel):
    """The same for latent-diffusion, whose `context` (B, 1) is added to the answer."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Any:
        answer = super().forward(x, t)
        return answer if context is None else answer + context.view(len(x), -1, 1, 1)[:, :1]


class NamedUnet(SmallModel):
    """The same for mmagic, whose unet returns a mapping with the answer as `sample`."""

    def forward(self, x_t: Tensor, t: Tensor) -> Any:
        return {"sample": super().forward(x_t, t)}


class KeyedModel(SmallModel):
    """The same for HunyuanDiT, whose model returns a mapping with the answer as `x`."""

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        return {"x": super().forward(x, t, **kwargs)}


class TextEncoder:
    """Embeds each prompt by its length, for Open-Sora's samplers."""

    def tokenize_fn(self, prompts: list[str]) -> dict[str, Any]:
        return {"prompts": prompts}

    def encode(self, prompts: list[str]) -> dict[str, Any]:
        return {"y": torch.tensor([[float(len(prompt))] for prompt in prompts])}

    def null(self, n: int) -> Tensor:
        return torch.zeros(n, 1)
