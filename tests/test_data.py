"""Data sets: what the loaders return, and what they say when a file or a server misbehaves."""

import gzip
import hashlib
import http.server
import lzma
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pooch
import pytest
import requests  # noqa: F401  (imported before a test gives up its privileges)
import torch

from amortised import data
from amortised.data import DataError

REPOSITORY_DATA = data.data_folder()
LOCAL_DATA = os.environ.get("AMORTISED_DATA_DIR")


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch, tmp_path):
    """No test reads or writes the reader's own cache or local data."""
    monkeypatch.delenv("AMORTISED_DATA_DIR", raising=False)
    monkeypatch.setenv("AMORTISED_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def entry(name, content, size=True, sha256=True):
    lines = ["[[toy.files]]", f'name = "{name}"']
    if size:
        lines.append(f"size = {len(content)}")
    if sha256:
        lines.append(f'sha256 = "{hashlib.sha256(content).hexdigest()}"')
    return "\n".join(lines)


def registry_text(files, addresses=(), extra=""):
    return "\n".join(
        [
            '[toy]\ntitle = "toy"\nlicence = "none"\ncitation = "none"',
            f"addresses = {list(addresses)!r}",
            extra,
            *files,
        ]
    )


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


# -------------------------------------------------------------------------------------- loopback


class Server:
    """A web server on the loopback interface that answers as it is told."""

    def __init__(self):
        self.answers, self.requests = {}, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                answer = outer.answers.get(self.path)
                if callable(answer):
                    answer(self)
                elif answer is None:
                    self.send_error(404)
                else:
                    self.send(answer)

            def send(self, content, announced=None):
                self.send_response(200)
                self.send_header("Content-Length", str(announced or len(content)))
                self.end_headers()
                self.wfile.write(content)
                self.wfile.flush()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}/"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server():
    running = Server()
    yield running
    running.close()


def cached(tmp_path):
    """Names of all files in the cache folder, temporary ones included."""
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


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
    assert levels.dtype == torch.uint8
    assert torch.equal(grey, levels / 255)
    levels[0] = 0  # writable, and no view of anything shared
    assert data.load_mnist("test", torch.uint8).images[0].any()


def test_splits_cut_the_training_file_as_their_papers_do():
    train = data.load_mnist("train", torch.uint8).images
    for fitted, held_out, held_out_first in [
        ("train_50000", "valid_10000", False),
        ("train_55000", "valid_5000", True),
        ("train_59600", "valid_400", False),
    ]:
        parts = [data.load_mnist(split, torch.uint8).images for split in (fitted, held_out)]
        assert len(parts[0]) == int(fitted.split("_")[1])
        assert len(parts[1]) == int(held_out.split("_")[1])
        assert torch.equal(torch.cat(parts[::-1] if held_out_first else parts), train)


@pytest.mark.parametrize(
    "load",
    [data.load_mnist, data.load_mnist_binary, data.load_static_mnist],
    ids=lambda f: f.__name__,
)
def test_unknown_split_lists_the_choices(load):
    with pytest.raises(ValueError, match=r"unknown split 'validation'; choose from .*test"):
        load("validation")


def test_other_dtype_is_refused():
    with pytest.raises(ValueError, match=r"torch\.float16 is not served; choose torch\.float32"):
        data.load_mnist("test", torch.float16)


def test_all_of_mnist_loads_fast_and_small():
    """First load of a process under 0.5 s of processor time, peak under 400 MB above the import.

    The first load pays for memory that no earlier one has touched, so a second one in the same
    process says nothing about it. Best of three processes, because other work disturbs the clock.
    """
    program = """
        import resource, sys, time
        from amortised.data import load_mnist
        unit = 2**20 if sys.platform == "darwin" else 2**10
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        before, start = peak(), time.process_time()
        both = load_mnist("train"), load_mnist("test")
        print(time.process_time() - start, peak() - before)
    """
    times = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        seconds, megabytes = map(float, done.stdout.split())
        assert megabytes < 400
        times.append(seconds)
    assert min(times) < 0.5


