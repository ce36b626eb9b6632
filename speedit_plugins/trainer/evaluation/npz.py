"""Sample sets in the format of ADM's evaluation: an `.npz` whose `arr_0` is uint8 (N, H, W, C).

ADM's reference files also have feature statistics, `mu`, `sigma`, `mu_s`, `sigma_s`, of more images than they
hold.

Dims: N images, B of them in a chunk, H x W pixels, C channels, D features.
"""

import contextlib
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speedit_plugins.files import replacing

Images = NDArray[np.uint8] | Tensor
# Errors of numpy and zipfile on damaged files. ValueError includes arrays that only pickle could read. An
# absurd header fails as Python source, or asks for more memory than there is.
READ_ERRORS = (
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    SyntaxError,
    OverflowError,
    MemoryError,
    RecursionError,
    NotImplementedError,
    tokenize.TokenError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def write_npz(
    path: str | os.PathLike[str], images: Images | Iterable[Images], *, num_images: int | None = None
) -> None:
    """Writes `images` as `arr_0`, atomically.

    Args:
        path: an existing file is replaced.
        images: uint8 (N, H, W, C), or an iterable of chunks (B, H, W, C); one chunk is held at a time.
        num_images: N; required for chunks, because the format stores it before the pixels.

    Raises:
        ValueError: the dtype or shape is wrong, chunks have different image shapes, or the total is not
            `num_images`.
        OSError: the file cannot be written; names it. An existing file at `path` is kept.
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
        # zipfile does not know the size in advance; 50,000 images of 256 x 256 take 9.8 GB.
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        _write_array(member, chunks, num_images)


def read_npz(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """The images of an ADM-format file, uint8 (N, H, W, C), N >= 1.

    Raises:
        ValueError: the file is damaged or has no `arr_0`, or `arr_0` has another dtype or shape.
        OSError: the file is missing or cannot be read.
    """
    with _reading(path):
        with _loaded(path) as archive:
            if "arr_0" not in archive.files:
                raise ValueError(f"no arr_0 in it, only {sorted(archive.files)}")
            _check_sizes(path, ["arr_0"])
            images = archive["arr_0"]
        if not isinstance(images, np.ndarray):
            raise ValueError("arr_0 in it is not an array")
    return _checked(images, what=f"arr_0 in {os.fspath(path)}")


def npz_keys(path: str | os.PathLike[str]) -> list[str]:
    """Names of the arrays in a file; reads no array.

    Raises:
        ValueError: the file is damaged or not an npz.
        OSError: the file is missing or cannot be read.
    """
    with _reading(path), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def npz_shape(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """(N, H, W, C) of an ADM-format file, from its header.

    Raises:
        ValueError, OSError: as in `read_npz`.
    """
    with _reading(path), _opened_images(path) as (_, shape):
        return shape


def npz_batches(path: str | os.PathLike[str], batch_size: int) -> Iterator[NDArray[np.uint8]]:
    """Yields the images of an ADM-format file in order, in batches (B, H, W, C) of at most `batch_size`.

    Raises:
        ValueError, OSError: as in `read_npz`; for a damaged file possibly only after some batches.
    """
    with _reading(path), _opened_images(path) as (member, shape):
        for start in range(0, shape[0], batch_size):
            part = (min(batch_size, shape[0] - start), *shape[1:])
            content = member.read(math.prod(part))
            if len(content) < math.prod(part):
                raise EOFError(f"arr_0 in it ends before image {start + part[0]} of {shape[0]}")
            # A copy, since torch warns about arrays that are not writable.
            yield np.frombuffer(content, dtype=np.uint8).reshape(part).copy()


def read_statistics(path: str | os.PathLike[str], *, spatial: bool = False) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D), float64, stored in a reference file.

    Args:
        path: the file.
        spatial: read those of the spatial features.

    Raises:
        ValueError: the file has none, or their shapes do not fit.
        OSError: the file is missing or cannot be read.
    """
    names = ("mu_s", "sigma_s") if spatial else ("mu", "sigma")
    with _reading(path), _loaded(path) as archive:
        _check_sizes(path, [name for name in names if name in archive.files])
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
        raise ValueError("it is a bare .npy array")
    return archive


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns errors from damaged files into a ValueError that names the file."""
    try:
        yield
    except READ_ERRORS as error:
        raise ValueError(f"{os.fspath(path)} is not an npz in ADM's format: {error}") from error


@contextlib.contextmanager
def _opened_images(path: str | os.PathLike[str]) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """Opens `arr_0` at its first pixel; yields the open member and its shape (N, H, W, C)."""
    with zipfile.ZipFile(path) as archive:
        if "arr_0.npy" not in archive.namelist():
            raise ValueError(f"no arr_0 in it, only {sorted(archive.namelist())}")
        with archive.open("arr_0.npy") as member:
            shape, is_fortran, dtype = _header(member)
            if dtype != np.uint8 or len(shape) != 4 or 0 in shape or is_fortran:
                order = "Fortran" if is_fortran else "C"
                raise ValueError(
                    f"arr_0 must be uint8 (N, H, W, C) in C order, not empty; got {dtype} {shape} in"
                    f" {order} order"
                )
            _check_size("arr_0", shape, dtype, archive.getinfo("arr_0.npy").file_size - member.tell())
            yield member, shape


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the order is Fortran's, and dtype of an open .npy file; leaves it at its first value."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
    return (read or np.lib.format.read_array_header_2_0)(member)


def _check_sizes(path: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Raises ValueError if a header promises more or fewer values than the file holds.

    numpy asks for the memory of the promised values before it reads the first one.
    """
    with zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
        for name in names:
            if name not in members:
                continue
            with archive.open(members[name]) as member:
                shape, _, dtype = _header(member)
                _check_size(name, shape, dtype, archive.getinfo(members[name]).file_size - member.tell())


def _check_size(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], num_bytes: int) -> None:
    # The size of a pickled array is not known. Reading one is refused.
    if not dtype.hasobject and (min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != num_bytes):
        raise ValueError(f"the header of {name} wants {dtype} {shape}, the file has {num_bytes} bytes of it")


def _write_array(member: IO[bytes], chunks: Iterable[Images], num_images: int) -> None:
    """Writes chunks as one .npy array."""
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
            raise ValueError(f"images must have one shape, got {array.shape[1:]} after {shape}")
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
