"""The benchmark of MEND and SERAC: what a row says, on tiny models with networks made by hand
(unit).
"""

import pytest

from benchmarks import learned
from benchmarks.common import Report
from knowedit.evaluation.measures.base import ask, questions
from knowedit.facts.fact import Fact, Probe
from knowedit.methods import MEND, SERAC
from knowedit.methods.learned.mend.network import MendNetwork
from tests.knowedit.methods.trained import network_of

KEPT = (Probe("Kim lives in", "Rome"),)
FACTS = [
    Fact(
        "{} lives in",
        name,
        "Oslo",
        true="Rome",
        paraphrases=(f"{name} is at home in",),
        neighbours=KEPT,
    )
    for name in ("Anna", "Bert", "Carl", "Dora")
]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("method", ["MEND", "SERAC"])
def test_a_row_has_measures_and_costs_of_every_edit(tiny_llama, method, size):
    network = MendNetwork.new(tiny_llama, (2, 3), 4)
    network.start_at(0.03)
    network.report = {"steps": 0}
    editor = MEND(network) if method == "MEND" else SERAC(network_of(tiny_llama))
    report = Report("learned", None)
    asked = [question for i, fact in enumerate(FACTS) for question in questions(i, fact)]
    before = ask(tiny_llama, asked, progress=False)
    learned.measure(report, tiny_llama, editor, FACTS, size, asked, before)
    row = report.rows[-1]
    assert row["edits"] == (4 if size == 1 else 2) and row["records"] == 4 and row["seconds"] > 0
    assert {"efficacy exact", "paraphrase success", "neighbourhood unchanged"} <= set(row["after"])
    assert row["after"]["efficacy magnitude"]["mean"] != row["unedited"]["efficacy magnitude"]
    if method == "SERAC":
        assert row["in_scope"] == {"efficacy": 1.0, "paraphrase": 0.0, "neighbourhood": 0.0}
        assert row["after"]["neighbourhood unchanged"]["mean"] == 1.0
    assert tiny_llama.router is None and not tiny_llama.ledger.active
