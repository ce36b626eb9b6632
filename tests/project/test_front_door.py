"""Other people's modules by every door: the package of docs/extending.md, installed as the page prints it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import yaml
from architecture import PACKAGE, ROOT

from speedit_plugins import launch, registry
from speedit_plugins.cli import main
from speedit_plugins.registry import Registry
from speedit_plugins.trainer.logging.tracking import read_metrics

DIGITS = ["-c", str(ROOT / "configs/image/digits/speedit.yaml"), "-p", "train"]
# A module beside the config that is not installed.
BESIDE = """
from torch import ones_like
from speedit_plugins.registry import WEIGHTINGS
WEIGHTINGS.register_module(name="beside", module=lambda schedule: ones_like(schedule.alpha))
"""
SMALL = (
    "model.width=8",
    "data.batch_size=8",
    "log_every=2",
    "enable_tensorboard_log=false",
    "sample_classes=[0, 1]",
    "sampler.num_steps=2",
)


def run(command: Sequence[str | Path], cwd: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    """The finished command. Modules come from `path`, then from this clone."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file of the page, and the data that its config names."""
    folder = tmp_path_factory.mktemp("work")
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    for name, text in re.findall(r"```\w+\n# (\S+)\n(.*?)```", page, flags=re.DOTALL):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "my_package/__init__.py").touch()
    (folder / "beside.py").write_text(BESIDE)
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1), dtype=np.uint8)
    (folder / "my_images").mkdir()
    np.save(folder / "my_images/images.npy", images)
    np.save(folder / "my_images/labels.npy", np.arange(32) % 2)
    return folder


