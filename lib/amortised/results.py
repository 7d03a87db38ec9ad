"""Results: provenance, files, published numbers and tables. Imports no algorithm.

A result is one row of a study at one scale and one seed: ``data/results/<study>/`` holds
``<row>-<scale>-seed<k>.json`` and, beside it, the per-image values as float32 safetensors of the
same name. :class:`amortised.schemas.ResultRecord` describes the JSON. Weights are safetensors with
the architecture in their metadata. Every file is written under a temporary name and then renamed,
and nothing is ever pickled.

Results and weights are *sealed*: each holds the SHA-256 of all its bytes, taken with 64 zeros in
the place of the digest. A file in which one bit has changed is refused.
"""

import csv
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from .data import data_folder, digests
from .files import atomic_write


class ResultError(ValueError):
    """A result or a file of weights departs from its format; the message lists every fault."""


class Estimate(NamedTuple):
    """A mean over ``n`` values with its standard error, in the unit of the values."""

    mean: float
    se: float
    n: int


class Result(NamedTuple):
    """A result as read from disk: the JSON ``record`` and ``{metric: values [N]}``."""

    record: dict
    per_image: dict[str, Tensor]


class Table(str):
    """Markdown text that a notebook shows as a table."""

    def _repr_markdown_(self) -> str:
        return str(self)


# ------------------------------------------------------------------------------------- statistics


def _finite_vector(name: str, values) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name} has shape {vector.shape}; give one value per image, shape [N]")
    bad = np.flatnonzero(~np.isfinite(vector))
    if bad.size:
        raise ValueError(
            f"{name} holds {bad.size} values of {vector.size} that are not finite, the first at "
            f"position {bad[0]}; find out where they come from, since none is left out"
        )
    return vector


def mean_and_se(values: Tensor | Sequence[float]) -> Estimate:
    r"""Sample mean and its standard error, computed in double precision.

    .. math::
        \bar v = \frac1N \sum_{n=1}^N v_n, \qquad
        \mathrm{se} = \sqrt{\frac{1}{N (N - 1)} \sum_{n=1}^N (v_n - \bar v)^2}.

    :param values: ``[N]`` with N of at least 2: a tensor, an array or a list.
    :raises ValueError: if ``values`` is not a vector, has fewer than 2 entries, or holds NaN or
        infinities; none is ever dropped.

    >>> mean_and_se([1.0, 2.0, 3.0, 4.0])
    Estimate(mean=2.5, se=0.6454972243679028, n=4)
    """
    vector = _finite_vector("values", values)
    if vector.size < 2:
        raise ValueError(f"values has {vector.size} entries; a standard error needs at least 2")
    se = float(vector.std(ddof=1) / math.sqrt(vector.size))
    return Estimate(float(vector.mean()), se, vector.size)


def paired_difference(a: Tensor | Sequence[float], b: Tensor | Sequence[float]) -> Estimate:
    r"""Mean of the differences ``a - b`` over the same images, with its standard error.

    .. math::
        \bar d = \frac1N \sum_n (a_n - b_n), \qquad
        \mathrm{se} = \mathrm{sd}(a_n - b_n) / \sqrt{N}.

    Images differ far more than models do, so the paired standard error is much smaller than that of
    two separate means. Entry ``n`` of both must belong to the same image: in ``data/results``, row
    n of every per-image array is row n of :func:`amortised.data.load_mnist_binary`.

    :param a: ``[N]``, one value per image.
    :param b: ``[N]``, values of the same images in the same order.
    :raises ValueError: if the shapes differ or a value is not finite.

    >>> paired_difference([1.0, 20.0, 300.0], [0.0, 18.0, 299.0])
    Estimate(mean=1.333..., se=0.333..., n=3)
    """
    first, second = _finite_vector("a", a), _finite_vector("b", b)
    if first.size != second.size:
        raise ValueError(f"a has {first.size} images and b has {second.size}; pair the same ones")
    return mean_and_se(first - second)


