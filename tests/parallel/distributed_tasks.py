"""Checks every task on two ranks: 20 steps, a resume bit for bit, samples; run by distributed_checks.py."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from distributed_runs import PLUGINS, everything, steps, weights
from PIL import Image
from safetensors.torch import load_file, save_file
from saved_models import save_pipeline
from torch.testing import assert_close

from speedit_plugins.trainer.accelerations.objective import Objective
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.data.videos.files import real_clip
from speedit_plugins.trainer.logging.tracking import SilentTracker
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.training.assembly import build_trainer

EMOJI, MOVING = "configs/text_to_image/emoji_pixart.yaml", "configs/text_to_video/moving_digits_latte.yaml"
DIGITS, CLIPS = "configs/image/digits/speedit.yaml", "configs/video/base.yaml"
GAUSSIAN = "diffusion.type=SpeeDiffusion"
NARROW = ("model.num_layers=2", "model.num_heads=2", "model.head_dim=16")
SMALL = ("model.hidden_size=32", "model.depth=2", "model.num_heads=2")
SOLIDS = (
    *("model.hidden_size=24", "model.depth=2", "model.num_heads=2"),
    *("voxel_size=8", "validate_every=0", "data.validation=null"),
)
MODERN = (
    *("model.norm=rms", "model.qk_norm=true", "model.rope=true", "model.perceptron=swiglu"),
    "model.gradient_checkpointing=true",
)


def check_text_to_image(runtime: Runtime, folder: Path) -> None:
    trained_resumed_and_sampled(runtime, folder, EMOJI, (*NARROW, GAUSSIAN))


def check_text_to_video(runtime: Runtime, folder: Path) -> None:
    trained_resumed_and_sampled(runtime, folder, MOVING, (*NARROW, GAUSSIAN))


def check_a_flow_of_text(runtime: Runtime, folder: Path) -> None:
    options = (*NARROW, "diffusion.base_density=logit_normal", "diffusion.shift=2")
    trained_resumed_and_sampled(runtime, folder, EMOJI, options)
    trained_resumed_and_sampled(runtime, folder / "bf16", EMOJI, (*options, "precision=bf16"))


def check_images_among_videos(runtime: Runtime, folder: Path) -> None:
    table = folder / "table.csv"
    if runtime.is_main:
        folder.mkdir(parents=True)
        Image.new("RGB", (16, 16), "red").save(folder / "red.png")
        rows = [f"{real_clip()},a rabbit", f"{folder / 'red.png'},red"] * 8
        table.write_text("\n".join(["path,text", *rows]))
    runtime.barrier()
    options = (
        "image_size=16",
        "num_frames=3",
        "model={path: null, in_channels: 3, input_size: 16, patch_size: 8, text_width: 384, text_length: 8}",
        *NARROW,
        "encoder=Pixels",
        "text_encoder={type: MiniLM, max_length: 8}",
        f"data.dataset={{type: VideoTable, table: {table}, buckets: [[3, 16, 16], [1, 16, 16]]}}",
        "data.num_workers=0",
        "sample_prompts=[a rabbit]",
        "precision=fp32",
    )
    # zero2 as in the other tasks, and ddp, because it waits for a gradient of every parameter. Images pass
    # the temporal blocks by, and fsdp2 gathers none of them then.
    for plugin in ("zero2", "ddp", "fsdp2"):
        place = folder / plugin
        trained_resumed_and_sampled(
            runtime, place, "configs/text_to_video/latte_16x256.yaml", (*options, f"plugin={plugin}")
        )


def check_stable_diffusion_with_adapters(runtime: Runtime, folder: Path) -> None:
    parts = folder / "parts"
    if runtime.is_main:
        save_pipeline(parts, "UNet")
    runtime.barrier()
    text = f"path: {parts}, subfolder: text_encoder, tokenizer_subfolder: tokenizer, max_length: 8"
    options = (
        "image_size=16",
        f"model={{type: UNet, path: {parts}, input_size: 8, text_width: 16, text_length: 8}}",
        "lora.rank=2",
        f"encoder={{type: AutoencoderKL, path: {parts}, subfolder: vae}}",
        f"text_encoder={{type: TextEncoder, {text}}}",
        "data.dataset={type: Emoji, image_size: 16}",
        "data.num_workers=0",
        "sample_prompts=[red heart]",
    )
    trained_resumed_and_sampled(runtime, folder, "configs/text_to_image/sd15.yaml", options)


def check_adapters_of_a_dit(runtime: Runtime, folder: Path) -> None:
    base = folder / "base.safetensors"
    if runtime.is_main:
        folder.mkdir(parents=True)
        options = ("max_training_steps=1", f"experiment_dir={folder}")
        model = build_trainer(load_config(DIGITS, "train", [*SMALL, *options])).model
        save_file(dict(model.state_dict()), base)
    runtime.barrier()
    options = (*SMALL, f"pretrained={base}", "lora.rank=2", "precision=bf16", "sample_classes=[3]")
    for plugin in ("ddp", "zero2", "fsdp2"):
        place = folder / plugin
        trained_resumed_and_sampled(runtime, place, DIGITS, (*options, f"plugin={plugin}"))
        found = load_file(place / "checkpoints" / "step_0000008" / "ema.safetensors")
        # ZeRO and fsdp2 train a cast model; adapters are saved as its float32 master weights.
        assert all(".lora_" in name and value.dtype == torch.float32 for name, value in found.items())


def check_videos_of_classes(runtime: Runtime, folder: Path) -> None:
    options = (
        "num_classes=10",
        "image_size=16",
        "num_frames=4",
        "model={type: Latte, patch_size: 4, input_size: 16, in_channels: 1}",
        *SMALL,
        "encoder={type: Pixels, channels: 1}",
        "data.dataset=MovingDigits",
        "data.num_workers=0",
        "sample_classes=[3]",
        "precision=fp32",
    )
    trained_resumed_and_sampled(runtime, folder, CLIPS, options)
    trained_resumed_and_sampled(runtime, folder / "modern", CLIPS, (*options, *MODERN))


def check_alignment(runtime: Runtime, folder: Path) -> None:
    repa = "{type: REPA, teacher: embedded, teacher_size: 32, layer: 1, until: 10, projector_width: 16}"
    for name, section in (("repa", repa), ("sra", "{type: SRA, layer: 1, decay: 0.9}")):
        for plugin, precision in (("ddp", "bf16"), ("zero1", "fp32"), ("zero2", "bf16"), ("fsdp2", "bf16")):
            options = (*SMALL, "sample_classes=[3]", f"plugin={plugin}", f"precision={precision}")
            more = ("optimizer.grad_accumulation=2", "model.gradient_checkpointing=true")
            place = folder / name / plugin
            trained_resumed_and_sampled(runtime, place, DIGITS, (*options, *more, f"alignment={section}"))


def check_modern_blocks(runtime: Runtime, folder: Path) -> None:
    flow = "diffusion={type: RectifiedFlow, prediction_type: x0, policy: uniform}"
    for plugin, precision in (("ddp", "fp32"), ("zero1", "fp32"), ("zero2", "bf16"), ("fsdp2", "bf16")):
        options = (*SMALL, "sample_classes=[3]", f"plugin={plugin}", f"precision={precision}")
        place = folder / plugin
        trained_resumed_and_sampled(runtime, place / "x0", DIGITS, (*options, *MODERN, flow))
        lightning = (
            "model.type=LightningDiT",
            "model.patch_size=2",
            "diffusion={type: RectifiedFlow, policy: uniform}",
        )
        trained_resumed_and_sampled(runtime, place / "lightning", DIGITS, (*options, *lightning))


def check_routes_noise_and_uncertainty(runtime: Runtime, folder: Path) -> None:
    added = ("routing={from: 1, to: -2, keep: 0.5}", "uncertainty=true", "contrastive.weight=0.05")
    for plugin, precision in (("ddp", "fp32"), ("zero1", "fp32"), ("zero2", "bf16"), ("fsdp2", "bf16")):
        own = ("model.depth=3", "model.gradient_checkpointing=true", "sample_classes=[3]")
        options = (*SMALL, *own, *added, "noise_assignment=class", f"plugin={plugin}")
        trained_resumed_and_sampled(runtime, folder / plugin, DIGITS, (*options, f"precision={precision}"))
    options = (*NARROW, "model.num_layers=3", *added, "noise_assignment=batch", "diffusion.policy=uniform")
    for name, config in (("images", EMOJI), ("videos", MOVING)):
        trained_resumed_and_sampled(runtime, folder / name, config, (*options, "plugin=ddp"))


def check_inpainting(runtime: Runtime, folder: Path) -> None:
    options = (*SMALL, "inpainting=RandomMasks")
    trained_resumed_and_sampled(runtime, folder, DIGITS, options, is_sampled=False)
    trained_resumed_and_sampled(runtime, folder / "modern", DIGITS, (*options, *MODERN), is_sampled=False)
    solids = (*SOLIDS, "inpainting=RandomMasks", "samples_per_class=2", "plugin=zero1")
    trained_resumed_and_sampled(runtime, folder / "solids", "configs/shapes/digits.yaml", solids)
    clips = (*SMALL, "inpainting=FrameMasks", "samples_per_class=2", "plugin=zero2")
    trained_resumed_and_sampled(runtime, folder / "clips", "configs/text_to_video/moving_digits.yaml", clips)


def check_super_resolution(runtime: Runtime, folder: Path) -> None:
    options = (*SMALL, "super_resolution.factor=2", "samples_per_class=2")
    for plugin, precision in (("ddp", "fp32"), ("zero1", "bf16"), ("zero2", "fp32"), ("fsdp2", "bf16")):
        own = (*options, f"plugin={plugin}", f"precision={precision}")
        trained_resumed_and_sampled(runtime, folder / plugin, DIGITS, own)
    clips = "configs/text_to_video/moving_digits.yaml"
    trained_resumed_and_sampled(runtime, folder / "clips", clips, (*options, "plugin=ddp"))


def check_shapes(runtime: Runtime, folder: Path) -> None:
    own = (*SOLIDS, "model.gradient_checkpointing=true", "sample_classes=[3]")
    clouds = ("num_points=40", "model.window_size=2", "model.window_blocks=[0]")
    for plugin, precision in (("ddp", "fp32"), ("zero1", "fp32"), ("zero2", "bf16"), ("fsdp2", "bf16")):
        options = (*own, f"plugin={plugin}", f"precision={precision}")
        place = folder / plugin
        trained_resumed_and_sampled(runtime, place / "voxels", "configs/shapes/digits.yaml", options)
        points = "configs/shapes/digits_points.yaml"
        trained_resumed_and_sampled(runtime, place / "points", points, (*options, *clouds))


def check_masked_training(runtime: Runtime, folder: Path) -> None:
    own = ("model.type=MDTv2", "model.decode_layer=2", "masking.type=MDT", "diffusion.type=RectifiedFlow")
    own = (*own, "model.patch_size=2", "model.depth=4", "model.hidden_size=32", "model.num_heads=2")
    few = (f"experiment_dir={folder / 'few'}", "data.batch_size=4")
    for plugin, precision in (("ddp", "bf16"), ("zero1", "fp32"), ("zero2", "bf16"), ("fsdp2", "bf16")):
        options = (*own, f"plugin={plugin}", f"precision={precision}", "sample_classes=[3]")
        place = folder / plugin
        trained_resumed_and_sampled(runtime, place, DIGITS, options)
        config = load_config(DIGITS, "train", [*options, f"experiment_dir={place}", "data.batch_size=4"])
        trainer = build_trainer(config, runtime)
        before, after = weights(trainer), weights(steps(trainer, 3))
        # A parameter without a gradient does not move.
        assert [name for name in before if torch.equal(before[name], after[name])] == []
    _check_gradients_of_two_passes(runtime, folder / "gradients", own)
    # All masks are drawn by rank, so that the plugins differ in the order of sums alone.
    found = [
        weights(
            steps(build_trainer(load_config(DIGITS, "train", [*own, *few, f"plugin={plugin}"]), runtime), 3)
        )
        for plugin in PLUGINS
    ]
    for other in found[1:]:
        assert_close(other, found[0], rtol=0, atol=1e-6)


def _check_gradients_of_two_passes(runtime: Runtime, folder: Path, options: Sequence[str]) -> None:
    """Two forward passes before a backward pass leave the mean of the ranks' own gradients."""
    config = load_config(DIGITS, "train", [*options, f"experiment_dir={folder}", "data.batch_size=4"])
    trainer = build_trainer(config, runtime)
    for parameter in trainer.model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    alone = copy.deepcopy(trainer.engine.module)
    generators = [torch.Generator().manual_seed(2 * runtime.rank + number) for number in range(2)]
    given = trainer.inputs.encode(next(trainer.loader), generators)
    draw = trainer.policy.draw(2, generator=torch.Generator().manual_seed(runtime.rank))
    whole = trainer.objective
    for objective in (whole, Objective(Alone(alone), whole.process, whole.accelerations)):
        torch.manual_seed(runtime.rank)
        objective.losses(given, draw).loss.mean().backward()
    for (name, ours), other in zip(trainer.model.named_parameters(), alone.named_parameters(), strict=True):
        dist.all_reduce(other[1].grad)
        assert_close(ours.grad, other[1].grad / 2, rtol=1e-5, atol=1e-6, msg=name)


