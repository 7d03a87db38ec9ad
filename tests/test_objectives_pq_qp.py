"""The two directions of the divergence, on models whose posteriors are known exactly.

Numbers to four decimals are computed independently of the library: from the conjugate formulas
written out, or by quadrature on a grid finer than those here.
"""

import itertools
import math

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from amortised.encoders import ParallelPerceptrons
from amortised.models import GaussianMixture, LinearGaussian
from amortised.objectives import (
    elbo,
    importance_log_weights,
    iwae_bound,
    pq_loss,
    qp_loss,
    score_function_surrogate,
    wake_phi_loss,
    wake_theta_loss,
)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def column(*values):
    return double(*values).unsqueeze(-1)


def two_clusters():
    """z from N(-5, 1) or N(5, 1), x from N(z, 10^2)."""
    return GaussianMixture(double(1, 1), double(-5, 5), double(1, 1), 10.0)


def unknown_mean():
    """z from N(0, 1), x from N(z, 1)."""
    return LinearGaussian(torch.ones(1, 1).double(), torch.zeros(1).double(), 1.0)


def gaussian(mean, scale):
    return Independent(Normal(mean, scale), 1)


def assert_within_error(draws, truth, num_standard_errors=4.5):
    """Column means of ``draws [N, ...]`` against the truth; 4.5 errors fail one in 150,000."""
    error = draws.std(0) / math.sqrt(len(draws))
    distance = (draws.mean(0) - truth).abs() / error.clamp_min(1e-12)
    assert (distance < num_standard_errors).all(), (draws.mean(0), truth, error)


# --- the model with an exact posterior -----------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "mean", "scale", "right"),
    [
        (0.0, 0.0000, 5.0495, 0.5000),
        (5.0, 1.2504, 4.9046, 0.6213),
        (10.0, 2.3674, 4.5113, 0.7291),
        (20.0, 3.9475, 3.3821, 0.8787),
        (30.0, 4.7645, 2.3536, 0.9512),
        (50.0, 5.3759, 1.2940, 0.9930),
        (80.0, 5.7390, 1.0128, 0.9996),
    ],
)
def test_posterior_of_two_clusters(x, mean, scale, right):
    posterior = two_clusters().posterior(column(x))
    assert posterior.mean.item() == pytest.approx(mean, abs=6e-5)
    assert posterior.stddev.item() == pytest.approx(scale, abs=6e-5)
    assert posterior.mixture_distribution.probs[0, 1].item() == pytest.approx(right, abs=6e-5)
    component = posterior.component_distribution
    torch.testing.assert_close(component.mean[0, :, 0], double(-500 + x, 500 + x) / 101)
    torch.testing.assert_close(component.stddev[0, :, 0], double(1, 1) * math.sqrt(100 / 101))


@pytest.mark.parametrize(
    ("x", "one", "right_of_two", "mean", "scale"),
    [
        (0.0, 0.9981, 0.0010, 0.0000, 0.7156),
        (1.0, 0.9883, 0.0116, 0.5289, 0.7565),
        (2.0, 0.8747, 0.1253, 1.3132, 1.0886),
        (2.5, 0.6667, 0.3333, 2.0833, 1.3744),
        (3.0, 0.3643, 0.6357, 3.0893, 1.3955),
        (5.0, 0.0038, 0.9962, 4.9904, 0.7238),
        (8.0, 0.0000, 1.0000, 6.5000, 0.7071),
    ],
)
def test_posterior_of_the_open_universe(x, one, right_of_two, mean, scale):
    model = GaussianMixture(double(2, 1, 1), double(0, -5, 5), double(1, 1, 1), 1.0)
    posterior = model.posterior(column(x))
    branches = posterior.mixture_distribution.probs[0]
    assert branches[0].item() == pytest.approx(one, abs=6e-5)
    assert branches[2].item() == pytest.approx(right_of_two, abs=6e-5)
    assert posterior.mean.item() == pytest.approx(mean, abs=6e-5)
    assert posterior.stddev.item() == pytest.approx(scale, abs=6e-5)


