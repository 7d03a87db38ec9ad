"""What the book needs of Sphinx beyond settings: citations, mathematics, tables, pages, icons."""

from __future__ import annotations

import html
import importlib
import re
import shutil
import struct
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import sphinxcontrib.bibtex.plugin
from docutils import nodes
from docutils.statemachine import StringList
from fontTools import subset
from fontTools.ttLib import TTFont
from myst_nb.core.render import NbElementRenderer
from pybtex.plugin import register_plugin
from pybtex.style.formatting.plain import Style as PlainStyle
from pybtex.style.labels import BaseLabelStyle
from sphinx.errors import ExtensionError
from sphinx.search import IndexBuilder
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx_external_toc.collectors import TocTreeCollectorWithStyles
from sphinxcontrib.bibtex.style.referencing import BracketStyle
from sphinxcontrib.bibtex.style.referencing.author_year import AuthorYearReferenceStyle
from sphinxcontrib.katex import html_visit_displaymath

logger = logging.getLogger(__name__)

LAUNCH = {
    "notebook_interface": "jupyterlab",
    "colab_url": "https://colab.research.google.com",
    "binderhub_url": "https://mybinder.org",
}


# --- Citations -----------------------------------------------------------------------------------


def round_brackets() -> BracketStyle:
    return BracketStyle(left="(", right=")", sep="; ")


@dataclass
class RoundAuthorYear(AuthorYearReferenceStyle):
    """Neal (2001) in running text, (Neal, 2001; Burda et al., 2016) in parentheses."""

    bracket_parenthetical: BracketStyle = field(default_factory=round_brackets)
    bracket_textual: BracketStyle = field(default_factory=round_brackets)
    bracket_author: BracketStyle = field(default_factory=round_brackets)
    bracket_label: BracketStyle = field(default_factory=round_brackets)
    bracket_year: BracketStyle = field(default_factory=round_brackets)


class KeyLabels(BaseLabelStyle):
    """The key of an entry is its label: unique in the book, and hidden by the style sheet."""

    def format_labels(self, sorted_entries):
        return [entry.key for entry in sorted_entries]


class AuthorYearList(PlainStyle):
    default_sorting_style = "author_year_title"
    default_label_style = KeyLabels


# --- Tables ---------------------------------------------------------------------------------------


def unbroken(table: str) -> str:
    """Keep on one line what belongs together: value and error, interval over seeds, ``T = 50``."""
    kept = r"\([^()|]* ± [^()|]*\)|\(one seed\)| ± | = (?=[\d.]+(?![\d.$]))"
    return re.sub(kept, lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), table)


def captioned(table: str, name: str, caption: str) -> str:
    """The directive that numbers a Markdown table; a note after the table stays below it.

    Its fence is of tildes: after one of backticks no code could stand in the caption.
    """
    rows, _, note = unbroken(table).partition("\n\n")
    return f"~~~~~~{{table}} {caption}\n:name: {name}\n\n{rows}\n~~~~~~\n\n{note}"


def number_tables(render_markdown):
    """Give the tables that a cell prints the names and captions of its metadata, in turn.

    They are in ``mystnb={"table": {"name": "tab-...", "caption": "..."}}``, a list of such where a
    cell prints several tables. A table without a caption is an error.
    """

    def render(self, data):
        if data.string.startswith("|"):
            given = data.cell_metadata.get("mystnb", {}).get("table", [])
            given = given if isinstance(given, list) else [given]
            printed = self.__dict__.setdefault("printed_tables", Counter())
            printed[data.cell_index] += 1
            if printed[data.cell_index] <= len(given):
                shown = given[printed[data.cell_index] - 1]
                data = replace(data, content=captioned(data.string, **shown))
            else:
                self.logger.warning(
                    f"table {printed[data.cell_index]} of cell {data.cell_index} has no caption; "
                    'say what it shows in mystnb={"table": {"name": "tab-...", "caption": "..."}}',
                    line=data.line,
                )
        return render_markdown(self, data)

    return render


