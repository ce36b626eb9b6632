"""Open-Sora's scripts/train.py and scripts/inference.py under ColossalAI, with the policy by its config."""

from pathlib import Path
from typing import Any

from torch import Tensor

from speedit_plugins import NoiseSchedule, build_policy
from whole_trainings import checks
from whole_trainings.checks import Check, Result
from whole_trainings.material import write_t5, write_table, write_vae, write_videos
from whole_trainings.open_sora import results
from whole_trainings.open_sora.results import checkpoint
from whole_trainings.runs import Run, Script

SIZE, NUM_FRAMES, BATCH, STEPS_PER_EPOCH, NUM_EPOCHS = 32, 4, 8, 20, 10
POLICY = "speedit"
SCHEDULE = NoiseSchedule.linear
# The draws of the host's own scheduler, and those of ours with a policy.
PLAIN = 'dict(_delete_=True, type="iddpm", timestep_respacing="")'
OURS = 'dict(_delete_=True, type="SpeeDiffusion", policy=dict(type="{}"), timestep_respacing="")'
IMPORTS = ["speedit_plugins.hosts.open_sora", "whole_trainings.open_sora.registered_models"]

CONFIG = """_base_ = [{base!r}]
custom_imports = dict(imports={imports}, allow_failed_imports=False)
scheduler = {scheduler}
num_frames, frame_interval, image_size = {frames}, 1, ({size}, {size})
model = dict(
    _delete_=True, type="STDiT-small", space_scale=0.5, time_scale=1.0, from_pretrained=None,
    enable_flashattn=False, enable_layernorm_kernel=False,{sequence}
)
vae = dict(_delete_=True, type="VideoAutoencoderKL", from_pretrained={vae!r})
text_encoder = dict(_delete_=True, type="t5", from_pretrained={t5!r}, model_max_length=16)
dtype = "bf16"
batch_size = {batch}
"""
TRAINING = """data_path, outputs = {data!r}, {outputs!r}
num_workers = 0
epochs, ckpt_every, plugin, sp_size = {epochs}, {every}, {plugin!r}, {sp_size}
"""
SAMPLING = """prompt_path, save_dir = {prompts!r}, {outputs!r}
"""


