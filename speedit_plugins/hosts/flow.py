"""Flow matching: the host draws t itself, and a policy replaces its draws or thins them.

A policy that has a law of its own replaces the host's draw, its shift included; a policy whose density only
says how much rarer some timesteps become (`uniform`, `thinned`, `asymmetric`) keeps the host's law and thins
it. `Density.is_relative` tells which it is.

To thin is to refuse some draws. A host that draws t with density p then trains at p(t) * acceptance(t),
normalised. `FlowThinning` refuses 1 - 1/k of the draws in the convergence area. On a straight path x_t
changes at a constant rate, so the SNR tells where that area begins.

Dims: T timesteps, B batch.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.attachment import Attachment, TableOnDevices
from speedit_plugins.hosts.draws.draw_stream import DrawStream, draws_pairs
from speedit_plugins.hosts.draws.recomputation import RecentCalls, is_recomputing
from speedit_plugins.hosts.draws.weighted_loss import is_constant
from speedit_plugins.hosts.states.booster_checkpoints import booster_states, keep_in_boosters
from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy
from speedit_plugins.policies.schedule import CONVERGENCE_SNR

# If one draw in a hundred is accepted, a t is refused this often with probability e^-100.
MAX_PASSES = 10_000


def draw_by_rejection(
    hosts_draw: Callable[[], Tensor],
    acceptance: Callable[[Tensor], Tensor],
    generator: torch.Generator | None = None,
) -> Tensor:
    """A batch of t with density p(t) * acceptance(t). The host's next draw replaces one that is refused.

    Args:
        hosts_draw: returns a batch with density p, shape (B,); each position is i.i.d. from call to call.
        acceptance: for a batch of t the probability in (0, 1] of keeping each, shape (B,).
        generator: for the refusals, on the device of t; None is that device's global one.

    Returns:
        Values of `hosts_draw`, in its dtype, shape (B,). What is kept stays at its position.

    Raises:
        ValueError: a position was refused `MAX_PASSES` times, or the generator is of another device.
    """

    def refused(t: Tensor) -> Tensor:
        # In float32, whatever the default: bfloat16 resolves only 8 bits.
        coin = torch.rand(t.shape, device=t.device, dtype=torch.float32, generator=generator)
        return coin >= acceptance(t)

    t = hosts_draw()
    if generator is not None and generator.device.type != t.device.type:
        raise ValueError(f"thinning on {t.device} needs a generator there, got one on {generator.device}")
    again = refused(t)
    # On average a pass keeps a fixed share of the batch. The test costs a synchronisation in each pass.
    for _ in range(MAX_PASSES):
        if not again.any():
            return t
        t = torch.where(again, hosts_draw(), t)
        again = again & refused(t)
    raise ValueError(
        f"no t that the host drew in {MAX_PASSES} passes was kept: the policy's density is about 0 at every"
        " t that the host draws"
    )


def unshifted(time: Tensor, shift: Tensor | float) -> Tensor:
    """Time (B,) before a shift s > 0: the u of which s u / (1 + (s - 1) u) is `time`, both in [0, 1].

    Example:
        >>> unshifted(torch.tensor([0.0, 0.75, 1.0]), 3.0).tolist()
        [0.0, 0.5, 1.0]
    """
    return time / (shift - (shift - 1) * time)


@dataclass(frozen=True)
class HostsTime:
    """How a host counts its time in one training call.

    Args:
        time_of: turns the host's t (B,) into time in [0, 1], 1 is noise.
        t_of: turns a policy's draw (B,), and a t of the host, into a t of that dtype.
        shift: returns the shift s > 0 that the host's own draws have in this call; None if they have none. It
            may draw from the host's global generators.
    """

    time_of: Callable[[Tensor], Tensor]
    t_of: Callable[[TimestepDraw, Tensor], Tensor]
    shift: Callable[[], Tensor | float] | None = None

    def unshifted(self) -> Callable[[Tensor], Tensor]:
        """A function from the host's t (B,) to the time that it had before the host's shift."""
        if self.shift is None:
            return self.time_of
        shift = self.shift()
        return lambda t: unshifted(self.time_of(t), shift)


@dataclass(frozen=True)
class FlowThinning:
    """How a flow host's draws are thinned and its loss is weighed.

    Args:
        k: how many times rarer a t of the convergence area becomes; finite, >= 1. 1 keeps every draw.
        snr_boundary: SNR below which the convergence area begins; > 0.
        lam: largest of the change-aware weights, in [0.5, 1]; None weighs nothing.

    Raises:
        ValueError: a value is out of range.

    Warns:
        UserWarning: k = 1: nothing is thinned.
    """

    k: float = 5.0
    snr_boundary: float = CONVERGENCE_SNR
    lam: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.k < math.inf:
            raise ValueError(f"thinning a host's draw needs a finite k >= 1, got {self.k}")
        if not 0 < self.snr_boundary < math.inf:
            raise ValueError(f"the SNR boundary needs to be > 0 and finite, got {self.snr_boundary}")
        if self.lam is not None and not 0.5 <= self.lam <= 1:
            raise ValueError(
                f"the weights need lam in [0.5, 1] or None, got {self.lam}: they lie between 1 - lam and lam"
            )
        if self.k == 1:
            warnings.warn("k = 1 keeps the host's own draw: nothing is thinned", stacklevel=3)

    @property
    def boundary(self) -> float:
        """Time in (0, 1), 1 is noise, from which draws are thinned: ((1 - t) / t)^2 = snr_boundary."""
        return 1 / (1 + math.sqrt(self.snr_boundary))

    def draw(
        self,
        hosts_draw: Callable[[], Tensor],
        *,
        time_of: Callable[[Tensor], Tensor] = torch.Tensor.float,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A batch of the host's t, thinned. The host's next draw replaces one that is refused.

        Args:
            hosts_draw: returns the host's t, shape (B,); each position is i.i.d. from call to call.
            time_of: turns such t into time in [0, 1], 1 is noise, as the model sees it after any shift.
            generator: for the refusals, on the device of t; None is that device's global one.

        Returns:
            Values of `hosts_draw`, in its dtype, shape (B,). What is kept stays at its position. With k = 1
            they are those of its first call.
        """
        if self.k == 1:
            return hosts_draw()

        def acceptance(t: Tensor) -> Tensor:
            return 1 - (1 - 1 / self.k) * (time_of(t) > self.boundary).float()

        return draw_by_rejection(hosts_draw, acceptance, generator)

    def weight(self, time: Tensor) -> Tensor:
        """(1 - lam) + (2 lam - 1) (dv/dt) / 2 with v = sigma^2 / (alpha^2 + sigma^2); ones if lam is None.

        dv/dt = 2 t (1 - t) / (1 - 2t + 2t^2)^2 is largest at t = 1/2, where it is 2, and 0 at both ends.

        Args:
            time: in [0, 1], 1 is noise, shape (B,).

        Returns:
            Weights in [1 - lam, lam], float32 or wider, shape (B,).
        """
        time = time.to(torch.promote_types(time.dtype, torch.float32))
        if self.lam is None:
            return torch.ones_like(time)
        change = time * (1 - time) / (1 - 2 * time + 2 * time**2) ** 2
        return (1 - self.lam) + (2 * self.lam - 1) * change


