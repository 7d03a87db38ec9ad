"""Amortised MCMC and its baselines, students held to their teachers, and imputation.

Source: Li, Turner and Liu (2017).
"""

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim import Optimizer

from .. import amc, data, diagnostics, evaluation, imputation, mcmc, results
from ..adversarial import Discriminator, InformedDiscriminator
from ..ais import AISSettings, sigmoid_schedule
from ..encoders import ImplicitEncoder, start_at_prior
from ..fast import RefreshedLikelihood
from .common import (
    ARCHITECTURES,
    DTYPES,
    LATENT_DIM,
    Outcome,
    Run,
    Training,
    WarmUp,
    adam,
    annealed_evidence,
    annealing_settings,
    drawn_evidence,
    grey_images,
    held_out_images,
    images_of,
    make_network,
    on_device,
    starting_weights,
)

#: Long chains that teachers are held to: Hamiltonian, from where the teacher ended.
LONG_CHAIN = {"num_steps": 50, "num_leapfrog": 10, "step_size": 0.1}
#: Training images by which a student is brought to the scale of the prior.
START_IMAGES = 500
#: Images of a batch whose log-likelihoods are noted in training.
WATCHED_IMAGES = 10
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
    networks: dict[str, nn.Module] = {"decoder": make_network("decoder", device, config)}
    if encoder != "none":
        networks["encoder"] = make_network(encoder, device)
    if is_game:
        networks["discriminator"] = on_device(_discriminator(config["rule"]), device)
    if method == "persistent":
        networks["chains"] = amc.PersistentChains(config["training_images"], LATENT_DIM).to(device)

    alone = {"learning_rate": config["learning_rate"]}
    game = {"learning_rate": config["game_learning_rate"], "betas": (0.5, 0.999)}
    critic = game | {"learning_rate": config.get("discriminator_learning_rate",
                                                 config["game_learning_rate"])}  # fmt: skip
    settings = {"decoder": alone, "encoder": game if is_game else alone, "discriminator": critic}
    optimizers = {
        "model" if name == "decoder" else name: adam(networks[name], **settings[name])
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
    images = grey_images(config)
    with torch.no_grad():
        networks["decoder"].start_at_mean(images.to(device))
        if isinstance(networks.get("encoder"), ImplicitEncoder):
            few = images[:START_IMAGES].round().to(device)
            start_at_prior(networks["encoder"], few)
    if config["kl_warmup"] == 0.0:
        return training
    trained = (networks["decoder"], networks["encoder"], optimizers)
    warm_up = WarmUp(config, device)

    def step(x: Tensor, index: Tensor) -> Mapping[str, Tensor]:
        samples = {"num_samples": config["num_student_samples"], "kl_weight": warm_up()}
        return amc.vae_step(x, *trained, **samples)

    return training._replace(step=step, networks=networks | {"warm-up": warm_up})


def evaluate_distillation(run: Run) -> Outcome:
    """What a row has learned: its decoder by :func:`.common.drawn_evidence`, and its student by
    :func:`amortised.diagnostics.student_diagnostics` on the first ``diagnostic_images``.
    """
    config, (per_image, seconds) = run.config, drawn_evidence(run)
    if config["diagnostic_images"]:
        stage = run.work.stage("diagnostics")
        diagnosed = stage.load("values")
        if diagnosed is None:
            stage.check_time("the decoder is evaluated")
            diagnosed = _diagnose(run)
            stage.save("values", diagnosed)
        seconds["diagnostics"] = diagnosed.pop("seconds")
        per_image |= diagnosed
    return Outcome(per_image, seconds, {})


def _diagnose(run: Run) -> dict[str, Tensor]:
    """The student against its teacher, and the teacher against long Hamiltonian chains.

    The student of a row without a chain is held to the moments of the long chains alone; that of
    short runs is the prior; a table of persistent chains has none.
    """
    config, started, acceptance = run.config, time.monotonic(), []
    if config["method"] == "persistent":
        return {"seconds": 0.0}
    torch.manual_seed(run.seed)
    decoder = on_device(run.network("decoder"), run.device)
    x = held_out_images(config)[: config["diagnostic_images"]].to(run.device)
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
        others = images_of(config).train()[: config["classifier_images"]]
        classifier = on_device(Discriminator(2 * LATENT_DIM), run.device)
        found["classifier_auc"] = diagnostics.classifier_auc(
            classifier, encoder, data.binarise(others).to(run.device), x, teacher=teacher,
            num_samples=config["diagnostic_samples"], epochs=config["classifier_epochs"],
        )  # fmt: skip
    return found | {"seconds": time.monotonic() - started}


def _prior_at(decoder: nn.Module, x: Tensor) -> Distribution:
    return decoder.prior().expand((len(x),))


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
    paths = starting_weights(config)
    training = amc_training(fixed | config, device)
    for role, kind in (("decoder", "decoder"), ("encoder", "gaussian")):
        results.load_weights(paths[role], training.networks[role], ARCHITECTURES[kind])
    return training


def evaluate_teacher(run: Run) -> Outcome:
    """Hamiltonian annealing of random test images before and after, and the chain's acceptance.

    Both decoders meet the same images and random numbers, so that ``hais_ll_change`` is paired.
    The acceptance is that of the row's chain on the trained decoder from the trained encoder,
    where the kernel has a Metropolis test.
    """
    config = run.config
    decoder = on_device(run.network("decoder"), run.device)
    start = (
        evaluation.load_module(starting_weights(config)["decoder"]).half().float()
    )  # as runs keep theirs
    start = on_device(start, run.device)
    test = data.load_mnist_binary("test").images
    x = test[data.drawn_images(config["images"], config["image_seed"])].to(run.device)
    per_image, seconds = annealed_evidence(run, decoder, x)
    before = evaluation.hais_ll(
        start, x, **annealing_settings(config, run.seed), work=run.work.stage("start_annealing")
    )
    per_image["start_hais_ll"] = before.log_likelihood
    per_image["hais_ll_change"] = per_image["hais_ll"] - before.log_likelihood
    seconds["annealing"] += before.seconds
    if config["kernel"] == "mala":
        encoder = on_device(run.network("encoder"), run.device)
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
