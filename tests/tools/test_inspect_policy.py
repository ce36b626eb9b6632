import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from policy_cases import POLICY_NAMES, build

from speedit_plugins import NoiseSchedule, build_policy

TOOL = Path(__file__).parents[2] / "tools" / "inspect_policy.py"


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("inspect_policy", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def run(*argv: str) -> int:
    status: int = tool.main(argv)
    return status


def test_the_command_as_documented(tmp_path: Path) -> None:
    out, figure = tmp_path / "out.json", tmp_path / "out.png"
    command = ["--policy", "speedit", "speed", "uniform", "--schedule", "linear", "--timesteps", "1000"]
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    done = subprocess.run(
        [sys.executable, str(TOOL), *command, "--json", str(out), "--plot", str(figure)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert "1.429x, T / tau" in done.stdout
    report: dict[str, Any] = json.loads(out.read_text())
    assert list(report) == ["speedit", "speed", "uniform"]
    speed = report["speed"]
    assert speed["boundary_index"] == 700
    assert speed["mean_weight"] == pytest.approx(0.4965, abs=5e-5)
    assert speed["scope"] == "mse"
    assert report["uniform"]["boundary_index"] is None
    # A PNG begins with these eight bytes, and bytes 16 to 24 are its size.
    head = figure.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    assert (width, height) == (1950, 1275)


def test_tables_are_those_of_the_policies(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert (
        run("--policy", *POLICY_NAMES, "--schedule", "cosine", "--timesteps", "50", "--json", str(out)) == 0
    )
    report = json.loads(out.read_text())
    schedule = NoiseSchedule.cosine(50)
    for name in POLICY_NAMES:
        policy, row = build(name, schedule), report[name]
        assert row["density"] == policy.density.tolist()
        assert row["weight"] == policy.weight.tolist()
        assert sum(row["importance"]) == pytest.approx(1.0)
        product = (policy.density * policy.weight / policy.mean_weight).tolist()
        assert row["importance"] == pytest.approx(product)
        # The three areas divide the schedule, so their shares add up.
        ranges = [area["range"] for area in row["areas"].values()]
        assert [ranges[0][0], ranges[2][1]] == [0, 50]
        assert [ranges[0][1], ranges[1][1]] == [ranges[1][0], ranges[2][0]]
        for share in ("draws", "importance"):
            assert sum(area[share] for area in row["areas"].values()) == pytest.approx(1.0)


def test_areas_and_shares_of_linear(capsys: pytest.CaptureFixture[str]) -> None:
    schedule = NoiseSchedule.linear()
    report = tool.describe(schedule, {"uniform": build_policy("uniform", schedule)})
    areas = report["uniform"]["areas"]
    assert {name: area["range"] for name, area in areas.items()} == {
        "acceleration": [0, 219],
        "deceleration": [219, 700],
        "convergence": [700, 1000],
    }
    assert areas["convergence"]["draws"] == pytest.approx(0.3)
    assert run("--policy", "speedit") == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("speedit "))
    # The published importances: 0.010 + 0.076, 0.211 + 0.616 + 0.015 and 0.072.
    assert row.split()[:4] == ["speedit", "642", "0.5815", "8.6"]
    assert "84.2" in row
    assert "7.2" in row


@pytest.mark.parametrize(
    ("schedule", "verdict", "ceiling"),
    [
        (NoiseSchedule.linear(), "a real saving", "1.429x"),
        (NoiseSchedule.scaled_linear(), "almost nothing", "1.035x"),
        (NoiseSchedule.cosine(), "little", "1.057x"),
        (NoiseSchedule.rectified_flow(), "little", "1.083x"),
    ],
    ids=["linear", "scaled-linear", "cosine", "flow"],
)
def test_what_a_schedule_has_to_gain(schedule: NoiseSchedule, verdict: str, ceiling: str) -> None:
    words = tool.gain(schedule)
    assert verdict in words
    assert ceiling in words


def test_gain_at_the_default_k_is_the_papers_density() -> None:
    # k T / (T + tau (k - 1)) = 5000 / 3800.
    assert "1.316x at k = 5" in tool.gain(NoiseSchedule.linear())


def test_a_schedule_without_an_area_to_thin_has_nothing_to_gain() -> None:
    assert "No timestep has an SNR below 1/143" in tool.gain(NoiseSchedule.from_betas([0.01] * 10))
    noisy = NoiseSchedule.from_alphas_cumprod([0.001, 0.0005])
    assert "Every timestep has an SNR below 1/143" in tool.gain(noisy)
    assert "empty" in tool.summary("noisy", noisy, tool.describe(noisy, {"p2": build_policy("p2", noisy)}))


def test_settings_reach_all_policies_or_one(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    settings = ["--set", "normalize=True", "speed.k=2", "--set", "speed_reference.tau=500"]
    assert run("--policy", "speed", "speed_reference", "--json", str(out), *settings) == 0
    report = json.loads(out.read_text())
    assert [row["mean_weight"] for row in report.values()] == pytest.approx([1.0, 1.0])
    density = report["speed"]["density"]
    assert density[0] / density[-1] == pytest.approx(2.0)
    assert report["speed_reference"]["boundary_index"] == 500


def test_policies_of_one_name_are_told_apart_by_what_was_typed(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    policies = ["{type: spectral, mean: 0}", "{type: spectral, mean: 1}"]
    assert run("--policy", *policies, "--set", f"{policies[1]}.offset=0.5", "--json", str(out)) == 0
    report = json.loads(out.read_text())
    for name, mean, offset in (("spectral", 0.0, 0.6), (policies[1], 1.0, 0.5)):
        config = {"type": "spectral", "mean": mean, "offset": offset}
        assert report[name]["density"] == build_policy(config, NoiseSchedule.linear()).density.tolist()


def test_a_policy_by_its_parts_has_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    policy = "{density: logit_normal, weighting: {type: p2, k: 3}}"
    assert run("--policy", policy, "--json", str(out)) == 0
    parts = {"density": "logit_normal", "weighting": {"type": "p2", "k": 3}}
    expected = build_policy(parts, NoiseSchedule.linear()).weight.tolist()
    assert json.loads(out.read_text())["logit_normal x p2"]["weight"] == expected
    assert run("--policy", "{density: [") == 2
    assert "--policy needs a name or a YAML mapping" in capsys.readouterr().err


def test_prediction_type_follows_the_schedule_or_the_option(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["--policy", "min_snr", "--json", str(out)]
    run(*arguments, "--schedule", "rectified_flow")
    expected = build_policy("min_snr", NoiseSchedule.rectified_flow(), "flow").weight.tolist()
    assert json.loads(out.read_text())["min_snr"]["weight"] == expected
    run(*arguments, "--schedule", "scaled_linear", "--prediction-type", "v")
    weight = json.loads(out.read_text())["min_snr"]["weight"]
    assert [weight[0], weight[500], weight[999]] == pytest.approx([0.004, 0.276, 0.005], abs=5e-4)


def test_a_hosts_law_beside_a_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    host = ["--host", "sd-scripts", "--timestep_sampling", "shift", "--discrete_flow_shift", "3"]
    assert run(*host, "--policy", "uniform", "--json", str(out)) == 0
    printed = capsys.readouterr().out
    assert "Schedule rectified_flow, T = 1000" in printed
    line = next(line for line in printed.splitlines() if line.startswith("  {density"))
    # The printed policy can be copied into a config.
    config = yaml.safe_load(line)
    report = json.loads(out.read_text())
    assert list(report) == ["uniform", "sd-scripts shift 3"]
    row = report["sd-scripts shift 3"]
    assert row["config"] == config
    assert row["density"] == build_policy(config, NoiseSchedule.rectified_flow()).density.tolist()


def test_the_size_of_the_data_and_the_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    policies = ["--policy", "{type: logit_normal, shift: {type: flux}}", "clts"]
    options = ["--schedule", "rectified_flow", "--data-shape", "16,128,128", "--step", "50000"]
    assert run(*policies, *options, "--json", str(out)) == 0
    report = json.loads(out.read_text())
    # Flux shifts a law for 4096 tokens by e^1.15, so logit(u) by 1.15.
    flow = NoiseSchedule.rectified_flow()
    expected = build_policy({"type": "logit_normal", "mean": 1.15}, flow).density.tolist()
    assert report["logit_normal"]["density"] == pytest.approx(expected, abs=2e-6)
    last = build_policy("clts", flow)
    last.advance(50_000)
    assert report["clts"]["density"] == last.density.tolist()
    printed = capsys.readouterr().out
    assert "Note: clts changes during training; shown is its state at step 50000." in printed
    assert "Note: logit_normal changes" not in printed


def test_quartiles_of_known_laws() -> None:
    flow = NoiseSchedule.rectified_flow(1000)
    report = tool.describe(flow, {name: build_policy(name, flow) for name in ("uniform", "logit_normal")})
    assert report["uniform"]["quartiles"]["u"] == pytest.approx([0.25, 0.5, 0.75])
    # Log-SNR is -2 logit(u): the quartiles of a normal law are at -+0.6745.
    quartiles = report["logit_normal"]["quartiles"]
    assert quartiles["log_snr"] == pytest.approx([2 * 0.6745, 0, -2 * 0.6745], abs=2e-3)
    assert quartiles["u"] == pytest.approx([1 / (1 + math.exp(x)) for x in (0.6745, 0, -0.6745)], abs=1e-4)


def test_density_per_unit_log_snr() -> None:
    flow = NoiseSchedule.rectified_flow(1000)
    report = tool.describe(flow, {"logit_normal": build_policy("logit_normal", flow)})
    found = report["logit_normal"]["density_over_log_snr"]
    # Log-SNR = -2 logit(u) is normal with standard deviation 2. Ends have a one-sided difference.
    expected = torch.exp(-(flow.log_snr**2) / 8) / math.sqrt(8 * math.pi)
    assert found[5:-5] == pytest.approx(expected[5:-5].tolist(), abs=1e-4)
    # A timestep with SNR 0 has no place on this axis.
    terminal = NoiseSchedule.linear(1000).zero_terminal_snr()
    report = tool.describe(terminal, {"uniform": build_policy("uniform", terminal)})
    assert report["uniform"]["density_over_log_snr"][-1] is None
    assert None not in report["uniform"]["density_over_log_snr"][:-1]


def test_notes_stand_in_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--policy", "speed", "clts", "--set", "speed.k=1") == 0
    printed = capsys.readouterr()
    assert "Note: thinned draws every timestep equally often: k = 1." in printed.out
    assert "Note: clts changes during training; shown is its initial state." in printed.out
    assert printed.err == ""


@pytest.mark.parametrize("schedule", ["scaled_linear", "rectified_flow"])
def test_a_figure_of_every_policy(schedule: str, tmp_path: Path) -> None:
    figure = tmp_path / "all.svg"
    assert run("--policy", *POLICY_NAMES, "--schedule", schedule, "--plot", str(figure)) == 0
    assert figure.read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "sped"], "unknown policy 'sped'; did you mean 'speed'?"),
        (["--policy", "speed", "--set", "k=0"], "thinned needs k > 0, got 0"),
        (["--policy", "speed", "--set", "k"], "--set needs KEY=VALUE or POLICY.KEY=VALUE, got 'k'"),
        (["--policy", "speed", "--set", "=3"], "got '=3'"),
        (["--policy", "speed", "--set", "p2.k=3"], "needs one of the inspected policies: speed"),
        (["--policy", "uniform", "--set", "equivalent_to=moon"], "needs 'host' or 'epsilon', got 'moon'"),
        (["--policy", "speed", "--timesteps", "5"], "at T = 5: needs T >= 20"),
        (["--policy", "speed", "--timesteps", "many"], "invalid int value: 'many'"),
        (["--policy", "speed", "--schedule", "sigmoid"], "invalid choice: 'sigmoid'"),
        (
            ["--policy", "speed", "--json", "/nowhere/out.json"],
            "cannot write /nowhere/out.json: No such file",
        ),
        (["--policy", "speed", "--plot", "/nowhere/out.png"], "cannot write /nowhere/out.png: No such file"),
        (["--policy", "speed", "--plot", "out.xyz"], "Format 'xyz' is not supported"),
        ([], "needs --policy NAME or --host NAME"),
        (["--host"], "--host needs a name, one of ai-toolkit, "),
        (["--host", "sit", "--schedule", "linear"], "--host needs --schedule rectified_flow, got linear"),
        (["--host", "rae"], "rae depends on the size of the data: give --data-shape, such as 16,128,128"),
        (["--policy", "speed", "--data-shape", "3,x"], "--data-shape needs sizes >= 1, such as 16,128,128"),
    ],
)
def test_an_error_is_one_line_and_exit_status_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("inspect_policy: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    out.write_text("old")

    def full(self: Path, content: bytes) -> None:
        self.write_text(content[:10].decode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert run("--policy", "uniform", "--json", str(out)) == 2
    assert f"cannot write {out}: No space left on device" in capsys.readouterr().err
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
