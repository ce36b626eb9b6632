import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from speedit_plugins.trainer.data.images import pixels
from speedit_plugins.trainer.data.images.folder import ImageFolder
from speedit_plugins.trainer.data.images.pixels import read_rgb


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save(path: Path, image: Image.Image | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise(8, 8)).save(path, **options)
    return path


def grey_16(level: int) -> Image.Image:
    return Image.fromarray(np.full((4, 4), level, dtype=np.uint16))


class TestReading:
    def test_a_read_that_the_system_fails_names_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        # Reading the beginning of one's own memory is an error of the system.
        path.symlink_to("/proc/self/mem")
        with pytest.raises(OSError, match=rf"\[Errno 5\] cannot read {path}: Input/output error"):
            read_rgb(path)

    def test_palette_grey_bilevel_and_cmyk_become_rgb(self, tmp_path: Path) -> None:
        red = Image.new("RGB", (4, 4), (255, 0, 0))
        assert read_rgb(save(tmp_path / "p.png", red.quantize(2))).getpixel((0, 0)) == (255, 0, 0)
        assert read_rgb(save(tmp_path / "l.png", Image.new("L", (4, 4), 77))).getpixel((0, 0)) == (77,) * 3
        assert read_rgb(save(tmp_path / "1.png", Image.new("1", (4, 4), 1))).getpixel((0, 0)) == (255,) * 3
        cmyk = Image.new("CMYK", (4, 4), (0, 0, 0, 255))
        assert read_rgb(save(tmp_path / "c.tif", cmyk)).getpixel((0, 0)) == (0, 0, 0)

    def test_sixteen_bit_grey_keeps_its_scale(self, tmp_path: Path) -> None:
        # The 8-bit level k is 257 k in 16 bits.
        grey = np.array([[0, 257 * 100, 257 * 255]], dtype=np.uint16)
        image = read_rgb(save(tmp_path / "16.png", Image.fromarray(grey)))
        np.testing.assert_array_equal(np.asarray(image)[0, :, 0], [0, 100, 255])

    def test_the_levels_of_deep_portable_grey_maps_fill_the_range(self, tmp_path: Path) -> None:
        path = tmp_path / "12.pgm"
        path.write_bytes(b"P5 2 1 4095\n" + struct.pack(">2H", 4095, 819))
        assert [read_rgb(path).getpixel((x, 0)) for x in range(2)] == [(255,) * 3, (51,) * 3]

    def test_colours_of_sixteen_bits_keep_their_upper_half(self, tmp_path: Path) -> None:
        def chunk(name: bytes, content: bytes) -> bytes:
            body = name + content
            return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

        header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
        row = zlib.compress(b"\0" + struct.pack(">3H", 257 * 200, 0, 65535))
        path = tmp_path / "48.png"
        path.write_bytes(
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
        )
        assert read_rgb(path).getpixel((0, 0)) == (200, 0, 255)

    @pytest.mark.parametrize(
        ("tags", "top"),
        [
            ({}, 65535),
            ({281: 4095}, 4095),  # MaxSampleValue
            ({262: 0}, 65535),  # WhiteIsZero
        ],
    )
    def test_a_tiffs_tags_decide_which_level_is_white(
        self, tmp_path: Path, tags: dict[int, int], top: int
    ) -> None:
        grey = np.array([[0, top // 5, top]], dtype=np.uint16)  # 65535 and 4095 are multiples of 5
        info = TiffImagePlugin.ImageFileDirectory_v2()
        for number, value in tags.items():
            info[number] = value
        levels = np.asarray(read_rgb(save(tmp_path / "t.tif", Image.fromarray(grey), tiffinfo=info)))[0, :, 0]
        np.testing.assert_array_equal(levels, [255, 204, 0] if 262 in tags else [0, 51, 255])

    def test_a_twelve_bit_tiff_is_not_nearly_black(self, tmp_path: Path) -> None:
        # Two levels of 12 bits, 0x800 and 0xfff, are three bytes. Pillow cannot write such a file.
        entries = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
        pixels = bytes([0x80, 0x0F, 0xFF])
        directory = struct.pack("<H", len(entries)) + b"".join(
            struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries.items()
        )
        path = tmp_path / "12.tif"
        path.write_bytes(b"II*\0" + struct.pack("<I", 12) + pixels + b"\0" + directory + bytes(4))
        assert [read_rgb(path).getpixel((x, 0)) for x in range(2)] == [(128,) * 3, (255,) * 3]

    def test_twelve_bits_in_sixteen_are_said_once_and_scaled_on_request(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pixels, "_warned", set())
        dim = [save(tmp_path / f"{number}.png", grey_16(4095)) for number in range(2)]
        with pytest.warns(
            UserWarning, match=r"0.png is nearly black: .*up to 4095 of 65535.*bit_depth: 12"
        ) as said:
            assert [read_rgb(path).getpixel((0, 0)) for path in dim] == [(16,) * 3] * 2
        assert len(said) == 1
        folder = ImageFolder(tmp_path, image_size=4, class_cond=False, bit_depth=12)
        assert folder.load(0, generator())["image"].unique().tolist() == [1.0]

    def test_transparent_levels_of_sixteen_bits_are_white(self, tmp_path: Path) -> None:
        path = save(tmp_path / "t.png", grey_16(40_000), transparency=40_000)
        assert read_rgb(path).getpixel((0, 0)) == (255,) * 3

    def test_an_adobe_cmyk_jpeg_is_not_inverted(self, tmp_path: Path) -> None:
        # Adobe's programs store 255 - ink, and so does Pillow.
        path = save(tmp_path / "c.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=100)
        assert b"Adobe" in path.read_bytes()[:200]
        red, green, blue = read_rgb(path).getpixel((8, 8))
        assert red >= 250
        assert max(green, blue) <= 5

    def test_transparency_is_blended_onto_white(self, tmp_path: Path) -> None:
        clear = Image.new("RGBA", (4, 4), (9, 9, 9, 0))
        clear.putpixel((1, 0), (0, 0, 0, 255))
        clear.putpixel((2, 0), (0, 0, 0, 51))  # 1/5 black on white: 204
        image = read_rgb(save(tmp_path / "a.png", clear))
        assert [image.getpixel((x, 0)) for x in range(3)] == [(255,) * 3, (0,) * 3, (204,) * 3]
        grey = Image.new("LA", (4, 4), (9, 0))
        assert read_rgb(save(tmp_path / "la.png", grey)).getpixel((0, 0)) == (255,) * 3
        palette = Image.new("P", (4, 4), 1)
        palette.putpalette([9, 9, 9, 0, 0, 0])
        for clear, level in ((1, 255), (0, 0), (bytes([255, 51]), 204)):
            path = save(tmp_path / "p.png", palette, transparency=clear)
            assert read_rgb(path).getpixel((0, 0)) == (level,) * 3
        keyed = save(tmp_path / "key.png", Image.new("L", (4, 4), 9), transparency=9)
        assert read_rgb(keyed).getpixel((0, 0)) == (255,) * 3

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_is_undone(self, tmp_path: Path, orientation: int) -> None:
        upright = np.zeros((4, 6), dtype=np.uint8)
        upright[0, 0], upright[0, -1] = 255, 128  # marks the corners top left and top right
        # The stored rows and columns for each orientation value, by the EXIF standard.
        stored = {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.T,
            6: upright.T[::-1],
            7: upright[::-1, ::-1].T,
            8: upright[::-1].T,
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = save(tmp_path / "o.png", Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
        np.testing.assert_array_equal(np.asarray(read_rgb(path))[..., 0], upright)

    def test_pixels_of_unknown_range_are_refused(self, tmp_path: Path) -> None:
        floating = save(tmp_path / "f.tif", Image.fromarray(np.ones((4, 4), dtype=np.float32)))
        with pytest.raises(ValueError, match="f.tif: .*got floating-point pixels, whose range is unknown"):
            read_rgb(floating)
        deep = save(tmp_path / "i.tif", Image.fromarray(np.full((4, 4), 255, dtype=np.int32)))
        with pytest.raises(
            ValueError, match="i.tif: .*got 32-bit integers, whose range is unknown; bit_depth"
        ):
            read_rgb(deep)
        assert read_rgb(deep, bit_depth=8).getpixel((0, 0)) == (255,) * 3
        with pytest.raises(ValueError, match=r"levels must be in 0\.\.4095, got 5000\.\.5000"):
            read_rgb(save(tmp_path / "i.tif", grey_16(5000)), bit_depth=12)
        with pytest.raises(ValueError, match=r"ImageFolder needs bit_depth in 8\.\.32, got 4"):
            ImageFolder(tmp_path, image_size=8, class_cond=False, bit_depth=4)

    def test_a_decompression_bomb_is_refused(self, tmp_path: Path) -> None:
        path = save(tmp_path / "bomb.png")
        content = bytearray(path.read_bytes())
        content[16:24] = struct.pack(">II", 30000, 30000)  # the header's width and height
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        path.write_bytes(bytes(content))
        with pytest.raises(ValueError, match="corrupt image .*bomb.png: DecompressionBombError"):
            read_rgb(path)
