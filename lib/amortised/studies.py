r"""The file of studies and the options of each recipe, as pydantic models.

A study of ``workflow/experiments.yaml`` has a recipe, options that all of its rows share
(``common``), options of each scale, and rows with their own; the later override the former. Every
option of the recipe must then be there, and nothing else: no default hides in the code. A row's
``scales``, ``seeds`` and ``keep`` are not options of the run; they say which runs there are, and
which networks of seed 0 go to ``data/models``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import yaml
from pydantic import AfterValidator, Field, NonNegativeInt, model_validator

from . import data
from .evaluation import named
from .iterative import INPUTS
from .models import BernoulliDecoder
from .recipes import BRIDGES, MAPS, RECIPES, RULES, VALIDATION_IMAGES, Images, Recipe, recipe_named
from .schemas import FormatError, Name, Seed, Sha256, Strict, validate
from .targets import TARGETS

#: ``laptop``: minutes to an hour on one core, three seeds. ``full``: on a GPU.
SCALES = ("laptop", "full")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1, le=10**7)]
Encoder = Literal["none", "gaussian", "cnn_g", "cnn_b"]
Dtype = Literal["float32", "bfloat16", "float16"]
RuleName = Literal[("none", *RULES)]
PathName = Literal[("hvae", "importance", *MAPS, *BRIDGES)]
TargetName = Literal[(*TARGETS, "digits", "inpainting")]


def _distinct(values: list) -> list:
    if len(set(values)) < len(values):
        raise ValueError(f"{values} holds a value twice")
    return values


def _name_of(kind: type, known: Mapping[str, object]) -> Any:
    """One of the names that are known, or the dotted name of a reader's own, which is imported."""
    return Annotated[str, AfterValidator(lambda name: named(name, kind, known) and name)]


RecipeName = _name_of(Recipe, RECIPES)
DecoderName, DatasetName = _name_of(BernoulliDecoder, {}), _name_of(Images, {})
InputNames = Annotated[list[Literal[INPUTS]], AfterValidator(_distinct)]


# --- options of the recipes ----------------------------------------------------------------------


class MinibatchOptions(Strict):
    """Options of every recipe that trains on minibatches of the training images."""

    training_images: Annotated[int, Field(ge=1, le=60_000)]
    epochs: PositiveInt
    batch_size: Annotated[int, Field(ge=1, le=60_000)]
    learning_rate: Positive

    @model_validator(mode="after")
    def _a_batch_fits(self) -> Self:
        if self.batch_size > self.training_images:
            raise ValueError(
                f"batch_size = {self.batch_size} is more than training_images = "
                f"{self.training_images}"
            )
        return self


class TrainingOptions(MinibatchOptions):
    """Options of training and of :func:`amortised.recipes.autoencoders.evaluate_decoder`."""

    #: Samples of the encoder for each image.
    num_student_samples: PositiveInt

    #: Test images of the evaluation; the following are its settings, too.
    images: Annotated[int, Field(ge=2, le=10_000)]
    num_chains: PositiveInt
    pilot_chains: PositiveInt
    num_temperatures: PositiveInt
    num_leapfrog: PositiveInt
    simulated_pairs: Annotated[int, Field(ge=2)]
    num_samples: PositiveInt
    proposal_epochs: PositiveInt
    evaluation_dtype: Dtype


class _DrawnImagesOptions(Strict):
    """Random images, the same in every run, and settings of their annealing."""

    images: Annotated[int, Field(ge=2, le=10_000)]
    image_seed: Seed
    num_chains: PositiveInt
    pilot_chains: PositiveInt
    num_temperatures: PositiveInt
    num_leapfrog: PositiveInt
    persistence: Annotated[float, Field(ge=0, lt=1)]
    simulated_pairs: Annotated[int, Field(ge=2)]


