"""Tests of masked training.

Dims: `B` samples, `N` tokens, `K` kept tokens.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import small_config, small_trainer
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.policies.policy import TimestepDraw
from speedit_plugins.trainer.accelerations.masking import Masking, draw_kept, num_kept
from speedit_plugins.trainer.accelerations.objective import Objective
from speedit_plugins.trainer.accelerations.uncertainty import log_snr
from speedit_plugins.trainer.build import build_model
from speedit_plugins.trainer.config.validation import ConfigError
from speedit_plugins.trainer.diffusion.gaussian_process import LossTerms
from speedit_plugins.trainer.inputs import ModelInputs
from speedit_plugins.trainer.logging.tracking import Tracker, read_metrics
from speedit_plugins.trainer.models.training_only import layers_of
from speedit_plugins.trainer.training.interrupt import StopRequest
from speedit_plugins.trainer.training.trainer import Trainer

MASKED: dict[str, Any] = {
    "masking__type": "MDT",
    "model__type": "MDTv2",
    "model__patch_size": 2,
    "model__depth": 4,
    "model__decode_layer": 2,
}
NUM_TOKENS = 16


def masked_trainer(folder: Path, **changes: Any) -> Trainer:
    return small_trainer(folder, **MASKED | changes)


def stir(model: torch.nn.Module) -> None:
    """Random weights: nothing hides behind an initial zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)


def batch_of(trainer: Trainer) -> tuple[ModelInputs, TimestepDraw]:
    batch = next(trainer.loader)
    generators = [torch.Generator().manual_seed(number) for number in range(len(batch["image"]))]
    given = trainer.inputs.encode(batch, generators)
    draw = trainer.policy.draw(len(given.latents), generator=torch.Generator().manual_seed(0))
    return given, draw


@pytest.mark.parametrize("process", ["SpeeDiffusion", "RectifiedFlow"])
def test_the_loss_is_the_sum_of_both_passes_at_one_noise_each_weighed_by_the_policy(
    tmp_path: Path, process: str
) -> None:
    policy = "{type: speed}" if process == "SpeeDiffusion" else "{type: auto, mean: 0}"
    changes = {"diffusion__type": process, "diffusion__policy": policy}
    trainer = masked_trainer(tmp_path, **changes)
    stir(trainer.model)
    trainer.model.eval()
    given, draw = batch_of(trainer)
    torch.manual_seed(4)
    terms = trainer.objective.losses(given, draw)
    # The same by hand: the share, then the mask, are the only draws of a model without label dropout.
    torch.manual_seed(4)
    share = 0.3 + 0.2 * float(torch.rand(()))
    kept = torch.rand(len(given.latents), NUM_TOKENS).argsort(dim=1)[:, : int(NUM_TOKENS * (1 - share))]
    own = trainer.objective.process
    noised = own.corrupt(given.latents, draw, noise=given.noise)
    full, masked = (
        own.loss(trainer.model(noised.x_t, noised.timestep, given.condition, kept=each), noised, draw)
        for each in (None, kept)
    )
    assert not torch.equal(full.loss, masked.loss)
    assert_close(terms.loss, full.loss + masked.loss)
    assert_close((terms.mse, terms.vb), (full.mse, full.vb), rtol=0, atol=0)
    # Both terms of the mean channels have the policy's weight.
    doubled = draw.map(lambda table: 2 * table if table is draw.weight else table)
    torch.manual_seed(4)
    gain = trainer.objective.losses(given, doubled).loss - terms.loss
    assert_close(gain, draw.weight * (full.mse + masked.mse), rtol=1e-4, atol=1e-5)


def test_a_learned_uncertainty_divides_both_passes_and_neither_bound(tmp_path: Path) -> None:
    trainer = masked_trainer(tmp_path, uncertainty="true")
    stir(trainer.model)
    trainer.model.eval()
    given, draw = batch_of(trainer)
    seen: list[LossTerms] = []
    process = trainer.objective.process
    score = process.loss
    process.loss = lambda *scored: seen.append(score(*scored)) or seen[-1]
    loss = trainer.objective.losses(given, draw).loss
    noised = process.corrupt(given.latents, draw, noise=given.noise)
    u = layers_of(trainer.model)["uncertainty"](log_snr(process, noised))
    mse, bound = sum(each.mse for each in seen), sum(each.vb for each in seen)
    assert len(seen) == 2
    assert bound.min() > 0
    assert_close(loss, draw.weight * mse / torch.exp(u) + u + bound)


