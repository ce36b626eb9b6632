"""The benchmark of accelerations goes on where it stopped, and compares what is measured with products."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.trainer.evaluation.features import Pixels

Load = Callable[[str], ModuleType]
STEPS = [100, 200, 400, 1000]


@pytest.fixture
def tiny(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts sets of ten digits, and of their halves as latents, into the table of data sets; a small model."""
    sets, arms = load("compose.sets"), load("compose.arms")
    digits = load("image_sets").load_image_set("digits", 8)
    space = load("flow.spaces").of_images(Pixels(pool=2))

    def spaces() -> dict[str, Callable[[Tensor], Tensor]]:
        return {"pixels@8": space, "network": space}

    def made(_: Path) -> Any:
        encoder = {"type": "Pixels", "channels": 1}
        return sets.ComposeSet(digits.images[:40], digits.labels[:40], 10, 2, encoder, spaces)

    monkeypatch.setattr(sets, "SETS", {"tiny": made})
    sets.load_compose_set.cache_clear()
    for name, value in {"WIDTH": 16, "DEPTH": 1, "NUM_HEADS": 2}.items():
        monkeypatch.setattr(load("compose.training"), name, value)
    known = {
        "muon": arms.Acceleration({"optimizer": {"type": "Muon"}}),
        "taught": arms.Acceleration({"contrastive": {"weight": 0.05}}, has_teacher=True, until=0.5),
        "later": arms.Acceleration({"clairvoyance": {"weight": 1.0}}),
        "wider": arms.Acceleration({"model": {"girth": 3}}),
        "of_flows": arms.Acceleration({"optimizer": {"type": "Muon"}}, processes=("flow",)),
    }
    monkeypatch.setattr(arms, "ACCELERATIONS", known)


