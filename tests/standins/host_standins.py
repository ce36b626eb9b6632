"""Small diffusion objects with the hosts' exact signatures, and their seams.

They are written from DDPM's formulas. They replace checkouts in tests; nobody should train with them.

Dims: T timesteps, B batch.
"""

import enum
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from conformance.diffusion_object import DrawingSeam, ObjectSeam
from conformance.schedule_sampler import SamplerSeam
from conformance.seam import Seam
from torch import Tensor

NUM_TIMESTEPS = 1000


class ModelMeanType(enum.Enum):
    EPSILON = enum.auto()
    START_X = enum.auto()


class ModelVarType(enum.Enum):
    LEARNED_RANGE = enum.auto()
    FIXED_LARGE = enum.auto()


class LossType(enum.Enum):
    MSE = enum.auto()
    KL = enum.auto()


def spread(table: Any, t: Tensor, like: Tensor) -> Tensor:
    """A numpy table (T,) at t (B,), float32, shaped to multiply `like`."""
    return torch.from_numpy(np.asarray(table))[t].float().view(-1, *[1] * (like.dim() - 1))


def over_all_but_batch(x: Tensor) -> Tensor:
    return x.mean(dim=tuple(range(1, x.dim())))


class GaussianDiffusion:
    """DiT's and guided-diffusion's object."""

    sigma_axis = 1

    def __init__(self, *, betas: Any, learn_sigma: bool = True, loss_type: LossType = LossType.MSE) -> None:
        self.betas = np.asarray(betas, dtype=np.float64)
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        self.num_timesteps = len(self.betas)
        self.model_mean_type = ModelMeanType.EPSILON
        self.model_var_type = ModelVarType.LEARNED_RANGE if learn_sigma else ModelVarType.FIXED_LARGE
        self.loss_type = loss_type

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        signal = spread(self.alphas_cumprod**0.5, t, x_start)
        return signal * x_start + spread((1 - self.alphas_cumprod) ** 0.5, t, x_start) * noise

    def training_losses(
        self, model: Any, x_start: Tensor, t: Tensor, model_kwargs: Any = None, noise: Any = None
    ) -> dict[str, Tensor]:
        noise = torch.randn_like(x_start) if noise is None else noise
        return self.terms(model(self.q_sample(x_start, t, noise), t, **(model_kwargs or {})), noise, t)

    def terms(self, answer: Any, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        if self.loss_type is LossType.KL:
            return {"loss": over_all_but_batch(answer**2)}
        terms = {}
        if self.model_var_type is ModelVarType.LEARNED_RANGE:
            answer, sigma = answer.chunk(2, dim=self.sigma_axis)
            terms["vb"] = over_all_but_batch((sigma - 0.1) ** 2)
        terms["mse"] = self.mse(over_all_but_batch((noise - answer) ** 2), t)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def mse(self, error: Tensor, t: Tensor) -> Tensor:
        return error

    def p_sample_loop(self, model: Any, shape: Any, device: Any = None) -> Tensor:
        return self._loop(model, shape, 1.0)

    def ddim_sample_loop(self, model: Any, shape: Any, device: Any = None) -> Tensor:
        return self._loop(model, shape, 0.0)

    def _loop(self, model: Any, shape: Any, noise_scale: float) -> Tensor:
        x = torch.randn(shape)
        for step in reversed(range(self.num_timesteps)):
            t = torch.full((shape[0],), step)
            epsilon = self.wrapped(model)(x, t)
            if self.model_var_type is ModelVarType.LEARNED_RANGE:
                epsilon = epsilon.chunk(2, dim=self.sigma_axis)[0]
            beta, alpha_bar = self.betas[step], self.alphas_cumprod[step]
            x = (x - beta / (1 - alpha_bar) ** 0.5 * epsilon) / (1 - beta) ** 0.5
            x = x + noise_scale * beta**0.5 * torch.randn(shape)
        return x

    def wrapped(self, model: Any) -> Any:
        return model


class SpacedDiffusion(GaussianDiffusion):
    """Respaced: gives the model the original timesteps, and passes *args on as the hosts do."""

    def __init__(self, use_timesteps: Any, **kwargs: Any) -> None:
        alphas_cumprod = np.cumprod(1 - np.asarray(kwargs["betas"], dtype=np.float64))
        self.timestep_map = sorted(use_timesteps)
        self.original_num_steps = len(alphas_cumprod)
        kept = alphas_cumprod[self.timestep_map]
        kwargs["betas"] = 1 - kept / np.append(1.0, kept[:-1])
        super().__init__(**kwargs)

    def training_losses(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return super().training_losses(self.wrapped(model), *args, **kwargs)

    def wrapped(self, model: Any) -> Any:
        table = torch.tensor(self.timestep_map)
        return lambda x, t, **kwargs: model(x, table[t], **kwargs)


class LatteDiffusion(SpacedDiffusion):
    """Video (B, F, C, H, W): the variance channels are appended in dimension 2."""

    sigma_axis = 2


class OpenSoraPlanDiffusion(SpacedDiffusion):
    """Video (B, C, F, H, W). While training, the model returns a tuple."""

    def terms(self, answer: Any, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        return super().terms(answer[0], noise, t)


class PixArtDiffusion(SpacedDiffusion):
    """The argument is called `timestep`. A masked loss may add a term `mae`."""

    mae = 0.0

    def training_losses(
        self,
        model: Any,
        x_start: Tensor,
        timestep: Tensor,
        model_kwargs: Any = None,
        noise: Any = None,
        skip_noise: bool = False,
    ) -> dict[str, Tensor]:
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, timestep, noise)
        table = torch.tensor(self.timestep_map)
        answer = model(x_t, timestep=table[timestep], **(model_kwargs or {}))
        terms = self.terms(answer, noise, timestep)
        if self.mae:
            terms["mae"] = torch.full_like(terms["loss"], self.mae)
            terms["loss"] = terms["loss"] + terms["mae"]
        return terms


class MaskedDiffusion(SpacedDiffusion):
    """MDT's object: Min-SNR 5 is in its mse."""

    def mse(self, error: Tensor, t: Tensor) -> Tensor:
        alphas_cumprod = torch.from_numpy(self.alphas_cumprod)[t].float()
        snr = alphas_cumprod / (1 - alphas_cumprod)
        return snr.clamp(max=5.0) / snr * error


class _Respaced:
    """A model at the timesteps of the whole schedule."""

    def __init__(self, model: Any, timestep_map: list[int]) -> None:
        self.model, self.timestep_map = model, timestep_map

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        return self.model(x, torch.tensor(self.timestep_map)[t].float(), **kwargs)


class HunyuanDiffusion:
    """HunyuanDiT's object: it draws t itself, and its model returns a mapping."""

    sigma_axis = 1
    mse_loss_weight_type = "constant"
    # It is no subclass: no training method of its classes has an argument for t.
    q_sample, terms, mse = GaussianDiffusion.q_sample, GaussianDiffusion.terms, GaussianDiffusion.mse
    _loop, p_sample_loop = GaussianDiffusion._loop, GaussianDiffusion.p_sample_loop
    ddim_sample_loop = GaussianDiffusion.ddim_sample_loop

    def __init__(self, use_timesteps: Any, **kwargs: Any) -> None:
        vars(self).update(vars(SpacedDiffusion(use_timesteps, **kwargs)))

    def training_losses(self, model: Any, controlnet: Any = None, *args: Any, **kwargs: Any) -> Any:
        return self._drawn_losses(self._wrap_model(model), *args, **kwargs)

    def _drawn_losses(self, model: Any, x_start: Tensor, model_kwargs: Any = None, noise: Any = None) -> Any:
        t = torch.randint(0, self.num_timesteps, (len(x_start),), device=x_start.device)
        noise = torch.randn_like(x_start) if noise is None else noise
        answer = model(self.q_sample(x_start, t, noise=noise), t, **(model_kwargs or {}))
        return self.terms(answer["x"], noise, t)

    def _wrap_model(self, model: Any) -> Any:
        return model if isinstance(model, _Respaced) else _Respaced(model, self.timestep_map)

    def wrapped(self, model: Any) -> Any:
        return lambda x, t: self._wrap_model(model)(x, t)["x"]


class PointDiffusion:
    """DiT-3D's object: float32 torch tables, and a training method of another name that returns (B,)."""

    def __init__(self, betas: Any, loss_type: str, model_mean_type: str, model_var_type: str) -> None:
        self.betas = torch.from_numpy(np.asarray(betas)).float()
        self.alphas_cumprod = torch.from_numpy(np.cumprod(1 - np.asarray(betas))).float()
        self.num_timesteps = len(self.betas)
        self.loss_type = loss_type
        self.model_mean_type = model_mean_type

    def p_losses(
        self, denoise_fn: Any, data_start: Tensor, t: Tensor, noise: Any = None, y: Any = None
    ) -> Tensor:
        noise = torch.randn_like(data_start) if noise is None else noise
        alpha_bar = self.alphas_cumprod[t].view(-1, 1, 1)
        answer = denoise_fn(alpha_bar.sqrt() * data_start + (1 - alpha_bar).sqrt() * noise, t, y)
        return over_all_but_batch((noise - answer) ** 2)

    def p_sample_loop(self, denoise_fn: Any, shape: Any, device: Any, y: Any = None) -> Tensor:
        x = torch.randn(shape)
        for step in reversed(range(self.num_timesteps)):
            x = x - 0.1 * denoise_fn(x, torch.full((shape[0],), step), y) + 0.01 * torch.randn(shape)
        return x


class ScheduleSampler(ABC):
    """guided-diffusion's base class, whose own `sample` divides the weights by the density."""

    @abstractmethod
    def weights(self) -> Any: ...

    def sample(self, batch_size: int, device: Any) -> Any:
        raise NotImplementedError


class LossAwareSampler(ScheduleSampler):
    """The class that the host's loop reports losses to."""

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        raise NotImplementedError

    @abstractmethod
    def update_with_all_losses(self, ts: Any, losses: Any) -> None: ...


def create(host_class: type = SpacedDiffusion, respacing: str = "", **kwargs: Any) -> Any:
    """The hosts' factory: '' keeps all timesteps, '50' keeps 50."""
    steps = np.linspace(0, NUM_TIMESTEPS - 1, int(respacing or NUM_TIMESTEPS)).round().astype(int).tolist()
    return host_class(steps, betas=np.linspace(1e-4, 0.02, NUM_TIMESTEPS), **kwargs)


def create_points(respacing: str = "") -> PointDiffusion:
    """DiT-3D's cannot be respaced: it gets fewer timesteps, and end points scaled to reach pure noise."""
    num_timesteps = int(respacing or NUM_TIMESTEPS)
    betas = np.linspace(1e-4, min(0.02 * NUM_TIMESTEPS / num_timesteps, 0.5), num_timesteps)
    return PointDiffusion(betas, "mse", "eps", "fixedsmall")


IMAGES = (6, 4, 4, 4)
VIDEOS = (6, 2, 4, 4, 4)
SEAMS: dict[str, Seam] = {
    "dit": ObjectSeam(lambda r: create(respacing=r), IMAGES),
    "dit, fixed variance": ObjectSeam(lambda r: create(respacing=r, learn_sigma=False), IMAGES, None),
    "latte": ObjectSeam(lambda r: create(LatteDiffusion, r), VIDEOS, 2),
    "open_sora_plan": ObjectSeam(
        lambda r: create(OpenSoraPlanDiffusion, r), VIDEOS, answers_tuple=True, sampling=("ddim_sample_loop",)
    ),
    "hunyuan_dit": DrawingSeam(lambda r: create(HunyuanDiffusion, r), IMAGES),
    "pixart_alpha": ObjectSeam(lambda r: create(PixArtDiffusion, r), IMAGES),
    "dit_3d": ObjectSeam(create_points, (6, 3, 8), None, "p_losses", sampling=("p_sample_loop",)),
    "guided_diffusion": SamplerSeam(lambda r: create(respacing=r), IMAGES, sampler_class=ScheduleSampler),
    "mdt": SamplerSeam(
        lambda r: create(MaskedDiffusion, r), IMAGES, sampler_class=ScheduleSampler, num_losses=2
    ),
}
