"""Sample sets in files, and runs of the phase test on them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from runs import arguments

from speedit_plugins.cli import main
from speedit_plugins.trainer.logging.images import save_png

DIGITS = "configs/image/digits/speedit.yaml"
VIDEOS = "configs/text_to_video/moving_digits.yaml"


def noise(count: int, *shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def compare(folder: Path, *, config: str = DIGITS, **changes: Any) -> dict[str, Any]:
    """Runs the phase test, and returns the content of test.json."""
    own = {"experiment_dir": folder, **changes}
    given = [f"{key.replace('__', '.')}={value}" for key, value in own.items()]
    assert main(["-c", config, "-p", "test", *given]) == 0
    content: dict[str, Any] = json.loads((folder / "test.json").read_text())
    return content


def refusal(folder: Path, capfd: pytest.CaptureFixture[str], **changes: Any) -> str:
    """The error that the phase test writes to stderr when it refuses its arguments."""
    assert main(["-c", DIGITS, "-p", "test", *arguments(folder, **changes)]) == 2
    return capfd.readouterr().err


def write_pngs(folder: Path, images: NDArray[np.uint8]) -> str:
    folder.mkdir()
    for i, image in enumerate(images):
        save_png(image, folder / f"{i:03d}.png")
    return str(folder)
