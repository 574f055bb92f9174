"""Several facts of one subject, asked for in the words a user would choose: RoSE's scenario (arXiv
2603.15518).

Each fact is asked for in six forms whose wordings no edit was trained on
(`knowedit.facts.wordings.forms.held_out_forms`), and once for a greedy answer; around it,
neighbours and the subject's own identity and unrelated facts show what else moved:

* a form: success = P(new) > P(true), length-normalised; magnitude = P(new) - P(true); exact = every
  token of the new object is the arg-max;   greedy: contains = the object stands in the first 16
  tokens of the answer to a chat question;
* neighbourhood: success = P(true) > P(new), magnitude = P(true) - P(new), unchanged = the same
  decision as unedited;
* essence ("{} is a", which the stock objectives train), identity, unrelated: kl = KL(unedited ||
  edited) of the next word in nats, kept = the same arg-max.

A fact's prompts are averaged first, then facts (for the last three: subjects); intervals are 95 %
percentile bootstrap intervals over subjects, whose facts stay together. Every fact's values are
kept: `compare` pairs two methods on them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from knowedit.edits.edit import Edit
from knowedit.errors import KnowEditError
from knowedit.evaluation.evaluation import Estimates, before_and_after, plain
from knowedit.evaluation.intervals import estimates
from knowedit.evaluation.measures.base import Answer, Question, answered, ask, questions
from knowedit.evaluation.measures.drift import divergence
from knowedit.facts.fact import Fact
from knowedit.facts.wordings.forms import held_out_forms
from knowedit.facts.wordings.relations import identity_prompts, unrelated_prompts
from knowedit.io.progress import bar
from knowedit.io.tables import Table
from knowedit.methods.locate.values import ESSENCE
from knowedit.models.editable import EditableModel
from knowedit.models.load import accepts_model

FORMS = ("cloze", "paraphrase", "question", "chat_question", "chat_completion", "distractor")
KEPT = ("essence", "identity", "unrelated")
GREEDY_TOKENS = 16
#: The measures that are yes or no for each prompt.
SHARES = ("success", "exact", "contains", "unchanged", "kept")


@dataclass(frozen=True)
class Probes:
    """Every prompt that is asked about some groups of facts, one group a subject.

    Attributes:
        subjects: names; facts: all facts, `owner[i]` the subject of fact `i`.
        questions: forms and neighbours; a question's `record` is its fact.
        greedy: (fact, prompt); kept: (subject, kind, prompt).
    """

    subjects: list[str]
    facts: list[Fact]
    owner: list[int]
    questions: list[Question]
    greedy: list[tuple[int, str]]
    kept: list[tuple[int, str, str]]


@dataclass(frozen=True)
class Observation:
    """What the model, as it is now, makes of `Probes`: answers, greedy texts, log-probabilities
    `[kept, vocab]`.
    """

    answers: list[Answer]
    said: list[str]
    logprobs: Tensor


@dataclass(frozen=True)
class Value:
    """One measure of one fact (or, with `fact` None, of one subject), mean over its prompts; NaN
    where undefined.
    """

    kind: str
    measure: str
    subject: str
    fact: str | None
    before: float
    after: float


@dataclass(frozen=True)
class SameSubjectEvaluation:
    """Attributes: values: of every fact and subject; sizes: `{subject: number of facts}`; said:
    (prompt, before, after).
    """

    values: list[Value]
    sizes: dict[str, int]
    said: list[tuple[str, str, str]]
    seed: int = 0

    @property
    def before(self) -> Estimates:
        """`{kind: {measure: Estimate}}` of the unedited model."""
        return self._estimates(lambda v: v.before)

    @property
    def after(self) -> Estimates:
        """The same under the edit."""
        return self._estimates(lambda v: v.after)

    def of_size(self, facts: int) -> SameSubjectEvaluation:
        """The part on subjects with so many facts. Raises KnowEditError when there are none."""
        sizes = {subject: size for subject, size in self.sizes.items() if size == facts}
        if not sizes:
            raise KnowEditError(
                f"no subject has {facts} facts; the sizes are {sorted(set(self.sizes.values()))}"
            )
        return SameSubjectEvaluation(
            [v for v in self.values if v.subject in sizes], sizes, [], self.seed
        )

    def _estimates(self, read: Callable[[Value], float]) -> Estimates:
        values = ((v.kind, v.measure, v.subject, read(v)) for v in self.values)
        return estimates(values, self.seed, SHARES)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with every single value; `from_dict` reads it back."""
        values = [
            {k: None if v != v else v for k, v in asdict(value).items()} for value in self.values
        ]  # NaN is no JSON
        return {
            "before": plain(self.before),
            "after": plain(self.after),
            "values": values,
            "sizes": self.sizes,
            "said": [list(s) for s in self.said],
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> SameSubjectEvaluation:
        """Read `to_dict`'s form. Raises KnowEditError for another one."""
        try:
            numbers = ("before", "after")
            rows: list[dict[str, Any]] = record["values"]
            values = [
                Value(**{**row, **{k: math.nan for k in numbers if row[k] is None}}) for row in rows
            ]
            return cls(
                values,
                dict(record["sizes"]),
                [(p, b, a) for p, b, a in record["said"]],
                record["seed"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise KnowEditError(
                f"not a same-subject evaluation ({type(error).__name__}: {error})"
            ) from error

    def table(self, title: str = "") -> Table:
        """Every measure before and after."""
        return before_and_after(self.before, self.after, title)

    def __str__(self) -> str:
        return str(self.table())


@accepts_model
def evaluate_same_subject(
    model: EditableModel,
    groups: Sequence[Sequence[Fact]],
    edit: Edit | None,
    *,
    before: Observation | None = None,
    wordings: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SameSubjectEvaluation:
    """Measure `groups` (the facts of one subject each) before and under `edit`; None measures the
    model as it is now.

    The model is left as it was found. For several edits take ``probes = prepare(model, groups)``
    and one ``before = observe(model, probes)``, and pass it on; for factors that are not an edit
    yet call `observe` under `EditableModel.virtual`, then `judge`.

    Args:
        wordings: at most so many wordings of each form (default: all, two of most).

    Raises:
        KnowEditError: no groups, a group with several subjects, or a subject with two groups.
    """
    probes = prepare(model, groups, wordings)
    before = before or observe(model, probes, title="before", progress=progress)
    if edit is None:
        return judge(probes, before, before, seed=seed)
    with edit.applied_to(model):
        return judge(
            probes, before, observe(model, probes, title="after", progress=progress), seed=seed
        )


def prepare(
    model: EditableModel, groups: Sequence[Sequence[Fact]], wordings: int | None = None
) -> Probes:
    """The prompts for `groups`; chat forms are left out when the model has no chat template."""
    subjects = [group[0].subject for group in groups if group]
    if len(subjects) != len(groups) or not groups or len(set(subjects)) < len(subjects):
        raise KnowEditError(
            f"groups must be non-empty and have one subject each, no two the same; got {subjects}"
        )
    chats = bool(getattr(model.tokenizer, "chat_template", None))
    probes = Probes(subjects, [], [], [], [], [])
    for s, group in enumerate(groups):
        if mixed := {fact.subject for fact in group} - {subjects[s]}:
            raise KnowEditError(
                f"a group must have one subject, got {subjects[s]!r} and {sorted(mixed)}"
            )
        for fact in group:
            record = len(probes.facts)
            probes.facts.append(fact)
            probes.owner.append(s)
            named: dict[str, list[str]] = {}
            for form in held_out_forms(fact):
                if chats or not form.chat:
                    named.setdefault(form.name, []).append(form.prompt(model))
            forms = [
                (name, prompt) for name, prompts in named.items() for prompt in prompts[:wordings]
            ]
            probes.questions.extend(
                Question(record, name, prompt, fact.target, fact.true) for name, prompt in forms
            )
            (judged,) = answered(model, [fact])
            probes.questions.extend(questions(record, judged, ["neighbourhood"]))
            asked = next(
                named[name] for name in ("chat_question", "question", "cloze") if name in named
            )
            probes.greedy.append((record, asked[0]))
        around = (
            (ESSENCE.replace("{}", subjects[s]),),
            identity_prompts(group, "test"),
            unrelated_prompts(group, "test"),
        )
        probes.kept.extend((s, kind, p) for kind, found in zip(KEPT, around) for p in found)
    return probes


def observe(
    model: EditableModel, probes: Probes, *, title: str = "asking", progress: bool = True
) -> Observation:
    """Ask everything of the model as it is now, with whatever edit is applied or virtual."""
    with bar(f"{title}: greedy answers", len(probes.greedy), "facts", show=progress) as advance:
        said = model.generate([prompt for _, prompt in probes.greedy], GREEDY_TOKENS)
        advance(len(said))
    logprobs = model.next_logprobs([prompt for _, _, prompt in probes.kept])
    return Observation(ask(model, probes.questions, title=title, progress=progress), said, logprobs)


def judge(
    probes: Probes, before: Observation, after: Observation, *, seed: int = 0
) -> SameSubjectEvaluation:
    """Two observations of the same probes as an evaluation."""
    sums: dict[tuple[str, str, int, int | None], list[tuple[float, float]]] = {}

    def note(
        kind: str, measure: str, subject: int, fact: int | None, was: float, now: float
    ) -> None:
        sums.setdefault((kind, measure, subject, fact), []).append((was, now))

    for q, was, now in zip(probes.questions, before.answers, after.answers):
        for measure in ("success", "magnitude", "exact"):
            note(
                q.kind,
                measure,
                probes.owner[q.record],
                q.record,
                getattr(was, measure),
                getattr(now, measure),
            )
        if q.kind == "neighbourhood" and q.wrong is not None:
            same = float(was.success == now.success)
            note(q.kind, "unchanged", probes.owner[q.record], q.record, 1.0, same)
    for (record, _), was_said, now_said in zip(probes.greedy, before.said, after.said):
        held = (float(contains(said, probes.facts[record].target)) for said in (was_said, now_said))
        note("greedy", "contains", probes.owner[record], record, *held)
    moved = divergence(before.logprobs, after.logprobs).clamp(min=0)
    same_best = before.logprobs.argmax(-1) == after.logprobs.argmax(-1)
    for (subject, kind, _), kl, kept in zip(probes.kept, moved.tolist(), same_best.tolist()):
        note(kind, "kl", subject, None, 0.0, kl)
        note(kind, "kept", subject, None, 1.0, float(kept))
    order = {kind: i for i, kind in enumerate((*FORMS, "greedy", "neighbourhood", *KEPT))}
    values = [
        Value(
            kind,
            m,
            probes.subjects[s],
            None if f is None else probes.facts[f].text,
            *np.mean(pairs, axis=0).tolist(),
        )
        for (kind, m, s, f), pairs in sorted(sums.items(), key=lambda item: order[item[0][0]])
    ]
    sizes = {subject: probes.owner.count(s) for s, subject in enumerate(probes.subjects)}
    said = [(p, b, a) for (_, p), b, a in zip(probes.greedy, before.said, after.said)]
    return SameSubjectEvaluation(values, sizes, said, seed)


def compare(ours: SameSubjectEvaluation, other: SameSubjectEvaluation) -> Estimates:
    """Paired differences of the edited values, ours - other, on the same facts.

    Raises:
        KnowEditError: the two were not measured on the same facts.
    """
    pairs = [
        {(v.kind, v.measure, v.subject, v.fact): v.after for v in e.values} for e in (ours, other)
    ]
    if pairs[0].keys() != pairs[1].keys():
        raise KnowEditError(
            "the two evaluations were not made on the same facts and forms; measure both on one set"
        )
    return estimates(((*key[:3], now - pairs[1][key]) for key, now in pairs[0].items()), ours.seed)


def contains(text: str, answer: str) -> bool:
    """Whether `answer` stands in `text`, whatever the case; an ASCII answer as whole words ("Thai"
    is not in "Thailand").
    """
    text, answer = text.casefold(), answer.casefold()
    return (
        bool(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text))
        if answer.isascii()
        else answer in text
    )
