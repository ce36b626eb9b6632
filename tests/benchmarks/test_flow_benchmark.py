"""The benchmark of flows goes on where it stopped, and chooses laws on seeds that it does not report."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.trainer.evaluation.features import Pixels
from speedit_plugins.trainer.evaluation.networks import EfficientNetLite0

Load = Callable[[str], ModuleType]

STEPS = [100, 250, 500, 1000]
FACTS = {"num_samples": 10, "shape": [1, 8, 8], "centre": 0.5, "std": 0.7, "floor": {"pixels": 0.1}}


def tiny(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a set of ten digits and a small model into the table of data sets."""
    sets, training = load("flow.sets"), load("stacked.training")
    digits = load("image_sets").load_image_set("digits", 8)
    few = load("image_sets").ImageSet(digits.images[:40], digits.labels[:40], 10)
    space = load("flow.spaces").of_images(Pixels(pool=2))
    shape = training.Shape(width=8, depth=1, num_heads=2, batch_size=4)
    made = sets.FlowSet(few, {"pixels": space}, shape, 4, is_clamped=True)
    monkeypatch.setattr(sets, "SETS", {"tiny": lambda folder: made})


def run(load: Load, monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> None:
    given = ["--data", "tiny", "--out", str(out), "--samplers", "euler-2", "--num-samples", "8", *options]
    monkeypatch.setattr("sys.argv", ["flow", *given])
    load("flow.__main__").main()


def test_a_run_goes_on_where_it_stopped(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny(load, monkeypatch)
    out, summary = tmp_path / "results.jsonl", tmp_path / "summary.md"
    run(load, monkeypatch, out, "--laws", "logit_normal(0,1)", "--seeds", "100", "--summary", str(summary))
    first = out.read_text()
    assert "2 trainings, 0 done, 2 to do" in capsys.readouterr().out
    assert "| logit_normal(0,1) |" in summary.read_text()
    # A killed run leaves half a line.
    out.write_text(first + first[:40])
    run(load, monkeypatch, out, "--laws", "logit_normal(0,1)", "--seeds", "100", "101")
    assert "4 trainings, 2 done, 2 to do" in capsys.readouterr().out
    results = load("flow.results").read_results
    with pytest.raises(ValueError, match=r"results.jsonl, line 3, needs a result of benchmarks/flow"):
        results(out)
    whole = "\n".join(line for line in out.read_text().split("\n") if line != first[:40])
    out.write_text(whole)
    found = [(result.law, result.seed) for result in results(out)]
    assert found == [(law, seed) for seed in (100, 101) for law in ("uniform", "logit_normal(0,1)")]
    assert whole.startswith(first)
    # Results of other code count, unless a law is to be trained again. The newest one is reported.
    monkeypatch.setattr(load("flow.__main__"), "revision", lambda: "newer")
    wanted = ("--laws", "logit_normal(0,1)", "--seeds", "100", "--again", "logit_normal(0,1)")
    for left in (1, 0):
        run(load, monkeypatch, out, *wanted)
        assert f"2 trainings, {2 - left} done, {left} to do" in capsys.readouterr().out
    # Another option is another training.
    run(load, monkeypatch, out, "--laws", "uniform", "--seeds", "100", "--horizon", "2")
    assert "1 trainings, 0 done, 1 to do" in capsys.readouterr().out


def test_auto_measures_the_data_that_it_is_trained_on(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(load, monkeypatch)
    flow = load("flow.__main__")
    runner = flow.Runner("tiny", Path(), flow.Options(), Path("out.jsonl"))
    auto, spectral = (runner._member(name, 0) for name in ("auto", "spectral_flow"))
    assert auto.policy.needs_data
    assert spectral.policy == {"type": "spectral_flow"}
    assert runner._result(auto).policy == {"type": "auto"}
    stack = runner._stack([auto, auto])
    stack.train_step()
    # One batch is not enough to measure.
    assert stack.policies[0].needs_data
    assert auto.policy.needs_data


def test_a_law_that_cannot_be_built_is_left_out(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny(load, monkeypatch)
    laws = load("flow.laws")
    made = laws.laws
    monkeypatch.setattr(laws, "laws", lambda horizon: {**made(horizon), "new": {"type": "not_there"}})
    run(load, monkeypatch, tmp_path / "out.jsonl", "--laws", "new", "--seeds", "0")
    printed = capsys.readouterr().out
    assert "tiny: new is left out: unknown policy 'not_there'" in printed
    assert "2 trainings, 0 done, 1 to do" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--laws", "logit_normal(0,2)"],
            "unknown law 'logit_normal(0,2)'; did you mean 'logit_normal(0,1)'",
        ),
        (["--laws", "best"], "the best laws of tiny need results with selection seeds, got none"),
        (["--data", "tinny"], "unknown data set 'tinny'; did you mean 'tiny'?"),
        (["--samplers", "euler"], "a sampler is KIND-STEPS"),
    ],
)
def test_a_wrong_option_is_one_line(
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    options: list[str],
    message: str,
) -> None:
    tiny(load, monkeypatch)
    with pytest.raises(SystemExit) as left:
        run(load, monkeypatch, tmp_path / "out.jsonl", *options)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def results_of(load: Load, curves: Mapping[tuple[str, int], list[float | None]]) -> list[Any]:
    Result = load("flow.results").Result
    options = {"steps": STEPS, "prediction": "flow", "horizon": STEPS[-1]}
    return [
        Result("tiny", law, seed, {}, options, {"euler-25": {"pixels": distances}}, 1.0, FACTS, "")
        for (law, seed), distances in curves.items()
    ]


def test_laws_are_chosen_on_other_seeds_than_they_are_reported_on(load: Load) -> None:
    slow, fast, faster = [8.0, 4.0, 2.0, 1.0], [4.0, 2.0, 1.0, 0.5], [2.0, 1.0, 0.5, 0.25]
    laws = {
        "uniform": (slow, slow),
        "logit_normal(0,1)": (fast, slow),
        "logit_normal(1,1)": (slow, fast),
        # Whatever takes no number is not the grid's, however fast.
        "spectral_flow": (faster, faster),
        "auto": (faster, faster),
        "auto / loss": (slow, fast),
    }
    curves = {
        (law, seed): distances[seed < 100] for law, distances in laws.items() for seed in (100, 101, 0, 1)
    }
    results = results_of(load, curves)
    report = load("flow.report")
    assert report.leading(results, "tiny") == ["logit_normal(0,1)", "uniform", "logit_normal(1,1)"]
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[4:] for line in report.report(results).split("\n")}
    # Twice as far in as many steps, and so on: these curves fall as 1 / steps up to a factor.
    assert rows["logit_normal(0,1)"][0].startswith("2.00")
    assert rows["logit_normal(0,1)"][1].startswith("1.00 ")
    assert rows["logit_normal(1,1)"][0].startswith("1.00 ")
    assert rows["logit_normal(1,1)"][1:] == ["2.00 (2.00 to 2.00), N = 2", "2.00 (2.00 to 2.00), N = 2 |"]
    assert "Best fixed law on the selection seeds: logit_normal(0,1)." in report.report(results)
    overview = report.overview(results).split("\n")[2].strip("| ").split(" | ")
    assert overview[:2] == ["tiny, flow, euler-25", "pixels"]
    assert overview[3:5] == ["logit_normal(0,1)", "1.00 (1.00 to 1.00), N = 2"]
    # A fourth of the distance at any step: a fourth of the steps, as these curves fall as 1 / steps.
    means = [cell.split(" (")[0] for cell in overview[5:]]
    assert means == ["4.00", "4.00", "4.00", "-", "2.00", f"-1.386 at {STEPS[0]}"]


