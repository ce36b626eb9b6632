"""imagen-pytorch's ImagenTrainer, in a script of a user with one line for the policy."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speedit_plugins import NoiseSchedule
from speedit_plugins.hosts.schedules import NUM_BINS, binned
from whole_trainings.checks import Result
from whole_trainings.runs import Run, Script
from whole_trainings.script_checks import Law, Training
from whole_trainings.trainer_material import write_images

NEEDS = ("torchvision==0.28.0", "kornia", "kornia_rs", "ema_pytorch", "pytorch_warmup", "beartype")
LONG, PAIR, PART = 100, 20, 20


class ImagenTrainer:
    """One unet on handwritten digits, with validation, EMA and the trainer's own `save` and `load`."""

    name = "imagen-pytorch ImagenTrainer"
    folder = "lucidrains+imagen-pytorch"

    def train(self, checkout: Path, work: Path) -> Result:
        """Runs the trainings and their checks."""
        host = Script(checkout, work, "", (), needs=NEEDS, prepare=f"{__package__}.imagen_steps", on_cpu=True)
        write_images(work / "images", 128, size=16)
        saved = work / "first" / "trainer.pt"
        policy = ["--policy", LAW.policy]
        runs = {
            "long": self._run(host, "long", LONG, policy),
            "uniform": self._run(host, "uniform", PAIR, ["--policy", "uniform"]),
            "plain": self._run(host, "plain", PAIR, [], replay="uniform"),
            "first": self._run(host, "first", PART, policy),
            "second": self._run(host, "second", 2 * PART, [*policy, "--resume", str(saved)]),
        }
        notes = ["T5 and a cascade are not in this training: one unet without captions"]
        training = Training(
            self.name,
            runs,
            LAW,
            lambda name: _weights(work / name / "trainer.pt"),
            f"resumed after {PART} steps",
            lambda name: work / name,
            notes,
        )
        return training.result()

    def _run(self, host: Script, name: str, steps: int, more: list[str], **options: Any) -> Run:
        script = str(Path(__file__).with_name("imagen_script.py"))
        arguments = [str(host.work / "images"), str(host.work / name), "--steps", str(steps), *more]
        return host.run(name, script, arguments, **options)


def _weights(path: Path) -> dict[str, Tensor]:
    saved = torch.load(path, weights_only=True) if path.is_file() else {"model": {}, "ema": {}}
    return {f"{part}.{name}": each for part in ("model", "ema") for name, each in saved[part].items()}


def _bin(t: Tensor) -> Tensor:
    return (t * NUM_BINS).long().clamp(max=NUM_BINS - 1)


def _cosine() -> NoiseSchedule:
    """The host's schedule, in continuous time."""

    def levels(time: Tensor) -> tuple[Tensor, Tensor]:
        angle = (time + 0.008) / 1.008 * math.pi / 2
        return angle.cos(), angle.sin()

    return binned(levels)


LAW = Law("speed", _cosine, "epsilon", _bin)
HOSTS = (ImagenTrainer(),)
