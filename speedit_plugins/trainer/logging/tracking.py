"""Metrics of a run: progress bar, metrics.jsonl and loggers.

Dims: T timesteps, B batch.
"""

import json
import math
import resource
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.files import naming, write_whole
from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy
from speedit_plugins.trainer.diffusion.gaussian_process import LossTerms
from speedit_plugins.trainer.logging.loggers import Logger
from speedit_plugins.trainer.logging.timestep_profile import NUM_RANGES, range_of
from speedit_plugins.trainer.results import METRICS
from speedit_plugins.trainer.terminal import progress, say

# Number of bins of mse_per_bin; it divides NUM_RANGES.
NUM_BINS = 10
# What boards show with `board_scalars: few`, besides everything below EVALUATION.
EVALUATION = "evaluation"
FEW = (
    "train/loss",
    "train/uniform_mse",
    "validation/loss",
    "train/grad_norm",
    "train/lr",
    "train/samples_per_second",
    "train/peak_memory_bytes",
    "train/mfu",
    "train/skipped_steps",
)


class LossWindow:
    """Mean losses since the last summary. They accumulate on the device; only a summary synchronises with it.

    `uniform_mse` is the mse importance-corrected to uniformly drawn timesteps, E[mse / (T p)]: the figure
    whose curves compare between policies.

    Args:
        policy: whose draws are scored.
        batch_size: samples of a step's draw, those of all ranks; the marginal law of a paired draw depends
            on it.
    """

    def __init__(self, policy: TimestepPolicy, *, batch_size: int, device: torch.device) -> None:
        self._policy = policy
        self._batch_size = batch_size
        # One tensor, so that the ranks sum it in one call.
        self._sums = torch.zeros(6 + 4 * NUM_RANGES, dtype=torch.float64, device=device)
        self._totals = self._sums[:4]  # loss, mse, vb, corrected mse
        self._aligned = self._sums[4:6]  # similarity, number of samples that have one
        self._ranges = self._sums[6:].view(4, NUM_RANGES)  # count, mse, loss, squared loss
        self._density: Tensor | None = None
        self._table = torch.empty(0)

    def add(self, draw: TimestepDraw, terms: LossTerms) -> None:
        """Adds the losses (B,) of one of this rank's batches."""
        loss, mse, vb = (term.detach().double() for term in (terms.loss, terms.mse, terms.vb))
        corrected = mse * self._correction(mse.device)[draw.index]
        self._totals += torch.stack([loss.sum(), mse.sum(), vb.sum(), corrected.sum()])
        if terms.alignment is not None:
            similarity = terms.alignment.detach().double()
            self._aligned += torch.stack([similarity.sum(), torch.ones_like(similarity).sum()])
        ranges = range_of(draw.index, self._policy.schedule.num_timesteps)
        self._ranges.index_add_(1, ranges, torch.stack([torch.ones_like(mse), mse, loss, loss**2]))

    def summary(self, reduce: Callable[[Tensor], object] | None = None) -> dict[str, Any]:
        """Means per sample since the last call: loss, mse, vb, uniform_mse, and lists by timestep.

        Also alignment, the mean cosine similarity of the samples that had one, if any had.

        mse_per_bin has `NUM_BINS` means; loss_per_timestep and loss_std_per_timestep have mean and standard
        deviation of the loss in `NUM_RANGES` ranges. NaN, and None in the lists, where no sample was drawn.

        Args:
            reduce: replaces a tensor by its sum over the ranks, each of which calls this; None is one rank.
        """
        if reduce is not None:
            reduce(self._sums)
        sums = self._sums.clone().cpu()
        self._sums.zero_()
        counts, mse, loss, squares = sums[6:].view(4, NUM_RANGES)
        means = (sums[:4] / counts.sum()).tolist()  # 0 / 0 is NaN
        mean = loss / counts
        # Rounding may make a variance of 0 negative.
        deviation = (squares / counts - mean**2).clamp(min=0).sqrt()
        pooled = mse.view(NUM_BINS, -1).sum(1) / counts.view(NUM_BINS, -1).sum(1)
        aligned = {"alignment": float(sums[4] / sums[5])} if sums[5] else {}
        return {
            **dict(zip(("loss", "mse", "vb", "uniform_mse"), means, strict=True)),
            **aligned,
            "mse_per_bin": _known(pooled),
            "loss_per_timestep": _known(mean),
            "loss_std_per_timestep": _known(deviation),
        }

    def _correction(self, device: torch.device) -> Tensor:
        # An adaptive policy replaces the density object when it changes.
        if self._density is not self._policy.density:
            self._density = self._policy.density
            law = self._policy.density_for(self._batch_size)
            # A timestep of probability 0 is never drawn, so its entry is never read.
            self._table = (1 / (len(law) * law.clamp(min=torch.finfo(law.dtype).tiny))).to(device)
        return self._table


