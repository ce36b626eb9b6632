"""The sections of a config that accelerate a training beside its timesteps. All are off by default.

The documentation is built from this file, as `schema.py` says. Standard library only.
"""

from dataclasses import dataclass
from typing import Literal

from speedit_plugins.trainer.config.sections import limited


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """Contrastive flow matching (arXiv:2506.05350): predictions are kept away from other samples' targets."""

    weight: float = limited(0.0, at_least=0, below=1)
    """Weight of the distance to another sample's target; the paper takes 0.05, 0 is off."""


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Masked training (MDT, arXiv:2303.14389): each batch also passes the model with a part of its tokens."""

    type: Literal["none", "MDT"] = "none"
    """`MDT` adds the loss of a masked pass to that of the full one; the models `MDT` and `MDTv2` have one,
    and are trained with it alone. none is off."""
    ratio: float = limited(0.3, above=0, below=1)
    """Share of the tokens that is masked, at least."""
    spread: float | None = limited(None, at_least=0, below=1)
    """The share of each batch is drawn evenly between `ratio` and `ratio` + `spread`. null is the release's
    choice: 0 for MDT, 0.2 for MDTv2."""


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Token routing (TREAD, arXiv:2501.04765): in training a part of the tokens passes blocks by.

    DiT, SiT, LightningDiT, Latte, TextDiT, TextLatte, PixArt and LatteT2V can; see
    docs/accelerations/routing.md.
    """

    from_: int = 2
    """First block that the tokens pass by, counted from 0; a negative one counts from the end."""
    to: int = -4
    """Last such block, in the same way."""
    keep: float = limited(1.0, above=0, at_most=1)
    """Share of the tokens that goes through these blocks in training; the paper takes 0.5, 1 is off."""


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """Draws the tokens inside the model to features of a teacher."""

    type: Literal["none", "REPA", "SRA"] = "none"
    """`REPA` (arXiv:2410.06940) takes the features of a frozen vision network, `SRA` (arXiv:2505.02831) those
    of a running average of the model at a lower noise level. none is off."""
    teacher: str | None = None
    """REPA's vision network: `embedded`, the embedded EfficientNet-Lite0, or the folder or hub name of a
    vision model of transformers, such as DINOv2, CLIP or SigLIP."""
    teacher_size: int | None = limited(None, at_least=1)
    """Side in pixels that images are resized to for REPA's teacher. null is the size that its image processor
    names; for `embedded` 128."""
    layer: int = limited(8, at_least=1)
    """Number of the block whose output is aligned, counted from 1."""
    weight: float = limited(0.5, above=0)
    """Weight of the mean cosine similarity. The policy's weight of the timestep does not scale it."""
    until: int | None = limited(None, at_least=1)
    """Steps after which the alignment ends (HASTE, arXiv:2505.16792). null keeps it to the end, as does a
    number past the end of the training."""
    projector_width: int | None = limited(None, at_least=1)
    """Inner width of the projector between tokens and features. null is the release's: 2048 for REPA, twice
    the model's width for SRA."""
    teacher_layer: int | None = limited(None, at_least=1)
    """The block of SRA's teacher whose output is aimed at, deeper than `layer`. null is twice `layer`."""
    max_interval: float = limited(0.2, above=0, at_most=1)
    """SRA's teacher sees a noise level that is lower by up to this share of the time from clean to noise."""
    decay: float = limited(0.9999, at_least=0, below=1)
    """Share of SRA's teacher that each step keeps; the rest is the trained weights."""

    @property
    def last_block(self) -> int:
        """Number of the last block whose tokens are compared, counted from 1."""
        return self.layer if self.type == "REPA" else self.teacher_layer or 2 * self.layer
