"""What an adapter keeps for a host's object: the contract's points, each a check against the host's own code.

A check raises AssertionError with what it saw. The points:

1. The model sees the t that was drawn.
2. Reported loss = weight[t] * mse + vb, within 2e-7 relative, 1e-12 in float64; other terms untouched.
3. The uniform policy gives the host's own loss to the bit at the same t and noise.
4. Sampling is the same to the bit, and builds no tables.
5. Attributes, isinstance, deepcopy and pickling are the host's.
6. An object without the seam is refused, naming what was looked for.
7. A second policy is refused, and without the policy the object is as before.
8. A compiled model and one under DDP train alike; a bfloat16 default dtype leaves every timestep reachable.

Dims: B batch, C channels.
"""

import copy
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from conformance.environments import default_dtype, wrapped_models
from speedit_plugins.hosts.attachment import Attachment, attach, attachment_of, is_attached
from speedit_plugins.hosts.diffusion_object import steered_methods
from speedit_plugins.hosts.entry import with_policy, without_policy
from speedit_plugins.hosts.schedule_sampler import schedule_sampler
from speedit_plugins.hosts.schedules import prediction_type_of, schedule_of
from speedit_plugins.launch import DeferredPolicy, Launch
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy

POLICY = "speedit"
FLOAT32_TOLERANCE = 2e-7
FLOAT64_TOLERANCE = 1e-12
# A timestep of 1,000 is missed with probability (1 - 1/1000)^12000 = 6e-6: 0.006 of them on average.
NUM_DRAWS = 12_000


@dataclass(frozen=True)
class Subject:
    """A host's object, and how its trainer calls it.

    Args:
        make: the host's factory; its argument is the respacing, '' for none.
        shape: of the data, (B, C, ...) or as the host orders it.
        sigma_axis: where the model's variance channels are appended; None where it answers none.
        method: the training method.
        answers_tuple: whether the host expects the model's answer in a tuple while training.
        sampling: sampling methods, called with the model and the shape.
        host_class: the host's base class of schedule samplers, seam C only.
        num_losses: loss calls that share one t, seam C only.
    """

    make: Callable[[str], Any]
    shape: tuple[int, ...]
    sigma_axis: int | None = 1
    method: str = "training_losses"
    answers_tuple: bool = False
    sampling: tuple[str, ...] = ("p_sample_loop", "ddim_sample_loop")
    host_class: type | None = None
    num_losses: int = 1


class SmallModel(nn.Module):
    """A model of one parameter that depends on x and t, and remembers the t that it saw."""

    def __init__(self, sigma_axis: int | None, *, answers_tuple: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.sigma_axis = sigma_axis
        self.answers_tuple = answers_tuple
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor | None = None, *_: Any, timestep: Any = None, **__: Any) -> Any:
        t = timestep if t is None else t
        self.seen.append(t.detach().clone())
        answer = torch.sin(self.scale * x + 0.01 * t.view(-1, *[1] * (x.dim() - 1)))
        if self.sigma_axis is not None:
            answer = torch.cat([answer, 0.3 * answer], dim=self.sigma_axis)
        return (answer,) if self.answers_tuple else answer


def check(subject: Subject) -> list[int]:
    """The points that hold, in order.

    Raises:
        AssertionError: the first point that does not, its number first.
    """
    return run_points(CONTRACT_OF_OBJECTS if subject.host_class is None else CONTRACT_OF_SAMPLERS, subject)


def run_points(points: Mapping[int, Callable[[Any], None]], subject: Any) -> list[int]:
    """The numbers of the checks that hold for a subject, in order; see `check`."""
    passed = []
    for point, step in points.items():
        try:
            step(subject)
        except AssertionError as error:
            raise AssertionError(f"point {point}: {error or step.__name__}") from error
        passed.append(point)
    return passed


def terms_of(
    subject: Subject, diffusion: Any, model: nn.Module, x: Tensor, t: Tensor, noise: Tensor
) -> Mapping[str, Tensor]:
    """The host's loss terms, each (B,); a host that returns the loss alone has no vb."""
    terms = getattr(diffusion, subject.method)(model, x, t, noise=noise)
    return {"loss": terms, "mse": terms} if isinstance(terms, Tensor) else terms


