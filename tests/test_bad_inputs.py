"""What cannot be is refused before any work, by the project's own words.

Each row of the tables below is a bad input, what it is given to, and words of the message: the name
of what is wrong, its value, or what may stand in its place. A function raises an error of its own,
not one from the depths of a library; a command ends with exit code 2 and says so on standard error,
has done nothing, and shows no traceback.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import execute
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save
from torch import nn
from torch.distributions import Independent, Normal

from amortised import (
    ais,
    checks,
    data,
    divergences,
    encoders,
    evaluation,
    experiments,
    fast,
    hvae,
    imputation,
    mcmc,
    mcvae,
    models,
    numerics,
    objectives,
    plotting,
    results,
    runs,
    studies,
    training,
)
from amortised.files import DamagedFileError, load_tree, save_tree
from tiny import Root, changed

ROOT = data.data_folder().parent
OWN = (str(ROOT / "lib"), str(ROOT / "workflow"))


class Bad(NamedTuple):
    name: str
    call: Callable[[], object]
    words: str


def rows(*table: tuple[str, Callable[[], object], str]) -> list[Bad]:
    return [Bad(*row) for row in table]


def check(bad: Bad) -> None:
    """The call raises an error with these words, from a line of this project's own code."""
    with pytest.raises((ValueError, TypeError, RuntimeError, OSError)) as caught:
        bad.call()
    message = str(caught.value)
    assert bad.words in message, message
    if not isinstance(caught.value, OSError):
        last = traceback.extract_tb(caught.value.__traceback__)[-1]
        assert last.filename.startswith(OWN), f"{last.filename}:{last.lineno}: {message}"


# --- functions -----------------------------------------------------------------------------------

MODEL = models.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0).requires_grad_(False)
DECODER, ENCODER = models.ConvBernoulli(2).requires_grad_(False), encoders.GaussianEncoder(2)
X, DIGITS = torch.tensor([[1.5, 0.5], [0.0, -1.0]]), torch.zeros(3, 784)
Z = torch.zeros(4, 2, 1)
Q, Q_3 = (Independent(Normal(torch.zeros(n, 1), torch.ones(n, 1)), 1) for n in (2, 3))
NO_Q, EMPTY = Independent(Normal(torch.zeros(0, 1), torch.ones(0, 1)), 1), X[:0]
PATH = ais.AnnealedPath(MODEL.prior().log_prob, partial(MODEL.log_likelihood, X))
SETTINGS = ais.AISSettings(ais.linear_schedule(4), 0.1, 1)
NAN, INF = math.nan, math.inf


def target(z):
    return -0.5 * z.square().sum(-1)


def each(name, values, call, words) -> Iterator[Bad]:
    """One row for each value, which the message shows."""
    for value in values:
        shown = words.format(value) if "{" in words else words
        yield Bad(f"{name}={value!r}", partial(call, value), shown)


STEP_SIZES = (0, 0.0, -0.1, NAN, INF, -INF, "0.1", None, True, 1j, torch.tensor([0.1, 0.0]))
KERNELS = {
    "metropolis_step": lambda s: mcmc.metropolis_step(Z, target, s),
    "langevin_step": lambda s: mcmc.langevin_step(Z, target, s),
    "mala_step": lambda s: mcmc.mala_step(Z, target, s),
    "hmc_step": lambda s: mcmc.hmc_step(Z, target, s, 2),
    "leapfrog": lambda s: mcmc.leapfrog(Z, Z, target, s, 2),
}
COUNTS = (0, -1, 2.0, NAN, True, None, "3", 10.5)
COUNTED = {
    "iwae_bound": lambda k: objectives.iwae_bound(MODEL, Q, X, k),
    "dreg_surrogate": lambda k: objectives.dreg_surrogate(MODEL, Q, X, k),
    "wake_phi_loss": lambda k: objectives.wake_phi_loss(MODEL, Q, X, k),
    "importance_sampling_ll": lambda k: evaluation.importance_sampling_ll(
        MODEL, MODEL.posterior, X, num_samples=k
    ),
    "bdmc_ll": lambda k: evaluation.bdmc_ll(MODEL, k),
    "linear_schedule": ais.linear_schedule,
    "hmc_step": lambda k: mcmc.hmc_step(Z, target, 0.1, k),
    "ImplicitEncoder": lambda k: encoders.ImplicitEncoder(2)(DIGITS, k or 0),
}
SEEDS = (-1, 2**63, 2**64, 10**30, 1.0, "0", None, True)
SEEDED = {
    "hais_ll": lambda s: evaluation.hais_ll(MODEL, X, seed=s),
    "fit_full_covariance": lambda s: evaluation.fit_full_covariance(MODEL, X, seed=s),
    "fit_gaussian_proposal": lambda s: evaluation.fit_gaussian_proposal(DECODER, DIGITS, seed=s),
    "fit": lambda s: training.fit(dict, torch.zeros(4), {}, epochs=1, batch_size=2, seed=s),
    "seeded": lambda s: numerics.seeded(s, torch.device("cpu")).__enter__(),
}


class NoDensity(torch.distributions.Distribution):
    arg_constraints = {}  # noqa: RUF012

    def __init__(self):
        super().__init__(torch.Size([2]), torch.Size([1]), validate_args=False)


