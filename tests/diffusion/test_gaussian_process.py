"""Compares the diffusion process with closed forms and independent derivations."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from speedit_plugins.policies.policy import TimestepDraw
from speedit_plugins.policies.schedule import PREDICTION_TYPES, NoiseSchedule
from speedit_plugins.registry import PROCESSES, build
from speedit_plugins.trainer.diffusion.gaussian import ProcessTables
from speedit_plugins.trainer.diffusion.gaussian_process import GaussianProcess, Noised, gaussian_process
from speedit_plugins.trainer.diffusion.respacing import space_timesteps

IMAGE, VIDEO = (3, 2, 4, 4), (3, 2, 5, 4, 4)
SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "cosine": NoiseSchedule.cosine(100),
    "respaced": NoiseSchedule.linear().respaced([0, 3, 400, 640, 999]),
    "zero_snr": NoiseSchedule.from_alphas_cumprod([0.99, 0.7, 0.3, 0.0]),
    "flow": NoiseSchedule.rectified_flow(50),
}


def randn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(index: list[int], weight: float = 1.0, scope: str = "mse") -> TimestepDraw:
    rows = torch.tensor(index)
    return TimestepDraw(rows, rows / 1000, torch.full((len(index),), weight), scope)


def column(table: Tensor, index: Tensor, ndim: int = 4) -> Tensor:
    return table[index].reshape(-1, *[1] * (ndim - 1))


def posterior_by_bayes(
    schedule: NoiseSchedule, x_0: Tensor, x_t: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_s | x_t, x_0), the product of two Gaussians in x_s; needs index > 0."""
    alpha, sigma, before = schedule.alpha, schedule.sigma, index - 1
    scale = column(alpha, index, x_t.ndim) / column(alpha, before, x_t.ndim)
    prior_variance = column(sigma, before, x_t.ndim) ** 2
    added = column(sigma, index, x_t.ndim) ** 2 - scale**2 * prior_variance
    precision = 1 / prior_variance + scale**2 / added
    prior_mean = column(alpha, before, x_t.ndim) * x_0
    return (prior_mean / prior_variance + scale * x_t / added) / precision, 1 / precision


@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_follows_from_bayes_rule(name: str, shape: tuple[int, ...]) -> None:
    schedule = SCHEDULES[name]
    process = GaussianProcess(schedule, prediction_type="v")
    x_0, x_t = randn(shape, 0), randn(shape, 1)
    index = torch.tensor([1, 2, schedule.num_timesteps - 1])
    mean, variance = posterior_by_bayes(schedule, x_0, x_t, index)
    posterior = process.posterior(x_0, x_t, index)
    assert_close(posterior.mean, mean, rtol=1e-9, atol=1e-12)
    assert_close(posterior.log_variance.exp(), variance, rtol=1e-9, atol=0)
    table = ProcessTables.of(schedule).posterior_variance
    assert_close(column(table, index, len(shape)), variance, rtol=1e-9, atol=0)


def test_the_posterior_at_index_0_is_the_data_without_variance() -> None:
    process = GaussianProcess(SCHEDULES["linear"])
    tables = process.tables(torch.device("cpu"))
    assert tables.posterior_variance[0] == 0
    # Its logarithm would be -inf; the table has the value of index 1.
    assert tables.posterior_log_variance[0] == tables.posterior_log_variance[1]
    x_0, x_t = randn(IMAGE, 0), randn(IMAGE, 1)
    # The coefficients of x_0 and x_t are beta / sigma^2 = 1 and 0, up to the rounding of 1 - alpha-bar.
    assert_close(process.posterior(x_0, x_t, torch.zeros(3, dtype=torch.int64)).mean, x_0, rtol=1e-11, atol=0)


@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_target_determines_data_and_noise(
    name: str, prediction_type: str, shape: tuple[int, ...]
) -> None:
    schedule = SCHEDULES[name]
    process = GaussianProcess(schedule, prediction_type=prediction_type, learn_sigma=False)
    x_0, noise = randn(shape, 0), randn(shape, 1)
    # At zero SNR, epsilon does not determine x_0: the last row is left out.
    last = schedule.num_timesteps - (2 if name == "zero_snr" and prediction_type == "epsilon" else 1)
    noised = process.corrupt(x_0, drawn([0, 1, last]), noise=noise)
    index = noised.index
    # Dividing by alpha or sigma >= 0.006 costs two to three of float64's 16 digits.
    assert_close(process.predicted_x_0(noised.target, noised.x_t, index), x_0, rtol=0, atol=1e-11)
    assert_close(process.predicted_noise(noised.target, noised.x_t, index), noise, rtol=0, atol=1e-11)


