"""The race against peers' trainings: its clock, its lines, its arithmetic, and a small race."""

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.testing import assert_close

Load = Callable[[str], ModuleType]

SETTINGS = {
    "data": "digits",
    "image_size": 8,
    "steps": 4,
    "batch_size": 2,
    "patch_size": 4,
    "width": 8,
    "depth": 1,
    "num_samples": 4,
    "calls": 3,
    "device": "cpu",
    "threads": 1,
    "machine": "a machine",
}


def laps_of(
    load: Load, curves: Mapping[tuple[str, str, int], Sequence[tuple[float, float]]], *, steps: int = 4
) -> list[Any]:
    """Laps at steps 1, 2, ... of (contestant, entry, seed) -> seconds and distances."""
    Lap = load("race.laps").Lap
    return [
        Lap(
            contestant=contestant,
            entry=entry,
            seed=seed,
            step=step,
            seconds=seconds,
            cpu_seconds=2 * seconds,
            setup_seconds=1.0,
            distances={"classifier": distance, "pixels@8": None},
            num_parameters=1000,
            num_training_only=0,
            runs=["a run"],
            settings={**SETTINGS, "steps": steps},
        )
        for (contestant, entry, seed), curve in curves.items()
        for step, (seconds, distance) in enumerate(curve, start=1)
    ]


class Clocked:
    """A training whose steps take 2 s, and the first and those after a measurement 50 s, on its own clock."""

    num_parameters, num_training_only, process = 10, 0, None

    def __init__(self, name: str, times: dict[str, float], turns: list[str]) -> None:
        self._name, self._times, self._turns = name, times, turns
        self._is_cold, self.count = True, 0

    turn = contextlib.nullcontext

    def step(self) -> None:
        self._times["now"] += 50 if self._is_cold else 2
        self._is_cold = False
        self.count += 1
        if self._turns[-1:] != [self._name]:
            self._turns.append(self._name)

    def save(self, folder: Path) -> None:
        (folder / "count").write_text(str(self.count))

    def load(self, folder: Path) -> None:
        self.count = int((folder / "count").read_text())


