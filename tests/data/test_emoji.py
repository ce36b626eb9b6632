import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import build_emoji
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from speedit_plugins.registry import DATASETS, build
from speedit_plugins.trainer.data.images.emoji import SOURCE, Emoji, halved, read_sheet
from speedit_plugins.trainer.data.loader import ResumableLoader

LARGEST_FILE_BYTES = 3_300_000
# Of the published pixels at 32 x 32, uint8 (N, H, W, C), on which measurements rest.
SHA256_AT_32 = "7cadcbed249011e06ba111b182665dd28e6970928a01379f0ba0ad41c74a3637"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image_of(caption: str, **options: Any) -> torch.Tensor:
    emoji = Emoji(**options)
    image: torch.Tensor = emoji.load(emoji.captions.index(caption), generator())["image"]
    return image


def test_names_fit_their_images() -> None:
    emoji = Emoji()
    assert (len(emoji), emoji.channels, emoji.num_classes, emoji.image_size) == (1911, 3, 0, 32)
    sample = emoji.load(0, generator())
    assert sample["caption"] == emoji.captions[0] == "grinning face"
    assert sample["image"].dtype == torch.float32
    # These shapes are plain red, green and blue in the middle.
    for channel, caption in enumerate(["red heart", "green circle", "blue circle"]):
        image = image_of(caption)
        assert image.shape == (3, 32, 32)
        assert int(image[:, 16, 16].argmax()) == channel
    france = image_of("flag: france")
    assert [int(france[:, 16, column].argmax()) for column in (4, 28)] == [2, 0]
    assert float(france[:, 16, 16].min()) > 0.8  # white between


def test_pixels_span_the_scale_and_lie_over_white() -> None:
    emoji = Emoji()
    images = torch.stack([emoji.load(index, generator())["image"] for index in range(len(emoji))])
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    # A circle leaves the corners of its image empty.
    assert torch.equal(image_of("red circle")[:, ::31, ::31], torch.ones(3, 2, 2))


def test_captions_are_different_and_plain() -> None:
    captions = Emoji().captions
    assert len(set(captions)) == len(captions)
    assert all(c.isascii() and c == c.lower().strip() and c for c in captions)
    assert {"flag: cote d'ivoire", "pinata", "nine o'clock"} <= set(captions)
    assert not any("skin tone" in caption and ":" in caption for caption in captions)


def test_the_size_of_the_source_averages_to_the_pixels_that_were_published_at_32() -> None:
    levels = [
        ((emoji.load(index, generator())["image"] + 1) * 127.5).round().to(torch.uint8)
        for emoji in (Emoji(image_size=64), Emoji(image_size=32))
        for index in range(len(emoji))
    ]
    large, small = torch.stack(levels[:1911]), torch.stack(levels[1911:])
    mean = large.double().unflatten(2, (32, 2)).unflatten(4, (32, 2)).mean(dim=(3, 5))
    assert torch.equal(mean.round().to(torch.uint8), small)
    pixels = small.permute(0, 2, 3, 1).contiguous().numpy()
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == SHA256_AT_32


def test_the_smaller_size_is_the_mean_of_two_by_two_pixels() -> None:
    large, small = image_of("red heart"), image_of("red heart", image_size=16)
    mean = (large[:, ::2, ::2] + large[:, 1::2, ::2] + large[:, ::2, 1::2] + large[:, 1::2, 1::2]) / 4
    # float32 sums of values up to 1, in another order.
    assert_close(small, mean, atol=1e-6, rtol=0)


def test_the_splits_are_every_tenth_image_and_the_rest() -> None:
    whole, train, test = (Emoji(split=split) for split in ("all", "train", "test"))
    assert test.captions == whole.captions[9::10]
    assert sorted(train.captions + test.captions) == sorted(whole.captions)
    sample, same = test.load(3, generator()), whole.load(39, generator())
    assert sample["caption"] == same["caption"]
    assert torch.equal(sample["image"], same["image"])


def test_only_random_flip_uses_random_numbers() -> None:
    used = generator()
    plain = Emoji().load(5, used)["image"]
    assert torch.equal(used.get_state(), generator().get_state())
    emoji = Emoji(random_flip=True)
    seen = [emoji.load(5, generator(seed))["image"] for seed in range(40)]
    flipped = [torch.equal(image, plain.flip(-1)) for image in seen]
    assert all(
        is_flipped or torch.equal(image, plain) for image, is_flipped in zip(seen, flipped, strict=True)
    )
    # 4 sigma of a fair coin thrown 40 times: 4 sqrt(10) = 12.6.
    assert 7 < sum(flipped) < 33


def test_bad_options_say_what_is_wanted() -> None:
    with pytest.raises(ValueError, match=r"image_size in \(16, 32, 64\), got 128"):
        build(DATASETS, {"type": "Emoji", "image_size": 128})
    with pytest.raises(ValueError, match=r"split in \('all', 'train', 'test'\), got 'val'"):
        Emoji(split="val")
    with pytest.raises(IndexError, match="has 191 images, got index 191"):
        Emoji(split="test").load(191, generator())


def test_workers_and_a_pickled_copy_give_the_same_batches() -> None:
    emoji = Emoji(random_flip=True)
    alone = ResumableLoader(emoji, batch_size=8)
    forked = ResumableLoader(pickle.loads(pickle.dumps(emoji)), batch_size=8, num_workers=2)  # noqa: S301 - written here
    for _ in range(3):
        mine, theirs = next(alone), next(forked)
        assert mine["caption"] == theirs["caption"]
        assert torch.equal(mine["image"], theirs["image"])
    forked.close()


