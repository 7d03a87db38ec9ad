r"""The experiment engine: a row of ``workflow/experiments.yaml`` becomes a result.

.. code-block:: none

    python -m amortised.experiments list
    python -m amortised.experiments run amc_table1 vae --seed 0 --scale laptop

A *study* is a table of the book. Its *rows* are trained and evaluated by the study's recipe (a
function of :mod:`amortised.recipes`) at a *scale*, once for each *seed*. The options of a run are
those of the study's ``common`` block, overridden by its scale and then by its row; every option of
the recipe must be there, and nothing else. Nothing starts before the whole file has been checked.

A finished run is ``data/results/<study>/<row>-<scale>-seed<k>.json`` with values per image beside
it, and, where the study says so, weights in ``data/models``. While it is at work it keeps
checkpoints in ``checkpoints/<study>/<row>-<scale>-seed<k>-<hash>`` (seeds that train together in
``<row>-<scale>-seeds<k>+<l>-<hash>`` until they are trained). Stopped at any moment, by
``--max-minutes``, Ctrl-C or ``kill -9``, the same command goes on from the last checkpoint and ends
with the numbers of a run that was left alone. A run is

=========== ===================================================================================
missing     when there is neither a result nor a checkpoint
partial     when there are checkpoints
done        when the result was made with the options and the recipe version that are asked for now
stale       when it was made with others, or is damaged: running it makes it anew
failed      when training or evaluation left the numbers; its result says where and why
=========== ===================================================================================

With ``--root FOLDER`` the three folders lie below that one, and with ``--file`` the studies are
those of another file. It imports torch, numpy, safetensors, PyYAML and tqdm, and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from . import checks, data, results
from .recipes import RECIPES, ROLES, TOGETHER, Outcome, Run
from .training import (
    CheckpointLockedError,
    OutOfTimeError,
    checkpoint_lock,
    read_checkpoint,
)

__all__ = [
    "SCALES",
    "Experiment",
    "ExperimentError",
    "Places",
    "State",
    "Study",
    "find_weights",
    "load_studies",
    "main",
    "run_experiment",
    "select",
    "state_of",
    "train_together",
]

SCALES = ("laptop", "full")
"""``laptop``: minutes on one core, three seeds. ``full``: the sizes of the sources, on a GPU."""

EXIT_FAILED, EXIT_USAGE, EXIT_OUT_OF_TIME = 1, 2, 3


class ExperimentError(ValueError):
    """The file of studies, or what was asked for, cannot be used; the message lists choices."""


class Experiment(NamedTuple):
    """One run that can be asked for.

    :ivar config: its options, complete and checked.
    :ivar keep: roles of the networks whose weights of seed 0 go to ``data/models``.
    :ivar needs: the run of another row, of the same scale and seed, whose weights it builds on, or
        None. Options ``trained_study`` and ``trained`` name it.
    """

    study: str
    row: str
    scale: str
    seed: int
    recipe: str
    recipe_version: int
    config: dict
    keep: tuple[str, ...]
    needs: Experiment | None

    @property
    def name(self) -> str:
        """``study/row-scale-seedK``."""
        return f"{self.study}/{self.row}-{self.scale}-seed{self.seed}"


class Study(NamedTuple):
    """A study: what it is about, and every run of it, in the order of the file."""

    name: str
    title: str
    experiments: tuple[Experiment, ...]

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the rows, in the order of the file."""
        return tuple(dict.fromkeys(experiment.row for experiment in self.experiments))


class State(NamedTuple):
    """Where a run stands: ``missing``, ``partial``, ``done``, ``stale`` or ``failed``.

    :ivar word: one of these.
    :ivar record: the result that is on disk, if there is one that can be read.
    :ivar damage: what is wrong with the one that cannot.
    """

    word: str
    record: dict | None
    damage: str | None = None