def test_targets_equal_the_published_formulas() -> None:
    schedule = SCHEDULES["linear"]
    x_0, noise, index = randn(IMAGE, 0), randn(IMAGE, 1), torch.tensor([0, 500, 999])
    alpha, sigma = column(schedule.alpha, index), column(schedule.sigma, index)
    wanted = {"epsilon": noise, "x0": x_0, "v": alpha * noise - sigma * x_0, "flow": noise - x_0}
    for prediction_type, target in wanted.items():
        process = GaussianProcess(schedule, prediction_type=prediction_type)
        assert_close(process.target(x_0, noise, index), target, rtol=0, atol=1e-15)


def test_corrupt_mixes_data_and_noise_and_returns_original_timesteps() -> None:
    schedule = SCHEDULES["respaced"]
    process = GaussianProcess(schedule)
    x_0, noise = randn(IMAGE, 0), randn(IMAGE, 1)
    noised = process.corrupt(x_0, drawn([4, 0, 2]), noise=noise)
    assert noised.timestep.tolist() == [999, 0, 400]
    assert noised.index.tolist() == [4, 0, 2]
    bar = torch.tensor([schedule.alphas_cumprod[i] for i in (4, 0, 2)]).reshape(3, 1, 1, 1)
    assert_close(noised.x_t, bar.sqrt() * x_0 + (1 - bar).sqrt() * noise, rtol=0, atol=1e-12)