class EvidenceOptions(MinibatchOptions, _DrawnImagesOptions):
    """Options of :func:`amortised.recipes.common.drawn_evidence`."""

    #: A class of a reader's own, ``module.NAME``, made as ``NAME(latent_dim=32)``; or left out.
    decoder: DecoderName = ""
    #: A reader's own :class:`amortised.recipes.common.Images`, likewise; or left out, for MNIST.
    dataset: DatasetName = ""
    held_out: Literal["test", "validation"]
    """Which images the evaluation draws from; the following are its settings, too."""
    #: Samples of the Gaussian that is fitted to an image.
    num_samples: PositiveInt
    hais_images: NonNegativeInt

    @model_validator(mode="after")
    def _images_fit(self) -> Self:
        if self.hais_images > self.images:
            raise ValueError(
                f"hais_images = {self.hais_images} is more than images = {self.images}"
            )
        if self.held_out == "validation" and self.images > VALIDATION_IMAGES:
            raise ValueError(
                f"images = {self.images} is more than the {VALIDATION_IMAGES} validation images"
            )
        held_back = 60_000 - VALIDATION_IMAGES
        if self.held_out == "validation" and self.training_images > held_back:
            raise ValueError(
                f"training_images = {self.training_images} reaches into the validation images; "
                f"at most {held_back}"
            )
        return self


class _MethodOptions(MinibatchOptions):
    """Options of :func:`amortised.recipes.amortised_mcmc.amc_training`."""

    num_student_samples: PositiveInt
    method: Literal["vae", "mcmc_vi", "amc", "avb", "persistent", "short_run"]
    encoder: Encoder
    kernel: Literal["none", "langevin", "mala", "hmc"]
    rule: RuleName
    num_steps: Annotated[int, Field(ge=0)]
    step_size: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    num_leapfrog_steps: PositiveInt
    num_critic_steps: PositiveInt
    game_learning_rate: Positive
    chain_dtype: Dtype

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        alone = self.method in ("persistent", "short_run")
        has_chain = self.method in ("mcmc_vi", "amc") or alone
        needs_density = self.method in ("vae", "mcmc_vi") or self.rule == "inclusive_kl"
        fits = {
            "encoder": (self.encoder == "none") == alone
            and (self.encoder == "gaussian" or not needs_density),
            "kernel": has_chain == (self.kernel != "none"),
            "num_steps": has_chain == (self.num_steps > 0),
            "step_size": has_chain == (self.step_size > 0),
            "rule": (self.method == "amc") == (self.rule != "none"),
            "num_student_samples": self.rule != "mmd" or self.num_student_samples >= 8,
        }
        for name in (name for name, fit in fits.items() if not fit):
            raise ValueError(
                f"{name} = {getattr(self, name)!r} does not go with method = {self.method!r}, "
                f"rule = {self.rule!r}. The chain of mcmc_vi, amc, persistent and short_run needs "
                "a kernel, steps and a step size; vae, mcmc_vi and inclusive_kl need a Gaussian "
                "encoder, persistent and short_run take none; a rule belongs to amc, and mmd needs "
                "8 samples or more"
            )
        return self


class AmcOptions(_MethodOptions, TrainingOptions):
    """Options of :func:`amortised.recipes.amortised_mcmc.amc_training` and its evaluation."""


class DistillationOptions(_MethodOptions, EvidenceOptions):
    """Options of :func:`.recipes.amortised_mcmc.distillation_training`, and its evaluation."""

    discriminator_learning_rate: Positive
    #: Share of the updates over which the divergence of a VAE's bound is warmed up.
    kl_warmup: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

    diagnostic_images: NonNegativeInt
    #: Draws of the student for each image.
    diagnostic_samples: Annotated[int, Field(ge=4)]
    #: Training images that the classifier of student and teacher is fitted to.
    classifier_images: PositiveInt
    classifier_epochs: PositiveInt

    @model_validator(mode="after")
    def _student_fits(self) -> Self:
        if self.diagnostic_images > self.images:
            raise ValueError(
                f"diagnostic_images = {self.diagnostic_images} is more than images = {self.images}"
            )
        if self.kl_warmup > 0 and self.method != "vae":
            raise ValueError(f"kl_warmup = {self.kl_warmup} belongs to method = 'vae'")
        return self


class VaeOptions(TrainingOptions):
    """Options of :func:`amortised.recipes.autoencoders.vae_training`."""

    objective: Literal["elbo", "iwae", "dreg"]