FUNCTIONS = [
    *(b for n, f in KERNELS.items() for b in each(f"{n} step_size", STEP_SIZES, f, "step_size")),
    *(b for n, f in COUNTED.items() for b in each(f"{n} count", COUNTS, f, "must be an integer")),
    *(b for n, f in SEEDED.items() for b in each(f"{n} seed", SEEDS, f, "seed must be ")),
    *each("persistence", (1.0, -0.1, NAN, INF), lambda a: ais.ais(
        PATH, Z, SETTINGS._replace(persistence=a)), "persistence must lie in [0, 1); got {}"),
    *each("AIS step_size", (0.0, -1.0, NAN, INF), lambda s: ais.ais(
        PATH, Z, SETTINGS._replace(step_size=s)), "step_size must be positive and finite; got {}"),
    *each("schedule", ([0.0], [0.0, 0.0, 1.0], [0.1, 1.0], [0.0, 0.9], [1.0, 0.0], [0.0, NAN, 1.0]),
        lambda s: ais.ais(PATH, Z, SETTINGS._replace(schedule=s)), "schedule must"),
    *each("hvae step_size", (0, -1, 0.5, 9.0, NAN), lambda s: hvae.HamiltonianFlow(
        1, 2, step_size=s), "step_size must lie in (0, 0.5); got {}"),
    *each("bridge persistence", (1.0, -0.5, NAN), lambda p: mcvae.Bridge(
        1, 2, persistence=p), "persistence must lie in [0, 1); got {}"),
    *each("beta0", (0.0, 1.0, -1.0, NAN), lambda b: hvae.HamiltonianFlow(
        1, 2, "paper", beta0=b), "beta0"),
    *each("tempering", ("Paper", "", None), lambda t: hvae.HamiltonianFlow(
        1, 2, t), "tempering must be one of"),
    *each("fraction", (-0.1, 1.1, NAN), lambda f: imputation.missing_mask(
        "random", f), "fraction must lie between 0 and 1; got {}"),
    *each("mask", ("left", "", None), imputation.missing_mask, "kind must be one of"),
    *each("split", ("training", "", None, 0), data.load_mnist, "unknown split"),
    *each("dtype", (torch.float64, torch.int64, None), lambda d: data.load_mnist(
        "test", d), "dtype {} is not served"),
    *each("drawn images", (0, -1, 10_001), data.drawn_images, "num_images must be from 1 to"),
    *each("route", ("fast", "", None), lambda r: fast.log_likelihood_and_grad(
        DECODER, DIGITS, r), "route must be one of auto, eager, rewritten, dense; got"),
    *each("observation", ("grey", None), lambda o: models.DeepLatentGaussian(
        [2], 784, o), "observation must be binary, real or counts; got {!r}"),
    *each("latent_dim", (0, -3, 2.5, "2", None), lambda d: models.LatentVariableModel(
        d, 3), "latent_dim must be an integer, at least 1; got {!r}"),
    *each("noise", ("normal", None), lambda n: encoders.ImplicitEncoder(
        2, n), "noise must be 'gaussian' or 'bernoulli'; got {!r}"),
    *each("noise_scale", (0.0, -1.0, NAN), lambda s: models.LinearGaussian(
        torch.ones(2, 1), torch.zeros(2), s), "noise_scale must be a positive scalar; got {}"),
    *each("published", ("amd", "", "../amc"), results.load_published, "no published numbers {!r}"),
    *each("choice of annealing", ({"num_chain": 3}, {"temperature": 1}), lambda kw:
        evaluation.hais_ll(MODEL, X, **kw), "no setting is called"),
]  # fmt: skip
FUNCTIONS += rows(
    ("empty batch, iwae", lambda: objectives.iwae_bound(MODEL, NO_Q, EMPTY, 3), "(0, 2)"),
    ("empty batch, dreg", lambda: objectives.dreg_surrogate(MODEL, NO_Q, EMPTY, 3), "one"),
    ("empty batch, pq", lambda: objectives.pq_loss(MODEL.posterior, EMPTY, Z[0, :0]), "not be"),
    ("empty batch, hais", lambda: evaluation.hais_ll(MODEL, EMPTY), "N at least 1; got (0, 2)"),
    ("empty log_mean_exp", lambda: numerics.log_mean_exp(torch.zeros(0, 2), 0), "no value along"),
    ("two shapes, pq", lambda: objectives.pq_loss(MODEL.posterior, X, Z[0, :1]), "batch shape"),
    ("q of another batch", lambda: objectives.iwae_bound(MODEL, Q_3, X, 3), "(3,)"),
    ("q is a tensor", lambda: objectives.elbo(MODEL, Z[0], X), "a Tensor is none"),
    ("q is an encoder", lambda: objectives.elbo(DECODER, ENCODER, DIGITS), "Encoder is none"),
    ("q has no density", lambda: objectives.elbo(MODEL, NoDensity(), X), "a NoDensity is none"),
    ("proposal is a decoder", lambda: evaluation.importance_sampling_ll(
        DECODER, DECODER, DIGITS), "a proposal maps x to a law of z; a ConvBernoulli does not"),
    ("proposal is a law", lambda: evaluation.importance_sampling_ll(MODEL, Q, X), "Independent"),
    ("proposal has no density", lambda: evaluation.importance_sampling_ll(
        MODEL, lambda x: NoDensity(), X), "a NoDensity is none"),
    ("proposal is implicit", lambda: evaluation.importance_sampling_ll(
        DECODER, encoders.ImplicitEncoder(2), DIGITS), "a Tensor is none"),
    ("proposal of another size", lambda: evaluation.importance_sampling_ll(
        DECODER, encoders.GaussianEncoder(3), DIGITS), "has latents [2], the proposal [3]"),
    ("start of another size", lambda: evaluation.hais_ll(
        DECODER, DIGITS, start=encoders.GaussianEncoder(3)), "has latents [2], the proposal [3]"),
    ("start is a decoder", lambda: evaluation.hais_ll(DECODER, DIGITS, start=DECODER), "law of z"),
    ("dropout", lambda: evaluation.hais_ll(models.BernoulliDecoder(
        nn.Sequential(nn.Linear(2, 784), nn.Dropout()), 2, 784), DIGITS), "call model.eval()"),
    ("batch norm", lambda: evaluation.hais_ll(models.BernoulliDecoder(
        nn.Sequential(nn.Linear(2, 784), nn.BatchNorm1d(784)), 2, 784), DIGITS), "BatchNorm1d is"),
    ("grey images", lambda: evaluation.hais_ll(DECODER, DIGITS + 0.5), "must hold zeros and ones"),
    ("flat images", lambda: evaluation.hais_ll(DECODER, DIGITS[0]), "must be [N, 784]"),
    ("square images", lambda: evaluation.hais_ll(
        DECODER, DIGITS.view(3, 28, 28)), "must be [N, 784], N at least 1; got (3, 28, 28)"),
    ("grey images, fast", lambda: fast.log_likelihood_and_grad(DECODER, DIGITS + 0.5), "zeros and"),
    ("z of another size", lambda: MODEL.log_joint(X, torch.zeros(2, 3)), "latent_dim=1"),
    ("x of another size", lambda: MODEL.log_joint(X[:, :1], Z), "observation_dim=2"),
    ("image not fitted", lambda: evaluation.fit_full_covariance(
        MODEL, X, num_steps=1)(X + 1), "image 0 was not fitted"),
    ("integer positions", lambda: mcmc.hmc_step(Z.long(), target, 0.1, 1), "torch.int64"),
    ("log-density of another shape", lambda: mcmc.hmc_step(Z, lambda z: z, 0.1, 1), "[..., D] to"),
    ("positions of two dimensions", lambda: ais.ais(PATH, Z[0], SETTINGS), "must be [K, B, D]"),
    ("no chains", lambda: ais.ais(PATH, Z[:0], SETTINGS), "must be [K, B, D]"),
    ("integer chains", lambda: ais.ais(PATH, Z.long(), SETTINGS), "floating-point"),
    ("first step outside", lambda: ais.tune_step_size(
        PATH, Z, SETTINGS, bounds=(0.2, 1.0)), "bounds must be positive and hold"),
    ("acceptance of one", lambda: ais.tune_step_size(
        PATH, Z, SETTINGS, target_acceptance=1.0), "target_acceptance must lie in (0, 1); got 1.0"),
    ("thin", lambda: mcmc.sample_chain(lambda z: z, Z, 3, thin=0), "thin must be an integer"),
    ("burn_in", lambda: mcmc.sample_chain(lambda z: z, Z, 3, burn_in=-1), "burn_in must be"),
    ("short chain", lambda: mcmc.split_rhat(torch.zeros(3, 1)), "at least 4 states"),
    ("baseline of one", lambda: objectives.score_function_surrogate(X[:1], X[:1]), "at least 2"),
    ("training under inference_mode", lambda: torch.inference_mode()(lambda: training.fit(
        dict, X, {}, epochs=1, batch_size=1))(), "inside torch.inference_mode()"),
    ("batch above the data", lambda: training.fit(
        dict, X, {}, epochs=1, batch_size=3), "data has 2 examples, fewer than one batch of 3"),
    ("data of two lengths", lambda: training.fit(
        dict, (X, X[:1]), {}, epochs=1, batch_size=1), "agree in the first dimension"),
    ("data is a list", lambda: training.fit(
        dict, [1.0], {}, epochs=1, batch_size=1), "data must be a tensor"),
    ("state is a number", lambda: training.fit(
        dict, X, {"rate": 0.1}, epochs=1, batch_size=1), "state['rate'] is a float"),
    ("no passes", lambda: training.fit(dict, X, {}, epochs=0, batch_size=1), "epochs must be"),
    ("one image", lambda: results.mean_and_se([1.0]), "a standard error needs at least 2"),
    ("a value that is none", lambda: results.mean_and_se([1.0, NAN]), "1 values of 2 that are not"),
    ("a table of values", lambda: results.mean_and_se(X), "shape (2, 2)"),
    ("other images", lambda: results.paired_difference([1.0, 2.0], [1.0]), "pair the same ones"),
    ("ragged table", lambda: results.markdown_table(["a"], [[1, 2]]), "row 0 has 2 cells"),
    ("levels as grey values", lambda: data.binarise(DIGITS + 255), "not in [0, 1]"),
    ("integer grey values", lambda: data.binarise(DIGITS.long()), "dtype torch.int64"),
    ("nan as grey value", lambda: data.binarise(DIGITS + NAN), "not in [0, 1]"),
    ("unknown data set", lambda: data.fetch("mnits"), "unknown data set 'mnits'; choose from"),
    ("unknown file", lambda: data.read_bytes("mnist", "a.gz"), "has no file 'a.gz', but"),
    ("regression on two", lambda: evaluation.regression_mean(
        torch.zeros(2), torch.arange(2), torch.zeros(9)), "n at least 3"),
    ("regression, an image twice", lambda: evaluation.regression_mean(
        torch.zeros(3), torch.zeros(3).long(), torch.zeros(9)), "must be 3 different numbers"),
    ("regression, no variation", lambda: evaluation.regression_mean(
        torch.zeros(3), torch.arange(3), torch.zeros(9)), "take another one"),
    ("grids of two sizes", lambda: divergences.kl(torch.zeros(3), torch.zeros(4), 0.1), "(4,)"),
    ("columns of digits", lambda: plotting.mosaic(DIGITS, 0), "ncols must be at least 1, got 0"),
    ("pixels above one", lambda: plotting.mosaic(DIGITS + 2, 1), "pass probabilities"),
    ("pixels of no square", lambda: plotting.mosaic(DIGITS[:, :7], 1), "7 pixels are no squares"),
    ("device", lambda: runs.check_device("gpu"), "device 'gpu': must be a device of this"),
    ("configuration with nan", lambda: results.config_hash({"a": NAN}), "cannot be JSON"),
    ("configuration with a number as key", lambda: results.config_hash({1: 2}), "the key 1 is no"),
    ("configuration with numpy", lambda: results.config_hash(
        {"a": np.float32(1)}), "cannot be JSON"),
    ("configuration is a list", lambda: results.config_hash([1]), "config is a list"),
)  # fmt: skip


