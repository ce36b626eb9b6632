"""Each trainer's law against a simulation of what its code does, written here in our own words."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from speedit_plugins import NoiseSchedule, TimestepPolicy, build_policy
from speedit_plugins.hosts.laws.laws import HOSTS, host_config

T, N, BINS = 1000, 400_000, 50
# With these numbers, chance alone makes a total variation of about
# sqrt(2 / pi) / 2 * sqrt(BINS / N) = 0.0045.
CHANCE = 0.01

Draw = Callable[[torch.Generator], Tensor]


def policy_of(name: str, shape: tuple[int, ...] = (16, 128, 128), **flags: Any) -> TimestepPolicy:
    policy = build_policy(host_config(name, flags), NoiseSchedule.rectified_flow(T))
    policy.observe(torch.zeros(1, *shape))
    return policy


def assert_same_law(policy: TimestepPolicy, noise: Tensor) -> None:
    """The policy's density has the frequencies of these noise levels (N,), u = 1 is noise."""
    counts = torch.histc(noise.double(), bins=BINS, min=0, max=1)
    frequency = counts / len(noise)
    density = policy.density.reshape(BINS, -1).sum(1)
    assert float((frequency - density).abs().sum()) / 2 < CHANCE


def uniform(draw: torch.Generator) -> Tensor:
    return torch.rand(N, generator=draw, dtype=torch.float64)


def sigmoid(mean: float = 0.0, std: float = 1.0) -> Draw:
    return lambda draw: (mean + std * torch.randn(N, generator=draw, dtype=torch.float64)).sigmoid()


def heavy(scale: float) -> Draw:
    def simulate(draw: torch.Generator) -> Tensor:
        v = uniform(draw)
        return 1 - v - scale * ((math.pi * v / 2).cos() ** 2 - 1 + v)

    return simulate


def power(exponent: float) -> Draw:
    return lambda draw: uniform(draw) ** exponent


def then(law: Draw, *changes: Callable[[Tensor], Tensor]) -> Draw:
    def simulate(draw: torch.Generator) -> Tensor:
        u = law(draw)
        for change in changes:
            u = change(u)
        return u

    return simulate


def flipped(u: Tensor) -> Tensor:
    return 1 - u


def moved(s: float) -> Callable[[Tensor], Tensor]:
    return lambda u: s * u / (1 + (s - 1) * u)


def mixed(*parts: tuple[float, Draw]) -> Draw:
    def simulate(draw: torch.Generator) -> Tensor:
        laws = torch.stack([law(draw) for _, law in parts])
        which = torch.multinomial(torch.tensor([share for share, _ in parts]), N, True, generator=draw)
        return laws[which, torch.arange(N)]

    return simulate


def beta(a: float, b: float) -> Draw:
    return lambda draw: torch.from_numpy(np.random.default_rng(draw.initial_seed()).beta(a, b, N))


def by_log_snr(mean: float, std: float) -> Draw:
    """u of a log-SNR that is normal: log-SNR = 2 ln((1 - u) / u)."""
    return lambda draw: 1 / (1 + ((mean + std * torch.randn(N, generator=draw).double()) / 2).exp())


def by_density(density: Callable[[Tensor], Tensor]) -> Draw:
    """Draws in proportion to a density, from a fine grid."""

    def simulate(draw: torch.Generator) -> Tensor:
        grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
        return grid[torch.multinomial(density(grid), N, True, generator=draw)]

    return simulate


def ltx(tokens: int) -> Draw:
    """Logit-normal, stretched from between two quantiles to [0, 1]; one draw in ten is uniform."""

    def simulate(draw: torch.Generator) -> Tensor:
        mean = 0.95 + 1.1 * (tokens - 1024) / 3072
        low, high = (torch.tensor(mean + z).double().sigmoid() for z in (-2.5758, 3.0902))
        stretched = (sigmoid(mean)(draw) - low) / (high - low)
        stretched = torch.where(stretched < 1e-3, 2e-3 - stretched, stretched).clamp(0, 1)
        return torch.where(uniform(draw) > 0.1, stretched, 1e-3 + (1 - 1e-3) * uniform(draw))

    return simulate


