import re
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import generators, small_config, small_trainer, stepped, weights
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.diffusion.augmentation import NoiseAugmentation
from speedit_plugins.trainer.diffusion.flow import RectifiedFlow
from speedit_plugins.trainer.inputs import BatchEncoder
from speedit_plugins.trainer.low_resolution import LowResolution, enlarged, reduced
from speedit_plugins.trainer.models.pretrained.autoencoder import Pixels
from speedit_plugins.trainer.training.assembly import build_trainer
from speedit_plugins.trainer.training.trainer import Trainer

CPU = torch.device("cpu")
FACTOR = {"super_resolution__factor": 2}
# A flow with a plain loss: what a model learns of it in a few steps is mostly how to copy its input.
PLAIN = {
    "diffusion": "{type: RectifiedFlow, prediction_type: x0, policy: uniform}",
    "num_classes": 0,
    "guidance_scale": 1.0,
    "sample_classes": "[]",
}


def low_resolution(largest: float = 0.0, factor: int = 2) -> LowResolution:
    return LowResolution(Pixels(1), NoiseAugmentation(RectifiedFlow(), largest=largest), factor=factor)


def test_a_low_resolution_pixel_is_the_mean_of_its_square() -> None:
    pixels = torch.arange(16.0).view(1, 1, 4, 4)
    assert reduced(pixels, 2)[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    # A video's frames are reduced alike, and a flat image stays flat in both directions.
    clip = torch.stack([pixels, -pixels], dim=2)
    assert torch.equal(reduced(clip, 2)[:, :, 1], -reduced(pixels, 2))
    flat = torch.full((1, 2, 3, 8, 8), 0.25)
    assert torch.equal(enlarged(reduced(flat, 4), 4), flat)
    with pytest.raises(ValueError, match="factor 3 needs sides that are its multiples, got 4 x 4"):
        reduced(pixels, 3)


def test_enlarging_is_bilinear() -> None:
    # Centres of the new pixels are at -0.25, 0.25, 0.75 and 1.25 of the old ones, and edges are repeated.
    found = enlarged(torch.tensor([[0.0, 1.0]]).view(1, 1, 1, 2), 2)
    assert found[0, 0, 0].tolist() == [0, 0.25, 0.75, 1]


def test_the_condition_has_the_noised_input_and_its_level() -> None:
    batch = {"image": torch.rand(64, 1, 4, 4), "label": torch.arange(64)}
    encoder = BatchEncoder(Pixels(1), CPU, is_labelled=True, low_resolution=low_resolution(largest=0.5))
    condition = encoder.encode(batch, generators(64)).condition
    assert isinstance(condition, dict)
    assert torch.equal(condition["label"], batch["label"])
    level = condition["level"].view(-1, 1, 1, 1)
    whole = enlarged(reduced(batch["image"], 2), 2)
    noise = (condition["extra"] - (1 - level) * whole) / level
    # 5 sigma for 64 levels of a uniform law on [0, 0.5], and for 1024 numbers of a normal one.
    assert float(level.mean()) == pytest.approx(0.25, abs=5 * 0.5 / 12**0.5 / 8)
    assert float(noise.std()) == pytest.approx(1, abs=5 / (2 * 1024) ** 0.5)


def test_nothing_else_that_is_drawn_moves() -> None:
    batch = {"image": torch.rand(3, 1, 4, 4)}
    drawn = generators(3)
    plain = BatchEncoder(Pixels(1), CPU, is_labelled=False).encode(batch, generators(3))
    given = BatchEncoder(
        Pixels(1), CPU, is_labelled=False, low_resolution=low_resolution(largest=0.5)
    ).encode(batch, drawn)
    assert torch.equal(given.noise, plain.noise)
    # What a sample's generator draws next, such as in a validation, is what it draws without.
    again = generators(3)
    BatchEncoder(Pixels(1), CPU, is_labelled=False).encode(batch, again)
    for one, other in zip(drawn, again, strict=True):
        assert torch.equal(torch.rand(4, generator=one), torch.rand(4, generator=other))
    # The noise of the augmentation is not that of the sample.
    assert isinstance(given.condition, dict)
    level = given.condition["level"].view(-1, 1, 1, 1)
    own = (given.condition["extra"] - (1 - level) * enlarged(reduced(batch["image"], 2), 2)) / level
    assert not torch.isclose(own, given.noise, atol=1e-3).any()


class Coarse:
    """Its latents are means of 2 x 2 pixels plus noise from the generators, as an autoencoder's are."""

    channels, image_channels, downsample = 1, 1, 2

    def encode(self, images: Tensor, generators: Any) -> Tensor:
        means = reduced(images, 2)
        return means + torch.cat([torch.randn(means[:1].shape, generator=each) for each in generators])

    def decode(self, latents: Tensor) -> Tensor:
        return enlarged(latents, 2)

    def fingerprint(self) -> str:
        return "coarse"


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 1, 3, 8, 8)])
def test_with_latents_the_enlarged_sample_is_encoded(shape: tuple[int, ...]) -> None:
    maker = LowResolution(Coarse(), NoiseAugmentation(RectifiedFlow(), largest=1.0), factor=2)
    low = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    low = reduced(low, 2)
    clean = maker.of(low, torch.zeros(2), generators(2))["extra"]
    assert clean.shape == low.shape
    # At level 0 the encoder's own noise alone is added, from the generators.
    whole = enlarged(low, 2)
    frames = [whole] if whole.ndim == 4 else list(whole.unbind(2))
    draws = generators(2)
    expected = torch.stack([Coarse().encode(frame, draws) for frame in frames], dim=2)
    assert_close(clean, expected if whole.ndim == 5 else expected[:, :, 0], rtol=0, atol=1e-6)
    # At level 1 there is noise alone, of mean 0 and variance 1, whatever was given.
    noise = maker.of(low + 50, torch.ones(2), generators(2))["extra"]
    assert float(noise.abs().max()) < 6


