"""Seam B: the host draws t and calls `diffusion.training_losses(model, x, t, ...)`, or DiT-3D's `p_losses`.

Dims: B batch, C channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from conformance import points
from conformance.models import KeyedModel, SmallModel
from conformance.points import on, refused
from conformance.seam import POLICY, Batch, Seam, Terms, seeded
from speedit_plugins.hosts.attachment import Attachment, attach, attachment_of
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.entry import with_policy
from speedit_plugins.hosts.objects import drawing_object
from speedit_plugins.hosts.objects.diffusion_object import steered_methods
from speedit_plugins.launch_seams import DeferredPolicy, Launch
from speedit_plugins.policies.policy import TimestepDraw


@dataclass(frozen=True)
class ObjectSeam(Seam):
    """A host's diffusion object.

    Args:
        factory: a function of the host. Its argument is the respacing, '' for none.
        shape: of the data, (B, C, ...) or in the host's order.
        sigma_axis: where the model's variance channels are appended; None if it has none.
        method: name of the training method.
        answers_tuple: whether the model returns a tuple in training.
        sampling: names of the sampling methods, called with the model and the shape.
        respacing: how many timesteps are kept, '' for all.
    """

    factory: Callable[[str], Any]
    shape: tuple[int, ...]
    sigma_axis: int | None = 1
    method: str = "training_losses"
    answers_tuple: bool = False
    sampling: tuple[str, ...] = ("p_sample_loop", "ddim_sample_loop")
    respacing: str = ""

    def make(self) -> Any:
        return self.factory(self.respacing)

    def model(self, host: Any, dtype: torch.dtype = torch.float32) -> SmallModel:
        return SmallModel(self.sigma_axis, answers_tuple=self.answers_tuple).to(dtype)

    def train(self, host: Any, model: Any, batch: Batch, t: Tensor | None = None) -> Terms:
        x, noise = batch
        t = torch.zeros(len(x), dtype=torch.long) if t is None else t
        return terms_of(getattr(host, self.method)(model, x, t, noise=noise))

    def sees(self, host: Any, draw: TimestepDraw, seen: Tensor) -> bool:
        # A respaced object gives its model the timesteps of the whole schedule.
        timesteps = torch.tensor(list(getattr(host, "timestep_map", range(host.num_timesteps))))
        return torch.equal(seen.to(timesteps.dtype), timesteps[draw.index])

    def sample(self, host: Any) -> Tensor:
        model, options = SmallModel(self.sigma_axis), {"y": None} if self.method == "p_losses" else {}
        samplers = [getattr(host, name) for name in self.sampling]
        return torch.stack([sample(model, self.shape, device="cpu", **options) for sample in samplers])

    def idle(self) -> Any:
        """As the launcher makes it: the policy is built when the object first trains."""
        host = self.make()
        source = DeferredPolicy(Launch({"type": POLICY}), "host", host)
        return attach(host, Attachment(source), steered_methods)

    def is_unused(self, host: Any) -> bool:
        return not attachment_of(host).is_built


def terms_of(returned: Tensor | Mapping[str, Tensor]) -> Terms:
    """The terms (B,) that a host returns: a dict, or the loss alone."""
    if isinstance(returned, Tensor):
        return Terms(returned, mse=returned)
    reported = {name: value for name, value in returned.items() if name != "loss"}
    return Terms(returned["loss"], returned.get("mse"), returned.get("vb", 0.0), reported)


def attributes_reach_the_host(seam: ObjectSeam) -> None:
    """Point 5."""
    diffusion = seam.attached()
    assert diffusion.num_timesteps == len(diffusion.betas), "attributes do not reach the host"


def missing_seam_is_refused(seam: ObjectSeam) -> None:
    """Point 6: the host's object with its training method under another name."""
    diffusion = seam.make()
    owners = type(diffusion).__mro__[:-1]
    kept = {k: v for owner in reversed(owners) for k, v in vars(owner).items() if not k.startswith("__")}
    for name in [name for name in kept if name.startswith(("training_losses", "p_losses"))]:
        kept[f"old_{name}"] = kept.pop(name)
    bare = object.__new__(type("Changed", (), kept))
    vars(bare).update(vars(diffusion))
    refused(lambda: with_policy(bare, POLICY), "has no seam: looked for a method training_losses")


