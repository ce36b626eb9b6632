"""Scripts that draw rows of a flow-matching scheduler: what is drawn, weighed and refused."""

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.hosts.flow_script import FlowScript
from speedit_plugins.policies.policy import TimestepPolicy

T = 1000
ROWS = torch.arange(8)


def seam(policy: Any = "speed", *, scheme: str = "none", **options: Any) -> FlowScript:
    """For a scheduler with shift 3, with the weights that a script has under this scheme."""
    options = {"prediction_type": "flow", **options}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    own = lambda sigma: compute_loss_weighting_for_sd3(scheme, sigma)  # noqa: E731 - as in the README
    return FlowScript(policy, scheduler, weighting=own, **options)


def errors(num: int = len(ROWS)) -> tuple[Tensor, Tensor, Tensor]:
    """A prediction and a target (B, 2) in bfloat16, and the squared error (B,) of each row."""
    prediction = torch.arange(num).float().add(1).sqrt().bfloat16().view(-1, 1).repeat(1, 2)
    return prediction, torch.zeros_like(prediction), prediction[:, 0].double() ** 2


def cosmap(rows: Tensor) -> Tensor:
    """SD3's weights (B,) of this name, from their formula."""
    sigma = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas[rows].double()
    return 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2))


def test_rows_follow_the_policy_and_the_loss_its_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    drawing = seam("speed", generator=generator)
    rows = drawing.indices(torch.zeros(40_000, dtype=torch.int64))
    # Row 0 is noise, index 0 is clean. 4 sigma of a binomial frequency.
    density = drawing.policy.density.flip(0).view(10, -1).sum(1)
    shares = torch.bincount(rows // 100, minlength=10) / len(rows)
    assert bool(((shares - density).abs() < 4 * (density * (1 - density) / len(rows)).sqrt()).all())
    rows = drawing.indices(ROWS)
    prediction, target, error = errors()
    weight = drawing.policy.weight[T - 1 - rows]
    loss = drawing.mse_loss(prediction, target)
    assert loss.dtype == torch.float32
    # Rounding of a mean of 8 terms in float32. In bfloat16 the weights would be off by up to 4e-3.
    assert_close(loss.double(), (weight * error).mean(), rtol=1e-6, atol=0)
    drawing = seam("speed", num_parts=2)
    weight = drawing.policy.weight[T - 1 - drawing.indices(ROWS)]
    halves = [drawing.mse_loss(p, t, part=i) for i, (p, t) in enumerate(_halves(prediction, target))]
    assert_close(sum(halves).double() / 2, (weight * error).mean(), rtol=1e-6, atol=0)


def test_two_draws_before_two_losses() -> None:
    drawing = seam("speed")
    prediction, target, error = errors()
    drawn = [drawing.indices(ROWS) for _ in range(2)]
    for rows in (*drawn, drawn[0].clone()):
        weight = drawing.policy.weight[T - 1 - rows]
        loss = drawing.mse_loss(prediction, target, indices=rows)
        assert_close(loss.double(), (weight * error).mean(), rtol=1e-6, atol=0)
    for _ in range(2):
        drawing.indices(ROWS)
    drawing.mse_loss(prediction, target)
    with pytest.raises(ValueError, match="to which draw this loss belongs"):
        drawing.mse_loss(prediction, target)


def _halves(prediction: Tensor, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(prediction.chunk(2), target.chunk(2), strict=True))


def test_without_gradients_draw_and_loss_are_the_scripts() -> None:
    drawing = seam("loss_second_moment", scheme="none")
    weighing = seam("uniform", scheme="cosmap")
    state = torch.get_rng_state()
    prediction, target, error = errors()
    with torch.no_grad():
        assert drawing.indices(ROWS) is ROWS
        assert weighing.indices(ROWS) is ROWS
        assert_close(drawing.mse_loss(prediction, target).double(), error.mean(), rtol=1e-6, atol=0)
        loss = weighing.mse_loss(prediction, target)
        assert_close(loss.double(), (cosmap(ROWS) * error).mean(), rtol=1e-6, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert drawing.policy.num_steps == 0
    with pytest.raises(ValueError, match="drawn under torch.no_grad"):
        drawing.mse_loss(prediction, target)
    # An evaluation between a draw and its loss changes nothing.
    rows = weighing.indices(ROWS)
    with torch.no_grad():
        weighing.indices(ROWS[:2])
        weighing.mse_loss(*errors(2)[:2])
    loss = weighing.mse_loss(prediction, target)
    assert_close(loss.double(), (cosmap(rows) * error).mean(), rtol=1e-6, atol=0)


def test_every_part_has_the_weights_of_the_draw_and_teaches_the_policy() -> None:
    drawing = seam({"type": "uniform", "normalize": "loss"}, num_parts=2)
    prediction, target, error = errors()
    drawing.indices(ROWS)
    (first, last) = _halves(prediction, target)
    assert_close(drawing.mse_loss(*last, part=1).double(), error[4:].mean())
    assert_close(drawing.mse_loss(*first, part=0).double(), error[:4].mean())
    # The running mean keeps 0.95 of the first loss, and the next draw is divided by it.
    mean = 0.95 * error[4:].mean() + 0.05 * error[:4].mean()
    assert_close(drawing.policy.weight, torch.full((T,), 1 / float(mean), dtype=torch.float64))
    copy = seam({"type": "uniform", "normalize": "loss"})
    copy.load_state_dict(drawing.state_dict())
    assert torch.equal(copy.policy.weight, drawing.policy.weight)
    assert copy.policy.num_steps == 1
    with pytest.raises(ValueError, match="policy state needs policy 'speed'"):
        seam("speed").load_state_dict(drawing.state_dict())


def test_the_boundary_of_speed_moves_with_the_schedulers_shift() -> None:
    # Rows are shifted draws: 923 of 1,000 are before the moved boundary, 799 before a fixed one.
    for policy, wanted in (("speed", 923), ({"type": "speed", "snr_boundary": 1 / 143}, 799)):
        assert abs((seam(policy).policy.boundary_index or 0) - wanted) <= 1
    # A dynamic shift is one of sampling: the table has none.
    dynamic = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    policy = FlowScript("speed", dynamic, prediction_type="flow").policy
    assert abs((policy.boundary_index or 0) - 923) <= 1


def test_the_policy_observes_the_data_of_training_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    drawing, observed, data = seam("logit_normal"), list[Tensor](), torch.randn(8, 4)
    monkeypatch.setattr(drawing.policy, "observe", observed.append)
    drawing.indices(ROWS, data.clone().requires_grad_())
    with torch.no_grad():
        drawing.indices(ROWS, 2 * data)
    drawing.indices(ROWS)
    assert len(observed) == 1
    assert torch.equal(observed[0], data)
    monkeypatch.setattr(TimestepPolicy, "needs_data", True)
    with pytest.raises(ValueError, match="'logit_normal' needs the data of each batch"):
        drawing.indices(ROWS)


def test_a_policy_of_noise_prediction_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="'speedit' was made for a model of noise. On a rectified flow"):
        seam("speedit")


def test_min_snr_is_one_loss_for_both_targets() -> None:
    # min(SNR, 5) on the error of x_0. That error is sigma^2 times the error of the flow.
    sigma = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.double()
    clamped = ((1 - sigma) ** 2 / sigma**2).clamp(max=5.0)
    for prediction_type, wanted in (("x0", clamped), ("flow", clamped * sigma**2)):
        drawing = seam("min_snr", prediction_type=prediction_type)
        assert_close(drawing.policy.weight.flip(0), wanted, rtol=1e-5, atol=1e-9)


REFUSED = {
    "weighs the loss already, and the weights of 'speed'": lambda: seam("speed", scheme="cosmap"),
    "take a scheme without weights": lambda: seam("min_snr", scheme="sigma_sqrt"),
    "not a scheduler of flow matching": lambda: FlowScript("p2", DDPMScheduler(), prediction_type="flow"),
    "call indices": lambda: seam().mse_loss(*errors()[:2]),
    r"4 rows, and indices were drawn for 8 in 1 part\(s\)": lambda: _drawn().mse_loss(*errors(4)[:2]),
    "from 0 to 0, got 1": lambda: _drawn().mse_loss(*errors(4)[:2], part=1),
    "draws pairs": lambda: seam("speedit_reference", num_parts=2),
}


def _drawn() -> FlowScript:
    drawing = seam()
    drawing.indices(ROWS)
    return drawing


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_right_is_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
