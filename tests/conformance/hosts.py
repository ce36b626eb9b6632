"""The hosts that check_hosts.py knows: folder, seam, how to import them, and which contract they keep."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

import conformance.flow as flow_contract
import conformance.imagen as imagen_contract
import conformance.latent_diffusion as latent_diffusion_contract
import conformance.mmagic as mmagic_contract
import conformance.mmagic_checkout as mmagic_checkout
import conformance.open_sora as open_sora_contract
import conformance.open_sora_flow as open_sora_flow_contract
import conformance.script as script_contract
from conformance.contract import Subject
from conformance.flow import FlowSubject

IMAGES = (6, 4, 4, 4)
Check = Callable[[Path, list[str]], list[int]]


@dataclass(frozen=True)
class Host:
    """A checkout that is known.

    Args:
        name: of the host and its version, for the table and --only.
        folder: in DIR.
        seam: A, B, C or D.
        subject: makes the contract's subject, of an object or a flow; runs with the checkout on sys.path.
        factory_import: the statement by which the host's script gets its factory.
        factory_call: an expression over what that statement imported, which makes an object for the
            launcher's check; empty where the launcher is not for this host.
        stand_ins: packages that may be replaced where they cannot be imported.
        replaced: packages that are replaced although they are here: the host needs another version, or they
            are its CUDA kernels.
        own_script: in the place of `factory_import`, the script that defines the class itself.
        check: where there is no subject, returns the points that hold; it is given the checkout, and a list
            to which it adds what it stands in for.
    """

    name: str
    folder: str
    seam: str
    subject: Callable[[], Subject | FlowSubject] | None = None
    factory_import: str = ""
    factory_call: str = ""
    stand_ins: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    own_script: str = ""
    check: Check | None = None


def factory(module: str, function: str = "create_diffusion", **subject: Any) -> Callable[[], Subject]:
    """A subject whose object comes from a function of the host that takes the respacing."""

    def made() -> Subject:
        make = getattr(import_module(module), function)
        return Subject(make, **{"shape": IMAGES, **subject})

    return made


def guided_diffusion() -> Subject:
    """The object of guided-diffusion's training scripts, with a learned variance."""
    script_util = import_module("guided_diffusion.script_util")
    resample = import_module("guided_diffusion.resample")

    def make(respacing: str) -> Any:
        return script_util.create_gaussian_diffusion(learn_sigma=True, timestep_respacing=respacing)

    return Subject(make, IMAGES, host_class=resample.ScheduleSampler)


def masked_diffusion() -> Subject:
    """The object of MDT's training script: two losses share one t."""
    resample = import_module("masked_diffusion.resample")
    make = import_module("masked_diffusion").create_diffusion
    return Subject(make, IMAGES, host_class=resample.ScheduleSampler, num_losses=2)


def point_clouds() -> Subject:
    """DiT-3D's class, which stands in its training script."""
    script = import_module("train")

    def make(respacing: str) -> Any:
        # It cannot be respaced: a short schedule keeps sampling short.
        num_timesteps = int(respacing or 1000)
        return script.GaussianDiffusion(
            np.linspace(1e-4, min(0.02 * 1000 / num_timesteps, 0.5), num_timesteps),
            "mse",
            "eps",
            "fixedsmall",
        )

    return Subject(make, (6, 3, 8), None, "p_losses", sampling=("p_sample_loop",))


def transports() -> FlowSubject:
    """SiT's transport, sampled by its stochastic sampler; the other one needs torchdiffeq."""
    package = import_module("transport")

    def sample(host: Any, model: Any) -> Any:
        # The default noise is infinite at t = 0; the last step stops short of t = 1.
        sampler = package.Sampler(host).sample_sde(num_steps=4, diffusion_form="sigma", last_step_size=0.1)
        return sampler(torch.randn(2, 4, 4, 4), model)[-1]

    return flow_contract.transport(package.create_transport, sample)