def test_a_law_leads_if_it_is_near_in_all_spaces(load: Load) -> None:
    details = {("uniform", 100): [8.0] * 4, ("laplace", 100): [2.0] * 4, ("mode", 100): [4.0] * 4}
    colours = {("uniform", 100): [8.0] * 4, ("laplace", 100): [64.0] * 4, ("mode", 100): [7.0] * 4}
    both = results_of(load, details)
    for result, other in zip(both, results_of(load, colours), strict=True):
        result.distances["euler-25"]["colours"] = other.distances["euler-25"]["pixels"]
    assert load("flow.report").leading(both, "tiny") == ["mode", "uniform", "laplace"]
    # ln of 1/4 and 8; and of 1/2 and 7/8.
    rows = load("flow.report").search(both).split("\n")
    assert rows[0] == "| law | tiny, flow: pixels, colours |"
    assert rows[2:] == ["| laplace | -1.39, +2.08 (N = 1) |", "| mode | -0.69, -0.13 (N = 1) |"]


def test_the_search_goes_from_all_laws_on_one_seed_to_the_best_on_two(load: Load, tmp_path: Path) -> None:
    flow, laws = load("flow.__main__"), load("flow.laws")

    def ranked(at: Mapping[tuple[str, int], float]) -> list[Any]:
        distances = {"uniform": 8.0, **{law: distance for (law, _), distance in at.items()}}
        every = {(law, seed): [8.0, 8.0, 8.0, distances[law]] for law, seed in at}
        return results_of(load, every | {("uniform", seed): [8.0] * 4 for seed in (100, 101)})

    def named(search: str, results: list[Any]) -> list[str]:
        out = tmp_path / f"{search}.jsonl"
        for result in results:
            load("results_file").append(out, result)
        names: list[str] = flow._names([search], "tiny", 8, out)
        return names

    coarse = laws.coarse_laws()
    assert set(coarse) < set(laws.laws(8))
    assert {"logit_normal(-1,1)", "uniform shift 3", "cosmap"} < set(coarse)
    assert not {"logit_normal(0,0.7)", "auto"} & set(coarse)
    one_seed = ranked(
        {("mode", 100): 1.0, ("logit_normal(0.5,1)", 100): 2.0, ("logit_normal(0,1)", 100): 3.0}
    )
    assert named("widths", one_seed) == ["uniform", "logit_normal(0.5,0.7)", "logit_normal(0.5,1.4)"]
    assert named("finalists", one_seed)[1:] == ["mode", "logit_normal(0.5,1)", "logit_normal(0,1)"]
    # A law that only one seed has seen is not chosen, however lucky.
    two_seeds = {("logit_normal(0.5,1)", seed): 2.0 for seed in (100, 101)}
    assert named("best", ranked({("mode", 100): 1.0, **two_seeds}))[1:] == ["logit_normal(0.5,1)"]


