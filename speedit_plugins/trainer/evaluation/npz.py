"""Sample sets in the ADM format: an `.npz` whose `arr_0` is uint8 (N, H, W, C), as its evaluation reads it.

Its reference files also have the statistics of more images than they hold: `mu`, `sigma`, `mu_s`, `sigma_s`.

Dims: N images, B of them in a chunk, H x W pixels, C channels, D features.
"""

import contextlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speedit_plugins.files import replacing

Images = NDArray[np.uint8] | Tensor
# Damage as numpy and zipfile report it; ValueError includes an array that only pickle could read.
READ_ERRORS = (ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def write_npz(
    path: str | os.PathLike[str], images: Images | Iterable[Images], *, num_images: int | None = None
) -> None:
    """Writes `images` as `arr_0`; the file appears complete or not at all.

    Args:
        path: an earlier file is replaced.
        images: uint8 (N, H, W, C), or an iterable of chunks (B, H, W, C), of which one is held at a time.
        num_images: N, needed for chunks: the format states it before the first pixel.

    Raises:
        ValueError: wrong dtype or shape, chunks of different image shapes, or not `num_images` images in all.
        OSError: the file cannot be written; names it. An earlier file at `path` is intact.
    """
    chunks: Iterable[Images]
    if isinstance(images, np.ndarray | Tensor):
        if num_images is not None and num_images != len(images):
            raise ValueError(f"num_images={num_images}, got an array of {len(images)} images")
        num_images, chunks = len(images), [images]
    else:
        chunks = images
    if num_images is None:
        raise ValueError("write_npz needs num_images when the images come in chunks, got None")
    if num_images < 1:
        raise ValueError(f"write_npz needs at least one image, got {num_images}")
    with (
        replacing(Path(path)) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
        # zipfile does not know the size in advance, and 50,000 images of 256 x 256 are 9.8 GB.
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        _write_array(member, chunks, num_images)


def read_npz(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """The images of an ADM-format file, uint8 (N, H, W, C), N >= 1.

    Raises:
        ValueError: the file is damaged, has no `arr_0`, or one of another dtype or shape, or of objects.
        OSError: there is no such file, or it cannot be read.
    """
    with _reading(path):
        with _loaded(path) as archive:
            if "arr_0" not in archive.files:
                raise ValueError(f"no arr_0 in it, only {sorted(archive.files)}")
            images = archive["arr_0"]
        if not isinstance(images, np.ndarray):
            raise ValueError("arr_0 in it is no array")
    return _checked(images, what=f"arr_0 in {os.fspath(path)}")


def npz_keys(path: str | os.PathLike[str]) -> list[str]:
    """The names of the arrays in the file, none of which is read.

    Raises:
        ValueError: the file is damaged or no npz.
        OSError: there is no such file, or it cannot be read.
    """
    with _reading(path), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def npz_shape(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """(N, H, W, C) of an ADM-format file, from its header.

    Raises:
        ValueError, OSError: as `read_npz`.
    """
    with _reading(path), _opened_images(path) as (_, shape):
        return shape


def npz_batches(path: str | os.PathLike[str], batch_size: int) -> Iterator[NDArray[np.uint8]]:
    """The images of an ADM-format file in order, at most `batch_size` (B, H, W, C) held at a time.

    Raises:
        ValueError, OSError: as `read_npz`; of a damaged file perhaps after the first batches.
    """
    with _reading(path), _opened_images(path) as (member, shape):
        for start in range(0, shape[0], batch_size):
            part = (min(batch_size, shape[0] - start), *shape[1:])
            content = member.read(math.prod(part))
            if len(content) < math.prod(part):
                raise EOFError(f"arr_0 in it ends before image {start + part[0]} of {shape[0]}")
            # A copy, since what is read from a file cannot be written to, which torch warns of.
            yield np.frombuffer(content, dtype=np.uint8).reshape(part).copy()


def read_statistics(path: str | os.PathLike[str], *, spatial: bool = False) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D), float64, that a reference file has of its features, or spatial ones.

    Raises:
        ValueError: it has none, or they are no mean and covariance.
        OSError: there is no such file, or it cannot be read.
    """
    names = ("mu_s", "sigma_s") if spatial else ("mu", "sigma")
    with _reading(path), _loaded(path) as archive:
        mean, covariance = (torch.from_numpy(archive[name].astype(np.float64)) for name in names)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{' and '.join(names)} in {os.fspath(path)} must be (D,) and (D, D), got"
            f" {tuple(mean.shape)} and {tuple(covariance.shape)}"
        )
    return mean, covariance


def _loaded(path: str | os.PathLike[str]) -> np.lib.npyio.NpzFile:
    archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("a bare .npy array")
    return archive


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Damage met inside is a ValueError that names the file."""
    try:
        yield
    except READ_ERRORS as error:
        raise ValueError(f"{os.fspath(path)} is no ADM-format npz: {error}") from error


@contextlib.contextmanager
def _opened_images(path: str | os.PathLike[str]) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """`arr_0` of the file, open where its pixels begin, and its shape (N, H, W, C)."""
    with zipfile.ZipFile(path) as archive:
        if "arr_0.npy" not in archive.namelist():
            raise ValueError(f"no arr_0 in it, only {sorted(archive.namelist())}")
        with archive.open("arr_0.npy") as member:
            version = np.lib.format.read_magic(member)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
            header = header or np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = header(member)
            if dtype != np.uint8 or len(shape) != 4 or 0 in shape or is_fortran:
                order = "Fortran's" if is_fortran else "C's"
                raise ValueError(
                    f"arr_0 must be uint8 (N, H, W, C) in C's order, not empty; got {dtype} {shape} in"
                    f" {order}"
                )
            yield member, shape


def _write_array(member: IO[bytes], chunks: Iterable[Images], num_images: int) -> None:
    """Streams chunks as one .npy array."""
    shape: tuple[int, ...] | None = None
    written = 0
    for chunk in chunks:
        array = _checked(
            chunk.cpu().numpy() if isinstance(chunk, Tensor) else chunk, what="a chunk of images"
        )
        if shape is None:
            shape = array.shape[1:]
            header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, *shape)}
            np.lib.format.write_array_header_1_0(member, header)
        if array.shape[1:] != shape:
            raise ValueError(
                f"images of shape {array.shape[1:]} follow images of shape {shape}; wanted one shape"
            )
        written += len(array)
        if written > num_images:
            break
        member.write(np.ascontiguousarray(array).data)
    if written != num_images:
        raise ValueError(f"num_images={num_images}, got {'more' if written > num_images else written} images")


def _checked(images: NDArray[np.uint8], *, what: str) -> NDArray[np.uint8]:
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{what} must be uint8 (N, H, W, C), not empty; got {images.dtype} {images.shape}")
    return images
