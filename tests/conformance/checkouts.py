"""How each known checkout is imported, and which of its seams are checked.

A function here is called with the checkout's folder, which is on sys.path, and with a list. It adds the names
of the packages that it replaces to that list, and yields one `Seam` after the other.
"""

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from conformance import (
    flow,
    image_lists,
    imagen,
    interpolant,
    latent_diffusion,
    mmagic,
    mmagic_checkout,
    open_sora_flow,
    script,
    timm_layers,
)
from conformance.diffusion_object import DrawingSeam, ObjectSeam
from conformance.open_sora import OpenSoraSeam
from conformance.schedule_sampler import SamplerSeam
from conformance.seam import Seam

IMAGES = (6, 4, 4, 4)
Seams = Callable[[Path, list[str]], Iterator[Seam]]


def factory(module: str, function: str = "create_diffusion", **options: Any) -> Seams:
    """The seam of an object that a function of the host makes. Its argument is the respacing."""

    def seams(checkout: Path, stood_in: list[str]) -> Iterator[Seam]:
        yield ObjectSeam(getattr(import_module(module), function), **{"shape": IMAGES, **options})

    return seams


def hunyuan(checkout: Path, stood_in: list[str]) -> Iterator[Seam]:
    """HunyuanDiT's object, which draws t itself."""
    create = import_module("hydit.diffusion").create_diffusion

    def make(respacing: str) -> Any:
        return create(
            timestep_respacing=respacing, predict_type="v_prediction", noise_schedule="scaled_linear"
        )

    yield DrawingSeam(make, IMAGES)


def guided_diffusion(checkout: Path, stood_in: list[str]) -> Iterator[Seam]:
    """The object of guided-diffusion's training scripts, with a learned variance."""
    create = import_module("guided_diffusion.script_util").create_gaussian_diffusion

    def make(respacing: str) -> Any:
        return create(learn_sigma=True, timestep_respacing=respacing)

    sampler_class = import_module("guided_diffusion.resample").ScheduleSampler
    yield SamplerSeam(make, IMAGES, sampler_class=sampler_class)


def masked_diffusion(checkout: Path, stood_in: list[str]) -> Iterator[Seam]:
    """The object of MDT's training script: two losses share one t."""
    make = import_module("masked_diffusion").create_diffusion
    sampler_class = import_module("masked_diffusion.resample").ScheduleSampler
    yield SamplerSeam(make, IMAGES, sampler_class=sampler_class, num_losses=2)


def point_clouds(checkout: Path, stood_in: list[str]) -> Iterator[Seam]:
    """DiT-3D's class, defined in its training script."""
    diffusion = import_module("train").GaussianDiffusion

    def make(respacing: str) -> Any:
        # It cannot be respaced. A short schedule keeps sampling short.
        num_timesteps = int(respacing or 1000)
        betas = np.linspace(1e-4, min(0.02 * 1000 / num_timesteps, 0.5), num_timesteps)
        return diffusion(betas, "mse", "eps", "fixedsmall")

    yield ObjectSeam(make, (6, 3, 8), None, "p_losses", sampling=("p_sample_loop",))


def transports(checkout: Path, stood_in: list[str]) -> Iterator[Seam]:
    """SiT's transport, with its stochastic sampler; the other one needs torchdiffeq."""
    package = import_module("transport")

    def sample(host: Any, model: Any) -> Any:
        # The default noise is infinite at t = 0. The last step ends before t = 1.
        sampler = package.Sampler(host).sample_sde(num_steps=4, diffusion_form="sigma", last_step_size=0.1)
        return sampler(torch.randn(2, 4, 4, 4), model)[-1]

    yield flow.transport(package.create_transport, sample)


def raes(checkout: Path, stood_in: list[str]) -> Iterator[Seam]:
    """RAE's transport, whose t = 1 is noise and whose training ends at 0.999."""
    # The package above it imports the models.
    package = ModuleType("stage2")
    package.__path__ = [str(checkout / "stage2")]
    sys.modules["stage2"] = package
    rae = import_module("stage2.transport")

    def sample(host: Any, model: Any) -> Any:
        # The default noise is infinite at t = 1, where the host starts.
        options: Any = {"sampling_method": "euler", "diffusion_form": "sigma", "last_step_size": 0.1}
        sampler = rae.Sampler(host).sample_sde(num_steps=4, **options)
        return sampler(torch.randn(2, 4, 4, 4), model)[-1]

    shifting = {
        "shifted": partial(rae.create_transport, time_dist_shift=2.0),
        "shift_option": "time_dist_shift",
    }
    yield flow.transport(rae.create_transport, sample, noise_at=0.999, clean_at=0.0, **shifting)


def luminas(checkout: Path, stood_in: list[str]) -> Iterator[Seam]:
    """Lumina-Image 2.0's transport: for lists of images, and with its shift for the length of a sequence."""
    create, sampler = import_module("transport").create_transport, import_module("transport").Sampler

    def sample(host: Any, model: Any) -> Any:
        sde = sampler(host).sample_sde(num_steps=4, diffusion_form="sigma", last_step_size=0.1)
        return sde(torch.randn(2, 4, 4, 4), model)[-1]

    # mu = 0.5 + 0.65 (length - 256) / 3840 is log 2.
    shifted = partial(create, seq_len=256 + (math.log(2) - 0.5) * 3840 / 0.65)
    seam = flow.transport(partial(create, do_shift=False), sample, shifted=shifted, shift_option="do_shift")
    image_lists.check_lists(seam)
    yield seam