def summarise(per_image: Mapping[str, Tensor]) -> dict[str, dict]:
    """``metrics`` of a result from its per-image values, in the float32 in which they are stored.

    :param per_image: ``{metric: values [N]}``.
    :returns: ``{metric: {"mean": ..., "se": ..., "n": ...}}``.
    :raises ValueError: as :func:`mean_and_se`.

    >>> summarise({"elbo": torch.tensor([-90.0, -92.0])})
    {'elbo': {'mean': -91.0, 'se': 1.0, 'n': 2}}
    """
    return {name: mean_and_se(v.detach().float())._asdict() for name, v in per_image.items()}


# ------------------------------------------------------------------------------------- provenance


def _canonical_json(value: object, where: str) -> str:
    """JSON in which equal settings look alike: keys in order, whole numbers without a point."""
    try:
        _refuse_other_keys(value)
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        message = (
            f"{where} = {value!r} cannot be JSON: {error}; use numbers, texts, lists, mappings"
        )
        raise type(error)(message) from None
    return json.dumps(json.loads(text, parse_float=_number), sort_keys=True, separators=(",", ":"))


def _refuse_other_keys(value: object) -> None:
    """JSON would turn a key that is no text into one, so that two configurations looked alike."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is no text")
        value = list(value.values())
    for item in value if isinstance(value, list | tuple) else ():
        _refuse_other_keys(item)


def _number(text: str) -> int | float:
    number = float(text)
    return int(number) if number.is_integer() else number


def config_hash(config: Mapping) -> str:
    """SHA-256 of a configuration's canonical JSON.

    The order of the keys does not matter, nor whether a whole number is written ``2`` or ``2.0``.

    :param config: nested mappings and lists of finite numbers, strings, booleans and ``None``.
    :raises TypeError: if ``config`` is no mapping or holds a key or a value of another type.
    :raises ValueError: for a number that is not finite.

    >>> config_hash({"step_size": 2.0, "T": 5}) == config_hash({"T": 5, "step_size": 2})
    True
    >>> config_hash({"T": 5})[:12]
    'a63cf06b1788'
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"config is a {type(config).__name__}; give a mapping of settings")
    return hashlib.sha256(_canonical_json(config, "config").encode()).hexdigest()


def _git(*words: str) -> str | None:
    """Output of a git command in the repository, or ``None`` where that is no git checkout.

    A variable such as ``GIT_DIR`` would have git answer for another repository.
    """
    variables = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-C", str(data_folder().parent), *words]
    try:
        done = subprocess.check_output(command, stderr=subprocess.DEVNULL, env=variables)
        return done.decode(errors="replace").strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cpu" and cpuinfo.is_file():
        names = re.findall(
            r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE
        )
        return names[0].strip() if names else platform.machine()
    return platform.processor() or device.type


def provenance(
    device: str | torch.device = "cpu",
    *,
    started: float,
    wall_seconds: float | None = None,
    datasets: Iterable[str] = ("mnist",),
) -> dict:
    """Where a number comes from: code, versions, device, data, and how long it took.

    :param device: the device that did the work.
    :param started: ``time.time()`` at the start of the run, seconds.
    :param wall_seconds: time the run took, seconds; ``None`` takes the time since ``started``. A
        run that was interrupted and resumed passes the sum over its pieces.
    :param datasets: names in the registry of the data sets that were read.
    :returns: a dictionary for JSON: ``commit`` (40 hex digits; null outside a git checkout, where
        the variable ``AMORTISED_COMMIT`` can state it), ``dirty`` (whether ``lib``, ``workflow``
        or ``notebooks`` differ from that commit; null if unknown), ``versions``, ``device``
        (``type``, ``name``, and ``threads`` on a CPU), ``started`` (ISO 8601, UTC),
        ``wall_seconds`` and ``data_sha256``.

    >>> facts = provenance("cpu", started=time.time())
    >>> facts["device"]["type"], facts["versions"]["torch"] == torch.__version__
    ('cpu', True)
    """
    if wall_seconds is None:
        wall_seconds = max(0.0, time.time() - started)
    device = torch.device(device)
    threads = {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
    top_level = _git("rev-parse", "--show-toplevel")
    is_checkout = top_level is not None and Path(top_level).samefile(data_folder().parent)
    commit = _git("rev-parse", "HEAD") if is_checkout else None
    changes = _git("status", "--porcelain", "--", "lib", "workflow", "notebooks")
    return {
        "commit": commit or os.environ.get("AMORTISED_COMMIT"),
        "dirty": None if commit is None or changes is None else bool(changes),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "safetensors": safetensors.__version__,
            "cuda": torch.version.cuda,
        },
        "device": {"type": device.type, "name": _device_name(device)} | threads,
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "wall_seconds": round(wall_seconds, 3),
        "data_sha256": digests(*datasets),
    }