class ObjectiveOptions(EvidenceOptions):
    """Options of :func:`amortised.recipes.autoencoders.vae_training` and its evaluation."""

    objective: Literal["elbo", "iwae", "dreg"]
    num_student_samples: PositiveInt
    output_bias: Literal["drawn", "data"]
    """Of the decoder at the start: as PyTorch draws it, or the logit of the mean pixel."""
    prior: Literal["standard", "mixture"]
    """N(0, I), or ten Gaussians that are learned."""
    kl_warmup: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.kl_warmup > 0 and self.objective != "elbo":
            raise ValueError(f"kl_warmup = {self.kl_warmup} belongs to objective = 'elbo'")
        if self.prior == "mixture" and self.decoder:
            raise ValueError(
                "prior = 'mixture' is the book's decoder's; define prior() of your own"
            )
        if self.prior == "mixture" and self.objective == "elbo":
            raise ValueError(
                "prior = 'mixture' has no divergence in closed form; its ELBO is "
                "objective = 'iwae' with num_student_samples = 1"
            )
        return self


class TeacherOptions(MinibatchOptions, _DrawnImagesOptions):
    """Options of :func:`amortised.recipes.amortised_mcmc.teacher_training` and its evaluation."""

    start: str = Field(pattern=r"^\w+/\w+-\w+-seed\d+$")
    """Weights of ``data/models`` to start from, decoder and encoder."""
    start_sha256: Sha256
    """Of the two files, one after the other."""
    method: Literal["vae", "mcmc_vi"]
    kernel: Literal["none", "langevin", "mala"]
    num_steps: Annotated[int, Field(ge=0)]
    step_size: Annotated[float, Field(ge=0, allow_inf_nan=False)]

    @model_validator(mode="after")
    def _a_chain_is_whole(self) -> Self:
        has_chain = [self.method == "mcmc_vi", self.kernel != "none", self.num_steps > 0,
                     self.step_size > 0]  # fmt: skip
        if len(set(has_chain)) > 1:
            raise ValueError(
                f"method = {self.method!r}, kernel = {self.kernel!r}, num_steps = "
                f"{self.num_steps} and step_size = {self.step_size} do not go together: the chain "
                "of mcmc_vi needs all three, and vae none"
            )
        return self


class PathOptions(Strict):
    """Options of :func:`amortised.recipes.chain_bounds.build_path`."""

    path: PathName
    num_steps: NonNegativeInt
    step_size: Annotated[float, Field(gt=0, lt=0.5)]
    varied: bool
    tempering: Literal["none", "free", "paper", "mnist_code"]
    acceptance: Literal["always", "barker", "metropolis"]
    kept_momentum: Annotated[float, Field(ge=0, lt=1)]
    """What a refresh keeps of the momentum."""
    num_path_samples: PositiveInt
    """Paths of an image in an update."""
    learning_rate: Positive
    num_samples: Annotated[int, Field(ge=2)]
    """Paths of an image in the evaluation."""

    @model_validator(mode="after")
    def _parts_belong_to_the_path(self) -> Self:
        fits = {
            "tempering": self.tempering == "none" or self.path == "hvae",
            "acceptance": self.acceptance == "always" or self.path in MAPS,
            "kept_momentum": self.kept_momentum == 0 or self.path in ("uha", "mcd"),
            "num_steps": self.num_steps > 0 or self.path not in BRIDGES,
        }
        for name in (name for name, fit in fits.items() if not fit):
            raise ValueError(
                f"{name} = {getattr(self, name)!r} does not go with path = {self.path!r}: "
                "tempering belongs to hvae, acceptance to maps, kept_momentum to uha and mcd, and "
                "a bridge needs steps"
            )
        return self


class PathVaeOptions(PathOptions, MinibatchOptions, _DrawnImagesOptions):
    """Options of :func:`amortised.recipes.chain_bounds.path_training` and its evaluation."""

    encoder: Literal["gaussian", "gaussian_wide"]
    held_out: Literal["test", "validation"]


