"""Slides: one for each section of each tagged cell, and nothing that the web is asked for."""

import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
import slides
from coursework import Book
from execute import read_chapter

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
BOOK = Book.read()


class Deck(HTMLParser):
    """What a deck holds: sections, addresses, pictures and the words of each slide."""

    def __init__(self, text: str):
        super().__init__()
        self.addresses, self.pictures, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.addresses += [found[name] for name in ("src", "href") if name in found]
        self.pictures += [found] if tag == "img" else []
        if tag == "section":
            self.words.append("")

    def handle_data(self, data):
        if self.words:
            self.words[-1] += data


def tagged(chapter: Path) -> list:
    return [c for c in read_chapter(chapter).cells if "slide" in c.metadata.get("tags", [])]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_deck_holds_what_is_tagged_and_asks_for_nothing(chapter):
    text = slides.deck(chapter.stem, BOOK, chapter.with_suffix(".ipynb"))
    deck, cells = Deck(text), tagged(chapter)
    headings = []
    for cell in cells:
        parts = re.split(r"^#{1,4} .*$", cell.source, flags=re.M)
        is_code = cell.cell_type == "code" or len(parts) == 1
        headings.append(1 if is_code else sum(bool(part.strip()) for part in parts[1:]))
    assert len(deck.words) == sum(headings) and 20 <= sum(headings) <= 45
    local = [one for one in deck.addresses if not one.startswith("data:")]
    assert local == ["katex/katex.min.css", "katex/katex.min.js"]
    assert "://" not in re.sub(r'src="data:[^"]*"', "", text), "an address of the web"
    figures = [c for c in cells if c.metadata.get("mystnb", {}).get("figure")]
    assert len(deck.pictures) == len(figures) and all(one["alt"] for one in deck.pictures)
    assert not re.search(r"\{(?:eq|numref|cite|ref|doc|py:)", text), "a role is not resolved"
    assert all(words.strip() for words in deck.words)


def test_a_deck_is_written_with_its_formulas_and_without_a_chapter_that_is_none(tmp_path):
    slides.main([str(tmp_path), "06_evaluation_hais"])
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {"06_evaluation_hais.html", "katex.min.css", "katex.min.js"} <= names
    style = (tmp_path / "katex/katex.min.css").read_text()
    for font in re.findall(r"url\(([^)]*woff2)\)", style):
        assert (tmp_path / "katex" / font).is_file()
    with pytest.raises(SystemExit, match="no chapter 9; there are 01_vi_recap, 02_pq_vs_qp"):
        slides.main([str(tmp_path), "9"])


def test_a_notebook_of_other_cells_is_refused(tmp_path):
    pair = tmp_path / "06_evaluation_hais.ipynb"
    nbformat.write(nbformat.v4.new_notebook(), pair)
    with pytest.raises(SystemExit, match=r"has other cells than 06_evaluation_hais\.py: make "):
        slides.deck("06_evaluation_hais", BOOK, pair)


def test_a_board_has_the_first_sentence_equations_and_lists():
    text = """A bound holds for $a. B$ alone. It is not tight.

Nobody writes this down. Take logarithms:

$$
x = 1 \\tag{1.1}
$$

- one
- two

This neither."""
    shown = slides.board(text)
    blocks = ["A bound holds for $a. B$ alone.", "Take logarithms:"]
    blocks += ["$$\nx = 1 \\tag{1.1}\n$$", "- one\n- two"]
    assert shown.strip() == "\n\n".join(blocks)


def test_a_board_of_prose_has_a_line_for_each_paragraph():
    text = "As Li et al. (2017) say, *one. Two* is so. Or is it?\n\nSo it is. In truth."
    assert slides.board(text) == "- As Li et al. (2017) say, *one. Two* is so.\n- So it is."


def test_sections_take_their_own_text():
    text = "Of the output above.\n\n## None\n\n## One\n\nA.\n\n### Two\n\nB."
    assert list(slides.sections(text)) == [("One", "\n\nA.\n\n"), ("Two", "\n\nB.")]
    assert list(slides.sections("No heading.")) == [(None, "No heading.")]
