"""Samples that are not finite: as uint8 they would be black images that look like a result.

They come from weights that are not finite, from float16, whose largest value is 65,504, and from a guidance
scale that the model does not bear.

Dims: B samples, C channels, F frames (absent for images), H x W pixels.
"""

from pathlib import Path

import torch
from torch import Tensor

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.layouts import plural
from speedit_plugins.trainer.terminal import say


def not_finite(samples: Tensor) -> Tensor:
    """Which of the samples (B, C, [F,] H, W) have a NaN or infinity: bool (B,)."""
    return ~samples.flatten(1).isfinite().all(dim=1)


def of_one_value(samples: Tensor) -> int:
    """How many samples, such as uint8 (B, [F,] H, W, C), have the same value in every pixel and channel.

    An image of a single pixel does not count.
    """
    flat = samples.flatten(1)
    return int((flat == flat[:, :1]).all(dim=1).sum()) if flat.shape[1] > samples.shape[-1] else 0


def crossed(samples: Tensor) -> tuple[Tensor, int]:
    """Samples (B, C, [F,] H, W) with a white cross for each that is not finite, and the number of crosses."""
    bad = not_finite(samples)
    if not bad.any():
        return samples, 0
    height, width = samples.shape[-2:]
    across = torch.arange(height).unsqueeze(1) * width // height  # (H, 1)
    column = torch.arange(width)
    is_cross = (across == column) | (across == width - 1 - column)  # (H, W)
    marked = samples.clone()
    marked[bad] = (2.0 * is_cross - 1).to(samples)
    return marked, int(bad.sum())


def not_finite_message(num_bad: int, num_samples: int, config: ExperimentConfig, source: str | Path) -> str:
    """What happened, and what decides it: precision, guidance and checkpoint.

    Args:
        num_bad: samples that are not finite.
        num_samples: of this many.
        config: the experiment.
        source: the weights that drew them.
    """
    scale = config.guidance_scale
    is_bounded = config.sampler.is_clamped or config.sampler.percentile is not None
    # Points are not in [-1, 1].
    is_clippable = config.encoder["type"] in ("Pixels", "Voxels") and not is_bounded
    remedies = (
        ("precision bf16 or fp32", config.precision == "fp16"),
        ("a guidance_scale nearer to 1", scale > 1),
        ("sampler.clip_sample true", is_clippable),
        ("another checkpoint", True),
    )
    return (
        f"{num_bad} of {num_samples} {plural(config)} are not finite: precision"
        f" {config.precision}, guidance_scale {scale:g}, weights of {source}; wanted"
        f" {' or '.join(name for name, is_open in remedies if is_open)}"
    )


def check_all(samples: Tensor, num_before: int, config: ExperimentConfig, source: str | Path) -> None:
    """Refuses samples of a set that is scored, where black images must not take their place.

    Args:
        samples: (B, C, [F,] H, W).
        num_before: how many were drawn before them.
        config: the experiment.
        source: the weights that drew them.

    Raises:
        ValueError: one of them is not finite.
    """
    if num_bad := int(not_finite(samples).sum()):
        fault = not_finite_message(num_bad, num_before + len(samples), config, source)
        raise ValueError(f"inference stops without a set of samples: {fault}")


def marked(samples: Tensor, config: ExperimentConfig, source: str | Path, *, may_fail: bool) -> Tensor:
    """The samples of a grid, `crossed`; a line says how many are not finite. Shapes stay as they are.

    Args:
        samples: (B, C, [F,] H, W), or shapes.
        config: the experiment.
        source: the weights that drew them.
        may_fail: False goes on also without a single finite sample, as a training does.

    Raises:
        ValueError: no sample is finite, and `may_fail`.
    """
    # What draws shapes marks them.
    shown, num_bad = (samples, int(not_finite(samples).sum())) if config.voxel_size else crossed(samples)
    if num_bad == len(samples) and may_fail:
        raise ValueError(not_finite_message(num_bad, len(samples), config, source))
    if num_bad:
        say(f"warning: {not_finite_message(num_bad, len(samples), config, source)}; a cross marks them")
    return shown
