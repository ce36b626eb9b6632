"""Trains the members of one stack side by side: same model and data, each with its own policy and seed.

Members of one seed are paired, whatever their policy or stack: they share initialisation, data order, noise,
and the uniform numbers from which their timesteps are drawn.

Dims: `M` members, `B` batch of a member, `T` timesteps, `C` channels.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.image_sets import ImageSet
from benchmarks.stacked.dit import member_weights, stacked
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy
from speedit_plugins.policies.spectrum import DataSpectrum
from speedit_plugins.registry import PROCESSES, build
from speedit_plugins.trainer.data.loader import stream_seed
from speedit_plugins.trainer.diffusion.flow import RectifiedFlow
from speedit_plugins.trainer.diffusion.gaussian_process import GaussianProcess, LossTerms
from speedit_plugins.trainer.models.dit import DiT

Process = GaussianProcess | RectifiedFlow

# Random streams of a seed; sampling uses another.
_WEIGHTS, _BATCHES, _TIMESTEPS = range(3)
_EMA_DECAY = 0.99
# Samples, spread over the data, that measure its centre; up to twice as many are taken.
_MEASURED = 1000


@dataclass(frozen=True)
class Member:
    """One training.

    Args:
        policy: what `build_policy` takes, or a policy; the member trains with a copy of it.
        seed: decides initialisation, data order, noise and samples; >= 0.
        lr: learning rate of AdamW.
        prediction_type: epsilon, x0 or v; flow on a rectified flow.
        label: the member's row of the table; '' takes the policy's name and the options that are not default.
    """

    policy: str | Mapping[str, Any] | TimestepPolicy
    seed: int = 0
    lr: float = 3e-3
    prediction_type: str = "epsilon"
    label: str = ""

    @property
    def name(self) -> str:
        """The label, or the name made up for ''."""
        if self.label:
            return self.label
        if isinstance(self.policy, TimestepPolicy):
            policy = self.policy.name
        else:
            policy = self.policy if isinstance(self.policy, str) else str(self.policy.get("type", "custom"))
        prediction = "" if self.prediction_type in ("epsilon", "flow") else f" {self.prediction_type}"
        rate = "" if self.lr == 3e-3 else f" lr {self.lr:g}"
        return policy + prediction + rate


@dataclass(frozen=True)
class Shape:
    """The shape of one member's model and batch."""

    width: int = 48
    depth: int = 2
    num_heads: int = 4
    patch_size: int = 4
    batch_size: int = 32


@dataclass(frozen=True)
class Setting:
    """The defaults that go with a schedule."""

    prediction_type: str = "epsilon"
    sampler: str = "ddim-25"


SETTINGS: Mapping[str, Setting] = {
    "linear": Setting(),
    "scaled_linear": Setting(),
    "cosine": Setting(),
    "rectified_flow": Setting("flow", "euler-25"),
}


def build_process(schedule: str, prediction_type: str) -> Process:
    """The process of a member, T = 1000, without learned variance.

    Args:
        schedule: a key of `SETTINGS`.
        prediction_type: what the model predicts; flow on a rectified flow, and nowhere else.
    """
    is_flow = SETTINGS[schedule].prediction_type == "flow"
    if is_flow != (prediction_type == "flow"):
        raise ValueError(
            f"prediction_type flow belongs to schedule rectified_flow, got {prediction_type} on {schedule}"
        )
    if is_flow:
        return build(PROCESSES, "RectifiedFlow")
    options = {"noise_schedule": schedule, "prediction_type": prediction_type, "learn_sigma": False}
    return build(PROCESSES, {"type": "SpeeDiffusion", **options})


def build_model(data: ImageSet, shape: Shape) -> DiT:
    """A member's model; torch's global generator draws its weights."""
    return DiT(
        data.images.shape[-1],
        shape.patch_size,
        in_channels=data.images.shape[1],
        hidden_size=shape.width,
        depth=shape.depth,
        num_heads=shape.num_heads,
        class_dropout_prob=0.0,
        num_classes=data.num_classes,
        learn_sigma=False,
    )


def first_model(data: ImageSet, shape: Shape, seed: int) -> DiT:
    """The model that every member of the seed starts from. Seeds torch's global generator."""
    torch.manual_seed(stream_seed(seed, _WEIGHTS))
    return build_model(data, shape)


