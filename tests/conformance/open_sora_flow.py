"""Seam A for the rectified flow of Open-Sora 1.2 and 1.3: `SpeeDFlow`, on a stand-in or a checkout.

It has no policy. The host's own draws of t are thinned past a boundary of the SNR.

Dims: B batch.
"""

import math
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from conformance import points
from conformance.environments import default_dtype
from conformance.flow import FlowSeam, rectified_flow
from conformance.models import SmallModel
from conformance.open_sora import OpenSoraSeam
from conformance.points import refused
from conformance.seam import POLICY, Batch, Seam, Terms, new_process
from conformance.whole_training import seeds_kept
from speedit_plugins.hosts.attachment import attachment_of
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.states.policy_state import load_policy_state, policy_of, policy_state
from speedit_plugins.policies.policy import TimestepDraw

# SNR = ((1 - t) / t)^2 = 1 / 143.
BOUNDARY = 1 / (1 + math.sqrt(1 / 143))


@dataclass(frozen=True)
class SpeeDFlowSeam(Seam):
    """The rectified flow of an imported host."""

    host: OpenSoraSeam
    shape: tuple[int, ...] = (6, 4, 2, 3, 3)

    def make(self, **options: Any) -> Any:
        return self.host.build("rflow", num_sampling_steps=3, **options)

    def attached(self, policy: Any = None, generator: Any = None, **options: Any) -> Any:
        return self.host.build("SpeeDFlow", num_sampling_steps=3, **options)

    def model(self, host: Any, dtype: torch.dtype = torch.float32) -> SmallModel:
        return SmallModel(1).to(dtype)

    def train(self, host: Any, model: Any, batch: Batch, t: Tensor | None = None, **options: Any) -> Terms:
        return Terms(host.training_losses(model, batch[0], noise=batch[1], t=t, **options)["loss"])

    def drawn(self, host: Any, policy: Any, model: Any) -> TimestepDraw:
        time = model.seen[-1] / 1000
        return TimestepDraw((time * 1000).long(), time, host.thinning.weight(time), "loss")

    def hosts_t(self, draw: TimestepDraw, model: Any) -> Tensor:
        t: Tensor = model.seen[-1]
        return t

    def sample(self, host: Any) -> Tensor:
        return self.host.sample(host)

    def is_idle(self, host: Any) -> bool:
        return bool(attachment_of(host).num_calls == 0)

    def arguments(self, **values: Any) -> dict[str, Any]:
        """The model's arguments, as the host's version names them."""
        return {"model_kwargs" if self.host.version == "1.2.0" else "model_args": values}

    def step(self, scheduler: Any, *, x: Tensor | None = None, **options: Any) -> tuple[Tensor, SmallModel]:
        """One training step from seed 0: its loss and its model."""
        torch.manual_seed(0)
        model, x = SmallModel(1), torch.randn(self.shape) if x is None else x
        return scheduler.training_losses(model, x, **options)["loss"], model

    def pixels(self, n: int) -> dict[str, Any]:
        """Arguments of 1024 x 1024 images."""
        sides = {name: torch.full((n,), 1024.0) for name in ("height", "width")}
        return self.arguments(**sides, num_frames=torch.ones(n))

    def share_past_boundary(self, n: int = 20_000, *, boundary: float = BOUNDARY, **options: Any) -> float:
        """How often a late t reaches the model."""
        x = torch.zeros(n, 4, 1, 1, 1, dtype=torch.float32)
        _, model = self.step(self.attached(**options), x=x, **self.pixels(n))
        return float((model.seen[0] > 1000 * boundary).double().mean())


def flow_seam(host: OpenSoraSeam) -> FlowSeam:
    """The host's own rectified flow, as `with_policy` takes it."""
    return rectified_flow(
        partial(host.build, "rflow", num_sampling_steps=3), lambda flow, _: host.sample(flow)
    )


def policy_seam(host: OpenSoraSeam) -> FlowSeam:
    """The seam of `SpeeDFlow` with a policy."""
    return replace(_PolicySeam(**vars(flow_seam(host))), host=host)


