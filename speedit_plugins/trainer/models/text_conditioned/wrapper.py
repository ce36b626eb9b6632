"""What the text-conditioned models share: a wrapper around a network of diffusers, and how it is loaded.

The trainer calls a model as `model(x, timestep, condition)`, and reads from its attributes which inputs it
takes. The condition of a text-conditioned model is a mapping of tensors: "tokens" (B, L, D) and "mask" (B, L)
describe the caption, and "extra" (B, E, ...), if the model takes it, is concatenated to x. A model that is
told the level of the noise in "extra" also gets "level" (B,). The network of diffusers is the attribute
`net`, so that the names of its parameters begin with "net.".

Dims: `B` batch, `C` latent channels, `E` extra channels, `F` frames, `h`, `w` sides of the latent, `L` tokens
of a caption, `D` width of the text encoder.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from speedit_plugins.trainer.models.interface import level_of, split_extra
from speedit_plugins.trainer.models.pretrained.saved_models import check_whole, reading

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
    is_told_level = False
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

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        condition: Mapping[str, Tensor] | None = None,
        *,
        hidden_after: int = 0,
    ) -> Any:
        """Prediction for a noised input.

        Args:
            x: (B, C, h, w); for a video model (B, C, F, h, w).
            timestep: (B,), integer or fractional.
            condition: see the docstring of the module.
            hidden_after: number of one of the `token_blocks`, counted from 1, whose output is wanted too; 0
                wants none.

        Returns:
            (B, C, ...), or with learn_sigma (B, 2C, ...). With `hidden_after` a pair of it and the tokens
            after that block, (B, [F,] N, D), D being the width of the network.

        Raises:
            ValueError: the condition is missing, or has features of another width.
        """
        if condition is None or condition["tokens"].shape[2] != self.text_width:
            got = "none" if condition is None else f"width {condition['tokens'].shape[2]}"
            raise ValueError(f"the model needs caption features of width {self.text_width}, got {got}")
        extra, _ = split_extra(condition, self.extra_channels)
        level = level_of(condition, is_told=self.is_told_level)
        told = {} if level is None else {"level": level}
        if extra is not None:
            x = torch.cat([x, extra.to(x.dtype)], dim=1)  # (B, C + E, ...)
        # The features are float32; a training plugin may keep the network in another type.
        tokens = condition["tokens"].to(next(self.net.parameters()).dtype)
        with _first_output(self.token_blocks, hidden_after) as found:
            output = self._predict(x.to(tokens.dtype), timestep, tokens, condition["mask"], **told)
        if not hidden_after:
            return output
        # Videos pass a block as a batch of frames.
        hidden = found[0] if self.num_frames is None else found[0].unflatten(0, (len(x), -1))
        return output, hidden

    @property
    def token_blocks(self) -> Sequence[nn.Module]:
        """The network's blocks on tokens, spatial ones of a video model; none of a UNet."""
        return cast(Sequence[nn.Module], getattr(self.net, "transformer_blocks", ()))

    def _predict(self, x: Tensor, timestep: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError


@contextmanager
def _first_output(blocks: Sequence[nn.Module], number: int) -> Iterator[list[Tensor]]:
    """Collects what block `number` returns inside, first of all. A checkpointed block runs a second time."""
    found: list[Tensor] = []
    if not number:
        yield found
        return
    hook = blocks[number - 1].register_forward_hook(lambda *call: found.append(call[2]))
    try:
        yield found
    finally:
        hook.remove()


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
