r"""Numbers for a trained model: estimates of :math:`\log p(x)`, one per image, that can be resumed.

Three estimators share one form. :func:`importance_sampling_ll` weights independent draws from a
proposal, :func:`hais_ll` weights chains annealed from the prior (or from a proposal), and
:func:`bdmc_ll` adds an upper bound on data simulated from the model. Each is a stochastic lower
bound: on average it is too low, never too high. :func:`fit_gaussian_proposal` and
:func:`fit_full_covariance` make proposals, and :func:`regression_mean` carries the values of a few
random images over to a whole test set.

Images are worked on in fixed blocks of 100. The random numbers of a block depend on the seed, the
purpose and the number of the block, so that neither the memory limit nor an interruption changes a
number, and a run with more images repeats the full blocks of a run with fewer. Where
:class:`amortised.files.Work` names a folder, a finished block is a file in it and is never computed
twice; the folder is for one evaluation, with one model and one choice of settings.
"""

import contextlib
import copy
import hashlib
import itertools
import math
import pkgutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, MixtureSameFamily, MultivariateNormal
from tqdm import tqdm

from . import ais, data, encoders, iterative, models, results
from .fast import LogLikelihoodAndGrad, log_likelihood_and_grad
from .files import Work
from .mcmc import ValueAndGrad
from .models import LatentVariableModel, check_model, like
from .numerics import check_counts, check_seed, effective_sample_size, log_mean_exp, seeded
from .objectives import check_proposal, elbo
from .training import fit, gradient_step, half_cosine

BLOCK_SIZE = 100  # images that share a random stream, hence also what is kept or lost as one

_PAIRS_PER_STEP = 5  # of opposite draws, behind each natural gradient
_SAMPLES_PER_DRAW = 25  # importance samples drawn at once; part of what the random stream means

Proposal = Callable[[Tensor], Distribution]
Likelihood = Callable[[Tensor], ValueAndGrad]


class Annealing(NamedTuple):
    """How :func:`hais_ll` and :func:`bdmc_ll` anneal.

    :ivar num_chains: K.
    :ivar num_temperatures: T.
    :ivar num_leapfrog: L, leapfrog steps at each temperature. A chain of the reported run costs
        T L gradients of the log-likelihood.
    :ivar persistence: share of the momentum that survives a temperature, in [0, 1).
    :ivar schedule_fn: maps T to the T + 1 inverse temperatures.
    :ivar target_acceptance: of the pilot; see :func:`amortised.ais.tune_step_size`.
    :ivar pilot_chains: chains of the pilot, at most 20 by default. Their mean acceptance decides
        each adaptation of 2 %, so that more of them change little.
    """

    num_chains: int = 100
    num_temperatures: int = 1000
    num_leapfrog: int = 5
    persistence: float = 0.0
    schedule_fn: Callable[[int], Tensor] = ais.sigmoid_schedule
    target_acceptance: float | None = None
    pilot_chains: int | None = None


class LikelihoodEstimate(NamedTuple):
    r"""Estimates of :math:`\log p(x)` from K weights each, on the CPU and in float64.

    Compare two models on the same images with
    ``results.paired_difference(a.log_likelihood, b.log_likelihood)``.

    :ivar log_likelihood: ``[N]``, in nats.
    :ivar ess: effective sample size of the weights, ``[N]``, between 1 and K.
    :ivar acceptance_rate: mean over temperatures and chains, ``[N]``; None for importance sampling.
    :ivar num_samples: K.
    :ivar seconds: wall time, the sum over blocks, whenever each was made.
    """

    log_likelihood: Tensor
    ess: Tensor
    acceptance_rate: Tensor | None
    num_samples: int
    seconds: float

    @property
    def summary(self) -> results.Estimate:
        """Mean over images with its standard error, in nats: the spread of images, not of K."""
        return results.mean_and_se(self.log_likelihood)

    @property
    def monte_carlo_se(self) -> Tensor:
        r"""Standard error of each estimate for this image, :math:`\sqrt{1/\mathrm{ESS} - 1/K}`.

        ``[N]``, in nats, by the delta method; as blind as the ESS to what no sample has found.
        """
        return (1.0 / self.ess - 1.0 / self.num_samples).clamp(min=0.0).sqrt()


