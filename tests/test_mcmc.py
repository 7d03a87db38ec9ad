"""Integrator invariants and stationary laws of the kernels."""

import math
from functools import partial

import pytest
import torch

from amortised.mcmc import (
    ChainState,
    LeapfrogState,
    hmc_step,
    init_state,
    langevin_step,
    leapfrog,
    leapfrog_step,
    mala_step,
    metropolis_step,
    negative_energy,
    sample_chain,
    split_rhat,
)
from amortised.models import LinearGaussian
from amortised.numerics import CallCounter, value_and_grad

COVARIANCE = torch.tensor([[1.0, 0.8], [0.8, 1.5]], dtype=torch.float64)
PRECISION = torch.linalg.inv(COVARIANCE)


def correlated(z):
    return -0.5 * ((z @ PRECISION) * z).sum(-1)


def standard(z):
    return -0.5 * z.square().sum(-1)


def rugged(z):
    """A smooth density that is nothing like a Gaussian."""
    return -0.25 * z.pow(4).sum(-1) + torch.sin(3 * z).sum(-1) - 0.5 * (z[..., 0] * z[..., 1]) ** 2


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_leapfrog_is_reversible():
    z, momentum = normal(5, 2), normal(5, 2, seed=1)
    end, end_momentum = leapfrog(z, momentum, rugged, 0.1, 20)
    back, back_momentum = leapfrog(end, -end_momentum, rugged, 0.1, 20)
    torch.testing.assert_close(back, z, atol=1e-10, rtol=0)
    torch.testing.assert_close(-back_momentum, momentum, atol=1e-10, rtol=0)


@pytest.mark.parametrize("step_size", [0.1, torch.tensor([0.3, 0.05], dtype=torch.float64)])
def test_leapfrog_preserves_volume(step_size):
    def flow(phase):
        state = LeapfrogState(
            phase[None, :2],
            phase[None, 2:],
            *value_and_grad(rugged, phase[None, :2], create_graph=True),
        )
        for _ in range(4):
            state = leapfrog_step(
                state, partial(value_and_grad, rugged, create_graph=True), step_size
            )
        return torch.cat([state.z, state.momentum], dim=-1)[0]

    jacobian = torch.autograd.functional.jacobian(flow, normal(4, seed=2))
    assert torch.linalg.det(jacobian).item() == pytest.approx(1.0, abs=1e-10)


def test_volume_is_preserved_by_any_force_even_one_without_a_potential():
    def force(z):  # not the gradient of anything
        return z[..., 0], torch.stack([torch.sin(z[..., 1]), z[..., 0] ** 3], dim=-1)

    def flow(phase):
        state = LeapfrogState(phase[None, :2], phase[None, 2:], *force(phase[None, :2]))
        return torch.cat(leapfrog_step(state, force, 0.3)[:2], dim=-1)[0]

    jacobian = torch.autograd.functional.jacobian(flow, normal(4, seed=3))
    assert torch.linalg.det(jacobian).item() == pytest.approx(1.0, abs=1e-12)


def test_energy_error_is_second_order():
    z, momentum = normal(64, 2), normal(64, 2, seed=1)

    def energy_error(step_size, num_steps):
        end, end_momentum = leapfrog(z, momentum, rugged, step_size, num_steps)
        start_h = rugged(z) - 0.5 * momentum.square().sum(-1)
        return (rugged(end) - 0.5 * end_momentum.square().sum(-1) - start_h).abs().mean()

    ratio = energy_error(0.02, 40) / energy_error(0.01, 80)
    assert 3.7 < ratio < 4.3


def test_shadow_energy_of_the_oscillator_is_conserved_exactly():
    epsilon = 0.7
    z, momentum = normal(10, 1), normal(10, 1, seed=1)

    def shadow(z, momentum):
        return momentum.square() + (1 - epsilon**2 / 4) * z.square()

    for num_steps in (1, 10, 100):
        end = leapfrog(z, momentum, standard, epsilon, num_steps)
        torch.testing.assert_close(shadow(*end), shadow(z, momentum), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("epsilon", "stable"), [(1.99, True), (2.01, False)])
def test_leapfrog_is_stable_below_two(epsilon, stable):
    end, _ = leapfrog(torch.ones(1, 1).double(), torch.zeros(1, 1).double(), standard, epsilon, 500)
    assert (end.abs().max() < 100) == stable