class Places(NamedTuple):
    """Folders of results, of committed weights, and of checkpoints."""

    results: Path
    models: Path
    checkpoints: Path

    @classmethod
    def below(cls, root: Path) -> Places:
        return cls(root / "data/results", root / "data/models", root / "checkpoints")

    @classmethod
    def of_the_project(cls) -> Places:
        return cls.below(data.data_folder().parent)

    def result(self, experiment: Experiment) -> Path:
        return results.result_path(self.results, *experiment[:4])

    def work(self, experiment: Experiment) -> Path:
        """Checkpoints of other options, or of an older recipe, are never gone on from."""
        digest = results.config_hash(
            {"config": experiment.config, "recipe_version": experiment.recipe_version}
            | _builds_on(experiment)
        )
        return self.checkpoints / f"{experiment.name}-{digest[:8]}"

    def joint_work(self, experiments: Sequence[Experiment]) -> Path:
        """The same for runs that train together; they differ in the seed alone."""
        own, seeds = self.work(experiments[0]), "+".join(str(e.seed) for e in experiments)
        return own.with_name(own.name.replace(f"-seed{experiments[0].seed}-", f"-seeds{seeds}-"))

    def weights(self, experiment: Experiment, role: str) -> Path:
        """Weights stay with the checkpoints, for rows that build on them."""
        return self.work(experiment) / f"{role}.safetensors"

    def kept_weights(self, experiment: Experiment, role: str) -> Path:
        return self.models / f"{experiment.name}-{role}.safetensors"


def _builds_on(experiment: Experiment) -> dict:
    """The run whose weights this one takes, as a result states it; empty if there is none."""
    trained = experiment.needs
    if trained is None:
        return {}
    facts = {
        "config_hash": results.config_hash(trained.config),
        "recipe_version": trained.recipe_version,
    }
    return {"builds_on": facts}


# --- the file of studies -------------------------------------------------------------------------


