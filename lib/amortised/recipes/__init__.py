r"""Recipes: how a row of a study is trained and evaluated, a module for each kind of study.

A recipe is two functions. ``build`` makes a :class:`.common.Training`: the networks of a row, their
optimisers, and the step that updates them. Runs, chapters and benchmarks all get their steps here.
``evaluate`` gives the values per image of what was trained. :mod:`amortised.runs` does the rest: it
loops, keeps finished stages, and writes weights and results. A new kind of study is a ``build``
(or an ``evaluate``), a model of its options, and a block in ``workflow/experiments.yaml``. It need
not be in this package: a :class:`.common.Recipe` of any module serves, by its dotted name.
"""

from .. import evaluation
from .amortised_mcmc import (
    KERNELS,
    RULES,
    amc_training,
    distillation_training,
    evaluate_distillation,
    evaluate_imputation,
    evaluate_teacher,
    teacher_training,
)
from .autoencoders import evaluate_decoder, evaluate_objective, vae_training
from .chain_bounds import (
    BRIDGES,
    MAPS,
    build_path,
    evaluate_path,
    evaluate_ring,
    evaluate_target,
    path_training,
)  # fmt: skip
from .common import (
    LATENT_DIM,
    VALIDATION_IMAGES,
    Images,
    Outcome,
    Recipe,
    Run,
    Training,
    architectures,
    images_of,
)
from .iterative_inference import (
    OBSERVATIONS,
    evaluate_iterative,
    held_out_examples,
    iterative_architectures,
    iterative_training,
    training_examples,
)

#: What a study of ``workflow/experiments.yaml`` can name as its ``recipe``.
RECIPES: dict[str, Recipe] = {
    "amc": Recipe(amc_training, evaluate_decoder),
    "distillation": Recipe(distillation_training, evaluate_distillation),
    "vae": Recipe(vae_training, evaluate_decoder),
    "objective": Recipe(vae_training, evaluate_objective),
    "teacher": Recipe(teacher_training, evaluate_teacher),
    "path": Recipe(path_training, evaluate_path),
    "target": Recipe(None, evaluate_target),
    "ring": Recipe(None, evaluate_ring),
    "imputation": Recipe(None, evaluate_imputation),
    "iterative": Recipe(iterative_training, evaluate_iterative),
}


def recipe_named(name: str) -> Recipe:
    """A recipe of the book by its name, or a reader's own, ``"module.NAME"``.

    :raises ValueError: when there is none, with the choices.
    """
    return evaluation.named(name, Recipe, RECIPES)
