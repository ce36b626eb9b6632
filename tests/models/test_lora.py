"""Low-rank adapters on each kind of model."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import TEXT_WIDTH
from torch import Tensor, nn
from torch.testing import assert_close

from speedit_plugins.trainer.models import lora
from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.interface import input_shape
from speedit_plugins.trainer.models.latte import Latte
from speedit_plugins.trainer.models.text_conditioned.latte_t2v import LatteT2V
from speedit_plugins.trainer.models.text_conditioned.pixart import PixArt
from speedit_plugins.trainer.models.text_conditioned.unet import UNet

TEXT: dict[str, Any] = {"text_width": TEXT_WIDTH, "text_length": 5}
SMALL: dict[str, Any] = {"num_layers": 1, "num_heads": 2, "head_dim": 16, **TEXT}
NARROW: dict[str, Any] = {"hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
BUILDERS: dict[str, Any] = {
    "UNet": lambda: UNet(input_size=4, block_out_channels=(32, 32), layers_per_block=1, **TEXT),
    "PixArt": lambda: PixArt(input_size=4, **SMALL),
    "LatteT2V": lambda: LatteT2V(input_size=4, num_frames=3, **SMALL),
    "DiT": lambda: DiT(4, 2, **NARROW),
    "Latte": lambda: Latte(4, 2, num_frames=3, **NARROW),
}
# What a user may name besides the default: every other linear layer of a block.
MORE = {
    "DiT": ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1", "final_layer.linear"],
    "PixArt": ["to_q", "ff.net.2"],
}


def randomised(model: nn.Module, *, seed: int = 0, only_trained: bool = False) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or not only_trained:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def call(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *input_shape(model), generator=generator)
    condition: Any = torch.tensor([0, 2])
    if hasattr(model, "text_width"):
        tokens = torch.randn(2, 5, TEXT_WIDTH, generator=generator)
        condition = {"tokens": tokens, "mask": torch.ones(2, 5, dtype=torch.bool)}
    return model(x, torch.tensor([3, 500]), condition)


@pytest.mark.parametrize("name", BUILDERS)
def test_adapters_alone_are_trained_and_merging_keeps_the_prediction(name: str) -> None:
    model = randomised(BUILDERS[name]())
    names, before = set(model.state_dict()), call(model)
    adapters = lora.add_adapters(model, rank=2, alpha=6)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_A." in key or ".lora_B." in key for key in trained)
    # B starts at zero.
    assert_close(call(model), before, rtol=0, atol=1e-6)
    kept = lora.without_base(model, model.state_dict())
    outside = {"null_tokens", "null_mask"} if hasattr(model, "text_width") else set()
    assert set(kept) == {*trained, *outside}
    randomised(model, seed=2, only_trained=True)
    adapted = call(model)
    assert not torch.allclose(adapted, before, atol=1e-3)
    own = lora.adapted_layers(model)
    assert {layer.scaling["default"] for layer in own.values()} == {3.0}
    lora.merge_adapters(model)
    assert set(model.state_dict()) == names
    assert lora.adapters_of(model) is None
    # W x + B A x against (W + B A) x in float32, summed in another order.
    assert_close(call(model), adapted, rtol=0, atol=1e-4)
    assert adapters.targets == model.lora_targets


@pytest.mark.parametrize("name", MORE)
def test_every_named_layer_gets_an_adapter_with_a_gradient(name: str) -> None:
    model = randomised(BUILDERS[name]())
    lora.add_adapters(model, rank=2, targets=MORE[name])
    randomised(model, seed=2, only_trained=True)
    call(model).square().sum().backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    for target in MORE[name]:
        assert any(f"{target}.lora_A" in key for key in gradients)
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        (
            "UNet",
            ["to_q", "to_qq"],
            "no layer of UNet has a name that ends with 'to_qq'.*attn1.to_q",
        ),
        ("DiT", ["qvk"], "no layer of DiT has a name that ends with 'qvk'"),
        # Its weight is read by a product of our own, past peft's layer.
        ("DiT", ["proj"], "'proj' also names x_embedder.proj, which takes no adapter; wanted a longer name"),
        ("DiT", ["y_embedder.embedding_table"], "no layer of DiT has a name that ends with"),
        ("UNet", ["attn1.to_out"], "no layer of UNet has a name that ends with 'attn1.to_out'"),
    ],
)
def test_a_target_that_is_no_layer_is_refused(name: str, targets: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora.add_adapters(BUILDERS[name](), rank=2, targets=targets)


def test_a_model_without_targets_of_its_own_needs_some() -> None:
    with pytest.raises(ValueError, match=re.escape("lora.targets needs names of layers, got none: Linear")):
        lora.add_adapters(nn.Linear(2, 2), rank=1)


def test_a_missing_peft_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora needs the package peft.*wanted pip install 'speedit"):
        lora.add_adapters(BUILDERS["DiT"](), rank=2)


def test_a_base_is_known_by_its_names_and_values() -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.zeros(2, 2)}
    whole = lora.fingerprint(tensors)
    assert lora.fingerprint(dict(reversed(tensors.items()))) == whole
    # A float16 file of the same values is the same base: the model holds float32.
    assert lora.fingerprint({name: value.half() for name, value in tensors.items()}) == whole
    others = [
        {**tensors, "a": torch.arange(4.0) + 2**-20},
        {"a": tensors["a"], "c": tensors["b"]},
        {**tensors, "b": torch.zeros(4)},
    ]
    assert all(lora.fingerprint(other) != whole for other in others)


def test_a_file_without_a_record_holds_whole_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    adapters = lora.Adapters(2, 4.0, ("to_q",), "abc", "base")
    for name, metadata in (("plain", None), ("adapters", adapters.metadata())):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors", metadata=metadata)
    assert lora.read_adapters(tmp_path / "plain.safetensors") is None
    assert lora.read_adapters(tmp_path / "adapters.safetensors") == adapters
    # Other programs may have a key of the same name.
    for number, foreign in enumerate(("true", "{not json", "[1]", '{"rank": 4}')):
        path = tmp_path / f"foreign_{number}.safetensors"
        save_file({"x": torch.zeros(1)}, path, metadata={lora.RECORD: foreign})
        assert lora.read_adapters(path) is None
