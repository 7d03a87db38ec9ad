"""Teachers against exact posteriors, rules against closed forms, recipes against their table."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent

from amortised import adversarial
from amortised.adversarial import Discriminator
from amortised.amc import (
    PersistentChains,
    amc_step,
    avb_step,
    descend,
    mcmc_vi_step,
    persistent_step,
    student_samples,
    teacher_chain,
    teacher_samples,
    vae_step,
)
from amortised.encoders import (
    BlockPerceptrons,
    GaussianEncoder,
    ImplicitEncoder,
    MixtureEncoder,
    ParallelPerceptrons,
)
from amortised.mcmc import hmc_step, langevin_step, mala_step
from amortised.models import ConvBernoulli, LinearGaussian
from amortised.numerics import CallCounter, value_and_grad
from amortised.objectives import elbo
from amortised.training import cosine_decay, fit


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


def toy(encoder="gaussian", latent_dim=2, observation_dim=4):
    """Networks of a few units around a linear-Gaussian model."""
    small = {"num_features": observation_dim, "num_hidden": 16}
    networks = {
        "model": LinearGaussian(torch.randn(4, latent_dim), torch.zeros(4), 1.0),
        "encoder": GaussianEncoder(latent_dim, nn.Identity(), observation_dim)
        if encoder == "gaussian"
        else ImplicitEncoder(latent_dim, encoder, nn.Identity(), **small),
        "discriminator": Discriminator(latent_dim, nn.Identity(), **small),
    }
    return networks


def sgd(networks, *names, lr=1.0):
    return {name: torch.optim.SGD(networks[name].parameters(), lr=lr) for name in names}


def gradient(loss, module):
    return torch.autograd.grad(loss.mean(), list(module.parameters()))


def descended(before, after):
    """The gradients that stochastic gradient descent of rate 1 must have used."""
    return [b - a for b, a in zip(before.parameters(), after.parameters(), strict=True)]


# --- the teacher ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel": mala_step, "step_size": 0.3, "num_steps": 60},
        {"kernel": partial(hmc_step, num_steps=4), "step_size": 0.5, "num_steps": 15},
    ],
    ids=["mala", "hmc"],
)
def test_with_a_metropolis_test_the_teacher_becomes_the_exact_posterior(settings):
    model, x = correlated_model()
    num_chains = 4000
    z0 = 2.0 + torch.randn(num_chains, 3, 2, generator=generator(), dtype=torch.float64)
    z = teacher_samples(model, x, z0, generator=generator(1), **settings)
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
def test_the_unadjusted_teacher_has_its_biased_stationary_variance(
    precision, step_size, num_steps, known
):
    """(1 / lambda) / (1 - s lambda / 4), around the right mean."""
    model, x, num_chains = scalar_model(precision), torch.tensor([[0.8]]).double(), 20_000
    z0 = torch.zeros(num_chains, 1, 1).double()
    z = teacher_samples(
        model, x, z0, num_steps=num_steps, step_size=step_size, generator=generator()
    )
    expected = 1 / precision / (1 - step_size * precision / 4)
    assert expected == pytest.approx(known, rel=1e-4)
    assert abs(z.var().item() - expected) < 4 * expected * math.sqrt(2 / num_chains)
    assert abs((z.mean() - model.posterior(x).mean).item()) < 4 * math.sqrt(expected / num_chains)


def test_the_start_is_forgotten_by_the_same_factor_at_each_step():
    model, x, step_size = scalar_model(5.0), torch.zeros(1, 1).double(), 0.1
    z0 = torch.ones(20_000, 1, 1).double()
    path = teacher_chain(
        model, x, z0, num_steps=3, step_size=step_size, generator=generator()
    ).samples
    factor, variance = 1 - step_size * 5.0 / 2, 0.0
    for t in range(3):
        variance = factor**2 * variance + step_size
        expected, error = factor ** (t + 1), math.sqrt(variance / len(z0))
        assert abs(path[t].mean().item() - expected) < 4 * error


def test_beyond_the_limit_of_stability_the_teacher_fails_by_name():
    model, x, z0 = scalar_model(10.0).float(), torch.zeros(1, 1), torch.ones(5, 1, 1)
    stable = teacher_samples(model, x, z0, num_steps=500, step_size=0.39, generator=generator())
    assert stable.abs().max() < 20
    with pytest.raises(FloatingPointError, match="smaller step_size"):
        teacher_samples(model, x, z0, num_steps=500, step_size=0.9, generator=generator())
    with pytest.raises(FloatingPointError, match="the student's samples are not finite"):
        teacher_samples(model, x, z0 * torch.nan, num_steps=1, step_size=0.1)
    with pytest.raises(ValueError, match=r"num_steps must be at least 1.*got 0"):
        teacher_chain(model, x, z0, num_steps=0, step_size=0.1)


def test_the_chain_records_its_path_and_the_teacher_is_its_end():
    model, x = correlated_model()
    z0 = torch.zeros(5, 3, 2).double().requires_grad_(True)
    settings = {"num_steps": 6, "step_size": 0.3, "kernel": mala_step}
    chain = teacher_chain(model, x, z0, generator=generator(), **settings)
    assert chain.samples.shape == (6, 5, 3, 2) and chain.acceptance_rate.shape == (5, 3)
    thinned = teacher_chain(model, x, z0, generator=generator(), thin=2, **settings)
    assert torch.equal(thinned.samples, chain.samples[1::2])
    end = teacher_samples(model, x, z0, generator=generator(), **settings)
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
    counter = CallCounter(model.likelihood)
    model.likelihood = counter
    run = partial(teacher_samples, model, x, z0, num_steps=7, step_size=0.2, kernel=kernel)
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
    optimizers = [
        torch.optim.SGD([theta, frozen], lr=1.0),
        torch.optim.SGD([phi], lr=0.5),
    ]
    value = descend(theta * phi * psi * frozen, *optimizers)
    assert value == 16.0 and not value.requires_grad
    assert theta.tolist() == [-2.0, -2.0] and phi.tolist() == [0.0, 0.0]  # gradient 8 / 2
    assert psi.tolist() == frozen.tolist() == [2.0, 2.0]
    assert psi.grad.tolist() == [1.0, 1.0] and frozen.grad is None


def test_student_samples_of_every_encoder():
    x = torch.randn(5, 4)
    for kind in ("gaussian", "bernoulli"):
        z = student_samples(toy(kind)["encoder"], x, 3)
        assert z.shape == (3, 5, 2) and z.requires_grad
    categorical = student_samples(lambda x: Categorical(torch.ones(len(x), 2)), x, 3)
    assert categorical.shape == (3, 5) and not categorical.requires_grad
    with pytest.raises(TypeError, match="must return a distribution, not a Tensor"):
        student_samples(nn.Linear(4, 2), x)


def test_blocks_of_a_batch_have_networks_of_their_own():
    """Block s of the batch depends on network s alone, and equals what that network makes of it."""
    heads = BlockPerceptrons(3, 2, 8, 4)
    h = torch.randn(5, 6, 2)
    for s in range(3):
        lone = ParallelPerceptrons(1, 2, 8, 4)
        pairs = zip(lone.parameters(), heads.networks.parameters(), strict=True)
        for parameter, source in pairs:
            parameter.data = source.data[s : s + 1]
        block = h[:, 2 * s : 2 * s + 2]
        expected = lone(block.reshape(1, -1, 2)).reshape(5, 2, 4)
        torch.testing.assert_close(heads(h)[:, 2 * s : 2 * s + 2], expected)
    torch.testing.assert_close(heads(h[0]), heads(h)[0])
    heads(h)[:, :2].sum().backward()
    assert (heads.networks.weights[0].grad[1:] == 0).all()
    with pytest.raises(ValueError, match="a batch of 7 has no 3 equal blocks"):
        heads(torch.zeros(7, 2))


def test_inclusive_kl_gives_a_mixture_student_both_modes_and_their_weights():
    """A teacher with 30 % of its mass at -2 and the rest at 2, sd 0.3."""
    torch.manual_seed(0)
    x = torch.zeros(1, 1)
    side = (torch.rand(4000, 1, 1) < 0.3).float()
    draws = 2.0 - 4.0 * side + 0.3 * torch.randn(4000, 1, 1)
    student = MixtureEncoder(1, 2, nn.Identity(), num_features=1)
    with torch.no_grad():
        student.head.bias[2:4] = torch.tensor([-0.5, 0.5])
    optimizers = {"encoder": torch.optim.Adam(student.parameters(), lr=0.05)}
    for _ in range(300):
        amc_step(x, None, student, optimizers, teacher=lambda *_: draws, rule="inclusive_kl")
    q = student(x)
    weight = q.mixture_distribution.probs[0, 0].item()
    assert weight == pytest.approx(side.mean().item(), abs=1e-3)
    torch.testing.assert_close(
        q.component_distribution.mean.flatten(), torch.tensor([-2.0, 2.0]), atol=0.05, rtol=0
    )
    with pytest.raises(TypeError, match="needs a student whose samples have a gradient"):
        amc_step(x, None, student, optimizers, teacher=lambda *_: draws, rule="mmd", num_samples=8)


# --- the rules -----------------------------------------------------------------------------------


def test_inclusive_kl_gives_a_diagonal_student_the_posteriors_means_and_marginal_variances():
    model, x = correlated_model()
    posterior, num_samples = model.posterior(x), 2000
    samples = posterior.sample((num_samples,))
    student = GaussianEncoder(2, nn.Linear(4, 3, bias=False), num_features=3).double()
    student.trunk.weight = nn.Parameter(torch.linalg.pinv(x).T, requires_grad=False)  # one-hot x
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    decay = cosine_decay(optimizer, 250)
    for _ in range(250):
        amc_step(
            x,
            model,
            student,
            {"encoder": optimizer},
            teacher=lambda *_: samples,
            rule="inclusive_kl",
        )
        decay.step()
    q = student(x)
    torch.testing.assert_close(q.mean, samples.mean(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(q.variance, samples.var(0, correction=0), atol=0, rtol=5e-3)
    variance = posterior.variance
    assert ((q.mean - posterior.mean).abs() < 4 * (variance / num_samples).sqrt() + 1e-3).all()
    relative = (q.variance / variance - 1).abs()
    assert (relative < 4 * math.sqrt(2 / num_samples) + 5e-3).all()
    exclusive = 1 / posterior.precision_matrix.diagonal(dim1=-2, dim2=-1)
    assert (q.variance > 1.2 * exclusive).all()  # what the ELBO would have given: too narrow


@pytest.mark.parametrize("rule", ["gan", "wasserstein", "mmd"])
def test_each_rule_without_a_density_draws_the_student_to_the_teacher(rule):
    """Teachers N(-1.5, 0.5^2) and N(1.5, 0.5^2): the student must find the one of each x."""
    torch.manual_seed(1)
    x = torch.tensor([[-1.5], [1.5]])
    small = {"trunk": nn.Identity(), "num_features": 1, "num_hidden": 32}
    encoder, discriminator = ImplicitEncoder(1, **small), Discriminator(1, **small)
    is_game = rule != "mmd"
    networks = {"encoder": encoder} | ({"discriminator": discriminator} if is_game else {})
    rates = {"encoder": 2e-3, "discriminator": 1e-2}
    optimizers = {
        name: torch.optim.Adam(network.parameters(), lr=rates[name], betas=(0.5, 0.999))
        for name, network in networks.items()
    }
    decays = [cosine_decay(optimizer, 300) for optimizer in optimizers.values()]

    def distance():
        with torch.no_grad():
            z = encoder(x, 2000).squeeze(-1)
        return (z.mean(0) - x.squeeze(-1)).square() + (z.std(0) - 0.5).square()

    before = distance()
    for _ in range(300):
        amc_step(
            x,
            LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0),
            encoder,
            optimizers,
            teacher=lambda x, z0: x + 0.5 * torch.randn_like(z0),
            rule=rule,
            discriminator=discriminator if is_game else None,
            num_samples=64,
            num_critic_steps=2,
            penalty_weight=0.1,
        )
        for decay in decays:
            decay.step()
    assert (distance() < 0.1 * before).all(), (before, distance())


def test_a_discrete_student_learns_the_marginals_of_an_exact_teacher():
    """Bits z with a known law for each x, and a student of independent bits."""
    probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])  # of 00, 01, 10, 11
    bits = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(2, 2))

        def forward(self, x):
            return Independent(Bernoulli(logits=self.logits[x.squeeze(-1).long()]), 1)

    draws = bits[Categorical(probabilities).sample((4000,))]
    student, x = Student(), torch.tensor([[0.0], [1.0]])
    optimizers = {"encoder": torch.optim.Adam(student.parameters(), lr=0.1)}
    for _ in range(200):
        amc_step(x, None, student, optimizers, teacher=lambda *_: draws, rule="inclusive_kl")
    marginals = probabilities @ bits
    error = (marginals * (1 - marginals) / 4000).sqrt()
    assert ((student(x).mean - marginals).abs() < 4 * error + 1e-3).all()


def test_the_whole_path_can_teach():
    for rule in ("gan", "mmd", "inclusive_kl"):
        networks = toy()
        is_game = rule == "gan"

        def path(x, z0, model=networks["model"]):
            chain = teacher_chain(model, x, z0, num_steps=3, step_size=0.1)
            return chain.samples.flatten(0, 1)

        losses = amc_step(
            torch.randn(5, 4),
            networks["model"],
            networks["encoder"],
            sgd(networks, "model", "encoder", *(["discriminator"] if is_game else []), lr=0.01),
            teacher=path,
            rule=rule,
            discriminator=networks["discriminator"] if is_game else None,
            num_samples=8,
        )
        assert all(torch.isfinite(loss) for loss in losses.values())


# --- which gradient goes where -------------------------------------------------------------------


@pytest.mark.parametrize("decoder_samples", ["teacher", "student"])
def test_the_decoder_learns_from_the_z_that_is_named(decoder_samples):
    networks, x, seen = toy(), torch.randn(5, 4), {}

    def teacher(x, z0):
        seen["student"], seen["teacher"] = z0, z0 + 1.0
        return seen["teacher"]

    before = copy.deepcopy(networks["model"])
    amc_step(
        x,
        networks["model"],
        networks["encoder"],
        sgd(networks, "model", "encoder"),
        teacher=teacher,
        rule="inclusive_kl",
        decoder_samples=decoder_samples,
        num_samples=3,
    )
    expected = gradient(-before.log_joint(x, seen[decoder_samples]), before)
    torch.testing.assert_close(descended(before, networks["model"]), list(expected))


def test_a_step_of_the_game_is_three_separate_gradients():
    """Decoder, discriminator and student each follow their own loss and nothing else."""
    networks, x = toy("gaussian"), torch.randn(5, 4)
    networks["encoder"] = toy("bernoulli")["encoder"]
    before = copy.deepcopy(networks)
    shift = torch.randn(5, 2)
    torch.manual_seed(7)
    amc_step(
        x,
        networks["model"],
        networks["encoder"],
        sgd(networks, "model", "encoder", "discriminator", lr=1.0),
        teacher=lambda x, z0: z0 + shift,
        discriminator=networks["discriminator"],
        num_samples=3,
    )
    torch.manual_seed(7)
    z = before["encoder"](x, 3)  # the same noise
    model_grad = gradient(-before["model"].log_joint(x, z.detach() + shift), before["model"])
    torch.testing.assert_close(descended(before["model"], networks["model"]), list(model_grad))
    critic_grad = gradient(
        adversarial.discriminator_loss(before["discriminator"], x, z.detach() + shift, z.detach()),
        before["discriminator"],
    )
    torch.testing.assert_close(
        descended(before["discriminator"], networks["discriminator"]), list(critic_grad)
    )
    # The student meets the discriminator after its step.
    student_grad = gradient(
        adversarial.generator_loss(networks["discriminator"], x, z), before["encoder"]
    )
    torch.testing.assert_close(
        descended(before["encoder"], networks["encoder"]), list(student_grad)
    )


def test_mcmc_vi_separates_what_the_vae_joins():
    networks, x = toy(), torch.randn(5, 4)
    model, encoder = networks["model"], networks["encoder"]
    before = copy.deepcopy(networks)
    optimizers = sgd(networks, "model", "encoder", lr=1e-3)
    torch.manual_seed(7)
    vae_step(x, model, encoder, optimizers)
    torch.manual_seed(7)
    loss = -elbo(before["model"], before["encoder"](x), x, analytic_kl=True)
    gradients = torch.autograd.grad(
        loss.mean(), [*before["model"].parameters(), *before["encoder"].parameters()]
    )
    moved = [*descended(before["model"], model), *descended(before["encoder"], encoder)]
    torch.testing.assert_close(moved, [1e-3 * g for g in gradients], atol=1e-6, rtol=1e-3)

    fixed, before = torch.randn(1, 5, 2), copy.deepcopy(networks)
    mcmc_vi_step(x, model, encoder, sgd(networks, "model", "encoder"), teacher=lambda *_: fixed)
    expected = gradient(-before["model"].log_joint(x, fixed), before["model"])
    torch.testing.assert_close(descended(before["model"], model), list(expected))


# --- the ten rows of the table -------------------------------------------------------------------

RECIPES = {
    "Gaussian VAE": ("gaussian", "vae", None),
    "Gaussian MCMC-VI T=5": ("gaussian", "mcmc_vi", (5, 0.2)),
    "Gaussian AMC T=5": ("gaussian", "amc", (5, 0.2)),
    "CNN-G AMC T=5": ("CNN-G", "amc", (5, 0.2)),
    "CNN-G AMC T=50": ("CNN-G", "amc", (50, 0.02)),
    "CNN-G AVB": ("CNN-G", "avb", None),
    "CNN-B AMC T=5": ("CNN-B", "amc", (5, 0.2)),
    "CNN-B AMC T=50": ("CNN-B", "amc", (50, 0.02)),
    "CNN-B AVB": ("CNN-B", "avb", None),
    "persistent MCMC T=50": (None, "persistent", (50, 0.02)),
}


@pytest.mark.parametrize("row", RECIPES)
def test_each_recipe_changes_exactly_its_own_parameters(row):
    encoder_kind, method, chain = RECIPES[row]
    encoders = {
        "gaussian": GaussianEncoder,
        "CNN-G": partial(ImplicitEncoder, noise="gaussian"),
        "CNN-B": partial(ImplicitEncoder, noise="bernoulli"),
        None: nn.Identity,
    }
    networks = {
        "model": ConvBernoulli(),
        "encoder": encoders[encoder_kind](),
        "discriminator": Discriminator(),
        "chains": PersistentChains(num_data=6, latent_dim=32),
    }
    model, encoder, discriminator, chains = networks.values()
    trained = {
        "vae": {"model", "encoder"},
        "mcmc_vi": {"model", "encoder"},
        "amc": {"model", "encoder", "discriminator"},
        "avb": {"model", "encoder", "discriminator"},
        "persistent": {"model"},
    }[method]
    optimizers = {name: torch.optim.Adam(networks[name].parameters()) for name in trained}
    teacher = chain and partial(teacher_samples, model, num_steps=chain[0], step_size=chain[1])
    common, critic = (model, encoder, optimizers), {"discriminator": discriminator}
    step = {
        "vae": lambda x, index: vae_step(x, *common),
        "mcmc_vi": lambda x, index: mcmc_vi_step(x, *common, teacher=teacher),
        "amc": lambda x, index: amc_step(x, *common, teacher=teacher, **critic),
        "avb": lambda x, index: avb_step(x, *common, **critic),
        "persistent": lambda x, index: persistent_step(
            x, index, model, chains, optimizers, teacher=teacher
        ),
    }[method]
    before = copy.deepcopy(networks)
    x = torch.bernoulli(torch.full((2, 784), 0.2))
    for _ in range(2):
        losses = step(x, torch.tensor([1, 4]))
    assert set(losses) <= trained | {"loss"}
    assert all(torch.isfinite(loss) and not loss.requires_grad for loss in losses.values())
    for name in ("model", "encoder", "discriminator"):
        for now, then in zip(networks[name].parameters(), before[name].parameters(), strict=True):
            assert torch.equal(now, then) == (name not in trained), name
            assert (now.grad is None) == (name not in trained), name
    moved = (chains.z != before["chains"].z).any(-1)[0].tolist()
    assert moved == (
        [False, True, False, False, True, False] if method == "persistent" else [False] * 6
    )


def test_a_fixed_decoder_is_left_alone():
    networks, x = toy(), torch.randn(5, 4)
    before = copy.deepcopy(networks["model"])
    optimizers = sgd(networks, "encoder", "discriminator", lr=0.01)
    critic = {"discriminator": networks["discriminator"]}
    teacher = partial(teacher_samples, networks["model"], num_steps=2, step_size=0.1)
    common = (x, networks["model"], networks["encoder"])
    amc_step(*common, optimizers, teacher=teacher, **critic)
    avb_step(*common, optimizers, **critic, num_samples=4, contrast=True)
    del optimizers["discriminator"]
    vae_step(*common, optimizers)
    mcmc_vi_step(*common, optimizers, teacher=teacher)
    assert all(map(torch.equal, before.parameters(), networks["model"].parameters()))


# --- persistent chains and resume ----------------------------------------------------------------


def test_persistent_chains_go_on_where_they_were_and_count_their_memory():
    chains = PersistentChains(num_data=7, latent_dim=3, num_chains=2)
    assert chains.num_bytes == 7 * 3 * 2 * 4 and list(chains.state_dict()) == ["z"]
    model = LinearGaussian(torch.randn(4, 3), torch.zeros(4), 1.0)
    starts, index = [], torch.tensor([5, 0])

    def teacher(x, z0):
        starts.append(z0.clone())
        return z0 + 1.0

    untouched = chains.z[:, [1, 2, 3, 4, 6]].clone()
    optimizers = {"model": torch.optim.SGD(model.parameters(), lr=0.01)}
    for _ in range(2):
        persistent_step(torch.randn(2, 4), index, model, chains, optimizers, teacher=teacher)
    torch.testing.assert_close(starts[1], starts[0] + 1.0)
    torch.testing.assert_close(chains(index), starts[0] + 2.0)
    assert torch.equal(chains.z[:, [1, 2, 3, 4, 6]], untouched)
    with pytest.raises(ValueError, match="must be at least 1; got 0, 3 and 1"):
        PersistentChains(0, 3)


class Run:
    """A run under ``fit`` with chains of its own or a game, and decaying rates."""

    def __init__(self, method):
        torch.manual_seed(5)
        self.data = (torch.randn(20, 4), torch.arange(20))
        self.networks = toy("gaussian") | {"chains": PersistentChains(20, 2)}
        model, encoder, discriminator, chains = self.networks.values()
        names = ("model",) if method == "persistent" else ("model", "encoder", "discriminator")
        optimizers = {n: torch.optim.Adam(self.networks[n].parameters(), lr=0.01) for n in names}
        schedulers = [cosine_decay(optimizer, 12) for optimizer in optimizers.values()]
        teacher = partial(teacher_samples, model, num_steps=3, step_size=0.1)

        def step(x, index):
            if method == "persistent":
                losses = persistent_step(x, index, model, chains, optimizers, teacher=teacher)
            else:
                losses = amc_step(
                    x, model, encoder, optimizers, teacher=teacher, discriminator=discriminator
                )
            for scheduler in schedulers:
                scheduler.step()
            return losses

        self.step = step
        self.state = self.networks | {f"{n} optimizer": o for n, o in optimizers.items()}
        self.state |= {f"scheduler {i}": s for i, s in enumerate(schedulers)}

    def fit(self, **settings):
        return fit(
            self.step,
            self.data,
            epochs=3,
            batch_size=5,
            state=self.state,
            generator=generator(9),
            progress=False,
            **settings,
        )


@pytest.mark.parametrize("method", ["persistent", "amc"])
def test_an_interrupted_run_ends_as_one_that_was_left_alone(method, tmp_path):
    whole = Run(method)
    history = whole.fit().history
    for _ in range(12):  # one step at a time, each in a "process" of its own
        part = Run(method)
        result = part.fit(checkpoint=tmp_path / "checkpoint", max_seconds=0)
    assert result.finished and all(torch.equal(history[k], result.history[k]) for k in history)
    for name, network in whole.networks.items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, part.networks[name].state_dict()[key]), (name, key)
    assert (part.networks["chains"].z != Run(method).networks["chains"].z).any() == (
        method == "persistent"
    )


# --- errors --------------------------------------------------------------------------------------


def test_mistakes_are_named_before_any_work():
    networks, x = toy(), torch.randn(5, 4)
    critic = networks["discriminator"]
    optimizers = sgd(networks, "model", "encoder")
    games = sgd(networks, "model", "encoder", "discriminator")

    def never(*_):
        raise AssertionError("the chain must not run")

    run = partial(amc_step, x, networks["model"], networks["encoder"], teacher=never)
    with pytest.raises(ValueError, match=r"rule must be one of gan, wasserstein, mmd, incl.*'kl'"):
        run(optimizers, rule="kl")
    with pytest.raises(ValueError, match="decoder_samples must be one of teacher, student; got"):
        run(optimizers, rule="mmd", decoder_samples="both")
    with pytest.raises(ValueError, match="rule 'gan' needs a discriminator"):
        run(games)
    with pytest.raises(ValueError, match="rule 'mmd' has no discriminator"):
        run(optimizers, rule="mmd", discriminator=critic)
    with pytest.raises(ValueError, match=r"optimizers for discriminator, encoder.*got model, enc"):
        run(optimizers, discriminator=critic)
    with pytest.raises(ValueError, match="got model, encoder, discriminator"):
        run(games, rule="mmd")
    with pytest.raises(TypeError, match="'mmd' needs a student whose samples have a gradient"):
        amc_step(
            x,
            networks["model"],
            lambda x: Independent(Bernoulli(torch.full((len(x), 2), 0.5)), 1),
            optimizers,
            teacher=never,
            rule="mmd",
        )
    implicit = toy("bernoulli")["encoder"]
    for step in (
        partial(vae_step, x, networks["model"], implicit, optimizers),
        partial(mcmc_vi_step, x, networks["model"], implicit, optimizers, teacher=never),
        partial(
            amc_step, x, networks["model"], implicit, optimizers, teacher=never, rule="inclusive_kl"
        ),
    ):
        with pytest.raises(TypeError, match=r"a density is needed.*not a Tensor"):
            step()
