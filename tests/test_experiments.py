"""The engine: a file of studies that is right, and runs that survive whatever happens to them.

Runs that are killed, stopped or short of disk are real processes. They are forked from one server,
which has imported torch and read MNIST once, and which has none of the packages of the book: what
the engine imports is tested all along.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file

from amortised import data, experiments, recipes, results
from amortised.experiments import (
    ExperimentError,
    Places,
    load_studies,
    main,
    run_experiment,
    select,
    state_of,
    train_together,
)
from amortised.training import read_checkpoint

OPTIONS = {
    "training_images": 100,
    "epochs": 8,
    "batch_size": 20,
    "learning_rate": 0.001,
    "game_learning_rate": 0.001,
    "num_student_samples": 1,
    "method": "vae",
    "encoder": "gaussian",
    "kernel": "none",
    "rule": "none",
    "num_steps": 0,
    "step_size": 0.0,
    "num_leapfrog_steps": 1,
    "num_critic_steps": 1,
    "chain_dtype": "float32",
    "images": 4,
    "num_samples": 5,
    "proposal_epochs": 1,
    "num_chains": 2,
    "pilot_chains": 1,
    "num_temperatures": 3,
    "num_leapfrog": 1,
    "simulated_pairs": 3,
    "evaluation_dtype": "float32",
}
NUM_STEPS, INTERVAL = 40, 2  # of the training; a checkpoint is made at each twentieth of it

TINY = {
    "studies": {
        "amc_table1": {
            "title": "a tiny study",
            "recipe": "amc",
            "recipe_version": 1,
            "seeds": [0, 1, 2],
            "common": OPTIONS,
            "scales": {"laptop": {}, "full": {"epochs": 9}},
            "rows": {
                "vae": {"keep": ["decoder", "encoder"]},
                "hot": {
                    "learning_rate": 1e6,
                    "epochs": 1,
                    "keep": ["decoder"],
                    "scales": ["laptop"],
                },
                "wild": {
                    "method": "mcmc_vi",
                    "kernel": "langevin",
                    "num_steps": 5,
                    "step_size": 1e9,
                    "seeds": [0],
                    "scales": ["laptop"],
                },
            },
        },
        "amc_imputation": {
            "title": "a tiny study of imputation",
            "recipe": "imputation",
            "recipe_version": 1,
            "seeds": [0, 1],
            "common": {
                "trained_study": "amc_table1",
                "step_size": 0.1,
                "num_leapfrog": 1,
                "images": 2,
                "num_chains": 1,
                "iterations": 1,
                "num_temperatures": 2,
                "reference_steps": 1,
            },
            "scales": {"laptop": {}},
            "rows": {"vae": {"trained": "vae"}},
        },
    }
}


pytestmark = pytest.mark.usefixtures("mnist_is_read_once")


def changed(changes: dict | None = None, studies: dict = TINY) -> dict:
    """The tiny studies, with values replaced by path (None removes one)."""
    studies = copy.deepcopy(studies)
    for path, value in (changes or {}).items():
        *folders, last = path.split("/")
        block = studies["studies"]
        for folder in folders:
            block = block[folder]
        if value is None:
            del block[last]
        else:
            block[last] = value
    return studies


class Root(NamedTuple):
    """A folder with a file of studies, results, weights and checkpoints."""

    folder: Path

    @property
    def places(self) -> Places:
        return Places.below(self.folder)

    def write(self, changes: dict | None = None) -> Root:
        (self.folder / "studies.yaml").write_text(yaml.safe_dump(changed(changes), sort_keys=False))
        return self

    def arguments(self, *command: str) -> list[str]:
        file = self.folder / "studies.yaml"
        return ["--file", str(file), "--root", str(self.folder), *map(str, command)]

    def experiment(self, study="amc_table1", row="vae", scale="laptop", seed=0):
        studies = load_studies(self.folder / "studies.yaml")
        return select(studies, study, row, scale=scale, seed=seed)[0]

    def state(self, **names) -> experiments.State:
        return state_of(self.experiment(**names), self.places)

    def work(self, **names) -> Path:
        return self.places.work(self.experiment(**names))

    def result(self, **names) -> results.Result:
        return results.load_result(self.places.result(self.experiment(**names)))


@pytest.fixture
def root(tmp_path) -> Root:
    return Root(tmp_path).write()


def copy_of(other: Root, folder: Path, changes: dict | None = None) -> Root:
    shutil.copytree(other.folder, folder, dirs_exist_ok=True)
    return Root(folder).write(changes)


STUDY, ROW = "amc_table1", "amc_table1/rows/vae"
RUN = ("run", "amc_table1", "vae", "--seed=0")


# --- real processes ------------------------------------------------------------------------------

NOT_NEEDED = ("matplotlib", "pooch", "scipy", "jupyter", "pandas", "IPython", "nbformat")

SERVER = textwrap.dedent(
    """
    import json, os, signal, sys, traceback
    from functools import cache

    for name in json.loads(sys.argv[1]):
        sys.modules[name] = None  # an import of it is an ImportError

    import torch
    from amortised import amc, data, experiments, recipes, results, training

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
                code = experiments.main(request["arguments"])
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
import time
real_step = amc.vae_step
log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def counted(*arguments, **settings):
    os.write(log, b".")
    time.sleep({seconds})
    return real_step(*arguments, **settings)
amc.vae_step = counted
"""  # to be run in a worker: notes each step in a file, and can make it slower

KILLED_AT = """
steps = 0
real_step = amc.vae_step
def killed(*arguments, **settings):
    global steps
    steps += 1
    if steps == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real_step(*arguments, **settings)
amc.vae_step = killed
"""

KILLED_IN = """
def killing(real):
    def call(*arguments, **settings):
        if any(str(argument).endswith({target!r}) for argument in arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **settings)
    return call
{place} = killing({place})
"""  # at the call that has a path with this end

FULL_DISK = """
import resource
def full(real, limit):
    def write(*arguments, **settings):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            return real(*arguments, **settings)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return write
{place} = full({place}, {limit})
"""  # no file can grow beyond the limit while the function writes


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Workers:
    """Starts workers, one after the other, and tells how they ended."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER, json.dumps(NOT_NEEDED)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self.server.stdout.readline() == "ready\n"
        self.is_busy = False

    def start(self, arguments: list[str], before: str = "") -> int:
        """Number of the process."""
        request = {"arguments": arguments, "before": before}
        request |= {name: str(self.folder / name) for name in ("out", "err")}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        self.process = int(self.server.stdout.readline())
        self.is_busy = True
        return self.process

    def wait(self) -> Ended:
        code = int(self.server.stdout.readline())
        self.is_busy = False
        return Ended(code, *((self.folder / name).read_text() for name in ("out", "err")))

    def kill(self, number: int = signal.SIGKILL) -> Ended:
        with contextlib.suppress(ProcessLookupError):  # it may just have ended
            os.kill(self.process, number)
        return self.wait()

    def __call__(self, arguments: list[str], before: str = "") -> Ended:
        self.start(arguments, before)
        return self.wait()

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Workers(tmp_path_factory.mktemp("workers"))
    yield server
    server.close()


