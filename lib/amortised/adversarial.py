r"""Density-ratio games and a kernel distance: how to match laws that can only be sampled.

A *student* :math:`q_\phi(z \mid x)` and a *teacher* give samples of z for each observation x, and
neither has a density. A discriminator :math:`D_\psi(x, z)` tells them apart; its optimum is a
log-ratio of densities, and the student follows its gradient. Everything here is conditional on x: a
discriminator that saw z alone would match only the average over images.

Discriminators enter as callables ``(x [B, P], z [..., B, D]) -> [..., B]``. Losses average over the
samples of an observation and return one value for each. Which parameters a loss trains is decided
where it is descended (:func:`amortised.amc.descend`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from .encoders import conv_trunk
from .models import LatentVariableModel, log_joint_fn
from .numerics import check_counts, is_capturing, value_and_grad

Critic = Callable[[Tensor, Tensor], Tensor]

MIN_MMD_SAMPLES = 8


class Discriminator(nn.Module):
    r"""The book's discriminator :math:`D_\psi(x, z)`, one logit for each pair.

    A trunk of its own for x; its features next to z; two hidden layers. Leaky rectifiers of slope
    0.2 throughout.

    :param latent_dim: D.
    :param trunk: module that maps ``[B, P]`` to ``[B, num_features]``; by default
        :func:`amortised.encoders.conv_trunk` with leaky rectifiers, for 28 x 28 images.
    :param num_features: width of the trunk's output.
    :param num_hidden: width of the two hidden layers.

    Source: the widths are an assumption; the talk of Li, Turner and Liu (2017) gives none.

    >>> discriminator = Discriminator(latent_dim=32)
    >>> discriminator(torch.zeros(5, 784), torch.zeros(8, 5, 32)).shape
    torch.Size([8, 5])
    """

    def __init__(
        self,
        latent_dim: int = 32,
        trunk: nn.Module | None = None,
        num_features: int = 500,
        num_hidden: int = 500,
    ):
        super().__init__()
        self.trunk = conv_trunk(num_features, negative_slope=0.2) if trunk is None else trunk
        self.head = nn.Sequential(
            nn.Linear(num_features + latent_dim, num_hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(num_hidden, num_hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(num_hidden, 1),
        )

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """The logit of each pair; the trunk runs once for all samples of z.

        :param x: observations, ``[B, P]``.
        :param z: latents, ``[..., B, D]``.
        :return: ``[..., B]``.
        """
        features = self.trunk(x)
        features = features.expand(*z.shape[:-1], features.shape[-1])
        return self.head(torch.cat([features, z], dim=-1)).squeeze(-1)


# --- the original game ---------------------------------------------------------------------------


def discriminator_loss(
    discriminator: Critic, x: Tensor, z_teacher: Tensor, z_student: Tensor
) -> Tensor:
    r"""Logistic regression of teacher against student.

    .. math::

        \mathbb{E}_{q_T}[\mathrm{softplus}(-D(x, z))]
        + \mathbb{E}_{q}[\mathrm{softplus}(D(x, z))],
        \qquad D^*(x, z) = \log q_T(z \mid x) - \log q(z \mid x)

    Both samples are data here: the graph is cut at z. At the optimum the loss is :math:`2 \log 2`
    minus twice the Jensen-Shannon divergence, so :math:`2 \log 2 = 1.386` means "cannot tell".

    :param discriminator: D, ``(x, z) -> logits``.
    :param x: observations, ``[B, P]``.
    :param z_teacher: samples of the teacher, ``[..., B, D]``.
    :param z_student: samples of the student, ``[..., B, D]``; their numbers may differ.
    :return: ``[B]``, in nats.

    Source: Goodfellow et al. (2014).

    >>> discriminator_loss(lambda x, z: z.sum(-1), torch.zeros(1, 1), torch.zeros(1, 1),
    ...                    torch.zeros(1, 1))
    tensor([1.3863])
    """
    teacher = F.softplus(-discriminator(x, z_teacher.detach()))
    student = F.softplus(discriminator(x, z_student.detach()))
    return _mean_over_samples(teacher) + _mean_over_samples(student)


def generator_loss(discriminator: Critic, x: Tensor, z_student: Tensor) -> Tensor:
    r"""What the student descends, the discriminator held fixed: the non-saturating loss.

    .. math:: \mathbb{E}_{q_\phi}[\mathrm{softplus}(-D(x, z))]

    Its gradient reaches :math:`\phi` through z alone. It does not vanish where the discriminator is
    sure of itself, as that of :math:`-\mathrm{softplus}(D)` does.

    :param z_student: samples of the student with their graph, ``[..., B, D]``.
    :return: ``[B]``; other arguments as in :func:`discriminator_loss`.

    Source: Goodfellow et al. (2014), section 3.

    >>> z = torch.zeros(1, 1, requires_grad=True)
    >>> generator_loss(lambda x, z: z.sum(-1), torch.zeros(1, 1), z).sum().backward()
    >>> z.grad
    tensor([[-0.5000]])
    """
    return _mean_over_samples(F.softplus(-discriminator(x, z_student)))


def relativistic_loss(discriminator: Critic, x: Tensor, z_above: Tensor, z_below: Tensor) -> Tensor:
    r"""The relativistic game on pairs of samples of one observation.

    .. math:: \mathbb{E}\big[\mathrm{softplus}\big(-[D(x, z) - D(x, z')]\big)\big]

    over all pairs of a sample z that should score higher and one, z', that should score lower. The
    discriminator sets the teacher above the student; the student, in its turn, its own samples
    above the teacher's. What D adds for all z of an x cancels. Where the laws are equal no D does
    better than :math:`\log 2`.

    :param z_above: ``[M, B, D]``.
    :param z_below: ``[K, B, D]``. No graph is cut: detach what is data.
    :return: ``[B]``, in nats; other arguments as in :func:`discriminator_loss`.

    Source: Jolicoeur-Martineau (2019), the relativistic standard loss.

    >>> relativistic_loss(lambda x, z: z.sum(-1), torch.zeros(1, 1), torch.zeros(2, 1, 1),
    ...                   torch.zeros(3, 1, 1))
    tensor([0.6931])
    """
    difference = discriminator(x, z_above).unsqueeze(1) - discriminator(x, z_below)
    return F.softplus(-difference).mean((0, 1))


# --- discriminators that know more ---------------------------------------------------------------


class StudentMoments(NamedTuple):
    """What a :class:`InformedDiscriminator` knows of the student at each observation.

    :ivar contrast: the Gaussian with the student's moments, of batch shape ``[B]``.
    :ivar energies: the student's means of log p(x|z) and of the squared norm of z, ``[2, B]``.
    """

    contrast: Independent
    energies: Tensor


@torch.no_grad()
def student_moments(x: Tensor, z: Tensor, log_likelihood_fn: Critic) -> StudentMoments:
    """Moments of the student from samples of it, without graph.

    :param x: observations, ``[B, P]``.
    :param z: samples of the student, ``[K, B, D]``, K some tens; others than those that are told
        apart.
    :param log_likelihood_fn: log p(x|z), ``(x, z) -> [..., B]``.

    >>> z = torch.tensor([[[1.0]], [[3.0]]])
    >>> moments = student_moments(torch.zeros(1, 1), z, lambda x, z: -z.sum(-1))
    >>> moments.contrast.mean, moments.energies
    (tensor([[2.]]), tensor([[-2.],
            [ 5.]]))
    """
    return StudentMoments(adaptive_contrast(z), _energies(x, z, log_likelihood_fn).mean(1))


def standardised_features(z: Tensor, contrast: Independent) -> Tensor:
    r"""A sample in the student's own coordinates, and the squares of these.

    .. math:: t = \frac{z - m(x)}{s(x)}, \qquad \tfrac12 (t^2 - 1)

    For a student :math:`\mathcal{N}(m, s^2)` and a teacher
    :math:`\mathcal{N}(m + \delta s, (\rho s)^2)`, coordinate by coordinate,
    :math:`\log q_T - \log q` is linear in them, with coefficients that know neither m nor s.

    :param z: latents, ``[..., B, D]``.
    :param contrast: the Gaussian with the student's moments, as of :func:`adaptive_contrast`.
    :return: ``[..., B, 2 D]``.

    >>> contrast = Independent(Normal(torch.ones(1, 1), 2.0), 1)
    >>> standardised_features(torch.tensor([[5.0]]), contrast)
    tensor([[2.0000, 1.5000]])
    """
    t = _standardised(z, contrast)
    return torch.cat([t, 0.5 * (t.square() - 1.0)], dim=-1)


class InformedDiscriminator(nn.Module):
    r"""A discriminator that is told the energy of z, and possibly the student's moments.

    .. math:: D(x, z) = f_\psi(x, z) + a \frac{\log p(x \mid z)}{P_0} + b \frac{\|z\|^2}{2 D} + c

    with a, b, c learned from 0. The teacher moves along the gradient of
    :math:`\log p(x \mid z) - \tfrac12 \|z\|^2`, so these terms have the shape of much of
    :math:`\log q_T - \log q`, and the network need not find it in the pixels.

    With the student's moments the network sees the :func:`standardised_features` in place of z, and
    the two energies are counted from the student's means at x. A discriminator of z itself must
    first learn where the student lies and how wide it is at each x, and until then it is blind to a
    student of half the width.

    :param network: :math:`f_\psi`, such as a :class:`Discriminator` of ``latent_dim`` D, or 2 D
        where moments are given.
    :param likelihood_scale: :math:`P_0`, in nats.

    The weights a, b, c are the parameter ``weights``, which may have a learning rate of its own
    (``2e-2`` beside ``5e-4`` for the network).

    Source: prior and energy terms in a discriminator, and the student's coordinates (adaptive
    contrast): Mescheder, Nowozin and Geiger (2017), sections 3.1 and 3.3.

    >>> discriminator = InformedDiscriminator(Discriminator(latent_dim=2))
    >>> x, z = torch.zeros(5, 784), torch.zeros(8, 5, 2)
    >>> discriminator(x, z, log_likelihood_fn=lambda x, z: -z.square().sum(-1)).shape
    torch.Size([8, 5])
    """

    def __init__(self, network: nn.Module, likelihood_scale: float = 50.0):
        super().__init__()
        self.network, self.likelihood_scale = network, likelihood_scale
        self.weights = nn.Parameter(torch.zeros(3))

    def forward(
        self, x: Tensor, z: Tensor, log_likelihood_fn: Critic, moments: StudentMoments | None = None
    ) -> Tensor:
        """The logit of each pair, ``[..., B]``.

        :param x: observations, ``[B, P]``.
        :param z: latents, ``[..., B, D]``.
        :param log_likelihood_fn: log p(x|z), ``(x, z) -> [..., B]``; the model's method, whose
            parameters are not those of the discriminator.
        :param moments: of the student at x.
        """
        log_likelihood, squared_norm = _energies(x, z, log_likelihood_fn)
        (a, b, c), latent_dim = self.weights, z.shape[-1]
        if moments is not None:
            log_likelihood = log_likelihood - moments.energies[0]
            squared_norm = squared_norm - moments.energies[1]
            z = standardised_features(z, moments.contrast)
        known = a * log_likelihood / self.likelihood_scale + b * squared_norm / (2 * latent_dim) + c
        return self.network(x, z) + known


def _energies(x: Tensor, z: Tensor, log_likelihood_fn: Critic) -> Tensor:
    """log p(x|z) and the squared norm of z, ``[2, ..., B]``."""
    return torch.stack([log_likelihood_fn(x, z), z.square().sum(-1)])


# --- the Wasserstein game ------------------------------------------------------------------------


def critic_loss(
    critic: Critic, x: Tensor, z_teacher: Tensor, z_student: Tensor, penalty_weight: float = 10.0
) -> Tensor:
    r"""The critic's loss in the Wasserstein game, for each observation.

    .. math:: \mathbb{E}_{q}[D(x, z)] - \mathbb{E}_{q_T}[D(x, z)] + \lambda\, P(x)

    with the penalty of :func:`gradient_penalty`. Were D held to slope 1 in z, the largest
    difference of the means would be the distance :math:`W_1(q(\cdot \mid x), q_T(\cdot \mid x))`.

    :param penalty_weight: :math:`\lambda`.
    :return: ``[B]``, in units of z; other arguments as in :func:`discriminator_loss`, with as many
        samples of the teacher as of the student.

    Source: Gulrajani et al. (2017), equation 3.

    >>> def critic(x, z): return z.sum(-1)
    >>> critic_loss(critic, torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1))
    tensor([-1.])
    """
    difference = critic(x, z_student.detach()) - critic(x, z_teacher.detach())
    penalty = gradient_penalty(critic, x, z_teacher, z_student)
    return _mean_over_samples(difference) + penalty_weight * penalty


def gradient_penalty(critic: Critic, x: Tensor, z_teacher: Tensor, z_student: Tensor) -> Tensor:
    r"""How far the critic is from slope one *in z, at fixed x*, on lines from student to teacher.

    .. math:: \mathbb{E}\big[(\|\nabla_z D(x, \tilde z)\| - 1)^2\big], \qquad
        \tilde z = u z_T + (1 - u) z_0, \quad u \sim \mathrm{Uniform}(0, 1)

    :return: ``[B]``, with its graph to the critic's parameters; arguments as in
        :func:`critic_loss`.
    :raises ValueError: when the two samples do not have the same shape.

    Source: Gulrajani et al. (2017), section 4.

    >>> gradient_penalty(lambda x, z: 3 * z.sum(-1), torch.zeros(2, 1), torch.ones(2, 1),
    ...                  torch.zeros(2, 1))
    tensor([4., 4.])
    """
    if z_teacher.shape != z_student.shape:
        raise ValueError(
            "the gradient penalty pairs samples of teacher and student: their shapes are "
            f"{tuple(z_teacher.shape)} and {tuple(z_student.shape)}, and must be equal"
        )
    u = torch.rand_like(z_teacher[..., :1])
    between = torch.lerp(z_student.detach(), z_teacher.detach(), u).requires_grad_(True)
    _, grad = value_and_grad(lambda z: critic(x, z), between, create_graph=True)
    return _mean_over_samples((torch.linalg.vector_norm(grad, dim=-1) - 1.0).square())


def critic_student_loss(critic: Critic, x: Tensor, z_student: Tensor) -> Tensor:
    r"""What the student descends in the Wasserstein game, :math:`-\mathbb{E}_{q_\phi}[D(x, z)]`.

    :return: ``[B]``; arguments as in :func:`generator_loss`.

    Source: Arjovsky, Chintala and Bottou (2017).

    >>> critic_student_loss(lambda x, z: z.sum(-1), torch.zeros(1, 1), torch.ones(1, 2))
    tensor([-2.])
    """
    return -_mean_over_samples(critic(x, z_student))


# --- a distance without a game -------------------------------------------------------------------


def mmd_squared(
    z_student: Tensor, z_teacher: Tensor, bandwidth: float | Tensor | None = None
) -> Tensor:
    r"""Squared maximum mean discrepancy between two samples of each observation, unbiased.

    .. math::

        \widehat{\mathrm{MMD}}^2 &= \frac{1}{K (K - 1)} \sum_{i \ne j} k(z_i, z_j)
        + \frac{1}{M (M - 1)} \sum_{i \ne j} k(z'_i, z'_j)
        - \frac{2}{K M} \sum_{i, j} k(z_i, z'_j)

        k(a, b) &= \frac13 \sum_{c \in \{1/4, 1, 4\}} \exp\Big(-\frac{\|a - b\|^2}{2 c h^2}\Big)

    Being unbiased, it may be negative; for equal laws its mean is zero. The bandwidth h is the
    median distance within the pooled sample (:func:`median_bandwidth`) unless it is given. A
    bandwidth read off the pooled sample keeps the mean at zero for equal laws, because both then
    enter alike; "unbiased" for other laws refers to a bandwidth fixed beforehand.

    :param z_student: ``[K, B, D]``, K at least 8, with its graph.
    :param z_teacher: ``[M, B, D]``, M at least 8; the graph is cut.
    :param bandwidth: h, a number or ``[B]``.
    :return: ``[B]``.
    :raises ValueError: for fewer samples, or other shapes, or a bandwidth that is not positive.

    Source: Gretton et al. (2012), equation 3.

    >>> z = torch.arange(8.0).reshape(8, 1, 1)
    >>> mmd_squared(z, z + 100.0) > 0.5
    tensor([True])
    """
    if z_student.ndim != 3 or z_student.shape[1:] != z_teacher.shape[1:]:
        raise ValueError(
            "mmd_squared compares samples [K, B, D] and [M, B, D]; got shapes "
            f"{tuple(z_student.shape)} and {tuple(z_teacher.shape)}"
        )
    numbers = {"num_student_samples": len(z_student), "num_teacher_samples": len(z_teacher)}
    check_counts(minimum=MIN_MMD_SAMPLES, **numbers)
    z_teacher = z_teacher.detach()
    if bandwidth is None:
        bandwidth = median_bandwidth(z_student, z_teacher)
    bandwidth = torch.as_tensor(bandwidth, dtype=z_student.dtype, device=z_student.device)
    if not is_capturing() and not (bandwidth > 0).all():
        raise ValueError(f"bandwidth must be positive; got a smallest value of {bandwidth.min()}")
    own = _mean_of_pairs(z_student, bandwidth) + _mean_of_pairs(z_teacher, bandwidth)
    return own - 2.0 * _kernel(z_student, z_teacher, bandwidth).mean((0, 1))


def median_bandwidth(z_student: Tensor, z_teacher: Tensor) -> Tensor:
    """Median distance between different points of the pooled sample, for each observation.

    :param z_student: ``[K, B, D]``.
    :param z_teacher: ``[M, B, D]``.
    :return: ``[B]``, without graph.

    >>> z = torch.tensor([0.0, 1.0, 3.0, 6.0]).reshape(4, 1, 1)
    >>> median_bandwidth(z[:2], z[2:])  # of 1, 2, 3, 3, 5, 6
    tensor([3.])
    """
    pooled = torch.cat([z_student, z_teacher]).detach()
    row, column = torch.triu_indices(len(pooled), len(pooled), offset=1, device=pooled.device)
    return _squared_distances(pooled, pooled)[row, column].median(0).values.sqrt()


def _kernel(a: Tensor, b: Tensor, bandwidth: Tensor) -> Tensor:
    exponent = -_squared_distances(a, b) / (2.0 * bandwidth.square())
    return torch.stack([(exponent / scale).exp() for scale in (0.25, 1.0, 4.0)]).mean(0)


def _mean_of_pairs(z: Tensor, bandwidth: Tensor) -> Tensor:
    """Mean of k over different points of one sample; on the diagonal k is 1."""
    return (_kernel(z, z, bandwidth).sum((0, 1)) - len(z)) / (len(z) * (len(z) - 1))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return (a.unsqueeze(1) - b.unsqueeze(0)).square().sum(-1)


# --- adversarial variational Bayes ---------------------------------------------------------------


def avb_logits(
    discriminator: Critic, x: Tensor, z: Tensor, contrast: Independent | None = None
) -> Tensor:
    r"""Logits that compare the student with a Gaussian r, in the coordinates of r.

    .. math:: S(x, z) = D(x, \tilde z) + \tfrac12 \|\tilde z\|^2, \quad
        \tilde z = \frac{z - \mu}{s}, \qquad S^*(x, z) = \log q(z \mid x) - \log r(z \mid x)

    The second term is known, so that D need only learn :math:`\log q` up to a constant. Without a
    contrast r is :math:`\mathcal{N}(0, I)`, the prior, and :math:`\tilde z = z`.

    :param discriminator: D, ``(x, z) -> logits``.
    :param x: observations, ``[B, P]``.
    :param z: latents, ``[..., B, D]``.
    :param contrast: r, a diagonal Gaussian, such as :func:`adaptive_contrast` makes.
    :return: ``[..., B]``.

    Source: Mescheder, Nowozin and Geiger (2017), who write T for S.

    >>> avb_logits(lambda x, z: z[..., 0], torch.zeros(1, 1), torch.tensor([[1.0, 2.0]]))
    tensor([3.5000])
    """
    z = _standardised(z, contrast)
    return discriminator(x, z) + 0.5 * z.square().sum(-1)


def avb_discriminator_loss(
    discriminator: Critic, x: Tensor, z: Tensor, contrast: Independent | None = None
) -> Tensor:
    r"""Logistic regression of the student against as many draws of r.

    .. math::

        \mathbb{E}_{q}[\mathrm{softplus}(-S(x, z))] + \mathbb{E}_{r}[\mathrm{softplus}(S(x, z))]

    It is :func:`discriminator_loss` with S in place of D, the student in place of the teacher, and
    r in place of the student.

    :param z: samples of the student, ``[..., B, D]``; the graph is cut.
    :return: ``[B]``, in nats; other arguments as in :func:`avb_logits`.

    Source: Mescheder, Nowozin and Geiger (2017), section 3.1.

    >>> x, z = torch.zeros(1, 1), torch.zeros(1, 2)
    >>> avb_discriminator_loss(lambda x, z: -0.5 * z.square().sum(-1), x, z)  # S = 0
    tensor([1.3863])
    """
    # Standardised, the student meets N(0, I) whatever the contrast is.
    z = _standardised(z.detach(), contrast)
    return discriminator_loss(partial(avb_logits, discriminator), x, z, torch.randn_like(z))


def avb_loss(
    model: LatentVariableModel,
    discriminator: Critic,
    x: Tensor,
    z: Tensor,
    contrast: Independent | None = None,
) -> Tensor:
    r"""What student and decoder descend together, the discriminator held fixed.

    .. math:: \mathbb{E}_{q_\phi}[S(x, z) + \log r(z \mid x) - \log p_\theta(x, z)]

    For the contrast :math:`r = p(z)` this is :math:`\mathbb{E}[S - \log p_\theta(x \mid z)]`. With
    the optimal S it is the negative ELBO, and the gradient of :math:`S^*` in :math:`\phi` at fixed
    z has mean zero, so the path through z is all that is needed. With any other S it bounds
    nothing: evaluate the model by annealing.

    :param z: samples of the student with their graph, ``[..., B, D]``.
    :return: ``[B]``, in nats; other arguments as in :func:`avb_logits`.

    Source: Mescheder, Nowozin and Geiger (2017), section 3.1, and section 3.3 for the contrast.

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> x, z = torch.tensor([[1.5]]), torch.tensor([[0.3]])
    >>> def optimal(x, z): return model.posterior(x).log_prob(z) + 0.9189  # less log p(z)
    >>> (avb_loss(model, optimal, x, z) + model.log_evidence(x)).abs() < 1e-4
    tensor([True])
    """
    log_contrast = (contrast or _standard_normal(z)).log_prob(z)
    logits = avb_logits(discriminator, x, z, contrast)
    return _mean_over_samples(logits + log_contrast - log_joint_fn(model)(x, z))


def adaptive_contrast(z: Tensor) -> Independent:
    r"""The Gaussian with the student's own moments, to which its density is compared.

    .. math:: r(z \mid x) = \mathcal{N}(z;\, \mu(x), \mathrm{diag}\, s(x)^2), \qquad
        s^2 = \mathrm{Var}_q[z] + 10^{-4}

    Against the prior a sharp posterior is told apart too easily, and the discriminator learns
    nothing of its shape. The moments are those of the samples, held fixed.

    :param z: samples of the student, ``[K, B, D]``, K at least 2 and better some tens, since the
        same samples are then standardised with their own moments.
    :return: r, of batch shape ``[B]`` and event shape ``[D]``.
    :raises ValueError: when z is not ``[K, B, D]`` with K at least 2.

    Source: Mescheder, Nowozin and Geiger (2017), section 3.3, and the constant of their code.

    >>> adaptive_contrast(torch.tensor([[[1.0]], [[3.0]]])).mean
    tensor([[2.]])
    """
    check_counts(minimum=2, num_samples=len(z) if z.ndim == 3 else 1)
    z = z.detach()
    return Independent(Normal(z.mean(0), (z.var(0) + 1e-4).sqrt()), 1)


def _standard_normal(z: Tensor) -> Independent:
    return Independent(Normal(z.new_zeros(z.shape[-1]), z.new_ones(z.shape[-1])), 1)


def _standardised(z: Tensor, contrast: Independent | None) -> Tensor:
    return z if contrast is None else (z - contrast.base_dist.loc) / contrast.base_dist.scale


def _mean_over_samples(values: Tensor) -> Tensor:
    """``[..., B] -> [B]``."""
    return values.reshape(-1, values.shape[-1]).mean(0)
