"""A function of a host draws timesteps of a noise scheduler of diffusers, and makes each sample's loss.

The function is edited (`function_edits`): a `ScriptPolicy` draws in place of its `torch.randint`, and weighs
the loss (B,) before the mean over the batch. This is the trainer of CogVideoX.

Dims: B batch.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.edits.function_edits import InlineDraw, InlineLoss, edited_function
from speedit_plugins.hosts.script import ScriptPolicy
from speedit_plugins.hosts.trainers.replaced import exchange

# `torch.mean(weights * (latent_pred - latent) ** 2, dim=1)` with weights 1 / (1 - alpha_bar), which make it
# the squared error of the velocity that the model predicts.
PLACES = (
    InlineDraw("timesteps", ("torch.randint",), ("self.components.scheduler",)),
    InlineLoss("torch.mean", "per_sample"),
)


def adapt(module: ModuleType, seam_of: Callable[[], ScriptPolicy]) -> None:
    """Puts a policy into `compute_loss` of the trainer that CogVideoX's `get_model_cls` returns.

    Args:
        module: the host's `finetune.models.utils`.
        seam_of: makes the `ScriptPolicy`.

    Raises:
        ValueError: the function is not there, or has a policy already. When a trainer is asked for: its
            `compute_loss` is another one than is known.
    """

    edited: set[type] = set()

    def editing(loss: Callable[..., Any]) -> Callable[..., Any]:
        return edited_function(loss, PLACES, SchedulerCalls(seam_of()))

    def made(own: Callable[..., type]) -> Callable[..., type]:
        def get_model_cls(*arguments: Any, **options: Any) -> type:
            trainer = own(*arguments, **options)
            # The SFT and 1.5 trainers inherit it from those for LoRA.
            home = next((each for each in trainer.__mro__ if "compute_loss" in vars(each)), trainer)
            if home not in edited:
                exchange(home, "compute_loss", editing)
                edited.add(home)
            return trainer

        return get_model_cls

    exchange(module, "get_model_cls", made)


class SchedulerCalls:
    """What the edited functions call.

    Args:
        seam: draws and weighs.
    """

    def __init__(self, seam: ScriptPolicy) -> None:
        self.seam = seam

    def times(self, hosts_draw: Callable[[], Tensor], noise_scheduler: Any) -> Tensor:
        """Timesteps int64 (B,) in place of `hosts_draw()`; those come back without gradients.

        Raises:
            ValueError: see `ScriptPolicy.timesteps`.
        """
        if not torch.is_grad_enabled():
            self.seam.drawn_by_script()
            return hosts_draw()
        # `timesteps` makes the host's draw too: after both, the host's noise is what it would be after one.
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            own = hosts_draw()
        return self.seam.timesteps(noise_scheduler, len(own), own.device)

    def per_sample(self, function: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
        """The loss (B,) that `function(...)` returns, weighed."""
        return self.seam.weigh(function(*arguments, **options))
