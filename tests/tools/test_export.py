"""Samples of diffusers' pipelines from an exported folder, against the trainer's own sampler."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported_runs import (
    DIGITS,
    DIT,
    EMOJI,
    LATTE,
    PIXART,
    SD15,
    STEPS,
    dit_options,
    exported,
    text_options,
    trained,
)
from runs import file_size_limit
from saved_models import save_text_encoder
from torch.testing import assert_close

from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.data.loader import IMAGE_STREAM, stream_seed
from speedit_plugins.trainer.diffusion.gaussian_process import gaussian_process
from speedit_plugins.trainer.logging import images
from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.lora import adapted_layers, add_adapters
from speedit_plugins.trainer.models.pretrained.exported import export_model, save_scheduler
from speedit_plugins.trainer.models.text_conditioned.unet import UNet
from speedit_plugins.trainer.sampling.conditions import grid_conditions
from speedit_plugins.trainer.sampling.generator import load_generator

SEED = stream_seed(0, IMAGE_STREAM, 0)


def drawn(config: str, arguments: list[str]) -> Any:
    """The images that `sample` draws for the first class or prompt, uint8."""
    name = "ddim_leading_1" if "sd15" in config else "ddim_leading"
    sampler = [f"sampler.type={name}", f"sampler.num_steps={STEPS}"]
    loaded = load_config(config, "sample", [*arguments, *sampler])
    generator, captions, _ = load_generator(loaded)
    conditions = grid_conditions(loaded, captions)
    return images.to_uint8(generator.draw(conditions.of(torch.tensor([0]), torch.device("cpu")), 1))[0]


def agree(one: Any, other: Any) -> bool:
    # Both round to 8 bits. Their sums have different orders.
    return np.abs(one.astype(int) - other.astype(int)).max() <= 1


# Large enough for class and guidance to show in 8 bits.
DIT_SPREAD = 0.2


def drawn_by_dit_pipeline(folder: Path) -> Any:
    """An image of class 2, as grey levels, float (H, W, C)."""
    from diffusers import DiTPipeline

    found = DiTPipeline.from_pretrained(folder)(
        class_labels=[2],
        guidance_scale=2.0,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
    ).images[0]
    return (found * 255).round()


def test_a_dit_pipeline_draws_what_the_sampler_draws(tmp_path: Path) -> None:
    arguments = trained(tmp_path / "run", DIT, *dit_options(tmp_path), spread=DIT_SPREAD)
    said = exported(DIT, arguments, tmp_path / "out")
    assert "DiTPipeline" in said
    assert f"fitted to num_inference_steps={STEPS}." in said
    found = drawn_by_dit_pipeline(tmp_path / "out")
    assert agree(found, drawn(DIT, arguments))
    # The images must react to each setting, or their agreement would prove nothing.
    for change in ("guidance_scale=1.0", "sampler.guidance_channels=3", "sample_classes=[5]"):
        assert not agree(found, drawn(DIT, [*arguments, change])), change
    card = (tmp_path / "out" / "README.md").read_text()
    assert "timestep policy `speedit`" in card
    assert f'torch.Generator("cpu").manual_seed({SEED})' in card
    assert f"num_inference_steps={STEPS} and guidance_scale=2\n" in card
    assert (
        "sampler.type=ddim_leading sampler.eta=0 sampler.guidance_channels=null precision=fp32 device" in card
    )


def test_a_layer_that_fits_too_many_steps_is_told_with_the_number_that_fits() -> None:
    model = DiT(4, 2, hidden_size=32, depth=1, num_heads=2, num_classes=10)
    few, many = (export_model(model, num_steps=steps, num_timesteps=1000).notes for steps in (50, 100))
    # The message names a number that gives an exact fit.
    assert few == ("The timestep layer is fitted to num_inference_steps=50.",)
    assert many[0].endswith("images differ. The fit is exact for up to about 50 steps: sampler.num_steps=50")


def test_the_timestep_layer_is_fitted_to_the_processes_own_steps(tmp_path: Path) -> None:
    options = [*dit_options(tmp_path), "diffusion.diffusion_steps=100"]
    arguments = trained(tmp_path / "run", DIT, *options, spread=DIT_SPREAD)
    exported(DIT, arguments, tmp_path / "out")
    assert agree(drawn_by_dit_pipeline(tmp_path / "out"), drawn(DIT, arguments))


def test_merged_adapters_leave_the_prediction_as_it_is() -> None:
    model = UNet(
        input_size=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        text_width=16,
        text_length=8,
    ).eval()
    add_adapters(model, rank=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x, tokens = (torch.randn(2, *shape, generator=generator) for shape in ((4, 4, 4), (8, 16)))
    given = x, torch.tensor([3, 500]), {"tokens": tokens, "mask": torch.ones(2, 8, dtype=torch.bool)}
    adapted = model(*given)
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    assert not torch.allclose(model(*given), adapted, atol=1e-2)
    for layer in layers:
        layer.enable_adapters(True)
    net = export_model(model, num_steps=STEPS, num_timesteps=1000).net
    assert not any("lora" in name or "base_layer" in name for name in net.state_dict())
    # W x + B (A x) against (W + B A) x in float32, summed in another order.
    assert_close(model(*given), adapted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "text", "changes"),
    [
        ("PixArt", "t5", ()),
        # The pipeline was written for T5, but takes any text encoder of transformers.
        ("PixArt", "bert", ()),
        ("UNet", "clip", ()),
        # The pipeline's own weights include the adapters.
        ("UNet", "clip", ("lora.rank=2",)),
    ],
    ids=["PixArt", "PixArt with BERT", "UNet", "adapters"],
)
def test_a_text_to_image_pipeline_draws_what_the_sampler_draws(
    tmp_path: Path, kind: str, text: str, changes: tuple[str, ...]
) -> None:
    import diffusers

    config = PIXART if kind == "PixArt" else SD15
    options = [*text_options(tmp_path, kind), "guidance_scale=2.0", *changes]
    save_text_encoder(tmp_path / "parts" / "text_encoder", text)
    arguments = trained(tmp_path / "run", config, *options)
    exported(config, arguments, tmp_path / "out")
    name = {"PixArt": "PixArtAlphaPipeline", "UNet": "StableDiffusionPipeline"}[kind]
    pipeline = getattr(diffusers, name).from_pretrained(tmp_path / "out")
    own = (
        {"use_resolution_binning": False, "max_sequence_length": 8, "clean_caption": False}
        if kind == "PixArt"
        else {}
    )
    assert pipeline.tokenizer.model_max_length == 8
    found = pipeline(
        "a red heart",
        guidance_scale=2.0,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
        **own,
    ).images[0]
    assert agree((found * 255).round(), drawn(config, arguments))


def test_a_text_to_video_pipeline_draws_what_the_sampler_draws(tmp_path: Path) -> None:
    from diffusers import LattePipeline

    # With guidance diffusers' pipeline would read the empty caption's padding. Training never reads it.
    options = [*text_options(tmp_path, "LatteT2V", frames=3), "num_frames=3", "guidance_scale=1.0"]
    arguments = trained(tmp_path / "run", LATTE, *options)
    assert "Guided videos differ: " in exported(LATTE, [*arguments, "guidance_scale=4.0"], tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Guided videos differ: LattePipeline also reads the padding" in card
    assert f"num_inference_steps={STEPS} and guidance_scale=1\n" in card
    pipeline = LattePipeline.from_pretrained(tmp_path / "out")
    found = pipeline(
        "a red heart",
        video_length=3,
        height=16,
        width=16,
        guidance_scale=1.0,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(SEED),
        output_type="pt",
        clean_caption=False,
    ).frames[0]
    assert agree((found.permute(0, 2, 3, 1).numpy() * 255).round(), drawn(LATTE, arguments))


def test_a_model_of_pixels_exports_the_model_and_the_scheduler(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    arguments = trained(tmp_path / "run", DIGITS, "data.num_workers=0")
    with pytest.raises(ValueError, match="a pipeline needs latents, got a model of pixels"):
        exported(DIGITS, arguments, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    exported(DIGITS, arguments, tmp_path / "out", model_only=True)
    net = DiTTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    assert net.config.sample_size == 8
    assert DDIMScheduler.from_pretrained(tmp_path / "out" / "scheduler").config.clip_sample
    (tmp_path / "plain").touch()
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in files} == {(tmp_path / "plain").stat().st_mode}
    with (
        file_size_limit(1000),
        pytest.raises(OSError, match=rf"cannot write {tmp_path}/full: File too large"),
    ):
        exported(DIGITS, arguments, tmp_path / "full", model_only=True)
    with pytest.raises(ValueError, match="--out needs a folder that does not exist"):
        exported(DIGITS, arguments, tmp_path / "out", model_only=True)


@torch.no_grad()
def test_clamped_steps_of_the_scheduler_are_the_samplers_as_the_card_says(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    arguments = [*trained(tmp_path / "run", DIGITS, "data.num_workers=0"), "guidance_scale=1"]
    said = exported(DIGITS, arguments, tmp_path / "out", model_only=True)
    assert "scheduler.step(..., use_clipped_model_output=True)" in said
    assert "use_clipped_model_output=True" in (tmp_path / "out" / "README.md").read_text()
    sampler = ["sampler.type=ddim_leading", f"sampler.num_steps={STEPS}", "sampler.clip_sample=true"]
    generator, _, _ = load_generator(load_config(DIGITS, "sample", [*arguments, *sampler]))
    expected = generator.draw(torch.tensor([3]), 1)
    net = DiTTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    scheduler.set_timesteps(STEPS)
    deviations = {}
    for is_clipped in (True, False):
        x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(SEED))
        for step in scheduler.timesteps:
            prediction = net(x, timestep=step.unsqueeze(0), class_labels=torch.tensor([3])).sample[:, :1]
            x = scheduler.step(prediction, step, x, use_clipped_model_output=is_clipped).prev_sample
        deviations[is_clipped] = float((x - expected).abs().max())
    # Float32 rounding over ten steps, and in the fitted timestep layer.
    assert deviations[True] < 1e-4
    assert deviations[False] > 0.05


def test_a_unet_alone_has_the_schedule_of_its_pipeline(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    arguments = trained(tmp_path / "run", SD15, *text_options(tmp_path, "UNet"))
    exported(SD15, arguments, tmp_path / "out", model_only=True)
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    scheduler.set_timesteps(STEPS)
    assert scheduler.timesteps.tolist() == [1 + 100 * step for step in reversed(range(STEPS))]


@pytest.mark.parametrize("is_rescaled", [False, True])
def test_the_exported_scheduler_has_the_schedule_of_the_training(is_rescaled: bool, tmp_path: Path) -> None:
    options = {"noise_schedule": "linear", "prediction_type": "v", "zero_terminal_snr": is_rescaled}
    scheduler = save_scheduler(tmp_path, num_timesteps=100, clip_sample=False, **options)
    process = gaussian_process(diffusion_steps=100, **options)
    # diffusers multiplies 100 float32 factors.
    assert_close(scheduler.alphas_cumprod.double(), process.schedule.alphas_cumprod, rtol=1e-4, atol=1e-6)


def test_a_super_resolution_unet_is_exported_with_the_embedding_of_its_level(tmp_path: Path) -> None:
    options = ["super_resolution.factor=2", "sampler.clip_sample=false"]
    arguments = trained(tmp_path / "run", DIGITS, "data.num_workers=0", *options)
    with pytest.raises(ValueError, match="--for-loader .* and --model-only a UNet .* got DiT"):
        exported(DIGITS, arguments, tmp_path / "out", model_only=True)
    model = (
        "{type: UNet, block_out_channels: [32, 32], layers_per_block: 1, text_width: 384, text_length: 16}"
    )
    process = "{type: SpeeDiffusion, prediction_type: epsilon, learn_sigma: false, policy: uniform}"
    changes = [f"model={model}", f"diffusion={process}", "sampler.type=ddpm", *options]
    arguments = trained(tmp_path / "unet", EMOJI, *changes)
    exported(EMOJI, arguments, tmp_path / "out", model_only=True)
    config = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())
    # Three channels of x, three of the low-resolution sample.
    assert (config["in_channels"], config["class_embed_type"]) == (6, "timestep")
    with pytest.raises(ValueError, match="an exported scheduler has no dynamic thresholding"):
        exported(EMOJI, [*arguments, "sampler.thresholding=dynamic"], tmp_path / "other", model_only=True)
