r"""The studies of the book: which runs there are, where each stands, and how to make one.

.. code-block:: none

    python -m amortised.experiments list
    python -m amortised.experiments run amc_table1 vae --seed 0 --scale laptop

``run`` *prepares* a run (checks its options, writes ``run.json`` into its folder below ``runs/``),
works on it as :mod:`amortised.runs` describes, and *records* what it found: checks the
result, and copies it to ``data/results`` and the weights that the study keeps to ``data/models``.
Stopped at any moment, by ``--max-minutes``, Ctrl-C or ``kill``, the same command goes on. To
compute elsewhere, ``prepare`` here, take the folder there and back, and ``record`` here. A run is

=========== ===================================================================================
done        when its result is recorded, of the options and recipe version that are asked for now
failed      when training or evaluation left the numbers; its result says where and why, and only
            ``run --again`` tries once more
partial     when some of its stages are in ``runs/``
stale       when a result is recorded, but of other options, or damaged
missing     otherwise
=========== ===================================================================================

With ``--root FOLDER`` the folders ``data`` and ``runs`` lie below that one, and with ``--file`` the
studies are those of another file.
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import data, results, runs
from .commands import Parser, command, stop
from .evaluation import load_module
from .files import LockedError, OutOfTimeError, atomic_write, load_tree, lock
from .schemas import FormatError
from .studies import SCALES, Experiment, load_studies


class State(NamedTuple):
    """Where a run stands: ``missing``, ``partial``, ``done``, ``stale`` or ``failed``.

    :ivar word: one of these.
    :ivar record: the result that is recorded, if there is one that can be read.
    :ivar damage: what is wrong with the one that cannot.
    """

    word: str
    record: dict | None
    damage: str | None = None


def select(
    studies: Mapping[str, Sequence[Experiment]],
    study: str | None = None,
    row: str | None = None,
    *,
    scale: str | None = None,
    seed: int | None = None,
) -> list[Experiment]:
    """The runs that fit, in the order of the file but seed by seed.

    :raises FormatError: for a name that does not exist, or if nothing fits; with the choices.

    >>> chosen = select(load_studies(), "vae_objectives", "elbo", scale="laptop", seed=0)
    >>> [run.name for run in chosen]
    ['vae_objectives/elbo-laptop-seed0']
    """
    found = [experiment for one in studies.values() for experiment in one]
    for name, value in (("study", study), ("row", row), ("scale", scale), ("seed", seed)):
        if value is not None:
            choices = dict.fromkeys(getattr(experiment, name) for experiment in found)
            found = [experiment for experiment in found if getattr(experiment, name) == value]
            if not found:
                known = ", ".join(map(str, choices)) or "none"
                raise FormatError(f"there is no run with {name} {value!r}; choices: {known}")
    order = {name: index for index, name in enumerate(studies)}
    return sorted(found, key=lambda e: (order[e.study], SCALES.index(e.scale), e.seed))


# --- one run -------------------------------------------------------------------------------------


def _project() -> Path:
    return data.data_folder().parent


def _specification(experiment: Experiment) -> dict:
    """What ``run.json`` holds: all that a machine needs that has no studies and no checks."""
    needs = None
    if experiment.needs is not None:
        trained = _specification(experiment.needs)
        needs = runs.identity(trained) | {"folder": runs.folder_name(trained)}
    facts = experiment._asdict() | {
        "config_hash": results.config_hash(experiment.config),
        "builds_on": needs,
        "keep": list(experiment.keep) if experiment.seed == 0 else [],
    }
    del facts["needs"]
    return facts


def run_folder(experiment: Experiment, root: Path | None = None) -> Path:
    """The folder of a run."""
    return (root or _project()) / "runs" / runs.folder_name(_specification(experiment))


def state_of(experiment: Experiment, root: Path | None = None) -> State:
    """Where a run stands, from what is on disk."""
    root = root or _project()
    path = results.result_path(root / "data/results", *experiment[:4])
    found, damage, specification = None, None, _specification(experiment)
    if path.exists():
        try:
            found = results.load_result(path).record
        except results.ResultError as error:
            damage = " ".join(str(error).split())
    if found is not None and _is_of(found, specification):
        roles = () if found["status"] == "failed" else specification["keep"]
        kept = (_kept_weights(experiment, role, root) for role in roles)
        damage = next(filter(None, (_damage(path, specification) for path in kept)), None)
        if damage is None:
            return State(found["status"], found)
    folder = run_folder(experiment, root)
    if any(path.suffix in (".stage", ".safetensors", ".previous") for path in folder.glob("*")):
        return State("partial", found, damage)
    return State("missing" if found is None and damage is None else "stale", found, damage)


def _is_of(found: Mapping, specification: Mapping) -> bool:
    """Whether a result is that of this run: of its options, version, and trained networks."""
    built_on = specification["builds_on"]
    same = runs.identity(found) == runs.identity(specification)
    stated = found.get("details", {}).get("builds_on")
    return same and stated == (built_on and runs.identity(built_on))


def _damage(weights: Path, specification: Mapping) -> str | None:
    """What is wrong with weights that a run keeps."""
    if not weights.is_file():
        return f"weights are missing: {weights.name}"
    try:
        details = results.read_weights(weights)[2]
    except results.ResultError as error:
        return " ".join(str(error).split())
    # There are weights from before there were recipes.
    same = "recipe_version" not in details or runs.identity(details) == runs.identity(specification)
    return None if same else f"weights are of other options: {weights.name}"


def _kept_weights(experiment: Experiment, role: str, root: Path) -> Path:
    return root / "data/models" / f"{experiment.name}-{role}.safetensors"


def prepare(experiment: Experiment, root: Path | None = None) -> Path:
    """Write ``run.json`` into the folder of a run, and into that of the run that it builds on.

    Weights of the latter that are committed are put in place, so that it need not be trained.

    :return: the folder.
    """
    root = root or _project()
    folder = run_folder(experiment, root)
    if not (folder / "run.json").exists():
        runs.write_json(folder / "run.json", _specification(experiment))
    if experiment.needs is not None:
        _restore(experiment.needs, prepare(experiment.needs, root), root)
    return folder


def _restore(experiment: Experiment, folder: Path, root: Path) -> None:
    """Take both networks of a recorded run from ``data/models``, where they are kept."""
    kept = {r: _kept_weights(experiment, r, root) for r in ("decoder", "encoder")}
    state = state_of(experiment, root)
    if (folder / "training.json").exists() or state.word != "done":
        return
    if experiment.seed == 0 and all(path.is_file() for path in kept.values()):
        for role, path in kept.items():
            atomic_write(folder / f"{role}.safetensors", path.read_bytes())
        runs.write_json(folder / "training.json", {"restored": True})


def run_experiment(
    experiment: Experiment,
    *,
    root: Path | None = None,
    device: str = "cpu",
    stop_at: float = math.inf,
    again: bool = False,
) -> State:
    """Make one run, or go on with it, and record its result.

    :param root: folder of ``data`` and ``runs``; that of the project by default.
    :param device: where to compute.
    :param stop_at: value of ``time.monotonic()`` at which to stop.
    :param again: make a run that is done or has failed once more, from its beginning.
    :return: its state afterwards: done or failed.
    :raises OutOfTimeError: when ``stop_at`` has come; what is done so far is kept.
    :raises LockedError: when another process is at work on this run.
    """
    root = root or _project()
    state = state_of(experiment, root)
    if state.word in ("done", "failed") and not again:
        return state
    folder = prepare(experiment, root)
    if again:
        _empty(folder)
    if experiment.needs is not None:
        trained = run_folder(experiment.needs, root)
        runs.execute(trained, device=device, stop_at=stop_at, training_only=True)
    found = runs.execute(folder, device=device, stop_at=stop_at)
    record(experiment, root)
    state = state_of(experiment, root)
    return state if state.word == found["status"] else State(found["status"], found)


def _empty(folder: Path) -> None:
    """Remove all stages of a run."""
    with lock(folder):
        for path in folder.iterdir():
            if path.name not in ("run.json", ".lock"):
                path.unlink()


def record(experiment: Experiment, root: Path | None = None) -> bool:
    """Check a finished run, and copy its weights and its result to ``data``.

    A failed run does not take the place of a result that is true of the same options.

    :return: whether there was something to record.
    :raises amortised.results.ResultError: if the result departs from its format.
    """
    root = root or _project()
    folder = run_folder(experiment, root)
    found = runs.read_json(folder / "result.json")
    is_done = found is not None and found.get("status") == "done"
    if found is None or (not is_done and state_of(experiment, root).word == "done"):
        return False
    per_image = load_tree(folder / "per_image.stage") if is_done else None
    results.check_result(found, per_image or {})
    if not _is_of(found, _specification(experiment)):
        raise FormatError(f"{folder} holds the result of another run; remove it")
    for role in _specification(experiment)["keep"] if is_done else []:
        weights = folder / f"{role}.safetensors"
        load_module(weights)  # or they are damaged
        atomic_write(_kept_weights(experiment, role, root), weights.read_bytes())
    results.save_result(root / "data/results", found, per_image)
    return True


# --- command line --------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """``list``, ``prepare``, ``run`` and ``record``; see the head of this module."""
    options = _parser().parse_args(arguments)
    try:
        options.root = options.root or _project()
        found = load_studies(options.file)
        chosen = select(found, options.study, options.row, scale=options.scale, seed=options.seed)
        return options.command(chosen, options)
    except OutOfTimeError as error:
        return stop(f"{error}; the same command goes on from here", runs.EXIT_OUT_OF_TIME)
    except RecursionError:
        return stop(f"{options.file}: nested too deeply, or in itself", runs.EXIT_USAGE)
    except (data.DataError, LockedError, OSError, ValueError) as error:
        return stop(str(error), runs.EXIT_USAGE)


def _parser() -> argparse.ArgumentParser:
    about = "Run the studies of the book and keep what they find in data/results."
    parser = Parser(prog="python -m amortised.experiments", description=about)
    parser.add_argument("--file", type=Path, help="studies; default: workflow/experiments.yaml")
    parser.add_argument("--root", type=Path, help="folder of data/ and runs/")
    commands = parser.add_subparsers(required=True)

    def add(name: str, command: Callable, about: str, scale: str | None) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=about, description=about)
        subparser.set_defaults(command=command)
        subparser.add_argument("study", nargs="?" if name != "run" else None)
        subparser.add_argument("row", nargs="?", help="default: all rows")
        scales = f"{' or '.join(SCALES)}; default: {scale or 'all'}"
        subparser.add_argument("--scale", default=scale, help=scales)
        subparser.add_argument("--seed", type=int, help="default: all seeds")
        return subparser

    add("list", _list, "rows with their state and recorded cost", None)
    add("prepare", _prepare, "write run.json of what is not done, and print results to make", None)
    add("record", _record, "check the runs that are finished, and copy them to data/", None)
    run = add("run", _run, "make the results that are missing or stale", SCALES[0])
    run.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:N")
    run.add_argument("--again", action="store_true", help="make runs that are done or failed anew")
    runs.add_limits(run)
    return parser


def _list(chosen: list[Experiment], options: argparse.Namespace) -> int:
    width = max(len(experiment.name) for experiment in chosen)
    states = {experiment.name: state_of(experiment, options.root) for experiment in chosen}
    for name, state in states.items():
        print(f"{name:<{width}}  {state.word:<8} {state.damage or _cost(state.record)}".rstrip())
    counts = Counter(state.word for state in states.values())
    print(", ".join(f"{count} {word}" for word, count in sorted(counts.items())))
    return 0


def _cost(found: Mapping | None) -> str:
    if found is None:
        return ""
    facts = found["provenance"]
    cost = f"{facts['wall_seconds'] / 60:7.1f} min on {facts['device']['name']}"
    if "threads" in facts["device"]:
        cost += f", {facts['device']['threads']} thread(s)"
    return cost + (f": {found['reason']}" if found["status"] == "failed" else "")


def _prepare(chosen: list[Experiment], options: argparse.Namespace) -> int:
    for experiment in chosen:
        if state_of(experiment, options.root).word not in ("done", "failed"):
            print(prepare(experiment, options.root).relative_to(options.root) / "result.json")
    return 0


def _record(chosen: list[Experiment], options: argparse.Namespace) -> int:
    for experiment in chosen:
        if record(experiment, options.root):
            print(f"{experiment.name}: recorded")
    return 0


def _run(chosen: list[Experiment], options: argparse.Namespace) -> int:
    stop_at, failed = runs.apply_limits(options), []
    for experiment in chosen:
        before = state_of(experiment, options.root)
        if before.word not in ("done", "failed") or options.again:
            note = f" ({before.damage})" if before.damage else ""
            print(f"{experiment.name}: {before.word}, running{note}", flush=True)
        state = run_experiment(
            experiment,
            root=options.root,
            device=options.device,
            stop_at=stop_at,
            again=options.again,
        )
        print(f"{experiment.name}: {state.word}, {_cost(state.record).strip()}", flush=True)
        if state.word == "failed":
            failed.append(experiment.name)
    return stop(f"failed: {', '.join(failed)}", runs.EXIT_FAILED) if failed else 0


if __name__ == "__main__":
    command(main)
