"""Whole training steps of our trainer and of hosts, in turn, on the same weights, batch and threads.

Our step is `Trainer.optimizer_step`: loader, draw, noise, forward, loss, backward, gradient norm, AdamW, EMA,
the window of losses. A host's step is the loop of its training script around its own model, diffusion object
and EMA. All run in one process, so our trainer's setting of the C allocator (`parallel/heap.py`) acts on all.

Dims: B samples, C channels, F frames (absent for images), h, w cells of a latent.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.training import Host, HostParts
from benchmarks.spread import Spread
from speedit_plugins.registry import DATASETS, ENCODERS
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.training.assembly import build_trainer
from speedit_plugins.trainer.training.products.choice import choose_products
from speedit_plugins.trainer.training.trainer import Trainer

OURS = "ours"
COMPILED = "ours, compiled"
CHANNELS = 4
NUM_CLASSES = 1000
PHASES = ("draw", "forward", "backward", "optimizer", "ema")
Split = dict[str, float]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Case:
    """A model and its batch of latents (B, C, [F,] edge, edge); 0 frames means images."""

    model: str
    batch: int
    edge: int
    num_frames: int = 0

    def __str__(self) -> str:
        frames = f"{self.num_frames} x " if self.num_frames else ""
        return f"{self.model}, batch {self.batch}, {CHANNELS} x {frames}{self.edge} x {self.edge}"


@dataclass(frozen=True)
class Steps:
    """Seconds of each timed step of one side, and of its phases. The index is the round."""

    seconds: tuple[float, ...]
    phases: Mapping[str, tuple[float, ...]]

    def split(self) -> Split:
        """Median seconds of each phase; `rest` is the time outside the phases."""
        split = {name: Spread.of(values).median for name, values in self.phases.items()}
        rest = [
            whole - sum(values[number] for values in self.phases.values())
            for number, whole in enumerate(self.seconds)
        ]
        return {**split, "rest": Spread.of(rest).median}


@dataclass(frozen=True)
class Comparison:
    """One case: the steps of each side, by name; ours come first."""

    case: Case
    sides: Mapping[str, Steps]

    @property
    def ours(self) -> list[str]:
        """The sides that run our trainer."""
        return [name for name in (OURS, COMPILED) if name in self.sides]

    def ratio(self, name: str, over: str = OURS) -> Spread:
        """A side's seconds / ours, within each round: above 1, ours is faster."""
        pairs = zip(self.sides[name].seconds, self.sides[over].seconds, strict=True)
        return Spread.of([theirs / ours for theirs, ours in pairs])

    def least_ratio(self, over: str) -> tuple[float, str]:
        """The median ratio and the name of the peer that comes closest to a side of ours."""
        return min((self.ratio(name, over).median, name) for name in self.sides if name not in self.ours)


