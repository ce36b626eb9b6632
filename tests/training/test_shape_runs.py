"""Trainings on voxels and point clouds: the step, averages, resuming, samplers and what does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from shapes_of_tests import FLOW, POINTS, shape_config
from torch.testing import assert_close

from speedit_plugins.trainer import build
from speedit_plugins.trainer.data.loader import NOISE_STREAM, TIMESTEP_STREAM, stream_seed
from speedit_plugins.trainer.logging.tracking import Tracker, read_metrics
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.sampling.generator import SampleGenerator
from speedit_plugins.trainer.training.assembly import build_trainer
from speedit_plugins.trainer.training.data_centre import centred
from speedit_plugins.trainer.training.dry_run import describe
from speedit_plugins.trainer.training.interrupt import StopRequest
from speedit_plugins.trainer.training.trainer import Trainer

ACCELERATED = (
    *("model.depth=4", "routing={from: 1, to: -2, keep: 0.5}", "alignment={type: SRA, layer: 1, decay: 0.9}"),
    *("contrastive.weight=0.05", "uncertainty=true", "noise_assignment=class", "precision=bf16"),
)
IMAGES = ("voxel_size=0", "encoder={type: Pixels, channels: 1}")
FORMS = {"voxels": ((), (1, 8, 8, 8)), "points": (POINTS, (3, 40))}


def fit(trainer: Trainer) -> Trainer:
    with Tracker(trainer.folder, total_steps=trainer.config.max_training_steps, start_step=trainer.step) as t:
        trainer.fit(t, StopRequest())
    return trainer


def state(trainer: Trainer) -> dict[str, Any]:
    return {
        "model": trainer.model.state_dict(),
        "ema": trainer.averaged_weights(),
        "optimizer": trainer.engine.optimizer.state_dict(),
        "next": next(trainer.loader),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("process", ["gaussian", "flow", "accelerated flow"])
def test_a_run_on_shapes_resumes_bit_for_bit_and_draws_with_every_sampler(
    tmp_path: Path, form: str, process: str
) -> None:
    options, shape = FORMS[form]
    is_flow = "flow" in process
    options = (*options, *([FLOW] if is_flow else []), *(ACCELERATED if "accelerated" in process else []))
    whole = fit(build_trainer(shape_config(tmp_path / "whole", *options)))
    half = shape_config(tmp_path / "parts", *options, "max_training_steps=5")
    fit(build_trainer(half))
    resumed = build_trainer(shape_config(tmp_path / "parts", *options))
    resumed.restore(tmp_path / "parts" / "run" / "checkpoints" / "step_0000005")
    assert_close(state(fit(resumed)), state(whole), rtol=0, atol=0)
    samplers = ("euler", "heun") if is_flow else ("ddpm", "ddim", "dpm_solver")
    process_ = build.build_process(whole.config, respaced=False)
    for sampler in samplers:
        config = shape_config(tmp_path / "whole", *options, f"sampler.type={sampler}", phase="sample")
        encoder = build.build_encoder(config, torch.device("cpu"))
        generator = SampleGenerator(whole.model, process_, encoder, config)
        drawn = generator.draw(torch.tensor([0, 1, 1]), 3, weights=whole.averaged_weights())
        assert (tuple(drawn.shape), generator.what) == ((3, *shape), "shapes")
        assert drawn.isfinite().all()
        # The noise is of the shape of a sample, and the condition counts.
        assert not torch.equal(drawn[1], drawn[2])


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_a_step_is_that_of_the_noised_shapes(tmp_path: Path, form: str) -> None:
    options, shape = FORMS[form]
    fixed = ("diffusion.policy=uniform", "diffusion.learn_sigma=false", "model.class_dropout_prob=0.0")
    config = shape_config(tmp_path, *options, *fixed, "max_training_steps=1", "log_every=1")
    twin = build_trainer(config)
    (row,) = read_metrics(fit(build_trainer(config)).folder)
    batch = next(twin.loader)
    draw = torch.Generator().manual_seed(stream_seed(0, TIMESTEP_STREAM, 0))
    index = twin.policy.draw(8, generator=draw).index
    noise = torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(stream_seed(0, NOISE_STREAM, 0, i)))
            for i in range(8)
        ]
    )
    kept = twin.objective.process.schedule.alphas_cumprod[index].float().view(-1, *[1] * len(shape))
    x_t = kept.sqrt() * batch[form] + (1 - kept).sqrt() * noise
    found = twin.model.train()(x_t, index, batch["label"])
    # The last layer starts at 0, so it is the mean square of the noise.
    assert found.abs().max() == 0
    assert_close(row["loss"], float(noise.square().mean()), rtol=1e-5, atol=0)
    assert x_t.shape == (8, *shape)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", ["speed", "speedit", "auto", "spectral", "{type: speed, normalize: loss}"])
def test_every_kind_of_policy_trains_on_shapes(tmp_path: Path, form: str, policy: str) -> None:
    config = shape_config(tmp_path, *FORMS[form][0], f"diffusion.policy={policy}", "max_training_steps=2")
    config = centred(config, Runtime(device=torch.device("cpu")))
    trainer = build_trainer(config)
    before = trainer.model.final_layer.linear.weight.clone()
    fit(trainer)
    assert trainer.step == 2
    after = trainer.model.final_layer.linear.weight
    assert after.isfinite().all()
    assert not torch.equal(after, before)


def test_a_dry_run_counts_the_tokens_of_a_cube(tmp_path: Path) -> None:
    for options, _ in FORMS.values():
        text = describe(shape_config(tmp_path, *options)).text
        assert "tokens per sample  64" in text
        assert "samples            64" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["voxel_size=0", "num_points=40"], r"num_points: needs voxel_size"),
        (["image_size=64"], r"image_size: has no effect with voxel_size 8; wanted none"),
        (["num_frames=4"], r"num_frames: is of videos; wanted 0 with voxel_size 8"),
        ([*POINTS, "inpainting=RandomMasks"], r"inpainting: a cloud has no place for each point, .* null"),
        (["inpainting=FrameMasks"], r"inpainting: FrameMasks makes no holes in voxels; wanted .* draw_solid"),
        ([*POINTS, "sampler.clip_sample=true"], r"sampler.clip_sample: .*; wanted false with num_points"),
        (
            [*POINTS, "sampler.thresholding=static"],
            r"sampler.thresholding: normalised points do not lie in \[-1, 1\]; wanted null, got static",
        ),
        (
            ["super_resolution.factor=2"],
            r"super_resolution.factor: enlarges images; wanted 0 with voxel_size 8",
        ),
        (["alignment.type=REPA"], r"alignment.type: a teacher sees images; wanted none with voxel_size 8"),
        (["evaluate_every=5"], r"evaluate_every: measures images; wanted 0 with voxel_size 8: test measures"),
        (["data.dataset.voxel_size=4"], r"data.dataset.voxel_size: wanted the value of voxel_size, 8, got 4"),
        (
            ["num_points=40"],
            r"Voxels takes voxels, got voxel_size 8 and num_points 40; wanted .* Points",
        ),
        (["voxel_size=0"], r"the model DiT3D takes shapes, got voxel_size 0; wanted the side of its cube"),
        (["voxel_size=9"], r"voxel_size needs sides that are multiples of 2, .* got 9; nearest: 8 or 10"),
        (
            ["model={type: DiT, patch_size: 2, hidden_size: 24, depth: 2, num_heads: 2}"],
            r"the model DiT takes no shapes, got voxel_size 8 .*; wanted DiT3D, or voxel_size 0",
        ),
        (
            [*IMAGES, "image_size=8", "num_classes=10", "data.dataset={type: Digits}"],
            r"the model DiT3D takes shapes, got voxel_size 0; wanted the side of its cube",
        ),
        (["model.in_channels=2"], r"model.in_channels needs 1 for voxel_size 8 and these encoders, got 2"),
        (["data.dataset.found=image"], r"data.dataset has samples of image, label, wanted voxels"),
        (
            ["data.dataset.bad=size"],
            r"has voxels of shape \(1, 8, 8, 7\), wanted \(C, 8, 8, 8\)",
        ),
        (["data.dataset.bad=nan"], r"data.dataset has voxels that are not finite in its first sample"),
        ([*POINTS, "data.dataset.bad=size"], r"has points of shape \(3, 39\), wanted \(C, 40\)"),
    ],
)
def test_what_does_not_fit_is_one_clear_error_before_the_training(
    tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_trainer(shape_config(tmp_path, *options))


def test_the_shapes_of_the_phase_test_need_no_validation_in_training(tmp_path: Path) -> None:
    config = shape_config(tmp_path, "validate_every=0", "data.validation={type: SmallShapes}")
    assert config.data.validation == {"type": "SmallShapes"}
