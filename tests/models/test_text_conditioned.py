import re
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import TEXT_WIDTH, save_pipeline
from torch import Tensor, nn
from torch.testing import assert_close

from speedit_plugins.registry import MODELS, build
from speedit_plugins.trainer.models.interface import example_inputs, input_shape
from speedit_plugins.trainer.models.text_conditioned.latte_t2v import LatteT2V
from speedit_plugins.trainer.models.text_conditioned.pixart import PixArt
from speedit_plugins.trainer.models.text_conditioned.unet import UNet
from speedit_plugins.trainer.models.text_conditioned.wrapper import TextConditioned

TEXT: dict[str, Any] = {"text_width": TEXT_WIDTH, "text_length": 5}
SMALL: dict[str, Any] = {"num_layers": 1, "num_heads": 2, "head_dim": 16, **TEXT}


def small_pixart(**options: Any) -> TextConditioned:
    return PixArt(input_size=8, **{**SMALL, **options})


def small_unet(**options: Any) -> TextConditioned:
    return UNet(input_size=8, block_out_channels=(32, 32), layers_per_block=1, **{**TEXT, **options})


def small_latte(**options: Any) -> TextConditioned:
    return LatteT2V(input_size=8, num_frames=3, **{**SMALL, **options})


MODELS_OF_TEXT = (small_pixart, small_unet, small_latte)


