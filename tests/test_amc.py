"""Teachers against exact posteriors, rules against closed forms, and which step trains what."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal

from amortised import adversarial, amc, encoders
from amortised.adversarial import Discriminator, InformedDiscriminator
from amortised.files import OutOfTimeError, Work
from amortised.mcmc import hmc_step, langevin_step, mala_step
from amortised.models import LinearGaussian
from amortised.numerics import CallCounter, value_and_grad
from amortised.objectives import elbo
from amortised.training import cosine_decay, fit, half_cosine


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def correlated_model():
    """A posterior whose two coordinates have correlation -0.72."""
    weight = torch.tensor([[1.0, 1.0], [0.9, 1.1], [1.0, 0.8], [0.2, -0.1]]).double()
    x = torch.tensor([[0.5, 1.0, 0.2, -0.3], [-1.0, 0.1, -2.0, 0.4], [2.0, 1.0, 1.5, 0.0]]).double()
    return LinearGaussian(weight, torch.full((4,), 0.3).double(), 1.0), x


def scalar_model(precision):
    """A posterior of a given precision: z ~ N(0, 1) seen through slope w and unit noise."""
    weight = torch.tensor([[math.sqrt(precision - 1.0)]], dtype=torch.float64)
    return LinearGaussian(weight, torch.zeros(1).double(), 1.0)


def toy(noise=None):
    """Networks of a few units around a linear model; without noise the student has a density."""
    small = {"trunk": nn.Identity(), "num_features": 4, "num_hidden": 16}
    density = encoders.GaussianEncoder(2, nn.Identity(), 4)
    return {
        "model": LinearGaussian(torch.randn(4, 2), torch.zeros(4), 1.0),
        "encoder": encoders.ImplicitEncoder(2, noise, **small) if noise else density,
        "discriminator": Discriminator(2, **small),
        "chains": amc.PersistentChains(20, 2),
    }


class StandardisedLinear(nn.Module):
    """The smallest network for the coordinates of the student: a logit linear in them."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(4))

    def forward(self, x, features):
        return features @ self.slope


def sgd(networks, *names, lr=1.0):
    return {name: torch.optim.SGD(networks[name].parameters(), lr=lr) for name in names}


def assert_descended(before, after, loss, lr=1.0, **tolerance):
    """Stochastic gradient descent on this loss, of ``before``, has led to ``after``."""
    expected = torch.autograd.grad(loss.mean(), list(before.parameters()), retain_graph=True)
    moved = [b - a for b, a in zip(before.parameters(), after.parameters(), strict=True)]
    torch.testing.assert_close(moved, [lr * grad for grad in expected], **tolerance)


# --- the teacher ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "step_size", "num_steps"),
    [(mala_step, 0.3, 60), (partial(hmc_step, num_steps=4), 0.5, 15)],
    ids=["mala", "hmc"],
)
def test_with_a_metropolis_test_the_teacher_becomes_exact(kernel, step_size, num_steps):
    model, x = correlated_model()
    num_chains = 4000
    z0 = 2.0 + torch.randn(num_chains, 3, 2, generator=generator(), dtype=torch.float64)
    settings = {"kernel": kernel, "step_size": step_size, "num_steps": num_steps}
    z = amc.teacher_samples(model, x, z0, generator=generator(1), **settings)
    posterior = model.posterior(x)
    variance = posterior.variance
    assert ((z.mean(0) - posterior.mean).abs() < 4 * (variance / num_chains).sqrt()).all()
    centred = z - posterior.mean
    covariance = torch.einsum("kbi,kbj->bij", centred, centred) / num_chains
    exact = posterior.covariance_matrix
    error = ((exact.square() + variance.unsqueeze(1) * variance.unsqueeze(2)) / num_chains).sqrt()
    assert ((covariance - exact).abs() < 4 * error).all()


