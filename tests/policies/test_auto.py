"""The policy that measures its own centre."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from speedit_plugins import DataSpectrum, NoiseSchedule, TimestepPolicy, build_policy
from speedit_plugins.policies.measurement import DataMeasurement
from speedit_plugins.policies.weightings.conversion import converted

FLOW = NoiseSchedule.rectified_flow(1000)
LAW = {"type": "auto", "num_samples": 200}


def policy_of(schedule: NoiseSchedule = FLOW, **options: Any) -> TimestepPolicy:
    return build_policy({"density": {**LAW, **options}, "weighting": "constant"}, schedule)


def measured() -> TimestepPolicy:
    policy = policy_of()
    for batch in data(200).split(50):
        policy.observe(batch)
    assert not policy.needs_data
    return policy


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
    known = policy_of(num_samples=None, mean=centre).density
    assert torch.allclose(policy.density, known, atol=1e-12)
    assert not policy.needs_data
    text = capsys.readouterr().err
    assert text.startswith("speedit_plugins: auto measured 200 different samples of 2 x 2 x 2: half of")
    assert f"log-SNR {centre:.2f} (a quarter at" in text
    # Once, and for good: other data change nothing any more.
    policy.observe(data(240, scale=9.0, seed=1))
    assert torch.allclose(policy.density, known, atol=1e-12)
    assert capsys.readouterr().err == ""


def test_a_resumed_training_does_not_measure_again(capsys: pytest.CaptureFixture[str]) -> None:
    policy, resumed = measured(), policy_of()
    resumed.load_state_dict(policy.state_dict())
    capsys.readouterr()
    for batch in data(400, scale=9.0).split(50):
        resumed.observe(batch)
    assert torch.equal(resumed.density, policy.density)
    assert capsys.readouterr().err == ""
    # A state from before the measurement leaves it to be done, also in a policy that has measured.
    resumed.load_state_dict(policy_of().state_dict())
    assert resumed.needs_data
    assert torch.equal(resumed.density, policy_of().density)
    # It waits for as many samples as its config says.
    for batch in data(200).split(50):
        resumed.observe(batch)
    assert torch.equal(resumed.density, policy.density)
    with pytest.raises(ValueError, match="the state of auto has the mean .*, the config 5.0"):
        policy_of(num_samples=None, mean=5.0).load_state_dict(policy.state_dict())


def test_what_is_drawn_before_depends_on_the_schedule() -> None:
    linear = NoiseSchedule.linear(1000)
    assert torch.equal(policy_of(linear).density, build_policy("uniform", linear).density)
    given = build_policy(
        {"density": LAW, "weighting": "constant"}, FLOW, data_spectrum=lambda: DataSpectrum(torch.ones(3))
    )
    assert torch.allclose(given.density, policy_of(num_samples=None, mean=0.0).density)


def test_samples_that_do_not_count() -> None:
    measurement = DataMeasurement(num_samples=6, num_steps=8)
    samples = data(4)
    broken = samples[2:3].clone()
    broken[0, 0, 0, 0] = math.nan
    # Those that come again, also with an encoder's noise on them; those that are not finite; other shapes.
    again = samples[:2] + 1e-3 * data(2, seed=1)
    other = torch.zeros(1, 2, 3, 3)
    for batch in (samples[:2], again, broken, other, samples[:2], other, other):
        assert measurement.add(batch) is None
    # After `num_steps` it is measured on what there is.
    spectrum = measurement.add(other)
    assert spectrum is not None
    assert measurement.num_samples == 2


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speedit_plugins.policies.measurement.MAX_VALUES", 800)
    measurement = DataMeasurement(num_samples=1000)
    found = [measurement.add(batch) for batch in data(400).split(100)]
    assert found[:3] == [None] * 3
    # 100 samples of 8 values each.
    assert measurement.num_samples == 100


def test_data_that_cannot_be_measured_are_said_once() -> None:
    before = build_policy("logit_normal", FLOW).density
    white = torch.randn(200, 4096, generator=torch.Generator().manual_seed(0))
    bad = ((white, "200 samples are too few"), (1e-9 * data(200), "outside the schedule's -15.20 to 15.20"))
    for samples, reason in bad:
        policy = policy_of()
        for batch in samples.split(50)[:3]:
            policy.observe(batch)
        with pytest.warns(UserWarning, match=f"goes on with the draws .*{reason}"):
            policy.observe(samples[150:])
        for batch in data(400).split(50):
            policy.observe(batch)
        assert torch.equal(policy.density, before)
        assert len(policy.draw(4).index) == 4
        assert not policy.needs_data
        # A resumed training does not try again.
        resumed = policy_of()
        resumed.load_state_dict(policy.state_dict())
        assert not resumed.needs_data


def test_large_images_need_few_samples() -> None:
    """Noise with a known spectrum: 32 samples of 65,536 values, of which thousands would be needed."""
    frequency = torch.fft.fftfreq(64)[:, None] ** 2 + torch.fft.fftfreq(64) ** 2
    amplitude = frequency.clamp(min=(1 / 64) ** 2) ** -0.5
    white = torch.randn(32, 16, 64, 64, generator=torch.Generator().manual_seed(0))
    samples = torch.fft.ifft2(torch.fft.fft2(white) * amplitude).real
    policy = policy_of(num_samples=32)
    for batch in samples.split(8):
        policy.observe(batch)
    middle = DataSpectrum(amplitude.square().flatten()).log_snr_at()
    assert abs(policy.state_dict()["density"]["mean"] - middle) < 0.3


def test_few_samples_tell_their_middle_alone(capsys: pytest.CaptureFixture[str]) -> None:
    policy = policy_of()
    spread = torch.arange(1, 257) ** -1.0
    few = torch.randn(100, 256, generator=torch.Generator().manual_seed(0)) * spread
    for _ in range(64):
        policy.observe(few[:25])
        policy.observe(few[25:50])
        policy.observe(few[50:75])
        policy.observe(few[75:])
    assert not policy.needs_data
    assert "half of their variance is explained at log-SNR" in capsys.readouterr().err


def centred_at(schedule: NoiseSchedule, predicted: str, mean: float, **options: Any) -> TimestepPolicy:
    density = {"type": "auto", "mean": mean, **options}
    return build_policy({"density": density, "weighting": "constant"}, schedule, predicted)


def test_the_centre_follows_the_losses() -> None:
    """A perfect model of independent values of variance 1: the middle is at log-SNR 0, not at the guess."""
    vp = NoiseSchedule.cosine(1000)
    for predicted, schedule in (("flow", FLOW), ("v", vp), ("x0", vp)):
        law = partial(centred_at, schedule, predicted)
        policy, resumed = (law(-2.0, follow=True, prior_losses=5_000) for _ in range(2))
        assert policy.learns
        assert torch.equal(policy.density, law(-2.0).density)
        error = 1 / (1 + schedule.snr)  # of x_0
        loss = error / converted(torch.ones(1000).double(), schedule, predicted, source="x0")
        for step in range(400):
            index = torch.randint(1000, (50,), generator=torch.Generator().manual_seed(step))
            policy.update(index, loss[index])
            if step == 200:
                resumed.load_state_dict(policy.state_dict())
            elif step > 200:
                resumed.update(index, loss[index])
        assert torch.equal(resumed.density, policy.density)
        # 20,000 losses against 5,000: four fifths of the way.
        assert float((policy.density - law(-0.4).density).abs().sum()) < 0.1
    with pytest.raises(ValueError, match="follow needs a model of x0, v or flow, got one of epsilon"):
        policy_of(NoiseSchedule.linear(), follow=True)


def test_a_seam_that_shows_no_data_is_an_error() -> None:
    # A loop of one's own that never observes fails at its first draw, a seam after a few steps.
    with pytest.raises(ValueError, match="depends on the data and has seen none: call"):
        policy_of().draw(4)
    with pytest.raises(
        ValueError, match=r"observe needs floating-point data .*, got torch.float32 of shape \(4,\)"
    ):
        policy_of().observe(torch.zeros(4))
    policy = policy_of()
    for _ in range(10):
        policy.advance()
        policy.draw(4)
    policy.advance()
    with pytest.raises(ValueError, match="has seen none"):
        policy.draw(4)
    known = policy_of(num_samples=None, mean=0.0)
    assert len(known.draw(4).index) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 1}, "auto needs num_samples >= 2, got 1"),
        ({"law": {"std": 0.0}}, "std and clean_std > 0"),
        ({"law": {"wide": 1.0}}, "density 'log_snr_normal' has no parameter 'wide'"),
        ({"law": {"clean_share": 1.0}}, r"clean_share in \[0, 1\), got 1.0"),
        ({"num_samples": None, "mean": math.nan}, "finite mean"),
        ({"mean": 0.0}, "auto measures nothing if it gets a mean: leave out num_samples, got 200"),
        ({"prior_losses": 5}, "prior_losses has no effect without follow"),
        ({"follow": True, "prior_losses": 0}, "prior_losses >= 1, got 0"),
        ({"law": 5}, "law needs a mapping .* got 5"),
        ({"law": {"mean": 1.0}}, "other than mean"),
    ],
)
def test_a_bad_option_says_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_of(**options)


def test_the_named_policy_suits_the_model() -> None:
    vp, centre = NoiseSchedule.linear(1000), {"mean": 0.3}
    for predicted, schedule, wanted, options in (
        ("flow", FLOW, "spectral_flow", {}),
        ("v", vp, "spectral", {}),
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


def test_it_is_recommended_for_flows_and_v() -> None:
    vp = NoiseSchedule.linear(1000)
    assert build_policy(None, FLOW).name == "auto"
    assert build_policy("recommended", vp, "v").name == "auto"
    assert build_policy("recommended", vp, "x0").name == "auto"
    assert build_policy(None, vp).name == "speedit"
    changed = build_policy({"type": "recommended", "weighting": "constant", "normalize": "loss"}, vp)
    assert changed.name == "speedit with weighting constant"
    with pytest.raises(ValueError, match="policy 'auto' has no parameter 'densty'; did you mean 'density'"):
        build_policy({"type": "recommended", "densty": "uniform"}, FLOW)