class StackedTraining:
    """Members of one learning rate and prediction type, trained by AdamW, with their averaged weights.

    After n steps the average keeps min(0.99, (1 + n) / (10 + n)) of itself, a ramp like the trainer's.

    Args:
        members: at least one.
        data: the images they train on.
        schedule: see `build_process`.
        shape: shape of each member.
        model: what they start from, by `stacked`; None draws each member's weights from its seed.
    """

    def __init__(
        self,
        members: Sequence[Member],
        data: ImageSet,
        schedule: str,
        shape: Shape,
        *,
        model: DiT | None = None,
    ) -> None:
        kinds = {(member.lr, member.prediction_type) for member in members}
        if len(kinds) != 1:
            raise ValueError(f"a stack needs one lr and prediction_type, got {sorted(kinds)}")
        self.members, self.data, self.shape = members, data, shape
        self.process = build_process(schedule, members[0].prediction_type)
        self.policies = [build_member_policy(member, self.process, data) for member in members]
        self.model = model or stacked([first_model(data, shape, member.seed) for member in members])
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.step = 0
        # AdamW works on each element alone, so each member is updated as by an optimizer of its own.
        self._optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=members[0].lr, weight_decay=0, fused=True
        )

    def train_step(self) -> Tensor:
        """Makes one step of every member; returns the mean weighted loss of each, (M,)."""
        x_0, noise, labels = self._batches()
        for policy, part in zip(self.policies, x_0.chunk(len(self.members)), strict=True):
            policy.observe(part)
        draws = self.draw_timesteps()
        draw = TimestepDraw(
            torch.cat([draw.index for draw in draws]),
            torch.cat([draw.time for draw in draws]),
            torch.cat([draw.weight for draw in draws]),
        )  # without a learned variance both scopes are the same
        noised = self.process.corrupt(x_0, draw, noise=noise)
        terms = self.process.loss(self.model(noised.x_t, noised.timestep, labels), noised, draw)
        loss = terms.loss.view(len(self.members), -1).mean(dim=1)  # (M,)
        loss.sum().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._average()
        self.step += 1
        self.learn(draws, terms)
        return loss.detach()

    def draw_timesteps(self) -> list[TimestepDraw]:
        """The draw of each member's policy for this step, (B,) each."""
        draws = []
        for member, policy in zip(self.members, self.policies, strict=True):
            policy.advance(self.step)
            generator = timestep_generator(member.seed, self.step)
            draws.append(policy.draw(self.shape.batch_size, generator=generator))
        return draws

    def learn(self, draws: Sequence[TimestepDraw], terms: LossTerms) -> None:
        """Gives each member's policy the member's unweighted losses."""
        losses = (terms.mse + terms.vb).detach().view(len(self.members), -1)
        for policy, draw, loss in zip(self.policies, draws, losses, strict=True):
            policy.update(draw.index, loss)

    def averaged_weights(self, member: int) -> dict[str, Tensor]:
        """The weights that the member's DiT loads for sampling: views, without the positions."""
        return member_weights(self.averages, member)

    def _batches(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """x_0 and noise (M B, C, H, W) and labels (M B,), drawn once per seed; no classes: labels None."""
        seeds = {member.seed for member in self.members}
        drawn = {s: draw_batch(self.data, self.shape.batch_size, seed=s, step=self.step) for s in seeds}
        rows = torch.cat([drawn[member.seed][0] for member in self.members])
        noise = torch.cat([drawn[member.seed][1] for member in self.members])
        return self.data.images[rows], noise, None if self.data.labels is None else self.data.labels[rows]

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(_EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1 - decay)


def draw_batch(data: ImageSet, batch_size: int, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """The data's rows (B,) on which all members of the seed train in this step, and noise (B, C, H, W)."""
    generator = torch.Generator().manual_seed(stream_seed(seed, _BATCHES, step))
    rows = torch.randint(len(data.images), (batch_size,), generator=generator)
    shape = (batch_size, *data.images.shape[1:])
    return rows, torch.randn(shape, generator=generator, dtype=data.images.dtype)


def timestep_generator(seed: int, step: int) -> torch.Generator:
    """The generator from which the policies of all members of the seed draw in this step."""
    return torch.Generator().manual_seed(stream_seed(seed, _TIMESTEPS, step))


def build_member_policy(member: Member, process: Process, data: ImageSet) -> TimestepPolicy:
    """The policy object that this member alone trains with; ValueError if it has another schedule."""
    if isinstance(member.policy, TimestepPolicy):
        if not torch.equal(member.policy.schedule.snr, process.schedule.snr):
            given, wanted = member.policy.schedule, process.schedule
            raise ValueError(f"policy {member.name!r} needs the schedule {wanted} of the run, got {given}")
        return copy.deepcopy(member.policy)

    def spectrum() -> DataSpectrum:
        return DataSpectrum.of(data.images[:: max(1, len(data.images) // _MEASURED)])

    return build_policy(member.policy, process.schedule, member.prediction_type, data_spectrum=spectrum)
