"""Seam C: the host draws with `t, weights = schedule_sampler.sample(n, device)`.

guided-diffusion and MDT multiply the whole loss by the sampler's weights, the variational term included. A
policy of scope "loss" gives the sampler such weights. If a policy weighs the mse alone, the sampler returns
weight 1, and the diffusion object weighs the mse at the t that it is given.

Dims: T timesteps, B batch.
"""

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speedit_plugins.hosts.attachment import (
    Attachment,
    LastDraw,
    PolicyHolder,
    attach,
    refuse_attached,
)
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.draws.observation import observe, refuse_missing_data
from speedit_plugins.hosts.draws.recomputation import is_recomputing, refuse_checkpoint
from speedit_plugins.hosts.draws.waiting_draws import MAX_WAITING, are_equal
from speedit_plugins.hosts.draws.weighted_loss import is_constant
from speedit_plugins.hosts.entry import no_seam, refuse_beside_built
from speedit_plugins.hosts.objects.diffusion_object import fits, policy_for, steered_methods
from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy
from speedit_plugins.registry import Config


def schedule_sampler(
    diffusion: Any,
    policy: str | Config | TimestepPolicy = "recommended",
    *,
    host_class: type = object,
    prediction_type: str | None = None,
    generator: torch.Generator | None = None,
    ranks_alike: int | None = None,
    num_strata: int | None = None,
) -> "PolicySampler":
    """A schedule sampler that draws by a policy. Weights of the mse go into the diffusion object.

    Args:
        diffusion: the object that the host trains with.
        policy: see `build_policy`; or a policy built for this object's number of timesteps.
        host_class: base class of the sampler. A host that asks for an instance takes its ScheduleSampler. A
            host that reports losses to its LossAwareSampler alone takes that, for a policy of scope "loss"
            that learns.
        prediction_type: see `with_policy`.
        generator, ranks_alike, num_strata: of the draws, see `with_policy`.

    Raises:
        ValueError: the object has a policy already (it would draw again), has no `training_losses` that takes
            t, has another T, or says that its model predicts something else; or `prediction_type` is given
            beside a built policy.

    Warns:
        UserWarning: the host weighs its mse, and the policy's weights multiply on top.
    """
    refuse_attached(diffusion)
    refuse_beside_built(policy, prediction_type)
    if not fits(diffusion):
        raise ValueError(no_seam(diffusion))
    policy = policy_for(diffusion, policy, prediction_type)
    _warn_if_weighted(diffusion, policy)
    attachment = None
    if policy.scope == "loss" and policy.needs_data:
        refuse_missing_data(policy, "a schedule sampler sees them only for a policy of scope 'mse'")
    if policy.scope == "mse":
        attachment = GivenTimesteps(policy)
        attach(diffusion, attachment, steered_methods)
    stream = DrawStream(generator, ranks_alike=ranks_alike, num_strata=num_strata)
    stream.check(policy)
    sampler: PolicySampler = _sampler_class(host_class)(policy, attachment, stream)
    return sampler


class PolicySampler(PolicyHolder):
    """The sampler that the host calls; `schedule_sampler` makes it.

    Args:
        policy: draws; it weighs here if its scope is "loss".
        attachment: weighs in the diffusion object if the policy's scope is "mse", else None.
        stream: of random numbers for the draws.
    """

    def __init__(
        self, policy: TimestepPolicy, attachment: "GivenTimesteps | None", stream: DrawStream
    ) -> None:
        self.policy = policy
        self._attachment = attachment
        self._stream = stream
        self._num_drawn = self._num_told = 0

    def state_dict(self) -> dict[str, Any]:
        """The policy's state."""
        return self.policy.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned. Raises ValueError for the state of another policy."""
        self.policy.load_state_dict(state)

    def sample(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Timesteps int64 (B,), and the factors float32 (B,) by which the host multiplies its whole loss.

        Without gradients, as in a validation, these are the host's: uniform timesteps from numpy's global
        generator, and factors of 1. So draw with gradients enabled in training. A policy of scope "mse"
        refuses the training loss of a draw without.

        Raises:
            ValueError: the loss of the first batch was not weighed: the host calls another loss. Or the
                policy learns from losses, and the host did not tell that of the first batch.
        """
        refuse_checkpoint()
        if not torch.is_grad_enabled():
            if self._attachment is not None:
                self._attachment.last_draw.drawn_by_host()
            return _hosts_uniform(len(self.policy.density), batch_size, device)
        if self._num_drawn:
            self._check_loss_of_first()
        self.policy.advance()
        self._num_drawn += 1
        draw = self._stream.draw(self.policy, batch_size, device)
        if self._attachment is not None:
            self._attachment.add(draw.index)
        return draw.index, torch.ones_like(draw.weight) if draw.scope == "mse" else draw.weight

    def _check_loss_of_first(self) -> None:
        if self._attachment is not None and not self._attachment.last_draw.num_used:
            raise ValueError(
                f"the host drew twice and never called training_losses, where {self.policy.name!r} weighs"
                " the mse; wanted a policy of scope 'loss' or a constant weighting"
            )
        if self._attachment is None and self.policy.learns and not self._num_told:
            raise ValueError(
                f"the host drew twice and told no loss, from which {self.policy.name!r} learns: guided-"
                "diffusion and MDT tell theirs to their LossAwareSampler alone; pass it as host_class"
            )

    def weights(self) -> Any:
        """How often each timestep is drawn, numpy (T,). The host's base class demands this method.

        `sample` does not use it. The host's own `sample` would divide the weights by the density again.
        """
        return self.policy.density.numpy()

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Tells a learning policy of scope "loss" the host's losses (B,). In scope "mse" the object does."""
        if self._attachment is None:
            self.policy.update(local_ts, local_losses.detach())
            self._num_told += 1

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """The same for lists. The host's base class demands it; our policies gather the ranks themselves."""
        self.update_with_local_losses(torch.tensor(ts), torch.tensor(losses))


