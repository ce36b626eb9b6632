import ast
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from speedit_plugins.registry import DATASETS, build
from speedit_plugins.trainer.data.images import pixels
from speedit_plugins.trainer.data.images.fit import FITS, Fit, center_crop
from speedit_plugins.trainer.data.images.folder import ImageFolder
from speedit_plugins.trainer.data.images.pixels import read_rgb
from speedit_plugins.trainer.data.loader import ResumableLoader


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save(path: Path, image: Image.Image | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise(8, 8)).save(path, **options)
    return path


def damage(path: Path) -> Path:
    """Cuts the file in half; the header stays."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def grey_16(level: int) -> Image.Image:
    return Image.fromarray(np.full((4, 4), level, dtype=np.uint16))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Classes ant (2 images), bee (1, in a subfolder) and cat (1); image i is filled with grey level 10 i."""
    folder = tmp_path / "data"
    for position, name in enumerate(["ant/1.png", "ant/2.PNG", "bee/deep/0.jpg", "cat/x.webp"]):
        grey = (10 * position,) * 3
        save(folder / name, Image.new("RGB", (8, 8), grey), **({"lossless": True} if "webp" in name else {}))
    (folder / "ant" / "notes.txt").write_text("no image")
    (folder / "ant" / "._1.png").write_text("a file system's own record")
    (folder / ".cache").mkdir()
    return folder


class TestLayout:
    def test_classes_are_the_sorted_folder_names(self, root: Path) -> None:
        folder = ImageFolder(root, image_size=8)
        assert folder.classes == ("ant", "bee", "cat")
        assert (folder.num_classes, folder.channels, folder.image_size, len(folder)) == (3, 3, 8, 4)
        assert folder.labels.tolist() == [0, 0, 1, 2]
        assert [folder.path(index).name for index in range(4)] == ["1.png", "2.PNG", "0.jpg", "x.webp"]
        for index, label in enumerate([0, 0, 1, 2]):
            sample = folder.load(index, generator())
            assert type(sample["label"]) is int
            assert sample["label"] == label
            assert sample["image"].dtype == torch.float32
            # Constant images survive cropping and JPEG; 0..255 maps to [-1, 1] linearly.
            expected = torch.full((3, 8, 8), 10 * index / 127.5 - 1.0)
            torch.testing.assert_close(sample["image"], expected, atol=1e-6, rtol=0)

    def test_without_classes_every_image_below_the_root_is_used(self, root: Path) -> None:
        save(root / "loose.png")
        folder = ImageFolder(root, image_size=8, class_cond=False)
        assert (len(folder), folder.num_classes, folder.classes) == (5, 0, ())
        assert folder.path(0).name == "loose.png"
        assert {folder.load(index, generator())["label"] for index in range(5)} == {0}

    def test_the_registry_builds_it(self, root: Path) -> None:
        config = {"type": "ImageFolder", "root": str(root), "image_size": 8, "class_cond": False}
        assert len(build(DATASETS, config)) == 4

    def test_unusable_roots_say_why(self, root: Path, tmp_path: Path) -> None:
        empty = tmp_path / "empty"
        empty.mkdir()
        with pytest.raises(ValueError, match="needs root to be a folder, got .*nowhere"):
            ImageFolder(tmp_path / "nowhere", image_size=8)
        with pytest.raises(ValueError, match="needs root to be a folder, got .*1.png"):
            ImageFolder(root / "ant" / "1.png", image_size=8)
        with pytest.raises(ValueError, match="one folder per class below .*empty, got no folder"):
            ImageFolder(empty, image_size=8)
        with pytest.raises(ValueError, match="found no images below .*empty"):
            ImageFolder(empty, image_size=8, class_cond=False)
        with pytest.raises(ValueError, match=r"an image directly in it: .*1.png; class_cond=False uses"):
            ImageFolder(root / "ant", image_size=8)
        (root / "bare").mkdir()
        with pytest.raises(ValueError, match="class folder .*bare has no images"):
            ImageFolder(root, image_size=8)

    def test_bad_options_say_what_is_wanted(self, root: Path) -> None:
        with pytest.raises(ValueError, match="image_size >= 1, got 0"):
            ImageFolder(root, image_size=0)
        with pytest.raises(ValueError, match=r"on_corrupt in \('raise', 'skip'\), got 'ignore'"):
            ImageFolder(root, image_size=8, on_corrupt="ignore")
        with pytest.raises(IndexError, match="has 4 images, got index 4"):
            ImageFolder(root, image_size=8).load(4, generator())


