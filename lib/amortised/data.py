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

The loaders need neither pydantic nor pooch: the first checks the registry's format, in
:func:`registry` and on the command line, the second downloads.

From a shell: ``python -m amortised.data list``, ``fetch NAME`` and ``verify [NAME]``.
"""

import gzip
import hashlib
import lzma
import math
import os
import shlex
import sys
import tarfile
import tempfile
import tomllib
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch

from .commands import Parser, command, stop, tidy
from .files import atomic_write

#: Splits of MNIST: the file an image comes from and its rows there.
#:
#: ``train_50000`` and ``valid_10000`` cut the training file in order; ``train_55000`` and
#: ``valid_5000`` are TensorFlow's tutorial split, which holds out the *first* 5,000 images and
#: which adversarial variational Bayes uses; ``train_59600`` and ``valid_400`` are the split of the
#: importance-weighted autoencoder's code.
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

#: Seed of the one fixed binarisation of the held-out images (:func:`load_mnist_binary`).
BINARY_SEED = 784

# SHA-256 of the packed bits (numpy.packbits) of each fixed binarisation. The test images are the
# common yardstick of every evaluation, so a platform that drew other bits must be found out.
_BINARY_SHA256 = {
    "test": "8936d0655d97f824740c81f297346e485c37d5472ec5385f00f09158e21f91fd",
    "valid_10000": "615cd5c6db11da7693cb4145df3680ef9f95d9e75166fce490c2e034fb18638f",
    "valid_5000": "67acee4e7512ea8d6f618b0d1c715599495a8a9687c310c1280727099decc1ee",
    "valid_400": "e4a6eaff2faa2d6f89088f199e06531c75eb97e713e937b563d8903e90c70140",
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

    images: torch.Tensor
    labels: torch.Tensor


class _File(NamedTuple):
    """One file of the registry."""

    dataset: str
    addresses: list[str]
    embedded: bool
    name: str
    size: int | None = None
    sha256: str | None = None
    archive: dict | None = None

    def __str__(self) -> str:
        return f"{self.dataset}/{self.name}"


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
        "Install the package from a checkout with `pip install -e .`, or work inside the checkout."
    )


def cache_folder() -> Path:
    """Folder for downloaded files: ``$AMORTISED_CACHE_DIR``, or the operating system's cache.

    Without pooch, which knows that cache on each system, it is ``~/.cache/amortised``.

    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, AMORTISED_CACHE_DIR="/scratch/cache"):
    ...     cache_folder().as_posix()
    '/scratch/cache'
    """
    try:
        from pooch import os_cache

        default = os_cache("amortised")
    except ImportError:
        default = "~/.cache/amortised"
    return Path(os.environ.get("AMORTISED_CACHE_DIR") or default).expanduser().absolute()


def registry() -> dict:
    """The data sets of ``data/registry.toml``, checked against the registry's format.

    :returns: a :class:`amortised.schemas.DataSet` for each name.
    :raises DataError: if there is no registry or it is not TOML.
    :raises amortised.schemas.FormatError: if it departs from its format; the message lists all
        that is wrong.

    >>> {"mnist", "mnist_static"} <= registry().keys()
    True
    >>> registry()["mnist"].licence
    'CC BY-SA 3.0, https://creativecommons.org/licenses/by-sa/3.0/'
    """
    from . import schemas

    return schemas.validate(schemas.Registry, _tables(), data_folder() / "registry.toml")


def _tables() -> dict[str, dict]:
    path = data_folder() / "registry.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not TOML: {error}. Restore it with git checkout.") from error


def _files(dataset: str) -> list[_File]:
    tables = _tables()
    if dataset not in tables:
        raise ValueError(f"unknown data set {dataset!r}; choose from {', '.join(sorted(tables))}")
    table = tables[dataset]
    place = dataset, table["addresses"], table.get("embedded", False)
    archive = table.get("archive")
    files = [_File(*place, **entry, archive=archive) for entry in table["files"]]
    return [file if file.sha256 else file._replace(sha256=_noted_sha256(file)) for file in files]


def _noted_sha256(file: _File) -> str | None:
    """Digest noted at the first download of a file whose source publishes none."""
    note = cache_folder() / f"{file}.sha256"
    return note.read_text(encoding="utf-8").strip() if note.is_file() else None


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
    files = [file for dataset in datasets for file in _files(dataset)]
    found = {str(file): file.sha256 for file in files if file.sha256 is not None}
    return found | ({"mnist/binary-test": _BINARY_SHA256["test"]} if "mnist" in datasets else {})


# ------------------------------------------------------------------- finding and checking one file


def _places(file: _File) -> Iterator[Path]:
    local = os.environ.get("AMORTISED_DATA_DIR")
    if local and not Path(local).expanduser().is_dir():
        raise DataError(f"AMORTISED_DATA_DIR={local} is not a folder. Create it or unset it.")
    if local:
        yield Path(local).expanduser().absolute()
    if file.embedded:
        yield data_folder()
    yield cache_folder()


def _find(file: _File) -> Path | None:
    """The first place that has the file, plain or packed with xz; its bytes are not yet checked."""
    paths = (folder / f"{file}{ending}" for folder in _places(file) for ending in ("", ".xz"))
    return next(filter(Path.is_file, paths), None)


def _checked(file: _File, path: Path | None) -> bytes | None:
    """The unpacked bytes of a file, those of the registry; ``None`` if it must be downloaded."""
    if path is None and not file.embedded:
        return None
    path = path or data_folder() / str(file)  # an embedded file that is missing
    try:
        with path.open("rb") if path.name == file.name else lzma.open(path) as stream:
            raw = _at_most(stream, file.size)
    except (lzma.LZMAError, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}. {_remedy(file, path)}") from error
    sha256 = hashlib.sha256(raw).hexdigest()
    if file.size not in (None, len(raw)) or file.sha256 not in (None, sha256):
        raise DataError(
            f"{path} does not hold {file} as the registry describes it:\n"
            f"  size    {len(raw)} bytes, expected {file.size}\n"
            f"  SHA-256 {sha256}, expected {file.sha256}\n{_remedy(file, path)}"
        )
    return raw


def _at_most(stream: IO[bytes], size: int | None) -> bytes:
    """What a file holds, or one byte more than it should: enough to find that it is another."""
    return stream.read(-1 if size is None else size + 1)


def _remedy(file: _File, path: Path) -> str:
    fetching = f"python -m amortised.data fetch {file.dataset}"
    if path.is_relative_to(data_folder()):
        git = f"git -C {shlex.quote(str(data_folder()))} checkout -- {file.dataset}/{path.name}"
        return f"Mend it with: {git} (or, with no file there: {fetching})"
    if path.is_relative_to(cache_folder()):
        return f"Mend it with: {fetching}"
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
    files = {file.name: file for file in _files(dataset)}
    if name not in files:
        raise ValueError(f"data set {dataset!r} has no file {name!r}, but {', '.join(files)}")
    raw = _checked(files[name], _find(files[name]))
    return _download(files[name]).read_bytes() if raw is None else raw


# ------------------------------------------------------------------------------------- downloading


def fetch(dataset: str, *, replace: bool = False, retries: int = 2) -> dict[str, Path]:
    """Make sure that every file of a data set is at hand, and check each against its digest.

    What is nowhere is downloaded, which pooch announces on standard error, with a progress bar if
    that is a terminal.

    :param dataset: name of a data set in the registry.
    :param replace: download a damaged file of the cache folder anew instead of stopping; files
        elsewhere are never touched.
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
        try:
            _checked(file, path)
        except DataError as error:
            if path is not None and not (replace and path.is_relative_to(cache_folder())):
                raise
            print(f"{error}\nDownloading it.", file=sys.stderr)
            path = None
        paths[file.name] = path or _download(file, retries)
    return paths


