"""What the book needs of Sphinx beyond settings: citations, safe mathematics, alt texts, launch buttons."""

from __future__ import annotations

import dataclasses

import sphinxcontrib.bibtex.plugin
from docutils import nodes
from pybtex.plugin import register_plugin
from pybtex.style.formatting.plain import Style as PlainStyle
from pybtex.style.labels import BaseLabelStyle
from sphinx.util import logging
from sphinxcontrib.bibtex.style.referencing import BracketStyle
from sphinxcontrib.bibtex.style.referencing.author_year import AuthorYearReferenceStyle
from sphinxcontrib.katex import html_visit_displaymath

logger = logging.getLogger(__name__)


def _round() -> BracketStyle:
    return dataclasses.field(default_factory=lambda: BracketStyle(left="(", right=")", sep="; "))


@dataclasses.dataclass
class RoundAuthorYear(AuthorYearReferenceStyle):
    """Neal (2001) in running text, (Neal, 2001; Burda et al., 2016) in parentheses."""

    bracket_parenthetical: BracketStyle = _round()
    bracket_textual: BracketStyle = _round()
    bracket_author: BracketStyle = _round()
    bracket_label: BracketStyle = _round()
    bracket_year: BracketStyle = _round()


class KeyLabels(BaseLabelStyle):
    """The key of an entry is its label: unique in the book, and hidden by the style sheet."""

    def format_labels(self, sorted_entries):
        return [entry.key for entry in sorted_entries]


class AuthorYearList(PlainStyle):
    default_sorting_style = "author_year_title"
    default_label_style = KeyLabels


def display_math(self, node: nodes.math_block) -> None:
    """sphinxcontrib.katex with ``<`` and ``&`` escaped, which it does for inline mathematics only."""
    escaped = node.deepcopy()
    escaped.children = [nodes.Text(self.encode(node.astext()))]
    html_visit_displaymath(self, escaped)


def require_alt_text(app, doctree) -> None:
    """A picture without a description is an error (the build runs with -W)."""
    for image in doctree.findall(nodes.image):
        if "alt" not in image:
            figure = image.next_node(nodes.caption, ascend=True, siblings=True)
            named = f" in the figure {figure.astext()!r}" if figure else ""
            logger.warning(
                f"image without alt text{named}; say what it shows in the cell's "
                'mystnb={"image": {"alt": "..."}} or in ![...](...)',
                location=image,
            )


def drop_repeated_ids(app, doctree, docname) -> None:
    """sphinx-exercise gives every exercise body the same id; a page may hold an id once."""
    for section in doctree.findall(nodes.section):
        section["ids"] = [
            name for name in section["ids"] if name not in ("exercise-content", "solution-content")
        ]


def link_to_notebooks(app, pagename, templatename, context, doctree) -> None:
    """Point the repository's buttons of a chapter at ``notebooks/``, the folder that is committed."""

    def relocate(button: dict) -> dict:
        button = dict(button)
        if "buttons" in button:
            button["buttons"] = [relocate(child) for child in button["buttons"]]
        if button.get("url", "").startswith("http"):
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
    app.connect("doctree-read", require_alt_text)
    app.connect("doctree-resolved", drop_repeated_ids)
    app.connect("html-page-context", link_to_notebooks, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
