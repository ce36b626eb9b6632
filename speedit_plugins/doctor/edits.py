"""What to write where, for a script without a known seam: lines made from the script's own code."""

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from speedit_plugins.doctor.places import LOSSES, OBJECTIVES, Place, assigned_value, primary
from speedit_plugins.doctor.script_code import (
    alpha_bars_of,
    compared,
    counts_to_noise,
    data_of,
    device_of,
    has_factors,
    is_without_gradients,
    looks_up,
    made_in_script,
    noises_by_scheduler,
    num_dims_of,
    scheduler_of,
    size_of,
)
from speedit_plugins.doctor.sources import Project

# What only scripts on a table of alpha-bars have.
_DIFFUSION_WORDS = ("alphas_cumprod", "cumprod", "add_noise", "num_train_timesteps", "q_sample")


@dataclass(frozen=True)
class Edits:
    """Lines to write by hand.

    Args:
        what: the part of this package that fits, and why.
        lines: (where, code) of each; where is a file and a line, or "" for the line after the one before.
        notes: what the lines leave to the reader.
    """

    what: str
    lines: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()


def edits(project: Project, draws: list[Place], losses: list[Place], policy: str) -> Edits | None:
    """The lines for a script; None if neither a draw nor an object that draws is seen in it.

    Args:
        project: the script and its modules.
        draws, losses: the places of both, the likely one first.
        policy: Python code of the policy's name or config.
    """
    objective = next((place for place in losses if place.kind in OBJECTIVES), None)
    sampler = next((place for place in draws if place.kind == "sampler"), None)
    if objective is not None and sampler is not None:
        return _sampler(project, policy)
    if objective is not None and (not draws or draws[0].kind == "index"):
        return _wrapped(project, objective, policy)
    if not draws:
        return None
    return _by_itself(primary(draws), _loss_of(project, primary(draws), losses), policy)


def _by_itself(draw: Place, loss: Place | None, policy: str) -> Edits:
    """The lines for a script that draws in its own code."""
    if draw.kind != "index":
        if noises_by_scheduler(draw):
            return _drawn(draw, loss, policy, "what is drawn becomes the timestep of a noise scheduler")
        if is_without_gradients(draw):
            return _drawn(draw, loss, policy, "the draw runs without gradients, as a validation does")
        return _separate(draw, loss, policy)
    if looks_up(draw):
        return _flow_script(draw, loss, policy)
    if loss is not None and loss.left == "batch" and scheduler_of(draw) and _is_plain(loss):
        return _script_policy(draw, loss, policy)
    return _drawn(draw, loss, policy, "no adapter fits this draw and this loss")


def _wrapped(project: Project, objective: Place, policy: str) -> Edits:
    """`with_policy` around the object that makes the loss."""
    function = objective.call.func if isinstance(objective.call, ast.Call) else objective.call
    owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else "diffusion"
    made = made_in_script(project, owner.split(".")[-1])
    where, name = made or (f"where `{owner}` is made", owner)
    return Edits(
        f"with_policy: {owner}.{objective.kind} makes the loss of each sample",
        (
            (f"{project.script.name}, once", "from speedit_plugins import with_policy"),
            (f"{where}, after it", f"{name} = with_policy({name}, {policy})"),
        ),
    )


def _sampler(project: Project, policy: str) -> Edits:
    """A schedule sampler in place of the host's."""
    where, name = made_in_script(project, "sampler") or ("where the sampler is made", "schedule_sampler")
    home = "from speedit_plugins.hosts.schedule_sampler import schedule_sampler as policy_sampler"
    return Edits(
        "schedule_sampler: the training asks a sampler for its timesteps",
        (
            (f"{project.script.name}, once", home),
            (f"{where}, in its place", f"{name} = policy_sampler(diffusion, {policy})"),
        ),
        ("`diffusion` is the object whose training_losses the training calls",),
    )


