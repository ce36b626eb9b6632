"""Imports modules of a host's checkout without timm, and without other things their packages would import.

Three layers of timm are rewritten here, with its parameter names and its order of operations: a convolution
for the patches, fused scaled-dot-product attention, and dropout layers at probability 0.
"""

import __future__

import ast
import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHECKOUT = "facebookresearch+DiT"


def load_original(hosts: Path) -> ModuleType:
    """Imports `models` from the checkout `facebookresearch+DiT` in the folder `hosts`.

    Raises:
        ValueError: there is no such checkout.
    """
    source = hosts / CHECKOUT / "models.py"
    if not source.is_file():
        raise ValueError(f"no checkout of facebookresearch/DiT: {source} is not a file")
    with importable(source.parent):
        return importlib.import_module("models")


@contextmanager
def importable(
    checkout: Path, *, bare: Sequence[str] = (), instead: Mapping[str, ModuleType] | None = None
) -> Iterator[None]:
    """Within the block, imports look in the checkout first; after it its modules leave `sys.modules` again.

    Args:
        checkout: one checkout at a time, because hosts use the same few module names.
        bare: dotted names of packages whose `__init__` is not run; their modules can be imported one by one.
        instead: further modules by dotted name, in place of what is not installed; see `unused`.
    """
    instead = instead or {}
    names = {path.stem for path in checkout.iterdir()} | {"timm"} | {name.split(".")[0] for name in instead}
    others = _taken_out(names)
    sys.modules.update({**_stand_ins(), **instead})
    for name in bare:
        package = ModuleType(name)
        package.__path__ = [str(checkout.joinpath(*name.split(".")))]
        sys.modules[name] = package
    sys.path.insert(0, str(checkout))
    try:
        yield
    finally:
        sys.path.remove(str(checkout))
        _taken_out(names)
        sys.modules.update(others)


def unused(*names: str) -> dict[str, ModuleType]:
    """Modules for `importable` that a host imports from, but whose contents are never called.

    Args:
        names: dotted names; the packages above them come too.
    """
    parents = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}
    modules: dict[str, ModuleType] = {name: _Unused(name) for name in sorted({*names, *parents})}
    for name, module in modules.items():
        if "." in name:
            parent, _, last = name.rpartition(".")
            setattr(modules[parent], last, module)
    return modules


class _Unused(ModuleType):
    """A module with every name. None of them can be called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def script_function(script: Path, name: str) -> Callable[..., Any]:
    """Compiles one function from the file of a script that cannot be imported here.

    The function sees torch, torch's `inf`, and OrderedDict.

    Raises:
        ValueError: the script has no such function at its top.
    """
    tree = ast.parse(script.read_text(encoding="utf-8"))
    found: list[ast.stmt] = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    if not found:
        raise ValueError(f"{script} needs a function {name}, got none")
    scope: dict[str, Any] = {"torch": torch, "inf": torch.inf, "OrderedDict": OrderedDict}
    # Annotations may name things that are not here.
    flags = __future__.annotations.compiler_flag
    exec(compile(ast.Module(found, []), str(script), "exec", flags=flags), scope)
    function: Callable[..., Any] = scope[name]
    return function


def _taken_out(names: set[str]) -> dict[str, ModuleType]:
    """Removes the modules below these top-level names from `sys.modules`, and returns them."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in names}


def _stand_ins() -> dict[str, ModuleType]:
    layers = ModuleType("timm.models.vision_transformer")
    vars(layers).update(PatchEmbed=PatchEmbed, Attention=Attention, Mlp=Mlp)
    inits = ModuleType("timm.models.layers")
    vars(inits).update(trunc_normal_=nn.init.trunc_normal_)
    modules = (ModuleType("timm"), ModuleType("timm.models"), layers, inits)
    return {module.__name__: module for module in modules}


class PatchEmbed(nn.Module):
    """A convolution over patches; its result is flattened to (B, N, D)."""

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True
    ) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, bias=bias)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class Attention(nn.Module):
    """Packed projection, a permutation of the heads to the front, fused attention, output projection."""

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = False, *, qk_norm: bool = False
    ) -> None:
        super().__init__()
        if qk_norm:
            raise ValueError("this stand-in for timm's attention has no qk_norm, got True")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        packed = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attn_drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, dropout_p=dropout)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).reshape(b, n, d)))


class Mlp(nn.Module):
    """Linear, activation, linear, with a dropout after each half."""

    def __init__(
        self, in_features: int, hidden_features: int, act_layer: Callable[[], nn.Module], drop: float = 0.0
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden_features, in_features)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))
