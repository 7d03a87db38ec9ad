"""Annealed importance sampling against closed forms, quadrature and other code.

Tolerances are Monte Carlo standard errors: an estimate may miss the truth by a stated number of
them. Everything runs in float64, where rounding plays no part.
"""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal

from amortised import ais as ais_module
from amortised.ais import (
    AISSettings,
    AnnealedPath,
    ais,
    bdmc,
    linear_schedule,
    log_prob_and_grad,
    path_from,
    reverse_ais,
    sigmoid_schedule,
    tune_step_size,
)
from amortised.mcmc import hmc_step
from amortised.models import BernoulliDecoder, LinearGaussian
from amortised.numerics import CallCounter, effective_sample_size, log_mean_exp, value_and_grad

HMC = {"num_leapfrog": 3, "persistence": 0.0}
HAIS = {"num_leapfrog": 1, "persistence": 0.9}
METHODS = pytest.mark.parametrize("method", [HMC, HAIS], ids=["hmc", "hais"])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def linear_gaussian(latent_dim, observation_dim, noise_scale, num_images, seed=0):
    """A model, observations drawn from it, their latents, and the path from prior to posterior."""
    generator = seeded(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    weight = draw(observation_dim, latent_dim) / math.sqrt(latent_dim)
    model = LinearGaussian(weight, draw(observation_dim), noise_scale).requires_grad_(False)
    z = draw(num_images, latent_dim)
    x = z @ weight.T + model.bias + noise_scale * draw(num_images, observation_dim)
    return model, x, z, path_of(model, x)


def path_of(model, x):
    return AnnealedPath(model.prior().log_prob, partial(model.log_likelihood, x))


def estimate_and_se(log_weights):
    """log mean w and its standard error by the delta method, sd(w) / (mean(w) sqrt(K))."""
    variance = 1.0 / effective_sample_size(log_weights) - 1.0 / len(log_weights)
    return log_mean_exp(log_weights, dim=0), variance.sqrt()


# --- schedules -----------------------------------------------------------------------------------


def test_sigmoid_schedule_has_the_published_values():
    expected = torch.tensor([0.0, 0.10499, 0.5, 0.89501, 1.0], dtype=torch.float64)
    torch.testing.assert_close(sigmoid_schedule(4), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("schedule", [sigmoid_schedule, linear_schedule])
@pytest.mark.parametrize("num_temperatures", [1, 2, 1000])
def test_schedules_increase_from_0_to_1(schedule, num_temperatures):
    betas = schedule(num_temperatures)
    assert betas.dtype == torch.float64 and len(betas) == num_temperatures + 1
    assert betas[0] == 0 and betas[-1] == 1 and (betas.diff() > 0).all()


@pytest.mark.parametrize("num_temperatures", [0, -1, 2.0, True])
def test_schedules_refuse_other_lengths(num_temperatures):
    with pytest.raises(ValueError, match="num_temperatures"):
        sigmoid_schedule(num_temperatures)


# --- evidence ------------------------------------------------------------------------------------


@METHODS
@pytest.mark.parametrize(
    ("latent_dim", "observation_dim", "noise_scale", "num_temperatures"),
    [(1, 1, 0.5, 200), (2, 5, 1.0, 200), (8, 12, 0.5, 300), (16, 24, 0.4, 400)],
)
def test_evidence_of_linear_gaussian(
    latent_dim, observation_dim, noise_scale, num_temperatures, method
):
    model, x, _, path = linear_gaussian(latent_dim, observation_dim, noise_scale, num_images=6)
    settings, generator = AISSettings(sigmoid_schedule(num_temperatures), 0.3, **method), seeded(1)
    steps = tune_step_size(path, normal(30, 6, latent_dim, seed=2), settings, generator=generator)
    settings, z0 = settings._replace(step_size=steps), normal(100, 6, latent_dim, seed=3)
    result = ais(path, z0, settings, generator=generator)
    estimate, se = estimate_and_se(result.log_weights)
    error = estimate - model.log_evidence(x)
    # The mean over independent images, and each image with room for the largest of six.
    assert error.mean().abs() < 3 * se.square().sum().sqrt() / 6
    assert (error.abs() < 4.5 * se).all()
    assert se.max() < 0.35  # else it is no small number, and no Gaussian error


def modest_gaussian():
    """Two latents whose likelihood is less precise than the prior: no weight has heavy tails."""
    weight = torch.tensor([[0.7, 0.0], [0.3, 0.5]], dtype=torch.float64)
    model = LinearGaussian(weight, torch.zeros(2).double(), 1.0).requires_grad_(False)
    x = torch.tensor([[1.5, -1.0]], dtype=torch.float64)
    return model, x, path_of(model, x)


@METHODS
@pytest.mark.parametrize("step_size", [0.3, 1.3], ids=["small", "coarse"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_weights_are_unbiased_whatever_the_mixing(direction, step_size, method):
    """E[w] = p(x) from the prior and E[1/w] = 1/p(x) from the posterior, over 40,000 chains.

    In reverse this tests that the reversed kernels are the right ones, also with momentum carried.
    """
    model, x, path = modest_gaussian()
    posterior, z = model.posterior(x), normal(40_000, 1, 2, seed=1)
    if direction == "reverse":
        z = posterior.loc + z @ posterior.scale_tril[0].T
    run, sign = (ais, 1) if direction == "forward" else (reverse_ais, -1)
    settings = AISSettings(sigmoid_schedule(8), step_size, **method)
    result = run(path, z, settings, generator=seeded(2))
    ratio = (sign * (result.log_weights - model.log_evidence(x))).exp()
    assert (ratio.mean() - 1).abs() < 3 * ratio.std() / math.sqrt(40_000)
    assert ratio.std() < 2  # else the standard error means nothing
    assert step_size == 0.3 or 0.3 < result.acceptance_rate.mean() < 0.95


def test_frozen_steps_leave_the_weights_unbiased_and_steps_adapted_on_the_way_do_not():
    """A narrow spike on a broad prior, K = 1: each of 20,000 images adapts to its own chain.

    A chain that adapts shortens its steps when it meets the spike and stays there longer, or grows
    them elsewhere and never finds it: its position and its kernel are no longer independent.
    """
    num_images, schedule = 20_000, sigmoid_schedule(100)
    prior = Independent(Normal(torch.zeros(1).double(), 1.0), 1)

    def log_likelihood(z):
        return torch.log1p(20 * torch.exp(-0.5 * (z[..., 0] / 0.1).square()))

    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    evidence = (prior.log_prob(grid) + log_likelihood(grid)).exp().sum() * 16 / 4000

    def unbiasedness(log_weights):
        ratio = log_weights.exp() / evidence
        return (ratio.mean() - 1) / (ratio.std() / math.sqrt(num_images))

    path, settings = (prior.log_prob, log_likelihood), AISSettings(schedule, 0.8, 1)
    z0 = normal(1, num_images, 1, seed=1)
    steps = tune_step_size(path, z0, settings, bounds=(1e-3, 10.0), generator=seeded(2))
    settings, z0 = settings._replace(step_size=steps), normal(1, num_images, 1, seed=3)
    frozen = ais(path, z0, settings, generator=seeded(4))
    assert abs(unbiasedness(frozen.log_weights)) < 3

    z, generator = z0, seeded(4)
    log_weights = torch.zeros(1, num_images).double()
    step_size = torch.full((1, num_images, 1), 0.8)
    for t in range(1, 101):
        log_weights += (schedule[t] - schedule[t - 1]) * log_likelihood(z)
        state, info = hmc_step(
            z,
            lambda z, b=schedule[t]: prior.log_prob(z) + b * log_likelihood(z),
            step_size,
            1,
            generator=generator,
        )
        z = state.z
        high = info.acceptance_probability[..., None] > 0.65
        step_size = step_size * torch.where(high, 1.02, 0.98)
    assert abs(unbiasedness(log_weights)) > 10


@METHODS
@pytest.mark.parametrize("latent_dim", [1, 2])
def test_evidence_of_bernoulli_decoders_against_quadrature(latent_dim, method):
    generator = seeded(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    decoder = nn.Sequential(nn.Linear(latent_dim, 4), nn.Tanh(), nn.Linear(4, 6)).double()
    for parameter in decoder.parameters():
        parameter.data = 1.5 * draw(parameter.shape)
    model = BernoulliDecoder(decoder.requires_grad_(False), latent_dim, 6)
    model.prior = lambda: Independent(Normal(torch.zeros(latent_dim).double(), 1.0), 1)
    x = (draw(5, 6) > 0).double()

    # The trapezoid rule on [-8, 8] converges faster than any power of the spacing: halve it once.
    def quadrature(num_points):
        line = torch.linspace(-8.0, 8.0, num_points, dtype=torch.float64)
        grid = torch.cartesian_prod(*[line] * latent_dim).reshape(-1, 1, latent_dim)
        cell = latent_dim * math.log(16.0 / (num_points - 1))
        return torch.logsumexp(model.log_joint(x, grid), dim=0) + cell

    truth = quadrature(401)
    torch.testing.assert_close(quadrature(201), truth, atol=1e-6, rtol=0)

    settings, z0 = AISSettings(sigmoid_schedule(100), 0.5, **method), draw(400, 5, latent_dim)
    result = ais(path_of(model, x), z0, settings, generator=generator)
    estimate, se = estimate_and_se(result.log_weights)
    assert ((estimate - truth).abs() < 4 * se).all()
    assert (estimate - truth).mean().abs() < 3 * se.square().sum().sqrt() / 5
    assert se.max() < 0.1


def test_the_gap_of_one_chain_falls_as_one_over_the_number_of_temperatures():
    """Eight latents with precision 1 + 3b: a quarter turn in three steps forgets the start."""
    generator, num_chains, lengths = seeded(0), 4000, [20, 40, 80, 160]
    weight = torch.linalg.qr(torch.randn(8, 8, generator=generator).double()).Q
    model = LinearGaussian(weight, torch.zeros(8).double(), 3**-0.5).requires_grad_(False)
    x = 2 * torch.randn(1, 8, generator=generator).double()
    gaps, errors = [], []
    for num_temperatures in lengths:
        schedule = linear_schedule(num_temperatures)
        step_size = (math.pi / 6 * (1 + 3 * schedule[1:]) ** -0.5).reshape(-1, 1, 1, 1)
        z0 = torch.randn(num_chains, 1, 8, generator=generator).double()
        result = ais(path_of(model, x), z0, (schedule, step_size, 3), generator=generator)
        gaps.append((model.log_evidence(x) - result.log_weights.mean(0)).item())
        errors.append(result.log_weights.std().item() / math.sqrt(num_chains))
    # Least squares on logarithms; the error of log gap is se / gap.
    u = torch.tensor(lengths, dtype=torch.float64).log()
    coefficients = (u - u.mean()) / (u - u.mean()).square().sum()
    slope = (coefficients * torch.tensor(gaps).log()).sum().item()
    relative = torch.tensor(errors) / torch.tensor(gaps)
    slope_se = (coefficients * relative).square().sum().sqrt().item()
    assert slope_se < 0.03
    assert abs(slope + 1) < 3 * slope_se


@METHODS
def test_bidirectional_bounds_hold_in_expectation_and_close(method):
    """400 simulated pairs, each with four chains: forward <= truth <= reverse in the mean."""
    model, x, z, path = linear_gaussian(3, 4, 0.6, num_images=400)
    truth, gaps = model.log_evidence(x), []
    for num_temperatures in (10, 30, 100):
        z0 = normal(4, 400, 3, seed=num_temperatures)
        settings = AISSettings(sigmoid_schedule(num_temperatures), 0.4, **method)
        bounds = bdmc(path, z0, z, settings, generator=seeded(num_temperatures))
        assert bounds.lower.shape == bounds.upper.shape == (400,)
        for error in (truth - bounds.lower, bounds.upper - truth):
            assert error.mean() > -3 * error.std() / 20
        gap, se = bounds.expected_gap
        torch.testing.assert_close(bounds.gap.mean().item(), gap)
        gaps.append((gap, se))
    for (longer, longer_se), (shorter, shorter_se) in zip(gaps[1:], gaps[:-1], strict=True):
        assert shorter - longer > 3 * math.hypot(longer_se, shorter_se)
    assert gaps[-1][0] > -3 * gaps[-1][1]


def test_exact_starts_give_the_evidence_without_variance_from_both_sides():
    model, x, z, path = linear_gaussian(3, 4, 0.6, num_images=5)
    posterior = model.posterior(x)
    z0 = posterior.loc + (posterior.scale_tril @ normal(7, 5, 3, 1)).squeeze(-1)
    settings = AISSettings(linear_schedule(3), 0.3, 2)
    bounds = bdmc(path_from(posterior, path), z0, z, settings, generator=seeded(0))
    for log_weights in (bounds.forward.log_weights, bounds.reverse.log_weights):
        expected = model.log_evidence(x).expand(7, 5)
        torch.testing.assert_close(log_weights, expected, atol=1e-9, rtol=0)
    for bound in (bounds.lower, bounds.upper):
        torch.testing.assert_close(bound, model.log_evidence(x), atol=1e-9, rtol=0)


# --- transitions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(
    ("num_leapfrog", "persistence", "step_size"),
    [(1, 0.0, 0.7), (4, 0.0, 0.5), (1, 0.9, 0.7), (3, 0.7, 0.5)],
)
def test_transitions_leave_each_intermediate_distribution_invariant(
    beta, num_leapfrog, persistence, step_size
):
    """Start at the exact law of (z, momentum), move 10 times, and find the same moments."""
    model, x, _, path = linear_gaussian(2, 3, 0.7, num_images=1)
    # f_b is the posterior of the same model with noise_scale / sqrt(b).
    tempered = LinearGaussian(model.weight, model.bias, 0.7 / math.sqrt(beta)).posterior(x)
    covariance, num_chains = tempered.covariance_matrix[0].detach(), 20_000
    z = tempered.loc + normal(num_chains, 1, 2, seed=1) @ tempered.scale_tril[0].T
    momentum = normal(num_chains, 1, 2, seed=2) if persistence else None
    chains = ais_module._Chains(ais_module._start(path, z), momentum)
    settings = AISSettings(linear_schedule(1), step_size, num_leapfrog, persistence)
    generator, acceptance = seeded(3), []
    for _ in range(10):
        chains, _, rate = ais_module._transition(path, chains, beta, step_size, settings, generator)
        acceptance.append(rate)
    assert torch.stack(acceptance).mean() < 0.98  # the Metropolis test has work to do

    sample, expected = chains.point.z[:, 0] - tempered.loc[0], covariance
    if persistence:  # the momentum is standard normal and independent of z
        sample = torch.cat([sample, chains.momentum[:, 0]], dim=-1)
        expected = torch.block_diag(covariance, torch.eye(2, dtype=torch.float64))
    variances = expected.diagonal()
    mean_se = (variances / num_chains).sqrt()
    second_se = ((torch.outer(variances, variances) + expected.square()) / num_chains).sqrt()
    assert (sample.mean(0).abs() < 4 * mean_se).all()
    assert ((sample.T @ sample / num_chains - expected).abs() < 4 * second_se).all()
    # The terms that the chains carry are those of the positions that they carry.
    expected = value_and_grad(path.log_likelihood_fn, chains.point.z)
    torch.testing.assert_close(
        (chains.point.log_likelihood, chains.point.likelihood_grad), expected
    )


def test_without_persistence_it_is_plain_ais_with_hmc_on_the_same_random_numbers():
    _, _, _, path = linear_gaussian(3, 4, 0.5, num_images=2)
    log_prior, log_likelihood = path[:2]
    schedule, z0 = sigmoid_schedule(20), normal(5, 2, 3)
    step_sizes = 0.2 + 0.3 * torch.rand(20, 1, 2, 1, generator=seeded(1), dtype=torch.float64)
    result = ais(path, z0, (schedule, step_sizes, 4), generator=seeded(2))

    generator, z, log_weights, acceptance = seeded(2), z0, torch.zeros(5, 2).double(), []
    for t in range(1, 21):
        log_weights += (schedule[t] - schedule[t - 1]) * log_likelihood(z)
        state, info = hmc_step(
            z,
            lambda z, b=schedule[t]: log_prior(z) + b * log_likelihood(z),
            step_sizes[t - 1],
            4,
            generator=generator,
        )
        z = state.z
        acceptance.append(info.acceptance_probability.mean(0))
    torch.testing.assert_close(result.log_weights, log_weights, atol=1e-9, rtol=0)
    torch.testing.assert_close(result.z, z, atol=1e-9, rtol=0)
    torch.testing.assert_close(result.acceptance_rate, torch.stack(acceptance), atol=1e-9, rtol=0)
    assert 0.2 < result.acceptance_rate.mean() < 0.99


def test_hais_is_the_published_algorithm_on_the_same_random_numbers():
    """One leapfrog step, momentum negated on rejection and partially refreshed, written out."""
    _, _, _, path = linear_gaussian(3, 4, 0.5, num_images=2)
    log_prior, log_likelihood = path[:2]
    schedule, z0, a, epsilon = sigmoid_schedule(40), normal(5, 2, 3), 0.8, 0.5
    result = ais(path, z0, (schedule, epsilon, 1, a), generator=seeded(2))

    generator, z, momentum, log_weights, rejected = seeded(2), z0, None, 0.0, 0
    for t in range(1, 41):
        log_weights = log_weights + (schedule[t] - schedule[t - 1]) * log_likelihood(z)

        def energy(z, momentum, b=schedule[t]):
            return -log_prior(z) - b * log_likelihood(z) + 0.5 * momentum.square().sum(-1)

        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype)
        momentum = noise if t == 1 else a * momentum + math.sqrt(1 - a**2) * noise
        force = value_and_grad(lambda z: -energy(z, torch.zeros_like(z)), z)[1]
        half = momentum + epsilon / 2 * force
        new_z = z + epsilon * half
        force = value_and_grad(lambda z: -energy(z, torch.zeros_like(z)), new_z)[1]
        new_momentum = half + epsilon / 2 * force
        ratio = (energy(z, momentum) - energy(new_z, new_momentum)).exp()
        accepted = torch.rand(ratio.shape, generator=generator, dtype=ratio.dtype) < ratio
        rejected += int((~accepted).sum())
        z = torch.where(accepted[..., None], new_z, z)
        momentum = torch.where(accepted[..., None], new_momentum, -momentum)
    torch.testing.assert_close(result.log_weights, log_weights, atol=1e-9, rtol=0)
    torch.testing.assert_close(result.z, z, atol=1e-9, rtol=0)
    assert rejected > 20


@METHODS
def test_the_cost_is_exact_and_the_final_transition_moves_only_the_chains(method):
    _, _, _, (log_prior, log_likelihood, *_) = linear_gaussian(2, 3, 0.5, num_images=2)
    settings, results = AISSettings(sigmoid_schedule(10), 0.3, **method), []
    for final_transition, transitions in ((True, 10), (False, 9)):
        path, z0 = (log_prior, CallCounter(log_likelihood)), normal(4, 2, 2)
        result = ais(path, z0, settings, generator=seeded(0), final_transition=final_transition)
        expected = 1 + transitions * method["num_leapfrog"]
        assert (path[1].calls, path[1].points) == (expected, expected * 8)
        assert result.num_gradients == expected
        assert result.acceptance_rate.shape == (transitions, 2)
        results.append(result)
    assert torch.equal(results[0].log_weights, results[1].log_weights)
    assert not torch.equal(results[0].z, results[1].z)


# --- routes, paths, step sizes -------------------------------------------------------------------


def test_a_route_replaces_the_likelihood_and_its_gradient():
    _, _, _, path = linear_gaussian(2, 3, 0.5, num_images=2)
    route = partial(value_and_grad, path.log_likelihood_fn)
    routed = AnnealedPath(path.log_prior_fn, None, likelihood_value_and_grad=route)
    settings = AISSettings(sigmoid_schedule(10), 0.3, 3)
    plain, fast = (
        ais(way, normal(4, 2, 2), settings, generator=seeded(0)) for way in (path, routed)
    )
    assert torch.equal(plain.log_weights, fast.log_weights)


def test_forces_of_low_precision_leave_the_weights_unbiased_with_exact_energies():
    model, x, _, (log_prior, log_likelihood, *_) = linear_gaussian(2, 3, 0.6, num_images=1)

    def coarse(z):  # the force is wrong by up to 12 %, the value useless
        _, grad = value_and_grad(log_likelihood, z)
        mantissa, exponent = torch.frexp(grad)
        grad = torch.ldexp((4 * mantissa).round() / 4, exponent)
        return torch.zeros_like(grad[..., 0]), grad

    counter = CallCounter(log_likelihood)
    path = AnnealedPath(log_prior, counter, None, coarse, exact_energies=True)
    z0 = normal(30_000, 1, 2, seed=1)
    result = ais(path, z0, (sigmoid_schedule(6), 0.5, 3), generator=seeded(2))
    assert counter.calls == 1 + 6  # one forward pass at the start and one per temperature
    ratio = (result.log_weights - model.log_evidence(x)).exp()
    assert (ratio.mean() - 1).abs() < 3 * ratio.std() / math.sqrt(30_000)


def test_log_prob_and_grad_is_autograd_for_normal_and_other_distributions():
    z = normal(4, 2, 3)
    scale = 0.1 + torch.rand(2, 3, generator=seeded(1), dtype=torch.float64)
    diagonal = Independent(Normal(normal(2, 3), scale.requires_grad_(True)), 1)
    full = MultivariateNormal(normal(2, 3), torch.diag_embed(scale.detach()))
    for distribution in (diagonal, full):
        value, grad = log_prob_and_grad(distribution)(z)
        expected, expected_grad = value_and_grad(distribution.log_prob, z)
        assert not value.requires_grad
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grad, expected_grad)


@METHODS
def test_any_start_gives_unbiased_weights(method):
    """From a mean-field Gaussian that is too narrow, shifted, and nothing like the prior."""
    model, x, _, path = linear_gaussian(2, 3, 0.6, num_images=1)
    start = Independent(Normal(model.posterior(x).loc + 0.2, torch.tensor([[0.4, 0.3]])), 1)
    z0 = start.base_dist.loc + start.base_dist.scale * normal(30_000, 1, 2, seed=1)
    settings = AISSettings(linear_schedule(8), 0.4, **method)
    result = ais(path_from(start, path), z0, settings, generator=seeded(2))
    ratio = (result.log_weights - model.log_evidence(x)).exp()
    assert (ratio.mean() - 1).abs() < 3 * ratio.std() / math.sqrt(30_000)


@pytest.mark.parametrize("shape", [(), (10, 1, 1, 1), (1, 1, 3, 1), (10, 1, 3, 1)])
def test_step_sizes_broadcast(shape):
    _, _, _, path = linear_gaussian(2, 3, 0.5, num_images=3)
    number, tensor = (
        ais(path, normal(4, 3, 2), (sigmoid_schedule(10), step_size, 2), generator=seeded(0))
        for step_size in (0.3, torch.full(shape, 0.3))
    )
    torch.testing.assert_close(number.log_weights, tensor.log_weights, atol=1e-5, rtol=0)


def test_the_step_size_of_a_temperature_and_an_image_moves_that_image_at_that_temperature():
    _, _, _, path = linear_gaussian(2, 3, 0.5, num_images=2)
    steps = torch.full((10, 1, 2, 1), 1e-9, dtype=torch.float64)
    steps[5, :, 1] = 0.5
    z0 = normal(4, 2, 2)
    for run, temperature in ((ais, 5), (reverse_ais, 3)):
        result = run(path, z0, (sigmoid_schedule(10), steps, 2), generator=seeded(0))
        moved = result.mean_log_likelihood.diff(dim=0).abs() > 1e-6
        assert moved.nonzero().tolist() == [[temperature, 1]]


@pytest.mark.parametrize(("method", "target"), [(HMC, 0.65), (HAIS, 0.9)], ids=["hmc", "hais"])
def test_the_pilot_reaches_its_target_and_the_frozen_run_keeps_it(method, target):
    """Images differ in scale: each finds its own step."""
    noise = torch.tensor([0.05, 0.5], dtype=torch.float64)[:, None]
    weight, x = normal(4, 2), normal(2, 4, seed=1)
    prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)

    def log_likelihood(z):
        return Normal(z @ weight.T, noise).log_prob(x).sum(-1)

    path = prior.log_prob, log_likelihood
    settings = AISSettings(sigmoid_schedule(400), 0.1, **method)
    steps = tune_step_size(path, normal(50, 2, 2, seed=2), settings, generator=seeded(3))
    assert steps.shape == (400, 1, 2, 1) and steps.dtype == torch.float64
    assert steps[-1, 0, 0, 0] < steps[-1, 0, 1, 0] / 3
    settings, z0 = settings._replace(step_size=steps), normal(50, 2, 2, seed=4)
    result = ais(path, z0, settings, generator=seeded(5))
    # The multiplicative rule hovers about its target; each end of the run settles to within 0.07.
    torch.testing.assert_close(
        result.acceptance_rate[200:].mean(0), torch.full((2,), target).double(), atol=0.07, rtol=0
    )


def test_the_pilot_stays_within_its_bounds_and_repeats_from_a_seed():
    _, _, _, path = linear_gaussian(2, 3, 0.5, num_images=3)
    z0, settings = normal(4, 3, 2), AISSettings(sigmoid_schedule(60), 0.1, 2)
    runs = [
        tune_step_size(path, z0, settings, bounds=(0.09, 0.12), generator=seeded(0))
        for _ in range(2)
    ]
    assert torch.equal(*runs)
    assert runs[0].min() >= 0.09 and runs[0].max() == 0.12 and (runs[0][0] == 0.1).all()


# --- weights that are not numbers ----------------------------------------------------------------


def test_a_weight_of_minus_infinity_counts_as_zero():
    """Half of the prior lies outside the support, so the evidence is 1/2: no repair, no drop."""

    def log_likelihood(z):
        return torch.where(z[..., 0] > 0, 0.0, -torch.inf) + 0.0 * z.sum(-1)

    prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    z0 = normal(4000, 1, 2)
    path = prior.log_prob, log_likelihood
    result = ais(path, z0, (linear_schedule(5), 0.5, 2), generator=seeded(1))
    outside = z0[:, 0, 0] <= 0
    assert torch.equal(result.log_weights[:, 0] == -torch.inf, outside)
    assert (result.log_weights[~outside] == 0).all()
    estimate = log_mean_exp(result.log_weights, dim=0)
    assert torch.equal(estimate.exp(), (~outside).double().mean()[None])
    assert (estimate.exp() - 0.5).abs() < 3 * 0.5 / math.sqrt(4000)
    assert (result.z[..., 0][~outside] > 0).all()


def test_all_weights_zero_is_minus_infinity_and_not_an_error():
    prior = Independent(Normal(torch.zeros(1).double(), 1.0), 1)
    path = prior.log_prob, lambda z: torch.full_like(z[..., 0], -torch.inf) + 0.0 * z.sum(-1)
    result = ais(path, normal(3, 1, 1), (linear_schedule(2), 0.5, 1), generator=seeded(0))
    assert log_mean_exp(result.log_weights, dim=0).item() == -torch.inf
    assert (result.ess == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_names_its_temperature_and_image(bad):
    """Image 1 meets the bad region late, because its likelihood pushes it there."""
    prior = Independent(Normal(torch.zeros(1).double(), 1.0), 1)

    def log_likelihood(z):
        value = (torch.tensor([0.0, 30.0]) * z[..., 0]).double()
        return torch.where(z[..., 0] > 6.0, bad, value)

    path, seen = (prior.log_prob, log_likelihood), []
    settings, z0 = AISSettings(linear_schedule(200), 0.3, 3), 0.1 * normal(20, 2, 1)
    with pytest.raises(FloatingPointError, match=r"at temperature \d+ \(b = 0\.\d+\), image 1;"):
        ais(path, z0, settings, generator=seeded(1), on_temperature=seen.append)
    assert len(seen) < 200  # it did not go on to the end


@pytest.mark.parametrize("run", [ais, reverse_ais, tune_step_size])
def test_a_nan_at_the_start_stops_before_any_temperature(run):
    path = lambda z: z.sum(-1), lambda z: z.sum(-1) * math.nan
    with pytest.raises(FloatingPointError, match="at the start, image 0 and 1 more;"):
        run(path, normal(3, 2, 1), (linear_schedule(2), 0.5, 1))


def test_trajectories_that_diverge_to_infinity_are_rejected():
    path, z0 = (lambda z: -0.5 * z.square().sum(-1), lambda z: -z.pow(4).sum(-1)), normal(6, 2, 1)
    result = ais(path, z0, (linear_schedule(4), 1e4, 6), generator=seeded(0))
    assert (result.acceptance_rate == 0).all() and torch.equal(result.z, z0)


# --- diagnosis and randomness --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stiff_target_shrinks_the_step_of_the_pilot(dtype):
    """Scale 0.05 in one direction: with a step of 0.5 every long trajectory diverges."""
    weight = torch.tensor([[1.0, 0.5]], dtype=dtype)
    model = LinearGaussian(weight, torch.tensor([0.3], dtype=dtype), 0.05).requires_grad_(False)
    path, generator = path_of(model, torch.tensor([[1.5]], dtype=dtype)), seeded(0)
    z0 = torch.randn(200, 1, 2, generator=generator, dtype=dtype)
    settings = AISSettings(sigmoid_schedule(60), 0.5, num_leapfrog=20)
    steps = tune_step_size(path, z0[:20], settings, generator=generator)
    assert steps.dtype is dtype and steps[0] == 0.5 and steps[-1] < 0.1
    result = ais(path, z0, settings._replace(step_size=steps), generator=generator)
    estimate, se = estimate_and_se(result.log_weights)
    assert (estimate - model.log_evidence(torch.tensor([[1.5]], dtype=dtype))).abs() < 4 * se < 1


def test_the_pilot_does_not_depend_on_the_default_type():
    _, _, _, path = linear_gaussian(2, 3, 0.5, num_images=2)
    z0, settings = normal(4, 2, 2), AISSettings(sigmoid_schedule(20), 0.1, 2)
    before = tune_step_size(path, z0, settings, generator=seeded(1))
    torch.set_default_dtype(torch.float64)
    try:
        after = tune_step_size(path, z0, settings, generator=seeded(1))
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_constant_likelihood_gives_its_value_and_full_ess():
    prior = Independent(Normal(torch.zeros(2).double(), 1.0), 1)
    path = prior.log_prob, lambda z: -3.0 + 0.0 * z.sum(-1)
    result = ais(path, normal(10, 2, 2), (sigmoid_schedule(7), 0.5, 2), generator=seeded(0))
    torch.testing.assert_close(result.log_weights, torch.full((10, 2), -3.0).double())
    torch.testing.assert_close(result.ess, torch.full((7, 2), 10.0).double())


def test_the_records_add_up_to_the_weights():
    _, _, _, path = linear_gaussian(2, 3, 0.5, num_images=3)
    schedule = sigmoid_schedule(12)
    for run, increments in ((ais, schedule.diff()), (reverse_ais, schedule.diff().flip(0))):
        result = run(path, normal(6, 3, 2), (schedule, 0.3, 2), generator=seeded(0))
        integral = (increments[:, None] * result.mean_log_likelihood).sum(0)
        torch.testing.assert_close(integral, result.log_weights.mean(0))
        sign = 1 if run is ais else -1
        torch.testing.assert_close(result.ess[-1], effective_sample_size(sign * result.log_weights))
        assert result.ess.shape == result.mean_log_likelihood.shape == (12, 3)


def test_weights_are_accumulated_in_double_precision_from_single_precision_densities():
    path = lambda z: -0.5 * z.square().sum(-1), lambda z: -80.1 + 0.0 * z.sum(-1)
    settings = AISSettings(sigmoid_schedule(1000), 0.1, 1)
    result = ais(path, torch.zeros(1, 1, 2), settings, generator=seeded(0))
    assert result.log_weights.dtype == torch.float64 and result.z.dtype == torch.float32
    expected = torch.tensor(-80.1, dtype=torch.float32).double()
    torch.testing.assert_close(result.log_weights[0, 0], expected, atol=1e-11, rtol=0)


def test_one_seed_one_result_and_the_global_stream_is_left_alone():
    _, _, _, path = linear_gaussian(2, 3, 0.5, num_images=3)
    starts, settings = (normal(4, 3, 2), normal(3, 2)), AISSettings(sigmoid_schedule(8), 0.3, 2)
    before = torch.get_rng_state()
    runs = [bdmc(path, *starts, settings, generator=seeded(seed)) for seed in (0, 0, 1)]
    assert torch.equal(runs[0].gap, runs[1].gap) and not torch.equal(runs[0].gap, runs[2].gap)
    assert torch.equal(torch.get_rng_state(), before)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({"schedule": torch.tensor(schedule)}, "schedule must")
            for schedule in (
                [0.0, 0.6, 0.5, 1.0],
                [0.0, 0.5, 0.5, 1.0],
                [0.1, 0.5, 1.0],
                [0.0, 0.5, 0.9],
                [0.0, math.nan, 1.0],
                [1.0, 0.0],
                [1.0],
                [[0.0, 1.0]],
            )
        ),
        ({"step_size": 0.0}, "step_size must be positive"),
        ({"step_size": math.inf}, "step_size must be positive and finite"),
        ({"step_size": torch.ones(10)}, r"broadcast to \[T, 1, B, 1\] = \(10, 1, 2, 1\).*\(10,\)"),
        ({"step_size": torch.ones(9, 1, 2, 1)}, r"step_size .*\(9, 1, 2, 1\)"),
        ({"persistence": 1.0}, r"persistence must lie in \[0, 1\)"),
        ({"persistence": -0.1}, "persistence"),
        ({"num_leapfrog": 0}, "num_leapfrog"),
        ({"z0": normal(4, 2)}, r"\[K, B, D\].*\(4, 2\)"),
        ({"z0": torch.zeros(0, 2, 2)}, r"\[K, B, D\]"),
        ({"z0": torch.zeros(4, 2, 2, dtype=torch.long)}, "floating-point"),
        ({"log_likelihood_fn": lambda z: z.square()}, r"\[\.\.\., D\] to \[\.\.\.\]"),
        (
            {"likelihood_value_and_grad": lambda z: (z.sum(-1), z.sum(-1))},
            "log_likelihood and its gradient",
        ),
    ],
)
@pytest.mark.parametrize("run", [ais, reverse_ais, tune_step_size])
def test_wrong_settings_are_refused(run, change, message):
    _, _, _, path = linear_gaussian(2, 3, 0.5, num_images=2)
    settings, z0 = AISSettings(sigmoid_schedule(10), 0.3, 1), change.get("z0", normal(4, 2, 2))
    (name,) = change
    if name in AISSettings._fields:
        settings = settings._replace(**change)
    elif name in AnnealedPath._fields:
        path = path._replace(**change)
    with pytest.raises(ValueError, match=message):
        run(path, z0, settings)