class BDMCEstimate(NamedTuple):
    r"""Both bounds on data simulated from the model, on the CPU.

    :ivar lower: forward estimates, ``[N]``, float64, in nats.
    :ivar upper: reverse estimates, ``[N]``, float64, in nats.
    :ivar ess: effective sample size of the forward weights, ``[N]``.
    :ivar acceptance_rate: mean over the temperatures and chains of both runs, ``[N]``.
    :ivar x: the simulated observations, ``[N, P]``.
    :ivar num_samples: K, chains in each direction.
    :ivar seconds: wall time, the sum over blocks, whenever each was made.
    """

    lower: Tensor
    upper: Tensor
    ess: Tensor
    acceptance_rate: Tensor
    x: Tensor
    num_samples: int
    seconds: float

    @property
    def gap(self) -> Tensor:
        """``upper - lower``, ``[N]``, in nats; noise can make single values negative."""
        return self.upper - self.lower

    @property
    def expected_gap(self) -> results.Estimate:
        """Mean gap over pairs with its standard error, in nats: it bounds both mean errors."""
        return results.mean_and_se(self.gap)


# --- estimators ----------------------------------------------------------------------------------


@torch.no_grad()
def importance_sampling_ll(
    model: LatentVariableModel,
    proposal: Proposal,
    x: Tensor,
    *,
    num_samples: int = 5000,
    seed: int = 0,
    likelihood: Likelihood | None = None,
    work: Work = Work(),
) -> LikelihoodEstimate:
    r"""Importance sampling from a proposal, with memory that does not grow with K.

    .. math:: \log \hat p(x) = \log \frac1K \sum_{k=1}^{K} \frac{p(x, z_k)}{r(z_k \mid x)},
        \qquad z_k \sim r(z \mid x)

    Samples are drawn a few at a time; running sums are kept in float64. The estimate is far too low
    where r misses part of the posterior, and its ESS then shows nothing.

    :param proposal: maps ``[B, P]`` to a distribution r of batch shape ``[B]`` and event shape
        ``[D]``: an encoder, or ``model.posterior`` where that is known.
    :param x: observations, ``[N, P]``, on the device of the model.
    :param num_samples: K.
    :param seed: with the number of the block, it determines every draw.
    :param likelihood: as for :func:`hais_ll`; by default the model as it is, which is slower.
    :param work: where finished blocks are kept, and when to stop.
    :raises ValueError: for bad input, or for a kept block of another number of images.
    :raises FloatingPointError: for a weight that is ``nan`` or ``+inf``, naming the block and the
        image in it.
    :raises amortised.files.OutOfTimeError: when the time came before the last block.

    Source: Burda, Grosse and Salakhutdinov (2016), who take K = 5000.

    >>> model = models.LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> x = torch.tensor([[1.5], [0.0]])
    >>> estimate = importance_sampling_ll(model, model.posterior, x, num_samples=10)
    >>> estimate.log_likelihood, estimate.ess.round()  # exact: the proposal is the posterior
    (tensor([-1.8280, -1.2655], dtype=torch.float64), tensor([10., 10.], dtype=torch.float64))
    """
    model, x = check_model(model, x)
    check_counts(num_samples=num_samples)

    def evaluate(block: _Block) -> dict[str, Tensor]:
        images = x[block.images]
        q = _one_for_each(model, images, proposal)
        log_joint = partial(model.log_joint, images)
        if likelihood is not None:
            log_joint = _log_joint(model, likelihood(images))
        log_sum = torch.full((len(images),), -torch.inf, dtype=torch.float64, device=x.device)
        log_sum_of_squares = log_sum
        with block.seeding_all("importance sampling"):
            for first in range(0, num_samples, _SAMPLES_PER_DRAW):
                z = q.sample((min(_SAMPLES_PER_DRAW, num_samples - first),))
                log_weights = (log_joint(z) - q.log_prob(z)).double()
                log_sum = log_sum.logaddexp(log_weights.logsumexp(0))
                squares = (2.0 * log_weights).logsumexp(0)
                log_sum_of_squares = log_sum_of_squares.logaddexp(squares)
        invalid = ~(log_sum < torch.inf)
        if invalid.any():
            raise FloatingPointError(
                f"a log-weight is nan or +inf, image {int(invalid.nonzero()[0])}; mend the model "
                "or the proposal: no weight is dropped or repaired"
            )
        ess = (2.0 * log_sum - log_sum_of_squares).exp().where(log_sum > -torch.inf, 0.0)
        return {"log_likelihood": log_sum - math.log(num_samples), "ess": ess}

    values = _by_block(evaluate, _blocks(len(x), seed, x.device), work)
    return LikelihoodEstimate(**values, acceptance_rate=None, num_samples=num_samples)


