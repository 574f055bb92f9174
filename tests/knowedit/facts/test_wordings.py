"""The forms of a fact: trained and tested ones never share a wording, and every one says where
subject and object are.
"""

from __future__ import annotations

import copy

import pytest
from tokenizers.processors import TemplateProcessing

from knowedit.errors import ModelError
from knowedit.facts.fact import Fact, Probe
from knowedit.facts.sets import load
from knowedit.facts.wordings.forms import Form, held_out_forms, training_forms, training_neighbours
from knowedit.facts.wordings.relations import (
    identity_prompts,
    kind_of,
    relations,
    unrelated_prompts,
)
from knowedit.models.editable import EditableModel

EMBEDDED = load("embedded")
FACT = Fact("The seat of {} is in", "Bern", "Rome", "Bern", relation="P36")


def names(forms):
    return [form.name for form in forms]


def test_a_known_relation_brings_its_questions():
    found = {form.name: form for form in training_forms(FACT)}
    assert list(found) == ["bare", "pre1", "qa2", "ch1", "ch2", "sent"]
    train = relations()["P36"]["questions"]["train"]
    assert found["qa2"].message == f"Q: {train[0]}\nA:".replace("{}", "Bern")
    assert (
        found["ch1"].message == f"{train[1]} Be brief.".replace("{}", "Bern") and found["ch1"].chat
    )
    assert found["sent"].opening == found["bare"].message == "The seat of Bern is in"


def test_given_questions_win_and_an_unknown_relation_gets_generic_ones():
    own = training_forms(FACT, ["Seat of {}?"])
    assert own[2].message == "Q: Seat of Bern?\nA:" and own[3].message == "Seat of Bern? Be brief."
    plain = Fact("The seat of {} is in", "Bern", "Rome", questions=("Where does Bern sit?",))
    assert names(training_forms(plain)) == ["bare", "pre1", "gq", "ch2", "gc"]
    assert not any("Where does Bern sit?" in form.message for form in training_forms(plain))
    assert names(held_out_forms(plain)) == [
        "cloze",
        "question",
        "chat_question",
        *["chat_completion"] * 2,
        *["distractor"] * 2,
    ]


@pytest.mark.parametrize("facts", [EMBEDDED, [FACT]], ids=["embedded", "counterfact"])
def test_no_test_text_is_a_training_text(facts):
    for fact in facts:
        trained = {(form.message, form.opening) for form in training_forms(fact)}
        tested = held_out_forms(fact)
        assert {form.name for form in tested} == {
            "cloze",
            "paraphrase",
            "question",
            "chat_question",
            "chat_completion",
            "distractor",
        }
        shared = {form.name for form in tested if (form.message, form.opening) in trained}
        assert shared == {"cloze"}  # which is the edited prompt itself
        for split in ("train", "test"):
            assert all(
                fact.subject in p
                for p in (*identity_prompts([fact], split), *unrelated_prompts([fact], split))
            )


@pytest.mark.model
def test_every_form_of_every_shipped_and_public_fact_can_be_tokenised(smollm, data):
    for fact in [*EMBEDDED, *load("same-subject")[::7]]:
        for form in [*training_forms(fact), *held_out_forms(fact)]:
            row = form.row(smollm, fact.target)
            assert row.subject is not None and row.answer is not None and row.subject < row.answer
            assert smollm.tokenizer.decode(row.ids[row.answer :]).strip() == fact.target


def test_a_chat_begins_with_one_bos(tiny_llama):
    """Where the template writes it and the tokenizer adds it (Llama, Mistral, Gemma)."""
    tokenizer = copy.deepcopy(tiny_llama.tokenizer)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[U]{{ m['content'] }}[/U]{% endfor %}"
    )
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    model = EditableModel(tiny_llama.hf, tokenizer, name="with bos")
    turn = [{"role": "user", "content": "hi"}]
    wanted = tokenizer.apply_chat_template(
        turn, tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert model.row(model.chat("hi")).ids == wanted and wanted[:2] != [bos[1]] * 2


def test_a_chat_needs_a_template(tiny_llama):
    with pytest.raises(ModelError, match="no chat template"):
        Form("x", "Bern", "Where is Bern?", chat=True).row(tiny_llama)
    row = Form("x", "Bern", "Bern is in").row(tiny_llama, "Rome")
    assert (row.subject, row.answer) == (3, 10)


def test_the_kind_of_a_subject_follows_from_the_relations_that_tell():
    def kind(*ids):
        return kind_of([Fact("{} is", "x", "y", relation=r) for r in ids])

    assert (
        kind("P136", "P364") == "work"
        and kind("P36") == "place"
        and kind("P138") == kind(None) == "any"
    )
    assert kind("P36", "P27", "P103") == "person"


def test_training_neighbours_are_others_and_not_the_tested_ones():
    fact = Fact(
        "The seat of {} is in",
        "Ghana",
        "Rome",
        relation="P36",
        neighbours=(Probe("Where is SLOVENIA governed?"),),
    )
    pool = [
        Fact("{} has its seat in", s, "x", relation=r)
        for s, r in (("Peru", "P36"), ("Chad", "P36"), ("Fiji", "P37"))
    ]
    (found,) = training_neighbours([fact], pool, ["The capital of Chad"], count=99)
    assert "Peru has its seat in" in found and "The seat of Ecuador is in" in found
    assert not [
        p for p in found if any(name in p for name in ("Ghana", "Slovenia", "Chad", "Fiji"))
    ]
    assert len(found) == len(relations()["P36"]["entities"]) - 2 + 1
    assert training_neighbours([fact], pool, count=3) == training_neighbours([fact], pool, count=3)
    assert training_neighbours([fact], pool, count=3, seed=1) != training_neighbours(
        [fact], pool, count=3
    )
    assert training_neighbours([Fact("A {} is", "b", "c")]) == [[]]


def test_embedded_facts_have_neighbours_to_train_on():
    assert all(len(found) >= 3 for found in training_neighbours(EMBEDDED))
