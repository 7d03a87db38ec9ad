"""A file of studies that is right, where runs stand, and how they are made and recorded."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from amortised import amc, experiments, imputation, results, runs
from amortised.experiments import load_studies, select
from amortised.files import DamagedFileError
from amortised.schemas import FormatError
from tiny import NUM_STEPS, OPTIONS, STUDIES, Root, changed

pytestmark = pytest.mark.usefixtures("mnist_is_read_once")


@pytest.fixture
def root(tmp_path) -> Root:
    return Root(tmp_path).write()


@pytest.fixture(scope="module")
def made(tmp_path_factory, mnist_is_read_once) -> Root:
    """A root where one run is done; to be copied, not changed."""
    root = Root(tmp_path_factory.mktemp("made")).write()
    assert root.main(*RUN) == 0
    return root


@pytest.fixture
def steps(monkeypatch) -> list:
    """Grows by an entry at each step of a VAE."""
    made, real = [], amc.vae_step

    def step(*arguments, **settings):
        made.append(None)
        return real(*arguments, **settings)

    monkeypatch.setattr(amc, "vae_step", step)
    return made


RUN = ("run", "small", "vae", "--seed=0")
VAE, WILD = "small/rows/vae", "small/rows/wild"


def files_below(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- the file of studies -------------------------------------------------------------------------

# SHA-256 of the lines "name config_hash recipe_version" of the runs of these studies, sorted. Names
# and hashes are those of committed results and of the folders of runs: a change makes them stale.
FIRST_STUDIES = ("amc_table1", "amc_imputation", "vae_objectives")
RUNS_SHA256 = "1454db1fd7a63940013e7bda0c3c692866e55b03820854e1d017c1b900e8ed30"


def test_the_options_of_the_first_studies_are_those_that_they_were():
    all_runs = [run for run in select(load_studies()) if run.study in FIRST_STUDIES]
    lines = [f"{r.name} {results.config_hash(r.config)} {r.recipe_version}" for r in all_runs]
    assert len(lines) == 161
    assert hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() == RUNS_SHA256


def test_the_committed_file_is_right():
    studies = load_studies()
    assert {"amc_table1", "amc_imputation", "vae_objectives", "reference"} <= studies.keys()
    for study in studies.keys() - {"reference", "amc_rates"}:  # these compare no methods
        for row, scale in {(run.row, run.scale) for run in studies[study]} - {("plane", "laptop")}:
            seeds = [run.seed for run in studies[study] if (run.row, run.scale) == (row, scale)]
            assert len(seeds) >= 3 or (scale == "full" and seeds == [0]), (row, scale)
    table = select(studies, "amc_table1", scale="laptop")
    assert len({run.row for run in table}) == 10 and len(table) == 30
    for run in studies["amc_imputation"]:
        assert (run.needs.study, run.needs.row) == ("amc_table1", run.config["trained"])
        assert (run.needs.scale, run.needs.seed) == (run.scale, run.seed)
    for run in studies["amc_table1"]:  # a row is named after its encoder, chain length and method
        assert run.row.startswith(run.config["method"])
        steps = re.search(r"_t(\d+)", run.row)
        if steps and "hmc" not in run.row:
            assert run.config["num_steps"] == int(steps[1])
        if run.config["encoder"] in ("cnn_g", "cnn_b"):
            assert run.config["encoder"] in run.row


def fault_of(content: dict | str, tmp_path: Path) -> str:
    path = tmp_path / "studies.yaml"
    text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    path.write_text(text)
    with pytest.raises(FormatError) as error:
        load_studies(path)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # structure
        ({"small/rwos": {}}, "studies.small: unknown name 'rwos' (known: title, recipe, recipe_v"),
        ({"small/seeds": None}, "studies.small: seeds is missing"),
        ({"small": ["vae"]}, "studies.small = ['vae']: input should be a valid dictionary"),
        ({"small": {1: 2}}, "studies.small[1] = 1: keys should be strings"),
        ({"small/rows": ["vae"]}, "studies.small.rows = ['vae']: input should be a valid dict"),
        ({"small/common": 3}, "studies.small.common = 3: input should be a valid dictionary"),
        ({"small/scales/full": 3}, "small.scales.full = 3: input should be a valid dictionary"),
        ({VAE: 0.1}, "studies.small.rows.vae = 0.1: input should be a valid dictionary"),
        ({"small/rows/VAE-2": {}}, "rows.VAE-2.[key] = 'VAE-2': string should match pattern"),
        ({"Study 1": STUDIES["small"]}, "'Study 1': string should match pattern '^[a-z0-9_]+$'"),
        # names
        ({"small/recipe": "gan"}, "small.recipe: 'gan' is none of amc, distillation, vae, "),
        (
            {"small/recipe": "gan.OWN"},
            "recipe: 'gan.OWN' cannot be imported: No module named 'gan'",
        ),
        ({"small/recipe": "math.pi"}, "recipe: 'math.pi' is none of amc, "),
        ({"small/recipe": ["amc"]}, "small.recipe = ['amc']: input should be a valid string"),
        ({"small/recipe_version": 0}, "recipe_version = 0: input should be greater than"),
        ({"small/scales/huge": {}}, "'huge': input should be 'laptop' or 'full'"),
        ({f"{VAE}/scales": ["huge"]}, "rows.vae: scales[0] = 'huge': input should be 'laptop' or"),
        ({f"{VAE}/scales": "full"}, "rows.vae: scales = 'full': input should be a valid list"),
        ({f"{VAE}/scales": []}, "scales = []: list should have at least 1 item"),
        ({"small/scales/laptop": None}, "rows.hot: the study has no scale 'laptop': full"),
        ({f"{VAE}/keep": ["decodre"]}, "keep[0] = 'decodre': input should be 'decoder' or 'enc"),
        # seeds
        ({"small/seeds": []}, "small.seeds = []: list should have at least 1 item"),
        ({"small/seeds": 3}, "small.seeds = 3: input should be a valid list"),
        ({f"{VAE}/seeds": [0, -1]}, "seeds[1] = -1: input should be greater than or equal to 0"),
        ({f"{VAE}/seeds": [0, 1.0]}, "seeds[1] = 1.0: input should be a valid integer"),
        ({f"{VAE}/seeds": [0, "1"]}, "seeds[1] = '1': input should be a valid integer"),
        ({f"{VAE}/seeds": [0, 1, 0]}, "rows.vae: seeds: [0, 1, 0] holds a value twice"),
        ({f"{VAE}/scales": ["full", "full"]}, "scales: ['full', 'full'] holds a value twice"),
        # options
        ({f"{VAE}/epcohs": 3}, "rows.vae at laptop: unknown name 'epcohs' (known: training_images"),
        ({"small/common/images": None}, "rows.vae at laptop: images is missing"),
        ({f"{VAE}/method": "avi"}, "'avi': input should be 'vae', 'mcmc_vi', 'amc', 'avb', 'per"),
        ({f"{VAE}/encoder": "cnn"}, "should be 'none', 'gaussian', 'cnn_g' or 'cnn_b'"),
        ({"small/common/kernel": "ula"}, "should be 'none', 'langevin', 'mala' or 'hmc'"),
        ({f"{VAE}/rule": "kl"}, "'none', 'gan', 'wasserstein', 'relativistic', 'mmd', "),
        ({f"{VAE}/chain_dtype": "half"}, "should be 'float32', 'bfloat16' or 'float16'"),
        ({f"{VAE}/epochs": 0}, "rows.vae at laptop: epochs = 0: input should be greater than"),
        ({f"{VAE}/epochs": 2.0}, "epochs = 2.0: input should be a valid integer"),
        ({f"{VAE}/epochs": True}, "epochs = True: input should be a valid integer"),
        ({f"{VAE}/images": 1}, "images = 1: input should be greater than or equal to 2"),
        ({f"{VAE}/images": 10001}, "images = 10001: input should be less than or equal to 10000"),
        ({f"{VAE}/learning_rate": 0}, "learning_rate = 0: input should be greater than 0"),
        ({f"{VAE}/learning_rate": float("nan")}, "learning_rate = nan: input should be a finite"),
        ({f"{VAE}/learning_rate": "1e-3"}, "this is text, as is 1e-3 in YAML"),
        ({f"{VAE}/step_size": -0.1}, "step_size = -0.1: input should be greater than or equal to"),
        # options that are right one by one
        ({f"{VAE}/batch_size": 101}, "batch_size = 101 is more than training_images = 100"),
        ({f"{VAE}/encoder": "none"}, "encoder = 'none' does not go with method = 'vae'"),
        ({f"{VAE}/encoder": "cnn_g"}, "vae, mcmc_vi and inclusive_kl need a Gaussian encoder"),
        ({f"{WILD}/encoder": "cnn_b"}, "encoder = 'cnn_b' does not go with method = 'mcmc_vi'"),
        ({f"{VAE}/method": "persistent"}, "'gaussian' does not go with method = 'persistent'"),
        ({f"{VAE}/num_steps": 5}, "num_steps = 5 does not go with method = 'vae'"),
        ({f"{VAE}/kernel": "hmc"}, "kernel = 'hmc' does not go with method = 'vae'"),
        ({f"{WILD}/kernel": "none"}, "kernel = 'none' does not go with method = 'mcmc_vi'"),
        ({f"{WILD}/num_steps": 0}, "num_steps = 0 does not go with method = 'mcmc_vi'"),
        ({f"{WILD}/step_size": 0.0}, "step_size = 0.0 does not go with method = 'mcmc_vi'"),
        ({f"{WILD}/method": "amc"}, "rule = 'none' does not go with method = 'amc'"),
        ({f"{WILD}/rule": "gan"}, "rule = 'gan' does not go with method = 'mcmc_vi'"),
        ({"small/rows/amc/rule": "mmd"}, "num_student_samples = 1 does not go with method = 'amc'"),
        (
            {"small/rows/amc/rule": "inclusive_kl"},
            "encoder = 'cnn_g' does not go with method = 'am",
        ),
        # a row that builds on another
        (
            {"filled/rows/vae/trained": "avb"},
            "filled/vae-laptop-seed0: there is no run small/avb-laptop-seed0 to build on. Rows of "
            "small: vae, hot, wild, amc, persistent",
        ),
        ({f"{VAE}/seeds": [0]}, "vae-laptop-seed1: there is no run small/vae-laptop-seed1 to"),
        ({"small": None}, "no run small/vae-laptop-seed0 to build on. Rows of small: none"),
        ({"filled/common/trained_study": "filled"}, "no run filled/vae-laptop-seed0 to build on"),
    ],
)
def test_each_fault_of_a_file_is_named_with_the_choices(tmp_path, changes, message):
    assert message in fault_of(changed(changes), tmp_path)


def test_all_faults_are_named_at_once(tmp_path):
    changes = {f"{VAE}/epochs": 0, f"{VAE}/epcohs": 3, "small/rows/hot/encoder": "cnn_g"}
    found = fault_of(changed(changes | {f"{VAE}/scales": ["laptop"]}), tmp_path)
    assert found.count("\n") == 3
    assert "epochs = 0" in found and "'epcohs'" in found and "encoder = 'cnn_g'" in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("studies: {amc: [}", "is not YAML"),
        ("studies:\n\t- tab", "is not YAML"),
        ("studies: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("", "top level = None: input should be a valid dictionary"),
        ("- studies", "top level = ['studies']: input should be a valid dictionary"),
        ("studies: {}\nrows: {}", "unknown name 'rows' (known: studies)"),
        ("studies: [amc_table1]", "studies = ['amc_table1']: input should be a valid dictionary"),
        ("studies:\n  a:\n    rows: {b: 1,\n      b: 2}", "line 4: 'b' stands there twice"),
    ],
)
def test_a_file_that_is_none(tmp_path, text, message):
    assert message in fault_of(text, tmp_path)


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(FormatError, match=r"there is no file of studies .*nowhere\.yaml"):
        load_studies(tmp_path / "nowhere.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"studies: \xff\xfe")
    with pytest.raises(FormatError, match="is not YAML"):
        load_studies(tmp_path / "bytes.yaml")


def test_options_of_a_row_come_before_its_scale_and_these_before_the_common_ones(root):
    laptop, full = (
        root.write({f"{VAE}/images": 7}).experiments(scale=s, seed=0)[0] for s in SCALES
    )
    assert laptop.config == OPTIONS | {"images": 7} and full.config == laptop.config | {"epochs": 5}
    assert laptop.keep == ("decoder", "encoder") and laptop.needs is None
    root.write(
        {f"{VAE}/epochs": 3, "small/rows/5": {}}
    )  # a text that reads like a number is a name
    assert {run.config["epochs"] for run in root.experiments(scale=None)} == {3}
    (filled,) = root.experiments("filled", seed=1)
    assert [filled.needs] == root.experiments(seed=1) and root.experiments(row="5")


# --- what is asked for ---------------------------------------------------------------------------

SCALES = ("laptop", "full")


@pytest.mark.parametrize(
    ("arguments", "names", "message"),
    [
        (["amc"], {}, "no run with study 'amc'; choices: small, filled"),
        (["small", "vea"], {}, "no run with row 'vea'; choices: vae, hot, wild, amc, persistent"),
        ([None, "vea"], {}, "no run with row 'vea'; choices: vae, hot, wild, amc, persistent"),
        (["small"], {"scale": "huge"}, "no run with scale 'huge'; choices: laptop, full"),
        (["small"], {"seed": 7}, "no run with seed 7; choices: 0, 1, 2"),
        (["small", "wild"], {"seed": 1}, "no run with seed 1; choices: 0"),
        (["small", "hot"], {"scale": "full"}, "no run with scale 'full'; choices: laptop"),
    ],
)
def test_what_there_is_not_cannot_be_selected(root, arguments, names, message):
    with pytest.raises(FormatError) as error:
        select(load_studies(root.file), *arguments, **names)
    assert message in str(error.value)


def test_runs_come_seed_by_seed_and_in_the_order_of_the_file(root):
    studies = load_studies(root.file)
    first = ["vae", "hot", "wild", "amc", "persistent"]
    names = [f"small/{row}-laptop-seed0" for row in first]
    names += [f"small/{row}-laptop-seed{seed}" for seed in (1, 2) for row in ("vae", "hot")]
    names += [f"small/vae-full-seed{seed}" for seed in (0, 1, 2)]
    names += [f"filled/vae-laptop-seed{seed}" for seed in (0, 1)]
    assert [run.name for run in select(studies)] == names
    found = [run.name for run in select(studies, seed=1, scale="laptop")]
    assert found == [name for name in names if "laptop-seed1" in name]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["list", "amc"], "there is no run with study 'amc'; choices: small, filled"),
        (["run", "small", "vea"], "there is no run with row 'vea'"),
        ([*RUN, "--scale=huge"], "there is no run with scale 'huge'; choices: laptop, full"),
        ([*RUN, "--device=gpu"], "device 'gpu': must be a device of this machine: 'cpu'"),
        ([*RUN, "--max-minutes=0"], "--max-minutes 0.0: must be greater than 0"),
    ],
)
def test_the_command_line_refuses_in_one_line(root, capsys, command, message):
    assert root.main(*command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(root.folder.rglob("*.stage"))


@pytest.mark.parametrize("command", [["run"], ["runn"], [*RUN, "--seed=x"], [*RUN, "--epochs=3"]])
def test_the_command_line_says_what_is_wrong_with_its_arguments_in_one_line(root, capsys, command):
    with pytest.raises(SystemExit) as ended:
        root.main(*command)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and "--help lists" in error
    assert error.startswith("python -m amortised.experiments")


def test_a_bad_file_is_refused_on_the_command_line(root, capsys):
    assert root.write({f"{VAE}/epochs": 0}).main("list") == 2
    assert "rows.vae at laptop: epochs = 0: input should be greater" in capsys.readouterr().err


# --- where runs stand ----------------------------------------------------------------------------


def test_list_shows_where_each_run_stands_and_what_it_cost(made, tmp_path, capsys):
    root = made.copy(tmp_path)  # vae, seed 0: done
    assert root.main("run", "small", "vae", "--seed=1", "--max-minutes=1e-9") == 3
    record, per_image = root.result()
    old = record["config"] | {"epochs": 1}
    record = record | {"seed": 2, "config": old, "config_hash": results.config_hash(old)}
    results.save_result(tmp_path / "data/results", record, per_image)
    assert root.main("run", "small", "hot", "--seed=0") == 1
    root.result_file(row="hot", seed=1).write_text("{")
    capsys.readouterr()

    assert root.main("list", "small", "--scale=laptop") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    shown = {line.split()[0].split("/")[1]: line.split(maxsplit=1)[1] for line in lines}
    cost = rf"{record['provenance']['wall_seconds'] / 60:.1f} min on .+, 1 thread\(s\)"
    assert re.fullmatch(rf"done +{cost}", shown["vae-laptop-seed0"])
    assert shown["vae-laptop-seed1"] == "partial"
    assert re.fullmatch(rf"stale +{cost}", shown["vae-laptop-seed2"])
    assert re.fullmatch(r"failed +0\.\d min on .*: step 2: loss .*", shown["hot-laptop-seed0"])
    damage = r"stale +.*hot-laptop-seed1\.json: .*Run this row again\."
    assert re.fullmatch(damage, shown["hot-laptop-seed1"])
    assert shown["hot-laptop-seed2"] == shown["wild-laptop-seed0"] == "missing"
    assert last == "1 done, 1 failed, 4 missing, 1 partial, 2 stale" and len(lines) == 9


@pytest.mark.parametrize(
    "changes", [{f"{VAE}/epochs": 1}, {"small/recipe_version": 2}], ids=["option", "recipe_version"]
)
def test_a_result_of_other_options_is_stale_and_made_anew(made, tmp_path, capsys, changes, steps):
    root = made.copy(tmp_path, changes)
    before, folder = made.result(), made.run()
    assert root.state().word == "stale" and root.run().name != folder.name
    assert root.main(*RUN) == 0
    assert "small/vae-laptop-seed0: stale, running" in capsys.readouterr().out
    record, per_image = root.result()
    (experiment,) = root.experiments(seed=0)
    assert record["config"] == experiment.config
    assert record["recipe_version"] == experiment.recipe_version
    is_other = experiment.config != before.record["config"]
    assert torch.equal(per_image["is_ll"], before.per_image["is_ll"]) != is_other
    assert root.state().word == "done"
    root.write()  # the file goes back to what it was, and the run of before is still there
    num_steps = len(steps)
    assert root.state().word == "partial" and root.main(*RUN) == 0
    assert len(steps) == num_steps and root.state().word == "done"
    assert root.result_file().read_bytes() == made.result_file().read_bytes()


def test_titles_order_and_other_rows_make_no_result_stale(made, tmp_path):
    order = dict(reversed(OPTIONS.items()))
    changes = {"small/title": "x", "small/common": order, "small/rows/new": {}}
    root = made.copy(tmp_path, changes | {f"{VAE}/keep": [], f"{VAE}/step_size": 0})
    assert root.state().word == "done"


def test_a_damaged_result_and_lacking_weights_are_stale(made, tmp_path, steps):
    root = made.copy(tmp_path)
    values = root.result_file().with_suffix(".safetensors")
    values.write_bytes(values.read_bytes()[:-1])
    shutil.rmtree(tmp_path / "runs")
    state = root.state()
    assert (state.word, state.record) == ("stale", None)
    assert "Run this row again" in state.damage and "\n" not in state.damage
    root = made.copy(tmp_path)
    (tmp_path / "data/models/small/vae-laptop-seed0-encoder.safetensors").unlink()
    assert root.state().damage == "weights are missing: vae-laptop-seed0-encoder.safetensors"
    assert root.main(*RUN) == 0 and not steps
    assert files_below(tmp_path / "data") == files_below(made.folder / "data")


# --- making and recording ------------------------------------------------------------------------


def test_a_run_is_recorded_with_its_weights_and_made_again_if_asked(made, tmp_path, capsys, steps):
    root = made.copy(tmp_path)
    before = files_below(root.folder / "data")
    for role in ("decoder", "encoder"):
        kept = f"models/small/vae-laptop-seed0-{role}.safetensors"
        assert before[kept] == (root.run() / f"{role}.safetensors").read_bytes()
    assert len(before) == 4
    assert root.main(*RUN) == 0 and not steps
    assert "small/vae-laptop-seed0: done, " in capsys.readouterr().out
    assert files_below(root.folder / "data") == before
    assert root.main(*RUN, "--again") == 0 and len(steps) == NUM_STEPS
    assert "done, running" in capsys.readouterr().out
    after = files_below(root.folder / "data")
    name = "results/small/vae-laptop-seed0"
    assert after[f"{name}.json"] != before[f"{name}.json"]  # another time of day, if nothing else
    assert after[f"{name}.safetensors"] == before[f"{name}.safetensors"]


def test_runs_are_prepared_here_made_elsewhere_and_recorded_here(made, tmp_path, capsys):
    root = Root(tmp_path).write()
    command = ("small", "vae", "--scale=laptop")
    assert root.main("prepare", *command, "--seed=0") == 0
    folder = root.run().relative_to(tmp_path)
    assert capsys.readouterr().out == f"{folder}/result.json\n"
    assert [path.name for path in root.run().iterdir()] == ["run.json"]
    assert root.main("record", *command) == 0  # there is nothing yet
    assert capsys.readouterr().out == "" and root.state().word == "missing"
    shutil.copytree(made.run(), root.run(), dirs_exist_ok=True)
    assert root.state().word == "partial"
    assert root.main("record", *command) == 0
    assert capsys.readouterr().out == "small/vae-laptop-seed0: recorded\n"
    assert root.state().word == "done"
    assert root.result_file().read_bytes() == made.result_file().read_bytes()
    assert root.main("prepare", *command) == 0
    seeds = re.findall(r"^runs/small/vae-laptop-seed(\d)-", capsys.readouterr().out, re.MULTILINE)
    assert seeds == ["1", "2"]
    assert root.main("prepare", "filled", "--scale=laptop", "--seed=0") == 0
    assert capsys.readouterr().out.count("\n") == 1  # though it builds on another


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("per_image.stage", b"", None, r"per_image\.stage is damaged"),
        ("per_image.stage", None, None, "has no values per image"),
        ("decoder.safetensors", b"", None, r"decoder\.safetensors is damaged"),
        ("result.json", b'"epochs": 4', b'"epochs": 5', "config_hash is not that of config"),
        ("result.json", b'"mean": -', b'"mean": -1', "states .* its per-image values give"),
        (
            "result.json",
            b'"recipe_version": 1',
            b'"recipe_version": 2',
            "of another run; remove it",
        ),
        ("result.json", b'"status"', b'"state"', "status is missing"),
    ],
)
def test_what_is_damaged_is_not_recorded(made, tmp_path, name, old, new, message):
    root = made.copy(tmp_path)
    shutil.rmtree(tmp_path / "data")
    path = root.run() / name
    content = path.read_bytes()
    path.unlink()
    if old is not None:
        path.write_bytes(content[:-9] if new is None else content.replace(old, new, 1))
    with pytest.raises((DamagedFileError, FormatError, results.ResultError), match=message):
        experiments.record(*root.experiments(seed=0), tmp_path)
    assert not list(tmp_path.glob("data/results/*/*.json"))


@pytest.mark.parametrize(
    ("target", "is_damaged"),
    [
        ("vae-laptop-seed0-decoder.safetensors", False),
        ("vae-laptop-seed0.json.tmp", False),
        ("vae-laptop-seed0.safetensors", False),
        ("vae-laptop-seed0.json", True),
    ],
)
def test_interrupted_while_a_result_is_recorded(made, tmp_path, monkeypatch, target, is_damaged):
    """The older result is whole, or it is known to be damaged; then the new one is complete."""
    root = made.copy(tmp_path)
    record, per_image = made.result()
    older = {name: values + 1 for name, values in per_image.items()}
    record = record | {"recipe_version": 7, "metrics": results.summarise(older)}
    results.save_result(tmp_path / "data/results", record, older)
    real = os.replace

    def interrupted(source, name):
        if str(name).endswith(target):
            raise KeyboardInterrupt
        real(source, name)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            root.main("record", "small", "vae", "--seed=0")
    state = root.state()
    assert state.word == "partial" and (state.damage is not None) == is_damaged
    assert is_damaged or root.result().record["recipe_version"] == 7
    assert root.main("record", "small", "vae", "--seed=0") == 0
    assert files_below(tmp_path / "data") == files_below(made.folder / "data")


@pytest.mark.parametrize("folder", ["data/results", "data/models"])
def test_what_cannot_be_recorded_is_kept(root, capsys, steps, folder):
    """A regular file in its place, because tests may run as a user whom no permission stops."""
    path = root.folder / folder
    path.parent.mkdir()
    path.write_text("in the way")
    assert root.main(*RUN) == 2
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1 and path.read_text() == "in the way"
    path.unlink()
    assert root.main(*RUN) == 0 and len(steps) == NUM_STEPS
    assert root.state().word == "done"


def test_stopped_by_time_the_same_command_goes_on(made, root, steps):
    assert root.main(*RUN, "--max-minutes=1e-9") == 3 and len(steps) == 1
    assert root.state().word == "partial"
    assert root.main(*RUN) == 0 and len(steps) == NUM_STEPS
    assert made.result().record["per_image_sha256"] == root.result().record["per_image_sha256"]


# --- runs that build on others -------------------------------------------------------------------


def test_an_imputation_trains_what_it_builds_on_or_takes_the_kept_weights(
    made, root, steps, monkeypatch
):
    monkeypatch.setattr(imputation, "MASKS", imputation.MASKS[:1])
    impute = ("run", "filled", "--seed=0")
    assert root.main(*impute) == 0 and len(steps) == NUM_STEPS
    assert root.state("filled").word == "done" and root.state().word == "partial"
    assert root.main(*RUN) == 0 and len(steps) == NUM_STEPS  # it is evaluated and recorded
    assert root.result_file().with_suffix(".safetensors").read_bytes() == (
        made.result_file().with_suffix(".safetensors").read_bytes()
    )
    before = root.result(study="filled")
    shutil.rmtree(root.folder / "runs")
    assert root.main(*impute, "--again") == 0 and len(steps) == NUM_STEPS
    again = root.result(study="filled")
    assert again.record["per_image_sha256"] == before.record["per_image_sha256"]
    assert runs.read_json(root.run() / "training.json") == {"restored": True}

    root.write({f"{VAE}/epochs": 1})  # the row that it builds on has changed
    assert root.state("filled").word == "stale"
    assert root.main(*impute) == 0 and len(steps) == NUM_STEPS + NUM_STEPS // 4
    assert root.state("filled").word == "done"
    root.write()
    assert root.state("filled").word == "partial"


def test_an_imputation_whose_training_has_failed_says_why(root, capsys):
    root.write({f"{VAE}/learning_rate": 1e6})
    assert root.main("run", "filled", "--seed=0") == 1
    assert "filled/vae-laptop-seed0: failed, " in capsys.readouterr().out
    assert re.match("step 2: loss 'loss' is nan", root.state("filled").record["reason"])


# --- divergence ----------------------------------------------------------------------------------


def test_a_run_that_diverges_is_recorded_as_failed_and_tried_again_only_when_asked(root, capsys):
    for option, is_trained in (([], True), ([], False), (["--again"], True)):
        assert root.main("run", "small", "hot", *option) == 1
        out, error = capsys.readouterr()
        assert (", running" in out) is is_trained
        assert len(re.findall(r"seed\d: failed, .*: step 2: loss 'loss' is nan", out)) == 3
        names = ", ".join(f"small/hot-laptop-seed{seed}" for seed in range(3))
        assert error == f"failed: {names}\n"  # one does not keep the others from running
    record, per_image = root.result(row="hot")
    assert record["status"] == "failed" and record["metrics"] == {} and per_image == {}
    assert not list(root.folder.rglob("*.safetensors"))


def test_a_failure_does_not_wipe_out_what_was_found_before(made, tmp_path, capsys, monkeypatch):
    root = made.copy(tmp_path)
    files = files_below(tmp_path / "data")
    with monkeypatch.context() as patch:  # another machine, for instance
        patch.setattr(amc, "vae_step", lambda *a, **k: {"loss": torch.tensor(torch.nan)})
        assert root.main(*RUN, "--again") == 1
    assert re.search("seed0: failed, .*: step 1: loss 'loss' is nan", capsys.readouterr().out)
    assert files_below(tmp_path / "data") == files and root.state().word == "done"
    # Of other options, it takes the place of a result that no longer answers the question.
    assert root.write({f"{VAE}/learning_rate": 1e6}).main(*RUN) == 1
    assert root.state().word == "failed" and root.result().record["status"] == "failed"
