"""Run a command while holding a lock, so that two builds in one folder take turns.

    python workflow/locked.py .cache/build.lock COMMAND ...

The command inherits the lock: it is held as long as the command or a child that kept it lives, and
goes with them however they end.
"""

import fcntl
import os
import sys
from pathlib import Path
from typing import IO


def hold(lock: Path, doing: str) -> IO:
    """Take the lock, waiting for its holder if need be; it is held until the file is closed."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    handle = lock.open("a")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"Another process is {doing} in this folder: waiting for it to end.", flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


if __name__ == "__main__":
    handle = hold(Path(sys.argv[1]), "building the book")
    os.set_inheritable(handle.fileno(), True)
    os.execv(sys.argv[2], sys.argv[2:])
