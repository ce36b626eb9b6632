"""What `tools/export.py` refuses, and what it leaves when it fails."""

from pathlib import Path

import pytest
from exported_runs import DIGITS, DIT, EXPORT, SD15, STEPS, dit_options, exported, text_options, trained

from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.latte import Latte
from speedit_plugins.trainer.models.mdt import MDTv2
from speedit_plugins.trainer.models.pretrained.exported import export_model


def test_stable_diffusion_is_exported_where_padding_was_read_in_training(tmp_path: Path) -> None:
    options = [*text_options(tmp_path, "UNet"), "text_encoder.attend_padding=false"]
    arguments = trained(tmp_path / "run", SD15, *options)
    message = "reads padding like words, got a model trained with text_encoder.attend_padding false"
    with pytest.raises(ValueError, match=message):
        exported(SD15, arguments, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_variance_channels_are_refused_where_the_pipeline_takes_none(tmp_path: Path) -> None:
    size = "input_size: 4, text_width: 16, text_length: 8, block_out_channels: [32, 32], layers_per_block: 1"
    learned = (f"model={{type: UNet, path: null, {size}}}", "diffusion.learn_sigma=true")
    arguments = trained(tmp_path / "run", SD15, *text_options(tmp_path, "UNet"), *learned)
    message = (
        "StableDiffusionPipeline takes no variance channels, got .*learn_sigma true; wanted false, or --mo"
    )
    with pytest.raises(ValueError, match=message):
        exported(SD15, arguments, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    exported(SD15, arguments, tmp_path / "out", model_only=True)


def test_clamped_sampling_has_no_pipeline(tmp_path: Path) -> None:
    arguments = [*trained(tmp_path / "run", DIT, *dit_options(tmp_path)), "sampler.clip_sample=true"]
    with pytest.raises(
        ValueError, match="with sampler.clip_sample a pipeline clamps x_0 but keeps the predicted noise"
    ):
        exported(DIT, arguments, tmp_path / "out")


@pytest.mark.parametrize("failure", [OSError("no space left"), KeyboardInterrupt()])
def test_what_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(*_: object) -> str:
        raise failure

    arguments = trained(tmp_path / "run", DIGITS, "data.num_workers=0")
    monkeypatch.setitem(EXPORT["export"].__globals__, "_card", fail)
    with pytest.raises(type(failure)):
        exported(DIGITS, arguments, tmp_path / "out", model_only=True)
    assert not list(tmp_path.glob("out*"))


def test_what_no_pipeline_is_for_is_refused(tmp_path: Path) -> None:
    arguments = trained(tmp_path / "run", DIGITS, "data.num_workers=0")
    with pytest.raises(ValueError, match=r"no pipeline of diffusers .*; .* tools/convert_checkpoint\.py"):
        exported(DIGITS, [*arguments, "diffusion.type=RectifiedFlow"], tmp_path / "out", model_only=True)
    # Weights that predict noise would become a pipeline that takes them for x_0.
    wrong = [*arguments, "diffusion.prediction_type=x0"]
    with pytest.raises(ValueError, match=r"trained with another .*prediction_type was 'epsilon', got 'x0'"):
        exported(DIGITS, wrong, tmp_path / "out", model_only=True)
    assert not list(tmp_path.glob("out*"))
    wide = DiT(8, 2, hidden_size=16, depth=1, num_heads=2, mlp_ratio=2.0, num_classes=10)
    with pytest.raises(ValueError, match=r"DiTPipeline needs model.mlp_ratio 4, got 2"):
        export_model(wide, num_steps=STEPS, num_timesteps=1000)
    latte = Latte(4, 2, num_frames=3, hidden_size=32, depth=2, num_heads=2, num_classes=10)
    masked = MDTv2(4, 2, hidden_size=32, depth=4, num_heads=2, decode_layer=2, num_classes=10)
    for model in (latte, masked):
        with pytest.raises(ValueError, match=f"diffusers has no pipeline for this {type(model).__name__}"):
            export_model(model, num_steps=STEPS, num_timesteps=1000)
