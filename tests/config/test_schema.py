"""Types and ranges of config values, and the keys that each phase needs."""

from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from speedit_plugins.trainer.config.accelerations import RoutingConfig
from speedit_plugins.trainer.config.checks import check_phase
from speedit_plugins.trainer.config.key_names import join
from speedit_plugins.trainer.config.loading import load_config, to_yaml
from speedit_plugins.trainer.config.same_run import check_same_meaning, check_same_run
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.sections import DiffusionConfig, EmaConfig, SamplerConfig
from speedit_plugins.trainer.config.switches import SWITCHES
from speedit_plugins.trainer.config.validation import (
    ConfigError,
    build_section,
    check_keys,
    describe_type,
    key_paths,
)

MINIMAL: dict[str, Any] = {
    "experiment_dir": "outputs/x",
    "num_classes": 10,
    "image_size": 8,
    "model": {"type": "DiT", "input_size": 8, "num_classes": 10, "depth": 2},
    "data": {"dataset": {"type": "Digits"}, "batch_size": 8},
    "max_training_steps": 10,
}


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    file = tmp_path / "leaf.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(MINIMAL)))
    return file


def error_of(path: Path, *overrides: str, phase: str = "train") -> str:
    with pytest.raises(ValueError, match=".") as caught:
        load_config(path, phase, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("wavelength=1", "wavelength: unknown key; known here: experiment_dir,"),
        ("num_clases=1", "num_clases: unknown key; did you mean 'num_classes'?"),
        ("lr=1", "lr: unknown key; did you mean 'optimizer.lr'?"),
        ("optimizer.warmup=1", "optimizer.warmup: unknown key; did you mean 'optimizer.warmup_steps'?"),
        ("data.batchsize=1", "data.batchsize: unknown key; did you mean 'data.batch_size'?"),
        ("seed=x", "seed: wanted int, got 'x'"),
        ("seed=1.5", "seed: wanted int, got 1.5"),
        ("data.batch_size=true", "data.batch_size: wanted int, got True"),
        ("data.batch_size=0", "data.batch_size: wanted int >= 1, got 0"),
        ("optimizer.lr=.nan", "optimizer.lr: wanted float, got nan"),
        ("optimizer.lr=0", "optimizer.lr: wanted float > 0, got 0.0"),
        ("optimizer.betas=[0.9]", "optimizer.betas: wanted list of 2 float, got [0.9]"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas[1]: wanted float < 1, got 1.0"),
        ("sample_classes=3", "sample_classes: wanted list of int or str, got 3"),
        ("sample_classes=[a, 1.5]", "sample_classes[1]: wanted int, got 1.5"),
        ("sample_classes=[yes]", "sample_classes[0]: wanted int or str, got True"),
        ("diffusion.diffusion_steps=1", "diffusion.diffusion_steps: wanted int >= 2, got 1"),
        ("resume=false", "resume: wanted str, got False"),
        ("allow_tf32=1", "allow_tf32: wanted bool, got 1"),
        ("precision=fp8", "precision: wanted one of fp32, bf16, fp16, got 'fp8'"),
        ("optimizer=3", "optimizer: wanted a section with keys, got 3"),
        ("model={depth: 3}", None),
        ("model=3", "model: wanted a name or a section with `type`, got 3"),
        ("encoder={type: null}", "encoder: wanted a `type`, got keys ['type']"),
        ("seed", "argument wanted key=value, got 'seed'"),
        ("=3", "argument wanted key=value, got '=3'"),
        ("seed=[1", "seed: the value on the command line is not valid YAML; quote it"),
    ],
)
def test_wrong_values_say_where_and_what(minimal: Path, override: str, message: str | None) -> None:
    if message is None:
        assert load_config(minimal, "train", [override]).model["depth"] == 3
        return
    error = error_of(minimal, override)
    assert error.startswith(message)
    assert "command line" in error or "argument" in error


