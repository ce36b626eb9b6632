"""Open-Sora 1.2 and 1.3: the host's rectified flow with its own draw of t thinned by SNR.

`speedit_plugins.hosts.open_sora` registers it, where the host has a rectified flow.

Dims: B batch.
"""

import copy
import inspect
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from speedit_plugins.core.schedule import CONVERGENCE_SNR
from speedit_plugins.hosts.flow import FlowThinning

RFLOW: Any = import_module("opensora.schedulers").RFLOW

_TRAINING_LOSSES = inspect.signature(RFLOW.training_losses)
# 1.2 and 1.3 name the model's arguments differently.
_MODEL_ARGUMENTS = ("model_kwargs", "model_args")


class SpeeDFlow(RFLOW):  # type: ignore[misc]  # the host has no types
    """The host's rectified flow; t past the SNR boundary trains k times less often.

    Uniform, discrete and logit-normal draws and the resolution shift stay the host's: the boundary is
    measured on the t that comes out of them, which is the t the model sees. A `t` passed by the caller, as
    the host's evaluation scripts do, is kept, and its loss is the host's.

    Args:
        k: see `FlowThinning`.
        snr_boundary: see `FlowThinning`.
        lam: of the change-aware weights; None weighs nothing. "auto" is 0.6, or None where the host draws
            logit-normal: that draw prefers the same middle times already.
        options: of the host's RFLOW.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        *,
        k: float = 5.0,
        snr_boundary: float = CONVERGENCE_SNR,
        lam: float | None | Literal["auto"] = "auto",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if isinstance(lam, str):
            if lam != "auto":
                raise ValueError(f"lam needs a number, None or 'auto', got {lam!r}")
            lam = None if options.get("sample_method") == "logit-normal" else 0.6
        self.thinning = FlowThinning(k, snr_boundary, lam)

    def training_losses(self, model: Any, x_start: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The host's loss terms, each (B,), at a t of the thinned law, with the weights in `loss`.

        Raises:
            ValueError: `weights` is given.
        """
        bound = _TRAINING_LOSSES.bind(self, model, x_start, *args, **kwargs)
        given = bound.arguments
        if given.get("weights") is not None:
            raise ValueError(
                "training_losses got weights, and SpeeDFlow has its own: drop weights, or set lam"
            )
        if given.get("t") is not None:
            return super().training_losses(*bound.args[1:], **bound.kwargs)
        model_arguments = next((given[name] for name in _MODEL_ARGUMENTS if name in given), None)
        t = self.thinning.draw(
            lambda: self._hosts_draw(x_start, model_arguments), num_timesteps=self.num_timesteps
        )
        given["t"] = t
        terms = super().training_losses(*bound.args[1:], **bound.kwargs)
        if self.thinning.lam is None:
            return terms
        weight = self.thinning.weight(t / self.num_timesteps)
        return {**terms, "loss": weight.to(terms["loss"].dtype) * terms["loss"]}

    def _hosts_draw(self, x_start: Tensor, model_arguments: Any) -> Tensor:
        """The t (B,) that the host would train on, shifted as it shifts."""
        # The draw is written into the host's training_losses; add_noise is the first to get the finished t. A
        # shallow copy stops there, before the model, and leaves the host's object as it is.
        stopping = copy.copy(self.scheduler)
        stopping.add_noise = _stop
        rows = torch.empty(len(x_start), 1, device=x_start.device)
        try:
            stopping.training_losses(None, rows, model_arguments, noise=rows)
        except _DrawnTimestep as drawn:
            return drawn.t
        raise ValueError(
            "the host's rectified flow did not pass its t to add_noise; known to work: Open-Sora 1.2.0, 1.3"
        )


class _DrawnTimestep(Exception):  # noqa: N818 - it carries a value out of the host, and is no error
    def __init__(self, t: Tensor) -> None:
        super().__init__("the host has drawn its t")
        self.t = t


def _stop(original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    raise _DrawnTimestep(timesteps)
