"""The fenced blocks of a Markdown page, and the pages of this project."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^(?P<indent>\s*)```(?P<language>[\w-]*)\s*$")
# Before a block, for those that read the source: readers do not see it.
_NOT_RUN = re.compile(r"<!-- not run: .+ -->")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language ('' where none is given), its text, and the line that it begins on."""

    page: Path
    line: int
    language: str
    text: str
    is_not_run: bool = False


def pages() -> list[Path]:
    """README.md, CONTRIBUTING.md, the pages of docs/ and the hosts' READMEs."""
    found = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("integrations/**/README.md"),
    ]
    return sorted(found)


def page_id(page: Path) -> str:
    """The page's path from the root."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    opened: re.Match[str] | None = None
    start = 0
    for number, line in enumerate(lines, 1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened, start = fence, number
        elif opened is not None and line.strip() == "```":
            indent = len(opened["indent"])
            text = "\n".join(each[indent:] for each in lines[start : number - 1])
            yield Block(page, start + 1, opened["language"], text, _is_marked(lines[: start - 1]))
            opened = None
    assert opened is None, f"{page_id(page)}:{start}: a block that is not closed"


def _is_marked(before: list[str]) -> bool:
    last = next((line for line in reversed(before) if line.strip()), "")
    return bool(_NOT_RUN.fullmatch(last.strip()))
