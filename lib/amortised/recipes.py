r"""Recipes: how a row of a study is trained and evaluated, one section for each kind of study.

A recipe is two functions. ``build`` makes a :class:`Training`: the networks of a row, their
optimisers, and the step that updates them. Runs, chapters and benchmarks all get their steps here.
``evaluate`` gives the values per image of what was trained. :mod:`amortised.runs` does the rest: it
loops, keeps finished stages, and writes weights and results. A new kind of study is a ``build``
(or an ``evaluate``), a model of its options in :mod:`amortised.studies`, and a block in
``workflow/experiments.yaml``.

Sources: Li, Turner and Liu (2017) for the rows of amortised MCMC and for imputation; Burda, Grosse
and Salakhutdinov (2016) and Tucker et al. (2019) for those of importance-weighted auto-encoders;
Marino, Yue and Mandt (2018) for iterative inference.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim import Adam, Optimizer

from . import amc, data, diagnostics, evaluation, imputation, iterative, mcmc, results, targets
from .adversarial import Discriminator, InformedDiscriminator
from .ais import AISSettings, ais, sigmoid_schedule
from .encoders import GaussianEncoder, ImplicitEncoder, start_at_prior
from .fast import RefreshedLikelihood, log_likelihood_and_grad
from .files import Work, load_tree
from .hvae import HamiltonianFlow, hvae_path
from .hvae import Path as Paths
from .mcvae import (
    Bridge,
    LeapfrogMap,
    Maps,
    PlanarFlow,
    RealNVP,
    ScoreNetwork,
    annealed_path,
    metvae_path,
    uha_path,
)
from .models import AncestralGaussian, LatentVariableModel, conditional_normal
from .numerics import effective_sample_size, log_mean_exp, seeded
from .objectives import dreg_surrogate, elbo, iwae_bound, score_function_surrogate
from .training import fit, half_cosine

LATENT_DIM = 32
#: How to build the decoder, and each encoder that a row can name.
ARCHITECTURES = {
    "decoder": {"class": "ConvBernoulli", "latent_dim": LATENT_DIM},
    "gaussian": {"class": "GaussianEncoder", "latent_dim": LATENT_DIM},
    "gaussian_wide": {"class": "GaussianEncoder", "latent_dim": LATENT_DIM, "num_features": 555},
    "cnn_g": {"class": "ImplicitEncoder", "latent_dim": LATENT_DIM, "noise": "gaussian"},
    "cnn_b": {"class": "ImplicitEncoder", "latent_dim": LATENT_DIM, "noise": "bernoulli"},
}

#: Long chains that teachers are held to: Hamiltonian, from where the teacher ended.
LONG_CHAIN = {"num_steps": 50, "num_leapfrog": 10, "step_size": 0.1}
#: Training images by which a student is brought to the scale of the prior.
START_IMAGES = 500
#: The last training images, by which rates are chosen.
VALIDATION_IMAGES = 1000
#: Images of a batch whose log-likelihoods are noted in training.
WATCHED_IMAGES = 10
#: Samples of the bound of a student with a density.
ELBO_SAMPLES = 100

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Training(NamedTuple):
    """What a training loop needs of a row.

    :ivar step: ``step(x, index)`` makes one update on binary images ``[B, P]`` and the numbers
        ``[B]`` that they have among the training images; returns the mean losses by name.
    :ivar networks: everything that it changes but the optimisers, by role: ``"decoder"``,
        ``"encoder"``, ``"discriminator"``, ``"chains"``, those that the row has.
    :ivar optimizers: by the names of :mod:`amortised.amc`.
    :ivar details: facts of the row for its result, as plain values.
    :ivar architectures: how to build the networks that are kept, by role; by default those of
        :data:`ARCHITECTURES` that the options name.
    :ivar examples: how many there are, and a function from numbers ``[B]`` to that batch
        ``[B, P]``; by default MNIST's training images, binarised anew.
    """

    step: Callable[[Tensor, Tensor], Mapping[str, Tensor]]
    networks: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    details: dict[str, int]
    architectures: dict[str, dict] | None = None
    examples: tuple[int, Callable[[Tensor], Tensor]] | None = None


class Run(NamedTuple):
    """A run at work: what :mod:`amortised.runs` gives an evaluation.

    :ivar seed: of everything random.
    :ivar config: the options of the row, complete and checked.
    :ivar device: where to compute.
    :ivar work: where it keeps its stages, and when it must stop.
    :ivar weights: folder of the weights: its own, or those of the run that it builds on.
    """

    seed: int
    config: Mapping[str, object]
    device: torch.device
    work: Work
    weights: Path

    def network(self, role: str) -> nn.Module | None:
        """A trained network, ``"decoder"`` or ``"encoder"``; ``None`` if the row has none."""
        path = self.weights / f"{role}.safetensors"
        if not path.exists():
            return None
        return evaluation.load_module(path, self.device)


class Outcome(NamedTuple):
    """What an evaluation found.

    :ivar per_image: ``{metric: values [N]}``; row n belongs to image n.
    :ivar seconds: wall time of its stages.
    :ivar details: anything else worth keeping, as plain values.
    """

    per_image: dict[str, Tensor]
    seconds: dict[str, float]
    details: dict


class Recipe(NamedTuple):
    """How the rows of a kind of study are trained (``None``: they build on others) and evaluated.

    ``build`` maps the options and a device to a :class:`Training`; its networks are drawn from the
    global stream.
    """

    build: Callable[[Mapping[str, object], torch.device], Training] | None
    evaluate: Callable[[Run], Outcome]


# --- networks and optimisers ---------------------------------------------------------------------


def _network(kind: str, device: torch.device | str) -> nn.Module:
    return _on_device(evaluation.build_module(ARCHITECTURES[kind]), device)


def _on_device(module: nn.Module, device: torch.device | str) -> nn.Module:
    """Move a network, with its images channels last: a few per cent faster on a processor."""
    return module.to(device, memory_format=torch.channels_last)


def _adam(network: nn.Module, learning_rate: float, **settings: object) -> Adam:
    """Adam, on a graphics card in the form that a CUDA graph can hold.

    The three weights of an informed discriminator move on another scale and have a rate of their
    own.
    """
    device = next(network.parameters()).device
    is_cuda = device.type == "cuda"

    def rate(value: float) -> float | Tensor:
        return torch.tensor(value, device=device) if is_cuda else value

    groups = [{"params": network.parameters(), "lr": rate(learning_rate)}]
    if isinstance(network, InformedDiscriminator):
        groups[0]["params"] = network.network.parameters()
        groups.append({"params": [network.weights], "lr": rate(INFORMED_RATE)})
    return Adam(groups, **({"capturable": True} if is_cuda else {}), **settings)


# --- amortised MCMC and its baselines ------------------------------------------------------------


#: Learning rate of the weights a, b and c of an informed discriminator.
INFORMED_RATE = 2e-2
#: The rules of :mod:`amortised.amc` that a row can name, some with another critic.
RULES = amc.RULES | {
    "informed_gan": amc.informed(amc.gan()),
    "standardised_gan": amc.standardised(amc.gan()),
    "standardised_relativistic": amc.standardised(amc.relativistic()),
}
KERNELS = {
    "none": None,
    "langevin": mcmc.langevin_step,
    "mala": mcmc.mala_step,
    "hmc": mcmc.hmc_step,
}


def amc_training(
    config: Mapping[str, object], device: torch.device | str = "cpu", *, plain: bool = False
) -> Training:
    r"""A row of Table 1 of Li, Turner and Liu (2017): VAE, MCMC-VI, AMC, AVB or persistent MCMC.

    Decoder and Gaussian encoder: Adam with the default betas at ``learning_rate``. Student and
    discriminator of a game: Adam with betas (0.5, 0.999) at ``game_learning_rate``. Rows of one
    seed start from one decoder. Assumed where the source is silent: everything but T, the step size
    and the encoders.

    :param config: the options of :class:`amortised.studies.AmcOptions`.
    :param device: where to put the networks.
    :param plain: run the chain by autograd through the decoder, and not on the faster route of
        :mod:`amortised.fast`; the same up to rounding.

    >>> options = dict(method="vae", encoder="gaussian", kernel="none", rule="none", num_steps=0,
    ...     step_size=0.0, num_leapfrog_steps=1, num_critic_steps=1, num_student_samples=1,
    ...     learning_rate=1e-3, game_learning_rate=5e-4, chain_dtype="float32",
    ...     training_images=100, epochs=1)
    >>> training = amc_training(options)
    >>> list(training.step(torch.zeros(5, 784), torch.arange(5)))
    ['loss']
    """
    method, encoder, rule = config["method"], config["encoder"], RULES.get(config["rule"])
    is_game = method == "avb" or (rule is not None and rule.is_game)
    networks: dict[str, nn.Module] = {"decoder": _network("decoder", device)}
    if encoder != "none":
        networks["encoder"] = _network(encoder, device)
    if is_game:
        networks["discriminator"] = _on_device(_discriminator(config["rule"]), device)
    if method == "persistent":
        networks["chains"] = amc.PersistentChains(config["training_images"], LATENT_DIM).to(device)

    alone = {"learning_rate": config["learning_rate"]}
    game = {"learning_rate": config["game_learning_rate"], "betas": (0.5, 0.999)}
    critic = game | {"learning_rate": config.get("discriminator_learning_rate",
                                                 config["game_learning_rate"])}  # fmt: skip
    settings = {"decoder": alone, "encoder": game if is_game else alone, "discriminator": critic}
    optimizers = {
        "model" if name == "decoder" else name: _adam(networks[name], **settings[name])
        for name in settings
        if name in networks
    }
    gradients = config["num_steps"] * config["num_student_samples"]
    if config["kernel"] == "hmc":
        gradients *= config["num_leapfrog_steps"]
    chains = networks.get("chains")
    details = {
        "chain_gradients_per_image": config["epochs"] * gradients,
        "chain_bytes": 0 if chains is None else chains.num_bytes,
    }
    return Training(_amc_step(config, networks, optimizers, plain), networks, optimizers, details)


def _discriminator(rule: str) -> nn.Module:
    """The discriminator of a game, by the name of its rule; ``"none"`` is that of AVB."""
    if rule.startswith("standardised"):
        return InformedDiscriminator(Discriminator(2 * LATENT_DIM))
    network = Discriminator(LATENT_DIM)
    return InformedDiscriminator(network) if rule.startswith("informed") else network


def _amc_step(
    config: Mapping[str, object],
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    plain: bool,
) -> Callable[[Tensor, Tensor], Mapping[str, Tensor]]:
    """The update of a row of amortised MCMC."""
    decoder, encoder = networks["decoder"], networks.get("encoder")
    kernel = KERNELS[config["kernel"]]
    if config["kernel"] == "hmc":
        kernel = partial(kernel, num_steps=config["num_leapfrog_steps"])
    chain = {"num_steps": config["num_steps"], "step_size": config["step_size"], "kernel": kernel}
    if not plain:
        chain["route"] = RefreshedLikelihood(decoder, dtype=DTYPES[config["chain_dtype"]])
    teacher = partial(amc.teacher_samples, decoder, **chain)
    trained = (decoder, encoder, optimizers)
    samples = {"num_samples": config["num_student_samples"]}
    if config["method"] == "vae":
        return lambda x, index: amc.vae_step(x, *trained, **samples)
    if config["method"] == "mcmc_vi":
        return _watched(partial(amc.mcmc_vi_step, **samples), trained, teacher)
    if config["method"] == "persistent":
        return lambda x, index: amc.persistent_step(
            x, index, decoder, networks["chains"], optimizers, teacher=teacher
        )
    if config["method"] == "short_run":
        return lambda x, index: amc.short_run_step(x, decoder, optimizers, teacher=teacher)
    samples["discriminator"] = networks.get("discriminator")
    if config["method"] == "avb":
        return lambda x, index: amc.avb_step(x, *trained, **samples)
    rule = RULES[config["rule"]]._replace(num_critic_steps=config["num_critic_steps"])
    return _watched(partial(amc.amc_step, rule=rule, **samples), trained, teacher)


def _watched(
    step: Callable[..., dict[str, Tensor]], trained: tuple[object, ...], teacher: amc.Teacher
) -> Callable[[Tensor, Tensor], Mapping[str, Tensor]]:
    """The update of a student with a teacher, which tells of the log p(x | z) of some images, too.

    Of the student's draw, of its draw for another image, and of the end of the chain.
    """
    model = trained[0]

    def update(x: Tensor, index: Tensor) -> Mapping[str, Tensor]:
        seen = {}

        def watched(x: Tensor, z: Tensor) -> Tensor:
            z_teacher, few = teacher(x, z), x[:WATCHED_IMAGES]
            drawn = {"student": z, "other": z.roll(1, dims=1), "teacher": z_teacher}
            with torch.no_grad():
                for who, samples in drawn.items():
                    found = model.log_likelihood(few, samples[:, : len(few)])
                    seen[f"log_likelihood_{who}"] = found.mean()
            return z_teacher

        return step(x, *trained, teacher=watched) | seen

    return update


# --- students held to their teachers -------------------------------------------------------------


class _WarmUp(nn.Module):
    """A weight that rises from 0 to 1 over the first calls, and stays."""

    def __init__(self, num_calls: int):
        super().__init__()
        self.num_calls = num_calls
        self.register_buffer("done", torch.zeros(()))

    def forward(self) -> Tensor:
        self.done.add_(1.0)
        return (self.done / self.num_calls).clamp(max=1.0)


def distillation_training(
    config: Mapping[str, object], device: torch.device | str = "cpu", *, plain: bool = False
) -> Training:
    """A row of amortised MCMC, as :func:`amc_training` makes it, from a start that data inform.

    The decoder's output bias is the logit of the mean pixel, and an implicit student starts at the
    scale of the prior (:func:`amortised.encoders.start_at_prior`). Discriminators have a learning
    rate of their own, and that of an informed one's weights is ``INFORMED_RATE``. The divergence of
    the VAE's bound can be warmed up linearly over a share ``kl_warmup`` of the updates.

    :param config: the options of :class:`amortised.studies.DistillationOptions`.
    :param device: where to put the networks.
    :param plain: as in :func:`amc_training`.
    """
    training = amc_training(config, device, plain=plain)
    networks, optimizers = training.networks, training.optimizers
    images = data.load_mnist("train").images[: config["training_images"]]
    with torch.no_grad():
        networks["decoder"].start_at_mean(images.to(device))
        if isinstance(networks.get("encoder"), ImplicitEncoder):
            few = images[:START_IMAGES].round().to(device)
            start_at_prior(networks["encoder"], few)
    if config["kl_warmup"] == 0.0:
        return training
    updates = config["epochs"] * math.ceil(len(images) / config["batch_size"])
    warm_up = _WarmUp(max(1, round(config["kl_warmup"] * updates))).to(device)
    trained = (networks["decoder"], networks["encoder"], optimizers)

    def step(x: Tensor, index: Tensor) -> Mapping[str, Tensor]:
        samples = {"num_samples": config["num_student_samples"], "kl_weight": warm_up()}
        return amc.vae_step(x, *trained, **samples)

    return training._replace(step=step, networks=networks | {"warm-up": warm_up})


def evaluate_distillation(run: Run) -> Outcome:
    """What a row has learned: its decoder by annealing and importance sampling, and its student.

    Random test images (or, to choose rates, random images among the training images that no row is
    trained on), the same in every run. Hamiltonian annealing on the first ``hais_images``, with
    bounds on simulated pairs at the same settings; importance sampling from a Gaussian with full
    covariance that is fitted to each image; :func:`amortised.diagnostics.student_diagnostics` on
    the first ``diagnostic_images``.
    """
    config, work, seed = run.config, run.work, run.seed
    decoder = _on_device(run.network("decoder"), run.device)
    x = _held_out_images(config).to(run.device)
    per_image, seconds = {}, {}
    if config["hais_images"]:
        per_image, seconds = _annealed(run, decoder, x[: config["hais_images"]])
    settings = {"seed": seed, "likelihood": partial(log_likelihood_and_grad, decoder)}
    proposal = evaluation.fit_full_covariance(decoder, x, **settings, work=work.stage("gaussians"))
    settings |= {"num_samples": config["num_samples"]}
    found = evaluation.importance_sampling_ll(
        decoder, proposal, x, **settings, work=work.stage("importance")
    )
    per_image |= {"full_is_ll": found.log_likelihood, "full_is_ess": found.ess}
    seconds["importance sampling"] = proposal.seconds + found.seconds
    encoder = run.network("encoder")
    if isinstance(encoder, GaussianEncoder):
        with torch.no_grad():
            per_image["elbo"] = elbo(decoder, encoder(x), x, ELBO_SAMPLES, analytic_kl=True)
    if config["diagnostic_images"]:
        stage = work.stage("diagnostics")
        diagnosed = stage.load("values")
        if diagnosed is None:
            stage.check_time("the decoder is evaluated")
            diagnosed = _diagnose(run, decoder, x[: config["diagnostic_images"]])
            stage.save("values", diagnosed)
        seconds["diagnostics"] = diagnosed.pop("seconds")
        per_image |= diagnosed
    return Outcome(per_image, seconds, {})


def _held_out_images(config: Mapping[str, object]) -> Tensor:
    """Random binary images of the test set, or of the training images that are held back."""
    drawn = data.drawn_images(10_000, config["image_seed"])
    if config["held_out"] == "test":
        return data.load_mnist_binary("test").images[drawn[: config["images"]]]
    grey = data.load_mnist("train", dtype=torch.uint8).images[-VALIDATION_IMAGES:]
    generator = torch.Generator().manual_seed(config["image_seed"])
    return data.binarise(grey, generator=generator)[drawn[drawn < len(grey)][: config["images"]]]


def _diagnose(run: Run, decoder: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The student against its teacher, and the teacher against long Hamiltonian chains.

    The student of a row without a chain is held to the moments of the long chains alone; that of
    short runs is the prior; a table of persistent chains has none.
    """
    config, started, acceptance = run.config, time.monotonic(), []
    if config["method"] == "persistent":
        return {"seconds": 0.0}
    torch.manual_seed(run.seed)
    encoder = run.network("encoder")
    if encoder is None:
        encoder = partial(_prior_at, decoder)
    route = RefreshedLikelihood(decoder)

    def chain(x: Tensor, z: Tensor, **settings: object) -> Tensor:
        found = amc.teacher_chain(decoder, x, z, route=route, **settings)
        acceptance.append(found.acceptance_rate)
        return found.samples[-1]

    kernel = partial(mcmc.hmc_step, num_steps=LONG_CHAIN["num_leapfrog"])
    long = partial(chain, kernel=kernel, num_steps=LONG_CHAIN["num_steps"],
                   step_size=LONG_CHAIN["step_size"])  # fmt: skip
    teacher, has_chain = long, config["kernel"] != "none"
    if has_chain:
        teacher = partial(chain, kernel=KERNELS[config["kernel"]], num_steps=config["num_steps"],
                          step_size=config["step_size"])  # fmt: skip
    found = diagnostics.student_diagnostics(
        decoder, encoder, x, teacher=teacher, long_chain=long,
        num_samples=config["diagnostic_samples"],
    )  # fmt: skip
    found["long_chain_acceptance_rate"] = acceptance[1].mean(0)
    if acceptance[0] is not None:
        found["teacher_acceptance_rate"] = acceptance[0].mean(0)
    if has_chain and config["encoder"] != "none":  # long chains for so many would be dear
        others = data.load_mnist("train", dtype=torch.uint8).images[: config["classifier_images"]]
        classifier = _on_device(Discriminator(2 * LATENT_DIM), run.device)
        found["classifier_auc"] = diagnostics.classifier_auc(
            classifier, encoder, data.binarise(others).to(run.device), x, teacher=teacher,
            num_samples=config["diagnostic_samples"], epochs=config["classifier_epochs"],
        )  # fmt: skip
    return found | {"seconds": time.monotonic() - started}


