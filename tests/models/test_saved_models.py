"""Saved models of diffusers and transformers: no connection unless allowed, and each fault in one line."""

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import TEXT_WIDTH, save_pipeline, save_text_encoder, save_tokenizer

from speedit_plugins.trainer.models.pretrained.autoencoder import Autoencoder
from speedit_plugins.trainer.models.pretrained.text import Clip, TextEncoder
from speedit_plugins.trainer.models.text_conditioned.latte_t2v import LatteT2V
from speedit_plugins.trainer.models.text_conditioned.pixart import PixArt
from speedit_plugins.trainer.models.text_conditioned.unet import UNet

TEXT = {"text_width": TEXT_WIDTH, "text_length": 8}
# Each loader with its folder in the fixture `models`, and its subfolder there.
LOADERS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "AutoencoderKL": (
        "PixArt",
        "vae",
        lambda path, subfolder="": Autoencoder(path, subfolder=subfolder or None),
    ),
    "TextEncoder": (
        "PixArt",
        "text_encoder",
        lambda path, subfolder="": TextEncoder(
            path, max_length=8, subfolder=subfolder, tokenizer_subfolder="tokenizer" if subfolder else ""
        ),
    ),
    "Clip": ("clip", "", lambda path, subfolder="": Clip(path, device=torch.device("cpu"))),
    "PixArt": (
        "PixArt",
        "transformer",
        lambda path, subfolder="transformer": PixArt(input_size=4, path=path, subfolder=subfolder, **TEXT),
    ),
    "UNet": (
        "UNet",
        "unet",
        lambda path, subfolder="unet": UNet(input_size=4, path=path, subfolder=subfolder, **TEXT),
    ),
    "LatteT2V": (
        "LatteT2V",
        "transformer",
        lambda path, subfolder="transformer": LatteT2V(
            input_size=8, num_frames=3, path=path, subfolder=subfolder, **TEXT
        ),
    ),
}
every_loader = pytest.mark.parametrize("name", LOADERS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("PixArt", "UNet", "LatteT2V"):
        save_pipeline(folder / kind, kind)
    save_text_encoder(folder / "clip", "whole clip")
    save_tokenizer(folder / "clip")
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The connections and lookups of names that were tried. None succeeds."""
    from huggingface_hub import constants

    tried: list[str] = []

    def refused(name: str) -> Callable[..., Any]:
        def refuse(*arguments: object, **options: object) -> None:
            tried.append(name)
            raise OSError(f"no network: {name}")

        return refuse

    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refused(name))
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refused(name))
    # The package asks its server once in a process which agents there are: here it has not asked yet.
    monkeypatch.setattr("huggingface_hub.utils._detect_agent._registry", None, raising=False)
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "agents"), raising=False)
    return tried


@every_loader
@pytest.mark.parametrize("path", ["some-owner/some-model", "some-model"])
def test_a_hub_name_opens_no_connection_unless_allowed(name: str, path: str, asked: list[str]) -> None:
    with pytest.raises(ValueError, match=f"at '{path}': .*or set allow_download: true to fetch a hub name"):
        LOADERS[name][2](path)
    assert asked == []


@every_loader
def test_a_folder_and_a_cached_model_open_no_connection(
    name: str, asked: list[str], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, subfolder, load = LOADERS[name]
    load(str(models / folder), subfolder)
    # The layout of the local cache of the hub.
    cache, revision = tmp_path / "hub", "0" * 40
    snapshot = cache / "models--some-owner--some-model"
    shutil.copytree(models / folder, snapshot / "snapshots" / revision)
    (snapshot / "refs").mkdir()
    (snapshot / "refs" / "main").write_text(revision)
    for module in ("huggingface_hub.constants", "transformers.utils.hub", "diffusers.configuration_utils"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(cache), raising=False)
    for module in ("huggingface_hub.constants", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HUGGINGFACE_HUB_CACHE", str(cache), raising=False)
    load("some-owner/some-model", subfolder)
    assert asked == []


def test_an_allowed_download_asks_the_hub(asked: list[str]) -> None:
    with pytest.raises(ValueError, match="check the name and the network"):
        Autoencoder("some-owner/some-model", allow_download=True)
    assert asked


@every_loader
def test_a_path_that_is_none_says_what_there_is(name: str, models: Path, tmp_path: Path) -> None:
    folder, subfolder, load = LOADERS[name]
    with pytest.raises(ValueError, match="absent/model': there is no such folder"):
        load(str(tmp_path / "absent" / "model"), subfolder)
    if subfolder:
        with pytest.raises(ValueError, match="it has no folder 'nope', but text_encoder/, tokenizer/"):
            load(str(models / folder), "nope")
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"(has no config\.json, but|it has no folder '\w+', but) a\.txt"):
        load(str(tmp_path))


def test_a_pipeline_without_its_subfolder_lists_its_parts(models: Path) -> None:
    for name in ("AutoencoderKL", "TextEncoder"):
        with pytest.raises(
            ValueError, match="has no config.json, but text_encoder/, tokenizer/, transformer/, vae/"
        ):
            LOADERS[name][2](str(models / "PixArt"))


@every_loader
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("page", r"model\.safetensors is a web page, from a download that failed"),
        ("pointer", r"model\.safetensors is a pointer of git-LFS, not the file itself"),
        ("cut", r"model\.safetensors is damaged: it has [\d,]+ of [\d,]+ bytes"),
        ("empty", r"model\.safetensors is damaged: it is empty"),
        ("absent", r"has no file in safetensors form, but .*config\.json"),
        ("lacking", r"lacks \d weights of \w+, such as "),
        ("nan", r"has weights that are not finite in 1 of \d+ tensors, such as "),
    ],
)
def test_a_fault_of_the_weights_is_told_with_the_file(
    name: str, fault: str, message: str, models: Path, tmp_path: Path
) -> None:
    folder, subfolder, load = LOADERS[name]
    shutil.copytree(models / folder, tmp_path / "m")
    (file,) = (tmp_path / "m" / subfolder).glob("*.safetensors")
    whole = file.read_bytes()
    contents = {
        "page": b"<!DOCTYPE html><html></html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "cut": whole[:-9],
        "empty": b"",
    }
    if fault in contents:
        file.write_bytes(contents[fault])
    elif fault == "absent":
        file.unlink()
    else:
        weights = load_file(file)
        last = next(key for key in sorted(weights, reverse=True) if key.endswith("weight"))
        if fault == "nan":
            weights[last][0] = torch.nan
        else:
            del weights[last]
        save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message) as caught:
        load(str(tmp_path / "m"), subfolder)
    assert "\n" not in str(caught.value)
    assert "allow_download" not in str(caught.value)
