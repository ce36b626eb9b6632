"""A trained model in diffusers' own form: the network, its scheduler, the pipeline around them.

Dims: `D` width, `N` sampling steps, `K` classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from speedit_plugins.trainer.models.backbones import TextConditioned
from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.pretrained import Autoencoder
from speedit_plugins.trainer.models.text import TextEncoder

# What DiTPipeline takes for "no class", whatever the model was trained on.
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
    """A pipeline of diffusers, by the name of its class, and how it samples.

    Args:
        subfolder: of the network in the pipeline's folder.
        steps_offset: what it adds to the timesteps 0, T // N, 2 (T // N), ...; 0 or 1.
        drops_variance: of a network with variance channels it takes the others; False takes none with such.
        reads_padding: like words.
        guided_note: why its guided samples differ from the trainer's; "" where they do not.
        parts: what its constructor wants beside models, tokenizer and scheduler.
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


_DIT = Pipeline(name="DiTPipeline")
# By the class of the network.
_PIPELINES = {
    "PixArtTransformer2DModel": Pipeline(name="PixArtAlphaPipeline"),
    "LatteTransformer3DModel": Pipeline(
        name="LattePipeline",
        guided_note="Guided videos differ: LattePipeline reads the padding behind the empty caption.",
    ),
    "UNet2DConditionModel": Pipeline(
        name="StableDiffusionPipeline",
        subfolder="unet",
        # The pipeline insists on it.
        steps_offset=1,
        drops_variance=False,
        reads_padding=True,
        parts={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    ),
}


@dataclass(frozen=True, eq=False)
class Exported:
    """A network of diffusers, the pipeline it belongs to, and what a user should know."""

    net: Any
    pipeline: Pipeline
    notes: tuple[str, ...] = ()


def export_model(model: nn.Module, *, num_steps: int, num_timesteps: int) -> Exported:
    """The diffusers network of a trained model; adapters (`lora_rank`) are merged into its weights, in place.

    Args:
        num_steps: N of the `ddim_leading` sampling that a DiT's timestep layer is fitted to, see `dit_of`.
        num_timesteps: T of the process.

    Raises:
        ValueError: a model that no pipeline of diffusers is for.
    """
    if isinstance(model, TextConditioned):
        pipeline, net = _PIPELINES[type(model.net).__name__], cast(Any, model.net)
        if any("lora_" in name for name, _ in net.named_parameters()):
            net.fuse_lora()
            net.unload_lora()
        return Exported(net, pipeline, (pipeline.guided_note,) if pipeline.guided_note else ())
    # A Latte of classes is a DiT too, and no pipeline is for it.
    if type(model) is DiT and model.num_classes and model.null_label is not None:
        return dit_of(model, num_steps=num_steps, num_timesteps=num_timesteps)
    raise ValueError(
        f"no pipeline of diffusers is for {type(model).__name__} as it is; wanted a DiT with classes and"
        " class_dropout_prob > 0, PixArt, UNet or LatteT2V"
    )


def dit_of(model: DiT, *, num_steps: int, num_timesteps: int) -> Exported:
    """diffusers' `DiTTransformer2DModel` with the weights of a DiT.

    Labels get the pipeline's layout: K classes from 0 on, "no class" at 1000, zeros between. diffusers spaces
    the frequencies of its timestep features otherwise (127 steps from 1 to 1/10000, not 128): the first layer
    of the timestep's perceptron is fitted to it, by least squares on the N timesteps that are visited. Up to
    about 50 of them the fit is exact; for more, or at other timesteps, predictions differ.
    """
    from diffusers import DiTTransformer2DModel

    if model.num_classes > PIPELINE_CLASSES:
        raise ValueError(f"DiTPipeline has {PIPELINE_CLASSES} classes, got {model.num_classes}")
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
    # Its table of positions is its own, equal to ours, and not trained.
    net.load_state_dict({**net.state_dict(), **weights})
    note = f"The timestep layer is fitted to num_inference_steps={num_steps}"
    note += "." if deviation < 1e-5 else f", to within {deviation:.2g} of features in [-1, 1]: images differ."
    return Exported(net, _DIT, (note,))


def save_scheduler(
    folder: Path,
    *,
    num_timesteps: int,
    noise_schedule: str | None,
    prediction_type: str | None,
    clip_sample: bool,
    steps_offset: int = 0,
) -> Any:
    """Writes the DDIM scheduler whose steps are those of the sampler `ddim_leading`, and returns it.

    Args:
        clip_sample: clamp the predicted x_0. The sampler's steps are then those of
            `step(..., use_clipped_model_output=True)`: without it the noise stays as it was predicted.
        steps_offset: 1 is `ddim_leading_1`.
    """
    from diffusers import DDIMScheduler

    options = dict(_SCHEDULES[str(noise_schedule)])
    for key in ("beta_start", "beta_end"):
        if key in options:
            # The end points are given for T = 1000.
            options[key] *= 1000 / num_timesteps
    scheduler = DDIMScheduler(
        num_train_timesteps=num_timesteps,
        prediction_type=_PREDICTIONS[str(prediction_type)],
        clip_sample=clip_sample,
        set_alpha_to_one=True,
        steps_offset=steps_offset,
        timestep_spacing="leading",
        **options,
    )
    scheduler.save_pretrained(folder)
    return scheduler


def check_pipeline(exported: Exported, encoder: Any, text: TextEncoder | None) -> None:
    """Raises where the pipeline would draw something else than the model, or nothing.

    Raises:
        ValueError: an autoencoder with a shift, which these pipelines do not apply; variance channels, or a
            text encoder without `attend_padding`, where the pipeline takes neither.
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

    The tokenizer's `model_max_length`, to which StableDiffusionPipeline pads, becomes the text encoder's.

    Args:
        exported: `check_pipeline` has nothing against it.
        scheduler: see `save_scheduler`.
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
    """The state dict by diffusers' names, and the largest deviation of the fitted timestep features."""
    own = {name: value.float().cpu() for name, value in model.state_dict().items()}
    fit, deviation = _timestep_fit(num_steps, num_timesteps)
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
        # Every block of diffusers has an embedding of its own; DiT shares one.
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


def _timestep_fit(num_steps: int, num_timesteps: int) -> tuple[Tensor, float]:
    """The matrix M (256, 256) with M theirs = ours on the visited timesteps, and its largest deviation."""
    visited = torch.arange(num_steps, dtype=torch.float64) * (num_timesteps // num_steps)
    half = 128
    rank = torch.arange(half, dtype=torch.float64)
    theirs, ours = (
        torch.cat([angles.cos(), angles.sin()], dim=1)
        for angles in (visited.unsqueeze(1) * 10_000.0 ** (-rank / steps) for steps in (half - 1, half))
    )
    solution = torch.linalg.lstsq(theirs, ours, driver="gelsd").solution  # (256, 256)
    return solution.T, float((theirs @ solution - ours).abs().max())
