"""The two edits of seam D, made in a parsed script: where it draws timesteps, and where it makes its loss.

Only calls in the script itself change: `torch.randint` that draws for a noise scheduler (`script_draws`),
`mse_loss`, and the `compute_snr` of Min-SNR weights. Line numbers stay.

Dims: B batch.
"""

import ast
import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from speedit_plugins.hosts.edits.script_draws import schedulers_of_draws
from speedit_plugins.hosts.edits.syntax import called, deferred, in_scope
from speedit_plugins.hosts.script import ScriptPolicy, check_scheduler
from speedit_plugins.hosts.states.state_file import StateFile, keep_in_checkpoints

# The name under which the edited script finds its `ScriptCalls`.
CALLS = "_speedit_calls"


@dataclass
class Sites:
    """Line numbers of the calls in a script.

    Args:
        draws: of timesteps, for a noise scheduler.
        losses: squared errors.
        other_draws: of integers; what for is not known.
    """

    draws: list[int] = field(default_factory=list)
    losses: list[int] = field(default_factory=list)
    other_draws: list[int] = field(default_factory=list)

    @property
    def are_a_seam(self) -> bool:
        """Whether the script has both."""
        return bool(self.draws and self.losses)

    def shortfall(self) -> str:
        """For a message: which draws are there, and what they lack to be a seam. "" if there are none."""
        if self.draws:
            return (
                f"it draws timesteps (line {_listed(self.draws)}) and makes no F.mse_loss to weigh, see"
                " integrations/diffusers for the edit by hand; "
            )
        if self.other_draws:
            return (
                f"its torch.randint (line {_listed(self.other_draws)}) is not edited: it needs a name that"
                " one noise scheduler's add_noise gets unchanged in the same function; "
            )
        return ""


def edited(tree: ast.Module) -> tuple[ast.Module, Sites]:
    """A script whose draws and losses go through `ScriptCalls`, and their line numbers.

    Args:
        tree: of the script; it is not changed. It comes back if the script lacks one of the two.
    """
    copied = copy.deepcopy(tree)
    editor = _Editor(copied)
    changed = ast.fix_missing_locations(editor.visit(copied))
    return (changed if editor.sites.are_a_seam else tree), editor.sites


