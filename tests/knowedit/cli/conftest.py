"""A folder with a tiny model, facts and a corpus, and the command line in it."""

import json

import pytest

from tests.knowedit.cli.examples import FACTS
from tests.knowedit.commandline import CommandLine


@pytest.fixture
def place(tiny_llama, tmp_path, own_cache):
    """A folder with a model, facts and a corpus."""
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    (tmp_path / "corpus.txt").write_text(
        "\n\n".join(f"Some text number {i} about nothing at all." for i in range(60))
    )
    return tmp_path


@pytest.fixture
def knowedit(place, monkeypatch, capsys):
    """Run a command line in the place's folder. What is to succeed is forced: almost any edit ruins
    a model of random weights.
    """
    line = CommandLine(monkeypatch, capsys, place)

    def run(*arguments, code=0):
        if code == 0 and arguments[0] in ("edit", "apply", "export") and "--force" not in arguments:
            arguments += ("--force",)
        return line(*arguments, code=code)

    return run
