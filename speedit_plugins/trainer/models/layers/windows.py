"""Self-attention within windows of a cube of tokens.

Source: DiT-3D, Mo et al. 2023, arXiv:2307.01831. It takes the windows of ViTDet, Li et al. 2022,
arXiv:2203.16527, to three axes.

Dims: `B` batch, `T` tokens, `D` width, `R` tokens on a side of a window.
"""

from typing import Any

from einops import rearrange
from torch import Tensor

from speedit_plugins.trainer.models.layers.attention import SelfAttention
from speedit_plugins.trainer.models.layers.rotary import Rotation
from speedit_plugins.trainer.models.layers.sequence import WHOLE, WholeTokens


class WindowAttention(SelfAttention):
    """Attention among the R^3 tokens of each window, with the parameters of `SelfAttention`.

    Args:
        hidden_size: D.
        num_heads: heads.
        edge: tokens on a side of the cube, a multiple of `window`.
        window: R.
        options: see `SelfAttention`.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, edge: int, window: int, **options: Any) -> None:
        super().__init__(hidden_size, num_heads, **options)
        if window < 1 or edge % window:
            raise ValueError(
                f"the model needs a window_size that divides its {edge} tokens on a side, got {window}"
            )
        self.edge, self.window = edge, window

    def forward(self, x: Tensor, rotation: Rotation | None = None, split: WholeTokens = WHOLE) -> Tensor:
        """(B, T, D) -> (B, T, D), for the T = edge^3 tokens in row-major order, which no rotation turns."""
        assert rotation is None
        assert split is WHOLE
        side, part = self.edge // self.window, self.window
        sizes = {"x": side, "y": side, "z": side, "p": part, "q": part, "r": part}
        windows = rearrange(x, "b (x p y q z r) d -> (b x y z) (p q r) d", **sizes)
        mixed = super().forward(windows)
        return rearrange(mixed, "(b x y z) (p q r) d -> b (x p y q z r) d", **sizes)
