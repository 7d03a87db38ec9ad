"""The library stays small: short functions, few lines, and little to write for a new study."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from sphinx.pycode import ModuleAnalyzer
from torch.distributions import kl_divergence

import amortised
from amortised import amc, experiments, studies
from amortised.recipes import RECIPES, Recipe, Training, common, evaluate_decoder
from tiny import OPTIONS, Root

MOST_LINES, MOST_LINES_OF_A_FUNCTION = 6_809, 60
MODULES = sorted(Path(amortised.__file__).parent.rglob("*.py"))
LAYOUT = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}


def lines_with_code(text: str) -> set[int]:
    """Numbers of the lines that are no docstring, comment or blank."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {token.start[0] for token in tokens if token.type not in LAYOUT}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def long_functions(text: str, most: int) -> Iterator[str]:
    lines = lines_with_code(text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            count = len(lines & set(range(node.lineno, node.end_lineno + 1)))
            if count > most:
                yield f"{node.name} has {count} lines of code, more than {most}"


def test_lines_with_code_are_counted():
    text = '''"""Head."""

    def f(
        x,  # a comment
    ):
        """Docstring

        of three lines."""
        # another

        return """text
        over two lines"""
    '''.replace("\n    ", "\n")
    assert lines_with_code(text) == {3, 4, 5, 11}
    assert list(long_functions(text, 4)) == []
    assert list(long_functions(text, 3)) == ["f has 4 lines of code, more than 3"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_functions_are_short(path):
    assert not list(long_functions(path.read_text(encoding="utf-8"), MOST_LINES_OF_A_FUNCTION))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_reference_can_read_a_module(path):
    """Where Sphinx cannot, it says nothing and leaves out sources and comments on attributes."""
    ModuleAnalyzer.for_file(path, path.stem).analyze()


def test_the_library_is_small():
    lines = {path: len(lines_with_code(path.read_text(encoding="utf-8"))) for path in MODULES}
    assert sum(lines.values()) <= MOST_LINES, lines


# --- what a new study takes: options, a function that builds, a block of the file -----------------


class BetaOptions(studies.TrainingOptions):
    beta: studies.Positive


def beta_training(config, device="cpu") -> Training:
    """A variational auto-encoder whose divergence from the prior has a weight."""
    networks = {name: common.make_network(name, device) for name in ("decoder", "gaussian")}
    decoder, encoder = networks.values()
    optimizers = {name: common.adam(networks[name], config["learning_rate"]) for name in networks}

    def step(x, index):
        q = encoder(x)
        divergence = kl_divergence(q, decoder.prior())
        loss = config["beta"] * divergence - decoder.likelihood(q.rsample()).log_prob(x)
        return {"loss": amc.descend(loss, *optimizers.values()), "kl": divergence.detach().mean()}

    return Training(step, {"decoder": decoder, "encoder": encoder}, optimizers, {})


BLOCK = """
weighted:
  title: A weight on the divergence
  recipe: beta
  recipe_version: 1
  seeds: [0]
  common: {sizes}
  scales: {{laptop: {{}}}}
  rows:
    half: {{beta: 0.5, keep: [decoder]}}
"""


@pytest.mark.usefixtures("mnist_is_read_once")
def test_a_new_study_is_options_a_function_and_a_block(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "beta", Recipe(beta_training, evaluate_decoder))
    monkeypatch.setitem(studies.OPTIONS, "beta", BetaOptions)
    root = Root(tmp_path)
    fields = studies.TrainingOptions.model_fields
    sizes = {name: OPTIONS[name] for name, field in fields.items() if field.is_required()}
    block = yaml.safe_load(BLOCK.format(sizes=sizes))
    root.file.write_text(yaml.safe_dump({"studies": block}))
    assert root.main("run", "weighted", "half") == 0
    result = root.result(study="weighted", row="half")
    assert result.record["details"]["history"].keys() == {"loss", "kl"}
    assert torch.isfinite(result.per_image["ais_ll"]).all()
    (experiment,) = root.experiments("weighted", "half")
    assert experiments.state_of(experiment, tmp_path).word == "done"
    assert (tmp_path / "data/models/weighted/half-laptop-seed0-decoder.safetensors").is_file()
