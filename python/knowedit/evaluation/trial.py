"""One prompt put to a model and to the same model under an edit, by hand: what both say, which next
tokens they think of, and how the nearest written facts stand there.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from knowedit.edits.edit import Edit
from knowedit.errors import KnowEditError
from knowedit.facts.fact import Fact
from knowedit.models.editable import EditableModel

#: Tokens of an answer, at most.
LONGEST = 200
#: Next tokens and facts that are shown.
TOKENS, NEAREST = 5, 3


@dataclass
class Trial:
    """A model, and edits that are applied for the length of an answer; several may ask at once.
    Without an edit both answers are the model's own.
    """

    model: EditableModel
    edits: Sequence[Edit]
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        for edit in self.edits:
            edit.check(self.model)

    @property
    def facts(self) -> list[Fact]:
        """Every fact of the edits."""
        return [fact for edit in self.edits for fact in edit.facts]

    @property
    def has_chat(self) -> bool:
        """Whether the model has a chat template."""
        return bool(getattr(self.model.tokenizer, "chat_template", None))

    def ask(self, prompt: str, *, chat: bool = False, tokens: int = 24) -> dict[str, Any]:
        """Both answers, JSON-ready.

        Args:
            chat: ask in the model's chat template.
            tokens: new tokens, 1 to `LONGEST`.

        Raises:
            KnowEditError: an empty prompt, a wrong number of tokens, or what the model raises.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise KnowEditError("the prompt is empty; write what the model shall go on with")
        if not isinstance(tokens, int) or not 1 <= tokens <= LONGEST:
            raise KnowEditError(f"tokens must be a whole number from 1 to {LONGEST}")
        text = self.model.chat(prompt) if chat else prompt
        near = nearest_facts(prompt, self.facts)
        with self._lock:
            before = self._said(text, near, tokens)
            with ExitStack() as applied:
                for edit in self.edits:
                    applied.enter_context(edit.applied_to(self.model))
                after = self._said(text, near, tokens) if self.edits else dict(before)
        facts = [
            {"prompt": fact.text, "target": fact.target, "true": fact.true, **ratings}
            for fact, *rated in zip(near, before.pop("facts"), after.pop("facts"))
            for ratings in [dict(zip(("before", "after"), rated))]
        ]
        return {"asked": text, "before": before, "after": after, "facts": facts}

    def _said(self, text: str, near: Sequence[Fact], tokens: int) -> dict[str, Any]:
        """What the model, as it is now, says, and how it rates the facts' answers there."""
        likely = self.model.next_logprobs([text])[0].exp().topk(TOKENS)
        answers = [(i, a) for i, f in enumerate(near) for a in (f.target, f.true) if a is not None]
        scores = self.model.score([text] * len(answers), [answer for _, answer in answers])
        rated: list[dict[str, float]] = [{} for _ in near]
        for (i, answer), score in zip(answers, scores):
            rated[i][answer] = score.probability
        return {
            "text": self.model.generate([text], tokens)[0],
            "next": [
                [self.model.tokenizer.decode([token]), p]
                for token, p in zip(likely.indices.tolist(), likely.values.tolist())
            ],
            "facts": rated,
        }


def nearest_facts(prompt: str, facts: Sequence[Fact], count: int = NEAREST) -> list[Fact]:
    """The facts with the most words in common with a prompt, those of a subject it names first."""
    words = _words(prompt)

    def near(fact: Fact) -> tuple[bool, float]:
        mine = _words(fact.text)
        return _words(fact.subject) <= words, len(mine & words) / max(1, len(mine | words))

    return sorted(facts, key=near, reverse=True)[:count]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))
