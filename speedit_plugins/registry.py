"""Every name a config may use, and how a config becomes an object.

This file knows no policy, model or dataset. A module registers what it defines:
`DENSITIES.register_module(name="mine", module=mine)`. Our own modules are found by their folder. Modules of
other people come in by `import_modules`, or by an entry point of the group `speedit_plugins`.
"""

import difflib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module, metadata
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

Builder = Callable[..., Any]
Config = Mapping[str, Any]

ENTRY_POINTS = "speedit_plugins"


class Registry:
    """Names of one kind, and what each of them builds.

    The calls are those of mmengine's registry, of which a plugin needs no more. mmengine itself is not
    required: its two distributions own the same files, so asking pip for one would overwrite a host's other.

    Args:
        name: what an entry is, as error messages say it: "dataset".
        package: dotted name of the package whose modules register entries; all of them are imported before
            the first lookup. None has no such package.

    Example:
        >>> shapes = Registry("shape")
        >>> shapes.register_module(name="square", module=lambda side: side**2)
        >>> build(shapes, dict(type="square", side=3))
        9
    """

    def __init__(self, name: str, package: str | None = None) -> None:
        self.name = name
        self._package = package
        self._is_searched = package is None
        self._builders: dict[str, Builder] = {}

    @property
    def module_dict(self) -> dict[str, Builder]:
        """What each name builds; a change to the dictionary changes the registry."""
        self._search()
        return self._builders

    def register_module(self, name: str | None = None, *, module: Builder | None = None) -> Any:
        """Makes `name` build `module`, a class or a function; without `module`, a decorator.

        Args:
            name: None is the module's own name.

        Returns:
            The module.

        Raises:
            ValueError: the name belongs to something else.
        """
        if module is None:
            return lambda decorated: self.register_module(name, module=decorated)
        name = name or str(getattr(module, "__name__", type(module).__name__))
        known = self._builders.get(name)
        if known is not None and known is not module:
            raise ValueError(
                f"two modules register the {self.name} {name!r}: {_origin(known)} and {_origin(module)}"
            )
        self._builders[name] = module
        return module

    def _search(self) -> None:
        if self._is_searched:
            return
        # Set first: the modules imported here may look something up themselves.
        self._is_searched = True
        package = import_module(str(self._package))
        for module in pkgutil.walk_packages(package.__path__, f"{self._package}."):
            import_module(module.name)
        load_entry_points()


DENSITIES = Registry("density", "speedit_plugins.policies")
WEIGHTINGS = Registry("weighting", "speedit_plugins.policies")
DRAWS = Registry("draw", "speedit_plugins.policies")
POLICIES = Registry("policy", "speedit_plugins.policies")
PROCESSES = Registry("diffusion process", "speedit_plugins.trainer.diffusion")
MODELS = Registry("model", "speedit_plugins.trainer.models")
ENCODERS = Registry("encoder", "speedit_plugins.trainer.models")
TEXT_ENCODERS = Registry("text encoder", "speedit_plugins.trainer.models")
DATASETS = Registry("dataset", "speedit_plugins.trainer.data")
MASKS = Registry("mask", "speedit_plugins.trainer.data")
FEATURES = Registry("feature extractor", "speedit_plugins.trainer.evaluation")

_loaded_entry_points: set[str] = set()


def import_modules(names: Iterable[str], *, source: str) -> None:
    """Imports other people's modules, for what they register.

    Args:
        names: dotted names, found on the import path or from the current folder.
        source: where the names come from, for the error: "custom_imports" or "--import".

    Raises:
        ValueError: a module cannot be imported; the message names it and the reason.
    """
    for name in names:
        _imported(name, f"{source} {name!r}")


def load_entry_points() -> None:
    """Imports the modules that installed packages name in the entry point group `speedit_plugins`, once.

    Raises:
        ValueError: one of them cannot be imported; the message names the entry point and its module.
    """
    for point in metadata.entry_points(group=ENTRY_POINTS):
        if point.value not in _loaded_entry_points:
            _loaded_entry_points.add(point.value)
            _imported(point.module, f"entry point {point.name!r} ({point.value})")


