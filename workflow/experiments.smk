"""The graph of the studies: a run is trained, then evaluated; `make laptop`, `make full`.

The outputs are the runs' own files, whose folders `python -m amortised.experiments prepare` has
made; what is recorded already is not asked for. A job that failed or was killed goes on from the
stages that it finished, which Snakemake does not know. A run that diverges is finished, too: its
result says so. Only a profile for machines that may be lost tries again. See amortised.runs.
"""

import json

DEVICE = shlex.quote(config.get("device") or "cpu")
WORK = "{PYTHON} -m amortised.runs runs/{wildcards.run} --threads {threads} --device {DEVICE}"


def builds_on(wildcards):
    """What is evaluated: the run's own training, or that of another run."""
    with open(f"runs/{wildcards.run}/run.json", encoding="utf-8") as file:
        other = json.load(file)["builds_on"]
    return f"runs/{other['folder'] if other else wildcards.run}/training.json"


wildcard_constraints:
    run="[^/]+/[^/]+",


rule training:
    output:
        "runs/{run}/training.json",
    threads: 1
    resources:
        gpu=1 if DEVICE.startswith("cuda") else 0,
    shell:
        f"{WORK} --training-only"


rule result:
    input:
        builds_on,
    output:
        "runs/{run}/result.json",
    threads: 1
    resources:
        gpu=1 if DEVICE.startswith("cuda") else 0,
    shell:
        WORK
