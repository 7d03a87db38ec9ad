"""MyST as plain Markdown: what coursework needs outside the book, where no Sphinx resolves it.

Numbers of equations, figures, tables, sections, theorems and exercises are found as the book finds
them, by counting labels in the order of the page. A role or directive that is not known here is an
error, never left on the page.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import nbformat
import pybtex.database
import pybtex.richtext
from environment import ROOT

FENCE = re.compile(r"^(?P<fence>`{3,}|:{3,}|~{3,})(\{(?P<name>[\w:-]+)\})?[ \t]*(?P<title>.*)$")
OPTION = re.compile(r"^:([\w-]+):\s*(.*)$")
EQUATION = re.compile(
    r"^\$\$\n(?P<body>.*?)\n\$\$(?:[ \t]*\((?P<label>[\w-]+)\))?[ \t]*$", re.M | re.S
)
LABEL = re.compile(r"^\(([\w-]+)\)=[ \t]*\n?", re.M)
ROLE = re.compile(r"\{([a-z]+(?::[a-z]+)?)\}`([^`]+)`")
NAMED = re.compile(r"(?P<text>.*\S)\s*<(?P<target>[^<>]+)>", re.S)
CODE = re.compile(r"^(?P<fence>~{3,}|`{3,}(?=\w))[^\n]*\n.*?^(?P=fence)[ \t]*$", re.M | re.S)
# What has a number, in one pass: a heading, the end of an equation, the head of a directive.
LABELLED = re.compile(
    r"(?:^\((?P<section>[\w-]+)\)=\n+)?^(?P<level>##+) (?P<heading>.*)$"
    r"|^\$\$[ \t]*\((?P<equation>[\w-]+)\)"
    r"|^(?:`{3,}|:{3,})\{(?P<name>[\w:-]+)\}[ \t]*(?P<title>.*)$"
    r"(?:\n:(?:label|name): (?P<label>\S+))?",
    re.M,
)
FORMS = {"figure": "Fig. {}", "table": "Table {}", "equation": "({})", "exercise": "Exercise {}"}
THEOREMS = {"theorem", "lemma", "proposition", "corollary", "definition", "algorithm"}
FORMS |= {kind: kind.capitalize() + " {}" for kind in THEOREMS}
BOXES = {"admonition", "note", "tip", "warning", "important", "hint", "caution", "seealso"}


class Target(NamedTuple):
    #: ``Fig. 2.1``, ``Section 1.9.1``, ``Exercise 2.4`` or, for equations, ``(2.1)``
    number: str
    #: the heading of a section, the caption of an exercise
    title: str
    #: the page that holds it, ``chapters/02_pq_vs_qp.html#fig-pq-motion``
    page: str


class Directive(NamedTuple):
    name: str
    title: str
    options: dict[str, str]
    body: str


def directives(text: str, replace: Callable[[Directive], str]) -> str:
    """The text with each outermost directive replaced; plain code fences stay as they are."""
    lines, done, position = text.splitlines(), [], 0
    while position < len(lines):
        head = FENCE.match(lines[position])
        if not head:
            done.append(lines[position])
            position += 1
            continue
        end = position + 1
        while end < len(lines) and lines[end].rstrip() != head["fence"]:
            end += 1
        if end == len(lines):
            raise ValueError(f"the fence {lines[position]!r} is never closed")
        inside = lines[position + 1 : end]
        if head["name"] is None:
            done += lines[position : end + 1]
        else:
            options = {}
            while inside and (option := OPTION.match(inside[0])):
                options[option[1]] = option[2]
                inside.pop(0)
            body = "\n".join(inside).strip("\n")
            done.append(replace(Directive(head["name"], head["title"].strip(), options, body)))
        position = end + 1
    return "\n".join(done)


# --- numbers -------------------------------------------------------------------------------------


def targets(stem: str, notebook: nbformat.NotebookNode) -> dict[str, Target]:
    """Everything in a chapter that has a label, with the number that the book gives it."""
    chapter, counts, found = int(stem[:2]), Counter(), {}

    def add(kind: str, label: str | None, title: str | None = "") -> None:
        counts[kind] += 1
        if label:
            number = FORMS[kind].format(f"{chapter}.{counts[kind]}")
            found[label] = Target(number, title or "", f"chapters/{stem}.html#{label}")

    def section(depth: int, label: str | None, title: str) -> None:
        counts[depth] += 1
        for deeper in range(depth + 1, 7):
            counts[deeper] = 0
        if label:
            number = ".".join(str(counts[level]) for level in range(2, depth + 1))
            page = f"chapters/{stem}.html#{label}"
            found[label] = Target(f"Section {chapter}.{number}", title, page)

    for cell in notebook.cells:
        shown = cell.metadata.get("mystnb", {}) if cell.cell_type == "code" else {}
        if "figure" in shown:
            add("figure", shown["figure"].get("name"))
        tables = shown.get("table", [])
        for table in tables if isinstance(tables, list) else [tables]:
            add("table", table["name"])
        if cell.cell_type != "markdown":
            continue
        for one in LABELLED.finditer(CODE.sub("", cell.source)):
            if one["level"]:
                section(len(one["level"]), one["section"], one["heading"])
            elif one["equation"]:
                add("equation", one["equation"])
            elif (kind := one["name"].removeprefix("prf:").removeprefix("list-")) in FORMS:
                add(kind, one["label"], one["title"])
    return found


def heading(notebook: nbformat.NotebookNode) -> str:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.search(r"^# (.*)$", text, re.M)[1]


# --- citations -----------------------------------------------------------------------------------


@cache
def bibliography(path: Path = ROOT / "book" / "references.bib") -> pybtex.database.BibliographyData:
    return pybtex.database.parse_file(path)


def bare(text: str) -> str:
    """LaTeX's braces and accents, as far as names and titles use them."""
    return str(pybtex.richtext.Text.from_latex(text))


