"""The table of every config key, made from the schema: type, range, default and meaning of its fields.

The meaning of a key is the string below its field, as a docstring is below the head of a function.
"""

import ast
import dataclasses
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from speedit_plugins.trainer.config.key_names import join
from speedit_plugins.trainer.config.schema import COMPONENTS, ExperimentConfig
from speedit_plugins.trainer.config.sections import REST, key_of
from speedit_plugins.trainer.config.validation import describe_type

# Heading of the part of the table that begins with a key of the top.
PARTS = {
    "experiment_dir": "The experiment",
    "num_classes": "Model and data",
    "plugin": "Several processes",
    "max_training_steps": "Training",
    "ckpt_path": "Sampling",
    "reference": "Testing",
}
# Sections that another section's components fill.
_SAME_COMPONENTS = {"data.validation": "data.dataset"}
# Required in one phase only, so that the schema has a default.
_REQUIRED = {"max_training_steps": "required in train"}


@dataclass(frozen=True)
class Key:
    """A key: dotted path, type with range, default and meaning as Markdown."""

    path: str
    type: str
    default: str
    meaning: str


def keys_of(schema: type = ExperimentConfig, path: str = "") -> Iterator[Key]:
    """Every key of a section and of the sections below it, in the order of the schema.

    Raises:
        ValueError: a key has no meaning.
    """
    hints, texts = get_type_hints(schema), meanings(schema)
    for entry in dataclasses.fields(schema):
        if entry.metadata.get(REST):
            # It collects keys that have no name of their own.
            continue
        key, hint = join(path, key_of(entry.name)), hints[entry.name]
        if entry.name not in texts:
            raise ValueError(f"config key {key} has no text below it in {inspect.getsourcefile(schema)}")
        yield Key(key, _type_text(key, hint, entry.metadata), _default_text(key, entry), texts[entry.name])
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from keys_of(hint, key)


def meanings(schema: type) -> dict[str, str]:
    """What each field of a dataclass means: the string below it, as one line."""
    (definition,) = ast.parse(inspect.getsource(schema)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            value = ast.literal_eval(text.value)
            found[ast.unparse(field.target)] = " ".join(value.split())
    return found


def markdown() -> str:
    """The keys as tables under headings, one for each part of the top and each section."""
    lines: list[str] = []
    sections: dict[str, list[Key]] = {}
    for key in keys_of():
        section = key.path.rpartition(".")[0]
        if section:
            sections.setdefault(section, []).append(key)
            continue
        if key.path in PARTS:
            lines += ["", f"### {PARTS[key.path]}", "", *_HEAD]
        lines.append(_row(key))
    for section, keys in sections.items():
        lines += ["", f"### The section `{section}` {{#section-{section}}}", "", *_HEAD, *map(_row, keys)]
    return "\n".join([*lines, ""])


_HEAD = ("| key | type | default | meaning |", "|---|---|---|---|")


def _row(key: Key) -> str:
    # An anchor of its own, so that a key can be linked to.
    cells = (f"`{key.path}`{{#{anchor(key.path)}}}", key.type, key.default, key.meaning)
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def anchor(path: str) -> str:
    """The id of a key's row."""
    return f"key-{path.replace('.', '-')}"


def _type_text(key: str, hint: Any, limits: Mapping[str, float]) -> str:
    if key in COMPONENTS:
        null = " or null" if type(None) in get_args(hint) else ""
        section = _SAME_COMPONENTS.get(key, key).rpartition(".")[2].replace("_", "-")
        return f"[section with `type`](components.md#{section}){null}"
    if dataclasses.is_dataclass(hint):
        return f"[section](#section-{key})"
    text = describe_type(hint)
    if text.startswith("one of "):
        null = text.endswith(" or null")
        options = text.removeprefix("one of ").removesuffix(" or null").split(", ")
        return " ".join(f"`{option}`" for option in options) + (" or null" if null else "")
    return f"{text}{_range_text(limits)}"


def _range_text(limits: Mapping[str, float]) -> str:
    if not limits:
        return ""
    low, high = limits.get("at_least", limits.get("above")), limits.get("at_most", limits.get("below"))
    if low is not None and high is not None:
        left, right = "[" if "at_least" in limits else "(", "]" if "at_most" in limits else ")"
        return f" in {left}{low:g}, {high:g}{right}"
    symbols = {"at_least": "≥", "above": ">", "at_most": "≤", "below": "<"}
    ((name, limit),) = limits.items()
    return f" {symbols[name]} {limit:g}"


def _default_text(key: str, entry: "dataclasses.Field[Any]") -> str:
    if key in _REQUIRED:
        return _REQUIRED[key]
    if entry.default is not dataclasses.MISSING:
        return _value_text(entry.default)
    if entry.default_factory is dataclasses.MISSING:
        return "required"
    value = entry.default_factory()
    return "" if dataclasses.is_dataclass(value) else _value_text(value)


def _value_text(value: Any) -> str:
    """A default as YAML has it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        is_whole = math.isfinite(value) and float(value).is_integer()
        return f"{int(value)}" if is_whole else f"{value:g}"
    if get_origin(type(value)) is None and isinstance(value, list | tuple):
        return f"[{', '.join(map(_value_text, value))}]"
    if isinstance(value, dict):
        return f"`{value['type']}`"
    return f"`{value}`" if value else "empty"
