"""The built site in a real browser: what a reader sees, on a desk and on a phone, light and dark.

The site is served from book/_build/html on a free port of this machine; `make site` builds it.
Every page is opened once and looked at in light, in dark and at the width of a phone. What is seen
is recorded, and each test looks at one side of the record.
"""

import functools
import gzip
import http.server
import io
import json
import os
import re
import shutil
import threading
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
SITE = Path(os.environ.get("AMORTISED_SITE", ROOT / "book" / "_build" / "html"))
BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
AXE = {"resultTypes": ["violations"], "preload": False}  # no style sheets fetched by axe itself
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}

# What is read from a page after it has settled.
LOOK = r"""
() => {
  const article = document.querySelector("article") || document.querySelector("main");
  const seen = (node) => !node.closest("pre, code, script, style, textarea, .katex");
  const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  let text = "";
  while (walker.nextNode()) {
    if (seen(walker.currentNode.parentElement)) text += walker.currentNode.data + "\n";
  }
  return {
    text,
    formulas: [...article.querySelectorAll(".math")].map((box) => ({
      source: box.textContent.slice(0, 60),
      rendered: box.querySelectorAll(".katex").length,
      hidden: box.scrollWidth - box.clientWidth,
      mathmlWidth: Math.max(
        0, ...[...box.querySelectorAll(".katex-mathml")].map((m) => m.getBoundingClientRect().width)
      ),
    })),
    broken: article.querySelectorAll(".katex-error").length,
    images: [...article.querySelectorAll("img")].map((image) => ({
      source: image.getAttribute("src"),
      alt: image.getAttribute("alt"),
      loaded: image.complete && image.naturalWidth > 0,
      filter: getComputedStyle(image).filter,
      background: getComputedStyle(image).backgroundColor,
    })),
  };
}
"""

# How much of the screen moved without the reader's doing, as Lighthouse counts it.
WATCH = """
window.moved = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.moved += entry.value;
}).observe({ type: "layout-shift", buffered: true });
"""

# Formulas and the words of code make up most nodes of a page and few colours. axe takes a tenth of
# the time when formulas are plain and one word of code remains of each kind.
THIN = r"""
() => {
  document.querySelectorAll(".katex").forEach((formula) => formula.replaceWith("formula"));
  const met = new Set();
  for (const word of document.querySelectorAll(".highlight span[class]")) {
    const kind = word.className + word.closest("[class*=highlight-]")?.parentElement.className;
    if (met.has(kind)) word.replaceWith(word.textContent);
    met.add(kind);
  }
}
"""


