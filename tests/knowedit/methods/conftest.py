"""Fixtures of the tests of methods."""

import pytest


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def tiny(request):
    """A tiny model of either family: linear layers, and GPT-2's transposed ones."""
    return request.getfixturevalue(request.param)
