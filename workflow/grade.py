"""Grade a folder of submissions with nbgrader: python workflow/grade.py SUBMISSIONS COURSEWORK

SUBMISSIONS holds a folder for each student, with notebooks of any name. COURSEWORK is what
``make coursework`` wrote. Each notebook is rebuilt on the released one and run by nbgrader in a
process of its own, in a jail where the system has one. Written is SUBMISSIONS/grades.csv: a line
for each part of each exercise, with its points or the reason why it has none. Texts are marked by
hand in nbgrader's formgrader; their marks survive another run, which takes them into the table.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat
from environment import ROOT
from execute import CACHE, KERNEL_ENVIRONMENT
from rebuild import likeness, plain, rebuild

from amortised.commands import Parser

TABLE = "grades.csv"
REFERENCE = "the-reference-answers"  # the student who hands in the solutions
# What one cell and one notebook may take, in seconds; tests shorten it.
CELL_SECONDS, NOTEBOOK_SECONDS = map(int, os.environ.get("GRADE_SECONDS", "60 240").split())
STOPPED = ("CellTimeoutError", "KeyboardInterrupt")
TICK = re.compile("^✓", re.MULTILINE)
# The repository cannot be written to, folders named in HIDE are empty, and capabilities are gone,
# so that nothing of this can be undone. prlimit bounds files (200 MB) and processor time.
JAIL = """
mount --rbind "$ROOT" "$ROOT"; mount -o remount,bind,ro "$ROOT"
for folder in $HIDE; do mount -t tmpfs -o size=1m,ro tmpfs "$folder" || exit 1; done
cd "$SCRATCH" || exit 1
exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all \\
    prlimit --fsize=200000000 --cpu=600 "$@"
"""


class Line(NamedTuple):
    """One line of the table."""

    student: str
    chapter: str
    exercise: str
    #: ``code``, marked by its check, or ``text``, marked by hand
    part: str
    #: empty where nothing is known yet
    points: float | str
    of: float
    #: ``graded``, ``blank``, ``pending``, ``not handed in`` or ``not graded: reason``
    state: str
    #: what the grader should know: cells set back, answers found twice, notebooks set aside
    notes: str


class Submission(NamedTuple):
    """A notebook that a student handed in, or what was found instead."""

    student: str
    #: the chapter it belongs to, or the name of a file that is no submission
    chapter: str
    notebook: nbformat.NotebookNode | None
    #: what is wrong with the file, or which notebooks were set aside for this one
    said: str


class Course(NamedTuple):
    """nbgrader's folder of a course."""

    folder: Path

    def path(self, step: str, student: str, chapter: str) -> Path:
        return self.folder / step / student / chapter / f"{chapter}.ipynb"

    def config(self, scratch: str):
        from traitlets.config import Config

        config = Config()
        config.CourseDirectory.root = str(self.folder)
        config.CourseDirectory.course_id = "amortised"
        config.CourseDirectory.db_url = f"sqlite:///{self.folder}/gradebook.db"
        config.Execute.timeout = CELL_SECONDS
        config.KernelManager.transport = "ipc"
        config.KernelManager.ip = f"{scratch}/kernel"
        return config

    def gradebook(self):
        from nbgrader.api import Gradebook

        return Gradebook(f"sqlite:///{self.folder}/gradebook.db", "amortised")

    @property
    def chapters(self) -> list[str]:
        return sorted(path.parent.name for path in self.folder.glob("source/*/*.ipynb"))

    def release(self, chapter: str) -> nbformat.NotebookNode:
        return read(self.path("release", "", chapter))


def read(path: Path) -> nbformat.NotebookNode:
    with contextlib.redirect_stderr(io.StringIO()):
        return nbformat.read(path, as_version=4)


# --- one notebook, in a process of its own -------------------------------------------------------


def history(root: Path) -> list[Path]:
    """Git's folders, in which all tests are: in a worktree ``.git`` is a file that names them."""
    git = root / ".git"
    if not git.is_file():
        return [git]
    own = root / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
    common = own / "commondir"
    if not common.is_file():
        return [own]
    return [(own / common.read_text(encoding="utf-8").strip()).resolve()]


