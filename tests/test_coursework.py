"""Coursework: exercises in, assignments out, and submissions of all kinds graded for what they are.

That the checks of every exercise tell right from wrong and blank is tested with the chapters. Here
stand the steps around them; grading itself needs nbgrader and runs where ``make grade`` or
``make lab`` has installed it.
"""

import copy
import csv
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import coursework
import grade
import nbformat
import new_chapter
import pytest
from coursework import Book, cleared, exercises, marked, without_solutions
from execute import read_chapter
from plain import Page, Target, directives, targets
from rebuild import likeness, rebuild

import test_book

ROOT = Path(__file__).resolve().parents[1]
BOOK = Book.read()
each_chapter = pytest.mark.parametrize("stem", BOOK.notebooks)


def markdown(source, **metadata):
    return nbformat.v4.new_markdown_cell(source, metadata=metadata)


def code(source, **metadata):
    return nbformat.v4.new_code_cell(source, metadata=metadata)


def notebook(*cells):
    return nbformat.v4.new_notebook(cells=list(cells))


STATEMENT = """\
Before it.

```{exercise} Twice
:label: ex-toy-twice

*Build · 2 + 1 points · 5 minutes.*

Write `twice(x)`.

~~~python
one = 1
~~~

~~~python
checks.close(twice(one), 2, hint="add it to itself")
~~~
```
"""
SOLVED = """\
```{solution-start} ex-toy-twice
:label: sol-toy-twice
```

Add it to itself.
"""


def toy():
    return notebook(
        markdown(STATEMENT),
        markdown(SOLVED, nbgrader={"grade": True, "solution": True, "points": 1}),
        code("def twice(x):\n    return x + x", nbgrader={"solution": True, "points": 2}),
        code("print(twice(3))"),
        markdown("```{solution-end}\n```\n\nAfter it."),
    )


# --- reading exercises ---------------------------------------------------------------------------


def test_an_exercise_is_read_with_its_solution():
    (one,) = exercises(toy()).values()
    assert (one.label, one.title, one.head["kind"]) == ("ex-toy-twice", "Twice", "Build")
    assert one.given == ["one = 1\n"] and one.check.startswith("checks.close(twice(one)")
    assert (one.points, one.text_points, one.text) == (2, 1, "Add it to itself.")
    assert one.answer.strip() == "def twice(x):\n    return x + x"  # and not what shows it off
    assert one.asked == {"twice"}


def test_a_reader_sees_no_solution():
    text = "\n".join(cell.source for cell in without_solutions(toy()).cells)
    assert text.index("Before it.") < text.index("Write `twice(x)`.") < text.index("After it.")
    assert "Add it to itself." not in text and "x + x" not in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("```{solution-end}\n```", "", "ex-toy-twice has no solution"),
        ("{solution-start} ex-toy-twice", "{solution-start} ex-other", "do not pair up"),
        (":label: ex-toy-twice\n", "", "an exercise has no label"),
    ],
)
def test_directives_that_do_not_pair_up_are_refused(old, new, message):
    broken = toy()
    for cell in broken.cells:
        cell.source = cell.source.replace(old, new)
    with pytest.raises(ValueError, match=message):
        list(coursework.parts(broken))


# --- what students receive -----------------------------------------------------------------------


def test_functions_that_are_asked_for_keep_their_signature():
    source = (
        "import math\n\n\ndef own(x):\n    return x\n\n\ndef asked(x, y):\n    return own(x) + y"
    )
    whole = marked(source, {"asked"})
    given = cleared(whole)
    assert re.findall(r"def \w+", given) == ["def asked"]
    assert given.count("raise NotImplementedError()") == 2
    assert "    raise NotImplementedError()" in given.splitlines()
    assert [line for line in whole.splitlines() if "###" not in line] == source.splitlines()


def test_parameters_are_baked_in_with_their_comments():
    source = 'epochs: int = 2  # passes\nname: str = "a"  # a word'
    baked = coursework.baked(source, {"epochs": 7})
    assert baked == source.replace("= 2", "= 7")
    with pytest.raises(ValueError, match="no line for epoch"):
        coursework.baked(source, {"epoch": 9})


