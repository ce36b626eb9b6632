import copy
import importlib.util
import math
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from speedit_plugins.registry import MODELS, build
from speedit_plugins.trainer.logging.throughput import training_flops
from speedit_plugins.trainer.models.interface import example_inputs, input_shape
from speedit_plugins.trainer.models.latte import Latte, SpatialAttention, TemporalAttention
from speedit_plugins.trainer.models.layers.attention import sdpa
from speedit_plugins.trainer.models.layers.blocks import Block
from speedit_plugins.trainer.models.layers.positions import sincos_frames, sincos_positions

SMALL: dict[str, Any] = {
    "input_size": 8, "patch_size": 2, "num_frames": 3, "hidden_size": 48, "depth": 4, "num_heads": 4,
}  # fmt: skip
SIZES = {"S": (384, 12), "B": (768, 12), "L": (1024, 24), "XL": (1152, 28)}
NAMES = [f"Latte-{size}/{patch}" for size in SIZES for patch in (2, 4, 8)]


def latte(**options: Any) -> Latte:
    """A small model with every parameter drawn from N(0, 0.1^2): nothing hides behind an initial zero."""
    model = Latte(**SMALL | options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def clip(frames: int = 3, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, frames, height, width), torch.tensor([0, 999])


def parameter_formula(d: int, depth: int, patch: int) -> int:
    """Trained parameters of an unconditional model for 4 latent channels and learned variance."""
    block = (3 * d * d + 3 * d) + (d * d + d) + (8 * d * d + 5 * d) + (6 * d * d + 6 * d)
    embedders = (4 * patch**2 * d + d) + (256 * d + d + d * d + d)
    final = (2 * d * d + 2 * d) + (8 * patch**2 * d + 8 * patch**2)
    return depth * block + embedders + final


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_equal_the_formula_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = build(MODELS, {"type": name, "num_frames": 5})
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    size, patch = name.removeprefix("Latte-").split("/")
    width, depth = SIZES[size]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == parameter_formula(width, depth, int(patch))
    # The fixed positions, of places and of frames, are stored but not trained.
    grid = (32 // int(patch)) ** 2
    assert sum(p.numel() for p in model.parameters()) == trained + (grid + 5) * width
    assert model.num_tokens == 5 * grid
    assert input_shape(model) == (4, 5, 32, 32)
    if name == "Latte-XL/2":
        # In millions. Source: Ma et al. 2024, arXiv:2401.03048, experiments.
        assert round(trained / 1e6, 2) == 673.68


def test_a_meta_model_given_memory_and_reset_equals_one_built_directly() -> None:
    with torch.device("meta"):
        late = Latte(**SMALL, num_classes=5)
    late.to_empty(device="cpu")
    torch.manual_seed(3)
    late.reset_parameters()
    model = Latte(**SMALL, num_classes=5)
    torch.manual_seed(3)
    model.reset_parameters()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, late.state_dict()[name]), name


def test_positions_of_frames_equal_the_formula_and_are_not_trained() -> None:
    table = sincos_frames(8, 5)
    assert table.shape == (1, 5, 8)
    for frame in range(5):
        for i in range(4):
            angle = frame * 10_000 ** (-i / 4)
            # Rounding of a value in [-1, 1] to float32.
            assert_close(table[0, frame, i].item(), math.sin(angle), atol=6e-8, rtol=0)
            assert_close(table[0, frame, 4 + i].item(), math.cos(angle), atol=6e-8, rtol=0)
    model = Latte(**SMALL)
    assert torch.equal(model.temp_embed, sincos_frames(48, 3))
    assert not model.temp_embed.requires_grad


def test_a_new_model_predicts_zero() -> None:
    assert not Latte(**SMALL)(*clip()).any()


def test_spatial_blocks_mix_the_places_of_a_frame_and_temporal_blocks_the_frames_of_a_place() -> None:
    model = latte().eval()
    frame, place = 1, 5
    x, c = torch.randn(2, 3, 16, 48), torch.randn(2, 1, 48)
    changed = x.clone()
    changed[:, frame, place] += torch.randn(48)
    reached = torch.zeros(2, 2, 3, 16, dtype=torch.bool)
    reached[0, :, frame] = True
    reached[1, :, :, place] = True
    for index, block in enumerate(model.blocks):
        differs = (block(changed, c) != block(x, c)).any(3)
        assert torch.equal(differs, reached[index % 2])


def reference_forward(model: Latte, x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
    """The model frame by frame and place by place, with blocks that attend to all that they are given."""
    edge, (rows, columns) = model.patch_size, (n // model.patch_size for n in x.shape[3:])
    c = model.t_embedder(timestep)
    if label is not None:
        c = c + model.y_embedder(label)
    positions = model.pos_embed
    if (rows, columns) != (4, 4):
        positions = sincos_positions(48, 4, shape=(rows, columns)).to(x.dtype)
    frames = [model.x_embedder(frame) + positions for frame in x.unbind(2)]
    x = torch.stack(frames, dim=1)  # (B, F, N, D)
    for index, source in enumerate(model.blocks):
        block = Block(48, 4, mlp_ratio=4.0, kernel=sdpa).to(x.dtype)
        block.load_state_dict(source.state_dict())
        if index == 1:
            x = x + model.temp_embed[0, : x.shape[1], None]
        dim = 2 if index % 2 else 1
        x = torch.stack([block(part, c) for part in x.unbind(dim)], dim=dim)
    pictures = []
    for frame in x.unbind(1):
        patches = model.final_layer(frame, c).unflatten(2, (edge, edge, -1)).unflatten(1, (rows, columns))
        # One pixel after another: (B, rows, columns) of each place in a patch.
        picture = patches.new_zeros(len(x), model.out_channels, rows * edge, columns * edge)
        for i in range(edge):
            for j in range(edge):
                picture[:, :, i::edge, j::edge] = patches[:, :, :, i, j].permute(0, 3, 1, 2)
        pictures.append(picture)
    return torch.stack(pictures, dim=2)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 8), (1, 8, 8), (3, 12, 6), (2, 4, 16), (1, 2, 2)])
