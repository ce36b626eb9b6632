"""Builds the HTML of a report: one file without scripts or links, in the browser's light or dark theme."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

# About the width of the page, in pixels.
MAX_WIDTH = 1140
STYLE = Path(__file__).with_name("page.css")


def page(title: str, subtitle: str, sections: Mapping[str, str]) -> str:
    """The whole document. `sections` maps headings to their HTML, in order."""
    body = "".join(
        f"<section><h2>{escape(heading)}</h2>{content}</section>" for heading, content in sections.items()
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="quiet">{escape(subtitle)}</p>{body}</body></html>\n'
    )


def short(value: float | None) -> str:
    """A number in four digits; '-' for none."""
    return "-" if value is None else f"{value:.4g}"


def paragraph(text: str, *, is_quiet: bool = False) -> str:
    """A paragraph; quiet ones are for explanations and missing parts."""
    return f"<p{' class=quiet' if is_quiet else ''}>{escape(text)}</p>"


def facts(rows: Mapping[str, str]) -> str:
    """A table with two columns, names and texts."""
    cells = (f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows.items())
    return f"<table>{''.join(cells)}</table>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is the row's name and whose other columns are numbers."""
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = [
        f"<tr><th>{escape(first)}</th>"
        + "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
        + "</tr>"
        for first, *cells in rows
    ]
    return f'<div class="wide"><table><tr>{titles}</tr>{"".join(lines)}</table></div>'


def chart(title: str, svg: str, *, labels: Sequence[str] = ()) -> str:
    """A framed chart, with `labels` as its legend; '' if `svg` is empty."""
    if not svg:
        return ""
    keys = "".join(
        f'<span class="key"><svg viewBox="0 0 26 8"><path class="line c{number}" d="M0 4H26"/></svg>'
        f"{escape(label)}</span>"
        for number, label in enumerate(labels)
    )
    return f"<figure><figcaption>{escape(title)}{keys}</figcaption>{svg}</figure>"


def image(caption: str, path: Path, *, is_still: bool = False) -> str:
    """A PNG file, reduced to `MAX_WIDTH`. Unless `is_still`, a GIF of its name is used instead, unchanged."""
    moving = path.with_suffix(".gif")
    is_moving = not is_still and moving.is_file()
    uri = data_uri("image/gif", moving.read_bytes()) if is_moving else _still(path)
    text = escape(caption)
    return f'<figure><figcaption>{text}</figcaption><img alt="{text}" src="{uri}"></figure>'


def group(kind: str, figures: Sequence[str]) -> str:
    """Places figures side by side if there is room; `kind` is "charts" or "samples"."""
    return f'<div class="{kind}">{"".join(figures)}</div>'


def folded(summary: str, text: str) -> str:
    """Preformatted text that is folded until the reader clicks on it."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def data_uri(kind: str, content: bytes) -> str:
    """A data URI with the content of a file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _still(path: Path) -> str:
    with Image.open(path) as image:
        if image.width <= MAX_WIDTH:
            return data_uri("image/png", path.read_bytes())
        height = round(image.height * MAX_WIDTH / image.width)
        reduced = io.BytesIO()
        image.convert("RGB").resize((MAX_WIDTH, height), Image.Resampling.LANCZOS).save(
            reduced, "JPEG", quality=88
        )
    return data_uri("image/jpeg", reduced.getvalue())
