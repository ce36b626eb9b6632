import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.registry import DATASETS, build
from speedit_plugins.trainer.data.latents.cache import LatentCache, sample_latents
from speedit_plugins.trainer.data.latents.shards import (
    TensorShards,
    append_shard,
    read_index,
    start_or_resume,
)
from speedit_plugins.trainer.data.loader import ResumableLoader
from speedit_plugins.trainer.models.pretrained.autoencoder import Autoencoder, Pixels

MADE_FROM = {"image_size": 8, "class_cond": True, "num_classes": 3, "encoder_fingerprint": "e"}
NUM_SAMPLES = 10
SHARD_SIZE = 4


def latents(rows: range, *, flip: bool = False) -> dict[str, Tensor]:
    """Sample i has mean i (mirrored: -i), standard deviation i / 10 and label i mod 3."""
    value = torch.tensor([float(row) for row in rows]).reshape(-1, 1, 1, 1).expand(-1, 2, 3, 4)
    tensors = {"latent_mean": value, "latent_std": value / 10, "label": torch.tensor(list(rows)) % 3}
    return {**tensors, "flipped_mean": -value, "flipped_std": value / 10} if flip else tensors


def write(folder: Path, *, flip: bool = False, stop: int = NUM_SAMPLES) -> Path:
    index = start_or_resume(folder, made_from=MADE_FROM, num_samples=NUM_SAMPLES)
    for first in range(index.num_done, stop, SHARD_SIZE):
        index = append_shard(folder, index, latents(range(first, min(first + SHARD_SIZE, stop)), flip=flip))
    return folder


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Autoencoder:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoder")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=5,
        scaling_factor=0.3,
        shift_factor=0.25,
    ).save_pretrained(folder)
    return Autoencoder(str(folder))


def test_every_sample_is_read_from_its_shard(tmp_path: Path) -> None:
    cache = build(DATASETS, {"type": "LatentCache", "root": str(write(tmp_path))}, image_size=8)
    assert (len(cache), cache.num_classes, cache.channels, cache.image_size) == (NUM_SAMPLES, 3, 2, 8)
    assert (cache.encoder_fingerprint, cache.random_flip) == ("e", False)
    for i in range(NUM_SAMPLES):
        sample = cache.load(i, generator())
        assert sample["label"] == i % 3
        assert_close(sample["latent_mean"], torch.full((2, 3, 4), float(i)), atol=0, rtol=0)
        assert_close(sample["latent_std"], torch.full((2, 3, 4), i / 10), atol=0, rtol=0)
    for i in (-1, NUM_SAMPLES):
        with pytest.raises(IndexError, match=f"has 10 samples, got index {i}"):
            cache.load(i, generator())


def test_modifying_a_sample_does_not_modify_the_cache(tmp_path: Path) -> None:
    cache = LatentCache(write(tmp_path))
    cache.load(5, generator())["latent_mean"].zero_()
    assert (cache.load(5, generator())["latent_mean"] == 5).all()


def test_tensors_of_any_name_and_shape_keep_their_dtype(tmp_path: Path) -> None:
    text = {"tokens": torch.arange(6.0).reshape(3, 2).bfloat16(), "length": torch.tensor([2, 1, 0])}
    index = start_or_resume(tmp_path, made_from={"encoder": "t5"}, num_samples=3)
    append_shard(tmp_path, index, text)
    shards = TensorShards(tmp_path)
    assert shards.index.tensors["tokens"] == {"dtype": "bfloat16", "shape": [2]}
    for i in range(3):
        found = shards.load(i, ["tokens", "length"])
        assert_close(found, {name: tensor[i] for name, tensor in text.items()}, atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"needs the tensors latent_mean, latent_std, got \['length', 'tok"):
        LatentCache(tmp_path)


def test_flips_come_from_the_generator_with_probability_one_half(tmp_path: Path) -> None:
    cache = LatentCache(write(tmp_path, flip=True))
    stream = generator()
    num_flipped = sum(bool((cache.load(9, stream)["latent_mean"] < 0).all()) for _ in range(2000))
    # 4 sigma of a binomial count: 4 * sqrt(2000 / 4) = 89
    assert abs(num_flipped - 1000) < 89
    unflipped = LatentCache(tmp_path, random_flip=False)
    assert all((unflipped.load(9, stream)["latent_mean"] == 9).all() for _ in range(20))