@pytest.mark.parametrize("num_classes", [0, 10])
def test_forward_equals_a_loop_over_frames_and_places(shape: tuple[int, ...], num_classes: int) -> None:
    model = latte(num_classes=num_classes, learn_sigma=num_classes > 0).double().eval()
    x, timestep = clip(*shape)
    label = torch.tensor([3, 10]) if num_classes else None
    wanted = reference_forward(model, x.double(), timestep, label)
    assert wanted.shape == (2, 8 if num_classes else 4, *shape)
    # Float64 on both sides; only the order of sums differs.
    assert_close(model(x.double(), timestep, label), wanted, atol=1e-11, rtol=0)


def test_permuted_frames_permute_the_prediction_without_their_positions_and_not_with_them() -> None:
    model = latte().double().eval()
    x, timestep = clip()
    x, order = x.double(), [2, 0, 1]
    assert not torch.allclose(model(x[:, :, order], timestep), model(x, timestep)[:, :, order], atol=1e-3)
    nn.init.zeros_(model.temp_embed)
    # Float64; only the order of sums over the frames differs.
    assert_close(model(x[:, :, order], timestep), model(x, timestep)[:, :, order], atol=1e-11, rtol=0)


def test_one_frame_is_attended_to_alone_whatever_the_queries_and_keys_across_frames() -> None:
    model = latte().eval()
    image, video, before = clip(1), clip(3), []
    for x in (image, video):
        before.append(model(*x))
    for block in model.blocks[1::2]:
        nn.init.normal_(block.attn.qkv.weight[: 2 * 48])
    # A softmax over one frame is 1.
    assert_close(model(*image), before[0], atol=1e-5, rtol=0)
    assert not torch.allclose(model(*video), before[1], atol=1e-3)


def test_a_shorter_clip_has_the_first_frames_of_the_table() -> None:
    model, short = latte().eval(), latte(num_frames=2).eval()
    short.load_state_dict({**model.state_dict(), "temp_embed": model.temp_embed[:, :2]})
    x, timestep = clip(2)
    assert torch.equal(model(x, timestep), short(x, timestep))


