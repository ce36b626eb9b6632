"""Sample sets in the ADM format: an `.npz` whose `arr_0` is uint8 (N, H, W, C), as its evaluation reads it.

Dims: N images, B of them in a chunk, H x W pixels, C channels.
"""

import contextlib
import os
import secrets
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

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
        _replacing(Path(path)) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
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
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a bare .npy array")
        with archive:
            if "arr_0" not in archive.files:
                raise ValueError(f"no arr_0 in it, only {sorted(archive.files)}")
            images = archive["arr_0"]
        if not isinstance(images, np.ndarray):
            raise ValueError("arr_0 in it is no array")
    except READ_ERRORS as error:
        raise ValueError(f"{os.fspath(path)} is no ADM-format npz: {error}") from error
    return _checked(images, what=f"arr_0 in {os.fspath(path)}")


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


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends well, and vanishes when it does not."""
    # In the same folder, since a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        # Already renamed after success.
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
