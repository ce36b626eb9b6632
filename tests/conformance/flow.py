"""Seam B for flow hosts: a transport or a rectified flow draws a continuous t itself.

Dims: B batch.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from conformance import points
from conformance.environments import default_dtype
from conformance.models import SmallModel
from conformance.points import refused
from conformance.seam import POLICY, Batch, Seam, Terms
from speedit_plugins.hosts.attachment import attachment_of
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.entry import launched_seam, with_policy
from speedit_plugins.launch_seams import DeferredPolicy, Launch
from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy

NUM_DRAWS = 20_000
# A policy with a law of its own, which draws in strata.
LAW = {"type": "spectral_flow", "mean": 0.5}


@dataclass(frozen=True)
class FlowSeam(Seam):
    """A flow host's object. It draws t uniformly.

    Args:
        factory: makes the host's object.
        replay: returns the host's loss terms at a given t and noise, from (host, model, x, t, noise).
        time_of: turns the host's t into time in [0, 1], 1 is noise.
        sampler: returns a sample by the host's own sampler, from (host, model).
        shape: of the data, (B, ...).
        sigma_axis: where the model's variance channels are appended; None if it has none.
        shifted: makes the host's object with its shift, which is 2 (for 1024 x 1024 pixels); None if it has
            none.
        shift_option: the host's name for it.
    """

    factory: Callable[[], Any]
    replay: Callable[[Any, Any, Tensor, Tensor, Tensor], Any]
    time_of: Callable[[Tensor], Tensor]
    sampler: Callable[[Any, Any], Tensor]
    shape: tuple[int, ...]
    sigma_axis: int | None = None
    shifted: Callable[[], Any] | None = None
    shift_option: str = "use_timestep_transform"

    # In the launcher's script: the host's training call for data x.
    training_call = "diffusion.training_losses(model, x)"

    def make(self) -> Any:
        return self.factory()

    def call(self, host: Any, model: Any, x: Tensor) -> Any:
        """What the host's training call returns for these data, at a t that it draws."""
        return host.training_losses(model, x)

    def many(self, num: int) -> Tensor:
        """Many small rows of data, zeros."""
        return torch.zeros(num, *self.shape[1:])[..., :1]

    def model(self, host: Any, dtype: torch.dtype = torch.float32) -> SmallModel:
        return SmallModel(self.sigma_axis).to(dtype)

    def train(self, host: Any, model: Any, batch: Batch, t: Tensor | None = None) -> Terms:
        x, noise = batch
        if t is None:
            with same_noise(noise):
                terms = dict(self.call(host, model, x))
        else:
            terms = dict(self.replay(host, model, x, t, noise))
        loss = terms.pop("loss")
        return Terms(loss, mse=loss, reported=terms)

    def drawn(self, host: Any, policy: Any, model: Any) -> TimestepDraw:
        # The host draws itself. Its t is what the model saw, and the weight is that of the policy's bin.
        time, tables = self.time_of(model.seen[-1]).float(), attachment_of(host).policy
        index = (time * len(tables.weight)).long().clamp(max=len(tables.weight) - 1)
        return TimestepDraw(index, time, tables.weight.float()[index], tables.scope)

    def chosen(self, host: Any, model: Any) -> Tensor | None:
        is_thinned = attachment_of(host).policy.is_relative
        return self.drawn(host, POLICY, model).index if is_thinned else None

    def sees(self, host: Any, draw: TimestepDraw, seen: Tensor) -> bool:
        # A discrete t is a row, and its time the middle of that row.
        tolerance = 1e-6 if seen.is_floating_point() else 0.5 / host.num_timesteps + 1e-6
        return bool(((self.time_of(seen).float() - draw.time).abs() <= tolerance).all())

    def hosts_t(self, draw: TimestepDraw, model: Any) -> Tensor:
        t: Tensor = model.seen[-1]
        return t

    def sample(self, host: Any) -> Tensor:
        return self.sampler(host, self.model(host))

    def idle(self) -> Any:
        """As the launcher makes it: the policy is built when the object first trains."""
        host = self.make()
        source = DeferredPolicy(Launch({"type": POLICY}), "host", host)
        return launched_seam(host).attach_later(host, source, DrawStream())

    def is_unused(self, host: Any) -> bool:
        return not attachment_of(host).is_built


