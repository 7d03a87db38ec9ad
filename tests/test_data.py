"""Data sets: what the loaders return, and what they say when a file or a server misbehaves."""

import gzip
import hashlib
import http.server
import io
import lzma
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch

from amortised import data
from amortised.data import DataError
from amortised.schemas import FormatError

REPOSITORY_DATA = data.data_folder()
LOCAL_DATA = os.environ.get("AMORTISED_DATA_DIR", "")
CONTENT = bytes(range(256)) * 400


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch, tmp_path):
    """No test reads or writes the reader's own cache or local data."""
    monkeypatch.delenv("AMORTISED_DATA_DIR", raising=False)
    monkeypatch.setenv("AMORTISED_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def digest(content):
    return hashlib.sha256(content).hexdigest()


def entry(name="a.bin", content=CONTENT, size=True, sha256=True):
    lines = ["[[toy.files]]", f'name = "{name}"']
    lines += [f"size = {len(content)}"] * size + [f'sha256 = "{digest(content)}"'] * sha256
    return "\n".join(lines)


def registry_text(*files, addresses=(), extra=""):
    head = '[toy]\ntitle = "toy"\nlicence = "none"\ncitation = "none"'
    return "\n".join([head, f"addresses = {list(addresses)!r}", extra, *(files or [entry()])])


def python(program):
    """What a program prints that runs in a process of its own."""
    return subprocess.check_output([sys.executable, "-c", textwrap.dedent(program)], text=True)


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A data folder of the test's own in place of the repository's; call it with a registry."""
    folder = tmp_path / "repository/data"
    folder.mkdir(parents=True)
    monkeypatch.setattr(data, "data_folder", lambda: folder)

    def write(text):
        (folder / "registry.toml").write_text(text)
        return folder

    return write


@pytest.fixture
def mnist_copy(repository):
    """A copy of the repository's MNIST that a test may damage."""
    folder = repository((REPOSITORY_DATA / "registry.toml").read_text())
    shutil.copytree(REPOSITORY_DATA / "mnist", folder / "mnist")
    return folder / "mnist"


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends the bytes that its server holds for a path, or calls the function it holds."""

    def do_GET(self):
        self.server.requests.append(self.path)
        answer = self.server.answers.get(self.path, lambda handler: handler.send_error(404))
        answer(self) if callable(answer) else self.send(answer)

    def send(self, content, announced=None):
        self.send_response(200)
        self.send_header("Content-Length", str(announced or len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """A web server on the loopback interface."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.answers, running.requests = {"/a.bin": CONTENT}, []
        running.address = f"http://127.0.0.1:{running.server_port}/"
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def toy(repository, server):
    """A data set of one file, which the server holds; its data folder."""
    return repository(registry_text(addresses=[server.address]))


def cached(tmp_path):
    """Names of all files in the cache folder, temporary ones included."""
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


def refused(message):
    """The toy's file is refused, by whatever way it is asked for."""
    for use in (data.fetch, lambda dataset: data.read_bytes(dataset, "a.bin")):
        with pytest.raises(DataError, match=message):
            use("toy")


# ----------------------------------------------------------------------------------------- MNIST


def test_mnist_has_its_shapes_and_values():
    images, labels = data.load_mnist("train")
    assert images.shape == (60_000, 784) and images.dtype == torch.float32
    assert labels.shape == (60_000,) and labels.dtype == torch.int64
    assert (images.min(), images.max()) == (0.0, 1.0)
    # Class counts that LeCun's page has published since 1998.
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert labels.bincount().tolist() == counts
    assert images.mean().item() == pytest.approx(0.1307, abs=5e-5)  # the usual normalisation
    assert images.double().std().item() == pytest.approx(0.3081, abs=5e-5)


def test_levels_are_the_grey_values_before_division():
    grey, levels = data.load_mnist("test").images, data.load_mnist("test", torch.uint8).images
    assert levels.dtype == torch.uint8 and torch.equal(grey, levels / 255)
    levels[0] = 0  # writable, and no view of anything shared
    assert data.load_mnist("test", torch.uint8).images[0].any()


@pytest.mark.parametrize(
    "splits", ["train_50000 valid_10000", "valid_5000 train_55000", "train_59600 valid_400"]
)
def test_splits_cut_the_training_file_as_their_papers_do(splits):
    parts = [data.load_mnist(split, torch.uint8).images for split in splits.split()]
    assert [f"_{len(part)}" for part in parts] == re.findall(r"_\d+", splits)
    assert torch.equal(torch.cat(parts), data.load_mnist("train", torch.uint8).images)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (data.load_mnist, ["validation"], r"unknown split 'validation'; choose from .*test"),
        (data.load_mnist_binary, ["train"], r"unknown split 'train'; choose from test, valid"),
        (data.load_mnist, ["test", torch.float16], r"torch\.float16 is not served; choose torch"),
        (data.fetch, ["mnits"], r"unknown data set 'mnits'; choose from 20news, cifar10, mnist, "),
        (data.read_bytes, ["mnist", "b"], r"data set 'mnist' has no file 'b', but train-images"),
    ],
)
def test_what_is_not_there_lists_the_choices(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


def test_all_of_mnist_loads_fast_and_small():
    """First load of a process under 0.5 s of processor time, peak under 400 MB above the import.

    The first load pays for memory that no earlier one has touched, so a second one in the same
    process says nothing about it. Best of three processes, because other work disturbs the clock.
    """
    program = """
        import resource, sys, time, torch
        from amortised.data import load_mnist
        torch.set_num_threads(1)
        unit = 2**20 if sys.platform == "darwin" else 2**10
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        before, start = peak(), time.process_time()
        both = load_mnist("train"), load_mnist("test")
        print(time.process_time() - start, peak() - before)
    """
    found = [[float(word) for word in python(program).split()] for _ in range(3)]
    assert all(megabytes < 400 for _, megabytes in found)
    assert min(seconds for seconds, _ in found) < 0.5


def test_loaders_need_neither_network_nor_what_a_training_machine_lacks():
    """Such a machine has torch, numpy, safetensors, tqdm and filelock."""
    python("""
        import socket, sys
        lacking = ["pydantic", "pooch", "requests", "matplotlib", "scipy", "pandas", "yaml"]
        sys.modules |= dict.fromkeys(lacking)  # to import one is an ImportError
        def refuse(*_):
            raise AssertionError("network used")
        socket.socket.connect = refuse
        from amortised import data, results
        data.load_mnist("test"), data.load_mnist_binary("valid_400"), data.fetch("mnist")
        data.digests("mnist", "mnist_static"), results.load_published("amc")
        ours = {name for name in sys.modules if name.startswith("amortised.")}
        needed = {"commands", "data", "files", "results"}
        assert ours == {f"amortised.{name}" for name in needed}, ours
    """)


# ---------------------------------------------------------------------------------- binarisation


def test_binarise_draws_each_pixel_with_its_grey_value():
    grey = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]).expand(40_000, 5)
    drawn = data.binarise(grey, torch.Generator().manual_seed(1))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    probability = grey[0]
    standard_error = (probability * (1 - probability) / len(grey)).sqrt()
    assert torch.all((drawn.mean(0) - probability).abs() <= 4 * standard_error)


