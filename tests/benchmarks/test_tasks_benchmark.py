"""The benchmark of tasks centres policies as they are named, and counts steps over uniform draws."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from speedit_plugins.trainer.evaluation.features import Pixels

Load = Callable[[str], ModuleType]
STEPS = [100, 200, 400, 1000]


@pytest.fixture
def tiny(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a stage of 8 x 8 digits from 4 x 4, and one of digits alone, into the table of tasks."""
    cells, measures = load("tasks.cells"), load("tasks.measures")
    digits = load("image_sets").load_image_set("digits", 8)
    space = load("flow.spaces").of_images(Pixels(pool=2))
    shared = {
        "image_size": 8,
        "model": {"type": "DiT", "patch_size": 2},
        "encoder": {"type": "Pixels", "channels": 1},
        "data": {"dataset": {"type": "Digits", "image_size": 8}},
    }
    low = {"super_resolution": {"factor": 2}, "data": {"held_out_samples": 8}}
    distances = {"pixels@2": measures.frechet_to(space, digits.images)}
    known = {
        "stage": cells.Task(
            load("overrides").merged(shared, low),
            lambda _: measures.Enlargements({"pixels@2": space}),
            is_stage=True,
        ),
        "alone": cells.Task(shared, lambda _: measures.Sets(distances, digits.images)),
    }
    for name, value in {"TASKS": known, "WIDTH": 16, "DEPTH": 1, "NUM_HEADS": 2}.items():
        monkeypatch.setattr(cells, name, value)
    cells._judge.cache_clear()


