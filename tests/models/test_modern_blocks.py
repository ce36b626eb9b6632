"""RMSNorm, QK-norm, rotary positions and SwiGLU in DiT and Latte, against formulas and invariants.

Dims: `N` tokens, `H` heads, `K` width of a head.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.latte import Latte
from speedit_plugins.trainer.models.layers import attention
from speedit_plugins.trainer.models.layers.attention import SelfAttention, sdpa
from speedit_plugins.trainer.models.layers.blocks import Block, BlockOptions
from speedit_plugins.trainer.models.layers.rotary import Rotation, grid_rotation, line_rotation
from speedit_plugins.trainer.models.lora import add_adapters
from speedit_plugins.trainer.models.pretrained.exported import check_dit

SMALL = {"input_size": 8, "patch_size": 2, "hidden_size": 48, "depth": 2, "num_heads": 4, "num_classes": 10}
ALL: dict[str, Any] = {"norm": "rms", "qk_norm": True, "rope": True, "perceptron": "swiglu"}
EACH = [{key: value} for key, value in ALL.items()] + [ALL, {"qk_norm": True, "norm": "layer"}]
every_option = pytest.mark.parametrize(
    "options", EACH, ids=lambda options: " ".join(map(str, options.values()))
)


def randomised(model: nn.Module) -> nn.Module:
    """Every trained parameter drawn from N(0, 0.1^2), weights of norms around 1."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.1)
    return model


def inputs(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 4, *(shape or (8, 8))), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 10])


def norm_by_hand(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, is_rms: bool, eps: float
) -> Tensor:
    centre = 0 if is_rms else x.mean(-1, keepdim=True)
    x = (x - centre) / ((x - centre).square().mean(-1, keepdim=True) + eps).sqrt()
    return x * (1 if weight is None else weight) + (0 if bias is None else bias)


