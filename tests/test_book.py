"""What book/_ext adds to Sphinx, piece by piece; tests/test_site.py looks at the whole."""

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import compendium
import execution_table
import pytest
from docutils import nodes
from myst_nb.core.render import MimeData

ROOT = Path(__file__).resolve().parents[1]


def test_a_value_and_its_errors_do_not_break():
    kept = compendium.unbroken("| T = 50, a b | -1.0 ± 2.0 (95 % over seeds ± 3.0) | $x = 5$ |")
    assert kept.replace("\N{NO-BREAK SPACE}", "_") == (
        "| T_=_50, a b | -1.0_±_2.0 (95_%_over_seeds_±_3.0) | $x = 5$ |"
    )


def test_a_printed_table_becomes_a_directive_and_its_note_stays_below():
    text = compendium.captioned("| a |\n| :-- |\n| 1 |\n\nA note.", "tab-x", "What $a$ is.")
    head, _, rest = text.partition("\n\n")
    assert head.splitlines() == ["~~~~~~{table} What $a$ is.", ":name: tab-x"]
    assert rest == "| a |\n| :-- |\n| 1 |\n~~~~~~\n\nA note."


def test_tables_of_a_cell_take_their_captions_in_turn_and_one_without_is_an_error():
    shown, warned = [], []
    renderer = SimpleNamespace(logger=SimpleNamespace(warning=lambda *a, **k: warned.append(a[0])))
    render = compendium.number_tables(lambda self, data: shown.append(data.content))
    captions = [{"name": f"tab-{i}", "caption": f"Table {i}."} for i in (1, 2)]

    def table(cell, captions):
        metadata = {"mystnb": {"table": captions}} if captions else {}
        return MimeData("text/markdown", "| a |\n|:--|", cell_metadata=metadata, cell_index=cell)

    for cell, given in ((3, captions), (3, captions), (4, captions[0]), (5, None)):
        render(renderer, table(cell, given))
    assert [text.splitlines()[0][14:] for text in shown[:3]] == ["Table 1.", "Table 2.", "Table 1."]
    assert shown[3] == "| a |\n|:--|" and len(warned) == 1 and "cell 5 has no caption" in warned[0]


def test_formulas_become_words():
    paragraph = nodes.paragraph("", "A loss at ", nodes.math("", r"2 \log 2"), nodes.Text(" is "))
    paragraph += nodes.math("", r"\frac{1}{2} \sum_{k=1}^K w_k f(z_k) \, dz + c")
    assert compendium.plain_mathematics(paragraph).astext() == "A loss at 2 2 is …"
    assert paragraph.astext().endswith("+ c"), "the page itself keeps its formulas"


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (b'<?xml version="1.0"?>\n<svg height="72pt" viewBox="0 0 9 9" width="36.3pt">', (48, 96)),
        (b'<svg width="30" height="20px"><rect width="7" height="7"/>', (30, 20)),
        (b'<svg viewBox="0 0 30 20"><rect width="7" height="7"/>', None),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 640, 480), (640, 480)),
        (b"GIF89a", None),
    ],
)
def test_pictures_say_their_size(tmp_path, content, size):
    path = tmp_path / "picture"
    path.write_bytes(content)
    assert compendium.size_of(path) == size


def an_app(tmp_path, base):
    config = SimpleNamespace(html_baseurl=base, root_doc="intro", html_title="The <Book>")
    (tmp_path / "intro.md").write_text(
        ':link: chapters/01_x\n:link-type: doc\n**Why?**\n\nBecause it "is".\n'
    )
    env = SimpleNamespace(found_docs={"intro", "chapters/01_x"})
    builder = SimpleNamespace(format="html")
    return SimpleNamespace(
        config=config, srcdir=tmp_path, outdir=tmp_path, env=env, builder=builder
    )


@pytest.mark.parametrize("base", ["", "https://example.org/book/"])
def test_pages_say_what_they_are(tmp_path, base):
    app = an_app(tmp_path, base)
    context = {"title": "1. <em>X</em> &amp; Y", "metatags": '<meta name="viewport" content="x" />'}
    compendium.describe(app, "chapters/01_x", "page.html", context, None)
    tags = ElementTree.fromstring(f"<head>{context['metatags']}</head>")
    found = {tag.get("name") or tag.get("property"): tag.get("content") for tag in tags}
    assert found.pop("og:url", "") == (
        "https://example.org/book/chapters/01_x.html" if base else ""
    )
    assert found.pop("og:image", "").endswith("/_static/card.jpg") == bool(base)
    assert found == {
        "og:site_name": "The <Book>",
        "og:type": "article",
        "og:title": "1. X & Y",
        "description": 'Why? Because it "is".',
        "og:description": 'Why? Because it "is".',
    }