def test_a_trajectory_costs_one_new_gradient_per_step():
    counter = CallCounter(standard)
    state = init_state(torch.zeros(8, 2), counter)
    for _ in range(3):
        state, _ = hmc_step(state, counter, 0.1, 5)
    assert counter.calls == 1 + 3 * 5


def chain_moments_agree(kernel, num_chains=4000, burn_in=200):
    """Independent chains: moments of the last positions, with plain Monte Carlo errors."""
    samples = sample_chain(kernel, torch.zeros(num_chains, 2).double(), 1, burn_in=burn_in).samples
    z = samples[-1]
    mean_error = (COVARIANCE.diag() / num_chains).sqrt()
    assert (z.mean(0).abs() < 4 * mean_error).all()
    spread = torch.outer(COVARIANCE.diag(), COVARIANCE.diag()) + COVARIANCE**2
    assert ((torch.cov(z.T) - COVARIANCE).abs() < 4.5 * (spread / num_chains).sqrt()).all()


@pytest.mark.parametrize(
    "step",
    [
        partial(metropolis_step, step_size=1.2),
        partial(mala_step, step_size=0.5),
        partial(hmc_step, step_size=0.4, num_steps=4),
    ],
    ids=["metropolis", "mala", "hmc"],
)
def test_exact_kernels_reach_a_correlated_gaussian(step):
    generator = torch.Generator().manual_seed(7)
    chain_moments_agree(
        lambda state: step(state, logdensity_fn=correlated, generator=generator), burn_in=150
    )


@pytest.mark.parametrize(
    "step",
    [
        partial(metropolis_step, step_size=0.9),
        partial(mala_step, step_size=1.0),
        partial(hmc_step, step_size=0.6, num_steps=3),
    ],
    ids=["metropolis", "mala", "hmc"],
)
def test_exact_kernels_leave_a_multimodal_density_invariant(step):
    """Start from exact draws of a mixture, move once: the law must not change (quartiles)."""
    generator = torch.Generator().manual_seed(3)
    num_chains = 40_000
    sign = torch.randint(0, 2, (num_chains, 1), generator=generator) * 2.0 - 1.0
    z = 1.5 * sign.double() + 0.6 * torch.randn(num_chains, 1, generator=generator).double()

    def mixture(z):
        return torch.logaddexp(
            -0.5 * ((z - 1.5) / 0.6).square(), -0.5 * ((z + 1.5) / 0.6).square()
        ).sum(-1)

    levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]).double()
    state = z
    for _ in range(3):
        state, info = step(state, logdensity_fn=mixture, generator=generator)
    normal_cdf = torch.distributions.Normal(0.0, 1.0).cdf

    def cdf(value):
        return 0.5 * (normal_cdf((value - 1.5) / 0.6) + normal_cdf((value + 1.5) / 0.6))

    observed = cdf(state.z.quantile(levels))
    error = (levels * (1 - levels) / num_chains).sqrt()
    assert ((observed - levels).abs() < 4 * error).all()
    assert 0.2 < info.acceptance_probability.mean() < 0.99


@pytest.mark.parametrize(("step_size", "precision"), [(0.2, 1.0), (1.0, 1.0), (0.2, 10.0)])
def test_unadjusted_langevin_has_its_known_bias(step_size, precision):
    """Stationary variance (1 / lambda) / (1 - s lambda / 4): 1.0526, 1.3333 and 0.2."""
    generator = torch.Generator().manual_seed(0)
    num_chains = 40_000
    z = torch.zeros(num_chains, 1).double()
    for _ in range(150):
        z = langevin_step(
            z, lambda z: -0.5 * precision * z.square().sum(-1), step_size, generator=generator
        )
    expected = 1 / precision / (1 - step_size * precision / 4)
    error = expected * math.sqrt(2 / num_chains)
    assert abs(z.var().item() - expected) < 4 * error
    assert abs(expected - 1 / precision) > 4 * error  # the bias is visible at this size


def test_mala_removes_the_bias_of_langevin():
    generator = torch.Generator().manual_seed(0)
    num_chains = 40_000
    kernel = partial(mala_step, logdensity_fn=standard, step_size=1.0, generator=generator)
    z = sample_chain(kernel, torch.zeros(num_chains, 1).double(), 1, burn_in=60).samples[-1]
    assert abs(z.var().item() - 1.0) < 4 * math.sqrt(2 / num_chains)


