"""A host prepares noised inputs and a label, and makes the loss elsewhere: on the last stage of a pipeline.

Its `prepare_inputs(inputs, timestep_quantile)` returns the model's inputs, and a label of targets and a mask.
The loss is multiplied by the mask before its mean. The draw is edited (`function_edits`), and the weights go
into the mask, which brings them to where the loss is made. This is diffusion-pipe.

Dims: B batch.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.draws.recomputation import is_training
from speedit_plugins.hosts.draws.weighted_loss import is_one, scaled
from speedit_plugins.hosts.edits.function_edits import InlineDraw, edited_function
from speedit_plugins.hosts.separate_draws import SeparateDraws
from speedit_plugins.hosts.trainers.replaced import all_subclasses

METHOD = "prepare_inputs"
# The draws of its models, with their shift: `dist.sample(...)`, or Wan's from a table of quantiles.
DRAW = InlineDraw("t", ("dist.sample", "sample_t"), ("self", "inputs['latents']"))
_UNMASKED = (
    "the loss of this model is not the mean of each sample's error times its mask, so no weights can enter it"
)


def adapt(module: ModuleType, draws_of: Callable[..., SeparateDraws]) -> None:
    """Puts a policy into each model class that derives from `CommonPipeline`, now and when it is defined.

    Args:
        module: diffusion-pipe's `models.base`.
        draws_of: makes the `SeparateDraws`, at the first draw.

    Raises:
        ValueError: the class is not there, or has a policy already. When a model is trained: it draws no t of
            a flow (SDXL, Cosmos 1), or the policy weighs or learns and the model's loss shows it no place.
    """
    base = getattr(module, "CommonPipeline", None)
    if base is None:
        raise ValueError(
            f"{module.__name__} has no CommonPipeline, from which diffusion-pipe's models derive"
        )
    if "__init_subclass__" in vars(base):
        raise ValueError(
            "diffusion-pipe's models have a policy already, from a line of yours or the launcher"
        )
    calls = PreparedCalls(draws_of)

    def init_subclass(cls: type, /, **options: Any) -> None:
        super(base, cls).__init_subclass__(**options)
        _put_in(cls, calls, module.__name__)

    base.__init_subclass__ = classmethod(init_subclass)
    for each in all_subclasses(base):
        _put_in(each, calls, module.__name__)


class PreparedCalls:
    """What the edited `prepare_inputs` of all models call.

    Args:
        draws_of: makes the `SeparateDraws`.
    """

    def __init__(self, draws_of: Callable[..., SeparateDraws]) -> None:
        self._draws_of = draws_of
        self._draws: SeparateDraws | None = None

    def times(self, hosts_draw: Callable[[], Tensor], model: Any, data: Tensor) -> Tensor:
        """The t (B,) in place of `hosts_draw()`, for data (B, ...) of a model."""
        if self._draws is None:
            self._draws = self._draws_of(without_loss="" if masks_its_loss(model) else _UNMASKED)
        return self._draws.times(hosts_draw, data)

    def mask(self, mask: Tensor | None, target: Tensor) -> Tensor | None:
        """The host's mask of a target (B, ...), times the weights of the newest draw.

        Args:
            mask: broadcasts to the target; None or empty masks nothing.
            target: of the model.
        """
        assert self._draws is not None
        weight, policy = self._draws.weights(len(target)), self._draws.policy
        if is_one(policy.weight):
            return mask
        if mask is None or mask.numel() == 0:
            mask = torch.ones(len(target), *[1] * (target.dim() - 1), device=target.device)
        return scaled(mask.float(), weight.to(mask.device))


def masks_its_loss(model: Any) -> bool:
    """Whether a model's loss is the mean of errors times their mask, tried with errors of 1."""
    ones, mask = torch.ones(2, 1, 1, 8, 8), torch.tensor([1.0, 4.0]).view(2, 1, 1, 1, 1)
    try:
        loss = model.get_loss_fn()
        plain, masked = (
            float(loss(ones.clone(), (torch.zeros_like(ones), each)))
            for each in (torch.ones_like(mask), mask)
        )
    except (TypeError, ValueError, AssertionError, RuntimeError):
        return False
    return plain > 0 and abs(masked / plain - 2.5) < 1e-6


def _put_in(cls: type, calls: PreparedCalls, base_module: str) -> None:
    """Edits the `prepare_inputs` that a class defines; those of the base classes only raise."""
    own = vars(cls).get(METHOD)
    if own is None or cls.__module__ == base_module:
        return
    try:
        edited = edited_function(own, (DRAW,), calls)
    except ValueError as error:
        # A model is refused when it trains: its module may be imported for another one.
        edited = _refusing(str(error))

    def prepare_inputs(self: Any, inputs: Any, timestep_quantile: float | None = None) -> Any:
        # An evaluation asks for one quantile of the host's law.
        if timestep_quantile is not None or not is_training():
            return own(self, inputs, timestep_quantile)
        features, (*targets, mask) = edited(self, inputs, timestep_quantile)
        return features, (*targets, calls.mask(mask, targets[0]))

    setattr(cls, METHOD, prepare_inputs)


def _refusing(message: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise ValueError(f"{message}; known are diffusion-pipe's flow models, not SDXL and Cosmos 1")

    return refuse
