"""Low-rank adapters (LoRA) on a frozen model. A checkpoint holds them without the weights that they adapt.

Source: Hu et al. 2021, arXiv:2106.09685. The layers are those of peft.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from speedit_plugins.registry import nearest
from speedit_plugins.trainer.models.weights import check_file, first_line, read_checkpoint

# The key of a safetensors file's metadata that holds the `Adapters` of the file, as JSON.
RECORD = "lora"
# peft's name of the one set of adapters, a part of their parameters' names.
ADAPTER = "default"


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model: their options, and the weights that they adapt.

    Args:
        rank: width of each adapter; >= 1.
        alpha: the adapters' output is scaled by alpha / rank; > 0.
        targets: ends of the names of the adapted layers.
        base: SHA-256 of the frozen weights, see `fingerprint`.
        source: what the frozen weights were read from, for messages: a path or a hub name.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    base: str
    source: str

    @property
    def options(self) -> str:
        """The section of the config that makes such adapters."""
        return f"lora: {{rank: {self.rank}, alpha: {self.alpha:g}, targets: [{', '.join(self.targets)}]}}"

    def metadata(self) -> dict[str, str]:
        """The metadata of a safetensors file that holds the adapters."""
        return {RECORD: json.dumps(asdict(self))}


@dataclass(frozen=True)
class _Adapted:
    """What a model remembers of its adapters. `frozen` are the names of their base in its state dict."""

    adapters: Adapters
    frozen: frozenset[str]


def add_adapters(
    model: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = (),
    whole: Collection[str] = (),
    source: str = "",
) -> Adapters:
    """Freezes the model and gives it low-rank adapters, which leave its predictions as they are at first.

    A text-conditioned model is adapted in its network of diffusers, `net`.

    Args:
        model: with the weights to adapt.
        rank: see `Adapters`.
        alpha: see `Adapters`; None is the rank.
        targets: see `Adapters`; empty takes the model's own `lora_targets`, which are in its attentions.
        whole: names of parameters that are trained as a whole beside the adapters.
        source: see `Adapters`.

    Raises:
        ValueError: peft is not installed, the model has no targets of its own and gets none, or no layer's
            name ends with a target.
    """
    alpha = float(rank if alpha is None else alpha)
    targets = tuple(targets or getattr(model, "lora_targets", ()))
    root, prefix = _root(model)
    _check_targets(model, root, targets)
    kept = {name.removeprefix(prefix) for name in whole}
    base = fingerprint({name: value for name, value in root.state_dict().items() if name not in kept})
    model.requires_grad_(False)
    _inject(root, rank=rank, alpha=alpha, targets=targets)
    for name, parameter in model.named_parameters():
        if _plain(name) in set(whole):
            parameter.requires_grad_(True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = frozenset(name for name in model.state_dict() if name.startswith(prefix) and name not in trained)
    adapters = Adapters(rank, alpha, targets, base, source)
    cast(Any, model).adapted = _Adapted(adapters, frozen)
    return adapters


def adapters_of(model: nn.Module) -> Adapters | None:
    """What `add_adapters` gave the model; None if all its weights are trained."""
    adapted = getattr(model, "adapted", None)
    return None if adapted is None else cast(_Adapted, adapted).adapters


def without_base(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds: without the frozen weights, if the model has adapters."""
    adapted = cast(_Adapted | None, getattr(model, "adapted", None))
    return {name: value for name, value in tensors.items() if adapted is None or name not in adapted.frozen}


def read_adapters(path: Path) -> Adapters | None:
    """The adapters that a file of weights holds without their base; None if it holds whole weights.

    A key of another program in its metadata, `lora` too, says nothing.

    Raises:
        ValueError: the file cannot be read.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            record = (file.metadata() or {}).get(RECORD)
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged or not a safetensors file: {first_line(error)}") from error
    return None if record is None else _recorded(record)


def check_fit(model: nn.Module, found: Adapters | None, names: Collection[str], path: Path) -> None:
    """Checks that a file's adapters are those of the model, for the same frozen weights.

    Args:
        model: what the weights are for.
        found: what `read_adapters` says of the file.
        names: names of the file's tensors.
        path: names the file in messages.

    Raises:
        ValueError: the file is of a training with other adapters, or of another base; or one of the two has
            no adapters.
    """
    own = adapters_of(model)
    is_whole = found is None
    if found is None and own is not None and any(".lora_A." in name for name in names):
        # Written before checkpoints left the frozen weights out. Alpha was the rank then.
        found = Adapters(own.rank, float(own.rank), own.targets, own.base, own.source)
    if found is None and own is None:
        return
    if found is None:
        raise ValueError(
            f"'{path}' holds whole weights without adapters; wanted a checkpoint of {_options(own)}; to adapt"
            f" these weights, give them as pretrained"
        )
    if own is None or (own.rank, own.alpha, own.targets) != (found.rank, found.alpha, found.targets):
        what = "adapters without the weights they adapt" if not is_whole else "adapters"
        raise ValueError(f"'{path}' holds {what}, made with {found.options}; got {_options(own)}")
    if own.base != found.base:
        raise ValueError(
            f"'{path}' adapts other weights than those of {own.source}: they have SHA-256 {own.base[:12]},"
            f" wanted {found.base[:12]}, read from {found.source} in the training"
        )


@torch.no_grad()
def load_adapters(model: nn.Module, path: Path) -> None:
    """Copies a file's adapters, and what was trained beside them, into a model that has their base.

    Raises:
        ValueError: the file cannot be read or does not fit the model, see `check_fit`.
    """
    found = read_checkpoint(path)
    check_fit(model, read_adapters(path), found, path)
    check_shapes(found, without_base(model, model.state_dict()), str(path))
    model.load_state_dict(found, strict=False)


def check_shapes(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str = "") -> None:
    """Raises ValueError if names or shapes differ. The message has the first difference, and the source."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (found, wanted)]
    for name in (*shapes[0], *shapes[1]):
        got, needed = (table.get(name) for table in shapes)
        if got != needed:
            where = f"'{source}' does not fit the model: " if source else ""
            raise ValueError(f"{where}{name} has shape {got}, wanted {needed}")