@pytest.fixture
def workers(server):
    """The server, free again after each test."""
    yield server
    if server.is_busy:
        server.kill()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory) -> Root:
    """A run that was left alone; to be copied, not changed."""
    root = Root(tmp_path_factory.mktemp("whole")).write()
    log = str(root.folder / "steps")
    started = time.monotonic()
    ended = server(root.arguments(*RUN), COUNTED.format(log=log, seconds=0))
    assert ended.code == 0, ended
    (root.folder / "seconds").write_text(str(time.monotonic() - started))
    assert (root.folder / "steps").stat().st_size == NUM_STEPS
    return root


@pytest.fixture(scope="module")
def partial(server, tmp_path_factory) -> Root:
    """A run that was killed in its 16th step of 40; to be copied, not changed."""
    root = Root(tmp_path_factory.mktemp("partial")).write()
    assert server(root.arguments(*RUN), KILLED_AT.format(step=16)).code == -signal.SIGKILL
    assert read_checkpoint(root.work() / "training.checkpoint")["done"] == 14
    return root


def assert_same_result(root: Root, whole: Root) -> None:
    """To the bit: values per image, weights, losses; and nothing is left lying about."""
    assert root.state().word == "done"
    found, expected = root.result(), whole.result()
    assert found.per_image.keys() == expected.per_image.keys()
    for name, values in found.per_image.items():
        assert torch.equal(values, expected.per_image[name]), name
    assert found.record["per_image_sha256"] == expected.record["per_image_sha256"]
    assert found.record["metrics"] == expected.record["metrics"]
    assert found.record["details"]["history"] == expected.record["details"]["history"]
    for role in ("decoder", "encoder"):
        for places in ("weights", "kept_weights"):
            path, other = (getattr(r.places, places)(r.experiment(), role) for r in (root, whole))
            weights, expected_weights = load_file(path), load_file(other)
            assert weights.keys() == expected_weights.keys()
            assert all(torch.equal(weights[name], w) for name, w in expected_weights.items())
    weights = {"decoder.safetensors", "encoder.safetensors"}
    for folder, names in (
        (root.work(), weights),
        (root.places.models / STUDY, {f"vae-laptop-seed0-{name}" for name in weights}),
        (root.places.results / STUDY, {f"vae-laptop-seed0.{s}" for s in ("json", "safetensors")}),
    ):
        assert {path.name for path in folder.iterdir()} == names


# --- the file of studies -------------------------------------------------------------------------


def test_the_committed_file_is_right():
    studies = load_studies()
    assert {"amc_table1", "amc_imputation", "vae_recap"} <= studies.keys()
    for study in studies.values():
        assert study.title and study.rows
        for row in study.rows:
            for scale in {e.scale for e in study.experiments if e.row == row}:
                seeds = [e.seed for e in study.experiments if (e.row, e.scale) == (row, scale)]
                assert len(seeds) >= 3 or (scale == "full" and seeds == [0]), (row, scale)
    table = [e for e in studies["amc_table1"].experiments if e.scale == "laptop"]
    assert len({e.row for e in table}) == 10 and len(table) == 30
    for experiment in studies["amc_imputation"].experiments:
        trained = experiment.needs
        assert (trained.study, trained.row) == ("amc_table1", experiment.config["trained"])
        assert (trained.scale, trained.seed) == (experiment.scale, experiment.seed)
    # A row is named after its encoder, chain length and method.
    for e in studies["amc_table1"].experiments:
        assert e.row.startswith(e.config["method"])
        steps = re.search(r"_t(\d+)", e.row)
        if steps and "hmc" not in e.row:
            assert e.config["num_steps"] == int(steps[1])
        if e.config["encoder"] in ("cnn_g", "cnn_b"):
            assert e.config["encoder"] in e.row


def fault_of(studies: dict, tmp_path: Path) -> str:
    path = tmp_path / "studies.yaml"
    text = studies if isinstance(studies, str) else yaml.safe_dump(studies, sort_keys=False)
    path.write_text(text)
    with pytest.raises(ExperimentError) as error:
        load_studies(path)
    assert str(path) in str(error.value)
    return str(error.value)


