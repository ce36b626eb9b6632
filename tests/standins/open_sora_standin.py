"""A small `opensora` with the signatures and the order of draws of each version.

Versions differ in their tables (numpy, or torch on a hard-coded CUDA device), in the place of `t` and who
draws it, in `mask` and `weights`, and in the rectified flow. The variational term is some function of the
variance
channels: the plugin must leave it alone.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from mmengine.registry import Registry
from torch import Tensor

VERSIONS = ("1.0.0", "1.1.0", "1.2.0", "1.3")
PLUGIN = "speedit_plugins.hosts.open_sora"


@contextmanager
def installed(version: str) -> Iterator[None]:
    """`import opensora` finds the stand-in of this version; afterwards it and the plugin are unloaded."""
    modules = _modules(version)
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("opensora")}
    try:
        sys.modules.update(modules)
        yield
    finally:
        for name in [name for name in sys.modules if name.startswith(("opensora", PLUGIN))]:
            del sys.modules[name]
        sys.modules.update(hidden)
        importlib.invalidate_caches()


def build_module(module: dict[str, Any], builder: Registry, **kwargs: Any) -> Any:
    return builder.build({**module, **kwargs})


def _modules(version: str) -> dict[str, ModuleType]:
    registry = Registry("scheduler", scope="opensora")
    gaussian = _gaussian_class(version)
    spaced = _spaced_class(gaussian)
    iddpm = _iddpm_class(spaced, version)
    registry.register_module(name="iddpm", module=iddpm)
    members: dict[str, dict[str, Any]] = {
        "opensora": {},
        "opensora.registry": {"SCHEDULERS": registry, "build_module": build_module},
        "opensora.schedulers": {"IDDPM": iddpm},
        "opensora.schedulers.iddpm": {"IDDPM": iddpm},
        "opensora.schedulers.iddpm.respace": {"SpacedDiffusion": spaced},
        "opensora.schedulers.iddpm.gaussian_diffusion": {"GaussianDiffusion": gaussian},
    }
    if version >= "1.2":
        rflow = RFLOW12 if version == "1.2.0" else RFLOW13
        registry.register_module(name="rflow", module=rflow)
        members["opensora.schedulers"]["RFLOW"] = rflow
    modules = {name: ModuleType(name) for name in members}
    for name, contents in members.items():
        modules[name].__path__ = []
        vars(modules[name]).update(contents)
        for value in contents.values():
            if isinstance(value, type) and value is not Registry:
                value.__module__ = name
    return modules


def _rows(table: Any, t: Tensor, like: Tensor) -> Tensor:
    values = torch.as_tensor(table, device=t.device)[t].float()
    return values.view(-1, *[1] * (like.ndim - 1))


def _mean_flat(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of each sample, over the frames (B, F) that a mask keeps."""
    if mask is None:
        return x.flatten(1).mean(1)
    return (x.mean((1, 3, 4)) * mask).sum(1) / mask.sum(1)


