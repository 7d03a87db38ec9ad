r"""Markov kernels as pure functions of a state, a log-density and a step size.

A *state* carries the position together with the log-density and gradient there, so that no kernel
evaluates the density twice at one point. Each kernel takes the state (or a bare position, from
which it makes one) and returns the next state and an *info*. Chains run in parallel along all
leading dimensions: positions are ``[..., D]``, log-densities ``[...]``.

One convention for step sizes, in the library and in the book: Langevin kernels drift by
``step_size / 2`` times the gradient and add noise of standard deviation ``sqrt(step_size)``;
Hamiltonian kernels take the leapfrog step itself. One leapfrog step of size
:math:`\epsilon` from fresh momentum is one Langevin proposal with ``step_size`` :math:`\epsilon^2`.

A step size is positive and finite, or a ``ValueError`` says so. Distributions check their arguments
where a chain starts. Along a trajectory they do not: one that diverges has an energy that is no
number, and is rejected.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .numerics import all_finite, argument_validation, check_counts, value_and_grad

LogDensity = Callable[[Tensor], Tensor]
ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]


class LeapfrogState(NamedTuple):
    """A point in phase space, with the log-density and its gradient at the position."""

    z: Tensor
    momentum: Tensor
    logdensity: Tensor
    grad: Tensor


class ChainState(NamedTuple):
    """A position with the log-density and gradient there (no gradient for random-walk kernels)."""

    z: Tensor
    logdensity: Tensor
    grad: Tensor | None


class KernelInfo(NamedTuple):
    """What a Metropolis test did: acceptance probability and outcome, one value per chain."""

    acceptance_probability: Tensor
    is_accepted: Tensor


class SampledChain(NamedTuple):
    """Samples ``[num_samples, ..., D]`` and mean acceptance ``[...]`` (None without a test)."""

    samples: Tensor
    acceptance_rate: Tensor | None


def init_state(z: Tensor, logdensity_fn: LogDensity) -> ChainState:
    """The state of a chain at ``z``: one evaluation of the log-density and its gradient."""
    return ChainState(z.detach(), *value_and_grad(logdensity_fn, z))


def leapfrog_step(
    state: LeapfrogState | tuple[Tensor, Tensor, Tensor, Tensor],
    value_and_grad_fn: Callable[[Tensor], tuple[Any, Tensor]],
    step_size: float | Tensor,
) -> LeapfrogState:
    r"""One leapfrog step of Hamiltonian dynamics, the only integrator of the library.

    With :math:`U(z) = -\log \pi(z)` and unit mass,

    .. math::

        \rho_{1/2} &= \rho + \tfrac{\epsilon}{2} \nabla \log \pi(z), \\
        z' &= z + \epsilon \rho_{1/2}, \\
        \rho' &= \rho_{1/2} + \tfrac{\epsilon}{2} \nabla \log \pi(z').

    The gradient at the start is read from the state and the gradient at the end is kept in the
    result: a trajectory of L steps costs L new gradients. The map is volume preserving and
    reversible (flip the momentum, step, flip again), whatever the force field; its energy error is
    of order :math:`\epsilon^2`.

    :param state: ``(z, momentum, logdensity, grad)``, of shapes ``[..., D]``, ``[..., D]``,
        ``[...]``, ``[..., D]``.
    :param value_and_grad_fn: maps ``[..., D]`` to the log-density and its gradient. The step itself
        needs the gradient alone: what stands in the place of the log-density is only carried along.
    :param step_size: :math:`\epsilon`, a number or a tensor that broadcasts to ``z``.
    :return: the state after the step.
    """
    z, momentum, _, grad = state
    momentum = momentum + 0.5 * step_size * grad
    z = z + step_size * momentum
    logdensity, grad = value_and_grad_fn(z)
    return LeapfrogState(z, momentum + 0.5 * step_size * grad, logdensity, grad)


def leapfrog(
    z: Tensor,
    momentum: Tensor,
    logdensity_fn: LogDensity,
    step_size: float | Tensor,
    num_steps: int,
) -> tuple[Tensor, Tensor]:
    r"""A leapfrog trajectory: :func:`leapfrog_step`, ``num_steps`` times.

    :param z: start, ``[..., D]``.
    :param momentum: momentum at the start, ``[..., D]``.
    :param logdensity_fn: maps ``[..., D]`` to ``[...]``.
    :param step_size: :math:`\epsilon`, a number or a tensor that broadcasts to ``z``.
    :param num_steps: L, at least 0.
    :return: position and momentum at the end.

    >>> z, momentum = torch.tensor([[1.0]]), torch.tensor([[0.0]])
    >>> z, momentum = leapfrog(z, momentum, lambda z: -0.5 * z.square().sum(-1), 0.1, 10)
    >>> z, momentum  # close to cos(1) and -sin(1)
    (tensor([[0.5400]]), tensor([[-0.8406]]))
    """
    _check_step_size(step_size)
    check_counts(num_steps=num_steps, minimum=0)
    state = LeapfrogState(z, momentum, *value_and_grad(logdensity_fn, z))
    state = _trajectory(state, logdensity_fn, step_size, num_steps)
    return state.z, state.momentum


@argument_validation(False)
def _trajectory(
    state: LeapfrogState, logdensity_fn: LogDensity, step_size: float | Tensor, num_steps: int
) -> LeapfrogState:
    for _ in range(num_steps):
        state = leapfrog_step(state, partial(value_and_grad, logdensity_fn), step_size)
    return state


def metropolis_step(
    state: ChainState | Tensor,
    logdensity_fn: LogDensity,
    step_size: float | Tensor,
    *,
    generator: torch.Generator | None = None,
) -> tuple[ChainState, KernelInfo]:
    r"""Random-walk Metropolis: propose :math:`z' = z + s \xi`, accept with
    :math:`\min(1, \pi(z') / \pi(z))`.

    :param state: current state, or positions ``[..., D]``.
    :param step_size: s, the standard deviation of the proposal.
    :param generator: source of all randomness; the global stream when None.
    :return: next state (without gradient) and info.

    Source: Metropolis et al. (1953).
    """
    _check_step_size(step_size)
    if isinstance(state, Tensor):
        state = ChainState(state, logdensity_fn(state), None)
    z = state.z + step_size * normal_like(state.z, generator)
    with argument_validation(False):
        proposal = ChainState(z, logdensity_fn(z), None)
    return _accept(state, proposal, proposal.logdensity - state.logdensity, generator)


def langevin_step(
    z: Tensor,
    logdensity_fn: LogDensity,
    step_size: float | Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""One step of unadjusted Langevin dynamics: no test, hence a bias of order ``step_size``.

    .. math:: z' = z + \tfrac{s}{2} \nabla \log \pi(z) + \sqrt{s}\, \xi, \qquad
        \xi \sim \mathcal{N}(0, I)

    In a Gaussian direction of precision :math:`\lambda` the chain is stable only for
    :math:`s < 4 / \lambda`, and its stationary variance is
    :math:`\lambda^{-1} / (1 - s \lambda / 4)`.

    :param z: positions, ``[..., D]``.
    :param step_size: s; texts that write drift h and noise :math:`\sqrt{2h}` mean h = s / 2.
    :param generator: source of the noise; the global stream when None.
    :return: next positions, ``[..., D]``.
    :raises FloatingPointError: when the next position is not finite, as after a gradient that is
        not: the step size is too large for the target, and the chain has left for infinity.
    """
    _check_step_size(step_size)
    _, grad = value_and_grad(logdensity_fn, z)
    step_size = torch.as_tensor(step_size, dtype=z.dtype)  # a number stays on the CPU, as a scalar
    noise = normal_like(z, generator)
    z = z.detach() + 0.5 * step_size * grad + step_size.sqrt() * noise
    if not all_finite(z):
        raise FloatingPointError(
            "the chain's positions are not finite: unadjusted Langevin dynamics diverged; use a "
            "smaller step_size"
        )
    return z


