"""What ranks agree on: faults that all of them raise, and keys that may differ between machines."""

from collections.abc import Callable
from pathlib import Path

import pytest
from runs import file_size_limit, small_config
from two_ranks import Listening, listening, told

from speedit_plugins.trainer.checkpoints.best import Best, note_best
from speedit_plugins.trainer.logging.tracking import SilentTracker
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.parallel.same_config import difference, stated
from speedit_plugins.trainer.sampling.conditions import Conditions
from speedit_plugins.trainer.training import data_centre, evaluation
from speedit_plugins.trainer.training.data_centre import centred
from speedit_plugins.trainer.training.evaluation import Evaluation
from speedit_plugins.trainer.training.periodic import Periodic, Snapshot, take
from speedit_plugins.trainer.training.saving.run_lock import alone_in_folder

SNAPSHOT = Snapshot(0, dict, {}, {}, Runtime())


def failing(*_: object, **__: object) -> None:
    raise OSError(28, "the disk is full")


def enter(folder: Path, runtime: Runtime) -> None:
    with alone_in_folder(small_config(folder), runtime):
        pass


def note(folder: Path, runtime: Runtime) -> None:
    note_best(folder, Best("step_0000005", 5, "fid", 2.0), runtime)


def measure(folder: Path, runtime: Runtime) -> None:
    take([Periodic("sample_every", 1, failing)], SNAPSHOT, SilentTracker(), runtime)


def centre(folder: Path, runtime: Runtime) -> None:
    centred(small_config(folder, diffusion__policy="spectral"), runtime)


def evaluate(folder: Path, runtime: Runtime) -> None:
    Evaluation(object(), Conditions(("all",)), small_config(folder), runtime)


@pytest.mark.parametrize("action", [enter, note, measure, centre, evaluate])
def test_a_fault_of_the_first_rank_alone_is_told_to_the_others_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: Callable[[Path, Runtime], None]
) -> None:
    monkeypatch.setattr(data_centre, "_measured", failing)
    monkeypatch.setattr(evaluation, "Comparison", failing)
    monkeypatch.setattr(evaluation, "random_rows", lambda *_, **__: None)
    monkeypatch.setattr(Evaluation, "_example", lambda *_: None)
    runtime: Listening = listening()
    with file_size_limit(0), pytest.raises(OSError, match="disk is full|File too large") as caught:
        action(tmp_path, runtime)
    assert runtime.said == [str(caught.value)]


def test_the_fault_of_another_rank_is_raised_with_its_number() -> None:
    told(None).raise_together(None)
    with pytest.raises(ValueError, match=r"^the disk is full \(on rank 1\)$"):
        told("the disk is full").raise_together(None)
    with pytest.raises(OSError, match="own"):
        told("the disk is full").raise_together(OSError(5, "own"))


def test_a_lock_that_cannot_be_written_leaves_no_open_file(tmp_path: Path) -> None:
    before = list(Path("/proc/self/fd").iterdir())
    # The traceback would keep the frame, and with it a file that was not closed.
    with file_size_limit(0), pytest.raises(OSError, match=r"cannot write .*train\.lock") as caught:
        enter(tmp_path, Runtime())
    assert len(list(Path("/proc/self/fd").iterdir())) == len(before)
    assert caught.value.errno == 27


def test_each_machine_may_have_its_copies_of_the_data_elsewhere(tmp_path: Path) -> None:
    def machine(root: str, kind: str = "ImageCaptions") -> dict[str, object]:
        table = f"{{type: {kind}, root: {root}, captions_file: {root}/c.csv, table: {root}/t.csv}}"
        options = {"data__dataset": table, "data__validation": table, "validate_every": 5}
        return stated(small_config(tmp_path, **options))

    assert difference([machine("/a"), machine("/b")]) is None
    found = difference([machine("/a"), machine("/b", "ImageFolder")])
    assert found is not None
    assert "data.dataset.type 'ImageCaptions' on rank 0, 'ImageFolder' on rank 1" in found
