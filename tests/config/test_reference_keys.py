"""Configs as SpeeDiT and SpeeD publish them, translated to the keys of this project."""

import copy
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.config.reference_keys import ReferenceKeys, sampler_of
from speedit_plugins.trainer.config.validation import ConfigError

DIGITS = Path(__file__).parents[2] / "configs/image/digits"

# The content of the reference's ImageNet base.yaml in its own keys, without its paths.
REFERENCE: dict[str, Any] = {
    "experiment_dir": "outputs/reference",
    "experiment_name": "base",
    "ckpt_path": None,
    "resume_training": None,
    "enable_wandb_log": False,
    "wandb": {"_target_": "wandb.init", "project": "x"},
    "save_firt_step_ckpt": False,
    "num_classes": 1000,
    "image_size": 256,
    "model": {
        "_target_": "speed.networks.dit.DiT_XL_2",
        "condition": "class",
        "num_classes": "${num_classes}",
    },
    "diffusion": {"_target_": "speed.diffusion.iddpm.IDDPM", "timestep_respacing": "", "faster": True},
    "vae": {
        "_target_": "diffusers.models.AutoencoderKL.from_pretrained",
        "pretrained_model_name_or_path": "transformers/sd-vae-ft-ema",
    },
    "condition_encoder": {"_target_": "speed.networks.condition.ClassEncoder", "num_classes": 1000},
    "inference": {"diffusion": {"timestep_respacing": "ddim50"}, "guidance_scale": 1.5, "num_samples": 20},
    "sample": {
        "diffusion": {"timestep_respacing": "250"},
        "guidance_scale": 3.8,
        "sample_classes": [207, 360],
    },
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-4, "weight_decay": 0},
    "data": {
        "_target_": None,
        "dataset": {
            "_target_": "speed.dataset.image.image_dataest",
            "root": "imagenet",
            "image_size": "${image_size}",
        },
        "batch_size": 7,
        "num_workers": 4,
    },
    "epoch": 1400,
}
SPEED = {"_target_": "speed.diffusion.speed.Speed_IDDPM", "timestep_respacing": ""}


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    file = tmp_path / "base.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(REFERENCE)))
    return file


def policy_of(diffusion: dict[str, Any], *later: dict[str, Any]) -> dict[str, Any]:
    keys = ReferenceKeys("train")
    layers = [keys.translate({"diffusion": layer}) for layer in (diffusion, *later)]
    policy: dict[str, Any] = layers[-1]["diffusion"]["policy"]
    return policy


def test_a_reference_config_loads(reference: Path) -> None:
    config = load_config(reference, "train", ["max_training_steps=5"])
    model = {"type": "DiT-XL/2", "input_size": 32, "in_channels": 4, "num_classes": 1000}
    assert config.model == model
    assert config.diffusion.policy == {"type": "speedit"}
    assert config.encoder == {"type": "AutoencoderKL", "path": "transformers/sd-vae-ft-ema"}
    # The reference always mirrors.
    dataset = {"type": "ImageFolder", "root": "imagenet", "image_size": 256, "random_flip": True}
    assert config.data.dataset == dataset
    assert (config.optimizer.lr, config.data.batch_size, config.resume) == (1e-4, 7, "auto")
    assert (config.sampler.type, config.sampler.num_steps) == ("ddpm", 250)


def test_respacing_is_the_sampler_where_samples_are_drawn(reference: Path) -> None:
    sample = load_config(reference, "sample")
    assert (sample.sampler.type, sample.sampler.num_steps, sample.guidance_scale) == ("ddpm", 250, 3.8)
    inference = load_config(reference, "inference")
    assert (inference.sampler.type, inference.sampler.num_steps) == ("ddim", 50)
    assert sample.diffusion.timestep_respacing == inference.diffusion.timestep_respacing == ""
    later = load_config(reference, "sample", ["sampler.num_steps=20"])
    assert later.sampler.num_steps == 20
    overridden = load_config(reference, "sample", ["diffusion.timestep_respacing=100"])
    assert overridden.sampler.num_steps == 100
    train = load_config(reference, "train", ["max_training_steps=5", "diffusion.timestep_respacing=250"])
    assert train.diffusion.timestep_respacing == "250"


