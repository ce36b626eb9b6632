"""What every host of `SeparateDraws` keeps: the t that the model sees, and the loss that it reports.

Dims: T timesteps of the policy, B batch.
"""

import torch
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.hosts.separate_draws import SeparateDraws
from speedit_plugins.policies.policy import TimestepPolicy


class Made:
    """Makes the draws of an adapter, and keeps them."""

    def __init__(self, policy: object = "speed", **options: object) -> None:
        self.policy_config, self.options = policy, options
        self.all: list[SeparateDraws] = []

    def __call__(self, **options: object) -> SeparateDraws:
        """As the launcher's `draws_of`."""
        self.all.append(SeparateDraws(self.policy_config, **{**self.options, **options}))  # type: ignore[arg-type]  # options of any kind
        return self.all[-1]

    @property
    def policy(self) -> TimestepPolicy:
        """The policy of the newest draws."""
        return self.all[-1].policy


def check_law(index: Tensor, policy: TimestepPolicy, hosts_law: Tensor | None = None) -> None:
    """The timesteps (B,) follow the policy, or its density times the host's own law (T,).

    Raises:
        AssertionError: a tenth of the timesteps is 4 sigma of a binomial frequency away.
    """
    law = policy.density if hosts_law is None else policy.density * hosts_law
    tenths = (law / law.sum()).view(10, -1).sum(1)
    shares = torch.bincount(index.long() * 10 // len(law), minlength=10) / len(index)
    assert bool(((shares - tenths).abs() <= 4 * (tenths * (1 - tenths) / len(index)).sqrt()).all())


def check_loss(loss: Tensor, plain: Tensor, index: Tensor, policy: TimestepPolicy) -> None:
    """A reported loss () is the mean of weight * plain loss (B,) at these timesteps (B,)."""
    weighted = policy.weight[index.long()] * plain.detach().double()
    # Rounding of a mean in float32, and of its terms.
    assert_close(loss.detach().double(), weighted.mean(), rtol=1e-6, atol=0)


def per_sample(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error (B,) of predictions (B, ...)."""
    return ((prediction.detach() - target) ** 2).flatten(1).mean(1)
