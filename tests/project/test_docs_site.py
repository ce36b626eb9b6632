"""What the documentation site is made of: keys with meanings, figures, formulas, lists that are whole."""

import dataclasses
import re
from typing import Literal

import pytest
from architecture import ROOT
from docs_site import config_keys
from markdown_blocks import page_id, pages

import speedit_plugins
from speedit_plugins.registry import POLICIES
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.validation import key_paths


@dataclasses.dataclass
class Documented:
    """A section."""

    share: float = dataclasses.field(default=0.5, metadata={"at_least": 0, "below": 1})
    """How much
    of it."""
    kind: Literal["a", "b"] | None = None
    """Which."""


@dataclasses.dataclass
class Silent:
    """A section with a key that nobody explains."""

    size: int = 1


class TestConfigKeys:
    def test_every_key_has_a_meaning(self) -> None:
        keys = list(config_keys.keys_of())
        assert [key.path for key in keys] == list(key_paths())
        # A sentence or more, or a list of names.
        assert [key.path for key in keys if not re.fullmatch(r"[A-Z`n].{8,}\.", key.meaning)] == []

    def test_a_key_without_one_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"^config key top\.size has no text below it in "):
            list(config_keys.keys_of(Silent, "top"))

    def test_type_range_and_default_are_those_of_the_field(self) -> None:
        assert list(config_keys.keys_of(Documented)) == [
            config_keys.Key("share", "float in [0, 1)", "0.5", "How much of it."),
            config_keys.Key("kind", "`a` `b` or null", "null", "Which."),
        ]

    def test_the_parts_of_the_table_begin_with_keys_of_the_top(self) -> None:
        top = [field.name for field in dataclasses.fields(ExperimentConfig)]
        assert [name for name in top if name in config_keys.PARTS] == list(config_keys.PARTS)
        assert top[0] in config_keys.PARTS

    def test_the_table_has_a_row_and_an_anchor_for_each(self) -> None:
        text = config_keys.markdown()
        for path in key_paths():
            assert text.count(f"\n| `{path}`{{#{config_keys.anchor(path)}}} |") == 1


class TestFormulas:
    mathematics = pytest.importorskip("docs_site.mathematics", reason="needs the extra docs")

    def test_latex_becomes_mathml(self) -> None:
        page = r'<p><span class="arithmatex">\(a &lt; \sqrt{b}\)</span></p>'
        made = self.mathematics.with_mathml(page)
        assert "arithmatex" not in made
        assert re.search(r"<math[^>]*>.*<mi>a</mi><mo>&#x0003C;</mo><msqrt>.*</math></p>", made)

    def test_a_command_that_is_unknown_raises(self) -> None:
        with pytest.raises(ValueError, match="has .*nothing', which MathML does not$"):
            self.mathematics.mathml(r"\nothing x", "inline")


class TestDocstrings:
    docstrings = pytest.importorskip("docs_site.docstrings", reason="needs the extra docs")

    def test_an_entry_for_several_names_is_one_for_each(self) -> None:
        arguments = "Args:\n    alpha, sigma: scales,\n        both > 0.\n    x: input.\n"
        text = f"Adds.\n\n{arguments}\nExample:\n    >>> 1\n    1\n"
        found = self.docstrings.parameters(text)
        assert found == {"alpha": "scales, both > 0.", "sigma": "scales, both > 0.", "x": "input."}
        assert "\nExamples:\n" in self.docstrings.readable(text)


class TestPages:
    def test_every_public_name_is_in_the_reference(self) -> None:
        site_pages = pytest.importorskip("docs_site.pages")
        listed = {name.rpartition(".")[2] for name in site_pages.REFERENCE["public"].names}
        assert {"with_policy", "build_policy", "NoiseSchedule"} <= listed
        assert listed == set(speedit_plugins.__all__) - {"__version__"}

    def test_every_named_policy_has_its_section_and_figure(self) -> None:
        text = (ROOT / "docs/policies.md").read_text(encoding="utf-8")
        assert set(re.findall(r"<!-- figure: (\w+) -->", text)) == set(POLICIES.module_dict)
        for name in POLICIES.module_dict:
            assert f"\n## {name}\n\n<!-- figure: {name} -->\n" in text

    def test_every_report_is_listed_with_its_date(self) -> None:
        table = (ROOT / "docs/benchmarks/README.md").read_text(encoding="utf-8")
        reports = sorted(path.name for path in (ROOT / "docs/benchmarks").glob("[0-9]*.md"))
        assert sorted(re.findall(r"\]\((.+?\.md)\)", table)) == reports
        for name in reports:
            assert re.search(rf"^\| {name[:10]} \| \[.+\]\({re.escape(name)}\)", table, re.MULTILINE)

    def test_every_page_begins_with_its_title(self) -> None:
        for page in pages():
            text = re.sub(r"\A---\n.*?\n---\n+", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
            assert text.startswith("# "), page_id(page)


def test_figures_are_drawn_from_the_policies() -> None:
    figures = pytest.importorskip("docs_site.figures")
    # SpeeDiT's 5 : 1 with half of it reflected, between 0.14 and 1.54 times uniform.
    assert figures.alternative_text("speedit", "density") == "density of speedit, between 0.14 and 1.5"
    assert figures.policy_figure("speed", "weight").startswith(b"<?xml")