# ------------------------------------------------------------------------------------ result files


def result_path(root: str | Path, study: str, row: str, scale: str, seed: int) -> Path:
    """Path of a result's JSON file below ``root``, the folder of all studies.

    >>> result_path("data/results", "vae_objectives", "iwae_50", "laptop", 0).as_posix()
    'data/results/vae_objectives/iwae_50-laptop-seed0.json'
    """
    return Path(root) / study / f"{row}-{scale}-seed{seed}.json"


_BLANK = b"0" * 64  # in the place of a digest while it is taken


def _hex(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _sealed(content: bytes) -> bytes:
    """The content with its digest in the place of the first 64 zeros."""
    return content.replace(_BLANK, _hex(content), 1)


def _check_seal(content: bytes, digest: object) -> None:
    """Raise :class:`ResultError` unless ``digest``, which the content states, is its own."""
    stated = str(digest).encode()
    if _hex(content.replace(stated, _BLANK, 1)) != stated:
        raise ResultError("its digest is not that of its content: it was edited or is damaged")


def check_result(record: Mapping, per_image: Mapping[str, Tensor] | None = None) -> None:
    """Check a result's record, and its per-image values where they are given.

    :raises ResultError: with every fault: missing, unknown and ill-typed keys, malformed names,
        metrics that are not finite, a ``config_hash`` that is not that of ``config``; metrics
        without values, values that are no float32 vectors, or whose means are not the metrics.

    >>> check_result({"study": "vae_objectives"})
    Traceback (most recent call last):
    ...
    amortised.results.ResultError: the result departs from its format:
      row is missing
      ...
    """
    from . import schemas  # needs pydantic, which the machine that trains may lack

    try:
        schemas.validate(schemas.ResultRecord, record, "the result")
    except (schemas.FormatError, TypeError) as error:  # the latter of a config that no JSON holds
        raise ResultError(str(error)) from error
    many = [] if per_image is None else [n for n, m in record["metrics"].items() if m["n"] > 1]
    faults = [f"{name!r} has no values per image" for name in many if name not in per_image]
    for name, values in (per_image or {}).items():
        is_tensor = isinstance(values, Tensor)
        if not is_tensor or values.dtype != torch.float32 or values.ndim != 1:
            kind = f"{values.dtype} {list(values.shape)}" if is_tensor else type(values).__name__
            faults.append(f"{name!r} is {kind}, expected a float32 tensor [N]")
        elif name not in record["metrics"]:
            faults.append(f"{name!r} has no metric of its name")
        else:
            faults += _disagreements(name, values, Estimate(**record["metrics"][name]))
    if faults:
        raise ResultError("per-image values do not fit the result:\n  " + "\n  ".join(faults))


def _disagreements(name: str, values: Tensor, metric: Estimate) -> list[str]:
    try:
        found = mean_and_se(values)
    except ValueError as error:
        return [f"{name!r}: {error}"]
    close = math.isclose(found.mean, metric.mean, rel_tol=1e-5, abs_tol=1e-6)
    close = close and math.isclose(found.se, metric.se or 0.0, rel_tol=1e-4, abs_tol=1e-6)
    fault = f"metrics[{name!r}] states {metric}, its per-image values give {found}"
    return [] if close and found.n == metric.n else [fault]


def save_result(
    root: str | Path, record: Mapping, per_image: Mapping[str, Tensor] | None = None
) -> Path:
    """Check a result and write it: the per-image values first, then the JSON that vouches for them.

    A process killed in between leaves a pair that :func:`load_result` refuses, never one that mixes
    two runs.

    :param root: the folder of all studies, ``data/results`` for results that are committed.
    :param record: a :class:`amortised.schemas.ResultRecord` as plain data; both digests are added.
    :param per_image: ``{metric: values}``, float32 ``[N]``; row n belongs to image n.
    :returns: path of the JSON file.
    :raises ResultError: if anything departs from the format, before anything is written.
    :raises OSError: if the folder cannot be written; a result that was there stays.

    >>> import tempfile
    >>> elbo = {"elbo": torch.tensor([-90.0, -92.0])}
    >>> config = {"epochs": 2}
    >>> record = dict(study="vae_objectives", row="vae", scale="smoke", seed=0, config=config,
    ...               config_hash=config_hash(config), recipe_version=1, status="done",
    ...               metrics=summarise(elbo), provenance=provenance(started=time.time()))
    >>> with tempfile.TemporaryDirectory() as root:
    ...     path = save_result(root, record, elbo)
    ...     path.name, load_result(path).per_image["elbo"].tolist()
    ('vae-smoke-seed0.json', [-90.0, -92.0])
    """
    record = {"sha256": ""} | {**record, "sha256": _BLANK.decode(), "per_image_sha256": None}
    check_result(record, per_image or {})
    path = result_path(root, *(record[key] for key in ("study", "row", "scale", "seed")))
    values = path.with_suffix(".safetensors")
    content = None
    if per_image:
        described = {key: record[key] for key in ("study", "row", "scale", "seed", "config_hash")}
        content = safetensors.torch.save(
            {name: values.detach().cpu().contiguous() for name, values in per_image.items()},
            metadata={"amortised": _canonical_json(described, "metadata")},
        )
        record["per_image_sha256"] = hashlib.sha256(content).hexdigest()
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    waiting = path.with_name(f".{path.name}.tmp")
    try:  # both are on the disk before either takes its name: a full disk changes nothing
        atomic_write(waiting, _sealed(f"{text}\n".encode()))
        if content is not None:
            atomic_write(values, content)
        os.replace(waiting, path)
    finally:
        waiting.unlink(missing_ok=True)
    if content is None:
        values.unlink(missing_ok=True)
    return path


def load_result(path: str | Path) -> Result:
    """Read and check a result with its per-image values.

    :param path: the JSON file.
    :raises FileNotFoundError: if there is none.
    :raises ResultError: if the record departs from the format, was edited, lies under another name
        than its own, or if the per-image values are missing, damaged, of another run, or disagree
        with the metrics.

    >>> load_result("missing.json")
    Traceback (most recent call last):
    ...
    FileNotFoundError: ...
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        record = json.loads(content)
        check_result(record)
        own = result_path("", *(record[key] for key in ("study", "row", "scale", "seed")))
        if own.parts != path.absolute().parts[-2:]:
            raise ResultError(f"it is the result {own.as_posix()} by its content")
        per_image = _load_per_image(path.with_suffix(".safetensors"), record["per_image_sha256"])
        check_result(record, per_image)
        _check_seal(content, record.get("sha256"))
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{path}: {error}. Run this row again.") from error
    return Result(record, per_image)


def _load_per_image(path: Path, expected: str | None) -> dict[str, Tensor]:
    if expected is None and not path.exists():
        return {}
    if not path.is_file():
        raise ResultError(f"its per-image values, {path.name}, are missing")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ResultError(
            f"{path.name} has SHA-256 {found}, expected {expected}: it is damaged or of another run"
        )
    return safetensors.torch.load(content)


# ----------------------------------------------------------------------------------------- weights

_SEAL = "SHA-256"  # first among the sorted names of the metadata
_PARALLEL = nn.DataParallel | nn.parallel.DistributedDataParallel
# What the name of a file says: study/row-scale-seedK-role, or study/row-scale-seedK-hash/role.
_RUN_NAME = re.compile(
    r"(?:(?:models|runs)/(?P<study>[^/]+)/)?(?P<row>\w+)-(?P<scale>\w+)-seed(?P<seed>\d+)-(?:\w+/)?"
    r"(?P<role>\w+)\.safetensors$"
)


def save_weights(
    path: str | Path,
    module: nn.Module,
    architecture: Mapping,
    details: Mapping | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Save a decoder or an encoder as safetensors that say what they are weights of.

    :param path: file to write, atomically.
    :param module: its parameters and buffers are saved, from any device; of a compiled or
        data-parallel module, those of the module within.
    :param architecture: what one needs to build ``module`` again, for instance
        ``{"class": "ConvBernoulli", "latent_dim": 32}``; :func:`load_weights` compares it.
    :param details: anything else worth keeping, for instance the provenance. Where they name study,
        row, scale, seed or role, the file does not load under the name of another one.
    :param dtype: type to store floating-point tensors in; their own by default. Evaluate the module
        as :func:`load_weights` gives it back, if the numbers shall belong to the file.
    :raises TypeError: if ``architecture`` or ``details`` holds a value that is no JSON.
    :raises ValueError: if ``dtype`` is no floating-point type.
    :raises FloatingPointError: if a weight is not finite in that type; the tensors are named.
    :raises OSError: if the file cannot be written; one that was there stays.

    >>> import tempfile
    >>> layer, again = nn.Linear(3, 2), nn.Linear(3, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "layer.safetensors")
    ...     save_weights(path, layer, {"class": "Linear"}, {"epochs": 2})
    ...     load_weights(path, again, {"class": "Linear"})
    {'epochs': 2}
    >>> bool((layer.weight == again.weight).all())
    True
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type; got {dtype}")
    while hasattr(module, "_orig_mod") or isinstance(module, _PARALLEL):
        module = getattr(module, "_orig_mod", None) or module.module
    tensors = {
        name.replace("_orig_mod.", ""): value.detach().to(
            "cpu", dtype if value.is_floating_point() else None
        )
        for name, value in module.state_dict().items()
    }
    bad = [name for name, value in tensors.items() if not value.isfinite().all()]
    if bad:
        raise FloatingPointError(
            f"weights are not finite as {dtype or 'they are'}: {', '.join(bad)}; nothing is saved"
        )
    described = {"architecture": dict(architecture), "details": dict(details or {})}
    described[_SEAL] = _BLANK.decode()
    content = safetensors.torch.save(
        {name: value.contiguous().clone() for name, value in tensors.items()},
        metadata={"amortised": _canonical_json(described, "metadata")},
    )
    atomic_write(path, _sealed(content))


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict, dict]:
    """Read a file of :func:`save_weights`, and check that it is whole and under its own name.

    :param path: the file. One from before there were seals has its digest and its name beside it,
        as ``sha256sum`` writes them, in a file of the same name and ``.sha256``.
    :returns: the tensors by their names in the module, the architecture, and the details.
    :raises FileNotFoundError: if there is no such file.
    :raises ResultError: if a bit of it has changed, or it is of another run than its name says.

    >>> read_weights(data_folder() / "models/reference/vae-laptop-seed0-decoder.safetensors")[1]
    {'class': 'ConvBernoulli', 'latent_dim': 32}
    """
    path = Path(path)
    content = path.read_bytes()
    try:
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        stored = json.loads(header["__metadata__"]["amortised"])
        if stored.keys() - {_SEAL} != {"architecture", "details"}:
            raise ResultError(f"its parts are {', '.join(stored)}")
        architecture, details = dict(stored["architecture"]), dict(stored["details"])
        beside, own = path.with_name(f"{path.name}.sha256"), path.name.encode()
        if _SEAL in stored:
            _check_seal(content, stored[_SEAL])
        elif not beside.is_file() or beside.read_bytes().split() != [_hex(content), own]:
            raise ResultError(f"it has no seal, and {beside.name} does not vouch for it")
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ResultError(f"{path} is damaged or not of this project: {error!r}") from error
    claim = _RUN_NAME.search(path.absolute().as_posix())
    for name, text in claim.groupdict().items() if claim else ():
        own = str(details.get(name, text))
        if text not in (None, own):
            raise ResultError(f"{path} holds weights whose {name} is {own}, by their own account")
    return tensors, architecture, details


def load_weights(path: str | Path, module: nn.Module, architecture: Mapping) -> dict:
    """Load weights into a module that is the one they belong to, and into no other.

    Tensors go into a module of a type that holds every one of their values, half precision into
    float32, for instance.

    :param path: a file of :func:`save_weights`.
    :param module: changed in place, only once everything fits.
    :param architecture: the architecture of ``module``; must equal that of the file.
    :returns: the ``details`` that were saved.
    :raises FileNotFoundError: if there is no such file.
    :raises ResultError: as :func:`read_weights`, if an entry of the architecture differs, or if a
        tensor is missing, superfluous, or of another shape or dtype; each is named.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "layer.safetensors")
    ...     save_weights(path, nn.Linear(3, 2), {"class": "Linear", "inputs": 3})
    ...     load_weights(path, nn.Linear(4, 2), {"class": "Linear", "inputs": 4})
    Traceback (most recent call last):
    ...
    amortised.results.ResultError: .../layer.safetensors does not fit the module:
      architecture, inputs: 3 in the file, 4 in the module
      weight: float32 [2, 3] in the file, float32 [2, 4] in the module
    """
    wanted = json.loads(_canonical_json(architecture, "architecture"))
    tensors, written, details = read_weights(path)
    state = module.state_dict()
    for name in tensors.keys() & state.keys():
        wide = state[name].dtype
        if torch.promote_types(tensors[name].dtype, wide) == wide and wide.is_floating_point:
            tensors[name] = tensors[name].to(wide)
    found, needed = _described(written, tensors), _described(wanted, state)
    faults = [
        f"{key}: {found.get(key, 'absent')} in the file, {needed.get(key, 'absent')} in the module"
        for key in sorted(found.keys() | needed.keys())
        if found.get(key) != needed.get(key)
    ]
    if faults:
        raise ResultError(f"{path} does not fit the module:\n  " + "\n  ".join(faults))
    module.load_state_dict(tensors)
    return details


def _described(architecture: Mapping, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Each entry of an architecture and each tensor, in words."""
    return {f"architecture, {key}": value for key, value in architecture.items()} | {
        name: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        for name, tensor in tensors.items()
    }


