import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from speedit_plugins.registry import MODELS, build
from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.interface import example_inputs, input_shape
from speedit_plugins.trainer.models.latte import Latte
from speedit_plugins.trainer.models.mdt import MDTv2
from speedit_plugins.trainer.models.sides import check_one_size
from speedit_plugins.trainer.models.sit import LightningDiT, SiT
from speedit_plugins.trainer.models.text_conditioned.text_dit import TextLatte

TEXT: dict[str, Any] = {"text_width": 12, "text_length": 5}
SIZES: dict[str, Any] = {"input_size": 8, "patch_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2}
MODERN: dict[str, Any] = {"norm": "rms", "qk_norm": True, "rope": True, "perceptron": "swiglu"}
FRAMES = {"TextDiT": {}, "TextLatte": {"num_frames": 3}}
PARENTS: dict[str, type[DiT]] = {"TextDiT": DiT, "TextLatte": Latte}
BOTH = pytest.mark.parametrize("name", ["TextDiT", "TextLatte"])


def made(name: str, **options: Any) -> Any:
    """A small model whose parameters are all drawn: nothing hides behind an initial zero."""
    model = build(MODELS, {"type": name, **SIZES, **TEXT, **FRAMES[name], **options})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def condition(length: int = 5, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(5).expand(2, 5) < length
    return {"tokens": torch.randn(2, 5, 12, generator=generator), "mask": mask}


def noised(model: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, *input_shape(model), generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([3.0, 500.5])


def normalised(features: Tensor) -> Tensor:
    centred = features - features.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()


@BOTH
@pytest.mark.parametrize(("draft", "pooling"), [(False, "words"), (True, "mean"), (True, "words")])
def test_the_model_is_its_parent_with_the_caption_beside_the_timestep(
    name: str, draft: bool, pooling: str
) -> None:
    model = made(name, draft=draft, text_pooling=pooling)
    parent = PARENTS[name](**SIZES, **FRAMES[name], num_classes=0, extra_channels=4 * draft).eval()
    own = ("caption_embedder.", "draft_gate.", "null_")
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(own)}
    parent.load_state_dict(state)
    given = condition(length=3)
    # By hand: of the three tokens that the mask lets through.
    layers, read = model.caption_embedder, given["tokens"][:, :3]
    if pooling == "words":
        read = normalised(read) @ layers.of_token.weight.T + layers.of_token.bias
        read = nn.functional.silu(read)
    mean = normalised(read.mean(dim=1))
    hidden = nn.functional.silu(mean @ layers.of_mean.weight.T + layers.of_mean.bias)
    added = hidden @ layers.out.weight.T + layers.out.bias
    embed_time = parent.t_embedder.forward
    parent.t_embedder.forward = lambda timestep: embed_time(timestep) + added  # type: ignore[method-assign]  # of this object
    x, timestep = noised(model)
    if draft:
        start = (hidden @ layers.draft.weight.T + layers.draft.bias).view_as(x)
        wanted = parent(x, timestep, {"extra": start})
        modulation = nn.functional.silu(embed_time(timestep) + added)
        gate = modulation @ model.draft_gate.weight.T + model.draft_gate.bias
        wanted[:, :4] += gate.view(2, 4, *[1] * (x.ndim - 2)) * start
    else:
        wanted = parent(x, timestep)
    # float32 sums of a hundred terms, in another order.
    assert_close(model(x, timestep, given), wanted, rtol=1e-5, atol=1e-5)


@BOTH
def test_a_prediction_depends_on_the_words_alone(name: str) -> None:
    model = made(name, draft=True, text_pooling="words")
    given, (x, timestep) = condition(length=3), noised(model)
    first = model(x, timestep, given)
    padded = {**given, "tokens": given["tokens"].clone()}
    padded["tokens"][:, 3:] += 1
    assert_close(model(x, timestep, padded), first, rtol=0, atol=0)
    other = {**given, "tokens": given["tokens"].flip(0)}
    assert not torch.allclose(model(x, timestep, other), first, atol=1e-3)
    # The size of an encoder's features does not matter, up to the 1e-5 in the normalisation.
    larger = {**given, "tokens": 100 * given["tokens"]}
    assert_close(model(x, timestep, larger), first, rtol=0, atol=1e-3)


@BOTH
@pytest.mark.parametrize("options", [{}, {"draft": True, "text_hidden": 20}, MODERN])
def test_an_example_call_has_the_shapes_of_a_real_one(name: str, options: dict[str, Any]) -> None:
    options = {"learn_sigma": False, "extra_channels": 5, **options}
    with torch.device("meta"):
        model = build(MODELS, {"type": name, **SIZES, **TEXT, **FRAMES[name], **options})
    assert (model.extra_channels, model.out_channels, model.num_classes) == (5, 4, 0)
    x, timestep, given = example_inputs(model, 2)
    assert model(x, timestep, given).shape == (2, 4, *x.shape[2:])


@BOTH
def test_training_starts_from_the_draft_and_reaches_every_layer(name: str) -> None:
    model, given = made(name, draft=True, text_pooling="words").train(), condition()
    x, timestep = noised(model)
    model(x, timestep, given).square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and grad.any() for grad in grads)
    model.reset_parameters()
    # As a DiT's, the last layer is zero at the start. The gate of the draft is 1 at every timestep.
    _, draft = model.caption_embedder(given["tokens"], given["mask"])
    mean, variance = model(x, timestep, given).chunk(2, dim=1)
    assert torch.equal(mean, draft)
    assert not variance.any()
    # Standard deviations of Xavier-uniform weights, sqrt(2 / (12 + 16)), and of what modulates.
    layers = model.caption_embedder
    for weight, wanted in ((layers.of_token.weight, (2 / 28) ** 0.5), (layers.out.weight, 0.02)):
        assert float(weight.detach().std()) == pytest.approx(wanted, rel=0.2)


@BOTH
def test_the_tokens_after_a_block_are_those_of_the_parent(name: str) -> None:
    model = made(name, draft=True)
    x, timestep = noised(model)
    prediction, tokens = model(x, timestep, condition(), hidden_after=1)
    assert_close(prediction, model(x, timestep, condition()), rtol=0, atol=0)
    assert tokens.shape[-2:] == (4, 16)


@BOTH
def test_checkpointing_changes_no_gradient(name: str) -> None:
    found = []
    for is_checkpointed in (False, True):
        model = made(name, gradient_checkpointing=is_checkpointed).train()
        model(*noised(model), condition()).square().sum().backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_the_empty_caption_is_saved_with_the_weights() -> None:
    model, given = made("TextDiT"), condition()
    model.set_null_text({name: value[:1] for name, value in given.items()})
    other = made("TextDiT")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.null_text["tokens"], given["tokens"][:1])
    assert other.null_text["mask"].all()


