"""What every chapter promises: its pair, its parameters, its outputs, its shape, its smoke run.

Sizes are counted on what a reader is asked to read: solutions are left out, and cells that the page
folds (``hide-input``: imports, plots) count for the longest cell and the longest line, but neither
for the number of cells nor for the median. Words are counted by ``workflow/words.py``. A line of
code is a line that is not blank.
"""

import ast
import builtins
import io
import math
import re
import statistics
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
import yaml
from coursework import HIDDEN, Book, exercises, filed, hidden_tests, without_solutions
from execute import execute, read_chapter
from papermill.exceptions import PapermillExecutionError
from words import num_words

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
BOOK = Book.read()

each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)


# --- reading a chapter ---------------------------------------------------------------------------


def committed(chapter: Path) -> nbformat.NotebookNode:
    return nbformat.read(chapter.with_suffix(".ipynb"), as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


@cache
def parameters_cell(chapter: Path) -> ast.Module:
    (cell,) = [cell for cell in read_chapter(chapter).cells if "parameters" in tags(cell)]
    return ast.parse(cell.source)


def parameters_of(chapter: Path) -> dict[str, str]:
    """Names and annotations of the chapter's parameters."""
    body = parameters_cell(chapter).body
    return {statement.target.id: ast.unparse(statement.annotation) for statement in body}


def is_check_cell(cell) -> bool:
    return "checks.parameters(" in cell.source


def num_lines(cell) -> int:
    return sum(bool(line.strip()) for line in cell.source.splitlines())


def test_words_are_counted_as_stated():
    markdown = """## The bound of {cite:t}`burda2016iwae`

Take $K$ samples; the reader's `log_weights` are averaged.

$$ \\log p(x) \\ge L_K $$ (eq-bound)

```{exercise} Tighten it
:label: ex-tight
Prove that more samples help.
```

```python
print("not prose")
```

Done.
"""
    # "The bound of", "Take K samples ... averaged", "Prove ... help", "Done"
    assert num_words(markdown) == 3 + 8 + 5 + 1


# --- pair, parameters, outputs -------------------------------------------------------------------


@each_chapter
def test_pair_is_in_sync(chapter):
    source, pair = read_chapter(chapter), committed(chapter)
    expected = [(cell.cell_type, cell.source, dict(cell.metadata)) for cell in source.cells]
    actual = [(cell.cell_type, cell.source, dict(cell.metadata)) for cell in pair.cells]
    for index, (wanted, found) in enumerate(zip(expected, actual, strict=False)):
        assert found == wanted, f"cell {index} differs: run make notebooks NB={chapter.stem}"
    assert len(actual) == len(expected), f"run make notebooks NB={chapter.stem}"
    assert pair.metadata.kernelspec == source.metadata.kernelspec


@each_chapter
def test_parameters_are_annotated_and_checked(chapter):
    first, second = code_cells(read_chapter(chapter))[:2]
    assert tags(first) == ["parameters"], "the first code cell is the parameters cell"
    comments = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(first.source).readline)
        if token.type == tokenize.COMMENT
    }
    for statement in parameters_cell(chapter).body:
        line = ast.unparse(statement)
        assert isinstance(statement, ast.AnnAssign) and statement.value, f"no annotation: {line}"
        assert statement.end_lineno in comments, f"no comment on the same line: {line}"
    assert is_check_cell(second), "the second code cell calls checks.parameters(globals(), ...)"
    (call,) = [
        node
        for node in ast.walk(ast.parse(second.source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "checks.parameters"
    ]
    assert {keyword.arg for keyword in call.keywords} == set(parameters_of(chapter))


@each_chapter
@pytest.mark.parametrize("size", ["smoke", "full"])
def test_parameter_files_set_known_names(chapter, size):
    path = chapter.parent / "params" / f"{chapter.stem}.{size}.yaml"
    assert set(yaml.safe_load(path.read_text())) <= set(parameters_of(chapter))


@each_chapter
def test_committed_outputs_are_complete_and_clean(chapter):
    pair = committed(chapter)
    cells = code_cells(pair)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", f"a warning is on the page: {output.text}"
    assert str(ROOT) not in nbformat.writes(pair), "an output shows a path of this machine"


@each_chapter
def test_no_execution_metadata_is_left(chapter):
    pair = committed(chapter)
    assert set(pair.metadata) <= {"kernelspec", "language_info"}
    assert "version" not in pair.metadata.language_info
    for index, cell in enumerate(pair.cells):
        assert set(cell.metadata) <= {"tags", "mystnb", "nbgrader"}
        assert cell.id == str(index)


@each_chapter
def test_committed_notebook_is_under_two_megabytes(chapter):
    assert chapter.with_suffix(".ipynb").stat().st_size < 2_000_000


# --- shape ---------------------------------------------------------------------------------------


def read_cells(chapter):
    """The code that a reader is asked to read: all of it, and what the page does not fold."""
    notebook = without_solutions(read_chapter(chapter))
    cells = code_cells(notebook)
    return cells, [cell for cell in cells if "hide-input" not in tags(cell)]


@each_chapter
def test_sizes(chapter):
    notebook = without_solutions(read_chapter(chapter))
    text = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert 2_500 <= sum(map(num_words, text)) <= 6_500
    _, shown = read_cells(chapter)
    assert 15 <= len(shown) <= 40
    assert statistics.median(map(num_lines, shown)) <= 10


@each_chapter
def test_code_fits_its_box(chapter):
    """Solutions and folded cells included: whoever unfolds them reads them too."""
    for cell in code_cells(read_chapter(chapter)):
        assert num_lines(cell) <= 20, cell.source
        wide = [line for line in cell.source.splitlines() if len(line) > 84]
        assert not wide, wide
        assert not re.search(r"# *(noqa|fmt: *(skip|off))", cell.source), cell.source


@each_chapter
def test_imports_are_folded(chapter):
    for cell in code_cells(read_chapter(chapter)):
        if re.match(r"(import|from) ", cell.source):
            assert "hide-input" in tags(cell), cell.source


@each_chapter
def test_printed_tables_are_numbered_and_described(chapter):
    names = []
    for cell in code_cells(committed(chapter)):
        printed = [output.get("data", {}).get("text/markdown", "") for output in cell.outputs]
        given = cell.metadata.get("mystnb", {}).get("table", [])
        given = given if isinstance(given, list) else [given]
        assert len(given) == sum(text.startswith("|") for text in printed), cell.source
        assert all(shown["caption"].endswith(".") for shown in given), given
        names += [shown["name"] for shown in given]
    assert all(name.startswith("tab-") for name in names) and len(set(names)) == len(names)


@each_chapter
def test_figures_are_folded_numbered_and_described(chapter):
    for cell in code_cells(committed(chapter)):
        if any(kind.startswith("image/") for o in cell.outputs for kind in o.get("data", {})):
            assert "hide-input" in tags(cell), f"tag this plot cell hide-input: {cell.source}"
            shown = cell.metadata.get("mystnb", {})
            assert shown.get("figure", {}).get("name", "").startswith("fig-"), cell.source
            assert shown["figure"].get("caption"), f"no caption: {cell.source}"
            assert shown.get("image", {}).get("alt"), f"no alt text: {cell.source}"


# --- exercises -----------------------------------------------------------------------------------


def names(source, context):
    return {
        node.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, context)
    } | {
        getattr(node, "name", None) or node.arg
        for node in ast.walk(ast.parse(source))
        if context is ast.Store and isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.arg))
    }


