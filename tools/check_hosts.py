"""Runs the adapters' contract against the hosts' own checkouts, each in a process of its own.

    python tools/check_hosts.py --hosts DIR [--only NAME ...] [--json OUT]

DIR holds folders owner+name or owner+name@tag; `conformance/hosts.py` lists them, `conformance/contract.py`
says what the points are. Packages of a host that cannot be imported here are replaced by stand-ins, and
named.
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

import conformance.contract as host_contract
import conformance.flow as flow_contract
from conformance.contract import Subject
from conformance.flow import FlowSubject
from conformance.hosts import HOSTS, SAMPLER, Host
from conformance.stand_ins import StandIns

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 300


# As the hosts' scripts do it: the factory by their own import, then one loss and one optimizer step.
SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from conformance.stand_ins import StandIns
sys.meta_path[:] = [StandIns({replaced!r}), *sys.meta_path, StandIns({stand_ins!r})]
import torch
from conformance.contract import SmallModel
{factory_import}
diffusion = {factory_call}
shape, axis, as_tuple = {shape!r}, {axis!r}, {as_tuple!r}
model = SmallModel(axis, answers_tuple=as_tuple)
opt = torch.optim.SGD(model.parameters(), lr=1e-3)
weights = torch.ones(shape[0])
{draw}
loss = diffusion.{method}(model, torch.randn(shape){t})
loss = loss["loss"] if isinstance(loss, dict) else loss
(loss * weights).mean().backward()
opt.step()
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 0 where everything found holds, 1 otherwise, 2 where nothing was found."""
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
    results = [check_in_process(host, args.hosts) for host in present]
    print(table(results))
    for host in (host for host in chosen if host not in present):
        print(f"not found: {host.name} ({host.folder})")
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0 if all(not result["error"] for result in results) else 1


def check_one(host: Host, hosts: Path) -> dict[str, Any]:
    """The contract's points in this process, with the checkout on sys.path."""
    stand_ins, replaced = StandIns(host.stand_ins), StandIns(host.replaced)
    sys.meta_path[:] = [replaced, *sys.meta_path, stand_ins]
    sys.path.insert(0, str(hosts / host.folder))
    result: dict[str, Any] = {"host": host.name, "folder": host.folder, "seam": host.seam}
    further: list[str] = []
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        try:
            if host.check is not None:
                result.update(points=host.check(hosts / host.folder, further), error="")
            if host.subject is not None:
                subject = host.subject()
                contract = flow_contract if isinstance(subject, FlowSubject) else host_contract
                result.update(points=contract.check(subject), error="")
                result["launch"] = launcher_script(host, subject, hosts / host.folder)
        except Exception as error:  # reported as this host's result, and main exits non-zero
            result.update(points=[], error=f"{type(error).__name__}: {error}")
    own = [str(note.message) for note in notes if "weighs its mse already" in str(note.message)]
    used = sorted({*replaced.used, *stand_ins.used, *further})
    result.update(stand_ins=used, warnings=sorted(set(own)))
    return result


def check_in_process(host: Host, hosts: Path) -> dict[str, Any]:
    """`check_one` in a process of its own, then the host's factory through the launcher in another."""
    command = [sys.executable, __file__, "--hosts", str(hosts), "--one", host.name]
    run = _run(command)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no output"])[-1]
        return {"host": host.name, "folder": host.folder, "seam": host.seam, "points": [], "error": last,
                "stand_ins": [], "warnings": [], "launcher": ""}  # fmt: skip
    result: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    result["launcher"] = ""
    if script := result.pop("launch", ""):
        launched = _launch(script, hosts / host.folder)
        lines = [line for line in launched.stderr.splitlines() if line.startswith("speedit: ")]
        result["launcher"] = lines[0] if lines else ""
        if launched.returncode or len(lines) != 1:
            last = (launched.stderr.strip().splitlines() or ["no output"])[-1]
            result["error"] = result["error"] or f"launcher: {last}"
    return result


def launcher_script(host: Host, subject: Subject | FlowSubject, checkout: Path) -> str:
    """A training script of one step that gets its object as the host's script does; '' where it cannot."""
    if not host.factory_call:
        return ""
    statement = host.factory_import
    if host.own_script:
        # All but the part that starts the host's own training.
        text = (checkout / host.own_script).read_text(encoding="utf-8")
        statement = text.split("if __name__ ==")[0]
    draws = {
        "B": "t = torch.zeros(shape[0], dtype=torch.long)",
        "C": f"t, weights = {SAMPLER}.sample(shape[0], 'cpu')",
    }
    is_flow = isinstance(subject, FlowSubject)
    return SCRIPT.format(
        tests=str(ROOT / "tests"),
        stand_ins=host.stand_ins,
        replaced=host.replaced,
        factory_import=statement,
        factory_call=host.factory_call,
        method=subject.method if isinstance(subject, Subject) else "training_losses",
        shape=subject.shape,
        axis=subject.sigma_axis,
        as_tuple=isinstance(subject, Subject) and subject.answers_tuple,
        # A flow draws inside.
        draw="" if is_flow else draws[host.seam],
        t="" if is_flow else ", t",
    )


def table(results: Sequence[dict[str, Any]]) -> str:
    """One line per host."""
    lines = [f"{'host':22} seam  points           launcher  stand-ins"]
    for result in results:
        points = " ".join(map(str, result["points"])) or "-"
        launcher = "ok" if result["launcher"] and not result["error"] else "-"
        stand_ins = ", ".join(result["stand_ins"]) or "none"
        lines.append(f"{result['host']:22} {result['seam']:5} {points:16} {launcher:9} {stand_ins}")
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
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=LIMIT_SECONDS
    )


def _named(name: str) -> Host:
    found = [host for host in HOSTS if host.name == name]
    if not found:
        raise SystemExit(
            f"check_hosts: error: unknown host {name!r}; known: {', '.join(h.name for h in HOSTS)}"
        )
    return found[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="check_hosts", description="The adapters' contract on real checkouts."
    )
    parser.add_argument("--hosts", type=Path, required=True, help="folder of checkouts, owner+name[@tag]")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="hosts by their name in the table"
    )
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
