"""The edits of seam E, made in a parsed script or module: see `sigma_calls` for what the calls become.

Only five places change, in the functions of a file that calls `compute_density_for_timestep_sampling`: that
call, the rows by which timesteps are looked up with what it drew, the data of an interpolation
(1 - sigma) a + sigma b, `compute_loss_weighting_for_sd3`, and the squared error that its result multiplies.
Line numbers stay.
"""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from speedit_plugins.hosts.edits.syntax import called, deferred, in_scope

# The name under which an edited file finds its `SigmaCalls`.
SIGMA_CALLS = "_speedit_sigma_calls"
DENSITY, WEIGHTING = "compute_density_for_timestep_sampling", "compute_loss_weighting_for_sd3"


@dataclass
class SigmaSites:
    """Line numbers of what was found in a file.

    Args:
        draws: calls of the density that look up rows of a scheduler.
        other_draws: calls of it whose u is used for something else, and stays as it is.
        weights: calls of the weighting.
        data: interpolations of data and noise.
        errors: squared errors that weights multiply.
    """

    draws: list[int] = field(default_factory=list)
    other_draws: list[int] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    data: list[int] = field(default_factory=list)
    errors: list[int] = field(default_factory=list)


def edited_sigmas(tree: ast.Module) -> tuple[ast.Module, SigmaSites]:
    """A file whose draws of u and weights of sigma go through `SigmaCalls`, and their line numbers.

    Args:
        tree: of the file; it is not changed. It comes back if no draw can be replaced.
    """
    sites = SigmaSites()
    copied = copy.deepcopy(tree)
    lookups = _lookups(copied, sites)
    if not lookups:
        return tree, sites
    weighed = {name for scope in _scopes(copied) for name in _names_of(scope, WEIGHTING)}
    editor = _Editor(lookups, weighed, sites)
    changed = editor.visit(copied)
    flags = {
        "is_reversed": editor.is_reversed,
        "has_weighting": bool(sites.weights),
        "has_error": bool(sites.errors),
    }
    for call in editor.densities:
        call.keywords += [ast.keyword(name, ast.Constant(value)) for name, value in flags.items()]
    return ast.fix_missing_locations(changed), sites


@dataclass
class _Lookup:
    """A draw of u or of rows, and the subscripts `scheduler.timesteps[rows]` that look it up."""

    scheduler: ast.expr
    subscripts: list[ast.Subscript]
    # Tells whether the model's output is turned into data before its error is taken; None if it never is.
    preconditions: ast.expr | None
    # Whether the scheduler's table is set between the draw and the lookup.
    waits: bool
    method: str = "density"


def _lookups(tree: ast.Module, sites: SigmaSites) -> dict[ast.Call, _Lookup]:
    found: dict[ast.Call, _Lookup] = {}
    for scope in _scopes(tree):
        for draw, name in _calls_with_names(scope, DENSITY):
            rows = {name, *_assigned_from(scope, name)}
            subscripts = [
                node
                for node in in_scope(scope)
                if isinstance(node, ast.Subscript)
                and isinstance(node.value, ast.Attribute)
                and node.value.attr in ("timesteps", "sigmas")
                and rows & _names_in(node.slice)
            ]
            schedulers = {ast.unparse(each.value.value) for each in subscripts}  # type: ignore[attr-defined]  # as above
            if len(schedulers) == 1:
                scheduler: Any = subscripts[0].value
                option = _option(scope, "precondition_outputs")
                waits = _sets_table(scope, schedulers.pop(), draw.lineno, subscripts[0].lineno)
                found[draw] = _Lookup(scheduler.value, subscripts, option, waits)
                looked_up = rows & {each for node in subscripts for each in _names_in(node.slice)}
                others = _other_draws(scope, looked_up - {name})
                found |= {other: _Lookup(scheduler.value, [], option, waits, "rows") for other in others}
            else:
                sites.other_draws.append(draw.lineno)
    return found


def _sets_table(scope: ast.AST, scheduler: str, after: int, before: int) -> bool:
    """Whether the scheduler's `set_timesteps` is called between two lines, as for a shift by resolution."""
    calls = (node for node in in_scope(scope) if isinstance(node, ast.Call))
    return any(
        called(node) == f"{scheduler}.set_timesteps" and after < node.lineno <= before for node in calls
    )


def _other_draws(scope: ast.AST, rows: set[str]) -> Iterator[ast.Call]:
    """Calls that draw the rows without u in another branch, as VideoX-Fun does with uniform_sampling."""
    for node in in_scope(scope):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            (target, *_) = node.targets
            is_rows = isinstance(target, ast.Name) and target.id in rows
            if is_rows and not rows & _names_in(node.value) and not _is_cast(node.value):
                yield node.value


def _is_cast(node: ast.Call) -> bool:
    """Whether a call is `(...).long()`: an expression of u."""
    return isinstance(node.func, ast.Attribute) and node.func.attr == "long"


