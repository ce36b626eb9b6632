"""The launcher's command line: its options, the policy that they describe, and what it tells its user.

--policy speed --set k=3 --set weighting=constant     a name, its parameters, parts in place of its own
--policy logit_normal --set shift=3 --set window=[0.1,0.9]  transforms of its law
--set density=logit_normal --set weighting=constant   parts alone
--policy '{"type": "speedit", "weighting": {"gamma": 0.5}}'  or the path of a file with such a mapping
"""

import argparse
import inspect
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any, NoReturn

import torch.distributed as dist

from speedit_plugins.hosts.factories import known_hosts
from speedit_plugins.policies.schedule import PREDICTION_TYPES
from speedit_plugins.registry import (
    DENSITIES,
    DRAWS,
    POLICIES,
    WEIGHTINGS,
    Config,
    import_modules,
    options_of,
)

# The console script's name, at the start of every line that the launcher writes.
PROGRAM = "speedit-launch"
DEFAULT_POLICY = "recommended"
STATE_EVERY = 1000
_SUFFIXES = (".json", ".yaml", ".yml")


class LaunchError(Exception):
    """An error that the user can mend. Its message is one line."""


class NoSeamError(LaunchError):
    """The launcher finds no place for the policy. The user has to write it into the script by hand."""


def parser() -> argparse.ArgumentParser:
    """The launcher's options. It raises LaunchError for wrong ones."""
    options = _Parser(
        prog=PROGRAM,
        description="Run a host's unmodified training script with a timestep policy in it.\nOn several"
        " devices: torchrun or accelerate launch, with -m speedit_plugins.launch for speedit-launch.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    options.add_argument(
        "-h", "--help", action=_Help, nargs=0, help="show this, with the policies of each --import before it"
    )
    options.add_argument(
        "--policy",
        help="a registered policy, a mapping as JSON, or the path of a file that has one (YAML too, if"
        f" omegaconf is installed); default: {DEFAULT_POLICY}, or the parts that --set gives",
    )
    modules: Any = {"action": "append", "default": [], "metavar": "MODULE"}
    options.add_argument(
        "--import", dest="imports", help="import it for the policies it registers", **modules
    )
    options.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of the policy; a part of it, weighting=constant; or a parameter of a part,"
        " weighting.gamma=2",
    )
    told = "what the model predicts, if the host does not say"
    options.add_argument("--prediction-type", choices=PREDICTION_TYPES, help=told)
    options.add_argument(
        "--state",
        metavar="FILE",
        help="keep the policies' state (steps, what they learned) in this file, and restore it at the start;"
        " without it, only the checkpoints of diffusers' scripts, VideoX-Fun, Open-Sora-Plan 1.5, Open-Sora"
        " and OpenDiT have it",
    )
    options.add_argument(
        "--state-every",
        type=int,
        metavar="STEPS",
        help=f"optimizer steps between writings of --state, beside that at the end; default: {STATE_EVERY}",
    )
    _add_draw_options(options)
    _add_script_options(options)
    return options


def _add_draw_options(options: argparse.ArgumentParser) -> None:
    """The options of `DrawStream`."""
    options.add_argument(
        "--ranks-alike",
        type=int,
        metavar="RANKS",
        help="how many consecutive ranks draw the same timesteps, such as the size of a sequence-parallel"
        " group; default: the host's own groups, or 1",
    )
    options.add_argument(
        "--num-strata",
        type=int,
        metavar="N",
        help="spread each N timesteps in a row, over ranks and micro-batches, over N equally likely strata",
    )


def _add_script_options(options: argparse.ArgumentParser) -> None:
    """The script, its arguments, and what is done with it."""
    options.add_argument(
        "--doctor",
        action="store_true",
        help="do not run the script: say where it draws timesteps and makes its loss, by which law, and where"
        " the policy goes in",
    )
    options.add_argument(
        "--local_rank",
        "--local-rank",
        action="append",
        type="--local_rank={}".format,
        default=[],
        metavar="RANK",
        help="passed on to the script, for launchers such as deepspeed's, which put it in front",
    )
    options.add_argument("script", help="the host's training script")
    options.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own arguments")


