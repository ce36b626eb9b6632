"""Pages that are not in docs/: one for each framework, the reference of the API, and files of the root.

A page is a path in the site and its Markdown. A framework's page is its README in integrations/.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import speedit_plugins

ROOT = Path(__file__).resolve().parents[2]
INTEGRATIONS = ROOT / "integrations"
# Suffix of a file beside a framework's README -> language of its block.
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".patch": "diff"}


@dataclass(frozen=True)
class Reference:
    """A page of the API reference: title, what it holds, and the names on it, in reading order.

    A name that ends in `.*` is every module of a package that no other name of the page has.
    """

    title: str
    text: str
    names: tuple[str, ...]

    def resolved(self) -> list[str]:
        """The names, with modules in the place of `.*`."""
        found: list[str] = []
        for name in self.names:
            package, is_all, _ = name.partition(".*")
            folder = ROOT / package.replace(".", "/")
            stems = sorted(path.stem for path in folder.glob("[!_]*.py"))
            named = [f"{package}.{stem}" for stem in stems] if is_all else [name]
            found += [module for module in named if module not in found]
        return found


def _public_names() -> list[str]:
    return [name for name in speedit_plugins.__all__ if callable(getattr(speedit_plugins, name))]


REFERENCE = {
    "public": Reference(
        "Public names",
        "What `import speedit_plugins` gives. Nothing heavy is imported before a name is used.",
        tuple(f"{getattr(speedit_plugins, name).__module__}.{name}" for name in _public_names()),
    ),
    "policies": Reference(
        "Policies and their parts",
        "The method: named policies, and the densities, weightings and draws that they are made of.",
        (
            "speedit_plugins.policies.recipes.*",
            "speedit_plugins.policies.densities.*",
            "speedit_plugins.policies.weightings.*",
            "speedit_plugins.policies.*",
        ),
    ),
    "hosts": Reference(
        "Seams of other people's code",
        "One module for each place where a framework draws its timesteps. The frameworks' own pages say which"
        " one to use; `python -m speedit_plugins.launch` finds it by itself.",
        (
            "speedit_plugins.hosts.entry",
            "speedit_plugins.launch",
            "speedit_plugins.hosts.*",
        ),
    ),
    "registry": Reference(
        "Registry",
        "How a name in a config becomes an object, and how names of your own come in.",
        ("speedit_plugins.registry",),
    ),
    "trainer": Reference(
        "The trainer's main parts",
        "For readers of the trainer's code, and for those who build on it.",
        (
            "speedit_plugins.trainer.config.loading",
            "speedit_plugins.trainer.training.*",
            "speedit_plugins.trainer.diffusion.*",
            "speedit_plugins.trainer.sampling.*",
            "speedit_plugins.trainer.sampling.files.*",
            "speedit_plugins.trainer.sampling.inpainting.*",
            "speedit_plugins.trainer.sampling.super_resolution.*",
            "speedit_plugins.trainer.sampling.scores.*",
            "speedit_plugins.trainer.checkpoints.*",
        ),
    ),
}


def frameworks() -> Iterator[tuple[str, str]]:
    """The overview of frameworks, then each one's page with the files that lie beside its README."""
    yield "integrations/README.md", _with_site_links(_read(INTEGRATIONS / "README.md"), "../")
    for readme in sorted(INTEGRATIONS.glob("*/README.md")):
        text = _with_site_links(_read(readme), "../../")
        yield f"integrations/{readme.parent.name}/README.md", text + _files_beside(readme)


def framework_titles() -> list[tuple[str, str]]:
    """(title, path) of each framework's page, by title."""
    pages = [(_title(text), path) for path, text in frameworks()]
    return sorted(pages[1:], key=lambda page: page[0].lower())


def reference() -> Iterator[tuple[str, str]]:
    """The pages of the API reference; mkdocstrings fills in what the names document."""
    for path, page in REFERENCE.items():
        names = "\n\n".join(_directive(name, page) for name in page.resolved())
        yield f"api/{path}.md", f"# {page.title}\n\n{page.text}\n\n{names}\n"


def _directive(name: str, page: Reference) -> str:
    """What mkdocstrings reads: a module is shown without the public names, which have a page of their own.

    A module with no other name is not shown.
    """
    public = REFERENCE["public"]
    elsewhere = [] if page is public else [other.rpartition(".")[2] for other in public.names]
    path = ROOT / f"{name.replace('.', '/')}.py"
    if path.is_file() and not set(_public_definitions(path)) - set(elsewhere):
        return ""
    hidden = ", ".join(f'"!{pattern}"' for pattern in ("^_", *(f"^{other}$" for other in elsewhere)))
    return f"::: {name}\n    options:\n      filters: [{hidden}]"


def _public_definitions(path: Path) -> list[str]:
    """Names of the functions and classes of a file."""
    tree = ast.parse(_read(path))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


def project_files() -> Iterator[tuple[str, str]]:
    """Files of the root that are pages too."""
    yield "contributing.md", _with_site_links(_read(ROOT / "CONTRIBUTING.md"), "")
    yield "changelog.md", _with_site_links(_read(ROOT / "CHANGELOG.md"), "")


def benchmark_titles() -> list[tuple[str, str]]:
    """(title, path) of each dated report, newest first."""
    reports = sorted((ROOT / "docs" / "benchmarks").glob("[0-9]*.md"), reverse=True)
    return [(_title(_read(report)), f"benchmarks/{report.name}") for report in reports]


def with_framework_links(markdown: str) -> str:
    """A page of docs/ with links to ../integrations/ and ../CONTRIBUTING.md as links within the site."""
    text = markdown.replace("](../integrations/", "](integrations/")
    return text.replace("](../CONTRIBUTING.md", "](contributing.md")


def _with_site_links(markdown: str, up: str) -> str:
    """Links of a file outside docs/ as links within the site, whose root is docs/."""
    return re.sub(r"\]\((?:\.\./)*docs/", f"]({up}", markdown)


def _files_beside(readme: Path) -> str:
    lines = []
    for path in sorted(readme.parent.iterdir()):
        if path.suffix in _LANGUAGES:
            lines += ["", f"## {path.name}", "", f"```{_LANGUAGES[path.suffix]}", _read(path).rstrip(), "```"]
    return "\n".join([*lines, ""])


def _title(markdown: str) -> str:
    return markdown.partition("\n")[0].removeprefix("# ")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