def _prior_at(decoder: nn.Module, x: Tensor) -> Distribution:
    return decoder.prior().expand((len(x),))


# --- variational auto-encoders -------------------------------------------------------------------


def vae_training(config: Mapping[str, object], device: torch.device | str = "cpu") -> Training:
    """A variational auto-encoder trained by the ELBO, the IWAE bound or its DReG gradient.

    Adam at ``learning_rate``. The doubly reparameterised gradient is the encoder's; the decoder
    follows the bound.

    :param config: the options of :class:`amortised.studies.VaeOptions`.
    :param device: where to put the networks.
    """
    num_samples, objective = config["num_student_samples"], config["objective"]
    networks = {"decoder": _network("decoder", device), "encoder": _network("gaussian", device)}
    decoder, encoder = networks.values()
    optimizers = {
        "model": _adam(decoder, config["learning_rate"]),
        "encoder": _adam(encoder, config["learning_rate"]),
    }
    if objective == "elbo":

        def step(x: Tensor, index: Tensor) -> Mapping[str, Tensor]:
            return amc.vae_step(x, decoder, encoder, optimizers, num_samples=num_samples)
    else:
        bound = {"iwae": iwae_bound, "dreg": dreg_surrogate}[objective]

        def step(x: Tensor, index: Tensor) -> Mapping[str, Tensor]:
            loss = -bound(decoder, encoder(x), x, num_samples)
            return {"loss": amc.descend(loss, *optimizers.values())}

    return Training(step, networks, optimizers, {})


