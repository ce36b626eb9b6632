"""Routes through the networks of diffusers that call their blocks one after the other.

With gradient checkpointing diffusers calls each block through a function that one can choose. Here that
function takes the tokens off the route and puts them back, outside of what is recomputed.

Dims: `B` samples, `F` frames (absent for images), `N` tokens of a frame, `K` of them kept, `D` width.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speedit_plugins.trainer.models.layers.sequence import SequenceGroup, split_of
from speedit_plugins.trainer.models.routing import Passage, Route
from speedit_plugins.trainer.models.text_conditioned.split import SplitTokens
from speedit_plugins.trainer.models.text_conditioned.wrapper import TextConditioned, config_value

# Position of the timestep's modulation among the arguments of a block, after the tokens.
_TIMESTEP = 3


class Routed(TextConditioned):
    """A `TextConditioned` model whose tokens can pass blocks by in training, see `models.routing`.

    Attributes:
        route: None sends all tokens through all blocks.
        earliest_route: number of the first block, counted from 0, that tokens may pass by.
        sequence: the ranks that share samples in training; None is this rank alone.
    """

    route: Route | None = None
    sequence: SequenceGroup | None = None
    # Made where a training splits its tokens.
    _tokens: SplitTokens | None = None
    earliest_route = 0

    @property
    def route_depth(self) -> int:
        """Number of blocks that a route counts: of pairs of blocks, if the network attends to frames too."""
        return len(cast(nn.ModuleList, self.net.transformer_blocks))

    @property
    def split_heads(self) -> int:
        """Heads that the ranks of a `sequence` divide."""
        return int(config_value(self.net, "num_attention_heads"))

    def set_route(self, route: Route | None) -> None:
        """Lets a part of the tokens pass blocks by in training."""
        self.route = route
        cast(Any, self.net).enable_gradient_checkpointing(self._called)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        condition: Mapping[str, Tensor] | None = None,
        *,
        hidden_after: int = 0,
    ) -> Any:
        """See `TextConditioned.forward`. Inside a route, the tokens after a block are those that it saw."""
        is_routed = self.training and torch.is_grad_enabled()
        self._passage = Passage(self.route if is_routed else None)
        self._shape = len(x), x.shape[2] if x.ndim == 5 else 1
        if self.sequence is not None and self._tokens is None:
            self._tokens = SplitTokens(self.net)
        if self._tokens is None:
            return super().forward(x, timestep, condition, hidden_after=hidden_after)
        rows, columns = (side // self.patch_size for side in x.shape[-2:])
        self._tokens.split = split = split_of(self, rows * columns)
        found = super().forward(x, timestep, condition, hidden_after=hidden_after)
        return (found[0], split.whole(found[1])) if hidden_after else found

    def _called(self, block: nn.Module, x: Tensor, *given: Any) -> Tensor:
        """What a block makes of its tokens, which inside the route are a part of all."""
        within = list(cast(nn.ModuleList, self.net.transformer_blocks))
        across = list(getattr(self.net, "temporal_transformer_blocks", ()))
        is_across = block in across
        number = 1 + (across if is_across else within).index(block)
        B, F = self._shape
        if is_across:
            # diffusers repeats the timestep for every place of all tokens, so any K of a sample are alike.
            places = rearrange(given[_TIMESTEP], "(b n) d -> b n d", b=B)[:, : len(x) // B]
            given = (*given[:_TIMESTEP], places.flatten(0, 1), *given[_TIMESTEP + 1 :])
        else:
            x = self._passage.before(number, rearrange(x, "(b f) n d -> b f n d", b=B)).flatten(0, 1)
        if self.gradient_checkpointing:
            x = cast(Tensor, checkpoint(block, x, *given, use_reentrant=False))
        else:
            x = cast(Tensor, block(x, *given))
        if is_across:
            x = self._passage.after(number, rearrange(x, "(b n) f d -> b f n d", b=B))
            return rearrange(x, "b f n d -> (b n) f d")
        # The block across frames ends a pair; images have none.
        if F == 1 or not across:
            x = self._passage.after(number, rearrange(x, "(b f) n d -> b f n d", b=B)).flatten(0, 1)
        return x
