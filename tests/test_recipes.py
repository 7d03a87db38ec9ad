"""Recipes: whatever the file of studies asks for, at a size that takes a second."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from amortised import amc, data, evaluation, experiments, imputation, mcmc, recipes, runs
from amortised.encoders import GaussianEncoder, ImplicitEncoder
from amortised.fast import log_likelihood_and_grad
from amortised.files import Work, load_tree
from amortised.models import LinearGaussian
from amortised.recipes import RECIPES, Run, amortised_mcmc, common
from amortised.studies import OPTIONS, Experiment, load_studies

TINY = {"training_images": 40, "epochs": 1, "batch_size": 10, "chain_dtype": "float32"}
TINY |= {"images": 3, "num_samples": 4, "proposal_epochs": 1, "evaluation_dtype": "float32"}
TINY |= {"num_chains": 2, "pilot_chains": 1, "num_temperatures": 2, "num_leapfrog": 1}
TINY |= {"simulated_pairs": 2, "iterations": 2, "reference_steps": 1}
TINY |= {"svi_images": 2, "svi_steps": 2, "posthoc_epochs": 0}
TINY |= {"hais_images": 2, "diagnostic_images": 2, "diagnostic_samples": 4}
TINY |= {"classifier_images": 2, "classifier_epochs": 1}


def tiny(experiment: Experiment) -> Experiment:
    """The same experiment in a few steps; its options but for sizes are as they were."""
    sizes = {name: size for name, size in TINY.items() if name in experiment.config}
    config = experiment.config | sizes
    if "num_steps" in config:
        config["num_steps"] = min(config["num_steps"], 2)
    needs = None if experiment.needs is None else tiny(experiment.needs)
    return experiment._replace(config=config, needs=needs, keep=())


def kinds_in_use() -> dict[str, Experiment]:
    """One tiny experiment for each combination of names that the file of studies uses."""
    found = {}
    for study in load_studies().values():
        for experiment in study:
            words = [
                f"{name}={value}" if isinstance(value, int) else value
                for name, value in experiment.config.items()
                if isinstance(value, str) and not name.endswith("dtype") and value != "none"
                if name not in ("trained_study", "start", "start_sha256", "held_out")
            ]
            if (count := experiment.config.get("num_student_samples", 1)) > 1:
                words.append(f"K={count}")
            found.setdefault(f"{experiment.recipe}: {' '.join(words)}", tiny(experiment))
    return found


KINDS = kinds_in_use()
VAE = next(e for e in KINDS.values() if e.config.get("method") == "vae")


pytestmark = pytest.mark.usefixtures("mnist_is_read_once")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make an experiment, once, after the one that it builds on; the folder of its run."""
    root = tmp_path_factory.mktemp("made")
    long_chain = {"num_steps": 2, "num_leapfrog": 1, "step_size": 0.1}

    def make(experiment: Experiment):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(amortised_mcmc, "LONG_CHAIN", long_chain)
            assert experiments.run_experiment(experiment, root=root).word == "done"
        folder = experiments.run_folder(experiment, root)
        return folder, runs.read_json(folder / "result.json")

    return make


def values_of(folder):
    return load_tree(folder / "per_image.stage")


def test_the_file_of_studies_uses_every_kind_that_these_tests_know():
    words = {word for kind in KINDS for word in kind.split()}
    assert {"vae", "mcmc_vi", "amc", "avb", "persistent", "gaussian", "cnn_g", "cnn_b"} <= words
    assert {"short_run", "mmd", "informed_gan", "standardised_gan", "K=8"} <= words
    assert {"langevin", "mala", "hmc", "gan", "wasserstein", "inclusive_kl"} <= words
    assert {"elbo", "iwae", "dreg", "K=5", "amc_cnn_g_t50"} <= words
    assert OPTIONS.keys() == RECIPES.keys() == {kind.split(":")[0] for kind in KINDS}


# --- every kind ----------------------------------------------------------------------------------