def mala_step(
    state: ChainState | Tensor,
    logdensity_fn: LogDensity,
    step_size: float | Tensor,
    *,
    generator: torch.Generator | None = None,
) -> tuple[ChainState, KernelInfo]:
    r"""Metropolis-adjusted Langevin: the proposal of :func:`langevin_step` with a Metropolis test.

    It is Hamiltonian Monte Carlo with one leapfrog step of size :math:`\sqrt{s}`, and implemented
    as such: position proposal, acceptance probability and cost are the same.

    :param state: current state, or positions ``[..., D]``.
    :param step_size: s, as in :func:`langevin_step`.
    :param generator: source of all randomness; the global stream when None.
    :return: next state and info.

    Source: Roberts and Tweedie (1996); the identity is in Neal (2011), section 5.2.
    """
    _check_step_size(step_size)
    epsilon = step_size.sqrt() if isinstance(step_size, Tensor) else step_size**0.5
    return hmc_step(state, logdensity_fn, epsilon, 1, generator=generator)


def hmc_step(
    state: ChainState | Tensor,
    logdensity_fn: LogDensity,
    step_size: float | Tensor,
    num_steps: int,
    *,
    generator: torch.Generator | None = None,
) -> tuple[ChainState, KernelInfo]:
    r"""Hamiltonian Monte Carlo: fresh momentum, ``num_steps`` leapfrog steps, a Metropolis test.

    The proposal is accepted with probability :math:`\min(1, \exp(H - H'))`,
    :math:`H(z, \rho) = -\log \pi(z) + \tfrac12 \|\rho\|^2`. A trajectory whose energy is not a
    number has left the support of the target and is rejected.

    :param state: current state, or positions ``[..., D]``.
    :param step_size: leapfrog step :math:`\epsilon`, a number or a tensor that broadcasts to z.
    :param num_steps: L, at least 1; the cost is L new gradients.
    :param generator: source of all randomness; the global stream when None.
    :return: next state and info.

    Source: Duane et al. (1987); Neal (2011).

    >>> generator = torch.Generator().manual_seed(0)
    >>> target = lambda z: -0.5 * z.square().sum(-1)
    >>> state, info = hmc_step(torch.zeros(1000, 2), target, 0.3, 5, generator=generator)
    >>> state.z.shape, bool(info.acceptance_probability.mean() > 0.9)
    (torch.Size([1000, 2]), True)
    """
    _check_step_size(step_size)
    check_counts(num_steps=num_steps)
    if isinstance(state, Tensor) or state.grad is None:
        state = init_state(state if isinstance(state, Tensor) else state.z, logdensity_fn)
    momentum = normal_like(state.z, generator)
    end = LeapfrogState(state.z, momentum, state.logdensity, state.grad)
    end = _trajectory(end, logdensity_fn, step_size, num_steps)
    log_ratio = negative_energy(end.logdensity, end.momentum) - negative_energy(
        state.logdensity, momentum
    )
    proposal = ChainState(end.z, end.logdensity, end.grad)
    return _accept(state, proposal, log_ratio, generator)