def si_losses(*, has_class_token: bool = False) -> Seams:
    """REPA's or REG's loss. REG's has a class token, and its sampler denoises one."""

    def sample(host: Any, model: Any) -> Any:
        sampler = import_module("samplers").euler_maruyama_sampler
        x, y = torch.randn(2, 4, 4, 4), torch.zeros(2, dtype=torch.long)
        token = {"cls_latents": torch.randn(2, interpolant.WIDTH)} if has_class_token else {}
        return sampler(model, x, y, num_steps=4, **token)

    def seams(checkout: Path, stood_in: list[str]) -> Iterator[Seam]:
        loss = import_module("loss").SILoss
        yield interpolant.loss_seam(loss, sample, has_class_token=has_class_token)

    return seams


def self_training_models(checkout: Path, stood_in: list[str]) -> Iterator[Seam]:
    """REPA-E's model, small and with random weights."""
    stood_in += timm_layers.install()

    def sample(host: Any, model: Any) -> Any:
        sampler = import_module("samplers").euler_sampler
        return sampler(model, torch.randn(2, 4, 2, 2), torch.zeros(2, dtype=torch.long), num_steps=4)

    yield interpolant.model_seam(small_sit, sample)


def small_sit() -> Any:
    """REPA-E's SiT for 2 x 2 pixels in 4 channels. The host begins with zeros in its last layer."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = import_module("models.sit").SiT(
            input_size=2,
            hidden_size=8,
            decoder_hidden_size=8,
            encoder_depth=1,
            depth=2,
            num_heads=2,
            class_dropout_prob=0.0,
            num_classes=10,
            z_dims=[interpolant.WIDTH],
            projector_dim=8,
            fused_attn=False,
            qk_norm=False,
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    # As in train_ldm_only.py.
    model.bn.eval()
    return model


def video_sys(checkout: Path, stood_in: list[str]) -> Iterator[Seam]:
    """VideoSys' rectified flow, without the package's own imports."""
    package = ModuleType("videosys")
    package.__path__ = [str(checkout / "videosys")]
    sys.modules["videosys"] = package
    rflow = import_module("videosys.schedulers.scheduling_rflow_open_sora").RFLOW

    def sample(host: Any, model: Any) -> Any:
        # The host's sampler asks its transformer for a dtype.
        model.x_embedder = SimpleNamespace(proj=SimpleNamespace(weight=torch.zeros(1)))
        z, none = torch.randn(1, 4, 2, 4, 4), torch.zeros(1, 1)
        return host.sample(model, z, {"y": none}, none, torch.device("cpu"), progress=False)

    yield flow.rectified_flow(partial(rflow, num_sampling_steps=3), sample)


def open_sora(version: str) -> Seams:
    """Open-Sora's registry: iddpm, and from 1.2 on the rectified flow, by configs and by `with_policy`."""

    def seams(checkout: Path, stood_in: list[str]) -> Iterator[Seam]:
        modules: dict[str, dict[str, Any]] = {
            "colossalai": {},
            "colossalai.utils": {"get_current_device": lambda: torch.device("cpu")},
        }
        # `import opensora` loads these, and the schedulers of 1.0 and 1.1 do not use them.
        unused = [f"opensora.{name}" for name in ("acceleration", "datasets", "models")]
        modules |= {name: {} for name in unused if version < "1.2"}
        stood_in += [name for name in modules if name != "colossalai.utils"]
        for name, members in modules.items():
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(members)
        host = OpenSoraSeam(version, checkout)
        yield host
        if version >= "1.2":
            yield open_sora_flow.SpeeDFlowSeam(host)
            yield open_sora_flow.policy_seam(host)
            yield open_sora_flow.flow_seam(host)

    return seams


def latent_diffusion_classes(checkout: Path, stood_in: list[str]) -> Iterator[Seam]:
    """Every class of `ldm` that trains."""
    inert = latent_diffusion.install()
    yield latent_diffusion.LatentSeam(import_module(latent_diffusion.HOST))
    stood_in += ["pytorch_lightning", *inert.used]


def mmagic_registry(checkout: Path, stood_in: list[str]) -> Iterator[Seam]:
    """mmagic's registry, and the training step of its ADM."""
    replaced = mmagic_checkout.import_checkout(checkout)
    yield mmagic.MmagicSeam()
    mmagic_checkout.check_train_step()
    stood_in += replaced()


def imagens(checkout: Path, stood_in: list[str]) -> Iterator[Seam]:
    """imagen-pytorch of the checkout."""
    with imagen.installed() as (seam, used):
        yield seam
        stood_in += [*used, "T5's download"]


def diffusers_scripts(checkout: Path, stood_in: list[str]) -> Iterator[Seam]:
    """The installed diffusers' schedulers, and the lines of the text-to-image scripts that are edited."""
    scripts = sorted((checkout / "examples" / "text_to_image").glob("train_*.py"))
    script.check_scripts([path for path in scripts if "flax" not in path.name])
    yield from script.SEAMS
