"""Loading, merging and checking of experiment configs."""

import copy
import dataclasses
import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from speedit_plugins.trainer.config.loading import find_config, load_config, merge, redact, to_yaml
from speedit_plugins.trainer.config.schema import PHASES

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
EXPERIMENTS = sorted(file for file in CONFIGS.rglob("*.yaml") if file != CONFIGS / "base.yaml")
DIGITS = CONFIGS / "image/digits/speedit.yaml"

MINIMAL: dict[str, Any] = {
    "experiment_dir": "outputs/x",
    "num_classes": 10,
    "image_size": 8,
    "model": {"type": "DiT", "input_size": 8, "num_classes": 10, "depth": 2},
    "data": {"dataset": {"type": "Digits"}, "batch_size": 8},
    "max_training_steps": 10,
}


def write(file: Path, content: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(content)))
    return file


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path / "leaf.yaml", MINIMAL)


def error_of(path: Path, *overrides: str, phase: str = "train") -> str:
    with pytest.raises(ValueError, match=".") as caught:
        load_config(path, phase, overrides)
    return str(caught.value)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.relative_to(CONFIGS).as_posix())
def test_every_shipped_config_is_valid_in_every_phase(file: Path, phase: str) -> None:
    config = load_config(file, phase)
    assert config.model.get("num_classes", config.num_classes) == config.num_classes
    assert not Path(config.experiment_dir).is_absolute()
    assert not config.allow_download


def test_experiments_have_their_own_folders() -> None:
    folders = [load_config(file, "train").experiment_dir for file in EXPERIMENTS]
    assert len(set(folders)) == len(folders)


def test_imagenet_leaves_differ_in_the_model_only() -> None:
    base = load_config(CONFIGS / "image/imagenet_256/base.yaml", "train")
    small = load_config(CONFIGS / "image/imagenet_256/dit_s2.yaml", "train")
    assert small.model == {**base.model, "type": "DiT-S/2"}
    assert dataclasses.replace(small, model=base.model, experiment_dir=base.experiment_dir) == base


def test_layers_override_from_the_root_to_the_command_line(tmp_path: Path) -> None:
    root = tmp_path / "configs"
    write(root / "base.yaml", {**MINIMAL, "seed": 1, "log_every": 1, "keep_last": 1, "ckpt_every": 1})
    # `image` has no base.yaml, so it is skipped.
    write(root / "image/digits/base.yaml", {"log_every": 2, "keep_last": 2, "ckpt_every": 2})
    leaf = write(
        root / "image/digits/leaf.yaml",
        {
            "keep_last": 3,
            "ckpt_every": 3,
            "train": {"ckpt_every": 4, "num_samples": 4},
            "sample": {"seed": 9},
        },
    )
    config = load_config(leaf, "train", ["num_samples=5"])
    assert (config.seed, config.log_every, config.keep_last) == (1, 2, 3)
    assert (config.ckpt_every, config.num_samples) == (4, 5)


def test_a_base_file_is_an_experiment_and_read_once(tmp_path: Path) -> None:
    write(tmp_path / "configs/base.yaml", MINIMAL)
    leaf = write(tmp_path / "configs/a/base.yaml", {"seed": 3})
    assert load_config(leaf, "train").seed == 3