# ------------------------------------------------------------------- published numbers and tables


def load_published(name: str, **where: str) -> list[dict]:
    """Published numbers, each with its protocol and source, from ``data/published/<name>.csv``.

    :param name: name of the file, for instance ``"amc"``.
    :param where: keep the rows whose column holds exactly this text, for instance
        ``metric="HAIS-LL"``.
    :returns: one dictionary per row: the columns ``paper``, ``table``, ``row``, ``metric``,
        ``unit``, ``protocol``, ``known_from`` as text, ``value`` as a float, ``plus_minus`` as a
        float or ``None`` where the source gives none, and ``printed``, the number with the digits
        of the source.
    :raises ValueError: for an unknown file or column, or a text that no row holds; it lists the
        choices.

    >>> row, = load_published("amc", row="Gaussian | VAE", metric="HAIS-LL")
    >>> row["value"], row["unit"], row["printed"], row["known_from"]
    (-80.64, 'nats', '-80.64', 'slides')
    """
    folder = data_folder() / "published"
    path = folder / f"{name}.csv"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in folder.glob("*.csv")))
        raise ValueError(f"no published numbers {name!r}; choose from {names}")
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for column, text in where.items():
        if column not in rows[0]:
            raise ValueError(f"no column {column!r} in {path.name}; choose from {list(rows[0])}")
        kept = [row for row in rows if row[column] == text]
        if not kept:
            texts = list(dict.fromkeys(row[column] for row in rows))
            raise ValueError(f"no row of {path.name} has {column} {text!r}; there are {texts}")
        rows = kept
    for row in rows:
        row["printed"] = row["value"] + (f" ± {row['plus_minus']}" if row["plus_minus"] else "")
        row["value"] = float(row["value"])
        row["plus_minus"] = float(row["plus_minus"]) if row["plus_minus"] else None
    return rows


