"""Coursework from the chapters: python workflow/coursework.py FOLDER [--hidden FOLDER]

The solution is the source and the exercise is generated. A chapter's statement holds its check and
its hint, the cells of its solution say in ``nbgrader`` what they are worth, and
``tests/hidden_tests`` adds tests that students do not see. Written are

    FOLDER/source/NN_slug/NN_slug.ipynb      for the instructor, with solutions and hidden tests
    FOLDER/release/NN_slug/NN_slug.ipynb     for students, without
    FOLDER/answers/NN_slug.md                the answer key

at the parameters of the smoke size, in nbgrader's metadata and in plain Markdown.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat
import yaml
from environment import ROOT
from execute import clean, read_chapter, write_text
from plain import Page, page_titles, targets

from amortised.commands import Parser, stop

HIDDEN = ROOT / "tests" / "hidden_tests"
PIECE = re.compile(
    r"^```\{(?P<name>exercise|solution-start|solution-end)\}[ \t]*(?P<title>[^\n]*)\n"
    r"(?P<body>.*?)^```[ \t]*$\n?",
    re.MULTILINE | re.DOTALL,
)
SNIPPET = re.compile(r"^~~~python\n(.*?)^~~~[ \t]*\n?", re.MULTILINE | re.DOTALL)
HEAD = re.compile(
    r"^\*(?P<kind>Derive|Build|Diagnose) · (?P<code>\d+) \+ (?P<text>\d+) points · "
    r"(?P<minutes>\d+) minutes\.\*$",
    re.MULTILINE,
)
FILED = re.compile(r"^## (\S+)\n(.*?)```python\n(.*?)```", re.DOTALL | re.MULTILINE)
STUB = ["# YOUR CODE HERE", "raise NotImplementedError()"]
WRITTEN = "written.json"
WRITE_HERE = "YOUR ANSWER HERE"
# What nbgrader's formgrader looks for in the folder in which JupyterLab is started.
CONFIG = """\
import os
import sys
from pathlib import Path

# nbgrader calls alembic by name.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
c = get_config()
c.CourseDirectory.root = str(Path(__file__).resolve().parent)
c.CourseDirectory.course_id = "amortised"
"""


class Exercise(NamedTuple):
    """One exercise as the chapter states and solves it."""

    label: str
    title: str
    #: the statement without its snippets, in MyST
    statement: str
    #: snippets to run before the answer is written
    given: list[str]
    #: the last snippet, which marks the answer
    check: str
    #: the reference answer, and what it is worth
    answer: str
    points: int
    #: the derivation or explanation, in MyST, and what it is worth
    text: str
    text_points: int

    @property
    def head(self) -> re.Match:
        found = HEAD.search(self.statement)
        if not found:
            raise ValueError(f"{self.label}: no line '*Derive · 2 + 3 points · 20 minutes.*'")
        return found

    @property
    def asked(self) -> set[str]:
        """Names in backticks: those that the answer is asked to define are among them."""
        return set(re.findall(r"`([A-Za-z_]\w*)(?:\([^`]*\))?`", self.statement))


def pieces(notebook: nbformat.NotebookNode) -> Iterator[tuple[str, object, int]]:
    """Code cells, stretches of text and the directives of exercises: kind, content, points."""
    for cell in notebook.cells:
        points = cell.metadata.get("nbgrader", {}).get("points", 0)
        if cell.cell_type != "markdown":
            yield "answer" if cell.metadata.get("nbgrader") else "code", cell, points
            continue
        position = 0
        for piece in PIECE.finditer(cell.source):
            yield "text", cell.source[position : piece.start()].strip(), 0
            yield piece["name"], piece, points
            position = piece.end()
        yield "text", cell.source[position:].strip(), 0


def stated(piece: re.Match) -> dict:
    """The fields of an exercise that its statement gives."""
    label = re.search(r"^:label: (\S+)\n", piece["body"], re.MULTILINE)
    if not label:
        raise ValueError(f"an exercise has no label: {piece['title']!r}")
    body = piece["body"].replace(label[0], "")
    *given, check = SNIPPET.findall(body) or [""]
    statement = re.sub(r"\n{3,}", "\n\n", SNIPPET.sub("", body)).strip()
    fields = {"label": label[1], "title": piece["title"], "statement": statement}
    return fields | {"given": given, "check": check, "answer": "", "points": 0, "text": ""}


def parts(notebook: nbformat.NotebookNode) -> Iterator[nbformat.NotebookNode | Exercise]:
    """The cells of a chapter in order, each exercise with its solution as one item."""
    one, inside = None, False
    for kind, content, points in pieces(notebook):
        if kind == "exercise":
            one = stated(content)
        elif kind == "solution-start":
            if inside or not one or one["label"] != content["title"].strip():
                raise ValueError(f"solution directives do not pair up at {content[0]!r}")
            inside, one["text_points"] = True, points
        elif kind == "solution-end":
            if not inside:
                raise ValueError(f"solution directives do not pair up at {content[0]!r}")
            yield Exercise(**one)
            one, inside = None, False
        elif inside and kind == "answer":
            one["answer"] += content.source.strip("\n") + "\n\n\n"
            one["points"] += points
        elif inside and kind == "text":
            one["text"] = f"{one['text']}\n\n{content}".strip()
        elif not inside and content:
            yield nbformat.v4.new_markdown_cell(content) if kind == "text" else content
    if one:
        raise ValueError(f"{one['label']} has no solution, or its solution-start no solution-end")


def exercises(notebook: nbformat.NotebookNode) -> dict[str, Exercise]:
    return {part.label: part for part in parts(notebook) if isinstance(part, Exercise)}


def without_solutions(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """What a reader is asked to read: the chapter with its statements, without its solutions."""
    cells = [
        nbformat.v4.new_markdown_cell(part.statement) if isinstance(part, Exercise) else part
        for part in parts(notebook)
    ]
    return clean(nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata))


def filed(path: Path) -> dict[str, str]:
    """Pieces of code by the label of their exercise, in a file of ``## label`` and code."""
    found = FILED.finditer(path.read_text(encoding="utf-8")) if path.is_file() else []
    return {one[1]: one[3] for one in found}


