r"""Programs whose number of latent variables is random, and how to check their posteriors.

A run of a program, its *trace*, is a row of numbers. Whatever has ``log_prob(trace)`` can be
trained by :func:`~amortised.objectives.pq_loss`, which never asks what a trace contains.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Geometric, MixtureSameFamily, Normal
from torch.nn.functional import logsigmoid

from .numerics import check_counts


class Branches(MixtureSameFamily):
    r"""A mixture that is asked for the density of (branch, z), and not of z alone.

    .. math:: \log q(c, z) = \log q(c) + \log q(z \mid c)

    Arguments are those of :class:`torch.distributions.MixtureSameFamily`; a trace is
    ``[..., 1 + D]``, the number of the branch and z.

    >>> from torch.distributions import Categorical, Independent
    >>> values = Independent(Normal(torch.tensor([[-5.0], [5.0]]), 1.0), 1)
    >>> q = Branches(Categorical(torch.ones(2)), values)
    >>> q.log_prob(torch.tensor([1.0, 5.0])), q.marginal().log_prob(torch.tensor([5.0]))
    (tensor(-1.6121), tensor(-1.6121))
    """

    def log_prob(self, trace: Tensor) -> Tensor:
        """Log-density of traces ``[..., 1 + D]``, in nats."""
        branch, z = trace[..., 0].long(), trace[..., 1:]
        log_z = self.component_distribution.log_prob(z.unsqueeze(-2))
        log_z = log_z.gather(-1, branch.unsqueeze(-1)).squeeze(-1)
        return self.mixture_distribution.log_prob(branch) + log_z

    def marginal(self) -> MixtureSameFamily:
        """The same mixture, asked for the density of z."""
        return MixtureSameFamily(self.mixture_distribution, self.component_distribution)


class Parcels:
    r"""An unknown number of parcels on a scale: a program without a bound, and its exact posterior.

    .. math::

        n \sim \mathrm{Geometric}(\tfrac12) \text{ on } 1, 2, \dots, \qquad
        z_i \sim \mathcal{N}(2, 1), \; i \le n, \qquad
        x \mid z \sim \mathcal{N}\Big(\sum_i z_i, \tfrac14\Big)

    Given n all is Gaussian, so that :math:`P(n \mid x) \propto 2^{-n}\, \mathcal{N}(x; 2n, n +
    \tfrac14)`. A trace is a row n, z_1, ..., z_n, filled up with zeros to the longest of its batch.

    :param largest: where sums over n stop; the prior leaves out :math:`2^{-\text{largest}}`.

    >>> Parcels().log_counts(torch.tensor([4.0])).softmax(-1)[:3]
    tensor([0.3014, 0.5564, 0.1251])
    """

    mean, scale, noise_scale, stop = 2.0, 1.0, 0.5, 0.5

    def __init__(self, largest: int = 60):
        check_counts(largest=largest)
        self.largest = largest

    def sample(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Observations ``[*shape, 1]`` and traces ``[*shape, 1 + longest]``."""
        n = Geometric(self.stop).sample((*shape, 1)) + 1
        steps = torch.arange(1, int(n.max()) + 1)
        z = torch.normal(self.mean, self.scale, (*shape, len(steps))) * (steps <= n)
        return torch.normal(z.sum(-1, keepdim=True), self.noise_scale), torch.cat([n, z], -1)

    def log_counts(self, x: Tensor) -> Tensor:
        """log p(n, x) for n = 1, ..., ``largest``: ``[..., 1] -> [..., largest]``, in nats."""
        n = torch.arange(1.0, self.largest + 1)
        scale = (n * self.scale**2 + self.noise_scale**2).sqrt()
        return Normal(self.mean * n, scale).log_prob(x) - n * math.log(2)

    def log_posterior(self, x: Tensor, trace: Tensor) -> Tensor:
        """log p(trace | x) for ``[..., 1]`` and ``[..., 1 + longest]``, in nats."""
        n, z = trace[..., 0], trace[..., 1:]
        used = torch.arange(1, z.shape[-1] + 1) <= n.unsqueeze(-1)
        log_z = (Normal(self.mean, self.scale).log_prob(z) * used).sum(-1)
        log_x = Normal(z.sum(-1), self.noise_scale).log_prob(x[..., 0])
        return log_z + log_x - n * math.log(2) - self.log_counts(x).logsumexp(-1)

    def total_correlation(self) -> float:
        r"""What the posterior loses, on average over n, if its parcels are made independent.

        .. math:: \sum_n 2^{-n}\, \tfrac12 \Big( n \log v_n - \log \tfrac{1/4}{n + 1/4} \Big),
            \qquad v_n = 1 - \tfrac{1}{n + 1/4}

        >>> round(Parcels().total_correlation(), 4)
        0.3412
        """
        n = torch.arange(1.0, self.largest + 1, dtype=torch.float64)
        total = n + self.noise_scale**2
        correlation = n * (1 - 1 / total).log() - (self.noise_scale**2 / total).log()
        return float((0.5**n * correlation / 2).sum())


