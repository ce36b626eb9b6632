import ast
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from speedit_plugins.trainer.data.images import pixels
from speedit_plugins.trainer.data.images.fit import FITS, Fit, center_crop
from speedit_plugins.trainer.data.images.folder import ImageFolder
from speedit_plugins.trainer.data.videos.folder import VideoFolder


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save(path: Path, image: Image.Image | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise(8, 8)).save(path, **options)
    return path


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

    def test_without_flips_no_random_number_is_used(self, tmp_path: Path) -> None:
        save(tmp_path / "a" / "0.png")
        used = generator()
        ImageFolder(tmp_path, image_size=8).load(0, used)
        assert torch.equal(used.get_state(), generator().get_state())


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

    def test_bad_fits_say_what_is_wanted(self, tmp_path: Path) -> None:
        for options, message in (
            ({"fit": "stretch"}, "fit must be one of crop, pad, random_crop, got 'stretch'"),
            ({"pad_color": "white"}, "pad_color has no effect with fit: crop; wanted fit: pad"),
            ({"fit": "pad", "pad_color": "whitish"}, "pad_color must be a name, .* got 'whitish'"),
            ({"fit": "pad", "pad_color": [0, 0, 256]}, r"three numbers in 0..255, got \[0, 0, 256\]"),
        ):
            with pytest.raises(ValueError, match=message):
                ImageFolder(tmp_path, image_size=8, **options)

    def test_the_frames_of_a_clip_are_cropped_alike(self, tmp_path: Path) -> None:
        for number in range(3):
            save(tmp_path / "clip" / f"{number}.png", noise(8, 20))
        options = {"image_size": 8, "num_frames": 3, "class_cond": False}
        crops = [
            VideoFolder(tmp_path, **options, fit="random_crop").clip(0, generator(i))[0] for i in range(5)
        ]
        for video in crops:
            assert torch.equal(video, video[:, :1].expand_as(video))
        assert len({tuple(video[0, 0, 0].tolist()) for video in crops}) > 1
        padded, _ = VideoFolder(tmp_path, **options, fit="pad", pad_color="white").clip(0, generator())
        # 8 x 20 pixels become 3 x 8.
        assert padded[:, :, 0].unique().tolist() == [1.0]
        assert padded[:, :, 4].unique().numel() > 1
