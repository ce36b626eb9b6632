import os
import struct
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from speedit_plugins.trainer.data.videos.files import (
    read_frames,
    read_header,
    real_clip,
    write_gif,
    write_mp4,
)
from speedit_plugins.trainer.data.videos.folder import VideoFolder

av = pytest.importorskip("av")

# They differ in how timestamps are stored and how seeking works; mpeg4 and x264 reorder frames.
CONTAINERS = {
    "clip.mp4": ("libx264", "mp4"),
    "clip.mkv": ("libx264", "matroska"),
    "clip.webm": ("libvpx-vp9", "webm"),
    "clip.ts": ("libx264", "mpegts"),
    "clip.mpg": ("mpeg1video", "mpeg"),
    "reordered.avi": ("libx264", "avi"),
    "xvid.avi": ("mpeg4", "avi"),
    "intra.avi": ("mjpeg", "avi"),
    "clip.gif": ("gif", "gif"),
}
PIXELS = {"mjpeg": "yuvj420p", "gif": "rgb8"}

# The eight ways to lay down a rectangle: each axis is shown along one of the two, forwards or backwards.
ORIENTATIONS = [matrix for x, y in product((-1, 1), repeat=2) for matrix in ((x, 0, 0, y), (0, x, y, 0))]


def moving(num_frames: int, height: int = 48, width: int = 64) -> torch.Tensor:
    """A bright square that moves over a gradient, uint8 (F, H, W, 3); every frame is different."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frames = torch.stack([rows * 2, columns * 2, rows + columns], dim=-1).byte().repeat(num_frames, 1, 1, 1)
    for number, frame in enumerate(frames):
        left = number % (width - 8)
        frame[8:16, left : left + 8] = 240
    return frames


def encode(path: Path, codec: str, container: str, frames: torch.Tensor) -> Path:
    """Encodes with a key frame every ten frames and, if the codec supports it, reordered frames."""
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = PIXELS.get(codec, "yuv420p")
        stream.codec_context.gop_size = 10
        if codec in ("libx264", "mpeg4", "mpeg1video"):
            stream.codec_context.max_b_frames = 2
        for pixels in frames.numpy():
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    return path


def decode_all(path: Path) -> list[Image.Image]:
    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def pixels(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))


def turned(path: Path, matrix: tuple[int, ...]) -> Path:
    """Writes the four numbers of a display matrix, in units of 1/65536, into the track header of an mp4."""
    content = bytearray(path.read_bytes())
    # The box's name, then 40 bytes (times etc.), then the matrix: three rows of three.
    at = content.index(b"tkhd") + 4 + 40
    for place, number in zip((0, 4, 12, 16), matrix, strict=True):
        content[at + place : at + place + 4] = struct.pack(">i", number << 16)
    path.write_bytes(content)
    return path


class TestReading:
    @pytest.mark.parametrize("name", CONTAINERS)
    def test_selected_frames_equal_those_of_decoding_the_whole_file(self, tmp_path: Path, name: str) -> None:
        path = encode(tmp_path / name, *CONTAINERS[name], moving(40))
        every = decode_all(path)
        header = read_header(path)
        assert (header.num_frames, header.height, header.width) == (len(every), 48, 64) == (40, 48, 64)
        for first, interval in product(range(0, 37, 4), (1, 3)):
            chosen = range(first, 40, interval)
            assert read_frames(path, chosen, num_frames=40) == [every[number] for number in chosen]
        assert all(read_frames(path, [number], num_frames=40) == [every[number]] for number in range(40))

    def test_decoding_starts_at_the_last_key_frame_before_the_first_position(self, tmp_path: Path) -> None:
        path = encode(tmp_path / "clip.mp4", "libx264", "mp4", moving(40))
        every = decode_all(path)
        with av.open(str(path)) as container:
            spoilt = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size][:10]
        content = bytearray(path.read_bytes())
        for position, size in spoilt:  # the first of four groups of ten frames
            content[position : position + size] = bytes(size)
        path.write_bytes(content)
        assert read_frames(path, [25, 39], num_frames=40) == [every[25], every[39]]
        with pytest.raises(ValueError, match=r"corrupt video .*clip\.mp4: "):
            read_frames(path, [5], num_frames=40)

    def test_each_is_applied_to_every_frame(self) -> None:
        small = read_frames(real_clip(), [1, 3], num_frames=50, each=lambda image: image.resize((4, 2)))
        assert [image.size for image in small] == [(4, 2)] * 2

    def test_converting_a_frame_starts_no_thread(self) -> None:
        def count(image: Image.Image) -> Image.Image:
            threads.append(len(os.listdir("/proc/self/task")))
            return image

        # A forked worker would wait forever for the threads of a frame that its parent still holds.
        threads = [len(os.listdir("/proc/self/task"))]
        read_frames(real_clip(), [1, 3], num_frames=50, each=count)
        assert threads == threads[:1] * 3

    def test_fewer_frames_than_num_frames_is_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"big_buck_bunny\.mp4 has 50 frames, wanted 51"):
            read_frames(real_clip(), [0], num_frames=51)

    # (a, b, c, d) displays pixel (x, y) at (a x + c y, b x + d y); y points down.
    @pytest.mark.parametrize("matrix", ORIENTATIONS)
    def test_frames_are_displayed_as_the_matrix_says(self, tmp_path: Path, matrix: tuple[int, ...]) -> None:
        path = tmp_path / "turned.mp4"
        write_mp4(path, moving(2), fps=25)
        lying = pixels(read_frames(path, [1], num_frames=2))[0]
        upright = pixels(read_frames(turned(path, matrix), [1], num_frames=2))[0]
        a, b, c, d = matrix
        rows, columns = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
        shown_rows, shown_columns = b * columns + d * rows, a * columns + c * rows
        expected = torch.empty(*((64, 48) if a == 0 else (48, 64)), 3, dtype=torch.uint8)
        expected[shown_rows - shown_rows.min(), shown_columns - shown_columns.min()] = lying
        assert torch.equal(upright, expected)
        header = read_header(path)
        assert (header.height, header.width) == tuple(upright.shape[:2])

    def test_a_video_goes_to_the_bucket_of_its_displayed_shape(self, tmp_path: Path) -> None:
        for name, matrix in (("a", (1, 0, 0, 1)), ("b", (0, 1, 1, 0)), ("c", (0, 1, -1, 0))):
            write_mp4(tmp_path / f"{name}.mp4", moving(2), fps=25)
            turned(tmp_path / f"{name}.mp4", matrix)
        wide_and_tall = [[2, 12, 16], [2, 16, 12]]
        folder = VideoFolder(tmp_path, image_size=8, num_frames=2, class_cond=False, buckets=wide_and_tall)
        assert folder.buckets is not None
        assert folder.buckets.tolist() == [0, 1, 1]
        lying, transposed = (folder.load(number, torch.Generator())["video"] for number in (0, 1))
        assert lying.shape == (3, 2, 12, 16)
        # Scaling and cropping treat rows and columns alike; only rounding differs.
        torch.testing.assert_close(transposed, lying.transpose(-1, -2), atol=3 / 127.5, rtol=0)

    @pytest.mark.parametrize("content", [b"", b"no video at all", bytes(1000)])
    def test_a_file_that_is_not_a_video_is_named(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "x.mp4"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"corrupt video .*x\.mp4: "):
            read_header(path)
        with pytest.raises(ValueError, match=r"corrupt video .*x\.mp4: "):
            read_frames(path, [0], num_frames=1)

    def test_a_truncated_file_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "x.ts"
        encode(path, "libx264", "mpegts", moving(40))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=r"x\.ts has \d+ frames, wanted 40"):
            read_frames(path, [0], num_frames=40)

    def test_a_failing_system_is_not_damage(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere"):
            read_header(tmp_path / "nowhere.mp4")


class TestRealClip:
    def test_the_clip_is_two_seconds_of_continuous_motion(self) -> None:
        header = read_header(real_clip())
        assert (header.num_frames, header.height, header.width) == (50, 72, 128)
        assert real_clip().stat().st_size <= 120_000
        assert "Blender Foundation" in (real_clip().parent / "ATTRIBUTION.md").read_text(encoding="utf-8")
        frames = pixels(read_frames(real_clip(), range(50), num_frames=50)).float()
        steps = (frames[1:] - frames[:-1]).abs().mean(dim=(1, 2, 3))
        # Without a cut, neighbouring frames differ less than the first and the last one.
        assert 0 < steps.max() < (frames[-1] - frames[0]).abs().mean()


class TestWritingMp4:
    def test_grey_levels_survive(self, tmp_path: Path) -> None:
        levels = torch.arange(0, 256, 5, dtype=torch.uint8)
        write_mp4(tmp_path / "x.mp4", levels.view(-1, 1, 1, 1).expand(-1, 16, 16, 1), fps=8)
        read = pixels(read_frames(tmp_path / "x.mp4", range(len(levels)), num_frames=len(levels)))
        # 256 grey levels become 219 luma levels: an error of up to 1 each way; the quantiser adds up to 1.
        assert (read.int() - levels.view(-1, 1, 1, 1).int()).abs().max() <= 3

    def test_a_real_clip_loses_little_quality(self, tmp_path: Path) -> None:
        clip = pixels(read_frames(real_clip(), range(20), num_frames=50))
        write_mp4(tmp_path / "x.mp4", clip, fps=25)
        read = pixels(read_frames(tmp_path / "x.mp4", range(20), num_frames=20))
        error = (read.double() - clip.double()).square().mean()
        # Viewers begin to see coding losses below 35 dB; crf 18 is meant to stay above.
        assert 10 * torch.log10(255**2 / error) > 35
        with av.open(str(tmp_path / "x.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")

    @pytest.mark.parametrize("fps", [8, 12.5, 24000 / 1001])
    def test_the_frame_rate_is_kept(self, tmp_path: Path, fps: float) -> None:
        write_mp4(tmp_path / "x.mp4", moving(10), fps=fps)
        with av.open(str(tmp_path / "x.mp4")) as container:
            assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-6)

    def test_odd_sides_repeat_their_last_row_or_column(self, tmp_path: Path) -> None:
        frames = torch.zeros(3, 15, 17, 1, dtype=torch.uint8)
        frames[:, -1], frames[:, :, -1] = 200, 200
        write_mp4(tmp_path / "x.mp4", frames, fps=8)
        read = pixels(read_frames(tmp_path / "x.mp4", [2], num_frames=3))[0]
        assert read.shape == (16, 18, 3)
        # Compression changes the level a little, but 200 stays far from the black inside.
        assert (read[-2:].int() - 200).abs().max() < 30
        assert (read[:, -2:].int() - 200).abs().max() < 30

    def test_the_same_frames_give_the_same_file(self, tmp_path: Path) -> None:
        for name in ("a.mp4", "b.mp4"):
            write_mp4(tmp_path / name, moving(10), fps=8)
        assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


class TestWritingGif:
    @pytest.mark.parametrize("colours", [1, 3])
    def test_few_colours_survive_exactly(self, tmp_path: Path, colours: int) -> None:
        palette = torch.tensor([[0, 0, 0], [255, 0, 0], [0, 255, 9], [80, 70, 255]], dtype=torch.uint8)
        index = torch.randint(0, 4, (5, 12, 10), generator=torch.Generator().manual_seed(0))
        frames = palette[index] if colours == 3 else (index * 85).byte().unsqueeze(-1)
        write_gif(tmp_path / "x.gif", frames, fps=8)
        with Image.open(tmp_path / "x.gif") as image:
            read = [frame.copy().convert("RGB") for frame in ImageSequence.Iterator(image)]
            assert image.info["loop"] == 0
            # 1/8 s is 12.5 hundredths of a second, rounded to 12.
            assert image.info["duration"] == 120
        assert torch.equal(pixels(read), frames.expand(-1, -1, -1, 3))
        assert torch.equal(
            pixels(read_frames(tmp_path / "x.gif", range(5), num_frames=5)), frames.expand(-1, -1, -1, 3)
        )

    def test_faster_than_gif_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="fps <= 50, the fastest that GIF plays, got 60"):
            write_gif(tmp_path / "x.gif", moving(2), fps=60)


@pytest.mark.parametrize("write", [write_mp4, write_gif])
class TestWriting:
    def test_other_shapes_dtypes_and_rates_are_refused(self, tmp_path: Path, write: Any) -> None:
        for wrong in (moving(2).float(), moving(2)[0], moving(2)[..., :2], moving(2)[:0]):
            with pytest.raises(ValueError, match=r"needs uint8 frames \(F, H, W, C\), C 1 or 3, got torch"):
                write(tmp_path / "x", wrong, fps=8)
        with pytest.raises(ValueError, match="fps > 0, got 0"):
            write(tmp_path / "x", moving(2), fps=0)
        assert not list(tmp_path.iterdir())

    def test_a_file_is_replaced_atomically(self, tmp_path: Path, write: Any) -> None:
        (tmp_path / "x.tmp.mp4").write_text("another one's")
        path = tmp_path / "x"
        path.write_text("old")
        write(path, moving(3), fps=8)
        assert b"old" not in path.read_bytes()[:3]
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x", "x.tmp.mp4"]