def test_mala_is_hmc_with_one_leapfrog_step_of_the_root():
    z, step_size = normal(6, 2), 0.3
    a, info_a = mala_step(z, correlated, step_size, generator=torch.Generator().manual_seed(1))
    b, info_b = hmc_step(
        z, correlated, math.sqrt(step_size), 1, generator=torch.Generator().manual_seed(1)
    )
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(info_a, info_b)


def test_mala_proposal_is_the_langevin_step_and_its_ratio_is_metropolis_hastings():
    """Against the textbook formula with Gaussian transition densities."""
    z, step_size = normal(6, 2), 0.3
    noise = normal(6, 2, seed=4)
    _, grad = value_and_grad(correlated, z)
    proposal = z + 0.5 * step_size * grad + math.sqrt(step_size) * noise

    def log_transition(to, start):
        _, grad = value_and_grad(correlated, start)
        return -(to - start - 0.5 * step_size * grad).square().sum(-1) / (2 * step_size)

    textbook = (
        correlated(proposal)
        + log_transition(z, proposal)
        - correlated(z)
        - log_transition(proposal, z)
    )
    fn = partial(value_and_grad, correlated)
    start = LeapfrogState(z, noise, *fn(z))
    end = leapfrog_step(start, fn, math.sqrt(step_size))
    torch.testing.assert_close(end.z, proposal)
    before, after = (negative_energy(s.logdensity, s.momentum) for s in (start, end))
    torch.testing.assert_close(after - before, textbook)


def test_rejected_chains_stay_where_they_are():
    def wall(z):  # no density beyond 1
        return torch.where(z[..., 0] < 1.0, 0.0, -torch.inf) - 0.5 * z[..., 1].square()

    z = torch.tensor([[0.99, 0.0]]).repeat(200, 1)
    state, info = metropolis_step(z, wall, 1.0, generator=torch.Generator().manual_seed(0))
    assert (state.z[:, 0] < 1).all()
    assert torch.equal(state.z[~info.is_accepted], z[~info.is_accepted])
    assert (~info.is_accepted).any() and info.is_accepted.any()


def test_a_trajectory_that_is_not_a_number_is_rejected():
    def half_line(z):  # not a number below zero
        return z.sqrt().sum(-1) - 0.5 * z.square().sum(-1)

    z = torch.full((300, 1), 0.5)
    state, info = hmc_step(z, half_line, 0.5, 3, generator=torch.Generator().manual_seed(0))
    assert state.z.isfinite().all() and state.logdensity.isfinite().all()
    assert (info.acceptance_probability == 0).any() and info.is_accepted.any()


def test_divergent_langevin_stops_with_a_remedy():
    z = torch.ones(1, 1)
    with pytest.raises(FloatingPointError, match="smaller step_size"):
        for _ in range(400):
            z = langevin_step(z, lambda z: -z.pow(4).sum(-1), 2.0)


def test_kernels_depend_on_their_generator_alone():
    def run():
        generator = torch.Generator().manual_seed(5)
        kernel = partial(
            hmc_step, logdensity_fn=correlated, step_size=0.3, num_steps=2, generator=generator
        )
        return sample_chain(kernel, torch.zeros(3, 2).double(), 5).samples

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = run()
    torch.rand(3)
    assert torch.equal(first, run())
    torch.manual_seed(0)
    assert torch.equal(before, torch.get_rng_state())