def test_outside_configs_folders_a_gap_ends_the_chain(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", {"seed": 7})
    leaf = write(tmp_path / "gap/near/leaf.yaml", {})
    write(tmp_path / "gap/near/base.yaml", MINIMAL)
    assert load_config(leaf, "train").seed == 0
    write(tmp_path / "gap/base.yaml", {"log_every": 5})
    config = load_config(leaf, "train")
    assert (config.seed, config.log_every) == (7, 5)


def test_a_phase_section_counts_in_its_phase_only(tmp_path: Path) -> None:
    leaf = write(
        tmp_path / "leaf.yaml",
        {**MINIMAL, "sample_classes": [1], "sample": {"guidance_scale": 4.0, "sampler": {"num_steps": 20}}},
    )
    assert load_config(leaf, "sample").guidance_scale == 4.0
    assert load_config(leaf, "sample").sampler.num_steps == 20
    assert load_config(leaf, "inference").guidance_scale == 1.0
    assert load_config(leaf, "sample", ["sample.guidance_scale=2"]).guidance_scale == 2.0
    assert "has no effect in phase train" in error_of(leaf, "sample.guidance_scale=2")


def test_overrides_take_lists_and_nested_sections(minimal: Path) -> None:
    config = load_config(
        minimal,
        "train",
        [
            "sample_classes=[3, 1]",
            "optimizer={lr: 1e-3, betas: [0.9, 0.95]}",
            "model.depth=7",
            "seed=2",
            "seed=3",
        ],
    )
    assert config.sample_classes == [3, 1]
    assert (config.optimizer.lr, config.optimizer.betas) == (1e-3, (0.9, 0.95))
    assert (config.model["depth"], config.seed) == (7, 3)


def test_interpolations_are_resolved_after_all_layers(tmp_path: Path) -> None:
    leaf = write(
        tmp_path / "leaf.yaml", {**MINIMAL, "experiment_dir": "outputs/${seed}", "train": {"seed": 4}}
    )
    assert load_config(leaf, "train").experiment_dir == "outputs/4"
    assert load_config(leaf, "train", ["seed=5"]).experiment_dir == "outputs/5"
    assert "Interpolation key 'nope' not found" in error_of(leaf, "experiment_dir=${nope}")
    assert error_of(leaf, "data.dataset.root=???").startswith("data.dataset.root: Missing mandatory value")


def test_another_type_replaces_the_section(minimal: Path) -> None:
    config = load_config(minimal, "train", ["diffusion.policy={type: speed, k: 3}"])
    assert config.diffusion.policy == {"type": "speed", "k": 3}
    leaf = write(
        minimal.parent / "speed.yaml", {**MINIMAL, "diffusion": {"policy": {"type": "speed", "k": 3}}}
    )
    assert load_config(leaf, "train", ["diffusion.policy.type=p2"]).diffusion.policy == {"type": "p2"}
    assert load_config(leaf, "train", ["diffusion.policy=uniform"]).diffusion.policy == {"type": "uniform"}
    same = load_config(leaf, "train", ["diffusion.policy.type=speed", "diffusion.policy.lam=0.7"])
    assert same.diffusion.policy == {"type": "speed", "k": 3, "lam": 0.7}
    # A part alone is one of the named policy.
    part = load_config(leaf, "train", ["diffusion.policy.weighting=constant"])
    assert part.diffusion.policy == {"type": "speed", "k": 3, "weighting": "constant"}
    both = ["diffusion.policy.weighting=constant", "diffusion.policy.density=uniform"]
    assert load_config(leaf, "train", both).diffusion.policy == {
        "weighting": "constant",
        "density": "uniform",
    }
    parts = "diffusion.policy={density: {type: uniform}, weighting: {type: p2}}"
    composed = {"density": {"type": "uniform"}, "weighting": {"type": "p2"}}
    assert load_config(leaf, "train", [parts]).diffusion.policy == composed


def test_facts_about_the_data_outlive_another_model_type(minimal: Path) -> None:
    model = load_config(minimal, "train", ["model.type=DiT-S/2"]).model
    assert model == {"type": "DiT-S/2", "input_size": 8, "num_classes": 10}  # depth was a parameter of DiT


names = st.sampled_from(["a", "b", "c", "type"])
values = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.text("xy", max_size=2) | st.lists(st.integers(0, 3))
)
sections = st.recursive(
    st.dictionaries(names, values, max_size=3),
    lambda inner: st.dictionaries(names, values | inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(lower=sections, upper=sections)
def test_merge_laws(lower: dict[str, Any], upper: dict[str, Any]) -> None:
    before = copy.deepcopy((lower, upper))
    merged = merge(lower, upper)
    assert (lower, upper) == before
    assert merge(lower, {}) == lower
    assert merge({}, upper) == upper
    assert merge(lower, lower) == lower
    assert merge(merged, upper) == merged
    assert set(merged) == set(lower) | set(upper)


@settings(deadline=None)
@given(lower=sections, upper=sections)
def test_merge_takes_every_stated_value_and_no_key_of_another_type(
    lower: dict[str, Any], upper: dict[str, Any]
) -> None:
    def check(old: Any, new: dict[str, Any], merged: dict[str, Any]) -> None:
        for key, value in new.items():
            if not isinstance(value, dict):
                assert merged[key] == value
                continue
            below = old.get(key) if isinstance(old, dict) else None
            check(below, value, merged[key])
            if (
                isinstance(below, dict)
                and "type" in value
                and "type" in below
                and below["type"] != value["type"]
            ):
                assert set(merged[key]) == set(value)

    check(lower, upper, merge(lower, upper))


plain = st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6) | st.text("abz_ 09", max_size=6)


@settings(deadline=None, max_examples=40)
@given(value=plain | st.lists(plain, max_size=4))
def test_every_value_reaches_a_free_key_as_it_was_written(value: Any) -> None:
    text = OmegaConf.to_yaml(OmegaConf.create([value])).strip().removeprefix("- ")
    if isinstance(value, list):
        text = str(value)
    config = load_config(DIGITS, "train", [f"model.free={text}"])
    assert config.model["free"] == value
    assert type(config.model["free"]) is type(value)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("file", EXPERIMENTS[::4], ids=lambda file: file.name)
def test_the_saved_config_is_the_config(file: Path, phase: str, tmp_path: Path) -> None:
    config = load_config(file, phase)
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert load_config(saved, phase) == config


def test_messages_name_the_file(tmp_path: Path) -> None:
    write(tmp_path / "configs/base.yaml", {**MINIMAL, "seed": "one"})
    leaf = write(tmp_path / "configs/leaf.yaml", {"log_every": 3})
    assert error_of(leaf) == f"seed: wanted int, got 'one' (in {tmp_path / 'configs/base.yaml'})"
    write(leaf, {"log_evry": 3})
    assert error_of(leaf).endswith(f"(in {leaf})")
    write(leaf, {"seed": 1, "sample": {"log_evry": 3}})
    assert error_of(leaf).endswith(f"(in {leaf}, section sample)")
    leaf.write_text("seed: 1\nlog_every: [1\n")
    assert error_of(leaf).startswith(f"{leaf}: line 3: not valid YAML: ")
    leaf.write_text("- 1\n")
    assert error_of(leaf) == f"{leaf}: line 1: wanted keys at the top level, got a list"
    leaf.write_text("sample: 3\nseed: 1\n")
    assert error_of(leaf).startswith("sample: wanted a section with keys, got 3")


def test_a_missing_key_lists_what_was_read(tmp_path: Path) -> None:
    leaf = write(tmp_path / "leaf.yaml", {key: value for key, value in MINIMAL.items() if key != "model"})
    assert error_of(leaf) == f"model: missing; wanted a section with keys (read: {leaf})"


KEY = "0123456789abcdef0123456789abcdef01234567"


def test_api_keys_are_refused_and_never_shown(minimal: Path) -> None:
    for override in (f"wandb_api_key={KEY}", f"model.wandb_api_key={KEY}", f"sample.wandb_api_key={KEY}"):
        error = error_of(minimal, override)
        assert "WANDB_API_KEY in the environment" in error
        assert KEY not in error
    for override in (KEY, f"seed={KEY}", f"precision={KEY}"):
        assert KEY not in error_of(minimal, override)
    minimal.write_text(f"wandb_api_key: [{KEY}\n")
    assert KEY not in error_of(minimal)


@pytest.mark.parametrize(
    ("key", "value", "is_secret"),
    [
        ("hf_token", "swordfish", True),
        ("api_key", "swordfish", True),
        ("password", "swordfish", True),
        ("path", "hf_" + "a" * 30, True),
        ("path", "https://me:pw@host/weights", True),
        ("note", KEY, True),
        ("revision", KEY, False),
        ("image_key", "jpg", False),
        ("pad_token", "<pad>", False),
        ("num_tokens", 77, False),
        ("path", "a" * 64, False),
    ],
)
def test_saved_configs_hold_no_secrets(minimal: Path, key: str, value: Any, is_secret: bool) -> None:
    config = load_config(minimal, "train", [f"model.{key}={value}"])
    text = to_yaml(config)
    assert (str(value) not in text) == is_secret
    assert redact({key: [value]}) == {key: ["<redacted>" if is_secret else value]}


def test_a_config_is_found_as_path_then_in_configs_then_packaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = ModuleSpec("speedit_plugins.configs", None, is_package=True)
    packaged.submodule_search_locations = [str(tmp_path / "wheel/configs")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: packaged)
    monkeypatch.chdir(tmp_path)
    in_wheel = write(tmp_path / "wheel/configs/a/x.yaml", MINIMAL)
    assert find_config("a/x.yaml") == in_wheel
    local = write(tmp_path / "configs/a/x.yaml", MINIMAL)
    assert find_config("a/x.yaml") == local
    direct = write(tmp_path / "a/x.yaml", MINIMAL)
    assert find_config("a/x.yaml") == direct
    write(tmp_path / "wheel/configs/a/only_packaged.yaml", {})
    with pytest.raises(
        ValueError, match="does not exist; did you mean 'a/x.yaml'.*a/only_packaged.yaml, a/x.yaml"
    ):
        find_config("a/y.yaml")
    with pytest.raises(ValueError, match="'a' is a folder, wanted a file"):
        find_config("a")
    (tmp_path / "a/x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"needs a name in \.yaml, \.yml, \.py, got"):
        find_config("a/x.json")


PYTHON_CONFIG = """
_base_ = []
experiment_dir = "outputs/python"
num_classes, image_size = 10, 4 + 4
model = dict(type="DiT", input_size=8, num_classes="${num_classes}")
data = dict(dataset=dict(type="Digits"), batch_size=8)
optimizer = dict(betas=(0.9, 0.95))
max_training_steps = 3
sample = dict(sample_classes=[1])
"""


def test_python_configs_load_only_when_allowed(tmp_path: Path) -> None:
    leaf = tmp_path / "leaf.py"
    leaf.write_text(PYTHON_CONFIG)
    assert "wanted --allow-python-config" in error_of(leaf)
    config = load_config(leaf, "sample", ["seed=3"], allow_python=True)
    assert (config.image_size, config.optimizer.betas, config.seed) == (8, (0.9, 0.95), 3)
    assert config.model["num_classes"] == 10
    assert config.sample_classes == [1]


def test_a_python_config_without_mmengine_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaf = tmp_path / "leaf.py"
    leaf.write_text(PYTHON_CONFIG)
    monkeypatch.setitem(sys.modules, "mmengine", None)
    monkeypatch.delitem(sys.modules, "mmengine.config", raising=False)
    message = (
        r"leaf\.py: a Python config is read by mmengine, which cannot be imported \(.*mmengine.*\); wanted"
    )
    with pytest.raises(ValueError, match=rf"{message} pip install 'speedit-plugins\[mmengine\]', or a YAML"):
        load_config(leaf, "train", allow_python=True)


def test_yaml_tags_run_nothing(tmp_path: Path) -> None:
    leaf = tmp_path / "leaf.yaml"
    leaf.write_text(f"seed: !!python/object/apply:os.mkdir ['{tmp_path}/ran']\n")
    assert error_of(leaf).startswith(f"{leaf}: line 1: not valid YAML: could not determine a constructor")
    assert not (tmp_path / "ran").exists()


def test_a_config_is_checked_without_torch() -> None:
    code = (
        "import sys; from speedit_plugins.trainer.config.loading import load_config\n"
        f"load_config({str(DIGITS)!r}, 'train')\n"
        f"try: load_config({str(DIGITS)!r}, 'train', ['sed=1'])\n"
        "except ValueError: pass\n"
        "else: raise SystemExit('no error')\n"
        "sys.exit(', '.join({'torch', 'mmengine', 'diffusers', 'sklearn'} & set(sys.modules)) or 0)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_bare_name_and_its_parameters_on_the_command_line_are_one_section() -> None:
    arguments = ["diffusion.policy=speed", "diffusion.policy.k=4"]
    config = load_config("image/digits/speedit.yaml", "train", arguments)
    assert config.diffusion.policy == {"type": "speed", "k": 4}
    folder = load_config(
        "image/digits/speedit.yaml", "train", ["data.dataset=ImageFolder", "data.dataset.root=x"]
    )
    assert folder.data.dataset == {"type": "ImageFolder", "root": "x"}
