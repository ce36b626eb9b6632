"""Seam B for losses with an `interpolant`: REPA's and REG's `SILoss`, and REPA-E's model.

Dims: B batch, N tokens, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from conformance import flow, points
from conformance.environments import process_group
from conformance.flow import FlowSeam, recorded, same_noise
from conformance.models import SmallModel
from conformance.points import on, refused, same
from conformance.seam import POLICY, Batch, Seam, Terms, gradient, new_process, seeded, trained
from speedit_plugins.hosts.entry import with_policy
from speedit_plugins.hosts.states.policy_state import policy_of

WIDTH = 8


class AlignedModel(SmallModel):
    """A model that also returns features (B, N, D) of its answer; for REG, an answer for the class token."""

    def forward(self, x: Tensor, t: Tensor, y: Any = None, cls_token: Tensor | None = None) -> Any:
        answer = super().forward(x, t)
        features = [answer.flatten(1).mean(1).view(-1, 1, 1).expand(-1, 1, WIDTH)]
        if cls_token is None:
            return answer, features
        return answer, features, torch.cos(self.scale * cls_token + t.view(-1, 1))


@dataclass(frozen=True)
class LossSeam(FlowSeam):
    """A `SILoss`, whose t = 0 is clean.

    Args:
        has_class_token: whether it trains a class token too, as REG's does.
    """

    has_class_token: bool = False

    @property
    def training_call(self) -> str:  # type: ignore[override]  # it depends on the host
        features, token = (
            "[x.flatten(1)[:, None]]",
            ", cls_token=x.flatten(1)" if self.has_class_token else "",
        )
        model = f"lambda x, t, **token: (model(x, t), {features}, *token.values())"
        return f"diffusion({model}, x, {{}}, zs={features}{token})[0]"

    def model(self, host: Any, dtype: torch.dtype = torch.float32) -> AlignedModel:
        return AlignedModel().to(dtype)

    def call(self, host: Any, model: Any, x: Tensor) -> dict[str, Any]:
        names = ["loss", "proj", "time_input", "noises", "class loss"]
        return dict(zip(names, host(model, x, {}, **self.conditions(x)), strict=False))

    def conditions(self, x: Tensor) -> dict[str, Any]:
        """Features of an encoder, and REG's class token (B, D): the same for each number of rows."""
        ones = torch.ones(len(x), WIDTH, dtype=x.dtype)
        return {"zs": [ones[:, None]], **({"cls_token": 0.5 * ones} if self.has_class_token else {})}

    def train(self, host: Any, model: Any, batch: Batch, t: Tensor | None = None) -> Terms:
        x, noise = batch
        with same_noise(noise), at(t):
            terms = self.call(host, model, x)
        loss = terms.pop("loss")
        # It is weighed, and has a check of its own.
        terms.pop("class loss", None)
        return Terms(loss, mse=loss, reported=terms)


