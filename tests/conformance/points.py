"""The contract: eleven points that the plugin keeps in every host. Each is written once, for all seams.

1. The model sees the t that was drawn.
2. Reported loss = weight[t] * mse + vb, within 2e-7 relative, 1e-12 in float64; other terms stay as they are.
3. The uniform policy gives the host's own loss to the bit at the same t and noise.
4. Sampling is the same to the bit, and asks the policy nothing.
5. Attributes, isinstance, deepcopy and pickling are the host's.
6. An object without the seam is refused, and so are options with which a policy would have no effect.
7. A second policy is refused, and without the policy the object is as before.
8. A compiled model and one under DDP train alike. With a bfloat16 default dtype every timestep is reached.

Points 9 to 11 are those of a whole training, see whole_training.py. `COMMON` lists the checks
of each point. The file of a seam says how its hosts are made, trained and sampled from, and adds or replaces
checks. Point 6 is different for every seam.
"""

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conformance.environments import default_dtype, wrapped_models
from conformance.seam import (
    POLICY,
    Check,
    Contract,
    Seam,
    Step,
    Terms,
    gradient,
    new_process,
    refused,
    replayed,
    seeded,
    trained,
)
from conformance.whole_training import ranks_draw_differently, recomputation_is_one_call, training_holds
from speedit_plugins.hosts.attachment import attachment_of, is_attached, without_policy
from speedit_plugins.hosts.entry import with_policy
from speedit_plugins.policies.policy import TimestepPolicy

PRECISIONS = ((torch.float32, 2e-7), (torch.float64, 1e-12))
# One of 1,000 timesteps is missed with probability (1 - 1/1000)^12000 = 6e-6. On average 0.006 are missed.
NUM_DRAWS = 12_000
Fields = Mapping[str, Any]


def check(subject: Any, contract: Contract | None = None) -> list[int]:
    """The numbers of the points that hold, in order.

    Args:
        subject: what the checks take, such as a `Seam`.
        contract: None is the subject's own.

    Raises:
        AssertionError: the first check that does not hold, its point and name first.
    """
    contract = subject.contract if contract is None else contract
    for point in sorted(contract):
        for each in contract[point]:
            torch.manual_seed(0)
            try:
                each(subject)
            except AssertionError as error:
                raise AssertionError(f"point {point}, {each.__name__}: {error}") from error
    return sorted(contract)


def on(settings: Iterable[Fields] | Callable[[Any], Iterable[Any]], check: Check) -> Check:
    """A check that runs in several settings: fields to replace, or what a function makes of the seam."""

    @wraps(check)
    def holds(seam: Any) -> None:
        given = settings(seam) if callable(settings) else [replace(seam, **each) for each in settings]
        for each in given:
            check(each)

    return holds


def draws_are_seen(seam: Seam) -> None:
    """Point 1."""
    step = trained(seam)
    seen = step.model.seen
    assert len(seen) == seam.num_losses, f"the model was called {len(seen)} times"
    for t in seen:
        assert seam.sees(step.host, step.draw, t), f"drew {step.draw.index}, the model saw {t}"


def data_are_observed(seam: Seam) -> None:
    """Point 1: the policy sees the data of every training step once, as the model does, and no others.

    Not those of a validation, and not again what a checkpoint computes again.
    """
    host, observed = seam.attached(), list[Tensor]()
    model, (x, noise) = seam.model(host), seam.batch()
    batches = [((1 - 0.1 * step) * x, noise) for step in range(3)]
    with mock.patch.object(TimestepPolicy, "observe", lambda _, data: observed.append(data)):
        for number, batch in enumerate(batches, start=1):
            seam.train(host, model, batch)
            with torch.no_grad():
                seam.train(host, model, (2 * x, noise))
            assert len(observed) == number, f"{len(observed)} batches observed in {number} steps"
        if seam.draws_in_the_call:
            batches.append((x.clone().requires_grad_(), noise))
            loss = checkpoint(
                lambda x: seam.train(host, model, (x, noise)).loss.sum(), batches[3][0], use_reentrant=False
            )
            loss.backward()
            assert len(observed) == 4, f"{len(observed) - 3} batches observed in a checkpoint, wanted one"
    for found, batch in zip(observed, batches, strict=True):
        assert not found.requires_grad, "the observed data have a gradient"
        assert torch.equal(found, seam.as_the_model_sees(batch[0])), "the policy observed other data"


