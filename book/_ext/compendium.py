"""Sphinx settings of the book that need code: citations, display mathematics, launch buttons."""

from __future__ import annotations

import dataclasses

import sphinxcontrib.bibtex.plugin
from docutils import nodes
from pybtex.plugin import register_plugin
from pybtex.style.formatting.plain import Style as PlainStyle
from pybtex.style.labels import BaseLabelStyle
from sphinxcontrib.bibtex.style.referencing import BracketStyle
from sphinxcontrib.bibtex.style.referencing.author_year import AuthorYearReferenceStyle
from sphinxcontrib.katex import html_visit_displaymath


def round_brackets() -> BracketStyle:
    return BracketStyle(left="(", right=")")


@dataclasses.dataclass
class RoundAuthorYear(AuthorYearReferenceStyle):
    """Neal (2001) in running text, (Neal, 2001) in parentheses."""

    bracket_parenthetical: BracketStyle = dataclasses.field(default_factory=round_brackets)
    bracket_textual: BracketStyle = dataclasses.field(default_factory=round_brackets)
    bracket_author: BracketStyle = dataclasses.field(default_factory=round_brackets)
    bracket_label: BracketStyle = dataclasses.field(default_factory=round_brackets)
    bracket_year: BracketStyle = dataclasses.field(default_factory=round_brackets)


class KeyLabels(BaseLabelStyle):
    """The key of an entry is its label: unique, and hidden on the page by the style sheet."""

    def format_labels(self, sorted_entries):
        for entry in sorted_entries:
            yield entry.key


class AuthorYearList(PlainStyle):
    default_sorting_style = "author_year_title"
    default_label_style = KeyLabels


def display_math(self, node: nodes.math_block) -> None:
    """As in sphinxcontrib.katex, with ``<`` and ``&`` escaped, which it does for inline mathematics only."""
    escaped = node.deepcopy()
    escaped.children = [nodes.Text(self.encode(node.astext()))]
    html_visit_displaymath(self, escaped)


def link_to_notebooks(app, pagename, templatename, context, doctree) -> None:
    """Point the repository's buttons of a chapter at ``notebooks/``, the folder that is committed."""

    def relocate(button: dict) -> dict:
        button = dict(button)
        if "buttons" in button:
            button["buttons"] = [relocate(child) for child in button["buttons"]]
        if "url" in button and button["url"].startswith("http"):
            for slash in ("/", "%2F"):
                built = slash.join(("book", "chapters", ""))
                button["url"] = button["url"].replace(built, f"notebooks{slash}")
            if button.get("label") == "source-edit-button":
                button["url"] = button["url"].removesuffix(".ipynb") + ".py"
        return button

    if pagename.startswith("chapters/"):
        context["header_buttons"] = [relocate(button) for button in context["header_buttons"]]


def setup(app):
    sphinxcontrib.bibtex.plugin.register_plugin(
        "sphinxcontrib.bibtex.style.referencing", "author_year_round", RoundAuthorYear
    )
    register_plugin("pybtex.style.formatting", "author_year_list", AuthorYearList)
    app.setup_extension("sphinxcontrib.katex")
    app.registry.html_block_math_renderers["katex"] = (display_math, None)
    app.connect("html-page-context", link_to_notebooks, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
