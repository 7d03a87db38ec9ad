r"""Missing pixels: imputation with an encoder, its two scores, and the law it should follow.

A mask is a boolean tensor, True where a pixel is *missing*: :math:`x = (x_o, x_m)`, observed and
missing. The model's own answer is the conditional law

.. math:: p(x_m \mid x_o) = \int p(x_m \mid z)\, p(z \mid x_o)\, dz.

Random numbers come from the global stream, except those of chains and masks, which take a
generator.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Independent

from .ais import AISSettings, ais
from .amc import Encoder, student_samples
from .mcmc import hmc_step, sample_chain
from .models import LatentVariableModel, check_model
from .numerics import check_counts, effective_sample_size

#: Masks of :func:`missing_mask`.
MASKS = ("lower_half", "left_half", "random", "square")


def missing_mask(
    kind: str, fraction: float = 0.8, generator: torch.Generator | None = None
) -> Tensor:
    """Which pixels of a 28 x 28 image are missing.

    ``"lower_half"`` and ``"left_half"`` take 392 pixels, ``"square"`` the 14 x 14 in the middle,
    ``"random"`` a fraction of all pixels, the number rounded. The source does not say which it
    used; the book assumes the lower half.

    :param kind: one of :data:`MASKS`.
    :param fraction: fraction of missing pixels of ``"random"``.
    :param generator: source of its randomness; the global stream when None.
    :return: boolean ``[784]``, True where missing.
    :raises ValueError: for another kind, or a fraction outside (0, 1).

    >>> [int(missing_mask(kind).sum()) for kind in MASKS]
    [392, 392, 627, 196]
    """
    if kind not in MASKS:
        raise ValueError(f"kind must be one of {', '.join(MASKS)}; got {kind!r}")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1; got {fraction}")
    mask = torch.zeros(28, 28, dtype=torch.bool)
    if kind == "random":
        order = torch.randperm(784, generator=generator)
        return mask.flatten().index_fill(0, order[: round(fraction * 784)], True)
    square = mask[7:21, 7:21]
    {"lower_half": mask[14:], "left_half": mask[:, :14], "square": square}[kind].fill_(True)
    return mask.flatten()


@torch.no_grad()
def impute(
    model: LatentVariableModel,
    encoder: Encoder,
    x: Tensor,
    mask: Tensor,
    num_iterations: int,
    num_chains: int = 1,
    start: Tensor | float = 0.0,
) -> Tensor:
    r"""Impute by turns: :math:`z \sim q(z \mid x_o, x_m)`, then :math:`x_m \sim p(x_m \mid z)`.

    Each turn draws a latent for the image as it is now, draws an image from the decoder (0 or 1 for
    a Bernoulli decoder, not its mean), and takes over the missing pixels. Observed pixels are never
    changed. With the exact posterior in place of q this is a Gibbs sampler, and its law goes to
    :math:`p(x_m \mid x_o)`; with an encoder it goes elsewhere, and how far is the question.

    :param encoder: callable from ``[B, P]`` to a distribution, or an ``ImplicitEncoder``.
    :param x: observations, ``[B, P]``; what stands at missing pixels is not looked at.
    :param mask: True where missing, ``[P]`` or ``[B, P]``.
    :param num_iterations: turns, at least 1.
    :param num_chains: K independent imputations of each observation.
    :param start: missing pixels at the start, a number or any tensor that broadcasts to
        ``[K, B, P]``; pass an earlier result to go on.
    :return: the images of the last turn, ``[K, B, P]``.
    :raises ValueError: when the mask does not fit x, or a number is less than 1.

    Source: Li, Turner and Liu (2017); the start and the number of turns are assumptions.

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0)
    >>> x, mask = torch.tensor([[3.0, 0.0]]), torch.tensor([False, True])
    >>> images = impute(model, model.posterior, x, mask, num_iterations=50, num_chains=4000)
    >>> images[..., 0].unique(), bool((images[..., 1].mean() - 1.5).abs() < 0.1)
    (tensor([3.]), True)
    """
    _check_mask(x, mask)
    check_counts(num_iterations=num_iterations, num_chains=num_chains)
    model, _ = check_model(model)
    start = torch.as_tensor(start, dtype=x.dtype, device=x.device)
    images = torch.where(mask, start, x).expand(num_chains, *x.shape)
    for _ in range(num_iterations):
        z = student_samples(encoder, images.reshape(-1, x.shape[-1]))
        drawn = model.likelihood(z.reshape(num_chains, len(x), -1)).sample()
        images = torch.where(mask, drawn, x)
    return images


# --- scores --------------------------------------------------------------------------------------


class Neighbours(NamedTuple):
    """Nearest training images: l1 distance per pixel ``[...]`` and their rows ``[...]``."""

    distance: Tensor
    index: Tensor


@torch.no_grad()
def nearest_neighbour_l1(images: Tensor, train: Tensor, chunk_size: int = 256) -> Neighbours:
    r"""The l1-nearest training image of each binary image.

    For x in {0, 1} and grey values g in [0, 1] the distance is a matrix product,

    .. math:: \|x - g\|_1 = \sum_p x_p + \sum_p g_p - 2\, x^\top g.

    :param images: binary images, ``[..., P]``.
    :param train: training images, ``[N, P]``, grey or binary.
    :param chunk_size: images compared at once; the memory is ``chunk_size`` times N numbers, 61 MB
        for the 60,000 images of MNIST.
    :return: distances divided by P, and rows of ``train``, of shape ``images.shape[:-1]``.
    :raises ValueError: when the values are not as described, or the shapes differ.

    Source: the diversity measure of Li and Turner (2018), as used by Li, Turner and Liu (2017).

    >>> train = torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]])
    >>> nearest_neighbour_l1(torch.tensor([[0.0, 1.0, 1.0]]), train)
    Neighbours(distance=tensor([0.1667]), index=tensor([0]))
    """
    if train.ndim != 2 or images.shape[-1] != train.shape[-1]:
        raise ValueError(
            "images must be [..., P] and train [N, P]; got shapes "
            f"{tuple(images.shape)} and {tuple(train.shape)}"
        )
    if not ((images == 0) | (images == 1)).all():
        raise ValueError("images must be binary, 0 or 1; binarise them first")
    if not ((train >= 0) & (train <= 1)).all():
        raise ValueError("train must hold grey values in [0, 1]; divide levels by 255")
    sums, parts = train.sum(-1), []
    for chunk in images.reshape(-1, images.shape[-1]).split(chunk_size):
        distance = torch.addmm(sums, chunk, train.T, alpha=-2.0) + chunk.sum(-1, keepdim=True)
        parts.append(distance.min(dim=-1))
    distance = torch.cat([part.values for part in parts]) / train.shape[-1]
    index = torch.cat([part.indices for part in parts])
    return Neighbours(distance.reshape(images.shape[:-1]), index.reshape(images.shape[:-1]))


def label_entropy(labels: Tensor, num_classes: int = 10) -> Tensor:
    r"""How diverse the imputations of an image are: the entropy of their neighbours' labels.

    .. math:: -\sum_c \hat p_c \log(\hat p_c + 10^{-7}), \qquad
        \hat p_c = \tfrac1K \#\{k : \text{label}_k = c\}

    High means diverse; whether the images are digits at all is for the distance to say.

    :param labels: labels of the neighbours, ``[K, B]`` (K imputations of each image).
    :param num_classes: number of classes.
    :return: one entropy for each image, ``[B]``, in nats, at most :math:`\log` ``num_classes``.
    :raises ValueError: when labels are not ``[K, B]`` or out of range.

    Source: Li and Turner (2018), and the constant of their code.

    >>> label_entropy(torch.tensor([[3, 3], [3, 5]])).round(decimals=4).abs()
    tensor([0.0000, 0.6931])
    """
    if labels.ndim != 2 or len(labels) == 0 or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels must be [K, B], from 0 to {num_classes - 1}; got shape {tuple(labels.shape)}"
        )
    frequency = torch.nn.functional.one_hot(labels.long(), num_classes).double().mean(0)
    return -(frequency * (frequency + 1e-7).log()).sum(-1).to(torch.get_default_dtype())


# --- the true conditional ------------------------------------------------------------------------


class ConditionalSamples(NamedTuple):
    """What :func:`conditional_samples` returns.

    :ivar x: completed observations, ``[K, B, P]``.
    :ivar z: their latents, ``[K, B, D]``.
    :ivar ess: effective sample size of the annealed chains, ``[B]``, between 1 and K. Far below K,
        few of the chains carry the weight: use more temperatures.
    :ivar acceptance_rate: of the moves after annealing, ``[K, B]``.
    """

    x: Tensor
    z: Tensor
    ess: Tensor
    acceptance_rate: Tensor


def observed_log_likelihood(
    model: LatentVariableModel, x: Tensor, mask: Tensor, z: Tensor
) -> Tensor:
    r""":math:`\log p(x_o \mid z)`: the likelihood of the observed pixels alone.

    :param x: observations, ``[B, P]``; missing pixels may hold any value of their range.
    :param mask: True where missing, ``[P]`` or ``[B, P]``.
    :param z: latents, ``[..., B, D]``.
    :return: ``[..., B]``, in nats.
    :raises TypeError: when the pixels are not independent given z.

    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0)
    >>> x, mask = torch.tensor([[0.0, 9.0]]), torch.tensor([False, True])
    >>> observed_log_likelihood(model, x, mask, torch.zeros(1, 1))
    tensor([-0.9189], grad_fn=...)
    """
    likelihood = model.likelihood(z)
    if not isinstance(likelihood, Independent) or likelihood.reinterpreted_batch_ndims != 1:
        raise TypeError(
            f"the likelihood must be Independent over pixels; got {type(likelihood).__name__}"
        )
    return (likelihood.base_dist.log_prob(x) * ~mask).sum(-1)


def conditional_samples(
    model: LatentVariableModel,
    x: Tensor,
    mask: Tensor,
    num_chains: int,
    *,
    settings: AISSettings,
    num_steps: int,
    generator: torch.Generator | None = None,
) -> ConditionalSamples:
    r"""The reference that imputation is measured against: :math:`p(x_m \mid x_o)` by long MCMC.

    K chains are annealed from the prior to :math:`p(z \mid x_o)`
    (:func:`amortised.ais.ais`), so that they find its modes; drawn again in proportion to their
    weights; and moved on by Hamiltonian Monte Carlo, which makes copies differ. Then each z gives
    its missing pixels, :math:`x_m \sim p(x_m \mid z)`. Exact as the schedule, or K, grows.

    :param x: observations, ``[B, P]``.
    :param mask: True where missing, ``[P]`` or ``[B, P]``.
    :param num_chains: K.
    :param settings: of annealing; its step size, a number, and its leapfrog steps serve both
        stages.
    :param num_steps: Hamiltonian transitions after annealing, at least 1.
    :param generator: source of the chains' randomness; the global stream when None.
    :return: a :class:`ConditionalSamples`; errors as in :func:`amortised.ais.ais`.

    >>> from amortised.ais import linear_schedule
    >>> from amortised.models import LinearGaussian
    >>> model = LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0)
    >>> x, mask = torch.tensor([[3.0, 0.0]]), torch.tensor([False, True])
    >>> settings = AISSettings(linear_schedule(10), step_size=0.5, num_leapfrog=2)
    >>> generator = torch.Generator().manual_seed(0)
    >>> reference = conditional_samples(
    ...     model, x, mask, 4000, settings=settings, num_steps=5, generator=generator
    ... )
    >>> bool((reference.x[..., 1].mean() - 1.5).abs() < 0.1)
    True
    """
    _check_mask(x, mask)
    check_counts(num_chains=num_chains, num_steps=num_steps)
    model, _ = check_model(model)
    settings = AISSettings(*settings)
    log_prior_fn = model.prior().log_prob
    log_likelihood_fn = partial(observed_log_likelihood, model, x, mask)
    z0 = model.prior().sample((num_chains, len(x)))
    annealed = ais((log_prior_fn, log_likelihood_fn), z0, settings, generator=generator)
    weights = annealed.log_weights.softmax(0).T
    chosen = torch.multinomial(weights, num_chains, replacement=True, generator=generator).T
    z = annealed.z.gather(0, chosen.unsqueeze(-1).expand_as(annealed.z))

    def logdensity_fn(z: Tensor) -> Tensor:
        return log_prior_fn(z) + log_likelihood_fn(z)

    moves = {"step_size": settings.step_size, "num_steps": settings.num_leapfrog}
    kernel = partial(hmc_step, logdensity_fn=logdensity_fn, generator=generator, **moves)
    chain = sample_chain(kernel, z, 1, thin=num_steps)
    z = chain.samples[-1]
    with torch.no_grad():
        completed = torch.where(mask, model.likelihood(z).sample(), x)
    ess = effective_sample_size(annealed.log_weights)
    return ConditionalSamples(completed, z, ess, chain.acceptance_rate)


def _check_mask(x: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape not in (x.shape, x.shape[-1:]):
        raise ValueError(
            f"mask must be boolean, True where missing, of shape {tuple(x.shape[-1:])} or "
            f"{tuple(x.shape)}; got {mask.dtype} of shape {tuple(mask.shape)}"
        )
