"""Seam B for flow matching: the host's object draws a continuous t inside `training_losses`.

There are two kinds. A transport (SiT, LightningDiT, Lumina-Image 2.0, RAE) has a path, which says whether
noise is at t = 0 or at t = 1. A rectified flow (VideoSys, Open-Sora 1.2 and 1.3) shifts its t by the
resolution. Both draw as they always do. Then the policy's draw replaces
theirs, or theirs are thinned by its density (`FlowAttachment`).

Dims: T timesteps, B batch.
"""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.attachment import (
    attach,
    attachment_of,
    hosts_method,
    refuse_double_weights,
)
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.draws.recomputation import is_training
from speedit_plugins.hosts.flow import FlowAttachment, HostsTime
from speedit_plugins.hosts.objects.flow_policy import FlowTraits, flow_policy
from speedit_plugins.hosts.objects.rectified_flow import rectified_flow_methods, time_sampler_of
from speedit_plugins.hosts.schedules import NUM_BINS, binned
from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.shifted_boundary import moves_with_shift
from speedit_plugins.registry import Config

# What a transport's model predicts, by the host's names for it and for its path. The score times sigma is
# minus the noise, and the host scales its loss by that; the velocity on a cosine path is v times a constant.
_NOISE = ("NOISE", "SCORE")
_VELOCITY = {"ICPlan": "flow", "GVPCPlan": "v"}


def fits(host: Any) -> bool:
    """Whether a host's object is a transport or a rectified flow."""
    return is_transport(host) or is_rectified_flow(host)


def is_transport(host: Any) -> bool:
    """Whether an object has SiT's `path_sampler`, `sample(x1)` and `training_losses(model, x1, ...)`."""
    return hasattr(host, "path_sampler") and callable(getattr(host, "training_losses", None))


def is_rectified_flow(host: Any) -> bool:
    """Whether an object has a `scheduler` that adds noise by itself, as Open-Sora's RFLOW has."""
    inner = getattr(host, "scheduler", None)
    return (
        hasattr(inner, "add_noise") and hasattr(inner, "training_losses") and hasattr(host, "training_losses")
    )


def wrapped(
    host: Any,
    policy: str | Config | TimestepPolicy,
    prediction_type: str | None,
    stream: DrawStream,
) -> Any:
    """The host's object with a policy; see `with_policy`."""
    built = policy_for(host, policy, prediction_type)
    return attach_flow(host, FlowAttachment(built, stream, moves_boundary=moves_with_shift(policy)))


def attach_flow(host: Any, attachment: FlowAttachment) -> Any:
    """Lets an attachment draw and weigh for a transport or a rectified flow. Returns the same object."""
    return attach(host, attachment, transport_methods if is_transport(host) else rectified_flow_methods)


def attach_later(
    host: Any,
    source: Callable[[], TimestepPolicy],
    stream: DrawStream,
    *,
    moves_boundary: bool = False,
) -> Any:
    """Lets a policy that is built when it first draws draw and weigh. Returns the same object."""
    return attach_flow(host, FlowAttachment(source, stream, moves_boundary=moves_boundary))


def policy_for(
    host: Any, policy: str | Config | TimestepPolicy, prediction_type: str | None = None
) -> TimestepPolicy:
    """The policy for the noise levels of a flow host, 0 is clean. One that is built already is checked.

    Args:
        host: a transport or a rectified flow.
        policy: name, config, or a built policy.
        prediction_type: what the model predicts; None asks the host.

    Raises:
        ValueError: the policy is bad, thins the host's own draws in pairs or strata, or has weights and so
            has the host; or the host says that its model predicts something else.

    Warns:
        UserWarning: the policy's law replaces one of the host that is not uniform; or see `warn_if_slow`.
    """

    def schedule() -> NoiseSchedule:
        return binned(_levels_of(host)) if is_transport(host) else NoiseSchedule.rectified_flow(NUM_BINS)

    traits = FlowTraits(host, schedule, flow_prediction_type, tuple(own_laws(host)))
    built = flow_policy(traits, policy, prediction_type)
    own_weights = getattr(getattr(host, "loss_type", None), "name", "NONE")
    if is_transport(host) and own_weights != "NONE" and host.model_type.name in _NOISE:
        refuse_double_weights(
            built, f"this {type(host).__name__} weighs its loss by {own_weights.lower()}", "drop loss_weight"
        )
    return built


