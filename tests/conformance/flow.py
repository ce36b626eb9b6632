"""The contract of contract.py for flow hosts: a transport, or a rectified flow with a scheduler.

Dims: T timesteps, B batch.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from conformance.contract import FLOAT32_TOLERANCE, FLOAT64_TOLERANCE, POLICY, SmallModel, refused, run_points
from conformance.environments import default_dtype, wrapped_models
from speedit_plugins.hosts.attachment import attachment_of, is_attached
from speedit_plugins.hosts.entry import with_policy, without_policy
from speedit_plugins.hosts.flow import FlowAttachment
from speedit_plugins.hosts.flow_object import attach_flow, policy_for
from speedit_plugins.launch import DeferredPolicy, Launch
from speedit_plugins.policies.policy import TimestepDraw

NUM_DRAWS = 20_000


@dataclass(frozen=True)
class FlowSubject:
    """A flow host's object, and how its trainer and its sampler use it.

    Args:
        make: the host's object as its trainer makes it, drawing t uniformly.
        replay: the host's loss terms (host, model, x, t, noise) at a given t and noise.
        time_of: the host's t as time in [0, 1], 1 is noise.
        sample: a sample (host, model) by the host's own sampler.
        shape: of the data, (B, ...).
        sigma_axis: where the model's variance channels are appended; None where it answers none.
    """

    make: Callable[[], Any]
    replay: Callable[[Any, Any, Tensor, Tensor, Tensor], Any]
    time_of: Callable[[Tensor], Tensor]
    sample: Callable[[Any, Any], Tensor]
    shape: tuple[int, ...]
    sigma_axis: int | None = None


def transport(make: Callable[[], Any], sample: Callable[[Any, Any], Tensor]) -> FlowSubject:
    """A subject for SiT's transport, whose t = 0 is noise."""

    def replay(host: Any, model: Any, x: Tensor, t: Tensor, noise: Tensor) -> Any:
        with mock.patch.object(host, "sample", lambda x1, *_, **__: (t, noise, x1)):
            return host.training_losses(model, x)

    return FlowSubject(make, replay, lambda t: 1 - t, sample, (6, 4, 4, 4))


def rectified_flow(make: Callable[[], Any], sample: Callable[[Any, Any], Tensor]) -> FlowSubject:
    """A subject for Open-Sora's rectified flow, whose t runs to `num_timesteps` at noise."""

    def replay(host: Any, model: Any, x: Tensor, t: Tensor, noise: Tensor) -> Any:
        return host.training_losses(model, x, noise=noise, t=t)

    num_timesteps = make().num_timesteps

    def time_of(t: Tensor) -> Tensor:
        # Discrete t are rows of the host's own: their middle.
        return (t if t.is_floating_point() else t + 0.5) / num_timesteps

    return FlowSubject(make, replay, time_of, sample, (6, 4, 2, 4, 4), 1)


def check(subject: FlowSubject) -> list[int]:
    """The points that hold, in order; AssertionError for the first that does not."""
    return run_points(CONTRACT, subject)


def draws_are_seen(subject: FlowSubject) -> None:
    """Point 1: the model sees the t that is weighed; it follows the policy, as the host draws uniformly."""
    host, model = with_policy(subject.make(), POLICY), _model(subject)
    with _recorded(host) as drawn:
        host.training_losses(model, torch.zeros(subject.shape))
        host.training_losses(model, torch.zeros(NUM_DRAWS, *subject.shape[1:])[..., :1])
    for draw, seen in zip(drawn, model.seen, strict=True):
        assert torch.equal(subject.time_of(seen).float(), draw.time), "the model saw another t"
    density = attachment_of(host).policy.density.view(10, -1).sum(1)
    shares = torch.bincount((drawn[-1].time * 10).long().clamp(max=9), minlength=10) / NUM_DRAWS
    worst = float(((shares - density).abs() / (density * (1 - density) / NUM_DRAWS).sqrt()).max())
    # 4 sigma of a binomial frequency.
    assert worst < 4, f"the t seen are {worst:.1f} sigma off the policy"


def loss_is_weighted(subject: FlowSubject) -> None:
    """Point 2, in float32 and float64."""
    for dtype, tolerance in ((torch.float32, FLOAT32_TOLERANCE), (torch.float64, FLOAT64_TOLERANCE)):
        host, model = with_policy(subject.make(), POLICY), _model(subject).to(dtype)
        x, noise = _batch(subject, dtype)
        with _recorded(host) as drawn, _same_noise(noise):
            ours = host.training_losses(model, x)
        plain = subject.replay(subject.make(), model, x, model.seen[0], noise)
        direct = drawn[0].weight.to(dtype) * plain["loss"]
        error = float(((ours["loss"] - direct).abs() / direct.abs()).max().detach())
        assert error <= tolerance, f"loss misses w * mse by {error:.1e} relative, wanted {tolerance:.0e}"
        for name in plain:
            assert name == "loss" or torch.equal(ours[name], plain[name]), f"{name} changed"


def uniform_is_the_host(subject: FlowSubject) -> None:
    """Point 3: from the same seed, the host's own draw, noise and loss."""
    x, results = _batch(subject)[0], []
    for host in (subject.make(), with_policy(subject.make(), "uniform")):
        torch.manual_seed(3)
        model = _model(subject)
        results.append((host.training_losses(model, x)["loss"], model.seen[0]))
    assert torch.equal(results[0][1], results[1][1]), "another t"
    assert torch.equal(results[0][0], results[1][0]), "another loss"