def hais_ll(
    model: LatentVariableModel,
    x: Tensor,
    *,
    start: Proposal | None = None,
    seed: int = 0,
    likelihood: Likelihood | None = None,
    work: Work = Work(),
    **annealing: object,
) -> LikelihoodEstimate:
    r"""Annealed importance sampling: a pilot that tunes step sizes, then the run that is reported.

    The pilot adapts a step size for each image and temperature. The steps are then frozen, and a
    run with other random numbers gives the estimate, so that it is a stochastic lower bound in
    the strict sense. With ``persistence=0`` this is AIS with HMC transitions; with
    ``persistence > 0`` and ``num_leapfrog=1`` it is HAIS. Say which, wherever you quote it.

    :param x: observations, ``[N, P]``, on the device of the model.
    :param start: start from this proposal r(z given x), such as an encoder, and not from the prior.
    :param seed: with the number of the block, it determines every draw.
    :param likelihood: maps observations ``[B, P]`` to a callable
        ``z [K, B, D] -> ([K, B], [K, B, D])``, the log-likelihood and its gradient; by default
        ``partial(log_likelihood_and_grad, model)`` of :mod:`amortised.fast`. With its argument
        ``dtype=torch.bfloat16`` only the force is of low precision: acceptances and weights come
        from one pass in the model's own type per temperature.
    :param work: where finished blocks are kept, and when to stop.
    :param annealing: fields of :class:`Annealing`.
    :raises TypeError: for a name that is no field of :class:`Annealing`.
    :raises ValueError: for bad input, or for a kept block of another number of images.
    :raises FloatingPointError: as :func:`amortised.ais.ais`, naming the block and the image in it.
    :raises amortised.files.OutOfTimeError: when the time came before the last block.

    Source: Wu, Burda, Salakhutdinov and Grosse (2017), with the adaptation moved to a
    pilot; Sohl-Dickstein and Culpepper (2012) for the carried momentum.

    >>> model = models.LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> x = torch.tensor([[1.5], [0.0]])
    >>> estimate = hais_ll(model, x, num_chains=100, num_temperatures=100)
    >>> bool((estimate.log_likelihood - model.log_evidence(x)).abs().max() < 0.1)
    True
    """
    model, x = check_model(model, x)
    chosen = _annealing(annealing)

    def evaluate(block: _Block) -> dict[str, Tensor]:
        path, z0, settings = _prepare(model, x[block.images], start, likelihood, chosen, block)
        result = ais.ais(path, z0, settings, generator=block.generator("transitions"))
        return {
            "log_likelihood": log_mean_exp(result.log_weights, dim=0),
            "ess": effective_sample_size(result.log_weights),
            "acceptance_rate": result.acceptance_rate.double().mean(0),
        }

    values = _by_block(evaluate, _blocks(len(x), seed, x.device), work)
    return LikelihoodEstimate(**values, num_samples=chosen.num_chains)


def bdmc_ll(
    model: LatentVariableModel,
    num_images: int,
    *,
    seed: int = 0,
    likelihood: Likelihood | None = None,
    work: Work = Work(),
    **annealing: object,
) -> BDMCEstimate:
    r"""Certify :func:`hais_ll` at the same settings, on data that the model itself generates.

    Pairs :math:`(z, x) \sim p(z)\, p(x \mid z)` are simulated, so that z is an exact posterior
    sample of x. A forward pilot tunes the step sizes; a forward and a reverse run with these steps
    then bound each :math:`\log p(x)` from both sides. The mean gap bounds the mean error of either,
    on simulated data: real images may be harder.

    :param num_images: N, pairs to simulate.
    :return: a :class:`BDMCEstimate`.

    Other arguments and errors are those of :func:`hais_ll`.

    Source: Grosse, Ghahramani and Adams (2015); for decoders, Wu, Burda, Salakhutdinov and Grosse
    (2017).

    >>> model = models.LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> bounds = bdmc_ll(model, 50, num_chains=10, num_temperatures=20, num_leapfrog=2)
    >>> bool(bounds.expected_gap.mean < 0.3), bounds.x.shape
    (True, torch.Size([50, 1]))
    """
    chosen = _annealing(annealing)
    check_counts(num_images=num_images)
    model, _ = check_model(model)

    def evaluate(block: _Block) -> dict[str, Tensor]:
        with block.seeding_all("simulation"):
            x, z = model.sample(block.images.stop - block.images.start)
        path, z0, settings = _prepare(model, x, None, likelihood, chosen, block)
        bounds = ais.bdmc(path, z0, z, settings, generator=block.generator("transitions"))
        rates = torch.cat([bounds.forward.acceptance_rate, bounds.reverse.acceptance_rate])
        return {
            "lower": bounds.lower,
            "upper": bounds.upper,
            "ess": effective_sample_size(bounds.forward.log_weights),
            "acceptance_rate": rates.double().mean(0),
            "x": x,
        }

    values = _by_block(evaluate, _blocks(num_images, seed, like(model).device), work)
    return BDMCEstimate(**values, num_samples=chosen.num_chains)


