"""A flow host that draws in one place and makes its loss in another: times, weights, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.draws.waiting_draws import MAX_WAITING
from speedit_plugins.hosts.flow import HostsTime
from speedit_plugins.hosts.separate_draws import SeparateDraws

B = 6


def draws(policy: Any, **options: Any) -> SeparateDraws:
    return SeparateDraws(policy, stream=DrawStream(torch.Generator().manual_seed(0)), **options)


def own() -> Tensor:
    return torch.rand(B)


def losses() -> Tensor:
    return torch.rand(B, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()


def test_a_loss_gets_the_weight_of_the_time_that_was_drawn() -> None:
    seam = draws("min_snr")
    t = seam.times(own)
    index = (t * 1000).long()
    weight = seam.policy.weight.float()[index].double()[:, None]
    loss = losses()
    weighed = seam.weigh(loss)
    assert torch.equal(weighed, weight * loss)
    weighed.sum().backward()
    assert loss.grad is not None
    assert torch.equal(loss.grad, weight.expand_as(loss))
    # An older draw, told by its times; and the weights alone.
    first, _ = seam.times(own), seam.times(own)
    assert torch.equal(seam.weights(B, first), seam.policy.weight.float()[(first * 1000).long()])


def test_a_policy_without_weights_leaves_the_loss_as_it_is_and_a_host_its_clock() -> None:
    seam = draws("logit_normal")
    clock = HostsTime(lambda t: 1 - t / 1000, lambda draw, t: (1000 * (1 - draw.time)).to(t))
    t = seam.times(lambda: torch.full((2000,), 500.0, dtype=torch.float64), clock=clock)
    assert t.dtype == torch.float64
    assert float(torch.logit(1 - t / 1000).std()) == pytest.approx(1, abs=0.06)
    loss = torch.ones(2000)
    assert seam.weigh(loss) is loss


def test_evaluations_are_the_hosts_and_teach_nothing() -> None:
    seam = draws("loss_balanced")
    with torch.no_grad():
        torch.manual_seed(1)
        t = seam.times(own)
        torch.manual_seed(1)
        assert torch.equal(t, own())
        loss = torch.ones(B)
        assert seam.weigh(loss) is loss
    assert seam.policy.num_steps == 0
    before = seam.policy.density.clone()
    for number in range(60):
        t = seam.times(own)
        seam.weigh(10 * t) if number % 2 else (seam.weights(B, learns_by_teach=True), seam.teach(10 * t))
    assert seam.policy.num_steps == 60
    assert not torch.equal(before, seam.policy.density)


def _not_drawn(seam: SeparateDraws) -> None:
    seam.weigh(torch.ones(B))


def _drawn_in_evaluation(seam: SeparateDraws) -> None:
    seam.times(own)
    seam.weigh(torch.ones(B))
    with torch.no_grad():
        seam.times(own)
    seam.weigh(torch.ones(B))


def _reduced(seam: SeparateDraws) -> None:
    seam.times(own)
    seam.weigh(torch.ones(()))


def _never_weighed(seam: SeparateDraws) -> None:
    for _ in range(MAX_WAITING + 1):
        seam.times(own)


def _unseen(seam: SeparateDraws) -> None:
    seam.times(own)


def _unheard(seam: SeparateDraws) -> None:
    seam.times(own)
    seam.weights(B)


@pytest.mark.parametrize(
    ("policy", "act", "message"),
    [
        ("min_snr", _not_drawn, "no times were drawn for it"),
        ("min_snr", _drawn_in_evaluation, "drawn under torch.no_grad"),
        ("min_snr", _reduced, "has no samples, and 6 times were drawn"),
        ("min_snr", _never_weighed, "64 draws passed, and none of their losses came to 'min_snr'"),
        ("auto", _unseen, "needs the data of each batch"),
        ("loss_balanced", _unheard, "which this host does not show"),
    ],
)
def test_what_cannot_be_weighed_is_refused(
    policy: str, act: Callable[[SeparateDraws], None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        act(draws(policy))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("min_snr", "'min_snr' weighs the loss of each sample, and the host has its mean"),
        ("loss_balanced", "'loss_balanced' learns from the loss of each sample, and the host has its mean"),
        ("speed_reference", "draws in pairs, and it thins"),
    ],
)
def test_a_policy_that_needs_more_than_the_host_shows_is_refused(policy: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draws(policy, without_loss="the host has its mean")
    assert draws("logit_normal", without_loss="the host has its mean").times(own).shape == (B,)
