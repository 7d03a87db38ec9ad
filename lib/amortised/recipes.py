r"""Recipes: how a row of a study is trained and evaluated, one section for each kind of study.

A recipe is two functions. ``build`` makes a :class:`Training`: the networks of a row, their
optimisers, and the step that updates them. Runs, chapters and benchmarks all get their steps here.
``evaluate`` gives the values per image of what was trained. :mod:`amortised.runs` does the rest: it
loops, keeps finished stages, and writes weights and results. A new kind of study is a ``build``
(or an ``evaluate``), a model of its options in :mod:`amortised.studies`, and a block in
``workflow/experiments.yaml``.

Sources: Li, Turner and Liu (2017) for the rows of amortised MCMC and for imputation; Burda, Grosse
and Salakhutdinov (2016) and Tucker et al. (2019) for those of importance-weighted auto-encoders.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from . import amc, data, evaluation, imputation, mcmc, results
from .adversarial import Discriminator
from .ais import AISSettings, sigmoid_schedule
from .encoders import GaussianEncoder
from .fast import RefreshedLikelihood, log_likelihood_and_grad
from .files import Work
from .numerics import seeded
from .objectives import dreg_surrogate, iwae_bound

LATENT_DIM = 32
#: How to build the decoder, and each encoder that a row can name.
ARCHITECTURES = {
    "decoder": {"class": "ConvBernoulli", "latent_dim": LATENT_DIM},
    "gaussian": {"class": "GaussianEncoder", "latent_dim": LATENT_DIM},
    "cnn_g": {"class": "ImplicitEncoder", "latent_dim": LATENT_DIM, "noise": "gaussian"},
    "cnn_b": {"class": "ImplicitEncoder", "latent_dim": LATENT_DIM, "noise": "bernoulli"},
}

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Training(NamedTuple):
    """What a training loop needs of a row.

    :ivar step: ``step(x, index)`` makes one update on binary images ``[B, P]`` and the numbers
        ``[B]`` that they have among the training images; returns the mean losses by name.
    :ivar networks: everything that it changes but the optimisers, by role: ``"decoder"``,
        ``"encoder"``, ``"discriminator"``, ``"chains"``, those that the row has.
    :ivar optimizers: by the names of :mod:`amortised.amc`.
    :ivar details: facts of the row for its result, as plain values.
    """

    step: Callable[[Tensor, Tensor], Mapping[str, Tensor]]
    networks: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    details: dict[str, int]


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
    """Adam, on a graphics card in the form that a CUDA graph can hold."""
    device = next(network.parameters()).device
    if device.type != "cuda":
        return Adam(network.parameters(), lr=learning_rate, **settings)
    rate = torch.tensor(learning_rate, device=device)
    return Adam(network.parameters(), lr=rate, capturable=True, **settings)


# --- amortised MCMC and its baselines ------------------------------------------------------------


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
    method, encoder = config["method"], config["encoder"]
    is_game = method == "avb" or config["rule"] in ("gan", "wasserstein")
    networks: dict[str, nn.Module] = {"decoder": _network("decoder", device)}
    if encoder != "none":
        networks["encoder"] = _network(encoder, device)
    if is_game:
        networks["discriminator"] = _on_device(Discriminator(LATENT_DIM), device)
    if method == "persistent":
        networks["chains"] = amc.PersistentChains(config["training_images"], LATENT_DIM).to(device)

    alone = {"learning_rate": config["learning_rate"]}
    game = {"learning_rate": config["game_learning_rate"], "betas": (0.5, 0.999)}
    settings = {"decoder": alone, "encoder": game if is_game else alone, "discriminator": game}
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
        return lambda x, index: amc.mcmc_vi_step(x, *trained, teacher=teacher, **samples)
    if config["method"] == "persistent":
        return lambda x, index: amc.persistent_step(
            x, index, decoder, networks["chains"], optimizers, teacher=teacher
        )
    samples["discriminator"] = networks.get("discriminator")
    if config["method"] == "avb":
        return lambda x, index: amc.avb_step(x, *trained, **samples)
    rule = amc.RULES[config["rule"]]._replace(num_critic_steps=config["num_critic_steps"])
    return lambda x, index: amc.amc_step(x, *trained, teacher=teacher, rule=rule, **samples)


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
    is fitted after training; annealing from the prior; and bounds from both sides on simulated
    pairs, at the same settings. Momenta are fresh at each temperature, and the values called
    ``ais``; where ``hais_images`` says for how many images, they are carried, and it is ``hais``.

    Where the options ask for them: ``full_is``, importance sampling from Gaussians of full
    covariance fitted to each of ``full_covariance_images``; and ``control_bound``, a bound on all
    test images from the Gaussian fitted after training, which predicts the other values
    (:func:`amortised.evaluation.regression_mean`). Each uses the first images of
    :func:`amortised.data.drawn_images`.
    """
    config, work, seed = run.config, run.work, run.seed
    decoder = _on_device(run.network("decoder"), run.device)
    encoder = run.network("encoder")
    test = data.load_mnist_binary("test").images.to(run.device)
    drawn = test[data.drawn_images(len(test), config.get("image_seed"))]
    x = drawn[: config["images"]]
    proposal = _fitted_proposal(run, decoder)
    sampling = partial(evaluation.importance_sampling_ll, decoder, seed=seed)
    samples = {"num_samples": config["num_samples"]}
    found = {"posthoc_is": sampling(proposal, x, **samples, work=work.stage("posthoc_importance"))}
    found["is"] = found["posthoc_is"]
    seconds = {"importance sampling": found["is"].seconds}
    if isinstance(encoder, GaussianEncoder):
        encoder = _on_device(encoder, run.device)
        found["is"] = sampling(encoder, x, **samples, work=work.stage("importance"))
        seconds["importance sampling"] += found["is"].seconds
    if "full_covariance_images" in config:
        found["full_is"], seconds["full covariance"] = _full_covariance(run, decoder, drawn)
    name = "hais" if "hais_images" in config else "ais"
    found[name], bounds = _annealed(run, decoder, drawn)
    seconds |= {"annealing": found[name].seconds, "bounds": bounds.seconds}
    per_image = {f"{kind}_ll": estimate.log_likelihood for kind, estimate in found.items()}
    per_image |= {f"{kind}_ess": estimate.ess for kind, estimate in found.items()}
    per_image |= {
        f"{name}_acceptance_rate": found[name].acceptance_rate,
        "simulated_lower_bound": bounds.lower,
        "simulated_upper_bound": bounds.upper,
        "simulated_gap": bounds.gap,
    }
    if "control_samples" in config:
        samples = {"num_samples": config["control_samples"]}
        samples["likelihood"] = partial(log_likelihood_and_grad, decoder)
        control = sampling(proposal, test, **samples, work=work.stage("control"))
        per_image["control_bound"], seconds["control"] = control.log_likelihood, control.seconds
    return Outcome(per_image, seconds, {})


