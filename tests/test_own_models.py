"""Models of a reader's own, of any class: every entry point takes them, or says what they lack."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, Independent, MultivariateNormal, Normal

from amortised import amc, evaluation, hvae, imputation, iterative, mcvae, models, objectives
from amortised.ais import AISSettings, linear_schedule
from amortised.encoders import GaussianEncoder
from amortised.fast import log_likelihood_and_grad

WEIGHT = torch.tensor([[1.0, -0.3], [0.2, 0.9], [-0.7, 0.4]]).double()
BIAS, SCALE = torch.tensor([0.5, -1.0, 0.1]).double(), 0.7
X = torch.tensor([[1.2, -0.4, 0.3], [-0.6, 0.8, 1.1], [0.0, -1.5, 0.9]]).double()
Z0 = torch.zeros(4, 3, 2).double()
MASK = torch.tensor([False, True, False])


class Plain:
    """No module, no weights: tensors and three methods."""

    latent_dim, observation_dim = 2, 3

    def __init__(self):
        self.weight = WEIGHT.clone()

    def prior(self):
        return Independent(Normal(torch.zeros(2).double(), 1.0), 1)

    def likelihood(self, z):
        return Independent(Normal(z @ self.weight.T + BIAS, SCALE), 1)


class Module(nn.Module):
    """A module that is no LatentVariableModel."""

    prior = Plain.prior
    latent_dim, observation_dim = 2, 3

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 3).double()
        with torch.no_grad():
            self.decoder.weight.copy_(WEIGHT)
            self.decoder.bias.copy_(BIAS)

    def likelihood(self, z):
        return Independent(Normal(self.decoder(z), SCALE), 1)


class Weightless(Plain):
    """Neither a weight nor a tensor: the prior alone tells the type."""

    def __init__(self):
        pass

    weight = WEIGHT


class Undrawn:
    """A log-likelihood, and nothing to draw from."""

    latent_dim, observation_dim, prior = 2, 3, Plain.prior

    def __init__(self):
        self.plain = Plain()

    def log_likelihood(self, x, z):
        return self.plain.likelihood(z).log_prob(x)


def lacking(name):
    """The plain model without a piece."""
    kept = {k: v for k, v in vars(Plain).items() if k not in (name, "__dict__", "__weakref__")}
    return type("Lacking", (), kept)()


def q_at(x):
    return Independent(Normal(0.3 * x[:, :2], 0.8), 1)


def undone(*_):
    raise AssertionError("work was done")


FEW = {"num_chains": 4, "num_temperatures": 5, "num_leapfrog": 1}
ANNEALING = AISSettings(linear_schedule(5), 0.3, 2)
ENCODER = {"trunk": nn.Identity(), "num_features": 3}
TAKES_ANY = {
    "hais_ll": lambda m: evaluation.hais_ll(m, X, **FEW).log_likelihood,
    "importance_sampling_ll": lambda m: evaluation.importance_sampling_ll(
        m, q_at, X, num_samples=50
    ).log_likelihood,
    "fit_full_covariance": lambda m: evaluation.fit_full_covariance(m, X, num_steps=5).loc,
    "fit_gaussian_proposal": lambda m: evaluation.fit_gaussian_proposal(
        m, X, epochs=1, batch_size=3, encoder=GaussianEncoder(2, **ENCODER).double()
    )(X).mean,
    "log_likelihood_and_grad": lambda m: log_likelihood_and_grad(m, X)(Z0 + 1.0)[1],
    "elbo": lambda m: objectives.elbo(m, q_at(X), X, 3),
    "analytic elbo": lambda m: objectives.elbo(m, q_at(X), X, 3, analytic_kl=True),
    "iwae_bound": lambda m: objectives.iwae_bound(m, q_at(X), X, 5),
    "dreg_surrogate": lambda m: objectives.dreg_surrogate(m, q_at(X), X, 5),
    "stl_surrogate": lambda m: objectives.stl_surrogate(m, q_at(X), X, 5),
    "qp_loss": lambda m: objectives.qp_loss(m, q_at(X), X),
    "wake_phi_loss": lambda m: objectives.wake_phi_loss(m, q_at(X), X, 5),
    "wake_theta_loss": lambda m: objectives.wake_theta_loss(m, q_at(X), X, 5),
    "teacher_samples": lambda m: amc.teacher_samples(
        m, X, Z0, num_steps=3, step_size=0.1
    ),
    "uha_log_weights": lambda m: mcvae.uha_log_weights(
        m, q_at(X), X, 4, settings=mcvae.Bridge(2, 3, step_size=0.3, persistence=0.5).double()
    ),
    "hvae_log_weights": lambda m: hvae.hvae_log_weights(
        m, q_at(X), X, 4, flow=hvae.HamiltonianFlow(2, 3, step_size=0.3).double()
    ),
}  # fmt: skip
STATES_A_LAW = {
    "level_elbo": lambda m: iterative.level_elbo(m, q_at(X), X)[0],
    "bdmc_ll": lambda m: evaluation.bdmc_ll(m, 4, **FEW).upper,
    "impute": lambda m: imputation.impute(m, q_at, X, MASK, 3, 4),
    "conditional_samples": lambda m: (
        imputation.conditional_samples(m, X, MASK, 5, settings=ANNEALING, num_steps=2).x
    ),
}
ENTRIES = TAKES_ANY | STATES_A_LAW


def value(entry, model):
    torch.manual_seed(3)
    return ENTRIES[entry](model).detach()


@pytest.mark.parametrize("entry", ENTRIES)
def test_any_class_gives_the_numbers_of_a_subclass(entry):
    known = models.LinearGaussian(WEIGHT, BIAS, SCALE)
    expected = value(entry, known)
    for own in (Plain(), Module(), Weightless()):
        torch.testing.assert_close(value(entry, own), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("entry", TAKES_ANY)
def test_a_log_likelihood_is_enough_where_nothing_is_drawn(entry):
    torch.testing.assert_close(value(entry, Undrawn()), value(entry, Plain()))


@pytest.mark.parametrize("entry", STATES_A_LAW)
def test_draws_need_a_likelihood_or_a_method_of_their_own(entry):
    with pytest.raises(TypeError, match=r"no likelihood\(z\): define likelihood\(z\), for z"):
        value(entry, Undrawn())


def test_the_evidence_of_a_plain_object_is_that_in_closed_form():
    law = MultivariateNormal(BIAS, WEIGHT @ WEIGHT.T + SCALE**2 * torch.eye(3).double())
    proposal = evaluation.fit_full_covariance(Plain(), X)
    found = evaluation.importance_sampling_ll(Plain(), proposal, X, num_samples=2000)
    assert (found.log_likelihood - law.log_prob(X)).abs().max() < 0.01
    bounds = evaluation.bdmc_ll(Plain(), 3, num_chains=50, num_temperatures=50)
    assert (bounds.lower - 0.3 < law.log_prob(bounds.x)).all()
    assert (law.log_prob(bounds.x) < bounds.upper + 0.3).all()


def test_a_model_of_its_own_joint_needs_no_more_for_bounds_without_a_prior():
    class Joint:
        def log_joint(self, x, z):
            return models.LinearGaussian(WEIGHT, BIAS, SCALE).log_joint(x, z)

    torch.testing.assert_close(value("iwae_bound", Joint()), value("iwae_bound", Plain()))
    with pytest.raises(TypeError, match="a Joint is no model: no latent_dim"):
        value("hais_ll", Joint())


# --- what is missing -----------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("piece", models.PROTOCOL)
def test_a_missing_piece_is_named_with_its_remedy(entry, piece):
    remedy = models.PROTOCOL[piece]
    own = lacking(piece)
    for method in {"prior", "likelihood"} - {piece}:
        setattr(own, method, undone)
    with pytest.raises(TypeError) as refused:
        value(entry, own)
    assert str(refused.value) == f"a Lacking is no model: no {piece} ({remedy})"


def test_a_bare_decoder_is_told_all_that_it_lacks():
    with pytest.raises(TypeError, match=r"a Linear is no model: .*no prior.*no likelihood"):
        evaluation.hais_ll(nn.Linear(2, 3), X)


# --- what is wrong -------------------------------------------------------------------------------

BITS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])


class Binary(nn.Module):
    """Three binary pixels, with a layer in the place of what may go wrong."""

    latent_dim, observation_dim = 2, 3

    def __init__(self, *layers):
        super().__init__()
        torch.manual_seed(1)
        self.decoder = nn.Sequential(nn.Linear(2, 3), *layers)

    def prior(self):
        return Independent(Normal(torch.zeros(2), 1.0), 1)

    def likelihood(self, z):
        return Independent(
            Bernoulli(logits=self.decoder(z.reshape(-1, 2)).reshape(*z.shape[:-1], 3)), 1
        )


def check(model, x=BITS):
    return models.check_model(model, x)


@pytest.mark.parametrize("layer", [nn.Dropout(), nn.BatchNorm1d(3)])
@pytest.mark.parametrize("entry", [
    lambda m: evaluation.hais_ll(m, BITS),
    lambda m: evaluation.importance_sampling_ll(m, undone, BITS),
    lambda m: evaluation.bdmc_ll(m, 4),
    lambda m: evaluation.fit_full_covariance(m, BITS),
    lambda m: evaluation.fit_gaussian_proposal(m, BITS),
    lambda m: imputation.impute(m, undone, BITS, MASK, 3),
    lambda m: imputation.conditional_samples(m, BITS, MASK, 3, settings=ANNEALING, num_steps=1),
    lambda m: amc.teacher_samples(m, BITS, torch.zeros(1, 2, 2), num_steps=1, step_size=0.1),
    lambda m: log_likelihood_and_grad(m, BITS),
])  # fmt: skip
def test_layers_that_are_random_in_training_are_refused(layer, entry):
    model = Binary(layer).train()
    with pytest.raises(ValueError, match=rf"the model's {type(layer).__name__} is training; call"):
        entry(model)
    check(model.eval())


def test_a_decoder_inside_a_plain_object_is_looked_at():
    plain = Plain()
    plain.decoder = nn.Dropout()
    with pytest.raises(ValueError, match="the model's Dropout is training"):
        evaluation.hais_ll(plain, X)
    with pytest.raises(ValueError, match="the model's Dropout is training"):
        value("teacher_samples", plain)
    plain.decoder.eval()
    check(plain, X)


class Always(nn.Module):
    def forward(self, logits):
        return F.dropout(logits, 0.5, training=True)


def with_likelihood(likelihood, **more):
    model = Binary().requires_grad_(False)
    model.likelihood = likelihood
    vars(model).update(more)
    return model


def own_log_likelihood(fn):
    model = Undrawn()
    model.log_likelihood, model.latent_dim = fn, 2
    return model


LINEAR = Binary().decoder
WRONG = {
    "random in eval": (Binary(Always()), BITS, "is random, or depends on what else"),
    "logits as probabilities": (
        with_likelihood(lambda z: Independent(Bernoulli(probs=3 * LINEAR(z)), 1)),
        BITS,
        "the likelihood fails at draws of the prior: Expected parameter probs",
    ),
    "one law of each pixel": (
        with_likelihood(lambda z: Bernoulli(logits=LINEAR(z))),
        BITS,
        r"likelihood\(z\) must be a Distribution of batch shape \[3, 2\] and event shape \[3\]; "
        r"got .*Independent\(\.\.\., 1\)",
    ),
    "no law at all": (
        with_likelihood(lambda z: LINEAR(z), log_likelihood=lambda x, z: -z.square().sum(-1)),
        BITS,
        r"likelihood\(z\) must be a Distribution",
    ),
    "grey values": (Binary(), 0.5 * BITS, "the likelihood fails at draws of the prior: .*support"),
    "sum over the batch": (
        own_log_likelihood(lambda x, z: -z.square().sum()),
        X,
        r"log_likelihood\(x, z\) has shape \[\] for z \[3, 2, 2\]; sum over pixels alone",
    ),
    "mean over the batch, spread out": (
        own_log_likelihood(lambda x, z: -(z.square().sum(-1) + x.square().sum(-1).mean())),
        X,
        "depends on what else is evaluated",
    ),
    "a value for each pixel": (
        own_log_likelihood(lambda x, z: -(x - z[..., :1]).square()),
        X,
        r"has shape \[3, 2, 3\]",
    ),
    "nan": (own_log_likelihood(lambda x, z: z[..., 0].log() - 100), X, "is nan at draws"),
    "positive": (
        own_log_likelihood(lambda x, z: (x * (z[..., :1].square() + 1)).sum(-1)),
        BITS.double(),
        "of zeros and ones is .*above 0.*logsigmoid",
    ),
    "prior of each latent": (
        with_likelihood(Binary().likelihood, prior=lambda: Normal(torch.zeros(2), 1.0)),
        BITS,
        r"prior\(\) must be a Distribution of batch shape \[\] and event shape \[2\]; got Normal",
    ),
    "prior of another size": (
        with_likelihood(Binary().likelihood, latent_dim=3),
        BITS,
        r"prior\(\) must be a Distribution of batch shape \[\] and event shape \[3\]",
    ),
    "no whole number": (
        with_likelihood(Binary().likelihood, latent_dim=2.0),
        BITS,
        "latent_dim must be an integer, at least 1; got 2.0",
    ),
    "other observations": (Binary(), BITS[:, :2], r"x must be \[N, 3\], N at least 1; got \(2, 2"),
    "types that differ": (
        with_likelihood(Binary().likelihood, prior=Plain().prior),
        BITS,
        "the likelihood fails at draws of the prior",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_piece_is_refused_before_any_work(name):
    model, x, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        evaluation.hais_ll(model, x, **FEW)


def test_probabilities_in_the_place_of_logits_are_suspected():
    wide = nn.Sequential(nn.Linear(2, 50), nn.Sigmoid()).requires_grad_(False)
    x = torch.ones(2, 50)
    with pytest.warns(UserWarning, match="all logits are between 0 and 1"):
        check(models.BernoulliDecoder(wide, 2, 50), x)
    check(models.BernoulliDecoder(wide[0], 2, 50), x)  # no warning: pytest would show it
    as_probs = with_likelihood(lambda z: Independent(Bernoulli(probs=wide(z)), 1))
    as_probs.observation_dim = 50
    check(as_probs, x)


def test_a_density_above_one_is_no_fault_where_it_is_stated():
    narrow = with_likelihood(lambda z: Independent(Normal(LINEAR(z), 0.01), 1))
    check(narrow, BITS)
    narrow.likelihood = lambda z: Independent(Normal(BITS[0] + 0 * LINEAR(z), 0.01), 1)
    assert models.as_model(narrow).log_likelihood(BITS[0], torch.zeros(1, 2)) > 0
    check(narrow, BITS)


def test_checking_takes_no_random_number_and_changes_nothing():
    model = Module()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    check(model, X)
    evaluation.bdmc_ll(Plain(), 2, **FEW)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_adapted_model_learns():
    """The gradient of the bound at the exact posterior is that of the evidence."""
    own = Module()
    law = models.LinearGaussian(WEIGHT, BIAS, SCALE).posterior(X)
    objectives.elbo(own, law, X, 2000).sum().backward()
    covariance = WEIGHT @ WEIGHT.T + SCALE**2 * torch.eye(3).double()
    expected = torch.linalg.solve(covariance, (X - BIAS).T).sum(1)
    error = 4 * math.sqrt(3 / 2000) / SCALE**2
    assert (own.decoder.bias.grad - expected).abs().max() < error


def test_observations_of_bytes_are_taken():
    model, x = check(Binary(), BITS.byte())
    assert x.dtype == torch.float32 and isinstance(model, models.LatentVariableModel)
    partial(evaluation.hais_ll, model, x)(**FEW)