def hidden_tests(stem: str, folders: Iterable[Path]) -> dict[str, str]:
    """The hidden tests of a chapter by label, those of several folders one after the other."""
    found: dict[str, str] = {}
    for folder in folders:
        for label, code in filed(folder / f"{stem}.md").items():
            found[label] = found.get(label, "") + code
    return found


# --- cells ---------------------------------------------------------------------------------------


def make(kind: str, source: str, name: str, **grading) -> nbformat.NotebookNode:
    """A cell with nbgrader's whole schema; its id is its name, so that one of them may be lost."""
    whole = {"grade": False, "solution": False, "locked": False, "task": False, "schema_version": 3}
    metadata = {"nbgrader": whole | {"grade_id": name} | grading}
    new = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
    return new(source.strip("\n"), id=name, metadata=metadata)


def digest(source: str) -> str:
    """A name from the text alone: a cell inserted above does not move it."""
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def marked(code: str, asked: set[str]) -> str:
    """The answer with nbgrader's marks around what students write.

    Functions that the statement names keep their signature; everything else is theirs to write.
    """
    lines, done, open_mark = code.strip("\n").splitlines(), [], False

    def mark(word: str, indent: str = "") -> None:
        done.append(f"{indent}### {word} SOLUTION")

    position = 0
    for node in ast.parse(code).body:
        before = lines[position : node.lineno - 1]
        keeps = isinstance(node, ast.FunctionDef) and node.name in asked
        if keeps and open_mark:
            mark("END")
        elif not keeps and not open_mark:
            mark("BEGIN")
        done += before
        start = node.body[0].lineno - 1 if keeps else node.lineno - 1
        done += lines[node.lineno - 1 : start]
        if keeps:
            mark("BEGIN", "    ")
        done += lines[start : node.end_lineno]
        if keeps:
            mark("END", "    ")
        open_mark, position = not keeps, node.end_lineno
    if open_mark:
        mark("END")
    return "\n".join(done)


def cleared(code: str) -> str:
    """The marked answer as students receive it."""

    def stub(found: re.Match) -> str:
        return "\n".join(found[1] + line for line in STUB)

    return re.sub(r"^( *)### BEGIN SOLUTION\n.*?### END SOLUTION$", stub, code, flags=re.M | re.S)


FETCH = """\
    if "google.colab" not in sys.modules:
        raise ImportError("get the book's library: git clone {0} book && pip install -e book")
    get_ipython().system("git init -q . && git pull -q {0} && pip install -q .")
    if _exit_code:  # of the commands
        raise ImportError("the book's library was not fetched: see the messages above")"""
ADVISE = """\
    raise ImportError("get the book's library: in a clone of its repository, pip install -e .")"""


