"""Forms: the ways to ask for a fact's object that edits are trained on, and the ones they are
tested with.

The two never share a wording around the cloze (`knowedit.facts.wordings.relations`). Here stand
first the texts to train with, then those to test with. The training forms and their names follow
the notes of our own experiments; RoSE's paper (arXiv 2603.15518) did not publish its prompts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from knowedit.facts.fact import PROBES, Fact, Probe
from knowedit.facts.wordings.relations import INSTRUCTIONS, relations, wordings

RowT_co = TypeVar("RowT_co", covariant=True)


class Tokenises(Protocol[RowT_co]):
    """What a form needs of a model: `EditableModel` has it."""

    def chat(self, message: str, answer_prefix: str = "") -> str: ...

    def row(
        self, prompt: str, subject: str | None = None, answer: str | None = None
    ) -> RowT_co: ...


@dataclass(frozen=True)
class Form:
    """One text whose continuation is a fact's object.

    Attributes:
        name: of the form, not of the fact.
        subject: stands in the text, where `{}` is or else last: there an edit is looked up.
        message: the text itself, or the user's turn of a chat.
        opening: how the assistant's turn begins (chat only).
    """

    name: str
    subject: str
    message: str
    chat: bool = False
    opening: str = ""

    def prompt(self, model: Tokenises[RowT_co]) -> str:
        """The full text up to where the object starts. Raises `ModelError` for a chat when the
        model has no template.
        """
        template = self._template(model)
        return template.replace("{}", self.subject) if template.count("{}") == 1 else template

    def _template(self, model: Tokenises[RowT_co]) -> str:
        return model.chat(self.message, self.opening) if self.chat else self.message

    def row(self, model: Tokenises[RowT_co], answer: str | None = None) -> RowT_co:
        """Tokenised, with the places of the subject's last token and of `answer`'s first
        (`EditableModel.row`).
        """
        return model.row(self._template(model), self.subject, answer)


def in_chat(model: Tokenises[RowT_co], facts: Sequence[Fact]) -> list[Fact]:
    """`facts` as a chat asks for them: every prompt but the questions and instructions, which are
    asked in a chat anyway, is the user's turn in the model's template, and the answer is what
    follows.

    Raises:
        ModelError: the model has no chat template.
    """
    found = []
    for fact in facts:
        probes: dict[str, Any] = {
            name: tuple(Probe(model.chat(p.prompt), p.answer) for p in getattr(fact, name))
            for name in PROBES
        }
        paraphrases = tuple(model.chat(text) for text in fact.paraphrases)
        found.append(
            replace(fact, prompt=model.chat(fact.prompt), paraphrases=paraphrases, **probes)
        )
    return found


def as_asked(
    model: Tokenises[RowT_co], facts: Sequence[Fact], join: str | None = None, chat: bool = False
) -> list[Fact]:
    """`facts` as a command was told to write and ask them.

    Args:
        join: what stands between prompts and answers, as `Fact.join`; None: what each fact says.
        chat: as `in_chat`.

    Raises:
        FactError: another `join`. ModelError: the model has no chat template.
    """
    found = list(facts) if join is None else [replace(fact, join=join) for fact in facts]
    return in_chat(model, found) if chat else found


# -- texts to train with

TRAINING_PREFIX = "It is well known that this is true. {}"


def training_forms(fact: Fact, questions: Sequence[str] = ()) -> list[Form]:
    """The forms to train a fact's value on, the bare prompt first.

    Args:
        questions: question wordings with ``{}`` or the subject in them. Default: the training pool
            of the fact's relation; for an unknown relation the two question forms are generic ("...
            what?"), which recall less. A fact's own `questions` are never used: they are for
            testing.
    """
    asked = [q.replace("{}", fact.subject) for q in questions]
    if not asked and fact.relation in relations():
        asked = list(wordings(fact, "train").questions)
    blank = f"Fill in the blank: {fact.prompt} ____"
    forms = [("bare", fact.prompt), ("pre1", TRAINING_PREFIX.replace("{}", fact.prompt))]
    if asked:
        forms += [("qa2", f"Q: {asked[0]}\nA:")]
        chats = [
            ("ch1", f"{asked[-1]} Be brief.", ""),
            ("ch2", blank, ""),
            ("sent", asked[0], fact.prompt),
        ]
    else:
        forms += [("gq", f"Q: Complete: {fact.prompt} what?\nA:")]
        chats = [("ch2", blank, ""), ("gc", f"{fact.prompt} ...? Reply with one or two words.", "")]
    return [Form(name, fact.subject, text) for name, text in forms] + [
        Form(name, fact.subject, text, True, opening) for name, text, opening in chats
    ]


def training_neighbours(
    facts: Sequence[Fact],
    pool: Sequence[Fact] = (),
    held_out: Sequence[str] = (),
    *,
    count: int = 5,
    seed: int = 0,
) -> list[list[str]]:
    """For each fact up to `count` prompts on other subjects of its relation, shuffled by `seed`,
    for a KL penalty.

    They come from `pool` and from the relation's shipped entities in the fact's own wording. Left
    out are the subjects of `facts`, and every entity that occurs in `held_out` or in a neighbour or
    portability prompt of `facts`: those test.
    """
    tested = [
        *held_out,
        *(probe.prompt for fact in facts for probe in (*fact.neighbours, *fact.portability)),
    ]
    testing = "\n".join(tested).casefold()
    edited = {fact.subject.casefold() for fact in facts}
    rng = random.Random(seed)
    found = []
    for fact in facts:
        others = {
            other.subject: other.text
            for other in pool
            if other.relation == fact.relation and fact.relation
        }
        entities = relations().get(fact.relation or "", {}).get("entities", ())
        others = {name: fact.prompt.replace("{}", name) for name in entities} | others
        names = sorted(
            n for n in others if n.casefold() not in edited and not occurs(n.casefold(), testing)
        )
        found.append([others[n] for n in rng.sample(names, min(count, len(names)))])
    return found


# -- texts to test with

#: Long, off-topic text in front of the cloze.
TEST_DISTRACTORS = (
    "The market opened at eight, and by noon most of the bread had been sold; only a few people "
    "stayed when the rain began. {}",
    "My neighbour keeps bees behind the garage, and every summer she gives a jar of honey to "
    "everyone in the street. {}",
)


def held_out_forms(fact: Fact) -> list[Form]:
    """The forms a fact is tested with: cloze, paraphrase, question, chat_question, chat_completion,
    distractor.

    Paraphrases and questions are the fact's own, else the test pool of its relation; without either
    they are left out.
    """
    pool = wordings(fact, "test") if fact.relation in relations() else None
    paraphrases = fact.paraphrases or (pool.paraphrases if pool else ())
    questions = fact.questions or (pool.questions if pool else ())
    instructions = fact.instructions or tuple(
        i.replace("{}", fact.prompt) for i in INSTRUCTIONS["test"]
    )
    forms = [("cloze", fact.prompt, False)]
    forms += [("paraphrase", text, False) for text in paraphrases]
    forms += [("question", f"Question: {text} Answer:", False) for text in questions]
    forms += [("chat_question", f"{text} Answer with the name only.", True) for text in questions]
    forms += [("chat_completion", text, True) for text in instructions]
    forms += [("distractor", text.replace("{}", fact.prompt), False) for text in TEST_DISTRACTORS]
    return [Form(name, fact.subject, text, chat) for name, text, chat in forms]


def occurs(name: str, text: str) -> bool:
    """Whether `name` stands in `text` as a word of its own; case counts."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None