def test_images_are_clips_of_one_frame_unless_there_is_a_draft() -> None:
    model = made("TextLatte")
    assert list(model.taken_frames) == [1, 2, 3]
    assert model(torch.zeros(2, 4, 1, 8, 8), torch.zeros(2), condition()).shape == (2, 8, 1, 8, 8)
    drafting = made("TextLatte", draft=True)
    assert list(drafting.taken_frames) == [3]
    with pytest.raises(ValueError, match=r"takes inputs of one size, \(3, 8, 8\), got \(1, 8, 8\)"):
        drafting(torch.zeros(2, 4, 1, 8, 8), torch.zeros(2), condition())


def test_what_does_not_fit_is_refused() -> None:
    model, x = made("TextDiT"), torch.zeros(2, 4, 8, 8)
    with pytest.raises(ValueError, match="needs caption features of width 12, got none"):
        model(x, torch.zeros(2), None)
    with pytest.raises(ValueError, match="needs caption features of width 12, got width 3"):
        model(x, torch.zeros(2), {"tokens": torch.zeros(2, 5, 3), "mask": torch.ones(2, 5)})
    with pytest.raises(ValueError, match=r"timesteps of shape \(3,\), wanted \(2,\)"):
        model(x, torch.zeros(3), condition())
    with pytest.raises(ValueError, match=r"wanted \(B, 4, h, w\)"):
        model(x[:, :3], torch.zeros(2), condition())
    with pytest.raises(ValueError, match="needs text_hidden >= 1, got 0"):
        TextLatte(**SIZES, **TEXT, text_hidden=0)
    with pytest.raises(ValueError, match="unknown text_pooling 'word'; did you mean 'words'"):
        TextLatte(**SIZES, **TEXT, text_pooling="word")
    with pytest.raises(ValueError, match="even depth, got 3"):
        TextLatte(**{**SIZES, "depth": 3}, **TEXT)


@BOTH
def test_a_draft_is_of_one_size_and_a_run_says_so_before_it_starts(name: str) -> None:
    places = {"image_size": (8, 8), "data.dataset.buckets[0] [8, 16]": (8, 16)}
    check_one_size(places, made(name), downsample=1)
    with pytest.raises(
        ValueError, match=rf"buckets\[0\].*needs 8 x 8, got 8 x 16: this {name} takes one size"
    ):
        check_one_size(places, made(name, draft=True), downsample=1)


@BOTH
def test_a_model_of_yours_that_extends_one_has_its_own_options(name: str) -> None:
    parent = type(made(name))

    class Mine(parent):  # type: ignore[valid-type, misc]  # of either model
        def __init__(self, *, girth: int = 3, **options: Any) -> None:
            super().__init__(**options)
            self.girth = girth

    assert "girth" in inspect.signature(Mine).parameters
    taken = inspect.signature(parent).parameters
    assert {"text_width", "hidden_size", "rope"} <= set(taken)
    assert not {"options", "num_classes", "class_dropout_prob"} & set(taken)
    assert Mine(**SIZES, **TEXT, **FRAMES[name], girth=5).girth == 5


@pytest.mark.parametrize("parent", [Latte, LightningDiT, MDTv2, SiT])
def test_a_signature_is_not_inherited_by_another_constructor(parent: type[nn.Module]) -> None:
    class Mine(parent):  # type: ignore[valid-type, misc]  # of each model
        def __init__(self, girth: int) -> None:
            pass

    assert list(inspect.signature(Mine).parameters) == ["girth"]
    assert "hidden_size" in inspect.signature(parent).parameters