def jail(scratch: str, hidden: list[Path]) -> list[str]:
    """The command that starts another one in the jail; empty where the system has none."""
    root = [] if os.geteuid() == 0 else ["--map-root-user"]
    spaces = ["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    folders = " ".join(shlex.quote(str(path)) for path in hidden if path.is_dir())
    script = f"ROOT={shlex.quote(str(ROOT))} SCRATCH={shlex.quote(scratch)}\n" + JAIL.replace(
        "$HIDE", folders
    )
    command = ["unshare", *root, *spaces, "sh", "-c", script, "jail"]
    try:
        works = subprocess.run([*command, "true"], capture_output=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return command if works.returncode == 0 else []


def kernels(scratch: str, wrap: list[str]) -> None:
    """A kernelspec that nbgrader finds before the ordinary one."""
    folder = Path(scratch) / "share" / "kernels" / "python3"
    folder.mkdir(parents=True)
    launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": [*wrap, *launch], "display_name": "Python 3", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")


def environment(scratch: str) -> dict[str, str]:
    """That of the chapters, with every folder in scratch: in the jail the project is read-only."""
    own = {key: value.replace(str(CACHE), scratch) for key, value in KERNEL_ENVIRONMENT.items()}
    return own | {"JUPYTER_PATH": f"{scratch}/share", "MPLBACKEND": "agg"}


def autograde(course: Course, student: str, chapter: str, hidden: list[Path]) -> dict:
    """Let nbgrader run one submission; its verdict is ``{"success": ..., "log": ...}``."""
    from nbgrader.apps.api import NbGraderAPI

    logging.getLogger("traitlets").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="grade-") as scratch:
        kernels(scratch, jail(scratch, hidden))
        os.environ |= environment(scratch)
        return NbGraderAPI(config=course.config(scratch)).autograde(chapter, student, force=True)


def run_one(course: Course, student: str, chapter: str, hidden: list[Path]) -> str:
    """Autograde in a process that can be ended; return the reason if it failed."""
    command = [sys.executable, __file__, "--one", student, chapter, "-", str(course.folder)]
    command += [word for path in hidden for word in ("--hide", str(path))]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=NOTEBOOK_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"it did not end within {NOTEBOOK_SECONDS} s and would not be interrupted"
    if process.returncode == 0:
        return ""
    if "DeadKernelError" in printed or "Kernel died" in printed:
        return "its kernel died: os._exit, a signal, or too little memory"
    if "CellTimeoutError" in printed:
        return f"a cell ran longer than {CELL_SECONDS} s and would not be interrupted"
    named = re.findall(r"^ *((?:\w+\.)*\w*(?:Error|Exception|Entry)\b.*)$", printed, re.MULTILINE)
    return f"nbgrader failed: {named[-1] if named else ' '.join(printed.split())[-200:]}"


# --- marks ---------------------------------------------------------------------------------------


def ticks(cell: nbformat.NotebookNode) -> int:
    texts = [output.text for output in cell.outputs if output.get("name") == "stdout"]
    return sum(len(TICK.findall(text)) for text in texts)


def errors(cells: Iterable[nbformat.NotebookNode]) -> list[str]:
    """The names of the errors in which cells ended."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return [output.ename for output in outputs if output.output_type == "error"]


def verdict(before: list[nbformat.NotebookNode], reports: int) -> tuple[bool | None, str]:
    """Whether a check has passed, and the state of its line. Only errors count against it.

    The check is the last of the cells, which begin behind the check before it. Where one of them
    was stopped, an error says nothing about the answer.
    """
    check = before[-1]
    if errors([check]) or ticks(check) != reports:
        if set(errors(before)) & set(STOPPED):
            return None, f"not graded: a cell was stopped after {CELL_SECONDS} s"
    if check.execution_count is None and not check.outputs:
        return None, "not graded: the check was never run"
    if errors([check]):
        return False, "graded"
    if ticks(check) != reports:
        return None, f"not graded: the check reported {ticks(check)} times instead of {reports}"
    return True, "graded"


def spans(cells: list[nbformat.NotebookNode]) -> dict[str, list[nbformat.NotebookNode]]:
    """For each check the cells from the one behind the check before it up to itself."""
    found, span = {}, []
    for cell in cells:
        span.append(cell)
        if cell.id.endswith("-check"):
            found[cell.id], span = span, []
    return found


def lines_of(course: Course, student: str, chapter: str, notes: list[str], reference: dict):
    """The table's lines of one autograded notebook; scores go into the gradebook as well."""
    cells = read(course.path("autograded", student, chapter)).cells
    graded, before = {cell.id: cell for cell in cells}, spans(cells)
    released = {cell.id: cell for cell in course.release(chapter).cells}
    with course.gradebook() as book:
        for grade in book.find_submission_notebook(chapter, chapter, student).grades:
            label, _, kind = grade.name.rpartition("-")
            note = "; ".join(one for one in notes if one.startswith(label))
            blank = plain(graded[grade.name].source) in ("", plain(released[grade.name].source))
            if kind == "check":
                passed, state = verdict(before[grade.name], reference.get(grade.name, 0))
                grade.auto_score = grade.max_score if passed else 0.0
                points = "" if passed is None else grade.auto_score
                yield Line(student, chapter, label, "code", points, grade.max_score, state, note)
                continue
            if blank:
                points, state = 0.0, "blank"
            elif grade.manual_score is None:
                points, state = "", "pending"
            else:
                points, state = grade.manual_score, "graded"
            yield Line(student, chapter, label, "text", points, grade.max_score, state, note)
        book.db.commit()


