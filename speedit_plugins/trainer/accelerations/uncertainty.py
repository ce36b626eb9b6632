"""Losses divided by a learned estimate of themselves, so that every noise level weighs the same.

Dims: `B` samples, `K` features.
"""

import math
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedit_plugins.trainer.accelerations.objective import Acceleration, Outcome
from speedit_plugins.trainer.build import Process
from speedit_plugins.trainer.diffusion.flow import TIMESTEP_SCALE, RectifiedFlow
from speedit_plugins.trainer.diffusion.gaussian_process import LossTerms, Noised
from speedit_plugins.trainer.models.training_only import add_layer, layers_of

LAYER = "uncertainty"


class UncertaintyHead(nn.Module):
    """u, the log of the expected loss at a noise level: (B,) log-SNR -> (B,).

    A linear layer, zero at first, on cosines over the process's range of log-SNR.

    Source: Karras et al. 2024 (EDM2), arXiv:2312.02696. There the features have random frequencies; here they
    are the half-range cosine series, which is complete on an interval.

    Args:
        lowest: smallest log-SNR, finite. What lies outside of the range is taken for its end.
        highest: largest log-SNR, above `lowest`.
        num_features: K. EDM2 has 128.
    """

    def __init__(self, lowest: float, highest: float, *, num_features: int = 128) -> None:
        super().__init__()
        self._lowest, self._highest, self._num_features = lowest, highest, num_features
        self.linear = nn.Linear(num_features, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, log_snr: Tensor) -> Tensor:
        place = (log_snr.clamp(self._lowest, self._highest) - self._lowest) / (self._highest - self._lowest)
        order = torch.arange(1, self._num_features + 1, device=place.device)
        features = math.sqrt(2) * torch.cos(math.pi * place.unsqueeze(1) * order)  # (B, K), of mean square 1
        weight = self.linear.weight
        return F.linear(features.to(weight.dtype), weight, self.linear.bias).squeeze(1).float()


class LearnedUncertainty(Acceleration):
    """Trains on loss / exp(u) + u, where u is learned and follows the log of the loss at the noise level.

    The loss is that of the prediction with the policy's weight in it. The variational term of a learned
    variance is added as it is: it trains other channels, and no weight is applied to it elsewhere either.
    What earlier accelerations changed in the loss is divided by exp(u) too, but does not teach u.

    Source: Karras et al. 2024 (EDM2), arXiv:2312.02696, after Kendall et al. 2018, arXiv:1705.07115.

    Args:
        model: gets the head as a layer that only its training has.
        process: gives the range of log-SNR.
    """

    def __init__(self, model: nn.Module, process: Process) -> None:
        self._process, self._model = process, model
        finite = process.schedule.log_snr[process.schedule.log_snr.isfinite()]
        head = UncertaintyHead(float(finite.min()), float(finite.max()))
        device = next(model.parameters()).device
        add_layer(model, LAYER, head.to(device))

    def terms(self, outcome: Outcome, terms: LossTerms) -> LossTerms:
        """The losses with the prediction's part divided by exp(u), plus u."""
        u = cast(Tensor, layers_of(self._model)[LAYER](log_snr(self._process, outcome.noised)))
        weight = outcome.draw.weight.to(terms.mse.dtype)
        bound = 0.0 if terms.bound is None else terms.bound
        measured = (weight * terms.mse).detach()
        # Zero, with the gradient of measured / exp(u) + u.
        lesson = measured * torch.exp(-u) + u
        lesson = lesson - lesson.detach()
        divided = (terms.loss - bound) * torch.exp(-u.detach()) + u.detach()
        return replace(terms, loss=divided + bound + lesson)


def log_snr(process: Process, noised: Noised) -> Tensor:
    """The log of alpha^2 / sigma^2 of each sample, float32 (B,)."""
    if isinstance(process, RectifiedFlow):
        # The time itself: a row of the schedule is a bin of times.
        t = noised.timestep / TIMESTEP_SCALE
        return 2 * (torch.log1p(-t) - torch.log(t))
    tables = process.tables(noised.index.device)
    return (2 * (tables.alpha.log() - tables.sigma.log())).float()[noised.index]
