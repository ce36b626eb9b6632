"""What MkDocs calls while `make docs` builds the site: pages made from the source, figures, formulas.

Nothing in the site is loaded from the network; the last step looks.
"""

import re
from itertools import product
from pathlib import Path
from typing import Any

# MkDocs looks beside this file while it imports it.
from docs_site import components, config_keys, figures, mathematics, pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from speedit_plugins.registry import POLICIES

_FIGURE = re.compile(r"<!-- figure: ([\w-]+) -->")
_KEYS = "<!-- generated: config keys -->"
_HOSTS = "<!-- figure of hosts -->"
_HOSTS_FIGURE = "![laws of auto and of four trainers, over time and over log-SNR](figures/hosts.svg)"
# Scripts, styles, fonts and images; links that a reader may click are no loads.
_LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?https?://|<link\b[^>]*rel=\"?stylesheet[^>]*https?://"
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages whose names are known at build time alone into the navigation."""
    filled = {"frameworks": pages.framework_titles(), "benchmarks": pages.benchmark_titles()}
    filled["api"] = [(page.title, f"api/{name}.md") for name, page in pages.REFERENCE.items()]
    for section in config.nav or []:
        for title, entries in section.items():
            if isinstance(entries, list):
                section[title] = _expanded(entries, filled)
    return config


def _expanded(entries: list[Any], filled: dict[str, list[tuple[str, str]]]) -> list[Any]:
    """Entries of a section, with `...NAME` replaced by the pages of that name."""
    expanded: list[Any] = []
    for entry in entries:
        if isinstance(entry, str) and entry.startswith("..."):
            expanded += [{title: path} for title, path in filled[entry.removeprefix("...")]]
        else:
            expanded.append(entry)
    return expanded


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and figures that are made from the source."""
    made = [*pages.frameworks(), *pages.reference(), *pages.project_files()]
    made.append(("components.md", components.markdown()))
    for path, text in made:
        files.append(File.generated(config, path, content=text))
    for name, table in product(POLICIES.module_dict, figures.TABLES):
        drawn = figures.policy_figure(name, table)
        files.append(File.generated(config, f"figures/{name}-{table}.svg", content=drawn))
    files.append(File.generated(config, "figures/hosts.svg", content=figures.comparison()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts keys, figures and links of the site in the place of their marks."""
    if page.file.src_uri == "policies.md":
        _check_policies(set(_FIGURE.findall(markdown)))
    if _KEYS in markdown:
        markdown = markdown.replace(_KEYS, config_keys.markdown())
    markdown = _FIGURE.sub(_figure, markdown).replace(_HOSTS, _HOSTS_FIGURE)
    return pages.with_framework_links(markdown)


def _check_policies(shown: set[str]) -> None:
    registered = set(POLICIES.module_dict)
    if shown != registered:
        raise PluginError(
            f"docs/policies.md shows every registered policy: missing {sorted(registered - shown)}, unknown"
            f" {sorted(shown - registered)}"
        )


def _figure(found: "re.Match[str]") -> str:
    name = found[1]
    images = [
        f"![{figures.alternative_text(name, table)}](figures/{name}-{table}.svg){{ .policy }}"
        for table in figures.TABLES
    ]
    return "\n".join([*images, "", f"*{figures.view_of(name).note}*"])


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns formulas into MathML."""
    try:
        return mathematics.with_mathml(html)
    except ValueError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error


def on_post_build(config: MkDocsConfig) -> None:
    """Looks for anything that a browser would load from the network."""
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        if found := _LOADED.search(path.read_text(encoding="utf-8")):
            raise PluginError(f"{path.relative_to(config.site_dir)} loads from the network: {found[0]}")