def not_graded(course: Course, student: str, chapter: str, reason: str) -> Iterator[Line]:
    for cell in course.release(chapter).cells:
        marks = cell.metadata.get("nbgrader", {})
        if marks.get("grade"):
            label, _, kind = cell.id.rpartition("-")
            part = "code" if kind == "check" else "text"
            state = f"not graded: {reason}"
            yield Line(student, chapter, label, part, "", marks["points"], state, "")


# --- a class -------------------------------------------------------------------------------------


def prepare(course: Course, chapters: list[str], hidden: list[Path]) -> dict[str, dict]:
    """Enter the assignments, and hand in the solutions: how often does each check report?"""
    from nbgrader.apps.api import NbGraderAPI

    found = {}
    for chapter in chapters:
        source = course.folder / "source" / chapter / f"{chapter}.ipynb"
        record = course.folder / "reference" / f"{chapter}.json"
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        if known.get("digest") != digest:
            print(f"{chapter:<24} the reference answers are run first", flush=True)
            with tempfile.TemporaryDirectory() as scratch:
                api = NbGraderAPI(config=course.config(scratch))
                done = api.generate_assignment(chapter, force=True)
            if not done["success"]:
                raise SystemExit(f"nbgrader makes no assignment of {chapter}:\n{done['log']}")
            submit(
                course, REFERENCE, chapter, rebuild(course.release(chapter), read(source)).notebook
            )
            if reason := run_one(course, REFERENCE, chapter, hidden):
                raise SystemExit(f"{chapter}: the reference answers are not graded here: {reason}")
            cells = read(course.path("autograded", REFERENCE, chapter)).cells
            checks = [cell for cell in cells if cell.id.endswith("-check")]
            failed = [c.id for c in checks if any(o.output_type == "error" for o in c.outputs)]
            if failed:
                raise SystemExit(f"{chapter}: the reference answers fail {', '.join(failed)} here")
            with course.gradebook() as book:
                book.remove_student(REFERENCE)
            known = {"digest": digest, "reports": {cell.id: ticks(cell) for cell in checks}}
            record.parent.mkdir(exist_ok=True)
            record.write_text(json.dumps(known), encoding="utf-8")
        found[chapter] = known["reports"]
    return found


def submit(course: Course, student: str, chapter: str, notebook: nbformat.NotebookNode) -> None:
    path = course.path("submitted", student, chapter)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    shutil.rmtree(course.path("autograded", student, chapter).parent, ignore_errors=True)


def assigned(course: Course, path: Path) -> tuple[str, nbformat.NotebookNode]:
    """The chapter that a notebook belongs to, by its cells: files are renamed."""
    notebook = read(path)
    scores = {chapter: likeness(course.release(chapter), notebook) for chapter in course.chapters}
    chapter = max(scores, key=lambda name: (scores[name], name == path.stem))
    if scores[chapter] < 3:
        raise ValueError("it has fewer than three cells of any chapter")
    return chapter, notebook


def worked_on(release: nbformat.NotebookNode, notebook: nbformat.NotebookNode) -> bool:
    """Whether there is an answer, or a cell of the student's own, that the release has not."""
    given = {plain(cell.source) for cell in release.cells} | {""}
    cells = rebuild(release, notebook).notebook.cells
    return any(plain(cell.source) not in given for cell in cells)