def _download(file: _File, retries: int = 2) -> Path:
    """Download one file into the cache folder, trying each address in turn."""
    folder = cache_folder() / file.dataset
    failures = []
    for address in file.addresses:
        try:
            import pooch

            wanted = file.archive or {"name": file.name, "sha256": file.sha256}
            path = folder / wanted["name"]
            if not (path.is_file() and pooch.file_hash(path) == wanted["sha256"]):
                _download_from(address, path, wanted["sha256"], retries)
            if file.archive:
                with tarfile.open(path) as packed:
                    member = packed.extractfile(f"{file.archive['folder']}/{file.name}")
                    path = folder / file.name
                    atomic_write(path, _at_most(member, file.size))
                _checked(file, path)
            if file.sha256 is None:
                atomic_write(folder / f"{path.name}.sha256", pooch.file_hash(path).encode())
            return path
        except (ImportError, KeyError, ValueError, OSError) as error:  # network, disk, archive
            failures.append(f"\n  {address}{file.name}: {error}")
    raise DataError(
        f"{file} could not be downloaded (expected SHA-256 {file.sha256}):{''.join(failures)}\n"
        f"Try again with `python -m amortised.data fetch {file.dataset}`, which needs pooch (`pip "
        f"install pooch`) and room in {folder} (AMORTISED_CACHE_DIR names another folder), "
        f"or put it into a folder {file.dataset}/ and name the one above it in AMORTISED_DATA_DIR."
    )


