import importlib.util
import math
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from devices import EVERY_DEVICE, in_one_order
from torch import Tensor, nn
from torch.testing import assert_close

from speedit_plugins.registry import MODELS, build
from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.layers.blocks import (
    Block,
    FinalLayer,
    PatchEmbedder,
    Perceptron,
    modulate,
)
from speedit_plugins.trainer.models.layers.conditioning import timestep_features
from speedit_plugins.trainer.models.layers.positions import sincos_positions

SMALL = {"input_size": 8, "patch_size": 2, "hidden_size": 48, "depth": 2, "num_heads": 4, "num_classes": 10}
# Trained parameters in millions, at 256 x 256 (32 x 32 latents). Source: arXiv:2212.09748, table 4.
PAPER_MILLIONS = {
    "DiT-S/2": 33, "DiT-S/4": 33, "DiT-S/8": 33,
    "DiT-B/2": 130, "DiT-B/4": 130, "DiT-B/8": 131,
    "DiT-L/2": 458, "DiT-L/4": 458, "DiT-L/8": 459,
    "DiT-XL/2": 675, "DiT-XL/4": 675, "DiT-XL/8": 676,
}  # fmt: skip
SHAPES = {"S": (384, 12), "B": (768, 12), "L": (1024, 24), "XL": (1152, 28)}


