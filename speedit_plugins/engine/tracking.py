"""What a run says: progress bar, metrics.jsonl, TensorBoard, and lines on the terminal.

Dims: T timesteps, B batch.
"""

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from speedit_plugins.core.policy import TimestepDraw, TimestepPolicy
from speedit_plugins.diffusion.process import LossTerms

NUM_BINS = 10
METRICS = "metrics.jsonl"


def say(line: str) -> None:
    """One line to standard output, above a running progress bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def progress(name: str, *, total: int, initial: int = 0, unit: str = "step") -> "tqdm[NoReturn]":
    """A progress bar with rate and time left on standard error; in a log file, a line every half minute."""
    interval = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total,
        initial=initial,
        desc=name,
        unit=unit,
        dynamic_ncols=True,
        mininterval=interval,
        maxinterval=interval,
    )


class LossWindow:
    """Means since the last summary, accumulated on the device: reading them is the only synchronisation.

    `uniform_mse` is the mse importance-corrected to uniformly drawn timesteps, E[mse / (T p)]: the figure
    whose curves compare between policies.

    Args:
        policy: whose draws are scored.
        batch_size: B of every draw; the marginal law of a paired draw depends on it.
    """

    def __init__(self, policy: TimestepPolicy, *, batch_size: int, device: torch.device) -> None:
        self._policy = policy
        self._batch_size = batch_size
        self._totals = torch.zeros(4, dtype=torch.float64, device=device)  # loss, mse, vb, corrected mse
        self._bins = torch.zeros(2, NUM_BINS, dtype=torch.float64, device=device)  # mse, count
        self._num_samples = 0
        self._density: Tensor | None = None
        self._table = torch.empty(0)

    def add(self, draw: TimestepDraw, terms: LossTerms) -> None:
        """Adds the losses (B,) of one batch."""
        loss, mse, vb = (term.detach().double() for term in (terms.loss, terms.mse, terms.vb))
        corrected = mse * self._correction(mse.device)[draw.index]
        self._totals += torch.stack([loss.sum(), mse.sum(), vb.sum(), corrected.sum()])
        bins = draw.index * NUM_BINS // self._policy.schedule.num_timesteps
        self._bins.index_add_(1, bins, torch.stack([mse, torch.ones_like(mse)]))
        self._num_samples += len(mse)

    def summary(self) -> dict[str, Any]:
        """Means per sample since the last call: loss, mse, vb, uniform_mse, mse_per_bin (None: not drawn)."""
        loss, mse, vb, corrected = (self._totals / max(1, self._num_samples)).tolist()
        sums, counts = self._bins.tolist()
        per_bin = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
        self._totals.zero_()
        self._bins.zero_()
        self._num_samples = 0
        return {"loss": loss, "mse": mse, "vb": vb, "uniform_mse": corrected, "mse_per_bin": per_bin}

    def _correction(self, device: torch.device) -> Tensor:
        # An adaptive policy replaces its density when it changes; the object tells whether it did.
        if self._density is not self._policy.density:
            self._density = self._policy.density
            law = self._policy.density_for(self._batch_size)
            # Where the law is 0 nothing is drawn, and the entry is never read.
            self._table = (1 / (len(law) * law.clamp(min=torch.finfo(law.dtype).tiny))).to(device)
        return self._table


class Tracker:
    """Writes one run's metrics into its folder and shows its progress; a context manager.

    Args:
        folder: the experiment's folder; `metrics.jsonl` and `tensorboard/` are written there.
        total_steps: where the progress bar ends.
        start_step: where this run starts; lines of metrics.jsonl past it come from a run that was cut off
            after its last checkpoint, and are dropped.
        tensorboard: whether TensorBoard files are written.
    """

    def __init__(self, folder: Path, *, total_steps: int, start_step: int, tensorboard: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics_path = folder / METRICS
        _replace_lines(self.metrics_path, [row for row in read_metrics(folder) if row["step"] <= start_step])
        self._lines = self.metrics_path.open("a", buffering=1)
        self._bar = progress("training", total=total_steps, initial=start_step)
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def step_done(self) -> None:
        """Moves the progress bar by one training step."""
        self._bar.update()

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, its scalars to TensorBoard, the loss to the progress bar."""
        try:
            self._lines.write(json.dumps({"step": step, **row}) + "\n")
        except OSError as error:
            # The system's message for a full disk names no file.
            raise OSError(error.errno, error.strerror, str(self.metrics_path)) from error
        self._bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"train/{name}", value, step)
            for i, value in enumerate(row["mse_per_bin"]):
                if value is not None:
                    self._board.add_scalar(f"mse_per_bin/{i}", value, step)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._lines.close()
        if self._board is not None:
            self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `folder/metrics.jsonl`, none without the file; a last line cut by a crash is left out."""
    path = folder / METRICS
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return rows


def is_finite(row: Mapping[str, Any]) -> bool:
    """Whether the losses of a summary, and the gradient norm in it, are finite."""
    return all(math.isfinite(row[key]) for key in ("loss", "mse", "vb", "grad_norm"))


def _replace_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(partial, path)
