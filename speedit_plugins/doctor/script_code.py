"""Pieces of a script's own code that lines for it need: its scheduler, its data, the sizes of its draw."""

import ast
from collections.abc import Iterator

from speedit_plugins.doctor.places import Place, last_name, names_in
from speedit_plugins.doctor.sources import Project, Source
from speedit_plugins.hosts.edits.script_draws import schedulers_of_draws

# Names of noise, if no `randn_like` says which name it has.
_NOISE_WORDS = ("noise", "noises", "eps", "epsilon")
_ONE = ("1", "1.0")
# Functions that noise their first argument.
_NOISERS = ("add_noise", "q_sample", "scale_noise")


def compared(loss: Place) -> tuple[str, str] | None:
    """Code of what a squared error compares, None if that is not seen."""
    call: ast.AST = loss.call
    if isinstance(call, ast.Call) and loss.kind == "mse_loss" and len(call.args) >= 2:
        return ast.unparse(call.args[0]), ast.unparse(call.args[1])
    for node in ast.walk(call if loss.kind == "square" else ast.Module([], [])):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
            return ast.unparse(node.left), ast.unparse(node.right)
    return None


def has_factors(loss: Place) -> bool:
    """Whether the script multiplies or divides a squared error in the statement that makes it."""
    node = loss.source.parents[loss.call]
    while not isinstance(node, ast.stmt):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Div):
            return True
        node = loss.source.parents[node]
    return False


def scheduler_of(draw: Place) -> str:
    """Code of the noise scheduler that a `torch.randint` draws for, "" if it is not seen."""
    found = schedulers_of_draws(draw.source.tree)
    scheduler = found.get(draw.call) if isinstance(draw.call, ast.Call) else None
    return "" if scheduler is None else ast.unparse(scheduler)


def looks_up(draw: Place) -> str:
    """Code of the scheduler in whose table the drawn rows are looked up, "" if they are not.

    It is `S` in `S.timesteps[rows]` or `S.sigmas[rows]`.
    """
    for node in ast.walk(draw.scope):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute):
            is_table = node.value.attr in ("sigmas", "timesteps")
            if is_table and draw.name in names_in(node.slice):
                return ast.unparse(node.value.value)
    return ""


def size_of(draw: Place) -> str:
    """Code of the number of samples that are drawn for."""
    sizes = _sizes(draw)
    if sizes:
        return ast.unparse(sizes[0])
    size = _size(draw)
    if isinstance(size, ast.Subscript) and isinstance(size.slice, ast.Slice):
        # `x.shape[:1]` is the number of samples in a tuple.
        return ast.unparse(ast.Subscript(size.value, ast.Constant(0), ast.Load()))
    return "batch_size" if size is None else ast.unparse(size)


def num_dims_of(draw: Place) -> int:
    """The number of dimensions of what is drawn, as far as the code says it; else 1."""
    return max(1, len(_sizes(draw)))


def device_of(draw: Place) -> str:
    """Code of the device of a draw: what the draw names, else that of the data."""
    device = _named(draw).get("device")
    return f"{data_of(draw)}.device" if device is None else ast.unparse(device)


def alpha_bars_of(source: Source) -> str:
    """Name of the alpha-bars (T,) that a file makes by `cumprod`; "" if it makes none."""
    for node in source.nodes:
        if isinstance(node, ast.Assign) and "cumprod" in map(last_name, ast.walk(node.value)):
            return ast.unparse(node.targets[0])
    return ""


def data_of(draw: Place) -> str:
    """Code of what the script noises; a plain word if that is not seen."""
    for node in draw.source.nodes:
        if isinstance(node, ast.Call) and last_name(node) in _NOISERS and node.args:
            return ast.unparse(node.args[0])
    mixed = _mixture(draw.source)
    return "data" if mixed is None else mixed[0]


def counts_to_noise(draw: Place) -> bool | None:
    """Whether t = 1 is noise, told by a line `(1 - t) * x + t * noise`; None if there is no such line."""
    mixed = _mixture(draw.source)
    return None if mixed is None else mixed[1]


def is_without_gradients(draw: Place) -> bool:
    """Whether a draw is in a block of `torch.no_grad()`, or in a function that such a block calls."""
    if _is_in_no_grad(draw.source, draw.call):
        return True
    name = getattr(draw.scope, "name", "")
    calls = (node for node in draw.source.nodes if isinstance(node, ast.Call))
    return any(name == last_name(call) and _is_in_no_grad(draw.source, call) for call in calls)


def noises_by_scheduler(draw: Place) -> bool:
    """Whether the function that draws noises by a method of a scheduler or a diffusion object."""
    calls = (node for node in ast.walk(draw.scope) if isinstance(node, ast.Call))
    return any(last_name(call) in ("add_noise", "q_sample") for call in calls)


def made_in_script(project: Project, word: str) -> tuple[str, str] | None:
    """(place, name) of the assignment in the script that makes an object, told by the end of its name."""
    for node in project.script.nodes:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            name = ast.unparse(node.targets[0])
            if name.endswith(word):
                return f"{project.script.name}:{node.end_lineno}", name
    return None


def _is_in_no_grad(source: Source, node: ast.AST) -> bool:
    while node in source.parents:
        node = source.parents[node]
        if isinstance(node, ast.With) and any("no_grad" in ast.unparse(item) for item in node.items):
            return True
    return False


def _random_call(draw: Place) -> ast.Call | None:
    words = ("rand", "randint", "randn")
    calls = (node for node in ast.walk(draw.call) if isinstance(node, ast.Call) and last_name(node) in words)
    return next(calls, None)


def _named(draw: Place) -> dict[str, ast.expr]:
    call = _random_call(draw)
    return {} if call is None else {keyword.arg or "": keyword.value for keyword in call.keywords}


def _size(draw: Place) -> ast.expr | None:
    call = _random_call(draw)
    return _named(draw).get("size") or (call.args[-1] if call is not None and call.args else None)


def _sizes(draw: Place) -> list[ast.expr]:
    size = _size(draw)
    return size.elts if isinstance(size, ast.Tuple | ast.List) else []


def _mixture(source: Source) -> tuple[str, bool | None] | None:
    """The data x in `a * x + b * noise`; and whether a is 1 - t: None if neither a nor b is."""
    noise = {*_NOISE_WORDS, *_assigned_noise(source)}
    for node in source.nodes:
        if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)):
            continue
        sides = [side for side in (_factors(node.left), _factors(node.right)) if side is not None]
        noisy = [side for side in sides if names_in(side[1]) & noise]
        clean = [side for side in sides if not names_in(side[1]) & noise]
        if len(noisy) == len(clean) == 1:
            toward_noise = {(True, False): True, (False, True): False}.get((clean[0][0], noisy[0][0]))
            return ast.unparse(clean[0][1]), toward_noise
    return None


def _factors(node: ast.expr) -> tuple[bool, ast.expr] | None:
    """(True, x) for `(1 - t) * x`, (False, x) for `t * x`."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
        return None
    for one, other in ((node.left, node.right), (node.right, node.left)):
        if isinstance(one, ast.BinOp) and isinstance(one.op, ast.Sub) and ast.unparse(one.left) in _ONE:
            return True, other
    return False, node.right


def _assigned_noise(source: Source) -> Iterator[str]:
    """Names that get normal random numbers."""
    for node in source.nodes:
        if isinstance(node, ast.Assign) and last_name(node.value) in ("randn", "randn_like"):
            yield from (name for target in node.targets for name in names_in(target))