class FlowAttachment(Attachment):
    """A policy for a host that draws a continuous t itself: it replaces the host's draw, or thins it.

    A policy with a law of its own draws t, in strata if it is told to. Any other thins: a t of the host is
    kept with the probability density / largest density. The weight is the one at the t that is trained on.

    Args:
        policy, stream: see `Attachment`.
        moves_boundary: if the host shifts its draws, whether they are thinned by what they were before the
            shift: the boundary of the policy then moves with it.
    """

    def __init__(
        self,
        policy: TimestepPolicy | Callable[[], TimestepPolicy],
        stream: DrawStream | None = None,
        *,
        moves_boundary: bool = False,
    ) -> None:
        super().__init__(policy, stream)
        self._moves_boundary = moves_boundary
        self._acceptance = TableOnDevices(_relative_to_largest)
        # The draw of the training call that runs now.
        self._draw: TimestepDraw | None = None

    def check(self, policy: TimestepPolicy) -> None:
        """Raises ValueError if the host cannot be drawn for by this policy, in this stream."""
        super().check(policy)
        if not policy.is_relative:
            return
        refuse_strata(self.stream, policy)
        if policy.stratified or draws_pairs(policy):
            how = "strata" if policy.stratified else "pairs"
            raise ValueError(
                f"{policy.name!r} draws in {how}, and it thins a flow host's own draws, which are refused one"
                " by one: take independent draws, such as 'speed', or a policy with a law of its own, such as"
                " 'spectral_flow'"
            )

    def draw_from(
        self,
        hosts_draw: Callable[[], Tensor],
        clock: HostsTime,
        *,
        t: Tensor,
        data: Tensor | None,
        observed: Tensor | None = None,
    ) -> Tensor:
        """The t (B,) to train at, in the host's dtype. `weighted_call` weighs the loss of this draw.

        Args:
            hosts_draw: returns the t (B,) that the model would see, i.i.d. from call to call. It draws from
                the host's global generators, which are this stream's meanwhile.
            clock: how the host counts its time.
            t: what the host has drawn in this call, (B,).
            data: of the batch, on the device that trains; None if the host does not show them. With t, it
                tells which call is computed again.
            observed: the data as the model sees them, which the policy observes; None is `data`.

        Raises:
            ValueError: see `draw_by_rejection`.
        """
        if not self.policy.is_relative:
            self._draw = self.draw(t, data, observed=observed)
            return clock.t_of(self._draw, t)
        if is_recomputing():
            recomputed: tuple[Tensor, TimestepDraw] = self._recent.of_recomputed(t, data)
            self._draw = recomputed[1]
            return recomputed[0]
        self.begin_step(data if observed is None else observed)
        device = t.device if data is None else data.device
        with self.stream.hosts_generators(self.policy.num_steps - 1, device):
            thinned, self._draw = self._thinned(hosts_draw, clock, t)
        self._recent.add((thinned, self._draw), t, data)
        return thinned

    def _thinned(
        self, hosts_draw: Callable[[], Tensor], clock: HostsTime, t: Tensor
    ) -> tuple[Tensor, TimestepDraw]:
        T = len(self.policy.density)

        def bins(time: Tensor) -> Tensor:
            return (time.float() * T).long().clamp(0, T - 1)

        # A flat density keeps the host's own draw: the run is the one without a policy.
        if not is_constant(self.policy.density):
            time_of = clock.unshifted() if self._moves_boundary else clock.time_of
            t = draw_by_rejection(
                hosts_draw, lambda t: self._acceptance.at(self.policy.density, bins(time_of(t)))
            )
        time = clock.time_of(t)
        return t, self.at(bins(time), time.float())

    def weighted_call(self, train: Callable[[], Any]) -> Any:
        """The terms of a host's training call, with weights in the loss (B,) for the t drawn during it.

        Raises:
            ValueError: the call drew no t, or returned no dict with a loss.
        """
        terms, draw = self.drawn_in(train)
        if draw is None or not isinstance(terms, Mapping) or "loss" not in terms:
            raise ValueError(
                "the host's training_losses draws its t elsewhere, or returns no dict with a loss: known to"
                " work are SiT, LightningDiT, VideoSys 2.0 and Open-Sora 1.2 and 1.3"
            )
        return {**terms, "loss": self.weighted_whole(terms["loss"], draw)}

    def drawn_in(self, train: Callable[[], Any]) -> tuple[Any, TimestepDraw | None]:
        """What a host's training call returns, and the draw (B,) that `draw_from` made during it, if any."""
        try:
            return train(), self._draw
        finally:
            self._draw = None


