"""Free answers, fluency and consistency: hand-computed cases, and an edit that changes them
(unit).
"""

from __future__ import annotations

import json
import math

import pytest
import torch

from knowedit.edits.changes import LowRank
from knowedit.edits.edit import Edit
from knowedit.errors import KnowEditError
from knowedit.evaluation.generation import (
    Figure,
    TfIdf,
    Writing,
    evaluate_generation,
    ngram_entropy,
    read_references,
    summary,
)
from knowedit.facts.fact import Fact

FACT = Fact("The capital of {} is", "France", "Lyon")


def test_fluency_is_the_published_sum():
    """Bigrams of "a b a b a": ab, ba twice each, 1 bit; trigrams: aba twice, bab once."""
    three = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert ngram_entropy("a b a b a") == pytest.approx((2 / 3 * 1 + 4 / 3 * three) / 2)
    assert ngram_entropy("one two, three") == pytest.approx(  # 3 bigrams, 2 trigrams, a comma
        (2 / 3 * math.log2(3) + 4 / 3 * math.log2(2)) / 2
    )
    assert ngram_entropy("no no no no no no") == ngram_entropy("word") == ngram_entropy("") == 0


def test_consistency_is_the_cosine_of_tf_idf():
    """Of two documents, "cat" is in both (idf 1), "dog" in one (idf ln(3/2) + 1)."""
    vectors, dog = TfIdf(["The cat, a dog".replace("The ", ""), "cat fish"]), math.log(3 / 2) + 1
    assert vectors.idf == pytest.approx({"cat": 1.0, "dog": dog, "fish": dog})
    assert vectors.similarity("Cat dog", "cat") == pytest.approx(1 / math.hypot(1, dog))
    twice = (2 * 1 + dog * dog) / (math.hypot(2, dog) * math.hypot(1, dog))
    assert vectors.similarity("cat cat dog", "dog cat bird") == pytest.approx(twice)
    assert vectors.similarity("cat", "cat") == pytest.approx(1)
    assert vectors.similarity("bird", "cat") == vectors.similarity("fish", "dog") == 0


def test_figures_are_of_what_each_model_writes(tiny_llama):
    torch.manual_seed(0)
    change = LowRank(torch.randn(32, 1), torch.randn(48, 1))
    edit = Edit("TEST", {tiny_llama.layout.weight_name(1): change}, [FACT], tiny_llama.fingerprint)

    def text():
        return tiny_llama.generate([FACT.text], 30)[0]

    before = text()
    with edit.applied_to(tiny_llama):
        after = text()
    said = after.split()[0].strip(".,;")
    told = [FACT, Fact(FACT.prompt, FACT.subject, said or "x")]
    references = {"Lyon": [after, "words that no model says"], "Paris": ["other words"]}
    found = evaluate_generation(tiny_llama, edit, told, references, length=30)
    vectors = TfIdf([*references["Lyon"], *references["Paris"]])
    for estimates, wrote in ((found.before, before), (found.after, after)):
        assert estimates["text"]["fluency"].mean == pytest.approx(ngram_entropy(wrote))
        similar = vectors.similarity(wrote, " ".join(references["Lyon"]))
        assert estimates["text"]["consistency"].mean == pytest.approx(similar)
        assert estimates["text"]["consistency"].records == 1  # the other object has no texts
    assert found.after["prompt"]["contains"].records == 2 and "chat" not in found.after
    assert "fluency" in str(found) and not tiny_llama.ledger.active


def test_a_text_without_room_is_left_out(tiny_llama):
    figures = Writing(tiny_llama, [FACT], length=tiny_llama.max_length).read()
    assert {one.kind for one in figures} == {"prompt", "question"}


def test_means_are_over_facts():
    figures = [Figure(0, "text", "fluency", 2.0), Figure(1, "text", "fluency", 4.0)]
    found = summary([*figures, *(Figure(r, "chat", "contains", 1.0) for r in range(6))])
    assert found["text"]["fluency"].mean == 3 and found["text"]["fluency"].records == 2
    assert found["chat"]["contains"].low == pytest.approx(0.541, abs=1e-3)  # binomial, 6 of 6


def test_references_are_read_and_checked(tmp_path):
    file = tmp_path / "texts.json"
    file.write_text(json.dumps({"Lyon": ["a text"]}))
    assert read_references(file) == {"Lyon": ["a text"]}
    for wrong, message in (
        ("{", "is not JSON"),
        ("[]", "must hold reference texts"),
        ('{"Lyon": "a text"}', "must hold reference texts"),
    ):
        file.write_text(wrong)
        with pytest.raises(KnowEditError, match=message):
            read_references(file)
