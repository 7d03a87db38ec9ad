"""What annealed importance sampling costs on this machine, route by route, as ratios in one run.

    python workflow/bench.py            # about five minutes on two idle cores
    python workflow/bench.py --quick    # under two

The contestants take turns in every round, so that a machine whose speed drifts slows them alike,
and a ratio is taken within a round. The unit is the time per chain and leapfrog step.

- *plain*: the obvious code, eleven gradients and three forward passes per temperature for ten
  leapfrog steps, autograd through the model;
- *AIS*: ``amortised.ais.ais`` on each route of ``amortised.fast``;
- *gradient*: one call of the route alone;
- *limit*: the floating-point operations of one log-likelihood with its gradient, at the speed of a
  large float32 matrix product here.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from amortised import results
from amortised.ais import AISSettings, AnnealedPath, ais, linear_schedule, log_prob_and_grad
from amortised.commands import Parser
from amortised.fast import LogLikelihoodAndGrad, log_likelihood_and_grad
from amortised.mcmc import leapfrog
from amortised.models import ConvBernoulli
from amortised.numerics import value_and_grad

NUM_CHAINS, NUM_IMAGES, NUM_LEAPFROG = 100, 16, 10  # 1,600 chains in all
STEP_SIZE = 0.05
MATRIX_SIDE = 2048
ROUTES = {
    "cpu": ("eager", "rewritten", "rewritten bfloat16", "dense"),
    "cuda": ("eager", "rewritten", "dense", "dense bfloat16"),
}


def plain_ais(
    model: ConvBernoulli,
    x: Tensor,
    z: Tensor,
    schedule: Tensor,
    num_leapfrog: int,
    generator: torch.Generator,
    on_temperature: Callable[[int], None],
) -> Tensor:
    """The obvious code: each quantity is computed where it is needed."""
    log_weights = torch.zeros(z.shape[:2], dtype=torch.float64, device=z.device)
    for t in range(1, len(schedule)):
        before, beta = schedule[t - 1].item(), schedule[t].item()

        def logdensity_fn(z: Tensor, beta: float = beta) -> Tensor:
            return model.prior().log_prob(z) + beta * model.log_likelihood(x, z)

        with torch.no_grad():
            log_weights += (beta - before) * model.log_likelihood(x, z)
        momentum = torch.randn(z.shape, generator=generator, device=z.device)
        proposal, end = leapfrog(z, momentum, logdensity_fn, STEP_SIZE, num_leapfrog)
        with torch.no_grad():
            energy = logdensity_fn(z) - 0.5 * momentum.square().sum(-1)
            new_energy = logdensity_fn(proposal) - 0.5 * end.square().sum(-1)
            uniform = torch.rand(energy.shape, generator=generator, device=z.device)
            z = torch.where((uniform.log() < new_energy - energy).unsqueeze(-1), proposal, z)
        on_temperature(t)
    return log_weights


def now(device: torch.device) -> float:
    """Seconds on a clock, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall time of a call, up to when the device has done its work."""
    start = now(device)
    function()
    return now(device) - start


class Problem:
    """A decoder, observations ``[B, 784]`` and starting points ``[K, B, 32]``."""

    def __init__(self, device: torch.device, num_chains: int, num_images: int):
        torch.manual_seed(0)
        model = ConvBernoulli()
        self.x = model.sample(num_images)[0].to(device)
        self.z = torch.randn(num_chains, num_images, model.latent_dim).to(device)
        self.model = model.to(device)
        self.device = device

    def route(self, name: str) -> LogLikelihoodAndGrad:
        """The callable for a name such as ``"dense bfloat16"``."""
        route, _, dtype = name.partition(" ")
        dtype = getattr(torch, dtype) if dtype else None
        return log_likelihood_and_grad(self.model, self.x, route, dtype=dtype)

    def ais_seconds(
        self,
        route: LogLikelihoodAndGrad | None,
        num_temperatures: int,
        num_leapfrog: int = NUM_LEAPFROG,
    ) -> list[float]:
        """Wall time of each temperature, without the start; the plain loop for no route."""
        generator = torch.Generator(self.device).manual_seed(0)
        schedule = linear_schedule(num_temperatures + 1)
        times: list[float] = []

        def on_temperature(t: int) -> None:
            times.append(now(self.device))

        if route is None:
            plain_ais(self.model, self.x, self.z, schedule, num_leapfrog, generator, on_temperature)
        else:
            prior = self.model.prior()
            is_coarse = route.dtype is not self.z.dtype
            path = AnnealedPath(
                prior.log_prob, route.log_likelihood, log_prob_and_grad(prior), route, is_coarse
            )
            settings = AISSettings(schedule, STEP_SIZE, num_leapfrog)
            ais(path, self.z, settings, generator=generator, on_temperature=on_temperature)
        return [end - start for start, end in itertools.pairwise(times)]


def operations(model: ConvBernoulli) -> int:
    """Multiplications and additions of one log-likelihood and its gradient in z."""
    products = []

    def observe(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        reuse = inputs[0][0, 0].numel() if isinstance(module, nn.ConvTranspose2d) else 1
        products.append(reuse * module.weight.numel())

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.ConvTranspose2d)]
    handles = [layer.register_forward_hook(observe) for layer in layers]
    with torch.no_grad():
        model.logits(next(model.parameters()).new_zeros(1, model.latent_dim))
    for handle in handles:
        handle.remove()
    return 2 * 2 * sum(products)  # multiply and add, forward and backward


def compare(device: torch.device, num_rounds: int) -> dict[str, list[float]]:
    """Microseconds per chain and leapfrog step, one value per round, for each contestant."""
    problem = Problem(device, NUM_CHAINS, NUM_IMAGES)
    model, x, z = problem.model, problem.x, problem.z
    flops, num_points = operations(model), z.shape[0] * z.shape[1]
    matrix = torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=device)

    routes = {}
    for name in ROUTES[device.type]:
        start = now(device)
        routes[name] = problem.route(name)
        routes[name](z)
        print(f"first use of {name:20} {now(device) - start:6.1f} s", flush=True)

    def gradient(function: Callable[[Tensor], object]) -> float:
        return min(seconds(lambda: function(z), device) for _ in range(2)) / num_points

    def plain_gradient(z: Tensor) -> tuple[Tensor, Tensor]:
        return value_and_grad(lambda z: model.log_likelihood(x, z), z)

    times = defaultdict(list)
    for _ in range(num_rounds):
        product = min(seconds(lambda: matrix @ matrix, device) for _ in range(2))
        times["limit"].append(flops * product / (2 * MATRIX_SIDE**3))
        times["gradient plain"].append(gradient(plain_gradient))
        for name, route in {"plain": None, **routes}.items():
            if route is not None:
                times[f"gradient {name}"].append(gradient(route))
            laps = problem.ais_seconds(route, num_temperatures=1 if name == "dense" else 2)
            times[f"ais {name}"].append(min(laps) / (num_points * NUM_LEAPFROG))
        print(".", end="", flush=True)
    print()
    return {name: [1e6 * value for value in values] for name, values in times.items()}


def main() -> None:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--device", default="cpu", choices=ROUTES)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    num_rounds = 3 if arguments.quick else 9
    facts = results.provenance(device, started=time.time(), datasets=())
    load = f"load before {os.getloadavg()[0]:.1f}"
    print(f"{facts['device']}, torch {facts['versions']['torch']}, {load}")

    times = compare(device, num_rounds)
    rows = []
    for name in ("plain", *ROUTES[device.type]):
        row = [name]
        for kind in ("ais", "gradient"):
            own, plain = times[f"{kind} {name}"], times[f"{kind} plain"]
            ratios = [[a / b for a, b in zip(plain, own, strict=True)]]
            ratios += [[a / b for a, b in zip(own, times["limit"], strict=True)]]
            row += map(statistics.median, (own, *ratios))
        rows.append(row)
    units = ("us", "x plain", "x limit")
    columns = [f"{kind}, {unit}" for kind in ("AIS", "gradient") for unit in units]
    print(results.markdown_table(["route", *columns], rows))
    limit, flops = statistics.median(times["limit"]), operations(ConvBernoulli())
    print(
        f"\n{NUM_CHAINS * NUM_IMAGES} chains, L = {NUM_LEAPFROG}, medians of {num_rounds} rounds; "
        f"us per chain and leapfrog step; limit {limit:.1f} us = {flops / 1e6:.2f} MFLOP at "
        f"{flops / limit / 1e3:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    main()
