"""Figures of samples that are drawn during a training, and what they leave on disk."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import arguments, small_config, small_trainer
from torch.testing import assert_close

from speedit_plugins.cli import main
from speedit_plugins.trainer.logging.tracking import Tracker, read_metrics
from speedit_plugins.trainer.sampling.generator import find_weights
from speedit_plugins.trainer.sampling.scores import comparison
from speedit_plugins.trainer.training.interrupt import StopRequest
from speedit_plugins.trainer.training.periodic import Measured
from speedit_plugins.trainer.training.trainer import Trainer

SMALL_SET = {
    "evaluate_every": 2,
    "evaluate_samples": 30,
    "per_proc_batch_size": 20,
    "guidance_scale": 1.0,
    "features": "pixels@8",
}


def fit(folder: Path, **changes: Any) -> Trainer:
    trainer = small_trainer(folder, **changes)
    with Tracker(folder, total_steps=trainer.config.max_training_steps, start_step=trainer.step) as tracker:
        trainer.fit(tracker, StopRequest())
    return trainer


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("evaluated")
    return fit(folder, log_every=1, max_training_steps=4, keep_best="kid", keep_last=1, **SMALL_SET)


def test_evaluation_leaves_the_training_as_it_is(evaluated: Trainer, tmp_path: Path) -> None:
    plain = fit(tmp_path, log_every=1, max_training_steps=4)
    assert_close(evaluated.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)
    rows = [row for row in read_metrics(evaluated.folder) if "loss" in row]
    assert [row["loss"] for row in rows] == [row["loss"] for row in read_metrics(tmp_path)]


def test_a_figure_is_that_of_the_phase_test_on_the_same_samples(evaluated: Trainer) -> None:
    folder = evaluated.folder
    rows = [row for row in read_metrics(folder) if "evaluation" in row]
    assert [(row["step"], row["evaluation_samples"]) for row in rows] == [(2, 30), (4, 30)]
    options = {key: value for key, value in SMALL_SET.items() if not key.startswith("evaluate")}
    config = ["-c", "configs/image/digits/speedit.yaml"]
    for phase, more in (("inference", {"num_samples": 30}), ("test", {})):
        assert main([*config, "-p", phase, *arguments(folder, **options, **more)]) == 0
    figures = json.loads((folder / "test.json").read_text())["figures"]
    # Inference draws the same conditions from the same noise, in the same batches.
    assert {name: metric["value"] for name, metric in figures.items()} == rows[-1]["evaluation"]


def test_the_best_by_a_distance_can_be_sampled(evaluated: Trainer) -> None:
    rows = [row for row in read_metrics(evaluated.folder) if "evaluation" in row]
    best = min(rows, key=lambda row: row["evaluation"]["kid[pixels@8]"])
    found = find_weights(small_config(evaluated.folder, "sample", ckpt_path="best"))
    assert found.name == f"step_{best['step']:07d}"


def test_the_reference_is_computed_once(
    evaluated: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kept,) = evaluated.folder.glob("reference_*.safetensors")
    written = kept.stat().st_mtime_ns
    collected: list[str] = []
    collect = comparison._collected

    def counted(name: str, *options: Any) -> Any:
        collected.append(name)
        return collect(name, *options)

    monkeypatch.setattr(comparison, "_collected", counted)
    small_trainer(evaluated.folder, **SMALL_SET)
    assert collected == []
    assert kept.stat().st_mtime_ns == written
    # Other features are kept in another file.
    small_trainer(evaluated.folder, **{**SMALL_SET, "features": "pixels"})
    assert collected == ["reference"]
    assert len(list(evaluated.folder.glob("reference_*.safetensors"))) == 2


def test_what_cannot_be_measured_is_said_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown metric 'fidd' in evaluation.metrics"):
        small_trainer(tmp_path, **SMALL_SET, evaluation__metrics="[fidd]")
    with pytest.raises(ValueError, match="sfid needs an extractor with a spatial map"):
        small_trainer(tmp_path, **SMALL_SET, evaluation__metrics="[sfid]")
    with pytest.raises(ValueError, match="precision_neighbors must be at most 1 for 2 samples"):
        small_trainer(tmp_path, **{**SMALL_SET, "evaluate_samples": 2})


def test_samples_come_in_the_order_of_their_conditions(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = small_trainer(tmp_path, **SMALL_SET)
    (periodic,) = trainer.periodic
    evaluation: Any = periodic.measure

    class Numbered:
        device = torch.device("cpu")
        encoder, model = evaluation._generator.encoder, evaluation._generator.model

        def draw(self, condition: Any, num_samples: int, *, stream: int, **_: Any) -> torch.Tensor:
            values = torch.arange(stream, stream + num_samples) / 127.5 - 1
            return values.reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8)

    evaluation._generator = Numbered()
    snapshot = type("", (), {"everywhere": {}, "step": 7})
    drawn, is_finite = evaluation._draw(snapshot)
    assert drawn.shape == (30, 8, 8, 1)
    assert np.array_equal(drawn[:, 0, 0, 0].numpy(), np.arange(30))
    assert is_finite

    class Broken(Numbered):
        def draw(self, condition: Any, num_samples: int, *, stream: int, **_: Any) -> torch.Tensor:
            return torch.full((num_samples, 1, 8, 8), torch.nan if stream else 0.0)

    # Only a batch of them. The training goes on, and nothing is called best.
    evaluation._generator = Broken()
    assert evaluation(snapshot) == Measured()
    assert "step 7: samples are not finite, so they are not evaluated" in capfd.readouterr().out
