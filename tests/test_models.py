"""Models and encoders: closed forms of the linear-Gaussian model, shapes, and clear errors."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

from amortised import evaluation, results
from amortised.encoders import GaussianEncoder, bounded_log_scale, conv_trunk
from amortised.models import BernoulliDecoder, ConvBernoulli, LatentVariableModel, LinearGaussian
from amortised.objectives import iwae_bound


def linear_gaussian(latent_dim=2, observation_dim=3, noise_scale=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    model = LinearGaussian(
        normal(observation_dim, latent_dim), normal(observation_dim), noise_scale
    )
    return model, normal(5, observation_dim)


def test_scalar_model_has_the_known_evidence_and_posterior():
    model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    x = torch.tensor([[0.0], [1.5]])
    expected = torch.tensor([-1.265512, -1.828012])
    torch.testing.assert_close(model.log_evidence(x), expected, atol=1e-6, rtol=0)
    posterior = model.posterior(x)
    torch.testing.assert_close(posterior.mean, x / 2)
    torch.testing.assert_close(posterior.variance, torch.full((2, 1), 0.5))


@pytest.mark.parametrize(("latent_dim", "observation_dim"), [(1, 1), (2, 3), (5, 4), (3, 20)])
def test_bayes_rule_holds_at_any_point(latent_dim, observation_dim):
    model, x = linear_gaussian(latent_dim, observation_dim)
    z = torch.randn(7, 5, latent_dim, dtype=torch.float64)
    evidence = model.log_joint(x, z) - model.posterior(x).log_prob(z)
    torch.testing.assert_close(evidence, model.log_evidence(x).expand(7, 5))


def test_evidence_by_quadrature():
    model, x = linear_gaussian(latent_dim=1, observation_dim=3)
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    log_joint = model.log_joint(x, grid.reshape(-1, 1, 1).expand(-1, 5, 1))
    by_quadrature = torch.logsumexp(log_joint, 0) + math.log(grid[1] - grid[0])
    torch.testing.assert_close(by_quadrature, model.log_evidence(x), atol=1e-9, rtol=0)


def test_fisher_identity_against_autograd_of_the_evidence():
    """The gradient of log p(x) is the posterior mean of the gradient of log p(x, z).

    The posterior expectation is exact: log p(x, z) is quadratic in z, so its mean under the
    posterior is its value on the symmetric sigma points mean +- sqrt(D) * columns of the factor.
    """
    model, x = linear_gaussian(latent_dim=3, observation_dim=4)
    parameters = list(model.parameters())
    exact = torch.autograd.grad(model.log_evidence(x).sum(), parameters)
    with torch.no_grad():
        posterior = model.posterior(x)
        offsets = math.sqrt(3) * posterior.scale_tril.transpose(-1, -2)
        points = torch.cat(
            [posterior.mean + offsets.transpose(0, 1), posterior.mean - offsets.transpose(0, 1)]
        )
    fisher = torch.autograd.grad(model.log_joint(x, points).mean(0).sum(), parameters)
    for a, b in zip(fisher, exact, strict=True):
        torch.testing.assert_close(a, b)


def test_elbo_gradient_differs_from_fisher_where_q_has_the_wrong_mean():
    """Scalar model with x | z ~ N(z + theta, s2): gradients (x - theta - m) / s2 and
    (x - theta) / (1 + s2)."""
    noise, shift, x, mean = 0.5, 0.3, 1.2, 0.1
    model = LinearGaussian(torch.ones(1, 1), torch.tensor([shift]), noise)
    observation = torch.tensor([[x]])
    (exact,) = torch.autograd.grad(model.log_evidence(observation).sum(), model.bias)
    assert exact.item() == pytest.approx((x - shift) / (1 + noise**2), rel=1e-5)
    at_wrong_mean = model.log_joint(observation, torch.tensor([[mean]])).sum()
    (biased,) = torch.autograd.grad(at_wrong_mean, model.bias)
    assert biased.item() == pytest.approx((x - shift - mean) / noise**2, rel=1e-5)


def test_ancestral_samples_have_the_model_covariance():
    model, _ = linear_gaussian(latent_dim=2, observation_dim=3)
    torch.manual_seed(0)
    x, z = model.sample(200_000)
    covariance = (model.weight @ model.weight.T + model.noise_scale**2 * torch.eye(3)).detach()
    # the standard error of a covariance entry is sqrt((c_ii c_jj + c_ij^2) / n)
    spread = torch.outer(covariance.diag(), covariance.diag()) + covariance**2
    error = (torch.cov(x.T) - covariance) / (spread / 200_000).sqrt()
    assert error.abs().max() < 4.5
    assert z.shape == (200_000, 2)


def test_linear_gaussian_refuses_bad_arguments():
    with pytest.raises(ValueError, match=r"\(3, 2\), \(2,\)"):
        LinearGaussian(torch.zeros(3, 2), torch.zeros(2), 1.0)
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="positive scalar"):
            LinearGaussian(torch.zeros(3, 2), torch.zeros(3), scale)


def test_shapes_are_checked_with_the_shape_in_the_message():
    model, x = linear_gaussian()
    with pytest.raises(ValueError, match=r"latent_dim=2; got \(5, 4\)"):
        model.log_joint(x, torch.zeros(5, 4, dtype=torch.float64))
    conv = ConvBernoulli()
    with pytest.raises(ValueError, match=r"observation_dim=784; got shape \(1, 28, 28\)"):
        conv.log_joint(torch.zeros(1, 28, 28), torch.zeros(1, 32))
    with pytest.raises(ValueError, match="latent_dim must be an integer, at least 1; got 0"):
        BernoulliDecoder(nn.Identity(), latent_dim=0, observation_dim=1)
    with pytest.raises(TypeError, match="must define likelihood"):
        LatentVariableModel(1, 1).likelihood(torch.zeros(1, 1))


def test_conv_bernoulli_is_the_decoder_of_the_book():
    model = ConvBernoulli()
    sides = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: sides.append(tuple(out.shape[1:])))
        for layer in model.decoder
        if isinstance(layer, nn.ConvTranspose2d)
    ]
    mean = model.likelihood(torch.zeros(3, 2, 32)).mean
    for hook in hooks:
        hook.remove()
    assert sides == [(32, 7, 7), (16, 14, 14), (1, 28, 28)]
    assert mean.shape == (3, 2, 784)
    assert sum(p.numel() for p in model.parameters()) == 311_861


def test_a_mixture_as_the_prior_is_that_mixture_and_is_learned(tmp_path):
    torch.manual_seed(0)
    model = ConvBernoulli(latent_dim=3, num_components=2)
    with torch.no_grad():
        model.prior_logits.copy_(torch.tensor([0.0, 1.0]))
        model.prior_log_scales.copy_(torch.tensor([[0.1, -0.2, 0.3], [0.0, 0.5, -0.4]]))
    z = torch.randn(5, 3)
    weights = torch.tensor([1.0, math.e]) / (1.0 + math.e)
    scales = model.prior_log_scales.exp()
    square = (((z[:, None] - torch.eye(2, 3)) / scales) ** 2).sum(-1)
    densities = torch.exp(-0.5 * square) / (scales.prod(-1) * (2 * math.pi) ** 1.5)
    torch.testing.assert_close(model.prior().log_prob(z), (weights * densities).sum(-1).log())
    x, z = model.sample(4000)
    assert x.shape == (4000, 784)
    expected = weights @ torch.eye(2, 3)
    assert (z.mean(0) - expected).abs().max() < 4 * z.std(0).max() / 4000**0.5
    q = Independent(Normal(torch.zeros(1, 3), torch.ones(1, 3)), 1)
    iwae_bound(model, q, x[:1], 1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    path, architecture = tmp_path / "decoder.safetensors", {"class": "ConvBernoulli"}
    architecture |= {"latent_dim": 3, "num_components": 2}
    results.save_weights(path, model, architecture)
    assert torch.equal(evaluation.load_module(path).prior_logits, model.prior_logits)
    with pytest.raises(ValueError, match="num_components = 4 is more than latent_dim = 3"):
        ConvBernoulli(3, 4)


def test_bernoulli_likelihood_is_the_binary_cross_entropy():
    torch.manual_seed(0)
    model, z = ConvBernoulli(latent_dim=4), torch.randn(3, 2, 4)
    x = torch.bernoulli(torch.rand(2, 784))
    p = model.likelihood(z).mean.double()
    expected = torch.where(x == 1, p, 1 - p).log().sum(-1)
    torch.testing.assert_close(model.log_likelihood(x, z).double(), expected, rtol=1e-5, atol=1e-3)


def test_bernoulli_likelihood_refuses_grey_values():
    model = ConvBernoulli(latent_dim=4)
    with pytest.raises(ValueError, match="support"):
        model.log_joint(torch.full((2, 784), 0.5), torch.zeros(2, 4))


def test_bounded_log_scale_is_a_smooth_increasing_map_onto_the_range():
    raw = torch.linspace(-40, 40, 2001, dtype=torch.float64, requires_grad=True)
    log_scale = bounded_log_scale(raw)
    (slope,) = torch.autograd.grad(log_scale.sum(), raw)
    assert -8 < log_scale.min() < -7.99 and 3.99 < log_scale.max() < 4
    assert (slope > 0).all()
    assert log_scale[1000].item() == pytest.approx(0, abs=1e-12)
    assert slope[1000].item() == pytest.approx(1)


def test_gaussian_encoder_shapes_and_gradients():
    torch.manual_seed(0)
    encoder = GaussianEncoder(latent_dim=8, trunk=nn.Linear(10, 6), num_features=6)
    q = encoder(torch.randn(5, 10))
    assert (q.batch_shape, q.event_shape) == ((5,), (8,))
    q.log_prob(q.rsample((3,))).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_conv_trunk_mirrors_the_decoder():
    sides = [m for m in conv_trunk() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels) for m in sides] == [(1, 16), (16, 32), (32, 32)]
    assert sum(isinstance(m, nn.LeakyReLU) for m in conv_trunk(negative_slope=0.2)) == 4
    assert conv_trunk(64)(torch.zeros(2, 784)).shape == (2, 64)


def test_a_decoder_starts_at_the_mean_pixel():
    """One bias for the image of a convolution, one for each pixel of a dense layer."""
    images = (torch.rand(200, 784) < 0.13).float() * torch.rand(200, 784)
    conv, dense = ConvBernoulli(), BernoulliDecoder(nn.Linear(2, 784), 2, 784)
    for model, mean in ((conv, images.mean().reshape(1)), (dense, images.mean(0))):
        weights = [p for p in model.parameters() if p.shape != mean.shape]
        before = [p.clone() for p in weights]
        model.start_at_mean(images)
        torch.testing.assert_close(list(model.parameters())[-1].sigmoid(), mean)
        assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    with pytest.raises(ValueError, match=r"between 0 and 1; got 0 to 0\.5"):
        dense.start_at_mean(torch.linspace(0, 0.5, 784).expand(3, 784))