@dataclass(frozen=True)
class _PolicySeam(FlowSeam):
    """A rectified flow that gets its policy from the host's registry.

    Args:
        host: the imported host.
    """

    host: Any = None

    def attached(self, policy: Any = POLICY, generator: Any = None) -> Any:
        made = self.host.build("SpeeDFlow", num_sampling_steps=3, policy=policy)
        attachment_of(made).stream = DrawStream(generator)
        return made

    def idle(self) -> Any:
        return self.attached()

    def is_unused(self, host: Any) -> bool:
        return self.is_idle(host)


def convergence_area_is_k_times_rarer(seam: SpeeDFlowSeam) -> None:
    """Point 1: the share of late t for each density by which the host draws."""
    # The share of t > boundary before thinning. Uniform; discrete: the indices 923 to 999 of 1000;
    # logit-normal: P(N(0, 1) > logit(boundary)) with logit = ln(143) / 2.
    normal = math.erfc(math.log(143) / 2 / math.sqrt(2)) / 2
    cases: list[tuple[float, dict[str, Any]]] = [
        (1 - BOUNDARY, {}),
        (0.077, {"use_discrete_timesteps": True}),
        (normal, {"sample_method": "logit-normal"}),
        # 1024 x 1024 pixels shift by s = 2: s t / (1 + (s - 1) t). The boundary moves in the same way.
        (1 - BOUNDARY, {"use_timestep_transform": True, "boundary": 2 * BOUNDARY / (1 + BOUNDARY)}),
        # Unless it is given: then s t / (1 + (s - 1) t) is past it.
        (1 - BOUNDARY / (2 - BOUNDARY), {"use_timestep_transform": True, "snr_boundary": 1 / 143}),
    ]
    n = 20_000
    for before, options in cases:
        after = before / 5 / (1 - before + before / 5)
        share = seam.share_past_boundary(n, **options)
        # 4 sigma of a binomial frequency.
        assert abs(share - after) < 4 * math.sqrt(after * (1 - after) / n), options


def callers_t_is_kept(seam: SpeeDFlowSeam) -> None:
    """Point 1: the host trains at a t that is passed, without weights."""
    t = torch.full((seam.shape[0],), 990.0)
    (loss, model), (expected, _) = (seam.step(host, t=t) for host in (seam.attached(), seam.make()))
    assert torch.equal(model.seen[0], t)
    assert torch.equal(loss, expected)


def loss_is_the_hosts_weighted(seam: SpeeDFlowSeam) -> None:
    """Point 2: the weights against a finite difference of the noise variance."""
    noise = torch.randn(seam.shape)
    loss, model = seam.step(seam.attached(), noise=noise)
    t = model.seen[0]
    expected, _ = seam.step(seam.make(), noise=noise, t=t)
    # dv/dt by central differences of v = t^2 / ((1 - t)^2 + t^2) in float64; halved, it is at most 1.
    time, h = t.double() / 1000, 1e-5
    v = [(time + d) ** 2 / ((1 - time - d) ** 2 + (time + d) ** 2) for d in (-h, h)]
    weight = 0.4 + 0.2 * (v[1] - v[0]) / (2 * h) / 2
    # Differences of order h^2, and float32.
    assert_close(loss.double(), weight * expected.double(), rtol=1e-6, atol=0)


def logit_normal_is_not_weighted(seam: SpeeDFlowSeam) -> None:
    """Point 2: `lam='auto'` leaves a logit-normal host's loss alone."""
    noise = torch.randn(seam.shape)
    for options in ({"sample_method": "logit-normal"}, {"lam": None}):
        loss, model = seam.step(seam.attached(**options), noise=noise)
        expected, _ = seam.step(seam.make(), noise=noise, t=model.seen[0])
        assert torch.equal(loss, expected)


