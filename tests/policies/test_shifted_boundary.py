"""SpeeD's boundary under a shift: the share of the draws past it stays the same."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.policies.schedule import CONVERGENCE_SNR
from speedit_plugins.policies.shifted_boundary import moves_with_shift, with_shifted_boundary

T = 1000


def shifted_flow(shift: float) -> NoiseSchedule:
    """Rows of equal share of uniform draws that are shifted."""
    u = (torch.arange(T, dtype=torch.float64) + 0.5) / T
    t = shift * u / (1 + (shift - 1) * u)
    return NoiseSchedule(1 - t, t, torch.arange(T), T)


@given(st.floats(0.1, 10.0))
def test_the_share_past_the_boundary_does_not_depend_on_the_shift(shift: float) -> None:
    policy = build_policy(with_shifted_boundary("speed", shift), shifted_flow(shift))
    # 1 / (1 + 143^-1/2) = 0.9228 of uniform draws are before it; rounding may move it by a row.
    assert policy.boundary_index is not None
    assert abs(policy.boundary_index - 923) <= 1
    # log-SNR -4.963 - 2 ln s.
    config: Any = with_shifted_boundary("speed", shift)
    boundary = CONVERGENCE_SNR if isinstance(config, str) else config["snr_boundary"]
    assert torch.tensor(boundary).log().item() == pytest.approx(
        -4.963 - 2 * torch.tensor(shift).log().item(), abs=1e-3
    )


@pytest.mark.parametrize(
    "config",
    [
        {"type": "speed", "k": 3.0, "stratified": True},
        {"density": {"type": "thinned", "k": 3.0}, "weighting": "constant"},
        {"type": "speed", "density": {"k": 3.0}},
        {"type": "p2", "density": "thinned"},
    ],
)
def test_it_moves_in_every_form_of_the_config(config: dict[str, Any]) -> None:
    before = build_policy(config, shifted_flow(3.0))
    after = build_policy(with_shifted_boundary(config, 3.0), shifted_flow(3.0))
    # Of shifted draws 1 - b / (3 - 2 b) = 0.2 are past a fixed boundary, see test_flow.py.
    assert abs((before.boundary_index or 0) - 799) <= 1
    assert abs((after.boundary_index or 0) - 923) <= 1
    assert before.density[0] / before.density[-1] == pytest.approx(
        float(after.density[0] / after.density[-1])
    )


@pytest.mark.parametrize(
    "config",
    [
        {"type": "speed", "snr_boundary": CONVERGENCE_SNR},
        {"type": "speed", "tau": 700},
        {"density": {"type": "thinned", "tau": 700}, "weighting": "constant"},
        {"type": "speed", "density": {"snr_boundary": 0.1}},
        {"type": "speed", "density": "uniform"},
        {"type": "speed", "shift": 3.0},
        "speedit",
        "speed_reference",
        {"density": "logit_normal", "weighting": "constant"},
        build_policy("speed", NoiseSchedule.linear(T)),
    ],
    ids=str,
)
def test_it_stays_where_it_is_given(config: Any) -> None:
    assert not moves_with_shift(config)
    assert with_shifted_boundary(config, 3.0) is config
