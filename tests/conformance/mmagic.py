"""The contract of `tools/conformance/contract.py` for mmagic, on whichever `mmagic` can be imported.

The points are those of contract.py, with mmagic's own reading of three:

3. The host has no loss of its own: the uniform policy gives, to the bit, the plain loss of a given t.
6. Also refused: a learned variance, which mmagic has no loss for, and a unet that answers one.
8. It works with a compiled model, one in DistributedDataParallel and a bfloat16 default dtype.

Dims: T timesteps, B batch.
"""

import copy
import pickle
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from conformance.contract import FLOAT32_TOLERANCE, FLOAT64_TOLERANCE, NUM_DRAWS, refused, run_points
from conformance.environments import default_dtype, wrapped_models
from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.hosts.attachment import is_attached, without_policy
from speedit_plugins.hosts.entry import with_policy

PLUGIN = "speedit_plugins.hosts.mmagic"
SCHEDULERS = "mmagic.models.diffusion_schedulers"
SHAPE = (6, 3, 4, 4)


class Unet(nn.Module):
    """The call and the answer of mmagic's DenoisingUnet, in one parameter."""

    def __init__(self, answers: int = 1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.answers = answers

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        encoder_hidden_states: Any = None,
        label: Any = None,
        return_noise: bool = False,
    ) -> dict[str, Tensor]:
        """The noise (B, C, H, W) as `sample`, with `answers` times the channels."""
        sample = torch.sin(self.scale * x_t + 0.01 * t.view(-1, 1, 1, 1))
        return {"sample": torch.cat([sample] * self.answers, dim=1)}


class Recorder:
    """A unet that remembers what it saw and what it answered."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seen: list[SimpleNamespace] = []

    def __call__(self, x_t: Tensor, t: Tensor) -> Any:
        answer = self.model(x_t, t)
        self.seen.append(SimpleNamespace(x_t=x_t.detach(), t=t.clone(), answer=answer["sample"].detach()))
        return answer


def check() -> list[int]:
    """The points that hold, in order.

    Raises:
        AssertionError: the first point that does not, its number first.
    """
    return run_points({point: _taking_nothing(step) for point, step in CONTRACT.items()}, None)


def _taking_nothing(step: Callable[[], None]) -> Callable[[object], None]:
    return lambda _: step()


def build(**options: Any) -> Any:
    """Our scheduler, through the host's registry."""
    import_module(PLUGIN)
    registry = import_module("mmagic.registry").DIFFUSION_SCHEDULERS
    return registry.build({"type": "SpeeDiffusion", **options})


def draws_are_seen() -> None:
    """Point 1, and x_t is DDPM's at that t; `sample_timestep` leaves the draw to the loss."""
    for name in ("speedit", "speed"):
        scheduler, model = build(policy=name), Recorder(Unet())
        x, noise = _batch()
        assert scheduler.sample_timestep() is None, "sample_timestep draws, without a batch"
        torch.manual_seed(7)
        scheduler.training_loss(model, x, scheduler.sample_timestep(), noise=noise)
        torch.manual_seed(7)
        index = _policy(scheduler, name).draw(len(x)).index
        (seen,) = model.seen
        assert torch.equal(seen.t, index), f"drew {index.tolist()}, the model saw {seen.t.tolist()}"
        alpha_bar = torch.from_numpy(np.asarray(scheduler.alphas_cumprod)).double()[index].view(-1, 1, 1, 1)
        exact = alpha_bar.sqrt() * x.double() + (1 - alpha_bar).sqrt() * noise.double()
        # float32 rounds two scales, two products and a sum of numbers below 4: 2.4e-7 each at the most.
        assert torch.allclose(seen.x_t.double(), exact, atol=1e-6, rtol=0), "x_t is not DDPM's"


def loss_is_weighted() -> None:
    """Point 2, in float32 and float64, from what the model answered."""
    for dtype, tolerance in ((torch.float32, FLOAT32_TOLERANCE), (torch.float64, FLOAT64_TOLERANCE)):
        scheduler, model = build(), Recorder(Unet().to(dtype))
        x, noise = _batch(dtype)
        torch.manual_seed(7)
        terms = scheduler.training_loss(model, x, noise=noise)
        assert sorted(terms) == ["loss"], f"parse_losses adds up {sorted(terms)}"
        torch.manual_seed(7)
        draw = _policy(scheduler).draw(len(x))
        mse = (model.seen[0].answer.double() - noise.double()).square().mean((1, 2, 3))
        direct = (draw.weight.double() * mse).mean()
        error = float((terms["loss"].detach().double() - direct).abs() / direct)
        assert error <= tolerance, (
            f"loss misses mean(w * mse) by {error:.1e} relative, wanted {tolerance:.0e}"
        )
        terms["loss"].backward()
        assert model.model.scale.grad is not None, "no gradient reaches the model"


def uniform_is_the_plain_loss() -> None:
    """Point 3."""
    scheduler, model = build(policy="uniform"), Recorder(Unet())
    x, noise = _batch()
    ours = scheduler.training_loss(model, x, noise=noise)["loss"]
    plain = build().training_loss(model, x, model.seen[0].t, noise=noise)["loss"]
    assert torch.equal(ours, plain), f"loss differs by {float((ours - plain).abs())}"
    mean = nn.functional.mse_loss(model.seen[0].answer, noise)
    # Both are means of the same 288 squares, summed in another order.
    assert torch.allclose(plain, mean, rtol=1e-6, atol=0), "the plain loss is not the mean squared error"