def fit_gaussian_proposal(
    model: LatentVariableModel,
    images: Tensor,
    *,
    epochs: int = 50,
    batch_size: int = 100,
    learning_rate: float = 1e-3,
    seed: int = 0,
    encoder: nn.Module | None = None,
    work: Work = Work(),
) -> nn.Module:
    r"""A Gaussian proposal r(z given x) for a trained model, its decoder frozen.

    For models whose own posterior approximation has no density, or that have none. It maximises
    the evidence lower bound over the proposal alone (Adam, learning rate falling along a half
    cosine), and so tends to be narrower than the posterior: as a proposal for
    :func:`importance_sampling_ll` it gives estimates that are too low, as a ``start`` for
    :func:`hais_ll` it may shorten the path.

    :param model: left as it is, to the last bit.
    :param images: training images, ``[N, P]``, on the device of the model. For a model of binary
        pixels, a :class:`amortised.models.BernoulliDecoder`, they are grey values, and binary ones
        are drawn anew at each visit; for another model they are used as they are.
    :param epochs: passes over the images.
    :param seed: of the initial weights and of every draw.
    :param encoder: network to train, changed in place; by default a new
        :class:`amortised.encoders.GaussianEncoder` for 28 x 28 images.
    :param work: where the state of the training is kept, and when to stop.
    :return: the trained encoder.
    :raises ValueError: for bad input; other errors are those of :func:`amortised.training.fit`.

    >>> model = models.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0)
    >>> encoder = encoders.GaussianEncoder(latent_dim=1, trunk=nn.Identity(), num_features=2)
    >>> images = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    >>> r = fit_gaussian_proposal(model, images, epochs=2, batch_size=32, encoder=encoder)
    >>> r(images).batch_shape, model.weight.requires_grad, model.weight.grad
    (torch.Size([64]), True, None)
    """
    model, images = check_model(model, images, name="images", grey=True)
    block = _Block(seed, 0, slice(0, len(images)), images.device)
    frozen = copy.deepcopy(model).requires_grad_(False)
    with block.seeding_all("proposal"):
        if encoder is None:
            encoder = encoders.GaussianEncoder(model.latent_dim).to(images)
        optimizer = torch.optim.Adam(encoder.parameters(), lr=learning_rate)

        def loss_fn(batch: Tensor) -> Tensor:
            x = data.binarise(batch) if isinstance(model, models.BernoulliDecoder) else batch
            return -elbo(frozen, encoder(x), x, analytic_kl=True)

        step = gradient_step(loss_fn, optimizer)
        state = {"encoder": encoder, "optimizer": optimizer}
        passes = {"epochs": epochs, "batch_size": batch_size, "seed": block.seed_of("batches")}
        fit(step, images, state, schedule=half_cosine, work=work, **passes)
    return encoder


class FullCovariance(NamedTuple):
    """What :func:`fit_full_covariance` returns: call it with images that it was fitted to.

    :ivar loc: means, ``[N, R, D]``, on the CPU.
    :ivar scale_tril: lower Cholesky factors of the covariances, ``[N, R, D, D]``.
    :ivar position: where the image of these bytes is among the N.
    :ivar seconds: wall time of the fit, the sum over blocks.
    """

    loc: Tensor
    scale_tril: Tensor
    position: Mapping[bytes, int]
    seconds: float

    def __call__(self, x: Tensor) -> Distribution:
        """The proposal at images ``[B, P]``, in any order: a distribution of batch shape ``[B]``.

        :raises ValueError: for an image that was not fitted.
        """
        keys = _bytes_of(x.to(self.loc.dtype))
        unknown = [i for i, key in enumerate(keys) if key not in self.position]
        if unknown:
            raise ValueError(f"image {unknown[0]} was not fitted; fit_full_covariance to it first")
        index = [self.position[key] for key in keys]
        loc, scale_tril = self.loc[index].to(x.device), self.scale_tril[index].to(x.device)
        gaussians = MultivariateNormal(loc, scale_tril=scale_tril)
        return MixtureSameFamily(Categorical(torch.ones_like(loc[..., 0])), gaussians)


