"""A host's function with a few of its statements changed. A statement that is not there once raises."""

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speedit_plugins.hosts.edits.function_source import made_function, parsed_function

# In the text of an edit: the statement that it replaces.
HOSTS = "HOSTS_STATEMENT"


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
    own = inspect.unwrap(function)
    tree = parsed_function(own)
    for edit in edits:
        change(tree, edit, f"{own.__module__}.{own.__qualname__} of {host}")
    return made_function(own, tree, names, owner)


def has_statement(function: Callable[..., Any], begins: str) -> bool:
    """Whether a function has a statement that begins so, exactly once."""
    return statements(parsed_function(inspect.unwrap(function)), begins) == 1


def statements(tree: ast.FunctionDef, begins: str) -> int:
    """How many statements of a function begin so."""
    return len(_found(tree, begins))


def change(tree: ast.FunctionDef, edit: Edit, where: str) -> None:
    """Edits a function's syntax tree. ValueError, with `where`, if it has the statement not exactly once."""
    found = _found(tree, edit.begins)
    if len(found) != 1:
        raise ValueError(
            f"{where} has the statement {edit.begins!r} {len(found)} times, wanted once: the policy goes in"
            " there, and this version of the host is another than the one that the plugin knows"
        )
    body, place = found[0]
    statement = body[place]
    new = ast.parse(edit.becomes)
    for node in ast.walk(new):
        ast.copy_location(node, statement)
    body[place : place + 1] = _Insert(statement).visit(new).body


def _found(tree: ast.FunctionDef, begins: str) -> list[tuple[list[ast.stmt], int]]:
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
