"""REPA: tokens aligned with the features of a vision network.

Dims: `B` samples, `F` frames, `N` tokens, `Z` width of the features.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from runs import small_config, small_trainer
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.trainer.accelerations.alignment import alignment, build_projector, on_grid
from speedit_plugins.trainer.accelerations.objective import Objective
from speedit_plugins.trainer.accelerations.teachers import EmbeddedNetwork
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.config.validation import ConfigError
from speedit_plugins.trainer.logging.tracking import SilentTracker
from speedit_plugins.trainer.models.training_only import layers_of
from speedit_plugins.trainer.models.weights import read_checkpoint
from speedit_plugins.trainer.training.assembly import build_trainer
from speedit_plugins.trainer.training.interrupt import StopRequest
from speedit_plugins.trainer.training.trainer import Trainer

REPA: dict[str, Any] = {
    "type": "REPA",
    "teacher": "embedded",
    "teacher_size": 32,
    "layer": 1,
    "projector_width": 16,
}


def section(**changes: Any) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in {**REPA, **changes}.items()) + "}"


def scored(trainer: Trainer) -> tuple[Any, Any, Any]:
    """A batch's inputs, its losses, and those without the alignment, at one draw."""
    trainer.objective.advance(trainer.step)
    batch = next(trainer.loader)
    rows = len(batch.get("image", batch.get("video", batch.get("latent_mean"))))
    generators = [torch.Generator().manual_seed(number) for number in range(rows)]
    given = trainer.inputs.encode(batch, generators)
    draw = trainer.policy.draw(rows, generator=torch.Generator().manual_seed(0))
    trainer.model.eval()
    terms = trainer.objective.losses(given, draw)
    return given, terms, Objective(trainer.engine, trainer.objective.process).losses(given, draw)


def test_the_loss_is_less_by_the_similarity_whatever_the_policys_weight(
    tmp_path: Path,
) -> None:
    trainer = small_trainer(
        tmp_path, alignment=section(weight=0.25), diffusion__policy="{type: speed}", model__patch_size=2
    )
    given, terms, plain = scored(trainer)
    # 32 pixels give the teacher's map 2 x 2 cells; the model has 4 x 4 tokens.
    assert given.features.shape == (16, 112, 2, 2)
    seen: list[Tensor] = []
    projector = layers_of(trainer.model)["projector"]
    hook = projector.register_forward_hook(lambda *call: seen.append(call[2]))
    draw = trainer.policy.draw(16, generator=torch.Generator().manual_seed(0))
    trainer.objective.losses(given, draw)
    hook.remove()
    tokens, target = seen[0], on_grid(given.features, 4, 4)
    for number in range(16):
        cosine = [
            (a / a.norm()) @ (b / b.norm()) for a, b in zip(tokens[number], target[number], strict=True)
        ]
        assert_close(terms.alignment[number], torch.stack(cosine).mean())
    assert_close(terms.loss, plain.loss - 0.25 * terms.alignment)
    assert_close(terms.mse, plain.mse, rtol=0, atol=0)
    assert plain.alignment is None


def test_a_map_on_another_grid_is_interpolated_and_keeps_a_constant() -> None:
    features = torch.arange(6.0).view(1, 1, 2, 3)
    assert_close(on_grid(features, 2, 3), torch.arange(6.0).view(1, 6, 1), rtol=0, atol=0)
    # Rows of the map are 0 1 2 and 3 4 5: halving the rows takes their mean.
    assert_close(on_grid(features, 1, 3).flatten(), torch.tensor([1.5, 2.5, 3.5]))
    clip = torch.full((2, 3, 5, 2, 2), 7.0)  # B, F, Z
    assert_close(on_grid(clip, 4, 3), torch.full((2, 3, 12, 5), 7.0))


