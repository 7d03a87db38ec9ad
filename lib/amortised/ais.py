r"""Annealed importance sampling: evidence estimates whose expectation is exact at any cost.

A path of unnormalised densities joins a start that can be sampled to the target,

.. math::

    \log f_b(z) = \log p(z) + b \log p(x \mid z), \qquad
    0 = b_0 < b_1 < \dots < b_T = 1,

and each chain is weighted by how much the density under it rises from one to the next. One routine
serves two methods that the literature often gives one name. With ``persistence=0`` and L leapfrog
steps each temperature starts from fresh momentum: *AIS with HMC transitions*. With
``persistence > 0`` and one leapfrog step the momentum is carried across temperatures: *Hamiltonian
annealed importance sampling*, HAIS.

Chains come first and images second: positions are ``[K, B, D]``, log-weights ``[K, B]``, and all
K x B chains move in one batch. Weights are accumulated in float64 and are never dropped, clamped or
repaired: a weight of ``-inf`` counts as zero in the mean, a ``nan`` is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from .mcmc import (
    LeapfrogState,
    LogDensity,
    ValueAndGrad,
    leapfrog_step,
    metropolis_test,
    negative_energy,
)
from .numerics import effective_sample_size, log_mean_exp, value_and_grad

__all__ = [
    "AISResult",
    "AnnealedPath",
    "BDMCResult",
    "ais",
    "bdmc",
    "linear_schedule",
    "log_prob_and_grad",
    "path_from",
    "reverse_ais",
    "sigmoid_schedule",
    "tune_step_size",
]

_RUNGS_BETWEEN_CHECKS = 50  # looking for a nan makes an accelerator wait for its results


class AISResult(NamedTuple):
    r"""Weighted chains, and what a diagnosis of them needs.

    The estimate of :math:`\log p(x)` is ``log_mean_exp(log_weights, dim=0)``. Rows of the three
    records are in the order in which the run visited the temperatures.

    :ivar log_weights: ``[K, B]``, float64, in nats.
    :ivar z: the chains at the end, ``[K, B, D]``: with the weights, samples of the target.
    :ivar acceptance_rate: mean acceptance probability over the chains at each transition,
        ``[number of transitions, B]``.
    :ivar ess: effective sample size of the weights so far, after each of the T increments,
        ``[T, B]``: where it falls steeply, the schedule is too fast.
    :ivar mean_log_likelihood: mean over the chains of :math:`\log p(x \mid z)` before each
        increment, ``[T, B]``: the integrand of thermodynamic integration.
    :ivar num_gradients: likelihood gradients per chain, one for the start and L per transition.
    """

    log_weights: Tensor
    z: Tensor
    acceptance_rate: Tensor
    ess: Tensor
    mean_log_likelihood: Tensor
    num_gradients: int


class BDMCResult(NamedTuple):
    r"""A stochastic lower and upper bound on each :math:`\log p(x)`.

    :ivar lower: forward estimate, ``[B]``, in nats.
    :ivar upper: reverse estimate, ``[B]``, in nats.
    :ivar forward: the forward run.
    :ivar reverse: the reverse run.
    """

    lower: Tensor
    upper: Tensor
    forward: AISResult
    reverse: AISResult

    @property
    def gap(self) -> Tensor:
        """``upper - lower``, ``[B]``, in nats; noise can make single values negative."""
        return self.upper - self.lower

    @property
    def expected_gap(self) -> tuple[float, float]:
        r"""Mean over images of the gap and its standard error (``nan`` for one image), in nats.

        In expectation the gap bounds both errors, that of the lower and that of the upper bound.
        """
        gap = self.gap
        return gap.mean().item(), (gap.std() / math.sqrt(len(gap))).item()


class AnnealedPath(NamedTuple):
    """The two terms of a path and their gradients, named as the arguments of :func:`ais`.

    ``ais(**path._asdict(), z0=z0, schedule=schedule, ...)`` anneals along it.
    """

    log_prior_fn: LogDensity
    log_likelihood_fn: LogDensity
    prior_value_and_grad: ValueAndGrad
    likelihood_value_and_grad: ValueAndGrad


# --- schedules -----------------------------------------------------------------------------------


def sigmoid_schedule(num_temperatures: int) -> Tensor:
    r"""Inverse temperatures that move slowly near the prior and near the posterior.

    .. math:: b_t = \frac{s_t - s_0}{s_T - s_0}, \qquad
        s_t = \mathrm{sigmoid}\{4 (2 t / T - 1)\}, \qquad t = 0, \dots, T

    :param num_temperatures: T, at least 1.
    :return: T + 1 increasing values from 0 to 1, float64.

    Source: Wu, Burda, Salakhutdinov and Grosse (2017), whose code uses this form.

    >>> sigmoid_schedule(4)
    tensor([0.0000, 0.1050, 0.5000, 0.8950, 1.0000], dtype=torch.float64)
    """
    s = torch.sigmoid(4.0 * (2.0 * linear_schedule(num_temperatures) - 1.0))
    schedule = (s - s[0]) / (s[-1] - s[0])
    return schedule


def linear_schedule(num_temperatures: int) -> Tensor:
    r"""Evenly spaced inverse temperatures, :math:`b_t = t / T`.

    :param num_temperatures: T, at least 1.
    :return: T + 1 increasing values from 0 to 1, float64.

    >>> linear_schedule(4)
    tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    _check_count("num_temperatures", num_temperatures)
    return torch.arange(num_temperatures + 1, dtype=torch.float64) / num_temperatures