class TargetOptions(PathOptions):
    """Options of :func:`amortised.recipes.chain_bounds.evaluate_target`."""

    target: TargetName
    start: str = Field(pattern=r"^\w+/\w+-\w+-seed\d+$")
    """Weights of the decoder of the last two targets."""
    start_sha256: Sha256
    image_seed: Seed
    starts: Annotated[int, Field(ge=2)]
    """Starts, for the last two targets digits, each with a Gaussian of its own."""
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Standard deviation of their means at the start."""
    num_updates: PositiveInt
    num_temperatures: PositiveInt


class RingOptions(PathOptions):
    """Options of :func:`amortised.recipes.chain_bounds.evaluate_ring`."""

    path: PathName | Literal["exact"]
    latent_dim: PositiveInt
    log_start: Annotated[float, Field(allow_inf_nan=False)]
    """Where the logarithms of both parameters start."""
    num_observations: PositiveInt
    batch_size: PositiveInt
    """Observations in an update."""
    num_updates: PositiveInt
    num_judged: Annotated[int, Field(ge=2)]
    """Other observations, of the evaluation."""


class ImputationOptions(Strict):
    """Options of :func:`amortised.recipes.amortised_mcmc.evaluate_imputation`."""

    #: With ``trained``: the row whose weights, of the same scale and seed, are used.
    trained_study: Name
    trained: Name
    images: Annotated[int, Field(ge=2, le=10_000)]
    num_chains: PositiveInt
    iterations: PositiveInt
    num_temperatures: PositiveInt
    step_size: Positive
    num_leapfrog: PositiveInt
    reference_steps: PositiveInt


class IterativeOptions(Strict):
    """Options of :func:`.recipes.iterative_inference.iterative_training` and its evaluation."""

    dataset: Literal["mnist", "cifar10", "20news", "rcv1"]
    method: Literal["standard", "iterative", "ladder"]
    inputs: InputNames
    """What an iterative encoder reads; empty for the other methods, which read x."""
    latent_dims: Annotated[list[PositiveInt], Field(min_length=1)]
    """Dimensions of the levels, lowest first."""
    num_hidden: PositiveInt
    num_layers: PositiveInt
    num_iterations: PositiveInt
    """Of an iterative encoder; the other methods take one."""
    num_student_samples: PositiveInt
    """Draws of the posterior for each bound in training."""
    training_images: PositiveInt
    """Examples, whatever they are; so for ``images``."""
    epochs: PositiveInt
    batch_size: PositiveInt
    learning_rate: Positive
    images: Annotated[int, Field(ge=2)]
    """Random test examples, the same in every run; the following are settings of the evaluation."""
    image_seed: Seed
    num_samples: PositiveInt
    svi_images: Annotated[int, Field(ge=2)]
    svi_steps: Annotated[int, Field(ge=0)]
    posthoc_epochs: Annotated[int, Field(ge=0)]
    """Training of a standard and of an iterative encoder on the finished model."""
    posthoc_inputs: Annotated[list[Literal[INPUTS]], Field(min_length=1)]

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if (self.method == "iterative") != bool(self.inputs):
            raise ValueError(
                f"inputs = {self.inputs} with method = {self.method!r}: an iterative encoder needs "
                "some; give the others an empty list"
            )
        if self.dataset in ("20news", "rcv1") and "errors" in self.inputs:
            raise ValueError(f"inputs of {self.dataset}: there are no errors of counts; leave them")
        if self.batch_size > self.training_images:
            raise ValueError(f"batch_size = {self.batch_size} is more than training_images")
        return self


#: The options of each recipe of :data:`amortised.recipes.RECIPES`.
OPTIONS = {
    "amc": AmcOptions,
    "distillation": DistillationOptions,
    "vae": VaeOptions,
    "objective": ObjectiveOptions,
    "teacher": TeacherOptions,
    "path": PathVaeOptions,
    "target": TargetOptions,
    "ring": RingOptions,
    "imputation": ImputationOptions,
    "iterative": IterativeOptions,
}


# --- the file ------------------------------------------------------------------------------------


Scale = Literal["laptop", "full"]
Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)]
Options = dict[str, Any]


class _Row(Strict):
    """What a row says of itself beside its options."""

    scales: Annotated[list[Scale], Field(min_length=1), AfterValidator(_distinct)] | None = None
    seeds: Seeds | None = None
    keep: tuple[Literal["decoder", "encoder"], ...] = Field((), strict=False)


class Study(Strict):
    """A study as it stands in the file."""

    title: str
    recipe: RecipeName
    recipe_version: PositiveInt
    seeds: Seeds
    common: Options
    scales: Annotated[dict[Scale, Options], Field(min_length=1)]
    rows: Annotated[dict[Name, Options | None], Field(min_length=1)]


class _File(Strict):
    studies: Annotated[dict[Name, Study], Field(min_length=1)]


class Experiment(NamedTuple):
    """One run that can be asked for: a row at a scale with a seed.

    :ivar config: its options, complete and checked.
    :ivar keep: roles of the networks whose weights of seed 0 go to ``data/models``.
    :ivar needs: the run whose weights it builds on, or None.
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


