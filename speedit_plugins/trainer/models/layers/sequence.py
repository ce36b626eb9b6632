"""Sequence parallelism: the ranks of a group each hold a part of the tokens of the same samples.

Around an attention the ranks exchange tokens for heads: each then has all tokens of a part of the heads.
Every other layer looks at one token alone. Source: DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509.

A model takes its part of the tokens before its first block, and all ranks get the whole prediction after its
last layer. So every rank has the same loss, and the gradient of each weight is a sum over the tokens of the
rank. `TokenSplit.whole` multiplies the gradient of its part by the number of ranks in the group: then the
average over all ranks, which data-parallel training takes anyway, is the gradient of the mean loss.

Dims: `B` samples, `F` frames (absent for images), `N` tokens of a frame, `n` those of this rank, `D` width,
`P` ranks of a group, `H` heads, `h` = H / P, `K` width of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from speedit_plugins.trainer.models.layers.rotary import Rotation

# Where the tokens are among the dims of (B, [F,] N, D), and of a rotation (N, K).
_TOKENS = -2


class SequenceGroup:
    """The ranks that share samples.

    Attributes:
        rank: place of this process in the group, in [0, P).
        size: P.
        sent_bytes: what this rank has sent to others of the group so far, forward and backward.

    Args:
        group: of torch.distributed.
    """

    def __init__(self, group: "dist.ProcessGroup") -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent_bytes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "SequenceGroup":
        """Itself: a copied model is on the same ranks."""
        return self


class WholeTokens:
    """All tokens on this rank."""

    def part(self, x: Tensor) -> Tensor:
        """This rank's tokens of all: (..., N, D) -> (..., n, D)."""
        return x

    def whole(self, x: Tensor) -> Tensor:
        """All tokens, on every rank of the group: (..., n, D) -> (..., N, D)."""
        return x

    def attend(self, kernel: Callable[[Tensor], Tensor], qkv: Tensor) -> Tensor:
        """The attention of this rank's tokens to all: (B, n, 3, H, K) -> (B, n, H, K)."""
        return kernel(qkv)

    def rotation(self, rotation: Rotation | None) -> Rotation | None:
        """The rotation of this rank's tokens, from that of all."""
        return rotation


WHOLE = WholeTokens()


@dataclass(frozen=True)
class TokenSplit(WholeTokens):
    """The tokens of a sample, or of a frame, split over the ranks of a group in their order.

    Args:
        group: the ranks.
        counts: n of each rank.
    """

    group: SequenceGroup
    counts: tuple[int, ...]

    def part(self, x: Tensor) -> Tensor:
        first = sum(self.counts[: self.group.rank])
        # A view would keep all tokens in memory for the backward pass.
        return x.narrow(_TOKENS, first, self._own).clone(memory_format=torch.contiguous_format)

    def whole(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Whole.apply(x, self))

    def attend(self, kernel: Callable[[Tensor], Tensor], qkv: Tensor) -> Tensor:
        own = (self._own,) * self.group.size
        sent = rearrange(qkv, "b n three (p h) k -> (p n) b three h k", p=self.group.size)
        received = _exchanged(sent, self.group, own, self.counts)  # (N, B, 3, h, K)
        mixed = kernel(received.transpose(0, 1))  # (B, N, h, K)
        returned = _exchanged(mixed.transpose(0, 1), self.group, self.counts, own)  # (P n, B, h, K)
        return rearrange(returned, "(p n) b h k -> b n (p h) k", p=self.group.size)

    def rotation(self, rotation: Rotation | None) -> Rotation | None:
        return None if rotation is None else Rotation(*map(self.part, rotation))

    @property
    def _own(self) -> int:
        return self.counts[self.group.rank]


class Splittable(Protocol):
    """A model whose tokens can be split over ranks.

    Attributes:
        split_heads: H, which the size of a group must divide; None if its tokens cannot be split.
        sequence: the group that shares samples in training; None is this rank alone.
    """

    split_heads: int | None
    sequence: SequenceGroup | None


def split_of(model: Any, num_tokens: int) -> WholeTokens:
    """How a model's forward pass splits so many tokens. It does so in training alone.

    The first ranks have one token more where they do not divide evenly.

    Raises:
        ValueError: there are fewer tokens than ranks.
    """
    group = model.sequence if model.training else None
    if group is None:
        return WHOLE
    least, more = divmod(num_tokens, group.size)
    if not least:
        raise ValueError(
            f"sequence_parallel: wanted at most as many processes as a sample has tokens, {num_tokens}, got"
            f" {group.size}"
        )
    return TokenSplit(group, tuple(least + (rank < more) for rank in range(group.size)))


def check_splits(model: nn.Module, size: int) -> None:
    """Nothing, if groups of so many ranks can share the model's samples.

    Raises:
        ValueError: the model's tokens cannot be split, or its heads not evenly.
    """
    heads = getattr(model, "split_heads", None)
    if heads is None:
        raise ValueError(
            f"sequence_parallel: the tokens of {type(model).__name__} cannot be split; wanted DiT, SiT,"
            " LightningDiT, Latte, TextDiT, TextLatte, PixArt or LatteT2V, or sequence_parallel 1"
        )
    if heads % size:
        raise ValueError(
            f"sequence_parallel: wanted a divisor of the model's {heads} heads, which the processes share"
            f" evenly, got {size}"
        )


@contextmanager
def whole_tokens(model: nn.Module) -> Iterator[None]:
    """A context in which a model does not split its tokens, in training mode either."""
    group = getattr(model, "sequence", None)
    if group is None:
        yield
        return
    shared = cast(Splittable, model)
    shared.sequence = None
    try:
        yield
    finally:
        shared.sequence = group


class _Exchange(torch.autograd.Function):
    """Sends the first rows to the first rank, and so on; the gradient goes the other way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: SequenceGroup, sent: Sequence[int], received: Sequence[int]
    ) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return _all_to_all(x, group, sent, received)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(gradient, ctx.group, ctx.received, ctx.sent), None, None, None


def _exchanged(x: Tensor, group: SequenceGroup, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Rows of all ranks for this one. `sent` and `received` are numbers of rows, by rank."""
    return cast(Tensor, _Exchange.apply(x, group, sent, received))


def _all_to_all(x: Tensor, group: SequenceGroup, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    x = x.contiguous()
    found = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(found, x, list(received), list(sent), group=group.group)
    group.sent_bytes += (len(x) - sent[group.rank]) * x[:1].nbytes
    return found


class _Whole(torch.autograd.Function):
    """Gathers the tokens. The gradient of this rank's part is P times that of the whole, see above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: TokenSplit) -> Tensor:
        ctx.split = split
        group, longest = split.group, max(split.counts)
        own = x.movedim(_TOKENS, 0)  # (n, ..., D)
        # A collective needs the same shape on all ranks: pad to the longest, and cut afterwards.
        padded = torch.cat([own, own.new_zeros(longest - len(own), *own.shape[1:])])
        found = [torch.empty_like(padded) for _ in split.counts]
        dist.all_gather(found, padded, group=group.group)
        group.sent_bytes += (group.size - 1) * padded.nbytes
        parts = [part[:count] for part, count in zip(found, split.counts, strict=True)]
        return torch.cat(parts).movedim(0, _TOKENS).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.split.part(gradient) * ctx.split.group.size, None