def check_resumed(
    model: nn.Module, found: Mapping[str, Tensor], untrained: Mapping[str, Tensor], path: Path
) -> None:
    """Checks that a checkpoint's weights fit a model that goes on from them.

    Args:
        model: with the frozen weights of its base, if it has adapters.
        found: the tensors of the file.
        untrained: the model's frozen weights and buffers, in the precision in which they were read.
        path: the checkpoint's file of the model.

    Raises:
        ValueError: see `check_fit`; a name or shape differs; or an older file
            also holds the frozen weights, and they differ from the model's.
    """
    record = read_adapters(path)
    check_fit(model, record, found, path)
    own = model.state_dict()
    check_shapes(found, own if record is None else without_base(model, own))
    if record is None and adapters_of(model) is not None:
        source = cast(Adapters, adapters_of(model)).source
        for name in sorted(own.keys() - without_base(model, own).keys()):
            if not torch.equal(found[name].cpu(), untrained[name].cpu()):
                raise ValueError(f"its frozen {name} is another than that of {source}")


def merge_adapters(model: nn.Module) -> None:
    """Adds the adapters to the weights, in place. The model is then as one without adapters."""
    if adapters_of(model) is None:
        return
    root, _ = _root(model)
    for name, layer in adapted_layers(model).items():
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(root.get_submodule(parent), own, layer.get_base_layer())
    cast(Any, model).adapted = None


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """peft's layers by their name in what is adapted: a text-conditioned model's `net`, or the model."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in _root(model)[0].named_modules() if isinstance(layer, LoraLayer)}


def factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """A (rank, inputs) and B (outputs, rank) of each adapter by its layer's name, see `adapted_layers`."""
    return {
        name: (layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach())
        for name, layer in adapted_layers(model).items()
    }


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and float32 values of tensors; "" on the meta device, where there are none."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach()
        if value.is_meta:
            return ""
        flat = value.to("cpu", torch.float32).contiguous()
        digest.update(f"\n{name} {tuple(value.shape)}\n".encode())
        digest.update(flat.numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _recorded(record: str) -> Adapters | None:
    """The adapters in a file's metadata; None if another program wrote that key."""
    kinds: dict[str, Any] = {"rank": int, "alpha": (int, float), "targets": list, "base": str, "source": str}
    try:
        values = json.loads(record)
    except ValueError:
        return None
    if not isinstance(values, dict) or values.keys() != kinds.keys():
        return None
    if not all(isinstance(values[key], kind) for key, kind in kinds.items()):
        return None
    return Adapters(**{**values, "targets": tuple(values["targets"])})


def _root(model: nn.Module) -> tuple[nn.Module, str]:
    """What gets the adapters, and the beginning of its parameters' names in the model."""
    name = cast(str, getattr(model, "adapted_part", ""))
    return (model.get_submodule(name), f"{name}.") if name else (model, "")


def _inject(root: nn.Module, *, rank: int, alpha: float, targets: Sequence[str]) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            f"lora needs the package peft, which cannot be imported ({first_line(error)}); wanted pip install"
            " 'speedit-plugins[lora]'"
        ) from error
    options = LoraConfig(
        r=rank, lora_alpha=cast(Any, alpha), init_lora_weights="gaussian", target_modules=list(targets)
    )
    inject_adapter_in_model(options, root, adapter_name=ADAPTER)


def _check_targets(model: nn.Module, root: nn.Module, targets: Sequence[str]) -> None:
    """Raises ValueError for a target that no layer has: such an adapter would have no effect."""
    name = type(model).__name__
    if not targets:
        raise ValueError(f"lora.targets needs names of layers, got none: {name} has no lora_targets")
    # The convolution of our patch embedding is computed as a product, past any adapter.
    kinds = (nn.Linear, nn.Conv2d) if root is not model else (nn.Linear,)
    layers = [path for path, module in root.named_modules() if isinstance(module, kinds)]
    others = [path for path, module in root.named_modules() if not isinstance(module, kinds)]
    for target in targets:
        if not any(_ends(path, target) for path in layers):
            # The last two parts, since a name alone is the same in many layers.
            known = sorted({".".join(path.split(".")[-2:]) for path in layers})
            raise ValueError(
                f"lora.targets: no layer of {name} has a name that ends with"
                f" {target!r}{nearest(target, known)}; known: {', '.join(known)}"
            )
        if taken := next((path for path in others if _ends(path, target)), None):
            raise ValueError(
                f"lora.targets: {target!r} also names {taken}, which takes no adapter; wanted a longer name"
            )


def _ends(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _plain(name: str) -> str:
    """A parameter's name before its layer was adapted."""
    return name.replace(".base_layer.", ".")


def _options(adapters: Adapters | None) -> str:
    return "no lora section" if adapters is None else adapters.options