def load_studies(path: str | os.PathLike | None = None) -> dict[str, list[Experiment]]:
    """Read and check a file of studies.

    :param path: YAML; by default ``workflow/experiments.yaml`` of the project.
    :return: the runs of each study, in the order of the file.
    :raises FormatError: with every fault: unknown names, options that are missing, out of range or
        at odds with each other, rows to build on that do not exist; each with the choices.

    >>> load_studies()["amc_table1"][0].name
    'amc_table1/vae-laptop-seed0'
    """
    path = data.data_folder().parent / "workflow/experiments.yaml" if path is None else Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
        faults = list(_repeated_keys(yaml.compose(text), set()))
    except FileNotFoundError:
        raise FormatError(f"there is no file of studies {path}") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter of letters and of long numbers
        raise FormatError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    file = _validated(_File, tree, "", faults)
    found: dict[str, list[Experiment]] = {}
    for name, study in {} if file is None else file.studies.items():
        found[name] = []
        for row, options in study.rows.items():
            found[name] += _runs(name, study, row, options or {}, faults)
    if not faults:
        found = {name: [_tied(run, found, faults) for run in runs] for name, runs in found.items()}
    if faults:
        raise FormatError("\n  ".join([f"{path} cannot be used:", *dict.fromkeys(faults)]))
    return found


def _validated(kind: Any, tree: object, where: str, faults: list[str]) -> Any:
    """``tree`` as an instance of ``kind``, or None and its faults in the list."""
    try:
        return validate(kind, tree, where)
    except FormatError as error:
        lines = str(error).split("\n  ")[1:]
        faults += [f"{where}{': ' * bool(where)}{line}" for line in lines]
        return None


def _repeated_keys(node: yaml.Node | None, seen: set[int]) -> Iterator[str]:
    """Keys that stand twice in one mapping; YAML would silently forget the first.

    ``seen`` are the nodes that were looked at: a node can have many names.
    """
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        for key, value in node.value:
            if keys.count(key.value) > 1:
                yield f"line {key.start_mark.line + 1}: {key.value!r} stands there twice"
            yield from _repeated_keys(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _repeated_keys(item, seen)


def _runs(
    name: str, study: Study, row: str, options: Mapping[str, Any], faults: list[str]
) -> Iterator[Experiment]:
    """The runs of one row: each of its scales with each of its seeds."""
    where = f"studies.{name}.rows.{row}"
    about = {key: value for key, value in options.items() if key in _Row.model_fields}
    settings = _validated(_Row, about, where, faults)
    if settings is None:
        return
    options_of = OPTIONS.get(study.recipe) or recipe_named(study.recipe).options or Strict
    for scale in settings.scales or study.scales:
        if scale not in study.scales:
            faults.append(f"{where}: the study has no scale {scale!r}: {', '.join(study.scales)}")
            continue
        own = {key: value for key, value in options.items() if key not in about}
        config = study.common | study.scales[scale] | own
        if _validated(options_of, config, f"{where} at {scale}", faults) is None:
            continue
        for seed in settings.seeds or study.seeds:
            yield Experiment(name, row, scale, seed, study.recipe, study.recipe_version, config,
                             settings.keep, None)  # fmt: skip


def _tied(
    run: Experiment, studies: Mapping[str, list[Experiment]], faults: list[str]
) -> Experiment:
    """The run with the one whose weights it builds on."""
    if "trained" not in run.config:
        return run
    wanted = (run.config["trained_study"], run.config["trained"], run.scale, run.seed)
    others = [other for other in studies.get(wanted[0], []) if recipe_named(other.recipe).build]
    needs = next((other for other in others if other[:4] == wanted), None)
    if needs is None:
        rows = ", ".join(dict.fromkeys(other.row for other in others)) or "none"
        faults.append(
            f"{run.name}: there is no run {wanted[0]}/{wanted[1]}-{run.scale}-seed{run.seed} to "
            f"build on. Rows of {wanted[0]}: {rows}"
        )
    return run._replace(needs=needs)