def test_each_translation_is_reported_once(reference: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_config(reference, "train", ["max_training_steps=5"])
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(set(lines))
    for old in ("diffusion.faster", "vae ->", "DiT_XL_2", "AdamW", "epoch", "condition_encoder", "wandb"):
        assert any(old in line for line in lines), old


def test_a_config_of_this_project_reports_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_config(DIGITS / "speedit.yaml", "sample")
    assert not caplog.records


def test_epochs_need_steps(reference: Path) -> None:
    with pytest.raises(ConfigError, match=r"^epoch: .*wanted max_training_steps .*got epoch 1400"):
        load_config(reference, "train")
    # Some of the reference configs write max_iters instead.
    assert load_config(reference, "train", ["max_iters=9"]).max_training_steps == 9
    assert load_config(reference, "sample").max_training_steps == 0


def test_other_names_of_keys(reference: Path) -> None:
    config = load_config(reference, "sample", ["cfg_scale=2.5", "resume_training=outputs/x/0000010.pt"])
    assert config.guidance_scale == 2.5
    assert config.resume == "outputs/x/0000010.pt"
    grids = ["max_training_steps=5", "sample_classes=[1]", "enable_sample_log=true", "sample_log_every=30"]
    assert load_config(reference, "train", grids).sample_every == 30
    assert load_config(reference, "train", [*grids, "enable_sample_log=false"]).sample_every == 0
    x0 = load_config(reference, "train", ["max_training_steps=5", "diffusion.predict_xstart=true"])
    assert x0.diffusion.prediction_type == "x0"


def test_the_wandb_section_names_the_project_of_our_own_switch(
    reference: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steps = "max_training_steps=5"
    config = load_config(reference, "train", [steps])
    assert (config.enable_wandb_log, config.wandb_project) == (False, "x")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        later = load_config(
            reference, "train", [steps, "enable_wandb_log=true", "wandb={entity: me, mode: m}"]
        )
    # A layer without a project keeps the project of the layer below.
    assert (later.enable_wandb_log, later.wandb_project) == (True, "x")
    lines = [record.getMessage() for record in caplog.records if "wandb" in record.getMessage()]
    assert lines == [
        "reference key: wandb.project -> wandb_project",
        "reference key: wandb: entity, mode -> dropped: wandb_project alone is taken",
    ]
    with pytest.raises(ConfigError, match=r"^wandb.project: wanted either this key or wandb_project"):
        load_config(reference, "train", [steps, "wandb_project=y", "wandb.project=z"])
    with pytest.raises(ConfigError, match=r"^wandb_project: wanted str, got 5"):
        load_config(reference, "train", [steps, "wandb.project=5"])


def test_no_condition_means_no_classes(reference: Path) -> None:
    overrides = ["max_training_steps=5", "model={_target_: speed.networks.dit.DiT_S_2, condition: none}"]
    config = load_config(reference, "train", overrides)
    assert config.num_classes == config.model["num_classes"] == 0
    assert config.model["type"] == "DiT-S/2"


@pytest.mark.parametrize(
    ("layers", "policy"),
    [
        ([{"faster": True}], {"type": "speedit"}),
        ([{"faster": False}], {"type": "uniform"}),
        ([{"_target_": "speed.diffusion.iddpm.IDDPM"}], {"type": "uniform"}),
        ([{"faster": True}, {"_target_": "speed.diffusion.iddpm.IDDPM"}], {"type": "speedit"}),
        ([SPEED], {"type": "speed"}),
        (
            [{**SPEED, "weighting": "ours", "sampling": "ours", "k": 5, "lam": 0.6, "tau": 700}],
            {"type": "speed", "k": 5, "tau": 700, "lam": 0.6},
        ),
        ([{"k": 3}], {"type": "speed", "k": 3}),
        ([{**SPEED, "weighting": "theory", "sampling": "speed"}], {"type": "speed", "lam": 0.8}),
        ([{**SPEED, "sampling": "no_dual"}], {"type": "speed"}),
        ([{**SPEED, "weighting": "none", "sampling": "CLTS"}], {"type": "clts"}),
        ([{**SPEED, "weighting": "none", "sampling": "lognorm"}], {"type": "logit_normal"}),
        ([{**SPEED, "weighting": "min_snr", "sampling": "uniform"}], {"type": "min_snr"}),
        ([{**SPEED, "weighting": "p2", "sampling": "uniform"}], {"type": "p2"}),
        ([{**SPEED, "weighting": None, "sampling": "uniform"}], {"type": "uniform"}),
        (
            [{**SPEED, "weighting": "p2", "sampling": "speed", "k": 4}],
            {"density": {"type": "thinned", "k": 4}, "weighting": {"type": "p2"}},
        ),
        # Keys that an ablation config leaves out come from its base.yaml.
        (
            [{**SPEED, "k": 5, "lam": 0.6}, {"weighting": "none"}],
            {"density": {"type": "thinned", "k": 5}, "weighting": {"type": "constant"}},
        ),
        (
            [{**SPEED, "k": 5, "lam": 0.7}, {"sampling": "uniform"}],
            {"density": {"type": "uniform"}, "weighting": {"type": "change_aware", "lam": 0.7}},
        ),
        ([{"faster": True}, {"k": 3}], {"type": "speed", "k": 3}),
        ([{**SPEED, "k": 3}, {"faster": True}], {"type": "speedit"}),
    ],
)
def test_policies(layers: list[dict[str, Any]], policy: dict[str, Any]) -> None:
    assert policy_of(*copy.deepcopy(layers)) == policy


def test_the_later_of_old_and_new_keys_wins(reference: Path) -> None:
    digits = DIGITS / "speedit.yaml"
    assert load_config(digits, "train", ["diffusion.faster=False"]).diffusion.policy == {"type": "uniform"}
    later = load_config(reference, "train", ["max_training_steps=5", "diffusion.policy.type=p2"])
    assert later.diffusion.policy == {"type": "p2"}
    speed = DIGITS / "speed.yaml"
    assert load_config(speed, "train", ["diffusion.k=3"]).diffusion.policy == {"type": "speed", "k": 3}


def test_every_policy_it_makes_is_built_by_the_registry() -> None:
    from speedit_plugins.policies.build import build_policy
    from speedit_plugins.policies.schedule import NoiseSchedule

    schedule = NoiseSchedule.linear(num_timesteps=1000)
    for sampling in ("ours", "speed", "no_dual", "uniform", "lognorm", "CLTS"):
        for weighting in ("ours", "theory", "p2", "min_snr", "none", "lognorm"):
            said = {**SPEED, "sampling": sampling, "weighting": weighting, "k": 5, "lam": 0.6, "tau": 700}
            assert build_policy(policy_of(said), schedule).density.shape == (1000,)
    # The published default is outside [0.5, 1]. It made 315 weights negative.
    with pytest.raises(ValueError, match="lam"):
        build_policy(policy_of({**SPEED, "lam": 5}), schedule)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("save_firt_step_ckpt=true", "save_firt_step_ckpt: not supported"),
        ("diffusion.use_kl=true", "diffusion.use_kl: not supported"),
        ("data.dataset.text_cond=true", "data.dataset.text_cond: text conditions are not supported"),
        ("diffusion.weighting=p3", "diffusion.weighting: wanted one of ours, theory, p2, min_snr, none"),
        ("diffusion.sampling=fast", "diffusion.sampling: wanted one of ours, speed, no_dual, uniform"),
        ("diffusion.faster=1", "diffusion.faster: wanted bool, got 1"),
        ("diffusion={faster: true, k: 3}", "diffusion.faster: belongs to IDDPM"),
        ("diffusion={faster: true, policy: {type: p2}}", "diffusion.faster: wanted either this key or"),
        ("model._target_=speed.networks.unet.create_unet_model", "model._target_: no equivalent here"),
        (
            "model={_target_: speed.networks.dit.DiT_S_2, condition: text}",
            "model.condition: wanted class or none",
        ),
        (
            "model={_target_: speed.networks.dit.DiT_S_2, type: DiT}",
            "model: wanted either `type` or `_target_`",
        ),
        ("optimizer._target_=torch.optim.SGD", "optimizer._target_: no equivalent here"),
        ("encoder={_target_: os.system}", "encoder._target_: no equivalent here"),
        ("sampler._target_=os.system", "sampler._target_: is never called"),
        (
            "condition_encoder={_target_: speed.networks.condition.ClipEncoder}",
            "condition_encoder._target_: no",
        ),
        ("vae={type: Pixels}", None),
    ],
)
def test_what_has_no_equivalent_is_refused(reference: Path, override: str, message: str | None) -> None:
    arguments = ["max_training_steps=5", override]
    if message is None:
        assert load_config(reference, "train", arguments).encoder == {"type": "Pixels"}
        return
    with pytest.raises(ConfigError) as caught:
        load_config(reference, "train", arguments)
    assert str(caught.value).startswith(message)
    assert "command line" in str(caught.value)


