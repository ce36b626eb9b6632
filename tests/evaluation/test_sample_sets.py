"""Sample sets from files: colours, captions, fingerprints."""

import json
from pathlib import Path

import pytest
import torch
from comparisons import DIGITS, VIDEOS, compare, noise, refusal, write_pngs
from torch import Tensor

from speedit_plugins.trainer.data.images.captions import ImageCaptions
from speedit_plugins.trainer.data.videos.files import write_mp4
from speedit_plugins.trainer.evaluation.features import Pixels
from speedit_plugins.trainer.evaluation.networks import FrameFeatures
from speedit_plugins.trainer.evaluation.npz import write_npz
from speedit_plugins.trainer.results import inferences
from speedit_plugins.trainer.sampling.files.sample_sets import ItemSet, alike, open_set, read_captions


class TestGrey:
    def test_image_files_are_read_with_the_channels_of_the_other_set(self, tmp_path: Path) -> None:
        images = noise(5, 8, 8, 1)
        files = open_set(write_pngs(tmp_path / "a", images), key="samples")
        write_npz(tmp_path / "grey.npz", images)
        write_npz(tmp_path / "colour.npz", noise(5, 8, 8, 3))
        for name, expected in (
            ("grey", torch.from_numpy(images)),
            ("colour", torch.from_numpy(images).expand(-1, -1, -1, 3)),
        ):
            reference = open_set(tmp_path / f"{name}.npz", key="reference")
            for one, _ in (alike(files, reference), alike(reference, files)[::-1]):
                assert torch.equal(torch.cat(list(one.batches(2))), expected)
        # If both sets are files, they are read in colour.
        both = alike(files, files)
        assert [next(one.batches(1)).shape[-1] for one in both] == [3, 3]

    def test_a_folder_of_digits_is_compared_with_the_dataset(self, tmp_path: Path) -> None:
        samples = write_pngs(tmp_path / "a", noise(20, 8, 8, 1))
        write_npz(tmp_path / "a.npz", noise(20, 8, 8, 1))
        of_folder = compare(tmp_path, config=DIGITS, samples=samples)
        assert of_folder["figures"] == compare(tmp_path, samples=tmp_path / "a.npz")["figures"]

    def test_moving_digits_are_compared_with_the_defaults_of_their_config(self, tmp_path: Path) -> None:
        folder = tmp_path / "inference" / "step_1"
        folder.mkdir(parents=True)
        for i, video in enumerate(torch.from_numpy(noise(6, 4, 16, 16, 1))):
            write_mp4(folder / f"{i:03d}.mp4", video, fps=4)
        metrics = compare(tmp_path, config=VIDEOS)["figures"]
        # Mean and change of 16 x 16 grey pixels.
        assert metrics["fid[frames[pixels]]"]["feature_dim"] == 512
        assert metrics["fid[frames[pixels]]"]["num_reference"] == 1797


class TestCaptions:
    def test_a_caption_may_hold_any_character(self, tmp_path: Path) -> None:
        folder = Path(write_pngs(tmp_path / "a", noise(2, 8, 8, 3)))
        # The first caption has a character that ends a line for Python but not for JSON.
        captions = ["a\u2028heart", "7 moving left"]
        lines = [
            json.dumps({"file_name": f"{i:03d}.png", "caption": text}, ensure_ascii=False)
            for i, text in enumerate(captions)
        ]
        file = folder / "captions.jsonl"
        file.write_text("\n".join(lines), encoding="utf-8")
        assert read_captions(open_set(folder, key="samples")) == captions
        # The folder is also a valid dataset.
        dataset = ImageCaptions(file, image_size=8)
        assert dataset.load(1, torch.Generator())["caption"] == "7 moving left"

    def test_a_caption_belongs_to_the_file_that_it_names(self, tmp_path: Path) -> None:
        folder = Path(write_pngs(tmp_path / "a", noise(2, 8, 8, 3)))
        # Files in a folder come before those in its subfolders: 000.png, 001.png, 000/000.png.
        write_pngs(folder / "000", noise(1, 8, 8, 3))
        names = ("./001.png", "000/000.png", "000.png")
        lines = [json.dumps({"file_name": name, "caption": f"of {name}"}) for name in names]
        (folder / "captions.jsonl").write_text("\n".join(lines))
        found = read_captions(open_set(folder, key="samples"))
        assert found == ["of 000.png", "of ./001.png", "of 000/000.png"]
        (folder / "captions.jsonl").write_text("\n".join(lines).replace("/000.png", "/002.png"))
        with pytest.raises(ValueError, match=r"a caption of each sample, got none of 000/000.png in .*jsonl"):
            read_captions(open_set(folder, key="samples"))

    def test_captions_of_an_npz_must_be_in_order_of_file_names(self, tmp_path: Path) -> None:
        write_npz(tmp_path / "a.npz", noise(2, 8, 8, 3))
        lines = [json.dumps({"file_name": f"{i:03d}.png", "caption": f"the {i}"}) for i in (1, 0)]
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "captions.jsonl").write_text("\n".join(lines))
        with pytest.raises(ValueError, match="order of file names, got 000.png behind 001.png at line 2"):
            read_captions(open_set(tmp_path / "a.npz", key="samples"))

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"file_name": "000.png"}', "line 1: wanted 'text' or 'caption'"),
            ("a heart", "line 1: wanted JSON"),
        ],
    )
    def test_a_malformed_line_is_named(self, tmp_path: Path, line: str, message: str) -> None:
        folder = Path(write_pngs(tmp_path / "a", noise(1, 8, 8, 3)))
        (folder / "captions.jsonl").write_text(line)
        with pytest.raises(ValueError, match=f"captions.jsonl, {message}"):
            read_captions(open_set(folder, key="samples"))


