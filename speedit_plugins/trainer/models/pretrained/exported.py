"""Exports a trained model in diffusers' own form: the network, its scheduler, and the pipeline with both.

Dims: `D` width, `N` sampling steps, `K` classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.lora import merge_adapters
from speedit_plugins.trainer.models.pretrained.autoencoder import Autoencoder
from speedit_plugins.trainer.models.pretrained.text import TextEncoder
from speedit_plugins.trainer.models.text_conditioned.wrapper import TextConditioned

# DiTPipeline always uses this label for "no class".
PIPELINE_CLASSES = 1000
_SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
}
_PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A pipeline class of diffusers and how it samples.

    Args:
        name: name of the class.
        subfolder: folder of the network inside the pipeline's folder.
        steps_offset: number added to the timesteps 0, T // N, 2 (T // N), ...; 0 or 1.
        drops_variance: the pipeline drops a network's variance channels; False refuses such networks.
        reads_padding: the pipeline reads padding tokens like words.
        guided_note: why its guided samples differ from the trainer's; "" if they do not.
        parts: arguments of its constructor besides models, tokenizer and scheduler.
    """

    name: str
    subfolder: str = "transformer"
    steps_offset: int = 0
    drops_variance: bool = True
    reads_padding: bool = False
    guided_note: str = ""
    parts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sampler(self) -> str:
        """The trainer's sampler that visits the pipeline's timesteps."""
        return "ddim_leading_1" if self.steps_offset else "ddim_leading"