def _imported(name: str, what: str) -> None:
    # As `python -m` does, so that a module beside the config is found by an installed command too.
    if (here := str(Path.cwd())) not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        import_module(name)
    # Whatever somebody else's module raises while it is imported.
    except Exception as error:
        raise ValueError(f"cannot import {what}: {type(error).__name__}: {error}") from error


def build(registry: Registry, config: str | Config, *, also: Iterable[str] = (), **given: Any) -> Any:
    """Calls what `config["type"]` names with the config's other keys; see `check` for the rest."""
    builder, options = _resolved(registry, config, also, given)
    return builder(**options)


def check(registry: Registry, config: str | Config, *, also: Iterable[str] = (), **given: Any) -> None:
    """Raises what `build` would raise for names, parameters and their types, without building.

    Args:
        registry: where the name is looked up.
        config: a name, or a mapping with `type` and parameters.
        also: names that the error for an unknown parameter lists beside the builder's own.
        given: arguments from the caller, passed where the builder has a parameter of that name.

    Raises:
        ValueError: no `type`, an unknown name, an unknown or a missing parameter, a value of the wrong type.
    """
    _resolved(registry, config, also, given)


def _resolved(
    registry: Registry, config: str | Config, also: Iterable[str], given: Mapping[str, Any]
) -> tuple[Builder, dict[str, Any]]:
    builder, name, options = _found(registry, config)
    what = f"{registry.name} {name!r}"
    parameters = inspect.signature(builder).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    own = [key for key, p in parameters.items() if key not in given and p.kind is not p.VAR_KEYWORD]
    for key, value in options.items():
        if key in own:
            check_type(f"{what} {key}", value, parameters[key].annotation)
        elif not open_ended:
            names = sorted([*own, *also])
            raise ValueError(
                f"{what} has no parameter {key!r}{nearest(key, names)}; known: {', '.join(names)}"
            )
    missing = [
        key for key in own if parameters[key].default is inspect.Parameter.empty and key not in options
    ]
    if missing:
        raise ValueError(f"{what} needs {', '.join(missing)}, got {sorted(options)}")
    return builder, {**{key: value for key, value in given.items() if key in parameters}, **options}


def _found(registry: Registry, config: str | Config) -> tuple[Builder, str, dict[str, Any]]:
    """What a config's `type` names, that name, and the config's other keys."""
    if not isinstance(config, str | Mapping):
        raise ValueError(f"a {registry.name} config needs a name or a mapping with type, got {config!r}")
    options = options_of(config)
    known = registry.module_dict
    if "type" not in options:
        raise ValueError(
            f"a {registry.name} config needs a type, got keys {sorted(options)}; {_known(known)}"
        )
    name = str(options.pop("type"))
    if name not in known:
        raise ValueError(f"unknown {registry.name} {name!r}{nearest(name, known)}; {_known(known)}")
    return known[name], name, options


def options_of(config: str | Config) -> dict[str, Any]:
    """The keys of a config, of a name `type` alone."""
    if isinstance(config, str):
        return {"type": config}
    if wrong := [key for key in config if not isinstance(key, str)]:
        raise ValueError(f"the keys of a config need to be names, got {wrong[0]!r} in {dict(config)}")
    return dict(config)


def check_type(what: str, value: Any, annotation: Any) -> None:
    """Raises a ValueError unless a plain value has its annotation's type; other annotations pass.

    Args:
        what: begins the message.
        annotation: bool, int, float (which takes an int), str, or one of these or None.
    """
    is_union = get_origin(annotation) in (Union, UnionType)
    kinds = get_args(annotation) if is_union else (annotation,)
    if not set(kinds) <= {bool, int, float, str, type(None)}:
        return
    # bool is an int to Python: k=true is a mistake all the same.
    fits = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, fits) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{what} needs {wanted}, got {value!r}")


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the closest known name, '' where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _known(names: Iterable[str]) -> str:
    return f"known: {', '.join(sorted(names))}"


def _origin(builder: Builder) -> str:
    return f"{getattr(builder, '__module__', '?')}.{getattr(builder, '__qualname__', type(builder).__name__)}"