# --- paths ---------------------------------------------------------------------------------------


def log_prob_and_grad(distribution: Distribution) -> ValueAndGrad:
    r"""The log-density of a distribution with its gradient in z, in closed form where it is normal.

    :param distribution: event shape ``[D]``; batch shape ``[]`` or ``[B]``. Its parameters are
        taken as constants.
    :return: callable ``[K, B, D] -> ([K, B], [K, B, D])``.

    >>> standard = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    >>> log_prob_and_grad(standard)(torch.tensor([[[3.0, 4.0]]]))
    (tensor([[-14.3379]]), tensor([[[-3., -4.]]]))
    """
    if not (
        isinstance(distribution, Independent)
        and isinstance(distribution.base_dist, Normal)
        and distribution.reinterpreted_batch_ndims == 1
    ):
        return partial(value_and_grad, distribution.log_prob)
    mean = distribution.base_dist.loc.detach()
    scale = distribution.base_dist.scale.detach()
    precision = scale.square().reciprocal()
    log_normaliser = scale.log().sum(-1) + 0.5 * scale.shape[-1] * math.log(2.0 * math.pi)

    def normal_value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
        deviation = z - mean
        grad = -precision * deviation
        return 0.5 * (deviation * grad).sum(-1) - log_normaliser, grad

    return normal_value_and_grad


def path_from(
    start: Distribution,
    log_prior_fn: LogDensity,
    log_likelihood_fn: LogDensity,
    *,
    prior_value_and_grad: ValueAndGrad | None = None,
    likelihood_value_and_grad: ValueAndGrad | None = None,
) -> AnnealedPath:
    r"""A path that starts at any distribution r(z) that can be sampled, such as an encoder's.

    .. math:: \log f_b(z) = \log r(z) + b\, \{\log p(z) + \log p(x \mid z) - \log r(z)\}

    :func:`ais` needs nothing new for it: r takes the place of the prior, and the term in braces
    that of the likelihood. The closer r is to the posterior, the shorter the path; where r misses
    a part of the posterior, more temperatures are needed than from the prior.

    :param start: r, of batch shape ``[B]`` (or ``[]``) and event shape ``[D]``; draw ``z0`` from
        it. Its parameters are taken as constants.
    :param log_prior_fn: :math:`\log p(z)`, ``[K, B, D] -> [K, B]``.
    :param log_likelihood_fn: :math:`\log p(x \mid z)`, ``[K, B, D] -> [K, B]``.
    :param prior_value_and_grad: the prior with its gradient; by default from autograd.
    :param likelihood_value_and_grad: the likelihood with its gradient; by default from autograd.
    :return: arguments for :func:`ais`, :func:`reverse_ais`, :func:`tune_step_size`, :func:`bdmc`.

    Source: with an encoder, the AIS+encoder of Wu, Burda, Salakhutdinov and Grosse (2017).

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> x, generator = torch.tensor([[1.5]]), torch.Generator().manual_seed(0)
    >>> path = path_from(
    ...     model.posterior(x), model.prior().log_prob, lambda z: model.log_likelihood(x, z)
    ... )
    >>> z0 = torch.randn(5, 1, 1, generator=generator)
    >>> path.log_likelihood_fn(z0).isclose(model.log_evidence(x)).all()
    tensor(True)
    """
    start_value_and_grad = log_prob_and_grad(start)
    prior_value_and_grad = prior_value_and_grad or partial(value_and_grad, log_prior_fn)
    likelihood_value_and_grad = likelihood_value_and_grad or partial(
        value_and_grad, log_likelihood_fn
    )

    def log_ratio_fn(z: Tensor) -> Tensor:
        return log_prior_fn(z) + log_likelihood_fn(z) - start.log_prob(z)

    def ratio_value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
        (r, r_grad), (p, p_grad) = start_value_and_grad(z), prior_value_and_grad(z)
        likelihood, likelihood_grad = likelihood_value_and_grad(z)
        return likelihood + p - r, likelihood_grad + p_grad - r_grad

    return AnnealedPath(start.log_prob, log_ratio_fn, start_value_and_grad, ratio_value_and_grad)