def loss_is_weighted(seam: Seam) -> None:
    """Point 2, in float32 and float64; a policy of scope "loss" weighs all of it."""
    for policy in seam.policies:
        for dtype, tolerance in PRECISIONS:
            step = trained(seam, policy, dtype)
            plain = replayed(seam, step, dtype=dtype)
            direct = _weighted(step, plain.terms)
            error = float(((step.terms.loss - direct).abs() / direct.abs()).max().detach())
            assert error <= tolerance, (
                f"loss misses w * mse + vb by {error:.1e} relative, wanted {tolerance:.0e}"
            )
            for name, value in plain.terms.reported.items():
                assert torch.equal(step.terms.reported[name], value), f"{name} changed"
            step.terms.loss.mean().backward()
            found = gradient(step.model)
            assert found is not None, "no gradient reaches the model"
            if dtype is torch.float64 and direct.requires_grad:
                direct.mean().backward()
                wanted = gradient(plain.model)
                assert wanted is not None, "no gradient reaches the host's model"
                error = float((found - wanted).norm() / wanted.norm())
                assert error <= 1e-10, f"the gradient misses that of w * mse + vb by {error:.1e} relative"


def uniform_is_the_host(seam: Seam) -> None:
    """Point 3."""
    step = trained(seam, "uniform")
    same(step.terms, replayed(seam, step).terms)


def evaluations_are_the_hosts(seam: Seam) -> None:
    """Point 3 in a validation, with any policy: no draw, no weights, no step of a curriculum."""
    plain, ours = seam.make(), seam.attached()
    for contexts in zip(seam.evaluations(plain), seam.evaluations(ours), strict=True):
        seen: list[Tensor] = []
        terms: list[Terms] = []
        for host, evaluating in zip((plain, ours), contexts, strict=True):
            model = seam.model(host)
            torch.manual_seed(4)
            with evaluating:
                terms.append(seam.train(host, model, seam.batch()))
            seen += model.seen[-1:]
        assert torch.equal(*seen), f"the host evaluates at {seen[0]}, with a policy at {seen[1]}"
        same(terms[1], terms[0])
        assert seam.is_idle(ours), "the evaluation counted as training"


def random_numbers_are_the_hosts(seam: Seam) -> None:
    """Point 3: after training steps the global generator is where it would be, so the noise is the host's."""
    for policy in ("uniform", POLICY, "logit_normal"):
        states = []
        for host in (seam.make(), seam.attached(policy)):
            torch.manual_seed(3)
            for _ in range(2):
                seam.train(host, seam.model(host), seam.batch())
            states.append(torch.get_rng_state())
        assert torch.equal(*states), f"{policy} draws from the host's global generator"


def sampling_is_untouched(seam: Seam) -> None:
    """Point 4."""
    samples = []
    plain, ours = seam.make(), seam.idle()
    for host in (plain, ours):
        torch.manual_seed(3)
        with torch.no_grad():
            samples.append(seam.sample(host))
    assert torch.isfinite(samples[0]).all(), "the host samples nothing finite here"
    assert torch.equal(*samples), "another sample"
    assert seam.is_unused(ours), "sampling asked the policy"


def object_is_the_hosts(seam: Seam) -> None:
    """Point 5."""
    plain, host = seam.make(), seam.attached()
    assert isinstance(host, type(plain)), f"not a {type(plain).__name__}"
    lost, added = set(vars(plain)) - set(vars(host)), set(vars(host)) - set(vars(plain))
    assert not lost, f"lost {lost}"
    assert added == seam.added, f"added {added}, wanted {set(seam.added)}"
    if isinstance(plain, nn.Module):
        assert list(host.state_dict()) == list(plain.state_dict()), "another state dict"


def copies_train_alike(seam: Seam) -> None:
    """Point 5: a deep copy and a pickled one, unless the host's own object does not pickle."""
    # A generator cannot be copied, so this host has none of its own.
    host = seam.attached()
    terms: list[Terms] = []
    for each in (host, *_copies(host, can_pickle=_pickles(seam.make()))):
        assert type(each) is type(host), f"a copy is a {type(each).__name__}"
        assert is_attached(each), "a copy has no policy"
        new_process()
        assert each is host or attachment_of(each) is not attachment_of(host), "a copy shares its policy"
        torch.manual_seed(7)
        terms.append(seam.train(each, seam.model(each), seam.batch()))
        same(terms[-1], terms[0])


