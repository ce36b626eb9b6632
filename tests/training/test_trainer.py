import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from devices import EVERY_DEVICE, in_one_order
from runs import small_config, small_trainer
from torch import nn
from torch.testing import assert_close

from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.checkpoints import CheckpointError
from speedit_plugins.trainer.config.sections import OptimizerConfig
from speedit_plugins.trainer.data.loader import NOISE_STREAM, TIMESTEP_STREAM, stream_seed
from speedit_plugins.trainer.logging.tracking import Tracker, read_metrics
from speedit_plugins.trainer.training.interrupt import StopRequest
from speedit_plugins.trainer.training.learning_rate import learning_rate
from speedit_plugins.trainer.training.trainer import Trainer, TrainingParts


def fit(trainer: Trainer) -> None:
    with Tracker(
        trainer.folder,
        total_steps=trainer.config.max_training_steps,
        start_step=trainer.step,
    ) as tracker:
        trainer.fit(tracker, StopRequest())


def everything(trainer: Trainer) -> dict[str, Any]:
    """Everything that decides the next step."""
    position = trainer.loader.state_dict()
    return {
        "model": trainer.model.state_dict(),
        "ema": trainer.averaged_weights(),
        "ema_updates": trainer.ema.num_updates,
        "optimizer": trainer.engine.optimizer.state_dict(),
        "scaler": trainer.engine.scaler_state(),
        # The identity of the data has text; tests/data has its own tests.
        "loader": {key: value for key, value in position.items() if key != "identity"},
        "policy": trainer.policy.state_dict()["density"],
        "weight": trainer.policy.weight,
        "next_batch": next(trainer.loader),
        "step": trainer.step,
    }


@EVERY_DEVICE
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16", "optimizer__grad_accumulation": 2, "optimizer__max_grad_norm": 1.0},
        {"precision": "fp16"},
        {"diffusion__policy": "{type: clts, curriculum_steps: 15}"},
        {"diffusion__policy": "{type: loss_second_moment, history: 1}", "diffusion__diffusion_steps": 25},
        {"data__num_workers": 2, "diffusion__policy": "{type: speed, stratified: true}"},
        {"diffusion__policy": "{type: speed, normalize: loss}"},
    ],
    ids=[
        "speedit",
        "bf16-accumulation-clipping",
        "fp16",
        "curriculum",
        "learning",
        "workers-stratified",
        "normalised-loss",
    ],
)
def test_twenty_steps_equal_ten_and_a_resumed_ten_bit_for_bit(
    tmp_path: Path, changes: dict[str, Any], device: str
) -> None:
    options = {"device": device, **changes}
    with in_one_order(device):
        whole = small_trainer(tmp_path / "whole", max_training_steps=20, **options)
        fit(whole)
        expected = everything(whole)

        fit(small_trainer(tmp_path / "parts", max_training_steps=10, **options))
        resumed = small_trainer(tmp_path / "parts", max_training_steps=20, **options)
        resumed.restore(tmp_path / "parts" / "checkpoints" / "step_0000010")
        assert resumed.step == 10
        fit(resumed)
        assert_close(everything(resumed), expected, rtol=0, atol=0)


