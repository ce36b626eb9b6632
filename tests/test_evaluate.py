"""The phase test on files: which figures it gives, from what, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from runs import arguments
from saved_models import save_tokenizer
from scripted_networks import FEATURES, I3dStandin, save_inception, save_script

from speedit_plugins.cli import main
from speedit_plugins.data.videos import write_mp4
from speedit_plugins.engine.pictures import save_png
from speedit_plugins.evaluation.features import Pixels
from speedit_plugins.evaluation.metrics import feature_statistics, frechet_distance
from speedit_plugins.evaluation.networks import FrameFeatures, Inception
from speedit_plugins.evaluation.npz import write_npz

DIGITS = "configs/image/digits/speedit.yaml"
VIDEOS = "configs/text_to_video/moving_digits.yaml"


def noise(count: int, *shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def compare(folder: Path, *, config: str = DIGITS, **changes: Any) -> dict[str, Any]:
    """The content of test.json."""
    own = {"experiment_dir": folder, **changes}
    given = [f"{key.replace('__', '.')}={value}" for key, value in own.items()]
    assert main(["-c", config, "-p", "test", *given]) == 0
    content: dict[str, Any] = json.loads((folder / "test.json").read_text())
    return content


def refusal(folder: Path, capfd: pytest.CaptureFixture[str], **changes: Any) -> str:
    """What the program says when it refuses."""
    assert main(["-c", DIGITS, "-p", "test", *arguments(folder, **changes)]) == 2
    return capfd.readouterr().err


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, str]:
    """Two npz of 40 and 60 images."""
    write_npz(tmp_path / "samples.npz", noise(40, 8, 8, 3))
    write_npz(tmp_path / "reference.npz", noise(60, 8, 8, 3, seed=1))
    return {"samples": str(tmp_path / "samples.npz"), "reference": str(tmp_path / "reference.npz")}


def write_pngs(folder: Path, images: NDArray[np.uint8]) -> str:
    folder.mkdir()
    for i, image in enumerate(images):
        save_png(image, folder / f"{i:03d}.png")
    return str(folder)


class TestImages:
    def test_folders_give_the_figures_of_npz(self, tmp_path: Path, sets: dict[str, str]) -> None:
        of_files = compare(tmp_path, features="pixels@8", **sets)
        samples = write_pngs(tmp_path / "a", noise(40, 8, 8, 3))
        reference = write_pngs(tmp_path / "b", noise(60, 8, 8, 3, seed=1))
        of_folders = compare(tmp_path, features="pixels@8", samples=samples, reference=reference)
        assert of_folders["figures"] == of_files["figures"]
        assert (of_folders["samples"], of_folders["reference"]) == (samples, reference)

    def test_the_distance_is_that_of_the_features(self, tmp_path: Path, sets: dict[str, str]) -> None:
        figures = compare(tmp_path, features="{type: pixels, pool: 4}", **sets)["figures"]
        ours, theirs = (
            feature_statistics(torch.from_numpy(images), Pixels(pool=4))
            for images in (noise(40, 8, 8, 3), noise(60, 8, 8, 3, seed=1))
        )
        expected = frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)
        # Batches in another order of summation, in float64.
        assert figures["fid[pixels@4]"]["value"] == pytest.approx(expected, rel=1e-9)
        assert figures["fid[pixels@4]"] == {
            "value": figures["fid[pixels@4]"]["value"],
            "features": "pixels@4",
            "num_samples": 40,
            "num_reference": 60,
            "feature_dim": 48,
        }
        # As many as the smaller set has.
        assert figures["kid[pixels@4]"]["subset_size"] == 40

    def test_batches_change_nothing_but_rounding(self, tmp_path: Path, sets: dict[str, str]) -> None:
        found = [
            compare(tmp_path, features="pixels@8", evaluation__batch_size=size, **sets)["figures"]
            for size in (7, 100)
        ]
        assert found[0].keys() == found[1].keys()
        for name in found[0]:
            assert found[0][name]["value"] == pytest.approx(found[1][name]["value"], rel=1e-9)

    def test_inception_score_of_a_classifier_needs_no_second_set(self, tmp_path: Path) -> None:
        samples = write_pngs(tmp_path / "a", noise(20, 16, 16, 3))
        features = f"{{type: inception, path: {save_inception(tmp_path / 'x.pt')}}}"
        content = compare(
            tmp_path,
            samples=samples,
            features=features,
            evaluation__metrics="[inception_score]",
            evaluation__score_splits=2,
        )
        figure = content["figures"]["inception_score"]
        assert (figure["num_samples"], figure["num_reference"], figure["num_splits"]) == (20, None, 2)
        assert 1.0 <= figure["value"] <= 5.0
        assert content["reference"] is None


class TestInceptionNames:
    def test_figures_on_inception_have_plain_names(
        self, tmp_path: Path, sets: dict[str, str], capfd: pytest.CaptureFixture[str]
    ) -> None:
        features = f"{{type: inception, path: {save_inception(tmp_path / 'x.pt')}}}"
        figures = compare(tmp_path, features=features, evaluation__metrics="[fid, sfid, kid, prdc]", **sets)[
            "figures"
        ]
        assert list(figures) == ["fid", "sfid", "kid", "precision", "recall", "density", "coverage"]
        assert {figure["features"] for figure in figures.values()} == {"inception"}
        assert figures["sfid"]["feature_dim"] == 289
        out = capfd.readouterr().out
        for name in figures:
            assert f"\n{name}: " in f"\n{out}"
        assert out.count("(features inception; 40 samples, 60 reference") == 7

    def test_statistics_that_the_reference_file_states_are_used(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        # A file as ADM's: some images, and mean and covariance of more than them.
        path = save_inception(tmp_path / "x.pt")
        samples, others = noise(40, 8, 8, 3), noise(60, 8, 8, 3, seed=1)
        theirs = feature_statistics(torch.from_numpy(others), Inception(path=path))
        np.savez(tmp_path / "ref.npz", others[:9], mu=theirs.mean, sigma=theirs.covariance)
        write_npz(tmp_path / "samples.npz", samples)
        files = {"samples": tmp_path / "samples.npz", "reference": tmp_path / "ref.npz"}
        features = f"{{type: inception, path: {path}}}"
        figures = compare(tmp_path, features=features, **files)["figures"]
        ours = feature_statistics(torch.from_numpy(samples), Inception(path=path))
        expected = frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)
        assert figures["fid"]["value"] == pytest.approx(expected, rel=1e-6)
        # It does not say of how many images; the others are of the images in it.
        assert figures["fid"]["num_reference"] is None
        out = capfd.readouterr().out
        assert "40 samples, unstated number of reference" in out
        assert figures["kid"]["num_reference"] == 9
        # Statistics alone are enough for the distance.
        np.savez(tmp_path / "ref.npz", mu=theirs.mean, sigma=theirs.covariance)
        again = compare(tmp_path, features=features, evaluation__metrics="[fid]", **files)
        assert again["figures"]["fid"] == figures["fid"]
        # They are Inception's: other features are computed from the images.
        np.savez(tmp_path / "ref.npz", others, mu=theirs.mean, sigma=theirs.covariance)
        figures = compare(tmp_path, features="pixels@8", **files)["figures"]
        assert figures["fid[pixels@8]"]["num_reference"] == 60
        assert len(theirs.mean) == FEATURES


class TestReferenceStatistics:
    def test_they_are_written_once_and_give_the_same_figures(
        self, tmp_path: Path, sets: dict[str, str]
    ) -> None:
        file = tmp_path / "reference.safetensors"
        first = compare(tmp_path, features="pixels@8", evaluation__reference_statistics=file, **sets)
        written = file.stat().st_mtime_ns
        second = compare(tmp_path, features="pixels@8", evaluation__reference_statistics=file, **sets)
        assert first == second
        assert file.stat().st_mtime_ns == written

    def test_other_features_and_other_images_are_refused(
        self, tmp_path: Path, sets: dict[str, str], capfd: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "reference.safetensors"
        compare(tmp_path, features="pixels@8", evaluation__reference_statistics=file, **sets)
        capfd.readouterr()
        changes = {**sets, "evaluation__reference_statistics": file}
        assert "statistics of other features: features 'pixels@8', wanted 'pixels'" in refusal(
            tmp_path, capfd, **{**changes, "features": "pixels"}
        )
        write_npz(tmp_path / "reference.npz", noise(60, 8, 8, 3, seed=2))
        assert "statistics of other images: fingerprint" in refusal(
            tmp_path, capfd, **{**changes, "features": "pixels@8"}
        )

    def test_of_a_dataset_they_know_its_images(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "reference.safetensors"
        write_npz(tmp_path / "samples.npz", noise(40, 8, 8, 1))
        options = {
            "samples": tmp_path / "samples.npz",
            "features": "pixels@8",
            "evaluation__metrics": "[fid]",
            "evaluation__reference_statistics": file,
        }
        first = compare(tmp_path, **options)
        assert first["figures"]["fid[pixels@8]"]["num_reference"] == 1797
        assert compare(tmp_path, **options) == first
        reference = write_pngs(tmp_path / "b", noise(60, 8, 8, 3))
        assert "statistics of other images" in refusal(tmp_path, capfd, reference=reference, **options)


class TestVideos:
    def write(self, folder: Path, seed: int, count: int = 8) -> str:
        folder.mkdir()
        videos = torch.from_numpy(noise(count, 4, 16, 16, 3, seed=seed)) // 64 * 64
        for i, video in enumerate(videos):
            write_mp4(folder / f"{i:03d}.mp4", video, fps=8)
        return str(folder)

    def test_frames_and_their_changes_are_compared(self, tmp_path: Path) -> None:
        samples = self.write(tmp_path / "a", 0)
        content = compare(
            tmp_path,
            config=VIDEOS,
            samples=samples,
            features="{type: pixels, pool: 2}",
            evaluation__metrics="[fid]",
            reference=self.write(tmp_path / "b", 1),
        )
        figure = content["figures"]["fid[frames[pixels@2]]"]
        assert (figure["feature_dim"], figure["num_samples"], figure["num_reference"]) == (24, 8, 8)
        assert figure["value"] > 0

    def test_the_dataset_is_a_reference_too(self, tmp_path: Path) -> None:
        inference = tmp_path / "inference"
        inference.mkdir()
        self.write(inference / "step_1", 0)
        content = compare(
            tmp_path,
            config=VIDEOS,
            features="{type: efficientnet-lite0, resize: 32}",
            evaluation__metrics="[kid]",
            evaluation__batch_size=64,
            evaluation__kid_subsets=1,
            data__dataset__split="test",
        )
        figure = content["figures"]["kid[frames[efficientnet-lite0@32]]"]
        # The last fifth of 1,797 digits; the newest folder of inference.
        assert (figure["num_samples"], figure["num_reference"]) == (8, 359)
        assert content["samples"] == str(inference / "step_1")

    def test_fvd_is_on_the_users_i3d(self, tmp_path: Path) -> None:
        features = f"{{type: i3d, path: {save_script(I3dStandin(), tmp_path / 'i3d.pt')}}}"
        samples, reference = self.write(tmp_path / "a", 0), self.write(tmp_path / "b", 1)
        figures = compare(
            tmp_path,
            config=VIDEOS,
            samples=samples,
            reference=reference,
            features=features,
            evaluation__metrics="[fid, kid]",
        )["figures"]
        assert list(figures) == ["fvd", "kid[i3d]"]
        assert figures["fvd"]["feature_dim"] == 6

    def test_images_are_no_videos(
        self, tmp_path: Path, sets: dict[str, str], capfd: pytest.CaptureFixture[str]
    ) -> None:
        said = refusal(tmp_path, capfd, samples=sets["samples"], reference=self.write(tmp_path / "b", 1))
        assert "compares images with images and videos with videos" in said
        features = f"{{type: i3d, path: {save_script(I3dStandin(), tmp_path / 'i3d.pt')}}}"
        assert "features i3d need videos, got images" in refusal(tmp_path, capfd, features=features, **sets)


class TestClipScore:
    def save_clip(self, folder: Path) -> str:
        import transformers as t

        torch.manual_seed(0)
        size = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
        model = t.CLIPModel(
            t.CLIPConfig(
                text_config={**size, "vocab_size": 16, "eos_token_id": 1, "max_position_embeddings": 12},
                vision_config={**size, "image_size": 32, "patch_size": 16},
                projection_dim=8,
            )
        )
        model.save_pretrained(folder)
        save_tokenizer(folder)
        return str(folder)

    def test_it_is_the_mean_cosine_of_samples_and_their_captions(self, tmp_path: Path) -> None:
        import transformers as t

        clip = self.save_clip(tmp_path / "clip-tiny")
        images, captions = noise(5, 32, 32, 3), ["a red apple", "green", "3 left", "a heart", "7 moving left"]
        samples = write_pngs(tmp_path / "a", images)
        lines = [json.dumps({"file": f"{i:06d}", "caption": text}) for i, text in enumerate(captions)]
        (tmp_path / "a" / "captions.jsonl").write_text("\n".join(lines) + "\n")
        content = compare(
            tmp_path,
            samples=samples,
            evaluation__metrics="[clip_score]",
            evaluation__clip=clip,
            evaluation__batch_size=2,
        )
        figure = content["figures"]["clip_score[clip-tiny]"]
        assert (figure["num_samples"], figure["num_reference"]) == (5, None)
        model = t.CLIPModel.from_pretrained(clip)
        tokenizer = t.AutoTokenizer.from_pretrained(clip)
        # Images of the model's own size: what is left of its preprocessing is the normalisation.
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
        cosines = []
        for image, caption in zip(images, captions, strict=True):
            pixels = ((torch.from_numpy(image) / 255 - mean) / std).permute(2, 0, 1)[None]
            with torch.no_grad():
                found = model(**tokenizer([caption], return_tensors="pt"), pixel_values=pixels)
            cosines.append(float(torch.cosine_similarity(found.image_embeds, found.text_embeds)))
        # Padding beside longer captions, and float32.
        assert figure["value"] == pytest.approx(100 * np.mean(np.maximum(cosines, 0)), abs=1e-3)

    def test_what_it_needs_is_said(
        self, tmp_path: Path, sets: dict[str, str], capfd: pytest.CaptureFixture[str]
    ) -> None:
        needs = {"samples": sets["samples"], "evaluation__metrics": "[clip_score]"}
        assert "clip_score needs evaluation.clip" in refusal(tmp_path, capfd, **needs)
        clip = self.save_clip(tmp_path / "clip-tiny")
        assert "clip_score needs the captions of" in refusal(tmp_path, capfd, evaluation__clip=clip, **needs)
        folder = tmp_path / "samples"
        folder.mkdir()
        (folder / "captions.jsonl").write_text('{"file": "000000", "caption": "a heart"}\n')
        assert "needs 40 captions, got 1 in" in refusal(tmp_path, capfd, evaluation__clip=clip, **needs)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"evaluation__metrics": "[fdi]"},
                "unknown metric 'fdi' in evaluation.metrics; did you mean 'fid'",
            ),
            ({"evaluation__metrics": "[]"}, "needs each metric once, at least one, got []"),
            ({"evaluation__metrics": "[fid, fid]"}, "needs each metric once"),
            (
                {"evaluation__metrics": "[fid]", "evaluation__kid_subsets": 3},
                "evaluation.kid_subsets has no effect without kid",
            ),
            (
                {"evaluation__metrics": "[sfid]", "features": "pixels"},
                "sfid needs features with a spatial map",
            ),
            ({"evaluation__density_neighbors": 60}, "density_neighbors needs to be in [1, 60)"),
            ({"features": "{type: inception}"}, "needs path"),
        ],
    )
    def test_what_does_not_fit_is_one_line(
        self,
        tmp_path: Path,
        sets: dict[str, str],
        capfd: pytest.CaptureFixture[str],
        changes: dict[str, Any],
        message: str,
    ) -> None:
        said = refusal(tmp_path, capfd, **{"features": "pixels@8", **sets, **changes})
        assert message in said
        assert not (tmp_path / "test.json").exists()

    def test_folders_that_are_no_set(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        empty = tmp_path / "empty"
        empty.mkdir()
        assert "a folder of images or one of videos, got" in refusal(tmp_path, capfd, samples=empty)
        write_pngs(tmp_path / "a", noise(3, 8, 8, 3))
        save_png(noise(1, 8, 9, 3)[0], tmp_path / "a" / "999.png")
        sets = tmp_path / "a"
        said = refusal(tmp_path, capfd, samples=sets, reference=sets, features="pixels@8")
        assert "sets of one shape, got (8, 9, 3) after (8, 8, 3) at item 3" in said
        assert "no npz in" in refusal(tmp_path / "nowhere", capfd)


def test_videos_read_back_are_those_of_the_extractor(tmp_path: Path) -> None:
    """A grey ramp survives H.264 up to a few levels, so that the figures are of the videos in the files."""
    ramp = torch.arange(0, 256, 16).to(torch.uint8)
    video = ramp.expand(16, 16)[None, :, :, None].expand(4, 16, 16, 3)
    folder = tmp_path / "a"
    folder.mkdir()
    write_mp4(folder / "0.mp4", video.contiguous(), fps=8)
    from speedit_plugins.engine.sample_sets import open_set

    (batch,) = open_set(folder).batches(4)
    assert batch.shape == (1, 4, 16, 16, 3)
    extractor = FrameFeatures(Pixels(pool=4))
    assert float((extractor(batch) - extractor(video[None])).abs().max()) < 4 / 255