def test_a_ratio_of_steps_is_read_either_way(load: Load) -> None:
    report = load("flow.report")
    steps, slow, fast = (1, 2, 4, 8), (8.0, 4.0, 2.0, 1.0), (4.0, 2.0, 1.0, 0.5)
    ahead, behind = report.Curve(steps, fast), report.Curve(steps, slow)
    # Both fall as 1 / steps, one with half the factor: half the steps to any distance.
    assert report.ratio_of_steps(ahead, behind).value == pytest.approx(2.0)
    assert report.ratio_of_steps(behind, ahead).value == pytest.approx(0.5)
    assert report.ratio_of_steps(ahead, ahead).value == pytest.approx(1.0)
    assert report.log_ratio(ahead, behind, -1) == pytest.approx(-0.6931, abs=1e-4)


def test_the_figure_has_each_width_and_the_spectrums_centre(load: Load) -> None:
    pytest.importorskip("matplotlib")
    curves = {
        (law, seed): [8.0, 4.0, 2.0, last]
        for law, last in (("uniform", 1.0), ("logit_normal(0,1)", 0.5), ("logit_normal(0.5,1)", 0.25))
        for seed in (0, 100)
    }
    (axes,) = load("flow.plots").laws_figure(results_of(load, curves)).axes
    lines = {line.get_label(): line for line in axes.lines}
    drawn = lines["logit-normal, width 1"]
    assert drawn.get_xdata().tolist() == [0.0, 0.5]
    assert drawn.get_ydata() == pytest.approx([math.log(0.5), math.log(0.25)])
    # log-SNR is -2 logit(u), and the centre of the facts is 0.5.
    assert list(lines["the spectrum's centre"].get_xdata()) == [-0.25, -0.25]