@each_chapter
def test_release_holds_the_questions_and_nothing_of_the_answers(stem):
    hidden = coursework.hidden_tests(stem, [coursework.HIDDEN])
    source = BOOK.assignment(stem, True, hidden)
    release = BOOK.assignment(stem, False, hidden)
    assert [cell.id for cell in source.cells] == [cell.id for cell in release.cells]
    text = "\n".join(cell.source for cell in release.cells)
    assert not re.search(r"\{[a-z]+(:[a-z]+)?\}`|^`{3,}\{|^:{3,}|^\([\w-]+\)=", text, re.MULTILINE)
    assert "SOLUTION" not in text and "HIDDEN" not in text and "plotting.animate(" not in text
    for one in exercises(BOOK.notebooks[stem]).values():
        whole = marked(one.answer, one.asked)
        for written in re.findall(r"### BEGIN SOLUTION\n(.*?)\n *### END", whole, re.DOTALL):
            assert written.strip() not in text, f"{one.label} gives its answer away"
        ids = [cell.id for cell in release.cells if cell.id.startswith(one.label + "-")]
        assert ids[-3:] == [f"{one.label}-{part}" for part in ("answer", "check", "text")]
        assert hidden[one.label].strip() not in text
    graded = [cell.metadata.get("nbgrader") for cell in release.cells]
    keys = {"grade", "solution", "locked", "task", "schema_version", "grade_id"}
    for marks in filter(None, graded):
        assert set(marks) == keys | ({"points"} if marks["grade"] else set())
    names = [marks["grade_id"] for marks in filter(None, graded)]
    assert len(names) == len(set(names))


def test_ids_do_not_move_when_a_cell_is_put_in():
    before = {cell.id for cell in BOOK.assignment("05_amc", False, {}).cells}
    book = Book.read()
    book.notebooks["05_amc"].cells.insert(4, code("inserted = 1"))
    after = {cell.id for cell in book.assignment("05_amc", False, {}).cells}
    assert before < after and len(after) == len(before) + 1


def start(monkeypatch, address, colab, exit_code=0):
    """Run the first cell where the library is not installed; the commands that it gives."""
    given, shell = coursework.bootstrap(address), []
    monkeypatch.setenv("NBGRADER_EXECUTION", "student")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "google.colab", sys) if colab else None
    ipython = SimpleNamespace(system=shell.append)
    exec(given, {"get_ipython": lambda: ipython, "_exit_code": exit_code})
    return shell


def test_the_first_cell_says_that_the_copy_is_small():
    for address in ("", "https://example.org/book"):
        told = " ".join(re.findall(r"^# (.*)", coursework.bootstrap(address), re.MULTILINE))
        assert "numbers that the text quotes are those of the book's page, not of your run" in told


def test_the_first_cell_fetches_the_library_in_colab_alone(monkeypatch):
    address = "https://example.org/book"
    with pytest.raises(ImportError, match=f"git clone {address} book && pip install -e book"):
        start(monkeypatch, address, colab=False)
    for colab in (False, True):
        with pytest.raises(ImportError, match="in a clone of its repository, pip install -e"):
            start(monkeypatch, "", colab)
    (fetch,) = start(monkeypatch, address, colab=True)
    assert [part.split()[:2] for part in fetch.split("&&")] == [
        ["git", "init"],
        ["git", "pull"],
        ["pip", "install"],
    ]
    with pytest.raises(ImportError, match="was not fetched"):
        start(monkeypatch, address, colab=True, exit_code=1)


