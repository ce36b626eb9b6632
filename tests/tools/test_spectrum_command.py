"""The number that the command measures, what it says about it, and what it refuses."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_latents import main as cache_latents
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image
from safetensors.torch import save_file
from torch.testing import assert_close

from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.spectrum import DataSpectrum
from speedit_plugins.spectrum_command import main
from speedit_plugins.spectrum_report import draws_of, flow_time, measure
from speedit_plugins.spectrum_samples import Choice, read_samples
from speedit_plugins.trainer.data.images.digits import Digits
from speedit_plugins.trainer.data.images.fit import center_crop
from speedit_plugins.trainer.data.loader import NOISE_STREAM, stream_seed
from speedit_plugins.trainer.models.pretrained.autoencoder import Autoencoder

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 40


def measured(*arguments: str | Path) -> list[dict[str, Any]]:
    """The measurements that the command writes as JSON, with --json beside its arguments."""
    path = Path(str(arguments[0])).parent / "measured.json"
    assert main([*map(str, arguments), "--json", str(path)]) == 0
    found: list[dict[str, Any]] = json.loads(path.read_text())["measurements"]
    return found


def normal(num_samples: int, *shape: int, std: float = 1.0) -> torch.Tensor:
    return std * torch.randn(num_samples, *shape, generator=torch.Generator().manual_seed(0))


def draw_pictures(folder: Path, size: tuple[int, int] = (16, 16)) -> Path:
    """Writes colour images with shades that vary smoothly, so that few samples show their spectrum."""
    folder.mkdir(parents=True)
    coarse = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 2, 2, 3), dtype=np.uint8)
    for number, image in enumerate(coarse):
        Image.fromarray(image).resize(size, Image.Resampling.BILINEAR).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoder")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=2,
        scaling_factor=0.3,
        shift_factor=0.1,
    ).save_pretrained(folder)
    return folder


def test_the_centre_of_known_variances_is_found(tmp_path: Path) -> None:
    # Each value has variance 4, so a share r is explained at SNR r / (1 - r) / 4.
    np.save(tmp_path / "latents.npy", normal(4000, 3, std=2.0).numpy())
    (found,) = measured(tmp_path / "latents.npy", "--samples", "4000")
    assert (found["num_samples"], found["num_found"], found["shape"]) == (4000, 4000, [3])
    # The variance of 12,000 values has a standard error of sqrt(2 / 12000) = 0.013 of itself: 4 of these.
    for key, odds in (("centre", 1), ("quarter", 1 / 3), ("three_quarters", 3)):
        assert found[key] == pytest.approx(math.log(odds) - math.log(4), abs=0.052)
    # SNR 1/4 is (1 - t) / t = 1/2.
    assert found["centre_time"] == pytest.approx(2 / 3, abs=0.01)


def test_enlarged_digits_are_recognised_at_lower_snr(tmp_path: Path) -> None:
    centres = []
    for size in (8, 16):
        np.savez(tmp_path / f"{size}.npz", images=Digits(image_size=size).images.numpy())
        (found,) = measured(tmp_path / f"{size}.npz", "--samples", "1797")
        centres.append(found["centre"])
    # docs/method.md: digits enlarged to twice their side go from 0.01 to -1.14.
    assert centres == pytest.approx([0.01, -1.14], abs=0.005)


def test_every_image_size_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = draw_pictures(tmp_path / "images")
    sizes = (4, 8, 16)
    found = measured(folder, "--image-size", *map(str, sizes))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder}: 40 images"
    for each, size, row in zip(found, sizes, lines[3:], strict=False):
        images = [center_crop(Image.open(path), size, size) for path in sorted(folder.iterdir())]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).double()
        # The order of the samples changes the last bits.
        assert each["centre"] == pytest.approx(DataSpectrum.of(pixels / 127.5 - 1).log_snr_at(), abs=1e-5)
        assert row.split()[:7] == [str(size), "3", "x", str(size), "x", str(size), f"{each['centre']:.2f}"]
    # Twice the side has four times the values that say the same.
    assert np.diff([each["centre"] for each in found]) == pytest.approx([-math.log(4)] * 2, abs=0.3)


def test_samples_are_some_of_all_and_the_same_for_a_seed(tmp_path: Path) -> None:
    torch.save(torch.arange(20.0).reshape(20, 1), tmp_path / "x.pt")

    def chosen(seed: int) -> list[float]:
        found = read_samples(tmp_path / "x.pt", Choice(num_samples=8, seed=seed))
        assert found.num_found == 20
        return found.values.flatten().tolist()

    assert len(set(chosen(0))) == 8
    assert chosen(0) == chosen(0) != chosen(1)


def test_the_default_number_of_large_samples_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speedit_plugins.spectrum_samples.MAX_VALUES", 4000)
    np.save(tmp_path / "x.npy", normal(500, 100).numpy())
    # Batches of 32 samples have 3,200 values each.
    assert len(read_samples(tmp_path / "x.npy", Choice()).values) == 64
    assert len(read_samples(tmp_path / "x.npy", Choice(num_samples=400)).values) == 400


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_the_array_of_a_file_is_found(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"latents{suffix}"
    arrays = {"latents": normal(30, 4), "labels": torch.arange(30)}
    if suffix == ".npz":
        np.savez(path, **{name: array.numpy() for name, array in arrays.items()}, names=np.array(["a"] * 30))
    else:
        (torch.save if suffix == ".pt" else save_file)(arrays, path)
    order = Choice().indices(30)
    assert torch.equal(read_samples(path, Choice()).values, arrays["latents"][order])
    assert torch.equal(read_samples(path, Choice(), key="latents").values, arrays["latents"][order])


def test_latents_are_those_of_encoding_by_hand(tmp_path: Path, autoencoder: Path) -> None:
    folder = draw_pictures(tmp_path / "images")
    encoder = Autoencoder(str(autoencoder))
    found = read_samples(folder, Choice(seed=3), image_size=8, encoder=encoder)
    model = AutoencoderKL.from_pretrained(autoencoder, low_cpu_mem_usage=False)
    images = []
    for row, latent in zip(Choice(seed=3).indices(NUM_IMAGES), found.values, strict=True):
        pixels = np.asarray(center_crop(Image.open(folder / f"{row:02d}.png"), 8, 8), dtype=np.float32)
        images.append(torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1))
        with torch.no_grad():
            posterior = model.encode(images[-1][None]).latent_dist
        noise = torch.Generator().manual_seed(stream_seed(3, NOISE_STREAM, row))
        sample = posterior.mean + posterior.std * torch.randn(1, 2, 4, 4, generator=noise)
        # A convolution's last bits may depend on the other images of the batch.
        assert_close(latent, (sample[0] - 0.1) * 0.3, atol=1e-5, rtol=1e-5)
    assert found.what == "latents"
    # A file of the same images, in the order of the folder.
    order = torch.tensor(Choice(seed=3).indices(NUM_IMAGES)).argsort()
    np.save(tmp_path / "images.npy", torch.stack(images)[order].numpy())
    again = read_samples(tmp_path / "images.npy", Choice(seed=3), encoder=encoder)
    assert_close(again.values, found.values, atol=1e-5, rtol=1e-5)


def test_a_cache_has_the_latents_of_its_images(tmp_path: Path, autoencoder: Path) -> None:
    folder = draw_pictures(tmp_path / "images")
    content = {
        "experiment_dir": str(tmp_path / "run"),
        "num_classes": 0,
        "image_size": 8,
        "model": {"type": "DiT", "patch_size": 2, "hidden_size": 8, "depth": 1, "num_heads": 2},
        "encoder": {"type": "AutoencoderKL", "path": str(autoencoder)},
        "data": {"dataset": {"type": "ImageFolder", "root": str(folder)}, "batch_size": 4},
        "max_training_steps": 1,
    }
    (tmp_path / "experiment.yaml").write_text(json.dumps(content))
    assert cache_latents(["-c", str(tmp_path / "experiment.yaml"), "--out", str(tmp_path / "cache")]) == 0
    cached = read_samples(tmp_path / "cache", Choice())
    encoded = read_samples(folder, Choice(), image_size=8, encoder=Autoencoder(str(autoencoder)))
    assert_close(cached.values, encoded.values, atol=1e-5, rtol=1e-5)


def shifted(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Source: Esser et al. 2024, arXiv:2403.03206, equation 23."""
    return shift * t / (1 + (shift - 1) * t)