def format_estimate(mean: float, se: float | None = None, decimals: int = 2) -> str:
    """A number with its standard error, as the tables print it.

    >>> format_estimate(-80.6412, 0.2249)
    '-80.64 ± 0.22'
    >>> format_estimate(-80.6412, decimals=1)
    '-80.6'
    """
    text = f"{mean:.{decimals}f}"
    return text if se is None else f"{text} ± {se:.{decimals}f}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence], decimals: int = 2) -> Table:
    """A table that a notebook renders: the last expression of a cell is enough.

    :param header: titles of the columns.
    :param rows: cells of each row. Text and integers appear as they are (Markdown, in which no tag
        of HTML is live), floats with ``decimals``
        decimals, an :class:`Estimate` or a metric ``{mean, se, n}`` of a result as
        ``mean ± se``, and ``None`` as a dash.
    :param decimals: digits after the point.
    :returns: the Markdown; columns that hold no text are set flush right.
    :raises ValueError: if there is no column or a row has another number of cells.

    >>> print(markdown_table(["method", "LL"], [["a | b", Estimate(-80.641, 0.224, 9)]]))
    | method | LL |
    | :-- | --: |
    | a \\| b | -80.64 ± 0.22 |
    """
    rows = [list(row) for row in rows]
    width = len(header)
    if not width:
        raise ValueError("header is empty; a table needs at least one column")
    for index, row in enumerate(rows):
        if len(row) != width:
            raise ValueError(f"row {index} has {len(row)} cells, the header {width}: {row}")
    flush_left = [any(isinstance(row[column], str) for row in rows) for column in range(width)]
    lines = [
        [_cell(title, decimals) for title in header],
        [":--" if left else "--:" for left in flush_left],
        *([_cell(value, decimals) for value in row] for row in rows),
    ]
    return Table("\n".join(f"| {' | '.join(line)} |" for line in lines))


def plain(text: str) -> str:
    """Text from data as Markdown that shows it letter by letter, whatever it holds.

    >>> plain("<script>`x`</script> | Xeon(R)")
    '&#60;script&#62;&#96;x&#96;&#60;/script&#62; &#124; Xeon(R)'
    """
    text = " ".join(text.split())
    return re.sub(r"[<>&`*_$|{}\[\]\\]", lambda found: f"&#{ord(found[0])};", text)


def _cell(value: object, decimals: int) -> str:
    if value is None:
        return "–"
    if isinstance(value, Estimate):
        return format_estimate(value.mean, value.se, decimals)
    if isinstance(value, Mapping):
        return format_estimate(value["mean"], value["se"], decimals)
    if isinstance(value, float):
        return format_estimate(value, decimals=decimals)
    return str(value).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
