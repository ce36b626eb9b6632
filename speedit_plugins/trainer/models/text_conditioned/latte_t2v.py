"""Latte for text-to-video. Source: Ma et al. 2024, arXiv:2401.03048."""

from typing import Any, cast

import torch
from einops import repeat
from torch import Tensor, nn

from speedit_plugins.registry import MODELS
from speedit_plugins.trainer.models.text_conditioned.routed import Routed
from speedit_plugins.trainer.models.text_conditioned.wrapper import is_on_meta, load_network
from speedit_plugins.trainer.shards import is_shard

# Every released Latte has these values; diffusers' class has other defaults.
_RELEASED: dict[str, Any] = {
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}


class LatteT2V(Routed):
    """The text-to-video transformer of Latte: diffusers' `LatteTransformer3DModel`.

    It also takes batches of images, as clips of one frame. Then only its spatial blocks run.
    The arguments that `PixArt` has too mean the same here.

    Args:
        num_frames: frames of a video, counted in latents.

    Raises:
        ValueError: there is no such network; it does not fit the text encoder, num_frames, the latents or
            learn_sigma.
    """

    # The first block across frames is given the positions of the frames. Every token needs them.
    earliest_route = 1

    def __init__(  # noqa: PLR0913 - flat, so that a config names each choice
        self,
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
    ) -> None:
        from diffusers import LatteTransformer3DModel as Net

        if path is None or is_on_meta():
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
                **_RELEASED,
            )
        else:
            wanted = {"caption_channels": text_width, "video_length": num_frames}
            net = load_network(Net, path, subfolder, allow_download=allow_download, **wanted)
        super().__init__(
            net,
            input_size=input_size,
            in_channels=in_channels,
            text_width=text_width,
            text_length=text_length,
            learn_sigma=learn_sigma,
            num_frames=num_frames,
            gradient_checkpointing=gradient_checkpointing,
        )

    @property
    def taken_frames(self) -> tuple[int, ...]:
        """Numbers of frames that a clip may have."""
        return tuple(sorted({1, cast(int, self.num_frames)}))

    def _predict(self, x: Tensor, timestep: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        num_frames = x.shape[2]
        if num_frames not in (1, self.num_frames):
            raise ValueError(f"the model takes clips of {self.num_frames} frames, or of 1, got {num_frames}")
        # diffusers repeats the tokens for every frame, but adds the mask to the logits as it is.
        bias = torch.zeros_like(mask, dtype=tokens.dtype).masked_fill(~mask, -10_000.0)
        output: Tensor = self.net(
            x,
            timestep=timestep,
            encoder_hidden_states=tokens,
            encoder_attention_mask=repeat(bias, "b l -> (b f) 1 l", f=num_frames),
            enable_temporal_attentions=num_frames > 1,
            return_dict=False,
        )[0]
        if num_frames == 1 and torch.is_grad_enabled():
            # DistributedDataParallel waits for a gradient of every parameter: temporal blocks get zeros. The
            # engine of fsdp2 does this by itself: outside of their block its parameters are shards.
            blocks = cast(nn.ModuleList, self.net.temporal_transformer_blocks)
            unused = [each for each in blocks.parameters() if not is_shard(each)]
            if unused:
                output = output + 0.0 * torch.stack([parameter.sum() for parameter in unused]).sum()
        return output


MODELS.register_module(name="LatteT2V", module=LatteT2V)
