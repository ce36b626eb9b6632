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