@pytest.mark.parametrize(
    ("name", "value"), [("target_acceptance", 1.0), ("bounds", (0.2, 1.0)), ("bounds", (0.0, 1.0))]
)
def test_a_wrong_pilot_is_refused(name, value):
    _, _, _, path = linear_gaussian(2, 3, 0.5, num_images=2)
    with pytest.raises(ValueError, match=name):
        tune_step_size(path, normal(4, 2, 2), (sigmoid_schedule(10), 0.1, 1), **{name: value})


def test_bdmc_refuses_posterior_samples_of_other_images():
    _, _, _, path = linear_gaussian(2, 3, 0.5, num_images=2)
    with pytest.raises(ValueError, match="z_posterior"):
        bdmc(path, normal(4, 2, 2), normal(3, 2), (sigmoid_schedule(10), 0.3, 1))


# --- an independent implementation ---------------------------------------------------------------


def test_normflows_agrees_on_a_shared_target():
    """One image, linear path, fixed step, fresh momentum: the case that normflows.HAIS covers."""
    normflows = pytest.importorskip("normflows")
    model, x, _, path = linear_gaussian(3, 4, 0.6, num_images=1)
    num_chains, num_temperatures, step_size, num_leapfrog = 600, 30, 0.3, 3
    settings = AISSettings(linear_schedule(num_temperatures), step_size, num_leapfrog)
    ours = ais(path, normal(num_chains, 1, 3), settings, generator=seeded(1))

    class Target:
        def log_prob(self, z):
            return model.log_joint(x, z)

    with torch.random.fork_rng():
        torch.manual_seed(2)
        theirs = normflows.HAIS(
            linear_schedule(num_temperatures).flip(0),  # from 1, the target, to 0, the prior
            normflows.distributions.DiagGaussian(3, trainable=False).double(),
            Target(),
            num_leapfrog,
            torch.full((3,), step_size, dtype=torch.float64),
            torch.zeros(3, dtype=torch.float64),
        )
        for layer in theirs.layers:  # else the graph grows with every layer
            layer.requires_grad_(False)
        _, log_weights = theirs.sample(num_chains)

    # Theirs omits the last transition, which does not change the weights.
    mine, se = estimate_and_se(ours.log_weights)
    other, other_se = estimate_and_se(log_weights[:, None].double())
    assert (mine - other).abs() < 3 * (se.square() + other_se.square()).sqrt()
    # The two runs sample one and the same law of log-weights, not only its mean weight.
    first, second = ours.log_weights[:, 0], log_weights.double()
    tolerance = 3 * torch.hypot(first.std(), second.std()) / math.sqrt(num_chains)
    assert (first.mean() - second.mean()).abs() < tolerance
    assert (mine - model.log_evidence(x)).abs() < 3 * se
