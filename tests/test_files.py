"""Files that are whole or not there, digests, locks, and the keeping of finished stages."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import math
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch

from amortised import files
from amortised.files import (
    DamagedFileError,
    LockedError,
    OutOfTimeError,
    Work,
    atomic_write,
    load_tree,
    lock,
    save_tree,
)

OLD, NEW = {"done": 3, "state": torch.arange(9.0)}, {"done": 4, "state": torch.ones(9)}


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def in_a_process(function, *arguments) -> int:
    """Call a function in a process of its own; minus the number of the signal that ended it."""
    if (process := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            function(*arguments)
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def no_space(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_previous", [False, True])
@pytest.mark.parametrize(("call", "number"), [("fsync", 1), ("replace", 1), ("replace", 2)])
def test_killed_at_any_moment_the_old_tree_or_the_new_one_is_there(
    tmp_path, call, number, keep_previous
):
    path, real, calls = tmp_path / "c", getattr(os, call), []
    save_tree(path, OLD)

    def killing(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*arguments)

    def write():
        setattr(os, call, killing)
        save_tree(path, NEW, keep_previous=keep_previous)

    is_written = in_a_process(write) == 0
    assert is_written == (number == 2 and not keep_previous)
    is_renamed = keep_previous and (call, number) != ("replace", 1)
    expected = pytest.warns(UserWarning, match="c is missing; going on from the one before it")
    with expected if is_renamed else contextlib.nullcontext():
        assert load_tree(path)["done"] == (4 if is_written else 3)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_content_and_no_other_file(tmp_path, monkeypatch, call):
    atomic_write(tmp_path / "a.txt", b"old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, call, no_space)
        atomic_write(tmp_path / "a.txt", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize(
    "work", [lambda f: atomic_write(f / "a", b""), lambda f: lock(f).__enter__()]
)
def test_a_read_only_folder_says_so(work):
    is_superuser = os.geteuid() == 0  # to whom no folder is read-only
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        try:
            if is_superuser:
                os.seteuid(65534)
            with pytest.raises(PermissionError, match=folder):
                work(Path(folder))
        finally:
            if is_superuser:
                os.seteuid(0)
        assert os.listdir(folder) == []


def test_what_a_killed_process_left_goes_with_the_next_writing_of_the_same_file(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    stale, others = tmp_path / f".a.json.{dead.pid}-0f.tmp", [tmp_path / ".b.json.1-0f.tmp"]
    others.append(tmp_path / f".a.json.{os.getpid()}-0f.tmp")  # at work
    for path in (stale, *others):
        path.touch()
    files.atomic_write(tmp_path / "a.json", b"{}")
    assert set(tmp_path.iterdir()) == {tmp_path / "a.json", *others}


# --- trees ---------------------------------------------------------------------------------------


def test_a_tree_comes_back_as_it_was(tmp_path):
    tree = {
        "groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "foreach": None, "params": [0, 1]}],
        "state": {0: {"step": torch.tensor(3.0)}, 1: {}},
        "odd": [math.inf, -0.0, 10**20, "ψ.0", True, (), []],
        "types": [torch.ones(2, dtype=t) for t in (torch.bfloat16, torch.bool, torch.int64)],
        "view": torch.arange(12.0).reshape(3, 4).T,
    }
    save_tree(tmp_path / "new" / "c", tree)
    back = load_tree(tmp_path / "new" / "c")
    assert back.keys() == tree.keys()
    assert back["groups"] == tree["groups"] and back["odd"] == tree["odd"]
    assert back["state"] == tree["state"] and isinstance(back["groups"][0]["betas"], tuple)
    for ours, theirs in zip(back["types"], tree["types"], strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert torch.equal(back["view"], tree["view"]) and back["view"].stride() == (1, 4)
    assert load_tree(tmp_path / "none") is None


def test_any_damage_is_noticed_before_anything_is_read(tmp_path, monkeypatch):
    path, dice = tmp_path / "c", random.Random(0)
    save_tree(path, OLD)
    good = path.read_bytes()
    monkeypatch.setattr(torch, "load", None)  # it is not called
    for _ in range(200):  # a bit is flipped, and half the time the file is cut, too
        path.write_bytes(good)
        flip(path, dice.randrange(len(good)), dice.randrange(8))
        os.truncate(path, dice.choice([len(good), dice.randrange(len(good))]))
        with pytest.raises(DamagedFileError, match=r"c is damaged .*; remove it to start afresh"):
            load_tree(path)
    for length in (0, 31, 32, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(DamagedFileError, match="c is damaged"):
            load_tree(path)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch was_here",)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_file_is_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save(Malicious(), buffer, _use_new_zipfile_serialization=zipped)
    content = buffer.getvalue()
    Path("c").write_bytes(hashlib.sha256(content).digest() + content)
    with pytest.raises(DamagedFileError, match="c holds no tree"):
        load_tree("c")
    assert os.listdir() == ["c"]


def test_the_tree_before_takes_the_place_of_a_damaged_one(tmp_path):
    path, previous = tmp_path / "c", tmp_path / "c.previous"
    save_tree(path, OLD, keep_previous=True)
    save_tree(path, NEW, keep_previous=True)
    assert load_tree(path)["done"] == 4 and load_tree(previous)["done"] == 3
    flip(path, -20)
    with pytest.warns(UserWarning, match=r"c is damaged .*; going on from the one before it"):
        assert load_tree(path)["done"] == 3
    assert load_tree(path)["done"] == 3 and not previous.exists()
    save_tree(path, NEW, keep_previous=True)  # what was damaged does not push out what is good
    assert load_tree(previous)["done"] == 3
    flip(path, -20), flip(previous, 40)
    message = r"c is damaged .*; .*c\.previous is damaged .*; remove both to start afresh"
    with pytest.raises(DamagedFileError, match=message):
        load_tree(path)


# --- locks ---------------------------------------------------------------------------------------


def test_a_folder_is_held_by_one_until_it_ends_however(tmp_path):
    with lock(tmp_path / "run"):
        with pytest.raises(LockedError, match=rf"at work in {tmp_path}/run; wait or stop it"):
            lock(tmp_path / "run").__enter__()
        with lock(tmp_path / "other"):
            pass
    with contextlib.suppress(KeyboardInterrupt), lock(tmp_path / "run"):
        raise KeyboardInterrupt
    is_held, told = os.pipe()
    if (process := os.fork()) == 0:
        with lock(tmp_path / "run"):
            os.write(told, b".")
            time.sleep(60)
    os.read(is_held, 1)
    with pytest.raises(LockedError):
        lock(tmp_path / "run").__enter__()
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with lock(tmp_path / "run"):
        pass


# --- stages --------------------------------------------------------------------------------------


def test_finished_parts_of_a_stage_are_kept_where_there_is_a_folder(tmp_path, monkeypatch):
    work = Work(tmp_path).stage("annealing")
    assert work.load("000") is None
    work.save("000", OLD)
    assert work.load("000")["done"] == 3 and Work(tmp_path, "bounds").load("000") is None
    assert [path.name for path in tmp_path.iterdir()] == ["annealing-000.stage"]
    flip(tmp_path / "annealing-000.stage", 50)
    with pytest.raises(DamagedFileError, match=r"annealing-000\.stage is damaged"):
        work.load("000")
    monkeypatch.setattr(files, "save_tree", None)  # it is not called
    Work().save("000", OLD)
    assert Work().load("000") is None and Work().path("000") is None


def test_work_stops_at_its_time_and_not_before():
    Work().check_time("nothing is done")
    Work(stop_at=time.monotonic() + 60).check_time("nothing is done")
    with pytest.raises(OutOfTimeError, match=r"^out of time: 3 of 7 images are done$"):
        Work(stop_at=time.monotonic()).stage("bounds").check_time("3 of 7 images are done")