def run(load: Load, monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> int:
    given = ["--out", str(out), "--data", "tiny", "--jobs", "1", "--horizon", "4", "--num-samples", "8"]
    monkeypatch.setattr("sys.argv", ["compose", *given, *options])
    compose = load("compose.__main__")
    # The choices of the command line were made of the real table.
    monkeypatch.setattr(compose, "SETS", load("compose.sets").SETS)
    return int(compose.main())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--report"], "--report needs results, and there is no file"),
        (["--arms", "base"], "data set latents has no file"),
    ],
)
def test_a_missing_file_is_one_line_that_says_what_it_is_for(
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    options: list[str],
    message: str,
) -> None:
    where = ["--out", str(tmp_path / "results.jsonl"), "--data", "latents", "--data-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["compose", *where, *options])
    with pytest.raises(SystemExit) as left:
        load("compose.__main__").main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_a_run_goes_on_where_it_stopped(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "results.jsonl"
    arms = ("--processes", "flow", "--arms", "taught", "taught+auto", "later", "wider", "--seeds")
    assert run(load, monkeypatch, out, *arms, "0") == 0
    printed = capsys.readouterr().out
    assert "4 trainings, 0 done, 4 to do: an unknown number of hours until the first has ended" in printed
    # One is refused by the config, the other by the model: neither ends the run.
    assert "left out: later: clairvoyance: unknown key\n" in printed
    assert "tiny, flow: wider is left out: ValueError: model 'DiT' has no parameter 'girth'" in printed
    first = out.read_text()
    read = load("compose.results").read_trainings
    found = {training.arm: training for training in read(out)}
    assert list(found) == ["base", "taught", "taught+auto"]
    assert found["base"].steps == [1, 2, 3, 4]
    for training in found.values():
        assert list(training.cpu_seconds) == sorted(training.cpu_seconds)
        assert all(distance > 0 for distance in training.distances["pixels@8"])
    # The embedded network does not judge what it has taught.
    assert set(found["base"].distances) == {"pixels@8", "network"}
    assert set(found["taught"].distances) == set(found["taught+auto"].distances) == {"pixels@8"}
    # A killed run leaves half a line.
    out.write_text(first + first[:40])
    run(load, monkeypatch, out, *arms[:-1], "--seeds", "0", "--hours", "0")
    assert "4 trainings, 3 done, 1 to do: about 0.0 hours" in capsys.readouterr().out
    run(load, monkeypatch, out, "--processes", "flow", "--arms", "base", "taught", "--seeds", "0", "1")
    assert "4 trainings, 2 done, 2 to do" in capsys.readouterr().out
    kept = "\n".join(line for line in out.read_text().split("\n") if line != first[:40])
    out.write_text(kept)
    assert kept.startswith(first)
    assert [(each.arm, each.seed) for each in read(out)[3:]] == [("base", 1), ("taught", 1)]
    # Another option is another training.
    run(load, monkeypatch, out, "--processes", "flow", "--arms", "base", "--seeds", "0", "--lr", "2e-3")
    assert "1 trainings, 0 done, 1 to do" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_arms_of_a_seed_are_paired_and_a_seed_repeats_its_training(load: Load) -> None:
    training, arm = load("compose.training"), load("compose.arms").Arm
    cell = training.Cell("tiny", "flow", Path(), training.Settings(horizon=2, num_samples=8))
    starts = {}
    for name, seed in (("base", 0), ("muon+auto", 0), ("base", 1)):
        with training.built(cell, arm.named(name), seed) as (trainer, _):
            starts[name, seed] = (
                {key: value.clone() for key, value in trainer.model.state_dict().items()},
                next(iter(trainer.loader))["image"],
                training.draw(trainer, cell.load(), 8),
            )
    for got, wanted in zip(starts["muon+auto", 0], starts["base", 0], strict=True):
        assert_close(got, wanted, rtol=0, atol=0)
    assert not torch.equal(starts["base", 1][1], starts["base", 0][1])
    once, again = (training.train(cell, arm.named("taught+auto"), 3, revision="") for _ in range(2))
    assert once.distances == again.distances


@pytest.mark.usefixtures("tiny")
def test_paces_are_of_the_arms_that_can_be_built(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "results.jsonl"
    arms = ("--processes", "epsilon", "--arms", "taught", "wider", "of_flows", "--rounds", "2", "--pace")
    assert run(load, monkeypatch, out, *arms) == 0
    assert "tiny, epsilon: wider is left out: model 'DiT' has no parameter" in capsys.readouterr().out
    base, taught = load("compose.results").read_paces(tmp_path / "results_pace.jsonl")
    assert (base.arm, base.early, base.late, base.until) == ("base", 1.0, 1.0, 1.0)
    assert (taught.arm, taught.until) == ("taught", 0.5)
    assert taught.early > 0 < taught.late
    assert base.base_seconds == taught.base_seconds > 0


def test_a_name_says_what_an_arm_is(load: Load) -> None:
    arms = load("compose.arms")
    arm = arms.Arm.named("auto+muon+contrastive")
    assert arm.name == "contrastive+muon+auto"
    assert arms.Arm.named("base") == arms.Arm()
    base = {"optimizer": {"type": "AdamW", "lr": 1e-3}, "diffusion": {"policy": {"type": "uniform"}}}
    assert arm.config(base, 800) == {
        "optimizer": {"type": "Muon", "lr": 1e-3},
        "contrastive": {"weight": 0.05},
        "diffusion": {"policy": {"type": "auto"}},
    }
    large = arms.Arm.named("patches+x0_p2+auto").config(base | {"model": {"patch_size": 4}}, 800)
    assert large["model"] == {"patch_size": 8}
    assert large["diffusion"] == {"prediction_type": "x0", "policy": {"type": "auto", "weighting": "p2"}}
    early = arms.Arm.named("repa_early")
    assert early.config({}, 800)["alignment"]["until"] == 320
    assert early.has_teacher
    names = [each.name for each in arms.standard_arms("flow", ["muon", "contrastive"])]
    assert names[:4] == ["base", "auto", "contrastive", "contrastive+auto"]
    assert names[-2:] == ["contrastive+muon", "contrastive+muon+auto"]
    assert len(names) == 2 * (len(arms.ACCELERATIONS) + 2)
    assert "x0" not in [each.name for each in arms.standard_arms("epsilon")]
    with pytest.raises(ValueError, match="unknown acceleration 'moun'; did you mean 'muon'"):
        arms.Arm.named("moun+auto")
    with pytest.raises(ValueError, match="an arm has each acceleration once, got muon\\+muon"):
        arms.Arm.named("muon+muon")


def power_law(factor: float) -> list[float]:
    """Distances of a training that is `factor` times faster than steps ** -0.5 for the base."""
    return [(factor * step) ** -0.5 for step in STEPS]


def test_factors_of_power_laws_are_exact(load: Load) -> None:
    factors = load("compose.factors")
    base = power_law(1.0)
    ahead = factors.equal_distance(STEPS, power_law(2.5), base)
    assert ahead.base_steps == 1000
    assert ahead.steps == pytest.approx(400)
    assert ahead.factor.value == pytest.approx(2.5)
    behind = factors.equal_distance(STEPS, power_law(0.5), base)
    assert (behind.base_steps, behind.steps) == (pytest.approx(500), 1000)
    # Beyond the first evaluation only a bound is known.
    assert str(factors.equal_distance(STEPS, power_law(20.0), base).factor) == ">=10.00"
    assert str(factors.equal_distance(STEPS, power_law(0.01), base).factor) == "<=0.10"
    diverged = factors.equal_distance(STEPS, [0.1, math.inf, math.inf, math.inf], base)
    assert str(diverged.factor) == "<=0.10"
    assert factors.equal_distance(STEPS, base, base).factor.value == pytest.approx(1.0)
    # A step that costs 1.5 up to step 500, and 1 after it.
    pace = load("compose.results").Pace("d", "flow", "a", {}, 1.5, 1.0, [1.5, 1.5], 0.5, 0.1, "")
    assert ahead.factor_of_seconds(pace, 1000).value == pytest.approx(1000 / (1.5 * 400))
    assert behind.factor_of_seconds(pace, 1000).value == pytest.approx(500 / (1.5 * 500 + 500))


def test_products_have_the_mean_of_products_and_their_bounds(load: Load) -> None:
    factors, reading = load("compose.factors"), load("crossing").Reading
    found = factors.over_seeds(
        [factors.product([reading(a), reading(b)]) for a, b in ((2.0, 3.0), (8.0, 0.75))]
    )
    assert (found.mean, found.low, found.high) == (pytest.approx(6.0), 6.0, 6.0)
    assert factors.over_seeds([reading(1.0), reading(4.0)]).mean == pytest.approx(2.0)
    assert factors.product([reading(2.0, ">="), reading(1.0)]).bound == ">="
    assert factors.product([reading(2.0, ">="), reading(1.0, "<=")]).bound == "~"


def synthetic(load: Load, factors: Mapping[str, float], seeds: Sequence[int], **changes: Any) -> list[Any]:
    """Trainings whose distances are power laws; the base of seed n is 1 + n / 8 times as fast."""
    training = load("compose.results").Training
    options = {"horizon": 1000, "batch_size": 32, "num_samples": 500, "sampling_steps": 12}
    return [
        training("emoji_32", "flow", arm, seed, {"arm": arm}, options).with_results(
            **{
                "steps": STEPS,
                "distances": {"classifier": power_law(factor * (1 + seed / 8))},
                "cpu_seconds": [10.0, 20.0, 40.0, 80.0],
                "num_parameters": 1_900_000,
                "num_samples": 1911,
                "floor": {"classifier": 0.001},
                "revision": "abc",
                **changes,
            }
        )
        for arm, factor in factors.items()
        for seed in seeds
    ]


def test_the_report_has_products_beside_what_was_measured(load: Load, tmp_path: Path) -> None:
    results, report = load("compose.results"), load("compose.report").report
    known = {"base": 1.0, "auto": 1.5, "muon": 2.0, "muon+auto": 2.4, "blocks": 1.2}
    stacks = {"muon+blocks": 2.0, "muon+blocks+auto": 3.0}
    trainings = synthetic(load, known | stacks, [0, 1, 2])
    # Only with `auto`, and with one seed that the base has.
    trainings += synthetic(load, {"sra+auto": 1.0}, [1, 7])
    out = tmp_path / "results.jsonl"
    for training in trainings:
        load("results_file").append(out, training)
    assert results.read_trainings(out)[0].key == trainings[0].key
    pace = results.Pace("emoji_32", "flow", "muon", {"arm": "muon"}, 1.25, 1.25, [1.2, 1.3], 1.0, 0.25, "abc")
    other = results.Pace("emoji_32", "flow", "blocks", {"arm": "older"}, 9.0, 9.0, [9, 9], 1.0, 0.25, "abc")
    text = report(results.read_trainings(out), [pace, other])
    # Both are paired with the base of their seed, so the seeds agree; 2.4 / (2 * 1.5) = 0.8.
    alike = "{0:.2f} ({0:.2f} to {0:.2f})".format
    wanted = [*map(alike, (2.0, 1.5, 3.0, 2.4, 0.8)), alike(1.6), "- (no pace)"]
    lines = [line for line in text.split("\n") if line.startswith("| muon |")]
    assert lines[0].split(" | ")[1:8] == wanted
    assert lines[0].split(" | ")[8] == f"{-0.5 * math.log(2.0):+.3f}"
    blocks = next(line for line in text.split("\n") if line.startswith("| blocks |")).split(" | ")
    assert blocks[1:6] == [*map(alike, (1.2, 1.5, 1.8)), "-", "-"]
    # A pace of another config does not count.
    assert blocks[6] == "- (no pace)"
    sra = next(line for line in text.split("\n") if line.startswith("| sra |")).split(" | ")
    assert sra[1:6] == ["-", "-", "-", "1.00", "-"]
    assert sra[-1] == "0, 1 |"
    # The measured stack against the product of its parts, 2 * 1.2 * 1.5.
    assert f"| muon+blocks+auto | {alike(3.6)} | {alike(3.0)} | - (no pace) | 3 |" in text
    # The base's seeds are as fast as 1, 9/8 and 10/8. Over each other they give 8/10, 8/9, 9/10 and the
    # inverse of each. The 5 % quantile is a quarter of the way from the first to the second.
    low, high = (a + 0.25 * (b - a) for a, b in ((8 / 10, 8 / 9), (10 / 8, 9 / 8)))
    assert f"By chance {low:.2f} to {high:.2f} (3 seeds)" in text
    assert "| muon | 1,900,000 | 1.250 (1.200 to 1.300) | 1.250 | 80 |" in text


def test_a_training_that_diverged_is_reported_as_a_bound(load: Load, tmp_path: Path) -> None:
    results, out = load("compose.results"), tmp_path / "results.jsonl"
    broken = {"classifier": [0.2, math.inf, math.inf, math.inf]}
    trainings = synthetic(load, {"base": 1.0, "auto": 1.0}, [0])
    for training in [*trainings, *synthetic(load, {"muon": 1.0}, [0], distances=broken)]:
        load("results_file").append(out, training)
    assert json.loads(out.read_text().split("\n")[2])["distances"]["classifier"] == [0.2, None, None, None]
    text = load("compose.report").report(results.read_trainings(out), [])
    row = next(line for line in text.split("\n") if line.startswith("| muon |")).split(" | ")
    assert row[1:4] == ["<=0.10", "1.00", "<=0.10"]
    assert row[8] == "+inf"


def test_a_training_is_measured_at_its_steps_until_it_diverges(load: Load) -> None:
    class Diverging:
        """A trainer whose fourth step fails."""

        step, model = 0, torch.nn.Linear(2, 3)

        def optimizer_step(self) -> None:
            self.step += 1
            if self.step == 4:
                raise ValueError("the training diverged at step 4")

    asked: list[int] = []

    def measure(trainer: Diverging) -> dict[str, float]:
        asked.append(trainer.step)
        return {"b": 2.0, "a": float(trainer.step)}

    found = load("compose.training").measured(Diverging(), [1, 3, 5, 6], ["a", "b"], measure)
    # A diverged training has nothing left to measure.
    assert asked == [1, 3]
    assert found["distances"] == {"a": [1.0, 3.0, math.inf, math.inf], "b": [2.0, 2.0, math.inf, math.inf]}
    assert (found["steps"], found["num_parameters"]) == ([1, 3, 5, 6], 2 * 3 + 3)
    assert len(found["seconds"]) == len(found["cpu_seconds"]) == 4


def test_a_judge_is_kept_and_sees_whole_images(load: Load, tmp_path: Path) -> None:
    judge = load("compose.judges").Judge
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    # The classes differ in a pattern whose mean over 4 x 4 pixels is the same.
    fine = torch.tensor([1.0, -1.0]).repeat(16)
    images = 0.3 * torch.randn(200, 1, 32, 32, generator=generator) + 0.5 * labels.view(-1, 1, 1, 1) * fine
    before = torch.random.get_rng_state()
    first = judge(tmp_path / "judge.safetensors", images.clamp(-1, 1), labels)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.accuracy > 0.9
    kept = judge(tmp_path / "judge.safetensors", images.clamp(-1, 1), labels, seed=1)
    assert kept(images).shape == (200, 64)
    assert_close(kept(images), first(images), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"judge.safetensors has other weights than this judge; delete it"):
        judge(tmp_path / "judge.safetensors", images.expand(-1, 3, -1, -1), labels)
