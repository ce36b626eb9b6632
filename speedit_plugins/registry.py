"""Registries: the names that a config may use, and how a config becomes an object.

This file knows no policy, model or dataset. A module registers what it defines with
`DENSITIES.register_module(name="mine", module=mine)`. The modules of this package are found by their folder.
Other people's modules come in through `import_modules`, or through an entry point of the group
`speedit_plugins`.
"""

import difflib
import inspect
import keyword
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from types import FrameType, UnionType
from typing import Any, Union, get_args, get_origin

Builder = Callable[..., Any]
Config = Mapping[str, Any]

ENTRY_POINTS = "speedit_plugins"


class Registry:
    """Names of one kind, for example densities, and the class or function that each name builds.

    The methods have the names of mmengine's registry. mmengine itself is not required: it exists as two
    distributions that install the same files, so requiring one could overwrite the other in a user's
    environment.

    Args:
        name: what an entry is called in error messages, for example "dataset".
        package: dotted name of the package whose modules register entries. They are imported before the first
            lookup. None imports nothing.

    Example:
        >>> shapes = Registry("shape")
        >>> square = shapes.register_module(name="square", module=lambda side: side**2)
        >>> build(shapes, dict(type="square", side=3))
        9
    """

    def __init__(self, name: str, package: str | None = None) -> None:
        self.name = name
        self._package = package
        self._is_searched = package is None
        self._builders: dict[str, Builder] = {}
        self._forced: set[str] = set()

    @property
    def module_dict(self) -> dict[str, Builder]:
        """The class or function of each name. Changing this dictionary changes the registry."""
        self._search()
        return self._builders

    def get(self, name: str) -> Builder | None:
        """What `name` builds; None if nothing is registered under it."""
        return self.module_dict.get(name)

    def build(self, config: str | Config, **given: Any) -> Any:
        """Builds a config with this registry, see `build`."""
        return build(self, config, **given)

    def register_module(
        self, name: str | None = None, *, module: Builder | None = None, force: bool = False
    ) -> Any:
        """Registers `module`, a class or function, under `name`.

        Args:
            name: None takes the module's own `__name__`.
            module: None returns a decorator that registers what it decorates.
            force: replace what has the name, even if that is registered later.

        Returns:
            The module, or the decorator.

        Raises:
            ValueError: the name is registered for something else, or is no text.
        """
        if not (name is None or isinstance(name, str)):
            raise ValueError(
                f"register_module needs a name, got {name!r}; a decorator has brackets:"
                " @DATASETS.register_module()"
            )
        if module is None:
            return lambda decorated: self.register_module(name, module=decorated, force=force)
        name = name or str(getattr(module, "__name__", type(module).__name__))
        if force:
            self._forced.add(name)
        elif name in self._forced:
            return module
        known = self._builders.get(name)
        if known is not None and not force and not _is_same_definition(known, module):
            raise ValueError(
                f"two modules register the {self.name} {name!r}: {_origin(known)} and {_origin(module)}"
            )
        self._builders[name] = module
        return module

    def _search(self) -> None:
        if self._is_searched:
            return
        # Set before the imports: a module imported here may look up a name itself.
        self._is_searched = True
        try:
            package = import_module(str(self._package))
            for module in pkgutil.walk_packages(package.__path__, f"{self._package}."):
                import_module(module.name)
            load_entry_points()
        except BaseException:
            # The next lookup has to fail for the same reason, not for a name that is missing.
            self._is_searched = False
            raise


DENSITIES = Registry("density", "speedit_plugins.policies")
WEIGHTINGS = Registry("weighting", "speedit_plugins.policies")
DRAWS = Registry("draw", "speedit_plugins.policies")
POLICIES = Registry("policy", "speedit_plugins.policies")
PROCESSES = Registry("diffusion process", "speedit_plugins.trainer.diffusion")
MODELS = Registry("model", "speedit_plugins.trainer.models")
ENCODERS = Registry("encoder", "speedit_plugins.trainer.models")
TEXT_ENCODERS = Registry("text encoder", "speedit_plugins.trainer.models")
DATASETS = Registry("dataset", "speedit_plugins.trainer.data")
# A package of their own: beside it are engines, and a run imports the one that it chooses.
OPTIMIZERS = Registry("optimizer", "speedit_plugins.trainer.parallel.optimizers")
MASKS = Registry("mask", "speedit_plugins.trainer.data")
FEATURES = Registry("feature extractor", "speedit_plugins.trainer.evaluation")

# Top-level packages that came in by the front door.
_guests: set[str] = set()


def import_modules(names: Iterable[str], *, source: str) -> None:
    """Imports other people's modules, so that they register what they define.

    Args:
        names: dotted names, on the import path or in the current folder.
        source: where the names were given, for the error message: "custom_imports" or "--import".

    Raises:
        ValueError: a module cannot be imported. The message names the module and the reason.
    """
    for name in names:
        if not all(part.isidentifier() and not keyword.iskeyword(part) for part in name.split(".")):
            raise ValueError(f"{source} needs a dotted name, such as my_package.data, got {name!r}")
        # As `python -m` does, so that a command finds a module that is not installed. Last, so that no file
        # of that folder hides an installed package.
        if (here := str(Path.cwd())) not in sys.path and "" not in sys.path:
            sys.path.append(here)
        _welcome(name, f"{source} {name!r}")