def video_sys() -> FlowSubject:
    """VideoSys' rectified flow, without the package's own imports."""
    package = ModuleType("videosys")
    package.__path__ = [f"{sys.path[0]}/videosys"]
    sys.modules["videosys"] = package
    flow = import_module("videosys.schedulers.scheduling_rflow_open_sora").RFLOW

    def sample(host: Any, model: Any) -> Any:
        # The host's sampler asks its transformer for a dtype.
        model.x_embedder = SimpleNamespace(proj=SimpleNamespace(weight=torch.zeros(1)))
        z, none = torch.randn(1, 4, 2, 4, 4), torch.zeros(1, 1)
        return host.sample(model, z, {"y": none}, none, torch.device("cpu"), progress=False)

    return flow_contract.rectified_flow(lambda: flow(num_sampling_steps=3), sample)


def open_sora(version: str) -> Check:
    """Open-Sora's registry: iddpm, and from 1.2 on the rectified flow, by configs and by `with_policy`."""

    def check(checkout: Path, stood_in: list[str]) -> list[int]:
        stood_in += ["colossalai"]
        modules: dict[str, dict[str, Any]] = {
            "colossalai": {},
            "colossalai.utils": {"get_current_device": lambda: torch.device("cpu")},
        }
        if version < "1.2":
            # `import opensora` loads them, and the schedulers do not use them.
            unused = [f"opensora.{name}" for name in ("acceleration", "datasets", "models")]
            stood_in += unused
            modules |= {name: {} for name in unused}
        for name, members in modules.items():
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(members)
        host = open_sora_contract.Host(version, checkout)
        points = open_sora_contract.check(host, open_sora_contract.CONTRACT)
        if version >= "1.2":
            assert open_sora_contract.check(host, open_sora_flow_contract.FLOW_CONTRACT) == points
            assert flow_contract.check(open_sora_flow_contract.subject(host)) == points
        return points

    return check


def latent_diffusion(checkout: Path, stood_in: list[str]) -> list[int]:
    """Every class of `ldm` that draws and weighs."""
    inert = latent_diffusion_contract.install()
    points = latent_diffusion_contract.check(import_module(latent_diffusion_contract.HOST))
    stood_in += ["pytorch_lightning", *inert.used]
    return points


def mmagic(checkout: Path, stood_in: list[str]) -> list[int]:
    """mmagic's registry, and the training step of its ADM."""
    replaced = mmagic_checkout.import_checkout(checkout)
    points = mmagic_contract.check()
    mmagic_checkout.check_train_step()
    stood_in += replaced()
    return points


def imagen(checkout: Path, stood_in: list[str]) -> list[int]:
    """imagen-pytorch of the checkout."""
    with imagen_contract.installed() as (host, used):
        stood_in += [*used, "T5's download"]
        return imagen_contract.check(host)


def diffusers_scripts(checkout: Path, stood_in: list[str]) -> list[int]:
    """diffusers' schedulers as installed, and the lines that the launcher edits in text-to-image scripts."""
    scripts = sorted((checkout / "examples" / "text_to_image").glob("train_*.py"))
    script_contract.check_scripts([path for path in scripts if "flax" not in path.name])
    points = [script_contract.check(scheduler) for scheduler in script_contract.SCHEDULERS]
    assert all(each == points[0] for each in points)
    return points[0]


