"""Runs an unmodified training script of a host with a timestep policy in it.

    speedit-launch --policy speed --set k=5 train.py <the host's own arguments>
    speedit-launch --policy speed --set weighting=constant train.py
    speedit-launch --import my_package.policies --policy mine train.py
    torchrun --nproc_per_node 8 -m speedit_plugins.launch train.py <the host's own arguments>

`speedit-launch` is `python -m speedit_plugins.launch`.

A policy goes in at the host's seam: the place where its code draws timesteps and makes its loss. For a known
host this is a function, which is replaced when its module is imported (`launch_seams`). In a script that
draws timesteps itself, as diffusers' do, the draw and the loss are edited when it is parsed.
"""

import ast
import builtins
import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from speedit_plugins.doctor.report import report
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.edits.script_edits import CALLS, edited
from speedit_plugins.hosts.edits.sigma_edits import DENSITY, SIGMA_CALLS, edited_sigmas
from speedit_plugins.hosts.factories import (
    FACTORIES,
    SCRIPT_METHOD,
    defines,
    reaches_a_factory,
    reaches_text,
)
from speedit_plugins.hosts.states.state_file import StateFile
from speedit_plugins.hosts.trainers.inline_draws import INLINE_CALLS, SCRIPTS, InlineCalls, edited_script
from speedit_plugins.launch_options import (
    PROGRAM,
    STATE_EVERY,
    LaunchError,
    NoSeamError,
    advice,
    is_rank_0,
    parser,
    policy_config,
    write,
)
from speedit_plugins.launch_seams import Launch, SeamFinder, class_builder, draws_maker, replace_factory
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import Config, import_modules, is_raised_here

USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a host's script.

    Args:
        argv: arguments after the program's name; None takes the process's own.

    Returns:
        0, or 2 with one line on stderr: after a user's error, or if nothing trained with the policy. If the
        script has no place for the policy, lines on what to do follow. The script's own exceptions and exit
        codes pass through.
    """
    launch: Launch | None = None
    try:
        arguments = parser().parse_args(argv)
        import_modules(arguments.imports, source="--import")
        launch = _launch(arguments)
        if arguments.doctor:
            return report(arguments, launch.config, sys.argv[1:] if argv is None else argv)
        tree = parsed(arguments.script)
        run(launch, tree, [arguments.script, *arguments.local_rank, *arguments.arguments])
        if not launch.num_attached:
            raise NoSeamError(_untrained(launch))
    except (LaunchError, ValueError, OSError) as error:
        # A host's own errors keep their traceback.
        if not isinstance(error, LaunchError) and not is_raised_here(error):
            raise
        write(f"{PROGRAM}: error: {' '.join(str(error).split())}")
        if launch is not None and isinstance(error, NoSeamError) and is_rank_0():
            write(advice(launch.config))
        return USER_ERROR
    return 0


def _launch(arguments: Any) -> Launch:
    """The state of a run at its start. Raises LaunchError or ValueError for options that do not fit."""
    config = policy_config(arguments.policy, arguments.set)
    options = {"ranks_alike": arguments.ranks_alike, "num_strata": arguments.num_strata}
    policy = build_policy(config, NoiseSchedule.linear(), arguments.prediction_type or "epsilon")
    DrawStream(**options).check(policy)
    return Launch(config, arguments.prediction_type, **options, state=_state_file(arguments, config))


def _state_file(arguments: Any, config: Config) -> StateFile | None:
    path, every = arguments.state, arguments.state_every
    if path is None:
        if every is not None:
            raise LaunchError("--state-every has no effect without --state FILE")
        return None
    text = json.dumps(config, sort_keys=True, default=str)
    every = STATE_EVERY if every is None else every
    return StateFile(Path(path), every, text, writes=is_rank_0)


def parsed(script: str) -> ast.Module:
    """A script with a known seam, edited if it draws itself. Nothing is imported or run for this.

    A known module has to be where the script would import it from, or the script itself names one, defines
    DiT-3D's `p_losses`, has the functions of a known script (`inline_draws`), or draws timesteps of a noise
    scheduler and makes a squared error.

    Raises:
        LaunchError: there is no script, or it is not Python.
        NoSeamError: it has no seam. The message has the lines of its draws.
    """
    path = Path(script)
    if not path.is_file():
        raise LaunchError(f"no script {script!r}")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=script)
    except SyntaxError as error:
        raise LaunchError(f"{script} is not Python that this interpreter reads: {error}") from error
    if (inline := edited_script(tree)) is not None:
        return inline
    changed, sites = edited(tree)
    changed, sigmas = edited_sigmas(changed)
    folders = [str(path.resolve().parent), *sys.path[1:]]
    is_seam = sites.are_a_seam or sigmas.draws or defines(tree, SCRIPT_METHOD)
    if not (is_seam or reaches_a_factory(tree, folders) or reaches_text(tree, folders, f"{DENSITY}(")):
        raise NoSeamError(
            f"{script} has no seam: {sites.shortfall()}it reaches no function of a known host (--help lists"
            f" them). `{PROGRAM} --doctor {script}` says where it draws, and what to write there"
        )
    return changed


def run(launch: Launch, tree: ast.Module, argv: Sequence[str]) -> None:
    """Runs a script as `python *argv` does, with the hosts' functions replaced while it runs.

    Args:
        launch: the state of this run.
        tree: the script as `parsed` returns it.
        argv: its path, then its arguments.
    """
    finder, script = SeamFinder(launch), argv[0]
    build_class, old_argv, path = builtins.__build_class__, sys.argv, list(sys.path)
    main_module = sys.modules["__main__"]
    spawn = getattr(torch.multiprocessing, "spawn")  # noqa: B009 - mypy: a name that torch does not export
    hooks = [register_optimizer_step_pre_hook(_guard(launch))]
    state = launch.state
    if state is not None:
        hooks.append(register_optimizer_step_post_hook(lambda *_: state.step_done()))
    for factory in FACTORIES:
        # --import may name a module of the host: the host's own are in already when the finder comes.
        if factory.module in sys.modules:
            replace_factory(launch, factory, sys.modules[factory.module])
    module = ModuleType("__main__")
    inline = {host.hosts: InlineCalls(host, draws_maker(launch, host.hosts)) for host in SCRIPTS}
    vars(module).update({"__file__": script, "__builtins__": builtins})
    vars(module).update({CALLS: launch.calls, INLINE_CALLS: inline})
    vars(module)[SIGMA_CALLS] = launch.sigma_calls
    try:
        sys.meta_path.insert(0, finder)
        # Every class that the script defines itself passes through here.
        setattr(builtins, "__build_class__", class_builder(launch, build_class))  # noqa: B010 - mypy: it is final
        sys.argv, sys.modules["__main__"] = list(argv), module
        sys.path[0] = str(Path(script).resolve().parent)
        exec(compile(tree, script, "exec"), vars(module))
    except SystemExit as leaving:
        # A script may leave with success; whether it trained with the policy is checked all the same.
        if leaving.code not in (None, 0):
            raise
    finally:
        for hook in hooks:
            hook.remove()
        setattr(builtins, "__build_class__", build_class)  # noqa: B010 - as above
        setattr(torch.multiprocessing, "spawn", spawn)  # noqa: B010 - as above
        sys.meta_path.remove(finder)
        sys.argv, sys.modules["__main__"], sys.path[:] = old_argv, main_module, path
        if state is not None:
            state.write()


def _guard(launch: Launch) -> Callable[..., None]:
    def before_step(*_: Any) -> None:
        if not launch.num_attached:
            raise NoSeamError(_untrained(launch))

    return before_step


def _untrained(launch: Launch) -> str:
    found = f"found {', '.join(dict.fromkeys(launch.found))}, but " if launch.found else ""
    return f"{found}no training loss went through the policy; --help lists what is looked for in a script"


if __name__ == "__main__":
    # Under its own name: while the script runs, __main__ is the script, and these classes must be found.
    sys.exit(import_module("speedit_plugins.launch").main())
