"""The train.py of DiT, fast-DiT, SiT and LightningDiT, through the launcher, on pictures of digits."""

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from speedit_plugins import NoiseSchedule
from whole_trainings.material import write_images, write_vae
from whole_trainings.runs import Run, Script, SmallModel
from whole_trainings.training import Part, Training, images_of

# The smallest that these train.py take; latents are an eighth.
IMAGE_SIZE = 256
SIZES = {"patch_size": 8, "depth": 2, "hidden_size": 64, "num_heads": 4}


class DiT(Training):
    """DiT-small/8 on digits, with a random VAE."""

    name, folder, model = "DiT", "facebookresearch+DiT", "DiT"
    factories = (("diffusion", "create_diffusion"),)
    options = {"small": (SmallModel("models", "DiT", "DiT-small/8", SIZES, "DiT_models"),)}
    no_resume = "the host's train.py reads no checkpoint"

    def prepare(self, host: Script) -> None:
        for vae in ("ema", "mse"):
            # The hub's name, which is a folder below the current one.
            write_vae(host.work / "stabilityai" / f"sd-vae-ft-{vae}")
        write_images(host.work / "images", self.steps_per_epoch * self.batch, size=IMAGE_SIZE)

    def data(self, work: Path) -> list[str]:
        """The arguments for the data."""
        return ["--data-path", str(work / "images")]

    def arguments(self, work: Path, part: Part) -> list[str]:
        steps = str(self.steps_per_epoch)
        arguments = [*self.data(work), "--results-dir", str(work / part.name), "--num-workers", "0"]
        arguments += ["--global-batch-size", str(self.batch), "--epochs", str(part.epochs)]
        return [*arguments, "--log-every", steps, "--ckpt-every", steps, *self._network()]

    def sampling(self, work: Path, checkpoint: Path) -> list[str]:
        return [*self._network(), "--num-sampling-steps", "10", "--ckpt", str(checkpoint)]

    def checkpoint(self, work: Path, name: str, epochs: int) -> Path:
        steps = epochs * self.steps_per_epoch
        return next((work / name).glob(f"*/checkpoints/{steps:07d}.pt"), work / name / "no checkpoint")

    def _network(self) -> list[str]:
        return ["--model", f"{self.model}-small/8", "--image-size", str(IMAGE_SIZE)]


class FastDiT(DiT):
    """fast-DiT, on features of the digits by its own extract_features.py."""

    name, folder = "fast-DiT", "chuanyangjin+fast-DiT"

    def prepare(self, host: Script) -> None:
        super().prepare(host)
        places = ["--data-path", str(host.work / "images"), "--features-path", str(host.work / "features")]
        done = host.run("features", "extract_features.py", [*places, "--num-workers", "0"])
        if done.exit_code:
            raise RuntimeError(f"extract_features.py: {done.last_words()}")

    def data(self, work: Path) -> list[str]:
        return ["--feature-path", str(work / "features")]


class SiT(DiT):
    """SiT-small/8 on digits, with a random VAE. Its t = 0 is noise."""

    name, folder, model = "SiT", "willisma+SiT", "SiT"
    factories = (("transport", "create_transport"),)
    schedule = NoiseSchedule.rectified_flow
    options = {
        "needs": ("torchdiffeq==0.2.5",),
        "small": (
            SmallModel(
                "models",
                "SiT",
                "SiT-small/8",
                # sample.py makes the model of any --ckpt so, and cannot read those of the host's own sizes.
                {**SIZES, "learn_sigma": False},
                "SiT_models",
            ),
        ),
    }
    replays = False
    no_resume = "the host's --ckpt uses `opt` before it is made, whatever the checkpoint"

    def sampling(self, work: Path, checkpoint: Path) -> list[str]:
        return ["SDE", *super().sampling(work, checkpoint)]

    def variables(self, work: Path, name: str) -> dict[str, str]:
        # Of wandb. It reads them and does without.
        return {"ENTITY": "none", "PROJECT": "none"}

    def time(self, t: Tensor) -> Tensor:
        return 1 - t

    def index(self, t: Tensor) -> Tensor:
        return ((1 - t) * 1000).long().clamp(0, 999)


