"""Values of a checkpoint that cannot be right: one line that names the checkpoint and the key."""

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import small_trainer

from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.checkpoints import CheckpointError
from speedit_plugins.trainer.training.saving.saved_state import read_state
from speedit_plugins.trainer.training.trainer import Trainer

LEARNS = {"diffusion__policy": "{type: loss_second_moment, history: 1}", "diffusion__diffusion_steps": 25}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    trainer = small_trainer(tmp_path_factory.mktemp("saved"), **LEARNS)
    for _ in range(2):
        trainer.optimizer_step()
    return trainer, trainer.save()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("step"), r"lacks step$"),
        (lambda state: state.pop("policy"), r"lacks policy$"),
        (lambda state: state.update(step="2"), r"has step '2', wanted an int >= 0$"),
        (lambda state: state.update(step=7), r"has step 7, wanted 2$"),
        (lambda state: state.update(ema_updates=math.nan), r"has ema_updates nan, wanted an int >= 0$"),
        (lambda state: state.update(num_skipped=-1), r"has num_skipped -1, wanted an int >= 0$"),
        (lambda state: state.update(loader=3), r"has loader 3, wanted a section with keys$"),
        (lambda state: state.update(products=[]), r"has products \[\], wanted a section with keys$"),
        (
            lambda state: state["loader"].update(offset="4"),
            r"has loader\.offset '4', wanted a finite",
        ),
        (lambda state: state["loader"].pop("seed"), r"the loader's state needs the keys .*'seed'"),
        (
            lambda state: state["policy"].update(num_steps=math.inf),
            r"has policy\.num_steps inf, wanted a",
        ),
        (lambda state: state["policy"].update(density=None), r"has a policy that cannot be read: .*None"),
        (lambda state: state["policy"]["density"].pop("losses"), r"'losses' belongs to one of them"),
        (
            lambda state: state["policy"]["density"]["losses"].fill_(math.nan),
            r"has policy\.density\.losses with 25 values that are not finite$",
        ),
        (
            lambda state: state["policy"]["density"].update(losses="none"),
            r"has policy\.density\.losses 'none', wanted a tensor$",
        ),
    ],
)
def test_a_value_that_cannot_be_right_is_named(
    saved: tuple[Trainer, Path], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    trainer, path = saved
    file = path / checkpoints.STATE
    whole = file.read_bytes()
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)
    try:
        with pytest.raises(CheckpointError, match=rf"^checkpoint {path} is .*{message}") as caught:
            trainer.restore(path)
    finally:
        file.write_bytes(whole)
    assert "\n" not in str(caught.value)


def test_what_is_saved_is_restored_and_a_policy_that_has_seen_little_keeps_its_gaps(tmp_path: Path) -> None:
    # Bins of the loss profile without a loss are NaN.
    trainer = small_trainer(tmp_path, diffusion__policy="{type: speed, normalize: loss}")
    trainer.optimizer_step()
    path = trainer.save()
    small_trainer(tmp_path, diffusion__policy="{type: speed, normalize: loss}").restore(path)
    assert read_state(path)["step"] == 1
    (path / checkpoints.STATE).write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=rf"^checkpoint {path} is damaged: state.pt: "):
        read_state(path)
    torch.save({"x": Fraction(1, 2)}, path / checkpoints.STATE)
    with pytest.raises(CheckpointError, match=r"state.pt: it asks for fractions\.Fraction") as caught:
        read_state(path)
    assert "weights_only" not in str(caught.value)
    assert caught.value.__suppress_context__
