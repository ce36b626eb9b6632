"""Our docstrings as griffe reads them; it reads for the API reference and for the tables of parameters.

Two habits differ: our section `Example:` is its `Examples:`, and we write `alpha, sigma: text` where two
arguments have one text.
"""

import re
from typing import Any

from griffe import Docstring, DocstringSectionParameters, Extension, Object, Parser

# An entry of a section for several names, with the deeper lines that go on with it.
_SHARED = re.compile(r"^    (\w+(?:, \w+)+): (.*(?:\n {8}.*)*)$", re.MULTILINE)


class OurDocstrings(Extension):
    """Griffe's extension: changes each docstring as it is read."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Changes the docstring of one object; griffe calls it for every object that it reads."""
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)


def readable(text: str) -> str:
    """A docstring without indentation in the form that griffe knows."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return _SHARED.sub(lambda found: _each(found[1].split(", "), found[2]), text)


def parameters(text: str) -> dict[str, str]:
    """What a docstring without indentation says of each parameter, as one line."""
    sections = Docstring(readable(text)).parse(Parser.google, warnings=False)
    return {
        item.name: " ".join(str(item.description).split())
        for section in sections
        if isinstance(section, DocstringSectionParameters)
        for item in section.value
    }


def _each(names: list[str], text: str) -> str:
    return "\n".join(f"    {name}: {text}" for name in names)