# --- annealing -----------------------------------------------------------------------------------


def ais(
    log_prior_fn: LogDensity,
    log_likelihood_fn: LogDensity,
    z0: Tensor,
    schedule: Tensor,
    *,
    step_size: float | Tensor,
    num_leapfrog: int,
    persistence: float = 0.0,
    generator: torch.Generator | None = None,
    likelihood_value_and_grad: ValueAndGrad | None = None,
    prior_value_and_grad: ValueAndGrad | None = None,
    exact_energies: bool = False,
    final_transition: bool = True,
    on_temperature: Callable[[int], None] | None = None,
) -> AISResult:
    r"""Annealed importance sampling with Hamiltonian transitions, for all images and chains.

    For :math:`t = 1, \dots, T`: the log-weight grows by
    :math:`(b_t - b_{t-1}) \log p(x \mid z)`, then z makes a transition that leaves
    :math:`f_{b_t}` invariant. Each weight :math:`w_k` is an unbiased estimate of :math:`p(x)`
    whatever T, the step sizes and the mixing, so that

    .. math:: \mathbb{E} \log \frac1K \sum_k w_k \le \log p(x), \qquad
        \Pr\Big(\log \frac1K \sum_k w_k \ge \log p(x) + c\Big) \le e^{-c}:

    a stochastic lower bound. Its gap falls as 1/T once the transitions keep up.

    A transition refreshes the momentum, :math:`\rho \leftarrow a \rho + \sqrt{1 - a^2}\, n` with
    :math:`n \sim \mathcal{N}(0, I)`, makes L leapfrog steps, and accepts by the Metropolis rule; on
    rejection z stays and the momentum is negated. The log-likelihood and its gradient are carried
    from one temperature to the next, so each transition costs exactly L new gradients.

    To start from a distribution other than the prior, see :func:`path_from`.

    :param log_prior_fn: :math:`\log p(z)` of the distribution that ``z0`` was drawn from, with its
        normalising constant, ``[K, B, D] -> [K, B]``.
    :param log_likelihood_fn: :math:`\log p(x \mid z)`, ``[K, B, D] -> [K, B]``.
    :param z0: draws from the prior, ``[K, B, D]``.
    :param schedule: :math:`b_0, \dots, b_T`, increasing from 0 to 1.
    :param step_size: leapfrog step :math:`\epsilon`: a number, or a tensor that broadcasts to
        ``[T, 1, B, 1]``, entry t - 1 for the transition at :math:`b_t`. It must not depend on this
        run's chains (see :func:`tune_step_size`).
    :param num_leapfrog: L, at least 1.
    :param persistence: a, in [0, 1). 0 is AIS+HMC; close to 1 with L = 1 is HAIS, whose authors
        use :math:`a = 2^{-\epsilon / 2}`.
    :param generator: source of all randomness; the global stream when None.
    :param likelihood_value_and_grad: a faster route to :math:`\log p(x \mid z)` and its gradient,
        ``[K, B, D] -> ([K, B], [K, B, D])``; by default ``log_likelihood_fn`` and autograd.
    :param prior_value_and_grad: the same for the prior.
    :param exact_energies: when the faster route is of low precision: use it for the dynamics only,
        and take the log-likelihood at the end of each trajectory, which decides the acceptance and
        the weight, from ``log_likelihood_fn``. Leapfrog is reversible and preserves volume
        whatever the force, so the estimate stays unbiased. Costs one forward pass per temperature.
    :param final_transition: whether to make the transition at :math:`b_T = 1`. It does not change
        the weights; it only refreshes ``z``.
    :param on_temperature: called with t after each temperature, for a progress bar.
    :return: an :class:`AISResult`.
    :raises ValueError: when a shape, the schedule or a setting is not as described.
    :raises FloatingPointError: when a log-density is ``nan`` or ``+inf`` at a finite z, naming
        the temperature and the image. A trajectory that diverges to infinity is rejected instead.

    Source: Neal (2001); Sohl-Dickstein and Culpepper (2012) for the carried momentum.

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> x, generator = torch.tensor([[1.5]]), torch.Generator().manual_seed(0)
    >>> result = ais(
    ...     model.prior().log_prob, lambda z: model.log_likelihood(x, z),
    ...     torch.randn(200, 1, 1, generator=generator), sigmoid_schedule(50),
    ...     step_size=0.5, num_leapfrog=3, generator=generator,
    ... )
    >>> estimate = log_mean_exp(result.log_weights, dim=0)
    >>> bool((estimate - model.log_evidence(x)).abs() < 0.1), result.num_gradients
    (True, 151)
    """
    return _anneal(
        _density(log_prior_fn, log_likelihood_fn, prior_value_and_grad, likelihood_value_and_grad),
        z0,
        _settings(z0, schedule, step_size, num_leapfrog, persistence),
        generator=generator,
        exact_log_likelihood_fn=log_likelihood_fn if exact_energies else None,
        final_transition=final_transition,
        on_temperature=on_temperature,
    )