def test_each_pass_drops_labels_by_its_own_draw(tmp_path: Path) -> None:
    trainer = masked_trainer(tmp_path, model__class_dropout_prob=0.5)
    seen: list[Tensor] = []
    trainer.model.y_embedder.embedding_table.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    trainer.model.train()
    trainer.objective.losses(*batch_of(trainer))
    full, masked = (labels == 10 for labels in seen)
    # 16 samples with probability 1/2: none or all dropped, or both draws alike, has probability below 1e-4.
    assert full.any()
    assert masked.any()
    assert not torch.equal(full, masked)


def test_the_averaged_teacher_sees_the_labels_of_the_full_pass(tmp_path: Path) -> None:
    aligned = "{type: SRA, layer: 1, decay: 0.9}"
    trainer = masked_trainer(tmp_path, model__class_dropout_prob=0.5, alignment=aligned)
    student, teacher = list[Tensor](), list[Tensor]()
    _, alignment = trainer.objective.accelerations
    for model, seen in ((trainer.model, student), (alignment._teacher, teacher)):
        model.y_embedder.embedding_table.register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append(given[0])
        )
    trainer.model.train()
    for _ in range(2):
        student.clear()
        teacher.clear()
        trainer.objective.losses(*batch_of(trainer))
        assert torch.equal(teacher[0], student[0])
        assert not torch.equal(student[0], student[1])


def test_masks_are_uniform_and_the_share_of_masked_tokens_is_rounded_up() -> None:
    assert [num_kept(16, share) for share in (0.25, 0.3, 0.5, 0.9)] == [12, 11, 8, 1]
    kept = draw_kept(4000, 16, 0.3, device=torch.device("cpu"))
    counts = torch.bincount(kept.flatten(), minlength=16)
    assert kept.shape == (4000, 11)
    assert all(len(set(row)) == 11 for row in kept[:50].tolist())
    # 5 sigma of a binomial frequency.
    assert_close(counts / 4000, torch.full((16,), 11 / 16), rtol=0, atol=5 * (11 / 16 * 5 / 16 / 4000) ** 0.5)
    same = [torch.manual_seed(1) and draw_kept(2, 16, 0.5, device=kept.device) for _ in range(2)]
    assert torch.equal(*same)


def test_the_releases_spread_of_the_share_is_the_default_of_each_model(tmp_path: Path) -> None:
    for number, (kind, given, wanted) in enumerate(
        [("MDT", "null", 0.0), ("MDTv2", "null", 0.2), ("MDTv2", 0.1, 0.1)]
    ):
        trainer = masked_trainer(tmp_path / str(number), model__type=kind, masking__spread=given)
        (masking,) = trainer.objective.accelerations
        assert isinstance(masking, Masking)
        assert masking._spread == wanted