def transport(
    factory: Callable[[], Any],
    sampler: Callable[[Any, Any], Tensor],
    *,
    noise_at: float = 0.0,
    clean_at: float = 1.0,
    **shifting: Any,
) -> FlowSeam:
    """The seam of a transport.

    Args:
        factory, sampler: see `FlowSeam`.
        noise_at, clean_at: the host's t at both ends of its training; in SiT t = 0 is noise.
        shifting: `shifted` and `shift_option` of `FlowSeam`.
    """

    def replay(host: Any, model: Any, x: Tensor, t: Tensor, noise: Tensor) -> Any:
        with mock.patch.object(host, "sample", lambda x1, *_, **__: (t, noise, x1)):
            return host.training_losses(model, x)

    def time_of(t: Tensor) -> Tensor:
        return (t - clean_at) / (noise_at - clean_at)

    return FlowSeam(factory, replay, time_of, sampler, (6, 4, 4, 4), **shifting)


def rectified_flow(
    factory: Callable[..., Any], sampler: Callable[[Any, Any], Tensor], *, can_shift: bool = True
) -> FlowSeam:
    """The seam of Open-Sora's rectified flow, whose t runs to `num_timesteps` at noise.

    Args:
        factory: makes it, from further options of the host.
        sampler: see `FlowSeam`.
        can_shift: whether the factory takes `use_timestep_transform`.
    """

    def replay(host: Any, model: Any, x: Tensor, t: Tensor, noise: Tensor) -> Any:
        return host.training_losses(model, x, noise=noise, t=t)

    num_timesteps = factory().num_timesteps

    def time_of(t: Tensor) -> Tensor:
        # A discrete t is a row of the host's table; this is its middle.
        return (t if t.is_floating_point() else t + 0.5) / num_timesteps

    def shifted() -> Any:
        return factory(use_timestep_transform=True)

    shape = (6, 4, 2, 4, 4)
    return FlowSeam(factory, replay, time_of, sampler, shape, 1, shifted if can_shift else None)


def weighed_t_is_seen(seam: FlowSeam) -> None:
    """Point 1. Since the host draws uniformly, what it keeps follows the policy."""
    host = with_policy(seam.make(), POLICY)
    model = seam.model(host)
    with recorded(host) as drawn:
        seam.call(host, model, torch.zeros(seam.shape))
        seam.call(host, model, seam.many(NUM_DRAWS))
    assert len(drawn) == len(model.seen), f"{len(drawn)} draws, the model was called {len(model.seen)} times"
    for draw, seen in zip(drawn, model.seen, strict=True):
        assert torch.equal(seam.time_of(seen).float(), draw.time), "the model saw another t"
    density = attachment_of(host).policy.density.view(10, -1).sum(1)
    shares = torch.bincount((drawn[-1].time * 10).long().clamp(max=9), minlength=10) / NUM_DRAWS
    worst = float(((shares - density).abs() / (density * (1 - density) / NUM_DRAWS).sqrt()).max())
    # 4 sigma of a binomial frequency.
    assert worst < 4, f"the t seen are {worst:.1f} sigma off the policy"


def law_replaces_the_hosts(seam: FlowSeam) -> None:
    """Point 1: a policy with a law of its own draws itself, here in strata, and the model sees its draws."""
    host = with_policy(seam.make(), LAW)
    model, policy = seam.model(host), attachment_of(host).policy
    with recorded(host) as drawn:
        seam.call(host, model, torch.zeros(seam.shape))
        seam.call(host, model, seam.many(NUM_DRAWS))
    for draw, seen in zip(drawn, model.seen, strict=True):
        assert seam.sees(host, draw, seen), "the model saw another t"
        assert torch.equal(draw.weight, policy.weight.float()[draw.index]), "the weight is one of another t"
        strata = (quantile_of(policy, draw.time) * len(draw.time)).long()
        # In large batches the rounding of a float32 time moves a few draws into the next stratum.
        missing = len(draw.time) - len(strata.unique())
        assert missing <= len(draw.time) / 100, f"{missing} of {len(draw.time)} strata have no draw"
    _follows(seam, policy, model.seen[-1])


