"""The examples in the docstrings of policies, registry and with_policy run, and no public name lacks one."""

import doctest
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from architecture import ROOT

from speedit_plugins import DataSpectrum, NoiseSchedule, TimestepPolicy, build_policy, with_policy
from speedit_plugins.registry import DENSITIES, DRAWS, POLICIES, WEIGHTINGS

FOLDER = ROOT / "speedit_plugins" / "policies"
MODULES = [
    *(f"speedit_plugins.policies.{path.stem}" for path in sorted(FOLDER.glob("[!_]*.py"))),
    "speedit_plugins.hosts.entry",
    "speedit_plugins.registry",
]
CONSTRUCTORS = [name for name, member in vars(NoiseSchedule).items() if isinstance(member, classmethod)]
# What a reader looks up first.
WITH_EXAMPLE: dict[str, Callable[..., Any]] = {
    "build_policy": build_policy,
    "with_policy": with_policy,
    **{f"NoiseSchedule.{name}": getattr(NoiseSchedule, name) for name in CONSTRUCTORS},
    "TimestepPolicy": TimestepPolicy,
    "TimestepPolicy.draw": TimestepPolicy.draw,
    "TimestepPolicy.update": TimestepPolicy.update,
    "TimestepPolicy.advance": TimestepPolicy.advance,
    "DataSpectrum.of": DataSpectrum.of,
    "DataSpectrum.log_snr_at": DataSpectrum.log_snr_at,
    **{
        f"{registry.name} {name}": builder
        for registry in (DENSITIES, DRAWS, POLICIES, WEIGHTINGS)
        for name, builder in registry.module_dict.items()
    },
}


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str) -> None:
    torch.manual_seed(0)
    failed, _ = doctest.testmod(import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_every_public_name_has_an_example() -> None:
    documented = {name: inspect.getdoc(function) or "" for name, function in WITH_EXAMPLE.items()}
    assert [name for name, text in documented.items() if ">>>" not in text] == []