def reverse_ais(
    log_prior_fn: LogDensity,
    log_likelihood_fn: LogDensity,
    z_posterior: Tensor,
    schedule: Tensor,
    *,
    step_size: float | Tensor,
    num_leapfrog: int,
    persistence: float = 0.0,
    generator: torch.Generator | None = None,
    likelihood_value_and_grad: ValueAndGrad | None = None,
    prior_value_and_grad: ValueAndGrad | None = None,
    exact_energies: bool = False,
    on_temperature: Callable[[int], None] | None = None,
) -> AISResult:
    r"""The same chains run backwards, from exact posterior samples to the prior.

    For :math:`t = T, \dots, 1`: the log-weight grows by
    :math:`(b_t - b_{t-1}) \log p(x \mid z)`, then, if :math:`t > 1`, z makes a transition that
    leaves :math:`f_{b_{t-1}}` invariant. If the chains start from the posterior,
    :math:`\mathbb{E}[1 / w_k] = 1 / p(x)`, so that

    .. math:: \mathbb{E} \Big[ -\log \frac1K \sum_k \frac{1}{w_k} \Big] \ge \log p(x):

    a stochastic upper bound, ``-log_mean_exp(-log_weights, dim=0)``.

    The reversal of "refresh the momentum, then move" is "move with the momentum negated, then
    refresh". Both the refreshment and the law of the momentum are symmetric, so in terms of the
    negated momentum the reversed chain makes the same moves as :func:`ais`, at the temperatures in
    the opposite order, also when the momentum is carried.

    :param z_posterior: samples of :math:`p(z \mid x)`, ``[K, B, D]``. The K chains of an image may
        share one start: each is then still marginally exact. Where x was simulated from the model,
        the z that generated it is such a sample.
    :param step_size: as in :func:`ais`; entry t - 1 again belongs to :math:`b_t`.
    :return: an :class:`AISResult`, with ``ess`` that of the reciprocal weights.

    Other arguments and errors are those of :func:`ais`.

    Source: Grosse, Ghahramani and Adams (2015).

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> x, generator = torch.tensor([[1.5]]), torch.Generator().manual_seed(0)
    >>> posterior = 0.75 + 0.5**0.5 * torch.randn(200, 1, 1, generator=generator)
    >>> result = reverse_ais(
    ...     model.prior().log_prob, lambda z: model.log_likelihood(x, z), posterior,
    ...     sigmoid_schedule(50), step_size=0.5, num_leapfrog=3, generator=generator,
    ... )
    >>> bool((-log_mean_exp(-result.log_weights, dim=0) - model.log_evidence(x)).abs() < 0.1)
    True
    """
    return _anneal(
        _density(log_prior_fn, log_likelihood_fn, prior_value_and_grad, likelihood_value_and_grad),
        z_posterior,
        _settings(z_posterior, schedule, step_size, num_leapfrog, persistence),
        generator=generator,
        exact_log_likelihood_fn=log_likelihood_fn if exact_energies else None,
        final_transition=False,
        on_temperature=on_temperature,
        reverse=True,
    )


