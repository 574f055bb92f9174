"""Editing quality on CounterFact records that no setting was chosen on: floors that a regression
would break (model, data).

`benchmarks/quality.py` measures all 100 of them; this runs a part in a few minutes.
"""

import dataclasses

import pytest

import knowedit as ke
from knowedit.evaluation import evaluate_each
from knowedit.facts import sets as datasets

pytestmark = [pytest.mark.model, pytest.mark.data, pytest.mark.slow]


@pytest.fixture(scope="module")
def records(data):
    """The last 48 records of the file, four neighbours each."""
    facts = datasets.load("counterfact")[-48:]
    return [dataclasses.replace(fact, neighbours=fact.neighbours[:4]) for fact in facts]


@pytest.fixture(scope="module")
def statistics(smollm, data, tmp_path_factory):
    corpus = data / "enwiki_2021_sample_3MB.txt.gz"
    return ke.key_statistics(
        smollm, [5], corpus, 32_768, directory=tmp_path_factory.mktemp("statistics"), progress=False
    )


@pytest.mark.timeout(900)
def test_a_batch_of_48_facts(smollm, records, statistics):
    edit = ke.MEMIT().compute(smollm, records, statistics, progress=False)
    found = ke.evaluate(smollm, edit, records, progress=False)
    after, unedited = found.after, found.before["neighbourhood"]["success"].mean
    assert after["efficacy"]["success"].mean >= 0.97
    assert after["efficacy"]["exact"].mean >= 0.88
    assert after["paraphrase"]["success"].mean >= 0.92
    assert after["neighbourhood"]["success"].mean >= unedited - 0.06
    assert after["neighbourhood"]["unchanged"].mean >= 0.92
    assert edit.report.gain >= 0.9


@pytest.mark.timeout(900)
def test_single_rome_edits(smollm, records, statistics):
    facts = records[:16]
    edits = ke.ROME().compute_each(smollm, facts, statistics, progress=False)
    found = evaluate_each(smollm, edits, facts, progress=False)
    assert found.after["efficacy"]["success"].mean >= 0.93
    assert found.after["efficacy"]["exact"].mean >= 0.87
    assert found.after["paraphrase"]["success"].mean >= 0.9
    assert (
        found.after["neighbourhood"]["success"].mean
        >= found.before["neighbourhood"]["success"].mean - 0.08
    )