def test_embedded_mnist_needs_neither_network_nor_pooch():
    program = """
        import socket, sys
        def refuse(*_):
            raise AssertionError("network used")
        socket.socket.connect = refuse
        from amortised import data, results
        data.load_mnist("test")
        results.load_published("amc")
        loaded = {name.partition(".")[0] for name in sys.modules}
        assert not loaded & {"pooch", "requests", "matplotlib", "pandas"}, loaded
        ours = {name for name in sys.modules if name.startswith("amortised.")}
        assert ours == {"amortised.data", "amortised.results"}, ours
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


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
    grey, levels = (
        data.load_mnist("test", kind).images[:50] for kind in (torch.float32, torch.uint8)
    )
    of_grey, of_levels, of_double = (
        data.binarise(images, torch.Generator().manual_seed(3))
        for images in (grey, levels, grey.double())
    )
    assert of_levels.dtype == torch.float32 and of_double.dtype == torch.float64
    assert torch.equal(of_grey, of_levels)
    assert torch.equal(of_grey, of_double.float())


def test_binarise_refuses_what_is_no_grey_value():
    with pytest.raises(ValueError, match=r"values from 0 to 255; grey values lie in \[0, 1\]"):
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
    assert (
        hashlib.sha256(np.packbits(expected).tobytes()).hexdigest()
        == "8936d0655d97f824740c81f297346e485c37d5472ec5385f00f09158e21f91fd"
        == data.digests("mnist")["mnist/binary-test"]
    )


def test_fixed_binarisation_ignores_threads_seeds_and_default_dtype():
    expected = data.load_mnist_binary("valid_400").images
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.set_default_dtype(torch.float64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(99)
            found = data.load_mnist_binary("valid_400").images
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_every_validation_split_has_a_fixed_binarisation_and_no_training_split_does():
    for split in data.SPLITS:
        if split.startswith("train"):
            with pytest.raises(ValueError, match=f"unknown split '{split}'"):
                data.load_mnist_binary(split)
        else:
            assert data.load_mnist_binary(split).images.mean() == pytest.approx(0.13, abs=0.01)


def test_a_platform_with_other_random_numbers_is_found_out(monkeypatch):
    monkeypatch.setattr(data, "BINARY_SEED", 785)
    with pytest.raises(
        DataError, match=r"fixed binarisation of MNIST test has SHA-256 .* expected"
    ):
        data.load_mnist_binary("test")


# -------------------------------------------------------------------------- damaged embedded files


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [_truncate, _flip, Path.unlink], ids=["short", "flipped", "missing"]
)
def test_damaged_embedded_file_names_both_digests_and_the_command_that_mends_it(mnist_copy, damage):
    root = mnist_copy.parents[1]
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "data"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "data"], check=True)
    path = mnist_copy / "t10k-images-idx3-ubyte.gz"
    damage(path)
    with pytest.raises(DataError) as caught:
        data.load_mnist("test")
    message = str(caught.value)
    assert str(path) in message
    if damage is not Path.unlink:
        assert f"size    {path.stat().st_size} bytes, expected 1648877" in message
        assert hashlib.sha256(path.read_bytes()).hexdigest() in message
        assert "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6" in message
    command = re.search(r"Mend it with: (git .+?) \(or", message)[1]
    subprocess.run(shlex.split(command), check=True, capture_output=True)
    assert data.load_mnist("test").images.shape == (10_000, 784)


def test_missing_embedded_file_is_never_downloaded_behind_the_readers_back(mnist_copy, server):
    text = (mnist_copy.parent / "registry.toml").read_text()
    text = re.sub(r'"https://[^"]+/mnist/"', f'"{server.address}"', text)
    (mnist_copy.parent / "registry.toml").write_text(text)
    name = "t10k-labels-idx1-ubyte.gz"
    server.answers[f"/{name}"] = (mnist_copy / name).read_bytes()
    (mnist_copy / name).unlink()
    with pytest.raises(DataError, match="is missing, though it belongs to the repository"):
        data.load_mnist("test")
    assert server.requests == []
    data.fetch("mnist")  # the other command that the message names
    assert len(data.load_mnist("test").labels) == 10_000


def idx(shape, content, kind=8):
    header = bytes([0, 0, kind, len(shape)])
    return header + b"".join(size.to_bytes(4, "big") for size in shape) + content


@pytest.mark.parametrize(
    ("unpacked", "message"),
    [
        (b"PK\x03\x04" + bytes(100), r"starts with 50 4b 03 04, expected 00 00 08"),
        (idx((1, 28, 28), bytes(784), kind=13), r"starts with 00 00 0d 03"),
        (idx((10_000, 28, 28), bytes(784)), r"announces shape \(10000, 28, 28\).* holds 800 bytes"),
        (idx((10_000, 28, 28), b"")[:9], r"holds 9 bytes in all"),
        (b"", r"starts with , expected 00 00 08"),
        (idx((784,), bytes(784)), r"has 1 dimensions of shape \(784,\), expected 3"),
        (idx((5, 28, 28), bytes(5 * 784)), r"images of shape \(5, 28, 28\) and 10000 labels"),
        (idx((10_000, 7, 7), bytes(490_000)), r"\(10000, 7, 7\).* 28 x 28 pixels"),
    ],
    ids=["magic", "type", "body", "header", "empty", "dimensions", "count", "pixels"],
)
def test_malformed_idx_file_with_a_matching_digest(mnist_copy, unpacked, message):
    packed = gzip.compress(unpacked)
    _replace_test_images(mnist_copy, packed)
    with pytest.raises(DataError, match=message):
        data.load_mnist("test")


def test_truncated_gzip_with_a_matching_digest(mnist_copy):
    packed = (mnist_copy / "t10k-images-idx3-ubyte.gz").read_bytes()[:1000]
    _replace_test_images(mnist_copy, packed)
    with pytest.raises(DataError, match="not a whole gzip file"):
        data.load_mnist("test")


def _replace_test_images(folder, packed):
    registry = folder.parent / "registry.toml"
    text = registry.read_text().replace("size = 1648877", f"size = {len(packed)}")
    digest = "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    registry.write_text(text.replace(digest, hashlib.sha256(packed).hexdigest()))
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(packed)


# ------------------------------------------------------------------------------------ local folder


def test_local_folder_comes_first_and_its_damage_is_not_passed_over(
    mnist_copy, monkeypatch, tmp_path
):
    local = tmp_path / "local"
    shutil.copytree(REPOSITORY_DATA / "mnist", local / "mnist")
    monkeypatch.setenv("AMORTISED_DATA_DIR", str(local))
    assert data.fetch("mnist")["t10k-images-idx3-ubyte.gz"].is_relative_to(local)
    shutil.rmtree(mnist_copy)
    assert len(data.load_mnist("test").images) == 10_000
    shutil.copytree(local / "mnist", mnist_copy)
    _flip(local / "mnist/t10k-images-idx3-ubyte.gz")
    with pytest.raises(
        DataError, match=r"local/mnist/t10k[^\n]*\n(.*\n)*.*unset AMORTISED_DATA_DIR"
    ):
        data.load_mnist("test")


def test_local_folder_that_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("AMORTISED_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"AMORTISED_DATA_DIR=.*nowhere is not a folder"):
        data.load_mnist("test")


def test_packed_local_file_counts_by_its_unpacked_bytes(repository, monkeypatch, tmp_path):
    content = b"0 1 " * 1000
    repository(registry_text([entry("a.amat", content)]))
    local = tmp_path / "local/toy"
    local.mkdir(parents=True)
    packed = local / "a.amat.xz"
    packed.write_bytes(lzma.compress(content))
    monkeypatch.setenv("AMORTISED_DATA_DIR", str(local.parent))
    assert data.fetch("toy") == {"a.amat": packed}
    assert data.read_bytes("toy", "a.amat") == content
    packed.write_bytes(lzma.compress(content + b"0"))
    for use in (lambda: data.fetch("toy"), lambda: data.read_bytes("toy", "a.amat")):
        with pytest.raises(DataError, match=r"size    4001 bytes, expected 4000"):
            use()
    packed.write_bytes(lzma.compress(content)[:-10])
    for use in (lambda: data.fetch("toy"), lambda: data.read_bytes("toy", "a.amat")):
        with pytest.raises(DataError, match=r"a\.amat\.xz cannot be read"):
            use()


# --------------------------------------------------------------------------------- static binarised


def amat(values):
    return "".join(" ".join(map(str, row)) + "\n" for row in values).encode()


def static_registry(content):
    text = registry_text([entry("binarized_mnist_test.amat", content)])
    return text.replace("toy", "mnist_static")


def test_static_mnist_reads_rows_of_digits(repository):
    values = np.random.default_rng(0).integers(0, 2, (30, 784))
    content = amat(values)
    folder = repository(static_registry(content))
    place = Path(os.environ["AMORTISED_CACHE_DIR"], "mnist_static")
    place.mkdir(parents=True)
    (place / "binarized_mnist_test.amat").write_bytes(content)
    images = data.load_static_mnist("test")
    assert images.dtype == torch.float32
    assert np.array_equal(images.numpy(), values)
    assert np.array_equal(data.load_static_mnist("test", torch.uint8).numpy(), values)
    for broken, message in [
        (content[:-2], "expected rows of 1568"),
        (b"", "holds 0 bytes"),
        (content.replace(b"1", b"2"), "other digits than 0 and 1"),
    ]:
        (folder / "registry.toml").write_text(static_registry(broken))
        (place / "binarized_mnist_test.amat").write_bytes(broken)
        with pytest.raises(DataError, match=message):
            data.load_static_mnist("test")


@pytest.mark.skipif(
    not (LOCAL_DATA and Path(LOCAL_DATA, "mnist_static").is_dir()),
    reason="needs mnist_static, 110 MB, in the folder that AMORTISED_DATA_DIR names",
)
def test_static_mnist_is_the_published_benchmark(monkeypatch):
    monkeypatch.setenv("AMORTISED_DATA_DIR", LOCAL_DATA)
    for split, count in [("train", 50_000), ("valid", 10_000), ("test", 10_000)]:
        images = data.load_static_mnist(split)
        assert images.shape == (count, 784)
        assert images.mean().item() == pytest.approx(0.1315, abs=0.0015)
    # Each is a draw of some grey test image: off where that is 0, on where that is 255.
    grey = data.load_mnist("test").images
    contradictions = (
        images[:100] @ (grey == 0).float().T + (1 - images[:100]) @ (grey == 1).float().T
    )
    fewest, match = contradictions.min(1)
    assert fewest.max() == 0
    assert not torch.equal(match, torch.arange(100))  # in an order of their own


# ------------------------------------------------------------------------------------- downloading


CONTENT = bytes(range(256)) * 400


def test_download_lands_in_the_cache_and_happens_once(repository, server, tmp_path):
    repository(registry_text([entry("a.bin", CONTENT)], [f"{server.address}one/"]))
    server.answers["/one/a.bin"] = CONTENT
    path = data.fetch("toy", retries=0)["a.bin"]
    assert path == tmp_path / "cache/toy/a.bin"
    assert path.read_bytes() == CONTENT
    assert data.read_bytes("toy", "a.bin") == CONTENT
    assert data.fetch("toy") == {"a.bin": path}
    assert server.requests == ["/one/a.bin"]


def test_download_tries_the_next_mirror(repository, server, tmp_path):
    mirrors = [f"{server.address}{place}/" for place in ("gone", "wrong", "good")]
    repository(registry_text([entry("a.bin", CONTENT)], mirrors))
    server.answers |= {"/wrong/a.bin": CONTENT[::-1], "/good/a.bin": CONTENT}
    assert data.fetch("toy", retries=0)["a.bin"].read_bytes() == CONTENT
    assert server.requests == ["/gone/a.bin", "/wrong/a.bin", "/good/a.bin"]
    assert cached(tmp_path) == ["a.bin"]


def test_wrong_digest_from_the_server_is_reported_and_leaves_nothing(repository, server, tmp_path):
    mirrors = [f"{server.address}one/", f"{server.address}two/"]
    repository(registry_text([entry("a.bin", CONTENT)], mirrors))
    server.answers["/one/a.bin"] = CONTENT[::-1]
    with pytest.raises(DataError) as caught:
        data.fetch("toy", retries=0)
    message = str(caught.value)
    for part in (
        "toy/a.bin could not be downloaded",
        f"{mirrors[0]}a.bin",
        hashlib.sha256(CONTENT).hexdigest(),
        hashlib.sha256(CONTENT[::-1]).hexdigest(),
        f"{mirrors[1]}a.bin: 404",
        "python -m amortised.data fetch toy",
    ):
        assert part in message
    assert cached(tmp_path) == []


def _break_off(handler):
    handler.send(CONTENT[: len(CONTENT) // 2], announced=len(CONTENT))


def test_download_that_breaks_off_leaves_nothing_and_the_next_attempt_succeeds(
    repository, server, tmp_path
):
    repository(registry_text([entry("a.bin", CONTENT)], [server.address]))
    server.answers["/a.bin"] = _break_off
    with pytest.raises(DataError, match="could not be downloaded"):
        data.fetch("toy", retries=0)
    assert cached(tmp_path) == []

    def mend_after_first(handler):
        server.answers["/a.bin"] = CONTENT
        _break_off(handler)

    server.answers["/a.bin"] = mend_after_first
    assert data.fetch("toy", retries=1)["a.bin"].read_bytes() == CONTENT
    assert cached(tmp_path) == ["a.bin"]


def test_server_that_is_not_there(repository):
    repository(registry_text([entry("a.bin", CONTENT)], ["http://127.0.0.1:9/"]))
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/a\.bin: "):
        data.fetch("toy", retries=0)


def test_process_killed_during_a_download_leaves_no_half_file(repository, server, tmp_path):
    folder = repository(registry_text([entry("a.bin", CONTENT)], [server.address]))
    halfway = threading.Event()

    def stall(handler):
        _break_off(handler)
        halfway.set()
        time.sleep(5)

    server.answers["/a.bin"] = stall
    program = f"""
        from pathlib import Path
        from amortised import data
        data.data_folder = lambda: Path({str(folder)!r})
        data.fetch("toy")
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
    assert halfway.wait(timeout=60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cache/toy/a.bin").exists()
    server.answers["/a.bin"] = CONTENT
    assert data.fetch("toy", retries=0)["a.bin"].read_bytes() == CONTENT


@pytest.mark.parametrize("damage", [_truncate, _flip], ids=["short", "flipped"])
def test_damaged_cache_is_an_error_until_the_named_command_mends_it(
    repository, server, tmp_path, damage, capsys
):
    repository(registry_text([entry("a.bin", CONTENT)], [server.address]))
    server.answers["/a.bin"] = CONTENT
    path = data.fetch("toy")["a.bin"]
    damage(path)
    for use in (lambda: data.fetch("toy"), lambda: data.read_bytes("toy", "a.bin")):
        with pytest.raises(DataError, match=r"Mend it with: python -m amortised\.data fetch toy"):
            use()
    assert server.requests == ["/a.bin"]
    assert data.main(["fetch", "toy"]) == 0
    assert "Downloading it again" in capsys.readouterr().err
    assert path.read_bytes() == CONTENT and cached(tmp_path) == ["a.bin"]


def test_cache_folder_that_cannot_be_made(repository, server, monkeypatch, tmp_path):
    repository(registry_text([entry("a.bin", CONTENT)], [server.address]))
    server.answers["/a.bin"] = CONTENT
    (tmp_path / "blocked").write_text("a file, not a folder")
    monkeypatch.setenv("AMORTISED_CACHE_DIR", str(tmp_path / "blocked/cache"))
    with pytest.raises(
        DataError, match=r"cannot be saved in .*name another one in AMORTISED_CACHE"
    ):
        data.fetch("toy", retries=0)


def test_read_only_cache_folder(monkeypatch, server):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "data").mkdir()
        text = registry_text([entry("a.bin", CONTENT)], [server.address])
        (root / "data/registry.toml").write_text(text)
        (root / "cache").mkdir()
        root.chmod(0o755)
        (root / "cache").chmod(0o555)
        monkeypatch.setattr(data, "data_folder", lambda: root / "data")
        monkeypatch.setenv("AMORTISED_CACHE_DIR", str(root / "cache"))
        server.answers["/a.bin"] = CONTENT
        superuser = os.geteuid() == 0  # to whom no folder is read-only
        try:
            if superuser:
                os.seteuid(65534)
            with pytest.raises(DataError, match=r"cannot be saved in .*Make the folder writable"):
                data.fetch("toy", retries=0)
        finally:
            if superuser:
                os.seteuid(0)
        assert list((root / "cache").iterdir()) == []


