"""What the edits ask of a syntax tree."""

import ast
from collections.abc import Iterator


def called(node: ast.AST) -> str:
    """The dotted name that a node calls, "" if it is another node."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        return ast.unparse(node.func)
    return ""


def in_scope(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function or file, without those of functions and classes in it."""
    for child in ast.iter_child_nodes(scope):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child
            yield from in_scope(child)


def deferred(value: ast.expr) -> ast.Lambda:
    """`lambda: value`."""
    nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    return ast.Lambda(nothing, value)