class _Gaussian:
    """What all versions have: tables, q_sample and the loss terms at a given t."""

    num_timesteps: int
    alphas_cumprod: Any

    def _tables(self, betas: Any, kind: str) -> None:
        self.model_mean_type = SimpleNamespace(name="EPSILON")
        self.loss_kind = kind
        self.betas = betas
        self.num_timesteps = len(betas)
        self.alphas_cumprod = (1 - betas).cumprod(0)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        noise = torch.randn_like(x_start) if noise is None else noise
        alpha_bar = _rows(self.alphas_cumprod, t, x_start)
        return alpha_bar.sqrt() * x_start + (1 - alpha_bar).sqrt() * noise

    def p_mean_variance(self, model: Any, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return model(x, t, **kwargs)

    def _vb(self, model: Any, x_t: Tensor, t: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        # As in the hosts, through p_mean_variance: it wraps the model again.
        return _mean_flat(self.p_mean_variance(model, x_t, t, **kwargs).chunk(2, dim=1)[1] ** 2, mask)

    def _terms(
        self, model: Any, x_start: Tensor, t: Tensor, args: Any, noise: Any, mask: Any = None
    ) -> dict[str, Tensor]:
        args = args or {}
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise=noise)
        if mask is not None:
            clean = self.q_sample(x_start, torch.zeros_like(t), noise=noise)
            x_t = torch.where(mask[:, None, :, None, None], x_t, clean)
        if self.loss_kind == "kl":
            return {"loss": self._vb(model, x_t, t, mask, **args)}
        output = model(x_t, t, **args)
        mse = _mean_flat((noise - output.chunk(2, dim=1)[0]) ** 2, mask)
        vb = self._vb(lambda *_: output, x_t, t, mask)
        return {"vb": vb, "mse": mse, "loss": mse + vb}

    def p_sample_loop(self, model: Any, x: Tensor, **args: Any) -> Tensor:
        for step in reversed(range(self.num_timesteps)):
            t = torch.full((len(x),), step)
            x = 0.9 * x - 0.1 * self.p_mean_variance(model, x, t, **args).chunk(2, dim=1)[0]
            x = x + 0.01 * torch.randn_like(x)
        return x


def _gaussian_class(version: str) -> type:
    class GaussianDiffusion10(_Gaussian):
        def __init__(self, *, betas: Any, loss_type: str) -> None:
            self._tables(torch.as_tensor(betas).double().numpy(), loss_type)

        def training_losses(
            self, model: Any, x_start: Tensor, t: Tensor, model_kwargs: Any = None, noise: Any = None
        ) -> Any:
            return self._terms(model, x_start, t, model_kwargs, noise)

    class GaussianDiffusion11(_Gaussian):
        def __init__(self, *, betas: Any, loss_type: str, device: str = "cuda") -> None:
            # Without a CUDA device this raises, as the host's does.
            where = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
            self._tables(torch.as_tensor(betas).float().to(where), loss_type)

        def training_losses(
            self,
            model: Any,
            x_start: Tensor,
            t: Tensor,
            model_kwargs: Any = None,
            noise: Any = None,
            mask: Any = None,
            weights: Any = None,
        ) -> Any:
            return self._terms(model, x_start, t, model_kwargs, noise, mask)

    class GaussianDiffusion12(GaussianDiffusion11):
        def training_losses(
            self,
            model: Any,
            x_start: Tensor,
            model_kwargs: Any = None,
            noise: Any = None,
            mask: Any = None,
            weights: Any = None,
            t: Any = None,
        ) -> Any:
            t = torch.randint(0, self.num_timesteps, (x_start.shape[0],), device=x_start.device)
            return self._terms(model, x_start, t, model_kwargs, noise, mask)

    return {"1.0.0": GaussianDiffusion10, "1.1.0": GaussianDiffusion11}.get(version, GaussianDiffusion12)


class _WrappedModel:
    def __init__(self, model: Any, steps: list[int]) -> None:
        self.model = model
        self.steps = steps

    def __call__(self, x: Tensor, ts: Tensor, **kwargs: Any) -> Tensor:
        return self.model(x, torch.tensor(self.steps)[ts], **kwargs)


def _spaced_class(gaussian: type) -> type:
    class SpacedDiffusion(gaussian):
        def __init__(self, use_timesteps: Any, **kwargs: Any) -> None:
            self.original_num_steps = len(kwargs["betas"])
            self.timestep_map = sorted(use_timesteps)
            base = gaussian(**kwargs)
            kept = torch.as_tensor(base.alphas_cumprod)[self.timestep_map]
            betas = 1 - kept / torch.cat([torch.ones(1), kept[:-1]])
            super().__init__(**{**kwargs, "betas": betas})

        def p_mean_variance(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

        def training_losses(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            return super().training_losses(self._wrap_model(model), *args, **kwargs)

        def _wrap_model(self, model: Any) -> Any:
            return model if isinstance(model, _WrappedModel) else _WrappedModel(model, self.timestep_map)

    return SpacedDiffusion


def _iddpm_class(spaced: type, version: str) -> type:
    class IDDPM(spaced):
        def __init__(
            self,
            num_sampling_steps: int | None = None,
            timestep_respacing: str | None = None,
            use_kl: bool = False,
            diffusion_steps: int = 1000,
            cfg_scale: float = 4.0,
        ) -> None:
            if num_sampling_steps is not None:
                assert timestep_respacing is None
                timestep_respacing = str(num_sampling_steps)
            count = int(timestep_respacing or diffusion_steps)
            steps = torch.linspace(0, diffusion_steps - 1, count, dtype=torch.float64).round().int().tolist()
            betas = torch.linspace(1e-4, 0.02, diffusion_steps, dtype=torch.float64)
            super().__init__(use_timesteps=steps, betas=betas, loss_type="kl" if use_kl else "mse")
            self.cfg_scale = cfg_scale

        def sample(
            self,
            model: Any,
            text_encoder: Any,
            z: Any,
            prompts: Any,
            device: Any,
            additional_args: Any = None,
            **_: Any,
        ) -> Tensor:
            # 1.0 takes the size and draws the noise itself.
            noise = torch.randn(len(prompts), *z) if version == "1.0.0" else z
            return self.p_sample_loop(model, noise, **text_encoder.encode(prompts))

    return IDDPM


def _shifted(t: Tensor, args: Any, num_timesteps: int) -> Tensor:
    ratio = (args["height"] * args["width"]).float().sqrt() / 512
    # Latent frames of the host's VAE: 2 to 16 frames are none.
    frames = args["num_frames"]
    ratio = ratio * (torch.ones_like(frames) if frames[0] == 1 else frames // 17 * 5).sqrt()
    t = t / num_timesteps
    return ratio * t / (1 + (ratio - 1) * t) * num_timesteps


class RFlowScheduler:
    def __init__(
        self,
        num_timesteps: int = 1000,
        use_discrete_timesteps: bool = False,
        sample_method: str = "uniform",
        use_timestep_transform: bool = False,
    ) -> None:
        self.num_timesteps = num_timesteps
        self.use_discrete_timesteps = use_discrete_timesteps
        self.sample_method = sample_method
        self.use_timestep_transform = use_timestep_transform

    def training_losses(
        self,
        model: Any,
        x_start: Tensor,
        model_kwargs: Any = None,
        noise: Any = None,
        mask: Any = None,
        weights: Any = None,
        t: Any = None,
        mask_index: Any = None,
    ) -> Any:
        if t is None:
            n, T = len(x_start), self.num_timesteps
            if self.use_discrete_timesteps:
                t = torch.randint(0, T, (n,))
            else:
                t = torch.rand(n) * T if self.sample_method == "uniform" else torch.randn(n).sigmoid() * T
            if self.use_timestep_transform:
                t = _shifted(t, model_kwargs, T)
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.add_noise(x_start, noise, t)
        if mask is not None:
            x_t = torch.where(mask[:, None, :, None, None], x_t, self.add_noise(x_start, noise, t * 0))
        velocity = model(x_t, t, **(model_kwargs or {})).chunk(2, dim=1)[0]
        return {"loss": _mean_flat((velocity - (x_start - noise)) ** 2, mask)}

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        time = (timesteps.float() / self.num_timesteps).view(-1, 1, 1, 1, 1)
        return (1 - time) * original_samples + time * noise


class RFLOW12:
    """Open-Sora 1.2's and VideoSys' rectified flow."""

    def __init__(self, num_sampling_steps: int = 10, num_timesteps: int = 1000, **kwargs: Any) -> None:
        self.num_sampling_steps = num_sampling_steps
        self.num_timesteps = num_timesteps
        self.scheduler = RFlowScheduler(num_timesteps=num_timesteps, **kwargs)

    def sample(self, model: Any, text_encoder: Any, z: Tensor, prompts: Any, device: Any, **_: Any) -> Tensor:
        for step in range(self.num_sampling_steps):
            t = torch.full((len(z),), (1 - step / self.num_sampling_steps) * self.num_timesteps)
            velocity = model(z, t, **text_encoder.encode(prompts)).chunk(2, dim=1)[0]
            z = z + velocity / self.num_sampling_steps
        return z

    def training_losses(
        self,
        model: Any,
        x_start: Tensor,
        model_kwargs: Any = None,
        noise: Any = None,
        mask: Any = None,
        weights: Any = None,
        t: Any = None,
    ) -> Any:
        return self.scheduler.training_losses(model, x_start, model_kwargs, noise, mask, weights, t)


class RFLOW13(RFLOW12):
    def training_losses(  # noqa: PLR0913 - the host's signature
        self,
        model: Any,
        x_start: Tensor,
        model_args: Any = None,
        noise: Any = None,
        mask: Any = None,
        weights: Any = None,
        t: Any = None,
        mask_index: Any = None,
        text_uncond_prob: Any = None,
        **kwargs: Any,
    ) -> Any:
        return self.scheduler.training_losses(model, x_start, model_args, noise, mask, weights, t, mask_index)