@pytest.mark.parametrize(
    ("precision", "step_size", "num_steps", "known"),
    [(1.0, 0.2, 80, 1.0526), (10.0, 0.2, 10, 0.2), (10.0, 0.02, 80, 0.10526)],
)
def test_the_unadjusted_teacher_has_its_biased_variance(precision, step_size, num_steps, known):
    """(1 / lambda) / (1 - s lambda / 4), around the right mean."""
    model, x, num_chains = scalar_model(precision), torch.tensor([[0.8]]).double(), 20_000
    settings = {"num_steps": num_steps, "step_size": step_size, "generator": generator()}
    z = amc.teacher_samples(model, x, torch.zeros(num_chains, 1, 1).double(), **settings)
    expected = 1 / precision / (1 - step_size * precision / 4)
    assert expected == pytest.approx(known, rel=1e-4)
    assert abs(z.var().item() - expected) < 4 * expected * math.sqrt(2 / num_chains)
    assert abs((z.mean() - model.posterior(x).mean).item()) < 4 * math.sqrt(expected / num_chains)


def test_the_start_is_forgotten_by_the_same_factor_at_each_step():
    model, x, z0 = scalar_model(5.0), torch.zeros(1, 1).double(), torch.ones(20_000, 1, 1).double()
    path = amc.teacher_chain(
        model, x, z0, num_steps=3, step_size=0.1, generator=generator()
    ).samples
    factor, variance = 1 - 0.1 * 5.0 / 2, 0.0
    for t in range(3):
        variance = factor**2 * variance + 0.1
        expected, error = factor ** (t + 1), math.sqrt(variance / len(z0))
        assert abs(path[t].mean().item() - expected) < 4 * error


def test_beyond_the_limit_of_stability_the_teacher_fails_by_name():
    model, x, z0 = scalar_model(10.0).float(), torch.zeros(1, 1), torch.ones(5, 1, 1)
    run = partial(amc.teacher_samples, model, x, num_steps=500, generator=generator())
    assert run(z0, step_size=0.39).abs().max() < 20
    with pytest.raises(FloatingPointError, match="smaller step_size"):
        run(z0, step_size=0.9)
    with pytest.raises(FloatingPointError, match="the student's samples are not finite"):
        run(z0 * torch.nan, step_size=0.1)
    with pytest.raises(ValueError, match=r"num_steps must be .* at least 1; got 0"):
        amc.teacher_chain(model, x, z0, num_steps=0, step_size=0.1)


def test_the_chain_records_its_path_and_the_teacher_is_its_end():
    model, x = correlated_model()
    z0 = torch.zeros(5, 3, 2).double().requires_grad_(True)
    settings = {"num_steps": 6, "step_size": 0.3, "kernel": mala_step}
    chain = amc.teacher_chain(model, x, z0, generator=generator(), **settings)
    assert chain.samples.shape == (6, 5, 3, 2) and chain.acceptance_rate.shape == (5, 3)
    end = amc.teacher_samples(model, x, z0, generator=generator(), **settings)
    assert torch.equal(end, chain.samples[-1])
    assert not end.requires_grad and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("kernel", "gradients"),
    [(langevin_step, 7), (mala_step, 8), (partial(hmc_step, num_steps=3), 22)],
    ids=["langevin", "mala", "hmc"],
)
def test_cost_of_a_teacher_and_a_faster_route_to_the_same_samples(kernel, gradients):
    model, x = correlated_model()
    z0 = torch.randn(5, 3, 2, generator=generator(), dtype=torch.float64)
    model.likelihood = counter = CallCounter(model.likelihood)
    run = partial(amc.teacher_samples, model, x, z0, num_steps=7, step_size=0.2, kernel=kernel)
    z = run(generator=generator(1))
    assert counter.points == gradients * 15

    def route(x):
        return partial(value_and_grad, partial(model.log_likelihood, x))

    routed = run(generator=generator(1), route=route)
    torch.testing.assert_close(routed, z, atol=1e-10, rtol=1e-10)


