"""Dataset of latents and caption features that were encoded once and stored on disk.

Dims: `B` samples, `C` latent channels, `h` x `w` latent size, `L` caption tokens, `D` width of a token.
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
from speedit_plugins.trainer.data.identity import identify
from speedit_plugins.trainer.data.latents.shards import INDEX, TensorShards, read_index
from speedit_plugins.trainer.data.latents.source import CLASSES, IDENTITY, compare_with_source, speaks
from speedit_plugins.trainer.terminal import say

LATENTS = ("latent_mean", "latent_std")
FLIPPED = ("flipped_mean", "flipped_std")
# A teacher's features of the image, and of the mirrored one.
FEATURES, FLIPPED_FEATURES = "features", "flipped_features"
TEXT = ("text_tokens", "text_mask")
# Number of captions of a sample; stored only if some samples have several.
TEXT_COUNT = "text_count"
NULL_TEXT = "null_text.safetensors"
# Largest difference that counts as rounding, relative to the norm. An encoder in bfloat16 (8 bits) errs by a
# few hundredths; the features of another encoder differ by about the norm itself.
NULL_TEXT_ROUNDING = 0.1


class LatentCache:
    """Latents written by `tools/cache_latents.py`: the encoder's posterior of each image, already scaled.

    Attributes:
        num_classes: number of classes of the encoded dataset.
        classes: their names by number; empty if the dataset has none, or an earlier version wrote the cache.
        image_size: side of the encoded images in pixels.
        channels: C.
        encoder_fingerprint: `fingerprint()` of the encoder that wrote the cache.
        teacher_fingerprint: that of the teacher whose features the cache has; None if it has none.
        null_text: features of the empty caption, "tokens" (1, L, D) and "mask" (1, L); None without captions.
        text_encoder: config of the encoder that made the caption features; None without captions.

    Args:
        root: folder of the cache.
        image_size: expected side of the encoded images in pixels; None accepts any.
        class_cond: whether labels are expected to be classes; None accepts both.
        text: whether the cache is expected to have captions; None accepts both.
        random_flip: use the mirrored image's latents with probability 1/2; None does so if the cache has
            them.
        verify: compare the sha256 of every shard, which reads the whole cache. Sizes are always compared.
        check_source: compare the images and captions that the cache was made from, where they still are, with
            what they were. False trains from a cache whose data changed.
        teacher: also read a teacher's features of the images, which the cache must have.

    Raises:
        ValueError: there is no cache of latents, it is unfinished, a shard is missing or damaged, an
            expectation is not met, `random_flip` is True and the cache has no mirrored images, or the data
            that it was made from changed.
    """

    def __init__(  # noqa: PLR0913 - flat, because a config names each choice
        self,
        root: str | os.PathLike[str],
        *,
        image_size: int | None = None,
        class_cond: bool | None = None,
        text: bool | None = None,
        random_flip: bool | None = None,
        verify: bool = True,
        check_source: bool = True,
        teacher: bool = False,
    ) -> None:
        self._shards = TensorShards(root, verify=verify)
        index = self._shards.index
        missing = set(LATENTS) - set(index.tensors)
        if missing:
            raise ValueError(
                f"LatentCache needs the tensors {', '.join(sorted(missing))}, got {sorted(index.tensors)}"
                f" in {root}"
            )
        for key, value in (("image_size", image_size), ("class_cond", class_cond)):
            if value is not None and value != index.made_from[key]:
                raise ValueError(
                    f"the latents in {root} were made with {key} {index.made_from[key]}, wanted {key} {value}"
                )
        has_text = TEXT[0] in index.tensors
        if text is not None and text != has_text:
            found, wanted = ("captions" if has else "no captions" for has in (has_text, text))
            raise ValueError(f"the cache in {root} has {found}, wanted {wanted}")
        if teacher and FEATURES not in index.tensors:
            raise ValueError(
                f"alignment needs a teacher's features, and the cache in {root} has none; wanted a cache that"
                " tools/cache_latents.py --teacher wrote, or a dataset of images"
            )
        self._has_features = teacher
        self.folder = folder = Path(root).expanduser()
        notes = compare_with_source(folder, index.made_from, has_text=has_text) if check_source else []
        for note in notes if speaks() else ():
            say(note)
        self.null_text = _read_null_text(folder, index.made_from) if has_text else None
        self.text_encoder: dict[str, Any] | None = index.made_from.get("text_encoder")
        self._has_label, self._has_text = "label" in index.tensors, has_text
        self._has_several = TEXT_COUNT in index.tensors
        if random_flip and FLIPPED[0] not in index.tensors:
            raise ValueError(
                f"random_flip=True needs latents of mirrored images, got none in {root}; write them with"
                " tools/cache_latents.py --flip"
            )
        self.random_flip = FLIPPED[0] in index.tensors if random_flip is None else random_flip
        self.num_classes: int = index.made_from["num_classes"]
        self.classes: tuple[str, ...] = tuple(index.made_from.get(CLASSES, ()))
        self.image_size: int = index.made_from["image_size"]
        self.encoder_fingerprint: str = index.made_from["encoder_fingerprint"]
        self.teacher_fingerprint: str | None = index.made_from.get("teacher_fingerprint")
        self.channels: int = index.tensors[LATENTS[0]]["shape"][0]

    def __len__(self) -> int:
        return len(self._shards)

    def identity(self) -> dict[str, str]:
        """That of the data that the cache was made from, if it is known, and a digest of the shards."""
        index = self._shards.index
        shards = identify(latents=[shard.sha256 for shard in index.shards])
        return {**index.made_from.get(IDENTITY, {}), **shards}

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample: "latent_mean" and "latent_std", float32 (C, h, w).

        Depending on the cache it also has "label" int, and "text_tokens" float32 (L, D) with "text_mask" bool
        (L,), and "features" float32 (D, h', w').

        `generator` decides the flip, then which caption if there are several. It is used exactly as in
        `ImageFolder` and `ImageCaptions`, so the choices are the same as without a cache.
        """
        flip = self.random_flip and bool(torch.rand((), generator=generator) < 0.5)
        names = dict(zip(LATENTS, FLIPPED if flip else LATENTS, strict=True))
        if self._has_features:
            names[FEATURES] = FLIPPED_FEATURES if flip else FEATURES
        if self._has_label:
            names["label"] = "label"
        if self._has_text:
            names |= zip(TEXT, text_names(self._pick_caption(index, generator)), strict=True)
        sample = self._shards.load(index, tuple(names.values()))
        found: dict[str, Any] = {}
        for name, stored in names.items():
            value = sample[stored]
            found[name] = int(value) if name == "label" else value if name == TEXT[1] else value.float()
        return found

    def _pick_caption(self, index: int, generator: torch.Generator) -> int:
        count = int(self._shards.load(index, (TEXT_COUNT,))[TEXT_COUNT]) if self._has_several else 1
        return int(torch.randint(count, (), generator=generator)) if count > 1 else 0