class GivenTimesteps(Attachment):
    """Weighs the loss at the t that the host passes; draws nothing.

    A sampler draws before the host passes its data. So a policy observes the data of a training call for the
    next draw, once for each draw.
    """

    def __init__(self, policy: TimestepPolicy) -> None:
        super().__init__(policy)
        self.last_draw = LastDraw()
        # Timesteps of the last draws, and the policy's weights (T,) then.
        self._drawn: deque[tuple[Tensor, Tensor]] = deque([(torch.empty(0), policy.weight)], MAX_WAITING)

    def add(self, index: Tensor) -> None:
        """The sampler has drawn (B,). All losses of this draw have the policy's weights as they are now."""
        self.last_draw.drawn()
        self._drawn.append((index, self.policy.weight))

    def _weight_at(self, t: Tensor) -> Tensor:
        """The weights (T,) at the draw of these timesteps (B,); for a part of a batch, at the last draw."""
        tables = [table for _, table in self._drawn]
        if all(table is tables[-1] for table in tables):
            return tables[-1]
        # From the newest on. Values are compared only where no tensor is the same.
        drawn = [*reversed(self._drawn)]
        same = [table for index, table in drawn if index is t]
        equal = (table for index, table in drawn if are_equal(index, t))
        return same[0] if same else next(equal, tables[-1])

    def draw(
        self,
        t: Tensor,
        data: Tensor | None = None,
        *,
        observed: Tensor | None = None,
        is_drawn: bool = True,
    ) -> TimestepDraw:
        """The host's own t (B,), with our weights (B,). Raises ValueError if the host drew last."""
        if is_recomputing():
            recomputed: TimestepDraw = self._recent.of_recomputed(t, data)
            return recomputed
        if not self.last_draw.is_used:
            observe(self.policy, data if observed is None else observed)
        self.last_draw.used()
        index = t.long()
        weight = self._weight.at(self._weight_at(t), index)
        draw = TimestepDraw(index, (index + 0.5) / len(self.policy.weight), weight, self.policy.scope)
        self._recent.add(draw, t, data)
        return draw


def built_in_weights(diffusion: Any, index: Tensor) -> Tensor:
    """The factors (B,) by which a host's own training loss multiplies the squared error at some timesteps.

    If noise and x_0 are 1 and the model returns 0, the squared error of an epsilon or x_0 loss is exactly 1,
    and the host's mse is its factor. This takes no random number.

    Args:
        diffusion: has `training_losses(model, x_start, t, noise=...)`.
        index: timesteps int64 (B,).
    """
    learns_sigma = "LEARNED" in str(getattr(diffusion, "model_var_type", ""))
    x_0 = torch.ones(len(index), 1, 1, 1)

    def silent(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros(len(x), 2 if learns_sigma else 1, 1, 1)

    terms = diffusion.training_losses(silent, x_0, index, noise=torch.ones_like(x_0))
    mse: Tensor = terms["mse"]
    return mse


def _hosts_uniform(T: int, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Uniform timesteps (B,) and weights of 1, from the same random numbers as the host's uniform sampler."""
    drawn = np.random.choice(T, size=(batch_size,), p=np.full(T, 1 / T))  # noqa: NPY002 - as the host
    return torch.from_numpy(drawn).long().to(device), torch.ones(
        batch_size, dtype=torch.float32, device=device
    )


def _warn_if_weighted(diffusion: Any, policy: TimestepPolicy) -> None:
    last = policy.schedule.num_timesteps - 1
    index = torch.tensor([0, last // 8, last // 2, last])
    is_known = any(name in str(getattr(diffusion, "model_mean_type", "")) for name in ("EPSILON", "START_X"))
    has_mse = "KL" not in str(getattr(diffusion, "loss_type", ""))
    if not (is_known and has_mse) or is_constant(policy.weight):
        return
    factors = built_in_weights(diffusion, index)
    # A model that returns 0 leaves the squared error at 1, up to rounding.
    if not torch.allclose(factors, torch.ones_like(factors), atol=1e-5, rtol=0):
        shown = ", ".join(f"{float(w):.3g} at t = {int(t)}" for t, w in zip(index, factors, strict=True))
        warnings.warn(
            f"{type(diffusion).__module__} weighs its mse already ({shown}; Min-SNR 5 in MDT): the weights of"
            f" {policy.name!r} multiply on top; a policy with weighting='constant' leaves the host's alone",
            stacklevel=3,
        )


@cache
def _sampler_class(host_class: type) -> Callable[..., PolicySampler]:
    if host_class is object:
        return PolicySampler
    # Our class comes first: it replaces the host's `sample` and `weights`, and has its abstract methods.
    return type("PolicySampler", (PolicySampler, host_class), {"__module__": __name__})