# --- descending and sampling ---------------------------------------------------------------------


def test_descend_moves_its_own_parameters_and_leaves_no_gradient_elsewhere():
    theta, phi, psi, frozen = (torch.full((2,), 2.0, requires_grad=True) for _ in range(4))
    frozen.requires_grad_(False)
    psi.grad = torch.ones(2)
    optimizers = torch.optim.SGD([theta, frozen], lr=1.0), torch.optim.SGD([phi], lr=0.5)
    value = amc.descend(theta * phi * psi * frozen, *optimizers)
    assert value == 16.0 and not value.requires_grad
    assert theta.tolist() == [-2.0, -2.0] and phi.tolist() == [0.0, 0.0]  # gradient 8 / 2
    assert psi.tolist() == frozen.tolist() == [2.0, 2.0]
    assert psi.grad.tolist() == [1.0, 1.0] and frozen.grad is None


def test_student_samples_of_every_encoder():
    x = torch.randn(5, 4)
    for noise in (None, "gaussian", "bernoulli"):
        z = amc.student_samples(toy(noise)["encoder"], x, 3)
        assert z.shape == (3, 5, 2) and z.requires_grad
    categorical = amc.student_samples(lambda x: Categorical(torch.ones(len(x), 2)), x, 3)
    assert categorical.shape == (3, 5) and not categorical.requires_grad
    with pytest.raises(TypeError, match="must return a distribution, not a Tensor"):
        amc.student_samples(nn.Linear(4, 2), x)


def test_blocks_of_a_batch_have_networks_of_their_own():
    """Block s of the batch depends on network s alone, and equals what that network makes of it."""
    heads, h = encoders.BlockPerceptrons(3, 2, 8, 4), torch.randn(5, 6, 2)
    for s in range(3):
        lone = encoders.ParallelPerceptrons(1, 2, 8, 4)
        pairs = zip(lone.parameters(), heads.networks.parameters(), strict=True)
        for parameter, source in pairs:
            parameter.data = source.data[s : s + 1]
        expected = lone(h[:, 2 * s : 2 * s + 2].reshape(1, -1, 2)).reshape(5, 2, 4)
        torch.testing.assert_close(heads(h)[:, 2 * s : 2 * s + 2], expected)
    torch.testing.assert_close(heads(h[0]), heads(h)[0])
    heads(h)[:, :2].sum().backward()
    assert (heads.networks.weights[0].grad[1:] == 0).all()
    with pytest.raises(ValueError, match="a batch of 7 has no 3 equal blocks"):
        heads(torch.zeros(7, 2))


# --- the rules -----------------------------------------------------------------------------------


def distil(x, student, draws, num_steps, lr):
    """Teach by the inclusive rule, from the same draws of a law at each step, at a falling rate."""
    optimizer = torch.optim.Adam(student.parameters(), lr=lr)
    decay = cosine_decay(optimizer, num_steps)
    lesson = {"teacher": lambda *_: draws, "rule": "inclusive_kl"}
    for _ in range(num_steps):
        amc.amc_step(x, None, student, {"encoder": optimizer}, **lesson)
        decay.step()
    return student(x)


def test_inclusive_kl_gives_a_mixture_student_both_modes_and_their_weights():
    """A teacher with 30 % of its mass at -2 and the rest at 2, sd 0.3."""
    torch.manual_seed(0)
    side = (torch.rand(4000, 1, 1) < 0.3).float()
    draws = 2.0 - 4.0 * side + 0.3 * torch.randn(4000, 1, 1)
    student = encoders.MixtureEncoder(1, 2, nn.Identity(), num_features=1)
    student.head.bias.data[2:4] = torch.tensor([-0.5, 0.5])
    q = distil(torch.zeros(1, 1), student, draws, num_steps=300, lr=0.05)
    weight = q.mixture_distribution.probs[0, 0].item()
    assert weight == pytest.approx(side.mean().item(), abs=1e-3)
    means = q.component_distribution.mean.flatten()
    torch.testing.assert_close(means, torch.tensor([-2.0, 2.0]), atol=0.05, rtol=0)