def test_the_noise_is_reproducible_and_has_unit_variance() -> None:
    process = GaussianProcess(SCHEDULES["linear"])
    x_0 = torch.zeros(2, 4, 64, 64)
    first, again = (
        process.corrupt(x_0, drawn([0, 999]), generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert_close(first.x_t, again.x_t, rtol=0, atol=0)
    # 4 sigma of a variance estimated from 16,384 normals: 4 sqrt(2 / 16384) = 0.044.
    assert_close(first.noise.flatten(1).var(1), torch.ones(2), rtol=0, atol=0.044)


def bits_by_distributions(process: GaussianProcess, prediction: Tensor, noised: Noised) -> Tensor:
    """The bound per sample in bits, with torch.distributions; for epsilon prediction and index > 0."""
    schedule, x_t, index = process.schedule, noised.x_t, noised.index
    C = x_t.shape[1]
    alpha, sigma = column(schedule.alpha, index), column(schedule.sigma, index)
    x_0 = (x_t - sigma * prediction[:, :C]) / alpha
    true_mean, variance = posterior_by_bayes(schedule, noised.x_0, x_t, index)
    model_mean, _ = posterior_by_bayes(schedule, x_0, x_t, index)
    bar = schedule.alphas_cumprod
    beta = column(1 - bar[1:] / bar[:-1], index - 1)
    model_variance = beta ** ((prediction[:, C:] + 1) / 2) * variance ** ((1 - prediction[:, C:]) / 2)
    nats = kl_divergence(Normal(true_mean, variance.sqrt()), Normal(model_mean, model_variance.sqrt()))
    return nats.mean((1, 2, 3)) / math.log(2)


@pytest.mark.parametrize("name", ["linear", "cosine", "respaced"])
def test_bound_equals_the_kl_of_torch_distributions(name: str) -> None:
    schedule = SCHEDULES[name]
    process = GaussianProcess(schedule)
    draw = drawn([1, 3, schedule.num_timesteps - 1])
    noised = process.corrupt(randn(IMAGE, 0), draw, noise=randn(IMAGE, 1))
    prediction = randn((3, 4, 4, 4), 2)
    terms = process.loss(prediction, noised, draw)
    assert_close(terms.vb, bits_by_distributions(process, prediction, noised), rtol=1e-9, atol=0)
    assert_close(terms.mse, ((prediction[:, :2] - noised.noise) ** 2).mean((1, 2, 3)))


def test_bound_at_the_first_index_is_the_likelihood_of_the_data() -> None:
    schedule = SCHEDULES["linear"]
    process = GaussianProcess(schedule)
    x_0 = (-1 + 2 * torch.tensor([0, 1, 128, 255]).double() / 255).reshape(1, 4, 1, 1)
    noised = process.corrupt(x_0, drawn([0]), noise=randn((1, 4, 1, 1), 0))
    prediction = torch.cat([randn((1, 4, 1, 1), 1), torch.full((1, 4, 1, 1), -1.0).double()], dim=1)
    mean = (noised.x_t - schedule.sigma[0] * prediction[:, :4]) / schedule.alpha[0]
    # Variance channel -1 is the posterior's variance; at index 0 it is that of index 1.
    bar = schedule.alphas_cumprod
    std = math.sqrt((1 - bar[0]) / (1 - bar[1]) * (1 - bar[1] / bar[0]))
    edges = torch.cat([x_0 - 1 / 255, x_0 + 1 / 255])
    edges[0, 0], edges[1, 3] = -math.inf, math.inf
    mass = Normal(mean, std).cdf(edges[1:]) - Normal(mean, std).cdf(edges[:1])
    expected = -mass.log2().mean((1, 2, 3))
    # The CDFs are accurate to 1e-16, and the probability is above 1e-5.
    assert mass.min() > 1e-5
    assert_close(process.loss(prediction, noised, drawn([0])).vb, expected, rtol=1e-9, atol=0)


def test_the_bound_with_a_perfect_mean_depends_only_on_the_variance() -> None:
    schedule = SCHEDULES["linear"]
    process = GaussianProcess(schedule)
    draw = drawn([1, 300, 999])
    noised = process.corrupt(randn(IMAGE, 0), draw, noise=randn(IMAGE, 1))
    tables = process.tables(torch.device("cpu"))
    ratio = tables.posterior_variance[draw.index] / tables.log_beta[draw.index].exp()
    for channel, bits in ((-1.0, torch.zeros(3)), (1.0, 0.5 * (ratio - 1 - ratio.log()) / math.log(2))):
        prediction = torch.cat([noised.target, torch.full(IMAGE, channel).double()], dim=1)
        terms = process.loss(prediction, noised, draw)
        assert_close(terms.vb, bits.double(), rtol=1e-8, atol=1e-12)
        assert (terms.mse == 0).all()


def test_the_bound_trains_only_the_variance_channels() -> None:
    process = GaussianProcess(SCHEDULES["linear"])
    draw = drawn([0, 1, 700])
    noised = process.corrupt(randn(IMAGE, 0), draw, noise=randn(IMAGE, 1))
    prediction = randn((3, 4, 4, 4), 2).requires_grad_()
    terms = process.loss(prediction, noised, draw)
    (bound_gradient,) = torch.autograd.grad(terms.vb.sum(), prediction, retain_graph=True)
    assert (bound_gradient[:, :2] == 0).all()
    assert (bound_gradient[:, 2:] != 0).all()
    (mse_gradient,) = torch.autograd.grad(terms.mse.sum(), prediction)
    assert (mse_gradient[:, 2:] == 0).all()
    assert_close(mse_gradient[:, :2], 2 * (prediction[:, :2] - noised.target).detach() / 32)


def test_the_weight_multiplies_mse_or_loss_by_scope() -> None:
    process = GaussianProcess(SCHEDULES["linear"])
    noised = process.corrupt(randn(IMAGE, 0), drawn([0, 1, 700]), noise=randn(IMAGE, 1))
    prediction = randn((3, 4, 4, 4), 2)
    mse_scope = process.loss(prediction, noised, drawn([0, 1, 700], weight=0.25))
    assert_close(mse_scope.loss, 0.25 * mse_scope.mse + mse_scope.vb, rtol=1e-15, atol=0)
    loss_scope = process.loss(prediction, noised, drawn([0, 1, 700], weight=0.25, scope="loss"))
    assert_close(loss_scope.loss, 0.25 * (mse_scope.mse + mse_scope.vb), rtol=1e-15, atol=0)


def test_fixed_variance_has_no_bound() -> None:
    process = GaussianProcess(SCHEDULES["linear"], learn_sigma=False)
    draw = drawn([0, 1, 700], weight=2.0)
    noised = process.corrupt(randn(VIDEO, 0), draw, noise=randn(VIDEO, 1))
    terms = process.loss(torch.zeros(VIDEO).double(), noised, draw)
    assert (terms.vb == 0).all()
    assert_close(terms.loss, 2 * (noised.noise**2).mean((1, 2, 3, 4)))


def test_the_rescaled_bound_is_multiplied_by_t_over_a_thousand() -> None:
    schedule = NoiseSchedule.linear().respaced(space_timesteps(1000, "250"))
    noised = GaussianProcess(schedule).corrupt(randn(IMAGE, 0), drawn([0, 1, 249]), noise=randn(IMAGE, 1))
    full, rescaled = (
        GaussianProcess(schedule, rescale_learned_sigmas=flag).loss(
            randn((3, 4, 4, 4), 2), noised, drawn([0, 1, 249])
        )
        for flag in (False, True)
    )
    assert_close(rescaled.vb, full.vb / 4)
    assert_close(rescaled.mse, full.mse, rtol=0, atol=0)


def test_the_learned_variance_ranges_from_the_posteriors_to_beta() -> None:
    schedule = SCHEDULES["linear"]
    process = GaussianProcess(schedule)
    index, x_t = torch.tensor([1, 300, 999]), randn(IMAGE, 0)
    bar = schedule.alphas_cumprod
    beta = column(1 - bar[1:] / bar[:-1], index - 1)
    _, posterior = posterior_by_bayes(schedule, x_t, x_t, index)
    for channel, variance in ((-1.0, posterior), (0.0, (beta * posterior).sqrt()), (1.0, beta)):
        prediction = torch.cat([x_t, torch.full(IMAGE, channel).double()], dim=1)
        got = process.denoised(prediction, x_t, index).log_variance.exp()
        assert_close(got, variance.expand(IMAGE), rtol=1e-9, atol=0)


@pytest.mark.parametrize("sigma_small", [False, True])
def test_the_fixed_variance_is_beta_or_the_posteriors(sigma_small: bool) -> None:
    schedule = SCHEDULES["linear"]
    process = GaussianProcess(schedule, learn_sigma=False, sigma_small=sigma_small)
    x_t, index = randn(IMAGE, 0), torch.tensor([0, 1, 999])
    bar = schedule.alphas_cumprod
    beta = 1 - bar[1:] / bar[:-1]
    posterior = beta * (1 - bar[:-1]) / (1 - bar[1:])
    # At index 0 both use the posterior variance of index 1 (the clip of IDDPM).
    wanted = [posterior[0], *((posterior if sigma_small else beta)[i - 1] for i in (1, 999))]
    got = process.denoised(x_t, x_t, index).log_variance.exp().flatten()
    assert_close(got, torch.stack(wanted), rtol=1e-9, atol=0)


@pytest.mark.parametrize("prediction_type", ["x0", "v", "flow"])
def test_the_loss_is_finite_at_zero_terminal_snr(prediction_type: str) -> None:
    process = GaussianProcess(SCHEDULES["zero_snr"], prediction_type=prediction_type)
    draw = drawn([3, 3, 0])
    noised = process.corrupt(randn(IMAGE, 0).float(), draw, noise=randn(IMAGE, 1).float())
    assert_close(noised.x_t[:2], noised.noise[:2], rtol=0, atol=0)
    prediction = randn((3, 4, 4, 4), 2).float().requires_grad_()
    terms = process.loss(prediction, noised, draw)
    terms.loss.sum().backward()
    assert torch.isfinite(terms.loss).all()
    assert torch.isfinite(prediction.grad).all()


def test_epsilon_with_an_infinite_bound_is_refused() -> None:
    with pytest.raises(ValueError, match=r"epsilon with learn_sigma needs SNR > 0.*predict v or x0"):
        GaussianProcess(SCHEDULES["zero_snr"])
    draw = drawn([3, 3, 0])
    process = GaussianProcess(SCHEDULES["zero_snr"], learn_sigma=False)
    noised = process.corrupt(randn(IMAGE, 0), draw, noise=randn(IMAGE, 1))
    assert_close(process.loss(torch.zeros(IMAGE), noised, draw).loss, (noised.noise**2).mean((1, 2, 3)))


def test_the_loss_of_half_precision_inputs_is_computed_in_float32() -> None:
    process = GaussianProcess(SCHEDULES["linear"])
    draw = drawn([0, 1, 700])
    x_0, prediction = randn(IMAGE, 0).bfloat16(), randn((3, 4, 4, 4), 2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        noised = process.corrupt(x_0, draw, noise=randn(IMAGE, 1).float())
        terms = process.loss(prediction, noised, draw)
    assert noised.x_t.dtype == terms.loss.dtype == torch.float32
    wide = process.corrupt(x_0.double(), draw, noise=noised.noise.double())
    expected = process.loss(prediction.double(), wide, draw)
    # At t = 0, float32 rounds x_t ~ 1 by 6e-8, or 1e-5 of the standard deviation of 0.007.
    assert_close(terms.loss.double(), expected.loss, rtol=1e-4, atol=0)


def test_corrupt_and_loss_never_wait_for_the_device() -> None:
    # Tensors on the meta device have no values: reading one back to the host raises.
    process = GaussianProcess(SCHEDULES["linear"])
    draw = TimestepDraw(
        torch.zeros(3, dtype=torch.int64, device="meta"),
        torch.zeros(3, device="meta"),
        torch.ones(3, device="meta"),
    )
    noised = process.corrupt(torch.zeros(IMAGE, device="meta"), draw)
    terms = process.loss(torch.zeros(3, 4, 4, 4, device="meta"), noised, draw)
    assert (terms.loss.shape, terms.loss.device.type) == ((3,), "meta")
    assert process.tables(torch.device("meta")) is process.tables(torch.device("meta"))


def test_the_registry_builds_the_process_by_host_option_names() -> None:
    config = {"type": "SpeeDiffusion", "timestep_respacing": "250", "noise_schedule": "squaredcos_cap_v2"}
    process = build(PROCESSES, config)
    assert isinstance(process, GaussianProcess)
    assert (process.schedule.num_timesteps, process.schedule.num_original) == (250, 1000)
    kept = process.schedule.timesteps
    assert_close(process.schedule.alphas_cumprod, NoiseSchedule.cosine().alphas_cumprod[kept])
    assert (process.learn_sigma, process.prediction_type) == (True, "epsilon")
    options = {"zero_terminal_snr": True, "prediction_type": "v", "timestep_respacing": "10"}
    dark = gaussian_process(noise_schedule="cosine", **options).schedule
    assert torch.equal(dark.alpha, NoiseSchedule.cosine().zero_terminal_snr().alpha[dark.timesteps])
    assert float(dark.alpha[-1]) == 0
    short = gaussian_process(diffusion_steps=100, prediction_type="v", learn_sigma=False, sigma_small=True)
    assert (short.schedule.num_timesteps, short.prediction_type, short.sigma_small) == (100, "v", True)


def test_bad_options_say_what_is_wanted() -> None:
    linear = SCHEDULES["linear"]
    with pytest.raises(ValueError, match="unknown prediction_type 'eps'.*known: epsilon, flow, v, x0"):
        GaussianProcess(linear, prediction_type="eps")
    with pytest.raises(ValueError, match="unknown noise_schedule 'liner'; did you mean 'linear'"):
        gaussian_process(noise_schedule="liner")
    with pytest.raises(ValueError, match="zero_terminal_snr needs prediction_type v or x0, got epsilon"):
        gaussian_process(zero_terminal_snr=True, learn_sigma=False)
    with pytest.raises(ValueError, match="sigma_small sets the fixed variance: it needs learn_sigma=False"):
        GaussianProcess(linear, sigma_small=True)
    with pytest.raises(ValueError, match="rescale_learned_sigmas scales the bound"):
        GaussianProcess(linear, learn_sigma=False, rescale_learned_sigmas=True)
    with pytest.raises(ValueError, match="needs T >= 2 timesteps, got T = 1"):
        GaussianProcess(linear.respaced([5]))
    with pytest.raises(ValueError, match="strictly falling SNR, got none at index 2"):
        GaussianProcess(NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.5]))


def test_bad_shapes_say_what_is_wanted() -> None:
    process = GaussianProcess(SCHEDULES["linear"])
    x_0, draw = torch.zeros(IMAGE), drawn([0, 1, 2])
    with pytest.raises(ValueError, match=r"x_0 needs floating point.*got torch.uint8 \(3, 2, 4, 4\)"):
        process.corrupt(x_0.byte(), draw)
    with pytest.raises(ValueError, match=r"draw needs index shape \(3,\), got \(2,\)"):
        process.corrupt(x_0, drawn([0, 1]))
    with pytest.raises(ValueError, match=r"noise needs x_0's shape \(3, 2, 4, 4\), got \(1, 2, 4, 4\)"):
        process.corrupt(x_0, draw, noise=torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="generator has no effect beside noise"):
        process.corrupt(x_0, draw, noise=x_0, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"prediction needs shape \(3, 4, 4, 4\) at learn_sigma=True, got"):
        process.loss(x_0, process.corrupt(x_0, draw), draw)
