"""The phase `test` on files: its metrics, what they are computed from, and its errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparisons import VIDEOS, compare, noise, refusal, write_pngs
from scripted_networks import FEATURES, I3dStandin, InceptionStandin, save_inception, save_script

from speedit_plugins.trainer.data.videos.files import write_mp4
from speedit_plugins.trainer.evaluation.distances import feature_statistics, frechet_distance
from speedit_plugins.trainer.evaluation.features import Pixels
from speedit_plugins.trainer.evaluation.networks import Inception
from speedit_plugins.trainer.evaluation.npz import write_npz
from speedit_plugins.trainer.logging.images import save_png
from speedit_plugins.trainer.sampling.scores import comparison


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, str]:
    """Two npz files with 40 samples and 60 reference images."""
    write_npz(tmp_path / "samples.npz", noise(40, 8, 8, 3))
    write_npz(tmp_path / "reference.npz", noise(60, 8, 8, 3, seed=1))
    return {"samples": str(tmp_path / "samples.npz"), "reference": str(tmp_path / "reference.npz")}


class TestImages:
    def test_folders_give_the_same_metrics_as_npz(self, tmp_path: Path, sets: dict[str, str]) -> None:
        of_files = compare(tmp_path, features="pixels@8", **sets)
        samples = write_pngs(tmp_path / "a", noise(40, 8, 8, 3))
        reference = write_pngs(tmp_path / "b", noise(60, 8, 8, 3, seed=1))
        of_folders = compare(tmp_path, features="pixels@8", samples=samples, reference=reference)
        assert of_folders["figures"] == of_files["figures"]
        assert (of_folders["samples"], of_folders["reference"]) == (samples, reference)

    def test_fid_is_the_frechet_distance_of_the_features(self, tmp_path: Path, sets: dict[str, str]) -> None:
        metrics = compare(tmp_path, features="{type: pixels, pool: 4}", **sets)["figures"]
        ours, theirs = (
            feature_statistics(torch.from_numpy(images), Pixels(pool=4))
            for images in (noise(40, 8, 8, 3), noise(60, 8, 8, 3, seed=1))
        )
        expected = frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)
        # Summed in another order, in float64.
        assert metrics["fid[pixels@4]"]["value"] == pytest.approx(expected, rel=1e-9)
        assert metrics["fid[pixels@4]"] == {
            "value": metrics["fid[pixels@4]"]["value"],
            "features": "pixels@4",
            "num_samples": 40,
            "num_reference": 60,
            "feature_dim": 48,
        }
        # The size of the smaller set.
        assert metrics["kid[pixels@4]"]["subset_size"] == 40

    def test_the_batch_size_affects_only_rounding(self, tmp_path: Path, sets: dict[str, str]) -> None:
        found = [
            compare(tmp_path, features="pixels@8", evaluation__batch_size=size, **sets)["figures"]
            for size in (7, 100)
        ]
        assert found[0].keys() == found[1].keys()
        for name in found[0]:
            assert found[0][name]["value"] == pytest.approx(found[1][name]["value"], rel=1e-9)

    def test_inception_score_needs_no_reference(self, tmp_path: Path) -> None:
        samples = write_pngs(tmp_path / "a", noise(20, 16, 16, 3))
        features = f"{{type: inception, path: {save_inception(tmp_path / 'x.pt')}}}"
        content = compare(
            tmp_path,
            samples=samples,
            features=features,
            evaluation__metrics="[inception_score]",
            evaluation__score_splits=2,
        )
        metric = content["figures"]["inception_score"]
        assert (metric["num_samples"], metric["num_reference"], metric["num_splits"]) == (20, None, 2)
        assert 1.0 <= metric["value"] <= 5.0
        assert content["reference"] is None
        # The features are trained on a reference, but the metric does not compare with it.
        digits = write_pngs(tmp_path / "b", noise(20, 8, 8, 1))
        options = {"evaluation__metrics": "[inception_score]", "evaluation__score_splits": 2}
        content = compare(tmp_path, samples=digits, **options)
        assert list(content["figures"]) == ["inception_score[digit_classifier]"]
        assert content["reference"] is None


class TestInceptionNames:
    def test_metrics_with_inception_have_plain_names(
        self, tmp_path: Path, sets: dict[str, str], capfd: pytest.CaptureFixture[str]
    ) -> None:
        features = f"{{type: inception, path: {save_inception(tmp_path / 'x.pt')}}}"
        metrics = compare(tmp_path, features=features, evaluation__metrics="[fid, sfid, kid, prdc]", **sets)[
            "figures"
        ]
        assert list(metrics) == ["fid", "sfid", "kid", "precision", "recall", "density", "coverage"]
        assert {metric["features"] for metric in metrics.values()} == {"inception"}
        assert metrics["sfid"]["feature_dim"] == 289
        out = capfd.readouterr().out
        for name in metrics:
            assert f"\n{name}: " in f"\n{out}"
        assert out.count("(features inception; 40 samples, 60 reference") == 7

    def test_statistics_stored_in_the_reference_file_are_used(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        # Like ADM's files: some images, and mean and covariance of more images.
        path = save_inception(tmp_path / "x.pt")
        samples, others = noise(40, 8, 8, 3), noise(60, 8, 8, 3, seed=1)
        theirs = feature_statistics(torch.from_numpy(others), Inception(path=path))
        np.savez(tmp_path / "ref.npz", others[:9], mu=theirs.mean, sigma=theirs.covariance)
        write_npz(tmp_path / "samples.npz", samples)
        files = {"samples": tmp_path / "samples.npz", "reference": tmp_path / "ref.npz"}
        features = f"{{type: inception, path: {path}}}"
        metrics = compare(tmp_path, features=features, **files)["figures"]
        ours = feature_statistics(torch.from_numpy(samples), Inception(path=path))
        expected = frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)
        assert metrics["fid"]["value"] == pytest.approx(expected, rel=1e-6)
        # The file does not state how many images its statistics are from. KID uses the images in it.
        assert metrics["fid"]["num_reference"] is None
        out = capfd.readouterr().out
        assert "40 samples, unstated number of reference" in out
        assert metrics["kid"]["num_reference"] == 9
        # The statistics alone are enough for the FID.
        np.savez(tmp_path / "ref.npz", mu=theirs.mean, sigma=theirs.covariance)
        again = compare(tmp_path, features=features, evaluation__metrics="[fid]", **files)
        assert again["figures"]["fid"] == metrics["fid"]
        # The statistics are Inception's; other features are computed from the images.
        np.savez(tmp_path / "ref.npz", others, mu=theirs.mean, sigma=theirs.covariance)
        metrics = compare(tmp_path, features="pixels@8", **files)["figures"]
        assert metrics["fid[pixels@8]"]["num_reference"] == 60
        assert len(theirs.mean) == FEATURES

    def test_the_sfid_uses_statistics_in_tensorflows_layout(self, tmp_path: Path) -> None:
        # With 600 features, two channels of 17 x 17 cells are used, so that their order matters.
        path = save_inception(tmp_path / "x.pt", num_features=600)
        torch.manual_seed(0)
        network = InceptionStandin(num_features=600).eval()
        sides = noise(40, 8, 8, 3), noise(60, 8, 8, 3, seed=1)
        gaussians = []
        for images in sides:
            x = network.between(network.between(torch.from_numpy(images).permute(0, 3, 1, 2).float(), 2), 3)
            with torch.no_grad():
                kept = network.layers.mixed_6.conv(network.layers.conv((x - 128) / 128))
            # Like ADM's evaluator: channels last, `spatial[..., :C].reshape(N, -1)`.
            values = np.moveaxis(kept.double().numpy(), 1, -1)[..., :2].reshape(len(images), -1)
            gaussians.append((values.mean(axis=0), np.cov(values, rowvar=False)))
        write_npz(tmp_path / "samples.npz", sides[0])
        np.savez(tmp_path / "ref.npz", mu_s=gaussians[1][0], sigma_s=gaussians[1][1])
        options = {"samples": tmp_path / "samples.npz", "reference": tmp_path / "ref.npz"}
        options |= {"features": f"{{type: inception, path: {path}}}", "evaluation__metrics": "[sfid]"}
        metric = compare(tmp_path, **options)["figures"]["sfid"]
        expected = frechet_distance(*(torch.from_numpy(part) for pair in gaussians for part in pair))
        # Resizing computes positions in float32.
        assert metric["value"] == pytest.approx(expected, rel=1e-3)
        assert (metric["feature_dim"], metric["num_reference"]) == (578, None)

    def test_statistics_of_another_length_are_refused_before_any_work(
        self, tmp_path: Path, sets: dict[str, str], capfd: pytest.CaptureFixture[str]
    ) -> None:
        np.savez(tmp_path / "ref.npz", mu=np.zeros(7), sigma=np.eye(7))
        features = f"{{type: inception, path: {save_inception(tmp_path / 'x.pt')}}}"
        changes = {**sets, "reference": tmp_path / "ref.npz", "evaluation__metrics": "[fid]"}
        said = refusal(tmp_path, capfd, features=features, **changes)
        assert f"statistics in the reference are of 7 features, those of inception are {FEATURES}" in said


class TestReferenceStatistics:
    def test_statistics_are_written_once_and_give_the_same_metrics(
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

    def test_statistics_of_a_dataset_belong_to_its_images(
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
        metric = content["figures"]["fid[frames[pixels@2]]"]
        assert (metric["feature_dim"], metric["num_samples"], metric["num_reference"]) == (24, 8, 8)
        assert metric["value"] > 0

    def test_the_reference_may_be_the_dataset(self, tmp_path: Path) -> None:
        inference = tmp_path / "inference"
        inference.mkdir()
        self.write(inference / "step_1", 0)
        # A folder of an interrupted inference is newer but ignored.
        self.write(inference / "step_2.tmp", 1)
        content = compare(
            tmp_path,
            config=VIDEOS,
            features="{type: efficientnet-lite0, resize: 32}",
            evaluation__metrics="[kid]",
            evaluation__batch_size=64,
            evaluation__kid_subsets=1,
            data__dataset__split="test",
        )
        metric = content["figures"]["kid[frames[efficientnet-lite0@32]]"]
        # The test split has a fifth of the 1,797 digits. The samples are the newest finished folder.
        assert (metric["num_samples"], metric["num_reference"]) == (8, 359)
        assert content["samples"] == str(inference / "step_1")

    def test_fid_with_i3d_is_called_fvd(self, tmp_path: Path) -> None:
        features = f"{{type: i3d, path: {save_script(I3dStandin(), tmp_path / 'i3d.pt')}}}"
        samples, reference = self.write(tmp_path / "a", 0), self.write(tmp_path / "b", 1)
        metrics = compare(
            tmp_path,
            config=VIDEOS,
            samples=samples,
            reference=reference,
            features=features,
            evaluation__metrics="[fid, kid]",
        )["figures"]
        assert list(metrics) == ["fvd", "kid[i3d]"]
        assert metrics["fvd"]["feature_dim"] == 6

    def test_images_and_videos_are_not_compared(
        self, tmp_path: Path, sets: dict[str, str], capfd: pytest.CaptureFixture[str]
    ) -> None:
        said = refusal(tmp_path, capfd, samples=sets["samples"], reference=self.write(tmp_path / "b", 1))
        assert "compares images with images and videos with videos" in said
        features = f"{{type: i3d, path: {save_script(I3dStandin(), tmp_path / 'i3d.pt')}}}"
        assert "features i3d need videos, got images" in refusal(tmp_path, capfd, features=features, **sets)


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
                "sfid needs an extractor with a spatial map",
            ),
            (
                {"evaluation__density_neighbors": 60},
                "evaluation.density_neighbors must be at most 59 for 40 samples and a reference of 60",
            ),
            ({"evaluation__precision_neighbors": 40}, "precision_neighbors must be at most 39"),
            (
                {"evaluation__metrics": "[kid, inception_score]", "evaluation__score_splits": 41},
                "score_splits must be at most 40",
            ),
            (
                {"evaluation__metrics": "[inception_score]", "evaluation__score_splits": 4},
                "reference has no effect on inception_score; wanted null",
            ),
            (
                {"evaluation__metrics": "[clip_score]", "evaluation__clip": "absent"},
                "reference has no effect on clip_score alone; wanted null",
            ),
            (
                {"evaluation__reference_statistics": "absent/reference.safetensors"},
                "reference_statistics needs a file in a folder that is there, got absent/reference",
            ),
            ({"features": "{type: inception}"}, "needs path"),
        ],
    )
    def test_options_that_do_not_fit_are_refused_before_any_work(
        self,
        tmp_path: Path,
        sets: dict[str, str],
        capfd: pytest.CaptureFixture[str],
        changes: dict[str, Any],
        message: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # Only the two samples on which features are tried out may be read.
        monkeypatch.setattr(comparison, "_collected", None)
        said = refusal(tmp_path, capfd, **{"features": "pixels@8", **sets, **changes})
        assert message in said
        assert not (tmp_path / "test.json").exists()

    def test_unusable_folders_are_refused(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        empty = tmp_path / "empty"
        empty.mkdir()
        assert "samples needs a folder of images or one of videos, got" in refusal(
            tmp_path, capfd, samples=empty
        )
        write_pngs(tmp_path / "a", noise(3, 8, 8, 3))
        save_png(noise(1, 8, 9, 3)[0], tmp_path / "a" / "999.png")
        sets = tmp_path / "a"
        options = {"features": "pixels@8", "evaluation__metrics": "[fid]"}
        said = refusal(tmp_path, capfd, samples=sets, reference=sets, **options)
        assert "sets of one shape, got (8, 9, 3) after (8, 8, 3) at item 3" in said
        assert "no npz in" in refusal(tmp_path / "nowhere", capfd)

    def test_a_set_of_one_image_is_refused(
        self, tmp_path: Path, sets: dict[str, str], capfd: pytest.CaptureFixture[str]
    ) -> None:
        write_npz(tmp_path / "one.npz", noise(1, 8, 8, 3))
        changes = {**sets, "features": "pixels@8", "evaluation__metrics": "[kid]"}
        for side in ("samples", "reference"):
            said = refusal(tmp_path, capfd, **{**changes, side: tmp_path / "one.npz"})
            assert "kid needs at least two images in each set, got one" in said
