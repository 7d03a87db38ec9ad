"""Importance sampling on a path, on models whose evidence is known, with chosen random numbers."""

import itertools
import math
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn
from torch.distributions import Independent, Normal

from amortised.hvae import HamiltonianFlow, hvae_path
from amortised.mcvae import (
    Bridge,
    LeapfrogMap,
    Maps,
    RealNVP,
    ScoreNetwork,
    annealed_path,
    langevin_path,
    metvae_path,
    uha_path,
)
from amortised.models import BernoulliDecoder, LinearGaussian

X = torch.tensor([[1.5]], dtype=torch.float64)
LOG_P = -0.5 * (math.log(4 * math.pi) + 1.5**2 / 2)  # x = 1.5 from N(0, 2)


def scalar_model():
    return LinearGaussian(torch.ones(1, 1).double(), torch.zeros(1).double(), 1.0)


def scored(dim, **options):
    """A path whose reverse has learned something, though nothing useful."""
    score = ScoreNetwork(dim)
    torch.nn.init.normal_(score.layers[-1].weight, std=0.2)
    return Bridge(dim, 3, step_size=0.35, score=score, **options)


METHODS = {
    "hvae": lambda d: (hvae_path, {"flow": HamiltonianFlow(d, 3, step_size=0.3, beta0=0.6)}),
    "hvae varied": lambda d: (
        hvae_path,
        {"flow": HamiltonianFlow(d, 2, "paper", beta0=0.6, varied=True)},
    ),
    "uha": lambda d: (uha_path, {"settings": Bridge(d, 4, step_size=0.3, persistence=0.6)}),
    "mcd": lambda d: (uha_path, {"settings": scored(d, persistence=0.6)}),
    "hvi": lambda d: (uha_path, {"settings": scored(d, on_target=True)}),
    "langevin": lambda d: (langevin_path, {"settings": Bridge(d, 4, step_size=0.35)}),
    "annealed": lambda d: (annealed_path, {"settings": Bridge(d, 4, step_size=0.5)}),
    "barker": lambda d: (metvae_path, {"settings": Maps([LeapfrogMap(d, 0.3), LeapfrogMap(d)])}),
    "realnvp": lambda d: (metvae_path, {"settings": Maps([spread(RealNVP(d)), LeapfrogMap(d)])}),
    "flow": lambda d: (metvae_path, {"settings": Maps([spread(RealNVP(d))], "always")}),
    "potential": lambda d: (
        metvae_path,
        {"settings": Maps([LeapfrogMap(d, 0.3, 2, Bowl())], "always")},
    ),
}


class Bowl(nn.Module):
    """A potential that has nothing to do with the target."""

    def forward(self, z):
        return -(z - 0.3).square().sum(-1)


def spread(flow):
    for network in flow.networks:
        nn.init.normal_(network[-1].weight, std=0.05)
    return flow


def method(name, dim):
    """A path function with settings in float64."""
    function, options = METHODS[name](dim)
    for settings in options.values():
        for module in settings.maps if isinstance(settings, Maps) else [settings]:
            module.double()
    return function, options


