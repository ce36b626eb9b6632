"""Reads exact frames from video files and writes video files, with PyAV.

Dims: F frames, H x W pixels, C colours.
"""

import errno
import io
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from speedit_plugins.files import write_whole

SUFFIXES = (
    ".avi",
    ".gif",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".ts",
    ".webm",
    ".wmv",
)
# x264's guide calls this quality visually lossless; 0 is lossless, 51 is the worst.
MP4_OPTIONS = {"crf": "18"}
# Browsers slow down GIFs whose frames are shorter than 2/100 s.
MAX_GIF_FPS = 50

# How to turn a frame for each sign of (a, b, c, d) in a display matrix. PIL's rotations are anticlockwise.
# Upright comes first: a matrix of zeros is nearest to none of them, and counts as upright.
TURNS: dict[tuple[int, int, int, int], Image.Transpose | None] = {
    (1, 0, 0, 1): None,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@dataclass(frozen=True)
class VideoHeader:
    """Number of frames of a video, and the height and width of its upright frames in pixels."""

    num_frames: int
    height: int
    width: int


@dataclass(frozen=True)
class _Packet:
    """A compressed frame: its display time and its seek time, in the stream's time unit."""

    shown: Any
    sought: Any
    is_key: bool


def real_clip() -> Path:
    """Path of a two-second clip of Big Buck Bunny, 50 frames of 72 x 128; see `assets/ATTRIBUTION.md`."""
    return Path(__file__).parents[1] / "assets" / "big_buck_bunny.mp4"


def read_header(path: Path) -> VideoHeader:
    """Counts the frames and gets the size from the first one.

    Reads the whole file, because the length stated in a container may be missing or only an estimate.

    Raises:
        ValueError: the file is damaged or not a video; names the file.
        OSError: the system fails to read it.
    """
    with _opened(path) as (container, stream):
        num_frames, first = 0, None
        for packet in container.demux(stream):
            num_frames += _is_shown(packet)
            if first is None:
                first = next(iter(packet.decode()), None)
        if first is None:
            raise ValueError(f"corrupt video {path}: no frame can be decoded")
        width, height = _upright(first).size
        return VideoHeader(num_frames, height, width)


def read_frames(
    path: Path,
    positions: Sequence[int],
    *,
    num_frames: int,
    each: Callable[[Image.Image], Image.Image] = lambda image: image,
) -> list[Image.Image]:
    """The frames at `positions` as upright 8-bit RGB images.

    The result is the same as decoding the whole file and picking frames, but costs less: decoding starts at
    the last key frame before the first position. If the file's timestamps are unreliable, decoding starts at
    the beginning. Pixels are treated as square.

    Args:
        path: the file.
        positions: frame numbers in display order, counted from 0, ascending, < num_frames.
        num_frames: number of frames that the file must at least have.
        each: applied to each frame right after it is decoded, so that large frames are not kept in memory.

    Raises:
        ValueError: the file is damaged or has fewer than `num_frames` frames; names the file.
        OSError: the system fails to read it.
    """
    with _opened(path) as (container, stream):
        packets = [
            _Packet(packet.pts, packet.pts if packet.dts is None else packet.dts, packet.is_keyframe)
            for packet in container.demux(stream)
            if _is_shown(packet)
        ]
        if len(packets) < num_frames:
            raise ValueError(f"the video {path} has {len(packets)} frames, wanted {num_frames}")
        frames = _sought(container, stream, packets, positions, each)
    if frames is not None:
        return frames
    with _opened(path) as (container, stream):
        return _counted(path, container, stream, positions, each)


def write_mp4(path: Path, frames: Tensor, *, fps: float) -> None:
    """Writes an H.264 video that every browser plays; the file is written atomically.

    The format (yuv420p) needs even sides. An odd side is extended by repeating its last row or column.

    Args:
        path: the folder must exist.
        frames: uint8 (F, H, W, C), C 1 or 3.
        fps: frames per second, > 0.

    Raises:
        ValueError: frames of another shape or dtype, or fps out of range.
        OSError: the file cannot be written.
    """
    _check(frames, fps, writer="write_mp4")
    av = _av()
    height, width = frames.shape[1:3]
    rows = [*range(height), *[height - 1] * (height % 2)]
    columns = [*range(width), *[width - 1] * (width % 2)]
    even = frames.cpu()[:, rows][:, :, columns].expand(-1, -1, -1, 3).contiguous()
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        # Broadcast frame rates have the denominator 1001, such as 24000/1001.
        stream = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1001), options=MP4_OPTIONS
        )
        stream.height, stream.width, stream.pix_fmt = len(rows), len(columns), "yuv420p"
        # With several threads the written bytes would depend on their number.
        stream.codec_context.thread_count = 1
        for pixels in even.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    write_whole(path, content.getvalue())


