"""Shared by all tests: a fixed seed for each, whatever ran before it, and one thread."""

from functools import cache

import pytest
import torch

from amortised import data
from tiny import KILLS, SEED

torch.set_num_threads(1)  # as in the processes that tests start: more threads round otherwise


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def mnist_is_read_once():
    """For modules that load the images again and again."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load_mnist", "load_mnist_binary"):
            patch.setattr(data, name, cache(getattr(data, name)))
        yield


def pytest_terminal_summary(terminalreporter):
    """One line on the processes that were killed: a test fails where one left its trace."""
    if KILLS:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(KILLS.items()))
        failed = len(terminalreporter.stats.get("failed", []))
        terminalreporter.write_line(f"kills, seed {SEED}: {counts}; tests that failed: {failed}")
