"""Data sets: found, checked against their digests, and loaded.

``data/registry.toml`` lists every file of every data set with its size, its SHA-256 and the
addresses it can be fetched from. A file is looked for, in this order, in

1. ``$AMORTISED_DATA_DIR/<data set>/``, a local folder of the reader's own;
2. ``data/<data set>/`` of the repository, for embedded data sets (MNIST needs no network);
3. ``$AMORTISED_CACHE_DIR/<data set>/``, by default the cache folder of the operating system,

each time under its own name or with ``.xz`` appended, in which case the unpacked bytes must match.
The first place that has the file decides: if its bytes are not those of the registry, the loaders
stop with a :class:`DataError` and never go on to another copy. A file that is nowhere is
downloaded into the cache under a temporary name and takes its own name once its digest is right.

From a shell: ``python -m amortised.data list``, ``fetch NAME`` and ``verify [NAME]``.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import math
import os
import shlex
import sys
import tomllib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .files import atomic_write

__all__ = [
    "BINARY_SEED",
    "SPLITS",
    "DataError",
    "Digits",
    "binarise",
    "cache_folder",
    "data_folder",
    "digests",
    "fetch",
    "load_mnist",
    "load_mnist_binary",
    "load_static_mnist",
    "read_bytes",
    "registry",
]

SPLITS = {
    "train": ("train", slice(0, 60_000)),
    "test": ("t10k", slice(0, 10_000)),
    "train_50000": ("train", slice(0, 50_000)),
    "valid_10000": ("train", slice(50_000, 60_000)),
    "train_55000": ("train", slice(5_000, 60_000)),
    "valid_5000": ("train", slice(0, 5_000)),
    "train_59600": ("train", slice(0, 59_600)),
    "valid_400": ("train", slice(59_600, 60_000)),
}
"""Splits of MNIST: the file an image comes from and its rows there.