def fit_full_covariance(
    model: LatentVariableModel,
    x: Tensor,
    *,
    num_steps: int = 50,
    num_starts: int = 3,
    diagonal: bool = False,
    seed: int = 0,
    likelihood: Likelihood | None = None,
    work: Work = Work(),
) -> FullCovariance:
    r"""Gaussians with full covariance for each image, by natural gradients of its ELBO.

    A start is :math:`m = 0, L = I`. At :math:`z = m + L \epsilon`, with normal :math:`\epsilon` in
    pairs of opposite sign, the whitened gradient
    :math:`h = L^\top \nabla_z (\log p(x, z) - \log r(z))` vanishes where r is the posterior. In
    these coordinates the natural gradient is its mean and its first moment:

    .. math:: m \leftarrow m + \rho L\, \mathbb{E}[h], \qquad
        L \leftarrow L \bigl(I + \rho \operatorname{low}\, \mathbb{E}[h \epsilon^\top]\bigr),

    where low symmetrises and keeps the lower triangle with half of the diagonal. The rate
    :math:`\rho` is .5, less where the step would be longer than 1, and falls along a half cosine
    over the second half; over the first, the likelihood is tempered from power .05 to 1, so that q
    meets the modes while it is wide. Fits from several starts may end in several modes: r is their
    equal mixture, which misses fewer. An image takes some .13 s on one thread with a decoder of 32
    latents; of 512 samples of :func:`importance_sampling_ll` about half are effective.

    :param x: observations, ``[N, P]``, on the device of the model: those to be evaluated.
    :param num_steps: of natural gradient; a start costs ten gradients of the likelihood in each.
    :param num_starts: R.
    :param diagonal: keep L diagonal: mean-field Gaussians, fitted to each image with equal effort.
    :param seed: with the number of the block, it determines every draw.
    :param likelihood: as for :func:`hais_ll`.
    :param work: where finished blocks are kept, and when to stop.
    :raises ValueError: for bad input, or for a kept block of another number of images.
    :raises FloatingPointError: for a fit that is not finite, naming the block and the image in it.
    :raises amortised.files.OutOfTimeError: when the time came before the last block.

    Source: Lin, Nielsen, Khan and Schmidt (2021) for natural gradients of square roots; Roeder, Wu
    and Duvenaud (2017) for the gradient without noise at the optimum.

    >>> model = models.LinearGaussian(torch.tensor([[1.0, 1.0]]), torch.zeros(1), 0.5)
    >>> x = torch.tensor([[1.5], [0.0]])
    >>> r = fit_full_covariance(model, x)
    >>> estimate = importance_sampling_ll(model, r, x, num_samples=10)
    >>> bool((estimate.log_likelihood - model.log_evidence(x)).abs().max() < 1e-3)
    True
    """
    model, x = check_model(model, x)
    check_counts(num_steps=num_steps, num_starts=num_starts)
    prior_and_grad = ais.log_prob_and_grad(model.prior())

    def evaluate(block: _Block) -> dict[str, Tensor]:
        generator, images = block.generator("full covariance"), x[block.images]
        fast = (likelihood or partial(log_likelihood_and_grad, model))(images)
        loc = like(model).new_zeros(num_starts, len(images), model.latent_dim)
        scale = torch.eye(model.latent_dim).to(loc).repeat(*loc.shape[:2], 1, 1)
        for step in range(num_steps):
            done = step / num_steps
            shape = (_PAIRS_PER_STEP, *loc.shape)
            half = torch.randn(shape, generator=generator, dtype=loc.dtype, device=x.device)
            noise = torch.cat([half, -half])
            z = loc + (scale @ noise[..., None])[..., 0]
            power = min(1.0, 0.05 ** (1.0 - 2.0 * done))
            grad = power * fast(z)[1] + prior_and_grad(z)[1]
            rate = 0.5 * half_cosine(max(0.0, 2.0 * done - 1.0))
            loc, scale = _natural_step(loc, scale, noise, grad, rate, diagonal)
        invalid = ~(loc.sum((0, 2)) + scale.sum((0, 2, 3))).isfinite()
        if invalid.any():
            raise FloatingPointError(
                f"the fit is not finite, image {int(invalid.nonzero()[0])}; mend the likelihood"
            )
        return {"loc": loc.transpose(0, 1), "scale_tril": scale.transpose(0, 1)}

    values = _by_block(evaluate, _blocks(len(x), seed, x.device), work)
    return FullCovariance(**values, position={k: i for i, k in enumerate(_bytes_of(x))})


