"""The convergence benchmark from its data to its tables and plots."""

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.schedule import NoiseSchedule

Load = Callable[[str], ModuleType]


def write_idx(folder: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    path = folder / "few-images-idx3-ubyte.gz"
    for place, kind, values in (
        (path, 3, images),
        (folder / "few-labels-idx1-ubyte.gz", 1, labels),
    ):
        header = bytes([0, 0, 8, kind]) + np.array(values.shape, dtype=">i4").tobytes()
        place.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))
    return path


def test_idx_npz_and_folder_give_the_same_images(load: Load, tmp_path: Path) -> None:
    load_image_set = load("image_sets").load_image_set
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    labels = np.arange(6) % 3
    idx = load_image_set(str(write_idx(tmp_path, images, labels)), 8)
    assert_close(idx.images, torch.from_numpy(images).unsqueeze(1) / 127.5 - 1)
    assert (idx.labels.tolist(), idx.num_classes) == (labels.tolist(), 3)

    npz = tmp_path / "set.npz"
    np.savez(npz, images[..., None], labels)
    assert torch.equal(load_image_set(str(npz), 8).images, idx.images)
    assert torch.equal(load_image_set(str(npz), 8).labels, idx.labels)
    np.savez(npz, images[..., None])
    assert load_image_set(str(npz), 8).labels is None
    # Each pixel is the average of 2 x 2 pixels.
    halved = idx.images.view(6, 1, 4, 2, 4, 2).mean(dim=(3, 5))
    assert_close(load_image_set(str(npz), 4).images, halved, atol=1e-6, rtol=0)

    for place, label in enumerate(labels):
        (tmp_path / "tree" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[place]).save(tmp_path / "tree" / str(label) / f"{place}.png")
    tree = load_image_set(str(tmp_path / "tree"), 8)
    order = torch.from_numpy(labels).argsort(stable=True)
    # The three channels are all grey, up to float32 rounding of the division.
    assert_close(tree.images, idx.images[order].expand(-1, 3, -1, -1), atol=1e-6, rtol=0)
    assert tree.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_images_that_cannot_be_had_are_named(load: Load, tmp_path: Path) -> None:
    load_image_set = load("image_sets").load_image_set
    with pytest.raises(ValueError, match=r"data needs 'digits', a file or a folder, got 'mnist'"):
        load_image_set("mnist", 8)
    path = write_idx(tmp_path, np.zeros((3, 8, 8)), np.zeros(3))
    with pytest.raises(ValueError, match=r"has images \(8, 8\), wanted squares of at least 16"):
        load_image_set(str(path), 16)
    content = path.read_bytes()
    for damaged, message in (
        (gzip.compress(bytes(100)), r"it begins with \[0, 0, 0, 0\], wanted \[0, 0, 8, 3\]"),
        (gzip.compress(gzip.decompress(content)[:-1]), "cannot reshape array of size 191 into shape"),
        (content[:-9], "ended before"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=f"few-images-idx3-ubyte.gz is no IDX file of bytes: .*{message}"
        ):
            load_image_set(str(path), 8)
    for labels, got in ((np.zeros(4), r"\(4,\), the least 0"), (np.full(3, -1), r"\(3,\), the least -1")):
        np.savez(tmp_path / "set.npz", np.zeros((3, 8, 8, 1), np.uint8), labels)
        with pytest.raises(ValueError, match=f"set.npz needs a label >= 0 for each of 3 images, got {got}"):
            load_image_set(str(tmp_path / "set.npz"), 8)


def test_sampled_labels_have_the_proportions_of_the_data(load: Load) -> None:
    labels = torch.tensor([2, 0, 0, 1, 0, 0, 2, 0, 0, 2])  # 6, 1 and 3 of ten
    assert load("image_sets").spread_labels(labels, 20).bincount().tolist() == [12, 2, 6]
    assert load("image_sets").spread_labels(labels, 5).tolist() == [0, 0, 0, 2, 2]


def test_a_sampler_is_read_from_its_name(load: Load) -> None:
    Sampler = load("stacked.sample_quality").Sampler
    assert Sampler.named("ddim-25") == Sampler("ddim", 25, is_clamped=True)
    assert Sampler.named("ancestral-100-unclamped") == Sampler("ddpm", 100, is_clamped=False)
    for name in ("ddim", "plms-25", "ddim-25-clamped"):
        with pytest.raises(ValueError, match=f"a sampler is KIND-STEPS .* got '{name}'"):
            Sampler.named(name)


def short(load: Load, **options: Any) -> Any:
    shape = load("stacked.training").Shape(width=8, depth=1, num_heads=2, batch_size=4)
    return load("convergence.paired_run").Protocol(
        **{"horizon": 4, "steps": (2, 4), "num_samples": 40, "samplers": ("ddim-2",), "shape": shape}
        | options
    )


def test_a_curve_depends_on_no_other_member(load: Load) -> None:
    Member, run = load("stacked.training").Member, load("convergence.paired_run").run
    policy = build_policy("loss_second_moment", NoiseSchedule.linear())
    members = [Member(p, s) for p in ("uniform", "speed", policy) for s in (0, 1)]
    together = run(members, short(load, workers=1), say=None)
    assert together.names() == ["uniform", "speed", "loss_second_moment"]
    assert [curve.member for curve in together.curves] == members
    spread = run(members[::-1], short(load, workers=3), say=None)
    for name in together.names():
        for seed, curve in together.distances(name).items():
            # A stack of another size may sum products in another order. If a pixel then rounds to another of
            # the 256 levels, the distance changes by less than this.
            assert spread.distances(name)[seed] == pytest.approx(curve, rel=1e-3)
    # Both policies of a seed begin with the same weights. Only their draws differ.
    assert together.distances("uniform")[0] != together.distances("speed")[0]
    # The given policy is unchanged, because each member learns with a copy.
    assert int(policy.state_dict()["density"]["counts"].sum()) == 0


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ([], {}, "at least one member, got none"),
        ([("uniform", 0), ("uniform", 0)], {}, r"got \('uniform', 0\) twice: give a label"),
        ([("uniform", 0)], {"steps": (2, 3)}, r"hold horizon 4, got \(2, 3\)"),
        ([("uniform", 0)], {"steps": (4, 2)}, r"steps need to rise"),
        (
            [("uniform", 0)],
            {"schedule": "rectified_flow"},
            "flow belongs to schedule rectified_flow, got eps",
        ),
    ],
)
def test_what_cannot_run_is_refused(
    load: Load, members: list[tuple[str, int]], options: dict[str, Any], message: str
) -> None:
    members = [load("stacked.training").Member(*member) for member in members]
    with pytest.raises(ValueError, match=message):
        load("convergence.paired_run").run(members, short(load, **options), say=None)