METHODS = "'vae', 'mcmc_vi', 'amc', 'avb', 'persistent'"


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        # structure
        ({f"{STUDY}/rwos": {}}, ["studies.amc_table1: must have the keys common, recipe", "rwos"]),
        ({f"{STUDY}/seeds": None}, ["must have the keys common, recipe, recipe_version, rows"]),
        ({STUDY: ["vae"]}, ["studies.amc_table1: must have the keys", "got ['vae']"]),
        ({STUDY: {1: 2}}, ["studies.amc_table1: must have the keys", "got 1"]),
        ({f"{STUDY}/rows": ["vae"]}, ["studies.amc_table1.rows: must be a mapping; got ['vae']"]),
        ({f"{STUDY}/common": 3}, ["studies.amc_table1.common: must be a mapping; got 3"]),
        ({f"{STUDY}/scales/full": 3}, ["amc_table1.scales.full: must be a mapping; got 3"]),
        ({ROW: 0.1}, ["studies.amc_table1.rows.vae: must be a mapping of options; got 0.1"]),
        ({f"{STUDY}/rows/VAE-2": {}}, ["rows.VAE-2: row = 'VAE-2' must consist of lower-case"]),
        ({f"{STUDY}/rows/5": {}}, []),  # a text that reads like a number is a name
        ({"Study 1": TINY["studies"][STUDY]}, ["study = 'Study 1' must consist of lower-case"]),
        # names
        ({f"{STUDY}/recipe": "gan"}, [".recipe: must be one of amc, vae, imputation; got gan"]),
        ({f"{STUDY}/recipe": ["amc"]}, [".recipe: must be one of amc, vae, imputation; got"]),
        ({f"{STUDY}/recipe_version": 0}, ["recipe_version: must be an integer, at least 1; got 0"]),
        ({f"{STUDY}/scales/huge": {}}, ["scales: must be of laptop, full; got huge"]),
        ({f"{ROW}/scales": ["huge"]}, ["rows.vae.scales: must be", "laptop, full; got ['huge']"]),
        ({f"{ROW}/scales": "full"}, ["rows.vae.scales: must be a list", "got 'full'"]),
        ({f"{ROW}/keep": ["decodre"]}, ["rows.vae.keep: must be a list of decoder, encoder; got"]),
        ({f"{ROW}/keep": "decoder"}, ["keep: must be a list of decoder, encoder; got 'decoder'"]),
        # seeds
        ({f"{STUDY}/seeds": []}, ["seeds must be a list of integers from 0; got []"]),
        ({f"{STUDY}/seeds": 3}, ["seeds must be a list of integers from 0; got 3"]),
        ({f"{ROW}/seeds": [0, -1]}, ["rows.vae: seeds must be a list of integers from 0; got"]),
        ({f"{ROW}/seeds": [0, 1.0]}, ["seeds must be a list of integers from 0; got [0, 1.0]"]),
        ({f"{ROW}/seeds": [0, "1"]}, ["seeds must be a list of integers from 0; got [0, '1']"]),
        ({f"{ROW}/seeds": [0, 1, 0]}, ["seeds must differ; got [0, 1, 0]"]),
        # options
        ({f"{ROW}/epcohs": 3}, ["option 'epcohs' is unknown. Options: training_images, epochs,"]),
        (
            {f"{STUDY}/common/epochs": None},
            ["option 'epochs' is missing at scale laptop"],
        ),
        ({f"{ROW}/method": "avi"}, [f"rows.vae: method = 'avi' must be one of {METHODS}"]),
        ({f"{ROW}/encoder": "cnn"}, ["one of 'none', 'gaussian', 'cnn_g', 'cnn_b'"]),
        ({f"{ROW}/kernel": None, f"{STUDY}/common/kernel": "ula"}, ["'langevin', 'mala', 'hmc'"]),
        ({f"{ROW}/rule": "kl"}, ["'none', 'gan', 'wasserstein', 'mmd', 'inclusive_kl'"]),
        ({f"{ROW}/chain_dtype": "half"}, ["one of 'float32', 'bfloat16', 'float16'"]),
        ({f"{ROW}/epochs": 0}, ["rows.vae: epochs = 0 must be an integer, at least 1"]),
        ({f"{ROW}/epochs": 2.0}, ["epochs = 2.0 must be an integer, at least 1"]),
        ({f"{ROW}/epochs": True}, ["epochs = True must be an integer, at least 1"]),
        ({f"{ROW}/images": 1}, ["images = 1 must be an integer, at least 2 and at most 10000"]),
        ({f"{ROW}/images": 10001}, ["images = 10001 must be an integer, at least 2 and at most"]),
        ({f"{ROW}/training_images": 60001}, ["must be an integer, at least 1 and at most 60000"]),
        ({f"{ROW}/learning_rate": 0}, ["learning_rate = 0 must be a number greater than 0"]),
        ({f"{ROW}/learning_rate": float("nan")}, ["learning_rate = nan must be a number greater"]),
        ({f"{ROW}/learning_rate": "1e-3"}, ["this is text: in YAML write a decimal point"]),
        ({f"{ROW}/step_size": -0.1}, ["step_size = -0.1 must be a number, at least 0"]),
        # options that are right one by one
        ({f"{ROW}/encoder": "none"}, ["encoder = 'none' does not go with method = 'vae'"]),
        ({f"{ROW}/encoder": "cnn_g"}, ["encoder = 'cnn_g' has no density", "method = 'vae'"]),
        ({f"{STUDY}/rows/wild/encoder": "cnn_b"}, ["encoder = 'cnn_b' has no density"]),
        ({f"{ROW}/method": "persistent"}, ["'gaussian' does not go with method = 'persistent'"]),
        ({f"{ROW}/num_steps": 5}, ["method = 'vae' has no chain", "num_steps = 5"]),
        ({f"{ROW}/kernel": "hmc"}, ["method = 'vae' has no chain; got kernel = 'hmc'"]),
        ({f"{STUDY}/rows/wild/kernel": "none"}, ["method = 'mcmc_vi' has a chain; got kernel"]),
        ({f"{STUDY}/rows/wild/num_steps": 0}, ["'mcmc_vi' has a chain", "num_steps = 0"]),
        ({f"{STUDY}/rows/wild/step_size": 0.0}, ["'mcmc_vi' does not go with step_size = 0.0"]),
        ({f"{STUDY}/rows/wild/method": "amc"}, ["rule = 'none' does not go with method = 'amc'"]),
        ({f"{STUDY}/rows/wild/rule": "gan"}, ["rule = 'gan' does not go with method = 'mcmc_vi'"]),
        (
            {f"{STUDY}/rows/wild/method": "amc", f"{STUDY}/rows/wild/rule": "mmd"},
            ["rule = 'mmd' needs num_student_samples of at least 8; got 1"],
        ),
        (
            {
                f"{STUDY}/rows/wild/method": "amc",
                f"{STUDY}/rows/wild/rule": "inclusive_kl",
                f"{STUDY}/rows/wild/encoder": "cnn_g",
            },
            ["encoder = 'cnn_g' has no density"],
        ),
        # a row that builds on another
        (
            {"amc_imputation/rows/vae/trained": "amc_cnn_g_t50"},
            ["amc_imputation/vae-laptop-seed0: there is no run", "Rows of amc_table1: vae, hot"],
        ),
        ({f"{ROW}/seeds": [0]}, ["vae-laptop-seed1: there is no run amc_table1/vae-laptop-seed1"]),
        (
            {STUDY: None},
            ["no run amc_table1/vae-laptop-seed0", "Rows of amc_table1: none"],
        ),
        ({"amc_imputation/rows/vae/trained": "vea"}, ["trained = 'vea' must be one of 'vae'"]),
    ],
)
def test_each_fault_of_a_file_is_named_with_the_choices(tmp_path, changes, messages):
    removals = {path: value for path, value in changes.items() if value is None}
    changes = {path: value for path, value in changes.items() if path not in removals}
    studies = changed(changes)
    for path in removals:
        with contextlib.suppress(KeyError):
            studies = changed({path: None}, studies)
    if not messages:
        (tmp_path / "studies.yaml").write_text(yaml.safe_dump(studies, sort_keys=False))
        assert "5" in load_studies(tmp_path / "studies.yaml")[STUDY].rows
        return
    found = fault_of(studies, tmp_path)
    for message in messages:
        assert message in found


def test_all_faults_are_named_at_once_and_each_once(tmp_path):
    changes = {f"{ROW}/epochs": 0, f"{ROW}/epcohs": 3, f"{STUDY}/rows/hot/encoder": "cnn_g"}
    found = fault_of(changed(changes), tmp_path)
    assert found.count("\n") == 3  # though the row is there at two scales
    assert "epochs = 0" in found and "'epcohs'" in found and "no density" in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("studies: {amc: [}", "is not YAML"),
        ("studies:\n\t- tab", "is not YAML"),
        ("studies: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("", "must hold one key, 'studies'"),
        ("- studies", "must hold one key, 'studies'"),
        ("studies: {}\nrows: {}", "must hold one key, 'studies'"),
        ("studies: [amc_table1]", "studies must be a mapping; got ['amc_table1']"),
        ("studies:", "studies must be a mapping; got None"),
        ("studies:\n  a:\n    rows: {b: 1,\n      b: 2}", "line 4: 'b' is there already"),
    ],
)
def test_a_file_that_is_none(tmp_path, text, message):
    assert message in fault_of(text, tmp_path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ExperimentError, match=r"there is no file of studies .*nowhere\.yaml"):
        load_studies(tmp_path / "nowhere.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"studies: \xff\xfe")
    with pytest.raises(ExperimentError, match="is not YAML"):
        load_studies(tmp_path / "bytes.yaml")


def test_a_study_that_is_added_needs_no_code(root):
    """Options of the row come before those of its scale, and these before the common ones."""
    studies = load_studies(root.write({f"{ROW}/images": 7}).folder / "studies.yaml")
    laptop, full = (select(studies, STUDY, "vae", scale=s, seed=0)[0] for s in ("laptop", "full"))
    assert laptop.config == OPTIONS | {"images": 7}
    assert full.config == OPTIONS | {"images": 7, "epochs": 9}
    assert laptop.keep == ("decoder", "encoder") and laptop.needs is None
    studies = load_studies(root.write({f"{ROW}/epochs": 3}).folder / "studies.yaml")
    assert {e.config["epochs"] for e in select(studies, STUDY, "vae")} == {3}
    trained = select(studies, "amc_imputation", seed=1)[0].needs
    assert trained == select(studies, STUDY, "vae", scale="laptop", seed=1)[0]


# --- what is asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "names", "message"),
    [
        (["amc"], {}, "unknown study 'amc'; studies: amc_table1, amc_imputation"),
        ([STUDY, "vea"], {}, "unknown row 'vea' of amc_table1; rows: vae, hot, wild"),
        ([None, "vea"], {}, "unknown row 'vea'; rows: vae, hot, wild, vae"),
        ([STUDY], {"scale": "huge"}, "unknown scale 'huge'; scales: laptop, full"),
        ([STUDY], {"seed": 7}, "there is no run with seed 7; seeds: 0, 1, 2"),
        ([STUDY, "wild"], {"seed": 1}, "there is no run with seed 1; seeds: 0"),
        ([STUDY, "hot"], {"scale": "full"}, "hot has no runs at scale full"),
        ([STUDY, "hot"], {"scale": "full", "seed": 0}, "(hot has no runs at scale full)"),
        (["amc_imputation"], {"scale": "full"}, "amc_imputation has no runs at scale full"),
    ],
)
def test_what_there_is_not_cannot_be_selected(root, arguments, names, message):
    with pytest.raises(ExperimentError) as error:
        select(load_studies(root.folder / "studies.yaml"), *arguments, **names)
    assert message in str(error.value)