``train_50000`` and ``valid_10000`` cut the training file in order; ``train_55000`` and
``valid_5000`` are TensorFlow's tutorial split, which holds out the *first* 5,000 images and which
adversarial variational Bayes uses; ``train_59600`` and ``valid_400`` are the split of the
importance-weighted autoencoder's code.
"""

BINARY_SEED = 784
"""Seed of the one fixed binarisation of the held-out images (:func:`load_mnist_binary`)."""

# SHA-256 of the packed bits (numpy.packbits) of each fixed binarisation. The test images are the
# common yardstick of every evaluation, so a platform that drew other bits must be found out.
_BINARY_SHA256 = {
    "test": "8936d0655d97f824740c81f297346e485c37d5472ec5385f00f09158e21f91fd",
    "valid_10000": "615cd5c6db11da7693cb4145df3680ef9f95d9e75166fce490c2e034fb18638f",
    "valid_5000": "67acee4e7512ea8d6f618b0d1c715599495a8a9687c310c1280727099decc1ee",
    "valid_400": "e4a6eaff2faa2d6f89088f199e06531c75eb97e713e937b563d8903e90c70140",
}

_STATIC_FILES = {
    "train": "binarized_mnist_train.amat",
    "valid": "binarized_mnist_valid.amat",
    "test": "binarized_mnist_test.amat",
}


class DataError(RuntimeError):
    """A data file is missing, damaged or out of reach.

    The message names the file, what was expected, what was found, and the command that mends it.
    """


class Digits(NamedTuple):
    """Images and labels of one split, in the order of the original files.

    - ``images``: ``[N, 784]``, the 28 x 28 pixels row by row;
    - ``labels``: int64 ``[N]``, the digits 0 to 9.
    """

    images: Tensor
    labels: Tensor


class _File(NamedTuple):
    """One file of the registry."""

    dataset: str
    name: str
    size: int | None
    sha256: str | None
    addresses: tuple[str, ...]
    embedded: bool


# --------------------------------------------------------------------------- folders and registry


def data_folder() -> Path:
    """Path of the repository's ``data`` folder.

    It is the one beside the package's own source, as in an editable install (``pip install -e .``),
    or else that of the checkout around the working folder.

    :raises DataError: if neither holds ``data/registry.toml``.

    >>> data_folder().name
    'data'
    """
    beside_package = Path(__file__).resolve().parents[2]
    for root in (beside_package, Path.cwd(), *Path.cwd().parents):
        if (root / "data/registry.toml").is_file() and (root / "lib/amortised").is_dir():
            return root / "data"
    raise DataError(
        f"data/registry.toml is neither in {beside_package} nor in a checkout around {Path.cwd()}. "
        "Install the package from a checkout of the compendium with `pip install -e .`, "
        "or work in a folder inside the checkout."
    )


def cache_folder() -> Path | None:
    """Folder for downloaded files: ``$AMORTISED_CACHE_DIR``, or the operating system's cache.

    ``None`` if the variable is not set and pooch, which knows that cache, is not installed.

    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, AMORTISED_CACHE_DIR="/scratch/cache"):
    ...     cache_folder().as_posix()
    '/scratch/cache'
    """
    folder = os.environ.get("AMORTISED_CACHE_DIR")
    if folder:
        return Path(folder).expanduser().absolute()
    try:
        import pooch
    except ImportError:
        return None
    return Path(pooch.os_cache("amortised"))


_DATASET_KEYS = {
    "title": str,
    "licence": str,
    "citation": str,
    "addresses": list,
    "files": list,
    "embedded": bool,
}
_FILE_KEYS = {"name": str, "size": int, "sha256": str}


def registry() -> dict[str, dict]:
    """The data sets of ``data/registry.toml`` by name, checked against the registry's format.

    :raises DataError: if the registry cannot be found or an entry departs from the format that
        ``data/README.md`` describes.

    >>> {"mnist", "mnist_static"} <= registry().keys()
    True
    >>> registry()["mnist"]["licence"]
    'CC BY-SA 3.0, https://creativecommons.org/licenses/by-sa/3.0/'
    """
    path = data_folder() / "registry.toml"
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid TOML: {error}. {_restore(path)}") from error
    faults = []
    for dataset, table in tables.items():
        faults += _faults(f"[{dataset}]", table, _DATASET_KEYS, optional={"embedded"})
        files = table.get("files", []) if isinstance(table, dict) else []
        for position, entry in enumerate(files if isinstance(files, list) else []):
            where = f"[[{dataset}.files]] number {position + 1}"
            faults += _faults(where, entry, _FILE_KEYS, optional={"size", "sha256"})
            if not faults:
                digest = entry.get("sha256", "0" * 64)
                if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
                    faults.append(f"{where}: sha256 {digest!r} is not 64 lower-case hex digits")
                if "sha256" not in entry and table.get("embedded"):
                    faults.append(f"{where}: an embedded file needs its sha256")
                if Path(entry["name"]).name != entry["name"]:
                    faults.append(f"{where}: name {entry['name']!r} is not a plain file name")
        if not faults:
            for address in table["addresses"]:
                if not (isinstance(address, str) and address.endswith("/")):
                    faults.append(f"[{dataset}]: address {address!r} does not end in '/'")
    if faults:
        raise DataError(f"{path} departs from its format:\n  " + "\n  ".join(faults))
    return tables


def _faults(where: str, table: object, keys: dict[str, type], optional: set[str]) -> list[str]:
    """What is wrong with one table of the registry: missing, unknown and ill-typed keys."""
    if not isinstance(table, dict):
        return [f"{where}: {table!r} is not a table"]
    missing = [f"{where}: {key} is missing" for key in keys if key not in table.keys() | optional]
    unknown = [
        f"{where}: unknown key {key!r} (known: {', '.join(keys)})"
        for key in table
        if key not in keys
    ]
    types = [
        f"{where}: {key} = {table[key]!r} is not of type {kind.__name__}"
        for key, kind in keys.items()
        if key in table and type(table[key]) is not kind
    ]
    return missing + unknown + types


def _files(dataset: str) -> list[_File]:
    tables = registry()
    if dataset not in tables:
        raise ValueError(f"unknown data set {dataset!r}; choose from {', '.join(sorted(tables))}")
    table = tables[dataset]
    return [
        _File(
            dataset=dataset,
            name=entry["name"],
            size=entry.get("size"),
            sha256=entry.get("sha256") or _recorded_sha256(dataset, entry["name"]),
            addresses=tuple(table["addresses"]),
            embedded=table.get("embedded", False),
        )
        for entry in table["files"]
    ]


def _file(dataset: str, name: str) -> _File:
    files = {file.name: file for file in _files(dataset)}
    if name not in files:
        raise ValueError(f"data set {dataset!r} has no file {name!r}, but {', '.join(files)}")
    return files[name]


def digests(*datasets: str) -> dict[str, str]:
    """SHA-256 of every file of the named data sets, for the provenance of a result.

    Every loader compares what it reads with these digests, so they say exactly which bytes a run
    has seen. ``mnist`` also lists the fixed binarisation of its test images.

    :param datasets: names in the registry.
    :returns: ``{"<data set>/<file>": digest}``.
    :raises ValueError: for a name that the registry does not hold.

    >>> digests("mnist")["mnist/t10k-labels-idx1-ubyte.gz"][:8]
    'f7ae60f9'
    """
    found = {
        f"{file.dataset}/{file.name}": file.sha256
        for dataset in datasets
        for file in _files(dataset)
        if file.sha256 is not None
    }
    if "mnist" in datasets:
        found["mnist/binary-test"] = _BINARY_SHA256["test"]
    return found


# ------------------------------------------------------------------- finding and checking one file


def _folders(file: _File) -> Iterator[Path]:
    local = os.environ.get("AMORTISED_DATA_DIR")
    if local:
        folder = Path(local).expanduser().absolute()
        if not folder.is_dir():
            raise DataError(
                f"AMORTISED_DATA_DIR={local} is not a folder. Create it or unset the variable."
            )
        yield folder / file.dataset
    if file.embedded:
        yield data_folder() / file.dataset
    cache = cache_folder()
    if cache is not None:
        yield cache / file.dataset


def _find(file: _File) -> Path | None:
    """The first place that has the file, plain or packed with xz; its bytes are not yet checked."""
    for folder in _folders(file):
        for path in (folder / file.name, folder / f"{file.name}.xz"):
            if path.is_file():
                return path
    return None


def _find_or_refuse(file: _File) -> Path | None:
    """:func:`_find`, but an embedded file that is nowhere is an error, not a download."""
    path = _find(file)
    if path is None and file.embedded:
        missing = data_folder() / file.dataset / file.name
        raise DataError(
            f"{missing} is missing, though it belongs to the repository. {_restore(missing)} "
            f"(or run: {_fetch_command(file)})"
        )
    return path


def _open(path: Path) -> IO[bytes]:
    return lzma.open(path) if path.suffix == ".xz" else path.open("rb")


def _compare(file: _File, path: Path, size: int, sha256: str) -> None:
    """Raise :class:`DataError` unless the (unpacked) size and digest are those of the registry."""
    wrong_size = file.size is not None and size != file.size
    wrong_digest = file.sha256 is not None and sha256 != file.sha256
    if wrong_size or wrong_digest:
        raise DataError(
            f"{path} does not hold {file.dataset}/{file.name} as the registry describes it:\n"
            f"  size    {size} bytes, expected {file.size}\n"
            f"  SHA-256 {sha256}, expected {file.sha256}\n"
            f"{_remedy(file, path)}"
        )


def _verify(file: _File, path: Path) -> None:
    try:
        with _open(path) as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.tell()
    except (lzma.LZMAError, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}. {_remedy(file, path)}") from error
    _compare(file, path, size, sha256)


def _restore(path: Path) -> str:
    root = data_folder().parent
    command = ["git", "-C", str(root), "checkout", "--", path.relative_to(root).as_posix()]
    return f"Mend it with: {shlex.join(command)}"


def _fetch_command(file: _File) -> str:
    return f"python -m amortised.data fetch {file.dataset}"


def _remedy(file: _File, path: Path) -> str:
    if path.is_relative_to(data_folder()):
        return f"{_restore(path)} (or delete it and run: {_fetch_command(file)})"
    cache = cache_folder()
    if cache is not None and path.is_relative_to(cache):
        return f"Mend it with: {_fetch_command(file)}"
    return f"Replace or remove {path}, or unset AMORTISED_DATA_DIR, which points there."


def read_bytes(dataset: str, name: str) -> bytes:
    """The checked bytes of one file, downloaded first if it is nowhere at hand.

    :param dataset: name of a data set in the registry.
    :param name: name of one of its files.
    :returns: the file's bytes, unpacked if the copy found was an ``.xz``; their size and SHA-256
        are those of the registry.
    :raises ValueError: for a data set or a file that the registry does not hold.
    :raises DataError: if the copy found is damaged, if an embedded file is missing, or if the
        download fails.

    >>> len(read_bytes("mnist", "t10k-labels-idx1-ubyte.gz"))
    4542
    """
    file = _file(dataset, name)
    path = _find_or_refuse(file) or _download(file, progress=None, retries=2)
    try:
        with _open(path) as stream:
            raw = stream.read()
    except (lzma.LZMAError, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}. {_remedy(file, path)}") from error
    _compare(file, path, len(raw), hashlib.sha256(raw).hexdigest())
    return raw


# ------------------------------------------------------------------------------------- downloading


def fetch(
    dataset: str, *, replace: bool = False, progress: bool | None = None, retries: int = 2
) -> dict[str, Path]:
    """Make sure that every file of a data set is at hand, and check each against its digest.

    :param dataset: name of a data set in the registry.
    :param replace: download a damaged file of the cache folder anew instead of stopping; files
        elsewhere are never touched.
    :param progress: show a progress bar on standard error; ``None`` shows it on a terminal only.
    :param retries: further attempts at each address after a failed one.
    :returns: path of each file by name; a path that ends in ``.xz`` holds the file packed.
    :raises ValueError: for a name that the registry does not hold.
    :raises DataError: if a copy is damaged, or if no address delivers the right bytes. The cache
        folder then holds no trace of the failed download.

    >>> sorted(fetch("mnist"))[0]
    't10k-images-idx3-ubyte.gz'
    """
    paths = {}
    for file in _files(dataset):
        path = _find(file)
        if path is None:
            path = _download(file, progress=progress, retries=retries)
        else:
            try:
                _verify(file, path)
            except DataError as error:
                cache = cache_folder()
                if not (replace and cache is not None and path.is_relative_to(cache)):
                    raise
                print(f"{error}\nDownloading it again.", file=sys.stderr)
                path = _download(file, progress=progress, retries=retries)
        paths[file.name] = path
    return paths


def _download(file: _File, *, progress: bool | None, retries: int) -> Path:
    """Download one file into the cache folder, trying each address in turn."""
    name = f"{file.dataset}/{file.name}"
    try:
        import pooch
        import requests.exceptions
    except ImportError as error:
        raise DataError(
            f"{name} is not at hand and downloading needs pooch. Install it with "
            f"`pip install pooch`, or put the file into a folder {file.dataset}/ and name the "
            "folder above it in AMORTISED_DATA_DIR."
        ) from error
    if progress is None:
        progress = sys.stderr.isatty()
    folder = cache_folder() / file.dataset
    failures = []
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("INFO" if progress else "WARNING")
    try:
        for address in file.addresses:
            try:
                path = pooch.create(
                    path=folder,
                    base_url=address,
                    registry={file.name: file.sha256 and f"sha256:{file.sha256}"},
                    retry_if_failed=retries,
                ).fetch(
                    file.name,
                    downloader=pooch.HTTPDownloader(
                        progressbar=progress, chunk_size=2**18, timeout=30
                    ),
                )
            except (ValueError, requests.exceptions.RequestException) as error:
                failures.append(f"{address}{file.name}: {error}")
            else:
                if file.sha256 is None:
                    _record_sha256(Path(path))
                return Path(path)
    except OSError as error:
        raise DataError(
            f"{name} cannot be saved in {folder}: {error}. Make the folder writable and give it "
            "room, or name another one in AMORTISED_CACHE_DIR."
        ) from error
    finally:
        logger.setLevel(level)
    raise DataError(
        f"{name} could not be downloaded (expected SHA-256 {file.sha256}):\n  "
        + "\n  ".join(failures)
        + f"\nTry again later with `{_fetch_command(file)}`, or put the "
        f"file into a folder {file.dataset}/ and name the folder above it in AMORTISED_DATA_DIR."
    )


def _recorded_sha256(dataset: str, name: str) -> str | None:
    """Digest noted at the first download of a file whose source publishes none."""
    cache = cache_folder()
    record = cache / dataset / f"{name}.sha256" if cache is not None else None
    return record.read_text().strip() if record is not None and record.is_file() else None


def _record_sha256(path: Path) -> None:
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    atomic_write(path.with_name(f"{path.name}.sha256"), f"{sha256}\n".encode())


# ------------------------------------------------------------------------------------------- MNIST


def _parse_idx(packed: bytes, source: str) -> np.ndarray:
    """The uint8 array of one gzipped idx file; read-only, no copy of the unpacked bytes."""
    try:
        # gzip ends with the unpacked length; with it zlib fills one buffer and joins nothing.
        unpacked_size = int.from_bytes(packed[-4:], "little")
        raw = zlib.decompress(packed, wbits=31, bufsize=max(1, min(unpacked_size, 2**26)))
    except zlib.error as error:
        raise DataError(f"{source} is not a whole gzip file: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise DataError(
            f"{source} starts with {raw[:4].hex(' ')}, expected 00 00 08 and the number of "
            "dimensions: it is not an idx file of bytes"
        )
    header = 4 + 4 * raw[3]
    shape = tuple(int.from_bytes(raw[start : start + 4]) for start in range(4, header, 4))
    if len(raw) != header + math.prod(shape):
        raise DataError(
            f"{source} announces shape {shape} after a header of {header} bytes, but holds "
            f"{len(raw)} bytes in all"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _check_choice(split: str, splits: dict, dtype: torch.dtype = torch.float32) -> None:
    if split not in splits:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(splits)}")
    if dtype not in (torch.float32, torch.uint8):
        raise ValueError(f"dtype {dtype} is not served; choose torch.float32 or torch.uint8")


def _convert(levels: np.ndarray, scale: int, dtype: torch.dtype) -> Tensor:
    """A writable tensor of the levels: as they are for uint8, divided by ``scale`` for float32."""
    # Memory from torch: NumPy asks the kernel for huge pages, and where those have to be made first
    # (Linux) touching a new array takes several times as long as everything else here.
    images = torch.empty(levels.shape, dtype=dtype)
    if dtype == torch.uint8:
        np.copyto(images.numpy(), levels)
    else:
        np.divide(levels, np.float32(scale), out=images.numpy())
    return images


def load_mnist(split: str = "train", dtype: torch.dtype = torch.float32) -> Digits:
    """MNIST, from the files in the repository.

    :param split: one of :data:`SPLITS`; ``"train"`` has 60,000 images, ``"test"`` 10,000.
    :param dtype: ``torch.float32`` for grey values in [0, 1] (0 is background), or ``torch.uint8``
        for the 256 levels as stored, a quarter of the memory; :func:`binarise` takes either.
    :returns: :class:`Digits` with ``images`` ``[N, 784]`` and ``labels`` ``[N]``, on the CPU.
    :raises ValueError: for an unknown split or another dtype.
    :raises DataError: if a file is missing or damaged, with the command that restores it.

    Source: LeCun, Bottou, Bengio and Haffner, *Gradient-based learning applied to document
    recognition*, 1998.

    >>> images, labels = load_mnist("test")
    >>> images.shape, images.dtype, labels[:5].tolist()
    (torch.Size([10000, 784]), torch.float32, [7, 2, 1, 0, 4])
    >>> round(images.mean().item(), 4), images.max().item()
    (0.1325, 1.0)
    """
    _check_choice(split, SPLITS, dtype)
    prefix, rows = SPLITS[split]
    images = _parse_mnist(f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
    labels = _parse_mnist(f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)
    if images.shape[1:] != (28, 28) or len(images) != len(labels) or len(images) < rows.stop:
        raise DataError(
            f"MNIST {prefix} files hold images of shape {images.shape} and {len(labels)} labels, "
            f"expected at least {rows.stop} of each, 28 x 28 pixels"
        )
    return Digits(
        images=_convert(images[rows].reshape(-1, 784), 255, dtype),
        labels=torch.from_numpy(labels[rows].astype(np.int64)),
    )


def _parse_mnist(name: str, dimensions: int) -> np.ndarray:
    levels = _parse_idx(read_bytes("mnist", name), f"mnist/{name}")
    if levels.ndim != dimensions:
        raise DataError(
            f"mnist/{name} has {levels.ndim} dimensions of shape {levels.shape}, "
            f"expected {dimensions}"
        )
    return levels


def binarise(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""A fresh binary image for each grey one: the Bernoulli draw of dynamic binarisation.

    .. math:: x_{ij} \sim \mathrm{Bernoulli}(g_{ij}), \qquad g_{ij} \in [0, 1],

    independently for each pixel. Call it on each batch at each visit, so that a training image of
    grey values stands for a distribution over binary images (Salakhutdinov and Murray 2008).

    :param images: grey values in [0, 1] of a floating dtype, or levels of dtype ``torch.uint8``,
        read as level / 255; any shape.
    :param generator: source of randomness, on the device of ``images``; ``None`` uses the global
        one.
    :returns: zeros and ones, of the shape and device of ``images``; its dtype, or float32 for
        levels.
    :raises TypeError: if ``images`` is neither floating nor uint8.
    :raises ValueError: if a grey value lies outside [0, 1] or is NaN. Checked on the CPU only:
        elsewhere the check would stall the device.

    >>> generator = torch.Generator().manual_seed(0)
    >>> binarise(torch.tensor([[0.0, 0.5, 0.5, 0.5, 1.0]]), generator)
    tensor([[0., 0., 1., 1., 1.]])
    """
    if images.dtype == torch.uint8:
        images = images / 255
    elif not images.is_floating_point():
        raise TypeError(
            f"images has dtype {images.dtype}; give grey values in [0, 1] of a floating dtype, "
            "or levels of dtype torch.uint8"
        )
    elif images.device.type == "cpu" and images.numel():
        low, high = images.detach().aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"images has values from {low.item():g} to {high.item():g}; grey values lie in "
                "[0, 1] (divide levels by 255 or pass them as torch.uint8)"
            )
    # float32 whatever the default dtype is, so that one seed stands for one draw.
    uniform = torch.rand(
        images.shape, generator=generator, device=images.device, dtype=torch.float32
    )
    return (uniform < images).to(images.dtype)


