"""The processes of a run train one model: they need one config, and one version of this package."""

from collections.abc import Mapping, Sequence
from typing import Any

from speedit_plugins.trainer.config.loading import redact
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.validation import as_plain
from speedit_plugins.version import __version__

PACKAGE = "speedit-plugins"

# Each machine may have its own copy of the data, and its own number of cores.
MAY_DIFFER = (
    *(
        f"data.{name}.{key}"
        for name in ("dataset", "validation")
        for key in ("root", "captions_file", "table")
    ),
    "data.num_workers",
    "data.prefetch_factor",
    "allow_download",
)
_NEED = "the processes of a run need one"
_ABSENT = object()


def stated(config: ExperimentConfig) -> dict[str, Any]:
    """What this process says of itself: each key of the config with its value, and the package's version.

    Secrets are redacted.
    """
    keys = _flat(redact(as_plain(config)))
    return {PACKAGE: __version__, **{key: value for key, value in keys.items() if key not in MAY_DIFFER}}


def difference(of_ranks: Sequence[Any]) -> str | None:
    """The first difference between what rank 0 and another rank `stated`; None if there is none."""
    first = of_ranks[0]
    for rank, other in enumerate(of_ranks[1:], start=1):
        # A version without this check exchanges something else first.
        if not isinstance(first, Mapping) or not isinstance(other, Mapping):
            return f"{_NEED} version of {PACKAGE}, rank {rank} has another than rank 0"
        keys = [key for key in {**first, **other} if first.get(key, _ABSENT) != other.get(key, _ABSENT)]
        if keys:
            what = f"version of {PACKAGE}" if keys[0] == PACKAGE else "config"
            values = [repr(of[keys[0]]) if keys[0] in of else "nothing" for of in (first, other)]
            more = f"; {len(keys) - 1} more keys differ" if keys[1:] and keys[0] != PACKAGE else ""
            return f"{_NEED} {what}, got {keys[0]} {values[0]} on rank 0, {values[1]} on rank {rank}{more}"
    return None


def _flat(section: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in section.items():
        key = f"{path}{name}"
        found |= _flat(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return found