# --- Pages ---------------------------------------------------------------------------------------


def require_chapters(app) -> None:
    """Stop with one line when the chapters that the site renders have not been executed."""
    source = Path(app.srcdir)
    listed = re.findall(
        r"^\s*- file: (chapters/\S+)", (source / "_toc.yml").read_text(encoding="utf-8"), re.M
    )
    tables = [f"chapters/{name}.md" for name in ("execution", "times", "exercises")]
    needed = [f"{name}.ipynb" for name in listed] + tables
    missing = [name for name in needed if not (source / name).is_file()]
    if missing:
        raise ExtensionError(
            f"{', '.join(missing)} not found in {source}: execute the chapters first (make book)"
        )


def rank_chapters_first(app) -> None:
    """The search's own order; Sphinx would look for the file in the current folder."""
    app.config.html_search_scorer = str(Path(__file__).with_name("search_scorer.js"))


def number_chapters(assign_section_numbers):
    """Number ``chapters/06_slug`` 6, whichever other chapters this edition holds."""

    def assign(self, env):
        changed = assign_section_numbers(self, env)
        for docname, numbers in env.toc_secnumbers.items():
            chapter = re.match(r"chapters/(\d+)_", docname)
            if not chapter:
                continue
            first = int(chapter[1])
            for anchor, number in numbers.items():
                numbers[anchor] = number and (first, *number[1:])
            for node in (env.titles[docname], *env.tocs[docname].findall(nodes.reference)):
                if node.get("secnumber"):
                    node["secnumber"] = (first, *node["secnumber"][1:])
        return changed

    return assign


def aligned(text: str) -> str:
    r"""Put lines that ``\\`` ends, or equations that blank lines divide, under one another."""
    text = r"\\".join(part.strip() for part in re.split(r"\n\s*\n", text) if part.strip())
    if r"\\" not in text or re.fullmatch(r"\\begin\{.*\\end\{\w+\*?\}[.,]?", text, re.DOTALL):
        return text
    return rf"\begin{{aligned}}{text}\end{{aligned}}"


def display_math(self, node: nodes.math_block) -> None:
    """Display mathematics with Sphinx's line breaks and with ``<`` and ``&`` escaped.

    sphinxcontrib.katex does neither.
    """
    escaped = node.deepcopy()
    escaped.children = [nodes.Text(self.encode(aligned(node.astext())))]
    html_visit_displaymath(self, escaped)


def require_alt_text(app, doctree) -> None:
    """A picture without a description is an error (the build runs with -W)."""
    for image in doctree.findall(nodes.image):
        if "alt" not in image:
            caption = image.next_node(nodes.caption, ascend=True, siblings=True)
            named = f" in the figure {caption.astext()!r}" if caption else ""
            logger.warning(
                f"image without alt text{named}; say what it shows in the cell's "
                'mystnb={"image": {"alt": "..."}} or in ![...](...)',
                location=image,
            )


def hide_test_marks(app, doctree) -> None:
    """A cell whose output is compared says so in its first line; readers need not know."""
    for code in doctree.findall(nodes.literal_block):
        shown = code.astext().removeprefix("# NBVAL_CHECK_OUTPUT\n")
        if shown != code.astext():
            code.rawsource, code.children = shown, [nodes.Text(shown)]


def drop_repeated_ids(app, doctree, docname) -> None:
    """sphinx-exercise gives every exercise body the same id; a page may hold an id once."""
    for section in doctree.findall(nodes.section):
        section["ids"] = [
            name for name in section["ids"] if name not in ("exercise-content", "solution-content")
        ]


def buttons(app, config) -> None:
    """Show the buttons that need the repository's address as soon as there is one."""
    options = config.html_theme_options
    known = bool(options.get("repository_url"))
    for name in ("repository", "issues", "edit_page"):
        options[f"use_{name}_button"] = known
    options["launch_buttons"] = LAUNCH if known else {}


