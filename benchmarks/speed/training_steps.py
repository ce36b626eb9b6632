"""Whole training steps of our trainer and of hosts, in turn, on the same weights, batch and threads.

Our step is `Trainer.optimizer_step`: loader, draw, noise, forward, loss, backward, gradient norm, AdamW, EMA,
the window of losses. A host's step is the loop of its training script around its own model, diffusion object
and EMA. All run in one process, so our trainer's settings act on all: the C allocator's (`parallel/heap.py`)
on the CPU, and TF32 products on CUDA. There a step lasts from an idle device to an idle device, and a batch
comes from the memory of the CPU, as it does from the hosts' loaders.

Dims: B samples, C channels, F frames (absent for images), h, w cells of a latent.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.training import Host, HostParts
from benchmarks.speed.devices import Clock, Memory, Setting, Stopwatch, wait_for, waiting
from benchmarks.spread import Spread
from speedit_plugins.registry import DATASETS, ENCODERS, MODELS, build
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.logging.throughput import mfu, training_flops
from speedit_plugins.trainer.models.interface import example_inputs
from speedit_plugins.trainer.parallel.replica import AUTOCAST
from speedit_plugins.trainer.training.assembly import build_trainer
from speedit_plugins.trainer.training.products.choice import choose_products
from speedit_plugins.trainer.training.trainer import Trainer

OURS = "ours"
COMPILED = "ours, compiled"
CHANNELS = 4
NUM_CLASSES = 1000
PHASES = ("draw", "forward", "backward", "optimizer", "ema")
Split = dict[str, float]
# Counted rounds that no budget of time takes away.
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """A model and its batch of latents (B, C, [F,] edge, edge); 0 frames means images.

    A flow's model predicts a velocity, others predict noise and variance.
    """

    model: str
    batch: int
    edge: int
    num_frames: int = 0
    is_flow: bool = False

    def __str__(self) -> str:
        frames = f"{self.num_frames} x " if self.num_frames else ""
        kind = ", a flow" * self.is_flow
        return f"{self.model}{kind}, batch {self.batch}, {CHANNELS} x {frames}{self.edge} x {self.edge}"

    @property
    def model_options(self) -> dict[str, Any]:
        """Arguments of the model's class, ours and the hosts'."""
        classes = {"num_frames": self.num_frames} if self.num_frames else {"num_classes": NUM_CLASSES}
        return {"input_size": self.edge, **classes, **({"learn_sigma": False} if self.is_flow else {})}

    def flops(self) -> int:
        """FLOPs of a step, see `training_flops`. They are those of our model, and so of the hosts'."""
        with torch.device("meta"):
            model = build(MODELS, {"type": self.model, **self.model_options})
        return self.batch * training_flops(model, example_inputs(model, 1))


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
    """One case: the steps of each side, by name; ours come first. `peaks` are bytes, see `Memory`."""

    case: Case
    sides: Mapping[str, Steps]
    setting: Setting = field(default_factory=Setting)
    peaks: Mapping[str, int] = field(default_factory=dict)

    @property
    def ours(self) -> list[str]:
        """The sides that run our trainer."""
        return [name for name in (OURS, COMPILED) if name in self.sides]

    def ratio(self, name: str, over: str = OURS) -> Spread:
        """A side's seconds / ours, within each round: above 1, ours is faster."""
        pairs = zip(self.sides[name].seconds, self.sides[over].seconds, strict=True)
        return Spread.of([theirs / ours for theirs, ours in pairs])

    def mfu(self, name: str, peak: float) -> float:
        """The share of the device's peak, in FLOP/s, that a side's median step reaches."""
        rate = 1 / Spread.of(self.sides[name].seconds).median
        return mfu(rate, flops_per_sample=self.case.flops(), peak=peak, num_devices=1)

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
    setting: Setting | None = None,
) -> Comparison:
    """Times each side once per round, in alternating order. The setting's first rounds are not counted.

    Args:
        hosts: hosts whose checkouts are in `folder`.
        rounds: that are counted, >= 1; fewer are made if the setting's budget of time ends before.
        clock: returns seconds.
        with_compiled: adds our trainer a second time, with `compile: true`; it compiles in the first round.
        setting: None is fp32 on the CPU.
    """
    setting = setting or Setting()
    x, y = batch_of(case)
    memory = Memory(setting.device)
    with memory.of(OURS):
        ours = OurStep(case, x, y, clock, setting=setting)
    steps: dict[str, Callable[[], tuple[float, Split]]] = {OURS: ours}
    if with_compiled:
        with memory.of(COMPILED):
            steps[COMPILED] = OurStep(case, x, y, clock, is_compiled=True, setting=setting)
    for host in hosts:
        given = x.transpose(1, 2).contiguous() if case.num_frames else x
        # On the CPU, as the scripts build their models; Latte's positions cannot be made elsewhere.
        parts = host.build(folder / host.checkout, case.model, case.model_options)
        parts.model.load_state_dict(ours.trainer.model.state_dict())
        with memory.of(host.name):
            steps[host.name] = HostStep(parts, given, y, clock, setting=setting)
    taken: dict[str, list[tuple[float, Split]]] = {name: [] for name in steps}
    began = time.perf_counter()
    for number in range(-setting.num_warm, rounds):
        if number == 0:
            began = time.perf_counter()
        if number >= LEAST_ROUNDS and time.perf_counter() - began > setting.budget_seconds:
            break
        for name in list(steps)[:: 1 if number % 2 == 0 else -1]:
            with memory.of(name):
                measured = steps[name]()
            if number >= 0:
                taken[name].append(measured)
    return Comparison(case, {name: _joined(values) for name, values in taken.items()}, setting, memory.peaks)