def test_runs_come_seed_by_seed_and_in_the_order_of_the_file(root):
    studies = load_studies(root.folder / "studies.yaml")
    names = [experiment.name.split("/")[1] for experiment in select(studies, STUDY)]
    assert names == [
        "vae-laptop-seed0",
        "hot-laptop-seed0",
        "wild-laptop-seed0",
        "vae-laptop-seed1",
        "hot-laptop-seed1",
        "vae-laptop-seed2",
        "hot-laptop-seed2",
        "vae-full-seed0",
        "vae-full-seed1",
        "vae-full-seed2",
    ]
    everything = select(studies)
    assert [e.study for e in everything] == [STUDY] * 10 + ["amc_imputation"] * 2
    assert [e.name for e in select(studies, seed=1, scale="laptop")] == [
        "amc_table1/vae-laptop-seed1",
        "amc_table1/hot-laptop-seed1",
        "amc_imputation/vae-laptop-seed1",
    ]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["list", "amc"], "unknown study 'amc'; studies: amc_table1, amc_imputation"),
        (["list", STUDY, "vea"], "unknown row 'vea' of amc_table1; rows: vae, hot, wild"),
        (["run", "amc"], "unknown study 'amc'"),
        (["run", STUDY, "vea"], "unknown row 'vea'"),
        ([*RUN, "--scale=huge"], "unknown scale 'huge'; scales: laptop, full"),
        ([*RUN[:3], "--seed=7"], "there is no run with seed 7; seeds: 0, 1, 2"),
        ([*RUN, "--device=gpu"], "device 'gpu': must be a device of this machine: 'cpu'"),
        ([*RUN, "--device=cuda:99"], "device 'cuda:99': must be a device of this machine: 'cpu'"),
        ([*RUN, "--max-minutes=0"], "--max-minutes 0.0: must be greater than 0"),
        ([*RUN, "--max-minutes=nan"], "--max-minutes nan: must be greater than 0"),
        ([*RUN, "--threads=0"], "--threads 0: must be at least 1"),
    ],
)
def test_the_command_line_refuses_in_one_line_before_any_work(root, capsys, command, message):
    assert main(root.arguments(*command)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in root.folder.iterdir()] == ["studies.yaml"]


@pytest.mark.parametrize("command", [["run"], ["runn"], [*RUN, "--seed=x"], [*RUN, "--epochs=3"]])
def test_the_command_line_shows_its_usage(root, capsys, command):
    with pytest.raises(SystemExit) as error:
        main(root.arguments(*command))
    assert error.value.code == 2 and "usage:" in capsys.readouterr().err


def test_a_bad_file_is_refused_on_the_command_line(root, capsys):
    root.write({f"{ROW}/epochs": 0})
    assert main(root.arguments("list")) == 2
    assert "rows.vae: epochs = 0 must be an integer, at least 1" in capsys.readouterr().err


# --- where runs stand ----------------------------------------------------------------------------


def test_list_shows_where_each_run_stands_and_what_it_cost(whole, partial, tmp_path, capsys):
    root = copy_of(whole, tmp_path)  # vae, seed 0: done
    partial_work, work = partial.work(seed=0), root.work(seed=1)
    shutil.copytree(partial_work, work)
    record, per_image = root.result()
    old = record["config"] | {"epochs": 1}
    record = record | {"seed": 2, "config": old, "config_hash": results.config_hash(old)}
    results.save_result(root.places.results, record, per_image)
    assert run_experiment(root.experiment(row="hot"), places=root.places).word == "failed"
    damaged = root.places.result(root.experiment(row="hot", seed=1))
    damaged.write_text("{")

    assert main(root.arguments("list", STUDY, "--scale=laptop")) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    shown = {line.split()[0].split("/")[1]: line.split(maxsplit=1)[1] for line in lines}
    cost = rf"{record['provenance']['wall_seconds'] / 60:.1f} min on .+, 1 thread\(s\)"
    assert re.fullmatch(rf"done +{cost}", shown["vae-laptop-seed0"])
    assert re.fullmatch("partial", shown["vae-laptop-seed1"])
    assert re.fullmatch(rf"stale +{cost}", shown["vae-laptop-seed2"])
    assert re.fullmatch(r"failed +0\.\d min on .*: step 2: loss .*", shown["hot-laptop-seed0"])
    assert re.fullmatch(r"stale +.*hot-laptop-seed1\.json is not JSON.*", shown["hot-laptop-seed1"])
    assert shown["hot-laptop-seed2"] == shown["wild-laptop-seed0"] == "missing"
    assert last == "1 done, 1 failed, 2 missing, 1 partial, 2 stale"
    assert len(lines) == 7

    assert main(root.arguments("list", STUDY, "vae", "--seed=0")) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 done, 1 missing"


def test_the_engine_needs_none_of_the_packages_of_the_book(workers):
    """The server has none, so that all other runs of these tests show it too."""
    check = f"assert all(sys.modules[name] is None for name in {NOT_NEEDED})"
    ended = workers(["list"], check)
    assert ended.code == 0, ended.err
    assert "amc_table1/vae-laptop-seed0" in ended.out and "vae_recap/dreg_50-full" in ended.out


