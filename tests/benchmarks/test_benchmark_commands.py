"""Commands and paths of benchmarks, as documentation, the Makefile and docstrings have them."""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
# A command ends with its line, or with the line after a backslash.
COMMAND = re.compile(r"-m (benchmarks(?:\.\w+)+)((?:[^\n`\"\\]|\\+\n)*)")
MENTIONED = re.compile(r"\bbenchmarks/[\w/]+\.(?:py|yaml)\b")
# The script that a dated report was measured with is no longer there; the report says so.
REPLACED = "benchmarks/training_step.py"


def texts() -> dict[str, str]:
    """Path -> text, of what names benchmarks."""
    files = [ROOT / "Makefile", *ROOT.glob("*.md")]
    for folder, endings in {"docs": ["md"], "integrations": ["md"], "benchmarks": ["py", "yaml"]}.items():
        files += [path for ending in endings for path in sorted((ROOT / folder).rglob(f"*.{ending}"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


def source(module: str) -> Path:
    """The file that `python -m` runs."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


COMMANDS = sorted(
    (place, found[1], tuple(re.findall(r"(?<!\S)\[?(--[a-z][a-z-]*)", found[2])))
    for place, text in texts().items()
    for found in COMMAND.finditer(text)
)


def test_commands_name_programs_and_their_options() -> None:
    assert {place.split("/")[0] for place, _, _ in COMMANDS} >= {"Makefile", "benchmarks", "docs"}
    options_of_bench = ("--schedule", "--policies", "--seeds", "--out")
    assert ("Makefile", "benchmarks.convergence", options_of_bench) in COMMANDS
    for place, module, options in COMMANDS:
        assert source(module).is_file(), (place, module)
        program = source(module).read_text(encoding="utf-8")
        assert '__name__ == "__main__"' in program, (place, module)
        if "import training_parser" in program:
            program += (ROOT / "benchmarks/training_options.py").read_text(encoding="utf-8")
        own = [option for option in options if option != "--help"]
        assert [option for option in own if f'"{option}"' not in program] == [], (place, module)


def test_a_path_that_is_mentioned_is_there() -> None:
    mentioned = {path: place for place, text in texts().items() for path in MENTIONED.findall(text)}
    assert {path for path in mentioned if not (ROOT / path).is_file()} == {REPLACED}


def test_the_page_of_benchmarks_lists_every_program() -> None:
    page = (ROOT / "docs" / "benchmarks" / "README.md").read_text(encoding="utf-8")
    files = [path.relative_to(ROOT) for path in (ROOT / "benchmarks").rglob("*.py")]
    programs = {
        ".".join(path.with_suffix("").parts).removesuffix(".__main__")
        for path in files
        if '__name__ == "__main__"' in (ROOT / path).read_text(encoding="utf-8")
    }
    # Figures belong to the program whose results they show.
    plots = {program for program in programs if program.endswith(".plots")}
    assert set(re.findall(r"`(benchmarks\.[\w.]+)`", page)) == programs - plots


def test_the_package_is_not_the_folder_of_its_tests(load: Callable[[str], ModuleType]) -> None:
    assert load("spread").__file__ == str(ROOT / "benchmarks" / "spread.py")
    # Without an `__init__.py` here, the package is found wherever both are on the path.
    assert not Path(__file__).with_name("__init__.py").exists()