def test_after_its_end_the_term_is_off_and_the_teacher_is_not_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    encode = EmbeddedNetwork.encode
    monkeypatch.setattr(EmbeddedNetwork, "encode", lambda *given: calls.append(1) or encode(*given))
    trainer = small_trainer(tmp_path, alignment=section(until=2), max_training_steps=4, log_every=1)
    calls.clear()
    rows: list[dict[str, Any]] = []

    class Kept(SilentTracker):
        def log(self, step: int, values: Any) -> None:
            rows.append(dict(values))

    trainer.fit(Kept(), StopRequest())
    assert len(calls) == 2
    assert ["alignment" in row for row in rows] == [True, True, False, False]
    assert all(-1 <= row["alignment"] <= 1 for row in rows[:2])
    given, terms, plain = scored(trainer)
    assert given.features is None
    assert_close(terms.loss, plain.loss, rtol=0, atol=0)
    terms.loss.mean().backward()
    # Every parameter takes part in the backward pass, as DistributedDataParallel needs.
    gradients = [parameter.grad for parameter in layers_of(trainer.model).parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    # What draws samples has no projector, and the run's checkpoint starts a training without one.
    last = tmp_path / "checkpoints" / "step_0000004"
    assert not any(name.startswith("training_only") for name in read_checkpoint(last / "model.safetensors"))
    small_trainer(tmp_path / "plain", pretrained=last)
    small_trainer(tmp_path / "again", pretrained=last, alignment=section())


def test_adapters_are_trained_beside_the_projector(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    plain = small_trainer(tmp_path / "base", max_training_steps=1)
    plain.fit(SilentTracker(), StopRequest())
    start = tmp_path / "base" / "checkpoints" / "step_0000001"
    options = {"alignment": section(), "pretrained": start, "lora__rank": 2}
    trainer = small_trainer(tmp_path / "lora", max_training_steps=2, **options)
    trainer.fit(SilentTracker(), StopRequest())
    again = small_trainer(tmp_path / "lora", max_training_steps=3, **options)
    again.restore(tmp_path / "lora" / "checkpoints" / "step_0000002")
    for ours, theirs in zip(
        layers_of(again.model).parameters(), layers_of(trainer.model).parameters(), strict=True
    ):
        assert_close(ours, theirs, rtol=0, atol=0)


CAPTIONS = (
    "diffusion.policy={type: uniform}",
    "model.num_layers=2",
    "model.num_heads=2",
    "optimizer.warmup_steps=0",
)
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Latte": (
        "configs/video/base.yaml",
        (
            "num_classes=10",
            "image_size=16",
            "num_frames=4",
            "model={type: Latte, patch_size: 4, input_size: 16, in_channels: 1}",
            "model.hidden_size=16",
            "model.depth=2",
            "model.num_heads=2",
            "encoder={type: Pixels, channels: 1}",
            "data.dataset=MovingDigits",
            "precision=fp32",
        ),
    ),
    "LatteT2V": ("configs/text_to_video/moving_digits.yaml", (*CAPTIONS, "model.type=LatteT2V")),
    "PixArt": ("configs/text_to_image/emoji.yaml", (*CAPTIONS, "model.type=PixArt")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("type_", ["REPA", "SRA"])
def test_videos_and_captions(tmp_path: Path, kind: str, type_: str) -> None:
    name, own = KINDS[kind]
    options = [f"experiment_dir={tmp_path}", "data.batch_size=4", "max_training_steps=2", *own]
    options += [
        f"alignment={section() if type_ == 'REPA' else '{type: SRA, layer: 1}'}",
        "data.num_workers=0",
    ]
    trainer = build_trainer(load_config(name, "train", options))
    _, terms, plain = scored(trainer)
    assert_close(terms.loss, plain.loss - 0.5 * terms.alignment)
    if kind == "Latte":
        return
    # A checkpointed block runs a second time in the backward pass; the gradients stay.
    gradients, batch = [], next(trainer.loader)
    trainer.model.train()
    for is_checkpointed in (False, True):
        if is_checkpointed:
            trainer.model.net.enable_gradient_checkpointing()
        trainer.model.zero_grad()
        torch.manual_seed(0)
        given = trainer.inputs.encode(batch, [torch.Generator().manual_seed(i) for i in range(4)])
        draw = trainer.policy.draw(4, generator=torch.Generator().manual_seed(0))
        trainer.objective.losses(given, draw).loss.mean().backward()
        gradients.append([each.grad for each in trainer.model.parameters() if each.grad is not None])
    assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignment": "{layer: 2}"}, r"alignment\.layer.*no effect with alignment\.type none; wanted 8"),
        ({"alignment": "{type: REPA}"}, r"alignment\.teacher.*wanted embedded"),
        ({"alignment": section(decay=0.5)}, r"alignment\.decay.*no effect with alignment\.type REPA"),
        ({"alignment": "{type: SRA, teacher: embedded}"}, r"alignment\.teacher.*no effect.*SRA; wanted null"),
        ({"alignment": "{type: SRA, layer: 2, teacher_layer: 2}"}, r"a block after alignment\.layer 2"),
        ({"alignment": section(), "plugin": "gemini"}, r"plugin.*alignment\.type REPA; wanted ddp"),
        (
            {"alignment": "{type: SRA, layer: 1}", "lora__rank": 1, "pretrained": "x"},
            r"lora\.rank.*SRA needs an average of all weights",
        ),
    ],
)
def test_what_cannot_be_combined_is_told(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(tmp_path, **changes)


def test_a_block_beyond_the_models_last_is_told(tmp_path: Path) -> None:
    for text, message in (
        (section(layer=3), r"alignment\.layer: wanted a block of the model's 2, got 3$"),
        ("{type: SRA}", r"alignment\.layer: wanted a block of the model's 2, got 8, the default$"),
        ("{type: SRA, layer: 5, teacher_layer: 9}", r"alignment\.layer: wanted .* 2, got 5$"),
        (
            "{type: SRA, layer: 2}",
            r"alignment\.teacher_layer: wanted .* 2, got 4, twice alignment\.layer 2; wanted"
            r" alignment\.layer before the last",
        ),
        (
            "{type: SRA, layer: 1, teacher_layer: 7}",
            r"teacher_layer: wanted .* 2, got 7; wanted one after alignment\.layer, up to 2$",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            small_trainer(tmp_path, alignment=text)


@pytest.fixture(scope="module")
def repa() -> Iterator[ModuleType]:
    """`loss.py` of sihyun-yu/REPA."""
    path = Path(os.environ.get("SPEEDIT_HOSTS", "/nowhere")) / "sihyun-yu+REPA" / "loss.py"
    if not path.is_file():
        pytest.skip("needs a checkout of sihyun-yu/REPA in $SPEEDIT_HOSTS")
    spec = importlib.util.spec_from_file_location("repa_loss", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["repa_loss"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["repa_loss"]


@pytest.mark.hosts
def test_the_release_has_the_same_loss(repa: ModuleType) -> None:
    torch.manual_seed(0)
    features, tokens = torch.randn(5, 16, 12), torch.randn(5, 16, 12)
    images = torch.randn(5, 4, 8, 8)
    _, theirs = repa.SILoss()(lambda x, t: (x, [tokens]), images, zs=[features])
    assert_close(-alignment(tokens, features).mean(), theirs.mean())


@pytest.mark.hosts
def test_the_release_has_the_same_projector() -> None:
    path = Path(os.environ.get("SPEEDIT_HOSTS", "/nowhere")) / "sihyun-yu+REPA" / "models" / "sit.py"
    if not path.is_file():
        pytest.skip("needs a checkout of sihyun-yu/REPA in $SPEEDIT_HOSTS")
    # The file imports timm; its projector needs torch alone.
    source = path.read_text()
    start = source.index("def build_mlp")
    names: dict[str, Any] = {"nn": torch.nn}
    exec(source[start : source.index("\ndef ", start + 1)], names)  # noqa: S102 - the host's own function
    theirs, ours = names["build_mlp"](12, 20, 8), build_projector(12, 20, 8)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randn(3, 12)
    assert_close(ours(tokens), theirs(tokens), rtol=0, atol=0)
    assert "projector_dim=2048" in source
