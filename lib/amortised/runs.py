r"""Runs: folders in which finished stages are files.

A run is one row of a study at one scale with one seed. Its folder
``runs/<study>/<row>-<scale>-seed<k>-<hash>`` is named after the hash of its options, of its
recipe's version and of the run that it builds on: other options are another folder. In it are

====================== ============================================================================
``run.json``           the options, complete and checked (:mod:`amortised.experiments` writes it)
``training-*``         the checkpoint of a training at work, and the one before it
``*.safetensors``      weights of the trained networks, half precision; what is evaluated is, to the
                       bit, what these files hold
``training.json``      written after the weights: the training is finished
``<stage>-*.stage``    finished parts of the evaluation, such as blocks of 100 images
``result.json``        written last, after ``per_image.stage``: the run is finished
====================== ============================================================================

A stage whose file exists is not done again, and that is the whole state. Killed at any moment, a
run goes on with the same numbers. It needs torch, numpy, safetensors and tqdm, and no more:

.. code-block:: none

    python -m amortised.runs runs/amc_table1/vae-laptop-seed0-1a2b3c4d --device cuda
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import checks, files, results
from .commands import Parser, command, stop
from .cuda import CapturedFunction
from .files import LockedError, OutOfTimeError, Work
from .numerics import argument_validation, seeded
from .recipes import Outcome, Run, architectures, images_of, recipe_named, training_examples
from .training import FitResult, fit, half_cosine

EXIT_FAILED, EXIT_USAGE, EXIT_OUT_OF_TIME = 1, 2, 3
#: PyTorch crashes where it cannot make so many.
MOST_THREADS = max(64, os.cpu_count() or 1)
HISTORY_LENGTH = 40  # means of the losses that a result keeps


def folder_name(run: Mapping[str, object]) -> str:
    """``study/row-scale-seedK-hash``: other options, another version, another folder.

    :param run: what ``run.json`` holds.

    >>> folder_name({"study": "s", "row": "r", "scale": "laptop", "seed": 0, "config": {},
    ...              "recipe_version": 1, "builds_on": None})
    's/r-laptop-seed0-2550d791'
    """
    facts = {"config": run["config"], "recipe_version": run["recipe_version"]}
    if run["builds_on"] is not None:
        facts["builds_on"] = identity(run["builds_on"])
    digest = results.config_hash(facts)[:8]
    return f"{run['study']}/{run['row']}-{run['scale']}-seed{run['seed']}-{digest}"


def identity(run: Mapping[str, object]) -> dict:
    """What tells the numbers of a run or of its result from those of other options."""
    return {key: run[key] for key in ("config_hash", "recipe_version")}


def read_json(path: Path) -> dict | None:
    """The content of a JSON file of a run; ``None`` if it is not there.

    :raises amortised.files.DamagedFileError: if it is no JSON.
    """
    try:
        return json.loads(path.read_bytes()) if path.exists() else None
    except ValueError as error:
        message = f"{path} is damaged ({error}); remove it to start afresh"
        raise files.DamagedFileError(message) from error


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write it, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    files.atomic_write(path, f"{text}\n".encode())


def execute(
    folder: str | Path,
    *,
    device: str = "cpu",
    stop_at: float = math.inf,
    training_only: bool = False,
) -> dict:
    """Train and evaluate a run, or go on with it.

    :param folder: holds ``run.json``.
    :param device: where to compute.
    :param stop_at: value of ``time.monotonic()`` at which to stop.
    :param training_only: stop when the weights are there.
    :return: the content of ``result.json``, or of ``training.json``.
    :raises ValueError: when there is no ``run.json``, no such device, or no weights of the run that
        this one builds on; nothing has been done then.
    :raises amortised.files.OutOfTimeError: when the time to stop has come; what is done is kept.
    :raises amortised.files.LockedError: when another process is at work on the run.
    """
    folder = Path(folder)
    spec = _checked(folder)
    check_device(device)
    weights = folder
    if spec["builds_on"] is not None:
        weights = folder.parents[1] / spec["builds_on"]["folder"]
        if read_json(weights / "training.json") is None:
            raise ValueError(
                f"{folder} builds on {weights}, which is not trained; first run\n"
                f"  python -m amortised.runs {weights} --training-only"
            )
    with files.lock(folder):
        for path in folder.glob(".*.tmp"):  # half-written by a process that was killed
            path.unlink()
        goal = folder / ("training.json" if training_only else "result.json")
        found = read_json(goal)
        if found is None:
            work = Work(folder, stop_at=stop_at)
            run = Run(spec["seed"], spec["config"], torch.device(device), work, weights)
            _work(run, spec, training_only)
            found = read_json(goal)
    return found


def _checked(folder: Path) -> dict:
    """What ``run.json`` holds; an error if it is not that of the folder."""
    spec = read_json(folder / "run.json")
    if spec is None:
        raise ValueError(f"{folder} holds no run.json; `python -m amortised.experiments` makes it")
    try:
        own, recipe = Path(folder_name(spec)).name, spec["recipe"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}/run.json is not that of a run: {error!r}") from None
    if own != folder.absolute().name:
        raise ValueError(f"{folder}/run.json is that of {own}")
    recipe_named(recipe)
    return spec


def check_device(device: str) -> None:
    """Check that a device is one of this machine's.

    :raises ValueError: with the choices, if it is not.
    """
    problem = checks.device()(device)
    if problem:
        raise ValueError(f"device {device!r}: must be {problem}")


def _work(run: Run, spec: Mapping[str, object], training_only: bool) -> None:
    """Do the stages that are missing. A run that diverges is a result, too: it has failed."""
    begun, cpu_begun = time.monotonic(), time.process_time()
    folder, recipe = run.work.folder, recipe_named(spec["recipe"])
    is_resumed = any(folder.glob("*.stage")) or any(folder.glob("*.safetensors"))
    name = run.config.get("dataset", "mnist")
    # Of the code as read. Durations come from a clock that nobody sets.
    facts = results.provenance(
        run.device, started=time.time(), wall_seconds=0.0, datasets=[name]["." in name :]
    )
    if "." in name:
        facts["data_sha256"] = _digests(name, run.config)
    training = read_json(folder / "training.json")
    try:
        is_cuda = run.device.type == "cuda"  # then it is the current one: graphs are captured there
        current = torch.cuda.device(run.device) if is_cuda else contextlib.nullcontext()
        with current, seeded(run.seed, run.device):
            if training is None and recipe.build is not None:
                training = _train(run, spec, facts)
            if training is not None and "reason" not in training:  # its result is in other files
                for path in folder.glob("training-checkpoint.stage*"):
                    path.unlink()
            if training_only:
                return
            reason = (read_json(run.weights / "training.json") or {}).get("reason")
            if reason is not None:
                raise FloatingPointError(reason)
            outcome = recipe.evaluate(run)
    except FloatingPointError as error:
        outcome = str(error)
        if training is None:
            write_json(folder / "training.json", {"reason": outcome})
    cpu_seconds = None if is_resumed else round(time.process_time() - cpu_begun, 1)
    facts["wall_seconds"] = round(time.monotonic() - begun, 3)
    _finish(folder, spec, training or {}, outcome, facts, cpu_seconds)


def _digests(name: str, config: Mapping[str, object]) -> dict[str, str]:
    """SHA-256 of the images of a reader's own data set, as bytes of their tensors."""
    parts = {f"{name}/{part}": load() for part, load in images_of(config)._asdict().items()}
    return {part: hashlib.sha256(x.numpy().tobytes()).hexdigest() for part, x in parts.items()}


