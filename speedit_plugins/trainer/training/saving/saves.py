"""The checkpoints that a training writes, one at a time."""

from pathlib import Path

from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.checkpoints.best import Best, kept_names, note_best
from speedit_plugins.trainer.checkpoints.names import folder_name
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.results import CHECKPOINTS
from speedit_plugins.trainer.training.saving.held import Held


class Saves:
    """Writes checkpoints while the training waits. All methods but `settle` and `last_line` are collective.

    `step` is the step of the newest checkpoint that was asked for, -1 for none. `last` is the newest one that
    is whole, None for none.
    """

    def __init__(self, config: ExperimentConfig, runtime: Runtime) -> None:
        self.folder = Path(config.experiment_dir) / CHECKPOINTS
        self.step = -1
        self.last: Path | None = None
        self._config, self._runtime = config, runtime

    @property
    def has_failed(self) -> bool:
        """Whether a save failed on this rank since, and nobody was told: one in the background."""
        return False

    def save(self, held: Held) -> Path:
        """Writes a checkpoint and returns its folder.

        Raises:
            CheckpointError: it cannot be written. Earlier checkpoints stay as they were.
        """
        path = self._write(held, self._runtime)
        self.step, self.last = held.step, path
        return path

    def note_best(self, step: int, score: str, value: float) -> Best:
        """Notes the checkpoint of a step, which was saved before, as the best by this value of `score`.

        Raises:
            ValueError, OSError: it cannot be noted.
        """
        best = Best(folder_name(step), step, score, value)
        self._note(best)
        return best

    def wait(self) -> None:
        """Returns when every save is done.

        Raises:
            CheckpointError: one of them failed.
        """

    def settle(self) -> None:
        """As `wait`, on this rank alone, before the training ends by an error: says a failure in a line."""

    def raise_failure(self) -> None:
        """Raises the failure of any rank on all of them.

        Raises:
            CheckpointError: names the checkpoint.
        """

    def last_line(self) -> str:
        """The end of a message about what cannot be saved."""
        self.settle()
        return (
            f"the last good checkpoint is {self.last}" if self.last else "there is no checkpoint of this run"
        )

    def _note(self, best: Best) -> None:
        note_best(self.folder, best, self._runtime)

    def _write(self, held: Held, runtime: Runtime) -> Path:
        return checkpoints.save(
            self.folder,
            held.step,
            held.contents(runtime),
            keep_last=self._config.keep_last,
            keep_every=self._config.keep_every,
            kept=kept_names(self.folder),
            runtime=runtime,
        )


def build_saves(config: ExperimentConfig, runtime: Runtime) -> Saves:
    """What writes the checkpoints of a training, as `async_save` says. Collective.

    Raises:
        ValueError: this machine cannot write in the background.
    """
    if not config.async_save:
        return Saves(config, runtime)
    # Here, so that a run that writes none in the background does not import it.
    from speedit_plugins.trainer.training.saving.background_saves import BackgroundSaves

    return BackgroundSaves(config, runtime)
