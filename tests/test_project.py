"""The project's own machinery: pins, builds by content, workflows, buttons, README."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import conda
import environment
import nbformat
import pytest
import yaml
from environment import torch_pin
from packaging.requirements import Requirement

from amortised import experiments
from tiny import Root

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9]*.py"))
HEADER = """\
# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

"""
TOY = (
    HEADER
    + """\
# %% [markdown]
# # A toy chapter

# %% tags=["parameters"]
epochs: int = 2  # passes over nothing

# %%
import sys
import small

print({"a", "b", "c"}, small.VALUE * epochs)

# %% [markdown]
# ```{exercise}
# :label: ex-toy
# Find the number.
# ```

# %% [markdown]
# ```{solution-start} ex-toy
# :class: dropdown
# ```
# The secret is simple.

# %%
secret = 42

# %% [markdown]
# ```{solution-end}
# ```
# And on we go.
"""
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# --- pins ----------------------------------------------------------------------------------------


def by_name(lines) -> dict[str, set]:
    """Requirements by normalised name, each as its version and marker."""
    found = {}
    for line in lines:
        requirement = Requirement(line)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        found.setdefault(name, set()).add((str(requirement.specifier), str(requirement.marker)))
    return found


def test_conda_environment_has_the_pins_of_the_lock():
    *plain, pip = yaml.safe_load(read("environment.yml"))["dependencies"]
    assert plain == ["python >=3.11,<3.14", "pip"]
    *requirements, package = pip["pip"]
    assert package == "-e ."
    assert by_name(requirements) == by_name([*conda.pins(), torch_pin()])
    assert read("environment.yml") == conda.environment(), "run make lock"


def test_lock_pins_all_that_is_asked_for():
    asked = [line for line in read("requirements.in").splitlines() if re.match(r"\w", line)]
    project = tomllib.loads(read("pyproject.toml"))
    locked = by_name([*conda.pins(), torch_pin()])
    for line in asked + project["project"]["dependencies"]:
        requirement = Requirement(line)
        versions = [specifier for specifier, _ in locked[requirement.name.lower()]]
        assert all(requirement.specifier.contains(v.removeprefix("==")) for v in versions), line
    (metadata,) = project["tool"]["uv"]["dependency-metadata"]
    assert f"torch=={metadata['version']}" == torch_pin()


def test_lock_is_the_same_wherever_it_is_written():
    lock = read("requirements.lock")
    assert "://" not in lock and "--index" not in lock and "--find-links" not in lock
    assert not {
        name for name in by_name(conda.pins()) if re.match("torch|nvidia|cuda|triton", name)
    }
    for block in re.split(r"\n(?=\w)", lock):
        assert "--hash=sha256:" in block


def test_lab_is_pinned_with_hashes_at_the_versions_of_the_book():
    lock = read("requirements-lab.lock")
    assert "://" not in lock and "torch" not in lock
    for block in re.split(r"\n(?=\w)", lock):
        assert "--hash=sha256:" in block
    pins = [line.rstrip(" \\") for line in lock.splitlines() if re.match(r"\w", line)]
    lab, book = by_name(pins), by_name(conda.pins())
    for name in set(lab) & set(book):
        assert {v for v, _ in lab[name]} == {v for v, _ in book[name]}, name
    for line in read("requirements-lab.in").splitlines():
        if re.match(r"\w", line):
            asked = Requirement(line.partition("#")[0])
            assert {v for v, _ in lab[asked.name.lower()]} == {str(asked.specifier)}
    assert not {"nbgrader", "jupyterlab"} & set(book), "the book is built without them"


def test_binder_installs_the_same_pins():
    script = read(".binder/postBuild")
    assert (ROOT / ".binder" / "postBuild").stat().st_mode & 0o111, "Binder executes it"
    for name in re.findall(r"-r (\S+)|' (requirements\S+?)\)", script):
        assert (ROOT / "".join(name)).is_file()
    assert read(".binder/runtime.txt") == "python-3.11\n"
    subprocess.run(["bash", "-n", ROOT / ".binder" / "postBuild"], check=True)


# --- building ------------------------------------------------------------------------------------


@pytest.fixture
def toy_book(tmp_path):
    """A small copy of the project: the real graph and scripts, two toy chapters, a toy library.

    Its path has spaces and a letter beyond ASCII, and so has that of its interpreter.
    """
    folder = tmp_path / "Ein Büch 1"
    shutil.copytree(ROOT / "workflow", folder / "workflow")
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(ROOT / "requirements.lock", folder)
    for name in ("notebooks/params", "lib", "data", "book"):
        (folder / name).mkdir(parents=True)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "lib" / "small.py").write_text("VALUE = 1\n")
    (folder / "data" / "numbers.csv").write_text("1\n")
    (folder / "notebooks" / "01_one.py").write_text(TOY)
    (folder / "notebooks" / "02_two.py").write_text(TOY)
    return folder


def build(folder: Path, *targets: str) -> list[str]:
    """Run the graph as make does; return which chapters were executed."""
    command = [folder / ".venv/bin/python", "-m", "snakemake", "--snakefile", "workflow/Snakefile"]
    done = subprocess.run(
        [*command, "--profile", "workflow/profiles/local", *targets],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder / "lib")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(re.findall(r"^(\S+) +executed in", done.stdout, flags=re.MULTILINE))


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def test_chapters_are_executed_again_by_content(toy_book):
    assert build(toy_book, "chapters") == ["01_one", "02_two"]
    executed = (toy_book / "book/chapters/01_one.ipynb").read_bytes()
    assert build(toy_book, "chapters") == []

    for path in toy_book.rglob("*.*"):
        if path.is_file() and ".snakemake" not in path.parts and "chapters" not in path.parts:
            os.utime(path)  # newer than the executed chapters, to the clock
    assert build(toy_book, "chapters") == []

    append(toy_book / "notebooks" / "01_one.py", "\n# %%\nepochs\n")
    assert build(toy_book, "chapters") == ["01_one"]
    append(toy_book / "lib" / "small.py", "# a byte\n")
    assert build(toy_book, "chapters") == ["01_one", "02_two"]
    append(toy_book / "data" / "numbers.csv", "2\n")
    os.utime(toy_book / "data" / "numbers.csv", (0, 0))
    assert build(toy_book, "chapters") == ["01_one", "02_two"]

    (toy_book / "notebooks" / "01_one.py").write_text(TOY)
    (toy_book / "book/chapters/02_two.ipynb").unlink()
    assert build(toy_book, "chapters") == ["01_one", "02_two"]
    assert (toy_book / "book/chapters/01_one.ipynb").read_bytes() == executed


def test_a_failing_cell_stops_the_build_and_is_shown(toy_book):
    append(toy_book / "notebooks" / "01_one.py", '\n# %%\nraise ValueError("too small")\n')
    with pytest.raises(AssertionError, match=r"01_one: failed in cell \[4\]") as failure:
        build(toy_book, "chapters")
    assert "ValueError: too small" in str(failure.value)
    assert not (toy_book / "book/chapters/01_one.ipynb").exists()
    assert (toy_book / "book/chapters/02_two.ipynb").exists()
    assert (toy_book / ".cache/failed/01_one.ipynb").exists()


def test_parameters_of_a_size_reach_the_chapter(toy_book):
    for name in ("01_one", "02_two"):
        (toy_book / "notebooks" / "params" / f"{name}.smoke.yaml").write_text("epochs: 7\n")
    assert build(toy_book, "smoke") == ["01_one", "02_two"]
    notebook = nbformat.read(toy_book / "book/_build/smoke/01_one.ipynb", 4)
    defaults, injected, printed = [c for c in notebook.cells if c.cell_type == "code"][:3]
    assert "remove-cell" in defaults.metadata.tags
    assert "epochs = 7" in injected.source
    assert printed.outputs[0].text.endswith("7\n")


SITE = """
title: Toy
html: {baseurl: ""}
repository: {url: ""}
execute: {execute_notebooks: "off"}
exclude_patterns: ["chapters/*.md"]
"""
CONTENTS = """
format: jb-book
root: intro
chapters: [{file: chapters/01_one}, {file: chapters/02_two}]
"""


def test_make_builds_the_site_where_the_path_has_a_space_and_a_letter_beyond_ascii(toy_book):
    """The whole of `make book` but for the installation; these chapters have no exercises."""
    shutil.copy(ROOT / "Makefile", toy_book)
    for name in ("01_one", "02_two"):
        toy = TOY.partition("# %% [markdown]\n# ```{exercise}")[0]
        (toy_book / "notebooks" / f"{name}.py").write_text(toy, encoding="utf-8")
    (toy_book / "lib" / "small.py").rename(toy_book / "notebooks" / "small.py")  # on the path
    for name, text in (("_config.yml", SITE), ("_toc.yml", CONTENTS), ("intro.md", "# A toy")):
        (toy_book / "book" / name).write_text(text, encoding="utf-8")
    command = ["make", "--no-print-directory", "-o", "environment", "book"]
    done = subprocess.run(command, cwd=toy_book, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"file://{toy_book}/book/_build/html/index.html\n")
    page = (toy_book / "book/_build/html/chapters/01_one.html").read_text(encoding="utf-8")
    assert "A toy chapter" in page


def test_a_second_build_waits_for_the_first(tmp_path):
    command = [sys.executable, ROOT / "workflow" / "locked.py", tmp_path / "lock"]
    log = tmp_path / "log"
    script = f'import time; time.sleep(1); open({str(log)!r}, "a").write("first ")'
    first = subprocess.Popen([*command, sys.executable, "-c", script])
    while not (tmp_path / "lock").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    script = f'open({str(log)!r}, "a").write("second")'
    second = subprocess.run(
        [*command, sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True
    )
    assert first.wait() == 0
    assert log.read_text() == "first second"
    assert "waiting" in second.stdout


@pytest.mark.parametrize("python", ["no-such-python", "false"])
def test_missing_python_is_one_line_that_says_what_to_install(python):
    done = subprocess.run(
        ["make", "book", f"PYTHON={python}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    first, *_ = done.stderr.splitlines()
    assert "install Python 3.11 or newer" in first and python in first


# --- wrong values --------------------------------------------------------------------------------


WRONG = {
    ("notebooks", "NB=01_vi_recpa"): "NB=01_vi_recpa is none of: 01_vi_recap 02_pq_vs_qp",
    ("notebooks", "NB="): "NB is empty; choose among: 01_vi_recap 02_pq_vs_qp",
    ("chapters", "SIZE=smoek"): "SIZE=smoek is none of: smoke full",
    ("chapters", "SIZE="): "SIZE is empty; choose among: smoke full",
    ("book", "PROFILE=locla"): "PROFILE=locla is none of: local slurm",
    ("book", "PROFILE=local; touch BAD"): "PROFILE=local; is none of: local slurm",
    ("laptop", "STUDY=a b"): "there is no run with study 'a b'; choices: ",
    ("laptop", "STUDY="): "there is no run with study ''; choices: ",
    ("laptop", "STUDY=`touch BAD`"): "there is no run with study '`touch BAD`'; choices: ",
    ("full", "STUDY=$$(touch BAD)"): "there is no run with study '$(touch BAD)'; choices: ",
    ("laptop", "STUDY=reference", "ROW="): "there is no run with row ''; choices: vae",
    ("grade", "FOLDER="): "FOLDER is empty; name the folder that holds a folder for each student",
    ("chapter", "FROM="): "FROM is empty; choose among: 01_vi_recap 02_pq_vs_qp",
    ("chapter", "FROM=01_vi", "TO=08_a"): "FROM=01_vi is none of: 01_vi_recap 02_pq_vs_qp",
    ("chapter", "FROM=01_vi_recap", "TO=x"): "TO=x must be two digits, an underscore and a name",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_wrong_value_is_one_line_that_names_it_and_the_choices(arguments):
    command = ["make", "--no-print-directory", "-o", "environment", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 2 and len(lines) <= 2
    assert WRONG[arguments] in lines[0]
    assert not (ROOT / "BAD").exists()


# --- files that people read ----------------------------------------------------------------------


def test_readme_names_every_chapter_and_only_targets_that_exist():
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), flags=re.MULTILINE))
    pages = [f"book/{name}.md" for name in ("reproducing", "studying", "teaching", "adding")]
    for name in ("README.md", "CONTRIBUTING.md", *pages):
        named = re.findall(r"(?:^|`)make ([a-z]+)", read(name), flags=re.MULTILINE)
        assert set(named) <= targets, name
    for chapter in CHAPTERS:
        assert f"notebooks/{chapter}.ipynb" in read("README.md")
        assert f"chapters/{chapter}" in read("book/_toc.yml")


@pytest.mark.parametrize("address", ["", "https://github.com/someone/compendium"])
def test_buttons_appear_with_the_address_of_the_repository(address, monkeypatch):
    """One setting: repository.url in _config.yml, which Jupyter Book hands to the theme."""
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    compendium = importlib.import_module("compendium")
    config = yaml.safe_load(read("book/_config.yml"))
    assert "launch_buttons" not in config and not any("button" in key for key in config["html"])
    options = {"repository_url": address, "launch_buttons": {}}
    compendium.buttons(None, SimpleNamespace(html_theme_options=options))
    shown = {name for name, value in options.items() if value}
    wanted = {f"use_{name}_button" for name in ("repository", "issues", "edit_page")}
    assert shown == (wanted | {"repository_url", "launch_buttons"} if address else set())
    if address:
        assert {"colab_url", "binderhub_url"} <= set(options["launch_buttons"])


def test_exercises_have_permalinks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    compendium = importlib.import_module("compendium")
    title = '<p class="admonition-title"><span>Exercise 2.1 </span> (A title)'
    body = f'<div class="exercise admonition" id="ex-a">\n\n{title}</p>\n<div>{title}</p></div>'
    link = '<a class="headerlink" href="#ex-a" title="Link to this exercise">#</a>'
    assert compendium.link_to_exercises(body) == body.replace(title, title + link, 1)


def test_links_between_project_files_resolve():
    for name in ("README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", read(name)):
            assert link.startswith("https://") or (ROOT / link).exists(), f"{name}: {link}"


def test_help_lists_the_targets():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in "book test soak notebooks coursework grade lab chapter lock".split():
        assert re.search(rf"^make {target} +\w", done.stdout, flags=re.MULTILINE)


@pytest.mark.parametrize("name", ["check", "publish"])
def test_workflows_are_pinned_and_have_least_permissions(name):
    text = read(f".github/workflows/{name}.yml")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    for action in re.findall(r"uses: (\S+)", text):
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action)
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 40
        assert set(job.get("permissions", {})) <= {"pages", "id-token"}


def test_every_version_of_python_is_checked_and_nothing_is_published_unchecked():
    names = (f".github/workflows/{name}.yml" for name in ("check", "publish"))
    check, publish = map(yaml.safe_load, map(read, names))
    versions = check["jobs"]["check"]["strategy"]["matrix"]["python"]
    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert versions == ["3.11", "3.12", "3.13"] and project["requires-python"] == ">=3.11"
    named = [f"Programming Language :: Python :: {version}" for version in versions]
    assert project["classifiers"] == named
    for workflow in (check, publish):
        steps = next(iter(workflow["jobs"].values()))["steps"]
        assert "bash .ci/run" in [step.get("run") for step in steps]


def test_what_has_a_digest_is_installed_before_what_has_none(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(environment, "STAMP", tmp_path / ".venv/installed")
    monkeypatch.setattr(environment, "BEGUN", tmp_path / ".venv/begun")
    monkeypatch.setattr(environment, "torch_pin", lambda: "torch==1")
    monkeypatch.setattr(environment, "step", lambda name, *command: steps.append(command))
    environment.install()
    locked, torch, own = (set(command) for command in steps[1:])
    assert {"--require-hashes", "requirements.lock"} < locked
    assert "torch==1" in torch and "--editable" in own


def test_a_chapter_is_executed_alike_whatever_surrounds_it(tmp_path):
    """A home that is not there, another kernel of that name, a long TMPDIR, no UTF-8, debris."""
    chapter, out, kernel = (tmp_path / name for name in ("a.py", "a.ipynb", "kernels/python3"))
    chapter.write_text(HEADER + "\n# %%\nimport sys\nprint(sys.prefix, 'é✓')\n", encoding="utf-8")
    kernel.mkdir(parents=True)
    argv = ["/bin/false", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Foreign", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    long, dead = tmp_path / (100 * "a"), subprocess.Popen(["true"])
    long.mkdir()
    dead.wait()
    stale = [Path(f"/tmp/amortised-{dead.pid}-x"), tmp_path / f".a.ipynb.{dead.pid}"]
    stale[0].mkdir(exist_ok=True)
    stale[1].touch()
    surroundings = {"HOME": "/none", "JUPYTER_PATH": str(tmp_path), "TMPDIR": str(long)}
    surroundings |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, ROOT / "workflow/execute.py", chapter, out],
        env=os.environ | surroundings | {"MPLCONFIGDIR": "/none"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = nbformat.read(out, 4).cells[-1].outputs[0].text
    assert printed == f"{sys.prefix} é✓\n"
    assert not any(path.exists() for path in stale) and not list(long.iterdir())
    tables = [tmp_path / "times.md", tmp_path / "exercises.md"]
    subprocess.run(
        [sys.executable, ROOT / "workflow/exercise_table.py", *tables],
        env=os.environ | surroundings,
        check=True,
    )
    assert all(table.read_text(encoding="utf-8").count("\n") > 6 for table in tables)


def test_text_from_data_is_shown_and_not_obeyed(tmp_path, monkeypatch):
    import cost_table

    device = {"type": "cpu", "name": "<script>alert(1)</script>|`x`", "threads": 1}
    record = {"provenance": {"device": device, "wall_seconds": 60.0}, "details": {}}
    run = experiments.select(experiments.load_studies(), "vae_objectives", "elbo", seed=0)[0]
    monkeypatch.setattr(
        experiments, "state_of", lambda e, root=None: experiments.State("done", record)
    )
    devices = {timed.device for timed in cost_table.timed_runs({"vae_objectives": [run]}, tmp_path)}
    (device,) = devices
    assert not set("<>|`") & set(device) and "script" in device


def test_citation_and_package_agree():
    citation = yaml.safe_load(read("CITATION.cff"))
    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert citation["version"] == project["version"]
    assert citation["authors"] == project["authors"]
    assert citation["license"] == project["license"] == "MIT"
    module = importlib.util.find_spec("amortised")
    assert Path(module.origin).is_relative_to(ROOT), "the installed package is not this folder's"


def test_cost_model_recovers_the_costs_that_made_the_times():
    import cost_table

    from amortised import experiments

    per_unit = {
        "image": 3e-4,
        "game": 2e-4,
        "sample": 1e-4,
        "chain": 6e-5,
        "annealing": 5e-5,
        "importance": 2e-5,
        "fit": 2e-1,
        "proposal": 4e-4,
    }
    runs = [
        cost_table.Timed(
            experiment,
            "a processor",
            {
                stage: sum(amount * per_unit[kind] for kind, amount in work.items())
                for stage, work in cost_table.work_of(experiment.config).items()
            },
        )
        for experiment in experiments.select(experiments.load_studies(), scale="laptop")
        if experiment.recipe in cost_table.MODELLED
    ]
    found = cost_table.fit(runs)
    assert found == pytest.approx(per_unit, rel=1e-6)
    for run in runs:
        assert cost_table.predicted(run.experiment.config, found) == pytest.approx(run.total)
    assert cost_table.fit(runs[:3]) is None  # fewer rows than unknowns


@pytest.fixture
def studies(toy_book) -> Root:
    """The tiny studies beside the real graph and Makefile."""
    shutil.copy(ROOT / "Makefile", toy_book)
    changes = {"small/rows/wild": None, "small/rows/amc": None, "filled/seeds": [0]}
    return Root(toy_book).write(changes)


def graph(profile: str) -> list[str]:
    command = [sys.executable, "-m", "snakemake", "--snakefile", "workflow/Snakefile"]
    return [*command, "--profile", f"workflow/profiles/{profile}"]


@pytest.mark.parametrize("profile", ["local", "slurm"])
def test_graph_of_the_studies(studies, profile):
    """What a run builds on comes first, and on a card both take turns."""
    needed, target = studies.run(), studies.prepared("filled") / "result.json"
    options = ["--quiet", "host", "--dry-run", target.relative_to(studies.folder)]
    done = subprocess.run(
        [*graph(profile), *options, "--config", "device=cuda"],
        cwd=studies.folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    outputs = [needed / "training.json", target]
    assert re.findall(r"output: (runs/\S+)", output) == [
        path.relative_to(studies.folder).as_posix() for path in outputs
    ]
    assert output.count("gpu=1") == 2


def test_studies_are_made_as_one_graph(studies):
    """A run trains what it builds on; one that cannot be made does not stop the others."""
    damaged = studies.prepared(row="persistent") / "training-checkpoint.stage"
    damaged.write_bytes(b"")
    tools = [shutil.which("env"), f"PYTHONPATH={ROOT / 'lib'}", "OMP_NUM_THREADS=1"]
    arguments = ["--file", studies.file, "--root", studies.folder]
    variables = {
        "BIN": [Path(sys.executable).parent],
        "EXPERIMENTS": [*tools, sys.executable, "-m", "amortised.experiments", *arguments],
        "GRAPH": [*tools, *graph("local")],
        "OPTIONS": ["--quiet", "rules"],
        "SEED": [0],
    }
    done = subprocess.run(
        ["make", "-o", "environment", "laptop"]
        + [f"{name}={shlex.join(map(str, words))}" for name, words in variables.items()],
        cwd=studies.folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stdout.count("training-checkpoint.stage is damaged") == 1, done.stdout
    for study, row, word in (
        ("small", "vae", "done"),
        ("filled", "vae", "done"),
        ("small", "hot", "failed"),  # it diverged, which is a result
        ("small", "persistent", "partial"),
    ):
        assert studies.state(study, row).word == word, done.stdout
        assert (f"{study}/{row}-laptop-seed0: recorded" in done.stdout) == (word != "partial")