def load_studies(path: str | os.PathLike | None = None) -> dict[str, Study]:
    """Read and check a file of studies.

    :param path: YAML; by default ``workflow/experiments.yaml`` of the project.
    :return: the studies by name.
    :raises ExperimentError: with every fault: unknown keys, recipes, options or scales, options
        that are missing or out of range, each with the choices.

    >>> studies = load_studies()
    >>> studies["amc_table1"].rows[0]
    'vae'
    """
    if path is None:
        path = data.data_folder().parent / "workflow/experiments.yaml"
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        faults = list(_repeated_keys(yaml.compose(text)))
    except FileNotFoundError:
        raise ExperimentError(f"there is no file of studies {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict) or set(content) != {"studies"}:
        raise ExperimentError(f"{path} must hold one key, 'studies'")
    if not isinstance(content["studies"], dict):
        raise ExperimentError(f"{path}: studies must be a mapping; got {content['studies']!r}")
    studies = {name: _read_study(name, block, faults) for name, block in content["studies"].items()}
    if not faults:
        studies = {name: _with_needs(study, studies, faults) for name, study in studies.items()}
    if faults:
        faults = list(dict.fromkeys(faults))  # those of a row, once and not for each scale
        raise ExperimentError(f"{path} cannot be used:\n  " + "\n  ".join(faults))
    return studies


def _repeated_keys(node: yaml.Node | None) -> Iterator[str]:
    """Keys that stand twice in one mapping; YAML would silently forget the first."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                yield f"line {key.start_mark.line + 1}: {key.value!r} is there already"
            if isinstance(key.value, str):
                seen.add(key.value)
            yield from _repeated_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _repeated_keys(item)


_STUDY_KEYS = {"title", "recipe", "recipe_version", "seeds", "common", "scales", "rows"}
_ROW_KEYS = {"scales", "seeds", "keep"}


def _read_study(name: str, block: object, faults: list[str]) -> Study:
    where = f"studies.{name}"
    empty = Study(name, "", ())
    if not isinstance(block, dict) or set(block) != _STUDY_KEYS:
        found = ", ".join(map(str, block)) if isinstance(block, dict) else repr(block)
        faults.append(f"{where}: must have the keys {', '.join(sorted(_STUDY_KEYS))}; got {found}")
        return empty
    blocks = {key: block[key] for key in ("common", "scales", "rows")}
    if isinstance(block["scales"], dict):
        blocks |= {f"scales.{scale}": options for scale, options in block["scales"].items()}
    for key, value in blocks.items():
        if not isinstance(value, dict):
            faults.append(f"{where}.{key}: must be a mapping; got {value!r}")
            return empty
    if block["recipe"] not in list(RECIPES):
        faults.append(f"{where}.recipe: must be one of {', '.join(RECIPES)}; got {block['recipe']}")
        return empty
    problem = checks.integer(1)(block["recipe_version"])
    if problem:
        faults.append(f"{where}.recipe_version: must be {problem}; got {block['recipe_version']!r}")
    unknown = [str(scale) for scale in block["scales"] if scale not in SCALES]
    if unknown:
        faults.append(f"{where}.scales: must be of {', '.join(SCALES)}; got {', '.join(unknown)}")
        return empty
    experiments = []
    for row, settings in block["rows"].items():
        settings = {} if settings is None else settings
        if not isinstance(settings, dict):
            faults.append(f"{where}.rows.{row}: must be a mapping of options; got {settings!r}")
            continue
        experiments += _read_row(name, block, row, settings, faults)
    return Study(name, block["title"], tuple(experiments))


def _read_row(
    study: str, block: dict, row: str, settings: dict, faults: list[str]
) -> list[Experiment]:
    """The runs of one row: each of its scales with each of its seeds."""
    where = f"studies.{study}.rows.{row}"
    scales = settings.get("scales", list(block["scales"]))
    seeds = settings.get("seeds", block["seeds"])
    keep = settings.get("keep", [])
    own = {key: value for key, value in settings.items() if key not in _ROW_KEYS}
    found = len(faults)
    try:
        results.result_path("", study, row, "laptop", 0)
    except results.ResultError as error:
        faults.append(f"{where}: {error}")
    if not _is_list_of(scales, block["scales"]):
        names = ", ".join(block["scales"])
        faults.append(
            f"{where}.scales: must be a list of those of the study, {names}; got {scales!r}"
        )
    if not isinstance(seeds, list) or any(map(checks.integer(0), seeds)) or not seeds:
        faults.append(f"{where}: seeds must be a list of integers from 0; got {seeds!r}")
    elif len(set(seeds)) < len(seeds):
        faults.append(f"{where}: seeds must differ; got {seeds!r}")
    if not _is_list_of(keep, ROLES):
        faults.append(f"{where}.keep: must be a list of {', '.join(ROLES)}; got {keep!r}")
    if len(faults) > found:
        return []
    recipe = RECIPES[block["recipe"]]
    options = recipe.options
    experiments = []
    for scale in scales:
        found = len(faults)
        config = block["common"] | block["scales"][scale] | own
        faults += [
            f"{where}: option {key!r} is unknown. Options: {', '.join(options)}"
            for key in config.keys() - options
        ]
        for key, specification in options.items():
            if key not in config:
                faults.append(f"{where}: option {key!r} is missing at scale {scale}")
            elif problem := specification(config[key]):
                faults.append(f"{where}: {key} = {config[key]!r} must be {problem}")
        if len(faults) == found and (problem := recipe.conflict(config)):
            faults.append(f"{where}: {problem}")
        for seed in seeds:
            experiments.append(
                Experiment(
                    study,
                    row,
                    scale,
                    seed,
                    block["recipe"],
                    block["recipe_version"],
                    config,
                    tuple(keep),
                    None,
                )
            )
    return experiments


def _is_list_of(values: object, names: Iterable[str]) -> bool:
    return isinstance(values, list) and all(value in list(names) for value in values)


def _with_needs(study: Study, studies: Mapping[str, Study], faults: list[str]) -> Study:
    """The study, each of its runs tied to the run whose weights it builds on."""
    experiments = []
    for experiment in study.experiments:
        wanted = (
            experiment.config.get("trained_study"),
            experiment.config.get("trained"),
            experiment.scale,
            experiment.seed,
        )
        trained = None
        if wanted[0] is not None:
            others = studies[wanted[0]].experiments if wanted[0] in studies else ()
            trained = next((other for other in others if other[:4] == wanted), None)
            if trained is None:
                study_name, row, scale, seed = wanted
                faults.append(
                    f"{experiment.name}: there is no run {study_name}/{row}-{scale}-seed{seed} to "
                    f"build on. Rows of {study_name}: "
                    + (", ".join(dict.fromkeys(other.row for other in others)) or "none")
                )
        experiments.append(experiment._replace(needs=trained))
    return study._replace(experiments=tuple(experiments))


def select(
    studies: Mapping[str, Study],
    study: str | None = None,
    row: str | None = None,
    *,
    scale: str | None = None,
    seed: int | None = None,
) -> list[Experiment]:
    """The runs that fit, in the order of the file but seed by seed.

    :raises ExperimentError: for a name that does not exist, or if nothing fits; with the choices.

    >>> [run.name for run in select(load_studies(), "vae_recap", "vae", scale="laptop", seed=0)]
    ['vae_recap/vae-laptop-seed0']
    """
    if study is not None and study not in studies:
        raise ExperimentError(f"unknown study {study!r}; studies: {', '.join(studies)}")
    chosen = list(studies.values()) if study is None else [studies[study]]
    rows = [name for one in chosen for name in one.rows]
    if row is not None and row not in rows:
        of_study = "" if study is None else f" of {study}"
        raise ExperimentError(f"unknown row {row!r}{of_study}; rows: {', '.join(rows)}")
    if scale is not None and scale not in SCALES:
        raise ExperimentError(f"unknown scale {scale!r}; scales: {', '.join(SCALES)}")
    found = [
        experiment
        for one in chosen
        for experiment in one.experiments
        if (row in (None, experiment.row) and scale in (None, experiment.scale))
    ]
    if seed is not None and all(seed != experiment.seed for experiment in found):
        seeds = sorted({experiment.seed for experiment in found})
        raise ExperimentError(
            f"there is no run with seed {seed}; seeds: {', '.join(map(str, seeds)) or 'none'}"
            + ("" if found else f" ({row or study} has no runs at scale {scale})")
        )
    found = [experiment for experiment in found if seed in (None, experiment.seed)]
    if not found:
        raise ExperimentError(f"{row or study} has no runs at scale {scale}")
    order = {name: index for index, name in enumerate(studies)}
    return sorted(found, key=lambda e: (order[e.study], e.scale != "laptop", e.seed))


# --- one run -------------------------------------------------------------------------------------


def state_of(experiment: Experiment, places: Places | None = None) -> State:
    """Where a run stands, from what is on disk.

    A result that is damaged, for instance because the process was killed between writing its two
    files, has to be made again, like one that is stale.
    """
    places = places or Places.of_the_project()
    path, record, damage = places.result(experiment), None, None
    if path.exists():
        try:
            record = results.load_result(path).record
        except results.ResultError as error:
            damage = " ".join(str(error).split())
    if record is not None:
        builds_on = _builds_on(experiment)
        is_current = (
            record["config_hash"] == results.config_hash(experiment.config)
            and record["recipe_version"] == experiment.recipe_version
            # Results of before this was recorded say nothing about it.
            and record.get("details", {}).get("builds_on") in (None, builds_on.get("builds_on"))
        )
        if is_current and record["status"] in ("done", "failed"):
            return State(record["status"], record)
    folders = [places.work(experiment), *_joint_folders(experiment, places)]
    if any(map(_has_checkpoints, folders)):
        return State("partial", record, damage)
    return State("missing" if record is None and damage is None else "stale", record, damage)


def _joint_folders(experiment: Experiment, places: Places) -> list[Path]:
    """Folders of joint trainings that this run takes part in."""
    work, seed = places.work(experiment), str(experiment.seed)
    found = work.parent.glob(work.name.replace(f"-seed{seed}-", "-seeds*-"))
    return [path for path in found if seed in path.name.split("-")[-2][len("seeds") :].split("+")]


def _has_checkpoints(folder: Path) -> bool:
    """Whether there is something to go on from; a kill can leave only the one before the last."""
    return any(path.suffix in (".checkpoint", ".previous") for path in folder.glob("*.checkpoint*"))


def run_experiment(
    experiment: Experiment,
    *,
    device: str = "cpu",
    stop_at: float = float("inf"),
    places: Places | None = None,
    again: bool = False,
    progress: bool = False,
) -> State:
    """Train and evaluate one run, or go on with it, and write its result.

    :param device: where to compute.
    :param stop_at: value of ``time.monotonic()`` at which to stop at a checkpoint.
    :param places: folders; those of the project by default.
    :param again: make a run that is done once more, for instance for its weights.
    :param progress: show progress bars.
    :return: its state afterwards: done or failed.
    :raises OutOfTimeError: when ``stop_at`` has come; what is done so far is kept.
    :raises CheckpointLockedError: when another process is at work on this run.
    :raises ExperimentError: when the device is none, the weights it builds on are not there, or it
        was trained together with other seeds, wholly or in part, and would now be trained alone.
    :raises OSError: when results cannot be written; found out before any work starts.
    """
    places = places or Places.of_the_project()
    _check_device(device)
    state = state_of(experiment, places)
    folder = places.work(experiment)
    if state.word == "done" and not again and not any(folder.glob("*.checkpoint*")):
        return state
    _check_places(experiment, places)
    folder.mkdir(parents=True, exist_ok=True)
    with checkpoint_lock(folder / "run"):
        state = state_of(experiment, places)  # another process may have ended it just now
        if state.word == "done" and not again:
            _tidy(experiment, places)  # it was killed before it could
            return state
        _check_may_go_alone(experiment, places, state)
        started, cpu_started = time.time(), time.process_time()
        facts = results.provenance(device, started=started)  # of the code as it was read
        is_resumed = _has_checkpoints(folder)
        run = _run_of(experiment, places, device, stop_at, progress)
        record = {
            **dict(zip(("study", "row", "scale", "seed"), experiment[:4], strict=True)),
            "config": experiment.config,
            "config_hash": results.config_hash(experiment.config),
            "recipe_version": experiment.recipe_version,
        }
        try:
            with _seeded(experiment.seed, run.device):
                outcome = RECIPES[experiment.recipe].function(run)
        except FloatingPointError as error:
            record |= {"status": "failed", "reason": str(error), "metrics": {}}
            record["provenance"] = facts | _wall_time(folder, started)
            if state.word == "done":  # made once more: what was found before is still true
                record["reason"] += "; the result of before is kept"
                return State("failed", record)
            record["details"] = _replaced(state.record) | _builds_on(experiment)
            results.save_result(places.results, record)
            return state_of(experiment, places)
        facts |= _wall_time(folder, started)
        cpu_seconds = None if is_resumed else round(time.process_time() - cpu_started, 1)
        _finish(experiment, places, record, outcome, facts, cpu_seconds)
        _tidy(experiment, places)
    return state_of(experiment, places)


def train_together(
    experiments: Sequence[Experiment],
    *,
    device: str = "cpu",
    stop_at: float = float("inf"),
    places: Places | None = None,
    progress: bool = False,
) -> list[Experiment]:
    """Train the seeds of one row as one model, which a graphics card does in less time.

    Afterwards each is ``partial``, and :func:`run_experiment` evaluates it. Its result names the
    seeds it was trained with: alone it would have had the same options but other random numbers.
    Seeds that have begun to train alone, or are trained already, are left out.

    :param experiments: runs that differ in the seed alone; other arguments and errors as in
        :func:`run_experiment`.
    :return: those that were trained; none where fewer than two are left.
    :raises ExperimentError: for runs that differ in more, a recipe that trains one seed at a time,
        or options that it does not train together.
    :raises NonFiniteError: when the loss of a seed, and with it their mean, is no longer a number.
    """
    places = places or Places.of_the_project()
    _check_device(device)
    train = RECIPES[experiments[0].recipe].train_together
    if train is None:
        raise ExperimentError(
            f"the recipe {experiments[0].recipe!r} trains one seed at a time; leave out --together"
        )
    if len({experiment._replace(seed=0).name for experiment in experiments}) > 1:
        names = ", ".join(experiment.name for experiment in experiments)
        raise ExperimentError(f"runs that train together differ in the seed alone; got {names}")
    chosen = _untrained(experiments, places)
    if len(chosen) < 2:
        return []
    for experiment in chosen:
        _check_places(experiment, places)
    states = [state_of(experiment, places).word for experiment in chosen]
    runs = [_run_of(experiment, places, device, stop_at, progress) for experiment in chosen]
    joint = runs[0]._replace(folder=places.joint_work(chosen))
    with contextlib.ExitStack() as stack:
        for folder in (joint.folder, *(run.folder for run in runs)):
            stack.enter_context(checkpoint_lock(folder / "run"))
        now = [state_of(experiment, places).word for experiment in chosen]
        if now != states or _untrained(experiments, places) != chosen:
            return []  # another process has just done it
        try:
            with _seeded(joint.seed, joint.device):
                train(runs, joint)
        except ValueError as error:
            raise ExperimentError(f"{joint.study}/{joint.row}: {error}") from error
        shutil.rmtree(joint.folder, ignore_errors=True)
    return chosen


def _untrained(experiments: Sequence[Experiment], places: Places) -> list[Experiment]:
    """Those that have neither begun to train alone nor been left networks by a joint training."""
    chosen = [e for e in experiments if not _exists(places.work(e) / "training.checkpoint")]
    if chosen and _has_checkpoints(places.joint_work(chosen)):
        return chosen  # to go on, even where it was killed while it handed out the networks
    return [e for e in chosen if not _is_left_networks(e, places)]


def _is_left_networks(experiment: Experiment, places: Places) -> bool:
    return _exists(places.work(experiment) / TOGETHER)


def _exists(checkpoint: Path) -> bool:
    return checkpoint.exists() or checkpoint.with_name(f"{checkpoint.name}.previous").exists()


def _check_may_go_alone(experiment: Experiment, places: Places, state: State) -> None:
    """Refuse to throw away, or to replace by other numbers, what was trained with other seeds."""
    if _has_checkpoints(places.work(experiment)):
        return
    begun = [f for f in _joint_folders(experiment, places) if _has_checkpoints(f)]
    if begun:
        raise ExperimentError(
            f"{experiment.name} is half trained with other seeds: go on with --together, or remove "
            f"{begun[0]} to train it alone"
        )
    seeds = results.trained_with(state.record or {})
    if state.word == "done" and seeds:
        raise ExperimentError(
            f"{experiment.name} was trained with seeds {', '.join(map(str, seeds))}, and alone "
            "would get other numbers: make them again with --together --again, or remove its result"
        )


def _check_device(device: str) -> None:
    problem = checks.device()(device)
    if problem:
        raise ExperimentError(f"device {device!r}: must be {problem}")


def _run_of(
    experiment: Experiment, places: Places, device: str, stop_at: float, progress: bool
) -> Run:
    return Run(
        *experiment[:4],
        config=experiment.config,
        device=torch.device(device),
        folder=places.work(experiment),
        stop_at=stop_at,
        weights_of=partial(_weights_of, experiment, places),
        progress=progress,
    )


def _finish(
    experiment: Experiment,
    places: Places,
    record: dict,
    outcome: Outcome,
    facts: dict,
    cpu_seconds: float | None,
) -> None:
    """Write the weights, then the result that vouches for them."""
    for role, (network, architecture) in outcome.networks.items():
        path = places.weights(experiment, role)
        details = {**record, "provenance": facts}
        results.save_weights(path, network, architecture, details, dtype=torch.float16)
        if role in experiment.keep and experiment.seed == 0:
            data.atomic_write(places.kept_weights(experiment, role), path.read_bytes())
    per_image = {name: values.cpu().float() for name, values in outcome.per_image.items()}
    record |= {
        "status": "done",
        "metrics": results.summarise(per_image),
        "provenance": facts,
        "details": {**outcome.details, "cpu_seconds": cpu_seconds, **_builds_on(experiment)},
    }
    results.save_result(places.results, record, per_image)


def _tidy(experiment: Experiment, places: Places) -> None:
    """Remove the checkpoints, and what a process that was killed while it wrote has left."""
    folder, stem = places.work(experiment), places.result(experiment).stem
    leftovers = [*folder.glob("*.checkpoint*"), *folder.glob(".*.tmp")]
    for place in (places.results, places.models):
        for pattern in (f".{stem}.*.tmp", f"..{stem}.*.tmp", f".{stem}-*.tmp"):
            leftovers += (place / experiment.study).glob(pattern)
    for path in sorted(leftovers, key=lambda path: ".part" in path.name):  # what lists them first
        path.unlink(missing_ok=True)
    for joint in _joint_folders(experiment, places):  # never gone on from without this seed
        shutil.rmtree(joint, ignore_errors=True)


def _replaced(before: dict | None) -> dict:
    """What the result of a failed run takes the place of, so that no number is lost unseen."""
    if before is None:
        return {}
    if before["status"] == "failed":
        return {k: v for k, v in before.get("details", {}).items() if k == "replaced"}
    facts = ("config_hash", "recipe_version", "metrics", "provenance")
    return {"replaced": {key: before[key] for key in facts}}


def _wall_time(folder: Path, started: float) -> dict[str, float]:
    """The wall time of a run, over its stages and over interrupted parts, in seconds."""
    saved = [read_checkpoint(path) for path in sorted(folder.glob("*.checkpoint"))]
    seconds = sum(tree["seconds"] for tree in saved if tree is not None)
    return {"wall_seconds": round(max(seconds, time.time() - started), 3)}


def find_weights(experiment: Experiment, role: str, places: Places | None = None) -> Path | None:
    """Weights of a run: those made here, or those that are committed; ``None`` if neither is there.

    :param role: ``"decoder"`` or ``"encoder"``.
    """
    places = places or Places.of_the_project()
    candidates = [places.weights(experiment, role)]
    if experiment.seed == 0 and state_of(experiment, places).word == "done":
        candidates.append(places.kept_weights(experiment, role))
    return next((path for path in candidates if path.is_file()), None)


def _weights_of(experiment: Experiment, places: Places, role: str) -> Path:
    """Weights of the run that this one builds on: those made here, or those that are committed."""
    trained = experiment.needs
    if trained is None:
        raise ExperimentError(f"{experiment.name} builds on no other run")
    path = find_weights(trained, role, places)
    if path is not None:
        return path
    state = state_of(trained, places)
    again = " --again" if state.word == "done" else ""
    is_joint = again and results.trained_with(state.record)
    seed = " --together" if is_joint else f" --seed {trained.seed}"
    raise ExperimentError(
        f"{experiment.name} needs the weights of {trained.name}, which are not here. Make them:\n"
        f"  python -m amortised.experiments run {trained.study} {trained.row}{seed}"
        f" --scale {trained.scale}{again}"
    )


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The global streams seeded meanwhile, and the device current: graphs are captured there."""
    is_cuda = device.type == "cuda"
    with (
        torch.cuda.device(device) if is_cuda else contextlib.nullcontext(),
        torch.random.fork_rng(devices=[device] if is_cuda else []),
    ):
        torch.manual_seed(seed)
        yield


def _check_places(experiment: Experiment, places: Places) -> None:
    _check_writable(places.results / experiment.study)
    if experiment.keep and experiment.seed == 0:
        _check_writable(places.models / experiment.study)


def _check_writable(folder: Path) -> None:
    """Fail now, not after hours of work, where a result could not be written."""
    probe = folder / ".writable"
    try:
        data.atomic_write(probe, b"")
        probe.unlink(missing_ok=True)  # another run may be looking at the same moment
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write to {folder} ({error.strerror}); nothing was started"
        ) from None


