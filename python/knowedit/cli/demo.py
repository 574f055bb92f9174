"""The main job on one screen: six facts into a real language model, what moved, and every bit
back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from knowedit.edits.edit import Edit
from knowedit.errors import EditError
from knowedit.evaluation import drift, evaluate
from knowedit.evaluation.evaluation import Evaluation
from knowedit.evaluation.interview import NOTHING, Interview, Said, said_table
from knowedit.evaluation.measures.drift import Drift
from knowedit.evaluation.subjects.same_subject import contains
from knowedit.facts import sets as datasets
from knowedit.facts.fact import Fact
from knowedit.io.lines import named
from knowedit.io.tables import Table, figure
from knowedit.methods.base import Method
from knowedit.models.editable import EditableModel
from knowedit.models.fingerprint import weights_fingerprint
from knowedit.report.page import Section, write_page
from knowedit.statistics import key_statistics

WORDS = 6  # new tokens shown
FACTS = "demo"  # the set that is written
#: What the summary says of each measure's rate of success.
RATES = {
    "efficacy": "prefers the new fact",
    "paraphrase": "... in other words",
    "neighbourhood": "neighbours still right",
}
EXACT = {"efficacy": "says exactly the new fact", "portability": "says what follows from it"}
#: The roles whose prompts ask for the old answer still.
KEEPS = ("neighbour",)
#: Why an edit misses what a row asks for.
WHY = {
    "edited": "the model realises too little of the planned change",
    "paraphrase": "in other words the subject has another key, which is answered in part",
    "consequence": "only the fact is written; what follows from it is a fact of its own",
    "neighbour": "its key is near an edited one, and the change answers both",
    "question": "the value was found for the fact's own sentence, not for an answer",
    "chat": "the value was found for the fact's own sentence, not for an answer",
}


@dataclass(frozen=True)
class Demonstration:
    """One edit, what the model said before and after, and the model as it was again.

    Attributes:
        before, after: what the model says to every shown prompt.
        fingerprints: of the weights before, edited, and after the undo.
        interviewed: the facts asked as questions and in the chat.
    """

    model: EditableModel
    facts: list[Fact]
    edit: Edit
    measured: Evaluation
    moved: Drift
    before: dict[str, str]
    after: dict[str, str]
    fingerprints: tuple[str, str, str]
    interviewed: list[Said] = field(default_factory=list)

    @property
    def shown(self) -> list[tuple[int, str, str]]:
        """(number of the fact, role, prompt) of every row."""
        return [
            (record, role, prompt)
            for record, fact in enumerate(self.facts)
            for role, prompt in shown_prompts(fact)
        ]

    def rows(self) -> list[dict[str, Any]]:
        """Every shown prompt: the model's words, and the probabilities of both answers."""
        rated = {(row["record"], row["prompt"]): row for row in self.measured.rows()}
        found = []
        for record, role, prompt in self.shown:
            row = rated[record, prompt]
            new, old = ("wrong", "right") if role in KEEPS else ("right", "wrong")
            found.append(
                {
                    "role": role,
                    "prompt": prompt,
                    "wanted": wanted(self.facts[record], role),
                    "before": self.before[prompt],
                    "after": self.after[prompt],
                    "p_new": [row[f"p_{new}_{when}"] for when in ("before", "after")],
                    "p_old": [row[f"p_{old}_{when}"] for when in ("before", "after")],
                }
            )
        return found

    def said(self) -> Table:
        """What the model says, a row a prompt."""
        rows = [
            [
                *(row[name] for name in ("role", "prompt", "before", "after")),
                *(_moved(*row[name]) for name in ("p_new", "p_old")),
            ]
            for row in self.rows()
        ]
        columns = ["", "prompt", "before", "after", "p(new)", "p(old)"]
        return Table(columns, rows, "what the model says")

    def missed(self) -> Table:
        """Where the edited model does not say what it should, and why; a neighbour that the model
        had wrong before, and a question that it had no answer to, are left out.
        """
        rows = [
            [row["role"], row["prompt"], row["wanted"], row["after"], WHY[row["role"]]]
            for row in self.rows()
            if row["wanted"]
            and not contains(row["after"], row["wanted"])
            and (row["role"] not in KEEPS or contains(row["before"], row["wanted"]))
        ]
        for said in self.interviewed:
            if said.way in WHY and said.before and not said.right:
                asked = self.facts[said.record].questions[0]
                rows.append([said.way, asked, said.target, said.after or NOTHING, WHY[said.way]])
        return Table(["", "prompt", "wanted", "said", "why"], rows, "what it does not do")

    def summary(self) -> Table:
        """The measures before and after, and what moved elsewhere."""
        before, after = self.measured.before, self.measured.after
        rates = [(kind, "success", label) for kind, label in RATES.items()]
        rates += [(kind, "exact", label) for kind, label in EXACT.items() if kind in after]
        rows: list[tuple[str, str, str]] = []
        for kind, measure, label in rates:
            was, now = before[kind][measure], after[kind][measure]
            interval = f"[{now.low:.0%}, {now.high:.0%}]"
            rows.append((label, f"{was.mean:.0%}", f"{now.mean:.0%}  {interval}"))
        moved = f"same next word {self.moved.same:.0%}, KL {figure(self.moved.kl, '.4f')} nats"
        rows.append((f"ordinary text ({self.moved.prompts} prompts)", "", moved))
        rows += [(f"layer {layer}", "", text) for layer, text in self._layers()]
        return Table(
            ["", "before", "after"], rows, "measured", [f"note: {w}" for w in self.edit.warnings]
        )

    def _layers(self) -> list[tuple[str, str]]:
        report = self.edit.report
        return [
            (layer, f"|delta|/|W| {norm:.3f}, gain {report.layers[layer]['gain']:.3f}")
            for layer, norm in report.relative_norm.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "model": self.model.name,
            "fingerprints": list(self.fingerprints),
            "prompts": self.rows(),
            "evaluation": self.measured.to_dict(),
            "drift": asdict(self.moved),
            "report": self.edit.report.to_dict(),
            "said": [one.to_dict() for one in self.interviewed],
        }

    def text(self, width: int) -> str:
        """The tables, folded to `width` characters, and the end of the story."""
        asked, missed = said_table(self.interviewed, len(self.facts)), self.missed()
        tables = [self.said(), asked, *([missed] if missed.rows else []), self.summary()]
        return "\n\n".join([*(table.text(width) for table in tables), f"undone: {self._undone()}"])

    def _undone(self) -> str:
        first, edited, last = (found[:12] for found in self.fingerprints)
        return f"all weight bits are back (fingerprint {first} -> {edited} -> {last})"

    def write(self, folder: Path) -> Path:
        """The same as an HTML page `demo.html`."""
        path, missed = folder / "demo.html", self.missed()
        shown = (self.measured, self.moved, self.shown, self.before, self.after)
        more = [
            Section("Asked", [said_table(self.interviewed, len(self.facts))]),
            Section("Missed", [missed if missed.rows else "Nothing of what is shown."]),
            Section("Undone", [f"After the undo {self._undone()}."]),
        ]
        write_page(path, self.model, self.edit, *shown, more)
        return path


