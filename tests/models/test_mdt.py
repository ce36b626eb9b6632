"""MDT and MDTv2: their formulas, their inputs, and the release's own code.

Dims: `B` batch, `N` tokens, `K` kept tokens, `H` heads.
"""

import contextlib
import copy
import importlib.util
import io
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from runs import small_config
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from speedit_plugins.registry import MODELS, build
from speedit_plugins.trainer.diffusion.guidance import Guided, guidance_schedule
from speedit_plugins.trainer.models.interface import example_inputs, without_storage
from speedit_plugins.trainer.models.layers.positions import sincos_positions
from speedit_plugins.trainer.models.layers.relative_positions import (
    RelativePositionBias,
    index_of,
    relative_index,
)
from speedit_plugins.trainer.models.mdt import MDT, MDTv2
from speedit_plugins.trainer.models.weights import load_weights
from speedit_plugins.trainer.training.assembly import build_trainer

SMALL: dict[str, Any] = {
    "input_size": 8,
    "patch_size": 2,
    "hidden_size": 48,
    "depth": 6,
    "num_heads": 4,
    "num_classes": 10,
    "decode_layer": 2,
}
# The release's second version replaced the first in this commit.
FIRST_VERSION = "75ee9a9~1"
KINDS: dict[str, type[MDT]] = {"MDT": MDT, "MDTv2": MDTv2}
every_kind = pytest.mark.parametrize("kind", [MDT, MDTv2])


