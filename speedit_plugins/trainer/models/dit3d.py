"""DiT-3D, a diffusion transformer for point clouds and for solids of voxels.

Source: Mo et al. 2023, arXiv:2307.01831. The parameters have the names and shapes of DiT-3D/DiT-3D: each
code loads the other's state dicts. A cloud is averaged into a cube of voxels, whose patches are the tokens,
and the predicted cube is interpolated at the points.

A window attends within itself here, as in the paper. In DiT-3D/DiT-3D no block gets a window: its command
line splits `--window_block_indexes` into characters, and no character is the number of a block. So its
weights need `window_size: 0`, whatever they were trained with.

Dims: `B` batch, `C` channels, `N` points, `V` voxels on a side, `P` side of a patch, `T` tokens, `D` width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from einops import rearrange
from torch import Tensor

from speedit_plugins.registry import MODELS
from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.layers.attention import SelfAttention
from speedit_plugins.trainer.models.layers.positions import sincos_cube
from speedit_plugins.trainer.models.layers.voxels import CubeEmbedder, devoxelised, voxel_places, voxelised
from speedit_plugins.trainer.models.layers.windows import WindowAttention
from speedit_plugins.trainer.models.sizes import register_sizes, with_defaults

# Channels of a point that are its coordinates.
COORDINATES = 3


class DiT3D(DiT):
    """Predicts the noise (or another target of the process) of point clouds, or of cubes of voxels.

    A forward pass takes any number of points. A cube always has V voxels on a side.

    The arguments that are not listed here mean the same as in `DiT`.

    Args:
        input_size: V, a multiple of patch_size.
        num_points: points of a cloud that is drawn; 0 makes a model of cubes of voxels.
        in_channels: C. The first three channels of a point are its coordinates.
        hidden_size: D, a multiple of num_heads and of 6.
        window_size: tokens on a side of the windows in which the blocks of `window_blocks` attend; divides
            V / P. 0 has no windows.
        window_blocks: numbers of those blocks, counted from 0.

    Raises:
        ValueError: sizes do not divide, a block is not there, or the attention is unknown or cannot run.
    """

    axes = 3
    embedder_type = CubeEmbedder
    is_of_one_size = True
    """Every cube has `input_size` voxels on a side."""

    def __init__(
        self,
        input_size: int,
        patch_size: int,
        *,
        num_points: int = 2048,
        depth: int,
        window_size: int = 0,
        window_blocks: Sequence[int] = (),
        **options: Any,
    ) -> None:
        _check_windows(window_size, window_blocks, depth)
        if num_points < 0:
            raise ValueError(f"DiT3D needs num_points >= 0 (0: cubes of voxels), got {num_points}")
        options = {**_DEFAULTS, **options}
        if num_points and options["in_channels"] < COORDINATES:
            raise ValueError(
                f"DiT3D needs in_channels >= 3, the coordinates of a point, got"
                f" {options['in_channels']}; wanted num_points 0 for voxels"
            )
        # The constructor of DiT makes the blocks, and asks for these.
        self.window_size, self.window_blocks = window_size, tuple(window_blocks)
        super().__init__(input_size, patch_size, depth=depth, **options)
        self.num_points = num_points

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a sample: (C, N), or (C, V, V, V)."""
        inner = (self.num_points,) if self.num_points else (self.input_size,) * self.axes
        return (self.in_channels, *inner)

    @property
    def split_heads(self) -> int | None:
        """None: its windows need tokens that lie together."""
        return None

    @property
    def route_depth(self) -> int | None:
        """Number of blocks that a route counts; None with windows, which need all tokens."""
        return None if self.window_blocks else super().route_depth

    def forward(
        self, x: Tensor, timestep: Tensor, condition: Condition = None, *, hidden_after: int = 0
    ) -> Any:
        """Prediction for noised shapes.

        Args:
            x: (B, C, N) with any N >= 1, or (B, C, V, V, V) if num_points is 0.
            timestep: (B,), timestep in [0, T) of the process without respacing, integer or fractional.
            condition: int64 labels (B,) in [0, num_classes], or None for an unconditional model. With
                extra_channels it is a mapping of "extra" (B, E, ...) and, if there are classes, "label".
            hidden_after: see `DiT.forward`.

        Returns:
            As x, with C channels; with learn_sigma 2C, the mean channels and then the variance channels. With
            `hidden_after` a pair of it and the tokens after that block, (B, T, D).

        Raises:
            ValueError: a shape is wrong, or labels are missing or not wanted.
        """
        x, c = self._prepared(x, timestep, condition)
        places = None
        if self.num_points:
            places = voxel_places(x[:, :COORDINATES], self.input_size)
            x = voxelised(x, places, self.input_size)  # (B, C, V, V, V)
        x = self.x_embedder(x) + self.pos_embed  # (B, T, D)
        x, hidden = self._through_blocks(x, c, hidden_after=hidden_after)
        x = self._cubes(self.final_layer(x, c))  # (B, out_channels, V, V, V)
        if places is not None:
            x = devoxelised(x, places)  # (B, out_channels, N)
        return x if hidden is None else (x, hidden)

    def _attention_of(self, index: int) -> Callable[..., SelfAttention]:
        if index not in self.window_blocks:
            return SelfAttention
        return partial(WindowAttention, edge=self.input_size // self.patch_size, window=self.window_size)

    def _position_table(self) -> Tensor:
        return sincos_cube(self.pos_embed.shape[2], self.input_size // self.patch_size)

    def _cubes(self, x: Tensor) -> Tensor:
        """(B, T, P P P out_channels) -> (B, out_channels, V, V, V)."""
        side, edge = self.input_size // self.patch_size, self.patch_size
        sizes = {"x": side, "y": side, "z": side, "p": edge, "q": edge, "r": edge}
        return rearrange(x, "b (x y z) (p q r c) -> b c (x p) (y q) (z r)", **sizes)

    def _check_shape(self, x: Tensor) -> None:
        if self.num_points:
            if x.ndim != 3 or x.shape[1] != self.in_channels or not x.shape[2]:
                raise ValueError(
                    f"DiT3D got an input of shape {tuple(x.shape)}, wanted point clouds"
                    f" (B, {self.in_channels}, N); num_points 0 takes voxels"
                )
        elif tuple(x.shape[1:]) != self.sample_shape:
            wanted = ", ".join(map(str, self.sample_shape))
            raise ValueError(
                f"DiT3D got an input of shape {tuple(x.shape)}, wanted voxels (B, {wanted}); num_points takes"
                " point clouds"
            )


def _check_windows(window_size: int, blocks: Sequence[int], depth: int) -> None:
    if bool(window_size) != bool(blocks):
        raise ValueError(
            f"DiT3D needs window_size and window_blocks, or neither, got {window_size} and {list(blocks)}"
        )
    for block in blocks:
        if not 0 <= block < depth:
            raise ValueError(f"DiT3D needs window_blocks in [0, {depth}), its depth, got {block}")


# Those of the original.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "num_classes": 1,
    "learn_sigma": False,
    "perceptron": "gelu_erf",
}
# Source: models/dit3d.py of DiT-3D/DiT-3D. Its L is wider than DiT's, whose 1024 is no multiple of 6.
SIZES_3D = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1152, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}

with_defaults(DiT3D, DiT, _DEFAULTS, without=("rope",))
MODELS.register_module(name="DiT3D", module=DiT3D)
register_sizes("DiT3D", DiT3D, sizes=SIZES_3D)
