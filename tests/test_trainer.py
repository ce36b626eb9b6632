import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import small_config, small_trainer
from torch import Tensor, nn
from torch.testing import assert_close

from speedit_plugins.engine import checkpoint
from speedit_plugins.engine.checkpoint import CheckpointError
from speedit_plugins.engine.interrupt import StopRequest
from speedit_plugins.engine.tracking import Tracker
from speedit_plugins.engine.trainer import Trainer, TrainingParts


def fit(trainer: Trainer) -> None:
    with Tracker(
        trainer.folder,
        total_steps=trainer.config.max_training_steps,
        start_step=trainer.step,
        tensorboard=False,
    ) as tracker:
        trainer.fit(tracker, StopRequest())


def everything(trainer: Trainer) -> dict[str, Any]:
    """All that decides the next step."""
    return {
        "model": trainer.model.state_dict(),
        "ema": trainer.ema.weights,
        "ema_updates": trainer.ema.num_updates,
        "optimizer": trainer.optimizer.state_dict(),
        "loader": trainer.loader.state_dict(),
        "policy": trainer.policy.state_dict()["density"],
        "noise": trainer.generator.get_state(),
        "global": torch.get_rng_state(),
        "next_batch": next(trainer.loader),
        "step": trainer.step,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16", "optimizer__grad_accumulation": 2, "optimizer__max_grad_norm": 1.0},
        {"diffusion__policy": "{type: clts, curriculum_steps: 15}"},
        {"diffusion__policy": "{type: loss_second_moment, history: 1}", "diffusion__diffusion_steps": 25},
        {"data__num_workers": 2, "diffusion__policy": "{type: speed, stratified: true}"},
    ],
    ids=["speedit", "bf16-accumulation-clipping", "curriculum", "learning", "workers-stratified"],
)
def test_twenty_steps_equal_ten_and_a_resumed_ten_bit_for_bit(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = small_trainer(tmp_path / "whole", max_training_steps=20, **changes)
    fit(whole)
    expected = everything(whole)

    fit(small_trainer(tmp_path / "parts", max_training_steps=10, **changes))
    resumed = small_trainer(tmp_path / "parts", max_training_steps=20, **changes)
    resumed.restore(tmp_path / "parts" / "checkpoints" / "step_0000010")
    assert resumed.step == 10
    fit(resumed)
    assert_close(everything(resumed), expected, rtol=0, atol=0)


def test_one_step_is_adamw_on_the_weighted_loss(tmp_path: Path) -> None:
    trainer = small_trainer(
        tmp_path, optimizer__warmup_steps=0, optimizer__lr=1e-3, model__class_dropout_prob=0.0
    )
    twin = small_trainer(
        tmp_path, optimizer__warmup_steps=0, optimizer__lr=1e-3, model__class_dropout_prob=0.0
    )
    trainer.optimizer_step()

    batch = next(twin.loader)
    draw = twin.policy.draw(len(batch["image"]), generator=twin.generator)
    noise = torch.randn(batch["image"].shape, generator=twin.generator)
    alpha_bar = twin.process.schedule.alphas_cumprod[draw.index].float().reshape(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * batch["image"] + (1 - alpha_bar).sqrt() * noise
    prediction = twin.model.train()(x_t, draw.index, batch["label"])
    mse = ((prediction[:, :1] - noise) ** 2).mean(dim=(1, 2, 3))
    gradient = torch.autograd.grad((draw.weight * mse).mean(), twin.model.final_layer.linear.weight)[0][:1]
    # AdamW's first step is lr * sign(gradient), up to epsilon; rows 0, 2, ... are mean channels.
    moved = trainer.model.final_layer.linear.weight[:1]
    large = gradient.abs() > 1e-4
    assert large.any()
    assert_close(moved[large], -1e-3 * gradient.sign()[large], rtol=1e-3, atol=0)


def test_warmup_rises_linearly_to_the_learning_rate(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, optimizer__warmup_steps=4, optimizer__lr=0.004)
    rates = []
    for _ in range(6):
        trainer.optimizer_step()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert_close(rates, [0.001, 0.002, 0.003, 0.004, 0.004, 0.004])


def test_accumulated_batches_give_the_gradient_of_one_batch_of_all(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, model__class_dropout_prob=0.0)
    nn.init.normal_(trainer.model.final_layer.linear.weight, std=0.1)
    batches = [next(trainer.loader) for _ in range(2)]
    joined = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
    # The same timesteps and noise for both ways: recorded from the first.
    draws = [trainer.policy.draw(16, generator=trainer.generator) for _ in range(2)]
    noises = [torch.randn(16, 1, 8, 8, generator=trainer.generator) for _ in range(2)]

    def gradient(parts: list[tuple[dict[str, Tensor], Tensor, Tensor, Tensor]]) -> Tensor:
        trainer.optimizer.zero_grad()
        for batch, index, weight, noise in parts:
            draw = type(draws[0])(index, index / 1000, weight)
            noised = trainer.process.corrupt(batch["image"], draw, noise=noise)
            prediction = trainer.model(noised.x_t, noised.timestep, batch["label"])
            (trainer.process.loss(prediction, noised, draw).loss.mean() / len(parts)).backward()
        return torch.cat([p.grad.flatten() for p in trainer.parameters])

    two = gradient([(b, d.index, d.weight, n) for b, d, n in zip(batches, draws, noises, strict=True)])
    one = gradient(
        [
            (
                joined,
                torch.cat([d.index for d in draws]),
                torch.cat([d.weight for d in draws]),
                torch.cat(noises),
            )
        ]
    )
    # Sums of 32 float32 terms in two orders.
    assert_close(two, one, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_gradient_norm_and_reports_it_before(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, optimizer__max_grad_norm=1e-3)
    seen: list[float] = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, a, k: seen.append(
            float(nn.utils.get_total_norm([p.grad for p in trainer.parameters]))
        )
    )
    before = float(trainer.optimizer_step())
    assert before > 1e-3
    # clip_grad_norm_ divides by norm + 1e-6.
    assert_close(seen[0], 1e-3, rtol=1e-2, atol=0)


def test_the_gradient_norm_is_computed_only_where_it_is_used(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    assert math.isnan(float(trainer.optimizer_step()))
    assert float(trainer.optimizer_step(measured=True)) > 0


def test_a_diverged_run_stops_saves_nothing_and_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, max_training_steps=20, log_every=1)
    trainer.step = 3
    good = trainer.save()
    with torch.no_grad():
        trainer.parameters[0].fill_(math.nan)
    with pytest.raises(
        ValueError, match=rf"training diverged by step 4: loss nan.* last good checkpoint is {good}"
    ):
        fit(trainer)
    with pytest.raises(ValueError, match="a weight is not finite at step 4: not saved"):
        trainer.save()
    assert checkpoint.newest(tmp_path / "checkpoints") == good


def test_a_checkpoint_of_another_run_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = small_trainer(tmp_path).save()
    with pytest.raises(
        CheckpointError,
        match=r"is of another run: .*has shape .*, wanted",
    ):
        small_trainer(tmp_path, model__hidden_size=64).restore(path)
    with pytest.raises(CheckpointError, match=r"policy was \{'type': 'speedit'\}, got \{'type': 'speed'\}"):
        small_trainer(tmp_path, diffusion__policy="{type: speed}").restore(path)


def test_the_saved_config_is_the_resolved_one(tmp_path: Path) -> None:
    path = small_trainer(tmp_path, seed=7).save()
    text = checkpoint.load(path).config
    assert "seed: 7" in text
    assert f"experiment_dir: {tmp_path}" in text


def test_sampling_grids_leave_the_training_as_it_is(tmp_path: Path) -> None:
    # Built one after the other: label dropout draws from torch's global generator, which building seeds.
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
    group = changed.optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.5, 0.6))


