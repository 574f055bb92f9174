"""What a model says of written facts, in its own words: after a fact's prompt, when it is asked the
question, and when it is asked in its chat template.

An edit is made at a prompt and used in conversations; a value that is right in the one may say
nothing, or babble, in the other. Only generated text shows that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from knowedit.edits.edit import Edit
from knowedit.evaluation.subjects.same_subject import contains
from knowedit.facts.fact import Fact
from knowedit.facts.wordings.forms import Form, held_out_forms
from knowedit.io.progress import bar
from knowedit.io.ranks import team
from knowedit.io.tables import Table
from knowedit.models.editable import EditableModel
from knowedit.models.load import accepts_model

#: The first so many facts are asked: generating takes longer than rating.
ASKED = 8
#: Length of an answer, in tokens.
ANSWER = 16
#: Answers that are generated together.
TOGETHER = 16
#: Characters of an answer that a table shows.
SHOWN = 48
NOTHING = "(nothing)"
#: The ways to ask, in the order of tables.
WAYS = ("prompt", "question", "chat")


@dataclass(frozen=True)
class Said:
    """One answer, in the unedited model's words and in the edited one's.

    Attributes:
        record: the fact's number; way: one of `WAYS`.
        prompt: the full text that was gone on with.
    """

    record: int
    way: str
    prompt: str
    target: str
    before: str
    after: str

    @property
    def right(self) -> bool:
        """Whether the new object is in it."""
        return contains(self.after, self.target)

    @property
    def broken(self) -> bool:
        """Whether it now repeats itself, and did not before."""
        return _repeats(self.after) and not _repeats(self.before)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**vars(self), "right": self.right, "broken": self.broken}


class Interview:
    """The first `ASKED` facts, asked in every way that the model knows; it is made on the unedited
    model.
    """

    def __init__(
        self, model: EditableModel, facts: Sequence[Fact], *, progress: bool = True
    ) -> None:
        self.model, self.progress = model, progress
        self._asked = [
            (record, way, prompt, fact.target)
            for record, fact in enumerate(facts[:ASKED])
            for way, prompt in prompts_of(model, fact)
        ]
        self._before = self._answers(range(len(self._asked)), "asking the unedited model")

    def hear(self, record: int | None = None, model: EditableModel | None = None) -> list[Said]:
        """What the model, as it is now, says of one fact (None: of all); or another model, with
        the same tokens.
        """
        which = [i for i, asked in enumerate(self._asked) if record in (None, asked[0])]
        answers = self._answers(which, "asking the edited model", model, show=record is None)
        return [Said(*self._asked[i], self._before[i], after) for i, after in zip(which, answers)]

    def _answers(
        self,
        which: Sequence[int],
        title: str,
        model: EditableModel | None = None,
        *,
        show: bool = True,
    ) -> list[str]:
        """One answer each. A single fact's are part of something whose bar is shown already."""
        asked = model or self.model
        prompts = [self._asked[i][2] for i in which]
        parts = [prompts[start : start + TOGETHER] for start in range(0, len(prompts), TOGETHER)]
        ranks = team()
        with bar(title, len(which), "answers", show=show and self.progress) as advance:

            def answers(part: Sequence[str]) -> list[str]:
                found = asked.generate(part, ANSWER, batch=TOGETHER)
                advance(len(part) * ranks.worth(len(parts)))
                return [" ".join(text.split()) for text in found]

            return [text for found in ranks.share(parts, answers) for text in found]


@accepts_model
def interview(model: EditableModel, edit: Edit, facts: Sequence[Fact]) -> list[Said]:
    """What the model says of `facts` (the first `ASKED`) before `edit` and under it; the model is
    left as it was found.
    """
    asked = Interview(model, facts)
    with edit.applied_to(model):
        return asked.hear()


def prompts_of(model: EditableModel, fact: Fact) -> list[tuple[str, str]]:
    """(way, full text) of every way to ask for a fact; no chat where the model has no template, and
    nothing whose answer would go beyond the model's context.
    """
    forms = {form.name: form for form in reversed(held_out_forms(fact))}  # the first of each name
    other = Form(
        "question", fact.subject, f"Question: How does this go on? {fact.text} ... Answer:"
    )
    ways = [
        ("prompt", forms["cloze"]),
        ("question", forms.get("question", other)),
        ("chat", forms.get("chat_question", forms["chat_completion"])),
    ]
    if not getattr(model.tokenizer, "chat_template", None):
        ways.pop()
    texts = [(way, form.prompt(model)) for way, form in ways]
    room = model.max_length - ANSWER
    return [(way, text) for way, text in texts if len(model.tokenizer(text)["input_ids"]) <= room]


def said_table(said: Sequence[Said], facts: int, what: str = "new") -> Table:
    """What the edited model says, a row a fact, with the counts below.

    Args:
        facts: how many were written, of which the first were asked.
        what: what they are now: new, or forgotten.
    """
    answers = {(one.record, one.way): _short(one.after) for one in said}
    targets = {one.record: one.target for one in said}
    ways = [way for way in WAYS if any(one.way == way for one in said)]
    rows = [
        [_short(target), *(answers.get((record, way), "") for way in ways)]
        for record, target in targets.items()
    ]
    notes = []
    for way in ways:
        mine = [one for one in said if one.way == way]
        right, broken = sum(one.right for one in mine), sum(one.broken for one in mine)
        silent = sum(not one.before and not one.after for one in mine)
        more = f", {broken} now repeat themselves" if broken else ""
        more += f", {silent} empty as before the edit" if silent else ""
        notes.append(f"{way}: {right} of {len(mine)} answers have the {what} fact{more}")
    if facts > len(targets):
        notes.append(f"the first {len(targets)} of {facts} facts were asked")
    return Table([what, *ways], rows, "what the edited model says", notes)


def _short(text: str) -> str:
    """The first whole words that fit; in scripts without blanks the first characters."""
    if len(text) <= SHOWN:
        return text or NOTHING
    return text[: SHOWN - 4].rsplit(" ", 1)[0] + " ..."


def _repeats(text: str) -> bool:
    """Whether fewer than half of its words, of six or more, are different ones."""
    words = text.casefold().split()
    return len(words) >= 6 and 2 * len(set(words)) < len(words)
