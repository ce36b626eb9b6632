"""What a low-resolution input leaves open about a sample: the part that a super-resolution model is to draw.

Its spectrum gives a centre for the policies of a super-resolution stage, other than that of the samples.

For Gaussian data it is the residual of the best linear prediction of the sample from the input, and its
covariance is that of the sample given the input. Noise augmentation makes the prediction worse, so each
sample's input is noised to a level as in training, and predicted from as is best at that level.

The prediction of a block of factor x factor cells is linear in the 3 x 3 blocks of the input around it, with
the same coefficients everywhere: those of all cells at once would be more than a data set can tell.

Dims: N samples, C channels, F frames (absent for images), h x w cells, b the side of a block, L blocks,
P = 9 C b b values around a block, O = C b b values of a block.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from speedit_plugins.trainer.diffusion.augmentation import NoiseAugmentation

# Enlarged inputs are redundant. Directions with less of the largest variance than this are rounding.
_SMALLEST_SHARE = 2.0**-40


def unexplained(
    samples: Tensor,
    inputs: Tensor,
    augmentation: NoiseAugmentation,
    *,
    factor: int,
    generator: torch.Generator,
) -> Tensor:
    """The samples less their best linear prediction from noised inputs, float32 (N, C, [F,] h, w).

    Args:
        samples: as the model sees them, (N, C, [F,] h, w), on the CPU.
        inputs: the enlarged low-resolution versions without noise, in the samples' shape.
        augmentation: of the training.
        factor: how many times a side was smaller. It gives the side of a block, unless that does not divide
            the sides.
        generator: draws levels and noise.
    """
    mean, input_mean = samples.mean(dim=0), inputs.mean(dim=0)
    levels = augmentation.levels(torch.rand(len(samples), generator=generator))
    predictor = _Predictor.of(samples - mean, inputs - input_mean, math.gcd(factor, *samples.shape[-2:]))
    found = torch.empty_like(samples, dtype=torch.float32)
    for row, (alpha, sigma) in enumerate(zip(*augmentation.scales(levels), strict=True)):
        noise = torch.randn(inputs[row].shape, generator=generator)
        noised = alpha * (inputs[row] - input_mean) + sigma * noise
        found[row] = samples[row] - mean - predictor(noised, float(alpha), float(sigma))
    return found


@dataclass(frozen=True, eq=False)
class _Predictor:
    """The best linear prediction of blocks from noised inputs, by the moments of inputs without noise.

    Args:
        variances: of the inputs around a block along their principal components, (P,).
        components: (P, P), a column each.
        covariances: of the values of a block with these components, (O, P).
        side: b.
    """

    variances: Tensor
    components: Tensor
    covariances: Tensor
    side: int

    @classmethod
    def of(cls, samples: Tensor, inputs: Tensor, side: int) -> "_Predictor":
        """The predictor of samples (N, C, [F,] h, w) with mean 0 from inputs with mean 0."""
        num_blocks, gram, cross = 0, torch.zeros(()), torch.zeros(())
        for sample, given in zip(samples, inputs, strict=True):
            around = _around(given, side)
            gram = gram + around.T @ around
            cross = cross + _blocks(sample, side).T @ around
            num_blocks += len(around)
        variances, components = torch.linalg.eigh(gram / num_blocks)
        smallest = _SMALLEST_SHARE * variances[-1]
        # Without a variance there is nothing to predict from, whatever the noise.
        variances = torch.where(variances > smallest, variances, 0.0)
        covariances = torch.where(variances > 0, cross / num_blocks @ components, 0.0)
        return cls(variances, components, covariances, side)

    def __call__(self, given: Tensor, alpha: float, sigma: float) -> Tensor:
        """Prediction (C, [F,] h, w) from one input in that shape: alpha times it, plus noise of std sigma."""
        total = alpha**2 * self.variances + sigma**2
        weights = alpha * self.covariances / torch.where(total > 0, total, 1.0)
        blocks = _around(given, self.side) @ (weights @ self.components.T).T
        return _whole(blocks, given, self.side)


def _frames(values: Tensor) -> Tensor:
    """An image (C, h, w) as (1, C, h, w), a video (C, F, h, w) as (F, C, h, w), in float64."""
    return (values[None] if values.ndim == 3 else values.movedim(1, 0)).double()


def _blocks(values: Tensor, side: int) -> Tensor:
    """The blocks of an image or video, (L, O)."""
    return functional.unfold(_frames(values), side, stride=side).transpose(1, 2).flatten(0, 1)


def _around(values: Tensor, side: int) -> Tensor:
    """The 3 x 3 blocks around each block, (L, P)."""
    # The outermost cells are repeated, as bilinear enlargement does.
    padded = functional.pad(_frames(values), (side,) * 4, mode="replicate")
    patches = functional.unfold(padded, 3 * side, stride=side)
    return patches.transpose(1, 2).flatten(0, 1)


def _whole(blocks: Tensor, like: Tensor, side: int) -> Tensor:
    """The image or video of these blocks (L, O), in the shape of `like`."""
    num_frames = 1 if like.ndim == 3 else like.shape[1]
    columns = blocks.unflatten(0, (num_frames, -1)).transpose(1, 2)
    frames = functional.fold(columns, like.shape[-2:], side, stride=side)
    return frames[0] if like.ndim == 3 else frames.movedim(0, 1)