def evaluate_decoder(run: Run) -> Outcome:
    """Estimates of the evidence of the fixed binary test images, with bounds on simulated pairs.

    Importance sampling from the row's own encoder, where it has a density, and from a Gaussian that
    is fitted after training; annealing from the prior with fresh momentum at each temperature; and
    bounds from both sides on simulated pairs, at the same settings.
    """
    config, work, seed = run.config, run.work, run.seed
    decoder = _on_device(run.network("decoder"), run.device)
    encoder = run.network("encoder")
    x = data.load_mnist_binary("test").images[: config["images"]].to(run.device)
    with seeded(seed, run.device):
        proposal = _network("gaussian", run.device)
    train = data.load_mnist("train").images[: config["training_images"]].to(run.device)
    passes = {"epochs": config["proposal_epochs"], "batch_size": config["batch_size"], "seed": seed}
    evaluation.fit_gaussian_proposal(
        decoder, train, encoder=proposal, work=work.stage("proposal"), **passes
    )
    sampling = partial(
        evaluation.importance_sampling_ll, decoder, num_samples=config["num_samples"], seed=seed
    )
    fitted = own = sampling(proposal, x, work=work.stage("posthoc_importance"))
    seconds = {"importance sampling": fitted.seconds}
    if isinstance(encoder, GaussianEncoder):
        own = sampling(_on_device(encoder, run.device), x, work=work.stage("importance"))
        seconds["importance sampling"] += own.seconds
    per_image, annealing_seconds = _annealed(run, decoder, x, "ais")
    for name, estimate in (("is", own), ("posthoc_is", fitted)):
        per_image |= {f"{name}_ll": estimate.log_likelihood, f"{name}_ess": estimate.ess}
    return Outcome(per_image, seconds | annealing_seconds, {})