def test_full_disk(repository, server, tmp_path, monkeypatch):
    repository(registry_text([entry("a.bin", CONTENT)], [server.address]))
    server.answers["/a.bin"] = CONTENT

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", full)
    with pytest.raises(DataError, match=r"No space left on device.*give it room"):
        data.fetch("toy", retries=0)
    assert cached(tmp_path) == []


def test_without_pooch_the_message_says_what_to_do(repository, monkeypatch):
    repository(registry_text([entry("a.bin", CONTENT)], ["http://127.0.0.1:9/"]))
    monkeypatch.setitem(sys.modules, "pooch", None)
    monkeypatch.delenv("AMORTISED_CACHE_DIR")
    assert data.cache_folder() is None
    with pytest.raises(DataError, match=r"pip install pooch`, or put the file into a folder toy/"):
        data.read_bytes("toy", "a.bin")


def test_file_without_a_published_digest_keeps_that_of_its_first_download(
    repository, server, tmp_path
):
    repository(registry_text([entry("a.gz", CONTENT, size=False, sha256=False)], [server.address]))
    server.answers["/a.gz"] = CONTENT
    assert data.digests("toy") == {}
    path = data.fetch("toy")["a.gz"]
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert data.digests("toy") == {"toy/a.gz": digest}
    assert cached(tmp_path) == ["a.gz", "a.gz.sha256"]
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(DataError, match=f"expected {digest}"):
        data.read_bytes("toy", "a.gz")
    server.answers["/a.gz"] = CONTENT[::-1]  # a changed source is refused as well
    with pytest.raises(DataError, match="could not be downloaded"):
        data.fetch("toy", replace=True, retries=0)


