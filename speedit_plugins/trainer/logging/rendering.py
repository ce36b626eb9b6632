"""Pictures of solids and point clouds: shaded, in parallel projection.

Axes: x to the right, y up, z towards the viewer.

Dims: B shapes, R the side of a grid, N points, P the side of a picture, K rays or splats, S steps of a ray.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from speedit_plugins.trainer.data.shapes.normalization import Normalization

BACKGROUND = 255
# Looked at from a little above.
ELEVATION_DEGREES = 20.0
# Half of the width that a picture of a cloud shows; it is scaled to reach 1.
_HALF_WIDTH = 1.2
# Free space around solids, as a share of their own width.
_MARGIN = 0.08
_LIGHT = (-0.40, 0.60, 0.69)
_COLOUR = (118, 184, 248)
_AMBIENT = 0.42
# Share of the light that the farthest part loses.
_FADE = 0.35
# Standard deviations of the data from its mean that a picture's half width of 1 shows. 97 % of the points of
# a normal distribution are within 3.
REACH = 3.0
# The distance of a picture's corners from its middle, in standard deviations.
OUTSIDE = REACH * _HALF_WIDTH * math.sqrt(2)
# A cloud's radius holds this share of its points, so that single points far away do not shrink the picture.
_SHARE_INSIDE = 0.98
# Radius of a point, as a share of a picture's side.
_SPLAT = 0.017


def render_voxels(voxels: Tensor, *, azimuth_degrees: float, size: int) -> Tensor:
    """Pictures of the surface where the voxels, interpolated between their centres, are 0.

    All pictures have the same scale. It depends on the largest solid, and not on the azimuth.

    Args:
        voxels: (B, 1, R, R, R) in [-1, 1], finite, on the CPU.
        azimuth_degrees: how far the shapes are turned about the y axis, from z towards x.
        size: P.

    Returns:
        uint8 (B, P, P, 3).
    """
    turn, reach = _turn(azimuth_degrees), _reach(voxels)
    return torch.stack([_render_solid(solid[None].float(), turn, reach, size) for solid in voxels])


def render_points(
    points: Tensor, *, azimuth_degrees: float, size: int, normalization: Normalization | None = None
) -> Tensor:
    """Pictures of point clouds, each point a small ball. All have the same scale.

    Args:
        points: (B, 3, N), finite, on the CPU, in any units.
        azimuth_degrees: as for voxels.
        size: P.
        normalization: of the data. The pictures show its mean in the middle and `REACH` of its standard
            deviations around it, and cut off what is beyond. None fits the widest cloud, and puts the middle
            of each in the middle.

    Returns:
        uint8 (B, P, P, 3).
    """
    turn = _turn(azimuth_degrees)
    shown = _filling(points.float()) if normalization is None else normalization.apply(points.float()) / REACH
    return torch.stack([_render_cloud(turn @ cloud, size) for cloud in shown])


def distances_from_data(clouds: Tensor, normalization: Normalization) -> Tensor:
    """How far half of each cloud's points are from the data's mean, in its standard deviations, (B,).

    From `OUTSIDE` on, most of the cloud is beyond the edge of its picture, however it is turned.

    Args:
        clouds: (B, 3, N), finite.
        normalization: of the data.
    """
    return normalization.apply(clouds.float()).norm(dim=1).median(dim=1).values


def _turn(azimuth_degrees: float) -> Tensor:
    """Turns a shape about y, then tips its top towards the viewer, (3, 3)."""
    about, tip = math.radians(azimuth_degrees), math.radians(ELEVATION_DEGREES)
    turned = [
        [math.cos(about), 0.0, math.sin(about)],
        [0.0, 1.0, 0.0],
        [-math.sin(about), 0.0, math.cos(about)],
    ]
    tipped = [[1.0, 0.0, 0.0], [0.0, math.cos(tip), -math.sin(tip)], [0.0, math.sin(tip), math.cos(tip)]]
    return torch.tensor(tipped) @ torch.tensor(turned)


def _reach(voxels: Tensor) -> tuple[float, float]:
    """Half of the width and of the depth that the full voxels take at any azimuth, in units of the grid."""
    side = voxels.shape[-1]
    full = (voxels[:, 0] > 0).any(dim=0).nonzero()
    if not len(full):
        return 1.0, 1.0
    # The outer ends of the voxels, from the middle.
    x, y, z = ((2 * full + 1) / side - 1).abs().T + 1 / side
    around = float((x.square() + z.square()).max().sqrt())
    high, tip = float(y.max()), math.radians(ELEVATION_DEGREES)
    width = max(around, high * math.cos(tip) + around * math.sin(tip))
    return width * (1 + _MARGIN), high * math.sin(tip) + around * math.cos(tip)


def _render_solid(solid: Tensor, turn: Tensor, reach: tuple[float, float], size: int) -> Tensor:
    """One picture, uint8 (P, P, 3), of a solid (1, 1, R, R, R)."""
    half_width, half_depth = reach
    voxel, pixel = 2 / solid.shape[-1], 2 * half_width / size
    padded = functional.pad(solid, (1,) * 6, value=-1.0)
    # Half a voxel per step, from the viewer away.
    depth = torch.arange(half_depth + voxel, -half_depth - voxel, -voxel / 2)
    # Few rays find where there is something; pixels elsewhere are background.
    every = max(1, min(4, int(voxel / pixel)))
    rough = _along_rays(padded, _pixels(size, half_width, every), depth, turn).amax(dim=-1) > -1
    wide = functional.max_pool2d(rough.reshape(1, 1, -(-size // every), -1).float(), 3, stride=1, padding=1)
    wide = wide.repeat_interleave(every, dim=2).repeat_interleave(every, dim=3)[0, 0, :size, :size]
    is_near = wide.flatten() > 0
    where = _pixels(size, half_width)[is_near]  # (K, 2)
    picture = torch.full((size * size, 3), BACKGROUND, dtype=torch.uint8)
    found = _along_rays(padded, where, depth, turn)  # (K, S)
    is_inside = found > 0
    is_hit = is_inside.any(dim=-1)
    step = torch.where(is_hit, is_inside.int().argmax(dim=-1), found.argmax(dim=-1))
    value = found.gather(-1, step[:, None])[:, 0]
    before = found.gather(-1, (step - 1).clamp(min=0)[:, None])[:, 0]
    # Between the last place outside and the first inside, where a straight line is 0.
    back = torch.where(is_hit, (value / (value - before).clamp(min=1e-6)).clamp(0, 1), 0.0)
    place = torch.cat([where, (depth[step] + back * voxel / 2)[:, None]], dim=1)  # (K, 3)
    slope = _slopes(padded, place @ turn, voxel) @ turn.T
    # A pixel at an edge of the outline is partly covered, by how far inside or outside of the edge it is.
    beyond = found.amax(dim=-1) / (slope.norm(dim=-1) * pixel).clamp(min=1e-6)
    cover = torch.where(is_hit, 1.0, (0.5 + beyond).clamp(0, 1))
    normal = functional.normalize(-slope, dim=-1)
    picture[is_near] = _coloured(normal, place[:, 2] / half_depth, cover)
    return picture.reshape(size, size, 3)


def _pixels(size: int, half_width: float, every: int = 1) -> Tensor:
    """Places (K, 2), right and up, of the middles of blocks of `every` x `every` pixels, row by row."""
    starts = torch.arange(0, size, every)
    across = (starts + every / 2) * (2 * half_width / size) - half_width
    up, right = torch.meshgrid(-across, across, indexing="ij")
    return torch.stack([right.flatten(), up.flatten()], dim=-1)


def _along_rays(padded: Tensor, where: Tensor, depth: Tensor, turn: Tensor) -> Tensor:
    """Values (K, S) at places (K, 2) of a picture and depths (S), of the solid as it is turned."""
    # The inverse of a turn is its transpose, and multiplies rows from the right as the turn itself.
    return _values(padded, (where @ turn[:2])[:, None] + depth[:, None] * turn[2])


def _values(padded: Tensor, place: Tensor) -> Tensor:
    """Interpolated voxels at places (..., 3) of [-1, 1]^3, with the border of -1 around it."""
    side = padded.shape[-1]
    # The grid's last axis comes first.
    where = place.flip(-1) * ((side - 2) / side)
    flat = where.reshape(1, 1, 1, -1, 3)
    values = functional.grid_sample(padded, flat, padding_mode="border", align_corners=False)
    return values.reshape(place.shape[:-1])


def _slopes(padded: Tensor, place: Tensor, voxel: float) -> Tensor:
    """How fast the values rise along each axis at places (..., 3), over a voxel to both sides."""
    steps = torch.eye(3) * voxel
    rises = [_values(padded, place + step) - _values(padded, place - step) for step in steps]
    return torch.stack(rises, dim=-1) / (2 * voxel)


def _coloured(normal: Tensor, depth: Tensor, cover: Tensor) -> Tensor:
    """Colours uint8 (..., 3) of places with these normals (..., 3), depths in [-1, 1] and shares of cover."""
    light = (normal @ functional.normalize(torch.tensor(_LIGHT), dim=0)).clamp(min=0)
    near = (depth.clamp(-1, 1) + 1) / 2
    shade = (_AMBIENT + (1 - _AMBIENT) * light) * (1 - _FADE * (1 - near))
    colour = torch.tensor(_COLOUR, dtype=torch.float32) * shade[..., None]
    mixed = colour * cover[..., None] + BACKGROUND * (1 - cover[..., None])
    return mixed.round().clamp(0, 255).to(torch.uint8)


def _filling(clouds: Tensor) -> Tensor:
    """The clouds (B, 3, N), centred by their medians, with nearly all points of the widest within 1."""
    centred = clouds - clouds.median(dim=2, keepdim=True).values
    radius = float(torch.quantile(centred.norm(dim=1), _SHARE_INSIDE, dim=1).max())
    return centred * (1 / radius if radius > 0 else 1.0)


def _render_cloud(cloud: Tensor, size: int) -> Tensor:
    """One picture, uint8 (P, P, 3), of a cloud (3, N) as the viewer sees it."""
    # Drawn at twice the size, so that the balls' edges are smooth.
    large = 2 * size
    scale = large / (2 * _HALF_WIDTH)
    radius = max(1.5, _SPLAT * large)
    reach = torch.arange(-math.ceil(radius), math.ceil(radius) + 1)
    # Pixels of a ball: column, row from its middle, and the normal there.
    right, down = (part.flatten() for part in torch.meshgrid(reach, reach, indexing="xy"))
    out = 1 - (right / radius) ** 2 - (down / radius) ** 2
    right, down, out = right[out > 0], down[out > 0], out[out > 0].sqrt()
    normals = torch.stack([right / radius, -down / radius, out], dim=-1)  # (K, 3)
    column = ((cloud[0] + _HALF_WIDTH) * scale).floor().long()[:, None] + right
    row = ((_HALF_WIDTH - cloud[1]) * scale).floor().long()[:, None] + down  # (N, K)
    depth = cloud[2][:, None] + out * (radius / scale)
    is_seen = (column >= 0) & (column < large) & (row >= 0) & (row < large)
    # Depth in steps of 1e-4 and the number of the ball's pixel in one integer: the largest is in front.
    steps = ((depth + 10).clamp(0, 20) * 1e4).long()
    number = torch.arange(len(normals)).expand_as(column)
    packed = (steps * len(normals) + number + 1)[is_seen]
    front = torch.zeros(large * large, dtype=torch.int64)
    front.scatter_reduce_(0, (row * large + column)[is_seen], packed, reduce="amax")
    is_hit = front > 0
    normal = normals[(front - 1).clamp(min=0) % len(normals)]
    seen = ((front - 1).clamp(min=0) // len(normals)) / 1e4 - 10
    pixels = _coloured(normal, seen, is_hit.float()).reshape(large, large, 3).movedim(-1, 0)
    small = functional.avg_pool2d(pixels[None].float(), 2)[0].movedim(0, -1)
    return small.round().to(torch.uint8)