def masks_are_the_hosts(seam: SpeeDFlowSeam) -> None:
    """Point 2: `mask=` and the model's `x_mask` pass through."""
    noise, mask = torch.randn(seam.shape), torch.tensor([[True, True], [True, False]] * (seam.shape[0] // 2))
    given = {"noise": noise, "mask": mask, **seam.arguments(x_mask=mask)}
    loss, model = seam.step(seam.attached(lam=None), **given)
    expected, _ = seam.step(seam.make(), t=model.seen[0], **given)
    assert torch.equal(loss, expected)
    assert model.arguments[0]["x_mask"] is mask


def k_one_is_the_hosts_training(seam: SpeeDFlowSeam) -> None:
    """Point 3: k = 1 without weights gives the host's t and loss from the same seed."""
    for options in ({}, {"use_discrete_timesteps": True}, {"sample_method": "logit-normal"}):
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            ours = seam.attached(k=1, lam=None, use_timestep_transform=True, **options)
        assert any("nothing is thinned" in str(note.message) for note in notes)
        theirs = seam.make(use_timestep_transform=True, **options)
        (loss, model), (expected, original) = (
            seam.step(scheduler, **seam.pixels(seam.shape[0])) for scheduler in (ours, theirs)
        )
        assert torch.equal(model.seen[0], original.seen[0])
        assert torch.equal(loss, expected)


def train_call_of_1_3(seam: SpeeDFlowSeam) -> None:
    """Point 3: the arguments with which 1.3's trainer calls."""
    if seam.host.version == "1.3":
        given: dict[str, Any] = {"mask": None, "mask_index": [], "text_uncond_prob": None}
        loss, _ = seam.step(seam.attached(), model_args={}, **given)
        assert torch.isfinite(loss).all()


def bad_options_are_refused(seam: SpeeDFlowSeam) -> None:
    """Point 6: values out of range, and the host's `weights=` beside ours."""
    for options, message in (
        ({"k": 0.5}, "k >= 1"),
        ({"k": math.inf}, "k >= 1"),
        ({"lam": 5.0}, "lam in"),
        ({"lam": "off"}, "'auto'"),
        ({"snr_boundary": 0.0}, "SNR boundary"),
        ({"policy": "speed", "k": 5.0, "lam": None}, "got k and lam beside a policy"),
    ):
        refused(lambda options=options: seam.host.build("SpeeDFlow", **options), message)
    refused(lambda: seam.step(seam.attached(), weights=torch.ones(1000)), "has its own")


def bfloat16_keeps_the_law(seam: SpeeDFlowSeam) -> None:
    """Point 8: under a bfloat16 default dtype too, 1 - 1/k of the late draws are refused."""
    with default_dtype(torch.bfloat16):
        share = seam.share_past_boundary()
    # 0.2 * 0.077 / 0.938 of the draws are late.
    assert abs(share - 0.0164) < 4 * math.sqrt(0.0164 / 20_000) + 1 / 256, share


def resumed_draws_go_on(seam: SpeeDFlowSeam) -> None:
    """Point 9: its state is the number of training calls."""
    seen: list[list[Tensor]] = []
    for steps in ((3,), (1, 2)):
        state, drawn = None, []
        for num_steps in steps:
            torch.manual_seed(0)
            new_process()
            host = seam.attached()
            if state is not None:
                load_policy_state(host, state)
            for _ in range(num_steps):
                model = seam.model(host)
                with seeds_kept():
                    seam.train(host, model, seam.batch())
                drawn += model.seen
            state = policy_state(host)
        seen.append(drawn)
    assert all(map(torch.equal, *seen)), "another t after the resume"
    assert not torch.equal(seen[0][0], seen[0][1]), "each step has the same t"
    refused(lambda: policy_of(host), "thins its own draws")


SpeeDFlowSeam.contract = points.COMMON | {
    1: (convergence_area_is_k_times_rarer, callers_t_is_kept),
    2: (loss_is_the_hosts_weighted, logit_normal_is_not_weighted, masks_are_the_hosts),
    3: (
        k_one_is_the_hosts_training,
        points.evaluations_are_the_hosts,
        points.random_numbers_are_the_hosts,
        train_call_of_1_3,
    ),
    6: (bad_options_are_refused,),
    8: (points.wrapped_models_train_alike, bfloat16_keeps_the_law),
    9: (resumed_draws_go_on,),
}
