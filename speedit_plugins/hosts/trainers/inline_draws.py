"""Hosts that draw their t, and take one squared error of the batch, in the middle of their own functions.

The functions are edited (`function_edits`): when a module is imported, or when a script is parsed. The
host still reduces the loss itself. Its prediction and its target are made so that their squared error is
weighed (`SeparateDraws.weighed_error`).

Dims: B batch.
"""

import ast
import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.edits.function_edits import (
    InlineDraw,
    InlineLoss,
    Place,
    edit,
    edited_function,
    has,
)
from speedit_plugins.hosts.flow import HostsTime
from speedit_plugins.hosts.separate_draws import SeparateDraws
from speedit_plugins.hosts.trainers.replaced import exchange

# The name under which an edited script finds the `InlineCalls` of each host.
INLINE_CALLS = "_speedit_inline_calls"


@dataclass(frozen=True)
class InlineHost:
    """A host whose functions are edited.

    Args:
        hosts: its name, for messages.
        places: of each function, by its name in the module or script, `Class.method` for a method.
        draws_without_gradients: whether the host draws the t that it trains at under `torch.no_grad()`.
    """

    hosts: str
    places: dict[str, tuple[Place, ...]]
    draws_without_gradients: bool = False


TORCHTITAN = InlineHost(
    "torchtitan Flux",
    {
        "FluxTrainer.forward_backward_step": (
            InlineDraw("timesteps", ("torch.rand",), ("labels",)),
            InlineLoss("self.loss_fn"),
        )
    },
    draws_without_gradients=True,
)
# Scripts, which define these functions themselves.
SCRIPTS = (
    InlineHost(
        "HunyuanVideo-1.5",
        {
            "HunyuanVideoTrainer.prepare_batch": (
                InlineDraw(
                    "timesteps",
                    ("self.timestep_sampler.sample",),
                    ("latents", "self.config.num_train_timesteps", "self.config.train_timestep_shift"),
                ),
            ),
            "HunyuanVideoTrainer.train_step": (InlineLoss("nn.functional.mse_loss"),),
        },
    ),
    InlineHost(
        "Mochi",
        {"main": (InlineDraw("sigma", ("torch.rand",), ("z",)), InlineLoss("F.mse_loss"))},
        draws_without_gradients=True,
    ),
)


class InlineCalls:
    """What the edited functions of a host call.

    Args:
        host: whose functions they are.
        draws_of: makes the `SeparateDraws`, with its options; called at the first draw.
    """

    def __init__(self, host: InlineHost, draws_of: Callable[..., SeparateDraws]) -> None:
        self._host = host
        self._draws_of = draws_of

    @cached_property
    def draws(self) -> SeparateDraws:
        """What draws and weighs."""
        return self._draws_of()

    def times(
        self, hosts_draw: Callable[[], Tensor], data: Tensor, scale: float = 1, shift: float = 1
    ) -> Tensor:
        """The t (B,) in place of `hosts_draw()`; see `SeparateDraws.times`.

        Args:
            hosts_draw: returns the host's t, in [0, scale], 0 is clean.
            data: (B, ...) of the batch.
            scale: of the host's time.
            shift: that the host's draws have had; 1 is none.
        """
        clock = HostsTime(
            lambda t: t.float() / scale, lambda draw, t: (draw.time * scale).to(t), lambda: float(shift)
        )
        with torch.enable_grad() if self._host.draws_without_gradients else nullcontext():
            return self.draws.times(hosts_draw, data, clock)

    def squared_error(
        self,
        function: Callable[..., Any],
        prediction: Tensor,
        target: Tensor,
        *others: Any,
        **options: Any,
    ) -> Any:
        """What `function(prediction, target, ...)` returns, the mean or sum of a squared error, weighed."""
        return function(*self.draws.weighed_error(prediction, target), *others, **options)


def adapt_torchtitan(module: ModuleType, draws_of: Callable[..., SeparateDraws]) -> None:
    """Puts a policy into `torchtitan.models.flux.trainer`; see `adapt`."""
    adapt(module, draws_of, TORCHTITAN)


def adapt(module: Any, draws_of: Callable[..., SeparateDraws], host: InlineHost) -> None:
    """Puts a policy into the functions of a host's module.

    Args:
        module: of the host.
        draws_of: makes the `SeparateDraws`.
        host: whose module it is.

    Raises:
        ValueError: a function or a place in it is not there, or it has a policy already.
    """
    calls = InlineCalls(host, draws_of)

    def editing(places: tuple[Place, ...]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return lambda own: edited_function(own, places, calls)

    for name, places in host.places.items():
        owner_name, _, function = name.rpartition(".")
        owner = getattr(module, owner_name, None) if owner_name else module
        if owner is None:
            raise ValueError(f"{module.__name__} has no {owner_name} ({host.hosts})")
        exchange(owner, function, editing(places))


def edited_script(tree: ast.Module) -> ast.Module | None:
    """A copy of a known script's tree, with its draw and its loss edited. None if it is not one of `SCRIPTS`.

    It finds the `InlineCalls` of each host, by the host's name, in a global `INLINE_CALLS`.
    """
    for host in SCRIPTS:
        functions = {name: _function(tree, name) for name in host.places}
        if all(
            function is not None and all(has(function, place) for place in host.places[name])
            for name, function in functions.items()
        ):
            changed = copy.deepcopy(tree)
            for name, places in host.places.items():
                function = _function(changed, name)
                assert function is not None
                for place in places:
                    edit(function, place, f"{INLINE_CALLS}[{host.hosts!r}]", name)
            return changed
    return None


def _function(tree: ast.Module, name: str) -> ast.FunctionDef | None:
    """The function `name` or `Class.name` of a script."""
    owner, _, function = name.rpartition(".")
    found: list[ast.Module | ast.ClassDef] = [tree]
    if owner:
        found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner]
    nodes = (node for each in found for node in each.body)
    return next((node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == function), None)
