"""From the inputs of a batch to its losses, with whatever accelerates the training beside the timesteps.

Dims: `B` samples of this rank, `N` tokens, `D` width of the model.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from speedit_plugins.policies.policy import TimestepDraw
from speedit_plugins.trainer.build import Process
from speedit_plugins.trainer.diffusion.gaussian_process import LossTerms, Noised
from speedit_plugins.trainer.inputs import ModelInputs


class Forward(Protocol):
    """What the objective needs of an engine."""

    model: nn.Module

    def autocast(self) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a forward pass was given, and what it returned.

    `hidden` has the tokens (B, ..., N, D) after the block that an acceleration asked for, or is None.
    `predict` runs the model on the same noised inputs again, with keyword arguments of its forward pass.
    """

    given: ModelInputs
    draw: TimestepDraw
    noised: Noised
    prediction: Tensor
    hidden: Tensor | None
    predict: Callable[..., Any]


class Acceleration:
    """A change of the training step that leaves the timesteps alone. Each method may be left as it is.

    Layers that only the training needs belong into the model, see `models.training_only`: there they are
    trained, averaged and saved with it.
    """

    def advance(self, step: int) -> None:
        """Called before each optimizer step with the number of steps done."""

    def paired(self, given: ModelInputs) -> ModelInputs:
        """The inputs with which the batch is noised."""
        return given

    def asked(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward pass, such as `hidden_after`."""
        return {}

    def terms(self, outcome: Outcome, terms: LossTerms) -> LossTerms:
        """The losses of the batch, made from those of the process and the accelerations before this one."""
        return terms

    def rehearse(self, predict: Callable[..., Any], x_t: Tensor, hidden: Tensor | None) -> None:
        """Runs what `terms` runs with gradients beside the first pass, so that its memory can be counted.

        Args:
            predict: calls the model on x_t, with keyword arguments of its forward pass.
            x_t: (B, C, ...), on the meta device.
            hidden: see `Outcome`.
        """

    def after_step(self) -> None:
        """Called after each optimizer step that moved the weights."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs beside the weights of the model; the same on every rank."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""


class Objective:
    """Noises a batch, calls the model, and returns the losses.

    Args:
        engine: runs the forward pass.
        process: noises the batch and scores the prediction.
        accelerations: in the order in which they change the losses.
    """

    def __init__(self, engine: Forward, process: Process, accelerations: Sequence[Acceleration] = ()) -> None:
        self._engine, self.process, self.accelerations = engine, process, tuple(accelerations)

    def advance(self, step: int) -> None:
        """Tells every acceleration the number of steps done."""
        for each in self.accelerations:
            each.advance(step)

    def after_step(self) -> None:
        """Tells every acceleration that the weights moved."""
        for each in self.accelerations:
            each.after_step()

    def state_dict(self) -> dict[str, Any]:
        """What the accelerations keep, by their class; without those that keep nothing."""
        found = {type(each).__name__: each.state_dict() for each in self.accelerations}
        return {name: state for name, state in found.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`. An acceleration without a state there keeps its own."""
        for each in self.accelerations:
            if type(each).__name__ in state:
                each.load_state_dict(state[type(each).__name__])

    def losses(self, given: ModelInputs, draw: TimestepDraw) -> LossTerms:
        """The losses (B,) of a batch at the drawn timesteps."""
        for each in self.accelerations:
            given = each.paired(given)
        noised = self.process.corrupt(given.latents, draw, noise=given.noise)

        def predict(**options: Any) -> Any:
            with self._engine.autocast():
                return self._engine.model(noised.x_t, noised.timestep, given.condition, **options)

        found = predict(**asked_of(self.accelerations))
        prediction, hidden = found if isinstance(found, tuple) else (found, None)
        terms = self.process.loss(prediction, noised, draw)
        outcome = Outcome(given, draw, noised, prediction, hidden, predict)
        for each in self.accelerations:
            terms = each.terms(outcome, terms)
        return terms


def asked_of(accelerations: Sequence[Acceleration]) -> dict[str, Any]:
    """Keyword arguments of the model's forward pass that accelerations ask for."""
    return {name: value for each in accelerations for name, value in each.asked().items()}