@cache
def load_entry_points() -> None:
    """Imports, once, the modules that installed packages list in the entry point group `speedit_plugins`.

    Raises:
        ValueError: a module cannot be imported. The message names the entry point and the module.
    """
    for point in metadata.entry_points(group=ENTRY_POINTS):
        what = f"entry point {point.name!r} of the group {ENTRY_POINTS!r}, {point.value!r}"
        if point.attr:
            raise ValueError(f"{what}: needs a module, such as {point.module!r}, got a name in one")
        _welcome(point.module, what)


def is_raised_here(error: BaseException) -> bool:
    """Whether this package or a guest module raised the error, not a library that they call."""
    module = raising_module(error)
    return module is not None and module.partition(".")[0] in {__name__.partition(".")[0], *_guests}


def raising_module(error: BaseException) -> str | None:
    """Name of the module that raised an error; for a failed import, the module that asked for it."""
    names = [name for name, _, _ in _places(error) if not name.startswith(("importlib", "_frozen_importlib"))]
    return names[-1] if names else None


def _welcome(name: str, what: str) -> None:
    try:
        import_module(name)
    # Someone else's module may raise anything while it is imported, even SystemExit.
    except (Exception, SystemExit) as error:
        raise ValueError(f"cannot import {what}: {_reason(error, name)}") from error
    _guests.add(name.partition(".")[0])


def _reason(error: BaseException, module: str) -> str:
    """Why a module cannot be imported, in one line. It names the last line of the package that ran."""
    text = ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))
    if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
        return f"{text}; it needs to be installed, or in the current folder"
    top = module.partition(".")[0]
    own = [(file, line) for name, file, line in _places(error) if name.partition(".")[0] == top]
    return f"{text} ({own[-1][0]}, line {own[-1][1]})" if own else text


def _places(error: BaseException) -> list[tuple[str, str, int]]:
    """Module, file and line of each call that an error passed through. The last one raised it."""
    found, trace = [], error.__traceback__
    while trace is not None:
        frame: FrameType = trace.tb_frame
        name = str(frame.f_globals.get("__name__", ""))
        found.append((name, frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    return found


def build(registry: Registry, config: str | Config, *, also: Iterable[str] = (), **given: Any) -> Any:
    """The result of calling what `config["type"]` names, with the config's other keys as arguments.

    Arguments and errors are those of `check`.

    Example:
        >>> shapes = Registry("shape")
        >>> square = shapes.register_module(name="square", module=lambda side: side**2)
        >>> build(shapes, {"type": "square", "side": 4})
        16
    """
    builder, options = _resolved(registry, config, also, given)
    return builder(**options)


def check(registry: Registry, config: str | Config, *, also: Iterable[str] = (), **given: Any) -> None:
    """Nothing, if `build` would find the name and accept the parameters. Nothing is built.

    Args:
        registry: where the name is looked up.
        config: a name, or a mapping with `type` and parameters.
        also: more names that the error for an unknown parameter lists.
        given: arguments from the caller, passed on if the builder has a parameter of that name.

    Raises:
        ValueError: no `type`, an unknown name, an unknown or missing parameter, or a value of the wrong type.
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
    """The builder that a config's `type` names, the name, and the config's other keys."""
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
    """A config as a new dictionary. A bare name becomes its `type`.

    Raises:
        ValueError: a key that is not a string.

    Example:
        >>> options_of("speed")
        {'type': 'speed'}
    """
    if isinstance(config, str):
        return {"type": config}
    if wrong := [key for key in config if not isinstance(key, str)]:
        raise ValueError(f"the keys of a config need to be names, got {wrong[0]!r} in {dict(config)}")
    return dict(config)


def check_type(what: str, value: Any, annotation: Any) -> None:
    """Nothing, if a value has the type of its annotation.

    Args:
        what: the start of the error message.
        value: the value to check.
        annotation: bool, int, float (an int is accepted), str, or a union of them and None. Values with any
            other annotation are not checked.

    Raises:
        ValueError: a value of another type.
    """
    is_union = get_origin(annotation) in (Union, UnionType)
    kinds = get_args(annotation) if is_union else (annotation,)
    if not set(kinds) <= {bool, int, float, str, type(None)}:
        return
    # In Python, bool is an int. Here `k: true` is a mistake.
    fits = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, fits) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{what} needs {wanted}, got {value!r}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint "; did you mean 'X'?" with the closest known name in any case, "" if no name is close.

    Example:
        >>> nearest("unifrom", ["uniform", "speed"])
        "; did you mean 'uniform'?"
    """
    by_case = {each.casefold(): each for each in known}
    close = difflib.get_close_matches(name.casefold(), list(by_case), n=1)
    return f"; did you mean {by_case[close[0]]!r}?" if close else ""


def _known(names: Iterable[str]) -> str:
    return f"known: {', '.join(sorted(names))}"


def _origin(builder: Builder) -> str:
    return f"{getattr(builder, '__module__', '?')}.{getattr(builder, '__qualname__', type(builder).__name__)}"


def _is_same_definition(known: Builder, module: Builder) -> bool:
    """Whether two builders come from the same lines, read again after a failed import or a reload."""
    is_named = "<" not in _origin(known)
    return known is module or (is_named and _origin(known) == _origin(module))
