"""Every file keeps the architecture rules, and each rule tells bad examples from good ones."""

from collections.abc import Callable
from dataclasses import dataclass

import architecture
import pytest
from architecture import PACKAGE, Source, project


def in_package(path: str, text: str) -> Source:
    return Source(f"{PACKAGE}/{path}", text)


def script(text: str, path: str = "tools/program.py") -> Source:
    return Source(path, text)


def is_code(source: Source) -> bool:
    return source.path.endswith(".py")


def is_package(source: Source) -> bool:
    return is_code(source) and bool(source.in_package)


def is_shipped(source: Source) -> bool:
    return is_package(source) or (is_code(source) and source.path.startswith("tools/"))


@dataclass(frozen=True)
class Case:
    """A rule, the files it applies to, examples that break it, and examples that keep it."""

    rule: architecture.Rule
    applies: Callable[[Source], bool]
    bad: tuple[Source, ...]
    good: tuple[Source, ...]


CASES = (
    Case(
        architecture.import_direction,
        is_package,
        bad=(
            in_package("trainer/models/dit.py", f"def f():\n    from {PACKAGE}.trainer import data\n"),
            in_package("hosts/seam.py", f"import {PACKAGE}.trainer.training.ema\n"),
            in_package("trainer/build.py", f"importlib.import_module('{PACKAGE}.hosts')\n"),
            in_package("hosts/seam.py", f"import_module(f'{PACKAGE}.trainer.training.{{name}}')\n"),
            in_package("registry.py", f"from {PACKAGE}.policies import policy\n"),
            in_package("trainer/data/images/folder.py", f"from {PACKAGE} import build_policy\n"),
            in_package("trainer/sampling/grids.py", f"from {PACKAGE}.trainer.training import ema\n"),
            in_package("trainer/newcomer/part.py", ""),
        ),
        good=(
            in_package("trainer/models/dit.py", f"from {PACKAGE}.registry import MODELS\n"),
            in_package("trainer/build.py", f"from {PACKAGE}.trainer import data, inputs\n"),
        ),
    ),
    Case(
        architecture.method_imports_torch_only,
        lambda source: is_package(source) and source.part in ("policies", "registry", "files"),
        bad=(in_package("policies/policy.py", "import math\nimport numpy as np\n"),),
        good=(
            in_package(
                "policies/policy.py", f"import math\nfrom torch import nn\nimport {PACKAGE}.policies.a\n"
            ),
        ),
    ),
    Case(
        architecture.confined_package,
        is_shipped,
        bad=(
            in_package(
                "trainer/data/images/folder.py", "def f():\n    from sklearn.datasets import load_digits\n"
            ),
            in_package("trainer/training/trainer.py", "import colossalai.booster as b\n"),
            in_package("trainer/training/trainer.py", "from omegaconf import OmegaConf\n"),
            in_package("registry.py", "from mmengine.registry import Registry\n"),
            in_package("hosts/seam.py", "from einops import rearrange\n"),
            script("import diffusers\n"),
        ),
        good=(
            in_package(
                "trainer/data/images/digits.py", "def f():\n    from sklearn.datasets import load_digits\n"
            ),
            in_package("trainer/config/loading.py", "from omegaconf import OmegaConf\n"),
            in_package("trainer/models/dit.py", "from einops import rearrange\n"),
            in_package("hosts/registered.py", "from mmengine.registry import Registry\n"),
        ),
    ),
    Case(
        architecture.sampling_without_policy,
        lambda source: source.in_package.startswith(("trainer/diffusion/sampling", "trainer/sampling/")),
        bad=(
            in_package("trainer/diffusion/sampling.py", f"from {PACKAGE}.policies import policy\n"),
            in_package(
                "trainer/diffusion/sampling.py", f"from {PACKAGE}.policies.build import build_policy\n"
            ),
        ),
        good=(
            in_package(
                "trainer/diffusion/sampling.py", f"from {PACKAGE}.policies.schedule import NoiseSchedule\n"
            ),
        ),
    ),
    Case(
        architecture.explicit_imports,
        is_code,
        bad=(script("from os import *\n"), script("from . import x\n"), script("from ..a import x\n")),
        good=(script("from os import path\n"),),
    ),
    Case(
        architecture.size,
        is_code,
        bad=(
            script("\n" * 401),
            script("def f():\n" + "    pass\n" * 60),
            script("class C:\n    def f(self, a, b, c, d, /, e, f, *, g, h, i): ...\n"),
        ),
        good=(
            script("\n" * 400),
            script("def f():\n" + "    pass\n" * 59),
            script("class C:\n    def f(self, a, b, c, d, /, e, f, *, g, h): ...\n"),
            script("def f(  # noqa: PLR0913 - flat\n    a, b, c, d, e, f, g, h, i): ...\n"),
        ),
    ),
    Case(
        architecture.no_print,
        is_package,
        bad=(in_package("cli.py", "if 1:\n    print(2)\n"),),
        good=(in_package("cli.py", "'print(2)'\nfile.print(2)\n"),),
    ),
    Case(
        architecture.no_pickle,
        is_code,
        bad=(
            script("torch.load(f)\n"),
            script("torch.load(f, weights_only=flag)\n"),
            script("from torch import load\nload(f)\n"),
            script("np.load(f, allow_pickle=True)\n"),
        ),
        good=(script("torch.load(f, weights_only=True)\njson.load(f)\nnp.load(f, allow_pickle=False)\n"),),
    ),
    Case(
        architecture.no_leftovers,
        lambda _: True,
        # The words are in two pieces, so that this file obeys the rule.
        bad=(script("# TO" + "DO: rest\n"), script("'/" + "root/x'\n"), script("cd /" + "work\n", "a.md")),
        good=(script("data/root /workshop https://x.org/home\n", "a.md"),),
    ),
    Case(
        architecture.telling_name,
        is_code,
        bad=(in_package("policies/utils.py", ""), in_package("common/tables.py", "")),
        good=(in_package("policies/tables.py", ""),),
    ),
    Case(
        architecture.public_docstrings,
        lambda source: is_code(source) and not source.path.startswith("tests/"),
        bad=(script("def f(): ...\n"), script("class C: ...\n")),
        good=(script("def _f(): ...\nclass C:\n    'What comes back.'\n"),),
    ),
    Case(
        architecture.reasoned_suppression,
        is_code,
        bad=(
            script("f()  # noqa: S301\n"),
            script("f()  # noqa: S301, E501 #\n"),
            script("f()  # noqa\n"),
            script("f()  # type: ignore[arg-type]\n"),
        ),
        good=(
            script("f()  # noqa: S301 - written by this test\n"),
            script("f()  # type: ignore[arg-type]  # the stub lacks None\n"),
        ),
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule.__name__)
class TestRules:
    def test_holds_everywhere(self, case: Case) -> None:
        sources = [source for source in project() if case.applies(source)]
        found = [f"{s.path}:{line}: {message}" for s in sources for line, message in case.rule(s)]
        assert sources
        assert not found, "\n" + "\n".join(found)

    def test_tells_bad_from_good(self, case: Case) -> None:
        assert not [source for source in case.bad if not list(case.rule(source))]
        assert not [finding for source in case.good for finding in case.rule(source)]


class TestReadingLength:
    def test_what_all_policies_share_is_read_in_two_sittings(self) -> None:
        policies = [source for source in project() if is_package(source) and source.part == "policies"]
        # Densities, weightings and recipes lie in folders. A reader needs one of them at a time.
        method = [source for source in policies if source.path.count("/") == 2]
        assert 0 < sum(map(architecture.code_lines, method)) <= architecture.MAX_METHOD_LINES

    def test_code_lines_leaves_out_blanks_comments_and_docstrings(self) -> None:
        text = '"""Two\nlines."""\n\n# why\nx = """a\nb"""\n\ndef f():\n    "Doc."\n    return 1  # one\n'
        # Two lines of x, then def and return.
        assert architecture.code_lines(script(text)) == 4

    def test_the_path_of_a_step_is_short_and_connected(self) -> None:
        found = architecture.step_path_findings(project())
        assert not found, found

    def test_the_rule_for_the_path_can_fail(self) -> None:
        first = in_package("cli.py", f"from {PACKAGE}.trainer import build\n")
        second = in_package("trainer/build.py", "")
        path = ["cli.py", "trainer/build.py"]
        assert architecture.step_path_findings([first, second], path) == []
        assert "missing" in architecture.step_path_findings([first], path)[0]
        assert "no file" in architecture.step_path_findings([in_package("cli.py", ""), second], path)[0]
        long = in_package("trainer/build.py", "x = 1\n" * architecture.MAX_STEP_PATH_LINES)
        assert "lines of code" in architecture.step_path_findings([first, long], path)[0]
