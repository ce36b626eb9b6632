"""What a section with `type` may name: every registered component with its parameters.

Parameters, types and defaults are those of the component's signature, meanings those of its docstring.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

from docs_site.docstrings import parameters
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import (
    DATASETS,
    DENSITIES,
    DRAWS,
    ENCODERS,
    FEATURES,
    MASKS,
    MODELS,
    OPTIMIZERS,
    POLICIES,
    TEXT_ENCODERS,
    WEIGHTINGS,
    Registry,
)

# Heading, sentence, registry, and the arguments that the program fills in by itself.
KINDS: tuple[tuple[str, str, Registry, tuple[str, ...]], ...] = (
    ("model", "The key `model`.", MODELS, ()),
    ("dataset", "The key `data.dataset`.", DATASETS, ()),
    ("encoder", "The key `encoder`.", ENCODERS, ()),
    ("text encoder", "The key `text_encoder`.", TEXT_ENCODERS, ()),
    ("inpainting", "The key `inpainting`.", MASKS, ()),
    (
        "optimizer",
        "The key `optimizer`. It has the [trainer's keys](configs.md#section-optimizer) and the optimizer's"
        " parameters. [Training](training.md#optimizers) says which works with which `plugin`.",
        OPTIMIZERS,
        ("params", "lr", "model"),
    ),
    ("features", "The key `features`.", FEATURES, ("device", "images", "labels")),
    (
        "policy",
        "The key `diffusion.policy`, and the first argument of `build_policy` and `with_policy`. Each takes"
        " `stratified`, `normalize` and `equivalent_to` too; [policies](policies.md) says which to take.",
        POLICIES,
        ("schedule",),
    ),
    (
        "density",
        "A part of a policy: how often each timestep is drawn.",
        DENSITIES,
        ("schedule", "data_spectrum"),
    ),
    ("weighting", "A part of a policy: how much its loss counts.", WEIGHTINGS, ("schedule", "density")),
    ("draw", "A part of a policy: how a batch is drawn.", DRAWS, ("schedule",)),
)


def markdown() -> str:
    """The page: a heading for each kind, and under it every name with a table of its parameters."""
    lines = [
        "# Components",
        "",
        "A section with `type` names one of these. Its other keys are the parameters listed here."
        " [Extending](extending.md) says how names of your own come in.",
    ]
    for kind, sentence, registry, filled_in in KINDS:
        lines += ["", f"## {kind.capitalize()} {{#{kind.replace(' ', '-')}}}", "", sentence]
        # The sizes of one architecture share their parameters.
        entries = sorted(registry.module_dict.items(), key=lambda entry: _alike(*entry))
        for _, group in groupby(entries, key=lambda entry: _alike(*entry)):
            members = list(group)
            builder = members[0][1]
            meanings = {**_of_the_kind(registry), **_of_the_parts(registry, builder), **_meanings(builder)}
            lines += _entry([name for name, _ in members], builder, filled_in, meanings)
    return "\n".join([*lines, ""])


def _of_the_kind(registry: Registry) -> dict[str, str]:
    """Parameters that models share are explained at one of them; so for text encoders and optimizers."""
    found: dict[str, str] = {}
    shared = (MODELS, TEXT_ENCODERS, OPTIMIZERS)
    for builder in registry.module_dict.values() if registry in shared else ():
        found = {**_meanings(builder), **found}
    return found


def _of_the_parts(registry: Registry, builder: Callable[..., Any]) -> dict[str, str]:
    """Parameters of a named policy are those of its parts."""
    if registry is not POLICIES:
        return {}
    needs_schedule = "schedule" in inspect.signature(builder).parameters
    parts = builder(NoiseSchedule.linear()) if needs_schedule else builder()
    found: dict[str, str] = {}
    for kind, home in (("density", DENSITIES), ("weighting", WEIGHTINGS), ("draw", DRAWS)):
        if kind in parts:
            found = {**_meanings(home.module_dict[parts[kind]["type"]]), **found}
    return found


def _alike(name: str, builder: Callable[..., Any]) -> tuple[str, str]:
    """The same for entries that are shown together: `DiT-S/2` and `DiT-XL/8`."""
    return re.sub(r"-\w+/\d+$", "-", name), str(inspect.signature(builder))


def _entry(
    names: list[str], builder: Callable[..., Any], filled_in: tuple[str, ...], meanings: Mapping[str, str]
) -> list[str]:
    lines = ["", f"### {_heading(names)}", "", _summary(builder), ""]
    if len(names) > 1:
        lines += [", ".join(f"`{name}`" for name in names), ""]
    parameters = [
        p for p in inspect.signature(builder).parameters.values() if p.name not in (*filled_in, "options")
    ]
    if parameters:
        lines += ["| parameter | type | default | meaning |", "|---|---|---|---|"]
        lines += [_row(parameter, meanings.get(parameter.name, "")) for parameter in parameters]
    return lines


def _heading(names: list[str]) -> str:
    return f"`{names[0]}`" if len(names) == 1 else f"`{names[0].split('-')[0]}` by size"


def _summary(builder: Callable[..., Any]) -> str:
    first = (inspect.getdoc(builder) or "An architecture of the paper's size.").split("\n\n")[0]
    return _plain(first)


def _meanings(builder: Callable[..., Any]) -> dict[str, str]:
    found = parameters(inspect.getdoc(builder) or "")
    # A recipe points at its part, whose own meaning is shown then.
    return {name: text for name, text in found.items() if not text.startswith("see ")}


def _row(parameter: inspect.Parameter, meaning: str) -> str:
    empty = inspect.Parameter.empty
    default = "required" if parameter.default is empty else _value(parameter.default)
    cells = (f"`{parameter.name}`", _type(parameter.annotation), default, _plain(meaning))
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _type(annotation: Any) -> str:
    """An annotation in the words of a YAML user."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\bos\.PathLike\[str\]|\bcollections\.abc\.|\btyping\.", "", text)
    text = re.sub(r"\b(?:Sequence|tuple|list)\[(.*)\]", r"list of \1", text)
    text = text.replace("Sequence[int]", "lists of int").replace("None", "null")
    parts = [part.strip() for part in text.split("|") if part.strip()]
    return " or ".join(parts)


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(str, value))}]"
    return f"`{value}`" if isinstance(value, str) and value else ("empty" if value == "" else str(value))


def _plain(text: str) -> str:
    """Text of a docstring as Markdown: one line, with nothing in it that Markdown would read as a mark."""
    kept = re.split(r"(`[^`]*`)", " ".join(text.split()))
    plain = "".join(part if part.startswith("`") else re.sub(r"([*_<])", r"\\\1", part) for part in kept)
    return plain[:1].upper() + plain[1:]
