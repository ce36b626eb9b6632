"""OneTrainer: each model's setup draws its timesteps in one mixin and makes its losses (B,) in another.

    import modules.modelSetup.mixin.ModelSetupNoiseMixin as module
    adapt(module, partial(SeparateDraws, "auto"))

A setup calls both with the model at hand, whose noise scheduler tells the schedule: a straight path for flow
models (SD3, Flux, Sana, ...), the scheduler's betas for the others (SD 1, 2 and XL, PixArt). `deterministic`
calls, as in a validation, are the host's own.

Dims: T timesteps, B batch.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.attachment import refuse_double_weights
from speedit_plugins.hosts.flow import HostsTime
from speedit_plugins.hosts.schedules import prediction_type_of
from speedit_plugins.hosts.separate_draws import SeparateDraws
from speedit_plugins.hosts.trainers.replaced import replace, replace_in_subclasses
from speedit_plugins.policies.schedule import NoiseSchedule

Own = Callable[..., Any]

_HOST = "OneTrainer"
_NOISE, _LOSSES, _FLOW = "ModelSetupNoiseMixin", "ModelSetupDiffusionLossMixin", "ModelSetupFlowMatchingMixin"


def adapt(module: ModuleType, draws_of: Callable[..., SeparateDraws]) -> None:
    """Puts a policy into OneTrainer, before or after its model setups are imported.

    Args:
        module: its `modules.modelSetup.mixin.ModelSetupNoiseMixin`.
        draws_of: makes the `SeparateDraws`, once for each noise scheduler that is trained with.

    Raises:
        ValueError: a method that is replaced is missing, or has a policy already.
    """
    noise = getattr(module, _NOISE)
    losses = getattr(import_module(module.__name__.replace(_NOISE, _LOSSES)), _LOSSES)
    setups = _Setups(draws_of)
    replace(noise, "_create_noise", setups.create_noise, _HOST)
    replace(noise, "_get_timestep_discrete", setups.discrete, _HOST)
    replace(noise, "_get_timestep_continuous", setups.continuous, _HOST)
    for name in ("_diffusion_losses", "_flow_matching_losses"):
        replace(losses, name, setups.losses, _HOST)
    replace_in_subclasses(noise, "predict", setups.predict, _HOST)


@dataclass
class _Prediction:
    """A call of a setup's `predict`. `data` are its scaled latents (B, ...), from the host's noise on."""

    model: Any
    batch: Any
    data: Tensor | None = None

    def seen(self) -> Tensor:
        """What is noised (B, ...). SD and SDXL draw before they make noise: there it is scaled here."""
        if self.data is not None:
            return self.data
        scaled: Tensor = self.batch["latent_image"] * self.model.vae.config["scaling_factor"]
        return scaled


@dataclass
class _Setups:
    """What the replaced methods do, and the draws for the noise scheduler that is trained with."""

    draws_of: Callable[..., SeparateDraws]
    prediction: _Prediction | None = None
    scheduler: Any = None
    draws: SeparateDraws | None = None
    # Timesteps of predictions without gradients, which wait for the one with gradients, by the batch's seed.
    prior: dict[int, Tensor] = field(default_factory=dict)

    def predict(
        self, own: Callable[..., Any], setup: Any, model: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """The host's prediction, during which its model and batch are known."""
        outer, self.prediction = self.prediction, _Prediction(model, batch)
        try:
            return own(setup, model, batch, *args, **kwargs)
        finally:
            self.prediction = outer

    def create_noise(
        self, own: Callable[..., Any], setup: Any, source_tensor: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """The host's noise. What it is for is what the policy observes."""
        if self.prediction is not None:
            self.prediction.data = source_tensor
        return own(setup, source_tensor, *args, **kwargs)

    def continuous(
        self, own: Callable[..., Any], setup: Any, deterministic: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """Refuses to train, or returns the host's t for a validation."""
        if self.prediction is not None and not deterministic:
            raise ValueError(
                "OneTrainer changes the t of Wuerstchen and Stable Cascade after it has drawn them: there is"
                " no place for a policy in these two"
            )
        return own(setup, deterministic, *args, **kwargs)

    def discrete(self, own: Own, *args: Any, **kwargs: Any) -> Tensor:
        """Timesteps int32 (B,)."""
        given = inspect.signature(own).bind(*args, **kwargs).arguments
        setup, config, generator = given["self"], given["config"], given["generator"]
        num_timesteps, shift = given["num_train_timesteps"], given.get("shift")

        def hosts_draw(source: torch.Generator = generator) -> Tensor:
            timestep: Tensor = own(**{**given, "generator": source})
            return timestep

        # The timestep preview of the window draws too, outside of any prediction.
        if given["deterministic"] or self.prediction is None:
            return hosts_draw()
        seed = generator.initial_seed()
        if torch.is_grad_enabled() and seed in self.prior:
            # The host's own noise comes from the same generator, behind its draw.
            hosts_draw()
            return self.prior.pop(seed)
        draws = self._draws_for(setup, self.prediction.model, config)
        clock = _clock(setup, num_timesteps, config.timestep_shift if shift is None else shift)
        with torch.enable_grad():
            timestep = draws.times(_Redraws(hosts_draw, generator), self.prediction.seen(), clock)
        if not torch.is_grad_enabled():
            # Prior prediction: the host predicts with the plain model first, and then trains at the same t.
            self.prior = {seed: timestep}
        return timestep

    def losses(
        self, own: Callable[..., Any], setup: Any, batch: Any, data: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """The host's losses (B,), each times its weight."""
        losses = own(setup, batch, data, *args, **kwargs)
        if not torch.is_grad_enabled():
            return losses
        if self.draws is None:
            raise ValueError("OneTrainer makes a loss, and no timesteps were drawn for it in `predict`")
        return self.draws.weigh(losses, data.get("timestep"))

    def _draws_for(self, setup: Any, model: Any, config: Any) -> SeparateDraws:
        scheduler = model.noise_scheduler
        if self.draws is None or scheduler is not self.scheduler:
            self.draws, self.scheduler = self._built(setup, scheduler), scheduler
        weight_fn = getattr(config.loss_weight_fn, "name", str(config.loss_weight_fn))
        if weight_fn != "CONSTANT":
            refuse_double_weights(
                self.draws.policy,
                f"OneTrainer's loss_weight_fn {weight_fn} weighs the loss",
                "set loss_weight_fn to CONSTANT",
            )
        bounds = (config.min_noising_strength, config.max_noising_strength)
        if not self.draws.policy.is_relative and bounds != (0, 1):
            raise ValueError(
                f"{self.draws.policy.name!r} draws by a law of its own, not between OneTrainer's noising"
                f" strengths {bounds[0]} and {bounds[1]}: set them to 0 and 1, and give the policy"
                f" window={[*bounds]}"
            )
        return self.draws

    def _built(self, setup: Any, scheduler: Any) -> SeparateDraws:
        if _is_flow(setup):
            schedule = NoiseSchedule.rectified_flow(scheduler.config["num_train_timesteps"])
            return self.draws_of(prediction_type="flow", schedule=schedule)
        return self.draws_of(
            prediction_type=prediction_type_of(scheduler), schedule=NoiseSchedule.from_betas(scheduler.betas)
        )


class _Redraws:
    """The host's draw: first from the generator of its step, as its noise, then from the policy's stream.

    Args:
        hosts_draw: takes a generator.
        generator: of the host's step.
    """

    def __init__(self, hosts_draw: Callable[[torch.Generator], Tensor], generator: torch.Generator) -> None:
        self._hosts_draw = hosts_draw
        self._generator: torch.Generator | None = generator
        self._device = generator.device

    def __call__(self) -> Tensor:
        """Timesteps (B,)."""
        generator, self._generator = self._generator, None
        if generator is None:
            # The global generator is the policy's stream while it thins.
            generator = torch.Generator(self._device).manual_seed(int(torch.randint(2**62, ())))
        return self._hosts_draw(generator)


def _is_flow(setup: Any) -> bool:
    """Whether a setup noises on a straight path. Sana does, although its scheduler has betas."""
    return any(each.__name__ == _FLOW for each in type(setup).__mro__)


def _clock(setup: Any, T: int, shift: float) -> HostsTime:
    """A timestep of the host is an index of the schedule. Its time is in the middle of the bin."""
    own_shift = (lambda: shift) if _is_flow(setup) else None
    return HostsTime(lambda t: (t + 0.5) / T, lambda draw, t: draw.index.to(t), own_shift)