def test_extra_channels_are_concatenated_frame_by_frame() -> None:
    extended, plain = latte(extra_channels=2).eval(), latte(in_channels=6, learn_sigma=False).eval()
    state = extended.state_dict()
    # The two have output layers of their own widths.
    plain.load_state_dict({k: v for k, v in state.items() if "final_layer.linear" not in k}, strict=False)
    seen: list[Tensor] = []
    for model in (extended, plain):
        model.final_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x, timestep = clip()
    extra = torch.randn(2, 2, 3, 8, 8)
    assert extended(x, timestep, {"extra": extra}).shape == (2, 8, 3, 8, 8)
    plain(torch.cat([x, extra], dim=1), timestep)
    assert torch.equal(*seen)


def test_gradient_checkpointing_changes_no_gradient_and_runs_each_block_twice() -> None:
    plain = latte()
    frugal = Latte(**SMALL, gradient_checkpointing=True)
    frugal.load_state_dict(plain.state_dict())
    calls = []
    for block in frugal.blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    x = clip()
    for model in (plain, frugal):
        model(*x).square().mean().backward()
    assert len(calls) == 2 * len(frugal.blocks)
    for (name, parameter), other in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, other.grad), name
            assert parameter.grad.any(), name


def test_flops_equal_the_formula_of_factorised_attention_with_one_modulation_per_clip() -> None:
    model = Latte(**SMALL)
    d, depth, frames, places = 48, 4, 3, 16
    tokens = frames * places
    linear = depth * (tokens * 12 * d * d + 6 * d * d)
    embedders = tokens * 4 * 4 * d + (256 * d + d * d)
    final = 2 * d * d + tokens * d * 4 * 8
    attention = depth // 2 * 2 * d * (frames * places**2 + places * frames**2)
    # A multiply-add is two, a backward pass twice the forward pass, but for the two layers whose inputs are
    # the model's, by which nothing is differentiated.
    first = tokens * 4 * 4 * d + 256 * d
    expected = 6 * (linear + embedders + final + attention) - 2 * first
    assert training_flops(model, example_inputs(model, 1)) == expected


def test_bf16_weights_stay_within_bf16_of_float32() -> None:
    model = latte().eval()
    x, timestep = clip(2)
    exact = model(x, timestep)
    half = model.bfloat16()(x.bfloat16(), timestep)
    assert half.dtype == torch.bfloat16
    # bf16 rounds by 2^-9; ten times that for the depth of the network.
    assert (half - exact).norm() < 10 * 2**-9 * exact.norm()


def test_another_number_of_frames_compiles_nothing_once_it_is_a_symbol() -> None:
    model = latte(num_frames=6, depth=2).eval()
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = copy.deepcopy(model)
    compiled.compile(backend=counter)
    with torch.no_grad():
        for frames in (3, 4):
            x = clip(frames)
            # The graphs run as they are; with traced sizes a sum may be split otherwise.
            assert_close(compiled(*x), model(*x), atol=1e-5, rtol=0)
        seen = counter.frame_count
        for frames in (5, 6, 2):
            compiled(*clip(frames))
    assert counter.frame_count == seen
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, "Latte needs an even depth, got 3"),
        ({"depth": 0}, "needs depth >= 1, got 0"),
        ({"num_frames": 0}, "Latte needs num_frames >= 1, got 0"),
        ({"input_size": 9}, "input_size that is a multiple of patch_size 2, got 9"),
        ({"num_heads": 5}, "multiple of 4 and of num_heads 5, got 48"),
    ],
)
def test_impossible_sizes_say_what_is_wanted(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Latte(**SMALL | change)


def test_wrong_inputs_say_what_is_wanted() -> None:
    model = Latte(**SMALL, num_classes=10)
    x, timestep = clip()
    label = torch.tensor([3, 10])
    for bad in (x[:, :3], x[..., :7], x[..., :5, :], x[..., :0], x[:, :, :0], x[:, :, 0], clip(4)[0]):
        with pytest.raises(
            ValueError,
            match=r"Latte got an input of shape .*, wanted \(B, 4, F, h, w\) with 1 to 3 frames F, .*size 2",
        ):
            model(bad, timestep, label)
    with pytest.raises(ValueError, match=r"got timesteps of shape \(1,\), wanted \(2,\)"):
        model(x, timestep[:1], label)
    with pytest.raises(ValueError, match=r"got no labels; wanted \(2,\) int64 labels in \[0, 10\]"):
        model(x, timestep)
    with pytest.raises(ValueError, match="got labels, but num_classes=0 makes it unconditional"):
        Latte(**SMALL)(x, timestep, label)


def test_the_attention_classes_keep_the_parameters_of_plain_attention() -> None:
    for kind in (SpatialAttention, TemporalAttention):
        names = [name for name, _ in kind(8, 2, kernel=sdpa).named_parameters()]
        assert names == ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]