def _script_policy(draw: Place, loss: Place, policy: str) -> Edits:
    """`ScriptPolicy` for timesteps of a noise scheduler."""
    scheduler, number, device = scheduler_of(draw), size_of(draw), device_of(draw)
    return Edits(
        "ScriptPolicy: timesteps of a noise scheduler, and a squared error of the batch",
        (
            (f"{draw.source.name}, once", "from speedit_plugins.hosts.script import ScriptPolicy"),
            ("", f"seam = ScriptPolicy({policy})"),
            (f"{draw.where}, in its place", f"{draw.name} = seam.timesteps({scheduler}, {number}, {device})"),
            (f"{loss.where}, in its place", _assigned(loss, f"seam.mse_loss({_arguments(loss)})")),
        ),
        tuple(_notes(draw, loss, "seam")),
    )


def _flow_script(draw: Place, loss: Place | None, policy: str) -> Edits:
    """`FlowScript` for rows of a flow scheduler's table."""
    after = f"{draw.source.name}:{draw.end}, after it"
    lines = [
        (f"{draw.source.name}, once", "from speedit_plugins.hosts.flow_script import FlowScript"),
        ("", f'seam = FlowScript({policy}, {looks_up(draw)}, prediction_type="flow")'),
        (after, f"{draw.name} = seam.indices({draw.name}, {data_of(draw)})"),
    ]
    notes = ["the drawn rows are of the scheduler's table, in which row 0 is noise"]
    if loss is not None:
        lines.append((f"{loss.where}, in its place", _assigned(loss, f"seam.mse_loss({_arguments(loss)})")))
        if has_factors(loss):
            notes.append(
                "the script weighs its loss: give FlowScript its weights as a function, weighting=..."
            )
    return Edits(
        "FlowScript: rows of a scheduler's table of sigmas",
        tuple(lines),
        (*notes, *_notes(draw, loss, "seam")),
    )


def _separate(draw: Place, loss: Place | None, policy: str) -> Edits:
    """`SeparateDraws` for times in [0, 1]."""
    own = ast.unparse(assigned_value(draw))
    is_wide, toward_noise = num_dims_of(draw) > 1, counts_to_noise(draw)
    own = f"{own}.flatten()" if is_wide else own
    own = f"1 - {own}" if toward_noise is False else own
    drawn = f"draws.times(lambda: {own}, {data_of(draw)})"
    drawn = f"{drawn}.view({', '.join(['-1', *['1'] * (num_dims_of(draw) - 1)])})" if is_wide else drawn
    drawn = f"1 - {drawn}" if toward_noise is False else drawn
    lines = [
        (f"{draw.source.name}, once", "from speedit_plugins.hosts.separate_draws import SeparateDraws"),
        ("", f"draws = SeparateDraws({policy})"),
        (f"{draw.where}, in its place", f"{draw.name} = {drawn}" if draw.name else f"return {drawn}"),
    ]
    if loss is not None:
        lines += _weighed(loss, lambda name: f"draws.weigh({name})")
    notes = _notes(draw, loss, "draws", toward_noise)
    return Edits(
        "SeparateDraws: times in [0, 1] that the script draws itself",
        tuple(lines),
        tuple(notes),
    )


