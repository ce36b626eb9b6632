"""Densities computed from the losses of the training, over log-SNR.

They read a `LossProfile`. Before it knows enough, they draw uniformly over the timesteps.

Dims: T timesteps, N losses.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from speedit_plugins.policies.densities.adaptive import AdaptiveDensity
from speedit_plugins.policies.densities.cumulative import log_snr_edges, with_pure_noise
from speedit_plugins.policies.densities.density import Density
from speedit_plugins.policies.densities.loss_profile import LossProfile, ProfiledTable, finite_log_snr
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.weightings import conversion
from speedit_plugins.registry import DENSITIES

# The cleanest noise-to-signal ratio of EDM's range (Karras et al. 2022, arXiv:2206.00364), on which InfoNoise
# chose the threshold of its onset rule.
_CLEAN_END = 0.002


class _ProfiledDensity(AdaptiveDensity):
    """A density computed from the loss profile, mixed with uniform draws.

    The learned law's share of the draws rises to 1 - uniform_floor over the first `warmup_losses` losses.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        uniform_floor: float,
        warmup_losses: int,
        refresh_updates: int,
        num_bins: int,
        window: int,
    ) -> None:
        if not (0 < uniform_floor <= 1 and warmup_losses >= 0):
            raise ValueError(
                "a learned density needs uniform_floor in (0, 1] and warmup_losses >= 0,"
                f" got {uniform_floor} and {warmup_losses}"
            )
        self._schedule = schedule
        self._floor = uniform_floor
        self._warmup_losses = warmup_losses
        profile = LossProfile(schedule, num_bins=num_bins, window=window)
        self._learned = ProfiledTable(profile, _uniform(schedule), self._mixed, refresh_updates)

    def _law(self, loss: Tensor) -> Tensor:
        """The learned law (T,), >= 0 and in any scale, for the mean loss at each timestep (T,)."""
        raise NotImplementedError

    def _mixed(self, loss: Tensor) -> Tensor:
        seen = self._learned.profile.num_losses
        share = (1 - self._floor) * (min(1.0, seen / self._warmup_losses) if self._warmup_losses else 1.0)
        return share * Density(self._law(loss)).table + (1 - share) * _uniform(self._schedule)

    def density(self) -> Density:
        return Density(self._learned.table)

    def update(self, index: Tensor, loss: Tensor) -> bool:
        return self._learned.update(index, loss)

    def state_dict(self) -> dict[str, Any]:
        return self._learned.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._learned.load_state_dict(state)


