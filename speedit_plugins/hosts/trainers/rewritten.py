"""A host's function with a few of its statements changed, for hosts that draw in the midst of one.

The function is read from its file, changed as a tree, and made again in its module: its lines keep their
numbers, and what is not changed is the host's. A statement that is not there once raises.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

# In the text of an edit: the statement that it replaces.
HOSTS = "HOSTS_STATEMENT"
_FUTURE_ANNOTATIONS = 0x1000000


@dataclass(frozen=True)
class Edit:
    """One statement of a function, and what takes its place.

    Args:
        begins: the beginning of the statement, as `ast.unparse` writes it.
        becomes: statements; `HOSTS_STATEMENT` among them is the host's own.
    """

    begins: str
    becomes: str


def rewritten(
    function: Callable[..., Any],
    edits: Sequence[Edit],
    names: Mapping[str, Any],
    *,
    host: str,
    owner: type | None = None,
) -> Callable[..., Any]:
    """The function with its statements changed.

    Args:
        function: of a module or a class, in a file; not made inside of another function.
        edits: each of a statement that the function has once.
        names: what the edits name beside the host's own variables.
        host: for messages.
        owner: the class that the function is a method of, for its `super()`.

    Raises:
        ValueError: the function has no source, is made inside of another, or has a statement not once.

    Example:
        >>> import textwrap  # the host
        >>> loud = Edit("w =", "text = text.upper()\\nHOSTS_STATEMENT")
        >>> rewritten(textwrap.shorten, [loud], {}, host="textwrap")("a b", 10)
        'A B'
    """
    own = cast(FunctionType, inspect.unwrap(function))
    where = f"{own.__module__}.{own.__qualname__}"
    cells = set(own.__code__.co_freevars)
    if cells - {"__class__"}:
        raise ValueError(f"{where} of {host} is made inside of another function, and cannot be changed")
    try:
        lines, first = inspect.getsourcelines(own)
    except OSError as error:
        raise ValueError(f"{where} of {host} has no source to change: {error}") from error
    tree = ast.parse(textwrap.dedent("".join(lines)))
    ast.increment_lineno(tree, first - 1)
    for edit in edits:
        _apply(tree, edit, f"{where} of {host}")
    given = {**names, **({"__class__": owner} if cells else {})}
    maker = ast.parse(f"def make({', '.join(given)}):\n    pass").body[0]
    assert isinstance(maker, ast.FunctionDef)
    maker.body = [*tree.body, ast.Return(ast.Name(own.__name__, ast.Load()))]
    module = ast.fix_missing_locations(ast.Module([maker], []))
    flags = own.__code__.co_flags & _FUTURE_ANNOTATIONS
    made: dict[str, Any] = {}
    exec(compile(module, own.__code__.co_filename, "exec", flags, dont_inherit=True), own.__globals__, made)
    changed: Callable[..., Any] = made["make"](**given)
    return changed


def has_statement(function: Callable[..., Any], begins: str) -> bool:
    """Whether a function has a statement that begins so, exactly once."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    return len(_found(tree, begins)) == 1


def _apply(tree: ast.Module, edit: Edit, where: str) -> None:
    found = _found(tree, edit.begins)
    if len(found) != 1:
        raise ValueError(
            f"{where} has the statement {edit.begins!r} {len(found)} times, wanted once: the policy goes in"
            " there; another version?"
        )
    body, place = found[0]
    statement = body[place]
    new = ast.parse(edit.becomes)
    for node in ast.walk(new):
        ast.copy_location(node, statement)
    body[place : place + 1] = _Insert(statement).visit(new).body


def _found(tree: ast.Module, begins: str) -> list[tuple[list[ast.stmt], int]]:
    bodies = (
        body
        for node in ast.walk(tree)
        for field in ("body", "orelse", "finalbody")
        if isinstance(body := getattr(node, field, None), list)
    )
    return [
        (body, place)
        for body in bodies
        for place, statement in enumerate(body)
        if ast.unparse(statement).startswith(begins)
    ]


class _Insert(ast.NodeTransformer):
    """Puts a statement in place of its name."""

    def __init__(self, statement: ast.stmt) -> None:
        self._statement = statement

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        is_place = isinstance(node.value, ast.Name) and node.value.id == HOSTS
        return self._statement if is_place else node
