"""Watches that a script noises at the timesteps that its policy drew, in every step.

Between the draw and the script's `add_noise` the noise scheduler has a subclass of its own class. The first
`add_noise` with gradients gives it its own class back. A copy made in between has the scheduler's own class.

Dims: B batch.
"""

import functools
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

# The timesteps (B,) that each watched scheduler is to noise at, and their version: who writes to a tensor in
# place raises it.
_awaited: "WeakKeyDictionary[Any, tuple[Tensor, int]]" = WeakKeyDictionary()


def watch_noising(noise_scheduler: Any, index: Tensor) -> None:
    """Makes the next `add_noise` of this scheduler raise ValueError unless it gets these timesteps (B,).

    A scheduler that is watched already awaits these from now on. One without `add_noise` stays as it is.
    """
    if not hasattr(noise_scheduler, "add_noise"):
        return
    _awaited[noise_scheduler] = index, index._version
    own_class: type = type(noise_scheduler)
    if not hasattr(own_class, "watched_class"):
        noise_scheduler.__class__ = _watched(own_class)


@functools.cache
def _watched(own_class: type) -> type:
    def add_noise(self: Any, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Any:
        # Without gradients this is a validation's, or an img2img sampler's.
        if torch.is_grad_enabled():
            self.__class__ = own_class
            _check(timesteps, *_awaited.pop(self))
        return own_class.add_noise(self, original_samples, noise, timesteps)  # type: ignore[attr-defined]  # of diffusers

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return object.__new__, (own_class,), self.__dict__

    members = {
        "watched_class": own_class,
        "add_noise": add_noise,
        "__reduce_ex__": reduce,
        "__module__": own_class.__module__,
        "__doc__": own_class.__doc__,
    }
    return type(own_class.__name__, (own_class,), members)


def _check(timesteps: Tensor, index: Tensor, version: int) -> None:
    # If it is the same tensor and nobody wrote to it, the CPU need not wait for the device.
    if timesteps is index and timesteps._version == version:
        return
    if timesteps.shape != index.shape or not torch.equal(timesteps.to(index), index):
        raise ValueError(
            "the script noises at other timesteps than the policy drew: it changes them in between, or"
            f" repeats them; drew {index.tolist()[:8]}, got {timesteps.tolist()[:8]}"
        )
    if index._version != version:
        raise ValueError("the script writes to the timesteps that the policy drew: take a copy of them")
