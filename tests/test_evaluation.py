"""Estimates for a trained model against closed forms; blocks and resumption."""

import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from amortised import data, evaluation, results
from amortised.encoders import GaussianEncoder
from amortised.evaluation import (
    BLOCK_SIZE,
    FullCovariance,
    bdmc_ll,
    fit_full_covariance,
    fit_gaussian_proposal,
    hais_ll,
    importance_sampling_ll,
    load_module,
    regression_mean,
)
from amortised.fast import log_likelihood_and_grad
from amortised.files import OutOfTimeError, Work
from amortised.models import ConvBernoulli, LinearGaussian
from amortised.objectives import elbo

FAST = {"num_chains": 3, "pilot_chains": 2, "num_temperatures": 4, "num_leapfrog": 1}


def whole(model):
    """Small models gain nothing from chunks that fit a cache."""
    return partial(log_likelihood_and_grad, model, chunk_size=10**6)


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
    start = None if start is None else start(model)
    likelihood = whole(model)
    estimate = hais_ll(model, x, num_temperatures=100, likelihood=likelihood, start=start, **method)
    assert_unbiased(estimate, model.log_evidence(x))
    assert estimate.log_likelihood.shape == estimate.acceptance_rate.shape == (20,)
    assert ((estimate.acceptance_rate > 0.4) & (estimate.acceptance_rate <= 1)).all()


def test_the_pilot_is_another_run_than_the_one_reported():
    """All chains of the pilot and of the run, by their starts, are different."""
    model, x = linear_gaussian(num_images=2)
    starts = []

    def likelihood(x):
        evaluate = log_likelihood_and_grad(model, x, "eager")
        fresh = []  # nothing evaluated yet by this callable

        def value_and_grad_fn(z):
            if not fresh or fresh[-1] != len(z):
                starts.append(z)
                fresh.append(len(z))
            return evaluate(z)

        return value_and_grad_fn

    hais_ll(model, x, num_chains=30, num_temperatures=2, num_leapfrog=1, likelihood=likelihood)
    pilot, run = starts
    assert pilot.shape == (20, 2, 2) and run.shape == (30, 2, 2)
    assert len(torch.cat([pilot.flatten(), run.flatten()]).unique()) == 200


def test_bidirectional_bounds_hold_the_evidence_between_them():
    model, _ = linear_gaussian(latent_dim=3, observation_dim=4)
    settings = {"likelihood": whole(model), "num_chains": 4, "num_leapfrog": 2}
    bounds = bdmc_ll(model, 230, num_temperatures=20, **settings)
    truth = model.log_evidence(bounds.x.double())
    assert bounds.lower.shape == bounds.upper.shape == bounds.ess.shape == (230,)
    for error in (truth - bounds.lower, bounds.upper - truth):
        assert error.mean() > -3 * error.std() / math.sqrt(230)
    wide = bounds.expected_gap
    assert wide.mean > 3 * wide.se
    tighter = bdmc_ll(model, 230, num_temperatures=80, **settings)
    assert torch.equal(tighter.x, bounds.x)  # the same pairs, whatever the other settings
    narrow = tighter.expected_gap
    assert narrow.mean < wide.mean - 3 * math.hypot(narrow.se, wide.se)


def test_paired_differences_between_two_models_on_the_same_images():
    model, x = linear_gaussian(num_images=30)
    other = LinearGaussian(model.weight, model.bias + 0.3, 0.7)
    first, second = (
        hais_ll(m, x, num_temperatures=50, likelihood=whole(m)) for m in (model, other)
    )
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
            model, x, epochs=300, batch_size=300, learning_rate=0.05, encoder=encoder
        )
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
    likelihood = partial(log_likelihood_and_grad, model, route=route)
    at_once, pieces = (
        hais_ll(model, x, likelihood=partial(likelihood, chunk_size=size), **FAST)
        for size in (300, chunk_size)
    )
    assert torch.equal(at_once.log_likelihood, pieces.log_likelihood)
    assert torch.equal(at_once.acceptance_rate, pieces.acceptance_rate)


def test_routes_and_precisions_estimate_one_quantity():
    """The same random numbers; forces in bfloat16 bend the paths, not what they estimate."""
    model, x = conv_model()
    x, settings = x[:6], {"num_chains": 10, "num_temperatures": 12, "num_leapfrog": 2}
    likelihood = partial(log_likelihood_and_grad, model)
    exact = hais_ll(model, x, likelihood=partial(likelihood, route="eager"), **settings)
    for other in (
        partial(likelihood, route="rewritten"),
        partial(likelihood, route="rewritten", dtype=torch.bfloat16),
        lambda x: likelihood(x, "eager").__call__,  # a plain function, of one's own
    ):
        found = hais_ll(model, x, likelihood=other, **settings)
        noise = torch.hypot(exact.monte_carlo_se, found.monte_carlo_se) + 1e-3
        assert ((found.log_likelihood - exact.log_likelihood).abs() < 4 * noise).all()


