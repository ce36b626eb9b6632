"""Weights converted from the loss of one prediction type to that of another.

Dims: T timesteps.
"""

import torch
from torch import Tensor

from speedit_plugins.policies.schedule import PREDICTION_TYPES, NoiseSchedule


def epsilon_equivalent(weight: Tensor, schedule: NoiseSchedule, prediction_type: str) -> Tensor:
    """Weight on the loss of another prediction type with the same objective as `weight` on the epsilon loss.

    The error of each target is the error of epsilon times a function of alpha and sigma. The weight is
    divided by the square of that function. Source: docs/method.md.

    Args:
        weight: weight on the epsilon loss, shape (T,).
        prediction_type: what the model predicts, one of `PREDICTION_TYPES`.

    Returns:
        Weights, finite, shape (T,).

    Raises:
        ValueError: an unknown `prediction_type`.

    Example:
        >>> schedule = NoiseSchedule.from_alphas_cumprod([0.75, 0.5])  # SNR 3 and 1
        >>> epsilon_equivalent(constant(schedule), schedule, "x0").round(decimals=6).tolist()
        [3.0, 1.0]
    """
    check_prediction_type(prediction_type)
    alpha, sigma = schedule.alpha, schedule.sigma
    factor = {
        "epsilon": torch.ones_like(schedule.snr),
        "x0": schedule.snr,
        "v": (alpha / (alpha**2 + sigma**2)) ** 2,  # SNR / (SNR + 1) if alpha^2 + sigma^2 = 1
        "flow": (alpha / (alpha + sigma)) ** 2,  # (1 - t)^2 on the straight path
    }
    return weight * factor[prediction_type]


def check_prediction_type(prediction_type: str) -> None:
    """Nothing, if `prediction_type` is one of `PREDICTION_TYPES`.

    Raises:
        ValueError: an unknown type; the message lists the known ones.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type needs one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}"
        )


def usual_prediction_type(schedule: NoiseSchedule) -> str:
    """What models usually predict on this schedule: epsilon, or flow on the straight path.

    Raises:
        ValueError: the schedule is neither variance-preserving nor a rectified flow.

    Example:
        >>> usual_prediction_type(NoiseSchedule.rectified_flow(10))
        'flow'
    """
    if schedule.is_variance_preserving:
        return "epsilon"
    if torch.allclose(schedule.alpha + schedule.sigma, torch.ones_like(schedule.alpha)):
        return "flow"
    raise ValueError(
        f"errors and weights of epsilon need prediction_type on {schedule!r}, which is neither"
        f" variance-preserving nor a rectified flow: wanted one of {', '.join(PREDICTION_TYPES)}"
    )


def error_of_epsilon(schedule: NoiseSchedule, prediction_type: str | None) -> Tensor:
    """Factor (T,) from the squared error of a model's prediction to that of the epsilon it implies.

    Args:
        prediction_type: what the model predicts. None is the usual type of the schedule.

    Raises:
        ValueError: an unknown `prediction_type`, or none on a schedule without a usual one.

    Example:
        >>> schedule = NoiseSchedule.from_alphas_cumprod([0.75, 0.5])  # SNR 3 and 1
        >>> error_of_epsilon(schedule, "x0").round(decimals=6).tolist()
        [3.0, 1.0]
    """
    kind = usual_prediction_type(schedule) if prediction_type is None else prediction_type
    # The loss of epsilon with weight 1 is the loss of the other type with this weight.
    return epsilon_equivalent(torch.ones_like(schedule.snr), schedule, kind)