def test_both_names_of_one_key_are_refused(reference: Path) -> None:
    with pytest.raises(
        ConfigError, match="^vae: is the old name of encoder; wanted one of the two, got both"
    ):
        load_config(reference, "sample", ["vae={type: Pixels}", "encoder={type: Pixels}"])


@settings(deadline=None)
@given(steps=st.integers(1, 10**6), ddim=st.booleans())
def test_a_respacing_names_its_sampler(steps: int, ddim: bool) -> None:
    expected = {"type": "ddim" if ddim else "ddpm", "num_steps": steps}
    assert sampler_of(f"{'ddim' if ddim else ''}{steps}") == expected


@settings(deadline=None)
@given(text=st.text("0123456789dim, .-", max_size=8))
def test_other_respacings_are_refused(text: str) -> None:
    digits = text.strip().removeprefix("ddim")
    if digits.isdigit() and not digits.startswith("0"):
        return
    with pytest.raises(ConfigError, match=r"^diffusion.timestep_respacing: wanted a number of steps"):
        sampler_of(text)


scalars = st.none() | st.booleans() | st.integers(0, 9) | st.sampled_from(["ours", "p2", "250", ""])
keys = st.sampled_from(
    ["seed", "model", "diffusion", "policy", "timestep_respacing", "k", "epoch", "vae", "type"]
)
sections = st.recursive(
    st.dictionaries(keys, scalars, max_size=4),
    lambda inner: st.dictionaries(keys, scalars | inner, max_size=4),
    max_leaves=8,
)


