"""What the commands of the project share: an error is one line, and the exit code is 2.

It imports the standard library alone, so that a script that needs no more starts at once.
"""

import argparse
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
