"""DDT: `_impl_trainstep` of its diffusion trainers draws t, and makes a loss for each value of the batch.

    import src.diffusion.stateful_flow_matching.training_repa as module
    adapt(module, partial(SeparateDraws, "auto"))

The host's t is 1 for data. Its other losses, such as the alignment with DINOv2, are not weighed.

Dims: B batch.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.attachment import refuse_double_weights
from speedit_plugins.hosts.edits.function_edits import CALLS, InlineDraw, edited_function, has
from speedit_plugins.hosts.edits.function_source import parsed_function
from speedit_plugins.hosts.edits.statement_edits import HOSTS, Edit
from speedit_plugins.hosts.flow import HostsTime
from speedit_plugins.hosts.separate_draws import SeparateDraws
from speedit_plugins.hosts.trainers.replaced import exchange

# The modules of the host with such a trainer, and its class.
MODULES = {
    "flow_matching.training": ("FlowMatchingTrainer",),
    "flow_matching.training_cos": ("COSTrainer",),
    "flow_matching.training_disperse": ("DisperseTrainer",),
    "flow_matching.training_repa": ("REPATrainer",),
    "stateful_flow_matching.training": ("FlowMatchingTrainer",),
    "stateful_flow_matching.training_repa": ("REPATrainer",),
}
_METHOD = "_impl_trainstep"
# A trainer that shifts its draw has another name for it.
_DRAWS = tuple(InlineDraw(name, ("torch.rand",), ("self", "x")) for name in ("base_t", "t"))
_LOSSES = tuple(
    Edit(f"{name} = weight * ", f"{HOSTS}\n{name} = {CALLS}.weigh(self, {name})")
    for name in ("fm_loss", "loss")
)


def adapt(module: ModuleType, draws_of: Callable[..., SeparateDraws]) -> None:
    """Puts a policy into the trainers of a module.

    Args:
        module: one of `MODULES`.
        draws_of: makes the `SeparateDraws`.

    Raises:
        ValueError: it has no such trainer, or one that draws or makes its loss in another way.
    """
    names = {name for each in MODULES.values() for name in each if hasattr(module, name)}
    if not names:
        raise ValueError(f"{module.__name__} has no trainer of DDT: looked for a class with {_METHOD}")
    calls = _Calls(draws_of)

    def edited(own: Callable[..., Any]) -> Callable[..., Any]:
        tree = parsed_function(own)
        places = [next((place for place in kind if has(tree, place)), kind[-1]) for kind in (_DRAWS, _LOSSES)]
        return edited_function(own, places, calls)

    for name in names:
        exchange(getattr(module, name), _METHOD, edited)


class _Calls:
    """What an edited training step calls."""

    def __init__(self, draws_of: Callable[..., SeparateDraws]) -> None:
        self._draws_of = draws_of
        self._draws: SeparateDraws | None = None

    def times(self, hosts_draw: Callable[[], Tensor], trainer: Any, data: Tensor) -> Tensor:
        """What the host's trainer draws (B,), before its own shift; see `SeparateDraws.times`."""
        if self._draws is None:
            _check_path(trainer.scheduler)
            self._draws = self._draws_of()
            if getattr(trainer.loss_weight_fn, "__name__", "") != "constant":
                refuse_double_weights(self._draws.policy, "loss_weight_fn weighs the loss", "leave it out")
        return self._draws.times(hosts_draw, data, _clock(float(getattr(trainer, "timeshift", 1.0))))

    def weigh(self, trainer: Any, loss: Tensor) -> Tensor:
        """The host's squared error (B, ...), weighed."""
        assert self._draws is not None
        return self._draws.weigh(loss)


def _clock(shift: float) -> HostsTime:
    """The time of a host that draws b, and trains at t = b / (b + (1 - b) shift), where 1 is clean."""

    def time_of(b: Tensor) -> Tensor:
        wide = b.float()
        return 1 - wide / (wide + (1 - wide) * shift)

    def drawn_for(time: Tensor) -> Tensor:
        clean = 1 - time
        return shift * clean / (time + shift * clean)

    return HostsTime(time_of, lambda draw, t: drawn_for(draw.time).to(t), lambda: shift)


def _check_path(scheduler: Any) -> None:
    """Raises ValueError if a scheduler's path is not the straight one from noise at 0 to data at 1."""
    t = torch.tensor([0.25])
    alpha, sigma = scheduler.alpha(t).flatten(), scheduler.sigma(t).flatten()
    if not (torch.equal(alpha, t) and torch.equal(sigma, 1 - t)):
        raise ValueError(
            f"the policy needs a straight path, x_t = t x + (1 - t) noise, and {type(scheduler).__name__} has"
            f" {float(alpha)} x + {float(sigma)} noise at t = 0.25: take LinearScheduler"
        )