def _fitted_proposal(run: Run, decoder: nn.Module) -> nn.Module:
    """A Gaussian encoder fitted to the finished decoder, on training images."""
    config = run.config
    with seeded(run.seed, run.device):
        proposal = _network("gaussian", run.device)
    train = data.load_mnist("train").images[: config["training_images"]].to(run.device)
    passes = {"epochs": config["proposal_epochs"], "batch_size": config["batch_size"]}
    passes |= {"seed": run.seed, "work": run.work.stage("proposal")}
    return evaluation.fit_gaussian_proposal(decoder, train, encoder=proposal, **passes)


def _full_covariance(
    run: Run, decoder: nn.Module, drawn: Tensor
) -> tuple[evaluation.LikelihoodEstimate, float]:
    """Importance sampling from Gaussians of full covariance, and the seconds of both parts."""
    x = drawn[: run.config["full_covariance_images"]]
    settings = {"seed": run.seed, "likelihood": partial(log_likelihood_and_grad, decoder)}
    fitted = evaluation.fit_full_covariance(
        decoder, x, **settings, work=run.work.stage("full_covariance")
    )
    settings |= {"num_samples": run.config["full_covariance_samples"]}
    estimate = evaluation.importance_sampling_ll(
        decoder, fitted, x, **settings, work=run.work.stage("full_covariance_importance")
    )
    return estimate, fitted.seconds + estimate.seconds


def _annealed(
    run: Run, decoder: nn.Module, drawn: Tensor
) -> tuple[evaluation.LikelihoodEstimate, evaluation.BDMCEstimate]:
    """Annealing of test images, and bounds on simulated pairs at the same settings."""
    config, work = run.config, run.work
    annealing = _annealing(config, run.seed)
    dtype = DTYPES[config["evaluation_dtype"]]
    if dtype is not None:
        annealing["likelihood"] = partial(log_likelihood_and_grad, decoder, dtype=dtype)
    x = drawn[: config.get("hais_images", config["images"])]
    annealed = evaluation.hais_ll(decoder, x, **annealing, work=work.stage("annealing"))
    pairs = config["simulated_pairs"]
    return annealed, evaluation.bdmc_ll(decoder, pairs, **annealing, work=work.stage("bounds"))


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
    config, seed = run.config, run.seed
    decoder = _on_device(run.network("decoder"), run.device)
    start = evaluation.load_module(_start(config)["decoder"]).half().float()  # as runs keep theirs
    start = _on_device(start, run.device)
    test = data.load_mnist_binary("test").images
    x = test[data.drawn_images(config["images"], config["image_seed"])].to(run.device)
    annealing = _annealing(config, seed)
    found = evaluation.hais_ll(decoder, x, **annealing, work=run.work.stage("annealing"))
    before = evaluation.hais_ll(start, x, **annealing, work=run.work.stage("start_annealing"))
    bounds = evaluation.bdmc_ll(
        decoder, config["simulated_pairs"], **annealing, work=run.work.stage("bounds")
    )
    per_image = {
        "hais_ll": found.log_likelihood,
        "hais_ess": found.ess,
        "hais_acceptance_rate": found.acceptance_rate,
        "start_hais_ll": before.log_likelihood,
        "hais_ll_change": found.log_likelihood - before.log_likelihood,
        "simulated_lower_bound": bounds.lower,
        "simulated_upper_bound": bounds.upper,
        "simulated_gap": bounds.gap,
    }
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
    seconds = {"annealing": found.seconds + before.seconds, "bounds": bounds.seconds}
    return Outcome(per_image, seconds, {})


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


# --- the kinds of studies ------------------------------------------------------------------------


#: What a study of ``workflow/experiments.yaml`` can name as its ``recipe``.
RECIPES: dict[str, Recipe] = {
    "amc": Recipe(amc_training, evaluate_decoder),
    "vae": Recipe(vae_training, evaluate_decoder),
    "teacher": Recipe(teacher_training, evaluate_teacher),
    "imputation": Recipe(None, evaluate_imputation),
}
