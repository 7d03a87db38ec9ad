"""Variational auto-encoders by the ELBO and by importance-weighted bounds.

Sources: Burda, Grosse and Salakhutdinov (2016); Tucker et al. (2019).
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from .. import amc, data, evaluation
from ..encoders import GaussianEncoder
from ..numerics import seeded
from ..objectives import dreg_surrogate, iwae_bound
from .common import (
    ARCHITECTURES,
    Outcome,
    Run,
    Training,
    WarmUp,
    adam,
    annealed_evidence,
    drawn_evidence,
    held_out_images,
    make_network,
    on_device,
)


def vae_training(config: Mapping[str, object], device: torch.device | str = "cpu") -> Training:
    """A variational auto-encoder trained by the ELBO, the IWAE bound or its DReG gradient.

    Adam at ``learning_rate``. The doubly reparameterised gradient is the encoder's; the decoder
    follows the bound. With ``output_bias`` from the data the decoder's is the logit of the mean
    pixel at the start; the divergence of the ELBO can be warmed up. The prior can be a learned
    mixture of ten Gaussians; the ELBO is then the IWAE bound with one sample.

    :param config: the options of :class:`amortised.studies.VaeOptions`, or of
        :class:`amortised.studies.ObjectiveOptions`.
    :param device: where to put the networks.
    """
    num_samples, objective = config["num_student_samples"], config["objective"]
    kinds = {"decoder": "decoder", "encoder": "gaussian"}
    if config.get("prior") == "mixture":
        kinds["decoder"] = "mixture"
    networks = {role: make_network(kind, device) for role, kind in kinds.items()}
    architectures = {role: ARCHITECTURES[kind] for role, kind in kinds.items()}
    decoder, encoder = networks.values()
    optimizers = {
        "model": adam(decoder, config["learning_rate"]),
        "encoder": adam(encoder, config["learning_rate"]),
    }
    if config.get("output_bias") == "data":
        images = data.load_mnist("train").images[: config["training_images"]]
        with torch.no_grad():
            decoder.start_at_mean(images.to(device))
    if config.get("kl_warmup"):
        networks["warm-up"] = WarmUp(config, device)
    weight = networks.get("warm-up", lambda: 1.0)
    if objective == "elbo":

        def step(x: Tensor, index: Tensor) -> Mapping[str, Tensor]:
            samples = {"num_samples": num_samples, "kl_weight": weight()}
            return amc.vae_step(x, decoder, encoder, optimizers, **samples)
    else:
        bound = {"iwae": iwae_bound, "dreg": dreg_surrogate}[objective]

        def step(x: Tensor, index: Tensor) -> Mapping[str, Tensor]:
            loss = -bound(decoder, encoder(x), x, num_samples)
            return {"loss": amc.descend(loss, *optimizers.values())}

    return Training(step, networks, optimizers, {}, architectures)


def evaluate_objective(run: Run) -> Outcome:
    """The decoder by :func:`.common.drawn_evidence`, and how many of its latents are in use.

    ``active_latents`` counts the latents whose posterior mean has a variance over the images above
    0.01 (Burda, Grosse and Salakhutdinov 2016); with few of them the posterior has collapsed.
    """
    per_image, seconds = drawn_evidence(run)
    with torch.no_grad():
        means = run.network("encoder")(held_out_images(run.config).to(run.device)).mean
    return Outcome(per_image, seconds, {"active_latents": int((means.var(0) > 0.01).sum())})


def evaluate_decoder(run: Run) -> Outcome:
    """Estimates of the evidence of the fixed binary test images, with bounds on simulated pairs.

    Importance sampling from the row's own encoder, where it has a density, and from a Gaussian that
    is fitted after training; annealing from the prior with fresh momentum at each temperature; and
    bounds from both sides on simulated pairs, at the same settings.
    """
    config, work, seed = run.config, run.work, run.seed
    decoder = on_device(run.network("decoder"), run.device)
    encoder = run.network("encoder")
    x = data.load_mnist_binary("test").images[: config["images"]].to(run.device)
    with seeded(seed, run.device):
        proposal = make_network("gaussian", run.device)
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
        own = sampling(on_device(encoder, run.device), x, work=work.stage("importance"))
        seconds["importance sampling"] += own.seconds
    per_image, annealing_seconds = annealed_evidence(run, decoder, x, "ais")
    for name, estimate in (("is", own), ("posthoc_is", fitted)):
        per_image |= {f"{name}_ll": estimate.log_likelihood, f"{name}_ess": estimate.ess}
    return Outcome(per_image, seconds | annealing_seconds, {})