def load_mnist_binary(split: str = "test") -> Digits:
    """The one fixed binarisation of held-out MNIST images that every evaluation uses.

    It is ``binarise(load_mnist(split).images, torch.Generator().manual_seed(BINARY_SEED))``. On
    the CPU torch draws these numbers one after another from a Mersenne twister with integer
    arithmetic, so that they are the same on every platform and with any number of threads; the
    digest of the bits is compared all the same. Row i of any per-image array in ``data/results``
    belongs to row i of the test images.

    :param split: ``"test"``, or one of the validation splits. Training images are drawn afresh at
        each visit with :func:`binarise`.
    :returns: :class:`Digits` whose float32 ``images`` ``[N, 784]`` hold zeros and ones.
    :raises ValueError: for a training split or an unknown one.
    :raises DataError: if a file is missing or damaged, or if this platform's generator departs.

    >>> images = load_mnist_binary("test").images
    >>> images.shape, images.unique().tolist(), int(images.sum())
    (torch.Size([10000, 784]), [0.0, 1.0], 1038272)
    """
    _check_choice(split, _BINARY_SHA256)
    grey, labels = load_mnist(split)
    images = binarise(grey, torch.Generator().manual_seed(BINARY_SEED))
    sha256 = hashlib.sha256(np.packbits(images.numpy().astype(bool)).tobytes()).hexdigest()
    if sha256 != _BINARY_SHA256[split]:
        raise DataError(
            f"the fixed binarisation of MNIST {split} has SHA-256 {sha256}, expected "
            f"{_BINARY_SHA256[split]}: torch {torch.__version__} draws other uniform numbers on "
            "this platform, and evaluations here would not compare with any other. Use the torch "
            "version that requirements.lock names."
        )
    return Digits(images, labels)


