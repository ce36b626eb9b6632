"""SpeeD's boundary on a flow whose draws are shifted, s t / (1 + (s - 1) t).

A shift moves log-SNR by -2 ln s. SpeeD's boundary moves with it, from SNR 1/143 to 1/(143 s^2), so that the
share of the host's draws past it stays the same. A boundary that the config gives stays where it is.
"""

from collections.abc import Mapping
from typing import Any

from speedit_plugins.policies.schedule import CONVERGENCE_SNR
from speedit_plugins.registry import Config, options_of

# Keys that place the boundary. `shift` moves a policy's whole law.
_PLACING = ("snr_boundary", "tau", "shift")


def moves_with_shift(policy: Any) -> bool:
    """Whether a policy thins at SpeeD's own boundary, and not at one that its config gives.

    Args:
        policy: name or config. A policy that is built already has its boundary.

    Example:
        >>> moves_with_shift("speed"), moves_with_shift({"type": "speed", "snr_boundary": 0.01})
        (True, False)
        >>> moves_with_shift({"density": {"type": "thinned", "k": 3.0}, "weighting": "constant"})
        True
    """
    if not isinstance(policy, str | Mapping):
        return False
    options, part = _options_and_density(policy)
    kind = part.get("type", "thinned" if options.get("type") == "speed" else None)
    return kind == "thinned" and not any(key in options or key in part for key in _PLACING)


def with_shifted_boundary(policy: str | Config, shift: float) -> str | Config:
    """The config of a policy for a host whose own law has a fixed shift s > 0.

    Example:
        >>> with_shifted_boundary("speed", 2.0)["snr_boundary"] * 4 * 143
        1.0
        >>> with_shifted_boundary("spectral_flow", 2.0)
        'spectral_flow'
    """
    if shift == 1 or not moves_with_shift(policy):
        return policy
    options, part = _options_and_density(policy)
    boundary = {"snr_boundary": CONVERGENCE_SNR / shift**2}
    if options.get("type") == "speed" and "type" not in part:
        return {**options, **boundary}
    return {**options, "density": {**part, **boundary}}


def _options_and_density(config: str | Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """A policy's config, and that of its density if it has one."""
    options = options_of(config)
    density = options.get("density")
    return options, options_of(density) if isinstance(density, str | Mapping) else {}