def cases():
    """Model, q, x and the exact log-evidence; no target is symmetric."""
    torch.manual_seed(5)
    yield "scalar", scalar_model(), normal([0.2], [1.1]), X, LOG_P
    weight = torch.randn(3, 5).double() * torch.tensor([1.0, 0.3, 0.8, 0.5, 0.2])
    linear = LinearGaussian(weight, torch.tensor([0.5, -1.0, 0.1]).double(), 0.9)
    x = torch.tensor([[1.0, -0.4, 0.7]]).double()
    covariance = weight @ weight.T + 0.81 * torch.eye(3).double()
    r = (x - linear.bias).detach()
    log_p = -0.5 * (r @ covariance.inverse() @ r.T + torch.logdet(2 * math.pi * covariance))
    q = normal([0.1, 0.0, -0.1, 0.2, 0.0], [0.8, 1.0, 0.9, 0.9, 1.0])
    yield "linear", linear, q, x, log_p.item()
    decoder = nn.Linear(1, 4).double()
    with torch.no_grad():
        decoder.weight[:, 0] = torch.tensor([2.0, -1.0, 0.5, 3.0])
    x = torch.tensor([[1.0, 0.0, 1.0, 1.0]]).double()
    z = torch.linspace(-9, 9, 4001).double()
    p = (
        torch.sigmoid((2 * x - 1) * decoder(z[:, None])).prod(-1)
        * Normal(0.0, 1.0).log_prob(z).exp()
    )
    model = BernoulliDecoder(decoder, 1, 4)
    yield "bernoulli", model, normal([0.4], [1.0]), x, torch.trapezoid(p, z).log().item()


def normal(mean, scale):
    mean, scale = (torch.tensor([values], dtype=torch.float64) for values in (mean, scale))
    return Independent(Normal(mean, scale), 1)


class Nodes:
    """The prior of the scalar model, drawn at chosen points."""

    batch_shape = torch.Size([1])

    def __init__(self, z):
        self.z = z.reshape(-1, 1, 1)

    def rsample(self, shape):
        return self.z

    def log_prob(self, z):
        return -0.5 * (z.square().sum(-1) + math.log(2 * math.pi))


@contextmanager
def chosen(noise, uniform=()):
    """``randn_like`` gives the columns of ``noise``, ``rand_like`` the numbers of ``uniform``."""
    columns, numbers = iter([column.reshape(-1, 1, 1) for column in noise]), iter(uniform)
    with (
        mock.patch.object(torch, "randn_like", lambda z: next(columns)),
        mock.patch.object(torch, "rand_like", lambda p: torch.full_like(p, next(numbers))),
    ):
        yield


def signs(count):
    """All strings of +-1: nodes that integrate cubic polynomials of ``count`` normals exactly."""
    return torch.cartesian_prod(*count * [torch.tensor([-1.0, 1.0]).double()]).T


def mean_over_signs(function, count, **options):
    """The exact mean log-weight of a path that is linear in its noise, on the scalar model."""
    z0, *noise = signs(count)
    with chosen(noise):
        path = function(
            options.pop("model", None) or scalar_model(), Nodes(z0), X, 2**count, **options
        )
    return path.log_weights.mean()


def by_quadrature(settings, function=metvae_path, num_decisions=1, model=None, num=401):
    """Every string of decisions with its probability, over z0 and one momentum.

    Returns the weights of the nodes and, for each string, log-weights, log-probabilities and
    where it is possible at all.
    """
    grid = torch.linspace(-7.5, 7.5, num).double()
    z0, noise = torch.cartesian_prod(grid, grid).T
    mass = torch.exp(-0.5 * (z0.square() + noise.square())) / (2 * math.pi)
    outcomes = []
    for string in itertools.product((-1.0, 2.0), repeat=num_decisions):  # accept, reject
        with chosen([noise], string):
            path = function(model or scalar_model(), Nodes(z0), X, num**2, settings=settings)
        possible = [u < 0 or (a < 1) for u, a in zip(string, path.acceptance[..., 0], strict=True)]
        possible = sum(torch.as_tensor(ok).double().expand(num**2) for ok in possible)
        mask = (possible == num_decisions).double()
        outcomes.append((path.log_weights[:, 0], path.log_decisions[:, 0], mask))
    return mass * (15 / (num - 1)) ** 2, outcomes


def bound_and_mean(mass, outcomes):
    """The bound, and the mean of the estimate in units of p(x)."""
    bound = sum((mass * ok * decision.exp() * w).sum() for w, decision, ok in outcomes)
    mean = sum((mass * ok * (decision + w - LOG_P).exp()).sum() for w, decision, ok in outcomes)
    return bound.item(), mean.item()