@dataclass(frozen=True)
class ModelSeam(FlowSeam):
    """REPA-E's model, whose `forward` returns its loss. What is watched and trained is its embedding of t.

    Args:
        path: of the host.
    """

    path: str = "linear"
    training_call = (
        "diffusion(x, torch.zeros(len(x), dtype=torch.long), [torch.ones(len(x), 1, 8)],"
        " dict(align_only=False, weighting='uniform', path_type='linear', prediction='v'))['denoising_loss']"
    )

    def model(self, host: Any, dtype: torch.dtype = torch.float32) -> Any:
        embedder = host.to(dtype).t_embedder
        embedder.seen = []
        embedder.register_forward_pre_hook(_see)
        return embedder

    def many(self, num: int) -> Tensor:
        return torch.zeros(num, *self.shape[1:])

    def call(self, host: Any, model: Any, x: Tensor, **options: Any) -> dict[str, Any]:
        given = {"weighting": "uniform", "path_type": self.path, "prediction": "v", "align_only": False}
        given |= {key: options.pop(key) for key in list(options) if key in given}
        dtype = next(host.parameters()).dtype
        terms = host(
            x=x.to(dtype),
            y=torch.zeros(len(x), dtype=torch.long),
            zs=[torch.ones(len(x), 1, WIDTH, dtype=dtype)],
            loss_kwargs=given,
            **options,
        )
        return {"loss": terms["denoising_loss"], **{k: v for k, v in terms.items() if k != "denoising_loss"}}

    def train(self, host: Any, model: Any, batch: Batch, t: Tensor | None = None) -> Terms:
        x, noise = batch
        time = None if t is None else t.view(-1, *[1] * (x.dim() - 1))
        with same_noise(noise):
            terms = self.call(host, model, x, time_input=time)
        loss = terms.pop("loss")
        return Terms(loss, mse=loss, reported={"proj": terms["proj_loss"], "time_input": terms["time_input"]})

    def as_the_model_sees(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.make().bn.to(x.dtype)(x.detach())
        return normalised

    def sample(self, host: Any) -> Tensor:
        return self.sampler(host, host)


def loss_seam(
    factory: Callable[..., Any], sampler: Callable[[Any, Any], Tensor], *, has_class_token: bool = False
) -> LossSeam:
    """The seam of a `SILoss`.

    Args:
        factory: makes it, from further options of the host.
        sampler: see `FlowSeam`.
        has_class_token: see `LossSeam`.
    """
    return LossSeam(factory, _no_replay, _same, sampler, (6, 4, 4, 4), has_class_token=has_class_token)


def model_seam(factory: Callable[[], Any], sampler: Callable[[Any, Any], Tensor]) -> ModelSeam:
    """The seam of REPA-E's model, from a function that makes a small one: 2 x 2 pixels in 4 channels."""
    return ModelSeam(factory, _no_replay, _same, sampler, (6, 4, 2, 2))


@contextmanager
def at(t: Tensor | None) -> Iterator[None]:
    """The host draws these timesteps (B,) for a batch of their size. None lets it draw."""
    own = torch.rand

    def given(*args: Any, **kwargs: Any) -> Tensor:
        drawn = own(*args, **kwargs)
        return t.clone().view(drawn.shape) if t is not None and len(drawn) == len(t) else drawn

    with mock.patch.object(torch, "rand", given):
        yield


def both_paths_have_their_levels(seam: LossSeam) -> None:
    """Point 1: the policy's noise levels are those of the host's path, and so is what the model predicts."""
    for path, sigma, predicted in (
        ("linear", torch.tensor(0.5), "flow"),
        ("cosine", torch.tensor(0.5).sqrt(), "v"),
    ):
        host = with_policy(seam.factory(path_type=path), "min_snr")
        schedule = policy_of(host).schedule
        middle = schedule.sigma[499:501].mean().float()
        assert_close(middle, sigma, rtol=1e-5, atol=0)
        assert schedule.sigma[0] < schedule.sigma[-1], "index 0 is not the cleanest"
        refused(
            lambda path=path: with_policy(seam.factory(path_type=path), POLICY, prediction_type="epsilon"),
            f"predicts {predicted}",
        )


def lognormal_draws_are_thinned_or_replaced(seam: LossSeam) -> None:
    """Point 1: `speed` thins the host's log-normal law, and a policy with a law of its own replaces it."""
    n = flow.NUM_DRAWS

    def drawn(policy: Any) -> Tensor:
        host = with_policy(seam.factory(weighting="lognormal"), policy)
        model = seam.model(host)
        seam.call(host, model, seam.many(n))
        seen: Tensor = model.seen[-1]
        return seen

    # t = sigma / (1 + sigma) with log sigma normal: P(t > 0.9) = P(z > log 9) = 0.0140.
    for policy, share in (("uniform", 0.0140), ("logit_normal", 0.0140)):
        found = float((drawn(policy) > 0.9).double().mean())
        # 4 sigma of a binomial frequency.
        assert abs(found - share) < 4 * (share / n) ** 0.5, f"{policy}: {found:.4f} are past 0.9"
    density = policy_of(with_policy(seam.factory(), "speed")).density.float()
    late = drawn("speed") > 0.95
    # P(z > log 19) = 0.00162 of the host's draws, and fewer are kept than of the others.
    kept = float(density[-1] / density[0]) * 0.00162
    assert float(late.double().mean()) < kept + 4 * (kept / n) ** 0.5 + 1e-4, "speed thins nothing"


def class_token_is_weighed_alike(seam: LossSeam) -> None:
    """Point 2: REG's loss of the class token has the image's weights, and the projection loss has none."""
    if not seam.has_class_token:
        return
    step = trained(seam)
    for host, t in ((seam.make(), step.t), (seam.attached(POLICY, seeded()), None)):
        new_process()
        torch.manual_seed(7)
        x, noise = seam.batch()
        with same_noise(noise), at(t):
            terms = seam.call(host, seam.model(host), x)
        if t is not None:
            wanted = step.draw.weight * terms["class loss"]
    # Two roundings of float32.
    assert_close(terms["class loss"], wanted, rtol=2e-7, atol=0)


def another_t_is_refused(seam: LossSeam) -> None:
    """Point 1: a loss that gives its model another t than `interpolant` got."""

    class Changed(type(seam.make())):  # type: ignore[misc]  # the host's class
        def interpolant(self, t: Tensor) -> Any:
            return super().interpolant(t.mul_(1))

        def __call__(self, model: Any, images: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(lambda x, t, **given: model(x, 0.5 * t, **given), images, *args, **kwargs)

    host = seam.make()
    host.__class__ = Changed
    host = with_policy(host, POLICY)
    model = seam.model(host)
    # Its wrapper halves t before the watched model gets it.
    refused(lambda: seam.call(host, model, torch.zeros(seam.shape)), "another t than the policy drew")


def aligned_calls_share_their_t(seam: ModelSeam) -> None:
    """Point 2: REPA-E aligns its VAE at a t, and then trains its model at the same one, with its weights."""
    host = with_policy(seam.make(), POLICY, generator=seeded())
    model, (x, _) = seam.model(host), seam.batch()
    aligned = seam.call(host, model, x, align_only=True)
    assert aligned["loss"] is None, "the host makes a denoising loss where it aligns"
    refused(lambda: seam.call(host, model, x, time_input=0.5 * aligned["time_input"]), "not the t that the")
    given = {name: aligned[name] for name in ("time_input", "noises")}
    with recorded(host) as drawn:
        ours = seam.call(host, model, x, **given)
    plain = seam.make()
    theirs = seam.call(plain, seam.model(plain), x, **given)
    assert torch.equal(model.seen[0], model.seen[-1]), "the two calls have another t"
    assert torch.equal(drawn[0].time, model.seen[-1]), "the weights are those of another t"
    assert_close(ours["loss"], drawn[0].weight * theirs["loss"], rtol=2e-7, atol=0)
    assert policy_of(host).num_steps == 1, f"the two calls count as {policy_of(host).num_steps} steps"


def running_statistics_are_the_hosts(seam: ModelSeam) -> None:
    """Point 3: a batch counts once in the batch norm, also where the host's draws are thinned."""
    kept = []
    for host in (seam.make(), seam.attached("speed")):
        host.bn.train()
        seam.call(host, seam.model(host), seam.batch()[0])
        kept.append(torch.cat([host.bn.running_mean, host.bn.running_var, host.bn.num_batches_tracked[None]]))
    assert torch.equal(*kept), "other running statistics"


def wrapped_host_trains_alike(seam: ModelSeam) -> None:
    """Point 8: the model itself compiled, and under DDP; and accelerate's wrapper before the policy."""
    first = trained(seam)
    first.terms.loss.mean().backward()
    with process_group():
        for wrap in (_compiled, nn.parallel.DistributedDataParallel):
            new_process()
            host = seam.attached(POLICY, seeded())
            model = seam.model(host)
            torch.manual_seed(7)
            terms = seam.train(wrap(host), model, seam.batch())
            same(terms, first.terms, wrap.__name__)
            terms.loss.mean().backward()
            found, wanted = gradient(model), gradient(first.model)
            assert found is not None, f"{wrap.__name__}: no gradient"
            assert wanted is not None, "no gradient without a wrapper"
            # A compiled sum may be in another order.
            assert_close(found, wanted)
    prepared = seam.make()
    prepared.forward = prepared.forward
    refused(lambda: with_policy(prepared, POLICY), "before accelerator.prepare")


def _compiled(model: nn.Module) -> Any:
    torch.compiler.reset()
    return torch.compile(model, backend="eager")


def _see(module: Any, args: tuple[Tensor, ...]) -> None:
    module.seen.append(args[0].detach().flatten().clone())


def _same(t: Tensor) -> Tensor:
    return t


def _no_replay(*_: Any) -> Any:
    raise AssertionError("train() gives the host its t")


def _paths(seam: Any) -> list[Seam]:
    """Both paths of the host."""
    if isinstance(seam, ModelSeam):
        return [replace(seam, path=path) for path in ("linear", "cosine")]
    factory = seam.factory
    # REG's class token has no cosine path: its shapes do not fit there.
    paths = ("linear",) if seam.has_class_token else ("linear", "cosine")
    return [replace(seam, factory=lambda path=path, **o: factory(path_type=path, **o)) for path in paths]


LossSeam.contract = FlowSeam.contract | {
    1: (
        *FlowSeam.contract[1],
        both_paths_have_their_levels,
        lognormal_draws_are_thinned_or_replaced,
        another_t_is_refused,
    ),
    2: (on(_paths, points.loss_is_weighted), class_token_is_weighed_alike),
    3: (
        on(_paths, points.uniform_is_the_host),
        points.evaluations_are_the_hosts,
        points.random_numbers_are_the_hosts,
        flow.uniform_is_the_run_without,
    ),
}
ModelSeam.contract = FlowSeam.contract | {
    2: (on(_paths, points.loss_is_weighted), aligned_calls_share_their_t),
    3: (*LossSeam.contract[3][:3], flow.uniform_is_the_run_without, running_statistics_are_the_hosts),
    8: (wrapped_host_trains_alike, flow.bfloat16_keeps_the_law),
}
