"""A host with one function that draws the timesteps of a batch, by index, and noises it at them.

The functions are `get_noise_noisy_latents_and_timesteps(args, noise_scheduler, latents)` of sd-scripts (SD 1,
2 and XL), and `get_timesteps`, which it calls. `element_loss` weighs.

    adapt(library.train_util, partial(ScriptPolicy, "speedit"))

Dims: B batch.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.script import ScriptPolicy
from speedit_plugins.hosts.trainers.element_loss import losses_of, refuse_beside
from speedit_plugins.hosts.trainers.noisy_batch import is_validation
from speedit_plugins.hosts.trainers.replaced import exchange

FUNCTION = "get_noise_noisy_latents_and_timesteps"
DRAW = "get_timesteps"
# The host's flags that weigh its loss by the timestep.
WEIGHTS = (
    "min_snr_gamma",
    "scale_v_pred_loss_like_noise_pred",
    "v_pred_like_loss",
    "debiased_estimation_loss",
)


def adapt(module: ModuleType, draws_of: Callable[..., ScriptPolicy]) -> None:
    """Lets a policy draw and weigh in sd-scripts' `train_util`.

    Args:
        module: has the two functions, and `conditional_loss`.
        draws_of: makes a `ScriptPolicy` with these options. It is called before the first draw.

    Raises:
        ValueError: the module lacks one of them, or draws by a policy already.
    """
    missing = [name for name in (FUNCTION, DRAW) if not hasattr(module, name)]
    if missing:
        raise ValueError(f"{module.__name__} has no {' and no '.join(missing)} (sd-scripts 48d368f)")
    batches = IndexedBatches(module, draws_of)
    exchange(module, FUNCTION, lambda _: lambda *args, **kwargs: batches.noised(*args, **kwargs))
    exchange(module, DRAW, lambda _: lambda *args, **kwargs: batches.timesteps(*args, **kwargs))


class IndexedBatches:
    """What the replaced functions do.

    Args:
        module: of the host, whose functions are not replaced yet.
        draws_of: see `adapt`.
    """

    def __init__(self, module: ModuleType, draws_of: Callable[..., ScriptPolicy]) -> None:
        self._own_noised, self._own_draw = getattr(module, FUNCTION), getattr(module, DRAW)
        self._draws_of = draws_of
        self._losses = losses_of(module)
        self._draws: ScriptPolicy | None = None
        # The noise scheduler and the flags of the batch that is noised now.
        self._now: tuple[Any, Any] | None = None

    def noised(self, args: Any, noise_scheduler: Any, latents: Tensor) -> Any:
        """What the host's function returns: noise, noised data and timesteps, those of the policy."""
        if not torch.is_grad_enabled() or is_validation(args):
            self._losses.newest = None
            return self._own_noised(args, noise_scheduler, latents)
        self._now = (args, noise_scheduler)
        try:
            made = self._own_noised(args, noise_scheduler, latents)
        finally:
            self._now = None
        self._losses.newest = self._draws
        return made

    def timesteps(self, min_timestep: int, max_timestep: int, b_size: int, device: Any) -> Tensor:
        """Timesteps int64 (B,) on a device, those of the policy within the host's bounds.

        Raises:
            ValueError: the host draws them elsewhere than for a batch, with gradients; or it weighs its loss,
                and so does the policy.
        """
        if self._now is None and (not torch.is_grad_enabled() or min_timestep == max_timestep):
            own: Tensor = self._own_draw(min_timestep, max_timestep, b_size, device)
            return own
        if self._now is None:
            raise ValueError(
                f"the host calls {DRAW} outside of {FUNCTION}, where its noise scheduler is not known, as"
                " train_control_net.py of sd-scripts does: this script cannot take a policy"
            )
        args, noise_scheduler = self._now
        if self._draws is None:
            num_timesteps = len(noise_scheduler.alphas_cumprod)
            self._draws = self._draws_of(
                prediction_type="v" if args.v_parameterization else "epsilon",
                window=(min_timestep / num_timesteps, max_timestep / num_timesteps),
            )
        # The host draws on the CPU, whatever the device.
        index = self._draws.timesteps(noise_scheduler, b_size)
        weighing = [f"--{name}" for name in WEIGHTS if getattr(args, name, None)]
        if weighing:
            flags = " and ".join(weighing)
            refuse_beside(self._draws.policy, f"the host weighs its loss by {flags}", f"drop {flags}")
        return index.to(device)