def test_a_policy_of_another_schedule_is_refused(load: Load) -> None:
    member = load("stacked.training").Member(build_policy("speed", NoiseSchedule.cosine()))
    with pytest.raises(
        ValueError, match=r"policy 'speed' needs the schedule NoiseSchedule\(.* of the run, got"
    ):
        load("convergence.paired_run").run([member], short(load), say=None)


def test_a_speed_up_needs_the_baseline_of_its_seed(load: Load) -> None:
    Member = load("stacked.training").Member
    results = load("convergence.paired_run").run(
        [Member("speed", 1), Member("uniform", 2)], short(load), say=None
    )
    with pytest.raises(
        ValueError, match=r"needs 'uniform' and 'speed' of the same seeds, got \[2\] and \[1\]"
    ):
        results.speed_ups("speed")


@pytest.mark.parametrize(
    ("schedule", "prediction", "samplers"),
    [
        ("linear", "epsilon", ("ddim-2", "ancestral-3-unclamped")),
        ("cosine", "v", ("dpm-2",)),
        ("scaled_linear", "x0", ("ddim-2-unclamped",)),
        ("rectified_flow", "flow", ("euler-2", "heun-2")),
    ],
)
def test_the_document_holds_what_tables_and_plots_are_drawn_from(
    load: Load, tmp_path: Path, schedule: str, prediction: str, samplers: tuple[str, ...]
) -> None:
    pytest.importorskip("matplotlib")
    Member, report = load("stacked.training").Member, load("convergence.report")
    members = [Member(p, s, prediction_type=prediction, label=p) for p in ("uniform", "p2") for s in (0, 1)]
    protocol = short(load, schedule=schedule, samplers=samplers)
    results = load("convergence.paired_run").run(members, protocol, say=None)
    digits = load("image_sets").load_image_set("digits", 8)
    paces = load("convergence.policy_pace").paces(
        members[::2], digits, schedule, protocol.shape, rounds=1, steps=1
    )
    found = report.document(results, paces, command="python here", date="2026-01-01")
    found = json.loads(json.dumps(found, allow_nan=False))
    assert [member["policy"] for member in found["members"]] == ["uniform", "uniform", "p2", "p2"]
    for sampler in samplers:
        for curve, member in zip(results.curves, found["members"], strict=True):
            assert member["distances"][sampler] == pytest.approx(list(curve.distances[sampler]))
        itself = found["by_sampler"][sampler]["speed_ups"]["uniform"]["4"]
        assert itself["mean"] >= 1
        lines = report.table(found, sampler).splitlines()
        assert lines[2] == "    python here"
        assert [line.split(" | ")[0] for line in lines[6:8]] == ["| uniform", "| p2"]
    plots = load("convergence.plots")
    written = plots.draw(found, tmp_path)
    assert len(written) == 2 * len(samplers)
    assert all(Image.open(path).size == (1080, 600) for path in written)
    for sampler in samplers:
        (axes,) = plots.figures(found, sampler)["distance"].axes
        for policy, line in zip(("uniform", "p2"), axes.lines, strict=True):
            curves = np.array(list(results.distances(policy, sampler).values()))
            assert line.get_label() == policy
            assert line.get_xdata().tolist() == [2, 4]
            assert line.get_ydata() == pytest.approx(np.exp(np.log(curves).mean(axis=0)))
        (axes,) = plots.figures(found, sampler)["speed_up"].axes
        drawn = {line.get_label(): line for line in axes.lines}
        means = [results.summary("p2", horizon=step, sampler=sampler).mean for step in (2, 4)]
        assert drawn["p2"].get_ydata() == pytest.approx(means)
        assert "uniform" not in drawn


