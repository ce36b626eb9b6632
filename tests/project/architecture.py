"""The rules of CONTRIBUTING.md that a parser can check. Each rule maps a file to its findings."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "speedit_plugins"

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_ARGUMENTS = 8
# Each limit was set at least 15 % above the count at the time, so that it leaves room for a good change.
# What all policies share. Densities, weightings and recipes are not counted: each of them is read alone.
MAX_METHOD_LINES = 1300
MAX_STEP_PATH_LINES = 1250

# The files to read, in this order, to follow one training step from the loop to the loss. The limit counts
# lines of code, so leaving out documentation gains nothing.
STEP_PATH = (
    "trainer/training/trainer.py",
    "trainer/training/step_draws.py",
    "trainer/accelerations/objective.py",
    "trainer/inputs.py",
    "trainer/parallel/replica.py",
    "trainer/diffusion/gaussian_process.py",
    "trainer/diffusion/gaussian.py",
    "policies/policy.py",
)

# The parts of the package that each part may import, besides itself. A part is a module or folder at the top
# of the package, or one in trainer/.
_GROUND = {"registry", "files", "version"}
_METHOD = _GROUND | {"policies"}
_FLOOR = _METHOD | {
    f"trainer/{name}"
    for name in (
        "terminal",
        "condition",
        "config",
        "exhaustion",
        "model_copies",
        "saved_configs",
        "shards",
        "weight_files",
    )
}
_PARTS = _FLOOR | {f"trainer/{name}" for name in ("data", "models", "diffusion", "evaluation", "parallel")}
_SHARED = _PARTS | {
    f"trainer/{name}"
    for name in (
        "layouts",
        "inputs",
        "build",
        "low_resolution",
        "checkpoints",
        "results",
    )
}
MAY_IMPORT: dict[str, set[str]] = {
    "version": set(),
    "files": set(),
    "registry": set(),
    "policies": _GROUND,
    "hosts": _METHOD,
    # The launcher: its command line, what it replaces in a host, what it says without a run, and the run.
    "launch_options": _METHOD | {"hosts"},
    "launch_seams": _METHOD | {"hosts", "launch_options"},
    "doctor": _METHOD | {"hosts", "launch_options"},
    "launch": _METHOD | {"hosts", "launch_options", "launch_seams", "doctor"},
    "__init__": _METHOD | {"hosts"},
    "trainer/__init__": set(),
    "trainer/terminal": set(),
    "trainer/exhaustion": _GROUND | {"trainer/config"},
    "trainer/streams": set(),
    "trainer/condition": set(),
    "trainer/model_copies": set(),
    "trainer/saved_configs": set(),
    "trainer/shards": set(),
    "trainer/weight_files": set(),
    "trainer/config": _METHOD,
    "trainer/data": _FLOOR - {"trainer/config"},
    "trainer/models": _FLOOR - {"trainer/config"},
    "trainer/diffusion": _FLOOR - {"trainer/config"},
    "trainer/evaluation": _FLOOR,
    "trainer/parallel": _FLOOR,
    "trainer/layouts": _PARTS,
    "trainer/inputs": _PARTS | {"trainer/layouts"},
    "trainer/build": _PARTS | {"trainer/layouts", "trainer/inputs"},
    "trainer/low_resolution": _PARTS | {"trainer/inputs", "trainer/build"},
    "trainer/accelerations": _PARTS | {"trainer/inputs", "trainer/build"},
    "trainer/checkpoints": _PARTS,
    "trainer/results": _PARTS | {"trainer/checkpoints"},
    "trainer/starting_weights": _PARTS | {"trainer/checkpoints"},
    "trainer/logging": _SHARED,
    "trainer/sampling": _SHARED | {"trainer/starting_weights", "trainer/logging"},
    "trainer/training": _SHARED
    | {"trainer/starting_weights", "trainer/logging", "trainer/sampling", "trainer/accelerations"},
    "cli": _SHARED | {"trainer/streams", "trainer/logging", "trainer/sampling", "trainer/training"},
    # The command in three parts: the command line, the samples that it reads, and what it says about them.
    "spectrum_samples": _FLOOR | {"trainer/data", "trainer/models"},
    "spectrum_report": _METHOD,
    "spectrum_command": _FLOOR | {"trainer/models", "spectrum_samples", "spectrum_report"},
}

# Tools that run a host import the packages that the host is made of.
_HOST_TOOLS = ("tools/*_training.py", "tools/whole_trainings/*.py")
# Heavy or optional packages, and the files that may import them, even inside a function. A path is relative
# to the package, or to the project's root.
CONFINED: dict[str, tuple[str, ...]] = {
    "mmengine": ("hosts/*.py", "trainer/config/loading.py", *_HOST_TOOLS),
    "colossalai": ("trainer/parallel/booster.py", "trainer/parallel/colossal_setup.py", *_HOST_TOOLS),
    "diffusers": (
        "trainer/models/pretrained/autoencoder.py",
        "trainer/models/pretrained/exported.py",
        "trainer/models/pretrained/exported_adapters.py",
        "trainer/models/text_conditioned/*.py",
        "trainer/diffusion/sampling.py",
        *_HOST_TOOLS,
    ),
    "bitsandbytes": ("trainer/parallel/optimizers/__init__.py", *_HOST_TOOLS),
    "prodigyopt": ("trainer/parallel/optimizers/__init__.py",),
    "schedulefree": ("trainer/parallel/optimizers/__init__.py",),
    "peft": ("trainer/models/lora.py", "trainer/models/pretrained/exported_adapters.py", *_HOST_TOOLS),
    "transformers": (
        "trainer/models/pretrained/text.py",
        "trainer/models/pretrained/vision.py",
        *_HOST_TOOLS,
    ),
    "av": ("trainer/data/videos/files.py",),
    "pyarrow": ("trainer/data/parquet_files.py",),
    "datasets": ("trainer/data/archives/saved.py",),
    "einops": ("trainer/*.py",),
    "trimesh": ("trainer/data/shapes/meshes.py",),
    "skimage": ("trainer/data/shapes/solid_meshes.py",),
    "sklearn": ("trainer/data/images/digits.py",),
    "wandb": ("trainer/logging/loggers.py",),
    "xformers": ("trainer/models/layers/attention.py",),
    # The launcher reads a policy from YAML where the host has omegaconf.
    "omegaconf": (
        "launch_options.py",
        "trainer/config/loading.py",
        "trainer/models/weights.py",
        *_HOST_TOOLS,
    ),
}

_POLICY_NAMES = {"TimestepPolicy", "TimestepDraw", "build_policy"}
_VAGUE_NAMES = {"util", "utils", "misc", "common", "helper", "helpers", "base"}
# The words are in two pieces, so that this file obeys its own rules.
_LEFTOVER = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b")
_MACHINE_PATH = re.compile(r"(?<![\w./])/(work|root|home|Users)(?![\w-])")
_SUPPRESSION = re.compile(r"noqa(:\s*[A-Z]+\d+([,\s]+[A-Z]+\d+)*)?|type:\s*ignore(\[[\w\s,-]+\])?")

Finding = tuple[int, str]
Rule = Callable[["Source"], Iterator[Finding]]


@dataclass(frozen=True)
class Source:
    """A text file. `path` is relative to the project's root, with forward slashes."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def tokens(self) -> list[tokenize.TokenInfo]:
        return list(tokenize.generate_tokens(io.StringIO(self.text).readline))

    @property
    def in_package(self) -> str:
        """The path relative to the package, '' for a file outside of it."""
        return self.path.removeprefix(f"{PACKAGE}/") if self.path.startswith(f"{PACKAGE}/") else ""

    @property
    def part(self) -> str:
        """The key of MAY_IMPORT that this file belongs to."""
        return part_of(self.in_package.removesuffix(".py").split("/"))