def turned_by_hand(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs of (N, K) turned as complex numbers by angles (N, K / 2)."""
    pairs = torch.view_as_complex(x.unflatten(1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)


def grid_angles(rows: int, columns: int, side: int, head_size: int) -> Tensor:
    """(N, K / 2) in a loop over places and pairs."""
    quarter = head_size // 4
    angles = torch.empty(rows * columns, 2 * quarter, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            for i in range(quarter):
                frequency = 10_000 ** (-i / quarter)
                angles[row * columns + column, i] = row * side / rows * frequency
                angles[row * columns + column, quarter + i] = column * side / columns * frequency
    return angles


def block_by_hand(block: Block, x: Tensor, c: Tensor, angles: Tensor | None, options: BlockOptions) -> Tensor:
    """One sample: x (N, D), c (D,)."""
    w = {name: tensor.double() for name, tensor in block.state_dict().items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
        weight, bias = w.get(f"{name}.weight"), w.get(f"{name}.bias")
        return norm_by_hand(x, weight, bias, is_rms=options.norm == "rms", eps=eps)

    m = linear("adaLN_modulation.1", F.silu(c)).chunk(6)
    q, k, v = linear("attn.qkv", norm("norm1", x) * (1 + m[1]) + m[0]).chunk(3, dim=1)
    heads = []
    for part in torch.arange(48).chunk(4):
        query, key = q[:, part], k[:, part]
        if options.qk_norm:
            eps = 1e-6 if options.norm == "rms" else 1e-5
            query, key = norm("attn.q_norm", query, eps), norm("attn.k_norm", key, eps)
        if angles is not None:
            query, key = turned_by_hand(query, angles), turned_by_hand(key, angles)
        heads.append(torch.softmax(query @ key.T / math.sqrt(12), dim=1) @ v[:, part])
    x = x + m[2] * linear("attn.proj", torch.cat(heads, dim=1))
    hidden = norm("norm2", x) * (1 + m[4]) + m[3]
    if options.perceptron == "swiglu":
        # 2/3 of 4 * 48.
        both = linear("mlp.w12", hidden)
        hidden = linear("mlp.w3", F.silu(both[:, :128]) * both[:, 128:])
    else:
        hidden = linear("mlp.fc2", F.gelu(linear("mlp.fc1", hidden), approximate="tanh"))
    return x + m[5] * hidden


@every_option
def test_a_block_equals_its_formula(options: dict[str, Any]) -> None:
    chosen = BlockOptions(**options)
    block = randomised(Block(48, 4, mlp_ratio=4.0, kernel=sdpa, options=chosen)).double()
    x, c = torch.randn(2, 6, 48, dtype=torch.float64), torch.randn(2, 48, dtype=torch.float64)
    angles = grid_angles(2, 3, 4, 12) if chosen.rope else None
    rotation = None if angles is None else grid_rotation(12, 4, shape=(2, 3))
    wanted = torch.stack([block_by_hand(block, *pair, angles, chosen) for pair in zip(x, c, strict=True)])
    # Float64, but the rotation's table is float32.
    assert_close(block(x, c, rotation), wanted, atol=1e-5 if chosen.rope else 1e-11, rtol=0)


def test_the_product_of_turned_tokens_depends_on_the_difference_of_their_places() -> None:
    query, key = torch.randn(2, 12, dtype=torch.float64)

    def product(of_query: tuple[int, int], of_key: tuple[int, int]) -> Tensor:
        table = Rotation(*(part.double().unflatten(0, (9, 9)) for part in grid_rotation(12, 9)))
        turned = (
            Rotation(table.cos[place][None], table.sin[place][None]).turned(x[None, None, None])
            for x, place in ((query, of_query), (key, of_key))
        )
        first, second = turned
        return (first * second).sum()

    # The table is float32, and products have 12 terms.
    assert_close(product((1, 2), (4, 0)), product((5, 8), (8, 6)), atol=1e-5, rtol=0)
    assert not torch.isclose(product((1, 2), (4, 0)), product((1, 2), (4, 1)), atol=1e-3)
    # Whole numbers of frames, on one axis.
    cos, sin = line_rotation(4, torch.tensor([0, 2]))
    assert_close(cos[1].acos(), torch.tensor([2.0, 2.0, 0.02, 0.02]), atol=1e-5, rtol=0)
    assert torch.equal(sin[0], torch.zeros(4))


@pytest.mark.parametrize("sides", [(8, 8), (12, 6), (4, 16), (2, 2)])
def test_a_dit_turns_by_the_places_of_its_grid(sides: tuple[int, int]) -> None:
    model = randomised(DiT(**SMALL, **ALL)).double().eval()
    x, timestep, label = inputs(*sides)
    x = x.double()
    found, hidden = model(x, timestep, label, hidden_after=1)
    assert found.shape == (3, 8, *sides)
    rows, columns = (side // 2 for side in sides)
    c = model.t_embedder(timestep) + model.y_embedder(label)
    tokens = model.x_embedder(x) + model._positions(rows, columns, x.device)
    angles = grid_angles(rows, columns, 4, 12)
    wanted = [
        block_by_hand(model.blocks[0], *pair, angles, model.options) for pair in zip(tokens, c, strict=True)
    ]
    # Tables are float32.
    assert_close(hidden, torch.stack(wanted), atol=1e-5, rtol=0)
    # From the cache.
    assert torch.equal(model(x, timestep, label), found)


def test_a_latte_turns_by_the_place_within_frames_and_by_the_frame_across_them() -> None:
    model = randomised(Latte(**SMALL, num_frames=3, **ALL)).double().eval()
    x, timestep, label = inputs(2, 8, 6)
    _, first = model(x.double(), timestep, label, hidden_after=1)
    _, second = model(x.double(), timestep, label, hidden_after=2)
    c = model.t_embedder(timestep) + model.y_embedder(label)
    first = first + model.temp_embed[:, :2].unsqueeze(2)
    angles = torch.outer(torch.arange(2.0), 10_000 ** -(torch.arange(6) / 6)).double()
    for sample, place in ((0, 0), (2, 11)):
        wanted = block_by_hand(model.blocks[1], first[sample, :, place], c[sample], angles, model.options)
        assert_close(second[sample, :, place], wanted, atol=1e-5, rtol=0)
    # The block before it attends within a frame, as a DiT's.
    tokens = model.x_embedder(x[1, :, 1].double()[None]) + model._positions(4, 3, x.device)
    wanted = block_by_hand(model.blocks[0], tokens[0], c[1], grid_angles(4, 3, 4, 12), model.options)
    found = model(x.double(), timestep, label, hidden_after=1)[1]
    assert_close(found[1, 1], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [DiT, Latte])
def test_what_is_off_changes_no_weight_and_what_is_on_adds_its_own(kind: type[DiT]) -> None:
    torch.manual_seed(3)
    plain = kind(**SMALL).state_dict()
    torch.manual_seed(3)
    off = kind(**SMALL, norm="layer", qk_norm=False, rope=False, perceptron="gelu").state_dict()
    torch.manual_seed(3)
    on = kind(**SMALL, norm="rms", qk_norm=True, rope=True).state_dict()
    assert list(off) == list(plain)
    for name, value in plain.items():
        # Norms and rotations draw nothing.
        assert torch.equal(off[name], value), name
        assert torch.equal(on[name], value), name
    added = {
        name.partition("blocks.0.")[2] or name for name in on if name not in plain and "blocks.1" not in name
    }
    ropes = {"feat_rope"} | ({"temp_rope"} if kind is Latte else set())
    norms = {"norm1.weight", "norm2.weight", "attn.q_norm.weight", "attn.k_norm.weight"}
    tables = {f"{rope}.freqs_{part}" for rope in ropes for part in ("cos", "sin")}
    assert added == norms | {"final_layer.norm_final.weight"} | tables
    assert all((on[name] == 1).all() for name in on if "norm" in name)


@pytest.mark.parametrize(("kind", "shape"), [(DiT, (8, 8)), (Latte, (2, 8, 6))])
def test_recomputation_meta_device_xformers_and_extra_channels(
    kind: type[DiT], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**SMALL, **ALL, "class_dropout_prob": 0.0}
    with torch.device("meta"):
        late = kind(**options)
    late.to_empty(device="cpu")
    torch.manual_seed(3)
    late.reset_parameters()
    model = kind(**options)
    torch.manual_seed(3)
    model.reset_parameters()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, late.state_dict()[name]), name
    x, timestep, label = inputs(*shape)
    label = label.clamp(max=9)
    weights = randomised(model).state_dict()
    model(x, timestep, label).square().mean().backward()
    monkeypatch.setitem(attention.ATTENTION_KERNELS, "xformers", xformers_stand_in)
    for change in ({"gradient_checkpointing": True}, {"attention": "xformers"}):
        other = kind(**options, **change)
        other.load_state_dict(weights)
        other(x, timestep, label).square().mean().backward()
        for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
            if ours.requires_grad:
                assert_close(theirs.grad, ours.grad, atol=1e-6, rtol=1e-4, msg=name)
    extended = randomised(kind(**options, extra_channels=2)).eval()
    extra = torch.randn(3, 2, *shape)
    found, zeros = (
        extended(x, timestep, {"extra": each, "label": label}) for each in (extra, torch.zeros_like(extra))
    )
    assert found.shape == zeros.shape == (3, 8, *shape)
    assert not torch.equal(found, zeros)


def xformers_stand_in(qkv: Tensor) -> Tensor:
    """The layout of xformers, computed by torch."""
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
    weight = torch.softmax(query @ key.mT / math.sqrt(qkv.shape[-1]), dim=-1)
    return (weight @ value).transpose(1, 2)


@pytest.mark.filterwarnings("error")
def test_autocast_and_bf16_weights_stay_within_bf16_of_float32() -> None:
    model = randomised(DiT(**SMALL, **ALL)).eval()
    x, timestep, label = inputs()
    exact = model(x, timestep, label)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(x, timestep, label)
        seen = []
        for block in model.blocks:
            block.attn.kernel = lambda qkv: seen.append(qkv.dtype) or sdpa(qkv)
        model(x, timestep, label)
    # Attention runs in half precision, although norms and tables are float32.
    assert set(seen) == {torch.bfloat16}
    half = model.bfloat16()(x.bfloat16(), timestep, label)
    for output in (autocast, half):
        assert output.dtype == torch.bfloat16
        # bf16 rounds by 2^-9; ten times that for the depth of the network.
        assert (output - exact).norm() < 10 * 2**-9 * exact.norm()


def test_adapters_find_their_layers_and_exports_are_refused_by_option() -> None:
    pytest.importorskip("peft")
    model = DiT(**SMALL, **ALL)
    with pytest.raises(
        ValueError, match=r"without norm rms, qk_norm true, rope true, perceptron swiglu; got"
    ):
        check_dit(model)
    assert check_dit(plain := DiT(**SMALL)) is plain
    add_adapters(model, rank=2, source="test")
    adapted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(adapted) == 2 * 2 * 2
    assert all(".attn.qkv." in name or ".attn.proj." in name for name in adapted)
    x, timestep, label = inputs()
    assert model.eval()(x, timestep, label).shape == (3, 8, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "rns"}, "unknown norm 'rns'; did you mean 'rms'.; known: layer, rms"),
        (
            {"perceptron": "swglu"},
            "unknown perceptron 'swglu'; did you mean 'swiglu'.; known: gelu, gelu_erf, swiglu",
        ),
        ({"rope": True, "num_heads": 8}, "heads with a width that is a multiple of 4, got 6"),
    ],
)
def test_what_does_not_exist_or_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(**SMALL | options)


def test_attention_takes_a_rotation_for_each_sample() -> None:
    layer = SelfAttention(48, 4, kernel=sdpa).double()
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    table = Rotation(*(part.double() for part in grid_rotation(12, 4)))
    kept = torch.stack([torch.randperm(16)[:5] for _ in range(2)])
    found = layer(x, Rotation(table.cos[kept], table.sin[kept]))
    for number in range(2):
        wanted = layer(x[number : number + 1], Rotation(*(part[kept[number]] for part in table)))
        assert_close(found[number : number + 1], wanted, atol=1e-12, rtol=0)
