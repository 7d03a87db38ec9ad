r"""Files that are whole or not there, and work that goes on from them.

Everything long is made of *stages*. A finished stage is a file; whether the file exists is the
whole state. Every file is written beside its place and renamed, so that a process killed at any
moment leaves the old file or the new one, and nothing in between. A tree of tensors and plain
values is kept with a SHA-256 over its bytes, which is compared before anything is parsed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import pickle
import secrets
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout

from .commands import tidy


class DamagedFileError(ValueError):
    """A file does not hold what was written to it, and there is none before it to go back to."""


class LockedError(RuntimeError):
    """Another process is at work in the same place."""


class OutOfTimeError(RuntimeError):
    """The time that was granted has passed before the end; what is done so far is kept."""


def atomic_write(path: str | os.PathLike, content: bytes) -> None:
    """Write a file so that at any moment its name holds all of the old content or all of the new.

    The bytes go to a temporary file in the same folder, reach the disk, and take over the name.
    On an error the temporary file is removed and the old content stays. One that a process left
    behind when it was killed is removed by the next that writes the same file.

    :param path: file to write; its folder is made if need be.
    :param content: all of its bytes.
    :raises OSError: if the folder cannot be written or the disk is full.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     atomic_write(Path(folder, "new", "a.txt"), b"whole")
    ...     Path(folder, "new", "a.txt").read_bytes()
    b'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    own = tidy(path.parent, f".{path.name}.")
    temporary = path.with_name(f"{own}{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# --- trees of tensors ----------------------------------------------------------------------------


def save_tree(path: str | os.PathLike, tree: object, *, keep_previous: bool = False) -> None:
    """Write a tree of dictionaries, lists, tensors and plain values, after a digest of its bytes.

    :param path: file to write, atomically.
    :param tree: what to write. Views are written with the whole of their storage: clone them.
    :param keep_previous: leave the file that had the name before as ``.previous``.
    :raises OSError: if the file cannot be written; what was there before is kept.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "tree")
    ...     save_tree(path, {"step": 3, "betas": [(0.9, 0.999)], 0: torch.ones(2)})
    ...     load_tree(path)
    {'step': 3, 'betas': [(0.9, 0.999)], 0: tensor([1., 1.])}
    """
    path = Path(path)
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    content = buffer.getvalue()
    if keep_previous and path.exists():
        os.replace(path, _previous(path))  # load_tree goes back to it, should we be killed here
    atomic_write(path, hashlib.sha256(content).digest() + content)


def load_tree(path: str | os.PathLike) -> object | None:
    """Read what :func:`save_tree` wrote, its tensors on the CPU; ``None`` if there is nothing.

    No code of the file is ever run. A file that is damaged is replaced by the one before it, if
    that was kept, with a warning.

    :raises DamagedFileError: if the file is damaged and there is none before it.
    """
    path = Path(path)
    previous = _previous(path)
    problem = f"{path} is missing"
    if path.exists():
        try:
            return _parse(path)
        except DamagedFileError as error:
            problem = str(error)
    elif not previous.exists():
        return None
    if not previous.exists():
        raise DamagedFileError(f"{problem}; remove it to start afresh")
    try:
        tree = _parse(previous)
    except DamagedFileError as error:
        raise DamagedFileError(f"{problem}; {error}; remove both to start afresh") from error
    warnings.warn(f"{problem}; going on from the one before it", stacklevel=2)
    os.replace(previous, path)
    return tree


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.name}.previous")


def _parse(path: Path) -> object:
    content = path.read_bytes()
    digest, content = content[:32], content[32:]
    if hashlib.sha256(content).digest() != digest:
        raise DamagedFileError(f"{path} is damaged (its digest does not match)")
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, zipfile.BadZipFile, EOFError) as error:
        raise DamagedFileError(f"{path} holds no tree ({error})") from error


# --- work that is kept ---------------------------------------------------------------------------


@contextlib.contextmanager
def lock(folder: str | os.PathLike) -> Iterator[None]:
    """Hold a folder against other processes. The system lets go when the process ends, however.

    :param folder: made if need be; the lock is a file ``.lock`` in it.
    :raises LockedError: if another process holds it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, lock(folder):
    ...     print(*os.listdir(folder))
    .lock
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / ".lock")
    try:
        held.acquire(blocking=False)
    except Timeout:
        raise LockedError(f"another process is at work in {folder}; wait or stop it") from None
    try:
        yield
    finally:
        held.release()


class Work(NamedTuple):
    """Where a long piece of work keeps its finished stages, and when it must stop.

    :ivar folder: of its files; ``None`` keeps nothing.
    :ivar name: of the stage at work, the beginning of its files' names.
    :ivar stop_at: value of ``time.monotonic()`` at which to stop. Every call does at least one
        piece of work first, so that repeated calls always arrive.

    >>> Work(Path("runs"), "annealing").path("007").as_posix()
    'runs/annealing-007.stage'
    """

    folder: Path | None = None
    name: str = "work"
    stop_at: float = math.inf

    def stage(self, name: str) -> Work:
        """The same place and time for another stage."""
        return self._replace(name=name)

    def path(self, part: str) -> Path | None:
        """The file of one part of this stage; ``None`` where nothing is kept."""
        return None if self.folder is None else self.folder / f"{self.name}-{part}.stage"

    def load(self, part: str) -> object | None:
        """What :meth:`save` kept of a part; ``None`` if there is nothing.

        :raises DamagedFileError: if its file is damaged.
        """
        path = self.path(part)
        return None if path is None else load_tree(path)

    def save(self, part: str, tree: object) -> None:
        """Keep a finished part, where anything is kept."""
        path = self.path(part)
        if path is not None:
            save_tree(path, tree)

    def check_time(self, done: str) -> None:
        """Stop here if the time has come.

        :param done: what is done so far, for the message.
        :raises OutOfTimeError: if it has.
        """
        if time.monotonic() >= self.stop_at:
            raise OutOfTimeError(f"out of time: {done}")
