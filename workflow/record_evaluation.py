"""Join evaluations of one model into a committed result, with the training behind the weights.

    python -m amortised.evaluation WEIGHTS --images 100 --output ll.json
    python -m amortised.evaluation WEIGHTS --simulated 20 --output bounds.json
    python workflow/record_evaluation.py WEIGHTS reference vae laptop ll.json bounds.json

Writes data/results/STUDY/ROW-SCALE-seedK.json and its per-image values. Every metric keeps the
number of images behind it; the configuration holds that of the training and of each evaluation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import safetensors
import safetensors.torch

from amortised import results

ANNEALED = {"log_likelihood": "ll", "ess": "ess", "acceptance_rate": "acceptance_rate"}
RESULTS = Path(__file__).resolve().parents[1] / "data/results"


def training_of(weights: Path) -> dict:
    """The configuration that ``workflow/train_vae.py`` saved with the weights."""
    with safetensors.safe_open(weights, framework="pt") as file:
        return json.loads(file.metadata()["amortised"])["details"]["config"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("study")
    parser.add_argument("row")
    parser.add_argument("scale")
    parser.add_argument("evaluations", type=Path, nargs="+", help="outputs of amortised.evaluation")
    options = parser.parse_args()

    training = training_of(options.weights)
    config, per_image, wall_seconds = {"training": training}, {}, 0.0
    for path in options.evaluations:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        values = safetensors.torch.load_file(path.with_suffix(".per_image.safetensors"))
        purpose = "bounds" if evaluation["config"]["simulated"] else "estimates"
        if purpose in config:
            parser.exit(2, f"error: {path} is a second evaluation of the same kind ({purpose})\n")
        config[purpose] = evaluation["config"]
        method = "hais" if evaluation["config"]["persistence"] > 0 else "ais"
        if purpose == "bounds":
            names = {name: f"simulated_{name}" for name in values}
        else:
            names = {name: f"{method}_{short}" for name, short in ANNEALED.items()}
        per_image |= {names.get(name, name): value.float() for name, value in values.items()}
        provenance = evaluation["provenance"]
        wall_seconds += provenance["wall_seconds"]

    record = {
        "study": options.study,
        "row": options.row,
        "scale": options.scale,
        "seed": training["seed"],
        "config": config,
        "config_hash": results.config_hash(config),
        "recipe_version": 1,
        "status": "done",
        "metrics": results.summarise(per_image),
        "provenance": provenance | {"wall_seconds": round(wall_seconds, 3)},
    }
    print(results.save_result(RESULTS, record, per_image))


if __name__ == "__main__":
    main()
