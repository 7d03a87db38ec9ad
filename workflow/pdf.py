"""Print the whole site as one PDF with Chromium: python workflow/pdf.py [OUTPUT.pdf]

The pages of _toc.yml become one document in a browser: every article in its order, each picture at
rest, each link between pages a link within the document. Chromium prints it with page numbers and
bookmarks. --card writes the picture that previews of links show, book/_static/card.jpg.
"""

import functools
import http.server
import re
import shutil
import sys
import threading
from pathlib import Path

from amortised.commands import Parser

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "book" / "_build" / "html"
BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]

# Ids are made unique by the name of their page, and links follow them.
JOIN = r"""
async (names) => {
  const own = document.querySelector("article");
  const parts = [];
  for (const name of names) {
    const address = new URL(name + ".html", location.href);
    const page = new DOMParser().parseFromString(await (await fetch(address)).text(), "text/html");
    const article = page.querySelector("article");
    for (const node of article.querySelectorAll("[id]")) node.id = `${name}:${node.id}`;
    for (const link of article.querySelectorAll("a[href]")) {
      const target = new URL(link.getAttribute("href"), address);
      const found = names.find((other) => target.pathname.endsWith(`/${other}.html`));
      const place = decodeURIComponent(target.hash).replace("#", ":");
      link.href = found ? `#${found}${place}` : target;
    }
    for (const image of article.querySelectorAll("img")) {
      image.src = new URL(image.getAttribute("src"), address);
    }
    for (const source of article.querySelectorAll("source")) {
      source.srcset = new URL(source.getAttribute("srcset"), address);
    }
    article.querySelectorAll(".prev-next-footer").forEach((box) => box.remove());
    article.querySelectorAll("details").forEach((box) => (box.open = true));
    article.id = name;
    article.style.breakBefore = parts.length ? "page" : "auto";
    parts.push(document.adoptNode(article));
  }
  own.replaceWith(...parts);
  setMathematics();
  await document.fonts.ready;
  await Promise.all([...document.images].map((image) => image.decode().catch(() => {})));
  return parts.map((part) => part.querySelectorAll("h1").length);
}
"""

FOOTER = (
    '<div style="font: 8px sans-serif; width: 100%; text-align: center; color: #555">'
    '<span class="pageNumber"></span></div>'
)


def chapters_and_pages(toc: Path) -> list[str]:
    """The pages of the book in their order, without those of the library and the bibliography's."""
    text = toc.read_text(encoding="utf-8")
    names = re.findall(r"^root: (\S+)|^\s*- file: (\S+)", text, re.M)
    pages = [root or file for root, file in names]
    return [page for page in pages if not page.startswith("api")]


def print_book(browser, address: str, output: Path, names: list[str]) -> None:
    page = browser.new_page(reduced_motion="reduce", color_scheme="light")
    page.set_default_timeout(300_000)
    page.goto(f"{address}/{names[0]}.html")
    titles = page.evaluate(JOIN, names)
    if titles != [1] * len(names):
        sys.exit(f"pages without exactly one title: {dict(zip(names, titles, strict=True))}")
    page.pdf(
        path=output,
        format="A4",
        margin={"top": "16mm", "bottom": "18mm", "left": "15mm", "right": "15mm"},
        display_header_footer=True,
        header_template="<span></span>",
        footer_template=FOOTER,
        outline=True,
        tagged=True,
    )


def draw_card(browser, address: str, output: Path) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 630}, color_scheme="light")
    page.goto(f"{address}/404.html")
    page.set_content(
        f'<body style="margin: 0; font: 600 54px sans-serif; color: #10181f; text-align: center">'
        f'<p style="margin: 34px 0 14px">Amortised Inference</p>'
        f'<img src="{address}/_static/hero.svg" style="max-width: 1140px; height: 480px" /></body>'
    )
    page.wait_for_load_state("networkidle")
    page.screenshot(path=output, type="jpeg", quality=80)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    default = ROOT / "book" / "_build" / "amortised-inference.pdf"
    parser.add_argument("output", type=Path, nargs="?", default=default)
    parser.add_argument("--site", type=Path, default=SITE)
    parser.add_argument("--card", action="store_true", help="write book/_static/card.jpg instead")
    options = parser.parse_args()
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        sys.exit(f"no Chromium on PATH (looked for {', '.join(BROWSERS)}): install one")
    if not (options.site / "intro.html").is_file():
        sys.exit(f"there is no site in {options.site}: build it first (make book)")
    from playwright.sync_api import sync_playwright

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(options.site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
            if options.card:
                draw_card(browser, address, ROOT / "book" / "_static" / "card.jpg")
            else:
                names = chapters_and_pages(ROOT / "book" / "_toc.yml")
                print_book(browser, address, options.output, names)
                print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB")
            browser.close()
        server.shutdown()


if __name__ == "__main__":
    main()
