"""Shared by the negative controls."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The emulations are thousands of tiny operations: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