def imported(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name for alias in node.names)


@each_chapter
def test_statements_say_what_they_ask_and_end_with_a_check_and_a_hint(chapter):
    """The check runs before the solution is seen: what the solution alone defines, it lacks."""
    known = set(dir(builtins))
    for cell in read_cells(chapter)[0]:
        known |= names(cell.source, ast.Store) | set(imported(cell.source))
    stated = exercises(read_chapter(chapter))
    assert 3 <= len(stated) <= 6
    assert {one.head["kind"] for one in stated.values()} == {"Derive", "Build", "Diagnose"}
    for label, one in stated.items():
        assert (int(one.head["code"]), int(one.head["text"])) == (one.points, one.text_points)
        assert one.points and one.text_points and one.answer and one.text
        assert "checks." in one.check and "hint=" in one.check, label
        assert one.title[0].isupper() and not one.title.startswith(("Derive", "Build", "Diagnose"))
        code = "\n".join([*one.given, one.check])
        missing = names(code, ast.Load) - known - names(code, ast.Store) - one.asked
        assert not missing, f"{label} uses {missing}, which neither chapter nor statement defines"


def run(source: str, space: dict) -> None:
    exec(compile(source, "coursework", "exec"), space)


@each_chapter
def test_checks_tell_right_from_wrong_and_blank_answers(chapter, monkeypatch):
    """The instructor's copy runs cell by cell, with other answers before the right ones."""
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    plt.switch_backend("Agg")
    hidden = hidden_tests(chapter.stem, [HIDDEN])
    wrong = filed(ROOT / "tests" / "wrong_answers" / f"{chapter.stem}.md")
    stated = exercises(read_chapter(chapter))
    assert set(wrong) == set(hidden) == set(stated)
    space = {"__name__": "coursework"}
    for cell in code_cells(BOOK.assignment(chapter.stem, True, hidden)):
        label = cell.id.removesuffix("-answer")
        if label in stated:
            visible = stated[label].check
            with pytest.raises((NameError, KeyError, TypeError)):
                run(visible, space | {"__name__": "blank"})
            run(wrong[label], space)
            with pytest.raises(AssertionError, match="Hint") as refused:
                run(visible, space)
            assert ", expected" not in str(refused.value)
        run(cell.source, space)
    plt.close("all")


