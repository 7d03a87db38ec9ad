"""Imputation and its scores: hand-computed cases, Gibbs limits, the exact conditional."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from amortised.ais import AISSettings, linear_schedule
from amortised.encoders import GaussianEncoder, ImplicitEncoder
from amortised.imputation import (
    MASKS,
    conditional_samples,
    impute,
    label_entropy,
    missing_mask,
    nearest_neighbour_l1,
    observed_log_likelihood,
)
from amortised.models import BernoulliDecoder, ConvBernoulli, GaussianMixture, LinearGaussian


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- masks ---------------------------------------------------------------------------------------


def test_masks_take_the_pixels_that_their_names_say():
    lower, left, square = (
        missing_mask(kind).reshape(28, 28) for kind in ("lower_half", "left_half", "square")
    )
    assert lower.flatten()[392:].all() and not lower.flatten()[:392].any()
    assert left[:, :14].all() and not left[:, 14:].any()
    assert square[7:21, 7:21].all() and square.sum() == 14 * 14
    assert all(missing_mask(kind).shape == (784,) for kind in MASKS)


def test_the_random_mask_has_its_fraction_and_its_generator():
    mask = missing_mask("random", generator=generator())
    assert mask.sum() == 627 and torch.equal(mask, missing_mask("random", generator=generator()))
    assert not torch.equal(mask, missing_mask("random", generator=generator(1)))
    assert missing_mask("random", fraction=0.25).sum() == 196


def test_masks_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"kind must be one of lower_half, .*; got 'upper_half'"):
        missing_mask("upper_half")
    with pytest.raises(ValueError, match=r"fraction must lie between 0 and 1; got 1\.5"):
        missing_mask("random", fraction=1.5)


# --- scores --------------------------------------------------------------------------------------


def test_label_entropy_of_hand_computed_cases():
    labels = torch.tensor([[7, 1, 0], [7, 1, 1], [7, 2, 2], [7, 2, 3]])
    entropy = label_entropy(labels)
    expected = torch.tensor([0.0, math.log(2), math.log(4)])
    torch.testing.assert_close(entropy, expected, atol=1e-6, rtol=0)
    # the constant inside the logarithm, to the digit
    exact = -math.log(1 + 1e-7)
    assert entropy[0].item() == pytest.approx(exact, rel=1e-3)
    all_ten = label_entropy(torch.arange(10).unsqueeze(1))
    assert all_ten.item() == pytest.approx(math.log(10), abs=2e-6)
    with pytest.raises(ValueError, match=r"from 0 to 9; got shape \(4,\)"):
        label_entropy(labels[:, 0])
    with pytest.raises(ValueError, match="from 0 to 9"):
        label_entropy(torch.tensor([[10]]))


def test_nearest_neighbour_of_hand_computed_cases():
    train = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.4, 1.0]])
    images = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    found = nearest_neighbour_l1(images, train)
    assert found.index.tolist() == [1, 2, 0]
    torch.testing.assert_close(found.distance, torch.tensor([0.5, 0.4, 0.0]) / 4)


def test_nearest_neighbours_equal_a_search_by_hand_whatever_the_chunks():
    images = torch.bernoulli(torch.full((3, 5, 49), 0.3), generator=generator())
    train = torch.rand(40, 49, generator=generator(1))
    distance = (images.unsqueeze(-2) - train).abs().mean(-1)
    for chunk_size in (1, 4, 256):
        found = nearest_neighbour_l1(images, train, chunk_size)
        torch.testing.assert_close(found.distance, distance.min(-1).values)
        assert torch.equal(found.index, distance.min(-1).indices)


def test_nearest_neighbour_refuses_what_the_formula_does_not_cover():
    binary, grey = torch.ones(2, 4), torch.rand(3, 4)
    with pytest.raises(ValueError, match="images must be binary"):
        nearest_neighbour_l1(grey, grey)
    with pytest.raises(ValueError, match="divide levels by 255"):
        nearest_neighbour_l1(binary, 255 * binary)
    with pytest.raises(ValueError, match=r"got shapes \(2, 4\) and \(3, 3\)"):
        nearest_neighbour_l1(binary, grey[:, :3])


# --- the loop ------------------------------------------------------------------------------------


def correlated_model():
    weight = torch.tensor([[1.0, 0.3], [0.9, -0.5], [1.0, 0.8], [0.2, 1.1]]).double()
    return LinearGaussian(weight, torch.tensor([0.5, 0.0, -0.5, 1.0]).double(), 0.7)


def exact_conditional(model, x, mask):
    """Mean ``[B, M]`` and covariance ``[M, M]`` of the missing given the observed, one mask."""
    covariance = model.weight @ model.weight.T + 0.49 * torch.eye(4)
    cross = covariance[mask][:, ~mask] @ torch.linalg.inv(covariance[~mask][:, ~mask])
    mean = model.bias[mask] + (x[:, ~mask] - model.bias[~mask]) @ cross.T
    return mean.detach(), (covariance[mask][:, mask] - cross @ covariance[~mask][:, mask]).detach()


def assert_conditional(completed, model, x, mask, num_samples):
    """Means and covariances of independent completions ``[K, B, P]``, within 4 s.e."""
    mean, covariance = exact_conditional(model, x, mask)
    missing = completed[..., mask]
    variance = covariance.diagonal()
    assert ((missing.mean(0) - mean).abs() < 4 * (variance / num_samples).sqrt()).all()
    centred = missing - mean
    found = torch.einsum("kbi,kbj->bij", centred, centred) / len(centred)
    error = ((covariance.square() + torch.outer(variance, variance)) / num_samples).sqrt()
    assert ((found - covariance).abs() < 4 * error).all()


def test_with_the_exact_posterior_imputation_is_a_gibbs_sampler():
    model, mask = correlated_model(), torch.tensor([False, True, False, True])
    x = torch.tensor([[1.0, 0.0, 0.5, 0.0], [-2.0, 0.0, 1.0, 0.0]]).double()
    completed = impute(model, model.posterior, x, mask, num_iterations=40, num_chains=6000)
    assert_conditional(completed, model, x, mask, 6000)


@pytest.mark.parametrize("noise", ["gaussian", "bernoulli", "density"])
def test_observed_pixels_are_never_changed_and_missing_ones_never_looked_at(noise):
    model = ConvBernoulli()
    encoder = GaussianEncoder() if noise == "density" else ImplicitEncoder(32, noise)
    x = torch.bernoulli(torch.full((2, 784), 0.3))
    masks = torch.stack([missing_mask("lower_half"), missing_mask("random")])
    hidden = torch.where(masks, torch.nan, x)
    torch.manual_seed(1)
    completed = impute(model, encoder, hidden, masks, num_iterations=2, num_chains=3)
    assert completed.shape == (3, 2, 784) and not completed.requires_grad
    assert ((completed == x) | masks).all()
    assert ((completed == 0) | (completed == 1)).all()
    assert (completed[0] != completed[1]).any()
    torch.manual_seed(1)
    assert torch.equal(impute(model, encoder, x, masks, 2, 3), completed)


def test_an_imputation_can_go_on_from_an_earlier_one():
    model, mask = correlated_model(), torch.tensor([False, True, False, True])
    x = torch.zeros(3, 4).double()
    torch.manual_seed(2)
    at_once = impute(model, model.posterior, x, mask, 5, num_chains=2)
    torch.manual_seed(2)
    first = impute(model, model.posterior, x, mask, 2, num_chains=2)
    assert torch.equal(impute(model, model.posterior, x, mask, 3, 2, start=first), at_once)


def test_the_encoder_sees_the_start_at_missing_pixels():
    model, seen = correlated_model(), []

    def encoder(x):
        seen.append(x.clone())
        return model.posterior(x)

    x = torch.full((1, 4), 9.0).double()
    impute(model, encoder, x, torch.tensor([False, True, False, True]), 1, start=0.5)
    assert seen[0].tolist() == [[9.0, 0.5, 9.0, 0.5]]


def test_mistakes_of_imputation_are_named():
    model, x = correlated_model(), torch.zeros(2, 4).double()
    mask = torch.tensor([True, False, False, False])
    with pytest.raises(ValueError, match=r"mask must be boolean, .* got torch.float32 of shape"):
        impute(model, model.posterior, x, mask.float(), 1)
    with pytest.raises(ValueError, match=r"of shape \(4,\) or \(2, 4\); got .* \(3,\)"):
        impute(model, model.posterior, x, mask[:3], 1)
    with pytest.raises(ValueError, match="num_iterations must be an integer, at least 1; got 0"):
        impute(model, model.posterior, x, mask, 0)
    with pytest.raises(ValueError, match="num_chains must be an integer, at least 1; got 0"):
        impute(model, model.posterior, x, mask, 1, num_chains=0)
    settings = AISSettings(linear_schedule(2), 0.1, 1)
    with pytest.raises(ValueError, match="num_steps must be an integer, at least 1; got 0"):
        conditional_samples(model, x, mask, 2, settings=settings, num_steps=0)


# --- the reference -------------------------------------------------------------------------------


def test_the_reference_has_the_exact_conditional_of_a_linear_model():
    """Two masks at once. Copies made by resampling cost some independence: K counts for half."""
    model = correlated_model()
    masks = torch.tensor([[False, True, False, True], [True, True, False, False]])
    x = torch.tensor([[1.0, 0.0, 0.5, 0.0], [0.0, 0.0, 1.0, -1.0]]).double()
    settings = AISSettings(linear_schedule(20), 0.4, 3)
    reference = conditional_samples(
        model, x, masks, 6000, settings=settings, num_steps=10, generator=generator()
    )
    for i in range(2):
        one = slice(i, i + 1)
        assert_conditional(reference.x[:, one], model, x[one], masks[i], 3000)
    assert ((reference.x == x) | masks).all()
    assert (reference.ess > 1000).all() and (reference.acceptance_rate > 0.5).all()
    assert reference.z.shape == (6000, 2, 2)


def test_the_weights_of_annealing_count_even_where_the_chains_hardly_move():
    """One temperature and tiny steps: importance resampling alone must give the right law."""
    model, mask = correlated_model(), torch.tensor([False, True, False, True])
    x = torch.tensor([[1.0, 0.0, 0.5, 0.0]]).double()
    settings = AISSettings(linear_schedule(1), 0.001, 1)
    reference = conditional_samples(
        model, x, mask, 20_000, settings=settings, num_steps=1, generator=generator()
    )
    assert 1000 < reference.ess < 15_000
    assert_conditional(reference.x, model, x, mask, 0.5 * reference.ess.item())


def test_the_reference_finds_both_modes_of_a_bernoulli_decoder():
    """One latent whose sign the observed pixels do not tell: P(x_m | x_o) by quadrature."""
    torch.manual_seed(4)

    class Fold(nn.Module):
        def forward(self, z):  # two pixels see |z|, two see the sign
            return torch.cat([4 * z.abs() - 4, 4 * z.abs() - 3, 5 * z + 1.5, 3 * z], -1)

    model = BernoulliDecoder(Fold(), latent_dim=1, observation_dim=4)
    model.prior_scale = nn.Parameter(torch.ones(()))  # a parameter tells the prior its type
    x, mask = torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([False, False, True, True])
    grid = torch.linspace(-8, 8, 8001).unsqueeze(-1)
    log_weight = model.prior().log_prob(grid) + observed_log_likelihood(model, x, mask, grid)
    weight = log_weight.softmax(0).detach()
    pixels = model.likelihood(grid).mean[:, mask]
    expected = (weight.unsqueeze(-1) * pixels).sum(0)
    both = (weight * pixels.prod(-1)).sum()

    settings = AISSettings(linear_schedule(20), 0.3, 3)
    reference = conditional_samples(
        model, x, mask, 4000, settings=settings, num_steps=5, generator=generator()
    )
    drawn = reference.x[:, 0, mask]
    error = (expected * (1 - expected) / 2000).sqrt()
    assert ((drawn.mean(0) - expected).abs() < 4 * error).all()
    # the missing pixels are far from independent given the observed ones
    assert abs(drawn.prod(-1).mean() - both) < 4 * (both * (1 - both) / 2000).sqrt()
    assert both - expected.prod() > 0.1


def test_observed_log_likelihood_counts_observed_pixels_only():
    model, mask = correlated_model(), torch.tensor([False, True, False, True])
    x, z = torch.randn(3, 4).double(), torch.randn(5, 3, 2).double()
    everything = torch.zeros(4, dtype=torch.bool)
    torch.testing.assert_close(
        observed_log_likelihood(model, x, everything, z), model.log_likelihood(x, z)
    )
    mean = (z @ model.weight.T + model.bias)[..., ~mask]
    expected = MultivariateNormal(mean, 0.49 * torch.eye(2).double()).log_prob(x[:, ~mask])
    torch.testing.assert_close(observed_log_likelihood(model, x, mask, z), expected)

    class Dependent(GaussianMixture):
        def likelihood(self, z):
            return MultivariateNormal(z, torch.eye(1))

    one = torch.ones(1)
    with pytest.raises(TypeError, match="Independent over pixels; got MultivariateNormal"):
        observed_log_likelihood(Dependent(one, one, one, 1.0), one, everything[:1], one[None])
