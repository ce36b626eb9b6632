import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from speedit_plugins.registry import DATASETS, build
from speedit_plugins.trainer.data.images.fit import center_crop
from speedit_plugins.trainer.data.loader import ResumableLoader
from speedit_plugins.trainer.data.strings import Strings
from speedit_plugins.trainer.data.videos.clips import frame_order
from speedit_plugins.trainer.data.videos.files import read_frames, real_clip, write_mp4
from speedit_plugins.trainer.data.videos.table import VideoTable

pytest.importorskip("av")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def video(path: Path, num_frames: int, *, height: int = 16, width: int = 16, grey: int = 0) -> Path:
    """Writes a video whose frame k has grey level grey + 4 k; compression changes levels by at most 2."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = (grey + 4 * torch.arange(num_frames)).byte().view(-1, 1, 1, 1)
    write_mp4(path, levels.expand(-1, height, width, 1), fps=8)
    return path


def number_of(frame: torch.Tensor) -> int:
    """Frame number in `video`, from the grey level."""
    return round((float(frame.mean()) + 1) * 127.5 / 4)


def table(folder: Path, text: str, name: str = "videos.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A table of three captioned videos with 10, 20 and 30 frames."""
    for number in (1, 2, 3):
        video(tmp_path / "clips" / f"{number}.mp4", 10 * number)
    return table(
        tmp_path,
        'path,text,num_frames,height,width,fps\nclips/1.mp4,"one, first",10,16,16,8\n'
        "clips/2.mp4,two,20.0,16,16,8.0\nclips/3.mp4,drei ü,,,nan,\n",
    )