class Tracker:
    """Writes a run's metrics into its folder and shows its progress. A context manager for rank 0.

    Args:
        folder: the experiment's folder; `metrics.jsonl` is written there.
        total_steps: last step of the progress bar.
        start_step: step at which this run starts. Later lines of metrics.jsonl come from a run that was
            cut off after its last checkpoint, and are dropped.
        loggers: also receive what is logged. The tracker closes them.
        only_few: the loggers receive the numbers of `FEW` and those of evaluations, and no others.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        start_step: int,
        loggers: Sequence[Logger] = (),
        only_few: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics_path = folder / METRICS
        _replace_lines(self.metrics_path, [row for row in read_metrics(folder) if row["step"] <= start_step])
        self._lines = self.metrics_path.open("a", buffering=1)
        self._bar = progress("training", total=total_steps, initial=start_step)
        self._loggers, self._only_few = loggers, only_few

    def step_done(self) -> None:
        """Moves the progress bar by one training step."""
        self._bar.update()

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Writes a line of metrics.jsonl, passes its numbers to the loggers, and shows the loss.

        Args:
            step: number of training steps done.
            row: metrics, among them the `loss` to show. Values may be lists of numbers, or dicts of values.
        """
        values = plain(row)
        with naming(self.metrics_path):
            self._lines.write(_line({"step": step, **values}))
        if "loss" in row:
            self._bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
        scalars = board_scalars(values, only_few=self._only_few)
        for logger in self._loggers:
            logger.add(step, scalars)

    def show(self, step: int, pictures: Mapping[str, Path]) -> None:
        """Passes image files to the loggers.

        Args:
            step: number of training steps done.
            pictures: PNG or GIF files, by name.
        """
        for logger in self._loggers:
            logger.add_pictures(step, pictures)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        try:
            # Closing flushes again what a failed write left. Its error is being raised already.
            with naming(self.metrics_path) if error is None else suppress(OSError):
                self._lines.close()
        finally:
            for logger in self._loggers:
                logger.close(is_failed=error is not None)


class SilentTracker(Tracker):
    """The tracker of ranks that write and show nothing."""

    def __init__(self) -> None:
        pass

    def step_done(self) -> None:
        pass

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        pass

    def show(self, step: int, pictures: Mapping[str, Path]) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `folder/metrics.jsonl`; empty without the file.

    A last line cut by a crash is left out. Other lines that are no logged step are left out too, and a line
    on standard output counts them.

    Raises:
        OSError: the file cannot be read.
    """
    path = folder / METRICS
    # A hole that a crash leaves in a file reads as NUL bytes.
    lines = path.read_bytes().replace(b"\0", b"").splitlines() if path.exists() else []
    rows, broken = [], []
    for number, line in enumerate(lines, start=1):
        row = _logged(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and number < len(lines):
            broken.append(number)
    if broken:
        what = f"{len(broken)} of {len(lines)} lines cannot be read and are left out"
        say(f"{path}: {what}, the first is line {broken[0]}")
    return rows


def _logged(line: bytes) -> dict[str, Any] | None:
    """The row of a line; None if it is no JSON object with a step, and numbers where the curves need them."""
    try:
        row = json.loads(line)
    # Nested too deeply for the parser, or not UTF-8.
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        return None
    curves = (row.get(name) for name in ("loss", "mse", "uniform_mse"))
    return row if all(value is None or type(value) in (int, float) for value in curves) else None


def latest(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The newest value of each key in lines of metrics.jsonl; empty without lines.

    A line of a validation or an evaluation has other keys than one of the training.
    """
    return {key: value for row in rows for key, value in row.items()}


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: tensors on a CUDA device, otherwise resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _known(values: Tensor) -> list[float | None]:
    """The values, with None for NaN, the mean over no sample."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def _replace_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_whole(path, "".join(_line(plain(row)) for row in rows).encode())


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """A copy with None for each number that JSON does not have: NaN and infinities."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def board_scalars(row: Mapping[str, Any], *, only_few: bool = False) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by their path on a board.

    These are train/loss, train/time_split/data, validation/loss, evaluation/fid, and mse_per_bin/0 for lists.

    Args:
        only_few: leaves out all but `FEW`, and those of evaluations.
    """
    values = {key: value for key, value in row.items() if key not in (EVALUATION, "val_loss")}
    found = _scalars(values) | _scalars(row.get(EVALUATION, {}), EVALUATION)
    if row.get("val_loss") is not None:
        found["validation/loss"] = row["val_loss"]
    return {
        path: value
        for path, value in found.items()
        if not only_few or path in FEW or path.startswith(f"{EVALUATION}/")
    }


def _scalars(row: Mapping[str, Any], prefix: str = "train") -> dict[str, float]:
    """The numbers of a row by path: train/loss, train/time_split/data, and mse_per_bin/0 for lists."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= _scalars(value, f"{prefix}/{name}")
        elif isinstance(value, list):
            found |= {f"{name}/{i}": item for i, item in enumerate(value) if item is not None}
        elif isinstance(value, int | float):
            found[f"{prefix}/{name}"] = value
    return found
