"""The policy of a host's object, and its state for a checkpoint of the host; the same for every seam.

checkpoint["speedit"] = policy_state(diffusion)  # where the host saves
load_policy_state(diffusion, checkpoint["speedit"])  # where it resumes
"""

from collections.abc import Mapping
from typing import Any

from speedit_plugins.hosts.attachment import PolicyHolder, attachment_of, is_attached
from speedit_plugins.policies.policy import TimestepPolicy

_POLICIES = "policies"


def policy_of(host: Any, number: int = 1) -> TimestepPolicy:
    """The policy that draws and weighs for a host's object.

    Args:
        host: what `with_policy`, `schedule_sampler`, `ScriptPolicy` or `build_policy` returned, or an object
            of a class that a host's config names (Open-Sora, mmagic, latent-diffusion).
        number: of the unet, for an Imagen with several; counted from 1.

    Raises:
        ValueError: the object has no policy, or not so many.

    Example:
        >>> import torch
        >>> from speedit_plugins import policy_of, policy_state, with_policy
        >>> class Diffusion:  # a small one; DiT's is create_diffusion("")
        ...     alphas_cumprod = torch.linspace(0.999, 0.001, 1000)
        ...     model_mean_type = "epsilon"
        ...     def training_losses(self, model, x_start, t):
        ...         return {"mse": x_start, "loss": x_start}
        >>> diffusion = with_policy(Diffusion(), "clts")
        >>> policy_of(diffusion).name, policy_state(diffusion)["policies"][0]["num_steps"]
        ('clts', 0)
    """
    parts = _parts(host)
    if not 1 <= number <= len(parts):
        raise ValueError(f"{type(host).__name__} has {len(parts)} policies, wanted number {number}")
    part = parts[number - 1]
    policy = part if isinstance(part, TimestepPolicy) else getattr(part, "policy", None)
    if not isinstance(policy, TimestepPolicy):
        raise ValueError(f"{type(host).__name__} thins its own draws, and has no policy")
    return policy


def policy_state(host: Any) -> dict[str, Any]:
    """The state of an object's policies, as plain values and tensors: what a resumed training needs.

    Args:
        host: see `policy_of`.

    Raises:
        ValueError: the object has no policy.
    """
    return {_POLICIES: [part.state_dict() for part in _parts(host)]}


def load_policy_state(host: Any, state: Mapping[str, Any]) -> None:
    """Restores what `policy_state` returned, in an object with the same policy.

    Args:
        host: see `policy_of`.
        state: of the same policies.

    Raises:
        ValueError: the object has no policy, or the state is of other policies. Nothing is restored then.
    """
    parts = _parts(host)
    states = _states(state)
    if len(states) != len(parts):
        raise ValueError(
            f"{type(host).__name__} has {len(parts)} policies, got the state of {len(states)}: a state is"
            " what policy_state returned for an object like it"
        )
    before = [part.state_dict() for part in parts]
    try:
        for part, each in zip(parts, states, strict=True):
            part.load_state_dict(each)
    except Exception:
        for part, each in zip(parts, before, strict=True):
            part.load_state_dict(each)
        raise


def _states(state: Any) -> list[Mapping[str, Any]]:
    if isinstance(state, Mapping) and _POLICIES in state:
        return list(state[_POLICIES])
    # latent-diffusion's checkpoints had this form before.
    if isinstance(state, Mapping) and state.keys() == {"policy", "num_calls"}:
        return [{**state["policy"], "num_steps": state["num_calls"]}]
    got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
    raise ValueError(f"a policy's state needs the key {_POLICIES!r}, got {got}")


def _parts(host: Any) -> list[Any]:
    """What has a policy and its state: for an object the attachments, else the sampler or script itself."""
    if is_attached(host):
        attachment = attachment_of(host)
        return list(getattr(attachment, "parts", None) or [attachment])
    if isinstance(host, PolicyHolder | TimestepPolicy):
        return [host]
    raise ValueError(f"{type(host).__module__}.{type(host).__qualname__} has no policy: see with_policy")