# By the name of the network's class.
PIPELINES = {
    "DiTTransformer2DModel": Pipeline(name="DiTPipeline"),
    "PixArtTransformer2DModel": Pipeline(name="PixArtAlphaPipeline"),
    "LatteTransformer3DModel": Pipeline(
        name="LattePipeline",
        guided_note="Guided videos differ: LattePipeline also reads the padding of the empty caption.",
    ),
    "UNet2DConditionModel": Pipeline(
        name="StableDiffusionPipeline",
        subfolder="unet",
        # The pipeline would replace any other value by this.
        steps_offset=1,
        drops_variance=False,
        reads_padding=True,
        parts={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    ),
}


@dataclass(frozen=True, eq=False)
class Exported:
    """A network of diffusers, its pipeline, and notes for the user."""

    net: Any
    pipeline: Pipeline
    notes: tuple[str, ...] = ()


def export_model(model: nn.Module, *, num_steps: int, num_timesteps: int) -> Exported:
    """The diffusers network of a trained model. Its adapters are merged into its weights, in place.

    Args:
        num_steps: N of the `ddim_leading` sampling that a DiT's timestep layer is fitted to; see `dit_of`.
        num_timesteps: T of the process.

    Raises:
        ValueError: diffusers has no pipeline for the model.
    """
    merge_adapters(model)
    if isinstance(model, TextConditioned):
        pipeline, net = PIPELINES[type(model.net).__name__], cast(Any, model.net)
        return Exported(net, pipeline, (pipeline.guided_note,) if pipeline.guided_note else ())
    return dit_of(check_dit(model), num_steps=num_steps, num_timesteps=num_timesteps)


def check_dit(model: nn.Module) -> DiT:
    """The model itself, a DiT that DiTPipeline takes.

    Raises:
        ValueError: it is another model, or has other blocks than DiT's.
    """
    # Latte and SiT are subclasses of DiT, but no pipeline takes one of them with classes.
    if type(model) is DiT and model.num_classes and model.null_label is not None:
        if changed := model.options.changed:
            raise ValueError(f"diffusers' DiT has blocks without {', '.join(changed)}; got a model with them")
        return model
    raise ValueError(
        f"diffusers has no pipeline for this {type(model).__name__}; wanted a DiT with classes and"
        " class_dropout_prob > 0, or a PixArt, UNet or LatteT2V"
    )


def dit_of(model: DiT, *, num_steps: int, num_timesteps: int) -> Exported:
    """diffusers' `DiTTransformer2DModel` with the weights of a DiT.

    The label embeddings get the pipeline's layout: K classes from row 0 on, "no class" in row 1000, and zeros
    in between. diffusers spaces the frequencies of the timestep features differently: it reaches 1/10000
    after 127 steps, DiT after 128. So the first layer of the timestep's perceptron is fitted to diffusers'
    features by least squares, on the N timesteps that sampling visits. The fit is exact for up to about 50
    timesteps. With more of them, or at other timesteps, predictions differ.

    Raises:
        ValueError: the model has more classes than the pipeline, or another mlp_ratio than 4.
    """
    from diffusers import DiTTransformer2DModel

    if model.num_classes > PIPELINE_CLASSES:
        raise ValueError(f"DiTPipeline takes up to {PIPELINE_CLASSES} classes, got {model.num_classes}")
    block = cast(Any, model.blocks[0])
    num_heads = block.attn.num_heads
    width = model.pos_embed.shape[2]
    if block.mlp.fc1.out_features != 4 * width:
        ratio = block.mlp.fc1.out_features / width
        raise ValueError(f"DiTPipeline needs model.mlp_ratio 4, got {ratio:g}")
    net = DiTTransformer2DModel(
        num_attention_heads=num_heads,
        attention_head_dim=width // num_heads,
        in_channels=model.in_channels,
        out_channels=model.out_channels,
        num_layers=len(model.blocks),
        sample_size=model.input_size,
        patch_size=model.patch_size,
        num_embeds_ada_norm=PIPELINE_CLASSES,
        norm_eps=1e-6,
    )
    weights, deviation = _dit_weights(model, num_steps, num_timesteps)
    # The network keeps its own table of positions. It equals ours and is not trained.
    net.load_state_dict({**net.state_dict(), **weights})
    note = f"The timestep layer is fitted to num_inference_steps={num_steps}"
    if deviation < 1e-5:
        note += "."
    else:
        note += (
            f", to within {deviation:.2g} of features in [-1, 1]: images differ. The fit is exact for up to"
            " about 50 steps: sampler.num_steps=50"
        )
    return Exported(net, PIPELINES["DiTTransformer2DModel"], (note,))


def save_scheduler(
    folder: Path,
    *,
    num_timesteps: int,
    noise_schedule: str | None,
    zero_terminal_snr: bool = False,
    prediction_type: str | None,
    clip_sample: bool,
    steps_offset: int = 0,
) -> Any:
    """Writes and returns the DDIM scheduler that makes the steps of the sampler `ddim_leading`.

    Args:
        folder: where `save_pretrained` writes.
        num_timesteps: T of the process.
        noise_schedule: name of the schedule, as in the config.
        zero_terminal_snr: the process's schedule was rescaled to SNR 0 at its end.
        prediction_type: "epsilon", "x0" or "v".
        clip_sample: clamp the predicted x_0. The scheduler then equals the sampler if its steps are called as
            `step(..., use_clipped_model_output=True)`; otherwise it keeps the noise as predicted.
        steps_offset: 1 makes the steps of `ddim_leading_1`.
    """
    from diffusers import DDIMScheduler

    options = dict(_SCHEDULES[str(noise_schedule)])
    for key in ("beta_start", "beta_end"):
        if key in options:
            # The end points in the table are those of T = 1000.
            options[key] *= 1000 / num_timesteps
    scheduler = DDIMScheduler(
        num_train_timesteps=num_timesteps,
        prediction_type=_PREDICTIONS[str(prediction_type)],
        clip_sample=clip_sample,
        set_alpha_to_one=True,
        steps_offset=steps_offset,
        timestep_spacing="leading",
        rescale_betas_zero_snr=zero_terminal_snr,
        **options,
    )
    scheduler.save_pretrained(folder)
    return scheduler


def check_pipeline(exported: Exported, encoder: Any, text: TextEncoder | None) -> None:
    """Checks that the pipeline can sample, and samples what the trainer's sampler does.

    Raises:
        ValueError: the autoencoder has a shift, and these pipelines apply none; the pipeline does not take
            the network's variance channels; or it reads padding, but the model was trained not to.
    """
    assert isinstance(encoder, Autoencoder)
    pipeline = exported.pipeline
    if encoder.shift_factor:
        raise ValueError(
            f"{pipeline.name} applies no shift_factor, got an autoencoder with {encoder.shift_factor}"
        )
    if not pipeline.drops_variance and exported.net.config.out_channels != encoder.channels:
        raise ValueError(
            f"{pipeline.name} takes no variance channels, got a model trained with diffusion.learn_sigma"
            " true; wanted false, or --model-only"
        )
    if pipeline.reads_padding and text is not None and not text.attend_padding:
        raise ValueError(
            f"{pipeline.name} reads padding like words, got a model trained with"
            " text_encoder.attend_padding false; wanted true"
        )


def save_pipeline(
    folder: Path, exported: Exported, encoder: Autoencoder, text: TextEncoder | None, **scheduler: Any
) -> None:
    """Writes the pipeline's folder: network, autoencoder, scheduler, and text encoder with tokenizer.

    The tokenizer's `model_max_length` becomes the text encoder's, because StableDiffusionPipeline pads to it.

    Args:
        folder: where the pipeline is written.
        exported: what `check_pipeline` accepts.
        encoder: the autoencoder.
        text: the text encoder, or None for a model without captions.
        scheduler: arguments of `save_scheduler`.
    """
    import diffusers

    pipeline = exported.pipeline
    parts: dict[str, Any] = {
        pipeline.subfolder: exported.net,
        "vae": encoder.model,
        "scheduler": save_scheduler(folder / "scheduler", steps_offset=pipeline.steps_offset, **scheduler),
        **pipeline.parts,
    }
    if text is not None:
        text.tokenizer.model_max_length = text.max_length
        parts |= {"text_encoder": text.model, "tokenizer": text.tokenizer}
    getattr(diffusers, pipeline.name)(**parts).save_pretrained(folder, safe_serialization=True)


def _dit_weights(model: DiT, num_steps: int, num_timesteps: int) -> tuple[dict[str, Tensor], float]:
    """The state dict under diffusers' names, and the largest deviation of the fitted timestep features."""
    own = {name: value.float().cpu() for name, value in model.state_dict().items()}
    fit, deviation = timestep_fit(num_steps, num_timesteps)
    labels = torch.zeros(PIPELINE_CLASSES + 1, model.pos_embed.shape[2])
    table = own["y_embedder.embedding_table.weight"]
    labels[: model.num_classes], labels[PIPELINE_CLASSES] = table[:-1], table[-1]
    shared = {
        "timestep_embedder.linear_1.weight": (own["t_embedder.mlp.0.weight"].double() @ fit).float(),
        "timestep_embedder.linear_1.bias": own["t_embedder.mlp.0.bias"],
        "timestep_embedder.linear_2.weight": own["t_embedder.mlp.2.weight"],
        "timestep_embedder.linear_2.bias": own["t_embedder.mlp.2.bias"],
        "class_embedder.embedding_table.weight": labels,
    }
    renamed: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        renamed[f"pos_embed.proj.{kind}"] = own[f"x_embedder.proj.{kind}"]
        renamed[f"proj_out_1.{kind}"] = own[f"final_layer.adaLN_modulation.1.{kind}"]
        renamed[f"proj_out_2.{kind}"] = own[f"final_layer.linear.{kind}"]
    for number in range(len(model.blocks)):
        mine, theirs = f"blocks.{number}", f"transformer_blocks.{number}"
        # In diffusers every block has its own embeddings; in DiT the blocks share them.
        renamed |= {f"{theirs}.norm1.emb.{name}": value for name, value in shared.items()}
        for kind in ("weight", "bias"):
            query, key, value = own[f"{mine}.attn.qkv.{kind}"].chunk(3)
            renamed |= {
                f"{theirs}.attn1.to_q.{kind}": query,
                f"{theirs}.attn1.to_k.{kind}": key,
                f"{theirs}.attn1.to_v.{kind}": value,
                f"{theirs}.attn1.to_out.0.{kind}": own[f"{mine}.attn.proj.{kind}"],
                f"{theirs}.norm1.linear.{kind}": own[f"{mine}.adaLN_modulation.1.{kind}"],
                f"{theirs}.ff.net.0.proj.{kind}": own[f"{mine}.mlp.fc1.{kind}"],
                f"{theirs}.ff.net.2.{kind}": own[f"{mine}.mlp.fc2.{kind}"],
            }
    return renamed, deviation


def timestep_fit(num_steps: int, num_timesteps: int) -> tuple[Tensor, float]:
    """M (256, 256) with M theirs = ours for the features of visited timesteps, and its largest deviation."""
    visited = torch.arange(num_steps, dtype=torch.float64) * (num_timesteps // num_steps)
    half = 128
    rank = torch.arange(half, dtype=torch.float64)
    theirs, ours = (
        torch.cat([angles.cos(), angles.sin()], dim=1)
        for angles in (visited.unsqueeze(1) * 10_000.0 ** (-rank / steps) for steps in (half - 1, half))
    )
    solution = torch.linalg.lstsq(theirs, ours, driver="gelsd").solution  # (256, 256)
    return solution.T, float((theirs @ solution - ours).abs().max())
