"""Where a file draws timesteps and makes its loss, told by its text."""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from speedit_plugins.doctor.sources import Source
from speedit_plugins.hosts.edits.sigma_edits import DENSITY, WEIGHTING
from speedit_plugins.hosts.edits.syntax import in_scope

# How a draw is made. "call" is a call of a function in DRAWING, "sampler" one of a schedule sampler.
DrawKind = Literal["index", "uniform", "logit_normal", "log_normal", "call", "sampler"]

# What the field calls a timestep, or a noise level.
_TIME = re.compile(r"t|ts|tt|u|times?|(\w*_)?time_?(steps?|inputs?)(_?\w*)|sigmas?|t_?steps?|noise_levels?")
# Names of rows in a table. They may be rows of anything, so the code around has to speak of timesteps.
_ROW = re.compile(r"ind(ex|ices)?|idx|step_ids?")
_TIME_FUNCTION = re.compile(r"time_?step|sigma|(^|_)t(_|$)|draw_time", re.IGNORECASE)
_LOSS = re.compile(r"loss|mse|(^|_)err(or)?s?($|_)", re.IGNORECASE)
_PREDICTED = re.compile(r"pred|target|output|noise|(^|_)eps|velocity|(^|_)[uv]t?(_|$)", re.IGNORECASE)

