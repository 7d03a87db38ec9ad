"""Standard, ladder and iterative encoders on images and texts.

Source: Marino, Yue and Mandt (2018).
"""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim import Adam

from .. import data, evaluation, iterative
from ..models import AncestralGaussian, conditional_normal
from ..numerics import seeded
from ..training import fit, half_cosine
from .common import Outcome, Run, Training, adam, images_of

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
    if name == "mnist" or "." in name:
        kept, draw = images_of(config).train(), data.binarise
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
    optimizers = {"model": adam(model, rate), "encoder": adam(encoder, rate)}
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
        optimizer, settings = adam(encoder, config["learning_rate"]), _iterations(config, method)

        def step(index: Tensor) -> Mapping[str, Tensor]:
            return iterative.iterative_step(draw(index), model, encoder, [optimizer], **settings)

        state = {"encoder": encoder, "optimizer": optimizer}
        passes = {"epochs": config["posthoc_epochs"], "batch_size": config["batch_size"]}
        index, stage = torch.arange(count, device=run.device), run.work.stage(f"posthoc_{method}")
        fit(step, index, state, schedule=half_cosine, work=stage, seed=run.seed, **passes)
    return encoder