def test_a_finished_run_is_not_made_again_unless_asked(whole, tmp_path, workers):
    root, log = copy_of(whole, tmp_path), tmp_path / "log"
    path = root.places.result(root.experiment())
    before = path.read_bytes()
    count = COUNTED.format(log=str(log), seconds=0)
    ended = workers(root.arguments(*RUN), count)
    assert ended.code == 0 and "amc_table1/vae-laptop-seed0: done, " in ended.out
    assert log.stat().st_size == 0 and path.read_bytes() == before
    ended = workers(root.arguments(*RUN, "--again"), count)
    assert ended.code == 0 and "done, running" in ended.out
    assert log.stat().st_size == NUM_STEPS
    assert path.read_bytes() != before  # another time of day, if nothing else
    assert_same_result(root, whole)


def test_the_result_says_where_it_comes_from(whole):
    record, per_image = whole.result()
    assert record["config"] == OPTIONS and record["recipe_version"] == 1
    facts = record["provenance"]
    assert facts["device"]["type"] == "cpu" and facts["device"]["threads"] == 1
    assert facts["data_sha256"] == data.digests("mnist") and facts["wall_seconds"] > 0
    assert facts["versions"]["torch"] == str(torch.__version__)
    assert record["details"]["steps"] == NUM_STEPS and record["details"]["cpu_seconds"] > 0
    assert {len(values) for values in per_image.values()} == {4, 3}
    kept = whole.places.kept_weights(whole.experiment(), "decoder")
    assert kept.read_bytes() == whole.places.weights(whole.experiment(), "decoder").read_bytes()


# --- stale results -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{f"{ROW}/epochs": 1}, {f"{STUDY}/recipe_version": 2}],
    ids=["option", "recipe_version"],
)
def test_a_result_of_other_options_is_stale_and_made_anew(whole, tmp_path, capsys, changes):
    root = copy_of(whole, tmp_path, changes)
    before = whole.result()
    assert root.state().word == "stale"
    assert root.state(row="hot").word == "missing"
    assert main(root.arguments(*RUN)) == 0
    assert "amc_table1/vae-laptop-seed0: stale, running" in capsys.readouterr().out
    record, per_image = root.result()
    experiment = root.experiment()
    assert record["config"] == experiment.config
    assert record["recipe_version"] == experiment.recipe_version
    is_other = experiment.config != before.record["config"]
    assert torch.equal(per_image["is_ll"], before.per_image["is_ll"]) != is_other
    assert root.state().word == "done"
    root.write()
    assert root.state().word == "stale"  # the file went back to what it was


def test_a_longer_chain_of_nothing_but_names_is_not_stale(whole, tmp_path):
    """Titles, the order of options, what is kept, and other rows do not matter."""
    order = dict(reversed(OPTIONS.items()))
    changes = {f"{STUDY}/title": "x", f"{STUDY}/common": order, f"{STUDY}/rows/new": {}}
    root = copy_of(whole, tmp_path, changes | {f"{ROW}/keep": [], f"{ROW}/step_size": 0})
    assert root.state().word == "done"


def test_checkpoints_of_other_options_are_not_gone_on_from(partial, tmp_path, workers):
    root = copy_of(partial, tmp_path)
    old = root.work()
    assert root.state().word == "partial"
    for changes in ({f"{ROW}/learning_rate": 0.01}, {f"{STUDY}/recipe_version": 2}):
        root.write(changes)
        assert root.state().word == "missing" and root.work() != old
        assert workers(root.arguments(*RUN), KILLED_AT.format(step=4)).code == -9
        assert read_checkpoint(root.work() / "training.checkpoint")["done"] == 2
    root.write()
    assert root.state().word == "partial"
    assert read_checkpoint(old / "training.checkpoint")["done"] == 14


def test_an_imputation_builds_on_weights_that_are_there_and_current(whole, tmp_path, capsys):
    root = copy_of(whole, tmp_path)
    impute = ("run", "amc_imputation", "--seed=0")
    assert main(root.arguments(*impute)) == 0
    assert root.state(study="amc_imputation").word == "done"
    before = root.result(study="amc_imputation")

    shutil.rmtree(root.places.checkpoints)  # the kept weights will do
    assert main(root.arguments(*impute, "--again")) == 0
    again = root.result(study="amc_imputation")
    assert all(torch.equal(values, again.per_image[k]) for k, values in before.per_image.items())

    shutil.rmtree(root.places.models)  # the result of the row is there, its weights are not
    capsys.readouterr()
    assert main(root.arguments(*impute, "--again")) == 2
    command = "python -m amortised.experiments run amc_table1 vae --seed 0 --scale laptop"
    assert f"{command} --again" in capsys.readouterr().err
    assert main(root.arguments("run", "amc_imputation", "--seed=1")) == 2
    error = capsys.readouterr().err
    assert "needs the weights of amc_table1/vae-laptop-seed1, which are not here" in error
    assert "vae --seed 1 --scale laptop\n" in error

    root = copy_of(whole, tmp_path, {f"{ROW}/epochs": 1})  # weights of a row that has changed
    assert root.state(study="amc_imputation").word == "stale"
    assert main(root.arguments(*impute)) == 2
    assert f"{command}\n" in capsys.readouterr().err
    root.write()
    assert root.state(study="amc_imputation").word == "done"


# --- stopped -------------------------------------------------------------------------------------


def test_stopped_by_time_until_it_is_done(whole, root, workers):
    log = root.folder / "steps"
    count = COUNTED.format(log=str(log), seconds=0.01)
    stops, progress = 0, []
    for attempt in range(1, 30):
        minutes = 0.004 * attempt
        ended = workers(root.arguments(*RUN, f"--max-minutes={minutes}"), count)
        if ended.code == 0:
            break
        assert ended.code == 3, ended
        assert "the same command goes on from here" in ended.err.splitlines()[-1]
        assert root.state().word == "partial"
        stops += 1
        saved = read_checkpoint(root.work() / "training.checkpoint")
        progress.append(saved["done"])
    assert stops >= 2 and progress == sorted(progress)
    assert log.stat().st_size == NUM_STEPS  # it stops at a checkpoint: no step is made twice
    assert_same_result(root, whole)
    assert root.result().record["details"]["cpu_seconds"] is None  # unknown of the earlier parts
    assert root.result().record["provenance"]["wall_seconds"] > 0.01 * NUM_STEPS


def test_stopped_from_the_keyboard(whole, root, workers):
    log = root.folder / "steps"
    workers.start(root.arguments(*RUN), COUNTED.format(log=str(log), seconds=0.05))
    wait_for(lambda: log.exists() and log.stat().st_size > 4)
    ended = workers.kill(signal.SIGINT)
    assert ended.code == 130 and "Traceback" not in ended.err
    assert ended.err.endswith("stopped; the same command goes on from the last checkpoint\n")
    assert root.state().word == "partial" and not (root.work() / "run.lock").exists()


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def killed_at_random_moments(workers, whole, folder: Path, num_kills: int) -> None:
    moments = random.Random(0)
    seconds = float((whole.folder / "seconds").read_text())
    kills = rounds = 0
    stages = set()
    while kills < num_kills:
        rounds += 1
        assert rounds <= 2 * num_kills, "the runs ended before they could be killed"
        root = Root(folder / str(rounds))
        root.folder.mkdir()
        root.write()
        log, kills_before, code = root.folder / "steps", kills, None
        count = COUNTED.format(log=str(log), seconds=0)
        while code != 0:
            workers.start(root.arguments(*RUN), count)
            if kills < num_kills:
                time.sleep(moments.uniform(0, seconds / 2))
                code = workers.kill().code
                kills += code == -signal.SIGKILL
                stages |= {path.name for path in root.work().glob("*.checkpoint")}
            else:
                code = workers.wait().code
            assert code in (0, -signal.SIGKILL)
        print(f"round {rounds}: {kills - kills_before} kills, {log.stat().st_size} steps")
        # Each kill loses the steps since the last checkpoint, at most one interval.
        lost = log.stat().st_size - NUM_STEPS
        assert 0 <= lost <= INTERVAL * (kills - kills_before)
        assert_same_result(root, whole)
    assert kills == num_kills and "training.checkpoint" in stages


