"""SimpleTuner: each model draws the sigmas of a batch in a method, and reduces its loss in another.

    import simpletuner.helpers.models.common as module
    adapt(module, partial(SeparateDraws, "auto"))

`sample_flow_sigmas` of a flow model returns sigma, our time, and the timesteps that the network gets for it.
The other models draw inside `prepare_batch`, and the loss is weighed per sample before `loss` takes its mean:
these two functions are changed (`statement_edits`). Its evaluation has draws and losses of its own.

Dims: B batch.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.attachment import refuse_double_weights
from speedit_plugins.hosts.draws.weighted_loss import is_constant
from speedit_plugins.hosts.edits.statement_edits import Edit, has_statement, rewritten
from speedit_plugins.hosts.flow import HostsTime
from speedit_plugins.hosts.schedules import from_diffusers, prediction_type_of
from speedit_plugins.hosts.separate_draws import OUR_TIME, SeparateDraws
from speedit_plugins.hosts.trainers.replaced import replace, replace_in_subclasses

Own = Callable[..., Any]

_HOST = "SimpleTuner"
_VALIDATION = "simpletuner.helpers.training.validation"
_DRAW = Edit(
    "if self.diffusion_blocks_controller is not None:\n    batch['timesteps'] =",
    "def speedit_drawn():\n"
    "    HOSTS_STATEMENT\n"
    "    return batch['timesteps']\n"
    "batch['timesteps'] = speedit_timesteps(self, speedit_drawn, batch, weights)",
)
_MEAN = Edit("loss = loss.mean()", "loss = speedit_weigh(self, loss, prepared_batch)\nHOSTS_STATEMENT")
# Sana's, whose one statement takes both means.
_BOTH_MEANS = Edit(
    "loss = loss.mean(dim=list(range(1, len(loss.shape)))).mean()",
    "loss = speedit_weigh(self, loss, prepared_batch)\nHOSTS_STATEMENT",
)
# What a model's network may get for a sigma.
_CONVENTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda sigma: 1000 * sigma,
    lambda sigma: sigma,
    lambda sigma: 1 - sigma,
)


def adapt(module: ModuleType, draws_of: Callable[..., SeparateDraws]) -> None:
    """Puts a policy into SimpleTuner's models, those that are imported later too.

    Args:
        module: its `simpletuner.helpers.models.common`.
        draws_of: makes the `SeparateDraws`, once for each noise schedule that is trained with.

    Raises:
        ValueError: a method or a statement that is changed is missing, or has a policy already.
    """
    base = module.ModelFoundation
    models = _Models(module, draws_of)
    for name, around in (
        ("sample_flow_sigmas", models.sigmas),
        ("loss", models.loss),
        ("prepare_batch", models.prepare_batch),
    ):
        if name != "sample_flow_sigmas":
            # Raises now if its statement is missing.
            models.changed(getattr(base, name), base)
        replace(base, name, around, _HOST)
    replace_in_subclasses(base, "sample_flow_sigmas", models.sigmas, _HOST)
    replace_in_subclasses(base, "loss", models.loss, _HOST)


@dataclass
class _Models:
    """What the replaced methods do, and the draws for the schedule that is trained with."""

    module: ModuleType
    draws_of: Callable[..., SeparateDraws]
    draws: SeparateDraws | None = None
    schedule: Any = None
    is_evaluating: bool = False
    is_weighed: bool = False
    # Names of the methods that run now: an override may call its parent's.
    running: set[str] = field(default_factory=set)
    functions: dict[Own, Own] = field(default_factory=dict)

    def sigmas(self, own: Own, model: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The sigmas (B,) of a batch and the timesteps (B,) for them."""
        if self._is_hosts("sample_flow_sigmas"):
            pair: tuple[Tensor, Tensor] = own(model, *args, **kwargs)
            return pair
        batch = inspect.signature(own).bind(model, *args, **kwargs).arguments["batch"]
        _refuse_modes(model)
        draws, pairs = self._draws_for("flow"), []

        def hosts_draw() -> Tensor:
            with self._under_way("sample_flow_sigmas"):
                pairs.append(own(model, *args, **kwargs))
            sigmas: Tensor = pairs[-1][0]
            return sigmas

        clock = HostsTime(OUR_TIME.time_of, OUR_TIME.t_of, lambda: self._shift(model, batch))
        sigmas = draws.times(hosts_draw, batch["latents"], clock)
        timesteps: Tensor = _convention(*pairs[0])(sigmas).to(pairs[0][1])
        for drawn, given in pairs:
            # To the bit, where the sigma is the host's.
            timesteps = torch.where(sigmas == drawn, given, timesteps)
        return sigmas, timesteps

    def timesteps(self, model: Any, drawn: Callable[[], Tensor], batch: Any, weights: Tensor) -> Tensor:
        """Timesteps int64 (B,) of a model of noise or v, whose own law is `weights` (T,)."""
        if self._is_hosts("timesteps"):
            return drawn()
        _refuse_modes(model)
        draws = self._draws_for(model.noise_schedule)
        own = iter([drawn])

        def hosts_draw() -> Tensor:
            # The host draws a batch in segments. What takes the place of a refused one is drawn from all.
            first = next(own, None)
            shape = len(batch["latents"])
            return torch.multinomial(weights, shape, replacement=True) if first is None else first()

        T = len(weights)
        clock = HostsTime(lambda t: (t + 0.5) / T, lambda draw, t: draw.index.to(t))
        return draws.times(hosts_draw, batch["latents"], clock)

    def prepare_batch(self, own: Own, model: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's, with its draw of discrete timesteps replaced."""
        return self.changed(own, type(model))(model, *args, **kwargs)

    def loss(self, own: Own, model: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's loss, a scalar, with the weights of its draw in it."""
        function = self.changed(own, type(model))
        if self._is_hosts("loss"):
            return function(model, *args, **kwargs)
        if self.draws is None:
            raise ValueError(
                f"{type(model).__name__} of SimpleTuner draws its t in another way: no policy fits"
            )
        self.is_weighed = False
        with self._under_way("loss"):
            loss = function(model, *args, **kwargs)
        policy = self.draws.policy
        if not self.is_weighed and (policy.learns or not is_constant(policy.weight)):
            raise ValueError(
                f"{type(model).__name__} of SimpleTuner makes a loss of its own, a scalar, and"
                f" {policy.name!r} weighs or learns from the loss of each sample: take a policy that only"
                " draws, such as 'logit_normal', or add weighting='constant'"
            )
        return loss

    def weigh(self, model: Any, loss: Tensor, batch: Any) -> Tensor:
        """A loss (B, ...) before its mean, times the weights of its draw."""
        if self.is_evaluating or self.draws is None or not torch.is_grad_enabled():
            return loss
        self.is_weighed = True
        is_flow = self.schedule == "flow"
        scheme = getattr(model.config, "weighting_scheme" if is_flow else "snr_gamma", None)
        # Only flow models with a loss of their own read the scheme.
        if scheme not in (None, 0, "none") and (
            not is_flow or not type(model).loss.__qualname__.startswith("ModelFoundation")
        ):
            name = "weighting_scheme" if is_flow else "snr_gamma"
            refuse_double_weights(
                self.draws.policy, f"SimpleTuner's {name} {scheme} weighs the loss", f"leave out --{name}"
            )
        key = batch["sigmas"].reshape(len(loss), -1)[:, 0] if is_flow else batch["timesteps"]
        return self.draws.weigh(loss, key)

    def changed(self, own: Own, model_class: type) -> Own:
        """One of the host's functions with the statements changed that draw or reduce, if it has them."""
        if own not in self.functions:
            is_loss = own.__name__ == "loss"
            edits = [_MEAN, _BOTH_MEANS] if is_loss else [_DRAW]
            if own.__qualname__.split(".")[0] == "ModelFoundation":
                edits = edits[:1]
            else:
                edits = [edit for edit in edits if has_statement(own, edit.begins)]
            home = own.__qualname__.rpartition(".")[0]
            owner = next((each for each in model_class.__mro__ if each.__qualname__ == home), None)
            names = {"speedit_weigh": self.weigh} if is_loss else {"speedit_timesteps": self.timesteps}
            self.functions[own] = rewritten(own, edits, names, host=_HOST, owner=owner) if edits else own
        return self.functions[own]

    def evaluate(self, own: Own, *args: Any, **kwargs: Any) -> Any:
        """The host's evaluation, in which draws and losses are its own."""
        self.is_evaluating = True
        try:
            return own(*args, **kwargs)
        finally:
            self.is_evaluating = False

    def _is_hosts(self, name: str) -> bool:
        """Whether a call is one inside of another, or of an evaluation."""
        return self.is_evaluating or name in self.running or not torch.is_grad_enabled()

    @contextmanager
    def _under_way(self, name: str) -> Iterator[None]:
        self.running.add(name)
        try:
            yield
        finally:
            self.running.discard(name)

    def _draws_for(self, schedule: Any) -> SeparateDraws:
        if self.draws is None or schedule is not self.schedule:
            if self.draws is None and _VALIDATION in sys.modules:
                # It is imported after the models.
                replace(sys.modules[_VALIDATION].Evaluation, "execute_eval", self.evaluate, _HOST)
            options = {} if schedule == "flow" else {"schedule": from_diffusers(schedule)}
            kind = "flow" if schedule == "flow" else prediction_type_of(schedule)
            self.draws, self.schedule = self.draws_of(prediction_type=kind, **options), schedule
        return self.draws

    def _shift(self, model: Any, batch: Any) -> float:
        """The shift s of the host's law: it moves sigma 1/2 to s / (1 + s)."""
        half = torch.full((1,), 0.5, device=batch["latents"].device)
        moved = self.module.apply_flow_schedule_shift(
            model.config, model.noise_schedule, half, batch["noise"]
        )
        return float(moved / (1 - moved))


def _convention(sigmas: Tensor, timesteps: Tensor) -> Callable[[Tensor], Tensor]:
    """What turns a model's sigma into its timestep, told from a draw (B,) of the host."""
    for each in _CONVENTIONS:
        wanted = each(sigmas.float())
        # bfloat16 has 8 bits.
        if torch.allclose(timesteps.float(), wanted, rtol=2**-7, atol=2**-7 * float(wanted.abs().max())):
            return each
    raise ValueError("SimpleTuner's model has timesteps that are neither 1000 sigma, sigma nor 1 - sigma")


def _refuse_modes(model: Any) -> None:
    """Raises ValueError for ways of training in which t is not one that is drawn for the sample."""
    crepa = getattr(model, "crepa_regularizer", None)
    modes = {
        "mixflow_enabled": getattr(model.config, "mixflow_enabled", False) is True,
        "diffusion blocks": getattr(model, "diffusion_blocks_controller", None) is not None,
        "twinflow_enabled": getattr(model.config, "twinflow_enabled", False) is True,
        "crepa's self_flow": getattr(crepa, "use_self_flow_features", False) is True,
        "OmniGen, whose t counts from noise to data": "OmniGen" in type(model).__name__,
    }
    found = [name for name, is_on in modes.items() if is_on]
    if found:
        raise ValueError(f"SimpleTuner with {', '.join(found)} draws in a way that no policy can replace")
