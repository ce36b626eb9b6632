"""Seam A for Open-Sora 1.0 to 1.3: `type="SpeeDiffusion"` and, from 1.2 on, `type="SpeeDFlow"` in a config.

Importing this module registers them in `opensora.registry.SCHEDULERS`; it changes nothing else of the host.

Dims: T timesteps, B batch.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.attachment import Attachment
from speedit_plugins.hosts.schedules import prediction_type_of, schedule_of
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy
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

_TRAINING_LOSSES = inspect.signature(GaussianDiffusion.training_losses)
# From 1.1 on the tables lie on a device that IDDPM has no argument for.
_TAKES_DEVICE = "device" in inspect.signature(GaussianDiffusion.__init__).parameters


class _Placed(SpacedDiffusion):  # type: ignore[misc]  # the host has no types
    """Stands between IDDPM and SpacedDiffusion, and says where the tables lie where the host says CUDA."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if _TAKES_DEVICE and not torch.cuda.is_available():
            kwargs.setdefault("device", "cpu")
        super().__init__(*args, **kwargs)


class SpeeDiffusion(IDDPM, _Placed):  # type: ignore[misc]  # the host has no types
    """The host's IDDPM whose training draws t from a policy and weights the mse; sampling is the host's.

    The host's `training_losses` runs as it is. Its t is replaced where it is first used, in `q_sample`: up to
    1.1 the trainer passes t, from 1.2 on the host draws inside `training_losses` whatever is passed. Either
    way that tensor is filled with our draw in place, so every later use is ours; a watched model confirms it.

    Args:
        policy: see `build_policy`. A respaced object, made for sampling, builds it when it first trains.
        options: of the host's IDDPM; `timestep_respacing=""` is none on every version.

    Raises:
        ValueError: a bad policy.
    """

    # What `is_attached` and `without_policy` look for.
    host_class = IDDPM
    _call: "_TrainingCall | None" = None

    def __init__(self, *, policy: str | Config = "speedit", **options: Any) -> None:
        # With num_sampling_steps the host wants None, and its own training configs say "".
        if options.get("timestep_respacing") == "":
            options["timestep_respacing"] = None
        super().__init__(**options)
        self._policy_config = policy
        self._speedit_attachment: Attachment | None = None
        if self.num_timesteps == self.original_num_steps:
            self._attach()

    @property
    def policy(self) -> TimestepPolicy:
        """What draws and weights; its `state_dict` is not in the host's checkpoints."""
        return self._attach().policy

    def training_losses(self, model: Any, x_start: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The host's loss terms at our t, each (B,), with the weights in `loss`; arguments are the host's.

        Under `torch.no_grad()`, as in a validation, t and loss are the host's own.

        Raises:
            ValueError: `weights` is given, or the host's loss has no mse for a policy that weights it.
        """
        if not torch.is_grad_enabled():
            return super().training_losses(model, x_start, *args, **kwargs)
        bound = _TRAINING_LOSSES.bind(self, model, x_start, *args, **kwargs)
        if bound.arguments.get("weights") is not None:
            raise ValueError("training_losses got weights, and the policy weights already: drop one of them")
        if isinstance(bound.arguments.get("t"), Tensor):
            # Ours is written into it: the trainer's stays as it was.
            bound.arguments["t"] = bound.arguments["t"].clone()
        attachment, call = self._attach(), _TrainingCall(model)
        self._call = call
        try:
            terms = super().training_losses(*bound.args[1:], **bound.kwargs)
        finally:
            self._call = None
        return attachment.weighted(terms, call.confirmed())

    def q_sample(self, x_start: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The host's noised sample; inside a training step its first call brings our t in."""
        if self._call is not None and self._call.draw is None:
            self._call.fill(t, self._attach().draw)
        return super().q_sample(x_start, t, *args, **kwargs)

    def _wrap_model(self, model: Any) -> Any:
        if isinstance(model, _Watched):
            return model
        wrapped = super()._wrap_model(model)
        # The variational term runs on a stand-in for the model: only the model itself is watched.
        return _Watched(wrapped, self._call) if self._call and model is self._call.model else wrapped

    def _attach(self) -> Attachment:
        if self._speedit_attachment is None:
            policy = build_policy(self._policy_config, schedule_of(self), prediction_type_of(self))
            self._speedit_attachment = Attachment(policy)
        return self._speedit_attachment


class _TrainingCall:
    """One call of `training_losses`: our draw, and the host's tensor that carries it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.draw: TimestepDraw | None = None
        self._t: Tensor | None = None
        self._version: int | None = None
        self._is_seen = False

    def fill(self, t: Tensor, draw: Callable[[Tensor], TimestepDraw]) -> None:
        self.draw = draw(t)
        t.copy_(self.draw.index)
        self._t, self._version = t, t._version

    def see(self, t: Tensor) -> None:
        """Notes a t (B,) that goes to the model; raises unless it is the drawn one."""
        # The same tensor, unwritten since, proves it without a host-device synchronisation.
        is_ours = t is self._t and t._version == self._version
        if not is_ours and not (self.draw is not None and torch.equal(t, self.draw.index.to(t))):
            raise ValueError(
                "the model gets another t than the policy drew: this Open-Sora draws or changes t between"
                " q_sample and the model; known to work: 1.0.0, 1.1.0, 1.2.0, 1.3"
            )
        self._is_seen = True

    def confirmed(self) -> TimestepDraw:
        """The draw, once the model has seen it."""
        if self.draw is None or not self._is_seen:
            raise ValueError(
                "the host's training_losses did not call q_sample and then the model, so its t is not ours;"
                " known to work: Open-Sora 1.0.0, 1.1.0, 1.2.0, 1.3"
            )
        return self.draw


class _Watched:
    """The host's wrapped model, which tells the training call the t that it is called with."""

    def __init__(self, model: Any, call: _TrainingCall) -> None:
        self._model = model
        self._call = call

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        self._call.see(t)
        return self._model(x, t, **kwargs)


SCHEDULERS.register_module(name="SpeeDiffusion", module=SpeeDiffusion)
if hasattr(schedulers, "RFLOW"):
    SCHEDULERS.register_module(
        name="SpeeDFlow", module=import_module("speedit_plugins.hosts.open_sora_flow").SpeeDFlow
    )
