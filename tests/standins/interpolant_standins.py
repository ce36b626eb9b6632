"""Losses with the signatures of REPA and REG, a model with REPA-E's, and their seams.

They are written from the paths x_t = (1 - t) x_0 + t eps and cos(pi t / 2) x_0 + sin(pi t / 2) eps. t = 0 is
clean.

Dims: B batch, N tokens, D width.
"""

import math
from typing import Any

import torch
from conformance.interpolant import WIDTH, loss_seam, model_seam
from torch import Tensor, nn


def levels(t: Tensor, path_type: str) -> tuple[Any, Any, Any, Any]:
    """The scales of data and noise, and their derivatives."""
    if path_type == "linear":
        return 1 - t, t, -1, 1
    angle = t * math.pi / 2
    return angle.cos(), angle.sin(), -math.pi / 2 * angle.sin(), math.pi / 2 * angle.cos()


def drawn(num: int, weighting: str) -> Tensor:
    """t (B, 1, 1, 1) by the host's law."""
    if weighting == "uniform":
        return torch.rand((num, 1, 1, 1))
    return torch.sigmoid(torch.randn((num, 1, 1, 1)))


def per_sample(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(1)


def projection(zs: list[Tensor], found: list[Tensor]) -> Tensor:
    pairs = [torch.cosine_similarity(z, each, dim=-1).mean() for z, each in zip(zs, found, strict=True)]
    return -torch.stack(pairs).mean()


class SILoss:
    """REPA's loss."""

    def __init__(self, prediction: str = "v", path_type: str = "linear", weighting: str = "uniform") -> None:
        self.prediction, self.path_type, self.weighting = prediction, path_type, weighting

    def interpolant(self, t: Tensor) -> Any:
        return levels(t, self.path_type)

    def __call__(self, model: Any, images: Tensor, model_kwargs: Any = None, zs: Any = None) -> Any:
        t = drawn(len(images), self.weighting).to(images)
        noises = torch.randn_like(images)
        alpha, sigma, d_alpha, d_sigma = self.interpolant(t)
        answer, found = model(alpha * images + sigma * noises, t.flatten(), **(model_kwargs or {}))
        return per_sample(answer - d_alpha * images - d_sigma * noises), projection(zs, found)


class TokenSILoss(SILoss):
    """REG's loss, with a class token (B, D)."""

    def __call__(  # type: ignore[override]  # REG's own signature
        self,
        model: Any,
        images: Tensor,
        model_kwargs: Any = None,
        zs: Any = None,
        cls_token: Any = None,
        time_input: Any = None,
        noises: Any = None,
    ) -> Any:
        if time_input is None:
            time_input = drawn(len(images), self.weighting)
        t = time_input.to(images)
        noises = torch.randn_like(images)
        token_noises = torch.randn_like(cls_token)
        alpha, sigma, d_alpha, d_sigma = self.interpolant(t)
        token = alpha[:, :, 0, 0] * cls_token + sigma[:, :, 0, 0] * token_noises
        answer, found, token_answer = model(alpha * images + sigma * noises, t.flatten(), cls_token=token)
        loss = per_sample(answer - d_alpha * images - d_sigma * noises)
        return loss, projection(zs, found), t, noises, per_sample(token_answer - token_noises + cls_token)


class SelfTraining(nn.Module):
    """REPA-E's model, which makes its loss in `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4, affine=False)
        self.t_embedder = nn.Sequential(nn.Linear(1, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.out = nn.Linear(WIDTH + 4, 4)

    def interpolant(self, t: Tensor, path_type: Any = None) -> Any:
        return levels(t, path_type)

    def answer(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.t_embedder(t.view(-1, 1))
        pixels = embedded[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return self.out(torch.cat([x, pixels], 1).movedim(1, -1)).movedim(-1, 1), embedded[:, None]

    def forward(
        self, x: Tensor, y: Tensor, zs: Any, loss_kwargs: Any, time_input: Any = None, noises: Any = None
    ) -> dict[str, Any]:
        x = self.bn(x)
        if time_input is None:
            time_input = drawn(len(x), loss_kwargs["weighting"])
        t = time_input.to(x)
        noises = torch.randn_like(x) if noises is None else noises
        alpha, sigma, d_alpha, d_sigma = self.interpolant(t, path_type=loss_kwargs["path_type"])
        answer, features = self.answer(alpha * x + sigma * noises, t.flatten())
        loss = None if loss_kwargs["align_only"] else per_sample(answer - d_alpha * x - d_sigma * noises)
        shared = {"proj_loss": projection(zs, [features]), "time_input": t, "noises": noises}
        return {"denoising_loss": loss, **shared}


def self_training() -> SelfTraining:
    """REPA-E's model with fixed weights; its batch norm does not count, as in the host's script."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = SelfTraining()
    model.bn.eval()
    return model


def sampled(host: Any, model: Any) -> Tensor:
    """Two Euler steps from noise."""
    x = torch.randn(2, 4, 2, 2)
    for t in (1.0, 0.5):
        time = torch.full((2,), t)
        x = x - 0.5 * (model.answer(x, time) if isinstance(model, SelfTraining) else model(x, time))[0]
    return x


SEAMS = {
    "REPA": loss_seam(SILoss, sampled),
    "REG": loss_seam(TokenSILoss, sampled, has_class_token=True),
    "REPA-E": model_seam(self_training, sampled),
}
