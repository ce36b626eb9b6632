import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from speedit_plugins.registry import MODELS, build
from speedit_plugins.trainer.logging import throughput
from speedit_plugins.trainer.logging.throughput import mfu, mfu_of, peak_flops, training_flops
from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.interface import example_inputs
from speedit_plugins.trainer.models.routing import set_route
from speedit_plugins.trainer.parallel.runtime import Runtime

LATENT = (4, 32, 32)


def small_dit(**options: Any) -> DiT:
    return DiT(8, 2, hidden_size=16, depth=2, num_heads=2, num_classes=3, **options)


# Gflops at 256 x 256 from the DiT paper, arXiv:2212.09748. The paper counts a multiply-add as one.
@pytest.mark.parametrize(
    ("name", "gflops"),
    [("DiT-S/2", 6.06), ("DiT-B/2", 23.01), ("DiT-L/2", 80.71), ("DiT-XL/2", 118.64), ("DiT-XL/8", 7.39)],
)
def test_the_flops_are_three_times_those_of_the_paper(name: str, gflops: float) -> None:
    with torch.device("meta"):
        model = build(MODELS, name)
    counted = training_flops(model, example_inputs(model, 1))
    # The paper also counts norms and activations, less than a hundredth of the total.
    assert counted == pytest.approx(3 * 2 * gflops * 1e9, rel=0.01)


# Each element of a weight costs 2 FLOPs in the forward pass, 2 for its gradient if it is trained, and 2 for
# the gradient of its layer's input if an earlier layer is trained.
@pytest.mark.parametrize(
    ("first", "second", "flops"),
    [
        (True, True, 4 * 8 * 5 + 6 * 5 * 3),
        (False, True, 2 * 8 * 5 + 4 * 5 * 3),
        (True, False, 4 * 8 * 5 + 4 * 5 * 3),
    ],
)
def test_a_product_is_counted_for_each_factor_that_training_asks_for(
    first: bool, second: bool, flops: int
) -> None:
    model = nn.Sequential(nn.Linear(8, 5, bias=False), nn.Linear(5, 3, bias=False))
    model[0].requires_grad_(first)
    model[1].requires_grad_(second)
    assert training_flops(model, (torch.empty(1, 8, device="meta"),)) == flops


def test_tokens_that_pass_blocks_by_are_not_counted() -> None:
    model = DiT(8, 2, hidden_size=16, depth=4, num_heads=2, num_classes=3, gradient_checkpointing=True)

    def flops() -> int:
        return training_flops(model, example_inputs(model, 1))

    whole = flops()
    set_route(model, 1, 1, 0.5)
    one = flops()
    set_route(model, 1, 2, 0.5)
    assert whole - flops() == 2 * (whole - one)
    # 8 of 16 tokens skip the products with 12 matrices of 16 x 16, at 6 FLOPs with the gradients, and more.
    assert whole - one >= 8 * 6 * 12 * 16 * 16
    # All of them, in another order.
    set_route(model, 1, 2, 0.999)
    assert flops() == whole


def test_checkpointing_dropout_and_the_attention_kernel_change_no_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from speedit_plugins.trainer.models.layers import attention

    def count(model: DiT) -> int:
        return training_flops(model, example_inputs(model, 1))

    def refuse(qkv: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a kernel of another package runs on its own device alone")

    plain = count(small_dit())
    assert count(small_dit(gradient_checkpointing=True)) == plain
    monkeypatch.setattr(attention, "_probe", lambda *_: None)
    monkeypatch.setitem(attention.ATTENTION_KERNELS, "xformers", refuse)
    assert count(small_dit(attention="xformers")) == plain


def test_counting_leaves_the_model_as_it_was() -> None:
    model = small_dit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    kernels = [block.attn.kernel for block in model.blocks]
    state = torch.random.get_rng_state()
    training_flops(model, example_inputs(model, 1))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert [block.attn.kernel for block in model.blocks] == kernels
    assert all(parameter.requires_grad for parameter in model.blocks.parameters())
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("Tesla V100-SXM2-32GB", {"fp32": 15.7, "tf32": 15.7, "bf16": None, "fp16": 125}),
        ("Tesla V100-PCIE-16GB", {"fp32": 14, "tf32": 14, "bf16": None, "fp16": 112}),
        ("NVIDIA A100-SXM4-80GB", {"fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312}),
        ("A100-SXM4-40GB", {"bf16": 312}),
        ("NVIDIA A100 80GB PCIe", {"bf16": 312}),
        ("NVIDIA A800-SXM4-80GB", {"bf16": 312}),
        ("NVIDIA H100 80GB HBM3", {"fp32": 67, "tf32": 494.5, "bf16": 989.5}),
        ("NVIDIA H100 PCIe", {"bf16": 756.5}),
        ("NVIDIA H800", {"bf16": 989.5}),
        ("NVIDIA H200", {"bf16": 989.5}),
        ("NVIDIA B200", {"bf16": 2250}),
        ("NVIDIA L4", {"bf16": 121}),
        ("NVIDIA L40S", {"bf16": 362.05}),
        ("NVIDIA A10", {"bf16": 125}),
        ("NVIDIA RTX A6000", {"bf16": 154.8}),
        ("NVIDIA GeForce RTX 3090", {"bf16": 71}),
        ("NVIDIA GeForce RTX 4090", {"fp32": 82.6, "fp16": 165.2}),
    ],
)
def test_known_devices_have_the_dense_peaks_of_their_data_sheets(
    name: str, formats: Mapping[str, float | None]
) -> None:
    for number_format, teraflops in formats.items():
        precision = "fp32" if number_format == "tf32" else number_format
        found = peak_flops(name, precision, allow_tf32=number_format == "tf32")
        assert found == (None if teraflops is None else pytest.approx(teraflops * 1e12))


@pytest.mark.parametrize(
    "name",
    [
        "AMD EPYC",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A10G",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100",
    ],
)
def test_a_device_that_only_resembles_a_known_one_has_no_peak(name: str) -> None:
    assert peak_flops(name, "bf16", allow_tf32=True) is None


def test_no_half_precision_is_slower_than_full_and_no_pattern_shadows_another() -> None:
    for _, fp32, tf32, bf16, fp16 in throughput._PEAKS:
        assert fp32 <= (tf32 or fp32) <= fp16
        assert bf16 in (None, fp16)
    for name in ("H100 80GB HBM3", "H100 PCIe", "H200", "H200 NVL", "L4", "L40", "L40S", "A10", "A40"):
        assert len([pattern for pattern, *_ in throughput._PEAKS if re.fullmatch(pattern, name)]) == 1


def test_utilisation_is_one_when_every_device_computes_at_its_peak() -> None:
    # 4 devices with 8 FLOP/s and 2 FLOPs per sample can do at most 16 samples per second.
    assert mfu(16.0, flops_per_sample=2.0, peak=8.0, num_devices=4) == 1.0
    assert mfu(4.0, flops_per_sample=2.0, peak=8.0, num_devices=4) == 0.25


def test_a_run_has_a_utilisation_on_a_known_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = SimpleNamespace(precision="bf16", allow_tf32=True, num_classes=3)
    on_cuda = Runtime(rank=0, world_size=2, device=torch.device("cuda", 0))
    model = small_dit()
    assert mfu_of(model, config, Runtime()) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H999")
    assert mfu_of(model, config, on_cuda) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    found = mfu_of(model, config, on_cuda)
    assert found is not None
    flops = training_flops(model, example_inputs(model, 1))
    assert found(1e6) == pytest.approx(flops * 1e6 / (2 * 312e12))
