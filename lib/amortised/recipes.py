r"""Recipes: how one row of a study is trained and evaluated, one function for each kind of study.

A recipe is a function ``Run -> Outcome``. The :class:`Run` says what to do (a flat configuration
and a seed), where to keep checkpoints, and how much time is left; the :class:`Outcome` holds values
per image, networks, and remarks. :mod:`amortised.experiments` does all the rest: it reads and
checks the configuration, seeds, locks, writes results, and goes on after an interruption. A new
kind of study is a function here, the options it understands, and an entry in :data:`RECIPES`.

A recipe is called again from its beginning after an interruption. Each of its stages keeps a
checkpoint under a name of its own (:meth:`Run.stage`), and a stage that is finished returns at once
what it had found.

Sources: Li, Turner and Liu (2017) for the rows of amortised MCMC and for imputation; Burda, Grosse
and Salakhutdinov (2016) and Tucker et al. (2019) for those of importance-weighted auto-encoders.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from . import amc, data, evaluation, imputation, mcmc
from .adversarial import Discriminator
from .ais import sigmoid_schedule
from .checks import Specification, choice, integer, real
from .encoders import GaussianEncoder
from .fast import RefreshedLikelihood
from .models import ConvBernoulli
from .numerics import argument_validation
from .objectives import dreg_surrogate, iwae_bound
from .training import (
    CudaGraphStep,
    FitResult,
    OutOfTimeError,
    cosine_decay,
    fit,
    read_checkpoint,
    write_checkpoint,
)

__all__ = [
    "RECIPES",
    "ROLES",
    "Outcome",
    "Recipe",
    "Run",
    "amc_row",
    "imputation_row",
    "vae_row",
]

LATENT_DIM = 32
HISTORY_LENGTH = 40  # means of the losses that a result keeps


class Run(NamedTuple):
    """One row of a study at one scale with one seed, and the means to work on it.

    :ivar study: its name.
    :ivar row: the name of its row.
    :ivar scale: the name of the scale.
    :ivar seed: of everything random; the engine has seeded the global stream with it already.
    :ivar config: the options of the recipe, complete and checked.
    :ivar device: where to compute.
    :ivar folder: of the checkpoints of this run.
    :ivar stop_at: value of ``time.monotonic()`` at which to stop, or infinity.
    :ivar weights_of: maps a role, such as ``"decoder"``, to the weights of the run that this
        one builds on.
    :ivar progress: whether to show progress bars.
    """

    study: str
    row: str
    scale: str
    seed: int
    config: Mapping[str, object]
    device: torch.device
    folder: Path
    stop_at: float
    weights_of: Callable[[str], Path]
    progress: bool

    def stage(self, name: str) -> dict:
        """Arguments of a resumable function: its checkpoint, the time left, the progress bar.

        :raises OutOfTimeError: when no time is left.
        """
        left = self.stop_at - time.monotonic()
        if left <= 0:
            raise OutOfTimeError(f"no time is left for the stage {name!r}")
        return {
            "checkpoint": self.folder / f"{name}.checkpoint",
            "max_seconds": None if math.isinf(left) else left,
            "progress": self.progress,
        }


class Outcome(NamedTuple):
    """What a recipe found.

    :ivar per_image: ``{metric: values [N]}``; row n belongs to image n.
    :ivar networks: ``{role: (network, architecture)}``, to be kept as weights.
    :ivar details: anything else worth keeping, as plain values.
    """

    per_image: dict[str, Tensor]
    networks: dict[str, tuple[nn.Module, dict]]
    details: dict


class Recipe(NamedTuple):
    """A function with its options.

    :ivar function: does the work.
    :ivar options: for each option the check of its value.
    :ivar conflict: says what is wrong with options that are right one by one, or None.
    """

    function: Callable[[Run], Outcome]
    options: dict[str, Specification]
    conflict: Callable[[Mapping[str, object]], str | None] = lambda config: None


# --- networks ------------------------------------------------------------------------------------


ENCODERS = {
    "gaussian": {"class": "GaussianEncoder", "latent_dim": LATENT_DIM},
    "cnn_g": {"class": "ImplicitEncoder", "latent_dim": LATENT_DIM, "noise": "gaussian"},
    "cnn_b": {"class": "ImplicitEncoder", "latent_dim": LATENT_DIM, "noise": "bernoulli"},
}
DECODER = {"class": "ConvBernoulli", "latent_dim": LATENT_DIM}
ROLES = ("decoder", "encoder")
"""Names of the networks of an :class:`Outcome`."""
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _on(device: torch.device, module: nn.Module) -> nn.Module:
    # Channels last: on a processor a step is a few per cent faster (workflow/bench_training.py).
    return module.to(device, memory_format=torch.channels_last)


def _round_to_half(*networks: nn.Module | None) -> None:
    """Round weights to the half precision in which they are kept, so that what is evaluated is,
    to the bit, what the file holds."""
    for network in networks:
        for name, parameter in [] if network is None else network.named_parameters():
            parameter.data = parameter.data.half().to(parameter.dtype)
            if not parameter.isfinite().all():
                raise FloatingPointError(
                    f"after training, {type(network).__name__}.{name} is beyond half precision"
                )


def _adam(run: Run, network: nn.Module, learning_rate: float, **settings: object) -> Adam:
    """Adam, on a GPU in the form that a CUDA graph can hold."""
    if run.device.type == "cuda":
        rate = torch.tensor(learning_rate, device=run.device)
        return Adam(network.parameters(), lr=rate, capturable=True, **settings)
    return Adam(network.parameters(), lr=learning_rate, **settings)


# --- training ------------------------------------------------------------------------------------


def _train(
    run: Run,
    step: Callable[..., dict[str, Tensor]],
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    *,
    indexed: bool = False,
) -> FitResult:
    """Call ``step(x)`` on binarised minibatches, all learning rates falling along half a cosine.

    With ``indexed`` the step is ``step(x, index)`` and knows which images it sees.
    """
    epochs, batch_size = run.config["epochs"], run.config["batch_size"]
    levels = data.load_mnist("train", dtype=torch.uint8).images[: run.config["training_images"]]
    levels = levels.to(run.device)
    num_steps = epochs * (len(levels) // batch_size)
    schedulers = {
        name: cosine_decay(optimizer, num_steps) for name, optimizer in optimizers.items()
    }

    def plain_update(batch: Tensor, *index: Tensor) -> dict[str, Tensor]:
        return step(data.binarise(batch), *index)

    changed = {
        **networks,
        **{f"optimizer of {name}": optimizer for name, optimizer in optimizers.items()},
    }
    update = plain_update
    if run.device.type == "cuda":
        update = CudaGraphStep(plain_update, changed)

    def scheduled_step(*batch: Tensor) -> dict[str, Tensor]:
        losses = update(*batch)
        for scheduler in schedulers.values():
            scheduler.step()
        return losses

    # Validation of a distribution's arguments looks at values, which a graph cannot; and it would
    # stop a run that diverges with an error of its own, before `fit` sees the loss.
    with argument_validation(False):
        result = fit(
            scheduled_step,
            (levels, torch.arange(len(levels), device=run.device)) if indexed else levels,
            epochs=epochs,
            batch_size=batch_size,
            state={
                **changed,
                **{f"schedule of {name}": scheduler for name, scheduler in schedulers.items()},
            },
            generator=torch.Generator().manual_seed(run.seed),
            checkpoint_every=max(1, num_steps // 20),
            config={**run.config, "seed": run.seed},
            **run.stage("training"),
        )
    if not result.finished:
        raise OutOfTimeError(f"{result.num_steps} of {num_steps} steps of training are done")
    return result


def _history(result: FitResult) -> dict[str, list[float]]:
    """Each loss as a few means over consecutive stretches of the training."""
    return {
        name: [
            round(part.double().mean().item(), 4)
            for part in values.tensor_split(min(HISTORY_LENGTH, len(values)))
        ]
        for name, values in result.history.items()
    }


# --- evaluation ----------------------------------------------------------------------------------


_EVALUATION_OPTIONS: dict[str, Specification] = {
    "images": integer(2, 10_000),
    "num_chains": integer(1),
    "pilot_chains": integer(1),
    "num_temperatures": integer(1),
    "num_leapfrog": integer(1),
    "simulated_pairs": integer(2),
    "num_samples": integer(1),
    "proposal_epochs": integer(1),
    "evaluation_dtype": choice(*DTYPES),
}


def _evaluate(
    run: Run, decoder: ConvBernoulli, encoder: nn.Module | None
) -> tuple[dict[str, Tensor], dict]:
    """Estimates of the evidence per image, and the seconds that each stage took.

    Importance sampling from the row's own encoder, where it has a density, and from a Gaussian that
    is fitted after training; annealing from the prior with fresh momentum at each temperature; and
    bounds from both sides on simulated pairs, at the same settings.
    """
    config = run.config
    x = data.load_mnist_binary("test").images[: config["images"]].to(run.device)
    training_images = data.load_mnist("train").images[: config["training_images"]].to(run.device)
    proposal = evaluation.fit_gaussian_proposal(
        decoder,
        training_images,
        epochs=config["proposal_epochs"],
        batch_size=config["batch_size"],
        seed=run.seed,
        encoder=_seeded_proposal(run),
        **run.stage("proposal"),
    )
    del training_images
    sampling = partial(
        evaluation.importance_sampling_ll, decoder, num_samples=config["num_samples"], seed=run.seed
    )
    fitted = sampling(proposal, x, **run.stage("posthoc_importance"))
    own = fitted
    if isinstance(encoder, GaussianEncoder):
        own = sampling(encoder, x, **run.stage("importance"))
    settings = {
        name: config[name]
        for name in ("num_chains", "pilot_chains", "num_temperatures", "num_leapfrog")
    } | {"seed": run.seed, "dtype": DTYPES[config["evaluation_dtype"]]}
    annealed = evaluation.hais_ll(decoder, x, **settings, **run.stage("annealing"))
    bounds = evaluation.bdmc_ll(
        decoder, config["simulated_pairs"], **settings, **run.stage("bounds")
    )
    per_image = {
        "is_ll": own.log_likelihood,
        "is_ess": own.ess,
        "posthoc_is_ll": fitted.log_likelihood,
        "posthoc_is_ess": fitted.ess,
        "ais_ll": annealed.log_likelihood,
        "ais_ess": annealed.ess,
        "ais_acceptance_rate": annealed.acceptance_rate,
        "simulated_lower_bound": bounds.lower,
        "simulated_upper_bound": bounds.upper,
        "simulated_gap": bounds.gap,
    }
    seconds = {
        "importance sampling": own.seconds + (0.0 if own is fitted else fitted.seconds),
        "annealing": annealed.seconds,
        "bounds": bounds.seconds,
    }
    return per_image, {name: round(value, 2) for name, value in seconds.items()}


def _seeded_proposal(run: Run) -> GaussianEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        return _on(run.device, GaussianEncoder(LATENT_DIM))


def _outcome(
    run: Run,
    decoder: ConvBernoulli,
    encoder: nn.Module | None,
    kind: str,
    training: FitResult,
    **details: object,
) -> Outcome:
    """Round the trained networks to what is kept of them, and evaluate that.

    ``kind`` is the encoder's name in ``ENCODERS``.
    """
    _round_to_half(decoder, encoder)
    per_image, seconds = _evaluate(run, decoder, encoder)
    networks = {"decoder": (decoder, DECODER)}
    if encoder is not None:
        networks["encoder"] = (encoder, ENCODERS[kind])
    details |= {
        "steps": training.num_steps,
        "seconds": {"training": round(training.seconds, 2), **seconds},
        "history": _history(training),
    }
    return Outcome(per_image, networks, details)


# --- amortised MCMC and its baselines ------------------------------------------------------------


METHODS = ("vae", "mcmc_vi", "amc", "avb", "persistent")
KERNELS = {
    "none": None,
    "langevin": mcmc.langevin_step,
    "mala": mcmc.mala_step,
    "hmc": mcmc.hmc_step,
}


def amc_row(run: Run) -> Outcome:
    r"""A row of Table 1 of Li, Turner and Liu (2017): VAE, MCMC-VI, AMC, AVB or persistent MCMC.

    Decoder and Gaussian encoder: Adam with the default betas at ``learning_rate``. Student and
    discriminator of a game: Adam with betas (0.5, 0.999) at ``game_learning_rate``. All rates fall
    along half a cosine, batches are binarised anew at each visit. Rows of one seed start from one
    decoder. Assumed where the source is silent: everything but T, the step size and the encoders.

    :param run: its options are those of ``RECIPES["amc"]``.
    """
    config = run.config
    decoder = _on(run.device, ConvBernoulli(LATENT_DIM))
    encoder = discriminator = chains = None
    if config["encoder"] != "none":
        encoder = _on(run.device, evaluation.build_module(ENCODERS[config["encoder"]]))
    is_game = config["method"] == "avb" or config["rule"] in ("gan", "wasserstein")
    if is_game:
        discriminator = _on(run.device, Discriminator(LATENT_DIM))
    if config["method"] == "persistent":
        chains = amc.PersistentChains(config["training_images"], LATENT_DIM).to(run.device)

    optimizers = {"model": _adam(run, decoder, config["learning_rate"])}
    game = {"learning_rate": config["game_learning_rate"], "betas": (0.5, 0.999)}
    if encoder is not None:
        settings = game if is_game else {"learning_rate": config["learning_rate"]}
        optimizers["encoder"] = _adam(run, encoder, **settings)
    if discriminator is not None:
        optimizers["discriminator"] = _adam(run, discriminator, **game)

    result = _train(
        run,
        _amc_step(config, decoder, encoder, discriminator, chains, optimizers),
        {
            name: thing
            for name, thing in (
                ("decoder", decoder),
                ("encoder", encoder),
                ("discriminator", discriminator),
                ("chains", chains),
            )
            if thing is not None
        },
        optimizers,
        indexed=chains is not None,
    )
    chain_gradients = config["num_steps"] * config["num_student_samples"]
    if config["kernel"] == "hmc":
        chain_gradients *= config["num_leapfrog_steps"]
    return _outcome(
        run,
        decoder,
        encoder,
        config["encoder"],
        result,
        chain_gradients_per_image=config["epochs"] * chain_gradients,
        chain_bytes=0 if chains is None else chains.num_bytes,
    )


def _amc_step(
    config: Mapping, decoder, encoder, discriminator, chains, optimizers
) -> Callable[..., dict[str, Tensor]]:
    """The training step of a row, as a function of binary images (and their numbers)."""
    num_samples = config["num_student_samples"]
    kernel = KERNELS[config["kernel"]]
    if config["kernel"] == "hmc":
        kernel = partial(kernel, num_steps=config["num_leapfrog_steps"])
    teacher = partial(
        amc.teacher_samples,
        decoder,
        num_steps=config["num_steps"],
        step_size=config["step_size"],
        kernel=kernel,
        route=RefreshedLikelihood(decoder, dtype=DTYPES[config["chain_dtype"]]),
    )
    networks = (decoder, encoder, optimizers)
    if config["method"] == "vae":
        return lambda x: amc.vae_step(x, *networks, num_samples=num_samples)
    if config["method"] == "mcmc_vi":
        return lambda x: amc.mcmc_vi_step(x, *networks, teacher=teacher, num_samples=num_samples)
    if config["method"] == "avb":
        return lambda x: amc.avb_step(
            x, *networks, discriminator=discriminator, num_samples=num_samples
        )
    if config["method"] == "persistent":
        return lambda x, index: amc.persistent_step(
            x, index, decoder, chains, optimizers, teacher=teacher
        )
    return lambda x: amc.amc_step(
        x,
        *networks,
        teacher=teacher,
        rule=config["rule"],
        discriminator=discriminator,
        num_samples=num_samples,
        num_critic_steps=config["num_critic_steps"],
    )


def _amc_conflict(config: Mapping) -> str | None:
    """What is wrong with options that are right one by one; ``None`` if nothing is."""
    method, encoder, kernel, rule = (
        config[name] for name in ("method", "encoder", "kernel", "rule")
    )
    has_chain = method in ("mcmc_vi", "amc", "persistent")
    if (encoder == "none") != (method == "persistent"):
        return f"encoder = {encoder!r} does not go with method = {method!r}"
    if encoder != "gaussian" and (method in ("vae", "mcmc_vi") or rule == "inclusive_kl"):
        return f"encoder = {encoder!r} has no density, which method = {method!r} needs"
    if has_chain != (kernel != "none") or has_chain != (config["num_steps"] > 0):
        return (
            f"method = {method!r} {'has a' if has_chain else 'has no'} chain; got kernel = "
            f"{kernel!r} and num_steps = {config['num_steps']}"
        )
    if has_chain != (config["step_size"] > 0):
        return f"method = {method!r} does not go with step_size = {config['step_size']}"
    if (method == "amc") != (rule != "none"):
        return f"rule = {rule!r} does not go with method = {method!r}"
    if rule == "mmd" and config["num_student_samples"] < 8:
        return (
            "rule = 'mmd' needs num_student_samples of at least 8; got "
            f"{config['num_student_samples']}"
        )
    return None


# --- variational auto-encoders -------------------------------------------------------------------


def vae_row(run: Run) -> Outcome:
    """A variational auto-encoder trained by the ELBO, the IWAE bound or its DReG gradient.

    One Adam for both networks at ``learning_rate``, falling along half a cosine.

    :param run: its options are those of ``RECIPES["vae"]``.
    """
    config = run.config
    num_samples, objective = config["num_student_samples"], config["objective"]
    decoder = _on(run.device, ConvBernoulli(LATENT_DIM))
    encoder = _on(run.device, GaussianEncoder(LATENT_DIM))
    optimizers = {
        "model": _adam(run, decoder, config["learning_rate"]),
        "encoder": _adam(run, encoder, config["learning_rate"]),
    }

    def step(x: Tensor) -> dict[str, Tensor]:
        if objective == "elbo":
            return amc.vae_step(x, decoder, encoder, optimizers, num_samples=num_samples)
        q = encoder(x)
        if objective == "iwae":
            loss = -iwae_bound(decoder, q, x, num_samples)
            return {"loss": amc.descend(loss, *optimizers.values())}
        # The doubly reparameterised gradient is the encoder's; the decoder follows the bound.
        surrogate = -dreg_surrogate(decoder, q, x, num_samples)
        return {"loss": amc.descend(surrogate, *optimizers.values())}

    result = _train(run, step, {"decoder": decoder, "encoder": encoder}, optimizers)
    return _outcome(run, decoder, encoder, "gaussian", result)


# --- imputation ----------------------------------------------------------------------------------


def imputation_row(run: Run) -> Outcome:
    """Table 2 of Li, Turner and Liu (2017): what an encoder makes of missing pixels.

    For each mask, the diversity (entropy of the labels of the nearest training images) and the
    distance to them, of the encoder's imputations and of draws from the true conditional of the
    same decoder by long Markov chains. Training images are compared as grey values (assumed).

    :param run: its options are those of ``RECIPES["imputation"]``; the networks are those of the
        row ``trained`` of the study ``trained_study`` with the same scale and seed.
    """
    config = run.config
    decoder, encoder = (
        evaluation.load_module(run.weights_of(role), run.device) for role in ("decoder", "encoder")
    )
    x = data.load_mnist_binary("test").images[: config["images"]].to(run.device)
    train = data.load_mnist("train")
    grey, labels = train.images.to(run.device), train.labels.to(run.device)
    num_chains = config["num_chains"]

    def scores(name: str, completed: Tensor) -> dict[str, Tensor]:
        nearest = imputation.nearest_neighbour_l1(completed, grey)
        return {
            f"{name}_label_entropy": imputation.label_entropy(labels[nearest.index]),
            f"{name}_l1": nearest.distance.mean(0),
        }

    def evaluate(number: int, kind: str) -> dict:
        generator = torch.Generator().manual_seed(1000 * run.seed + number)
        mask = imputation.missing_mask(kind, generator=generator).to(run.device)
        torch.manual_seed(1000 * run.seed + number)
        completed = imputation.impute(decoder, encoder, x, mask, config["iterations"], num_chains)
        reference = imputation.conditional_samples(
            decoder,
            x,
            mask,
            num_chains,
            schedule=sigmoid_schedule(config["num_temperatures"]),
            step_size=config["step_size"],
            num_leapfrog=config["num_leapfrog"],
            num_steps=config["reference_steps"],
        )
        values = scores(kind, completed) | scores(f"reference_{kind}", reference.x)
        return {"values": values, "ess": round(reference.ess.mean().item(), 2)}

    weights = [hashlib.sha256(run.weights_of(role).read_bytes()).hexdigest() for role in ROLES]
    per_image, ess = {}, {}
    for number, kind in enumerate(imputation.MASKS):
        path, started = run.stage(kind)["checkpoint"], time.monotonic()
        found = read_checkpoint(path)
        if found is None or found["weights"] != weights:
            found = evaluate(number, kind) | {"weights": weights}
            write_checkpoint(path, found | {"seconds": time.monotonic() - started})
        per_image |= found["values"]
        ess[kind] = found["ess"]
    return Outcome(per_image, {}, {"reference_ess": ess})


# --- the kinds of studies ------------------------------------------------------------------------


_TRAINING_OPTIONS: dict[str, Specification] = {
    "training_images": integer(1, 60_000),
    "epochs": integer(1),
    "batch_size": integer(1, 60_000),
    "learning_rate": real(0, open=True),
    "num_student_samples": integer(1),
}

RECIPES: dict[str, Recipe] = {
    "amc": Recipe(
        amc_row,
        {
            **_TRAINING_OPTIONS,
            "method": choice(*METHODS),
            "encoder": choice("none", *ENCODERS),
            "kernel": choice(*KERNELS),
            "rule": choice("none", *amc.RULES),
            "num_steps": integer(0),
            "step_size": real(0),
            "num_leapfrog_steps": integer(1),
            "num_critic_steps": integer(1),
            "game_learning_rate": real(0, open=True),
            "chain_dtype": choice(*DTYPES),
            **_EVALUATION_OPTIONS,
        },
        _amc_conflict,
    ),
    "vae": Recipe(
        vae_row,
        {
            **_TRAINING_OPTIONS,
            "objective": choice("elbo", "iwae", "dreg"),
            **_EVALUATION_OPTIONS,
        },
    ),
    "imputation": Recipe(
        imputation_row,
        {
            "trained_study": choice("amc_table1"),
            "trained": choice("vae", "amc_cnn_g_t50", "amc_cnn_b_t50"),
            "images": integer(2, 10_000),
            "num_chains": integer(1),
            "iterations": integer(1),
            "num_temperatures": integer(1),
            "step_size": real(0, open=True),
            "num_leapfrog": integer(1),
            "reference_steps": integer(1),
        },
    ),
}
"""What a study of ``workflow/experiments.yaml`` can name as its ``recipe``."""
