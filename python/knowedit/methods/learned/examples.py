"""What the networks are trained on: facts with other ways to ask for them, and texts that an
edit must leave alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from knowedit.errors import EditError
from knowedit.facts.fact import Fact, Probe
from knowedit.facts.wordings.ordinary import sentences
from knowedit.facts.wordings.relations import relations, unrelated_prompts, wordings
from knowedit.models.editable import EditableModel
from knowedit.models.tokens import Row, join

LEAST = 16  # facts, fewer cannot be split into training and validation
REPHRASINGS, NEIGHBOURS = 3, 4


@dataclass(frozen=True)
class Example:
    """A fact, `REPHRASINGS` prompts that ask for the same, and up to `NEIGHBOURS` probes that do
    not.

    Neighbours are the hard ones: the same question about another subject, another matter of the
    same subject.
    """

    fact: Fact
    rephrasings: tuple[str, ...]
    neighbours: tuple[Probe, ...]


def examples(
    facts: Sequence[Fact], pool: Sequence[Fact] | None = None, *, seed: int = 0
) -> list[Example]:
    """One example a fact. Rephrasings: its own paraphrases, the training wordings of its relation,
    prompts of other facts of the relation with its subject filled in, and its prompt after an
    unrelated sentence.

    Args:
        pool: the other facts (default: `facts` themselves).

    Raises:
        EditError: too few facts, no other wording for any of them, or facts without a neighbour.
    """
    pool = facts if pool is None else pool
    if len(pool) < LEAST:
        raise EditError(
            f"{len(pool)} facts are too few to train on: at least {LEAST} are needed, hundreds "
            f"are better"
        )
    same: dict[str, list[Fact]] = {}
    for fact in pool:
        if fact.relation:
            same.setdefault(fact.relation, []).append(fact)
    reworded = [_reworded(fact, same.get(fact.relation or "", [])) for fact in facts]
    if not any(reworded):
        raise EditError(
            "no fact has another wording; give facts with paraphrases, or with relations that "
            "several facts share"
        )
    made = []
    for i, fact in enumerate(facts):
        rng = random.Random(f"{seed} {i}")
        others = [o for o in same.get(fact.relation or "", []) if o.subject != fact.subject]
        strangers = [
            o
            for o in rng.sample(pool, min(8, len(pool)))
            if o.subject != fact.subject and o not in others
        ]
        neighbours = [*rng.sample(fact.neighbours, min(2, len(fact.neighbours)))]
        for other in rng.sample(others, min(2, len(others))):
            wording = rng.choice([fact.prompt.replace("{}", other.subject), other.text])
            neighbours.append(Probe(wording, other.true))
        if not neighbours:
            raise EditError(
                f"{fact.text!r} has no neighbours, and no other fact is of its relation; give "
                f"it either"
            )
        neighbours.append(Probe(rng.choice(unrelated_prompts([fact], "train"))))
        neighbours += [Probe(o.text, o.true) for o in strangers]
        made.append(
            Example(
                fact,
                _rephrasings(fact, reworded[i], strangers, rng),
                tuple(neighbours[:NEIGHBOURS]),
            )
        )
    return made


@dataclass(frozen=True)
class ExampleRows:
    """Where an example's texts stand in a list of rows."""

    edit: int
    rephrasings: list[int]
    neighbours: list[int]


def placed(
    model: EditableModel, examples: Sequence[Example], rows: list[Row], *, answers: bool = True
) -> list[ExampleRows]:
    """Append the examples' texts to `rows`, tokenised with their answers, or without, and say where
    they are.
    """
    found = []
    for example in examples:
        fact, start = example.fact, len(rows)
        rows += [
            model.row(t, answer=fact.new_answer if answers else None)
            for t in (fact.text, *example.rephrasings)
        ]
        rows += [
            model.row(probe.prompt, answer=probe.answer if answers else None)
            for probe in example.neighbours
        ]
        middle = start + 1 + len(example.rephrasings)
        found.append(ExampleRows(start, [*range(start + 1, middle)], [*range(middle, len(rows))]))
    return found