def test_low_precision_is_for_the_forces_only():
    """The weight of one temperature is the log-likelihood in the model's own type."""
    model, x = conv_model()
    settings = {"num_chains": 2, "num_temperatures": 1, "num_leapfrog": 1}
    likelihood = partial(log_likelihood_and_grad, model)
    exact = hais_ll(model, x[:6], likelihood=likelihood, **settings)
    coarse = partial(likelihood, dtype=torch.bfloat16)
    found = hais_ll(model, x[:6], likelihood=coarse, **settings)
    torch.testing.assert_close(found.log_likelihood, exact.log_likelihood, atol=1e-4, rtol=0)
    assert not torch.equal(found.acceptance_rate, exact.acceptance_rate)


def test_a_block_repeats_alone_and_differs_from_others():
    model, x = linear_gaussian(num_images=1)
    x = x.expand(250, -1)
    proposal = mean_field(model)
    for run in (
        lambda x, seed=0: hais_ll(model, x, seed=seed, **FAST),
        lambda x, seed=0: importance_sampling_ll(model, proposal, x, num_samples=7, seed=seed),
    ):
        values = run(x).log_likelihood
        assert torch.equal(run(x[:200]).log_likelihood, values[:200])
        assert len(values.unique()) == 250  # no two images share random numbers
        assert not torch.equal(run(x, 1).log_likelihood, values)


def test_global_streams_are_left_alone():
    model, x = linear_gaussian()
    encoder = GaussianEncoder(2, trunk=nn.Identity(), num_features=3).double()
    before = torch.get_rng_state()
    hais_ll(model, x, **FAST)
    importance_sampling_ll(model, mean_field(model), x, num_samples=3)
    bdmc_ll(model, 3, **FAST)
    fit_gaussian_proposal(model, x, epochs=1, batch_size=5, encoder=encoder)
    assert torch.equal(torch.get_rng_state(), before)


def estimators():
    model, x = linear_gaussian(num_images=250)
    return {
        "annealing": partial(hais_ll, model, x, **FAST),
        "bounds": partial(bdmc_ll, model, 250, **FAST),
        "sampling": partial(importance_sampling_ll, model, mean_field(model), x, num_samples=5),
    }


def assert_same(one, other):
    """Everything but the wall time."""
    for name, value in one._asdict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(other, name)), name


@pytest.mark.parametrize("name", estimators())
def test_out_of_time_it_stops_after_each_block_and_ends_with_the_same_numbers(
    name, tmp_path, monkeypatch
):
    run, work = estimators()[name], Work(tmp_path, name, stop_at=-math.inf)
    for done in (100, 200):
        with pytest.raises(OutOfTimeError, match=f"{done} of 250 images are done"):
            run(work=work)
    assert_same(run(work=work), run())
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{name}-00{i}.stage" for i in range(3)]
    monkeypatch.delattr(evaluation._Block, "seeding_all")  # no block can be worked on now
    again = run(work=work)
    seconds = [work.load(f"00{i}")["seconds"].item() for i in range(3)]
    assert again.seconds == pytest.approx(sum(seconds)) and min(seconds) > 0


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_killed_in_a_block_it_goes_on_after_the_last_finished_one(tmp_path, blocks):
    model, x = linear_gaussian(num_images=250)
    sampling = partial(importance_sampling_ll, model, x=x, num_samples=7)

    def for_first(num_blocks):
        left = iter(range(num_blocks))

        def proposal(x):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return mean_field(model)(x)

        return proposal

    with pytest.raises(KeyboardInterrupt):
        sampling(for_first(blocks), work=Work(tmp_path))
    assert len(list(tmp_path.iterdir())) == blocks
    resumed = sampling(for_first(3 - blocks), work=Work(tmp_path))  # the other blocks, no more
    assert_same(resumed, sampling(mean_field(model)))


def test_a_block_of_another_number_of_images_is_refused(tmp_path):
    model, x = linear_gaussian(num_images=130)
    run = partial(importance_sampling_ll, model, mean_field(model), num_samples=3)
    run(x, work=Work(tmp_path))
    assert_same(run(x[:100], work=Work(tmp_path)), run(x[:100]))
    with pytest.raises(ValueError, match=r"work-001.stage is not of images 100 to 119; remove"):
        run(x[:120], work=Work(tmp_path))


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
    with pytest.raises(ValueError, match=r"zeros and ones, not 0 to 0\.5"):
        hais_ll(ConvBernoulli(2), torch.tensor([0.0, 0.5]).expand(1, 2).repeat(3, 392))
    with pytest.raises(ValueError, match="x is on meta and the model on cpu"):
        hais_ll(model, x.to("meta"))