def bdmc(
    log_prior_fn: LogDensity,
    log_likelihood_fn: LogDensity,
    z0: Tensor,
    z_posterior: Tensor,
    schedule: Tensor,
    *,
    step_size: float | Tensor,
    num_leapfrog: int,
    persistence: float = 0.0,
    generator: torch.Generator | None = None,
    likelihood_value_and_grad: ValueAndGrad | None = None,
    prior_value_and_grad: ValueAndGrad | None = None,
    exact_energies: bool = False,
    on_temperature: Callable[[int], None] | None = None,
) -> BDMCResult:
    r"""Bidirectional Monte Carlo: a stochastic sandwich around each :math:`\log p(x)`.

    .. math:: \mathbb{E}\,\texttt{lower} \le \log p(x) \le \mathbb{E}\,\texttt{upper}

    The expected gap bounds the error of either side. It certifies an estimator where exact
    posterior samples are known, which is on data simulated from the model; for real data it
    is evidence only as far as they resemble the simulated ones.

    :param z0: draws from the prior, ``[K, B, D]``.
    :param z_posterior: one exact posterior sample per image, ``[B, D]``, from which all K chains
        start, or ``[K, B, D]``.
    :return: a :class:`BDMCResult`.

    Other arguments and errors are those of :func:`ais`. ``on_temperature`` is called 2T times.

    Source: Grosse, Ghahramani and Adams (2015).

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> generator = torch.Generator().manual_seed(0)
    >>> z = torch.randn(50, 1, generator=generator)
    >>> x = z + torch.randn(50, 1, generator=generator)
    >>> bounds = bdmc(
    ...     model.prior().log_prob, lambda z: model.log_likelihood(x, z),
    ...     torch.randn(20, 50, 1, generator=generator), z, sigmoid_schedule(20),
    ...     step_size=0.5, num_leapfrog=3, generator=generator,
    ... )
    >>> gap, standard_error = bounds.expected_gap
    >>> bounds.lower.shape, 0 < gap < 0.2
    (torch.Size([50]), True)
    """
    if z_posterior.ndim == 2:
        z_posterior = z_posterior.expand(len(z0), *z_posterior.shape)
    if z_posterior.shape[1:] != z0.shape[1:]:
        raise ValueError(
            "z_posterior must be [B, D] or [K, B, D] with the B and D of z0; got shapes "
            f"{tuple(z_posterior.shape)} and {tuple(z0.shape)}"
        )
    settings = {
        "step_size": step_size,
        "num_leapfrog": num_leapfrog,
        "persistence": persistence,
        "generator": generator,
        "likelihood_value_and_grad": likelihood_value_and_grad,
        "prior_value_and_grad": prior_value_and_grad,
        "exact_energies": exact_energies,
        "on_temperature": on_temperature,
    }
    forward = ais(log_prior_fn, log_likelihood_fn, z0, schedule, final_transition=False, **settings)
    reverse = reverse_ais(log_prior_fn, log_likelihood_fn, z_posterior, schedule, **settings)
    lower = log_mean_exp(forward.log_weights, dim=0)
    return BDMCResult(lower, -log_mean_exp(-reverse.log_weights, dim=0), forward, reverse)