@pytest.mark.parametrize("bad", FUNCTIONS, ids=lambda bad: bad.name)
def test_functions_name_what_is_wrong(bad):
    check(bad)


# --- files ---------------------------------------------------------------------------------------

ARCHITECTURE = {"class": "ConvBernoulli", "latent_dim": 2}
FACTS = {"study": "s", "row": "vae", "scale": "laptop", "seed": 0}
ARCHITECTURES = [
    ({}, "its class is 'None'"),
    ({"class": "Foo"}, "its class is 'Foo'"),
    ({"class": 5}, "its class is '5'"),
    ({"class": "Tensor"}, "its class is 'Tensor', which is no model or encoder"),
    ({"class": "os"}, "its class is 'os'"),
    ({"class": "GaussianEncoder"}, "its architecture has 3"),
    (ARCHITECTURE | {"latent_dim": 10**12}, "has 500,000,000,295,861 numbers, the file 296,861"),
    (ARCHITECTURE | {"latent_dim": 10**9}, "its architecture has 500,000,295,861 numbers"),
    (ARCHITECTURE | {"latent_dim": 3}, "its architecture has 297,361 numbers"),
    (ARCHITECTURE | {"latent_dim": -1}, "is damaged or of something else"),
    (ARCHITECTURE | {"latent_dim": "2"}, "is damaged or of something else"),
    (ARCHITECTURE | {"latent_dim": 2.5}, "is damaged or of something else"),
    (ARCHITECTURE | {"latent_dim": None}, "is damaged or of something else"),
    (ARCHITECTURE | {"width": 3}, "unexpected keyword argument 'width'"),
    ([], "its class is 'None'"),
    (None, "is damaged or not of this project"),
    ("ConvBernoulli", "is damaged or not of this project"),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    results.save_weights(path, DECODER, ARCHITECTURE, FACTS)
    return path


@pytest.mark.parametrize(("architecture", "words"), ARCHITECTURES, ids=str)
def test_a_malformed_architecture_is_refused_before_anything_large_is_made(
    tmp_path, architecture, words
):
    described = json.dumps({"architecture": architecture, "details": {}})
    path = tmp_path / "a.safetensors"
    content = save(DECODER.state_dict(), metadata={"amortised": described})
    path.write_bytes(content)
    beside = f"{hashlib.sha256(content).hexdigest()}  {path.name}\n"
    path.with_name(f"{path.name}.sha256").write_text(beside, encoding="utf-8")
    check(Bad("", partial(evaluation.load_module, path), words))


CHANGES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "one byte less": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    "pickle": lambda content: b"\x80\x04\x95" + content,
    "length of 2^63": lambda content: b"\xff" * 7 + b"\x7f" + content[8:],
    "last bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "another seed": lambda content: content.replace(b'\\"seed\\":0', b'\\"seed\\":1', 1),
    "another row": lambda content: content.replace(b"vae", b"avb", 1),
    "no seal": lambda content: content.replace(b"SHA-256", b"SHA-257", 1),
    "text": lambda content: b"hello, world\n",
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_weights_are_refused(weights, tmp_path, name):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(CHANGES[name](weights.read_bytes()))
    check(Bad(name, partial(evaluation.load_module, path), f"{path} is damaged or not of this"))


@pytest.mark.parametrize(("name", "words"), [
    ("models/t/vae-laptop-seed0-decoder", "study is s"),
    ("models/s/iwae-laptop-seed0-decoder", "row is vae"),
    ("s/vae-full-seed0-decoder", "scale is laptop"),
    ("vae-laptop-seed1-decoder", "seed is 0"),
    ("runs/s/amc-laptop-seed0-1a2b3c4d/decoder", "row is vae"),
])  # fmt: skip
def test_weights_of_one_run_do_not_load_as_those_of_another(weights, tmp_path, name, words):
    path = tmp_path / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(weights.read_bytes())
    check(Bad(name, partial(evaluation.load_module, path), words))


@pytest.mark.parametrize("name", ["empty", "half", "one byte less", "pickle", "last bit", "text"])
def test_changed_stages_are_refused(tmp_path, name):
    path = tmp_path / "a.stage"
    save_tree(path, {"step": 3, "z": torch.ones(3)})
    path.write_bytes(CHANGES[name](path.read_bytes()))
    with pytest.raises(DamagedFileError, match=r"is damaged .* remove it to start afresh"):
        load_tree(path)


VALUES = {"elbo": torch.tensor([-90.125, -92.5, -85.0])}
PROVENANCE = {"commit": None, "dirty": None, "versions": {}, "device": {"name": "test"}}
PROVENANCE |= {"started": "2001-01-01T00:00:00+00:00", "wall_seconds": 1.5, "data_sha256": {}}
RECORD = FACTS | {"config": {"epochs": 2}, "config_hash": results.config_hash({"epochs": 2})}
RECORD |= {"recipe_version": 1, "status": "done", "metrics": results.summarise(VALUES)}
RECORD |= {"provenance": PROVENANCE, "details": {"cpu_seconds": 3.5}}
EDITS = [  # what is replaced in the text of a result, by what, and words of the refusal
    ('"seed": 0', '"seed": 1, "seed": 0', "edited or is damaged"),
    ('"seed": 0', '"seed": -1', "seed = -1"),
    ('"wall_seconds": 1.5', '"wall_seconds": -1.5', "wall_seconds = -1.5"),
    ('"wall_seconds": 1.5', '"wall_seconds": 1.25', "edited or is damaged"),
    ('"cpu_seconds": 3.5', '"cpu_seconds": NaN', "edited or is damaged"),
    (
        '"metrics": {',
        '"metrics": {"hais": {"mean": 1.0, "se": 0.1, "n": 3}, ',
        "'hais' has no values",
    ),
    ('"n": 3', '"n": 4', "its per-image values give"),
    ('"n": 3', '"n": 0', "departs from its format"),
    ('"mean": -89', '"mean": -88', "its per-image values give"),
    ('"status": "done"', '"status": "failed"', "reason must be stated"),
    ('"status": "done"', '"status": "finished"', "status = 'finished'"),
    ('"row": "vae"', '"row": "avb"', "it is the result s/avb-laptop-seed0.json by its content"),
    ('"row": "vae"', '"row": "../vae"', "row = '../vae'"),
    ('"epochs": 2', '"epochs": 3', "config_hash is not that of config"),
    ('"epochs": 2', '"epochs": 2.0', "edited or is damaged"),
    ('"study"', '"studio"', "unknown name 'studio'"),
    ('"name": "test"', '"name": "rest"', "edited or is damaged"),
    ('"started": "2001', '"started": "2002', "edited or is damaged"),
    ('"recipe_version": 1', '"recipe_version": 2', "edited or is damaged"),
    ('"commit": null', '"commit": "%s"' % (40 * "a"), "edited or is damaged"),
    ('"details": {', '"remark": {', "unknown name 'remark'"),
    ("{", 100_000 * "[", "recursion"),
    ("}", "", "Run this row again"),
    ("\n", "\r\n", "edited or is damaged"),
]


@pytest.mark.parametrize(("old", "new", "words"), EDITS, ids=lambda text: repr(text[:40]))
def test_edited_results_are_refused(tmp_path, old, new, words):
    path = results.save_result(tmp_path, copy.deepcopy(RECORD), VALUES)
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_bytes(text.replace(old, new).encode())
    check(Bad(old, partial(results.load_result, path), words))


@pytest.mark.parametrize("name", [n for n in CHANGES if n not in ("another seed", "no seal")])
def test_changed_values_per_image_are_refused(tmp_path, name):
    path = results.save_result(tmp_path, copy.deepcopy(RECORD), VALUES)
    values = path.with_suffix(".safetensors")
    values.write_bytes(CHANGES[name](values.read_bytes()))
    check(Bad(name, partial(results.load_result, path), "it is damaged or of another run"))
    values.unlink()
    check(Bad(name, partial(results.load_result, path), "its per-image values, vae-laptop-seed0"))


# --- parameters of chapters ----------------------------------------------------------------------

PARAMETERS = [
    *each("epochs", (0, -1, 51, 10**9, 2.0, "2", None, True, NAN), lambda v: checks.parameters(
        {"epochs": v}, epochs=checks.integer(1, 50)), "parameter epochs = {!r}: must"),
    *each("seed", (-1, 2**63, 10**30, 0.5, "0", None), lambda v: checks.parameters(
        {"seed": v}, seed=checks.integer(0, 2**63 - 1)), "parameter seed = {!r}: must"),
    *each("rate", (0.0, -1.0, INF, NAN, "1e-3", None, True), lambda v: checks.parameters(
        {"rate": v}, rate=checks.real(0.0, 1.0, open="minimum")), "parameter rate = {!r}: must"),
    *each("rule", ("Forward", "", None, 0), lambda v: checks.parameters(
        {"rule": v}, rule=checks.choice("forward", "reverse")), "one of 'forward', 'reverse'"),
    *each("retrain", (0, 1, "yes", None), lambda v: checks.parameters(
        {"retrain": v}, retrain=checks.boolean()), "parameter retrain = {!r}: must"),
    *each("device", ("gpu", "cuda:99", "", None, 0), lambda v: checks.parameters(
        {"device": v}, device=checks.device()), "device = {!r}: must be a device of"),
    *rows(("not defined", lambda: checks.parameters({}, a=checks.boolean()), "a: not defined"),
        ("no choice", checks.choice, "at least one name"),
        ("mistyped", lambda: checks.parameters({"In": ["# Parameters\nepoch = 2"], "epochs": 1},
            epochs=checks.integer()), "Did you mean epochs?")),
]  # fmt: skip


@pytest.mark.parametrize("bad", PARAMETERS, ids=lambda bad: bad.name)
def test_parameters_of_chapters_are_named(bad):
    check(bad)


FILES = {
    "- 1": "is no mapping of names to values",
    "hello": "is no mapping",
    "5": "is no mapping",
    "a: [": "is not YAML",
    "a: {b": "is not YAML",
    "a:\n\t- 1": "is not YAML",
    "a: '\0'": "is not YAML",
    "a: 1\n---\nb: 2": "is not YAML",
    "a: &x [*x]": "without an alias",
    "a: &x [1]\nb: *x": "without an alias",
    "a: 2020-01-01": "holds more than plain data",
    "a: !!binary aGk=": "holds more than plain data",
    "a: !!set {b}": "holds more than plain data",
    "a: !!python/object/apply:os.system [ls]": "is not YAML",
    "class: 1": "'class' is no name of a parameter",
    "a b: 1": "'a b' is no name of a parameter",
    "1: 1": "1 is no name of a parameter",
    "'a = 1; import os #': 1": "is no name of a parameter",
    "null: 1": "None is no name of a parameter",
    1500 * "- ": "holds more than plain data",
}


@pytest.mark.parametrize("text", FILES, ids=lambda text: repr(text[:40]))
def test_files_of_parameters_are_data(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    check(Bad(text, partial(execute.read_parameters, path), FILES[text]))


PLACES = [
    ((), "required: source"),
    (("none.py",), "there is no chapter none.py"),
    ((".",), "there is no chapter ."),
    (("bad.yaml",), "there is no chapter bad.yaml"),
    (("chapter.py", "no/out.ipynb"), "no: make it"),
    (("chapter.py", "."), "is a folder"),
    (("chapter.py", "out.ipynb", "--timing", "no/time.json"), "needs a folder no: make it"),
    (("chapter.py", "out.ipynb", "--parameters", "none.yaml"), "none.yaml cannot be read"),
    (("chapter.py", "out.ipynb", "--parameters", "."), ". cannot be read"),
    (("chapter.py", "out.ipynb", "--parameters", "bad.yaml"), "bad.yaml is not YAML"),
    (("chapter.py", "out.ipynb", "--parameters", "latin.yaml"), "latin.yaml is not YAML"),
]


@pytest.mark.parametrize(("arguments", "words"), PLACES, ids=str)
def test_the_executor_refuses_before_the_chapter_runs(
    tmp_path, monkeypatch, capsys, arguments, words
):
    (tmp_path / "chapter.py").write_text("# %%\nopen('ran', 'w')\n", encoding="utf-8")
    (tmp_path / "bad.yaml").write_text("[", encoding="utf-8")
    (tmp_path / "latin.yaml").write_bytes("a: 'é'".encode("latin-1"))
    files = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(execute.os, "environ", {})
    refuses(capsys, execute.main, words, *arguments)
    assert sorted(tmp_path.iterdir()) == files


# --- studies -------------------------------------------------------------------------------------

COMMON = "small/common"
STUDIES = {
    ("small/seeds", ()): "seeds = []",
    ("small/seeds", (0, 0)): "holds a value twice",
    ("small/seeds", (-1,)): "seeds[0] = -1",
    ("small/seeds", (2**64,)): "seeds[0] = 18446744073709551616",
    ("small/seeds", ("0",)): "seeds[0] = '0'",
    ("small/seeds", (1.5,)): "seeds[0] = 1.5",
    ("small/rows/vae/seeds", ()): "seeds = []",
    ("small/rows/vae/seeds", (2**63,)): "seeds[0] = 9223372036854775808",
    ("small/rows/vae/scales", ()): "scales = []",
    ("small/rows/vae/scales", ("huge",)): "scales[0] = 'huge'",
    ("small/rows/vae/keep", ("x",)): "keep[0] = 'x'",
    ("small/rows/vae", 5): "rows.vae = 5",
    ("small/rows/Bad Name", None): "",
    ("small/scales", None): "scales is missing",
    ("small/scales/huge", 1): "scales.huge",
    ("small/recipe", "vea"): "recipe: 'vea' is none of amc, ",
    ("small/recipe", None): "recipe is missing",
    ("small/recipe_version", 0): "recipe_version = 0",
    ("small/recipe_version", 1.5): "recipe_version = 1.5",
    ("small/title", 5): "title = 5",
    ("small/title", None): "title is missing",
    ("small/common", None): "common is missing",
    ("small/extra", 1): "unknown name 'extra'",
    ("filled/rows/vae/trained", "nope"): "there is no run small/nope-laptop-seed0 to build on",
    ("filled/common/trained_study", "nope"): "there is no run nope/vae-laptop-seed0 to build on",
    (f"{COMMON}/learning_rate", 0.0): "learning_rate = 0.0",
    (f"{COMMON}/learning_rate", -1.0): "learning_rate = -1.0",
    (f"{COMMON}/learning_rate", INF): "learning_rate = inf",
    (f"{COMMON}/learning_rate", NAN): "learning_rate = nan",
    (f"{COMMON}/learning_rate", "1e-3"): "1.0e-3 as a number",
    (f"{COMMON}/learning_rate", int(400 * "9")): "learning_rate = 9999",
    (f"{COMMON}/learning_rate", None): "learning_rate is missing",
    (f"{COMMON}/learnin_rate", 0.1): "unknown name 'learnin_rate'",
    (f"{COMMON}/epochs", 0): "epochs = 0",
    (f"{COMMON}/epochs", 2.0): "epochs = 2.0",
    (f"{COMMON}/epochs", True): "epochs = True",
    (f"{COMMON}/batch_size", 101): "batch_size = 101 is more than training_images = 100",
    (f"{COMMON}/batch_size", 0): "batch_size = 0",
    (f"{COMMON}/training_images", 60_001): "training_images = 60001",
    (f"{COMMON}/training_images", 10**12): "training_images = 1000000000000",
    (f"{COMMON}/images", 1): "images = 1",
    (f"{COMMON}/images", 10_001): "images = 10001",
    (f"{COMMON}/num_chains", 0): "num_chains = 0",
    (f"{COMMON}/num_chains", 10**15): "num_chains = 1000000000000000",
    (f"{COMMON}/num_samples", "5"): "num_samples = '5'",
    (f"{COMMON}/simulated_pairs", 1): "simulated_pairs = 1",
    (f"{COMMON}/step_size", NAN): "step_size = nan",
    (f"{COMMON}/step_size", -0.1): "step_size = -0.1",
    (f"{COMMON}/method", "VAE"): "method = 'VAE'",
    (f"{COMMON}/method", "amc"): "does not go with",
    (f"{COMMON}/encoder", "cnn_g"): "encoder = 'cnn_g' does not go with method = 'vae'",
    (f"{COMMON}/kernel", "langevin"): "kernel = 'langevin' does not go with method = 'vae'",
    (f"{COMMON}/rule", "gan"): "rule = 'gan' does not go with",
    (f"{COMMON}/evaluation_dtype", "float64"): "evaluation_dtype = 'float64'",
}  # fmt: skip


@pytest.mark.parametrize("case", STUDIES, ids=lambda case: f"{case[0]}={case[1]!r:.30}")
def test_studies_name_what_is_wrong(tmp_path, case):
    path, value = case
    value = list(value) if isinstance(value, tuple) else value
    tree = changed({path: value}) if path != "small/rows/Bad Name" else changed()
    if path == "small/rows/Bad Name":
        tree["studies"]["small"]["rows"]["Bad Name"] = {}
    file = tmp_path / "studies.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    check(Bad(path, partial(studies.load_studies, file), STUDIES[case] or "'Bad Name'"))


@pytest.mark.parametrize("part", ["rows", "scales"])
def test_a_study_of_nothing_is_refused(tmp_path, part):
    file = tmp_path / "studies.yaml"
    file.write_text(yaml.safe_dump(changed({f"small/{part}": {}})), encoding="utf-8")
    check(Bad(part, partial(studies.load_studies, file), f"{part} = {{}}"))


TEXTS = {
    "": "top level = None",
    "[]": "top level = []",
    "hello": "top level = 'hello'",
    "studies: 5": "studies = 5",
    "studies: {a: 1}": "studies.a = 1",
    "studies: {null: 1}": "studies",
    "studies: {A: {}}": "'A': string should match pattern",
    "study: {}": "unknown name 'study'",
    "studies: {}\nstudies: {}": "'studies' stands there twice",
    "a: [": "is not YAML",
    "studies:\n\ta: 1": "is not YAML",
    "studies: '\0'": "is not YAML",
    "studies: !!python/object/apply:os.system [ls]": "is not YAML",
    "studies: {}\n---\nstudies: {}": "is not YAML",
    "studies: &a\n  b: *a": "studies.b: unknown name 'b'",
    # Forty lines, each twice the one before it: 2 ** 40 values when it is unfolded.
    "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 41)): "a40",
    1500 * "- ": "nested too deeply, or in itself",
    "studies: {}": "studies = {}",
    "studies: {a: %s}" % (5000 * "9"): "studies.yaml is not YAML: Exceeds the limit",
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:40]))
def test_a_file_of_studies_that_is_none(tmp_path, capsys, text):
    file = tmp_path / "studies.yaml"
    file.write_text(text, encoding="utf-8")
    refuses(capsys, experiments.main, TEXTS[text], "--file", str(file), "list")


