"""Checks that the plugin keeps its contract in checkouts of the hosts.

    python tools/check_hosts.py --hosts DIR [--only NAME ...] [--json OUT]

A host is a training framework of somebody else. The contract is what the plugin keeps in every host: eight
points, listed in `tests/conformance/points.py`. DIR has folders named owner+name or owner+name@tag, as listed
in `tests/conformance/hosts.py`. Each host is checked in a process of its own, and its line is printed as soon
as it is done. Packages of a host that cannot be imported here are replaced by stand-ins; the line names them.
"""

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# The contract is part of the test suite.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from conformance import whole_training
from conformance.flow import FlowSeam
from conformance.hosts import HOSTS, SAMPLER, Host
from conformance.points import check
from conformance.stand_ins import StandIns

from speedit_plugins.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
TESTS = str(ROOT / "tests")
# Some of its folders have the names of a host's packages, such as `diffusion`.
sys.path.remove(TESTS)

# Only a host that hangs takes this long: it is ten times what the slowest one takes.
LIMIT_SECONDS = 600
# Training steps of point 9.
NUM_STEPS = 200
HEADER = f"{'host':22} seam  points                     launcher  stand-ins"

# It does what the hosts' scripts do: they import a function, make an object, and take a training step.
SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from conformance.models import SmallModel
from conformance.stand_ins import StandIns
sys.path.remove({tests!r})
sys.meta_path[:] = [StandIns({replaced!r}), *sys.meta_path, StandIns({stand_ins!r})]
import torch
{factory_import}
diffusion = {factory_call}
shape, axis, as_tuple = {shape!r}, {axis!r}, {as_tuple!r}
model = SmallModel(axis, answers_tuple=as_tuple)
opt = torch.optim.SGD(model.parameters(), lr=1e-3)
weights = torch.ones(shape[0])
{draw}
x = torch.randn(shape)
loss = {call}
loss = loss["loss"] if isinstance(loss, dict) else loss
(loss * weights).mean().backward()
opt.step()
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns 0 if the contract holds, 1 if not, 2 if no host was found."""
    args = _parser().parse_args(argv)
    if args.one:
        print(json.dumps(check_one(_named(args.one), args.hosts)))
        return 0
    chosen = [_named(name) for name in args.only] if args.only else HOSTS
    present = [host for host in chosen if (args.hosts / host.folder).is_dir()]
    if not present:
        print(
            f"check_hosts: error: none of {', '.join(h.folder for h in chosen)} in {args.hosts}",
            file=sys.stderr,
        )
        return 2
    print(HEADER, flush=True)
    results: list[dict[str, Any]] = []
    for host in present:
        results.append(check_in_process(host, args.hosts))
        # Without flush, a pipe would get the lines after the last host.
        print(lines_of(results[-1]), flush=True)
        if args.json is not None:
            write_whole(args.json, (json.dumps(results, indent=1) + "\n").encode())
    for host in (host for host in chosen if host not in present):
        print(f"not found: {host.name} ({host.folder})")
    return 0 if all(not result["error"] for result in results) else 1


def check_one(host: Host, hosts: Path) -> dict[str, Any]:
    """The result of a host, checked in this process with the checkout on sys.path."""
    checkout = hosts / host.folder
    stand_ins, replaced = StandIns(host.stand_ins), StandIns(host.replaced)
    sys.meta_path[:] = [replaced, *sys.meta_path, stand_ins]
    sys.path.insert(0, str(checkout))
    whole_training.NUM_STEPS = NUM_STEPS
    result = nothing_known(host)
    further: list[str] = []
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        try:
            for seam in host.seams(checkout, further):
                points = check(seam)
                assert result["points"] in ([], points), f"{type(seam).__name__} keeps other points"
                result["points"] = points
                result["launch"] = launcher_script(host, seam, checkout)
        except Exception as error:  # reported as this host's result, and main exits non-zero
            result.update(points=[], error=f"{type(error).__name__}: {error}")
    own = [str(note.message) for note in notes if "weighs its mse already" in str(note.message)]
    used = sorted({*replaced.used, *stand_ins.used, *further})
    result.update(stand_ins=used, warnings=sorted(set(own)))
    return result


def nothing_known(host: Host) -> dict[str, Any]:
    """The result of a host that is still to be checked."""
    known = {"host": host.name, "folder": host.folder, "seam": host.kind}
    return {**known, "points": [], "error": "", "stand_ins": [], "warnings": [], "launcher": ""}


def check_in_process(host: Host, hosts: Path) -> dict[str, Any]:
    """The result of `check_one` in a process of its own, and of the launcher in another."""
    run = _run([sys.executable, __file__, "--hosts", str(hosts), "--one", host.name])
    if run.returncode:
        return {**nothing_known(host), "error": _last_line(run)}
    result: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    if script := result.pop("launch", ""):
        launched = _launch(script, hosts / host.folder)
        lines = [line for line in launched.stderr.splitlines() if line.startswith("speedit-launch: ")]
        result["launcher"] = lines[0] if lines else ""
        if launched.returncode or len(lines) != 1:
            result["error"] = result["error"] or f"launcher: {_last_line(launched)}"
    return result


def launcher_script(host: Host, seam: Any, checkout: Path) -> str:
    """A training script of one step that makes its object as the host's script does; '' if it has none."""
    if not host.factory_call:
        return ""
    statement = host.factory_import
    if host.own_script:
        # The script without the part that starts the host's own training.
        text = (checkout / host.own_script).read_text(encoding="utf-8")
        statement = text.split("if __name__ ==")[0]
    draws = {
        "B": "t = torch.zeros(shape[0], dtype=torch.long)",
        "C": f"t, weights = {SAMPLER}.sample(shape[0], 'cpu')",
    }
    is_flow = isinstance(seam, FlowSeam)
    return SCRIPT.format(
        tests=TESTS,
        stand_ins=host.stand_ins,
        replaced=host.replaced,
        factory_import=statement,
        factory_call=host.factory_call,
        call=getattr(seam, "training_call", "") or f"diffusion.{seam.method}(model, x, t)",
        shape=seam.shape,
        axis=seam.sigma_axis,
        as_tuple=not is_flow and seam.answers_tuple,
        # A flow draws inside its training call.
        draw="" if is_flow else draws[host.kind],
    )


