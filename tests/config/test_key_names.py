"""Hints after keys and values that are named as in another trainer, and the tables behind them."""

from pathlib import Path

import pytest

from speedit_plugins import cli
from speedit_plugins.trainer.config.key_names import OTHER_NAMES, OTHER_VALUES, SENTENCES, value_hint
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.config.schema import COMPONENTS, PHASES
from speedit_plugins.trainer.config.validation import key_paths

DIGITS = "image/digits/speedit.yaml"


def error_of(*overrides: str) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        load_config(DIGITS, "train", overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("max_steps=5", "did you mean 'max_training_steps'?"),
        ("steps=5", "did you mean 'max_training_steps' or 'sampler.num_steps'?"),
        ("num_steps=5", "did you mean 'max_training_steps' or 'sampler.num_steps'?"),
        ("epochs=5", "training is counted in steps: max_training_steps = epochs * images // data.batch_size"),
        ("batch_size=5", "did you mean 'data.batch_size'"),
        ("learning_rate=1", "did you mean 'optimizer.lr'?"),
        ("lerning_rate=1", "did you mean 'optimizer.lr'?"),
        ("optimizer.learning_rate=1", "did you mean 'optimizer.lr'?"),
        ("sampler.steps=5", "did you mean 'sampler.num_steps'?"),
        ("output_dir=x", "did you mean 'experiment_dir'?"),
        ("data_dir=x", "did you mean 'data.dataset.root'?"),
        ("data.root=x", "did you mean 'data.dataset.root'?"),
        ("workers=2", "did you mean 'data.num_workers'?"),
        ("resume_from=x", "did you mean 'resume'?"),
        ("save-every=2", None),
        ("save_every=2", "did you mean 'ckpt_every'?"),
        ("guidance=2", "did you mean 'guidance_scale'?"),
        ("ema_decay=0.9", "ema.halflife_steps = ln 0.5 / ln decay"),
        ("gpus=2", "torchrun --nproc-per-node N"),
        ("tread=0.5", "did you mean 'routing.keep'?"),
        ("repa=true", "did you mean 'alignment.type'?"),
        ("immiscible=true", "did you mean 'noise_assignment'?"),
        ("alignment.proj_coeff=0.5", "did you mean 'alignment.weight'?"),
        ("Seed=2", "did you mean 'seed'?"),
    ],
)
def test_a_key_of_another_trainer_is_answered_with_ours(override: str, hint: str | None) -> None:
    error = error_of(override)
    if hint is None:  # no name of a key at all
        assert error.startswith("argument wanted key=value")
    else:
        assert error.startswith(f"{override.partition('=')[0]}: unknown key; ")
        assert hint in error.partition("; known here")[0]
        # The keys of the top would fill the screen.
        assert "." in override.partition("=")[0] or "known here" not in error


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("optimizer.type=adamw", "did you mean 'AdamW'?"),
        ("device=gpu", "did you mean 'cuda'?"),
        ("device=CUDA", "did you mean 'cuda'?"),
        ("precision=float16", "did you mean 'fp16'?"),
        ("precision=16", "did you mean 'fp16'?"),
        ("precision=bfloat16", "did you mean 'bf16'?"),
        ("optimizer.schedule=cosin", "did you mean 'cosine'?"),
        ("diffusion.prediction_type=v_prediction", "did you mean 'v'?"),
        ("sampler.type=DDIM", "did you mean 'ddim'?"),
        ("pretrained=None", "YAML writes null"),
        ("text_encoder=none", "YAML writes null"),
        ("optimizer.lr='\"1e-4\"'", "wanted 0.0001 without quotes"),
        ("max_training_steps=10k", "wanted 10000 without quotes"),
        ("max_training_steps='1,000'", "wanted 1000 without quotes"),
        ("compile='\"true\"'", "wanted true or false without quotes"),
        ("experiment_name=12", "wanted quotes around it: '12'"),
        ("sample_classes='1,2'", "a list is written [1, 2]"),
        ("experiment_dir=$HOME/x", "environment variables are not replaced in a path, got $HOME"),
    ],
)
def test_a_value_that_is_nearly_right_is_answered_with_the_right_one(override: str, hint: str) -> None:
    error = error_of(override.replace("'\"", "'").replace("\"'", "'"))
    assert error.startswith(f"{override.partition('=')[0]}: ")
    assert hint in error
    assert error.endswith("(in command line)")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["-p", "Train"], "invalid choice: 'Train'; did you mean 'train'?"),
        (["-p", "eval"], "did you mean 'test'?"),
        (
            ["-p", "train", "--optimizer.lr", "1e-3"],
            "did you mean 'optimizer.lr'? A key is written without dashes",
        ),
        (["-p", "train", "--lr=1e-3"], "did you mean 'optimizer.lr'? A key is written without dashes"),
        (["-p", "train", "optimizer.lr=", "1e-3"], "got '1e-3'; wanted no blank on either side of ="),
        (["-p", "train", "optimizer.lr", "1e-3"], "got 'optimizer.lr'; the value follows after ="),
        (["-p", "train", "+seed=3"], "wanted the key alone, without a sign before it"),
        (["-p", "train", "image/digits/speed.yaml"], "a run has one config, after -c"),
    ],
)
def test_the_command_line_says_how_a_key_is_written(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["-c", DIGITS, *arguments]) == cli.USER_ERROR
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert hint in said[0]


def test_the_tables_lead_to_keys_and_values_that_exist() -> None:
    keys = key_paths()
    for key, names in OTHER_NAMES.items():
        assert key in keys or key.rpartition(".")[0] in COMPONENTS
        # A name that is a key here needs no hint.
        assert not set(names) & {name for name in keys if "." not in name}
    sentences = [name for names in SENTENCES for name in names]
    assert len(set(sentences)) == len(sentences)
    assert not set(sentences) & {name for names in OTHER_NAMES.values() for name in names}
    for value, names in OTHER_VALUES.items():
        assert all(value_hint(name, [value]) == f"; did you mean {value!r}?" for name in names)
    assert value_hint("quit", PHASES) == ""


def test_a_config_without_a_path_is_not_read_as_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config needs a file, got an empty name"):
        load_config("", "train")
