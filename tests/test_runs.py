"""Runs survive whatever happens to them: killed, stopped, short of disk, two at once.

Each is a real process, forked from a server that has imported torch and read MNIST once and has
only what a machine that trains needs: what a run imports is tested all along. Another such server
records results and executes chapters, which are killed as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from amortised import data, results, runs
from amortised.files import load_tree
from tiny import INTERVAL, KILLS, NUM_STEPS, OPTIONS, SEED, Root

pytestmark = pytest.mark.usefixtures("mnist_is_read_once")

WORKFLOW = Path(__file__).resolve().parents[1] / "workflow"
NOT_NEEDED = "pydantic yaml pooch matplotlib scipy pandas PIL jupyter IPython nbformat snakemake"
SERVER = textwrap.dedent(
    """
    import json, os, signal, sys, tempfile, time, traceback
    from functools import cache, partial
    from importlib import import_module
    from pathlib import Path

    for name in sys.argv[1].split():
        sys.modules[name] = None  # an import of it is an ImportError

    import torch
    from amortised import data, files, results, runs, training
    from amortised.commands import command

    programs = {name: import_module(name) for name in sys.argv[2].split()}
    torch.set_num_threads(1)
    for name in ("load_mnist", "load_mnist_binary"):
        setattr(data, name, cache(getattr(data, name)))
    data.load_mnist("train"), data.load_mnist("train", dtype=torch.uint8)
    data.load_mnist_binary("test")
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first one imports a great deal
    print("ready", flush=True)

    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            code = 70
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for number, name in ((1, "out"), (2, "err")):
                    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
                    os.dup2(os.open(request[name], flags), number)
                exec(request["before"])
                command(partial(programs[request["program"]].main, request["arguments"]))
            except SystemExit as error:
                code = error.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    """
)

COUNTED = """
real_fit, log = runs.fit, os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def fit(step, *arguments, **settings):
    def counted(*batch):
        os.write(log, b".")
        time.sleep({seconds})
        return step(*batch)
    return real_fit(counted, *arguments, **settings)
runs.fit = fit
"""  # notes each step of the training in a file, and can make it slower

KILLED = """
real_call = os.{call}
def killing(*paths):
    if str(paths[-1]).endswith({name!r}):
        os.kill(os.getpid(), signal.SIGKILL)
    real_call(*paths)
os.{call} = killing
"""  # before a file gets its name, or goes

FULL_DISK = """
import resource
real_write = files.atomic_write
def write(path, content):
    if str(path).endswith({name!r}):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, -1))
    real_write(path, content)
for module in (files, results):
    module.atomic_write = write
