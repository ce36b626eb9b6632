"""Wheel and sdist are built from a copy of the tree, installed, and used outside of the tree."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from architecture import PACKAGE, ROOT, project_files

pytestmark = pytest.mark.slow

KINDS = ("wheel", "sdist")


def run(command: Sequence[str | Path], cwd: Path, path: Path | None = None) -> str:
    """What the command writes to stdout; `path` is first on its import path. A failure shows both outputs."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def relative_files(folder: str, suffix: str) -> set[str]:
    """Paths of the project's files below a folder that end with `suffix`, relative to the folder."""
    prefix = f"{folder}/"
    paths = [path.relative_to(ROOT).as_posix() for path in project_files()]
    return {p.removeprefix(prefix) for p in paths if p.startswith(prefix) and p.endswith(suffix)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The built file of each kind. The sdist is built from a copy of the tree, the wheel from the sdist."""
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
    """For each kind a folder with only this package installed. Dependencies come from this environment."""
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
        assert "speedit = speedit_plugins.cli:command" in info["entry_points.txt"]
        assert "speedit-launch = speedit_plugins.launch:main" in info["entry_points.txt"]
        assert "speedit-spectrum = speedit_plugins.spectrum_command:main" in info["entry_points.txt"]
        # A plugin user installs two required packages. mmengine would overwrite a host's.
        required = [line for line in info["METADATA"].splitlines() if line.startswith("Requires-Dist:")]
        core = {line.split()[1].split(">")[0] for line in required if "extra ==" not in line}
        assert core == {"torch", "numpy"}
        mmengine = [line for line in required if "mmengine" in line]
        assert {line.split("extra == ")[1].strip("'\"") for line in mmengine} == {"mmengine", "dev"}

    def test_sdist_holds_what_a_build_needs(self, built: dict[str, Path]) -> None:
        with tarfile.open(built["sdist"]) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        assert {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= names
        assert {f"configs/{path}" for path in relative_files("configs", ".yaml")} <= names
        assert not [name for name in names if name.startswith(("outputs", ".venv"))]


def test_both_install_the_same(installed: dict[str, Path]) -> None:
    wheel, sdist = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if is_of_use(path)}
        for folder in installed.values()
    )
    assert sdist == wheel


def is_of_use(path: Path) -> bool:
    """Whether a file is not about its own installation."""
    return path.is_file() and path.name not in ("RECORD", "direct_url.json") and path.suffix != ".pyc"


# The sdist installs the same.
@pytest.mark.parametrize("kind", KINDS[:1])
class TestUsedOutsideTheClone:
    def test_policy_is_built(self, kind: str, installed: dict[str, Path], tmp_path: Path) -> None:
        code = (
            "import speedit_plugins as s, speedit_plugins.configs as c;"
            "print(s.__file__, next(iter(c.__path__)));"
            "print(s.build_policy('speed', s.NoiseSchedule.linear()).boundary_index)"
        )
        places, boundary = run([sys.executable, "-c", code], tmp_path, installed[kind]).splitlines()
        assert all(Path(place).is_relative_to(installed[kind]) for place in places.split())
        # On the linear schedule the SNR falls below 1/143 at index 700, the paper's tau.
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

    def test_a_module_of_the_current_folder_is_imported(
        self, kind: str, installed: dict[str, Path], tmp_path: Path
    ) -> None:
        registering = (
            f"from {PACKAGE}.registry import DENSITIES\n"
            f"from {PACKAGE}.policies.densities.over_time import uniform\n"
        )
        (tmp_path / "mine.py").write_text(
            f"{registering}DENSITIES.register_module(name='mine', module=uniform)\n"
        )
        command = [str(installed[kind] / "bin" / "speedit"), "-c", "image/digits/speedit.yaml", "-p", "train"]
        policy = "diffusion.policy={density: mine, weighting: constant}"
        text = run([*command, "--import", "mine", policy, "--dry-run"], tmp_path, installed[kind])
        assert "custom_imports:\n- mine\n" in text
        assert "policy             custom: " in text