def strata_span_the_calls(seam: FlowSeam) -> None:
    """Point 1: `num_strata` over two training calls; a policy that thins has no effect to give it."""
    size = seam.shape[0]
    host = with_policy(seam.make(), "logit_normal", num_strata=2 * size)
    with recorded(host) as drawn:
        for _ in range(2):
            seam.call(host, seam.model(host), torch.zeros(seam.shape))
    time = torch.cat([draw.time for draw in drawn])
    strata = (quantile_of(attachment_of(host).policy, time) * 2 * size).long().sort().values
    assert strata.tolist() == list(range(2 * size)), f"strata {strata.tolist()}"
    refused(lambda: with_policy(seam.make(), "speed", num_strata=12), "num_strata has no effect")


def law_replaces_the_shift(seam: FlowSeam) -> None:
    """Point 1: the host's resolution shift is replaced, with one warning; `speed` moves with it."""
    if seam.shifted is None:
        return
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        host = with_policy(seam.shifted(), LAW)
    told = [str(note.message) for note in notes if seam.shift_option in str(note.message)]
    assert len(told) == 1 and "shift=" in told[0], f"warned {told}"  # noqa: PT018 - one fact
    _follows(seam, attachment_of(host).policy, _seen_in_megapixels(seam, host))
    # The host shifts by s = 2, so 1/143 becomes 1/572: t = 1 / (1 + 572^-1/2).
    first, moved = (1 / (1 + snr**-0.5) for snr in (143.0, 572.0))
    for policy, boundary in (("speed", moved), ({"type": "speed", "snr_boundary": 1 / 143}, first)):
        time = seam.time_of(_seen_in_megapixels(seam, with_policy(seam.shifted(), policy)))
        # Of the host's own draws, u is uniform and s u / (1 + (s - 1) u) is past the boundary.
        before = 1 - boundary / (2 - boundary)
        after = before / 5 / (1 - before + before / 5)
        share = float((time > boundary).double().mean())
        # 4 sigma of a binomial frequency, and the bin of 1,000 in which the boundary is.
        margin = 4 * (after * (1 - after) / len(time)) ** 0.5 + 0.001
        assert abs(share - after) < margin, f"{policy}: {share:.4f} past {boundary:.3f}, wanted {after:.4f}"


def quantile_of(policy: TimestepPolicy, time: Tensor) -> Tensor:
    """The probability float64 (B,) that a draw of the policy is below these times."""
    T = len(policy.density)
    position = time.double() * T
    index = position.long().clamp(max=T - 1)
    upper = policy.density.cumsum(0)
    below = upper[index] - policy.density[index]
    return (below + (position - index).clamp(0, 1) * policy.density[index]).clamp(0, 1 - 1e-12)


def _follows(seam: FlowSeam, policy: TimestepPolicy, seen: Tensor) -> None:
    """Raises AssertionError unless the t seen have the policy's share of draws in each tenth of the time.

    One draw comes from each of B strata, so a share is exact up to the strata at both ends of its tenth.
    """
    density = policy.density.view(10, -1).sum(1)
    counts = torch.bincount((seam.time_of(seen).float() * 10).long().clamp(max=9), minlength=10)
    worst = float((counts - density * len(seen)).abs().max())
    # A time on the edge of two tenths may round to either side.
    assert worst <= 2 + 1e-3 * len(seen) / 10, f"a tenth of the time has {worst:.1f} draws too many or few"