@pytest.fixture(scope="module")
def original() -> ModuleType:
    hosts = os.environ.get("SPEEDIT_HOSTS")
    if not hosts or not (Path(hosts) / "facebookresearch+DiT").is_dir():
        pytest.skip("needs $SPEEDIT_HOSTS with a checkout facebookresearch+DiT")
    source = Path(__file__).parents[2] / "benchmarks" / "peers" / "original_dit.py"
    spec = importlib.util.spec_from_file_location("original_dit", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_original(Path(hosts))


def randomised(model: nn.Module, *, std: float = 0.1) -> nn.Module:
    """The model with every parameter drawn from N(0, std^2): nothing hides behind an initial zero."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 4, 8, 8), torch.tensor([0, 500, 999])[:batch], torch.tensor([0, 3, 10])[:batch]


def parameter_formula(d: int, depth: int, patch: int) -> int:
    """Trained parameters for 4 latent channels, 1000 classes and learned variance, layer by layer."""
    block = (3 * d * d + 3 * d) + (d * d + d) + (8 * d * d + 5 * d) + (6 * d * d + 6 * d)
    embedders = (4 * patch**2 * d + d) + (256 * d + d + d * d + d) + 1001 * d
    final = (2 * d * d + 2 * d) + (8 * patch**2 * d + 8 * patch**2)
    return depth * block + embedders + final


@pytest.mark.parametrize("name", PAPER_MILLIONS)
def test_parameter_counts_equal_the_formula_and_the_paper_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = build(MODELS, {"type": name, "input_size": 32, "num_classes": 1000})
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size, patch = name.removeprefix("DiT-").split("/")
    width, depth = SHAPES[size]
    assert trained == parameter_formula(width, depth, int(patch))
    assert round(trained / 1e6) == PAPER_MILLIONS[name]
    # The fixed positions are stored, but not trained.
    assert sum(p.numel() for p in model.parameters()) == trained + model.num_tokens * width


def test_a_meta_model_given_memory_and_reset_equals_one_built_directly() -> None:
    with torch.device("meta"):
        late = DiT(**SMALL)
    late.to_empty(device="cpu")
    torch.manual_seed(3)
    late.reset_parameters()
    model = DiT(**SMALL)
    torch.manual_seed(3)
    model.reset_parameters()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, late.state_dict()[name]), name


def test_the_initial_law() -> None:
    torch.manual_seed(0)
    model = DiT(**SMALL | {"hidden_size": 96})
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        assert not layer.bias.any(), name
        if "adaLN_modulation" in name or name == "final_layer.linear":
            assert not layer.weight.any(), name
            continue
        xavier = math.sqrt(6 / (layer.in_features + layer.out_features))
        std = 0.02 if name.startswith("t_embedder") else xavier / math.sqrt(3)
        if not name.startswith("t_embedder"):
            assert layer.weight.abs().max() <= xavier, name
        # 5 sigma of a sample standard deviation, at most std / sqrt(2 n) for a normal or a uniform law.
        assert_close(layer.weight.std().item(), std, rtol=5 / math.sqrt(2 * layer.weight.numel()), atol=0)
    patches = model.x_embedder.proj.weight
    assert patches.abs().max() <= math.sqrt(6 / (4 * 2 * 2 + 96))
    assert not model.x_embedder.proj.bias.any()
    labels = model.y_embedder.embedding_table.weight
    assert_close(labels.std().item(), 0.02, rtol=5 / math.sqrt(2 * labels.numel()), atol=0)


def test_a_new_model_predicts_zero_and_its_blocks_are_the_identity() -> None:
    model = DiT(**SMALL)
    assert not model(*inputs()).any()
    x, c = torch.randn(2, 16, 48), torch.randn(2, 48)
    assert torch.equal(model.blocks[0](x, c), x)


def test_sincos_positions_equal_the_formula_at_every_entry() -> None:
    table = sincos_positions(16, 3)
    assert table.shape == (1, 9, 16)
    for token in range(9):
        row, column = divmod(token, 3)
        for axis, place in enumerate((column, row)):
            for i in range(4):
                angle = place * 10_000 ** (-i / 4)
                # Rounding of a value in [-1, 1] to float32.
                assert_close(table[0, token, 8 * axis + i].item(), math.sin(angle), atol=6e-8, rtol=0)
                assert_close(table[0, token, 8 * axis + 4 + i].item(), math.cos(angle), atol=6e-8, rtol=0)
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        sincos_positions(6, 3)


def test_patch_embedder_is_the_convolution_of_its_weight() -> None:
    embedder = randomised(PatchEmbedder(2, 3, 8)).double()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    wanted = F.conv2d(x, embedder.proj.weight, embedder.proj.bias, stride=2).flatten(2).transpose(1, 2)
    # Sums of 12 products in float64.
    assert_close(embedder(x), wanted, atol=1e-13, rtol=0)
    assert_close(embedder(x.to(memory_format=torch.channels_last)), wanted, atol=1e-13, rtol=0)


def test_modulate_perceptron_and_final_layer_equal_their_formulas() -> None:
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    shift, scale = torch.randn(2, 2, 1, 8, dtype=torch.float64)
    assert_close(modulate(x, shift, scale), x * (1 + scale) + shift)
    mlp = randomised(Perceptron(8, 12)).double()
    inner = x @ mlp.fc1.weight.T + mlp.fc1.bias
    gelu = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    assert_close(mlp(x), gelu @ mlp.fc2.weight.T + mlp.fc2.bias)
    final = FinalLayer(8, 2, 3).double()
    nn.init.zeros_(final.adaLN_modulation[1].weight)
    nn.init.zeros_(final.adaLN_modulation[1].bias)
    centred = x - x.mean(2, keepdim=True)
    normal = centred / torch.sqrt(centred.square().mean(2, keepdim=True) + 1e-6)
    assert_close(final(x, torch.randn(2, 8).double()), normal @ final.linear.weight.T + final.linear.bias)


def reference_forward(
    model: DiT, x: Tensor, timestep: Tensor, label: Tensor, positions: Tensor | None = None
) -> Tensor:
    """The whole model from its state dict: convolution, explicit softmax, loops over patches."""
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", timestep_features(timestep).double())))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][label])
    edge = model.patch_size
    x = F.conv2d(x.double(), w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=edge)
    rows, columns = x.shape[2:]
    x = x.flatten(2).transpose(1, 2) + (w["pos_embed"] if positions is None else positions.double())
    for i in range(len(model.blocks)):
        p = f"blocks.{i}"
        m = linear(f"{p}.adaLN_modulation.1", c)[:, None].chunk(6, dim=2)
        q, k, v = linear(f"{p}.attn.qkv", norm(x) * (1 + m[1]) + m[0]).chunk(3, dim=2)
        heads = []
        for head in range(model.blocks[i].attn.num_heads):
            s = slice(head * 12, head * 12 + 12)
            heads.append(torch.softmax(q[..., s] @ k[..., s].mT / math.sqrt(12), dim=-1) @ v[..., s])
        x = x + m[2] * linear(f"{p}.attn.proj", torch.cat(heads, dim=2))
        hidden = F.gelu(linear(f"{p}.mlp.fc1", norm(x) * (1 + m[4]) + m[3]), approximate="tanh")
        x = x + m[5] * linear(f"{p}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, dim=2)
    x = linear("final_layer.linear", norm(x) * (1 + scale) + shift)
    out = x.new_zeros(len(x), model.out_channels, rows * edge, columns * edge)
    for token in range(rows * columns):
        top, left = (place * edge for place in divmod(token, columns))
        patch = x[:, token].reshape(-1, edge, edge, model.out_channels).permute(0, 3, 1, 2)
        out[:, :, top : top + edge, left : left + edge] = patch
    return out


def test_forward_equals_an_independent_implementation() -> None:
    torch.manual_seed(0)
    model = randomised(DiT(**SMALL)).double().eval()
    x, timestep, label = inputs()
    # Float64 on both sides; only the order of sums differs.
    assert_close(
        model(x.double(), timestep, label), reference_forward(model, x, timestep, label), atol=1e-11, rtol=0
    )


@pytest.mark.parametrize("sides", [(12, 6), (6, 12), (4, 16), (2, 2), (16, 16)])
def test_other_sides_equal_the_independent_implementation_with_their_positions(
    sides: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    model = randomised(DiT(**SMALL)).double().eval()
    _, timestep, label = inputs()
    x = torch.randn(3, 4, *sides)
    positions = sincos_positions(48, 4, shape=(sides[0] // 2, sides[1] // 2))
    wanted = reference_forward(model, x, timestep, label, positions)
    assert wanted.shape == (3, 8, *sides)
    # Float64 on both sides; only the order of sums differs. Twice: made, then from the cache.
    for _ in range(2):
        assert_close(model(x.double(), timestep, label), wanted, atol=1e-11, rtol=0)


def test_autocast_and_bf16_weights_stay_within_bf16_of_float32() -> None:
    torch.manual_seed(0)
    model = randomised(DiT(**SMALL)).eval()
    x, timestep, label = inputs()
    exact = model(x, timestep, label)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(x, timestep, label)
    half = model.bfloat16()(x.bfloat16(), timestep, label)
    for output in (autocast, half):
        assert output.dtype == torch.bfloat16
        # bf16 rounds by 2^-9; ten times that for the depth of the network.
        assert (output - exact).norm() < 10 * 2**-9 * exact.norm()


def test_training_drops_labels_and_evaluation_does_not() -> None:
    torch.manual_seed(0)
    model = randomised(DiT(**SMALL | {"class_dropout_prob": 0.5}))
    x, timestep, label = inputs(2)
    null = torch.full_like(label, model.null_label)
    assert model.null_label == 10
    model.eval()
    kept, dropped = model(x, timestep, label), model(x, timestep, null)
    assert torch.equal(model(x, timestep, label), kept)
    model.train()
    seen = set()
    for _ in range(20):
        output = model(x, timestep, label)
        for i in range(2):
            # Batched sums may round otherwise than in evaluation.
            matches = [
                bool(torch.allclose(output[i], reference[i], atol=1e-4)) for reference in (kept, dropped)
            ]
            assert sum(matches) == 1
            seen.add(tuple(matches))
    assert seen == {(True, False), (False, True)}


def test_an_unconditional_model_has_no_label_parameter_and_takes_no_labels() -> None:
    model = DiT(**SMALL | {"num_classes": 0, "learn_sigma": False})
    assert model.null_label is None
    assert not any("y_embedder" in name for name in model.state_dict())
    x, timestep, label = inputs()
    assert model(x, timestep).shape == x.shape
    with pytest.raises(ValueError, match="got labels, but num_classes=0 makes it unconditional"):
        model(x, timestep, label)


@EVERY_DEVICE
def test_gradient_checkpointing_changes_no_gradient_and_runs_each_block_twice(device: str) -> None:
    torch.manual_seed(0)
    plain = randomised(DiT(**SMALL, class_dropout_prob=0)).to(device)
    frugal = DiT(**SMALL, class_dropout_prob=0, gradient_checkpointing=True).to(device)
    frugal.load_state_dict(plain.state_dict())
    calls = []
    for block in frugal.blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    x, timestep, label = (each.to(device) for each in inputs(2))
    with in_one_order(device):
        for model in (plain, frugal):
            model(x, timestep, label).square().mean().backward()
    assert len(calls) == 2 * len(frugal.blocks)
    for (name, ours), other in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        if ours.requires_grad:
            assert torch.equal(ours.grad, other.grad), name
    calls.clear()
    frugal.eval()
    frugal(x, timestep, label).sum().backward()
    assert len(calls) == len(frugal.blocks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": 9}, "input_size that is a multiple of patch_size 2, got 9"),
        ({"hidden_size": 50}, "hidden_size that is a multiple of 4 and of num_heads 4, got 50"),
        ({"num_heads": 5}, "multiple of 4 and of num_heads 5, got 48"),
        ({"depth": 0}, "depth >= 1, got 0"),
        ({"num_classes": -1}, "num_classes >= 0 .*, got -1"),
        ({"class_dropout_prob": 1.0}, r"dropout_prob in \[0, 1\), got 1.0"),
        ({"attention": "spda"}, "unknown attention 'spda'; did you mean 'sdpa'"),
    ],
)
def test_impossible_sizes_say_what_is_wanted(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(**SMALL | change)


def test_wrong_inputs_say_what_is_wanted() -> None:
    model = DiT(**SMALL)
    x, timestep, label = inputs()
    for bad in (x[:, :3], x[..., :7], x[..., :5, :], x[..., :0], x[0]):
        with pytest.raises(
            ValueError, match=r"DiT got an input of shape .*, wanted \(B, 4, h, w\) .*patch_size 2"
        ):
            model(bad, timestep, label)
    with pytest.raises(ValueError, match=r"timesteps of shape \(2,\), wanted \(3,\)"):
        model(x, timestep[:2], label)
    with pytest.raises(ValueError, match=r"got no labels; wanted \(3,\) int64 labels in \[0, 10\]"):
        model(x, timestep)
    for bad in (label[:2], label.float()):
        with pytest.raises(ValueError, match=r"got labels of shape .* wanted \(3,\) int64"):
            model(x, timestep, bad)


def test_a_block_is_registered_under_the_names_of_its_parts() -> None:
    names = [
        name for name, _ in Block(8, 2, mlp_ratio=4.0, kernel=lambda qkv: qkv[:, :, 0]).named_parameters()
    ]
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    assert names == [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]


@pytest.mark.hosts
def test_logits_gradients_and_state_dicts_equal_the_original(original: ModuleType) -> None:
    torch.manual_seed(0)
    ours, theirs = randomised(DiT(**SMALL)), original.DiT(**SMALL)
    theirs.load_state_dict(ours.state_dict())
    back = DiT(**SMALL)
    back.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x, timestep, label = inputs()
    for training in (False, True):
        outputs = []
        for model in (ours, theirs, back):
            model.train(training)
            # The same draw of dropped labels in training.
            torch.manual_seed(5)
            outputs.append(model(x, timestep, label))
        assert_close(outputs[0], outputs[1], atol=1e-5, rtol=0)
        assert torch.equal(outputs[0], outputs[2])
    outputs[0].square().mean().backward()
    outputs[1].square().mean().backward()
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if parameter.requires_grad:
            assert_close(parameter.grad, other.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.hosts
def test_a_registered_model_equals_the_original_of_the_same_name(original: ModuleType) -> None:
    torch.manual_seed(0)
    ours = randomised(build(MODELS, {"type": "DiT-S/8", "input_size": 16}), std=0.05).eval()
    theirs = original.DiT_models["DiT-S/8"](input_size=16).eval()
    theirs.load_state_dict(ours.state_dict())
    x, timestep, label = torch.randn(2, 4, 16, 16), torch.tensor([3, 970]), torch.tensor([999, 1000])
    with torch.no_grad():
        assert_close(ours(x, timestep, label), theirs(x, timestep, label), atol=1e-5, rtol=0)


@pytest.mark.hosts
def test_the_initial_weights_equal_the_original_at_the_same_seed(original: ModuleType) -> None:
    torch.manual_seed(7)
    ours = DiT(**SMALL).state_dict()
    torch.manual_seed(7)
    theirs = original.DiT(**SMALL).state_dict()
    for name, tensor in theirs.items():
        # Bit for bit; the sines of the positions may differ in the last place between libraries.
        assert_close(ours[name], tensor, atol=6e-8 if name == "pos_embed" else 0, rtol=0, msg=name)


@pytest.mark.hosts
@pytest.mark.parametrize("name", PAPER_MILLIONS)
def test_names_and_shapes_equal_the_original_for_every_size(original: ModuleType, name: str) -> None:
    with torch.device("meta"):
        ours = build(MODELS, {"type": name}).state_dict()
        theirs = original.DiT_models[name]().state_dict()
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items()
    }