def test_inclusive_kl_gives_a_diagonal_student_the_posteriors_means_and_marginal_variances():
    model, x = correlated_model()
    posterior, num_samples = model.posterior(x), 2000
    samples = posterior.sample((num_samples,))
    student = encoders.GaussianEncoder(2, nn.Linear(4, 3, bias=False), num_features=3).double()
    student.trunk.weight = nn.Parameter(torch.linalg.pinv(x).T, requires_grad=False)  # one-hot x
    q = distil(x, student, samples, num_steps=250, lr=0.1)
    torch.testing.assert_close(q.mean, samples.mean(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(q.variance, samples.var(0, correction=0), atol=0, rtol=5e-3)
    variance = posterior.variance
    assert ((q.mean - posterior.mean).abs() < 4 * (variance / num_samples).sqrt() + 1e-3).all()
    relative = (q.variance / variance - 1).abs()
    assert (relative < 4 * math.sqrt(2 / num_samples) + 5e-3).all()
    exclusive = 1 / posterior.precision_matrix.diagonal(dim1=-2, dim2=-1)
    assert (q.variance > 1.2 * exclusive).all()  # what the ELBO would have given: too narrow


def test_a_discrete_student_learns_the_marginals_of_an_exact_teacher():
    """Bits z with a known law for each x, and a student of independent bits."""
    probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])  # of 00, 01, 10, 11
    bits = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])

    class Student(nn.Linear):
        def forward(self, x):
            return Independent(Bernoulli(logits=super().forward(x)), 1)

    draws = bits[Categorical(probabilities).sample((4000,))]
    q = distil(torch.eye(2), Student(2, 2, bias=False), draws, num_steps=200, lr=0.1)
    marginals = probabilities @ bits
    error = (marginals * (1 - marginals) / 4000).sqrt()
    assert ((q.mean - marginals).abs() < 4 * error + 1e-3).all()


@pytest.mark.parametrize(
    "rule",
    [amc.gan(2), amc.wasserstein(2, penalty_weight=0.1), "mmd"],
    ids=["gan", "wasserstein", "mmd"],
)
def test_each_rule_without_a_density_draws_the_student_to_the_teacher(rule):
    """Teachers N(-1.5, 0.5^2) and N(1.5, 0.5^2): the student must find the one of each x."""
    torch.manual_seed(1)
    x = torch.tensor([[-1.5], [1.5]])
    small = {"trunk": nn.Identity(), "num_features": 1, "num_hidden": 32}
    encoder, discriminator = encoders.ImplicitEncoder(1, **small), Discriminator(1, **small)
    adam = partial(torch.optim.Adam, betas=(0.5, 0.999))
    optimizers = {"encoder": adam(encoder.parameters(), lr=2e-3)}
    if rule == "mmd":
        discriminator = None
    else:
        optimizers["discriminator"] = adam(discriminator.parameters(), lr=1e-2)
    decays = [cosine_decay(optimizer, 300) for optimizer in optimizers.values()]
    lesson = {"rule": rule, "discriminator": discriminator, "num_samples": 64}
    lesson["teacher"] = lambda x, z0: x + 0.5 * torch.randn_like(z0)

    def distance():
        with torch.no_grad():
            z = encoder(x, 2000).squeeze(-1)
        return (z.mean(0) - x.squeeze(-1)).square() + (z.std(0) - 0.5).square()

    before = distance()
    for _ in range(300):
        amc.amc_step(x, None, encoder, optimizers, **lesson)
        for decay in decays:
            decay.step()
    assert (distance() < 0.1 * before).all(), (before, distance())