def test_killed_at_three_random_moments(workers, whole, tmp_path):
    killed_at_random_moments(workers, whole, tmp_path, num_kills=3)


@pytest.mark.soak
def test_killed_at_twenty_random_moments(workers, whole, tmp_path):
    killed_at_random_moments(workers, whole, tmp_path, num_kills=20)


NEW = {f"{STUDY}/recipe_version": 2}


@pytest.fixture(scope="module")
def unwritten(whole, server, tmp_path_factory) -> Root:
    """All is computed, an older result is there, and the process is killed before it writes."""
    root = copy_of(whole, tmp_path_factory.mktemp("unwritten"), NEW)
    record, per_image = whole.result()
    older = {name: values + 1 for name, values in per_image.items()}
    record = record | {"metrics": results.summarise(older)}
    results.save_result(root.places.results, record, older)
    ended = server(root.arguments(*RUN), KILLED_IN.format(place="results.save_weights", target=""))
    assert ended.code == -signal.SIGKILL and root.state().word == "partial"
    return root


def finish(root: Root, workers: Workers) -> Ended:
    """Go on with a run of which all is computed; there is nothing to train."""
    log = root.folder / "log"
    ended = workers(root.arguments(*RUN), COUNTED.format(log=str(log), seconds=0))
    assert ended.code == 0 and log.stat().st_size == 0, ended
    assert root.result().record["recipe_version"] == 2
    return ended


@pytest.mark.parametrize(
    ("place", "target", "is_damaged"),
    [
        ("os.replace", "/decoder.safetensors", False),
        ("os.replace", "vae-laptop-seed0-decoder.safetensors", False),
        ("results.save_result", "", False),
        ("os.replace", "vae-laptop-seed0.json.tmp", False),
        ("os.replace", "vae-laptop-seed0.safetensors", False),
        ("os.replace", "vae-laptop-seed0.json", True),
    ],
)
def test_killed_while_the_result_is_written(
    whole, unwritten, tmp_path, workers, place, target, is_damaged
):
    """The older result is whole, or it is known to be damaged; then the new one is complete."""
    root = copy_of(unwritten, tmp_path, NEW)
    ended = workers(root.arguments(*RUN), KILLED_IN.format(place=place, target=target))
    assert ended.code == -signal.SIGKILL
    state = root.state()
    assert state.word == "partial" and (state.damage is not None) == is_damaged
    assert is_damaged or root.result().record["recipe_version"] == 1
    ended = finish(root, workers)
    assert ("is damaged or of another run" in ended.out) == is_damaged
    assert_same_result(root, whole)


def test_killed_between_the_result_and_the_end(whole, unwritten, tmp_path, workers):
    root = copy_of(unwritten, tmp_path, NEW)
    kill = KILLED_IN.format(place="experiments._tidy", target="")
    assert workers(root.arguments(*RUN), kill).code == -signal.SIGKILL
    assert root.state().word == "done" and list(root.work().glob("*.checkpoint"))
    finish(root, workers)
    assert_same_result(root, whole)


def test_a_damaged_result_is_stale(whole, unwritten, tmp_path, workers):
    root = copy_of(whole, tmp_path / "a")
    values = root.places.result(root.experiment()).with_suffix(".safetensors")
    values.write_bytes(values.read_bytes()[:-1])
    state = root.state()
    assert (state.word, state.record) == ("stale", None)
    assert "Run this row again" in state.damage and "\n" not in state.damage

    root = copy_of(unwritten, tmp_path / "b", NEW)
    root.places.result(root.experiment()).write_text("{}")
    assert "not a result: study is missing" in finish(root, workers).out
    assert_same_result(root, whole)


# --- a full disk ---------------------------------------------------------------------------------


def test_disk_full_while_a_checkpoint_is_written(whole, partial, tmp_path, workers):
    root = copy_of(partial, tmp_path)
    before = {path.name: path.read_bytes() for path in root.work().glob("*.checkpoint*")}
    full = FULL_DISK.format(place="training.write_checkpoint", limit=1_000_000)
    ended = workers(root.arguments(*RUN), full)
    assert ended.code == 2 and "Traceback" not in ended.err
    assert "cannot write the checkpoint (File too large); the one before it is intact" in ended.err
    after = {path.name: path.read_bytes() for path in root.work().glob("*.checkpoint*")}
    assert after == {name: content for name, content in before.items() if "lock" not in name}
    assert root.state().word == "partial"
    assert workers(root.arguments(*RUN)).code == 0
    assert_same_result(root, whole)


@pytest.mark.parametrize(
    ("place", "limit"), [("results.save_weights", 100_000), ("results.save_result", 700)]
)
def test_disk_full_while_the_result_is_written(whole, unwritten, tmp_path, workers, place, limit):
    root = copy_of(unwritten, tmp_path, NEW)
    result = root.places.result(root.experiment())
    before = [path.read_bytes() for path in (result, result.with_suffix(".safetensors"))]
    ended = workers(root.arguments(*RUN), FULL_DISK.format(place=place, limit=limit))
    assert ended.code == 2 and "Traceback" not in ended.err
    assert "File too large" in ended.err.splitlines()[-1]
    assert [p.read_bytes() for p in (result, result.with_suffix(".safetensors"))] == before
    assert not list((tmp_path / "data").rglob("*.tmp"))
    assert root.state().word == "partial"
    finish(root, workers)
    assert_same_result(root, whole)


# --- damaged checkpoints -------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "corrupted"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(whole, partial, tmp_path, workers, how):
    root, log = copy_of(partial, tmp_path), tmp_path / "steps"
    damage(root.work() / "training.checkpoint", how)
    ended = workers(root.arguments(*RUN), COUNTED.format(log=str(log), seconds=0))
    assert ended.code == 0, ended
    said = r"training\.checkpoint is damaged.*; going on from the checkpoint before it"
    assert re.search(said, ended.err)
    assert log.stat().st_size == NUM_STEPS - 12  # the last checkpoint was after step 14
    assert_same_result(root, whole)


def test_no_readable_checkpoint_is_an_error_that_says_what_to_remove(partial, tmp_path, capsys):
    root = copy_of(partial, tmp_path)
    for name in ("training.checkpoint", "training.checkpoint.previous"):
        damage(root.work() / name, "truncated")
    assert main(root.arguments(*RUN)) == 2
    error = capsys.readouterr().err
    assert "remove both to start afresh" in error and str(root.work()) in error
    assert root.state().word == "partial"


