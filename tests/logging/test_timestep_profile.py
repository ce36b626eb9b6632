import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from runs import arguments, small_config, small_trainer
from torch import Tensor, nn
from torch.testing import assert_close

from speedit_plugins.cli import main
from speedit_plugins.policies.policy import TimestepDraw
from speedit_plugins.trainer.inputs import ModelInputs
from speedit_plugins.trainer.logging.timestep_profile import (
    NUM_RANGES,
    TimestepProfiler,
    range_of,
    timestep_ranges,
)
from speedit_plugins.trainer.logging.tracking import Tracker, read_metrics
from speedit_plugins.trainer.results import save_config
from speedit_plugins.trainer.training.interrupt import StopRequest
from speedit_plugins.trainer.training.trainer import Trainer, TrainingParts

tool: ModuleType = importlib.import_module("timestep_profile")


def fit(folder: Path, **changes: Any) -> Trainer:
    trainer = small_trainer(folder, max_training_steps=20, **changes)
    with Tracker(folder, total_steps=20, start_step=0) as tracker:
        trainer.fit(tracker, StopRequest())
    return trainer


def four_digits() -> ModelInputs:
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(4, 1, 8, 8, generator=generator) for _ in range(2))
    return ModelInputs(latents, noise, torch.tensor([1, 2, 3, 4]))


def profiler_of(trainer: Trainer, inputs: ModelInputs) -> TimestepProfiler:
    return TimestepProfiler(
        trainer.model, trainer.objective.process, trainer.policy, inputs, precision=trainer.config.precision
    )


def by_hand(trainer: Trainer, inputs: ModelInputs, index: Tensor) -> tuple[float, float, float]:
    """Loss, mse and gradient norm at the given timesteps, computed from the model itself."""
    weight = trainer.policy.weight[index].float()
    draw = TimestepDraw(index, (index + 0.5) / 1000, weight, trainer.policy.scope)
    noised = trainer.objective.process.corrupt(inputs.latents, draw, noise=inputs.noise)
    prediction = trainer.model(noised.x_t, noised.timestep, inputs.condition)
    terms = trainer.objective.process.loss(prediction, noised, draw)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(terms.loss.mean(), parameters, allow_unused=True)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))
    return float(terms.loss.detach().mean()), float(terms.mse.detach().mean()), norm


@pytest.mark.parametrize("num_timesteps", [7, 20, 250, 1000])
def test_the_ranges_part_the_timesteps_as_range_of_does(num_timesteps: int) -> None:
    found = range_of(torch.arange(num_timesteps), num_timesteps).tolist()
    ranges = timestep_ranges(num_timesteps)
    assert len(ranges) == NUM_RANGES
    expected = [number for number, (first, end) in enumerate(ranges) for _ in range(first, end)]
    assert found == expected


@pytest.mark.parametrize("is_checkpointed", ["false", "true"])
def test_a_profile_is_loss_and_gradient_of_the_given_weights(tmp_path: Path, is_checkpointed: str) -> None:
    trainer = small_trainer(
        tmp_path, model__class_dropout_prob=0.0, model__gradient_checkpointing=is_checkpointed
    )
    # The final layer starts at zero, and then most gradients vanish.
    generator = torch.Generator().manual_seed(0)
    nn.init.normal_(trainer.model.final_layer.linear.weight, std=0.1, generator=generator)
    inputs = four_digits()
    own = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    other = {name: 1.1 * value for name, value in trainer.weights().items()}
    profile = profiler_of(trainer, inputs).measure(other, trainer.engine.untrained())
    # The model's weights and gradients are unchanged.
    assert_close(trainer.model.state_dict(), own, rtol=0, atol=0)
    assert all(p.grad is None for p in trainer.model.parameters())

    trainer.model.load_state_dict(other, strict=False)
    # Four samples at equal distances in fifty timesteps: 6.25, 18.75, 31.25, 43.75.
    for number in (0, 9, 19):
        loss, mse, norm = by_hand(trainer, inputs, 50 * number + torch.tensor([6, 18, 31, 43]))
        # The float32 operations are the same, except for the order of the norm's sum.
        found = (profile.loss[number], profile.mse[number], profile.grad_norm[number])
        assert_close(found, (loss, mse, norm), rtol=1e-5, atol=0)


def test_under_bf16_the_forward_pass_is_rounded_and_the_rest_is_not(tmp_path: Path) -> None:
    profiles = []
    for precision in ("fp32", "bf16"):
        trainer = small_trainer(tmp_path, precision=precision, model__class_dropout_prob=0.0)
        inputs = four_digits()
        profiles.append(profiler_of(trainer, inputs).measure(trainer.weights(), trainer.engine.untrained()))
    full, half = profiles
    assert full.grad_norm != half.grad_norm
    # bf16 keeps 8 bits, 0.4 %, and the errors of two blocks add up.
    assert_close(half.grad_norm, full.grad_norm, rtol=0.05, atol=0)


