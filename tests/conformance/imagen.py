"""Seam D for imagen-pytorch's `Imagen`, with one small unet.

Dims: B batch.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from conformance import points
from conformance.environments import default_dtype, process_group
from conformance.points import NUM_DRAWS, on, refused, same
from conformance.seam import POLICY, Batch, Seam, Terms, seeded, trained
from conformance.stand_ins import StandIns
from speedit_plugins.hosts.attachment import attachment_of
from speedit_plugins.hosts.entry import with_policy
from speedit_plugins.hosts.objects.imagen import schedule_of_unet
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy

# torchvision and kornia augment images, and datasets loads them. The width of T5 would be downloaded.
STAND_INS = ("datasets", "kornia", "torchvision")
TEXT = (6, 4, 8)
IMAGES = (6, 3, 8, 8)


@dataclass(frozen=True)
class ImagenSeam(Seam):
    """An Imagen with one unet.

    Args:
        package: the imported `imagen_pytorch`.
        options: of Imagen; they replace those that `make` gives.
    """

    package: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = IMAGES
    # This host cannot tell what a policy learns without gradients.
    reentrant_policy: Any = POLICY
    # Its loss is a mean, whose own rounding in float32 is as large as the tolerance.
    dtype = torch.float64
    # The number of the unet.
    part = 1

    def make(self, **options: Any) -> Any:
        """An Imagen, without Min-SNR unless the options say otherwise."""
        torch.manual_seed(1)
        size = {"dim": 8, "cond_dim": 8, "text_embed_dim": 8, "max_text_len": 4, "dim_mults": (1, 2)}
        unet = self.package.Unet(num_resnet_blocks=1, layer_attns=False, layer_cross_attns=False, **size)
        given = {"unets": unet, "image_sizes": 8, "timesteps": 4, "min_snr_loss_weight": False}
        return self.package.Imagen(text_embed_dim=8, **{**given, **self.options, **options})

    def model(self, host: Any, dtype: torch.dtype = torch.float32) -> Any:
        """The Imagen's unet; it keeps the noise levels that it is called with."""
        unet = host.to(dtype).unets[0]
        unet.seen, forward = [], type(unet).forward

        def recording(x: Tensor, level: Tensor, **kwargs: Any) -> Any:
            unet.seen.append(level.detach().clone())
            return forward(unet, x, level, **kwargs)

        unet.forward = recording
        return unet

    def batch(self, dtype: torch.dtype = torch.float32) -> Batch:
        """Images in [0, 1], and noise."""
        x, noise = super().batch(dtype)
        return (x + 1) / 2, noise

    def train(self, host: Any, model: Any, batch: Batch, t: Tensor | None = None) -> Terms:
        x, noise = batch
        times = torch.linspace(0.1, 0.9, len(x), dtype=x.dtype) if t is None else t.to(x.dtype)
        errors: list[Tensor] = []
        own = vars(host)["loss_fn"]

        def recording(*args: Any, **kwargs: Any) -> Tensor:
            errors.append(own(*args, **kwargs))
            return errors[-1]

        # Text, and dropout of the conditioning, are the same in every step.
        torch.manual_seed(5)
        with mock.patch.dict(vars(host), loss_fn=recording):
            loss = host.p_losses(
                model,
                x,
                times,
                noise_scheduler=host.noise_schedulers[0],
                noise=noise,
                text_embeds=torch.randn(TEXT).to(x.dtype),
                text_mask=torch.ones(TEXT[:2], dtype=torch.bool),
                min_snr_gamma=host.min_snr_gamma[0],
                pred_objective=host.pred_objectives[0],
            )
        return Terms(loss, mse=errors[0].flatten(1).mean(1))

    def policy(self, name: Any = POLICY) -> TimestepPolicy:
        return build_policy(name, schedule_of_unet(self.make().noise_schedulers[0]))

    def as_the_model_sees(self, x: Tensor) -> Tensor:
        return 2 * x.detach() - 1

    def hosts_t(self, draw: TimestepDraw, model: Any) -> Tensor:
        return draw.time

    def sees(self, host: Any, draw: TimestepDraw, seen: Tensor) -> bool:
        return torch.equal(seen, host.noise_schedulers[0].get_condition(draw.time.to(seen.dtype)))

    def sample(self, host: Any) -> Tensor:
        sample: Tensor = host.sample(text_embeds=torch.ones(1, *TEXT[1:]), use_tqdm=False)
        return sample

    def evaluations(self, host: Any) -> Iterator[AbstractContextManager[Any]]:
        yield torch.no_grad()
        host.eval()
        yield nullcontext()

    def is_idle(self, host: Any) -> bool:
        return bool(attachment_of(host).parts[0].num_calls == 0)


