"""Learned uncertainty weights.

Dims: `B` samples.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import small_config, small_trainer
from torch import Tensor, nn
from torch.testing import assert_close

from speedit_plugins.policies.policy import TimestepDraw
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.trainer.accelerations.objective import Objective, Outcome
from speedit_plugins.trainer.accelerations.uncertainty import LAYER, LearnedUncertainty, log_snr
from speedit_plugins.trainer.config.validation import ConfigError
from speedit_plugins.trainer.diffusion.flow import RectifiedFlow
from speedit_plugins.trainer.diffusion.gaussian_process import GaussianProcess, LossTerms
from speedit_plugins.trainer.models.training_only import layers_of


def outcome(process: Any, index: Tensor, weight: Tensor, scope: Any = "mse") -> Outcome:
    """An outcome of which only the timesteps and weights matter."""
    draw = TimestepDraw(index, (index + 0.5) / process.schedule.num_timesteps, weight, scope)
    noised = process.corrupt(torch.zeros(len(index), 1, 1, 1), draw)
    return Outcome(None, draw, noised, torch.zeros(1), None, lambda: None)  # type: ignore[arg-type]  # inputs are not read


@pytest.mark.parametrize("process", [GaussianProcess(NoiseSchedule.cosine(100)), RectifiedFlow()])
def test_at_its_optimum_u_is_the_log_of_the_mean_loss_at_the_noise_level(process: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    learned = LearnedUncertainty(model, process)
    head = layers_of(model)[LAYER]
    T = process.schedule.num_timesteps
    # Two losses at each of 50 levels, half and one and a half times a mean that falls over three decades.
    index = torch.arange(0, T, T // 50).repeat(2)
    mean = torch.exp(-3 + 3 * torch.cos(torch.pi * index / T))
    mse = mean * torch.tensor([0.5, 1.5]).repeat_interleave(50)
    given = outcome(process, index, torch.linspace(0.5, 2.0, 50).repeat(2))
    weighted = given.draw.weight * mse
    # The problem is convex, so that any descent finds the optimum.
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        terms = learned.terms(given, LossTerms(weighted, mse, torch.zeros_like(mse)))
        total = terms.loss.mean()
        total.backward()
        return total

    optimizer.step(closure)
    u = head(log_snr(process, given.noised)).detach()
    assert_close(u, torch.log(given.draw.weight * mean), atol=0.02, rtol=0)


@pytest.mark.parametrize("scope", ["mse", "loss"])
def test_all_but_the_bound_is_the_weighted_mse(scope: str) -> None:
    process = GaussianProcess(NoiseSchedule.cosine(100))
    given = outcome(process, torch.tensor([10, 80]), torch.tensor([0.5, 2.0]), scope)
    prediction = torch.tensor([0.1, -0.3]).view(1, 2, 1, 1).expand(2, -1, 1, 1)
    terms = process.loss(prediction, given.noised, given.draw)
    assert_close(terms.loss - terms.bound, given.draw.weight * terms.mse)
    assert terms.vb.min() > 0


def test_loss_and_gradients_are_those_of_the_formula() -> None:
    process, model = GaussianProcess(NoiseSchedule.cosine(100)), nn.Linear(1, 1)
    learned = LearnedUncertainty(model, process)
    linear = layers_of(model)[LAYER].linear
    nn.init.normal_(linear.weight, std=0.1)
    weight = torch.tensor([0.5, 2.0])
    given = outcome(process, torch.tensor([10, 80]), weight)
    mse, bound = torch.tensor([0.3, 0.1], requires_grad=True), torch.tensor([2.0, 0.5], requires_grad=True)
    u = layers_of(model)[LAYER](log_snr(process, given.noised))
    wanted = weight * mse / torch.exp(u) + u + bound
    found = learned.terms(given, LossTerms(weight * mse + bound, mse, bound, bound=bound)).loss
    assert_close(found, wanted)
    inputs = (mse, bound, linear.weight)
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), inputs, retain_graph=True),
        torch.autograd.grad(wanted.sum(), inputs),
        strict=True,
    ):
        assert_close(ours, theirs)


def test_a_zero_head_leaves_the_first_loss(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, uncertainty="true", contrastive__weight=0.05)
    batch = next(trainer.loader)
    generators = [torch.Generator().manual_seed(number) for number in range(len(batch["image"]))]
    given = trainer.inputs.encode(batch, generators)
    draw = trainer.policy.draw(len(given.latents), generator=torch.Generator().manual_seed(0))
    trainer.model.eval()
    plain = Objective(trainer.engine, trainer.objective.process, trainer.objective.accelerations[:1])
    terms = trainer.objective.losses(given, draw)
    assert_close(terms.loss, plain.losses(given, draw).loss)
    # The negative distances of contrastive flows do not teach u: it would fall without end.
    (gradient,) = torch.autograd.grad(terms.loss.sum(), layers_of(trainer.model)[LAYER].linear.bias)
    assert_close(gradient, (1 - draw.weight * terms.mse).sum().reshape(1), atol=1e-4, rtol=1e-4)


def test_the_noise_level_is_that_of_the_process() -> None:
    flow = RectifiedFlow(shift=3.0)
    index, one = torch.tensor([100, 900]), torch.ones(2)
    # t = s u / (1 + (s - 1) u) at the bin's middle.
    u = (index + 0.5) / 1000
    t = 3 * u / (1 + 2 * u)
    assert_close(log_snr(flow, outcome(flow, index, one).noised), 2 * torch.log((1 - t) / t))
    process = GaussianProcess(
        NoiseSchedule.linear(1000).zero_terminal_snr(), prediction_type="v", learn_sigma=False
    )
    found = log_snr(process, outcome(process, torch.tensor([5, 999]), one).noised)
    assert_close(found[0], process.schedule.log_snr[5].float())
    # Pure noise has no finite log-SNR; the head takes it for the noisiest level that has one.
    assert found[1] == -torch.inf
    model = nn.Linear(1, 1)
    LearnedUncertainty(model, process)
    nn.init.normal_(layers_of(model)[LAYER].linear.weight)
    noisiest = process.schedule.log_snr[998:].float()
    assert_close(*layers_of(model)[LAYER](noisiest))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diffusion__policy": "{type: uncertainty}"}, "both do the same; wanted one"),
        ({"diffusion__policy": "{density: uniform, weighting: uncertainty}"}, "both do the same"),
        ({"diffusion__policy": "{density: uniform, weighting: {type: uncertainty}}"}, "both do the same"),
        (
            {"diffusion__policy": "{type: speed, normalize: loss}"},
            "normalize: loss does; wanted one of the two",
        ),
        ({"plugin": "gemini"}, "wanted plugin ddp, zero1, zero2 or fsdp2"),
    ],
)
def test_what_does_the_same_or_cannot_hold_it_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"uncertainty: .*{message}"):
        small_config(tmp_path, uncertainty="true", **changes)