# --- command line --------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """``list`` and ``run``; see the head of this module."""
    options = _parser().parse_args(arguments)
    try:
        root = data.data_folder().parent if options.root is None else options.root
        options.places = Places.below(root)
        studies = load_studies(options.file)
        if options.command == "list":
            return _list(studies, options)
        return _run(studies, options)
    except CheckpointLockedError as error:
        return _stop(f"another process is at work on this run: {error}", EXIT_USAGE)
    except (data.DataError, OSError, ValueError) as error:
        return _stop(str(error), EXIT_USAGE)
    except KeyboardInterrupt:
        return _stop("stopped; the same command goes on from the last checkpoint", 130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m amortised.experiments",
        description="Run the studies of the book and keep what they find in data/results.",
    )
    parser.add_argument("--file", type=Path, help="studies; default: workflow/experiments.yaml")
    parser.add_argument("--root", type=Path, help="folder of data/ and checkpoints/")
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("list", help="rows with their state and recorded cost")
    shown.add_argument("study", nargs="?")
    shown.add_argument("row", nargs="?")
    shown.add_argument("--scale", help="laptop or full; default: both")
    shown.add_argument("--seed", type=int)
    run = commands.add_parser("run", help="make the results that are missing or stale")
    run.add_argument("study")
    run.add_argument("row", nargs="?", help="default: all rows")
    run.add_argument("--scale", default="laptop", help="laptop (default) or full")
    run.add_argument("--seed", type=int, help="default: all seeds")
    run.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:N")
    run.add_argument("--again", action="store_true", help="make runs that are done once more")
    run.add_argument(
        "--together", action="store_true", help="train the seeds of a row as one model (GPU)"
    )
    run.add_argument("--threads", type=int, help="processor threads; default: PyTorch's")
    run.add_argument(
        "--max-minutes", type=float, help="stop at a checkpoint after this time, with exit code 3"
    )
    return parser