_TORCH = ("torch", "th")
_DIRECT = {"randint": "index", "rand": "uniform", "rand_like": "uniform"}
_NORMAL = ("randn", "randn_like", "normal")
_SQUASHED: dict[str, DrawKind] = {"sigmoid": "logit_normal", "exp": "log_normal"}
# Functions of hosts that draw. To add one, write its name here.
DRAWING = (
    DENSITY,
    "get_noise_noisy_latents_and_timesteps",
    "get_noisy_model_input_and_timesteps",
    "sample_flow_sigmas",
    "skewed_timestep_sample",
    "time_sampler",
)
# Functions that return a loss, by name. The second group draws as well, if it is not given a timestep.
LOSSES = ("mse_loss", "smooth_l1_loss", "huber_loss", "conditional_loss", "MSELoss")
OBJECTIVES = ("training_losses", "p_losses")
_MEANS = ("mean", "mean_flat", "sum", "sum_flat")
# A function without these has no place, and need not be walked through.
_MAY_DRAW = re.compile(r"rand|normal\(|\.sample\(|" + "|".join(DRAWING))
_MAY_LOSE = re.compile(r"\*\* ?2|pow\(|square\(|" + "|".join((*LOSSES, *OBJECTIVES, WEIGHTING)))
# Files of other trainings and of parts that are not trained by timesteps.
_ELSEWHERE = re.compile(
    r"(^|/)(tests?|vae|autoencoders?|tokenizers?|discriminators?|lpips|eval\w*|metrics?|infer\w*|demos?_?ui|"
    r"pipelines?|samplers?|inference\w*|generate\w*|optimizers?|datasets?|stage1)(/|\.py|_)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Place:
    """A line that draws timesteps or makes a loss.

    Args:
        source: the file.
        line: where the statement begins.
        end: where it ends.
        kind: see `DrawKind` for a draw; the name of the function, or "square", for a loss.
        name: what it is assigned to, "" if nothing.
        call: the call that draws or makes the loss.
        scope: the function around it.
        left: what a loss has one number for: "batch", "sample" or "value". After the mean of a batch, weights
            of samples cannot enter. "" for a draw, and for a place that only weighs.
    """

    source: Source
    line: int
    end: int
    kind: str
    name: str
    call: ast.expr
    scope: ast.AST
    left: str = ""

    @property
    def where(self) -> str:
        """File and line."""
        return f"{self.source.name}:{self.line}"

    @property
    def code(self) -> str:
        """The statement on one line."""
        statement = _statement(self.source, self.call)
        return ast.unparse(self.call if hasattr(statement, "body") else statement)


def is_training(source: Source) -> bool:
    """Whether a module may be part of a training by timesteps, told by its path."""
    return not _ELSEWHERE.search(source.name)


def draws(source: Source) -> list[Place]:
    """The draws of timesteps in a file, by line."""
    scopes = _scopes(source, _MAY_DRAW)
    found = [place for scope in scopes for place in _draws_in(source, scope)]
    return sorted(found, key=lambda place: place.line)


def primary(draws: Sequence[Place]) -> Place:
    """The draw that lines are for: the first, unless its function returns more than times."""
    return next((place for place in draws if not place.name.startswith("(")), draws[0])


def losses(source: Source) -> list[Place]:
    """The squared errors and losses in a file, by line."""
    found: dict[int, Place] = {}
    for scope in _scopes(source, _MAY_LOSE):
        for node in in_scope(scope):
            place = _loss(source, scope, node)
            if place is not None:
                found.setdefault(place.line, place)
    return sorted(found.values(), key=lambda place: place.line)


def last_name(node: ast.AST) -> str:
    """`f` in `a.b.f` and in `a.b.f(...)`; "" for something without a name."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def assigned_value(place: Place) -> ast.expr:
    """The expression on the right of the place's assignment, or what it returns."""
    value = getattr(_statement(place.source, place.call), "value", None)
    return value if isinstance(value, ast.expr) else place.call


def names_in(node: ast.AST) -> set[str]:
    """The names that an expression reads or writes."""
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def _draws_in(source: Source, scope: ast.AST) -> Iterator[Place]:
    """The draws in one function, or in the script outside of functions."""
    normal: set[str] = set()
    is_timed = any(_TIME.fullmatch(word) for word in _words(scope))
    for node in in_scope(scope):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = _targets(node)
            name = _time_name(targets, is_timed)
            kind = _called(node.value, targets) or (_kind(node.value, normal) if name else None)
            if kind is not None:
                yield _place(source, scope, node, kind[0], name or _target(targets), kind[1])
            elif _call_of(node.value, _NORMAL) is not None:
                normal |= {name for target in targets for name in names_in(target)}
        elif isinstance(node, ast.Return) and node.value is not None and _draws_time(source, scope):
            kind = _kind(node.value, normal)
            if kind is not None:
                yield _place(source, scope, node, kind[0], "", kind[1])


def _kind(value: ast.expr, normal: set[str]) -> tuple[str, ast.expr] | None:
    """How an expression draws, and the call that does."""
    for word, kind in _DIRECT.items():
        call = _call_of(value, (word,))
        if call is not None:
            return kind, call
    if _call_of(value, _NORMAL) is not None or names_in(value) & normal:
        for word, squashed in _SQUASHED.items():
            call = _call_of(value, (word,), of_torch=False)
            if call is not None:
                return squashed, call
    return None


def _called(value: ast.expr, targets: list[ast.expr]) -> tuple[str, ast.expr] | None:
    """A call of a host's function that draws."""
    call = _call_of(value, DRAWING, of_torch=False)
    if call is not None:
        return "call", call
    call = _call_of(value, ("sample",), of_torch=False)
    if call is not None and isinstance(call.func, ast.Attribute):
        owner = ast.unparse(call.func.value)
        is_pair = any(isinstance(target, ast.Tuple) and len(target.elts) == 2 for target in targets)
        if "sampler" in owner and is_pair and _TIME.fullmatch(last_name(_first(targets[0]))):
            return "sampler", call
    return None


def _loss(source: Source, scope: ast.AST, node: ast.AST) -> Place | None:
    name = last_name(node) if isinstance(node, ast.Call) else ""
    is_named = name in (*LOSSES, *OBJECTIVES, WEIGHTING)
    # Most nodes end here, before anything is looked for around them.
    if not isinstance(node, ast.BinOp | ast.Call) or not (is_named or _is_square(node)):
        return None
    statement = _statement(source, node)
    target = _target(_targets(statement))
    place = partial(_place, source, scope, statement, name or "square", target, node)
    outer = _around(source, node)
    if name == WEIGHTING:
        return place()
    if isinstance(node, ast.Call) and name in LOSSES:
        return place(_left(outer, "value") if _keeps_values(node) else "batch")
    if isinstance(node, ast.Call) and name in OBJECTIVES:
        return None if "super()" in ast.unparse(node.func) else place(_left(outer, "sample"))
    is_loss = _LOSS.search(target) or (outer is not None and _LOSS.search(getattr(scope, "name", "")))
    words = " ".join([target, *names_in(statement)])
    if is_loss or (outer is not None and _PREDICTED.search(words)):
        return _place(source, scope, statement, "square", target, node, _left(outer, "value"))
    return None


def _keeps_values(call: ast.Call) -> bool:
    """Whether a loss has `reduction="none"`, or one that is decided when it runs."""
    named = [keyword.value for keyword in call.keywords if keyword.arg in ("reduction", "reduce")]
    if named:
        return not (isinstance(named[0], ast.Constant) and named[0].value in ("mean", "sum"))
    return any(isinstance(value, ast.Constant) and value.value == "none" for value in call.args)


def _around(source: Source, node: ast.AST) -> ast.Call | None:
    """The innermost mean or sum around an expression, in its statement."""
    here = source.parents.get(node)
    while here is not None and not isinstance(here, ast.stmt):
        if isinstance(here, ast.Call) and last_name(here) in _MEANS:
            return here
        here = source.parents.get(here)
    return None


def _left(mean: ast.Call | None, without: str) -> str:
    """What is left of a batch by a mean or sum around a loss; `without` if there is none."""
    if mean is None:
        return without
    is_of_torch = isinstance(mean.func, ast.Attribute) and ast.unparse(mean.func.value) in _TORCH
    num_given = len(mean.args) - is_of_torch
    has_dim = num_given > 0 or any(keyword.arg in ("dim", "axis") for keyword in mean.keywords)
    return "sample" if has_dim or last_name(mean).endswith("_flat") else "batch"


def _is_square(node: ast.AST) -> bool:
    """Whether a node is a difference to the power of 2."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, power = node.left, node.right
    elif isinstance(node, ast.Call) and last_name(node) in ("pow", "square"):
        values = list(node.args)
        is_method = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) not in _TORCH
        base = node.func.value if is_method and isinstance(node.func, ast.Attribute) else values.pop(0)
        power = values[0] if values else ast.Constant(2 if last_name(node) == "square" else None)
    else:
        return False
    is_two = isinstance(power, ast.Constant) and power.value == 2
    return is_two and any(isinstance(each, ast.Sub) for each in ast.walk(base))


def _place(
    source: Source,
    scope: ast.AST,
    statement: ast.stmt,
    kind: str,
    name: str,
    call: ast.expr,
    left: str = "",
) -> Place:
    # A loop or a condition is a statement of many lines: there the call is the place.
    node = call if hasattr(statement, "body") else statement
    return Place(source, node.lineno, node.end_lineno or node.lineno, kind, name, call, scope, left)


def _time_name(targets: list[ast.expr], is_timed: bool) -> str:
    """The first target that is called like a timestep; "" if none is."""
    for target in targets:
        name = last_name(target)
        if _TIME.fullmatch(name) or (is_timed and _ROW.fullmatch(name)):
            return ast.unparse(target)
    return ""


def _targets(statement: ast.AST) -> list[ast.expr]:
    """What an assignment assigns to."""
    if isinstance(statement, ast.Assign):
        return statement.targets
    return [statement.target] if isinstance(statement, ast.AnnAssign | ast.AugAssign) else []


def _target(targets: list[ast.expr]) -> str:
    return ast.unparse(targets[0]) if targets else ""


def _first(target: ast.expr) -> ast.expr:
    return target.elts[0] if isinstance(target, ast.Tuple) else target


def _draws_time(source: Source, scope: ast.AST) -> bool:
    """Whether a function's name, or that of its class, says that it returns timesteps."""
    around = source.parents.get(scope)
    names = [getattr(scope, "name", ""), around.name if isinstance(around, ast.ClassDef) else ""]
    return any(_TIME_FUNCTION.search(name) for name in names)


def _call_of(value: ast.AST, names: tuple[str, ...], of_torch: bool = True) -> ast.Call | None:
    """The first call of one of these functions in an expression; of_torch asks for `torch.` before it."""
    for node in ast.walk(value):
        if isinstance(node, ast.Call) and last_name(node) in names:
            is_plain = not isinstance(node.func, ast.Attribute) or ast.unparse(node.func.value) in _TORCH
            if is_plain or not of_torch:
                return node
    return None


def _words(scope: ast.AST) -> Iterator[str]:
    """Names and attributes of a function, without those that are one letter: these may be anything."""
    for node in in_scope(scope):
        word = getattr(node, "id", getattr(node, "attr", ""))
        if isinstance(word, str) and len(word) > 2:
            yield word


def _statement(source: Source, node: ast.AST) -> ast.stmt:
    while not isinstance(node, ast.stmt):
        node = source.parents[node]
    return node


def _scopes(source: Source, pattern: re.Pattern[str]) -> Iterator[ast.AST]:
    """The functions of a file, and the file itself, that have a line with the pattern."""
    lines = [number for number, line in enumerate(source.text.splitlines(), 1) if pattern.search(line)]
    if not lines:
        return
    yield source.tree
    for node in source.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            end = node.end_lineno or node.lineno
            if any(node.lineno <= line <= end for line in lines):
                yield node