@pytest.fixture(scope="module")
def original() -> ModuleType:
    """The model file of a checkout of Vchitect/Latte, without timm."""
    hosts = os.environ.get("SPEEDIT_HOSTS")
    source = Path(hosts or "") / "Vchitect+Latte" / "models" / "latte.py"
    if not hosts or not source.is_file():
        pytest.skip("needs $SPEEDIT_HOSTS with a checkout Vchitect+Latte")
    standin = _module("original_dit", Path(__file__).parents[2] / "benchmarks" / "peers" / "original_dit.py")
    layers = ModuleType("timm.models.vision_transformer")
    vars(layers).update(PatchEmbed=standin.PatchEmbed, Mlp=standin.Mlp)
    packages = {name: ModuleType(name) for name in ("timm", "timm.models")}
    with mock.patch.dict(sys.modules, {**packages, layers.__name__: layers}):
        return _module("original_latte", source)


def _module(name: str, source: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Labels of the original are extras 2, none are extras 1.
CONDITIONS = pytest.mark.parametrize(
    ("ours_options", "theirs_options"),
    [({"num_classes": 0}, {"extras": 1}), ({"num_classes": 10}, {"extras": 2, "num_classes": 10})],
    ids=["unconditional", "class-conditional"],
)


@pytest.mark.hosts
@CONDITIONS
def test_predictions_gradients_and_state_dicts_equal_the_original(
    original: ModuleType, ours_options: dict[str, int], theirs_options: dict[str, int]
) -> None:
    ours, theirs = latte(**ours_options), original.Latte(**SMALL | theirs_options)
    theirs.load_state_dict(ours.state_dict())
    back = Latte(**SMALL | ours_options)
    back.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x, timestep = clip()
    label = torch.tensor([3, 9]) if ours.num_classes else None
    for training in (False, True):
        outputs = []
        for model in (ours, back, theirs):
            model.train(training)
            # The same draw of dropped labels in training.
            torch.manual_seed(5)
            if model is theirs:
                outputs.append(model(x.transpose(1, 2), timestep, label).transpose(1, 2))
            else:
                outputs.append(model(x, timestep, label))
        assert torch.equal(outputs[0], outputs[1])
        assert_close(outputs[0], outputs[2], atol=1e-5, rtol=0)
    outputs[0].square().mean().backward()
    outputs[2].square().mean().backward()
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert parameter.requires_grad == other.requires_grad
        if parameter.requires_grad:
            assert_close(parameter.grad, other.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.hosts
@CONDITIONS
def test_the_initial_weights_equal_the_original_at_the_same_seed(
    original: ModuleType, ours_options: dict[str, int], theirs_options: dict[str, int]
) -> None:
    torch.manual_seed(7)
    ours = Latte(**SMALL | ours_options).state_dict()
    torch.manual_seed(7)
    theirs = original.Latte(**SMALL | theirs_options).state_dict()
    for name, tensor in theirs.items():
        # Bit for bit; the sines of the positions may differ in the last place between libraries.
        atol = 6e-8 if name in ("pos_embed", "temp_embed") else 0
        assert_close(ours[name], tensor, atol=atol, rtol=0, msg=name)


@pytest.mark.hosts
@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_equal_the_original_for_every_size(
    original: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its own makes a numpy array of what is on the meta device.
    monkeypatch.setattr(original, "get_1d_sincos_temp_embed", lambda *size: sincos_frames(*size)[0].numpy())
    with torch.device("meta"):
        ours = build(MODELS, {"type": name, "num_classes": 101}).state_dict()
        theirs = original.Latte_models[name](extras=2, num_classes=101).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items()
    }
