"""PixArt-alpha, a text-to-image transformer. Source: Chen et al. 2023, arXiv:2310.00426."""

from torch import Tensor

from speedit_plugins.registry import MODELS
from speedit_plugins.trainer.models.text_conditioned.routed import Routed
from speedit_plugins.trainer.models.text_conditioned.wrapper import is_on_meta, load_network


class PixArt(Routed):
    """The transformer of PixArt-alpha: diffusers' `PixArtTransformer2DModel`.

    Args:
        input_size: height and width of the latents. It may differ from the size that a network at `path` was
            trained on.
        in_channels: channels of the latents.
        text_width: width of the text encoder.
        text_length: tokens of a caption after padding.
        learn_sigma: predict the variance too.
        patch_size: side of a patch.
        num_layers: number of blocks.
        num_heads: heads of each attention.
        head_dim: width of a head.
        path: folder of a saved network or of a pipeline, or the hub name of a pipeline. The network is read
            from it and keeps its own sizes. None builds a new network of the sizes given here.
        allow_download: fetch a hub name; otherwise only files of this machine are read.
        subfolder: folder of the network inside a pipeline.
        gradient_checkpointing: recompute activations in the backward pass.

    Raises:
        ValueError: there is no such network; it reads the image's size; or it does not fit the text encoder,
            the latents or learn_sigma.
    """

    def __init__(  # noqa: PLR0913 - flat, so that a config names each choice
        self,
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
    ) -> None:
        from diffusers import PixArtTransformer2DModel as Net

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
                use_additional_conditions=False,
                caption_channels=text_width,
            )
        else:
            net = load_network(
                Net, path, subfolder, allow_download=allow_download, caption_channels=text_width
            )
            if net.use_additional_conditions:
                raise ValueError(
                    f"the model at '{path}' reads the image's size, but training gives none; wanted a model"
                    " with use_additional_conditions false, unlike PixArt's model for 1024 x 1024 pixels"
                )
        super().__init__(
            net,
            input_size=input_size,
            in_channels=in_channels,
            text_width=text_width,
            text_length=text_length,
            learn_sigma=learn_sigma,
            gradient_checkpointing=gradient_checkpointing,
        )

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


MODELS.register_module(name="PixArt", module=PixArt)