def test_options_that_do_not_fit_the_cache_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    cases = (
        ({"random_flip": True}, "needs latents of mirrored images, got none .*cache_latents.py --flip"),
        ({"image_size": 16}, "were made with image_size 8, wanted image_size 16"),
        ({"class_cond": False}, "were made with class_cond True, wanted class_cond False"),
    )
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            LatentCache(tmp_path, **options)


def test_workers_read_what_one_process_reads(tmp_path: Path) -> None:
    cache = LatentCache(write(tmp_path, flip=True))
    alone = ResumableLoader(cache, batch_size=3, seed=1)
    # The files are mapped by now, and the workers inherit the maps.
    expected = [next(alone) for _ in range(8)]
    shared = ResumableLoader(cache, batch_size=3, seed=1, num_workers=2)
    found = [next(shared) for _ in range(8)]
    shared.close()
    assert_close(found, expected, atol=0, rtol=0)


def test_an_unpickled_cache_maps_the_files_itself(tmp_path: Path) -> None:
    cache = LatentCache(write(tmp_path))
    small = len(pickle.dumps(cache))
    cache.load(0, generator())
    content = pickle.dumps(cache)
    assert len(content) == small
    assert (pickle.loads(content).load(9, generator())["latent_mean"] == 9).all()  # noqa: S301 - made here


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_damaged_shard_is_named(tmp_path: Path, number: int) -> None:
    path = write(tmp_path) / f"shard_0000{number}.safetensors"
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[-1] ^= 1
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=f"shard .*{path.name} is damaged: its sha256 differs from the"):
        LatentCache(tmp_path)
    LatentCache(tmp_path, verify=False)
    for verify in (True, False):
        path.write_bytes(whole[:-1])
        wanted = f"wanted {len(whole)} bytes, got {len(whole) - 1}"
        with pytest.raises(ValueError, match=f"shard .*{path.name} is damaged: {wanted}"):
            LatentCache(tmp_path, verify=verify)
        path.unlink()
        with pytest.raises(ValueError, match=f"shard .*{path.name} is missing"):
            LatentCache(tmp_path, verify=verify)


def test_a_shard_that_goes_missing_later_is_named(tmp_path: Path) -> None:
    cache = LatentCache(write(tmp_path))
    (tmp_path / "shard_00001.safetensors").unlink()
    assert cache.load(0, generator())["label"] == 0
    with pytest.raises(ValueError, match="shard .*shard_00001.safetensors cannot be read"):
        cache.load(SHARD_SIZE, generator())