def _log_joint(model: LatentVariableModel, fast: ValueAndGrad) -> Callable[[Tensor], Tensor]:
    """The log-density of z and x, by a likelihood that need not be the model's own code."""
    log_likelihood = getattr(fast, "log_likelihood", lambda z: fast(z)[0])
    return lambda z: model.prior().log_prob(z) + log_likelihood(z)


def _natural_step(
    loc: Tensor, scale: Tensor, noise: Tensor, grad: Tensor, rate: float, diagonal: bool
) -> tuple[Tensor, Tensor]:
    """Means ``[R, B, D]`` and Cholesky factors one step further, from K draws ``[K, R, B, D]``."""
    whitened = (scale.mT @ grad[..., None])[..., 0] + noise
    shift = whitened.mean(0)
    moment = torch.einsum("krbi,krbj->rbij", whitened, noise) / len(noise)
    low = (0.5 * (moment + moment.mT)).tril()
    low.diagonal(dim1=-2, dim2=-1).mul_(0.5)
    low = low.diagonal(dim1=-2, dim2=-1).diag_embed() if diagonal else low
    length = (shift.square().sum(-1) + low.square().sum((-2, -1))).sqrt()
    rates = (rate / (rate * length).clamp(min=1.0))[..., None]
    loc = loc + rates * (scale @ shift[..., None])[..., 0]
    return loc, scale + rates[..., None] * (scale @ low)


def _bytes_of(x: Tensor) -> list[bytes]:
    return [image.tobytes() for image in x.cpu().numpy()]


def regression_mean(values: Tensor, images: Tensor, control: Tensor) -> results.Estimate:
    r"""The mean over all N images of a test set, from n random ones and a control on all.

    The regression estimator of survey sampling: with values y and a control c,

    .. math:: \bar y + \beta \Bigl(\frac1N \sum_{i=1}^{N} c_i - \bar c\Bigr), \qquad
        \mathrm{se}^2 = \frac{1 - n/N}{n} \; \frac{1}{n - 2} \sum_i (y_i - \bar y
        - \beta (c_i - \bar c))^2,

    :math:`\beta` by least squares. The better c predicts y, the less matters which images were
    drawn. The error is that of the mean over these N images; its bias is of order 1/n.

    :param values: y, estimates of n random images, ``[n]``, in nats.
    :param images: which images these are, ``[n]``, drawn without replacement.
    :param control: c, a cheap value of every image, such as an importance-weighted bound of ten
        samples, ``[N]``.
    :return: mean, standard error and n.
    :raises ValueError: for shapes that do not fit, fewer than three images, an image twice or not
        in the set, or values that are not finite; where the control does not vary.

    Source: Cochran (1977), Sampling Techniques, chapter 7.

    >>> control = torch.linspace(-120.0, -60.0, 1001)
    >>> images = torch.arange(0, 50, 2)  # far from the mean; the control is there to tell
    >>> round(regression_mean(2.0 + 1.1 * control[images], images, control).mean, 4)
    -97.0
    """
    y, c = values.double().cpu(), control.double().cpu()
    images = images.cpu()
    if y.ndim != 1 or len(y) < 3 or images.shape != y.shape or c.ndim != 1:
        shapes = ", ".join(str(tuple(t.shape)) for t in (y, images, c))
        raise ValueError(f"values and images must be [n], n at least 3, and control [N]: {shapes}")
    if len(images.unique()) < len(images) or images.min() < 0 or images.max() >= len(c):
        raise ValueError(f"images must be {len(images)} different numbers from 0 to {len(c) - 1}")
    if not (y.isfinite().all() and c.isfinite().all()):
        raise ValueError("values and control must be finite; mend the estimates, and drop none")
    centred, n = c[images] - c[images].mean(), len(y)
    if not centred.any():
        raise ValueError("the control is the same for all of the images; take another one")
    slope = (centred @ y) / centred.square().sum()
    residual = y - y.mean() - slope * centred
    mean = y.mean() + slope * (c.mean() - c[images].mean())
    variance = (1.0 - n / len(c)) / n * residual.square().sum() / (n - 2)
    return results.Estimate(mean.item(), variance.sqrt().item(), n)