class _Editor(ast.NodeTransformer):
    def __init__(self, lookups: dict[ast.Call, _Lookup], weighed: set[str], sites: SigmaSites) -> None:
        self._lookups, self._weighed, self._sites = lookups, weighed, sites
        self._subscripts = {each for lookup in lookups.values() for each in lookup.subscripts}
        self.densities: list[ast.Call] = []
        self.is_reversed = False

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Replaces the draw and the weighting."""
        lookup = self._lookups.get(node)
        self.generic_visit(node)
        if lookup is not None:
            self._sites.draws.append(node.lineno)
            call = _call(lookup.method, deferred(node), deferred(copy.deepcopy(lookup.scheduler)))
            if lookup.preconditions is not None:
                option = deferred(copy.deepcopy(lookup.preconditions))
                call.keywords.append(ast.keyword("preconditions", option))
            if lookup.method == "rows":
                call.keywords.append(ast.keyword("by", deferred(copy.deepcopy(node.func))))
            if lookup.waits:
                call.keywords.append(ast.keyword("waits", ast.Constant(True)))
            self.densities.append(call)
            return ast.copy_location(call, node)
        if called(node) in ("Accelerator", "accelerate.Accelerator"):
            return ast.copy_location(_call("accelerator", node), node)
        if _ends_with(node, WEIGHTING):
            self._sites.weights.append(node.lineno)
            call = _call("weighting", node.func, *node.args)
            call.keywords = node.keywords
            return ast.copy_location(call, node)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        """Checks the rows of a lookup."""
        self.generic_visit(node)
        if node in self._subscripts:
            node.slice = ast.copy_location(_call("checked", node.slice), node.slice)
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """Shows the data of an interpolation, and the squared error beside a name that has weights."""
        terms = _interpolated(node)
        if terms is not None:
            clean, noised = terms
            if _is_noise(clean.right) != _is_noise(noised.right):
                self.is_reversed = _is_noise(clean.right)
                of_data = noised if self.is_reversed else clean
                self._sites.data.append(node.lineno)
                of_data.right = ast.copy_location(_call("data", of_data.right), of_data.right)
        elif (
            isinstance(node.op, ast.Mult) and self._weighed & _names_in(node.left) and _is_square(node.right)
        ):
            self._sites.errors.append(node.lineno)
            call = _call("error", node.right, copy.deepcopy(node.left))
            node.right = ast.copy_location(call, node.right)
        self.generic_visit(node)
        return node


def _interpolated(node: ast.BinOp) -> tuple[ast.BinOp, ast.BinOp] | None:
    """The products (1 - s) * a and s * b of a sum of the two, in this order; the factor comes first."""
    if not isinstance(node.op, ast.Add):
        return None
    products = [each for each in (node.left, node.right) if isinstance(each, ast.BinOp)]
    if len(products) != 2 or not all(isinstance(each.op, ast.Mult) for each in products):
        return None
    for clean, noised in (products, products[::-1]):
        rest, sigma = clean.left, noised.left
        if (
            isinstance(rest, ast.BinOp)
            and isinstance(rest.op, ast.Sub)
            and isinstance(rest.left, ast.Constant)
            and rest.left.value == 1
            and ast.unparse(rest.right) == ast.unparse(sigma)
        ):
            return clean, noised
    return None


def _is_noise(node: ast.expr) -> bool:
    return any("noise" in name for name in _names_in(node))


def _is_square(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Pow)
        and isinstance(node.right, ast.Constant)
        and node.right.value == 2
    )


def _scopes(tree: ast.Module) -> Iterator[ast.AST]:
    yield tree
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _calls_with_names(scope: ast.AST, function: str) -> Iterator[tuple[ast.Call, str]]:
    """Calls of a function, and the name that each is assigned to; "" if there is none."""
    calls = {node for node in in_scope(scope) if isinstance(node, ast.Call) and _ends_with(node, function)}
    for node in in_scope(scope):
        if isinstance(node, ast.Assign) and node.value in calls and isinstance(node.targets[0], ast.Name):
            calls.discard(node.value)
            yield node.value, node.targets[0].id
    yield from ((call, "") for call in calls)


def _names_of(scope: ast.AST, function: str) -> set[str]:
    return {name for _, name in _calls_with_names(scope, function) if name}


def _assigned_from(scope: ast.AST, name: str) -> set[str]:
    """The names that are assigned an expression of another name."""
    return {
        target.id
        for node in in_scope(scope)
        if isinstance(node, ast.Assign) and name in _names_in(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _option(scope: ast.AST, name: str) -> ast.expr | None:
    """The option `args.NAME` that a function asks for, if it does."""
    options = (node for node in in_scope(scope) if isinstance(node, ast.Attribute) and node.attr == name)
    return next(options, None)


def _names_in(node: ast.AST) -> set[str]:
    """The names and attributes in an expression."""
    names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    return names | {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}


def _ends_with(node: ast.Call, function: str) -> bool:
    return (called(node) or "").rpartition(".")[2] == function


def _call(method: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Attribute(ast.Name(SIGMA_CALLS, ast.Load()), method, ast.Load()), [*arguments], [])
