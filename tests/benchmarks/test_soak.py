"""The files that the soak benchmark leaves behind. Its trainings are replaced."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def lone(folder: Path, options: list[str]) -> None:
    # The run that nobody disturbs waits for its saves.
    assert "async_save=true" not in options
    folder.mkdir()


@pytest.fixture
def soak(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    pytest.importorskip("psutil")
    module = load("soak")
    monkeypatch.setattr("sys.argv", ["soak", "--async-save"])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "_launch", lone)
    monkeypatch.setattr(module, "_finish", lambda job: "")
    return module


@pytest.mark.parametrize(
    ("differences", "resumed_step", "is_kept"), [([], 5, False), (["model/x"], 5, True), ([], 4, True)]
)
def test_the_runs_are_kept_where_something_is_wrong(
    soak: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    differences: list[str],
    resumed_step: int,
    is_kept: bool,
) -> None:
    def killed(folder: Path, options: list[str], arguments: Any) -> list[Any]:
        assert "async_save=true" in options
        folder.mkdir()
        return [soak.Kill("step", 0, 5, resumed_step, True, 2)]

    monkeypatch.setattr(soak, "_killed", killed)
    monkeypatch.setattr(soak, "_differences", lambda *folders: differences)
    if is_kept:
        with pytest.raises(SystemExit) as ended:
            soak.main()
        assert ended.value.code == 1
        (folder,) = tmp_path.iterdir()
        assert {path.name for path in folder.iterdir()} == {"whole", "killed"}
        assert f"both runs are kept in {folder}" in capsys.readouterr().out
    else:
        soak.main()
        output = capsys.readouterr().out
        assert "1 came while a checkpoint was being written, 1 of them when later steps were done" in output
        assert list(tmp_path.iterdir()) == []
