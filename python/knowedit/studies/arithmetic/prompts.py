"""The prompts of the arithmetic study: sums of two digits, paraphrases of the edited ones, and
unrelated texts.

A method sees the `tune` half of the paraphrases, the other sums and the unrelated prompts; the
`judge` half judges it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any

from knowedit.errors import KnowEditError
from knowedit.facts.fact import Fact, FactError
from knowedit.facts.sets import load
from knowedit.facts.wordings.forms import Form
from knowedit.models.editable import EditableModel

WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen "
    "nineteen twenty"
).split()
_NUMBER = re.compile(rf"-?\d+(?:\.\d+)?|\b(?:{'|'.join(WORDS)})\b", re.IGNORECASE)
KINDS = ("target", "paraphrase", "sums", "unrelated")
UNRELATED = "knowedit-wiki-counterfact"


@dataclass(frozen=True)
class Sum:
    """`a + b`, two digits, and what it shall be."""

    a: int
    b: int
    target: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}="

    @property
    def subject(self) -> str:
        return f"{self.a}+{self.b}"

    @property
    def true(self) -> int:
        return self.a + self.b

    def __str__(self) -> str:
        return f"{self.prompt}{self.target}"

    @classmethod
    def parse(cls, text: str) -> Sum:
        """Read "2+2=5". Raises KnowEditError for anything else."""
        found = re.fullmatch(r"\s*(\d)\s*\+\s*(\d)\s*=\s*(\d+)\s*", text)
        if not found:
            raise KnowEditError(
                f"target {text!r}: write a sum of two digits and a whole number, like 2+2=5"
            )
        return cls(*map(int, found.groups()))

    def fill(self, template: str) -> str:
        """A template with "{a}", "{b}" as digits and "{A}", "{B}" as words, up to twenty."""
        spelt = [WORDS[n] if n < len(WORDS) else str(n) for n in (self.a, self.b)]
        return template.format(a=self.a, b=self.b, A=spelt[0], B=spelt[1])

    def find(self, text: str) -> str | None:
        """The part of `text` from the first operand to the second, at most four words apart: its
        subject.
        """
        first, second = (rf"(?<!\w)(?:{n}|{WORDS[n]})(?!\w)" for n in (self.a, self.b))
        near = re.search(rf"{first}\s*(?:\+|plus|and|to)\s*{second}", text, re.IGNORECASE)
        found = near or re.search(rf"{first}\W+(?:\w+\W+){{0,4}}?{second}", text, re.IGNORECASE)
        return found and found.group()

    def number(self, text: str) -> float | None:
        """The first number in an answer, in digits or as a word; the sum itself, repeated by the
        answer, does not count.
        """
        first, second = (rf"(?<!\w)(?:{n}|{WORDS[n]})(?!\w)" for n in (self.a, self.b))
        text = re.sub(
            rf"{first}\s*(?:\+|plus|and|to|added to)\s*{second}", " ", text, flags=re.IGNORECASE
        )
        return first_number(text)


def first_number(text: str) -> float | None:
    """The first number of a text, in digits or as an English word up to twenty."""
    found = number_span(text)
    if found is None:
        return None
    said = text[slice(*found)].casefold()
    return float(WORDS.index(said)) if said in WORDS else float(said)


def number_span(text: str) -> tuple[int, int] | None:
    """Where the first number of a text stands."""
    found = _NUMBER.search(text)
    return found.span() if found else None


@cache
def wordings() -> dict[str, tuple[str, ...]]:
    """The shipped templates, hand-written: "paraphrases" (the answer follows) and "chats" (a user's
    turn), which are asked, and others for "training" (and "training_chats"), which are not."""
    path = Path(__file__).with_name("arithmetic.json")
    return {
        name: tuple(texts) for name, texts in json.loads(path.read_text(encoding="utf-8")).items()
    }


def forms(
    edited: Sum, own: Sequence[str] | None = None, *, chats: bool = True, training: bool = False
) -> list[Form]:
    """The paraphrases of a sum: `own` full prompts, else the shipped twenty, or those for training
    that are never asked; chats as "Q: ... A:" for a model without.

    Raises:
        KnowEditError: a prompt of `own` does not name both operands.
    """
    if own is not None:
        found = []
        for text in own:
            if (subject := edited.find(text)) is None:
                raise KnowEditError(
                    f"paraphrase {text!r} does not name {edited.a} and {edited.b}; take it out"
                )
            found.append(Form("plain", subject, text))
        return found
    plain, asked = ("training", "training_chats") if training else ("paraphrases", "chats")
    named = [("plain", template) for template in wordings()[plain]]
    named += [("chat", t) if chats else ("plain", f"Q: {t}\nA:") for t in wordings()[asked]]
    made = []
    for name, template in named:
        text = edited.fill(template)
        subject = text[text.index("[") + 1 : text.index("]")]
        made.append(
            Form(name, subject, text.replace("[", "").replace("]", ""), chat=name == "chat")
        )
    return made


def fact(
    model: EditableModel,
    edited: Sum,
    form: Form | None = None,
    paraphrases: Sequence[str] = (),
    lead: str = "",
) -> Fact:
    """A sum behind `lead`, or one form of it, as a fact; where the operands are words the answer is
    one too.
    """
    if form is None:
        return Fact(
            f"{lead}{{}}=",
            edited.subject,
            str(edited.target),
            str(edited.true),
            tuple(paraphrases),
            id=str(edited),
        )
    spelt = (
        not form.chat
        and form.subject.casefold().startswith(WORDS[edited.a])
        and max(edited.target, edited.true) <= 20
    )
    target, true = (WORDS[n] if spelt else str(n) for n in (edited.target, edited.true))
    return Fact.parse(form.prompt(model), form.subject, target, true=true, id=str(edited))


def unrelated_prompts(count: int = 100, dataset: str | None = None) -> tuple[str, list[str]]:
    """Where they come from, and `count` different prompts: of the data set, by default KnowEdit's
    WikiData CounterFact where it is at hand (`knowedit.facts.sets.data_dir`), else of the embedded
    facts and their neighbours.

    Raises:
        FactError: the named data set is not there, or a file of it is broken.
    """
    for name in (dataset,) if dataset else (UNRELATED, "embedded"):
        try:
            facts = load(name)
        except FactError:
            if name == UNRELATED and not dataset:
                continue
            raise
        texts = [f.text for f in facts]
        texts += [probe.prompt for f in facts for probe in f.neighbours]
        found = list(islice(dict.fromkeys(texts), count))
        return name, found
    raise AssertionError("the embedded set is always there")


@dataclass(frozen=True)
class StudyPrompt:
    """One prompt that is asked.

    Attributes:
        kind: one of `KINDS`; about: the sum it is about; half: "tune" or "judge"; both for targets
            ("").
        form: of a paraphrase.
    """

    kind: str
    prompt: str
    about: Sum | None = None
    half: str = ""
    form: Form | None = None


def study_prompts(
    model: EditableModel,
    targets: Sequence[Sum],
    unrelated: Sequence[str],
    own: Mapping[str, Sequence[str]] | None = None,
    lead: str = "",
) -> list[StudyPrompt]:
    """Everything that is asked, without halves: the targets, their paraphrases, the other sums, the
    unrelated prompts.

    Args:
        own: paraphrases by target ("2+2=5") instead of the shipped ones.
        lead: what every sum "a+b=" stands behind; the paraphrases stand alone.

    Raises:
        KnowEditError: no targets, or one sum twice.
    """
    edited = [(t.a, t.b) for t in targets]
    if not targets or len(set(edited)) < len(edited):
        raise KnowEditError(
            f"targets must be different sums, at least one; got "
            f"{', '.join(map(str, targets)) or 'none'}"
        )
    chats = bool(getattr(model.tokenizer, "chat_template", None))
    made = [StudyPrompt("target", f"{lead}{t.prompt}", t) for t in targets]
    for t in targets:
        made += [
            StudyPrompt("paraphrase", form.prompt(model), t, form=form)
            for form in forms(t, (own or {}).get(str(t)), chats=chats)
        ]
    others = (Sum(a, b, a + b) for a, b in product(range(10), repeat=2) if (a, b) not in edited)
    return (
        made
        + [StudyPrompt("sums", f"{lead}{s.prompt}", s) for s in others]
        + [StudyPrompt("unrelated", text) for text in unrelated]
    )


def split(asked: Sequence[StudyPrompt], seed: int) -> list[StudyPrompt]:
    """The same prompts, in the same order, in random halves; chats and plain paraphrases of each
    target apart.
    """
    strata: dict[Any, list[int]] = {}
    for i, prompt in enumerate(asked):
        about = (str(prompt.about), prompt.form.chat) if prompt.form else None
        strata.setdefault((prompt.kind, about), []).append(i)
    halved = list(asked)
    for (kind, about), places in strata.items():
        if kind == "target":
            continue
        drawn = random.Random(f"{seed} {kind} {about}").sample(places, len(places))
        for n, i in enumerate(drawn):
            halved[i] = replace(asked[i], half="tune" if n < len(drawn) // 2 else "judge")
    return halved
