"""The method as one object: which timesteps a batch trains on, and how much each loss counts.

Dims: T timesteps, B batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from speedit_plugins.policies.densities import AdaptiveDensity, Density
from speedit_plugins.policies.draws import Iid, Paired
from speedit_plugins.policies.schedule import NoiseSchedule

Scope = Literal["mse", "loss"]


@dataclass(frozen=True, eq=False)
class TimestepDraw:
    """One batch of timesteps.

    Args:
        index: row of the schedule, int64 in [0, T), shape (B,).
        time: (index + jitter) / T for hosts with continuous time, float32 in [0, 1], shape (B,).
        weight: factor on the per-sample loss, float32 >= 0, shape (B,).
        scope: what the weight multiplies: "mse" leaves the variational term alone, "loss" is all of it.
    """

    index: Tensor
    time: Tensor
    weight: Tensor
    scope: Scope = "mse"


@dataclass(frozen=True, eq=False)
class _DeviceTables:
    upper: Tensor  # cumulative probability up to and with each index, (T,) float64
    density: Tensor  # (T,) float64
    weight: Tensor  # (T,) float32


class TimestepPolicy:
    """Two tables over the schedule, `density` and `weight`, and the draw that follows them.

    Args:
        schedule: the noise schedule of the host or process.
        density: a fixed `Density`, or one that follows the training.
        weighting: density table (T,) -> weight table (T,), finite and >= 0.
        draw: how a batch is drawn from the density.
        name: what error messages and reports call the policy.
        scope: what the weight multiplies, see `TimestepDraw`.
        stratified: one draw from each of B equally likely strata in random order: the same marginal law, a
            lower variance of batch means.
        normalize: divide the weights by their mean under the density.

    Raises:
        ValueError: tables of the wrong length or range, or `stratified` with a paired draw.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        density: Density | AdaptiveDensity,
        weighting: Callable[[Tensor], Tensor],
        *,
        draw: Iid | Paired | None = None,
        name: str = "custom",
        scope: Scope = "mse",
        stratified: bool = False,
        normalize: bool = False,
    ) -> None:
        if scope not in ("mse", "loss"):
            raise ValueError(f"scope needs 'mse' or 'loss', got {scope!r}")
        self.schedule = schedule
        self.name = name
        self.scope: Scope = scope
        self._law = draw if draw is not None else Iid()
        if stratified and isinstance(self._law, Paired):
            raise ValueError("a paired draw cannot be stratified: half of its indices mirror the other half")
        self._adaptive = None if isinstance(density, Density) else density
        self._base = density if isinstance(density, Density) else density.density()
        self._weighting = weighting
        self.stratified = stratified
        self._normalize = normalize
        self._rebuild()

    def draw(
        self, batch_size: int, *, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> TimestepDraw:
        """Timesteps of one batch, drawn on `device` without a host-device synchronisation.

        Args:
            batch_size: B, >= 1.
            device: where the tensors lie. A device without float64 (mps) draws on the CPU and copies.
            generator: of the drawing device; None is that device's global one.

        Raises:
            ValueError: `batch_size` < 1, or a generator of another device.
        """
        if batch_size < 1:
            raise ValueError(f"draw needs batch_size >= 1, got {batch_size}")
        target = torch.device(device)
        place = torch.device("cpu") if target.type == "mps" else target
        if generator is not None and generator.device.type != place.type:
            raise ValueError(
                f"draw on {target} needs a generator on {place.type}, got one on {generator.device}"
            )
        tables = self._tables_on(place)
        quantile = self._quantiles(batch_size, place, generator)
        index = torch.searchsorted(tables.upper, quantile, right=True)
        # What is left of the quantile inside its bin is uniform too: the jitter needs no second draw.
        density = tables.density[index]
        jitter = ((quantile - tables.upper[index] + density) / density).clamp(0, 1)
        index, jitter = self._law.pair(index, jitter)
        time = ((index + jitter) / self.schedule.num_timesteps).float()
        return TimestepDraw(index.to(target), time.to(target), tables.weight[index].to(target), self.scope)

    def density_for(self, batch_size: int) -> Tensor:
        """Exact marginal law of an index drawn in a batch of this size (>= 1), shape (T,) float64."""
        if batch_size < 1:
            raise ValueError(f"density_for needs batch_size >= 1, got {batch_size}")
        return self._law.marginal(self._base.table, batch_size)

    @property
    def boundary_index(self) -> int | None:
        """First index past the boundary between the density's areas; None where it knows none."""
        return self._base.boundary_index

    @property
    def mean_weight(self) -> float:
        """E[weight] under `density`."""
        return float((self.density * self.weight).sum())

    def __str__(self) -> str:
        area = "no boundary" if self.boundary_index is None else f"boundary {self.boundary_index}"
        return f"{self.name}: {area} of {len(self.weight)} timesteps, mean weight {self.mean_weight:.4f}"

    def update(self, index: Tensor, loss: Tensor) -> None:
        """Tells a learning policy the unweighted losses (B,) at their indices (B,); else does nothing."""
        if self._adaptive is not None and self._adaptive.update(index, loss):
            self._rebuild()

    def advance(self, step: int) -> None:
        """Tells a curriculum how many training steps (>= 0) are done; else does nothing."""
        if self._adaptive is not None and self._adaptive.advance(step):
            self._rebuild()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the adaptive density's state, and name and T to check it against."""
        state = {} if self._adaptive is None else self._adaptive.state_dict()
        return {"name": self.name, "num_timesteps": self.schedule.num_timesteps, "density": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`.

        Raises:
            ValueError: the state belongs to another policy or T, or to one of another `normalize`.
        """
        own = self.state_dict()
        if state.keys() != own.keys() or any(state[key] != own[key] for key in ("name", "num_timesteps")):
            raise ValueError(
                f"policy state needs policy {own['name']!r} with T = {own['num_timesteps']},"
                f" got {state['name']!r} with T = {state['num_timesteps']}; keys {[*own]}, got {[*state]}"
            )
        if self._adaptive is not None:
            self._adaptive.load_state_dict(state["density"])
            self._rebuild()

    def _rebuild(self) -> None:
        if self._adaptive is not None:
            self._base = self._adaptive.density()
        self.density = self._law.marginal(self._base.table, None)
        self.weight = self._weighting(self.density)
        shapes = [tuple(self.density.shape), tuple(self.weight.shape)]
        if shapes != [(self.schedule.num_timesteps,)] * 2:
            raise ValueError(
                f"density and weight need shape {tuple(self.schedule.alpha.shape)}, got {shapes}"
            )
        if not (torch.isfinite(self.weight).all() and (self.weight >= 0).all()):
            raise ValueError(
                f"policy {self.name!r} needs finite weights >= 0, got {self.weight.min():g} at the least"
            )
        if self._normalize:
            if not self.mean_weight > 0:
                raise ValueError(f"normalize needs a mean weight > 0, got {self.mean_weight:g}")
            self.weight = self.weight / self.mean_weight
        self._tables: dict[torch.device, _DeviceTables] = {}

    def _tables_on(self, device: torch.device) -> _DeviceTables:
        if device not in self._tables:
            density = self._base.table
            # Cumulative in float64: in float32 the last bin rounds to 0. Dividing by the end makes it exactly
            # 1, so that no quantile in [0, 1) falls past the last drawable index.
            upper = density.cumsum(0)
            upper = (upper / upper[-1]).to(device)
            self._tables[device] = _DeviceTables(upper, density.to(device), self.weight.float().to(device))
        return self._tables[device]

    def _quantiles(self, batch_size: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        quantile = torch.rand(batch_size, dtype=torch.float64, device=device, generator=generator)
        if not self.stratified:
            return quantile
        # A random order keeps the marginal of every position in the batch equal to the density.
        order = torch.randperm(batch_size, device=device, generator=generator)
        # The sum can round up to batch_size, and a quantile of 1 lies past the last index.
        return ((order + quantile) / batch_size).clamp(max=1 - 2**-53)
