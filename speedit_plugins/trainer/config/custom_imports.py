"""The key `custom_imports`: other people's modules, imported for what they register.

Standard library only, as `schema.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from speedit_plugins.registry import import_modules, nearest
from speedit_plugins.trainer.config.key_names import join
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.validation import ConfigError

KEY = "custom_imports"


def listed(layer: dict[str, Any]) -> dict[str, Any]:
    """The layer with `custom_imports` as a list, also where mmengine's form gives it.

    mmengine writes `custom_imports = dict(imports=["my_package.data"], allow_failed_imports=False)`.

    Raises:
        ConfigError: an unknown key in that form, none of `imports`, or imports that may fail.
    """
    stated = layer.get(KEY)
    if not isinstance(stated, Mapping):
        return layer
    known = ("imports", "allow_failed_imports")
    for key in stated:
        if key not in known:
            hint = nearest(str(key), known)
            raise ConfigError(join(KEY, str(key)), f"unknown key{hint}; known here: {', '.join(known)}")
    if "imports" not in stated:
        raise ConfigError(join(KEY, "imports"), "missing; wanted list of str")
    # To mmengine null is false.
    if stated.get("allow_failed_imports") not in (False, None):
        raise ConfigError(
            join(KEY, "allow_failed_imports"),
            f"an import that fails ends the run here; wanted false, got {stated['allow_failed_imports']!r}",
        )
    imports = stated["imports"]
    return {**layer, KEY: [imports] if isinstance(imports, str) else imports}


def import_stated(config: ExperimentConfig) -> None:
    """Imports the modules of `custom_imports`, in order.

    Raises:
        ConfigError: one of them cannot be imported; the message names it and the reason.
    """
    try:
        import_modules(config.custom_imports, source="module")
    except ValueError as error:
        raise ConfigError(KEY, str(error)) from error


def check_same_imports(saved: Mapping[str, Any], imports: Sequence[str]) -> None:
    """What a checkpoint's run imported is imported again: names must not come to mean something else.

    Args:
        saved: plain config of the checkpoint; one without the key imported nothing.
        imports: `custom_imports` of the run that goes on from it.

    Raises:
        ValueError: a module is left out; the message names it and says how to bring it in.
    """
    was = saved.get(KEY, [])
    if missing := [name for name in was if name not in imports]:
        wanted = " ".join(f"--import {name}" for name in missing)
        raise ValueError(
            f"{KEY} was {was!r}, got {list(imports)!r}; wanted {wanted}, or the key in the config"
        )
