"""A host's own bounds of its timesteps, put around the law of a policy."""

from speedit_plugins.registry import Config, options_of

# The whole of [0, 1].
ALL_TIMES = (0.0, 1.0)


def windowed(policy: str | Config, window: tuple[float, float]) -> str | Config:
    """The config of a policy whose law is cut to a host's bounds, see `transforms.Window`.

    Args:
        policy: see `build_policy`.
        window: lowest and highest time, in [0, 1], 1 is noise.

    Raises:
        ValueError: the config has a window too.

    Example:
        >>> windowed("speed", (0.0, 0.5))
        {'type': 'speed', 'window': [0.0, 0.5]}
        >>> windowed("speed", (0.0, 1.0))
        'speed'
    """
    if window == ALL_TIMES:
        return policy
    options = options_of(policy)
    if "window" in options:
        raise ValueError(
            f"the policy has the window {options['window']}, and the host cuts its timesteps to"
            f" {list(window)}: drop one of them (sd-scripts, musubi-tuner: --min_timestep, --max_timestep)"
        )
    return {**options, "window": list(window)}
