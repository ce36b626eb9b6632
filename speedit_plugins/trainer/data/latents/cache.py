"""Samples encoded once: the dataset of cached latents, and of the features of their captions.

Dims: `B` samples, `C` latent channels, `h`, `w` edges of the latent, `L`, `D` tokens and width of a caption.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from speedit_plugins.files import sha256_of
from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.data.latents.shards import INDEX, TensorShards, read_index

LATENTS = ("latent_mean", "latent_std")
FLIPPED = ("flipped_mean", "flipped_std")
TEXT = ("text_tokens", "text_mask")
# How many captions a sample has, in a cache where some have several.
TEXT_COUNT = "text_count"
NULL_TEXT = "null_text.safetensors"
# Largest deviation that is taken for rounding, as a share of the norm: bfloat16 keeps 8 bits, and layers of
# such sums lose some hundredths; another encoder's features deviate by about the norm itself.
NULL_TEXT_ROUNDING = 0.1


class LatentCache:
    """Latents that `tools/cache_latents.py` wrote: what the encoder would give for each image, scaled.

    Attributes: `num_classes` and `image_size` are those of the encoded dataset, `channels` is C,
    `encoder_fingerprint` is `fingerprint()` of the encoder that wrote it, `null_text` the features of the
    empty caption, "tokens" (1, L, D) and "mask" (1, L), or None of a cache without captions; `text_encoder`
    is the config of what made them.

    Args:
        root: the folder.
        image_size: side of the encoded images in pixels, to be checked; None takes the cache's.
        class_cond: whether labels are classes, to be checked; None takes the cache's.
        text: whether it has captions, to be checked; None takes what there is.
        random_flip: the mirrored image's latents with probability 1/2; None where the cache has them.
        verify: compare the sha256 of every shard, which reads all of them; sizes are always compared.

    Raises:
        ValueError: no cache of latents, an unfinished one, a shard that is missing or damaged, another
            `image_size` or `class_cond`, `random_flip` without mirrored images in it.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        image_size: int | None = None,
        class_cond: bool | None = None,
        text: bool | None = None,
        random_flip: bool | None = None,
        verify: bool = True,
    ) -> None:
        self._shards = TensorShards(root, verify=verify)
        index = self._shards.index
        missing = set(LATENTS) - set(index.tensors)
        if missing:
            raise ValueError(
                f"LatentCache needs {', '.join(sorted(missing))}, got {sorted(index.tensors)} in {root}"
            )
        for key, value in (("image_size", image_size), ("class_cond", class_cond)):
            if value is not None and value != index.made_from[key]:
                raise ValueError(
                    f"the latents in {root} were made with {key} {index.made_from[key]}, got {key} {value}"
                )
        has_text = TEXT[0] in index.tensors
        if text is not None and text != has_text:
            found, wanted = ("captions" if has else "none" for has in (has_text, text))
            raise ValueError(f"the cache in {root} was asked for captions: got {found}, wanted {wanted}")
        self.null_text = _read_null_text(Path(root).expanduser(), index.made_from) if has_text else None
        self.text_encoder: dict[str, Any] | None = index.made_from.get("text_encoder")
        self._has_label, self._has_text = "label" in index.tensors, has_text
        self._has_several = TEXT_COUNT in index.tensors
        if random_flip and FLIPPED[0] not in index.tensors:
            raise ValueError(
                f"random_flip=True needs mirrored images, got none in {root}; tools/cache_latents.py --flip"
                " writes them"
            )
        self.random_flip = FLIPPED[0] in index.tensors if random_flip is None else random_flip
        self.num_classes: int = index.made_from["num_classes"]
        self.image_size: int = index.made_from["image_size"]
        self.encoder_fingerprint: str = index.made_from["encoder_fingerprint"]
        self.channels: int = index.tensors[LATENTS[0]]["shape"][0]

    def __len__(self) -> int:
        return len(self._shards)

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample: "latent_mean" and "latent_std" float32 (C, h, w), and what it has of "label" int,
        "text_tokens" float32 (L, D) and "text_mask" bool (L,).

        `generator` decides the flip, then which of several captions, by the draws with which `ImageFolder`
        and `ImageCaptions` decide them.
        """
        flip = self.random_flip and bool(torch.rand((), generator=generator) < 0.5)
        names = dict(zip(LATENTS, FLIPPED if flip else LATENTS, strict=True))
        if self._has_label:
            names["label"] = "label"
        if self._has_text:
            names |= zip(TEXT, text_names(self._draw_caption(index, generator)), strict=True)
        sample = self._shards.load(index, tuple(names.values()))
        found: dict[str, Any] = {}
        for name, stored in names.items():
            value = sample[stored]
            found[name] = int(value) if name == "label" else value if name == TEXT[1] else value.float()
        return found

    def _draw_caption(self, index: int, generator: torch.Generator) -> int:
        count = int(self._shards.load(index, (TEXT_COUNT,))[TEXT_COUNT]) if self._has_several else 1
        return int(torch.randint(count, (), generator=generator)) if count > 1 else 0


def sample_latents(mean: Tensor, std: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """A sample (B, C, h, w) of each cached posterior: mean + std * noise.

    For one `posterior` of the encoder, the same generators give what its `encode` gives, bit for bit. A cache
    adds the rounding of its dtype, and of an encoder whose last bits depend on which images share its batch.

    Args:
        mean: (B, C, h, w).
        std: (B, C, h, w).
        generators: one per sample.

    Raises:
        ValueError: the number of generators is not B.
    """
    if len(generators) != len(mean):
        raise ValueError(f"sample_latents needs one generator per sample, {len(mean)}, got {len(generators)}")
    # Drawn where the generator lives, as diffusers does it.
    noise = [
        torch.randn((1, *mean.shape[1:]), generator=each, device=each.device, dtype=mean.dtype)
        for each in generators
    ]
    return mean + std * torch.cat(noise).to(mean.device)


def text_names(number: int) -> tuple[str, str]:
    """The cache's names of the features and the mask of a sample's caption `number`, from 0.

    A tensor for each: what is read of a sample is what is drawn.
    """
    tokens, mask = TEXT
    return (f"{tokens}_{number}", f"{mask}_{number}") if number else TEXT


def null_text_file(folder: Path, features: Mapping[str, Tensor]) -> bytes:
    """What the file of the empty caption's features holds in the cache at `folder`, begun or not.

    What it has of them already stays where they say the same but for rounding: on another device, or in
    another batch, an encoder gives other last bits, which make no other cache.
    """
    fresh = {name: value.cpu().contiguous() for name, value in features.items()}
    if (folder / INDEX).is_file():
        made_from = read_index(folder).made_from
        if _is_whole(folder / NULL_TEXT, made_from) and _are_alike(load_file(folder / NULL_TEXT), fresh):
            return (folder / NULL_TEXT).read_bytes()
    return save(fresh)


def _read_null_text(folder: Path, made_from: Mapping[str, Any]) -> dict[str, Tensor]:
    path = folder / NULL_TEXT
    if not _is_whole(path, made_from):
        raise ValueError(f"the cache's {path} is missing or damaged; wanted the file that the index names")
    return load_file(path)


def _is_whole(path: Path, made_from: Mapping[str, Any]) -> bool:
    return path.is_file() and sha256_of(path) == made_from.get("null_text_sha256")


def _are_alike(features: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    tokens, others_tokens = features["tokens"], others["tokens"]
    if tokens.shape != others_tokens.shape or not torch.equal(features["mask"], others["mask"]):
        return False
    return bool((tokens - others_tokens).norm() <= NULL_TEXT_ROUNDING * others_tokens.norm())


DATASETS.register_module(name="LatentCache", module=LatentCache)
