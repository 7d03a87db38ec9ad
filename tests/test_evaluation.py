"""Estimates for a trained model against closed forms; blocks, resumption and the command line."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from amortised import evaluation, results
from amortised.ais import linear_schedule
from amortised.encoders import GaussianEncoder
from amortised.evaluation import (
    BLOCK_SIZE,
    bdmc_ll,
    fit_gaussian_proposal,
    hais_ll,
    importance_sampling_ll,
    load_module,
    main,
)
from amortised.fast import log_likelihood_and_grad
from amortised.models import ConvBernoulli, LinearGaussian
from amortised.objectives import elbo
from amortised.training import CheckpointLockedError, checkpoint_lock

WHOLE = {"chunk_size": 10**6}  # small models gain nothing from chunks that fit a cache
FAST = {"num_chains": 3, "pilot_chains": 2, "num_temperatures": 4, "num_leapfrog": 1}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def linear_gaussian(latent_dim=2, observation_dim=3, noise_scale=0.7, num_images=5):
    """A model in float64 and observations drawn from it."""
    generator = seeded(0)
    weight = torch.randn(observation_dim, latent_dim, generator=generator).double()
    weight[:, 1:] += 0.2 * weight[:, :1]  # so that the latents are correlated a posteriori
    model = LinearGaussian(weight, torch.zeros(observation_dim).double(), noise_scale)
    z = torch.randn(num_images, latent_dim, generator=generator).double()
    noise = torch.randn(num_images, observation_dim, generator=generator)
    return model.requires_grad_(False), z @ weight.T + noise_scale * noise


def mean_field(model, narrowing=1.0):
    """The best factorised Gaussian: the posterior's mean, and its conditional variances."""

    def proposal(x):
        posterior = model.posterior(x)
        scale = narrowing * posterior.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
        return Independent(Normal(posterior.loc, scale), 1)

    return proposal


def assert_unbiased(estimate, truth):
    """The mean error over images is within three standard errors, each error within 4.5."""
    error = estimate.log_likelihood - truth
    se = estimate.monte_carlo_se
    assert error.mean().abs() < 3 * se.square().sum().sqrt() / len(error)
    assert (error.abs() < 4.5 * se).all()


# --- estimators ----------------------------------------------------------------------------------


def test_importance_sampling_finds_the_evidence_and_its_error():
    model, x = linear_gaussian(num_images=40)
    estimate = importance_sampling_ll(model, mean_field(model), x, num_samples=2000)
    assert_unbiased(estimate, model.log_evidence(x))
    assert ((estimate.ess > 1) & (estimate.ess < 2000)).all() and estimate.num_samples == 2000
    repeated = [
        importance_sampling_ll(model, mean_field(model), x, num_samples=2000, seed=seed)
        for seed in range(20)
    ]
    spread = torch.stack([r.log_likelihood for r in repeated]).std(0)
    # 40 spreads from 20 runs each: their mean square is known to sqrt(2 / (40 * 19)).
    ratio = (spread.square().mean() / estimate.monte_carlo_se.square().mean()).sqrt()
    assert abs(ratio - 1) < 0.15


def test_elbo_then_importance_sampling_then_evidence():
    model, x = linear_gaussian(num_images=1000)
    proposal, truth = mean_field(model, narrowing=0.6), model.log_evidence(x)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bound = elbo(model, proposal(x), x, num_samples=100)
    estimates = [
        importance_sampling_ll(model, proposal, x, num_samples=k).log_likelihood for k in (4, 40)
    ]
    for lower, higher in ((bound, estimates[0]), (estimates[0], estimates[1])):
        difference = higher - lower
        assert difference.mean() > 3 * difference.std() / math.sqrt(1000)
    error = truth - estimates[1]
    assert error.mean() > -3 * error.std() / math.sqrt(1000)


def test_importance_sampling_from_the_posterior_is_exact_however_many_draws_it_takes():
    model, x = linear_gaussian()
    for num_samples in (1, 25, 26, 77):
        estimate = importance_sampling_ll(model, model.posterior, x, num_samples=num_samples)
        torch.testing.assert_close(estimate.log_likelihood, model.log_evidence(x))
        torch.testing.assert_close(estimate.ess, torch.full((5,), num_samples).double())