def randomised(model: nn.Module, *, std: float = 0.1) -> nn.Module:
    """The model with every parameter drawn from N(0, std^2): nothing hides behind an initial zero."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 4, 8, 8), torch.tensor([0, 500, 999])[:batch], torch.tensor([0, 3, 10])[:batch]


def kept_tokens(batch: int = 3, count: int = 10, *, num_tokens: int = 16) -> Tensor:
    return torch.rand(batch, num_tokens).argsort(dim=1)[:, :count]


def test_the_bias_of_two_patches_is_the_tables_row_of_their_distance() -> None:
    edge, heads = 3, 2
    bias = RelativePositionBias(edge, heads)
    table, index = bias.relative_position_bias_table, bias.relative_position_index
    found = bias(index)
    assert found.shape == (1, heads, 9, 9)
    for query in range(9):
        for key in range(9):
            down, right = query // edge - key // edge, query % edge - key % edge
            row = (down + edge - 1) * (2 * edge - 1) + right + edge - 1
            assert torch.equal(found[0, :, query, key], table[row])
    kept = kept_tokens(2, 4, num_tokens=9)
    some = bias(index_of(kept, relative_index(edge)))
    for sample in range(2):
        for head in range(heads):
            wanted = found[0, head][kept[sample]][:, kept[sample]]
            assert torch.equal(some[sample, head], wanted)


@every_kind
def test_a_new_model_predicts_zero_and_its_learned_positions_are_those_of_a_dit(kind: type[MDT]) -> None:
    model = kind(**SMALL)
    assert not model(*inputs()).any()
    for name in ("pos_embed", "decoder_pos_embed"):
        position = getattr(model, name)
        assert position.requires_grad
        assert torch.equal(position, sincos_positions(48, 4))
    # 5 sigma of a sample standard deviation.
    assert_close(model.mask_token.std().item(), 0.02, rtol=5 / (2 * 48) ** 0.5, atol=0)


@every_kind
def test_keeping_every_token_in_order_or_not_is_the_full_pass(kind: type[MDT]) -> None:
    model = randomised(kind(**SMALL)).double().eval()
    x, timestep, label = inputs()
    full = model(x.double(), timestep, label)
    # Float64; only the order of sums differs.
    assert_close(model(x.double(), timestep, label, kept=kept_tokens(count=16)), full, atol=1e-11, rtol=0)


@every_kind
def test_the_encoder_of_a_masked_pass_sees_nothing_of_the_masked_patches(kind: type[MDT]) -> None:
    model = randomised(kind(**SMALL)).double().eval()
    x, timestep, label = inputs(1)
    kept, number = torch.tensor([[0, 5, 6, 15]]), 4
    changed = x.clone()
    # Patch 1 is masked; patch 5, in the second row and column, is kept.
    changed[..., 0:2, 2:4] += 1
    _, before = model(x.double(), timestep, label, kept=kept, hidden_after=number)
    _, after = model(changed.double(), timestep, label, kept=kept, hidden_after=number)
    assert before.shape == (1, 4, 48)
    assert torch.equal(before, after)
    changed[..., 2:4, 2:4] += 1
    _, after = model(changed.double(), timestep, label, kept=kept, hidden_after=number)
    assert not torch.equal(before, after)


@every_kind
def test_both_passes_together_give_every_parameter_a_gradient(kind: type[MDT]) -> None:
    model = randomised(kind(**SMALL, class_dropout_prob=0.1)).eval()
    (model(*inputs()).square().mean() + model(*inputs(), kept=kept_tokens()).square().mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    model.zero_grad()
    model(*inputs()).square().mean().backward()
    unused = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is None}
    assert unused == {"mask_token", "sideblocks"}


@every_kind
def test_gradient_checkpointing_changes_no_gradient_of_either_pass(kind: type[MDT]) -> None:
    plain = randomised(kind(**SMALL, class_dropout_prob=0))
    frugal = kind(**SMALL, class_dropout_prob=0, gradient_checkpointing=True)
    frugal.load_state_dict(plain.state_dict())
    calls = []
    frugal.sideblocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    x, timestep, label = inputs(2)
    kept = kept_tokens(2)
    for model in (plain, frugal):
        full, masked = model(x, timestep, label), model(x, timestep, label, kept=kept)
        (full.square().mean() + masked.square().mean()).backward()
    assert len(calls) == 2
    for (name, ours), other in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert torch.equal(ours.grad, other.grad), name


@every_kind
def test_autocast_and_bf16_weights_stay_within_bf16_of_float32(kind: type[MDT]) -> None:
    model = randomised(kind(**SMALL)).eval()
    x, timestep, label = inputs()
    for kept in (None, kept_tokens()):
        exact = model(x, timestep, label, kept=kept)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(x, timestep, label, kept=kept)
        half = kind(**SMALL)
        half.load_state_dict(model.state_dict())
        rounded = half.eval().bfloat16()(x.bfloat16(), timestep, label, kept=kept)
        for output in (autocast, rounded):
            assert output.dtype == torch.bfloat16
            # bf16 rounds by 2^-9; twenty times that for the depth of the network.
            assert (output - exact).norm() < 20 * 2**-9 * exact.norm()


def test_another_number_of_masked_tokens_compiles_nothing_once_it_is_a_symbol() -> None:
    counter = CompileCounter()
    torch._dynamo.reset()
    model = randomised(MDTv2(**SMALL | {"depth": 4})).eval()
    compiled = copy.deepcopy(model)
    compiled.compile(backend=counter)
    x = inputs()
    with torch.no_grad():
        for count in (11, 9, 10):
            kept = kept_tokens(count=count)
            # The graphs run as they are; with a traced size a sum may be split otherwise.
            assert_close(compiled(*x, kept=kept), model(*x, kept=kept), atol=1e-5, rtol=0)
        seen = counter.frame_count
        for count in (8, 12, 7):
            compiled(*x, kept=kept_tokens(count=count))
    assert counter.frame_count == seen
    torch._dynamo.reset()


def test_an_unconditional_model_without_variance_and_a_copy_without_storage() -> None:
    model = MDTv2(**SMALL | {"num_classes": 0, "learn_sigma": False})
    x, timestep, _ = inputs()
    assert model(x, timestep, kept=kept_tokens()).shape == x.shape
    assert not any("y_embedder" in name for name in model.state_dict())
    assert without_storage(model)(*example_inputs(model, 2)).shape == (2, 4, 8, 8)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (MDT, {"decode_layer": 6}, r"MDT needs decode_layer in \[1, depth\).* got 6 of depth 6"),
        (MDT, {"decode_layer": 0}, "got 0 of depth 6"),
        (MDTv2, {"decode_layer": 3}, r"MDTv2 needs an even number .* got 6 - 3"),
        (MDTv2, {"attention": "xformers"}, "wanted attention 'sdpa', got 'xformers'"),
    ],
)
def test_impossible_models_say_what_is_wanted(
    kind: type[MDT], change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**SMALL | change)


@every_kind
def test_wrong_inputs_say_what_is_wanted(kind: type[MDT]) -> None:
    model = kind(**SMALL)
    x, timestep, label = inputs()
    for bad in (x[:, :3], x[..., :6], torch.zeros(3, 4, 12, 12), x[0]):
        with pytest.raises(
            ValueError, match=rf"{kind.__name__} got an input .*wanted \(B, 4, 8, 8\): its pos"
        ):
            model(bad, timestep, label)
    for kept in (kept_tokens(2), kept_tokens(3, 0), kept_tokens()[0]):
        with pytest.raises(
            ValueError, match=r"got kept tokens of shape .*wanted \(3, K\) with K in \[1, 16\]"
        ):
            model(x, timestep, label, kept=kept)


@pytest.fixture(scope="module")
def originals() -> dict[str, ModuleType]:
    """`masked_diffusion/models.py` of the release and of its first version, without timm."""
    checkout = Path(os.environ.get("SPEEDIT_HOSTS") or "") / "sail-sg+MDT"
    source = checkout / "masked_diffusion" / "models.py"
    if not os.environ.get("SPEEDIT_HOSTS") or not source.is_file():
        pytest.skip("needs $SPEEDIT_HOSTS with a checkout sail-sg+MDT")
    command = ["git", "-C", checkout, "show", f"{FIRST_VERSION}:masked_diffusion/models.py"]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    if first.returncode:
        pytest.skip("needs the git history of sail-sg+MDT")
    return {"MDT": _executed("mdt_v1", first.stdout), "MDTv2": _executed("mdt_v2", source.read_text())}


def _executed(name: str, code: str) -> ModuleType:
    standin = Path(__file__).parents[2] / "benchmarks" / "peers" / "original_dit.py"
    spec = importlib.util.spec_from_file_location("original_dit", standin)
    layers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layers)
    vision, old = ModuleType("timm.models.vision_transformer"), ModuleType("timm.models.layers")
    vars(vision).update(PatchEmbed=layers.PatchEmbed, Mlp=layers.Mlp)
    vars(old).update(trunc_normal_=nn.init.trunc_normal_)
    packages = {found: ModuleType(found) for found in ("timm", "timm.models")}
    module = ModuleType(name)
    with mock.patch.dict(sys.modules, {**packages, vision.__name__: vision, old.__name__: old}):
        exec(compile(code, name, "exec"), vars(module))
    return module


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The release prints its mask ratio."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def original(originals: dict[str, ModuleType], name: str, **changes: Any) -> nn.Module:
    with quiet():
        return getattr(originals[name], name)(**SMALL | {"mask_ratio": 0.3} | changes)


@pytest.mark.hosts
@pytest.mark.parametrize("name", KINDS)
def test_both_passes_their_gradients_and_state_dicts_equal_the_release(
    originals: dict[str, ModuleType], name: str
) -> None:
    ours, theirs = randomised(KINDS[name](**SMALL)), original(originals, name)
    assert [(key, value.shape, value.dtype) for key, value in ours.state_dict().items()] == [
        (key, value.shape, value.dtype) for key, value in theirs.state_dict().items()
    ]
    theirs.load_state_dict(ours.state_dict())
    x, timestep, label = inputs()
    for training in (False, True):
        outputs = []
        for model in (ours, theirs):
            model.train(training)
            # The same draw of dropped labels in training.
            torch.manual_seed(5)
            outputs.append(model(x, timestep, label))
        assert_close(outputs[0], outputs[1], atol=1e-5, rtol=0)
    # The masked pass of the release draws dropped labels and then its mask.
    drawn: list[Tensor] = []
    masking = theirs.random_masking

    def recorded(*arguments: Any) -> Any:
        found = masking(*arguments)
        drawn.append(found[3])
        return found

    theirs.random_masking = recorded
    torch.manual_seed(6)
    theirs_masked = theirs(x, timestep, label, enable_mask=True)
    torch.manual_seed(6)
    ours_masked = ours(x, timestep, label, kept=drawn[0])
    assert 7 <= drawn[0].shape[1] <= 11
    assert_close(ours_masked, theirs_masked, atol=1e-5, rtol=0)
    (outputs[0].square().mean() + ours_masked.square().mean()).backward()
    (outputs[1].square().mean() + theirs_masked.square().mean()).backward()
    for (key, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_close(parameter.grad, other.grad, atol=1e-5, rtol=1e-4, msg=key)


@pytest.mark.hosts
@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_the_release_loads_and_a_file_of_ours_loads_there(
    originals: dict[str, ModuleType], name: str, tmp_path: Path
) -> None:
    theirs = randomised(original(originals, name))
    # As `TrainLoop.save` of the release writes it.
    torch.save(theirs.state_dict(), tmp_path / "ema_0.9999_000010.pt")
    ours = KINDS[name](**SMALL)
    report = load_weights(ours, tmp_path / "ema_0.9999_000010.pt")
    assert (report.left_at_init, report.unused) == ((), ())
    save_file(dict(ours.state_dict()), tmp_path / "ours.safetensors")
    runpy.run_path("tools/convert_checkpoint.py")["convert"](
        tmp_path / "ours.safetensors", tmp_path / "ours.pt"
    )
    back = original(originals, name)
    back.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, back.state_dict()[key]), key


@pytest.mark.hosts
def test_a_training_starts_from_a_file_of_the_release(
    originals: dict[str, ModuleType], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "depth": 4, "num_heads": 2, "in_channels": 1}
    theirs = randomised(original(originals, "MDTv2", **sizes))
    torch.save(theirs.state_dict(), tmp_path / "mdt.pt")
    options = {"model__type": "MDTv2", "model__depth": 4, "model__decode_layer": 2, "model__patch_size": 2}
    config = small_config(tmp_path / "run", **options, masking__type="MDT")
    trainer = build_trainer(config, weights=str(tmp_path / "mdt.pt"))
    assert_close(dict(trainer.model.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    assert not trainer.optimizer_step()[0].is_skipped


@pytest.mark.hosts
@pytest.mark.parametrize("name", KINDS)
def test_the_initial_weights_equal_the_release_at_the_same_seed(
    originals: dict[str, ModuleType], name: str
) -> None:
    torch.manual_seed(7)
    ours = KINDS[name](**SMALL).state_dict()
    torch.manual_seed(7)
    theirs = original(originals, name).state_dict()
    for key, tensor in theirs.items():
        if key.endswith("relative_position_bias_table"):
            # Drawn anew after the others: 5 sigma of a sample standard deviation.
            assert_close(ours[key].std().item(), 0.02, rtol=5 / (2 * tensor.numel()) ** 0.5, atol=0)
            continue
        # Bit for bit; the sines of the positions may differ in the last place between libraries.
        assert_close(ours[key], tensor, atol=6e-8 if key.endswith("pos_embed") else 0, rtol=0, msg=key)


@pytest.mark.hosts
@pytest.mark.parametrize("name", [f"{kind}-{size}/2" for kind in KINDS for size in ("S", "B", "L", "XL")])
def test_names_and_shapes_equal_the_release_for_every_size(
    originals: dict[str, ModuleType], name: str
) -> None:
    kind = name.partition("-")[0]
    builder = getattr(originals[kind], name.replace("-", "_").replace("/", "_"))
    with torch.device("meta"), quiet():
        ours = build(MODELS, {"type": name}).state_dict()
        theirs = builder(decode_layer=2 if kind == "MDT" else 4).state_dict()
    assert [(key, value.shape) for key, value in ours.items()] == [
        (key, value.shape) for key, value in theirs.items()
    ]


@pytest.mark.hosts
@pytest.mark.parametrize("name", KINDS)
def test_guidance_equals_that_of_the_release(originals: dict[str, ModuleType], name: str) -> None:
    ours, theirs = randomised(KINDS[name](**SMALL)).eval(), original(originals, name).eval()
    theirs.load_state_dict(ours.state_dict())
    x, label = torch.randn(2, 4, 8, 8), torch.tensor([3, 7])
    null = torch.full_like(label, 10)
    both, labels = torch.cat([x, x]), torch.cat([label, null])
    for timestep, power in ((999, 4.0), (500, 4.0), (0, 4.0), (700, 0.01)):
        schedule = guidance_schedule("power_cosine", power=power)
        guided = Guided(ours, label, null, 3.8, 3, schedule, 1000.0)
        time = torch.full((2,), timestep)
        with torch.no_grad():
            found = guided(x, time)
            wanted = theirs.forward_with_cfg(
                both, torch.cat([time, time]), labels, cfg_scale=3.8, diffusion_steps=1000, scale_pow=power
            )
        # The scale amplifies the rounding of both models.
        assert_close(found, wanted[:2], atol=4e-5, rtol=0)
