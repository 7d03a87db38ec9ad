"""What a gradient costs each optimiser of chapter 3's race, in processor time on one thread.

    python workflow/race_times.py    # a minute; writes data/measured/iterative_race.json

The optimisers take turns in every round, so that a machine whose speed drifts slows them alike.
A gradient is a pass through the decoder and back, with all that the optimiser does about it: for
the iterative encoder that is its own network.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from torch.optim import SGD, Adam, RMSprop

from amortised import data, evaluation, iterative, results

NUM_IMAGES, NUM_STEPS = 200, 40
OPTIMISERS = {
    "SGD": partial(SGD, lr=0.01),
    "momentum": partial(SGD, lr=0.001, momentum=0.9),
    "RMSProp": partial(RMSprop, lr=0.1),
    "Adam": partial(Adam, lr=0.1),
}


def measure(num_rounds: int) -> dict[str, float]:
    """Milliseconds a gradient, the median over rounds, by optimiser."""
    stem = data.data_folder() / "models/iterative_small/iterative-laptop-seed0"
    model, encoder = (
        evaluation.load_module(f"{stem}-{role}.safetensors").requires_grad_(False)
        for role in ("decoder", "encoder")
    )
    x = data.load_mnist_binary("test").images[data.drawn_images(NUM_IMAGES, 2018)]
    steps = {name: iterative.gradient_ascent(make) for name, make in OPTIMISERS.items()}
    times = defaultdict(list)
    for _ in range(num_rounds):
        for name, step in (steps | {"iterative encoder": encoder}).items():
            started = time.process_time()
            iterative.refine(model, step, x, NUM_STEPS)
            times[name].append(1000 * (time.process_time() - started) / (NUM_STEPS + 1))
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = results.provenance(torch.device("cpu"), started=time.time(), datasets=())
    found = {name: facts[name] for name in ("device", "versions", "started")}
    found |= {"images": NUM_IMAGES, "milliseconds_a_gradient": measure(arguments.rounds)}
    path = arguments.to or data.data_folder() / "measured/iterative_race.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
