"""Seam A for Open-Sora 1.0 to 1.3: `type="SpeeDiffusion"` and, from 1.2 on, `type="SpeeDFlow"` in a config.

Importing this module registers both in `opensora.registry.SCHEDULERS`, and changes nothing else of the host.

Dims: T timesteps, B batch.
"""

import inspect
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.attachment import Attachment, refuse_given_weights, under_way
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.draws.recomputation import is_training
from speedit_plugins.hosts.objects.filled_timestep import FilledTimestep, Watched
from speedit_plugins.hosts.schedules import prediction_type_of, schedule_of
from speedit_plugins.policies.advice import warn_if_slow
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.registry import Config

try:
    schedulers: Any = import_module("opensora.schedulers")
    SCHEDULERS: Any = import_module("opensora.registry").SCHEDULERS
    IDDPM: Any = import_module("opensora.schedulers.iddpm").IDDPM
    SpacedDiffusion: Any = import_module("opensora.schedulers.iddpm.respace").SpacedDiffusion
    GaussianDiffusion: Any = import_module("opensora.schedulers.iddpm.gaussian_diffusion").GaussianDiffusion
except ImportError as error:
    raise ImportError(
        "speedit_plugins.hosts.open_sora needs Open-Sora 1.0, 1.1, 1.2 or 1.3 (opensora.registry.SCHEDULERS"
        f" and opensora.schedulers.iddpm); importing it failed: {error}"
    ) from error

_KNOWN = "Open-Sora 1.0.0, 1.1.0, 1.2.0, 1.3"
_TRAINING_LOSSES = inspect.signature(GaussianDiffusion.training_losses)
# From 1.1 on the tables are on a device for which IDDPM has no argument.
_TAKES_DEVICE = "device" in inspect.signature(GaussianDiffusion.__init__).parameters


class _Placed(SpacedDiffusion):  # type: ignore[misc]  # the host has no types
    """Comes between IDDPM and SpacedDiffusion: puts the tables on the CPU if there is no CUDA device."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if _TAKES_DEVICE and not torch.cuda.is_available():
            kwargs.setdefault("device", "cpu")
        super().__init__(*args, **kwargs)


class SpeeDiffusion(IDDPM, _Placed):  # type: ignore[misc]  # the host has no types
    """The host's IDDPM with a policy that draws t and weighs the mse in training; sampling is the host's.

    The host's `training_losses` runs as it is. Up to 1.1 the trainer passes t; from 1.2 on the host draws t
    inside `training_losses`, whatever is passed. In every version `q_sample` is the first to use t: there our
    draw is written into the host's tensor, so that every later use has it. A watched model confirms it.

    Args:
        policy: see `build_policy`. A respaced object is made for sampling: it builds its policy when it first
            trains.
        ranks_alike, num_strata: see `with_policy`. By default the ranks of the host's sequence-parallel group
            draw alike.
        options: of the host's IDDPM; `timestep_respacing=""` means none in every version.

    Raises:
        ValueError: the policy is bad.
    """

    # What `is_attached` and `without_policy` look for.
    host_class = IDDPM

    def __init__(
        self,
        *,
        policy: str | Config = "recommended",
        ranks_alike: int | None = None,
        num_strata: int | None = None,
        **options: Any,
    ) -> None:
        # The host's training configs say ""; beside num_sampling_steps it wants None.
        if options.get("timestep_respacing") == "":
            options["timestep_respacing"] = None
        super().__init__(**options)
        self._policy_config = policy
        self._speedit_attachment = Attachment(
            self._build_policy, DrawStream(ranks_alike=ranks_alike, num_strata=num_strata)
        )
        if self.num_timesteps == self.original_num_steps:
            self._speedit_attachment.policy  # noqa: B018 - built now, so that a bad one raises here

    @property
    def policy(self) -> TimestepPolicy:
        """What draws and weighs. The host's checkpoints keep its state."""
        return self._speedit_attachment.policy

    def training_losses(self, model: Any, x_start: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The host's loss terms at our t, each (B,), with the weights in `loss`. Arguments are the host's.

        Under `torch.no_grad()`, as in a validation, t and loss are the host's own.

        Raises:
            ValueError: `weights` is given, or the policy weighs the mse and the host's loss has none.
        """
        if not is_training():
            return super().training_losses(model, x_start, *args, **kwargs)
        bound = _TRAINING_LOSSES.bind(self, model, x_start, *args, **kwargs)
        refuse_given_weights(bound.arguments)
        if isinstance(bound.arguments.get("t"), Tensor):
            # Our t is written into this copy; the trainer's tensor stays as it is.
            bound.arguments["t"] = bound.arguments["t"].clone()
        attachment, filled = self._speedit_attachment, FilledTimestep(model, _KNOWN)
        with under_way(attachment, filled):
            terms = super().training_losses(*bound.args[1:], **bound.kwargs)
        return attachment.weighted(terms, filled.confirmed())

    def q_sample(self, x_start: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The host's noised sample. The first call in a training step writes our t into the host's."""
        filled = self._filled
        if filled is not None and filled.draw is None:
            filled.fill(t, lambda t: self._speedit_attachment.draw(t, x_start))
        return super().q_sample(x_start, t, *args, **kwargs)

    def _wrap_model(self, model: Any) -> Any:
        if isinstance(model, Watched):
            return model
        wrapped, filled = super()._wrap_model(model), self._filled
        return wrapped if filled is None else filled.watched(wrapped, model)

    @property
    def _filled(self) -> FilledTimestep | None:
        # The host's constructor may call a method that looks here.
        attachment: Attachment | None = getattr(self, "_speedit_attachment", None)
        return None if attachment is None else attachment.call

    def _build_policy(self) -> TimestepPolicy:
        predicted = prediction_type_of(self)
        built = build_policy(self._policy_config, schedule_of(self), predicted)
        warn_if_slow(built, predicted, self._policy_config)
        return built


SCHEDULERS.register_module(name="SpeeDiffusion", module=SpeeDiffusion)
if hasattr(schedulers, "RFLOW"):
    SCHEDULERS.register_module(
        name="SpeeDFlow", module=import_module("speedit_plugins.hosts.open_sora_flow").SpeeDFlow
    )