@pytest.mark.parametrize(
    ("phase", "overrides", "message"),
    [
        ("train", ["max_training_steps=0"], "max_training_steps: train wanted int >= 1, got 0"),
        ("sample", [], "sample_classes: wanted at least one class for the grid, got none"),
        ("sample", ["sample_classes=[0, 10]"], "sample_classes: wanted in [0, 10), got 10"),
        ("train", ["sample_every=5"], "sample_classes: wanted at least one class for the grid, got none"),
        (
            "train",
            ["resume=never", "data.accept_changed=true"],
            "data.accept_changed: has no effect with resu",
        ),
        ("inference", ["sampler.eta=0.5"], "sampler.eta: has no effect with ddpm; wanted 0, got 0.5"),
        (
            "inference",
            ["sampler.num_steps=1001"],
            "sampler.num_steps: ddpm wanted int in [2, 1000] of diffusion.diffusion_steps",
        ),
        # No later command could draw with these.
        ("train", ["sampler.eta=0.5"], "sampler.eta: has no effect with ddpm; wanted 0, got 0.5"),
        ("train", ["sampler.type=heun"], "sampler.type: wanted one of ddpm, ddim,"),
        (
            "train",
            ["sampler.clip_sample=true", "sampler.thresholding=dynamic"],
            "sampler.thresholding: dynamic scales x_0 in place of clamping it; wanted sampler.clip_sample",
        ),
        ("inference", ["sampler.guidance_channels=3"], "sampler.guidance_channels: has no effect"),
        (
            "inference",
            ["sampler.guidance_schedule=power_cosine"],
            "sampler.guidance_schedule: has no effect with guidance_scale 1; wanted constant",
        ),
        (
            "inference",
            ["guidance_scale=2", "sampler.guidance_power=2"],
            "sampler.guidance_power: has no effect with constant; wanted null",
        ),
        (
            "inference",
            ["guidance_scale=2", "sampler.guidance_interval=[0, 0.5]"],
            "sampler.guidance_interval: has no effect with constant; wanted []",
        ),
        (
            "inference",
            [
                "guidance_scale=2",
                "sampler.guidance_schedule=interval",
                "sampler.guidance_interval=[0.5, 0.1]",
            ],
            "sampler.guidance_interval: wanted two times, the first one less",
        ),
        (
            "inference",
            ["num_classes=0", "model.num_classes=0", "guidance_scale=2"],
            "guidance_scale: needs classes, but num_classes is 0, or text; wanted 1, got 2.0",
        ),
        ("train", ["model.num_classes=7"], "model.num_classes: wanted the value of num_classes, 10, got 7"),
        (
            "train",
            ["model.learn_sigma=false"],
            "model.learn_sigma: wanted the value of diffusion.learn_sigma, True, got False",
        ),
        (
            "train",
            ["sample_every=5", "sample_classes=[1]", "diffusion.timestep_respacing=250"],
            "sample_every: a respaced training process draws no grids; wanted 0",
        ),
        (
            "train",
            ["diffusion.zero_terminal_snr=true"],
            "diffusion.zero_terminal_snr: noise alone does not determine x_0; wanted prediction_type v or x0",
        ),
        (
            "train",
            ["diffusion={type: RectifiedFlow, zero_terminal_snr: true}"],
            "diffusion.zero_terminal_snr: has no effect with diffusion.type RectifiedFlow",
        ),
        (
            "train",
            ["routing.from=3"],
            "routing.from: has no effect with routing.keep 1; wanted less, such as",
        ),
        ("train", ["routing.to=-2"], "routing.to: has no effect with routing.keep 1; wanted less, such as"),
        (
            "train",
            ["contrastive=0.05"],
            "contrastive: wanted a section with keys, got 0.05; wanted contrastive.weight",
        ),
        ("train", ["routing=0.5"], "routing: wanted a section with keys, got 0.5; wanted routing.keep=0.5"),
        ("train", ["routing=off"], "routing: wanted a section with keys, got False; null switches it off"),
        ("train", ["lora=x"], "lora: wanted a section with keys, got 'x'; wanted its key 'rank', or null to"),
        ("train", ["masking=MTD"], "masking.type: wanted one of none, MDT, got 'MTD'; did you mean 'MDT'?"),
        ("train", ["routing.from_=3"], "routing.from_: unknown key; did you mean 'routing.from'?"),
        ("train", ["routing.keep=0"], "routing.keep: wanted float > 0, got 0"),
        ("tain", [], "phase needs one of train, inference, sample, test, got 'tain'"),
    ],
)
def test_what_a_phase_needs(minimal: Path, phase: str, overrides: list[str], message: str) -> None:
    assert error_of(minimal, *overrides, phase=phase).startswith(message)


ACCELERATED = [
    "masking={type: MDT, ratio: 0.4}",
    "routing={from: 1, to: -2, keep: 0.5}",
    "alignment={type: REPA, teacher: embedded, layer: 1}",
    "contrastive={weight: 0.05}",
    "noise_assignment=class",
    "uncertainty=true",
    "lora={rank: 4, alpha: 8}",
    "super_resolution={factor: 2, augmentation: 0.5}",
]


def test_null_switches_every_optional_section_off(minimal: Path) -> None:
    plain = load_config(minimal, "train")
    keys = [text.partition("=")[0] for text in ACCELERATED]
    assert set(SWITCHES) < set(keys)
    on = [*ACCELERATED, "pretrained=x"]
    changed = load_config(minimal, "train", on)
    assert all(getattr(changed, key) != getattr(plain, key) for key in keys)
    off = load_config(minimal, "train", [*on, *(f"{key}=null" for key in keys), "pretrained=null"])
    assert off == plain
    # Switched on again by a key alone, the section has none of its earlier options.
    again = load_config(
        minimal, "train", ["routing={from: 3, keep: 0.2}", "routing=null", "routing.keep=0.5"]
    )
    assert again.routing.from_ == RoutingConfig().from_


