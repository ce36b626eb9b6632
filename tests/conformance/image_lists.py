"""A transport that trains lists of images of several sizes, as Lumina-Image 2.0 does.

Dims: B batch.
"""

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from conformance.flow import LAW, FlowSeam
from speedit_plugins.hosts.attachment import attachment_of
from speedit_plugins.hosts.entry import with_policy
from speedit_plugins.policies.policy import TimestepPolicy


def check_lists(seam: FlowSeam) -> None:
    """Points 1, 2 and 3 for a batch of three images in two sizes.

    Raises:
        AssertionError: one of them does not hold.
    """
    generator = torch.Generator().manual_seed(5)
    sizes = ((4, 4, 4), (4, 2, 6), (4, 4, 4))
    images = [torch.randn(size, generator=generator) for size in sizes]
    seen, losses, policies = [], [], (None, "uniform", LAW, "speed")
    for policy in policies:
        host = seam.make() if policy is None else with_policy(seam.make(), policy)
        model, observed = seam.model(host), list[Tensor]()

        def answer(x: list[Tensor], t: Tensor, model: Any = model) -> list[Tensor]:
            return [model(each[None], one[None])[0] for each, one in zip(x, t, strict=True)]

        torch.manual_seed(3)
        with mock.patch.object(TimestepPolicy, "observe", lambda _, data, kept=observed: kept.append(data)):
            terms = host.training_losses(answer, images)
        seen.append(torch.cat(model.seen))
        losses.append(terms["loss"].detach())
        assert torch.equal(terms["t"], seen[-1]), "the host reports another t"
        if policy is not None:
            wanted = torch.stack([images[0], images[2]])
            assert torch.equal(observed[0], wanted), "observed other images than those of the frequent size"
            with torch.no_grad(), mock.patch.object(torch, "rand", lambda *_, t=terms["t"], **__: t.clone()):
                plain = seam.make()
                # The noise comes before t.
                torch.manual_seed(3)
                theirs = plain.training_losses(answer, images)["loss"]
            index = (seam.time_of(seen[-1]) * 1000).long().clamp(max=999)
            weight = attachment_of(host).policy.weight.float()[index]
            error = float(((losses[-1] - weight * theirs).abs() / theirs).max())
            assert error <= 2e-7, f"{policy}: the loss of a list misses w * mse by {error:.1e}"
    assert torch.equal(seen[0], seen[1]), "uniform: other timesteps than without the plugin"
    assert torch.equal(losses[0], losses[1]), "uniform: another loss than without the plugin"
