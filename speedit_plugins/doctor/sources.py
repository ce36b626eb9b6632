"""A training script and the modules of its project that it imports, read and parsed. None of them is run."""

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from speedit_plugins.launch_options import LaunchError

# A folder with one of these is the root of a project.
_ROOT_MARKS = (".git", "pyproject.toml", "setup.py", "setup.cfg", "LICENSE*")
# Calls that import modules whose names the text of a script may not have.
_IMPORTERS = ("__import__", "import_dir", "import_module", "iter_modules", "walk_packages")
MAX_MODULES = 300


@dataclass(frozen=True)
class Source:
    """A Python file.

    Args:
        path: of the file, absolute.
        name: the path from the script's folder, or from the project's root if it is not in that folder.
        text, tree: of the whole file.
    """

    path: Path
    name: str
    text: str = field(repr=False)
    tree: ast.Module = field(repr=False)

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """Every node of the file, the outer ones first."""
        return tuple(ast.walk(self.tree))

    @cached_property
    def parents(self) -> dict[ast.AST, ast.AST]:
        """The node around each node."""
        return {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}

    def binds(self, names: Iterable[str]) -> bool:
        """Whether the file defines or imports one of these names."""
        kinds = (ast.FunctionDef, ast.ClassDef, ast.alias)
        wanted = {name for name in names if name in self.text}
        return bool(wanted) and any(node.name in wanted for node in self.nodes if isinstance(node, kinds))

    def has_word(self, word: str) -> bool:
        """Whether a name is anywhere in the text, as a whole word."""
        # A plain search first: most files have none of the names that are asked for.
        return word in self.text and re.search(rf"\b{re.escape(word)}\b", self.text) is not None


@dataclass(frozen=True)
class Project:
    """What was read.

    Args:
        root: the project's folder.
        folders: see `folders_of`.
        sources: the script; modules that were asked for; what the script imports; what these import.
        unread: modules that could not be read, by name.
        is_cut: whether there are more than `MAX_MODULES`.
    """

    root: Path
    folders: tuple[Path, ...]
    sources: tuple[Source, ...]
    unread: tuple[str, ...] = ()
    is_cut: bool = False

    @property
    def script(self) -> Source:
        return self.sources[0]


def read_project(script: str, *also: str) -> Project:
    """A script and its project's modules.

    Args:
        script: its path.
        also: paths of more modules, from one of the project's folders; one that is missing is left out.

    Raises:
        LaunchError: there is no such file, or it is not Python.
    """
    path = Path(script)
    if not path.is_file():
        raise LaunchError(f"no script {script!r}")
    path = path.resolve()
    root = root_of(path)
    folders = folders_of(path, root)
    try:
        first = _read(path, folders)
    except (SyntaxError, ValueError) as error:
        raise LaunchError(f"{script} is not Python that this interpreter reads: {error}") from error
    sources, unread = [first], list[str]()
    seen = {path}
    waiting = [*_present(also, folders), *_imported(first, folders)]
    # The list grows while it is read: what the script imports comes before what its modules import.
    for found in waiting:
        if found in seen:
            continue
        seen.add(found)
        if len(sources) > MAX_MODULES:
            return Project(root, folders, tuple(sources), tuple(unread), is_cut=True)
        source = read_file(found, folders)
        if source is None:
            unread.append(_short(found, folders))
        else:
            sources.append(source)
            waiting += _imported(source, folders)
    return Project(root, folders, tuple(sources), tuple(unread))


def read_file(path: Path, folders: Sequence[Path]) -> Source | None:
    """A file in one of a project's folders; None if it cannot be read, or is not Python."""
    try:
        return _read(path, folders)
    except (SyntaxError, ValueError, OSError):
        return None


