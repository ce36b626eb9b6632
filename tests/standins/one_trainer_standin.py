"""OneTrainer's two mixins and two of its model setups, in small, with the host's signatures.

Dims: B batch.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

HOME = "modules.modelSetup.mixin"


class ModelSetupNoiseMixin:
    """Draws noise and timesteps from the generator of the step."""

    def _create_noise(
        self,
        source_tensor: Tensor,
        config: Any,
        generator: torch.Generator,
        timestep: Tensor | None = None,
        betas: Tensor | None = None,
    ) -> Tensor:
        return torch.randn(source_tensor.shape, generator=generator)

    def _get_timestep_discrete(
        self,
        num_train_timesteps: int,
        deterministic: bool,
        generator: torch.Generator,
        batch_size: int,
        config: Any,
        shift: float | None = None,
    ) -> Tensor:
        if deterministic:
            return torch.tensor([num_train_timesteps // 2 - 1])
        shift = config.timestep_shift if shift is None else shift
        low, high = (
            num_train_timesteps * s for s in (config.min_noising_strength, config.max_noising_strength)
        )
        t = low + (high - low) * torch.rand(batch_size, generator=generator)
        return (num_train_timesteps * shift * t / ((shift - 1) * t + num_train_timesteps)).int()

    def _get_timestep_continuous(
        self, deterministic: bool, generator: torch.Generator, batch_size: int, config: Any
    ) -> Tensor:
        return (self._get_timestep_discrete(10_000, False, generator, batch_size, config) + 1) / 10_000


class ModelSetupFlowMatchingMixin:
    """Marks a flow."""


class ModelSetupDiffusionLossMixin:
    """Makes the loss (B,)."""

    def _diffusion_losses(self, batch: Any, data: Any, config: Any, **_: Any) -> Tensor:
        return _losses(batch, data)

    def _flow_matching_losses(self, batch: Any, data: Any, config: Any, **_: Any) -> Tensor:
        return _losses(batch, data)


def _losses(batch: dict[str, Any], data: dict[str, Any]) -> Tensor:
    losses: Tensor = ((data["predicted"] - data["target"]) ** 2).flatten(1).mean(1) * batch["loss_weight"]
    return losses


def install(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, type, type]:
    """Fresh copies of the mixins as the host's modules. Returns the first, and setups of a flow and of SD."""
    bases: Any = _fresh_mixins(monkeypatch)

    class FlowSetup(*bases):  # type: ignore[misc]  # bases of a run
        def predict(
            self,
            model: Any,
            batch: dict[str, Any],
            config: Any,
            progress: Any,
            *,
            deterministic: bool = False,
        ) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(0 if deterministic else progress.global_step)
            data = batch["latent_image"] * model.vae.config["scaling_factor"]
            noise = self._create_noise(data, config, generator)
            t = self._get_timestep_discrete(1000, deterministic, generator, len(data), config)
            sigma = ((t + 1) / 1000).view(-1, 1, 1, 1)
            noisy = (1 - sigma) * data + sigma * noise
            predicted = model.transformer(hidden_states=noisy, timestep=t / 1000).sample
            return {"timestep": t, "predicted": predicted, "target": noise - data}

        def calculate_loss(self, model: Any, batch: Any, data: Any, config: Any) -> Tensor:
            losses: Tensor = self._flow_matching_losses(batch=batch, data=data, config=config)
            return losses.mean()

    class DiffusionSetup(*bases[:2]):  # type: ignore[misc]  # as above
        def predict(
            self,
            model: Any,
            batch: dict[str, Any],
            config: Any,
            progress: Any,
            *,
            deterministic: bool = False,
        ) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(0 if deterministic else progress.global_step)
            data = batch["latent_image"] * model.vae.config["scaling_factor"]
            t = self._get_timestep_discrete(1000, deterministic, generator, len(data), config)
            noise = self._create_noise(data, config, generator, t, model.noise_scheduler.betas)
            noisy = model.noise_scheduler.add_noise(data, noise, t.expand(len(data)).long())
            predicted = model.unet(noisy, t, None).sample
            return {"timestep": t, "predicted": predicted, "target": noise}

        def calculate_loss(self, model: Any, batch: Any, data: Any, config: Any) -> Tensor:
            return self._diffusion_losses(batch=batch, data=data, config=config).mean()  # type: ignore[no-any-return]  # bases of a run

    return sys.modules[f"{HOME}.ModelSetupNoiseMixin"], FlowSetup, DiffusionSetup


def config() -> SimpleNamespace:
    """The options that decide on timesteps and losses, at the host's defaults."""
    return SimpleNamespace(
        loss_weight_fn=SimpleNamespace(name="CONSTANT"),
        min_noising_strength=0.0,
        max_noising_strength=1.0,
        timestep_shift=1.0,
    )


def _fresh_mixins(monkeypatch: pytest.MonkeyPatch) -> tuple[type, ...]:
    mixins = [ModelSetupNoiseMixin, ModelSetupDiffusionLossMixin, ModelSetupFlowMatchingMixin]
    fresh = {each.__name__: type(each.__name__, (), dict(vars(each))) for each in mixins}
    home = ModuleType(HOME)
    for package in ("modules", "modules.modelSetup"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(sys.modules, HOME, home)
    for name, mixin in fresh.items():
        module = ModuleType(f"{HOME}.{name}")
        setattr(module, name, mixin)
        setattr(home, name, module)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return tuple(fresh.values())
