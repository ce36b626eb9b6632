"""The contract of contract.py for imagen-pytorch's `Imagen`, made of small unets.

Dims: B batch, C channels.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from conformance.contract import FLOAT32_TOLERANCE, FLOAT64_TOLERANCE, NUM_DRAWS, POLICY, refused, run_points
from conformance.environments import default_dtype, process_group
from conformance.stand_ins import StandIns
from speedit_plugins.hosts.attachment import attachment_of, is_attached
from speedit_plugins.hosts.entry import with_policy, without_policy
from speedit_plugins.policies.policy import TimestepDraw

# torchvision and kornia augment images, datasets loads them; the widths of T5 would be downloaded.
STAND_INS = ("datasets", "kornia", "torchvision")
TEXT = (6, 4, 8)
IMAGES = (6, 3, 8, 8)


@dataclass(frozen=True)
class Host:
    """The imported package, and Imagens of it with one unet."""

    package: Any

    def make(self, **options: Any) -> Any:
        """An Imagen as a trainer makes it; without Min-SNR, unless told otherwise."""
        torch.manual_seed(1)
        size = {"dim": 8, "cond_dim": 8, "text_embed_dim": 8, "max_text_len": 4, "dim_mults": (1, 2)}
        unet = self.package.Unet(num_resnet_blocks=1, layer_attns=False, layer_cross_attns=False, **size)
        options = {"unets": unet, "image_sizes": 8, "timesteps": 4, "min_snr_loss_weight": False, **options}
        return self.package.Imagen(text_embed_dim=8, **options)

    def attached(self, policy: Any = POLICY, **options: Any) -> Any:
        """The same with a policy, whose draws take a generator of their own."""
        return with_policy(self.make(**options), policy, generator=torch.Generator().manual_seed(7))


@contextmanager
def installed() -> Iterator[tuple[Host, list[str]]]:
    """The importable imagen-pytorch, and the packages that stand in while it is used; T5 has a width of 8."""
    transformers = import_module("transformers")
    # It remembers which packages are there: it has to look, and to import, before they are stood in for.
    for name in STAND_INS:
        getattr(transformers.utils, f"is_{name}_available", bool)()
    t5 = (transformers.T5Tokenizer, transformers.T5EncoderModel, transformers.T5Config)

    def config(name: str) -> Any:
        return t5[2](d_model=8)

    stand_ins = StandIns(STAND_INS)
    sys.meta_path.append(stand_ins)
    try:
        with mock.patch.object(t5[2], "from_pretrained", config):
            yield Host(import_module("imagen_pytorch")), stand_ins.used
    finally:
        sys.meta_path.remove(stand_ins)
        for name in [name for name in sys.modules if name.split(".")[0] in (*STAND_INS, "imagen_pytorch")]:
            del sys.modules[name]


def check(host: Host) -> list[int]:
    """The points that hold, in order; AssertionError for the first that does not."""
    return run_points(CONTRACT, host)


def draws_are_seen(host: Host) -> None:
    """Point 1: the unet is given the log-SNR of our times, through `forward`, for every objective."""
    for objective in ("noise", "v", "x_start"):
        imagen = host.attached(pred_objectives=objective)
        with _recorded(imagen) as drawn, _levels_seen(imagen) as seen:
            imagen(torch.rand(IMAGES), text_embeds=torch.randn(TEXT))
        wanted = imagen.noise_schedulers[0].get_condition(drawn[0].time)
        assert len(seen) == 1, f"{len(seen)} calls of the unet"
        assert torch.equal(seen[0], wanted), "the unet saw other times"


def loss_is_weighted(host: Host) -> None:
    """Point 2: mean of w * mse over the batch, in float32 and float64."""
    for dtype, tolerance in ((torch.float32, FLOAT32_TOLERANCE), (torch.float64, FLOAT64_TOLERANCE)):
        imagen = host.attached().to(dtype)
        errors: list[Tensor] = []
        own = imagen.__dict__["loss_fn"]

        def recording(*args: Any, own: Any = own, errors: list[Tensor] = errors, **kwargs: Any) -> Tensor:
            errors.append(own(*args, **kwargs))
            return errors[-1]

        imagen.__dict__["loss_fn"] = recording
        with _recorded(imagen) as drawn:
            ours = _loss(imagen, torch.zeros(6, dtype=dtype))
        direct = (drawn[0].weight.to(dtype) * errors[0].flatten(1).mean(1)).mean()
        error = float(((ours - direct).abs() / direct).detach())
        assert error <= tolerance, f"loss misses w * mse by {error:.1e} relative, wanted {tolerance:.0e}"


def uniform_is_the_host(host: Host) -> None:
    """Point 3: at the same times and noise, with Min-SNR too; and outside training mode for every policy."""
    for options in ({}, {"min_snr_loss_weight": True}):
        imagen = host.attached("uniform", **options)
        with _recorded(imagen) as drawn:
            ours = _loss(imagen, torch.zeros(6))
        assert torch.equal(ours, _loss(host.make(**options), drawn[0].time)), "another loss"
    times = torch.linspace(0.1, 0.9, 6)
    ours, theirs = _loss(host.attached().eval(), times), _loss(host.make().eval(), times)
    assert torch.equal(ours, theirs), "evaluation has another loss"


def sampling_is_untouched(host: Host) -> None:
    """Point 4."""
    samples = []
    for imagen in (host.make(), host.attached()):
        torch.manual_seed(3)
        samples.append(imagen.sample(text_embeds=torch.ones(1, *TEXT[1:]), use_tqdm=False))
    assert torch.equal(*samples), "another sample"


def object_is_the_hosts(host: Host) -> None:
    """Point 5: the host itself neither copies nor pickles, for its noise schedules are compiled functions."""
    imagen, plain = host.attached(), host.make()
    assert isinstance(imagen, host.package.Imagen), "not an Imagen"
    assert list(imagen.state_dict()) == list(plain.state_dict()), "another state dict"
    assert vars(imagen)["loss_fn"] is vars(plain)["loss_fn"], "the host's loss function is replaced"
    assert imagen.lowres_noise_schedule.sample_random_times.__func__ is (
        plain.lowres_noise_schedule.sample_random_times.__func__
    ), "the low-resolution noise is drawn by the policy"


def missing_seam_is_refused(host: Host) -> None:
    """Point 6: the elucidated Imagen; and Min-SNR of the host beside weights of a policy."""
    elucidated = host.package.ElucidatedImagen(unets=host.make().unets[0], image_sizes=8, text_embed_dim=8)
    refused(lambda: with_policy(elucidated, POLICY), "has no seam: looked for")
    refused(lambda: host.attached(min_snr_loss_weight=True), "Min-SNR (gamma 5) already")
    refused(lambda: with_policy(host.make(), POLICY, prediction_type="v"), "leave prediction_type out")


def wrapping_ends(host: Host) -> None:
    """Point 7."""
    imagen = host.attached()
    refused(lambda: with_policy(imagen, POLICY), "has a policy already")
    without_policy(imagen)
    assert type(imagen) is host.package.Imagen, f"left as {type(imagen)}"
    assert not is_attached(imagen), "left behind"
    assert set(vars(imagen)) == set(vars(host.make())), "attributes left behind"


def other_models_train_alike(host: Host) -> None:
    """Point 8: a unet under DDP, as ImagenTrainer passes it; draws in bfloat16."""
    with process_group():
        losses = []
        for wrap in (lambda unet: unet, nn.parallel.DistributedDataParallel):
            imagen = host.attached()
            losses.append(_loss(imagen, torch.zeros(6), unet=wrap(imagen.unets[0])))
    assert torch.equal(*losses), "another loss under DDP"
    with default_dtype(torch.bfloat16):
        part = attachment_of(host.attached("uniform")).parts[0]
        time = part.draw(torch.zeros(NUM_DRAWS)).time
    assert len((time * 1000).long().unique()) == 1000, "a bfloat16 default leaves times out"


CONTRACT: dict[int, Callable[[Host], None]] = {
    1: draws_are_seen,
    2: loss_is_weighted,
    3: uniform_is_the_host,
    4: sampling_is_untouched,
    5: object_is_the_hosts,
    6: missing_seam_is_refused,
    7: wrapping_ends,
    8: other_models_train_alike,
}


@contextmanager
def _recorded(imagen: Any) -> Iterator[list[TimestepDraw]]:
    drawn: list[TimestepDraw] = []
    part = attachment_of(imagen).parts[0]
    draw = part.draw

    def recording(t: Tensor) -> TimestepDraw:
        drawn.append(draw(t))
        return drawn[-1]

    with mock.patch.object(part, "draw", recording):
        yield drawn


@contextmanager
def _levels_seen(imagen: Any) -> Iterator[list[Tensor]]:
    """The noise levels that the unet is called with."""
    seen: list[Tensor] = []
    unet = imagen.unets[0]
    forward = unet.forward

    def recording(x: Tensor, level: Tensor, **kwargs: Any) -> Any:
        seen.append(level.detach().clone())
        return forward(x, level, **kwargs)

    with mock.patch.object(unet, "forward", recording):
        yield seen


def _loss(imagen: Any, times: Tensor, unet: Any = None) -> Tensor:
    """The host's loss at these times, on fixed images and noise, with a fixed conditioning dropout."""
    torch.manual_seed(5)
    x, noise, text = torch.rand(IMAGES), torch.randn(IMAGES), torch.randn(TEXT)
    loss: Tensor = imagen.p_losses(
        imagen.unets[0] if unet is None else unet,
        x.to(times.dtype),
        times,
        noise_scheduler=imagen.noise_schedulers[0],
        noise=noise.to(times.dtype),
        text_embeds=text.to(times.dtype),
        text_mask=torch.ones(TEXT[:2], dtype=torch.bool),
        min_snr_gamma=imagen.min_snr_gamma[0],
        pred_objective=imagen.pred_objectives[0],
    )
    return loss
