from pathlib import Path

import pytest
import torch
from PIL import Image

from speedit_plugins.registry import DATASETS, build
from speedit_plugins.trainer.data.loader import ResumableLoader
from speedit_plugins.trainer.data.videos.files import write_mp4
from speedit_plugins.trainer.data.videos.folder import VideoFolder

pytest.importorskip("av")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def video(path: Path, num_frames: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, torch.zeros(num_frames, 16, 16, 1, dtype=torch.uint8), fps=8)
    return path


def frames(folder: Path, num_frames: int) -> Path:
    """Writes numbered images without leading zeros; frame k is filled with grey level 10 k."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_frames):
        Image.new("RGB", (16, 16), (10 * number,) * 3).save(folder / f"frame_{number}.png")
    return folder


class TestLayouts:
    def test_classes_are_the_sorted_folder_names(self, tmp_path: Path) -> None:
        for name in ("walk/b.mp4", "run/deep/a.mp4", "walk/a.mp4"):
            video(tmp_path / name)
        (tmp_path / "run" / "notes.txt").write_text("no video")
        (tmp_path / "walk" / "c.flv").write_bytes(b"a suffix that is not read")
        (tmp_path / "run" / "._a.mp4").write_text("a file system's own record")
        data = VideoFolder(tmp_path, image_size=8, num_frames=4)
        assert data.classes == ("run", "walk")
        assert data.left_out == {".flv": 1, ".txt": 1}
        assert (data.num_classes, data.channels, data.image_size, data.num_frames) == (2, 3, 8, 4)
        assert [data.path(index).name for index in range(3)] == ["a.mp4", "a.mp4", "b.mp4"]
        samples = [data.load(index, generator()) for index in range(3)]
        assert [sample["label"] for sample in samples] == [0, 1, 1]
        assert all(sample["video"].shape == (3, 4, 8, 8) for sample in samples)

    def test_classes_may_come_from_file_names_as_in_ucf101(self, tmp_path: Path) -> None:
        for name in ("v_YoYo_g01_c01", "v_Archery_g02_c01", "v_YoYo_g01_c02"):
            video(tmp_path / f"{name}.mp4")
        data = VideoFolder(tmp_path, image_size=8, num_frames=4)
        assert data.classes == ("Archery", "YoYo")
        assert data.labels.tolist() == [0, 1, 1]
        video(tmp_path / "other.mp4")
        with pytest.raises(ValueError, match=r"or names such as v_CLASS_g01_c01.avi, got .*other\.mp4"):
            VideoFolder(tmp_path, image_size=8, num_frames=4)

    def test_without_classes_files_and_folders_of_frames_are_found_at_any_depth(self, tmp_path: Path) -> None:
        video(tmp_path / "a.mp4")
        frames(tmp_path / "b" / "c", 12)
        data = VideoFolder(tmp_path, image_size=8, num_frames=4, class_cond=False)
        assert (len(data), data.num_classes, data.classes) == (2, 0, ())
        assert {data.load(index, generator())["label"] for index in range(2)} == {0}

    def test_frames_are_in_numeric_order(self, tmp_path: Path) -> None:
        frames(tmp_path / "x" / "one", 12)
        data = VideoFolder(tmp_path, image_size=8, num_frames=12)
        clip = data.load(0, generator())["video"]
        # Constant images survive cropping; 0..255 maps to [-1, 1] linearly.
        expected = (torch.arange(12) * 10 / 127.5 - 1).view(1, 12, 1, 1).expand(3, 12, 8, 8)
        torch.testing.assert_close(clip, expected, atol=1e-6, rtol=0)

    def test_folders_of_frames_go_to_buckets(self, tmp_path: Path) -> None:
        frames(tmp_path / "one", 3)
        data = VideoFolder(
            tmp_path, image_size=8, num_frames=2, class_cond=False, buckets=[[2, 8, 16], [3, 8, 8]]
        )
        assert data.buckets is not None
        assert data.buckets.tolist() == [1]

    def test_the_registry_builds_it_and_workers_load_it(self, tmp_path: Path) -> None:
        video(tmp_path / "a.mp4")
        frames(tmp_path / "b", 4)
        config = {"type": "VideoFolder", "root": str(tmp_path), "image_size": 8, "num_frames": 2}
        data = build(DATASETS, {**config, "class_cond": False})
        loader = ResumableLoader(data, batch_size=2, num_workers=1)
        assert next(loader)["video"].shape == (2, 3, 2, 8, 8)
        loader.close()


class TestRefusals:
    def test_unusable_roots_say_why(self, tmp_path: Path) -> None:
        empty = tmp_path / "empty"
        empty.mkdir()
        with pytest.raises(ValueError, match=r"needs root to be a folder, got .*nowhere"):
            VideoFolder(tmp_path / "nowhere", image_size=8, num_frames=2)
        with pytest.raises(ValueError, match="one folder per class below .*empty, got no folder"):
            VideoFolder(empty, image_size=8, num_frames=2)
        with pytest.raises(ValueError, match="found no videos below .*empty"):
            VideoFolder(empty, image_size=8, num_frames=2, class_cond=False)
        with pytest.raises(
            ValueError, match="class folder .*empty needs video files or folders of frames, got nothing"
        ):
            VideoFolder(tmp_path, image_size=8, num_frames=2)

    def test_mixed_layouts_are_refused(self, tmp_path: Path) -> None:
        frames(tmp_path / "walk", 3)
        with pytest.raises(ValueError, match="class folder .*walk needs .*, got frames directly in it"):
            VideoFolder(tmp_path, image_size=8, num_frames=2)
        video(tmp_path / "walk" / "a.mp4")
        with pytest.raises(ValueError, match=r"frames may hold only images, got .*frame_0\.png and .*a\.mp4"):
            VideoFolder(tmp_path, image_size=8, num_frames=2, class_cond=False)
        video(tmp_path / "v_Walk_g01_c01.mp4")
        with pytest.raises(ValueError, match=r"or only files, got both: .*walk and .*v_Walk_g01_c01\.mp4"):
            VideoFolder(tmp_path, image_size=8, num_frames=2)

    def test_a_link_out_of_the_root_is_refused_unless_followed(self, tmp_path: Path) -> None:
        outside = video(tmp_path / "outside" / "far.mp4")
        root = tmp_path / "root"
        video(root / "walk" / "near.mp4")
        (root / "walk" / "away.mp4").symlink_to(outside)
        with pytest.raises(ValueError, match=r"away\.mp4 leads out of the data root .*follow_links=True"):
            VideoFolder(root, image_size=8, num_frames=2)
        assert len(VideoFolder(root, image_size=8, num_frames=2, follow_links=True)) == 2
        (root / "walk" / "up").symlink_to(root)
        with pytest.raises(ValueError, match="up leads in a circle"):
            VideoFolder(root, image_size=8, num_frames=2, follow_links=True)
        (root / "walk" / "up").unlink()
        (root / "walk" / "dead.mp4").symlink_to(root / "gone.mp4")
        with pytest.raises(ValueError, match=r"dead\.mp4 leads to nothing: .*gone\.mp4"):
            VideoFolder(root, image_size=8, num_frames=2, follow_links=True)

    def test_damaged_and_short_videos_are_found_at_the_start(self, tmp_path: Path) -> None:
        video(tmp_path / "a" / "long.mp4", 6)
        video(tmp_path / "a" / "short.mp4", 3)
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "broken.mp4").write_bytes(b"no video")
        message = r"2 of 3 videos .*short\.mp4 has 3 frames, wanted at least 5 .*; corrupt .*broken\.mp4"
        with pytest.raises(ValueError, match=message):
            VideoFolder(tmp_path, image_size=8, num_frames=5)
        with pytest.warns(UserWarning, match=message):
            data = VideoFolder(tmp_path, image_size=8, num_frames=5, on_corrupt="skip")
        assert data.num_corrupt == 2
        # The label is that of the replacing video.
        assert [data.load(index, generator())["label"] for index in range(3)] == [0, 0, 0]
