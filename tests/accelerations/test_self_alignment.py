"""SRA: tokens aligned with a running average of the model at a lower noise level.

Dims: `B` samples.
"""

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from runs import small_trainer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from speedit_plugins.trainer.accelerations.alignment import alignment
from speedit_plugins.trainer.accelerations.self_alignment import SelfAlignment, less_noised
from speedit_plugins.trainer.logging.tracking import SilentTracker
from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.interface import cut_blocks, input_shape
from speedit_plugins.trainer.models.latte import Latte
from speedit_plugins.trainer.models.mdt import MDT, MDTv2
from speedit_plugins.trainer.models.training_only import layers_of
from speedit_plugins.trainer.training.interrupt import StopRequest
from speedit_plugins.trainer.training.trainer import Trainer

FLOW = {"diffusion": "{type: RectifiedFlow, policy: {type: uniform}}", "sampler__type": "euler"}


def sra(trainer: Trainer) -> SelfAlignment:
    return cast(SelfAlignment, trainer.objective.accelerations[-1])


def inputs(trainer: Trainer) -> tuple[Any, Any]:
    generators = [torch.Generator().manual_seed(number) for number in range(16)]
    given = trainer.inputs.encode(next(trainer.loader), generators)
    return given, trainer.policy.draw(16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{}, FLOW], ids=["Gaussian", "flow"])
def test_the_teachers_input_has_the_same_noise_at_an_earlier_time(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    trainer = small_trainer(tmp_path, **options)
    given, draw = inputs(trainer)
    process = trainer.objective.process
    noised = process.corrupt(given.latents, draw, noise=given.noise)
    x_t, timestep = less_noised(process, noised, draw, torch.zeros(16))
    assert_close(x_t, noised.x_t)
    assert_close(timestep, noised.timestep)
    share = torch.linspace(0, 0.2, 16)
    x_t, timestep = less_noised(process, noised, draw, share)
    # Both kinds of time run to 1000, so a share of 0.2 is 200 timesteps, down to 0.
    gone = noised.timestep - timestep
    wanted = torch.minimum(1000 * share, noised.timestep)
    assert_close(gone.float(), wanted.float(), atol=1.0, rtol=0)
    if options:
        t = (timestep / 1000).view(-1, 1, 1, 1)
        assert_close(x_t, (1 - t) * noised.x_0 + t * noised.noise)
    else:
        schedule = trainer.objective.process.schedule
        alpha, sigma = (
            table[timestep.long()].float().view(-1, 1, 1, 1) for table in (schedule.alpha, schedule.sigma)
        )
        assert_close(x_t, alpha * noised.x_0 + sigma * noised.noise)


def test_the_target_is_the_averages_tokens_with_the_labels_that_the_model_saw(tmp_path: Path) -> None:
    trainer = small_trainer(
        tmp_path,
        alignment="{type: SRA, layer: 1, max_interval: 0.2, decay: 0, weight: 0.5}",
        model__class_dropout_prob=0.5,
        max_training_steps=2,
    )
    # At decay 0 the teacher is the model itself.
    trainer.fit(SilentTracker(), StopRequest())
    trainer.model.train()
    given, draw = inputs(trainer)
    torch.manual_seed(0)
    terms = trainer.objective.losses(given, draw)
    torch.manual_seed(0)
    dropped = torch.rand(16) < 0.5
    share = 0.2 * torch.rand(16)
    label = given.condition.masked_fill(dropped, 10)
    assert 0 < int(dropped.sum()) < 16
    trainer.model.eval()
    process = trainer.objective.process
    noised = process.corrupt(given.latents, draw, noise=given.noise)
    prediction, tokens = trainer.model(noised.x_t, noised.timestep, label, hidden_after=1)
    x_t, timestep = less_noised(process, noised, draw, share)
    _, target = trainer.model(x_t, timestep, label, hidden_after=2)
    similarity = alignment(layers_of(trainer.model)["projector"](tokens), target)
    assert_close(terms.alignment, similarity)
    assert_close(terms.loss, process.loss(prediction, noised, draw).loss - 0.5 * similarity)


def test_the_teacher_follows_by_its_decay_without_gradient_and_is_in_no_weights(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, alignment="{type: SRA, layer: 1, decay: 0.75}", max_training_steps=3)
    name = "blocks.0.attn.qkv.weight"
    weight: Tensor = trainer.model.get_parameter(name)
    wanted = weight.detach().clone()
    trainer.engine.model.train()
    for _ in range(3):
        trainer.optimizer_step()
        wanted = 0.75 * wanted + 0.25 * weight.detach()
    assert_close(sra(trainer).state_dict()[name], wanted)
    assert not any(value.requires_grad for value in sra(trainer).state_dict().values())
    # Its parameters are none of the model's: the optimizer, the ranks and the exports see the projector only.
    own = [key for key in trainer.model.state_dict() if key.startswith("training_only")]
    assert own == [
        f"training_only.projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    ]
    path = trainer.save()
    assert load_file(path / "model.safetensors").keys() == trainer.model.state_dict().keys()
    resumed = small_trainer(tmp_path, alignment="{type: SRA, layer: 1, decay: 0.75}", max_training_steps=3)
    resumed.restore(path)
    assert_close(sra(resumed).state_dict(), sra(trainer).state_dict(), rtol=0, atol=0)


def test_the_teacher_ends_at_its_last_block(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, alignment="{type: SRA, layer: 1}", model__depth=4)
    kept = sra(trainer).state_dict()
    assert {name.split(".")[1] for name in kept if name.startswith("blocks.")} == {"0", "1"}
    assert len(trainer.model.blocks) == 4


@pytest.mark.parametrize(
    "model",
    [
        DiT(8, 2, hidden_size=16, depth=4, num_heads=2, num_classes=0),
        Latte(8, 2, num_frames=2, hidden_size=16, depth=4, num_heads=2),
        MDT(8, 2, hidden_size=16, depth=4, num_heads=2, num_classes=0, decode_layer=2),
        MDTv2(8, 2, hidden_size=16, depth=4, num_heads=2, num_classes=0, decode_layer=2),
    ],
    ids=lambda model: type(model).__name__,
)
@pytest.mark.parametrize("depth", [2, 3])
def test_a_model_without_its_last_blocks_has_the_tokens_of_the_whole(model: nn.Module, depth: int) -> None:
    model.eval()
    for parameter in model.parameters():
        # So that no block is the identity.
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, *input_shape(model), generator=torch.Generator().manual_seed(1))
    part = copy.deepcopy(model)
    cut_blocks(part, depth)
    _, wanted = model(x, torch.tensor([3.0, 700.0]), hidden_after=depth)
    _, found = part(x, torch.tensor([3.0, 700.0]), hidden_after=depth)
    assert_close(found, wanted, rtol=0, atol=0)