@pytest.mark.parametrize(
    "off", ["masking=none", "alignment=none", "routing.keep=1", "lora.rank=0", "super_resolution.factor=0"]
)
def test_the_switch_of_a_section_takes_its_options_along(minimal: Path, off: str) -> None:
    key = off.partition("=")[0].partition(".")[0]
    on = next(text for text in ACCELERATED if text.startswith(f"{key}="))
    assert load_config(minimal, "train", [on, off]) == load_config(minimal, "train")


def test_a_bare_name_is_the_type_of_a_section(minimal: Path) -> None:
    names = ["alignment=SRA", "masking=MDT", "optimizer=Muon", "diffusion=RectifiedFlow", "sampler=heun"]
    config = load_config(minimal, "train", names)
    for name in names:
        key, _, wanted = name.partition("=")
        assert getattr(config, key).type == wanted


def test_a_key_that_python_keeps_for_itself_is_read_and_written_as_it_is(minimal: Path) -> None:
    config = load_config(minimal, "train", ["routing={from: 1, to: -2, keep: 0.5}"])
    assert config.routing.from_ == 1
    written = yaml.safe_load(to_yaml(config))
    assert written["routing"] == {"from": 1, "to": -2, "keep": 0.5}
    assert build_section(ExperimentConfig, written) == config


def test_whole_floats_are_step_counts(minimal: Path) -> None:
    steps = load_config(minimal, "train", ["max_training_steps=1e5"]).max_training_steps
    assert steps == 100_000
    assert isinstance(steps, int)


def test_ema_default_is_the_decay_of_dit() -> None:
    # At decay 0.9999 the half-life is 6931.1 steps. The default is this, rounded to a whole step.
    assert 0.5 ** (1 / EmaConfig().halflife_steps) == pytest.approx(0.9999, abs=2e-9)


def test_schema_functions_on_small_cases() -> None:
    assert build_section(SamplerConfig, {"num_steps": 5}) == SamplerConfig(num_steps=5)
    with pytest.raises(
        ConfigError, match="^sampler.steps: unknown key; did you mean 'sampler.num_steps'"
    ) as caught:
        check_keys(ExperimentConfig, {"sampler": {"steps": 1}})
    assert caught.value.path == "sampler.steps"
    assert "policy" not in DiffusionConfig().process_config()
    assert DiffusionConfig().process_config()["type"] == "SpeeDiffusion"
    assert (join("", "a"), join("a", "b")) == ("a", "a.b")
    assert describe_type(str | None) == "str or null"
    assert key_paths(SamplerConfig)["eta"] is float
    check_phase(build_section(ExperimentConfig, MINIMAL), "train")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("encoder.channels=1", r"encoder was .*'channels': 3.*, got .*'channels': 1"),
        ("text_encoder.max_length=12", r"text_encoder was .*'max_length': 16.*, got .*'max_length': 12"),
        ("diffusion.shift=3", r"diffusion\.shift was 1\.0, got 3\.0"),
        ("diffusion.policy=speed", r"diffusion\.policy was \{'type': 'auto', .*got \{'type': 'speed'\}"),
        ("seed=7", r"seed was 0, got 7"),
        ("data.held_out_samples=5", r"data\.held_out_samples was 0, got 5"),
        ("optimizer.lr=1e-3", None),
        ("caption_dropout_prob=0.2", None),
    ],
)
def test_a_run_goes_on_with_the_process_and_the_encoders_it_began_with(
    override: str, message: str | None
) -> None:
    saved, config = (
        yaml.safe_load(to_yaml(load_config("configs/text_to_image/emoji_pixart.yaml", "train", overrides)))
        for overrides in ([], [override])
    )
    check_same_run(saved, saved)
    if message is None:
        check_same_run(saved, config)
    else:
        with pytest.raises(ValueError, match=message):
            check_same_run(saved, config)