def test_a_pace_is_the_clocks(load: Load) -> None:
    Member, shape = load("stacked.training").Member, short(load).shape
    digits = load("image_sets").load_image_set("digits", 8)
    # The clock moves by 1 each time it is read. So 4 steps take 1, and 80 draws take 1.
    ticking = iter(range(10_000)).__next__
    paces = load("convergence.policy_pace").paces(
        [Member("speed")], digits, "linear", shape, steps=4, clock=ticking
    )
    assert paces == {"speed": load("convergence.policy_pace").Pace(4.0, pytest.approx(1e6 / 80))}


def test_a_distance_of_samples_that_are_not_finite_is_null(load: Load) -> None:
    run, report = load("convergence.paired_run"), load("convergence.report")
    member = load("stacked.training").Member("uniform")
    curve = run.Curve(member, {"ddim-2": (math.inf, 3.0)})
    results = run.Results(short(load, horizon=2), (curve,), 1, 1.0)
    paces = {"uniform": load("convergence.policy_pace").Pace(100.0, 30.0)}
    found = report.document(results, paces, command="python here", date="2026-01-01")
    assert found["members"][0]["distances"]["ddim-2"] == [None, 3.0]
    json.dumps(found, allow_nan=False)
    shown = report.table(found, "ddim-2")
    # One seed has no interval. Its last distance is below its first, so there is no warning.
    assert "| uniform | >=1.00 | - | >=1.00 |" in shown
    assert "| inf |" in shown