def test_the_file_is_small_and_its_sources_are_named() -> None:
    assert SOURCE.stat().st_size <= LARGEST_FILE_BYTES
    attribution = (SOURCE.parent / "EMOJI_ATTRIBUTION.md").read_text()
    assert "Twemoji" in attribution
    assert "CC-BY 4.0" in attribution


class TestTool:
    def test_an_image_is_blended_onto_white_so_that_its_means_stay(self) -> None:
        image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        image.putpixel((0, 0), (255, 0, 0, 255))
        image.putpixel((2, 0), (0, 0, 0, 51))
        whole = build_emoji.blended(image)
        assert (whole.shape, whole.dtype) == ((64, 64, 3), np.uint8)
        assert whole[0, :4].tolist() == [[255, 0, 0], [255] * 3, [204] * 3, [255] * 3]
        half = halved(whole[None])[0]
        # One of four pixels is red: (0 + 3 * 255) / 4 = 191.25. One is 1/5 black: (204 + 765) / 4 = 242.25.
        assert half[0, :3].tolist() == [[255, 191, 191], [242] * 3, [255] * 3]
        with pytest.raises(ValueError, match=r"64 x 64 pixels, got \(32, 32\)"):
            build_emoji.blended(Image.new("RGBA", (32, 32)))

    def test_values_are_rounded_so_that_their_means_are_those_of_exact_ones(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
        opacity = pixels[..., 3:] / 255
        exact = pixels[..., :3] * opacity + 255 * (1 - opacity)
        whole = build_emoji.blended(Image.fromarray(pixels, "RGBA"))
        assert np.abs(whole - exact).max() < 1
        means = exact.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        assert np.array_equal(halved(whole[None])[0], np.rint(means))
        # Rounding each value to the nearest does not do.
        assert not np.array_equal(halved(np.rint(exact).astype(np.uint8)[None])[0], np.rint(means))

    @pytest.mark.parametrize("number", [1, 300])
    def test_a_sheet_gives_its_images_back(self, number: int) -> None:
        images = np.random.default_rng(0).integers(0, 2, (number, 64, 64, 3), dtype=np.uint8) * 255
        images[:, 8:] = 0
        assert np.array_equal(read_sheet(build_emoji.sheet(images).tobytes(), number), images)

    def test_names_become_plain(self) -> None:
        assert build_emoji.caption_of("flag: Côte d’Ivoire") == "flag: cote d'ivoire"
        assert build_emoji.caption_of("Japanese “here” button") == 'japanese "here" button'

    @pytest.mark.parametrize("vendor", ["twitter", "google"])
    def test_images_and_names_are_matched_in_unicode_order(self, tmp_path: Path, vendor: str) -> None:
        names = [
            {"hexcode": "2764", "label": "red heart"},
            {"hexcode": "1F600", "label": "grinning face"},
            {"hexcode": "1F1E6", "label": "regional indicator A"},
        ]
        emoji = [
            {"unified": "2764-FE0F", "image": "2764-fe0f.png", "sort_order": 7},
            {"unified": "1F600", "image": "1f600.png", "sort_order": 1},
        ]
        package = tmp_path / "package.tgz"
        with tarfile.open(package, "w:gz") as archive:
            _add(archive, "package/en/compact.json", json.dumps(names).encode())
            _add(archive, f"package/img/{vendor}/64/1f600.png", _png("yellow"))
            _add(archive, f"package/img/{vendor}/64/2764-fe0f.png", _png("red"))
            _add(archive, "package/emoji.json", json.dumps(emoji).encode())
        with tarfile.open(package) as archive:
            names_of = build_emoji.read_names(archive)
            images, captions = build_emoji.read_images(archive, names_of, vendor=vendor)
        assert captions == ["grinning face", "red heart"]
        assert images[:, 5, 5].tolist() == [[255, 255, 0], [255, 0, 0]]

    def test_another_package_is_one_line_on_stderr(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        other = tmp_path / "other.tgz"
        other.write_bytes(b"other")
        for images, message in (
            (other, "other.tgz must have the SHA-256 f64a"),
            (tmp_path / "absent", "absent"),
        ):
            output = str(tmp_path / "x.npz")
            arguments = ["--images", str(images), "--names", str(other), "--output", output]
            assert build_emoji.main(arguments) == 2
            error = capsys.readouterr().err
            assert error.startswith("build_emoji: error: ")
            assert message in error
            assert error.count("\n") == 1

    def test_the_file_is_written_atomically(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package, output = tmp_path / "package.tgz", tmp_path / "x.npz"
        with tarfile.open(package, "w:gz") as archive:
            _add(archive, "package/en/compact.json", b"[]")
        monkeypatch.setattr(build_emoji, "check_package", lambda path, sha256: None)
        images = np.zeros((1, 64, 64, 3), np.uint8)
        monkeypatch.setattr(build_emoji, "read_images", lambda package, names, vendor: (images, ["a heart"]))
        assert build_emoji.build(package, package, output, side=32) == 1
        with np.load(output) as found:
            assert np.array_equal(found["images"], halved(images))
        assert build_emoji.build(package, package, output) == 1
        with np.load(output) as found:
            assert np.array_equal(read_sheet(found["sheet"].tobytes(), 1), images)
            assert found["captions"].tolist() == ["a heart"]

        def interrupted(file: io.BufferedWriter, **arrays: Any) -> None:
            file.write(b"half")
            raise KeyboardInterrupt

        whole = output.read_bytes()
        monkeypatch.setattr(np, "savez_compressed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_emoji.build(package, package, output)
        assert output.read_bytes() == whole
        assert {path.name for path in tmp_path.iterdir()} == {"package.tgz", "x.npz"}


def _png(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), color).save(file, "png")
    return file.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
