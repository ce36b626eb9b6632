"""Seam D for latent-diffusion and Stable Diffusion 1 and 2: a config's `target:` names the class.

Dims: B batch, C channels.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from itertools import chain
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from conformance import points
from conformance.environments import wrapped_models
from conformance.models import ConditionedUnet
from conformance.points import on, refused, same
from conformance.seam import POLICY, Batch, Seam, Step, Terms, seeded, trained
from conformance.stand_ins import StandIns
from speedit_plugins.hosts.attachment import attachment_of
from speedit_plugins.hosts.draws.draw_stream import DrawStream

HOST = "ldm.models.diffusion.ddpm"
PLUGIN = "speedit_plugins.hosts.latent_diffusion"
INERT = ("torchvision", "taming", "clip", "kornia", "open_clip", "cv2")
SHAPE = (6, 3, 4, 4)
# Neither is 1 or 0, so that it shows if a term is lost, or weighed by mistake.
L_SIMPLE, ELBO = 0.7, 0.01
WHOLE = {"density": {"type": "uniform"}, "weighting": {"type": "p2"}, "scope": "loss"}
# The two classes whose losses are made in different ways: in pixel space, and of latents.
KINDS = [{"name": "DDPM"}, {"name": "LatentDiffusion"}]
SMALL_STAGE = {"target": "torch.nn.Identity"}
# Arguments of Stability's classes that LatentDiffusion does not have.
EXTRA: dict[str, dict[str, Any]] = {
    "Layout2ImgDiffusion": {"cond_stage_key": "coordinates_bbox"},
    "LatentUpscaleDiffusion": {"low_scale_config": SMALL_STAGE},
    "LatentFinetuneDiffusion": {"concat_keys": ("mask",), "finetune_keys": None},
    "LatentInpaintDiffusion": {"finetune_keys": None},
    "LatentDepth2ImageDiffusion": {"finetune_keys": None, "depth_stage_config": SMALL_STAGE},
    "LatentUpscaleFinetuneDiffusion": {"finetune_keys": None},
    "ImageEmbeddingConditionedLatentDiffusion": {"embedder_config": SMALL_STAGE},
}


class LightningModule(nn.Module):
    """The part of Lightning's class that the host's classes use to train and to sample."""

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next((each.device for each in chain(self.parameters(), self.buffers())), torch.device("cpu"))

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Logs nothing."""

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        """Logs nothing."""


@dataclass(frozen=True)
class LatentSeam(Seam):
    """A class of a host's `ldm.models.diffusion.ddpm`.

    Args:
        ddpm: the module.
        name: of the class.
        options: of the class; they replace those that `make` gives.
    """

    ddpm: ModuleType
    name: str = "DDPM"
    options: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = SHAPE
    policies: tuple[Any, ...] = (POLICY, WHOLE)
    # Its loss is a mean, whose own rounding in float32 is as large as the tolerance.
    dtype = torch.float64

    @property
    def is_latent(self) -> bool:
        """Whether the class has first and conditioning stages."""
        return issubclass(getattr(self.ddpm, self.name), self.ddpm.LatentDiffusion)

    def make(self, **options: Any) -> Any:
        """A small object of the host's class; of our class, if `policy` is among the options."""
        owner = import_module(PLUGIN) if "policy" in options else self.ddpm
        given: dict[str, Any] = {
            "unet_config": {"target": "conformance.models.ConditionedUnet"},
            "timesteps": 1000,
            "image_size": SHAPE[2],
            "channels": SHAPE[1],
            "l_simple_weight": L_SIMPLE,
            "original_elbo_weight": ELBO,
        }
        if self.is_latent:
            given |= {
                "first_stage_config": SMALL_STAGE,
                "cond_stage_config": "__is_first_stage__",
                "conditioning_key": "crossattn",
            }
        extra = EXTRA.get(self.name, {})
        return getattr(owner, self.name)(**{**given, **extra, **self.options, **options})

    def attached(self, policy: Any = POLICY, generator: torch.Generator | None = None) -> Any:
        model = self.make(policy=policy)
        attachment_of(model).stream = DrawStream(generator)
        return model

    def model(self, host: Any, dtype: torch.dtype = torch.float32) -> ConditionedUnet:
        unet: ConditionedUnet = host.to(dtype).model.diffusion_model
        return unet

    def train(self, host: Any, model: Any, batch: Batch, t: Tensor | None = None) -> Terms:
        if t is None:
            # As in the host's shared_step, whose forward draws a t.
            return self._terms(host, host(*self.inputs(batch), noise=batch[1]))
        before = t.clone()
        terms = self._terms(host, host.p_losses(*self.inputs(batch), t, noise=batch[1]))
        assert torch.equal(t, before), "wrote into the caller's t"
        if not host.training or hasattr(host, "_speedit_attachment"):
            return terms
        # Sample by sample, so that the host's means play no part in the comparison.
        ones = [
            host.p_losses(*self.inputs((x[None], noise[None])), t[i : i + 1], noise=noise[None])[1]
            for i, (x, noise) in enumerate(zip(*batch, strict=True))
        ]
        mse, vb = (
            torch.stack([one[f"train/{name}"] for one in ones]).double()
            for name in ("loss_simple", "loss_vlb")
        )
        return replace(terms, mse=L_SIMPLE * mse, vb=ELBO * vb)

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """The arguments of a training call: data, and a conditioning (B, 1) for a class with stages."""
        return (batch[0], batch[0].flatten(1)[:, :1].abs()) if self.is_latent else batch[:1]

    def _terms(self, host: Any, returned: tuple[Tensor, dict[str, Tensor]]) -> Terms:
        loss, reported = returned
        prefix = "train" if host.training else "val"
        assert torch.equal(reported.pop(f"{prefix}/loss"), loss), f"{prefix}/loss is not the loss"
        return Terms(loss, reported=reported)

    def sample(self, host: Any) -> Tensor:
        conditioning = (torch.full((SHAPE[0], 1), 0.5),) if self.is_latent else ()
        sample: Tensor = host.p_sample_loop(*conditioning, SHAPE)
        return sample

    def evaluations(self, host: Any) -> Iterator[AbstractContextManager[Any]]:
        yield torch.no_grad()
        host.eval()
        yield nullcontext()


