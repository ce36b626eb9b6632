"""What was measured for policies of noise prediction on models that predict something else.

Their weights are made for a loss of the noise. `warn_if_slow` is called where a policy meets a model.
"""

import warnings
from collections.abc import Mapping

from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.registry import Config

REPORT = "docs/benchmarks/2026-11-26-convergence.md"
FLOW_REPORT = "docs/benchmarks/2026-11-29-flow.md"
# What to take for each prediction type, with its speed-up on the same data.
TAKE = {"flow": f"'auto' (1.33, {FLOW_REPORT})", "v": "'auto' (spectral: 2.17)", "x0": "'auto' (1.89)"}
# Where a prediction type was measured, if not in `REPORT`.
_REPORTS = {"x0": FLOW_REPORT}
# Speed-up over uniform in the report, digits; None was not measured.
_MEASURED: dict[str, dict[str, str | None]] = {
    "flow": {
        "speedit": "0.80 or less",
        "speedit_reference": "0.80 or less",
        "open_sora_speed": "0.80 or less",
        "speed": "1.11, within chance",
        "speed_reference": None,
        "p2": "0.80 or less",
        "min_snr": "0.85 or less",
    },
    "v": {
        "speedit": "0.88 or less",
        "speedit_reference": None,
        "open_sora_speed": None,
        "speed": None,
        "speed_reference": None,
        "p2": None,
        "min_snr": None,
    },
    # Min-SNR's weights are for any prediction type, and gain here.
    "x0": {
        "speedit": "0.31",
        "speedit_reference": None,
        "open_sora_speed": None,
        "speed": None,
        "speed_reference": None,
        "p2": None,
    },
}
_MODELS = {"flow": "a rectified flow", "v": "a model of v", "x0": "a model of x0"}


def warn_if_slow(
    policy: TimestepPolicy, prediction_type: str | None, config: str | Config | TimestepPolicy | None = None
) -> None:
    """Warns if a policy of noise prediction is attached to a model of flow, v or x0.

    Args:
        policy: that the model is trained with.
        prediction_type: what the model predicts; None is unknown, and never warned about.
        config: of the policy. One that converts the weights (`equivalent_to: epsilon`) is not warned about.

    Warns:
        UserWarning: with the measured speed-up, and the policy to take.

    Example:
        >>> import warnings
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn_if_slow(build_policy("speedit", NoiseSchedule.rectified_flow(1000)), "flow")
        >>> "0.80 or less" in str(caught[0].message)
        True
    """
    measured = _MEASURED.get(prediction_type or "", {})
    is_converted = isinstance(config, Mapping) and config.get("equivalent_to") == "epsilon"
    if policy.name not in measured or is_converted:
        return
    model, figure = _MODELS[str(prediction_type)], measured[policy.name]
    found = f"a speed-up over uniform of {figure}" if figure else "no measured speed-up"
    warnings.warn(
        f"{policy.name!r} was made for a model of noise. On {model} it has {found}"
        f" ({_REPORTS.get(str(prediction_type), REPORT)}); take {TAKE[str(prediction_type)]}",
        stacklevel=4,
    )
