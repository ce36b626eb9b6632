"""Thinned draws of a flow host: density, boundary and weights in closed form."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.hosts.flow import FlowThinning
from speedit_plugins.policies.densities import areas
from speedit_plugins.policies.schedule import NoiseSchedule

N = 200_000


def share(t: Tensor) -> float:
    return float((t > FlowThinning().boundary).double().mean())


def test_boundary_is_the_snr_of_the_paper() -> None:
    t = FlowThinning().boundary
    assert_close(((1 - t) / t) ** 2, 1 / 143)
    assert_close(FlowThinning(snr_boundary=1.0).boundary, 0.5)


@pytest.mark.parametrize(
    ("shift", "before", "after"),
    # Share of uniform draws past b = 0.923 after a shift by s: 1 - b / (s - (s - 1) b).
    [(1.0, 0.0772, 0.0164), (3.0, 0.2005, 0.0477)],
)
def test_mass_past_the_boundary(shift: float, before: float, after: float) -> None:
    def hosts_draw() -> Tensor:
        t = torch.rand(N)
        return shift * t / (1 + (shift - 1) * t)

    # 4 sigma of a binomial frequency, plus the rounding of the numbers above.
    for mass, drawn in ((before, hosts_draw()), (after, FlowThinning().draw(hosts_draw))):
        assert abs(share(drawn) - mass) < 4 * math.sqrt(mass * (1 - mass) / N) + 5e-5


def test_discrete_uniform_follows_the_papers_density() -> None:
    T = 50
    schedule = NoiseSchedule.rectified_flow(T)
    # The host's t is the midpoint of a bin, as in the schedule.
    drawn = FlowThinning(k=3).draw(lambda: torch.randint(0, T, (N,)) + 0.5, time_of=lambda t: t / T)
    counts = torch.bincount(drawn.long(), minlength=T).double() / N
    density = areas.thinned(schedule, k=3).table
    density = density / density.sum()
    assert density[-1] < density[0]
    # 4.5 sigma for each of 50 frequencies at once.
    assert_close(counts, density, rtol=0, atol=4.5 * math.sqrt(float(density.max()) / N))


def test_k_one_takes_the_hosts_first_draw() -> None:
    calls: list[Tensor] = []

    def hosts_draw() -> Tensor:
        calls.append(torch.full((8,), 0.99))
        return calls[-1]

    with pytest.warns(UserWarning, match="nothing is thinned"):
        thinning = FlowThinning(k=1)
    assert thinning.draw(hosts_draw) is calls[0]
    assert len(calls) == 1


def test_kept_values_stay_in_place() -> None:
    batches = iter([torch.tensor([0.1, 0.99, 0.3]), torch.tensor([0.5, 0.6, 0.7])])
    # With a k this large a t past the boundary is refused almost surely. The next batch replaces it.
    drawn = FlowThinning(k=1e9).draw(lambda: next(batches))
    assert drawn.tolist() == torch.tensor([0.1, 0.6, 0.3]).tolist()


def test_a_generator_makes_the_refusals_repeat() -> None:
    t = torch.rand(N)
    # Refused values become 0, so the result shows which they were.
    runs = []
    for _ in range(2):
        batches = iter([t, torch.zeros(N)])
        generator = torch.Generator().manual_seed(4)
        runs.append(FlowThinning().draw(lambda batches=batches: next(batches), generator=generator))
    assert torch.equal(*runs)


def test_draws_keep_the_hosts_dtype() -> None:
    drawn = FlowThinning().draw(lambda: torch.randint(0, 1000, (64,)), time_of=lambda t: t / 1000)
    assert drawn.dtype == torch.int64


def test_weight_follows_the_change_of_the_noise_level() -> None:
    time = torch.tensor([0.0, 0.5, 1.0, 0.25], dtype=torch.float64)
    # dv/dt / 2 at 1/4: (3/16) / (5/8)^2 = 12/25.
    expected = torch.tensor([0.4, 0.6, 0.4, 0.4 + 0.2 * 12 / 25], dtype=torch.float64)
    assert_close(FlowThinning(lam=0.6).weight(time), expected)
    assert_close(FlowThinning().weight(time), torch.ones(4, dtype=torch.float64))
    assert FlowThinning(lam=0.6).weight(time.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0.0}, "k >= 1, got 0.0"),
        ({"k": math.nan}, "k >= 1, got nan"),
        ({"k": math.inf}, "k >= 1, got inf"),
        ({"snr_boundary": -1.0}, "SNR boundary"),
        ({"lam": 5.0}, "got 5.0: they lie between 1 - lam and lam"),
        ({"lam": 0.4}, "lam in"),
    ],
)
def test_values_out_of_range_raise(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowThinning(**options)
