"""The learning rate of each step, and the keys of its schedules."""

import math
from pathlib import Path
from typing import Any

import pytest
from runs import small_config, small_trainer
from torch.testing import assert_close

from speedit_plugins.trainer.config.sections import OptimizerConfig
from speedit_plugins.trainer.config.validation import ConfigError
from speedit_plugins.trainer.training.learning_rate import SCHEDULES, SHAPES, learning_rate

WARM = {"lr": 0.004, "warmup_steps": 4}


def rates(steps: tuple[int, ...], **options: Any) -> list[float]:
    return [learning_rate(OptimizerConfig(**WARM, **options), step, 12) for step in steps]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_begins_with_the_warm_up_and_the_whole_rate(schedule: str) -> None:
    options = {"polynomial": {"power": 2.0}, "warmup_stable_decay": {"decay_steps": 4}}.get(schedule, {})
    assert_close(rates((0, 1, 2, 3, 4), schedule=schedule, **options), [0.001, 0.002, 0.003, 0.004, 0.004])


def test_a_schedule_ends_at_min_lr_at_the_last_step_and_stays_there() -> None:
    for schedule in ("linear", "polynomial", "cosine", "warmup_stable_decay"):
        options = {"polynomial": {"power": 0.5}, "warmup_stable_decay": {"decay_steps": 4}}.get(schedule, {})
        assert_close(rates((12, 20), schedule=schedule, min_lr=0.002, **options), [0.002, 0.002])


def test_a_line_a_power_and_a_cosine_pass_through_their_closed_forms() -> None:
    # Steps 6, 8 and 10 are 1/4, 1/2 and 3/4 of the way from the warm-up's end at 4 to 12.
    steps = (6, 8, 10)
    assert_close(rates(steps, schedule="linear", min_lr=0.002), [0.0035, 0.003, 0.0025])
    assert_close(rates(steps, schedule="polynomial", power=2.0), [0.00225, 0.001, 0.00025])
    root = math.sqrt(0.5)
    assert_close(rates(steps, schedule="cosine"), [0.002 * (1 + root), 0.002, 0.002 * (1 - root)])


def test_a_stable_rate_falls_in_the_last_steps_alone() -> None:
    # decay_steps 4: steps 8 to 12, of which 9 is a quarter.
    steps = (5, 8, 9, 10, 12)
    expected = {
        "linear": [0.004, 0.004, 0.003, 0.002, 0.0],
        "cosine": [0.004, 0.004, 0.002 * (1 + math.sqrt(0.5)), 0.002, 0.0],
        "sqrt": [0.004, 0.004, 0.002, 0.004 * (1 - math.sqrt(0.5)), 0.0],
    }
    assert expected.keys() == SHAPES.keys()
    for shape, values in expected.items():
        found = rates(steps, schedule="warmup_stable_decay", decay_steps=4, decay_shape=shape)
        assert_close(found, values)


def test_the_optimizer_takes_its_steps_at_the_rate_of_the_schedule(tmp_path: Path) -> None:
    options = {"schedule": "warmup_stable_decay", "decay_steps": 2, "warmup_steps": 2, "lr": 0.004}
    trainer = small_trainer(
        tmp_path, max_training_steps=5, **{f"optimizer__{key}": value for key, value in options.items()}
    )
    found = []
    for _ in range(5):
        trainer.optimizer_step()
        found.append(trainer.engine.optimizer.param_groups[0]["lr"])
    assert_close(found, [0.002, 0.004, 0.004, 0.004, 0.002])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": 2}, r"optimizer\.power: has no effect with schedule constant; wanted null"),
        ({"schedule": "polynomial"}, r"optimizer\.power: missing; schedule polynomial needs it"),
        (
            {"schedule": "cosine", "decay_steps": 5},
            r"optimizer\.decay_steps: has no effect with schedule cosine",
        ),
        (
            {"schedule": "warmup_stable_decay"},
            r"optimizer\.decay_steps: missing; schedule warmup_stable_decay",
        ),
        (
            {"schedule": "linear", "decay_shape": "sqrt"},
            r"optimizer\.decay_shape: has no effect with schedule lin",
        ),
        (
            {"schedule": "warmup_stable_decay", "decay_steps": 15, "warmup_steps": 10},
            r"optimizer\.decay_steps: wanted at most max_training_steps - warmup_steps = 10, got 15",
        ),
        (
            {"schedule": "linear", "warmup_steps": 20},
            r"optimizer\.warmup_steps: wanted less than max_training_steps = 20 with schedule linear, got 20",
        ),
        ({"min_lr": 1e-4}, r"optimizer\.min_lr: has no effect with schedule constant; wanted 0"),
        ({"schedule": "linear", "min_lr": 1}, r"optimizer\.min_lr: wanted at most lr = 0\.002, got 1"),
    ],
)
def test_a_key_that_the_schedule_does_not_have_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(tmp_path, **{f"optimizer__{key}": value for key, value in options.items()})
