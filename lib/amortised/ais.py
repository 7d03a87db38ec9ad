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

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from . import mcmc
from .mcmc import LogDensity, ValueAndGrad
from .numerics import (
    argument_validation,
    check_counts,
    effective_sample_size,
    log_mean_exp,
    value_and_grad,
)

_TEMPERATURES_BETWEEN_CHECKS = 50  # looking for a nan makes an accelerator wait for its results


class AnnealedPath(NamedTuple):
    r"""The two densities that a path joins, for all images and chains.

    A plain tuple of these in their order, such as ``(log_prior_fn, log_likelihood_fn)``, does in
    its place.

    :ivar log_prior_fn: :math:`\log p(z)` of the distribution that the chains start from, with its
        normalising constant, ``[K, B, D] -> [K, B]``.
    :ivar log_likelihood_fn: :math:`\log p(x \mid z)`, ``[K, B, D] -> [K, B]``.
    :ivar prior_value_and_grad: a faster route to the prior and its gradient in z,
        ``[K, B, D] -> ([K, B], [K, B, D])``; by default ``log_prior_fn`` and autograd.
    :ivar likelihood_value_and_grad: the same for the likelihood.
    :ivar exact_energies: when the faster route is of low precision: use it for the dynamics only,
        and take the log-likelihood at the end of each trajectory, which decides the acceptance and
        the weight, from ``log_likelihood_fn``. Leapfrog is reversible and preserves volume
        whatever the force, so the estimate stays unbiased. Costs one forward pass per temperature.
    """

    log_prior_fn: LogDensity
    log_likelihood_fn: LogDensity
    prior_value_and_grad: ValueAndGrad | None = None
    likelihood_value_and_grad: ValueAndGrad | None = None
    exact_energies: bool = False


class AISSettings(NamedTuple):
    r"""How the chains move; a plain tuple of these in their order does in its place.

    :ivar schedule: inverse temperatures :math:`b_0, \dots, b_T`, increasing from 0 to 1.
    :ivar step_size: leapfrog step :math:`\epsilon`: a number, or a tensor that broadcasts to
        ``[T, 1, B, 1]``, entry t - 1 for the transition at :math:`b_t`. It must not depend on the
        chains of the run that uses it (see :func:`tune_step_size`).
    :ivar num_leapfrog: L, at least 1.
    :ivar persistence: a, in [0, 1). 0 is AIS+HMC; close to 1 with L = 1 is HAIS, whose authors
        use :math:`a = 2^{-\epsilon / 2}`.
    """

    schedule: Tensor
    step_size: float | Tensor
    num_leapfrog: int
    persistence: float = 0.0


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
    return (s - s[0]) / (s[-1] - s[0])


