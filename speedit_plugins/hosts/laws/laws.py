"""From a trainer's flags to a config of `build_policy`.

Each function in this folder is one trainer. Its parameters are the trainer's own flags with the trainer's own
defaults, and `Source` names the file in which the trainer draws its timesteps. u = 1 is noise; a trainer that
counts the other way round is turned. All of them train a rectified flow. A weight multiplies the loss of its
velocity, unless the function says otherwise.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

from speedit_plugins.registry import Registry, build, nearest

HOSTS = Registry("host", "speedit_plugins.hosts.laws")

Config = dict[str, Any]

# Numbers that a curve of no other name is written with: a table of points joined by a spline.
_POINTS = 41


def host_config(name: str, flags: dict[str, Any]) -> Config:
    """The config of `build_policy` for a trainer's flags.

    Args:
        name: of the trainer, one of `HOSTS`.
        flags: by their names without the leading hyphens.

    Raises:
        ValueError: an unknown trainer or flag (the message lists the known ones), or a value that the trainer
            does not take or that no config can express.

    Example:
        >>> host_config("sd-scripts", {"timestep_sampling": "shift", "discrete_flow_shift": 3})
        {'density': {'type': 'logit_normal'}, 'weighting': 'constant', 'shift': 3}
    """
    known = HOSTS.module_dict
    parameters = inspect.signature(known[name]).parameters if name in known else {}
    for key in flags.keys() & parameters.keys():
        _check_choice(f"host {name!r} {key}", flags[key], parameters[key].annotation)
    config: Config = build(HOSTS, {"type": name, **flags})
    return config


def law(density: Any, weighting: Any = "constant", shift: Any = 1.0) -> Config:
    """A policy's config; a shift of 1 is left out."""
    config = {"density": density, "weighting": weighting}
    return config if shift == 1 else {**config, "shift": shift}


def logit_normal(mean: float, std: float) -> Config:
    """The density, without the parameters that are its defaults."""
    # Adding 0 makes 0 of -0.
    given = {key: value + 0.0 for key, value, usual in (("mean", mean, 0), ("std", std, 1)) if value != usual}
    return {"type": "logit_normal", **given}


def mixture(laws: list[Any], *shares: float) -> Config:
    """The density that is a share of each of some others."""
    return {"type": "mixture", "laws": laws, "shares": list(shares)}


def curve(value_at: Callable[[float], float]) -> Config:
    """A density or a weight that has no other name: a table of points (u, value)."""
    places = [n / (_POINTS - 1) for n in range(_POINTS)]
    return {"type": "table", "points": [[u, round(value_at(u), 6)] for u in places]}


def interpolated(x: float, x1: float, y1: float, x2: float, y2: float) -> float:
    """The straight line through two points, at x."""
    return y1 + (x - x1) * (y2 - y1) / (x2 - x1)


def _check_choice(what: str, value: Any, annotation: Any) -> None:
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    if choices and value not in choices:
        hint = nearest(str(value), map(str, choices))
        raise ValueError(f"{what} needs one of {', '.join(map(str, choices))}, got {value!r}{hint}")