def draws_are_seen(subject: Subject) -> None:
    """Point 1, on the whole schedule and on a respaced one."""
    for respacing in ("", "50"):
        diffusion = subject.make(respacing)
        given, expected = _seeded(), _seeded()
        with_policy(diffusion, POLICY, generator=given)
        model, (x, noise) = _model(subject), _batch(subject)
        terms_of(subject, diffusion, model, x, torch.zeros(len(x), dtype=torch.long), noise)
        draw = _policy(diffusion).draw(len(x), generator=expected)
        _see(diffusion, model, draw.index)


def loss_is_weighted(subject: Subject) -> None:
    """Point 2, in float32 and float64."""
    for dtype, tolerance in ((torch.float32, FLOAT32_TOLERANCE), (torch.float64, FLOAT64_TOLERANCE)):
        diffusion, given = subject.make(""), _seeded()
        model, (x, noise) = _model(subject).to(dtype), _batch(subject, dtype)
        draw = _policy(diffusion).draw(len(x), generator=_seeded())
        plain = terms_of(subject, diffusion, model, x, draw.index, noise)
        with_policy(diffusion, POLICY, generator=given)
        ours = terms_of(subject, diffusion, model, x, torch.zeros_like(draw.index), noise)
        _weighs(ours, plain, draw, tolerance)


def uniform_is_the_host(subject: Subject) -> None:
    """Point 3."""
    diffusion = subject.make("")
    model, (x, noise) = _model(subject), _batch(subject)
    t = _policy(diffusion, "uniform").draw(len(x), generator=_seeded()).index
    plain = terms_of(subject, diffusion, model, x, t, noise)
    with_policy(diffusion, "uniform", generator=_seeded())
    ours = terms_of(subject, diffusion, model, x, torch.zeros_like(t), noise)
    for name, value in plain.items():
        assert torch.equal(ours[name], value), f"{name} differs by {float((ours[name] - value).abs().max())}"


def sampling_is_untouched(subject: Subject) -> None:
    """Point 4."""
    for method in subject.sampling:
        plain, launched = subject.make("5"), subject.make("5")
        attach(
            launched, Attachment(DeferredPolicy(Launch({"type": POLICY}), "host", launched)), steered_methods
        )
        samples = [_sample(subject, diffusion, method) for diffusion in (plain, launched)]
        assert torch.equal(*samples), f"{method} differs"
        assert not attachment_of(launched).is_built, f"{method} built the policy's tables"


def object_is_the_hosts(subject: Subject) -> None:
    """Point 5."""
    plain = subject.make("")
    host_class, names = type(plain), set(vars(plain))
    diffusion = with_policy(plain, POLICY)
    assert isinstance(diffusion, host_class), f"not a {host_class.__name__}"
    assert names <= set(vars(diffusion)), f"lost {names - set(vars(diffusion))}"
    assert diffusion.num_timesteps == len(diffusion.betas), "attributes do not reach the host"
    for copied in (copy.deepcopy(diffusion), pickle.loads(pickle.dumps(diffusion))):  # noqa: S301 - made here
        assert is_attached(copied), "a copy has no policy"
        assert isinstance(copied, host_class), f"a copy is not a {host_class.__name__}"


def missing_seam_is_refused(subject: Subject) -> None:
    """Point 6: the host's object with its training method under another name."""
    diffusion = subject.make("")
    owners = type(diffusion).__mro__[:-1]
    kept = {k: v for owner in reversed(owners) for k, v in vars(owner).items() if not k.startswith("__")}
    for name in [name for name in kept if name.startswith(("training_losses", "p_losses"))]:
        kept[f"old_{name}"] = kept.pop(name)
    bare = object.__new__(type("Changed", (), kept))
    vars(bare).update(vars(diffusion))
    refused(lambda: with_policy(bare, POLICY), "has no seam: looked for a method training_losses")


def wrapping_ends(subject: Subject) -> None:
    """Point 7."""
    diffusion = subject.make("")
    host_class, names = type(diffusion), set(vars(diffusion))
    with_policy(diffusion, POLICY)
    refused(lambda: with_policy(diffusion, POLICY), "has a policy already")
    without_policy(diffusion)
    assert type(diffusion) is host_class, f"left as {type(diffusion)}"
    assert set(vars(diffusion)) == names, f"left behind {set(vars(diffusion)) - names}"