def test_posterior_and_evidence_of_any_mixture_agree_with_enumeration_and_quadrature():
    weights, means = torch.rand(4).double() + 0.1, 3 * torch.randn(4).double()
    scales, x = torch.rand(4).double() + 0.3, 4 * torch.randn(5, 1).double()
    model = GaussianMixture(weights, means, scales, 1.7)
    z = torch.linspace(-40, 40, 40_001, dtype=torch.float64).unsqueeze(-1)
    dz = (z[1] - z[0]).item()
    log_joint = model.log_joint(x, z.unsqueeze(1))  # [G, 5]
    evidence = log_joint.exp().sum(0) * dz
    torch.testing.assert_close(model.log_evidence(x).exp(), evidence)
    posterior = model.posterior(x)
    torch.testing.assert_close(posterior.log_prob(z.unsqueeze(1)), log_joint - evidence.log())

    prior = weights / weights.sum()  # and the component, by enumeration
    likelihood = [
        (Normal(m, s).log_prob(z) + Normal(z, 1.7).log_prob(x[:, 0])).exp().sum(0) * dz
        for m, s in zip(means, scales, strict=True)
    ]
    joint = prior * torch.stack(likelihood, -1)
    torch.testing.assert_close(
        posterior.mixture_distribution.probs, joint / joint.sum(-1, keepdim=True)
    )


def test_one_component_is_the_linear_gaussian_model():
    mixture = GaussianMixture(double(3), double(0), double(1), 1.0)
    x = column(-2.0, 0.0, 1.5)
    torch.testing.assert_close(mixture.log_evidence(x), unknown_mean().log_evidence(x))
    torch.testing.assert_close(mixture.posterior(x).mean, x / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((double(1, 1), double(0), double(1), 1.0), "must all be"),
        ((double(1, 0), double(0, 1), double(1, 1), 1.0), "weights must be positive"),
        ((double(1, 1), double(0, 1), double(1, -1), 1.0), "scales must be positive"),
        ((double(1, 1), double(0, 1), double(1, 1), 0.0), "noise_scale must be positive"),
        ((double(1, 1), double(0, 1), double(1, 1), double(1, 2)), "noise_scale must be a scalar"),
    ],
)
def test_mixture_refuses_bad_parameters(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*arguments)


# --- optima --------------------------------------------------------------------------------------

OBSERVATIONS = [0.0, 5.0, 10.0, 20.0, 30.0, 50.0, 80.0, -7.3, 13.1, -41.0]