class OurStep:
    """One step of our trainer: its seconds and those of its phases; loading and encoding count as rest."""

    def __init__(
        self,
        case: Case,
        x: Tensor,
        y: Tensor | None,
        clock: Clock,
        *,
        is_compiled: bool = False,
        setting: Setting | None = None,
    ) -> None:
        setting = setting or Setting()
        self.trainer = latent_trainer(case, x, y, is_compiled=is_compiled, setting=setting)
        self.trainer.engine.model.train()
        self._clock, self._watch = waiting(setting.device, clock), Stopwatch(clock, PHASES, setting.device)
        self.trainer.timer = self._watch  # type: ignore[assignment]  # it has the same phases, with any clock
        # For this object only.
        for drawing, name in ((self.trainer.policy, "quantiles"), (self.trainer.draws, "timesteps")):
            setattr(drawing, name, self._timed(getattr(drawing, name)))

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

    def __init__(
        self,
        parts: HostParts,
        x: Tensor,
        y: Tensor | None,
        clock: Clock,
        *,
        setting: Setting | None = None,
    ) -> None:
        self._setting = setting or Setting()
        device = self._setting.device
        self._parts, self._x, self._y = parts, _in_loader(x, device), _in_loader(y, device)
        self._model = parts.model.to(device).train()
        self._ema = deepcopy(parts.model).requires_grad_(False).eval()
        self._parameters = list(parts.model.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-4, weight_decay=0)
        self._clock, self._watch = waiting(device, clock), Stopwatch(clock, PHASES, device)
        wait_for(device)

    def __call__(self) -> tuple[float, Split]:
        parts, watch, device = self._parts, self._watch, self._setting.device
        start = self._clock()
        x, y = self._x.to(device), None if self._y is None else self._y.to(device)
        with watch.phase("draw"):
            t = parts.draw(len(x), device)
        with watch.phase("forward"):
            loss = parts.losses(self._called, x, t, y).mean()
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

    @property
    def _called(self) -> Callable[..., Tensor]:
        """The model; in another precision than fp32, as accelerate's `prepare` wraps it."""
        if self._setting.precision == "fp32":
            return self._model

        def called(*args: Any, **kwargs: Any) -> Tensor:
            with torch.autocast(self._setting.device, AUTOCAST[self._setting.precision]):
                found = self._model(*args, **kwargs)
            return found.float()

        return called


def batch_of(case: Case) -> tuple[Tensor, Tensor | None]:
    """Latents for the case, and labels if they are images."""
    torch.manual_seed(0)
    x = torch.randn(case.batch, CHANNELS, *[case.num_frames] * bool(case.num_frames), case.edge, case.edge)
    return x, None if case.num_frames else torch.randint(0, NUM_CLASSES, (case.batch,))


def latent_trainer(
    case: Case,
    x: Tensor,
    y: Tensor | None,
    *,
    is_compiled: bool = False,
    setting: Setting | None = None,
) -> Trainer:
    """Our trainer for the case's model, on one batch of latents in memory, with random parameters.

    The products of its linear layers are chosen as in a training.
    """
    setting = setting or Setting()
    diffusion: dict[str, Any] = {"policy": {"type": "speed"}}
    if case.is_flow:
        diffusion = {"type": "RectifiedFlow", "policy": {"type": "logit_normal"}}
    content = {
        "experiment_dir": "unwritten",
        "num_classes": 0 if y is None else NUM_CLASSES,
        "image_size": case.edge,
        "num_frames": case.num_frames,
        "model": {"type": case.model},
        "encoder": {"type": "GivenLatents"},
        "diffusion": diffusion,
        "data": {"dataset": {"type": "OneBatch"}, "batch_size": case.batch},
        "max_training_steps": 1_000_000,
        "sample_every": 0,
        "device": setting.device,
        "precision": setting.precision,
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


def _in_loader(tensor: Tensor | None, device: str) -> Any:
    """The tensor as the hosts' loaders give it: in pinned memory, if there is a device to copy to."""
    return tensor.pin_memory() if tensor is not None and device == "cuda" else tensor


def _joined(taken: Sequence[tuple[float, Split]]) -> Steps:
    phases = {name: tuple(split[name] for _, split in taken) for name in PHASES}
    return Steps(tuple(seconds for seconds, _ in taken), phases)


DATASETS.register_module(name="OneBatch", module=OneBatch)
ENCODERS.register_module(name="GivenLatents", module=GivenLatents)
