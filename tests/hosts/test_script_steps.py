"""Whole trainings of scripts that make their loss themselves: their steps and their checks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from whole_trainings import checks, runs, script_checks, trainer_material
from whole_trainings.recording import Record
from whole_trainings.runs import Run, Script
from whole_trainings.script_checks import Law, Training
from whole_trainings.script_steps import Steps
from whole_trainings.trainers import latent_diffusion

from speedit_plugins import NoiseSchedule, build_policy


@pytest.fixture
def network() -> type:
    """A class of models of its own, since watching changes the class."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, *, timesteps: Tensor) -> Tensor:
            return self.scale * timesteps.view(-1, 1).expand(-1, 2)

    return Network


class TestSteps:
    def test_a_step_has_t_the_errors_and_the_reported_loss(self, network: type) -> None:
        record = Record()
        steps, host = Steps(record), SimpleNamespace(mse=functional.mse_loss)
        steps.watch_model(network, "timesteps")
        steps.watch_error(host, "mse")
        t = torch.tensor([1.0, 3.0])
        error = host.mse(network()(None, timesteps=t), torch.zeros(2, 2), reduction="none")
        steps.reported(error.mean().item())
        assert record.t[0].tolist() == [1, 3]
        # The squares of 1 and 3, and their mean.
        assert record.terms[0]["mse"].tolist() == [1, 9]
        assert record.terms[0]["loss"].tolist() == 5

    def test_a_validation_is_no_step(self, network: type) -> None:
        record = Record()
        steps, host = Steps(record), SimpleNamespace(mse=functional.mse_loss)
        steps.watch_model(network, "timesteps")
        steps.watch_error(host, "mse")
        with torch.no_grad():
            host.mse(network()(None, timesteps=torch.ones(1)), torch.zeros(1, 2))
        with pytest.raises(RuntimeError, match="called the model 0 times and made 0 errors"):
            steps.reported(1.0)

    def test_an_error_that_is_made_twice_counts_once(self) -> None:
        record = Record()
        steps, host = Steps(record), SimpleNamespace(mse=functional.mse_loss)
        steps.watch_error(host, "mse", is_repeated=True)
        wanted = torch.tensor([[2.0]], requires_grad=True)
        for _ in range(2):
            host.mse(wanted, torch.zeros(1, 1), reduction="none")
        with pytest.raises(RuntimeError, match="made 1 errors"):
            steps.reported(4.0)


def record_of(weight: Tensor, index: Tensor, *, loss: float | None = None) -> Record:
    """A step at these indices of a thousand, with an error of 2 for each sample."""
    mse = torch.full((len(index),), 2.0)
    reported = (weight[index] * mse).mean() if loss is None else torch.tensor(loss)
    return Record([(index + 0.5) / 1000], [{"loss": reported, "mse": mse}])


def flow() -> NoiseSchedule:
    return NoiseSchedule.rectified_flow(1000)


LAW = Law("speed", flow, "flow", lambda t: (t * 1000).long())


class TestLaw:
    def test_draws_and_weights_are_those_of_the_policy(self) -> None:
        policy = build_policy("speed", flow(), "flow")
        index = policy.draw(20_000, generator=torch.Generator().manual_seed(0)).index
        law, loss = LAW.checks(record_of(policy.weight, index))
        assert law.holds
        assert loss.holds

    def test_other_draws_and_other_weights_are_found(self) -> None:
        policy = build_policy("speed", flow(), "flow")
        index = torch.arange(1000)
        law, loss = LAW.checks(record_of(torch.ones(1000), index))
        # The policy draws unevenly, and a thousand even draws show it.
        assert not law.holds
        assert loss.holds == bool((policy.weight == 1).all())