def _drawn(draw: Place, loss: Place | None, policy: str, why: str) -> Edits:
    """The lines of `build_policy`, and why no adapter does it."""
    has_table = any(draw.source.has_word(word) for word in _DIFFUSION_WORDS)
    is_flow = not (noises_by_scheduler(draw) or (draw.kind == "index" and has_table))
    scheduler, own_table = scheduler_of(draw), alpha_bars_of(draw.source)
    table = own_table if own_table and not scheduler else f"{scheduler or 'noise_scheduler'}.alphas_cumprod"
    table = f"from_alphas_cumprod({table})"
    schedule = "rectified_flow(1000)" if is_flow else table
    toward_noise = counts_to_noise(draw)
    value = "1 - draw.time" if toward_noise is False else "draw.time"
    value = value if is_flow and draw.kind != "index" else "draw.index"
    model = '"flow"' if is_flow else '"epsilon"'
    lines = [
        (f"{draw.source.name}, once", "from speedit_plugins import NoiseSchedule, build_policy"),
        ("", f"policy = build_policy({policy}, NoiseSchedule.{schedule}, {model})"),
        (f"{draw.where}, in its place", "policy.advance()"),
        ("", f"policy.observe({data_of(draw)})"),
        ("", f"draw = policy.draw({size_of(draw)}, device={device_of(draw)})"),
        ("", f"{draw.name} = {value}" if draw.name else f"return {value}"),
    ]
    if loss is not None:
        lines += _weighed(loss, _by_draw(loss))
    notes = [] if is_flow else ["the last argument is what the model predicts: epsilon, x0, v or flow"]
    if not is_flow and draw.kind != "index":
        notes.append(f"{draw.name} is whole numbers then: leave out what the script makes of it afterwards")
    notes.append("a policy that learns also needs policy.update(draw.index, loss_of_each_sample)")
    if not (is_flow or scheduler or own_table):
        notes.append(
            "`noise_scheduler` is the scheduler that noises the data, or what else has the alpha-bars"
        )
    if loss is not None and has_factors(loss):
        notes.append("the script weighs its loss already, and weights multiply: see docs/questions.md")
    return Edits(
        f"build_policy: {why}",
        tuple(lines),
        (*notes, *_notes(draw, loss, "draw", toward_noise if is_flow else True)),
    )


def _by_draw(loss: Place) -> Callable[[str], str]:
    """How the weights of a `TimestepDraw` enter a loss."""
    if loss.left == "sample":
        return lambda name: f"draw.weight * {name}"
    return lambda name: f"draw.weight.view(-1, *[1] * ({name}.dim() - 1)) * {name}"


def _weighed(loss: Place, weigh: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """The edit that puts weights into a loss."""
    if loss.name and loss.left != "batch":
        yield f"{loss.source.name}:{loss.end}, after it", f"{loss.name} = {weigh(loss.name)}"
        return
    call, end = copy.deepcopy(loss.call), "mean"
    if isinstance(call, ast.Call) and loss.kind in LOSSES:
        given = [keyword for keyword in call.keywords if keyword.arg == "reduction"]
        end = "sum" if given and ast.unparse(given[0].value) == "'sum'" else "mean"
        call.keywords = [keyword for keyword in call.keywords if keyword.arg != "reduction"]
        call.keywords.append(ast.keyword("reduction", ast.Constant("none")))
    yield f"{loss.where}, in its place", f"each = {ast.unparse(call)}"
    weighed = weigh("each")
    weighed = f"({weighed})" if " * " in weighed else weighed
    yield "", _assigned(loss, f"{weighed}.{end}()")


def _notes(draw: Place, loss: Place | None, name: str, toward_noise: bool | None = True) -> Iterator[str]:
    if toward_noise is None and draw.kind != "index":
        yield "t = 1 has to be noise; where it is data, write 1 - t on both sides"
    if loss is None:
        yield f"no squared error is seen: {name}'s weights multiply the loss of each sample, before its mean"
    elif loss.scope is not draw.scope:
        yield f"`{name}` has to be known in both places, for instance as an attribute"


def _assigned(loss: Place, text: str) -> str:
    return f"{loss.name} = {text}" if loss.name else f"return {text}"


def _arguments(loss: Place) -> str:
    return ", ".join(compared(loss) or ("prediction", "target"))


def _is_plain(loss: Place) -> bool:
    return compared(loss) is not None and not has_factors(loss)


def _loss_of(project: Project, draw: Place, losses: list[Place]) -> Place | None:
    """The error that belongs to a draw: in its function, else in its file or the script."""

    def rank(place: Place) -> tuple[bool, bool, bool]:
        is_near = place.source in (draw.source, project.script)
        # Weights enter more easily before the mean of the batch.
        return place.scope is not draw.scope, not is_near, place.left == "batch"

    return min((place for place in losses if place.kind in (*LOSSES, "square")), key=rank, default=None)