def linear_schedule(num_temperatures: int) -> Tensor:
    r"""Evenly spaced inverse temperatures, :math:`b_t = t / T`.

    :param num_temperatures: T, at least 1.
    :return: T + 1 increasing values from 0 to 1, float64.

    >>> linear_schedule(4)
    tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    check_counts(num_temperatures=num_temperatures)
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


def path_from(start: Distribution, path: AnnealedPath) -> AnnealedPath:
    r"""A path that starts at any distribution r(z) that can be sampled, such as an encoder's.

    .. math:: \log f_b(z) = \log r(z) + b\, \{\log p(z) + \log p(x \mid z) - \log r(z)\}

    :func:`ais` needs nothing new for it: r takes the place of the prior, and the term in braces
    that of the likelihood. The closer r is to the posterior, the shorter the path; where r misses
    a part of the posterior, more temperatures are needed than from the prior.

    :param start: r, of batch shape ``[B]`` (or ``[]``) and event shape ``[D]``; draw ``z0`` from
        it. Its parameters are taken as constants.
    :param path: the path from the prior.
    :return: the path from r to the same target.

    Source: with an encoder, the AIS+encoder of Wu, Burda, Salakhutdinov and Grosse (2017).

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> x, generator = torch.tensor([[1.5]]), torch.Generator().manual_seed(0)
    >>> from_prior = AnnealedPath(model.prior().log_prob, partial(model.log_likelihood, x))
    >>> path = path_from(model.posterior(x), from_prior)
    >>> z0 = torch.randn(5, 1, 1, generator=generator)
    >>> path.log_likelihood_fn(z0).isclose(model.log_evidence(x)).all()
    tensor(True)
    """
    path = AnnealedPath(*path)
    start_and_grad = log_prob_and_grad(start)

    def log_ratio_fn(z: Tensor) -> Tensor:
        return path.log_prior_fn(z) + path.log_likelihood_fn(z) - start.log_prob(z)

    def ratio_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
        (r, r_grad), point = start_and_grad(z), _evaluate(path, z)
        value = point.log_likelihood + point.log_prior - r
        return value, point.likelihood_grad + point.prior_grad - r_grad

    terms = start.log_prob, log_ratio_fn, start_and_grad, ratio_and_grad
    return AnnealedPath(*terms, path.exact_energies)


# --- annealing -----------------------------------------------------------------------------------


def ais(
    path: AnnealedPath,
    z0: Tensor,
    settings: AISSettings,
    *,
    generator: torch.Generator | None = None,
    final_transition: bool = True,
    on_temperature: Callable[[int], object] | None = None,
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

    :param path: the two densities.
    :param z0: draws from the prior, ``[K, B, D]``.
    :param settings: schedule, step sizes, L and a.
    :param generator: source of all randomness; the global stream when None.
    :param final_transition: whether to make the transition at :math:`b_T = 1`. It does not change
        the weights; it only refreshes ``z``.
    :param on_temperature: called with t after each temperature.
    :return: an :class:`AISResult`.
    :raises ValueError: when a shape, the schedule or a setting is not as described.
    :raises FloatingPointError: when a log-density is ``nan`` or ``+inf`` at a finite z, naming
        the temperature and the image. A trajectory that diverges to infinity is rejected instead.

    Source: Neal (2001); Sohl-Dickstein and Culpepper (2012) for the carried momentum.

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> x, generator = torch.tensor([[1.5]]), torch.Generator().manual_seed(0)
    >>> path = AnnealedPath(model.prior().log_prob, partial(model.log_likelihood, x))
    >>> settings = AISSettings(sigmoid_schedule(50), step_size=0.5, num_leapfrog=3)
    >>> z0 = torch.randn(200, 1, 1, generator=generator)
    >>> result = ais(path, z0, settings, generator=generator)
    >>> estimate = log_mean_exp(result.log_weights, dim=0)
    >>> bool((estimate - model.log_evidence(x)).abs() < 0.1), result.num_gradients
    (True, 151)
    """
    return _anneal(path, z0, settings, generator, final_transition, on_temperature)


