"""Runs the contract on a checkout: `open_sora_checkout.py VERSION CHECKOUT`, one line per check, JSON last.

One process per checkout: all versions share the package name. Stood in for: colossalai, of which the
schedulers use `get_current_device` (here the CPU); and for 1.0 and 1.1 the packages opensora.acceleration,
.datasets and .models, which `import opensora` loads and the schedulers do not use.
"""

import json
import sys
import traceback
from pathlib import Path
from types import ModuleType

import torch
from open_sora_contract import CHECKS, Host
from open_sora_flow_contract import FLOW_CHECKS

STAND_INS = {
    "colossalai": {},
    "colossalai.utils": {"get_current_device": lambda: torch.device("cpu")},
}
UNUSED = ("opensora.acceleration", "opensora.datasets", "opensora.models")


def main(version: str, checkout: str) -> None:
    """Checks one version; the last line maps each check to "ok" or its error."""
    names = dict(STAND_INS)
    if version < "1.2":
        names.update({name: {} for name in UNUSED})
    for name, members in names.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(members)
    sys.path.insert(0, checkout)
    host, results = Host(version, Path(checkout)), {}
    for check in (*CHECKS, *(FLOW_CHECKS if version >= "1.2" else ())):
        name = f"{check.__module__.removeprefix('open_sora_')}.{check.__name__}"
        torch.manual_seed(0)
        try:
            check(host)
            results[name] = "ok"
        except BaseException:
            results[name] = traceback.format_exc()
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
