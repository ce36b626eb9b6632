"""A draw and a loss in the middle of a host's function: the function's source is edited, then compiled again.

    timesteps = sampler.sample(B)             def hosts_draw():
    timesteps = shifted(timesteps)                timesteps = sampler.sample(B)
                                      ->          timesteps = shifted(timesteps)
                                                  return timesteps
                                              timesteps = CALLS.times(hosts_draw, latents)
    loss = F.mse_loss(output, target)         loss = CALLS.squared_error(F.mse_loss, output, target)

Line numbers stay, so a traceback shows the host's own lines.
"""

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from speedit_plugins.hosts.edits.function_source import made_function, parsed_function
from speedit_plugins.hosts.edits.statement_edits import Edit, change, statements

# The name under which an edited function finds what it calls.
CALLS = "_speedit_calls"
_HOSTS_DRAW = "_speedit_hosts_draw"
_NESTING = (ast.With, ast.For, ast.While, ast.Try, ast.FunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class InlineDraw:
    """A draw of t in the middle of a function.

    It is the statements from the first that assigns the name to the last before the name is used otherwise.

    Args:
        name: of the variable that gets t.
        by: names of functions, as the host writes them. The draw has to call one of them.
        arguments: of `times` after the draw, as expressions in the host's function.
    """

    name: str
    by: tuple[str, ...]
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class InlineLoss:
    """A call of a function that makes the loss.

    Args:
        function: its name, as the host writes it, such as `F.mse_loss`.
        method: of the calls that take its place, which gets the function and then its arguments.
    """

    function: str
    method: str = "squared_error"


Place = InlineDraw | InlineLoss | Edit


def edited_function(function: Callable[..., Any], places: Sequence[Place], calls: Any) -> Callable[..., Any]:
    """A host's function with its draw and its loss edited.

    Args:
        function: of a module, or of a class as its `__dict__` has it.
        places: what to edit.
        calls: has the methods that the edited function calls.

    Raises:
        ValueError: a place is not there, or the function has no source or is defined in another function.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from speedit_plugins.hosts.edits import function_source
        >>> draw = InlineDraw("tree", ("ast.parse",))
        >>> edited_function(function_source.parsed_function, (draw,), None).__name__
        'parsed_function'
    """
    tree = parsed_function(function)
    for place in places:
        edit(tree, place, CALLS, function.__qualname__)
    return made_function(function, tree, {CALLS: calls})


def edit(function: ast.FunctionDef, place: Place, calls: str, where: str) -> None:
    """Edits one place of a function's syntax tree.

    Args:
        function: is changed.
        place: in it, or in a function in it.
        calls: the expression by which the function finds the object that it calls.
        where: the function's name, for messages.

    Raises:
        ValueError: the place is not there, or what the draw assigns besides t is used after it.
    """
    if isinstance(place, InlineDraw):
        _edit_draw(function, place, calls, where)
    elif isinstance(place, Edit):
        change(function, place, where)
    else:
        _edit_losses(function, place, calls, where)


def has(function: ast.FunctionDef, place: Place) -> bool:
    """Whether a function has a place."""
    if isinstance(place, InlineDraw):
        return next(_spans(function, place), None) is not None
    if isinstance(place, Edit):
        return statements(function, place.begins) == 1
    return any(_calls_of(function, (place.function,)))


def _edit_draw(function: ast.FunctionDef, place: InlineDraw, calls: str, where: str) -> None:
    found = next(_spans(function, place), None)
    if found is None:
        raise ValueError(
            f"{where} assigns no {place.name!r} by {' or '.join(place.by)}: this version of the host draws"
            " its timesteps in another place than the plugin knows"
        )
    body, first, last = found
    span = body[first : last + 1]
    kept = _stored(span) - {place.name}
    used = {node.id for node in _names(body[last + 1 :], ast.Load)} & kept
    if used:
        raise ValueError(f"{where} uses {', '.join(sorted(used))} of its draw later, and cannot be edited")
    draw = ast.FunctionDef(
        name=_HOSTS_DRAW,
        args=_parameters(),
        body=[*span, ast.Return(ast.Name(place.name, ast.Load()))],
        decorator_list=[],
    )
    arguments = [ast.parse(each, mode="eval").body for each in place.arguments]
    call = _call(calls, "times", [ast.Name(_HOSTS_DRAW, ast.Load()), *arguments])
    assign = ast.Assign([ast.Name(place.name, ast.Store())], call)
    for each in (draw, assign):
        ast.copy_location(each, span[0])
        ast.fix_missing_locations(each)
    body[first : last + 1] = [draw, assign]


def _edit_losses(function: ast.FunctionDef, place: InlineLoss, calls: str, where: str) -> None:
    found = [*_calls_of(function, (place.function,))]
    if not found:
        raise ValueError(
            f"{where} calls no {place.function}: this version of the host makes its loss in another place"
            " than the plugin knows"
        )
    for node in found:
        node.args.insert(0, node.func)
        node.func = _call(calls, place.method, []).func
        ast.fix_missing_locations(ast.copy_location(node.func, node))


def _spans(function: ast.AST, place: InlineDraw) -> Iterator[tuple[list[ast.stmt], int, int]]:
    """The block of each draw in a function, and the numbers of its first and last statement."""
    for body in _blocks(function):
        # A draw inside a `with`, a loop or another function is found there.
        stores = [not isinstance(each, _NESTING) and place.name in _stored([each]) for each in body]
        if not any(stores):
            continue
        first = last = stores.index(True)
        for number in range(first + 1, len(body)):
            if stores[number]:
                last = number
            elif any(node.id == place.name for node in _names([body[number]], ast.Load)):
                break
        if any(True for each in body[first : last + 1] for _ in _calls_of(each, place.by)):
            yield body, first, last


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """The lists of statements in a node, outer ones first."""
    for field in ("body", "orelse", "finalbody"):
        block = getattr(node, field, None)
        if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
            yield block
    for child in ast.iter_child_nodes(node):
        yield from _blocks(child)


def _stored(statements: Sequence[ast.stmt]) -> set[str]:
    return {node.id for node in _names(statements, ast.Store)}


def _names(statements: Sequence[ast.stmt], context: type[ast.expr_context]) -> Iterator[ast.Name]:
    for statement in statements:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, context):
                yield node


def _calls_of(node: ast.AST, functions: Sequence[str]) -> Iterator[ast.Call]:
    for each in ast.walk(node):
        if isinstance(each, ast.Call) and ast.unparse(each.func) in functions:
            yield each


def _call(owner: str, method: str, arguments: Sequence[ast.expr]) -> ast.Call:
    return ast.Call(ast.Attribute(ast.parse(owner, mode="eval").body, method, ast.Load()), [*arguments], [])


def _parameters(*names: str) -> ast.arguments:
    arguments = [ast.arg(name) for name in names]
    return ast.arguments(posonlyargs=[], args=arguments, kwonlyargs=[], kw_defaults=[], defaults=[])