class TestLeftOut:
    @pytest.mark.parametrize("suffix", [".jfif", ".jp2", ".avif", ".pgm", ".tga", ".TIFF"])
    def test_pictures_of_every_format_that_pillow_reads_are_used(self, root: Path, suffix: str) -> None:
        if suffix.lower() not in pixels.readable_suffixes():
            pytest.skip(f"this Pillow was built without {suffix}")
        save(root / "cat" / f"y{suffix}", Image.new("L" if suffix == ".pgm" else "RGB", (8, 8), "white"))
        folder = ImageFolder(root, image_size=8)
        assert len(folder) == 5
        torch.testing.assert_close(
            folder.load([folder.name(i) for i in range(5)].index(f"cat/y{suffix}"), generator())["image"],
            torch.ones(3, 8, 8),
            atol=0.02,  # the formats that lose a little are off by at most a few of 255 levels
            rtol=0,
        )

    @pytest.mark.parametrize("class_cond", [True, False])
    def test_other_files_are_counted_by_suffix(self, root: Path, class_cond: bool) -> None:
        for name in ("a.heic", "b.HEIC", "c.mov", "README"):
            (root / "cat" / name).write_bytes(b"x")
        folder = ImageFolder(root, image_size=8, class_cond=class_cond)
        assert folder.left_out == {".heic": 2, ".mov": 1, ".txt": 1, "no suffix": 1}

    def test_a_plugin_of_pillow_adds_its_formats(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert ".heic" not in pixels.readable_suffixes()
        save(root / "cat" / "y.png").rename(root / "cat" / "y.heic")
        Image.init()
        monkeypatch.setitem(Image.EXTENSION, ".heic", "PNG")
        folder = ImageFolder(root, image_size=8)
        assert (len(folder), folder.left_out) == (5, {".txt": 1})


class TestFit:
    def test_padding_keeps_the_whole_image_in_the_middle(self, tmp_path: Path) -> None:
        # Twice as wide as high: scaled by a quarter to 8 x 4, with 2 rows above and below.
        image = noise(16, 32)
        expected = np.asarray(center_crop(image, 4, 8))
        save(tmp_path / "a.png", image)
        options = {"image_size": 8, "class_cond": False, "fit": "pad"}
        for color, level in ((None, -1.0), ("white", 1.0), ([255, 255, 255], 1.0), ("#ffffff", 1.0)):
            found = ImageFolder(tmp_path, **options, pad_color=color).load(0, generator())["image"]
            torch.testing.assert_close(found[:, 2:6], pixels.as_tensor(Image.fromarray(expected)))
            assert found[:, :2].unique().tolist() == found[:, 6:].unique().tolist() == [level]

    @settings(max_examples=30)
    @given(
        size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
        target=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    )
    def test_every_fit_has_the_target_size(self, size: tuple[int, int], target: tuple[int, int]) -> None:
        for name in FITS:
            fit = Fit(name)
            assert fit.apply(noise(*size), *target, fit.draw(generator())).size == target[::-1]

    def test_random_crops_are_uniform_over_all_parts(self, tmp_path: Path) -> None:
        image = noise(8, 10)
        fit, used = Fit("random_crop"), generator()
        parts = [np.asarray(image)[:, left : left + 8] for left in range(3)]
        counts = [0, 0, 0]
        for _ in range(300):
            found = np.asarray(fit.apply(image, 8, 8, fit.draw(used)))
            counts[next(i for i, part in enumerate(parts) if np.array_equal(found, part))] += 1
        # 4 sigma of a binomial count: 4 * sqrt(300 * 2 / 9) = 33.
        assert all(abs(count - 100) <= 33 for count in counts)

    def test_bad_fits_say_what_is_wanted(self, root: Path) -> None:
        for options, message in (
            ({"fit": "stretch"}, "fit must be one of crop, pad, random_crop, got 'stretch'"),
            ({"pad_color": "white"}, "pad_color has no effect with fit: crop; wanted fit: pad"),
            ({"fit": "pad", "pad_color": "whitish"}, "pad_color must be a name, .* got 'whitish'"),
            ({"fit": "pad", "pad_color": [0, 0, 256]}, r"three numbers in 0..255, got \[0, 0, 256\]"),
        ):
            with pytest.raises(ValueError, match=message):
                ImageFolder(root, image_size=8, **options)


class TestLinks:
    @pytest.mark.parametrize("class_cond", [True, False])
    @pytest.mark.parametrize("link", ["ant/away.png", "dog"])
    def test_a_link_out_of_the_root_is_refused_unless_followed(
        self, root: Path, tmp_path: Path, link: str, class_cond: bool
    ) -> None:
        outside = save(tmp_path / "outside" / "far.png")
        target = outside if link.endswith("png") else outside.parent
        (root / link).symlink_to(target)
        message = f"link .*{link} leads out of the data root .*data, to {target}; follow_links=True"
        with pytest.raises(ValueError, match=message):
            ImageFolder(root, image_size=8, class_cond=class_cond)
        folder = ImageFolder(root, image_size=8, class_cond=class_cond, follow_links=True)
        assert len(folder) == 5

    def test_a_chain_of_links_is_judged_by_its_final_target(self, root: Path, tmp_path: Path) -> None:
        outside = save(tmp_path / "far.png")
        (root / "ant" / "hop").symlink_to(outside)  # no image suffix, so the walk skips it
        (root / "bee" / "hop.png").symlink_to(root / "ant" / "hop")
        with pytest.raises(ValueError, match=r"bee/hop.png leads out of .*far.png"):
            ImageFolder(root, image_size=8)

    def test_a_sibling_with_the_same_prefix_is_outside(self, root: Path) -> None:
        outside = save(root.with_name("data2") / "far.png")
        (root / "ant" / "near.png").symlink_to(outside)
        with pytest.raises(ValueError, match="leads out of"):
            ImageFolder(root, image_size=8)

    def test_links_inside_the_root_and_the_root_itself_are_followed(self, root: Path, tmp_path: Path) -> None:
        (root / "dog").symlink_to(root / "cat")
        (root / "ant" / "3.png").symlink_to("1.png")
        alias = tmp_path / "alias"
        alias.symlink_to(root)
        folder = ImageFolder(alias, image_size=8)
        assert folder.classes == ("ant", "bee", "cat", "dog")
        assert folder.labels.tolist() == [0, 0, 0, 1, 2, 3]

    @pytest.mark.parametrize("follow_links", [True, False])
    def test_links_to_nothing_and_in_circles_are_refused(self, root: Path, follow_links: bool) -> None:
        dead = root / "ant" / "dead.png"
        dead.symlink_to(root / "gone.png")
        with pytest.raises(ValueError, match="dead.png leads to nothing: .*gone.png"):
            ImageFolder(root, image_size=8, follow_links=follow_links)
        dead.unlink()
        (root / "ant" / "up").symlink_to(root)
        with pytest.raises(ValueError, match="up leads in a circle"):
            ImageFolder(root, image_size=8, follow_links=follow_links)


class TestCorrupt:
    def test_raise_names_the_file(self, root: Path) -> None:
        damage(root / "ant" / "1.png")
        damage(save(root / "cat" / "x.jpg", noise(64, 64)))
        folder = ImageFolder(root, image_size=8)
        with pytest.raises(ValueError, match=r"corrupt image .*ant/1.png: "):
            folder.load(0, generator())
        with pytest.raises(ValueError, match=r"corrupt image .*cat/x.jpg: OSError: .*truncated"):
            folder.load(3, generator())
        assert folder.load(1, generator())["label"] == 0

    def test_skip_takes_the_next_readable_image_and_warns_once_per_file(self, root: Path) -> None:
        damage(root / "ant" / "2.PNG")
        (root / "bee" / "deep" / "0.jpg").write_bytes(b"")
        folder = ImageFolder(root, image_size=8, on_corrupt="skip")
        with pytest.warns(UserWarning, match="corrupt image") as caught:
            sample = folder.load(1, generator())
        assert sample["label"] == 2  # the label of the replacing image
        assert torch.equal(sample["image"], folder.load(3, generator())["image"])
        assert [name in str(w.message) for w, name in zip(caught, ["2.PNG", "0.jpg"], strict=True)] == [
            True
        ] * 2
        assert folder.num_corrupt == 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert folder.load(1, generator())["label"] == 2
            assert folder.load(2, generator())["label"] == 2
        assert folder.num_corrupt == 2

    def test_skip_wraps_around_at_the_end_and_stops_when_nothing_is_readable(self, root: Path) -> None:
        folder = ImageFolder(root, image_size=8, on_corrupt="skip")
        damage(folder.path(3))
        with pytest.warns(UserWarning, match="x.webp"):
            assert folder.load(3, generator())["label"] == 0
        for index in range(3):
            damage(folder.path(index))
        with (
            pytest.warns(UserWarning, match="corrupt image"),
            pytest.raises(ValueError, match="no readable image: all 4 files below .* are damaged"),
        ):
            folder.load(0, generator())

    def test_workers_share_the_count_of_damaged_files(self, root: Path) -> None:
        damage(root / "cat" / "x.webp")
        folder = ImageFolder(root, image_size=8, on_corrupt="skip")
        loader = ResumableLoader(folder, batch_size=4, num_workers=1)
        assert sorted(next(loader)["label"].tolist()) == [0, 0, 0, 1]
        assert folder.num_corrupt == 1
        loader.close()

    def test_a_failing_system_is_not_a_damaged_file(self, root: Path) -> None:
        folder = ImageFolder(root, image_size=8, on_corrupt="skip")
        folder.path(0).unlink()
        with pytest.raises(FileNotFoundError, match=r"1\.png"):
            folder.load(0, generator())
        assert folder.num_corrupt == 0

    @settings(max_examples=60, deadline=None)
    @given(
        data=st.binary(max_size=64), cut=st.integers(0, 300), suffix=st.sampled_from(["png", "jpg", "gif"])
    )
    def test_any_bytes_give_an_image_or_an_error_with_the_name(
        self, tmp_path_factory: pytest.TempPathFactory, data: bytes, cut: int, suffix: str
    ) -> None:
        path = save(tmp_path_factory.mktemp("bytes") / f"x.{suffix}")
        whole = path.read_bytes()
        path.write_bytes(whole[:cut] + data + whole[cut + len(data) :])
        try:
            outcome = read_rgb(path).mode
        except ValueError as error:
            outcome = str(error)
        assert outcome == "RGB" or str(path) in outcome


class TestPixels:
    @pytest.mark.parametrize(
        "size", [(8, 8), (16, 8), (8, 21), (9, 13), (7, 5), (40, 33), (64, 17), (100, 150)]
    )
    def test_crop_has_the_target_size(self, size: tuple[int, int]) -> None:
        assert center_crop(noise(*size), 8, 8).size == (8, 8)

    def test_halving_is_a_box_average_of_two_by_two_pixels(self) -> None:
        # With multiples of 16, averaging 32 -> 16 -> 8 (four divisions by 2) is exact.
        pixels = np.random.default_rng(0).integers(0, 16, (32, 32, 3), dtype=np.uint8) * 16
        expected = pixels.astype(np.int64).reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))
        np.testing.assert_array_equal(np.asarray(center_crop(Image.fromarray(pixels), 8, 8)), expected)

    def test_crop_is_central(self) -> None:
        image = noise(8, 14)
        np.testing.assert_array_equal(np.asarray(center_crop(image, 8, 8)), np.asarray(image)[:, 3:11])
        image = noise(13, 8)
        np.testing.assert_array_equal(np.asarray(center_crop(image, 8, 8)), np.asarray(image)[2:10])

    @pytest.mark.hosts
    def test_crop_equals_that_of_dits_training_script(self) -> None:
        hosts = os.environ.get("SPEEDIT_HOSTS")
        script = Path(hosts or "") / "facebookresearch+DiT" / "train.py"
        if not hosts or not script.exists():
            pytest.skip("needs $SPEEDIT_HOSTS/facebookresearch+DiT")
        # Run only this function: the script as a whole needs torchvision and a GPU.
        tree = ast.parse(script.read_text())
        chosen = [node for node in tree.body if getattr(node, "name", "") == "center_crop_arr"]
        namespace: dict[str, Any] = {"Image": Image, "np": np}
        exec(compile(ast.Module(chosen, []), str(script), "exec"), namespace)
        sizes = [(height, width) for height in (5, 8, 15, 16, 17, 33, 100) for width in (8, 9, 31, 64, 131)]
        for seed, size in enumerate(sizes):
            image = noise(*size, seed=seed)
            theirs = namespace["center_crop_arr"](image, 8)
            np.testing.assert_array_equal(np.asarray(center_crop(image, 8, 8)), np.asarray(theirs))

    def test_flip_is_a_fair_coin_of_the_generator(self, tmp_path: Path) -> None:
        save(tmp_path / "a" / "0.png")
        plain = ImageFolder(tmp_path, image_size=8, random_flip=False).load(0, generator())["image"]
        folder = ImageFolder(tmp_path, image_size=8, random_flip=True)
        flips = 0
        for seed in range(400):
            image = folder.load(0, generator(seed))["image"]
            flipped = torch.equal(image, plain.flip(-1))
            assert flipped or torch.equal(image, plain)
            assert torch.equal(image, folder.load(0, generator(seed))["image"])
            flips += flipped
        # 5 sigma of a binomial count: 5 * sqrt(400 / 4) = 50.
        assert abs(flips - 200) <= 50

    def test_without_flips_no_random_number_is_used(self, root: Path) -> None:
        used = generator()
        ImageFolder(root, image_size=8).load(0, used)
        assert torch.equal(used.get_state(), generator().get_state())


class TestReading:
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
