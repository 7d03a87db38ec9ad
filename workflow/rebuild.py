"""A submission rebuilt on the notebook that was released, so that what is graded is known.

Students delete cells, edit checks, copy answers, rename files and use tools that drop metadata. The
released notebook gives every cell but the answers; a student's own cells stay where they were.
"""

import re
from typing import NamedTuple

import nbformat

Cell = nbformat.NotebookNode


class Rebuilt(NamedTuple):
    notebook: nbformat.NotebookNode
    #: what was found to be unlike the release, one phrase each
    notes: list[str]


def grading(cell: Cell) -> dict:
    return cell.metadata.get("nbgrader") or {}


def is_answer(cell: Cell) -> bool:
    return bool(grading(cell).get("solution"))


def plain(source: str) -> str:
    """The text without the white space at the ends of lines, which editors change."""
    return re.sub(r"[ \t]+$", "", source, flags=re.MULTILINE).strip()


def names_of(released: list[Cell], submitted: list[Cell]) -> list[str | None]:
    """For each cell of a submission, the released cell that it is, by grade id, cell id or text."""
    known = {cell.id for cell in released}
    texts = {plain(cell.source): cell.id for cell in released if not is_answer(cell)}
    return [
        next(
            (
                name
                for name in (grading(cell).get("grade_id"), cell.get("id"))
                if name is not None and name in known
            ),
            texts.get(plain(cell.source)),
        )
        for cell in submitted
    ]


def likeness(release: nbformat.NotebookNode, submission: nbformat.NotebookNode) -> int:
    """How many cells of the release are in the submission."""
    return len(set(names_of(release.cells, submission.cells)) - {None})


def rebuild(release: nbformat.NotebookNode, submission: nbformat.NotebookNode) -> Rebuilt:
    """The release with the answers of the submission and the student's own cells.

    An answer whose cell is gone is sought among the student's own cells of that question: code runs
    in its place in any case, and no empty answer defines its names again; texts become the answer.
    """
    released = {cell.id: cell for cell in release.cells}
    order = {name: index for index, name in enumerate(released)}
    answers: dict[str, list[str]] = {}
    own: dict[int, list[Cell]] = {}
    notes, seen, place = [], set(), -1
    names = names_of(release.cells, submission.cells)
    for cell, name in zip(submission.cells, names, strict=True):
        if "injected-parameters" in cell.metadata.get("tags", []):
            continue
        if name is None:
            own.setdefault(place, []).append(cell)
            continue
        place = order[name]
        if is_answer(released[name]):
            answers.setdefault(name, []).append(cell.source)
        elif name in seen:
            notes.append(f"{name} stands there twice")
        elif cell.cell_type == "code" and plain(cell.source) != plain(released[name].source):
            notes.append(f"{name} was changed, and set back")
        seen.add(name)
    for name, cell in released.items():
        if is_answer(cell) and cell.cell_type == "markdown" and name not in answers:
            answers[name] = found_texts(own, order[name.rpartition("-")[0]], order[name])
    cells = list(own_cells(own, -1))
    for name, index in order.items():
        cell = nbformat.from_dict(released[name])
        if is_answer(cell):
            cell.source, note = answer(cell, answers.get(name, []))
            notes += [note] if note else []
        elif name not in seen and cell.cell_type == "code":
            notes.append(f"{name} was missing")
        cells += [cell, *own_cells(own, index)]
    notebook = nbformat.from_dict(release)
    notebook.cells = cells
    for cell in cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return Rebuilt(notebook, notes)


def found_texts(own: dict[int, list[Cell]], start: int, end: int) -> list[str]:
    """The student's own texts within a question, taken out of their place and joined."""
    found = []
    for place in range(start, end + 1):
        cells = own.get(place, [])
        found += [cell.source for cell in cells if cell.cell_type == "markdown"]
        own[place] = [cell for cell in cells if cell.cell_type != "markdown"]
    return ["\n\n".join(found)] if found else []


def answer(released: Cell, written: list[str]) -> tuple[str, str]:
    """What counts as the answer: of several, the last that is not the empty one."""
    name, code = released.id, released.cell_type == "code"
    if not written:
        return ("" if code else released.source), f"{name} was missing"
    changed = [text for text in written if plain(text) != plain(released.source)]
    note = f"{name} stands there {len(written)} times: the last counts" if len(written) > 1 else ""
    return (changed[-1] if changed else released.source), note


def own_cells(own: dict[int, list[Cell]], place: int):
    """The student's cells that stood behind a released one, free of anything that is graded."""
    for index, cell in enumerate(own.get(place, [])):
        make = (
            nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
        )
        yield make(cell.source, id=f"own-{place + 1}-{index + 1}")