@pytest.fixture
def training(tmp_path: Path) -> Training:
    """Five runs of two steps each; the policy's own follow from one another."""
    host = Script(tmp_path, tmp_path, "", ())
    weight = build_policy("speed", flow(), "flow").weight
    steps = [record_of(weight, torch.tensor([each, 999 - each])) for each in range(4)]

    def joined(*parts: Record) -> Record:
        return Record([part.t[0] for part in parts], [part.terms[0] for part in parts], stand_ins=["CUDA"])

    found = {"long": joined(*steps), "first": joined(*steps[:2]), "second": joined(*steps[2:])}
    found.update(uniform=joined(*steps[:2]), plain=joined(*steps[:2]))
    made = {}
    for name, record in found.items():
        made[name] = Run(host, name, "train.py", ["--name", name], exit_code=0, records=[record])
        (tmp_path / f"{name}.log").write_text("resumed\n", encoding="utf-8")
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.png").write_bytes(b"picture")
    weights = {"a": torch.ones(1)}
    return Training("A host", made, LAW, lambda name: weights, "resumed", lambda name: tmp_path / name)


class TestTraining:
    def test_all_checks_are_made(self, training: Training) -> None:
        result = training.result()
        assert list(result.checks) == list(checks.CHECKS)
        assert {name: result.checks[name].holds for name in ("exit", "uniform", "sampling", "resume")} == {
            "exit": True,
            "uniform": True,
            "sampling": True,
            "resume": True,
        }
        assert result.checks["resume"].words == "2 and 2 steps: the t of one run"
        assert result.commands[0] == "train.py --name long"
        assert result.stand_ins == ["CUDA"]

    def test_a_resume_with_other_draws_is_found(self, training: Training) -> None:
        training.runs["second"].records[0].t.reverse()
        check = training.result().checks["resume"]
        assert not check.holds
        assert check.words == "2 and 2 steps: not the t of one run"

    def test_a_host_that_began_again_is_found(self, training: Training) -> None:
        training.resumed = "loaded"
        assert training.result().checks["resume"].words.endswith("; the host did not resume")

    def test_weights_that_differ_are_found(self, training: Training) -> None:
        training.weights = lambda name: {"a": torch.tensor([float(name == "plain")])}
        assert not training.result().checks["uniform"].holds

    def test_other_pictures_are_found(self, training: Training, tmp_path: Path) -> None:
        (tmp_path / "plain" / "plain.png").write_bytes(b"other")
        assert not training.result().checks["sampling"].holds
        (tmp_path / "plain" / "plain.png").unlink()
        assert training.result().checks["sampling"].words == "the host sampled nothing"

    def test_a_failed_run_is_named(self, training: Training) -> None:
        training.runs["plain"].exit_code = 3
        assert training.result().checks["exit"].words == "plain 3: resumed"


class TestScript:
    def test_a_host_that_runs_on_a_cpu_gets_no_process_group(self, tmp_path: Path) -> None:
        found = [
            Run(Script(tmp_path, tmp_path, "", (), on_cpu=on_cpu), "a", "train.py", []).environment()
            for on_cpu in (True, False)
        ]
        assert found[0]["ACCELERATE_USE_CPU"] == "1"
        assert "WORLD_SIZE" not in found[0]
        assert found[1]["WORLD_SIZE"] == runs._PLAIN["WORLD_SIZE"] == "1"


def test_images_have_captions(tmp_path: Path) -> None:
    paths = trainer_material.write_images(tmp_path / "images", 3, size=16)
    assert [path.name for path in paths] == ["0000.png", "0001.png", "0002.png"]
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8") for path in paths]
    assert all(caption.startswith("a handwritten") for caption in captions)


def test_a_config_over_another_keeps_what_it_does_not_name() -> None:
    first: dict[str, Any] = {"model": {"params": {"a": 1, "b": 2}}, "data": 1}
    merged = latent_diffusion._merged(first, {"model": {"params": {"b": 3}}})
    assert merged == {"model": {"params": {"a": 1, "b": 3}}, "data": 1}
    assert first["model"]["params"]["b"] == 2


def test_the_folders_of_pictures_are_compared_whatever_the_names(tmp_path: Path) -> None:
    for name in ("ours", "hosts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.png").write_bytes(b"1")
    check = script_checks.same_pictures(tmp_path / "ours", tmp_path / "hosts")
    assert check.holds
    assert check.words == "1 pictures by the host's sampling, equal to the bit"