def test_binarise_is_fresh_each_time_and_repeats_with_its_seed():
    grey = data.load_mnist("test").images[:100]
    generator = torch.Generator().manual_seed(3)
    first, second = data.binarise(grey, generator), data.binarise(grey, generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, data.binarise(grey, torch.Generator().manual_seed(3)))
    state = torch.get_rng_state()
    data.binarise(grey, generator)
    assert torch.equal(state, torch.get_rng_state())


def test_binarise_takes_levels_and_keeps_a_floating_dtype():
    levels = data.load_mnist("test", torch.uint8).images[:50]
    of_grey, of_levels, of_double = (
        data.binarise(images, torch.Generator().manual_seed(3))
        for images in (levels / 255, levels, (levels / 255).double())
    )
    assert of_levels.dtype == torch.float32 and of_double.dtype == torch.float64
    assert torch.equal(of_grey, of_levels)
    assert torch.equal(of_grey, of_double.float())


def test_binarise_refuses_what_is_no_grey_value():
    with pytest.raises(ValueError, match=r"values from 0 to 255, not in \[0, 1\]"):
        data.binarise(torch.tensor([0.0, 255.0]))
    with pytest.raises(ValueError, match="nan"):
        data.binarise(torch.tensor([0.5, float("nan")]))
    with pytest.raises(TypeError, match=r"dtype torch\.int64"):
        data.binarise(torch.tensor([0, 1]))


