"""Latte's train.py and train_with_img.py, through the launcher."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from speedit_plugins import NoiseSchedule, build_policy
from whole_trainings import checks
from whole_trainings.checks import Check, Result
from whole_trainings.material import write_vae, write_videos
from whole_trainings.runs import Run, Script

# The smallest size for patches of 8 and latents of an eighth.
SIZE, NUM_FRAMES, BATCH, STEPS_PER_EPOCH = 64, 2, 32, 5
NUM_EPOCHS = 8
SCHEDULE = NoiseSchedule.linear
POLICY = "speedit"


class Latte:
    """Trains Latte-S/8 on moving digits, with a random VAE.

    Args:
        script: train.py or train_with_img.py.
        config: the published one; sizes, paths and the number of steps are ours, and it reads data in the
            process itself.
        model: of `config`, small.
        vae: the folder that the script reads its VAE from.
    """

    folder = "Vchitect+Latte"

    def __init__(self, script: str, config: str, model: str, vae: str) -> None:
        self.name = f"Latte {script}"
        self._script, self._config, self._model, self._vae = script, config, model, vae

    def train(self, checkout: Path, work: Path) -> Result:
        """Runs the trainings and their checks."""
        host = Script(
            checkout, work, "Latte", (("diffusion", "create_diffusion"),), unused=("models.latte_t2v",)
        )
        write_vae(work / "pretrained" / self._vae)
        # sample.py reads this one.
        write_vae(work / "pretrained" / "vae")
        self._write_data(work)
        long, epoch = NUM_EPOCHS * STEPS_PER_EPOCH, STEPS_PER_EPOCH
        state = ["--policy", POLICY, "--state", str(work / "state.pt")]
        runs = {
            "long": self._run(host, "long", long, launch=["--policy", POLICY]),
            "uniform": self._run(host, "uniform", epoch, launch=["--policy", "uniform"]),
            "plain": self._run(host, "plain", epoch, replay="uniform"),
            "first": self._run(host, "first", epoch, launch=state),
            "second": self._run(host, "second", epoch, resumed="first", launch=state),
        }
        checkpoint = _checkpoint(work, "long", long)
        config = self._write_config(host, "sampling", 0, {})
        arguments = [
            "--config",
            str(config),
            "--ckpt",
            str(checkpoint),
            "--save_video_path",
            str(work / "video"),
        ]
        sampling = {"script": "sample/sample.py", "arguments": arguments}
        runs["sampled"] = host.run("sampled", **sampling, launch=["--policy", POLICY])
        runs["sampled_plain"] = host.run("sampled_plain", **sampling)
        return self._result(runs, work)

    def _run(self, host: Script, name: str, steps: int, resumed: str = "", **options: Any) -> Run:
        changes = {"max_train_steps": steps, "ckpt_every": steps, "results_dir": str(host.work / name)}
        if resumed:
            changes["pretrained"] = str(_checkpoint(host.work, resumed, steps))
        config = self._write_config(host, name, steps, changes)
        return host.run(name, self._script, ["--config", str(config)], **options)

    def _write_config(self, host: Script, name: str, steps: int, changes: dict[str, Any]) -> Path:
        config = OmegaConf.load(host.checkout / self._config)
        ours = {
            "data_path": str(host.work / "videos"),
            "pretrained_model_path": str(host.work / "pretrained"),
            "model": self._model,
            "num_frames": NUM_FRAMES,
            "frame_interval": 1,
            "image_size": SIZE,
            "local_batch_size": BATCH,
            "num_workers": 0,
            "log_every": STEPS_PER_EPOCH,
        }
        if "frame_data_path" in config:
            ours.update(frame_data_path=str(host.work / "images"), use_image_num=2)
            ours["frame_data_txt"] = str(host.work / "images.txt")
        if not steps:
            # What the published sampling configs have and the training configs lack.
            ours.update(num_sampling_steps=10, sample_method="ddpm", cfg_scale=1.0, use_fp16=False)
            ours["model"] = self._model
        path = host.work / f"{name}.yaml"
        OmegaConf.save(OmegaConf.merge(config, ours, changes), path)
        return path

    def _write_data(self, work: Path) -> None:
        count = BATCH * STEPS_PER_EPOCH
        written = write_videos(work / "videos", count, size=SIZE, num_frames=2 * NUM_FRAMES)
        (work / "images").mkdir(exist_ok=True)
        names = [f"{path.stem}.png" for path, _ in written]
        for name in names:
            Image.new("RGB", (SIZE, SIZE), (len(name), 60, 200)).save(work / "images" / name)
        (work / "images.txt").write_text("\n".join(names), encoding="utf-8")

    def _result(self, runs: dict[str, Run], work: Path) -> Result:
        result = Result(self.name, seconds=sum(run.seconds for run in runs.values()))
        result.stand_ins = runs["long"].records[0].stand_ins
        result.commands = [f"{run.script} {' '.join(run.arguments)}" for run in runs.values()]
        record, weight = runs["long"].records[0], build_policy(POLICY, SCHEDULE()).weight
        # The launcher leaves with 2 if nothing trained, and sample.py trains nothing.
        wanted = {name: 2 if name == "sampled" else 0 for name in runs}
        bad = [
            f"{name} {run.exit_code}: {run.last_words()}"
            for name, run in runs.items()
            if run.exit_code != wanted[name]
        ]
        words = f"0 in {len(runs) - 1} runs; sample.py under the launcher 2, since it trains nothing"
        result.checks["exit"] = Check(not bad, "; ".join(bad) or words)
        result.checks["law"] = checks.law(checks.tenths(POLICY, SCHEDULE()), [_time(t) for t in record.t])
        result.checks["loss"] = checks.loss(weight, [record], _index)
        uniform = checks.same_steps(runs["uniform"].records[0], runs["plain"].records[0])
        if uniform.holds:
            pair = [_weights(_checkpoint(work, name, STEPS_PER_EPOCH)) for name in ("uniform", "plain")]
            uniform = Check(
                checks.same_tensors(*pair),
                f"{uniform.words}; equal checkpoints: {checks.same_tensors(*pair)}",
            )
        result.checks["uniform"] = uniform
        result.checks["sampling"] = checks.same_samples(
            runs["sampled"].records[0], runs["sampled_plain"].records[0]
        )
        result.checks["resume"] = _resumed(runs)
        return result


def _resumed(runs: dict[str, Run]) -> Check:
    """Whether a training in two parts draws what one in a single part draws."""
    parts = [*runs["first"].records[0].t, *runs["second"].records[0].t]
    whole = runs["long"].records[0].t[: len(parts)]
    equal = len(parts) == 2 * STEPS_PER_EPOCH and all(map(torch.equal, parts, whole))
    took_over = runs["second"].said("Successfully load")
    words = f"`pretrained:` and --state: {len(parts)} draws of two parts "
    words += "are those of one run" if equal else "are not those of one run"
    return Check(equal and took_over, words if took_over else f"{words}; the weights were not loaded")


def _checkpoint(work: Path, name: str, steps: int) -> Path:
    found = sorted((work / name).glob(f"*/checkpoints/{steps:07d}.pt"))
    return found[-1] if found else work / name / "no checkpoint"


def _weights(path: Path) -> dict[str, Tensor]:
    saved = torch.load(path, weights_only=True) if path.is_file() else {}
    return {f"{part}.{name}": each for part in saved for name, each in saved[part].items()}


def _index(t: Tensor) -> Tensor:
    return t.long()


def _time(t: Tensor) -> Tensor:
    return (t + 0.5) / 1000


HOSTS = (
    Latte("train.py", "configs/ffs/ffs_train.yaml", "Latte-S/8", "vae"),
    Latte("train_with_img.py", "configs/ffs/ffs_img_train.yaml", "LatteIMG-S/8", "sd-vae-ft-mse"),
)
