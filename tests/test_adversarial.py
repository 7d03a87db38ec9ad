"""Games against their closed forms, the kernel distance, and the implicit encoders."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from amortised import adversarial
from amortised.amc import descend
from amortised.encoders import BlockPerceptrons, ImplicitEncoder, start_at_prior
from amortised.models import LinearGaussian

TEACHER, STUDENT = Normal(0.5, 0.8), Normal(0.0, 1.0)
X = torch.zeros(1, 1)


def log_ratio(z):
    return TEACHER.log_prob(z) - STUDENT.log_prob(z)


def optimal(x, z):
    """The optimal discriminator of the two Gaussians above, for one-dimensional z."""
    return log_ratio(z.squeeze(-1))


def quadrature(fn):
    grid = torch.linspace(-12.0, 12.0, 20_001, dtype=torch.float64)
    return torch.trapezoid(fn(grid), grid)


def mean_and_error(draws):
    draws = draws.detach()
    return draws.mean(0), draws.std(0) / math.sqrt(len(draws))


def assert_path_gradients(loss_fn, location, log_scale, expected):
    """Gradients of a loss of z ~ N(location, scale^2) in both, against their exact values."""
    parameters = [torch.full((100_000, 1, 1), p, requires_grad=True) for p in (location, log_scale)]
    z = parameters[0] + parameters[1].exp() * torch.randn_like(parameters[0])
    grads = torch.autograd.grad(len(z) * loss_fn(z).sum(), parameters)
    for draws, exact in zip(grads, expected, strict=True):
        mean, error = mean_and_error(draws.flatten())
        assert (mean - exact).abs() < 4 * error


def divergence_gradients(location, log_scale, target):
    """Those of KL(N(location, scale^2) || target)."""
    parameters = torch.tensor([location, log_scale], dtype=torch.float64, requires_grad=True)
    divergence = kl_divergence(Normal(parameters[0], parameters[1].exp()), target)
    return torch.autograd.grad(divergence.sum(), parameters)[0]


# --- networks ------------------------------------------------------------------------------------


def test_networks_have_the_sizes_of_the_book():
    implicit = [ImplicitEncoder(32, noise) for noise in ("gaussian", "bernoulli")]
    networks = [*implicit, adversarial.Discriminator(32)]
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert sizes == [577_912, 561_912, 812_881]


def test_discriminator_is_conditional_leaky_and_treats_samples_alike():
    discriminator = adversarial.Discriminator(latent_dim=2)
    slopes = {m.negative_slope for m in discriminator.modules() if isinstance(m, nn.LeakyReLU)}
    assert slopes == {0.2} and not any(isinstance(m, nn.ReLU) for m in discriminator.modules())
    x, z = torch.bernoulli(torch.full((3, 784), 0.3)), torch.randn(4, 3, 2)
    logits = discriminator(x, z)
    torch.testing.assert_close(logits, torch.stack([discriminator(x, z_k) for z_k in z]))
    assert (discriminator(x.roll(1, 0), z) != logits).all()


@pytest.mark.parametrize("noise", ["gaussian", "bernoulli"])
def test_implicit_encoder_runs_the_trunk_once_and_is_random_at_test_time(noise):
    calls = []
    encoder = ImplicitEncoder(3, noise, nn.Linear(5, 8), num_features=8, num_hidden=16).eval()
    encoder.trunk.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(4, 5)
    z = encoder(x, num_samples=6)
    assert z.shape == (6, 4, 3) and len(calls) == 1
    assert (z[0] != z[1]).any() and (encoder(x) != encoder(x)).any()
    z.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize("noise", ["gaussian", "bernoulli"])
def test_gaussian_noise_stands_beside_the_features_and_bernoulli_noise_multiplies_them(noise):
    settings = {"noise_dim": 2} if noise == "gaussian" else {}
    encoder = ImplicitEncoder(3, noise, nn.Identity(), 4, 5, **settings)
    encoder.head = nn.Identity()  # shows what the MLP is given
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    given = encoder(x, num_samples=10_000)[:, 0]
    if noise == "gaussian":
        assert given.shape == (10_000, 6) and (given[:, :4] == x).all()
        given, mean, variance = given[:, 4:], 0.0, 1.0
        assert ((given.var(0) - 1).abs() < 4 * math.sqrt(2 / 10_000)).all()
    else:  # not rescaled
        assert ((given == 0) | (given == x)).all()
        given, mean, variance = (given > 0).double(), 0.5, 0.25
    assert ((given.mean(0) - mean).abs() < 4 * math.sqrt(variance / 10_000)).all()
    correlation = torch.corrcoef(given.T) - torch.eye(given.shape[1])
    assert (correlation.abs() < 4 / math.sqrt(10_000)).all()


def test_implicit_encoder_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="'gaussian' or 'bernoulli'; got 'cauchy'"):
        ImplicitEncoder(2, "cauchy")
    with pytest.raises(ValueError, match="leave out noise_dim=7"):
        ImplicitEncoder(2, "bernoulli", noise_dim=7)
    with pytest.raises(ValueError, match="num_samples must be an integer, at least 1; got 0"):
        ImplicitEncoder(2, trunk=nn.Identity(), num_features=3)(torch.zeros(1, 3), 0)


@pytest.mark.parametrize("noise", ["gaussian", "bernoulli"])
def test_a_student_starts_at_the_scale_of_the_prior(noise):
    """With the same noise the moments are exact, and the network is an affine map of the old."""
    encoder = ImplicitEncoder(3, noise, nn.Linear(5, 8), num_features=8, num_hidden=16)
    x = torch.randn(40, 5)

    def draws():
        torch.manual_seed(1)
        return encoder(x, 100).detach()

    before = draws()
    assert before.std((0, 1)).max() < 0.5
    torch.manual_seed(1)
    start_at_prior(encoder, x)
    after = draws()
    torch.testing.assert_close(after.mean((0, 1)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(after.flatten(0, 1).std(0), torch.ones(3))
    slope = 1 / before.flatten(0, 1).std(0)
    torch.testing.assert_close(after, (before - before.mean((0, 1))) * slope, atol=1e-4, rtol=1e-4)
    nn.init.zeros_(encoder.head[-1].weight[1])
    with pytest.raises(ValueError, match=r"coordinates \[1\] of z do not vary .* 40 images"):
        start_at_prior(encoder, x)
    encoder.head = BlockPerceptrons(1, 13, 4, 3)
    with pytest.raises(ValueError, match="last layer must be"):
        start_at_prior(encoder, x)


# --- the original game ---------------------------------------------------------------------------


def test_trained_discriminator_is_the_log_density_ratio_for_each_x():
    """Logistic regression on (1, z, z^2, x z), where the ratio N(x, 0.8^2) : N(0, 1) lies."""
    n, scale = 5_000, 0.8
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    z_teacher = x + scale * torch.randn(n, 2, 1, dtype=torch.float64)
    z_student = torch.randn(n, 2, 1, dtype=torch.float64)
    weights = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def discriminator(weights, x, z):
        z, x = z.squeeze(-1), x.squeeze(-1)
        features = torch.stack([torch.ones_like(z), z, z.square(), (x * z).expand_as(z)], -1)
        return features @ weights

    def total(weights):
        d = partial(discriminator, weights)
        return n * adversarial.discriminator_loss(d, x, z_teacher, z_student).sum()

    for _ in range(20):  # Newton's method
        (slope,) = torch.autograd.grad(total(weights), weights)
        hessian = torch.autograd.functional.hessian(total, weights.detach())
        weights.data -= torch.linalg.solve(hessian, slope)
    error = torch.linalg.inv(hessian).diag().sqrt()
    # x^2 = 1 for both observations
    truth = [-math.log(scale) - 0.5 / scale**2, 0.0, 0.5 - 0.5 / scale**2, 1.0 / scale**2]
    deviation = (weights.detach() - torch.tensor(truth, dtype=torch.float64)) / error
    assert slope.abs().max() < 1e-8 and (deviation.abs() < 4).all(), deviation


def test_the_optimal_loss_is_a_jensen_shannon_divergence_and_other_discriminators_do_worse():
    z_teacher, z_student = TEACHER.sample((50_000, 1, 1)), STUDENT.sample((50_000, 1, 1))
    best = adversarial.discriminator_loss(optimal, X, z_teacher, z_student)

    def divergence(z):
        p, q = TEACHER.log_prob(z).exp(), STUDENT.log_prob(z).exp()
        mixture = (0.5 * (p + q)).log()
        return 0.5 * (p * (p.log() - mixture) + q * (q.log() - mixture))

    _, teacher_error = mean_and_error(nn.functional.softplus(-optimal(None, z_teacher)))
    _, student_error = mean_and_error(nn.functional.softplus(optimal(None, z_student)))
    expected = 2 * math.log(2) - 2 * quadrature(divergence)
    assert (best - expected).abs() < 4 * torch.hypot(teacher_error, student_error)
    for change in ((0.5, 0.0), (1.5, 0.0), (1.0, 0.3), (1.0, -0.3)):
        other = partial(lambda scale, shift, x, z: scale * optimal(x, z) + shift, *change)
        assert adversarial.discriminator_loss(other, X, z_teacher, z_student) > best


def test_gradient_through_the_optimal_discriminator_is_that_of_the_divergence():
    """The path gradient of E_q[-D*] is the gradient of KL(q || q_T), since E_q[score] = 0."""
    exact = divergence_gradients(0.0, 0.0, TEACHER)
    assert_path_gradients(partial(adversarial.critic_student_loss, optimal, X), 0.0, 0.0, exact)


def test_gradient_of_the_non_saturating_loss_is_the_weighted_path_gradient():
    def integrand(z):
        slope = -(z - 0.5) / 0.8**2 + z
        return -STUDENT.log_prob(z).exp() * torch.sigmoid(-log_ratio(z)) * slope

    exact = [quadrature(integrand), quadrature(lambda z: integrand(z) * z)]
    assert_path_gradients(partial(adversarial.generator_loss, optimal, X), 0.0, 0.0, exact)


def test_losses_cut_the_graph_where_they_say():
    z = torch.randn(3, 4, 2, requires_grad=True)
    slope = torch.ones(2, requires_grad=True)
    x = torch.zeros(4, 1)

    def critic(x, z):
        return z @ slope

    for loss in (
        adversarial.discriminator_loss(critic, x, z, z + 1),
        adversarial.critic_loss(critic, x, z, z + 1),
        adversarial.avb_discriminator_loss(critic, x, z),
    ):
        assert loss.shape == (4,)
        z_grad, slope_grad = torch.autograd.grad(loss.sum(), [z, slope], allow_unused=True)
        assert z_grad is None and slope_grad.abs().sum() > 0
    for student_loss in (adversarial.generator_loss, adversarial.critic_student_loss):
        loss = student_loss(critic, x, z)
        assert loss.shape == (4,)
        assert torch.autograd.grad(loss.sum(), z)[0].abs().sum() > 0


def test_numbers_of_samples_may_differ_and_may_be_a_whole_path():
    discriminator = adversarial.Discriminator(2, nn.Identity(), num_features=3, num_hidden=4)
    x, path, z = torch.randn(5, 3), torch.randn(7, 2, 5, 2), torch.randn(4, 5, 2)
    flat = adversarial.discriminator_loss(discriminator, x, path.flatten(0, 1), z)
    torch.testing.assert_close(adversarial.discriminator_loss(discriminator, x, path, z), flat)


# --- pairs, and discriminators that know more ----------------------------------------------------

# The teacher lies by 0.6 of the student's widths beside the student, and is 1.7 times as wide.
SHIFT, WIDENING = 0.6, 1.7
NARROW = Normal(torch.tensor([[[3.0, -2.0]]]), torch.tensor([[[0.1, 0.4]]]))
WIDE = Normal(NARROW.mean + SHIFT * NARROW.scale, WIDENING * NARROW.scale)


def norm_energy(x, z):
    """A stand-in for log p(x|z)."""
    return x.sum(-1) - 0.5 * (z - 1.0).square().sum(-1)


def standardising_network(x, features):
    """The linear map of the features that is log q_T - log q for any student."""
    t, square = features.chunk(2, dim=-1)
    curvature = 1 - 1 / WIDENING**2
    value = SHIFT / WIDENING**2 * t + curvature * square
    constant = 0.5 * (curvature - (SHIFT / WIDENING) ** 2) - math.log(WIDENING)
    return (value + constant).sum(-1)


def test_in_the_students_coordinates_the_log_ratio_of_gaussians_is_linear():
    discriminator = adversarial.InformedDiscriminator(standardising_network)
    moments = adversarial.StudentMoments(
        Independent(Normal(NARROW.mean[0], NARROW.scale[0]), 1), torch.zeros(2, 1)
    )
    z = WIDE.sample((1000,)).squeeze(1)
    logits = discriminator(X, z, norm_energy, moments)
    expected = (WIDE.log_prob(z) - NARROW.log_prob(z)).sum(-1).reshape(logits.shape)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_the_known_terms_are_scaled_and_counted_from_the_students_means():
    discriminator = adversarial.InformedDiscriminator(lambda x, z: z[..., 0], likelihood_scale=20.0)
    discriminator.weights.data = torch.tensor([3.0, -5.0, 0.25])
    x, z, draws = torch.randn(4, 6), torch.randn(7, 4, 2), torch.randn(16, 4, 2) + 2.0
    likelihood, norm = norm_energy(x, z) / 20.0, z.square().sum(-1) / 4.0
    plain = discriminator(x, z, norm_energy)
    torch.testing.assert_close(plain, z[..., 0] + 3.0 * likelihood - 5.0 * norm + 0.25)
    moments = adversarial.student_moments(x, draws, norm_energy)
    centred = 3.0 * (likelihood - norm_energy(x, draws).mean(0) / 20.0)
    centred = centred - 5.0 * (norm - draws.square().sum(-1).mean(0) / 4.0) + 0.25
    t = (z - draws.mean(0)) / (draws.var(0) + 1e-4).sqrt()
    torch.testing.assert_close(discriminator(x, z, norm_energy, moments), t[..., 0] + centred)
    assert [name for name, _ in discriminator.named_parameters()] == ["weights"]


def test_the_loss_of_pairs_is_its_definition_and_both_sides_see_one_difference():
    x, above, below = torch.zeros(3, 1), torch.randn(2, 3, 2), torch.randn(4, 3, 2)

    def critic(x, z):
        return z.sum(-1) + 100.0  # what is added for all z of an x does not count

    loss = adversarial.relativistic_loss(critic, x, above, below)
    pairs = [nn.functional.softplus(-(critic(x, u) - critic(x, v))) for u in above for v in below]
    torch.testing.assert_close(loss, torch.stack(pairs).mean(0))
    assert adversarial.relativistic_loss(critic, x, below, above).mean() > 0


def test_gradient_of_the_students_pairs_is_the_weighted_path_gradient():
    """That of E softplus(D(z') - D(z)) for the log-ratio D, against quadrature over both."""
    grid = torch.linspace(-9.0, 9.0, 1_201, dtype=torch.float64)
    pull = torch.sigmoid(log_ratio(grid) - log_ratio(grid).unsqueeze(1))  # rows: the student's z
    pull = torch.trapezoid(pull * TEACHER.log_prob(grid).exp(), grid)
    path = STUDENT.log_prob(grid).exp() * pull * ((grid - 0.5) / 0.8**2 - grid)
    exact = [torch.trapezoid(path, grid), torch.trapezoid(path * grid, grid)]
    teacher = TEACHER.sample((1, 100_000, 1))

    def loss(z):  # a pair for each of the draws
        return adversarial.relativistic_loss(optimal, X, z.transpose(0, 1), teacher).mean()

    assert_path_gradients(loss, 0.0, 0.0, exact)


GAMES = {
    "gan": lambda critic, z, r: adversarial.discriminator_loss(critic, X, z, r),
    "relativistic": lambda critic, z, r: adversarial.relativistic_loss(critic, X, z, r),
}


@pytest.mark.parametrize("laws", ["equal", "shifted", "half as wide"])
@pytest.mark.parametrize("name", GAMES)
def test_only_between_equal_laws_is_an_undecided_discriminator_at_rest(name, laws):
    """Slopes of the loss at D = 0 in the weights of 1, t and (t^2 - 1)/2, with their errors."""
    student = {"equal": WIDE, "shifted": Normal(WIDE.mean + 0.3 * WIDE.scale, WIDE.scale),
               "half as wide": Normal(WIDE.mean, WIDE.scale / 2)}[laws]  # fmt: skip
    z = [law.sample((1, 20_000)).reshape(1, 20_000, 2) for law in (WIDE, student)]
    contrast = Independent(Normal(student.mean[0], student.scale[0]), 1)
    weights = torch.zeros(20_000, 4, requires_grad=True)  # one set for each pair

    def critic(x, z):
        return (adversarial.standardised_features(z, contrast) * weights).sum(-1)

    (slopes,) = torch.autograd.grad(GAMES[name](critic, *z).sum(), weights)
    mean, error = mean_and_error(slopes)
    is_at_rest = (mean.abs() < 4 * error).tolist()
    assert is_at_rest == {"equal": [True] * 4, "shifted": [False] * 2 + is_at_rest[2:],
                          "half as wide": [True] * 2 + [False] * 2}[laws]  # fmt: skip


def test_the_students_coordinates_show_half_the_width_where_a_plain_discriminator_is_blind():
    """Means that depend on x; after as many updates, on as many pairs."""
    weight = 1.5 * torch.randn(8, 4)
    networks = {
        name: adversarial.Discriminator(latent_dim, nn.Linear(4, 32), 32, 64)
        for name, latent_dim in (("plain", 8), ("standardised", 16))
    }

    def loss(name, num_images):
        x = torch.randn(num_images, 4)
        mean = (x @ weight.T).sin()
        z_teacher = mean + 0.2 * torch.randn(4, num_images, 8)
        z_student, z_moments = (mean + 0.1 * torch.randn(k, num_images, 8) for k in (4, 16))
        if name == "standardised":
            contrast = adversarial.adaptive_contrast(z_moments)
            z_teacher, z_student = (
                adversarial.standardised_features(z, contrast) for z in (z_teacher, z_student)
            )
        return adversarial.discriminator_loss(networks[name], x, z_teacher, z_student)

    losses = {}
    for name, network in networks.items():
        optimizer = torch.optim.Adam(network.parameters(), lr=5e-4)
        for _ in range(300):
            descend(loss(name, 50), optimizer)
        with torch.no_grad():
            losses[name] = loss(name, 2000).mean().item()
    assert losses["plain"] > 2 * math.log(2) - 0.1, losses
    assert losses["standardised"] < 2 * math.log(2) - 0.8, losses


# --- the Wasserstein game ------------------------------------------------------------------------


def test_gradient_penalty_of_a_linear_critic_is_closed_form_and_ignores_x():
    slope = torch.tensor([3.0, 4.0], requires_grad=True)

    def critic(x, z):
        return z @ slope + 100.0 * x.sum(-1)

    x = torch.randn(6, 2, requires_grad=True)
    penalty = adversarial.gradient_penalty(critic, x, torch.randn(3, 6, 2), torch.randn(3, 6, 2))
    torch.testing.assert_close(penalty, torch.full((6,), 16.0))
    (grad,) = torch.autograd.grad(penalty.mean(), slope)
    torch.testing.assert_close(grad, 2 * (5 - 1) * slope.detach() / 5)


def test_gradient_penalty_is_taken_between_the_samples():
    """For D = |z|^2 / 2 the slope at z is |z|; on the segment from 1 to 3 it is uniform there."""
    n = 50_000
    z_student, z_teacher = torch.ones(n, 1, 1), torch.full((n, 1, 1), 3.0)
    penalty = adversarial.gradient_penalty(
        lambda x, z: 0.5 * z.square().sum(-1), X, z_teacher, z_student
    )
    # (u - 1)^2 with u uniform on (1, 3): mean 4/3, variance 64/45
    assert abs(penalty.item() - 4 / 3) < 4 * math.sqrt(64 / 45 / n)
    with pytest.raises(ValueError, match=r"\(2, 1, 1\) and \(3, 1, 1\), and must be equal"):
        adversarial.gradient_penalty(optimal, X, z_teacher[:2], z_student[:3])


def test_slope_one_critic_measures_the_distance_of_shifted_laws():
    z = torch.randn(5, 4, 2)
    shift = torch.tensor([0.6, 0.8])
    loss = adversarial.critic_loss(lambda x, z: z @ shift, X, z + 2.0 * shift, z)
    torch.testing.assert_close(loss, torch.full((4,), -2.0))
    weighted = adversarial.critic_loss(lambda x, z: 2 * z @ shift, X, z, z, penalty_weight=3.0)
    torch.testing.assert_close(weighted, torch.full((4,), 3.0))


# --- the kernel distance -------------------------------------------------------------------------


def test_mmd_equals_its_definition():
    a, b = torch.randn(8, 2, 3).double(), torch.randn(9, 2, 3).double() + 0.5
    bandwidth = torch.tensor([0.7, 1.9]).double()

    def kernel(u, v, h):
        squared = (u - v).square().sum()
        return sum(torch.exp(-squared / (2 * c * h**2)) for c in (0.25, 1.0, 4.0)) / 3

    for i, h in enumerate(bandwidth):
        u, v = a[:, i], b[:, i]
        own = [kernel(u[j], u[k], h) for j in range(8) for k in range(8) if j != k]
        other = [kernel(v[j], v[k], h) for j in range(9) for k in range(9) if j != k]
        cross = [kernel(u[j], v[k], h) for j in range(8) for k in range(9)]
        expected = sum(own) / 56 + sum(other) / 72 - 2 * sum(cross) / 72
        torch.testing.assert_close(adversarial.mmd_squared(a, b, bandwidth)[i], expected)


@pytest.mark.parametrize("bandwidth", [None, 1.5])
def test_mmd_has_mean_zero_for_equal_laws(bandwidth):
    z, z_teacher = torch.randn(8, 10_000, 2), torch.randn(8, 10_000, 2)
    mean, error = mean_and_error(adversarial.mmd_squared(z, z_teacher, bandwidth))
    assert mean.abs() < 3 * error
    assert error < 0.002  # sharp enough to notice a bias of 1/K


def test_mmd_is_unbiased_for_different_gaussians():
    (m1, s1), (m2, s2), h = (0.0, 1.0), (1.0, 0.5), 1.2

    def expected_kernel(ma, sa, mb, sb):
        total = 0.0
        for c in (0.25, 1.0, 4.0):
            width = c * h**2 + sa**2 + sb**2
            total += math.sqrt(c * h**2 / width) * math.exp(-((ma - mb) ** 2) / (2 * width)) / 3
        return total

    truth = expected_kernel(m1, s1, m1, s1) + expected_kernel(m2, s2, m2, s2)
    truth -= 2 * expected_kernel(m1, s1, m2, s2)
    z, z_teacher = m1 + s1 * torch.randn(10, 10_000, 1), m2 + s2 * torch.randn(8, 10_000, 1)
    mean, error = mean_and_error(adversarial.mmd_squared(z, z_teacher, h))
    assert abs(mean - truth) < 4 * error


def test_mmd_draws_the_student_to_the_teacher_and_not_the_reverse():
    z = torch.randn(16, 3, 2, requires_grad=True)
    z_teacher = (torch.randn(16, 3, 2) + 2.0).requires_grad_(True)
    adversarial.mmd_squared(z, z_teacher).sum().backward()
    assert (z.grad.mean((0, 1)) < 0).all() and z_teacher.grad is None


def test_mmd_refuses_what_it_cannot_compare():
    z = torch.zeros(8, 1, 2)
    with pytest.raises(ValueError, match=r"num_teacher_samples .* at least 8; got 4"):
        adversarial.mmd_squared(z, z[:4])
    with pytest.raises(ValueError, match=r"got shapes \(8, 1, 2\) and \(8, 2, 2\)"):
        adversarial.mmd_squared(z, torch.randn(8, 2, 2))
    with pytest.raises(ValueError, match=r"bandwidth must be positive; got .* 0\.0"):
        adversarial.mmd_squared(z, z)


def test_median_bandwidth_is_per_observation_and_follows_the_scale():
    z, z_teacher = torch.randn(9, 2, 3, requires_grad=True), torch.randn(8, 2, 3)
    pooled = torch.cat([z, z_teacher]).detach()
    bandwidth = adversarial.median_bandwidth(z, z_teacher)
    assert not bandwidth.requires_grad
    torch.testing.assert_close(bandwidth[0], nn.functional.pdist(pooled[:, 0]).median())
    torch.testing.assert_close(adversarial.median_bandwidth(10 * z, 10 * z_teacher), 10 * bandwidth)


# --- adversarial variational Bayes ---------------------------------------------------------------


def optimal_avb(q, r, x, standardised):
    """The D that makes S = log q - log r, in the coordinates of the Gaussian r."""
    z = r.loc + r.scale * standardised
    return q.log_prob(z) - r.log_prob(z).sum(-1) - 0.5 * standardised.square().sum(-1)


def standard_or_adaptive(z, with_contrast):
    """The contrast, or None for the prior, and its coordinates one by one."""
    contrast = adversarial.adaptive_contrast(z) if with_contrast else None
    return contrast, contrast.base_dist if with_contrast else Normal(torch.zeros_like(z[0]), 1.0)


@pytest.mark.parametrize("with_contrast", [False, True])
def test_avb_loss_with_the_optimal_logits_is_the_negative_elbo_sample_by_sample(with_contrast):
    torch.manual_seed(3)
    model = LinearGaussian(torch.randn(4, 2).double(), torch.randn(4).double(), 0.8)
    x, mean, root = (torch.randn(3, *shape).double() for shape in ((4,), (2,), (2, 2)))
    q = MultivariateNormal(mean, 0.2 * (root @ root.mT) + 0.1 * torch.eye(2))
    z = q.sample((50,))
    contrast, r = standard_or_adaptive(z, with_contrast)
    loss = adversarial.avb_loss(model, partial(optimal_avb, q, r), x, z, contrast)
    torch.testing.assert_close(loss, (q.log_prob(z) - model.log_joint(x, z)).mean(0))


def test_avb_gradient_is_the_gradient_of_the_elbo():
    """Path gradient with S* against the closed form for a Gaussian q, on the scalar model."""
    model, x = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0), torch.tensor([[1.5]])
    q = Independent(Normal(torch.tensor([0.2]), math.exp(-0.5)), 1)
    discriminator = partial(optimal_avb, q, Normal(torch.zeros(1), 1.0))
    posterior = model.posterior(x)
    exact = divergence_gradients(0.2, -0.5, Normal(posterior.mean, posterior.variance.sqrt()))
    assert_path_gradients(partial(adversarial.avb_loss, model, discriminator, x), 0.2, -0.5, exact)


@pytest.mark.parametrize("with_contrast", [False, True])
def test_avb_discriminator_loss_is_least_at_the_log_ratio_to_the_contrast(with_contrast):
    q = Independent(Normal(torch.tensor([[0.7, -0.3]]), torch.tensor([[0.3, 0.6]])), 1)
    z = q.sample((4_000,))
    contrast, r = standard_or_adaptive(z, with_contrast)
    best = partial(optimal_avb, q, r)
    expected = q.log_prob(z) - r.log_prob(z).sum(-1)
    torch.testing.assert_close(
        adversarial.avb_logits(best, X, z, contrast), expected, atol=1e-4, rtol=1e-4
    )

    def loss(a, b):
        torch.manual_seed(1)  # the same draws of r each time
        return adversarial.avb_discriminator_loss(
            lambda x, z: best(x, z) + a + b * z[..., 0], X, z, contrast
        )

    for change in (0.3, -0.3):
        assert loss(change, 0.0) > loss(0.0, 0.0) and loss(0.0, change) > loss(0.0, 0.0)


def test_adaptive_contrast_has_the_moments_of_the_samples_and_no_graph():
    z = torch.randn(40, 3, 2, requires_grad=True)
    r = adversarial.adaptive_contrast(z)
    torch.testing.assert_close(r.mean, z.detach().mean(0))
    torch.testing.assert_close(r.variance, z.detach().var(0) + 1e-4)
    assert not r.mean.requires_grad and r.batch_shape == (3,)
    for few in (z[:1], z[0]):
        with pytest.raises(ValueError, match=r"num_samples must be .* at least 2; got 1"):
            adversarial.adaptive_contrast(few)