@pytest.fixture
def clock(load: Load, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    times = {"now": 0.0}
    laps = load("race.laps")
    for name in ("perf_counter", "process_time"):
        monkeypatch.setattr(laps.time, name, lambda: times["now"])
    return times


class TestTurns:
    def run(self, load: Load, out: Path, clock: dict[str, float], *, stop: int = 0) -> tuple[list[str], str]:
        """Races two trainings, the first of which cannot be measured at step `stop`: turns and output."""
        laps, turns, said = load("race.laps"), [], []

        def measure(training: Clocked, seed: int) -> dict[str, float]:
            # Nothing of an evaluation is training.
            clock["now"] += 1000
            training._is_cold = True
            if stop and training.count >= stop:
                raise KeyboardInterrupt
            return {"classifier": 100.0 / training.count}

        entries = [
            laps.Entry(name, name, 0, lambda name=name: Clocked(name, clock, turns)) for name in ("a", "b")
        ]
        plan = laps.Plan(100, SETTINGS, "run", num_turns=4)
        try:
            laps.race(entries, plan, measure, out, say=said.append)
        except KeyboardInterrupt:
            said.append("stopped")
        return turns, "\n".join(said)

    def test_seconds_are_of_training_without_the_first_step(
        self, load: Load, tmp_path: Path, clock: dict[str, float]
    ) -> None:
        turns, _ = self.run(load, tmp_path, clock)
        laps = load("race.laps").read_laps(tmp_path)
        # Every step counts as 2 s, also those that take 50 s; those of the first one are set-up.
        assert {(lap.seconds, lap.cpu_seconds) for lap in laps if lap.step == 100} == {(200.0, 200.0)}
        assert {lap.setup_seconds for lap in laps} == {50.0}
        # Marks are 5, 8, 12, 20, 25, 30, 45, 50, 65, 75 and 100; who has ended a round begins the next one.
        assert turns == ["a", *"ba" * 5, "b"][: len(turns)]
        assert len(turns) == 12

    def test_a_stopped_race_goes_on_where_it_was(
        self, load: Load, tmp_path: Path, clock: dict[str, float]
    ) -> None:
        _, said = self.run(load, tmp_path, clock, stop=18)
        assert said.endswith("stopped")
        lines = (tmp_path / "results.jsonl").read_text()
        _, said = self.run(load, tmp_path, clock)
        assert "2 trainings of 100 steps, 0 done" in said
        laps = load("race.laps").read_laps(tmp_path)
        assert (tmp_path / "results.jsonl").read_text().startswith(lines)
        assert len({(lap.contestant, lap.step) for lap in laps}) == len(laps) == 16
        # The training went on from its state: the distance at a step is as without a stop.
        assert {lap.distance for lap in laps if lap.step == 100} == {100 / 100}
        assert {lap.seconds for lap in laps if lap.step == 100} == {200.0}
        assert {lap.setup_seconds for lap in laps if lap.step == 100} == {100.0}
        _, said = self.run(load, tmp_path, clock)
        assert said == "2 trainings of 100 steps, 2 done"

    def test_lines_without_their_state_are_an_error(
        self, load: Load, tmp_path: Path, clock: dict[str, float]
    ) -> None:
        self.run(load, tmp_path, clock, stop=18)
        (tmp_path / "state").rename(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match="has 'b' up to step 12, but its state is not in"):
            self.run(load, tmp_path, clock)

    def test_lines_of_another_race_are_an_error(self, load: Load, tmp_path: Path) -> None:
        for lap in laps_of(load, {("SiT", "SiT", 0): [(1, 2)]}):
            load("results_file").append(tmp_path / "results.jsonl", lap)
        with pytest.raises(ValueError, match=r"is of a race with \{'threads': 1\}, got \{'threads': 2\}"):
            load("race.laps").read_laps(tmp_path, {**SETTINGS, "threads": 2})


class TestReport:
    def test_a_ratio_is_the_peers_seconds_over_ours_to_its_own_end(self, load: Load) -> None:
        laps = laps_of(
            load,
            {
                ("SiT", "SiT", 0): [(10, 8.0), (20, 4.0), (40, 2.0), (80, 1.0)],
                # At the peer's end, 1.0, after 20 s: four times as fast.
                ("ours, auto", "ours, auto", 0): [(5, 4.0), (10, 2.0), (20, 1.0), (40, 0.5)],
                ("ours, slow", "ours, slow", 0): [(5, 8.0), (10, 7.0), (20, 6.0), (40, 5.0)],
            },
        )
        report = load("race.report")
        field = report.Field.of(laps)
        (reading,) = field.speed_ups("SiT", "ours, auto")
        assert (reading.value, reading.bound) == (pytest.approx(4.0), "")
        text = report.report(laps)
        # The slow one was never there: at most 80 / 40.
        assert "| SiT | 80 | 1.000 | 20.0 s, 4.00 [4.00] | >=40.0 s, <=2.00 [<=2.00] |" in text
        # 4 steps of 20 s against 3 of 6.67 s.
        parts = "(1.33 in steps, 3.00 in seconds a step)"
        verdict = f"met, 1.33 of it. ours, auto: 4.00 times {parts}, 0.500 against 1.000 at the end."
        assert f"- SiT, 3 times: {verdict}" in text
        assert "- facebookresearch/DiT, 8 times: not raced." in text

    def test_seeds_are_compared_with_their_own(self, load: Load) -> None:
        curve = {seed: [(1, 4.0), (2, 3.0), (3, 2.5), (4, end)] for seed, end in ((0, 2.0), (1, 1.0))}
        ours = {0: [(1, 2.0), (2, 1.0), (3, 1.0), (4, 1.0)], 1: [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]}
        laps = laps_of(
            load,
            {("REPA", "REPA", seed): part for seed, part in curve.items()}
            | {("ours", "ours", seed): part for seed, part in ours.items()},
        )
        field = load("race.report").Field.of(laps)
        assert [reading.value for reading in field.speed_ups("REPA", "ours")] == pytest.approx([4.0, 1.0])
        # The geometric mean of 4 and 1.
        assert ", 2.00 (1.00 to 4.00, N = 2) [2.00] |" in load("race.report").report(laps)
        assert "REPA, 2 times: met, 1.00 of it" in load("race.report").report(laps)

    def test_a_peer_is_judged_by_its_best_rate_and_only_at_its_end(self, load: Load) -> None:
        ends = {"SiT x10": 2.0, "SiT x3": 1.0, "SiT x30": float("inf")}
        laps = laps_of(
            load,
            {(name, "SiT", 0): [(1, 9.0), (2, 9.0), (3, 9.0), (4, end)] for name, end in ends.items()}
            | {("DiT", "facebookresearch/DiT", 0): [(1, 9.0)]},
        )
        field = load("race.report").Field.of(laps)
        assert list(field.peers) == ["SiT"]
        assert field.peers["SiT"][0].last.contestant == "SiT x3"

    def test_the_figure_has_a_line_for_each_training_in_each_space(self, load: Load) -> None:
        pytest.importorskip("matplotlib")
        curve = [(1.0, 4.0), (2.0, 3.0), (3.0, 2.5), (4.0, 2.0)]
        laps = laps_of(load, {("SiT", "SiT", 0): curve, ("ours", "ours", 0): curve})
        first, second = load("race.plots").draw(laps).axes
        assert [line.get_label() for line in first.lines] == ["ours", "SiT"]
        assert list(first.lines[0].get_xdata()) == [1.0, 2.0, 3.0, 4.0]
        assert len(second.lines) == 2


class TestTrainings:
    def test_an_epoch_has_every_image_once(self, load: Load) -> None:
        images = torch.arange(7.0).view(7, 1, 1, 1)
        data = load("image_sets").ImageSet(images, torch.arange(7), 7)
        batches = load("race.training").Batches(data, 2, 0, "cpu")
        seen = [batches.at(step) for step in range(6)]
        for x, y in seen:
            assert torch.equal(x.flatten().long(), y)
        epochs = [torch.cat([y for _, y in part]).tolist() for part in (seen[:3], seen[3:])]
        assert [len(set(epoch)) for epoch in epochs] == [6, 6]
        assert epochs[0] != epochs[1]
        # A resumed training sees the same batches.
        assert torch.equal(load("race.training").Batches(data, 2, 0, "cpu").at(4)[1], seen[4][1])

    def test_turns_of_others_do_not_change_ones_random_numbers(self, load: Load) -> None:
        RandomState = load("race.training").RandomState
        torch.manual_seed(5)
        alone = torch.rand(4)
        outer = torch.rand(1)
        torch.manual_seed(5)
        torch.rand(4)
        one, other = RandomState(5), RandomState(6)
        drawn = []
        for _ in range(4):
            with one.used():
                drawn.append(torch.rand(1))
            with other.used():
                torch.rand(3)
        assert torch.equal(torch.cat(drawn), alone)
        assert torch.equal(torch.rand(1), outer)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.yaml"
    path.write_text("ours, auto:\n  diffusion: {type: RectifiedFlow, policy: {type: auto}}\n")
    return path


def main(load: Load, out: Path, *given: str) -> None:
    """The race on digits of 8 pixels, as small as it goes."""
    threads = torch.get_num_threads()
    small = "--data digits --image-size 8 --patch-size 4 --width 16 --depth 1 --heads 2 --batch-size 4"
    counts = "--steps 40 --turns 2 --num-samples 100 --calls 3 --threads 1"
    try:
        load("race.__main__").main([*small.split(), *counts.split(), "--out", str(out), *given])
    finally:
        torch.set_num_threads(threads)


class TestMain:
    def test_ours_alone_are_raced_and_reported(
        self, load: Load, tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = ("--hosts", str(tmp_path), "--rows", str(rows))
        main(load, tmp_path / "out", *given)
        printed = capsys.readouterr().out
        assert f"left out: MDT, no checkout sail-sg+MDT, sail-sg+Adan in {tmp_path}" in printed
        assert "- LightningDiT, 2 times: not raced." in printed
        laps = load("race.laps").read_laps(tmp_path / "out")
        assert [lap.step for lap in laps] == [2, 3, 5, 8, 12, 18, 26, 40]
        assert all(before.seconds < after.seconds for before, after in itertools.pairwise(laps))
        assert (tmp_path / "out" / "report.md").read_text().startswith("digits at 8 pixels, 40 steps")
        assert (tmp_path / "out" / "race.png").stat().st_size > 0
        main(load, tmp_path / "out", *given)
        assert "1 trainings of 40 steps, 1 done" in capsys.readouterr().out

    def test_minutes_become_steps_once(
        self, load: Load, tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        race = load("race.__main__")
        monkeypatch.setattr(race, "paces", lambda entries, device: {"ours, auto": (2.0, 0.25)})
        monkeypatch.setattr(race, "race", lambda entries, plan, *given, **others: planned.append(plan.steps))
        planned: list[int] = []
        given = ("--hosts", str(tmp_path), "--rows", str(rows), "--minutes", "2")
        main(load, tmp_path / "out", *given)
        # Less than 0.85 * 120 s in steps of 0.25 s, and not by much: nothing else takes long here.
        assert 200 < planned[0] < 408
        for lap in laps_of(load, {("ours", "ours", 0): [(1.0, 2.0)]}, steps=77):
            load("results_file").append(tmp_path / "out" / "results.jsonl", lap)
        monkeypatch.setattr(race, "_settings", lambda arguments, net: {})
        main(load, tmp_path / "out", *given)
        assert planned[1] == 77
        with pytest.raises(SystemExit):
            main(load, tmp_path / "other", *given[:-1], "0.1")

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["--hosts", "absent"], "--hosts needs the folder of the checkouts, got absent"),
            (["--steps", "5"], "--steps needs to be >= 40, got 5"),
            (["--peers", "Sit"], "unknown peer 'Sit'; did you mean 'SiT'?"),
            (["--ours", "ours, aut"], "unknown contestant 'ours, aut'; did you mean 'ours, auto'?"),
            (["--patch-size", "3"], "--image-size needs to be a multiple, twice or more, of --patch-size"),
            (
                ["--rows", "benchmarks/race/ours.yaml", "--steps", "40"],
                "ours, stack: optimizer.warmup_steps: wanted less than max_training_steps = 40",
            ),
            (["--report"], "--report needs results, and there is no file"),
            (["--calls", "4"], "num_calls needs to be odd and >= 3, got 4"),
            (["--device", "cuda"], "--device cuda needs a CUDA device"),
        ],
    )
    def test_a_wrong_option_is_one_line(
        self,
        load: Load,
        tmp_path: Path,
        rows: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        given: list[str],
        message: str,
    ) -> None:
        # No classifier is trained for an error.
        monkeypatch.setattr(load("race.quality").Classifier, "teach", lambda self, data: None)
        with pytest.raises(SystemExit) as left:
            main(load, tmp_path / "out", "--hosts", str(tmp_path), "--rows", str(rows), *given)
        assert left.value.code == 2
        assert message in capsys.readouterr().err


def test_a_race_without_checkouts_says_how_to_name_them(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPEEDIT_HOSTS", raising=False)
    with pytest.raises(SystemExit):
        main(load, tmp_path)
    assert "--hosts needs the folder of the checkouts, got none, and SPEEDIT_HOSTS" in capsys.readouterr().err


def test_the_distance_to_the_data_itself_is_small_and_to_noise_large(load: Load, tmp_path: Path) -> None:
    quality = load("race.quality")
    data = load("image_sets").load_image_set("digits", 8)
    measured = quality.Quality(data, num_samples=400, num_calls=3, folder=tmp_path)
    own, noise = measured.of(data.images[::4]), measured.of(torch.rand_like(data.images[::4]) * 2 - 1)
    assert list(own) == ["classifier", "pixels@8"]
    assert all(20 * own[space] < noise[space] for space in own)
    assert measured.of(torch.full_like(data.images[:4], torch.nan)) == dict.fromkeys(own, float("inf"))
    # A resumed race measures with the same classifier.
    again = quality.Quality(data, num_samples=400, num_calls=3, folder=tmp_path)
    assert_close(again.of(data.images[::4]), own, rtol=0, atol=0)