def test_the_best_mean_is_the_middle_of_a_parabola(load: Load) -> None:
    pytest.importorskip("matplotlib")
    plots, MEANS = load("flow.plots"), load("flow.laws").MEANS
    curves = {("uniform", 100): [8.0, 4.0, 2.0, 1.0]} | {
        (f"logit_normal({mean:g},1)", 100): [8.0, 4.0, 2.0, math.exp((mean - 0.3) ** 2)] for mean in MEANS
    }
    (axes,) = plots.centres_figure(results_of(load, curves)).axes
    (drawn,) = [line for line in axes.lines if line.get_label() == "tiny: pixels"]
    assert drawn.get_xdata().tolist() == [-0.25]
    assert drawn.get_ydata() == pytest.approx([0.3])
    # A median at log-SNR c / 2 + 1 is a mean of logit(u) of (x - 1) / 2, for the centre's mean x = -c / 2.
    (law,) = [line for line in axes.lines if line.get_label() == "spectral_flow"]
    assert law.get_ydata() == pytest.approx((np.array(law.get_xdata()) - 1) / 2)
    # The best one is at the end of what was trained: no middle.
    del curves["logit_normal(1,1)", 100], curves["logit_normal(0.5,1)", 100]
    (axes,) = plots.centres_figure(results_of(load, curves)).axes
    assert [line.get_label() for line in axes.lines] == ["the spectrum's centre", "spectral_flow"]


def test_distances_that_are_not_finite_are_null_in_the_file_and_infinite_in_the_report(
    load: Load, tmp_path: Path
) -> None:
    module, out = load("flow.results"), tmp_path / "out.jsonl"
    for result in results_of(
        load, {("uniform", 0): [8.0, 4.0, 2.0, 1.0], ("min_snr", 0): [float("inf")] * 4}
    ):
        load("results_file").append(out, result)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[1]["distances"]["euler-25"]["pixels"] == [None] * 4
    shown = load("flow.report").report(module.read_results(out))
    assert "| min_snr | +inf | +inf | +inf at 100 | - | " in shown


def test_the_grid_holds_each_law_once_under_its_name(load: Load) -> None:
    laws = load("flow.laws")
    found = laws.laws(1200)
    assert len([name for name in found if name.startswith("logit_normal(")]) == 15
    assert found["logit_normal(-0.5,1.4)"] == {"type": "logit_normal", "mean": -0.5, "std": 1.4}
    assert laws.policy_of("uniform / loss", 1200) == {"type": "uniform", "normalize": "loss"}
    assert laws.is_fixed("uniform shift 3")
    assert not laws.is_fixed("auto / loss")
    schedule = NoiseSchedule.rectified_flow(3000)
    shifted = build_policy(found["logit_normal shift 3"], schedule).density
    plain = build_policy(found["logit_normal(0,1)"], schedule).density
    # A shift of 3 moves u = 0.5 to 0.75 and u = 1/3 to 0.6, with the mass below.
    for before, after in ((1500, 2250), (1000, 1800)):
        assert_close(shifted[:after].sum(), plain[:before].sum(), atol=1e-12, rtol=0)


def test_feature_maps_lead_on_to_the_networks_own_features(load: Load) -> None:
    spaces = load("flow.spaces")
    network = EfficientNetLite0()
    shown = torch.randint(0, 256, (2, 64, 64, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    maps = spaces.feature_maps(network, shown.permute(0, 3, 1, 2) / 127.5 - 1)
    assert maps.shape == (2, 80, 4, 4)
    # Float32, and the convolutions may sum in another order for another layout.
    assert_close(spaces.features_after(network, maps), network(shown), atol=1e-3, rtol=1e-3)


def test_directions_are_orthonormal_and_always_the_same(load: Load) -> None:
    spaces = load("flow.spaces")
    found = spaces.directions(80)
    assert_close(found.T @ found, torch.eye(spaces.NUM_FEATURES), atol=1e-5, rtol=0)
    assert torch.equal(found, spaces.directions(80))
