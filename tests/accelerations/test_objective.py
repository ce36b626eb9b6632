"""Tests of the objective, and of what every acceleration keeps.

Dims: `B` samples.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import small_config, small_trainer
from safetensors.torch import load_file
from torch.testing import assert_close

from speedit_plugins.trainer.accelerations.objective import Objective
from speedit_plugins.trainer.config.validation import ConfigError
from speedit_plugins.trainer.logging.tracking import Tracker
from speedit_plugins.trainer.models.training_only import CHILD
from speedit_plugins.trainer.models.weights import read_checkpoint
from speedit_plugins.trainer.training.interrupt import StopRequest
from speedit_plugins.trainer.training.trainer import Trainer

# Changes of the config of `small_trainer`, one for each acceleration.
CASES: dict[str, dict[str, Any]] = {
    "contrastive": {"contrastive__weight": 0.05},
    "routing": {"routing": "{from: 0, to: 1, keep: 0.5}", "model__gradient_checkpointing": "true"},
    "noise assignment": {"noise_assignment": "class"},
    "uncertainty": {"uncertainty": "true"},
    "modern blocks": {
        "model__norm": "rms",
        "model__qk_norm": "true",
        "model__rope": "true",
        "model__perceptron": "swiglu",
        "model__gradient_checkpointing": "true",
    },
    "x0 on a flow": {
        "diffusion": "{type: RectifiedFlow, prediction_type: x0, policy: uniform}",
        "sampler__type": "euler",
    },
    "LightningDiT": {
        "model__type": "LightningDiT",
        "diffusion": "{type: RectifiedFlow, policy: {type: uniform}}",
        "sampler__type": "euler",
    },
    "masking": {
        "masking__type": "MDT",
        "model__type": "MDTv2",
        "model__patch_size": 2,
        "model__depth": 4,
        "model__decode_layer": 2,
        "model__gradient_checkpointing": True,
    },
    "REPA": {"alignment": "{type: REPA, teacher: embedded, layer: 1, projector_width: 16}"},
    "SRA": {"alignment": "{type: SRA, layer: 1, decay: 0.9}"},
}


def fit(trainer: Trainer) -> None:
    steps = trainer.config.max_training_steps
    with Tracker(trainer.folder, total_steps=steps, start_step=trainer.step) as tracker:
        trainer.fit(tracker, StopRequest())


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_resumed_training_ends_where_an_uninterrupted_one_ends(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = small_trainer(tmp_path / "whole", max_training_steps=8, **changes)
    fit(whole)
    fit(small_trainer(tmp_path / "parts", max_training_steps=4, **changes))
    resumed = small_trainer(tmp_path / "parts", max_training_steps=8, **changes)
    resumed.restore(tmp_path / "parts" / "checkpoints" / "step_0000004")
    fit(resumed)
    for name in ("model", "ema", "optimizer_00000_of_00001"):
        ours, theirs = (
            load_file(run.folder / "checkpoints" / "step_0000008" / f"{name}.safetensors")
            for run in (resumed, whole)
        )
        assert_close(ours, theirs, rtol=0, atol=0)
    # What is read to draw samples has nothing that only the training needs.
    found = read_checkpoint(whole.folder / "checkpoints" / "step_0000008" / "ema.safetensors")
    assert found.keys() == {name for name in whole.model.state_dict() if not name.startswith(f"{CHILD}.")}


def test_contrastive_loss_is_the_distance_to_the_target_less_a_share_of_that_to_another(
    tmp_path: Path,
) -> None:
    trainer = small_trainer(tmp_path, contrastive__weight=0.05, diffusion__policy="{type: speed}")
    objective = trainer.objective
    batch = next(trainer.loader)
    generators = [torch.Generator().manual_seed(number) for number in range(len(batch["image"]))]
    given = trainer.inputs.encode(batch, generators)
    draw = trainer.policy.draw(len(given.latents), generator=torch.Generator().manual_seed(0))
    trainer.model.eval()
    terms = objective.losses(given, draw)
    plain = Objective(trainer.engine, objective.process).losses(given, draw)
    noised = objective.process.corrupt(given.latents, draw, noise=given.noise)
    prediction = trainer.model(noised.x_t, noised.timestep, given.condition)[:, :1]
    # By hand, sample by sample: the negative of sample i is the target of sample i - 1.
    for number in range(len(prediction)):
        apart = (prediction[number] - noised.target[number - 1]).square().mean()
        wanted = plain.loss[number] - 0.05 * draw.weight[number] * apart
        assert_close(terms.loss[number], wanted.to(terms.loss.dtype))
    assert_close(terms.mse, plain.mse, rtol=0, atol=0)


def test_a_config_without_accelerations_builds_none(tmp_path: Path) -> None:
    assert small_trainer(tmp_path).objective.accelerations == ()


def test_a_batch_of_one_has_no_other_sample(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"contrastive\.weight.*two samples.*batch_size 1"):
        small_config(tmp_path, contrastive__weight=0.05, data__batch_size=1)


def test_a_rank_with_one_sample_has_no_other_sample(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, contrastive__weight=0.05)
    # What each of two ranks gets of a batch of two.
    batch = {name: values[:1] for name, values in next(trainer.loader).items()}
    given = trainer.inputs.encode(batch, [torch.Generator()])
    with pytest.raises(ValueError, match=r"contrastive\.weight needs two samples on each rank"):
        trainer.objective.losses(given, trainer.policy.draw(1))


def test_a_run_resumes_with_the_layers_that_it_was_saved_with(tmp_path: Path) -> None:
    sra = "{type: SRA, layer: 1, teacher_layer: 3}"
    small = {"model__depth": 3, "max_training_steps": 1}
    for name, changes in (("plain", {}), ("aligned", {"alignment": sra, "uncertainty": "true"})):
        fit(small_trainer(tmp_path / name, **small, **changes))
    for name, changes, message in (
        (
            "plain",
            {"uncertainty": "true"},
            "uncertainty was False, got True; wanted the former, or a new experiment_dir with pretrained=",
        ),
        (
            "plain",
            {"alignment": "{type: REPA, teacher: embedded, layer: 1}"},
            r"alignment\.type was 'none', got 'REPA'",
        ),
        ("aligned", {"uncertainty": "true"}, r"alignment\.type was 'SRA', got 'none'"),
        ("aligned", {"alignment": sra}, "uncertainty was True, got False"),
        (
            "aligned",
            {"alignment": "{type: SRA, layer: 1}", "uncertainty": "true"},
            r"alignment\.teacher_layer was 3, got 2",
        ),
    ):
        resumed = small_trainer(tmp_path / name, **small, **changes)
        with pytest.raises(ValueError, match=message):
            resumed.restore(tmp_path / name / "checkpoints" / "step_0000001")


def test_a_batch_that_is_not_finite_is_skipped_with_every_acceleration(tmp_path: Path) -> None:
    trainer = small_trainer(
        tmp_path,
        noise_assignment="class",
        contrastive__weight=0.05,
        uncertainty="true",
        routing="{from: 0, to: 0, keep: 0.5}",
        alignment="{type: SRA, layer: 1, decay: 0.5}",
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    kept = {name: value.clone() for name, value in trainer.objective.state_dict()["SelfAlignment"].items()}
    encode = trainer.inputs.encoder.encode
    trainer.inputs.encoder.encode = lambda *given: encode(*given) * float("nan")
    trainer.engine.model.train()
    result, _ = trainer.optimizer_step()
    assert result.is_skipped
    assert_close(trainer.model.state_dict(), before, rtol=0, atol=0)
    assert_close(trainer.objective.state_dict()["SelfAlignment"], kept, rtol=0, atol=0)
    trainer.inputs.encoder.encode = encode
    result, _ = trainer.optimizer_step()
    assert not result.is_skipped