def test_a_rule_of_ones_own_is_given_what_it_may_need_and_a_whole_path_can_teach():
    networks, x, seen = toy(), torch.randn(5, 4), []

    def loss(name, lesson):
        seen.append((name, lesson))
        return lesson.discriminator(lesson.x, lesson.z_student)

    def path(x, z0):
        chain = amc.teacher_chain(networks["model"], x, z0, num_steps=3, step_size=0.1)
        return chain.samples.flatten(0, 1)

    rule = amc.Rule("own", partial(loss, "student"), partial(loss, "critic"), 2, needs_density=True)
    optimizers = sgd(networks, "encoder", "discriminator", lr=0.01)
    settings = {"rule": rule, "discriminator": networks["discriminator"], "num_samples": 4}
    amc.amc_step(x, networks["model"], networks["encoder"], optimizers, teacher=path, **settings)
    assert [name for name, _ in seen] == ["critic", "critic", "student"]
    model, discriminator, given, z_student, z_teacher, q, encoder = seen[0][1]
    assert model is networks["model"] and discriminator is networks["discriminator"] and given is x
    assert encoder is networks["encoder"]
    assert z_student.shape == (4, 5, 2) and z_student.requires_grad and q.batch_shape == (5,)
    assert z_teacher.shape == (12, 5, 2) and not z_teacher.requires_grad


def test_a_game_is_played_with_what_its_discriminator_is_told():
    """The critic sees the model, and moments of 16 other draws of the student, without graph."""
    networks, x, seen, drawn = toy("gaussian"), torch.randn(5, 4), [], []
    model, encoder, network, _ = networks.values()

    def discriminator(x, z, **told):
        seen.append(told)
        return network(x, z)

    def teacher(x, z0):
        drawn.append(z0)
        return z0 + 1.0

    for rule in (amc.informed(amc.gan()), amc.standardised(amc.relativistic(), num_samples=200)):
        amc.amc_step(
            x, model, encoder, sgd(networks, "encoder", "discriminator", lr=0.0), rule=rule,
            teacher=teacher, discriminator=discriminator, num_samples=3,
        )  # fmt: skip
    assert all(told["log_likelihood_fn"] == model.log_likelihood for told in seen)
    assert ["moments" in told for told in seen] == [False] * 3 + [True] * 4
    contrast, energies = seen[-1]["moments"]
    assert all(told["moments"].energies is energies for told in seen[3:])
    z = encoder(x, 2000).detach()
    expected = torch.stack([model.log_likelihood(x, z), z.square().sum(-1)])
    error = expected.std(1) * math.sqrt(1 / 200 + 1 / 2000)
    assert ((energies - expected.mean(1)).abs() < 4 * error).all()
    error = z.std(0) * math.sqrt(1 / 200 + 1 / 2000)
    assert ((contrast.mean - z.mean(0)).abs() < 4 * error).all()
    assert not energies.requires_grad and not contrast.mean.requires_grad


