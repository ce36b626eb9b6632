import inspect

import pytest
import torch

from speedit_plugins.registry import MODELS, build, check
from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.dit3d import DiT3D
from speedit_plugins.trainer.models.latte import Latte
from speedit_plugins.trainer.models.mdt import MDT, MDTv2
from speedit_plugins.trainer.models.sit import LightningDiT, SiT
from speedit_plugins.trainer.models.sizes import PATCH_SIZES, SIZES

KINDS = {"DiT": DiT, "Latte": Latte, "SiT": SiT, "MDT": MDT, "DiT3D": DiT3D}
NAMES = [f"{kind}-{size}/{patch}" for kind in KINDS for size in SIZES for patch in PATCH_SIZES]
KINDS |= {"LightningDiT": LightningDiT, "MDTv2": MDTv2}
NAMES += [f"LightningDiT-{size}/{patch}" for size in ("B", "L", "XL", "1p0B", "1p6B") for patch in (1, 2)]
NAMES += [f"MDTv2-{size}/2" for size in SIZES]
FIXED = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio")


def test_every_size_has_a_name() -> None:
    assert {name for name in MODELS.module_dict if "/" in name} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_size_takes_what_the_model_takes_but_for_the_sizes(name: str) -> None:
    kind = KINDS[name.partition("-")[0]]
    own = dict(inspect.signature(kind).parameters)
    found = inspect.signature(MODELS.module_dict[name]).parameters
    assert set(found) == set(own) - set(FIXED)
    for key, parameter in found.items():
        assert parameter.annotation is own[key].annotation, key
        assert parameter.default == (32 if key == "input_size" else own[key].default), key


@pytest.mark.parametrize("kind", ["DiT", "Latte"])
def test_a_wrong_argument_is_named(kind: str) -> None:
    name = f"{kind}-S/8"
    for key in FIXED:
        with pytest.raises(
            ValueError, match=rf"model '{name}' has no parameter '{key}'.*; known: attention, "
        ):
            check(MODELS, {"type": name, key: 4})
    with pytest.raises(ValueError, match="has no parameter 'input_sise'; did you mean 'input_size'"):
        check(MODELS, {"type": name, "input_sise": 4})
    with pytest.raises(ValueError, match=f"model '{name}' input_size needs int, got '8'"):
        check(MODELS, {"type": name, "input_size": "8"})


def test_the_other_arguments_reach_the_model() -> None:
    options = {"input_size": 16, "num_frames": 3, "num_classes": 7, "learn_sigma": False, "in_channels": 2}
    with torch.device("meta"):
        model = build(MODELS, {"type": "Latte-S/8", "gradient_checkpointing": True, **options})
    assert isinstance(model, Latte)
    assert model.gradient_checkpointing
    assert {key: getattr(model, key) for key in options} == options
