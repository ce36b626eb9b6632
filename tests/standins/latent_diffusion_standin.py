"""A small `ldm.models.diffusion.ddpm` with the hosts' signatures and order of calls, from the formulas.

Source: Ho et al. 2020, arXiv:2006.11239, equations 4 to 14; Salimans & Ho 2022, arXiv:2202.00512, for v.

Dims: T timesteps, B batch.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from conformance.latent_diffusion import HOST, PLUGIN, LightningModule, lightning_modules
from torch import Tensor, nn


@contextmanager
def installed(**members: Any) -> Iterator[Any]:
    """`import ldm.models.diffusion.ddpm` finds the stand-in; afterwards it and the plugin are unloaded.

    Args:
        members: of the module; they replace the stand-in's.
    """
    names = ["ldm", "ldm.models", "ldm.models.diffusion", HOST]
    modules = {name: ModuleType(name) for name in names} | lightning_modules()
    for module in modules.values():
        module.__path__ = []
    classes = {each.__name__: each for each in (DDPM, LatentDiffusion, LatentInpaintDiffusion)}
    vars(modules[HOST]).update(classes, DiffusionWrapper=DiffusionWrapper, **members)
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name in modules or name == PLUGIN}
    try:
        sys.modules.update(modules)
        yield modules[HOST]
    finally:
        for name in (*modules, PLUGIN):
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


def instantiate(config: Any) -> Any:
    """The object that a config's target and params describe."""
    module, name = config["target"].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(**config.get("params", {}))


def rows(table: Any, t: Tensor) -> Tensor:
    """Rows of a table (T,) at t (B,), to multiply with images, (B, 1, 1, 1)."""
    at_t: Tensor = table[t]
    return at_t.view(-1, 1, 1, 1)