def test_pq_optimum_has_the_moments_of_the_posterior():
    """The best Gaussian on 20,000 posterior draws: moments exact up to their sampling error."""
    num_draws, model = 20_000, two_clusters()
    x = column(*OBSERVATIONS)
    z = model.posterior(x).sample((num_draws,))
    mean = torch.zeros_like(x, requires_grad=True)
    log_scale = torch.ones_like(x, requires_grad=True)

    def loss():
        q = gaussian(mean.expand_as(z), log_scale.exp().expand_as(z))
        return pq_loss(lambda _: q, x.expand_as(z), z).mean(0).sum()

    optimiser = torch.optim.LBFGS([mean, log_scale], max_iter=200, line_search_fn="strong_wolfe")
    optimiser.step(lambda: (optimiser.zero_grad(), value := loss(), value.backward())[1])

    exact = model.posterior(x)
    assert_within_error(z, exact.mean)
    assert_within_error((z - exact.mean).square(), exact.variance)
    torch.testing.assert_close(mean, z.mean(0), rtol=0, atol=2e-3)
    torch.testing.assert_close(log_scale.exp(), z.std(0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("other_mode", [False, True])
def test_qp_optimum_sits_on_one_component(other_mode):
    """Gradient descent on qp_loss from a start near one mode; where it ends, and what is left."""
    model = two_clusters().requires_grad_(False)
    x = column(*(x for x in OBSERVATIONS if abs(x) <= 30))
    sign = torch.where(x >= 0, 1.0, -1.0) * (-1 if other_mode else 1)
    mean = (4.0 * sign).requires_grad_()
    log_scale = torch.full_like(x, 0.5, requires_grad=True)
    optimiser = torch.optim.Adam([mean, log_scale], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 200)
    for _ in range(200):
        optimiser.zero_grad()
        qp_loss(model, gaussian(mean, log_scale.exp()), x, num_samples=300).sum().backward()
        optimiser.step()
        schedule.step()

    posterior = model.posterior(x)
    branch = (sign[:, 0] > 0).long()
    component = posterior.component_distribution.mean[torch.arange(len(x)), branch]
    assert (mean - component).abs().max() < 0.03
    assert (log_scale.exp() - 0.995).abs().max() < 0.03
    remaining = qp_loss(model, gaussian(mean, log_scale.exp()), x, 20_000) + model.log_evidence(x)
    log_weight = posterior.mixture_distribution.logits[torch.arange(len(x)), branch]
    assert (remaining.detach() + log_weight).abs().max() < 0.01


def quadrature(model, q, x, half_width=60, num_points=6001):
    """Forward and reverse divergence of ``q`` from the posterior, ``[B]`` each."""
    z = torch.linspace(-half_width, half_width, num_points, dtype=torch.float64)
    z, dz = z.reshape(-1, 1, 1), (2 * half_width) / (num_points - 1)
    log_p, log_q = model.posterior(x).log_prob(z), q.log_prob(z)
    forward = (log_p.exp() * (log_p - log_q)).sum(0) * dz
    reverse = (log_q.exp() * (log_q - log_p)).sum(0) * dz
    return forward, reverse


def test_average_losses_of_the_best_gaussians():
    model = two_clusters().requires_grad_(False)
    x = torch.linspace(-90, 90, 361, dtype=torch.float64).unsqueeze(-1)
    weight = model.log_evidence(x).softmax(0)
    exact = model.posterior(x)
    entropy_of_x = -(weight * model.log_evidence(x)).sum()
    assert entropy_of_x.item() == pytest.approx(3.8369, abs=2e-4)

    forward, _ = quadrature(model, gaussian(exact.mean, exact.stddev), x)
    assert (weight * forward).sum().item() == pytest.approx(0.9124, abs=2e-4)
    cross_entropy = gaussian(exact.mean, exact.stddev).entropy()
    assert (weight * cross_entropy).sum().item() == pytest.approx(2.9091, abs=2e-4)

    larger = exact.mixture_distribution.probs.argmax(-1)
    mode = exact.component_distribution.mean[torch.arange(len(x)), larger]
    _, reverse = quadrature(model, gaussian(mode, torch.full_like(mode, math.sqrt(100 / 101))), x)
    assert (weight * reverse).sum().item() == pytest.approx(0.3851, abs=3e-4)
    assert (weight * reverse).sum().item() + entropy_of_x.item() == pytest.approx(4.222, abs=5e-4)


# --- the losses at the exact posterior, and away from it -----------------------------------------


def affine(phi):
    """q(z given x) = N(a x + b, c^2) with one row (a, b, log c) of phi for each observation."""
    return lambda x: gaussian(phi[:, :1] * x + phi[:, 1:2], phi[:, 2:].exp())


def test_losses_at_the_exact_posterior_are_entropies_and_their_gradients_vanish():
    num_draws, model = 40_000, unknown_mean()
    x, z = model.sample(num_draws)
    phi = double(0.5, 0.0, 0.5 * math.log(0.5)).repeat(num_draws, 1).requires_grad_()
    losses = {
        "qp": (qp_loss(model, affine(phi)(x), x), 1.765512),
        "pq": (pq_loss(affine(phi), x, z), 1.072365),
    }
    for loss, entropy in losses.values():
        assert_within_error(loss.detach(), entropy)
        (gradient,) = torch.autograd.grad(loss.sum(), phi)
        assert gradient.abs().max() > 0.1  # it vanishes on average, not draw by draw
        assert_within_error(gradient, torch.zeros(3).double())


def test_price_of_taking_the_variance_for_the_standard_deviation():
    """The posterior has variance 1/2; an encoder with standard deviation 1/2 pays for it."""
    num_draws, model = 40_000, unknown_mean().requires_grad_(False)
    x, z = model.sample(num_draws)
    right, slip = (
        affine(double(0.5, 0.0, math.log(scale)).expand(num_draws, 3))
        for scale in (math.sqrt(0.5), 0.5)
    )
    assert_within_error(qp_loss(model, slip(x), x) - qp_loss(model, right(x), x), 0.0966)
    assert_within_error(pq_loss(slip, x, z) - pq_loss(right, x, z), 0.1534)
    assert kl_divergence(slip(x), right(x))[0].item() == pytest.approx(0.0966, abs=5e-5)
    assert kl_divergence(right(x), slip(x))[0].item() == pytest.approx(0.1534, abs=5e-5)


class Trace:
    """q(c, z given x) with one row (c, z) a draw: an object with ``log_prob`` and nothing else."""

    def __init__(self, posterior):
        self.posterior = posterior

    def log_prob(self, trace):
        c, z = trace[..., 0].long(), trace[..., 1:]
        log_z = self.posterior.component_distribution.log_prob(z.unsqueeze(-2))
        log_c = self.posterior.mixture_distribution.log_prob(c)
        return log_c + log_z.gather(-1, c.unsqueeze(-1)).squeeze(-1)


def test_pq_loss_of_a_trace_at_the_exact_posterior():
    """Branch and value together: E H(c given x) + H(z given x, c) = 0.5827 + 1.4140."""
    model, num_draws = two_clusters().requires_grad_(False), 40_000
    c = torch.randint(2, (num_draws, 1))
    z = torch.normal(10.0 * c - 5.0, 1.0).double()
    x = torch.normal(z, 10.0)
    loss = pq_loss(lambda x: Trace(model.posterior(x)), x, torch.cat([c, z], -1))
    assert_within_error(loss, 1.9967)


def test_qp_loss_of_a_trace_at_the_exact_posterior():
    """Every log-weight is log p(x), so the loss is -log p(x) whatever was drawn."""
    model = two_clusters().requires_grad_(False)
    x = 11 * torch.randn(100, 1).double()
    posterior = model.posterior(x)
    c = posterior.mixture_distribution.sample((3,))
    component = posterior.component_distribution
    z = component.sample((3,)).gather(-2, c[..., None, None])[..., 0, :]
    trace = torch.cat([c.unsqueeze(-1), z], -1)
    log_joint = math.log(0.5) + Normal(10.0 * c - 5.0, 1.0).log_prob(z[..., 0])
    log_joint = log_joint + Normal(z, 10.0).log_prob(x)[..., 0]
    log_c = posterior.mixture_distribution.log_prob(c)
    bound = score_function_surrogate(log_joint - Trace(posterior).log_prob(trace), log_c)
    torch.testing.assert_close(bound, model.log_evidence(x))


def encoder_at(x, gradient=False):
    """An arbitrary Gaussian encoder of two clusters, and its parameters for each observation."""
    mean = (0.2 * x + 1.0).requires_grad_(gradient)
    log_scale = (0.8 - 0.01 * x).requires_grad_(gradient)
    return (mean, log_scale), gaussian(mean, log_scale.exp())


def test_excess_of_each_loss_is_the_divergence_by_quadrature():
    model, x = two_clusters().requires_grad_(False), column(-20.0, 0.0, 10.0)
    _, q = encoder_at(x)
    forward, reverse = quadrature(model, q, x)
    many = x.expand(100_000, 3, 1)
    z = model.posterior(many).sample()
    excess_pq = pq_loss(lambda x: encoder_at(x)[1], many, z) + model.posterior(many).log_prob(z)
    assert_within_error(excess_pq, forward)
    excess_qp = qp_loss(model, encoder_at(many)[1], many) + model.log_evidence(many)
    assert_within_error(excess_qp, reverse)


# --- gradients -----------------------------------------------------------------------------------


def replicates(x, num_draws):
    """The encoder with one copy of its parameters for each draw, so that gradients stay apart."""
    parameters, q = encoder_at(x.expand(num_draws, *x.shape).clone(), gradient=True)
    return parameters, q


def per_draw(loss, parameters):
    return torch.cat(torch.autograd.grad(loss.sum(), parameters), -1)  # [N, B, 2]


@pytest.fixture
def exact_gradients():
    model, x = two_clusters().requires_grad_(False), column(-20.0, 0.0, 10.0)
    parameters, q = encoder_at(x, gradient=True)
    forward, reverse = quadrature(model, q, x)
    return (
        model,
        x,
        *(
            torch.cat(torch.autograd.grad(kl.sum(), parameters, retain_graph=True), -1)
            for kl in (forward, reverse)
        ),
    )


def test_qp_gradient_is_unbiased(exact_gradients):
    model, x, _, reverse = exact_gradients
    parameters, q = replicates(x, 100_000)
    gradient = per_draw(qp_loss(model, q, x.expand(100_000, 3, 1)), parameters)
    assert_within_error(gradient, reverse)


def test_pq_gradient_is_unbiased(exact_gradients):
    model, x, forward, _ = exact_gradients
    x = x.expand(100_000, 3, 1)
    parameters, q = replicates(x[0], 100_000)
    gradient = per_draw(pq_loss(lambda _: q, x, model.posterior(x).sample()), parameters)
    assert_within_error(gradient, forward)


def test_wake_phi_gradient_tends_to_that_of_the_forward_divergence():
    """Zero on average for one particle; then its distance to the limit falls about as 1 / K."""
    model, x = two_clusters().requires_grad_(False), column(-20.0, 0.0, 10.0)

    def parameters(num_draws):  # wide enough for the weights to have a finite variance
        mean = (0.2 * x + 1.0).expand(num_draws, 3, 1).clone().requires_grad_()
        return mean, torch.full_like(mean, math.log(6.0)).requires_grad_()

    mean, log_scale = parameters(1)
    forward, _ = quadrature(model, gaussian(mean[0], log_scale[0].exp()), x)
    (forward,) = per_draw(forward, (mean, log_scale))
    bias = {}
    for num_samples, num_draws in ((1, 50_000), (10, 40_000), (40, 40_000)):
        mean, log_scale = parameters(num_draws)
        q = gaussian(mean, log_scale.exp())
        loss = wake_phi_loss(model, q, x.expand(num_draws, 3, 1), num_samples)
        gradient = per_draw(loss, (mean, log_scale))
        bias[num_samples] = (gradient.mean(0) - forward).norm()
        if num_samples == 1:
            assert_within_error(gradient, torch.zeros_like(forward))
    assert 3 < bias[10] / bias[40] < 7


def model_gradients(loss, model):
    return torch.autograd.grad(loss, (model.means, model.log_noise_scale), retain_graph=True)


def test_wake_theta_has_the_gradient_of_the_importance_weighted_bound():
    """The model's gradient of -L_K on the same draws; for K = 1 it is exact on average."""
    x, model = column(-20.0, 0.0, 10.0), two_clusters()
    _, q = encoder_at(x)
    for num_samples in (1, 5):
        torch.manual_seed(1)
        wake = wake_theta_loss(model, q, x, num_samples)
        torch.manual_seed(1)
        bound = -iwae_bound(model, q, x, num_samples)
        torch.testing.assert_close(wake, bound)
        for a, b in zip(*(model_gradients(v.sum(), model) for v in (wake, bound)), strict=True):
            torch.testing.assert_close(a, b)

    grid = torch.linspace(-60, 60, 12_001, dtype=torch.float64).reshape(-1, 1, 1)
    expected_log_joint = (q.log_prob(grid).exp() * model.log_joint(x, grid)).sum(0) * 0.01
    exact = model_gradients(-expected_log_joint.sum(), model)
    many = x.expand(20_000, 3, 1)
    estimate = wake_theta_loss(model, encoder_at(many)[1], many, 1).sum(-1)
    batches = [model_gradients(part.mean(), model) for part in estimate.chunk(20)]
    for gradients, truth in zip(zip(*batches, strict=True), exact, strict=True):
        assert_within_error(torch.stack(gradients), truth)


@pytest.mark.parametrize(
    ("num_samples", "baseline"), [(1, False), (2, False), (2, True), (3, True)]
)
def test_score_function_is_unbiased_by_enumeration(num_samples, baseline):
    """Every outcome of K draws from four values, weighted by its probability: no sampling."""
    logits = torch.randn(4).double().requires_grad_()
    coefficient = torch.randn(4).double().requires_grad_()

    def f(c):  # depends on both, as log p(c, x) - log q(c) does
        return (
            (coefficient * coefficient[c].exp() - logits)[c]
            if c.ndim == 0
            else torch.stack([f(value) for value in c])
        )

    log_q = Categorical(logits=logits).logits
    values = torch.arange(4)
    exact = torch.autograd.grad((log_q.exp() * f(values)).sum(), (logits, coefficient))
    total = [torch.zeros(4).double(), torch.zeros(4).double()]
    for outcome in itertools.product(range(4), repeat=num_samples):
        c = torch.tensor(outcome)
        log_q = Categorical(logits=logits).logits
        surrogate = score_function_surrogate(f(c)[:, None], log_q[c][:, None], baseline)
        torch.testing.assert_close(surrogate.sum(), f(c).mean())
        probability = log_q[c].sum().exp().detach()
        for part, gradient in zip(
            total, torch.autograd.grad(surrogate.sum(), (logits, coefficient)), strict=True
        ):
            part += probability * gradient
    torch.testing.assert_close(total[0], exact[0])
    torch.testing.assert_close(total[1], exact[1])


def test_baseline_lowers_the_variance_of_the_score_function():
    logits = torch.zeros(50_000, requires_grad=True)
    c = torch.bernoulli(torch.full((2, 50_000), 0.5))
    log_q = c * logits.sigmoid().log() + (1 - c) * (-logits).sigmoid().log()
    values = 3.0 + c
    variance = {
        baseline: torch.autograd.grad(
            score_function_surrogate(values, log_q, baseline).sum(), logits, retain_graph=True
        )[0].var()
        for baseline in (False, True)
    }
    assert variance[True] < 0.1 * variance[False]


# --- what each loss touches ----------------------------------------------------------------------


def test_pq_loss_cuts_the_graph_at_both_draws():
    """Draws that still carry the model's graph: the sleep phase must not train the model."""
    model = unknown_mean()
    z = model.prior().rsample((50,))
    x = model.likelihood(z).rsample() + 0 * model.weight.sum()
    z = z * model.weight[0, 0]
    assert x.requires_grad and z.requires_grad
    phi = torch.zeros(50, 3, dtype=torch.float64, requires_grad=True)
    pq_loss(affine(phi), x, z).sum().backward()
    assert phi.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_wake_losses_train_one_side_only_and_need_no_reparameterisation():
    model, x = two_clusters(), column(-3.0, 8.0)
    logits = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    exact = model.posterior(x)
    q = type(exact)(
        Categorical(logits=logits),
        Independent(Normal(exact.component_distribution.mean.detach(), 1.0), 1),
    )
    assert not q.has_rsample
    wake_phi_loss(model, q, x, 10).sum().backward()
    assert logits.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    logits.grad = None
    wake_theta_loss(model, q, x, 10).sum().backward()
    assert logits.grad is None
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_wake_losses_at_the_exact_posterior():
    model, x = two_clusters(), column(-3.0, 8.0)
    for num_samples in (1, 6):
        bound = wake_theta_loss(model, model.posterior(x), x, num_samples)
        torch.testing.assert_close(bound, -model.log_evidence(x))
    posterior = model.posterior(x.expand(40_000, 2, 1))  # equal weights: the mean of -log q
    loss = wake_phi_loss(model, posterior, x.expand(40_000, 2, 1), 3).detach()
    z = model.posterior(x).sample((40_000,))
    entropy = -model.posterior(x).log_prob(z).detach()
    error = (loss.var(0) / 40_000 + entropy.var(0) / 40_000).sqrt()
    assert ((loss.mean(0) - entropy.mean(0)).abs() < 4.5 * error).all()


def test_qp_loss_is_the_negative_elbo_and_seeds_run_side_by_side():
    model, x = two_clusters(), 10 * torch.randn(3, 5, 1).double()
    _, q = encoder_at(x)
    torch.manual_seed(1)
    loss = qp_loss(model, q, x, num_samples=4)
    torch.manual_seed(1)
    torch.testing.assert_close(loss, -elbo(model, q, x, 4))
    assert loss.shape == (3, 5)
    assert importance_log_weights(model, q, x, 4).shape == (4, 3, 5)


def test_bad_input_is_refused_with_its_shape():
    model, x = two_clusters(), column(1.0, 2.0)
    _, q = encoder_at(x)
    with pytest.raises(ValueError, match=r"batch shape; got \(2, 1\) and \(3, 1\)"):
        pq_loss(lambda x: encoder_at(x)[1], x, torch.zeros(3, 1))
    for loss in (wake_phi_loss, wake_theta_loss, qp_loss):
        with pytest.raises(ValueError, match="num_samples must be an integer, at least 1; got 0"):
            loss(model, q, x, 0)
        with pytest.raises(ValueError, match="one distribution per observation"):
            loss(model, q, torch.zeros(3, 1), 2)
    with pytest.raises(ValueError, match="at least 2 samples; got 1"):
        score_function_surrogate(torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="must both be"):
        score_function_surrogate(torch.zeros(2, 3), torch.zeros(2, 4))


# --- networks side by side -----------------------------------------------------------------------


def test_parallel_perceptrons_are_independent_networks():
    networks, x = ParallelPerceptrons(3, 2, 8, 8, 4), torch.randn(3, 10, 2)
    together = networks(x)
    for s in range(3):
        y = x[s]
        for layer, (weight, bias) in enumerate(zip(networks.weights, networks.biases, strict=True)):
            y = (y.tanh() if layer else y) @ weight[s] + bias[s]
        torch.testing.assert_close(together[s], y)
    together[1].sum().backward()
    for parameter in networks.parameters():
        assert parameter.grad[1].abs().max() > 0
        assert (parameter.grad[[0, 2]] == 0).all()
    for parameter, inputs in zip(networks.weights, (2, 8, 8), strict=True):
        assert parameter.abs().max() <= 1 / math.sqrt(inputs)


def test_parallel_perceptrons_refuse_sizes_that_make_no_network():
    with pytest.raises(ValueError, match=r"the input and the output; got \(2,\)"):
        ParallelPerceptrons(3, 2)
    with pytest.raises(ValueError, match="num_networks must be an integer, at least 1; got 0"):
        ParallelPerceptrons(0, 2, 3)
    with pytest.raises(ValueError, match=r"sizes\[1\] must be an integer, at least 1; got 0"):
        ParallelPerceptrons(3, 2, 0, 3)


@pytest.mark.parametrize("num_zero", [1, 4])
def test_draws_that_the_model_excludes_teach_wake_phi_nothing(num_zero):
    class Excluding(LinearGaussian):
        def log_joint(self, x, z):
            excluded = (torch.arange(len(z)) < num_zero)[:, None]
            return super().log_joint(x, z).masked_fill(excluded, -torch.inf)

    model, x = Excluding(torch.ones(1, 1), torch.zeros(1), 1.0), torch.full((1, 1), 1.5)
    q = Independent(Normal(torch.full((1, 1), 0.2), 1.0), 1)
    torch.manual_seed(5)
    loss = wake_phi_loss(model, q, x, 4)
    torch.manual_seed(5)
    z = q.sample((4,))[num_zero:]
    weights = (-0.5 * (1.5 - z).square() - 0.5 * z.square() + 0.5 * (z - 0.2).square()).softmax(0)
    expected = -(weights[..., 0] * Normal(0.2, 1.0).log_prob(z)[..., 0]).sum(0)
    torch.testing.assert_close(loss.detach(), expected)