def tune_step_size(
    log_prior_fn: LogDensity,
    log_likelihood_fn: LogDensity,
    z0: Tensor,
    schedule: Tensor,
    *,
    num_leapfrog: int,
    persistence: float = 0.0,
    target_acceptance: float | None = None,
    initial_step_size: float = 0.1,
    factors: tuple[float, float] | None = None,
    bounds: tuple[float, float] = (1e-3, 1.0),
    generator: torch.Generator | None = None,
    likelihood_value_and_grad: ValueAndGrad | None = None,
    prior_value_and_grad: ValueAndGrad | None = None,
    on_temperature: Callable[[int], None] | None = None,
) -> Tensor:
    r"""Step sizes for each temperature and image, from a pilot run.

    The pilot anneals like :func:`ais`. After each temperature it multiplies the step of an image
    by the first of ``factors`` if the mean acceptance over its chains exceeded the target, else by
    the second. Hand the result to a *new* run with *new* random numbers. A run that adapts its own
    steps lets the present position choose the kernel, which then no longer leaves its
    target invariant; its weights are biased, and its "bound" is none.

    :param z0: draws from the prior, ``[K, B, D]``; K may be smaller than in the final run.
    :param persistence: the number that the final run will use.
    :param target_acceptance: by default 0.65 for fresh momentum and 0.9 for carried momentum,
        where a rejection turns the chain round and undoes what the persistence bought.
    :param initial_step_size: step at the first temperature.
    :param factors: growth and decay of the step, above and below 1. By default (1.02, 0.98) for
        1000 temperatures and more, and :math:`1 \pm 20 / T` for fewer, at most :math:`1 \pm 0.1`,
        so that a short pilot can travel as far.
    :param bounds: smallest and largest step.
    :return: ``[T, 1, B, 1]``, of the type of ``z0``: the step used at each temperature.

    Other arguments and errors are those of :func:`ais`.

    Source: the rule of Wu, Burda, Salakhutdinov and Grosse (2017), moved to a pilot run.

    >>> generator = torch.Generator().manual_seed(0)
    >>> normal = lambda z: -0.5 * z.square().sum(-1)
    >>> steps = tune_step_size(
    ...     normal, normal, torch.randn(20, 3, 2, generator=generator), linear_schedule(100),
    ...     num_leapfrog=5, generator=generator,
    ... )
    >>> steps.shape, bool(steps[-1].min() > steps[0].max())
    (torch.Size([100, 1, 3, 1]), True)
    """
    if target_acceptance is None:
        target_acceptance = 0.9 if persistence > 0 else 0.65
    if not 0 < target_acceptance < 1:
        raise ValueError(f"target_acceptance must lie in (0, 1); got {target_acceptance}")
    settings = _settings(z0, schedule, initial_step_size, num_leapfrog, persistence)
    num_temperatures = len(settings.betas) - 1
    if factors is None:
        rate = min(max(20 / num_temperatures, 0.02), 0.1)
        factors = (1.0 + rate, 1.0 - rate)
    if not factors[1] < 1 < factors[0] or not factors[1] > 0:
        raise ValueError(f"factors must be (above 1, between 0 and 1); got {factors}")
    if not 0 < bounds[0] <= initial_step_size <= bounds[1]:
        raise ValueError(
            "bounds must be positive and hold initial_step_size; "
            f"got {bounds} and {initial_step_size}"
        )
    density = _density(
        log_prior_fn, log_likelihood_fn, prior_value_and_grad, likelihood_value_and_grad
    )
    steps = z0.new_empty(num_temperatures, 1, z0.shape[1], 1)
    step_size = z0.new_full((1, z0.shape[1], 1), initial_step_size)

    with torch.no_grad():
        chains = _start(density, z0)
        watch = _NanWatch(chains.point)
        for t, beta in enumerate(settings.betas[1:], start=1):
            steps[t - 1] = step_size
            rung = _Rung(t, 0.0, beta, step_size)
            chains, proposal, acceptance = _transition(density, chains, rung, settings, generator)
            watch.look(f"temperature {t} (b = {beta:.4g})", proposal)
            factor = torch.where(acceptance > target_acceptance, factors[0], factors[1])
            step_size = (step_size * factor[None, :, None]).clamp(*bounds)
            if on_temperature is not None:
                on_temperature(t)
        watch.report()
    return steps


# --- the machinery -------------------------------------------------------------------------------


class _Point(NamedTuple):
    """Positions, with both terms of the path there and their gradients."""

    z: Tensor
    log_prior: Tensor
    prior_grad: Tensor
    log_likelihood: Tensor
    likelihood_grad: Tensor

    def logdensity_and_grad(self, beta: float) -> tuple[Tensor, Tensor]:
        return (
            torch.add(self.log_prior, self.log_likelihood, alpha=beta),
            torch.add(self.prior_grad, self.likelihood_grad, alpha=beta),
        )


class _Chains(NamedTuple):
    """Where the chains are, and the momentum that they carry (None before the first refresh)."""

    point: _Point
    momentum: Tensor | None


class _Rung(NamedTuple):
    """One temperature: the weight's increment, then a transition (none where ``beta`` is None)."""

    temperature: int
    increment: float
    beta: float | None
    step_size: Tensor | None


class _Settings(NamedTuple):
    """Checked settings, with T + 1 inverse temperatures and T step sizes."""

    betas: list[float]
    step_sizes: Tensor
    num_leapfrog: int
    persistence: float


class _AnnealedDensity:
    """The path as :func:`leapfrog_step` wants it, which keeps the terms at the last point."""

    def __init__(self, prior_value_and_grad: ValueAndGrad, likelihood_value_and_grad: ValueAndGrad):
        self.prior_value_and_grad = prior_value_and_grad
        self.likelihood_value_and_grad = likelihood_value_and_grad
        self.beta = 0.0
        self.last: _Point | None = None

    def point(self, z: Tensor) -> _Point:
        return _Point(z, *self.prior_value_and_grad(z), *self.likelihood_value_and_grad(z))

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self.last = self.point(z)
        return self.last.logdensity_and_grad(self.beta)