def compare(
    case: Case,
    hosts: Sequence[Host],
    folder: Path,
    rounds: int,
    *,
    clock: Clock = time.perf_counter,
    with_compiled: bool = False,
) -> Comparison:
    """Times each side once per round, in alternating order. The first round is not counted.

    Args:
        hosts: hosts whose checkouts are in `folder`.
        rounds: >= 1.
        clock: returns seconds.
        with_compiled: adds our trainer a second time, with `compile: true`; it compiles in the first round.
    """
    x, y = batch_of(case)
    ours = OurStep(case, x, y, clock)
    steps: dict[str, Callable[[], tuple[float, Split]]] = {OURS: ours}
    if with_compiled:
        steps[COMPILED] = OurStep(case, x, y, clock, is_compiled=True)
    for host in hosts:
        parts = host.build(folder / host.checkout, case.model, _model_options(case))
        parts.model.load_state_dict(ours.trainer.model.state_dict())
        given = x.transpose(1, 2).contiguous() if case.num_frames else x
        steps[host.name] = HostStep(parts, given, y, clock)
    taken: dict[str, list[tuple[float, Split]]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name in list(steps)[:: 1 if number % 2 == 0 else -1]:
            measured = steps[name]()
            if number > 0:
                taken[name].append(measured)
    return Comparison(case, {name: _joined(values) for name, values in taken.items()})


class Stopwatch:
    """Seconds in named phases since the last `take`, measured by `clock`; replaces a `StepTimer`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seconds: Split = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a phase."""
        start = self._clock()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def step_done(self, **_: int) -> None:
        """Does nothing: the caller counts the steps."""

    def take(self) -> Split:
        """The seconds of PHASES, each of which must have been entered. Counting restarts at zero."""
        taken, self._seconds = self._seconds, {}
        return {name: taken[name] for name in PHASES}


class OurStep:
    """One step of our trainer: its seconds and those of its phases; loading and encoding count as rest."""

    def __init__(
        self, case: Case, x: Tensor, y: Tensor | None, clock: Clock, *, is_compiled: bool = False
    ) -> None:
        self.trainer = latent_trainer(case, x, y, is_compiled=is_compiled)
        self.trainer.engine.model.train()
        self._clock, self._watch = clock, Stopwatch(clock)
        self.trainer.timer = self._watch  # type: ignore[assignment]  # it has the same phases, with any clock
        # For this object only.
        for name in ("_draw_quantiles", "_timesteps"):
            setattr(self.trainer, name, self._timed(getattr(self.trainer, name)))

    def _timed(self, draw: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any) -> Any:
            with self._watch.phase("draw"):
                return draw(*given)

        return timed

    def __call__(self) -> tuple[float, Split]:
        start = self._clock()
        self.trainer.optimizer_step()
        return self._clock() - start, self._watch.take()


class HostStep:
    """One step as the host's script makes it, with the script's optimizer."""

    def __init__(self, parts: HostParts, x: Tensor, y: Tensor | None, clock: Clock) -> None:
        self._parts, self._x, self._y = parts, x, y
        self._model = parts.model.train()
        self._ema = deepcopy(parts.model).requires_grad_(False).eval()
        self._parameters = list(parts.model.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-4, weight_decay=0)
        self._clock, self._watch = clock, Stopwatch(clock)

    def __call__(self) -> tuple[float, Split]:
        parts, watch = self._parts, self._watch
        start = self._clock()
        with watch.phase("draw"):
            t = parts.draw(len(self._x))
        with watch.phase("forward"):
            loss = parts.losses(self._model, self._x, t, self._y).mean()
        with watch.phase("backward"):
            self._optimizer.zero_grad()
            loss.backward()
        with watch.phase("optimizer"):
            if parts.grad_norm is not None:
                parts.grad_norm(self._parameters)
            self._optimizer.step()
        with watch.phase("ema"):
            parts.update_ema(self._ema, self._model)
        # The script reads the loss for its running mean.
        loss.item()
        return self._clock() - start, watch.take()


def batch_of(case: Case) -> tuple[Tensor, Tensor | None]:
    """Latents for the case, and labels if they are images."""
    torch.manual_seed(0)
    x = torch.randn(case.batch, CHANNELS, *[case.num_frames] * bool(case.num_frames), case.edge, case.edge)
    return x, None if case.num_frames else torch.randint(0, NUM_CLASSES, (case.batch,))


def latent_trainer(case: Case, x: Tensor, y: Tensor | None, *, is_compiled: bool = False) -> Trainer:
    """Our trainer for the case's model, on one batch of latents in memory, with random parameters.

    The products of its linear layers are chosen as in a training.
    """
    content = {
        "experiment_dir": "unwritten",
        "num_classes": 0 if y is None else NUM_CLASSES,
        "image_size": case.edge,
        "num_frames": case.num_frames,
        "model": {"type": case.model},
        "encoder": {"type": "GivenLatents"},
        "diffusion": {"policy": {"type": "speed"}},
        "data": {"dataset": {"type": "OneBatch"}, "batch_size": case.batch},
        "max_training_steps": 1_000_000,
        "sample_every": 0,
        "device": "cpu",
        "compile": is_compiled,
    }
    OneBatch.x, OneBatch.y = x, y
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.yaml"
        path.write_text(json.dumps(content))
        trainer = build_trainer(load_config(path, "train"))
    # Some layers start at zero. Random weights keep special values out of every operation.
    for parameter in trainer.model.parameters():
        nn.init.normal_(parameter, std=0.02)
    trainer.ema.load(dict(trainer.model.named_parameters()), 0)
    choose_products(trainer.model, trainer.config, trainer.runtime)
    return trainer


class OneBatch:
    """A dataset of one batch of latents, set by `latent_trainer`."""

    x = torch.empty(0)
    y: Tensor | None = None

    def __init__(self) -> None:
        self.num_classes = 0 if self.y is None else NUM_CLASSES

    def __len__(self) -> int:
        return len(self.x)

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """The latents as an image or a video, with the label if there are labels."""
        sample: dict[str, Any] = {"image" if self.x.ndim == 4 else "video": self.x[index]}
        return sample if self.y is None else {**sample, "label": int(self.y[index])}


class GivenLatents(nn.Module):
    """An encoder for data that are latents already."""

    channels = image_channels = CHANNELS
    downsample = 1

    def __init__(self) -> None:
        super().__init__()

    def encode(self, images: Tensor, generators: Any = None) -> Tensor:
        """The latents, unchanged."""
        return images

    decode = encode

    def fingerprint(self) -> str:
        """A name that tells encoders apart."""
        return "given latents"


def _model_options(case: Case) -> dict[str, Any]:
    if case.num_frames:
        return {"input_size": case.edge, "num_frames": case.num_frames}
    return {"input_size": case.edge, "num_classes": NUM_CLASSES}


def _joined(taken: Sequence[tuple[float, Split]]) -> Steps:
    phases = {name: tuple(split[name] for _, split in taken) for name in PHASES}
    return Steps(tuple(seconds for seconds, _ in taken), phases)


DATASETS.register_module(name="OneBatch", module=OneBatch)
ENCODERS.register_module(name="GivenLatents", module=GivenLatents)
