"""What the commands of the project share: how they read arguments, and how they end.

The module imports the standard library alone, so that a script that needs no more starts at once.
"""

import argparse
import glob
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """As that of the standard library, but an error is one line instead of the whole usage.

    The line names the command, the argument, its value and, where it has them, the choices.

    >>> parser = Parser(prog="count")
    >>> _ = parser.add_argument("number", type=int)
    >>> parser.parse_args(["3"])
    Namespace(number=3)
    >>> import contextlib, sys
    >>> with contextlib.redirect_stderr(sys.stdout), contextlib.suppress(SystemExit):
    ...     parser.parse_args(["three"])
    count: argument number: invalid int value: 'three' (--help lists the arguments)
    """

    def error(self, message: str) -> NoReturn:
        """Print the line on standard error, and exit with code 2."""
        self.exit(2, f"{self.prog}: {message} (--help lists the arguments)\n")


def stop(message: str, code: int) -> int:
    """Say why a command ends, and with which code."""
    print(message, file=sys.stderr)
    return code


def command(main: Callable[[], int]) -> None:
    """Run a command as a process: Ctrl-C and SIGTERM end it with one line and exit code 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(stop("stopped; the same command goes on from here", 130))


def tidy(folder: Path, prefix: str) -> str:
    """Remove what processes that were killed on this machine left under temporary names.

    Such a name is ``prefix``, the number of the process and a hyphen, and more. Those of living
    processes are left alone: they may be at work in the same folder.

    :return: ``prefix``, the number of this process and a hyphen.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for number in (os.getpid(), 2**22 + 1):  # the latter is beyond those that Linux gives
    ...         Path(folder, f".part-{number}-a").touch()
    ...     own = tidy(Path(folder), ".part-")
    ...     os.listdir(folder) == [f"{own}a"]
    True
    """
    for stale in folder.glob(f"{glob.escape(prefix)}[0-9]*-*"):
        try:
            os.kill(int(stale.name.removeprefix(prefix).split("-")[0]), 0)
        except OSError as error:
            if isinstance(error, ProcessLookupError):  # else it lives, and is another user's
                shutil.rmtree(stale, True) if stale.is_dir() else stale.unlink(missing_ok=True)
    return f"{prefix}{os.getpid()}-"