@pytest.mark.parametrize("std", [0.2, 1.0, 4.0])
def test_laws_with_what_is_printed_have_their_median_at_the_place_named(std: float) -> None:
    found = measure(normal(4000, 3, std=std), num_found=4000, what="latents")
    # Half of the centre of equal variances, and spectral_flow's offset of 1.
    assert found.peak == pytest.approx(-math.log(std) + 1.0, abs=0.026)
    place = torch.tensor(flow_time(found.peak), dtype=torch.float64)
    assert_close(shifted(torch.tensor(0.5, dtype=torch.float64), found.shift), place)
    schedule = NoiseSchedule.rectified_flow(10_000)
    parts = {"density": {"type": "logit_normal", "mean": found.logit_mean}, "weighting": "constant"}
    below = build_policy(parts, schedule).density[schedule.sigma < place].sum()
    # The place may be anywhere in a timestep, and at most 0.0002 of the draws are in one near the median of
    # a law that is so wide: its greatest density is 0.4 / (t (1 - t)).
    assert float(below) == pytest.approx(0.5, abs=0.4e-4 / float(place * (1 - place)))


def test_the_scripts_of_diffusers_draw_around_the_place_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "latents.npy", normal(1000, 3, std=3.0).numpy())
    (found,) = measured(tmp_path / "latents.npy")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "--logit_mean" in line)
    logit_mean = float(line.split("--logit_mean ")[1].split()[0])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.manual_seed(0)
    # As in train_dreambooth_lora_sd3.py: an index into sigmas that fall.
    u = compute_density_for_timestep_sampling("logit_normal", 100_000, logit_mean + math.log(3), 1.0)
    sigma = scheduler.sigmas[(u * scheduler.config.num_train_timesteps).long()].median()
    # 4 standard errors of the median, 5 / sqrt(100,000), half a unit of the last digit, and a timestep.
    slack = 0.016 + 0.005 + 0.001 / float(sigma * (1 - sigma))
    assert float(sigma.logit()) == pytest.approx(found["logit_normal"]["mean"], abs=slack)