def sampling_is_untouched(subject: FlowSubject) -> None:
    """Point 4."""
    plain, launched = subject.make(), subject.make()
    attach_flow(launched, FlowAttachment(DeferredPolicy(Launch({"type": POLICY}), "host", launched)))
    samples = []
    for host in (plain, launched):
        torch.manual_seed(3)
        with torch.no_grad():
            samples.append(subject.sample(host, _model(subject)))
    assert torch.isfinite(samples[0]).all(), "the host samples nothing finite here"
    assert torch.equal(*samples), "another sample"
    assert not attachment_of(launched).is_built, "sampling built the policy's tables"


def object_is_the_hosts(subject: FlowSubject) -> None:
    """Point 5."""
    plain = subject.make()
    host_class, members = type(plain), dict(vars(plain))
    host = with_policy(plain, POLICY)
    assert isinstance(host, host_class), f"not a {host_class.__name__}"
    assert all(vars(host)[name] is value for name, value in members.items()), "attributes changed"
    copies = [copy.deepcopy(host)]
    if _pickles(subject.make()):
        copies.append(pickle.loads(pickle.dumps(host)))  # noqa: S301 - made here
    for copied in copies:
        assert is_attached(copied) and isinstance(copied, host_class), "a copy has no policy"  # noqa: PT018 - one fact


def missing_seam_is_refused(subject: FlowSubject) -> None:
    """Point 6: the host's object under a class that has lost its methods; and a policy that draws pairs."""
    bare = type("Changed", (), {})()
    vars(bare).update(vars(subject.make()))
    refused(lambda: with_policy(bare, POLICY), "has no seam: looked for a method training_losses")
    refused(lambda: with_policy(subject.make(), "speedit_reference"), "draws in pairs")
    refused(lambda: with_policy(subject.make(), {"type": "speed", "stratified": True}), "draws in strata")


def wrapping_ends(subject: FlowSubject) -> None:
    """Point 7."""
    host = subject.make()
    host_class, names = type(host), set(vars(host))
    with_policy(host, POLICY)
    refused(lambda: with_policy(host, POLICY), "has a policy already")
    without_policy(host)
    assert type(host) is host_class, f"left as {type(host)}"
    assert set(vars(host)) == names, f"left behind {set(vars(host)) - names}"


def other_models_train_alike(subject: FlowSubject) -> None:
    """Point 8."""
    model, (x, _) = _model(subject), _batch(subject)
    with wrapped_models(model) as others:
        losses = []
        for other in (model, *others.values()):
            torch.manual_seed(3)
            losses.append(with_policy(subject.make(), POLICY).training_losses(other, x)["loss"].detach())
            assert torch.equal(losses[0], losses[-1]), "another loss"
    with default_dtype(torch.bfloat16):
        policy = policy_for(subject.make(), POLICY)
        assert policy.density.dtype == torch.float64, "tables in another dtype"
        host = with_policy(subject.make(), policy)
        rows = torch.zeros(NUM_DRAWS, *subject.shape[1:]).float()[..., :1]
        with _recorded(host) as drawn:
            host.training_losses(model, rows)
    # What the host draws is its own; of that, our coin must refuse the policy's share and no other.
    late = float((drawn[0].time > 0.95).double().mean())
    kept = policy.density[950:].sum()
    assert abs(late - kept) < 0.02, f"{late:.3f} of the draws are past 0.95, wanted {kept:.3f}"


CONTRACT: dict[int, Callable[[FlowSubject], None]] = {
    1: draws_are_seen,
    2: loss_is_weighted,
    3: uniform_is_the_host,
    4: sampling_is_untouched,
    5: object_is_the_hosts,
    6: missing_seam_is_refused,
    7: wrapping_ends,
    8: other_models_train_alike,
}


@contextmanager
def _recorded(host: Any) -> Iterator[list[TimestepDraw]]:
    """The draws whose losses are weighed."""
    drawn: list[TimestepDraw] = []
    attachment = attachment_of(host)
    weighted = attachment.weighted_whole

    def recording(loss: Tensor, draw: TimestepDraw) -> Tensor:
        drawn.append(draw)
        result: Tensor = weighted(loss, draw)
        return result

    with mock.patch.object(attachment, "weighted_whole", recording):
        yield drawn


@contextmanager
def _same_noise(noise: Tensor) -> Iterator[None]:
    """The host draws this noise; for rows without pixels, the host draws as it does."""
    own = torch.randn_like

    def given(x: Tensor, **kwargs: Any) -> Tensor:
        return noise.clone() if x.shape == noise.shape else own(x, **kwargs)

    with mock.patch.object(torch, "randn_like", given):
        yield


def _pickles(host: Any) -> bool:
    try:
        pickle.dumps(host)
    except (pickle.PicklingError, AttributeError):
        return False
    return True


def _model(subject: FlowSubject) -> SmallModel:
    return SmallModel(subject.sigma_axis)


def _batch(subject: FlowSubject, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(subject.shape, generator=generator).to(dtype)
    return x, torch.randn(subject.shape, generator=generator).to(dtype)
