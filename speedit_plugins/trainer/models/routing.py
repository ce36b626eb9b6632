"""A route past the middle blocks: in training, a random part of the tokens passes them by.

Source: TREAD, Krause et al. 2025, arXiv:2501.04765. The choice of the tokens is that of CompVis/tread.

A model that can route has a method `set_route`, and follows a `Passage` through its blocks in each forward
pass. The blocks themselves see fewer tokens and know of no route.

Dims: `B` samples, `F` frames (absent for images), `N` tokens of a frame, `K` of them kept, `D` width.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from speedit_plugins.trainer.models.layers.rotary import Rotation


@dataclass(frozen=True)
class Route:
    """The blocks that a part of the tokens passes by.

    Attributes:
        first: number of the first such block, counted from 1.
        last: number of the last one.
        keep: share of the tokens that goes through them, in (0, 1).
    """

    first: int
    last: int
    keep: float


class Routable(Protocol):
    """A model that can route. None goes back to all tokens in all blocks."""

    def set_route(self, route: Route | None) -> None: ...


def route_of(start: int, end: int, keep: float, *, depth: int, earliest: int = 0) -> Route:
    """The route past the blocks `start` to `end`, both included.

    Args:
        start: first block, counted from 0, as CompVis/tread counts. A negative one counts from the end.
        end: last block, in the same way.
        keep: share of the tokens that goes through the blocks, in (0, 1).
        depth: number of blocks of the model.
        earliest: lowest `start` that the model takes.

    Raises:
        ValueError: the model has no such blocks, or `end` is before `start`.
    """
    first, last = (number + depth if number < 0 else number for number in (start, end))
    if not earliest <= first <= last < depth:
        seen = f", blocks {first} and {last}" if start < 0 or end < 0 else ""
        # The middle half, but behind the earliest.
        middle = max(earliest, depth // 4)
        fitting = f"from {middle} and to {max(middle, depth - 1 - depth // 4)}"
        if middle >= depth:
            fitting = "keep 1, as the model has too few blocks"
        raise ValueError(
            f"routing.from and routing.to: wanted {earliest} <= from <= to < {depth}, the model's blocks, got"
            f" from {start} and to {end}{seen}; wanted such as {fitting}"
        )
    return Route(first + 1, last + 1, keep)


def set_route(model: nn.Module, start: int, end: int, keep: float) -> None:
    """Gives a model the route past its blocks `start` to `end`, see `route_of`.

    Raises:
        ValueError: the model cannot route, or has no such blocks.
    """
    depth = getattr(model, "route_depth", None)
    if depth is None:
        raise ValueError(
            f"routing: {type(model).__name__} has no row of blocks that tokens can pass by; wanted DiT, SiT,"
            " LightningDiT, Latte, TextDiT, TextLatte, PixArt or LatteT2V, or routing null"
        )
    routable: Routable = model  # type: ignore[assignment]  # a model with a route_depth is one
    earliest = getattr(model, "earliest_route", 0)
    routable.set_route(route_of(start, end, keep, depth=depth, earliest=earliest))


class Passage:
    """One forward pass on a route. It decides once which tokens pass by, and gives them back unchanged.

    It is used outside of what gradient checkpointing recomputes, so the backward pass sees the same choice.

    Args:
        route: None leaves all tokens in all blocks.
    """

    def __init__(self, route: Route | None) -> None:
        self._route = route
        self._places: Tensor | None = None
        self._all: Tensor | None = None

    def before(self, number: int, x: Tensor) -> Tensor:
        """The tokens that block `number`, counted from 1, sees: (B, [F,] N, D), or (B, [F,] K, D)."""
        if self._route is None or number != self._route.first:
            return x
        self._places, self._all = chosen(x, self._route.keep), x
        return taken(x, self._places)

    def after(self, number: int, x: Tensor) -> Tensor:
        """The tokens after block `number`: all of them again, (B, [F,] N, D), after the route's last."""
        if self._route is None or number != self._route.last:
            return x
        x, self._places, self._all = self.whole(x), None, None
        return x

    def whole(self, x: Tensor) -> Tensor:
        """All tokens (B, [F,] N, D). Those that pass by have their values from before the route."""
        if self._places is None or self._all is None:
            return x
        return rejoined(self._all, x, self._places)

    def of_tokens(self, rotation: Rotation | None) -> Rotation | None:
        """The rotation of the tokens that a block sees, (B, K, W), from that of all tokens, (N, W)."""
        if rotation is None or self._places is None:
            return rotation
        return Rotation(rotation.cos[self._places], rotation.sin[self._places])


def chosen(x: Tensor, keep: float) -> Tensor:
    """Places of the tokens that a route keeps, int64 (B, K), each sample's drawn by itself.

    A clip keeps the same places in all frames: so its blocks within frames and those across frames both see
    whole rows of tokens. Drawn from torch's global generator of the device.

    Args:
        x: tokens (B, [F,] N, D).
        keep: share that is kept. K is N less the whole part of (1 - keep) N, and at least 1.
    """
    N = x.shape[-2]
    num_kept = max(1, N - math.floor(N * (1 - keep)))
    return torch.rand(x.shape[0], N, device=x.device).argsort(dim=1)[:, :num_kept]


def taken(x: Tensor, places: Tensor) -> Tensor:
    """The tokens at the places (B, K): (B, [F,] N, D) -> (B, [F,] K, D)."""
    return x.gather(-2, _spread(places, x))


def rejoined(x: Tensor, kept: Tensor, places: Tensor) -> Tensor:
    """The tokens x (B, [F,] N, D) with those at the places (B, K) replaced by `kept` (B, [F,] K, D)."""
    return x.scatter(-2, _spread(places, x), kept.to(x.dtype))


def _spread(places: Tensor, x: Tensor) -> Tensor:
    """The places of every number in every frame, (B, [F,] K, D)."""
    between = x.shape[1:-2]
    shaped = places.reshape(len(places), *(1 for _ in between), -1, 1)
    return shaped.expand(-1, *between, -1, x.shape[-1])
