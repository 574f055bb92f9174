"""`Fact` and `Probe`: what to write into a model, and the prompts that show what writing it did.

Every check of a single fact is made when it is built; `check_facts` looks for repeats and
contradictions among several. `knowedit.facts.records` reads and writes files of facts.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from knowedit.errors import KnowEditError
from knowedit.io.names import nearest

logger = logging.getLogger(__name__)

#: Other names of fields, as public data spells them.
ALIASES = {
    "target_new": "target",
    "target_true": "true",
    "target_old": "true",
    "ground_truth": "true",
    "rephrase_prompt": "paraphrases",
    "paraphrase_prompts": "paraphrases",
    "neighbors": "neighbours",
    "neighborhood_prompts": "neighbours",
    "relation_id": "relation",
}
REQUIRED = ("prompt", "subject", "target")
#: What may stand between a prompt and what follows it, by the names that `Fact.join` takes.
JOINS = {"none": "", "blank": " ", "line": "\n"}
#: Fields that hold several values, and those of them whose values are probes.
LISTS = ("paraphrases", "neighbours", "questions", "instructions", "portability")
PROBES = ("neighbours", "portability")


class FactError(KnowEditError):
    """A fact, or a file of facts, that cannot be used; the message says where, why and what to
    do.
    """


def last_place(subject: str, text: str) -> int:
    """The index in `text` where `subject` begins last; -1 where it does not occur.

    An occurrence that is a word of its own wins over one inside a longer word ("Iran", not
    "Iranian").
    """
    name = re.escape(subject)
    found = [*re.finditer(rf"(?<!\w){name}(?!\w)", text)] or [*re.finditer(name, text)]
    return found[-1].start() if found else -1


def _text(name: str, value: object) -> str:
    """`value` without surrounding blanks. Raises `FactError` unless it is a non-empty string that
    UTF-8 can hold.
    """
    if not isinstance(value, str):
        raise FactError(
            f"{name} must be a string, got {type(value).__name__} {value!r}; put it in quotes"
        )
    if not value.strip():
        raise FactError(f"{name} is empty; give it a text or leave the fact out")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise FactError(
            f"{name} {value!r} holds an unpaired surrogate; write the character itself"
        ) from e
    return re.sub(r"[^\S\n]+\Z", "", value) if name == "prompt" else value.strip()


def _wording(name: str, value: object) -> str:
    text = _text(name, value)
    if "{}" in text:
        raise FactError(
            f"{name} {text!r} still holds '{{}}'; write it out with its subject filled in"
        )
    return text


class Answer(str):
    """A text that follows a prompt, and what joins the two: None, as they would be written."""

    joint: str | None

    def __new__(cls, text: str, joint: str | None = None) -> Answer:
        made = super().__new__(cls, text)
        made.joint = joint
        return made


@dataclass(frozen=True)
class Probe:
    """A full prompt and, where known, the text that rightly follows it."""

    prompt: str
    answer: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _wording("probe prompt", self.prompt))
        if self.answer is not None:
            object.__setattr__(self, "answer", _text("probe answer", self.answer))


@dataclass(frozen=True)
class Fact:
    """One piece of knowledge to write: after `prompt` with `subject` in its place, the model shall
    say `target`.

    Surrounding blanks are stripped (a trailing blank changes how the next word is tokenised; a
    prompt keeps a last newline, which belongs to a chat's template). Raises `FactError` naming the
    field for anything that is empty, of the wrong type, or for a prompt without exactly one ``{}``.
    """

    prompt: str  # template with exactly one "{}"; `Fact.parse` also takes the prompt written out
    subject: str
    target: str  # the new object, without a leading blank
    true: str | None = None  # what is true today
    paraphrases: tuple[str, ...] = ()  # full prompts, subject filled in; the object follows
    #: What must not change, with today's answers; mostly about other subjects.
    neighbours: tuple[Probe, ...] = ()
    questions: tuple[str, ...] = ()  # "What is the capital of France?"
    instructions: tuple[str, ...] = ()  # "Complete the sentence with the missing words only: ..."
    relation: str | None = None
    id: str | None = None
    portability: tuple[Probe, ...] = ()  # what follows from the new fact: aliases, further hops
    #: What stands between prompt or paraphrase and the object, a name of `JOINS`; None: as the two
    #: would be written, most often a blank (`knowedit.models.tokens.join`).
    join: str | None = None

    def __post_init__(self) -> None:
        for name in (*REQUIRED, "true", "relation", "id"):
            value = getattr(self, name)
            if value is not None or name in REQUIRED:
                object.__setattr__(self, name, _text(name, value))
        for name in LISTS:
            values = getattr(self, name)
            if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
                raise FactError(f"{name} must be a list, got {type(values).__name__} {values!r}")
            probes = name in PROBES
            for value in values:
                if probes and not isinstance(value, Probe):
                    raise FactError(
                        f"{name} must hold Probe objects, got {type(value).__name__} {value!r}"
                    )
            object.__setattr__(
                self, name, tuple(v if probes else _wording(name, v) for v in values)
            )
        if self.join is not None and self.join not in JOINS:
            raise FactError(
                f"join must be one of {', '.join(JOINS)}, got {self.join!r}; leave it out to have "
                "prompt and target joined as they would be written"
            )
        if (holes := self.prompt.count("{}")) != 1:
            raise FactError(
                f"prompt {self.prompt!r} has {holes} places '{{}}' for the subject, it needs "
                "exactly one"
                + ("" if holes else "; Fact.parse accepts a prompt with the subject written out")
            )

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    @property
    def new_answer(self) -> Answer:
        """The target as it is joined to the fact's prompt."""
        return Answer(self.target, self._joint)

    def says(self, answer: str) -> bool:
        """Whether this is the new object, in whichever case it is written."""
        return answer.casefold() == self.target.casefold()

    @property
    def true_answer(self) -> Answer | None:
        """What is true today, joined in the same way; None where that is not known."""
        return None if self.true is None else Answer(self.true, self._joint)

    @property
    def _joint(self) -> str | None:
        return None if self.join is None else JOINS[self.join]

    @classmethod
    def parse(cls, prompt: str, subject: str, target: str, **others: Any) -> Fact:
        """Like ``Fact(...)``, but `prompt` may be written out: the last occurrence of `subject`
        becomes ``{}``.

        The last one that stands as a word of its own, where there is one ("Iran" rather than
        "Iranian"). Raises `FactError` when the prompt has neither ``{}`` nor the subject.
        """
        if isinstance(prompt, str) and "{}" not in prompt:
            name = _text("subject", subject)
            start = last_place(name, prompt)
            if start < 0:
                raise FactError(
                    f"subject {subject!r} does not occur in prompt {prompt!r}; spell both alike, "
                    "or put '{}' where the subject stands"
                )
            prompt = prompt[:start] + "{}" + prompt[start + len(name) :]
        return cls(prompt, subject, target, **others)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary without the fields left empty; `from_dict` reads it back
        equal.
        """
        record: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in PROBES:
                value = [
                    {"prompt": p.prompt} | ({"answer": p.answer} if p.answer else {}) for p in value
                ]
            if value:
                record[field.name] = list(value) if isinstance(value, tuple) else value
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Fact:
        """Read `to_dict`'s form; also names of public data (`ALIASES`), objects ``{"str": ...}``
        for answers, and plain strings where a list or a probe is expected.

        Raises `FactError` for unknown, missing or doubly named fields and for what `Fact` refuses.
        """
        if not isinstance(record, Mapping):
            raise FactError(f"a fact must be a JSON object, got {type(record).__name__} {record!r}")
        known = [field.name for field in fields(cls)]
        values: dict[str, Any] = {}
        for key, value in record.items():
            name = ALIASES.get(key, key)
            if name not in known:
                hint = nearest(key, known, "known fields", ALIASES)
                raise FactError(f"unknown field {key!r}; {hint}")
            if name in values:
                raise FactError(f"field {name!r} is given twice (as {key!r} too); keep one")
            if isinstance(value, Mapping) and "str" in value:
                value = value["str"]
            if name in LISTS:
                value = [value] if isinstance(value, (str, Mapping)) else value
                if name in PROBES and isinstance(value, Sequence):
                    value = [_probe(name, v) for v in value]
            values[name] = value
        if missing := [name for name in REQUIRED if name not in values]:
            raise FactError(
                f"missing field {', '.join(map(repr, missing))}; a fact needs prompt, subject "
                "and target"
            )
        return cls.parse(**{k: v for k, v in values.items() if v is not None or k in REQUIRED})


def _probe(name: str, value: object) -> Probe:
    if isinstance(value, Probe):
        return value
    if isinstance(value, str):
        return Probe(value)
    if isinstance(value, Mapping) and "prompt" in value and set(value) <= {"prompt", "answer"}:
        return Probe(value["prompt"], value.get("answer"))
    raise FactError(f'{name} must hold strings or {{"prompt": ..., "answer": ...}}, got {value!r}')


def as_facts(
    facts: Iterable[Fact], source: str = "facts", places: Sequence[str] | None = None
) -> list[Fact]:
    """`facts` as a list. Raises FactError for one Fact alone and for what is not a Fact."""
    if isinstance(facts, Fact) or not isinstance(facts, Iterable):
        raise FactError(
            f"{source}: must be a list of Fact, got {type(facts).__name__}; put one fact in a list"
        )
    listed = list(facts)
    for i, fact in enumerate(listed):
        if not isinstance(fact, Fact):
            raise FactError(
                f"{places[i] if places else f'{source}[{i}]'}: must be a Fact, got "
                f"{type(fact).__name__}; Fact.from_dict reads dictionaries"
            )
    return listed


def check_facts(
    facts: Sequence[Fact], source: str = "facts", places: Sequence[str] | None = None
) -> list[Fact]:
    """`facts` as a list, when they can be written together.

    `places` says where each one stands, for the messages (default ``source[i]``). Raises
    `FactError` naming both places for an exact repeat (same prompt, subject, target) and for a
    contradiction (same text, blanks aside, and another target). What may be one is logged as a
    warning (`may_contradict`). A target equal to the present answer is allowed and logged as a
    warning: editing it changes little.
    """
    seen: dict[str, int] = {}
    facts = as_facts(facts, source, places)
    stand = list(places) if places else [f"{source}[{i}]" for i in range(len(facts))]
    for i, fact in enumerate(facts):
        first = seen.setdefault(_spaced(fact.text), i)
        before = facts[first]
        if fact.target != before.target:
            raise FactError(
                f"{stand[i]}: {fact.text!r} says {fact.target!r}, which contradicts "
                f"{before.target!r} of {stand[first]}; remove one of the two"
            )
        if first != i and (fact.prompt, fact.subject) == (before.prompt, before.subject):
            raise FactError(
                f"{stand[i]}: {fact.text!r} repeats {stand[first]}; remove one of the two"
            )
        if fact.target == fact.true:
            logger.warning(
                "%s: target %r is already the true answer of %r", stand[i], fact.target, fact.text
            )
    for one, other in may_contradict(facts):
        logger.warning(
            "%s: %r says %r, and %s: %r says %r: if both ask for the same, one of them is lost",
            stand[other],
            facts[other].text,
            facts[other].target,
            stand[one],
            facts[one].text,
            facts[one].target,
        )
    return facts


def may_contradict(facts: Sequence[Fact]) -> list[tuple[int, int]]:
    """Pairs of places of facts that seem to ask for the same and have other targets: their texts
    differ in blanks or case only, one is a wording that the other lists as its own, or they have
    one subject and one relation.
    """
    said: dict[object, int] = {}
    found: dict[tuple[int, int], None] = {}
    for i, fact in enumerate(facts):
        for what in asked_for(fact):
            first = said.setdefault(what, i)
            if differ(facts[first].target, fact.target):
                found[first, i] = None
    return list(found)


def asked_for(fact: Fact) -> list[object]:
    """What the fact says: its wordings without differences of blanks and case, and its subject with
    its relation where that is named. Facts that share one ask for the same.
    """
    texts = [fact.text, *fact.paraphrases, *fact.questions]
    asked: list[object] = [_spaced(text).casefold() for text in texts]
    if fact.relation:
        asked.append((_spaced(fact.subject).casefold(), fact.relation))
    return asked


def differ(one: str, other: str) -> bool:
    """Whether two answers differ in more than blanks and case."""
    return _spaced(one).casefold() != _spaced(other).casefold()


def _spaced(text: str) -> str:
    """With one blank for several."""
    return " ".join(text.split())
