"""Print what the committed runs cost, and a model of that cost.

The page book/reproducing.md includes it. On a processor the time is that of the processor, which
other work on the machine does not change; on a graphics card it is the wall time. A run's time is
split into stages by its result; each stage is explained by how often it did what it is made of, by
least squares with coefficients from zero, separately for each device. A device with fewer runs than
the model has unknowns has no model.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from amortised import experiments, results
from amortised.studies import SCALES

WORK = {
    "image": "a training image: decoder and encoder, forward and backward",
    "game": "the same image for a student without density and a discriminator",
    "sample": "a further importance sample of a training image",
    "chain": "a gradient of the chain that teaches",
    "annealing": "a gradient of the annealed chains",
    "importance": "an importance sample",
    "fit": "an image that a Gaussian with full covariance is fitted to",
    "proposal": "a training image of the Gaussian proposal fitted afterwards",
}


#: The recipes whose stages the model knows; of the runs of others the time alone is printed.
MODELLED = ("amc", "vae", "objective", "teacher")


class Timed(NamedTuple):
    """A run with its seconds by stage."""

    experiment: experiments.Experiment
    device: str
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def work_of(config: Mapping) -> dict[str, dict[str, float]]:
    """How often each stage of a training recipe does what it is made of."""
    images = config["training_images"] * config["epochs"]
    is_game = config.get("method") == "avb" or config.get("rule") in ("gan", "wasserstein")
    leapfrogs = config["num_leapfrog_steps"] if config.get("kernel") == "hmc" else 1
    sampled = config["images"] * config.get("num_samples", 0)
    annealed = config["num_temperatures"] * config["num_leapfrog"]
    chains, pilot = config["num_chains"], config["pilot_chains"]
    fitted, annealed_images = 0, config["images"]  # by what is fitted to each image
    if "hais_images" in config:
        fitted, annealed_images = config["images"], config["hais_images"]
    own = config.get("encoder", "gaussian") == "gaussian" and not fitted
    decoders = 2 if "start" in config else 1  # one that it starts from, to compare with
    return {
        "training": {
            "image": images,
            "game": images * is_game,
            "sample": images * (config.get("num_student_samples", 1) - 1),
            "chain": images * config.get("num_steps", 0) * leapfrogs,
        },
        "annealing": {"annealing": decoders * annealed_images * annealed * (chains + pilot)},
        "bounds": {"annealing": config["simulated_pairs"] * annealed * (2 * chains + pilot)},
        "importance sampling": {"importance": sampled * (2 if own else 1), "fit": fitted},
        "proposal": {"proposal": config["training_images"] * config.get("proposal_epochs", 0)},
    }


def timed_runs(studies: Mapping, root: Path | None) -> list[Timed]:
    """The recorded runs, with seconds by stage."""
    runs = []
    for experiment in experiments.select(studies):
        state = experiments.state_of(experiment, root)
        if state.word != "done":
            continue
        facts, details = state.record["provenance"], state.record["details"]
        seconds = dict(details.get("seconds", {}))
        # Loading the data is part of what is left over, the fitted proposal nearly all of it.
        left = facts["wall_seconds"] - sum(seconds.values())
        seconds["proposal" if seconds else "imputation"] = max(0.0, left)
        busy = details.get("cpu_seconds")
        if facts["device"]["type"] == "cpu" and busy is not None:
            share = busy / max(facts["wall_seconds"], 1e-9)
            seconds = {stage: share * value for stage, value in seconds.items()}
        threads = facts["device"].get("threads")
        shown = f" ({threads} thread{'s' * (threads > 1)})" if threads else ""
        device = results.plain(facts["device"]["name"]) + shown
        runs.append(Timed(experiment, device, seconds))
    return runs


def fit(runs: list[Timed]) -> dict[str, float] | None:
    """Seconds for one unit of each kind of work; ``None`` where there are too few runs."""
    rows, seconds = [], []
    runs = [run for run in runs if run.experiment.recipe in MODELLED]
    for run in runs:
        for stage, work in work_of(run.experiment.config).items():
            rows.append([work.get(kind, 0.0) for kind in WORK])
            seconds.append(run.seconds.get(stage, 0.0))
    design = np.asarray(rows, dtype=float).reshape(-1, len(WORK))
    used = design.any(axis=0)
    if len({run.experiment.row for run in runs}) <= used.sum():
        return None
    scale = np.where(used, design.max(axis=0, initial=1.0), 1.0)
    solution, _ = nnls(design / scale, np.asarray(seconds))
    per_unit = solution / scale
    return {kind: float(per_unit[i]) for i, kind in enumerate(WORK) if used[i]}


def predicted(config: Mapping, per_unit: Mapping[str, float]) -> float | None:
    """Seconds of a run by the model; ``None`` if it does work that no run behind the model did."""
    done = [pair for work in work_of(config).values() for pair in work.items()]
    if any(amount and kind not in per_unit for kind, amount in done):
        return None
    return sum(amount * per_unit.get(kind, 0.0) for kind, amount in done)


def _print_rows(runs: list[Timed], per_unit: Mapping[str, dict | None]) -> None:
    several = len(per_unit) > 1
    print(
        "```{table} Mean minutes of a recorded run of each row, and what the model makes of them."
    )
    print(":name: tab-costs\n")
    print("| study | row | scale | runs | minutes a run | by the model |" + " device |" * several)
    print("|:--|:--|:--|--:|--:|--:|" + ":--|" * several)
    groups = defaultdict(list)
    for run in runs:
        groups[*run.experiment[:3], run.device].append(run)
    for (study, row, scale, device), members in groups.items():
        model, minutes = None, [run.total / 60 for run in members]
        if per_unit[device] and members[0].experiment.recipe in MODELLED:
            model = predicted(members[0].experiment.config, per_unit[device])
        shown = "–" if model is None else f"{model / 60:.1f}"
        print(
            f"| {study} | {row} | {scale} | {len(members)} | {np.mean(minutes):.1f} | {shown} |"
            + f" {device} |" * several
        )
    print("```")


def _print_model(runs: list[Timed], per_unit: Mapping[str, float], device: str) -> None:
    print(f"\n```{{table}} The model on {device}, by least squares over {len(runs)} runs.\n")
    print("| unit of work | microseconds | share of all time |\n|:--|--:|--:|")
    done = defaultdict(float)
    for run in runs:
        if run.experiment.recipe in MODELLED:
            for work in work_of(run.experiment.config).values():
                for kind, amount in work.items():
                    done[kind] += amount * per_unit.get(kind, 0.0)
    total = sum(done.values())
    for kind, seconds in per_unit.items():
        print(f"| {WORK[kind]} | {seconds * 1e6:,.0f} | {done[kind] / total:.0%} |")
    print("```")


def main(root: Path | None = None) -> int:
    studies = experiments.load_studies()
    runs = timed_runs(studies, root)
    if not runs:
        print("No run is recorded yet.")
        return 0
    by_device = defaultdict(list)
    for run in runs:
        by_device[run.device].append(run)
    models = {device: fit(members) for device, members in by_device.items()}
    _print_rows(runs, models)
    for device, members in by_device.items():
        if models[device]:
            _print_model(members, models[device], device)
    for scale in SCALES:
        asked = experiments.select(studies, scale=scale)
        missing = sum(experiments.state_of(run, root).word != "done" for run in asked)
        if missing:
            print(f"\nRuns at {scale} scale that are not recorded yet: {missing}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
