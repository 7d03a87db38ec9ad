"""Print what each chapter and each exercise asks of a reader: python workflow/exercise_table.py

The pages book/studying.md and book/teaching.md include one table each, so both are printed, into
the files that are named. All of it is counted in the chapters.
"""

import sys
from pathlib import Path

from coursework import Book, exercises, without_solutions
from words import num_words

PACE = 60  # words a minute, which leaves time to follow a derivation


def chapter_table(book: Book) -> str:
    lines = [
        "| chapter | reading (min) | exercises | minutes for them | points: code + text |",
        "|:--|--:|--:|--:|--:|",
    ]
    for stem, notebook in book.notebooks.items():
        cells = without_solutions(notebook).cells
        words = sum(num_words(cell.source) for cell in cells if cell.cell_type == "markdown")
        asked = exercises(notebook).values()
        minutes = sum(int(one.head["minutes"]) for one in asked)
        points = f"{sum(one.points for one in asked)} + {sum(one.text_points for one in asked)}"
        read = 10 * round(words / PACE / 10)
        lines.append(
            f"| {{doc}}`/chapters/{stem}` | {read} | {len(asked)} | {minutes} | {points} |"
        )
    note = f"\nReading time at {PACE} words a minute, without running or changing code."
    return "\n".join([*lines, note]) + "\n"


def exercise_table(book: Book) -> str:
    lines = ["| exercise | kind | minutes | points: code + text |", "|:--|:--|--:|--:|"]
    for notebook in book.notebooks.values():
        for one in exercises(notebook).values():
            number = book.page.targets[one.label].number
            points = f"{one.points} + {one.text_points}"
            kind, minutes = one.head["kind"].lower(), one.head["minutes"]
            lines.append(f"| {number}, {one.title} | {kind} | {minutes} | {points} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    book = Book.read()
    for path, table in zip(sys.argv[1:], (chapter_table, exercise_table), strict=True):
        Path(path).write_text(table(book), encoding="utf-8")
