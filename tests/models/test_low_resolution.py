from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import TEXT_WIDTH, save_pipeline
from torch import Tensor, nn
from torch.testing import assert_close

from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.interface import example_inputs, input_shape
from speedit_plugins.trainer.models.latte import Latte
from speedit_plugins.trainer.models.mdt import MDT
from speedit_plugins.trainer.models.sit import SiT
from speedit_plugins.trainer.models.text_conditioned.text_dit import TextDiT, TextLatte
from speedit_plugins.trainer.models.text_conditioned.unet import UNet

SIZES: dict[str, Any] = {
    "input_size": 4,
    "patch_size": 2,
    "in_channels": 1,
    "extra_channels": 1,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
}
TEXT: dict[str, Any] = {"text_width": TEXT_WIDTH, "text_length": 5}
BUILDERS: dict[str, Any] = {
    "DiT": lambda: DiT(**SIZES, num_classes=3),
    "unconditional": lambda: DiT(**SIZES, num_classes=0),
    "SiT": lambda: SiT(**SIZES, num_classes=3),
    "MDT": lambda: MDT(**SIZES, num_classes=3, decode_layer=1),
    "Latte": lambda: Latte(**SIZES, num_frames=2),
    "TextDiT": lambda: TextDiT(**SIZES, **TEXT, draft=True),
    "TextLatte": lambda: TextLatte(**SIZES, **TEXT, num_frames=2),
    "UNet": lambda: UNet(
        input_size=4,
        in_channels=1,
        extra_channels=1,
        # 32 groups of 2: a norm of single channels would take out what is added to each of them.
        block_out_channels=(64, 64),
        layers_per_block=1,
        **TEXT,
    ),
}


def randomised(model: nn.Module) -> nn.Module:
    """Layers that start at zero hide what comes before them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def given_to(model: nn.Module) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Arguments of a call, on the CPU."""
    generator = torch.Generator().manual_seed(1)
    x, timestep, condition = example_inputs(model, 2)
    drawn = {
        name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in condition.items()
    }
    for name, value in (("label", torch.tensor([1, 2])), ("mask", torch.ones(2, 5, dtype=torch.bool))):
        if name in drawn:
            drawn[name] = value
    drawn["level"] = torch.tensor([0.1, 0.2])
    return torch.randn(x.shape, generator=generator), torch.tensor([3, 500]), drawn


@pytest.mark.parametrize("name", BUILDERS)
def test_a_prediction_depends_on_the_level_and_the_low_resolution_input(name: str) -> None:
    model = BUILDERS[name]()
    model.tell_level()
    x, timestep, condition = given_to(randomised(model))
    assert condition["extra"].shape == (2, *input_shape(model))
    found = model(x, timestep, condition)
    for key in ("level", "extra"):
        changed = {
            **condition,
            key: condition[key] + torch.tensor([0.0, 0.3]).view(2, *[1] * (condition[key].ndim - 1)),
        }
        other = model(x, timestep, changed)
        # Only the second sample has another one.
        assert_close(other[0], found[0], rtol=0, atol=1e-5)
        assert not torch.allclose(other[1], found[1], atol=1e-4)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_level_is_wanted_where_it_is_told_and_nowhere_else(name: str) -> None:
    told, untold = BUILDERS[name](), BUILDERS[name]()
    told.tell_level()
    x, timestep, condition = given_to(told)
    with pytest.raises(ValueError, match="needs no level of noise in its condition, got one"):
        untold(x, timestep, condition)
    del condition["level"]
    with pytest.raises(ValueError, match="needs a level of noise in its condition, got none"):
        told(x, timestep, condition)
    assert untold(x, timestep, condition).isfinite().all()


def test_level_0_of_a_pretrained_unet_starts_as_the_saved_one(tmp_path: Path) -> None:
    folder = str(save_pipeline(tmp_path, "UNet"))
    plain = UNet(input_size=4, path=folder, text_width=TEXT_WIDTH, text_length=5).eval()
    wide = UNet(input_size=4, path=folder, extra_channels=4, text_width=TEXT_WIDTH, text_length=5)
    wide.tell_level()
    x, timestep, condition = given_to(wide.eval())
    text = {name: condition[name] for name in ("tokens", "mask")}
    assert_close(wide(x, timestep, condition), plain(x, timestep, text), rtol=0, atol=1e-5)
    # diffusers itself embeds the level under this name.
    wide.net.save_pretrained(tmp_path / "wide")
    again = UNet(
        input_size=4, path=str(tmp_path / "wide"), extra_channels=4, text_width=TEXT_WIDTH, text_length=5
    ).eval()
    assert again.is_told_level
    assert_close(again(x, timestep, condition), wide(x, timestep, condition), rtol=0, atol=0)


def test_a_network_that_embeds_classes_there_is_refused() -> None:
    model = BUILDERS["UNet"]()
    model.net.class_embedding = nn.Embedding(3, 32)
    with pytest.raises(ValueError, match="wanted class_embed_type null or timestep"):
        model.tell_level()


def test_drawing_anew_gives_the_level_the_distribution_of_the_timestep() -> None:
    model = DiT(**{**SIZES, "hidden_size": 256}, num_classes=0)
    model.tell_level()
    randomised(model)
    model.reset_parameters()
    assert model.level_embedder is not None
    for index in (0, 2):
        layer = model.level_embedder.mlp[index]
        # 65,536 numbers: 5 sigma of a standard deviation are 5 / sqrt(2 * 65,536) = 1.4 %.
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.014)
        assert not layer.bias.any()