def test_one_step_is_adamw_on_the_weighted_loss(tmp_path: Path) -> None:
    options = {"optimizer__warmup_steps": 0, "optimizer__lr": 1e-3, "model__class_dropout_prob": 0.0}
    trainer, twin = small_trainer(tmp_path, **options), small_trainer(tmp_path, **options)
    trainer.optimizer_step()

    batch = next(twin.loader)
    seed = stream_seed(twin.config.seed, TIMESTEP_STREAM, 0)
    draw = twin.policy.draw(16, generator=torch.Generator().manual_seed(seed))
    noise = torch.stack(
        [
            torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed))
            for seed in (stream_seed(twin.config.seed, NOISE_STREAM, 0, i) for i in range(16))
        ]
    )
    alpha_bar = twin.objective.process.schedule.alphas_cumprod[draw.index].float().reshape(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * batch["image"] + (1 - alpha_bar).sqrt() * noise
    prediction = twin.model.train()(x_t, draw.index, batch["label"])
    mse = ((prediction[:, :1] - noise) ** 2).mean(dim=(1, 2, 3))
    gradient = torch.autograd.grad((draw.weight * mse).mean(), twin.model.final_layer.linear.weight)[0][:1]
    # AdamW's first step is lr * sign(gradient), up to epsilon. Rows 0, 2, ... are the mean channels.
    moved = trainer.model.final_layer.linear.weight[:1]
    large = gradient.abs() > 1e-4
    assert large.any()
    assert_close(moved[large], -1e-3 * gradient.sign()[large], rtol=1e-3, atol=0)


def test_the_rate_warms_up_linearly_and_follows_the_schedule() -> None:
    options = OptimizerConfig(lr=0.004, warmup_steps=4)
    rates = [learning_rate(options, step, 10) for step in range(6)]
    assert_close(rates, [0.001, 0.002, 0.003, 0.004, 0.004, 0.004])
    cosine = replace(options, schedule="cosine", min_lr=0.002)
    # Half way between warm-up and end, a cosine has the mean of its end values.
    assert_close([learning_rate(cosine, step, 10) for step in (3, 4, 7, 10)], [0.004, 0.004, 0.003, 0.002])


def test_the_optimizer_steps_at_that_rate(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, optimizer__warmup_steps=4, optimizer__lr=0.004)
    rates = []
    for _ in range(5):
        trainer.optimizer_step()
        rates.append(trainer.engine.optimizer.param_groups[0]["lr"])
    assert_close(rates, [0.001, 0.002, 0.003, 0.004, 0.004])


@pytest.mark.parametrize("normalize", ["false", "loss"])
def test_accumulated_batches_equal_one_batch_of_all(tmp_path: Path, normalize: str) -> None:
    policy = {"diffusion__policy": f"{{type: speedit, normalize: {normalize}}}"}
    options = {"model__class_dropout_prob": 0.0, "optimizer__lr": 1e-3, **policy}
    one = small_trainer(tmp_path, data__batch_size=32, **options)
    two = small_trainer(tmp_path, data__batch_size=16, optimizer__grad_accumulation=2, **options)
    for trainer in (one, two):
        for _ in range(3):
            trainer.optimizer_step()
    names = [name for name, _ in one.model.named_parameters() if "qkv.bias" not in name]
    found, expected = two.model.state_dict(), one.model.state_dict()
    # Images, timesteps and noise are the same; 32 float32 terms are summed in two orders. The gradient of the
    # keys' bias is zero in exact arithmetic, and AdamW blows up its rounding error, so it is left out.
    assert_close([found[n] for n in names], [expected[n] for n in names], rtol=0, atol=1e-6)


def test_clipping_bounds_the_gradient_norm_and_reports_it_before(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, optimizer__max_grad_norm=1e-3)
    seen: list[float] = []
    trainer.engine.optimizer.register_step_pre_hook(
        lambda optimizer, a, k: seen.append(
            float(nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None]))
        )
    )
    before = trainer.optimizer_step()[0].grad_norm
    assert before > 1e-3
    # clip_grad_norm_ divides by norm + 1e-6.
    assert_close(seen[0], 1e-3, rtol=1e-2, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_diverged_run_stops_saves_nothing_and_names_the_last_good_checkpoint(
    tmp_path: Path, precision: str
) -> None:
    trainer = small_trainer(
        tmp_path, max_training_steps=20, log_every=1, max_skipped_steps=2, precision=precision
    )
    good = trainer.save()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    encode = trainer.inputs.encoder.encode
    trainer.inputs.encoder.encode = lambda images, generators: encode(images, generators) * math.inf  # type: ignore[method-assign]  # for the test
    with pytest.raises(
        ValueError,
        match=r"training diverged: 2 steps in a row up to 2 were skipped, the last because a loss on rank 0"
        rf" is not finite; the last good checkpoint is {good}",
    ):
        fit(trainer)
    assert_close(trainer.model.state_dict(), before, rtol=0, atol=0)
    assert trainer.ema.num_updates == 0
    assert checkpoints.newest(tmp_path / "checkpoints") == good
    # The metrics can be read, and have no row for a loss that was not measured.
    assert [row["skipped_steps"] for row in read_metrics(tmp_path)] == [1]


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    good = trainer.save()
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)
    nn.init.constant_(trainer.model.final_layer.linear.bias, math.nan)
    trainer.step = 4
    with pytest.raises(ValueError, match=f"a weight is not finite at step 4: not saved; .* is {good}"):
        trainer.save()
    assert checkpoints.newest(tmp_path / "checkpoints") == good


def test_a_checkpoint_of_another_run_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = small_trainer(tmp_path).save()
    with pytest.raises(
        CheckpointError,
        match=r"is of another run: .*has shape .*, wanted",
    ):
        small_trainer(tmp_path, model__class_dropout_prob=0.0).restore(path)
    # The weights have the same shapes with any number of heads.
    with pytest.raises(CheckpointError, match=r"is of another run: model\.num_heads was 2, got 4"):
        small_trainer(tmp_path, model__num_heads=4).restore(path)
    with pytest.raises(CheckpointError, match=r"policy was \{'type': 'speedit'\}, got \{'type': 'speed'\}"):
        small_trainer(tmp_path, diffusion__policy="{type: speed}").restore(path)


