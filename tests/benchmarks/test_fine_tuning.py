"""Trainings that go on from trained weights."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

Load = Callable[[str], ModuleType]


@pytest.mark.parametrize("rank", [0, 2])
def test_members_start_from_the_weights_of_their_seed_and_move(load: Load, tmp_path: Path, rank: int) -> None:
    tuning, training, sets = load("stacked.fine_tuning"), load("stacked.training"), load("image_sets")
    digits = sets.load_image_set("digits", 8)
    first, later = (
        sets.ImageSet(digits.images[rows][:20], digits.labels[rows][:20], 10)
        for rows in (digits.labels < 5, digits.labels >= 5)
    )
    shape = training.Shape(width=8, depth=1, num_heads=2, batch_size=4)
    start = tuning.Start(first, 3, rank, tmp_path, "start")
    members = [
        training.Member(law, seed, prediction_type="flow", label=law)
        for law, seed in (("uniform", 0), ("logit_normal", 0), ("uniform", 1))
    ]
    stack = tuning.going_on(members, later, shape, start)
    assert {path.name for path in tmp_path.iterdir()} == {"start_0.pt", "start_1.pt"}
    for number, member in enumerate(members):
        saved = torch.load(tmp_path / f"start_{member.seed}.pt", weights_only=True)
        found = stack.averaged_weights(number)
        assert found.keys() == saved.keys()
        # Low-rank additions start at 0.
        assert all(torch.equal(found[name], saved[name]) for name in saved)

    for _ in range(2):
        stack.train_step()
    moved = {
        name
        for name, value in stack.averaged_weights(0).items()
        if not torch.equal(value, torch.load(tmp_path / "start_0.pt", weights_only=True)[name])
    }
    in_blocks = {name for name in moved if name.startswith("blocks") and name.endswith("weight")}
    assert in_blocks
    if rank:
        assert moved - in_blocks == {"y_embedder.embedding_table.weight"}
    else:
        assert "x_embedder.proj.weight" in moved


def test_a_member_alone_computes_what_it_computes_in_the_stack(load: Load, tmp_path: Path) -> None:
    tuning, training, sets = load("stacked.fine_tuning"), load("stacked.training"), load("image_sets")
    digits = sets.load_image_set("digits", 8)
    shape = training.Shape(width=8, depth=1, num_heads=2, batch_size=4)
    start = tuning.Start(digits, 3, 2, tmp_path, "start")
    members = [training.Member("uniform", seed, prediction_type="flow") for seed in (0, 1)]
    stack = tuning.going_on(members, digits, shape, start)
    for _ in range(3):
        stack.train_step()
    stack.averages = {name: p.detach().clone() for name, p in stack.parameters.items()}
    x, time, labels = torch.randn(6, 1, 8, 8), torch.rand(6) * 1000, torch.arange(6)
    with torch.no_grad():
        together = stack.model(x, time, labels)
        for number, rows in enumerate((slice(0, 3), slice(3, 6))):
            alone = training.build_model(digits, shape)
            alone.load_state_dict({**alone.state_dict(), **stack.averaged_weights(number)})
            assert_close(alone(x[rows], time[rows], labels[rows]), together[rows], atol=1e-5, rtol=1e-4)
