"""Unit: the texts to train with and to test with never share a wording, and every form says where
subject and object are; model, data: for every shipped and public fact.
"""

from __future__ import annotations

import copy

import pytest
from tokenizers.processors import TemplateProcessing

from knowedit.errors import ModelError
from knowedit.facts.fact import Fact, FactError, Probe
from knowedit.facts.sets import load
from knowedit.facts.wordings.forms import Form, held_out_forms, training_forms, training_neighbours
from knowedit.facts.wordings.relations import (
    INSTRUCTIONS,
    SPLITS,
    identity_prompts,
    kind_of,
    probes,
    relations,
    unrelated_prompts,
    wordings,
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
    assert found["sent"].opening == found["bare"].message == "The seat of {} is in"


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
@pytest.mark.data
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


@pytest.mark.parametrize("relation", relations())
def test_training_and_test_wordings_are_disjoint(relation):
    pools = relations()[relation]
    templates = [
        t for kind in ("paraphrases", "questions") for split in SPLITS for t in pools[kind][split]
    ]
    templates += [pools["prompt"]] if "prompt" in pools else []
    assert len({template.casefold() for template in templates}) == len(templates)
    for template in templates:
        assert template.count("{}") == 1 and template == template.strip()
    for kind in ("paraphrases", "questions"):
        assert pools[kind]["train"] and len(pools[kind]["test"]) >= 2
    assert all(q.endswith("?") for split in SPLITS for q in pools["questions"][split])
    assert len(set(pools["entities"])) == len(pools["entities"]) >= 8
    assert ("prompt" in pools) == any(fact.relation == relation for fact in EMBEDDED)


def test_instructions_and_probes_are_disjoint():
    assert not {t.partition("{}")[0] for t in INSTRUCTIONS["train"]} & {
        t.partition("{}")[0] for t in INSTRUCTIONS["test"]
    }
    for kind, pools in probes().items():
        assert len(pools["train"]) >= 3 and len(pools["test"]) >= 4
        assert not set(pools["train"]) & set(pools["test"]), kind
        assert all(t.count("{}") == 1 for split in SPLITS for t in pools[split])
    assert {pools["kind"] for pools in relations().values()} == set(probes()) - {"identity"}


def test_wordings_fill_the_subject_in():
    (fact,) = load("demo", limit=1)
    assert wordings(fact).questions == tuple(
        t.replace("{}", "France") for t in relations()["capital"]["questions"]["train"]
    )
    with pytest.raises(FactError, match="split must be one of train, test, got 'dev'"):
        wordings(fact, "dev")
    with pytest.raises(
        FactError, match="relation 'P35' of 'A b is' has no wordings; known relations: capital"
    ):
        wordings(Fact("A {} is", "b", "c", relation="P35"))
    found = wordings(Fact("{}, whose seat is in", "Bern", "x", relation="P36"))
    assert found.questions[0] == "Which city is the seat of government of Bern?"
    assert found.instructions[0] == "Fill in the blank: Bern, whose seat is in ____"