def other_models_train_alike(subject: Subject) -> None:
    """Point 8: the loss of a compiled model and of one under DDP, its gradient, and draws in bfloat16."""
    model, (x, noise) = _model(subject), _batch(subject)
    with wrapped_models(model) as others:
        losses = {}
        for name, other in {"plain": model, **others}.items():
            diffusion = with_policy(subject.make(""), POLICY, generator=_seeded())
            terms = terms_of(subject, diffusion, other, x, torch.zeros(len(x), dtype=torch.long), noise)
            losses[name] = terms["loss"].detach()
            model.scale.grad = None
            terms["loss"].mean().backward()
            assert model.scale.grad is not None, f"{name}: no gradient"
            assert torch.equal(losses[name], losses["plain"]), f"{name}: another loss"
    with default_dtype(torch.bfloat16):
        diffusion = with_policy(subject.make(""), "uniform", generator=_seeded())
        rows = torch.zeros(NUM_DRAWS, *subject.shape[1:]).float()[..., :1]
        terms_of(subject, diffusion, model, rows, torch.zeros(NUM_DRAWS, dtype=torch.long), rows)
    assert len(model.seen[-1].unique()) == 1000, "a bfloat16 default leaves timesteps out"


def sampler_trains_other_models_alike(subject: Subject) -> None:
    """Point 8 of seam C."""
    model, (x, noise) = _model(subject), _batch(subject)
    with wrapped_models(model) as others:
        losses = []
        for other in (model, *others.values()):
            diffusion = subject.make("")
            t, _ = _sampler(subject, diffusion).sample(len(x), "cpu")
            losses.append(terms_of(subject, diffusion, other, x, t, noise)["loss"].detach())
            assert torch.equal(losses[0], losses[-1]), "another loss"
    with default_dtype(torch.bfloat16):
        t, _ = _sampler(subject, subject.make(""), "uniform").sample(NUM_DRAWS, "cpu")
    assert len(t.unique()) == 1000, "a bfloat16 default leaves timesteps out"


def sampler_draws_are_seen(subject: Subject) -> None:
    """Point 1 of seam C: every loss of the step sees the sampler's t."""
    diffusion = subject.make("")
    model, (x, noise) = _model(subject), _batch(subject)
    sampler = _sampler(subject, diffusion)
    draw = _policy(diffusion).draw(len(x), generator=_seeded())
    t, _ = sampler.sample(len(x), "cpu")
    assert torch.equal(t, draw.index), "the sampler's t is not the policy's"
    for _ in range(subject.num_losses):
        terms_of(subject, diffusion, model, x, t, noise)
        _see(diffusion, model, draw.index)


def sampler_loss_is_weighted(subject: Subject) -> None:
    """Point 2 of seam C: the host multiplies the whole loss by the returned weights."""
    for dtype, tolerance in ((torch.float32, FLOAT32_TOLERANCE), (torch.float64, FLOAT64_TOLERANCE)):
        diffusion = subject.make("")
        model, (x, noise) = _model(subject).to(dtype), _batch(subject, dtype)
        draw = _policy(diffusion).draw(len(x), generator=_seeded())
        plain = terms_of(subject, diffusion, model, x, draw.index, noise)
        sampler = _sampler(subject, diffusion)
        t, weights = sampler.sample(len(x), "cpu")
        for _ in range(subject.num_losses):
            ours = dict(terms_of(subject, diffusion, model, x, t, noise))
            ours["loss"] = ours["loss"] * weights
            _weighs(ours, plain, draw, tolerance)


def uniform_sampler_is_the_host(subject: Subject) -> None:
    """Point 3 of seam C."""
    diffusion = subject.make("")
    model, (x, noise) = _model(subject), _batch(subject)
    t = _policy(diffusion, "uniform").draw(len(x), generator=_seeded()).index
    plain = terms_of(subject, diffusion, model, x, t, noise)
    sampler = _sampler(subject, diffusion, "uniform")
    drawn, weights = sampler.sample(len(x), "cpu")
    ours = terms_of(subject, diffusion, model, x, drawn, noise)
    assert torch.equal(ours["loss"] * weights, plain["loss"]), "loss differs"


def sampler_leaves_sampling(subject: Subject) -> None:
    """Point 4 of seam C: a respaced object is given no sampler, and one that has it samples the same."""
    for method in subject.sampling:
        plain, ours = subject.make("5"), subject.make("5")
        _sampler(subject, ours, "uniform")
        assert torch.equal(_sample(subject, plain, method), _sample(subject, ours, method)), method


