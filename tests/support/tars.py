"""Images in tars that a test can tell apart: each has a single grey level."""

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from speedit_plugins.trainer.data.archives.web import WebDataset

Sample = dict[str, Any]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def encoded(level: int, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(content, kind)
    return content.getvalue()


def level_of(image: torch.Tensor) -> int:
    """The grey level of a constant image."""
    return round((float(image.mean()) + 1) * 127.5)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write(path: Path, *members: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            add(tar, name, content)
    return path


def old(path: Path, seconds: float = 1e9) -> Path:
    """Sets the time back: an index does not trust a file that was just written."""
    os.utime(path, (seconds, seconds))
    return path


def shards(folder: Path, count: int = 3, each: int = 5) -> Path:
    """Tars 000, 001, ...: sample i of all has grey level i, class i % 3 and the caption `text i`."""
    webdataset = pytest.importorskip("webdataset")
    folder.mkdir(exist_ok=True)
    for shard in range(count):
        with webdataset.TarWriter(str(folder / f"{shard:03d}.tar")) as writer:
            for number in range(shard * each, (shard + 1) * each):
                writer.write(
                    {
                        "__key__": f"{number:06d}",
                        "png": encoded(number),
                        "cls": number % 3,
                        "txt": f"text {number}",
                        "json": {"caption": f"field {number}", "label": ("cat", "dog")[number % 2]},
                    }
                )
    return folder


def loaded(data: WebDataset) -> list[Sample]:
    return [data.load(index, generator()) for index in range(len(data))]
