"""Studies whose runs take a second or two, and a folder for their runs, results and weights."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import yaml

from amortised import experiments, results

OPTIONS = {"training_images": 100, "epochs": 4, "batch_size": 20, "num_student_samples": 1}
OPTIONS |= {"learning_rate": 0.001, "game_learning_rate": 0.001, "num_critic_steps": 1}
OPTIONS |= {"method": "vae", "encoder": "gaussian", "kernel": "none", "rule": "none"}
OPTIONS |= {"num_steps": 0, "step_size": 0.0, "num_leapfrog_steps": 1, "chain_dtype": "float32"}
OPTIONS |= {"images": 4, "num_samples": 5, "proposal_epochs": 1, "simulated_pairs": 3}
OPTIONS |= {"num_chains": 2, "pilot_chains": 1, "num_temperatures": 3, "num_leapfrog": 1}
OPTIONS |= {"evaluation_dtype": "float32"}
IMPUTATION = {"trained_study": "small", "step_size": 0.1, "num_leapfrog": 1, "images": 2}
IMPUTATION |= {"num_chains": 1, "iterations": 1, "num_temperatures": 2, "reference_steps": 1}
CHAIN = {
    "kernel": "langevin",
    "num_steps": 2,
    "step_size": 0.02,
    "seeds": [0],
    "scales": ["laptop"],
}
STUDIES = {
    "small": {
        "title": "a small study",
        "recipe": "amc",
        "recipe_version": 1,
        "seeds": [0, 1, 2],
        "common": OPTIONS,
        "scales": {"laptop": {}, "full": {"epochs": 5}},
        "rows": {
            "vae": {"keep": ["decoder", "encoder"]},
            "hot": {"learning_rate": 1e6, "epochs": 1, "keep": ["decoder"], "scales": ["laptop"]},
            "wild": CHAIN | {"method": "mcmc_vi", "num_steps": 5, "step_size": 1e9},
            "amc": CHAIN | {"method": "amc", "encoder": "cnn_g", "rule": "gan"},
            "persistent": CHAIN | {"method": "persistent", "encoder": "none"},
        },
    },
    "filled": {
        "title": "imputation by its encoders",
        "recipe": "imputation",
        "recipe_version": 1,
        "seeds": [0, 1],
        "common": IMPUTATION,
        "scales": {"laptop": {}},
        "rows": {"vae": {"trained": "vae"}},
    },
}
NUM_STEPS, INTERVAL = 20, 1  # of a training, and between its checkpoints
KILLS, SEED = Counter(), 0  # processes that were killed, by signal and by kind; of their moments


def changed(changes: dict | None = None) -> dict:
    """The studies with values replaced by path; None removes one."""
    studies = copy.deepcopy(STUDIES)
    for path, value in (changes or {}).items():
        *folders, last = path.split("/")
        block = studies
        for folder in folders:
            block = block[folder]
        if value is None:
            del block[last]
        else:
            block[last] = value
    return {"studies": studies}


class Root(NamedTuple):
    """A folder with a file of studies, their runs, and what is recorded of them."""

    folder: Path

    def write(self, changes: dict | None = None) -> Root:
        self.folder.mkdir(exist_ok=True)
        self.file.write_text(yaml.safe_dump(changed(changes), sort_keys=False))
        return self

    def copy(self, folder: Path, changes: dict | None = None) -> Root:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Root(folder).write(changes)

    @property
    def file(self) -> Path:
        return self.folder / "studies.yaml"

    def experiments(self, study="small", row="vae", scale="laptop", seed=None):
        studies = experiments.load_studies(self.file)
        return experiments.select(studies, study, row, scale=scale, seed=seed)

    def main(self, *command: str) -> int:
        """``python -m amortised.experiments``, in this process."""
        return experiments.main(["--file", str(self.file), "--root", str(self.folder), *command])

    def state(self, study="small", row="vae", seed=0) -> experiments.State:
        return experiments.state_of(*self.experiments(study, row, seed=seed), self.folder)

    def run(self, study="small", row="vae", seed=0) -> Path:
        return experiments.run_folder(*self.experiments(study, row, seed=seed), self.folder)

    def prepared(self, study="small", row="vae", seed=0) -> Path:
        return experiments.prepare(*self.experiments(study, row, seed=seed), self.folder)

    def result_file(self, study="small", row="vae", seed=0) -> Path:
        return results.result_path(self.folder / "data/results", study, row, "laptop", seed)

    def result(self, **names) -> results.Result:
        return results.load_result(self.result_file(**names))