def test_a_range_without_timesteps_has_no_profile(tmp_path: Path) -> None:
    options = {"diffusion__noise_schedule": "cosine", "diffusion__diffusion_steps": 10}
    trainer = small_trainer(tmp_path, diffusion__policy="{type: uniform}", **options)
    profile = profiler_of(trainer, four_digits()).measure(trainer.weights(), trainer.engine.untrained())
    for values in (profile.loss, profile.mse, profile.grad_norm):
        assert [value is None for value in values] == [False, True] * 10


def test_label_dropout_and_the_mode_of_the_model_stay_as_they_were(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, model__class_dropout_prob=0.5)
    profiler = profiler_of(trainer, four_digits())
    trainer.model.eval()
    before = torch.get_rng_state()
    first, second = (profiler.measure(trainer.weights(), trainer.engine.untrained()) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)
    assert not trainer.model.training


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16", "optimizer__grad_accumulation": 2, "optimizer__max_grad_norm": 1.0},
        {"diffusion__policy": "{type: loss_second_moment, history: 1}", "diffusion__diffusion_steps": 25},
    ],
    ids=["plain", "bf16-accumulation-clipping", "learning"],
)
def test_profiles_leave_the_training_as_it_is(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = fit(tmp_path / "plain", **changes)
    profiled = fit(tmp_path / "profiled", profile_every=5, **changes)
    assert_close(profiled.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)
    for row, wanted in zip(read_metrics(profiled.folder), read_metrics(plain.folder), strict=True):
        same = [key for key in wanted if key.startswith(("loss", "mse", "uniform", "vb", "grad"))]
        assert {key: row[key] for key in same} == {key: wanted[key] for key in same}
        assert len(row["profile_grad_norm"]) == NUM_RANGES


def test_a_profile_stands_in_the_first_line_from_each_multiple_on(tmp_path: Path) -> None:
    fit(tmp_path, profile_every=7)
    found = {row["step"]: "profile_loss" in row for row in read_metrics(tmp_path)}
    # Profiles are measured at steps 7 and 14. A line is logged every five steps.
    assert found == {5: False, 10: True, 15: True, 20: False}


def test_profiles_need_somebody_to_measure_them(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    parts = TrainingParts(
        trainer.engine, trainer.inputs, trainer.objective, trainer.policy, trainer.loader, trainer.runtime
    )
    with pytest.raises(ValueError, match="profile_every: 5 needs a profiler, got None"):
        Trainer(parts, small_config(tmp_path, profile_every=5))


def test_the_tool_measures_a_checkpoint_as_the_training_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = arguments(tmp_path, profile_every=10, plugin="ddp")
    assert main(["-c", "configs/image/digits/speedit.yaml", "-p", "train", *options]) == 0
    logged = read_metrics(tmp_path)[-1]
    capsys.readouterr()
    assert tool.main([str(tmp_path)]) == 0
    assert "model weights at step 20, 16 samples" in capsys.readouterr().out
    report: Mapping[str, Any] = json.loads((tmp_path / "timestep_profile.json").read_text())
    for key in ("loss", "mse", "grad_norm"):
        assert report[key] == logged[f"profile_{key}"]
    assert report["ranges"] == [list(pair) for pair in timestep_ranges(1000)]
    assert (tmp_path / "timestep_profile.png").read_bytes().startswith(b"\x89PNG")

    source = str(tmp_path / "checkpoints" / "step_0000020")
    assert tool.main([str(tmp_path), "--weights", "ema", "--checkpoint", source, "data.batch_size=8"]) == 0
    averaged = json.loads((tmp_path / "timestep_profile.json").read_text())
    assert (averaged["weights"], averaged["num_samples"]) == ("ema", 8)
    assert averaged["mse"] != report["mse"]


def test_the_tool_says_what_is_missing_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([str(tmp_path)]) == 2
    assert f"{tmp_path} has no training run: there is no config_train.yaml" in capsys.readouterr().err
    save_config(small_config(tmp_path), "train")
    assert tool.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path} has no checkpoint yet" in error
    assert error.count("\n") == 1
    for override, own in (("compile=true", "compile=false"), ("sample_every=5", "sample_every=0")):
        assert tool.main([str(tmp_path), override]) == 2
        assert f"has no effect: a profile is always measured with {own}" in capsys.readouterr().err