def of_student(course: Course, folder: Path) -> Iterator[Submission]:
    """One notebook for each chapter: of several the latest in which an answer was written."""
    found: dict[str, list] = {}
    paths = [p for p in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    for path in sorted(paths):
        name = path.relative_to(folder).as_posix()
        try:
            chapter, notebook = assigned(course, path)
            rank = (worked_on(course.release(chapter), notebook), path.stat().st_mtime, name)
            found.setdefault(chapter, []).append((rank, notebook))
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            yield Submission(folder.name, name, None, f"{name} is no submission: {reason}")
    if not paths:
        yield Submission(folder.name, "", None, "the folder holds no notebook")
    for chapter, several in sorted(found.items()):
        *others, (rank, notebook) = sorted(several, key=lambda one: one[0])
        aside = ", ".join(name for (_, _, name), _ in others)
        note = f"graded was {rank[-1]}, set aside was {aside}" if others else ""
        yield Submission(folder.name, chapter, notebook, note)


def handed_in(course: Course, folder: Path) -> Iterator[Submission]:
    """What each student handed in, and files that belong to no student."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from of_student(course, path)
        elif path.name != TABLE and not path.name.startswith("."):
            yield Submission("", path.name, None, "a file in no student's folder: put it into one")


def missing(course: Course, submissions: list[Submission]) -> Iterator[Line]:
    """A line for each chapter that others of the class handed in and a student did not."""
    pairs = {(one.student, one.chapter) for one in submissions if one.notebook}
    students = {one.student for one in submissions} - {""}
    for chapter in sorted({chapter for _, chapter in pairs}):
        marks = [cell.metadata.get("nbgrader", {}) for cell in course.release(chapter).cells]
        of = sum(one["points"] for one in marks if one.get("grade"))
        for student in sorted(students):
            if (student, chapter) not in pairs:
                yield Line(student, chapter, "", "", "", of, "not handed in", "")


def grade_one(course: Course, one: Submission, hidden: list[Path], reference: dict) -> list[Line]:
    if one.notebook is None:
        return [Line(one.student, one.chapter, "", "", "", 0, f"not graded: {one.said}", "")]
    if not re.fullmatch(r"[\w.@-]+", one.student):
        reason = f"not graded: rename the folder {one.student!r} to letters, digits and .@-_"
        return [Line(one.student, one.chapter, "", "", "", 0, reason, one.said)]
    rebuilt = rebuild(course.release(one.chapter), one.notebook)
    submit(course, one.student, one.chapter, rebuilt.notebook)
    names = course, one.student, one.chapter
    if reason := run_one(*names, hidden):
        lines = list(not_graded(*names, reason))
    else:
        lines = list(lines_of(*names, rebuilt.notes, reference))
    labels = tuple(line.exercise for line in lines)
    general = [note for note in rebuilt.notes if not note.startswith(labels)]
    notes = "; ".join(filter(None, [one.said, *general, lines[0].notes]))
    return [lines[0]._replace(notes=notes), *lines[1:]]


def grade(folder: Path, course: Course, hide: list[Path]) -> list[Line]:
    chapters = course.chapters
    if not chapters:
        raise SystemExit(f"there is no coursework in {course.folder}: run make coursework first")
    names = ("notebooks", "tests", "book", ".cache")
    hidden = [*hide, course.folder, folder, *(ROOT / name for name in names), *history(ROOT)]
    with tempfile.TemporaryDirectory() as scratch:
        if not jail(scratch, hidden):
            print("This system has no jail (unshare, setpriv): the students' code runs as you do.")
    reference, table = prepare(course, chapters, hidden), []
    submissions = list(handed_in(course, folder))
    for one in submissions:
        table += grade_one(course, one, hidden, reference.get(one.chapter, {}))
        summary(table, one.student, one.chapter)
    return [*table, *missing(course, submissions)]


def summary(table: list[Line], student: str, chapter: str) -> None:
    own = [line for line in table if (line.student, line.chapter) == (student, chapter)]
    code = [line for line in own if line.part == "code" and line.points != ""]
    pending = sum(line.of for line in own if line.state == "pending")
    reasons = {line.state for line in own if line.state.startswith("not graded")}
    total = f"{sum(line.points for line in code):g} of {sum(line.of for line in code):g} for code"
    said = [*([total] if code else []), *([f"{pending:g} pending"] if pending else []), *reasons]
    print(f"{student:<16} {chapter:<24} {'; '.join(said)}", flush=True)


def write(table: list[Line], path: Path) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(Line._fields)
        rows.writerows(table)
    print(f"{len(table)} lines in {path}")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("submissions", type=Path)
    parser.add_argument("coursework", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--hide", type=Path, action="append", default=[], help="from students")
    arguments = parser.parse_args()
    course = Course(arguments.coursework.resolve())
    # nbgrader calls alembic by name.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if arguments.one:
        done = autograde(course, *arguments.one, arguments.hide)
        if not done["success"]:
            sys.exit(f"{done.get('error')}\n{done.get('log')}")
        return
    if not arguments.submissions.is_dir():
        raise SystemExit(
            f"there is no folder {arguments.submissions}: FOLDER holds one per student"
        )
    folder = arguments.submissions.resolve()
    write(grade(folder, course, arguments.hide), folder / TABLE)


if __name__ == "__main__":
    main()
