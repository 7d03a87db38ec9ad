r"""Numbers for a trained model: estimates of :math:`\log p(x)`, one per image, that can be resumed.

Three estimators share one form. :func:`importance_sampling_ll` weights independent draws from a
proposal, :func:`hais_ll` weights chains annealed from the prior (or from a proposal), and
:func:`bdmc_ll` adds an upper bound on data simulated from the model. Each is a stochastic lower
bound: on average it is too low, never too high.

Images are worked on in fixed blocks of 100. The random numbers of a block depend on the seed, the
purpose and the number of the block, so that neither the memory limit nor an interruption changes a
number, and a run with more images repeats the full blocks of a run with fewer. With ``checkpoint``
a finished block is never computed twice.

From a shell: ``python -m amortised.evaluation WEIGHTS``; ``--help`` lists the settings.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from tqdm import tqdm

from . import checks, data, encoders, models, results
from .ais import (
    AnnealedPath,
    ais,
    bdmc,
    log_prob_and_grad,
    path_from,
    sigmoid_schedule,
    tune_step_size,
)
from .encoders import GaussianEncoder
from .fast import ROUTES, log_likelihood_and_grad
from .mcmc import ValueAndGrad
from .models import BernoulliDecoder, LatentVariableModel
from .numerics import effective_sample_size, log_mean_exp
from .objectives import elbo
from .training import (
    OutOfTimeError,
    checkpoint_lock,
    cosine_decay,
    fit,
    gradient_step,
    read_checkpoint,
    write_checkpoint,
)

__all__ = [
    "BLOCK_SIZE",
    "BDMCEstimate",
    "LikelihoodEstimate",
    "bdmc_ll",
    "build_module",
    "fit_gaussian_proposal",
    "hais_ll",
    "importance_sampling_ll",
    "load_module",
]

BLOCK_SIZE = 100
"""Images that share a random stream, hence also the unit of work that is kept or lost."""

_SAMPLES_PER_DRAW = 25  # importance samples drawn at once; part of what the random stream means

Proposal = Callable[[Tensor], Distribution]
Route = Callable[[Tensor], ValueAndGrad]


class LikelihoodEstimate(NamedTuple):
    r"""Estimates of :math:`\log p(x)` from K weights each, on the CPU and in float64.

    Compare two models on the same images with
    ``results.paired_difference(a.log_likelihood, b.log_likelihood)``.

    :ivar log_likelihood: ``[N]``, in nats.
    :ivar ess: effective sample size of the weights, ``[N]``, between 1 and K.
    :ivar acceptance_rate: mean over temperatures and chains, ``[N]``; None for importance sampling.
    :ivar num_samples: K.
    :ivar seconds: wall time, over all its parts if the evaluation was interrupted.
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
    :ivar seconds: wall time, over all its parts if the evaluation was interrupted.
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
    checkpoint: str | os.PathLike | None = None,
    config: Mapping[str, object] | None = None,
    max_seconds: float | None = None,
    progress: bool = False,
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
    :param checkpoint: file to keep finished blocks in; an existing one is gone on from.
    :param config: plain values that define the run beyond the arguments; a checkpoint with other
        values is refused.
    :param max_seconds: stop after the block of images that passes this time.
    :param progress: show a progress bar.
    :raises ValueError: for bad input, or a checkpoint of another evaluation.
    :raises FloatingPointError: for a weight that is ``nan`` or ``+inf``, naming the block and the
        image in it.
    :raises amortised.training.OutOfTimeError: when ``max_seconds`` ended it early; finished blocks
        are in the checkpoint.

    Source: Burda, Grosse and Salakhutdinov (2016), who take K = 5000.

    >>> model = models.LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> x = torch.tensor([[1.5], [0.0]])
    >>> estimate = importance_sampling_ll(model, model.posterior, x, num_samples=10)
    >>> estimate.log_likelihood, estimate.ess.round()  # exact: the proposal is the posterior
    (tensor([-1.8280, -1.2655], dtype=torch.float64), tensor([10., 10.], dtype=torch.float64))
    """
    _check_observations(model, x)
    _check_counts(num_samples=num_samples)

    def evaluate(block: int, x: Tensor, advance: Callable) -> dict[str, Tensor]:
        log_sum = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
        log_sum_of_squares = log_sum.clone()
        q = proposal(x)
        if q.batch_shape != x.shape[:1]:
            raise ValueError(
                "proposal must give one distribution per observation; its batch shape is "
                f"{tuple(q.batch_shape)} for x of shape {tuple(x.shape)}"
            )
        with _global_stream(seed, "importance sampling", block, x.device):
            for first in range(0, num_samples, _SAMPLES_PER_DRAW):
                z = q.sample((min(_SAMPLES_PER_DRAW, num_samples - first),))
                log_weights = (model.log_joint(x, z) - q.log_prob(z)).double()
                log_sum = torch.logaddexp(log_sum, log_weights.logsumexp(0))
                log_sum_of_squares = torch.logaddexp(
                    log_sum_of_squares, (2.0 * log_weights).logsumexp(0)
                )
                advance(len(z))
        if not (log_sum < torch.inf).all():
            image = int((~(log_sum < torch.inf)).nonzero()[0])
            raise FloatingPointError(
                f"a log-weight is nan or +inf, image {image}; mend the model or the proposal: no "
                "weight is dropped or repaired"
            )
        ess = torch.where(log_sum == -torch.inf, 0.0, (2.0 * log_sum - log_sum_of_squares).exp())
        return {"log_likelihood": log_sum - math.log(num_samples), "ess": ess}

    values, seconds = _by_block(
        evaluate,
        x,
        steps_per_block=num_samples,
        settings=_settings("importance sampling", model, x, config, num_samples=num_samples,
                           seed=seed, proposal=_digest(proposal)),
        checkpoint=checkpoint,
        max_seconds=max_seconds,
        progress=progress,
    )  # fmt: skip
    return LikelihoodEstimate(
        **values, acceptance_rate=None, num_samples=num_samples, seconds=seconds
    )


def hais_ll(
    model: LatentVariableModel,
    x: Tensor,
    *,
    num_chains: int = 100,
    num_temperatures: int = 1000,
    num_leapfrog: int = 5,
    persistence: float = 0.0,
    schedule_fn: Callable[[int], Tensor] = sigmoid_schedule,
    start: Proposal | None = None,
    target_acceptance: float | None = None,
    pilot_chains: int | None = None,
    seed: int = 0,
    route: str | Route = "auto",
    dtype: torch.dtype | None = None,
    exact_energies: bool = True,
    chunk_size: int | None = None,
    checkpoint: str | os.PathLike | None = None,
    config: Mapping[str, object] | None = None,
    max_seconds: float | None = None,
    progress: bool = False,
) -> LikelihoodEstimate:
    r"""Annealed importance sampling: a pilot that tunes step sizes, then the run that is reported.

    The pilot adapts a step size for each image and temperature. The steps are then frozen, and a
    run with other random numbers gives the estimate, so that it is a stochastic lower bound in
    the strict sense. With ``persistence=0`` this is AIS with HMC transitions; with
    ``persistence > 0`` and ``num_leapfrog=1`` it is HAIS. Say which, wherever you quote it.

    :param x: observations, ``[N, P]``, on the device of the model.
    :param num_chains: K.
    :param num_temperatures: T.
    :param num_leapfrog: L, leapfrog steps at each temperature. A chain of the reported run costs
        T L gradients of the log-likelihood.
    :param persistence: share of the momentum that survives a temperature, in [0, 1).
    :param schedule_fn: maps T to the T + 1 inverse temperatures.
    :param start: start from this proposal r(z given x), such as an encoder, and not from the prior.
    :param target_acceptance: of the pilot; see :func:`amortised.ais.tune_step_size`.
    :param pilot_chains: chains of the pilot, at most 20 by default. Their mean acceptance decides
        each adaptation of 2 %, so that more of them change little.
    :param seed: with the number of the block, it determines every draw.
    :param route: how to evaluate the log-likelihood and its gradient: a name of
        :func:`amortised.fast.log_likelihood_and_grad`, or a callable of one's own that maps
        observations ``[B, P]`` to a callable ``z [K, B, D] -> ([K, B], [K, B, D])``.
    :param dtype: type in which a named route computes; bfloat16 and float16 are for accelerators.
    :param exact_energies: with such a ``dtype``, take acceptances and weights from one pass in the
        model's own type per temperature, so that only the force is of low precision; otherwise
        the estimate is of a slightly different model.
    :param chunk_size: memory limit of a named route: chains whose likelihood is evaluated at once.
    :param checkpoint: file to keep finished blocks in; an existing one is gone on from.
    :param config: plain values that define the run beyond the arguments; a checkpoint with other
        values is refused.
    :param max_seconds: stop after the block of images that passes this time.
    :param progress: show a progress bar.
    :raises ValueError: for bad input, or a checkpoint of another evaluation.
    :raises FloatingPointError: as :func:`amortised.ais.ais`, naming the block and the image in it.
    :raises amortised.training.OutOfTimeError: when ``max_seconds`` ended it early; finished blocks
        are in the checkpoint.

    Source: Wu, Burda, Salakhutdinov and Grosse (2017), with the adaptation moved to a
    pilot; Sohl-Dickstein and Culpepper (2012) for the carried momentum.

    >>> model = models.LinearGaussian(torch.ones(1, 1), torch.zeros(1), 1.0)
    >>> x = torch.tensor([[1.5], [0.0]])
    >>> estimate = hais_ll(model, x, num_chains=100, num_temperatures=100)
    >>> bool((estimate.log_likelihood - model.log_evidence(x)).abs().max() < 0.1)
    True
    """
    _check_observations(model, x)
    pilot_chains = min(20, num_chains) if pilot_chains is None else pilot_chains
    _check_counts(num_chains=num_chains, pilot_chains=pilot_chains)
    schedule = schedule_fn(num_temperatures)
    dynamics = {"num_leapfrog": num_leapfrog, "persistence": persistence}
    pilot = _pilot(pilot_chains, schedule, target_acceptance, seed, **dynamics)

    def evaluate(block: int, x: Tensor, advance: Callable) -> dict[str, Tensor]:
        path, q = _path(model, x, start, route, dtype, chunk_size)
        step_size = pilot(path, q, block, x, advance)
        result = ais(
            **path._asdict(),
            z0=_draw(q, num_chains, len(x), seed, "start", block, x.device),
            schedule=schedule,
            step_size=step_size,
            generator=_generator(seed, "transitions", block, x.device),
            exact_energies=exact_energies and dtype is not None,
            on_temperature=lambda t: advance(num_chains),
            **dynamics,
        )
        return {
            "log_likelihood": log_mean_exp(result.log_weights, dim=0),
            "ess": effective_sample_size(result.log_weights),
            "acceptance_rate": result.acceptance_rate.double().mean(0),
        }

    values, seconds = _by_block(
        evaluate,
        x,
        steps_per_block=num_temperatures * (num_chains + pilot_chains),
        settings=_settings(
            "annealed importance sampling", model, x, config, num_chains=num_chains,
            schedule=_digest(schedule), start=_digest(start),
            target_acceptance=target_acceptance, pilot_chains=pilot_chains, seed=seed,
            route=_digest(route), dtype=_digest(dtype), exact_energies=exact_energies, **dynamics,
        ),
        checkpoint=checkpoint,
        max_seconds=max_seconds,
        progress=progress,
    )  # fmt: skip
    return LikelihoodEstimate(**values, num_samples=num_chains, seconds=seconds)


def bdmc_ll(
    model: LatentVariableModel,
    num_images: int,
    *,
    num_chains: int = 100,
    num_temperatures: int = 1000,
    num_leapfrog: int = 5,
    persistence: float = 0.0,
    schedule_fn: Callable[[int], Tensor] = sigmoid_schedule,
    target_acceptance: float | None = None,
    pilot_chains: int | None = None,
    seed: int = 0,
    route: str | Route = "auto",
    dtype: torch.dtype | None = None,
    exact_energies: bool = True,
    chunk_size: int | None = None,
    checkpoint: str | os.PathLike | None = None,
    config: Mapping[str, object] | None = None,
    max_seconds: float | None = None,
    progress: bool = False,
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
    pilot_chains = min(20, num_chains) if pilot_chains is None else pilot_chains
    _check_counts(num_images=num_images, num_chains=num_chains, pilot_chains=pilot_chains)
    device = next(model.parameters()).device
    pairs = []
    for block in range(math.ceil(num_images / BLOCK_SIZE)):
        with _global_stream(seed, "simulation", block, device):
            pairs.append(model.sample(min(BLOCK_SIZE, num_images - block * BLOCK_SIZE)))
    x, z = (torch.cat(part) for part in zip(*pairs, strict=True))
    schedule = schedule_fn(num_temperatures)
    dynamics = {"num_leapfrog": num_leapfrog, "persistence": persistence}
    pilot = _pilot(pilot_chains, schedule, target_acceptance, seed, **dynamics)

    def evaluate(block: int, x: Tensor, advance: Callable) -> dict[str, Tensor]:
        path, prior = _path(model, x, None, route, dtype, chunk_size)
        step_size = pilot(path, prior, block, x, advance)
        bounds = bdmc(
            **path._asdict(),
            z0=_draw(prior, num_chains, len(x), seed, "start", block, x.device),
            z_posterior=z[block * BLOCK_SIZE :][: len(x)],
            schedule=schedule,
            step_size=step_size,
            generator=_generator(seed, "transitions", block, device),
            exact_energies=exact_energies and dtype is not None,
            on_temperature=lambda t: advance(num_chains),
            **dynamics,
        )
        rates = torch.cat([bounds.forward.acceptance_rate, bounds.reverse.acceptance_rate])
        return {
            "lower": bounds.lower,
            "upper": bounds.upper,
            "ess": effective_sample_size(bounds.forward.log_weights),
            "acceptance_rate": rates.double().mean(0),
        }

    values, seconds = _by_block(
        evaluate,
        x,
        steps_per_block=num_temperatures * (2 * num_chains + pilot_chains),
        settings=_settings(
            "bidirectional Monte Carlo", model, x, config, num_chains=num_chains,
            schedule=_digest(schedule), target_acceptance=target_acceptance,
            pilot_chains=pilot_chains, seed=seed, route=_digest(route), dtype=_digest(dtype),
            exact_energies=exact_energies, **dynamics,
        ),
        checkpoint=checkpoint,
        max_seconds=max_seconds,
        progress=progress,
    )  # fmt: skip
    return BDMCEstimate(**values, x=x.cpu(), num_samples=num_chains, seconds=seconds)


def fit_gaussian_proposal(
    model: LatentVariableModel,
    images: Tensor,
    *,
    epochs: int = 50,
    batch_size: int = 100,
    learning_rate: float = 1e-3,
    seed: int = 0,
    encoder: nn.Module | None = None,
    dynamic_binarisation: bool = True,
    checkpoint: str | os.PathLike | None = None,
    max_seconds: float | None = None,
    progress: bool = False,
) -> nn.Module:
    r"""A Gaussian proposal r(z given x) for a trained model, its decoder frozen.

    For models whose own posterior approximation has no density, or that have none. It maximises
    the evidence lower bound over the proposal alone (Adam, learning rate falling along a half
    cosine), and so tends to be narrower than the posterior: as a proposal for
    :func:`importance_sampling_ll` it gives estimates that are too low, as a ``start`` for
    :func:`hais_ll` it may shorten the path.

    :param model: left as it is, to the last bit.
    :param images: training images, ``[N, P]``, on the device of the model.
    :param epochs: passes over the images.
    :param seed: of the initial weights and of every draw.
    :param encoder: network to train, changed in place; by default a new
        :class:`amortised.encoders.GaussianEncoder` for 28 x 28 images.
    :param dynamic_binarisation: read ``images`` as grey values and draw binary ones anew at each
        visit; otherwise use them as they are.
    :param checkpoint: file to keep the state in; an existing one is gone on from.
    :param max_seconds: stop after the step that passes this time.
    :param progress: show a progress bar, if the standard error is a terminal.
    :return: the trained encoder.
    :raises amortised.training.OutOfTimeError: when ``max_seconds`` ended it early.
    :raises ValueError: for bad input; other errors are those of :func:`amortised.training.fit`.

    >>> model = models.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0)
    >>> encoder = GaussianEncoder(latent_dim=1, trunk=nn.Identity(), num_features=2)
    >>> images = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    >>> r = fit_gaussian_proposal(
    ...     model, images, epochs=2, batch_size=32, encoder=encoder, dynamic_binarisation=False
    ... )
    >>> r(images).batch_shape, model.weight.requires_grad, model.weight.grad
    (torch.Size([64]), True, None)
    """
    _check_shape(model, images, "images")
    with _global_stream(seed, "proposal", 0, images.device), _frozen(model):
        if encoder is None:
            encoder = GaussianEncoder(model.latent_dim).to(images)
        optimizer = torch.optim.Adam(encoder.parameters(), lr=learning_rate)
        steps_per_epoch = max(1, len(images) // batch_size)
        scheduler = cosine_decay(optimizer, epochs * steps_per_epoch)

        def loss_fn(batch: Tensor) -> Tensor:
            x = data.binarise(batch) if dynamic_binarisation else batch
            return -elbo(model, encoder(x), x, analytic_kl=True)

        run = fit(
            gradient_step(loss_fn, optimizer, scheduler),
            images,
            epochs=epochs,
            batch_size=batch_size,
            state={"encoder": encoder, "optimizer": optimizer, "scheduler": scheduler},
            generator=_generator(seed, "batches", 0, torch.device("cpu")),
            checkpoint=checkpoint,
            config={
                "model": _digest(model),
                "images": _digest(images),
                "epochs": epochs,
                "learning_rate": learning_rate,
                "dynamic_binarisation": dynamic_binarisation,
                "seed": seed,
            },
            max_seconds=max_seconds,
            progress=progress,
        )
    if not run.finished:
        raise OutOfTimeError(f"max_seconds passed after {run.num_steps} steps of the proposal")
    return encoder


# --- paths and streams ---------------------------------------------------------------------------


def _path(
    model: LatentVariableModel,
    x: Tensor,
    start: Proposal | None,
    route: str | Route,
    dtype: torch.dtype | None,
    chunk_size: int | None,
) -> tuple[AnnealedPath, Distribution]:
    """The annealed path of a block and the distribution at its start, of batch shape ``[B]``."""
    prior = model.prior()
    if callable(route):
        likelihood, log_likelihood_fn = route(x), lambda z: model.log_likelihood(x, z)
    else:
        likelihood = log_likelihood_and_grad(model, x, route, dtype=dtype, chunk_size=chunk_size)
        log_likelihood_fn = likelihood.log_likelihood
    path = AnnealedPath(prior.log_prob, log_likelihood_fn, log_prob_and_grad(prior), likelihood)
    if start is None:
        return path, prior.expand((len(x),))
    with torch.no_grad():
        q = start(x)
    return path_from(q, **path._asdict()), q


def _pilot(
    num_chains: int,
    schedule: Tensor,
    target_acceptance: float | None,
    seed: int,
    **dynamics: float,
) -> Callable[[AnnealedPath, Distribution, int, Tensor, Callable], Tensor]:
    """The pilot run of a block: its step sizes, tuned with random numbers of their own."""

    def pilot(
        path: AnnealedPath, q: Distribution, block: int, x: Tensor, advance: Callable
    ) -> Tensor:
        return tune_step_size(
            **path._asdict(),
            z0=_draw(q, num_chains, len(x), seed, "pilot start", block, x.device),
            schedule=schedule,
            target_acceptance=target_acceptance,
            generator=_generator(seed, "pilot", block, x.device),
            on_temperature=lambda t: advance(num_chains),
            **dynamics,
        )

    return pilot


def _stream_seed(seed: int, purpose: str, block: int) -> int:
    digest = hashlib.sha256(f"{seed}, {purpose}, {block}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _generator(seed: int, purpose: str, block: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(_stream_seed(seed, purpose, block))


@contextlib.contextmanager
def _global_stream(seed: int, purpose: str, block: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's global streams for a while, and put them back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_stream_seed(seed, purpose, block))
        yield


def _draw(
    q: Distribution,
    num_chains: int,
    num_images: int,
    seed: int,
    purpose: str,
    block: int,
    device: torch.device,
) -> Tensor:
    """Draws from the start of a path, ``[num_chains, num_images, D]``."""
    if q.batch_shape != (num_images,):
        raise ValueError(
            "start must give one distribution per observation; its batch shape is "
            f"{tuple(q.batch_shape)} for {num_images} observations"
        )
    with torch.no_grad(), _global_stream(seed, purpose, block, device):
        return q.sample((num_chains,))


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module requires a gradient for a while."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


# --- blocks and checkpoints ----------------------------------------------------------------------


def _by_block(
    evaluate: Callable[[int, Tensor, Callable[[int], object]], dict[str, Tensor]],
    x: Tensor,
    *,
    steps_per_block: int,
    settings: dict[str, object],
    checkpoint: str | os.PathLike | None,
    max_seconds: float | None,
    progress: bool,
) -> tuple[dict[str, Tensor], float]:
    """Evaluate each block of images once, keeping what is finished; values and seconds."""
    blocks = partial(
        _remaining_blocks, evaluate, x, steps_per_block, max_seconds=max_seconds, progress=progress
    )
    if checkpoint is None:
        return blocks({}, 0.0, lambda *_: None)
    path = Path(checkpoint)
    with checkpoint_lock(path):
        values, seconds = _finished(path, settings)

        def keep(values: dict[str, Tensor], seconds: float) -> None:
            write_checkpoint(path, {"settings": settings, "values": values, "seconds": seconds})

        return blocks(values, seconds, keep)


def _remaining_blocks(
    evaluate: Callable,
    x: Tensor,
    steps_per_block: int,
    values: dict[str, Tensor],
    seconds: float,
    keep: Callable[[dict[str, Tensor], float], None],
    max_seconds: float | None,
    progress: bool,
) -> tuple[dict[str, Tensor], float]:
    done = len(next(iter(values.values()))) if values else 0
    started = time.monotonic() - seconds
    stop = math.inf if max_seconds is None else seconds + max_seconds
    with tqdm(
        total=math.ceil(len(x) / BLOCK_SIZE) * steps_per_block,
        initial=math.ceil(done / BLOCK_SIZE) * steps_per_block,
        unit=" samples",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 30.0,  # log files grow slowly
        disable=not progress,
    ) as bar:
        for first in range(done, len(x), BLOCK_SIZE):
            images = x[first : first + BLOCK_SIZE]
            try:
                block = evaluate(first // BLOCK_SIZE, images, bar.update)
            except FloatingPointError as error:
                last = first + len(images) - 1
                raise FloatingPointError(f"among images {first} to {last}: {error}") from error
            values = {
                name: torch.cat([*([values[name]] if values else []), value.cpu()])
                for name, value in block.items()
            }
            seconds = time.monotonic() - started
            keep(values, seconds)
            if seconds >= stop and first + BLOCK_SIZE < len(x):
                raise OutOfTimeError(
                    f"max_seconds passed after {first + BLOCK_SIZE} of {len(x)} images"
                )
    return values, seconds


def _finished(path: Path, settings: dict[str, object]) -> tuple[dict[str, Tensor], float]:
    """Values of the blocks that an earlier run has finished, if it was the same evaluation."""
    saved = read_checkpoint(path)
    if saved is None:
        return {}, 0.0
    differences = _differences(saved.get("settings", {}), settings)
    if differences:
        raise ValueError(
            f"{path} is of another evaluation; remove it to start afresh:{differences}"
        )
    return saved["values"], saved["seconds"]


def _differences(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """One line for each setting that differs; empty if none does."""
    return "".join(
        f"\n  {name}: {before.get(name, 'absent')} in the file, {now.get(name, 'absent')} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name, "absent") != now.get(name, "absent")
    )


def _settings(
    estimator: str,
    model: LatentVariableModel,
    x: Tensor,
    config: Mapping[str, object] | None,
    **settings: object,
) -> dict[str, object]:
    """Everything that a number depends on, as plain values."""
    return {
        "estimator": estimator,
        "model": _digest(model),
        "images": f"{len(x)}, {_digest(x)}",
        "device": x.device.type,
        "torch": str(torch.__version__),
        **settings,
        **{f"config.{name}": value for name, value in (config or {}).items()},
    }


def _digest(thing: object) -> str | None:
    """A short name for the content of a tensor or a module; the name of anything else."""
    if thing is None or isinstance(thing, str):
        return thing
    if isinstance(thing, torch.dtype):
        return str(thing).removeprefix("torch.")
    if isinstance(thing, Tensor):
        tensors = {"": thing}
    elif isinstance(thing, nn.Module):
        tensors = thing.state_dict()
    else:
        return getattr(thing, "__qualname__", type(thing).__qualname__)
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _check_shape(model: LatentVariableModel, x: Tensor, name: str = "x") -> None:
    if x.ndim != 2 or x.shape[1] != model.observation_dim or not len(x):
        raise ValueError(
            f"{name} must be [N, {model.observation_dim}] with N of at least 1; "
            f"got shape {tuple(x.shape)}"
        )
    device = next(model.parameters()).device
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} and the model on {device}; move one of them")


def _check_observations(model: LatentVariableModel, x: Tensor) -> None:
    _check_shape(model, x)
    if isinstance(model, BernoulliDecoder) and not ((x == 0) | (x == 1)).all():
        raise ValueError(
            f"x must hold zeros and ones; got values from {x.min().item():g} to "
            f"{x.max().item():g}. Binarise it: data.load_mnist_binary, data.binarise"
        )


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer, at least 1; got {value!r}")


# --- command line --------------------------------------------------------------------------------


def build_module(architecture: Mapping[str, object]) -> nn.Module:
    """A new network from its description.

    :param architecture: the name of a class of :mod:`amortised.models` or
        :mod:`amortised.encoders`, and its arguments.
    :raises amortised.results.ResultError: if there is no such class, or it takes no such arguments.

    >>> build_module({"class": "ConvBernoulli", "latent_dim": 2}).latent_dim
    2
    """
    arguments = dict(architecture)
    name = arguments.pop("class")
    kind = getattr(models, name, None) or getattr(encoders, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise results.ResultError(f"its class is {name!r}, which is no model or encoder")
    try:
        return kind(**arguments)
    except TypeError as error:
        raise results.ResultError(f"cannot build {name}: {error}") from error


def load_module(path: str | os.PathLike, device: str | torch.device = "cpu") -> nn.Module:
    """Build the network that a file of weights describes, and load the weights.

    :param path: a file of :func:`amortised.results.save_weights` whose architecture names a class
        of :mod:`amortised.models` or :mod:`amortised.encoders` and the arguments that make it, for
        instance ``{"class": "ConvBernoulli", "latent_dim": 32}``.
    :param device: where to put it.
    :raises FileNotFoundError: if there is no such file.
    :raises amortised.results.ResultError: if it is damaged, or of something else.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "decoder.safetensors")
    ...     architecture = {"class": "ConvBernoulli", "latent_dim": 2}
    ...     results.save_weights(path, models.ConvBernoulli(2), architecture)
    ...     load_module(path).latent_dim
    2
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            architecture = json.loads(file.metadata()["amortised"])["architecture"]
        architecture["class"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise results.ResultError(f"{path} is damaged or not of this project: {error!r}") from error
    try:
        module = build_module(architecture)
    except results.ResultError as error:
        raise results.ResultError(f"{path}: {error}") from error
    results.load_weights(path, module, architecture)
    return module.to(device)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate a file of weights; see the head of this module."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.output is None:
        options.output = options.weights.with_suffix(".evaluation.json")
    try:
        _evaluate_file(options)
    except (ValueError, ArithmeticError, RuntimeError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; the same command goes on after the last finished block\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m amortised.evaluation",
        description="Estimate log p(x) of the fixed binary MNIST test images under trained weights."
        " Stopped at any moment, the same command goes on after the last finished block of "
        f"{BLOCK_SIZE} images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("weights", type=Path, help="a decoder, saved with amortised.results.save_weights")
    add("--output", type=Path, help="JSON to write; default: WEIGHTS with .evaluation.json")
    add("--split", default="test", help="which fixed binary MNIST images")
    add("--images", type=int, help="only the first so many; default: all")
    add("--simulated", type=int, metavar="N", help="bounds on N simulated pairs instead of MNIST")
    add("--num-chains", type=int, default=100, help=" ")
    add("--num-temperatures", type=int, default=1000, help=" ")
    add("--num-leapfrog", type=int, default=5, help=" ")
    add("--persistence", type=float, default=0.0, help="0: AIS+HMC; above, with 1 leapfrog: HAIS")
    add("--target-acceptance", type=float, help="of the pilot; default: 0.65, HAIS 0.9")
    add("--pilot-chains", type=int, help="default: 20, or --num-chains if fewer")
    add("--proposal", type=Path, help="weights of a Gaussian encoder: adds importance sampling")
    add("--num-samples", type=int, default=5000, help="importance samples")
    add("--start", choices=("prior", "proposal"), default="prior", help="where to anneal from")
    add("--seed", type=int, default=0, help=" ")
    add("--device", default="cpu", help=" ")
    add("--route", choices=ROUTES, default="auto", help="how the likelihood is evaluated")
    add("--dtype", choices=("bfloat16", "float16"), help="for the force; energies stay exact")
    add("--chunk-size", type=int, help="chains evaluated at once: bounds memory")
    return parser


def _evaluate_file(options: argparse.Namespace) -> None:
    started, output = time.time(), options.output
    problem = checks.device()(options.device)
    if problem:
        raise ValueError(f"--device {options.device}: must be {problem}")
    model = load_module(options.weights, options.device)
    if not isinstance(model, LatentVariableModel):
        raise ValueError(f"{options.weights} holds a {type(model).__name__}, which is no decoder")
    proposal = None if options.proposal is None else load_module(options.proposal, options.device)
    if options.start == "proposal" and proposal is None:
        raise ValueError("--start proposal: name its weights with --proposal")
    if options.simulated is not None and proposal is not None:
        raise ValueError("--simulated: anneals from the prior, without --proposal")

    config = {
        name: value
        for name, value in vars(options).items()
        if name not in ("weights", "output", "proposal", "chunk_size")
    } | {"weights": _digest(model), "proposal": _digest(proposal)}
    if output.exists():
        differences = _differences(json.loads(output.read_bytes()).get("config", {}), config)
        if differences:
            raise ValueError(f"{output} is of another evaluation; remove it first:{differences}")
        print(f"{output} holds this evaluation already")
        return

    annealing = {
        name: getattr(options, name)
        for name in (
            "num_chains",
            "num_temperatures",
            "num_leapfrog",
            "persistence",
            "target_acceptance",
            "pilot_chains",
            "seed",
            "route",
            "chunk_size",
        )
    } | {"checkpoint": _beside(output, ".ais.partial"), "config": config, "progress": True}
    annealing["dtype"] = None if options.dtype is None else getattr(torch, options.dtype)
    unfinished = [annealing["checkpoint"]]
    if options.simulated is not None:
        bounds = bdmc_ll(model, options.simulated, **annealing)
        seconds = bounds.seconds
        per_image = {
            "lower_bound": bounds.lower,
            "upper_bound": bounds.upper,
            "gap": bounds.gap,
            "ess": bounds.ess,
            "acceptance_rate": bounds.acceptance_rate,
        }
    else:
        x = data.load_mnist_binary(options.split).images
        if options.images is not None and not 2 <= options.images <= len(x):
            raise ValueError(f"--images {options.images}: must be from 2 to {len(x)}")
        x = x[: options.images].to(options.device)
        start = proposal if options.start == "proposal" else None
        estimate = hais_ll(model, x, start=start, **annealing)
        seconds = estimate.seconds
        per_image = {
            "log_likelihood": estimate.log_likelihood,
            "ess": estimate.ess,
            "acceptance_rate": estimate.acceptance_rate,
        }
        if proposal is not None:
            unfinished.append(_beside(output, ".is.partial"))
            sampled = importance_sampling_ll(
                model,
                proposal,
                x,
                num_samples=options.num_samples,
                seed=options.seed,
                checkpoint=unfinished[-1],
                config=config,
                progress=True,
            )
            seconds += sampled.seconds
            per_image["importance_sampling_ll"] = sampled.log_likelihood
            per_image["importance_sampling_ess"] = sampled.ess

    per_image = {name: values.to(torch.float32) for name, values in per_image.items()}
    metrics = results.summarise(per_image)
    content = safetensors.torch.save(per_image)
    record = {
        "weights": str(options.weights),
        "config": config,
        "config_hash": results.config_hash(config),
        "metrics": metrics,
        "per_image_sha256": hashlib.sha256(content).hexdigest(),
        "provenance": results.provenance(
            options.device, started=started, wall_seconds=seconds, datasets=("mnist",)
        ),
    }
    data.atomic_write(output.with_suffix(".per_image.safetensors"), content)
    data.atomic_write(output, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
    for path in unfinished:
        path.unlink(missing_ok=True)
        _beside(path, ".previous").unlink(missing_ok=True)
    for name, metric in metrics.items():
        print(f"{name}: {results.format_estimate(metric['mean'], metric['se'])}")
    method = "HAIS" if options.persistence > 0 else "AIS+HMC"
    print(
        f"{metrics['ess']['n']} images; {method}, {options.num_chains} chains, "
        f"{options.num_temperatures} temperatures, {options.num_leapfrog} leapfrog steps, seed "
        f"{options.seed}; means over images with their standard errors, in {output}"
    )


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


if __name__ == "__main__":
    sys.exit(main())