# Latents of 16 x 128 x 128 have 64 x 64 tokens of 2 x 2, for which Flux has e^1.15.
FLUX = math.exp(1.15)
QWEN = math.exp(0.5 + 0.4 * (4096 - 256) / (8192 - 256))
LAWS: list[tuple[str, dict[str, Any], Draw]] = [
    ("sd-scripts", {}, then(uniform, flipped, moved(3))),
    ("sd-scripts", {"weighting_scheme": "logit_normal", "logit_mean": 1.0}, then(sigmoid(-1), moved(3))),
    ("sd-scripts", {"timestep_sampling": "uniform"}, uniform),
    ("sd-scripts", {"timestep_sampling": "sigmoid", "sigmoid_scale": 1.5}, sigmoid(std=1.5)),
    (
        "sd-scripts",
        {"timestep_sampling": "shift", "discrete_flow_shift": 3.5, "sigmoid_scale": 0.7},
        then(sigmoid(std=0.7), moved(3.5)),
    ),
    ("sd-scripts", {"timestep_sampling": "flux_shift"}, then(sigmoid(), moved(FLUX))),
    # Here the number drawn is the noise level itself.
    (
        "sd-scripts-sd3",
        {"weighting_scheme": "logit_normal", "logit_mean": 1.0, "training_shift": 2.0},
        then(sigmoid(1), moved(2)),
    ),
    ("sd-scripts-sd3", {"weighting_scheme": "mode", "mode_scale": 0.8}, heavy(0.8)),
    # The scheduler of musubi-tuner's training does not shift.
    ("musubi-tuner", {"discrete_flow_shift": 5.0}, uniform),
    ("musubi-tuner", {"weighting_scheme": "logit_normal", "logit_mean": 1.0}, sigmoid(-1)),
    (
        "musubi-tuner",
        {"timestep_sampling": "shift", "discrete_flow_shift": 5.0},
        then(sigmoid(), moved(5)),
    ),
    ("musubi-tuner", {"timestep_sampling": "flux_shift"}, then(sigmoid(), moved(FLUX))),
    (
        "musubi-tuner",
        {"timestep_sampling": "flux2_shift"},
        then(sigmoid(), moved(math.exp(0.5 + 0.65 * (16384 - 256) / 3840))),
    ),
    ("musubi-tuner", {"timestep_sampling": "qwen_shift"}, then(sigmoid(), moved(QWEN))),
    (
        "musubi-tuner",
        {"timestep_sampling": "krea2_shift"},
        then(sigmoid(), moved(math.exp(0.5 + 0.65 * (4096 - 256) / 6144))),
    ),
    # 128 x 128 latents of 16 x 16 pixels are 2048 x 2048 pixels.
    ("musubi-tuner", {"timestep_sampling": "ideogram4_shift"}, sigmoid(0.5 * math.log(16), 1.5)),
    (
        "musubi-tuner",
        {"timestep_sampling": "logsnr", "logit_mean": -1.0, "logit_std": 2.0},
        by_log_snr(-1, 2),
    ),
    (
        "musubi-tuner",
        {"timestep_sampling": "qinglong_flux"},
        mixed((0.79, then(sigmoid(), moved(FLUX))), (0.11, by_log_snr(0, 1)), (0.1, by_log_snr(5.36, 1))),
    ),
    (
        "musubi-tuner",
        {"timestep_sampling": "qinglong_qwen"},
        mixed((0.95, then(sigmoid(), moved(QWEN))), (0.05, by_log_snr(5.36, 1))),
    ),
    ("simpletuner", {}, then(sigmoid(), moved(3))),
    (
        "simpletuner",
        {"flow_sigmoid_scale": 0.5, "flow_schedule_shift": 0, "flow_schedule_auto_shift": True},
        then(sigmoid(std=0.5), moved(FLUX)),
    ),
    ("simpletuner", {"flow_use_uniform_schedule": True, "flow_schedule_shift": None}, uniform),
    (
        "simpletuner",
        {"flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 3.0, "flow_schedule_shift": 2.0},
        then(beta(3, 2), moved(2)),
    ),
    ("simpletuner", {"mixflow_enabled": True}, then(power(0.5), flipped, moved(3))),
    ("ai-toolkit", {}, sigmoid()),
    ("ai-toolkit", {"timestep_type": "linear"}, uniform),
    ("ai-toolkit", {"timestep_type": "shift", "arch": "sd"}, then(uniform, moved(3))),
    ("ai-toolkit", {"timestep_type": "flux_shift"}, then(uniform, moved(FLUX))),
    # Index r^3 counts from the noisy end.
    ("ai-toolkit", {"timestep_type": "linear", "content_or_style": "content"}, then(power(3), flipped)),
    (
        "ai-toolkit",
        {"timestep_type": "shift", "arch": "lumina2", "content_or_style": "style"},
        then(power(3), moved(6)),
    ),
    ("onetrainer", {"timestep_shift": 2.0}, then(uniform, moved(2))),
    (
        "onetrainer",
        {"timestep_distribution": "LOGIT_NORMAL", "noising_weight": 0.5, "noising_bias": -0.7},
        sigmoid(-0.7, 1.5),
    ),
    ("onetrainer", {"timestep_distribution": "HEAVY_TAIL", "noising_weight": 1.29}, heavy(1.29)),
    (
        "onetrainer",
        {"timestep_distribution": "BETA", "noising_weight": 0.8, "noising_bias": 1.0},
        power(1 / 0.8),
    ),
    (
        "onetrainer",
        {"timestep_distribution": "COS_MAP", "dynamic_timestep_shifting": True},
        then(by_density(lambda u: 1 / (1 - 2 * u + 2 * u**2)), moved(FLUX)),
    ),
    (
        "onetrainer",
        {"timestep_distribution": "SIGMOID", "noising_weight": 7.0, "noising_bias": 0.1},
        by_density(lambda u: (7 * (u - 0.6)).sigmoid()),
    ),
    (
        "onetrainer",
        {"timestep_distribution": "INVERTED_PARABOLA", "noising_weight": 7.7, "timestep_shift": 2.0},
        then(by_density(lambda u: (2 - 7.7 * (u - 0.5) ** 2).clamp(min=0)), moved(2)),
    ),
    ("sit", {}, then(uniform, flipped)),
    ("torchtitan", {}, uniform),
    ("lightningdit", {}, then(sigmoid(), flipped)),
    ("lightningdit", {"use_lognorm": False}, uniform),
    # sigma / alpha is log-normal, and u = sigma / (1 + sigma).
    (
        "repa",
        {"weighting": "lognormal"},
        lambda draw: (x := torch.randn(N, generator=draw).double().exp()) / (1 + x),
    ),
    (
        "rae",
        {"time_dist_type": "logit-normal_-0.5_1.2", "time_dist_shift_dim": 196608},
        then(sigmoid(-0.5, 1.2), moved(math.sqrt(48))),
    ),
    ("rae", {"time_dist_type": "uniform"}, then(uniform, moved(8))),  # 16 x 128 x 128 = 64 x 4096
    ("open-sora-1.2", {}, uniform),
    (
        "open-sora-1.2",
        {
            "sample_method": "logit-normal",
            "loc": 0.5,
            "use_timestep_transform": True,
            "height": 512,
            "width": 1024,
            "num_frames": 51,
        },
        then(sigmoid(0.5), moved(math.sqrt(2 * 15))),  # 51 frames are 15 of the latents
    ),
    # 32 x 32 latents are 256 tokens, 128 x 128 are 4096.
    ("open-sora-2", {"num_frames": 1, "height": 32, "width": 32}, sigmoid()),
    ("open-sora-2", {"num_frames": 9, "height": 128, "width": 128}, then(sigmoid(), moved(3 * 3))),
    ("hunyuanvideo-1.5", {}, then(sigmoid(), moved(3))),
    (
        "hunyuanvideo-1.5",
        {"flow_snr_type": "mix", "train_timestep_shift": 5.0},
        then(mixed((0.7, sigmoid()), (0.3, uniform)), moved(5)),
    ),
    ("hunyuanvideo-1.5", {"flow_snr_type": "mode"}, then(heavy(1.29), moved(3))),
    ("ltx-2", {"seq_length": 4096}, ltx(4096)),
    ("ltx-2", {"seq_length": 1024}, ltx(1024)),
    ("ltx-2", {"seq_length": 1024, "timestep_sampling_mode": "uniform"}, uniform),
    ("diffsynth", {}, then(uniform, moved(3))),
    # The first tenth of the steps, from the noisy end.
    (
        "diffsynth",
        {"template": "Wan", "max_timestep_boundary": 0.1},
        then(lambda draw: 1 - 0.1 * uniform(draw), moved(5)),
    ),
]


@pytest.mark.parametrize(
    ("name", "flags", "simulate"), LAWS, ids=[f"{n}-{'-'.join(map(str, f.values()))}" for n, f, _ in LAWS]
)
def test_a_hosts_law_is_what_its_code_draws(name: str, flags: dict[str, Any], simulate: Draw) -> None:
    assert_same_law(policy_of(name, **flags), simulate(torch.Generator().manual_seed(0)))


def test_every_host_has_a_law_here_or_below() -> None:
    assert {name for name, _, _ in LAWS} | {"diffusers", "diffusers-sd3"} == set(HOSTS.module_dict)


@pytest.mark.parametrize(
    ("name", "scheme", "mean", "shift"),
    [
        ("diffusers", "none", 0.0, 1.0),
        ("diffusers", "logit_normal", 0.8, 2.0),
        ("diffusers", "mode", 0.0, 1.0),
        ("diffusers-sd3", "logit_normal", -0.5, 3.0),
        ("diffusers-sd3", "cosmap", 0.0, 3.0),
    ],
)
def test_diffusers_by_its_own_functions(name: str, scheme: str, mean: float, shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import compute_density_for_timestep_sampling

    u = compute_density_for_timestep_sampling(
        scheme, N, mean, 1.0, 1.29, generator=torch.Generator().manual_seed(0)
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    index = (u * scheduler.config.num_train_timesteps).long().clamp(max=999)
    flags = {"weighting_scheme": scheme, "logit_mean": mean, "shift": shift}
    # Its noise levels are the upper ends of 1000 bins. Draws that are even inside the bins fill all levels.
    ends = torch.cat([scheduler.sigmas[:T], torch.zeros(1)])
    inside = torch.rand(N, generator=torch.Generator().manual_seed(1))
    assert_same_law(policy_of(name, **flags), ends[index + 1] + inside * (ends[index] - ends[index + 1]))


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
def test_weights_of_diffusers_by_its_own_function(scheme: str) -> None:
    training = pytest.importorskip("diffusers.training_utils")
    sigmas = NoiseSchedule.rectified_flow(T).sigma
    expected = training.compute_loss_weighting_for_sd3(scheme, sigmas).double()
    for name in ("diffusers", "musubi-tuner", "sd-scripts", "sd-scripts-sd3"):
        weight = policy_of(name, weighting_scheme=scheme).weight
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=0)
    if scheme == "none":
        return
    # The loss of x0 is u^2 times that of the velocity. The last part of the curve ends level: 2 / 41 of u^2.
    preconditioned = policy_of("diffusers-sd3", weighting_scheme=scheme).weight
    torch.testing.assert_close(preconditioned, sigmas**2 * expected, rtol=0, atol=0.01)
    plain = policy_of("diffusers-sd3", weighting_scheme=scheme, precondition_outputs=0).weight
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=0)


def test_other_weights() -> None:
    u = NoiseSchedule.rectified_flow(T).sigma
    torch.testing.assert_close(policy_of("onetrainer", loss_weight_fn="SIGMA").weight, u)
    raw = policy_of("sd-scripts", weighting_scheme="cosmap", model_prediction_type="raw").weight
    assert (raw == 1).all()
    # Both write exp(-2 (u - 1/2)^2), less its minimum. Its end is at the first or last timestep.
    bell = (-2 * (u - 0.5) ** 2).exp() - math.exp(-0.5)
    for policy in (policy_of("ai-toolkit", linear_timesteps=True), policy_of("diffsynth")):
        ratio = (policy.weight / bell)[1:-1]
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
        assert policy.mean_weight == pytest.approx(1, rel=1e-6)
