"""Seam E, what an edited script calls: rows that it draws, its weights, the data and errors that it shows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from scipy import stats
from torch import Tensor

from speedit_plugins import build_policy, policy_of, policy_state
from speedit_plugins.hosts.schedules import from_diffusers
from speedit_plugins.hosts.sigma_calls import SigmaCalls

B, T = 16, 1000


def scheduler(shift: float = 3.0) -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Script:
    """A training step as diffusers' flow scripts write it, with the five edits."""

    def __init__(self, calls: SigmaCalls, *, scheme: str = "none", is_reversed: bool = False) -> None:
        self.calls, self.scheme, self.is_reversed = calls, scheme, is_reversed
        self.scheduler = scheduler()
        self.options: dict[str, Any] = {"is_reversed": is_reversed}
        self.size = B

    def density(self) -> Tensor:
        return compute_density_for_timestep_sampling(self.scheme, self.size, 0.0, 1.0, 1.29)

    def drawn(self) -> Tensor:
        u = self.calls.density(self.density, lambda: self.scheduler, **self.options)
        sigmas: Tensor = self.scheduler.sigmas[self.calls.checked((u * T).long())]
        return sigmas

    def step(self, x: Tensor, parts: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Sigmas (B,), squared errors (B,) and the loss (B,) of a step, whose prediction is 0."""
        sigmas = self.drawn().view(-1, 1, 1, 1)
        noise = torch.randn(x.shape, generator=seeded())
        noisy = sigmas * noise + (1.0 - sigmas) * self.calls.data(x)
        weighting = self.calls.weighting(
            compute_loss_weighting_for_sd3, weighting_scheme=self.scheme, sigmas=sigmas
        )
        square = noisy**2
        for part in square.chunk(parts):
            self.calls.error(part)
        loss = (weighting.float() * square).flatten(1).mean(1)
        return sigmas.flatten(), square.flatten(1).mean(1), loss


def images() -> Tensor:
    return torch.randn(B, 2, 4, 4, generator=seeded(1))


@pytest.mark.parametrize("config", ["speed", "logit_normal", {"type": "spectral_flow", "mean": -2.0}])
@pytest.mark.parametrize("is_reversed", [False, True])
def test_sigmas_follow_the_law_of_the_schedulers_own_table(config: Any, is_reversed: bool) -> None:
    script = Script(SigmaCalls(config, generator=seeded()), is_reversed=is_reversed)
    script.size = 20_000
    sigmas = script.drawn()
    policy = script.calls.policy
    # The law over rows, noise first; a reversed script has data first.
    law = policy.density if is_reversed else policy.density.flip(0)
    rows = (sigmas[:, None] == script.scheduler.sigmas[None]).int().argmax(1)
    tenths = torch.stack([part.sum() for part in law.split(T // 10)])
    found = torch.bincount(rows // (T // 10), minlength=10)
    keep = tenths * len(rows) > 5
    expected = tenths[keep] / tenths[keep].sum() * found[keep].sum()
    assert stats.chisquare(found[keep].numpy(), expected.numpy()).pvalue > 1e-6
    if config == "logit_normal" and not is_reversed:
        # The shift of the table moves the mean, as it does for the script's own logit-normal u.
        assert float(torch.logit(sigmas.clamp(1e-4, 1 - 1e-4)).mean()) == pytest.approx(1.0986, abs=0.05)


def test_weights_are_those_of_the_sigma_on_the_scheduler() -> None:
    script = Script(SigmaCalls("min_snr", generator=seeded()))
    sigmas, square, loss = script.step(images())
    policy = build_policy("min_snr", from_diffusers(scheduler()), "flow")
    rows = (sigmas[:, None] == scheduler().sigmas[None]).int().argmax(1)
    weight = policy.weight[T - 1 - rows].float()
    assert len(weight.unique()) > 5
    torch.testing.assert_close(loss, weight * square, rtol=2e-6, atol=0)


def test_the_uniform_policy_is_the_script_at_the_same_rows_to_the_bit() -> None:
    script = Script(SigmaCalls("uniform", generator=seeded()), scheme="cosmap")
    sigmas, _, loss = script.step(images())
    noise = torch.randn(images().shape, generator=seeded())
    grown = sigmas.view(-1, 1, 1, 1)
    weighting = compute_loss_weighting_for_sd3("cosmap", grown)
    noisy = grown * noise + (1.0 - grown) * images()
    assert torch.equal(loss, (weighting.float() * noisy**2).flatten(1).mean(1))


def test_without_gradients_everything_is_the_scripts() -> None:
    script = Script(SigmaCalls("min_snr"), scheme="sigma_sqrt")
    with torch.no_grad():
        torch.manual_seed(3)
        sigmas, square, loss = script.step(images())
        torch.manual_seed(3)
        own = script.scheduler.sigmas[(script.density() * T).long()]
    assert torch.equal(sigmas, own)
    torch.testing.assert_close(loss, sigmas**-2 * square)
    with pytest.raises(ValueError, match="before the policy drew u"):
        policy_of(script.calls)


def test_data_and_losses_reach_the_policy_once_a_draw() -> None:
    script = Script(SigmaCalls("auto"))
    for _ in range(70):
        script.step(images())
        script.calls.data(torch.full((B, 2, 4, 4), 1e6))
    # It measures 1,000 images, and none of those that came a second time.
    assert 0.5 < script.calls.policy.density.sum() < 1.5
    assert policy_state(script.calls)["policies"][0]["num_steps"] == 70
    learning = Script(SigmaCalls("loss_balanced", generator=seeded()))
    before = None
    for _ in range(60):
        learning.step(images())
        before = learning.calls.policy.density.clone() if before is None else before
    assert not torch.equal(before, learning.calls.policy.density)


def test_a_table_that_changes_takes_the_state_along() -> None:
    script = Script(SigmaCalls("clts", generator=seeded()))
    shifts = [1.0, 3.0, 6.0, 1.0, 3.0]
    for shift in shifts:
        script.scheduler = scheduler(shift)
        script.step(images())
    assert script.calls.state_dict()["num_steps"] == len(shifts)
    resumed = SigmaCalls("clts")
    resumed.load_state_dict(script.calls.state_dict())
    Script(resumed).step(images())
    assert resumed.state_dict()["num_steps"] == len(shifts) + 1


def test_rows_of_another_branch_are_replaced_in_their_dtype() -> None:
    calls, noisy = SigmaCalls("logit_normal", generator=seeded()), scheduler(1.0)
    rows = calls.rows(lambda: torch.randint(0, T, (5000,), dtype=torch.int32), lambda: noisy)
    assert rows.dtype == torch.int32
    assert calls.checked(rows) is rows
    assert float(torch.logit(noisy.sigmas[rows.long()].clamp(1e-4, 1 - 1e-4)).std()) == pytest.approx(
        1, abs=0.05
    )
    with torch.no_grad():
        assert calls.rows(lambda: torch.full((3,), 7), lambda: noisy).tolist() == [7, 7, 7]


def _of_part(script: Script) -> None:
    u = script.calls.density(script.density, lambda: script.scheduler)
    script.calls.checked((u * 400).long())


def _other_sigmas(script: Script) -> None:
    sigmas = script.drawn().view(-1, 1, 1, 1)
    script.calls.weighting(compute_loss_weighting_for_sd3, weighting_scheme="none", sigmas=sigmas * 0.9)


def _ddpm(script: Script) -> None:
    script.scheduler = type("Masked", (), {"sigmas": torch.ones(3)})()
    script.drawn()


def _unseen(script: Script) -> None:
    for _ in range(10):
        script.drawn()


@pytest.mark.parametrize(
    ("config", "act", "message"),
    [
        ("uniform", _of_part, "looks its timesteps up in other rows than the policy drew"),
        ("uniform", _other_sigmas, "at other sigmas than the policy drew"),
        ("uniform", _ddpm, "neither alphas_cumprod nor a table of sigmas"),
        ("auto", _unseen, "8 draws passed, and the host showed none"),
        (
            "min_snr",
            lambda s: s.options.update(has_weighting=False) or s.drawn(),
            "has no weights that could",
        ),
        ("loss_balanced", lambda s: s.options.update(has_error=False) or s.drawn(), "does not show it"),
        (
            "loss_balanced",
            lambda s: s.step(images(), parts=2),
            "learns from each loss, and this script splits",
        ),
        ({"type": "logit_normal", "draw": "paired"}, lambda s: s.step(images(), parts=2), "draws pairs"),
        ("speed_reference", lambda s: s.drawn(), "draws in pairs, and it thins"),
    ],
)
def test_what_cannot_be_served_is_refused(config: Any, act: Callable[[Script], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act(Script(SigmaCalls(config)))


def test_two_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="--weighting_scheme weighs the loss already"):
        Script(SigmaCalls("min_snr"), scheme="sigma_sqrt").step(images())


def test_preconditioned_outputs_are_a_model_of_data() -> None:
    script = Script(SigmaCalls("min_snr", generator=seeded()))
    script.options["preconditions"] = lambda: 1
    script.step(images())
    expected = build_policy("min_snr", from_diffusers(scheduler()), "x0")
    assert torch.equal(script.calls.policy.weight, expected.weight)
    assert not torch.equal(
        expected.weight, build_policy("min_snr", from_diffusers(scheduler()), "flow").weight
    )
