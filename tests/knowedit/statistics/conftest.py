"""Corpora and collected statistics that several test modules use."""

import pytest

from knowedit.statistics import key_statistics
from tests.knowedit.statistics.helpers import varied_texts


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def tiny(request):
    """Both layouts of weights."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def corpus(tmp_path):
    """Forty documents of very different lengths."""
    path = tmp_path / "corpus.txt"
    path.write_text(varied_texts(40))
    return path


@pytest.fixture
def long_corpus(tmp_path):
    """900 documents of twelve words with numbers."""
    path = tmp_path / "corpus.txt"
    words = "stone river north bread seven light under paper green clock".split()
    path.write_text(
        "\n\n".join(
            " ".join(words[(i * j + j * j) % 10] + str(i % 97) for j in range(12))
            for i in range(900)
        )
    )
    return path


@pytest.fixture
def river_corpus(tmp_path):
    """300 sentences of one form."""
    path = tmp_path / "corpus.txt"
    path.write_text(
        "\n\n".join(
            f"The river number {i} flows north to the town of {i * 7919 % 1000}."
            for i in range(300)
        )
    )
    return path


@pytest.fixture
def collected(tiny_llama, river_corpus, tmp_path):
    """Layers 1 and 2 of the tiny Llama, under a hub-like name."""
    tiny_llama.name = "owner/tiny"
    return key_statistics(tiny_llama, [1, 2], river_corpus, 4000, directory=tmp_path / "ours")