def lightning_modules() -> dict[str, ModuleType]:
    """The part of pytorch_lightning that the hosts import, by module name."""
    members: dict[str, dict[str, Any]] = {
        "pytorch_lightning": {"LightningModule": LightningModule},
        "pytorch_lightning.utilities": {},
        "pytorch_lightning.utilities.distributed": {"rank_zero_only": lambda function: function},
    }
    modules = {name: ModuleType(name) for name in members}
    for name, contents in members.items():
        vars(modules[name]).update(contents, __path__=[])
    return modules


def install() -> StandIns:
    """Replaces what the hosts import and is missing here. The finder knows which packages it replaced."""
    try:
        # This comes before the others are replaced, since it asks for their versions.
        import_module("pytorch_lightning")
    except ImportError:
        sys.modules.update(lightning_modules())
    finder = StandIns(INERT)
    sys.meta_path.append(finder)
    return finder


def classes_of(seam: LatentSeam) -> list[LatentSeam]:
    """Every class of the host that trains."""
    base = seam.ddpm.DDPM
    names = [k for k, v in vars(seam.ddpm).items() if isinstance(v, type) and issubclass(v, base)]
    return [replace(seam, name=name) for name in names]


def errors_of(seam: LatentSeam) -> list[LatentSeam]:
    """Both kinds of loss with every prediction type, and with the absolute error."""
    targets = ["eps", "x0", *(["v"] if hasattr(seam.ddpm.DDPM, "get_v") else [])]
    options = [{"parameterization": target, "loss_type": "l2"} for target in targets] + [{"loss_type": "l1"}]
    return [replace(seam, **kind, options=option) for kind in KINDS for option in options]


def missing_seam_is_refused(seam: LatentSeam) -> None:
    """Point 6: options that leave the policy without its effect, and another host."""
    latent = replace(seam, name="LatentDiffusion")
    refused(lambda: seam.make(policy=POLICY, learn_logvar=True), "wanted learn_logvar=False")
    refused(
        lambda: latent.make(policy=POLICY, num_timesteps_cond=2),
        "num_timesteps_cond=2 noises the conditioning at the t that the host draws",
    )
    refused(lambda: seam.make(policy="spedit"), "did you mean 'speedit'")
    refused(lambda: import_module(PLUGIN).LatentDifusion, "did you mean 'LatentDiffusion'", AttributeError)
    without_loss = type("DDPM", (), {"p_losses": seam.ddpm.DDPM.p_losses})
    for members in ({}, {"DDPM": without_loss}):
        other = ModuleType(HOST)
        vars(other).update(members)
        with mock.patch.dict(sys.modules, {HOST: other}):
            del sys.modules[PLUGIN]
            refused(partial(import_module, PLUGIN), "no class DDPM with p_losses", ImportError)


def wrapped_modules_train_alike(seam: LatentSeam) -> None:
    """Point 8: with the whole module wrapped, and with its unet compiled."""
    step = trained(seam)
    host, unet = step.host, step.model
    with wrapped_models(host) as others:
        for kind in tuple(others):
            _trains_alike(seam, step, others[kind], kind)
    host.model.diffusion_model = torch.compile(unet, backend="eager")
    attachment_of(host).stream = DrawStream(seeded())
    same(seam.train(host, unet, seam.batch()), step.terms, "with a compiled unet")
    assert len(unet.seen) == 4, f"wanted 4 steps of the unet, got {len(unet.seen)}"
    assert all(torch.equal(seen, step.draw.index) for seen in unet.seen), "the model saw another t"


def _trains_alike(seam: LatentSeam, step: Step, other: Callable[..., Any], kind: str) -> None:
    step.model.scale.grad = None
    attachment_of(step.host).stream = DrawStream(seeded())
    batch = seam.batch()
    terms = seam._terms(step.host, other(*seam.inputs(batch), noise=batch[1]))
    same(terms, step.terms, kind)
    terms.loss.backward()
    assert step.model.scale.grad is not None, f"{kind}: no gradient"


# Few timesteps keep sampling short.
SHORT = [{**kind, "options": {"timesteps": 20, "linear_end": 0.5}} for kind in KINDS]
LatentSeam.contract = {
    **{point: tuple(on(classes_of, check) for check in points.COMMON[point]) for point in (1, 3, 5, 7)},
    2: (on(errors_of, points.loss_is_weighted),),
    4: (on(SHORT, points.sampling_is_untouched),),
    6: (missing_seam_is_refused,),
    **{point: tuple(on(KINDS, check) for check in points.COMMON[point]) for point in (9, 10, 11)},
    8: (on(KINDS, wrapped_modules_train_alike), on(KINDS, points.bfloat16_reaches_every_timestep)),
}
