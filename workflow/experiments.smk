"""The graph of the studies: each missing or stale result one job, after the weights it builds on.

Included by the Snakefile when the configuration names a scale: `make laptop`, `make full`. What is
done, stale or missing is for amortised.experiments to say; file times mean nothing here. A job's
output is a marker beside its checkpoints, never the result itself: Snakemake removes the outputs of
a job before it runs, and a result must stay until its successor is complete. For the same reason no
checkpoint is an output, so that a job that failed or was killed goes on from its own.

With `together` the seeds of a row that can be trained as one model are one job, as are those that
were trained so before and have to be made again for their weights.
"""

import os

from amortised import experiments as engine

SCALE = config["scale"]
DEVICE = config.get("device") or ("cuda" if SCALE == "full" else "cpu")
STUDY, ROW, SEED, FILE, ROOT = (
    None if config.get(name, "") == "" else config[name]
    for name in ("study", "row", "seed", "file", "root")
)
TOGETHER = bool(config.get("together")) and SEED is None
PLACES = engine.Places.below(Path(ROOT)) if ROOT else engine.Places.of_the_project()
try:
    STUDIES = engine.load_studies(FILE)
    CHOSEN = engine.select(STUDIES, STUDY, ROW, scale=SCALE, seed=SEED)
except ValueError as error:
    sys.exit(str(error))  # a WorkflowError would say nothing under `quiet`


def job_of(experiment):
    """The runs that are made in one job with this one, itself included."""
    seeds = engine.select(STUDIES, experiment.study, experiment.row, scale=SCALE)
    record = engine.state_of(experiment, PLACES).record or {}
    was_together = engine.results.trained_with(record) == [other.seed for other in seeds]
    can_be = engine.RECIPES[experiment.recipe].train_together is not None
    return seeds if was_together or (TOGETHER and can_be) else [experiment]


def marker(experiment):
    job = job_of(experiment)
    work = PLACES.work(experiment) if len(job) == 1 else PLACES.joint_work(job)
    return f"{os.path.relpath(work)}.done"


def is_ready(experiment):
    """Whether others can build on it now."""
    return all(engine.find_weights(experiment, role, PLACES) for role in engine.ROLES)


ALL = {marker(experiment): experiment for experiment in engine.select(STUDIES, scale=SCALE)}
JOBS, AGAIN = {}, set()
for experiment in CHOSEN:
    if engine.state_of(experiment, PLACES).word == "done":
        continue
    needed = experiment.needs
    if needed is not None:
        is_done = engine.state_of(needed, PLACES).word == "done"
        if not is_done or not is_ready(needed):
            JOBS[marker(needed)] = needed
        if is_done and not is_ready(needed):  # its weights are elsewhere
            AGAIN.add(marker(needed))
    JOBS[marker(experiment)] = experiment
for path in JOBS:  # of a result that has since been removed
    Path(path).unlink(missing_ok=True)


def chosen(wildcards):
    return ALL[f"{wildcards.work}.done"]


def builds_on(wildcards):
    needed = chosen(wildcards).needs
    return [marker(needed)] if needed is not None and marker(needed) in JOBS else []


def command(wildcards):
    experiment = chosen(wildcards)
    again = "--again" if marker(experiment) in AGAIN else ""
    seeds = "--together" if len(job_of(experiment)) > 1 else f"--seed {experiment.seed}"
    where = (f"--file {FILE}" if FILE else "", f"--root {ROOT}" if ROOT else "")
    return (
        f"{' '.join(where)} run {experiment.study} {experiment.row} --scale {experiment.scale}"
        f" {seeds} --device {DEVICE} {again}"
    )


rule experiments:
    input:
        list(JOBS),


rule experiment:
    input:
        builds_on,
    output:
        touch("{work}.done"),
    params:
        command=command,
    threads: 1
    retries: 2  # a job that was killed goes on from its last checkpoint
    resources:
        gpu=1 if DEVICE.startswith("cuda") else 0,
    shell:
        "{PYTHON} -m amortised.experiments {params.command} --threads {threads}"