def imported_names(tree: ast.Module) -> Iterator[str]:
    """Dotted names of the modules that a file imports by name; `a.b.c` too for `from a.b import c`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folders_of(script: Path, root: Path) -> tuple[Path, ...]:
    """Where a project may have its modules: the script's folder, those around it up to the root, and src."""
    around = [folder for folder in script.parents if folder.is_relative_to(root)]
    # Examples import the installed package, and what trains is in the example.
    is_example = "examples" in script.relative_to(root).parts
    sources = [] if is_example or not (root / "src").is_dir() else [root / "src"]
    return tuple(dict.fromkeys([*around, *sources]))


def _read(path: Path, folders: Sequence[Path]) -> Source:
    text = path.read_text(encoding="utf-8-sig")
    return Source(path, _short(path, folders), text, ast.parse(text, filename=str(path)))


def _short(path: Path, folders: Sequence[Path]) -> str:
    """A path from the first of these folders, the script's, or else from the widest."""
    inside = [folder for folder in folders if path.is_relative_to(folder)]
    start = folders[0] if folders[0] in inside else min(inside, key=lambda folder: len(folder.parts))
    return path.relative_to(start).as_posix()


def root_of(path: Path) -> Path:
    """The nearest folder around a script that looks like a project's root; else the script's folder."""
    for folder in path.parents:
        if any(next(folder.glob(mark), None) is not None for mark in _ROOT_MARKS):
            return folder
    return path.parent


def _present(names: Iterable[str], folders: Sequence[Path]) -> Iterator[Path]:
    for name in names:
        yield from [folder / name for folder in folders if (folder / name).is_file()][:1]


def _imported(source: Source, folders: Sequence[Path]) -> Iterator[Path]:
    """Files that a file imports, with the packages around them."""
    for node in source.nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from files_of(folders, alias.name)
        elif isinstance(node, ast.ImportFrom):
            start = [source.path.parents[node.level - 1]] if node.level else folders
            prefix = f"{node.module}." if node.module else ""
            for alias in node.names:
                yield from files_of(start, f"{prefix}{alias.name}")
        elif isinstance(node, ast.Call) and _last_name(node.func) in _IMPORTERS:
            yield from _imported_by_call(source, node, folders)


def _imported_by_call(source: Source, call: ast.Call, folders: Sequence[Path]) -> Iterator[Path]:
    """Files that `import_module` and the like may import."""
    for text in (_beginning(value) for value in call.args):
        name = text.rstrip(".")
        if name.isidentifier() or "." in name.lstrip("."):
            yield from files_of(folders, name)
            yield from _below(_folder(folders, name))
    if source.path.name == "__init__.py" and not any(isinstance(value, ast.Constant) for value in call.args):
        yield from _below(source.path.parent)


def files_of(folders: Sequence[Path], module: str) -> list[Path]:
    """The files that importing a module runs; empty if no folder has it."""
    for folder in folders:
        found, here = [], folder
        for part in module.split("."):
            here = here / part
            init, plain = here / "__init__.py", here.with_name(f"{part}.py")
            if here.is_dir():
                found += [init] if init.is_file() else []
            elif plain.is_file():
                return [*found, plain]
            else:
                # The last name may be a class or a function of the module before it.
                break
        if found:
            return found
    return []


def _folder(folders: Sequence[Path], module: str) -> Path | None:
    places = (folder.joinpath(*module.split(".")) for folder in folders)
    return next((place for place in places if place.is_dir()), None)


def _below(folder: Path | None) -> list[Path]:
    return [] if folder is None else sorted(folder.rglob("*.py"))


def module_file(folders: Sequence[Path], module: str) -> Path | None:
    """The file of a module itself, None if no folder has it."""
    files = files_of(folders, module)
    last = module.split(".")[-1]
    is_module = bool(files) and last in (files[-1].stem, files[-1].parent.name)
    return files[-1] if is_module else None


def _beginning(value: ast.expr) -> str:
    """The text at the start of a string expression; "" if it begins with something else."""
    first = value.values[0] if isinstance(value, ast.JoinedStr) and value.values else value
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
