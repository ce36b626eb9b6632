"""Schedules and policy configs shared by the policy tests.

Dims: T timesteps.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from speedit_plugins import DataSpectrum, NoiseSchedule, TimestepPolicy, build_policy, registry
from speedit_plugins.policies.densities.adaptive import AdaptiveDensity
from speedit_plugins.registry import DENSITIES, POLICIES, WEIGHTINGS


def _part(name: str, part: str) -> str | None:
    """The type of a named policy's density, weighting or draw. None if the recipe leaves the part out."""
    recipe = registry.build(POLICIES, name, schedule=NoiseSchedule.linear())
    return str(registry.options_of(recipe[part])["type"]) if part in recipe else None


# From the registries, so that the tests of all policies include one that is added.
POLICY_NAMES = tuple(POLICIES.module_dict)
PAIRED = tuple(name for name in POLICY_NAMES if _part(name, "draw") == "paired")
NOT_PAIRED = tuple(name for name in POLICY_NAMES if name not in PAIRED)
_ADAPTIVE_DENSITIES = {
    name
    for name, builder in DENSITIES.module_dict.items()
    if isinstance(builder, type) and issubclass(builder, AdaptiveDensity)
}
ADAPTIVE = tuple(name for name in POLICY_NAMES if _part(name, "density") in _ADAPTIVE_DENSITIES)
# Policy -> the prediction type whose loss its weights are meant for, if they are always converted.
DEFINED_ON = {
    name: source
    for name in POLICY_NAMES
    if (source := getattr(WEIGHTINGS.module_dict[_part(name, "weighting")], "defined_on", None))
}
# Their weights on the epsilon loss are infinite at SNR 0.
INFINITE_ON_EPSILON = tuple(name for name, source in DEFINED_ON.items() if source != "epsilon")


def equivalents(name: str) -> tuple[str | None, ...]:
    """The values of `equivalent_to` that a named policy takes."""
    if name not in DEFINED_ON:
        return "host", "epsilon"
    return (None,) if name in INFINITE_ON_EPSILON else ("epsilon",)


def zero_terminal(schedule: NoiseSchedule) -> NoiseSchedule:
    """The schedule with sqrt(alpha-bar) shifted and scaled to end at 0: Lin et al. 2023, arXiv:2305.08891."""
    root = schedule.alphas_cumprod.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return NoiseSchedule.from_alphas_cumprod(root**2)


SCHEDULES: dict[str, Callable[[], NoiseSchedule]] = {
    "linear": NoiseSchedule.linear,
    "linear of 20": lambda: NoiseSchedule.linear(20),
    "linear of 4000": lambda: NoiseSchedule.linear(4000),
    "scaled-linear": NoiseSchedule.scaled_linear,
    "cosine": NoiseSchedule.cosine,
    "cosine of 7": lambda: NoiseSchedule.cosine(7),
    "rectified flow": NoiseSchedule.rectified_flow,
    "rectified flow of 2": lambda: NoiseSchedule.rectified_flow(2),
    "betas": lambda: NoiseSchedule.from_betas([0.1, 0.2, 0.3, 0.5, 0.9]),
    "respaced": lambda: NoiseSchedule.linear().respaced(range(0, 1000, 4)),
    "unevenly respaced": lambda: NoiseSchedule.cosine().respaced([0, 1, 2, 10, 50, 51, 400, 800, 999]),
    "zero terminal SNR": lambda: zero_terminal(NoiseSchedule.scaled_linear()),
    "odd zero terminal SNR": lambda: zero_terminal(NoiseSchedule.linear(101)),
}


def build(
    config: str | dict[str, Any], schedule: NoiseSchedule, prediction_type: str = "epsilon"
) -> TimestepPolicy:
    """`build_policy` for data of variance 1, without the warning of a density that has nothing to thin.

    A model of epsilon becomes one of v where its weights would be infinite.
    """
    if prediction_type == "epsilon" and schedule.snr[-1] == 0:
        is_infinite = registry.options_of(config).get("type") in INFINITE_ON_EPSILON
        prediction_type = "v" if is_infinite else prediction_type
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="thinned draws every timestep equally often")
        return build_policy(config, schedule, prediction_type, data_spectrum=unit_variance)


def unit_variance() -> DataSpectrum:
    return DataSpectrum(torch.ones(1, device="cpu"))


def every_policy(schedule: NoiseSchedule) -> Iterator[TimestepPolicy]:
    """Each named policy, and its stratified form if it has one."""
    for name in POLICY_NAMES:
        yield build(name, schedule)
        if name in NOT_PAIRED:
            yield build({"type": name, "stratified": True}, schedule)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def teach(policy: TimestepPolicy, losses: Tensor) -> None:
    """Teaches a policy the losses (T,) ten times, so that every timestep has its full history."""
    index = torch.arange(len(losses))
    for _ in range(10):
        policy.update(index, losses)


def teach_falling(policy: TimestepPolicy, losses: Tensor) -> None:
    """Teaches a policy losses (T,) that fall to nothing, those of later timesteps faster.

    96 updates are two rounds of `adaptive`, in which every timestep has its 8 losses and more.
    """
    index = torch.arange(len(losses))
    for number in range(96):
        policy.update(index, losses * (1 - 0.1 * index / len(losses)) ** number)


