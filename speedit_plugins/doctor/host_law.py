"""The law by which a host draws, by its own flags, and a plot of it in characters.

Dims: T timesteps.
"""

import ast
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.doctor.places import Place, assigned_value, last_name
from speedit_plugins.hosts.laws.laws import HOSTS, host_config
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import Config

# Rows of the plot, and characters of its longest bar.
_ROWS, _WIDTH = 10, 40
_BINS = 1000
# Latents of a FLUX or SD3 image of 1024 x 1024, for laws that depend on the size of the data.
_SHAPE = (16, 128, 128)
# Methods after which a drawn number is the same.
_KEEPING = ("clone", "cpu", "cuda", "detach", "float", "long", "to", "type_as", "view")

_UNIFORM = {"density": "uniform", "weighting": "constant"}


@dataclass(frozen=True)
class HostLaw:
    """How a host draws. 0 is clean, 1 is noise.

    Args:
        said: where the law is from, and with which flags.
        density: probability of each of T equal parts of [0, 1], from clean to noise, (T,); None if the law is
            not known, and `said` says why.
        weighting: the host's own weights of the loss, as `build_policy` calls them; "" if they are not known.
    """

    said: str
    density: Tensor | None = None
    weighting: str = ""


def law_of_host(name: str, script: ast.Module, arguments: Sequence[str]) -> HostLaw:
    """The law of a known host.

    Args:
        name: in `hosts.laws`.
        script: whose `add_argument` calls say the defaults.
        arguments: of the script. Those that say nothing about the law are left out.
    """
    known = inspect.signature(HOSTS.module_dict[name]).parameters
    usual = {key: value for key, value in _defaults(script) if key in known}
    given = {key: value for key, value in _flags(arguments) if key in known}
    said = f"{name}, {_listed(given, 'its defaults')}"
    try:
        return _law(host_config(name, {**usual, **given}), said)
    except ValueError as error:
        return HostLaw(f"not known without more flags after the script: {' '.join(str(error).split())}")


def law_of_draw(draw: Place) -> HostLaw:
    """The law of a plain draw in a script that is not known: uniform, or logit-normal of mean 0 and std 1."""
    if draw.kind == "sampler":
        return _law(_UNIFORM, "uniform, if the script uses its uniform sampler")
    name = _plain_law(draw)
    if name is None:
        return HostLaw(f"not known: {draw.where} changes the number that it draws")
    return _law(
        {"density": name, "weighting": "constant"}, f"{name.replace('_', '-')}, by {draw.where} alone"
    )


def plot(density: Tensor) -> list[str]:
    """A histogram: how often each tenth of [0, 1] is drawn.

    Args:
        density: (T,) from clean to noise, T a multiple of 10.

    Example:
        >>> print("\\n".join(plot(torch.linspace(0, 2, 1000) / 1000)[:4]))
        0.0 to 0.1  ##                                         1.0 %
        0.1 to 0.2  ######                                     3.0 %
        0.2 to 0.3  ###########                                5.0 %
        0.3 to 0.4  ###############                            7.0 %
    """
    shares = density.reshape(_ROWS, -1).sum(1)
    bars = (shares / shares.max() * _WIDTH).round().long().tolist()
    return [
        f"{row / _ROWS:.1f} to {(row + 1) / _ROWS:.1f}  {'#' * bar:<{_WIDTH}} {100 * share:5.1f} %"
        for row, (bar, share) in enumerate(zip(bars, shares.tolist(), strict=True))
    ]


def _law(config: Config, said: str) -> HostLaw:
    policy = build_policy(config, NoiseSchedule.rectified_flow(_BINS), "flow")
    if policy.needs_data:
        policy.observe(torch.zeros(1, *_SHAPE))
        said += f", for latents of {' x '.join(map(str, _SHAPE))}"
    weighting = config["weighting"]
    return HostLaw(said, policy.density, weighting if isinstance(weighting, str) else weighting["type"])


def _plain_law(draw: Place) -> str | None:
    value = _kept(assigned_value(draw))
    if draw.kind in ("uniform", "index"):
        return "uniform" if value is draw.call else None
    if draw.kind == "logit_normal" and value is draw.call and isinstance(value, ast.Call):
        is_method = isinstance(value.func, ast.Attribute) and not value.args
        inner = value.func.value if is_method and isinstance(value.func, ast.Attribute) else value.args[0]
        return "logit_normal" if last_name(_kept(inner)) == "randn" else None
    return None


def _kept(value: ast.expr) -> ast.expr:
    """`x` in `x.to(device)`."""
    while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        if value.func.attr not in _KEEPING:
            break
        value = value.func.value
    return value


def _listed(flags: dict[str, Any], nothing: str) -> str:
    return ", ".join(f"{key}={value}" for key, value in flags.items()) or nothing


def _flags(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Names and values of `--name value`, `--name=value` and, for true, `--name`."""
    for position, word in enumerate(words):
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            after = words[position + 1 : position + 2]
            is_alone = not after or after[0].startswith("--")
            yield _key(name), _value(text) if equals else True if is_alone else _value(after[0])


def _defaults(script: ast.Module) -> Iterator[tuple[str, Any]]:
    """Names and defaults of the options that a script declares by `add_argument`."""
    for node in ast.walk(script):
        if isinstance(node, ast.Call) and last_name(node) == "add_argument" and node.args:
            name = node.args[-1].value if isinstance(node.args[-1], ast.Constant) else None
            values = [keyword.value for keyword in node.keywords if keyword.arg == "default"]
            if isinstance(name, str) and values and isinstance(values[0], ast.Constant):
                value = values[0].value
                if value is not None:
                    yield _key(name.lstrip("-")), value


def _key(name: str) -> str:
    return name.replace("-", "_")


def _value(text: str) -> Any:
    """The number, true, false or null that a text is; other text as it is."""
    try:
        return json.loads(text.lower()) if text.lower() in ("true", "false") else json.loads(text)
    except json.JSONDecodeError:
        return text
