"""A flow host with one function that draws the times of a batch and noises it at them.

The function is `get_noisy_model_input_and_timesteps(args, [noise_scheduler,] latents, noise, device, dtype)`
of sd-scripts (Flux, SD3, Lumina, HunyuanImage, Anima). `element_loss` weighs.

    adapt(library.flux_train_utils, partial(SeparateDraws, "auto"))

The host's own function noises: once for its own draw, and once at the times of the policy. So its random
numbers, its precision and `--ip_noise_gamma` are its own.

Dims: B batch, T rows of the host's noise scheduler.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.draws.host_window import ALL_TIMES
from speedit_plugins.hosts.flow import HostsTime
from speedit_plugins.hosts.separate_draws import SeparateDraws
from speedit_plugins.hosts.trainers.element_loss import losses_of, refuse_second_weights
from speedit_plugins.hosts.trainers.replaced import exchange
from speedit_plugins.policies.policy import TimestepDraw

FUNCTION = "get_noisy_model_input_and_timesteps"
DENSITY = "compute_density_for_timestep_sampling"
# The host's `timestep_sampling` with which sigma is the number that torch.rand returns.
UNIFORM = "uniform"
# sd-scripts counts the timesteps of SD3 in this unit, whatever the scheduler.
NUM_TIMESTEPS = 1000
Noised = tuple[Tensor, Tensor, Tensor]


def adapt(module: ModuleType, draws_of: Callable[..., SeparateDraws]) -> None:
    """Lets a policy draw in a module of sd-scripts, and weigh in its `train_util`.

    Args:
        module: has `get_noisy_model_input_and_timesteps` and `compute_density_for_timestep_sampling`.
        draws_of: makes a `SeparateDraws` with these options. It is called before the first draw.

    Raises:
        ValueError: the module lacks one of the two, or draws by a policy already.
    """
    missing = [name for name in (FUNCTION, DENSITY) if not hasattr(module, name)]
    if missing:
        raise ValueError(f"{module.__name__} has no {' and no '.join(missing)} (sd-scripts 48d368f)")

    def drawing(own: Callable[..., Noised]) -> Callable[..., Noised]:
        batches, signature = NoisyBatches(module, own, draws_of), inspect.signature(own)
        return lambda *args, **kwargs: batches.noised(signature.bind(*args, **kwargs).arguments)

    exchange(module, FUNCTION, drawing)


def adapt_weighting(module: ModuleType, draws_of: Callable[..., SeparateDraws]) -> None:
    """Refuses the weights of a module of sd-scripts that only weighs (Anima's), beside those of a policy."""
    refuse_second_weights(module, losses_of(import_module(f"{module.__package__}.train_util")))


class NoisyBatches:
    """What the replaced function does.

    Args:
        module: of the host.
        own: the host's function.
        draws_of: see `adapt`.
    """

    def __init__(
        self, module: ModuleType, own: Callable[..., Noised], draws_of: Callable[..., SeparateDraws]
    ) -> None:
        self._module, self._own, self._draws_of = module, own, draws_of
        self._losses = losses_of(import_module(f"{module.__package__}.train_util"))
        refuse_second_weights(module, self._losses)
        self._draws: SeparateDraws | None = None
        self._has_scheduler = "noise_scheduler" in inspect.signature(own).parameters
        # Whether the host's last draw was a row of a table, and not a continuous sigma.
        self._draws_rows = False

    def noised(self, given: dict[str, Any]) -> Noised:
        """What the host's function returns for these arguments, at the times of the policy."""
        args = given["args"]
        if not torch.is_grad_enabled() or is_validation(args):
            self._losses.newest = None
            return self._own(**given)
        if self._draws is None:
            self._draws = self._made(args)
        rows = self._rows_of(given)
        clock = HostsTime(
            lambda t: rows.time_of(t) if self._draws_rows else t.float(),
            lambda draw, t: rows.sigma_of(draw, t) if self._draws_rows else draw.time.to(t),
            lambda: self._shift_of(given),
        )
        sigma = self._draws.times(lambda: self._hosts_sigma(given), given["latents"], clock)
        self._losses.newest = self._draws
        return self._at(sigma, rows, given)

    def _made(self, args: Any) -> SeparateDraws:
        if self._has_scheduler:
            return self._draws_of(prediction_type="flow")
        low, high = args.min_timestep, args.max_timestep
        window = (
            ALL_TIMES[0] if low is None else low / NUM_TIMESTEPS,
            ALL_TIMES[1] if high is None else high / NUM_TIMESTEPS,
        )
        # The host's model of SD3 is made one of x_0 before its squared error is taken.
        return self._draws_of(prediction_type="x0", window=window)

    def _rows_of(self, given: dict[str, Any]) -> "Rows":
        if self._has_scheduler:
            return Rows.of_scheduler(given["noise_scheduler"])
        index = torch.arange(NUM_TIMESTEPS, device="cpu")
        return Rows(index / NUM_TIMESTEPS, (index + 0.5) / NUM_TIMESTEPS)

    def _hosts_sigma(self, given: dict[str, Any]) -> Tensor:
        """The sigma (B,) that the host would draw, and nothing else of its random numbers."""
        self._draws_rows = False
        density = getattr(self._module, DENSITY)

        def row(*args: Any, **kwargs: Any) -> Any:
            self._draws_rows = True
            return density(*args, **kwargs)

        # In float32: the host's dtype may keep 8 bits of it.
        given = {**given, "args": changed(given["args"], ip_noise_gamma=None), "dtype": torch.float32}
        with replaced(self._module, **{DENSITY: row}):
            return self._own(**given)[2].flatten()

    def _shift_of(self, given: dict[str, Any]) -> float:
        """The shift s of the host's draws: what is 1/2 without it becomes s / (1 + s)."""
        half = _Torch(rand=lambda size: torch.full(size, 0.5), randn=torch.zeros)
        changes = {"ip_noise_gamma": None} | ({} if self._has_scheduler else NO_WINDOW)
        given = {**given, "args": changed(given["args"], **changes), "dtype": torch.float32}
        with replaced(self._module, **{"torch": half, DENSITY: lambda batch_size, **_: _halves(batch_size)}):
            sigma = float(self._own(**given)[2].flatten()[0])
        return sigma / (1 - sigma)

    def _at(self, sigma: Tensor, rows: "Rows", given: dict[str, Any]) -> Noised:
        """The host's own batch, noised at sigma (B,)."""
        if not self._draws_rows:
            chosen = _Torch(rand=_Once(sigma, torch.rand))
            args = changed(given["args"], timestep_sampling=UNIFORM)
            with replaced(self._module, torch=chosen):
                return self._own(**{**given, "args": args})
        row = rows.row_of(sigma)
        # A scheduler of diffusers counts its rows from noise to data.
        row = len(rows.sigma) - 1 - row if self._has_scheduler else row
        u = (row + 0.5) / len(rows.sigma)
        args = given["args"] if self._has_scheduler else changed(given["args"], training_shift=1, **NO_WINDOW)
        with replaced(self._module, **{DENSITY: lambda **_: u}):
            return self._own(**{**given, "args": args})


NO_WINDOW = {"min_timestep": None, "max_timestep": None}


def is_validation(args: Any) -> bool:
    """Whether sd-scripts makes its validation loss, for which it sets both bounds to one timestep.

    Its gradients are enabled then. A training at one timestep has nothing to draw either.
    """
    low = getattr(args, "min_timestep", None)
    return low is not None and bool(low == getattr(args, "max_timestep", None))


@contextlib.contextmanager
def replaced(module: ModuleType, **members: Any) -> Iterator[None]:
    """A module with other members for a while."""
    before = {name: getattr(module, name) for name in members}
    vars(module).update(members)
    try:
        yield
    finally:
        vars(module).update(before)


class _Torch:
    """torch, with other functions that draw. They take a size."""

    def __init__(self, **drawing: Callable[..., Tensor]) -> None:
        self._drawing = drawing

    def __getattr__(self, name: str) -> Any:
        own = self._drawing.get(name)
        if own is None:
            return getattr(torch, name)

        def drawn(*size: Any, device: Any = None, **options: Any) -> Tensor:
            size = (options.pop("size"),) if "size" in options else size
            shape = size if isinstance(size[0], int) else size[0]
            return own(tuple(shape)).to(device)

        return own if isinstance(own, _Once) else drawn


class _Once:
    """Returns what was chosen at the first call, and calls a function of torch after that."""

    def __init__(self, chosen: Tensor, then: Callable[..., Tensor]) -> None:
        self._chosen: Tensor | None = chosen
        self._then = then

    def __call__(self, *size: Any, **options: Any) -> Tensor:
        chosen, self._chosen = self._chosen, None
        return self._then(*size, **options) if chosen is None else chosen


class Rows:
    """The sigma that a host can draw, if it draws a row of a table.

    Args:
        sigma: rising, (T,), in [0, 1].
        time: which time each row is drawn for, rising, (T,); None is sigma.
    """

    def __init__(self, sigma: Tensor, time: Tensor | None = None) -> None:
        self.sigma = sigma
        self._time = sigma if time is None else time

    @classmethod
    def of_scheduler(cls, scheduler: Any) -> "Rows":
        """The rows of a flow scheduler. It counts from noise to data, and may end with a 0 of no timestep."""
        return cls(scheduler.sigmas[: len(scheduler.timesteps)].float().cpu().flip(0))

    def row_of(self, sigma: Tensor) -> Tensor:
        """The row int64 (B,), on the CPU, with the nearest sigma (B,)."""
        return _nearest(self.sigma, sigma)

    def time_of(self, sigma: Tensor) -> Tensor:
        """Time float32 (B,) of sigma (B,), on its device."""
        return self._time[self.row_of(sigma)].to(sigma.device)

    def sigma_of(self, draw: TimestepDraw, sigma: Tensor) -> Tensor:
        """The sigma (B,) nearest to a draw (B,), in the dtype and on the device of a sigma of the host."""
        return self.sigma[_nearest(self._time, draw.time)].to(sigma)


def _nearest(rising: Tensor, values: Tensor) -> Tensor:
    return torch.searchsorted((rising[1:] + rising[:-1]) / 2, values.float().cpu().contiguous())


def _halves(size: int) -> Tensor:
    return torch.full((size,), 0.5)


def changed(args: Any, **changes: Any) -> Any:
    """A copy of a host's arguments with other values. What it does not have is not added."""
    changed = copy.copy(args)
    for name, value in changes.items():
        if hasattr(changed, name):
            setattr(changed, name, value)
    return changed