@pytest.mark.parametrize("game", [amc.gan, amc.relativistic])
@pytest.mark.parametrize("start", [0.0, math.log(0.5)], ids=["at the optimum", "half as wide"])
def test_in_its_own_coordinates_a_student_finds_the_width_of_its_teacher_and_stays(game, start):
    """A Gaussian student and a Gaussian teacher: the game is at rest where both are equal."""
    mean, log_scale = torch.zeros(1, 2), torch.tensor([[math.log(0.1), 0.0]])
    offset = torch.full((1, 2), start, requires_grad=True)
    moved = torch.zeros(1, 2, requires_grad=True)  # in widths of the teacher

    def student(x):
        scale = log_scale.exp()
        location = mean + moved * scale
        return Independent(Normal(location.expand(len(x), 2), scale * offset.exp()), 1)

    model = LinearGaussian(torch.zeros(1, 2), torch.zeros(1), 1.0)  # x knows nothing of z
    network = InformedDiscriminator(StandardisedLinear())
    optimizers = {
        "encoder": torch.optim.Adam([offset, moved], lr=0.01, betas=(0.5, 0.9)),
        "discriminator": torch.optim.Adam(network.parameters(), lr=0.05, betas=(0.5, 0.9)),
    }
    decays = [cosine_decay(optimizer, 250) for optimizer in optimizers.values()]
    path = []
    for _ in range(250):
        amc.amc_step(
            torch.zeros(100, 1), model, student, optimizers, discriminator=network, num_samples=4,
            rule=amc.standardised(game()),
            teacher=lambda x, z0: mean + log_scale.exp() * torch.randn_like(z0),
        )  # fmt: skip
        path.append(torch.cat([offset, moved]).detach())
        for decay in decays:
            decay.step()
    assert path[-1].abs().max() < 0.1, path[-1]
    if start == 0.0:
        assert torch.stack(path).abs().max() < 0.2


# --- which gradient goes where -------------------------------------------------------------------


def test_a_step_of_the_game_is_three_separate_gradients():
    """Decoder, discriminator and student each follow their own loss and nothing else."""
    networks, x, shift = toy("bernoulli"), torch.randn(5, 4), torch.randn(5, 2)
    before = copy.deepcopy(networks)
    model, encoder, discriminator, _ = networks.values()
    torch.manual_seed(7)
    lesson = {"teacher": lambda x, z0: z0 + shift, "num_samples": 3}
    optimizers = sgd(networks, "model", "encoder", "discriminator")
    amc.amc_step(x, model, encoder, optimizers, discriminator=discriminator, **lesson)
    torch.manual_seed(7)
    z = before["encoder"](x, 3)  # the same noise
    teacher = z.detach() + shift
    assert_descended(before["model"], model, -before["model"].log_joint(x, teacher))
    loss = adversarial.discriminator_loss(before["discriminator"], x, teacher, z.detach())
    assert_descended(before["discriminator"], discriminator, loss)
    # The student meets the discriminator after its step.
    assert_descended(before["encoder"], encoder, adversarial.generator_loss(discriminator, x, z))


def test_mcmc_vi_separates_what_the_vae_joins():
    networks, x = toy(), torch.randn(5, 4)
    model, encoder, *_ = networks.values()
    before = copy.deepcopy(networks)
    torch.manual_seed(7)
    amc.vae_step(x, model, encoder, sgd(networks, "model", "encoder", lr=1e-3))
    torch.manual_seed(7)
    loss = -elbo(before["model"], before["encoder"](x), x, analytic_kl=True)
    for name in ("model", "encoder"):
        tolerance = {"lr": 1e-3, "atol": 1e-6, "rtol": 1e-3}
        assert_descended(before[name], networks[name], loss, **tolerance)

    fixed, before = torch.randn(1, 5, 2), copy.deepcopy(networks)
    amc.mcmc_vi_step(x, model, encoder, sgd(networks, "model", "encoder"), teacher=lambda *_: fixed)
    assert_descended(before["model"], model, -before["model"].log_joint(x, fixed))


NAMES = ("model", "encoder", "discriminator")
METHODS = {"vae": 2, "mcmc_vi": 2, "amc": 3, "avb": 3, "persistent": 1}  # how many of them learn


def step_of(method, networks, optimizers):
    """The step of a row of the table, as a function of the data and their numbers."""
    model, encoder, discriminator, chains = networks.values()
    teacher = partial(amc.teacher_samples, model, num_steps=3, step_size=0.1)
    common, critic = (model, encoder, optimizers), {"discriminator": discriminator}
    return {
        "vae": lambda x, index: amc.vae_step(x, *common),
        "mcmc_vi": lambda x, index: amc.mcmc_vi_step(x, *common, teacher=teacher),
        "amc": lambda x, index: amc.amc_step(x, *common, teacher=teacher, **critic),
        "avb": lambda x, index: amc.avb_step(x, *common, **critic, num_samples=4, contrast=True),
        "persistent": lambda x, index: amc.persistent_step(
            x, index, model, chains, optimizers, teacher=teacher
        ),
    }[method]