def _annealed(
    run: Run, decoder: nn.Module, x: Tensor, name: str = "hais"
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Annealing of images from the prior, and bounds on simulated pairs at the same settings."""
    config, work = run.config, run.work
    settings = _annealing(config, run.seed)
    dtype = DTYPES[config.get("evaluation_dtype", "float32")]
    if dtype is not None:
        settings["likelihood"] = partial(log_likelihood_and_grad, decoder, dtype=dtype)
    found = evaluation.hais_ll(decoder, x, **settings, work=work.stage("annealing"))
    pairs = config["simulated_pairs"]
    bounds = evaluation.bdmc_ll(decoder, pairs, **settings, work=work.stage("bounds"))
    per_image = {
        f"{name}_ll": found.log_likelihood,
        f"{name}_ess": found.ess,
        f"{name}_acceptance_rate": found.acceptance_rate,
        "simulated_lower_bound": bounds.lower,
        "simulated_upper_bound": bounds.upper,
        "simulated_gap": bounds.gap,
    }
    return per_image, {"annealing": found.seconds, "bounds": bounds.seconds}


def _annealing(config: Mapping[str, object], seed: int) -> dict[str, object]:
    """The settings of chains from the prior; without a persistence momenta are fresh."""
    names = ("num_chains", "pilot_chains", "num_temperatures", "num_leapfrog", "persistence")
    return {name: config[name] for name in names if name in config} | {"seed": seed}


# --- one decoder, many teachers ------------------------------------------------------------------


def teacher_training(config: Mapping[str, object], device: torch.device | str = "cpu") -> Training:
    """A trained decoder and its Gaussian encoder, trained on as :func:`amc_training` does.

    Both start from committed weights, so that rows differ by their teacher alone.

    :param config: the options of :class:`amortised.studies.TeacherOptions`.
    :param device: where to put the networks.
    :raises ValueError: when the weights are not those that the options name.
    """
    fixed = dict(encoder="gaussian", rule="none", num_leapfrog_steps=1, num_critic_steps=1,
                 num_student_samples=1, game_learning_rate=config["learning_rate"],
                 chain_dtype="float32")  # fmt: skip
    paths = _start(config)
    training = amc_training(fixed | config, device)
    for role, kind in (("decoder", "decoder"), ("encoder", "gaussian")):
        results.load_weights(paths[role], training.networks[role], ARCHITECTURES[kind])
    return training


def _start(config: Mapping[str, object]) -> dict[str, Path]:
    """The files of the weights to start from, their contents checked."""
    stem = data.data_folder() / "models" / config["start"]
    paths = {r: stem.with_name(f"{stem.name}-{r}.safetensors") for r in ("decoder", "encoder")}
    content = b"".join(path.read_bytes() for path in paths.values())
    digest = hashlib.sha256(content).hexdigest()
    if digest != config["start_sha256"]:
        raise ValueError(
            f"{stem} has other weights than the study asks for: start_sha256 is "
            f"{config['start_sha256']}, that of decoder and encoder {digest}; restore these files"
        )
    return paths


def evaluate_teacher(run: Run) -> Outcome:
    """Hamiltonian annealing of random test images before and after, and the chain's acceptance.

    Both decoders meet the same images and random numbers, so that ``hais_ll_change`` is paired.
    The acceptance is that of the row's chain on the trained decoder from the trained encoder,
    where the kernel has a Metropolis test.
    """
    config = run.config
    decoder = _on_device(run.network("decoder"), run.device)
    start = evaluation.load_module(_start(config)["decoder"]).half().float()  # as runs keep theirs
    start = _on_device(start, run.device)
    test = data.load_mnist_binary("test").images
    x = test[data.drawn_images(config["images"], config["image_seed"])].to(run.device)
    per_image, seconds = _annealed(run, decoder, x)
    before = evaluation.hais_ll(
        start, x, **_annealing(config, run.seed), work=run.work.stage("start_annealing")
    )
    per_image["start_hais_ll"] = before.log_likelihood
    per_image["hais_ll_change"] = per_image["hais_ll"] - before.log_likelihood
    seconds["annealing"] += before.seconds
    if config["kernel"] == "mala":
        encoder = _on_device(run.network("encoder"), run.device)
        chain = amc.teacher_chain(
            decoder,
            x,
            amc.student_samples(encoder, x, config["num_chains"]).detach(),
            num_steps=config["num_steps"],
            step_size=config["step_size"],
            kernel=KERNELS["mala"],
        )
        per_image["teacher_acceptance_rate"] = chain.acceptance_rate.mean(0)
    return Outcome(per_image, seconds, {})


# --- chains inside the bound ---------------------------------------------------------------------


#: The invertible maps that a row can name, by latent dimension and first step size.
MAPS: dict[str, Callable[[int, float], nn.Module]] = {
    "leapfrog": LeapfrogMap,
    "realnvp": lambda latent_dim, _: RealNVP(latent_dim),
    "planar": lambda latent_dim, _: PlanarFlow(latent_dim),
    "potential": lambda latent_dim, step_size: LeapfrogMap(
        latent_dim, step_size, potential=_potential(latent_dim)
    ),
}
#: The bridges, by whether they have a learned reverse.
BRIDGES = {"langevin": False, "annealed": False, "uha": False, "hvi": True, "mcd": True}


def _potential(latent_dim: int) -> nn.Module:
    """A learned potential that does not see the target: ``[..., B, D] -> [..., B]``."""
    layers = nn.Linear(latent_dim, 64), nn.SiLU(), nn.Linear(64, 1)
    return nn.Sequential(*layers, nn.Flatten(-2, -1))


def build_path(
    config: Mapping[str, object], latent_dim: int
) -> tuple[Callable[..., Paths], nn.Module]:
    """The path of a row, and what it learns beside the encoder.

    :param config: the options of :class:`amortised.studies.PathOptions`.
    :param latent_dim: D.
    :return: ``path_fn(model, q, x, num_samples)``, and a module, possibly without parameters.

    >>> config = dict(path="hvae", num_steps=10, tempering="free", varied=False, step_size=0.2)
    >>> sum(p.numel() for p in build_path(config, 64)[1].parameters())
    74
    """
    path, steps = config["path"], config["num_steps"]
    step = {"step_size": config["step_size"], "varied": config["varied"]}
    if path == "importance":
        return partial(targets.importance_path, num_inner=steps + 1), nn.ModuleList()
    if path == "hvae":
        flow = HamiltonianFlow(latent_dim, steps, config["tempering"], **step)
        return partial(hvae_path, flow=flow), flow
    if path in BRIDGES:
        step["score"] = ScoreNetwork(latent_dim) if BRIDGES[path] else None
        step["persistence"] = config["kept_momentum"]
        bridge = Bridge(latent_dim, steps, on_target=path == "hvi", **step)
        return partial(annealed_path if path == "annealed" else uha_path, settings=bridge), bridge
    maps = nn.ModuleList(MAPS[path](latent_dim, config["step_size"]) for _ in range(steps))
    return partial(metvae_path, settings=Maps(maps, config["acceptance"])), maps


def path_training(config: Mapping[str, object], device: torch.device | str = "cpu") -> Training:
    """A variational auto-encoder whose bound has a path in it; without steps, the plain one.

    Adam at ``learning_rate`` for decoder, encoder and path. Decisions bring their term of the
    gradient, with the leave-one-out mean over the paths of an image as its baseline.

    :param config: the options of :class:`amortised.studies.PathVaeOptions`.
    :param device: where to put the networks.
    """
    networks = {"decoder": _network("decoder", device)}
    networks["encoder"] = _network(config["encoder"], device)
    path_fn, learned = build_path(config, LATENT_DIM)
    networks["path"] = learned.to(device)
    names = {"model": "decoder", "encoder": "encoder"}
    names |= {"path": "path"} if any(True for _ in learned.parameters()) else {}
    optimizers = {n: _adam(networks[role], config["learning_rate"]) for n, role in names.items()}
    decoder, encoder, num_samples = *list(networks.values())[:2], config["num_path_samples"]

    def step(x: Tensor, index: Tensor) -> Mapping[str, Tensor]:
        path = path_fn(decoder, encoder(x), x, num_samples)
        terms = path.log_weights, path.log_decisions
        bound = score_function_surrogate(*terms, baseline=num_samples > 1)
        losses = {"loss": amc.descend(-bound, *optimizers.values())}
        return losses | ({"acceptance": path.acceptance.mean()} if len(path.acceptance) else {})

    details = {"path_parameters": sum(p.numel() for p in learned.parameters())}
    return Training(step, networks, optimizers, details)


#: Images in a block of paths: each block has random numbers of its own.
PATH_BLOCK = 10


def evaluate_path(run: Run) -> Outcome:
    """The row's own bound on random test images, and its decoder by annealing like all others.

    ``bound`` and ``path_ll`` are the mean and the logarithm of the mean of ``num_samples`` paths.
    Annealing from the prior does not know of the path. ``score_share`` of the details is the share
    of the decisions' term in the variance of the gradient of the path's parameters.
    """
    config, work, seed = run.config, run.work, run.seed
    decoder, encoder = (_on_device(run.network(r), run.device) for r in ("decoder", "encoder"))
    path_fn, learned = build_path(config, LATENT_DIM)
    learned.to(run.device).load_state_dict(load_tree(run.weights / "path.stage"))
    x = _held_out_images(config).to(run.device)
    stage, started = work.stage("paths"), time.monotonic()
    per_image = stage.load("values")
    if per_image is None:
        blocks = []
        for number, block in enumerate(x.split(PATH_BLOCK)):
            stage.check_time(f"{number} blocks of images are done")
            with seeded(1000 * seed + number, run.device), torch.no_grad():
                blocks.append(path_fn(decoder, encoder(block), block, config["num_samples"]))
        log_weights = torch.cat([path.log_weights for path in blocks], 1).cpu()
        per_image = {
            "bound": log_weights.mean(0),
            "path_ll": log_mean_exp(log_weights, dim=0),
            "path_ess": effective_sample_size(log_weights),
            "half_variance": 0.5 * log_weights.var(0),
        }
        if len(blocks[0].acceptance):
            rates = [path.acceptance.mean((0, 1)) for path in blocks]
            per_image["acceptance"] = torch.cat(rates).cpu()
        stage.save("values", per_image)
    seconds = {"paths": time.monotonic() - started}
    annealed, annealing_seconds = _annealed(run, decoder, x)
    per_image, seconds = per_image | annealed, seconds | annealing_seconds
    share = {}
    if "acceptance" in per_image:
        with seeded(seed, run.device):
            share = {"score_share": _score_share(path_fn, decoder, encoder, x, learned)}
    return Outcome(per_image, seconds, share)


def _score_share(
    path_fn: Callable[..., Paths], decoder: nn.Module, encoder: nn.Module, x: Tensor,
    learned: nn.Module, num_draws: int = 20
) -> float:  # fmt: skip
    """Variance of the decisions' term over the sum of both terms' variances, two paths an image."""
    draws = [[], []]
    for _ in range(num_draws):
        path = path_fn(decoder, encoder(x[:PATH_BLOCK]), x[:PATH_BLOCK], 2)
        signal = (path.log_weights - path.log_weights.flip(0)).detach()
        for kept, term in zip(draws, (path.log_weights, signal * path.log_decisions), strict=True):
            grads = torch.autograd.grad(
                term.mean(), list(learned.parameters()), retain_graph=True, allow_unused=True
            )
            kept.append(torch.cat([g.flatten() for g in grads if g is not None]))
    pathwise, score = (torch.stack(kept).var(0).sum() for kept in draws)
    return round((score / (pathwise + score)).item(), 4)


# --- paths on targets that are known -------------------------------------------------------------


def _observed_half(x: Tensor) -> Tensor:
    """The upper half of images, as a mask of what is missing."""
    mask = torch.ones_like(x[0], dtype=torch.bool)
    mask[: mask.numel() // 2] = False
    return mask


def _on_a_decoder(config: Mapping[str, object], seed: int) -> tuple[LatentVariableModel, Tensor]:
    """Posteriors of digits under a trained decoder, of whole images or of upper halves.

    Their evidence is a mean of annealed estimates, a lower bound.
    """
    decoder = evaluation.load_module(_start(config)["decoder"]).requires_grad_(False)
    chosen = torch.Generator().manual_seed(config["image_seed"])
    images = data.load_mnist_binary("test").images
    x = images[data.drawn_images(config["starts"], config["image_seed"])]
    log_likelihood = partial(decoder.log_likelihood, x)
    if config["target"] == "inpainting":
        mask = _observed_half(x)
        log_likelihood = partial(imputation.observed_log_likelihood, decoder, x, mask)
    prior, num_chains = decoder.prior(), 16
    z0 = torch.randn(num_chains, len(x), LATENT_DIM, generator=chosen)
    settings = AISSettings(sigmoid_schedule(config["num_temperatures"]), 0.1, 5)
    found = ais((prior.log_prob, log_likelihood), z0, settings, generator=chosen)
    log_evidence = log_mean_exp(found.log_weights, dim=0).float()

    def log_density(z: Tensor) -> Tensor:
        return prior.log_prob(z) + log_likelihood(z)

    return targets.Density(log_density, LATENT_DIM, 0.0), log_evidence


def evaluate_target(run: Run) -> Outcome:
    """A path that is trained on one target from several starts, and judged there.

    Each start has a Gaussian of its own, drawn around the origin; what else the path learns is
    shared. On the ring, the eight Gaussians and the funnel the evidence is exact. The values per
    start are the bound's gap, half the variance of the log-weights, and in two dimensions the share
    of directions (ring) or modes (eight Gaussians) that the ends of the paths cover.
    """
    config, num_starts = run.config, run.config["starts"]
    x = torch.zeros(num_starts, 1)
    if config["target"] in ("digits", "inpainting"):
        model, log_evidence = _on_a_decoder(config, run.seed)
    else:
        model = targets.TARGETS[config["target"]]().requires_grad_(False)
        x = x + 8 * math.pi if config["target"] == "ring" else x
        log_evidence = model.log_evidence(x)
    started = time.monotonic()
    torch.manual_seed(run.seed)
    encoder = targets.FreeGaussian(config["spread"] * torch.randn(num_starts, model.latent_dim))
    path_fn, learned = build_path(config, model.latent_dim)
    sizes = {"num_updates": config["num_updates"], "num_samples": config["num_path_samples"]}
    targets.fit_path(path_fn, model, encoder, x, learned=learned,
                     learning_rate=config["learning_rate"], **sizes)  # fmt: skip
    with torch.no_grad():
        path = path_fn(model, encoder(x), x, config["num_samples"])
    values = {
        "gap": log_evidence - path.log_weights.mean(0),
        "half_variance": 0.5 * path.log_weights.var(0),
        "importance_weighted_gap": log_evidence - log_mean_exp(path.log_weights, dim=0),
    }
    if config["target"] in ("ring", "eight_gaussians"):
        sectors = 16 if config["target"] == "ring" else 8
        values["coverage"] = targets.circular_coverage(path.z, sectors)
    if len(path.acceptance):
        values["acceptance"] = path.acceptance.mean((0, 1))
    return Outcome(values, {"fit": time.monotonic() - started}, {})


# --- imputation ----------------------------------------------------------------------------------


def evaluate_imputation(run: Run) -> Outcome:
    """Table 2 of Li, Turner and Liu (2017): what an encoder makes of missing pixels.

    For each mask, the diversity (entropy of the labels of the nearest training images) and the
    distance to them, of the encoder's imputations and of draws from the true conditional of the
    same decoder by long Markov chains. Training images are compared as grey values (assumed).
    """
    per_image, ess = {}, {}
    for number, kind in enumerate(imputation.MASKS):
        stage = run.work.stage(kind)
        found = stage.load("scores")
        if found is None:
            stage.check_time(f"{number} of {len(imputation.MASKS)} masks are done")
            found = _impute(run, number, kind)
            stage.save("scores", found)
        per_image |= found["values"]
        ess[kind] = found["ess"]
    return Outcome(per_image, {}, {"reference_ess": ess})


def _impute(run: Run, number: int, kind: str) -> dict:
    """The scores of one mask."""
    config, num_chains = run.config, run.config["num_chains"]
    decoder, encoder = run.network("decoder"), run.network("encoder")
    x = data.load_mnist_binary("test").images[: config["images"]].to(run.device)
    stream = 1000 * run.seed + number
    generator = torch.Generator().manual_seed(stream)
    mask = imputation.missing_mask(kind, generator=generator).to(run.device)
    torch.manual_seed(stream)
    completed = imputation.impute(decoder, encoder, x, mask, config["iterations"], num_chains)
    schedule = sigmoid_schedule(config["num_temperatures"])
    settings = AISSettings(schedule, config["step_size"], config["num_leapfrog"])
    reference = imputation.conditional_samples(
        decoder, x, mask, num_chains, settings=settings, num_steps=config["reference_steps"]
    )
    train = data.load_mnist("train")
    grey, labels = train.images.to(run.device), train.labels.to(run.device)
    values = {}
    for name, images in ((kind, completed), (f"reference_{kind}", reference.x)):
        nearest = imputation.nearest_neighbour_l1(images, grey)
        values[f"{name}_label_entropy"] = imputation.label_entropy(labels[nearest.index])
        values[f"{name}_l1"] = nearest.distance.mean(0)
    return {"values": values, "ess": round(reference.ess.mean().item(), 2)}


# --- iterative inference -------------------------------------------------------------------------


#: Kind and size of the observations of each data set.
OBSERVATIONS = {
    "mnist": ("binary", 784),
    "cifar10": ("real", 3072),
    "20news": ("counts", 1995),
    "rcv1": ("counts", 10_000),
}


def training_examples(
    config: Mapping[str, object], device: torch.device | str = "cpu"
) -> tuple[int, Callable[[Tensor], Tensor]]:
    """The first ``training_images`` of a data set, and how a batch of them is drawn.

    Pixels of MNIST are binarised and levels of CIFAR-10 dequantised anew at each visit.

    :param config: options with ``dataset`` and ``training_images``.
    :return: how many there are, and a map from their numbers ``[B]`` to observations ``[B, P]``.
    :raises ValueError: when there are not so many.
    """
    name, wanted = config["dataset"], config["training_images"]
    if name == "mnist":
        kept, draw = data.load_mnist("train", dtype=torch.uint8).images, data.binarise
    elif name == "cifar10":
        kept, draw = data.load_cifar10("train"), data.dequantise
    else:
        load = data.load_newsgroups if name == "20news" else data.load_rcv1
        kept, draw = load("train"), Tensor.to_dense
    if wanted > len(kept):
        raise ValueError(f"training_images = {wanted}, but {name} has {len(kept)} for training")
    kept = kept.to(device)
    return wanted, lambda index: draw(kept.index_select(0, index))


def held_out_examples(config: Mapping[str, object], device: torch.device | str = "cpu") -> Tensor:
    """Random test examples, the same for all rows: binarised or dequantised once and for all.

    :param config: options with ``dataset``, ``images`` and ``image_seed``.
    :return: ``[N, P]``.
    """
    name, stream = config["dataset"], torch.Generator().manual_seed(config["image_seed"])
    load = {
        "mnist": lambda split: data.load_mnist_binary(split).images,
        "cifar10": data.load_cifar10,
        "20news": data.load_newsgroups,
        "rcv1": data.load_rcv1,
    }[name]
    kept = load("test")
    x = kept.index_select(0, torch.randperm(len(kept), generator=stream)[: config["images"]])
    return (data.dequantise(x, stream) if name == "cifar10" else x.to_dense()).to(device)


def iterative_architectures(config: Mapping[str, object], method: str) -> dict[str, dict]:
    """How to build the model of a row and an encoder of some method for it.

    :param config: the options of :class:`amortised.studies.IterativeOptions`.
    :param method: ``"standard"``, ``"iterative"`` or ``"ladder"``.
    """
    observation, size = OBSERVATIONS[config["dataset"]]
    shape = {"num_hidden": config["num_hidden"], "num_layers": config["num_layers"]}
    sizes = {"latent_dims": config["latent_dims"], "observation_dim": size}
    decoder = {"class": "DeepLatentGaussian", "observation": observation} | sizes | shape
    counts = {"counts": observation == "counts"}
    if method == "ladder":
        return {"decoder": decoder, "encoder": {"class": "LadderEncoder"} | sizes | counts | shape}
    sizes = {"latent_dim": sum(config["latent_dims"]), "observation_dim": size}
    inputs = config["inputs"] if method == "iterative" else ["x"]
    encoder = {"class": "IterativeEncoder", "inputs": inputs, "gated": method == "iterative"}
    return {"decoder": decoder, "encoder": encoder | sizes | counts | shape}


def iterative_training(
    config: Mapping[str, object], device: torch.device | str = "cpu"
) -> Training:
    """A row of Marino, Yue and Mandt (2018): a model with a standard, iterative or ladder encoder.

    Adam at ``learning_rate`` for both. Models of one seed start from the same weights.

    :param config: the options of :class:`amortised.studies.IterativeOptions`.
    :param device: where to put the networks.

    >>> options = dict(dataset="mnist", method="iterative", inputs=["x", "gradient", "estimates"],
    ...     latent_dims=[2], num_hidden=8, num_layers=1, num_iterations=3, num_student_samples=1,
    ...     learning_rate=1e-3, training_images=100)
    >>> list(iterative_training(options).step(torch.zeros(5, 784), torch.arange(5)))
    ['loss', 'first']
    """
    architectures = iterative_architectures(config, config["method"])
    networks = {r: evaluation.build_module(a).to(device) for r, a in architectures.items()}
    model, encoder = networks.values()
    rate = config["learning_rate"]
    optimizers = {"model": _adam(model, rate), "encoder": _adam(encoder, rate)}
    settings = _iterations(config)

    def step(x: Tensor, index: Tensor) -> Mapping[str, Tensor]:
        return iterative.iterative_step(x, model, encoder, optimizers.values(), **settings)

    examples = training_examples(config, device)
    return Training(step, networks, optimizers, {}, architectures, examples)


def _iterations(config: Mapping[str, object], method: str | None = None) -> dict[str, int]:
    count = config["num_iterations"] if (method or config["method"]) == "iterative" else 1
    return {"num_iterations": count, "num_samples": config["num_student_samples"]}


def evaluate_iterative(run: Run) -> Outcome:
    """Evidence and bounds of random test examples, and what better inference would add.

    ``is_ll`` by importance sampling from the last posterior, with its bits per dimension or nats
    per word; ``elbo`` of that posterior, ``elbo_first`` of the first iteration's, and the
    divergence of each level. For the first ``svi_images``, ``svi_gain`` is what local optimisation
    of the last posterior adds to its bound. ``elbo_posthoc_<method>`` is the bound of an encoder
    of that method that was trained on the finished model alone, where ``posthoc_epochs`` is not 0.
    """
    config, work, seed = run.config, run.work, run.seed
    model, encoder = run.network("decoder"), run.network("encoder")
    x, settings = held_out_examples(config, run.device), _iterations(config)

    def infer(x: Tensor) -> Distribution:
        with seeded(seed, run.device):
            return iterative.posterior(model, encoder, x, **settings)

    stage, count = work.stage("importance"), config["num_samples"]
    found = evaluation.importance_sampling_ll(
        model, infer, x, num_samples=count, seed=seed, work=stage
    )
    started, per_image = time.monotonic(), {"is_ll": found.log_likelihood, "is_ess": found.ess}
    if config["dataset"] == "cifar10":
        bits = math.log(256.0) - found.log_likelihood / x.shape[1]
        per_image["bits_per_dim"] = bits / math.log(2.0)
    if OBSERVATIONS[config["dataset"]][0] == "counts":
        per_image["nats_per_word"] = -found.log_likelihood / x.sum(-1).cpu()
    with seeded(seed, run.device), torch.no_grad():
        q = iterative.posterior(model, encoder, x, **settings)
        per_image["elbo"], divergences = _mean_elbo(model, q, x)
        for level, part in enumerate(divergences.split(config["latent_dims"], -1), start=1):
            per_image[f"kl_level_{level}"] = part.sum(-1)
        first = iterative.posterior(model, encoder, x, 1, settings["num_samples"])
        per_image["elbo_first"] = _mean_elbo(model, first, x)[0]
    if config["svi_steps"]:
        per_image["svi_gain"] = _svi_gain(run, model, infer, x[: config["svi_images"]])
    for method in ("standard", "iterative") if config["posthoc_epochs"] else ():
        fitted = _posthoc_encoder(run, model, method)
        with seeded(seed, run.device), torch.no_grad():
            q = iterative.posterior(model, fitted, x, **_iterations(config, method))
            per_image[f"elbo_posthoc_{method}"] = _mean_elbo(model, q, x)[0]
    seconds = {"importance sampling": found.seconds, "bounds": time.monotonic() - started}
    return Outcome(per_image, seconds, {})


def _mean_elbo(
    model: nn.Module, q: Distribution, x: Tensor, num_draws: int = 10
) -> tuple[Tensor, Tensor]:
    """The bound and the divergence of each coordinate, means over ``num_draws`` times 10 draws."""
    parts = [iterative.level_elbo(model, q, x, 10) for _ in range(num_draws)]
    elbo, divergences = (torch.stack(part).mean(0) for part in zip(*parts, strict=True))
    return elbo, divergences


def _svi_gain(
    run: Run, model: nn.Module, infer: Callable[[Tensor], Distribution], x: Tensor
) -> Tensor:
    """Adam on the parameters of each example's posterior, from the encoder's; a ladder's counts
    as it is at its own means. The second half of the steps is averaged."""
    with seeded(run.seed, run.device), torch.no_grad():
        q = infer(x)
        is_ladder = isinstance(q, AncestralGaussian)
        z = q.descend(x.new_zeros(len(x), model.latent_dim)) if is_ladder else q.mean
        normal = conditional_normal(q, z)
        start = torch.cat([normal.mean, normal.stddev.log()], -1)
        step = iterative.gradient_ascent(partial(Adam, lr=0.02))
        trace = iterative.refine(
            model, step, x, run.config["svi_steps"], start=start, num_samples=10
        )
        best = trace.parameters[len(trace.parameters) // 2 :].mean(0)
        return _mean_elbo(model, iterative.gaussian(best), x)[0] - _mean_elbo(model, q, x)[0]


def _posthoc_encoder(run: Run, model: nn.Module, method: str) -> nn.Module:
    """An encoder for a model that stays as it is."""
    config = run.config
    count, draw = training_examples(config, run.device)
    with seeded(run.seed, run.device):
        reads = config | {"inputs": config["posthoc_inputs"]}
        architecture = iterative_architectures(reads, method)["encoder"]
        encoder = evaluation.build_module(architecture).to(run.device)
        optimizer, settings = _adam(encoder, config["learning_rate"]), _iterations(config, method)

        def step(index: Tensor) -> Mapping[str, Tensor]:
            return iterative.iterative_step(draw(index), model, encoder, [optimizer], **settings)

        state = {"encoder": encoder, "optimizer": optimizer}
        passes = {"epochs": config["posthoc_epochs"], "batch_size": config["batch_size"]}
        index, stage = torch.arange(count, device=run.device), run.work.stage(f"posthoc_{method}")
        fit(step, index, state, schedule=half_cosine, work=stage, seed=run.seed, **passes)
    return encoder


# --- the kinds of studies ------------------------------------------------------------------------


#: What a study of ``workflow/experiments.yaml`` can name as its ``recipe``.
RECIPES: dict[str, Recipe] = {
    "amc": Recipe(amc_training, evaluate_decoder),
    "distillation": Recipe(distillation_training, evaluate_distillation),
    "vae": Recipe(vae_training, evaluate_decoder),
    "teacher": Recipe(teacher_training, evaluate_teacher),
    "path": Recipe(path_training, evaluate_path),
    "target": Recipe(None, evaluate_target),
    "imputation": Recipe(None, evaluate_imputation),
    "iterative": Recipe(iterative_training, evaluate_iterative),
}
