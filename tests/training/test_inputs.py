from collections.abc import Sequence
from typing import Any

import pytest
import torch
from runs import generators
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.trainer.inputs import (
    FRAMES_AT_ONCE,
    BatchEncoder,
    decode_video,
    encode_video,
    masked_latents,
    with_extra,
)
from speedit_plugins.trainer.models.pretrained.autoencoder import Pixels

CPU = torch.device("cpu")
NULL = {"tokens": torch.full((1, 3, 2), -1.0), "mask": torch.tensor([[True, False, False]])}


class Words:
    """Encodes a caption as tokens that all equal its length."""

    width, max_length, num_cut = 2, 3, 0

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        lengths = torch.tensor([float(len(caption)) for caption in captions])
        return {
            "tokens": lengths.reshape(-1, 1, 1).expand(-1, 3, 2).clone(),
            "mask": torch.ones(len(captions), 3, dtype=torch.bool),
        }


class Halving:
    """Its latents are means of 2 x 2 pixels plus noise from the generators."""

    channels, image_channels, downsample = 1, 1, 2

    def encode(self, images: Tensor, generators: Any = None) -> Tensor:
        means = torch.nn.functional.avg_pool2d(images, 2)
        if generators is None:
            return means
        drawn = [torch.randn(means[:1].shape, generator=generator) for generator in generators]
        return means + torch.cat(drawn)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.repeat_interleave(2, -1).repeat_interleave(2, -2)

    def fingerprint(self) -> str:
        return "halving"


def encoder(**options: Any) -> BatchEncoder:
    return BatchEncoder(Pixels(1), CPU, **{"is_labelled": False, **options})


def test_labels_are_the_condition_of_a_labelled_run() -> None:
    batch = {"image": torch.zeros(2, 1, 4, 4), "label": torch.tensor([3, 1])}
    given = encoder(is_labelled=True).encode(batch, generators(2))
    assert isinstance(given.condition, Tensor)
    assert given.condition.tolist() == [3, 1]
    assert encoder().encode(batch, generators(2)).condition is None


def test_a_sample_is_the_same_in_any_batch() -> None:
    batch = {"image": torch.rand(4, 1, 4, 4), "caption": ["a", "bb", "ccc", "dddd"]}
    options = {"captions": Words(), "null_text": NULL, "caption_dropout_prob": 0.5}
    whole = encoder(**options).encode(batch, generators(4))
    tail = {"image": batch["image"][2:], "caption": batch["caption"][2:]}
    part = encoder(**options).encode(tail, generators(4)[2:])
    assert_close(part.noise, whole.noise[2:], rtol=0, atol=0)
    assert_close(part.condition, {k: v[2:] for k, v in whole.condition.items()}, rtol=0, atol=0)  # type: ignore[union-attr]  # a mapping


def test_captions_are_dropped_as_often_as_asked() -> None:
    count = 4000
    batch = {"image": torch.zeros(count, 1, 1, 1), "caption": ["abc"] * count}
    options = {"captions": Words(), "null_text": NULL, "caption_dropout_prob": 0.25}
    given = encoder(**options).encode(batch, generators(count))
    assert isinstance(given.condition, dict)
    is_null = given.condition["tokens"][:, 0, 0] == -1
    # 4 sigma of a binomial frequency: 4 * sqrt(0.25 * 0.75 / 4000) = 0.027.
    assert float(is_null.float().mean()) == pytest.approx(0.25, abs=0.027)
    assert (given.condition["mask"].sum(1) == torch.where(is_null, 1, 3)).all()


def test_cached_features_and_latents_give_what_the_encoders_give() -> None:
    images, captions = torch.rand(3, 1, 4, 4), ["a", "bb", "ccc"]
    options: dict[str, Any] = {"null_text": NULL, "caption_dropout_prob": 0.5}
    live = BatchEncoder(Halving(), CPU, is_labelled=False, captions=Words(), **options)
    means = Halving().encode(images)
    features = Words().encode(captions)
    cached = {
        "latent_mean": means,
        "latent_std": torch.ones_like(means),
        "text_tokens": features["tokens"],
        "text_mask": features["mask"],
    }
    first = live.encode({"image": images, "caption": captions}, generators(3))
    second = BatchEncoder(Halving(), CPU, is_labelled=False, **options).encode(cached, generators(3))
    for one, other in zip(vars(first).values(), vars(second).values(), strict=True):
        assert_close(one, other, rtol=0, atol=0)


def test_videos_are_encoded_frame_by_frame() -> None:
    videos, drawn = torch.rand(2, 1, 3, 4, 4), generators(2)
    latents = encode_video(Halving(), videos, generators(2))
    decoded = decode_video(Halving(), latents)
    assert latents.shape == (2, 1, 3, 2, 2)
    assert decoded.shape == videos.shape
    for frame in range(3):
        one = latents[:, :, frame]
        assert_close(one, Halving().encode(videos[:, :, frame], drawn), rtol=0, atol=0)
        assert_close(decoded[:, :, frame], Halving().decode(one), rtol=0, atol=0)


