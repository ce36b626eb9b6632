"""The backbone of point clouds and voxels, against plain loops and its own invariants."""

import inspect
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from speedit_plugins.trainer.models.dit3d import DiT3D
from speedit_plugins.trainer.models.interface import input_shape, num_tokens
from speedit_plugins.trainer.models.layers.positions import sincos_cube
from speedit_plugins.trainer.models.layers.voxels import (
    CubeEmbedder,
    devoxelised,
    voxel_places,
    voxelised,
)
from speedit_plugins.trainer.models.routing import Route

SMALL: dict[str, Any] = {
    "input_size": 8,
    "patch_size": 2,
    "hidden_size": 48,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 5,
}


def randomised(model: nn.Module, *, std: float = 0.1) -> nn.Module:
    """The model with every trained parameter drawn from N(0, std^2)."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return model


def inputs(batch: int = 3, num_points: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    clouds = torch.randn(batch, 3, num_points)
    return clouds, torch.tensor([0, 500, 999])[:batch], torch.tensor([0, 3, 4])[:batch]


def loop_voxelised(features: Tensor, places: Tensor, edge: int) -> Tensor:
    """The means in each voxel, one point after the other."""
    found = torch.zeros(*features.shape[:2], edge, edge, edge, dtype=features.dtype)
    counts = torch.zeros(len(features), edge, edge, edge)
    for sample, point in itertools.product(range(len(features)), range(features.shape[2])):
        x, y, z = (int(torch.round(place)) for place in places[sample, :, point])
        found[sample, :, x, y, z] = found[sample, :, x, y, z] + features[sample, :, point]
        counts[sample, x, y, z] += 1
    return found / counts.clamp(min=1).unsqueeze(1)


def loop_devoxelised(cubes: Tensor, places: Tensor) -> Tensor:
    """The sum over all voxels of their value times the hat functions of the three axes."""
    edge = cubes.shape[2]
    centres = torch.arange(edge, dtype=places.dtype)
    hats = [(1 - (places[:, axis, :, None] - centres).abs()).clamp(min=0) for axis in range(3)]
    return torch.einsum("bcxyz,bnx,bny,bnz->bcn", cubes, *hats)


def test_voxels_and_back_equal_plain_loops_with_their_gradients() -> None:
    torch.manual_seed(0)
    clouds = torch.randn(2, 3, 40, dtype=torch.float64)
    # Twins share a voxel, and a cloud has no extent.
    clouds[:, :, 7] = clouds[:, :, 3]
    clouds[1] = 0.0
    places = voxel_places(clouds, 4)
    assert places.shape == (2, 3, 40)
    assert places.min() >= 0
    assert places.max() <= 3
    assert_close(places[1], torch.full((3, 40), 2.0, dtype=torch.float64), atol=0, rtol=0)
    # The farthest point lies on a sphere of radius V / 2, but for what the cube cuts off.
    centred = clouds[0] - clouds[0].mean(dim=1, keepdim=True)
    far = centred.norm(dim=0).argmax()
    direction = centred[:, far] / centred[:, far].norm()
    assert_close(places[0, :, far], (2 + 2 * direction).clamp(0, 3))
    features = torch.randn(2, 5, 40, dtype=torch.float64, requires_grad=True)
    cubes = voxelised(features, places, 4)
    assert_close(cubes, loop_voxelised(features, places, 4))
    weight = torch.randn_like(cubes)
    (found,) = torch.autograd.grad((cubes * weight).sum(), features)
    (wanted,) = torch.autograd.grad((loop_voxelised(features, places, 4) * weight).sum(), features)
    assert_close(found, wanted)
    cubes = torch.randn(2, 5, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    points = devoxelised(cubes, places)
    assert_close(points, loop_devoxelised(cubes, places))
    weight = torch.randn_like(points)
    (found,) = torch.autograd.grad((points * weight).sum(), cubes)
    (wanted,) = torch.autograd.grad((loop_devoxelised(cubes, places) * weight).sum(), cubes)
    assert_close(found, wanted)
    # An upper face and a corner have no upper neighbour.
    ends = torch.tensor([[[3.0], [3.0], [1.5]]], dtype=torch.float64).expand(2, -1, -1)
    assert_close(devoxelised(cubes, ends)[..., 0], cubes[:, :, 3, 3, 1:3].mean(dim=2))


def test_half_precision_keeps_its_dtype_and_sums_in_float32() -> None:
    # 600 equal points: a sum of 600 in bfloat16, with 8 bits, would stop at 256.
    features = torch.ones(1, 1, 600, dtype=torch.bfloat16)
    places = voxel_places(torch.zeros(1, 3, 600, dtype=torch.bfloat16), 4)
    cubes = voxelised(features, places, 4)
    assert (places.dtype, cubes.dtype) == (torch.float32, torch.bfloat16)
    assert cubes[0, 0, 2, 2, 2] == 1
    assert devoxelised(cubes, places).dtype == torch.bfloat16


def test_tokens_of_cubes_equal_a_convolution_and_positions_their_formula() -> None:
    torch.manual_seed(0)
    embedder = randomised(CubeEmbedder(2, 3, 6)).double()
    x = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    assert_close(embedder(x), embedder.proj(x).flatten(2).mT)
    table = sincos_cube(12, 3)[0].view(3, 3, 3, 12)
    for place in itertools.product(range(3), repeat=3):
        # Two sines and two cosines for each axis, at the frequencies 1 and 1 / 100.
        angles = [(p, p / 100) for p in place]
        wanted = [f(a) for pair in angles for f in (math.sin, math.cos) for a in pair]
        assert_close(table[place], torch.tensor(wanted))
    with pytest.raises(ValueError, match="multiple of 6, got 16"):
        sincos_cube(16, 3)


def test_a_window_attends_within_itself_and_one_as_large_as_the_cube_to_all() -> None:
    torch.manual_seed(0)
    options = {**SMALL, "num_points": 0, "depth": 1}
    plain, whole, windowed = (
        randomised(DiT3D(**options, **windows)).eval()
        for windows in (
            {},
            {"window_size": 4, "window_blocks": (0,)},
            {"window_size": 2, "window_blocks": (0,)},
        )
    )
    for model in (whole, windowed):
        model.load_state_dict(plain.state_dict())
    timestep, label = torch.tensor([30]), torch.tensor([2])
    x = torch.randn(1, 3, 8, 8, 8, requires_grad=True)
    assert_close(whole(x, timestep, label), plain(x, timestep, label), atol=1e-5, rtol=0)
    # Windows of 2 tokens have 4 voxels: a cube of them on its own is such a window. The positions are
    # other ones elsewhere, so it is the one at the origin.
    (gradient,) = torch.autograd.grad(windowed(x, timestep, label)[0, :, :4, :4, :4].sum(), x)
    assert gradient[0, :, :4, :4, :4].abs().min() > 0
    gradient[0, :, :4, :4, :4] = 0
    assert gradient.abs().max() == 0
    corner = DiT3D(**{**options, "input_size": 4}).eval()
    corner.load_state_dict({**plain.state_dict(), "pos_embed": corner.pos_embed})
    assert_close(
        windowed(x, timestep, label)[..., :4, :4, :4],
        corner(x[..., :4, :4, :4], timestep, label),
        atol=1e-5,
        rtol=0,
    )


def test_one_model_takes_points_or_voxels_with_or_without_classes() -> None:
    torch.manual_seed(0)
    x, timestep, label = inputs()
    points = randomised(DiT3D(**SMALL, num_points=50)).eval()
    assert input_shape(points) == (3, 50)
    assert num_tokens(points, x) == 3 * 4**3
    answer = points(x, timestep, label)
    assert answer.shape == x.shape
    # A cloud has no order.
    order = torch.randperm(50)
    assert_close(points(x[:, :, order], timestep, label), answer[:, :, order], atol=1e-5, rtol=0)
    assert points(x[:, :, :7], timestep, label).shape == (3, 3, 7)
    assert not torch.equal(points(x, timestep, label.roll(1)), answer)
    voxels = DiT3D(**{**SMALL, "num_classes": 0}, num_points=0, in_channels=1, learn_sigma=True).eval()
    assert input_shape(voxels) == (1, 8, 8, 8)
    assert voxels.null_label is None
    assert voxels(torch.randn(2, 1, 8, 8, 8), timestep[:2]).shape == (2, 2, 8, 8, 8)
    # The state dict does not depend on the form of the sample.
    twin = DiT3D(**SMALL, num_points=0)
    twin.load_state_dict(points.state_dict())
    # Through the blocks, and with more channels for what is known.
    filled = randomised(DiT3D(**SMALL, num_points=50, extra_channels=2)).eval()
    condition = {"label": label, "extra": torch.randn(3, 2, 50)}
    answer, hidden = filled(x, timestep, condition, hidden_after=1)
    assert (answer.shape, hidden.shape) == (x.shape, (3, 64, 48))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 16}, r"multiple of 6 and of num_heads 4, got 16"),
        ({"input_size": 9}, r"multiple of patch_size 2, got 9"),
        ({"window_size": 3, "window_blocks": (0,)}, r"divides its 4 tokens on a side, got 3"),
        ({"window_size": 2}, r"window_size and window_blocks, or neither, got 2 and \[\]"),
        ({"window_size": 2, "window_blocks": (2,)}, r"window_blocks in \[0, 2\), its depth, got 2"),
        ({"num_points": -1}, r"num_points >= 0 .*, got -1"),
        ({"in_channels": 1}, r"in_channels >= 3, the coordinates of a point, got 1"),
    ],
)
def test_a_wrong_size_is_one_clear_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT3D(**{**SMALL, **changes})


def test_a_wrong_rank_is_one_clear_error_and_windows_have_no_route() -> None:
    x, timestep, label = inputs()
    with pytest.raises(ValueError, match=r"shape \(3, 3, 50\), wanted voxels \(B, 3, 8, 8, 8\); num_points"):
        DiT3D(**SMALL, num_points=0)(x, timestep, label)
    with pytest.raises(ValueError, match=r"\(3, 3, 8, 8, 8\), wanted point clouds \(B, 3, N\); num_points 0"):
        DiT3D(**SMALL)(torch.randn(3, 3, 8, 8, 8), timestep, label)
    assert "rope" not in inspect.signature(DiT3D).parameters
    assert DiT3D(**SMALL).route_depth == 2
    assert DiT3D(**SMALL, window_size=2, window_blocks=(0,)).route_depth is None


def test_tokens_on_a_route_pass_blocks_by_and_a_route_of_none_changes_nothing() -> None:
    torch.manual_seed(0)
    x, timestep, label = inputs()
    model = randomised(DiT3D(**{**SMALL, "depth": 4, "class_dropout_prob": 0.0}, num_points=50)).train()
    plain = model(x, timestep, label)
    model.set_route(Route(2, 3, 0.5))
    assert not torch.allclose(model(x, timestep, label), plain)