def _download_from(address: str, path: Path, sha256: str | None, retries: int) -> None:
    """Download one file from one address; until it is complete and right it lies in a folder of its
    own, and those of processes that were killed are removed."""
    import pooch

    path.parent.mkdir(parents=True, exist_ok=True)
    own = tidy(path.parent, f".download-{os.uname().nodename}-")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=own) as scratch:
        known = {path.name: sha256}
        source = pooch.create(scratch, address, registry=known, retry_if_failed=retries)
        downloader = pooch.HTTPDownloader(sys.stderr.isatty(), chunk_size=2**18, timeout=30)
        os.replace(source.fetch(path.name, downloader=downloader), path)


# ------------------------------------------------------------------------------------------- MNIST


def _parse_idx(name: str, *shape: int) -> torch.Tensor:
    """The uint8 tensor ``[*shape]`` of one file of MNIST."""
    header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4) for size in shape)
    size = len(header) + math.prod(shape)
    try:  # with its unpacked size zlib fills one buffer and joins nothing
        raw = zlib.decompress(read_bytes("mnist", name), wbits=31, bufsize=size)
    except zlib.error as error:
        raise DataError(f"mnist/{name} is not a whole gzip file: {error}") from error
    if len(raw) != size or not raw.startswith(header):
        raise DataError(
            f"mnist/{name} unpacks to {len(raw)} bytes that start with {raw[: len(header)].hex()}, "
            f"expected {size} that start with {header.hex()}: an idx file of shape {shape}"
        )
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=len(header)).reshape(shape)


def _check_choice(split: str, splits: object, dtype: torch.dtype = torch.float32) -> None:
    if split not in splits:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(splits)}")
    if dtype not in (torch.float32, torch.uint8):
        raise ValueError(f"dtype {dtype} is not served; choose torch.float32 or torch.uint8")


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
    count = 60_000 if prefix == "train" else 10_000
    levels = _parse_idx(f"{prefix}-images-idx3-ubyte.gz", count, 28, 28)[rows].flatten(1)
    labels = _parse_idx(f"{prefix}-labels-idx1-ubyte.gz", count)[rows].long()
    return Digits(levels.clone() if dtype == torch.uint8 else levels.float().div_(255), labels)


def binarise(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
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
        raise TypeError(f"images has dtype {images.dtype}; give a floating one or torch.uint8")
    elif images.device.type == "cpu" and images.numel():
        low, high = images.detach().aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"images has values from {low:g} to {high:g}, not in [0, 1]; divide levels by 255"
            )
    # float32 whatever the default dtype is, so that one seed stands for one draw.
    draws = torch.rand(images.shape, generator=generator, device=images.device, dtype=torch.float32)
    return (draws < images).to(images.dtype)


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
            f"{_BINARY_SHA256[split]}: torch {torch.__version__} draws other numbers here. Use the "
            "version that requirements.lock names."
        )
    return Digits(images, labels)