CREATE = 'create_diffusion(timestep_respacing="")'
SAMPLER = 'create_named_schedule_sampler("uniform", diffusion)'
HOSTS = (
    Host(
        "DiT",
        "facebookresearch+DiT",
        "B",
        factory("diffusion"),
        "from diffusion import create_diffusion",
        CREATE,
    ),
    Host(
        "fast-DiT",
        "chuanyangjin+fast-DiT",
        "B",
        factory("diffusion"),
        "from diffusion import create_diffusion",
        CREATE,
    ),
    Host(
        "Latte",
        "Vchitect+Latte",
        "B",
        factory("diffusion", shape=(6, 2, 4, 4, 4), sigma_axis=2),
        "from diffusion import create_diffusion",
        CREATE,
    ),
    Host(
        "OpenDiT 0.0.1",
        "NUS-HPC-AI-Lab+VideoSys@v0.0.1",
        "B",
        factory("opendit.models.diffusion"),
        "from opendit.models.diffusion import create_diffusion",
        CREATE,
        ("timm", "torchvision", "transformers"),
    ),
    Host(
        "OpenDiT 1.0.0",
        "NUS-HPC-AI-Lab+VideoSys@v1.0.0",
        "B",
        factory("opendit.diffusion"),
        "from opendit.diffusion import create_diffusion",
        CREATE,
    ),
    Host(
        "PixArt-alpha",
        "PixArt-alpha+PixArt-alpha",
        "B",
        factory("diffusion", "IDDPM"),
        "from diffusion import IDDPM",
        'IDDPM("1000", learn_sigma=True, pred_sigma=True, snr=False)',
        ("timm", "torchvision", "xformers", "mmcv"),
    ),
    Host(
        "Open-Sora-Plan 1.0.0",
        "PKU-YuanGroup+Open-Sora-Plan@v1.0.0",
        "B",
        factory(
            "opensora.models.diffusion.diffusion",
            "create_diffusion_T",
            shape=(6, 4, 2, 4, 4),
            answers_tuple=True,
        ),
        "from opensora.models.diffusion.diffusion import create_diffusion_T as create_diffusion",
        CREATE,
        ("timm", "torchvision", "xformers", "decord"),
        ("diffusers", "transformers"),
    ),
    Host(
        "DiT-3D",
        "DiT-3D+DiT-3D",
        "B",
        point_clouds,
        factory_call='GaussianDiffusion(get_betas("linear", 1e-4, 0.02, 1000), "mse", "eps", "fixedsmall")',
        own_script="train.py",
        stand_ins=("tensorboardX", "trimesh", "timm", "open3d", "plyfile", "utils_vit"),
        replaced=("modules",),
    ),
    Host(
        "guided-diffusion",
        "openai+guided-diffusion",
        "C",
        guided_diffusion,
        "from guided_diffusion.script_util import create_gaussian_diffusion\n"
        "from guided_diffusion.resample import create_named_schedule_sampler",
        "create_gaussian_diffusion(learn_sigma=True)",
        ("blobfile", "mpi4py"),
    ),
    Host(
        "MDT",
        "sail-sg+MDT",
        "C",
        masked_diffusion,
        "from masked_diffusion import create_diffusion\n"
        "from masked_diffusion.resample import create_named_schedule_sampler",
        CREATE,
    ),
    Host(
        "SiT",
        "willisma+SiT",
        "B",
        transports,
        "from transport import create_transport",
        "create_transport()",
        ("torchdiffeq",),
    ),
    Host(
        "LightningDiT",
        "hustvl+LightningDiT",
        "B",
        transports,
        "from transport import create_transport",
        "create_transport()",
        ("torchdiffeq",),
    ),
    Host("VideoSys 2.0", "NUS-HPC-AI-Lab+VideoSys", "B", video_sys),
    *(
        Host(f"Open-Sora {version}", f"hpcaitech+Open-Sora@v{version}", "A", check=open_sora(version))
        for version in ("1.0.0", "1.1.0", "1.2.0", "1.3")
    ),
    Host("mmagic", "open-mmlab+mmagic", "A", check=mmagic),
    Host("latent-diffusion", "CompVis+latent-diffusion", "D", check=latent_diffusion),
    Host("Stable Diffusion 1", "CompVis+stable-diffusion", "D", check=latent_diffusion),
    Host("Stable Diffusion 2", "Stability-AI+stablediffusion", "D", check=latent_diffusion),
    Host("imagen-pytorch", "lucidrains+imagen-pytorch", "D", check=imagen),
    Host("diffusers scripts", "huggingface+diffusers", "D", check=diffusers_scripts),
)
