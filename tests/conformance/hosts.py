"""The hosts that check_hosts.py knows: folder, kind of seam, and what the launcher replaces in them.

The kinds are those of integrations/README.md. A is a registry. B is an object whose training call takes t or
draws it. C is a schedule sampler. D is a script or a class that draws for itself.
"""

from dataclasses import dataclass
from typing import Any

from conformance.checkouts import (
    Seams,
    diffusers_scripts,
    factory,
    guided_diffusion,
    hunyuan,
    imagens,
    latent_diffusion_classes,
    luminas,
    masked_diffusion,
    mmagic_registry,
    open_sora,
    point_clouds,
    raes,
    self_training_models,
    si_losses,
    transports,
    video_sys,
)


@dataclass(frozen=True)
class Host:
    """A known host.

    Args:
        name: of the host and its version, for the table and --only.
        folder: of its checkout, in DIR.
        kind: of seam, A, B, C or D.
        seams: imports the host and yields what is checked.
        factory_import: the statement by which the host's script gets its factory.
        factory_call: an expression that makes an object with what was imported, to check the launcher; empty
            if the launcher is not for this host.
        stand_ins: packages that are replaced if they cannot be imported.
        replaced: packages that are always replaced: the host needs another version, or they are its CUDA
            kernels.
        own_script: the script that defines the class itself, instead of `factory_import`.
    """

    name: str
    folder: str
    kind: str
    seams: Seams
    factory_import: str = ""
    factory_call: str = ""
    stand_ins: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    own_script: str = ""


def creating(
    name: str, folder: str, module: str, function: str = "create_diffusion", call: str = "", **options: Any
) -> Host:
    """A host whose script imports a function that makes its diffusion object.

    Args:
        name, folder: see `Host`.
        module, function: of the host.
        call: the expression of the script; '' calls the function without respacing, as most hosts do.
        options: of the host's `ObjectSeam`; also `stand_ins` and `replaced` of `Host`.
    """
    packages = {key: options.pop(key) for key in ("stand_ins", "replaced") if key in options}
    call = call or f'{function}(timestep_respacing="")'
    seams = factory(module, function, **options)
    return Host(name, folder, "B", seams, f"from {module} import {function}", call, **packages)


SAMPLER = 'create_named_schedule_sampler("uniform", diffusion)'
FLOW = ("from transport import create_transport", "create_transport()", ("torchdiffeq",))
HOSTS = (
    creating("DiT", "facebookresearch+DiT", "diffusion"),
    creating("fast-DiT", "chuanyangjin+fast-DiT", "diffusion"),
    creating("Latte", "Vchitect+Latte", "diffusion", shape=(6, 2, 4, 4, 4), sigma_axis=2),
    creating(
        "OpenDiT 0.0.1",
        "NUS-HPC-AI-Lab+VideoSys@v0.0.1",
        "opendit.models.diffusion",
        stand_ins=("timm", "torchvision", "transformers"),
    ),
    creating("OpenDiT 1.0.0", "NUS-HPC-AI-Lab+VideoSys@v1.0.0", "opendit.diffusion"),
    creating(
        "PixArt-alpha",
        "PixArt-alpha+PixArt-alpha",
        "diffusion",
        "IDDPM",
        'IDDPM("1000", learn_sigma=True, pred_sigma=True, snr=False)',
        stand_ins=("timm", "torchvision", "xformers", "mmcv"),
    ),
    creating(
        "PixArt-sigma",
        "PixArt-alpha+PixArt-sigma",
        "diffusion",
        "IDDPM",
        'IDDPM("1000", learn_sigma=True, pred_sigma=True, snr=False)',
        stand_ins=("timm", "torchvision", "xformers", "mmcv"),
    ),
    Host(
        "HunyuanDiT",
        "Tencent-Hunyuan+HunyuanDiT",
        "B",
        hunyuan,
        "from hydit.diffusion import create_diffusion",
        'create_diffusion(predict_type="v_prediction", noise_schedule="scaled_linear")',
    ),
    creating(
        "Open-Sora-Plan 1.0.0",
        "PKU-YuanGroup+Open-Sora-Plan@v1.0.0",
        "opensora.models.diffusion.diffusion",
        "create_diffusion_T",
        shape=(6, 4, 2, 4, 4),
        answers_tuple=True,
        stand_ins=("timm", "torchvision", "xformers", "decord"),
        replaced=("diffusers", "transformers"),
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
        'create_diffusion(timestep_respacing="")',
    ),
    Host("SiT", "willisma+SiT", "B", transports, *FLOW),
    Host("LightningDiT", "hustvl+LightningDiT", "B", transports, *FLOW),
    Host("Lumina-Image 2.0", "Alpha-VLLM+Lumina-Image-2.0", "B", luminas, *FLOW),
    Host(
        "RAE",
        "bytetriper+RAE/src",
        "B",
        raes,
        "import sys, types\nstage2 = sys.modules['stage2'] = types.ModuleType('stage2')\n"
        "stage2.__path__ = [folder + '/stage2' for folder in sys.path]\n"
        "from stage2.transport import create_transport",
        "create_transport()",
        ("torchdiffeq",),
    ),
    Host("REPA", "sihyun-yu+REPA", "B", si_losses(), "from loss import SILoss", "SILoss()"),
    Host(
        "REG",
        "Martinser+REG",
        "B",
        si_losses(has_class_token=True),
        "from loss import SILoss",
        "SILoss()",
    ),
    Host(
        "REPA-E",
        "End2End-Diffusion+REPA-E",
        "B",
        self_training_models,
        "from conformance.checkouts import small_sit, timm_layers\n"
        "timm_layers.install()\nfrom models.sit import SiT",
        "small_sit()",
    ),
    Host("VideoSys 2.0", "NUS-HPC-AI-Lab+VideoSys", "B", video_sys),
    *(
        Host(f"Open-Sora {version}", f"hpcaitech+Open-Sora@v{version}", "A", open_sora(version))
        for version in ("1.0.0", "1.1.0", "1.2.0", "1.3")
    ),
    Host("mmagic", "open-mmlab+mmagic", "A", mmagic_registry),
    Host("latent-diffusion", "CompVis+latent-diffusion", "D", latent_diffusion_classes),
    Host("Stable Diffusion 1", "CompVis+stable-diffusion", "D", latent_diffusion_classes),
    Host("Stable Diffusion 2", "Stability-AI+stablediffusion", "D", latent_diffusion_classes),
    Host("imagen-pytorch", "lucidrains+imagen-pytorch", "D", imagens),
    Host("diffusers scripts", "huggingface+diffusers", "D", diffusers_scripts),
)