def negative_energy(logdensity: Tensor, momentum: Tensor) -> Tensor:
    r""":math:`-H(z, \rho) = \log \pi(z) - \tfrac12 \|\rho\|^2`, one value per chain."""
    return logdensity - 0.5 * momentum.square().sum(-1)


def metropolis_test(log_ratio: Tensor, generator: torch.Generator | None = None) -> KernelInfo:
    r"""Accept each proposal with probability :math:`\min(1, e^{r})`, independently.

    :param log_ratio: r, one value per chain, any shape; for Hamiltonian kernels the fall in energy.
        A ratio that is not a number is a rejection: the trajectory has left the support.
    :param generator: source of the uniform numbers; the global stream when None.
    :return: acceptance probabilities and outcomes, of the same shape.
    """
    probability = torch.nan_to_num(log_ratio, nan=-torch.inf).clamp(max=0.0).exp()
    uniform = torch.rand(
        probability.shape, generator=generator, dtype=probability.dtype, device=probability.device
    )
    return KernelInfo(probability, uniform < probability)


def sample_chain(
    kernel: Callable,
    initial: ChainState | Tensor,
    num_samples: int,
    *,
    burn_in: int = 0,
    thin: int = 1,
) -> SampledChain:
    r"""Run a kernel and keep its positions.

    :param kernel: maps a state to ``(state, info)``, or positions to positions (unadjusted
        kernels); usually a lambda or ``functools.partial`` around a kernel of this module.
    :param initial: state or positions ``[..., D]`` at the start, which is not kept.
    :param num_samples: number of positions to keep.
    :param burn_in: number of first steps to discard.
    :param thin: keep one position in ``thin``.
    :return: samples ``[num_samples, ..., D]`` and the mean acceptance probability per chain over
        the steps after the burn-in.

    >>> generator = torch.Generator().manual_seed(0)
    >>> target = lambda z: -0.5 * z.square().sum(-1)
    >>> kernel = lambda state: mala_step(state, target, 1.0, generator=generator)
    >>> chain = sample_chain(kernel, torch.zeros(4, 2), num_samples=50, burn_in=10)
    >>> chain.samples.shape, chain.acceptance_rate.shape
    (torch.Size([50, 4, 2]), torch.Size([4]))
    """
    check_counts(num_samples=num_samples, thin=thin)
    check_counts(burn_in=burn_in, minimum=0)
    state, kept, acceptance = initial, [], []
    for step in range(burn_in + num_samples * thin):
        out = kernel(state)
        state, info = (out, None) if isinstance(out, Tensor) else out
        if step >= burn_in:
            if info is not None:
                acceptance.append(info.acceptance_probability)
            if (step - burn_in + 1) % thin == 0:
                kept.append(state if isinstance(state, Tensor) else state.z)
    rate = torch.stack(acceptance).mean(0) if acceptance else None
    return SampledChain(torch.stack(kept), rate)