def test_a_missing_path_is_named_with_its_key(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_npz(tmp_path / "samples.npz", noise(10, 8, 8, 3))
    own, absent = tmp_path / "samples.npz", tmp_path / "absent.npz"
    assert "samples needs an npz or a folder, got " in refusal(tmp_path, capfd, samples=absent)
    said = refusal(tmp_path, capfd, samples=own, reference=absent, features="pixels@8")
    assert f"reference needs an npz or a folder, got {absent}, which is not there" in said
    features = f"{{type: inception, path: {tmp_path / 'x.pt'}}}"
    said = refusal(tmp_path, capfd, samples=own, reference=absent, features=features)
    assert "reference needs an npz or a folder" in said


@pytest.mark.parametrize("num_items", [1, 255, 256, 257, 511, 600])
def test_a_fingerprint_reads_at_most_256_evenly_spread_items(num_items: int) -> None:
    seen: list[int] = []

    def read(index: int) -> Tensor:
        seen.append(index)
        return torch.zeros(1, 1, 1, dtype=torch.uint8)

    ItemSet("items", num_items, read, is_video=False).fingerprint()
    # At least 128 items, or all of fewer. The last one is no farther from the end than one step.
    assert min(num_items, 128) <= len(seen) <= 256
    step = seen[1] - seen[0] if len(seen) > 1 else 1
    assert num_items - seen[-1] <= step


def test_what_is_beside_the_only_inference_of_a_run_is_no_other_set(tmp_path: Path) -> None:
    folder, images = tmp_path / "inference", noise(2, 8, 8, 1)
    (folder / "X_stages").mkdir(parents=True)
    for name in ("X", "X_masked", "X_stages/stage_1", "Y.tmp"):
        write_pngs(folder / name, images)
    for name in ("X.npz", "Y.npz.tmp"):
        write_npz(folder / name, images)
    assert open_set(folder, key="samples").source == str(folder / "X")
    assert inferences(folder) == [folder / "X", folder / "X.npz"]
    write_pngs(folder / "Z", images)
    with pytest.raises(ValueError, match=r"got .*inference with X, Z; wanted one of these"):
        open_set(folder, key="samples")


def test_videos_read_from_files_give_the_features_of_the_originals(tmp_path: Path) -> None:
    """H.264 changes the levels of a grey ramp only a little, so the features must be nearly equal."""
    ramp = torch.arange(0, 256, 16).to(torch.uint8)
    video = ramp.expand(16, 16)[None, :, :, None].expand(4, 16, 16, 3)
    folder = tmp_path / "a"
    folder.mkdir()
    write_mp4(folder / "0.mp4", video.contiguous(), fps=8)
    (batch,) = open_set(folder, key="samples").batches(4)
    assert batch.shape == (1, 4, 16, 16, 3)
    extractor = FrameFeatures(Pixels(pool=4))
    assert float((extractor(batch) - extractor(video[None])).abs().max()) < 4 / 255
