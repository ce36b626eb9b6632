"""Checks that a script noises at the timesteps that its policy drew, and shows the policy what it noises.

From the draw to the script's `add_noise`, the noise scheduler has a subclass of its own class. Copies of it
have its own class.

Dims: B batch.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from speedit_plugins.hosts.draws.waiting_draws import MAX_WAITING, are_equal


@dataclass(eq=False)
class _Awaited:
    """The timesteps (B,) of a draw, which some `add_noise` must get.

    Args:
        index: the timesteps.
        version: of that tensor; a write in place raises it.
        see: gets the data (B, ...) that are noised at these timesteps.
        others: timesteps that `add_noise` got without gradients in the meantime.
    """

    index: Tensor
    version: int
    see: Callable[[Tensor], None]
    others: Tensor | None = None


# By scheduler, in the order of the draws. Not on the scheduler: its copies and pickles would carry it.
_awaited: "WeakKeyDictionary[Any, list[_Awaited]]" = WeakKeyDictionary()


def watch_noising(noise_scheduler: Any, index: Tensor, see: Callable[[Tensor], None]) -> None:
    """Makes an `add_noise` of this scheduler raise ValueError unless it gets the timesteps (B,) of a draw.

    Several draws may wait; these are one of them now. Other timesteps without gradients are those of a
    validation, and pass. A scheduler without `add_noise` stays as it is.

    Args:
        noise_scheduler: of the script.
        index: the timesteps.
        see: gets the data (B, ...) that are noised at them, once.
    """
    if not hasattr(noise_scheduler, "add_noise"):
        return
    waiting = _awaited.setdefault(noise_scheduler, [])
    waiting.append(_Awaited(index, index._version, see))
    del waiting[:-MAX_WAITING]
    own_class: type = type(noise_scheduler)
    if not hasattr(own_class, "watched_class"):
        noise_scheduler.__class__ = _watched(own_class)


def confirm_noising(noise_scheduler: Any, index: Tensor) -> None:
    """Raises ValueError if this scheduler got only other timesteps since a draw (B,). For the draw's loss."""
    for awaited in _awaited.get(noise_scheduler, []):
        if awaited.index is index and awaited.others is not None:
            raise _other_timesteps(awaited.index, awaited.others)


@functools.cache
def _watched(own_class: type) -> type:
    def add_noise(self: Any) -> Any:
        # A script may have put an `add_noise` of its own on the object. A property comes before that.
        own = vars(self).get("add_noise", getattr(super(_watched(own_class), self), "add_noise", None))
        return functools.partial(_noised, self, own_class, own)

    def put_add_noise(self: Any, own: Any) -> None:
        vars(self)["add_noise"] = own

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return object.__new__, (own_class,), self.__dict__

    members = {
        "watched_class": own_class,
        "add_noise": property(add_noise, put_add_noise),
        "__reduce_ex__": reduce,
        "__module__": own_class.__module__,
        "__doc__": own_class.__doc__,
    }
    return type(own_class.__name__, (own_class,), members)


def _noised(
    scheduler: Any,
    own_class: type,
    add_noise: Any,
    original_samples: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    *others: Any,
    **options: Any,
) -> Any:
    # A script may keep this function for longer than the scheduler is watched.
    waiting = _awaited.get(scheduler, [])
    newest_first = reversed(range(len(waiting)))
    number = next((n for n in newest_first if are_equal(waiting[n].index, timesteps)), None)
    if waiting and number is None and not torch.is_grad_enabled():
        waiting[-1].others = timesteps
    elif waiting:
        # Draws before this one wait no longer: their step ended early.
        awaited = waiting[-1 if number is None else number]
        del waiting[: waiting.index(awaited) + 1]
        if not waiting:
            scheduler.__class__ = own_class
            del _awaited[scheduler]
        _check(timesteps, awaited)
        awaited.see(original_samples)
    return add_noise(original_samples, noise, timesteps, *others, **options)


def _check(timesteps: Tensor, awaited: _Awaited) -> None:
    if not are_equal(awaited.index, timesteps):
        raise _other_timesteps(awaited.index, timesteps)
    if awaited.index._version != awaited.version:
        raise ValueError("the script writes to the timesteps that the policy drew: take a copy of them")


def _other_timesteps(index: Tensor, timesteps: Tensor) -> ValueError:
    return ValueError(
        "the script noises at other timesteps than the policy drew: it changes them in between, or repeats"
        f" them; drew {index.tolist()[:8]}, got {timesteps.tolist()[:8]}"
    )
