"""The sections of a config that accelerate a training beside its timesteps. All are off by default.

The documentation is built from this file, as `schema.py` says. Standard library only.
"""

from dataclasses import dataclass

from speedit_plugins.trainer.config.sections import limited


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """Contrastive flow matching (arXiv:2506.05350): predictions are kept away from other samples' targets."""

    weight: float = limited(0.0, at_least=0, below=1)
    """Weight of the distance to another sample's target; the paper takes 0.05, 0 is off."""
