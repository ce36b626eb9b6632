"""The learning rate of each step: a linear warm-up, then one of the schedules.

A shape is a function of the share of the way that is done, in [0, 1]. It falls from 1, the rate `lr`, to 0,
the rate `min_lr`.
"""

import math
from collections.abc import Callable, Mapping

from speedit_plugins.trainer.config.sections import OptimizerConfig


def learning_rate(options: OptimizerConfig, step: int, num_steps: int) -> float:
    """The learning rate after `step` steps of `num_steps`. After the last one it stays at `min_lr`.

    Source of the warm-up: Goyal et al. 2017, arXiv:1706.02677, section 2.2. It begins at lr / warmup_steps.
    """
    assert options.lr is not None
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    share = SCHEDULES[options.schedule](options, step, num_steps)
    return options.lr if share == 1 else options.min_lr + (options.lr - options.min_lr) * share


def linear(done: float) -> float:
    """A straight line. Source: Devlin et al. 2019, arXiv:1810.04805, section A.2."""
    return 1 - done


def polynomial(done: float, *, power: float) -> float:
    """(1 - done) to a power. Source: Chen et al. 2017, arXiv:1606.00915, section 4.1, "poly"."""
    return (1 - done) ** power


def cosine(done: float) -> float:
    """Half a cosine. Source: Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5 without restarts."""
    return (1 + math.cos(math.pi * done)) / 2


def one_minus_sqrt(done: float) -> float:
    """1 - sqrt(done). Source: Haegele et al. 2024, arXiv:2405.18392, section 3.2, "1-sqrt"."""
    return 1 - math.sqrt(done)


# How `warmup_stable_decay` falls. Source of the schedule: Hu et al. 2024, arXiv:2404.06395, section 4.
SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": linear,
    "cosine": cosine,
    "sqrt": one_minus_sqrt,
}


def _constant(options: OptimizerConfig, step: int, num_steps: int) -> float:
    return 1.0


def _linear(options: OptimizerConfig, step: int, num_steps: int) -> float:
    return linear(_done(options, step, num_steps))


def _polynomial(options: OptimizerConfig, step: int, num_steps: int) -> float:
    assert options.power is not None
    return polynomial(_done(options, step, num_steps), power=options.power)


def _cosine(options: OptimizerConfig, step: int, num_steps: int) -> float:
    return cosine(_done(options, step, num_steps))


def _warmup_stable_decay(options: OptimizerConfig, step: int, num_steps: int) -> float:
    assert options.decay_steps is not None
    done = 1 - (num_steps - step) / options.decay_steps
    return SHAPES[options.decay_shape or "linear"](min(1.0, max(0.0, done)))


def _done(options: OptimizerConfig, step: int, num_steps: int) -> float:
    return min(1.0, (step - options.warmup_steps) / (num_steps - options.warmup_steps))


# By the value of `optimizer.schedule`: the share of `lr` after so many of `num_steps` steps.
SCHEDULES: Mapping[str, Callable[[OptimizerConfig, int, int], float]] = {
    "constant": _constant,
    "linear": _linear,
    "polynomial": _polynomial,
    "cosine": _cosine,
    "warmup_stable_decay": _warmup_stable_decay,
}
