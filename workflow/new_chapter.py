"""Begin a chapter from another one: python workflow/new_chapter.py 01_vi_recap 08_mine

Copied are the source, its parameters, and the wrong answers and hidden tests of its exercises. A
label may exist once in a book, so all labels of the copy are renamed: ``fig-vi-model`` becomes
``fig-mine-model``. The copy is registered in the table of contents, on the front page and in the
README; until `make times` notes its own time, its origin's stands for it. What is left is to write
it.
"""

import json
import re
import sys
from pathlib import Path

from environment import ROOT
from execute import read_chapter
from execution_table import README_ROW, in_short
from plain import heading, targets

from amortised.commands import Parser

FILES = [
    "notebooks/{}.py",
    "notebooks/params/{}.smoke.yaml",
    "notebooks/params/{}.full.yaml",
    "tests/wrong_answers/{}.md",
    "tests/hidden_tests/{}.md",
]
REGISTERS = ["book/_toc.yml", "book/intro.md", "README.md", "workflow/times.json"]
CARD = """\
:::{{grid-item-card}} {number} · {title}
:columns: 12
:link: chapters/{stem}
:link-type: doc
**Which question does this chapter answer?**

Adapted from chapter {origin}.
:::

"""


def relabelled(text: str, labels: set[str], infix: str) -> str:
    """The text with the middle of each label replaced, wherever the label is named."""
    for label in sorted(labels, key=len, reverse=True):
        kind, _, rest = label.split("-", 2)
        text = re.sub(rf"(?<![\w-]){re.escape(label)}(?![\w-])", f"{kind}-{infix}-{rest}", text)
    return text


def inserted(text: str, pattern: str, line: str) -> str:
    """The text with a line behind the last one that matches."""
    last = list(re.finditer(pattern, text, re.MULTILINE))[-1]
    return text[: last.end()] + line + text[last.end() :]


def refuse(reason: str) -> None:
    sys.exit(f"no chapter was made: {reason}")


def check(root: Path, origin: str, stem: str) -> None:
    chapters = sorted(path.stem for path in (root / "notebooks").glob("[0-9]*.py"))
    if origin not in chapters:
        refuse(f"FROM={origin} is none of: {' '.join(chapters)}")
    if not re.fullmatch(r"\d\d_[a-z][a-z0-9_]*", stem):
        refuse(f"TO={stem} must be two digits, an underscore and a name in small letters, 08_mine")
    taken = [name for name in chapters if name[:2] == stem[:2]]
    if taken:
        refuse(f"TO={stem} has the number of {taken[0]}")
    for pattern in FILES:
        if (root / pattern.format(stem)).exists():
            refuse(f"{pattern.format(stem)} is there already")


def make(root: Path, origin: str, stem: str) -> None:
    check(root, origin, stem)
    notebook = read_chapter(root / "notebooks" / f"{origin}.py")
    labels = set(targets(origin, notebook))
    labels |= {label.replace("ex-", "sol-", 1) for label in labels if label.startswith("ex-")}
    infix, title = stem[3:].replace("_", "-"), f"{heading(notebook)}, adapted"
    for path in (root / "notebooks").glob("[0-9]*.py"):
        if re.search(rf"\b(?:sec|fig|eq|ex)-{infix}-", path.read_text(encoding="utf-8")):
            refuse(f"the labels of TO={stem} would be those of {path.stem}: choose another name")
    for pattern in FILES:
        source = root / pattern.format(origin)
        if source.is_file():
            text = relabelled(source.read_text(encoding="utf-8"), labels, infix)
            text = text.replace(f"# # {heading(notebook)}\n", f"# # {title}\n", 1)
            (root / pattern.format(stem)).write_text(text, encoding="utf-8")
    toc, intro, readme, times = (root / name for name in REGISTERS)
    entry = f"\n      - file: chapters/{stem}"
    listed = inserted(toc.read_text(encoding="utf-8"), r"^ *- file: chapters/\S+$", entry)
    toc.write_text(listed, encoding="utf-8")
    number, before = int(stem[:2]), intro.read_text(encoding="utf-8")
    card = CARD.format(number=number, title=title, stem=stem, origin=int(origin[:2]))
    intro.write_text(
        re.sub(r"^::::$", lambda _: card + "::::", before, count=1, flags=re.M), encoding="utf-8"
    )
    row = f"\n| [{number} {title}](notebooks/{stem}.ipynb) | Which question does it answer? |"
    noted = json.loads(times.read_text(encoding="utf-8"))
    noted["seconds"][stem] = noted["seconds"][origin]
    times.write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")
    told = README_ROW.sub(in_short(noted["seconds"]), readme.read_text(encoding="utf-8"))
    readme.write_text(inserted(told, r"^\| \[\d+ .*\]\(notebooks/.*$", row), encoding="utf-8")
    print(f"made notebooks/{stem}.py, and its lines in {', '.join(REGISTERS)}")


if __name__ == "__main__":
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("origin", help="the chapter to begin from")
    parser.add_argument("stem", help="the name of the new one: NN_slug")
    arguments = parser.parse_args()
    make(ROOT, arguments.origin, arguments.stem)