def part_of(names: Sequence[str]) -> str:
    """The part that a path belongs to: `hosts` for hosts/flow, `trainer/data` for trainer/data/loader."""
    return "/".join(names[: 2 if names[0] == "trainer" else 1])


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import, also inside functions.

    `from a.b import c` gives a.b.c, `import_module("a.b")` gives a.b, `import_module(f"a.{name}")` gives a.*
    """
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).split(".")[-1]
            if called in ("import_module", "__import__"):
                yield node.lineno, _pattern(node.args[0])


def _pattern(name: ast.expr) -> str:
    """The text of a string expression, with * in place of each inserted value."""
    pieces = name.values if isinstance(name, ast.JoinedStr) else [name]
    return "".join(str(piece.value) if isinstance(piece, ast.Constant) else "*" for piece in pieces)


def functions(source: Source) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (
        node for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def code_lines(source: Source) -> int:
    """Number of lines that are not blank, and not only a comment or docstring."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    silent |= {tokenize.ENDMARKER}
    code: set[int] = set()
    for token in source.tokens:
        if token.type not in silent:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(source.tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            code.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(code)


def import_direction(source: Source) -> Iterator[Finding]:
    if source.part not in MAY_IMPORT:
        yield 1, f"part {source.part!r} has no place in MAY_IMPORT"
        return
    allowed = MAY_IMPORT[source.part] | {source.part}
    for line, name in imports(source):
        top, _, below = name.partition(".")
        if top == PACKAGE and part_of(below.split(".")) not in allowed:
            yield line, f"{source.part} imports {name}; it may import {', '.join(sorted(allowed))}"


def method_imports_torch_only(source: Source) -> Iterator[Finding]:
    for line, name in imports(source):
        # "*" is a module whose name is known only at run time: the registry imports modules of other people.
        if name.split(".")[0] not in {*sys.stdlib_module_names, "torch", PACKAGE, "*"}:
            yield line, f"the method imports {name}; it may import torch and the standard library"


def confined_package(source: Source) -> Iterator[Finding]:
    for line, name in imports(source):
        homes = CONFINED.get(name.split(".")[0])
        if homes is not None and not any(fnmatch(source.in_package or source.path, home) for home in homes):
            yield line, f"imports {name}, which only {', '.join(homes)} may"


def sampling_without_policy(source: Source) -> Iterator[Finding]:
    """Sampling may import the noise schedule, and no other part of the method. Policies are for training."""
    for line, name in imports(source):
        if name.startswith(f"{PACKAGE}.policies") and not name.startswith(f"{PACKAGE}.policies.schedule."):
            yield line, f"sampling imports {name}"
        if name.split(".")[-1] in _POLICY_NAMES:
            yield line, f"sampling imports {name}"


def explicit_imports(source: Source) -> Iterator[Finding]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "relative import"
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield node.lineno, "star import"


def size(source: Source) -> Iterator[Finding]:
    lines = len(source.text.splitlines())
    if lines > MAX_FILE_LINES:
        yield 1, f"{lines} lines; wanted <= {MAX_FILE_LINES}"
    for function in functions(source):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > MAX_FUNCTION_LINES:
            yield function.lineno, f"{function.name} has {length} lines; wanted <= {MAX_FUNCTION_LINES}"
        given = function.args
        count = len([arg for arg in given.posonlyargs + given.args if arg.arg not in ("self", "cls")])
        count += len(given.kwonlyargs)
        # Ruff has the same rule. A suppression of its finding, with a reason, counts here too.
        excused = "noqa: PLR0913" in source.text.splitlines()[function.lineno - 1]
        if count > MAX_ARGUMENTS and not excused:
            yield function.lineno, f"{function.name} has {count} arguments; wanted <= {MAX_ARGUMENTS}"


def no_print(source: Source) -> Iterator[Finding]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            yield node.lineno, "print in the package"


def no_pickle(source: Source) -> Iterator[Finding]:
    """torch.load needs a literal weights_only=True. allow_pickle, if given, needs a literal False."""
    bare = any(name == "torch.load" for _, name in imports(source))
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (called == "torch.load" or (bare and called == "load")) and options.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if options.get("allow_pickle", "False") != "False":
            yield node.lineno, "allow_pickle is not False"


def no_leftovers(source: Source) -> Iterator[Finding]:
    for number, line in enumerate(source.text.splitlines(), 1):
        if found := _LEFTOVER.search(line):
            yield number, f"{found.group()} left"
        if found := _MACHINE_PATH.search(line):
            yield number, f"a path of one machine: {found.group()}"


def telling_name(source: Source) -> Iterator[Finding]:
    vague = _VAGUE_NAMES & set(source.path.removesuffix(".py").split("/"))
    if vague:
        yield 1, f"a module is named for what it does, not {', '.join(sorted(vague))}"


def public_docstrings(source: Source) -> Iterator[Finding]:
    for node in source.tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if not node.name.startswith("_") and not ast.get_docstring(node):
            yield node.lineno, f"{node.name} has no docstring"


def reasoned_suppression(source: Source) -> Iterator[Finding]:
    """A comment that silences a tool gives a reason: at least one word besides the directive."""
    for token in source.tokens:
        reason, silenced = _SUPPRESSION.subn("", token.string)
        if token.type == tokenize.COMMENT and silenced and not re.search(r"[A-Za-z]{2,}", reason):
            yield token.start[0], f"{token.string!r} carries no reason"


def step_path_findings(sources: Sequence[Source], paths: Sequence[str] = STEP_PATH) -> list[str]:
    """Missing files of the step path, too many lines, and files that no other file of it imports."""
    found = {source.in_package: source for source in sources if source.in_package in paths}
    if missing := [path for path in paths if path not in found]:
        return [f"missing: {', '.join(missing)}"]
    findings = []
    lines = sum(code_lines(found[path]) for path in paths)
    if lines > MAX_STEP_PATH_LINES:
        findings.append(f"{lines} lines of code")
    named = {name for path in paths for _, name in imports(found[path])}
    for path in paths[1:]:
        module = f"{PACKAGE}.{path.removesuffix('.py').replace('/', '.')}"
        if not any(fnmatch(module, name) or name.startswith(f"{module}.") for name in named):
            findings.append(f"{path}: no file of the path imports it")
    return findings


@cache
def project_files() -> tuple[Path, ...]:
    """Every file that git tracks or would add. Without git, every file outside hidden and built folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split(
            "\0"
        )
        paths = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        skipped = re.compile(r"^(\.(?!ci/)|outputs/|build/|dist/)|\.egg-info/|__pycache__/")
        paths = [path for path in ROOT.rglob("*") if not skipped.search(path.relative_to(ROOT).as_posix())]
    return tuple(path for path in sorted(paths) if path.is_file())


@cache
def project() -> tuple[Source, ...]:
    """The text files of the project."""
    sources = []
    for path in project_files():
        try:
            sources.append(Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue  # a picture, a video, an archive
    return tuple(sources)
