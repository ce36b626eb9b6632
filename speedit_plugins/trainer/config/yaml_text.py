"""Faults of a YAML file that its parser does not report, or not in a user's words, each with its line; and a
section in one line.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode

_STRING, _BOOL, _NULL, _INT = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "bool", "null", "int"))
# YAML 1.1 reads 010 as 8, and 1:30 as 90.
_SURPRISING = re.compile(r"[-+]?(0[0-7_]+|\d[\d_]*(:[0-5]?\d)+)")


def one_line(section: Mapping[str, Any]) -> str:
    """A section as a person writes it: its name alone if it has nothing else, else in YAML's braces.

    Example:
        >>> one_line({"type": "auto", "weighting": "p2"}), one_line({"type": "speed"})
        ('{type: auto, weighting: p2}', 'speed')
    """
    if list(section) == ["type"]:
        return str(section["type"])
    return yaml.safe_dump(dict(section), default_flow_style=True, sort_keys=False, width=10_000).strip()


def check_text(text: str) -> None:
    """Checks that the text is a mapping in YAML that means what it looks like, or empty.

    Raises:
        ValueError: it cannot be parsed, or has no keys at the top; a key is not a text or a number; a number
            means another one in YAML 1.1. The message begins with "line N: " and has nothing of the text
            but that key or number, as the text may hold a secret.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(_said(error, text.splitlines())) from None
    if root is None:
        return
    if not isinstance(root, MappingNode):
        kind = "a list" if isinstance(root, SequenceNode) else "a single text without a key"
        raise ValueError(f"line {root.start_mark.line + 1}: wanted keys at the top level, got {kind}")
    for node in _nodes(root):
        _check_keys(node)
        if isinstance(node, ScalarNode) and node.tag == _INT and (meant := other_number(node.value)):
            raise ValueError(f"line {node.start_mark.line + 1}: {meant}")


def other_number(text: str) -> str:
    """What is wrong with a number that YAML 1.1 reads as another, such as 010 or 1:30; "" if nothing is."""
    if not _SURPRISING.fullmatch(text):
        return ""
    return f"YAML reads {text} as the number {yaml.safe_load(text)}; wanted that number, or quotes for a text"


def _said(error: yaml.YAMLError, lines: list[str]) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "unreadable"
    if mark is None:
        return f"not valid YAML: {problem}"
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())] or line[mark.column : mark.column + 1] == "\t":
        problem = "a tab; YAML is indented with blanks"
    elif "found another document" in problem:
        problem = "a second document begins here (---); wanted one"
    elif "could not find expected ':'" in problem:
        problem += "; a key needs a blank after its colon, 'key: value'"
    return f"line {mark.line + 1}: not valid YAML: {problem}"


def _check_keys(node: Node) -> None:
    if not isinstance(node, MappingNode):
        return
    for key, _ in node.value:
        where = f"line {key.start_mark.line + 1}: "
        if isinstance(key, ScalarNode) and key.tag in (_BOOL, _NULL):
            meant = "a truth value" if key.tag == _BOOL else "null"
            raise ValueError(f"{where}YAML reads the key {key.value!r} as {meant}; wanted a name")
        if not isinstance(key, ScalarNode):
            raise ValueError(f"{where}wanted a name as the key, got a list or a section")


def _nodes(node: Node) -> Iterator[Node]:
    """The node and all nodes below it."""
    yield node
    if isinstance(node, MappingNode):
        for key, value in node.value:
            yield from (*_nodes(key), *_nodes(value))
    elif isinstance(node, SequenceNode):
        for item in node.value:
            yield from _nodes(item)
