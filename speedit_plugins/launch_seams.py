"""What a launch puts into a host: the functions of known modules that it replaces, and the policy in them.

A known host makes its diffusion object or its schedule sampler by a function, or draws in one. The function
is replaced when its module is imported. An object's policy is built when the object first trains; one that
only samples stays as it is.
"""

import ast
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, wraps
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, cast

import torch

from speedit_plugins.hosts.attachment import PolicyHolder, attachment_of, is_attached
from speedit_plugins.hosts.draws.draw_stream import DrawStream, replica
from speedit_plugins.hosts.edits.script_edits import ScriptCalls
from speedit_plugins.hosts.edits.sigma_edits import DENSITY, SIGMA_CALLS, edited_sigmas
from speedit_plugins.hosts.entry import launched_seam, no_seam
from speedit_plugins.hosts.factories import (
    FACTORIES,
    SCRIPT_METHOD,
    SHARED_FUNCTIONS,
    Factory,
    is_installed,
)
from speedit_plugins.hosts.schedule_sampler import schedule_sampler
from speedit_plugins.hosts.schedules import schedule_of
from speedit_plugins.hosts.script import ScriptPolicy
from speedit_plugins.hosts.separate_draws import SeparateDraws
from speedit_plugins.hosts.sigma_calls import SigmaCalls
from speedit_plugins.hosts.states.state_file import StateFile
from speedit_plugins.launch_options import (
    PROGRAM,
    LaunchError,
    NoSeamError,
    is_rank_0,
    write,
)
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.policies.shifted_boundary import moves_with_shift
from speedit_plugins.registry import Config

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

        return ScriptCalls(self.script_policy("diffusers script"), self.state)

    def script_policy(self, hosts: str, **options: Any) -> ScriptPolicy:
        """What draws and weighs for a host that draws an index of its noise scheduler."""

        def announce(policy: TimestepPolicy) -> None:
            self.announce(hosts, "D", policy)

        options = {"prediction_type": self.prediction_type, **options}
        return ScriptPolicy(self.config, on_use=announce, **self.draw_options, **options)

    @cached_property
    def sigma_calls(self) -> SigmaCalls:
        """What edited files call to draw u and to weigh by sigma."""

        def used(calls: SigmaCalls) -> None:
            self.keep(calls)
            self.announce(SHARED_FUNCTIONS, "E", calls.policy)

        return SigmaCalls(
            self.config,
            prediction_type=self.prediction_type,
            on_use=used,
            in_checkpoints=self.state is None,
            **self.draw_options,
        )

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


class SeamFinder(MetaPathFinder):
    """Finds modules as Python does. After a known one has run, its functions are replaced."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of a module that is known, or that calls the functions of seam E; None for any other."""
        known = [factory for factory in FACTORIES if factory.module == name]
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is None or spec.loader is None:
                continue
            if known:
                self._replace_after(spec.loader, known)
                return spec
            return spec if self._edit_before(spec) else None
        return None

    def _replace_after(self, loader: Any, known: list[Factory]) -> None:
        execute = loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            for factory in known:
                replace_factory(self._launch, factory, module)

        loader.exec_module = executed

    def _edit_before(self, spec: ModuleSpec) -> bool:
        """Lets a module run as `edited_sigmas` returns it. Returns whether anything in it is edited."""
        origin = spec.origin or ""
        if not origin.endswith(".py") or is_installed(origin):
            return False
        source = Path(origin).read_text(encoding="utf-8", errors="ignore")
        if f"{DENSITY}(" not in source:
            return False
        tree, sites = edited_sigmas(ast.parse(source, filename=origin))
        if not sites.draws:
            return False

        def executed(module: ModuleType) -> None:
            vars(module)[SIGMA_CALLS] = self._launch.sigma_calls
            exec(compile(tree, origin, "exec"), vars(module))

        loader: Any = spec.loader
        loader.exec_module = executed
        return True


def replace_factory(launch: Launch, factory: Factory, module: ModuleType) -> None:
    """Replaces the functions of a known module that has just been imported, once."""
    if factory.adapter:
        _adapt(launch, factory, module)
        return
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


def _adapt(launch: Launch, factory: Factory, module: ModuleType) -> None:
    """Lets the adapter of a host replace what draws and what makes the loss in one of its modules."""
    if hasattr(module, _MARK) or not any(hasattr(module, name) for name in factory.functions):
        return
    setattr(module, _MARK, True)
    home, _, name = factory.adapter.rpartition(".")
    adapt: Callable[[ModuleType, Callable[..., Any]], None] = getattr(import_module(home), name)
    adapt(module, (scripted_maker if factory.seam == "D" else draws_maker)(launch, factory.hosts))
    # A process that the host spawns would import it without this launcher, and draw by itself.
    setattr(torch.multiprocessing, "spawn", _refused_spawn)  # noqa: B010 - mypy: a function of its own
    launch.found.append(factory.hosts)


def draws_maker(launch: Launch, hosts: str) -> Callable[..., SeparateDraws]:
    """What makes the `SeparateDraws` of a host in a launch, with options that the host decides."""

    def used(draws: SeparateDraws) -> None:
        launch.keep(draws)
        launch.announce(hosts, "F", draws.policy)

    def draws_of(**options: Any) -> SeparateDraws:
        stream = DrawStream(**launch.draw_options)
        options = {"prediction_type": "flow", **_stated(launch, hosts, options)}
        return SeparateDraws(launch.config, stream=stream, on_use=used, **options)

    return draws_of


def scripted_maker(launch: Launch, hosts: str) -> Callable[..., ScriptPolicy]:
    """What makes the `ScriptPolicy` of a host in a launch, whose state is kept."""

    def seam_of(**options: Any) -> ScriptPolicy:
        seam = launch.script_policy(hosts, **_stated(launch, hosts, options))
        launch.keep(seam)
        return seam

    return seam_of


def _stated(launch: Launch, hosts: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a host's draws, with what its model predicts if the host or the user says so.

    Raises:
        LaunchError: the host and the user say different things.
    """
    own, given = options.get("prediction_type"), launch.prediction_type
    if own and given and own != given:
        raise LaunchError(f"{hosts} predicts {own}: leave out --prediction-type {given}")
    told = own or given
    return {**options, "prediction_type": told} if told else options


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
            raise LaunchError(f"--schedule_sampler needs uniform beside a policy, got {name!r}: leave it out")
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


def class_builder(launch: Launch, build_class: Callable[..., type]) -> Callable[..., type]:
    """Python's `__build_class__` for a script: a class of its own that has `p_losses` gets the policy."""

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
    raise LaunchError(
        "the script starts processes by torch.multiprocessing.spawn, and these do not get the policy: start"
        " one process, or put the policy in by hand (integrations/README.md)"
    )
