"""What moved elsewhere: how an edit changes the model's next-word distribution on texts it was not
about.

The drift of keys and states under rephrasing is in `knowedit.evaluation.geometry`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from knowedit.edits.edit import Edit
from knowedit.evaluation.measures.base import ModelMeasure, register
from knowedit.io.tables import figure
from knowedit.models.editable import EditableModel
from knowedit.models.load import accepts_model

#: Ordinary openings on many topics, written for this package; none is about a fact of the embedded
#: set.
ORDINARY = (
    "The quickest way to boil an egg is to",
    "When the train finally arrived, the passengers",
    "A good night's sleep is",
    "She opened the letter and began to",
    "In the spring, farmers usually plant",
    "The recipe calls for two cups of",
    "Before you paint a wall, you should",
    "The teacher asked the children to",
    "Most birds build their nests in",
    "To save a file on a computer, press",
    "My grandfather used to tell us stories about",
    "The sum of two even numbers is",
    "If it rains tomorrow, we will",
    "The largest room in the house was the",
    "Scientists measure temperature with a",
    "He could not find his keys, so he",
    "Water boils at a temperature of",
    "The opposite of hot is",
    "An apple a day keeps the",
    "The committee decided to postpone the",
    "A triangle has three",
    "Bread is made from flour, water and",
    "The moon goes around the",
    "After the concert, the audience",
    "You can borrow books from a",
    "The first day of the week is",
    "Once upon a time there was a",
    "Regular exercise helps to",
    "The price of the ticket was",
    "She speaks softly because she",
    "The engine would not start because",
    "In winter, the days are",
)


@dataclass(frozen=True)
class Drift:
    """Change of the next-token distribution over a set of prompts.

    Attributes:
        kl: mean KL(before || after), nats.
        same: share of prompts whose most likely next token is the same.
        worst: the prompt with the largest divergence, and that divergence.
        prompts: how many.
    """

    kl: float
    same: float
    worst: tuple[str, float]
    prompts: int

    def __str__(self) -> str:
        kl = figure(self.kl, ".4f")
        return f"ordinary text: same next word {self.same:.0%}, KL {kl} nats"


@register
class OrdinaryDrift(ModelMeasure):
    """`Drift` on `ORDINARY`."""

    name, about = "drift", "the next word after ordinary openings stays the same"
    shown: ClassVar = {"same": ".3f", "kl": ".4f"}

    def observe(self, model: EditableModel, texts: Sequence[str]) -> Tensor:
        return model.next_logprobs(ORDINARY)

    def compare(self, before: Tensor, after: Tensor) -> dict[str, Any]:
        found = asdict(compare(before, after, ORDINARY))
        return {**found, "worst": list(found["worst"])}

    def describe(self, found: dict[str, Any]) -> str:
        kl = figure(found["kl"], ".4f")
        return f"ordinary text: same next word {found['same']:.0%}, KL {kl} nats"


@accepts_model
def drift(model: EditableModel, edit: Edit, prompts: Sequence[str] = ORDINARY) -> Drift:
    """Measure `edit` on `prompts`; the model is left as it was found."""
    before = model.next_logprobs(prompts)
    with edit.applied_to(model):
        after = model.next_logprobs(prompts)
    return compare(before, after, prompts)


def compare(before: Tensor, after: Tensor, prompts: Sequence[str]) -> Drift:
    """The drift between log-probabilities `[prompts, vocab]` of the next token."""
    kl = divergence(before, after)
    worst = int(kl.argmax())
    same = (before.argmax(-1) == after.argmax(-1)).double().mean()
    return Drift(float(kl.mean()), float(same), (prompts[worst], float(kl[worst])), len(prompts))


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) of log-probabilities `[..., vocab]`, nats: `[...]`."""
    return (before.exp() * (before - after)).sum(-1)