def link_to_notebooks(app, pagename, templatename, context, doctree) -> None:
    """Lead the buttons of a chapter to ``notebooks/``, where the repository has it."""

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


def link_to_exercises(body: str) -> str:
    """A permalink behind the title of each exercise, as headings have it."""
    return re.sub(
        r'(<div class="exercise admonition" id="([\w-]+)">\s*'
        r'<p class="admonition-title">.*?)(</p>)',
        r'\1<a class="headerlink" href="#\2" title="Link to this exercise">#</a>\3',
        body,
    )


def mend_roles(app, pagename, templatename, context, doctree) -> None:
    """Names and roles that the theme and docutils leave out or get wrong."""
    navigation = context["generate_toctree_html"]
    context["generate_toctree_html"] = lambda *args, **options: str(
        navigation(*args, **options)
    ).replace("<summary>", '<summary aria-label="Pages of this section">')
    if "body" in context:  # a list of citations is a list
        body = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')
        context["body"] = link_to_exercises(body)


def plain_mathematics(doctree: nodes.Node) -> nodes.Node:
    """A copy whose formulas are words: what a search or a preview can show of them."""
    doctree = doctree.deepcopy()
    for formula in [*doctree.findall(nodes.math), *doctree.findall(nodes.math_block)]:
        text = re.sub(r"\\\w+|[{}$^_&~]|\\.", " ", formula.astext())
        is_short = len(text.split()) < 6 and isinstance(formula, nodes.math)
        formula.parent.replace(formula, nodes.Text(" ".join(text.split()) if is_short else "…"))
    return doctree


def index_without_tex(feed):
    """Keep TeX out of the search: of its words, and of the titles that it shows."""

    def feed_plain(self, docname, filename, title, doctree):
        return feed(self, docname, filename, title, plain_mathematics(doctree))

    return feed_plain


def summary_of(app, pagename: str, doctree) -> str:
    """One sentence or two on a page: a chapter's card on the title page, or the first paragraph."""
    title_page = Path(app.srcdir, f"{app.config.root_doc}.md").read_text(encoding="utf-8")
    card = rf":link: {pagename}\n:link-type: doc\n\*\*(.+)\*\*\n\n(.+)"
    if found := re.search(card, title_page):
        return " ".join(found.groups())
    first = next(plain_mathematics(doctree).findall(nodes.paragraph), None) if doctree else None
    words = re.sub(r"\s+", " ", first.astext()) if first else ""
    return words if len(words) <= 200 else words[:200].rpartition(" ")[0] + " …"


def describe(app, pagename, templatename, context, doctree) -> None:
    """Say what the page is, for search engines and previews."""
    if pagename == app.config.root_doc:
        context["docstitle"] = ""  # its title is that of the book, and stands there once
    title = html.unescape(re.sub(r"<[^>]*>", "", context.get("title") or app.config.html_title))
    facts = {"og:site_name": app.config.html_title, "og:type": "article", "og:title": title}
    if words := summary_of(app, pagename, doctree):
        facts["description"] = facts["og:description"] = words
    base = app.config.html_baseurl.rstrip("/")
    if base:
        facts |= {"og:url": f"{base}/{pagename}.html", "og:image": f"{base}/_static/card.jpg"}
    # One viewport is in the layout; docutils adds a second.
    tags = [re.sub(r'<meta name="viewport"[^>]*>', "", context.get("metatags", ""))]
    if base and pagename == "404":  # it is shown in the place of a page of any folder
        tags.append(f'<base href="{html.escape(base)}/" />')
    for name, text in facts.items():
        key = "property" if ":" in name else "name"
        tags.append(f'<meta {key}="{name}" content="{html.escape(text)}" />')
    context["metatags"] = "\n".join(tags)