def split_rhat(samples: Tensor) -> Tensor:
    r"""Rank-normalised split :math:`\hat R`: do chains agree with each other, and halves of chains?

    Each chain is cut in half, which gives C chains of n draws. With W the mean of their variances
    and B / n the variance of their means,

    .. math:: \hat R = \sqrt{\Bigl(\frac{n - 1}{n} W + \frac{B}{n}\Bigr) \Big/ W}.

    It is computed twice, and the larger value returned: from the normal scores of the pooled ranks,
    which exist for targets of any tails and see different locations, and from those of
    :math:`|z - \mathrm{median}|`, which see different spreads. Values above 1.01 mean that the
    chains have not met; a value near 1 does not mean that they have seen the whole target.

    :param samples: ``[N, C, ...]``, N at least 4 successive states of C at least 1 chains.
    :return: one value for each quantity, ``[...]``; ``nan`` where all draws are equal, infinite
        where each half chain stands still at a place of its own.
    :raises ValueError: when there are fewer than 4 states or no chain.

    Source: Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021), section 4.

    >>> generator = torch.Generator().manual_seed(0)
    >>> draws = torch.randn(500, 4, 1, generator=generator)
    >>> apart = draws + torch.tensor([0.0, 0.0, 3.0, 3.0])[:, None]
    >>> bool(split_rhat(draws) < 1.01), bool(split_rhat(apart) > 1.5)
    (True, True)
    """
    if samples.ndim < 2 or samples.shape[0] < 4 or samples.shape[1] < 1:
        raise ValueError(
            "split_rhat needs samples [N, C, ...] with at least 4 states of 1 chain; got shape "
            f"{tuple(samples.shape)}"
        )
    half = samples.shape[0] // 2
    chains = torch.cat([samples[:half], samples[-half:]], dim=1).double()
    pooled = chains.flatten(0, 1)
    folded = (chains - pooled.median(0).values).abs()
    return torch.maximum(_rhat(_normal_scores(chains)), _rhat(_normal_scores(folded)))


def _rhat(chains: Tensor) -> Tensor:
    """The ratio above, of ``[n, C, ...]``."""
    num_draws = chains.shape[0]
    within = chains.var(0).mean(0)
    between = chains.mean(0).var(0)
    return ((within * (num_draws - 1) / num_draws + between) / within).sqrt()


def _normal_scores(chains: Tensor) -> Tensor:
    """Normal quantiles of the pooled ranks of ``[n, C, ...]``; equal values share a rank."""
    flat = chains.reshape(chains.shape[0] * chains.shape[1], -1)
    ranks = []
    for column in flat.unbind(-1):
        _, place, count = torch.unique(column, return_inverse=True, return_counts=True)
        ranks.append((count.cumsum(0).double() - 0.5 * (count - 1))[place])
    share = (torch.stack(ranks, -1) - 0.375) / (len(flat) + 0.25)
    return torch.special.ndtri(share).reshape(chains.shape)


def normal_like(z: Tensor, generator: torch.Generator | None) -> Tensor:
    """Independent standard normal numbers of the shape, type and device of z."""
    return torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)


def select(is_accepted: Tensor, proposal: Tensor, current: Tensor) -> Tensor:
    """The proposals of the chains that accept, ``[...]`` or ``[..., D]``, elsewhere the current."""
    shape = is_accepted.shape + (1,) * (proposal.ndim - is_accepted.ndim)
    return torch.where(is_accepted.reshape(shape), proposal, current)


def _accept(
    state: ChainState, proposal: ChainState, log_ratio: Tensor, generator: torch.Generator | None
) -> tuple[ChainState, KernelInfo]:
    """The proposal where the Metropolis test accepts it, the old state elsewhere."""
    info = metropolis_test(log_ratio, generator)
    z, logdensity = (select(info.is_accepted, proposal[i], state[i]) for i in range(2))
    has_grad = proposal.grad is not None and state.grad is not None
    grad = select(info.is_accepted, proposal.grad, state.grad) if has_grad else None
    return ChainState(z, logdensity, grad), info


def _check_step_size(step_size: float | Tensor) -> None:
    is_number = isinstance(step_size, Tensor | numbers.Real) and not isinstance(step_size, bool)
    steps = torch.as_tensor(step_size if is_number else torch.nan)
    if not ((steps > 0) & (steps < torch.inf)).all():
        raise ValueError(f"step_size must be positive and finite; got {step_size!r}")