class LossBalanced(_ProfiledDensity):
    """VDM++'s adaptive law: draws in proportion to weight times expected loss, so p w L is even.

    The paper draws p(log-SNR) ~ w(log-SNR) E[loss], and divides the loss by p, so that the objective stays
    and only its noise falls: with the weighting `inverse_density`, this does the same. Here w is what the
    host's own objective gives each log-SNR: uniform draws of its loss weigh log-SNR by |dt / d log-SNR|,
    which cancels, and the law over timesteps is p(t) ~ E[loss at t].
    Source: Kingma & Gao 2023, arXiv:2303.00848, adaptive noise schedule.

    Differences from the paper: the robust mean of `LossProfile` in place of a plain exponential average;
    interpolation between bins; a share of uniform draws. Any prediction type will do, because it is the
    model's own loss that counts.

    Args:
        over: "time" is p(t) ~ E[loss at t], as above. "log_snr" weighs every log-SNR alike: p(log-SNR) ~
            E[loss at log-SNR], the paper's bound if the model predicts epsilon.
        uniform_floor: share of the draws that stays uniform over the timesteps, in (0, 1].
        warmup_losses: losses over which the learned law takes over from uniform draws, >= 0.
        refresh_updates: updates from one table to the next, >= 1.
        num_bins: see `LossProfile`.
        window: see `LossProfile`.

    Raises:
        ValueError: a parameter out of range.

    Example:
        >>> learned = LossBalanced(
        ...     NoiseSchedule.cosine(2), uniform_floor=0.1, warmup_losses=0, refresh_updates=1
        ... )
        >>> learned.update(torch.tensor([0, 1]).repeat(8), torch.tensor([1.0, 3.0]).double().repeat(8))
        True
        >>> learned.density().table.round(decimals=4).tolist()
        [0.275, 0.725]
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        over: Literal["time", "log_snr"] = "time",
        uniform_floor: float = 0.05,
        warmup_losses: int = 5_000,
        refresh_updates: int = 8,
        num_bins: int = 40,
        window: int = 512,
    ) -> None:
        if over not in ("time", "log_snr"):
            raise ValueError(f"loss_balanced needs over='time' or 'log_snr', got {over!r}")
        self._over = over
        super().__init__(
            schedule,
            uniform_floor=uniform_floor,
            warmup_losses=warmup_losses,
            refresh_updates=refresh_updates,
            num_bins=num_bins,
            window=window,
        )

    def _law(self, loss: Tensor) -> Tensor:
        return loss if self._over == "time" else over_log_snr(self._schedule, loss)


class InfoNoise(_ProfiledDensity):
    """InfoNoise: draws where observing the noisy sample resolves most about the clean one.

    By the I-MMSE identity the conditional entropy of x_0 changes per unit log-SNR by half the squared error
    of the best prediction of epsilon. That error is estimated from the training's own losses, whatever the
    model predicts. At the clean end it does not fall, so the draws would spread over all clean log-SNR. A
    gate cuts them there: p(log-SNR) ~ rate * s^n / (s^n + c^n), with the noise-to-signal ratio s.
    Source: Raya et al. 2026, arXiv:2602.18647, equations 13 to 15, appendix B (n = 3, threshold 0.002).

    Differences from the paper: its second version divides p by the loss weight (`divide_by_weight`), its
    first version and the trainers that ship it do not; one robust running mean in place of a buffer and an
    average across refreshes; uniform draws in place of a tuned law during the warm-up, which ends gradually;
    a share of uniform draws. The gate's threshold holds for EDM's range of noise: on a schedule that ends
    before its cleanest level, the rate is continued to it.

    The loss needs to be a mean over the values of a sample, or proportional to it. A host's variational term
    raises the rate at the clean end, and so moves the gate.

    Args:
        prediction_type: what the model predicts. None is the usual type of the schedule.
        gate: noise-to-signal ratio c at which the gate halves the draws, >= 0. 0 opens it. None takes the
            noisiest ratio s at which rate / s still reaches `onset` times its maximum.
        gate_power: n, how steeply the gate closes, > 0.
        onset: threshold of the gate's rule, in (0, 1).
        divide_by_weight: divide p by the weight of the squared error of x_0 in the host's loss, so that draws
            times weight follow the rate: 1 for x_0, SNR for epsilon, SNR + 1 for v, 1 / t^2 for a flow. The
            policy's own weighting is not part of it.
        uniform_floor: share of the draws that stays uniform over the timesteps, in (0, 1].
        warmup_losses: losses over which the learned law takes over from uniform draws, >= 0. The losses of an
            untrained model say nothing about the data.
        refresh_updates: updates from one table to the next, >= 1.
        num_bins: see `LossProfile`.
        window: see `LossProfile`.

    Raises:
        ValueError: a parameter out of range, or an unknown `prediction_type`.

    Example:
        >>> schedule = NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.1])  # log-SNR ln 9, 0 and -ln 9
        >>> learned = InfoNoise(schedule, "epsilon", gate=0.0, warmup_losses=0, refresh_updates=1)
        >>> index, loss = torch.tensor([0, 1, 2]).repeat(8), torch.tensor([0.9, 0.5, 0.1]).repeat(8)
        >>> learned.update(index, loss.double())
        True
        >>> bool(learned.density().table.argmax() == 1)  # its half of the log-SNR has the rate 0.25
        True
    """

    def __init__(  # noqa: PLR0913 (each is a number of the paper or of the running mean)
        self,
        schedule: NoiseSchedule,
        prediction_type: str | None = None,
        *,
        gate: float | None = None,
        gate_power: float = 3.0,
        onset: float = 0.002,
        divide_by_weight: bool = False,
        uniform_floor: float = 0.05,
        warmup_losses: int = 20_000,
        refresh_updates: int = 8,
        num_bins: int = 40,
        window: int = 512,
    ) -> None:
        if not ((gate is None or 0 <= gate < math.inf) and 0 < gate_power < math.inf and 0 < onset < 1):
            raise ValueError(
                "info_noise needs gate >= 0, gate_power > 0 and onset in (0, 1),"
                f" got {gate}, {gate_power} and {onset}"
            )
        self._gate, self._gate_power, self._onset = gate, gate_power, onset
        self._noise_to_signal = (-finite_log_snr(schedule) / 2).exp()
        self._to_epsilon = conversion.error_of_epsilon(schedule, prediction_type)
        # The weight of x_0's error is SNR / to_epsilon, and 0 / 0 where the SNR is 0.
        is_divided = divide_by_weight and bool((schedule.snr > 0).any())
        weight = schedule.snr / self._to_epsilon if is_divided else torch.ones_like(schedule.snr)
        self._weight = weight.where(schedule.snr > 0, 1.0)
        super().__init__(
            schedule,
            uniform_floor=uniform_floor,
            warmup_losses=warmup_losses,
            refresh_updates=refresh_updates,
            num_bins=num_bins,
            window=window,
        )

    def _law(self, loss: Tensor) -> Tensor:
        rate = loss * self._to_epsilon / 2
        ratio = self._noise_to_signal
        pivot = self._gate_pivot(rate) if self._gate is None else self._gate
        open_share = 1 / (1 + (pivot / ratio) ** self._gate_power)
        return over_log_snr(self._schedule, rate * open_share / self._weight)

    def _gate_pivot(self, rate: Tensor) -> float:
        """The noise-to-signal ratio c of the onset rule, for the entropy's rate per log-SNR (T,)."""
        # Per unit noise-to-signal ratio, the rate is that per log-SNR divided by the ratio, but for a factor.
        per_ratio = rate / self._noise_to_signal.clamp(min=_CLEAN_END)
        largest = per_ratio.max().maximum(rate[0] / _CLEAN_END)
        ratio = self._noise_to_signal
        return float(ratio.where(per_ratio >= self._onset * largest, ratio[0]).max())


def over_log_snr(schedule: NoiseSchedule, law: Tensor) -> Tensor:
    """Table (T,), sum 1, of a law per unit log-SNR, >= 0 and in any scale, given at each timestep (T,).

    Each timestep has the log-SNR between the midpoints to its neighbours. A timestep with SNR 0 gets 1 / T.

    Example:
        >>> schedule = NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.1])  # log-SNR ln 9, 0 and -ln 9
        >>> over_log_snr(schedule, torch.ones(3)).round(decimals=6).tolist()
        [0.25, 0.5, 0.25]
    """
    log_snr = schedule.log_snr[schedule.snr > 0]
    if not len(log_snr):
        return _uniform(schedule)
    shares = law[: len(log_snr)] * -log_snr_edges(log_snr).diff()
    total = shares.sum()
    return with_pure_noise(schedule, shares / total).table if total > 0 else _uniform(schedule)


def _uniform(schedule: NoiseSchedule) -> Tensor:
    return torch.full_like(schedule.alpha, 1 / schedule.num_timesteps)


DENSITIES.register_module(name="loss_balanced", module=LossBalanced)
DENSITIES.register_module(name="info_noise", module=InfoNoise)
