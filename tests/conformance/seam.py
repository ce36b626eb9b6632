"""What a test has to know of a host: how to make it, to train it for one step, and to sample from it.

A host is a training framework of somebody else. A seam is the place in its code where it draws t and makes
its loss, and so the place where a policy goes in. Hosts with the same place share a seam, and a subclass of
`Seam`.

Dims: B batch.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from conformance.models import SmallModel
from speedit_plugins.hosts.attachment import attachment_of
from speedit_plugins.hosts.draws import draw_stream
from speedit_plugins.hosts.entry import with_policy
from speedit_plugins.hosts.schedules import prediction_type_of, schedule_of
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy

POLICY = "speedit"
ATTACHED = frozenset({"_speedit_attachment"})
# Data and noise, of one shape.
Batch = tuple[Tensor, Tensor]
# A check raises AssertionError with what it found. A contract lists the checks of each point by its number.
Check = Callable[[Any], None]
Contract = Mapping[int, tuple[Check, ...]]


@dataclass(frozen=True)
class Terms:
    """What a host makes of one training step.

    Args:
        loss: what the host differentiates, (B,) or the batch's mean.
        mse: the part (B,) of it that a policy weighs; None if no check needs it.
        vb: the part (B,) that a policy of scope "mse" leaves alone.
        reported: other terms of the host. A policy changes none of them.
    """

    loss: Tensor
    mse: Tensor | None = None
    vb: Tensor | float = 0.0
    reported: Mapping[str, Tensor] = field(default_factory=dict)


class Seam(ABC):
    """How one host is made, trained and sampled from."""

    # What has to hold.
    contract: ClassVar[Contract]
    shape: tuple[int, ...]
    # Policies whose weights are checked.
    policies: tuple[Any, ...] = (POLICY,)
    # How often a training step calls the model.
    num_losses = 1
    # Whether a training call draws too; if not, a call before it does.
    draws_in_the_call = True
    # The dtype of data and model in a whole training.
    dtype = torch.float32
    # The policy under checkpoint(use_reentrant=True); None is one that learns.
    reentrant_policy: Any = None
    # The number of the unet, in an object with several: each has random numbers of its own.
    part = 0
    # Attributes that an object has with a policy only.
    added = ATTACHED

    @abstractmethod
    def make(self) -> Any:
        """The host's own object, as its trainer makes it."""

    @abstractmethod
    def train(self, host: Any, model: Any, batch: Batch, t: Tensor | None = None) -> Terms:
        """One training step, called as the host's trainer calls it.

        Args:
            host: from `make` or `attached`.
            model: from `model`, or a wrapper around it.
            batch: data and noise.
            t: timesteps (B,) to train at; None leaves them to the host, or to its policy.
        """

    @abstractmethod
    def sample(self, host: Any) -> Tensor:
        """A sample by the host's own sampler, from the global generator."""

    def attached(self, policy: Any = POLICY, generator: torch.Generator | None = None) -> Any:
        """The host's object with a policy. The generator is for its draws; None is the global one."""
        return with_policy(self.make(), policy, generator=generator)

    def model(self, host: Any, dtype: torch.dtype = torch.float32) -> Any:
        """What the host trains: a new model, or its own."""
        return SmallModel().to(dtype)

    def batch(self, dtype: torch.dtype = torch.float32) -> Batch:
        """Fixed data in [-1, 1] and noise."""
        generator = torch.Generator().manual_seed(5)
        x, noise = (torch.randn(self.shape, generator=generator) for _ in range(2))
        return x.clamp(-1, 1).to(dtype), noise.to(dtype)

    def rows(self, num: int) -> Batch:
        """Many small rows of data, float32 zeros."""
        x = torch.zeros(num, *self.shape[1:-1], 1, dtype=torch.float32)
        return x, x

    def policy(self, name: Any = POLICY) -> TimestepPolicy:
        """A policy for this host, built without the plugin's adapter."""
        host = self.make()
        return build_policy(name, schedule_of(host), prediction_type_of(host))

    def drawn(self, host: Any, policy: Any, model: Any) -> TimestepDraw:
        """The draw that a step should have had: from a policy of our own and the same seed."""
        built = self.policy(policy)
        built.observe(self.as_the_model_sees(self.batch()[0]))
        return built.draw(self.shape[0], generator=seeded())

    def as_the_model_sees(self, x: Tensor) -> Tensor:
        """The data of a batch, without their gradient, as the host noises them."""
        return x.detach()

    def hosts_t(self, draw: TimestepDraw, model: Any) -> Tensor:
        """The t (B,) at which the host trains for a draw."""
        return draw.index

    def sees(self, host: Any, draw: TimestepDraw, seen: Tensor) -> bool:
        """Whether the model saw the t (B,) of a draw."""
        return torch.equal(seen.to(draw.index.dtype), draw.index)

    def holder(self, host: Any) -> Any:
        """What has the policy and its state: the host's object, or what the plugin put beside it."""
        return host

    def chosen(self, host: Any, model: Any) -> Tensor | None:
        """The bins (B,) of the last t, if the host draws it itself; None if the policy does."""
        return None

    def evaluations(self, host: Any) -> Iterator[AbstractContextManager[Any]]:
        """Contexts in which the host computes a loss as in a validation."""
        yield torch.no_grad()

    def idle(self) -> Any:
        """A host's object with a policy, made to sample."""
        return self.attached("p2")

    def is_idle(self, host: Any) -> bool:
        """Whether no training call of an object was counted so far."""
        return bool(attachment_of(host).num_calls == 0)

    def is_unused(self, host: Any) -> bool:
        """Whether an object that only sampled did not use its policy."""
        return self.is_idle(host)


@dataclass(frozen=True)
class Step:
    """A training step: the host's object, its model, its terms, the policy's draw and the host's t for it."""

    host: Any
    model: Any
    terms: Terms
    draw: TimestepDraw
    t: Tensor


def trained(seam: Seam, policy: Any = POLICY, dtype: torch.dtype = torch.float32) -> Step:
    """One training step of a new object with a policy, from a fixed seed."""
    new_process()
    host = seam.attached(policy, seeded())
    model = seam.model(host, dtype)
    torch.manual_seed(7)
    terms = seam.train(host, model, seam.batch(dtype))
    draw = seam.drawn(host, policy, model)
    return Step(host, model, terms, draw, seam.hosts_t(draw, model))


def replayed(seam: Seam, step: Step, host: Any = None, dtype: torch.dtype = torch.float32) -> Step:
    """The host's own step at the t, data and noise of another step; `host` is a new object if None."""
    host = seam.make() if host is None else host
    model = seam.model(host, dtype)
    torch.manual_seed(7)
    return replace(step, host=host, model=model, terms=seam.train(host, model, seam.batch(dtype), step.t))


def new_process() -> None:
    """Streams of draws are numbered from 0 again, as in a process that has just started."""
    draw_stream._numbers = itertools.count()


def seeded() -> torch.Generator:
    """A generator for draws, from a fixed seed."""
    return torch.Generator().manual_seed(7)


def gradient(model: nn.Module) -> Tensor | None:
    """The gradients of a model's parameters in one row; None if there are none."""
    found = [each.grad.flatten() for each in model.parameters() if each.grad is not None]
    return torch.cat(found) if found else None


def refused(action: Callable[[], object], wanted: str, error: type[Exception] = ValueError) -> None:
    """Raises AssertionError unless an action raises this type of error with this text in its message."""
    message = "nothing"
    try:
        action()
    except error as raised:
        message = str(raised)
    assert wanted in message, f"wanted an error with {wanted!r}, got {message}"