def bootstrap(address: str) -> str:
    return f"""\
# Run this cell first: it finds the book's library or, in Colab, fetches it.
# This copy runs at a small size: numbers that the text quotes are those of the
# book's page, not of your run.
import importlib.util
import os
import sys

os.environ.setdefault("NBGRADER_EXECUTION", "student")  # checks do not tell the answer
if importlib.util.find_spec("amortised") is None:
{FETCH.format(address) if address else ADVISE}"""


def baked(source: str, values: dict) -> str:
    """The parameters cell with other values: ``name: type = value  # meaning``."""
    for name, value in values.items():
        changed = re.sub(rf"^({name}: \w+ = )\S+", rf"\g<1>{value!r}", source, flags=re.MULTILINE)
        if changed == source and repr(value) not in source:
            raise ValueError(f"the parameters cell has no line for {name}")
        source = changed
    return source


def still(code: str) -> str:
    """The code without its calls of ``plotting.animate``, which take long and show no still."""
    if "plotting.animate(" not in code:
        return code
    lines = code.splitlines()
    for node in reversed(ast.parse(code).body):
        if isinstance(node, ast.Expr) and ast.unparse(node).startswith("plotting.animate("):
            del lines[node.lineno - 1 : node.end_lineno]
    return "\n".join([*lines, "# The animation is on the page of the book."])


def setup(cell: nbformat.NotebookNode, page: Page, values: dict) -> list[nbformat.NotebookNode]:
    """A cell of the chapter itself: text in plain Markdown, code locked, no animations."""
    if cell.cell_type == "markdown":
        text = page.markdown(cell.source)
        plain = nbformat.v4.new_markdown_cell(text, id=f"text-{digest(text)}")
        return [plain] if text.strip() else []
    code = still(cell.source.removeprefix("# NBVAL_CHECK_OUTPUT\n"))
    if "parameters" in cell.metadata.get("tags", []):
        code = baked(code, values)
    made = [make("code", code, f"setup-{digest(code)}", locked=True)]
    figure = cell.metadata.get("mystnb", {}).get("figure")
    if figure and "plotting.animate(" not in cell.source:
        number = page.targets[figure["name"]].number
        caption = f"**{number}** {page.markdown(figure['caption'])}"
        made.append(nbformat.v4.new_markdown_cell(caption, id=f"text-{digest(caption)}"))
    return made


def question(one: Exercise, page: Page, hidden: str, solved: bool) -> list[nbformat.NotebookNode]:
    """Statement, given code, answer, written answer, check: in the order in which they are met."""
    head, number = one.head, page.targets[one.label].number
    statement = page.markdown(one.statement.replace(head[0], "").strip())
    told = f"*{head['kind']} · {one.points} points for the code, marked by the check below it"
    told += f", and {one.text_points} for the text · about {head['minutes']} minutes.*"
    title = f"### {page.link(number, page.targets[one.label].page)} · {one.title}"
    cells = [make("markdown", f"{title}\n\n{told}\n\n{statement}", one.label, locked=True)]
    for index, code in enumerate(one.given):
        cells.append(make("code", code, f"{one.label}-given-{index + 1}", locked=True))
    answer = marked(one.answer, one.asked)
    check, text = one.check.rstrip("\n"), page.markdown(one.text)
    if solved and hidden:
        check += f"\n### BEGIN HIDDEN TESTS\n{hidden.strip()}\n### END HIDDEN TESTS"
    shown = answer if solved else cleared(answer)
    cells.append(make("code", shown, f"{one.label}-answer", solution=True))
    marks = {"grade": True, "locked": True, "points": one.points}
    cells.append(make("code", check, f"{one.label}-check", **marks))
    marks = {"grade": True, "solution": True, "points": one.text_points}
    written = text if solved else WRITE_HERE
    cells.append(make("markdown", written, f"{one.label}-text", **marks))
    return cells


# --- notebooks -----------------------------------------------------------------------------------


