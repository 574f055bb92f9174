"""Unit: texts as tokens."""

from __future__ import annotations

import pytest
import torch

from knowedit.errors import ModelError
from knowedit.facts.fact import Answer, Fact, Probe
from knowedit.facts.wordings.forms import Form, in_chat, training_forms
from knowedit.methods.locate.values import prompt_rows
from knowedit.models.tokens import join


@pytest.mark.parametrize(
    ("prompt", "answer", "whole"),
    [
        ("The capital is", "Lyon", "The capital is Lyon"),
        ("2+2=", "5", "2+2=5"),
        ("法国的首都是", "里昂", "法国的首都是里昂"),
        ("กรุงเทพอยู่ใน", "ไทย", "กรุงเทพอยู่ในไทย"),
        ("首都是", "Lyon", "首都是 Lyon"),
        ("수도는", "리옹", "수도는 리옹"),
        ("", "Lyon", "Lyon"),
        ("ends in ", "Lyon", "ends in Lyon"),
        ("np.zeros_like(", "shape", "np.zeros_like(shape"),
        ("docs are at https://", "lyon.fr", "docs are at https://lyon.fr"),
        ("the scheme is https:", "//lyon.fr", "the scheme is https://lyon.fr"),
        ("kept in /usr/", "share", "kept in /usr/share"),
        ("half is 1 /", "2", "half is 1 / 2"),
        ('He said "', "no", 'He said "no'),
        ('He said "no" to "', "Rome", 'He said "no" to "Rome'),
        ('He said "no"', "to Rome", 'He said "no" to Rome'),
        ("It is the girls'", "school", "It is the girls' school"),
        ("It wasn't in '", "Rome", "It wasn't in 'Rome"),
        ("the type is List<", "String", "the type is List<String"),
        ("x <", "3", "x < 3"),
        ("x =", "3", "x = 3"),
        ("x==", "3", "x==3"),
        ("He lived 1901-", "1999", "He lived 1901-1999"),
        ("It was -", "or so", "It was - or so"),
        ("It costs $", "5", "It costs $5"),
        ("\u201e", "Lyon", "\u201eLyon"),
        ("Lyon", ", in France", "Lyon, in France"),
        ("Rome", "'s river", "Rome's river"),
        ("He writes for", ".NET", "He writes for .NET"),
        ("x", "!= 3", "x != 3"),
    ],
)
def test_the_answer_is_joined_as_it_would_be_written(prompt, answer, whole):
    assert join(prompt, answer) == whole


def test_a_template_says_which_occurrence_is_the_subject(tiny_llama):
    row = tiny_llama.row("{} is not what Rome was", "Rome", "so")
    assert row.subject == 3 and row.start == 0
    assert row.ids == tiny_llama.row("Rome is not what Rome was", answer="so").ids
    assert tiny_llama.row("Rome is not what Rome was", "Rome").subject == 20


@pytest.mark.parametrize(
    "prompt,answer,joint,whole",
    [
        ("The capital is", "Lyon", "", "The capital isLyon"),
        ("np.zeros(", "shape", " ", "np.zeros( shape"),
        ("def f():", "return 1", "\n", "def f():\nreturn 1"),
        ("Answer:\n", "Lyon", " ", "Answer:\n Lyon"),
        ("The capital is", "Lyon", None, "The capital is Lyon"),
    ],
)
def test_an_answer_may_say_what_joins_it(prompt, answer, joint, whole):
    assert join(prompt, Answer(answer, joint)) == whole


@pytest.mark.parametrize("joint", ["none", "blank", "line", None])
def test_edits_and_scores_use_what_a_fact_says(tiny_llama, joint):
    """Byte tokens: the answer's tokens are its bytes, with what joins it."""
    fact = Fact("The capital of {} is", "France", "Lyon", join=joint)
    row = tiny_llama.row(fact.prompt, fact.subject, fact.new_answer)
    said = {"none": "Lyon", "blank": " Lyon", "line": "\nLyon", None: " Lyon"}[joint]
    assert tiny_llama.tokenizer.decode(row.ids[row.answer :]) == said
    (given,) = tiny_llama.score([fact.text], [fact.new_answer])
    whole = tiny_llama.hf(torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
    steps = [whole[i - 1, row.ids[i]] for i in range(row.answer, len(row.ids))]
    assert given.logprob == pytest.approx(float(sum(steps)) / len(steps), rel=1e-4)


def test_a_subject_that_stands_twice_is_found_where_the_template_has_it(tiny_llama):
    fact = Fact("import {}\nx = torch.", "torch", "tensor")
    row = tiny_llama.row(fact.prompt, fact.subject)
    assert tiny_llama.tokenizer.decode(row.ids[: row.subject + 1]) == "import torch"
    assert prompt_rows(tiny_llama, fact, ["{}"])[0].subject == row.subject
    assert prompt_rows(tiny_llama, fact, ["Look: {}"])[0].subject == row.subject + len("Look: ")
    bare = next(form for form in training_forms(fact) if form.name == "bare")
    assert bare.row(tiny_llama).subject == row.subject
    assert bare.prompt(tiny_llama) == fact.text
    assert Form("late", "torch", fact.text).row(tiny_llama).subject == len(fact.text) - 2


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_facts_go_through_the_chats_template(tiny_llama):
    fact = Fact(
        "Who wrote {}?",
        "Faust",
        "Ada",
        paraphrases=("Faust is by whom?",),
        neighbours=(Probe("Who wrote Emma?", "Jane"),),
        join="none",
    )
    with pytest.raises(ModelError, match="no chat template"):
        in_chat(tiny_llama, [fact])
    tiny_llama.tokenizer.chat_template = TEMPLATE
    try:
        (asked,) = in_chat(tiny_llama, [fact])
    finally:
        tiny_llama.tokenizer.chat_template = None
    assert asked.text == "<user>Who wrote Faust?\n<assistant>"
    assert asked.paraphrases == ("<user>Faust is by whom?\n<assistant>",)
    assert asked.neighbours[0] == Probe("<user>Who wrote Emma?\n<assistant>", "Jane")
    row = tiny_llama.row(asked.prompt, asked.subject, asked.new_answer)
    assert tiny_llama.tokenizer.decode(row.ids[row.answer :]) == "Ada"
    assert tiny_llama.tokenizer.decode(row.ids[row.start : row.subject + 1]) == "Faust"