def size_of(image: Path) -> tuple[int, int] | None:
    """Width and height of a picture in pixels of the page; None if it does not say."""
    head = image.read_bytes()[:2000]
    if head.startswith(b"\x89PNG"):
        return struct.unpack(">II", head[16:24])
    tag = re.search(rb"<svg\b[^>]*>", head)
    sizes = re.findall(rb'\b(width|height)="([\d.]+)(pt|px)?"', tag[0]) if tag else []
    found = {side: float(n) * (4 / 3 if unit == b"pt" else 1) for side, n, unit in sizes}
    return (round(found[b"width"]), round(found[b"height"])) if len(found) == 2 else None


def is_animated(image: Path) -> bool:
    """Whether it is a PNG of several frames: it says so before its first picture."""
    head, picture, _ = image.read_bytes().partition(b"IDAT")
    return bool(picture) and b"acTL" in head


def still(animation: bytes) -> bytes:
    """The default picture of an animated PNG: the file without the chunks of the animation."""
    kept, place = animation[:8], 8
    while place < len(animation):
        end = place + 12 + int.from_bytes(animation[place : place + 4], "big")
        if animation[place + 4 : place + 8] not in (b"acTL", b"fcTL", b"fdAT"):
            kept += animation[place:end]
        place = end
    return kept


def keep_still_pictures(app, exception) -> None:
    """Beside each animation a still picture, for paper and for those who ask for no motion."""
    for image in Path(app.outdir, "_images").glob("*.png"):
        if is_animated(image):
            image.with_name(f"still-{image.name}").write_bytes(still(image.read_bytes()))


def give_sizes(app, pagename, templatename, context, doctree) -> None:
    """Room for each picture before it is loaded, so that no text moves; and a still one to swap."""
    sources = {name: Path(app.srcdir, path) for path, name in app.builder.images.items()}

    def sized(tag: re.Match) -> str:
        source = re.search(r'src="((?:\.\./)*_images/)([^"]+)"', tag[0])
        image = sources[html.unescape(source[2])] if source else None
        size = size_of(image) if image and "height=" not in tag[0] else None
        with_size = f'<img width="{size[0]}" height="{size[1]}" {tag[0][5:]}' if size else tag[0]
        if image is None or not is_animated(image):
            return with_size
        calm = (
            f'media="(prefers-reduced-motion: reduce), print" srcset="{source[1]}still-{source[2]}"'
        )
        return f'<picture class="animation"><source {calm} />{with_size}</picture>'

    if "body" in context:
        context["body"] = re.sub(r"<img [^>]*>", sized, context["body"])


def drop_scripts(app, pagename, templatename, context, doctree) -> None:
    """No file twice, and not KaTeX's search for formulas, in the place of which is book.js."""
    for kind in ("css_files", "script_files"):
        once = {}
        for file in context[kind]:
            if "autorender" not in str(file.filename) and "auto-render" not in str(file.filename):
                once.setdefault((file.filename, str(file.attributes.get("body"))), file)
        context[kind] = list(once.values())


def list_pages(app, exception) -> None:
    """A site map, when the address of the site is known."""
    base = app.config.html_baseurl.rstrip("/")
    if exception or not base or app.builder.format != "html":
        return
    places = (f"<url><loc>{base}/{name}.html</loc></url>" for name in sorted(app.env.found_docs))
    Path(app.outdir, "sitemap.xml").write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n'
        + "\n".join(places)
        + "\n</urlset>\n"
    )


def keep_used_icons(app, exception) -> None:
    """Of Font Awesome's two thousand icons the dozen that pages and style sheets name.

    They become ``_static/fonts/icons.woff``, which ``book.css`` prefers to the theme's own files.
    """
    if exception or app.builder.format != "html":
        return
    static = Path(app.outdir, "_static")
    whole = static / "vendor/fontawesome/webfonts/fa-solid-900.ttf"
    users = [*Path(app.outdir).rglob("*.html"), *static.glob("scripts/*theme.js")]
    names = set().union(
        *(re.findall(r"\bfa-([a-z0-9-]+)", user.read_text(encoding="utf-8")) for user in users)
    )
    font = TTFont(whole)
    styles = "".join(style.read_text(encoding="utf-8") for style in static.rglob("*.css"))
    named = re.findall(r'(?:--[\w-]*icon[\w-]*|[^{]content):\s*"(?:\\(f\w{3})|(\W))"', styles)
    codes = {int(code, 16) if code else ord(char) for code, char in named}
    keep = subset.Subsetter(subset.Options(layout_features=[]))
    keep.populate(
        glyphs=names & set(font.getGlyphOrder()), unicodes=codes & set(font.getBestCmap())
    )
    keep.subset(font)
    font.flavor = "woff"
    font.save(static / "fonts/icons.woff")
    shutil.rmtree(static / "vendor")
    for file in static.glob("scripts/fontawesome.js*"):
        file.unlink()


