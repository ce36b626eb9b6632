"""From files and `key=value` arguments to one checked `ExperimentConfig`, before torch is imported.

Later layers override earlier ones: base.yaml of the root folder and of each folder down to the file, the
file, their sections for the phase, the command line. `docs/configs.md` has the rules and every key.
"""

import dataclasses
import difflib
import importlib.util
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from speedit_plugins.registry import import_modules
from speedit_plugins.trainer.config.checks import check_phase
from speedit_plugins.trainer.config.custom_imports import import_stated, listed
from speedit_plugins.trainer.config.earlier_keys import with_lora_section
from speedit_plugins.trainer.config.key_names import argument_hint, join
from speedit_plugins.trainer.config.merging import left_out, merge
from speedit_plugins.trainer.config.reference_keys import ReferenceKeys
from speedit_plugins.trainer.config.schema import (
    COMPONENTS,
    PHASES,
    TYPED_SECTIONS,
    ExperimentConfig,
    settled,
)
from speedit_plugins.trainer.config.switches import without_measurements
from speedit_plugins.trainer.config.validation import ConfigError, as_plain, build_section, check_keys
from speedit_plugins.trainer.config.yaml_text import check_text, other_number

__all__ = ["ConfigError", "ExperimentConfig", "find_config", "load_config", "merge", "redact", "to_yaml"]

CONFIG_FOLDER = "configs"
SUFFIXES = (".yaml", ".yml", ".py")
REDACTED = "<redacted>"
_COMMAND_LINE = "command line"

# Not every `..._key` or `..._token`: `image_key` and `pad_token` are ordinary arguments.
_SECRET_KEY = re.compile(
    r"(^|_)((api|access|private|secret)_?key|(api|access|auth|hf|hub|bearer)_?token|secret|password|passwd"
    r"|credentials?)$|^token$",
    re.IGNORECASE,
)
# Hugging Face, OpenAI, GitHub, AWS; Weights & Biases (40 hexadecimal digits, but not in a path: a hub's cache
# has folders with such names); user:password@host.
_SECRET_VALUE = re.compile(
    r"\b(hf_|sk-|gh[pousr]_|AKIA)[A-Za-z0-9_-]{16,}|(?<![\w/\\])[0-9a-fA-F]{40}(?![\w/\\])|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_PUBLIC_HASH_KEYS = ("revision", "commit", "sha1")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Layer:
    """The keys from one place; messages name it by `source`."""

    source: str
    content: dict[str, Any]


def load_config(
    path: str | Path,
    phase: str,
    overrides: Sequence[str] = (),
    *,
    allow_python: bool = False,
    imports: Sequence[str] = (),
) -> ExperimentConfig:
    """The checked config of an experiment in one phase, whose `custom_imports` are imported.

    Each translated reference key is logged once.

    Args:
        path: a file; see `find_config` for where it is looked up.
        phase: one of train, inference, sample, test; its section overrides the top level.
        overrides: `key=value`, `a.b=value`; values are YAML.
        allow_python: allows mmengine `.py` configs; reading one executes it.
        imports: modules to import, added to those of `custom_imports`.

    Raises:
        ValueError: there is no such file, or it has unreadable YAML, an unknown key, a wrong type or value,
            a secret, or a module that cannot be imported. The message names the key, what was got, what is
            wanted, and the place of the value.
    """
    if phase not in PHASES:
        raise ValueError(f"phase needs one of {', '.join(PHASES)}, got {phase!r}")
    files = [_read(file, allow_python) for file in _chain(find_config(path))]
    raw = [*files, _Layer(_COMMAND_LINE, _dotlist(overrides))]
    for layer in raw:
        _refuse_secrets(layer)
        _check_other_phases(layer, phase)
    reference = ReferenceKeys(phase)
    layers = [_translated(layer, reference) for layer in _in_order(raw, phase)]
    merged, notes = _merged(layers)
    for note in notes:
        _log.warning("%s", note)
    try:
        resolved = with_lora_section(reference.finish(_resolve(merged)))
        config = settled(build_section(ExperimentConfig, resolved))
        check_phase(config, phase)
        # Last: a wrong config fails before other people's modules, and torch with them, are imported.
        import_stated(config)
    except ConfigError as error:
        raise ConfigError(error.path, _located(error, layers)) from error.__cause__
    import_modules(imports, source="--import")
    for note in reference.notes:
        _log.warning("reference key: %s", note)
    return dataclasses.replace(config, custom_imports=list(dict.fromkeys([*config.custom_imports, *imports])))


def to_yaml(config: ExperimentConfig) -> str:
    """The config as YAML that `load_config` reads again; secret-looking values are redacted."""
    return str(OmegaConf.to_yaml(OmegaConf.create(redact(as_plain(config)))))


def redact(value: Any, key: str = "") -> Any:
    """A copy in which each text that looks secret, by its key (`..._token`) or its form, is replaced."""
    if isinstance(value, Mapping):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key) for item in value]
    if not isinstance(value, str) or not value:
        return value
    looks_secret = _SECRET_VALUE.search(value) and key not in _PUBLIC_HASH_KEYS
    return REDACTED if looks_secret or _SECRET_KEY.search(key) else value


