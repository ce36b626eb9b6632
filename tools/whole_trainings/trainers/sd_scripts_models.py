"""sd-scripts in small, in the process of a run: its own loaders and classes, with other sizes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from whole_trainings.material import write_vae
from whole_trainings.recording import Record
from whole_trainings.script_steps import Steps
from whole_trainings.trainer_material import (
    TEXT_WIDTH,
    clip_text_model,
    t5_encoder,
    write_clip_tokenizer,
    write_t5_tokenizer,
)

UNET_WIDTHS = (32, 32, 32, 32)


def prepare(record: Record, work: Path, replayed: Sequence[Tensor] | None) -> list[str]:
    """Makes the host small, writes weights at the first run, and records the steps.

    With `uniform` a flow draws as the host does, so only the UNet's t are replayed.
    """
    made = _small_flux(work / "flux") if (work / "flux").is_dir() else _small_unet(work / "sd")
    steps = Steps(record)
    model, argument = made
    steps.watch_model(model, argument)
    module = import_module("library.train_util")
    steps.watch_error(module, "conditional_loss")
    own: Callable[..., None] = module.LossRecorder.add

    def add(self: Any, *, epoch: int, step: int, loss: float) -> None:
        steps.reported(loss)
        own(self, epoch=epoch, step=step, loss=loss)

    module.LossRecorder.add = add
    if replayed is not None:
        _replay(module, record, replayed)
    _write_tokenizers(work / "tokenizers")
    names = {"Flux": "Flux, CLIP-L and T5-XXL", "UNet2DConditionModel": "the UNet"}
    return [f"{names[model.__name__]} (the host's classes, of a few channels, random weights)"]


def _replay(module: Any, record: Record, replayed: Sequence[Tensor]) -> None:
    own: Callable[..., Tensor] = module.get_timesteps

    def get_timesteps(*args: Any) -> Tensor:
        # The host's own draw comes before the noise, from the same random numbers.
        own(*args)
        return replayed[len(record.t)].clone()

    module.get_timesteps = get_timesteps


def _write_tokenizers(folder: Path) -> None:
    if not folder.is_dir():
        write_clip_tokenizer(folder / "openai_clip-vit-large-patch14")
        write_t5_tokenizer(folder / "google_t5-v1_1-xxl")


def _small_flux(folder: Path) -> tuple[type, str]:
    models, loaders = import_module("library.flux_models"), import_module("library.flux_utils")
    own = models.configs["dev"]
    sizes = {"vec_in_dim": TEXT_WIDTH, "context_in_dim": TEXT_WIDTH, "hidden_size": 64, "num_heads": 2}
    params = replace(own.params, **sizes, depth=1, depth_single_blocks=1, axes_dim=[8, 12, 12])
    encoder = replace(own.ae_params, ch=32, ch_mult=[1, 1, 1, 1], num_res_blocks=1)
    models.configs["dev"] = replace(own, params=params, ae_params=encoder)
    # Their sizes are fixed inside these two functions.
    loaders.load_clip_l, loaders.load_t5xxl = _made_by(clip_text_model), _made_by(t5_encoder)
    if not (folder / "flux.safetensors").is_file():
        torch.manual_seed(0)
        flux = models.Flux(params)
        # The host zeroes nothing, and so no gradient is zero.
        save_file({k: v.contiguous() for k, v in flux.state_dict().items()}, folder / "flux.safetensors")
        save_file(models.AutoEncoder(encoder).state_dict(), folder / "ae.safetensors")
    return models.Flux, "timesteps"


def _made_by(factory: Callable[[], Any]) -> Callable[..., Any]:
    def load(*_: Any, **__: Any) -> Any:
        return factory()

    return load


def _small_unet(folder: Path) -> tuple[type, str]:
    module = import_module("library.original_unet")
    width = UNET_WIDTHS[0]
    vars(module).update(BLOCK_OUT_CHANNELS=UNET_WIDTHS, TIMESTEP_INPUT_DIM=width, TIME_EMBED_DIM=4 * width)
    vars(module).update(LAYERS_PER_BLOCK=1, LAYERS_PER_BLOCK_UP=2)
    if not folder.is_dir():
        _write_pipeline(folder)
    return module.UNet2DConditionModel, "timestep"


def _write_pipeline(folder: Path) -> None:
    diffusers = import_module("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=UNET_WIDTHS,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
    )
    write_vae(folder / "made_vae")
    write_clip_tokenizer(folder / "made_tokenizer")
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "made_vae"),
        text_encoder=clip_text_model(),
        tokenizer=import_module("transformers").CLIPTokenizer.from_pretrained(folder / "made_tokenizer"),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