def test_fixed_binarisation_is_what_a_mersenne_twister_written_elsewhere_draws():
    """NumPy's MT19937 gives the same bits, so they hang on integers alone, not on torch."""
    images, labels = data.load_mnist_binary("test")
    words = np.random.RandomState(data.BINARY_SEED).randint(0, 2**32, 7_840_000, dtype=np.uint32)
    uniform = (words & 0xFFFFFF).astype(np.float64) / 2**24
    levels = data.load_mnist("test", torch.uint8).images.numpy().astype(np.float64).ravel()
    expected = (uniform * 255 < levels).reshape(10_000, 784)  # exact: 32 bits in a double
    assert np.array_equal(images.numpy().astype(bool), expected)
    assert torch.equal(labels, data.load_mnist("test").labels)
    sha256 = "8936d0655d97f824740c81f297346e485c37d5472ec5385f00f09158e21f91fd"
    assert digest(np.packbits(expected).tobytes()) == sha256
    assert data.digests("mnist")["mnist/binary-test"] == sha256


def test_fixed_binarisation_ignores_threads_seeds_and_default_dtype():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(99)
        found = data.load_mnist_binary("valid_400").images
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, data.load_mnist_binary("valid_400").images)


@pytest.mark.parametrize("split", ["test", "valid_10000", "valid_5000", "valid_400"])
def test_fixed_binarisation_is_checked(split, monkeypatch):
    assert data.load_mnist_binary(split).images.mean() == pytest.approx(0.13, abs=0.01)
    monkeypatch.setattr(data, "BINARY_SEED", 785)  # as a platform with other random numbers
    with pytest.raises(DataError, match=r"fixed binarisation of MNIST .* has SHA-256 .* expected"):
        data.load_mnist_binary(split)


# -------------------------------------------------------------------------- damaged embedded files


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink])
def test_damaged_embedded_file_names_both_digests_and_the_command_that_mends_it(mnist_copy, damage):
    git = ["git", "-C", str(mnist_copy.parents[1]), "-c", "user.name=t", "-c", "user.email=t@t"]
    for words in (["init", "-q"], ["add", "data"], ["commit", "-q", "-m", "data"]):
        subprocess.run([*git, *words], check=True)
    path = mnist_copy / "t10k-images-idx3-ubyte.gz"
    damage(path)
    with pytest.raises(DataError) as caught:
        data.load_mnist("test")
    message = str(caught.value)
    assert str(path) in message
    if damage is not Path.unlink:
        assert f"size    {path.stat().st_size} bytes, expected 1648877" in message
        assert digest(path.read_bytes()) in message
        assert "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6" in message
    command = re.search(r"Mend it with: (git .+?) \(or", message)[1]
    subprocess.run(shlex.split(command), check=True, capture_output=True)
    assert data.load_mnist("test").images.shape == (10_000, 784)


def test_missing_embedded_file_is_never_downloaded_behind_the_readers_back(mnist_copy, server):
    registry = mnist_copy.parent / "registry.toml"
    text = re.sub(r'"https://[^"]+/mnist/"', f'"{server.address}"', registry.read_text())
    registry.write_text(text)
    name = "t10k-labels-idx1-ubyte.gz"
    server.answers[f"/{name}"] = (mnist_copy / name).read_bytes()
    (mnist_copy / name).unlink()
    with pytest.raises(DataError, match=r"idx1-ubyte\.gz cannot be read: .*No such file"):
        data.load_mnist("test")
    assert server.requests == []
    data.fetch("mnist")  # the other command that the message names
    assert len(data.load_mnist("test").labels) == 10_000


