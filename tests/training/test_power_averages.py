"""Power averages: their profile, and averages of any length made after the training."""

import math
from pathlib import Path
from typing import Any

import posthoc_ema
import pytest
import torch
from runs import small_config, small_trainer
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.trainer.logging.tracking import SilentTracker
from speedit_plugins.trainer.parallel.master_weights import Slice
from speedit_plugins.trainer.sampling.generator import load_generator
from speedit_plugins.trainer.training.averages.power_averages import (
    PowerAverages,
    Profile,
    coefficients,
    gamma_of,
    inner_product,
    kept_share,
    sigma_rel_of,
)
from speedit_plugins.trainer.training.averages.snapshots import read_snapshots
from speedit_plugins.trainer.training.interrupt import StopRequest


def run(folder: Path, **options: Any) -> None:
    small_trainer(folder, **options).fit(SilentTracker(), StopRequest())


def tracked(path: Tensor, sigma_rel: float) -> list[Tensor]:
    """The average of length `sigma_rel` after each step of a path (steps, weights), kept in float64."""
    average, found, gamma = path[0].clone(), [], gamma_of(sigma_rel)
    for update, weights in enumerate(path, start=1):
        average = torch.lerp(average, weights, 1 - kept_share(gamma, update))
        found.append(average)
    return found


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_an_update_weighs_each_step_by_the_integral_of_the_profile(sigma_rel: float) -> None:
    current = {"weight": Slice(0, torch.zeros(8))}
    averages = PowerAverages(current, sigma_rels=[sigma_rel])
    # Step s is the unit vector s, so that the average is the list of its weights.
    for step in range(8):
        current["weight"].values.copy_(torch.eye(8)[step])
        averages.update()
    edges = (torch.arange(9, dtype=torch.float64) / 8) ** (gamma_of(sigma_rel) + 1)
    assert_close(averages.slices["weight"].values.double(), edges.diff(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 1 / math.sqrt(12)])
def test_sigma_rel_is_the_standard_deviation_of_the_profile(sigma_rel: float) -> None:
    gamma = gamma_of(sigma_rel)
    # Moments of (gamma + 1) s^gamma on [0, 1] by the midpoint rule.
    s = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = (gamma + 1) * s**gamma / 200_000
    mean = (density * s).sum()
    assert_close(float((density * (s - mean) ** 2).sum().sqrt()), sigma_rel, rtol=1e-6, atol=0)
    assert_close(sigma_rel_of(gamma), sigma_rel, rtol=1e-12, atol=0)


def test_the_lengths_of_edm2_have_its_exponents() -> None:
    # The paper names gamma = 16.97 and 6.94 for 5 % and 10 %.
    assert_close([gamma_of(0.05), gamma_of(0.1)], [16.97, 6.94], rtol=0, atol=5e-3)


def test_a_length_beyond_the_uniform_average_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sigma_rel needs to be in \(0, 0\.2887\], got 0\.3"):
        gamma_of(0.3)


def test_the_inner_product_is_the_integral_of_two_profiles() -> None:
    one, other = Profile(0.1, 40), Profile(0.2, 100)
    s = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 10_000
    first, second = ((p.gamma + 1) * s**p.gamma / p.updates ** (p.gamma + 1) for p in (one, other))
    found = float((first * second).sum() / 10_000)
    assert_close([inner_product(one, other), inner_product(other, one)], [found, found], rtol=1e-6, atol=0)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.13, 0.2])