@settings(deadline=None)
@given(layer=sections, phase=st.sampled_from(["train", "sample"]))
def test_translation_leaves_its_argument_alone_and_settles_in_one_pass(
    layer: dict[str, Any], phase: str
) -> None:
    before = copy.deepcopy(layer)
    try:
        once = ReferenceKeys(phase).translate(layer)
    except ConfigError:
        return
    finally:
        assert layer == before
    assert ReferenceKeys(phase).translate(once) == once


def published_configs() -> list[Path]:
    hosts = Path(os.environ.get("SPEEDIT_HOSTS", "/nonexistent"))
    return sorted((hosts / "1zeryu+SpeeDiT/configs/image").rglob("*.yaml"))


@pytest.mark.hosts
@pytest.mark.skipif(not published_configs(), reason="needs 1zeryu+SpeeDiT in $SPEEDIT_HOSTS")
def test_the_published_configs_load(tmp_path: Path) -> None:
    for file in published_configs():
        top = tmp_path / "configs"
        for original in (file.parents[2] / "base.yaml", file.parent / "base.yaml", file):
            copied = top / original.relative_to(file.parents[2])
            copied.parent.mkdir(parents=True, exist_ok=True)
            lines = original.read_text().splitlines()
            copied.write_text("\n".join(line for line in lines if not line.startswith("wandb_api_key")))
        config = load_config(copied, "train", ["max_training_steps=5"])
        assert config.diffusion.policy == {"type": "speedit"}
        assert (
            config.model["type"] == {"base": "DiT-XL/2", "dit_b2": "DiT-B/2", "dit_s2": "DiT-S/2"}[file.stem]
        )
        assert load_config(copied, "sample").sampler.num_steps == 250
