"""Seam A for mmagic, on whichever `mmagic` can be imported.

The host's trainer calls `sample_timestep()` and `training_loss(unet, images, t)`. The host's own schedulers
leave both unwritten, so it has no loss of its own. The uniform policy is compared with the plain loss of a
given t.

Dims: B batch, C channels, H height, W width.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from conformance import points
from conformance.models import NamedUnet
from conformance.points import on, refused
from conformance.seam import POLICY, Batch, Seam, Terms, replayed, trained
from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.hosts.attachment import attachment_of, is_attached
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.policies.policy import TimestepPolicy

PLUGIN = "speedit_plugins.hosts.mmagic"
SCHEDULERS = "mmagic.models.diffusion_schedulers"


@dataclass(frozen=True)
class MmagicSeam(Seam):
    """The host's DDPM scheduler.

    Args:
        options: of the scheduler.
        num_steps: of sampling.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    num_steps: int = 5
    # Its loss is a mean, whose own rounding in float32 is as large as the tolerance.
    dtype = torch.float64
    shape: tuple[int, ...] = (6, 3, 4, 4)

    def make(self) -> Any:
        return import_module(SCHEDULERS).EditDDPMScheduler(**self.options)

    def attached(self, policy: Any = POLICY, generator: torch.Generator | None = None) -> Any:
        scheduler = build(policy=policy, **self.options)
        attachment_of(scheduler).stream = DrawStream(generator)
        return scheduler

    def model(self, host: Any, dtype: torch.dtype = torch.float32) -> NamedUnet:
        return NamedUnet().to(dtype)

    def train(self, host: Any, model: Any, batch: Batch, t: Tensor | None = None) -> Terms:
        x, noise = batch
        scheduler = host if is_attached(host) else self.attached()
        # As the host's trainer does it: t is what sample_timestep returns.
        t = scheduler.sample_timestep() if t is None else t
        terms = scheduler.training_loss(model, x, t, noise=noise)
        assert sorted(terms) == ["loss"], f"parse_losses adds up {sorted(terms)}"
        answer = getattr(model, "answers", [noise])[-1]
        return Terms(terms["loss"], mse=(answer.double() - noise.double()).square().mean((1, 2, 3)))

    def policy(self, name: Any = POLICY) -> TimestepPolicy:
        return build_policy(name, NoiseSchedule.from_alphas_cumprod(self.make().alphas_cumprod), "epsilon")

    def sample(self, host: Any) -> Tensor:
        host.set_timesteps(self.num_steps)
        image, unet = torch.randn(self.shape), NamedUnet()
        for t in host.timesteps:
            answer = unet(image, torch.full((len(image),), int(t)))["sample"]
            image = host.step(answer, t, image)["prev_sample"]
        return image

    def is_unused(self, host: Any) -> bool:
        return self.is_idle(host) and not attachment_of(host)._scales


def build(**options: Any) -> Any:
    """Our scheduler, through the host's registry."""
    import_module(PLUGIN)
    registry = import_module("mmagic.registry").DIFFUSION_SCHEDULERS
    return registry.build({"type": "SpeeDiffusion", **options})


def noised_sample_is_ddpms(seam: MmagicSeam) -> None:
    """Point 1, for two policies: the model sees DDPM's x_t at the drawn t."""
    for name in (POLICY, "speed"):
        step, (x, noise) = trained(seam, name), seam.batch()
        index = step.draw.index
        assert torch.equal(step.model.seen[0], index), f"drew {index}, the model saw {step.model.seen[0]}"
        alpha_bar = torch.from_numpy(np.asarray(step.host.alphas_cumprod)).double()[index].view(-1, 1, 1, 1)
        exact = alpha_bar.sqrt() * x.double() + (1 - alpha_bar).sqrt() * noise.double()
        # float32 rounds two scales, two products and a sum of numbers below 4: 2.4e-7 each at the most.
        found = step.model.inputs[0].double()
        assert torch.allclose(found, exact, atol=1e-6, rtol=0), "x_t is not DDPM's"


def host_leaves_the_draw_to_the_loss(seam: MmagicSeam) -> None:
    """Point 1: the host's trainer asks for t before it has a batch."""
    assert seam.attached().sample_timestep() is None, "sample_timestep draws, without a batch"


def plain_loss_is_the_mean(seam: MmagicSeam) -> None:
    """Point 3: the plain loss is the mean squared error."""
    step = trained(seam, "uniform")
    mean = nn.functional.mse_loss(step.model.answers[0], seam.batch()[1])
    # Both are means of the same 288 squares, summed in another order.
    plain = replayed(seam, step).terms.loss
    assert torch.allclose(plain, mean, rtol=1e-6, atol=0), "the plain loss is not the mean squared error"


def members_are_the_hosts(seam: MmagicSeam) -> None:
    """Point 5."""
    plain, ours = seam.make(), seam.attached("p2")
    assert len(ours) == len(plain), "len is not the host's"
    for name, value in vars(plain).items():
        assert np.array_equal(value, getattr(ours, name)), f"{name} differs"


def missing_seam_is_refused(seam: MmagicSeam) -> None:
    """Point 6: another version of the host, a learned variance, and a unet that returns one."""
    schedulers = import_module(SCHEDULERS)
    bare = type("EditDDPMScheduler", (), {"step": schedulers.EditDDPMScheduler.step})
    kept = {name: module for name, module in sys.modules.items() if name != PLUGIN}
    with (
        mock.patch.dict(sys.modules, kept, clear=True),
        mock.patch.object(schedulers, "EditDDPMScheduler", bare),
    ):
        wanted = "training_loss and sample_timestep); this one has no"
        refused(partial(import_module, PLUGIN), wanted, ImportError)
    for variance in ("learned", "learned_range"):
        refused(partial(build, variance_type=variance), f"got variance_type='{variance}'")
    x = seam.batch()[0]
    refused(lambda: build().training_loss(NamedUnet(1), x), "learned variance, and output_cfg")
    # The host's own training pipeline packs nothing else if it loads the images as 'gt'.
    refused(lambda: build().training_loss(NamedUnet(), {}), "PackInputs(keys=...)")


# All of them are sampled.
FEW = [{"options": {"num_train_timesteps": 20, "variance_type": "fixed_large"}, "num_steps": 20}]
MmagicSeam.contract = points.COMMON | {
    1: (
        points.draws_are_seen,
        points.data_are_observed,
        noised_sample_is_ddpms,
        host_leaves_the_draw_to_the_loss,
    ),
    3: (points.uniform_is_the_host, plain_loss_is_the_mean),
    4: (on([{}, *FEW], points.sampling_is_untouched),),
    5: (*points.COMMON[5], on(FEW, members_are_the_hosts)),
    6: (missing_seam_is_refused,),
    7: (points.wrapping_ends,),
}
