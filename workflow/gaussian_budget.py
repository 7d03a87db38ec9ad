r"""The HVAE paper's Gaussian experiment at its published budget: python workflow/gaussian_budget.py

Chapter 4 has the experiment from its closed form, in seconds. Here it is done as it was published:
30,000 steps of RMSProp at a rate of .001 with ten draws of the bound for each step, from Delta = 0
and log sigma = 3, step sizes of .005 in (0, .5) and a first temperature of 5. All dimensions and
data sets are fitted at once, each from a fresh start; the published code went from one data set to
the next. The data are those of the chapter. One row takes one to four minutes of one core:

    python workflow/gaussian_budget.py hvae_10_cooled    # only this row; the others stay

Source: Caterini, Doucet and Sejdinovic (2018), section 4.1, and their code.
"""

from __future__ import annotations

import argparse
import json
import math
import time

import torch
from torch import Tensor

from amortised import data, results
from amortised.mcmc import LeapfrogState, leapfrog_step

DIMENSIONS = (1, 2, 3, 5, 11, 25, 51, 101, 201, 301)
NUM_OBSERVATIONS, NUM_SETS, NUM_POINTS, RATE = 10_000, 10, 10, 1e-3
OWNER = torch.repeat_interleave(torch.arange(len(DIMENSIONS)), torch.tensor(DIMENSIONS))
ROWS = {
    "hvae_1": (1, False),
    "hvae_1_cooled": (1, True),
    "hvae_10": (10, False),
    "hvae_10_cooled": (10, True),
    "mean_field": (0, False),
}


def problem() -> tuple[Tensor, ...]:
    """True Delta and sigma, and the mean and the variance of each data set, ``[sets, 701]``."""
    size = torch.tensor(DIMENSIONS)[OWNER].double()
    offset = torch.cat([torch.arange(d) - (d - 1) / 2 for d in DIMENSIONS]).double()
    sigma = 3.6 * (offset / (size - 1).clamp(min=1)) ** 2 + 0.1
    sigma[0] = 1.0  # d = 1
    torch.manual_seed(4)
    z, wobble = torch.randn(2, NUM_SETS, len(size)).double()
    centre = z + offset / 5 + sigma * wobble / NUM_OBSERVATIONS**0.5
    chi_squared = torch.distributions.Chi2(torch.tensor(NUM_OBSERVATIONS - 1.0).double())
    return offset / 5, sigma, centre, sigma**2 * chi_squared.sample(z.shape) / NUM_OBSERVATIONS


def moments(mean: Tensor) -> tuple[Tensor, Tensor]:
    """First and second moments of ten draws of (z, momentum), as [2, ...] and [2, 2, ...]."""
    draws = torch.randn(2, NUM_POINTS, *mean.shape)
    first, second = draws.mean(1).double(), draws.square().mean(1).double()
    mixed = (draws[0] * draws[1]).mean(0).double()
    return first, torch.stack([second[0], mixed, mixed, second[1]]).unflatten(0, (2, 2))


