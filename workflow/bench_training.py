"""What a training step costs on this machine, plain and fast, as ratios in one run.

    python workflow/bench_training.py                  # some minutes on one idle core
    python workflow/bench_training.py --device cuda --batch-size 512

The contestants take turns in every round, so that a machine whose speed drifts slows them alike,
and a ratio is taken within a round. *Plain* is autograd throughout, on the processor with images
stored channels first. The others add one thing each: channels last, the rewritten likelihood of
``amortised.fast`` for the chain (its compiled form), and on CUDA a graph of the whole step. *Three
seeds* are trained as one model; their time is that of one of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from amortised import amc, data, results
from amortised.adversarial import Discriminator
from amortised.encoders import GaussianEncoder, ImplicitEncoder
from amortised.fast import RefreshedLikelihood
from amortised.models import ConvBernoulli
from amortised.numerics import argument_validation
from amortised.side_by_side import side_by_side
from amortised.training import CudaGraphStep

GRAPH = {"channels_last": True, "graph": True, "route": "dense"}
CONTESTANTS = {
    "cpu": {
        "plain": {},
        "channels last": {"channels_last": True},
        "+ rewritten chain": {"channels_last": True, "route": "rewritten"},
        "+ compiled chain": {"channels_last": True, "route": "compiled"},
    },
    "cuda": {
        "plain": {},
        "graph": GRAPH,
        "graph, float16 chain": GRAPH | {"dtype": torch.float16},
        "graph, float16 chain, three seeds": GRAPH | {"dtype": torch.float16, "num_models": 3},
    },
}


def make_step(
    num_steps: int,
    device: torch.device,
    channels_last: bool = False,
    route: str | None = None,
    dtype: torch.dtype | None = None,
    graph: bool = False,
    num_models: int = 1,
) -> Callable[[torch.Tensor], object]:
    """A training step on grey images: a VAE for ``num_steps=0``, else AMC with CNN-G and a game."""
    torch.manual_seed(0)
    kinds: dict[str, type[nn.Module]] = {"model": ConvBernoulli}
    if num_steps:
        kinds |= {"encoder": ImplicitEncoder, "discriminator": Discriminator}
    else:
        kinds["encoder"] = GaussianEncoder
    members = {name: [kind() for _ in range(num_models)] for name, kind in kinds.items()}
    networks = {name: side_by_side(m) if num_models > 1 else m[0] for name, m in members.items()}
    model = networks["model"]
    layout = torch.channels_last if channels_last else torch.preserve_format
    optimizers = {}
    for name, network in networks.items():
        network.to(device, memory_format=layout)
        rate = torch.tensor(1e-3, device=device) if graph else 1e-3
        optimizers[name] = torch.optim.Adam(network.parameters(), lr=rate, capturable=graph)
    teacher = partial(
        amc.teacher_samples,
        model,
        num_steps=num_steps,
        step_size=0.02,
        route=RefreshedLikelihood(model, route=route, dtype=dtype) if route else None,
    )

    def step(grey):
        x = data.binarise(grey.repeat(num_models, 1))
        if not num_steps:
            return amc.vae_step(x, model, networks["encoder"], optimizers)
        return amc.amc_step(
            x,
            model,
            networks["encoder"],
            optimizers,
            teacher=teacher,
            discriminator=networks["discriminator"],
        )

    if not graph:
        return step
    state = networks | {f"optimizer {name}": optimizer for name, optimizer in optimizers.items()}
    return CudaGraphStep(step, state)


def seconds(step: Callable, batch: torch.Tensor, repetitions: int) -> float:
    """Wall time of one step, up to when the device has done its work."""
    synchronise = torch.cuda.synchronize if batch.device.type == "cuda" else (lambda: None)
    synchronise()
    started = time.perf_counter()
    for _ in range(repetitions):
        step(batch)
    synchronise()
    return (time.perf_counter() - started) / repetitions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type not in CONTESTANTS:
        parser.error(f"--device must be cpu or cuda; got {options.device}")
    torch.set_num_threads(options.threads)
    facts = results.provenance(device, started=time.time(), datasets=())
    print(f"{facts['device']}, torch {facts['versions']['torch']}, batch {options.batch_size}\n")
    batch = data.load_mnist("train").images[: options.batch_size].to(device)
    rows, contestants = [], CONTESTANTS[device.type]
    for num_steps in (0, 5, 50):
        steps = {
            name: make_step(num_steps, device, **settings)
            for name, settings in contestants.items()
            if num_steps or "chain" not in name
        }
        repetitions = 10 if num_steps < 50 else 2
        times: dict[str, list[float]] = {name: [] for name in steps}
        # A graph cannot hold the validation of a distribution's arguments.
        with argument_validation(device.type != "cuda"):
            for step in steps.values():
                seconds(step, batch, 2)
            for _ in range(options.rounds):
                for name, step in steps.items():
                    models = contestants[name].get("num_models", 1)
                    times[name].append(seconds(step, batch, repetitions) / models)
        for name, own in times.items():
            ratio = [a / b for a, b in zip(times["plain"], own, strict=True)]
            label = f"AMC, T = {num_steps}" if num_steps else "VAE"
            milliseconds = statistics.median(own) * 1e3
            rows.append([label, name, milliseconds, statistics.median(ratio)])
    print(results.markdown_table(["step", "form", "ms a model", "plain time over this"], rows))


if __name__ == "__main__":
    main()
