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

import copy
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
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
from .side_by_side import side_by_side
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
    :ivar train_together: trains runs that differ in the seed alone as one model, and leaves each
        what it needs to go on; or None.
    """

    function: Callable[[Run], Outcome]
    options: dict[str, Specification]
    conflict: Callable[[Mapping[str, object]], str | None] = lambda config: None
    train_together: Callable[[Sequence[Run], Run], None] | None = None


# --- networks ------------------------------------------------------------------------------------


ENCODERS = {
    "gaussian": {"class": "GaussianEncoder", "latent_dim": LATENT_DIM},
    "cnn_g": {"class": "ImplicitEncoder", "latent_dim": LATENT_DIM, "noise": "gaussian"},
    "cnn_b": {"class": "ImplicitEncoder", "latent_dim": LATENT_DIM, "noise": "bernoulli"},
}
DECODER = {"class": "ConvBernoulli", "latent_dim": LATENT_DIM}
TOGETHER = "together.checkpoint"  # networks of a run that were trained with those of other seeds
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
    """Adam, on a graphics card in the form that a CUDA graph can hold."""
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
    seeds: Sequence[int] | None = None,
) -> FitResult:
    """Call ``step(x, index)`` on binarised minibatches and the numbers of their images.

    All learning rates fall along half a cosine. With ``seeds`` the batch has a block for each of
    them: block s sees the images in an order of its own and numbers them from s N.
    """
    epochs, batch_size = run.config["epochs"], run.config["batch_size"]
    levels = data.load_mnist("train", dtype=torch.uint8).images[: run.config["training_images"]]
    levels = levels.to(run.device)
    numbers = torch.arange(len(levels), device=run.device)
    orders = numbers.unsqueeze(0)
    if seeds is not None:
        orders = torch.stack([_order_of(seed, len(levels)) for seed in seeds]).to(run.device)
    first = len(levels) * torch.arange(len(orders), device=run.device).unsqueeze(1)
    num_steps = epochs * (len(levels) // batch_size)
    schedulers = {
        name: cosine_decay(optimizer, num_steps) for name, optimizer in optimizers.items()
    }

    def plain_update(batch: Tensor) -> dict[str, Tensor]:
        chosen = orders[:, batch]
        x = data.binarise(levels[chosen.flatten()])
        return step(x, (first + chosen).flatten())

    changed = {
        **networks,
        **{f"optimizer of {name}": optimizer for name, optimizer in optimizers.items()},
    }
    update = plain_update
    if run.device.type == "cuda":
        update = CudaGraphStep(plain_update, changed)

    def scheduled_step(batch: Tensor) -> dict[str, Tensor]:
        losses = update(batch)
        for scheduler in schedulers.values():
            scheduler.step()
        return losses

    # Validation of a distribution's arguments looks at values, which a graph cannot; and it would
    # stop a run that diverges with an error of its own, before `fit` sees the loss.
    with argument_validation(False):
        result = fit(
            scheduled_step,
            numbers,
            epochs=epochs,
            batch_size=batch_size,
            state={
                **changed,
                **{f"schedule of {name}": scheduler for name, scheduler in schedulers.items()},
            },
            generator=torch.Generator().manual_seed(run.seed),
            checkpoint_every=max(1, num_steps // 20),
            config={**run.config, "seed": run.seed if seeds is None else list(seeds)},
            **run.stage("training"),
        )
    if not result.finished:
        raise OutOfTimeError(f"{result.num_steps} of {num_steps} steps of training are done")
    return result


def _order_of(seed: int, num_images: int) -> Tensor:
    """The images shuffled, so that one minibatch of positions is of other images for each seed."""
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))


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
    config, details = run.config, {}
    networks = _amc_networks(run)
    found = _found_together(run, networks)
    if found is None:
        training = _amc_training(run, networks)
    else:
        training, details["trained_with_seeds"] = found
    chain_gradients = config["num_steps"] * config["num_student_samples"]
    if config["kernel"] == "hmc":
        chain_gradients *= config["num_leapfrog_steps"]
    chains = networks.get("chains")
    return _outcome(
        run,
        networks["decoder"],
        networks.get("encoder"),
        config["encoder"],
        training,
        chain_gradients_per_image=config["epochs"] * chain_gradients,
        chain_bytes=0 if chains is None else chains.num_bytes,
        **details,
    )


def _amc_networks(run: Run) -> dict[str, nn.Module]:
    """The networks of a row by name, those it has, drawn from the global stream."""
    config = run.config
    networks: dict[str, nn.Module] = {"decoder": _on(run.device, ConvBernoulli(LATENT_DIM))}
    if config["encoder"] != "none":
        encoder = evaluation.build_module(ENCODERS[config["encoder"]])
        networks["encoder"] = _on(run.device, encoder)
    if _is_game(config):
        networks["discriminator"] = _on(run.device, Discriminator(LATENT_DIM))
    if config["method"] == "persistent":
        chains = amc.PersistentChains(config["training_images"], LATENT_DIM)
        networks["chains"] = chains.to(run.device)
    return networks


def _is_game(config: Mapping) -> bool:
    return config["method"] == "avb" or config["rule"] in ("gan", "wasserstein")


def _amc_training(
    run: Run, networks: Mapping[str, nn.Module], seeds: Sequence[int] | None = None
) -> FitResult:
    """Train networks of one seed, or those of several side by side."""
    config = run.config
    # The loss is a mean over the blocks of all seeds, see `side_by_side`.
    epsilon = 1e-8 / (1 if seeds is None else len(seeds))
    game = {"learning_rate": config["game_learning_rate"], "betas": (0.5, 0.999)}
    alone = {"learning_rate": config["learning_rate"]}
    settings = {
        "decoder": alone,
        "encoder": game if _is_game(config) else alone,
        "discriminator": game,
    }
    optimizers = {
        "model" if name == "decoder" else name: _adam(
            run, networks[name], eps=epsilon, **settings[name]
        )
        for name in settings
        if name in networks
    }
    step = _amc_step(config, networks, optimizers)
    return _train(run, step, networks, optimizers, seeds)


def train_amc_together(runs: Sequence[Run], joint: Run) -> None:
    r"""Train a row for several seeds as one model, which a graphics card does in less time.

    Each seed starts from the networks it would start from alone, visits the images in an order of
    its own, and draws noise of its own, though not the noise that it would draw alone. The history
    of a loss is the mean over the seeds.

    :param runs: the runs, which differ in the seed alone. Each is left its networks, so that
        :func:`amc_row` goes on to evaluate them.
    :param joint: a run with a folder of its own, for the checkpoints of all together.
    :raises ValueError: for several samples of the student, or a low precision on a processor.
    """
    config, seeds = joint.config, [run.seed for run in runs]
    if config["num_student_samples"] > 1:
        raise ValueError(
            "seeds train together with one sample of the student for each image; got "
            f"num_student_samples = {config['num_student_samples']}"
        )
    if joint.device.type == "cpu" and config["chain_dtype"] != "float32":
        raise ValueError(
            f"chain_dtype = {config['chain_dtype']!r} needs a graphics card when seeds train "
            "together; on a processor train them one by one"
        )
    members = []
    for run in runs:
        torch.manual_seed(run.seed)
        members.append(_amc_networks(run))
    result = _amc_training(joint, _side_by_side(members), seeds)
    for run, member in zip(runs, members, strict=True):
        write_checkpoint(
            run.folder / TOGETHER,
            {
                "networks": {
                    name: network.state_dict() for name, network in member.items() if name in ROLES
                },
                "result": {k: v for k, v in result._asdict().items() if k != "seconds"},
                "seconds": result.seconds / len(seeds),  # the share of one
                "seeds": seeds,
            },
        )


def _side_by_side(members: Sequence[Mapping[str, nn.Module]]) -> dict[str, nn.Module]:
    """The networks of several seeds as those of one; tables of chains one behind the other."""
    joint: dict[str, nn.Module] = {}
    for name, first in members[0].items():
        if isinstance(first, amc.PersistentChains):
            joint[name] = copy.deepcopy(first)
            joint[name].z = torch.cat([member[name].z for member in members], dim=1)
        else:
            joint[name] = side_by_side([member[name] for member in members])
    return joint


def _found_together(
    run: Run, networks: Mapping[str, nn.Module]
) -> tuple[FitResult, list[int]] | None:
    """What training with other seeds has left this run, and the seeds; the networks are loaded."""
    found = read_checkpoint(run.folder / TOGETHER)
    if found is None:
        return None
    for name, weights in found["networks"].items():
        networks[name].load_state_dict(weights)
    return FitResult(**found["result"], seconds=found["seconds"]), found["seeds"]


def _amc_step(
    config: Mapping, networks: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]
) -> Callable[..., dict[str, Tensor]]:
    """The training step of a row, as a function of binary images and their numbers."""
    decoder, encoder, discriminator, chains = (
        networks.get(name) for name in ("decoder", "encoder", "discriminator", "chains")
    )
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
    parts = (decoder, encoder, optimizers)
    if config["method"] == "vae":
        return lambda x, _: amc.vae_step(x, *parts, num_samples=num_samples)
    if config["method"] == "mcmc_vi":
        return lambda x, _: amc.mcmc_vi_step(x, *parts, teacher=teacher, num_samples=num_samples)
    if config["method"] == "avb":
        return lambda x, _: amc.avb_step(
            x, *parts, discriminator=discriminator, num_samples=num_samples
        )
    if config["method"] == "persistent":
        return lambda x, index: amc.persistent_step(
            x, index, decoder, chains, optimizers, teacher=teacher
        )
    return lambda x, _: amc.amc_step(
        x,
        *parts,
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

    def step(x: Tensor, index: Tensor) -> dict[str, Tensor]:
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
        train_amc_together,
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
