"""Runs the adapters' contract against the hosts' own checkouts, each in a process of its own.

    python tools/check_hosts.py --hosts DIR [--only NAME ...] [--json OUT]

DIR holds folders owner+name or owner+name@tag. `tools/host_contract.py` says what the points are. Packages of
a host that cannot be imported here are replaced by stand-ins, and named.
"""

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import host_contract
import numpy as np
from host_contract import Subject
from host_stand_ins import StandIns

ROOT = Path(__file__).resolve().parents[1]
IMAGES = (6, 4, 4, 4)
LIMIT_SECONDS = 300


@dataclass(frozen=True)
class Host:
    """A checkout that is known.

    Args:
        name: of the host and its version, for the table and --only.
        folder: in DIR.
        seam: B or C.
        subject: makes the contract's subject; runs with the checkout on sys.path.
        factory_import: the statement by which the host's script gets its factory, empty where it makes its
            own class; `factory_call` then makes an object for the launcher's check.
        factory_call: an expression over what that statement imported.
        stand_ins: packages that may be replaced where they cannot be imported.
        replaced: packages that are replaced although they are here: the host needs another version, or they
            are its CUDA kernels.
    """

    name: str
    folder: str
    seam: str
    subject: Callable[[], Subject]
    factory_import: str = ""
    factory_call: str = ""
    stand_ins: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()


def factory(module: str, function: str = "create_diffusion", **subject: Any) -> Callable[[], Subject]:
    """A subject whose object comes from a function of the host that takes the respacing."""

    def made() -> Subject:
        make = getattr(import_module(module), function)
        return Subject(make, **{"shape": IMAGES, **subject})

    return made


def guided_diffusion() -> Subject:
    """The object of guided-diffusion's training scripts, with a learned variance."""
    script_util = import_module("guided_diffusion.script_util")
    resample = import_module("guided_diffusion.resample")

    def make(respacing: str) -> Any:
        return script_util.create_gaussian_diffusion(learn_sigma=True, timestep_respacing=respacing)

    return Subject(make, IMAGES, host_class=resample.ScheduleSampler)


def masked_diffusion() -> Subject:
    """The object of MDT's training script: two losses share one t."""
    resample = import_module("masked_diffusion.resample")
    make = import_module("masked_diffusion").create_diffusion
    return Subject(make, IMAGES, host_class=resample.ScheduleSampler, num_losses=2)


def point_clouds() -> Subject:
    """DiT-3D's class, which stands in its training script."""
    script = import_module("train")

    def make(respacing: str) -> Any:
        # It cannot be respaced: a short schedule keeps sampling short.
        num_timesteps = int(respacing or 1000)
        return script.GaussianDiffusion(
            np.linspace(1e-4, min(0.02 * 1000 / num_timesteps, 0.5), num_timesteps),
            "mse",
            "eps",
            "fixedsmall",
        )

    return Subject(make, (6, 3, 8), None, "p_losses", sampling=("p_sample_loop",))


CREATE = 'create_diffusion(timestep_respacing="")'
SAMPLER = 'create_named_schedule_sampler("uniform", diffusion)'
HOSTS = (
    Host(
        "DiT",
        "facebookresearch+DiT",
        "B",
        factory("diffusion"),
        "from diffusion import create_diffusion",
        CREATE,
    ),
    Host(
        "fast-DiT",
        "chuanyangjin+fast-DiT",
        "B",
        factory("diffusion"),
        "from diffusion import create_diffusion",
        CREATE,
    ),
    Host(
        "Latte",
        "Vchitect+Latte",
        "B",
        factory("diffusion", shape=(6, 2, 4, 4, 4), sigma_axis=2),
        "from diffusion import create_diffusion",
        CREATE,
    ),
    Host(
        "OpenDiT 0.0.1",
        "NUS-HPC-AI-Lab+VideoSys@v0.0.1",
        "B",
        factory("opendit.models.diffusion"),
        "from opendit.models.diffusion import create_diffusion",
        CREATE,
        ("timm", "torchvision", "transformers"),
    ),
    Host(
        "OpenDiT 1.0.0",
        "NUS-HPC-AI-Lab+VideoSys@v1.0.0",
        "B",
        factory("opendit.diffusion"),
        "from opendit.diffusion import create_diffusion",
        CREATE,
    ),
    Host(
        "PixArt-alpha",
        "PixArt-alpha+PixArt-alpha",
        "B",
        factory("diffusion", "IDDPM", sampling=("p_sample_loop", "ddim_sample_loop")),
        "from diffusion import IDDPM",
        'IDDPM("1000", learn_sigma=True, pred_sigma=True, snr=False)',
        ("timm", "torchvision", "xformers", "mmcv"),
    ),
    Host(
        "Open-Sora-Plan 1.0.0",
        "PKU-YuanGroup+Open-Sora-Plan@v1.0.0",
        "B",
        factory(
            "opensora.models.diffusion.diffusion",
            "create_diffusion_T",
            shape=(6, 4, 2, 4, 4),
            answers_tuple=True,
        ),
        "from opensora.models.diffusion.diffusion import create_diffusion_T as create_diffusion",
        CREATE,
        ("timm", "torchvision", "xformers", "decord"),
        ("diffusers", "transformers"),
    ),
    Host(
        "DiT-3D",
        "DiT-3D+DiT-3D",
        "B",
        point_clouds,
        stand_ins=("tensorboardX", "trimesh", "timm", "open3d", "plyfile", "utils_vit"),
        replaced=("modules",),
    ),
    Host(
        "guided-diffusion",
        "openai+guided-diffusion",
        "C",
        guided_diffusion,
        "from guided_diffusion.script_util import create_gaussian_diffusion\n"
        "from guided_diffusion.resample import create_named_schedule_sampler",
        "create_gaussian_diffusion(learn_sigma=True)",
        ("blobfile", "mpi4py"),
    ),
    Host(
        "MDT",
        "sail-sg+MDT",
        "C",
        masked_diffusion,
        "from masked_diffusion import create_diffusion\n"
        "from masked_diffusion.resample import create_named_schedule_sampler",
        CREATE,
    ),
)