def _density(
    log_prior_fn: LogDensity,
    log_likelihood_fn: LogDensity,
    prior_value_and_grad: ValueAndGrad | None,
    likelihood_value_and_grad: ValueAndGrad | None,
) -> _AnnealedDensity:
    return _AnnealedDensity(
        prior_value_and_grad or partial(value_and_grad, log_prior_fn),
        likelihood_value_and_grad or partial(value_and_grad, log_likelihood_fn),
    )


def _start(density: _AnnealedDensity, z0: Tensor) -> _Chains:
    """Evaluate both terms at the start, and check what the callables return."""
    point = density.point(z0.detach())
    for name in ("log_prior", "log_likelihood"):
        value, grad = getattr(point, name), getattr(point, name.replace("log_", "") + "_grad")
        if value.shape != z0.shape[:-1] or grad.shape != z0.shape:
            raise ValueError(
                f"{name} and its gradient must be [K, B] and [K, B, D] = {tuple(z0.shape)}; "
                f"got shapes {tuple(value.shape)} and {tuple(grad.shape)}"
            )
    return _Chains(point, None)


def _transition(
    density: _AnnealedDensity,
    chains: _Chains,
    rung: _Rung,
    settings: _Settings,
    generator: torch.Generator | None,
    exact_log_likelihood_fn: LogDensity | None = None,
) -> tuple[_Chains, _Point, Tensor]:
    """One transition that leaves the density at ``rung.beta`` invariant.

    Returns the chains, the proposals, and the mean acceptance probability of each image, ``[B]``.
    """
    point, momentum = chains
    noise = torch.randn(
        point.z.shape, generator=generator, dtype=point.z.dtype, device=point.z.device
    )
    a = settings.persistence
    momentum = noise if momentum is None else a * momentum + math.sqrt(1.0 - a * a) * noise

    density.beta = rung.beta
    start = end = LeapfrogState(point.z, momentum, *point.logdensity_and_grad(rung.beta))
    for _ in range(settings.num_leapfrog):
        end = leapfrog_step(end, density, rung.step_size)
    proposal = density.last
    if exact_log_likelihood_fn is not None:
        proposal = proposal._replace(log_likelihood=exact_log_likelihood_fn(proposal.z))
        end = end._replace(logdensity=proposal.logdensity_and_grad(rung.beta)[0])

    info = metropolis_test(negative_energy(end) - negative_energy(start), generator)
    per_point = info.is_accepted.unsqueeze(-1)
    chosen = _Point(
        *(
            torch.where(info.is_accepted if new.ndim == 2 else per_point, new, old)
            for new, old in zip(proposal, point, strict=True)
        )
    )
    momentum = torch.where(per_point, end.momentum, -momentum) if a > 0 else None
    return _Chains(chosen, momentum), proposal, info.acceptance_probability.mean(0)


@torch.no_grad()
def _anneal(
    density: _AnnealedDensity,
    z0: Tensor,
    settings: _Settings,
    *,
    generator: torch.Generator | None,
    exact_log_likelihood_fn: LogDensity | None,
    final_transition: bool,
    on_temperature: Callable[[int], None] | None,
    reverse: bool = False,
) -> AISResult:
    """Weight and move along the rungs of the path, forwards or in reverse."""
    rungs = _rungs(settings, final_transition, reverse)
    chains = _start(density, z0)
    if exact_log_likelihood_fn is not None:
        exact = exact_log_likelihood_fn(chains.point.z)
        chains = chains._replace(point=chains.point._replace(log_likelihood=exact))
    watch = _NanWatch(chains.point)

    num_images = z0.shape[1]
    num_transitions = sum(rung.beta is not None for rung in rungs)
    log_weights = torch.zeros(z0.shape[:2], dtype=torch.float64, device=z0.device)
    acceptance_rate = z0.new_empty(num_transitions, num_images)
    ess = log_weights.new_empty(len(rungs), num_images)
    mean_log_likelihood = torch.empty_like(ess)

    for row, rung in enumerate(rungs):
        log_likelihood = chains.point.log_likelihood.double()
        log_weights.add_(log_likelihood, alpha=rung.increment)
        mean_log_likelihood[row] = log_likelihood.mean(0)
        ess[row] = effective_sample_size(-log_weights if reverse else log_weights)
        if rung.beta is not None:
            chains, proposal, acceptance_rate[row] = _transition(
                density, chains, rung, settings, generator, exact_log_likelihood_fn
            )
            watch.look(f"temperature {rung.temperature} (b = {rung.beta:.4g})", proposal)
        if on_temperature is not None:
            on_temperature(rung.temperature)
    watch.report()
    return AISResult(
        log_weights,
        chains.point.z,
        acceptance_rate,
        ess,
        mean_log_likelihood,
        num_gradients=1 + num_transitions * settings.num_leapfrog,
    )