class Book(NamedTuple):
    """All chapters, and what their texts refer to."""

    notebooks: dict[str, nbformat.NotebookNode]
    page: Page
    address: str

    @classmethod
    def read(cls) -> "Book":
        config = yaml.safe_load((ROOT / "book" / "_config.yml").read_text(encoding="utf-8"))
        paths = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
        notebooks = {path.stem: read_chapter(path) for path in paths}
        labels = {k: v for stem, one in notebooks.items() for k, v in targets(stem, one).items()}
        site = (config["html"].get("baseurl") or "").rstrip("/")
        page = Page(labels, page_titles(notebooks.items()), site, [])
        return cls(notebooks, page, config["repository"]["url"])

    def assignment(self, stem: str, solved: bool, hidden: dict[str, str]):
        """One chapter as an assignment, solved for the instructor or not for the students."""
        smoke = ROOT / "notebooks" / "params" / f"{stem}.smoke.yaml"
        values = yaml.safe_load(smoke.read_text(encoding="utf-8")) or {}
        self.page.cited.clear()
        cells = [make("code", bootstrap(self.address), "bootstrap", locked=True)]
        for part in parts(self.notebooks[stem]):
            if isinstance(part, Exercise):
                cells += question(part, self.page, hidden.get(part.label, ""), solved)
            else:
                cells += setup(part, self.page, values)
        unique(cells)
        metadata = {"kernelspec": self.notebooks[stem].metadata.kernelspec}
        notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
        nbformat.validate(notebook)
        return notebook

    def key(self, stem: str) -> str:
        """The answer key of a chapter, in Markdown."""
        text = [f"# Answers: {self.page.titles[f'chapters/{stem}']}"]
        path = ROOT / "tests" / "wrong_answers" / f"{stem}.md"
        found = FILED.finditer(path.read_text(encoding="utf-8")) if path.is_file() else []
        mistakes = {one[1]: (one[2].strip(), one[3]) for one in found}
        for one in exercises(self.notebooks[stem]).values():
            number = self.page.targets[one.label].number
            text += [f"## {number} · {one.title}", one.head[0].strip("*")]
            text += [self.page.markdown(one.text), f"```python\n{one.answer.strip()}\n```"]
            if one.label in mistakes:
                said, code = mistakes[one.label]
                text += [f"*A mistake to expect.* {said}", f"```python\n{code.strip()}\n```"]
        return "\n\n".join(text) + "\n"


def fingerprint(notebook: nbformat.NotebookNode) -> str:
    """A digest of what a lecturer changes, cells and their points, and not of what a run leaves."""
    cells = [(c.cell_type, c.source, c.metadata.get("nbgrader")) for c in notebook.cells]
    return digest(json.dumps(cells, sort_keys=True))


def written(folder: Path) -> dict[str, str]:
    """The fingerprints of the notebooks in ``source`` as they were written last."""
    path = folder / WRITTEN
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def keep_changes(folder: Path, stems: Iterable[str]) -> None:
    """Stop, before anything is written, where a lecturer's own work would be lost."""
    known = written(folder)
    for stem in stems:
        path = folder / "source" / stem / f"{stem}.ipynb"
        if path.is_file() and fingerprint(nbformat.read(path, 4)) != known.get(stem):
            reason = f"{path} was changed since it was written: move it away for a new one"
            raise SystemExit(stop(reason, 2))


def unique(cells: list[nbformat.NotebookNode]) -> None:
    """Number cells of equal text: two ids of a notebook may not be equal."""
    seen: dict[str, int] = {}
    for cell in cells:
        seen[cell.id] = seen.get(cell.id, 0) + 1
        if seen[cell.id] > 1:
            cell.id = f"{cell.id}-{seen[cell.id]}"
            if "nbgrader" in cell.metadata:
                cell.metadata.nbgrader.grade_id = cell.id


def write(folder: Path, stems: Iterable[str], hidden: list[Path]) -> None:
    book = Book.read()
    for overlay in hidden:
        if not overlay.is_dir():
            raise SystemExit(
                f"there is no folder {overlay}: HIDDEN names one with NN_slug.md files"
            )
    stems = list(stems) or list(book.notebooks)
    keep_changes(folder, stems)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "nbgrader_config.py", CONFIG)
    for stem in stems:
        tests = hidden_tests(stem, [HIDDEN, *hidden])
        if unknown := set(tests) - set(exercises(book.notebooks[stem])):
            raise SystemExit(f"hidden tests of {stem} name no exercise of it: {sorted(unknown)}")
        for kind in ("source", "release"):
            notebook = book.assignment(stem, kind == "source", tests)
            path = folder / kind / stem / f"{stem}.ipynb"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, nbformat.writes(notebook) + "\n")
            if kind == "source":
                known = written(folder) | {stem: fingerprint(notebook)}
                write_text(folder / WRITTEN, json.dumps(known, indent=2) + "\n")
        (folder / "answers").mkdir(exist_ok=True)
        write_text(folder / "answers" / f"{stem}.md", book.key(stem))
        print(f"{stem:<24} {folder / 'release' / stem}")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=Path, action="append", default=[], help="an overlay")
    parser.add_argument("--chapter", action="append", default=[], help="default: all")
    arguments = parser.parse_args()
    write(arguments.folder, arguments.chapter, arguments.hidden)


if __name__ == "__main__":
    main()
