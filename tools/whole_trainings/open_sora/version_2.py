"""Open-Sora 2.0: scripts/diffusion/train.py with the documented patch, in a copy of the checkout."""

import shutil
import subprocess
from pathlib import Path

from speedit_plugins import NoiseSchedule
from whole_trainings import checks
from whole_trainings.checks import Check, Result
from whole_trainings.material import TEXT_WIDTH, write_clip, write_t5
from whole_trainings.open_sora import buckets, results
from whole_trainings.open_sora.results import checkpoint
from whole_trainings.runs import ROOT, Run, Script

PATCH = ROOT / "integrations" / "open_sora" / "open_sora_2.patch"
# In the patch.
POLICY = "auto"
SIZE, FRAMES, NUM_EPOCHS = 32, 5, 10
STEPS_PER_EPOCH = buckets.STEPS_PER_EPOCH
RESUMED_AT = 45
UNUSED = (
    "flash_attn.flash_attn_interface",
    "tensornvme",
    "tensornvme.async_file_io",
    "openai",
    "liger_kernel",
    "liger_kernel.ops",
)

CONFIG = """_base_ = [{base!r}]
dataset = dict(data_path={data!r})
bucket_config = {{"_delete_": True, "32px": {{1: (1.0, {images}), {frames}: (1.0, {videos})}}}}
model = dict(
    in_channels=16, vec_in_dim={width}, context_in_dim={width}, hidden_size=32, num_heads=2, depth=1,
    depth_single_blocks=1, axes_dim=[4, 6, 6], use_liger_rope=False,
)
ae = dict(
    from_pretrained=None, latent_channels=4, layers_per_block=1, norm_num_groups=2,
    block_out_channels=(4, 4, 4, 4),
)
t5 = dict(_delete_=True, type="text_embedder", from_pretrained="google/t5-v1_1-xxl", max_length=16)
clip = dict(
    _delete_=True, type="text_embedder", from_pretrained="openai/clip-vit-large-patch14", max_length=16
)
num_workers, prefetch_factor, num_bucket_build_workers, pin_memory_cache_pre_alloc_numels = 0, None, 1, None
save_master_weights = load_master_weights = False
outputs, epochs, ckpt_every, log_every = {outputs!r}, {epochs}, {every}, 1
"""


class OpenSora2:
    """The patched script on one process of zero2."""

    name = "Open-Sora 2.0"
    folder = "hpcaitech+Open-Sora"

    def train(self, checkout: Path, work: Path) -> Result:
        """Runs the trainings and their checks."""
        host = Script(
            patched(checkout, work / "checkout"),
            work,
            "MMDiTModel",
            (),
            embeddings=(("opensora.models.mmdit.model", "timestep_embedding"),),
            colossalai=True,
            unused=UNUSED,
            needs=buckets.NEEDS,
        )
        buckets.write_data(work, FRAMES, SIZE)
        write_t5(work / "google" / "t5-v1_1-xxl", unigram=True)
        write_clip(work / "openai" / "clip-vit-large-patch14")
        runs = {"long": self._run(host, "long", NUM_EPOCHS, every=5)}
        if runs["long"].exit_code:
            raise RuntimeError(f"scripts/diffusion/train.py: {runs['long'].last_words()}")
        half = str(checkpoint(work, "long", RESUMED_AT))
        runs["resumed"] = self._run(host, "resumed", 5, every=0, arguments=["--load", half])
        return self._result(runs)

    def _run(
        self, host: Script, name: str, epochs: int, *, every: int, arguments: list[str] | None = None
    ) -> Run:
        text = CONFIG.format(
            base=str(host.checkout / "configs" / "diffusion" / "train" / "image.py"),
            data=str(host.work / "data.csv"),
            images=buckets.IMAGE_BATCH,
            videos=buckets.VIDEO_BATCH,
            frames=FRAMES,
            width=TEXT_WIDTH,
            outputs=str(host.work / name),
            epochs=epochs,
            every=every,
        )
        path = host.work / f"{name}_config.py"
        path.write_text(text, encoding="utf-8")
        return host.run(name, "scripts/diffusion/train.py", [str(path), *(arguments or [])])

    def _result(self, runs: dict[str, Run]) -> Result:
        result = Result(self.name, seconds=sum(run.seconds for run in runs.values()))
        long, resumed = runs["long"], runs["resumed"]
        result.stand_ins = [*long.records[0].stand_ins, "torch.compile (the function itself)"]
        result.stand_ins.append("by config: no shardformer, liger rope, pinned memory or master weights")
        result.commands = [f"{run.script} {' '.join(run.arguments)}" for run in runs.values()]
        bad = [f"{name} {run.exit_code}: {run.last_words()}" for name, run in runs.items() if run.exit_code]
        result.checks["exit"] = Check(not bad, "; ".join(bad) or f"0 in {len(runs)} runs")
        shares = checks.tenths(POLICY, NoiseSchedule.rectified_flow(1000))
        result.checks["law"] = checks.law(shares, [t.float() for t in long.records[0].t])
        result.checks["loss"] = Check(None, "the script takes the mean of a batch, and the patch no weights")
        result.checks["uniform"] = Check(None, "the patch replaces the host's law, whatever the policy")
        result.checks["sampling"] = Check(None, "the patch leaves the other scripts as they are")
        result.checks["resume"] = results.resumed(long, resumed, RESUMED_AT, STEPS_PER_EPOCH)
        return result


def patched(checkout: Path, copy: Path) -> Path:
    """A copy of the checkout with the patch."""
    if not copy.is_dir():
        shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "assets"))
        subprocess.run(["git", "apply", str(PATCH)], cwd=copy, check=True)
    return copy


HOSTS = (OpenSora2(),)
