"""latent-diffusion's main.py under Lightning, with the policy by its config."""

import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from speedit_plugins import NoiseSchedule
from whole_trainings.checks import Result
from whole_trainings.runs import ROOT, Run, Script
from whole_trainings.script_checks import Law, Training
from whole_trainings.trainer_material import write_images

NEEDS = (
    "pytorch-lightning==1.4.2",
    "torchmetrics==0.5.1",
    "pyDeprecate==0.3.1",
    "setuptools==75.8.0",
    "future",
    "torchvision==0.28.0",
)
CONFIG = "configs/latent-diffusion/lsun_churches-ldm-kl-8.yaml"
OURS = "speedit_plugins.hosts.latent_diffusion.LatentDiffusion"
SIZE, BATCH, STEPS_PER_EPOCH, NUM_EPOCHS = 32, 16, 8, 8
# The first stage divides by 8.
LATENT_SIZE = SIZE // 8
SIZES: dict[str, Any] = {
    "model": {
        "params": {
            "image_size": LATENT_SIZE,
            "scheduler_config": {"params": {"warm_up_steps": [10]}},
            "unet_config": {
                "params": {
                    "image_size": LATENT_SIZE,
                    "model_channels": 32,
                    "attention_resolutions": [2],
                    "num_res_blocks": 1,
                    "channel_mult": [1, 2],
                    "num_heads": 2,
                }
            },
            "first_stage_config": {
                "params": {
                    "ckpt_path": None,
                    "ddconfig": {"resolution": SIZE, "ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1},
                }
            },
        }
    },
    "data": {
        "params": {
            "batch_size": BATCH,
            "num_workers": 0,
            "train": {"params": {"size": SIZE}},
            "validation": {"params": {"size": SIZE}},
        }
    },
    "lightning": {"logger": {"target": "pytorch_lightning.loggers.CSVLogger"}},
}


class LatentDiffusion:
    """The published KL-f8 config of LSUN churches in small, on handwritten digits."""

    name = "latent-diffusion main.py"
    folder = "CompVis+latent-diffusion"

    def train(self, checkout: Path, work: Path) -> Result:
        """Runs the trainings and their checks."""
        host = Script(
            checkout,
            work,
            "",
            (),
            needs=NEEDS,
            prepare=f"{__package__}.latent_diffusion_steps",
            on_cpu=True,
        )
        self._write_data(work)
        speed = str(ROOT / "integrations" / "latent_diffusion" / "speed.yaml")
        uniform = {"model": {"target": OURS, "params": {"policy": {"type": "uniform"}}}}
        runs = {
            "long": self._run(host, "long", NUM_EPOCHS, [speed]),
            "uniform": self._run(host, "uniform", 1, [_written(work / "uniform.yaml", uniform)]),
            "plain": self._run(host, "plain", 1, [], replay="uniform"),
            "first": self._run(host, "first", 2, [speed]),
        }
        folder = _folder(work / "first")
        more = _epochs(work, 4)
        resumed = ["-r", str(folder), "--base", more, "-t", "--no-test", "True"]
        runs["second"] = host.run("second", "main.py", resumed)
        for name, policy in (("sampled", [speed]), ("sampled_plain", [])):
            runs[name] = self._sample(host, name, policy)
        training = Training(
            self.name,
            runs,
            LAW,
            lambda name: _weights(_folder(work / name) / "checkpoints" / "last.weights"),
            "Restored all states from the checkpoint file",
            lambda name: next((work / name).glob("samples/*/*/img"), work / name / "nothing"),
            ["by config: no GPU, no first-stage weights, CSVLogger in place of TestTubeLogger"],
            ("sampled", "sampled_plain"),
        )
        return training.result()

    def _write_data(self, work: Path) -> None:
        data = work / "data" / "lsun"
        paths = write_images(data / "churches", BATCH * STEPS_PER_EPOCH, size=SIZE)
        for part, chosen in (("train", paths), ("val", paths[:BATCH])):
            names = "\n".join(path.name for path in chosen)
            (data / f"church_outdoor_{part}.txt").write_text(names, encoding="utf-8")
        _written(work / "sizes.yaml", SIZES)

    def _run(self, host: Script, name: str, epochs: int, configs: list[str], **options: Any) -> Run:
        work = host.work
        base = [str(host.checkout / CONFIG), str(work / "sizes.yaml"), _epochs(work, epochs), *configs]
        arguments = ["--base", *base, "-l", str(work / name), "-t", "--no-test", "True"]
        return host.run(name, "main.py", arguments, **options)

    def _sample(self, host: Script, name: str, configs: list[str]) -> Run:
        """Runs the host's sampling script on the checkpoint of the long run."""
        work = host.work
        (work / name).mkdir(exist_ok=True)
        last = _folder(work / "long") / "checkpoints" / "last.ckpt"
        if last.is_file():
            shutil.copy(last, work / name / "model.ckpt")
        merged: dict[str, Any] = {}
        for path in (str(host.checkout / CONFIG), str(work / "sizes.yaml"), *configs):
            merged = _merged(merged, yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        _written(work / name / "config.yaml", merged)
        arguments = ["-r", str(work / name / "model.ckpt"), "-n", "2", "--batch_size", "2", "-c", "5"]
        return host.run(name, "scripts/sample_diffusion.py", arguments)


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """A mapping with another over it."""
    merged = dict(first)
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _written(path: Path, config: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(path)


def _epochs(work: Path, count: int) -> str:
    return _written(work / f"epochs_{count}.yaml", {"lightning": {"trainer": {"max_epochs": count}}})


def _folder(logs: Path) -> Path:
    """The newest folder of logs."""
    found = sorted(path for path in logs.glob("*") if path.is_dir())
    return found[-1] if found else logs / "nothing"


def _weights(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True) if path.is_file() else {}


def _index(t: Tensor) -> Tensor:
    return t.long()


def _schedule() -> NoiseSchedule:
    """That of this config; the host keeps it as float32."""
    exact = NoiseSchedule.scaled_linear(beta_start=0.0015, beta_end=0.0155)
    return NoiseSchedule.from_alphas_cumprod(exact.alphas_cumprod.float())


LAW = Law("speedit", _schedule, "epsilon", _index)
HOSTS = (LatentDiffusion(),)
