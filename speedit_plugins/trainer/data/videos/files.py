"""Video files by PyAV: exact frames out of them, and frames into them.

Dims: F frames, H x W pixels, C colours.
"""

import errno
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
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
# How x264's own guide names the setting at which eyes see no loss; 0 is lossless, 51 the worst.
MP4_OPTIONS = {"crf": "18"}
# Frames of a shorter delay than two hundredths of a second are slowed down by browsers.
MAX_GIF_FPS = 50


@dataclass(frozen=True)
class VideoHeader:
    """Frames of a video, and height and width of the upright ones in pixels."""

    num_frames: int
    height: int
    width: int


@dataclass(frozen=True)
class _Packet:
    """A compressed frame: when it is shown and where to seek for it, in the stream's own unit."""

    shown: Any
    sought: Any
    is_key: bool


def real_clip() -> Path:
    """Two seconds of Big Buck Bunny, 50 frames of 72 x 128; `assets/ATTRIBUTION.md` says whose it is."""
    return Path(__file__).parents[1] / "assets" / "big_buck_bunny.mp4"


def read_header(path: Path) -> VideoHeader:
    """Counts the frames and decodes the first one.

    Reads the whole file: what containers state of their length is a guess, and some state nothing.

    Raises:
        ValueError: damaged, or no video; names the file.
        OSError: the system fails to read it.
    """
    with _opened(path) as (container, stream):
        num_frames, first = 0, None
        for packet in container.demux(stream):
            num_frames += _is_shown(packet)
            if first is None:
                first = next(iter(packet.decode()), None)
        if first is None:
            raise ValueError(f"corrupt video {path}: not one frame of it can be decoded")
        width, height = _upright(first).size
        return VideoHeader(num_frames, height, width)


def read_frames(
    path: Path,
    positions: Sequence[int],
    *,
    num_frames: int,
    each: Callable[[Image.Image], Image.Image] = lambda image: image,
) -> list[Image.Image]:
    """The frames at `positions`, upright 8-bit RGB: what decoding all and picking gives, at less cost.

    Decodes from the last key frame before the first position on. Where a file's times cannot be trusted it
    decodes from the start. Pixels count as square.

    Args:
        path: the file.
        positions: in the order of showing, from 0, ascending, < num_frames.
        num_frames: at least so many the file must have.
        each: what becomes of a frame as soon as it is decoded, so that large ones are not kept.

    Raises:
        ValueError: damaged, or fewer than `num_frames`; names the file.
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
    """Writes H.264 that every browser plays; the file is there whole or not at all.

    Half the colour resolution (yuv420p) needs even sides: an odd one grows by its last row or column.

    Args:
        path: its folder exists.
        frames: uint8 (F, H, W, C), C 1 or 3.
        fps: frames per second, > 0.

    Raises:
        ValueError: frames or fps of another kind.
        OSError: the system cannot write.
    """
    _check(frames, fps, writer="write_mp4")
    av = _av()
    height, width = frames.shape[1:3]
    rows = [*range(height), *[height - 1] * (height % 2)]
    columns = [*range(width), *[width - 1] * (width % 2)]
    even = frames.cpu()[:, rows][:, :, columns].expand(-1, -1, -1, 3).contiguous()
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        # 1001 is the denominator of the broadcast rates, such as 24000/1001.
        stream = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1001), options=MP4_OPTIONS
        )
        stream.height, stream.width, stream.pix_fmt = len(rows), len(columns), "yuv420p"
        # With more threads the bytes depend on their number.
        stream.codec_context.thread_count = 1
        for pixels in even.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    write_whole(path, content.getvalue())


def write_gif(path: Path, frames: Tensor, *, fps: float) -> None:
    """Writes an endless GIF of up to 256 colours a frame; the file is there whole or not at all.

    GIF counts in hundredths of a second, to which a frame's time is rounded; equal frames in a row become
    one that is shown longer.

    Args:
        path: its folder exists.
        frames: uint8 (F, H, W, C), C 1 or 3; grey is kept exactly.
        fps: frames per second, in (0, 50].

    Raises:
        ValueError: frames or fps of another kind.
        OSError: the system cannot write.
    """
    _check(frames, fps, writer="write_gif")
    if fps > MAX_GIF_FPS:
        raise ValueError(f"write_gif needs fps <= {MAX_GIF_FPS}, which is as fast as GIF plays, got {fps}")
    pictures = [
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        for pixels in frames.cpu().numpy()
    ]
    if frames.shape[-1] == 3:
        # Without dither: its grain would flicker from frame to frame.
        pictures = [picture.quantize(256, dither=Image.Dither.NONE) for picture in pictures]
    content = io.BytesIO()
    milliseconds = 10 * round(100 / fps)
    pictures[0].save(content, "GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)
    write_whole(path, content.getvalue())


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """An open container and its first video stream; damage inside is a ValueError that names the file."""
    av = _av()
    # Opened here, not by name: to FFmpeg a name may be a protocol, and the system's errors are Python's own.
    with path.open("rb") as file:
        try:
            with av.open(file) as container:
                if not container.streams.video:
                    raise ValueError(f"corrupt video {path}: it has no video stream")
                stream = container.streams.video[0]
                # The loader's workers are the threads.
                stream.codec_context.thread_count = 1
                yield container, stream
        except (av.FFmpegError, OSError) as error:
            # In a damaged file FFmpeg may seek before the start; what else the system says is no damage.
            if not isinstance(error, av.FFmpegError) and error.errno != errno.EINVAL:
                raise
            raise ValueError(f"corrupt video {path}: {type(error).__name__}: {error.strerror}") from error


def _is_shown(packet: Any) -> bool:
    """Neither the mark of the file's end, nor cut away by an edit list."""
    return packet.size > 0 and not packet.is_discard


def _sought(
    container: Any,
    stream: Any,
    packets: Sequence[_Packet],
    positions: Sequence[int],
    each: Callable[[Image.Image], Image.Image],
) -> list[Image.Image] | None:
    """Frames by their times, from the key frame before them on; None where times do not lead to them."""
    times = sorted({packet.shown for packet in packets if packet.shown is not None})
    # AVI knows no times of showing: with reordered frames they are made up.
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
        return None  # a container without seeking
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
    """Frames by their numbers, from the start of the file on."""
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
    """The frame as an RGB image, turned as the file's display matrix asks, by quarters."""
    # Anticlockwise, for both.
    quarters = round(frame.rotation / 90) % 4
    turns = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    image = frame.to_image()
    return image.transpose(turns[quarters - 1]) if quarters else image


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
    # Imported on use: an extra, whose libraries take a while to load.
    try:
        import av
    except ImportError as error:
        message = "videos need PyAV, which is not installed; pip install 'speedit-plugins[video]'"
        raise ImportError(message) from error
    return av