class TestSamples:
    def test_a_sample_has_the_cropped_frames_of_the_clip(self, tmp_path: Path) -> None:
        listed = table(tmp_path, f"path,text\n{real_clip()},a rabbit\n")
        data = VideoTable(listed, image_size=32, num_frames=8, frame_interval=2, random_start=False)
        sample = data.load(0, generator())
        assert (data.channels, data.image_size, data.num_frames, data.num_classes) == (3, 32, 8, 0)
        assert sample["caption"] == "a rabbit"
        assert sorted(sample) == ["caption", "video"]
        frames = read_frames(real_clip(), range(0, 16, 2), num_frames=50)
        expected = np.stack([np.asarray(center_crop(frame, 32, 32)) for frame in frames], axis=1)
        expected = torch.from_numpy(expected).float().movedim(-1, 0).movedim(1, 2) / 127.5 - 1
        assert sample["video"].dtype == torch.float32
        assert torch.equal(sample["video"], expected.reshape(sample["video"].shape))

    def test_columns_may_be_absent_or_empty(self, listed: Path) -> None:
        data = VideoTable(listed, image_size=8, num_frames=10)
        assert len(data) == 3
        assert [data.load(index, generator())["caption"] for index in range(3)] == [
            "one, first",
            "two",
            "drei ü",
        ]
        assert data.path(2).name == "3.mp4"

    def test_clips_start_at_every_frame_that_fits_and_no_other(self, listed: Path) -> None:
        data = VideoTable(listed, image_size=8, num_frames=3, frame_interval=3)
        starts = set()
        for seed in range(60):
            clip = data.load(0, generator(seed))["video"]
            numbers = [number_of(frame) for frame in clip.movedim(1, 0)]
            assert numbers == list(range(numbers[0], numbers[0] + 7, 3))
            starts.add(numbers[0])
        # 10 frames, a span of 7: four starts. Missing one in 60 samples has probability 4 * 0.75^60 < 1e-6.
        assert starts == {0, 1, 2, 3}

    def test_the_seed_decides_the_sample_and_fixed_clips_use_no_random_numbers(self, listed: Path) -> None:
        data = VideoTable(listed, image_size=8, num_frames=3, random_flip=True)
        assert torch.equal(data.load(2, generator(1))["video"], data.load(2, generator(1))["video"])
        used = generator()
        VideoTable(listed, image_size=8, num_frames=3, random_start=False).load(0, used)
        assert torch.equal(used.get_state(), generator().get_state())

    def test_flip_is_a_fair_coin(self, tmp_path: Path) -> None:
        listed = table(tmp_path, f"path\n{real_clip()}\n")
        options: dict[str, Any] = {"image_size": 8, "num_frames": 1, "random_start": False, "text": False}
        plain = VideoTable(listed, **options).load(0, generator())["video"]
        data = VideoTable(listed, **options, random_flip=True)
        clips = [data.load(0, generator(seed))["video"] for seed in range(100)]
        flips = sum(torch.equal(clip, plain.flip(-1)) for clip in clips)
        assert flips + sum(torch.equal(clip, plain) for clip in clips) == 100
        # 5 sigma of a binomial count: 5 * sqrt(100 / 4) = 25.
        assert abs(flips - 50) <= 25

    def test_classes_are_numbers_in_numeric_order_then_names(self, tmp_path: Path) -> None:
        video(tmp_path / "a.mp4", 2)
        listed = table(tmp_path, "path,label\na.mp4,10\na.mp4,zebra\na.mp4,9\na.mp4,ant\n")
        data = VideoTable(listed, image_size=8, num_frames=2, text=False, class_cond=True)
        assert data.classes == ("9", "10", "ant", "zebra")
        assert data.num_classes == 4
        assert [data.load(index, generator())["label"] for index in range(4)] == [1, 3, 0, 2]

    def test_without_text_and_classes_the_label_is_0(self, listed: Path) -> None:
        sample = VideoTable(listed, image_size=8, num_frames=2, text=False).load(1, generator())
        assert (sorted(sample), sample["label"]) == (["label", "video"], 0)

    def test_paths_are_relative_to_root(self, listed: Path, tmp_path: Path) -> None:
        moved = table(tmp_path / "elsewhere", listed.read_text(encoding="utf-8"))
        assert len(VideoTable(moved, image_size=8, num_frames=2, root=tmp_path)) == 3

    def test_absolute_paths_and_the_home_folder_do_not_depend_on_root(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "frames").mkdir()
        for number in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / "frames" / f"{number}.png")
        video(tmp_path / "elsewhere" / "1.mp4", 4)
        paths = ["~/frames", f"{tmp_path}/frames", "1.mp4", "../frames", f"{tmp_path}/elsewhere/1.mp4"]
        listed = table(tmp_path, "path,text\n" + "".join(f"{path},{path}\n" for path in paths))
        data = VideoTable(listed, image_size=8, num_frames=4, root="~/elsewhere")
        assert [data.load(index, generator())["caption"] for index in range(len(paths))] == paths
        assert data.num_captions == len(paths)

    def test_the_registry_builds_it(self, listed: Path) -> None:
        config = {"type": "VideoTable", "table": str(listed), "image_size": 8, "num_frames": 2}
        assert len(build(DATASETS, config)) == 3

    def test_workers_and_copies_load_the_same(self, listed: Path) -> None:
        data = VideoTable(listed, image_size=8, num_frames=4)
        data.load(0, generator())
        again = pickle.loads(pickle.dumps(data))  # noqa: S301 - its own pickle
        assert torch.equal(again.load(1, generator(3))["video"], data.load(1, generator(3))["video"])
        batches = []
        for num_workers in (0, 1):
            loader = ResumableLoader(data, batch_size=3, num_workers=num_workers)
            batches.append(next(loader))
            loader.close()
        assert torch.equal(batches[0]["video"], batches[1]["video"])
        assert batches[0]["caption"] == batches[1]["caption"]
        assert batches[0]["video"].shape == (3, 3, 4, 8, 8)


