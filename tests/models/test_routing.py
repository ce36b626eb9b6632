"""Routes past the middle blocks of a model.

Dims: `B` samples, `F` frames, `N` tokens of a frame, `K` of them kept.
"""

import copy
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from saved_models import TEXT_WIDTH
from torch import Tensor, nn
from torch.testing import assert_close

from speedit_plugins.registry import MODELS, build
from speedit_plugins.trainer.models.routing import chosen, rejoined, route_of, set_route, taken

SIZES: dict[str, Any] = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 4, "num_heads": 2}
TEXT: dict[str, Any] = {"num_layers": 4, "num_heads": 2, "head_dim": 16, "text_width": TEXT_WIDTH}
# N is 16 in all of them.
KINDS: dict[str, dict[str, Any]] = {
    "DiT": {"type": "DiT", **SIZES, "num_classes": 3},
    "DiT with rope": {"type": "DiT", **SIZES, "num_classes": 3, "rope": True},
    "LightningDiT": {"type": "LightningDiT", **SIZES, "num_classes": 3, "in_channels": 4},
    "Latte": {"type": "Latte", **SIZES, "num_frames": 3},
    "Latte with rope": {"type": "Latte", **SIZES, "num_frames": 3, "rope": True},
    "PixArt": {"type": "PixArt", "input_size": 8, **TEXT, "text_length": 5},
    "LatteT2V": {"type": "LatteT2V", "input_size": 8, "num_frames": 3, **TEXT, "text_length": 5},
}
# Blocks of `KINDS` from 1 to 2, counted from 0.
ROUTE = (1, -2)


def built(kind: str, **options: Any) -> nn.Module:
    """A model in training, without dropout, and with weights behind which nothing hides."""
    torch.manual_seed(0)
    section = {**KINDS[kind], **options}
    if section.get("num_classes"):
        section["class_dropout_prob"] = 0.0
    model = build(MODELS, section)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2 if "bias" in name else 0.1)
    return model.train()