ON_IMAGES = {"is_ll", "is_ess", "posthoc_is_ll", "posthoc_is_ess"}
ON_IMAGES |= {"ais_ll", "ais_ess", "ais_acceptance_rate"}
ON_PAIRS = {"simulated_lower_bound", "simulated_upper_bound", "simulated_gap"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("amc:", "vae:"))])
def test_a_row_is_trained_and_evaluated(made, kind):
    experiment = KINDS[kind]
    config = experiment.config
    folder, record = made(experiment)
    per_image, decoder_file = values_of(folder), folder / "decoder.safetensors"
    encoder_file = folder / "encoder.safetensors"

    assert per_image.keys() == ON_IMAGES | ON_PAIRS == record["metrics"].keys()
    for name, values in per_image.items():
        assert values.shape == (3,) if name in ON_IMAGES else (2,)
        assert values.isfinite().all()
    assert torch.allclose(
        per_image["simulated_gap"],
        per_image["simulated_upper_bound"] - per_image["simulated_lower_bound"],
        atol=1e-3,
    )
    # Untrained, all pixels have probability 1/2 and the evidence is about -784 log 2 = -543.
    assert (per_image["is_ll"] < 0).all() and (per_image["ais_ll"] > -2000).all()
    assert ((per_image["is_ess"] >= 0.999) & (per_image["is_ess"] <= 4.001)).all()
    assert ((per_image["ais_acceptance_rate"] >= 0) & (per_image["ais_acceptance_rate"] <= 1)).all()
    details = record["details"]
    assert details["steps"] == 4
    assert all(len(means) == 4 for means in details["history"].values())
    assert details["seconds"].keys() == {"training", "importance sampling", "annealing", "bounds"}

    # What the files hold is, to the bit, what was evaluated.
    decoder = evaluation.load_module(decoder_file).to(memory_format=torch.channels_last)
    assert {value.dtype for value in load_file(decoder_file).values()} == {torch.float16}
    x = data.load_mnist_binary("test").images[:3]
    names = ("num_chains", "pilot_chains", "num_temperatures", "num_leapfrog")
    settings = {name: config[name] for name in names}
    annealed = evaluation.hais_ll(decoder, x, seed=experiment.seed, **settings)
    assert torch.equal(annealed.log_likelihood.float(), per_image["ais_ll"])
    bounds = evaluation.bdmc_ll(decoder, 2, seed=experiment.seed, **settings)
    assert torch.equal(bounds.lower.float(), per_image["simulated_lower_bound"])
    assert torch.equal(bounds.upper.float(), per_image["simulated_upper_bound"])
    if config.get("encoder") == "none":
        assert not encoder_file.exists()
        return
    encoder = evaluation.load_module(encoder_file).to(memory_format=torch.channels_last)
    if config.get("encoder", "gaussian") == "gaussian":
        assert isinstance(encoder, GaussianEncoder)
        own = evaluation.importance_sampling_ll(decoder, encoder, x, num_samples=4)
        assert torch.equal(own.log_likelihood.float(), per_image["is_ll"])
        assert not torch.equal(per_image["posthoc_is_ll"], per_image["is_ll"])
    else:
        noise = {"cnn_g": "gaussian", "cnn_b": "bernoulli"}[config["encoder"]]
        assert isinstance(encoder, ImplicitEncoder) and encoder.noise == noise
        assert torch.equal(per_image["posthoc_is_ll"], per_image["is_ll"])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("objective")])
def test_an_objective_is_judged_by_evidence_and_by_latents_in_use(made, kind):
    folder, record = made(KINDS[kind])
    sizes = {name: len(values) for name, values in values_of(folder).items()}
    on_images = dict.fromkeys(("full_is_ll", "full_is_ess", "elbo"), 3)
    on_images |= dict.fromkeys(("hais_ll", "hais_ess", "hais_acceptance_rate"), 2)
    assert sizes == on_images | dict.fromkeys(ON_PAIRS, 2)
    means = evaluation.load_module(folder / "encoder.safetensors")(
        common.held_out_images(KINDS[kind].config)
    ).mean
    assert record["details"]["active_latents"] == (means.var(0) > 0.01).sum()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("imputation")])
def test_an_imputation_is_scored(made, kind):
    folder, record = made(KINDS[kind])
    per_image = values_of(folder)
    assert per_image.keys() == {
        f"{prefix}{mask}_{score}"
        for prefix in ("", "reference_")
        for mask in imputation.MASKS
        for score in ("label_entropy", "l1")
    }
    for name, values in per_image.items():
        assert values.shape == (3,) and (values >= -1e-6).all()
        assert (values <= (math.log(2) + 1e-6 if "entropy" in name else 1)).all()  # 2 chains
    assert record["details"]["reference_ess"].keys() == set(imputation.MASKS)


# --- what a recipe promises ----------------------------------------------------------------------


def built(experiment: Experiment) -> recipes.Training:
    torch.manual_seed(experiment.seed)
    return RECIPES[experiment.recipe].build(experiment.config, torch.device("cpu"))


TRAINED = {kind: e for kind, e in KINDS.items() if RECIPES[e.recipe].build is not None}
TRAINED = {kind: e for kind, e in TRAINED.items() if e.recipe != "iterative"}  # test_iterative.py


