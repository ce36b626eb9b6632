"""Laws made of laws: mixtures, and stages over the training.

Dims: T timesteps, K parts.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.policies.densities.adaptive import AdaptiveDensity
from speedit_plugins.policies.densities.density import Density
from speedit_plugins.registry import DENSITIES, Config, check_type

Law = Density | AdaptiveDensity
# Builds the law that a config describes; `build_policy` gives it to a density that asks for it.
BuildLaw = Callable[[str | Config], Law]


class Composed(AdaptiveDensity):
    """A table made of the tables of other laws, and made anew when one of them changes.

    Args:
        laws: fixed or adaptive, K of them.
        combine: from their tables (T,), in this order, to a table (T,).

    Example:
        >>> halves = [Density(torch.tensor([1.0, 0.0])), Density(torch.tensor([0.0, 1.0]))]
        >>> Composed(halves, lambda tables: tables[0] + tables[1]).density().table.tolist()
        [0.5, 0.5]
    """

    def __init__(self, laws: Sequence[Law], combine: Callable[[Sequence[Tensor]], Tensor]) -> None:
        self._laws = laws
        self._adaptive = {n: law for n, law in enumerate(laws) if isinstance(law, AdaptiveDensity)}
        self._combine = combine

    @property
    def needs_data(self) -> bool:
        """Whether one of the laws does."""
        return any(law.needs_data for law in self._adaptive.values())

    @property
    def is_ready(self) -> bool:
        """Whether all of the laws are."""
        return all(law.is_ready for law in self._adaptive.values())

    @property
    def differs_by_rank(self) -> bool:
        """Whether one of the laws does."""
        return any(law.differs_by_rank for law in self._adaptive.values())

    @property
    def needs_every_timestep(self) -> bool:
        """Whether one of the laws does."""
        return any(law.needs_every_timestep for law in self._adaptive.values())

    @property
    def learns(self) -> bool:
        """Whether one of the laws does."""
        return any(law.learns for law in self._adaptive.values())

    @property
    def follows_steps(self) -> bool:
        """Whether one of the laws does."""
        return any(law.follows_steps for law in self._adaptive.values())

    def density(self) -> Density:
        tables = [law.table if isinstance(law, Density) else law.density().table for law in self._laws]
        return Density(self._combine(tables))

    def observe(self, data: Tensor) -> bool:
        return any([law.observe(data) for law in self._adaptive.values()])

    def update(self, index: Tensor, loss: Tensor) -> bool:
        return any([law.update(index, loss) for law in self._adaptive.values()])

    def advance(self, step: int) -> bool:
        return any([law.advance(step) for law in self._adaptive.values()])

    def state_dict(self) -> dict[str, Any]:
        return {"laws": {str(n): law.state_dict() for n, law in self._adaptive.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for n, law in self._adaptive.items():
            law.load_state_dict(state["laws"][str(n)])


class Stages(Composed):
    """One law after the other: law k until step `until[k]`, the last one from there on.

    Args:
        laws: K >= 2.
        until: K - 1 rising numbers of training steps, > 0.
        blend: steps over which a law turns into the next, evenly, before its `until`; >= 0.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> clean, noisy = Density(torch.tensor([1.0, 0.0])), Density(torch.tensor([0.0, 1.0]))
        >>> law = Stages([noisy, clean], until=[10], blend=4)
        >>> law.advance(7)  # a quarter of the blend from step 6 to 10
        True
        >>> law.density().table.tolist()
        [0.25, 0.75]
    """

    def __init__(self, laws: Sequence[Law], until: Sequence[int], blend: int = 0) -> None:
        starts = [0, *until]
        if len(laws) < 2 or len(until) != len(laws) - 1 or starts != sorted(set(starts)):
            raise ValueError(
                "stages need two laws or more, and a rising step > 0 for each but the last, got"
                f" {len(laws)} laws and until = {list(until)}"
            )
        shortest = min(b - a for a, b in zip(starts, until, strict=False))
        if not 0 <= blend <= shortest:
            raise ValueError(
                f"stages need blend between 0 and the shortest stage, {shortest} steps, got {blend}"
            )
        super().__init__(laws, self._mixed)
        self._until, self._blend, self._step = list(until), blend, 0

    @property
    def follows_steps(self) -> bool:
        """Always."""
        return True

    def advance(self, step: int) -> bool:
        before, self._step = self._shares(), step
        return super().advance(step) or before != self._shares()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = int(state["step"])
        super().load_state_dict(state)

    def _shares(self) -> list[float]:
        """Share of each law at the present step."""
        now = sum(self._step >= end for end in self._until)
        shares = [0.0] * len(self._laws)
        shares[now] = 1.0
        if self._blend and now < len(self._until):
            done = 1 - (self._until[now] - self._step) / self._blend
            shares[now + 1] = max(0.0, done)
            shares[now] = 1 - shares[now + 1]
        return shares

    def _mixed(self, tables: Sequence[Tensor]) -> Tensor:
        return _mixed(tables, self._shares())


def composed(laws: Sequence[Law], combine: Callable[[Sequence[Tensor]], Tensor]) -> Law:
    """What `Composed` is: a fixed `Density` if all laws are fixed."""
    law = Composed(laws, combine)
    return law if any(isinstance(each, AdaptiveDensity) for each in laws) else law.density()


def mixture(build_law: BuildLaw, *, laws: list[Any], shares: list[Any]) -> Law:
    """A share of each of several laws.

    Shipped by: HunyuanVideo-1.5, 70 % logit-normal and 30 % uniform; LTX-2, 90 % and 10 %.

    Args:
        build_law: given by `build_policy`.
        laws: K >= 2 densities, each a name or a mapping.
        shares: of the draws, K numbers >= 0 with the sum 1.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> law = dict(type="mixture", laws=["logit_normal", "uniform"], shares=[0.7, 0.3])
        >>> policy = build_policy(dict(density=law, weighting="constant"), NoiseSchedule.rectified_flow(4))
        >>> policy.density.round(decimals=3).tolist()
        [0.17, 0.33, 0.33, 0.17]
    """
    parts = [build_law(law) for law in _listed("mixture laws", laws)]
    numbers = _listed("mixture shares", shares)
    for share in numbers:
        check_type("mixture shares", share, float)
    is_whole = len(parts) == len(numbers) >= 2 and abs(sum(numbers) - 1) < 1e-6
    if not (is_whole and all(share >= 0 for share in numbers)):
        raise ValueError(
            "mixture needs two laws or more, and for each a share >= 0, with the sum 1; got"
            f" {len(parts)} laws and shares {numbers}"
        )
    return composed(parts, partial(_mixed, shares=numbers))


def stages(build_law: BuildLaw, *, laws: list[Any], until: list[Any], blend: int = 0) -> Stages:
    """A curriculum: one law after the other, see `Stages`.

    Source: arXiv:2603.12517, logit-normal draws first and uniform ones after.

    Args:
        build_law: given by `build_policy`.
        laws: K >= 2 densities, each a name or a mapping.
        until: K - 1 rising numbers of training steps, > 0.
        blend: steps over which a law turns into the next, before its `until`; >= 0.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> law = dict(type="stages", laws=["logit_normal", "uniform"], until=[1000])
        >>> policy = build_policy(dict(density=law, weighting="constant"), NoiseSchedule.rectified_flow(4))
        >>> policy.advance(1000)
        >>> policy.density.tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    steps = _listed("stages until", until)
    for step in steps:
        check_type("stages until", step, int)
    return Stages([build_law(law) for law in _listed("stages laws", laws)], steps, blend)


def _mixed(tables: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([share * table for share, table in zip(shares, tables, strict=True)]).sum(0)


def _listed(what: str, values: Any) -> list[Any]:
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
        raise ValueError(f"{what} needs a list, got {values!r}")
    return list(values)


DENSITIES.register_module(name="mixture", module=mixture)
DENSITIES.register_module(name="stages", module=stages)
