"""What `SpeeDFlow` keeps of Open-Sora's rectified flow, checked on a stand-in or a checkout of 1.2 or 1.3."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from conformance.contract import refused
from conformance.environments import default_dtype, wrapped_models
from conformance.flow import FlowSubject, rectified_flow
from conformance.open_sora import SHAPE, B, Host
from conformance.open_sora_models import Denoiser
from speedit_plugins.hosts.entry import with_policy, without_policy

# SNR = ((1 - t) / t)^2 = 1 / 143.
BOUNDARY = 1 / (1 + math.sqrt(1 / 143))
PIXELS = {"height": torch.full((B,), 1024.0), "width": torch.full((B,), 1024.0), "num_frames": torch.ones(B)}


def _step(
    scheduler: Any, *, seed: int = 0, x: Tensor | None = None, **options: Any
) -> tuple[Tensor, Denoiser]:
    torch.manual_seed(seed)
    model, x = Denoiser(), torch.randn(B, *SHAPE) if x is None else x
    return scheduler.training_losses(model, x, **options)["loss"], model


def _arguments(host: Host, **values: Any) -> dict[str, Any]:
    return {"model_kwargs" if host.version == "1.2.0" else "model_args": values}


def _share_past_boundary(host: Host, n: int = 20_000, **options: Any) -> float:
    arguments = _arguments(host, **{name: value[:1].repeat(n) for name, value in PIXELS.items()})
    _, model = _step(host.build("SpeeDFlow", **options), x=torch.zeros(n, 4, 1, 1, 1), **arguments)
    return float((model.seen[0] > 1000 * BOUNDARY).double().mean())


def k_one_is_the_hosts_training(host: Host) -> None:
    """k = 1 without weights: the host's t and loss from the same seed."""
    for options in ({}, {"use_discrete_timesteps": True}, {"sample_method": "logit-normal"}):
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            ours = host.build("SpeeDFlow", k=1, lam=None, use_timestep_transform=True, **options)
        assert any("nothing is thinned" in str(note.message) for note in notes)
        theirs = host.original("rflow", use_timestep_transform=True, **options)
        (loss, model), (expected, original) = (
            _step(scheduler, **_arguments(host, **PIXELS)) for scheduler in (ours, theirs)
        )
        assert torch.equal(model.seen[0], original.seen[0])
        assert torch.equal(loss, expected)


def convergence_area_is_k_times_rarer(host: Host) -> None:
    """The share of late t for each of the host's laws."""
    # Mass of t > boundary before: uniform; discrete, the indices 923 to 999 of 1000; logit-normal,
    # P(N(0, 1) > logit(boundary)) with logit = ln(143) / 2.
    normal = math.erfc(math.log(143) / 2 / math.sqrt(2)) / 2
    cases: list[tuple[float, dict[str, Any]]] = [
        (1 - BOUNDARY, {}),
        (0.077, {"use_discrete_timesteps": True}),
        (normal, {"sample_method": "logit-normal"}),
        # 1024 x 1024 shifts by s = 2: t past the boundary where s t / (1 + (s - 1) t) is.
        (1 - BOUNDARY / (2 - BOUNDARY), {"use_timestep_transform": True}),
    ]
    n = 20_000
    for before, options in cases:
        after = before / 5 / (1 - before + before / 5)
        share = _share_past_boundary(host, n, **options)
        # 4 sigma of a binomial frequency.
        assert abs(share - after) < 4 * math.sqrt(after * (1 - after) / n), options


def loss_is_the_hosts_weighted(host: Host) -> None:
    """The weights against a finite difference of the noise variance."""
    noise = torch.randn(B, *SHAPE)
    loss, model = _step(host.build("SpeeDFlow"), noise=noise)
    t = model.seen[0]
    expected, _ = _step(host.build("rflow"), noise=noise, t=t)
    # dv/dt by central differences of v = t^2 / ((1 - t)^2 + t^2) in float64; halved, it is at most 1.
    time, h = t.double() / 1000, 1e-5
    v = [(time + d) ** 2 / ((1 - time - d) ** 2 + (time + d) ** 2) for d in (-h, h)]
    weight = 0.4 + 0.2 * (v[1] - v[0]) / (2 * h) / 2
    # Differences of order h^2, and float32.
    assert_close(loss.double(), weight * expected.double(), rtol=1e-6, atol=0)


def logit_normal_is_not_weighted(host: Host) -> None:
    """`lam='auto'` leaves a logit-normal host's loss alone."""
    noise = torch.randn(B, *SHAPE)
    for options in ({"sample_method": "logit-normal"}, {"lam": None}):
        loss, model = _step(host.build("SpeeDFlow", **options), noise=noise)
        expected, _ = _step(host.build("rflow"), noise=noise, t=model.seen[0])
        assert torch.equal(loss, expected)


