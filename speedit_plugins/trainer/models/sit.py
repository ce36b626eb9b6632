"""SiT, a DiT that predicts a velocity. Source: Ma et al. 2024, arXiv:2401.08740.

The parameters have the names and shapes of willisma/SiT, those of DiT: each code loads the other's state
dicts. The network of the original counts its time from noise, t = 0, to data, t = 1, and predicts x_0 - eps.
A model here is given 1000 times the time of `RectifiedFlow`, which counts from data to noise, and returns
eps - x_0. So the network gets 1 - timestep / 1000, and its output is negated. A released checkpoint samples
as it is, on a `RectifiedFlow`.

Dims: `B` batch, `C` channels, `h`, `w` sides of the input.
"""

from typing import Any, ClassVar

from torch import Tensor

from speedit_plugins.registry import MODELS
from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.sizes import register_sizes, with_defaults

# What a model is given for the time 1, pure noise, of a rectified flow.
_TIMESTEPS = 1000.0


class SiT(DiT):
    """Predicts the velocity eps - x_0 of a rectified flow with a network of willisma/SiT.

    The arguments that are not listed here mean the same as in `DiT`.

    Args:
        variance_channels: the last layer has C more channels, which nothing reads, as in the released
            weights.
        learn_sigma: has to be False.

    Raises:
        ValueError: learn_sigma is True; or see `DiT`.
    """

    predicts = "flow"
    defaults: ClassVar[dict[str, Any]] = {"variance_channels": True, "learn_sigma": False}
    """What differs from DiT's arguments, and the defaults that do."""

    def __init__(self, input_size: int, patch_size: int, **options: Any) -> None:
        options = {**self.defaults, **options}
        variance_channels = options.pop("variance_channels")
        if options["learn_sigma"]:
            raise ValueError(
                f"{type(self).__name__} predicts a velocity and no variance, got learn_sigma true; wanted"
                " diffusion.type RectifiedFlow"
            )
        super().__init__(input_size, patch_size, **options | {"learn_sigma": variance_channels})
        self.learn_sigma, self.out_channels = False, self.in_channels

    def _embedded_time(self, timestep: Tensor) -> Tensor:
        return 1 - timestep / _TIMESTEPS

    def _unpatchify(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """(B, N, P P out_channels) -> (B, C, h, w)."""
        return -super()._unpatchify(x, rows, columns)[:, : self.in_channels]


class LightningDiT(SiT):
    """SiT with RMSNorm, SwiGLU and rotary positions, for latents of 32 channels.

    The parameters have the names, shapes and order of hustvl/LightningDiT with `use_rmsnorm`, `use_swiglu`
    and `use_rope`, as the released weights have them; its `use_qknorm` is `qk_norm` here. There is no
    counterpart of `wo_shift`, which the released weights do not have either. Its `timestep_shift` of 0.3 in
    sampling is a `diffusion.shift` of 1 / 0.3.

    Source: Yao et al. 2025, arXiv:2501.01423.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "in_channels": 32,
        "variance_channels": False,
        "learn_sigma": False,
        "norm": "rms",
        "rope": True,
        "perceptron": "swiglu",
    }


# Source: the table of models in hustvl/LightningDiT, models/lightningdit.py.
_LIGHTNING_SIZES = {
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    "1p0B": {"hidden_size": 1536, "depth": 24, "num_heads": 24},
    "1p6B": {"hidden_size": 1792, "depth": 28, "num_heads": 28},
}

for _model in (SiT, LightningDiT):
    with_defaults(_model, DiT, _model.defaults)
MODELS.register_module(name="SiT", module=SiT)
MODELS.register_module(name="LightningDiT", module=LightningDiT)
register_sizes("SiT", SiT)
register_sizes("LightningDiT", LightningDiT, sizes=_LIGHTNING_SIZES, patch_sizes=(1, 2))