def _list(studies: Mapping[str, Study], options: argparse.Namespace) -> int:
    chosen = select(studies, options.study, options.row, scale=options.scale, seed=options.seed)
    width = max(len(experiment.name) for experiment in chosen)
    counts: dict[str, int] = {}
    for experiment in chosen:
        state = state_of(experiment, options.places)
        counts[state.word] = counts.get(state.word, 0) + 1
        facts = state.damage or _cost(state.record)
        print(f"{experiment.name:<{width}}  {state.word:<8} {facts}".rstrip())
    print(", ".join(f"{count} {word}" for word, count in sorted(counts.items())))
    return 0


def _cost(record: dict | None) -> str:
    if record is None:
        return ""
    facts = record["provenance"]
    cost = f"{facts['wall_seconds'] / 60:7.1f} min on {facts['device']['name']}"
    if "threads" in facts["device"]:
        cost += f", {facts['device']['threads']} thread(s)"
    return cost + (f": {record['reason']}" if record["status"] == "failed" else "")


def _run(studies: Mapping[str, Study], options: argparse.Namespace) -> int:
    chosen = select(studies, options.study, options.row, scale=options.scale, seed=options.seed)
    if options.max_minutes is not None and not options.max_minutes > 0:
        raise ExperimentError(f"--max-minutes {options.max_minutes}: must be greater than 0")
    if options.threads is not None:
        if options.threads < 1:
            raise ExperimentError(f"--threads {options.threads}: must be at least 1")
        torch.set_num_threads(options.threads)
    minutes = float("inf") if options.max_minutes is None else options.max_minutes
    settings = {
        "device": options.device,
        "stop_at": time.monotonic() + 60.0 * minutes,
        "places": options.places,
        "progress": True,
    }
    if options.together:
        return _run_together(chosen, options, settings)
    return _run_each(chosen, options, settings)


