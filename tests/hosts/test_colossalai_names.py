"""What the versions of Open-Sora take of ColossalAI is in the release that this project is tested with."""

import ast
import os
import subprocess
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

pytest.importorskip("colossalai", reason="needs ColossalAI; make install adds it")

from speedit_plugins.trainer.parallel.colossal_setup import import_quietly, set_accelerator_of

# The newest of https://pypi.org/project/colossalai, uploaded on 4 June 2025.
NEWEST = "0.5.0"
# 2.0 has no tag: it is the head of the main branch.
VERSIONS = ("v1.0.0", "v1.1.0", "v1.2.0", "v1.3", "HEAD")
# What its 2.0 calls on ZeRO's optimizer: to save, to average the weights and to log.
OF_OPTIMIZER = ("get_working_to_master_map", "get_grad_norm", "backward", "step", "zero_grad")


def git(*arguments: str) -> str:
    folder = Path(os.environ["SPEEDIT_HOSTS"]) / "hpcaitech+Open-Sora"
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def taken(source: str) -> Iterator[tuple[str, str | None]]:
    """Each module of ColossalAI that a file imports, with each name from it; None for the module itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "colossalai":
            yield from ((str(node.module), alias.name) for alias in node.names)
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.startswith("colossalai"))


def has(module: str, name: str | None) -> bool:
    try:
        return name is None or hasattr(import_module(module), name)
    except ImportError:
        return False


@pytest.mark.hosts
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("tag", VERSIONS)
def test_every_import_of_a_version_is_there(tag: str) -> None:
    if not (Path(os.environ["SPEEDIT_HOSTS"]) / "hpcaitech+Open-Sora").is_dir():
        pytest.skip("no checkout hpcaitech+Open-Sora")
    set_accelerator_of(torch.device("cpu"))
    import_quietly()
    assert version("colossalai") == NEWEST
    files = git("grep", "-l", "colossalai", tag, "--", "*.py").split()
    found = {pair for file in files for pair in taken(git("show", file))}
    # The parts that a training of any version is made of.
    assert {("colossalai.booster", "Booster"), ("colossalai.booster.plugin", "LowLevelZeroPlugin")} <= found
    assert sorted(f"{module}.{name}" for module, name in found if not has(module, name)) == []
    optimizer = import_module("colossalai.zero.low_level").LowLevelZeroOptimizer
    assert [name for name in OF_OPTIMIZER if not hasattr(optimizer, name)] == []
