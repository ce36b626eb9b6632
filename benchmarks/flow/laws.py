"""The laws of timesteps that benchmarks/flow compares, by name.

u = 1 is noise. A logit-normal law of mean m and width s is a normal law of log-SNR with mean -2 m and
width 2 s. A shift by s adds ln s to the mean.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from speedit_plugins.registry import POLICIES, nearest

Policy = dict[str, Any]

MEANS = (-1.0, -0.5, 0.0, 0.5, 1.0)
WIDTHS = (0.7, 1.0, 1.4)
SHIFTS = (2, 3, 6)
# Laws that take no number per data set. They are compared with the best of the others.
ADAPTED: Mapping[str, Policy] = {
    "spectral_flow": {"type": "spectral_flow"},
    "auto": {"type": "auto"},
    "auto follow": {"type": "auto", "follow": True},
    # Its warm-up of 20,000 losses is most of such a short training.
    "info_noise": {"type": "info_noise", "warmup_losses": 5_000},
    "loss_balanced": {"type": "loss_balanced"},
}
# A model of x_0 with the loss of v: EDM's weight for data of variance 1 is SNR + 1.
V_LOSS = {"type": "edm", "data_std": 1.0}
# Laws that the grid does not try: these are for models of x_0.
OTHERS: Mapping[str, Policy] = {
    "uniform, v-loss": {"density": "uniform", "weighting": V_LOSS},
    "logit_normal(0,1), v-loss": {"density": "logit_normal", "weighting": V_LOSS},
}
# After the name of a law: the same with its losses normalised.
NORMALISED = " / loss"


def laws(horizon: int) -> dict[str, Policy]:
    """Name -> what `build_policy` takes, for a training of `horizon` steps."""
    found: dict[str, Policy] = {"uniform": {"type": "uniform"}}
    found |= {logit_normal_name(mean, width): _logit_normal(mean, width) for mean, width in _grid()}
    found |= {f"uniform shift {shift}": {"type": "uniform", "shift": shift} for shift in SHIFTS}
    found |= {f"logit_normal shift {shift}": {"type": "logit_normal", "shift": shift} for shift in SHIFTS}
    found |= {name: _drawn({"type": name}) for name in ("laplace", "mode", "cosmap")}
    found |= {f"beta({a:g},{b:g})": _drawn({"type": "beta", "a": a, "b": b}) for a, b in ((0.8, 1), (1, 2))}
    found["logit_normal then uniform"] = _drawn(
        {"type": "stages", "laws": ["logit_normal", "uniform"], "until": [max(1, horizon // 2)]}
    )
    found["min_snr"] = {"type": "min_snr"}
    return found | dict(ADAPTED)


def coarse_laws() -> list[str]:
    """One law of each family, and every mean of the logit-normal ones: a shift moves the mean too."""
    others = ["uniform shift 3", "laplace", "mode", "cosmap", "beta(1,2)", "logit_normal then uniform"]
    return [*(logit_normal_name(mean, 1.0) for mean in MEANS), *others]


def widths_at_best_mean(ranked: Sequence[str]) -> list[str]:
    """The other widths at the mean of the first logit-normal law of width 1 in a list, the best one first."""
    means = {logit_normal_name(mean, 1.0): mean for mean in MEANS}
    best = next((means[name] for name in ranked if name in means), None)
    return [] if best is None else [logit_normal_name(best, width) for width in WIDTHS if width != 1.0]


def policy_of(name: str, horizon: int) -> Policy:
    """The policy of a law, also of `NAME / loss`; ValueError for an unknown name.

    Beside `laws`, every registered policy has its name.
    """
    known = {name: {"type": name} for name in POLICIES.module_dict} | dict(OTHERS) | laws(horizon)
    plain = name.removesuffix(NORMALISED)
    if plain not in known:
        raise ValueError(f"unknown law {name!r}{nearest(plain, known)}; known: {', '.join(known)}")
    return {**known[plain], "normalize": "loss"} if name.endswith(NORMALISED) else known[plain]


def logit_normal_name(mean: float, width: float) -> str:
    """The name of a cell of the grid."""
    return f"logit_normal({mean:g},{width:g})"


def is_fixed(name: str) -> bool:
    """Whether the grid may choose the law: it draws by a number that somebody has to find."""
    plain = name.removesuffix(NORMALISED)
    return plain in laws(horizon=1) and plain not in ADAPTED


def _grid() -> list[tuple[float, float]]:
    # The means first: they matter more than the widths, and a run that is cut short has them.
    cells = [(mean, width) for mean in MEANS for width in WIDTHS]
    return sorted(cells, key=lambda cell: (abs(cell[1] - 1.0), abs(cell[0])))


def _logit_normal(mean: float, width: float) -> Policy:
    return {"type": "logit_normal", "mean": mean, "std": width}


def _drawn(density: Mapping[str, Any]) -> Policy:
    return {"density": dict(density), "weighting": "constant"}
