"""Vision networks of transformers as maps of patch features.

Dims: `B` images, `Z` width of a feature.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.trainer.models.pretrained.vision import VisionNetwork

SIZE = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]


def save(folder: Path, kind: str, **prepared: Any) -> Any:
    """Saves a network of 8 x 8 patches of 4 pixels, and returns it."""
    import json

    import transformers as t

    torch.manual_seed(0)
    vision = {**SIZE, "image_size": 32, "patch_size": 4}
    text = {"vocab_size": 16, **SIZE}
    models: dict[str, Any] = {
        "vit": lambda: t.ViTModel(t.ViTConfig(**vision)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**vision)),
        "dinov2 with registers": lambda: t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(**vision, num_register_tokens=3)
        ),
        "clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision)),
        "siglip": lambda: t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=vision)),
        "convnext": lambda: t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])),
        "bert": lambda: t.BertModel(t.BertConfig(**text)),
    }
    model = models[kind]().eval()
    model.save_pretrained(folder)
    sizes = {"size": {"height": 32, "width": 32}} | prepared
    content = {"image_processor_type": "ViTImageProcessor", "image_mean": MEAN, "image_std": STD, **sizes}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return getattr(model, "vision_model", model)


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [("vit", 1), ("dinov2", 1), ("dinov2 with registers", 4), ("clip", 1), ("siglip", 0)],
)
def test_the_map_has_the_patch_tokens_of_the_normalised_image(tmp_path: Path, kind: str, prefix: int) -> None:
    model = save(tmp_path, kind)
    network = VisionNetwork(str(tmp_path))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    found = network.encode(images)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        tokens: Tensor = model(pixel_values=((images + 1) / 2 - mean) / std).last_hidden_state
    assert network.width == 8
    assert found.shape == (2, 8, 8, 8)
    for row, column in ((0, 0), (0, 5), (7, 2)):
        assert_close(found[:, :, row, column], tokens[:, prefix + 8 * row + column])
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_network_of_convolutions_keeps_its_map(tmp_path: Path) -> None:
    save(tmp_path, "convnext")
    # Four levels, the first at a quarter of the side.
    assert VisionNetwork(str(tmp_path), size=64).encode(torch.zeros(1, 1, 64, 64)).shape == (1, 8, 2, 2)


def test_the_crop_is_the_size_and_weights_and_size_are_the_fingerprint(tmp_path: Path) -> None:
    crop = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 40}}
    model = save(tmp_path, "dinov2", **crop)
    network = VisionNetwork(str(tmp_path))
    assert network.size == 32
    assert network.encode(torch.zeros(1, 3, 50, 30)).shape == (1, 8, 8, 8)
    assert VisionNetwork(str(tmp_path)).fingerprint() == network.fingerprint()
    other = VisionNetwork(str(tmp_path), size=48)
    assert other.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 8, 12, 12)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path)
    assert len({each.fingerprint() for each in (network, other, VisionNetwork(str(tmp_path)))}) == 3


def test_what_is_no_vision_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"alignment\.teacher.*there is no such folder"):
        VisionNetwork(str(tmp_path / "none"))
    save(tmp_path / "text", "bert")
    with pytest.raises(ValueError, match=r"alignment\.teacher.*does not take images of 32 pixels"):
        VisionNetwork(str(tmp_path / "text"))
    save(tmp_path / "sizeless", "vit", size=None)
    with pytest.raises(ValueError, match=r"names no size; wanted alignment\.teacher_size"):
        VisionNetwork(str(tmp_path / "sizeless"))
    save(tmp_path / "fixed", "vit")
    with pytest.raises(ValueError, match=r"not take images of 40 pixels.*another alignment\.teacher_size"):
        VisionNetwork(str(tmp_path / "fixed"), size=40)