class ScriptCalls:
    """What the edited script calls, with the script's own arguments. A `ScriptPolicy` draws and weighs.

    Args:
        seam: draws and weighs.
        state: the file that keeps the policy's state; None leaves that to checkpoints of accelerate.
    """

    def __init__(self, seam: ScriptPolicy, state: StateFile | None = None) -> None:
        self._seam = seam
        self._state = state

    def randint(
        self,
        noise_scheduler: Any,
        *drawn: Any,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        **others: Any,
    ) -> Tensor:
        """Timesteps (B,) in place of `torch.randint(*drawn, device=device, generator=generator, **others)`.

        The seed of the script's generator is that of the policy's draws. Without gradients the timesteps are
        those of that call.

        Raises:
            ValueError: the script draws from part of the timesteps, in another shape, or with other options.
        """
        if not torch.is_grad_enabled():
            self._seam.drawn_by_script()
            own: Tensor = torch.randint(*drawn, device=device, generator=generator, **others)
            return own
        check_scheduler(noise_scheduler)
        low, high, size = _bounds_and_size(drawn, others)
        unknown = {name: value for name, value in others.items() if (name, value) != ("dtype", torch.int64)}
        if unknown:
            raise ValueError(
                f"the script draws its timesteps with {sorted(unknown)}, which the policy cannot use"
            )
        num_timesteps = len(noise_scheduler.alphas_cumprod)
        if low != 0 or high != num_timesteps or len(size) != 1:
            raise ValueError(
                f"the script draws from [{low}, {high}) in shape {tuple(size)}, wanted all {num_timesteps}"
                " timesteps in shape (B,)"
            )
        if self._state is not None:
            self._state.add(self._seam)
        return self._seam.timesteps(noise_scheduler, size[0], device or "cpu", generator=generator)

    def refused_index(self, noise_scheduler: Any, *drawn: Any, **options: Any) -> Tensor:
        """Raises ValueError: an EDM-style script looks up a sigma by this draw, so it is no timestep.

        Without gradients it is the script's own `torch.randint(*drawn, **options)`.
        """
        if not torch.is_grad_enabled():
            own: Tensor = torch.randint(*drawn, **options)
            return own
        raise ValueError(
            f"the script draws an index into the sigmas of {type(noise_scheduler).__name__} (EDM style), not"
            " a timestep of its schedule: leave out --do_edm_style_training"
        )

    def accelerator(self, made: Any) -> Any:
        """The script's accelerator. Its checkpoints keep the policy's state too, unless a file does."""
        if self._state is None:
            keep_in_checkpoints(made, self._seam)
        return made

    def mse_loss(
        self,
        prediction: Tensor,
        target: Tensor,
        reduction: Any = "mean",
        *,
        drawn: Callable[[], Any] | None = None,
        **others: Any,
    ) -> Tensor:
        """The script's squared error, weighed. Without gradients it is as the script has it.

        Args:
            prediction, target, reduction, others: of the script.
            drawn: returns the value of the name to which the script assigned its draw, as it is now.
        """
        if not torch.is_grad_enabled():
            return functional.mse_loss(prediction, target, reduction=reduction, **others)
        if others:
            raise ValueError(f"mse_loss with {sorted(others)} is not known here")
        timesteps = None
        # The script may have changed them for its model since, or draw in another branch.
        with suppress(NameError):
            timesteps = None if drawn is None else drawn()
        timesteps = timesteps if self._seam.has_drawn(timesteps) else None
        return self._seam.mse_loss(prediction, target, reduction, timesteps=timesteps)

    def scaled_mse_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """`mse_loss`, for a squared error that the script multiplies by weights of its own.

        Raises:
            ValueError: the policy has weights too.
        """
        self._seam.refuse_weights(
            "the script multiplies its squared error by weights", "let it predict the noise"
        )
        return self.mse_loss(*args, **kwargs)

    def compute_snr(self, own: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The script's signal-to-noise ratios, of which it makes Min-SNR weights.

        Raises:
            ValueError: the policy has weights too.
        """
        timesteps = kwargs.get("timesteps", args[1] if len(args) > 1 else None)
        self._seam.refuse_weights("the script weighs its loss by Min-SNR", "drop --snr_gamma", timesteps)
        return own(*args, **kwargs)


class _Editor(ast.NodeTransformer):
    def __init__(self, tree: ast.Module) -> None:
        self.sites = Sites()
        self._schedulers = schedulers_of_draws(tree)
        # A drawn number is an index if the script looks up sigmas, or the scheduler's timesteps, by it.
        self._index_names = {
            name.id
            for node in ast.walk(tree)
            if _is_lookup(node)
            for name in ast.walk(node)
            if isinstance(name, ast.Name)
        }
        self._is_index = False
        self._is_scaled = False
        # The name of the draws in the function that is visited, or in one around it; None if there are more.
        self._drawn_name = self._name_of_draws(tree)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Looks for the name of the draws in a function. Without a draw it is that of the code around."""
        before, names = self._drawn_name, self._names_of_draws(node)
        if names:
            self._drawn_name = self._name_of_draws(node)
        node = self._visited(node)
        self._drawn_name = before
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        """Notes whether a draw in this assignment gets the name of an index."""
        return self._assigned(node, node.targets)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """The same with an annotation."""
        return self._assigned(node, [node.target])

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """Notes that a squared error in this expression is multiplied."""
        before, self._is_scaled = self._is_scaled, isinstance(node.op, ast.Mult)
        node = self._visited(node)
        self._is_scaled = before
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Replaces a draw, a squared error or an SNR. Every other call stays."""
        is_scaled = self._is_scaled and _is_per_element(node)
        scheduler = self._schedulers.get(node)
        is_draw = node in self._schedulers
        node = self._visited(node)
        if is_draw:
            return self._drawn(node, scheduler)
        name = called(node)
        if name in ("F.mse_loss", "torch.nn.functional.mse_loss", "nn.functional.mse_loss"):
            self.sites.losses.append(node.lineno)
            if self._drawn_name is not None:
                value = ast.Name(self._drawn_name, ast.Load())
                node.keywords.append(ast.keyword("drawn", deferred(value)))
            return _call(node, "scaled_mse_loss" if is_scaled else "mse_loss")
        if name in ("Accelerator", "accelerate.Accelerator"):
            return ast.copy_location(_bare_call("accelerator", [node], []), node)
        if name == "compute_snr":
            return _call(node, "compute_snr", node.func)
        return node

    def _drawn(self, node: ast.Call, scheduler: ast.expr | None) -> ast.Call:
        if scheduler is None:
            self.sites.other_draws.append(node.lineno)
            return node
        self.sites.draws.append(node.lineno)
        return _call(node, "refused_index" if self._is_index else "randint", copy.deepcopy(scheduler))

    def _assigned(self, node: Any, targets: list[ast.expr]) -> ast.AST:
        names = {target.id for target in targets if isinstance(target, ast.Name)}
        self._is_index = bool(names & self._index_names)
        node = self._visited(node)
        self._is_index = False
        return cast(ast.AST, node)

    def _name_of_draws(self, scope: ast.AST) -> str | None:
        names = self._names_of_draws(scope)
        return next(iter(names)) if len(names) == 1 else None

    def _names_of_draws(self, scope: ast.AST) -> set[str | None]:
        """The names that draws get in a function or script, without those of functions in it."""
        names: set[str | None] = set()
        for node in in_scope(scope):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                calls = (each for each in ast.walk(node.value) if isinstance(each, ast.Call))
                if any(self._schedulers.get(each) for each in calls):
                    names |= {each.id if isinstance(each, ast.Name) else None for each in targets}
        return names

    def _visited(self, node: Any) -> Any:
        self.generic_visit(node)
        return node


def _is_per_element(node: ast.Call) -> bool:
    """Whether a squared error is not reduced. Then a factor can be weights."""
    reductions = [keyword.value for keyword in node.keywords if keyword.arg == "reduction"]
    return any(isinstance(value, ast.Constant) and value.value == "none" for value in reductions)


def _is_lookup(node: ast.AST) -> bool:
    """Whether a node is `X.timesteps[...]` or `X.sigmas[...]`."""
    return (
        isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr in ("timesteps", "sigmas")
    )


def _listed(lines: list[int]) -> str:
    return ", ".join(map(str, lines))


def _bounds_and_size(drawn: tuple[Any, ...], named: dict[str, Any]) -> tuple[int, int, Any]:
    """`low`, `high` and `size` of a call of `torch.randint`, whose `low` may be left out.

    Args:
        drawn: its arguments by position.
        named: its arguments by name. Those three are taken out.
    """
    bounds = list(drawn)
    size = named.pop("size") if "size" in named else bounds.pop()
    high = named.pop("high") if "high" in named else bounds.pop()
    low = named.pop("low", 0) if not bounds else bounds.pop()
    return low, high, size


def _call(node: ast.Call, method: str, *first: ast.expr) -> ast.Call:
    return ast.copy_location(_bare_call(method, [*first, *node.args], node.keywords), node)


def _bare_call(method: str, arguments: list[ast.expr], keywords: list[ast.keyword]) -> ast.Call:
    function = ast.Attribute(ast.Name(CALLS, ast.Load()), method, ast.Load())
    return ast.Call(function, arguments, keywords)