def demonstrate(
    model: EditableModel,
    method: Method,
    corpus: Any,
    tokens: int,
    *,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Demonstration:
    """Edit the demo's facts into `model`, ask, measure, and undo.

    Raises:
        EditError: the undo did not restore the weights' bits; or what the parts raise.
    """
    began = time.perf_counter()
    say(
        f"{model.name}: {len(model.layers)} layers, {model.d_ff} keys a layer, "
        f"{str(model.dtype)[6:]}"
    )
    facts, method = datasets.load(FACTS), method.with_corpus(corpus, tokens)
    layers = method.statistics_layers(model)
    statistics = None
    if layers:
        statistics = key_statistics(model, layers, corpus, tokens, seed=seed)
        which = named("layer", statistics.layers)
        say(f"key statistics of {which}: {tokens:,} tokens of {corpus!r}")
    before, original = continuations(model, facts), weights_fingerprint(model.hf)
    asked = Interview(model, facts)
    edit = method.compute(model, facts, statistics)
    measured, moved = evaluate(model, edit, facts, seed=seed), drift(model, edit)
    with edit.applied_to(model):
        after, edited = continuations(model, facts), weights_fingerprint(model.hf)
        interviewed = asked.hear()
    restored = weights_fingerprint(model.hf)
    if edited == original or restored != original:
        raise EditError("the undo did not restore the model's bits: please report this")
    say(f"edited, measured and undone in {time.perf_counter() - began:.0f} s")
    prints = (original, edited, restored)
    return Demonstration(model, facts, edit, measured, moved, before, after, prints, interviewed)


def shown_prompts(fact: Fact) -> list[tuple[str, str]]:
    """The edit prompt, and one paraphrase, one consequence and one neighbour of a fact where it has
    them, with the role of each.
    """
    rows = [("edited", fact.text)]
    rows += [("paraphrase", p) for p in fact.paraphrases[:1]]
    rows += [("consequence", p.prompt) for p in fact.portability[:1]]
    return rows + [("neighbour", p.prompt) for p in fact.neighbours[:1]]


def wanted(fact: Fact, role: str) -> str:
    """What the edited model should say to the prompt with this role; nothing where nobody knows."""
    probes = {"consequence": fact.portability, "neighbour": fact.neighbours}
    return probes[role][0].answer or "" if role in probes else fact.target


def _moved(before: float | None, after: float | None) -> str:
    """Two probabilities of one answer, or nothing where there is no such answer."""
    return "" if before is None else f"{before:.2f} -> {after:.2f}"


def continuations(model: EditableModel, facts: list[Fact]) -> dict[str, str]:
    """What the model says to every shown prompt."""
    prompts = list(dict.fromkeys(p for fact in facts for _, p in shown_prompts(fact)))
    return dict(zip(prompts, (" ".join(text.split()) for text in model.generate(prompts, WORDS))))
