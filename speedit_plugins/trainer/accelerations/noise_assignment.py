"""Noise that is assigned within a batch: each sample gets a near one of the batch's draws.

Dims: `B` samples of this rank, `M` numbers of a sample.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from speedit_plugins.trainer.accelerations.objective import Acceleration
from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.inputs import ModelInputs


class NoiseAssignment(Acceleration):
    """Permutes the noise of a rank's batch so that the sum of |x_0 - noise|^2 is smallest.

    The assignment does not see the timesteps, so the law of the timesteps stays that of the policy, for every
    sample. It costs no call of the model: a (B, B) product, and O(B^3) on the CPU.

    Source: immiscible diffusion, Li et al. 2024, arXiv:2406.12303; as a coupling of flows, Pooladian et al.
    2023, arXiv:2304.14772, and Tong et al. 2023, arXiv:2302.00482.

    Args:
        within_classes: only samples of one class exchange noise. Then the noise given the class stays a
            standard normal. It does not if a class may take the noise that is near to it.
    """

    def __init__(self, *, within_classes: bool = False) -> None:
        self._within_classes = within_classes

    def paired(self, given: ModelInputs) -> ModelInputs:
        """The inputs with the noise of each sample exchanged.

        Raises:
            ValueError: the rank has a single sample.
        """
        if len(given.latents) < 2:
            raise ValueError(
                "noise_assignment needs two samples on each rank, got data.batch_size 1 for each process"
            )
        group = labels_of(given.condition) if self._within_classes else None
        return replace(given, noise=given.noise[assignment(given.latents, given.noise, group)])


def labels_of(condition: Condition) -> Tensor:
    """The labels (B,) of a class-conditional batch."""
    found = condition["label"] if isinstance(condition, Mapping) else condition
    assert isinstance(found, Tensor)
    return found


def assignment(x_0: Tensor, noise: Tensor, group: Tensor | None = None) -> Tensor:
    """The permutation of the noise that brings it nearest to the data, int64 (B,) on the data's device.

    Args:
        x_0: data (B, ...).
        noise: in the same shape; sample i gets `noise[permutation[i]]`.
        group: (B,); only samples with the same value exchange noise. None lets all.

    Returns:
        The permutation with the smallest sum of |x_0 - noise|^2 among those that are allowed.
    """
    # |x - e|^2 = |x|^2 - 2 x e + |e|^2, and the squares have the same sum for every permutation.
    products = x_0.flatten(1).float() @ noise.flatten(1).float().T  # (B, B)
    # A sample that is not finite may get any noise: its loss makes all ranks skip the step.
    products = products.nan_to_num().cpu()
    groups = torch.zeros(len(x_0)) if group is None else group.cpu()
    found = torch.empty(len(x_0), dtype=torch.int64)
    for value in sorted(set(groups.tolist())):
        members = (groups == value).nonzero().squeeze(1)
        found[members] = members[_nearest(products[members][:, members])]
    return found.to(x_0.device)


def _nearest(products: Tensor) -> Tensor:
    """The permutation with the largest sum of products (B, B)."""
    # Here, since no other part of a training needs scipy.
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(products.numpy(), maximize=True)
    return torch.from_numpy(columns)
