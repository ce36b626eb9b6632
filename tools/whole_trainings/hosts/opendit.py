"""OpenDiT's train.py under ColossalAI, through the launcher, on pictures of digits."""

from pathlib import Path

from whole_trainings.material import write_images, write_vae
from whole_trainings.runs import Script, SmallModel
from whole_trainings.training import Part, Training

SIZES = {"patch_size": 8, "depth": 2, "hidden_size": 64, "num_heads": 4}


class OpenDiT10(Training):
    """A small DiT of OpenDiT 1.0.0 by zero2 in bfloat16, with a random VAE."""

    name, folder, model = "OpenDiT 1.0.0", "NUS-HPC-AI-Lab+VideoSys@v1.0.0", "DiT"
    factories = (("opendit.diffusion", "create_diffusion"),)
    options = {
        "colossalai": True,
        "small": (SmallModel("opendit.models.dit", "DiT", "DiT-small/8", SIZES, "DiT_models"),),
    }
    keeps_state, says_resumed = True, "Loaded checkpoint"

    def prepare(self, host: Script) -> None:
        write_vae(host.work / "stabilityai" / "sd-vae-ft-ema")
        write_images(host.work / "images", self.steps_per_epoch * self.batch, size=64)

    def flags(self) -> list[str]:
        """The arguments that training and sampling share."""
        return ["--model", "DiT-small/8", "--num_classes", "10"]

    def arguments(self, work: Path, part: Part) -> list[str]:
        flags = ["--data_path", str(work / "images"), "--outputs", str(work / part.name)]
        flags += ["--batch_size", str(self.batch), "--epochs", str(part.epochs), "--num_workers", "0"]
        flags += ["--ckpt_every", str(self.steps_per_epoch)]
        if part.resumed:
            flags += ["--load", str(self.checkpoint(work, part.resumed, 1).parent)]
        return [*self.flags(), *flags]

    def sampling(self, work: Path, checkpoint: Path) -> list[str]:
        return [*self.flags(), "--num_sampling_steps", "10", "--ckpt", str(checkpoint)]

    def checkpoint(self, work: Path, name: str, epochs: int) -> Path:
        place = f"*/epoch{epochs - 1}-global_step{epochs * self.steps_per_epoch}/ema.pt"
        return next((work / name).glob(place), work / name / "no checkpoint")


HOSTS = (OpenDiT10(),)
