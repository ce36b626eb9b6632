"""Small models in the registry of Open-Sora 1.1 to 1.3. A config names this module in `custom_imports`.

Each is made by the host's own class, from fewer and narrower layers.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

MODELS = import_module("opensora.registry").MODELS
load_checkpoint = import_module("opensora.utils.ckpt_utils").load_checkpoint
# The width divides by 3 for the place embedding of STDiT2.
SMALL: dict[str, Any] = {"depth": 1, "hidden_size": 48, "patch_size": (1, 4, 4), "num_heads": 2}


def small_stdit(version: str, from_pretrained: str | None = None, **options: Any) -> Any:
    """STDiT2 or STDiT3 with one block, as the host's own function makes the one of size XL/2."""
    module = import_module(f"opensora.models.stdit.{version.lower()}")
    model = getattr(module, version)(getattr(module, f"{version}Config")(**SMALL, **options))
    if from_pretrained is not None:
        load_checkpoint(model, from_pretrained)
    return model


def small_stdit2(**options: Any) -> Any:
    """STDiT2 of version 1.1."""
    return small_stdit("STDiT2", **options)


def small_stdit3(**options: Any) -> Any:
    """STDiT3 of versions 1.2 and 1.3."""
    return small_stdit("STDiT3", **options)


def small_vae_1_2(from_pretrained: str, micro_frame_size: int = 17) -> Any:
    """The pipeline of version 1.2, an image VAE and a temporal one, with few channels and random weights."""
    vae = import_module("opensora.models.vae.vae")
    config = vae.VideoAutoencoderPipelineConfig(
        vae_2d={"type": "VideoAutoencoderKL", "from_pretrained": from_pretrained},
        vae_temporal={
            "type": "VAE_Temporal",
            "filters": 4,
            "num_res_blocks": 1,
            "num_groups": 2,
            "temporal_downsample": (False, True, True),
        },
        micro_frame_size=micro_frame_size,
    )
    return vae.VideoAutoencoderPipeline(config)


def small_vae_1_3(**options: Any) -> Any:
    """The image VAE of version 1.3; it decodes one video without a batch too, as the script gives it."""
    hosts: Any = import_module("opensora.models.vae.vae").VideoAutoencoderKL

    class Unbatched(hosts):
        def decode(self, x: Any, **kwargs: Any) -> Any:
            return super().decode(x[None] if x.ndim == 4 else x)

    return Unbatched(**options)


MODELS.register_module(name="STDiT2-small", module=small_stdit2)
if find_spec("opensora.models.stdit.stdit3") is not None:
    MODELS.register_module(name="STDiT3-small", module=small_stdit3)
    MODELS.register_module(name="OpenSoraVAE_V1_2-small", module=small_vae_1_2)
    MODELS.register_module(name="VideoAutoencoderKL_V1_3", module=small_vae_1_3)
