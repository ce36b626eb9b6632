"""`custom_imports` and `--import`: what is merged, what is refused, what a checkpoint asks for."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from speedit_plugins.trainer.config.loading import load_config, to_yaml
from speedit_plugins.trainer.config.same_run import check_same_run

BASE = (Path(__file__).parents[2] / "configs/image/digits/base.yaml").read_text()
MODULES = ("brought_a", "brought_b", "brought_c")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with three modules and a config without the key."""
    for name in MODULES:
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "leaf.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


def stated(value: Any) -> str:
    """The config with the key, as YAML."""
    return f"{BASE}\n{yaml.safe_dump({'custom_imports': value})}"


def test_the_key_and_the_flag_are_imported_and_remembered(folder: Path) -> None:
    (folder / "leaf.yaml").write_text(stated(["brought_b"]))
    assert load_config("leaf.yaml", "train").custom_imports == ["brought_b"]
    assert set(MODULES) & set(sys.modules) == {"brought_b"}
    config = load_config("leaf.yaml", "train", imports=["brought_a", "brought_b", "brought_a"])
    assert config.custom_imports == ["brought_b", "brought_a"]
    (folder / "saved.yaml").write_text(to_yaml(config))
    assert load_config("saved.yaml", "train") == config


def test_the_nearest_file_and_then_the_command_line_replace_the_list(folder: Path) -> None:
    leaf = folder / "configs/a/leaf.yaml"
    leaf.parent.mkdir(parents=True)
    (folder / "configs/base.yaml").write_text(stated(["brought_a"]))
    leaf.write_text("seed: 1\n")
    assert load_config(leaf, "train").custom_imports == ["brought_a"]
    leaf.write_text("custom_imports: {imports: brought_b}\nsample: {custom_imports: [brought_c]}\n")
    assert load_config(leaf, "train").custom_imports == ["brought_b"]
    assert load_config(leaf, "sample").custom_imports == ["brought_c"]
    assert load_config(leaf, "train", ["custom_imports=[brought_c]"]).custom_imports == ["brought_c"]


def test_mmengines_form_is_read_in_yaml_and_in_python(folder: Path) -> None:
    form = {"imports": ["brought_a", "brought_b"], "allow_failed_imports": False}
    plain = {**yaml.safe_load(to_yaml(load_config("leaf.yaml", "train"))), "custom_imports": form}
    (folder / "leaf.py").write_text("\n".join(f"{key} = {value!r}" for key, value in plain.items()))
    (folder / "leaf.yaml").write_text(stated(form))
    for name in ("leaf.yaml", "leaf.py"):
        config = load_config(name, "train", allow_python=True)
        assert config.custom_imports == ["brought_a", "brought_b"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "brought_a",
            "custom_imports: wanted list of str, got 'brought_a'; a list is written [brought_a] (in ",
        ),
        ([3], "custom_imports[0]: wanted str, got 3; wanted quotes around it: '3' (in "),
        ({"imports": [3]}, "custom_imports[0]: wanted str, got 3; wanted quotes around it: '3' (in "),
        ({"allow_failed_imports": False}, "custom_imports.imports: missing; wanted list of str (in "),
        (
            {"imports": [], "import": []},
            "custom_imports.import: unknown key; did you mean 'imports'?; known here: ",
        ),
        (
            {"imports": ["brought_a"], "allow_failed_imports": True},
            "custom_imports.allow_failed_imports: an import that fails ends the run here; wanted false, got",
        ),
        (
            ["brought_a.py/x"],
            "custom_imports: module needs a dotted name, such as my_package.data, got 'brought_a.py/x' (in ",
        ),
        (
            [".brought_a"],
            "custom_imports: module needs a dotted name, such as my_package.data, got '.brought_a'",
        ),
    ],
)
def test_what_is_no_list_of_modules_is_refused(value: Any, message: str, folder: Path) -> None:
    (folder / "leaf.yaml").write_text(stated(value))
    with pytest.raises(ValueError, match=".") as caught:
        load_config("leaf.yaml", "train")
    assert str(caught.value).startswith(message)
    assert "leaf.yaml" in str(caught.value)


def test_a_wrong_config_fails_before_anything_is_imported(folder: Path) -> None:
    (folder / "brought_a.py").write_text("raise ValueError('imported')\n")
    with pytest.raises(ValueError, match="^sed: unknown key"):
        load_config("leaf.yaml", "train", ["custom_imports=[brought_a]", "sed=1"])
    with pytest.raises(ValueError, match="^max_training_steps: train wanted int >= 1"):
        load_config("leaf.yaml", "train", ["max_training_steps=0"], imports=["brought_a"])


def test_a_run_goes_on_with_the_imports_it_began_with(folder: Path) -> None:
    saved, more, fewer = (
        yaml.safe_load(to_yaml(load_config("leaf.yaml", "train", imports=imports)))
        for imports in (["brought_a", "brought_b"], MODULES, ["brought_b"])
    )
    check_same_run(saved, more)
    message = (
        r"custom_imports was \['brought_a', 'brought_b'\], got \['brought_b'\]; wanted --import brought_a,"
    )
    with pytest.raises(ValueError, match=message):
        check_same_run(saved, fewer)
    # One of an earlier version says nothing of imports.
    del saved["custom_imports"]
    check_same_run(saved, fewer)


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("cache_latents", ["-c", "leaf.yaml", "--import", "brought_a"]),
        ("export", ["-c", "leaf.yaml", "--import", "brought_a"]),
        ("inspect_policy", ["--import", "brought_a", "--policy", "none_of_this_name"]),
        ("timestep_profile", ["run"]),
        ("report", ["run", "--out", "nowhere/report.html"]),
    ],
)
def test_the_tools_import_what_they_are_told_or_the_run_says(
    tool: str, arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "leaf.yaml").write_text(BASE.replace("type: Digits", "type: NoneOfThisName"))
    (folder / "run").mkdir()
    (folder / "run/config_train.yaml").write_text(stated(["brought_a"]))
    # Each stops at something that comes after the import.
    assert import_module(tool).main(arguments) == 2
    assert "brought_a" not in capsys.readouterr().err
    assert "brought_a" in sys.modules
    (folder / "brought_a.py").write_text("1 / 0\n")
    del sys.modules["brought_a"]
    assert import_module(tool).main(arguments) == 2
    error = capsys.readouterr().err
    assert "'brought_a': ZeroDivisionError: division by zero (" in error
    assert error.count("\n") == 1