# --- The library's pages -------------------------------------------------------------------------


class LibraryModules(SphinxDirective):
    """The modules below the current page in _toc.yml, each with the first line of its docstring."""

    def run(self):
        children = self.env.external_site_map[self.env.docname].child_files()
        lines = []
        for docname in map(str, children):
            module = importlib.import_module(f"amortised.{docname.rpartition('/')[2]}")
            summary = module.__doc__.strip().splitlines()[0]
            lines += [f":doc:`/{docname}`", f"    {summary}", ""]
        text = StringList(["```{eval-rst}", *lines, "```"], source=self.env.docname)
        container = nodes.container(classes=["library-modules"])
        self.state.nested_parse(text, self.content_offset, container)
        return [container]


def skip_generated_docs(app, what, name, obj, skip, options):
    """Leave out "Alias for field number 0" of NamedTuples, and the settings of pydantic models."""
    generated = str(getattr(obj, "__doc__", "")).startswith("Alias for field")
    return True if generated or name == "model_config" else None


def keep_single_letters(app, what, name, obj, options, lines) -> None:
    """``:param num_samples: K.`` is a sentence, not the start of a list numbered by letters."""
    for number, line in enumerate(lines):
        lines[number] = re.sub(r"^(\s*:\w[^:]*:\s+)([A-Za-z]\.\s*)$", r"\1\\\2", line)


def drop_return_types(app, doctree) -> None:
    """The text of Returns says the shape; a second field that says "Tensor" only adds length."""
    for entry in list(doctree.findall(nodes.field)):
        if entry.children[0].astext() == "Return type":
            entry.parent.remove(entry)


def setup(app):
    sphinxcontrib.bibtex.plugin.register_plugin(
        "sphinxcontrib.bibtex.style.referencing", "author_year_round", RoundAuthorYear
    )
    register_plugin("pybtex.style.formatting", "author_year_list", AuthorYearList)
    app.setup_extension("sphinxcontrib.katex")
    app.registry.html_block_math_renderers["katex"] = (display_math, None)
    TocTreeCollectorWithStyles.assign_section_numbers = number_chapters(
        TocTreeCollectorWithStyles.assign_section_numbers
    )
    NbElementRenderer.render_markdown = number_tables(NbElementRenderer.render_markdown)
    IndexBuilder.feed = index_without_tex(IndexBuilder.feed)
    app.add_directive("library-modules", LibraryModules)
    app.connect("config-inited", buttons)
    app.connect("builder-inited", require_chapters)
    app.connect("builder-inited", rank_chapters_first)
    app.connect("autodoc-skip-member", skip_generated_docs)
    app.connect("autodoc-process-docstring", keep_single_letters)
    app.connect("doctree-read", require_alt_text)
    app.connect("doctree-read", hide_test_marks)
    app.connect("doctree-read", drop_return_types)
    app.connect("doctree-resolved", drop_repeated_ids)
    app.connect("html-page-context", link_to_notebooks, priority=900)
    app.connect("html-page-context", mend_roles, priority=900)
    app.connect("html-page-context", describe, priority=900)
    app.connect("html-page-context", give_sizes, priority=900)
    app.connect("html-page-context", drop_scripts, priority=900)
    app.connect("build-finished", keep_still_pictures)
    app.connect("build-finished", list_pages)
    app.connect("build-finished", keep_used_icons)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
