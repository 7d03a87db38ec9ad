"""Divergences by quadrature and posteriors of programs, against closed forms and enumeration."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from amortised.divergences import alpha_divergence, gaussian_elbo, jensen_shannon, kl, minimise
from amortised.models import GaussianMixture
from amortised.traces import Parcels, TraceDistribution, posterior_ranks, uniformity

GRID = torch.linspace(-30, 30, 2401, dtype=torch.float64)
SPACING = 0.025
P, Q = Normal(0.7, 1.3), Normal(-0.4, 0.9)


def logs(*distributions):
    return [d.log_prob(GRID) for d in distributions]


def test_kl_of_gaussians_in_both_directions():
    log_p, log_q = logs(P, Q)
    assert float(kl(log_p, log_q, SPACING)) == pytest.approx(float(kl_divergence(P, Q)), abs=1e-6)
    assert float(kl(log_q, log_p, SPACING)) == pytest.approx(float(kl_divergence(Q, P)), abs=1e-6)


@pytest.mark.parametrize("alpha", [-0.4, 0.0, 0.3, 0.5, 1.0, 1.6])
def test_alpha_divergence_of_gaussians(alpha):
    """The integral of p^a q^(1-a) is Gaussian wherever the mixed precision is positive."""
    log_p, log_q = logs(P, Q)
    a, b = alpha / 1.3**2, (1 - alpha) / 0.9**2
    precision = a + b
    assert precision > 0
    exponent = -0.5 * a * b / precision * 1.1**2
    scales = 1.3**-alpha * 0.9 ** (alpha - 1) / math.sqrt(precision)
    integral = scales * math.exp(exponent)
    if alpha in (0, 1):
        expected = float(kl_divergence(*((P, Q) if alpha else (Q, P))))
    else:
        expected = (integral - 1) / (alpha * (alpha - 1))
    value = float(alpha_divergence(log_p, log_q, alpha, SPACING))
    assert value == pytest.approx(expected, rel=1e-5)


def test_alpha_divergence_swaps_with_its_arguments_and_meets_its_limits():
    log_p, log_q = logs(P, Q)
    swapped = alpha_divergence(log_q, log_p, 0.7, SPACING)
    torch.testing.assert_close(alpha_divergence(log_p, log_q, 0.3, SPACING), swapped)
    for limit in (0.0, 1.0):
        near = alpha_divergence(log_p, log_q, limit + 1e-5, SPACING)
        torch.testing.assert_close(
            near, alpha_divergence(log_p, log_q, limit, SPACING), rtol=1e-4, atol=0.0
        )


def test_jensen_shannon_is_symmetric_bounded_and_the_classifiers_loss():
    log_p, log_q = logs(P, Q)
    js = jensen_shannon(log_p, log_q, SPACING)
    torch.testing.assert_close(js, jensen_shannon(log_q, log_p, SPACING))
    assert 0 < js < math.log(2)
    logit = log_p - log_q  # the best classifier
    softplus = torch.nn.functional.softplus
    loss = SPACING * (log_p.exp() * softplus(-logit) + log_q.exp() * softplus(logit)).sum()
    assert float(loss) == pytest.approx(2 * math.log(2) - 2 * float(js), abs=1e-6)


def test_grids_must_agree():
    with pytest.raises(ValueError, match="one grid"):
        kl(torch.zeros(3), torch.zeros(4), 0.1)
    with pytest.raises(ValueError, match="positive spacing"):
        kl(torch.zeros(3), torch.zeros(3), 0.0)


def test_alpha_curve_joins_the_known_optima():
    """At x = 5 of the two-cluster model: moments at alpha = 1, the larger mode at alpha = 0."""
    model = GaussianMixture(torch.ones(2), torch.tensor([-5.0, 5.0]), torch.ones(2), 10.0)
    log_p = model.double().posterior(torch.tensor([[5.0]]).double())
    log_p = log_p.log_prob(GRID.view(-1, 1, 1)).detach()
    start = torch.tensor([[3.0, 0.5]], dtype=torch.float64)
    for alpha, mean, scale in ((0.0, 5.0, 0.9950), (1.0, 1.2504, 4.9046)):

        def loss(phi, alpha=alpha):
            q = Normal(phi[:, 0], phi[:, 1].exp())
            return alpha_divergence(log_p, q.log_prob(GRID.unsqueeze(-1)), alpha, SPACING)

        (path,) = minimise(loss, start, num_steps=1000)
        assert path[-1, 0].tolist() == pytest.approx([mean, math.log(scale)], abs=2e-3)


def test_gaussian_elbo_is_the_evidence_less_the_divergence():
    """With a best bound at the merged model and one below the evidence where clusters part."""

    def bound(centre, phi, x=7.0):
        def log_joint(z):
            sides = torch.stack([Normal(s * centre, 1.0).log_prob(z) for s in (-1, 1)])
            x_given_z = Normal(z, 10.0).log_prob(torch.tensor(x, dtype=z.dtype))
            return sides.logsumexp(0) - math.log(2) + x_given_z

        return gaussian_elbo(log_joint, phi)

    for centre, mean, log_scale in ((0.0, 0.3, -0.2), (5.0, 1.0, 1.2)):
        model = GaussianMixture(
            torch.ones(2), torch.tensor([-centre, centre]), torch.ones(2), 10.0
        ).double()
        x = torch.tensor([[7.0]]).double()
        log_p = model.posterior(x).log_prob(GRID.view(-1, 1, 1))
        phi = torch.tensor([[mean, log_scale]], dtype=torch.float64)
        log_q = Normal(phi[:, 0], phi[:, 1].exp()).log_prob(GRID.unsqueeze(-1))
        expected = model.log_evidence(x) - kl(log_q, log_p, SPACING)
        torch.testing.assert_close(bound(centre, phi), expected, rtol=0.0, atol=1e-5)


# --- programs ------------------------------------------------------------------------------------


def test_parcels_posterior_by_bayes_rule():
    """Marginalising the weights given n by a grid gives the counts; their sum is the evidence."""
    program = Parcels()
    x = torch.tensor([3.3])
    z = torch.linspace(-6, 10, 641)
    one = Normal(2.0, 1.0).log_prob(z) + Normal(z, 0.5).log_prob(x)
    prior = Normal(2.0, 1.0).log_prob(z)
    total = z[:, None] + z
    two = prior[:, None] + prior + Normal(total, 0.5).log_prob(x)
    by_grid = [
        math.log(0.5) + math.log(0.025 * float(one.exp().sum())),
        math.log(0.25) + 2 * math.log(0.025) + math.log(float(two.exp().sum())),
    ]
    assert program.log_counts(x)[:2].tolist() == pytest.approx(by_grid, abs=1e-4)
    trace = torch.tensor([[1.0, 3.0, 0.0], [2.0, 1.0, 2.5]])
    exact = program.log_posterior(x.expand(2, 1), trace) + program.log_counts(x).logsumexp(-1)
    joint = [
        math.log(0.5)
        + float(Normal(2.0, 1.0).log_prob(torch.tensor(3.0)))
        + float(Normal(3.0, 0.5).log_prob(x)),
        math.log(0.25)
        + float(Normal(2.0, 1.0).log_prob(torch.tensor([1.0, 2.5])).sum())
        + float(Normal(3.5, 0.5).log_prob(x)),
    ]
    assert exact.tolist() == pytest.approx(joint, abs=1e-4)


def test_parcels_total_correlation_from_covariances():
    expected = 0.0
    for n in range(1, 41):
        covariance = torch.eye(n).double() - torch.full((n, n), 1 / (n + 0.25)).double()
        marginal = covariance.diagonal().log().sum()
        expected += 0.5**n * 0.5 * float(marginal - torch.logdet(covariance))
    assert Parcels().total_correlation() == pytest.approx(expected, abs=1e-6)


def test_parcels_traces_add_up():
    torch.manual_seed(0)
    x, trace = Parcels().sample(2, 5000)
    n, z = trace[..., 0], trace[..., 1:]
    assert ((z != 0).sum(-1) == n).all()
    assert float(n.mean()) == pytest.approx(2.0, abs=0.07)
    assert float((x[..., 0] - z.sum(-1)).std()) == pytest.approx(0.5, abs=0.02)


class ExactSteps(torch.nn.Module):
    """The exact posterior of the program, one step after another."""

    def stop_logit(self, x, i):
        log_counts = Parcels().log_counts(x)
        step = i.long().expand(*x.shape[:-1], i.shape[-1])
        stop = log_counts.gather(-1, step - 1)
        rest = log_counts.flip(-1).logcumsumexp(-1).flip(-1).gather(-1, step)
        return stop - rest

    def value(self, x, placed, i, n):
        left = (n - i + 1).clamp_min(1)  # parcels that share what is not yet placed
        gain = 1 / (left + 0.25)
        return Normal(2 + gain * (x - placed - 2 * left), (1 - gain).sqrt())


def test_trace_distribution_can_be_the_exact_posterior():
    torch.manual_seed(0)
    program = Parcels()
    x, trace = program.sample(2000)
    keep = trace[..., 0] < 12  # the gather above stops at 60
    q = TraceDistribution(ExactSteps(), x[keep])
    exact = program.log_posterior(x[keep], trace[keep])
    torch.testing.assert_close(q.log_prob(trace[keep]), exact, rtol=1e-3, atol=1e-3)
    counts = q.log_counts(8)
    exact = program.log_counts(x[keep]).log_softmax(-1)[:, :8]
    torch.testing.assert_close(counts, exact, rtol=1e-3, atol=1e-3)


def test_trace_distribution_draws_what_its_density_says():
    torch.manual_seed(0)
    q = TraceDistribution(ExactSteps(), torch.full((20_000, 1), 4.0))
    draws = q.sample()
    n, z = draws[:, 0], draws[:, 1:]
    probabilities = Parcels().log_counts(torch.tensor([4.0])).softmax(-1)
    for count in (1, 2, 3):
        error = (probabilities[count - 1] / 20_000) ** 0.5
        assert abs(float((n == count).float().mean()) - probabilities[count - 1]) < 4 * error
    total = z[n == 2].sum(-1)  # Gaussian: mean 4, precision 1/2 + 4
    assert float(total.mean()) == pytest.approx(4.0, abs=0.02)
    assert float(total.std()) == pytest.approx((1 / 4.5) ** 0.5, abs=0.01)
    assert ((z != 0).sum(-1) == n).all()


def test_ranks_of_the_exact_posterior_are_uniform_and_others_are_not():
    torch.manual_seed(0)
    z = torch.randn(2000)
    x = z + torch.randn(2000)
    exact = x[:, None] / 2 + math.sqrt(0.5) * torch.randn(2000, 31)
    assert uniformity(posterior_ranks(z, exact)) < 1.95
    assert uniformity(posterior_ranks(z, x[:, None] / 2 + torch.randn(2000, 31))) > 3
    assert uniformity(posterior_ranks(z, torch.randn(2000, 31))) < 1.95  # the prior passes
    misfit = (x - z).abs()
    assert uniformity(posterior_ranks(misfit, (x[:, None] - torch.randn(2000, 31)).abs())) > 3


def test_ties_are_broken_at_random():
    torch.manual_seed(0)
    ranks = posterior_ranks(torch.zeros(4000), torch.zeros(4000, 3))
    assert uniformity(ranks) < 1.95
    with pytest.raises(ValueError, match=r"\[..., L\]"):
        posterior_ranks(torch.zeros(2), torch.zeros(3, 4))
