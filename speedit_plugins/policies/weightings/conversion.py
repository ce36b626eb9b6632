"""Weights converted from the loss of one prediction type to that of another.

Dims: T timesteps.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from speedit_plugins.policies.schedule import PREDICTION_TYPES, NoiseSchedule

Function = TypeVar("Function", bound=Callable[..., Tensor])


def defined_on(prediction_type: str) -> Callable[[Function], Function]:
    """Marks a weighting as meant for the loss of one prediction type: `build_policy` always converts it.

    Args:
        prediction_type: what the model predicts whose loss the weights are for, one of `PREDICTION_TYPES`.

    Raises:
        ValueError: an unknown `prediction_type`.

    Example:
        >>> @defined_on("x0")
        ... def squared(schedule):
        ...     return schedule.snr**2
        >>> squared.defined_on
        'x0'
    """
    check_prediction_type(prediction_type)

    def mark(function: Function) -> Function:
        function.defined_on = prediction_type  # type: ignore[attr-defined]  # functions take attributes
        return function

    return mark


def converted(weight: Tensor, schedule: NoiseSchedule, prediction_type: str, *, source: str) -> Tensor:
    """Weight on the loss of a prediction type with the same objective as `weight` on another type's loss.

    With x_t known, an error in one target means an error in each other target. The ratio of the two errors is
    a function of alpha and sigma, and the weight is multiplied by its square. Source: docs/method.md.

    Args:
        weight: weight on the loss of `source`, finite, shape (T,).
        prediction_type: what the model predicts, one of `PREDICTION_TYPES`.
        source: the type whose loss the weight is meant for, one of `PREDICTION_TYPES`.

    Returns:
        Weights, finite, shape (T,).

    Raises:
        ValueError: an unknown type; or a timestep with SNR 0 whose weight on the epsilon loss would be
            infinite. An error in x0 is no error in epsilon there.

    Example:
        >>> schedule = NoiseSchedule.from_alphas_cumprod([0.75, 0.5])  # SNR 3 and 1
        >>> converted(torch.ones(2), schedule, "x0", source="epsilon").round(decimals=6).tolist()
        [3.0, 1.0]
    """
    check_prediction_type(prediction_type)
    check_prediction_type(source)
    if source == prediction_type:
        return weight
    alpha, sigma = schedule.alpha, schedule.sigma
    # Error of each target for an error of 1 in x0. Only that of epsilon is 0 anywhere: where SNR is 0.
    error = {
        "epsilon": alpha / sigma,
        "x0": torch.ones_like(alpha),
        "v": (alpha**2 + sigma**2) / sigma,
        "flow": (alpha + sigma) / sigma,
    }
    # Multiplied before it is divided: at SNR 0 a weight on epsilon becomes 0, however it is converted.
    result = weight * error[source] ** 2 / error[prediction_type] ** 2
    if not torch.isfinite(result).all():
        raise ValueError(
            f"weights defined on the {source} loss are infinite on the {prediction_type} loss at SNR 0:"
            f" wanted a schedule that ends before SNR 0, or a model of x0, v or flow; got {schedule!r}"
        )
    return result


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
    return converted(torch.ones_like(schedule.snr), schedule, kind, source="epsilon")