def test_importance_sampling_streams():
    """Running sums equal the sums over all weights at once; no draw is larger than another."""
    model, x = linear_gaussian(num_images=130)
    seen = []

    class Recording:
        def __init__(self, q):
            self.q, self.batch_shape = q, q.batch_shape

        def sample(self, shape):
            seen.append(self.q.sample(shape))
            return seen[-1]

        def log_prob(self, z):
            return self.q.log_prob(z)

    estimate = importance_sampling_ll(
        model, lambda x: Recording(mean_field(model)(x)), x, num_samples=110
    )
    assert max(z.shape[:2].numel() for z in seen) == 25 * BLOCK_SIZE
    z = torch.cat([torch.cat(seen[:5]), torch.cat(seen[5:])], dim=1)
    log_weights = model.log_joint(x, z) - mean_field(model)(x).log_prob(z)
    expected = log_weights.logsumexp(0) - math.log(110)
    torch.testing.assert_close(estimate.log_likelihood, expected)
    ess = (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()
    torch.testing.assert_close(estimate.ess, ess)


@pytest.mark.parametrize("start", [None, mean_field], ids=["prior", "proposal"])
@pytest.mark.parametrize(
    "method",
    [{"num_leapfrog": 3}, {"num_leapfrog": 1, "persistence": 0.9}],
    ids=["hmc", "hais"],
)
def test_annealing_finds_the_evidence(method, start):
    model, x = linear_gaussian(latent_dim=4, observation_dim=6, num_images=20)
    estimate = hais_ll(
        model,
        x,
        num_temperatures=100,
        **WHOLE,
        start=None if start is None else start(model),
        **method,
    )
    assert_unbiased(estimate, model.log_evidence(x))
    assert estimate.log_likelihood.shape == estimate.acceptance_rate.shape == (20,)
    assert ((estimate.acceptance_rate > 0.4) & (estimate.acceptance_rate <= 1)).all()


def test_the_pilot_is_another_run_than_the_one_reported():
    """All chains of the pilot and of the run, by their starts, are different."""
    model, x = linear_gaussian(num_images=2)
    starts = []

    def route(x):
        evaluate = log_likelihood_and_grad(model, x, "eager")
        fresh = []  # nothing evaluated yet by this route

        def value_and_grad_fn(z):
            if not fresh or fresh[-1] != len(z):
                starts.append(z)
                fresh.append(len(z))
            return evaluate(z)

        return value_and_grad_fn

    hais_ll(model, x, num_chains=30, num_temperatures=2, num_leapfrog=1, route=route)
    pilot, run = starts
    assert pilot.shape == (20, 2, 2) and run.shape == (30, 2, 2)
    assert len(torch.cat([pilot.flatten(), run.flatten()]).unique()) == 200


def test_bidirectional_bounds_hold_the_evidence_between_them():
    model, _ = linear_gaussian(latent_dim=3, observation_dim=4)
    bounds = bdmc_ll(model, 230, num_chains=4, num_temperatures=20, num_leapfrog=2, **WHOLE)
    truth = model.log_evidence(bounds.x.double())
    assert bounds.lower.shape == bounds.upper.shape == bounds.ess.shape == (230,)
    for error in (truth - bounds.lower, bounds.upper - truth):
        assert error.mean() > -3 * error.std() / math.sqrt(230)
    wide = bounds.expected_gap
    assert wide.mean > 3 * wide.se
    tighter = bdmc_ll(model, 230, num_chains=4, num_temperatures=80, num_leapfrog=2, **WHOLE)
    assert torch.equal(tighter.x, bounds.x)  # the same pairs, whatever the other settings
    narrow = tighter.expected_gap
    assert narrow.mean < wide.mean - 3 * math.hypot(narrow.se, wide.se)


def test_paired_differences_between_two_models_on_the_same_images():
    model, x = linear_gaussian(num_images=30)
    other = LinearGaussian(model.weight, model.bias + 0.3, 0.7)
    first, second = (hais_ll(m, x, num_temperatures=50, **WHOLE) for m in (model, other))
    found = results.paired_difference(first.log_likelihood, second.log_likelihood)
    truth = results.paired_difference(model.log_evidence(x), other.log_evidence(x))
    noise = torch.cat([first.monte_carlo_se, second.monte_carlo_se]).square().sum().sqrt() / 30
    assert abs(found.mean - truth.mean) < 3 * noise
    assert found.se < first.summary.se  # pairing removes what the images share


def test_the_fitted_proposal_is_the_best_of_its_family():
    """Two correlated latents: the best mean-field Gaussian is known, and the decoder is left."""
    model, x = linear_gaussian(num_images=300)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runs = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            encoder = GaussianEncoder(2, trunk=nn.Identity(), num_features=3).double()
        fit_gaussian_proposal(
            model, x, epochs=300, batch_size=300, learning_rate=0.05, encoder=encoder,
            dynamic_binarisation=False,
        )  # fmt: skip
        runs.append(encoder)
    assert torch.equal(runs[0].head.weight, runs[1].head.weight)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():  # what the fit leaves on the table, in nats of the bound
        posterior = model.posterior(x)
        found, best = (
            kl_divergence(
                MultivariateNormal(q.mean, scale_tril=torch.diag_embed(q.stddev)), posterior
            )
            for q in (runs[0](x), mean_field(model)(x))
        )
    assert (found >= best).all() and best.mean() > 0.01
    assert (found - best).mean() < 0.1 * best.mean()  # a tenth of what the family itself loses


def test_the_default_proposal_reads_grey_images_and_learns():
    images = torch.rand(64, 784, generator=seeded(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ConvBernoulli(2)
    for parameter in model.parameters():
        parameter.data *= 3  # now the images depend on the latents
    start, trained = (
        fit_gaussian_proposal(model, images, epochs=epochs, batch_size=32, learning_rate=lr)
        for epochs, lr in ((1, 1e-12), (8, 1e-3))
    )
    x = (images > 0.5).float()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        gain = elbo(model, trained(x), x, 20) - elbo(model, start(x), x, 20)
    assert gain.mean() > 3 * gain.std() / 8
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


# --- blocks and streams --------------------------------------------------------------------------


def conv_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ConvBernoulli(4)
        x, _ = model.sample(120)
    return model, x


@pytest.mark.parametrize("route", ["eager", "rewritten"])
@pytest.mark.parametrize("chunk_size", [16, 101, 250])
def test_the_memory_limit_changes_no_number(chunk_size, route):
    model, x = conv_model()
    whole = hais_ll(model, x, route=route, chunk_size=300, **FAST)
    pieces = hais_ll(model, x, route=route, chunk_size=chunk_size, **FAST)
    assert torch.equal(whole.log_likelihood, pieces.log_likelihood)
    assert torch.equal(whole.acceptance_rate, pieces.acceptance_rate)


def test_routes_and_precisions_estimate_one_quantity():
    """The same random numbers; forces in bfloat16 bend the paths, not what they estimate."""
    model, x = conv_model()
    x, settings = x[:6], {"num_chains": 10, "num_temperatures": 12, "num_leapfrog": 2}
    exact = hais_ll(model, x, route="eager", **settings)
    for other in (
        hais_ll(model, x, route="rewritten", **settings),
        hais_ll(
            model,
            x,
            route=lambda x: log_likelihood_and_grad(model, x, "eager"),
            **settings,
        ),
        hais_ll(model, x, route="rewritten", dtype=torch.bfloat16, **settings),
    ):
        noise = torch.hypot(exact.monte_carlo_se, other.monte_carlo_se) + 1e-3
        assert ((other.log_likelihood - exact.log_likelihood).abs() < 4 * noise).all()


def test_a_block_repeats_alone_and_differs_from_others():
    model, x = linear_gaussian(num_images=1)
    x = x.expand(250, -1)
    proposal = mean_field(model)
    for run in (
        lambda x, seed=0: hais_ll(model, x, seed=seed, **FAST),
        lambda x, seed=0: importance_sampling_ll(model, proposal, x, num_samples=7, seed=seed),
    ):
        whole = run(x).log_likelihood
        assert torch.equal(run(x[:200]).log_likelihood, whole[:200])
        assert len(whole.unique()) == 250  # no two images share random numbers
        assert not torch.equal(run(x, 1).log_likelihood, whole)


def test_global_streams_are_left_alone():
    model, x = linear_gaussian()
    encoder = GaussianEncoder(2, trunk=nn.Identity(), num_features=3).double()
    before = torch.get_rng_state()
    hais_ll(model, x, **FAST)
    importance_sampling_ll(model, mean_field(model), x, num_samples=3)
    bdmc_ll(model, 3, **FAST)
    fit_gaussian_proposal(
        model, x, epochs=1, batch_size=5, dynamic_binarisation=False,
        encoder=encoder,
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)


class Stopped(Exception):
    pass


def stop_at_block(monkeypatch, number):
    """Let the process stop in the middle of a block, as Ctrl-C would."""
    original = evaluation._path
    blocks = []

    def path(*arguments):
        blocks.append(1)
        if len(blocks) > number:
            raise Stopped
        return original(*arguments)

    monkeypatch.setattr(evaluation, "_path", path)


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_a_resumed_evaluation_equals_an_uninterrupted_one(tmp_path, monkeypatch, blocks):
    model, x = linear_gaussian(num_images=250)
    whole = hais_ll(model, x, **FAST)
    checkpoint = tmp_path / "partial"
    with monkeypatch.context() as patch:
        stop_at_block(patch, blocks)
        with pytest.raises(Stopped):
            hais_ll(model, x, checkpoint=checkpoint, **FAST)
    assert checkpoint.exists() == (blocks > 0)
    with monkeypatch.context() as patch:  # only the remaining blocks are computed
        stop_at_block(patch, 3 - blocks)
        resumed = hais_ll(model, x, checkpoint=checkpoint, **FAST)
    assert torch.equal(resumed.log_likelihood, whole.log_likelihood)
    assert torch.equal(resumed.ess, whole.ess)
    with monkeypatch.context() as patch:  # and a finished one computes nothing
        stop_at_block(patch, 0)
        again = hais_ll(model, x, checkpoint=checkpoint, **FAST)
    assert torch.equal(again.acceptance_rate, whole.acceptance_rate)


def test_other_estimators_resume_too(tmp_path):
    model, x = linear_gaussian(num_images=150)
    runs = {
        "is": lambda **keep: importance_sampling_ll(
            model, mean_field(model), x, num_samples=5, **keep
        ),
        "bdmc": lambda **keep: bdmc_ll(model, 150, **FAST, **keep),
    }
    for name, run in runs.items():
        whole, kept = run(), run(checkpoint=tmp_path / name)
        again = run(checkpoint=tmp_path / name)
        for first, second, third in zip(whole[:2], kept[:2], again[:2], strict=True):
            assert torch.equal(first, second) and torch.equal(first, third)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_chains": 4}, "num_chains: 3 in the file, 4 now"),
        ({"seed": 1}, "seed: 0 in the file, 1 now"),
        ({"num_temperatures": 5}, "schedule: "),
        ({"schedule_fn": linear_schedule}, "schedule: "),
        ({"config": {"note": "b"}}, "config.note: absent in the file, b now"),
        ({"route": "eager"}, "route: auto in the file, eager now"),
        ({"start": "mean field"}, "start: None in the file, mean_field"),
    ],
)
def test_a_checkpoint_of_another_evaluation_is_refused_by_name(tmp_path, change, message):
    model, x = linear_gaussian()
    hais_ll(model, x, checkpoint=tmp_path / "partial", **FAST)
    if "start" in change:
        change = {"start": mean_field(model)}
    with pytest.raises(ValueError, match="is of another evaluation") as caught:
        hais_ll(model, x, checkpoint=tmp_path / "partial", **(FAST | change))
    assert message in str(caught.value) and str(caught.value).count("now") == 1


def test_a_checkpoint_of_other_weights_or_images_is_refused(tmp_path):
    model, x = linear_gaussian()
    checkpoint = tmp_path / "partial"
    hais_ll(model, x, checkpoint=checkpoint, **FAST)
    other = LinearGaussian(model.weight, model.bias + 1, 0.7)
    for arguments, name in (((other, x), "model"), ((model, x + 1), "images")):
        with pytest.raises(ValueError, match=f"\n  {name}: .* in the file"):
            hais_ll(*arguments, checkpoint=checkpoint, **FAST)


def test_two_processes_do_not_share_a_checkpoint(tmp_path):
    model, x = linear_gaussian()
    with checkpoint_lock(tmp_path / "partial"), pytest.raises(CheckpointLockedError):
        hais_ll(model, x, checkpoint=tmp_path / "partial", **FAST)


def test_ten_thousand_chains_of_the_decoder_fit_in_two_gigabytes():
    code = (
        "import resource, torch\n"
        "from amortised.models import ConvBernoulli\n"
        "from amortised.evaluation import hais_ll\n"
        "model = ConvBernoulli(); x, _ = model.sample(100)\n"
        "hais_ll(model, x, num_chains=100, num_temperatures=1, num_leapfrog=1, pilot_chains=1)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 2e9


# --- bad input -----------------------------------------------------------------------------------


def test_observations_must_fit_the_model():
    model, x = linear_gaussian()
    for bad in (x[0], x[:, :2], x[:0]):
        with pytest.raises(ValueError, match=r"x must be \[N, 3\]"):
            hais_ll(model, bad, **FAST)
        with pytest.raises(ValueError, match=r"x must be \[N, 3\]"):
            importance_sampling_ll(model, model.posterior, bad)
        with pytest.raises(ValueError, match=r"images must be \[N, 3\]"):
            fit_gaussian_proposal(model, bad)
    with pytest.raises(ValueError, match=r"zeros and ones; got values from 0 to 0\.5"):
        hais_ll(ConvBernoulli(2), torch.tensor([0.0, 0.5]).expand(1, 2).repeat(3, 392))
    with pytest.raises(ValueError, match="x is on meta and the model on cpu"):
        hais_ll(model, x.to("meta"))


@pytest.mark.parametrize("name", ["num_chains", "num_temperatures", "num_leapfrog", "pilot_chains"])
def test_counts_must_be_positive_integers(name):
    model, x = linear_gaussian()
    for bad in (0, 2.0, True):
        with pytest.raises(ValueError, match=f"{name} must be an integer, at least 1"):
            hais_ll(model, x, **(FAST | {name: bad}))


def test_proposals_must_be_one_per_image():
    model, x = linear_gaussian()
    prior = model.prior()
    with pytest.raises(ValueError, match="one distribution per observation"):
        importance_sampling_ll(model, lambda x: prior, x)
    with pytest.raises(ValueError, match="one distribution per observation"):
        hais_ll(model, x, start=lambda x: prior, **FAST)


def test_a_weight_that_is_not_a_number_names_its_image():
    model, x = linear_gaussian(num_images=130)
    x[117] = math.nan

    def proposal(x):
        return Independent(Normal(torch.zeros(len(x), 2).double(), 1.0), 1)

    model.likelihood = lambda z: Independent(
        Normal(z @ model.weight.T, 0.7, validate_args=False), 1, validate_args=False
    )
    with pytest.raises(FloatingPointError, match=r"images 100 to 129: .*nan.*, image 17;"):
        importance_sampling_ll(model, proposal, x, num_samples=3)
    with pytest.raises(FloatingPointError, match=r"images 100 to 129: .* the start, image 17;"):
        hais_ll(model, x, **FAST)


# --- command line --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files of an untrained decoder and encoder with four latents."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for kind in (ConvBernoulli, GaussianEncoder):
            architecture = {"class": kind.__name__, "latent_dim": 4}
            path = folder / f"{kind.__name__}.safetensors"
            results.save_weights(path, kind(4), architecture)
    return folder


def command(weights, output, *more, images=150):
    return [
        str(weights / "ConvBernoulli.safetensors"), f"--output={output}", f"--images={images}",
        "--num-chains=3", "--pilot-chains=2", "--num-temperatures=4", "--num-leapfrog=1", *more,
    ]  # fmt: skip


def test_the_command_writes_what_the_function_returns(weights, tmp_path, capsys):
    output = tmp_path / "out.json"
    proposal = f"--proposal={weights / 'GaussianEncoder.safetensors'}"
    assert main(command(weights, output, proposal, "--num-samples=6")) == 0
    printed = capsys.readouterr()
    assert "log_likelihood: -6" in printed.out and "AIS+HMC, 3 chains" in printed.out
    assert "samples" in printed.err  # the progress bar

    record = json.loads(output.read_text())
    values = safetensors.torch.load_file(tmp_path / "out.per_image.safetensors")
    model = load_module(weights / "ConvBernoulli.safetensors")
    encoder = load_module(weights / "GaussianEncoder.safetensors")
    x = evaluation.data.load_mnist_binary("test").images[:150]
    expected = hais_ll(model, x, **FAST)
    sampled = importance_sampling_ll(model, encoder, x, num_samples=6)
    assert torch.equal(values["log_likelihood"], expected.log_likelihood.float())
    assert torch.equal(values["importance_sampling_ll"], sampled.log_likelihood.float())
    assert record["metrics"]["log_likelihood"]["mean"] == pytest.approx(expected.summary.mean)
    assert record["config"]["num_chains"] == 3 and record["provenance"]["wall_seconds"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.json",
        "out.per_image.safetensors",
    ]

    assert main(command(weights, output, proposal, "--num-samples=6")) == 0
    assert "holds this evaluation already" in capsys.readouterr().out


def test_the_command_anneals_from_the_proposal_and_bounds_simulated_pairs(
    weights, tmp_path, capsys
):
    proposal = f"--proposal={weights / 'GaussianEncoder.safetensors'}"
    arguments = command(weights, tmp_path / "a.json", proposal, "--start=proposal", images=3)
    assert main([*arguments, "--num-samples=6", "--persistence=0.9"]) == 0
    assert "HAIS, 3 chains" in capsys.readouterr().out
    assert main([*command(weights, tmp_path / "b.json"), "--simulated=4"]) == 0
    metrics = json.loads((tmp_path / "b.json").read_text())["metrics"]
    assert metrics["gap"]["n"] == 4
    assert metrics["lower_bound"]["mean"] < metrics["upper_bound"]["mean"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.safetensors"], "there is no file nowhere.safetensors"),
        (["damaged.safetensors"], "damaged"),
        (["{weights}/GaussianEncoder.safetensors"], "GaussianEncoder, which is no decoder"),
        (["{model}", "--device=gpu0"], "--device gpu0: must be a device of this machine"),
        (["{model}", "--images=1"], "--images 1: must be from 2 to 10000"),
        (["{model}", "--images=10001"], "--images 10001: must be from 2 to 10000"),
        (["{model}", "--split=train"], "split"),
        (["{model}", "--num-chains=0"], "num_chains must be an integer, at least 1; got 0"),
        (["{model}", "--persistence=1"], "persistence must lie in [0, 1)"),
        (["{model}", "--start=proposal"], "--start proposal: name its weights"),
        (["{model}", "--num-chain=x"], "invalid int value: 'x'"),
    ],
)
def test_the_command_names_what_is_wrong(
    weights, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.safetensors").write_bytes(b"damaged")
    names = {"weights": weights, "model": weights / "ConvBernoulli.safetensors"}
    with pytest.raises(SystemExit) as caught:
        main([argument.format(**names) for argument in arguments] + ["--output=out.json"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out.json").exists()


def test_files_that_describe_no_network_are_refused(tmp_path):
    for architecture, message in (
        ({"class": "Linear"}, "'Linear', which is no model or encoder"),
        ({"class": "conv_trunk"}, "'conv_trunk', which is no model or encoder"),
        ({"class": "ConvBernoulli", "width": 3}, "cannot build ConvBernoulli"),
    ):
        results.save_weights(tmp_path / "a.safetensors", nn.Linear(1, 1), architecture)
        with pytest.raises(results.ResultError, match=message):
            load_module(tmp_path / "a.safetensors")


def test_the_command_does_not_overwrite_or_mix_evaluations(weights, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out.json"
    assert main(command(weights, output, images=3)) == 0
    with pytest.raises(SystemExit):
        main(command(weights, output, images=4))
    assert "images: 3 in the file, 4 now" in capsys.readouterr().err

    unfinished = tmp_path / "unfinished.json"
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "ais", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit) as caught:
            main(command(weights, unfinished))
    assert caught.value.code == 130 and "goes on after" in capsys.readouterr().err


def test_an_evaluation_killed_outright_goes_on_and_ends_with_the_same_numbers(weights, tmp_path):
    """kill -9 once a block is on disk, then the same command again."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(output):
        arguments = command(weights, output, "--num-temperatures=8", images=200)
        return subprocess.Popen(
            [sys.executable, "-m", "amortised.evaluation", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    killed, whole = tmp_path / "killed.json", tmp_path / "whole.json"
    process, other = start(killed), start(whole)
    partial = tmp_path / "killed.json.ais.partial"
    deadline = time.monotonic() + 120
    while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not killed.exists()
    kept = len(evaluation.read_checkpoint(partial)["values"]["log_likelihood"])
    assert kept == 100

    resumed = start(killed)
    for process in (resumed, other):
        _, error = process.communicate()
        assert process.returncode == 0, error
    first, second = (json.loads(path.read_text()) for path in (killed, whole))
    assert first["metrics"] == second["metrics"]
    assert first["per_image_sha256"] == second["per_image_sha256"]
