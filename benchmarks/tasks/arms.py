"""The policies that benchmarks/tasks compares, by name.

A name is a policy's: `uniform`, `speedit`, `spectral`, `auto`; `auto_clamped` is `auto` for a sampler that
clamps. A policy with a centre takes one after "@": `auto@1.5`, or for a super-resolution model `auto@rest`,
the middle of what its input leaves open. Its own centre is the middle of the samples.
"""

import math
from dataclasses import dataclass
from typing import Any

from speedit_plugins.registry import nearest

BASE, AT, REST = "uniform", "@", "rest"
# Name -> the policy's section of a config.
POLICIES: dict[str, dict[str, Any]] = {
    "uniform": {"type": "uniform"},
    "speedit": {"type": "speedit"},
    "spectral": {"type": "spectral"},
    "auto": {"type": "auto"},
    "auto_clamped": {"type": "auto", "clamped": True},
}
CENTRED = ("spectral", "auto", "auto_clamped")


@dataclass(frozen=True)
class Policy:
    """A policy by name. `centre` is the part after "@": a number, `REST`, or "" for the policy's own.

    Raises:
        ValueError: the name is unknown, or the policy has no centre to give, or it is no finite number.
    """

    kind: str
    centre: str = ""

    def __post_init__(self) -> None:
        if self.kind not in POLICIES:
            raise ValueError(
                f"unknown policy {self.kind!r}{nearest(self.kind, POLICIES)}; known: {', '.join(POLICIES)}"
            )
        if self.centre and self.kind not in CENTRED:
            raise ValueError(
                f"{self.kind} has no centre, got {self.name}; wanted one of {', '.join(CENTRED)}"
            )
        if self.centre and self.centre != REST and not _is_finite(self.centre):
            raise ValueError(f"a centre needs a log-SNR or {REST!r}, got {self.name}")

    @classmethod
    def named(cls, name: str) -> "Policy":
        """The policy of a name."""
        kind, at, centre = name.partition(AT)
        if at and not centre:
            raise ValueError(f"a centre needs a log-SNR or {REST!r}, got {name}")
        return cls(kind, centre)

    @property
    def name(self) -> str:
        """The name, such as `auto@rest`."""
        return f"{self.kind}{AT}{self.centre}" if self.centre else self.kind

    def section(self, rest_centre: float | None = None) -> dict[str, Any]:
        """The section of the config. With `REST` it has no mean unless `rest_centre` is given."""
        mean = rest_centre if self.centre == REST else float(self.centre) if self.centre else None
        return POLICIES[self.kind] | ({} if mean is None else {"mean": mean})


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