def test_frames_of_a_video_draw_one_after_the_other_from_its_generator() -> None:
    videos = torch.zeros(2, 1, 3, 2, 2)
    latents = encode_video(Halving(), videos, generators(2))
    for video, generator in zip(latents, generators(2), strict=True):
        assert_close(video.flatten(), torch.cat([torch.randn(1, generator=generator) for _ in range(3)]))


class Counting(Halving):
    """Records how many images each call gets."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def encode(self, images: Tensor, generators: Any = None) -> Tensor:
        self.counts.append(len(images))
        return super().encode(images, generators)

    def decode(self, latents: Tensor) -> Tensor:
        self.counts.append(len(latents))
        return super().decode(latents)


def test_an_encoder_has_a_limited_number_of_frames_at_once() -> None:
    F = FRAMES_AT_ONCE - 3
    videos, counting = torch.rand(3, 1, F, 2, 2), Counting()
    latents = encode_video(counting, videos, generators(3))
    parts = [FRAMES_AT_ONCE, FRAMES_AT_ONCE, 3 * F - 2 * FRAMES_AT_ONCE]
    assert counting.counts == parts
    # A latent is a mean of four pixels, so no frame's bits depend on other frames.
    whole = Halving().encode(videos.transpose(1, 2).flatten(0, 1))
    drawn = [torch.randn(1, 1, 1, 1, generator=each) for each in generators(3) for _ in range(F)]
    assert torch.equal(latents.transpose(1, 2).flatten(0, 1), whole + torch.cat(drawn))
    counting.counts.clear()
    decoded = decode_video(counting, latents)
    assert counting.counts == parts
    assert torch.equal(decoded, latents.repeat_interleave(2, -1).repeat_interleave(2, -2))


def test_noise_has_the_latents_shape() -> None:
    given = BatchEncoder(Halving(), CPU, is_labelled=False).encode(
        {"video": torch.rand(2, 1, 3, 4, 4)}, generators(2)
    )
    assert given.noise.shape == given.latents.shape == (2, 1, 3, 2, 2)


class TopHalf:
    def draw(self, height: int, width: int, generator: torch.Generator) -> Tensor:
        mask = torch.zeros(height, width)
        mask[: height // 2] = 1
        return mask


def test_an_inpainting_model_sees_the_mask_and_what_lies_around_the_hole() -> None:
    batch = {"image": torch.full((2, 1, 4, 4), 0.5), "label": torch.tensor([0, 1])}
    given = encoder(is_labelled=True, masks=TopHalf()).encode(batch, generators(2))
    assert isinstance(given.condition, dict)
    mask, rest = given.condition["extra"].unbind(1)
    assert mask[0].tolist() == [[1] * 4] * 2 + [[0] * 4] * 2
    assert rest[0].tolist() == [[0] * 4] * 2 + [[0.5] * 4] * 2
    assert given.condition["label"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="needs images, videos or voxels, got batches of latent_mean"):
        encoder(masks=TopHalf()).encode(
            {"latent_mean": torch.zeros(1, 1, 2, 2), "latent_std": torch.ones(1, 1, 2, 2)}, generators(1)
        )


def test_a_mask_is_brought_to_the_latents_size() -> None:
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 2:, :] = 1
    extra = masked_latents(Halving(), torch.ones(1, 1, 4, 4), mask, generators(1))
    assert extra[0, 0].tolist() == [[0, 0], [1, 1]]
    drawn = torch.randn(2, 2, generator=generators(1)[0])
    assert_close(extra[0, 1], torch.tensor([[1.0, 1.0], [0.0, 0.0]]) + drawn, rtol=0, atol=0)


def test_the_latents_of_a_masked_video_are_those_of_its_frames() -> None:
    # The second of three frames is missing.
    mask = torch.tensor([0.0, 1.0, 0.0])[:, None, None].expand(3, 4, 4)[None, None]
    videos = torch.rand(1, 1, 3, 4, 4)
    extra = masked_latents(Halving(), videos, mask, generators(1))
    assert extra[0, 0].flatten(1).tolist() == [[0] * 4, [1] * 4, [0] * 4]
    draws = generators(1)
    frames = [videos[:, :, 0], torch.zeros(1, 1, 4, 4), videos[:, :, 2]]
    expected = torch.cat([Halving().encode(frame, draws) for frame in frames])
    assert_close(extra[0, 1], expected[:, 0], rtol=0, atol=1e-6)


def test_extra_channels_stand_beside_any_condition() -> None:
    extra = torch.zeros(1, 2, 1, 1)
    assert with_extra(None, extra) == {"extra": extra}
    assert set(with_extra(torch.tensor([1]), extra)) == {"label", "extra"}  # type: ignore[arg-type]  # a mapping
    assert set(with_extra(NULL, extra)) == {"tokens", "mask", "extra"}  # type: ignore[arg-type]  # a mapping
