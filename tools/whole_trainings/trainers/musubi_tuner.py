"""musubi-tuner's zimage_train_network.py, through the launcher."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from speedit_plugins import NoiseSchedule
from whole_trainings.checks import Result
from whole_trainings.runs import Run, Script
from whole_trainings.script_checks import Law, Training
from whole_trainings.trainer_material import write_images
from whole_trainings.trainers.sd_scripts import NEEDS

SIZE, BATCH, COUNT = 64, 16, 16
LONG, PAIR, PART = 80, 16, 8
DATA = """[general]
resolution = [{size}, {size}]
caption_extension = ".txt"
batch_size = {batch}
enable_bucket = false

[[datasets]]
image_directory = {images!r}
cache_directory = {cache!r}
num_repeats = 8
"""


class ZImage:
    """A LoRA of a small Z-Image on handwritten digits."""

    name = "musubi-tuner zimage_train_network.py"
    folder = "kohya-ss+musubi-tuner"

    def train(self, checkout: Path, work: Path) -> Result:
        """Runs the trainings and their checks."""
        host = Script(
            checkout,
            work,
            "",
            (),
            needs=NEEDS,
            prepare=f"{__package__}.musubi_tuner_models",
            on_cpu=True,
        )
        write_images(work / "images", COUNT, size=SIZE)
        folders = {"images": str(work / "images"), "cache": str(work / "cache")}
        (work / "data.toml").write_text(DATA.format(size=SIZE, batch=BATCH, **folders), encoding="utf-8")
        policy, state = ["--policy", LAW.policy], ["--state", str(work / "policy.pt")]
        # A work folder may have been used before.
        (work / "policy.pt").unlink(missing_ok=True)
        shifted = ["--timestep_sampling", "shift", "--discrete_flow_shift", "3.0"]
        own = ["--timestep_sampling", "uniform"]
        saved = ["--save_state", "--save_every_n_steps", str(PART)]
        resumed = ["--resume", str(work / "first" / f"lora-step{PART:08d}-state")]
        runs = {
            "long": self._run(host, "long", LONG, own, launch=policy),
            "uniform": self._run(host, "uniform", PAIR, shifted, launch=["--policy", "uniform"]),
            "plain": self._run(host, "plain", PAIR, shifted),
            "first": self._run(host, "first", PART, [*own, *saved], launch=[*policy, *state]),
            "second": self._run(host, "second", PART, [*own, *resumed], launch=[*policy, *state]),
        }
        training = Training(
            self.name,
            runs,
            LAW,
            lambda name: _weights(work / name / "lora.safetensors"),
            "resume training from local state",
        )
        return training.result()

    def _run(self, host: Script, name: str, steps: int, more: list[str], **options: Any) -> Run:
        work = host.work
        arguments = ["--dit", str(work / "zimage.safetensors"), "--dataset_config", str(work / "data.toml")]
        arguments += ["--network_module", "networks.lora_zimage", "--network_dim", "2", "--sdpa"]
        arguments += ["--output_dir", str(work / name), "--output_name", "lora", "--seed", "1"]
        arguments += ["--max_train_steps", str(steps), "--learning_rate", "1e-3", "--optimizer_type", "AdamW"]
        arguments += ["--mixed_precision", "no", "--max_data_loader_n_workers", "0", *more]
        return host.run(name, "src/musubi_tuner/zimage_train_network.py", arguments, **options)


def _weights(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.is_file() else {}


def _bin(t: Tensor) -> Tensor:
    # The host counts timesteps from 1, and its model gets 1 - timestep / 1000.
    return ((1 - t.double()) * 1000 - 1).long().clamp(0, 999)


def _flow() -> NoiseSchedule:
    return NoiseSchedule.rectified_flow(1000)


LAW = Law("speed", _flow, "flow", _bin)
HOSTS = (ZImage(),)