@pytest.mark.parametrize("kind", TRAINED)
def test_rows_of_one_seed_start_from_one_decoder_and_learn_at_their_rates(kind):
    first = built(VAE).networks["decoder"].state_dict()
    config, training = TRAINED[kind].config, built(TRAINED[kind])
    decoder = training.networks["decoder"].state_dict()
    if TRAINED[kind].recipe == "distillation" or config.get("output_bias") == "data":
        mean = data.load_mnist("train").images[: config["training_images"]].mean()
        first["decoder.9.bias"] = mean.logit().reshape(1)
    if TRAINED[kind].recipe != "teacher":  # which start from weights that are trained
        assert all(torch.equal(value, decoder[name]) for name, value in first.items())
    is_game = config.get("method") == "avb" or "gan" in config.get("rule", "none")
    is_game = is_game or config.get("rule") == "wasserstein"
    learners = {"model", "encoder"} if config.get("encoder") != "none" else {"model"}
    learners |= {"path"} if training.details.get("path_parameters") else set()
    assert training.optimizers.keys() == learners | ({"discriminator"} if is_game else set())
    assert (config.get("method") == "persistent") == ("chains" in training.networks)
    for name, optimizer in training.optimizers.items():
        group, *weights = optimizer.param_groups
        in_game = is_game and name != "model"
        rate = config["game_learning_rate" if in_game else "learning_rate"]
        if name == "discriminator":
            rate = config.get("discriminator_learning_rate", rate)
        assert group["lr"] == rate
        assert group["betas"] == ((0.5, 0.999) if in_game else (0.9, 0.999))
        assert [g["lr"] for g in weights] == [2e-2] * (
            name == "discriminator" and config["rule"].startswith(("informed", "standardised"))
        )


DISTILLED = {kind: e for kind, e in KINDS.items() if e.recipe == "distillation"}


@pytest.mark.parametrize("kind", DISTILLED)
def test_a_student_is_held_to_its_teacher_and_the_decoder_annealed(made, kind):
    config, (folder, record) = DISTILLED[kind].config, made(DISTILLED[kind])
    per_image = values_of(folder)
    expected = dict.fromkeys(("full_is_ll", "full_is_ess"), config["images"])
    if config["hais_images"]:
        expected |= dict.fromkeys(("hais_ll", "hais_ess", "hais_acceptance_rate"), 2)
        expected |= dict.fromkeys(ON_PAIRS, 2)
    if config["encoder"] == "gaussian":
        expected["elbo"] = config["images"]
    if config["method"] != "persistent":
        expected |= {f"log_likelihood_{who}": 2 for who in ("student", "other", "teacher")}
        for who in ("student", "teacher"):
            expected |= {f"{who}_squared_mean_error": 2, f"{who}_log_variance_ratio": 2}
        expected["long_chain_acceptance_rate"] = 2
        if config["kernel"] == "mala" or config["kernel"] == "none":
            expected["teacher_acceptance_rate"] = 2
        if config["kernel"] != "none" and config["encoder"] != "none":
            expected["classifier_auc"] = 2
    assert {name: len(values) for name, values in per_image.items()} == expected
    assert all(values.isfinite().all() for values in per_image.values())
    assert record["metrics"].keys() == per_image.keys()
    if config["method"] != "short_run":  # once will do
        return
    decoder = evaluation.load_module(folder / "decoder.safetensors")
    x, seed = common.held_out_images(config), DISTILLED[kind].seed
    proposal = evaluation.fit_full_covariance(decoder, x, seed=seed)
    samples = {"num_samples": config["num_samples"], "seed": seed}
    samples["likelihood"] = partial(log_likelihood_and_grad, decoder)
    estimate = evaluation.importance_sampling_ll(decoder, proposal, x, **samples)
    assert torch.allclose(estimate.log_likelihood.float(), per_image["full_is_ll"], atol=1e-3)
    names = ("num_chains", "pilot_chains", "num_temperatures", "num_leapfrog", "persistence")
    settings = {name: config[name] for name in names}
    annealed = evaluation.hais_ll(decoder, x[:2], seed=seed, **settings)
    assert torch.allclose(annealed.log_likelihood.float(), per_image["hais_ll"], atol=1e-3)


def test_implicit_students_start_at_the_scale_of_the_prior():
    kinds = [e for e in DISTILLED.values() if e.config["encoder"].startswith("cnn")]
    for experiment in {e.config["encoder"]: e for e in kinds}.values():
        encoder = built(experiment).networks["encoder"]
        x = data.binarise(data.load_mnist("train").images[1000:1100])
        assert (encoder(x, 50).detach().std((0, 1)) - 1).abs().max() < 0.35