def test_a_page_that_is_not_found_finds_its_files(tmp_path):
    context = {"title": "Page not found"}
    app = an_app(tmp_path, "https://example.org/book/")
    compendium.describe(app, "404", "404.html", context, None)
    assert context["metatags"].startswith('\n<base href="https://example.org/book/" />\n')


def test_the_site_map_needs_an_address(tmp_path):
    compendium.list_pages(an_app(tmp_path, ""), None)
    assert not (tmp_path / "sitemap.xml").exists()
    compendium.list_pages(an_app(tmp_path, "https://example.org/book"), None)
    places = ElementTree.parse(tmp_path / "sitemap.xml").iterfind(".//{*}loc")
    base = "https://example.org/book/"
    assert [place.text for place in places] == [f"{base}chapters/01_x.html", f"{base}intro.html"]


def png(*kinds):
    chunks = [(4).to_bytes(4, "big") + kind + b"data" + b"crc4" for kind in kinds]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_an_animation_has_a_still_picture(tmp_path):
    image = tmp_path / "_images" / "moving.png"
    image.parent.mkdir()
    image.write_bytes(png(b"IHDR", b"acTL", b"fcTL", b"IDAT", b"fcTL", b"fdAT", b"IEND"))
    (tmp_path / "_images" / "other.png").write_bytes(png(b"IHDR", b"IDAT", b"IEND"))
    compendium.keep_still_pictures(SimpleNamespace(outdir=tmp_path), None)
    still = image.with_name("still-moving.png")
    assert still.read_bytes() == png(b"IHDR", b"IDAT", b"IEND")
    assert len(list(image.parent.iterdir())) == 3


SPOKEN = {4: "a few seconds", 40: "half a minute", 47: "a minute", 101: "a minute and a half"}


@pytest.mark.parametrize(
    ("seconds", "words"), [*SPOKEN.items(), (118, "two minutes"), (200, "3 minutes")]
)
def test_times_in_words(seconds, words):
    assert execution_table.in_words(seconds) == words


def test_heads_and_readme_tell_the_times_that_were_noted(root=ROOT):
    seconds = json.loads((root / "workflow" / "times.json").read_text(encoding="utf-8"))["seconds"]
    chapters = {path.stem: path for path in (root / "notebooks").glob("[0-9]*.py")}
    assert seconds.keys() == chapters.keys(), "note them with `make times`"
    for name, path in chapters.items():
        head = path.read_text(encoding="utf-8")[:2000].lower()
        assert f"about {execution_table.in_words(seconds[name])} on one core" in head, name
    row = f"| `make book` | {execution_table.in_short(seconds)} |"
    assert row in (root / "README.md").read_text(encoding="utf-8"), row


def test_new_times_change_what_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(execution_table, "ROOT", tmp_path)
    monkeypatch.setattr(execution_table, "TIMES", tmp_path / "times.json")
    (tmp_path / "README.md").write_text("| `make book` | 1 s | all |\n| `make full` | 1 s | x |\n")
    (tmp_path / "notebooks").mkdir()
    for name in ("01_a", "02_b"):
        path = tmp_path / "notebooks" / f"{name}.py"
        path.write_text("# *About a minute on one core.* A minute on one core.\n")
    execution_table.record(
        [{"chapter": "01_a", "seconds": 34.0}, {"chapter": "02_b", "seconds": 121.0}]
    )
    told = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (
        told
        == "| `make book` | 30 to 120 s each, 3 minutes in all | all |\n| `make full` | 1 s | x |\n"
    )
    heads = [
        (tmp_path / "notebooks" / f"{name}.py").read_text(encoding="utf-8")
        for name in ("01_a", "02_b")
    ]
    assert heads[0].startswith("# *About half a minute on one core.* A minute on one core.")
    assert heads[1].startswith("# *About two minutes on one core.*")