def test_a_checkpoint_from_before_a_key_existed_has_its_default(tmp_path: Path) -> None:
    path = small_trainer(tmp_path).save()
    plain = yaml.safe_load((path / "config.yaml").read_text())
    for key in (
        "base_density",
        "logit_mean",
        "logit_std",
        "shift",
        "rescale_learned_sigmas",
        "prediction_type",
    ):
        del plain["diffusion"][key]
    del plain["text_encoder"], plain["inpainting"]
    (path / "config.yaml").write_text(json.dumps(plain))
    small_trainer(tmp_path).restore(path)
    with pytest.raises(
        CheckpointError, match=r"another run: diffusion\.rescale_learned_sigmas was False, got True"
    ):
        small_trainer(tmp_path, diffusion__rescale_learned_sigmas=True).restore(path)


def test_a_run_goes_on_with_the_holes_it_began_with(tmp_path: Path) -> None:
    path = small_trainer(tmp_path, inpainting="RandomMasks").save()
    with pytest.raises(
        CheckpointError,
        match=r"inpainting was \{'type': 'RandomMasks'\}, got \{'type': 'RandomMasks', 'num_strokes': 2\}",
    ):
        small_trainer(tmp_path, inpainting="{type: RandomMasks, num_strokes: 2}").restore(path)


def test_the_saved_config_is_the_resolved_one(tmp_path: Path) -> None:
    path = small_trainer(tmp_path, seed=7).save()
    text = checkpoints.load(path).config
    assert "seed: 7" in text
    assert f"experiment_dir: {tmp_path}" in text


def test_sampling_grids_leave_the_training_as_it_is(tmp_path: Path) -> None:
    # Built one after the other: building seeds torch's global generator, and label dropout draws from it.
    plain = small_trainer(tmp_path / "plain", max_training_steps=6)
    fit(plain)
    drawing = small_trainer(tmp_path / "drawing", max_training_steps=6, sample_every=2)
    fit(drawing)
    assert_close(drawing.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)
    grids = sorted(path.name for path in (tmp_path / "drawing" / "grids").iterdir())
    assert grids == ["step_0000002.png", "step_0000004.png", "step_0000006.png"]


def test_changed_optimizer_options_count_after_a_resume(tmp_path: Path) -> None:
    path = small_trainer(tmp_path).save()
    changed = small_trainer(tmp_path, optimizer__weight_decay=0.5, optimizer__betas="[0.5, 0.6]")
    changed.restore(path)
    group = changed.engine.optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.5, 0.6))


def test_grids_need_somebody_to_draw_them(tmp_path: Path) -> None:
    config = small_config(tmp_path, sample_every=2)
    trainer = small_trainer(tmp_path)
    parts = TrainingParts(
        trainer.engine, trainer.inputs, trainer.objective, trainer.policy, trainer.loader, trainer.runtime
    )
    with pytest.raises(ValueError, match="sample_every: 2 needs its measurement, got none"):
        Trainer(parts, config)


def test_a_learning_policy_is_scored_by_the_law_that_drew(tmp_path: Path) -> None:
    learning = "{type: loss_second_moment, history: 1}"
    trainer = small_trainer(
        tmp_path, diffusion__policy=learning, diffusion__diffusion_steps=25, data__batch_size=256
    )
    trainer.optimizer_step()
    # 256 draws fill the history of 25 timesteps. This step drew uniformly; the next one does not.
    row = trainer.window.summary()
    assert_close(row["uniform_mse"], row["mse"])
    trainer.optimizer_step()
    assert trainer.window.summary()["uniform_mse"] != pytest.approx(row["mse"], rel=1e-6)


@pytest.mark.slow
def test_a_compiled_model_trains_to_the_same_weights_and_its_checkpoint_fits_the_plain_one(
    tmp_path: Path,
) -> None:
    options = {"model__class_dropout_prob": 0.0, "optimizer__lr": 1e-3, "optimizer__warmup_steps": 0}
    plain, compiled = (small_trainer(tmp_path, compile=is_on, **options) for is_on in ("false", "true"))
    for trainer in (plain, compiled):
        trainer.model.train()
        for _ in range(3):
            trainer.optimizer_step()
    path = compiled.save()
    names = [name for name, _ in plain.model.named_parameters() if "qkv.bias" not in name]
    found, expected = compiled.model.state_dict(), plain.model.state_dict()
    # Fused kernels round in another order. There are three steps of 1e-3 each.
    assert_close([found[n] for n in names], [expected[n] for n in names], rtol=0, atol=1e-4)
    assert compiled.model._compiled_call_impl is not None
    again = small_trainer(tmp_path, **options)
    again.restore(path)
    assert again.step == 3
