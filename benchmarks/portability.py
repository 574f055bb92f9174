"""What follows from a written fact: two-hop questions of MQuAKE-CF and the portability questions of
KnowEdit's zsRE, on a real model (`docs/portability.md`).

Every method writes the first records of a set in one batch, with the model's defaults. Each
question is asked as "Question: ... Answer:", and once more with the new fact as a sentence in front
of it, which is the method to beat: it costs nothing but the tokens. A piece (a method on a set) is
kept when it is measured, and a run that was stopped goes on. Records are the unit of all intervals.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from knowedit.errors import KnowEditError
from knowedit.evaluation import intervals
from knowedit.evaluation.intervals import Estimate
from knowedit.evaluation.measures.base import rate
from knowedit.evaluation.subjects.same_subject import contains
from knowedit.facts.fact import Fact
from knowedit.facts.records import read_records
from knowedit.facts.sets import conflict_free, data_dir, known_sets, load
from knowedit.io.tables import Table
from knowedit.methods.base import statistics_for
from knowedit.methods.registry import make_method
from knowedit.models.copies import copy_of
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model

from . import common
from .quality import CORPUS

NAME = "portability"
METHODS = ("memit", "neuron-patch", "ultraedit", "alphaedit", "metake")
#: The sets, and what tables call them.
SETS = {
    "mquake": "MQuAKE-CF two-hop, rebuilt, not the official file",
    "knowedit-zsre": "KnowEdit zsRE, portability",
}
ASKED = "Question: {}\nAnswer:"
IN_CONTEXT = "{} {}.\n" + ASKED
UNEDITED = "unedited"
WORDS = 12  # tokens of a free answer
#: Figures of a piece, as {record: value}, by the heading of their column.
FIGURES = {
    "written": "the fact itself, exactly, at its own prompt",
    "exact": "the answer that follows, every token the first choice",
    "said": "it is in the free answer to the first question",
    "exact in context": "exact, with the fact in front",
    "said in context": "said, with the fact in front",
}


@dataclass(frozen=True)
class Asked:
    """A fact and the questions that follow from it.

    Attributes:
        answers: (question, answer); aliases: what else counts as said.
        hop: the question and answer of the second hop alone, which the edit does not change; None:
            nobody wrote it down.
    """

    fact: Fact
    answers: Sequence[tuple[str, str]]
    aliases: Sequence[str] = ()
    hop: tuple[str, str] | None = None

    def prompts(self, context: bool) -> list[str]:
        """As the model is asked."""
        told = self.fact.text, self.fact.target
        return [
            IN_CONTEXT.format(*told, q) if context else ASKED.format(q) for q, _ in self.answers
        ]


def asked_of(name: str, count: int) -> list[Asked]:
    """The first records of a set that can be written together and have questions."""
    raw = _mquake() if name == "mquake" else {}
    found = []
    for fact in conflict_free(load(name)):
        answers = [(p.prompt, p.answer) for p in fact.portability if p.answer is not None]
        if answers and len(found) < count:
            record = raw.get(fact.id or "", {})
            hops = record.get("new_single_hops", ())
            hop = (hops[1]["question"], hops[1]["answer"]) if len(hops) == 2 else None
            found.append(Asked(fact, answers, record.get("new_answer_alias", ()), hop))
    return found


def _mquake() -> dict[str, dict[str, Any]]:
    """The records of MQuAKE by the id of their first fact."""
    (path,) = (one.path for one in known_sets() if one.name == "mquake")
    if path is None:
        raise KnowEditError("mquake is not here; put its file into the folder KNOWEDIT_DATA names")
    return {f"mquake:{r['case_id']}:0": r for _, r in read_records(path)}


def measured(model: EditableModel, asked: Sequence[Asked]) -> dict[str, dict[str, float]]:
    """`FIGURES` of the model as it is now."""
    own = rate(model, [one.fact.text for one in asked], [one.fact.new_answer for one in asked])
    found = {"written": {str(i): float(score.exact) for i, score in enumerate(own)}}
    for where in (False, True):
        ending = " in context" * where
        rows = [
            (i, prompt, answer)
            for i, one in enumerate(asked)
            for prompt, (_, answer) in zip(one.prompts(where), one.answers)
        ]
        scores = rate(model, [row[1] for row in rows], [row[2] for row in rows])
        found["exact" + ending] = {
            str(i): mean(float(s.exact) for s, row in zip(scores, rows) if row[0] == i)
            for i in range(len(asked))
        }
        texts = model.generate([one.prompts(where)[0] for one in asked], WORDS)
        found["said" + ending] = {
            str(i): float(any(contains(text, a) for a in (one.answers[0][1], *one.aliases)))
            for i, (one, text) in enumerate(zip(asked, texts))
        }
    return found


def known_hops(model: EditableModel, asked: Sequence[Asked]) -> list[str]:
    """The records whose second hop the model, as it is, says by itself, or rates first."""
    hops = [(str(i), *one.hop) for i, one in enumerate(asked) if one.hop is not None]
    if not hops:
        return []
    prompts = [ASKED.format(question) for _, question, _ in hops]
    scores = rate(model, prompts, [answer for *_, answer in hops])
    texts = model.generate(prompts, WORDS)
    return [
        record
        for (record, _, answer), score, text in zip(hops, scores, texts)
        if score.exact or contains(text, answer)
    ]


def run(
    report: common.Report,
    model: EditableModel,
    sets: Mapping[str, Sequence[Asked]],
    methods: Sequence[str],
    corpus: Any,
    tokens: int,
) -> None:
    """The pieces that the report does not have yet."""
    done = {(row["set"], row["method"]) for row in report.rows[1:]}
    for method in (UNEDITED, *methods):
        for name, asked in sets.items():
            if (name, method) in done:
                continue
            row: dict[str, Any] = {"model": model.name, "set": name, "method": method}
            row |= {"facts": len(asked), "environment": report.rows[0]["environment"]}
            if method == UNEDITED:
                row |= {"known hops": known_hops(model, asked), **_figures(model, asked)}
            else:
                made = make_method(method).with_corpus(corpus)
                statistics = statistics_for([made], model, corpus, tokens)
                start = time.process_time()
                edit = made.compute(model, [one.fact for one in asked], statistics, progress=False)
                row["cpu_seconds_a_fact"] = (time.process_time() - start) / len(asked)
                with edit.applied_to(model):
                    row |= _figures(model, asked)
            report.note(line(row), **row)


def _figures(model: EditableModel, asked: Sequence[Asked]) -> dict[str, Any]:
    return {"figures": measured(model, asked)}


def line(row: Mapping[str, Any]) -> str:
    """One piece in one line."""
    shown = [f"{name} {100 * mean(row['figures'][name].values()):.0f}" for name in FIGURES]
    return f"{row['set']}, {row['method']}: {', '.join(shown)}"


# -- the page
# -------------------------------------------------------------------------------------------------


def share(values: Sequence[float]) -> Estimate:
    """A mean with its interval, in percent."""
    found = intervals.mean(list(values), share=True)
    return Estimate(100 * found.mean, 100 * found.low, 100 * found.high, found.records)


def table(folder: Path) -> str:
    """A table a set; the change from the unedited model, record by record, beside each rate."""
    header, rows = common.read(folder, NAME)
    parts = []
    for name, title in SETS.items():
        mine = [row for row in rows if row["set"] == name]
        if not mine:
            continue
        (clean,) = (row["figures"] for row in mine if row["method"] == UNEDITED)
        lines = []
        for row in mine:
            cells = []
            for figure in FIGURES:
                cells.append(format(share(list(row["figures"][figure].values())), ".0f"))
            gain = (
                "" if row["method"] == UNEDITED else change(row["figures"]["exact"], clean["exact"])
            )
            lines.append([row["method"], *cells, gain])
        facts = mine[0]["facts"]
        notes = [f"{facts} records, written in one batch; exact minus the unedited model's, paired"]
        known = next(row.get("known hops", []) for row in mine if row["method"] == UNEDITED)
        if known:
            exact = ", ".join(
                f"{row['method']} {mean(row['figures']['exact'][r] for r in known):.0%}"
                for row in mine
            )
            notes.append(
                f"of the {len(known)} records whose second hop the unedited model knows, exact: "
                f"{exact}"
            )
        heads = ["method", *FIGURES, "change of exact"]
        parts.append(Table(heads, lines, title, notes).markdown())
    whose = [(f"{row['set']}, {row['method']}", row) for row in rows]
    return "\n\n".join([*parts, common.measured_each(header, whose)])


def change(after: Mapping[str, float], before: Mapping[str, float]) -> str:
    """The mean of each record's own difference, in points; where no record changed, the interval of
    a share that is 0 in so many trials, to both sides.
    """
    differences = [100 * (after[record] - before[record]) for record in after]
    if any(differences):
        return format(intervals.mean(differences), "+.0f")
    end = 100 * intervals.unanimous(False, len(differences), len(differences)).high
    return format(Estimate(0.0, -end, end, len(differences)), "+.0f")


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser(NAME, __doc__, 1, timed=False)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct-q4_1")
    parser.add_argument("--method", action="append", help=f"default: {', '.join(METHODS)}")
    parser.add_argument("--set", action="append", choices=SETS, help="default: all")
    parser.add_argument("--limit", type=int, default=48, help="records of a set")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the statistics")
    arguments = parser.parse_args(argv)
    folder = data_dir() or Path("KNOWEDIT_DATA")
    limit, tokens = arguments.limit, arguments.tokens
    if arguments.quick:
        limit, tokens = 2, 2048
    sets = {name: asked_of(name, limit) for name in arguments.set or SETS}
    copy = copy_of(arguments.model)
    if copy is not None and not copy.here:
        raise KnowEditError(f"{copy.name} is not here: `knowedit models --get {copy.name}`")
    model = load_model(str(copy.folder) if copy else arguments.model, dtype=torch.float32)
    report = common.report(NAME, arguments, limit=limit, tokens=tokens)
    if report.output is not None and report.output.is_file():
        header, kept = common.read_file(report.output)
        report.rows += [{"environment": header["environment"], **row} for row in kept]
    run(report, model, sets, arguments.method or METHODS, folder / CORPUS, tokens)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