def pages():
    """Every page with the book's layout: all but the theme's macros and the forwarding index."""
    names = [path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html")]
    return sorted(n for n in names if n != "index.html" and not n.startswith("_static/"))


class Page(HTMLParser):
    """The links, anchors, words and tags of a page, without a browser."""

    def __init__(self, name):
        super().__init__()
        self.links, self.anchors, self.text, self._article = set(), set(), [], False
        self.tags = []
        self.feed((SITE / name).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.anchors |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        if tag == "a" and attributes.get("href"):
            self.links.add(attributes["href"])
        self._article = self._article or tag == "article"

    def handle_endtag(self, tag):
        self._article = self._article and tag != "article"

    def handle_data(self, data):
        if self._article:
            self.text.append(data)

    @property
    def words(self):
        prose = re.sub(r"\\\(.*?\\\)|\\\[.*?\\\]", " ", " ".join(self.text), flags=re.DOTALL)
        return Counter(re.findall(r"[a-z]+", prose.lower()))


@pytest.fixture(scope="module")
def site():
    if not (SITE / "index.html").is_file():
        pytest.fail(f"there is no site in {SITE}: build it with `make site`", pytrace=False)
    return {name: Page(name) for name in pages()}


@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no Chromium on PATH (looked for {', '.join(BROWSERS)})")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="class")
def visits(browser, address, site, request):
    """Half of the pages on a desk, in light and dark, and on a phone; what the browser had to say.

    Which half, the class of the tests says: a worker takes a class.
    """
    axe, record = Axe(), {}
    alike = [name for name in site if name.startswith("_modules/")][1:]  # listings; one will do
    context = browser.new_context(viewport=DESK)
    for name in list(site)[request.cls.half :: 2]:
        page, trouble, abroad = context.new_page(), [], []
        page.on("console", lambda m, t=trouble: m.type == "error" and t.append(m.text))
        page.on("pageerror", lambda error, t=trouble: t.append(str(error)))
        page.on("requestfailed", lambda r, t=trouble: t.append(f"failed: {r.url}"))
        page.on("response", lambda r, t=trouble: r.status >= 400 and t.append(r.url))
        page.on(
            "request", lambda r, a=abroad: r.url.startswith((address, "data:")) or a.append(r.url)
        )
        page.emulate_media(color_scheme="light")
        page.goto(address + name)
        page.add_style_tag(content="* { transition: none !important }")
        modes = {"light": {}} | ({} if name in alike else {"dark": {"runOnly": ["color-contrast"]}})
        for mode, rules in modes.items():
            page.emulate_media(color_scheme=mode)
            page.wait_for_function(f"document.documentElement.dataset.theme == '{mode}'")
            found = record[name, mode] = page.evaluate(LOOK)
            page.evaluate(THIN)
            found["axe"] = []
            if name not in alike:
                found["axe"] = axe.run(page, options=AXE | rules).response["violations"]
        page.set_viewport_size(PHONE)
        width = page.evaluate("document.documentElement.scrollWidth")
        record[name, "light"].update(trouble=trouble, abroad=abroad, width=width)
        page.close()
    context.close()
    return record


def check(visits, complain):
    """Fail with one line for each thing that ``complain`` says about a visit."""
    lines = [
        f"{name} ({mode}): {line}" for (name, mode), v in visits.items() for line in complain(v)
    ]
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


class Visited:
    half: int

    def test_pages_load_without_errors(self, visits):
        check(visits, lambda v: v.get("trouble", []))

    def test_no_request_leaves_the_machine(self, visits):
        check(visits, lambda v: v.get("abroad", []))

    def test_no_sideways_scrolling_on_a_phone(self, visits):
        check(visits, lambda v: [w for w in [v.get("width", 0)] if w > PHONE["width"]])

    def test_mathematics_is_rendered_once(self, visits):
        def complain(visit):
            for formula in visit["formulas"]:
                if formula["rendered"] != 1:
                    yield f"rendered {formula['rendered']} times: {formula['source']!r}"
                elif formula["hidden"] > 2:
                    yield f"wider than its column on a desk: {formula['source']!r}"
                elif formula["mathmlWidth"] > 2:  # shown twice when the style sheet is missing
                    yield f"its MathML shows beside it: {formula['source']!r}"
            if visit["broken"]:
                yield f"{visit['broken']} formulas in error"
            for raw in re.findall(r"\$[^$\n]{1,60}\$?|\\[(\[].{1,60}", visit["text"]):
                yield f"raw mathematics {raw!r}"

        untouched = {key: visit for key, visit in visits.items() if key[1] == "light"}
        check(untouched, complain)
        assert any(visit["formulas"] for visit in untouched.values())

    def test_images_load_and_say_what_they_show(self, visits):
        def complain(visit):
            for image in visit["images"]:
                if not image["loaded"]:
                    yield f"{image['source']} does not load"
                if not image["alt"] or "_images/" in image["alt"]:
                    yield f"{image['source']} has no alt text"

        check(visits, complain)

    def test_figures_are_not_tinted_or_boxed(self, visits):
        """A figure is transparent with colours for both modes; the theme must not filter it."""

        def complain(visit):
            for image in visit["images"]:
                if (image["filter"], image["background"]) != ("none", "rgba(0, 0, 0, 0)"):
                    yield f"{image['source']}: {image['filter']}, {image['background']}"

        check(visits, complain)

    def test_accessibility(self, visits):
        def complain(visit):
            for violation in visit["axe"]:
                if violation["impact"] != "minor":
                    places = ", ".join(str(node["target"][0]) for node in violation["nodes"][:4])
                    yield f"{violation['id']}: {violation['help']} ({places})"

        check(visits, complain)


class TestFirstHalf(Visited):
    half = 0


class TestSecondHalf(Visited):
    half = 1


def in_chapters(site):
    return [name for name in site if name.startswith("chapters/")]


def test_tables_of_a_chapter_are_numbered(site):
    for name in in_chapters(site):
        kinds = [tag for tag, _ in site[name].tags]
        assert kinds.count("table") == kinds.count("caption"), name


def test_every_page_says_what_it_is(site):
    for name, page in site.items():
        kinds = [tag for tag, _ in page.tags]
        assert (kinds.count("title"), kinds.count("h1")) == (1, 1), name
        facts = [a.get("property") or a.get("name") for tag, a in page.tags if tag == "meta"]
        assert facts.count("og:title") == facts.count("viewport") == 1, name
        if name.startswith(("chapters/", "api/", "intro")):
            assert facts.count("description") == facts.count("og:description") == 1, name


def test_pictures_have_their_room_before_they_load(site):
    for name, page in site.items():
        images = [a for tag, a in page.tags if tag == "img" and "_images/" in a["src"]]
        assert all({"width", "height"} <= set(image) for image in images), name


def weight_of(addresses):
    """Bytes of the files as servers send them, texts compressed; animations are left out."""
    files = {(SITE / unquote(urlparse(address).path).lstrip("/")) for address in addresses}
    contents = {file: file.read_bytes() for file in files if file.is_file()}
    texts = (".html", ".css", ".js", ".svg")
    return sum(
        len(gzip.compress(content)) if file.suffix in texts else len(content)
        for file, content in contents.items()
        if b"acTL" not in content[:2000]
    )


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_chapters_are_light_and_stand_still_while_they_load(browser, address, site, size):
    for name in [*in_chapters(site), "intro.html"]:
        context, asked = browser.new_context(viewport=size), []
        context.add_init_script(WATCH)
        page = context.new_page()
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(address + name)
        page.wait_for_timeout(500)  # what moves late, moves too
        moved = page.evaluate("window.moved")
        context.close()
        assert moved < 0.1, f"{name}: a layout shift of {moved:.2f}"
        assert weight_of(asked) < 1_000_000, f"{name}: {weight_of(asked):,} bytes"


def test_search_leads_to_chapters_first_and_shows_no_tex(browser, address, site):
    page = browser.new_page()
    for word in ("leapfrog", "posterior"):
        page.goto(f"{address}search.html?q={word}")
        page.locator("#search-results li p.context").first.wait_for(timeout=10_000)
        results = page.locator("#search-results li").all()
        assert results[0].locator("a").get_attribute("href").startswith("chapters/"), word
        shown = [text for result in results[:8] for text in result.all_inner_texts()]
        assert not re.findall(r"\\[a-z(\[]+", " ".join(shown)), shown
    page.close()


def test_links_lead_somewhere(site):
    dead = []
    for name, page in site.items():
        for link in page.links:
            target, anchor = urldefrag(urljoin(f"/{name}", unquote(link)))
            if urlparse(target).scheme:
                continue
            target = target.lstrip("/") or "index.html"
            if not (SITE / target).is_file():
                dead.append(f"{name} -> {link}")
            elif anchor and target in site and anchor not in site[target].anchors:
                dead.append(f"{name} -> {link} (no such anchor)")
    if dead:
        pytest.fail("\n".join(sorted(dead)), pytrace=False)


def test_every_module_has_its_page(site):
    modules = {path.stem for path in (ROOT / "lib" / "amortised").glob("[a-z]*")}
    described = {Path(name).stem for name in site if name.startswith("api/")}
    assert modules == described, (
        "book/api/ and book/_toc.yml list other modules than lib/amortised/"
    )


def test_every_chapter_is_in_the_book_and_can_be_downloaded(site):
    chapters = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
    assert chapters, "there is no chapter in notebooks/"
    for chapter in chapters:
        page = site.get(f"chapters/{chapter}.html")
        assert page, f"book/_toc.yml does not list chapters/{chapter}"
        assert " ".join(page.text).split()[0] == f"{int(chapter[:2])}.", f"number of {chapter}"
        assert f"../_sources/chapters/{chapter}.ipynb" in page.links
        notebook = json.loads((SITE / "_sources" / "chapters" / f"{chapter}.ipynb").read_text())
        assert any(cell.get("outputs") for cell in notebook["cells"])


def word_of(chapter, site):
    """The longest word that a chapter holds twice and no other page begins a word like."""
    elsewhere = {w[:5] for name, page in site.items() if name != chapter for w in page.words}
    own = [w for w, count in site[chapter].words.items() if count > 1 and w[:5] not in elsewhere]
    return max((word for word in own if len(word) > 5), key=lambda word: (len(word), word))


@pytest.fixture
def chapter(site):
    found = [name for name in site if name.startswith("chapters/01")]
    assert found, "the site has no chapter 1"
    return found[0]


def test_the_index_leads_to_the_title_page(browser, address, site):
    page = browser.new_page()
    page.goto(address)
    page.wait_for_url(f"{address}intro.html", timeout=10_000)
    page.close()


def test_search_finds_a_word_of_chapter_1(browser, address, site, chapter):
    word = word_of(chapter, site)
    page = browser.new_page()
    page.goto(f"{address}search.html?q={word}")
    result = page.locator("#search-results li a").first
    result.wait_for(timeout=10_000)
    assert chapter in result.get_attribute("href"), f"searched for {word!r}"
    page.close()


def test_animations_can_be_stopped(browser, address, site):
    name = next(n for n in in_chapters(site) if ("picture", {"class": "animation"}) in site[n].tags)
    for motion in ("no-preference", "reduce"):
        page = browser.new_page(viewport=PHONE, reduced_motion=motion)
        page.goto(address + name)
        page.locator("picture.animation img").first.scroll_into_view_if_needed()
        button = page.locator("button.pause").first
        for plays in (motion != "reduce", motion == "reduce"):
            page.wait_for_function(
                """(plays) => plays !=
                     /still-/.test(document.querySelector(".animation img").currentSrc)""",
                arg=plays,
            )
            assert button.inner_text() == ("Pause" if plays else "Play")
            button.click()
        page.close()


def test_what_is_folded_prints_with_ink(browser, address, chapter):
    """The theme fades folded code in, and paper caught it before it had begun to show."""
    page = browser.new_page(viewport=DESK)
    page.goto(address + chapter)
    page.emulate_media(media="print", color_scheme="light")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    for box in page.locator("details pre").all()[:3]:
        picture = Image.open(io.BytesIO(box.screenshot())).convert("L")
        dark = sum(picture.histogram()[:128]) / (picture.width * picture.height)
        assert dark > 0.005, f"{dark:.2%} ink: {box.inner_text()[:60]!r}"
    fading = page.evaluate(
        """() => [...document.querySelectorAll("article *")]
             .filter((box) => getComputedStyle(box).animationName !== "none").length"""
    )
    assert not fading
    page.close()


def test_words_of_figures_can_be_read_on_a_phone(browser, address, site):
    """A figure keeps its size and is scrolled within its box, its caption in view."""
    page = browser.new_page(viewport=PHONE)
    for name in in_chapters(site):
        page.goto(address + name)
        shown = page.evaluate(
            """() => [...document.querySelectorAll("article figure img")].map((image) => {
                 const caption = image.closest("figure").querySelector("figcaption");
                 const natural = Math.min(image.getAttribute("width"), 704);
                 return {
                   scale: image.getBoundingClientRect().width / natural,
                   caption: caption.getBoundingClientRect().right,
                   source: image.getAttribute("src"),
                 };
               })"""
        )
        assert shown
        for figure in shown:
            assert figure["scale"] > 0.9 or "png" in figure["source"], (name, figure)
            assert figure["caption"] <= PHONE["width"], (name, figure)
    page.close()


def test_printing_opens_what_is_folded(browser, address, chapter):
    page = browser.new_page(viewport=DESK)
    page.goto(address + chapter)
    folded = "details:not([open]), .toggle-hidden"
    assert page.locator(folded).count(), "nothing is folded on the screen"
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    hidden = page.evaluate(
        """() => [...document.querySelectorAll("details .cell_input, .solution > *")]
             .filter((box) => !box.getClientRects().length || !box.getBoundingClientRect().height)
             .map((box) => box.textContent.slice(0, 60))"""
    )
    assert not hidden, hidden
    page.close()