def test_progress_bar_only_when_asked_for(repository, server, capsys, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    repository(
        registry_text([entry("a.bin", CONTENT), entry("b.bin", CONTENT[::-1])], [server.address])
    )
    server.answers |= {"/a.bin": CONTENT}
    with pytest.raises(DataError):
        data.fetch("toy", retries=0)
    assert capsys.readouterr().err == ""
    server.answers |= {"/b.bin": CONTENT[::-1]}
    data.fetch("toy", progress=True, retries=0)
    assert "100%" in capsys.readouterr().err


# ---------------------------------------------------------------------------- registry and folders


def test_registry_describes_the_repository():
    tables = data.registry()
    assert {"mnist", "mnist_static"} <= tables.keys()
    for name, table in tables.items():
        assert len(table["addresses"]) >= 1, name
        for file in table["files"]:
            if table.get("embedded"):
                path = REPOSITORY_DATA / name / file["name"]
                assert path.stat().st_size == file["size"]
                assert hashlib.sha256(path.read_bytes()).hexdigest() == file["sha256"]
    readme = (REPOSITORY_DATA / "README.md").read_text()
    assert f"seed {data.BINARY_SEED} of" in readme
    embedded = {file["name"] for file in tables["mnist"]["files"]}
    assert {path.name for path in (REPOSITORY_DATA / "mnist").iterdir()} == embedded


def test_registry_takes_archives_plain_files_and_missing_digests(repository):
    repository(
        registry_text(
            [
                entry("cifar-10-binary.tar.gz", b"archive"),
                entry("train.feat", b"text", size=False),
                entry("lyrl2004_tokens_train.dat.gz", b"", size=False, sha256=False),
            ],
            ["https://example.org/data/"],
        )
    )
    assert len(data.registry()["toy"]["files"]) == 3


GOOD = registry_text([entry("a.bin", b"a")], ["https://example.org/"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace('licence = "none"', ""), r"\[toy\]: licence is missing"),
        (GOOD.replace("licence", "license"), r"unknown key 'license' \(known: title, licence"),
        (GOOD.replace("size = 1", 'size = "1"'), r"number 1: size = '1' is not of type int"),
        (GOOD.replace("size = 1", "size = true"), r"size = True is not of type int"),
        (GOOD.replace('name = "a.bin"', ""), r"\[\[toy.files\]\] number 1: name is missing"),
        (GOOD.replace("ca978", "CA978"), r"is not 64 lower-case hex digits"),
        (GOOD.replace("a.bin", "../a.bin"), r"'\.\./a\.bin' is not a plain file name"),
        (GOOD.replace(".org/", ".org"), r"address 'https://example.org' does not end in '/'"),
        ("toy = 3", r"\[toy\]: 3 is not a table"),
        ("[toy", r"is not valid TOML"),
        (
            registry_text([entry("a", b"a", sha256=False)], ["https://e/"], "embedded = true"),
            r"an embedded file needs its sha256",
        ),
    ],
)
def test_registry_that_departs_from_its_format(repository, text, message):
    repository(text)
    with pytest.raises(DataError, match=message):
        data.registry()