def test_killed_between_two_names_of_a_checkpoint(whole, partial, tmp_path):
    root = copy_of(partial, tmp_path)
    checkpoint = root.work() / "training.checkpoint"
    checkpoint.replace(checkpoint.with_name("training.checkpoint.previous"))
    assert root.state().word == "partial"


# --- two at once ---------------------------------------------------------------------------------


def test_a_second_run_of_the_same_row_is_refused(root, workers, capsys):
    log = root.folder / "steps"
    process = workers.start(root.arguments(*RUN), COUNTED.format(log=str(log), seconds=0.02))
    wait_for(lambda: log.exists() and log.stat().st_size > 2)
    steps = log.stat().st_size
    assert main(root.arguments(*RUN)) == 2
    error = capsys.readouterr().err
    assert "another process is at work on this run" in error and error.count("\n") == 1
    assert f"process {process} on " in error
    assert main(root.arguments("list", STUDY, "vae", "--seed=0")) == 0  # looking is allowed
    assert "partial" in capsys.readouterr().out
    wait_for(lambda: log.stat().st_size > steps)  # the first one is not disturbed
    assert workers.kill().code == -signal.SIGKILL
    assert (root.work() / "run.lock").exists()  # a dead process holds no lock
    assert main(root.arguments(*RUN, "--max-minutes=0.0001")) == 3


def test_rows_of_one_study_can_run_side_by_side(root, workers):
    log = root.folder / "steps"
    workers.start(root.arguments(*RUN), COUNTED.format(log=str(log), seconds=0.02))
    wait_for(lambda: log.exists() and log.stat().st_size > 2)
    assert main(root.arguments("run", STUDY, "hot", "--seed=0")) == 1  # it diverges, but it ran
    assert root.state(row="hot").word == "failed"


# --- seeds trained together ----------------------------------------------------------------------


TOGETHER = ("run", "amc_table1", "vae", "--together")


@pytest.fixture(scope="module")
def together(server, tmp_path_factory) -> Root:
    root = Root(tmp_path_factory.mktemp("together")).write()
    ended = server(root.arguments(*TOGETHER))
    assert ended.code == 0, ended
    names = [f"amc_table1/vae-laptop-seed{seed}" for seed in range(3)]
    assert f"{', '.join(names)}: trained together\n" in ended.out
    return root


def test_seeds_trained_together_are_results_of_their_own(together, whole):
    found = [together.result(seed=seed) for seed in range(3)]
    for seed, (record, _) in enumerate(found):
        assert together.state(seed=seed).word == "done"
        assert record["details"]["trained_with_seeds"] == [0, 1, 2]
        assert record["details"]["steps"] == NUM_STEPS
        assert record["details"]["cpu_seconds"] is None  # it does not include the training
        assert record["provenance"]["wall_seconds"] > record["details"]["seconds"]["training"] > 0
    alone = whole.result().record
    assert found[0].record["config_hash"] == alone["config_hash"]
    assert "trained_with_seeds" not in alone["details"]
    likelihoods = [result.per_image["ais_ll"] for result in found]
    assert not torch.equal(likelihoods[0], likelihoods[1])
    # Other noise and another order than alone, but the same amount of the same training
    mean, alone_mean = (r["metrics"]["ais_ll"]["mean"] for r in (found[0].record, alone))
    assert abs(mean - alone_mean) < 10.0
    assert not list(together.places.checkpoints.rglob("*.checkpoint*"))
    assert not list(together.places.checkpoints.rglob("*seeds*"))
    assert (
        together.folder / "data/models/amc_table1/vae-laptop-seed0-decoder.safetensors"
    ).exists()


def test_seeds_trained_together_can_be_stopped(together, root, workers, capsys):
    slow = COUNTED.format(log=str(root.folder / "steps"), seconds=0.02)
    stops = 0
    for attempt in range(1, 30):
        ended = workers(root.arguments(*TOGETHER, f"--max-minutes={0.006 * attempt}"), slow)
        if ended.code == 0:
            break
        assert ended.code == 3, ended
        assert "the same command goes on from here" in ended.err.splitlines()[-1]
        stops += 1
        if stops == 1:
            assert [root.state(seed=seed).word for seed in range(3)] == ["partial"] * 3
    assert stops >= 2
    assert (root.folder / "steps").stat().st_size == NUM_STEPS  # of all three, none twice
    for seed in range(3):
        own, other = root.result(seed=seed), together.result(seed=seed)
        for name, values in other.per_image.items():
            assert torch.equal(own.per_image[name], values), name
    assert main(root.arguments(*TOGETHER)) == 0
    assert "trained together" not in capsys.readouterr().out


def test_a_seed_that_has_begun_alone_goes_on_alone(partial, whole, tmp_path, workers):
    root = copy_of(partial, tmp_path)
    assert workers(root.arguments(*TOGETHER)).code == 0
    own, expected = root.result().per_image, whole.result().per_image
    assert all(torch.equal(own[name], values) for name, values in expected.items())
    for seed in (1, 2):
        assert root.result(seed=seed).record["details"]["trained_with_seeds"] == [1, 2]


KILLED_IN_EVALUATION = """
real_ll, calls = recipes.evaluation.hais_ll, []
def killed(*arguments, **settings):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real_ll(*arguments, **settings)
recipes.evaluation.hais_ll = killed
"""  # of the second seed


@pytest.mark.parametrize("more", [(), ("--again",)])
def test_killed_after_the_training_nothing_is_trained_twice(together, tmp_path, workers, more):
    root = copy_of(together, tmp_path) if more else Root(tmp_path).write()
    count = COUNTED.format(log=str(tmp_path / "steps"), seconds=0)
    (tmp_path / "steps").unlink(missing_ok=True)
    ended = workers(root.arguments(*TOGETHER, *more), count + KILLED_IN_EVALUATION)
    assert ended.code == -signal.SIGKILL
    if not more:  # a newcomer does not make the others start afresh
        root.write({f"{STUDY}/seeds": [0, 1, 2, 3]})
    ended = workers(root.arguments(*TOGETHER, *more), count)
    assert ended.code == 0, ended
    assert (tmp_path / "steps").stat().st_size == NUM_STEPS * (1 if more else 2)
    for seed in range(3):
        own, other = root.result(seed=seed), together.result(seed=seed)
        assert own.record["details"]["trained_with_seeds"] == [0, 1, 2]
        assert all(torch.equal(own.per_image[name], v) for name, v in other.per_image.items())
    if not more:
        assert "trained_with_seeds" not in root.result(seed=3).record["details"]
    assert not list(root.places.checkpoints.rglob("*seeds*"))


def test_killed_while_the_networks_are_handed_out(together, root, workers):
    count = COUNTED.format(log=str(root.folder / "steps"), seconds=0)
    kill = """
real_write = recipes.write_checkpoint
def killed(path, tree):
    if "seed1" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    real_write(path, tree)
recipes.write_checkpoint = killed
"""
    assert workers(root.arguments(*TOGETHER), count + kill).code == -signal.SIGKILL
    assert workers(root.arguments(*TOGETHER), count).code == 0
    assert (root.folder / "steps").stat().st_size == NUM_STEPS
    own, other = root.result(seed=2).per_image, together.result(seed=2).per_image
    assert all(torch.equal(own[name], values) for name, values in other.items())