@pytest.fixture(scope="module")
def site(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's package installed; the working folder keeps no copy."""
    target = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation"]
    source = work / "source"
    source.mkdir()
    for name in ("my_package", "pyproject.toml"):
        shutil.move(work / name, source)
    done = run([*install, "--target", target, source], work)
    assert done.returncode == 0, done.stderr
    return target


# The law of a density, five configs that are wrong, a right one, a training, and one with an optimizer.
IN_ONE_PROCESS = """
import json, sys
from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.cli import main
policy = build_policy(dict(type="ramp_p2", top=0.6), NoiseSchedule.linear())
time = (policy.schedule.timesteps + 0.5) / 1000
print(json.dumps([float((policy.density * time).sum()), "my_package.data" in sys.modules]))
common = ["-c", "my_experiment.yaml", "-p", "train", *sys.argv[2:]]
codes = [main([*common, "--dry-run", *more]) for more in json.loads(sys.argv[1])]
changes = ["data.num_workers=2", "sample_every=4", "max_training_steps=4"]
codes.append(main([*common, *changes, "--import", "beside", "diffusion.policy.weighting=beside"]))
own = ["optimizer={type: SignMomentum, lr: 1e-3, beta: 0.9}", "experiment_dir=outputs/own"]
codes.append(main([*common, *own, "max_training_steps=2", "--import", "my_package.optimizer"]))
print(json.dumps(codes))
"""
WRONG = {
    "model.widht=8": "model 'ConvNet' has no parameter 'widht'; did you mean 'width'?",
    "model.width=wide": "model 'ConvNet' width needs int, got 'wide'",
    "data.dataset.mirror=3": "dataset 'NumpyImages' mirror needs bool, got 3",
    "data.dataset=NumpyImage": "unknown dataset 'NumpyImage'; did you mean 'NumpyImages'?; known: Digits, ",
    "diffusion.policy={type: ramp_p2, top: -1}": "ramp needs top in (0, 1], got -1",
}


@pytest.fixture(scope="module")
def ran(work: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """One process that does all of it, the training in workers and with a grid."""
    arguments = json.dumps([*([override] for override in WRONG), []])
    done = run([sys.executable, "-c", IN_ONE_PROCESS, arguments, *SMALL], work, site)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(ran: subprocess.CompletedProcess[str], work: Path) -> Path:
    """The folder of that training."""
    return work / "outputs/mine"


def test_names_from_outside_are_used_and_checked_like_our_own(ran: subprocess.CompletedProcess[str]) -> None:
    first, *described, codes = ran.stdout.splitlines()
    mean, is_data_imported = json.loads(first)
    # The mean of a density that rises evenly to 0.6 is two thirds of 0.6. The midpoint rule is exact for u,
    # and off by 0.6 / 12 / 1000^2 for u^2, which is divided by the integral of u, 0.18.
    assert mean == pytest.approx(0.4, abs=5e-7)
    # The entry point brings in its own module and no other.
    assert not is_data_imported
    assert json.loads(codes) == [*(2 for _ in WRONG), 0, 0, 0]
    assert [line for line in described if line.startswith("policy             custom: ")]
    # Two convolutions of 3 x 3, a linear layer and two classes, all 8 wide; the last has two channels.
    assert f"parameters         {10 * 8 + 2 * 8 + 2 * 8 + 73 * 2}" in described
    errors = [line for line in ran.stderr.splitlines() if "error" in line]
    assert len(errors) == len(WRONG)
    for line, message in zip(errors, WRONG.values(), strict=True):
        assert line.startswith(f"speedit: error: {message}")


def test_the_checkpoint_remembers_the_imports(trained: Path) -> None:
    for path in (trained / "config_train.yaml", trained / "checkpoints/step_0000004/config.yaml"):
        saved = yaml.safe_load(path.read_text())
        assert saved["custom_imports"] == ["my_package.data", "my_package.model", "beside"]
    assert (trained / "grids/step_0000004.png").is_file()


@pytest.mark.slow
def test_two_ranks_go_on_from_the_saved_config(trained: Path, site: Path, work: Path) -> None:
    torchrun = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", "2"]
    config = [ROOT / "tools/main.py", "-c", trained / "config_train.yaml", "-p", "train"]
    changes = ["max_training_steps=8", "sample_every=0", "data.num_workers=1"]
    done = run([*torchrun, *config, *changes], work, site)
    assert done.returncode == 0, done.stderr
    assert "going on from outputs/mine/checkpoints/step_0000004" in done.stdout
    assert [row["step"] for row in read_metrics(trained)] == [2, 4, 6, 8]


def test_a_run_that_goes_on_without_an_import_says_which(
    trained: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    # No module is left to import: this process registers nothing.
    assert main(["-c", "my_experiment.yaml", "-p", "train", *SMALL, "custom_imports=[]"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot go on without its imports: custom_imports was ['my_package.data', 'my_package.mod" in error
    assert "got []; wanted --import my_package.data --import my_package.model --import beside" in error


HOST = """
from host_standins import create
def create_diffusion(timestep_respacing=""):
    return create(respacing=timestep_respacing)
"""
HOST_POLICY = """
from speedit_plugins.registry import POLICIES
@POLICIES.register_module()
def ours(*, top: float = 1.0):
    return {"density": {"type": "ramp", "top": top}, "weighting": "constant"}
"""
SCRIPT = """
import torch
from diffusion import create_diffusion
scale = torch.nn.Parameter(torch.tensor(0.7))
def model(x, t, **_):
    return torch.cat([scale * x, scale * x], dim=1)
x, t = torch.randn(64, 4, 2, 2), torch.full((64,), 999)
create_diffusion().training_losses(model, x, t)["loss"].mean().backward()
torch.optim.SGD([scale], lr=1e-3).step()
"""


def test_the_launcher_takes_a_policy_from_the_hosts_own_checkout(site: Path, tmp_path: Path) -> None:
    (tmp_path / "diffusion").mkdir()
    (tmp_path / "diffusion/__init__.py").write_text(HOST)
    (tmp_path / "diffusion/ours.py").write_text(HOST_POLICY)
    (tmp_path / "train.py").write_text(SCRIPT)
    imports = ["--import", "my_package.density", "--import", "diffusion.ours"]
    launcher = [sys.executable, "-m", f"{PACKAGE}.launch", *imports, "--policy", "ours", "--set", "top=0.5"]
    tests = [ROOT / "tests", ROOT / "tests/standins", ROOT / "tools"]
    done = run([*launcher, "train.py"], tmp_path, site, *tests)
    assert done.returncode == 0, done.stderr
    assert "speedit-launch: DiT, fast-DiT, Latte, seam B, policy ours: " in done.stderr


FAILING = {
    "missing": (None, "ModuleNotFoundError: No module named 'missing'; it needs to be installed, or in the"),
    "wants_more": (
        "x = 1\nimport nothing_of_this_name\n",
        "ModuleNotFoundError: No module named 'nothing_of_this_name' ({folder}/wants_more.py, line 2)",
    ),
    "divides": (
        "def f():\n    return 1 / 0\nf()\n",
        "ZeroDivisionError: division by zero ({folder}/divides.py, line 2)",
    ),
    "two_lines": ("raise ValueError('a\\nb')\n", "ValueError: a b ({folder}/two_lines.py, line 1)"),
    "no_python": ("def f(:\n", "SyntaxError: invalid syntax (no_python.py, line 1)"),
    "leaves": ("import sys\nsys.exit(3)\n", "SystemExit: 3 ({folder}/leaves.py, line 2)"),
}


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with modules that cannot be imported."""
    for name, (text, _) in FAILING.items():
        if text is not None:
            (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.parametrize("name", FAILING)
def test_an_import_that_fails_is_one_line(
    name: str, failing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = FAILING[name][1].format(folder=failing)
    config = (ROOT / "configs/image/digits/base.yaml").read_text()
    (failing / "mine.yaml").write_text(f"{config}\ncustom_imports: [{name}]\n")
    by_flag, by_config = f"cannot import --import {name!r}", f"custom_imports: cannot import module {name!r}"
    doors = (
        ("speedit", by_flag, lambda: main([*DIGITS, "--import", name])),
        ("speedit-launch", by_flag, lambda: launch.main(["--import", name, "train.py"])),
        ("speedit", by_config, lambda: main(["-c", "mine.yaml", "-p", "train"])),
    )
    for program, door, start in doors:
        assert start() == 2
        error = capsys.readouterr().err
        assert error.startswith(f"{program}: error: {door}: {reason}")
        assert error.count("\n") == 1
    assert error.endswith(f"(in {failing}/mine.yaml)\n")


def test_an_entry_point_that_fails_is_named_at_every_lookup(
    failing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [metadata.EntryPoint("broken", "wants_more", registry.ENTRY_POINTS)]
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: points)
    monkeypatch.syspath_prepend(failing)
    registry.load_entry_points.cache_clear()
    things = Registry("thing", "json")
    message = "cannot import entry point 'broken' of the group 'speedit_plugins', 'wants_more': ModuleNotFo"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            things.get("any")
    points[:] = [metadata.EntryPoint("called", "json:loads", registry.ENTRY_POINTS)]
    with pytest.raises(ValueError, match="'json:loads': needs a module, such as 'json', got a name in one"):
        things.get("any")
    points.clear()
    assert things.get("any") is None
    registry.load_entry_points.cache_clear()


def test_what_a_builder_lacks_is_said_of_its_own_package(
    failing: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (failing / "lazy.py").write_text("def build(config):\n    import nothing_of_this_name\n")
    monkeypatch.setattr("speedit_plugins.cli._run", lambda phase, config: sys.modules["lazy"].build(config))
    assert main([*DIGITS, "--import", "lazy"]) == 2
    wanted = "speedit: error: lazy needs nothing_of_this_name, which is not installed\n"
    assert capsys.readouterr().err == wanted


FIND_ALL = """
import json
from speedit_plugins import registry
kinds = [value for value in vars(registry).values() if isinstance(value, registry.Registry)]
print(json.dumps({kind.name: kind.get("newcomer") for kind in kinds}))
"""


def test_a_new_file_of_ours_is_found_by_its_folder(tmp_path: Path) -> None:
    kinds = {name: value for name, value in vars(registry).items() if isinstance(value, Registry)}
    shutil.copytree(
        ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("assets", "__pycache__")
    )
    for name, kind in kinds.items():
        folder = tmp_path.joinpath(*str(kind._package).split("."), f"new_{name.lower()}")
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / "file.py").write_text(
            f"from {PACKAGE}.registry import {name}\n"
            f"{name}.register_module(name='newcomer', module={name!r})\n"
        )
    done = run([sys.executable, "-c", FIND_ALL], tmp_path, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {kind.name: name for name, kind in kinds.items()}
