"""The report of a run of `benchmarks.gpu` in Markdown, of whatever its results file has so far."""

from collections.abc import Sequence

from benchmarks.gpu.lines import BEGIN, DONE, END, FOUND, RUN, Line, outcomes
from benchmarks.gpu.plan import PARTS, Part

# Tests that the report lists as the slowest.
NUM_SLOWEST = 5


def report(lines: Sequence[Line]) -> str:
    """The report: what was run, how each part ended, and a section for each."""
    ended = outcomes(lines)
    begun = [part for part in PARTS if _of(lines, part.name, BEGIN)]
    sections = [f"## {part.title}\n\n{_section(part, lines, ended[part.name])}" for part in begun]
    return "\n\n".join(["# What needs a GPU", _summary(lines, ended), *sections]) + "\n"


def _summary(lines: Sequence[Line], ended: dict[str, str]) -> str:
    wrong = [name for name, outcome in ended.items() if outcome != DONE]
    verdict = f"{len(ended) - len(wrong)} of {len(ended)} parts are done."
    if wrong:
        verdict += f" Not done: {', '.join(wrong)}."
    about = [line for run in lines if run.kind == RUN for line in _about(run)]
    rows = ["| part | outcome | seconds | limit |", "|---|---|---|---|"]
    for name, outcome in ended.items():
        seconds = "".join(f"{line.values['seconds']:g}" for line in _of(lines, name, END))
        limit = "".join(f"{line.values['limit']:g}" for line in _of(lines, name, BEGIN))
        rows.append(f"| {name} | {outcome} | {seconds} | {limit} |")
    return "\n\n".join([verdict, *about, "\n".join(rows)])


def _about(run: Line) -> list[str]:
    values = run.values
    told = [f"{values['began']}, revision {values['revision'] or 'unknown'}:", f"    {values['command']}"]
    if values["is_small"]:
        told.append(
            "**Shapes and counts are tiny: this run checks the command, and its figures mean nothing.**"
        )
    if values["missing"]:
        told.append(f"No checkout: {', '.join(values['missing'])}. What needs them is left out.")
    return told


def _section(part: Part, lines: Sequence[Line], outcome: str) -> str:
    found = _of(lines, part.name, FOUND)
    tests = [line for line in found if "test" in line.values]
    texts = [part.about, *(line.text for line in found if line.text)]
    if tests:
        texts.append(tests_table(tests))
    if outcome != DONE:
        texts.append(f"**{outcome[0].upper()}{outcome[1:]}.**")
        texts += [f"```text\n{line.text}\n```" for line in _of(lines, part.name, END) if line.text]
    return "\n\n".join(texts)


def tests_table(tests: Sequence[Line]) -> str:
    """Counts by outcome, the tests that did not pass with what they said, and the slowest ones."""
    counts: dict[str, int] = {}
    for line in tests:
        counts[line.values["outcome"]] = counts.get(line.values["outcome"], 0) + 1
    texts = [", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) + "."]
    skips: dict[str, list[str]] = {}
    for line in tests:
        name, said = line.values["test"], line.values["said"]
        if line.values["outcome"] == "failed":
            texts.append(f"`{name}` failed:\n\n```text\n{said}\n```")
        elif line.values["outcome"] == "skipped":
            skips.setdefault(said, []).append(name)
    texts += [
        f"Skipped, {said}: {', '.join(f'`{name}`' for name in names)}." for said, names in skips.items()
    ]
    slowest = sorted(tests, key=lambda line: -line.values["seconds"])[:NUM_SLOWEST]
    rows = [f"| `{line.values['test']}` | {line.values['seconds']:.1f} |" for line in slowest]
    texts.append("\n".join(["| slowest tests | seconds |", "|---|---|", *rows]))
    return "\n\n".join(texts)


def _of(lines: Sequence[Line], part: str, kind: str) -> list[Line]:
    return [line for line in lines if line.part == part and line.kind == kind]