def test_recomputed_blocks_of_a_masked_step_change_no_gradient(tmp_path: Path) -> None:
    found = []
    for recomputed in (False, True):
        trainer = masked_trainer(tmp_path / str(recomputed), model__gradient_checkpointing=recomputed)
        torch.manual_seed(3)
        stir(trainer.model)
        given, draw = batch_of(trainer)
        torch.manual_seed(4)
        trainer.model.train()
        trainer.objective.losses(given, draw).loss.mean().backward()
        found.append({name: p.grad for name, p in trainer.model.named_parameters()})
    assert all(gradient is not None for gradient in found[0].values())
    assert_close(found[0], found[1], rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_masked_training_learns_validates_and_profiles(tmp_path: Path, precision: str) -> None:
    trainer = masked_trainer(
        tmp_path,
        precision=precision,
        optimizer__lr=2e-3,
        data__held_out_samples=16,
        validate_every=15,
        profile_every=30,
        max_training_steps=30,
    )
    given, draw = batch_of(trainer)
    trainer.model.eval()
    before = trainer.objective.losses(given, draw).loss.mean()
    with Tracker(tmp_path, total_steps=30, start_step=0) as tracker:
        trainer.fit(tracker, StopRequest())
    trainer.model.eval()
    assert trainer.objective.losses(given, draw).loss.mean() < 0.8 * before
    rows = read_metrics(tmp_path)
    first, last = (row["val_loss"] for row in rows if "val_loss" in row)
    assert last < first
    (norms,) = (row["profile_grad_norm"] for row in rows if "profile_grad_norm" in row)
    assert min(value for value in norms if value is not None) > 0


def test_the_plain_objective_of_the_same_model_has_the_full_pass_alone(tmp_path: Path) -> None:
    trainer = masked_trainer(tmp_path)
    stir(trainer.model)
    trainer.model.eval()
    given, draw = batch_of(trainer)
    plain = Objective(trainer.engine, trainer.objective.process).losses(given, draw)
    assert (trainer.objective.losses(given, draw).loss > plain.loss).all()


def test_pretrained_weights_and_adapters_go_with_it(tmp_path: Path) -> None:
    first = masked_trainer(tmp_path / "first")
    stir(first.model)
    save_file(dict(first.model.state_dict()), tmp_path / "whole.safetensors")
    trainer = masked_trainer(tmp_path / "second", pretrained=tmp_path / "whole.safetensors", lora__rank=2)
    trainer.optimizer_step()
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert all(".lora_" in name for name in trained)
    assert any("sideblocks" in name for name in trained)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masking__ratio": 1.0}, r"masking\.ratio: wanted float < 1"),
        ({"masking__ratio": 0}, r"masking\.ratio: wanted float > 0"),
        ({"masking__ratio": 0.8, "masking__spread": 0.2}, r"masking\.spread: wanted ratio \+ spread < 1"),
        ({"masking__type": "none", "masking__ratio": 0.5}, r"masking\.ratio: has no effect with .* none"),
        ({"masking__type": "none", "masking__spread": 0.1}, r"masking\.spread: has no effect"),
        ({"masking__type": "mdt"}, r"masking\.type: wanted one of none, MDT, got 'mdt'; did you mean 'MDT'"),
        (
            {"plugin": "gemini"},
            r"masking\.type: makes two forward passes .* wanted ddp, zero1, zero2 or fsdp2",
        ),
    ],
)
def test_a_wrong_section_says_what_is_wanted(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(tmp_path, **MASKED | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masking__type": "MDT"}, r"masking\.type: MDT needs a model with a masked pass, .* got DiT"),
        (
            {**MASKED, "masking__type": "none"},
            r"masking\.type needs MDT to train MDTv2, got none: only the masked pass trains its side-inter",
        ),
        ({**MASKED, "masking__ratio": 0.75}, r"leave some of the 16 tokens .* got a share of 0\.95"),
        ({**MASKED, "masking__ratio": 0.01, "masking__spread": 0}, None),
    ],
)
def test_a_model_that_does_not_fit_says_what_is_wanted(
    tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    if message is None:
        # A share of 0.01 of 16 tokens rounds up to one masked token.
        small_trainer(tmp_path, **changes)
        return
    with pytest.raises(ValueError, match=message):
        small_trainer(tmp_path, **changes)


def test_a_model_of_one_size_refuses_other_sides(tmp_path: Path) -> None:
    folder = f"{{type: ImageFolder, root: {tmp_path}, image_size: 8, buckets: [[8, 8], [8, 4]]}}"
    with pytest.raises(
        ValueError,
        match=r"data\.dataset\.buckets\[1\] \[8, 4\] needs 8 x 8, got 8 x 4: this MDTv2 takes one size",
    ):
        build_model(small_config(tmp_path, **MASKED, data__dataset=folder))


def test_a_video_model_has_no_masked_pass(tmp_path: Path) -> None:
    changes = {
        "model__type": "Latte",
        "num_frames": 4,
        "data__dataset": "MovingDigits",
        "image_size": 16,
        "model__input_size": 16,
    }
    with pytest.raises(
        ValueError, match=r"masking\.type: MDT needs a model with a masked pass, .* got Latte"
    ):
        small_trainer(tmp_path, masking__type="MDT", **changes)
