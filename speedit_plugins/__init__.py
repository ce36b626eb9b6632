"""Timestep policies for diffusion and flow training: which timesteps are drawn, how much each loss counts.

A name below loads torch on first use, so the command line can check a config before torch is imported.
"""

from typing import TYPE_CHECKING, Any

from speedit_plugins.version import __version__

if TYPE_CHECKING:
    from speedit_plugins.hosts.entry import with_policy, without_policy
    from speedit_plugins.hosts.states.policy_state import load_policy_state, policy_of, policy_state
    from speedit_plugins.policies.build import build_policy
    from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy
    from speedit_plugins.policies.schedule import NoiseSchedule
    from speedit_plugins.policies.spectrum import DataSpectrum

__all__ = [
    "DataSpectrum",
    "NoiseSchedule",
    "TimestepDraw",
    "TimestepPolicy",
    "__version__",
    "build_policy",
    "load_policy_state",
    "policy_of",
    "policy_state",
    "with_policy",
    "without_policy",
]

_HOMES = {
    "DataSpectrum": "speedit_plugins.policies.spectrum",
    "NoiseSchedule": "speedit_plugins.policies.schedule",
    "TimestepDraw": "speedit_plugins.policies.policy",
    "TimestepPolicy": "speedit_plugins.policies.policy",
    "build_policy": "speedit_plugins.policies.build",
    "load_policy_state": "speedit_plugins.hosts.states.policy_state",
    "policy_of": "speedit_plugins.hosts.states.policy_state",
    "policy_state": "speedit_plugins.hosts.states.policy_state",
    "with_policy": "speedit_plugins.hosts.entry",
    "without_policy": "speedit_plugins.hosts.entry",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
