"""The policy: which timesteps a batch is trained on, and how much the loss of each sample counts.

Dims: T timesteps, B batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from speedit_plugins.policies.densities.adaptive import AdaptiveDensity
from speedit_plugins.policies.densities.density import Density
from speedit_plugins.policies.distributed import gather_losses
from speedit_plugins.policies.draws import Iid, Paired, drawing_device
from speedit_plugins.policies.expected_calls import ExpectedCalls
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.weightings.checks import check_weights
from speedit_plugins.policies.weightings.learned import AdaptiveWeighting

Scope = Literal["mse", "loss"]


@dataclass(frozen=True, eq=False)
class TimestepDraw:
    """The timesteps of one batch, and the weight of each sample's loss.

    Args:
        index: index into the schedule, int64 in [0, T), shape (B,).
        time: (index + jitter) / T for models with continuous time, float32 in [0, 1], shape (B,).
        weight: factor on the loss of each sample, float32, >= 0, shape (B,).
        scope: what the weight multiplies. "mse" is the squared error without the variational term, "loss" is
            their sum.
    """

    index: Tensor
    time: Tensor
    weight: Tensor
    scope: Scope = "mse"

    def map(self, change: Callable[[Tensor], Tensor]) -> "TimestepDraw":
        """The draw with each of its tensors changed, such as their shape."""
        return TimestepDraw(change(self.index), change(self.time), change(self.weight), self.scope)


@dataclass(frozen=True, eq=False)
class _DeviceTables:
    upper: Tensor  # cumulative probability, including the index itself, (T,) float64
    density: Tensor  # (T,) float64
    weight: Tensor  # (T,) float32


class TimestepPolicy:
    """A density and a weight for every timestep, and draws that follow them.

    `density` and `weight` are the two tables, float64 (T,). For paired draws, `density` is the limit of large
    batches. `num_steps` is the number of training steps begun so far, and `num_drawn` that of timesteps drawn
    in strata over several steps; both are part of the state. `build_policy` makes a policy from a config.

    Args:
        schedule: the noise schedule that the model is trained on.
        density: a fixed `Density`, or an `AdaptiveDensity`.
        weighting: function from the density table (T,) to the weight table (T,), or an `AdaptiveWeighting`.
            Weights are finite and >= 0 in float32, and > 0 at some timestep that is drawn.
        draw: independent draws (`Iid`, the default) or `Paired` ones.
        name: the policy's name in error messages and reports.
        scope: what the weight multiplies, see `TimestepDraw`.
        stratified: split the distribution into B equally likely strata and draw once from each, in random
            order. Each index still follows the density; the mean over a batch varies less.
        normalize: divide the weights by their mean under the density.

    Raises:
        ValueError: tables of the wrong length or range, or `stratified` with paired draws.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> policy = build_policy("speed", NoiseSchedule.linear(1000))
        >>> policy.density.shape, round(policy.mean_weight, 4)
        (torch.Size([1000]), 0.4965)
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        density: Density | AdaptiveDensity,
        weighting: Callable[[Tensor], Tensor] | AdaptiveWeighting,
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
        self._pairing = draw if draw is not None else Iid()
        if stratified and isinstance(self._pairing, Paired):
            raise ValueError("paired draws cannot be stratified: half of the batch mirrors the other half")
        self._adaptive = None if isinstance(density, Density) else density
        self._base = density if isinstance(density, Density) else density.density()
        self._weighting = weighting
        self.stratified = stratified
        self._normalize = normalize
        self.num_steps = self.num_drawn = 0
        follows_steps = self._adaptive is not None and self._adaptive.follows_steps
        needed = {"update": self.learns, "advance": follows_steps}
        self._expected_calls = ExpectedCalls(*(method for method, is_needed in needed.items() if is_needed))
        self._rebuild()

    def draw(
        self, batch_size: int, *, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> TimestepDraw:
        """Timesteps and weights of one batch, on `device`.

        Draws on the device. It copies tables there if they have changed, and waits for nothing else.

        Args:
            batch_size: B, >= 1.
            device: device of the returned tensors. mps has no float64, so draws for it are made on the CPU.
            generator: random generator on the device that draws. None uses the device's global generator.

        Raises:
            ValueError: `batch_size` < 1, or a generator on another device.

        Warns:
            UserWarning: the policy needs `update` or `advance`, and the loop does not call it. See
                `ExpectedCalls`.

        Example:
            >>> from speedit_plugins import NoiseSchedule, build_policy
            >>> policy = build_policy("speed", NoiseSchedule.linear(1000))
            >>> batch = policy.draw(8, generator=torch.Generator().manual_seed(0))
            >>> batch.index.shape, batch.weight.dtype, batch.scope
            (torch.Size([8]), torch.float32, 'mse')
        """
        return self.draw_at(self.quantiles(batch_size, device, generator), device=device)

    def quantiles(
        self, batch_size: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> Tensor:
        """The random numbers of a draw, for `draw_at`: float64 in [0, 1), shape (B,), on `drawing_device`.

        Args:
            batch_size, device, generator: see `draw`.

        Raises:
            ValueError: `batch_size` < 1, or a generator on another device.

        Example:
            >>> from speedit_plugins import NoiseSchedule, build_policy
            >>> policy = build_policy({"type": "uniform", "stratified": True}, NoiseSchedule.linear(1000))
            >>> (policy.quantiles(4) * 4).long().sort().values.tolist()
            [0, 1, 2, 3]
        """
        if batch_size < 1:
            raise ValueError(f"draw needs batch_size >= 1, got {batch_size}")
        place = drawing_device(device)
        if generator is not None and generator.device.type != place.type:
            raise ValueError(
                f"draw on {torch.device(device)} needs a generator on {place.type}, got one on"
                f" {generator.device}"
            )
        quantile = torch.rand(batch_size, dtype=torch.float64, device=place, generator=generator)
        if not self.stratified:
            return quantile
        # In a random order of the strata, every position of the batch follows the density.
        order = torch.randperm(batch_size, device=place, generator=generator)
        # The sum can round up to batch_size. A quantile of 1 would be past the last index.
        return ((order + quantile) / batch_size).clamp(max=1 - 2**-53)

    def draw_at(self, quantile: Tensor, *, device: torch.device | str = "cpu") -> TimestepDraw:
        """Timesteps and weights on `device`, at random numbers of the caller, such as those of strata.

        Args:
            quantile: float64 in [0, 1), shape (B,), on `drawing_device(device)`: the cumulative probability
                at which each timestep lies.
            device: device of the returned tensors.

        Example:
            >>> from speedit_plugins import NoiseSchedule, build_policy
            >>> policy = build_policy("uniform", NoiseSchedule.linear(1000))
            >>> policy.draw_at(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).index.tolist()
            [250, 500, 750]
        """
        if self._adaptive is not None and not self._adaptive.is_ready:
            raise ValueError(
                f"policy {self.name!r} depends on the data and has seen none: call policy.observe(data)"
                " with the batch, as the model sees it, before each draw"
            )
        self._expected_calls.drawn(self.name)
        target = torch.device(device)
        tables = self._tables_on(quantile.device)
        index = torch.searchsorted(tables.upper, quantile, right=True)
        # The quantile's position inside its bin is uniform too, so the jitter needs no second random number.
        density = tables.density[index]
        jitter = ((quantile - tables.upper[index] + density) / density).clamp(0, 1)
        index, jitter = self._pairing.pair(index, jitter)
        time = ((index + jitter) / self.schedule.num_timesteps).float()
        return TimestepDraw(index.to(target), time.to(target), tables.weight[index].to(target), self.scope)

    def density_for(self, batch_size: int) -> Tensor:
        """Exact distribution of one index of a batch of this size (>= 1), shape (T,) float64.

        It differs from `density` only for paired draws.

        Raises:
            ValueError: `batch_size` < 1.
        """
        if batch_size < 1:
            raise ValueError(f"density_for needs batch_size >= 1, got {batch_size}")
        return self._pairing.marginal(self._base.table, batch_size)

    @property
    def learns(self) -> bool:
        """Whether `update` changes the policy."""
        density_learns = self._adaptive is not None and self._adaptive.learns
        return density_learns or isinstance(self._weighting, AdaptiveWeighting)

    @property
    def needs_data(self) -> bool:
        """Whether the policy cannot draw as it should unless `observe` is called in each training step."""
        return self._adaptive is not None and self._adaptive.needs_data

    @property
    def boundary_index(self) -> int | None:
        """First index past the boundary between the density's areas, None if it has no boundary."""
        return self._base.boundary_index

    @property
    def is_relative(self) -> bool:
        """Whether the density thins a flow host's own law, see `Density`. Any other replaces that law.

        Example:
            >>> from speedit_plugins import NoiseSchedule, build_policy
            >>> schedule = NoiseSchedule.rectified_flow(1000)
            >>> [build_policy(name, schedule).is_relative for name in ("uniform", "speed", "logit_normal")]
            [True, True, False]
        """
        return self._base.is_relative

    @property
    def mean_weight(self) -> float:
        """Mean weight under `density`, >= 0."""
        return float((self.density * self.weight).sum())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"

    def __str__(self) -> str:
        T = len(self.weight)
        if self.boundary_index is not None:
            area = f"boundary {self.boundary_index} of {T} timesteps"
        else:
            below = self.density.cumsum(0)
            low, high = (float((below < share).sum()) / T for share in (0.05, 0.95))
            area = f"nine in ten draws at u = {low:.2f} to {high:.2f}"
        return f"{self.name}: {area}, mean weight {self.mean_weight:.4f}"

    def update(self, index: Tensor, loss: Tensor) -> None:
        """Teaches a learning policy the unweighted losses (B,) at the indices (B,). Others ignore it.

        With several ranks, every rank has to call it: the losses are gathered. Waits for the device once.
        Losses that are not finite are left out.

        Example:
            >>> from speedit_plugins import NoiseSchedule, build_policy
            >>> policy = build_policy({"type": "loss_second_moment", "history": 1}, NoiseSchedule.cosine(2))
            >>> policy.update(torch.tensor([0, 1]), torch.tensor([1.0, 3.0]))
            >>> policy.density.round(decimals=2).tolist()
            [0.25, 0.75]
        """
        self._expected_calls.called("update")
        if self.learns:
            self._learn(*gather_losses(index, loss))

    def _learn(self, index: Tensor, loss: Tensor) -> None:
        """Teaches the losses of all ranks, float64 (N,), finite, at the indices (N,), both on the CPU."""
        changed = self._adaptive is not None and self._adaptive.update(index, loss)
        if isinstance(self._weighting, AdaptiveWeighting):
            changed |= self._weighting.update(index, loss)
        if changed:
            self._rebuild()

    def observe(self, data: Tensor) -> None:
        """Shows the policy the data (B, ...) of this rank that it draws for next, as the model sees them.

        Only laws that depend on the data use it: their size, or what they look like. Call it in each training
        step, before `draw`, on every rank. While `auto` measures, it waits for the device and the ranks.

        Raises:
            ValueError: the data are no floating-point tensor, or have no batch and sample dimensions.

        Example:
            >>> from speedit_plugins import NoiseSchedule, build_policy
            >>> policy = build_policy("uniform", NoiseSchedule.linear(1000))
            >>> policy.observe(torch.randn(8, 3, 32, 32))
            >>> policy.draw(8).index.shape
            torch.Size([8])
        """
        if not isinstance(data, Tensor) or data.ndim < 2 or not data.is_floating_point():
            is_tensor = isinstance(data, Tensor)
            got = f"{data.dtype} of shape {tuple(data.shape)}" if is_tensor else f"a {type(data).__name__}"
            raise ValueError(f"observe needs floating-point data (B, ...), as the model sees them, got {got}")
        if self._adaptive is not None and data.device.type != "meta" and self._adaptive.observe(data):
            self._rebuild()

    def advance(self, step: int | None = None) -> None:
        """Begins a training step: moves a curriculum to this number of finished ones. Others only count.

        Args:
            step: >= 0; None is `num_steps`, the step after the one that was begun last.

        Example:
            >>> from speedit_plugins import NoiseSchedule, build_policy
            >>> policy = build_policy({"type": "clts", "curriculum_steps": 100}, NoiseSchedule.cosine(4))
            >>> policy.advance(100)
            >>> policy.density.round(decimals=2).tolist()
            [0.2, 0.41, 0.3, 0.08]
        """
        self._expected_calls.called("advance")
        step = self.num_steps if step is None else step
        self.num_steps = step + 1
        if self._adaptive is not None and self._adaptive.advance(step):
            self._rebuild()

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs: name, T, the steps begun, and the state of what adapts."""
        learned = self._weighting.state_dict() if isinstance(self._weighting, AdaptiveWeighting) else None
        return {
            "name": self.name,
            "num_timesteps": self.schedule.num_timesteps,
            "num_steps": self.num_steps,
            "num_drawn": self.num_drawn,
            "density": {} if self._adaptive is None else self._adaptive.state_dict(),
            **({} if learned is None else {"weighting": learned}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: the state is from a policy with another name, T or `normalize`.
        """
        own = self.state_dict()
        # Older states have no counts: their trainer passes the step to `advance`.
        state = {"num_steps": 0, "num_drawn": 0, **state}
        if state.keys() != own.keys() or any(state[key] != own[key] for key in ("name", "num_timesteps")):
            others = set(own) ^ set(state)
            keys = f"; keys of only one of them: {sorted(others)}" if others else ""
            raise ValueError(
                f"policy state needs policy {own['name']!r} with T = {own['num_timesteps']},"
                f" got {state.get('name')!r} with T = {state.get('num_timesteps')}{keys}"
            )
        try:
            if self._adaptive is not None:
                self._adaptive.load_state_dict(state["density"])
            elif state["density"]:
                raise KeyError(*state["density"])
            if isinstance(self._weighting, AdaptiveWeighting):
                self._weighting.load_state_dict(state["weighting"])
        except KeyError as error:
            raise ValueError(
                f"policy state {state['name']!r} is of another density or weighting: {error} belongs to one"
                " of them only"
            ) from error
        if self._adaptive is not None or "weighting" in state:
            self._rebuild()
        self.num_steps, self.num_drawn = int(state["num_steps"]), int(state["num_drawn"])

    def _rebuild(self) -> None:
        if self._adaptive is not None:
            self._base = self._adaptive.density()
        self.density = self._pairing.marginal(self._base.table, None)
        weighting = self._weighting
        weigh = weighting.weight if isinstance(weighting, AdaptiveWeighting) else weighting
        self.weight = weigh(self.density)
        shapes = [tuple(self.density.shape), tuple(self.weight.shape)]
        if shapes != [(self.schedule.num_timesteps,)] * 2:
            raise ValueError(
                f"density and weight need shape {tuple(self.schedule.alpha.shape)}, got {shapes}"
            )
        if self._normalize and self.mean_weight > 0:
            self.weight = self.weight / self.mean_weight
        # After the division, since draws return this table.
        check_weights(self.weight, self.density, self.name)
        self._tables: dict[torch.device, _DeviceTables] = {}

    def _tables_on(self, device: torch.device) -> _DeviceTables:
        if device not in self._tables:
            density = self._base.table
            # Cumulative in float64: in float32 the last bin rounds to 0. Dividing by the last value makes it
            # exactly 1, so that every quantile in [0, 1) finds an index.
            upper = density.cumsum(0)
            upper = (upper / upper[-1]).to(device)
            self._tables[device] = _DeviceTables(upper, density.to(device), self.weight.float().to(device))
        return self._tables[device]
