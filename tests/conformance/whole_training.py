"""Points 9 to 11: what holds through a whole training, and not only in its first steps.

 9. Draws, weights and losses follow an independent computation, through validations, a step that fails, and
    an interruption with a resume. A curriculum and weights that learn are a part of it.
10. What `torch.utils.checkpoint` computes again sees the draw of its forward pass, and counts once.
11. Data-parallel ranks draw differently, ranks of one group alike.

Dims: B batch, T timesteps.
"""

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from conformance.seam import Batch, Seam, Terms, new_process, refused
from speedit_plugins.hosts.draws import draw_stream
from speedit_plugins.hosts.draws.draw_stream import Replica
from speedit_plugins.hosts.states.policy_state import load_policy_state, policy_of, policy_state
from speedit_plugins.policies import expected_calls
from speedit_plugins.policies.policy import TimestepDraw

Table = NDArray[np.float64]
SEED = 11
CURRICULUM_STEPS = 150
# A density that moves, weights that differ, and a divisor that learns.
LIVELY = {
    "density": {"type": "clts", "curriculum_steps": CURRICULUM_STEPS},
    "weighting": {"type": "p2", "gamma": 0.5},
    "normalize": "loss",
}
TOLERANCE = 2e-7
# Few, so that every test of a seam can afford them. check_hosts.py takes 200.
NUM_STEPS = 12


