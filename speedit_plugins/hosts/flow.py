"""Flow matching: a host's own draw of t, thinned where the noise the model sees is past the boundary.

On a straight path x_t changes at a constant rate, so the convergence area is found through the SNR: the
host's law p becomes p(t) * [1 if SNR(t) >= boundary else 1 / k], normalised.

Dims: B batch.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from speedit_plugins.core.schedule import CONVERGENCE_SNR


@dataclass(frozen=True)
class FlowThinning:
    """How a flow host's draw is thinned and its loss weighted.

    Args:
        k: how many times rarer a t of the convergence area becomes; finite, >= 1, 1 keeps the host's law.
        snr_boundary: the area begins where the SNR falls below this; > 0.
        lam: upper end of the change-aware weights, in [0.5, 1]; None weighs nothing.

    Raises:
        ValueError: a value out of range.

    Warns:
        UserWarning: k = 1, which thins nothing.
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
        """Time in (0, 1), 1 is noise, past which a draw is thinned: ((1 - t) / t)^2 = snr_boundary."""
        return 1 / (1 + math.sqrt(self.snr_boundary))

    def draw(
        self,
        hosts_draw: Callable[[], Tensor],
        *,
        num_timesteps: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A batch of the thinned law, by rejection: a refused t is replaced by the host's next one.

        Args:
            hosts_draw: returns what the model would see, shape (B,), 0 clean to `num_timesteps` noise; each
                position is i.i.d. from call to call.
            num_timesteps: the host's t of pure noise.
            generator: of the refusals, on the device of the draw; None is that device's global one.

        Returns:
            Values of `hosts_draw`, in its dtype and place, shape (B,). With k = 1 its first ones.
        """
        t = hosts_draw()
        if self.k == 1:
            return t
        refused = self._refused(t, num_timesteps, generator)
        # A pass keeps at least 1 / k of the batch on average; the test costs one synchronisation per pass.
        while refused.any():
            t = torch.where(refused, hosts_draw(), t)
            refused = refused & self._refused(t, num_timesteps, generator)
        return t

    def weight(self, time: Tensor) -> Tensor:
        """(1 - lam) + (2 lam - 1) (dv/dt) / 2 with v = sigma^2 / (alpha^2 + sigma^2); ones without lam.

        dv/dt = 2 t (1 - t) / (1 - 2t + 2t^2)^2 has its maximum, 2, at t = 1/2 and is 0 at both ends.

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

    def _refused(self, t: Tensor, num_timesteps: float, generator: torch.Generator | None) -> Tensor:
        # In float32 or wider: bfloat16 resolves only 8 bits of 1 / k.
        coin = torch.rand(t.shape, device=t.device, dtype=torch.float32, generator=generator)
        return (t > self.boundary * num_timesteps) & (coin >= 1 / self.k)