def called(model: nn.Module, *, frames: int | None = 3, seed: int = 1, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    is_video = getattr(model, "num_frames", None) is not None
    x = torch.randn(2, 4, *([frames] if is_video else []), 8, 8, generator=generator)
    condition: Any = None
    if hasattr(model, "text_width"):
        tokens = torch.randn(2, 5, TEXT_WIDTH, generator=generator)
        condition = {"tokens": tokens, "mask": torch.ones(2, 5, dtype=torch.bool)}
    elif model.num_classes:
        condition = torch.tensor([0, 2])
    torch.manual_seed(seed)
    return model(x, torch.tensor([30.0, 700.0]), condition, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_route_that_keeps_every_token_in_another_order_changes_nothing(kind: str) -> None:
    # K = N - floor(0.001 N) = N: all tokens, permuted. Blocks must give each its own position and sample.
    model = built(kind)
    whole = called(model)
    set_route(model, *ROUTE, 0.999)
    # Sums over tokens in another order: float32 rounding.
    assert_close(called(model), whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_only_training_routes_and_every_sample_takes_its_own_way(kind: str) -> None:
    model = built(kind)
    with torch.no_grad():
        samples = called(model.eval())
        set_route(model, *ROUTE, 0.5)
        assert_close(called(model), samples, rtol=0, atol=0)
    routed = called(model.train())
    assert (routed - samples).abs().max() > 1e-3
    # Every weight has a part in it, as DistributedDataParallel wants.
    routed.square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_blocks_see_the_same_tokens(kind: str) -> None:
    gradients = []
    for recomputed in (False, True):
        model = built(kind, gradient_checkpointing=recomputed)
        set_route(model, *ROUTE, 0.5)
        # Two passes before a backward pass, each with its own choice.
        (called(model, seed=1) + called(model, seed=2)).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "frames"), [("DiT", 1), ("Latte", 3)])
def test_tokens_that_pass_by_leave_the_route_as_they_came(kind: str, frames: int) -> None:
    model = built(kind)
    set_route(model, *ROUTE, 0.25)
    _, before = called(model, hidden_after=1)
    if frames > 1:
        # What the first block on the route is given.
        before = model._before(2, before)
    _, inside = called(model, hidden_after=2)
    _, after = called(model, hidden_after=3)
    for hidden in (inside, after):
        is_changed = (hidden != before).any(-1).reshape(2, frames, 16)
        # 4 of 16 tokens went through, at the same places in all frames.
        assert is_changed.sum(-1).eq(4).all()
        assert_close(is_changed, is_changed[:, :1].expand_as(is_changed))
        assert not torch.equal(is_changed[0], is_changed[1])


def test_a_routed_block_computes_on_the_kept_tokens_alone() -> None:
    model = built("DiT")
    set_route(model, 1, 1, 0.5)
    _, before = called(model, hidden_after=1)
    _, after = called(model, hidden_after=2)
    c = model.t_embedder(torch.tensor([30.0, 700.0])) + model.y_embedder(torch.tensor([0, 2]))
    for x, y, one in zip(before, after, c, strict=True):
        kept = [place for place in range(16) if not torch.equal(x[place], y[place])]
        assert len(kept) == 8
        assert_close(y[kept], model.blocks[1](x[None, kept], one[None])[0], atol=1e-5, rtol=1e-5)


def test_images_in_a_text_to_video_model_are_routed_too() -> None:
    model = built("LatteT2V")
    whole = called(model, frames=1)
    set_route(model, *ROUTE, 0.999)
    assert_close(called(model, frames=1), whole, atol=2e-5, rtol=1e-4)
    set_route(model, *ROUTE, 0.5)
    assert (called(model, frames=1) - whole).abs().max() > 1e-3


def test_every_place_is_kept_equally_often() -> None:
    B, N, keep = 4000, 10, 0.3
    places = chosen(torch.zeros(B, N, 1), keep)
    counts = torch.zeros(B, N).scatter(1, places, 1.0)
    assert counts.sum(1).eq(3).all()
    # 4 sigma of a binomial frequency: 4 sqrt(0.3 0.7 / 4000) = 0.029.
    assert_close(counts.mean(0), torch.full((N,), keep), atol=0.029, rtol=0)


def test_tokens_are_put_back_where_they_were() -> None:
    x = torch.randn(2, 3, 8, 4)
    places = chosen(x, 0.5)
    assert_close(rejoined(x, taken(x, places), places), x, rtol=0, atol=0)
    zeros = rejoined(x, torch.zeros_like(taken(x, places)), places)
    for sample, kept in enumerate(places.tolist()):
        others = [place for place in range(8) if place not in kept]
        assert not zeros[sample, :, kept].any()
        assert_close(zeros[sample, :, others], x[sample, :, others], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("start", "end", "depth", "blocks"),
    # The last two are those of the paper: blocks 2 to 8 of DiT-B, 2 to 24 of DiT-XL.
    [(0, 0, 1, (1, 1)), (1, -2, 4, (2, 3)), (-3, -1, 4, (2, 4)), (2, -4, 12, (3, 9)), (2, -4, 28, (3, 25))],
)
def test_blocks_are_counted_from_zero_or_from_the_end(
    start: int, end: int, depth: int, blocks: tuple[int, int]
) -> None:
    route = route_of(start, end, 0.5, depth=depth)
    assert (route.first, route.last) == blocks


@pytest.mark.parametrize(
    ("kind", "start", "end", "message"),
    [
        ("DiT", 2, -4, r"0 <= from <= to < 4, the model's blocks, got from 2 and to -4, blocks 2 and 0"),
        ("DiT", 1, 4, r"got from 1 and to 4"),
        ("Latte", 0, 2, r"1 <= from <= to < 4"),
        ("LatteT2V", 0, 2, r"1 <= from <= to < 4"),
    ],
)
def test_a_route_needs_blocks_of_the_model(kind: str, start: int, end: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        set_route(built(kind), start, end, 0.5)


@pytest.mark.parametrize(
    "section",
    [
        {"type": "UNet", "input_size": 8, "block_out_channels": (32, 32), "text_width": 8, "text_length": 5},
        {"type": "MDT", **SIZES, "num_classes": 3},
    ],
    ids=["UNet", "MDT"],
)
def test_other_models_are_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{section['type']} has no row of blocks.*wanted DiT, SiT"):
        set_route(build(MODELS, section), 0, 1, 0.5)


def test_a_compiled_model_routes() -> None:
    model = built("DiT")
    set_route(model, *ROUTE, 0.5)
    compiled = copy.deepcopy(model)
    # The graph is captured as for any backend, and run as it is: the random numbers are torch's own.
    compiled.compile(backend="eager")
    assert_close(called(compiled), called(model), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def original() -> ModuleType:
    source = Path(os.environ.get("SPEEDIT_HOSTS", "")) / "CompVis+tread" / "routing_module.py"
    if not source.is_file():
        pytest.skip("needs $SPEEDIT_HOSTS with a checkout CompVis+tread")
    spec = importlib.util.spec_from_file_location("tread_routing", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.hosts
@pytest.mark.parametrize("rate", [0.25, 0.3, 0.5, 0.9])
def test_the_choice_is_that_of_the_release(original: ModuleType, rate: float) -> None:
    x, router = torch.randn(3, 25, 8), original.Router()
    places = seeded(lambda: router.get_mask(x, selection_rate=rate))
    assert_close(seeded(lambda: chosen(x, 1 - rate)), places, rtol=0, atol=0)
    kept = taken(x, places)
    assert_close(kept, router.start_route(x, places), rtol=0, atol=0)
    changed = 2 * kept
    assert_close(rejoined(x, changed, places), router.end_route(changed, places, x), rtol=0, atol=0)


def seeded(action: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(5)
    return action()