def carried(fit: dict[str, Tensor], num_steps: int, centre: Tensor) -> tuple[Tensor, ...]:
    """Mean of z, of its square and of that of the momentum, after K cooled leapfrog steps.

    The steps are affine, and every draw takes the same ones. So they are taken once, from a unit
    of distance to the posterior's mean and from a unit of momentum; means over ten draws of what
    is quadratic at the end follow from the moments of the draws at the start.
    """
    precision = NUM_OBSERVATIONS * (-2 * fit["log_sigma"]).exp()
    temperatures = torch.ones(num_steps + 1, 1, 1).double()
    if "raw_tempering" in fit:  # temperatures are those of the momentum, 1 / sqrt(beta)
        share = (torch.arange(num_steps + 1) / num_steps).double()[:, None, None] ** 2
        first = 1 + fit["raw_tempering"].exp()
        temperatures = (first + (1 - first) * share)[..., OWNER]

    def evaluate(distance: Tensor) -> tuple[None, Tensor]:
        return None, -(1 + precision) * distance

    units = torch.eye(2).double()[:, :, None, None].expand(2, 2, *centre.shape)
    state = LeapfrogState(units[0], temperatures[0] * units[1], *evaluate(units[0]))
    step_size = 0.5 * fit["raw_step"].sigmoid()
    for k in range(num_steps):
        state = leapfrog_step(state, evaluate, step_size)
        alpha = temperatures[k + 1] / temperatures[k]
        state = state._replace(momentum=alpha * state.momentum)

    mean = (centre - fit["delta"]) * precision / (1 + precision)
    first, second = moments(mean)

    def at(way: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and mean square of a z' + b momentum, with z' the distance of z to its mean."""
        a, b = way
        value = a * (first[0] - mean) + b * first[1]
        square = a**2 * (second[0, 0] - 2 * mean * first[0] + mean**2) + b**2 * second[1, 1]
        return value, square + 2 * a * b * (second[0, 1] - mean * first[1])

    z, z_square = at(state.z)
    return mean + z, mean**2 + 2 * mean * z + z_square, at(state.momentum)[1]


def bound(fit: dict[str, Tensor], num_steps: int, centre: Tensor, spread: Tensor) -> Tensor:
    """The mean of ten draws of the bound, but for constants, summed over everything."""
    if num_steps:
        z, z_square, momentum_square = carried(fit, num_steps, centre)
        entropy = -0.5 * momentum_square
    else:
        first, second = (moment[0] for moment in moments(centre))
        scale, entropy = fit["log_scale"].exp(), fit["log_scale"]
        z = fit["mean"] + scale * first
        z_square = fit["mean"] ** 2 + 2 * fit["mean"] * scale * first + scale**2 * second[0]
    away = fit["delta"] - centre
    misfit = (spread + z_square + 2 * z * away + away**2) * (-2 * fit["log_sigma"]).exp()
    log_joint = -NUM_OBSERVATIONS * (fit["log_sigma"] + 0.5 * misfit) - 0.5 * z_square
    return (log_joint + entropy).sum()


def start(num_steps: int, is_cooled: bool) -> dict[str, Tensor]:
    values = {"delta": 0.0, "log_sigma": 3.0}
    values |= {"raw_step": math.log(0.01 / 0.99)} if num_steps else {"mean": 0.0, "log_scale": 1.0}
    fit = {name: torch.full((NUM_SETS, len(OWNER)), value) for name, value in values.items()}
    if is_cooled:
        fit["raw_tempering"] = torch.full((NUM_SETS, len(DIMENSIONS)), math.log(4.0))
    return {name: value.double().requires_grad_() for name, value in fit.items()}


def fitted(num_steps: int, is_cooled: bool, num_updates: int) -> dict[str, Tensor]:
    """The parameters after RMSProp in the form of the source, whose mean square starts at one."""
    _, _, centre, spread = problem()
    fit = start(num_steps, is_cooled)
    averages = {name: torch.ones_like(value) for name, value in fit.items()}
    for _ in range(num_updates):
        grads = torch.autograd.grad(bound(fit, num_steps, centre, spread), list(fit.values()))
        with torch.no_grad():
            for (name, value), grad in zip(fit.items(), grads, strict=True):
                averages[name].mul_(0.9).addcmul_(grad, grad, value=0.1)
                value.addcdiv_(grad, averages[name].sqrt() + 1e-5, value=RATE)
    return {name: value.detach() for name, value in fit.items()}


def squared_errors(delta: Tensor, sigma: Tensor) -> dict[str, list[list[float]]]:
    """Squared error of each part, summed over the dimensions of a problem: ``[sets, dims]``."""
    true_delta, true_sigma, _, _ = problem()
    found = {"delta": delta - true_delta, "sigma": sigma - true_sigma}
    zeros = torch.zeros(NUM_SETS, len(DIMENSIONS)).double()
    sums = {name: zeros.index_add(1, OWNER, part**2) for name, part in found.items()}
    return {name: [[float(f"{v:.5g}") for v in row] for row in s.tolist()]
            for name, s in sums.items()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], default=list(ROWS))
    parser.add_argument("--updates", type=int, default=30_000)
    parser.add_argument("--to", default=data.data_folder() / "measured/hvae_gaussian.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = data.data_folder().joinpath(arguments.to)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for row in arguments.rows or ROWS:
        started, clock = time.time(), time.process_time()
        fit = fitted(*ROWS[row], arguments.updates)
        facts = results.provenance(torch.device("cpu"), started=started, datasets=())
        known[row] = {name: facts[name] for name in ("commit", "device", "versions", "started")}
        known[row] |= {"processor_seconds": round(time.process_time() - clock)}
        known[row] |= {"updates": arguments.updates, "dimensions": DIMENSIONS}
        known[row]["squared_error"] = squared_errors(fit["delta"], fit["log_sigma"].exp())
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(row, known[row]["processor_seconds"], "s", flush=True)


if __name__ == "__main__":
    main()