# --- runs ----------------------------------------------------------------------------------------


@each_chapter
def test_two_smoke_runs_are_equal_to_the_byte(chapter, tmp_path):
    smoke = chapter.parent / "params" / f"{chapter.stem}.smoke.yaml"
    command = [sys.executable, ROOT / "workflow" / "execute.py", chapter]
    outputs = [tmp_path / "first.ipynb", tmp_path / "second.ipynb"]
    runs = [
        subprocess.Popen(
            [*command, output, "--parameters", smoke],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for output in outputs
    ]
    for run in runs:
        printed, _ = run.communicate()
        assert run.returncode == 0, printed
    first, second = (output.read_bytes() for output in outputs)
    assert first == second


VALUES = {  # by the annotation of a parameter, what none of that kind may be
    "int": (-1, 10**18, 2.5, "3", None, True, math.nan),
    "float": (math.nan, math.inf, "0.5", None, True),
    "bool": (0, 1, "yes", None),
    "str": ("gpu0", "", None, 0),
}


@cache
def first_cells(chapter: Path) -> list[str]:
    return [cell.source for cell in code_cells(read_chapter(chapter))[:2]]


def check_parameters(chapter: Path, **values) -> None:
    """Run the cells with the parameters and with their check, and set values in between."""
    given, check = first_cells(chapter)
    space = {}
    exec(given, space)
    exec(check, space | values)


@pytest.mark.parametrize(
    ("chapter", "name"),
    [(path, name) for path in CHAPTERS for name in parameters_of(path)],
    ids=lambda value: value.stem if isinstance(value, Path) else value,
)
def test_each_parameter_is_refused_by_name_value_and_range(chapter, name):
    kind = parameters_of(chapter)[name]
    most = 2**32 if name == "seed" else 10**9  # a size of 10^9 would fit no memory, or take years
    for value in (*VALUES[kind], *([most] if kind == "int" else [])):
        with pytest.raises(ValueError) as refused:
            check_parameters(chapter, **{name: value})
        message = str(refused.value)
        assert message.startswith(f"parameter {name} = {value!r}: must be "), message
        assert "\n" not in message
        assert kind != "int" or ("at least" in message and "at most" in message), message


@each_chapter
def test_parameters_of_every_size_are_accepted(chapter, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_parameters(chapter, seed=2**32 - 1)
    for size in ("smoke", "full"):
        path = chapter.parent / "params" / f"{chapter.stem}.{size}.yaml"
        check_parameters(chapter, **yaml.safe_load(path.read_text()))


def test_a_refused_parameter_is_one_line_and_exit_code_two(tmp_path):
    bad, out = tmp_path / "bad.yaml", tmp_path / "out.ipynb"
    bad.write_text("seed: 4294967296\n", encoding="utf-8")
    command = [sys.executable, ROOT / "workflow/execute.py", CHAPTERS[0], out]
    done = subprocess.run(
        [*command, "--parameters", bad],
        capture_output=True,
        text=True,
        check=False,
    )
    said = "parameter seed = 4294967296: must be an integer, at least 0 and at most 4294967295\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
    assert not out.exists()


def bad_parameters(chapter: Path) -> dict[str, object]:
    """Values that a chapter must refuse: a negative count, an unknown device, an unknown name."""
    kinds = parameters_of(chapter)
    counts = [name for name, kind in kinds.items() if kind == "int" and name != "seed"]
    bad = {counts[0]: -1, "no_such_name": 1}
    return bad | ({"device": "gpu0"} if "device" in kinds else {})


@pytest.mark.parametrize(
    ("chapter", "name", "value"),
    [(path, *item) for path in CHAPTERS for item in bad_parameters(path).items()],
    ids=lambda value: value.stem if isinstance(value, Path) else str(value),
)
def test_bad_parameter_fails_before_any_work(chapter, name, value, tmp_path):
    partial = tmp_path / "partial.ipynb"
    with pytest.raises(PapermillExecutionError) as failure:
        execute(chapter, {name: value}, partial)
    message = failure.value.evalue
    assert failure.value.ename == "ValueError"
    assert f"parameter {name}" in message
    assert "must be" in message or "This chapter knows" in message or "Did you mean" in message
    run = [cell for cell in code_cells(nbformat.read(partial, 4)) if cell.execution_count]
    # The defaults, the injected values, and the check that stops the run.
    assert len(run) == 3
    assert is_check_cell(run[-1])