def write_gif(path: Path, frames: Tensor, *, fps: float) -> None:
    """Writes a looping GIF with up to 256 colours per frame; the file is written atomically.

    Frame durations are rounded to 1/100 s, GIF's unit. Consecutive equal frames become one longer frame.

    Args:
        path: the folder must exist.
        frames: uint8 (F, H, W, C), C 1 or 3; grey is kept exactly.
        fps: frames per second, in (0, 50].

    Raises:
        ValueError: frames of another shape or dtype, or fps out of range.
        OSError: the file cannot be written.
    """
    _check(frames, fps, writer="write_gif")
    if fps > MAX_GIF_FPS:
        raise ValueError(f"write_gif needs fps <= {MAX_GIF_FPS}, the fastest that GIF plays, got {fps}")
    images = [
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        for pixels in frames.cpu().numpy()
    ]
    if frames.shape[-1] == 3:
        # No dithering: its grain would flicker from frame to frame.
        images = [image.quantize(256, dither=Image.Dither.NONE) for image in images]
    content = io.BytesIO()
    milliseconds = 10 * round(100 / fps)
    images[0].save(content, "GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
    write_whole(path, content.getvalue())


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Opens a container and its first video stream; turns decoding errors into a ValueError with the path."""
    av = _av()
    # Given as an open file: FFmpeg may take a name for a URL, and Python reports system errors better.
    with path.open("rb") as file:
        try:
            with av.open(file) as container:
                if not container.streams.video:
                    raise ValueError(f"corrupt video {path}: it has no video stream")
                stream = container.streams.video[0]
                # The loader's workers already run in parallel.
                stream.codec_context.thread_count = 1
                yield container, stream
        except (av.FFmpegError, OSError) as error:
            # EINVAL: in a damaged file FFmpeg may seek before the start. Other system errors are no damage.
            if not isinstance(error, av.FFmpegError) and error.errno != errno.EINVAL:
                raise
            raise ValueError(f"corrupt video {path}: {type(error).__name__}: {error.strerror}") from error


def _is_shown(packet: Any) -> bool:
    """Whether a packet is a displayed frame: not the end-of-file marker, nor removed by an edit list."""
    return packet.size > 0 and not packet.is_discard


def _sought(
    container: Any,
    stream: Any,
    packets: Sequence[_Packet],
    positions: Sequence[int],
    each: Callable[[Image.Image], Image.Image],
) -> list[Image.Image] | None:
    """Finds frames by display time, decoding from the key frame before them; None if that does not work."""
    times = sorted({packet.shown for packet in packets if packet.shown is not None})
    # AVI stores no display times; with reordered frames FFmpeg makes them up.
    made_up = container.format.name == "avi" and stream.codec_context.has_b_frames
    if made_up or len(times) < len(packets):
        return None
    wanted = [times[position] for position in positions]
    keys = {packet.shown: packet.sought for packet in packets if packet.is_key and packet.shown <= wanted[0]}
    if not keys:
        return None
    try:
        container.seek(keys[max(keys)], stream=stream)
    except _av().FFmpegError:
        return None  # the container does not support seeking
    found: list[Image.Image] = []
    for frame in container.decode(stream):
        if frame.pts is None or frame.pts > wanted[len(found)]:
            return None
        if frame.pts == wanted[len(found)] and not frame.is_corrupt:
            found.append(each(_upright(frame)))
        if len(found) == len(wanted):
            return found
    return None


def _counted(
    path: Path,
    container: Any,
    stream: Any,
    positions: Sequence[int],
    each: Callable[[Image.Image], Image.Image],
) -> list[Image.Image]:
    """Finds frames by number, decoding from the start of the file."""
    found: list[Image.Image] = []
    for number, frame in enumerate(container.decode(stream)):
        if number == positions[len(found)]:
            if frame.is_corrupt:
                raise ValueError(f"corrupt video {path}: frame {number} is damaged")
            found.append(each(_upright(frame)))
        if len(found) == len(positions):
            return found
    raise ValueError(f"corrupt video {path}: it ends before frame {positions[len(found)]} is decoded")


def _upright(frame: Any) -> Image.Image:
    """The frame as an RGB image, turned and mirrored as the file's display matrix says."""
    image = frame.to_image(**_one_thread())
    side_data = frame.side_data.get("DISPLAYMATRIX")
    turn = None if side_data is None else _turn(bytes(side_data))
    return image if turn is None else image.transpose(turn)


@cache
def _one_thread() -> dict[str, int]:
    """Options for converting a frame in one thread.

    By default PyAV 17 and later start a thread per core for each frame. A forked worker has none of them, and
    waits for them forever when it frees such a frame of its parent's.
    """
    return {"threads": 1} if int(_av().__version__.split(".")[0]) >= 17 else {}


def _turn(matrix: bytes) -> Image.Transpose | None:
    """The nearest of the eight orientations to a display matrix; None for upright.

    Args:
        matrix: three rows of three int32. Pixel (x, y) is shown at (a x + c y, b x + d y); y points down.
    """
    a, b, _, c, d = struct.unpack_from("=5i", matrix)
    nearest = max(TURNS, key=lambda o: o[0] * a + o[1] * b + o[2] * c + o[3] * d)
    return TURNS[nearest]


def _check(frames: Tensor, fps: float, *, writer: str) -> None:
    if (
        frames.dtype != torch.uint8
        or frames.ndim != 4
        or frames.shape[-1] not in (1, 3)
        or not frames.numel()
    ):
        raise ValueError(
            f"{writer} needs uint8 frames (F, H, W, C), C 1 or 3, got {frames.dtype} {tuple(frames.shape)}"
        )
    if not 0 < fps < float("inf"):
        raise ValueError(f"{writer} needs fps > 0, got {fps}")


def _av() -> Any:
    # Imported here because PyAV is optional and slow to load.
    try:
        import av
    except ImportError as error:
        message = "videos need PyAV: pip install 'speedit-plugins[video]'"
        raise ImportError(message) from error
    return av