# As the hosts' scripts do it: the factory by their own import, then one loss and one optimizer step.
SCRIPT = """
import sys
sys.path.insert(0, {tools!r})
from host_stand_ins import StandIns
sys.meta_path[:] = [StandIns({replaced!r}), *sys.meta_path, StandIns({stand_ins!r})]
import torch
from host_contract import SmallModel
{factory_import}
diffusion = {factory_call}
shape, axis, as_tuple = {shape!r}, {axis!r}, {as_tuple!r}
model = SmallModel(axis, answers_tuple=as_tuple)
opt = torch.optim.SGD(model.parameters(), lr=1e-3)
{draw}
loss = (diffusion.training_losses(model, torch.randn(shape), t)["loss"] * weights).mean()
loss.backward()
opt.step()
"""
DRAWS = {
    "B": "t, weights = torch.zeros(shape[0], dtype=torch.long), torch.ones(shape[0])",
    "C": f"t, weights = {SAMPLER}.sample(shape[0], 'cpu')",
}


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
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        try:
            subject = host.subject()
            result.update(points=host_contract.check(subject), error="")
            result["launch"] = launcher_script(host, subject)
        except Exception as error:  # reported as this host's result, and main exits non-zero
            result.update(points=[], error=f"{type(error).__name__}: {error}")
    own = [str(note.message) for note in notes if "weighs its mse already" in str(note.message)]
    result.update(stand_ins=replaced.used + stand_ins.used, warnings=sorted(set(own)))
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
        launched = _launch(script, host, hosts)
        lines = [line for line in launched.stderr.splitlines() if line.startswith("speedit: ")]
        result["launcher"] = lines[0] if lines else ""
        if launched.returncode or len(lines) != 1:
            last = (launched.stderr.strip().splitlines() or ["no output"])[-1]
            result["error"] = result["error"] or f"launcher: {last}"
    return result


def launcher_script(host: Host, subject: Subject) -> str:
    """A training script of one step that gets its factory as the host's does; '' where it has none."""
    if not host.factory_import:
        return ""
    return SCRIPT.format(
        tools=str(Path(__file__).parent),
        stand_ins=host.stand_ins,
        replaced=host.replaced,
        factory_import=host.factory_import,
        factory_call=host.factory_call,
        shape=subject.shape,
        axis=subject.sigma_axis,
        as_tuple=subject.answers_tuple,
        draw=DRAWS[host.seam],
    )


def table(results: Sequence[dict[str, Any]]) -> str:
    """One line per host."""
    lines = [f"{'host':22} seam  points         launcher  stand-ins"]
    for result in results:
        points = " ".join(map(str, result["points"])) or "-"
        launcher = "ok" if result["launcher"] and not result["error"] else "-"
        stand_ins = ", ".join(result["stand_ins"]) or "none"
        lines.append(f"{result['host']:22} {result['seam']:5} {points:14} {launcher:9} {stand_ins}")
        lines.extend(f"    warns: {warning}" for warning in result["warnings"])
        if result["error"]:
            lines.append(f"    FAILED: {result['error']}")
    return "\n".join(lines)


def _launch(script: str, host: Host, hosts: Path) -> "subprocess.CompletedProcess[str]":
    with TemporaryDirectory() as folder:
        path = Path(folder) / "train.py"
        head = (
            f"import sys\nsys.path.insert(0, {str(ROOT / 'tools')!r})\nfrom host_stand_ins import StandIns\n"
        )
        path.write_text(
            f"{head}sys.meta_path.append(StandIns({host.stand_ins!r}))\n{script}", encoding="utf-8"
        )
        return _run([sys.executable, "-m", "speedit_plugins.launch", str(path)], hosts / host.folder)


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
