"""Seam A for mmagic: `diffusion_scheduler=dict(type="SpeeDiffusion", ...)` in a config.

Importing this module registers that type in `mmagic.registry.DIFFUSION_SCHEDULERS`, and changes nothing else
of the host. The host's ADM trains by two calls, `sample_timestep()` and `training_loss(unet, images,
timestep)`. The host's own schedulers leave both unwritten; the class below has them.

Dims: T timesteps, B batch, C channels, H and W height and width.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.attachment import Attachment
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.draws.recomputation import is_training
from speedit_plugins.hosts.schedules import schedule_of
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.registry import Config

_NEEDS = (
    "speedit_plugins.hosts.mmagic needs mmagic 1.x (mmagic.registry.DIFFUSION_SCHEDULERS and, in"
    " mmagic.models.diffusion_schedulers, an EditDDPMScheduler with training_loss and sample_timestep)"
)
try:
    DIFFUSION_SCHEDULERS: Any = import_module("mmagic.registry").DIFFUSION_SCHEDULERS
    EditDDPMScheduler: Any = import_module("mmagic.models.diffusion_schedulers").EditDDPMScheduler
except (ImportError, AttributeError) as error:
    raise ImportError(f"{_NEEDS}; importing it failed: {error}") from error
for _name in ("training_loss", "sample_timestep"):
    if not hasattr(EditDDPMScheduler, _name):
        raise ImportError(f"{_NEEDS}; this one has no {_name}")

# These make the model answer more channels. mmagic has no variational loss to train them with.
_LEARNED_VARIANCES = ("learned", "learned_range")


class SpeeDiffusion(EditDDPMScheduler):  # type: ignore[misc]  # the host has no types
    """The host's DDPM scheduler, able to train a noise-predicting model: a policy draws t and weighs the mse.

    `step`, `set_timesteps` and everything else are the host's.

    Args:
        policy: see `build_policy`.
        ranks_alike, num_strata: see `with_policy`.
        options: of the host's scheduler.

    Raises:
        ValueError: the policy is bad, the variance is learned, or there are not `num_train_timesteps`
            `trained_betas`.
    """

    # What `is_attached` and `without_policy` look for.
    host_class = EditDDPMScheduler

    def __init__(
        self,
        *,
        policy: str | Config = "recommended",
        ranks_alike: int | None = None,
        num_strata: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if self.variance_type in _LEARNED_VARIANCES:
            raise ValueError(
                f"SpeeDiffusion got variance_type={self.variance_type!r}, and mmagic has no variational loss"
                " to train it with: wanted a fixed one, such as 'fixed_small', and a unet with"
                " output_cfg=dict(mean='eps', var='fixed')"
            )
        if len(self.betas) != self.num_train_timesteps:
            raise ValueError(
                f"SpeeDiffusion got {len(self.betas)} trained_betas, wanted"
                f" num_train_timesteps={self.num_train_timesteps} of them"
            )
        # The host samples with `predict_epsilon=True` and has no option for it.
        self._speedit_attachment = _Training(
            build_policy(policy, schedule_of(self), "epsilon"),
            DrawStream(ranks_alike=ranks_alike, num_strata=num_strata),
        )

    @property
    def policy(self) -> TimestepPolicy:
        """What draws and weighs. The host's checkpoints do not keep its state, see `policy_state`."""
        return self._speedit_attachment.policy

    def sample_timestep(self) -> None:
        """Returns None: `training_loss` draws t, since it knows the batch and its device."""

    def training_loss(
        self, model: Any, x_0: Tensor, t: Tensor | None = None, *, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The batch's loss as mmengine's `parse_losses` reads it: `loss`, a scalar.

        Args:
            model: called as `model(x_t, t)`; returns the noise (B, C, H, W), or a mapping that has it as
                `sample`.
            x_0: images (B, C, H, W), floating point.
            t: int64 (B,) in [0, T) for the plain mse, as in an evaluation; None lets the policy draw and
                weigh. Without gradients None is uniform t and the plain mse.
            noise: of x_0's shape; None takes it from the device's global generator.

        Raises:
            ValueError: x_0, t, noise or what the model returns is not as above.
        """
        _check_images(x_0)
        attachment = self._speedit_attachment
        draw = None
        if t is None and not is_training():
            t = torch.randint(self.num_train_timesteps, (len(x_0),), device=x_0.device)
        elif t is None:
            # Only its length and its device matter.
            draw = attachment.draw(torch.empty(len(x_0), device=x_0.device), x_0, is_drawn=False)
            t = draw.index
        else:
            _check_timesteps(t, x_0, self.num_train_timesteps)
        noise = torch.randn_like(x_0) if noise is None else _of_shape(noise, x_0, "noise")
        answer = model(attachment.noised(x_0, noise, t), t)
        predicted = _of_shape(answer["sample"] if isinstance(answer, Mapping) else answer, x_0, "the model")
        # The square of a half-precision error can be too large for half precision.
        wide = _at_least_float32(x_0)
        mse = (predicted.to(wide) - noise.to(wide)).square().flatten(1).mean(1)  # (B,)
        loss = mse if draw is None else attachment.weighted_whole(mse, draw)
        return {"loss": loss.mean()}


class _Training(Attachment):
    """The policy, and the scales of signal and noise on the devices that train.

    The host's own `add_noise` cannot noise a batch: it multiplies a numpy array by a tensor, and raises.
    """

    def __init__(self, policy: TimestepPolicy, stream: DrawStream) -> None:
        super().__init__(policy, stream)
        self._scales: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def noised(self, x_0: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """x_t = alpha x_0 + sigma noise at indices (B,), in x_0's shape and dtype."""
        place = (x_0.device, _at_least_float32(x_0))
        if place not in self._scales:
            schedule = self.policy.schedule
            # The dtype changes first, since not every device has the tables' float64.
            self._scales[place] = (
                schedule.alpha.to(place[1]).to(place[0]),
                schedule.sigma.to(place[1]).to(place[0]),
            )
        alpha, sigma = (table[index].view(-1, *[1] * (x_0.dim() - 1)) for table in self._scales[place])
        return (alpha * x_0 + sigma * noise).to(x_0.dtype)


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check_images(x_0: Any) -> None:
    if isinstance(x_0, Tensor) and x_0.is_floating_point() and x_0.dim() > 1:
        return
    got = f"{tuple(x_0.shape)} of {x_0.dtype}" if isinstance(x_0, Tensor) else type(x_0).__name__
    keys = f" with keys {sorted(x_0)}" if isinstance(x_0, Mapping) else ""
    raise ValueError(
        f"training_loss needs floating-point images (B, C, H, W), got {got}{keys}: PackInputs(keys=...) of"
        " the training pipeline has to name the images' key alone, as the loader calls it"
    )


def _check_timesteps(t: Any, x_0: Tensor, num_timesteps: int) -> None:
    is_index = isinstance(t, Tensor) and t.dtype == torch.int64
    if not is_index or t.shape != x_0.shape[:1]:
        got = f"{tuple(t.shape)} of {t.dtype}" if isinstance(t, Tensor) else repr(t)
        raise ValueError(f"training_loss needs t int64 ({len(x_0)},) or None, got {got}")
    # A negative t would index from the end of the tables.
    if len(t) and (int(t.min()) < 0 or int(t.max()) >= num_timesteps):
        raise ValueError(
            f"training_loss needs t in [0, {num_timesteps}), got {int(t.min())} to {int(t.max())}"
        )


def _of_shape(value: Any, x_0: Tensor, what: str) -> Tensor:
    if isinstance(value, Tensor) and value.shape == x_0.shape:
        return value
    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    advice = (
        "; twice the channels are a learned variance, and output_cfg=dict(mean='eps', var='fixed') has none"
    )
    raise ValueError(
        f"training_loss needs {what} to give {tuple(x_0.shape)}, as x_0, got {got}"
        f"{advice if what == 'the model' else ''}"
    )


DIFFUSION_SCHEDULERS.register_module(name="SpeeDiffusion", module=SpeeDiffusion)
