"""Trainers and their flags on a command line: `--host NAME`, and the trainer's own flags after it."""

import contextlib
from collections.abc import Collection, Sequence
from typing import Any

import yaml

from speedit_plugins.hosts.laws.laws import HOSTS, Config, host_config


def split_hosts(words: Sequence[str], own: Collection[str]) -> tuple[list[str], list[list[str]]]:
    """The words of the command itself, and the words after each --host.

    The words of a host end at the next --host, and at the next option of the command.

    Args:
        words: the command line.
        own: options of the command, with their hyphens.

    Example:
        >>> split_hosts(["--host", "sit", "--path-type", "Linear", "--plot", "a.png"], ["--plot"])
        (['--plot', 'a.png'], [['sit', '--path-type', 'Linear']])
    """
    rest: list[str] = []
    blocks: list[list[str]] = []
    target = rest
    for word in words:
        option, equals, name = word.partition("=")
        if option == "--host":
            blocks.append([name] if equals else [])
            target = blocks[-1]
            continue
        target = rest if option in own else target
        target.append(word)
    return rest, blocks


def host_configs(blocks: Sequence[Sequence[str]]) -> dict[str, Config]:
    """The config of each host, under its name and the values of its flags.

    Raises:
        ValueError: a host or a flag that is not known, or a value that does not fit.

    Example:
        >>> host_configs([["sd-scripts", "--timestep_sampling", "uniform"]])
        {'sd-scripts uniform': {'density': 'uniform', 'weighting': 'constant'}}
    """
    configs: dict[str, Config] = {}
    for block in blocks:
        if not block:
            raise ValueError(f"--host needs a name, one of {', '.join(sorted(HOSTS.module_dict))}")
        config = host_config(block[0], _flags(block[0], block[1:]))
        values = [word.partition("=")[2] if word.startswith("--") else word for word in block]
        title = " ".join(value for value in values if value)
        configs[title if title not in configs else " ".join(block)] = config
    return configs


def value_of(text: str, what: str) -> Any:
    """The value that a YAML text means. 1e-3 is a number too.

    Raises:
        ValueError: no YAML; the message begins with `what`.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{what} needs a YAML value, got {text!r}: {error}") from error
    # YAML reads 1e-3 as a string.
    with contextlib.suppress(ValueError):
        value = float(value) if isinstance(value, str) else value
    return value


def _flags(host: str, words: Sequence[str]) -> dict[str, Any]:
    """Flags as `--name value`, `--name=value` or, for true, `--name`. A hyphen in a name is an underscore."""
    flags: dict[str, Any] = {}
    waiting = ""
    for word in words:
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            name = name.replace("-", "_")
            waiting = "" if equals else name
            flags[name] = value_of(text, word) if equals else True
        elif waiting:
            flags[waiting], waiting = value_of(word, f"--{waiting}"), ""
        else:
            raise ValueError(f"--host {host} needs flags as --name value, got {word!r}")
    return flags
