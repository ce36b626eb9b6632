"""A host's function as a syntax tree, and the function that a changed tree makes.

The made function is one of the host's own module and file: it sees the host's names as they are when it runs,
and a traceback shows the host's own lines.
"""

import __future__

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, cast

_MAKER = "_speedit_made"


def parsed_function(function: Callable[..., Any]) -> ast.FunctionDef:
    """The syntax tree of a function, with its own line numbers.

    Defaults are left out of it, as `made_function` takes them from the function itself.

    Raises:
        ValueError: the function has no source, or uses names of a function around it.
    """
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    if set(names) - {"__class__"}:
        raise ValueError(f"{function.__qualname__} uses names of a function around it, and cannot be edited")
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError) as error:
        raise ValueError(f"{function.__qualname__} has no source that could be edited") from error
    tree = ast.parse(textwrap.dedent("".join(lines)))
    ast.increment_lineno(tree, first - 1)
    (found,) = tree.body
    assert isinstance(found, ast.FunctionDef)
    for argument in ast.walk(found.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    found.returns = None
    found.args.defaults = [ast.Constant(None) for _ in found.args.defaults]
    found.args.kw_defaults = [each and ast.Constant(None) for each in found.args.kw_defaults]
    return found


def made_function(
    function: Callable[..., Any],
    tree: ast.FunctionDef,
    names: Mapping[str, Any],
    owner: type | None = None,
) -> Callable[..., Any]:
    """The function of a changed tree, without its decorators.

    Args:
        function: the host's; names, defaults and documentation are taken from it.
        tree: what `parsed_function` returned for it, changed.
        names: what the changes name beside the host's own names.
        owner: the class whose method it is, if it calls `super()`.

    Raises:
        ValueError: it calls `super()`, and there is no owner.
    """
    if owner is None and "__class__" in function.__code__.co_freevars:
        raise ValueError(f"{function.__qualname__} calls super(), and cannot be edited without its class")
    tree.decorator_list = []
    given = {**names, "__class__": owner}
    parameters = [ast.arg(name) for name in given]
    outer = ast.FunctionDef(
        name=_MAKER,
        args=ast.arguments(posonlyargs=[], args=parameters, kwonlyargs=[], kw_defaults=[], defaults=[]),
        body=[tree, ast.Return(ast.Name(tree.name, ast.Load()))],
        decorator_list=[],
    )
    module = ast.fix_missing_locations(ast.Module([outer], []))
    own, made = cast(FunctionType, function), dict[str, Any]()
    flags = _future_flags(own.__code__.co_flags)
    code = compile(module, own.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    exec(code, own.__globals__, made)
    changed: FunctionType = made[_MAKER](**given)
    changed.__defaults__, changed.__kwdefaults__ = own.__defaults__, own.__kwdefaults__
    return functools.update_wrapper(changed, own)


def _future_flags(flags: int) -> int:
    """The flags among those of a function that `from __future__ import ...` sets."""
    known = (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
    return functools.reduce(lambda kept, flag: kept | (flags & flag), known, 0)
