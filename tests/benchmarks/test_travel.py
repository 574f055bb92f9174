"""Edits in llama.cpp are compared as they are said to be, without llama.cpp (unit)."""

from __future__ import annotations

import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from benchmarks import common, travel
from benchmarks.llama_cpp import Said
from knowedit.facts.fact import Fact, Probe
from tests.knowedit.edits.gguf_files import tiny, write
from tests.knowedit.edits.test_edit import an_edit

FACT = Fact(
    "The capital of {} is",
    "France",
    "Lyon",
    paraphrases=("France's capital is",),
    neighbours=(Probe("The capital of Italy is", "Rome"),),
)
TYPES = gguf.GGMLQuantizationType


@pytest.fixture
def bench(byte_tokenizer):
    return travel.Bench(tiny("llama", byte_tokenizer), [FACT])


def transformers_says(model, prompt):
    """Two greedy tokens, with their log-probabilities."""
    ids, more, logp = model.tokenizer(prompt)["input_ids"], [], []
    for _ in range(2):
        with torch.no_grad():
            logits = model.hf(torch.tensor([ids + more])).logits[0, -1]
        logp.append(logits.double().log_softmax(-1).numpy())
        more.append(int(logits.argmax()))
    return Said(ids, "Lyon, it is", more, np.stack(logp))


def test_what_is_the_same_and_what_is_not(bench):
    assert bench.asked == [FACT.text, FACT.paraphrases[0], FACT.neighbours[0].prompt]
    edit = an_edit(bench.model)
    with edit.applied_to(bench.model):
        answers = [transformers_says(bench.model, prompt) for prompt in bench.asked]
    found = bench.compare([edit], answers)
    assert (found["prompts"], found["split"], found["first"], found["whole"]) == (3, 3, 3, 3)
    assert found["largest"] < 1e-5 and (found["facts"], found["llama_cpp"]) == (1, 1)
    assert found["transformers"] == 0  # it says something else than Lyon
    first, second, third = answers
    other = (second.tokens[1] + 1) % 256
    second = replace(second, tokens=[second.tokens[0], other])
    third = replace(third, prompt=third.prompt[1:], logp=third.logp - 0.5, text="Rome")
    found = bench.compare([edit], [replace(first, text="Paris"), second, third])
    assert (found["split"], found["llama_cpp"]) == (2, 0)
    assert found["whole"] < 3 and found["largest"] > 0.1
    assert bench.compare([], answers)["first"] < 3  # the edit moved it


def test_a_row_for_each_way_and_a_limit_in_floats(bench, tmp_path, monkeypatch):
    asked = []

    def ask(file, adapters, scales):
        types = {t.tensor_type for t in gguf.GGUFReader(file).tensors}
        asked.append((TYPES.Q8_0 in types, len(adapters), list(scales)))
        return [transformers_says(bench.model, prompt) for prompt in bench.asked]

    monkeypatch.setattr(bench, "ask", ask)  # which knows of no edit
    source = write(bench.model, tmp_path / "model.gguf", TYPES.Q8_0)
    edits = {"one": an_edit(bench.model), "other": travel.of_queries_and_keys(bench.model)}
    assert len(edits["other"].changes) == 4
    report = common.Report("travel", tmp_path / "travel.jsonl")
    travel.measure(report, bench, source, edits, tmp_path)
    assert asked == [
        *((whole, 2, scales) for whole in (False, True) for scales in ([0, 0], [1, 0], [0, 1])),
        (True, 0, []),
    ]
    assert report.failed  # the edits are not there, where they must be
    rows = [json.loads(line) for line in (tmp_path / "travel.jsonl").read_text().splitlines()][1:]
    assert [row["limit"] for row in rows] == [travel.KEPT] * 3 + [None] * 4
    assert rows[0]["largest"] < travel.KEPT < rows[1]["largest"]
    page = travel.table(tmp_path)
    assert "| tiny-llama | float32 | one, adapter |" in page and "| one, within |" in page
    assert rows[0]["program"] in page