class OpenSora10:
    """Open-Sora 1.0.0: iddpm in the config's registry, STDiT, zero2 on one and two processes, zero2-seq."""

    name = "Open-Sora 1.0.0"
    folder = "hpcaitech+Open-Sora@v1.0.0"

    def train(self, checkout: Path, work: Path) -> Result:
        """Runs the trainings and their checks."""
        host = Script(checkout, work, "STDiT", (("opensora.registry", "build_module"),), colossalai=True)
        self._write_material(work)
        epoch = STEPS_PER_EPOCH
        runs = {
            "long": self._run(host, "long", NUM_EPOCHS, OURS.format(POLICY), every=epoch * NUM_EPOCHS // 2),
            "uniform": self._run(host, "uniform", 1, OURS.format("uniform"), every=epoch),
            "plain": self._run(host, "plain", 1, PLAIN, every=epoch, replay="uniform"),
        }
        half = checkpoint(work, "long", NUM_EPOCHS // 2 * epoch)
        runs["resumed"] = self._run(
            host,
            "resumed",
            NUM_EPOCHS // 2 + 1,
            OURS.format(POLICY),
            every=0,
            arguments=["--load", str(half)],
        )
        last = str(checkpoint(work, "long", NUM_EPOCHS * epoch) / "ema.pt")
        for name, scheduler in (("sampled", "SpeeDiffusion"), ("sampled_plain", "iddpm")):
            scheduler = f'dict(_delete_=True, type="{scheduler}", num_sampling_steps=10, cfg_scale=7.0)'
            config = self._write_config(host, name, scheduler, "inference/16x256x256.py", SAMPLING)
            runs[name] = host.run(name, "scripts/inference.py", [str(config), "--ckpt-path", last])
        ours = OURS.format(POLICY)
        runs["two"] = self._run(host, "two", 2, ours, every=0, num_processes=2)
        sequence = {"plugin": "zero2-seq", "sp_size": 2, "asserts": False}
        runs["sequence"] = self._run(host, "sequence", 1, ours, every=0, num_processes=2, **sequence)
        return self._result(runs)

    def _write_material(self, work: Path) -> None:
        count = BATCH * STEPS_PER_EPOCH
        written = write_videos(work / "videos", count, size=SIZE, num_frames=2 * NUM_FRAMES)
        write_table(work / "videos.csv", [[str(path), caption] for path, caption in written])
        (work / "prompts.txt").write_text("\n".join(caption for _, caption in written[:2]), encoding="utf-8")
        write_vae(work / "vae")
        # Where the host's T5Embedder looks below `from_pretrained`.
        write_t5(work / "t5" / "t5-v1_1-xxl")

    def _run(
        self,
        host: Script,
        name: str,
        epochs: int,
        scheduler: str,
        *,
        every: int,
        arguments: list[str] | None = None,
        **options: Any,
    ) -> Run:
        ours = {key: options.pop(key, default) for key, default in (("plugin", "zero2"), ("sp_size", 1))}
        more = {"epochs": epochs, "every": every, **ours}
        config = self._write_config(host, name, scheduler, "train/16x256x256.py", TRAINING, **more)
        return host.run(name, "scripts/train.py", [str(config), *(arguments or [])], **options)

    def _write_config(
        self, host: Script, name: str, scheduler: str, base: str, rest: str, **more: Any
    ) -> Path:
        work = host.work
        text = (CONFIG + rest).format(
            base=str(host.checkout / "configs" / "opensora" / base),
            imports=IMPORTS,
            scheduler=scheduler,
            frames=NUM_FRAMES,
            size=SIZE,
            batch=BATCH if rest is TRAINING else 2,
            sequence=" enable_sequence_parallelism=True," if more.get("sp_size", 1) > 1 else "",
            vae=str(work / "vae"),
            t5=str(work / "t5"),
            data=str(work / "videos.csv"),
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
        result.stand_ins.append(
            "for zero2-seq alone: python -O, since the host asserts input_.device.type == 'cuda'"
        )
        result.stand_ins.append("by config: no flash-attn, apex or shardformer; bf16 for sampling")
        result.commands = [f"{run.script} {' '.join(run.arguments)}" for run in runs.values()]
        bad = [f"{name} {run.exit_code}: {run.last_words()}" for name, run in runs.items() if run.exit_code]
        result.checks["exit"] = Check(not bad, "; ".join(bad) or f"0 in {len(runs)} runs")
        weight = build_policy(POLICY, SCHEDULE()).weight
        ours = [runs[name].records for name in ("long", "two", "sequence", "resumed")]
        result.checks["law"] = _law(runs)
        result.checks["loss"] = checks.loss(
            weight, [record for records in ours for record in records], _index
        )
        result.checks["uniform"] = results.equal_runs(runs["uniform"], runs["plain"], STEPS_PER_EPOCH)
        result.checks["sampling"] = checks.same_samples(
            runs["sampled"].records[0], runs["sampled_plain"].records[0]
        )
        result.checks["resume"] = results.resumed(
            runs["long"], runs["resumed"], NUM_EPOCHS // 2 * STEPS_PER_EPOCH, STEPS_PER_EPOCH
        )
        return result


def _law(runs: dict[str, Run]) -> Check:
    """The law over all draws, and whether ranks differ under zero2 and agree under zero2-seq."""
    shares = checks.tenths(POLICY, SCHEDULE())
    found = checks.law(shares, [_time(t) for t in runs["long"].records[0].t])
    two = checks.law(shares, [_time(t) for record in runs["two"].records for t in record.t])
    differ = not results.alike(runs["two"].records)
    alike = results.alike(runs["sequence"].records)
    words = f"{found.words}; two ranks of zero2: {two.words}, they differ: {differ}"
    words += f"; two ranks of zero2-seq draw alike: {alike}"
    return Check(bool(found.holds and two.holds and differ and alike), words)


def _index(t: Tensor) -> Tensor:
    return t.long()


def _time(t: Tensor) -> Tensor:
    return (t + 0.5) / 1000


HOSTS = (OpenSora10(),)