DIT = "hidden_size: 384, depth: 12, num_heads: 6"


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ("{type: DiT-S/2}", "{type: DiT-S/2, rope: true}", r"model\.rope was False, got True"),
        ("{type: DiT-S/2, norm: rms}", "{type: DiT-S/2}", r"model\.norm was 'rms', got 'layer'"),
        ("{type: DiT-S/2}", "{type: SiT-S/2}", r"model\.type was 'DiT-S/2', got 'SiT-S/2'"),
        ("{type: DiT-S/2}", f"{{type: DiT, patch_size: 2, {DIT}}}", None),
        (f"{{type: DiT, patch_size: 2, {DIT}}}", "{type: DiT-S/4}", r"model\.patch_size was 2, got 4"),
        ("{type: DiT-S/2}", "{type: DiT-S/2, attention: xformers, gradient_checkpointing: true}", None),
        ("{type: DiT-S/2, class_dropout_prob: 0.2}", "{type: DiT-S/2, input_size: 64}", None),
        ("{type: UNet, layers_per_block: 1}", "{type: UNet}", r"model\.layers_per_block was 1, got 2"),
        # A saved network's own files have its sizes.
        ("{type: UNet, path: there}", "{type: UNet, path: here, layers_per_block: 1}", None),
        ("{type: UNet, block_out_channels: [320, 640, 1280, 1280]}", "{type: UNet}", None),
    ],
)
def test_a_model_is_the_same_whether_its_options_are_stated_or_not(
    minimal: Path, was: str, now: str, message: str | None
) -> None:
    saved, config = (
        yaml.safe_load(to_yaml(load_config(minimal, "train", [f"model={model}"]))) for model in (was, now)
    )
    for check in (check_same_run, check_same_meaning):
        if message is None:
            check(saved, config)
        else:
            with pytest.raises(ValueError, match=f"^{message}$"):
                check(saved, config)


EMOJI_PIXART, DIGITS = "configs/text_to_image/emoji_pixart.yaml", "configs/image/digits/speedit.yaml"


@pytest.mark.parametrize(
    ("file", "overrides", "message"),
    [
        (DIGITS, ["diffusion.prediction_type=v"], r"prediction_type was 'epsilon', got 'v'"),
        (DIGITS, ["diffusion.noise_schedule=cosine"], r"noise_schedule was 'linear', got 'cosine'"),
        (DIGITS, ["diffusion.diffusion_steps=500"], r"diffusion_steps was 1000, got 500"),
        (DIGITS, ["diffusion.type=RectifiedFlow"], r"type was 'SpeeDiffusion', got 'RectifiedFlow'"),
        (DIGITS, ["num_classes=12"], r"^num_classes was 10, got 12"),
        # What only the training reads, or a sampler chooses.
        (DIGITS, ["seed=7", "data.held_out_samples=5"], None),
        (DIGITS, ["diffusion.policy=speed", "uncertainty=true", "contrastive.weight=0"], None),
        (EMOJI_PIXART, ["diffusion.prediction_type=x0"], r"prediction_type was 'flow', got 'x0'"),
        (EMOJI_PIXART, ["diffusion.shift=3", "diffusion.diffusion_steps=500"], None),
        (
            EMOJI_PIXART,
            ["text_encoder.max_length=12", "model.text_length=16"],
            r"text_encoder\.max_length was 16, got 12",
        ),
        (EMOJI_PIXART, ["encoder.channels=1"], None),
    ],
)
def test_samples_are_drawn_with_the_process_of_the_training(
    file: str, overrides: list[str], message: str | None
) -> None:
    saved = yaml.safe_load(to_yaml(load_config(file, "train")))
    config = yaml.safe_load(to_yaml(load_config(file, "sample", overrides)))
    if message is None:
        check_same_meaning(saved, config)
    else:
        with pytest.raises(ValueError, match=f"{message}$"):
            check_same_meaning(saved, config)


def test_a_run_goes_on_with_its_classes_and_its_held_out_samples() -> None:
    def plain(*overrides: str) -> dict[str, Any]:
        read: dict[str, Any] = yaml.safe_load(to_yaml(load_config(DIGITS, "train", overrides)))
        return read

    saved = plain("data.held_out_samples=6")
    for overrides, message in (
        (["num_classes=12", "data.held_out_samples=6"], r"^num_classes was 10, got 12$"),
        (["data.held_out_samples=5"], r"^data\.held_out_samples was 6, got 5$"),
    ):
        with pytest.raises(ValueError, match=message):
            check_same_run(saved, plain(*overrides))
    # All data are trained on from here on, as the user says.
    check_same_run(saved, plain("data.accept_changed=true"))
    # A checkpoint of before the key existed held out none.
    del saved["data"]["held_out_samples"]
    check_same_run(saved, plain())


def test_every_path_may_begin_with_the_home_folder(minimal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    keys = ("experiment_dir", "reference", "samples", "evaluation.reference_statistics", "evaluation.clip")
    config = load_config(minimal, "test", [f"{key}=~/{key}" for key in keys])
    for key in keys:
        assert attrgetter(key)(config) == f"/somewhere/{key}"
    keys = ("resume", "pretrained", "ckpt_path")
    config = load_config(minimal, "train", [f"{key}=~/{key}" for key in keys])
    for key in keys:
        assert attrgetter(key)(config) == f"/somewhere/{key}"
    # A name on the hub is not a path, so "~" has no meaning in it.
    assert load_config(minimal, "test", ["evaluation.clip=openai/clip"]).evaluation.clip == "openai/clip"
