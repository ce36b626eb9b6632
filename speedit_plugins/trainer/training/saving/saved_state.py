"""The plain values of a checkpoint, checked against what the run itself would save, before they are used."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.files import pickle_fault
from speedit_plugins.trainer.checkpoints import STATE, CheckpointError, step_in_name

_COUNTS = ("step", "num_skipped", "ema_updates")
_SECTIONS = ("loader", "policy", "scaler")


def read_state(path: Path) -> Mapping[str, Any]:
    """The checked values of the checkpoint in `path`, from its file alone.

    Raises:
        CheckpointError: the file cannot be read, or a value cannot be that of a checkpoint.
    """
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    # A cut file can fail in any layer: zip, pickle, storage.
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {STATE}: {pickle_fault(error)}") from None
    return checked_state(state, path)


def checked_state(state: Any, path: Path) -> Mapping[str, Any]:
    """The values, if counts are counts, sections are sections, and the step is that of the checkpoint's name.

    Raises:
        CheckpointError: names the checkpoint, the key, its value and what is wanted.
    """
    if not isinstance(state, Mapping):
        raise _damaged(path, f"is a {type(state).__name__}, wanted a section with keys")
    if missing := [key for key in (*_COUNTS, *_SECTIONS) if key not in state]:
        raise _damaged(path, f"lacks {', '.join(missing)}")
    for key in _COUNTS:
        if type(state[key]) is not int or state[key] < 0:
            raise _damaged(path, f"has {key} {state[key]!r}, wanted an int >= 0")
    for key in (*_SECTIONS, "products", "accelerations"):
        if not isinstance(state.get(key, {}), Mapping):
            raise _damaged(path, f"has {key} {state[key]!r}, wanted a section with keys")
    named = step_in_name(path)
    if named is not None and state["step"] != named:
        raise _damaged(path, f"has step {state['step']}, wanted {named}")
    return state


def load_part(
    key: str, state: Mapping[str, Any], own: Mapping[str, Any], load: Callable[[Mapping[str, Any]], None]
) -> None:
    """Calls `load` with the section of a checkpoint's values.

    Args:
        key: the section's name.
        state: the checkpoint's values.
        own: what the run would save in this section now, for the kinds of its values.

    Raises:
        ValueError: names the key whose value is of another kind or not finite, or the reason of `load`.
    """
    _check_kinds(state[key], own, key)
    try:
        load(state[key])
    except KeyError as error:
        raise ValueError(f"{STATE} lacks {key}.{error.args[0]}") from error
    except (TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{STATE} has a {key} that cannot be read: {error}") from error


def _check_kinds(saved: Any, own: Any, path: str) -> None:
    # None is a value that is not known yet.
    if saved is None or own is None:
        return
    if wanted := _wanted(saved, own):
        raise ValueError(f"{STATE} has {path} {saved!r}, wanted {wanted}")
    if isinstance(own, Mapping):
        for key in saved.keys() & own.keys():
            _check_kinds(saved[key], own[key], f"{path}.{key}")
    if isinstance(own, Tensor):
        # Where no loss was seen yet, a policy keeps NaN.
        wrong = saved.isinf() if own.isnan().any() else ~saved.isfinite()
        if wrong.any():
            raise ValueError(f"{STATE} has {path} with {int(wrong.sum())} values that are not finite")


def _wanted(saved: Any, own: Any) -> str | None:
    """What kind of value is wanted in place of `saved`; None if it is of the kind of `own`."""
    kinds: tuple[tuple[Any, str], ...] = (
        (Mapping, "a section with keys"),
        (Tensor, "a tensor"),
        (bool, "true or false"),
        (str, "a text"),
        (int | float, "a finite number"),
    )
    for kind, words in kinds:
        if isinstance(own, kind):
            is_right = isinstance(saved, kind) and isinstance(saved, bool) == isinstance(own, bool)
            is_number = is_right and kind == int | float
            return words if not is_right or (is_number and not math.isfinite(saved)) else None
    return None


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {path} is damaged: {STATE} {problem}")