def test_unknown_data_set_or_file(repository):
    repository(GOOD)
    with pytest.raises(ValueError, match="unknown data set 'mnits'; choose from toy"):
        data.fetch("mnits")
    with pytest.raises(ValueError, match=r"data set 'toy' has no file 'b', but a\.bin"):
        data.read_bytes("toy", "b")


def test_data_folder_is_found_from_inside_a_checkout_or_refused(monkeypatch, tmp_path):
    installed = tmp_path / "env/lib/python3/site-packages/amortised/data.py"
    monkeypatch.setattr(data, "__file__", str(installed))
    monkeypatch.chdir(REPOSITORY_DATA.parent / "notebooks")
    assert data.data_folder() == REPOSITORY_DATA
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"Install the package from a checkout .*`pip install -e \.`"
    ):
        data.data_folder()


def test_default_cache_is_the_operating_systems(monkeypatch):
    monkeypatch.delenv("AMORTISED_CACHE_DIR")
    assert data.cache_folder() == Path(pooch.os_cache("amortised"))


# ------------------------------------------------------------------------------------ command line


def test_verify_tells_good_absent_and_bad_apart(mnist_copy, capsys):
    assert data.main(["verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("good    mnist/") for line in lines) == 4
    assert sum(line.startswith("absent  mnist_static/") for line in lines) == 3
    _flip(mnist_copy / "train-labels-idx1-ubyte.gz")
    (mnist_copy / "t10k-labels-idx1-ubyte.gz").unlink()
    assert data.main(["verify", "mnist"]) == 1
    out = capsys.readouterr().out
    assert out.count("good    mnist/") == 2 and out.count("bad     mnist/") == 2
    assert "Mend it with: git" in out


def test_command_line_refuses_an_unknown_name(capsys):
    with pytest.raises(SystemExit) as caught:
        data.main(["fetch", "mnits"])
    assert caught.value.code == 2
    assert "unknown data set mnits; choose from mnist, mnist_static" in capsys.readouterr().err


def test_command_line_reports_a_failed_download_and_exits_1(repository, capsys):
    repository(registry_text([entry("a.bin", CONTENT)]))
    assert data.main(["fetch", "toy"]) == 1
    assert "error: toy/a.bin could not be downloaded" in capsys.readouterr().err


def test_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "amortised.data", "list"], capture_output=True, text=True, check=True
    )
    assert re.search(r"^mnist_static +fetched +109\.8 MB +none stated", done.stdout, re.MULTILINE)
    assert done.stderr == ""