# --- one block -----------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Which images are worked on together, with random streams of their own for each purpose."""

    seed: int
    number: int
    images: slice
    device: torch.device

    def seed_of(self, purpose: str) -> int:
        check_seed(self.seed)
        digest = hashlib.sha256(f"{self.seed}, {purpose}, {self.number}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def generator(self, purpose: str) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed_of(purpose))

    def seeding_all(self, purpose: str) -> contextlib.AbstractContextManager[None]:
        """Seed PyTorch's global streams for a while, and put them back."""
        return seeded(self.seed_of(purpose), self.device)


def _prepare(
    model: LatentVariableModel,
    x: Tensor,
    start: Proposal | None,
    likelihood: Likelihood | None,
    annealing: Annealing,
    block: _Block,
) -> tuple[ais.AnnealedPath, Tensor, ais.AISSettings]:
    """The path of a block, draws from its start, and settings with steps that a pilot has tuned."""
    prior = model.prior()
    fast = (likelihood or partial(log_likelihood_and_grad, model))(x)
    prior_and_grad = ais.log_prob_and_grad(prior)
    path = ais.AnnealedPath(prior.log_prob, partial(model.log_likelihood, x), prior_and_grad, fast)
    if isinstance(fast, LogLikelihoodAndGrad):
        is_coarse = fast.dtype is not like(model).dtype
        path = path._replace(log_likelihood_fn=fast.log_likelihood, exact_energies=is_coarse)
    q = prior.expand((len(x),))
    if start is not None:
        q = _one_for_each(model, x, start)
        path = ais.path_from(q, path)
    with block.seeding_all("pilot start"):
        pilot_z0 = q.sample((annealing.pilot_chains,))
    with block.seeding_all("start"):
        z0 = q.sample((annealing.num_chains,))

    schedule = annealing.schedule_fn(annealing.num_temperatures)
    settings = ais.AISSettings(schedule, 0.1, annealing.num_leapfrog, annealing.persistence)
    target, generator = annealing.target_acceptance, block.generator("pilot")
    step_size = ais.tune_step_size(
        path, pilot_z0, settings, target_acceptance=target, generator=generator
    )
    return path, z0, settings._replace(step_size=step_size)


@torch.no_grad()
def _one_for_each(model: LatentVariableModel, x: Tensor, proposal: Proposal) -> Distribution:
    """The proposal at x, checked to give one density of latents for each observation."""
    if not callable(proposal) or isinstance(proposal, LatentVariableModel):
        raise ValueError(f"a proposal maps x to a law of z; a {type(proposal).__name__} does not")
    q = proposal(x)
    check_proposal(q, x)
    shape = tuple(getattr(q, "event_shape", (model.latent_dim,)))
    if shape != (model.latent_dim,):
        raise ValueError(f"the model has latents [{model.latent_dim}], the proposal {list(shape)}")
    return q


# --- all blocks ----------------------------------------------------------------------------------


def _blocks(num_images: int, seed: int, device: torch.device) -> list[_Block]:
    edges = [*range(0, num_images, BLOCK_SIZE), num_images]
    images = [slice(first, stop) for first, stop in itertools.pairwise(edges)]
    return [_Block(seed, number, part, device) for number, part in enumerate(images)]


def _by_block(
    evaluate: Callable[[_Block], dict[str, Tensor]], blocks: list[_Block], work: Work
) -> dict[str, Tensor | float]:
    """Evaluate each block once, keeping what is finished: values of all images, and seconds."""
    parts, num_images = [], blocks[-1].images.stop
    for block in tqdm(blocks, unit="block", disable=None):
        part, first, stop = f"{block.number:03d}", block.images.start, block.images.stop
        values = work.load(part)
        if values is None:
            started = time.monotonic()
            try:
                values = evaluate(block)
            except FloatingPointError as error:
                raise FloatingPointError(f"among images {first} to {stop - 1}: {error}") from error
            values = {name: value.cpu() for name, value in values.items()}
            values["seconds"] = torch.tensor([time.monotonic() - started], dtype=torch.float64)
            work.save(part, values)
            if stop < num_images:
                work.check_time(f"{stop} of {num_images} images are done")
        if len(next(iter(values.values()))) != stop - first:
            raise ValueError(f"{work.path(part)} is not of images {first} to {stop - 1}; remove it")
        parts.append(values)
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return values | {"seconds": values["seconds"].sum().item()}


# --- checks --------------------------------------------------------------------------------------


def _annealing(choices: Mapping[str, object]) -> Annealing:
    """The settings of the chains, checked, with the default number of pilot chains filled in."""
    unknown = [name for name in choices if name not in Annealing._fields]
    if unknown:
        known = ", ".join(Annealing._fields)
        raise TypeError(f"no setting is called {', '.join(unknown)}; choose from {known}")
    annealing = Annealing(**choices)
    check_counts(num_chains=annealing.num_chains)
    if annealing.pilot_chains is None:
        return annealing._replace(pilot_chains=min(20, annealing.num_chains))
    check_counts(pilot_chains=annealing.pilot_chains)
    return annealing


# --- networks from files -------------------------------------------------------------------------


def named(name: str, kind: type, known: Mapping[str, object]) -> object:
    """What a name stands for: one that is known, or ``"module.NAME"`` of a reader's own module.

    The module is imported from where Python looks: the working folder, then ``PYTHONPATH``.

    :param kind: what it must be an instance of, or a subclass.
    :param known: by name.
    :raises ValueError: when there is none such, with the choices.

    >>> named("vea", int, {"vae": 1, "amc": 2})
    Traceback (most recent call last):
        ...
    ValueError: 'vea' is none of vae, amc, and no int of your own, named module.NAME
    """
    found = known.get(name)
    if "." in name:
        try:
            found = pkgutil.resolve_name(name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{name!r} cannot be imported: {error}") from error
    if not isinstance(found, kind) and not (isinstance(found, type) and issubclass(found, kind)):
        choices = f"none of {', '.join(known)}, and " if known else ""
        raise ValueError(f"{name!r} is {choices}no {kind.__name__} of your own, named module.NAME")
    return found


def build_module(architecture: Mapping[str, object]) -> nn.Module:
    """A new network from its description.

    :param architecture: the name of a class of :mod:`amortised.models`,
        :mod:`amortised.encoders` or :mod:`amortised.iterative`, or that of a class of your own as
        :func:`named` finds it, and its arguments.
    :raises amortised.results.ResultError: if there is no such class.
    :raises TypeError: if it takes no such arguments.

    >>> build_module({"class": "ConvBernoulli", "latent_dim": 2}).latent_dim
    2
    """
    arguments = dict(architecture)
    name = str(arguments.pop("class", None))
    try:
        kind = named(name, nn.Module, vars(models) | vars(encoders) | vars(iterative))
    except ValueError as error:
        raise results.ResultError(f"its class is {name!r}, which is no model or encoder") from error
    return kind(**arguments)


def load_module(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """Build the network that a file of weights describes, and load the weights.

    :param path: a file of :func:`amortised.results.save_weights` whose architecture names a class
        of :mod:`amortised.models` or :mod:`amortised.encoders` and the arguments that make it, for
        instance ``{"class": "ConvBernoulli", "latent_dim": 32}``.
    :param device: where to put it.
    :raises FileNotFoundError: if there is no such file.
    :raises amortised.results.ResultError: if it is damaged, of something else, or of another run
        than its name says; nothing large has been made then.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "decoder.safetensors")
    ...     architecture = {"class": "ConvBernoulli", "latent_dim": 2}
    ...     results.save_weights(path, models.ConvBernoulli(2), architecture)
    ...     load_module(path).latent_dim
    2
    """
    tensors, architecture, _ = results.read_weights(path)
    try:
        with torch.device("meta"):  # takes no memory, however large
            outline = build_module(architecture).state_dict()
        sizes = [sum(tensor.numel() for tensor in tree.values()) for tree in (outline, tensors)]
        if sizes[0] != sizes[1]:
            raise ValueError("its architecture has {:,} numbers, the file {:,}".format(*sizes))
        module = build_module(architecture)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise results.ResultError(f"{path} is damaged or of something else: {error}") from error
    is_wide = any(tensor.dtype == torch.float64 for tensor in tensors.values())
    module = module.double() if is_wide else module
    results.load_weights(path, module, architecture)
    return module.to(device)
