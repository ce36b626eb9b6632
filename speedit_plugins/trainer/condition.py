"""The type of what a model is conditioned on, for every part of the trainer.

Dims: `B` samples.
"""

from collections.abc import Mapping

from torch import Tensor

Condition = Tensor | Mapping[str, Tensor] | None
"""Labels, int64 (B,); a mapping of tensors (B, ...), such as caption features; or None."""
