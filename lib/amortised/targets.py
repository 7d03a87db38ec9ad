r"""Densities of few dimensions with a known normaliser, and the fit of a path to them.

They are latent-variable models, so that what works for a decoder works for them. A
:class:`FreeGaussian` stands in for the encoder: parameters of its own for each start.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from .hvae import Path
from .models import LatentVariableModel
from .numerics import log_mean_exp
from .objectives import score_function_surrogate
from .training import half_cosine


class Ring(LatentVariableModel):
    r"""A scalar that depends on the length of the latent alone: the posterior is a sphere.

    .. math:: z \sim \mathcal{N}(0, I_D), \qquad
        x \mid z \sim \mathcal{N}(\alpha (\|z\| + \beta), 1)

    :param latent_dim: D.
    :param alpha: :math:`\alpha > 0`, learned through its logarithm.
    :param beta: :math:`\beta > 0`, likewise.

    Source: Thin et al. (2021), section 5.1.

    >>> Ring().log_evidence(torch.tensor([[8 * math.pi]]))
    tensor([-3.1328], grad_fn=...)
    """

    def __init__(self, latent_dim: int = 2, alpha: float = 2 * math.pi, beta: float = 2.0):
        super().__init__(latent_dim, 1)
        self.log_alpha = nn.Parameter(torch.tensor(alpha).log())
        self.log_beta = nn.Parameter(torch.tensor(beta).log())

    def likelihood(self, z: Tensor) -> Independent:
        """The law of x, of batch shape ``[...]`` for latents ``[..., D]``."""
        return self._at(torch.linalg.vector_norm(z, dim=-1, keepdim=True))

    def log_evidence(self, x: Tensor, num_points: int = 4001) -> Tensor:
        """Log-evidence ``[B]`` by the trapezoidal rule over the length of z."""
        half, farthest = self.latent_dim / 2, self.latent_dim**0.5 + 9.0
        r = torch.linspace(1e-6, farthest, num_points, dtype=x.dtype)
        log_chi = (2 * half - 1) * r.log() - r.square() / 2
        log_chi = log_chi - (half - 1) * math.log(2) - math.lgamma(half)
        log_p = log_chi + self._at(r[:, None, None]).log_prob(x).T
        return torch.logsumexp(log_p, -1) + (r[1] - r[0]).log()

    def _at(self, length: Tensor) -> Independent:
        return Independent(Normal(self.log_alpha.exp() * (length + self.log_beta.exp()), 1.0), 1)


class Density(LatentVariableModel):
    """A density in the place of :math:`p(x, z)`; the observation is not looked at.

    :param logdensity_fn: maps ``[..., D]`` to ``[...]``.
    :param latent_dim: D.
    :param log_normaliser: logarithm of its integral.
    """

    def __init__(
        self, logdensity_fn: Callable[[Tensor], Tensor], latent_dim: int, log_normaliser: float
    ):
        super().__init__(latent_dim, 1)
        self.logdensity_fn, self.log_normaliser = logdensity_fn, log_normaliser

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """The log-density of z."""
        return self.logdensity_fn(z)

    def log_evidence(self, x: Tensor) -> Tensor:
        """The logarithm of its integral, ``[B]``."""
        return torch.full_like(x[..., 0], self.log_normaliser)


def mode_centres(num_modes: int = 8, radius: float = 3.0) -> Tensor:
    """Centres of modes on a circle, ``[num_modes, 2]``."""
    angle = 2 * math.pi * torch.arange(num_modes) / num_modes
    return radius * torch.stack([angle.cos(), angle.sin()], -1)


def eight_gaussians(scale: float = 0.5) -> Density:
    """Eight equal Gaussians on a circle of radius 3, of total mass 1.

    >>> eight_gaussians().log_joint(torch.zeros(1, 1), torch.tensor([[3.0, 0.0]]))
    tensor([-2.5...])
    """
    centres = mode_centres()

    def log_density(z: Tensor) -> Tensor:
        distance = (z.unsqueeze(-2) - centres.to(z)).square().sum(-1) / (2 * scale**2)
        return log_mean_exp(-distance, -1) - math.log(2 * math.pi * scale**2)

    return Density(log_density, 2, 0.0)


def funnel(scale: float = 1.5) -> Density:
    r"""A funnel: :math:`z_1 \sim \mathcal{N}(0, s^2)` and :math:`z_2 \sim \mathcal{N}(0, e^{z_1})`.

    >>> funnel().log_joint(torch.zeros(1, 1), torch.zeros(1, 2))  # -log(2 pi 1.5)
    tensor([-2.2433])
    """

    def log_density(z: Tensor) -> Tensor:
        neck, width = Normal(0.0, scale), (0.5 * z[..., 0]).exp()
        return neck.log_prob(z[..., 0]) + Normal(0.0, width).log_prob(z[..., 1])

    return Density(log_density, 2, 0.0)


#: Targets by name.
TARGETS: dict[str, Callable[[], LatentVariableModel]] = {
    "ring": Ring,
    "eight_gaussians": eight_gaussians,
    "funnel": funnel,
}


def circular_coverage(z: Tensor, num_sectors: int = 16) -> Tensor:
    """Share of the sectors around the origin that hold at least half of an equal share of points.

    The first sector is centred on the positive first axis, so that each of as many modes on a
    circle, such as :func:`mode_centres`, has a sector of its own.

    :param z: points in the plane, ``[S, B, 2]``.
    :return: ``[B]``, from 1 / num_sectors to 1.

    >>> circular_coverage(torch.tensor([[[1.0, 0.1]], [[1.0, -0.1]]]))
    tensor([0.0625])
    """
    angle = torch.atan2(z[..., 1], z[..., 0]) / (2 * math.pi) + 1.0
    sector = (angle * num_sectors + 0.5).long() % num_sectors
    share = nn.functional.one_hot(sector, num_sectors).to(z.dtype).mean(0)
    return (share >= 0.5 / num_sectors).to(z.dtype).mean(-1)


def importance_path(
    model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int, *, num_inner: int
) -> Path:
    """Several draws of q as one path: their mean weight, and one of them chosen by its weight.

    :param num_inner: draws of a path.
    :return: a :class:`amortised.hvae.Path`, whose bound is the importance-weighted one.

    >>> model, x = funnel(), torch.zeros(3, 1)
    >>> q = FreeGaussian(torch.zeros(3, 2))(x)
    >>> importance_path(model, q, x, 7, num_inner=5).z.shape
    torch.Size([7, 3, 2])
    """
    z = q.rsample((num_samples, num_inner))
    log_weights = model.log_joint(x, z) - q.log_prob(z)
    chosen = Categorical(logits=log_weights.movedim(1, -1)).sample()[:, None, :, None]
    combined = log_mean_exp(log_weights, dim=1)
    ends = z.gather(1, chosen.expand(-1, 1, -1, z.shape[-1]))[:, 0]
    return Path(combined, ends, torch.zeros_like(combined), combined.new_empty(0))


def exact_path(model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int) -> Path:
    """The evidence itself in the form of a path: what a bound without a gap would learn.

    :param model: has a ``log_evidence(x)``.
    :return: a :class:`amortised.hvae.Path` that ends where q starts; q plays no other part.

    >>> ring, x = Ring(), torch.full((3, 1), 8 * math.pi)
    >>> exact_path(ring, FreeGaussian(torch.zeros(1, 2))(x), x, 7).log_weights[0]
    tensor([-3.1328, -3.1328, -3.1328], grad_fn=...)
    """
    log_weights = model.log_evidence(x).expand(num_samples, -1)
    ends = q.sample((num_samples,))
    return Path(log_weights, ends, torch.zeros_like(log_weights), log_weights.new_empty(0))


class FreeGaussian(nn.Module):
    """A diagonal Gaussian with parameters of its own for each of B starts, or one for all.

    :param mean: means at the start, ``[B, D]`` or ``[1, D]``; standard deviations start at
        ``scale``.
    :param scale: a number.
    """

    def __init__(self, mean: Tensor, scale: float = 1.0):
        super().__init__()
        self.mean = nn.Parameter(mean.clone())
        self.log_scale = nn.Parameter(torch.full_like(mean, math.log(scale)))

    def forward(self, x: Tensor) -> Independent:
        """The distribution for observations ``[B, P]``, whatever they are."""
        q = Independent(Normal(self.mean, self.log_scale.exp()), 1)
        return q.expand(x.shape[:-1])


def fit_path(
    path_fn: Callable[..., Path],
    model: LatentVariableModel,
    encoder: nn.Module,
    x: Tensor | Callable[[], Tensor],
    *,
    learned: nn.Module | None = None,
    num_updates: int = 300,
    num_samples: int = 32,
    learning_rate: float = 0.02,
) -> None:
    """Train an encoder, and what else a path has, by the bound on fixed observations.

    Adam whose rate falls along half a cosine; a path with decisions gets their term of the gradient
    with its leave-one-out baseline.

    :param path_fn: ``path_fn(model, q, x, num_samples)`` returns a :class:`amortised.hvae.Path`.
    :param encoder: maps x to q.
    :param x: observations ``[B, P]``, all of them in each update, or a function that draws a batch.
    :param learned: whatever else has parameters to learn, perhaps the model.
    :param num_samples: paths for each observation and update, at least 2.
    """
    parameters = [*encoder.parameters(), *([] if learned is None else learned.parameters())]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for update in range(num_updates):
        batch = x() if callable(x) else x
        path = path_fn(model, encoder(batch), batch, num_samples)
        bound = score_function_surrogate(path.log_weights, path.log_decisions)
        optimizer.param_groups[0]["lr"] = learning_rate * half_cosine(update / num_updates)
        optimizer.zero_grad(set_to_none=True)
        (-bound.sum()).backward()
        nn.utils.clip_grad_norm_(parameters, 50.0)
        optimizer.step()
