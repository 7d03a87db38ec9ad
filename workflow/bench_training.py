"""What a training step costs on this machine, plain and as the recipes make it, in one run.

    python workflow/bench_training.py                  # some minutes on one idle core
    python workflow/bench_training.py --device cuda --batch-size 512

The contestants take turns in every round, so that a machine whose speed drifts slows them alike,
and a ratio is taken within a round. *Plain* runs the chain by autograd through the decoder; the
others run it on the faster route of ``amortised.fast``, on CUDA inside a graph of the whole step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from bench import seconds

from amortised import data, experiments, recipes, results
from amortised.commands import Parser
from amortised.cuda import CapturedFunction
from amortised.numerics import argument_validation

CONTESTANTS = {
    "cpu": {"plain": {"plain": True}, "recipe": {}},
    "cuda": {
        "plain": {"plain": True},
        "recipe, in a graph": {"chain_dtype": "float32"},
        "recipe, in a graph, float16 chain": {"chain_dtype": "float16"},
    },
}
ROWS = {"VAE": "vae", "AMC, T = 5": "amc_cnn_g_t5", "AMC, T = 50": "amc_cnn_g_t50"}


def make_step(row: str, device: torch.device, plain: bool = False, **changes: str) -> Callable:
    """A training step on grey images of one row of Table 1."""
    torch.manual_seed(0)
    options = experiments.select(experiments.load_studies(), "amc_table1", row, seed=0)[0].config
    training = recipes.amc_training(options | changes, device, plain=plain)
    index = torch.zeros(1, dtype=torch.long, device=device)

    def step(grey: torch.Tensor) -> object:
        return training.step(data.binarise(grey), index)

    if plain or device.type == "cpu":
        return step
    state = training.networks | {f"{k} optimizer": o for k, o in training.optimizers.items()}
    return CapturedFunction(step, state)


def main() -> None:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=CONTESTANTS)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    facts = results.provenance(device, started=time.time(), datasets=())
    print(f"{facts['device']}, torch {facts['versions']['torch']}, batch {options.batch_size}\n")
    batch = data.load_mnist("train").images[: options.batch_size].to(device)
    rows = []
    # A graph cannot hold the validation of a distribution's arguments.
    with argument_validation(device.type != "cuda"):
        for label, row in ROWS.items():
            forms = CONTESTANTS[device.type].items()
            steps = {name: make_step(row, device, **changes) for name, changes in forms}
            times: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(2):
                for step in steps.values():
                    step(batch)
            for _ in range(options.rounds):
                for name, step in steps.items():
                    times[name].append(seconds(partial(step, batch), device))
            for name, own in times.items():
                ratio = [a / b for a, b in zip(times["plain"], own, strict=True)]
                rows.append([label, name, statistics.median(own) * 1e3, statistics.median(ratio)])
    print(results.markdown_table(["step", "form", "ms", "plain time over this"], rows))


if __name__ == "__main__":
    main()
