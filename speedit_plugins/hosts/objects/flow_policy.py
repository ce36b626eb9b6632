"""The policy of a flow host: built for its noise levels, and checked against what the host does itself.

Dims: T timesteps.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from speedit_plugins.hosts.schedules import refuse_contradiction
from speedit_plugins.policies.advice import warn_if_slow
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import Config


@dataclass(frozen=True)
class FlowTraits:
    """What a policy has to know of a flow host.

    Args:
        host: the host's object.
        schedule: returns its noise levels (T,), 0 is clean.
        prediction_type: turns the object into what its model predicts; raises ValueError if it does not say.
        own_laws: what it does to its draws of t beyond drawing them uniformly, with its names for it.
    """

    host: Any
    schedule: Callable[[], NoiseSchedule]
    prediction_type: Callable[[Any], str]
    own_laws: tuple[str, ...] = ()


def flow_policy(
    traits: FlowTraits, policy: str | Config | TimestepPolicy, prediction_type: str | None
) -> TimestepPolicy:
    """The policy for a flow host. One that is built already is checked.

    Args:
        traits: of the host.
        policy: name, config, or a built policy.
        prediction_type: what the model predicts; None asks the host.

    Raises:
        ValueError: the policy is bad, or the host says that its model predicts something else.

    Warns:
        UserWarning: the policy's law replaces one of the host that is not uniform; or see `warn_if_slow`.
    """
    refuse_contradiction(traits.host, prediction_type, traits.prediction_type)
    built = policy if isinstance(policy, TimestepPolicy) else _built(traits, policy, prediction_type)
    predicted = prediction_type or _stated(traits)
    if predicted is not None:
        warn_if_slow(built, predicted, policy)
    if traits.own_laws and not built.is_relative:
        warnings.warn(
            f"the law of {built.name!r} replaces the {' and the '.join(traits.own_laws)} of this"
            f" {type(traits.host).__name__}; shift=... in the policy's config shifts its law",
            stacklevel=4,
        )
    return built


def _stated(traits: FlowTraits) -> str | None:
    """What the host says that its model predicts; None if it does not say."""
    try:
        return traits.prediction_type(traits.host)
    except ValueError:
        return None


def _built(traits: FlowTraits, policy: str | Config, prediction_type: str | None) -> TimestepPolicy:
    schedule = traits.schedule()
    try:
        predicted = prediction_type or traits.prediction_type(traits.host)
    except ValueError:
        # The host does not say. That matters only for a law or weights that depend on the prediction type.
        first, *others = (build_policy(policy, schedule, each) for each in ("epsilon", "v", "flow"))
        tables = ((each.density, each.weight) for each in others)
        if all(
            torch.equal(first.density, law) and torch.equal(first.weight, weight) for law, weight in tables
        ):
            return first
        raise
    return build_policy(policy, schedule, predicted)
