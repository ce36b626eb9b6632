"""Runs an unmodified training script of a host with a timestep policy in it.

    speedit-launch --policy speed --set k=5 train.py <the host's own arguments>
    speedit-launch --policy speed --set weighting=constant train.py
    speedit-launch --import my_package.policies --policy mine train.py
    torchrun --nproc_per_node 8 -m speedit_plugins.launch train.py <the host's own arguments>

`speedit-launch` is `python -m speedit_plugins.launch`.

A policy goes in at the host's seam: the place where its code draws timesteps and makes its loss. A known host
makes its diffusion object or its schedule sampler by a function, and the launcher replaces that function when
its module is imported. An object's policy is built when the object first trains; one that only samples stays
as it is. In a script that draws timesteps itself, as diffusers' do, the draw and the loss are edited when it
is parsed.
"""

import ast
import builtins
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, cast

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from speedit_plugins.hosts.attachment import PolicyHolder, attachment_of, is_attached
from speedit_plugins.hosts.draw_stream import DrawStream, replica
from speedit_plugins.hosts.entry import launched_seam, no_seam
from speedit_plugins.hosts.factories import (
    FACTORIES,
    SCRIPT_METHOD,
    Factory,
    defines,
    looked_for,
    reaches_a_factory,
)
from speedit_plugins.hosts.schedule_sampler import schedule_sampler
from speedit_plugins.hosts.schedules import schedule_of
from speedit_plugins.hosts.script import ScriptPolicy
from speedit_plugins.hosts.script_edits import CALLS, ScriptCalls, edited
from speedit_plugins.hosts.state_file import StateFile
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
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.shifted_boundary import moves_with_shift
from speedit_plugins.registry import Config, import_modules, is_raised_here

USER_ERROR = 2
_MARK = "_speedit_launched"
# What is reported if a script defines the class itself.
SCRIPT_CLASS = f"a class with {SCRIPT_METHOD} in the script (DiT-3D)"


@dataclass
class Launch:
    """The state of one run of a script.

    Args:
        config: of the policy.
        prediction_type: what the model predicts, if the host does not say.
        ranks_alike, num_strata: of the draws, see `with_policy`.
        state: the file that keeps the policies' states; None if the host's own checkpoints do, or nothing.
        num_attached: how many objects and samplers train with the policy so far.
        found: hosts whose functions were replaced.
    """

    config: Config
    prediction_type: str | None = None
    ranks_alike: int | None = None
    num_strata: int | None = None
    state: StateFile | None = None
    num_attached: int = 0
    found: list[str] = field(default_factory=list)

    @cached_property
    def calls(self) -> ScriptCalls:
        """What the edited script calls to draw and to make its loss."""

        def announce(policy: TimestepPolicy) -> None:
            self.announce("diffusers script", "D", policy)

        seam = ScriptPolicy(
            self.config, prediction_type=self.prediction_type, on_use=announce, **self.draw_options
        )
        return ScriptCalls(seam, self.state)

    @property
    def draw_options(self) -> dict[str, Any]:
        """The options of `DrawStream`."""
        return {"ranks_alike": self.ranks_alike, "num_strata": self.num_strata}

    def __deepcopy__(self, memo: Any) -> "Launch":
        """A copy of an object, such as its average, trains in the same launch."""
        return self

    def keep(self, holder: PolicyHolder) -> None:
        """Restores a policy's state, and keeps it in the file from now on, if there is one."""
        if self.state is not None:
            self.state.add(holder)

    def announce(self, hosts: str, seam: str, policy: TimestepPolicy) -> None:
        """Counts a policy in use. Rank 0 reports the first one."""
        if self.num_attached == 0 and is_rank_0():
            here = replica(self.ranks_alike)
            ranks = f"; draws differ on {here.size} data-parallel ranks" if here.size > 1 else ""
            write(f"{PROGRAM}: {hosts}, seam {seam}, policy {policy}{ranks}")
        self.num_attached += 1


@dataclass(frozen=True)
class DeferredPolicy:
    """Builds an object's policy when the object first trains, and reports it."""

    launch: Launch
    hosts: str
    host: Any

    def __call__(self) -> TimestepPolicy:
        """The policy, in use from now on."""
        seam, launch = launched_seam(self.host), self.launch
        policy: TimestepPolicy = seam.policy_for(self.host, launch.config, launch.prediction_type)
        self.launch.keep(attachment_of(self.host))
        self.launch.announce(self.hosts, "B", policy)
        return policy


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
        tree = parsed(arguments.script)
        run(launch, tree, [arguments.script, *arguments.arguments])
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
    DiT-3D's `p_losses`, or draws timesteps of a noise scheduler and makes a squared error.

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
    changed, sites = edited(tree)
    folders = [str(path.resolve().parent), *sys.path[1:]]
    if not (sites.are_a_seam or reaches_a_factory(tree, folders) or defines(tree, SCRIPT_METHOD)):
        raise NoSeamError(f"{script} has no seam: {sites.shortfall()}looked for {looked_for()}")
    return changed