HEADER = bytes.fromhex("00000803000027100000001c0000001c")


@pytest.mark.parametrize(
    ("unpacked", "kept", "message"),
    [
        (b"PK\x03\x04" + bytes(7_840_012), None, r"start with 504b0304.*, expected 7840016"),
        (HEADER + bytes(784), None, r"to 800 bytes .* idx file of shape \(10000, 28, 28\)"),
        (b"", None, r"to 0 bytes that start with , expected"),
        (HEADER + bytes(784), -9, r"not a whole gzip file"),
    ],
    ids=["start", "short", "empty", "gzip"],
)
def test_malformed_idx_file_with_a_matching_digest(mnist_copy, unpacked, kept, message):
    packed = gzip.compress(unpacked)[:kept]
    text = (REPOSITORY_DATA / "registry.toml").read_text()
    published = "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    text = text.replace("size = 1648877", "").replace(published, digest(packed))
    (mnist_copy.parent / "registry.toml").write_text(text)
    (mnist_copy / "t10k-images-idx3-ubyte.gz").write_bytes(packed)
    with pytest.raises(DataError, match=message):
        data.load_mnist("test")


# ------------------------------------------------------------------------------------ local folder


def test_local_folder_comes_first_and_its_damage_is_not_passed_over(monkeypatch, tmp_path):
    shutil.copytree(REPOSITORY_DATA / "mnist", tmp_path / "mnist")
    monkeypatch.setenv("AMORTISED_DATA_DIR", str(tmp_path))
    path = tmp_path / "mnist/t10k-images-idx3-ubyte.gz"
    assert data.fetch("mnist")[path.name] == path
    _flip(path)
    with pytest.raises(DataError, match=rf"(?s){path}.*unset AMORTISED_DATA_DIR"):
        data.load_mnist("test")
    monkeypatch.setenv("AMORTISED_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"AMORTISED_DATA_DIR=.*nowhere is not a folder"):
        data.load_mnist("test")


def test_packed_local_file_counts_by_its_unpacked_bytes(repository, monkeypatch, tmp_path):
    repository(registry_text())
    packed = tmp_path / "local/toy/a.bin.xz"
    packed.parent.mkdir(parents=True)
    packed.write_bytes(lzma.compress(CONTENT))
    monkeypatch.setenv("AMORTISED_DATA_DIR", str(tmp_path / "local"))
    assert data.fetch("toy") == {"a.bin": packed}
    assert data.read_bytes("toy", "a.bin") == CONTENT
    packed.write_bytes(lzma.compress(CONTENT + b"0"))
    refused("size    102401 bytes, expected 102400")
    packed.write_bytes(lzma.compress(CONTENT)[:-10])
    refused(r"a\.bin\.xz cannot be read")


# --------------------------------------------------------------------------------- static binarised


def test_static_mnist_reads_rows_of_digits(repository, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)  # not needed for what is at hand
    values = np.random.default_rng(0).integers(0, 2, (30, 784))
    content = "".join(" ".join(map(str, row)) + "\n" for row in values).encode()
    path = tmp_path / "cache/mnist_static/binarized_mnist_test.amat"
    path.parent.mkdir(parents=True)
    for held in (content[:-2], b"", content.replace(b"1", b"2"), content):
        repository(registry_text(entry(path.name, held)).replace("toy", "mnist_static"))
        path.write_bytes(held)
        if held is not content:
            with pytest.raises(DataError, match=f"{len(held)} bytes, is not rows of 784 digits 0"):
                data.load_static_mnist("test")
    for dtype in (torch.float32, torch.uint8):
        images = data.load_static_mnist("test", dtype)
        assert images.dtype == dtype and np.array_equal(images.numpy(), values)


@pytest.mark.skipif(not Path(LOCAL_DATA, "mnist_static").is_dir(), reason="no copy in the folder")
def test_static_mnist_is_the_published_benchmark(monkeypatch):
    monkeypatch.setenv("AMORTISED_DATA_DIR", LOCAL_DATA)
    for split, count in [("train", 50_000), ("valid", 10_000), ("test", 10_000)]:
        images = data.load_static_mnist(split)
        assert images.shape == (count, 784)
        assert images.mean().item() == pytest.approx(0.1315, abs=0.0015)
    # Each is a draw of some grey test image: off where that is 0, on where that is 255.
    grey, images = data.load_mnist("test").images, images[:100]
    contradictions = images @ (grey == 0).float().T + (1 - images) @ (grey == 1).float().T
    fewest, match = contradictions.min(1)
    assert fewest.max() == 0
    assert not torch.equal(match, torch.arange(100))  # in an order of their own


# ------------------------------------------------------------------------------------- downloading


def test_download_lands_in_the_cache_once_from_the_first_good_mirror(repository, server, tmp_path):
    mirrors = [f"{server.address}{place}/" for place in ("gone", "wrong", "good", "more")]
    repository(registry_text(addresses=mirrors))
    server.answers |= {"/wrong/a.bin": CONTENT[::-1], "/good/a.bin": CONTENT}
    assert data.fetch("toy", retries=0) == {"a.bin": tmp_path / "cache/toy/a.bin"}
    assert data.fetch("toy") == {"a.bin": tmp_path / "cache/toy/a.bin"}
    assert data.read_bytes("toy", "a.bin") == CONTENT
    assert server.requests == ["/gone/a.bin", "/wrong/a.bin", "/good/a.bin"]
    assert cached(tmp_path) == ["a.bin"]


def test_failed_download_says_what_was_met_at_each_address_and_leaves_nothing(
    repository, server, tmp_path
):
    places = [f"{server.address}{place}/" for place in ("wrong", "gone", "broken")]
    repository(registry_text(addresses=[*places, "http://127.0.0.1:9/"]))
    server.answers["/wrong/a.bin"] = CONTENT[::-1]
    server.answers["/broken/a.bin"] = lambda handler: handler.send(CONTENT[:-1], len(CONTENT))
    with pytest.raises(DataError) as caught:
        data.fetch("toy", retries=0)
    for part in (
        rf"toy/a\.bin could not be downloaded \(expected SHA-256 {digest(CONTENT)}\)",
        rf"wrong/a\.bin: .*{digest(CONTENT[::-1])}",
        r"gone/a\.bin: 404(.|\n)*broken/a\.bin: .*IncompleteRead(.|\n)*127.0.0.1:9/a\.bin: ",
        r"Try again with `python -m amortised\.data fetch toy`",
        r"put it into a folder toy/ and name the one above it in AMORTISED_DATA_DIR",
    ):
        assert re.search(part, str(caught.value)), part
    assert cached(tmp_path) == []


@pytest.mark.parametrize("damage", [_truncate, _flip])
def test_damaged_cache_is_an_error_until_the_named_command_mends_it(
    toy, server, tmp_path, damage, capsys
):
    path = data.fetch("toy")["a.bin"]
    damage(path)
    refused(r"Mend it with: python -m amortised\.data fetch toy")
    assert server.requests == ["/a.bin"]
    assert data.main(["fetch", "toy"]) == 0
    assert "Downloading it" in capsys.readouterr().err
    assert path.read_bytes() == CONTENT and cached(tmp_path) == ["a.bin"]


def test_cache_folder_that_cannot_be_made(toy, monkeypatch, tmp_path):
    (tmp_path / "blocked").write_text("a file, no folder; a full disk is an OSError as well")
    monkeypatch.setenv("AMORTISED_CACHE_DIR", str(tmp_path / "blocked/cache"))
    refused(r"(?s)Not a dir.*and room in .*blocked/cache/toy \(AMORTISED_CACHE_DIR names another")


def test_without_pooch_the_message_says_what_to_do(toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    refused(r"(?s)pip install pooch.*put it into a folder toy/")


FETCHING = """
import functools, sys
from pathlib import Path
from amortised import data
from amortised.commands import command

data.data_folder = lambda: Path(sys.argv[1])
command(functools.partial(data.main, ["fetch", "toy"]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_download_left_goes_with_the_next_and_that_of_a_living_one_stays(
    toy, server, tmp_path, monkeypatch, how
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    begun, ended = threading.Event(), threading.Event()

    def hang(handler):
        handler.send(CONTENT[:50_000], len(CONTENT))
        begun.set()
        ended.wait(60)

    server.answers["/a.bin"] = hang
    command = [sys.executable, "-c", FETCHING, toy]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert begun.wait(60)
        (scratch,) = (tmp_path / "cache/toy").iterdir()  # before it has its bytes
        server.answers["/a.bin"] = CONTENT
        assert data.fetch("toy")["a.bin"].read_bytes() == CONTENT
        assert scratch.is_dir()  # it is at work
        process.send_signal(how)
        error = process.communicate()[1]
        ended.set()
    if how == signal.SIGTERM:
        assert process.returncode == 130 and "Traceback" not in error
        assert error.splitlines()[-1] == "stopped; the same command goes on from here"
    else:
        assert process.returncode == -signal.SIGKILL and scratch.is_dir()
        (tmp_path / "cache/toy/a.bin").unlink()
        data.fetch("toy")
    assert cached(tmp_path) == ["a.bin"] and not scratch.exists()


def test_file_without_a_published_digest_keeps_that_of_its_first_download(
    repository, server, tmp_path
):
    repository(registry_text(entry(size=False, sha256=False), addresses=[server.address]))
    assert data.digests("toy") == {}
    path = data.fetch("toy")["a.bin"]
    assert data.digests("toy") == {"toy/a.bin": digest(CONTENT)}
    assert cached(tmp_path) == ["a.bin", "a.bin.sha256"]
    path.write_bytes(CONTENT[::-1])
    refused(f"expected {digest(CONTENT)}")
    server.answers["/a.bin"] = CONTENT[::-1]  # a changed source is refused as well
    with pytest.raises(DataError, match="could not be downloaded"):
        data.fetch("toy", replace=True, retries=1)
    assert server.requests == ["/a.bin"] * 3


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bar_only_on_a_terminal(toy, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    data.fetch("toy", retries=0)
    assert ("100%" in capsys.readouterr().err) == terminal


# ---------------------------------------------------------------------------- registry and folders


def test_registry_describes_the_repository():
    tables = data.registry()
    assert all(table.addresses for table in tables.values())
    assert f"seed {data.BINARY_SEED} of" in (REPOSITORY_DATA / "README.md").read_text()
    embedded = {file.name for file in tables["mnist"].files}
    assert {path.name for path in (REPOSITORY_DATA / "mnist").iterdir()} == embedded


def test_all_faults_of_a_registry_are_listed_at_once(repository, capsys):
    optional = [entry("b.tar.gz", size=False), entry("c", size=False, sha256=False)]
    good = registry_text(entry(content=b"a"), *optional, addresses=["https://example.org/"])
    repository(good)
    assert len(data.registry()["toy"].files) == 3
    bad = good.replace('licence = "none"', 'license = "none"').replace(".org/", ".org")
    bad = bad.replace("a.bin", "../a").replace("size = 1", 'size = "1"').replace("ca978", "CA978")
    folder = repository(f"other = 3\n{bad}\n[[toy.files]]\nsize = -1")
    with pytest.raises(FormatError) as caught:
        data.registry()
    a = digest(b"a").replace("ca978", "CA978")
    message, *faults = str(caught.value).splitlines()
    assert message == f"{folder / 'registry.toml'} departs from its format:"
    assert faults == [
        "  other = 3: input should be a valid dictionary or instance of DataSet",
        "  toy: licence is missing",
        "  toy.addresses[0] = 'https://example.org': string should match pattern '^(https://"
        r"|http://(localhost|127\.0\.0\.1):)\S+/$'",
        "  toy.files[0].name = '../a': string should match pattern '^\\w[\\w.+-]*$'",
        "  toy.files[0].size = '1': input should be a valid integer",
        f"  toy.files[0].sha256 = '{a}': string should match pattern '^[0-9a-f]{{64}}$'",
        "  toy.files[3]: name is missing",
        "  toy.files[3].size = -1: input should be greater than or equal to 0",
        "  toy: unknown name 'license' (known: "
        "title, licence, citation, embedded, addresses, archive, files)",
    ]
    repository(registry_text(*optional, extra="embedded = true"))
    assert data.main(["verify"]) == 2
    assert "an embedded file needs its sha256: c" in capsys.readouterr().err
    repository("[toy")
    with pytest.raises(DataError, match=r"registry\.toml is not TOML: .*git checkout"):
        data.registry()


def test_data_folder_is_found_from_inside_a_checkout_or_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "__file__", str(tmp_path / "site-packages/amortised/data.py"))
    monkeypatch.chdir(REPOSITORY_DATA.parent / "notebooks")
    assert data.data_folder() == REPOSITORY_DATA
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"Install the package from a checkout with `pip install -e"
    ):
        data.data_folder()


def test_default_cache_is_the_operating_systems(monkeypatch):
    monkeypatch.delenv("AMORTISED_CACHE_DIR")
    assert data.cache_folder() == Path(pooch.os_cache("amortised"))
    monkeypatch.setitem(sys.modules, "pooch", None)
    assert data.cache_folder() == Path.home() / ".cache/amortised"


# ------------------------------------------------------------------------------------ command line


def test_verify_tells_good_absent_and_bad_apart(mnist_copy, capsys):
    assert data.main(["verify"]) == 0
    out = capsys.readouterr().out
    assert (out.count("good    mnist/"), out.count("absent  mnist_static/")) == (4, 3)
    _flip(mnist_copy / "train-labels-idx1-ubyte.gz")
    (mnist_copy / "t10k-labels-idx1-ubyte.gz").unlink()
    assert data.main(["verify", "mnist"]) == 1
    out = capsys.readouterr().out
    words = ("good    mnist/", "bad     mnist/", "Mend it with: git")
    assert [out.count(word) for word in words] == [2, 2, 2]


def test_command_line_reports_what_went_wrong(repository, capsys):
    repository(registry_text())
    assert [data.main(["fetch", name]) for name in ("toy", "mnits")] == [1, 2]
    failed, unknown = capsys.readouterr().err.split("error: ")[1:]
    assert failed.startswith("toy/a.bin could not be downloaded")
    assert unknown == "unknown data set 'mnits'; choose from toy\n"


def test_module_runs_as_a_program():
    command = [sys.executable, "-m", "amortised.data", "list"]
    printed = subprocess.check_output(command, text=True, stderr=subprocess.STDOUT)
    assert re.search(r"mnist .*\nmnist_static +fetched +109\.8 MB +none stated", printed)


# ------------------------------------------------------------------------ colour images and words

HEAD = 'title = "t"\nlicence = "none"\ncitation = "none"\n'


def listed(dataset, names):
    files = "".join(f'[[{dataset}.files]]\nname = "{name}"\n' for name in names)
    return f"[{dataset}]\n{HEAD}addresses = []\n{files}"


def test_colour_images_come_out_of_their_archive(repository, server, tmp_path):
    images = torch.randint(256, (2, 3073), generator=torch.Generator().manual_seed(0)).byte()
    content, packed = images.numpy().tobytes(), io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo("inside/test_batch.bin")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    server.answers["/a.tar.gz"] = packed.getvalue()
    archive = f'name = "a.tar.gz"\nsha256 = "{digest(packed.getvalue())}"\nfolder = "inside"\n'
    text = f"[cifar10]\n{HEAD}addresses = ['{server.address}']\n[cifar10.archive]\n{archive}"
    file = f'[[cifar10.files]]\nname = "test_batch.bin"\nsize = {len(content)}\nsha256 = '
    repository(f'{text}{file}"{digest(content)}"\n')
    assert data.registry()["cifar10"].archive.folder == "inside"
    assert torch.equal(data.load_cifar10("test"), images[:, 1:])  # without the labels
    assert server.requests == ["/a.tar.gz"] and "test_batch.bin" in cached(tmp_path)
    repository(f'{text}{file}"{64 * "0"}"\n')
    with pytest.raises(DataError, match="expected 0000"):
        data.load_cifar10("test")
    with pytest.raises(ValueError, match="unknown split 'valid'; choose from train, test"):
        data.load_cifar10("valid")


def test_levels_become_real_numbers_within_their_bin():
    x = data.dequantise(torch.full((4000,), 7, dtype=torch.uint8), torch.Generator().manual_seed(0))
    assert ((x >= 7 / 256) & (x < 8 / 256)).all() and abs(x.mean() - 7.5 / 256) < 1e-4


def test_newsgroups_are_counted_and_empty_documents_left_out(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("AMORTISED_DATA_DIR", str(tmp_path))
    repository(listed("20news", ["train.feat"]))
    (tmp_path / "20news").mkdir()
    (tmp_path / "20news/train.feat").write_text("3 1:2 1995:1\n1\n2 4:5\n")
    counts = data.load_newsgroups("train")
    expected = torch.zeros(2, 1995)
    expected[0, 0], expected[0, 1994], expected[1, 3] = 2, 1, 5
    assert torch.equal(counts, expected)


def rcv1(folder, **texts):
    (folder / "rcv1").mkdir(exist_ok=True)
    names = [*(f"test_pt{part}" for part in range(4)), "train"]
    for name in names:
        text = texts.get(name, "")
        path = folder / f"rcv1/lyrl2004_tokens_{name}.dat.gz"
        path.write_bytes(gzip.compress(text.encode()))
    return listed("rcv1", [f"lyrl2004_tokens_{name}.dat.gz" for name in names])


def test_reuters_keeps_the_most_frequent_words_and_holds_stories_out(
    repository, tmp_path, monkeypatch
):
    monkeypatch.setenv("AMORTISED_DATA_DIR", str(tmp_path))
    first = ".I 2286\n.W\noil price oil\nbank\n\n.I 2287\n.W\nbank oil\n\n"
    last = ".I 9\n.W\nzinc zinc\nwheat\n\n.I 10\n.W\nprice bank price\n\n"
    repository(rcv1(tmp_path, test_pt0=first, train=last))
    # Totals: bank 3, oil 3, price 3, zinc 2, wheat 1; ties by the alphabet; zinc is the fourth.
    counts = {name: data.load_rcv1(name, 4, 1).to_dense() for name in ("train", "test")}
    rows = torch.cat([counts["test"], counts["train"]]).int().tolist()
    stories = [[1, 2, 1, 0], [1, 1, 0, 0], [0, 0, 0, 2], [1, 0, 2, 0]]
    assert sorted(rows) == sorted(stories) and len(counts["test"]) == 1
    held_out = torch.randperm(4, generator=torch.Generator().manual_seed(0))[0]
    assert counts["test"][0].int().tolist() == stories[held_out]
    three = torch.cat([data.load_rcv1(name, 3, 1).to_dense() for name in ("train", "test")])
    assert len(three) == 3  # the story of zinc and wheat has none of the three words
    repository(rcv1(tmp_path, train=".I 1\noil\n"))
    with pytest.raises(DataError, match=r"a story must be '.I number', '.W', words"):
        data.load_rcv1()


def test_drawn_images_are_distinct_and_nested():
    drawn = data.drawn_images(500, image_seed=3)
    assert len(drawn.unique()) == 500 and torch.equal(data.drawn_images(20, 3), drawn[:20])
    assert not torch.equal(drawn, data.drawn_images(500, image_seed=4))
    assert torch.equal(data.drawn_images(500), torch.arange(500))
    for number in (0, 10_001):
        with pytest.raises(ValueError, match=f"from 1 to 10,000.*; got {number}"):
            data.drawn_images(number, 3)
