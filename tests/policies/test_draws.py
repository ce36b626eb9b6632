"""What a batch looks like: pairing, strata, jitter, and the distribution of each index.

Dims: T timesteps, B batch, R batches.
"""

import itertools

import numpy as np
import pytest
import torch
from policy_cases import NOT_PAIRED, PAIRED, POLICY_NAMES, SCHEDULES, build, generator, teach
from scipy.stats import chi2
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins import NoiseSchedule, TimestepPolicy, build_policy
from speedit_plugins.policies.densities.density import Density
from speedit_plugins.policies.draws import Iid, Paired
from speedit_plugins.policies.weightings.by_noise_level import constant

LINEAR = NoiseSchedule.linear()


def assert_follows(index: Tensor, density: Tensor) -> None:
    """Chi-square test of independent draws (R,) against a density (T,); each bin expects >= 20 counts."""
    counts = torch.bincount(index, minlength=len(density)).double().numpy()
    expected = density.numpy() * len(index)
    assert counts[density.numpy() == 0].sum() == 0
    observed, pooled = merge_small(counts, expected)
    assert len(pooled) > 1
    statistic = ((observed - pooled) ** 2 / pooled).sum()
    assert statistic < chi2.ppf(1 - 1e-9, len(pooled) - 1)


def merge_small(observed: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Observed and expected counts, with neighbours joined until every bin expects at least 20."""
    bins: list[list[float]] = [[0.0, 0.0]]
    for seen, wanted in zip(observed, expected, strict=True):
        if bins[-1][1] >= 20:
            bins.append([0.0, 0.0])
        bins[-1][0] += seen
        bins[-1][1] += wanted
    if len(bins) > 1 and bins[-1][1] < 20:
        last = bins.pop()
        bins[-1] = [bins[-1][0] + last[0], bins[-1][1] + last[1]]
    merged = np.array(bins)
    return merged[:, 0], merged[:, 1]


def one_position_per_batch(policy: TimestepPolicy, batch_size: int, num_batches: int) -> Tensor:
    """The index at a random position of each of R batches, (R,): independent draws."""
    source = generator(7)
    batches = torch.stack([policy.draw(batch_size, generator=source).index for _ in range(num_batches)])
    position = torch.randint(batch_size, (num_batches, 1), generator=source)
    return batches.gather(1, position)[:, 0]


# Distribution of each index


@pytest.mark.parametrize("name", NOT_PAIRED)
@pytest.mark.parametrize("schedule", ["linear", "cosine of 7", "unevenly respaced", "rectified flow"])
def test_independent_draws_follow_the_density(name: str, schedule: str) -> None:
    policy = build(name, SCHEDULES[schedule]())
    policy.advance(25_000)
    draw = policy.draw(100_000, generator=generator(1))
    assert_follows(draw.index, policy.density)


def test_learned_draws_follow_the_learned_density() -> None:
    policy = build_policy("loss_second_moment", NoiseSchedule.cosine(40))
    teach(policy, torch.linspace(0.1, 3.0, 40))
    assert not torch.allclose(policy.density, torch.full((40,), 1 / 40, dtype=torch.float64))
    assert_follows(policy.draw(100_000, generator=generator(2)).index, policy.density)


@pytest.mark.parametrize("name", PAIRED)
def test_paired_draws_follow_the_mixture_of_their_batch_size(name: str) -> None:
    policy = build(name, LINEAR)
    for batch_size in (1, 5):
        index = one_position_per_batch(policy, batch_size, 8_000)
        assert_follows(index, policy.density_for(batch_size))


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("schedule", ["linear", "cosine of 7", "zero terminal SNR"])
def test_halves_of_a_paired_batch_follow_the_direct_and_the_reflected_law(name: str, schedule: str) -> None:
    policy = build(name, SCHEDULES[schedule]())
    index = policy.draw(100_000, generator=generator(3)).index
    direct = policy.density_for(1)
    assert_follows(index[:50_001], direct)
    # The density is the mean of the direct and the reflected distribution.
    assert_follows(index[50_001:], (2 * policy.density - direct).clamp(min=0))


@pytest.mark.parametrize("name", NOT_PAIRED)
def test_stratified_keeps_the_marginal_of_every_position(name: str) -> None:
    policy = build({"type": name, "stratified": True}, LINEAR)
    source = generator(4)
    batches = torch.stack([policy.draw(4, generator=source).index for _ in range(8_000)])
    for position in (0, 3):
        assert_follows(batches[:, position], policy.density)


# The pairing


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5])
def test_density_for_is_the_exact_mixture_by_enumeration(batch_size: int) -> None:
    schedule = NoiseSchedule.from_alphas_cumprod([0.9, 0.6, 0.3, 0.25, 0.24])
    policy = build_policy("speedit_reference", schedule)
    p = policy.density_for(1).numpy()
    pivot = policy.boundary_index
    assert pivot is not None
    num_direct = min(batch_size, batch_size // 2 + 1)
    marginal = np.zeros(5)
    # For every outcome of the direct draws, write out the batch by the rule of the README.
    for direct in itertools.product(range(5), repeat=num_direct):
        mirrored = [pivot - t if t < pivot else t - pivot for t in direct]
        batch = (list(direct) + [min(t, 4) for t in mirrored])[:batch_size]
        for t in batch:
            marginal[t] += np.prod(p[list(direct)]) / batch_size
    np.testing.assert_allclose(policy.density_for(batch_size).numpy(), marginal, rtol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 9])
def test_the_second_half_mirrors_the_first(batch_size: int) -> None:
    policy = build_policy("speedit_reference", LINEAR)
    index = policy.draw(batch_size, generator=generator(0)).index
    num_direct = min(batch_size, batch_size // 2 + 1)
    direct = index[:num_direct]
    mirrored = torch.where(direct < 642, 642 - direct, direct - 642)
    assert_close(index[num_direct:], mirrored[: batch_size - num_direct], atol=0, rtol=0)


def test_pairing_has_its_own_threshold() -> None:
    pair = Paired(LINEAR, threshold=0.05)
    index, jitter = pair.pair(torch.tensor([0, 1, 2]), torch.tensor([0.1, 0.2, 0.3]))
    assert index.tolist() == [0, 1, LINEAR.flat_index(0.05) + 1]
    assert jitter.tolist() == pytest.approx([0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="paired needs threshold > 0, got -0.1"):
        Paired(LINEAR, threshold=-0.1)


def test_iid_changes_nothing() -> None:
    index, jitter, table = torch.tensor([3, 1]), torch.tensor([0.2, 0.9]), torch.tensor([0.4, 0.6])
    assert Iid().pair(index, jitter) == (index, jitter)
    assert Iid().marginal(table, 7) is table


# Strata


def test_each_stratum_is_hit_exactly_once() -> None:
    policy = build_policy({"type": "uniform", "stratified": True}, NoiseSchedule.rectified_flow(50))
    for seed in range(5):
        assert sorted(policy.draw(50, generator=generator(seed)).index.tolist()) == list(range(50))


@pytest.mark.parametrize("name", ["speedit", "speed", "logit_normal"])
def test_each_stratum_of_any_density_is_hit_exactly_once(name: str) -> None:
    policy = build_policy({"type": name, "stratified": True}, NoiseSchedule.linear(40))
    draw = policy.draw(16, generator=generator(5))
    lower = policy.density.cumsum(0) - policy.density
    jitter = draw.time.double() * 40 - draw.index
    quantile = lower[draw.index] + jitter * policy.density[draw.index]
    assert sorted((quantile * 16).floor().long().tolist()) == list(range(16))
    # The order is random. A sorted batch would give each micro-batch its own noise levels.
    assert draw.index.tolist() != sorted(draw.index.tolist())


@pytest.mark.parametrize("name", ["uniform", "speedit", "logit_normal"])
def test_variance_of_a_stratified_mean_is_its_closed_form(name: str) -> None:
    B, R = 8, 8_000
    schedule = NoiseSchedule.linear(100)
    value = (1 - schedule.alphas_cumprod).numpy()
    stratified = build_policy({"type": name, "stratified": True}, schedule)
    p = stratified.density.numpy()
    edges = np.concatenate([[0.0], p.cumsum()])
    within = 0.0
    for stratum in range(B):
        clipped = np.clip(edges, stratum / B, (stratum + 1) / B)
        mass = np.diff(clipped) * B
        within += (mass * value**2).sum() - (mass * value).sum() ** 2
    source = generator(6)
    means = [
        float(torch.from_numpy(value)[stratified.draw(B, generator=source).index].mean()) for _ in range(R)
    ]
    # The standard error of a sample variance is sqrt(2 / R) = 1.6 %; the tolerance is five of them.
    assert np.var(means) == pytest.approx(within / B**2, rel=0.08)
    independent = ((p * value**2).sum() - (p * value).sum() ** 2) / B
    assert within / B**2 < independent / 4


def test_the_last_quantile_stays_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    highest = 1 - 2**-53

    def extreme(value: float) -> object:
        return lambda *size, **kwargs: torch.full(size, value, dtype=kwargs["dtype"])

    for value in (0.0, highest):
        monkeypatch.setattr(torch, "rand", extreme(value))
        for name in POLICY_NAMES:
            for stratified in (False,) if name in PAIRED else (False, True):
                policy = build({"type": name, "stratified": stratified}, LINEAR)
                draw = policy.draw(256)
                assert ((draw.index >= 0) & (draw.index < 1000)).all()
                assert ((draw.time >= 0) & (draw.time <= 1)).all()


def test_bins_are_half_open_and_empty_ones_are_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = NoiseSchedule.cosine(5)
    table = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    policy = TimestepPolicy(schedule, Density(table), lambda density: constant(schedule))
    # The bins are [0, 1/2) and [1/2, 1): an edge belongs to the bin above it.
    quantile = torch.tensor([0.0, 0.25, 0.5, 1 - 2**-53], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: quantile)
    draw = policy.draw(4)
    assert draw.index.tolist() == [2, 2, 3, 3]
    assert draw.time.tolist() == pytest.approx([2 / 5, 2.5 / 5, 3 / 5, 4 / 5])


# Time


@pytest.mark.parametrize("name", POLICY_NAMES)
@pytest.mark.parametrize("schedule", ["linear", "cosine of 7", "rectified flow", "zero terminal SNR"])
def test_time_lies_in_the_bin_of_its_index(name: str, schedule: str) -> None:
    policy = build(name, SCHEDULES[schedule]())
    T = policy.schedule.num_timesteps
    draw = policy.draw(5_000, generator=generator(8))
    assert (draw.index.dtype, draw.time.dtype, draw.weight.dtype) == (
        torch.int64,
        torch.float32,
        torch.float32,
    )
    # Rounding to float32 is monotone, so the time stays between the rounded edges of its bin.
    lower, upper = (draw.index.double() / T).float(), ((draw.index.double() + 1) / T).float()
    assert ((draw.time >= lower) & (draw.time <= upper)).all()
    assert ((draw.index >= 0) & (draw.index < T)).all()
    assert_close(draw.weight, policy.weight.float()[draw.index], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("name", "stratified"),
    [*((name, False) for name in POLICY_NAMES), *((name, True) for name in NOT_PAIRED)],
)
def test_jitter_is_uniform_inside_the_bin(name: str, stratified: bool) -> None:
    T = 50
    policy = build({"type": name, "stratified": stratified}, NoiseSchedule.linear(T))
    source = generator(9)
    draws = [policy.draw(8, generator=source) for _ in range(4_000)]
    time, index = torch.cat([d.time for d in draws]).double(), torch.cat([d.index for d in draws])
    tenth = ((time * T - index) * 10).floor().clamp(0, 9).long()
    assert_follows(tenth, torch.full((10,), 0.1, dtype=torch.float64))


def test_continuous_times_of_a_flow_follow_the_continuous_law() -> None:
    policy = build_policy("logit_normal", NoiseSchedule.rectified_flow())
    time = policy.draw(200_000, generator=generator(10)).time.double().sort().values
    # Kolmogorov-Smirnov: sup |F_n - F| exceeds 3.27 / sqrt(n) with probability 1e-9. Bins add 0.002 at most.
    distance = (
        torch.special.ndtr(torch.logit(time)) - torch.linspace(0, 1, len(time), dtype=torch.float64)
    ).abs()
    assert float(distance.max()) < 3.27 / 200_000**0.5 + 0.002
