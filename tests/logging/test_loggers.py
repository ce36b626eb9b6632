import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from runs import file_size_limit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from speedit_plugins.trainer.config.loading import REDACTED, load_config
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.logging.loggers import TensorBoardLogger, check_loggers, open_loggers
from speedit_plugins.trainer.logging.tracking import Tracker, board_scalars

SECRET = "hf_" + "a" * 30
TENSORBOARD, WANDB = "enable_tensorboard_log=true", "enable_wandb_log=true"


class StandIn:
    """The part of the package wandb that is called, without its service. It records the calls."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.logged: list[Mapping[str, float]] = []
        self.metrics: list[tuple[str, str]] = []
        self.exit_codes: list[int] = []
        self.refusal: str | None = None

    def Image(self, path: str) -> tuple[str, str]:  # noqa: N802 - the package's name
        return ("image", path)

    def Video(self, path: str, *, format: str) -> tuple[str, str]:  # noqa: N802 - the package's name
        return (format, path)

    def Settings(self, **options: Any) -> dict[str, Any]:  # noqa: N802 - the package's name
        return options

    def init(self, **options: Any) -> SimpleNamespace:
        if self.refusal is not None:
            raise self.Error(self.refusal)
        self.runs.append(options)
        return SimpleNamespace(
            log=self.logged.append,
            define_metric=lambda name, step_metric: self.metrics.append((name, step_metric)),
            finish=lambda exit_code: self.exit_codes.append(exit_code),
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return stand_in


def pictures(folder: Path) -> tuple[Path, Path]:
    """A PNG and a GIF of 6 x 4 pixels."""
    still, moving = folder / "grid.png", folder / "moving.gif"
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    frames[0].save(still)
    frames[0].save(moving, save_all=True, append_images=frames[1:])
    return still, moving


def config_of(folder: Path, *options: str) -> ExperimentConfig:
    return load_config(
        "configs/image/digits/speedit.yaml",
        "train",
        [f"experiment_dir={folder}", "enable_tensorboard_log=false", *options],
    )


def test_a_config_opens_the_loggers_it_asks_for(tmp_path: Path, wandb: StandIn) -> None:
    assert open_loggers(config_of(tmp_path), start_step=0) == []
    (logger,) = open_loggers(config_of(tmp_path, TENSORBOARD), start_step=0)
    assert isinstance(logger, TensorBoardLogger)
    logger.close(is_failed=False)
    assert wandb.runs == []
    both = open_loggers(config_of(tmp_path, TENSORBOARD, WANDB), start_step=0)
    assert [type(logger).__name__ for logger in both] == ["TensorBoardLogger", "WandbLogger"]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    config = config_of(tmp_path, TENSORBOARD)
    for start, values in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (1, {2: 20.0})):
        loggers = open_loggers(config, start_step=start)
        with Tracker(tmp_path, total_steps=3, start_step=start, loggers=loggers) as tracker:
            for step, loss in values.items():
                tracker.log(step, {"loss": loss, "time_split": {"data": 0.5}, "mse_per_bin": [None, loss]})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("train/loss", "mse_per_bin/1"):
        assert [(event.step, event.value) for event in events.Scalars(name)] == [(1, 1.0), (2, 20.0)]
    assert [event.value for event in events.Scalars("train/time_split/data")] == [0.5, 0.5]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_names_the_folder_of_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, start_step=0)
    folder = tmp_path / "tensorboard"

    def fill() -> None:
        for step in range(10_000):
            logger.add(step, {"train/loss": 1.0})

    with file_size_limit(4096):
        with pytest.raises(OSError, match=rf"\] cannot write {folder}: File too large$"):
            fill()
        # The error is being raised already.
        logger.close(is_failed=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "tensorboard").write_text("no folder")
    with pytest.raises(OSError, match="other/tensorboard"):
        TensorBoardLogger(other, start_step=0)


def test_a_board_has_a_handful_of_numbers_unless_all_are_asked_for() -> None:
    row = {
        "step": 5,
        "loss": 1.0,
        "uniform_mse": 2.0,
        "lr": 0.1,
        "mse_per_bin": [None, 3.0],
        "time_split": {"data": 0.5},
        "val_loss": 4.0,
        "val_loss_per_bin": [5.0],
        "evaluation": {"fid[pixels]": 6.0},
        "evaluation_samples": 7,
    }
    few = {
        "train/loss": 1.0,
        "train/uniform_mse": 2.0,
        "train/lr": 0.1,
        "validation/loss": 4.0,
        "evaluation/fid[pixels]": 6.0,
    }
    assert board_scalars(row, only_few=True) == few
    found = board_scalars(row)
    assert found.items() >= few.items()
    assert {"mse_per_bin/1", "val_loss_per_bin/0", "train/time_split/data"} <= found.keys()


def test_boards_show_grids_and_videos(tmp_path: Path, wandb: StandIn) -> None:
    still, moving = pictures(tmp_path)
    loggers = open_loggers(config_of(tmp_path, TENSORBOARD, WANDB), start_step=0)
    with Tracker(tmp_path, total_steps=1, start_step=0, loggers=loggers) as tracker:
        tracker.show(1, {"samples": still, "clips": moving})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name, path in (("samples", still), ("clips", moving)):
        (event,) = events.Images(name)
        assert (event.step, event.width, event.height) == (1, 6, 4)
        # As it is: TensorBoard plays a GIF.
        assert event.encoded_image_string == path.read_bytes()
    assert wandb.logged == [{"step": 1, "samples": ("image", str(still)), "clips": ("gif", str(moving))}]


def test_one_folder_is_one_wandb_run_also_after_a_resume(tmp_path: Path, wandb: StandIn) -> None:
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        open_loggers(config_of(folder, WANDB, "wandb_project=digits"), start_step=0)
    first, again, other = wandb.runs
    assert first["id"] == again["id"] != other["id"]
    assert (first["resume"], first["project"], first["dir"]) == ("allow", "digits", tmp_path / "a")


def test_wandb_takes_the_scalars_of_a_step_on_an_axis_that_may_go_back(
    tmp_path: Path, wandb: StandIn
) -> None:
    (logger,) = open_loggers(config_of(tmp_path, WANDB), start_step=0)
    logger.add(5, {"train/loss": 1.0})
    logger.close(is_failed=True)
    assert wandb.metrics == [("*", "step")]
    assert wandb.logged == [{"step": 5, "train/loss": 1.0}]
    assert wandb.exit_codes == [1]


def test_wandb_gets_the_config_without_its_secrets_and_nothing_of_the_machine(
    tmp_path: Path, wandb: StandIn
) -> None:
    config = config_of(tmp_path, WANDB, f"model.hub_token={SECRET}", "experiment_name=seen")
    open_loggers(config, start_step=0)
    (run,) = wandb.runs
    assert SECRET not in repr(run)
    assert run["config"]["model"]["hub_token"] == REDACTED
    assert run["config"]["data"]["batch_size"] == config.data.batch_size
    assert run["name"] == "seen"
    assert run["settings"] == {"console": "off", "disable_git": True, "x_disable_meta": True}


def test_a_missing_key_is_an_error_that_names_the_ways_out(
    tmp_path: Path, wandb: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, WANDB)
    check_loggers(config)
    monkeypatch.delenv("WANDB_API_KEY")
    for mode in ("offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        check_loggers(config)
    monkeypatch.setenv("WANDB_MODE", "online")
    for act in (check_loggers, lambda config: open_loggers(config, start_step=0)):
        with pytest.raises(ValueError, match="no WANDB_API_KEY .* WANDB_MODE one of offline, disabled"):
            act(config)
    assert wandb.runs == []
    check_loggers(config_of(tmp_path))


def test_a_missing_package_is_an_error_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Python's own mark for a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'speedit-plugins\[wandb\]'"):
        check_loggers(config_of(tmp_path, WANDB))
    check_loggers(config_of(tmp_path))


def test_a_refusal_of_the_service_is_an_error_with_a_way_out(tmp_path: Path, wandb: StandIn) -> None:
    wandb.refusal = "no such host"
    with pytest.raises(ValueError, match="refused the run: no such host; WANDB_MODE=offline works"):
        open_loggers(config_of(tmp_path, WANDB), start_step=0)


def test_the_real_package_writes_an_offline_run_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["speedit", f"model.hub_token={SECRET}"])
    config = config_of(tmp_path, WANDB, f"model.hub_token={SECRET}")
    loggers = open_loggers(config, start_step=0)
    with Tracker(tmp_path, total_steps=1, start_step=0, loggers=loggers) as tracker:
        tracker.log(1, {"loss": 0.5, "time_split": {"data": 0.25}})
        tracker.show(1, dict(zip(("samples", "clips"), pictures(tmp_path), strict=True)))
    media = {path.suffix for path in (tmp_path / "wandb").rglob("media/**/*") if path.is_file()}
    assert media == {".png", ".gif"}
    run_id = (tmp_path / "wandb_run_id").read_text()
    (log,) = (tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    written = log.read_bytes()
    for name in (b"train/loss", b"train/time_split/data", b"batch_size", b"<redacted>"):
        assert name in written
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes()
