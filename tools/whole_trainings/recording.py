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
        # Of a watched class: how many of its training calls are in one another now, and the host's own loss.
        self._depth, self._mse = 0, None
        # What the model of a transport should answer, (B, ...).
        self._target: Tensor | None = None
        self._shapes: list[tuple[int, ...]] = []
        self._unweighted: Tensor | None = None
        self._watch_calls()

    def watching(self, factory: Callable[..., Any]) -> Callable[..., Any]:
        """A host's factory. Training and sampling calls of the objects that it makes are recorded."""
        if isinstance(factory, type) and hasattr(factory, "interpolant"):
            return self.watch_class(factory, "__call__")

        @functools.wraps(factory)
        def made(*args: Any, **kwargs: Any) -> Any:
            host = factory(*args, **kwargs)
            if hasattr(type(host), "training_losses"):
                self.watch(host)
            return host

        return made

    def watch_class(self, host_class: type, method: str) -> type:
        """Records a class's training call (REPA, DiT-3D), which returns the loss (B,), perhaps with others.

        A policy makes a subclass with a call of its own, which calls the host's. So the loss of the innermost
        call is the mse, and the loss of the outermost is reported.
        """
        setattr(host_class, method, self._recorded(getattr(host_class, method)))
        for name in SAMPLERS:
            if hasattr(host_class, name):
                setattr(host_class, name, self._recorded_sampler(getattr(host_class, name)))

        def for_subclass(subclass: type, **_: Any) -> None:
            if method in vars(subclass):
                setattr(subclass, method, self._recorded(vars(subclass)[method]))

        host_class.__init_subclass__ = classmethod(for_subclass)  # type: ignore[assignment, method-assign]  # for all
        return host_class

    def _recorded_sampler(self, theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(theirs)
        def sample(*args: Any, **kwargs: Any) -> Tensor:
            samples = theirs(*args, **kwargs)
            self.record.samples.append(samples.detach().float().clone())
            return samples

        return sample

    def _recorded(self, theirs: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(theirs)
        def call(host: Any, *args: Any, **kwargs: Any) -> Any:
            is_outermost = not self._depth
            if is_outermost:
                self._seen.clear()
            is_replayed = self._replayed is not None and "t" in kwargs
            if is_replayed:
                kwargs["t"] = self._replayed[len(self.record.t)].to(kwargs["t"])
            self._depth += 1
            try:
                returned = theirs(host, *args, **kwargs)
            finally:
                self._depth -= 1
            loss = returned[0] if isinstance(returned, tuple) else returned
            if self._mse is None:
                self._mse = loss.detach().clone()
            if is_outermost:
                if torch.is_grad_enabled():
                    self._keep({"loss": loss, "mse": self._mse})
                self._mse = None
            return returned

        return call

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
        path = getattr(host, "path_sampler", None)
        if path is not None:
            self._watch_path(path)

        def training_losses(*args: Any, **kwargs: Any) -> Any:
            if self._replayed is not None:
                # The order of the hosts that take t: model, x, t.
                args = (*args[:2], self._replayed[len(self.record.t)].to(args[2]), *args[3:])
            self._seen.clear()
            terms = type(host).training_losses(host, *args, **kwargs)
            model = args[0] if args else kwargs["model"]
            # A policy asks some hosts for the weights that they have already, with a function for a model.
            if torch.is_grad_enabled() and isinstance(model, nn.Module):
                self._keep(terms)
            return terms

        # The attached class has methods, and an attribute of the object comes before them.
        vars(host)["training_losses"] = training_losses
        for name in SAMPLERS:
            # A transport's `sample` draws t.
            if hasattr(type(host), name) and path is None:
                vars(host)[name] = functools.partial(self._sampled, host, name)

    def _watch_path(self, path: Any) -> None:
        """Notes what the model should answer, for a host that reports no mse beside its loss."""
        plan = path.plan

        def planned(*args: Any, **kwargs: Any) -> Any:
            t, x, self._target = plan(*args, **kwargs)
            return t, x, self._target

        vars(path)["plan"] = planned

    def _keep(self, terms: Any) -> None:
        if len(self._seen) != 1:
            raise RuntimeError(
                f"a training call called the {self._model} {len(self._seen)} times, wanted once"
            )
        self.record.t.append(self._seen[0])
        kept = ("loss", "mse", "vb")
        if self._target is not None:
            # In the order of the hosts' own mean, so that it has the same bits.
            squares = (terms["pred"] - self._target) ** 2
            terms = {**terms, "mse": squares.mean(dim=tuple(range(1, squares.dim())))}
        found = {name: _copied(terms[name]) for name in kept if name in terms}
        if self._unweighted is not None:
            found.setdefault("mse", _copied(self._unweighted))
        self.record.shapes.append(self._shapes[-1])
        self.record.terms.append(found)

    def _sampled(self, host: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        samples = getattr(type(host), name)(host, *args, **kwargs)
        self.record.samples.append(samples.detach().float().clone())
        return samples

    def _watch_calls(self) -> None:
        """Notes the t of every call of the model. Hooks for all modules do not get arguments by name."""
        call: Any = nn.Module.__call__

        @functools.wraps(call)
        def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            t = args[1] if len(args) > 1 else kwargs.get("timestep")
            if type(module).__name__ == self._model and isinstance(t, Tensor):
                self._seen.append(_copied(t))
                self._shapes[:] = [tuple(args[0].shape)]
            return call(module, *args, **kwargs)

        nn.Module.__call__ = called  # type: ignore[method-assign]  # for the rest of the process


def _copied(values: Tensor) -> Tensor:
    # ColossalAI's tensors are of a class of their own.
    with torch._C.DisableTorchFunctionSubclass():
        return values.detach().clone().as_subclass(Tensor)