@pytest.mark.parametrize("name", ["num_chains", "num_temperatures", "num_leapfrog", "pilot_chains"])
def test_counts_must_be_positive_integers(name):
    model, x = linear_gaussian()
    for bad in (0, 2.0, True):
        with pytest.raises(ValueError, match=f"{name} must be an integer, at least 1"):
            hais_ll(model, x, **(FAST | {name: bad}))


def test_settings_of_another_name_are_refused_with_a_list_of_those_there_are():
    model, x = linear_gaussian()
    for run in (partial(hais_ll, model, x), partial(bdmc_ll, model, 2)):
        with pytest.raises(TypeError, match="called num_chain; choose from num_chains, num_temp"):
            run(num_chain=3)


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


# --- one Gaussian for each image -----------------------------------------------------------------


def test_the_full_covariance_is_the_posterior_of_a_linear_model():
    model, x = linear_gaussian(latent_dim=3, observation_dim=4)
    x[0] += 5.0
    fitted = fit_full_covariance(model, x, num_steps=120)
    weight = model.weight.detach()
    precision = torch.eye(3).double() + weight.T @ weight / 0.7**2
    mean = torch.linalg.solve(precision, weight.T @ x.T / 0.7**2).T
    covariance = fitted.scale_tril @ fitted.scale_tril.mT
    torch.testing.assert_close(fitted.loc, mean[:, None].expand(5, 3, 3), atol=1e-6, rtol=0)
    expected = torch.linalg.inv(precision).expand(5, 3, 3, 3)
    torch.testing.assert_close(covariance, expected, atol=1e-6, rtol=0)
    assert (expected[0, 0] - expected[0, 0].diag().diag()).abs().max() > 0.03  # it is correlated
    estimate = importance_sampling_ll(model, fitted, x, num_samples=7)
    torch.testing.assert_close(estimate.log_likelihood, model.log_evidence(x))


def test_several_starts_are_one_mixture():
    """Two modes of unequal mass, each with its Gaussian: the weights know how much either holds."""
    model, x = linear_gaussian(latent_dim=1, observation_dim=3, num_images=1)
    modes = torch.distributions.Normal(torch.tensor([-2.0, 3.0]).double(), 0.2)
    log_mass = torch.tensor([0.2, 0.5]).double().log()

    def likelihood(x):
        return lambda z: (
            torch.logsumexp(log_mass + modes.log_prob(z), -1) - model.prior().log_prob(z),
            torch.zeros_like(z),
        )

    loc = torch.tensor([[[-2.0], [3.0]]]).double()
    scale_tril = torch.full((1, 2, 1, 1), 0.25).double()
    both = FullCovariance(loc, scale_tril, {x[0].numpy().tobytes(): 0}, 0.0)
    estimate = importance_sampling_ll(model, both, x, num_samples=20_000, likelihood=likelihood)
    assert estimate.log_likelihood.item() == pytest.approx(math.log(0.7), abs=0.02)
    one = both._replace(loc=loc[:, 1:], scale_tril=scale_tril[:, 1:])
    estimate = importance_sampling_ll(model, one, x, num_samples=20_000, likelihood=likelihood)
    assert estimate.log_likelihood.item() == pytest.approx(math.log(0.5), abs=0.02)


def test_the_full_covariance_serves_its_images_in_any_order_and_no_others():
    model, x = linear_gaussian()
    fitted = fit_full_covariance(model, x, num_steps=2)
    order = torch.tensor([3, 0, 4])
    torch.testing.assert_close(fitted(x[order]).mean, fitted(x).mean[order])
    with pytest.raises(ValueError, match="image 1 was not fitted; fit_full_covariance to it"):
        fitted(torch.stack([x[0], x[1] + 1.0]))


def test_a_fit_is_resumed_and_repeats(tmp_path):
    model, x = linear_gaussian(num_images=130)
    fit, work = partial(fit_full_covariance, model, num_steps=3), Work(tmp_path, stop_at=-math.inf)
    with pytest.raises(OutOfTimeError, match="100 of 130 images are done"):
        fit(x, work=work)
    resumed, first = fit(x, work=work), fit(x[:100])
    assert torch.equal(resumed.loc, fit(x).loc) and torch.equal(resumed.loc[:100], first.loc)
    assert not torch.equal(first.loc, fit(x[:100], seed=1).loc)
    assert not torch.equal(first.loc[:, 0], first.loc[:, 1])  # each start has its own draws


def test_settings_of_a_fit_are_checked():
    model, x = linear_gaussian()
    for name in ("num_steps", "num_starts"):
        with pytest.raises(ValueError, match=f"{name} must be an integer, at least 1; got 0"):
            fit_full_covariance(model, x, **{name: 0})


