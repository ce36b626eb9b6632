"""Small projects for tests, written to a folder."""

from pathlib import Path


def written(folder: Path, files: dict[str, str]) -> str:
    """Files of a project, by path. Returns the path of the script, the first of them."""
    for name, text in {**files, "setup.py": "raise SystemExit"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return str(folder / next(iter(files)))