def each_call_is_weighed_by_itself(seam: ObjectSeam) -> None:
    """Point 2, of a host whose loss gets another term, and then another factor, in later steps.

    The term is a parameter, which has a gradient also while it is 0. A loss without terms is weighed whole.
    """
    host = seam.make()
    plain, changes, extra = type(host), {"factor": 1.0}, torch.zeros((), requires_grad=True)

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        terms = getattr(plain, seam.method)(self, *args, **kwargs)
        if isinstance(terms, Tensor):
            changes["whole"] = terms.detach()
            return changes["factor"] * terms
        return {**terms, "loss": changes["factor"] * terms["loss"] + extra}

    host.__class__ = type(plain.__name__, (plain,), {seam.method: changed})
    host = with_policy(host, POLICY, generator=seeded())
    policy, generator = seam.policy(), seeded()
    for factor, value in ((1.0, 0.0), (1.0, 7.0), (0.5, 0.0), (0.5, 7.0), (1.0, 0.0)):
        changes["factor"], extra.data, extra.grad = factor, torch.tensor(value), None
        terms = seam.train(host, seam.model(host), seam.batch())
        draw = policy.draw(seam.shape[0], generator=generator)
        assert terms.mse is not None, "the host's mse is not known"
        wanted = factor * draw.weight * changes.get("whole", terms.mse)
        if "whole" not in changes:
            wanted = wanted + factor * terms.vb + value
            terms.loss.sum().backward()
            assert extra.grad == seam.shape[0], f"a term of value {value} has the gradient {extra.grad}"
        error = float(((terms.loss - wanted).abs() / wanted.abs()).max().detach())
        assert error <= 1e-6, f"loss * {factor} + {value} in a later step: off by {error:.1e} relative"


@dataclass(frozen=True)
class DrawingSeam(ObjectSeam):
    """A host's object that draws t inside of its training call (HunyuanDiT)."""

    training_call = "diffusion.training_losses(lambda x, t: {'x': model(x, t)}, x_start=x)"

    def model(self, host: Any, dtype: torch.dtype = torch.float32) -> SmallModel:
        return KeyedModel(self.sigma_axis).to(dtype)

    def train(self, host: Any, model: Any, batch: Batch, t: Tensor | None = None) -> Terms:
        x, noise = batch
        own = torch.randint

        def given(*args: Any, **kwargs: Any) -> Tensor:
            drawn = own(*args, **kwargs)
            return drawn if t is None else t.clone().to(drawn)

        with mock.patch.object(torch, "randint", given):
            return terms_of(host.training_losses(model=model, x_start=x, noise=noise))

    def sample(self, host: Any) -> Tensor:
        model = KeyedModel(self.sigma_axis)
        samplers = [getattr(host, name) for name in self.sampling]
        return torch.stack([sample(model, self.shape, device="cpu") for sample in samplers])

    def idle(self) -> Any:
        host = self.make()
        source = DeferredPolicy(Launch({"type": POLICY}), "host", host)
        return drawing_object.attach_later(host, source, DrawStream())


def hosts_weights_are_refused(seam: DrawingSeam) -> None:
    """Point 7: the host's Min-SNR weights beside those of a policy; one without weights trains."""
    host = seam.make()
    host.mse_loss_weight_type = "min_snr_5"
    refused(lambda: with_policy(host, POLICY), "mse_loss_weight_type 'min_snr_5' weighs the mse")
    with_policy(host, {"type": "logit_normal", "weighting": "constant"})


ObjectSeam.contract = points.COMMON | {
    1: (on([{"respacing": ""}, {"respacing": "50"}], points.draws_are_seen), points.data_are_observed),
    2: (*points.COMMON[2], each_call_is_weighed_by_itself),
    4: (on([{"respacing": "5"}], points.sampling_is_untouched),),
    5: (*points.COMMON[5], attributes_reach_the_host),
    6: (missing_seam_is_refused,),
}
DrawingSeam.contract = {
    **ObjectSeam.contract,
    2: points.COMMON[2],
    7: (*points.COMMON[7], hosts_weights_are_refused),
}
