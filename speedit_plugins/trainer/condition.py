"""What a model is conditioned on, in every part of the trainer.

Dims: B samples.
"""

from collections.abc import Mapping

from torch import Tensor

Condition = Tensor | Mapping[str, Tensor] | None
"""Labels (B,) int64; named tensors (B, ...), such as the features of captions; or nothing."""