# --- training ------------------------------------------------------------------------------------


def _train(run: Run, spec: Mapping[str, object], facts: Mapping[str, object]) -> dict:
    """Train the networks of a run, and write their weights and then ``training.json``.

    All learning rates fall along half a cosine.
    """
    config, folder = run.config, run.work.folder
    training = recipe_named(spec["recipe"]).build(config, run.device)
    count, draw = training.examples or training_examples({"dataset": "mnist"} | config, run.device)
    state = training.networks | {f"{k} optimizer": o for k, o in training.optimizers.items()}

    def update(index: Tensor) -> Mapping[str, Tensor]:
        return training.step(draw(index), index)

    # Validation of a distribution's arguments looks at values, which a captured graph cannot; and
    # it would stop a run that diverges with an error of its own, before `fit` sees the loss.
    with argument_validation(False):
        step = CapturedFunction(update, state) if run.device.type == "cuda" else update
        index, work = torch.arange(count, device=run.device), run.work.stage("training")
        passes = {"epochs": config["epochs"], "batch_size": config["batch_size"], "seed": run.seed}
        result = fit(step, index, state, schedule=half_cosine, work=work, **passes)
    kept = training.architectures
    if kept is None:
        kinds = {"decoder": "decoder", "encoder": config.get("encoder", "gaussian")}
        kept = {role: architectures(config).get(kind) for role, kind in kinds.items()}
    for role, architecture in kept.items():
        if role in training.networks:
            details = {**spec, "role": role, "provenance": facts}
            path = folder / f"{role}.safetensors"
            network = training.networks[role]
            results.save_weights(path, network, architecture, details, dtype=torch.float16)
    if "path" in training.networks:
        files.save_tree(folder / "path.stage", dict(training.networks["path"].state_dict()))
    found = training.details | {
        "steps": result.num_steps,
        "seconds": round(result.seconds, 2),
        "history": _history(result),
    }
    write_json(folder / "training.json", found)
    return found


