"""What a run of a host's script reports: the t that its model saw, its losses and its samples.

Dims: B batch.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SAMPLERS = ("p_sample_loop", "ddim_sample_loop", "sample")


@dataclass
class Record:
    """One rank's run.

    Args:
        t: of each training call, as the model saw it, (B,).
        terms: of each training call: `loss`, and `mse` and `vb` where the host has them, each (B,).
        shapes: of the x that the model saw with it.
        samples: what each sampling call returned.
        exit_code: of the launcher or the script.
        stand_ins: what was replaced.
    """

    t: list[Tensor] = field(default_factory=list)
    terms: list[dict[str, Tensor]] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    exit_code: int = -1
    stand_ins: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Writes the record."""
        torch.save(vars(self), path)

    @classmethod
    def load(cls, path: Path) -> "Record":
        """Reads what `save` wrote; an empty record if there is no file."""
        return cls(**torch.load(path, weights_only=True)) if path.is_file() else cls()


class Recorder:
    """Fills a record while a script runs.

    Args:
        model: class name of the model.
        replayed: the t (B,) that the host's training calls get in place of their own; None leaves those.
    """

    def __init__(self, model: str, replayed: Sequence[Tensor] | None = None) -> None:
        self.record = Record()
        self._model = model
        self._replayed = replayed
        self._seen: list[Tensor] = []
        self._shapes: list[tuple[int, ...]] = []
        self._unweighted: Tensor | None = None
        nn.modules.module.register_module_forward_pre_hook(self._before)

    def watching(self, factory: Callable[..., Any]) -> Callable[..., Any]:
        """A host's factory. Training and sampling calls of the objects that it makes are recorded."""

        @functools.wraps(factory)
        def made(*args: Any, **kwargs: Any) -> Any:
            host = factory(*args, **kwargs)
            if hasattr(type(host), "training_losses"):
                self.watch(host)
            return host

        return made

    def keeping(self, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A host's function for the unweighted loss (B,); it is kept as `mse` where the terms have none."""

        @functools.wraps(loss)
        def kept(*args: Any, **kwargs: Any) -> Tensor:
            self._unweighted = loss(*args, **kwargs)
            return self._unweighted

        return kept

    def seeing(self, embedding: Callable[..., Any]) -> Callable[..., Any]:
        """A model's function that embeds t, for a script that draws by itself; its argument is recorded."""

        @functools.wraps(embedding)
        def embedded(t: Tensor, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                self.record.t.append(_copied(t))
            return embedding(t, *args, **kwargs)

        return embedded

    def watch(self, host: Any) -> None:
        """Records the calls of one object. A policy may be attached to it before or after."""

        def training_losses(*args: Any, **kwargs: Any) -> Any:
            if self._replayed is not None:
                # The order of the hosts that take t: model, x, t.
                args = (*args[:2], self._replayed[len(self.record.t)].to(args[2]), *args[3:])
            self._seen.clear()
            terms = type(host).training_losses(host, *args, **kwargs)
            if torch.is_grad_enabled():
                self._keep(terms)
            return terms

        # The attached class has methods, and an attribute of the object comes before them.
        vars(host)["training_losses"] = training_losses
        for name in SAMPLERS:
            if hasattr(type(host), name):
                vars(host)[name] = functools.partial(self._sampled, host, name)

    def _keep(self, terms: Any) -> None:
        if len(self._seen) != 1:
            raise RuntimeError(
                f"a training call called the {self._model} {len(self._seen)} times, wanted once"
            )
        self.record.t.append(self._seen[0])
        kept = ("loss", "mse", "vb")
        found = {name: _copied(terms[name]) for name in kept if name in terms}
        if self._unweighted is not None:
            found.setdefault("mse", _copied(self._unweighted))
        self.record.shapes.append(self._shapes[-1])
        self.record.terms.append(found)

    def _sampled(self, host: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        samples = getattr(type(host), name)(host, *args, **kwargs)
        self.record.samples.append(samples.detach().float().clone())
        return samples

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if type(module).__name__ == self._model and len(inputs) > 1:
            self._seen.append(_copied(inputs[1]))
            self._shapes[:] = [tuple(inputs[0].shape)]


def _copied(values: Tensor) -> Tensor:
    # ColossalAI's tensors are of a class of their own.
    with torch._C.DisableTorchFunctionSubclass():
        return values.detach().clone().as_subclass(Tensor)