def _seen_in_megapixels(seam: FlowSeam, host: Any) -> Tensor:
    """The t of one large batch of images of 1024 x 1024 pixels."""
    if seam.shift_option != "use_timestep_transform":
        transports_model = seam.model(host)
        seam.call(host, transports_model, seam.many(NUM_DRAWS))
        return transports_model.seen[-1]  # type: ignore[no-any-return]  # a list of a stand-in
    sides = {name: torch.full((NUM_DRAWS,), 1024.0) for name in ("height", "width")}
    names = inspect.signature(type(seam.make()).training_losses).parameters
    name = "model_args" if "model_args" in names else "model_kwargs"
    model, x = seam.model(host), torch.zeros(NUM_DRAWS, *seam.shape[1:])[..., :1, :1]
    host.training_losses(model, x, **{name: {**sides, "num_frames": torch.ones(NUM_DRAWS)}})
    seen: Tensor = model.seen[-1]
    return seen


def members_are_the_hosts(seam: FlowSeam) -> None:
    """Point 5."""
    plain = seam.make()
    members = dict(vars(plain))
    host = with_policy(plain, POLICY)
    assert all(vars(host)[name] is value for name, value in members.items()), "attributes changed"


def missing_seam_is_refused(seam: FlowSeam) -> None:
    """Point 6: the host's object without its methods; and policies whose draws are not i.i.d."""
    bare = type("Changed", (), {})()
    vars(bare).update(vars(seam.make()))
    refused(lambda: with_policy(bare, POLICY), "has no seam: looked for a method training_losses")
    refused(lambda: with_policy(seam.make(), "speedit_reference"), "draws in pairs")
    refused(lambda: with_policy(seam.make(), {"type": "speed", "stratified": True}), "draws in strata")


def uniform_is_the_run_without(seam: FlowSeam) -> None:
    """Point 3: `uniform` keeps the host's own draws: the run is the one without the plugin, to the bit."""
    seen, losses = [], []
    for host in (seam.make(), seam.attached("uniform")):
        model = seam.model(host)
        torch.manual_seed(3)
        for _ in range(3):
            losses.append(seam.train(host, model, seam.batch()).loss)
        seen.append(torch.stack(model.seen))
    assert torch.equal(*seen), "other timesteps than without the plugin"
    assert torch.equal(torch.stack(losses[:3]), torch.stack(losses[3:])), "another loss"


def bfloat16_keeps_the_law(seam: FlowSeam) -> None:
    """Point 8: in a bfloat16 default dtype our coin refuses the policy's share of the host's draws."""
    plain = seam.make()
    model = seam.model(plain)
    with default_dtype(torch.bfloat16):
        host = with_policy(plain, POLICY)
        with recorded(host) as drawn:
            seam.call(host, model, seam.many(NUM_DRAWS))
        policy = attachment_of(host).policy
        assert policy.density.dtype == torch.float64, "tables in another dtype"
    late, kept = float((drawn[0].time > 0.95).double().mean()), policy.density[950:].sum()
    assert abs(late - kept) < 0.02, f"{late:.3f} of the draws are past 0.95, wanted {kept:.3f}"


FlowSeam.contract = points.COMMON | {
    1: (
        weighed_t_is_seen,
        law_replaces_the_hosts,
        strata_span_the_calls,
        law_replaces_the_shift,
        points.data_are_observed,
    ),
    3: (*points.COMMON[3], uniform_is_the_run_without),
    5: (*points.COMMON[5], members_are_the_hosts),
    6: (missing_seam_is_refused,),
    8: (points.wrapped_models_train_alike, bfloat16_keeps_the_law),
}


@contextmanager
def recorded(host: Any) -> Iterator[list[TimestepDraw]]:
    """A list to which every draw whose loss is weighed is added."""
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
def same_noise(noise: Tensor) -> Iterator[None]:
    """The host gets this noise for data of its shape. For rows without pixels it draws as always."""
    own = torch.randn_like

    def given(x: Tensor, **kwargs: Any) -> Tensor:
        return noise.clone() if x.shape == noise.shape else own(x, **kwargs)

    with mock.patch.object(torch, "randn_like", given):
        yield
