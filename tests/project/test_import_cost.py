"""The plugin costs its user torch, and nothing heavier."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What torch and numpy themselves load: small pure-Python packages, and compiled parts.
SMALL_DEPENDENCIES = {
    "colorama",
    "cython_runtime",
    "dill",
    "filelock",
    "fsspec",
    "functorch",
    "jinja2",
    "markupsafe",
    "mpmath",
    "networkx",
    "packaging",
    "platformdirs",
    "regex",
    "rich",
    "pygments",
    "markdown_it",
    "mdurl",
    "setuptools",
    "sympy",
    "termcolor",
    "torchgen",
    "tqdm",
    "typing_extensions",
    "yaml",
    "mkl",
    "nvidia",
    "triton",
}
HEAVY = (
    "av",
    "colossalai",
    "datasets",
    "diffusers",
    "einops",
    "matplotlib",
    "mmengine",
    "omegaconf",
    "pandas",
    "PIL",
    "pyarrow",
    "safetensors",
    "scipy",
    "sklearn",
    "tensorboard",
    "transformers",
    "xformers",
)

LIST_MODULES = """
import json, sys
before = set(sys.modules)
{statement}
loaded = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(json.dumps(sorted(loaded - set(sys.stdlib_module_names))))
"""


def loaded_by(statement: str) -> set[str]:
    """Top-level packages outside the standard library that a statement loads in a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", LIST_MODULES.format(statement=statement)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return set(json.loads(run.stdout))


def test_the_method_loads_torch_and_nothing_heavier() -> None:
    loaded = loaded_by("import speedit_plugins; speedit_plugins.build_policy")
    assert {"torch", "numpy", "speedit_plugins"} <= loaded
    assert not loaded & set(HEAVY)
    others = loaded - {"torch", "numpy", "speedit_plugins"} - SMALL_DEPENDENCIES
    # A name with an underscore is a compiled part of one of these packages.
    assert not {name for name in others if not name.startswith("_")}


def test_drawing_loads_nothing_more_that_is_heavy() -> None:
    loaded = loaded_by(
        "from speedit_plugins import NoiseSchedule, build_policy;"
        "build_policy('speedit', NoiseSchedule.linear()).draw(8)"
    )
    assert not loaded & set(HEAVY)


def test_the_bare_import_loads_nothing() -> None:
    assert loaded_by("import speedit_plugins; speedit_plugins.__version__") == {"speedit_plugins"}


def test_exported_names_come_from_their_homes() -> None:
    import speedit_plugins
    from speedit_plugins.policies.build import build_policy
    from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy
    from speedit_plugins.policies.schedule import NoiseSchedule
    from speedit_plugins.policies.spectrum import DataSpectrum

    for home in (DataSpectrum, NoiseSchedule, TimestepDraw, TimestepPolicy, build_policy):
        name = home.__name__
        assert getattr(speedit_plugins, name) is home
        assert name in speedit_plugins.__all__
    with pytest.raises(AttributeError, match="'speedit_plugins' has no attribute 'buildpolicy'"):
        _ = speedit_plugins.buildpolicy
