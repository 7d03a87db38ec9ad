"""Write the chapters without their solutions: python workflow/coursework.py FOLDER

The solution is the source and the exercise is generated. What stands between a ``solution-start``
and its ``solution-end`` directive, or in a ``solution`` directive, gives way to an empty code cell.
"""

import re
import sys
from pathlib import Path

import nbformat
from environment import ROOT
from execute import clean, read_chapter, write_text

# A directive up to its closing fence: ```{solution-start} label, options, ``` (or with colons).
DIRECTIVE = re.compile(
    r"^(?P<fence>`{3,}|:{3,})\{solution(?P<kind>|-start|-end)\}.*?^(?P=fence)[ \t]*$\n?",
    re.MULTILINE | re.DOTALL,
)


def answer_cell() -> nbformat.NotebookNode:
    return nbformat.v4.new_code_cell("# Your answer")


def without_solutions(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The exercise version of a chapter; :class:`ValueError` if its directives do not pair up."""
    cells, inside = [], False

    def keep(text: str) -> None:
        if text.strip() and not inside:
            cells.append(nbformat.v4.new_markdown_cell(text.strip()))

    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            if not inside:
                cells.append(cell)
            continue
        position = 0
        for directive in DIRECTIVE.finditer(cell.source):
            keep(cell.source[position : directive.start()])
            position = directive.end()
            if inside == (directive["kind"] != "-end"):
                raise ValueError(f"solution directives do not pair up at {directive[0]!r}")
            if not inside:
                cells.append(answer_cell())
            inside = directive["kind"] == "-start"
        keep(cell.source[position:])
    if inside:
        raise ValueError("the last solution-start has no solution-end")
    notebook.cells = cells
    return clean(notebook)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted((ROOT / "notebooks").glob("[0-9]*.py")):
        notebook = without_solutions(read_chapter(source))
        write_text(folder / f"{source.stem}.ipynb", nbformat.writes(notebook) + "\n")
        print(folder / f"{source.stem}.ipynb")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
