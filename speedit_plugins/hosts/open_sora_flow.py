"""Seam A for Open-Sora 1.2 and 1.3: the host's rectified flow, with a policy or with draws thinned by SNR.

`speedit_plugins.hosts.open_sora` registers it if the host has a rectified flow.

Dims: B batch.
"""

import inspect
from importlib import import_module
from typing import Any, Literal

from torch import Tensor

from speedit_plugins.hosts.attachment import refuse_given_weights
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.draws.recomputation import is_training
from speedit_plugins.hosts.flow import FlowAttachment, FlowThinning, ThinningAttachment
from speedit_plugins.hosts.objects.flow_object import policy_for
from speedit_plugins.hosts.objects.rectified_flow import (
    checked,
    clock_of,
    draw_hosts_t,
    model_arguments_of,
    rectified_flow_losses,
)
from speedit_plugins.policies.schedule import CONVERGENCE_SNR
from speedit_plugins.policies.shifted_boundary import moves_with_shift
from speedit_plugins.registry import Config

RFLOW: Any = import_module("opensora.schedulers").RFLOW

_TRAINING_LOSSES = inspect.signature(RFLOW.training_losses)


class SpeeDFlow(RFLOW):  # type: ignore[misc]  # the host has no types
    """The host's rectified flow with a policy, or with k times fewer draws past the SNR boundary.

    With `policy=` it is what `with_policy` makes of the host's rectified flow. Without, the host draws
    uniform, discrete or logit-normal t and shifts it by the resolution, and `FlowThinning` refuses some of
    these draws. A `t` passed by the caller, as in the host's evaluation scripts, is kept, and its loss is the
    host's. Under `torch.no_grad()` every t and loss is the host's.

    Args:
        policy: see `build_policy`; None thins by the three options below, which go without a policy.
        k: see `FlowThinning`; None is 5.
        snr_boundary: see `FlowThinning`, for the noise that the model sees. None is 1/143, and it moves with
            the host's resolution shift: draws are thinned by what they were before the shift.
        lam: largest of the change-aware weights; None weighs nothing. "auto" is 0.6, or None if the host
            draws logit-normal t: these prefer the same middle times already.
        ranks_alike, num_strata: see `with_policy`. By default the ranks of the host's sequence-parallel group
            draw alike.
        options: of the host's RFLOW.

    Raises:
        ValueError: a value is out of range, or an option of the thinning is given beside a policy.
    """

    # What `is_attached` and `without_policy` look for.
    host_class = RFLOW

    def __init__(
        self,
        *,
        policy: str | Config | None = None,
        k: float | None = None,
        snr_boundary: float | None = None,
        lam: float | None | Literal["auto"] = "auto",
        ranks_alike: int | None = None,
        num_strata: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        stream = DrawStream(ranks_alike=ranks_alike, num_strata=num_strata)
        self._speedit_attachment: FlowAttachment | ThinningAttachment
        if policy is not None:
            given = {"k": k is not None, "snr_boundary": snr_boundary is not None, "lam": lam != "auto"}
            beside = [name for name, is_given in given.items() if is_given]
            if beside:
                raise ValueError(
                    f"SpeeDFlow got {' and '.join(beside)} beside a policy: leave out one of them, or write"
                    ' policy=dict(type="speed", k=..., snr_boundary=..., lam=...)'
                )
            self._speedit_attachment = FlowAttachment(
                policy_for(self, policy), stream, moves_boundary=moves_with_shift(policy)
            )
            return
        if isinstance(lam, str):
            if lam != "auto":
                raise ValueError(f"lam needs a number, None or 'auto', got {lam!r}")
            lam = None if options.get("sample_method") == "logit-normal" else 0.6
        boundary = CONVERGENCE_SNR if snr_boundary is None else snr_boundary
        self._speedit_attachment = ThinningAttachment(
            FlowThinning(5.0 if k is None else k, boundary, lam), stream, moves_boundary=snr_boundary is None
        )

    @property
    def thinning(self) -> FlowThinning:
        """What thins the host's draws and weighs its loss. Raises ValueError if a policy does."""
        if isinstance(self._speedit_attachment, FlowAttachment):
            raise ValueError(f"{self._speedit_attachment.policy.name!r} draws and weighs, see policy_of")
        return self._speedit_attachment.thinning

    def training_losses(self, model: Any, x_start: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The host's loss terms, each (B,), at our draws, with the weights in `loss`.

        Raises:
            ValueError: `weights` is given.
        """
        bound = _TRAINING_LOSSES.bind(self, model, x_start, *args, **kwargs)
        attachment = self._speedit_attachment
        if isinstance(attachment, FlowAttachment):
            return rectified_flow_losses(self, bound, super().training_losses)
        given = bound.arguments
        refuse_given_weights(given, "SpeeDFlow has its own", "drop weights, or set lam")
        # Without gradients this is an evaluation, and the host's own.
        if given.get("t") is not None or not is_training():
            return super().training_losses(*bound.args[1:], **bound.kwargs)
        arguments = model_arguments_of(given)

        def hosts_draw() -> Tensor:
            return draw_hosts_t(self.scheduler, x_start, arguments)

        # The host's own draw. After it, its noise is what it would be without us.
        own = checked(hosts_draw())
        t = attachment.draw(hosts_draw, clock_of(self, x_start, arguments), own, x_start)
        given["t"] = t
        terms = super().training_losses(*bound.args[1:], **bound.kwargs)
        if self.thinning.lam is None:
            return terms
        weight = self.thinning.weight(t / self.num_timesteps)
        return {**terms, "loss": weight.to(terms["loss"].dtype) * terms["loss"]}
