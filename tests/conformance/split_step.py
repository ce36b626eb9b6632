"""The contract for hosts that draw t in one place and make their loss in another, by a `SeparateDraws`.

A test says how a host makes one training step, and how its own draw is made to return a given t. The checks
are those of points.py that such a host can be asked for.

Dims: B batch.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conformance.seam import refused
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.separate_draws import SeparateDraws

WEIGHING = {"density": "logit_normal", "weighting": "min_snr"}


@dataclass(frozen=True)
class Made:
    """What one training step gave.

    Args:
        time: (B,) that the model saw, 1 is noise.
        loss: that the host minimises, a scalar.
        errors: (B,) of each sample, made by the test of what the host's model returned.
    """

    time: Tensor
    loss: Tensor
    errors: Tensor


@dataclass(frozen=True)
class SplitHost:
    """A host without a policy.

    Args:
        adapt: puts a policy into it, by a function that makes the `SeparateDraws`.
        step: makes one training step, from seeds that it sets itself.
        forced: while this is entered, the host's own draw returns the given t (B,), which is our time.
        tolerance: of the loss, relative.
        learns: whether a policy can learn from its losses.
        observed: the data (B, ...) of a step that the policy should see; None if the test does not say.
    """

    adapt: Callable[[Callable[..., SeparateDraws]], None]
    step: Callable[[], Made]
    forced: Callable[[Tensor], AbstractContextManager[Any]]
    tolerance: float = 2e-7
    learns: bool = True
    observed: Callable[[], Tensor] | None = None


Checks = tuple[Callable[[SplitHost], None], ...]


class Recorded:
    """Makes `SeparateDraws` and keeps them, with what their policies observed and learned."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.made: list[SeparateDraws] = []
        self.observed: list[Tensor] = []

    def __call__(self, **options: Any) -> SeparateDraws:
        stream = DrawStream(torch.Generator().manual_seed(5 + len(self.made)))
        draws = SeparateDraws(self.policy, stream=stream, **options)
        draws.policy.observe = self.observed.append
        self.made.append(draws)
        return draws


def check(make: Callable[[], AbstractContextManager[SplitHost]], checks: Checks | None = None) -> None:
    """Raises AssertionError if a host does not keep the contract. `make` gives a fresh host each time."""
    for each in checks or (*TRAINING_ONLY, evaluates_as_the_host):
        with make() as host:
            each(host)


def weighs(host: SplitHost) -> None:
    """Points 1 and 2: the model sees the t of the law, and the loss is the mean of w * error."""
    recorded = Recorded(WEIGHING)
    host.adapt(recorded)
    made = host.step()
    policy = recorded.made[0].policy
    index = (made.time.double() * len(policy.density)).long()
    direct = (policy.weight[index] * made.errors.double()).mean()
    plain = made.errors.double().mean()
    found = float(made.loss.detach())
    assert abs(float(direct) / float(plain) - 1) > 0.01, "the weights change nothing here"
    assert abs(found / float(direct) - 1) <= host.tolerance, f"loss {found}, wanted {float(direct)}"
    assert policy.num_steps == 1, f"{policy.num_steps} draws in a step"
    if host.observed is not None:
        (seen,) = recorded.observed
        assert torch.equal(seen, host.observed().to(seen)), "the policy observed other data"


def is_the_host_if_uniform(host: SplitHost) -> None:
    """Point 3: `uniform` gives the host's own loss to the bit, at the same t and noise."""
    wanted = torch.tensor([0.25, 0.5, 0.75, 0.125])
    with host.forced(wanted):
        plain = host.step()
    # A host's shift rounds.
    assert torch.allclose(plain.time, wanted, rtol=1e-5), "the test does not force the host's draw"
    host.adapt(Recorded("uniform"))
    with host.forced(wanted):
        ours = host.step()
    assert torch.equal(ours.time, plain.time), f"uniform changed the host's draw {plain.time} to {ours.time}"
    assert torch.equal(ours.loss, plain.loss), f"another loss: {ours.loss}, wanted {plain.loss}"


def evaluates_as_the_host(host: SplitHost) -> None:
    """Point 3: without gradients draw and loss are the host's, and the policy counts no step."""
    recorded = Recorded(WEIGHING)
    with torch.no_grad():
        plain = host.step()
        host.adapt(recorded)
        ours = host.step()
    assert torch.equal(ours.time, plain.time), "another t without gradients"
    assert torch.equal(ours.loss, plain.loss), "another loss without gradients"
    assert sum(draws.policy.num_steps for draws in recorded.made) == 0


def leaves_random_numbers(host: SplitHost) -> None:
    """Point 3: after a step the host's random numbers are where they would be."""
    host.step()
    plain = torch.get_rng_state()
    host.adapt(Recorded("logit_normal"))
    host.step()
    assert torch.equal(torch.get_rng_state(), plain), "the host's next random numbers changed"


def learns(host: SplitHost) -> None:
    """A learning policy gets each sample's own error, or is refused with what the host lacks."""
    seen: list[tuple[Tensor, Tensor]] = []
    recorded = Recorded("loss_second_moment")

    def watched(**options: Any) -> SeparateDraws:
        draws = recorded(**options)
        draws.policy.update = lambda index, loss: seen.append((index, loss))
        return draws

    host.adapt(watched)
    if not host.learns:
        refused(host.step, "learn")
        return
    made = host.step()
    assert seen, "the policy learned nothing"
    assert torch.allclose(seen[0][1].double(), made.errors.double(), rtol=1e-5), "another loss was learned"


# For a host whose function is called in training alone, and makes its backward pass itself.
TRAINING_ONLY: Checks = (weighs, is_the_host_if_uniform, leaves_random_numbers, learns)