def test_a_batch_without_pixels_is_refused() -> None:
    with pytest.raises(
        ValueError, match="super_resolution needs images or videos, got batches of latent_mean"
    ):
        low_resolution().of_batch({"latent_mean": torch.zeros(1, 1, 2, 2)}, generators(1))


def test_a_resumed_super_resolution_goes_on_bit_for_bit(tmp_path: Path) -> None:
    changes = {**FACTOR, "model__class_dropout_prob": 0.1}
    whole = stepped(small_trainer(tmp_path / "whole", **changes), 6)
    first = stepped(small_trainer(tmp_path / "parts", **changes), 3)
    path = first.save()
    resumed = small_trainer(tmp_path / "parts", **changes)
    resumed.restore(path)
    assert_close(weights(stepped(resumed, 3)), weights(whole), rtol=0, atol=0)
    assert_close(resumed.averaged_weights(), whole.averaged_weights(), rtol=0, atol=0)


def test_a_resumed_run_keeps_factor_and_augmentation(tmp_path: Path) -> None:
    path = stepped(small_trainer(tmp_path, **FACTOR), 1).save()
    for changes, key in (
        ({"super_resolution__factor": 4}, "factor was 2, got 4"),
        ({**FACTOR, "super_resolution__augmentation": 0.5}, "augmentation was 0.2, got 0.5"),
        ({}, "factor was 2, got 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"super_resolution.{key}")):
            small_trainer(tmp_path, **changes).restore(path)


def test_two_half_batches_see_the_low_resolution_inputs_of_a_whole_one(tmp_path: Path) -> None:
    # Level and noise depend on seed, step and place in the global batch alone, so ranks divide them.
    whole = stepped(small_trainer(tmp_path / "whole", **FACTOR), 3)
    halves = {"data__batch_size": 8, "optimizer__grad_accumulation": 2}
    parts = stepped(small_trainer(tmp_path / "parts", **FACTOR, **halves), 3)
    # As in the test of two ranks: gradients are summed in another order.
    assert_close(weights(parts), weights(whole), rtol=0, atol=1e-5)


def _losses(trainer: Trainer, *, replaced: bool) -> float:
    """Mean loss of the last steps of a training, its low-resolution input replaced by noise or not."""
    encode = trainer.inputs.encode

    def noisy(batch: Any, draws: Any) -> Any:
        given = encode(batch, draws)
        condition = given.condition
        assert isinstance(condition, dict)
        drawn = torch.randn(condition["extra"].shape, generator=torch.Generator().manual_seed(trainer.step))
        condition["extra"] = drawn
        return given

    if replaced:
        trainer.inputs.encode = noisy  # type: ignore[method-assign]  # of this object
    losses, losses_of = [], trainer.objective.losses

    def kept(*args: Any) -> Any:
        terms = losses_of(*args)
        losses.append(float(terms.mse.detach().mean()))
        return terms

    trainer.objective.losses = kept  # type: ignore[method-assign]  # of this object
    stepped(trainer, 150)
    return sum(losses[-30:]) / 30


def test_a_model_learns_from_its_low_resolution_input(tmp_path: Path) -> None:
    given = _losses(small_trainer(tmp_path / "given", **FACTOR, **PLAIN), replaced=False)
    blind = _losses(small_trainer(tmp_path / "blind", **FACTOR, **PLAIN), replaced=True)
    # Same weights, data, timesteps and noise. A digit is known up to the detail within a square of 2 x 2.
    assert given < 0.6 * blind


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"super_resolution__factor": 1}, "super_resolution.factor: wanted int >= 2, or 0"),
        (
            {"super_resolution__factor": 3},
            "image_size: wanted a multiple of super_resolution.factor 3",
        ),
        ({"super_resolution__augmentation": 0.5}, "has no effect without super_resolution.factor"),
        ({**FACTOR, "super_resolution__augmentation": 1.5}, "wanted float <= 1, got 1.5"),
        ({**FACTOR, "inpainting": "RandomMasks"}, "fills holes or enlarges; wanted inpainting null"),
        ({**FACTOR, "data__dataset": "{type: LatentCache, path: x}"}, "makes its inputs of pixels"),
    ],
)
def test_a_section_that_does_not_fit_is_refused(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        small_config(tmp_path, **changes)


def test_a_model_that_takes_no_low_resolution_input_is_refused() -> None:
    options = ["super_resolution.factor=2", "max_training_steps=100"]
    with pytest.raises(ValueError, match="super_resolution does not fit the model PixArt; wanted one that"):
        build_trainer(load_config("configs/text_to_image/emoji_pixart.yaml", "train", options))