@pytest.mark.parametrize("name", ["spectral", "spectral_fast", "spectral_flow"])
@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), NoiseSchedule.rectified_flow()], ids=str)
def test_draws_are_where_the_report_says(name: str, schedule: NoiseSchedule) -> None:
    found = draws_of(name, -1.0, schedule)
    assert found is not None
    generator = torch.Generator().manual_seed(0)
    index = build_policy({"type": name, "mean": -1.0}, schedule).draw(20_000, generator=generator).index
    times = schedule.timesteps if schedule.is_variance_preserving else schedule.sigma
    for place, share in ((found.low, 0.05), (found.median, 0.5), (found.high, 0.95)):
        drawn = times[index].double()
        # The draws are stratified: they follow the density to 1 / 20,000.
        assert float((drawn < place).double().mean()) <= share + 1e-4
        assert float((drawn <= place).double().mean()) >= share - 1e-4


def test_a_centre_outside_of_a_schedule_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Its centre is at log-SNR 11.5, and the linear schedule ends at 9.2.
    np.save(tmp_path / "faint.npy", normal(1000, 3, std=math.exp(-11.5 / 2)).numpy())
    assert main([str(tmp_path / "faint.npy")]) == 0
    out = capsys.readouterr().out
    (row,) = (line for line in out.splitlines() if line.startswith("{type: spectral,"))
    assert "outside of the schedule" in row
    assert "(t 0.00)" in out


def test_the_report_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "latents.npy", normal(2000, 4, 2, 2, std=2.0).numpy())
    (found,) = measured(tmp_path / "latents.npy")
    out = capsys.readouterr().out
    centre, shift = f"{found['centre']:.2f}", f"{found['logit_normal']['shift']:.2f}"
    for text in (
        f"{tmp_path / 'latents.npy'}: 1,024 of 2,000 samples of shape 4 x 2 x 2, mean ",
        f"centre  log-SNR {centre} (t 0.67): half of the variance can be told",
        *(f"{{type: {name}, mean: {centre}}}  " for name in found["policies"]),
        f"--timestep_sampling shift --discrete_flow_shift {shift}\n",
        f"or shift {shift}\n",
    ):
        assert text in out
    assert "note:" not in out
    assert all(len(line) <= 120 for line in out.splitlines()[1:])


def test_latents_that_were_not_scaled_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "latents.npy", normal(100, 4, std=5.0).numpy())
    assert main([str(tmp_path / "latents.npy")]) == 0
    assert "note: models see data with a standard deviation near 1." in capsys.readouterr().out