@pytest.mark.parametrize("decoder", ["trained", "fixed"])
@pytest.mark.parametrize(
    ("method", "noise"),
    [(method, None) for method in METHODS]
    + [(method, noise) for method in ("amc", "avb") for noise in ("gaussian", "bernoulli")],
)
def test_each_step_changes_exactly_its_own_parameters(method, noise, decoder):
    networks, x, index = toy(noise), torch.randn(2, 4), torch.tensor([1, 4])
    trained = NAMES[decoder == "fixed" : METHODS[method]]
    before = copy.deepcopy(networks)
    step = step_of(method, networks, sgd(networks, *trained, lr=0.01))
    if not trained:
        with pytest.raises(ValueError, match="needs optimizers for model"):
            step(x, index)
        return
    for _ in range(2):
        losses = step(x, index)
    assert losses.keys() <= {*trained, "loss"}
    assert all(torch.isfinite(loss) and not loss.requires_grad for loss in losses.values())
    for name in NAMES:
        for now, then in zip(networks[name].parameters(), before[name].parameters(), strict=True):
            assert torch.equal(now, then) == (name not in trained), name
            assert (now.grad is None) == (name not in trained), name
    moved = (networks["chains"].z != before["chains"].z).any(-1)[0].nonzero().flatten()
    assert moved.tolist() == ([1, 4] if method == "persistent" else [])


# --- persistent chains and resume ----------------------------------------------------------------


def test_persistent_chains_go_on_where_they_were_and_count_their_memory():
    chains = amc.PersistentChains(num_data=7, latent_dim=3, num_chains=2)
    assert chains.num_bytes == 7 * 3 * 2 * 4 and list(chains.state_dict()) == ["z"]
    model = LinearGaussian(torch.randn(4, 3), torch.zeros(4), 1.0)
    starts, index = [], torch.tensor([5, 0])

    def teacher(x, z0):
        starts.append(z0.clone())
        return z0 + 1.0

    untouched = chains.z[:, [1, 2, 3, 4, 6]].clone()
    optimizers = {"model": torch.optim.SGD(model.parameters(), lr=0.01)}
    for _ in range(2):
        amc.persistent_step(torch.randn(2, 4), index, model, chains, optimizers, teacher=teacher)
    torch.testing.assert_close(starts[1], starts[0] + 1.0)
    torch.testing.assert_close(chains(index), starts[0] + 2.0)
    assert torch.equal(chains.z[:, [1, 2, 3, 4, 6]], untouched)
    with pytest.raises(ValueError, match="num_data must be an integer, at least 1; got 0"):
        amc.PersistentChains(0, 3)


@pytest.mark.parametrize("method", ["persistent", "amc"])
def test_an_interrupted_run_ends_as_one_that_was_left_alone(method, tmp_path):
    def run(work):
        torch.manual_seed(5)
        data, networks = (torch.randn(20, 4), torch.arange(20)), toy()
        names, adam = NAMES[: METHODS[method]], partial(torch.optim.Adam, lr=0.01)
        optimizers = {name: adam(networks[name].parameters()) for name in names}
        state = networks | {f"{name} optimizer": o for name, o in optimizers.items()}
        step = step_of(method, networks, optimizers)
        settings = {"epochs": 3, "batch_size": 5, "schedule": half_cosine, "work": work}
        return fit(step, data, state, **settings), networks

    whole, networks = run(Work())
    for _ in range(11):  # one step at a time, each in a "process" of its own
        with pytest.raises(OutOfTimeError):
            run(Work(tmp_path, stop_at=0.0))
    result, resumed = run(Work(tmp_path, stop_at=0.0))
    assert all(torch.equal(values, result.history[k]) for k, values in whole.history.items())
    for name, network in networks.items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, resumed[name].state_dict()[key]), (name, key)