def _rungs(settings: _Settings, final_transition: bool, reverse: bool) -> list[_Rung]:
    """Forwards, increment t is followed by a transition at b_t; in reverse, by one at b_{t-1}."""
    betas = settings.betas
    last = len(betas) - 1
    rungs = []
    for t in range(last, 0, -1) if reverse else range(1, last + 1):
        at = t - 1 if reverse else t
        increment = betas[t] - betas[t - 1]
        if at == 0 or (at == last and not final_transition):
            rungs.append(_Rung(at, increment, None, None))
        else:
            rungs.append(_Rung(at, increment, betas[at], settings.step_sizes[at - 1]))
    return rungs


class _NanWatch:
    """Remember where a log-density was nan or +inf, and raise without making the device wait."""

    def __init__(self, start: _Point):
        self.seen: list[tuple[str, Tensor]] = []
        self.look("the start", start)
        self.report()

    def look(self, where: str, point: _Point) -> None:
        total = point.log_prior + point.log_likelihood
        invalid = ~(total < torch.inf) & torch.isfinite(point.z).all(-1)
        self.seen.append((where, invalid.any(0)))
        if len(self.seen) >= _RUNGS_BETWEEN_CHECKS:
            self.report()

    def report(self) -> None:
        if self.seen and torch.stack([invalid for _, invalid in self.seen]).any():
            where, invalid = next((w, invalid) for w, invalid in self.seen if invalid.any())
            images = invalid.nonzero().flatten().tolist()
            others = f" and {len(images) - 1} more" if len(images) > 1 else ""
            raise FloatingPointError(
                f"the log-density is nan or +inf at a finite z, at {where}, image {images[0]}"
                f"{others}; mend the model or its weights: no weight is dropped or repaired"
            )
        self.seen = []


def _settings(
    z0: Tensor,
    schedule: Tensor,
    step_size: float | Tensor,
    num_leapfrog: int,
    persistence: float,
) -> _Settings:
    if z0.ndim != 3 or 0 in z0.shape or not z0.is_floating_point():
        raise ValueError(
            "positions must be chains x images x latents, [K, B, D], of a floating-point type; "
            f"got shape {tuple(z0.shape)} and type {z0.dtype}"
        )
    betas = torch.as_tensor(schedule, dtype=torch.float64)
    if betas.ndim != 1 or len(betas) < 2:
        raise ValueError(f"schedule must be T + 1 >= 2 values; got shape {tuple(betas.shape)}")
    if betas[0] != 0 or betas[-1] != 1 or not (betas[1:] > betas[:-1]).all():
        raise ValueError(
            "schedule must increase strictly from 0 to 1; got "
            f"{betas[0].item():.6g} ... {betas[-1].item():.6g}, smallest increment "
            f"{(betas[1:] - betas[:-1]).min().item():.3g}"
        )
    _check_count("num_leapfrog", num_leapfrog)
    if not 0 <= persistence < 1:
        raise ValueError(f"persistence must lie in [0, 1); got {persistence}")
    shape = (len(betas) - 1, 1, z0.shape[1], 1)
    step_sizes = torch.as_tensor(step_size, dtype=z0.dtype, device=z0.device)
    try:
        if step_sizes.ndim not in (0, 4):
            raise RuntimeError
        step_sizes = step_sizes.broadcast_to(shape)
    except RuntimeError:
        raise ValueError(
            f"step_size must be a number or broadcast to [T, 1, B, 1] = {shape}; "
            f"got shape {tuple(step_sizes.shape)}"
        ) from None
    if not (torch.isfinite(step_sizes) & (step_sizes > 0)).all():
        raise ValueError(f"step_size must be positive and finite; got {step_size}")
    return _Settings(betas.tolist(), step_sizes, num_leapfrog, persistence)


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer, at least 1; got {value!r}")
