"""Contrastive flow matching: a prediction is also kept away from the target of another sample.

Dims: `B` samples, `C` channels.
"""

from dataclasses import replace

from speedit_plugins.trainer.accelerations.objective import Acceleration, Outcome
from speedit_plugins.trainer.build import Process
from speedit_plugins.trainer.diffusion.gaussian_process import LossTerms


class ContrastiveFlow(Acceleration):
    """Subtracts the squared distance to the next sample's target from the loss, times `weight`.

    The policy's weight of the timestep scales both. It costs no call of the model.

    Source: Stoica et al. 2025, arXiv:2506.05350, equation 6.

    Args:
        process: splits the prediction from its variance channels.
        weight: in (0, 1); the paper takes 0.05.
    """

    def __init__(self, process: Process, *, weight: float) -> None:
        self._process, self._weight = process, weight

    def terms(self, outcome: Outcome, terms: LossTerms) -> LossTerms:
        """The losses less those to the next sample's target.

        Raises:
            ValueError: the rank has a single sample.
        """
        if len(terms.loss) < 2:
            raise ValueError(
                "contrastive.weight needs two samples on each rank, got data.batch_size 1 for each process"
            )
        mean = self._process.compared(outcome.prediction, outcome.noised)
        # The loader shuffles, so the next sample is a random other one.
        other = outcome.noised.target.roll(1, dims=0)
        apart = (mean - other).square().flatten(1).mean(1)  # (B,)
        weight = outcome.draw.weight.to(apart.dtype)
        return replace(terms, loss=terms.loss - self._weight * weight * apart)