class TraceDistribution:
    r"""A distribution over traces n, z_1, ..., z_n of any length, made step by step.

    .. math:: q(n, z \mid x) = h_n \prod_{i < n} (1 - h_i)
        \prod_{i=1}^{n} q\Big(z_i \,\Big|\, x, \sum_{j < i} z_j, i, n\Big), \qquad
        h_i = \mathrm{sigmoid}\, \ell(x, i)

    Traces of one batch are filled up with zeros to the longest of them.

    :param steps: a module with ``stop_logit(x, i)``, the logits :math:`\ell`, and
        ``value(x, placed, i, n)``, a distribution of :math:`z_i`; arguments broadcast to
        ``[..., N]``, with ``placed`` the running total.
    :param x: observations, ``[..., 1]``.

    >>> class Steps(nn.Module):
    ...     def stop_logit(self, x, i):
    ...         return torch.zeros_like(x + i)
    ...
    ...     def value(self, x, placed, i, n):
    ...         return Normal(2.0 + 0.0 * placed, 1.0)
    >>> q = TraceDistribution(Steps(), torch.tensor([4.0]))  # the prior of Parcels
    >>> q.log_prob(torch.tensor([2.0, 1.5, 2.0, 0.0]))  # 2 log(1/2) - log(2 pi) - 1/8
    tensor(-3.3492)
    """

    def __init__(self, steps: nn.Module, x: Tensor):
        self.steps, self.x = steps, x

    def log_prob(self, trace: Tensor) -> Tensor:
        """Log-density of traces ``[..., 1 + N]``, in nats; what follows step n is ignored."""
        n, z = trace[..., :1], trace[..., 1:]
        i = torch.arange(1.0, z.shape[-1] + 1).expand_as(z)
        stop = self.steps.stop_logit(self.x, i)
        decision = torch.where(i == n, logsigmoid(stop), logsigmoid(-stop))
        value = self.steps.value(self.x, z.cumsum(-1) - z, i, n)
        return ((decision + value.log_prob(z)) * (i <= n)).sum(-1)

    def log_counts(self, largest: int) -> Tensor:
        """log q(n | x) for n = 1, ..., ``largest``: ``[..., largest]``, in nats."""
        i = torch.arange(1.0, largest + 1).expand(*self.x.shape[:-1], largest)
        stop = self.steps.stop_logit(self.x, i)
        return logsigmoid(stop) + logsigmoid(-stop).cumsum(-1) - logsigmoid(-stop)

    @torch.no_grad()
    def sample(self) -> Tensor:
        """One trace for each observation, ``[..., 1 + longest]``, from the global stream."""
        n, running = torch.zeros_like(self.x), torch.ones_like(self.x)
        while running.any():
            n = n + running
            stop = self.steps.stop_logit(self.x, n).sigmoid()
            running = running * (torch.rand_like(self.x) > stop)
        placed, z = torch.zeros_like(self.x), []
        for i in range(1, int(n.max()) + 1):
            step = torch.full_like(self.x, i)
            z.append(self.steps.value(self.x, placed, step, n).sample() * (step <= n))
            placed = placed + z[-1]
        return torch.cat([n, *z], -1)


def posterior_ranks(truth: Tensor, draws: Tensor) -> Tensor:
    r"""Simulation-based calibration: the rank of the true value among posterior draws.

    .. math:: r = \frac{\#\{l : t_l < t\} + U}{L + 1}, \qquad
        U \text{ uniform on } [0, 1 + \#\{l : t_l = t\})

    If truth and observation come from the model and the draws from the exact posterior, r is
    uniform on (0, 1), for any statistic t of z and x. Ties are broken at random, from the
    global stream.

    :param truth: the statistic of the true latents, ``[...]``.
    :param draws: the same of L draws, ``[..., L]``.
    :return: ``[...]``.
    :raises ValueError: when the shapes do not fit.

    Source: Talts et al. (2018), theorem 1.

    >>> _ = torch.manual_seed(0)
    >>> posterior_ranks(torch.tensor([0.0]), torch.tensor([[-2.0, -1.0, 1.0]])).mul(4).floor()
    tensor([2.])
    """
    if draws.shape[:-1] != truth.shape:
        raise ValueError(
            f"draws must be [..., L] for a truth [...]; got {tuple(draws.shape)} and "
            f"{tuple(truth.shape)}"
        )
    below = (draws < truth.unsqueeze(-1)).sum(-1)
    equal = (draws == truth.unsqueeze(-1)).sum(-1)
    place = below + torch.rand(truth.shape, device=truth.device) * (equal + 1)
    return place / (draws.shape[-1] + 1)


def uniformity(ranks: Tensor) -> Tensor:
    r"""Kolmogorov's statistic of N values against the uniform distribution.

    .. math:: \sqrt{N}\, \sup_r \big| F_N(r) - r \big|

    For large N it exceeds 1.36 with probability 0.05 and 1.95 with probability 0.001 if the values
    are independent and uniform.

    :param ranks: values in (0, 1), ``[N, ...]``.
    :return: ``[...]``.

    >>> uniformity(torch.full((100,), 0.5))  # half of the range above, half below: 10 * 0.5
    tensor(5.)
    """
    num = ranks.shape[0]
    ordered = ranks.sort(0).values
    steps = torch.arange(num, device=ranks.device).view(-1, *[1] * (ranks.ndim - 1))
    above, below = ordered - steps / num, (steps + 1) / num - ordered
    return num**0.5 * torch.maximum(above, below).amax(0)
