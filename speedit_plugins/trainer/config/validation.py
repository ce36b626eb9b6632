"""Makes sections of an experiment from plain mappings, and checks keys, types and ranges.

Uses the standard library only, so that a wrong config fails before torch is imported.
"""

import dataclasses
import math
import operator
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from speedit_plugins.trainer.config.key_names import join, key_hint, value_hint
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.sections import REST, Component, key_of
from speedit_plugins.trainer.config.switches import OFF_AT_NULL, SWITCHES

# "10k" and "2M" are numbers to a person.
_THOUSANDS = {"k": "e3", "m": "e6"}

Config = TypeVar("Config")

_LIMITS = {
    "at_least": (">=", operator.ge),
    "at_most": ("<=", operator.le),
    "above": (">", operator.gt),
    "below": ("<", operator.lt),
}


class ConfigError(ValueError):
    """A wrong config. `path` is the dotted key; the message says what is wrong, what was got and wanted."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


def build_section(schema: type[Config], raw: Any, path: str = "") -> Config:
    """An instance of `schema` from a plain mapping, after checks of types and ranges.

    Raises:
        ConfigError: a key is unknown or missing, a type is wrong, or a value is out of range.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(
            path or "config", f"wanted a section with keys, got {raw!r}{_section_hint(schema, raw, path)}"
        )
    check_keys(schema, raw, path)
    hints, values = get_type_hints(schema), {}
    for entry in fields(cast(Any, schema)):
        name = key_of(entry.name)
        key = join(path, name)
        if entry.metadata.get(REST):
            values[entry.name] = {other: raw[other] for other in raw if other not in _keys(schema)}
        elif raw.get(name) is None and key in OFF_AT_NULL:
            continue
        elif name in raw:
            values[entry.name] = _checked(raw[name], hints[entry.name], key, entry.metadata)
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise ConfigError(key, f"missing; wanted {describe_type(hints[entry.name])}")
    return schema(**values)


def check_keys(schema: type, raw: Mapping[Any, Any], path: str = "") -> None:
    """Raises for an unknown key of `raw` or of a typed section below it, and names the nearest known key."""
    hints, is_open = _keys(schema), any(entry.metadata.get(REST) for entry in fields(cast(Any, schema)))
    for name, value in raw.items():
        if is_open and isinstance(name, str) and name not in hints:
            continue
        if name not in hints:
            hint = key_hint(str(name), path, hints, list(key_paths()))
            # The keys of the top fill half a screen, and a hint is better than they are.
            listed = "" if hint and not path else f"; known here: {', '.join(hints)}"
            raise ConfigError(join(path, str(name)), f"unknown key{hint}{listed}")
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, Mapping):
            check_keys(cast(type, hints[name]), value, join(path, name))


def key_paths(schema: type = ExperimentConfig, path: str = "") -> dict[str, Any]:
    """Every dotted key with its type; a section comes before its keys."""
    found: dict[str, Any] = {}
    for name, hint in _keys(schema).items():
        found[join(path, name)] = hint
        if dataclasses.is_dataclass(hint):
            found.update(key_paths(cast(type, hint), join(path, name)))
    return found


def as_plain(config: ExperimentConfig) -> dict[str, Any]:
    """The config as plain mappings, lists and scalars: what `build_section` reads again."""
    plain = dataclasses.asdict(
        config, dict_factory=lambda items: {key_of(name): value for name, value in items}
    )
    plain["optimizer"] |= plain["optimizer"].pop("parameters")
    return plain


