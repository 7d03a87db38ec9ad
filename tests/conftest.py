"""Shared by all tests: a fixed seed for each, whatever ran before it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