class LightningDiT(SiT):
    """A small LightningDiT by the published config, on random latents: there is no VA-VAE here.

    The config's logit-normal draw is off: in so few draws it could not be told from the policy's.
    """

    name, folder, model = "LightningDiT", "hustvl+LightningDiT", "LightningDiT"
    sampler = "inference.py"
    options = {
        "needs": ("torchdiffeq==0.2.5",),
        "small": (
            SmallModel(
                "models.lightningdit",
                "LightningDiT",
                "LightningDiT-small/1",
                {**SIZES, "patch_size": 1},
                "LightningDiT_models",
            ),
        ),
    }
    # `train.resume` cannot read a checkpoint of train.py: it has no "module." before its names.
    no_resume, says_resumed = "", "Loaded pretrained model from"
    # Latents of one pixel and a decoder 16 times as large.
    image_size = 16

    def prepare(self, host: Script) -> None:
        count, generator = self.steps_per_epoch * self.batch, torch.Generator().manual_seed(0)
        latents = torch.randn(count, 32, 1, 1, generator=generator)
        self.published = host.checkout / "configs" / "lightningdit_xl_vavae_f16d32.yaml"
        saved = {"latents": latents, "latents_flip": latents.flip(1), "labels": torch.arange(count) % 10}
        (host.work / "latents").mkdir()
        save_file(saved, host.work / "latents" / "latents.safetensors")

    def arguments(self, work: Path, part: Part) -> list[str]:
        steps = self.steps_per_epoch * (part.epochs - bool(part.resumed))
        changes = {"max_steps": steps, "ckpt_every": self.steps_per_epoch}
        if part.resumed:
            changes["weight_init"] = str(self.checkpoint(work, part.resumed, 1))
        return ["--config", str(self.write_config(work, part.name, changes))]

    def sampling(self, work: Path, checkpoint: Path) -> list[str]:
        changes = {"ckpt_path": str(checkpoint)}
        return ["--demo", "--config", str(self.write_config(work, "sampling", {}, changes))]

    def sampled(self, host: Script, name: str, checkpoint: Path, **options: Any) -> Run:
        # Where the host's class looks for the decoder; without a checkpoint its weights are random.
        decoder = host.work / "tokenizer" / "configs" / "vavae_f16d32.yaml"
        decoder.parent.mkdir(parents=True, exist_ok=True)
        decoder.write_text("{ckpt_path: null, model: {params: {embed_dim: 32}}}", encoding="utf-8")
        done = super().sampled(host, name, checkpoint, **options)
        images_of(done.records[0], sorted((host.work / "demo_images").glob("*.png")))
        return done

    def checkpoint(self, work: Path, name: str, epochs: int) -> Path:
        return work / name / "run" / "checkpoints" / f"{epochs * self.steps_per_epoch:07d}.pt"

    def write_config(
        self, work: Path, name: str, train: dict[str, Any], rest: dict[str, Any] | None = None
    ) -> Path:
        """Writes the published config with our sizes, paths and steps. Returns its path."""
        # The host's own train.py reads it in this way.
        config = yaml.safe_load(self.published.read_text(encoding="utf-8"))
        config.update(rest or {})
        config["data"].update(data_path=str(work / "latents"), image_size=self.image_size, num_workers=0)
        config["model"].update(model_type="LightningDiT-small/1")
        ours = {"global_batch_size": self.batch, "log_every": self.steps_per_epoch, "exp_name": "run"}
        config["train"].update(ours, output_dir=str(work / name), **train)
        config["transport"].update(use_lognorm=False)
        config["sample"].update(num_sampling_steps=10)
        path = work / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path


HOSTS = (DiT(), FastDiT(), SiT(), LightningDiT())
