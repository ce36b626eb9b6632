"""sd-scripts' flux_train_network.py and train_network.py, through the launcher."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from speedit_plugins import NoiseSchedule
from whole_trainings.checks import Result
from whole_trainings.runs import Run, Script
from whole_trainings.script_checks import Law, Training
from whole_trainings.trainer_material import write_images

NEEDS = (
    "diffusers==0.32.1",
    "transformers==4.54.1",
    "tokenizers==0.21.4",
    "huggingface_hub==0.34.3",
    "accelerate==1.6.0",
    "easydict",
    "ftfy",
    "imagesize",
    "sentencepiece",
    "toml",
    "voluptuous",
    "wcwidth",
    "torchvision==0.28.0",
)
SIZE, BATCH, COUNT = 64, 16, 16
LONG, PAIR, PART = 48, 8, 8


class Network:
    """A LoRA of a small model on handwritten digits.

    Args:
        script: of the host.
        models: folder that marks which models `sd_scripts_models` makes.
        law: of the policy.
        arguments: that the script needs beside those of both; WORK is the folder.
        sampling: arguments of the runs whose law is the policy's own.
    """

    folder = "kohya-ss+sd-scripts"

    def __init__(
        self, script: str, models: str, law: Law, arguments: list[str], sampling: dict[str, list[str]]
    ) -> None:
        self.name = f"sd-scripts {script}"
        self._script, self._models, self._law = script, models, law
        self._arguments, self._sampling = arguments, sampling

    def train(self, checkout: Path, work: Path) -> Result:
        """Runs the trainings and their checks."""
        host = Script(
            checkout,
            work,
            "",
            (),
            needs=NEEDS,
            prepare=f"{__package__}.sd_scripts_models",
            on_cpu=True,
        )
        write_images(work / "images" / "8_digit", COUNT, size=SIZE)
        (work / "prompts.txt").write_text("a handwritten 7 --w 64 --h 64 --s 4 --d 1\n", encoding="utf-8")
        if self._models == "flux":
            (work / "flux").mkdir(exist_ok=True)
        policy, state = ["--policy", self._law.policy], ["--state", str(work / "policy.pt")]
        # A work folder may have been used before.
        (work / "policy.pt").unlink(missing_ok=True)
        shown = ["--sample_every_n_steps", str(PAIR), "--sample_prompts", str(work / "prompts.txt")]
        saved = ["--save_state", "--save_every_n_steps", str(PART)]
        found = str(work / "first" / f"lora-step{PART:08d}-state")
        resumed = ["--resume", found, "--skip_until_initial_step"]
        own, replay = self._sampling["policy"], "uniform" if self._models == "sd" else ""
        runs = {
            "long": self._run(host, "long", LONG, own, launch=policy),
            "uniform": self._run(
                host, "uniform", PAIR, [*shown, *self._sampling["uniform"]], launch=["--policy", "uniform"]
            ),
            "plain": self._run(host, "plain", PAIR, [*shown, *self._sampling["uniform"]], replay=replay),
            "first": self._run(host, "first", PART, [*own, *saved], launch=[*policy, *state]),
            "second": self._run(host, "second", 2 * PART, [*own, *resumed], launch=[*policy, *state]),
        }
        training = Training(
            self.name,
            runs,
            self._law,
            lambda name: _weights(work / name / "lora.safetensors"),
            f"'current_step': {PART}",
            lambda name: work / name / "sample",
        )
        return training.result()

    def _run(self, host: Script, name: str, steps: int, more: list[str], **options: Any) -> Run:
        work = host.work
        arguments = [word.replace("WORK", str(work)) for word in self._arguments]
        arguments += ["--train_data_dir", str(work / "images"), "--caption_extension", ".txt"]
        arguments += ["--tokenizer_cache_dir", str(work / "tokenizers"), "--resolution", str(SIZE)]
        arguments += ["--output_dir", str(work / name), "--output_name", "lora", "--network_dim", "2"]
        arguments += ["--save_model_as", "safetensors", "--network_train_unet_only"]
        arguments += ["--cache_latents", "--cache_latents_to_disk", "--vae_batch_size", "8"]
        arguments += ["--train_batch_size", str(BATCH), "--max_train_steps", str(steps), "--seed", "1"]
        arguments += ["--learning_rate", "1e-3", "--optimizer_type", "AdamW", "--mixed_precision", "no"]
        arguments += ["--max_data_loader_n_workers", "0", *more]
        return host.run(name, self._script, arguments, **options)


def _weights(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.is_file() else {}


def _bin(t: Tensor) -> Tensor:
    return (t * 1000).long().clamp(max=999)


def _index(t: Tensor) -> Tensor:
    return t.long()


def _diffusion() -> NoiseSchedule:
    """The table of diffusers' scheduler, which is float32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    return NoiseSchedule.from_alphas_cumprod((1 - betas).cumprod(0))


def _flow() -> NoiseSchedule:
    return NoiseSchedule.rectified_flow(1000)


HOSTS = (
    Network(
        "flux_train_network.py",
        "flux",
        Law("speed", _flow, "flow", _bin),
        [
            *(
                "--pretrained_model_name_or_path",
                "WORK/flux/flux.safetensors",
                "--ae",
                "WORK/flux/ae.safetensors",
            ),
            *("--clip_l", "small", "--t5xxl", "small", "--t5xxl_max_token_length", "32", "--sdpa"),
            *("--network_module", "networks.lora_flux", "--guidance_scale", "1"),
        ],
        {
            "policy": ["--timestep_sampling", "uniform"],
            "uniform": ["--timestep_sampling", "shift", "--discrete_flow_shift", "3.1"],
        },
    ),
    Network(
        "train_network.py",
        "sd",
        Law("speedit", _diffusion, "epsilon", _index),
        ["--pretrained_model_name_or_path", "WORK/sd", "--network_module", "networks.lora"],
        {"policy": [], "uniform": []},
    ),
)
