"""Odd facts, on tiny random models: each is handled, or refused with the reason and the remedy
(unit).
"""

from dataclasses import replace

import pytest
import torch

from knowedit.errors import EditError, ModelError
from knowedit.facts.fact import Fact, FactError
from knowedit.methods import EMMET, FTL, MEMIT, ROME, AlphaEdit, NeuronPatch
from knowedit.methods.locate.values import ValueSettings
from tests.knowedit.methods.helpers import FACTS, VALUES, statistics_of, target_of


def compute(model, facts, editor=None, values=VALUES, **settings):
    editor = replace(editor or MEMIT(), layers=(1,), target=target_of(values), **settings)
    return editor.compute(model, facts, statistics_of(model, [1]), progress=False)


@pytest.mark.parametrize(
    "editor", [MEMIT(), AlphaEdit(), EMMET(), ROME()], ids=lambda editor: editor.name
)
def test_contradictions_and_repeats_are_refused_by_every_method(tiny_llama, editor):
    with pytest.raises(
        FactError, match=r"facts\[1\].*'Nice', which contradicts 'Lyon' of facts\[0\]; remove one"
    ):
        compute(tiny_llama, [FACTS[0], replace(FACTS[0], target="Nice")], editor)
    with pytest.raises(FactError, match=r"facts\[1\].*repeats facts\[0\]; remove one"):
        compute(tiny_llama, [FACTS[0], FACTS[0]], editor)


def test_contradictions_through_one_key_cannot_both_be_written(tiny_llama):
    """Two prompts that differ after the subject only have one key: the value is a compromise, and
    the edit says so.
    """
    pair = [Fact("In {} one says", "Bern", "yes"), Fact("In {} one said", "Bern", "no")]
    made = compute(tiny_llama, pair, values=replace(VALUES, steps=3))
    assert next(iter(made.changes.values())).rank == 1
    assert any("share one value" in warning for warning in made.warnings)
    assert any("did not converge" in warning for warning in made.warnings)


def test_hundreds_of_facts_of_one_subject(tiny_llama):
    many = [Fact(f"{{}} has {number} ", "Peru", "no") for number in range(200)]
    values = ValueSettings(steps=2, contexts=("{}",))
    merged = compute(tiny_llama, many, values=values)
    assert next(iter(merged.changes.values())).rank == 1 and len(merged.facts) == 200
    assert "the facts of 1 subject share one value (Peru)" in merged.warnings
    apart = compute(tiny_llama, many, values=values, merge_subjects=False)
    assert apart.report.layers["1"]["lowest_gain"] < 0.05
    assert any("of the planned change is realised" in warning for warning in apart.warnings)
    with pytest.raises(EditError, match="keys.*are dependent.*merge"):
        compute(tiny_llama, many, EMMET(), values=values, merge_subjects=False)


@pytest.mark.parametrize("length", [1, 60])
def test_targets_of_one_and_of_sixty_tokens(tiny_llama, length):
    fact = Fact("The name of {} is", "Rome", "x" * length if length == 1 else "abcdefghi " * 6)
    row = tiny_llama.row(fact.text, fact.subject, fact.target)
    assert len(row.ids) - row.answer == length + (
        length == 1
    )  # the byte tokenizer counts the space
    made = compute(tiny_llama, [fact, FACTS[0]])
    assert made.report.planned_nll > 0 and bool(torch.isfinite(made.delta(1)).all())


@pytest.mark.parametrize(
    ("prompt", "subject", "target"),
    [
        ("{}の首都は", "日本", "大阪"),
        ("Столица {} —", "Франции", "Лион"),
        ("عاصمة {} هي", "فرنسا", "ليون"),
        ("{} 🇫🇷 की राजधानी", "फ़्रांस", "ल्यों"),
        ("The symbol {} means", "👩‍🚀", "東"),
    ],
)
def test_scripts_other_than_latin(tiny_llama, tiny_gpt2, prompt, subject, target):
    fact = Fact(prompt, subject, target)
    row = tiny_llama.row(fact.text, subject, target)
    before = tiny_llama.tokenizer.decode(row.ids[: row.subject + 1])
    assert before == fact.text[: fact.text.index(subject) + len(subject)]
    for model in (tiny_llama, tiny_gpt2):
        made = compute(model, [fact])
        assert bool(torch.isfinite(made.delta(1)).all()) and made.report.layers["1"]["gain"] > 0.8


def test_a_subject_longer_than_the_context(tiny_llama):
    with pytest.raises(EditError, match="tokens are more than the model's context of 256"):
        compute(tiny_llama, [Fact("The name of {} is", "x" * 300, "y")])
    with pytest.raises(EditError, match="tokens are more than the model's context of 256"):
        compute(tiny_llama, [Fact("The name of {} is", "x", "y" * 300)])


def test_a_subject_at_position_zero(tiny_llama):
    """Its key is the attention sink's: taken from the contexts in front of it, and refused where
    there are none.
    """
    fact = Fact("{} is the name of", "X", "y")
    assert tiny_llama.row(fact.text, "X").subject == 0
    made = compute(tiny_llama, [fact, FACTS[0]])
    assert any("very first token" in warning for warning in made.warnings)
    assert len(made.keys[1]) == 2 * len(VALUES.contexts) - 1
    bare = replace(VALUES, contexts=("{}",))
    with pytest.raises(EditError, match=r"'X'.*very first token.*contexts.*allow_sinks=True"):
        compute(tiny_llama, [fact, FACTS[0]], values=bare)
    assert len(compute(tiny_llama, [fact, FACTS[0]], values=bare, allow_sinks=True).keys[1]) == 2


def test_facts_that_are_not_a_list_of_facts(tiny_llama):
    with pytest.raises(FactError, match="facts: must be a list of Fact, got Fact; put one fact"):
        compute(tiny_llama, FACTS[0])
    with pytest.raises(FactError, match=r"facts\[0\]: must be a Fact, got dict"):
        compute(tiny_llama, [FACTS[0].to_dict()])


def test_statistics_and_histories_that_are_none(tiny_llama):
    with pytest.raises(EditError, match=r"statistics are what key_statistics returns, got str"):
        MEMIT(layers=(1,)).compute(tiny_llama, FACTS[:1], "stats.safetensors")
    with pytest.raises(EditError, match=r"history is a History of earlier edits, got list"):
        MEMIT(layers=(1,)).compute(tiny_llama, FACTS[:1], history=[])


@pytest.mark.parametrize("method", [MEMIT(layers=1), FTL(layers=1), NeuronPatch(layers=1)])
def test_each_fact_alone_refuses_what_all_at_once_refuses(tiny_llama, method):
    """Before the first edit is computed, also where they are computed one by one."""
    with pytest.raises(FactError, match="facts: must be a list of Fact, got Fact"):
        method.compute_each(tiny_llama, FACTS[0])
    with pytest.raises(FactError, match=r"facts\[0\]: must be a Fact, got str"):
        method.compute_each(tiny_llama.hf, ["a"])
    with pytest.raises(EditError, match="statistics are what key_statistics returns, got str"):
        method.compute_each(tiny_llama, FACTS, "stats")
    with pytest.raises(ModelError, match="got NoneType"):
        method.compute_each(None, FACTS)
    assert list(method.compute_each(tiny_llama, [])) == []


@pytest.mark.parametrize("number", [float("inf"), float("nan"), -1.0])
def test_weights_are_finite(number):
    for name, editor in (("metric.weight", MEMIT()), ("metric.ridge", EMMET())):
        with pytest.raises(EditError, match="finite"):
            editor.with_settings({name: number})