class TestBuckets:
    def test_a_video_goes_to_the_nearest_aspect_ratio_it_is_long_enough_for(self, tmp_path: Path) -> None:
        video(tmp_path / "wide.mp4", 12, height=16, width=32)
        video(tmp_path / "wide_short.mp4", 5, height=16, width=32)
        video(tmp_path / "tall.mp4", 5, height=32, width=16)
        Image.new("RGB", (16, 32)).save(tmp_path / "still.png")
        names = ("wide.mp4", "wide_short.mp4", "tall.mp4", "still.png")
        listed = table(tmp_path, "path,text\n" + "".join(f"{name},{name}\n" for name in names))
        buckets = [[1, 16, 16], [4, 8, 16], [10, 8, 16], [2, 8, 8], [10, 16, 8]]
        data = VideoTable(listed, image_size=8, num_frames=4, buckets=buckets)
        assert data.buckets is not None
        assert data.buckets.dtype == torch.int64
        # The tall video has fewer than ten frames; the square is the nearest among the other buckets.
        assert data.buckets.tolist() == [2, 1, 3, 0]
        shapes = [tuple(data.load(index, generator())["video"].shape) for index in range(4)]
        assert shapes == [(3, 10, 8, 16), (3, 4, 8, 16), (3, 2, 8, 8), (3, 1, 16, 16)]

    def test_sizes_in_the_table_are_used_without_opening_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.mp4").write_bytes(b"never opened")
        listed = table(tmp_path, "path,text,num_frames,height,width\na.mp4,x,9,100,50\n")
        data = VideoTable(listed, image_size=8, num_frames=4, buckets=[[4, 8, 8], [4, 16, 8]])
        assert data.buckets is not None
        assert data.buckets.tolist() == [1]

    def test_images_and_videos_train_together_in_batches_of_one_shape(self, tmp_path: Path) -> None:
        rows = "path,text\n"
        for number in range(3):
            Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
            video(tmp_path / f"{number}.mp4", 4)
            rows += f"{number}.png,image\n{number}.mp4,video\n"
        data = VideoTable(table(tmp_path, rows), image_size=8, num_frames=4, buckets=[[1, 8, 8], [4, 8, 8]])
        loader = ResumableLoader(data, batch_size=3)
        batches = [next(loader) for _ in range(2)]
        found = {(tuple(batch["video"].shape), *batch["caption"]) for batch in batches}
        assert found == {((3, 3, 1, 8, 8), *["image"] * 3), ((3, 3, 4, 8, 8), *["video"] * 3)}

    def test_skip_replaces_a_video_within_its_bucket(self, tmp_path: Path) -> None:
        for name, width in (("a", 16), ("b", 32), ("c", 16)):
            video(tmp_path / f"{name}.mp4", 4, width=width)
        listed = table(tmp_path, "path,text\na.mp4,a\nb.mp4,b\nc.mp4,c\n")
        data = VideoTable(
            listed, image_size=8, num_frames=4, buckets=[[4, 8, 8], [4, 8, 16]], on_corrupt="skip"
        )
        damage(tmp_path / "a.mp4")
        with pytest.warns(UserWarning, match=r"line 2: corrupt video .*a\.mp4"):
            assert data.load(0, generator())["caption"] == "c"
        damage(tmp_path / "b.mp4")
        with (
            pytest.warns(UserWarning, match=r"line 3: .*b\.mp4"),
            pytest.raises(ValueError, match="no usable video for 4 frames of 8 x 16: all 1 are missing"),
        ):
            data.load(1, generator())

    @pytest.mark.parametrize(
        "buckets", [[], [[8, 8]], [[1, 8, 8], [1, 8, 8]], [[0, 8, 8]], [[1, 8, 8.0]], [8], "abc"]
    )
    def test_unusable_buckets_are_refused(self, listed: Path, buckets: Any) -> None:
        with pytest.raises(ValueError, match=r"different \[num_frames, height, width\], each >= 1, got"):
            VideoTable(listed, image_size=8, num_frames=2, buckets=buckets)


