"""What a dry run says of a training with accelerations.

Dims: `B` samples, `N` tokens, `D` width of the model, `W` inner width of a projector.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import small_config, small_trainer
from torch import nn

from speedit_plugins.trainer import build
from speedit_plugins.trainer.accelerations.build import build_accelerations
from speedit_plugins.trainer.accelerations.objective import Acceleration
from speedit_plugins.trainer.accelerations.teachers import unread_teacher
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.models.training_only import CHILD
from speedit_plugins.trainer.training.activations import activations
from speedit_plugins.trainer.training.dry_run import describe

MASKED = {
    "model__type": "MDT",
    "model__patch_size": 2,
    "model__depth": 4,
    "model__decode_layer": 1,
    "masking__type": "MDT",
}
FLOW = {"diffusion__type": "RectifiedFlow"}
SRA = {"alignment": "{type: SRA, layer: 1}"}


def repa(teacher: str) -> dict[str, Any]:
    return {"alignment": f"{{type: REPA, teacher: {teacher}, layer: 1, projector_width: 64}}"}


def lines(folder: Path, **changes: Any) -> dict[str, str]:
    """The description's lines by their name."""
    found = describe(small_config(folder, **changes)).text.splitlines()
    return {line[:19].strip(): line[19:] for line in found}


def count(model: nn.Module, config: ExperimentConfig, found: Sequence[Acceleration] = ()) -> int:
    options = {"precision": "fp32", "is_cast": False, "accelerations": found}
    return activations(model, config.data.batch_size, **options).kept


def kept(folder: Path, **changes: Any) -> int:
    config = small_config(folder, **changes)
    process = build.build_process(config, respaced=True)
    with torch.device("meta"):
        model = build.build_model(config)
        found = build_accelerations(config, model, process, unread_teacher(config))
    return count(model, config, found)


@pytest.mark.parametrize("changes", [{"uncertainty": "true"}, repa("embedded"), SRA], ids=str)
def test_layers_of_the_training_alone_are_told_apart(tmp_path: Path, changes: dict[str, Any]) -> None:
    sizes = {name: p.numel() for name, p in small_trainer(tmp_path, **changes).model.named_parameters()}
    own = sum(size for name, size in sizes.items() if name.startswith(f"{CHILD}."))
    found, plain = lines(tmp_path, **changes), lines(tmp_path)
    assert found["training only"] == f"{own:,} parameters"
    assert found["parameters"] == plain["parameters"] == f"{sum(sizes.values()) - own:,}"
    assert "training only" not in plain
    assert "accelerations" in found
    assert "accelerations" not in plain


def test_the_state_has_what_only_the_training_keeps(tmp_path: Path) -> None:
    wide = {"model__hidden_size": 128}
    trainer = small_trainer(tmp_path, **wide, **SRA)
    head = sum(p.numel() for name, p in trainer.model.named_parameters() if name.startswith(f"{CHILD}."))
    teacher = sum(value.nbytes for value in trainer.objective.state_dict()["SelfAlignment"].values())

    def mebibytes(found: dict[str, str], part: str) -> float:
        return float(re.match(r"([\d.]+) MiB", found[part])[1])  # type: ignore[index]  # it matches

    found, plain = (lines(tmp_path, **wide, **changes) for changes in (SRA, {}))
    assert found["teacher"] == f"{teacher / 2**20:.1f} MiB, SRA"
    assert "teacher" not in plain
    # Weights, gradients, the average and AdamW's two moments. Both were rounded.
    for part, size in {"weights": 4, "gradients": 4, "averages": 4, "moments": 8}.items():
        assert mebibytes(found, part) - mebibytes(plain, part) == pytest.approx(size * head / 2**20, abs=0.1)


def test_the_accelerations_are_listed(tmp_path: Path) -> None:
    some = {
        "contrastive__weight": 0.05,
        "noise_assignment": "class",
        "routing": "{from: 0, to: 1, keep: 0.5}",
    }
    assert lines(tmp_path, **some)["accelerations"] == (
        "routing of 0.5 of the tokens past blocks 0 to 1, contrastive 0.05, noise_assignment class"
    )
    ends = {5: "until step 5", 20: "to the end (until is 20, the training has 20 steps)"}
    for until, text in ends.items():
        given = {"alignment": f"{{type: SRA, layer: 1, until: {until}}}", "uncertainty": "true"}
        found = lines(tmp_path, **given, max_training_steps=20)["accelerations"]
        assert found == f"alignment SRA 0.5 at block 1 {text}, uncertainty"


def test_a_teacher_is_not_read(tmp_path: Path) -> None:
    # 32 to 64 to 64: the last layer has 64 weights and a bias for each feature.
    count = 33 * 64 + 65 * 64
    said = lines(tmp_path, **repa("/nowhere"))["training only"]
    assert said == f"{count:,} parameters, and 65 for each feature of the teacher, which is not read"


def test_what_is_kept_for_backward_has_what_the_accelerations_add(tmp_path: Path) -> None:
    masked = {share: kept(tmp_path, **MASKED, masking__ratio=share) for share in (0.25, 0.75)}
    with torch.device("meta"):
        config = small_config(tmp_path, **MASKED)
        model = build.build_model(config)
    full = count(model, config)
    # The second pass has fewer tokens in 3 of 5 blocks.
    assert full < masked[0.75] < masked[0.25] < 2.4 * full
    # The projector keeps the inputs of both SiLUs and of the two layers after them, each (B, N, W) float32.
    # The input of its first layer, (B, N, D), may be kept by the next block as well.
    B, N, D, W = 16, 4, 32, 64
    added = kept(tmp_path, **repa("embedded")) - kept(tmp_path)
    assert 4 * B * N * 4 * W <= added <= 4 * B * N * (4 * W + D)
    routed = {"routing": "{from: 0, to: 1, keep: 0.5}", "model__patch_size": 2}
    assert kept(tmp_path, **routed) < kept(tmp_path, model__patch_size=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"alignment": "{type: REPA, teacher: embedded, layer: 3}"},
            r"alignment\.layer: wanted a block of the model's 2",
        ),
        (
            {"alignment": "{type: SRA, layer: 2}"},
            r"alignment\.teacher_layer: wanted a block of the model's 2",
        ),
        ({"masking__type": "MDT"}, r"masking\.type: MDT needs a model with a masked pass"),
        ({**FLOW, "diffusion__policy": "{type: auto, weighting: p3}"}, r"unknown weighting 'p3'"),
        ({**FLOW, "diffusion__policy": "{type: auto, weighting: {type: p2, gama: 3}}"}, r"gama"),
        ({**FLOW, "diffusion__policy": "{type: auto, normalize: los}"}, r"policy normalize needs"),
        ({"routing": "{from: 0, to: 2, keep: 0.5}"}, r"routing\.to: wanted 0 <= from <= to < 2"),
        ({"routing__keep": 0.5}, r"got from 2 and to -4, blocks 2 and -2; wanted such as from 0 and to 1$"),
    ],
)
def test_a_dry_run_refuses_what_the_training_refuses(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        describe(small_config(tmp_path, **changes))
    with pytest.raises(ValueError, match=message):
        small_trainer(tmp_path, **changes)