def drawn_images(num_images: int, image_seed: int | None = None) -> torch.Tensor:
    """Which of the 10,000 test images an evaluation uses: random ones, the same for every method.

    :param num_images: n; fewer images are the first of more.
    :param image_seed: of the drawing, without replacement; ``None`` takes the first n images, which
        are some three nats easier than the average one.
    :return: their numbers, ``[n]``.
    :raises ValueError: if n is not between 1 and 10,000.

    >>> drawn_images(3), drawn_images(3, image_seed=2017)
    (tensor([0, 1, 2]), tensor([3483, 9356,  296]))
    """
    if not 1 <= num_images <= 10_000:
        raise ValueError(f"num_images must be from 1 to 10,000, the test images; got {num_images}")
    if image_seed is None:
        return torch.arange(num_images)
    generator = torch.Generator().manual_seed(image_seed)
    return torch.randperm(10_000, generator=generator)[:num_images]


def load_static_mnist(split: str = "train", dtype: torch.dtype = torch.float32) -> torch.Tensor:
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
    _check_choice(split, ("train", "valid", "test"), dtype)
    name = f"binarized_mnist_{split}.amat"
    raw = read_bytes("mnist_static", name)
    # A row is 784 digits, each followed by a blank or, at the end, by a line feed.
    if not raw or len(raw) % 1568 or raw[::2].strip(b"01"):
        raise DataError(f"mnist_static/{name}, {len(raw)} bytes, is not rows of 784 digits 0 or 1")
    digits = torch.frombuffer(bytearray(raw[::2]), dtype=torch.uint8).view(-1, 784)
    return (digits - ord("0")).to(dtype)


# ------------------------------------------------------------------------- colour images and words


def load_cifar10(split: str = "train") -> torch.Tensor:
    """CIFAR-10, fetched at first use (170 MB).

    :param split: ``"train"`` (50,000 images) or ``"test"`` (10,000).
    :returns: levels 0 to 255, ``[N, 3072]``, uint8: the red plane of 32 x 32 pixels row by row,
        then the green and the blue one. See :func:`dequantise`.
    :raises ValueError: for an unknown split.
    :raises DataError: if a file is damaged or cannot be downloaded.
    """
    _check_choice(split, ("train", "test"))
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    raw = bytearray(b"".join(read_bytes("cifar10", name) for name in names))
    return torch.frombuffer(raw, dtype=torch.uint8).view(-1, 3073)[:, 1:].clone()


