"""The wheel and the sdist are built from a copy of the tree, installed, and used outside of it."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from architecture import ROOT, project_files

pytestmark = pytest.mark.slow

KINDS = ("wheel", "sdist")


def run(command: Sequence[str | Path], cwd: Path, path: Path | None = None) -> str:
    """What the command writes to stdout. Modules come from `path` first; a failure shows both outputs."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def relative_files(folder: str, suffix: str) -> set[str]:
    """Paths of the project below a folder, relative to that folder."""
    prefix = f"{folder}/"
    paths = [path.relative_to(ROOT).as_posix() for path in project_files()]
    return {p.removeprefix(prefix) for p in paths if p.startswith(prefix) and p.endswith(suffix)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The built files by kind. The sdist comes from a copy of the tree, the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    for path in project_files():
        target = tree / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, tree], cwd=folder)
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


@pytest.fixture(scope="module")
def installed(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each kind with only this package in it; the dependencies are those of this environment."""
    folders = {kind: tmp_path_factory.mktemp(kind) / "site" for kind in KINDS}
    for kind, folder in folders.items():
        install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation"]
        run([*install, "--target", folder, built[kind]], cwd=folder.parent)
    return folders


class TestContents:
    def test_wheel_holds_every_module_and_config_and_nothing_else(self, built: dict[str, Path]) -> None:
        with zipfile.ZipFile(built["wheel"]) as archive:
            names = {name for name in archive.namelist() if ".dist-info/" not in name}
        modules = {f"speedit_plugins/{path}" for path in relative_files("speedit_plugins", "")}
        configs = {f"speedit_plugins/configs/{path}" for path in relative_files("configs", ".yaml")}
        assert configs
        assert names == modules | configs | {"speedit_plugins/configs/__init__.py"}

    def test_wheel_carries_licence_and_command(self, built: dict[str, Path]) -> None:
        with zipfile.ZipFile(built["wheel"]) as archive:
            info = {
                name.split(".dist-info/")[1]: archive.read(name).decode()
                for name in archive.namelist()
                if ".dist-info/" in name
            }
        assert "Apache License" in info["licenses/LICENSE"]
        assert "License-Expression: Apache-2.0" in info["METADATA"]
        assert "speedit = speedit_plugins.cli:main" in info["entry_points.txt"]
        # A plugin user gets the three packages of the core and no more.
        required = [line for line in info["METADATA"].splitlines() if line.startswith("Requires-Dist:")]
        core = {line.split()[1].split(">")[0] for line in required if "extra ==" not in line}
        assert core == {"torch", "mmengine", "numpy"}

    def test_sdist_holds_what_a_build_needs(self, built: dict[str, Path]) -> None:
        with tarfile.open(built["sdist"]) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        assert {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= names
        assert {f"configs/{path}" for path in relative_files("configs", ".yaml")} <= names
        assert not [name for name in names if name.startswith(("outputs", ".venv"))]


@pytest.mark.parametrize("kind", KINDS)
class TestUsedOutsideTheClone:
    def test_policy_is_built(self, kind: str, installed: dict[str, Path], tmp_path: Path) -> None:
        code = (
            "import speedit_plugins as s, speedit_plugins.configs as c;"
            "print(s.__file__, next(iter(c.__path__)));"
            "print(s.build_policy('speed', s.NoiseSchedule.linear()).boundary_index)"
        )
        places, boundary = run([sys.executable, "-c", code], tmp_path, installed[kind]).splitlines()
        assert all(Path(place).is_relative_to(installed[kind]) for place in places.split())
        # Where the SNR of the linear schedule falls below 1/143, the paper's tau.
        assert boundary == "700"

    def test_command_explains_itself(self, kind: str, installed: dict[str, Path], tmp_path: Path) -> None:
        text = run([installed[kind] / "bin" / "speedit", "--help"], tmp_path, installed[kind])
        assert "usage: speedit" in text

    def test_packaged_config_is_found(self, kind: str, installed: dict[str, Path], tmp_path: Path) -> None:
        speedit = str(installed[kind] / "bin" / "speedit")
        command = [speedit, "-c", "image/digits/speedit.yaml", "-p", "train", "--dry-run"]
        text = run(command, tmp_path, installed[kind])
        assert "type: speedit" in text
        assert not list(tmp_path.iterdir())
