r"""The Hamiltonian variational auto-encoder: a leapfrog trajectory as the variational family.

A draw of the encoder gets a momentum, K leapfrog steps on :math:`\log p_\theta(x, z)` move it, and
after each step the momentum is multiplied by :math:`\alpha_k \le 1` (*tempering*: a hot start that
is cooled). The map is deterministic and its Jacobian is known, so the trajectory is a normalising
flow that sees its target, and

.. math::

    \log \hat p = \log p_\theta(x, z_K) + \log \mathcal{N}(\rho_K; 0, I) - \log q(z_0)
    - \log \mathcal{N}(\gamma; 0, I), \qquad \rho_0 = \gamma / \sqrt{\beta_0},

has :math:`\mathbb{E}\, \hat p = p_\theta(x)`: the Jacobian :math:`\prod_k \alpha_k^D =
\beta_0^{D/2}` cancels the normaliser of :math:`\rho_0`.

Source: Caterini, Doucet and Sejdinovic (2018); Neal (2005).
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from .mcmc import LeapfrogState, LogDensity, ValueAndGrad, leapfrog_step
from .models import LatentVariableModel, as_model, log_joint_fn
from .numerics import argument_validation, check_counts, value_and_grad
from .objectives import check_proposal

#: The power p of each published rule of fixed tempering: :math:`\beta_k^p` is linear in
#: :math:`k^2`. ``"paper"`` is that of the paper and its Gaussian code, ``"mnist_code"`` the other.
FIXED_RULES = {"paper": -0.5, "mnist_code": -1.0}
#: The first inverse temperature :math:`\beta_0` of each, as published.
FIRST_BETA = {"paper": 0.04, "mnist_code": 2 / 3}


class Path(NamedTuple):
    """Importance sampling on a path: S paths for each of B observations.

    :ivar log_weights: :math:`\\log \\hat p` of each path, in nats, ``[S, B]``.
    :ivar z: where the paths end, ``[S, B, D]``.
    :ivar log_decisions: log-probability of all decisions to accept or to reject, ``[S, B]``, with
        its graph; zeros where nothing is decided.
    :ivar acceptance: acceptance probability of each decision, ``[K, S, B]``; K = 0 without one.
    """

    log_weights: Tensor
    z: Tensor
    log_decisions: Tensor
    acceptance: Tensor


def tempering_schedule(num_steps: int, beta0: float | Tensor, rule: str = "paper") -> Tensor:
    r"""Inverse temperatures :math:`\beta_0 < \dots < \beta_K = 1` of fixed tempering.

    .. math:: \beta_k^p = \beta_0^p + (1 - \beta_0^p)\, k^2 / K^2

    with p = -1/2 by the rule ``"paper"`` and p = -1 by ``"mnist_code"``. The published texts give
    :math:`\beta_0^p` of both rules one name; equal values of it are different temperatures.

    :param num_steps: K, at least 1.
    :param beta0: :math:`\beta_0` in (0, 1].
    :param rule: one of :data:`FIXED_RULES`.
    :return: ``[K + 1]``.
    :raises ValueError: for another rule or a value out of its range.

    Source: Caterini, Doucet and Sejdinovic (2018), section 5, and their code.

    >>> tempering_schedule(2, 0.25), tempering_schedule(2, 0.25, "mnist_code")
    (tensor([0.2500, 0.3265, 1.0000]), tensor([0.2500, 0.3077, 1.0000]))
    """
    check_counts(num_steps=num_steps)
    if rule not in FIXED_RULES:
        raise ValueError(f"rule must be one of {', '.join(FIXED_RULES)}; got {rule!r}")
    beta0 = torch.as_tensor(beta0)
    if not 0 < beta0 <= 1:
        raise ValueError(f"beta0 must lie in (0, 1]; got {beta0.item():.4g}")
    first = beta0 ** FIXED_RULES[rule]
    share = torch.linspace(0, 1, num_steps + 1, dtype=beta0.dtype, device=beta0.device).square()
    return (first + (1.0 - first) * share) ** (1.0 / FIXED_RULES[rule])


def raw_step_size(num_rows: int, latent_dim: int, step_size: float, maximum: float) -> nn.Parameter:
    """Logits ``[num_rows, D]`` of step sizes as shares of their maximum.

    :raises ValueError: when the step size does not lie in (0, maximum).
    """
    if not 0 < step_size < maximum:
        raise ValueError(f"step_size must lie in (0, {maximum}); got {step_size}")
    return nn.Parameter(torch.full((num_rows, latent_dim), step_size / maximum).logit())


class HamiltonianFlow(nn.Module):
    r"""K tempered leapfrog steps with learned step sizes and temperatures.

    Step sizes are ``max_step_size`` times a sigmoid; with ``"free"`` tempering each
    :math:`\alpha_k` is a sigmoid and :math:`\beta_0 = \prod_k \alpha_k^2`; with a fixed rule
    :math:`\beta_0^p = 1 + \exp(\cdot)` is learned; with ``"none"`` all :math:`\alpha_k = 1`.

    :param latent_dim: D.
    :param num_steps: K; 0 gives the plain ELBO.
    :param tempering: ``"none"``, ``"free"`` or one of :data:`FIXED_RULES`.
    :param step_size: at the start, in every dimension.
    :param beta0: :math:`\beta_0` at the start; by default as published, with
        :math:`\alpha_k = 0.9` for free tempering.
    :param varied: a step size for each step, too, and not one for all of them.
    :param max_step_size: what no step size exceeds.
    :raises ValueError: for values out of range.

    Source: Caterini, Doucet and Sejdinovic (2018), algorithm 1.

    >>> flow = HamiltonianFlow(latent_dim=64, num_steps=10, tempering="paper")
    >>> sum(p.numel() for p in flow.parameters()), flow.alphas().prod().square()
    (65, tensor(0.0400, grad_fn=...))
    """

    def __init__(
        self,
        latent_dim: int,
        num_steps: int,
        tempering: str = "free",
        *,
        step_size: float = 0.2,
        beta0: float | None = None,
        varied: bool = False,
        max_step_size: float = 0.5,
    ):
        super().__init__()
        check_counts(latent_dim=latent_dim)
        check_counts(num_steps=num_steps, minimum=0)
        if tempering not in (kinds := ("none", "free", *FIXED_RULES)):
            raise ValueError(f"tempering must be one of {', '.join(kinds)}; got {tempering!r}")
        self.num_steps, self.max_step_size = num_steps, max_step_size
        self.tempering = tempering if num_steps else "none"
        rows = num_steps if varied else 1
        self.raw_step_size = raw_step_size(rows, latent_dim, step_size, max_step_size)
        beta0 = FIRST_BETA.get(tempering, 0.81**num_steps) if beta0 is None else beta0
        if self.tempering != "none" and not 0 < beta0 < 1:
            raise ValueError(f"beta0 must lie in (0, 1), or tempering be 'none'; got {beta0}")
        if self.tempering == "free":
            alpha = torch.full((num_steps,), beta0 ** (0.5 / num_steps))
            self.raw_tempering = nn.Parameter(alpha.logit())
        elif self.tempering in FIXED_RULES:
            first = torch.tensor(beta0 ** FIXED_RULES[tempering])
            self.raw_tempering = nn.Parameter((first - 1.0).log())

    def step_sizes(self) -> Tensor:
        r"""Leapfrog steps :math:`\epsilon_k`, ``[K, D]``."""
        sizes = self.max_step_size * self.raw_step_size.sigmoid()
        return sizes.expand(self.num_steps, -1)

    def alphas(self) -> Tensor:
        r"""Factors of the momentum after each step, ``[K]``, of product :math:`\sqrt{\beta_0}`."""
        if self.tempering == "none":
            return self.raw_step_size.new_ones(self.num_steps)
        if self.tempering == "free":
            return self.raw_tempering.sigmoid()
        beta0 = (1.0 + self.raw_tempering.exp()) ** (1.0 / FIXED_RULES[self.tempering])
        betas = tempering_schedule(self.num_steps, beta0, self.tempering)
        return (betas[:-1] / betas[1:]).sqrt()

    def forward(
        self,
        z: Tensor,
        momentum: Tensor,
        logdensity_fn: LogDensity,
        *,
        create_graph: bool | None = None,
        reverse_for: Iterable[Tensor] | None = None,
    ) -> LeapfrogState:
        """The end of a trajectory; K steps cost K + 1 gradients.

        :param z: positions at the start, ``[..., D]``.
        :param momentum: momenta at the start, ``[..., D]``.
        :param logdensity_fn: maps ``[..., D]`` to ``[...]``.
        :param create_graph: differentiate through the gradients of the dynamics; by default
            where gradients are recorded at all.
        :param reverse_for: what the density depends on and needs a gradient, such as the
            parameters of a model: nothing of the trajectory is kept, and the backward pass finds
            each step again from its end. The memory does not grow with K, the gradient is the
            same, and training takes longer.
        """
        steps, alphas = self.step_sizes(), self.alphas()
        if reverse_for is not None:
            end = _Reversed.apply(logdensity_fn, z, momentum, steps, alphas, *reverse_for)
            return LeapfrogState(*end, logdensity_fn(end[0]), None)
        create_graph = torch.is_grad_enabled() if create_graph is None else create_graph
        evaluate = partial(value_and_grad, logdensity_fn, create_graph=create_graph)
        return _trajectory(evaluate, z, momentum, steps, alphas)


def _trajectory(
    evaluate: ValueAndGrad, z: Tensor, momentum: Tensor, steps: Tensor, alphas: Iterable
) -> LeapfrogState:
    state = LeapfrogState(z, momentum, *evaluate(z))
    for step_size, alpha in zip(steps, alphas, strict=True):
        state = leapfrog_step(state, evaluate, step_size)
        state = state._replace(momentum=alpha * state.momentum)
    return state


class _Reversed(torch.autograd.Function):
    """A trajectory that keeps its end alone: backwards, each step is undone, then differentiated.

    Undone: the momentum divided by alpha and turned round, a leapfrog step, turned round again.
    """

    @staticmethod
    def forward(
        ctx: Any, logdensity_fn: LogDensity, z: Tensor, momentum: Tensor, *learned: Tensor
    ) -> tuple[Tensor, Tensor]:
        end = _trajectory(partial(value_and_grad, logdensity_fn), z, momentum, *learned[:2])
        ctx.logdensity_fn, ctx.parameters = logdensity_fn, learned[2:]
        ctx.save_for_backward(*end[:2], *learned[:2])
        return end[:2]

    @staticmethod
    @argument_validation(False)
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, momentum, *learned = ctx.saved_tensors
        learned = [*(t.detach().requires_grad_() for t in learned), *ctx.parameters]
        total = [torch.zeros_like(t) for t in learned]
        evaluate = partial(value_and_grad, ctx.logdensity_fn)
        for k in reversed(range(len(learned[0]))):
            step, alpha = (t[k : k + 1].detach() for t in learned[:2])
            z, momentum, *_ = _trajectory(evaluate, z, -momentum / alpha, step, (-1.0,))
            with torch.enable_grad():
                step, alpha = (t[k : k + 1] for t in learned[:2])
                start = [t.detach().requires_grad_() for t in (z, momentum)]
                end = _trajectory(partial(evaluate, create_graph=True), *start, step, alpha)
                found = torch.autograd.grad(
                    end[:2], [*start, *learned], grads, materialize_grads=True
                )
            grads, total = found[:2], [a + b for a, b in zip(total, found[2:], strict=True)]
        return None, *grads, *total


@argument_validation(False)
def hvae_path(
    model: LatentVariableModel,
    q: Distribution,
    x: Tensor,
    num_samples: int,
    *,
    flow: HamiltonianFlow,
    reverse: bool = False,
    **options: bool,
) -> Path:
    r"""Hamiltonian importance sampling: log-weights, and where the trajectories end.

    :param q: reparameterisable, of batch shape ``[B]`` and event shape ``[D]``.
    :param x: observations, ``[B, P]``.
    :param num_samples: S.
    :param flow: the trajectory.
    :param reverse: find the trajectory again in the backward pass, by ``reverse_for`` of
        :meth:`HamiltonianFlow.forward`, so that memory does not grow with K.
    :param options: ``create_graph`` of that method. ``create_graph=False`` stops the gradients at
        those of the dynamics: cheaper, and not the gradient of the bound.
    :return: a :class:`Path`. Noise comes from the global stream.
    :raises ValueError: when S < 1 or the batch shapes of ``q`` and ``x`` differ.

    Source: Caterini, Doucet and Sejdinovic (2018), algorithm 1.
    """
    check_counts(num_samples=num_samples)
    check_proposal(q, x)
    logdensity_fn = partial(log_joint_fn(model), x)
    z0 = q.rsample((num_samples,))
    noise, alphas = torch.randn_like(z0), flow.alphas()
    if reverse:
        options["reverse_for"] = [p for p in as_model(model).parameters() if p.requires_grad]
    end = flow(z0, noise / alphas.prod(), logdensity_fn, **options)
    is_cut = options.get("create_graph") is False
    log_joint = logdensity_fn(end.z) if is_cut else end.logdensity
    momenta = 0.5 * (noise.square() - end.momentum.square()).sum(-1)
    log_weights = log_joint + momenta - q.log_prob(z0)
    return Path(log_weights, end.z, torch.zeros_like(log_weights), log_weights.new_empty(0))


def hvae_log_weights(
    model: LatentVariableModel,
    q: Distribution,
    x: Tensor,
    num_samples: int,
    *,
    flow: HamiltonianFlow,
    **options: bool,
) -> Tensor:
    """Log-weights ``[S, B]`` of :func:`hvae_path`, in nats; arguments and errors are the same.

    Their mean over S is a draw of the bound, their :func:`amortised.numerics.log_mean_exp` one of
    its importance-weighted form.

    >>> from amortised.models import LinearGaussian
    >>> model, x = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0), torch.tensor([[1.5]])
    >>> flow = HamiltonianFlow(1, 3, "paper", step_size=0.3, beta0=0.5)
    >>> log_weights = hvae_log_weights(model, model.prior().expand([1]), x, 20_000, flow=flow)
    >>> error = log_weights.exp().mean(0) / model.log_evidence(x).exp() - 1.0
    >>> bool(error.abs() < 0.05)
    True
    """
    return hvae_path(model, q, x, num_samples, flow=flow, **options).log_weights