# --- errors --------------------------------------------------------------------------------------


def never(*_):
    raise AssertionError("the chain must not run")


def coin_flips(x):
    """A student whose samples have no gradient."""
    return Independent(Bernoulli(torch.full((len(x), 2), 0.5)), 1)


@pytest.mark.parametrize(
    ("names", "settings", "error", "message"),
    [
        ("me", {"rule": "kl"}, ValueError, r"must be one of gan, wass.*, mmd, incl.*'kl'"),
        ("med", {}, ValueError, "rule 'gan' needs a discriminator"),
        ("me", {"rule": "mmd", "discriminator": never}, ValueError, "'mmd' has no discriminator"),
        ("me", {"discriminator": never}, ValueError, r"for discriminator, enc.*got model, enc"),
        ("med", {"rule": "mmd"}, ValueError, "got model, encoder, discriminator"),
        ("me", {"rule": "mmd", "num_samples": 7}, ValueError, "num_samples .* at least 8; got 7"),
        ("me", {"rule": "mmd", "num_samples": 8}, TypeError, "'mmd' needs .* have a gradient"),
    ],
)
def test_mistakes_are_named_before_any_work(names, settings, error, message):
    networks, x = toy(), torch.randn(5, 4)
    optimizers = sgd(networks, *(name for name in NAMES if name[0] in names))
    with pytest.raises(error, match=message):
        amc.amc_step(x, networks["model"], coin_flips, optimizers, teacher=never, **settings)


def test_students_without_a_density_are_refused_where_one_is_needed():
    networks = toy("bernoulli")
    given = networks["model"], networks["encoder"], sgd(networks, "model", "encoder")
    inclusive = partial(amc.amc_step, teacher=never, rule="inclusive_kl")
    for step in (amc.vae_step, partial(amc.mcmc_vi_step, teacher=never), inclusive):
        with pytest.raises(TypeError, match=r"a density is needed.*not a Tensor"):
            step(torch.randn(5, 4), *given)


def test_short_runs_set_out_from_the_prior_and_teach_the_decoder(monkeypatch):
    torch.manual_seed(3)
    model, x = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 0.5), torch.full((4000, 1), 2.0)
    starts = []

    def teacher(x, z0):
        starts.append(z0)
        return amc.teacher_samples(model, x, z0, num_steps=300, step_size=0.02)

    optimizers = {"model": torch.optim.SGD(model.parameters(), lr=1e-9)}
    loss = amc.short_run_step(x, model, optimizers, teacher=teacher)["model"]
    assert starts[0].shape == (1, 4000, 1)
    assert abs(starts[0].mean()) < 0.06 and abs(starts[0].std() - 1) < 0.04
    expected = -model.log_joint(x, model.posterior(x).sample()).mean()
    assert abs(loss - expected) < 0.06


def test_a_weight_scales_the_divergence_of_the_bound_alone():
    model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 0.5)
    encoder = encoders.GaussianEncoder(1, nn.Identity(), num_features=1)
    x, losses = torch.tensor([[1.5], [-0.5]]), []
    for weight in (0.0, 0.25, torch.tensor(1.0), 1.0):
        torch.manual_seed(0)
        optimizers = {"encoder": torch.optim.SGD(encoder.parameters(), lr=0.0)}
        losses.append(amc.vae_step(x, model, encoder, optimizers, kl_weight=weight)["loss"])
    divergence = torch.distributions.kl_divergence(encoder(x), model.prior()).mean()
    assert torch.allclose(losses[2] - losses[0], divergence, atol=1e-5)
    assert torch.allclose(losses[2] - losses[1], 0.75 * divergence, atol=1e-5)
    assert losses[2] == losses[3]