class DiffusionWrapper(LightningModule):
    def __init__(self, diff_model_config: Any, conditioning_key: str | None) -> None:
        super().__init__()
        self.diffusion_model = instantiate(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(self, x: Tensor, t: Tensor, c_crossattn: Any = None) -> Any:
        if self.conditioning_key is None:
            return self.diffusion_model(x, t)
        return self.diffusion_model(x, t, context=torch.cat(c_crossattn, 1))


class DDPM(LightningModule):
    lvlb_weights: Tensor

    def __init__(  # noqa: PLR0913 - the host's own arguments
        self,
        unet_config: Any,
        timesteps: int = 1000,
        loss_type: str = "l2",
        image_size: int = 256,
        channels: int = 3,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        original_elbo_weight: float = 0.0,
        l_simple_weight: float = 1.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.parameterization = parameterization
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.image_size, self.channels, self.loss_type = image_size, channels, loss_type
        self.original_elbo_weight, self.l_simple_weight = original_elbo_weight, l_simple_weight
        self.register_schedule(timesteps, linear_start, linear_end)
        self.learn_logvar = learn_logvar
        self.logvar: Any = torch.full((timesteps,), logvar_init)
        if learn_logvar:
            self.logvar = nn.Parameter(self.logvar)

    def register_schedule(self, timesteps: int, linear_start: float, linear_end: float) -> None:
        self.num_timesteps = timesteps
        roots = torch.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=torch.float64)
        betas = roots**2
        bar = (1 - betas).cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
        variance = betas * (1 - before) / (1 - bar)
        # Equation 12, and the released code's forms for the other targets.
        lvlb = {
            "eps": betas**2 / (2 * variance * (1 - betas) * (1 - bar)),
            "x0": 0.5 * bar.sqrt() / (2 - bar),
            "v": torch.ones_like(bar),
        }[self.parameterization]
        lvlb[0] = lvlb[1]
        tables = {
            "betas": betas,
            "alphas_cumprod": bar,
            "signal": bar.sqrt(),
            "noise": (1 - bar).sqrt(),
            "posterior_deviation": variance.sqrt(),
            "mean_of_start": betas * before.sqrt() / (1 - bar),
            "mean_of_now": (1 - before) * (1 - betas).sqrt() / (1 - bar),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float())
        self.register_buffer("lvlb_weights", lvlb.float(), persistent=False)

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return rows(self.signal, t) * noise - rows(self.noise, t) * x

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return rows(self.signal, t) * x_start + rows(self.noise, t) * noise

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        error = (target - pred).abs() if self.loss_type == "l1" else (target - pred) ** 2
        return error.mean() if mean else error

    def target_of(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.parameterization == "v":
            return self.get_v(x_start, noise, t)
        return {"eps": noise, "x0": x_start}[self.parameterization]

    def p_losses(
        self, x_start: Tensor, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        noise = torch.randn_like(x_start) if noise is None else noise
        answer = self.model(self.q_sample(x_start, t, noise), t)
        error = self.get_loss(answer, self.target_of(x_start, noise, t), mean=False).mean(dim=[1, 2, 3])
        prefix = "train" if self.training else "val"
        simple, vlb = error.mean(), (self.lvlb_weights[t] * error).mean()
        loss = simple * self.l_simple_weight + self.original_elbo_weight * vlb
        return loss, {f"{prefix}/loss_simple": simple, f"{prefix}/loss_vlb": vlb, f"{prefix}/loss": loss}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        t = torch.randint(0, self.num_timesteps, (x.shape[0],), device=self.device).long()
        return self.p_losses(x, t, *args, **kwargs)

    @torch.no_grad()
    def p_sample_loop(self, shape: tuple[int, ...]) -> Tensor:
        return self.denoised(shape, self.model)

    def denoised(self, shape: tuple[int, ...], predict: Any) -> Tensor:
        """Ancestral sampling of a noise-predicting model."""
        x = torch.randn(shape, device=self.device)
        for i in reversed(range(self.num_timesteps)):
            t = torch.full((shape[0],), i, device=self.device)
            start = (x - rows(self.noise, t) * predict(x, t)) / rows(self.signal, t)
            mean = rows(self.mean_of_start, t) * start + rows(self.mean_of_now, t) * x
            x = mean + rows(self.posterior_deviation, t) * torch.randn_like(x)
        return x


class LatentDiffusion(DDPM):
    def __init__(
        self,
        first_stage_config: Any,
        cond_stage_config: Any,
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        conditioning_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_timesteps_cond = num_timesteps_cond or 1
        self.shorten_cond_schedule = self.num_timesteps_cond > 1
        if cond_stage_config == "__is_unconditional__":
            conditioning_key = None
        super().__init__(conditioning_key=conditioning_key, **kwargs)
        self.cond_stage_key = cond_stage_key
        self.first_stage_model = instantiate(first_stage_config).eval()

    def forward(self, x: Tensor, c: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        t = torch.randint(0, self.num_timesteps, (x.shape[0],), device=self.device).long()
        return self.p_losses(x, c, t, *args, **kwargs)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Tensor) -> Any:
        return self.model(x_noisy, t, c_crossattn=[cond])

    def p_losses(  # type: ignore[override]  # as in the host
        self, x_start: Tensor, cond: Tensor, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        noise = torch.randn_like(x_start) if noise is None else noise
        answer = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        target, prefix = self.target_of(x_start, noise, t), "train" if self.training else "val"
        simple = self.get_loss(answer, target, mean=False).mean([1, 2, 3])
        logvar = self.logvar[t].to(self.device)
        loss = self.l_simple_weight * (simple / torch.exp(logvar) + logvar).mean()
        # The host computes the error a second time for this term.
        vlb = self.get_loss(answer, target, mean=False).mean(dim=(1, 2, 3))
        vlb = (self.lvlb_weights[t] * vlb).mean()
        loss = loss + self.original_elbo_weight * vlb
        terms = {f"{prefix}/loss_simple": simple.mean(), f"{prefix}/loss_vlb": vlb, f"{prefix}/loss": loss}
        return loss, terms

    @torch.no_grad()
    def p_sample_loop(self, cond: Tensor, shape: tuple[int, ...]) -> Tensor:  # type: ignore[override]  # as in the host
        return self.denoised(shape, lambda x, t: self.apply_model(x, t, cond))


class LatentInpaintDiffusion(LatentDiffusion):
    def __init__(self, finetune_keys: Any = ("weight",), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.finetune_keys = finetune_keys