# --- commands ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return Root(tmp_path_factory.mktemp("root")).write()


def refuses(capsys, main, words: str, *arguments: str) -> None:
    """Exit code 2, these words on standard error, and nothing else has happened.

    It is one line; only a file has below it a line for each of its faults.
    """
    try:
        code = main(list(arguments))
    except SystemExit as error:  # of argparse
        code = error.code
    out, error = capsys.readouterr()
    assert code == 2 and words in error and not out, error
    assert all(line.startswith("  ") for line in error.splitlines()[1:]), error


COMMANDS = [
    ([], "the following arguments are required"),
    (["train"], "invalid choice: 'train'"),
    (["list", "smal"], "there is no run with study 'smal'; choices: small, filled"),
    (["list", ""], "there is no run with study ''"),
    (["list", "small", "vea"], "there is no run with row 'vea'; choices: vae, hot"),
    (["list", "small", ""], "there is no run with row ''"),
    (["list", "--scale", "laptops"], "there is no run with scale 'laptops'; choices: laptop, full"),
    (["list", "--seed", "99"], "there is no run with seed 99; choices: 0, 1, 2"),
    (["list", "--seed", "-1"], "there is no run with seed -1"),
    (["list", "--seed", "x"], "invalid int value: 'x'"),
    (["list", "--seed", ""], "invalid int value: ''"),
    (["list", "--seed", 30 * "9"], "there is no run with seed 9999"),
    (["prepare", "small", "x"], "there is no run with row 'x'"),
    (["record", "x"], "there is no run with study 'x'"),
    (["run"], "required: study"),
    (["run", "x"], "there is no run with study 'x'"),
    (["run", "$(touch X)"], "there is no run with study '$(touch X)'"),
    (["run", "small", "vae", "--device", "gpu"], "device 'gpu': must be a device of this machine"),
    (["run", "small", "vae", "--device", ""], "device '': must be a device of this machine"),
    (["run", "small", "vae", "--device", "cuda:99"], "device 'cuda:99': must be a device"),
    *((["run", "small", "vae", "--threads", t], f"--threads {t}: must be greater than 0 and")
      for t in ("0", "100000", 30 * "9")),
    (["run", "small", "vae", "--threads=-3"], "--threads -3: must be greater than 0"),
    (["run", "small", "vae", "--threads", "1.5"], "invalid int value: '1.5'"),
    (["run", "small", "vae", "--max-minutes", "0"], "--max-minutes 0.0: must be greater than 0"),
    (["run", "small", "vae", "--max-minutes", "nan"], "--max-minutes nan: must be greater than 0"),
    (["run", "small", "vae", "--max-minutes=-1"], "--max-minutes -1.0: must be greater than 0"),
    (["run", "small", "vae", "--max-minutes", "x"], "invalid float value: 'x'"),
    (["run", "small", "vae", "--agian"], "unrecognized arguments: --agian"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "words"), COMMANDS, ids=lambda part: str(part)[:60])