_LEARNED: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "loss_balanced": {
        "over": st.sampled_from(["time", "log_snr"]),
        "uniform_floor": st.floats(1e-3, 1.0),
        "warmup_losses": st.integers(0, 10**6),
        "refresh_updates": st.integers(1, 20),
    },
    "info_noise": {
        "gate": st.none() | st.floats(0.0, 5.0),
        "divide_by_weight": st.booleans(),
        "uniform_floor": st.floats(1e-3, 1.0),
        "warmup_losses": st.integers(0, 10**6),
    },
    "adaptive": {
        "round_updates": st.integers(1, 50),
        "rate": st.floats(0.01, 1.0),
        "strength": st.floats(0.0, 5.0),
        "uniform_floor": st.floats(1e-3, 1.0),
    },
    "uncertainty": {"max_ratio": st.floats(1.0, 1e6), "refresh_updates": st.integers(1, 20)},
}


@st.composite
def schedules(draw: st.DrawFn) -> NoiseSchedule:
    """Schedules from every constructor, with small, odd and usual T >= 2."""
    kind = draw(st.sampled_from(["linear", "scaled_linear", "cosine", "rectified_flow", "betas"]))
    if kind == "betas":
        betas = draw(st.lists(st.floats(1e-4, 0.3), min_size=2, max_size=40))
        schedule = NoiseSchedule.from_betas(betas)
    else:
        smallest = {"linear": 20, "scaled_linear": 12}.get(kind, 2)
        num_timesteps = draw(st.integers(smallest, 60) | st.sampled_from([250, 333, 1000]))
        schedule = getattr(NoiseSchedule, kind)(num_timesteps)
    T = schedule.num_timesteps
    change = draw(st.sampled_from(["none", "respaced", "zero terminal"]))
    if change == "respaced":
        indices = draw(st.sets(st.integers(0, T - 1), min_size=2, max_size=min(T, 50)))
        # Index 0 stays: `thinned` needs an index before the boundary.
        return schedule.respaced(sorted(indices | {0}))
    # Laws over log-SNR need two timesteps with a log-SNR.
    return zero_terminal(schedule) if change == "zero terminal" and T > 2 else schedule


@st.composite
def configs(draw: st.DrawFn, T: int) -> dict[str, Any]:
    """Configs of every named policy, with valid parameters for T timesteps."""
    name = draw(st.sampled_from(POLICY_NAMES))
    positive = st.floats(0.1, 20.0)
    parameters: dict[str, dict[str, st.SearchStrategy[Any]]] = {
        "speedit": {
            "threshold": st.floats(0.01, 2.0),
            "sharpness": st.floats(1.0, 1e5),
            "gamma": st.floats(0.0, 2.0),
            "k": positive,
        },
        "speedit_reference": {"threshold": st.floats(0.01, 2.0)},
        "speed": {"k": positive, "lam": st.floats(0.5, 1.0), "tau": st.none() | st.integers(1, T)},
        "speed_reference": {"k": positive, "lam": st.floats(0.5, 1.0), "tau": st.none() | st.integers(1, T)},
        "spectral": {
            "mean": st.floats(-2.0, 2.0),
            # Some of these schedules have no timestep cleaner than the centre.
            "clean_share": st.just(0.0),
            "std": st.floats(0.5, 3.0),
            "clean_std": st.none() | st.floats(0.5, 3.0),
        },
        "spectral_fast": {
            "mean": st.floats(-2.0, -1.5),
            "offset": st.floats(-1.0, 1.0),
            "clean_share": st.floats(0.0, 0.9),
            "std": st.floats(0.5, 3.0),
        },
        "auto": {"mean": st.none() | st.floats(-2.0, -1.5)},
        # Its law is centred at half the mean plus 1, where each of these schedules has cleaner timesteps.
        "spectral_flow": {"mean": st.floats(-6.0, -4.0), "clean_share": st.floats(0.0, 0.9)},
        "p2": {"gamma": st.floats(0.0, 2.0), "k": positive},
        "min_snr": {"gamma": positive},
        "soft_min_snr": {"gamma": positive},
        "debiased": {"max_snr": positive},
        "logit_normal": {"mean": st.floats(-2.0, 2.0), "std": st.floats(0.2, 3.0)},
        "jit": {"mean": st.floats(-2.0, 2.0), "std": st.floats(0.2, 3.0)},
        "mode": {"scale": st.floats(-1.0, 1.75)},
        "beta": {"a": st.floats(0.1, 20.0), "b": st.floats(0.1, 20.0)},
        "u_shaped": {"a": st.floats(0.01, 100.0)},
        "laplace": {"mu": st.floats(-2.0, 2.0), "b": st.floats(0.3, 3.0)},
        "cauchy": {"mu": st.floats(-2.0, 2.0), "gamma": st.floats(0.01, 10.0)},
        "edm": {"mean": st.floats(-2.0, 3.0), "std": st.floats(0.5, 3.0), "data_std": positive},
        "edm2": {"mean": st.floats(-2.0, 3.0), "std": st.floats(0.5, 3.0), "data_std": positive},
        "clts": {
            "mean": st.floats(0.0, 1.0),
            "std": st.floats(0.05, 2.0),
            "curriculum_steps": st.integers(1, 10**6),
        },
        "loss_second_moment": {"history": st.integers(1, 20), "uniform_floor": st.floats(1e-3, 1.0)},
        **_LEARNED,
    }
    config = {"type": name, **{key: draw(values) for key, values in parameters.get(name, {}).items()}}
    if name not in PAIRED:
        config["stratified"] = draw(st.booleans())
    config["normalize"] = draw(st.booleans())
    return config
