"""The launcher's command line: which policy it describes, what --help lists, and how errors begin."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from speedit_plugins import NoiseSchedule, build_policy, launch, launch_options
from speedit_plugins.hosts.factories import FACTORIES
from speedit_plugins.launch_options import LaunchError, advice, policy_config
from speedit_plugins.registry import POLICIES

PARTS = {"density": "logit_normal", "weighting": {"type": "p2", "gamma": 0.5}}


@pytest.mark.parametrize(
    ("policy", "settings", "config"),
    [
        (None, [], {"type": "recommended"}),
        (None, ["k=2"], {"type": "recommended", "k": 2}),
        ("speed", ["k=3", "weighting=constant"], {"type": "speed", "k": 3, "weighting": "constant"}),
        (None, ["density=uniform", "weighting=p2"], {"density": "uniform", "weighting": "p2"}),
        (None, ["weighting=p2"], {"type": "recommended", "weighting": "p2"}),
        ("speedit", ["weighting.gamma=2"], {"type": "speedit", "weighting": {"gamma": 2}}),
        (None, ["weighting=min_snr", "weighting.gamma=2", "density=uniform"], None),
        (json.dumps(PARTS), [], PARTS),
        (json.dumps(PARTS), ["weighting.gamma=0.1"], {**PARTS, "weighting": {"type": "p2", "gamma": 0.1}}),
        ("{type: speed, k: 3}", ["lam=0.7"], {"type": "speed", "k": 3, "lam": 0.7}),
        ("p2", ['weighting={"type": "p2"}'], {"type": "p2", "weighting": {"type": "p2"}}),
        (
            "logit_normal",
            ["shift=3", "window=[0.1, 0.9]"],
            {"type": "logit_normal", "shift": 3, "window": [0.1, 0.9]},
        ),
        (
            "logit_normal",
            ["shift.type=pixels", "shift.base=64"],
            {"type": "logit_normal", "shift": {"type": "pixels", "base": 64}},
        ),
        (
            None,
            [
                "weighting=constant",
                "density.type=stages",
                "density.laws=[logit_normal, uniform]",
                "density.until=[9]",
            ],
            {
                "density": {"type": "stages", "laws": ["logit_normal", "uniform"], "until": [9]},
                "weighting": "constant",
            },
        ),
        ("speed", ["tau=null", "stratified=true"], {"type": "speed", "tau": None, "stratified": True}),
    ],
)
def test_a_policy_on_the_command_line(
    policy: str | None, settings: list[str], config: dict[str, Any] | None
) -> None:
    wanted = config or {"density": "uniform", "weighting": {"type": "min_snr", "gamma": 2}}
    assert policy_config(policy, settings) == wanted
    assert build_policy(wanted, NoiseSchedule.linear()).density.shape == (1000,)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mine.json", json.dumps(PARTS)),
        ("mine.yaml", "density: logit_normal\nweighting: {type: p2, gamma: 0.5}\n"),
    ],
)
def test_a_policy_in_a_file(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert policy_config(str(tmp_path / name), []) == PARTS


@pytest.mark.parametrize(
    ("policy", "settings", "message"),
    [
        ("absent.json", [], "--policy absent.json: cannot be read: "),
        ("{type: [}", [], "--policy is neither JSON nor YAML: "),
        ("list.json", [], "--policy list.json needs a mapping, got ['speed']"),
        ("speed", ["k=5", "k.a=2"], "--set k.a=2: k is 5 and has no parameters"),
        ("speed", [".a=2"], "--set needs KEY=VALUE, got '.a=2'"),
    ],
)
def test_what_is_no_policy(
    policy: str, settings: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text('["speed"]')
    with pytest.raises(LaunchError) as error:
        policy_config(policy, settings)
    assert str(error.value).startswith(message)


def test_the_light_install_reads_json_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_options, "find_spec", lambda name: None)
    assert policy_config('{"type": "speed"}', []) == {"type": "speed"}
    with pytest.raises(LaunchError, match=r"--policy is no JSON \(.*\), and YAML needs omegaconf"):
        policy_config("{type: speed}", [])


def test_help_lists_hosts_and_policies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "brought_policy.py").write_text(
        "from speedit_plugins.registry import POLICIES\n"
        "def brought(*, a: float = 1.0): ...\n"
        "POLICIES.register_module(name='brought', module=brought)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(SystemExit) as leaving:
            launch.main(["--import", "brought_policy", "--help"])
    finally:
        POLICIES.module_dict.pop("brought")
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    lines = [line.strip() for line in text.splitlines()]
    for factory in FACTORIES:
        assert f"{factory.hosts}: {factory.module}.{' or '.join(factory.functions)}" in " ".join(text.split())
    assert {line.split(" ")[0] for line in lines} >= {*POLICIES.module_dict, "brought"}
    assert "speed (k, lam, snr_boundary, tau)" in lines


class TestErrors:
    """Each error is one line and exit code 2, before anything trains."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--policy", "sped", "train.py"], "unknown policy 'sped'; did you mean 'speed'?"),
            (
                ["--set", "lamda=5", "--policy", "speed", "train.py"],
                "policy 'speed' has no parameter 'lamda'",
            ),
            (["--set", "k", "train.py"], "--set needs KEY=VALUE, got 'k'"),
            (["--policy", "speed", "--set", "k=fast", "train.py"], "k needs float, got 'fast'"),
            (["absent.py"], "no script 'absent.py'"),
            (["--polcy", "speed", "train.py"], "launch --help"),
            ([], "the following arguments are required: script"),
        ],
    )
    def test_arguments(
        self,
        arguments: list[str],
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "train.py").write_text("raise SystemExit('ran')")
        assert launch.main(arguments) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("speedit-launch: error: ")
        assert message in printed
        assert printed.count("\n") == 1

    def test_a_script_without_a_seam_is_not_run(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # Without code, a folder of that name is not DiT's package.
        (tmp_path / "diffusion").mkdir()
        script = tmp_path / "train.py"
        script.write_text("raise SystemExit('ran')")
        assert launch.main([str(script)]) == 2
        printed = capsys.readouterr().err
        assert f"{script} has no seam: it reaches no function of a known host" in printed
        assert f"`speedit-launch --doctor {script}` says where it draws" in printed
        assert "\n    policy = build_policy('recommended', " in printed

    def test_every_rank_has_the_error_and_rank_0_what_to_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        script = tmp_path / "train.py"
        script.touch()
        monkeypatch.setenv("RANK", "1")
        assert launch.main([str(script)]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"speedit-launch: error: {script} has no seam")
        assert printed.count("\n") == 1

    def test_a_script_that_is_not_python(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        script = tmp_path / "train.py"
        script.write_text("print 'ran'")
        assert launch.main([str(script)]) == 2
        assert "is not Python that this interpreter reads" in capsys.readouterr().err


@pytest.mark.parametrize("config", [{"type": "speed"}, {"type": "speed", "k": 3, "weighting": "constant"}])
def test_the_advised_lines_run(config: dict[str, Any]) -> None:
    code = [line.strip() for line in advice(config).splitlines() if line.startswith("    ")]
    assert len(code) == 7
    names: dict[str, Any] = {"batch_size": 4, "device": "cpu", "x_0": torch.randn(4, 1, 2, 2)}
    names["mse_of_each_sample"] = torch.ones(4)
    exec("\n".join(code), names)
    assert names["policy"].name == build_policy(config, NoiseSchedule.linear()).name
    assert names["policy"].num_steps == 1
    assert torch.equal(names["loss"], names["draw"].weight.mean())


def test_the_advised_pages_exist() -> None:
    root = Path(__file__).parents[2]
    pages = [word for word in advice({"type": "speed"}).split() if word.endswith(".md")]
    assert pages
    assert all((root / page).is_file() for page in pages)