def load_static_mnist(split: str = "train", dtype: torch.dtype = torch.float32) -> Tensor:
    """Statically binarised MNIST, fetched at first use (110 MB).

    The benchmark files of Larochelle and Murray (2011): 50,000 training, 10,000 validation and
    10,000 test images whose pixels were drawn once and for all. They have no labels, and their
    order is their own: rows cannot be paired with those of :func:`load_mnist`.

    :param split: ``"train"``, ``"valid"`` or ``"test"``.
    :param dtype: ``torch.float32`` or, for a quarter of the memory, ``torch.uint8``.
    :returns: zeros and ones, ``[N, 784]``, on the CPU.
    :raises ValueError: for an unknown split or another dtype.
    :raises DataError: if a file is damaged or cannot be downloaded.

    >>> load_static_mnist("training")
    Traceback (most recent call last):
    ...
    ValueError: unknown split 'training'; choose from train, valid, test
    """
    _check_choice(split, _STATIC_FILES, dtype)
    name = _STATIC_FILES[split]
    # A row is 784 digits, each followed by a blank or, at the end, by a line feed.
    raw = np.frombuffer(read_bytes("mnist_static", name), np.uint8)
    if raw.size == 0 or raw.size % 1568:
        raise DataError(f"mnist_static/{name} holds {raw.size} bytes, expected rows of 1568")
    values = raw.reshape(-1, 1568)[:, ::2] - ord("0")
    if values.max() > 1:
        raise DataError(f"mnist_static/{name} holds other digits than 0 and 1")
    return _convert(values, 1, dtype)


