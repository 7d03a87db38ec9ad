r"""Bounds on the evidence and the surrogates whose gradients train models and encoders.

Every function returns one value per example, in nats; the caller averages. Draws come from the
distribution ``q`` itself, hence from PyTorch's global random stream. ``model`` is anything with
``log_joint(x, z)`` and, where the KL divergence is taken analytically, ``prior()`` and
``log_likelihood(x, z)``.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from .models import LatentVariableModel
from .numerics import log_mean_exp

__all__ = [
    "dreg_surrogate",
    "elbo",
    "importance_log_weights",
    "iwae_bound",
    "stl_surrogate",
]


def importance_log_weights(
    model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int
) -> Tensor:
    r"""Log importance weights of samples from the approximate posterior.

    .. math:: \log w_k = \log p_\theta(x, z_k) - \log q(z_k), \qquad z_k \sim q(z \mid x)

    :math:`w_k` is an unbiased estimate of :math:`p_\theta(x)`. Gradients flow to the model and, by
    reparameterisation, to the parameters of ``q``.

    :param q: approximate posterior of batch shape ``[B]`` and event shape ``[D]``.
    :param x: observations, ``[B, P]``.
    :param num_samples: K.
    :return: ``[K, B]``, in nats.
    :raises ValueError: when K < 1 or the batch shapes of ``q`` and ``x`` differ.
    """
    z = _reparameterised_samples(q, x, num_samples)
    return model.log_joint(x, z) - q.log_prob(z)


def elbo(
    model: LatentVariableModel,
    q: Distribution,
    x: Tensor,
    num_samples: int = 1,
    analytic_kl: bool = False,
) -> Tensor:
    r"""Evidence lower bound, estimated with ``num_samples`` reparameterised draws.

    .. math::

        \mathcal{L}(x) = \mathbb{E}_{q}[\log p_\theta(x, z) - \log q(z)]
        = \log p_\theta(x) - \mathrm{KL}(q \,\|\, p_\theta(z \mid x))

    :param analytic_kl: use
        :math:`\mathbb{E}_q \log p_\theta(x \mid z) - \mathrm{KL}(q \,\|\, p(z))`
        with the divergence in closed form: same expectation, usually less variance away from the
        posterior, but not zero variance at it.
    :return: ``[B]``, in nats; other arguments and errors as in :func:`importance_log_weights`.

    Source: Kingma and Welling (2014), equations 2 and 3.

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> x = torch.tensor([[1.5]])
    >>> elbo(model, model.posterior(x), x).isclose(model.log_evidence(x))
    tensor([True])
    """
    if not analytic_kl:
        return importance_log_weights(model, q, x, num_samples).mean(0)
    z = _reparameterised_samples(q, x, num_samples)
    return model.log_likelihood(x, z).mean(0) - kl_divergence(q, model.prior())


def iwae_bound(model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int) -> Tensor:
    r"""Importance-weighted lower bound with K samples.

    .. math::

        \mathcal{L}_K(x) = \mathbb{E}\Big[\log \tfrac{1}{K} \sum_{k=1}^{K} w_k\Big], \qquad
        \mathcal{L}_1 = \mathcal{L} \le \mathcal{L}_K \le \mathcal{L}_{K+1} \le \log p_\theta(x)

    The gap is close to :math:`\mathrm{Var}(w / p_\theta(x)) / 2K` where that variance is finite.

    :return: one draw of the bound for each example, ``[B]``, in nats; arguments and errors as in
        :func:`importance_log_weights`.

    Source: Burda, Grosse and Salakhutdinov (2016), equation 8 and theorem 1.
    """
    return log_mean_exp(importance_log_weights(model, q, x, num_samples), dim=0)


def stl_surrogate(
    model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int = 1
) -> Tensor:
    r"""The importance-weighted bound with the score of ``q`` removed from its gradient.

    Its value is that of :func:`iwae_bound` (for K = 1, of the ELBO). Its gradient in the parameters
    of ``q`` follows only the path through z,

    .. math:: \sum_k \bar w_k \,
        \frac{\partial \log w_k}{\partial z_k} \frac{\partial z_k}{\partial \phi},

    because :math:`\log q` is evaluated with its parameters held fixed. For K = 1 the dropped term
    has mean zero: the gradient is unbiased and vanishes sample by sample where q is the posterior
    ("sticking the landing"). For K > 1 it is biased; :func:`dreg_surrogate` is the remedy. The
    gradient in the model's parameters is unchanged.

    :return: ``[B]``, in nats; arguments and errors as in :func:`importance_log_weights`.
    :raises TypeError: when the parameters of ``q`` cannot be held fixed.

    Source: Roeder, Wu and Duvenaud (2017).
    """
    log_weights, _ = _path_log_weights(model, q, x, num_samples)
    return log_mean_exp(log_weights, dim=0)


def dreg_surrogate(
    model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int
) -> Tensor:
    r"""The importance-weighted bound with the doubly reparameterised gradient for ``q``.

    Its value is that of :func:`iwae_bound`; its gradient in the model's parameters is that bound's
    gradient; and its gradient in the parameters of ``q`` is

    .. math:: \sum_k \bar w_k^2 \,
        \frac{\partial \log w_k}{\partial z_k} \frac{\partial z_k}{\partial \phi},
        \qquad \bar w_k = \frac{w_k}{\sum_j w_j},

    which is unbiased for :math:`\nabla_\phi \mathcal{L}_K`, vanishes sample by sample at the
    posterior, and whose signal-to-noise ratio does not fall with K. For K = 1 it equals
    :func:`stl_surrogate`.

    :return: ``[B]``, in nats; arguments and errors as in :func:`importance_log_weights`.
    :raises TypeError: when the parameters of ``q`` cannot be held fixed.

    Source: Tucker, Lawson, Gu and Maddison (2019), equation 8.
    """
    log_weights, z = _path_log_weights(model, q, x, num_samples)
    normalised = torch.softmax(log_weights.detach(), dim=0)
    if z.requires_grad:  # the path through z is weighted once more, by the same weight
        z.register_hook(lambda grad: normalised.unsqueeze(-1) * grad)
    surrogate = (normalised * log_weights).sum(0)
    return log_mean_exp(log_weights.detach(), dim=0) + surrogate - surrogate.detach()


def _reparameterised_samples(q: Distribution, x: Tensor, num_samples: int) -> Tensor:
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1; got {num_samples}")
    if q.batch_shape != x.shape[:-1]:
        raise ValueError(
            "q must have one distribution per observation: its batch shape is "
            f"{tuple(q.batch_shape)}, and x has shape {tuple(x.shape)}"
        )
    return q.rsample((num_samples,))


def _path_log_weights(
    model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int
) -> tuple[Tensor, Tensor]:
    """Log-weights ``[K, B]`` whose gradient reaches ``q`` only through z, and z ``[K, B, D]``."""
    z = _reparameterised_samples(q, x, num_samples)
    fixed = _held_fixed(q)
    if fixed.log_prob(z.detach()).requires_grad:
        raise TypeError(
            f"the parameters of {type(q).__name__} cannot be held fixed; use a distribution whose "
            "parameters are plain tensors, such as Normal or MultivariateNormal"
        )
    return model.log_joint(x, z) - fixed.log_prob(z), z


def _held_fixed(q: Distribution) -> Distribution:
    """A copy of ``q`` whose parameter tensors are detached."""
    fixed = copy.copy(q)
    for name, value in vars(q).items():
        if isinstance(value, Tensor):
            fixed.__dict__[name] = value.detach()
        elif isinstance(value, Distribution):
            fixed.__dict__[name] = _held_fixed(value)
    return fixed