def test_sample_chain_thins_and_burns():
    steps = iter(range(100))
    kernel = lambda z: torch.full_like(z, next(steps))  # noqa: E731
    chain = sample_chain(kernel, torch.zeros(1, 1), 3, burn_in=4, thin=2)
    assert chain.samples.flatten().tolist() == [5, 7, 9] and chain.acceptance_rate is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: langevin_step(torch.zeros(1, 1), standard, 0.0), "step_size must be positive"),
        (lambda: mala_step(torch.zeros(1, 1), standard, -1.0), "step_size must be positive"),
        (lambda: hmc_step(torch.zeros(1, 1), standard, 0.1, 0), "num_steps must be an integer"),
        (lambda: leapfrog(torch.zeros(1), torch.zeros(1), standard, 0.1, -1), "num_steps"),
        (lambda: sample_chain(lambda z: z, torch.zeros(1), 0), "num_samples must be an integer"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_trajectory_that_diverges_is_rejected_and_a_bad_start_is_not():
    """The posterior's scale is 0.01: a step of 0.5 multiplies z by about -2,500."""
    model = LinearGaussian(torch.tensor([[1.0, 0.5]]), torch.tensor([0.3]), 0.01)
    target = partial(model.log_joint, torch.tensor([[1.5]]))
    z = torch.tensor([[[0.2, -0.4]], [[1.0, 0.1]]])
    start = init_state(z, target)
    kernels = [
        partial(hmc_step, step_size=0.5, num_steps=60),
        partial(mala_step, step_size=1e30),
        partial(metropolis_step, step_size=1e38),
    ]
    for kernel in kernels:
        state, info = kernel(start, target)
        assert not info.is_accepted.any() and not info.acceptance_probability.any()
        torch.testing.assert_close(state.z, z, rtol=0, atol=0)
    end, _ = leapfrog(z, torch.ones_like(z), target, 0.5, 60)
    assert not end.isfinite().any()
    with pytest.raises(FloatingPointError, match="use a smaller step_size"):
        for _ in range(60):
            z = langevin_step(z, target, 0.5)
    with pytest.raises(ValueError, match="support"):  # arguments are still checked at the start
        hmc_step(torch.full((1, 1, 2), torch.nan), target, 0.1, 1)


def test_kernels_do_not_need_gradients_to_be_on():
    plain, _ = hmc_step(torch.ones(3, 2), standard, 0.2, 3)
    torch.manual_seed(0)
    with torch.inference_mode():
        inside, _ = hmc_step(torch.ones(3, 2), standard, 0.2, 3)
    torch.testing.assert_close(inside.z.clone(), plain.z, rtol=0, atol=0)


def test_states_may_be_positions_or_states():
    z = normal(4, 2)
    state = init_state(z, correlated)
    generator = torch.Generator().manual_seed(0)
    from_state, _ = hmc_step(state, correlated, 0.2, 3, generator=generator)
    from_z, _ = hmc_step(z, correlated, 0.2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(from_state, from_z)
    without_grad = ChainState(z, correlated(z), None)
    again, _ = hmc_step(
        without_grad, correlated, 0.2, 3, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(again, from_z)


# --- do chains agree? ----------------------------------------------------------------------------


def test_rhat_is_near_one_for_independent_draws_and_above_it_for_a_shift():
    draws = normal(1000, 4, 2)
    assert (split_rhat(draws) < 1.01).all()
    # Half of 2C chains shifted by d: variance of the means about d^2 / 4, within about 1.
    shifted = draws + torch.tensor([0.0, 0.0, 0.5, 0.5]).double()[:, None]
    assert split_rhat(shifted)[0].item() == pytest.approx(math.sqrt(1 + 0.25**2), abs=0.03)


def test_rhat_sees_a_drift_within_one_chain():
    assert split_rhat(normal(1000, 1, 1) + torch.linspace(0, 3, 1000).double()[:, None, None]) > 1.3


def test_rhat_sees_a_difference_of_spread_alone():
    scales = torch.tensor([1.0, 1.0, 3.0, 3.0]).double()[:, None]
    assert split_rhat(normal(1000, 4, 1) * scales) > 1.1


def test_rhat_needs_no_moments_and_does_not_depend_on_the_scale():
    cauchy = normal(1000, 4, 1) / normal(1000, 4, 1, seed=1)
    assert split_rhat(cauchy) < 1.02
    torch.testing.assert_close(split_rhat(1e6 * cauchy - 3e6), split_rhat(cauchy))


def test_rhat_shares_ranks_between_equal_values():
    stats = pytest.importorskip("scipy.stats")
    draws = normal(40, 3, 1).round(decimals=1)
    from amortised.mcmc import _normal_scores

    expected = stats.norm.ppf((stats.rankdata(draws.flatten()) - 0.375) / (120 + 0.25))
    torch.testing.assert_close(_normal_scores(draws).flatten(), torch.tensor(expected))


def test_rhat_of_chains_that_stand_still():
    still = torch.tensor([0.0, 1.0]).double().expand(10, 2)[..., None]
    assert split_rhat(still).isinf().all()
    assert split_rhat(torch.zeros(10, 2, 1)).isnan().all()


@pytest.mark.parametrize("shape", [(3, 4, 1), (10,), (10, 0, 1)])
def test_rhat_refuses_too_little(shape):
    with pytest.raises(ValueError, match="split_rhat needs"):
        split_rhat(torch.zeros(shape))
