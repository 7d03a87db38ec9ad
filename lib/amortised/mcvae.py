r"""Markov chains inside the bound: importance sampling on a path of random or decided steps.

All paths start at :math:`z_0 \sim q(z \mid x)`, move by leapfrog steps
:math:`(z_{k-1}, \rho'_k) \mapsto (z_k, \rho_k)` or by learned maps, and carry a weight with
:math:`\mathbb{E}\, \hat p = p_\theta(x)`, so that the mean of :math:`\log \hat p` is a lower bound.
Two kinds of density drive them: :math:`\log p_\theta(x, z)`, and those of the *bridge*

.. math:: \log \pi_k(z) = (1 - \beta_k) \log q(z \mid x) + \beta_k \log p_\theta(x, z).

========================  =================================  ==============================
method                    :math:`\rho'_{k+1}`                what closes the weight
========================  =================================  ==============================
:func:`langevin_path`     fresh                              the momentum densities
:func:`uha_path`          :math:`\eta \rho_k +               the same
                          \sqrt{1 - \eta^2}\, n`
the same, with a score    as above                           a learned reverse of the refresh
:func:`annealed_path`     fresh, then a Metropolis test      invariance of :math:`\pi_k`
:func:`metvae_path`       :math:`\rho_k`, then a test        the probability of the decisions
========================  =================================  ==============================

Step sizes are those of the leapfrog: a Langevin step of size s is a leapfrog step of
:math:`\sqrt{s}` from a fresh momentum.

Sources: Thin et al. (2020, 2021); Geffner and Domke (2021); Zhang et al. (2021); Doucet et al.
(2022); Salimans, Kingma and Welling (2015).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import logsigmoid

from .hvae import Path, raw_step_size
from .mcmc import LeapfrogState, leapfrog_step, select
from .models import LatentVariableModel, log_joint_fn
from .numerics import argument_validation, check_counts, value_and_grad
from .objectives import check_proposal

Evaluate = Callable[[Tensor], tuple]


class Bridge(nn.Module):
    r"""Settings of a path of K transitions along the bridge, all of them learned.

    Inverse temperatures are cumulative sums of a softmax, linear (:math:`\beta_k = k / (K + 1)`) at
    the start; step sizes are ``max_step_size`` times a sigmoid.

    :param latent_dim: D.
    :param num_steps: K, at least 1.
    :param step_size: leapfrog step at the start, in every dimension.
    :param persistence: :math:`\eta` in [0, 1), the share of the momentum that a refresh keeps; 0
        stays 0, another value is learned through a sigmoid.
    :param on_target: all :math:`\beta_k = 1`, and nothing of them to learn.
    :param score: module for a learned reverse, such as :class:`ScoreNetwork`; none by default.
    :param varied: a step size for each step, too.
    :param max_step_size: what no step size exceeds.
    :raises ValueError: for values out of range.

    >>> bridge = Bridge(latent_dim=2, num_steps=3, step_size=0.3)
    >>> bridge.betas(), bridge.step_sizes().shape
    (tensor([0.2500, 0.5000, 0.7500], grad_fn=...), torch.Size([3, 2]))
    """

    def __init__(
        self,
        latent_dim: int,
        num_steps: int,
        *,
        step_size: float = 0.2,
        persistence: float = 0.0,
        on_target: bool = False,
        score: nn.Module | None = None,
        varied: bool = False,
        max_step_size: float = 1.0,
    ):
        super().__init__()
        check_counts(latent_dim=latent_dim, num_steps=num_steps)
        if not 0 <= persistence < 1:
            raise ValueError(f"persistence must lie in [0, 1); got {persistence}")
        self.num_steps, self.max_step_size, self.score = num_steps, max_step_size, score
        rows = num_steps if varied else 1
        self.raw_step_size = raw_step_size(rows, latent_dim, step_size, max_step_size)
        raw = nn.Parameter(torch.tensor(persistence).logit())
        self.raw_persistence = raw if persistence else None
        self.raw_schedule = None if on_target else nn.Parameter(torch.zeros(num_steps + 1))

    def step_sizes(self) -> Tensor:
        """Leapfrog steps, ``[K, D]``."""
        return (self.max_step_size * self.raw_step_size.sigmoid()).expand(self.num_steps, -1)

    def betas(self) -> Tensor:
        r"""Inverse temperatures :math:`\beta_1, \dots, \beta_K`, ``[K]``."""
        if self.raw_schedule is None:
            return self.raw_step_size.new_ones(self.num_steps)
        return self.raw_schedule.softmax(0).cumsum(0)[:-1]

    def persistence(self) -> Tensor:
        r"""What a refresh keeps of the momentum, :math:`\eta`, a scalar."""
        raw = self.raw_persistence
        return self.raw_step_size.new_zeros(()) if raw is None else raw.sigmoid()


class ScoreNetwork(nn.Module):
    r"""A small perceptron for the reverse of a refresh; 0 at the start, where nothing is learned.

    It reads the position, what is kept of the new momentum, the gradient of
    :math:`\log \pi_k` there, through which it sees x, and the share of the path that is done.

    :param latent_dim: D.
    :param num_hidden: width of its two hidden layers.

    >>> ScoreNetwork(2)(*torch.ones(3, 5, 2), 0.5)
    tensor([[0., 0.],...
    """

    def __init__(self, latent_dim: int, num_hidden: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(3 * latent_dim + 1, num_hidden), nn.SiLU()),
            *(nn.Linear(num_hidden, num_hidden), nn.SiLU()),
            nn.Linear(num_hidden, latent_dim),
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, z: Tensor, kept: Tensor, grad: Tensor, share: float) -> Tensor:
        """``[..., D]`` for three inputs ``[..., D]`` and the share of steps that are done."""
        scaled = grad / (1.0 + 0.1 * grad.abs())
        return self.layers(torch.cat([z, kept, scaled, torch.full_like(z[..., :1], share)], -1))


# --- along the bridge ----------------------------------------------------------------------------


class _Point(NamedTuple):
    """Both ends of the bridge at a position, with their gradients."""

    log_q: Tensor
    q_grad: Tensor
    log_p: Tensor
    p_grad: Tensor

    def at(self, beta: Tensor) -> Tensor:
        return torch.lerp(self.log_q, self.log_p, beta)

    def force(self, beta: Tensor) -> Tensor:
        return torch.lerp(self.q_grad, self.p_grad, beta)


def _start(
    model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int
) -> tuple[LeapfrogState, Callable[[Tensor], _Point]]:
    """Draws of q with fresh momenta, and what evaluates the bridge: one gradient a call."""
    check_counts(num_samples=num_samples)
    check_proposal(q, x)
    graph = torch.is_grad_enabled()

    def evaluate(z: Tensor) -> _Point:
        target = value_and_grad(partial(log_joint_fn(model), x), z, graph)
        return _Point(*value_and_grad(q.log_prob, z, graph), *target)

    z = q.rsample((num_samples,))
    return LeapfrogState(z, torch.randn_like(z), evaluate(z), None), evaluate


def _step(
    state: LeapfrogState, evaluate: Callable[[Tensor], _Point], beta: Tensor, step_size: Tensor
) -> LeapfrogState:
    """A leapfrog step on the bridge at ``beta``; the state carries the whole point."""

    def point_and_force(z: Tensor) -> tuple[_Point, Tensor]:
        point = evaluate(z)
        return point, point.force(beta)

    state = state._replace(grad=state.logdensity.force(beta))
    return leapfrog_step(state, point_and_force, step_size)


def _half_square(momentum: Tensor) -> Tensor:
    return 0.5 * momentum.square().sum(-1)


@argument_validation(False)
def uha_path(
    model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int, *, settings: Bridge
) -> Path:
    r"""Uncorrected Hamiltonian annealing, with or without a learned reverse.

    .. math::

        \log \hat p = \log p_\theta(x, z_K) - \log q(z_0) + \sum_{k=1}^{K} \log
        \frac{r_k(\rho_k)}{\mathcal{N}(\rho'_k; 0, I)}, \qquad
        \rho'_{k+1} = \eta \rho_k + \sqrt{1 - \eta^2}\, n

    where :math:`r_k = \mathcal{N}(0, I)` without a score. With a score s the refresh is reversed
    by :math:`\mathcal{N}(\eta \rho'_{k+1} + (1 - \eta^2) s, (1 - \eta^2) I)` and the last momentum
    has the density :math:`\mathcal{N}(s, I)`: Monte Carlo diffusion, and for :math:`\eta = 0` on
    the target alone the variational method of Salimans et al. A path costs K + 1 gradients.

    :param q: reparameterisable, of batch shape ``[B]`` and event shape ``[D]``.
    :param x: observations, ``[B, P]``.
    :param num_samples: S.
    :param settings: the K transitions.
    :return: a :class:`amortised.hvae.Path`. Noise comes from the global stream.
    :raises ValueError: when S < 1 or the batch shapes of ``q`` and ``x`` differ.

    Sources: Geffner and Domke (2021); Zhang et al. (2021); Doucet et al. (2022), section 3;
    Salimans, Kingma and Welling (2015), algorithm 3.
    """
    state, evaluate = _start(model, q, x, num_samples)
    eta, betas, steps = settings.persistence(), settings.betas(), settings.step_sizes()
    log_weights = _half_square(state.momentum) - state.logdensity.log_q
    for k, (beta, step_size) in enumerate(zip(betas, steps, strict=True), 1):
        state = _step(state, evaluate, beta, step_size)
        refreshed, kept, variance = *torch.zeros_like(state.z).expand(2, *state.z.shape), 1.0
        if k < settings.num_steps:
            variance = 1.0 - eta.square()
            refreshed = eta * state.momentum + variance.sqrt() * torch.randn_like(state.z)
            kept = eta * refreshed
        log_weights = log_weights + _half_square(refreshed) - _half_square(state.momentum)
        if settings.score is not None:
            score = settings.score(state.z, kept, state.grad, k / settings.num_steps)
            gain = ((state.momentum - kept) * score).sum(-1) - variance * _half_square(score)
            log_weights = log_weights + gain
        state = state._replace(momentum=refreshed)
    log_weights = log_weights + state.logdensity.log_p
    return Path(log_weights, state.z, torch.zeros_like(log_weights), log_weights.new_empty(0))


def langevin_path(
    model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int, *, settings: Bridge
) -> Path:
    r"""Unadjusted Langevin steps, reversed by themselves (L-MCVAE).

    .. math::

        z_k = z_{k-1} + \tfrac{s}{2} \nabla \log \pi_k(z_{k-1}) + \sqrt{s}\, \xi_k, \qquad
        \log \hat p = \log \frac{p_\theta(x, z_K)}{q(z_0)} + \sum_k \log
        \frac{\mathcal{N}(\xi'_k; 0, I)}{\mathcal{N}(\xi_k; 0, I)},

    with :math:`\xi'_k` the noise that would lead back from :math:`z_k` to :math:`z_{k-1}`. It is
    minus the momentum after a leapfrog step of :math:`\epsilon = \sqrt{s}` from momentum
    :math:`\xi_k`, so the method is :func:`uha_path` with a fresh momentum at each step.

    Arguments and errors are those of :func:`uha_path`.

    :raises ValueError: also when the settings keep momentum or have a score.

    Source: Thin et al. (2021), section 3.
    """
    if settings.raw_persistence is not None or settings.score is not None:
        raise ValueError(
            "Langevin steps keep no momentum and have no score; got persistence = "
            f"{settings.persistence().item():.3g}, score = {settings.score}: use uha_path"
        )
    return uha_path(model, q, x, num_samples, settings=settings)


@argument_validation(False)
def annealed_path(
    model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int, *, settings: Bridge
) -> Path:
    r"""Annealed importance sampling with Metropolis-adjusted Langevin steps (A-MCVAE).

    .. math:: \log \hat p = \sum_{k=0}^{K} (\beta_{k+1} - \beta_k)
        \{\log p_\theta(x, z_k) - \log q(z_k \mid x)\}, \qquad \beta_0 = 0,\; \beta_{K+1} = 1

    The weights follow the path with the decisions held fixed. The gradient of the bound needs the
    decisions' own term, too, which
    :func:`amortised.objectives.score_function_surrogate` adds, with its leave-one-out baseline:
    ``score_function_surrogate(path.log_weights, path.log_decisions)``.

    Arguments, result and errors are those of :func:`uha_path`.

    Source: Thin et al. (2021), section 4; Neal (2001).
    """
    state, evaluate = _start(model, q, x, num_samples)
    betas, steps = settings.betas(), settings.step_sizes()
    ends = betas.new_zeros(1), betas, betas.new_ones(1)
    log_weights = log_decisions = torch.zeros_like(state.logdensity.log_q)
    acceptance = []
    for k, (before, beta) in enumerate(pairwise(torch.cat(ends))):
        point = state.logdensity
        log_weights = log_weights + (beta - before) * (point.log_p - point.log_q)
        if k == settings.num_steps:
            break
        if k > 0:
            state = state._replace(momentum=torch.randn_like(state.z))
        end = _step(state, evaluate, beta, steps[k])
        energy = _half_square(state.momentum) - _half_square(end.momentum)
        accepted, log_decision, probability = _decide(
            end.logdensity.at(beta) - point.at(beta) + energy, "metropolis"
        )
        point = _Point(*map(partial(select, accepted), end.logdensity, point))
        state = LeapfrogState(select(accepted, end.z, state.z), state.momentum, point, None)
        log_decisions = log_decisions + log_decision
        acceptance.append(probability)
    return Path(log_weights, state.z, log_decisions, torch.stack(acceptance))


def _decide(log_ratio: Tensor, rule: str) -> tuple[Tensor, Tensor, Tensor]:
    """Decisions, their log-probabilities with a graph, and acceptance probabilities without."""
    log_ratio = torch.where(log_ratio.isnan(), -torch.inf, log_ratio)
    if rule == "barker":
        log_yes, log_no = logsigmoid(log_ratio), logsigmoid(-log_ratio)
    else:
        log_yes = log_ratio.clamp(max=0.0)
        # Where the ratio exceeds 1 nothing is rejected, and the value is not used.
        log_no = torch.log(-torch.expm1(log_ratio.clamp(max=-1e-12)))
    probability = log_yes.detach().exp()
    accepted = torch.rand_like(probability) < probability
    return accepted, torch.where(accepted, log_yes, log_no), probability


# --- decided maps --------------------------------------------------------------------------------


class LeapfrogMap(nn.Module):
    r"""L leapfrog steps as an invertible map of position and momentum, of Jacobian 1.

    :param latent_dim: D.
    :param step_size: at the start, in every dimension; learned.
    :param num_steps: L.
    :param potential: :math:`-U`, maps ``[..., D]`` to ``[...]``: dynamics that do not see the
        target. By default they are those of the target.
    :param max_step_size: what no step size exceeds.
    """

    def __init__(
        self,
        latent_dim: int,
        step_size: float = 0.2,
        num_steps: int = 1,
        potential: nn.Module | None = None,
        max_step_size: float = 1.0,
    ):
        super().__init__()
        check_counts(latent_dim=latent_dim, num_steps=num_steps)
        self.raw_step_size = raw_step_size(1, latent_dim, step_size, max_step_size)
        self.num_steps, self.max_step_size, self.potential = num_steps, max_step_size, potential
        self.uses_gradient = potential is None

    def forward(self, state: LeapfrogState, evaluate: Evaluate) -> tuple[LeapfrogState, float]:
        """The state after the steps, and the logarithm of the Jacobian, 0."""
        step_size = self.max_step_size * self.raw_step_size[0].sigmoid()
        own = evaluate
        if self.potential is not None:
            own = partial(value_and_grad, self.potential, create_graph=torch.is_grad_enabled())
            state = LeapfrogState(*state[:2], *own(state.z))
        for _ in range(self.num_steps):
            state = leapfrog_step(state, own, step_size)
        is_own = self.potential is not None
        return LeapfrogState(*state[:2], *evaluate(state.z)) if is_own else state, 0.0


class RealNVP(nn.Module):
    r"""An affine coupling of each half of the position given the other; momenta stay.

    .. math:: z_b' = z_b \odot e^{\tanh s(z_a)} + t(z_a), \qquad
        \log |\det| = \textstyle\sum \tanh s(z_a)

    It is the identity at the start.

    :param latent_dim: D, at least 2.
    :param num_hidden: width of the hidden layers.

    Source: Dinh, Sohl-Dickstein and Bengio (2017), equations 4 to 6.
    """

    #: The map does not need the gradient of the target.
    uses_gradient = False

    def __init__(self, latent_dim: int, num_hidden: int = 64):
        super().__init__()
        check_counts(latent_dim=latent_dim, minimum=2)
        half = latent_dim // 2
        self.sizes = [half, latent_dim - half]
        self.networks = nn.ModuleList(
            nn.Sequential(nn.Linear(a, num_hidden), nn.SiLU(), nn.Linear(num_hidden, 2 * b))
            for a, b in (self.sizes, self.sizes[::-1])
        )
        for network in self.networks:
            nn.init.zeros_(network[-1].weight)
            nn.init.zeros_(network[-1].bias)

    def forward(self, state: LeapfrogState, evaluate: Evaluate) -> tuple[LeapfrogState, Tensor]:
        """The state at the new position, and the logarithm of the Jacobian."""
        first, second = state.z.split(self.sizes, -1)
        log_det = torch.zeros_like(state.z[..., 0])
        for network in self.networks:  # each moves the half that the other then reads
            log_scale, shift = network(first).chunk(2, -1)
            log_scale = log_scale.tanh()
            first, second = second * log_scale.exp() + shift, first
            log_det = log_det + log_scale.sum(-1)
        z = torch.cat([first, second], -1)
        return LeapfrogState(z, state.momentum, *evaluate(z)), log_det


class PlanarFlow(nn.Module):
    r"""The map :math:`z + \hat u \tanh(w^\top z + b)` with :math:`w^\top \hat u > -1`.

    :math:`\log |\det| = \log(1 + w^\top \hat u\, \{1 - \tanh^2(w^\top z + b)\})`.

    :param latent_dim: D.

    Source: Rezende and Mohamed (2015), equations 10 to 12 and appendix A.1.
    """

    #: The map does not need the gradient of the target.
    uses_gradient = False

    def __init__(self, latent_dim: int):
        super().__init__()
        self.u, self.w = (nn.Parameter(0.1 * torch.randn(latent_dim)) for _ in range(2))
        self.b = nn.Parameter(torch.tensor(0.1))

    def forward(self, state: LeapfrogState, evaluate: Evaluate) -> tuple[LeapfrogState, Tensor]:
        """The state at the new position, and the logarithm of the Jacobian."""
        along = self.w @ self.u
        inside = nn.functional.softplus(along) - 1.0  # what w.u becomes
        u = self.u + (inside - along) * self.w / self.w.square().sum()
        h = torch.tanh(state.z @ self.w + self.b)
        z = state.z + h.unsqueeze(-1) * u
        log_det = torch.log1p(inside * (1.0 - h.square()))
        return LeapfrogState(z, state.momentum, *evaluate(z)), log_det


class Maps(NamedTuple):
    """Settings of :func:`metvae_path`.

    :ivar maps: the K maps, such as :class:`LeapfrogMap` or :class:`RealNVP`; none gives the ELBO.
    :ivar acceptance: ``"barker"``, ``"metropolis"``, or ``"always"``, a normalising flow.
    """

    maps: Sequence[nn.Module]
    acceptance: str = "barker"


@argument_validation(False)
def metvae_path(
    model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int, *, settings: Maps
) -> Path:
    r"""Invertible maps that are accepted or rejected (MetFlow, MetVAE).

    State :math:`u = (z, \rho)`, decisions :math:`a_k \in \{0, 1\}` of probability
    :math:`\alpha_k(a_k \mid u_{k-1})`, where the ratio t of target densities times the Jacobian
    gives :math:`\alpha_k(1) = t / (1 + t)` (Barker) or :math:`\min(1, t)` (Metropolis);
    :math:`u_k = T_k(u_{k-1})` if :math:`a_k = 1`, else :math:`u_{k-1}`:

    .. math::

        \log \hat p = \log \frac{p_\theta(x, u_K)}{q(u_0)} - K \log 2
        + \sum_k \big\{ a_k \log |\det \nabla T_k| - \log \alpha_k(a_k \mid u_{k-1}) \big\}

    With Barker every string of decisions is possible everywhere and the mean of
    :math:`\hat p` is the evidence; the last decision leaves :math:`\hat p` as it is, since both of
    its values give half of :math:`p(x, u) + p(x, T_K u) |\det \nabla T_K|`. With Metropolis nothing
    is rejected where t exceeds 1; strings are missing there, and the mean is *below* the evidence.
    Maps that are always accepted are a normalising flow: no decisions, and no log 2.

    The gradient of the bound is that of
    ``score_function_surrogate(path.log_weights, path.log_decisions)``; see :func:`annealed_path`.
    Other arguments, result and errors are those of :func:`uha_path`.

    :param settings: maps and acceptance.
    :raises ValueError: also for an unknown acceptance.

    Source: Thin et al. (2020), section 3, and their first code.
    """
    maps, rule = settings
    check_counts(num_samples=num_samples)
    check_proposal(q, x)
    if rule not in ("barker", "metropolis", "always"):
        raise ValueError(f"acceptance must be barker, metropolis or always; got {rule!r}")
    logdensity_fn = partial(log_joint_fn(model), x)
    uses_gradient = any(transform.uses_gradient for transform in maps)
    is_needed = rule != "always" and len(maps) > 0

    def evaluate(z: Tensor) -> tuple:
        if uses_gradient:
            return value_and_grad(logdensity_fn, z, torch.is_grad_enabled())
        return (logdensity_fn(z) if is_needed else None), None

    z = q.rsample((num_samples,))
    state = LeapfrogState(z, torch.randn_like(z), *evaluate(z))
    log_weights = _half_square(state.momentum) - q.log_prob(z)
    log_decisions, acceptance = torch.zeros_like(log_weights), []
    for transform in maps:
        end, log_det = transform(state, evaluate)
        if rule == "always":
            state, log_weights = end, log_weights + log_det
            continue
        energy = _half_square(state.momentum) - _half_square(end.momentum)
        log_ratio = end.logdensity - state.logdensity + energy + log_det
        accepted, log_decision, probability = _decide(log_ratio, rule)
        log_weights = log_weights + accepted * log_det - log_decision - math.log(2.0)
        log_decisions = log_decisions + log_decision
        acceptance.append(probability)
        state = LeapfrogState(
            *(a if a is None else select(accepted, a, b) for a, b in zip(end, state, strict=True))
        )
    log_joint = logdensity_fn(state.z) if state.logdensity is None else state.logdensity
    log_weights = log_weights + log_joint - _half_square(state.momentum)
    stacked = torch.stack(acceptance) if acceptance else log_weights.new_empty(0)
    return Path(log_weights, state.z, log_decisions, stacked)


# --- log-weights alone ---------------------------------------------------------------------------


def uha_log_weights(
    model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int, *, settings: Bridge
) -> Tensor:
    """Log-weights ``[S, B]`` of :func:`uha_path`, in nats.

    >>> from amortised.models import LinearGaussian
    >>> model, x = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0), torch.tensor([[1.5]])
    >>> q, settings = model.prior().expand([1]), Bridge(1, 5, step_size=0.447, persistence=0.5)
    >>> bound = uha_log_weights(model, q, x, 20_000, settings=settings).mean(0)
    >>> bool((bound + 2.17).abs() < 0.05)
    True
    """
    return uha_path(model, q, x, num_samples, settings=settings).log_weights


def langevin_log_weights(
    model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int, *, settings: Bridge
) -> Tensor:
    """Log-weights ``[S, B]`` of :func:`langevin_path`, in nats.

    >>> from amortised.models import LinearGaussian
    >>> model, x = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0), torch.tensor([[1.5]])
    >>> q, settings = model.prior().expand([1]), Bridge(1, 5, step_size=0.447)
    >>> bound = langevin_log_weights(model, q, x, 20_000, settings=settings).mean(0)
    >>> bool((bound + 2.28).abs() < 0.05)
    True
    """
    return langevin_path(model, q, x, num_samples, settings=settings).log_weights


def annealed_log_weights(
    model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int, *, settings: Bridge
) -> Tensor:
    """Log-weights ``[S, B]`` of :func:`annealed_path`, in nats, with the decisions held fixed.

    >>> from amortised.models import LinearGaussian
    >>> model, x = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0), torch.tensor([[1.5]])
    >>> q, settings = model.prior().expand([1]), Bridge(1, 5, step_size=0.447)
    >>> bound = annealed_log_weights(model, q, x, 20_000, settings=settings).mean(0)
    >>> bool((bound + 2.30).abs() < 0.05)
    True
    """
    return annealed_path(model, q, x, num_samples, settings=settings).log_weights


def metvae_log_weights(
    model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int, *, settings: Maps
) -> Tensor:
    """Log-weights ``[S, B]`` of :func:`metvae_path`, in nats, with the decisions held fixed.

    >>> from amortised.models import LinearGaussian
    >>> model, x = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0), torch.tensor([[1.5]])
    >>> q, settings = model.prior().expand([1]), Maps([LeapfrogMap(1, 0.3)])
    >>> bound = metvae_log_weights(model, q, x, 20_000, settings=settings).mean(0)
    >>> bool((bound + 2.54).abs() < 0.05)
    True
    """
    return metvae_path(model, q, x, num_samples, settings=settings).log_weights
