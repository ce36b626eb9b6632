"""Reads the samples whose spectrum `speedit-spectrum` measures, as the model sees them.

A source is a folder of images, a folder that `tools/cache_latents.py` wrote, or a file of latents or images.
Arrays in .npy, .npz and .pt files need torch and numpy alone. The rest needs the trainer's packages.

Dims: N samples, B samples of a batch, C channels, H x W pixels, h x w size of a latent.
"""

import pickle
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from speedit_plugins.files import pickle_fault

if TYPE_CHECKING:
    from PIL.Image import Image

    from speedit_plugins.trainer.models.pretrained.autoencoder import Autoencoder

NUM_SAMPLES = 1024
# So many values take 1.25 GiB: once as float32 and twice as float64. 341 images of 256 x 256 pixels have
# them.
MAX_VALUES = 2**26
_BATCH_SIZE = 32
_DAMAGED = (
    ValueError,
    TypeError,
    RuntimeError,
    EOFError,
    KeyError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


# What is said about an argument that a kind of source does not use.
_WITHOUT_EFFECT = {
    "file": {
        "image_size": "--image-size crops images of a folder and has no effect on the file {source}",
        "grey": "--grey reads images of a folder and has no effect on the file {source}",
    },
    "cache": {
        "key": "--key names an array of a file and has no effect on the folder {source}",
        "encoder": "--encoder needs images, got cached latents in {source}",
        "image_size": "--image-size crops images and has no effect on the cached latents in {source}",
        "grey": "--grey reads images and has no effect on the cached latents in {source}",
    },
    "images": {"key": "--key names an array of a file and has no effect on the folder {source}"},
}


@dataclass(frozen=True)
class Samples:
    """Samples as the model sees them.

    Args:
        values: float32 (N, C, h, w), or of another shape (N, ...) from a file.
        num_found: number of samples in the source, >= N.
        what: "images" or "latents"; "samples" if a file does not say which.
    """

    values: Tensor
    num_found: int
    what: str


@dataclass(frozen=True)
class Choice:
    """Which samples of a source are read.

    Args:
        num_samples: how many, >= 2. None takes `NUM_SAMPLES`, and fewer where these have more than
            `MAX_VALUES` values.
        seed: decides which ones, and the draws of an autoencoder.
    """

    num_samples: int | None = None
    seed: int = 0

    def indices(self, num_found: int) -> list[int]:
        """Indices in [0, num_found), without repeats, in random order."""
        order = torch.randperm(num_found, generator=torch.Generator().manual_seed(self.seed))
        return cast(list[int], order[: self.num_samples or NUM_SAMPLES].tolist())

    def gathered(self, batches: Iterable[Tensor]) -> Tensor:
        """The batches (B, ...) as one tensor (N, ...), read until there are enough."""
        parts: list[Tensor] = []
        num_values = 0
        for batch in batches:
            parts.append(batch.float())
            num_values += batch.numel()
            if self.num_samples is None and num_values >= MAX_VALUES:
                break
        return torch.cat(parts)

    def generators(self, rows: Sequence[int]) -> list[torch.Generator]:
        """One generator for each sample, the same whatever else is in the batch."""
        from speedit_plugins.trainer.data.loader import NOISE_STREAM, stream_seed

        return [torch.Generator().manual_seed(stream_seed(self.seed, NOISE_STREAM, row)) for row in rows]


def read_samples(
    source: Path,
    choice: Choice,
    *,
    image_size: int | None = None,
    encoder: "Autoencoder | None" = None,
    key: str | None = None,
    grey: bool = False,
) -> Samples:
    """Samples of a folder or a file.

    Args:
        source: a folder of images, a folder of cached latents, or a .npy, .npz, .pt, .pth or .safetensors
            file.
        choice: which samples.
        image_size: crop images to this square, as `ImageFolder` does. None takes images of one size as they
            are.
        encoder: encodes images to latents; a file then has images (N, C, H, W) in [-1, 1].
        key: name of the array in a file that has several.
        grey: read the images of a folder as one channel, their luminance, and not as RGB.

    Raises:
        ValueError: no such source, a damaged file, integers, images of different sizes, an argument that has
            no effect on this source, or `grey` beside an encoder.
        OSError: a file cannot be read.
    """
    if not source.exists():
        raise ValueError(f"wanted a folder of images, a folder of cached latents or a file, got no {source}")
    is_cache = (source / "index.json").is_file() and any(source.glob("shard_*.safetensors"))
    kind = "file" if not source.is_dir() else "cache" if is_cache else "images"
    given = {"image_size": image_size, "encoder": encoder, "key": key, "grey": grey or None}
    for name, message in _WITHOUT_EFFECT[kind].items():
        if given[name] is not None:
            raise ValueError(message.format(source=source))
    if grey and encoder is not None:
        raise ValueError("--encoder takes RGB images: leave out --grey")
    if kind == "file":
        return _of_file(source, choice, encoder, key)
    if kind == "cache":
        return _of_cache(source, choice)
    return _of_images(source, choice, image_size, encoder, grey=grey)


def _of_images(
    root: Path, choice: Choice, image_size: int | None, encoder: "Autoencoder | None", *, grey: bool
) -> Samples:
    """Images below a folder at any depth, and their latents if there is an encoder."""
    from speedit_plugins.trainer.data.images.fit import center_crop
    from speedit_plugins.trainer.data.images.folder import ImageFolder
    from speedit_plugins.trainer.data.images.pixels import as_tensor, read_rgb
    from speedit_plugins.trainer.terminal import progress

    # Without an image size, the folder only lists the files.
    folder = ImageFolder(root, image_size=image_size or 1, class_cond=False, random_flip=False)
    chosen = choice.indices(len(folder))
    first: tuple[tuple[int, int], Path] | None = None

    def image(row: int) -> Tensor:
        found = read(row)
        return as_tensor(found.convert("L").convert("RGB"))[:1] if grey else as_tensor(found)

    def read(row: int) -> "Image":
        nonlocal first
        path = folder.path(row)
        found = read_rgb(path)
        if image_size is not None:
            return center_crop(found, image_size, image_size)
        first = first or (found.size, path)
        if found.size != first[0]:
            sizes = [f"{width} x {height} in {name}" for (width, height), name in (first, (found.size, path))]
            raise ValueError(
                f"wanted images of one size, or --image-size N to crop them, got {' and '.join(sizes)}"
            )
        return found

    def batches() -> Iterator[Tensor]:
        with ExitStack() as stack:
            # In a log file there is nothing but the report, or the line of an error.
            is_watched = sys.stderr.isatty()
            bar = stack.enter_context(progress("reading", total=len(chosen))) if is_watched else None
            for rows in _split(chosen):
                yield _encoded(encoder, torch.stack([image(row) for row in rows]), choice.generators(rows))
                if bar is not None:
                    bar.update(len(rows))

    what = "images" if encoder is None else "latents"
    return Samples(choice.gathered(batches()), len(folder), what)


def _of_cache(root: Path, choice: Choice) -> Samples:
    """One draw from each cached posterior, as in training."""
    from speedit_plugins.trainer.data.latents.cache import LATENTS, LatentCache, sample_latents

    cache = LatentCache(root, random_flip=False, verify=False, check_source=False)

    def batches() -> Iterator[Tensor]:
        for rows in _split(choice.indices(len(cache))):
            samples = [cache.load(row, torch.Generator()) for row in rows]
            mean, std = (torch.stack([sample[name] for sample in samples]) for name in LATENTS)
            yield sample_latents(mean, std, choice.generators(rows))

    return Samples(choice.gathered(batches()), len(cache), "latents")


def _of_file(path: Path, choice: Choice, encoder: "Autoencoder | None", key: str | None) -> Samples:
    array = _picked(_arrays(path), key, path)
    if not array.dtype.is_floating_point:
        raise ValueError(
            f"wanted floating-point samples, scaled as the model sees them, got {array.dtype} in {path};"
            " images of 0 to 255 are scaled by x / 127.5 - 1"
        )
    if array.ndim < 2:
        raise ValueError(f"wanted samples (N, ...), got shape {tuple(array.shape)} in {path}")
    chosen = choice.indices(len(array))

    def batches() -> Iterator[Tensor]:
        for rows in _split(chosen):
            batch = array[rows].float()
            if encoder is None:
                yield batch
                continue
            if (batch.abs() > 1).any():
                raise ValueError(
                    f"--encoder needs images in [-1, 1], got {batch.min():g} to {batch.max():g} in {path}"
                )
            yield _encoded(encoder, batch, choice.generators(rows))

    what = "samples" if encoder is None else "latents"
    return Samples(choice.gathered(batches()), len(array), what)


def _split(indices: Sequence[int]) -> Iterator[Sequence[int]]:
    # `gathered` needs a batch, and `DataSpectrum` says what is wrong with too few samples.
    yield from (indices[i : i + _BATCH_SIZE] for i in range(0, max(len(indices), 1), _BATCH_SIZE))


def _encoded(encoder: "Autoencoder | None", images: Tensor, generators: list[torch.Generator]) -> Tensor:
    """A sample of the latents (B, C, h, w) on the CPU; the images themselves without an encoder."""
    if encoder is None:
        return images
    return encoder.encode(images.to(encoder.model.device), generators).cpu()


def _picked(arrays: Mapping[str, Tensor], key: str | None, path: Path) -> Tensor:
    """The array under `key`. Without a key the only array, or the only one that can be latents or images."""
    if key is not None and key in arrays:
        return arrays[key]
    likely = [array for array in arrays.values() if array.ndim > 1 and array.dtype.is_floating_point]
    if key is None and 1 in (len(arrays), len(likely)):
        return (list(arrays.values()) if len(arrays) == 1 else likely)[0]
    found = ", ".join(f"{name or 'one without a name'} {tuple(a.shape)}" for name, a in arrays.items())
    wanted = "--key NAME for one of its arrays" if key is None else f"an array {key!r}"
    raise ValueError(f"wanted {wanted} in {path}, got {found or 'no array'}")


def _arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of a file by name, "" for one without a name."""
    load = _LOADERS.get(path.suffix.lower())
    if load is None:
        raise ValueError(f"wanted a file that ends in {', '.join(_LOADERS)}, or a folder, got {path}")
    try:
        return load(path)
    except _DAMAGED as error:
        raise ValueError(f"cannot read {path}: {type(error).__name__}: {pickle_fault(error)}") from None


def _of_npy(path: Path) -> dict[str, Tensor]:
    # Copy on write: torch warns about memory that cannot be written to.
    return {"": torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))}


def _of_npz(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as archive:
        # Text has no tensor.
        arrays = {name: archive[name] for name in archive.files}
        return {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind in "biuf"}


def _of_pt(path: Path) -> dict[str, Tensor]:
    found: Any = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(found, Mapping):
        return {str(name): each for name, each in found.items() if isinstance(each, Tensor)}
    if isinstance(found, Tensor):
        return {"": found}
    raise ValueError(f"wanted a tensor or a mapping of tensors, got {type(found).__name__}")


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


_LOADERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".npy": _of_npy,
    ".npz": _of_npz,
    ".pt": _of_pt,
    ".pth": _of_pt,
    ".safetensors": _of_safetensors,
}
