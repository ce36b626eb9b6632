"""Sequence parallelism: configs and one process here, several processes in sequence_checks.py."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import sequence_checks
from processes import TORCHRUN, Job
from runs import small_config
from torch import nn

from speedit_plugins.trainer.config.validation import ConfigError
from speedit_plugins.trainer.models.dit3d import DiT3D
from speedit_plugins.trainer.models.layers.sequence import check_splits
from speedit_plugins.trainer.models.mdt import MDT
from speedit_plugins.trainer.training.dry_run import describe
from speedit_plugins.trainer.training.train import train

needs_colossalai = pytest.mark.skipif(
    importlib.util.find_spec("colossalai") is None, reason="needs ColossalAI; make install adds it"
)
# Those of a model by itself: the quick ones.
MODELS = [name for name in sequence_checks.checks(2) if name.startswith("check_two_gradients_")]
TRAININGS = [name for name in sequence_checks.checks(2) if name not in MODELS]
FOUR = list(sequence_checks.checks(4))


def run_checks(folder: Path, count: int, names: Sequence[str]) -> dict[str, list[str]]:
    launcher = [str(count) if word == "2" else word for word in TORCHRUN]
    with Job([*launcher, sequence_checks.__file__, folder, *names]) as job:
        output = job.end()
    assert (folder / "results.json").exists(), output
    found: dict[str, list[str]] = json.loads((folder / "results.json").read_text())
    return dict.fromkeys(names, [f"the job ended before:\n{output}"]) | found


@pytest.fixture(scope="module")
def of_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return run_checks(tmp_path_factory.mktemp("models"), 2, MODELS)


@pytest.fixture(scope="module")
def of_trainings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return run_checks(tmp_path_factory.mktemp("trainings"), 2, TRAININGS)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return run_checks(tmp_path_factory.mktemp("four"), 4, FOUR)


@pytest.mark.parametrize("name", MODELS, ids=lambda name: name.removeprefix("check_"))
def test_a_model_on_two_ranks(of_models: dict[str, list[str]], name: str) -> None:
    assert of_models[name] == [], "\n".join(of_models[name])


@needs_colossalai
@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS, ids=lambda name: name.removeprefix("check_"))
def test_a_training_on_two_ranks(of_trainings: dict[str, list[str]], name: str) -> None:
    assert of_trainings[name] == [], "\n".join(of_trainings[name])


@needs_colossalai
@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR, ids=lambda name: name.removeprefix("check_"))
def test_a_mesh_of_two_by_two(of_four: dict[str, list[str]], name: str) -> None:
    assert of_four[name] == [], "\n".join(of_four[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"plugin": "gemini", "precision": "bf16"},
            "plugin: gemini is not tried with sequence_parallel 2; wanted ddp, zero1, zero2 or fsdp2",
        ),
        (
            {"compile": True},
            "compile: the exchange of tokens under sequence_parallel 2 is not compiled; wanted false",
        ),
        (
            {"masking__type": "MDT"},
            "masking.type: leaves out tokens that sequence_parallel 2 splits; wanted none",
        ),
        (
            {"routing__keep": 0.5},
            "routing.keep: each process would choose among its own tokens under sequence_parallel 2;",
        ),
    ],
)
def test_what_cannot_be_exact_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        small_config(tmp_path, sequence_parallel=2, **changes)
    assert message in str(error.value)


def test_one_process_shares_with_no_other(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^sequence_parallel: wanted a divisor of the number of processes, 1, got 2$"
    ):
        train(small_config(tmp_path, sequence_parallel=2))


def test_models_whose_tokens_stay_together_are_refused() -> None:
    sizes = {"hidden_size": 24, "depth": 3, "num_heads": 2}
    for model in (MDT(8, 2, **sizes), DiT3D(4, 2, **sizes), nn.Conv2d(1, 1, 1)):
        kind = type(model).__name__
        with pytest.raises(
            ValueError, match=f"^sequence_parallel: the tokens of {kind} cannot be split; wanted DiT"
        ):
            check_splits(model, 2)


def test_a_dry_run_says_what_a_process_holds_and_asks_the_model(tmp_path: Path) -> None:
    # 4 x 4 patches; heads for two.
    options = {"model__patch_size": 2}
    assert "on each process" not in describe(small_config(tmp_path, **options)).text
    described = describe(small_config(tmp_path, sequence_parallel=2, **options)).text
    assert "on each process    8 tokens of a sample, 2 processes share it\n" in described
    with pytest.raises(
        ValueError, match=r"^sequence_parallel: wanted a divisor of the model's 2 heads, .* got 4$"
    ):
        describe(small_config(tmp_path, sequence_parallel=4, **options))
