"""Shared by all tests: a fixed seed for each, whatever ran before it, and one thread."""

from functools import cache

import pytest
import torch

from amortised import data

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