def sampler_is_the_hosts(subject: Subject) -> None:
    """Point 5 of seam C."""
    diffusion = subject.make("")
    host_class = type(diffusion)
    sampler = _sampler(subject, diffusion)
    assert isinstance(sampler, subject.host_class or object), "not the host's ScheduleSampler"
    assert isinstance(diffusion, host_class), f"not a {host_class.__name__}"


def second_sampler_is_refused(subject: Subject) -> None:
    """Point 7 of seam C: neither a second sampler nor a redrawing policy on top."""
    diffusion = subject.make("")
    host_class = type(diffusion)
    _sampler(subject, diffusion)
    refused(lambda: _sampler(subject, diffusion), "has a policy already")
    refused(lambda: with_policy(diffusion, POLICY), "has a policy already")
    assert type(without_policy(diffusion)) is host_class, f"left as {type(diffusion)}"


CONTRACT_OF_OBJECTS: dict[int, Callable[[Subject], None]] = {
    1: draws_are_seen,
    2: loss_is_weighted,
    3: uniform_is_the_host,
    4: sampling_is_untouched,
    5: object_is_the_hosts,
    6: missing_seam_is_refused,
    7: wrapping_ends,
    8: other_models_train_alike,
}
CONTRACT_OF_SAMPLERS: dict[int, Callable[[Subject], None]] = {
    1: sampler_draws_are_seen,
    2: sampler_loss_is_weighted,
    3: uniform_sampler_is_the_host,
    4: sampler_leaves_sampling,
    5: sampler_is_the_hosts,
    6: missing_seam_is_refused,
    7: second_sampler_is_refused,
    8: sampler_trains_other_models_alike,
}


def _see(diffusion: Any, model: SmallModel, index: Tensor) -> None:
    shown = index
    if hasattr(diffusion, "timestep_map"):
        shown = torch.tensor(list(diffusion.timestep_map))[index]
    seen = model.seen[-1]
    assert torch.equal(seen.to(shown.dtype), shown), f"drew {shown.tolist()}, the model saw {seen.tolist()}"


def _weighs(
    ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], draw: TimestepDraw, tolerance: float
) -> None:
    direct = draw.weight.to(plain["mse"].dtype) * plain["mse"] + plain.get("vb", 0)
    error = float(((ours["loss"] - direct).abs() / direct.abs()).max().detach())
    assert error <= tolerance, f"loss misses w * mse + vb by {error:.1e} relative, wanted {tolerance:.0e}"
    # A host that returns the loss alone has no terms to leave untouched.
    for name in plain if "vb" in plain else ():
        assert name == "loss" or torch.equal(ours[name], plain[name]), f"{name} changed"


def _sampler(subject: Subject, diffusion: Any, policy: str = POLICY) -> Any:
    return schedule_sampler(diffusion, policy, host_class=subject.host_class or object, generator=_seeded())


def _sample(subject: Subject, diffusion: Any, method: str) -> Tensor:
    torch.manual_seed(3)
    model = SmallModel(subject.sigma_axis)
    shape = subject.shape
    with torch.no_grad():
        if subject.method == "p_losses":
            sample: Tensor = getattr(diffusion, method)(model, shape, "cpu", y=None)
        else:
            sample = getattr(diffusion, method)(model, shape, device="cpu")
    return sample


def _policy(diffusion: Any, name: str = POLICY) -> TimestepPolicy:
    return build_policy(name, schedule_of(diffusion), prediction_type_of(diffusion))


def _model(subject: Subject) -> SmallModel:
    return SmallModel(subject.sigma_axis, answers_tuple=subject.answers_tuple)


def _batch(subject: Subject, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(subject.shape, generator=generator).to(dtype).clamp(-1, 1)
    return x, torch.randn(subject.shape, generator=generator).to(dtype)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def refused(action: Callable[[], object], wanted: str, error: type[Exception] = ValueError) -> None:
    """Raises AssertionError unless an action raises an error of this type that says what is wanted."""
    message = "nothing"
    try:
        action()
    except error as raised:
        message = str(raised)
    assert wanted in message, f"wanted an error with {wanted!r}, got {message}"