class TestUnusableVideos:
    def test_unusable_videos_are_found_when_the_dataset_is_created(self, tmp_path: Path) -> None:
        video(tmp_path / "a.mp4", 9)
        rows = "path,text,num_frames\na.mp4,x,9\ngone.mp4,x,9\na.mp4,x,6\na.mp4,x,\n"
        listed = table(tmp_path, rows)
        message = (
            r"2 of 4 videos cannot be used: .*videos\.csv, line 3: .*gone\.mp4: no such file, wanted a video;"
            r" .*line 4: .*a\.mp4 is listed with 6 frames, wanted at least 7 \(3 frames at an .* of 3\)"
        )
        with pytest.raises(ValueError, match=message):
            VideoTable(listed, image_size=8, num_frames=3, frame_interval=3)
        with pytest.warns(UserWarning, match=message) as caught:
            data = VideoTable(listed, image_size=8, num_frames=3, frame_interval=3, on_corrupt="skip")
        assert (len(caught), len(data), data.num_corrupt) == (1, 4, 2)
        assert data.left_out == {"missing, too short or damaged videos": 2}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for index in range(4):
                assert data.load(index, generator())["video"].shape == (3, 3, 8, 8)

    def test_a_video_with_fewer_frames_than_listed_is_named_when_loaded(self, tmp_path: Path) -> None:
        video(tmp_path / "a.mp4", 9)
        listed = table(tmp_path, "path,text,num_frames\na.mp4,x,50\n")
        data = VideoTable(listed, image_size=8, num_frames=3)
        with pytest.raises(ValueError, match=r"csv, line 2: the video .*a\.mp4 has 9 frames, wanted 50"):
            data.load(0, generator())

    def test_damage_raises_or_warns_once(self, listed: Path) -> None:
        strict = VideoTable(listed, image_size=8, num_frames=2)
        lenient = VideoTable(listed, image_size=8, num_frames=2, on_corrupt="skip")
        damage(strict.path(1))
        with pytest.raises(ValueError, match=r"csv, line 3: corrupt video .*2\.mp4: "):
            strict.load(1, generator())
        with pytest.warns(UserWarning, match=r"line 3: corrupt video .*2\.mp4"):
            assert lenient.load(1, generator())["caption"] == "drei ü"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert lenient.load(1, generator())["caption"] == "drei ü"
        assert lenient.num_corrupt == 1

    def test_intact_frames_of_a_damaged_video_are_used_whatever_was_loaded_before(
        self, tmp_path: Path
    ) -> None:
        for name in ("a", "b"):
            for number in range(4):
                path = tmp_path / name / f"{number}.png"
                path.parent.mkdir(exist_ok=True)
                Image.new("RGB", (8, 8), (10 * number,) * 3).save(path)
        (tmp_path / "a" / "3.png").write_text("no image")
        listed = table(tmp_path, "path,text\na,a\nb,b\n")
        options = {"image_size": 8, "num_frames": 2, "on_corrupt": "skip"}
        seeds = range(20)

        def captions(order: Any) -> dict[int, str]:
            data = VideoTable(listed, **options)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = {seed: data.load(0, generator(seed))["caption"] for seed in order}
            assert ["line 2: corrupt image" in str(warning.message) for warning in caught] == [True]
            assert data.num_corrupt == 1
            return found

        forwards = captions(seeds)
        # Only the last of the three possible starts includes the damaged frame.
        assert set(forwards.values()) == {"a", "b"}
        assert captions(reversed(seeds)) == forwards

    def test_workers_share_the_count_of_damaged_files(self, listed: Path) -> None:
        data = VideoTable(listed, image_size=8, num_frames=2, on_corrupt="skip")
        damage(data.path(0))
        loader = ResumableLoader(data, batch_size=3, num_workers=1)
        assert sorted(next(loader)["caption"]) == ["drei ü", "two", "two"]
        loader.close()
        assert data.num_corrupt == 1

    def test_no_usable_video_is_an_error_even_with_skip(self, tmp_path: Path) -> None:
        listed = table(tmp_path, "path,text\n" + "gone.mp4,x\n" * 7)
        with pytest.raises(ValueError, match="7 of 7 videos cannot be used: ") as caught:
            VideoTable(listed, image_size=8, num_frames=2, on_corrupt="skip")
        assert str(caught.value).count("no such file") == 5
        assert str(caught.value).endswith("; ... (on_corrupt='skip')")

    def test_an_image_is_a_video_of_one_frame(self, tmp_path: Path) -> None:
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"a\.png has 1 frames, wanted at least 2"):
            VideoTable(table(tmp_path, "path,text\na.png,x\n"), image_size=8, num_frames=2)
        with pytest.raises(ValueError, match=r"a\.png is an image: wanted num_frames 1, got 5"):
            VideoTable(table(tmp_path, "path,text,num_frames\na.png,x,5\n"), image_size=8, num_frames=2)

    def test_a_path_without_a_video_suffix_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(ValueError, match=r"a\.txt has no video suffix, wanted one of \.avi, "):
            VideoTable(table(tmp_path, "path,text\na.txt,x\n"), image_size=8, num_frames=2)


class TestOptions:
    @pytest.mark.parametrize("name", ["image_size", "num_frames", "frame_interval"])
    def test_sizes_are_positive(self, listed: Path, name: str) -> None:
        options = {"image_size": 8, "num_frames": 2, name: 0}
        with pytest.raises(ValueError, match=f"videos need {name} >= 1, got 0"):
            VideoTable(listed, **options)

    def test_other_values_are_refused(self, listed: Path) -> None:
        with pytest.raises(ValueError, match=r"on_corrupt in \('raise', 'skip'\), got 'ignore'"):
            VideoTable(listed, image_size=8, num_frames=2, on_corrupt="ignore")
        with pytest.raises(ValueError, match="frame_interval = 3 has no effect on clips of one frame"):
            VideoTable(listed, image_size=8, num_frames=1, frame_interval=3)
        with pytest.raises(IndexError, match="VideoTable has 3 videos, got index 3"):
            VideoTable(listed, image_size=8, num_frames=2).load(3, generator())


@given(st.lists(st.text(st.characters(exclude_categories=()), max_size=5)))
def test_stored_strings_are_read_back_unchanged(texts: list[str]) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    stored = Strings(texts)
    assert [stored[index] for index in range(len(texts))] == texts


def test_frame_order_sorts_by_number() -> None:
    names = ["f/9.png", "f/10.png", "f/a2_10.png", "f/a2_9.png", "f/a10_1.png"]
    assert sorted(reversed(names), key=frame_order) == [
        "f/9.png",
        "f/10.png",
        *sorted(names[2:4], reverse=True),
        "f/a10_1.png",
    ]
