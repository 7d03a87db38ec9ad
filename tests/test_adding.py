"""The page "Adding your method" is followed: files written, commands run, at tiny sizes."""

from __future__ import annotations

import math
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

from amortised import experiments, results
from amortised.evaluation import load_module

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "book" / "adding.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|yaml|bash)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
TINY = {"training_images": 20, "batch_size": 20, "images": 2, "num_samples": 8}
PYTHON = ".venv/bin/python "


def files() -> dict[str, str]:
    """The files that the page writes: the first line of a block is its name."""
    found: dict[str, str] = {}
    for kind, text in BLOCKS:
        if kind != "bash":
            name = re.match(r"# (\w+\.\w+)(, continued)?\n", text)
            assert name, text
            assert bool(name[2]) == (name[1] in found), f"{name[1]} begins twice, or never"
            found[name[1]] = found.get(name[1], "") + "\n\n" * bool(name[2]) + text[name.end() :]
    return found


def commands() -> list[str]:
    lines = "".join(text.replace("\\\n", " ") for kind, text in BLOCKS if kind == "bash")
    return lines.splitlines()


def test_lines_fit_their_box():
    assert not [line for _, text in BLOCKS for line in text.splitlines() if len(line) > 84]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mine")
    for name, text in files().items():
        (path / name).write_text(text, encoding="utf-8")
    tree = yaml.safe_load((path / "mine.yaml").read_text())
    tree["studies"]["mine"]["scales"]["laptop"] |= TINY
    (path / "mine.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def run(command: str, capsys) -> str:
    """A command of the page, in this process."""
    assert command.startswith(PYTHON), command
    first, *rest = shlex.split(command.removeprefix(PYTHON))
    if first == "-m":
        assert rest.pop(0) == "amortised.experiments"
        assert experiments.main(rest) == 0
    else:
        runpy.run_path(first)
    return capsys.readouterr().out


@pytest.fixture
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield folder
    sys.modules.pop("mine", None)


@pytest.mark.usefixtures("in_folder", "mnist_is_read_once")
def test_the_page_can_be_followed(folder, capsys):
    printed = {command: run(command, capsys) for command in commands()}
    check, listed, made, table, own = printed.values()
    assert check == "mean and variance are those of the target\n"
    rows = yaml.safe_load((folder / "mine.yaml").read_text())["studies"]["mine"]["rows"]
    assert listed.count("missing") == 18 + 1 == 3 * len(rows) + 1  # and the sum below
    assert [line for line in made.splitlines() if "running" in line] == [
        f"mine/{row}-laptop-seed0: missing, running" for row in rows
    ]
    assert made.count(": done, ") == 6
    one, two = table.split("\n| difference")
    for label in ("Langevin", "Barker", "equal means", "wide decoder", "wide decoder, Barker"):
        assert re.search(rf"^\| {label} \| -\d+\.\d\d ± \d+\.\d\d \(one seed\) \|$", one, re.M), one
    assert two.count("(one seed)") == 3 and "even" not in table
    assert own.endswith("mean gap of the sandwich below .05 nats: True\n")
    found = torch.tensor(eval(re.search(r"\[.*?\]", own)[0]))
    z = torch.linspace(-8, 8, 4001).double()
    for x, estimate in zip([[1.8, 1.2, 0.9], [0.4, 0.7, 1.5]], found, strict=True):
        log_x, slope = torch.tensor(x).double().log(), torch.tensor([1.0, 0.5, -0.3]).double()
        errors = (log_x - z[:, None] * slope).square().sum(-1) / (2 * 0.4**2)
        joint = -0.5 * z.square() - errors - 0.5 * math.log(2 * math.pi)
        joint = joint - 3 * math.log(0.4 * math.sqrt(2 * math.pi)) - log_x.sum()
        assert abs(torch.trapezoid(joint.exp(), z).log() - estimate) < 0.01


@pytest.mark.usefixtures("in_folder")
def test_results_say_which_class_and_which_images(folder):
    """After the page: weights of a decoder of one's own are read back, and data have digests."""
    if not (folder / "trial").is_dir():
        pytest.skip("the page was not followed")
    wide = results.load_result(folder / "trial/data/results/mine/wide-laptop-seed0.json").record
    assert wide["config"]["decoder"] == "mine.Wide"
    assert all(name.startswith("mnist/") for name in wide["provenance"]["data_sha256"])
    even = results.load_result(folder / "trial/data/results/mine/even-laptop-seed0.json").record
    digests = even["provenance"]["data_sha256"]
    assert digests.keys() == {"mine.EVEN/train", "mine.EVEN/test"}
    plain = results.load_result(folder / "trial/data/results/mine/langevin-laptop-seed0.json")
    assert "decoder" not in plain.record["config"] and "dataset" not in plain.record["config"]


def test_the_check_of_the_page_finds_a_forgotten_ratio(tmp_path, monkeypatch):
    text = files()["mine.py"]
    wrong = text.replace(" + (back - there).sum(-1)", "")
    assert wrong != text
    (tmp_path / "mine.py").write_text(wrong)
    (tmp_path / "check_mine.py").write_text(files()["check_mine.py"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    with pytest.raises(AssertionError, match=r"mean is -0\.3\d+, not -0\.577"):
        runpy.run_path(str(tmp_path / "check_mine.py"))
    sys.modules.pop("mine")


@pytest.mark.usefixtures("in_folder", "mnist_is_read_once")
@pytest.mark.parametrize("recipe", ["objective", "distillation"])
def test_the_books_own_recipes_take_a_decoder_and_images(folder, tmp_path, recipe):
    """A row of these as it stands in the file, at tiny sizes; of the latter one with a chain."""
    runs = [run for runs in experiments.load_studies().values() for run in runs]
    rules = (None, "inclusive_kl")
    first = next(r for r in runs if r.recipe == recipe and r.config.get("rule") in rules)
    small = TINY | {"hais_images": 0, "num_steps": 1, "epochs": 1, "classifier_images": 20}
    small |= {"diagnostic_images": 0, "num_student_samples": 1}
    common = first.config | {k: v for k, v in small.items() if first.config.get(k)}
    block = {"title": "mine", "recipe": first.recipe, "recipe_version": 1, "seeds": [0]}
    rows = {"both": {"decoder": "mine.Wide", "dataset": "mine.EVEN", "keep": ["decoder"]}}
    block |= {"common": common, "scales": {"laptop": {}}, "rows": rows}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"studies": {"own": block}}))
    places = ["--file", str(tmp_path / "own.yaml"), "--root", str(tmp_path)]
    assert experiments.main([*places, "run", "own"]) == 0
    decoder = load_module(tmp_path / "data/models/own/both-laptop-seed0-decoder.safetensors")
    assert type(decoder).__name__ == "Wide" and decoder.latent_dim == 32
    found = results.load_result(tmp_path / "data/results/own/both-laptop-seed0.json")
    assert torch.isfinite(found.per_image["full_is_ll"]).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": "mine.RECIPES"}, "'mine.RECIPES' cannot be imported: module 'mine' has no"),
        ({"recipe": "mine.MEANS"}, "'mine.MEANS' is none of amc, distillation, "),
        ({"rows": {"a": {"decoder": "mine.MEANS"}}}, "'mine.MEANS' is no BernoulliDecoder of your"),
        (
            {"rows": {"a": {"decoder": "Wide"}}},
            "'Wide' is no BernoulliDecoder of your own, named m",
        ),
        ({"rows": {"a": {"dataset": "mine.Wide"}}}, "'mine.Wide' is no Images of your own"),
        ({"rows": {"a": {"kernel": "baker"}}}, "kernel = 'baker': input should be 'langevin' or"),
    ],
)
@pytest.mark.usefixtures("in_folder")
def test_what_is_not_there_is_named(folder, tmp_path, changes, words):
    tree = yaml.safe_load((folder / "mine.yaml").read_text())
    tree["studies"]["mine"] |= changes
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(experiments.FormatError) as refused:
        experiments.load_studies(tmp_path / "mine.yaml")
    assert words in str(refused.value)
