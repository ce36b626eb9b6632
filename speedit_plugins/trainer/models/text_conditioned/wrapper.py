"""What the text-conditioned models share: a wrapper around a network of diffusers, and how it is loaded.

The trainer calls a model as `model(x, timestep, condition)`, and reads from its attributes which inputs it
takes. The condition of a text-conditioned model is a mapping of tensors: "tokens" (B, L, D) and "mask" (B, L)
describe the caption, and "extra" (B, E, ...), if the model takes it, is concatenated to x. The network of
diffusers is the attribute `net`, so that the names of its parameters begin with "net.".

Dims: `B` batch, `C` latent channels, `E` extra channels, `F` frames, `h`, `w` sides of the latent, `L` tokens
of a caption, `D` width of the text encoder.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from speedit_plugins.trainer.models.interface import split_extra
from speedit_plugins.trainer.models.saved_models import check_whole, reading

# What the config calls the sizes that a saved network must share with it.
_ORIGINS = {"video_length": "num_frames of the config"}


class TextConditioned(nn.Module):
    """A network of diffusers that reads captions, with the features of the empty caption beside it.

    Training replaces a dropped caption by the empty one, and guided sampling compares with it.

    Attributes: `in_channels` is C, `extra_channels` is E, `num_frames` is F or, for images, None.
    `num_tokens` is the number of patches of a sample, or of latent cells if the network has no patches.

    Args:
        net: the network; it takes C + E channels.
        input_size: h and w.
        in_channels: C.
        text_width: D.
        text_length: L.
        learn_sigma: the network returns 2C channels, not C.
        num_frames: F of a video model; None for images.
        gradient_checkpointing: recompute activations in the backward pass.

    Raises:
        ValueError: the network does not return the channels that in_channels and learn_sigma ask for.
    """

    num_classes, null_label = 0, None
    # What gets LoRA's adapters, and the layers in it that get them if the config names none.
    adapted_part, lora_targets = "net", ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(  # noqa: PLR0913 - what a subclass knows about its network
        self,
        net: nn.Module,
        *,
        input_size: int,
        in_channels: int,
        text_width: int,
        text_length: int,
        learn_sigma: bool,
        num_frames: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        if gradient_checkpointing:
            cast(Any, net).enable_gradient_checkpointing()
        self.gradient_checkpointing = gradient_checkpointing
        self.input_size, self.in_channels, self.num_frames = input_size, in_channels, num_frames
        self.extra_channels = int(config_value(net, "in_channels")) - in_channels
        # A UNet has no patches.
        self.patch_size = int(cast(Any, net).config.get("patch_size") or 1)
        self.num_tokens = (num_frames or 1) * (input_size // self.patch_size) ** 2
        self.text_width, self.text_length, self.learn_sigma = text_width, text_length, learn_sigma
        self.out_channels = int(config_value(net, "out_channels"))
        wanted = in_channels * (2 if learn_sigma else 1)
        if self.out_channels != wanted:
            raise ValueError(
                f"the network returns {self.out_channels} channels, wanted {wanted} for latents of"
                f" {in_channels} channels with learn_sigma {str(learn_sigma).lower()}"
            )
        self.register_buffer("null_tokens", torch.zeros(1, text_length, text_width))
        self.register_buffer("null_mask", torch.zeros(1, text_length, dtype=torch.bool))

    @property
    def null_text(self) -> dict[str, Tensor]:
        """Features of the empty caption: "tokens" (1, L, D) and "mask" (1, L)."""
        return {"tokens": self.get_buffer("null_tokens"), "mask": self.get_buffer("null_mask")}

    def set_null_text(self, features: Mapping[str, Tensor]) -> None:
        """Copies in the features of the empty caption. The state dict contains them."""
        for name, stored in self.null_text.items():
            stored.copy_(features[name])

    def forward(self, x: Tensor, timestep: Tensor, condition: Mapping[str, Tensor] | None = None) -> Tensor:
        """Prediction for a noised input.

        Args:
            x: (B, C, h, w); for a video model (B, C, F, h, w).
            timestep: (B,), integer or fractional.
            condition: see the docstring of the module.

        Returns:
            (B, C, ...), or with learn_sigma (B, 2C, ...).

        Raises:
            ValueError: the condition is missing, or has features of another width.
        """
        if condition is None or condition["tokens"].shape[2] != self.text_width:
            got = "none" if condition is None else f"width {condition['tokens'].shape[2]}"
            raise ValueError(f"the model needs caption features of width {self.text_width}, got {got}")
        extra, _ = split_extra(condition, self.extra_channels)
        if extra is not None:
            x = torch.cat([x, extra.to(x.dtype)], dim=1)  # (B, C + E, ...)
        # The features are float32; a training plugin may keep the network in another type.
        tokens = condition["tokens"].to(next(self.net.parameters()).dtype)
        return self._predict(x.to(tokens.dtype), timestep, tokens, condition["mask"])

    def _predict(self, x: Tensor, timestep: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError


def load_network(kind: Any, path: str, subfolder: str, *, allow_download: bool, **wanted: int) -> Any:
    """The saved network of a class of diffusers.

    Args:
        kind: the class, with diffusers' `from_pretrained`.
        path: folder of the network or of a pipeline that contains it, or the hub name of a pipeline.
        subfolder: folder of the network inside a pipeline.
        allow_download: fetch a hub name; otherwise only files of this machine are read.
        wanted: values that the network's own config must have.

    Raises:
        ValueError: there is no such network, a weight is missing or not finite, or its config has another
            value.
    """
    folder = Path(path).expanduser()
    # The folder of the network itself has its config; any other folder is a pipeline's.
    is_pipeline = not (folder / "config.json").is_file() or (folder / subfolder).is_dir()
    options = {"local_files_only": not allow_download, "use_safetensors": True, "low_cpu_mem_usage": False}
    inside = subfolder if is_pipeline else ""
    what = f"model.path: no {kind.__name__} in safetensors form"
    with reading(what, path, inside, allow_download=allow_download) as found:
        net, info = kind.from_pretrained(found, subfolder=inside or None, output_loading_info=True, **options)
    check_whole(net, info, path)
    for name, value in wanted.items():
        if int(config_value(net, name)) != value:
            origin = _ORIGINS.get(name, "width of the text encoder")
            raise ValueError(
                f"the model at '{path}' has {name} {config_value(net, name)}, wanted {value}, the {origin}"
            )
    return net


def is_on_meta() -> bool:
    """Whether modules built now get no memory: the model then only describes sizes, and reads no file."""
    return torch.empty(0).is_meta


def config_value(net: Any, name: str) -> Any:
    """A value of the config that a network of diffusers carries."""
    return net.config[name]