def _history(result: FitResult) -> dict[str, list[float]]:
    """Each loss as a few means over consecutive stretches of the training."""
    found = {}
    for name, values in result.history.items():
        parts = values.tensor_split(min(HISTORY_LENGTH, len(values)))
        found[name] = [round(part.double().mean().item(), 4) for part in parts]
    return found


# --- result --------------------------------------------------------------------------------------


def _finish(
    folder: Path,
    spec: Mapping[str, object],
    training: Mapping[str, object],
    outcome: Outcome | str,
    facts: dict,
    cpu_seconds: float | None,
) -> None:
    """Write the values per image, then the result; ``outcome`` may be why the run has failed."""
    details = dict(training)
    seconds = {"training": details.pop("seconds")} if "seconds" in details else {}
    if isinstance(outcome, str):
        conclusion = {"status": "failed", "reason": outcome, "metrics": {}}
    else:
        per_image = {name: values.cpu().float() for name, values in outcome.per_image.items()}
        files.save_tree(folder / "per_image.stage", per_image)
        conclusion = {"status": "done", "metrics": results.summarise(per_image)}
        seconds |= {name: round(value, 2) for name, value in outcome.seconds.items()}
        details |= outcome.details
    facts["wall_seconds"] = max(sum(seconds.values()), facts["wall_seconds"])
    details |= {"cpu_seconds": cpu_seconds} | ({"seconds": seconds} if seconds else {})
    if spec["builds_on"] is not None:
        details["builds_on"] = identity(spec["builds_on"])
    names = ("study", "row", "scale", "seed", "config", "config_hash", "recipe_version")
    record = {name: spec[name] for name in names}
    conclusion |= {"provenance": facts, "details": details}
    write_json(folder / "result.json", record | conclusion)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m amortised.runs FOLDER``; see the head of this module."""
    parser = Parser(prog="python -m amortised.runs", description="Work on a run.")
    parser.add_argument("folder", type=Path, help="holds run.json")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:N")
    parser.add_argument("--training-only", action="store_true", help="stop at the weights")
    add_limits(parser)
    options = parser.parse_args(arguments)
    try:
        limits = {"stop_at": apply_limits(options), "training_only": options.training_only}
        found = execute(options.folder, device=options.device, **limits)
    except OutOfTimeError as error:
        return stop(f"{error}; the same command goes on from here", EXIT_OUT_OF_TIME)
    except (LockedError, OSError, ValueError) as error:
        return stop(str(error), EXIT_USAGE)
    print(f"{options.folder}: " + (f"failed: {found['reason']}" if "reason" in found else "done"))
    return 0


def add_limits(parser: argparse.ArgumentParser) -> None:
    """The options that limit threads and time."""
    parser.add_argument("--threads", type=int, help="processor threads; default: PyTorch's")
    parser.add_argument(
        "--max-minutes", type=float, help="stop after this time, with exit code 3; it can go on"
    )


def apply_limits(options: argparse.Namespace) -> float:
    """Set the number of threads, and say when to stop.

    :raises ValueError: for numbers that are not positive, for more threads than
        :data:`MOST_THREADS`, and for a device that is not there.
    """
    for name, most in (("threads", MOST_THREADS), ("max_minutes", math.inf)):
        value = getattr(options, name)
        if value is not None and not 0 < value <= most:
            expected = f"must be greater than 0 and at most {most}"
            raise ValueError(f"--{name.replace('_', '-')} {value}: {expected}")
    check_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.max_minutes is None:
        return math.inf
    return time.monotonic() + 60.0 * options.max_minutes


if __name__ == "__main__":
    command(main)
