"""Compares the Gaussian terms of the variational bound with torch.distributions and scipy."""

import math

import pytest
import torch
from scipy import stats
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from speedit_plugins.trainer.diffusion.gaussian import Gaussian, discretized_log_likelihood, gaussian_kl


def test_kl_equals_torch_distributions() -> None:
    means, logs = torch.randn(
        (2, 2, 3, 4, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    expected = kl_divergence(Normal(means[0], (0.5 * logs[0]).exp()), Normal(means[1], (0.5 * logs[1]).exp()))
    got = gaussian_kl(Gaussian(means[0], logs[0]), Gaussian(means[1], logs[1]))
    assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert (got >= 0).all()


@pytest.mark.parametrize("mean", [0.0, -0.97, 1.3])
@pytest.mark.parametrize("std", [0.003, 0.01, 0.5])
def test_likelihood_of_the_256_levels_sums_to_one(mean: float, std: float) -> None:
    x = (-1 + 2 * torch.arange(256, dtype=torch.float64) / 255).reshape(-1, 1)
    model = Gaussian(torch.full_like(x, mean), torch.full_like(x, 2 * math.log(std)))
    log_mass = discretized_log_likelihood(x, model)
    assert_close(log_mass.exp().sum(), torch.tensor(1.0).double(), rtol=0, atol=1e-12)
    # Independent: differences of the normal CDF between bin edges, midway between levels.
    edges = (-1 + (2 * torch.arange(1, 256, dtype=torch.float64) - 1) / 255).numpy()
    cdf = torch.as_tensor(stats.norm.cdf(edges, mean, std))
    mass = torch.cat([cdf, torch.ones(1).double()]) - torch.cat([torch.zeros(1).double(), cdf])
    assert_close(log_mass.exp()[:, 0], mass, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_likelihood_and_its_gradient_are_accurate_in_both_tails(dtype: torch.dtype) -> None:
    distance = torch.tensor([[0.05], [0.3], [0.9]], dtype=dtype)
    std = 0.01
    means = torch.cat([distance, -distance]).requires_grad_()
    log_variance = torch.full_like(means, 2 * math.log(std))
    got = discretized_log_likelihood(torch.zeros_like(means), Gaussian(means, log_variance))
    near = (distance.double() - 1 / 255) / std
    width = 2 / 255 / std
    # Most of the probability is at the near edge: log Phi(-near) + log(1 - Phi(-near - width) / Phi(-near)).
    upper, lower = (torch.as_tensor(stats.norm.logcdf(-edge.numpy())) for edge in (near, near + width))
    expected = upper + torch.log1p(-torch.exp(lower - upper))
    # The log-probability is quadratic in the edge; float32 rounds the edge by a few 1e-7.
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    assert_close(got.double(), torch.cat([expected, expected]), rtol=tolerance, atol=0)
    got.sum().backward()
    assert torch.isfinite(means.grad).all()
    assert (means.grad.sign() == -means.detach().sign()).all()
