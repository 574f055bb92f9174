"""Written facts asked as prompts, questions and in the chat, with what the model says (unit)."""

from __future__ import annotations

import pytest
import torch

from knowedit.edits.changes import LowRank
from knowedit.edits.edit import Edit
from knowedit.evaluation import interview
from knowedit.evaluation.interview import ANSWER, ASKED, Said, prompts_of, said_table
from knowedit.facts.fact import Fact
from knowedit.io.progress import heard_by

TEMPLATE = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
FACT = Fact("The capital of {} is", "France", "Lyon", relation=None)
KNOWN = Fact("The capital of {} is", "France", "Lyon", questions=("Which city is its capital?",))


@pytest.fixture
def chatty(tiny_llama, monkeypatch):
    """A model whose tokenizer has a chat template."""
    monkeypatch.setattr(tiny_llama.tokenizer, "chat_template", TEMPLATE)
    return tiny_llama


def an_edit(model):
    """One that is large enough to change what is said."""
    torch.manual_seed(0)
    change = LowRank(torch.randn(32, 1), torch.randn(48, 1))
    return Edit("TEST", {model.layout.weight_name(1): change}, [FACT], model.fingerprint)


def test_the_ways_to_ask(chatty):
    asked = dict(prompts_of(chatty, KNOWN))
    assert asked["prompt"] == "The capital of France is"
    assert asked["question"] == "Question: Which city is its capital? Answer:"
    assert asked["chat"].startswith("<") and "Which city is its capital?" in asked["chat"]
    assert "France" in dict(prompts_of(chatty, FACT))["question"]  # without a question of its own


def test_no_template_no_chat_and_nothing_beyond_the_context(tiny_llama):
    assert [way for way, _ in prompts_of(tiny_llama, FACT)] == ["prompt", "question"]
    long = Fact("x" * (tiny_llama.max_length - ANSWER) + " {} is", "France", "Lyon")
    assert prompts_of(tiny_llama, long) == []


def test_what_is_said_is_what_each_model_generates(chatty):
    edit, fingerprint = an_edit(chatty), chatty.fingerprint
    heard = []
    with heard_by(lambda *what: heard.append(what)):
        said = interview(chatty, edit, [FACT] * (ASKED + 1))
    titles = ("asking the unedited model", "asking the edited model")
    assert heard == [(title, done, 24) for title in titles for done in (16, 24)]
    assert [(one.record, one.way) for one in said[:3]] == [
        (0, "prompt"), (0, "question"), (0, "chat")
    ]  # fmt: skip
    assert len(said) == 3 * ASKED

    def words(prompt):
        return " ".join(chatty.generate([prompt], ANSWER)[0].split())

    assert [one.before for one in said[:3]] == [words(one.prompt) for one in said[:3]]
    with edit.applied_to(chatty):
        assert [one.after for one in said[:3]] == [words(one.prompt) for one in said[:3]]
    assert any(one.before != one.after for one in said)
    assert chatty.fingerprint == fingerprint and not chatty.ledger.active


def test_the_table_counts_what_is_right_and_what_broke():
    babble = "La femme, les femme, les femme, les femme, les femme"
    said = [
        Said(0, "prompt", "p", "Lyon", "Paris.", "Lyon, of course"),
        Said(0, "chat", "c", "Lyon", "The capital of France is Paris.", babble),
        Said(1, "prompt", "p", "Thai", "Dutch", "Thailand"),
        Said(1, "chat", "c", "Thai", babble, babble),
    ]
    assert [one.right for one in said] == [True, False, False, False]
    assert [one.broken for one in said] == [False, True, False, False]
    text = said_table(said, 20).text(200)
    assert "the forgotten fact" in said_table(said, 20, "forgotten").text(200)
    assert "prompt: 1 of 2 answers have the new fact" in text
    assert "chat: 0 of 2 answers have the new fact, 1 now repeat themselves" in text
    assert "the first 2 of 20 facts" in text and "question" not in text
    assert "La femme, les femme, les femme, les femme, ..." in text


def test_silence_is_said_and_counted():
    """A model that never answered such a question has not forgotten how to."""
    said = [
        Said(0, "question", "q", "Lyon", "", ""),
        Said(1, "question", "q", "Thai", "Dutch", ""),
        Said(2, "question", "q", "Oslo", "", "Oslo"),
        Said(3, "question", "q", "東京", "", "東京" * 40),
    ]
    text = said_table(said, 4).text(200)
    assert text.count("(nothing)") == 2 and "東京" * 22 + " ..." in text
    assert "2 of 4 answers have the new fact, 1 empty as before the edit" in text
