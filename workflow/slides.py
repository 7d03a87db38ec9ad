"""Slides of the chapters: python workflow/slides.py FOLDER [CHAPTER ...]

A cell that carries the tag ``slide`` is a slide, with the outputs of the committed notebook; a
text of several sections is one for each. Of a text a slide shows what one would write on a board:
its heading, the first sentence, equations with the sentence before them, lists, tables and boxes.
The whole text is folded below, for whoever speaks. A figure stands with its caption, code with what
it prints. A deck is one page that asks the web for nothing, beside the style and fonts of KaTeX.
"""

import argparse
import base64
import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jinja2
import nbformat
from coursework import PIECE, Book, exercises
from environment import ROOT
from execute import write_text
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from plain import heading
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

TAG = "slide"
CODE = HtmlFormatter(style="friendly_grayscale")
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table").use(dollarmath_plugin)
IMAGES = ("image/svg+xml", "image/png", "image/gif", "image/webp")
SENTENCE = re.compile(r"(?<=[.!?:])(?<!\bal\.)\s+(?=[A-Z\x00\[(])")
WHOLE = re.compile(r"\$[^$]+\$|\*+[^*]+\*+")  # what holds no end of a sentence


class Slide(NamedTuple):
    #: HTML of the heading, of what is shown, and of what is folded
    title: str
    body: str
    notes: str = ""
    #: whether the heading is that of a slide before
    continued: bool = False


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph; a formula or an emphasis is never divided."""
    rest = iter(WHOLE.findall(text))
    parts = SENTENCE.split(WHOLE.sub("\x00", text))
    return [re.sub("\x00", lambda _: next(rest), part) for part in parts]


def board(text: str) -> str:
    """What a slide shows of a section, in Markdown; of prose alone, how each paragraph begins."""
    lines = text.splitlines()
    tops = [token for token in MARKDOWN.parse(text) if token.level == 0 and token.map]
    kinds = [token.type for token in tops]
    done: list[str] = []
    if set(kinds) == {"paragraph_open"} and len(kinds) > 1:
        firsts = [sentences("\n".join(lines[slice(*token.map)]))[0] for token in tops]
        return "\n".join(f"- {' '.join(first.split())}" for first in firsts)
    for index, (kind, token) in enumerate(zip(kinds, tops, strict=True)):
        block = "\n".join(lines[slice(*token.map)])
        if kind == "paragraph_open":
            parts = sentences(block)
            before_equation = "math_block" in kinds[index + 1 : index + 2]
            if not done:
                done.append(parts[0])
            if before_equation and parts[-1] not in done:
                done.append(parts[-1])
        else:
            done.append(block)
    return "\n\n".join(done)


def sections(text: str) -> Iterator[tuple[str | None, str]]:
    """Headings and what stands below; what stands before a first heading belongs to no slide."""
    parts = re.split(r"^#{1,4} (.*)$", text, flags=re.MULTILINE)
    if len(parts) == 1:
        yield None, text
    found = zip(parts[1::2], parts[2::2], strict=True)
    yield from ((title, body) for title, body in found if body.strip())


def text_slides(text: str, book: Book, stem: str, current: str) -> Iterator[Slide]:
    """The slides of a cell of text; exercises by their titles alone, all of the chapter at once."""
    for title, body in sections(book.page.markdown(PIECE.sub("", text))):
        if title == "Exercises":
            stated = exercises(book.notebooks[stem])
            named = [f"- **{book.page.targets[k].number}** {e.title}" for k, e in stated.items()]
            body = "\n".join(named)
        whole = MARKDOWN.render(body.strip())
        shown = MARKDOWN.render(board(body.strip()))
        name = MARKDOWN.renderInline(title) if title else current
        yield Slide(name, shown, whole if whole != shown else "", title is None)


def picture(kind: str, content: str | list, alt: str) -> str:
    content = "".join(content)
    is_text = kind == "image/svg+xml"
    code = base64.b64encode(content.encode()).decode() if is_text else content.replace("\n", "")
    return f'<img src="data:{kind};base64,{code}" alt="{jinja2.filters.escape(alt)}">'


def code_slide(cell: nbformat.NotebookNode, book: Book, current: str) -> Slide:
    """Code that the page shows, then what it prints; a figure with its caption."""
    shown = cell.metadata.get("mystnb", {})
    tables = shown.get("table", [])
    captions = iter(tables if isinstance(tables, list) else [tables])
    parts = []
    if not {"hide-input", "hide-cell"} & set(cell.metadata.get("tags", [])):
        source = cell.source.removeprefix("# NBVAL_CHECK_OUTPUT\n")
        parts.append(highlight(source, PythonLexer(), CODE))
    for output in cell.outputs:
        data = output.get("data", {})
        kind = next((kind for kind in IMAGES if kind in data), None)
        if kind:
            figure = shown["figure"]
            number = book.page.targets[figure["name"]].number
            caption = MARKDOWN.renderInline(book.page.markdown(f"**{number}** {figure['caption']}"))
            image = picture(kind, data[kind], shown["image"]["alt"])
            parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
        elif "text/markdown" in data:
            caption = book.page.markdown(next(captions)["caption"])
            parts.append(MARKDOWN.render("".join(data["text/markdown"])))
            parts.append(f'<p class="caption">{MARKDOWN.renderInline(caption)}</p>')
        else:
            text = "".join(output.get("text", data.get("text/plain", "")))
            parts.append(f'<pre class="output">{jinja2.filters.escape(text.rstrip())}</pre>')
    return Slide(current, "\n".join(parts), continued=True)


def deck(stem: str, book: Book, pair: Path) -> str:
    """The page of a chapter. Tags are those of its source, outputs those of a notebook."""
    source = book.notebooks[stem]
    run = nbformat.read(pair, as_version=4)
    if len(run.cells) != len(source.cells):
        raise SystemExit(f"{pair} has other cells than {stem}.py: make notebooks NB={stem}")
    slides: list[Slide] = []
    current = heading(source)
    for cell, executed in zip(source.cells, run.cells, strict=True):
        chosen = TAG in cell.metadata.get("tags", [])
        if cell.cell_type == "code":
            outputs = executed.get("outputs", [])
            cell = nbformat.from_dict({**cell, "outputs": outputs})
            slides += [code_slide(cell, book, current)] if chosen else []
            continue
        slides += text_slides(cell.source, book, stem, current) if chosen else []
        headings = [title for title, _ in sections(cell.source) if title]
        current = MARKDOWN.renderInline(book.page.markdown(headings[-1])) if headings else current
    template = jinja2.Template((ROOT / "workflow/slides.html").read_text(encoding="utf-8"))
    highlighting = CODE.get_style_defs(".highlight")
    return template.render(title=heading(source), slides=slides, highlighting=highlighting)


def write(folder: Path, stems: list[str], runs: Path) -> None:
    book = Book.read()
    if unknown := [stem for stem in stems if stem not in book.notebooks]:
        raise SystemExit(f"no chapter {', '.join(unknown)}; there are {', '.join(book.notebooks)}")
    shutil.copytree(ROOT / "book/_static/katex", folder / "katex", dirs_exist_ok=True)
    package = importlib.util.find_spec("sphinxcontrib.katex").origin
    shutil.copy(Path(package).with_name("katex.min.js"), folder / "katex")
    for stem in stems or book.notebooks:
        write_text(folder / f"{stem}.html", deck(stem, book, runs / f"{stem}.ipynb"))
        print(folder / f"{stem}.html")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("chapters", nargs="*", metavar="chapter", help="NN_slug; default: all")
    parser.add_argument("--runs", type=Path, default=ROOT / "notebooks", help="executed notebooks")
    options = parser.parse_args(arguments)
    write(options.folder, options.chapters, options.runs)


if __name__ == "__main__":
    main()
