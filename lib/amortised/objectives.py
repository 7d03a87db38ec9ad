r"""Bounds on the evidence and the surrogates whose gradients train models and encoders.

Every function returns one value per example, in nats; the caller averages. Draws come from the
distribution ``q`` itself, hence from PyTorch's global random stream. ``model`` is anything with
``log_joint(x, z)``, or that :func:`amortised.models.as_model` accepts; layers such as dropout act
as in training, unless the caller has called ``model.eval()``.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from .models import LatentVariableModel, as_model, log_joint_fn
from .numerics import check_counts, log_mean_exp


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
    return log_joint_fn(model)(x, z) - q.log_prob(z)


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
    model, z = as_model(model), _reparameterised_samples(q, x, num_samples)
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
    # A weight of zero counts for nothing, also where all are: 0 times -inf is 0 here.
    normalised = torch.softmax(log_weights.detach(), dim=0).nan_to_num(nan=0.0)
    if z.requires_grad:  # the path through z is weighted once more, by the same weight
        z.register_hook(lambda grad: normalised.unsqueeze(-1) * grad)
    surrogate = torch.where(normalised > 0, normalised * log_weights, 0.0).sum(0)
    return log_mean_exp(log_weights.detach(), dim=0) + surrogate - surrogate.detach()


def qp_loss(model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int = 1) -> Tensor:
    r"""Reverse divergence: the negative :func:`elbo`, which trains the encoder and the model.

    .. math:: -\mathcal{L}(x) = \mathrm{KL}(q_\phi(\cdot \mid x) \,\|\, p_\theta(\cdot \mid x))
        - \log p_\theta(x)

    The latent is drawn from ``q`` and its gradient is taken through the draw, so ``q`` must be
    reparameterisable and the density :math:`p_\theta(x, z)` must be known.

    :return: ``[B]``, in nats; arguments and errors as in :func:`importance_log_weights`.

    Source: Kingma and Welling (2014); named as in Le (2017).

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> x = torch.tensor([[1.5]])
    >>> qp_loss(model, model.posterior(x), x).isclose(-model.log_evidence(x))
    tensor([True])
    """
    return -elbo(model, q, x, num_samples)


def pq_loss(encoder: Callable[[Tensor], Distribution], x: Tensor, z: Tensor) -> Tensor:
    r"""Forward divergence: the log-loss of the encoder on latents of known observations.

    .. math:: -\log q_\phi(z \mid x), \qquad
        \mathbb{E}_{p(z \mid x)}[-\log q_\phi(z \mid x)]
        = \mathrm{KL}(p(\cdot \mid x) \,\|\, q_\phi(\cdot \mid x)) + \mathrm{H}(p(\cdot \mid x))

    With :math:`(z, x)` from the model this is inference compilation, the sleep phase, neural
    posterior estimation. Only draws of the model are needed: no density, no reparameterisation, and
    z may be discrete or a whole program trace. The draws are data: the graph is cut at ``x`` and
    ``z``, so that no gradient reaches the model whose entropy would otherwise be "learned". That
    is why the argument is the encoder and not its output.

    :param encoder: maps ``[B, P]`` to a distribution of z (or any object with ``log_prob``).
    :param x: observations, ``[B, P]``.
    :param z: one latent for each observation, from :math:`p(z \mid x)`; ``[B, D]``.
    :return: ``[B]``, in nats.
    :raises ValueError: when ``x`` and ``z`` differ in their batch dimensions.

    Source: Le, Baydin and Wood (2017); Hinton et al. (1995).

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> x, z = torch.tensor([[1.0]]), torch.tensor([[0.5]])  # z at the posterior mean
    >>> pq_loss(model.posterior, x, z)  # log(pi) / 2
    tensor([0.5724], grad_fn=...)
    """
    if x.shape[:-1] != z.shape[:-1] or not x.numel():
        raise ValueError(
            "x and z must not be empty, and agree in their batch shape; got "
            f"{tuple(x.shape)} and {tuple(z.shape)}"
        )
    return -encoder(x.detach()).log_prob(z.detach())


def wake_phi_loss(
    model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int
) -> Tensor:
    r"""Reweighted wake-sleep, encoder: the pq loss at given observations.

    .. math:: -\sum_{k=1}^{K} \bar w_k \log q_\phi(z_k \mid x), \qquad z_k \sim q_\phi, \quad
        \bar w_k = \frac{w_k}{\sum_j w_j}, \quad w_k = \frac{p_\theta(x, z_k)}{q_\phi(z_k \mid x)}

    Self-normalised importance sampling replaces the draw from the posterior, with a bias of order
    1/K. Draws and weights carry no gradient, so ``q`` need not be reparameterisable, and no
    gradient reaches the model. For K = 1 the expected gradient is zero: nothing is learned.

    :return: ``[B]``, in nats; arguments and errors as in :func:`importance_log_weights`.

    Source: Bornschein and Bengio (2015), the wake-phase update of q.

    >>> from amortised.models import GaussianMixture
    >>> model = GaussianMixture(torch.ones(2), torch.tensor([-5.0, 5.0]), torch.ones(2), 10.0)
    >>> wake_phi_loss(model, model.prior().expand([3]), torch.zeros(3, 1), num_samples=10).shape
    torch.Size([3])
    """
    z, log_q = _fixed_samples(q, x, num_samples)
    with torch.no_grad():
        normalised = torch.softmax(log_joint_fn(model)(x, z) - log_q, dim=0).nan_to_num(nan=0.0)
    return -(normalised * q.log_prob(z)).sum(0)


def wake_theta_loss(
    model: LatentVariableModel, q: Distribution, x: Tensor, num_samples: int
) -> Tensor:
    r"""Reweighted wake-sleep, model: the negative importance-weighted bound at fixed draws.

    .. math:: -\log \frac{1}{K} \sum_{k=1}^{K} w_k, \qquad
        \text{with gradient } -\sum_k \bar w_k \nabla_\theta \log p_\theta(x, z_k)

    The gradient in the model's parameters is that of :func:`iwae_bound`, reversed in sign; none
    reaches ``q``, which need not be reparameterisable.

    :return: ``[B]``, in nats; arguments and errors as in :func:`importance_log_weights`.

    Source: Bornschein and Bengio (2015), the wake-phase update of p.

    >>> from amortised.models import GaussianMixture
    >>> model = GaussianMixture(torch.ones(2), torch.tensor([-5.0, 5.0]), torch.ones(2), 10.0)
    >>> x = torch.tensor([[7.0]])
    >>> wake_theta_loss(model, model.posterior(x), x, 3).isclose(-model.log_evidence(x))
    tensor([True])
    """
    z, log_q = _fixed_samples(q, x, num_samples)
    return -log_mean_exp(log_joint_fn(model)(x, z) - log_q, dim=0)


def score_function_surrogate(log_weights: Tensor, log_q: Tensor, baseline: bool = True) -> Tensor:
    r"""The ELBO, with a gradient that needs no reparameterisation of the draws in ``log_q``.

    .. math:: \frac{1}{K} \sum_{k=1}^{K} (f_k - b_k) \nabla_\phi \log q_\phi(c_k)
        + \nabla f_k, \qquad f_k = \log w_k, \quad b_k = \frac{1}{K - 1} \sum_{j \ne k} f_j

    Known as REINFORCE. The baseline :math:`b_k`, the mean of the *other* samples, is independent of
    :math:`c_k`: it removes variance and adds no bias. What remains of :math:`f_k` may hold
    reparameterised variables, whose gradient follows the path as usual.

    :param log_weights: :math:`f_k`, ``[K, B]``, in nats.
    :param log_q: log-probabilities of the draws :math:`c_k` that are not reparameterised,
        ``[K, B]``, with their graph.
    :param baseline: subtract the leave-one-out mean; needs K of at least 2.
    :return: ``[B]``, in nats: the mean of ``log_weights``.
    :raises ValueError: when the shapes differ, or K is too small for the baseline.

    Source: Williams (1992); the leave-one-out baseline, Kool, van Hoof and Welling (2019).

    >>> logits = torch.zeros(1, requires_grad=True)
    >>> log_q = torch.stack([logits, -logits]).sigmoid().log()  # draws c = 1 and c = 0
    >>> f = torch.tensor([[3.0], [1.0]])
    >>> score_function_surrogate(f, log_q).sum().backward()
    >>> logits.grad  # q(1) q(0) (f(1) - f(0)) = 0.5, twice: the two draws differ
    tensor([1.])
    """
    if log_weights.shape != log_q.shape:
        raise ValueError(
            "log_weights and log_q must both be [K, B]; got shapes "
            f"{tuple(log_weights.shape)} and {tuple(log_q.shape)}"
        )
    num_samples = log_weights.shape[0]
    signal = log_weights.detach()
    if baseline:
        if num_samples < 2:
            raise ValueError(f"the baseline needs at least 2 samples; got {num_samples}")
        signal = (signal - signal.mean(0)) * num_samples / (num_samples - 1)
    surrogate = (signal * log_q).mean(0)
    return log_weights.mean(0) + surrogate - surrogate.detach()


def _reparameterised_samples(q: Distribution, x: Tensor, num_samples: int) -> Tensor:
    check_counts(num_samples=num_samples)
    check_proposal(q, x)
    return q.rsample((num_samples,))


def _fixed_samples(q: Distribution, x: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """Draws ``[K, B, D]`` from q and their log-densities ``[K, B]``, both without a graph."""
    check_counts(num_samples=num_samples)
    check_proposal(q, x)
    with torch.no_grad():
        z = q.sample((num_samples,))
        return z, q.log_prob(z)


def check_proposal(q: Distribution, x: Tensor) -> None:
    """Check that there are observations, and one distribution for each.

    :param q: of batch shape ``[B]``.
    :param x: observations, ``[B, P]``.
    :raises ValueError: when there is none, or q is no distribution or one of another batch shape.

    >>> check_proposal(torch.zeros(5, 2), torch.zeros(5, 784))
    Traceback (most recent call last):
        ...
    ValueError: q must be a distribution with a density; a Tensor is none
    """
    has_draws = hasattr(q, "sample") or hasattr(q, "rsample")
    has_parts = has_draws and hasattr(q, "log_prob") and hasattr(q, "batch_shape")
    if not has_parts or type(q).log_prob is Distribution.log_prob:
        raise ValueError(f"q must be a distribution with a density; a {type(q).__name__} is none")
    if q.batch_shape != x.shape[:-1] or not x.numel():
        raise ValueError(
            "q must have one distribution per observation, and at least one: its batch shape is "
            f"{tuple(q.batch_shape)}, and x has shape {tuple(x.shape)}"
        )


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
    return log_joint_fn(model)(x, z) - fixed.log_prob(z), z


def _held_fixed(q: Distribution) -> Distribution:
    """A copy of ``q`` whose parameter tensors are detached."""
    fixed = copy.copy(q)
    for name, value in vars(q).items():
        if isinstance(value, Tensor):
            fixed.__dict__[name] = value.detach()
        elif isinstance(value, Distribution):
            fixed.__dict__[name] = _held_fixed(value)
    return fixed
