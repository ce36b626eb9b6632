import importlib
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.testing import assert_close

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_a_missing_checkout_is_named(load: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkout of facebookresearch/DiT: .*models.py is not a file"):
        load("original_dit").load_original(tmp_path)


def test_the_stand_in_layers_equal_torch_modules(load: object) -> None:
    original: ModuleType = load("original_dit")
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12)
    ours, theirs = (
        original.Attention(12, num_heads=3, qkv_bias=True),
        nn.MultiheadAttention(12, 3, batch_first=True),
    )
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
        }
    )
    # Float32 sums of 12 products.
    assert_close(ours(x), theirs(x, x, x)[0], atol=1e-6, rtol=0)
    mlp = original.Mlp(12, 20, act_layer=nn.ReLU, drop=0.0)
    assert torch.equal(mlp(x), nn.Sequential(mlp.fc1, nn.ReLU(), mlp.fc2)(x))
    patches = original.PatchEmbed(4, 2, 3, 12)
    assert patches.num_patches == 4
    image = torch.randn(1, 3, 4, 4)
    assert torch.equal(patches(image)[0, 3], patches.proj(image)[0, :, 1, 1])


@pytest.mark.hosts
def test_both_models_are_timed_on_the_same_step(load: object) -> None:
    hosts = os.environ.get("SPEEDIT_HOSTS")
    if not hosts or not (Path(hosts) / "facebookresearch+DiT").is_dir():
        pytest.skip("needs $SPEEDIT_HOSTS with a checkout facebookresearch+DiT")
    original = load("original_dit").load_original(Path(hosts))
    timing = load("training_step").compare(original, "DiT-S/8", batch=1, edge=8, rounds=1)
    assert min(timing.ours_seconds, timing.original_seconds) > 0
    # One round: both quartiles are its ratio.
    assert timing.round_quartiles == (timing.step_ratio, timing.step_ratio)
    assert timing.step_ratio == timing.ours_seconds / timing.original_seconds
