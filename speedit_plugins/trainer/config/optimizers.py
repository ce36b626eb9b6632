"""Facts about the optimizers of this package that a config is checked against before torch is imported.

An optimizer of your own has no entry here. Its parameters are checked when it is built, and `lr` is required.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EVERY_PLUGIN = ("ddp", "zero1", "zero2", "gemini", "fsdp2")
# Where every process holds whole parameters. The others hold slices of them.
WHOLE_PARAMETERS = ("ddp",)


@dataclass(frozen=True)
class OptimizerFacts:
    """One optimizer.

    Args:
        lr: the learning rate where the config gives none.
        parameters: its own parameters with their defaults, as in `parallel/optimizers`.
        plugins: the values of `plugin` that it works with.
        state_bytes: bytes of state for each trained weight, of a large matrix.
        schedules: whether a learning rate that falls makes sense with it.
        fixed: parameters that decide the shape of its state, so that a resumed run cannot change them.
    """

    lr: float
    parameters: Mapping[str, Any]
    plugins: tuple[str, ...] = WHOLE_PARAMETERS
    state_bytes: float = 8.0
    schedules: bool = True
    fixed: tuple[str, ...] = ()


_ADAM = {"betas": (0.9, 0.999), "weight_decay": 0.0, "eps": 1e-8}
OPTIMIZER_FACTS: dict[str, OptimizerFacts] = {
    "AdamW": OptimizerFacts(1e-4, _ADAM, EVERY_PLUGIN),
    "AdamW8bit": OptimizerFacts(1e-4, {**_ADAM, "min_8bit_size": 4096}, state_bytes=2.0),
    # The rate of torch's Adafactor and of its paper, arXiv:1804.04235: a bound on the relative step.
    "Adafactor": OptimizerFacts(
        1e-2, {"weight_decay": 0.0, "beta2_decay": -0.8, "eps": (None, 1e-3), "d": 1.0}, state_bytes=0.0
    ),
    # It finds the rate itself; `lr` is a factor of it. Source: Mishchenko and Defazio 2023, arXiv:2306.06101.
    "Prodigy": OptimizerFacts(
        1.0,
        {
            **_ADAM,
            "beta3": None,
            # Its authors' advice for diffusion models. Without the first, training from random weights stalls
            # in our runs; without the second it diverges after a warm-up.
            "use_bias_correction": True,
            "safeguard_warmup": True,
            "d0": 1e-6,
            "d_coef": 1.0,
            "growth_rate": float("inf"),
            "slice_p": 1,
        },
        state_bytes=16.0,
        fixed=("slice_p",),
    ),
    # The rate of the authors' own AdamW. Source: Defazio et al. 2024, arXiv:2405.15682.
    "AdamWScheduleFree": OptimizerFacts(2.5e-3, {**_ADAM, "r": 0.0, "weight_lr_power": 2.0}, schedules=False),
    "Muon": OptimizerFacts(
        1e-4, {**_ADAM, "momentum": 0.95, "nesterov": True, "ns_steps": 5}, state_bytes=4.0
    ),
}