def run(launch: Launch, tree: ast.Module, argv: Sequence[str]) -> None:
    """Runs a script as `python *argv` does, with the hosts' functions replaced while it runs.

    Args:
        launch: the state of this run.
        tree: the script as `parsed` returns it.
        argv: its path, then its arguments.
    """
    finder, script = _Finder(launch), argv[0]
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
            _replace(launch, factory, sys.modules[factory.module])
    module = ModuleType("__main__")
    vars(module).update({"__file__": script, "__builtins__": builtins, CALLS: launch.calls})
    try:
        sys.meta_path.insert(0, finder)
        # Every class that the script defines itself passes through here.
        setattr(builtins, "__build_class__", _class_builder(launch, build_class))  # noqa: B010 - mypy: it is final
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


class _Finder(MetaPathFinder):
    """Finds modules as Python does. After a known one has run, its functions are replaced."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        known = [factory for factory in FACTORIES if factory.module == name]
        if not known:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                loader: Any = spec.loader
                execute = loader.exec_module

                def executed(module: ModuleType, execute: Callable[[ModuleType], None] = execute) -> None:
                    execute(module)
                    for factory in known:
                        _replace(self._launch, factory, module)

                loader.exec_module = executed
                return spec
        return None


def _replace(launch: Launch, factory: Factory, module: ModuleType) -> None:
    for name in factory.functions:
        made = getattr(module, name, None)
        if made is None or hasattr(made, _MARK):
            continue
        if factory.methods:
            if factory.is_class(made):
                _replace_init(launch, made, factory.hosts)
            continue
        launched = _object_factory if factory.seam == "B" else _sampler_factory
        replacement = launched(launch, factory, module, made)
        setattr(replacement, _MARK, True)
        setattr(module, name, replacement)
        launch.found.append(factory.hosts)


def _object_factory(
    launch: Launch, factory: Factory, module: ModuleType, made: Callable[..., Any]
) -> Callable[..., Any]:
    @wraps(made)
    def launched(*args: Any, **kwargs: Any) -> Any:
        return _defer(launch, factory.hosts, made(*args, **kwargs))

    return launched


def _sampler_factory(
    launch: Launch, factory: Factory, module: ModuleType, made: Callable[..., Any]
) -> Callable[..., Any]:
    @wraps(made)
    def launched(name: str, diffusion: Any) -> Any:
        if name != "uniform":
            raise LaunchError(f"the host draws with its own sampler {name!r}: drop it or the policy")
        scope = build_policy(launch.config, schedule_of(diffusion)).scope
        # The host reports losses to its LossAwareSampler alone.
        base = "LossAwareSampler" if scope == "loss" else "ScheduleSampler"
        sampler = schedule_sampler(
            diffusion,
            launch.config,
            host_class=getattr(module, base),
            prediction_type=launch.prediction_type,
            **launch.draw_options,
        )
        launch.keep(sampler)
        launch.announce(factory.hosts, "C", sampler.policy)
        return sampler

    return launched


def _defer(launch: Launch, hosts: str, host: Any) -> Any:
    if is_attached(host):
        return host
    seam, stream = launched_seam(host), DrawStream(**launch.draw_options)
    if seam is None:
        raise NoSeamError(no_seam(host))
    source, moves = DeferredPolicy(launch, hosts, host), moves_with_shift(launch.config)
    return seam.attach_later(host, source, stream, moves_boundary=moves)


def _class_builder(launch: Launch, build_class: Callable[..., type]) -> Callable[..., type]:
    def build(function: Any, name: str, *bases: Any, **kwargs: Any) -> type:
        made = build_class(function, name, *bases, **kwargs)
        if getattr(made, "__module__", None) == "__main__" and SCRIPT_METHOD in vars(made):
            _replace_init(launch, made, SCRIPT_CLASS)
            # A process that the script spawns would import it without this launcher, and draw uniformly.
            setattr(torch.multiprocessing, "spawn", _refused_spawn)  # noqa: B010 - mypy: a function of its own
        return made

    return build


def _replace_init(launch: Launch, made: type, hosts: str) -> None:
    init = cast(Callable[..., None], getattr(made, "__init__"))  # noqa: B009 - mypy: unsound on an instance

    @wraps(init)
    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        _defer(launch, hosts, self)

    setattr(made, "__init__", launched)  # noqa: B010 - mypy: a method is assigned
    setattr(made, _MARK, True)
    launch.found.append(hosts)


def _refused_spawn(*_: Any, **__: Any) -> NoReturn:
    raise LaunchError("the script spawns processes, and these do not get the policy: start it on one process")


def _guard(launch: Launch) -> Callable[..., None]:
    def before_step(*_: Any) -> None:
        if not launch.num_attached:
            raise NoSeamError(_untrained(launch))

    return before_step


def _untrained(launch: Launch) -> str:
    found = f"found {', '.join(dict.fromkeys(launch.found))}, but " if launch.found else ""
    return f"{found}no training loss went through the policy; looked for {looked_for()}"


if __name__ == "__main__":
    # Under its own name: while the script runs, __main__ is the script, and these classes must be found.
    sys.exit(import_module("speedit_plugins.launch").main())