def test_a_source_that_a_lecturer_changed_is_not_overwritten(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(Book, "read", lambda: BOOK)  # it is read once for all writing

    def write(*stems):
        coursework.write(tmp_path, stems, [])

    write("03_iterative_inference")
    path = tmp_path / "source/03_iterative_inference/03_iterative_inference.ipynb"
    seen = nbformat.read(path, 4)
    seen.cells[0].update(outputs=run("x", "✓").outputs, execution_count=1)
    nbformat.write(seen, path)
    write("03_iterative_inference")  # it was only run: nothing is lost
    assert not nbformat.read(path, 4).cells[0].outputs
    find(seen, "ex-it-scale-check").metadata.nbgrader.points += 1
    nbformat.write(seen, path)
    before = {one: one.read_bytes() for one in tmp_path.rglob("*") if one.is_file()}
    with pytest.raises(SystemExit) as stopped:
        write("05_amc", "03_iterative_inference")
    said = capfd.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert f"{path} was changed since it was written: move it away" in said
    assert {one: one.read_bytes() for one in tmp_path.rglob("*") if one.is_file()} == before
    path.unlink()
    write("03_iterative_inference")
    assert path.is_file()


def test_hidden_tests_of_an_overlay_are_added(tmp_path):
    (tmp_path / "05_amc.md").write_text("## ex-amc-memory\n\n```python\nassert mine\n```\n")
    both = coursework.hidden_tests("05_amc", [coursework.HIDDEN, tmp_path])
    assert both["ex-amc-memory"].endswith("assert mine\n") and "7813" in both["ex-amc-memory"]
    source = BOOK.assignment("05_amc", True, both)
    (check,) = [cell for cell in source.cells if cell.id == "ex-amc-memory-check"]
    assert check.source.index("BEGIN HIDDEN") < check.source.index("assert mine")


def test_hidden_tests_are_no_part_of_the_book():
    pages = [*(ROOT / "notebooks").glob("*.py"), *(ROOT / "book").glob("*.md")]
    text = "\n".join(path.read_text() for path in pages)
    for stem in BOOK.notebooks:
        for label, tests in coursework.hidden_tests(stem, [coursework.HIDDEN]).items():
            assert tests.strip() not in text, label


def test_teaching_page_names_exercises_that_exist():
    known = {target.number for target in BOOK.page.targets.values()}
    text = (ROOT / "book" / "teaching.md").read_text()
    paths = text[text.index("## Two ways through") : text.index("## Mistakes to expect")]
    named = re.findall(r"\b\d\.\d\b", paths)
    assert len(named) > 20
    assert {f"Exercise {number}" for number in named} <= known


# --- plain Markdown ------------------------------------------------------------------------------


def page(site=""):
    known = {
        "eq-one": Target("(2.1)", "", "chapters/02_two.html#eq-one"),
        "fig-one": Target("Fig. 2.1", "", "chapters/02_two.html#fig-one"),
        "sec-one": Target("Section 2.3", "A section", "chapters/02_two.html#sec-one"),
        "ex-one": Target("Exercise 2.1", "A title", "chapters/02_two.html#ex-one"),
    }
    return Page(known, {"chapters/02_two": "Two", "notation": "Notation"}, site, [])


@pytest.mark.parametrize(
    ("myst", "plain"),
    [
        ("see {eq}`eq-one`", "see (2.1)"),
        ("{numref}`fig-one` and {numref}`sec-one`", "Fig. 2.1 and Section 2.3"),
        ("{ref}`sec-one`, {ref}`there <sec-one>`", "A section, there"),
        ("{ref}`ex-one`", "Exercise 2.1"),
        ("{doc}`02_two`, {doc}`/notation`", "chapter 2, *Notation*"),
        ("{py:func}`amortised.ais.ais`", "`amortised.ais.ais()`"),
        ("{cite:t}`neal2001ais`", "Neal (2001)"),
        ("{cite:p}`neal2001ais,li2017amc`", "(Neal, 2001; Li et al., 2017)"),
        ("(sec-x)=\n## X", "## X"),
        ("$$\na\n$$ (eq-one)", "$$\na \\tag{2.1}\n$$"),
        ("```{note}\nMind.\n```", "> **Note**\n>\n> Mind."),
        ("```python\n{eq}\n```", "```python\n{eq}\n```"),
    ],
)
def test_myst_becomes_plain(myst, plain):
    assert page().markdown(myst) == plain


def test_numbers_link_to_the_published_page():
    linked = page("https://example.org/book").markdown("{numref}`fig-one`")
    assert linked == "[Fig. 2.1](https://example.org/book/chapters/02_two.html#fig-one)"


@pytest.mark.parametrize("myst", ["{abbr}`x`", "{eq}`eq-two`", "```{margin}\nx\n```"])
def test_what_has_no_plain_form_is_refused(myst):
    with pytest.raises(ValueError, match=r"no form in plain Markdown|nothing has the label"):
        page().markdown(myst)


def test_labels_are_counted_as_the_book_counts_them():
    text = """\
## First
(sec-second)=
## Second
### Below
(sec-third)=
### Further
$$
a
$$
$$
b
$$ (eq-b)
```{prf:theorem} Name
:label: thm-a
$$
c
$$ (eq-c)
```
```{table} Title
:name: tab-a
```
~~~python
## no heading
~~~
```{exercise} Title
:label: ex-a
```
"""
    figure = {"figure": {"name": "fig-a"}}
    found = targets("03_x", notebook(code("1", mystnb=figure), markdown(text)))
    assert {label: target.number for label, target in found.items()} == {
        "fig-a": "Fig. 3.1",
        "sec-second": "Section 3.2",
        "sec-third": "Section 3.2.2",
        "eq-b": "(3.1)",
        "thm-a": "Theorem 3.1",
        "eq-c": "(3.2)",
        "tab-a": "Table 3.1",
        "ex-a": "Exercise 3.1",
    }


def test_a_fence_that_is_never_closed_is_refused():
    with pytest.raises(ValueError, match="never closed"):
        directives("```{note}\nMind.", lambda one: one.body)


# --- submissions ---------------------------------------------------------------------------------


def release():
    book = Book(BOOK.notebooks | {"05_amc": BOOK.notebooks["05_amc"]}, BOOK.page, "")
    return book.assignment("05_amc", False, {})


def find(found, name):
    return next(cell for cell in found.cells if cell.id == name)


def solved(given):
    """The release with the reference answers in its answer cells."""
    answered, source = copy.deepcopy(given), BOOK.assignment("05_amc", True, {})
    for cell in answered.cells:
        if cell.metadata.get("nbgrader", {}).get("solution"):
            cell.source = find(source, cell.id).source
    return answered


def texts(found):
    return [cell.source for cell in found.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def given():
    return release()


def test_an_untouched_submission_is_rebuilt_as_it_is(given):
    answered = solved(given)
    rebuilt = rebuild(given, answered)
    assert texts(rebuilt.notebook) == texts(answered) and rebuilt.notes == []


def test_stripped_metadata_and_ids_lose_no_check_and_no_answer(given):
    answered = solved(given)
    for index, cell in enumerate(answered.cells):
        cell.metadata, cell.id = nbformat.NotebookNode(), f"x{index}"
    rebuilt = rebuild(given, answered).notebook
    assert find(rebuilt, "ex-amc-fixed-check").source == find(given, "ex-amc-fixed-check").source
    sources = texts(rebuilt)
    answer = next(i for i, text in enumerate(sources) if "def resting" in text)
    check = sources.index(find(given, "ex-amc-fixed-check").source)
    answered = find(rebuilt, "ex-amc-fixed-text")
    assert answered.source == find(solved(given), "ex-amc-fixed-text").source
    assert answer < check and "raise NotImplementedError()" not in "\n".join(sources)


def test_deleted_edited_and_doubled_cells_are_set_right_and_named(given):
    answered = solved(given)
    find(answered, "ex-amc-deficit-check").source = "pass"
    answered.cells = [c for c in answered.cells if c.id not in ("bootstrap", "ex-amc-fixed-check")]
    again = copy.deepcopy(find(answered, "ex-amc-memory-answer"))
    again.id, again.source = "copied", "num_data = 7"
    answered.cells.append(again)
    rebuilt, notes = rebuild(given, answered)
    assert [cell.id for cell in rebuilt.cells] == [cell.id for cell in given.cells]
    for name in ("bootstrap", "ex-amc-fixed-check", "ex-amc-deficit-check"):
        assert find(rebuilt, name).source == find(given, name).source
    assert find(rebuilt, "ex-amc-memory-answer").source == "num_data = 7"
    assert notes == [
        "ex-amc-deficit-check was changed, and set back",
        "bootstrap was missing",
        "ex-amc-fixed-check was missing",
        "ex-amc-memory-answer stands there 2 times: the last counts",
    ]


def test_own_cells_stay_in_place_and_injected_ones_go(given):
    answered = solved(given)
    place = [cell.id for cell in answered.cells].index("ex-amc-fixed-answer")
    answered.cells.insert(place, code("helper = 1"))
    answered.cells.insert(3, code("num_images = 0", tags=["injected-parameters"]))
    sources = texts(rebuild(given, answered).notebook)
    assert "num_images = 0" not in sources
    assert "def resting" in sources[sources.index("helper = 1") + 1]


def test_unlocked_points_and_marks_are_those_of_the_release(given):
    answered = solved(given)
    for cell in answered.cells:
        if "nbgrader" in cell.metadata:
            cell.metadata.nbgrader |= {"points": 100, "locked": False, "grade": False}
    rebuilt = rebuild(given, answered).notebook
    assert [cell.metadata for cell in rebuilt.cells] == [cell.metadata for cell in given.cells]


def test_a_notebook_is_known_by_its_cells(given):
    other = BOOK.assignment("06_evaluation_hais", False, {})
    assert likeness(given, solved(given)) > 10 * max(1, likeness(given, other))


# --- what becomes of them ------------------------------------------------------------------------


def run(name, *outcomes):
    """A cell that was run: each outcome is what it printed, or the name of an error."""
    outputs = [
        nbformat.v4.new_output("stream", name="stdout", text=one)
        if one.startswith("✓")
        else nbformat.v4.new_output("error", ename=one, evalue="", traceback=[])
        for one in outcomes
    ]
    return nbformat.v4.new_code_cell("x", id=name, execution_count=1, outputs=outputs)


@pytest.mark.parametrize(
    ("cells", "passed", "state"),
    [
        ([run("a-answer"), run("a-check", "✓ a", "✓ b")], True, "graded"),
        ([run("a-answer"), run("a-check", "AssertionError")], False, "graded"),
        ([run("a-answer", "NotImplementedError"), run("a-check", "NameError")], False, "graded"),
        ([run("a-answer"), run("a-check", "✓ a")], None, "reported 1 times instead of 2"),
        ([run("a-answer"), code("x", id="a-check")], None, "the check was never run"),
        ([run("a-answer", "CellTimeoutError"), run("a-check", "NameError")], None, "was stopped"),
        ([run("a-answer", "KeyboardInterrupt"), run("a-check", "✓ a")], None, "was stopped"),
        ([run("own-1-1", "CellTimeoutError"), run("a-check", "NameError")], None, "was stopped"),
        ([run("a-answer"), run("a-check", "✓ a", "KeyboardInterrupt")], None, "was stopped"),
        # A cell of the student's own that loops takes nothing from an answer that is right.
        ([run("own-1-1", "CellTimeoutError"), run("a-check", "✓ a", "✓ b")], True, "graded"),
    ],
)
def test_a_check_that_fails_is_told_from_one_that_could_not_be_made(cells, passed, state):
    found, said = grade.verdict(cells, 2)
    assert found is passed
    assert said == state if state == "graded" else said.startswith("not graded: ") and state in said


def test_a_cell_that_was_stopped_counts_against_its_own_question_alone():
    cells = [run("a-answer", "CellTimeoutError"), run("a-check", "NameError"), run("a-text")]
    cells += [run("b-answer"), run("b-check", "AssertionError")]
    found = grade.spans(cells)
    assert {name: [cell.id for cell in span] for name, span in found.items()} == {
        "a-check": ["a-answer", "a-check"],
        "b-check": ["a-text", "b-answer", "b-check"],
    }
    assert [grade.verdict(span, 1)[1] for span in found.values()] == [
        f"not graded: a cell was stopped after {grade.CELL_SECONDS} s",
        "graded",
    ]


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course")
    coursework.write(folder, ["03_iterative_inference", "05_amc"], [])
    return grade.Course(folder)


def class_of(folder, **students):
    """A folder of submissions; the files of a student are in the order of their times."""
    for student, files in students.items():
        for order, (name, content) in enumerate(files.items()):
            path = folder / student / name
            path.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(content, path)
            os.utime(path, (1e9 + order, 1e9 + order))
    return folder


def test_of_several_notebooks_the_one_that_was_worked_on_is_graded(course, given, tmp_path):
    half, answered = copy.deepcopy(given), solved(given)
    find(half, "ex-amc-memory-text").source = "It forgets."
    blank = copy.deepcopy(given)
    blank.cells.append(code(""))
    files = {"old.ipynb": half, "sub/final.ipynb": answered, "05_amc.ipynb": blank}
    (found,) = grade.handed_in(course, class_of(tmp_path, ann=files))
    assert found[:2] == ("ann", "05_amc") and found.notebook == answered
    assert found.said == "graded was sub/final.ipynb, set aside was 05_amc.ipynb, old.ipynb"


def test_an_answer_in_a_cell_of_ones_own_is_work(given):
    own = copy.deepcopy(given)
    own.cells.insert(-1, code("mine = 1"))
    assert grade.worked_on(given, own) and not grade.worked_on(given, copy.deepcopy(given))


def test_no_file_and_no_chapter_is_passed_over_in_silence(course, given, tmp_path):
    other = course.release("03_iterative_inference")
    class_of(tmp_path, ann={"a.ipynb": given, "b.ipynb": other}, bob={"x.ipynb": other})
    (tmp_path / "carl").mkdir()
    for name in ("05_amc-dora.ipynb", "all.zip", "grades.csv", ".DS_Store"):
        (tmp_path / name).write_text("{}")
    submissions = list(grade.handed_in(course, tmp_path))
    assert [(one.student, one.chapter, one.notebook is None) for one in submissions] == [
        ("", "05_amc-dora.ipynb", True),
        ("", "all.zip", True),
        ("ann", "03_iterative_inference", False),
        ("ann", "05_amc", False),
        ("bob", "03_iterative_inference", False),
        ("carl", "", True),
    ]
    (loose,) = grade.grade_one(course, submissions[0], [], {})
    assert loose.state == "not graded: a file in no student's folder: put it into one"
    lines = list(grade.missing(course, submissions))
    assert [(one.student, one.chapter, one.points, one.state) for one in lines] == [
        ("carl", "03_iterative_inference", "", "not handed in"),
        ("bob", "05_amc", "", "not handed in"),
        ("carl", "05_amc", "", "not handed in"),
    ]
    whole = sum(e.points + e.text_points for e in exercises(BOOK.notebooks["05_amc"]).values())
    assert lines[-1].of == whole


def test_a_chapter_that_nobody_handed_in_was_not_set(course, given, tmp_path):
    submissions = list(grade.handed_in(course, class_of(tmp_path, ann={"a.ipynb": given})))
    assert list(grade.missing(course, submissions)) == []


def test_notebooks_set_aside_and_cells_that_are_missing_are_in_the_table(
    course, given, monkeypatch
):
    monkeypatch.setattr(grade, "run_one", lambda *_: "its kernel died")
    lost = copy.deepcopy(given)
    lost.cells = [cell for cell in lost.cells if cell.id != "bootstrap"]
    one = grade.Submission("ann", "05_amc", lost, "graded was a.ipynb, set aside was b.ipynb")
    first, *others = grade.grade_one(course, one, [], {})
    assert first.notes == f"{one.said}; bootstrap was missing"
    assert first.state == "not graded: its kernel died" and not any(line.notes for line in others)


def test_page_names_all_places_that_know_a_chapter():
    page = (ROOT / "book" / "teaching.md").read_text()
    told = re.search(r"^To take it out of the site, .*$", page, re.MULTILINE)[0]
    assert {f"`{name}`" for name in new_chapter.REGISTERS} <= set(re.findall(r"`[^`]+`", told))


def test_states_of_the_table_are_those_that_the_page_names():
    page = (ROOT / "book" / "teaching.md").read_text()
    table = page[page.index("| state | meaning |") :].split("\n\n")[0]
    named = set(re.findall(r"^\| ([\w ]+)(?:: \*reason\*)? \|", table, re.MULTILINE))
    assert named == {"state", "graded", "pending", "blank", "not handed in", "not graded"}


def test_history_is_found_in_a_clone_and_in_a_worktree(tmp_path):
    clone, tree = tmp_path / "clone", tmp_path / "tree"
    own = clone / ".git" / "worktrees" / "tree"
    own.mkdir(parents=True)
    (own / "commondir").write_text("../..\n")
    tree.mkdir()
    (tree / ".git").write_text(f"gitdir: {own}\n")
    assert grade.history(clone) == grade.history(tree) == [clone / ".git"]
    assert not grade.history(tmp_path)[0].exists()


# --- grading, where nbgrader is ------------------------------------------------------------------

SPY = """
import os, pathlib, shutil, subprocess
found = [name for name in {names!r} if pathlib.Path(name).exists()]
try:
    pathlib.Path({mark!r}).write_text("spied")
except OSError:
    pass
show = ["git", "-C", {root!r}, "show", "HEAD:tests/hidden_tests/05_amc.md"]
if shutil.which("git"):
    assert "ex-amc" not in subprocess.run(show, capture_output=True, text=True).stdout
assert not found, found
"""


DEAF = """
while True:
    try:
        while True:
            pass
    except KeyboardInterrupt:
        pass
"""


def test_a_kernel_that_grades_keeps_its_folders_out_of_the_project(tmp_path):
    """The project is read-only there, and on a fresh clone no chapter has made them before."""
    folders = grade.environment(str(tmp_path)).values()
    assert not [folder for folder in folders if str(ROOT) in folder]


def regenerated(course):
    """Change the points of a check and make the release again, by the line of the page."""
    source = course / "source/05_amc/05_amc.ipynb"
    changed = nbformat.read(source, 4)
    find(changed, "ex-amc-memory-check").metadata.nbgrader.points += 1
    nbformat.write(changed, source)
    page = (ROOT / "book" / "teaching.md").read_text()
    line = re.search(r"^cd coursework && \.\./\.venv/bin/(.*)$", page, re.MULTILINE)[1]
    name, *words = line.replace("06_evaluation_hais", "05_amc").split()
    command, bare = Path(sys.executable).parent / name, os.environ | {"PATH": "/usr/bin:/bin"}
    subprocess.run([command, *words], cwd=course, env=bare, check=True, capture_output=True)
    return nbformat.read(course / "release/05_amc/05_amc.ipynb", 4)


def hand_in_all_kinds(course, class_, given):
    def hand_in(student, *changes, name="05_amc.ipynb", answered=None):
        answered = answered or solved(given)
        for label, change in changes:
            cell = find(answered, f"{label}-answer")
            cell.source = change if callable(change) is False else change(cell.source)
        (class_ / student).mkdir(parents=True)
        nbformat.write(answered, class_ / student / name)

    loud = "\nimport sys\nprint('a warning', file=sys.stderr)"
    names = [course / "source", class_ / "blank", ROOT / "tests/hidden_tests/05_amc.md"]
    names += [folder / "HEAD" for folder in grade.history(ROOT)]
    names = [str(name) for name in names]
    spy = SPY.format(names=names, mark=str(ROOT / "spied"), root=str(ROOT))
    added = [("ex-amc-memory", lambda text: text + loud), ("ex-amc-fixed", lambda text: text + spy)]
    hand_in("right", *added, name="final (2).ipynb")
    hand_in("blank", answered=copy.deepcopy(given))
    hand_in("wrong", *coursework.filed(ROOT / "tests/wrong_answers/05_amc.md").items())
    hand_in("exits", ("ex-amc-fixed", "import os\nos._exit(0)"))
    hand_in("loops", ("ex-amc-fixed", "while True:\n    pass"))
    hand_in("deaf", ("ex-amc-fixed", DEAF))
    scores = "import sys\ndef resting(*a):\n    sys.displayhook(2.0)\n    return 0.0"
    silent = "checks.close = lambda *a, **k: None\nnum_data = 1"
    hand_in("tricks", ("ex-amc-fixed", scores), ("ex-amc-memory", silent))
    (class_ / "broken").mkdir()
    (class_ / "broken" / "a.ipynb").write_text("{")


def test_history_cannot_be_read_in_the_jail(tmp_path):
    show = ["git", "-C", str(ROOT), "show", "HEAD:tests/hidden_tests/05_amc.md"]

    def seen(hidden):
        jail = grade.jail(str(tmp_path), hidden)
        done = subprocess.run([*jail, *show], capture_output=True, text=True)
        return "ex-amc-memory" in done.stdout

    if not grade.jail(str(tmp_path), []) or not seen([ROOT / "tests"]):
        pytest.skip("no jail, or no history to read")
    assert not seen([ROOT / "tests", *grade.history(ROOT)])


def test_long_tests_install_nbgrader_and_grade():
    done = subprocess.run(
        ["make", "--dry-run", "soak"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert re.search(r"environment\.py lab\n.*pytest .*-m soak .*test_coursework", done.stdout)


@pytest.mark.soak
def test_submissions_of_all_kinds_are_graded_for_what_they_are(tmp_path):
    """One chapter from coursework to grades, in some minutes, nearly all of them nbgrader's."""
    pytest.importorskip("nbgrader")
    course, class_ = tmp_path / "course", tmp_path / "class"
    coursework.write(course, ["05_amc"], [])
    hand_in_all_kinds(course, class_, regenerated(course))
    command = [sys.executable, ROOT / "workflow/grade.py", class_, course]
    limits = os.environ | {"GRADE_SECONDS": "30 240"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=limits)
    with (class_ / "grades.csv").open() as file:
        lines = list(csv.DictReader(file))

    def column(student, name, part="code"):
        own = [one for one in lines if (one["student"], one["part"]) == (student, part)]
        return {one["exercise"].removeprefix("ex-amc-"): one[name] for one in own}

    def points(student):
        return sum(map(float, filter(None, column(student, "points").values())))

    assert (points("right"), points("blank"), points("wrong")) == (13, 0, 0)
    assert set(column("right", "state", "text").values()) == {"pending"}
    assert set(column("blank", "state", "text").values()) == {"blank"}
    assert all("its kernel died" in state for state in column("exits", "state").values())
    stopped, lost = column("loops", "state"), float(column("loops", "of")["fixed"])
    assert stopped.pop("fixed") == "not graded: a cell was stopped after 30 s"
    assert set(stopped.values()) == {"graded"} and points("loops") == 13 - lost
    assert all("would not be interrupted" in state for state in column("deaf", "state").values())
    broken = [line["state"] for line in lines if line["student"] == "broken"]
    assert "a.ipynb is no submission" in broken[0] and broken[1:] == ["not handed in"]
    tricks = column("tricks", "points")
    assert (tricks["fixed"], tricks["memory"]) == ("0.0", "")
    assert column("tricks", "state")["memory"].endswith("reported 0 times instead of 2")
    cells = nbformat.read(course / "autograded/right/05_amc/05_amc.ipynb", 4).cells
    (spied,) = [cell for cell in cells if cell.id == "ex-amc-fixed-answer"]
    assert "no jail" in done.stdout or (not spied.outputs and not (ROOT / "spied").exists())


# --- a new chapter -------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path):
    for name in new_chapter.REGISTERS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    for pattern in new_chapter.FILES:
        for stem in BOOK.notebooks:
            path = tmp_path / pattern.format(stem)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text((ROOT / pattern.format(stem)).read_text())
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    return tmp_path


@each_chapter
def test_a_new_chapter_has_labels_of_its_own_and_is_registered(copied, stem):
    new_chapter.make(copied, stem, "98_of_mine")
    mine = read_chapter(copied / "notebooks/98_of_mine.py")
    labels = targets("98_of_mine", mine)
    assert len(labels) == len(targets(stem, BOOK.notebooks[stem]))
    assert not set(labels) & set(BOOK.page.targets)
    assert all(label.split("-", 1)[1].startswith("of-mine-") for label in labels)
    for pattern in new_chapter.FILES[-2:]:
        filed = coursework.filed(copied / pattern.format("98_of_mine"))
        assert set(filed) == set(exercises(mine))
    book = Book(
        BOOK.notebooks | {"98_of_mine": mine},
        BOOK.page._replace(
            targets=BOOK.page.targets | labels,
            titles=BOOK.page.titles | {"chapters/98_of_mine": "M"},
        ),
        "",
    )
    for cell in mine.cells:
        if cell.cell_type == "markdown":
            book.page.markdown(without_exercises(cell.source))
    assert "chapters/98_of_mine\n" in (copied / "book/_toc.yml").read_text()
    assert "(notebooks/98_of_mine.ipynb)" in (copied / "README.md").read_text()
    assert ":link: chapters/98_of_mine\n" in (copied / "book/intro.md").read_text()
    test_book.test_heads_and_readme_tell_the_times_that_were_noted(copied)


def without_exercises(text):
    return coursework.PIECE.sub("", text)


@pytest.mark.parametrize(
    ("origin", "stem", "reason"),
    [
        ("01_vi", "08_mine", "FROM=01_vi is none of: 01_vi_recap"),
        ("01_vi_recap", "mine", "TO=mine must be two digits"),
        ("01_vi_recap", "02_mine", "TO=02_mine has the number of 02_pq_vs_qp"),
        ("01_vi_recap", "98_amc", "would be those of 05_amc"),
    ],
)
def test_a_name_that_cannot_be_is_refused_before_anything_is_written(copied, origin, stem, reason):
    before = sorted(copied.rglob("*"))
    with pytest.raises(SystemExit, match=re.escape(reason)):
        new_chapter.make(copied, origin, stem)
    assert sorted(copied.rglob("*")) == before