def randomised(model: TextConditioned) -> TextConditioned:
    """Layers that start at zero hide what comes before them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def condition(B: int, length: int = 5, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(5).expand(B, 5) < length
    return {"tokens": torch.randn(B, 5, TEXT_WIDTH, generator=generator), "mask": mask}


def call(model: TextConditioned, given: dict[str, Tensor], *, frames: int | None = None) -> Tensor:
    shape = list(input_shape(model))
    if frames is not None:
        shape[1] = frames
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    return model(x, torch.tensor([3, 500]), given)


@pytest.mark.parametrize("builder", MODELS_OF_TEXT)
def test_a_prediction_depends_on_the_caption_alone_where_the_mask_is_true(builder: Any) -> None:
    model = randomised(builder())
    given = condition(2, length=3)
    behind = {**given, "tokens": given["tokens"].clone()}
    behind["tokens"][:, 3:] += 1
    before = {**given, "tokens": given["tokens"].clone()}
    before["tokens"][:, :3] += 1
    first = call(model, given)
    assert first.shape == (2, model.out_channels, *input_shape(model)[1:])
    assert not torch.allclose(call(model, before), first, atol=1e-4)
    # exp(-10,000) is 0 in float32: what lies behind the mask has no weight at all.
    assert_close(call(model, behind), first, rtol=0, atol=1e-6)


def test_each_video_of_a_batch_reads_its_own_caption() -> None:
    model = randomised(small_latte())
    both = condition(2)
    swapped = {name: value.flip(0) for name, value in both.items()}
    first, second = call(model, both), call(model, swapped)
    x = torch.randn(2, *input_shape(model), generator=torch.Generator().manual_seed(1))
    alone = model(x[:1], torch.tensor([3]), {name: value[:1] for name, value in both.items()})
    # Another batch size, other sums: float32 rounding.
    assert_close(first[:1], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(first[:1], second[:1], atol=1e-4)


def test_images_train_the_spatial_half_of_a_video_model() -> None:
    model = randomised(small_latte()).train()
    call(model, condition(2), frames=1).sum().backward()
    temporal = [p.grad for n, p in model.named_parameters() if "temporal_transformer_blocks" in n]
    spatial = [
        p.grad for n, p in model.named_parameters() if ".transformer_blocks" in n and "attn1.to_q" in n
    ]
    assert temporal
    assert all(grad is not None and not grad.any() for grad in temporal)
    assert all(grad is not None and grad.any() for grad in spatial)


def test_clips_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="takes clips of 3 frames, or of 1, got 2"):
        call(small_latte(), condition(2), frames=2)


# Parameters of the released models.
@pytest.mark.parametrize(
    ("name", "width", "length", "size", "millions"),
    [("PixArt", 4096, 120, 32, 610.9), ("UNet", 768, 77, 64, 859.5)],
)
def test_the_default_sizes_are_those_of_the_released_models(
    name: str, width: int, length: int, size: int, millions: float
) -> None:
    with torch.device("meta"):
        model = build(MODELS, {"type": name, "input_size": size, "text_width": width, "text_length": length})
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=1e-4)


@pytest.mark.parametrize("name", ["PixArt", "UNet", "LatteT2V"])
def test_a_saved_pipeline_gives_its_weights(tmp_path: Path, name: str) -> None:
    folder = save_pipeline(tmp_path, name)
    frames = {"num_frames": 3} if name == "LatteT2V" else {}
    options = {"type": name, "path": str(folder), "input_size": 4, "text_length": 8, **frames}
    first, second = (build(MODELS, options, text_width=TEXT_WIDTH) for _ in range(2))
    assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"has .* {TEXT_WIDTH}, wanted 32, the width of the text encoder"):
        build(MODELS, options, text_width=32)
    with pytest.raises(ValueError, match=r"model.path: no .* at .*absent.*give the folder of a saved model"):
        build(MODELS, {**options, "path": str(tmp_path / "absent")}, text_width=TEXT_WIDTH)


def test_a_video_model_of_other_frames_is_refused(tmp_path: Path) -> None:
    options = {"type": "LatteT2V", "path": str(save_pipeline(tmp_path, "LatteT2V")), "input_size": 8}
    with pytest.raises(ValueError, match="has video_length 3, wanted 4, the num_frames of the config"):
        build(MODELS, {**options, "num_frames": 4}, text_width=TEXT_WIDTH, text_length=8)


def test_a_pixart_that_reads_the_images_size_is_refused(tmp_path: Path) -> None:
    from diffusers import PixArtTransformer2DModel

    folder = save_pipeline(tmp_path, "PixArt")
    saved = PixArtTransformer2DModel.from_pretrained(folder / "transformer")
    # As PixArt-XL-2-1024-MS is saved: what it reads follows from its size.
    large = PixArtTransformer2DModel.from_config(
        {**saved.config, "sample_size": 128, "use_additional_conditions": None}
    )
    large.save_pretrained(folder / "transformer")
    options = {"type": "PixArt", "path": str(folder), "input_size": 128}
    with pytest.raises(
        ValueError, match="reads the image's size.*wanted a model with use_additional_conditions f"
    ):
        build(MODELS, options, text_width=TEXT_WIDTH, text_length=8)


def test_a_model_of_other_channels_is_refused(tmp_path: Path) -> None:
    options = {"type": "PixArt", "path": str(save_pipeline(tmp_path, "PixArt")), "input_size": 4}
    with pytest.raises(
        ValueError,
        match=re.escape("returns 8 channels, wanted 4 for latents of 4 channels with learn_sigma false"),
    ):
        build(MODELS, {**options, "learn_sigma": False}, text_width=TEXT_WIDTH, text_length=8)


def test_an_inpainting_model_starts_as_the_saved_one(tmp_path: Path) -> None:
    folder = str(save_pipeline(tmp_path, "UNet"))
    plain, wide = (
        UNet(input_size=4, path=folder, extra_channels=extra, text_width=TEXT_WIDTH, text_length=5).eval()
        for extra in (0, 5)
    )
    assert (wide.in_channels, wide.extra_channels) == (4, 5)
    given = condition(2)
    extra = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(2))
    assert_close(call(wide, {**given, "extra": extra}), call(plain, given), rtol=0, atol=1e-5)


def test_checkpointing_changes_no_gradient() -> None:
    found = []
    for is_checkpointed in (False, True):
        model = randomised(small_pixart(gradient_checkpointing=is_checkpointed)).train()
        call(model, condition(2)).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0]
    assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_a_condition_that_does_not_fit_is_refused() -> None:
    model = small_pixart()
    with pytest.raises(ValueError, match="needs caption features of width 16, got none"):
        model(torch.zeros(1, 4, 8, 8), torch.zeros(1), None)
    with pytest.raises(ValueError, match="needs caption features of width 16, got width 3"):
        model(torch.zeros(1, 4, 8, 8), torch.zeros(1), {"tokens": torch.zeros(1, 5, 3)})


@pytest.mark.parametrize("builder", MODELS_OF_TEXT)
def test_an_example_call_has_the_shapes_of_a_real_one(builder: Any) -> None:
    with torch.device("meta"):
        model: nn.Module = builder()
    x, timestep, given = example_inputs(model, 2)
    assert model(x, timestep, given).shape == (2, model.out_channels, *x.shape[2:])
