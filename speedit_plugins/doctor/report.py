"""What `speedit-launch --doctor SCRIPT` says about a script. The script is neither run nor imported."""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from speedit_plugins.doctor.edits import Edits, edits
from speedit_plugins.doctor.host_law import HostLaw, law_of_draw, law_of_host, plot
from speedit_plugins.doctor.known_hosts import KnownHost, Seam, known_host, seams
from speedit_plugins.doctor.places import OBJECTIVES, Place, draws, is_training, losses, primary
from speedit_plugins.doctor.sources import MAX_MODULES, Project, Source, read_project
from speedit_plugins.launch_options import PROGRAM, advice, is_rank_0

SEAM_KNOWN, SEAM_UNKNOWN = 0, 2
# Lines of a kind that are listed, and characters of one.
_MOST, _LINE = 4, 110
_LABEL = 8
# What a loss has a number for. After the mean of a batch, weights can no longer enter.
_LEFT = {"batch": "mean of the batch", "sample": "of each sample", "value": "of each value"}


def report(arguments: Any, config: Mapping[str, Any], words: Sequence[str]) -> int:
    """Writes the report of the launcher's command line to stdout, on rank 0. Returns its exit code.

    Args:
        arguments: as the launcher's parser returns them.
        config: of the policy.
        words: the command line.

    Raises:
        LaunchError: see `examined`.
    """
    own = list(words[: len(words) - len(arguments.arguments) - 1])
    options = [word for word in own if word != "--doctor"]
    code, text = examined(arguments.script, arguments.arguments, config, options)
    if is_rank_0():
        sys.stdout.write(f"{text}\n")
    return code


def examined(
    script: str, arguments: Sequence[str], config: Mapping[str, Any], options: Sequence[str] = ()
) -> tuple[int, str]:
    """The exit code and the report: 0 if a way into the script is known, 2 and lines to write by hand else.

    Args:
        script: its path.
        arguments: the script's own.
        config: of the policy.
        options: the launcher's, as they were typed, without `--doctor`.

    Raises:
        LaunchError: there is no such script, or it is not Python.
    """
    host = known_host(script)
    project = read_project(script, *([host.file] if host is not None and host.file else []))
    found = seams(project, host)
    drawn, lost = _ranked(project, host)
    lines = [
        *_read(project),
        *_who(host, found),
        *_listed("draws", drawn, _unseen(lost)),
        *_listed("loss", lost, "none seen"),
        *_law(_law_of(host, project, drawn, arguments)),
    ]
    if found:
        return SEAM_KNOWN, "\n".join([*lines, *_command(found, [*options, script, *arguments])])
    name = config["type"] if set(config) == {"type"} else dict(config)
    by_hand = edits(project, drawn, lost, repr(name).replace("'", '"'))
    lines += [advice(config)] if by_hand is None else _lines_of(by_hand)
    num_others = sum(place.scope is primary(drawn).scope for place in drawn) - 1 if drawn else 0
    if by_hand is not None and num_others:
        lines.append(f"  note: {num_others} more in the same function, where the script draws by its options")
    return SEAM_UNKNOWN, "\n".join(lines)


def _ranked(project: Project, host: KnownHost | None) -> tuple[list[Place], list[Place]]:
    """Draws and losses, the likely ones first: in the script, in the host's file, where both are."""
    where = [source for source in project.sources if source is project.script or is_training(source)]
    drawn = {source.name: draws(source) for source in where}
    lost = {source.name: losses(source) for source in where}

    def rank(source: Source) -> tuple[bool, bool, bool]:
        is_hosts = host is not None and bool(host.file) and source.name.endswith(host.file)
        return source is not project.script, not is_hosts, not (drawn[source.name] and lost[source.name])

    order = [source.name for source in sorted(where, key=rank)]
    return [p for name in order for p in drawn[name]], [p for name in order for p in lost[name]]


def _read(project: Project) -> Iterator[str]:
    num = len(project.sources) - 1
    modules = f" and {num} module{'s' * (num != 1)} of its project" if num else ""
    yield f"{PROGRAM}: read {project.script.name}{modules}, in {project.root}"
    if project.is_cut:
        yield _line("", f"it has more modules: the first {MAX_MODULES} were read")
    if project.unread:
        yield _line("", f"not readable as Python: {', '.join(project.unread[:3])}")


def _who(host: KnownHost | None, found: list[Seam]) -> Iterator[str]:
    names = [host.name] if host is not None else list(dict.fromkeys(seam.hosts for seam in found))
    yield _line("host", ", ".join(names) or "not known")
    for number, seam in enumerate(found):
        yield f"{'' if number else 'seam':<{_LABEL}}{seam.what}"
        if seam.but:
            yield f"{'':<{_LABEL}}{seam.but}"
    if not found:
        yield _line("seam", "none that is known")


def _unseen(lost: list[Place]) -> str:
    """What to say if no draw is seen."""
    objective = next((place for place in lost if place.kind in OBJECTIVES), None)
    if objective is not None:
        return f"inside of {objective.kind}, which {objective.where} calls without timesteps"
    return "none seen; they may be in a package outside of this project"


def _listed(label: str, places: list[Place], nothing: str) -> Iterator[str]:
    width = max((len(place.where) for place in places[:_MOST]), default=0)
    for number, place in enumerate(places[:_MOST]):
        left = f"({_LEFT[place.left]}) " if place.left in _LEFT else ""
        yield _line("" if number else label, f"{place.where:<{width}}  {left}{place.code}")
    if len(places) > _MOST:
        yield _line("", f"and {len(places) - _MOST} more")
    if not places:
        yield _line(label, nothing)


def _law_of(
    host: KnownHost | None, project: Project, drawn: list[Place], arguments: Sequence[str]
) -> HostLaw | None:
    if host is not None and host.law:
        return law_of_host(host.law, project.script.tree, arguments)
    return law_of_draw(primary(drawn)) if drawn else None


def _law(law: HostLaw | None) -> Iterator[str]:
    if law is None:
        return
    weights = f", with weights of its own ({law.weighting})" if law.weighting not in ("", "constant") else ""
    yield _line("law", f"{law.said}{weights}")
    if law.density is not None:
        yield _line("", "share of the draws; 0 is clean, 1 is noise")
        yield from (_line("", row) for row in plot(law.density))


def _command(found: list[Seam], words: Sequence[str]) -> Iterator[str]:
    pages = [seam.page for seam in found if seam.page]
    if len(pages) < len(found):
        yield f"{'do':<{_LABEL}}nothing to edit: {PROGRAM} {shlex.join(words)}"
    for page in pages:
        yield _line("do", f"see integrations/{page}/README.md")


def _lines_of(by_hand: Edits) -> Iterator[str]:
    yield _line("do", f"by hand, with {by_hand.what}")
    for where, code in by_hand.lines:
        if where:
            yield f"  {where}:"
        yield f"      {code}"
    for note in by_hand.notes:
        yield f"  note: {note}"


def _line(label: str, text: str) -> str:
    line = f"{label:<{_LABEL}}{text}"
    return line if len(line) <= _LINE else f"{line[: _LINE - 3]}..."