class Expected:
    """An independent computation of `LIVELY`: its tables, its divisor, and the draws of a rank.

    Args:
        snr: of the host's schedule, (T,).
        rank: of this process.
        part: number of the unet, in an object with several.
    """

    def __init__(self, snr: Table, rank: int = 0, part: int = 0) -> None:
        self._snr, self._rank, self._part = snr, rank, part
        self.step = 0
        self._mean_loss: float | None = None

    def begin(self) -> None:
        """A training call: the curriculum moves to the number of those before."""
        T = len(self._snr)
        t = np.arange(T)
        bell = np.exp(-(((t - 0.3 * T) / (0.25 * T)) ** 2) / 2)
        c = min(1.0, self.step / CURRICULUM_STEPS)
        self.density: Table = (1 - c) / T + c * bell / bell.sum()
        relative = (1 + self._snr) ** -0.5
        self.relative: Table = relative / (self.density * relative).sum()
        self.weight: Table = self.relative / (self._mean_loss or 1.0)
        self.step += 1

    def drawn(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """The timesteps (B,) of this step, and their times: the inverse of the cumulative density."""
        stream = _hashed(SEED, 0, self._part)
        generator = torch.Generator().manual_seed(_hashed(stream, self._rank, self.step - 1))
        quantile = torch.rand(batch_size, dtype=torch.float64, generator=generator).numpy()
        upper = np.cumsum(self.density)
        upper /= upper[-1]
        index = np.searchsorted(upper, quantile, side="right")
        inside = (quantile - upper[index] + self.density[index]) / self.density[index]
        time = (index + inside.clip(0, 1)) / len(upper)
        return torch.from_numpy(index), torch.from_numpy(time).float()

    def learn(self, index: Table, loss: Table) -> None:
        """The divisor follows the losses of all ranks."""
        mean = float((self.relative[index.astype(int)] * loss).mean())
        self._mean_loss = 0.95 * (mean if self._mean_loss is None else self._mean_loss) + 0.05 * mean


def _hashed(*numbers: int) -> int:
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") // 2


def whole_training(
    seam: Seam, num_steps: int, *, rank: int = 0, gather: Callable[[Tensor], Tensor] = lambda rows: rows
) -> None:
    """Point 9: every step of a training has the expected t, weight and loss.

    Args:
        seam: of the host.
        num_steps: a validation comes before each fifth, a failing step in the first quarter, and in the
            middle the training is interrupted and goes on with new objects.
        rank: of this process.
        gather: rows of this rank to rows of all ranks.
    """
    torch.manual_seed(SEED)
    new_process()
    host = seam.attached(LIVELY)
    model, expected = seam.model(host, seam.dtype), None
    # The host's object without a policy, and a model for it.
    plain = seam.make()
    twin = seam.model(plain, seam.dtype)
    with seeds_kept():
        for step in range(num_steps):
            if step == num_steps // 4:
                _fail(seam, host, model, expected)
            if step == num_steps // 2:
                host, model = _resumed(seam, host, model)
            if step % 5 == 0 and rank == 0:
                _validate(seam, host, model)
            batch = _batch(seam, 1000 * rank + step)
            terms = seam.train(host, model, batch)
            if expected is None:
                expected = Expected(policy_of(seam.holder(host)).schedule.snr.numpy(), rank, seam.part)
            expected.begin()
            twin.load_state_dict(model.state_dict())
            rows = _checked(seam, (host, model, terms), (plain, twin, batch), expected, f"step {step}")
            index, loss = gather(rows).numpy().T
            for _ in range(seam.num_losses):
                expected.learn(index, loss)
            _descend(model, terms)


def training_holds(seam: Seam) -> None:
    """Point 9. No seam is warned that it leaves out a call that the policy needs."""
    with warnings.catch_warnings(), mock.patch.object(expected_calls, "NUM_DRAWS", 2):
        warnings.filterwarnings("error", "policy .* stays as it began")
        whole_training(seam, NUM_STEPS)


def recomputation_is_one_call(seam: Seam) -> None:
    """Point 10: two micro-batches wait for one backward pass; its order is the reverse of theirs."""
    if not seam.draws_in_the_call:
        _drawing_again_is_refused(seam)
        return
    for is_reentrant, policy in ((False, LIVELY), (True, seam.reentrant_policy or LIVELY)):
        kind = f"use_reentrant={is_reentrant}"
        losses, gradients, seen, state = _two_calls(seam, policy)
        again = _two_calls(seam, policy, use_reentrant=is_reentrant)
        theirs, their_gradients, their_seen, their_state = again
        assert all(map(torch.equal, losses, theirs)), f"{kind}: another loss"
        assert state == their_state, f"{kind}: the policy's state is {their_state}"
        # Imagen's calls are computed again in the forward pass too, to find the loss that it minimises.
        assert len(their_seen) >= 2 * len(seen), f"{kind}: nothing was computed again"
        others = [t for t in their_seen if t not in seen]
        assert not others, f"{kind}: computed again at {others}, drawn {seen}"
        for mine, wanted in zip(their_gradients, gradients, strict=True):
            assert torch.allclose(mine, wanted, rtol=1e-5, atol=1e-8), f"{kind}: another gradient"


def _two_calls(seam: Seam, policy: Any, **options: bool) -> tuple[list[Tensor], list[Tensor], Any, Any]:
    """Losses, gradients, t and state of two training calls, in a checkpoint if there are options for it."""
    torch.manual_seed(SEED)
    new_process()
    host, losses = seam.attached(policy), []
    model = seam.model(host, seam.dtype)
    with seeds_kept():
        for x, noise in (_batch(seam, 1), _batch(seam, 2)):

            def loss_of(x: Tensor, noise: Tensor = noise) -> Tensor:
                return seam.train(host, model, (x, noise)).loss.sum()

            x.requires_grad_()
            losses.append(checkpoint(loss_of, x, **options) if options else loss_of(x))
        torch.stack(losses).sum().backward()
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    seen = [t.tolist() for t in model.seen if len(t) == len(x)]
    return losses, gradients, seen, policy_state(seam.holder(host))["policies"][0]


def _drawing_again_is_refused(seam: Seam) -> None:
    host = seam.attached()
    model, (x, noise) = seam.model(host), seam.batch()
    loss = checkpoint(
        lambda x: seam.train(host, model, (x, noise)).loss.mean(), x.requires_grad_(), use_reentrant=False
    )
    refused(loss.backward, "runs this twice")


def ranks_draw_differently(seam: Seam) -> None:
    """Point 11: with one seed for all."""
    seen = []
    for replica in (Replica(0, 2), Replica(1, 2), Replica(1, 2)):
        with mock.patch.object(draw_stream, "replica", lambda _, replica=replica: replica):
            torch.manual_seed(SEED)
            new_process()
            host = seam.attached()
            model = seam.model(host)
            seam.train(host, model, seam.batch())
            seen.append(model.seen[-1])
    assert not torch.equal(seen[0], seen[1]), "two ranks drew the same timesteps"
    assert torch.equal(seen[1], seen[2]), "ranks of one group drew different timesteps"


@contextmanager
def seeds_kept() -> Iterator[None]:
    """A seam may seed the global generator for its own data; the host's seed stays as it was at its start."""
    with mock.patch.object(torch, "initial_seed", return_value=SEED):
        yield


def _batch(seam: Seam, number: int) -> Batch:
    x, noise = seam.batch(seam.dtype)
    generator = torch.Generator().manual_seed(number)
    scale = torch.rand(len(x), generator=generator, dtype=x.dtype).view(-1, *[1] * (x.dim() - 1))
    return x * scale, noise


def _validate(seam: Seam, host: Any, model: Any) -> None:
    before = str(policy_state(seam.holder(host)))
    with torch.no_grad():
        seam.train(host, model, _batch(seam, 0))
    assert str(policy_state(seam.holder(host))) == before, "a validation changed the policy's state"


def _fail(seam: Seam, host: Any, model: Any, expected: Expected | None) -> None:
    """A step that stops in the model, as when memory runs out. It has had its draw."""

    def failing(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with mock.patch.object(model, "forward", failing):
        try:
            seam.train(host, model, _batch(seam, 0))
        except MemoryError:
            pass
        else:
            raise AssertionError("the model was not called")
    assert expected is not None, "no step before"
    expected.begin()


def _resumed(seam: Seam, host: Any, model: Any) -> tuple[Any, Any]:
    """New objects of a new process, with the state from a checkpoint."""
    file = io.BytesIO()
    torch.save(policy_state(seam.holder(host)), file)
    file.seek(0)
    weights = model.state_dict()
    new_process()
    host = seam.attached(LIVELY)
    model = seam.model(host, seam.dtype)
    model.load_state_dict(weights)
    load_policy_state(seam.holder(host), torch.load(file, weights_only=True))
    return host, model


def _checked(
    seam: Seam,
    trained: tuple[Any, Any, Terms],
    plain: tuple[Any, Any, Batch],
    expected: Expected,
    where: str,
) -> Tensor:
    """Index and unweighted loss of each sample of a step, float64 (B, 2). It is as expected.

    Args:
        seam: of the host.
        trained: the host's object with the policy, its model, and the terms of the step.
        plain: the host's object without a policy, a model with the same weights, and the batch.
        expected: of this step.
        where: for messages.
    """
    host, model, terms = trained
    policy, index = policy_of(seam.holder(host)), seam.chosen(host, model)
    is_ours = index is None
    if index is None:
        index, time = expected.drawn(len(plain[2][0]))
    else:
        time = index.float()
    draw = TimestepDraw(index, time, torch.from_numpy(expected.weight)[index], policy.scope)
    assert not is_ours or seam.sees(host, draw, model.seen[-1]), f"{where}: another t"
    theirs = seam.train(*plain, seam.hosts_t(draw, model))
    assert theirs.mse is not None, "the host's mse is not known"
    mse, rest = theirs.mse.detach().double(), torch.as_tensor(theirs.vb).detach().double()
    wanted = draw.weight * mse + rest
    wanted = wanted if terms.loss.dim() else wanted.mean()
    error = float(((terms.loss.detach() - wanted).abs() / wanted.abs()).max())
    assert error <= TOLERANCE, f"{where}: the loss misses w * mse + vb by {error:.1e} relative"
    return torch.stack([index.double(), (mse + rest).float().double()], dim=1)


def _descend(model: Any, terms: Terms) -> None:
    """A step of gradient descent, so that the losses fall."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    gradients = torch.autograd.grad(terms.loss.mean(), parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter -= 0.05 * gradient.clamp(-1, 1)