def lines_of(result: dict[str, Any]) -> str:
    """A host's line of the table; warnings and an error are below it."""
    points = " ".join(map(str, result["points"])) or "-"
    launcher = "ok" if result["launcher"] and not result["error"] else "-"
    stand_ins = ", ".join(result["stand_ins"]) or "none"
    lines = [f"{result['host']:22} {result['seam']:5} {points:26} {launcher:9} {stand_ins}"]
    lines.extend(f"    warns: {warning}" for warning in result["warnings"])
    if result["error"]:
        lines.append(f"    FAILED: {result['error']}")
    return "\n".join(lines)


def _launch(script: str, checkout: Path) -> "subprocess.CompletedProcess[str]":
    with TemporaryDirectory() as folder:
        path = Path(folder) / "train.py"
        path.write_text(script, encoding="utf-8")
        return _run([sys.executable, "-m", "speedit_plugins.launch", str(path)], checkout)


def _run(command: Sequence[str], path: Path | None = None) -> "subprocess.CompletedProcess[str]":
    folders = [str(ROOT), *([str(path)] if path else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    environment.setdefault("OMP_NUM_THREADS", "1")
    try:
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False, timeout=LIMIT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer in {LIMIT_SECONDS} seconds")


def _last_line(run: "subprocess.CompletedProcess[str]") -> str:
    return (run.stderr.strip().splitlines() or ["no output"])[-1]


def _named(name: str) -> Host:
    found = [host for host in HOSTS if host.name == name]
    if not found:
        raise SystemExit(
            f"check_hosts: error: unknown host {name!r}; known: {', '.join(h.name for h in HOSTS)}"
        )
    return found[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="check_hosts", description="Check the plugin's contract on real checkouts of hosts."
    )
    parser.add_argument("--hosts", type=Path, required=True, help="folder of checkouts, owner+name[@tag]")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="hosts by their name in the table"
    )
    parser.add_argument("--json", type=Path, help="where to write the results, anew after each host")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