def test_a_fit_that_is_not_finite_names_its_image():
    model, x = linear_gaussian(num_images=130)
    broken = torch.zeros(30, 1).double()
    broken[17] = math.nan

    def likelihood(x):
        return lambda z: (z[..., 0], z + broken[: len(x)] if len(x) == 30 else z)

    match = "images 100 to 129: the fit is not finite, image 17"
    with pytest.raises(FloatingPointError, match=match):
        fit_full_covariance(model, x, num_steps=2, likelihood=likelihood)


def test_a_trained_decoder_has_correlated_posteriors():
    """Full covariance beats the encoder's mean field with a tenth of the samples."""
    folder = data.data_folder() / "models/reference"
    names = ("decoder", "encoder")
    files = [folder / f"vae-laptop-seed0-{name}.safetensors" for name in names]
    decoder, encoder = (load_module(path).requires_grad_(False) for path in files)
    x = data.load_mnist_binary("test").images[100:110]
    sampling = partial(importance_sampling_ll, decoder, x=x, likelihood=whole(decoder))
    full = sampling(fit_full_covariance(decoder, x), num_samples=512)
    own = sampling(encoder, num_samples=512)
    assert full.ess.median() > 5 * own.ess.median()
    assert (full.log_likelihood - own.log_likelihood).mean() > 0.05


# --- means over a test set -----------------------------------------------------------------------


def test_the_regression_estimator_is_that_of_a_fitted_line():
    generator = seeded(5)
    control = torch.randn(60, generator=generator).double().exp()
    everything = 3.0 - 1.7 * control + 0.3 * torch.randn(60, generator=generator).double()
    images = torch.randperm(60, generator=generator)[:20]
    estimate = regression_mean(everything[images], images, control)
    slope, intercept = np.polyfit(control[images].numpy(), everything[images].numpy(), 1)
    residual = everything[images].numpy() - intercept - slope * control[images].numpy()
    assert estimate.mean == pytest.approx(intercept + slope * control.mean().item())
    assert estimate.se == pytest.approx(math.sqrt((residual**2).sum() / 18 / 20 * (1 - 20 / 60)))
    assert estimate.n == 20
    whole_set = regression_mean(everything, torch.arange(60), control)
    assert whole_set.mean == pytest.approx(everything.mean().item()) and whole_set.se == 0


def test_the_regression_estimator_covers_the_mean_with_a_smaller_error():
    generator = seeded(6)
    control = 20.0 * torch.randn(2000, generator=generator).double() - 90.0
    everything = 1.0 + 0.97 * control + 2.0 * torch.randn(2000, generator=generator).double()
    draws = [torch.randperm(2000, generator=generator)[:50] for _ in range(400)]
    found = [regression_mean(everything[images], images, control) for images in draws]
    error = np.array([e.mean for e in found]) - everything.mean().item()
    suggested = math.sqrt(np.mean([e.se**2 for e in found]))
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(400)
    assert error.std() == pytest.approx(suggested, rel=0.15)  # the spread is known to 3.5 %
    assert results.mean_and_se(everything[draws[0]]).se > 7 * suggested


def test_the_regression_estimator_refuses_what_it_cannot_use():
    control, images = torch.arange(10.0), torch.tensor([1, 4, 7])
    for values, chosen, match in (
        (torch.ones(2), images[:2], "n at least 3"),
        (torch.ones(4), images, "must be .n."),
        (torch.ones(3), torch.tensor([1, 1, 7]), "3 different numbers from 0 to 9"),
        (torch.ones(3), torch.tensor([1, 4, 10]), "3 different numbers from 0 to 9"),
        (torch.tensor([1.0, math.nan, 0.0]), images, "must be finite"),
    ):
        with pytest.raises(ValueError, match=match):
            regression_mean(values, chosen, control)
    with pytest.raises(ValueError, match="the control is the same"):
        regression_mean(torch.ones(3), images, torch.zeros(10))


# --- networks from files -------------------------------------------------------------------------


def test_files_that_describe_no_network_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors"):
        load_module(path)
    path.write_bytes(b"damaged")
    with pytest.raises(results.ResultError, match=r"a\.safetensors is damaged"):
        load_module(path)
    for architecture, message in (
        ({"class": "Linear"}, "'Linear', which is no model or encoder"),
        ({"class": "conv_trunk"}, "'conv_trunk', which is no model or encoder"),
        ({"class": "ConvBernoulli", "width": 3}, r"ConvBernoulli.* argument 'width'"),
        ({"latent_dim": 3}, "class"),
    ):
        results.save_weights(path, nn.Linear(1, 1), architecture)
        with pytest.raises(results.ResultError, match=message):
            load_module(path)