"""  # no file can grow beyond half of what a file should hold


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Workers:
    """Starts processes, one after the other, and tells how they ended."""

    def __init__(self, folder: Path, not_needed: str, programs: str):
        self.folder = folder
        path = os.pathsep.join(filter(None, (str(WORKFLOW), os.environ.get("PYTHONPATH"))))
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER, not_needed, programs],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )
        assert self.server.stdout.readline() == "ready\n"
        self.is_busy = False

    def start(self, folder: Path, *options: str, before: str = "", seconds: float = 0.0) -> Path:
        """Begin a run; the file of the returned name has a byte for each step that was made."""
        log = folder.parent / f"{folder.name}.steps"
        counted = COUNTED.format(log=str(log), seconds=seconds)
        self.begin("amortised.runs", folder, *options, before=counted + before)
        return log

    def begin(self, program: str, *arguments: str | Path, before: str = "") -> None:
        request = {"program": program, "arguments": list(map(str, arguments)), "before": before}
        request |= {name: str(self.folder / name) for name in ("out", "err")}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        self.process = int(self.server.stdout.readline())
        self.is_busy = True

    def wait(self) -> Ended:
        code = int(self.server.stdout.readline())
        self.is_busy = False
        return Ended(code, *((self.folder / name).read_text() for name in ("out", "err")))

    def kill(self, number: int = signal.SIGKILL) -> Ended:
        with contextlib.suppress(ProcessLookupError):  # it may just have ended
            os.kill(self.process, number)
        return self.wait()

    def __call__(self, folder: Path, *options: str, **settings) -> Ended:
        self.start(folder, *options, **settings)
        return self.wait()

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with contextlib.closing(
        Workers(tmp_path_factory.mktemp("workers"), NOT_NEEDED, "amortised.runs")
    ) as server:
        yield server


@pytest.fixture
def workers(server):
    """The server, free again after each test."""
    yield server
    if server.is_busy:
        server.kill()


@pytest.fixture(scope="module")
def other_workers(tmp_path_factory):
    """A server with all packages, which records and executes chapters."""
    programs = "amortised.experiments execute"
    with contextlib.closing(Workers(tmp_path_factory.mktemp("others"), "", programs)) as server:
        yield server


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """Folder of the run of a row that was left alone; to be copied, not changed."""
    root, seconds = Root(tmp_path_factory.mktemp("whole")).write(), {}

    def whole(row: str = "vae") -> tuple[Path, float]:
        folder = root.prepared(row=row)
        if row not in seconds:
            started = time.monotonic()
            ended = server(folder)
            assert ended.code == 0 and ended.out == f"{folder}: done\n", ended
            seconds[row] = time.monotonic() - started
            assert steps_of(folder) == NUM_STEPS
        return folder, seconds[row]

    return whole


@pytest.fixture
def folder(tmp_path) -> Path:
    """Of a run that is prepared and no more."""
    return Root(tmp_path).write().prepared()


def steps_of(folder: Path) -> int:
    return (folder.parent / f"{folder.name}.steps").stat().st_size


def assert_same(folder: Path, whole: Path) -> None:
    """To the bit: values per image, weights, losses; and nothing is left lying about."""
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    found, expected = (runs.read_json(path / "result.json") for path in (folder, whole))
    assert found["metrics"] == expected["metrics"] and found["status"] == "done"
    assert found["details"]["history"] == expected["details"]["history"]
    values = [path / "per_image.stage" for path in (folder, whole)]
    assert values[0].read_bytes() == values[1].read_bytes()
    for path in whole.glob("*.safetensors"):
        weights, others = load_file(folder / path.name), load_file(path)
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[name], other) for name, other in others.items())


def damage(path: Path, cut: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[: len(content) - cut])


# --- left alone ----------------------------------------------------------------------------------


def test_a_run_needs_none_of_the_packages_that_prepare_and_show_it(workers, whole):
    folder, _ = whole()
    check = f"assert all(sys.modules[name] is None for name in {NOT_NEEDED.split()})"
    ended = workers(folder, before=check)
    assert ended.code == 0 and ended.out == f"{folder}: done\n"
    assert steps_of(folder) == NUM_STEPS  # what is there is not made again


def test_a_result_says_where_it_comes_from(whole):
    folder, _ = whole()
    record, facts = (found := runs.read_json(folder / "result.json")), found["provenance"]
    assert record["config"] == OPTIONS and record["recipe_version"] == 1
    assert facts["device"]["type"] == "cpu" and facts["device"]["threads"] == 1
    assert facts["data_sha256"] == data.digests("mnist") and facts["wall_seconds"] > 0
    assert facts["versions"]["torch"] == str(torch.__version__)
    assert record["details"]["steps"] == NUM_STEPS and record["details"]["cpu_seconds"] > 0
    assert {metric["n"] for metric in record["metrics"].values()} == {4, 3}
    results.check_result(record, load_tree(folder / "per_image.stage"))


def test_the_global_stream_is_left_alone_and_another_seed_is_another_run(whole, tmp_path):
    other = Root(tmp_path).write().prepared(seed=1)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    found = runs.execute(other)
    assert torch.equal(torch.get_rng_state(), before)
    expected = runs.read_json(whole()[0] / "result.json")
    assert found["metrics"]["ais_ll"] != expected["metrics"]["ais_ll"]


# --- killed --------------------------------------------------------------------------------------

SIGNALS = (signal.SIGKILL, signal.SIGTERM)


def soak(*table: tuple) -> list:
    return [pytest.param(*row, marks=pytest.mark.soak) for row in table]


def killed_until_done(workers, start, moment, moments, num_kills: int) -> int:
    """Start it and kill it at a moment of each life, at most so many times, until it is done.

    :return: how often it was killed.
    """
    lost, code = 0, None
    while code != 0:
        begun = start()
        if lost == num_kills:
            ended = workers.wait()
        else:
            moment(begun)
            how = moments.choice(SIGNALS)
            ended = workers.kill(how)
            lost += ended.code != 0
            KILLS[how.name] += ended.code != 0
        code = ended.code
        assert code in (0, 130, *(-number for number in SIGNALS)), ended
        assert "Traceback" not in ended.err, ended
    return lost


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("row", "num_kills"), [("vae", 3), *soak(("vae", 24), ("amc", 20), ("persistent", 20))]
)
def test_killed_at_random_moments(workers, whole, tmp_path, row, num_kills):
    moments, (expected, seconds) = random.Random(SEED), whole(row)
    kills, stages = 0, set()
    while kills < num_kills:
        folder = Root(tmp_path / str(kills)).write().prepared(row=row)

        def moment(log: Path, folder=folder) -> None:
            if not stages:  # the first kill falls into the training, however busy the machine is
                step = moments.randint(3, NUM_STEPS // 2)
                wait_for(lambda: log.exists() and log.stat().st_size >= step)
            else:
                time.sleep(moments.uniform(0, seconds / 2))
            stages.update(path.name.split("-")[0] for path in folder.glob("*.stage"))

        start = partial(workers.start, folder, seconds=0.02 if kills == 0 else 0.0)
        lost = killed_until_done(workers, start, moment, moments, num_kills - kills)
        kills += lost
        # Each kill loses the steps since the last checkpoint, and that which is being written.
        assert 0 <= steps_of(folder) - NUM_STEPS <= 2 * INTERVAL * lost
        assert_same(folder, expected)
        KILLS["runs"] += lost
    assert "training" in stages


SLOW = """
real_replace, log = os.replace, os.open({0!r}, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
def replace(*paths):
    os.write(log, b".")
    time.sleep(0.02)
    real_replace(*paths)
    time.sleep(0.02)
os.replace = replace
"""  # notes each file of a recording, and makes it slower


@pytest.mark.parametrize("num_kills", [2, *soak((24,))])
def test_killed_while_a_result_is_recorded(other_workers, whole, tmp_path, num_kills):
    moments, kills, log = random.Random(SEED), 0, tmp_path / "replaced"
    record, before = ("record", "small", "vae", "--seed", "0"), SLOW.format(str(log))

    def begin(root: Path) -> None:
        log.unlink(missing_ok=True)
        where = ("--file", root / "studies.yaml", "--root", root)
        other_workers.begin("amortised.experiments", *where, *record, before=before)

    def moment(_) -> None:
        number = moments.randint(1, num_files)
        wait_for(lambda: log.exists() and log.stat().st_size >= number)
        time.sleep(moments.uniform(0, 0.04))

    given, expected = whole()[0].parents[2], tmp_path / "whole"
    shutil.copytree(given, expected)
    begin(expected)
    assert other_workers.wait().code == 0
    num_files = log.stat().st_size
    assert num_files >= 4  # two networks, values per image, the result
    while kills < num_kills:
        root = tmp_path / str(kills)
        shutil.copytree(given, root)
        left = num_kills - kills
        lost = killed_until_done(other_workers, partial(begin, root), moment, moments, left)
        assert tree(root) == tree(expected)
        kills, KILLS["records"] = kills + lost, KILLS["records"] + lost


CHAPTER = """# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %%
import random, time

# %%
time.sleep(0.1)
random.seed(3), print(random.random())

# %%
time.sleep(0.1)
print(random.random())
"""
OWN_FOLDERS = """
programs["execute"].CACHE = Path({0!r}, "cache")
tempfile.tempdir = {0!r}
"""


@pytest.mark.parametrize("num_kills", [1, *soak((12,))])
def test_killed_while_a_chapter_is_executed(other_workers, tmp_path, num_kills):
    moments, kills, source = random.Random(SEED), 0, tmp_path / "a.py"
    source.write_text(CHAPTER, encoding="utf-8")

    def begin(folder: Path) -> None:
        before = OWN_FOLDERS.format(str(folder))
        other_workers.begin("execute", source, folder / "a.ipynb", before=before)

    with tempfile.TemporaryDirectory(dir="/tmp", prefix="kills") as short:  # sockets' names are
        started = time.monotonic()
        expected = Path(short, "whole")
        expected.mkdir()
        begin(expected)
        assert other_workers.wait().code == 0
        seconds = time.monotonic() - started
        assert "a.ipynb" in tree(expected) and not list(expected.glob("amortised-*"))
        while kills < num_kills:
            folder = Path(short, str(kills))
            folder.mkdir()
            arguments = (lambda _: time.sleep(moments.uniform(0, seconds)), moments)
            start = partial(begin, folder)
            lost = killed_until_done(other_workers, start, *arguments, num_kills - kills)
            found = tree(folder).items()  # the name of the lock tells the folder
            assert {n.replace(f"-{folder.name}-", "-whole-"): c for n, c in found} == tree(expected)
            assert {path.name for path in folder.iterdir()} == {"a.ipynb", "cache"}
            kills, KILLS["chapters"] = kills + lost, KILLS["chapters"] + lost


def test_killed_before_each_of_its_files_has_its_name(workers, whole, folder):
    for call, name in (
        ("replace", "training-checkpoint.stage"),
        ("replace", "training-checkpoint.stage.previous"),
        ("replace", "decoder.safetensors"),
        ("replace", "encoder.safetensors"),
        ("replace", "training.json"),
        ("unlink", "training-checkpoint.stage"),
        ("replace", "proposal-checkpoint.stage"),
        ("replace", "posthoc_importance-000.stage"),
        ("replace", "importance-000.stage"),
        ("replace", "annealing-000.stage"),
        ("replace", "bounds-000.stage"),
        ("replace", "per_image.stage"),
        ("replace", "result.json"),
    ):
        ended = workers(folder, before=KILLED.format(call=call, name=name))
        assert ended.code == -signal.SIGKILL, name
        assert not (folder / "result.json").exists()
    assert workers(folder).code == 0
    assert steps_of(folder) <= NUM_STEPS + 2 * INTERVAL
    assert_same(folder, whole()[0])


# --- stopped -------------------------------------------------------------------------------------


def test_stopped_by_time_until_it_is_done(workers, whole, folder):
    progress = []
    for attempt in range(1, 30):
        ended = workers(folder, f"--max-minutes={0.004 * attempt}", seconds=0.01)
        if ended.code == 0:
            break
        assert ended.code == runs.EXIT_OUT_OF_TIME, ended
        assert "the same command goes on from here" in ended.err.splitlines()[-1]
        progress.append(steps_of(folder))
    assert len(progress) >= 2 and progress == sorted(progress)
    assert steps_of(folder) == NUM_STEPS  # it stops at a checkpoint: no step is made twice
    assert_same(folder, whole()[0])
    record = runs.read_json(folder / "result.json")
    assert record["details"]["cpu_seconds"] is None  # unknown of the earlier parts
    assert record["provenance"]["wall_seconds"] > 0.01 * NUM_STEPS


def test_stopped_from_the_keyboard(workers, folder):
    log = workers.start(folder, seconds=0.05)
    wait_for(lambda: log.exists() and log.stat().st_size > 4)
    ended = workers.kill(signal.SIGINT)
    assert ended.code == 130 and "Traceback" not in ended.err
    assert ended.err.endswith("stopped; the same command goes on from here\n")


@pytest.mark.parametrize("hours", [-10, 10])
def test_a_clock_that_is_set_during_a_run_loses_nothing_and_enters_no_duration(
    tmp_path, monkeypatch, hours
):
    folder, real, calls = Root(tmp_path).write().prepared(), time.time, []

    def clock() -> float:
        calls.append(None)
        return real() + 3600.0 * hours * len(calls)

    monkeypatch.setattr(time, "time", clock)
    started = time.monotonic()
    assert runs.execute(folder)["status"] == "done" and calls
    record = runs.read_json(folder / "result.json")
    seconds = record["details"]["seconds"].values()
    assert 0 < sum(seconds) <= record["provenance"]["wall_seconds"] < time.monotonic() - started


def test_a_request_to_terminate_ends_a_command_as_the_keyboard_does(tmp_path):
    """The real command, and so early or late that it may be anywhere."""
    folder = Root(tmp_path).write({"small/common/epochs": 10_000}).prepared()
    command = [sys.executable, "-m", "amortised.runs", str(folder), "--threads=1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: (folder / "training-checkpoint.stage").exists() or process.poll())
        process.terminate()
        error = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in error
    assert error.endswith("stopped; the same command goes on from here\n")
    kept = {path.name for path in folder.iterdir()} - {
        ".lock",
        "training-checkpoint.stage.previous",
    }
    assert kept == {"run.json", "training-checkpoint.stage"}


def test_after_the_training_each_call_does_a_stage_though_there_is_no_time(workers, whole, folder):
    assert workers(folder, "--training-only").code == 0
    assert not (folder / "result.json").exists() and (folder / "training.json").exists()
    stages = set()
    while (ended := workers(folder, "--max-minutes=1e-9")).code != 0:
        assert ended.code == runs.EXIT_OUT_OF_TIME, ended
        before, stages = stages, {path.name for path in folder.glob("*.stage")}
        assert len(stages) > len(before) or "proposal" in ended.err
    assert steps_of(folder) == NUM_STEPS
    assert_same(folder, whole()[0])


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


# --- two at once ---------------------------------------------------------------------------------


def test_a_second_process_is_refused_while_the_first_is_at_work(workers, folder, capsys):
    log = workers.start(folder, seconds=0.02)
    wait_for(lambda: log.exists() and log.stat().st_size > 2)
    steps = log.stat().st_size
    assert runs.main([str(folder)]) == runs.EXIT_USAGE
    error = capsys.readouterr().err
    assert f"another process is at work in {folder}" in error and error.count("\n") == 1
    wait_for(lambda: log.stat().st_size > steps)  # the first one is not disturbed
    assert workers.kill().code == -signal.SIGKILL
    assert runs.main([str(folder), "--max-minutes=1e-9"]) == runs.EXIT_OUT_OF_TIME


# --- a full disk, damaged files ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["training-checkpoint.stage", "encoder.safetensors", "per_image.stage", "result.json"]
)
def test_a_full_disk_stops_the_run_and_loses_nothing(workers, whole, folder, name):
    ended = workers(folder, before=FULL_DISK.format(name=name))
    assert ended.code == runs.EXIT_USAGE and "Traceback" not in ended.err
    assert "File too large" in ended.err.splitlines()[-1]
    assert not list(folder.glob(".*.tmp"))
    assert workers(folder).code == 0
    assert_same(folder, whole()[0])


@pytest.mark.parametrize("cut", [0, 1000])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(workers, whole, folder, cut):
    killed = KILLED.format(call="replace", name="decoder.safetensors")
    assert workers(folder, before=killed).code == -signal.SIGKILL
    damage(folder / "training-checkpoint.stage", cut)
    ended = workers(folder)
    assert ended.code == 0 and steps_of(folder) == NUM_STEPS + INTERVAL
    said = r"training-checkpoint\.stage is damaged .*; going on from the one before it"
    assert re.search(said, ended.err)
    assert_same(folder, whole()[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("annealing-000.stage", r"annealing-000\.stage is damaged .*; remove it to start afresh"),
        ("training.json", r"training\.json is damaged .*; remove it to start afresh"),
        ("decoder.safetensors", r"decoder\.safetensors is damaged or not of this project"),
    ],
)
def test_a_damaged_stage_is_refused_by_name(whole, tmp_path, capsys, name, message):
    folder = tmp_path / whole()[0].name
    shutil.copytree(whole()[0], folder)
    for path in (folder / "result.json", folder / "per_image.stage"):
        path.unlink()
    damage(folder / name, cut=100)
    assert runs.main([str(folder)]) == runs.EXIT_USAGE
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


# --- divergence ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("hot", r"step 2: loss 'loss' is nan \(last good checkpoint: .*/training-checkpoint\..*\)"),
        ("wild", r"step 1: the chain's positions are not finite.* \(there is no checkpoint yet\)"),
    ],
)
def test_a_run_that_diverges_has_failed_with_the_reason(tmp_path, capsys, row, reason):
    folder = Root(tmp_path).write().prepared(row=row)
    for _ in range(2):  # the second time it says so again
        assert runs.main([str(folder)]) == 0
        assert re.fullmatch(rf"{folder}: failed: {reason}\n", capsys.readouterr().out)
    record = runs.read_json(folder / "result.json")
    assert record["status"] == "failed" and re.fullmatch(reason, record["reason"])
    assert record["metrics"] == {} and record["provenance"]["versions"]
    results.check_result(record)
    assert not list(folder.glob("*.safetensors"))


# --- bad commands --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device=gpu"], "device 'gpu': must be a device of this machine: 'cpu'"),
        (["--device=cuda:99"], "device 'cuda:99': must be a device of this machine: 'cpu'"),
        (["--max-minutes=0"], "--max-minutes 0.0: must be greater than 0"),
        (["--max-minutes=nan"], "--max-minutes nan: must be greater than 0"),
        (["--threads=0"], "--threads 0: must be greater than 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_any_work(folder, capsys, options, message):
    assert runs.main([str(folder), *options]) == runs.EXIT_USAGE
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_a_folder_that_is_no_run_or_whose_weights_are_not_there(tmp_path, capsys):
    assert runs.main([str(tmp_path)]) == runs.EXIT_USAGE
    assert f"{tmp_path} holds no run.json" in capsys.readouterr().err
    root = Root(tmp_path).write()
    folder, needed = root.prepared(study="filled"), root.run()
    assert runs.main([str(folder)]) == runs.EXIT_USAGE
    error = capsys.readouterr().err
    assert f"builds on {needed}, which is not trained; first run" in error
    assert f"python -m amortised.runs {needed} --training-only" in error