def reverse_ais(
    path: AnnealedPath,
    z_posterior: Tensor,
    settings: AISSettings,
    *,
    generator: torch.Generator | None = None,
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
    :param settings: as in :func:`ais`; the step size of entry t - 1 again belongs to :math:`b_t`.
    :return: an :class:`AISResult`, with ``ess`` that of the reciprocal weights.

    Other arguments and errors are those of :func:`ais`.

    Source: Grosse, Ghahramani and Adams (2015).

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> x, generator = torch.tensor([[1.5]]), torch.Generator().manual_seed(0)
    >>> path = AnnealedPath(model.prior().log_prob, partial(model.log_likelihood, x))
    >>> settings = AISSettings(sigmoid_schedule(50), step_size=0.5, num_leapfrog=3)
    >>> posterior = 0.75 + 0.5**0.5 * torch.randn(200, 1, 1, generator=generator)
    >>> result = reverse_ais(path, posterior, settings, generator=generator)
    >>> bool((-log_mean_exp(-result.log_weights, dim=0) - model.log_evidence(x)).abs() < 0.1)
    True
    """
    return _anneal(path, z_posterior, settings, generator, reverse=True)


def bdmc(
    path: AnnealedPath,
    z0: Tensor,
    z_posterior: Tensor,
    settings: AISSettings,
    *,
    generator: torch.Generator | None = None,
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

    Other arguments and errors are those of :func:`ais`.

    Source: Grosse, Ghahramani and Adams (2015).

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> generator = torch.Generator().manual_seed(0)
    >>> z = torch.randn(50, 1, generator=generator)
    >>> x = z + torch.randn(50, 1, generator=generator)
    >>> path = AnnealedPath(model.prior().log_prob, partial(model.log_likelihood, x))
    >>> settings = AISSettings(sigmoid_schedule(20), step_size=0.5, num_leapfrog=3)
    >>> z0 = torch.randn(20, 50, 1, generator=generator)
    >>> bounds = bdmc(path, z0, z, settings, generator=generator)
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
    forward = ais(path, z0, settings, generator=generator, final_transition=False)
    reverse = reverse_ais(path, z_posterior, settings, generator=generator)
    lower = log_mean_exp(forward.log_weights, dim=0)
    return BDMCResult(lower, -log_mean_exp(-reverse.log_weights, dim=0), forward, reverse)


@torch.no_grad()
def tune_step_size(
    path: AnnealedPath,
    z0: Tensor,
    settings: AISSettings,
    *,
    target_acceptance: float | None = None,
    bounds: tuple[float, float] = (1e-3, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Step sizes for each temperature and image, from a pilot run.

    The pilot anneals like :func:`ais`. After each temperature it multiplies the step of an image
    by :math:`1 + r` if the mean acceptance over its chains exceeded the target, else by
    :math:`1 - r`, with r = 0.02 for 1000 temperatures and more, and :math:`20 / T` for fewer, at
    most 0.1, so that a short pilot can travel as far. Hand the result to a *new* run with *new*
    random numbers. A run that adapts its own steps lets the present position choose the kernel,
    which then no longer leaves its target invariant; its weights are biased, and its "bound" is
    none.

    :param path: as in :func:`ais`, except that ``exact_energies`` is not looked at: the pilot
        gives no weights.
    :param z0: draws from the prior, ``[K, B, D]``; K may be smaller than in the final run.
    :param settings: those of the final run; of the step sizes only the first is used, as the step
        at the first temperature.
    :param target_acceptance: by default 0.65 for fresh momentum and 0.9 for carried momentum,
        where a rejection turns the chain round and undoes what the persistence bought.
    :param bounds: smallest and largest step.
    :return: ``[T, 1, B, 1]``, of the type of ``z0``: the step used at each temperature.

    Other arguments and errors are those of :func:`ais`.

    Source: the rule of Wu, Burda, Salakhutdinov and Grosse (2017), moved to a pilot run.

    >>> generator = torch.Generator().manual_seed(0)
    >>> normal = lambda z: -0.5 * z.square().sum(-1)
    >>> settings = AISSettings(linear_schedule(100), step_size=0.1, num_leapfrog=5)
    >>> z0 = torch.randn(20, 3, 2, generator=generator)
    >>> steps = tune_step_size((normal, normal), z0, settings, generator=generator)
    >>> steps.shape, bool(steps[-1].min() > steps[0].max())
    (torch.Size([100, 1, 3, 1]), True)
    >>> settings = settings._replace(step_size=steps)  # for the run that is reported
    """
    path = AnnealedPath(*path)._replace(exact_energies=False)
    settings = _checked(settings, z0)
    betas, step_size = settings.schedule.tolist(), settings.step_size[0]
    if target_acceptance is None:
        target_acceptance = 0.9 if settings.persistence > 0 else 0.65
    if not 0 < target_acceptance < 1:
        raise ValueError(f"target_acceptance must lie in (0, 1); got {target_acceptance}")
    if not (0 < bounds[0] and ((bounds[0] <= step_size) & (step_size <= bounds[1])).all()):
        raise ValueError(
            "bounds must be positive and hold the first step size; "
            f"got {bounds} and steps from {step_size.min():.4g} to {step_size.max():.4g}"
        )
    rate = min(max(20 / (len(betas) - 1), 0.02), 0.1)
    steps = z0.new_empty(settings.step_size.shape)
    chains = _Chains(_start(path, z0), None)
    invalid = {0: _invalid(chains.point)}
    _raise_where(invalid, betas)
    for t in range(1, len(betas)):
        steps[t - 1] = step_size
        chains, proposal, acceptance = _transition(
            path, chains, betas[t], step_size, settings, generator
        )
        invalid[t] = _invalid(proposal)
        if t % _TEMPERATURES_BETWEEN_CHECKS == 0:
            _raise_where(invalid, betas)
        grown, shrunk = (torch.full_like(acceptance, 1.0 + r) for r in (rate, -rate))
        factor = torch.where(acceptance > target_acceptance, grown, shrunk)
        step_size = (step_size * factor[None, :, None]).clamp(*bounds)
    _raise_where(invalid, betas)
    return steps


# --- the machinery -------------------------------------------------------------------------------


class _Point(NamedTuple):
    """Positions, with both terms of the path there and their gradients."""

    z: Tensor
    log_prior: Tensor
    prior_grad: Tensor
    log_likelihood: Tensor
    likelihood_grad: Tensor

    def logdensity(self, beta: float) -> Tensor:
        return torch.add(self.log_prior, self.log_likelihood, alpha=beta)

    def force(self, beta: float) -> Tensor:
        return torch.add(self.prior_grad, self.likelihood_grad, alpha=beta)


class _Chains(NamedTuple):
    """Where the chains are, and the momentum that they carry (None before the first refresh)."""

    point: _Point
    momentum: Tensor | None


def _evaluate(path: AnnealedPath, z: Tensor) -> _Point:
    """Both terms at z with their gradients: what counts as one gradient."""
    prior = path.prior_value_and_grad or partial(value_and_grad, path.log_prior_fn)
    likelihood = path.likelihood_value_and_grad or partial(value_and_grad, path.log_likelihood_fn)
    return _Point(z, *prior(z), *likelihood(z))


def _with_exact_energy(path: AnnealedPath, point: _Point) -> _Point:
    if not path.exact_energies:
        return point
    return point._replace(log_likelihood=path.log_likelihood_fn(point.z))


def _start(path: AnnealedPath, z0: Tensor) -> _Point:
    """Evaluate both terms at the start, and check what the callables return."""
    point = _evaluate(path, z0.detach())
    for name, value, grad in (
        ("log_prior", point.log_prior, point.prior_grad),
        ("log_likelihood", point.log_likelihood, point.likelihood_grad),
    ):
        if value.shape != z0.shape[:-1] or grad.shape != z0.shape:
            raise ValueError(
                f"{name} and its gradient must be [K, B] and [K, B, D] = {tuple(z0.shape)}; "
                f"got shapes {tuple(value.shape)} and {tuple(grad.shape)}"
            )
    return _with_exact_energy(path, point)


@argument_validation(False)
def _transition(
    path: AnnealedPath,
    chains: _Chains,
    beta: float,
    step_size: Tensor,
    settings: AISSettings,
    generator: torch.Generator | None,
) -> tuple[_Chains, _Point, Tensor]:
    """One transition that leaves the density at ``beta`` invariant.

    Returns the chains, the proposals, and the mean acceptance probability of each image, ``[B]``.
    """
    point, momentum = chains
    a, noise = settings.persistence, mcmc.normal_like(point.z, generator)
    momentum = noise if momentum is None else a * momentum + math.sqrt(1.0 - a * a) * noise

    def point_and_force(z: Tensor) -> tuple[_Point, Tensor]:
        point = _evaluate(path, z)
        return point, point.force(beta)

    # The integrator carries the whole point where others have it carry the log-density.
    end = mcmc.LeapfrogState(point.z, momentum, point, point.force(beta))
    for _ in range(settings.num_leapfrog):
        end = mcmc.leapfrog_step(end, point_and_force, step_size)
    proposal = _with_exact_energy(path, end.logdensity)

    before = mcmc.negative_energy(point.logdensity(beta), momentum)
    after = mcmc.negative_energy(proposal.logdensity(beta), end.momentum)
    info = mcmc.metropolis_test(after - before, generator)
    accepted = info.is_accepted
    momentum = mcmc.select(accepted, end.momentum, -momentum) if a > 0 else None
    point = _Point(*map(partial(mcmc.select, accepted), proposal, point))
    return _Chains(point, momentum), proposal, info.acceptance_probability.mean(0)


@torch.no_grad()
def _anneal(
    path: AnnealedPath,
    z0: Tensor,
    settings: AISSettings,
    generator: torch.Generator | None,
    final_transition: bool = False,
    on_temperature: Callable[[int], object] | None = None,
    reverse: bool = False,
) -> AISResult:
    """Weight and move, forwards at b_1 ... b_T or in reverse at b_{T-1} ... b_1."""
    path, settings = AnnealedPath(*path), _checked(settings, z0)
    betas, num_images = settings.schedule.tolist(), z0.shape[1]
    last = len(betas) - 1
    temperatures = range(last - 1, 0, -1) if reverse else range(1, last + final_transition)
    chains = _Chains(_start(path, z0), None)
    invalid = {0: _invalid(chains.point)}
    _raise_where(invalid, betas)

    log_weights = torch.zeros(z0.shape[:2], dtype=torch.float64, device=z0.device)
    acceptance_rate = z0.new_empty(len(temperatures), num_images)
    ess = log_weights.new_empty(last, num_images)
    mean_log_likelihood = torch.empty_like(ess)

    for row, t in enumerate(range(last, 0, -1) if reverse else range(1, last + 1)):
        log_likelihood = chains.point.log_likelihood.double()
        log_weights.add_(log_likelihood, alpha=betas[t] - betas[t - 1])
        mean_log_likelihood[row] = log_likelihood.mean(0)
        ess[row] = effective_sample_size(-log_weights if reverse else log_weights)
        if row < len(temperatures):
            at = temperatures[row]
            chains, proposal, acceptance_rate[row] = _transition(
                path, chains, betas[at], settings.step_size[at - 1], settings, generator
            )
            invalid[at] = _invalid(proposal)
            if at % _TEMPERATURES_BETWEEN_CHECKS == 0:
                _raise_where(invalid, betas)
        if on_temperature is not None:
            on_temperature(t)
    _raise_where(invalid, betas)
    records = acceptance_rate, ess, mean_log_likelihood
    num_gradients = 1 + len(temperatures) * settings.num_leapfrog
    return AISResult(log_weights, chains.point.z, *records, num_gradients)


def _invalid(point: _Point) -> Tensor:
    """Images with a log-density of nan or +inf at a z that has not diverged, ``[B]``."""
    total = point.log_prior + point.log_likelihood
    return (~(total < torch.inf) & torch.isfinite(point.z.square().sum(-1))).any(0)


def _raise_where(invalid: dict[int, Tensor], betas: list[float]) -> None:
    """Name the first temperature (0 for the start) at which images were invalid, and the images."""
    if not torch.stack(list(invalid.values())).any():
        return
    t, found = next((t, found) for t, found in invalid.items() if found.any())
    where = f"temperature {t} (b = {betas[t]:.4g})" if t else "the start"
    images = found.nonzero().flatten().tolist()
    others = f" and {len(images) - 1} more" if len(images) > 1 else ""
    raise FloatingPointError(
        f"the log-density is nan or +inf at a finite z, at {where}, image {images[0]}"
        f"{others}; mend the model or its weights: no weight is dropped or repaired"
    )


def _checked(settings: AISSettings, z0: Tensor) -> AISSettings:
    """The settings with a schedule in float64 and a step size for each temperature and image."""
    schedule, step_size, num_leapfrog, persistence = AISSettings(*settings)
    if z0.ndim != 3 or 0 in z0.shape or not z0.is_floating_point():
        raise ValueError(
            f"positions must be [K, B, D], floating-point; got {tuple(z0.shape)} of {z0.dtype}"
        )
    betas = torch.as_tensor(schedule, dtype=torch.float64)
    if betas.ndim != 1 or len(betas) < 2:
        raise ValueError(f"schedule must be T + 1 >= 2 values; got shape {tuple(betas.shape)}")
    increments = betas.diff()
    if betas[0] != 0 or betas[-1] != 1 or not (increments > 0).all():
        raise ValueError(
            f"schedule must increase strictly from 0 to 1; got {betas[0]:.6g} ... {betas[-1]:.6g}, "
            f"smallest increment {increments.min():.3g}"
        )
    check_counts(num_leapfrog=num_leapfrog)
    if not 0 <= persistence < 1:
        raise ValueError(f"persistence must lie in [0, 1); got {persistence}")
    shape = (len(increments), 1, z0.shape[1], 1)
    steps = torch.as_tensor(step_size, dtype=z0.dtype, device=z0.device)
    fits = steps.ndim in (0, 4) and all(
        size in (1, full) for size, full in zip(steps.shape, shape, strict=False)
    )
    if not fits:
        raise ValueError(
            f"step_size must broadcast to [T, 1, B, 1] = {shape}; got shape {tuple(steps.shape)}"
        )
    if not (torch.isfinite(steps) & (steps > 0)).all():
        raise ValueError(f"step_size must be positive and finite; got {step_size}")
    return AISSettings(betas, steps.broadcast_to(shape), num_leapfrog, persistence)
