"""Counts the habits of language that make this project hard to read, and fails where there are too many.

    python tools/check_language.py [--list]

Docstrings and comments of the whole tree are counted together, per 10,000 words. Lines of README.md and docs/
end at 120 characters, except in tables.
"""

import argparse
import ast
import io
import itertools
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_LINE = 120


@dataclass(frozen=True)
class Habit:
    """A habit of language: what it is, where it is found, and how often it may be in 10,000 words."""

    name: str
    pattern: re.Pattern[str]
    limit: float


# Limits from what well-read libraries of the field have: optax has 0, 0 and 2.
HABITS = (
    Habit('sentences that open with "Of"', re.compile(r"(?:\A|[.!?:;]\s+|\n\n)Of\b"), 1.0),
    # A stand-in is a thing, not a habit.
    Habit('"stands"', re.compile(r"\bstands?\b(?!-in)"), 1.0),
    Habit('", which"', re.compile(r", which\b"), 8.0),
)


@dataclass(frozen=True)
class Passage:
    """A docstring, or comments on consecutive lines, as one text without the marks around it."""

    path: str
    line: int
    text: str


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 0 where every limit is kept, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="check_language", description="Counts habits of language.")
    parser.add_argument("--list", action="store_true", help="print each place that was counted")
    args = parser.parse_args(argv)
    read = [passage for path in tracked("*.py") for passage in passages(path, (ROOT / path).read_text())]
    num_words = sum(len(passage.text.split()) for passage in read)
    is_fine = True
    for habit in HABITS:
        places = [p for p in read for _ in habit.pattern.findall(p.text)]
        rate = 1e4 * len(places) / max(1, num_words)
        is_fine &= rate <= habit.limit
        print(f"{habit.name}: {rate:.1f} in 10,000 words, at most {habit.limit:g} ({len(places)} in all)")
        if args.list:
            print("".join(f"  {p.path}:{p.line}: {' '.join(p.text.split())[:100]}\n" for p in places), end="")
    long = [place for path in tracked("README.md", "docs/*.md") for place in long_lines(path)]
    print(f"lines over {MAX_LINE} characters in README.md and docs/: {len(long)}")
    print("".join(f"  {place}\n" for place in long), end="")
    return 0 if is_fine and not long else 1


def tracked(*patterns: str) -> list[str]:
    """Paths from the root of files that git tracks, or would add, under these patterns."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for path in listed.splitlines() if (ROOT / path).is_file()]


def passages(path: str, text: str) -> Iterator[Passage]:
    """The docstrings and comments of a Python file."""
    for node in ast.walk(ast.parse(text)):
        # Strings below attributes document them, like docstrings.
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text and isinstance(node.value.value, str):
            yield Passage(path, node.lineno, node.value.value)
    comments = [
        (token.start[0], token.string.lstrip("#: "))
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    ]
    # Lines that follow each other have the same difference between line number and position.
    for _, group in itertools.groupby(enumerate(comments), key=lambda item: item[1][0] - item[0]):
        lines = [comment for _, comment in group]
        yield Passage(path, lines[0][0], "\n".join(text for _, text in lines))


def long_lines(path: str) -> Iterator[str]:
    """Where a Markdown file has lines that are too long, outside of tables."""
    for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), start=1):
        if len(line) > MAX_LINE and not line.lstrip().startswith("|"):
            yield f"{path}:{number}: {len(line)} characters"


if __name__ == "__main__":
    sys.exit(main())