def wrapping_ends(seam: Seam) -> None:
    """Point 7."""
    plain, host = seam.make(), trained(seam).host
    refused(lambda: with_policy(host, POLICY), "has a policy already")
    bare = without_policy(host)
    assert bare is host, "another object came back"
    assert type(bare) is type(plain), f"left as {type(bare)}"
    left = set(vars(bare)) ^ set(vars(plain))
    assert left == seam.added - {"_speedit_attachment"}, f"left behind {left}"
    assert not is_attached(bare), "the policy is still there"


def host_trains_as_before(seam: Seam) -> None:
    """Point 7: the loss of an object after its policy was taken out."""
    step = trained(seam)
    same(replayed(seam, step, without_policy(step.host)).terms, replayed(seam, step).terms)


def wrapped_models_train_alike(seam: Seam) -> None:
    """Point 8: loss and gradient with a compiled model and with one under DDP."""
    first = trained(seam)
    first.terms.loss.mean().backward()
    wanted = gradient(first.model)
    model = seam.model(first.host)
    with wrapped_models(model) as others:
        for name in tuple(others):
            model.zero_grad()
            _trains_alike(seam, first, others[name], name)
            found = gradient(model)
            assert found is not None, f"{name}: no gradient"
            assert wanted is not None and torch.equal(found, wanted), f"{name}: another gradient"  # noqa: PT018 - one fact


def bfloat16_reaches_every_timestep(seam: Seam) -> None:
    """Point 8: draws under a bfloat16 default dtype."""
    with default_dtype(torch.bfloat16):
        host = seam.attached("uniform", seeded())
        model = seam.model(host)
        seam.train(host, model, seam.rows(NUM_DRAWS))
    reached = len(model.seen[-1].unique())
    assert reached == 1000, f"a bfloat16 default dtype reaches {reached} of 1000 timesteps"


def same(ours: Terms, theirs: Terms, what: str = "") -> None:
    """Raises AssertionError unless two steps have the same loss and terms, to the bit."""
    what = f"{what}: " if what else ""
    difference = float((ours.loss - theirs.loss).abs().max().detach())
    assert torch.equal(ours.loss, theirs.loss), f"{what}another loss, by {difference}"
    assert list(ours.reported) == list(theirs.reported), f"{what}terms {list(ours.reported)}"
    for name, value in theirs.reported.items():
        assert torch.equal(ours.reported[name], value), f"{what}another {name}"


COMMON: dict[int, tuple[Check, ...]] = {
    1: (draws_are_seen, data_are_observed),
    2: (loss_is_weighted,),
    3: (uniform_is_the_host, evaluations_are_the_hosts, random_numbers_are_the_hosts),
    4: (sampling_is_untouched,),
    5: (object_is_the_hosts, copies_train_alike),
    6: (),
    7: (wrapping_ends, host_trains_as_before),
    8: (wrapped_models_train_alike, bfloat16_reaches_every_timestep),
    9: (training_holds,),
    10: (recomputation_is_one_call,),
    11: (ranks_draw_differently,),
}


def _weighted(step: Step, plain: Terms) -> Tensor:
    """w * mse + vb of the host's own terms, (B,), or the mean of that if the host reports a mean."""
    assert plain.mse is not None, "the host's mse is not known"
    weight = step.draw.weight.to(plain.mse.dtype)
    direct = weight * plain.mse + (weight if step.draw.scope == "loss" else 1) * plain.vb
    return direct if step.terms.loss.dim() else direct.mean()


def _trains_alike(seam: Seam, first: Step, other: Any, name: str) -> None:
    """Makes the first step again with another model, up to its gradients. Keeps nothing of that model."""
    torch.manual_seed(7)
    new_process()
    terms = seam.train(seam.attached(POLICY, seeded()), other, seam.batch())
    same(terms, first.terms, name)
    terms.loss.mean().backward()


def _copies(host: Any, *, can_pickle: bool) -> Iterator[Any]:
    yield copy.deepcopy(host)
    if can_pickle:
        yield pickle.loads(pickle.dumps(host))  # noqa: S301 - made here


def _pickles(host: Any) -> bool:
    try:
        pickle.dumps(host)
    except (pickle.PicklingError, AttributeError):
        return False
    return True