def test_what_was_trained_together_is_not_replaced_by_what_is_trained_alone(
    together, tmp_path, capsys
):
    root = copy_of(together, tmp_path)
    shutil.rmtree(root.places.checkpoints)
    before = {path: path.read_bytes() for path in root.places.results.rglob("*.*")}
    assert main(root.arguments("run", "amc_imputation", "--seed=1")) == 2
    assert f"run {STUDY} vae --together --scale laptop --again\n" in capsys.readouterr().err
    assert main(root.arguments(*RUN[:3], "--seed=1", "--again")) == 2
    error = capsys.readouterr().err
    assert "was trained with seeds 0, 1, 2, and alone would get other numbers" in error
    assert {path: path.read_bytes() for path in before} == before


def test_half_of_a_joint_training_is_not_thrown_away(root, workers, capsys):
    slow = COUNTED.format(log=str(root.folder / "steps"), seconds=0.02)
    assert workers(root.arguments(*TOGETHER, "--max-minutes=0.006"), slow).code == 3
    assert main(root.arguments(*RUN)) == 2
    error = capsys.readouterr().err
    assert "half trained with other seeds: go on with --together, or remove " in error
    folder = Path(re.search(r"remove (\S+) to train it alone", error)[1])
    assert folder.name.startswith("vae-laptop-seeds0+1+2-") and folder.is_dir()


@pytest.mark.parametrize(
    ("changes", "command", "message"),
    [
        ({}, ("run", "amc_imputation", "--together"), "'imputation' trains one seed at a time"),
        (
            {f"{STUDY}/common/chain_dtype": "float16"},
            TOGETHER,
            "amc_table1/vae: chain_dtype = 'float16' needs a graphics card",
        ),
        (
            {f"{STUDY}/common/num_student_samples": 2},
            TOGETHER,
            "one sample of the student for each image; got num_student_samples = 2",
        ),
    ],
)
def test_what_does_not_train_together_is_refused(root, capsys, changes, command, message):
    root.write(changes)
    assert main(root.arguments(*command)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(root.folder.rglob("*.checkpoint"))


def test_seeds_that_diverge_together_are_named(root, capsys):
    assert main(root.arguments("run", STUDY, "hot", "--together")) == 1
    error = capsys.readouterr().err
    names = ", ".join(f"amc_table1/hot-laptop-seed{seed}" for seed in range(3))
    assert f"{names}: step 2: loss 'loss' is nan" in error
    assert re.search(r"remove \S+/hot-laptop-seeds0\+1\+2-\w+ to train them one by one", error)
    assert root.state(row="hot").word == "partial"


def test_runs_that_differ_in_more_than_the_seed_are_not_trained_together(root):
    runs = [root.experiment(seed=0), root.experiment(row="hot", seed=1)]
    with pytest.raises(ExperimentError, match="differ in the seed alone; got amc_table1/vae"):
        train_together(runs, places=root.places)


# --- divergence ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("hot", r"step 2: loss 'loss' is nan \(last good checkpoint: .*/training\.checkpoint\)"),
        ("wild", r"step 1: the chain's positions are not finite.* \(there is no checkpoint yet\)"),
    ],
)
def test_a_run_that_diverges_is_marked_failed_with_the_reason(root, capsys, row, reason):
    for _ in range(2):  # the second time from the last good checkpoint, to the same end
        assert main(root.arguments("run", STUDY, row, "--seed=0")) == 1
        out, error = capsys.readouterr()
        assert re.search(rf"{row}-laptop-seed0: failed, .*{reason}", out)
        assert error.splitlines()[-1] == f"failed: amc_table1/{row}-laptop-seed0"
        record, per_image = root.result(row=row)
        assert record["status"] == "failed" and re.fullmatch(reason, record["reason"])
        assert record["metrics"] == {} and per_image == {} and record["provenance"]["versions"]
        assert not list(root.folder.rglob("*.safetensors"))
    if row == "hot":
        assert read_checkpoint(root.work(row=row) / "training.checkpoint")["done"] == 1


def test_one_failure_does_not_keep_the_other_rows_from_running(root, capsys):
    root.write({f"{STUDY}/common/epochs": 1, f"{STUDY}/rows/wild/seeds": [0, 1]})
    assert main(root.arguments("run", STUDY, "wild")) == 1
    out, error = capsys.readouterr()
    assert out.count("failed, ") == 2
    failed = "failed: amc_table1/wild-laptop-seed0, amc_table1/wild-laptop-seed1"
    assert error.splitlines()[-1] == failed


@pytest.mark.filterwarnings("ignore:Detected call of")  # the patched step moves no optimiser
def test_a_failure_does_not_wipe_out_what_was_found_before(whole, tmp_path, capsys, monkeypatch):
    root = copy_of(whole, tmp_path)
    files = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*.*")}

    # Made once more, for its weights say, and this time it fails, as another machine might.
    with monkeypatch.context() as patch:
        patch.setattr(recipes.amc, "vae_step", lambda *a, **k: {"loss": torch.tensor(torch.nan)})
        assert main(root.arguments(*RUN, "--again")) == 1
    assert "the result of before is kept" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in files} == files
    assert root.state().word == "done"

    # Its options have changed: the old result no longer answers the question, but is remembered.
    root.write({f"{ROW}/learning_rate": 1e6})
    before = whole.result().record
    for _ in range(2):
        assert main(root.arguments(*RUN)) == 1
        record = root.result().record
        assert record["status"] == "failed" and root.state().word == "failed"
        replaced = record["details"]["replaced"]
        assert replaced["metrics"] == before["metrics"]
        assert replaced["config_hash"] == before["config_hash"]


# --- folders that cannot be written --------------------------------------------------------------


@pytest.mark.parametrize("folder", ["data/results", "data/models", "checkpoints"])
def test_folders_that_cannot_be_written_are_found_out_before_any_work(
    root, capsys, monkeypatch, folder
):
    """A regular file in its place, because tests may run as a user whom no permission stops."""
    path = root.folder / folder
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("in the way")
    monkeypatch.setitem(recipes.RECIPES, "amc", recipes.RECIPES["amc"]._replace(function=None))
    assert main(root.arguments(*RUN)) == 2
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1
    if folder != "checkpoints":
        assert "nothing was started" in error
    assert path.read_text() == "in the way"
    assert not list(root.folder.rglob("*.checkpoint")) and not list(root.folder.rglob(".writable"))


def test_many_may_look_at_a_folder_at_once(tmp_path):
    """Runs that Snakemake starts at the same moment do not trip over each other's probe."""
    real = Path.unlink

    def unlink_after_another(path, **settings):
        with contextlib.suppress(FileNotFoundError):
            real(path)
        return real(path, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_after_another)
        experiments._check_writable(tmp_path / "results")
    assert list((tmp_path / "results").iterdir()) == []