def test_a_length_made_after_the_training_is_the_one_tracked_in_it(sigma_rel: float) -> None:
    steps, every = 2000, 100
    generator = torch.Generator().manual_seed(0)
    drift, jitter = torch.randn(2, steps, 64, generator=generator, dtype=torch.float64)
    # Weights that wander by 0.45 in all, and jump by 0.1 from step to step.
    path = (drift * 0.01).cumsum(0) + 0.1 * jitter
    averages = {length: tracked(path, length) for length in (0.05, 0.1)}
    places = [(step, length) for step in range(every, steps + 1, every) for length in averages]
    shares, distance = coefficients(
        [Profile(length, step) for step, length in places], Profile(sigma_rel, steps)
    )
    # Kept as float16, as in the files.
    made = sum(
        share * averages[length][step - 1].half().double()
        for share, (step, length) in zip(shares, places, strict=True)
    )
    direct = tracked(path, sigma_rel)[-1]
    # Between the kept lengths the profile is right within 0.4 %, at the far ends within 3 %.
    assert distance < (4e-3 if 0.05 < sigma_rel < 0.15 else 3e-2)
    apart = (made - direct).norm()
    assert apart < 0.002 * direct.norm()
    # The nearest kept average is at least ten times farther.
    nearest = min((averages[length][-1] - direct).norm() for length in averages)
    assert apart < 0.1 * nearest


def test_a_kept_length_is_made_of_itself() -> None:
    kept = [Profile(length, step) for step in (10, 20, 30) for length in (0.05, 0.1)]
    shares, distance = coefficients(kept, Profile(0.1, 20))
    assert distance < 1e-6
    assert_close(shares, [float(profile == Profile(0.1, 20)) for profile in kept], rtol=0, atol=1e-5)


def test_the_tool_makes_a_length_that_the_run_tracked_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    options = {"optimizer__warmup_steps": 0, "max_training_steps": 60, "keep_last": 1, "ckpt_every": 20}
    ema = "{type: power, sigma_rel: [0.05, 0.1], snapshot_every: 3}"
    run(folder, ema=ema, **options)
    run(tmp_path / "twin", ema="{type: power, sigma_rel: [0.07]}", **options)
    # Old checkpoints go, snapshots stay.
    assert len(list((folder / "checkpoints").iterdir())) == 1
    assert [snapshot.step for snapshot in read_snapshots(folder)] == list(range(3, 61, 3))

    assert posthoc_ema.main([str(folder), "--sigma-rel", "0.07"]) == 0
    path = folder / "posthoc" / "step_0000060_0.07.safetensors"
    assert f"{path}: sigma_rel 0.07, profile within" in capsys.readouterr().out
    made, direct, last = (
        load_file(file)
        for file in (
            path,
            tmp_path / "twin" / "checkpoints" / "step_0000060" / "ema.safetensors",
            folder / "checkpoints" / "step_0000060" / "model.safetensors",
        )
    )
    assert made.keys() == direct.keys()
    apart, moved = (
        math.sqrt(sum(float((each[name] - direct[name]).square().sum()) for name in direct))
        for each in (made, last)
    )
    # The weights are 1 % away from their average, and float16 rounds by 2^-11 of them.
    assert apart < 0.05 * moved


def test_adapters_of_any_length_are_sampled(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    whole = small_trainer(tmp_path / "base").save()
    options = {"pretrained": whole, "lora__rank": 2, "max_training_steps": 2}
    run(tmp_path / "run", ema="{type: power, snapshot_every: 1}", **options)
    path, _ = posthoc_ema.reconstruct(tmp_path / "run", 0.1)
    config = small_config(tmp_path / "run", "sample", ckpt_path=path, pretrained=whole, lora__rank=2)
    made = load_file(path)
    loaded = load_generator(config)[0].model.state_dict()
    assert_close({name: loaded[name] for name in made}, made, rtol=0, atol=0)


def test_the_tool_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        assert posthoc_ema.main([str(tmp_path), "--sigma-rel", *arguments]) == 2
        return capsys.readouterr().err

    assert "has no snapshots; wanted a training with ema.type=power and ema.snapshot_every" in said("0.1")
    run(tmp_path, max_training_steps=2, ema="{type: power, snapshot_every: 1}")
    assert "no snapshot of step 7; known: 1, 2" in said("0.1", "--step", "7")
    assert "sigma_rel needs to be in (0, 0.2887], got 0.5" in said("0.5")
    newest = tmp_path / "snapshots" / "step_0000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:40])
    assert f"snapshot {newest} is damaged" in said("0.1")
    with pytest.raises(ValueError, match=r"would mix its snapshots with .*step_0000001.*; move or delete"):
        run(tmp_path, max_training_steps=2, ema="{type: power, snapshot_every: 1}")