def describe_type(hint: Any) -> str:
    """A type in a YAML user's words: 'int', 'one of fp32, bf16', 'list of int', 'str or null'."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else describe_type(part) for part in arguments)
    if origin is list:
        return f"list of {describe_type(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)} {describe_type(arguments[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a section with keys"
    return str(hint.__name__)


def _keys(schema: type) -> dict[str, Any]:
    """The keys of a section with their types, without the field that collects other keys."""
    hints = get_type_hints(schema)
    found = [entry.name for entry in fields(schema) if not entry.metadata.get(REST)]
    return {key_of(name): hints[name] for name in found}


def _checked(value: Any, hint: Any, key: str, limits: Mapping[str, float]) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build_section(cast(type, hint), value, key)
    if origin in (Union, types.UnionType):
        return _optional(value, hint, key, limits)
    if origin is Literal:
        if value not in arguments:
            near = value_hint(value, arguments)
            raise ConfigError(key, f"wanted {describe_type(hint)}, got {value!r}{near}")
        return value
    if origin is dict:
        return _component(value, key)
    if origin in (list, tuple):
        return _sequence(value, hint, key, limits)
    return _scalar(value, hint, key, limits)


def _optional(value: Any, hint: Any, key: str, limits: Mapping[str, float]) -> Any:
    """A value of a union: of `X | None`, or of scalars such as `int | str`."""
    inner = [part for part in get_args(hint) if part is not type(None)]
    is_nullable = type(None) in get_args(hint)
    if value is None and is_nullable:
        return None
    if is_nullable and value in ("None", "none", {"type": "None"}, {"type": "none"}):
        raise ConfigError(key, f"wanted {describe_type(hint)}, got {value!r}; YAML writes null")
    if len(inner) > 1:
        # A text is no number, and a number no text: at most one of the types fits.
        fitting = [part for part in inner if isinstance(value, str) == (part is str)]
        if value is None or isinstance(value, bool) or not fitting:
            raise ConfigError(key, f"wanted {describe_type(hint)}, got {value!r}")
        inner = fitting
    return _checked(value, inner[0], key, limits)


def _component(value: Any, key: str) -> Component:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(key, f"wanted a name or a section with `type`, got {value!r}")
    composed = key == "diffusion.policy" and {"density", "weighting"} <= set(value)
    if not composed and not isinstance(value.get("type"), str):
        also = " (or density and weighting)" if key == "diffusion.policy" else ""
        raise ConfigError(key, f"wanted a `type`{also}, got keys {sorted(value)}")
    return dict(value)


def _sequence(value: Any, hint: Any, key: str, limits: Mapping[str, float]) -> Any:
    arguments = get_args(hint)
    fixed = get_origin(hint) is tuple
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or (fixed and len(value) != len(arguments)):
        raise ConfigError(key, f"wanted {describe_type(hint)}, got {value!r}{_list_hint(value)}")
    items = [_checked(item, arguments[0], f"{key}[{i}]", limits) for i, item in enumerate(value)]
    return tuple(items) if fixed else items


def _scalar(value: Any, hint: type, key: str, limits: Mapping[str, float]) -> Any:
    # bool is an int to Python: `batch_size: true` would otherwise mean 1.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int and is_number and float(value).is_integer():
        value = int(value)  # `max_training_steps=1e5` arrives as a float
    elif hint is float and is_number and math.isfinite(value):
        value = float(value)
    elif hint not in (bool, str) or not isinstance(value, hint):
        raise ConfigError(key, f"wanted {describe_type(hint)}, got {value!r}{_scalar_hint(value, hint)}")
    for name, limit in limits.items():
        symbol, holds = _LIMITS[name]
        if not holds(value, limit):
            raise ConfigError(key, f"wanted {describe_type(hint)} {symbol} {limit:g}, got {value!r}")
    return value


def _section_hint(schema: type, raw: Any, path: str) -> str:
    """How to write what looks like the main key of a section, or a section that is left empty or off."""
    if raw is None:
        return "; leave the key out for the defaults"
    if raw is False and path in SWITCHES:
        return "; null switches it off"
    is_number = isinstance(raw, int | float) and not isinstance(raw, bool)
    if path in SWITCHES and is_number:
        return f"; wanted {path}.{SWITCHES[path][0]}={raw}"
    if path in SWITCHES:
        return f"; wanted its key {SWITCHES[path][0]!r}, or null to switch it off"
    return (
        f"; wanted its key `type`: {raw}" if isinstance(raw, str) and "type" in get_type_hints(schema) else ""
    )


def _list_hint(value: Any) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return ""
    return f"; a list is written [{', '.join(str(value).replace(',', ' ').split())}]"


def _scalar_hint(value: Any, hint: type) -> str:
    """What makes a text that looks like a number or a bool into one, or a number into a text."""
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return f"; wanted quotes around it: '{value}'"
    if not isinstance(value, str):
        return ""
    if hint is bool:
        return "; wanted true or false without quotes" if value.lower() in ("true", "false") else ""
    plain = value.replace(",", "").replace(" ", "")
    if plain[-1:].lower() in _THOUSANDS:
        plain = f"{plain[:-1]}{_THOUSANDS[plain[-1:].lower()]}"
    try:
        number = float(plain)
    except ValueError:
        return ""
    return (
        f"; wanted {hint(number) if number.is_integer() else number} without quotes"
        if math.isfinite(number)
        else ""
    )