def test_commands_on_studies(root, capsys, command, words):
    options = ["--file", str(root.file), "--root", str(root.folder)]
    refuses(capsys, experiments.main, words, *options, *command)
    assert not (root.folder / "runs").exists()


def test_a_file_of_studies_that_is_not_there(tmp_path, capsys):
    missing = str(tmp_path / "none.yaml")
    refuses(capsys, experiments.main, "there is no file of studies", "--file", missing, "list")


RUN_FILES = {
    "": "is damaged",
    "[]": "is not that of a run",
    "{}": "is not that of a run: KeyError('config')",
    "null": "holds no run.json",
    "5": "is not that of a run",
    "{": "is damaged",
}
RUN_CHANGES = {
    "recipe": ("vea", "'vea' is none of amc, "),
    "config": ({}, "run.json is that of vae-laptop-seed0-"),
    "seed": (1, "run.json is that of vae-laptop-seed1-"),
    "row": ("avb", "run.json is that of avb-laptop-seed0-"),
    "recipe_version": (2, "run.json is that of vae-laptop-seed0-"),
    "builds_on": ({"folder": "../../x"}, "is not that of a run: KeyError('config_hash')"),
    "scale": (None, "run.json is that of vae-None-seed0-"),
}


@pytest.mark.parametrize("name", [*RUN_FILES, *RUN_CHANGES], ids=repr)
def test_a_run_that_was_edited(tmp_path, capsys, name):
    folder = Root(tmp_path).write().prepared()
    path, words = folder / "run.json", RUN_FILES.get(name)
    text = name
    if words is None:
        value, words = RUN_CHANGES[name]
        text = json.dumps(json.loads(path.read_text(encoding="utf-8")) | {name: value})
    path.write_text(text, encoding="utf-8")
    refuses(capsys, runs.main, words, str(folder))
    assert [file.name for file in folder.iterdir()] == ["run.json"]


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "required: folder"),
    (["/none"], "/none holds no run.json"),
    ([""], "holds no run.json"),
    (["/none", "--threads", "100000"], "--threads 100000: must be greater than 0 and at most"),
    (["/none", "--device", "gpu"], "device 'gpu': must be a device of this machine"),
    (["/none", "--seed", "1"], "unrecognized arguments"),
])  # fmt: skip
def test_commands_on_runs(capsys, arguments, words):
    refuses(capsys, runs.main, words, *arguments)


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "required: command"),
    (["lsit"], "invalid choice: 'lsit'"),
    (["list", "mnits"], "unknown data set 'mnits'; choose from 20news, cifar10, mnist"),
    (["verify", ""], "unknown data set ''; choose from"),
    (["fetch", "../mnist"], "unknown data set '../mnist'"),
    (["list", "mnist", "--all"], "unrecognized arguments: --all"),
])  # fmt: skip
def test_commands_on_data(capsys, arguments, words):
    refuses(capsys, data.main, words, *arguments)


def test_there_are_at_least_three_hundred():
    tables = [FUNCTIONS, ARCHITECTURES, CHANGES, EDITS, PARAMETERS, FILES, PLACES, STUDIES, TEXTS]
    count = sum(map(len, [*tables, COMMANDS, RUN_FILES, RUN_CHANGES]))
    assert count >= 300
    names = [bad.name for bad in (*FUNCTIONS, *PARAMETERS)]
    assert len(set(names)) == len(names)
    assert not [name for name in names if re.search(r"0x[0-9a-f]{6}", name)]
