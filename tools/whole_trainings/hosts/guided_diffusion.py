"""The scripts/image_train.py of guided-diffusion and MDT, through the launcher, on pictures of digits."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from whole_trainings.material import write_images, write_vae
from whole_trainings.runs import Script, SmallModel
from whole_trainings.stand_ins import module_with
from whole_trainings.training import Part, Training

BLOBFILE = ("blobfile==3.0.0", "pycryptodomex==3.21.0", "lxml==5.3.0")


class Adan(torch.optim.AdamW):
    """AdamW, under the name and with the arguments of Adan, which is built for CUDA."""

    def __init__(self, params: Any, max_grad_norm: float = 0.0, fused: bool = False, **options: Any) -> None:
        super().__init__(params, **options)


def install() -> list[str]:
    """Puts MPI for one process and Adan in place. Returns what was replaced."""
    alone = SimpleNamespace(rank=0, size=1, Get_rank=lambda: 0, Get_size=lambda: 1, bcast=_same)
    mpi = module_with("mpi4py.MPI", COMM_WORLD=alone)
    sys.modules.update({"mpi4py": module_with("mpi4py", MPI=mpi), "mpi4py.MPI": mpi})
    sys.modules["adan"] = module_with("adan", Adan=Adan)
    return ["mpi4py (one process)", "Adan (torch.optim.AdamW; MDT alone)"]


def _same(value: Any, root: int = 0) -> Any:
    return value


class GuidedDiffusion(Training):
    """A small UNet with learned sigma and classes, on 16 x 16 pixels."""

    name, folder, model = "guided-diffusion", "openai+guided-diffusion", "UNetModel"
    factories = (("guided_diffusion.script_util", "create_gaussian_diffusion"),)
    script, sampler = "scripts/image_train.py", "scripts/image_sample.py"
    options = {"needs": BLOBFILE, "stand_ins": "whole_trainings.hosts.guided_diffusion.install"}
    says_resumed = "loading model from checkpoint"
    image_size = 16

    def prepare(self, host: Script) -> None:
        write_images(host.work / "images", self.steps_per_epoch * self.batch, size=64)

    def flags(self) -> list[str]:
        """The arguments that training and sampling share."""
        sizes = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1"}
        flags = {**sizes, "attention_resolutions": "8", "class_cond": True, "learn_sigma": True}
        return [text for name, value in flags.items() for text in (f"--{name}", str(value))]

    def arguments(self, work: Path, part: Part) -> list[str]:
        steps = self.steps_per_epoch
        flags = ["--data_dir", str(work / "images"), "--batch_size", str(self.batch)]
        flags += ["--lr_anneal_steps", str(steps * part.epochs), "--save_interval", str(steps)]
        if part.resumed:
            flags += ["--resume_checkpoint", str(self.checkpoint(work, part.resumed, 1))]
        return [*self.flags(), *flags]

    def sampling(self, work: Path, checkpoint: Path) -> list[str]:
        some = ["--num_samples", "4", "--batch_size", "4", "--model_path", str(checkpoint)]
        return [*self.flags(), *some, "--timestep_respacing", "10"]

    def variables(self, work: Path, name: str) -> dict[str, str]:
        return {"OPENAI_LOGDIR": str(work / name)}

    def checkpoint(self, work: Path, name: str, epochs: int) -> Path:
        return work / name / f"model{epochs * self.steps_per_epoch:06d}.pt"


class MDT(GuidedDiffusion):
    """A small MDTv2 with masks, with a random VAE."""

    name, folder, model = "MDT", "sail-sg+MDT", "MDTv2"
    factories = (("masked_diffusion", "create_diffusion"),)
    # The whole picture, and a masked one.
    calls_per_step = 2
    options = {
        **GuidedDiffusion.options,
        "small": (
            SmallModel(
                "masked_diffusion.models",
                "MDTv2",
                "MDTv2_small",
                {"depth": 4, "hidden_size": 64, "patch_size": 2, "num_heads": 4},
            ),
        ),
    }

    def prepare(self, host: Script) -> None:
        for vae in ("ema", "mse"):
            write_vae(host.work / "stabilityai" / f"sd-vae-ft-{vae}")
        super().prepare(host)

    def flags(self) -> list[str]:
        return ["--model", "MDTv2_small", "--image_size", "64", "--decode_layer", "2"]

    def arguments(self, work: Path, part: Part) -> list[str]:
        return [*super().arguments(work, part), "--mask_ratio", "0.3"]

    def sampling(self, work: Path, checkpoint: Path) -> list[str]:
        some = ["--num_samples", "4", "--batch_size", "4", "--model_path", str(checkpoint)]
        return [*self.flags(), *some, "--num_sampling_steps", "10", "--cfg_cond", "True"]


HOSTS = (GuidedDiffusion(), MDT())