class ThinningAttachment:
    """A `FlowThinning` for a host that draws a continuous t itself, and a count of the training calls.

    Args:
        thinning: of the host's draws.
        stream: of random numbers, see `DrawStream`.
        moves_boundary: see `FlowAttachment`.
    """

    def __init__(self, thinning: FlowThinning, stream: DrawStream, *, moves_boundary: bool = False) -> None:
        refuse_strata(stream)
        # A host may load its checkpoint before it trains.
        booster_states()
        self._moves_boundary = moves_boundary
        self.thinning = thinning
        self.stream = stream
        self.num_calls = 0
        self._recent = RecentCalls()

    def draw(self, hosts_draw: Callable[[], Tensor], clock: HostsTime, t: Tensor, data: Tensor) -> Tensor:
        """The host's t (B,), thinned; see `FlowAttachment.draw_from`. With k = 1 it is the given one."""
        if is_recomputing():
            recomputed: Tensor = self._recent.of_recomputed(t, data)
            return recomputed
        keep_in_boosters(self)
        thinned = t
        if self.thinning.k > 1:
            with self.stream.hosts_generators(self.num_calls, data.device):
                time_of = clock.unshifted() if self._moves_boundary else clock.time_of
                thinned = self.thinning.draw(hosts_draw, time_of=time_of)
        self.num_calls += 1
        self._recent.add(thinned, t, data)
        return thinned

    def state_dict(self) -> dict[str, Any]:
        """The number of training calls."""
        return {"num_steps": self.num_calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned. Raises ValueError for the state of a policy."""
        if state.keys() != {"num_steps"}:
            raise ValueError(f"a thinned flow has the state num_steps alone, got {sorted(state)}")
        self.num_calls = int(state["num_steps"])


def refuse_strata(stream: DrawStream, policy: TimestepPolicy | None = None) -> None:
    """Raises ValueError if draws in strata are asked of a host whose own draws are thinned."""
    if stream.num_strata is not None:
        name = "its own thinning" if policy is None else repr(policy.name)
        raise ValueError(
            f"num_strata has no effect on a flow host with {name}, which refuses the host's own draws one by"
            " one: take a policy with a law of its own, such as 'spectral_flow' or 'logit_normal'"
        )


def _relative_to_largest(density: Tensor) -> Tensor:
    return density / density.max()