@contextmanager
def installed() -> Iterator[tuple[ImagenSeam, list[str]]]:
    """The seam of the importable imagen-pytorch, and the packages replaced meanwhile. T5 has a width of 8."""
    transformers = import_module("transformers")
    # transformers remembers which packages there are, so it has to look before any is replaced.
    for name in STAND_INS:
        getattr(transformers.utils, f"is_{name}_available", bool)()
    t5 = (transformers.T5Tokenizer, transformers.T5EncoderModel, transformers.T5Config)

    def config(name: str) -> Any:
        return t5[2](d_model=8)

    stand_ins = StandIns(STAND_INS)
    sys.meta_path.append(stand_ins)
    try:
        with mock.patch.object(t5[2], "from_pretrained", config):
            yield ImagenSeam(import_module("imagen_pytorch")), stand_ins.used
    finally:
        sys.meta_path.remove(stand_ins)
        # Not a package that is installed: datasets can be imported once in a process.
        dropped = (*stand_ins.used, "imagen_pytorch")
        for name in [name for name in sys.modules if name.split(".")[0] in dropped]:
            del sys.modules[name]


def forward_takes_our_times(seam: ImagenSeam) -> None:
    """Point 1, through the host's `forward`: it draws times of its own."""
    host = seam.attached(POLICY, seeded())
    unet = seam.model(host)
    host(torch.rand(IMAGES), text_embeds=torch.randn(TEXT))
    assert len(unet.seen) == 1, f"{len(unet.seen)} calls of the unet"
    assert seam.sees(host, seam.drawn(host, POLICY, unet), unet.seen[0]), "the unet saw other times"


def members_are_the_hosts(seam: ImagenSeam) -> None:
    """Point 5. The host itself cannot be copied or pickled: its noise schedules are compiled functions."""
    imagen, plain = seam.attached(), seam.make()
    assert isinstance(imagen, seam.package.Imagen), "not an Imagen"
    assert vars(imagen)["loss_fn"] is vars(plain)["loss_fn"], "the host's loss function is replaced"
    assert imagen.lowres_noise_schedule.sample_random_times.__func__ is (
        plain.lowres_noise_schedule.sample_random_times.__func__
    ), "the low-resolution noise is drawn by the policy"


def missing_seam_is_refused(seam: ImagenSeam) -> None:
    """Point 6: the elucidated Imagen; and Min-SNR of the host beside weights of a policy."""
    elucidated = seam.package.ElucidatedImagen(unets=seam.make().unets[0], image_sizes=8, text_embed_dim=8)
    refused(lambda: with_policy(elucidated, POLICY), "has no seam: looked for")
    refused(lambda: with_policy(seam.make(min_snr_loss_weight=True), POLICY), "Min-SNR (gamma 5) already")
    refused(lambda: with_policy(seam.make(), POLICY, prediction_type="v"), "leave out prediction_type")


def ddp_trains_alike(seam: ImagenSeam) -> None:
    """Point 8: a unet under DDP, as ImagenTrainer passes it."""
    first = trained(seam)
    with process_group():
        host = seam.attached(POLICY, seeded())
        # No name for the wrapped model, so that it ends before the group does.
        terms = seam.train(host, nn.parallel.DistributedDataParallel(seam.model(host)), seam.batch())
        same(terms, first.terms, "under DDP")


def bfloat16_reaches_every_time(seam: ImagenSeam) -> None:
    """Point 8: draws under a bfloat16 default dtype."""
    with default_dtype(torch.bfloat16):
        time = attachment_of(seam.attached("uniform")).parts[0].draw(torch.zeros(NUM_DRAWS)).time
    assert len((time * 1000).long().unique()) == 1000, "a bfloat16 default leaves times out"


OBJECTIVES = [{"options": {"pred_objectives": name}} for name in ("noise", "v", "x_start")]
# A policy without weights leaves the host's own Min-SNR on.
MIN_SNR = [{"options": {"min_snr_loss_weight": is_on}} for is_on in (False, True)]
ImagenSeam.contract = points.COMMON | {
    1: (
        points.data_are_observed,
        on(OBJECTIVES, points.draws_are_seen),
        on(OBJECTIVES, forward_takes_our_times),
    ),
    3: (on(MIN_SNR, points.uniform_is_the_host), points.evaluations_are_the_hosts),
    5: (points.object_is_the_hosts, members_are_the_hosts),
    6: (missing_seam_is_refused,),
    8: (ddp_trains_alike, bfloat16_reaches_every_time),
}