def policy_config(policy: str | None, settings: Sequence[str]) -> dict[str, Any]:
    """The config of a policy, as `build_policy` takes it.

    Args:
        policy: a registered name, a mapping as JSON or YAML, or the path of a file with one. None is the
            default policy, or a policy of parts if the settings give both its density and its weighting.
        settings: each KEY=VALUE, in this order. A later one wins.

    Raises:
        LaunchError: a mapping or a file that cannot be read, or a setting that is not KEY=VALUE.
    """
    config = {} if policy is None else _given_policy(policy)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not (equals and all(key.split("."))):
            raise LaunchError(f"--set needs KEY=VALUE, got {setting!r}")
        *sections, last = key.split(".")
        section = config
        for name in sections:
            below = section.get(name, {})
            if not isinstance(below, str | Mapping):
                raise LaunchError(f"--set {setting}: {name} is {below!r} and has no parameters")
            # A part that is a name becomes a mapping with that type.
            section[name] = options_of(below)
            section = section[name]
        section[last] = _value(text)
    if policy is None and "type" not in config and not {"density", "weighting"} <= set(config):
        return {"type": DEFAULT_POLICY, **config}
    return config


def is_rank_0() -> bool:
    """Whether this process is the first of all."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def write(text: str) -> None:
    """Writes lines to stderr, clear of a progress bar of the script."""
    bar = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if bar is not None:
        bar.write(text, file=sys.stderr)
    else:
        sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def advice(config: Config) -> str:
    """What to do with a script that has no place for a policy: lines of code, and the pages to read."""
    policy: Any = dict(config)
    policy = policy["type"] if set(policy) == {"type"} else policy
    return f"""{PROGRAM}: by hand, for a flow; a model of noise takes NoiseSchedule.from_alphas_cumprod(...),
"epsilon" and t = draw.index:
    from speedit_plugins import NoiseSchedule, build_policy
    policy = build_policy({policy!r}, NoiseSchedule.rectified_flow(1000), "flow")  # once
    policy.advance()  # in each step
    policy.observe(x_0)  # the data, as the model sees them
    draw = policy.draw(batch_size, device=device)  # t = draw.time, 1 is noise
    loss = (draw.weight * mse_of_each_sample).mean()
    policy.update(draw.index, mse_of_each_sample)
{PROGRAM}: in the repository of speedit_plugins, docs/index.md and integrations/README.md show more"""


def _given_policy(text: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        return _mapping(text, "--policy")
    if not text.endswith(_SUFFIXES):
        return {"type": text}
    try:
        content = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"--policy {text}: cannot be read: {error}") from error
    return _mapping(content, f"--policy {text}")


def _mapping(text: str, what: str) -> dict[str, Any]:
    """The mapping that a text is, in JSON; in YAML too if omegaconf is installed."""
    found = _parsed(text, what)
    if not isinstance(found, dict):
        raise LaunchError(f"{what} needs a mapping, got {found!r}")
    return found


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if find_spec("omegaconf") is None:
            raise LaunchError(f"{what} is no JSON ({error}), and YAML needs omegaconf") from error
        return _from_yaml(text, what)


def _from_yaml(text: str, what: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        return OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise LaunchError(f"{what} is neither JSON nor YAML: {error}") from error


def _value(text: str) -> Any:
    """The value of true, false, null, a number such as 1e-3, a list or a mapping; other text as it is."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() == "null":
        return None
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    if text.startswith("["):
        return _parsed(text, "--set")
    return _mapping(text, "--set") if text.startswith("{") else text


class _Parser(argparse.ArgumentParser):
    """Raises LaunchError instead of printing the usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise LaunchError(f"{message}; see {PROGRAM} --help")


class _Help(argparse.Action):
    """Prints the help. The names in it are looked up now, with those of the modules imported so far."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, *_: Any) -> None:
        import_modules(namespace.imports, source="--import")
        parser.epilog = _known_names()
        parser.print_help()
        parser.exit()


def _known_names() -> str:
    """The hosts and the registered policies, with the parameters that --set takes."""
    hosts = [f"  {hosts}: {place}" for hosts, place in known_hosts().items()]
    policies = [f"  {name}{_parameters_of(recipe)}" for name, recipe in sorted(POLICIES.module_dict.items())]
    parts = [
        f"  {key}: {', '.join(sorted(registry.module_dict))}"
        for key, registry in (("density", DENSITIES), ("weighting", WEIGHTINGS), ("draw", DRAWS))
    ]
    lines = [
        "known hosts, and what is looked for in their scripts:",
        *hosts,
        "policies, with the parameters for --set:",
        *policies,
        "parts for --set, of a named policy or alone:",
        *parts,
        "  scope: mse, loss",
        "options of every policy for --set: stratified, normalize, equivalent_to, shift, window",
        "Meanings: docs/policies.md and docs/configs.md. By hand: docs/index.md and integrations/README.md.",
    ]
    return "\n".join(fill(line, 100, subsequent_indent="      ", break_on_hyphens=False) for line in lines)


def _parameters_of(recipe: Any) -> str:
    names = [name for name in inspect.signature(recipe).parameters if name != "schedule"]
    return f" ({', '.join(names)})" if names else ""