def find_config(path: str | Path) -> Path:
    """The config file: the path itself, else below ./configs, else in the configs packaged with the wheel.

    Raises:
        ValueError: there is no such file (the message lists the existing ones), or it is a folder, or it ends
            in none of .yaml, .yml and .py.
    """
    if not str(path).strip():
        raise ValueError("config needs a file, got an empty name")
    name = Path(path).expanduser()
    roots = _config_roots()
    for candidate in (name, *(root / name for root in roots)):
        if candidate.is_file():
            if candidate.suffix not in SUFFIXES:
                raise ValueError(f"config needs a name in {', '.join(SUFFIXES)}, got {candidate}")
            return candidate.absolute()
    kind = "is a folder, wanted a file" if name.is_dir() else "does not exist"
    known = sorted({file.relative_to(root).as_posix() for root in roots for file in root.rglob("*.yaml")})
    close = difflib.get_close_matches(str(path).removeprefix(f"{CONFIG_FOLDER}/"), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    listed = f"known: {', '.join(known)}" if known else "no ./configs folder, none packaged"
    raise ValueError(f"config {str(path)!r} {kind}{hint}; {listed}")


def _config_roots() -> list[Path]:
    try:
        packaged = importlib.util.find_spec(f"speedit_plugins.{CONFIG_FOLDER}")
    except ModuleNotFoundError:
        packaged = None
    folders = packaged.submodule_search_locations if packaged else None
    return [root for root in (Path(CONFIG_FOLDER), *map(Path, folders or ())) if root.is_dir()]


def _chain(file: Path) -> list[Path]:
    """The files to merge, root first. A .py config has its own `_base_`, so no others are merged with it."""
    if file.suffix == ".py":
        return [file]
    bases = [folder / "base.yaml" for folder in _folders(file)]
    return [*(base for base in bases if base.is_file() and base != file), file]


def _folders(file: Path) -> list[Path]:
    """The folders from the root down to the file's folder.

    The root is the nearest folder above the file that is named `configs` and has a base.yaml. Folders in
    between may have none. Outside such a tree the root is found going up as long as each folder has a
    base.yaml, so that a stray base.yaml far above is not read.
    """
    above = list(file.parents)
    for depth, folder in enumerate(above):
        if folder.name == CONFIG_FOLDER and (folder / "base.yaml").is_file():
            return above[depth::-1]
    without_gap = [depth for depth, folder in enumerate(above) if not (folder / "base.yaml").is_file()]
    return above[: without_gap[0]][::-1] if without_gap else above[::-1]


def _read(file: Path, allow_python: bool) -> _Layer:
    if file.suffix == ".py":
        return _Layer(str(file), _read_python(file, allow_python))
    try:
        check_text(file.read_text(encoding="utf-8-sig"))
        content = OmegaConf.to_container(OmegaConf.load(file))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: wanted text in UTF-8, which byte {error.start} is no part of") from None
    except YAMLError as error:
        # Only the position, because the text around it may hold a secret key.
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(
            f"{file}: {line}not valid YAML: {getattr(error, 'problem', '') or 'unreadable'}"
        ) from None
    except (ValueError, OmegaConfBaseException) as error:
        raise ValueError(f"{file}: {_first_line(error)}") from None
    return _Layer(str(file), cast(dict[str, Any], content))


def _read_python(file: Path, allow_python: bool) -> dict[str, Any]:
    if not allow_python:
        raise ValueError(
            f"{file}: a Python config executes its code; wanted --allow-python-config to read it"
        )
    # The import loads torch, so it is done only for these files.
    try:
        from mmengine.config import Config
    except ImportError as error:
        raise ValueError(
            f"{file}: a Python config is read by mmengine, which cannot be imported ({_first_line(error)});"
            " wanted pip install 'speedit-plugins[mmengine]', or a YAML config"
        ) from error
    # `custom_imports` of the merged config are imported later.
    loaded = Config.fromfile(str(file), use_environment_variables=False, import_custom_modules=False)
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(loaded.to_dict())))


def _dotlist(overrides: Iterable[str]) -> dict[str, Any]:
    """`a.b=value` arguments as nested keys. A later argument overrides an earlier one."""
    merged: dict[str, Any] = {}
    before = ""
    for argument in overrides:
        key, equals, text = argument.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise ValueError(
                f"argument wanted key=value, got {redact(argument)!r}{argument_hint(argument, before)}"
            )
        before = argument
        if meant := other_number(text):
            raise ConfigError(key, f"{meant} (in command line)")
        try:
            content = OmegaConf.to_container(OmegaConf.from_dotlist([argument]))
        except (YAMLError, OmegaConfBaseException):
            raise ValueError(f"{key}: the value on the command line is not valid YAML; quote it") from None
        # Each argument becomes a section of its own, so `policy=speed policy.k=4` sets k of speed.
        merged = merge(merged, _with_sections(cast(dict[str, Any], content)))
    return merged


