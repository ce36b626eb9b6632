"""A transport and a rectified flow with the hosts' signatures and order of draws; and their seams.

They are written from the straight path x_t = (1 - t) x_0 + t eps. t = 0 is noise in a transport and data in a
rectified flow.

Dims: B batch.
"""

import enum
from typing import Any

import torch
from conformance.flow import rectified_flow, transport
from open_sora_standin import RFLOW12
from torch import Tensor


class ModelType(enum.Enum):
    VELOCITY = enum.auto()
    NOISE = enum.auto()


class WeightType(enum.Enum):
    NONE = enum.auto()
    VELOCITY = enum.auto()


class ICPlan:
    """The straight path."""

    def compute_alpha_t(self, t: Tensor) -> tuple[Tensor, Any]:
        return t, 1

    def compute_sigma_t(self, t: Tensor) -> tuple[Tensor, Any]:
        return 1 - t, -1


class ReversedPlan(ICPlan):
    """RAE's straight path, whose t = 1 is noise."""

    def compute_alpha_t(self, t: Tensor) -> tuple[Tensor, Any]:
        return 1 - t, -1

    def compute_sigma_t(self, t: Tensor) -> tuple[Tensor, Any]:
        return t, 1


# RAE's path has the name of SiT's.
ReversedPlan.__name__ = "ICPlan"


class VPCPlan(ICPlan):
    """A path on which no closed form relates velocity and noise; its tables do not matter here."""


def rows(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.dim() - 1))


class Transport:
    """SiT's object; LightningDiT's takes `sp_timesteps`."""

    def __init__(
        self,
        model_type: ModelType = ModelType.VELOCITY,
        loss_type: WeightType = WeightType.NONE,
        path_sampler: Any = None,
    ) -> None:
        self.model_type, self.loss_type = model_type, loss_type
        self.path_sampler = path_sampler or ICPlan()

    def sample(self, x1: Tensor, sp_timesteps: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        x0 = torch.randn_like(x1)
        t = torch.rand(len(x1))
        if sp_timesteps is not None:
            t = t * (sp_timesteps[1] - sp_timesteps[0]) + sp_timesteps[0]
        return t.to(x1), x0, x1

    def training_losses(
        self, model: Any, x1: Tensor, model_kwargs: Any = None, sp_timesteps: Any = None
    ) -> dict[str, Tensor]:
        t, x0, x1 = self.sample(x1, sp_timesteps)
        x_t = rows(t, x1) * x1 + (1 - rows(t, x1)) * x0
        prediction = model(x_t, t, **(model_kwargs or {}))
        target = x0 if self.model_type is ModelType.NOISE else x1 - x0
        return {"pred": prediction, "loss": ((prediction - target) ** 2).flatten(1).mean(1)}


class ReversedTransport(Transport):
    """RAE's object: t = 1 is noise, training ends at 0.999, and t is shifted towards the noise."""

    train_eps = sample_eps = 0

    def __init__(self, time_dist_shift: float = 1.0) -> None:
        super().__init__(path_sampler=ReversedPlan())
        self.time_dist_type, self.time_dist_shift = "uniform", time_dist_shift

    def check_interval(self, train_eps: float, sample_eps: float) -> tuple[float, float]:
        return 0, 0.999

    def sample(self, x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]  # RAE's signature
        x0 = torch.randn_like(x1)
        t = (torch.rand(len(x1)) * 0.999).to(x1)
        return self.time_dist_shift * t / (1 + (self.time_dist_shift - 1) * t), x0, x1

    def training_losses(self, model: Any, x1: Tensor, model_kwargs: Any = None) -> dict[str, Tensor]:  # type: ignore[override]  # RAE's signature
        t, x0, x1 = self.sample(x1)
        prediction = model((1 - rows(t, x1)) * x1 + rows(t, x1) * x0, t, **(model_kwargs or {}))
        return {"pred": prediction, "loss": ((prediction - x0 + x1) ** 2).flatten(1).mean(1)}


class ListTransport(Transport):
    """Lumina-Image 2.0's object: the data may be a list of images, and t is shifted to the noise at 0."""

    snr_type = "uniform"

    def __init__(self, do_shift: bool = False) -> None:
        super().__init__()
        self.do_shift = do_shift

    def sample(self, x1: Any) -> Any:  # type: ignore[override]  # Lumina's signature
        x0 = [torch.randn_like(each) for each in x1] if isinstance(x1, list) else torch.randn_like(x1)
        time = 1 - torch.rand((len(x1),))
        # A shift of 2.
        t = 1 - (2 * time / (1 + time) if self.do_shift else time)
        return t.to(x1[0]), x0, x1

    def training_losses(self, model: Any, x1: Any, model_kwargs: Any = None) -> dict[str, Tensor]:  # type: ignore[override]  # Lumina's signature
        t, x0, x1 = self.sample(x1)
        pairs = [*zip(t, x1, x0, strict=True)]
        noised = [time * x + (1 - time) * noise for time, x, noise in pairs]
        predictions = model(
            noised if isinstance(x1, list) else torch.stack(noised), t, **(model_kwargs or {})
        )
        errors = [
            (found - x + noise).square().mean()
            for found, (_, x, noise) in zip(predictions, pairs, strict=True)
        ]
        return {"loss": torch.stack(errors), "t": t}


class RectifiedFlow(RFLOW12):
    """VideoSys' object."""


def sampled(host: Any, model: Any) -> Tensor:
    """Two Euler steps from noise, with the first half of the model's answer."""
    x = torch.randn(2, 4, 2, 4, 4)
    for step in (0.0, 0.5):
        velocity = model(x, torch.full((2,), step))[:, : x.shape[1]]
        x = x + 0.5 * velocity
    return x


SEAMS: dict[str, Any] = {
    "transport": transport(Transport, sampled),
    "transport of noise": transport(lambda: Transport(ModelType.NOISE), sampled),
    "transport, noise at 1": transport(
        ReversedTransport,
        sampled,
        noise_at=0.999,
        clean_at=0.0,
        shifted=lambda: ReversedTransport(2.0),
        shift_option="time_dist_shift",
    ),
    "transport of lists": transport(
        ListTransport, sampled, shifted=lambda: ListTransport(do_shift=True), shift_option="do_shift"
    ),
    "rectified flow": rectified_flow(RectifiedFlow, sampled),
    "rectified flow, discrete": rectified_flow(
        lambda: RectifiedFlow(use_discrete_timesteps=True), sampled, can_shift=False
    ),
}
