"""Whole, unmodified trainings of hosts with a policy, on the CPU, and what was found about each.

    python tools/host_training.py --hosts DIR [--only NAME ...] [--work DIR] [--json FILE]

It prints a table and the stand-ins, and can write JSON. The checks of a host:

    exit      the scripts ended as they should
    law       the share of each tenth of the t that the model saw is within 4 sigma of the policy's
    loss      the reported loss is w * mse + vb
    uniform   the policy `uniform` gives the run without the plugin to the bit, at the same t and noise
    sampling  the host's sampling script gives the same to the bit with the plugin and without
    resume    the host goes on from its own checkpoint, and the policy from its state
"""

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The contract is part of the test suite.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from whole_trainings import checks
from whole_trainings.checks import Check, Result
from whole_trainings.hosts import dit_3d, guided_diffusion, image_hosts, latte, opendit, pixart, repa
from whole_trainings.open_sora import buckets, version_1_0, version_2
from whole_trainings.trainers import imagen, latent_diffusion, musubi_tuner, sd_scripts

HOSTS = (
    *version_1_0.HOSTS,
    *latte.HOSTS,
    *image_hosts.HOSTS,
    *buckets.HOSTS,
    *version_2.HOSTS,
    *sd_scripts.HOSTS,
    *imagen.HOSTS,
    *latent_diffusion.HOSTS,
    *musubi_tuner.HOSTS,
    *repa.HOSTS,
    *guided_diffusion.HOSTS,
    *opendit.HOSTS,
    *pixart.HOSTS,
    *dit_3d.HOSTS,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns 0 if every host that was run passed all of its checks."""
    parser = argparse.ArgumentParser(prog="host_training", description="Whole trainings, on the CPU.")
    parser.add_argument("--hosts", type=Path, required=True, help="folder of checkouts named owner+name")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="hosts of these names, or whose name contains one of these"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results are written")
    parser.add_argument("--work", type=Path, help="folder for data and results; default: a temporary one")
    args = parser.parse_args(argv)
    hosts = chosen(HOSTS, args.only)
    if not hosts:
        parser.error(f"no host {' '.join(args.only)}; known: {', '.join(host.name for host in HOSTS)}")
    # What is forked from here keeps to one core, and asks no hub.
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        results = [trained(host, args.hosts, (args.work or Path(scratch)).resolve()) for host in hosts]
    print(checks.table(results))
    if args.json is not None:
        args.json.write_text(checks.to_json(results), encoding="utf-8")
    return 0 if all(result.holds for result in results) else 1


def chosen(hosts: Sequence[Any], only: Sequence[str] | None) -> list[Any]:
    """The hosts with one of some names; a text that is no whole name is part of one, whatever the case."""
    if not only:
        return list(hosts)
    names = {host.name.lower() for host in hosts}

    def is_meant(name: str, text: str) -> bool:
        return name == text if text in names else text in name

    return [host for host in hosts if any(is_meant(host.name.lower(), text.lower()) for text in only)]


def trained(host: Any, hosts: Path, work: Path) -> Result:
    """The result of one host, in a folder of its own below `work`."""
    checkout = (hosts / host.folder).resolve()
    if not checkout.is_dir():
        return Result(host.name, {"exit": Check(None, f"no checkout {host.folder}")})
    folder = work / host.name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"host_training: {host.name} in {folder}", file=sys.stderr, flush=True)
    try:
        result: Result = host.train(checkout, folder)
    except Exception as error:
        # One host that cannot be run does not keep the others from running.
        traceback.print_exc()
        return Result(host.name, {"exit": Check(False, f"{type(error).__name__}: {error}")})
    return result


if __name__ == "__main__":
    sys.exit(main())