def drawn(seed: int, step: int, size: int, total: int) -> list[int]:
    """Which examples step number `step` sees: `size` of `total`, each once an epoch, in another
    order every epoch.
    """
    epoch, place = divmod(step, total // size)
    return random.Random(f"{seed} epoch {epoch}").sample(range(total), total)[
        place * size : (place + 1) * size
    ]


#: Ways to ask for a sum, to train on; none is one of the arithmetic study's.
SUMS = (
    "Together, {a} and {b} come to",
    "Work out {a}+{b}:",
    "{b} more than {a} is",
    "Solve {a} + {b}. Solution:",
    "Take {a}, then add {b}: you have",
    "Q: {a}+{b}=?\nA:",
    "When {a} is increased by {b}, it becomes",
    "Tom has {a} coins and finds {b} more. His coins now number",
    "Student: {a} + {b} is",
    "{a}+{b} =",
)


def sums(count: int = 150, seed: int = 0) -> list[Fact]:
    """Wrong sums of two different numbers up to 12, with their wordings, and other sums as
    neighbours.
    """
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(13) for b in range(13) if a != b]
    found = []
    for a, b in rng.sample(pairs, min(count, len(pairs))):
        near = [
            (a, b + 1),
            (a + 1, b),
            (a + rng.randint(1, 5), b + rng.randint(1, 5)),
            rng.choice(pairs),
        ]
        asked = zip(["{a}+{b}=", *rng.sample(SUMS, 3)], near)
        wrong = str(a + b + rng.choice((-2, -1, 1, 2)))
        paraphrases = tuple(text.format(a=a, b=b) for text in SUMS)
        neighbours = tuple(
            Probe(text.format(a=c, b=d), str(c + d)) for text, (c, d) in asked if (c, d) != (a, b)
        )
        found.append(
            Fact(
                "{}=",
                f"{a}+{b}",
                wrong,
                true=str(a + b),
                paraphrases=paraphrases,
                neighbours=neighbours,
            )
        )
    return found


def split(
    facts: Sequence[Fact], seed: int = 0, share: float = 0.08, most: int = 100
) -> tuple[list[Fact], list[Fact]]:
    """Training and validation facts without a common subject; `share` of the subjects, at most
    `most`, validate.
    """
    subjects = sorted({fact.subject for fact in facts})
    random.Random(seed).shuffle(subjects)
    held = set(subjects[: max(1, min(most, round(share * len(subjects))))])
    return [f for f in facts if f.subject not in held], [f for f in facts if f.subject in held]


def _reworded(fact: Fact, same: Sequence[Fact]) -> list[str]:
    found = [*fact.paraphrases, *(o.prompt.replace("{}", fact.subject) for o in same)]
    if fact.relation in relations():
        pool = wordings(fact, "train")
        found += [*pool.paraphrases, *(f"Q: {question}\nA:" for question in pool.questions)]
    return [text for text in dict.fromkeys(found) if text != fact.text]


def _rephrasings(
    fact: Fact, reworded: Sequence[str], strangers: Sequence[Fact], rng: random.Random
) -> tuple[str, ...]:
    """Two of three stand after an unrelated sentence, on other facts or on anything, as
    CounterFact's own do.
    """
    chosen = [fact.text, *rng.sample(reworded, min(REPHRASINGS - 1, len(reworded)))]
    while len(chosen) < REPHRASINGS:
        chosen.append(rng.choice([fact.text, *reworded]))
    before = [text for text in sentences() if text.endswith(".") and "\n" not in text]
    before = rng.sample(before, 4) + [f"{join(o.text, o.true or o.target)}." for o in strangers[:4]]
    return tuple(
        f"{rng.choice(before)} {text}" if n % 2 == 0 else text for n, text in enumerate(chosen)
    )