def test_a_quartile_that_samples_do_not_tell_is_left_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # White noise with 1,024 values: 300 samples tell the middle, but not where three quarters are explained.
    np.save(tmp_path / "noise.npy", normal(300, 1024).numpy())
    (found,) = measured(tmp_path / "noise.npy")
    assert found["three_quarters"] is None
    # Four times the error of such a set in tests/policies/test_spectrum.py.
    assert found["centre"] == pytest.approx(0.0, abs=0.2)
    assert "three quarters at a log-SNR that so few samples do not tell" in capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The line on stderr of a command that ends with 2 and prints nothing."""
    assert main([*map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("speedit-spectrum: error: ").rstrip()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (normal(100, 1024), r"x.npy: 100 samples are too few to tell where 50% of .* wanted more samples"),
        (normal(1, 4), r"x.npy: .* at least two samples \(N, ...\), got shape \(1, 4\)"),
        (normal(9), r"wanted samples \(N, ...\), got shape \(9,\) in .*x.npy"),
        (torch.full((9, 4), math.nan), "x.npy: .* finite samples, got inf or NaN"),
        (torch.ones(9, 4), "x.npy: .* samples that differ, got 9 equal samples"),
        (
            torch.zeros(9, 4, dtype=torch.uint8),
            r"floating-point samples, .* got torch.uint8 in .*x / 127.5 - 1",
        ),
    ],
)
def test_arrays_without_a_centre_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], array: torch.Tensor, message: str
) -> None:
    np.save(tmp_path / "x.npy", array.numpy())
    assert_matches(message, refusal(capsys, tmp_path / "x.npy"))


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


def test_sources_that_are_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "two.npz", a=normal(9, 4).numpy(), b=normal(9, 4).numpy())
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    (tmp_path / "latents.txt").write_text("1 2 3")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["nowhere"], r"wanted a folder of images, .* got no .*nowhere"),
        (["empty"], "found no images below .*empty"),
        (["latents.txt"], r"wanted a file that ends in .npy, .*, got .*latents.txt"),
        (["broken.npz"], r"cannot read .*broken.npz: "),
        (["two.npz"], r"wanted --key NAME for one of its arrays in .*two.npz, got a \(9, 4\), b \(9, 4\)"),
        (["two.npz", "--key", "c"], r"wanted an array 'c' in .*two.npz, got a \(9, 4\), b \(9, 4\)"),
        (["two.npz", "--key", "a", "--image-size", "8"], "--image-size .* no effect on the file .*two.npz"),
        (["empty", "--key", "a"], "--key .* no effect on the folder .*empty"),
        (["two.npz", "--key", "a", "--grey"], "--grey reads images .* no effect on the file .*two.npz"),
        (["two.npz", "--samples", "1"], "argument --samples: wanted an int >= 2, got 1; see .*--help"),
        (["two.npz", "--encoder", str(tmp_path / "empty")], "no AutoencoderKL .* at '.*empty'"),
    ):
        assert_matches(message, refusal(capsys, tmp_path / arguments[0], *arguments[1:]))


def test_images_of_different_sizes_need_a_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = draw_pictures(tmp_path / "images")
    Image.new("RGB", (16, 12)).save(folder / "wide.png")
    error = refusal(capsys, folder)
    assert_matches("wanted images of one size, or --image-size N to crop them, got .* and .*", error)
    assert "16 x 16 in" in error
    assert "16 x 12 in" in error
    assert main([str(folder), "--image-size", "8"]) == 0


def test_an_encoder_needs_images(
    tmp_path: Path, autoencoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "latents.npy", 0.1 * normal(9, 4, 8, 8).clamp(-9, 9).numpy())
    np.save(tmp_path / "loud.npy", normal(9, 3, 8, 8, std=9.0).numpy())
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("index.json", "shard_00000.safetensors"):
        (cache / name).touch()
    for source, message in (
        ("latents.npy", r"got images of shape \(9, 4, 8, 8\), wanted \(B, 3, H, W\)"),
        ("loud.npy", r"--encoder needs images in \[-1, 1\], got .* in .*loud.npy"),
        ("cache", "--encoder needs images, got cached latents in .*cache"),
    ):
        assert_matches(message, refusal(capsys, tmp_path / source, "--encoder", autoencoder))
    assert_matches("--grey .* no effect on the cached latents", refusal(capsys, cache, "--grey"))


def test_a_damaged_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = draw_pictures(tmp_path / "images")
    (folder / "07.png").write_bytes(b"no image")
    assert_matches("corrupt image .*07.png", refusal(capsys, folder))


# The packages of the trainer's extra.
WITHOUT_TRAINER = """
import sys
names = "diffusers transformers einops omegaconf safetensors PIL sklearn tqdm tensorboard matplotlib"
sys.modules.update(dict.fromkeys(names.split()))
from speedit_plugins.spectrum_command import main
for source in sys.argv[1:]:
    print(main([source]))
"""


def test_a_file_needs_torch_and_numpy_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "latents.npz", normal(100, 4).numpy())
    torch.save(normal(100, 4), tmp_path / "latents.pt")
    draw_pictures(tmp_path / "images")
    sources = [str(tmp_path / name) for name in ("latents.npz", "latents.pt", "images")]
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRAINER, *sources],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    codes = [line for line in run.stdout.splitlines() if line in ("0", "1", "2")]
    assert codes == ["0", "0", "2"]
    assert "pip install 'speedit-plugins[trainer]'" in run.stderr
