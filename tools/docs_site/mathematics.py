"""Formulas of the pages as MathML. Browsers draw it by themselves: no script, no font, no network."""

import html
import re

from latex2mathml.converter import convert

# What pymdownx.arithmatex makes of $...$ and of $$...$$.
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def with_mathml(page: str) -> str:
    """HTML of a page with MathML in place of its LaTeX.

    Raises:
        ValueError: a command that the converter does not know.
    """
    page = _BLOCK.sub(lambda found: f'<div class="formula">{mathml(found[1], "block")}</div>', page)
    return _INLINE.sub(lambda found: mathml(found[1], "inline"), page)


def mathml(latex: str, display: str) -> str:
    """LaTeX, escaped for HTML, as a MathML element; `display` is block or inline.

    Raises:
        ValueError: a command that the converter does not know.
    """
    text = html.unescape(latex).strip()
    element: str = convert(text, display=display)
    if unknown := re.search(r"\\\w*", element):
        raise ValueError(f"formula {text!r} has {unknown.group()!r}, which MathML does not")
    return element
