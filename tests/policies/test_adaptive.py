import math

import numpy as np
import pytest
import torch
from policy_cases import teach
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.policies.densities.adaptive import Curriculum, LossSecondMoment
from speedit_plugins.policies.densities.over_time import uniform
from speedit_plugins.policies.distributed import gather_losses

LINEAR = NoiseSchedule.linear()


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Curriculum


def test_clts_goes_from_uniform_to_a_gaussian_not_a_point() -> None:
    policy = build_policy({"type": "clts", "curriculum_steps": 100}, LINEAR)
    assert_close(policy.density, uniform(LINEAR).table)
    t = np.arange(1000)
    gaussian = np.exp(-(((t - 300) / 250) ** 2) / 2)
    gaussian /= gaussian.sum()
    policy.advance(25)
    np.testing.assert_allclose(policy.density.numpy(), 0.75 / 1000 + 0.25 * gaussian, rtol=1e-9)
    for step in (100, 1000):
        policy.advance(step)
        np.testing.assert_allclose(policy.density.numpy(), gaussian, rtol=1e-9)
    # The Gaussian has a standard deviation of 250. Cut off at t = 0, it has about 200.
    mean = (policy.density.numpy() * t).sum()
    assert math.sqrt((policy.density.numpy() * (t - mean) ** 2).sum()) > 150


def test_curriculum_says_when_it_changed() -> None:
    curriculum = Curriculum(LINEAR, curriculum_steps=10)
    assert curriculum.advance(3)
    assert not curriculum.advance(3)
    assert curriculum.advance(10)
    assert not curriculum.advance(11)
    assert not curriculum.update(torch.tensor([1]), torch.tensor([1.0]))


# Learning


def test_loss_second_moment_is_uniform_until_every_timestep_has_its_history() -> None:
    policy = build_policy({"type": "loss_second_moment", "history": 2}, NoiseSchedule.cosine(4))
    flat = torch.full((4,), 0.25, dtype=torch.float64)
    policy.update(torch.tensor([0, 1, 2, 3, 0, 1, 2]), torch.tensor([9.0, 1, 1, 1, 9, 1, 1]))
    assert_close(policy.density, flat)
    assert_close(policy.weight, torch.ones(4, dtype=torch.float64))
    policy.update(torch.tensor([3]), torch.tensor([1.0]))
    expected = 0.999 * float64(9, 1, 1, 1) / 12 + 0.001 / 4
    assert_close(policy.density, expected)


def test_loss_second_moment_is_the_root_of_the_mean_square_of_the_last_losses() -> None:
    policy = build_policy(
        {"type": "loss_second_moment", "history": 2, "uniform_floor": 0.1}, NoiseSchedule.cosine(2)
    )
    # The history keeps two losses, so the first one of t = 0 (100) is gone: sqrt((3^2 + 4^2) / 2) against 2.
    policy.update(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([100.0, 3, 4, 2, 2]))
    root = math.sqrt(12.5)
    expected = 0.9 * float64(root, 2) / (root + 2) + 0.05
    assert_close(policy.density, expected)


def test_learning_weight_makes_the_estimate_unbiased() -> None:
    policy = build_policy("loss_second_moment", NoiseSchedule.cosine(6))
    losses = float64(0.1, 5.0, 2.0, 0.7, 0.3, 1.0)
    teach(policy, losses)
    assert policy.scope == "loss"
    # sum p w L = sum L / T: the expected weighted loss is the mean loss over all timesteps.
    assert_close((policy.density * policy.weight * losses).sum(), losses.mean())
    assert policy.mean_weight == pytest.approx(1.0)


def test_learning_from_reduced_precision_and_graphs() -> None:
    policy = build_policy({"type": "loss_second_moment", "history": 1}, NoiseSchedule.cosine(2))
    loss = torch.tensor([1.0, 3.0], dtype=torch.bfloat16, requires_grad=True)
    policy.update(torch.tensor([0, 1]), loss)
    assert_close(policy.density, 0.999 * float64(0.25, 0.75) + 0.0005)


def test_non_finite_losses_are_not_learned() -> None:
    policy = build_policy({"type": "loss_second_moment", "history": 1}, NoiseSchedule.cosine(2))
    policy.update(torch.tensor([0, 1, 0, 1]), torch.tensor([1.0, 1.0, float("nan"), float("inf")]))
    assert_close(policy.density, float64(0.5, 0.5))


def test_all_zero_losses_leave_a_uniform_density() -> None:
    policy = build_policy("loss_second_moment", NoiseSchedule.cosine(3))
    teach(policy, torch.zeros(3))
    assert_close(policy.density, torch.full((3,), 1 / 3, dtype=torch.float64))


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Curriculum(LINEAR, mean=1.5), r"mean in \[0, 1\], .* got 1.5, 0.25 and 50000"),
        (lambda: Curriculum(LINEAR, std=0.0), "std > 0"),
        (lambda: Curriculum(LINEAR, curriculum_steps=0), "curriculum_steps >= 1"),
        (lambda: LossSecondMoment(LINEAR, history=0), "history >= 1 .* got 0 and 0.001"),
        (lambda: LossSecondMoment(LINEAR, uniform_floor=0.0), r"uniform_floor in \(0, 1\]"),
        (
            lambda: gather_losses(torch.tensor([1, 2]), torch.tensor([1.0])),
            "update needs whole numbers index",
        ),
    ],
)
def test_a_bad_adaptive_density_says_what_is_wrong(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()
