"""Which noise scheduler a script's `torch.randint` draws timesteps for, told by the script's text.

    timesteps = torch.randint(0, S.config.num_train_timesteps, (bsz,))  # for S
    timesteps = torch.randint(0, 1000, (bsz,)).long()  # also for S, if S.add_noise(..., timesteps) follows

The second form counts if only one scheduler noises at that name, and nothing else is assigned to it.
"""

import ast
from collections.abc import Iterator, Mapping

from speedit_plugins.hosts.edits.syntax import called

_NUM_TIMESTEPS = "num_train_timesteps"
# Methods of a tensor that keep its values.
_KEEPING = ("clone", "cpu", "cuda", "detach", "long", "to")
_Parents = Mapping[ast.AST, ast.AST]


def schedulers_of_draws(tree: ast.Module) -> dict[ast.Call, ast.expr | None]:
    """Each call of `torch.randint` in a script, with the noise scheduler that it draws for; None if unknown.

    Args:
        tree: of the script. The calls and schedulers are nodes of it.
    """
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_draw(node)]
    return {call: _named_scheduler(call) or _noising_scheduler(call, parents) for call in calls}


def _is_draw(node: ast.AST) -> bool:
    return called(node) == "torch.randint"


def _named_scheduler(draw: ast.Call) -> ast.expr | None:
    """`S` in `torch.randint(0, S.config.num_train_timesteps, ...)`, also without `config` or with `high=`."""
    named = {keyword.arg: keyword.value for keyword in draw.keywords}
    bounds = draw.args if "size" in named else draw.args[:-1]
    high = named.get("high", bounds[-1] if bounds else None)
    if not (isinstance(high, ast.Attribute) and high.attr == _NUM_TIMESTEPS):
        return None
    owner = high.value
    return owner.value if isinstance(owner, ast.Attribute) and owner.attr == "config" else owner


def _noising_scheduler(draw: ast.Call, parents: _Parents) -> ast.expr | None:
    """The only `S` whose `S.add_noise` gets the name of this draw, in the same function."""
    name, scope = _drawn_name(draw, parents), _scope(draw, parents)
    if name is None or not all(_keeps(node, name) for node in _assignments(scope, name, parents)):
        return None
    found = {ast.unparse(scheduler): scheduler for scheduler in _noising(scope, name)}
    if len(found) != 1:
        return None
    (scheduler,) = found.values()
    root = scheduler
    while isinstance(root, ast.Attribute):
        root = root.value
    if not isinstance(root, ast.Name):
        return None
    # At the draw the name must already be the scheduler's.
    later = [node for node in _stores(scope, root.id) if node.lineno > draw.lineno]
    return None if later else scheduler


def _drawn_name(draw: ast.Call, parents: _Parents) -> str | None:
    """`t` in `t = torch.randint(...).long()`."""
    node: ast.AST = draw
    while isinstance(parents[node], ast.Attribute | ast.Call):
        node = parents[node]
    assignment = parents[node]
    if not isinstance(assignment, ast.Assign | ast.AnnAssign) or _source(assignment.value) is not draw:
        return None
    targets = assignment.targets if isinstance(assignment, ast.Assign) else [assignment.target]
    only = targets[0]
    return only.id if len(targets) == 1 and isinstance(only, ast.Name) else None


def _source(value: ast.expr | None) -> ast.expr | None:
    """`x` in `x.long().to(device)`."""
    while (
        isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in _KEEPING
    ):
        value = value.func.value
    return value


def _scope(node: ast.AST, parents: _Parents) -> ast.AST:
    """The function around a node, or the module."""
    while node in parents and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        node = parents[node]
    return node


def _stores(scope: ast.AST, name: str) -> list[ast.Name]:
    nodes = [node for node in ast.walk(scope) if isinstance(node, ast.Name) and node.id == name]
    return [node for node in nodes if not isinstance(node.ctx, ast.Load)]


def _assignments(scope: ast.AST, name: str, parents: _Parents) -> Iterator[ast.AST]:
    yield from (parents[node] for node in _stores(scope, name))


def _keeps(assignment: ast.AST, name: str) -> bool:
    """Whether an assignment draws a name, or keeps its values."""
    if not isinstance(assignment, ast.Assign | ast.AnnAssign):
        return False
    source = _source(assignment.value)
    return (source is not None and _is_draw(source)) or (isinstance(source, ast.Name) and source.id == name)


def _noising(scope: ast.AST, name: str) -> Iterator[ast.expr]:
    """Each `S` of `S.add_noise(samples, noise, name)`."""
    for node in ast.walk(scope):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            named = [keyword.value for keyword in node.keywords if keyword.arg == "timesteps"]
            given = _source(next(iter([*node.args[2:3], *named]), None))
            if node.func.attr == "add_noise" and isinstance(given, ast.Name) and given.id == name:
                yield node.func.value