def test_a_baseline_that_does_not_fall_yet_and_bounds_are_marked(load: Load) -> None:
    run, report, Member = (
        load("convergence.paired_run"),
        load("convergence.report"),
        load("stacked.training").Member,
    )
    # All seeds are nearer to the data at their first evaluation than at the horizon.
    curves = [
        run.Curve(Member(policy, seed), {"ddim-2": (2.0 + seed, 3.0 + seed)})
        for policy in ("uniform", "speed")
        for seed in (0, 1)
    ]
    results = run.Results(short(load), tuple(curves), 1, 1.0)
    paces = {name: load("convergence.policy_pace").Pace(100.0, 30.0) for name in ("uniform", "speed")}
    shown = report.table(report.document(results, paces, command="here", date="2026-01-01"), "ddim-2")
    # The horizon, 4, over at most 2 steps, at 100 steps per second.
    assert "| speed | >=2.00 | >=2.00, >=2.00 | >=2.00 | >=2.00 >=2.00 | 3.50 | 100.0 | <=0.0 |" in shown
    assert "The curve of uniform was as far as at 4 steps before" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "speedd"], "unknown policy 'speedd'; did you mean 'speed'?"),
        (["--lr", "-1"], "lr needs to be > 0 and finite, got -1.0"),
        (["--lr", "inf"], "lr needs to be > 0 and finite, got inf"),
        (["--seeds", "-1"], "seed needs to be >= 0, got -1"),
        (["--num-samples", "1"], "num_samples needs to be >= 2"),
        (["--workers", "-1"], "workers >= 0, got 500 and -1"),
        (["--seeds", "0", "0"], "--seeds needs each once, got 0 0"),
        (["--data", "absent"], "data needs 'digits', a file or a folder, got 'absent'"),
        (["--schedule", "rectified_flow", "--prediction", "v"], "flow belongs to schedule rectified_flow"),
    ],
)
def test_a_wrong_option_is_one_line(
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    module = load("convergence.__main__")
    monkeypatch.setattr("sys.argv", ["convergence", *options])
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err


TINY = (
    "--horizon 4 --steps 2 4 --num-samples 40 --samplers ddim-2 --width 8 --depth 1 --heads 2 --batch-size 4"
)


def run(load: Load, monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    monkeypatch.setattr("sys.argv", ["convergence", *options.split()])
    load("convergence.__main__").main()


def test_normalised_losses_stand_beside_those_of_uniform(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = f"--policies speed --seeds 0 1 {TINY} --normalise-loss --out {tmp_path / 'out'}"
    run(load, monkeypatch, options)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    policies = {member["name"]: member["policy"] for member in found["members"]}
    assert policies == {
        "uniform": {"type": "uniform"},
        "speed": {"type": "speed"},
        "uniform / loss": {"type": "uniform", "normalize": "loss"},
        "speed / loss": {"type": "speed", "normalize": "loss"},
    }
    distances = {(member["name"], member["seed"]): member["distances"] for member in found["members"]}
    # No loss scales the first step yet, and AdamW ignores a constant factor. The second step differs.
    assert distances["uniform", 0] != distances["uniform / loss", 0]
    shown = (tmp_path / "out" / "table.md").read_text()
    assert "Over 'uniform / loss' in place of 'uniform', ddim-2:\n  speed / loss: " in shown
    assert shown in capsys.readouterr().out


def test_several_schedules_are_columns_of_one_table(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = f"--schedule linear cosine --policies speed --seeds 0 1 {TINY} --out {tmp_path / 'out'}"
    run(load, monkeypatch, options)
    found = {
        name: json.loads((tmp_path / "out" / name / "results.json").read_text())
        for name in ("linear", "cosine")
    }
    assert [document["protocol"]["schedule"] for document in found.values()] == ["linear", "cosine"]
    lines = capsys.readouterr().out.splitlines()
    header = lines.index("| fewer steps to equal distance | linear | cosine |")
    cells = [line.strip("|").split(" | ") for line in lines[header + 2 : header + 5]]
    assert [row[0].strip() for row in cells] == ["by chance", "uniform", "speed"]
    for column, document in enumerate(found.values(), start=1):
        at = document["by_sampler"]["ddim-2"]["speed_ups"]["speed"]["4"]
        assert f"{at['mean']:.2f} ({at['low']:.2f}, {at['high']:.2f})" in cells[2][column]


def test_a_folder_that_cannot_be_written_is_refused_before_training(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["convergence", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit):
        load("convergence.__main__").main()
    printed = capsys.readouterr()
    assert f"--out needs a folder, got {tmp_path / 'file'}: File exists" in printed.err
    assert "distances of" not in printed.out
