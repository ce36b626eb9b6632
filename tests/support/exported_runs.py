"""Small random models as checkpoints, and the tool that exports them."""

import runpy
from pathlib import Path
from typing import Any

import torch
from saved_models import save_pipeline

from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.config.loading import load_config, to_yaml
from speedit_plugins.trainer.results import save_config
from speedit_plugins.trainer.training.assembly import build_trainer

EXPORT = runpy.run_path("tools/export.py")
STEPS = 10
DIT, SD15 = "configs/image/imagenet_256/base.yaml", "configs/text_to_image/sd15.yaml"
EMOJI = "configs/text_to_image/emoji.yaml"
PIXART, LATTE = "configs/text_to_image/pixart_256.yaml", "configs/text_to_video/latte_16x256.yaml"
DIGITS = "configs/image/digits/speedit.yaml"


def trained(
    folder: Path, config: str, *options: str, spread: float = 0.03, normalization: Any = None
) -> list[str]:
    """Writes a checkpoint of a random model without a zero layer, and returns the arguments that name it.

    Args:
        spread: standard deviation of the noise that is added to each weight.
        normalization: of points, that the checkpoint keeps.
    """
    arguments = [f"experiment_dir={folder}", *options]
    loaded = load_config(config, "train", arguments)
    trainer = build_trainer(loaded)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    save_config(loaded, "train")
    weights = dict(trainer.model.state_dict())
    contents = checkpoints.Contents(
        model=weights, ema=weights, state={}, config=to_yaml(loaded), normalization=normalization
    )
    checkpoints.save(folder / "checkpoints", 1, contents, keep_last=1)
    return arguments


def stages_in(folder: Path, config: str, *options: str, before: str | None = None) -> None:
    """Writes folder/exported for `load_stages`: a random model, and perhaps its first stage, `before`.

    Args:
        config: of the model.
        options: of it, and of the stage before it.
        before: an option that only the stage before it has; None is no such stage.
    """
    arguments = trained(folder / "last", config, *options)
    if before is not None:
        trained(folder / "first", config, *options, "super_resolution.factor=0", *before.split())
        arguments.append(f"cascade=[{folder / 'first'}]")
    EXPORT["export_stages"](load_config(config, "sample", arguments), folder / "exported")


def exported(config: str, arguments: list[str], folder: Path, **options: Any) -> str:
    """What the tool says that exports the run of these arguments into a folder."""
    loaded = load_config(config, "sample", [*arguments, f"sampler.num_steps={STEPS}"])
    return EXPORT["export"](loaded, folder, **options)


def dit_options(folder: Path) -> list[str]:
    """Arguments of a DiT with two narrow blocks, on latents of a random autoencoder."""
    save_pipeline(folder / "parts", "PixArt")
    return [
        "image_size=8",
        "num_classes=10",
        "model={type: DiT, input_size: 4, patch_size: 2, hidden_size: 32, depth: 2, num_heads: 2}",
        f"encoder={{type: AutoencoderKL, path: {folder / 'parts'}, subfolder: vae}}",
        "data.dataset=Digits",
        "data.batch_size=2",
        "data.num_workers=0",
        "guidance_scale=2.0",
        "sampler.guidance_channels=null",
        "precision=fp32",
        "sample_classes=[2]",
        "max_training_steps=1",
    ]


def text_options(folder: Path, kind: str, *, frames: int = 0) -> list[str]:
    """Arguments of a text-conditioned model of a kind, all of whose parts are small and random."""
    parts = save_pipeline(folder / "parts", kind)
    padding = ", attend_padding: true" if kind == "UNet" else ""
    places = f"path: {parts}, subfolder: text_encoder, tokenizer_subfolder: tokenizer"
    text = f"{places}, max_length: 8, dtype: float32{padding}"
    edge = 8 if frames else 4
    return [
        f"image_size={2 * edge}",
        f"model={{type: {kind}, path: {parts}, input_size: {edge}, text_width: 16, text_length: 8}}",
        f"encoder={{type: AutoencoderKL, path: {parts}, subfolder: vae}}",
        f"text_encoder={{type: TextEncoder, {text}}}",
        "data.dataset=" + ("MovingDigits" if frames else "Digits"),
        "data.batch_size=2",
        "data.num_workers=0",
        "precision=fp32",
        "sample_prompts=[a red heart]",
        "max_training_steps=1",
    ]