def own_laws(host: Any) -> list[str]:
    """What a flow host does to its draws of t beyond drawing them uniformly, with its names for it."""
    sampler = host if is_transport(host) else time_sampler_of(host)
    method = getattr(sampler, "sample_method", "uniform")
    # Lumina-Image 2.0 and RAE name a law of a transport.
    named = {key: str(getattr(host, key, "uniform")) for key in ("snr_type", "time_dist_type")}
    found = {
        "resolution shift (use_timestep_transform)": getattr(sampler, "use_timestep_transform", False),
        f"{method} draw (sample_method)": method != "uniform",
        "logit-normal draw (use_lognorm)": getattr(host, "use_lognorm", False),
        "shift of it (shift_lg)": getattr(host, "shift_lg", False),
        **{f"{law} draw ({key})": law != "uniform" for key, law in named.items()},
        "resolution shift (do_shift)": getattr(host, "do_shift", False),
        "shift for the size of the data (time_dist_shift)": getattr(host, "time_dist_shift", 1.0) != 1.0,
        "partial interval (partitial_train)": getattr(host, "partitial_train", None) is not None,
    }
    return [law for law, is_there in found.items() if is_there]


def flow_prediction_type(host: Any) -> str:
    """What a transport or a rectified flow takes the squared error of: flow, v or epsilon.

    Raises:
        ValueError: a velocity on a path on which no closed form relates it to the noise.
    """
    if not is_transport(host):
        return "flow"
    if host.model_type.name in _NOISE:
        return "epsilon"
    path = type(host.path_sampler).__name__
    if path not in _VELOCITY:
        raise ValueError(
            f"this {type(host).__name__} predicts the velocity on the path {path}, where no closed form"
            " relates it to the noise: pass prediction_type (the launcher: --prediction-type), or take the"
            " Linear or the GVP path"
        )
    return _VELOCITY[path]