def sample_latents(mean: Tensor, std: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One sample of each cached posterior, (B, C, h, w): mean + std * noise.

    With the same generators and the same posterior, this equals the encoder's `encode` bit for bit. Latents
    from a cache may still differ from freshly encoded ones: the cache's dtype rounds, and the last bits of
    some encoders depend on which images share a batch.

    Args:
        mean: (B, C, h, w).
        std: (B, C, h, w).
        generators: one per sample.

    Raises:
        ValueError: the number of generators is not B.
    """
    if len(generators) != len(mean):
        raise ValueError(f"sample_latents needs one generator per sample, {len(mean)}, got {len(generators)}")
    # Generated on the generator's device, as in diffusers.
    noise = [
        torch.randn((1, *mean.shape[1:]), generator=each, device=each.device, dtype=mean.dtype)
        for each in generators
    ]
    return mean + std * torch.cat(noise).to(mean.device)


def text_names(number: int) -> tuple[str, str]:
    """Tensor names of the features and the mask of caption `number`, counted from 0.

    Each caption has its own tensors, so that only the chosen caption is read from disk.
    """
    tokens, mask = TEXT
    return (f"{tokens}_{number}", f"{mask}_{number}") if number else TEXT


def null_text_file(folder: Path, features: Mapping[str, Tensor]) -> bytes:
    """Contents of the file with the empty caption's features, for the cache in `folder`.

    A file that is already there is kept if its features equal the new ones up to rounding. Another device or
    batch size changes an encoder's last bits, and that alone must not make a cache count as a different one.
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
        raise ValueError(f"the cache's {path} is missing or damaged: its sha256 differs from the index")
    return load_file(path)


def _is_whole(path: Path, made_from: Mapping[str, Any]) -> bool:
    return path.is_file() and sha256_of(path) == made_from.get("null_text_sha256")


def _are_alike(features: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    tokens, others_tokens = features["tokens"], others["tokens"]
    if tokens.shape != others_tokens.shape or not torch.equal(features["mask"], others["mask"]):
        return False
    return bool((tokens - others_tokens).norm() <= NULL_TEXT_ROUNDING * others_tokens.norm())


DATASETS.register_module(name="LatentCache", module=LatentCache)
