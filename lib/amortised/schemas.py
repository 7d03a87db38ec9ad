"""The formats of the project's own files, as pydantic models.

A model is the one description of its format: names, types, ranges, and what each entry means.
Nothing is converted and no unknown name passes. :func:`validate` compares a parsed file with its
model and lists everything that is wrong with it at once. Files are checked where work is prepared;
no module that trains imports this one, so that a machine that trains needs no pydantic.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, get_args

import pydantic
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, model_validator

from .results import config_hash


class FormatError(ValueError):
    """A file departs from its format; the message lists all that is wrong with it."""


class Strict(BaseModel):
    """A table with these entries and no others, none of which is converted to another type."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


# --- checking ------------------------------------------------------------------------------------


def validate(kind: Any, tree: object, source: str | os.PathLike) -> Any:
    """Compare the content of a file with its format.

    :param kind: a model of this module, or a type made of such: ``Registry``, ``list[DataFile]``.
    :param tree: the parsed file: dictionaries, lists and plain values.
    :param source: name of the file, for the message.
    :returns: ``tree`` as an instance of ``kind``.
    :raises FormatError: if anything departs from the format, with all faults at once.

    >>> validate(DataFile, {"name": "a.gz", "size": 3}, "a.toml").size
    3
    >>> validate(list[DataFile], [{"name": "a.gz", "size": -3}, {"nam": "b.gz"}], "a.toml")
    Traceback (most recent call last):
    ...
    amortised.schemas.FormatError: a.toml departs from its format:
      [0].size = -3: input should be greater than or equal to 0
      [1]: name is missing
      [1]: unknown name 'nam' (known: name, size, sha256)
    """
    try:
        return pydantic.TypeAdapter(kind).validate_python(tree)
    except pydantic.ValidationError as error:
        lines = [_fault(kind, **fault) for fault in error.errors(include_url=False)]
        head = f"{os.fspath(source)} departs from its format:"
        raise FormatError("\n  ".join([head, *lines])) from None


def _fault(kind: Any, *, type: str, loc: tuple, msg: str, input: object, ctx: object = None) -> str:
    """A fault that pydantic has found: where, which value, and what may stand there."""
    what = msg.removeprefix("Value error, ")
    if type == "missing":
        loc, what = loc[:-1], f"{loc[-1]} is missing"
    elif type == "extra_forbidden":
        known = ", ".join(_names(kind, loc[:-1]))
        loc, what = loc[:-1], f"unknown name {loc[-1]!r} (known: {known})"
    elif type != "value_error":
        if type == "float_type" and isinstance(input, str):
            what += "; this is text, as is 1e-3 in YAML, which reads 1.0e-3 as a number"
        value = " ".join(repr(input).split())
        value = value if len(value) <= 100 else f"{value[:96]} ..."
        return f"{_place(loc)} = {value}: {what[0].lower()}{what[1:]}"
    return f"{_place(loc)}: {what}" if loc else what


def _place(location: Iterable[str | int]) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).removeprefix(".") or "top level"


def _names(kind: Any, location: Iterable[str | int]) -> list[str]:
    """The names that the table at a location of a ``kind`` may hold."""
    models = _models(kind)
    for part in location:
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if fields:
            models = [inner for field in fields for inner in _models(field.annotation)]
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def _models(kind: Any) -> list[type[BaseModel]]:
    """The models that a type is made of: of ``dict[str, DataSet]``, ``DataSet``."""
    arguments = get_args(kind)
    if arguments:
        return [model for argument in arguments for model in _models(argument)]
    return [kind] if isinstance(kind, type) and issubclass(kind, BaseModel) else []


# --- data sets -----------------------------------------------------------------------------------

PlainName = Annotated[str, Field(pattern=r"^\w[\w.+-]*$")]
# Encrypted, or on this machine.
Address = Annotated[str, Field(pattern=r"^(https://|http://(localhost|127\.0\.0\.1):)\S+/$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class DataFile(Strict):
    """One file of a data set; an archive counts as one."""

    name: PlainName
    #: Bytes.
    size: NonNegativeInt | None = None
    #: Left out only where the source publishes none; it is noted at the first download then.
    sha256: Sha256 | None = None


class Archive(Strict):
    """A packed folder at each address of a data set, which holds its files."""

    name: PlainName
    sha256: Sha256
    folder: PlainName


class DataSet(Strict):
    """A data set: where its files come from and on what terms."""

    title: str
    licence: str
    citation: str
    #: Whether the files lie in the repository, in ``data/<name>/``.
    embedded: bool = False
    #: Folders to fetch from, tried in order.
    addresses: list[Address]
    #: Where the files are not to be had one by one.
    archive: Archive | None = None
    files: list[DataFile]

    @model_validator(mode="after")
    def _embedded_files_have_digests(self) -> Self:
        lacking = [file.name for file in self.files if file.sha256 is None]
        if self.embedded and lacking:
            raise ValueError(f"an embedded file needs its sha256: {', '.join(lacking)}")
        return self


# The data sets of ``data/registry.toml`` by name, which is also that of their folder.
Registry = dict[PlainName, DataSet]


# --- results -------------------------------------------------------------------------------------

Name = Annotated[str, Field(pattern="^[a-z0-9_]+$")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Metric(Strict):
    """A mean over ``n`` images with its standard error, which is null exactly when ``n`` is 1."""

    mean: Finite
    se: Annotated[Finite, Field(ge=0)] | None
    n: PositiveInt

    @model_validator(mode="after")
    def _one_value_has_no_error(self) -> Self:
        if (self.n == 1) != (self.se is None):
            raise ValueError("se must be null for a single value, and for no other")
        return self


class Provenance(Strict):
    """What :func:`amortised.results.provenance` returns."""

    commit: str | None
    dirty: bool | None
    versions: dict[str, str | None]
    device: dict[str, str | int]
    started: str
    wall_seconds: Annotated[Finite, Field(ge=0)]
    data_sha256: dict[str, str]


class ResultRecord(Strict):
    """The JSON of a result: one row of a study at one scale with one seed."""

    study: Name
    row: Name
    scale: Name
    seed: Seed
    #: The options of the run.
    config: dict[str, Any]
    #: :func:`amortised.results.config_hash` of ``config``.
    config_hash: str
    #: Raised when a change of the code alters the numbers.
    recipe_version: PositiveInt
    status: Literal["done", "failed"]
    metrics: dict[str, Metric]
    provenance: Provenance
    #: Why a run has failed.
    reason: str | None = None
    #: Anything else worth keeping.
    details: dict[str, Any] = {}
    #: Digest of the safetensors file, null if there is none.
    per_image_sha256: str | None = None
    #: Digest of the JSON with 64 zeros in its place, see :mod:`amortised.results`.
    sha256: Sha256 = "0" * 64

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if (self.status == "failed") != bool(self.reason):
            raise ValueError("reason must be stated for a failed run, and for no other")
        if self.status == "done" and not self.metrics:
            raise ValueError("metrics is empty, though status is 'done'")
        if self.config_hash != (expected := config_hash(self.config)):
            raise ValueError(f"config_hash is not that of config, {expected!r}")
        return self