@dataclass(frozen=True)
class Alone:
    """What an objective needs to call a model of this rank alone."""

    model: torch.nn.Module

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()


def trained_resumed_and_sampled(
    runtime: Runtime, folder: Path, config: str, options: Sequence[str], *, is_sampled: bool = True
) -> None:
    own = (
        f"experiment_dir={folder}",
        "data.batch_size=4",
        "max_training_steps=20",
        "sampler.num_steps=3",
        "optimizer.warmup_steps=2",
        f"sample_every={20 if is_sampled else 0}",
    )
    loaded = load_config(config, "train", ["plugin=zero2", *own, *options])
    whole = build_trainer(loaded, runtime)
    steps(whole, 20)
    if is_sampled:
        whole.measure(SilentTracker())
        if runtime.is_main:
            assert (folder / "grids" / "step_0000020.png").stat().st_size > 0
    first = build_trainer(loaded, runtime)
    steps(first, 8)
    path = first.save()
    resumed = build_trainer(loaded, runtime)
    resumed.restore(path)
    steps(resumed, 12)
    found, expected = everything(resumed), everything(whole)
    for batch in (found["next_batch"], expected["next_batch"]):
        batch.pop("caption", None)
    assert_close(found, expected, rtol=0, atol=0)
    assert all(torch.isfinite(value).all() for value in found["weights"].values())
