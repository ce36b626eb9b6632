"""A host with DDT's seam, in own code: a trainer's method draws t, 1 is data, and squares the error."""

from collections.abc import Callable

import torch
from torch import Tensor


class LinearScheduler:
    """The straight path from noise at 0 to data at 1."""

    def alpha(self, t: Tensor) -> Tensor:
        """The share of the data, (B, 1, 1, 1)."""
        return t.view(-1, 1, 1, 1)

    def sigma(self, t: Tensor) -> Tensor:
        """The share of the noise, (B, 1, 1, 1)."""
        return (1 - t).view(-1, 1, 1, 1)


def constant(alpha: Tensor, sigma: Tensor) -> int:
    """No weights."""
    return 1


class REPATrainer:
    """Shifts its draw, and has a second loss."""

    def __init__(self, timeshift: float = 1.0) -> None:
        self.scheduler = LinearScheduler()
        self.loss_weight_fn: Callable[..., Tensor | int] = constant
        self.timeshift = timeshift
        self.lognorm_t = False

    def _impl_trainstep(self, net: Callable[..., Tensor], x: Tensor) -> dict[str, Tensor]:
        if self.lognorm_t:  # noqa: SIM108 - as the host has it
            base_t = torch.randn(len(x)).sigmoid()
        else:
            base_t = torch.rand(len(x))
        t = base_t / (base_t + (1 - base_t) * self.timeshift)
        noise = torch.randn_like(x)
        alpha, sigma = self.scheduler.alpha(t), self.scheduler.sigma(t)
        prediction = net(alpha * x + sigma * noise, t)
        weight = self.loss_weight_fn(alpha, sigma)
        fm_loss = weight * (prediction - (x - noise)) ** 2
        cos_loss = prediction.mean() - prediction.mean()
        return dict(fm_loss=fm_loss.mean(), loss=fm_loss.mean() + 0.5 * cos_loss)  # noqa: C408 - as the host
