"""Bounds and gradient estimators, against the linear-Gaussian model where everything is known."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from amortised.models import ConvBernoulli, LinearGaussian
from amortised.objectives import (
    dreg_surrogate,
    elbo,
    importance_log_weights,
    iwae_bound,
    stl_surrogate,
)


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def scalar_model():
    return LinearGaussian(*(t.double() for t in (torch.ones(1, 1), torch.zeros(1))), 1.0)


def prior_as_q(batch):
    zeros = torch.zeros(batch, 1, dtype=torch.float64)
    return Independent(Normal(zeros, torch.ones_like(zeros)), 1)


def mean_and_error(draws, dim=0):
    draws = draws.detach()
    return draws.mean(dim), draws.std(dim) / math.sqrt(draws.shape[dim])


@pytest.mark.parametrize(("x", "known"), [(0.0, -1.418939), (1.5, -2.543939)])
@pytest.mark.parametrize("analytic_kl", [False, True])
def test_elbo_of_the_prior_on_the_scalar_model(x, known, analytic_kl):
    x = torch.full((1000, 1), x, dtype=torch.float64)
    draws = elbo(scalar_model(), prior_as_q(1000), x, num_samples=200, analytic_kl=analytic_kl)
    mean, error = mean_and_error(draws)
    assert abs(mean - known) < 4 * error


def test_elbo_gap_is_the_kl_divergence_to_the_posterior():
    torch.manual_seed(3)
    model = LinearGaussian(torch.randn(4, 2).double(), torch.randn(4).double(), 0.8)
    x = torch.randn(1, 4).double()
    q = MultivariateNormal(torch.tensor([[0.3, -0.2]]).double(), 0.4 * torch.eye(2).double())
    draws = importance_log_weights(model, q, x, 200_000).detach()
    mean, error = mean_and_error(draws)
    expected = model.log_evidence(x) - kl_divergence(q, model.posterior(x))
    assert ((mean - expected).abs() < 4 * error).all()


def test_mean_field_optimum_and_its_gap():
    """Best diagonal q of a correlated Gaussian: variances 1 / precision_jj, gap known."""
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]]).double()
    target = MultivariateNormal(torch.zeros(2).double(), covariance)
    precision = target.precision_matrix
    best = MultivariateNormal(torch.zeros(2).double(), torch.diag(1 / precision.diag()))
    assert best.variance[0].item() == pytest.approx(0.19)
    gap = kl_divergence(best, target)
    expected = 0.5 * (precision.diag().log().sum() - torch.logdet(precision))
    torch.testing.assert_close(gap, expected)
    assert gap.item() == pytest.approx(0.8304, abs=1e-4)


def test_bounds_are_ordered_and_below_the_evidence():
    model, x = scalar_model(), torch.full((20_000, 1), 1.5, dtype=torch.float64)
    q = prior_as_q(20_000)
    values, errors = zip(
        *(mean_and_error(iwae_bound(model, q, x, k)) for k in (1, 2, 5, 20)), strict=True
    )
    exact = model.log_evidence(x[:1]).item()
    for below, above, e1, e2 in zip(values, values[1:], errors, errors[1:], strict=False):
        assert below < above + 4 * math.hypot(e1, e2)
    assert values[-1] < exact + 4 * errors[-1]
    assert exact - values[0] > 0.5  # and the ELBO is far from tight here


@pytest.mark.parametrize(("num_samples", "gap"), [(5, 0.0164), (10, 0.0082), (50, 0.00156)])
def test_iwae_gap_follows_the_variance_over_two_k(num_samples, gap):
    batch = 400_000 // num_samples
    x = torch.zeros(batch, 1, dtype=torch.float64)
    model = scalar_model()
    mean, error = mean_and_error(iwae_bound(model, prior_as_q(batch), x, num_samples))
    assert abs(-1.265512 - mean - gap) < 4 * error + 1e-4
    variance = 2 / math.sqrt(3) - 1
    assert gap == pytest.approx(variance / (2 * num_samples), rel=0.07)


@pytest.mark.parametrize("num_samples", [1, 7])
def test_all_bounds_are_exact_and_constant_at_the_posterior(num_samples):
    model = LinearGaussian(torch.randn(4, 2).double(), torch.randn(4).double(), 0.8)
    x = torch.randn(6, 4).double()
    exact = model.log_evidence(x)
    for bound in (elbo, iwae_bound, stl_surrogate, dreg_surrogate):
        torch.testing.assert_close(bound(model, model.posterior(x), x, num_samples), exact)


def test_importance_weights_are_unbiased_for_the_evidence():
    model, x = scalar_model(), torch.tensor([[1.5]], dtype=torch.float64)
    weights = importance_log_weights(model, prior_as_q(1), x, 500_000).exp()
    mean, error = mean_and_error(weights)
    assert ((mean - model.log_evidence(x).exp()).abs() < 4 * error).all()


def encoder_gradient(bound, num_samples, mean, log_scale, x, model):
    """Gradients of the bound, example by example, in the parameters of q: ``[B, 2]``."""
    mean = mean.clone().requires_grad_()
    log_scale = log_scale.clone().requires_grad_()
    q = Independent(Normal(mean, log_scale.exp()), 1)
    total = bound(model, q, x, num_samples).sum()
    return torch.cat(torch.autograd.grad(total, (mean, log_scale)), dim=-1)


@pytest.mark.parametrize("bound", [stl_surrogate, dreg_surrogate])
@pytest.mark.parametrize("num_samples", [1, 4])
def test_path_gradients_vanish_sample_by_sample_at_the_posterior(bound, num_samples):
    x = torch.full((50, 1), 1.5, dtype=torch.float64)
    at_posterior = x / 2, torch.full_like(x, 0.5 * math.log(0.5))
    gradient = encoder_gradient(bound, num_samples, *at_posterior, x, scalar_model())
    assert gradient.abs().max() < 1e-12
    plain = encoder_gradient(iwae_bound, num_samples, *at_posterior, x, scalar_model())
    assert plain.abs().max() > 0.1
    mean, error = mean_and_error(plain)
    assert (mean.abs() < 4 * error).all()


def gradient_means(num_samples, bounds):
    batch = 100_000
    x = torch.full((batch, 1), 1.5, dtype=torch.float64)
    off_posterior = torch.full_like(x, 0.2), torch.full_like(x, 0.3)
    return [
        mean_and_error(encoder_gradient(b, num_samples, *off_posterior, x, scalar_model()))
        for b in bounds
    ]


def test_elbo_gradients_agree_with_the_closed_form():
    """For q = N(m, s^2) on the scalar model: dL/dm = x - 2m and dL/dlog s = 1 - 2 s^2."""
    expected = torch.tensor([1.5 - 2 * 0.2, 1 - 2 * math.exp(0.6)]).double()
    for mean, error in gradient_means(1, [iwae_bound, stl_surrogate, dreg_surrogate]):
        assert ((mean - expected).abs() < 4 * error + 1e-12).all()


def test_dreg_is_unbiased_for_five_samples_and_stl_is_not():
    plain, dreg, stl = gradient_means(5, [iwae_bound, dreg_surrogate, stl_surrogate])
    assert ((dreg[0] - plain[0]).abs() < 4 * torch.hypot(dreg[1], plain[1])).all()
    assert ((stl[0] - plain[0]).abs() > 10 * torch.hypot(stl[1], plain[1])).any()
    assert (dreg[1] < plain[1]).all()


@pytest.mark.parametrize("surrogate", [stl_surrogate, dreg_surrogate])
def test_model_gradients_are_those_of_the_bound(surrogate):
    model = ConvBernoulli(latent_dim=2)
    x = torch.bernoulli(torch.full((3, 784), 0.3))
    q = Independent(Normal(torch.zeros(3, 2), torch.ones(3, 2)), 1)

    def model_gradient(bound):
        torch.manual_seed(11)
        return torch.autograd.grad(bound(model, q, x, 4).sum(), list(model.parameters()))

    for a, b in zip(model_gradient(surrogate), model_gradient(iwae_bound), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("surrogate", [stl_surrogate, dreg_surrogate])
def test_surrogates_share_the_value_of_the_bound(surrogate):
    model, x = scalar_model(), torch.randn(5, 1).double()
    torch.manual_seed(5)
    expected = iwae_bound(model, prior_as_q(5), x, 6)
    torch.manual_seed(5)
    torch.testing.assert_close(surrogate(model, prior_as_q(5), x, 6), expected)


@pytest.mark.parametrize("num_zero", [1, 2, 4])
def test_weights_of_zero_count_as_zero_also_in_the_doubly_reparameterised_bound(num_zero):
    """Four draws, the first of which the model excludes: log 1/4 of the sum of the others."""

    class Excluding(LinearGaussian):
        def log_joint(self, x, z):
            excluded = (torch.arange(len(z)) < num_zero)[:, None]
            return super().log_joint(x, z).masked_fill(excluded, -torch.inf)

    model = Excluding(*(t.double() for t in (torch.ones(1, 1), torch.zeros(1))), 1.0)
    x, loc = torch.full((1, 1), 1.5).double(), torch.full((1, 1), 0.2).double().requires_grad_()
    torch.manual_seed(5)
    surrogate = dreg_surrogate(model, Independent(Normal(loc, torch.ones_like(loc)), 1), x, 4)
    torch.manual_seed(5)
    z = loc.detach() + torch.randn(4, 1, 1).double()[num_zero:]
    log_ratio = -0.5 * (1.5 - z).square() - 0.5 * z.square() + 0.5 * (z - 0.2).square()
    weights = torch.exp(log_ratio - 0.5 * math.log(2 * math.pi))[..., 0]
    torch.testing.assert_close(surrogate.detach(), torch.log(weights.sum(0) / 4))
    (grad,) = torch.autograd.grad(surrogate.sum(), loc)
    share = weights / weights.sum(0)
    expected = (share.square() * (1.5 - z - z + z - 0.2)[..., 0]).sum(0, keepdim=True)
    torch.testing.assert_close(grad, expected)


def test_bad_arguments_are_named():
    model, x = scalar_model(), torch.zeros(4, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="num_samples must be an integer, at least 1; got 0"):
        elbo(model, prior_as_q(4), x, 0)
    with pytest.raises(ValueError, match=r"batch shape is \(3,\), and x has shape \(4, 1\)"):
        iwae_bound(model, prior_as_q(3), x, 2)


def test_a_q_that_cannot_be_held_fixed_is_refused():
    class Flow(Normal):
        def log_prob(self, value):
            return super().log_prob(value) + shift.sum()

    shift = nn.Parameter(torch.zeros(1).double())
    q = Independent(Flow(torch.zeros(4, 1).double(), torch.ones(4, 1).double()), 1)
    with pytest.raises(TypeError, match="cannot be held fixed"):
        stl_surrogate(scalar_model(), q, torch.zeros(4, 1).double())