def _in_order(raw: Sequence[_Layer], phase: str) -> list[_Layer]:
    """The files' top levels, then their phase sections, then the command line, its phase section last."""
    tops = [_Layer(layer.source, _without_phases(layer.content)) for layer in raw]
    sections = [_Layer(f"{layer.source}, section {phase}", _phase(layer, phase)) for layer in raw]
    return [*tops[:-1], *sections[:-1], tops[-1], sections[-1]]


def _merged(layers: Sequence[_Layer]) -> tuple[dict[str, Any], list[str]]:
    """The layers over each other, and a line for each choice of the command line that left keys out."""
    merged: dict[str, Any] = {}
    notes: list[str] = []
    for layer in layers:
        if layer.source.startswith(_COMMAND_LINE):
            notes += left_out(merged, layer.content)
        merged = merge(merged, layer.content)
    merged, gone = without_measurements(merged, [layer.content for layer in layers])
    told = [key for layer in layers if layer.source.startswith(_COMMAND_LINE) for key in layer.content]
    notes += [f"{every}=0 leaves out {', '.join(names)}" for every, names in gone.items() if every in told]
    return merged, notes


def _without_phases(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in PHASES}


def _phase(layer: _Layer, phase: str) -> dict[str, Any]:
    section = layer.content.get(phase)
    if section is not None and not isinstance(section, dict):
        raise ConfigError(phase, f"wanted a section with keys, got {redact(section)!r} (in {layer.source})")
    return section or {}


def _check_other_phases(layer: _Layer, phase: str) -> None:
    """Finds typing errors also in the sections that this phase does not use."""
    for other in PHASES:
        if other == phase or other not in layer.content:
            continue
        if layer.source == _COMMAND_LINE:
            raise ConfigError(other, f"has no effect in phase {phase}; wanted the key without {other!r}")
        _translated(_Layer(f"{layer.source}, section {other}", _phase(layer, other)), ReferenceKeys(other))


def _translated(layer: _Layer, reference: ReferenceKeys) -> _Layer:
    """The layer in this project's keys, all of them known, with each component as a section with a `type`."""
    try:
        content = listed(reference.translate(layer.content))
        check_keys(ExperimentConfig, content)
    except ConfigError as error:
        raise ConfigError(error.path, f"{_message(error)} (in {layer.source})") from None
    return _Layer(layer.source, _with_sections(content))


def _with_sections(content: dict[str, Any]) -> dict[str, Any]:
    """`content` itself, changed so that a component given as a bare name is a section with that `type`."""
    # A section before what is inside it.
    for path in (*TYPED_SECTIONS, *COMPONENTS):
        *parents, name = path.split(".")
        section: Any = content
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(section.get(name), str):
            section[name] = {"type": section[name]}
    return content


def _resolve(merged: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces interpolations by their values.

    Raises:
        ConfigError: an interpolation has no target, or a value is still `???`.
    """
    try:
        plain = OmegaConf.to_container(OmegaConf.create(dict(merged)), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = _first_line(error).removeprefix("KeyError raised while resolving interpolation: ")
        raise ConfigError(str(error.full_key or "config"), reason) from None
    return cast(dict[str, Any], plain)


def _refuse_secrets(layer: _Layer) -> None:
    for path in _paths(layer.content):
        if path.rpartition(".")[2] == "wandb_api_key":
            reason = (
                "a key does not belong into a config; delete it, and set WANDB_API_KEY in the environment"
            )
            raise ConfigError(path, f"{reason} (in {layer.source})")


def _paths(section: Any, path: str = "") -> Iterable[str]:
    if isinstance(section, Mapping):
        for key, value in section.items():
            yield join(path, str(key))
            yield from _paths(value, join(path, str(key)))
    elif isinstance(section, list):
        for item in section:
            yield from _paths(item, path)


def _located(error: ConfigError, layers: Sequence[_Layer]) -> str:
    """The message with the last layer that has the key, or with all layers if none has it."""
    name = error.path.partition("[")[0]
    stating = [layer.source for layer in layers if name in set(_paths(layer.content))]
    read = ", ".join(dict.fromkeys(layer.source for layer in layers if layer.content))
    read = read or f"{layers[0].source}, which has no keys"
    message = _SECRET_VALUE.sub(REDACTED, _message(error))
    return f"{message} ({f'in {stating[-1]}' if stating else f'read: {read}'})"


def _message(error: ConfigError) -> str:
    return str(error).removeprefix(f"{error.path}: ")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
