import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from speedit_plugins.registry import DATASETS, build
from speedit_plugins.trainer.data.images import pixels
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
