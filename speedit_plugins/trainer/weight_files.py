"""Tells files of weights from what is often found in their place."""

import json
import zipfile
from pathlib import Path

# How files begin that are often found in place of weights, and what they are.
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a pointer of git-LFS, not the file itself: git lfs pull fetches it"),
    (b"<!doctype", "is a web page, from a download that failed"),
    (b"<html", "is a web page, from a download that failed"),
    (b"<?xml", "is an answer in XML, from a download that failed"),
    (b"{", "is text in JSON, not weights"),
    (b"gguf", "is a GGUF file"),
    (b"\x1f\x8b", "is compressed by gzip; unpack it"),
    (b"7z\xbc\xaf", "is a 7z archive; unpack it"),
    (b"\x89hdf", "is an HDF5 file"),
)
_HEADER_BYTES = 8


def unlike_weights(path: Path) -> str:
    """Why a file cannot be weights, worded to follow its name; "" if it can.

    It knows web pages and pointers of git-LFS by their beginning, and empty, cut and misnamed files of
    safetensors and torch. It does not read the weights.

    Raises:
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    if not size:
        return "is damaged: it is empty"
    with path.open("rb") as file:
        beginning = file.read(512)
    text = beginning.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for mark, meaning in _BEGINNINGS:
        if text.startswith(mark):
            return meaning
    is_safe = path.suffix == ".safetensors"
    if is_safe and beginning.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "is a file of torch.save; wanted the suffix .pt"
    if is_safe or beginning[_HEADER_BYTES:].startswith(b'{"'):
        return _unlike_safetensors(path, size, is_named=is_safe)
    if beginning.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        return f"is damaged: its end is missing after {size:,} bytes"
    return ""


def _unlike_safetensors(path: Path, size: int, *, is_named: bool) -> str:
    """As `unlike_weights`, for what has the suffix or the beginning of a safetensors file.

    Such a file is the length of a header in 8 bytes, the header in JSON, and the tensors one after the other.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_BYTES), "little")
        header = file.read(min(length, size))
    if len(header) < length:
        is_cut = header[:1] == b"{" or not header
        return (
            f"is damaged: cut off after {size:,} bytes" if is_cut else "is damaged or not a safetensors file"
        )
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return "is damaged or not a safetensors file" if is_named else ""
    wanted = _HEADER_BYTES + length + max(ends, default=0)
    if wanted > size:
        return f"is damaged: it has {size:,} of {wanted:,} bytes"
    return "" if is_named else "is a safetensors file; wanted the suffix .safetensors"