# ------------------------------------------------------------------------------------ command line


def _state(file: _File) -> tuple[str, str]:
    """``("good" | "absent" | "bad", explanation)`` for one file."""
    try:
        path = _find_or_refuse(file)
        if path is None:
            return "absent", "not fetched"
        _verify(file, path)
    except DataError as error:
        return "bad", str(error)
    return "good", str(path)


def main(arguments: list[str] | None = None) -> int:
    """Command line ``python -m amortised.data list | fetch NAME... | verify [NAME...]``.

    :param arguments: words after the program's name; ``None`` takes those of the process.
    :returns: exit status: 0, or 1 if a file is missing, damaged or cannot be fetched.

    >>> main(["list"])
    mnist         embedded  11.6 MB  CC BY-SA 3.0...
    0
    """
    parser = argparse.ArgumentParser(
        prog="python -m amortised.data", description="List, fetch and check the data sets."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the data sets with their sizes and licences")
    fetching = commands.add_parser("fetch", help="download what is not at hand; mend the cache")
    fetching.add_argument("names", nargs="+", metavar="NAME")
    verifying = commands.add_parser("verify", help="compare every file at hand with its digest")
    verifying.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args(arguments)
    try:
        tables = registry()
        names = getattr(options, "names", []) or sorted(tables)
        unknown = [name for name in names if name not in tables]
        if unknown:
            parser.error(f"unknown data set {', '.join(unknown)}; choose from {', '.join(tables)}")
        if options.command == "list":
            for name in names:
                size = sum(file.size or 0 for file in _files(name)) / 1e6
                kind = "embedded" if tables[name].get("embedded") else "fetched"
                licence = tables[name]["licence"]
                print(f"{name:<12}  {kind:<8} {size:>6.1f} MB  {licence}")
        elif options.command == "fetch":
            for name in names:
                for path in fetch(name, replace=True).values():
                    print(path)
        else:
            states = [(file, *_state(file)) for name in names for file in _files(name)]
            for file, state, explanation in states:
                print(f"{state:<6}  {file.dataset}/{file.name}  {explanation}")
            return int(any(state == "bad" for _, state, _ in states))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