def transport_methods(host_class: type) -> Mapping[str, Callable[..., Any]]:
    """`sample` and `training_losses` of a transport, at the t of a policy.

    Without gradients, and when LightningDiT validates on an interval, draw and loss stay the host's.
    """
    sample_signature = _signature(host_class, "sample")
    loss_signature = _signature(host_class, "training_losses")

    def sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = hosts_method(self, host_class, transport_methods, "sample")
        drawn, bound = own(*args, **kwargs), sample_signature.bind(self, *args, **kwargs)
        if bound.arguments.get("sp_timesteps") is not None or not is_training():
            return drawn
        # The host has drawn its t with the noise. We draw again for rows of one pixel: the noise stays.
        x1: Tensor | list[Tensor] = bound.arguments["x1"]
        bound.arguments["x1"] = _rows(x1)

        def hosts_draw() -> Tensor:
            t: Tensor = own(*bound.args[1:], **bound.kwargs)[0]
            return t

        attachment: FlowAttachment = attachment_of(self)
        clock = _clock_of_transport(self, host_class, bound.arguments)
        first, seen = (x1, x1) if isinstance(x1, Tensor) else (x1[0], _of_one_shape(x1))
        t = attachment.draw_from(hosts_draw, clock, t=drawn[0], data=first, observed=seen)
        return (t, *drawn[1:])

    def training_losses(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = hosts_method(self, host_class, transport_methods, "training_losses")
        is_given = loss_signature.bind(self, *args, **kwargs).arguments.get("sp_timesteps") is not None
        if is_given or not is_training():
            return own(*args, **kwargs)
        return attachment_of(self).weighted_call(lambda: own(*args, **kwargs))

    return {"sample": sample, "training_losses": training_losses}


def _signature(host_class: type, method: str) -> inspect.Signature:
    return inspect.signature(getattr(host_class, method))


def _interval(host: Any) -> tuple[float, float]:
    """The interval of t on which a transport trains: it leaves out ends where its loss is not finite."""
    if getattr(host, "train_eps", None) is None or not hasattr(host, "check_interval"):
        return 0.0, 1.0
    start, end = host.check_interval(host.train_eps, host.sample_eps)
    return float(start), float(end)


def _rows(x1: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """Rows of one value for data (B, ...), or for a list of B images of several sizes (Lumina-Image 2.0)."""
    if isinstance(x1, Tensor):
        return x1.new_empty(len(x1), 1)
    return [each.new_empty(1) for each in x1]


def _of_one_shape(images: Sequence[Tensor]) -> Tensor:
    """Those images (B, ...) of a list that have its most frequent shape."""
    shape, _ = Counter(each.shape for each in images).most_common(1)[0]
    return torch.stack([each.detach() for each in images if each.shape == shape])


def _ends(host: Any) -> tuple[float, float]:
    """The t of a transport at which it trains on the cleanest data, and on the noisiest.

    SiT has noise at t = 0, RAE at t = 1.
    """
    start, end = _interval(host)
    alpha = host.path_sampler.compute_alpha_t(torch.tensor([start, end], dtype=torch.float64))[0]
    return (end, start) if alpha[0] < alpha[1] else (start, end)


def _levels_of(host: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function from our time to a transport's scales of signal and noise.

    Our time covers the interval on which the host trains. So the policy's tables are for those noise levels,
    and no draw has to be cut off at an end.
    """
    path, (clean, noise) = host.path_sampler, _ends(host)

    def levels(time: Tensor) -> tuple[Tensor, Tensor]:
        t = clean + time * (noise - clean)
        return path.compute_alpha_t(t)[0], path.compute_sigma_t(t)[0]

    return levels


def _clock_of_transport(host: Any, host_class: type, arguments: Mapping[str, Any]) -> HostsTime:
    """How a transport counts its time, in a call of its `sample` with these arguments."""
    clean, noise = _ends(host)

    def time_of(t: Tensor) -> Tensor:
        return (t - clean) / (noise - clean)

    def t_of(draw: TimestepDraw, t: Tensor) -> Tensor:
        return (clean + draw.time * (noise - clean)).clamp(min(clean, noise), max(clean, noise)).to(t)

    def measured() -> float:
        return _measured_shift(host, host_class, time_of)

    fixed = float(getattr(host, "time_dist_shift", 1.0))
    shift: Callable[[], float] | None = None if fixed == 1 else lambda: fixed
    if getattr(host, "shift_lg", False):
        # LightningDiT moves the mean of logit(t), and its t = 1 is data.
        mean = float(arguments.get("shifted_mu", 0))
        shift = lambda: math.exp(-mean)  # noqa: E731 - one of three, each one expression
    elif getattr(host, "do_shift", False):
        shift = measured
    return HostsTime(time_of, t_of, shift)


def _measured_shift(host: Any, host_class: Any, time_of: Callable[[Tensor], Tensor]) -> float:
    """The shift s > 0 of Lumina-Image 2.0, from draws with it and without. It multiplies their odds by s."""
    odds = []
    for shifts in (True, False):
        copied: Any = object.__new__(host_class)
        vars(copied).update(vars(host), do_shift=shifts)
        with torch.random.fork_rng([]):
            time = time_of(copied.sample(torch.zeros(9, 1, dtype=torch.float64, device="cpu"))[0])
        odds.append(time / (1 - time))
    return float((odds[0] / odds[1]).median())
