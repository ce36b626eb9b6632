"""A small `mmagic` with the signatures of 1.2's scheduler, from DDPM's formulas."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from mmengine.registry import Registry
from torch import Tensor

PLUGIN = "speedit_plugins.hosts.mmagic"


@contextmanager
def installed() -> Iterator[None]:
    """`import mmagic` finds the stand-in; afterwards it and the plugin are unloaded."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("mmagic.")}
    modules = _modules()
    try:
        sys.modules.update(modules)
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "mmagic" or name == PLUGIN]:
            del sys.modules[name]
        sys.modules.update(hidden)
        importlib.invalidate_caches()


class EditDDPMScheduler:
    """Numpy tables. As in the host, the two training methods are not written."""

    def __init__(  # noqa: PLR0913 - the host's signature
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
    ) -> None:
        self.num_train_timesteps = num_train_timesteps
        if beta_schedule != "linear":
            raise NotImplementedError(f"{beta_schedule} is not implemented for {self.__class__}")
        linear = np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float64)
        self.betas = linear if trained_betas is None else np.asarray(trained_betas)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = np.cumprod(self.alphas, axis=0)
        self.one = np.array(1.0)
        self.num_inference_steps: int | None = None
        self.timesteps = np.arange(0, num_train_timesteps)[::-1].copy()
        self.variance_type = variance_type
        self.clip_sample = clip_sample

    def set_timesteps(self, num_inference_steps: int) -> None:
        self.num_inference_steps = min(self.num_train_timesteps, num_inference_steps)
        stride = self.num_train_timesteps // self.num_inference_steps
        self.timesteps = np.arange(0, self.num_train_timesteps, stride)[::-1].copy()

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        predict_epsilon: bool = True,
        cond_fn: Any = None,
        cond_kwargs: Any = None,
        generator: Any = None,
    ) -> dict[str, Tensor]:
        beta, alpha_bar = float(self.betas[timestep]), float(self.alphas_cumprod[timestep])
        mean = (sample - beta / (1 - alpha_bar) ** 0.5 * model_output) / (1 - beta) ** 0.5
        return {"prev_sample": mean + (beta**0.5 if timestep else 0.0) * torch.randn_like(sample)}

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Any:
        # A numpy array times a tensor: this raises for more than one timestep.
        signal = self.alphas_cumprod[timesteps] ** 0.5
        return signal * original_samples + (1 - self.alphas_cumprod[timesteps]) ** 0.5 * noise

    def training_loss(self, model: Any, x_0: Any, t: Any) -> Any:
        raise NotImplementedError("This function is supposed to return a dict containing loss items")

    def sample_timestep(self) -> Any:
        raise NotImplementedError

    def __len__(self) -> int:
        return self.num_train_timesteps


class AblatedDiffusionModel:
    """The model that a config of ours names."""

    def parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return losses["loss"], losses


def _modules() -> dict[str, ModuleType]:
    registry = Registry("diffusion scheduler", scope="mmagic")
    registry.register_module(name="EditDDPMScheduler", module=EditDDPMScheduler)
    members: dict[str, dict[str, Any]] = {
        "mmagic": {},
        "mmagic.registry": {"DIFFUSION_SCHEDULERS": registry},
        "mmagic.models": {"AblatedDiffusionModel": AblatedDiffusionModel},
        "mmagic.models.diffusion_schedulers": {"EditDDPMScheduler": EditDDPMScheduler},
    }
    modules = {name: ModuleType(name) for name in members}
    for name, contents in members.items():
        modules[name].__path__ = []
        vars(modules[name]).update(contents)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(modules[parent], last, modules[name])
    return modules
