"""What a contestant of benchmarks/race is, and the loop of the peers' training scripts.

Dims: B samples, C channels, H x W pixels.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.image_sets import ImageSet
from speedit_plugins.registry import PROCESSES, build
from speedit_plugins.trainer.data.loader import stream_seed
from speedit_plugins.trainer.diffusion.flow import RectifiedFlow
from speedit_plugins.trainer.diffusion.gaussian_process import GaussianProcess

Process = GaussianProcess | RectifiedFlow
# model(x, timestep, labels) -> prediction, as `sample` calls it: 0 is clean, a flow's timestep is 1000 t.
Denoiser = Callable[[Tensor, Tensor, Any], Tensor]

_BATCHES = 1


@dataclass(frozen=True)
class Net:
    """The model that all contestants have: its data, and its width, depth, heads and patches."""

    image_size: int
    channels: int
    num_classes: int
    width: int = 128
    depth: int = 6
    num_heads: int = 4
    patch_size: int = 4

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class Terms:
    """What all trainings of a race share.

    Args:
        batch_size: B.
        lr_factor: the learning rate is this times the one that a peer ships; ours is this times 1e-4.
        ema_halflife: steps in which the average forgets half.
        steps: steps of the whole training.
        seed: of weights, data order, timesteps and noise.
        device: of the training.
    """

    batch_size: int = 32
    lr_factor: float = 10.0
    ema_halflife: float = 80.0
    steps: int = 1600
    seed: int = 0
    device: str = "cpu"

    @property
    def ema_decay(self) -> float:
        """The decay with this half-life."""
        return float(0.5 ** (1 / self.ema_halflife))


class Training(Protocol):
    """A contestant: it trains step by step, and shows its averaged weights."""

    num_parameters: int
    num_training_only: int
    process: Process

    def turn(self) -> AbstractContextManager[None]:
        """Entered around its steps: other contestants draw random numbers outside."""
        ...

    def step(self) -> None:
        """Makes one step of the training, with everything that the contestant's own loop does."""
        ...

    def denoiser(self) -> Denoiser:
        """The model with the averaged weights of now, in evaluation mode."""
        ...

    def save(self, folder: Path) -> None:
        """Writes all that the next step depends on."""
        ...

    def load(self, folder: Path) -> None:
        """Goes on from what `save` wrote."""
        ...


class Batches:
    """Batches of a data set: every image once in an epoch, in an order that the seed decides.

    The images are on the device already, so a peer pays next to nothing for its data.
    """

    def __init__(self, data: ImageSet, batch_size: int, seed: int, device: str) -> None:
        if data.labels is None:
            raise ValueError("the race's peers are class-conditional: their data need labels, got none")
        self._images, self._labels = data.images.to(device), data.labels.to(device)
        self._batch_size, self._seed = batch_size, seed
        self._per_epoch = len(data.images) // batch_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and labels (B,) of a step."""
        epoch, place = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(stream_seed(self._seed, _BATCHES, epoch))
            order = torch.randperm(len(self._images), generator=generator)
            self._epoch, self._order = epoch, order.to(self._images.device)
        rows = self._order[place * self._batch_size :][: self._batch_size]
        return self._images[rows], self._labels[rows]


class RandomState:
    """The global random numbers of one contestant, so that the turns of others do not change its draws."""

    def __init__(self, seed: int) -> None:
        with self.used(is_new=True):
            torch.manual_seed(seed)
            np.random.seed(seed)

    @contextmanager
    def used(self, *, is_new: bool = False) -> Iterator[None]:
        """Within the block torch and numpy draw from here; after it from where they drew before."""
        outer = self._read()
        if not is_new:
            self.set(self.values)
        try:
            yield
        finally:
            self.values = self._read()
            self.set(outer)

    @staticmethod
    def _read() -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        name, keys, *others = np.random.get_state()
        numpy = {"name": name, "keys": torch.from_numpy(keys.astype(np.int64)), "others": others}
        return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": numpy}

    @staticmethod
    def set(values: dict[str, Any]) -> None:
        """Makes these the global states."""
        torch.set_rng_state(values["torch"])
        numpy = values["numpy"]
        np.random.set_state((numpy["name"], numpy["keys"].numpy().astype(np.uint32), *numpy["others"]))
        if values["cuda"]:
            torch.cuda.set_rng_state_all(values["cuda"])


