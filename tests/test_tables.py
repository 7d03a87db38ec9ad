"""Tables of a study: pooled means against hand-computed ones, files found, gaps named."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from amortised import results, tables
from amortised.results import ResultError
from amortised.tables import Pooled
from test_results import make_record

LABELS = {"vae": "VAE", "amc": "AMC", "avb": "AVB"}


def save(root, row, seed, details=None, **per_image):
    per_image = {name: torch.tensor(values) for name, values in per_image.items()}
    record = make_record(per_image, study="amc_table1", row=row, scale="laptop", seed=seed)
    record |= {"details": details} if details else {}
    results.save_result(root, record, per_image)


@pytest.fixture
def root(tmp_path):
    """Two seeds of two rows, whose differences are 1, 3 (seed 0) and 3, 5 (seed 1)."""
    save(tmp_path, "vae", 1, ll=[-2.0, -4.0])
    save(tmp_path, "vae", 0, ll=[-4.0, -6.0], ess=[10.0, 30.0])
    save(tmp_path, "amc", 0, ll=[-3.0, -3.0])
    save(tmp_path, "amc", 1, ll=[1.0, 1.0])
    return tmp_path


def test_pooled_errors_are_those_of_two_way_means():
    values = [torch.tensor([0.0, 2.0, 4.0]), torch.tensor([6.0, 8.0, 10.0])]
    # Images: means 3, 5, 7, sd 2. Seeds: means 2 and 8, sd 6 / sqrt 2.
    assert tables.pool(values) == pytest.approx(Pooled(5.0, 2 / 3**0.5, 3.0, 3, 2))
    assert tables.pool(values[:1]) == Pooled(2.0, 2 / 3**0.5, None, 3, 1)
    with pytest.raises(ValueError, match=r"numbers of images are \[2, 3\]"):
        tables.pool([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(ValueError, match="same images"):
        tables.pool([])


def test_a_study_is_loaded_by_row_and_in_order_of_seeds(root):
    study = tables.load_study("amc_table1", "laptop", root)
    assert {row: [r.record["seed"] for r in found] for row, found in study.items()} == {
        "amc": [0, 1],
        "vae": [0, 1],
    }
    assert tables.load_study("amc_table1", "full", root) == {}
    assert tables.load_study("no_such", "laptop", root) == {}


def test_only_done_results_count_and_a_damaged_one_is_an_error(root):
    failed = make_record(
        study="amc_table1", row="avb", scale="laptop", status="failed", reason="diverged"
    )
    results.save_result(root, failed | {"metrics": {}})
    assert "avb" not in tables.load_study("amc_table1", "laptop", root)
    assert list(tables.load_study("amc_table1", "laptop", root, status="failed")) == ["avb"]
    (root / "amc_table1" / "vae-laptop-seed1.safetensors").write_bytes(b"")
    with pytest.raises(ResultError, match="damaged"):
        tables.load_study("amc_table1", "laptop", root)


def test_the_table_shows_published_and_recorded_values_and_how_to_make_the_rest(root):
    table = tables.study_table(
        "amc_table1", LABELS, "ll", {"vae": "-80.64", "amc": "-78.23"}, root=root
    )
    lines = table.splitlines()
    assert lines[0] == "| row | published | full | laptop |"
    # VAE: images have means -3, -5; seeds -5, -3.
    assert lines[2].split(" | ")[1:] == [
        "-80.64",
        "–",
        "-4.00 ± 1.00 (95 % over seeds ± 12.71) |",
    ]
    assert lines[4].split(" | ")[1:] == ["–", "–", "– |"]
    command = "`python -m amortised.experiments run amc_table1 --scale"
    assert lines[5:] == [
        "",
        f"Runs without a value are made by {command} full` and {command} laptop`.",
    ]
    full = tables.study_table("amc_table1", {"vae": "VAE"}, "ll", scales=["laptop"], root=root)
    assert "made by" not in full and "published" not in full


def test_metrics_stand_side_by_side(root):
    study = tables.load_study("amc_table1", "laptop", root)
    table = tables.metric_table(study, LABELS, {"LL": "ll", "ESS": "ess"}, 1)
    assert table.splitlines()[2:] == [
        "| VAE | -4.0 ± 1.0 (95 % over seeds ± 12.7) | 20.0 ± 10.0 (one seed) |",
        "| AMC | -1.0 ± 0.0 (95 % over seeds ± 25.4) | – |",
        "| AVB | – | – |",
    ]


def test_differences_are_paired_over_images_and_seeds(root):
    study = tables.load_study("amc_table1", "laptop", root)
    pooled, by_seed = tables.paired(study, "amc", "vae", "ll")
    assert pooled == Pooled(3.0, 1.0, 1.0, 2, 2)
    assert [tuple(e) for e in by_seed] == [(2.0, 1.0, 2), (4.0, 1.0, 2)]
    with pytest.raises(ValueError, match="no seed has ll for both avb and vae"):
        tables.paired(study, "avb", "vae", "ll")
    table = tables.paired_table(study, [("amc", "vae"), ("avb", "vae")], "ll", LABELS)
    assert table.splitlines()[2:] == [
        "| AMC minus VAE | 3.00 ± 1.00 (95 % over seeds ± 12.71) | 2.00; 4.00 |",
        "| AVB minus VAE | – | – |",
    ]
    source = {"amc": -78.5, "vae": -80.0}
    table = tables.paired_table(study, [("amc", "vae")], "ll", LABELS, published=source)
    assert table.splitlines()[0] == "| difference | published | in pairs | seed by seed |"
    assert table.splitlines()[2].startswith("| AMC minus VAE | 1.50 | 3.00 ± 1.00 (95 % over seeds")
    table = tables.paired_table(study, [("amc", "vae")], "ll", LABELS, published={"vae": -80.0})
    assert table.splitlines()[2].startswith("| AMC minus VAE | – | 3.00 ± 1.00 (95 % over seeds")


def test_the_runs_behind_a_table_are_named(root):
    study = tables.load_study("amc_table1", "laptop", root)
    table = tables.run_table(study, "amc_table1", LABELS)
    assert "`data/results/amc_table1/vae-laptop-seed{0,1}.json`" in table
    assert table.count("0000000") == 2 and "AVB" not in table


def test_a_table_takes_columns_that_are_given(root):
    study = tables.load_study("amc_table1", "laptop", root)
    given = {"source": {"vae": -3.0}}
    table = tables.metric_table(study, LABELS, {"LL": "ll"}, 1, with_seeds=False, given=given)
    assert table.splitlines()[2] == "| VAE | -4.0 ± 1.0 | -3.0 |"
    assert table.splitlines()[4] == "| AVB | – | – |"


def test_a_page_fails_when_a_number_that_it_prints_has_changed(root):
    """As in a chapter: a table of recorded results, whose print nbval compares."""
    cell = nbformat.v4.new_code_cell(
        "# NBVAL_CHECK_OUTPUT\nfrom amortised import tables\n"
        f'tables.study_table("amc_table1", {LABELS!r}, "ll", scales=["laptop"], root={str(root)!r})'
    )
    page = root / "page.ipynb"
    notebook = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(notebook, kernel_name="python3").execute()
    nbformat.write(notebook, page)
    options = "-q -o addopts= -p no:cacheprovider --nbval-lax --nbval-current-env".split()
    options += ["--nbval-sanitize-with", Path(__file__).with_name("nbval_sanitize.cfg"), page]
    run = [sys.executable, "-m", "pytest", *options]
    assert subprocess.run(run, capture_output=True, cwd=root).returncode == 0
    save(root, "vae", 0, ll=[-4.0, -6.25], ess=[10.0, 30.0])
    changed = subprocess.run(run, capture_output=True, text=True, cwd=root)
    assert changed.returncode == 1 and "mismatch" in changed.stdout
