"""Chains inside the bound, on images and on targets that are known.

Sources: Caterini, Doucet and Sejdinovic (2018); Thin et al. (2020).
"""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from .. import amc, data, evaluation, imputation, mcvae, targets
from ..ais import AISSettings, ais, sigmoid_schedule
from ..files import load_tree
from ..hvae import HamiltonianFlow, hvae_path
from ..hvae import Path as Paths
from ..models import LatentVariableModel
from ..numerics import effective_sample_size, log_mean_exp, seeded
from ..objectives import score_function_surrogate
from . import common
from .common import LATENT_DIM, Outcome, Run, Training

#: The invertible maps that a row can name, by latent dimension and first step size.
MAPS: dict[str, Callable[[int, float], nn.Module]] = {
    "leapfrog": mcvae.LeapfrogMap,
    "realnvp": lambda latent_dim, _: mcvae.RealNVP(latent_dim),
    "planar": lambda latent_dim, _: mcvae.PlanarFlow(latent_dim),
    "potential": lambda latent_dim, step_size: mcvae.LeapfrogMap(
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
    if path == "exact":
        return targets.exact_path, nn.ModuleList()
    if path == "importance":
        return partial(targets.importance_path, num_inner=steps + 1), nn.ModuleList()
    if path == "hvae":
        flow = HamiltonianFlow(latent_dim, steps, config["tempering"], **step)
        return partial(hvae_path, flow=flow), flow
    if path in BRIDGES:
        step["score"] = mcvae.ScoreNetwork(latent_dim) if BRIDGES[path] else None
        step["persistence"] = config["kept_momentum"]
        bridge = mcvae.Bridge(latent_dim, steps, on_target=path == "hvi", **step)
        path_fn = mcvae.annealed_path if path == "annealed" else mcvae.uha_path
        return partial(path_fn, settings=bridge), bridge
    maps = nn.ModuleList(MAPS[path](latent_dim, config["step_size"]) for _ in range(steps))
    return partial(mcvae.metvae_path, settings=mcvae.Maps(maps, config["acceptance"])), maps


def path_training(config: Mapping[str, object], device: torch.device | str = "cpu") -> Training:
    """A variational auto-encoder whose bound has a path in it; without steps, the plain one.

    Adam at ``learning_rate`` for decoder, encoder and path. Decisions bring their term of the
    gradient, with the leave-one-out mean over the paths of an image as its baseline.

    :param config: the options of :class:`amortised.studies.PathVaeOptions`.
    :param device: where to put the networks.
    """
    networks = {"decoder": common.make_network("decoder", device)}
    networks["encoder"] = common.make_network(config["encoder"], device)
    path_fn, learned = build_path(config, LATENT_DIM)
    networks["path"] = learned.to(device)
    names = {"model": "decoder", "encoder": "encoder"}
    names |= {"path": "path"} if any(True for _ in learned.parameters()) else {}
    optimizers = {
        n: common.adam(networks[role], config["learning_rate"]) for n, role in names.items()
    }
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
    decoder, encoder = (
        common.on_device(run.network(r), run.device) for r in ("decoder", "encoder")
    )
    path_fn, learned = build_path(config, LATENT_DIM)
    learned.to(run.device).load_state_dict(load_tree(run.weights / "path.stage"))
    x = common.held_out_images(config).to(run.device)
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
    annealed, annealing_seconds = common.annealed_evidence(run, decoder, x)
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
    decoder = evaluation.load_module(common.starting_weights(config)["decoder"]).requires_grad_(
        False
    )
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
    targets.fit_path(path_fn, model, encoder, x, learned=learned, **_updates(config))
    values, ends = _judged(path_fn, model, encoder, x, log_evidence, config["num_samples"])
    if config["target"] in ("ring", "eight_gaussians"):
        sectors = 16 if config["target"] == "ring" else 8
        values["coverage"] = targets.circular_coverage(ends, sectors)
    return Outcome(values, {"fit": time.monotonic() - started}, {})


def _updates(config: Mapping[str, object]) -> dict[str, object]:
    sizes = {"num_updates": config["num_updates"], "num_samples": config["num_path_samples"]}
    return sizes | {"learning_rate": config["learning_rate"]}


@torch.no_grad()
def _judged(
    path_fn: Callable[..., Paths], model: nn.Module, encoder: nn.Module, x: Tensor,
    log_evidence: Tensor, num_samples: int
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """What new paths say of a bound, and where they end; a hundred paths at a time.

    :raises FloatingPointError: when a path's weights are beyond the numbers.
    """
    sizes = map(len, torch.arange(num_samples).split(100))
    paths = [path_fn(model, encoder(x), x, size) for size in sizes]
    log_weights = torch.cat([path.log_weights for path in paths])
    values = {
        "gap": log_evidence - log_weights.mean(0),
        "half_variance": 0.5 * log_weights.var(0),
        "importance_weighted_gap": log_evidence - log_mean_exp(log_weights, dim=0),
    }
    if not values["half_variance"].isfinite().all():
        raise FloatingPointError(f"diverged: log-weights as large as {log_weights.abs().max():.1g}")
    if len(paths[0].acceptance):
        values["acceptance"] = torch.cat([path.acceptance for path in paths], 1).mean((0, 1))
    return values, torch.cat([path.z for path in paths])


def evaluate_ring(run: Run) -> Outcome:
    """Both parameters of the ring, learned by the bound of a path with one q for all observations.

    The data are the same for all rows of a seed. For observations that nobody was trained on,
    ``loss`` is what the learned model has less of the evidence than the true one, in nats, and
    ``gap`` that of the bound under the learned model. The details hold the squared error of both
    parameters together, each part, and where the learning began.
    """
    config, dim, started = run.config, run.config["latent_dim"], time.monotonic()
    torch.manual_seed(run.seed)
    truth = targets.Ring(dim).requires_grad_(False)
    judged, x = truth.sample(config["num_judged"])[0], truth.sample(config["num_observations"])[0]
    first = math.exp(config["log_start"])
    model, encoder = targets.Ring(dim, first, first), targets.FreeGaussian(torch.zeros(1, dim))
    path_fn, learned = build_path(config, dim)

    def batch() -> Tensor:
        return x[torch.randint(len(x), (config["batch_size"],))]

    targets.fit_path(
        path_fn, model, encoder, batch, learned=nn.ModuleList([model, learned]), **_updates(config)
    )
    log_evidence = model.requires_grad_(False).log_evidence(judged)
    values, _ = _judged(path_fn, model, encoder, judged, log_evidence, config["num_samples"])
    values["loss"] = truth.log_evidence(judged) - log_evidence
    squares = {}
    for name in ("log_alpha", "log_beta"):
        error = getattr(model, name).exp() - getattr(truth, name).exp()
        squares[f"squared_error_{name[4:]}"] = error.square().item()
    return Outcome(values, {"fit": time.monotonic() - started}, squares)