def test_a_checkpoint_of_another_device_says_so(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    path = trainer.save()
    trainer.device = torch.device("cuda")
    with pytest.raises(CheckpointError, match="saved on cpu, got cuda: random states do not carry over"):
        trainer.restore(path)


def test_grids_need_somebody_to_draw_them(tmp_path: Path) -> None:
    config = small_config(tmp_path, sample_every=2)
    trainer = small_trainer(tmp_path)
    parts = TrainingParts(
        trainer.model, trainer.encoder, trainer.process, trainer.policy, trainer.loader, trainer.device
    )
    with pytest.raises(ValueError, match="sample_every: 2 needs draw_grid, got None"):
        Trainer(parts, config)


def test_a_learning_policy_is_scored_by_the_law_that_drew(tmp_path: Path) -> None:
    learning = "{type: loss_second_moment, history: 1}"
    trainer = small_trainer(
        tmp_path, diffusion__policy=learning, diffusion__diffusion_steps=25, data__batch_size=256
    )
    trainer.optimizer_step()
    # 256 draws fill the history of 25 timesteps: this step drew uniformly, the next one does not.
    row = trainer.window.summary()
    assert_close(row["uniform_mse"], row["mse"])
    trainer.optimizer_step()
    assert trainer.window.summary()["uniform_mse"] != pytest.approx(row["mse"], rel=1e-6)
