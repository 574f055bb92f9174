"""Which method for these facts: the plausible ones measured on them, and the choice that follows.

A method is set aside where it ruins the model, or is exact on clearly fewer facts than the best
one. Of the others the one is taken whose paraphrases and neighbours are right most often together;
where that does not tell them apart, the one that says more of the facts in a chat, then the one
that moves ordinary text least.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from knowedit.edits.limits import RUINOUS
from knowedit.errors import KnowEditError
from knowedit.evaluation.baseline import Baseline
from knowedit.evaluation.intervals import Estimate
from knowedit.evaluation.protocols import (
    RESULTS,
    add_to_run,
    kept_results,
    method_key,
    run,
    run_settings,
    unusual,
)
from knowedit.facts.fact import Fact
from knowedit.io.lines import number_of
from knowedit.io.tables import Column, Table
from knowedit.io.tensors import understood
from knowedit.methods.base import Method
from knowedit.models.editable import EditableModel
from knowedit.statistics import KeyStatistics

#: What a fact costs beside MEMIT's, about, as the benchmarks found on SmolLM2-135M; dearer methods
#: come later.
PRICE = {"memit": 1, "rome": 1, "metake": 4, "neuron-patch": 5, "rose": 5}
#: From so many facts on, a method that is made for crowded batches is tried too.
MANY = 20
#: Shares by which a method may be less exact than the best one and still be chosen.
NEARLY = 0.05
#: Below this share of exact answers no method is recommended.
USEFUL = 0.5
#: What is looked at beside the facts' own prompts, as kind and measure of an evaluation.
WORDINGS, AROUND = ("paraphrase", "success"), ("neighbourhood", "unchanged")
NAMES = {"paraphrase": "paraphrase", "neighbourhood": "neighbour"}


def plausible(facts: Sequence[Fact]) -> list[str]:
    """Names of the methods that are worth a try on these facts, the cheap ones first."""
    names = {"memit", "neuron-patch", "rose"}
    if len(facts) == 1:
        names = {"rome", "neuron-patch", "rose"}
    elif len(facts) >= MANY:
        names |= {"metake"}
    return sorted(names, key=lambda name: (PRICE[name], name))


@dataclass(frozen=True)
class Recommendation:
    """The methods that were measured, and the one to take.

    Attributes:
        results: records as `Result.to_dict` makes them, by the protocol "batch", in the order of
            the methods.
        skipped: names of the methods that there was no time for.
    """

    facts: list[Fact]
    results: list[dict[str, Any]]
    skipped: list[str] = field(default_factory=list)

    @property
    def choice(self) -> dict[str, Any] | None:
        """The method to take; None where none writes the facts."""
        return self._ranked[0] if self._ranked else None

    @property
    def _ranked(self) -> list[dict[str, Any]]:
        """The methods that were not set aside, best first."""
        sound = [result for result in self.results if not _ruinous(result)]
        best = max((_exact(result) for result in sound), default=0.0)
        if best < USEFUL:
            return []
        near = [result for result in sound if _exact(result) >= best - NEARLY]
        return sorted(near, key=_order)

    def sentence(self) -> str:
        """What to do, and how sure that is."""
        if self.choice is None:
            return (
                "None of these writes your facts without ruining the model: look at the prompts "
                "with `knowedit doctor MODEL`, and measure the layers with `knowedit calibrate "
                "MODEL`."
            )
        these, one = number_of(len(self.facts), "fact"), len(self.facts) == 1
        said = [f"{_exact(self.choice):.0%} of {these} {'is' if one else 'are'} said exactly"]
        for (kind, measure), count, words in (
            (WORDINGS, sum(len(fact.paraphrases) for fact in self.facts), "prefer the new fact"),
            (AROUND, sum(len(fact.neighbours) for fact in self.facts), "decide as before"),
        ):
            if (found := _rate(self.choice, kind, measure)) is not None:
                said.append(f"{found.mean:.0%} of {number_of(count, NAMES[kind])} {words}")
        if (chat := _in_chat(self.choice)) is not None:
            said.append(f"{chat} come up in a chat")
        alone = len(self.results) == 1 and self.skipped
        head = "There was time for {} alone" if alone else "Take {}"
        text = f"{head.format(self.choice['method'])}: {', '.join(said)}"
        if alike := [other["method"] for other in self._ranked[1:] if self._alike(other)]:
            text += f"; {these} {'does' if one else 'do'} not tell it from {' or '.join(alike)}"
        return text + "."

    def _alike(self, other: Mapping[str, Any]) -> bool:
        """Whether every interval of `other` meets the choice's."""
        if self.choice is None:
            return False
        for kind, measure in (WORDINGS, AROUND):
            mine, theirs = (_rate(r, kind, measure) for r in (self.choice, other))
            if mine and theirs and (mine.low > theirs.high or theirs.low > mine.high):
                return False
        return True

    def table(self) -> Table:
        """A line a method."""
        columns: list[Column | str] = [
            "method",
            *(
                Column(name, ".0%", "right")
                for name in ("prefers it", "exact", "in other words", "neighbours kept")
            ),
            Column("in a chat", align="right"),
            Column("drift, nats", ".4f"),
            Column("s a fact", ".1f"),
            "",
        ]
        rows = [
            [
                result["method"],
                _rate(result, "efficacy", "success"),
                _rate(result, "efficacy", "exact"),
                _rate(result, *WORDINGS),
                _rate(result, *AROUND),
                _in_chat(result),
                result["side_effects"]["drift"]["kl"],
                result["seconds"],
                "ruins the model" if _ruinous(result) else "",
            ]
            for result in self.results
        ]
        return Table(columns, rows, notes=self._notes()).without_empty_columns()

    def _notes(self) -> list[str]:
        notes = [
            "prefers it: the new answer is likelier than the old one; exact: every word of it is "
            "the model's first choice"
        ]
        if not any(fact.paraphrases for fact in self.facts):
            notes.append("note: no fact has paraphrases; with some, other wordings are measured")
        if not any(fact.neighbours for fact in self.facts):
            notes.append("note: no fact has neighbours; with some, it shows what else changes")
        ((subject, count),) = Counter(fact.subject for fact in self.facts).most_common(1)
        if count > 1:
            notes.append(
                f"note: several facts of one subject ({subject!r}: {count}); measure them with "
                "`knowedit same-subject` too"
            )
        if self.skipped:
            notes.append(f"note: no time for {', '.join(self.skipped)}; give more --minutes")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "model": self.results[0]["model"],
            "facts": len(self.facts),
            "choice": None if self.choice is None else self.choice["method"],
            "sentence": self.sentence(),
            "skipped": self.skipped,
            "rows": self.results,
        }

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.sentence()}"


