"""Seam A for Open-Sora 1.2 and 1.3: the host's rectified flow, with its own draws of t thinned by SNR.

`speedit_plugins.hosts.open_sora` registers it if the host has a rectified flow.

Dims: B batch.
"""

import inspect
from importlib import import_module
from typing import Any, Literal

from torch import Tensor

from speedit_plugins.hosts.attachment import refuse_given_weights
from speedit_plugins.hosts.draw_stream import DrawStream
from speedit_plugins.hosts.flow import FlowThinning, ThinningAttachment
from speedit_plugins.hosts.flow_object import checked, draw_hosts_t, model_arguments_of
from speedit_plugins.hosts.recomputation import is_training
from speedit_plugins.policies.schedule import CONVERGENCE_SNR

RFLOW: Any = import_module("opensora.schedulers").RFLOW

_TRAINING_LOSSES = inspect.signature(RFLOW.training_losses)


class SpeeDFlow(RFLOW):  # type: ignore[misc]  # the host has no types
    """The host's rectified flow that trains k times less often at a t past the SNR boundary.

    The host draws uniform, discrete or logit-normal t and shifts it by the resolution. The boundary is
    applied to the t that comes out: the one that the model sees. A `t` passed by the caller, as in the host's
    evaluation scripts, is kept, and its loss is the host's. Under `torch.no_grad()` every t and loss is the
    host's.

    Args:
        k: see `FlowThinning`.
        snr_boundary: see `FlowThinning`.
        lam: largest of the change-aware weights; None weighs nothing. "auto" is 0.6, or None if the host
            draws logit-normal t: these prefer the same middle times already.
        ranks_alike: see `with_policy`. By default the ranks of the host's sequence-parallel group draw alike.
        options: of the host's RFLOW.

    Raises:
        ValueError: a value is out of range.
    """

    # What `is_attached` and `without_policy` look for.
    host_class = RFLOW

    def __init__(
        self,
        *,
        k: float = 5.0,
        snr_boundary: float = CONVERGENCE_SNR,
        lam: float | None | Literal["auto"] = "auto",
        ranks_alike: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if isinstance(lam, str):
            if lam != "auto":
                raise ValueError(f"lam needs a number, None or 'auto', got {lam!r}")
            lam = None if options.get("sample_method") == "logit-normal" else 0.6
        self._speedit_attachment = ThinningAttachment(
            FlowThinning(k, snr_boundary, lam), DrawStream(ranks_alike=ranks_alike)
        )

    @property
    def thinning(self) -> FlowThinning:
        """What thins the host's draws and weighs its loss."""
        return self._speedit_attachment.thinning

    def training_losses(self, model: Any, x_start: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The host's loss terms, each (B,), at thinned draws, with the weights in `loss`.

        Raises:
            ValueError: `weights` is given.
        """
        bound = _TRAINING_LOSSES.bind(self, model, x_start, *args, **kwargs)
        given = bound.arguments
        refuse_given_weights(given, "SpeeDFlow has its own", "drop weights, or set lam")
        # Without gradients this is an evaluation, and the host's own.
        if given.get("t") is not None or not is_training():
            return super().training_losses(*bound.args[1:], **bound.kwargs)

        def hosts_draw() -> Tensor:
            return draw_hosts_t(self.scheduler, x_start, model_arguments_of(given))

        # The host's own draw. After it, its noise is what it would be without us.
        own = checked(hosts_draw())
        t = self._speedit_attachment.draw(hosts_draw, lambda t: t / self.num_timesteps, own, x_start)
        given["t"] = t
        terms = super().training_losses(*bound.args[1:], **bound.kwargs)
        if self.thinning.lam is None:
            return terms
        weight = self.thinning.weight(t / self.num_timesteps)
        return {**terms, "loss": weight.to(terms["loss"].dtype) * terms["loss"]}