def masks_are_the_hosts(host: Host) -> None:
    """`mask=` and the model's `x_mask` pass through."""
    noise, mask = torch.randn(B, *SHAPE), torch.tensor([[True, True], [True, False]] * (B // 2))
    arguments = _arguments(host, x_mask=mask)
    loss, model = _step(host.build("SpeeDFlow", lam=None), noise=noise, mask=mask, **arguments)
    expected, _ = _step(host.build("rflow"), noise=noise, mask=mask, t=model.seen[0], **arguments)
    assert torch.equal(loss, expected)
    assert model.arguments[0]["x_mask"] is mask


def train_call_of_1_3(host: Host) -> None:
    """The arguments with which 1.3's trainer calls."""
    if host.version == "1.3":
        loss, _ = _step(
            host.build("SpeeDFlow"), model_args={}, mask=None, mask_index=[], text_uncond_prob=None
        )
        assert torch.isfinite(loss).all()


def callers_t_is_kept(host: Host) -> None:
    """A t that is passed is trained on, unweighted."""
    t = torch.full((B,), 990.0)
    (loss, model), (expected, _) = (_step(host.build(name), t=t) for name in ("SpeeDFlow", "rflow"))
    assert torch.equal(model.seen[0], t)
    assert torch.equal(loss, expected)


def evaluations_are_the_hosts(host: Host) -> None:
    """Without gradients: the host's t and loss from the same seed."""
    with torch.no_grad():
        (ours, model), (theirs, original) = (_step(host.build(name)) for name in ("SpeeDFlow", "rflow"))
    assert torch.equal(model.seen[0], original.seen[0])
    assert torch.equal(ours, theirs)


def sampling_is_the_hosts(host: Host) -> None:
    """The host's sampler, to the bit."""
    ours, theirs = host.build("SpeeDFlow", num_sampling_steps=3), host.build("rflow", num_sampling_steps=3)
    assert isinstance(ours, type(theirs))
    assert torch.equal(host.sample(ours), host.sample(theirs))


def copies_are_the_hosts(host: Host) -> None:
    """A deep copy and a pickled one draw and weigh as the original."""
    scheduler = host.build("SpeeDFlow")
    expected = _step(scheduler)[0]
    # A logit-normal host does not pickle: its draw is a local function.
    for copied in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):  # noqa: S301 - made here
        assert isinstance(copied, type(host.build("rflow")))
        assert torch.equal(_step(copied)[0], expected)


def policies_are_not_stacked(host: Host) -> None:
    """`with_policy` on top; and back to the host's class."""
    scheduler = host.build("SpeeDFlow")
    refused(lambda: with_policy(scheduler), "has a policy already")
    t = torch.full((B,), 500.0)
    assert torch.equal(_step(without_policy(scheduler), t=t)[0], _step(host.build("rflow"), t=t)[0])


def other_models_train_alike(host: Host) -> None:
    """Compiled and DDP-wrapped models; the thinning under a bfloat16 default."""
    model, x = Denoiser(), torch.ones(B, *SHAPE)
    with wrapped_models(model) as others:
        losses = []
        for other in (model, *others.values()):
            torch.manual_seed(5)
            losses.append(host.build("SpeeDFlow").training_losses(other, x)["loss"].detach())
    assert all(torch.equal(losses[0], loss) for loss in losses)
    # With a bfloat16 default too, 1 - 1/k of the coins refuse: 0.2 * 0.077 / 0.938 of the draws are late.
    with default_dtype(torch.bfloat16):
        share = _share_past_boundary(host)
    assert abs(share - 0.0164) < 4 * math.sqrt(0.0164 / 20_000) + 1 / 256, share


def bad_options_are_refused(host: Host) -> None:
    """Values out of range, and the host's `weights=` beside ours."""
    for options, message in (
        ({"k": 0.5}, "k >= 1"),
        ({"k": math.inf}, "k >= 1"),
        ({"lam": 5.0}, "lam in"),
        ({"lam": "off"}, "'auto'"),
        ({"snr_boundary": 0.0}, "SNR boundary"),
    ):
        refused(lambda options=options: host.build("SpeeDFlow", **options), message)
    refused(lambda: _step(host.build("SpeeDFlow"), weights=torch.ones(1000)), "has its own")


FLOW_CONTRACT: dict[int, tuple[Callable[[Host], None], ...]] = {
    1: (convergence_area_is_k_times_rarer, callers_t_is_kept),
    2: (loss_is_the_hosts_weighted, logit_normal_is_not_weighted, masks_are_the_hosts),
    3: (k_one_is_the_hosts_training, evaluations_are_the_hosts, train_call_of_1_3),
    4: (sampling_is_the_hosts,),
    5: (copies_are_the_hosts,),
    6: (bad_options_are_refused,),
    7: (policies_are_not_stacked,),
    8: (other_models_train_alike,),
}


def subject(host: Host) -> FlowSubject:
    """The host's own rectified flow, for the contract of `with_policy`."""
    return rectified_flow(
        lambda: host.build("rflow", num_sampling_steps=3), lambda flow, _: host.sample(flow)
    )
