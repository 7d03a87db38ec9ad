"""What all recipes share: the parts of a run, networks, optimisers, images and annealing."""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from .. import data, evaluation
from ..adversarial import InformedDiscriminator
from ..encoders import GaussianEncoder
from ..fast import log_likelihood_and_grad
from ..files import Work
from ..numerics import seeded
from ..objectives import elbo

LATENT_DIM = 32
#: How to build the decoder, and each encoder that a row can name.
ARCHITECTURES = {
    "decoder": {"class": "ConvBernoulli", "latent_dim": LATENT_DIM},
    "mixture": {"class": "ConvBernoulli", "latent_dim": LATENT_DIM, "num_components": 10},
    "gaussian": {"class": "GaussianEncoder", "latent_dim": LATENT_DIM},
    "gaussian_wide": {"class": "GaussianEncoder", "latent_dim": LATENT_DIM, "num_features": 555},
    "cnn_g": {"class": "ImplicitEncoder", "latent_dim": LATENT_DIM, "noise": "gaussian"},
    "cnn_b": {"class": "ImplicitEncoder", "latent_dim": LATENT_DIM, "noise": "bernoulli"},
}

#: Samples of the bound of an encoder with a density.
ELBO_SAMPLES = 100
#: The last training images, by which rates are chosen.
VALIDATION_IMAGES = 1000
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


#: Learning rate of the weights a, b and c of an informed discriminator.
INFORMED_RATE = 2e-2


def make_network(kind: str, device: torch.device | str) -> nn.Module:
    return on_device(evaluation.build_module(ARCHITECTURES[kind]), device)


def on_device(module: nn.Module, device: torch.device | str) -> nn.Module:
    """Move a network, with its images channels last: a few per cent faster on a processor."""
    return module.to(device, memory_format=torch.channels_last)


def adam(network: nn.Module, learning_rate: float, **settings: object) -> Adam:
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


class WarmUp(nn.Module):
    """A weight of the divergence: from 0 to 1 over a share ``kl_warmup`` of the updates."""

    def __init__(self, config: Mapping[str, object], device: torch.device | str):
        super().__init__()
        updates = config["epochs"] * (config["training_images"] // config["batch_size"])
        self.num_calls = max(1, round(config["kl_warmup"] * updates))
        self.register_buffer("done", torch.zeros((), device=device))

    def forward(self) -> Tensor:
        """The weight of the next update."""
        self.done.add_(1.0)
        return (self.done / self.num_calls).clamp(max=1.0)


def starting_weights(config: Mapping[str, object]) -> dict[str, Path]:
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


# --- images, and the evidence of a decoder -------------------------------------------------------


def held_out_images(config: Mapping[str, object]) -> Tensor:
    """Random binary images of the test set, or of the training images that are held back."""
    drawn = data.drawn_images(10_000, config["image_seed"])
    if config["held_out"] == "test":
        return data.load_mnist_binary("test").images[drawn[: config["images"]]]
    grey = data.load_mnist("train", dtype=torch.uint8).images[-VALIDATION_IMAGES:]
    generator = torch.Generator().manual_seed(config["image_seed"])
    return data.binarise(grey, generator=generator)[drawn[drawn < len(grey)][: config["images"]]]


def annealed_evidence(
    run: Run, decoder: nn.Module, x: Tensor, name: str = "hais"
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Annealing of images from the prior, and bounds on simulated pairs at the same settings."""
    config, work = run.config, run.work
    settings = annealing_settings(config, run.seed)
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


def drawn_evidence(run: Run) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Estimates of the evidence of random images, the same in every run; and their wall times.

    Test images or, to choose rates, training images that no row is trained on. Hamiltonian
    annealing on the first ``hais_images``, with bounds on simulated pairs at the same settings;
    importance sampling from a Gaussian with full covariance that is fitted to each image; the bound
    of an encoder with a density.
    """
    config, work, seed = run.config, run.work, run.seed
    decoder = on_device(run.network("decoder"), run.device)
    x = held_out_images(config).to(run.device)
    per_image, seconds = {}, {}
    if config["hais_images"]:
        per_image, seconds = annealed_evidence(run, decoder, x[: config["hais_images"]])
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
        with seeded(seed, run.device), torch.no_grad():
            analytic = config.get("prior") != "mixture"
            per_image["elbo"] = elbo(decoder, encoder(x), x, ELBO_SAMPLES, analytic_kl=analytic)
    return per_image, seconds


def annealing_settings(config: Mapping[str, object], seed: int) -> dict[str, object]:
    """The settings of chains from the prior; without a persistence momenta are fresh."""
    names = ("num_chains", "pilot_chains", "num_temperatures", "num_leapfrog", "persistence")
    return {name: config[name] for name in names if name in config} | {"seed": seed}
