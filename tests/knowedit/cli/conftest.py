"""A folder with a tiny model, facts and a corpus, and the command line in it."""

import json
import sys

import pytest

from knowedit.cli.app import main
from tests.knowedit.cli.examples import FACTS


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
    """Run a command line in this process, in the place's folder; returns what it printed (errors,
    for another code). What is to succeed is forced: almost any edit ruins a model of random
    weights.
    """
    monkeypatch.chdir(place)
    monkeypatch.setenv("KNOWEDIT_CACHE", str(place / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments, code=0):
        if code == 0 and arguments[0] in ("edit", "apply", "export") and "--force" not in arguments:
            arguments += ("--force",)
        monkeypatch.setattr(sys, "argv", ["knowedit", *arguments])
        capsys.readouterr()
        try:
            main()
            left = 0
        except SystemExit as stop:
            left = stop.code or 0
        said = capsys.readouterr()
        assert left == code, said.out + said.err
        return said.out if code == 0 else said.err

    return run
