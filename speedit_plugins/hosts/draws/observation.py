"""What a policy sees of a host's data before it draws.

Dims: B batch.
"""

from typing import NoReturn

from torch import Tensor

from speedit_plugins.policies.policy import TimestepPolicy


def observe(policy: TimestepPolicy, data: Tensor | None) -> None:
    """Shows a policy the data (B, ...) of a training step, if they are known.

    Raises:
        ValueError: they are not, and the policy needs them.
    """
    if data is not None:
        policy.observe(data.detach())
    elif policy.needs_data:
        refuse_missing_data(policy, "they are not known where it draws")


def refuse_missing_data(policy: TimestepPolicy, why: str) -> NoReturn:
    """Raises ValueError: a policy needs the data that it draws for, and this host does not show them."""
    raise ValueError(
        f"{policy.name!r} needs the data of each batch, and {why}: take a policy that does not, such as"
        " 'logit_normal', or 'spectral_flow' with its mean"
    )
