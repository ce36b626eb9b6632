import socket
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from speedit_plugins.registry import ENCODERS, build
from speedit_plugins.trainer.models.pretrained.autoencoder import Autoencoder, Pixels


@pytest.fixture(scope="module")
def saved_autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=5,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    folder = tmp_path_factory.mktemp("autoencoder")
    model.save_pretrained(folder)
    return folder


def test_the_autoencoder_scales_and_shifts_as_its_config_says(saved_autoencoder: Path) -> None:
    encoder = build(ENCODERS, {"type": "AutoencoderKL", "path": str(saved_autoencoder)})
    assert (encoder.channels, encoder.downsample) == (5, 2)
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    posterior = encoder.model.encode(images).latent_dist
    noise = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(1))
    latents = encoder.encode(images, torch.Generator().manual_seed(1))
    assert latents.shape == (2, 5, 4, 6)
    assert_close(latents, (posterior.mean + posterior.std * noise - 0.25) * 0.5)
    assert_close(encoder.decode(latents), encoder.model.decode(latents / 0.5 + 0.25).sample)
    assert encoder.decode(latents).shape == images.shape


def test_the_autoencoder_is_frozen(saved_autoencoder: Path) -> None:
    encoder = Autoencoder(str(saved_autoencoder)).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.encode(torch.zeros(1, 3, 4, 4, requires_grad=True)).requires_grad


def test_the_autoencoder_refuses_shapes_it_cannot_encode(saved_autoencoder: Path) -> None:
    encoder = Autoencoder(str(saved_autoencoder))
    for shape in ((1, 1, 4, 4), (1, 3, 5, 4), (3, 4, 4)):
        with pytest.raises(ValueError, match=r"wanted \(B, 3, H, W\) with H and W multiples of 2"):
            encoder.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"got latents of shape \(1, 4, 2, 2\), wanted \(B, 5, h, w\)"):
        encoder.decode(torch.zeros(1, 4, 2, 2))


def test_an_autoencoder_in_a_pipeline_folder_is_its_subfolder(saved_autoencoder: Path) -> None:
    folder, name = saved_autoencoder.parent, saved_autoencoder.name
    assert Autoencoder(str(folder), subfolder=name).channels == 5


@pytest.mark.parametrize("path", ["missing/folder", "nobody/no-such-autoencoder"])
def test_a_missing_autoencoder_reaches_for_no_network(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(
        ValueError, match=f"at '{path}': no such folder, .*local cache; .* set allow_download: true"
    ):
        Autoencoder(path)


def test_pickled_autoencoder_weights_are_not_read(saved_autoencoder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL.from_pretrained(saved_autoencoder).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="no AutoencoderKL in safetensors form"):
        Autoencoder(str(tmp_path))


def test_allow_download_is_what_lets_diffusers_use_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderKL

    asked = []

    def from_pretrained(path: str, **options: object) -> None:
        asked.append((path, options["local_files_only"]))
        raise OSError

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", from_pretrained)
    for allowed, advice in ((False, "allow_download"), (True, "check the name and the network")):
        with pytest.raises(ValueError, match=advice):
            Autoencoder("some/name", allow_download=allowed)
    assert asked == [("some/name", False)]


def test_pixels_change_nothing() -> None:
    encoder = build(ENCODERS, {"type": "Pixels", "channels": 1})
    images = torch.rand(2, 1, 4, 4)
    assert (encoder.channels, encoder.downsample) == (1, 1)
    assert encoder.encode(images) is images
    assert encoder.decode(images) is images
    for call in (encoder.encode, encoder.decode):
        with pytest.raises(ValueError, match=r"got images of shape \(2, 3, 4, 4\), wanted \(B, 1, H, W\)"):
            call(torch.rand(2, 3, 4, 4))
    with pytest.raises(ValueError, match="channels 1 or 3, got 4"):
        Pixels(4)
