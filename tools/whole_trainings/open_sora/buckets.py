"""Open-Sora 1.1 to 1.3: scripts/train.py on buckets of images and videos, and scripts/inference.py.

The smallest bucket of the hosts has 192x192 pixels for a square.

Dims: B batch, F latent frames, H height, W width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.trainer.data.videos.files import write_mp4
from speedit_plugins.trainer.data.videos.moving_digits import MovingDigits
from whole_trainings import checks
from whole_trainings.checks import Check, Result
from whole_trainings.material import pixels, write_t5, write_table, write_vae
from whole_trainings.open_sora import results
from whole_trainings.open_sora.results import NUM_TIMESTEPS, checkpoint
from whole_trainings.runs import Run, Script

SIZE, SOURCE_SIZE = 192, 64
NUM_IMAGES, IMAGE_BATCH, NUM_VIDEOS, VIDEO_BATCH = 64, 8, 4, 2
STEPS_PER_EPOCH = NUM_IMAGES // IMAGE_BATCH + NUM_VIDEOS // VIDEO_BATCH
NUM_EPOCHS = 5
# In the middle of an epoch.
RESUMED_AT = 2 * STEPS_PER_EPOCH + 5
# pandarallel cannot be imported beside pandas 3.
NEEDS = ("pandas<3", "pytz", "pandarallel", "dill", "rotary_embedding_torch")
IMPORTS = ["speedit_plugins.hosts.open_sora", "whole_trainings.open_sora.small_models"]

CONFIG = """_base_ = [{base!r}]
custom_imports = dict(imports={imports}, allow_failed_imports=False)
scheduler = dict({scheduler})
model = dict(_delete_=True, {model})
vae = dict(_delete_=True, {vae})
text_encoder = dict(
    _delete_=True, type="t5", from_pretrained="DeepFloyd/t5-v1_1-xxl", model_max_length=16,
    local_files_only=True,
)
dtype = "bf16"
"""
TRAINING = """dataset = dict(data_path={data!r}, frame_interval=1)
bucket_config = {{"_delete_": True, "144p": {{1: (1.0, {images}), {frames}: (1.0, {videos})}}}}
num_workers, num_bucket_build_workers, accumulation_steps = 0, 1, 1
outputs, epochs, ckpt_every, plugin, log_every = {outputs!r}, {epochs}, {every}, "zero2", 1
"""
SAMPLING = """prompt_path, save_dir, batch_size = {prompts!r}, {outputs!r}, 2
num_frames, image_size, fps, frame_interval = {frames}, (64, 64), 8, 1
"""


@dataclass(frozen=True)
class OpenSora:
    """One version, on one and on two processes of zero2.

    Args:
        name, folder: of the host.
        training, sampling: its configs.
        model, vae: of our config.
        frames: of a video.
        ours, plain: types of the scheduler, with the plugin and without.
        policies: of the long run on one process, and of the run on two.
        shift: for a flow, of the host's draws, by F.
    """

    name: str
    folder: str
    training: str
    sampling: str
    model: str
    vae: str
    frames: int
    ours: str
    plain: str
    policies: tuple[str, str]
    shift: dict[int, float] | None = None

    def train(self, checkout: Path, work: Path) -> Result:
        """Runs the trainings and their checks."""
        factories = (("opensora.registry", "build_module"),)
        losses = () if self.shift is None else (("opensora.schedulers.rf.rectified_flow", "mean_flat"),)
        host = Script(
            checkout,
            work,
            # It gets t before ColossalAI casts it to bfloat16 for the model.
            "LowLevelZeroModel",
            factories,
            losses=losses,
            colossalai=True,
            needs=NEEDS,
        )
        write_material(work, self.frames)
        first, second = self.policies
        long = self._run(host, "long", first, NUM_EPOCHS, every=5)
        if long.exit_code:
            raise RuntimeError(f"scripts/train.py ended with {long.exit_code}: {long.last_words()}")
        replay = "uniform" if self.shift is None else ""
        runs = {
            "long": long,
            "uniform": self._run(host, "uniform", "uniform", 1, every=STEPS_PER_EPOCH),
            "plain": self._run(host, "plain", None, 1, every=STEPS_PER_EPOCH, replay=replay),
        }
        half = str(checkpoint(work, "long", RESUMED_AT))
        runs["resumed"] = self._run(
            host, "resumed", first, RESUMED_AT // STEPS_PER_EPOCH + 1, every=0, arguments=["--load", half]
        )
        last = str(checkpoint(work, "long", NUM_EPOCHS * STEPS_PER_EPOCH) / "ema.pt")
        for name, policy in (("sampled", first), ("sampled_plain", None)):
            options = {"num_sampling_steps": 4}
            config = self._write_config(host, name, self.sampling, SAMPLING, policy, options)
            runs[name] = host.run(name, "scripts/inference.py", [str(config), "--ckpt-path", last])
        runs["two"] = self._run(host, "two", second, 2, every=0, num_processes=2)
        return self._result(runs)

    def _run(
        self,
        host: Script,
        name: str,
        policy: str | None,
        epochs: int,
        *,
        every: int,
        arguments: list[str] | None = None,
        **options: Any,
    ) -> Run:
        more = {"epochs": epochs, "every": every}
        config = self._write_config(host, name, self.training, TRAINING, policy, {}, **more)
        return host.run(name, "scripts/train.py", [str(config), *(arguments or [])], **options)

    def _write_config(
        self,
        host: Script,
        name: str,
        base: str,
        rest: str,
        policy: str | None,
        options: dict[str, Any],
        **more: Any,
    ) -> Path:
        work = host.work
        chosen = {"type": self.plain} if policy is None else {"type": self.ours, "policy": policy}
        text = (CONFIG + rest).format(
            base=str(host.checkout / "configs" / base),
            imports=IMPORTS,
            scheduler=", ".join(f"{key}={value!r}" for key, value in {**chosen, **options}.items()),
            model=self.model,
            vae=f"{self.vae}, from_pretrained={str(work / 'vae')!r}",
            data=str(work / "data.csv"),
            images=IMAGE_BATCH,
            videos=VIDEO_BATCH,
            frames=self.frames,
            outputs=str(work / name),
            prompts=str(work / "prompts.txt"),
            **more,
        )
        path = work / f"{name}_config.py"
        path.write_text(text, encoding="utf-8")
        return path

    def _result(self, runs: dict[str, Run]) -> Result:
        result = Result(self.name, seconds=sum(run.seconds for run in runs.values()))
        result.stand_ins = runs["long"].records[0].stand_ins
        result.stand_ins.append("by config: no flash-attn, apex or shardformer")
        result.commands = [f"{run.script} {' '.join(run.arguments)}" for run in runs.values()]
        bad = [f"{name} {run.exit_code}: {run.last_words()}" for name, run in runs.items() if run.exit_code]
        result.checks["exit"] = Check(not bad, "; ".join(bad) or f"0 in {len(runs)} runs")
        result.checks["law"] = self._law(runs)
        result.checks["loss"] = self._loss(runs)
        result.checks["uniform"] = results.equal_runs(runs["uniform"], runs["plain"], STEPS_PER_EPOCH)
        result.checks["sampling"] = checks.same_samples(
            runs["sampled"].records[0], runs["sampled_plain"].records[0]
        )
        result.checks["resume"] = results.resumed(runs["long"], runs["resumed"], RESUMED_AT, STEPS_PER_EPOCH)
        return result

    def _law(self, runs: dict[str, Run]) -> Check:
        first, second = self.policies
        long = checks.law(checks.tenths(first, self.schedule), self._times(runs["long"]))
        if self.shift is None:
            two = checks.law(checks.tenths(second, self.schedule), self._times(runs["two"]))
        else:
            two = results.thinned_law(runs["two"].records, k=5.0, shift=self.shift)
        differ = not results.alike(runs["two"].records)
        words = f"{first}: {long.words}; {second} on two ranks: {two.words}; their draws differ: {differ}"
        return Check(bool(long.holds and two.holds and differ), words)

    def _loss(self, runs: dict[str, Run]) -> Check:
        first, second = (build_policy(policy, self.schedule).weight for policy in self.policies)
        found = [
            checks.loss(first, [runs[name].records[0] for name in ("long", "resumed")], self._index),
            checks.loss(second, runs["two"].records, self._index),
        ]
        words = "; ".join(f"{name}: {one.words}" for name, one in zip(self.policies, found, strict=True))
        return Check(all(one.holds for one in found), words)

    @property
    def schedule(self) -> NoiseSchedule:
        """Of the policy."""
        if self.shift is None:
            return results.hosts_schedule()
        return NoiseSchedule.rectified_flow(NUM_TIMESTEPS)

    def _index(self, t: Tensor) -> Tensor:
        return t.long() if self.shift is None else (t / NUM_TIMESTEPS * NUM_TIMESTEPS).long()

    def _times(self, run: Run) -> list[Tensor]:
        offset = 0.5 if self.shift is None else 0.0
        return [(t + offset) / NUM_TIMESTEPS for record in run.records for t in record.t]


def write_material(work: Path, frames: int) -> None:
    """Writes images and videos of moving digits in the size of the bucket, their table, a VAE and a T5."""
    write_data(work, frames, SIZE)
    write_vae(work / "vae", (2, 2, 2, 4))
    # The hosts' T5Embedder knows no other name, and looks for it below the folder that they run in.
    write_t5(work / "DeepFloyd" / "t5-v1_1-xxl")


def write_data(work: Path, frames: int, size: int) -> None:
    """Writes data.csv, prompts.txt, and the images and videos (H = W = `size`) of the table."""
    source = min(size, SOURCE_SIZE)
    # The hosts cut a video out of a longer one.
    digits, generator = MovingDigits(image_size=source, num_frames=frames + 4), torch.Generator()
    generator.manual_seed(0)
    (work / "data").mkdir(parents=True, exist_ok=True)
    rows: list[list[Any]] = [["path", "text", "num_frames", "height", "width", "fps"]]
    for index in range(NUM_IMAGES + NUM_VIDEOS):
        sample = digits.load(index, generator)
        video = pixels(sample["video"])
        video = video.repeat_interleave(size // source, 1).repeat_interleave(size // source, 2)
        is_image = index < NUM_IMAGES
        path = work / "data" / f"{index:04d}.{'png' if is_image else 'mp4'}"
        if is_image:
            Image.fromarray(video[0, :, :, 0].numpy()).save(path)
        else:
            write_mp4(path, video, fps=8)
        rows.append([str(path), sample["caption"], 1 if is_image else len(video), size, size, 8])
    write_table(work / "data.csv", rows)
    (work / "prompts.txt").write_text("\n".join(row[1] for row in rows[1:3]), encoding="utf-8")


# sqrt(H W / 512^2), and for videos times sqrt(F), by the hosts' timestep_transform.
_SPACE = SIZE / 512
HOSTS = (
    OpenSora(
        name="Open-Sora 1.1.0",
        folder="hpcaitech+Open-Sora@v1.1.0",
        training="opensora-v1-1/train/stage1.py",
        sampling="opensora-v1-1/inference/sample.py",
        model='type="STDiT2-small", input_sq_size=512, qk_norm=True',
        vae='type="VideoAutoencoderKL", micro_batch_size=4',
        frames=4,
        ours="SpeeDiffusion",
        plain="iddpm",
        policies=("speedit", "speedit"),
    ),
    OpenSora(
        name="Open-Sora 1.2.0",
        folder="hpcaitech+Open-Sora@v1.2.0",
        training="opensora-v1-2/train/stage1.py",
        sampling="opensora-v1-2/inference/sample.py",
        model='type="STDiT3-small", qk_norm=True, freeze_y_embedder=True',
        vae='type="OpenSoraVAE_V1_2-small"',
        frames=17,
        ours="SpeeDFlow",
        plain="rflow",
        policies=("auto", "speed"),
        shift={1: _SPACE, 5: _SPACE * 5**0.5},
    ),
    OpenSora(
        name="Open-Sora 1.3",
        folder="hpcaitech+Open-Sora@v1.3",
        training="opensora-v1-3/train/stage1.py",
        sampling="opensora-v1-3/inference/t2v.py",
        model='type="STDiT3-small", qk_norm=True, kernel_size=(3, 3, -1), use_spatial_rope=True',
        # The VAE of 1.3 has groups of 32 channels, which a CPU cannot encode in the time of a test.
        vae='type="VideoAutoencoderKL_V1_3", micro_batch_size=4',
        frames=9,
        ours="SpeeDFlow",
        plain="rflow",
        policies=("auto", "speed"),
        # The host counts (9 - 1) // 4 latent frames; this VAE keeps all 9.
        shift={1: _SPACE, 9: _SPACE * 2**0.5},
    ),
)