def dequantise(levels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    r"""Real images from levels: :math:`x = (v + u) / 256` with u uniform on [0, 1).

    A density p of x gives a probability of the levels of at least
    :math:`\mathbb{E}_u[\log p(x)] - P \log 256` nats (Theis, van den Oord and Bethge 2016).

    :param levels: ``[..., P]``, uint8.

    >>> dequantise(torch.full((1000,), 255, dtype=torch.uint8)).max() <= 1
    tensor(True)
    """
    noise = torch.rand(levels.shape, generator=generator, device=levels.device)
    return (levels + noise) / 256


def load_newsgroups(split: str = "train") -> torch.Tensor:
    """20 Newsgroups as counts of 1,995 words, fetched at first use (6 MB).

    Each line of a file is a label and pairs ``word:count``; words are numbered from 1. The one
    document of each split that has none of the words is left out.

    :param split: ``"train"`` (11,258 documents) or ``"test"`` (7,487).
    :returns: float32 ``[N, 1995]``.
    :raises ValueError: for an unknown split.
    :raises DataError: if a file is damaged or cannot be downloaded.
    """
    _check_choice(split, ("train", "test"))
    lines = read_bytes("20news", f"{split}.feat").decode().splitlines()
    counts = torch.zeros(len(lines), 1995)
    for row, line in enumerate(lines):
        pairs = [pair.split(":") for pair in line.split()[1:]]
        counts[row, [int(word) - 1 for word, _ in pairs]] = torch.tensor(
            [float(c) for _, c in pairs]
        )
    return counts[counts.sum(1) > 0]


def load_rcv1(
    split: str = "train", num_words: int = 10_000, num_held_out: int = 10_000, seed: int = 0
) -> torch.Tensor:
    r"""RCV1 as counts of its most frequent words, from the public token files (fetched, 0.7 GB).

    The files ``test_pt0`` to ``test_pt3`` and ``train`` are joined in this order, 804,414 stories
    in all. Words are ranked by their count over all stories, ties by the alphabet. A random
    ``num_held_out`` stories are the test set; stories without any of the words are left out.

    :param split: ``"train"`` or ``"test"``.
    :param num_words: P.
    :param num_held_out: stories of the test set.
    :param seed: of their choice, by ``torch.randperm``.
    :returns: a sparse COO tensor of float32 counts, ``[N, P]``; rows by ``index_select``.
    :raises ValueError: for an unknown split.
    :raises DataError: if a file cannot be downloaded, or is not of that form.
    """
    _check_choice(split, ("train", "test"))
    names = [*(f"test_pt{part}" for part in range(4)), "train"]
    stories: list[Counter] = []
    for name in names:
        text = gzip.decompress(read_bytes("rcv1", f"lyrl2004_tokens_{name}.dat.gz")).decode()
        for story in text.split(".I ")[1:]:
            number, mark, words = story.partition("\n.W\n")
            if not (mark and number.strip().isdigit()):
                raise DataError(f"rcv1/{name}: a story must be '.I number', '.W', words")
            stories.append(Counter(words.split()))
    totals = Counter()
    for story in stories:
        totals.update(story)
    ranked = sorted(totals, key=lambda word: (-totals[word], word))[:num_words]
    index = {word: rank for rank, word in enumerate(ranked)}
    order = torch.randperm(len(stories), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = order[:num_held_out] if split == "test" else order[num_held_out:]
    found = [[(index[w], n) for w, n in stories[i].items() if w in index] for i in sorted(chosen)]
    found = [pairs for pairs in found if pairs]
    rows = [row for row, pairs in enumerate(found) for _ in pairs]
    columns = [column for pairs in found for column, _ in pairs]
    values = torch.tensor([float(n) for pairs in found for _, n in pairs])
    size = (len(found), len(ranked))
    return torch.sparse_coo_tensor(torch.tensor([rows, columns]), values, size).coalesce()


# ------------------------------------------------------------------------------------ command line


def main(arguments: list[str] | None = None) -> int:
    """Command line ``python -m amortised.data list | fetch | verify [NAME...]``.

    :param arguments: words after the program's name; ``None`` takes those of the process.
    :returns: exit status: 0, 1 if a file is damaged or cannot be fetched or an embedded one is
        missing, or 2 if a name is unknown or the registry departs from its format.

    >>> main(["list", "mnist"])
    mnist         embedded  11.6 MB  CC BY-SA 3.0...
    0
    """
    parser = Parser("python -m amortised.data", description="The data sets.")
    parser.add_argument("command", choices=["list", "fetch", "verify"])
    parser.add_argument("names", nargs="*", metavar="NAME", help="data sets; by default all")
    options = parser.parse_args(arguments)
    try:
        tables = registry()
        chosen = {name: _files(name) for name in options.names or sorted(tables)}
        if options.command == "verify":
            return int(not all([_verify(file) for files in chosen.values() for file in files]))
        for name, files in chosen.items():
            if options.command == "fetch":
                print(*fetch(name, replace=True).values(), sep="\n")
            else:
                size = sum(file.size or 0 for file in files) / 1e6
                kind = "embedded" if tables[name].embedded else "fetched"
                print(f"{name:<12}  {kind:<8} {size:>6.1f} MB  {tables[name].licence}")
    except (DataError, ValueError) as error:
        return stop(f"error: {error}", 1 if isinstance(error, DataError) else 2)
    return 0


def _verify(file: _File) -> bool:
    """Print whether a file is good, absent or bad; ``False`` if it is bad."""
    try:
        path = _find(file)
        state = "absent" if _checked(file, path) is None else "good"
    except DataError as error:
        state, path = "bad", error
    print(f"{state:<6}  {file}  {path or 'not fetched'}")
    return state != "bad"


if __name__ == "__main__":
    command(main)