def recommend(
    model: EditableModel,
    facts: Sequence[Fact],
    methods: Sequence[Method],
    statistics: KeyStatistics | None,
    dataset: str = "",
    *,
    minutes: float | None = None,
    seed: int = 0,
    folder: Path | None = None,
    named: str = "",
    asked: Mapping[str, Any] | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> Recommendation:
    """Measure `methods` on `facts`, each as one batch; the model is left as it was found.

    Args:
        dataset: its name, for the records.
        minutes: no method is started that, going by its price and the first one's time, would not
            be done in that time. The first always is.
        folder: for the results, on disk before the next method starts; those that it has are not
            measured again.
        named, asked: the model and the options (corpus, tokens and the like) as the user wrote
            them, for the records.
        clock: seconds.

    Raises:
        KnowEditError: no methods or no facts; `folder` holds another run; or what the methods
            raise.
    """
    if not methods:
        raise KnowEditError("there are no methods to compare; name at least one")
    options = unusual({"seed": seed, **(asked or {})})
    shared = run_settings(dataset, model, facts, options)
    kept = kept_results(folder, shared)
    began = clock()
    found = Recommendation(list(facts), [])
    baseline: Baseline | None = None  # measured for the first method that needs it
    unit = 0.0  # seconds for a method of price 1
    for number, method in enumerate(methods, 1):
        place = f"{method.name}, {number} of {len(methods)}"
        if (record := kept.get(method_key(method.to_dict()))) is not None:
            say(f"{place}: kept from {folder}")
            assert folder is not None
            with understood(folder / RESULTS, "results", KnowEditError, "choose another folder"):
                str(Recommendation(found.facts, [record]))
            found.results.append(record)
            continue
        baseline = baseline or Baseline(model, facts, seed=seed, progress=progress)
        price = PRICE.get(method.kind, max(PRICE.values()))
        start = clock()
        if minutes is not None and found.results and start - began + unit * price > 60 * minutes:
            found.skipped.append(method.name)
            continue
        say(f"{place}: computing and measuring")
        told = run(baseline, statistics, method, "batch", dataset, progress=progress)
        told = replace(told, run={**shared, "model": named or model.name, "asked": options})
        if folder is not None:
            add_to_run(folder, told)
        found.results.append(told.to_dict())
        unit = max(unit, (clock() - start) / price)
    return found


def _rate(result: Mapping[str, Any], kind: str, measure: str) -> Estimate | None:
    found = result["evaluation"]["after"].get(kind, {}).get(measure)
    return None if found is None else Estimate(**found)


def _exact(result: Mapping[str, Any]) -> float:
    return float(result["evaluation"]["after"]["efficacy"]["exact"]["mean"])


def _score(result: Mapping[str, Any]) -> float:
    """Mean of the paraphrases that prefer the new fact and the neighbours that decide as before, as
    far as the facts have any; else of the exact answers.
    """
    found = [_rate(result, kind, measure) for kind, measure in (WORDINGS, AROUND)]
    known = [one.mean for one in found if one is not None]
    return sum(known) / len(known) if known else _exact(result)


def _order(result: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Sorts the best to the front: by the score; where that is the same, by the answers in the
    chat, then by what moved elsewhere.
    """
    said, asked = _chat(result)
    drift = result["side_effects"]["drift"]["kl"]
    return -_score(result), -said / max(asked, 1), drift, result["seconds"]


def _chat(result: Mapping[str, Any]) -> tuple[int, int]:
    """How many of the facts that were asked in the chat template were said, and were asked."""
    mine = [one["right"] for one in result["said"] if one["way"] == "chat"]
    return sum(mine), len(mine)


def _in_chat(result: Mapping[str, Any]) -> str | None:
    said, asked = _chat(result)
    return f"{said} of {asked}" if asked else None


def _ruinous(result: Mapping[str, Any]) -> bool:
    return any(text.startswith(RUINOUS) for text in result["report"].get("warnings", ()))