@dataclass(frozen=True)
class Script:
    """What a peer's training script does in a step, from the peer's own code.

    Args:
        model: the peer's model.
        loss: the script's loss of a batch: model, images (B, C, H, W), labels (B,) -> scalar.
        optimizer: the script's optimizer of a learning rate.
        lr: the script's learning rate.
        update_ema: the script's function; it moves its first model towards its second by `decay`.
        denoise: calls a model with `Denoiser`'s arguments.
        is_flow: whether the model predicts the velocity of a straight path, or noise and variance.
        max_grad_norm: to which the script clips gradients; None clips nothing.
        training_only: prefix of the parameters that sampling does not need; '' is none.
        around: entered around each call of the model.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]
    lr: float
    update_ema: Callable[..., None]
    denoise: Callable[[nn.Module, Tensor, Tensor, Any], Tensor]
    is_flow: bool
    max_grad_norm: float | None = None
    training_only: str = ""
    around: Callable[[], Any] | None = None


class ScriptTraining:
    """The loop of a peer's script around its own parts: DiT, fast-DiT, SpeeD, SiT, REPA and LightningDiT.

    Per step the scripts draw timesteps and noise, run forward and backward, clip where they do, step the
    optimizer, update the average, and read the loss for their log.
    """

    def __init__(self, script: Script, data: ImageSet, terms: Terms) -> None:
        self._script, self._terms = script, terms
        self.process = build_process(is_flow=script.is_flow)
        self._model = script.model.to(terms.device).train()
        self._average = deepcopy(self._model).requires_grad_(False).eval()
        self._optimizer = script.optimizer(self._model.parameters(), lr=script.lr * terms.lr_factor)
        self._batches = Batches(data, terms.batch_size, terms.seed, terms.device)
        self._random = RandomState(terms.seed)
        self._step = 0
        own, extra = count_parameters(script.model, script.training_only)
        self.num_parameters, self.num_training_only = own, extra

    def turn(self) -> AbstractContextManager[None]:
        return self._random.used()

    def step(self) -> None:
        x, y = self._batches.at(self._step)
        with _around(self._script):
            loss = self._script.loss(self._model, x, y)
            self._optimizer.zero_grad()
            loss.backward()
            if self._script.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self._model.parameters(), self._script.max_grad_norm)
            self._optimizer.step()
            self._script.update_ema(self._average, self._model, decay=self._terms.ema_decay)
            loss.item()
        self._step += 1

    def denoiser(self) -> Denoiser:
        def denoise(x: Tensor, timestep: Tensor, labels: Any) -> Tensor:
            with _around(self._script):
                return self._script.denoise(self._average, x, timestep, labels)

        return denoise

    def save(self, folder: Path) -> None:
        state = {name: part.state_dict() for name, part in self._parts().items()}
        torch.save({**state, "step": self._step, "random": self._random.values}, folder / "state.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "state.pt", weights_only=True, map_location=self._terms.device)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self._step, self._random.values = state["step"], on_cpu(state["random"])

    def _parts(self) -> dict[str, Any]:
        return {"model": self._model, "average": self._average, "optimizer": self._optimizer}


def build_process(*, is_flow: bool) -> Process:
    """The process that a peer's model belongs to: rectified flow, or DiT's with a learned variance."""
    if is_flow:
        return build(PROCESSES, "RectifiedFlow")
    return build(PROCESSES, {"type": "SpeeDiffusion", "noise_schedule": "linear", "learn_sigma": True})


def count_parameters(model: nn.Module, training_only: str = "") -> tuple[int, int]:
    """Trained parameters that sampling uses, and those whose name starts with `training_only`."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    extra = sum(n for name, n in sizes.items() if training_only and name.startswith(training_only))
    return sum(sizes.values()) - extra, extra


def on_cpu(random: dict[str, Any]) -> dict[str, Any]:
    """Random states as torch and numpy take them back: on the CPU."""
    numpy = {**random["numpy"], "keys": random["numpy"]["keys"].cpu()}
    return {"torch": random["torch"].cpu(), "cuda": [state.cpu() for state in random["cuda"]], "numpy": numpy}


@contextmanager
def _around(script: Script) -> Iterator[None]:
    if script.around is None:
        yield
    else:
        with script.around():
            yield
