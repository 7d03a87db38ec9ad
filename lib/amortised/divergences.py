r"""f-divergences between densities that are known on a grid, and what a family makes of them.

Log-densities come as tensors whose first dimension runs over a regular grid of z; the others are a
batch. An integral is the sum over the grid times its spacing, which is accurate far below the
tolerances of this book for smooth densities that have died out at the ends of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Normal


def kl(log_p: Tensor, log_q: Tensor, spacing: float) -> Tensor:
    r"""The Kullback–Leibler divergence :math:`\mathrm{KL}(p \,\|\, q) = \int p \log (p / q)`.

    :param log_p: :math:`\log p` on the grid, ``[G, ...]``, in nats.
    :param log_q: :math:`\log q`, of a shape that broadcasts with it.
    :param spacing: distance of neighbouring grid points.
    :return: ``[...]``, in nats.
    :raises ValueError: when the spacing is not positive or the grids differ in length.

    >>> z = torch.linspace(-12, 12, 481)
    >>> normal = torch.distributions.Normal
    >>> kl(normal(1.0, 1.0).log_prob(z), normal(0.0, 1.0).log_prob(z), 0.05)
    tensor(0.5000)
    """
    if not spacing > 0 or log_p.shape[:1] != log_q.shape[:1]:
        raise ValueError(
            "kl needs two log-densities on one grid and a positive spacing; got shapes "
            f"{tuple(log_p.shape)} and {tuple(log_q.shape)}, spacing {spacing}"
        )
    return spacing * (log_p.exp() * (log_p - log_q)).sum(0)


def alpha_divergence(log_p: Tensor, log_q: Tensor, alpha: float, spacing: float) -> Tensor:
    r"""The alpha divergence, which joins the two directions of the KL divergence.

    .. math:: D_\alpha(p \,\|\, q) = \frac{1}{\alpha (\alpha - 1)}
        \Big( \int p^\alpha q^{1 - \alpha} - 1 \Big), \qquad
        D_0 = \mathrm{KL}(q \,\|\, p), \quad D_1 = \mathrm{KL}(p \,\|\, q)

    :math:`D_2` is half of :math:`\chi^2(p \,\|\, q) = \int p^2 / q - 1`. The Rényi divergence
    :math:`\frac{1}{\alpha - 1} \log \int p^\alpha q^{1 - \alpha}` is an increasing function of it.

    :param alpha: the order; 0 and 1 are taken as limits.
    :return: ``[...]``, in nats; other arguments and errors as in :func:`kl`.

    Source: Minka (2005), equation 4, in the same parametrisation.

    >>> z = torch.linspace(-12, 12, 481)
    >>> p, q = (torch.distributions.Normal(m, 1.0).log_prob(z) for m in (1.0, 0.0))
    >>> alpha_divergence(p, q, 2.0, 0.05)  # (e - 1) / 2
    tensor(0.8591)
    """
    if alpha == 0:
        return kl(log_q, log_p, spacing)
    if alpha == 1:
        return kl(log_p, log_q, spacing)
    mixed = torch.exp(alpha * log_p + (1 - alpha) * log_q)
    # The constant 1 is the integral of alpha p + (1 - alpha) q, which cancels rounding where p = q.
    linear = alpha * log_p.exp() + (1 - alpha) * log_q.exp()
    return spacing * (mixed - linear).sum(0) / (alpha * (alpha - 1))


def jensen_shannon(log_p: Tensor, log_q: Tensor, spacing: float) -> Tensor:
    r"""The Jensen–Shannon divergence, symmetric and at most :math:`\log 2`.

    .. math:: \mathrm{JS}(p, q)
        = \tfrac12 \mathrm{KL}(p \,\|\, m) + \tfrac12 \mathrm{KL}(q \,\|\, m), \quad
        m = \tfrac12 (p + q)

    The least log-loss of a classifier that tells equal numbers of draws of p and q apart is
    :math:`2 \log 2 - 2\, \mathrm{JS}` (summed over the two kinds).

    :return: ``[...]``, in nats; arguments and errors as in :func:`kl`.

    Source: Goodfellow et al. (2014), equation 6.

    >>> z = torch.linspace(-30, 30, 601)
    >>> p, q = (torch.distributions.Normal(m, 1.0).log_prob(z) for m in (-10.0, 10.0))
    >>> jensen_shannon(p, q, 0.1)  # nothing in common: log 2
    tensor(0.6931)
    """
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (kl(log_p, log_m, spacing) + kl(log_q, log_m, spacing)) / 2


def gaussian_elbo(log_joint_fn: Callable[[Tensor], Tensor], phi: Tensor) -> Tensor:
    r"""The evidence lower bound of Gaussians on a scalar z, by quadrature.

    .. math:: \mathbb{E}_{\mathcal{N}(m, s^2)}[\log p(x, z)] + \log s + \tfrac12 \log 2 \pi e

    The expectation is a sum over 193 points from :math:`m - 6s` to :math:`m + 6s`.

    :param log_joint_fn: maps points ``[..., 193]`` to :math:`\log p(x, z)` of the same shape.
    :param phi: means and log-scales, ``[..., 2]``.
    :return: ``[...]``, in nats, with its graph.

    >>> def log_joint(z):  # z from N(0, 1), x = 1 from N(z, 1)
    ...     return Normal(0.0, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(torch.tensor(1.0))
    >>> gaussian_elbo(log_joint, torch.tensor([0.5, -0.5 * math.log(2)]))  # log N(1; 0, 2)
    tensor(-1.5155)
    """
    nodes = torch.linspace(-6, 6, 193, dtype=phi.dtype)
    weights = Normal(0.0, 1.0).log_prob(nodes).softmax(0)
    z = phi[..., :1] + phi[..., 1:].exp() * nodes
    entropy = phi[..., 1] + 0.5 * math.log(2 * math.pi * math.e)
    return (weights * log_joint_fn(z)).sum(-1) + entropy


def minimise(
    loss_fn: Callable[..., Tensor], *start: Tensor, num_steps: int = 600, step_size: float = 0.05
) -> tuple[Tensor, ...]:
    r"""Descend a deterministic loss with Adam, whose step falls to zero along a cosine.

    Entries of the loss that depend on different entries of the parameters descend independently,
    which finds one local optimum from each of several starts in a single call.

    :param loss_fn: maps the parameters, in the order of ``start``, to a loss of any shape, which is
        summed.
    :param start: initial parameters; they are not changed.
    :return: for each parameter its whole path, ``[num_steps + 1, ...]``, the start included.

    >>> (path,) = minimise(lambda m: (m - 3.0) ** 2, torch.tensor([0.0, 8.0]), step_size=0.2)
    >>> path.shape, path[-1].round(decimals=2)
    (torch.Size([601, 2]), tensor([3., 3.]))
    """
    parameters = [value.detach().clone().requires_grad_() for value in start]
    optimiser = torch.optim.Adam(parameters, lr=step_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_steps)
    paths = [[value.detach().clone()] for value in parameters]
    for _ in range(num_steps):
        optimiser.zero_grad()
        loss_fn(*parameters).sum().backward()
        optimiser.step()
        schedule.step()
        for path, value in zip(paths, parameters, strict=True):
            path.append(value.detach().clone())
    return tuple(torch.stack(path) for path in paths)