def test_the_divergence_is_warmed_up_over_the_first_updates(monkeypatch):
    experiment = next(e for e in DISTILLED.values() if e.config["method"] == "vae")
    config = experiment.config | {"training_images": 40, "batch_size": 10, "epochs": 2}
    seen = []
    monkeypatch.setattr(amc, "vae_step", lambda *a, kl_weight=1.0, **k: seen.append(kl_weight + 0))
    step = recipes.distillation_training(config | {"kl_warmup": 0.5}).step
    experiment = next(e for e in KINDS.values() if e.config.get("objective") == "elbo")
    config = experiment.config | {"training_images": 40, "batch_size": 10, "epochs": 2}
    other = RECIPES["objective"].build(config | {"kl_warmup": 0.5}, "cpu")
    assert "warm-up" in other.networks
    for update in (step, other.step):
        seen.clear()
        for _ in range(8):
            update(None, None)
        weights = torch.stack(seen)
        assert torch.allclose(weights, torch.tensor([0.25, 0.5, 0.75, 1, 1, 1, 1, 1.0]))


def test_validation_images_are_none_that_a_row_is_trained_on():
    config = {"held_out": "validation", "images": 1000, "image_seed": 3}
    images = common.held_out_images(config)
    grey = data.load_mnist("train").images[59_000:]
    assert ((images.sum(0) > 0) <= (grey.sum(0) > 0)).all()
    assert images.mean().sub(grey.mean()).abs() < 0.01
    assert torch.equal(images, common.held_out_images(config))


def test_a_chain_has_the_kernel_and_the_steps_of_its_options(monkeypatch):
    experiment = next(e for e in KINDS.values() if e.config.get("kernel") == "hmc")
    seen, model = [], LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    monkeypatch.setattr(amc, "teacher_samples", lambda model, x, z, **k: seen.append(k) or z + 2)
    config = experiment.config | {"num_steps": 7, "step_size": 0.25, "num_leapfrog_steps": 3}
    x, z = torch.tensor([[0.0], [1.0]]), torch.tensor([[[0.0], [2.0]]])
    monkeypatch.setattr(amc, "amc_step", lambda *a, teacher, **k: {"end": teacher(x, z).mean()})
    found = amortised_mcmc._amc_step(config, {"decoder": model}, {}, plain=True)(x, None)
    assert found["end"] == 3.0  # and what is noted of the draws: (x - z)^2 / 2 up to a constant
    for name, error in (("student", 0.25), ("other", 1.25), ("teacher", 3.25)):
        constant = -0.5 * math.log(2 * math.pi)
        assert torch.isclose(found[f"log_likelihood_{name}"], torch.tensor(constant - error))
    assert (seen[0]["num_steps"], seen[0]["step_size"]) == (7, 0.25)
    assert seen[0]["kernel"].func is mcmc.hmc_step and seen[0]["kernel"].keywords["num_steps"] == 3


def test_costs_of_a_chain_are_recorded(made):
    by_kernel = {
        (e.config["method"], e.config["kernel"]): made(e)[1]["details"]
        for e in KINDS.values()
        if e.recipe == "amc"
    }
    assert by_kernel["vae", "none"]["chain_gradients_per_image"] == 0
    assert by_kernel["amc", "langevin"]["chain_gradients_per_image"] == 2
    assert by_kernel["amc", "hmc"]["chain_gradients_per_image"] == 2 * 5
    assert by_kernel["persistent", "langevin"]["chain_bytes"] == 40 * 32 * 4
    assert by_kernel["amc", "langevin"]["chain_bytes"] == 0


def test_an_imputation_keeps_each_mask_that_is_finished(made, tmp_path, monkeypatch):
    experiment = next(e for e in KINDS.values() if e.recipe == "imputation")
    expected, weights = values_of(made(experiment)[0]), made(experiment.needs)[0]
    run = Run(experiment.seed, experiment.config, torch.device("cpu"), Work(tmp_path), weights)
    seen, real = [], imputation.impute

    def impute(*arguments):
        seen.append(arguments)
        if len(seen) in (3, 6):
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(imputation, "impute", impute)
    with pytest.raises(KeyboardInterrupt):
        RECIPES["imputation"].evaluate(run)
    for _ in range(2):  # the second time all four are there
        found = RECIPES["imputation"].evaluate(run).per_image
        assert len(seen) == 3 + 2
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name].float(), values) for name, values in expected.items())