def surnames(key: str) -> str:
    if key not in bibliography().entries:
        raise ValueError(f"{key} is cited, but it is not in book/references.bib")
    people = bibliography().entries[key].persons
    people = people.get("author") or people.get("editor") or []
    names = [bare(" ".join(person.prelast_names + person.last_names)) for person in people]
    return f"{names[0]} et al." if len(names) > 2 else " and ".join(names) or key


def cite(key: str) -> tuple[str, str]:
    return surnames(key), bibliography().entries[key].fields.get("year", "n.d.")


def reference(key: str) -> str:
    """One line of the list of references."""
    names, year = cite(key)
    fields = bibliography().entries[key].fields
    where = next((fields[f] for f in ("journal", "booktitle", "publisher") if f in fields), "")
    if not where and "eprint" in fields:
        where = f"arXiv:{fields['eprint']}"
    parts = [f"{names} ({year})", bare(fields["title"]), f"*{bare(where)}*" if where else ""]
    return "- " + ". ".join(filter(None, parts)) + "."


# --- text ----------------------------------------------------------------------------------------


class Page(NamedTuple):
    """What the text of one chapter is resolved with."""

    #: labels of all chapters
    targets: dict[str, Target]
    #: titles of the book's pages, ``chapters/02_pq_vs_qp`` and so on
    titles: dict[str, str]
    #: address of the published book, without a slash at its end, or empty
    site: str
    #: keys cited so far, in order
    cited: list[str]

    def link(self, text: str, page: str) -> str:
        return f"[{text}]({self.site}/{page})" if self.site else text

    def role(self, found: re.Match) -> str:
        role, content = found[1], " ".join(found[2].split())
        if role in ("cite:p", "cite:t", "cite"):
            keys = [key.strip() for key in content.split(",")]
            self.cited.extend(key for key in keys if key not in self.cited)
            parts = [cite(key) for key in keys]
            if role == "cite:t":
                return "; ".join(f"{names} ({year})" for names, year in parts)
            return "(" + "; ".join(f"{names}, {year}" for names, year in parts) + ")"
        if role.startswith("py:"):
            last = content.rpartition(".")[2] if content.startswith("~") else content
            return f"`{last}`" if role != "py:func" else f"`{last}()`"
        named = NAMED.fullmatch(content)
        text, target = (named["text"], named["target"]) if named else (None, content)
        if role == "doc":
            page = target.removeprefix("/")
            page = page if page in self.titles else f"chapters/{page}"
            if page not in self.titles:
                raise ValueError(f"{{doc}}`{content}`: there is no page {target}")
            chapter = re.match(r"chapters/(\d+)_", page)
            title = f"chapter {int(chapter[1])}" if chapter else f"*{self.titles[page]}*"
            return self.link(text or title, f"{page}.html")
        if role not in ("eq", "numref", "ref", "prf:ref"):
            raise ValueError(f"the role {{{role}}} has no form in plain Markdown")
        if target not in self.targets:
            raise ValueError(f"{{{role}}}`{content}`: nothing has the label {target}")
        number, title, page = self.targets[target]
        if role == "ref" and not number.startswith("Exercise"):
            return self.link(text or title, page)
        return self.link(text or number, page)

    def equation(self, found: re.Match) -> str:
        body, label = found["body"].strip(), found["label"]
        if r"\\" in body and not re.fullmatch(r"\\begin\{.*\\end\{\w+\*?\}[.,]?", body, re.S):
            body = rf"\begin{{aligned}}{body}\end{{aligned}}"
        tag = rf" \tag{{{self.targets[label].number.strip('()')}}}" if label else ""
        return f"$$\n{body}{tag}\n$$"

    def directive(self, one: Directive) -> str:
        body, title = self.markdown(one.body), self.markdown(one.title)
        label = one.options.get("label") or one.options.get("name")
        number = self.targets[label].number if label in self.targets else ""
        kind = one.name.removeprefix("prf:")
        if one.name in BOXES:
            return quote(f"**{title or one.name.capitalize()}**\n\n{body}")
        if kind in THEOREMS and kind != one.name:
            name = number or kind.capitalize()
            return quote(f"**{name}**" + (f" ({title})" if title else "") + f"\n\n{body}")
        if one.name == "prf:proof":
            return quote(f"*Proof.* {body} $\\square$")
        if one.name in ("table", "list-table"):
            rows = body if one.name == "table" else pipes(body)
            return f"**{number or 'Table'}** {title}\n\n{rows}"
        if one.name == "math":
            return self.markdown(f"$$\n{one.body}\n$$" + (f" ({label})" if label else ""))
        if one.name in ("image", "figure"):
            return f"![{one.options.get('alt', '')}]({title})\n\n{body}".rstrip()
        if one.name == "bibliography":
            return "\n".join(map(reference, sorted(self.cited)))
        raise ValueError(f"the directive {{{one.name}}} has no form in plain Markdown")

    def markdown(self, text: str) -> str:
        text = directives(text, self.directive)
        text = EQUATION.sub(self.equation, LABEL.sub("", text))
        return ROLE.sub(self.role, text)


def quote(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


def pipes(body: str) -> str:
    """A list of lists, ``* - first`` and ``  - next``, as a table of pipes."""
    rows = [
        [" ".join(entry.split()) for entry in re.split(r"^ *(?:\* )?- ?", row, flags=re.M)[1:]]
        for row in re.split(r"^(?=\* )", body, flags=re.M)
        if row.strip()
    ]
    rows.insert(1, [":--"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page_titles(chapters: Iterable[tuple[str, nbformat.NotebookNode]]) -> dict[str, str]:
    titles = {f"chapters/{stem}": heading(notebook) for stem, notebook in chapters}
    for path in (ROOT / "book").glob("*.md"):
        first = re.search(r"^# (.*)$", path.read_text(encoding="utf-8"), re.M)
        titles[path.stem] = first[1] if first else path.stem
    return titles