def test_an_unfinished_or_unreadable_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no cache in .*: it has no index\.json"):
        LatentCache(tmp_path)
    write(tmp_path, stop=8)
    with pytest.raises(ValueError, match="has 8 of 10 samples"):
        LatentCache(tmp_path)
    path = tmp_path / "index.json"
    content = json.loads(path.read_text())
    for text in ("{", "[]", json.dumps({**content, "shards": [{}]}), json.dumps({**content, "extra": 1})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"index .*index\.json is damaged"):
            LatentCache(tmp_path)
    path.write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(ValueError, match="has format 2, wanted 1"):
        LatentCache(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"),
    ],
)
def test_writing_resumes_at_the_first_damaged_shard(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    whole = {path.name: path.read_bytes() for path in write(tmp_path / "whole").iterdir()}
    write(tmp_path / "again")
    damage(tmp_path / "again" / "shard_00001.safetensors")
    index = start_or_resume(tmp_path / "again", made_from=MADE_FROM, num_samples=NUM_SAMPLES)
    assert index.num_done == SHARD_SIZE
    write(tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == whole


def test_a_folder_with_another_cache_is_refused_and_the_differences_are_named(tmp_path: Path) -> None:
    made_from = {"encoder": {"type": "A", "path": "x"}, "flip": False}
    start_or_resume(tmp_path, made_from=made_from, num_samples=3)
    before = read_index(tmp_path)
    other = {"encoder": {"type": "A", "path": "y"}, "flip": False, "dtype": "float16"}
    message = "dtype was nothing, got float16; encoder.path was x, got y; num_samples was 3, got 4; use"
    with pytest.raises(ValueError, match=re.escape(message)):
        start_or_resume(tmp_path, made_from=other, num_samples=4)
    assert read_index(tmp_path) == before == start_or_resume(tmp_path, made_from=made_from, num_samples=3)


def test_a_shard_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    index = start_or_resume(tmp_path, made_from=MADE_FROM, num_samples=6)
    one = append_shard(tmp_path, index, latents(range(4)))
    cases = (
        (latents(range(3)), r"first dimension in 1..2, got \[3\]"),
        ({**latents(range(2)), "label": torch.zeros(1)}, r"first dimension in 1..2, got \[1, 2\]"),
        (latents(range(2), flip=True), "needs the tensors of earlier shards"),
    )
    for tensors, message in cases:
        with pytest.raises(ValueError, match=message):
            append_shard(tmp_path, one, tensors)


def test_sampling_a_posterior_equals_encoding_bit_for_bit(autoencoder: Autoencoder) -> None:
    images = torch.rand(3, 3, 8, 12) * 2 - 1
    mean, std = autoencoder.posterior(images)
    latents = autoencoder.encode(images, [generator(i) for i in range(3)])
    assert torch.equal(sample_latents(mean, std, [generator(i) for i in range(3)]), latents)


def test_the_posterior_is_the_models_shifted_and_scaled(autoencoder: Autoencoder) -> None:
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    mean, std = autoencoder.posterior(images)
    posterior = autoencoder.model.encode(images).latent_dist
    assert_close(mean, (posterior.mean - 0.25) * 0.3)
    assert_close(std, posterior.std * 0.3)
    for value in (mean, std):
        assert not value.requires_grad
    # diffusers samples first and scales then; the results differ only by rounding.
    expected = (posterior.sample([generator(0), generator(1)]) - 0.25) * 0.3
    assert_close(autoencoder.encode(images, [generator(0), generator(1)]), expected)


def test_a_sample_depends_only_on_its_own_generator(autoencoder: Autoencoder) -> None:
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    mean, std = autoencoder.posterior(images)
    whole = sample_latents(mean, std, [generator(i) for i in range(4)])
    for rows in (slice(0, 1), slice(1, 4)):
        part = [generator(i) for i in range(4)[rows]]
        assert torch.equal(sample_latents(mean[rows], std[rows], part), whole[rows])


def test_the_posterior_of_pixels_has_no_variance() -> None:
    images = torch.rand(2, 1, 4, 4)
    mean, std = Pixels(1).posterior(images)
    assert torch.equal(sample_latents(mean, std, [generator(0), generator(1)]), images)
    assert torch.equal(Pixels(1).encode(images, [generator(0), generator(1)]), images)


def test_another_number_of_generators_than_samples_is_refused(autoencoder: Autoencoder) -> None:
    images = torch.rand(3, 3, 8, 8)
    with pytest.raises(ValueError, match="one generator per image, 3, got 1"):
        autoencoder.encode(images, [generator()])
    with pytest.raises(ValueError, match="one generator per sample, 3, got 4"):
        sample_latents(images, images, [generator()] * 4)


def test_an_encoders_fingerprint_depends_on_weights_scale_and_shift(
    autoencoder: Autoencoder, tmp_path: Path
) -> None:
    from diffusers import AutoencoderKL

    autoencoder.model.save_pretrained(tmp_path / "copy")
    assert Autoencoder(str(tmp_path / "copy")).fingerprint() == autoencoder.fingerprint()
    for key, value in (("scaling_factor", 0.31), ("shift_factor", 0.0)):
        model = AutoencoderKL.from_config({**autoencoder.model.config, key: value})
        model.load_state_dict(autoencoder.model.state_dict())
        model.save_pretrained(tmp_path / key)
        assert Autoencoder(str(tmp_path / key)).fingerprint() != autoencoder.fingerprint()
    other = Autoencoder(str(tmp_path / "copy"))
    next(other.parameters()).data.view(-1)[0] += 1
    assert other.fingerprint() != autoencoder.fingerprint()
    assert len({autoencoder.fingerprint(), Pixels(1).fingerprint(), Pixels(3).fingerprint()}) == 3
