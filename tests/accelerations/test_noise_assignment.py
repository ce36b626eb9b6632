"""Noise that is assigned within a batch.

Dims: `B` samples, `M` numbers of a sample.
"""

import itertools
import re
from pathlib import Path

import pytest
import torch
from runs import small_config, small_trainer
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.trainer.accelerations.noise_assignment import NoiseAssignment, assignment
from speedit_plugins.trainer.config.validation import ConfigError
from speedit_plugins.trainer.inputs import ModelInputs


def drawn(B: int, M: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, 1, M, generator=generator), torch.randn(B, 1, M, generator=generator)


def distance(x_0: Tensor, noise: Tensor) -> float:
    return float((x_0 - noise).square().sum())


@pytest.mark.parametrize("seed", range(4))
def test_no_other_permutation_brings_the_noise_nearer(seed: int) -> None:
    x_0, noise = drawn(5, 3, seed)
    nearest = min(distance(x_0, noise[list(order)]) for order in itertools.permutations(range(5)))
    found = assignment(x_0, noise)
    assert sorted(found.tolist()) == list(range(5))
    assert distance(x_0, noise[found]) == pytest.approx(nearest, rel=1e-5)


def test_classes_exchange_noise_among_themselves_and_as_if_alone() -> None:
    x_0, noise = drawn(9, 3)
    label = torch.tensor([0, 1, 0, 2, 1, 0, 1, 1, 0])
    found = assignment(x_0, noise, label)
    assert_close(label[found], label)
    for value in range(3):
        members = (label == value).nonzero().squeeze(1)
        assert_close(found[members], members[assignment(x_0[members], noise[members])])


def test_the_noise_given_the_class_stays_normal_only_if_classes_keep_to_themselves() -> None:
    # Two classes at -1 and 1. In a batch of all, the larger half of the noise goes to the class at 1: its
    # mean is sqrt(2 / pi) = 0.80 for large batches. Within the class it is 0.
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(64) % 2
    x_0 = (2.0 * label - 1).unsqueeze(1)
    means = {True: 0.0, False: 0.0}
    for _ in range(200):
        noise = torch.randn(64, 1, generator=generator)
        for kind in means:
            given = NoiseAssignment(within_classes=kind).paired(ModelInputs(x_0, noise, label))
            means[kind] += float(given.noise[label == 1].mean()) / 200
            # A permutation: the noise of the batch is the same set.
            assert_close(given.noise.sort(0).values, noise.sort(0).values, rtol=0, atol=0)
    # 4 sigma of a mean of 6400 normals: 0.05.
    assert abs(means[True]) < 0.05
    assert means[False] == pytest.approx((2 / torch.pi) ** 0.5, abs=0.05)


def test_a_single_sample_on_a_rank_is_refused() -> None:
    x_0, noise = drawn(1, 2)
    with pytest.raises(ValueError, match="needs two samples on each rank"):
        NoiseAssignment().paired(ModelInputs(x_0, noise, None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"noise_assignment": "batch", "data__batch_size": 1},
            "needs two samples in a batch, got data.batch_s",
        ),
        (
            {"noise_assignment": "class", "num_classes": 0, "model__num_classes": 0},
            "class needs classes, but num_classes is 0; wanted batch or null",
        ),
        ({"noise_assignment": "clas"}, "did you mean 'class'"),
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"noise_assignment: .*{re.escape(message)}"):
        small_config(tmp_path, **changes)


def test_the_trainer_noises_with_the_assigned_noise(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, noise_assignment="class")
    batch = next(trainer.loader)
    generators = [torch.Generator().manual_seed(number) for number in range(len(batch["image"]))]
    given = trainer.inputs.encode(batch, generators)
    seen = []
    corrupt = trainer.objective.process.corrupt
    trainer.objective.process.corrupt = lambda x_0, draw, noise: (  # type: ignore[method-assign]  # of this object
        seen.append(noise) or corrupt(x_0, draw, noise=noise)
    )
    draw = trainer.policy.draw(len(given.latents), generator=torch.Generator().manual_seed(0))
    trainer.objective.losses(given, draw)
    wanted = given.noise[assignment(given.latents, given.noise, given.condition)]
    assert_close(seen[0], wanted, rtol=0, atol=0)
    assert not torch.equal(wanted, given.noise)
