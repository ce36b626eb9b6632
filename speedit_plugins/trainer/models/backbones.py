"""Text-conditioned models of diffusers behind the trainer's model interface: PixArt, UNet, Latte for text.

A model of the trainer is called as `model(x, timestep, condition)` and says by attributes what it takes.
These read a condition of named tensors: "tokens" (B, L, D) and "mask" (B, L) of the caption, and where an
input is concatenated to x, "extra" (B, E, ...). The diffusers model is `net`, its parameters are `net.*`.

Dims: `B` batch, `C` channels, `F` frames, `h`, `w` edges, `L` caption tokens, `D` width of the text encoder.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from speedit_plugins.registry import MODELS
from speedit_plugins.trainer.models.interface import split_extra
from speedit_plugins.trainer.models.pretrained import first_line, loading_advice

# What diffusers' class leaves open and every released Latte shares.
_LATTE: dict[str, Any] = {
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}
_READS_SIZE = (
    "reads the image's size, which training does not give; wanted one with use_additional_conditions false,"
    " unlike PixArt's of 1024 x 1024"
)


class TextConditioned(nn.Module):
    """A model of diffusers, and the features of the empty caption, which take dropped captions' place.

    Attributes: `in_channels` is C, `extra_channels` is E, `num_tokens` counts a sample's tokens, or its
    latent cells where the model has no patches, `num_frames` is None for images.

    Args:
        net: the diffusers model; takes C + E channels.
        input_size: h and w.
        in_channels: C.
        text_width: D.
        text_length: L.
        learn_sigma: whether `net` gives 2C channels.
        num_frames: F of a video model.
    """

    num_classes, null_label = 0, None

    def __init__(  # noqa: PLR0913 - what a subclass knows of its net
        self,
        net: nn.Module,
        *,
        input_size: int,
        in_channels: int,
        text_width: int,
        text_length: int,
        learn_sigma: bool,
        num_frames: int | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.input_size, self.in_channels, self.num_frames = input_size, in_channels, num_frames
        self.extra_channels = int(_config(net, "in_channels")) - in_channels
        # A UNet has no patches.
        patch_size = int(cast(Any, net).config.get("patch_size") or 1)
        self.num_tokens = (num_frames or 1) * (input_size // patch_size) ** 2
        self.text_width, self.text_length, self.learn_sigma = text_width, text_length, learn_sigma
        self.out_channels = int(_config(net, "out_channels"))
        wanted = in_channels * (2 if learn_sigma else 1)
        if self.out_channels != wanted:
            raise ValueError(
                f"the model gives {self.out_channels} channels, wanted {wanted}: {in_channels} of the latents"
                f" (encoder), learn_sigma {str(learn_sigma).lower()}"
            )
        self.register_buffer("null_tokens", torch.zeros(1, text_length, text_width))
        self.register_buffer("null_mask", torch.zeros(1, text_length, dtype=torch.bool))

    @property
    def null_text(self) -> dict[str, Tensor]:
        """Features of the empty caption: "tokens" (1, L, D), "mask" (1, L)."""
        return {"tokens": self.get_buffer("null_tokens"), "mask": self.get_buffer("null_mask")}

    def set_null_text(self, features: Mapping[str, Tensor]) -> None:
        """Stores the empty caption's features: they are saved with the weights."""
        for name, stored in self.null_text.items():
            stored.copy_(features[name])

    def forward(self, x: Tensor, timestep: Tensor, condition: Mapping[str, Tensor] | None = None) -> Tensor:
        """Prediction for a noised input.

        Args:
            x: (B, C, h, w), of a video model (B, C, F, h, w).
            timestep: (B,), integer or fractional.
            condition: see the module.

        Returns:
            (B, C, ...), with learn_sigma (B, 2C, ...).

        Raises:
            ValueError: the condition is missing or has another width.
        """
        if condition is None or condition["tokens"].shape[2] != self.text_width:
            got = "none" if condition is None else f"width {condition['tokens'].shape[2]}"
            raise ValueError(f"the model needs caption features of width {self.text_width}, got {got}")
        extra, _ = split_extra(condition, self.extra_channels)
        if extra is not None:
            x = torch.cat([x, extra.to(x.dtype)], dim=1)
        # Features are float32; a plugin may hold the model in another precision.
        tokens = condition["tokens"].to(next(self.net.parameters()).dtype)
        return self._predict(x.to(tokens.dtype), timestep, tokens, condition["mask"])

    def _predict(self, x: Tensor, timestep: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError


class _PixArt(TextConditioned):
    def _predict(self, x: Tensor, timestep: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        size = {"resolution": None, "aspect_ratio": None}
        output: Tensor = self.net(
            x,
            encoder_hidden_states=tokens,
            timestep=timestep,
            added_cond_kwargs=size,
            encoder_attention_mask=mask.to(tokens.dtype),
            return_dict=False,
        )[0]
        return output


class _UNet(TextConditioned):
    def _predict(self, x: Tensor, timestep: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        output: Tensor = self.net(
            x, timestep, tokens, encoder_attention_mask=mask.to(tokens.dtype), return_dict=False
        )[0]
        return output


class _Latte(TextConditioned):
    def _predict(self, x: Tensor, timestep: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        if x.shape[2] not in (1, self.num_frames):
            raise ValueError(f"the model needs clips of {self.num_frames} frames, or of 1, got {x.shape[2]}")
        # Per frame, and as a bias already: diffusers repeats the tokens for every frame, but not their mask.
        bias = torch.zeros_like(mask, dtype=tokens.dtype).masked_fill(~mask, -10_000.0)
        output: Tensor = self.net(
            x,
            timestep=timestep,
            encoder_hidden_states=tokens,
            encoder_attention_mask=bias.repeat_interleave(x.shape[2], dim=0).unsqueeze(1),  # (B F, 1, L)
            # One frame has no time to attend over: images train the spatial half of a video model.
            enable_temporal_attentions=x.shape[2] > 1,
            return_dict=False,
        )[0]
        if x.shape[2] == 1 and torch.is_grad_enabled():
            # A gradient of zero, not none: DistributedDataParallel waits for one of every parameter.
            unused = cast(nn.ModuleList, self.net.temporal_transformer_blocks).parameters()
            output = output + 0.0 * torch.stack([parameter.sum() for parameter in unused]).sum()
        return output


def pixart(  # noqa: PLR0913 - flat, as the configs name them
    *,
    input_size: int,
    in_channels: int = 4,
    text_width: int,
    text_length: int,
    learn_sigma: bool = True,
    patch_size: int = 2,
    num_layers: int = 28,
    num_heads: int = 16,
    head_dim: int = 72,
    path: str | None = None,
    allow_download: bool = False,
    subfolder: str = "transformer",
    gradient_checkpointing: bool = False,
) -> TextConditioned:
    """PixArt-alpha's transformer, diffusers' `PixArtTransformer2DModel`.

    Source: Chen et al. 2023, arXiv:2310.00426.

    Args:
        input_size: h and w; with a path it may differ from the saved one's.
        path: folder of a pipeline or of the saved model, or a pipeline's hub name; its own sizes hold, and
            weights are read from it. None is a fresh model of the sizes given.
        allow_download: let a hub name be fetched.
        subfolder: of the pipeline.
        gradient_checkpointing: recompute activations in the backward pass.

    Raises:
        ValueError: no such model, one that reads the image's size or does not fit encoder or learn_sigma.
    """
    from diffusers import PixArtTransformer2DModel as Net

    if path is None or _is_meta():
        net = Net(
            num_attention_heads=num_heads,
            attention_head_dim=head_dim,
            cross_attention_dim=num_heads * head_dim,
            in_channels=in_channels,
            out_channels=in_channels * (2 if learn_sigma else 1),
            num_layers=num_layers,
            sample_size=input_size,
            patch_size=patch_size,
            use_additional_conditions=False,
            caption_channels=text_width,
        )
    else:
        net = _pretrained(Net, path, subfolder, allow_download=allow_download, caption_channels=text_width)
        if net.use_additional_conditions:
            raise ValueError(f"the model at '{path}' {_READS_SIZE}")
    _checkpointed(net, gradient_checkpointing)
    return _PixArt(
        net,
        input_size=input_size,
        in_channels=in_channels,
        text_width=text_width,
        text_length=text_length,
        learn_sigma=learn_sigma,
    )


def unet(  # noqa: PLR0913 - flat, as the configs name them
    *,
    input_size: int,
    in_channels: int = 4,
    extra_channels: int = 0,
    text_width: int,
    text_length: int,
    learn_sigma: bool = False,
    block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
    layers_per_block: int = 2,
    attention_head_dim: int = 8,
    path: str | None = None,
    allow_download: bool = False,
    subfolder: str = "unet",
    gradient_checkpointing: bool = False,
    lora_rank: int = 0,
    lora_targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0"),
) -> TextConditioned:
    """Stable Diffusion's UNet, diffusers' `UNet2DConditionModel`.

    Source: Rombach et al. 2022, arXiv:2112.10752; LoRA: Hu et al. 2021, arXiv:2106.09685.

    Args:
        extra_channels: of a mask and a masked latent for inpainting. A saved model without them gets them as
            zero columns of its first convolution: it starts as it was.
        path: as in `pixart`.
        lora_rank: > 0 freezes the model and trains low-rank adapters (alpha = rank) on `lora_targets`.
    """
    from diffusers import UNet2DConditionModel as Net

    if path is None or _is_meta():
        # Attention everywhere but at the coarsest level, as Stable Diffusion has it.
        inner = len(block_out_channels) - 1
        net = Net(
            sample_size=input_size,
            in_channels=in_channels + extra_channels,
            out_channels=in_channels * (2 if learn_sigma else 1),
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            attention_head_dim=attention_head_dim,
            cross_attention_dim=text_width,
            down_block_types=("CrossAttnDownBlock2D",) * inner + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * inner,
        )
    else:
        net = _pretrained(Net, path, subfolder, allow_download=allow_download, cross_attention_dim=text_width)
        if extra_channels and int(_config(net, "in_channels")) == in_channels:
            _widen_input(net, extra_channels)
    _checkpointed(net, gradient_checkpointing)
    if lora_rank:
        _add_lora(net, lora_rank, lora_targets)
    return _UNet(
        net,
        input_size=input_size,
        in_channels=in_channels,
        text_width=text_width,
        text_length=text_length,
        learn_sigma=learn_sigma,
    )


def latte_t2v(  # noqa: PLR0913 - flat, as the configs name them
    *,
    input_size: int,
    num_frames: int = 16,
    in_channels: int = 4,
    text_width: int,
    text_length: int,
    learn_sigma: bool = True,
    patch_size: int = 2,
    num_layers: int = 28,
    num_heads: int = 16,
    head_dim: int = 72,
    path: str | None = None,
    allow_download: bool = False,
    subfolder: str = "transformer",
    gradient_checkpointing: bool = False,
) -> TextConditioned:
    """Latte's text-to-video transformer, diffusers' `LatteTransformer3DModel`.

    Source: Ma et al. 2024, arXiv:2401.03048.

    Args:
        num_frames: F of a video, in latents; a batch of images has 1.
        path: as in `pixart`.
    """
    from diffusers import LatteTransformer3DModel as Net

    if path is None or _is_meta():
        net = Net(
            num_attention_heads=num_heads,
            attention_head_dim=head_dim,
            cross_attention_dim=num_heads * head_dim,
            in_channels=in_channels,
            out_channels=in_channels * (2 if learn_sigma else 1),
            num_layers=num_layers,
            sample_size=input_size,
            patch_size=patch_size,
            caption_channels=text_width,
            video_length=num_frames,
            **_LATTE,
        )
    else:
        wanted = {"caption_channels": text_width, "video_length": num_frames}
        net = _pretrained(Net, path, subfolder, allow_download=allow_download, **wanted)
    _checkpointed(net, gradient_checkpointing)
    return _Latte(
        net,
        input_size=input_size,
        in_channels=in_channels,
        text_width=text_width,
        text_length=text_length,
        learn_sigma=learn_sigma,
        num_frames=num_frames,
    )


def _pretrained(kind: Any, path: str, subfolder: str, *, allow_download: bool, **wanted: int) -> Any:
    """The saved model at `path`, itself or in its subfolder, whose config says what is wanted."""
    is_pipeline = not Path(path).is_dir() or (Path(path) / subfolder).is_dir()
    options = {"local_files_only": not allow_download, "use_safetensors": True, "low_cpu_mem_usage": False}
    try:
        net = kind.from_pretrained(path, subfolder=subfolder if is_pipeline else None, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path: no {kind.__name__} in safetensors form at '{path}': {first_line(error)};"
            f" {loading_advice(allow_download)}"
        ) from error
    for name, value in wanted.items():
        if int(_config(net, name)) != value:
            what = "num_frames" if name == "video_length" else "the text encoder's width"
            raise ValueError(f"the model at '{path}' has {name} {_config(net, name)}, wanted {what}, {value}")
    return net


def _is_meta() -> bool:
    """Whether modules are built without memory now: a description has the sizes given, and reads nothing."""
    return torch.empty(0).is_meta


def _checkpointed(net: Any, wanted: bool) -> None:
    if wanted:
        net.enable_gradient_checkpointing()


@torch.no_grad()
def _widen_input(net: Any, extra_channels: int) -> None:
    """Room for more input channels in the first convolution, whose new weights are zero."""
    old = net.conv_in
    new = nn.Conv2d(old.in_channels + extra_channels, old.out_channels, old.kernel_size, padding=old.padding)
    new.weight.zero_()
    new.weight[:, : old.in_channels].copy_(old.weight)
    cast(Tensor, new.bias).copy_(old.bias)
    net.conv_in = new
    net.register_to_config(in_channels=new.in_channels)


def _add_lora(net: Any, rank: int, targets: Sequence[str]) -> None:
    from peft import LoraConfig

    if rank < 0:
        raise ValueError(f"UNet needs lora_rank >= 0, got {rank}")
    net.requires_grad_(False)
    net.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))
    )


def _config(net: Any, name: str) -> Any:
    return net.config[name]


MODELS.register_module(name="PixArt", module=pixart)
MODELS.register_module(name="UNet", module=unet)
MODELS.register_module(name="LatteT2V", module=latte_t2v)
