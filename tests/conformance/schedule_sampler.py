"""Seam C: the host draws with `t, weights = schedule_sampler.sample(n, device)`.

It multiplies its whole loss by these weights.

Dims: B batch.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conformance import points
from conformance.diffusion_object import ObjectSeam, missing_seam_is_refused
from conformance.points import on, refused
from conformance.seam import POLICY, Batch, Terms, seeded
from speedit_plugins.hosts.entry import with_policy, without_policy
from speedit_plugins.hosts.schedule_sampler import schedule_sampler


@dataclass(frozen=True)
class SamplerSeam(ObjectSeam):
    """A host's diffusion object. The one with a policy keeps the schedule sampler as `sampler`.

    Args:
        sampler_class: the host's base class of schedule samplers.
        num_losses: number of losses in a step, all at one t.
    """

    sampler_class: type = object
    num_losses: int = 1
    draws_in_the_call = False

    def attached(self, policy: Any = POLICY, generator: torch.Generator | None = None) -> Any:
        host = self.make()
        host.sampler = schedule_sampler(host, policy, host_class=self.sampler_class, generator=generator)
        return host

    def train(self, host: Any, model: Any, batch: Batch, t: Tensor | None = None) -> Terms:
        weights: Any = 1
        if hasattr(host, "sampler"):
            t, weights = host.sampler.sample(len(batch[0]), "cpu")
        terms = [ObjectSeam.train(self, host, model, batch, t) for _ in range(self.num_losses)]
        assert all(torch.equal(terms[0].loss, each.loss) for each in terms), "losses of one step differ"
        return replace(terms[0], loss=terms[0].loss * weights)

    def holder(self, host: Any) -> Any:
        return host.sampler

    def idle(self) -> Any:
        return self.attached("uniform")

    def is_unused(self, host: Any) -> bool:
        return self.is_idle(host)


def sampler_gives_the_policys_t(seam: SamplerSeam) -> None:
    """Point 1."""
    t, _ = seam.attached(generator=seeded()).sampler.sample(seam.shape[0], "cpu")
    wanted = seam.policy().draw(seam.shape[0], generator=seeded()).index
    assert torch.equal(t, wanted), f"the sampler drew {t}, the policy {wanted}"


def sampler_is_the_hosts(seam: SamplerSeam) -> None:
    """Point 5."""
    plain, ours = seam.make(), seam.attached()
    assert isinstance(ours.sampler, seam.sampler_class), "not the host's ScheduleSampler"
    assert isinstance(ours, type(plain)), f"not a {type(plain).__name__}"


def second_sampler_is_refused(seam: SamplerSeam) -> None:
    """Point 7: neither a second sampler nor a policy that would draw again."""
    plain, ours = seam.make(), seam.attached()
    refused(lambda: schedule_sampler(ours, POLICY, host_class=seam.sampler_class), "has a policy already")
    refused(lambda: with_policy(ours, POLICY), "has a policy already")
    assert type(without_policy(ours)) is type(plain), f"left as {type(ours)}"


def evaluations_are_uniform(seam: SamplerSeam) -> None:
    """Point 3: without gradients the timesteps are those of the host's uniform sampler, with weights of 1."""
    sampler, size, T = seam.attached().sampler, seam.shape[0], len(seam.policy().density)
    np.random.seed(4)  # noqa: NPY002 - the host draws from this generator
    wanted = np.random.choice(T, size=(size,), p=np.ones(T) / T)  # noqa: NPY002 - as the host
    np.random.seed(4)  # noqa: NPY002 - as the host
    with torch.no_grad():
        t, weights = sampler.sample(size, "cpu")
    assert t.tolist() == wanted.tolist(), f"drew {t}, the host draws {wanted}"
    assert torch.equal(weights, torch.ones(size)), f"weights {weights}"
    assert sampler.policy.num_steps == 0, "the evaluation counted as training"


SamplerSeam.contract = points.COMMON | {
    1: (points.draws_are_seen, points.data_are_observed, sampler_gives_the_policys_t),
    3: (points.uniform_is_the_host, evaluations_are_uniform),
    4: (on([{"respacing": "5"}], points.sampling_is_untouched),),
    5: (sampler_is_the_hosts,),
    6: (missing_seam_is_refused,),
    7: (second_sampler_is_refused,),
}
