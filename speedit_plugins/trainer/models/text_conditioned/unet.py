"""The UNet of Stable Diffusion, for text-to-image and inpainting.

Source: Rombach et al. 2022, arXiv:2112.10752.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from speedit_plugins.registry import MODELS
from speedit_plugins.trainer.models.text_conditioned.wrapper import (
    TextConditioned,
    config_value,
    is_on_meta,
    load_network,
)


class UNet(TextConditioned):
    """The UNet of Stable Diffusion: diffusers' `UNet2DConditionModel`.

    The arguments that `PixArt` has too mean the same here.

    Args:
        extra_channels: channels for a mask and a masked latent, for inpainting, or for a low-resolution
            sample. A network at `path` without them gets a wider first convolution. Its new weights are zero:
            predictions start unchanged.
        block_out_channels: width of each level, finest first.
        layers_per_block: residual layers of each level.
        attention_head_dim: number of heads of each attention, which diffusers calls so.

    Attributes: `is_widened` says that the first convolution got such new channels.

    Raises:
        ValueError: there is no such network; it does not fit the text encoder, the latents or learn_sigma.
    """

    def __init__(  # noqa: PLR0913 - flat, so that a config names each choice
        self,
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
    ) -> None:
        from diffusers import UNet2DConditionModel as Net

        is_widened = False
        if path is None or is_on_meta():
            # Stable Diffusion attends on every level but the coarsest.
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
            net = load_network(
                Net, path, subfolder, allow_download=allow_download, cross_attention_dim=text_width
            )
            if extra_channels and int(config_value(net, "in_channels")) == in_channels:
                _widen_input(net, extra_channels)
                is_widened = True
        super().__init__(
            net,
            input_size=input_size,
            in_channels=in_channels,
            text_width=text_width,
            text_length=text_length,
            learn_sigma=learn_sigma,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.is_widened = is_widened

    @property
    def is_told_level(self) -> bool:  # type: ignore[override]  # a plain value in the other networks
        """Whether the condition has "level", the level of the noise in the extra channels."""
        return bool(config_value(self.net, "class_embed_type") == "timestep")

    def tell_level(self) -> None:
        """Adds an embedding of "level" in the condition, (B,) in [0, 1], to that of the timestep.

        It is diffusers' own, of `class_embed_type` "timestep". Its last layer is zero: predictions start
        unchanged.

        Raises:
            ValueError: the network embeds something else in its place, such as classes.
        """
        from diffusers.models.embeddings import TimestepEmbedding

        net = cast(Any, self.net)
        if self.is_told_level:
            return
        if net.class_embedding is not None:
            raise ValueError(
                "super_resolution tells the network the level of the noise by its class embedding, and this"
                " network embeds something else there; wanted class_embed_type null or timestep"
            )
        # The sizes of the timestep's own embedding.
        first, last = net.time_embedding.linear_1, net.time_embedding.linear_2
        net.class_embedding = TimestepEmbedding(first.in_features, last.out_features)
        nn.init.zeros_(net.class_embedding.linear_2.weight)
        nn.init.zeros_(net.class_embedding.linear_2.bias)
        net.register_to_config(class_embed_type="timestep")

    def _predict(
        self, x: Tensor, timestep: Tensor, tokens: Tensor, mask: Tensor, level: Tensor | None = None
    ) -> Tensor:
        output: Tensor = self.net(
            x,
            timestep,
            tokens,
            class_labels=level,
            encoder_attention_mask=mask.to(tokens.dtype),
            return_dict=False,
        )[0]
        return output


@torch.no_grad()
def _widen_input(net: Any, extra_channels: int) -> None:
    """Gives the first convolution more input channels, with weights of zero."""
    old = net.conv_in
    new = nn.Conv2d(old.in_channels + extra_channels, old.out_channels, old.kernel_size, padding=old.padding)
    new.weight.zero_()
    new.weight[:, : old.in_channels].copy_(old.weight)
    cast(Tensor, new.bias).copy_(old.bias)
    net.conv_in = new
    net.register_to_config(in_channels=new.in_channels)


MODELS.register_module(name="UNet", module=UNet)