def sampling_is_untouched() -> None:
    """Point 4, with all timesteps and with few; no draw, and no numbers of the policy's."""
    host_class = import_module(SCHEDULERS).EditDDPMScheduler
    for num_steps, options in ((5, {}), (20, {"num_train_timesteps": 20, "variance_type": "fixed_large"})):
        ours = build(policy="p2", **options)
        samples = [_sample(scheduler, num_steps) for scheduler in (host_class(**options), ours)]
        assert torch.equal(*samples), f"{num_steps} steps differ"
        attachment = ours._speedit_attachment
        assert (attachment.num_calls, attachment._scales) == (0, {}), "sampling touched the policy"


def object_is_the_hosts() -> None:
    """Point 5."""
    host_class = import_module(SCHEDULERS).EditDDPMScheduler
    plain, ours = host_class(num_train_timesteps=20), build(policy="p2", num_train_timesteps=20)
    assert isinstance(ours, host_class), f"not a {host_class.__name__}"
    assert len(ours) == 20, "len is not the host's"
    for name, value in vars(plain).items():
        assert np.array_equal(value, getattr(ours, name)), f"{name} differs"
    losses = []
    for scheduler in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):  # noqa: S301 - made here
        assert type(scheduler) is type(ours), f"a copy is a {type(scheduler).__name__}"
        assert is_attached(scheduler), "a copy has no policy"
        torch.manual_seed(7)
        losses.append(scheduler.training_loss(Unet(), _batch()[0])["loss"])
    assert losses[0] == losses[1] == losses[2], "copies train otherwise"


def missing_seam_is_refused() -> None:
    """Point 6."""
    schedulers = import_module(SCHEDULERS)
    bare = type("EditDDPMScheduler", (), {"step": schedulers.EditDDPMScheduler.step})
    kept = {name: module for name, module in sys.modules.items() if name != PLUGIN}
    with (
        mock.patch.dict(sys.modules, kept, clear=True),
        mock.patch.object(schedulers, "EditDDPMScheduler", bare),
    ):
        refused(
            lambda: import_module(PLUGIN),
            "training_loss and sample_timestep); this one has no",
            ImportError,
        )
    for variance in ("learned", "learned_range"):
        refused(partial(build, variance_type=variance), f"got variance_type='{variance}'")
    refused(lambda: build().training_loss(Unet(answers=2), _batch()[0]), "learned variance: output_cfg")
    # What the host's own training pipeline packs for images that it loads as 'gt'.
    refused(lambda: build().training_loss(Unet(), {}), "PackInputs(keys=...)")


def second_policy_is_refused() -> None:
    """Point 7."""
    host_class = import_module(SCHEDULERS).EditDDPMScheduler
    scheduler = build()
    refused(lambda: with_policy(scheduler, "speedit"), "has a policy already")
    bare = without_policy(scheduler)
    assert type(bare) is host_class, f"left as {type(bare)}"
    assert set(vars(bare)) == set(vars(host_class())), "left something behind"


def models_and_dtypes() -> None:
    """Point 8."""
    x, noise = _batch()
    unet = Unet()
    losses = {}
    with wrapped_models(unet) as others:
        for name, model in {"plain": unet, **others}.items():
            unet.zero_grad()
            torch.manual_seed(7)
            loss = build().training_loss(model, x, noise=noise)["loss"]
            loss.backward()
            assert unet.scale.grad is not None, f"{name}: no gradient"
            losses[name] = (loss.item(), unet.scale.grad.item())
    assert len(set(losses.values())) == 1, f"loss and gradient differ: {losses}"
    with default_dtype(torch.bfloat16), torch.no_grad():
        model = Recorder(Unet())
        build(policy="uniform").training_loss(model, torch.zeros(NUM_DRAWS, 1, 1, 1).float())
    reached = len(model.seen[0].t.unique())
    assert reached == 1000, f"a bfloat16 default dtype reaches {reached} of 1000 timesteps"


CONTRACT: dict[int, Callable[[], None]] = {
    1: draws_are_seen,
    2: loss_is_weighted,
    3: uniform_is_the_plain_loss,
    4: sampling_is_untouched,
    5: object_is_the_hosts,
    6: missing_seam_is_refused,
    7: second_policy_is_refused,
    8: models_and_dtypes,
}


def _sample(scheduler: Any, num_steps: int) -> Tensor:
    torch.manual_seed(3)
    scheduler.set_timesteps(num_steps)
    image, unet = torch.randn(SHAPE), Unet()
    with torch.no_grad():
        for t in scheduler.timesteps:
            answer = unet(image, torch.full((len(image),), int(t)))["sample"]
            image = scheduler.step(answer, t, image)["prev_sample"]
    return image


def _policy(scheduler: Any, name: str = "speedit") -> Any:
    return build_policy(name, NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod), "epsilon")


def _batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SHAPE, generator=generator).clamp(-1, 1)
    return x.to(dtype), torch.randn(SHAPE, generator=generator).to(dtype)
