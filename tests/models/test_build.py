from pathlib import Path
from typing import Any

import pytest
import torch
from runs import small_config

from speedit_plugins.registry import DATASETS, ENCODERS, FEATURES, MODELS, PROCESSES
from speedit_plugins.trainer import build
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.config.validation import ConfigError
from speedit_plugins.trainer.diffusion.flow import RectifiedFlow
from speedit_plugins.trainer.training.activations import activations
from speedit_plugins.trainer.training.dry_run import describe

CONFIGS = sorted(path for path in Path("configs").rglob("*.yaml") if path != Path("configs/base.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_config_builds_on_the_meta_device(path: Path) -> None:
    config = load_config(path, "train")
    with torch.device("meta"):
        model = build.build_model(config)
    process = build.build_process(config, respaced=True)
    policy = build.build_timestep_policy(config, process)
    assert all(p.is_meta for p in model.parameters())
    assert model.num_classes == config.num_classes
    assert model.out_channels == model.in_channels * (2 if process.learn_sigma else 1)
    assert policy.schedule is process.schedule


@pytest.mark.filterwarnings("ignore:'speed' was made for a model of noise")
def test_the_boundary_of_speed_moves_with_the_shift_of_a_flow() -> None:
    path = "configs/text_to_image/emoji_pixart.yaml"
    for policy, wanted in (("{type: speed}", 923), (f"{{type: speed, snr_boundary: {1 / 143}}}", 799)):
        flow = f"diffusion={{type: RectifiedFlow, shift: 3.0, policy: {policy}}}"
        config = load_config(path, "train", [flow])
        built = build.build_timestep_policy(config, build.build_process(config, respaced=True))
        # Of uniform draws 0.923 are before SNR 1/143, with shift 3 still 0.799.
        assert abs((built.boundary_index or 0) - wanted) <= 1


def test_a_network_of_x_0_on_a_flow_has_the_policy_of_a_flow(tmp_path: Path) -> None:
    flow = "{type: RectifiedFlow, prediction_type: x0, policy: recommended}"
    config = small_config(tmp_path, diffusion=flow, sampler__type="heun")
    assert config.diffusion.policy["type"] == "auto"
    assert config.diffusion.prediction_type == "x0"
    process = build.build_process(config, respaced=True)
    assert isinstance(process, RectifiedFlow)
    assert process.predicts_x_0
    # A config that was saved before flows had a choice says flow.
    saved = small_config(tmp_path, diffusion="{type: RectifiedFlow, prediction_type: flow}")
    assert not build.build_process(saved, respaced=True).predicts_x_0
    with pytest.raises(ConfigError, match=r"diffusion\.type: RectifiedFlow wanted .* null, flow or x0"):
        small_config(tmp_path, diffusion="{type: RectifiedFlow, prediction_type: v}")


@pytest.mark.parametrize("name", ["SiT", "LightningDiT"])
@pytest.mark.parametrize(
    ("diffusion", "predicted"),
    [("{type: RectifiedFlow, prediction_type: x0}", "x0"), ("{learn_sigma: false}", "epsilon")],
)
def test_a_model_of_the_velocity_is_refused_for_anything_else(
    tmp_path: Path, name: str, diffusion: str, predicted: str
) -> None:
    config = small_config(tmp_path, model__type=name, diffusion=diffusion)
    with pytest.raises(
        ValueError, match=f"{name} predicts flow alone, got .*{predicted}; wanted .*RectifiedFlow"
    ):
        build.build_model(config)


def test_a_sit_returns_the_channels_of_a_flow(tmp_path: Path) -> None:
    config = small_config(tmp_path, model__type="SiT", diffusion="{type: RectifiedFlow, policy: uniform}")
    model = build.build_model(config)
    assert model.out_channels == model.in_channels == 1
    assert model.final_layer.linear.out_features == 2 * 4**2


def test_a_registry_imports_its_modules_on_first_use() -> None:
    with torch.device("meta"):
        model = MODELS.module_dict["DiT-XL/2"](input_size=32, num_classes=1000)
    # 675 million in the paper's table 4, without the fixed position table.
    assert round(sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6) == 675
    for registry, name in (
        (ENCODERS, "Pixels"),
        (DATASETS, "Digits"),
        (PROCESSES, "SpeeDiffusion"),
        (FEATURES, "pixels"),
    ):
        assert name in registry.module_dict


def test_the_description_counts_parameters_tokens_and_bytes(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    text = describe(config).text
    model = build.build_model(config)
    assert f"parameters         {sum(p.numel() for p in model.parameters()):,}" in text
    assert "tokens per sample  4" in text
    assert "policy             speedit: boundary 642" in text


def kept(folder: Path, num_samples: int = 16, *, is_cast: bool = False, **changes: Any) -> int:
    config = small_config(folder, **changes)
    with torch.device("meta"):
        model = build.build_model(config)
    return activations(model, num_samples, precision=config.precision, is_cast=is_cast).kept


def test_activations_grow_in_proportion_to_the_batch(tmp_path: Path) -> None:
    # Nothing that is kept is without a batch dimension but the timestep frequencies, 512 bytes.
    assert abs(kept(tmp_path, 16) - 2 * kept(tmp_path, 8)) <= 1024


def test_attention_keeps_no_weight_of_a_pair_of_tokens(tmp_path: Path) -> None:
    # The fused kernels keep queries, keys, values, what comes out and a number per token and head.
    # Patches of 1 in place of 4 make 16 times as many tokens, and 256 times as many pairs.
    assert kept(tmp_path, model__patch_size=1) < 16 * kept(tmp_path, model__patch_size=4)


def test_sampling_takes_the_process_without_the_respacing_of_training(tmp_path: Path) -> None:
    config = small_config(tmp_path, diffusion__timestep_respacing="'250'")
    assert build.build_process(config, respaced=True).schedule.num_timesteps == 250
    assert build.build_process(config, respaced=False).schedule.num_timesteps == 1000


def test_activations_shrink_with_half_precision_and_with_checkpointing(tmp_path: Path) -> None:
    whole, half = kept(tmp_path), {"precision": "bf16"}
    assert kept(tmp_path, model__gradient_checkpointing=True) < whole / 2
    # All but the timestep features, which stay float32.
    assert kept(tmp_path, is_cast=True, **half) < 0.6 * whole
    # Autocast keeps its copies of the weights, whatever the batch, and the residual stream in float32.
    few, more = (kept(tmp_path, size, **half) for size in (16, 32))
    assert 0.5 * whole < more - few < whole
    with torch.device("meta"):
        model = build.build_model(small_config(tmp_path))
    weights = sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight"))
    # The copies of the matrices. The table of classes and the weights at the inputs are not multiplied or not
    # needed again.
    assert 0.8 * 2 * weights < 2 * few - more < 2 * weights


def test_a_dry_run_looks_up_every_name(tmp_path: Path) -> None:
    for change, message in (
        ({"data__dataset__type": "Digit"}, "unknown dataset 'Digit'"),
        ({"encoder__type": "Pixles"}, "unknown encoder 'Pixles'; did you mean 'Pixels'"),
        ({"features__type": "pixel"}, "unknown feature extractor 'pixel'"),
        ({"data__dataset__colour": 1}, "dataset 'Digits' has no parameter 'colour'"),
    ):
        with pytest.raises(ValueError, match=message):
            describe(small_config(tmp_path, **change))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__input_size": 16}, r"model.input_size needs 8 for image_size 8 and these encoders, got 16"),
        ({"encoder__channels": 3}, r"model.in_channels needs 3"),
        (
            {"num_classes": 4, "sample_classes": "[0]"},
            r"dataset has 10 classes, got num_classes: 4; wanted at least 10",
        ),
        ({"model__depht": 3}, r"has no parameter 'depht'; did you mean 'depth'"),
        ({"data__dataset__type": "Digit"}, r"unknown dataset 'Digit'; did you mean 'Digits'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = small_config(tmp_path, **changes)

    def build_both() -> None:
        build.build_model(config)
        build.build_dataset(config)

    with pytest.raises(ValueError, match=message):
        build_both()
