"""The policy that measures its own centre."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from speedit_plugins import DataSpectrum, NoiseSchedule, TimestepPolicy, build_policy
from speedit_plugins.policies.measurement import DataMeasurement

FLOW = NoiseSchedule.rectified_flow(1000)
LAW = {"type": "auto", "num_samples": 200}


def policy_of(schedule: NoiseSchedule = FLOW, **options: Any) -> TimestepPolicy:
    return build_policy({"density": {**LAW, **options}, "weighting": "constant"}, schedule)


def data(num_samples: int, *, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Samples (N, 2, 2, 2) whose first values vary most."""
    spread = scale * torch.tensor([4.0, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02])
    values = torch.randn(num_samples, 8, generator=torch.Generator().manual_seed(seed)) * spread
    return values.view(-1, 2, 2, 2)


def test_it_measures_the_data_over_the_first_steps(capsys: pytest.CaptureFixture[str]) -> None:
    samples = data(240)
    policy, first = policy_of(), build_policy("logit_normal", FLOW).density
    assert policy.needs_data
    for batch in samples.split(60)[:3]:
        policy.advance()
        policy.observe(batch)
        assert torch.equal(policy.density, first)
    policy.advance()
    policy.observe(samples[180:])
    centre = DataSpectrum.of(samples[:200]).log_snr_at()
    known = policy_of(mean=centre).density
    assert torch.allclose(policy.density, known, atol=1e-12)
    assert not policy.needs_data
    text = capsys.readouterr().err
    assert text.startswith("speedit_plugins: auto measured 200 samples of 2 x 2 x 2: half of their")
    assert f"log-SNR {centre:.2f} (a quarter at" in text
    # Once, and for good: other data change nothing any more.
    policy.observe(data(240, scale=9.0, seed=1))
    assert torch.allclose(policy.density, known, atol=1e-12)
    assert capsys.readouterr().err == ""


def test_a_resumed_training_does_not_measure_again(capsys: pytest.CaptureFixture[str]) -> None:
    policy, resumed = policy_of(), policy_of()
    policy.observe(data(200))
    resumed.load_state_dict(policy.state_dict())
    capsys.readouterr()
    resumed.observe(data(400, scale=9.0))
    assert torch.equal(resumed.density, policy.density)
    assert capsys.readouterr().err == ""
    # A state from before the measurement leaves it to be done.
    resumed = policy_of()
    resumed.load_state_dict(policy_of().state_dict())
    assert resumed.needs_data


def test_what_is_drawn_before_depends_on_the_schedule() -> None:
    linear = NoiseSchedule.linear(1000)
    assert torch.equal(policy_of(linear).density, build_policy("uniform", linear).density)
    given = build_policy(
        {"density": LAW, "weighting": "constant"}, FLOW, data_spectrum=lambda: DataSpectrum(torch.ones(3))
    )
    assert torch.allclose(given.density, policy_of(mean=0.0).density)


def test_samples_that_do_not_count() -> None:
    measurement = DataMeasurement(num_samples=4, num_steps=3)
    samples = data(4)
    assert measurement.add(samples[:2]) is None
    broken = samples[2:3].clone()
    broken[0, 0, 0, 0] = math.nan
    # Those that came already, those that are not finite, and those of another shape.
    assert measurement.add(torch.cat([samples[:2], broken])) is None
    assert measurement.num_samples == 2
    # After `num_steps` it is measured on what there is.
    spectrum = measurement.add(torch.zeros(5, 2, 3, 3))
    assert spectrum is not None
    assert torch.equal(spectrum.variances, DataSpectrum.of(samples[:2]).variances)


def test_data_that_cannot_be_measured_are_said_once() -> None:
    policy, before = policy_of(), build_policy("logit_normal", FLOW).density
    white = torch.randn(200, 4096, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="goes on with the draws .* 200 samples are too few"):
        policy.observe(white)
    policy.observe(data(400))
    assert torch.equal(policy.density, before)
    assert len(policy.draw(4).index) == 4


def test_a_seam_that_shows_no_data_is_an_error() -> None:
    # A loop of one's own that never observes fails at its first draw, a seam after a few steps.
    with pytest.raises(ValueError, match="depends on the data and has seen none: call"):
        policy_of().draw(4)
    policy = policy_of()
    for _ in range(10):
        policy.advance()
        policy.draw(4)
    policy.advance()
    with pytest.raises(ValueError, match="has seen none"):
        policy.draw(4)
    known = policy_of(mean=0.0)
    assert len(known.draw(4).index) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 1}, "auto needs num_samples >= 2, got 1"),
        ({"law": {"std": 0.0}}, "std and clean_std > 0"),
        ({"law": {"wide": 1.0}}, "density 'log_snr_normal' has no parameter 'wide'"),
        ({"law": {"clean_share": 1.0}}, r"clean_share in \[0, 1\), got 1.0"),
        ({"mean": math.nan}, "finite mean"),
    ],
)
def test_a_bad_option_says_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_of(**options)


def test_the_named_policy_suits_the_model() -> None:
    vp, centre = NoiseSchedule.linear(1000), {"mean": 0.3}
    for predicted, schedule, wanted, options in (
        ("flow", FLOW, "spectral_flow", {}),
        ("v", vp, "spectral_fast", {}),
        ("epsilon", vp, "spectral", {}),
        ("epsilon", vp, "spectral_fast", {"clamped": True}),
    ):
        policy = build_policy({"type": "auto", **centre, **options}, schedule, predicted)
        known = build_policy({"type": wanted, **centre}, schedule, predicted)
        assert torch.equal(policy.density, known.density)
        assert torch.equal(policy.weight, known.weight)
        assert policy.stratified
    with pytest.raises(ValueError, match="clamped has no effect on a model of flow: leave it out"):
        build_policy({"type": "auto", "clamped": True}, FLOW)


def test_it_is_recommended_for_all_but_epsilon() -> None:
    vp = NoiseSchedule.linear(1000)
    assert build_policy(None, FLOW).name == "auto"
    assert build_policy("recommended", vp, "v").name == "auto"
    assert build_policy(None, vp).name == "speedit"
    changed = build_policy({"type": "recommended", "weighting": "constant", "normalize": "loss"}, vp)
    assert changed.name == "speedit with weighting constant"
    with pytest.raises(ValueError, match="policy 'auto' has no parameter 'densty'; did you mean 'density'"):
        build_policy({"type": "recommended", "densty": "uniform"}, FLOW)