def run(load: Load, monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> int:
    given = ["--out", str(out), "--seeds", "0", "--horizon", "4", "--num-samples", "8"]
    monkeypatch.setattr("sys.argv", ["tasks", *given, *options])
    tasks = load("tasks.__main__")
    monkeypatch.setattr(tasks, "CELLS", ("stage/flow", "alone/cosine"))
    return int(tasks.main())


@pytest.mark.usefixtures("tiny")
def test_a_run_trains_what_is_missing_with_the_centres_that_are_named(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, policies = tmp_path / "results.jsonl", ("--policies", "auto", "auto@rest", "auto@-1.5")
    assert run(load, monkeypatch, out, "--cells", "stage/flow", *policies) == 0
    assert "4 trainings, 0 done, 4 to do" in capsys.readouterr().out
    stage = load("compose.results").read_trainings(out)
    names = ["uniform", "auto", "auto@rest", "auto@-1.5"]
    assert [(each.data, each.arm) for each in stage] == [("stage", name) for name in names]
    centres = {each.arm: each.centre for each in stage}
    assert centres["uniform"] is None
    assert centres["auto@-1.5"] == -1.5
    # The input of the stage tells most of a digit, and what it leaves open is smaller detail.
    assert centres["auto@rest"] > centres["auto"] + 0.5
    assert list(stage[0].distances) == ["mse", "pixels@2_each", "pixels@2"]
    assert all(value > 0 for each in stage for curve in each.distances.values() for value in curve)
    # A task without an input has no rest.
    assert run(load, monkeypatch, out, *policies) == 1
    said = capsys.readouterr().out
    assert "8 trainings, 4 done, 4 to do" in said
    assert "auto@rest, seed 0, is left out: ValueError: alone, cosine has no low-resolution input" in said
    first = out.read_text()
    run(load, monkeypatch, out, *policies, "--lr", "1e-3", "--hours", "0")
    assert "8 trainings, 0 done, 8 to do" in capsys.readouterr().out
    assert out.read_text() == first
    run(load, monkeypatch, out, "--report")
    text = capsys.readouterr().out
    assert "## stage, flow\n" in text
    assert "| auto@-1.5 | -1.50 |" in text


@pytest.mark.usefixtures("tiny")
def test_a_policy_that_fails_leaves_the_others(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "results.jsonl"
    # A model of velocity has nothing to clamp.
    options = ("--cells", "stage/flow", "--policies", "auto_clamped", "auto@0")
    assert run(load, monkeypatch, out, *options) == 1
    assert (
        "auto_clamped, seed 0, is left out: ValueError: auto: clamped has no effect"
        in capsys.readouterr().out
    )
    assert [each.arm for each in load("compose.results").read_trainings(out)] == ["uniform", "auto@0"]


def test_every_cell_has_policies_that_its_config_takes(load: Load, tmp_path: Path) -> None:
    cells, training = load("tasks.cells"), load("compose.training")
    for name in cells.CELLS:
        cell = cells.Cell.named(name, tmp_path, cells.SETTINGS)
        policies = cell.policies()
        assert policies[0].name == "uniform"
        for policy in policies:
            training.loaded(cell.config(0, policy.section(0.0)), tmp_path)
    stage = cells.Cell.named("emoji_16_to_32/flow", tmp_path, cells.SETTINGS)
    assert "auto@rest" in [policy.name for policy in stage.policies()]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("autos", "unknown policy 'autos'; did you mean 'auto'"),
        ("uniform@2", "uniform has no centre, got uniform@2; wanted one of spectral, auto"),
        ("auto@", "a centre needs a log-SNR or 'rest', got auto@"),
        ("auto@middle", "a centre needs a log-SNR or 'rest', got auto@middle"),
        ("auto@nan", "a centre needs a log-SNR or 'rest', got auto@nan"),
    ],
)
def test_a_wrong_name_says_what_is_known(load: Load, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("tasks.arms").Policy.named(name)


def test_a_name_says_where_a_policy_is_centred(load: Load) -> None:
    policy = load("tasks.arms").Policy.named
    assert policy("auto").section(3.0) == {"type": "auto"}
    assert policy("auto@-1.5").section(3.0) == {"type": "auto", "mean": -1.5}
    assert policy("spectral@rest").section() == {"type": "spectral"}
    assert policy("spectral@rest").section(3.0) == {"type": "spectral", "mean": 3.0}
    assert policy("auto_clamped@0").name == "auto_clamped@0"


def test_enlargements_are_measured_against_their_originals(load: Load) -> None:
    measures = load("tasks.measures")
    judge = measures.Enlargements({"flat": lambda images: images.flatten(1)})
    originals = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    exact = judge.between(originals, originals)
    assert_close([exact[name] for name in judge.names], [0.0, 0.0, 0.0], atol=1e-6, rtol=0)
    moved = judge.between(originals + 0.5, originals)
    assert moved["mse"] == pytest.approx(0.25, rel=1e-4)
    # The means are 0.5 apart in each of four values.
    assert moved["flat"] == pytest.approx(1.0, rel=1e-4)
    # Another original in the place of each: the set is the same, and each is as far as two originals are.
    other = judge.between(originals.roll(1, dims=0), originals)
    assert other["flat"] == pytest.approx(0.0, abs=1e-6)
    # 5 sigma of a mean of 16,000 squares, 5 * sqrt(2 / 16000) = 0.056.
    assert other["flat_each"] == pytest.approx(1.0, abs=0.056)


def power_law(factor: float) -> list[float]:
    return [(factor * step) ** -0.5 for step in STEPS]


def synthetic(load: Load, centres: dict[str, float | None], speeds: Sequence[float]) -> list[Any]:
    """Two seeds of policies whose distances are power laws; the second seed of all is 1.25 times as fast."""
    training = load("compose.results").Training
    options = {"horizon": 1000, "batch_size": 32, "num_samples": 200, "sampling_steps": 10}
    return [
        training("stage", "flow", policy, seed, {"policy": policy}, options).with_results(
            steps=STEPS,
            distances={"mse": power_law(speed * (1 + seed / 4))},
            cpu_seconds=[1.0, 2.0, 4.0, 10.0],
            num_parameters=700_000,
            num_samples=1711,
            floor={"mse": 0.0},
            revision="abc",
            centre=centre,
        )
        for (policy, centre), speed in zip(centres.items(), speeds, strict=True)
        for seed in (0, 1)
    ]


def test_the_report_orders_policies_by_centre(load: Load) -> None:
    centres = {"auto": 2.25, "uniform": None, "auto@0": 0.0, "auto@-1": -1.0}
    trainings = synthetic(load, centres, [2.0, 1.0, 1.5, 0.5])
    text = load("tasks.report").report(trainings)
    lines = [line for line in text.split("\n") if line.startswith("| ")]
    assert lines[1:5] == [
        "| auto@-1 | -1.00 | 0.50 (0.50 to 0.50) | 2 |",
        "| auto@0 | 0.00 | 1.50 (1.50 to 1.50) | 2 |",
        "| auto | 2.25 | 2.00 (2.00 to 2.00) | 2 |",
        # The seeds of uniform draws are 1.25 times as fast as each other.
        "| by chance | - | 0.82 to 1.23 | 2 |",
    ]
    assert "A training takes 10 s of the CPU without measuring" in text
    ends = [(speed**-0.5) * (1000**-0.5 + 1250**-0.5) / 2 for speed in (1.0, 0.5, 1.5, 2.0)]
    assert [line.split(" | ")[2] for line in lines[6:10]] == [f"{end:.4g}" for end in ends]
    assert lines[-1] == "| the data's own | - | 0 | - |"