def _run_together(chosen: list[Experiment], options: argparse.Namespace, settings: dict) -> int:
    """Each row in turn: its seeds trained as one model, then evaluated one by one."""
    code, places = 0, options.places
    for row in dict.fromkeys(experiment[:2] for experiment in chosen):
        seeds = [experiment for experiment in chosen if experiment[:2] == row]
        if options.again and any(_is_left_networks(e, places) for e in seeds):
            # An earlier --again was stopped: the others have been made again since.
            seeds = [e for e in seeds if _is_left_networks(e, places)]
        wanted = [e for e in seeds if options.again or state_of(e, places).word != "done"]
        training = _untrained(wanted, places)
        names = ", ".join(experiment.name for experiment in training)
        try:
            if wanted and train_together(wanted, **settings):
                print(f"{names}: trained together", flush=True)
        except OutOfTimeError as error:
            return _out_of_time(names, error)
        except FloatingPointError as error:
            folder = places.joint_work(training)
            _stop(f"{names}: {error}; remove {folder} to train them one by one", EXIT_FAILED)
            code, seeds = EXIT_FAILED, [e for e in seeds if e not in training]
        code = _run_each(seeds, options, settings) or code
        if code == EXIT_OUT_OF_TIME:
            return code
    return code


def _run_each(chosen: list[Experiment], options: argparse.Namespace, settings: dict) -> int:
    failed = []
    for experiment in chosen:
        try:
            before = state_of(experiment, options.places)
            if before.word != "done" or options.again:
                note = f" ({before.damage})" if before.damage else ""
                print(f"{experiment.name}: {before.word}, running{note}", flush=True)
            state = run_experiment(experiment, again=options.again, **settings)
        except OutOfTimeError as error:
            return _out_of_time(experiment.name, error)
        print(f"{experiment.name}: {state.word}, {_cost(state.record).strip()}", flush=True)
        if state.word == "failed":
            failed.append(experiment.name)
    return _stop(f"failed: {', '.join(failed)}", EXIT_FAILED) if failed else 0


def _out_of_time(names: str, error: OutOfTimeError) -> int:
    return _stop(f"{names}: {error}; the same command goes on from here", EXIT_OUT_OF_TIME)


def _stop(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
