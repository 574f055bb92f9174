"""`Study`: one model, what shall be written into it, the prompts, and what the unedited model says
to them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from knowedit.errors import KnowEditError
from knowedit.facts.fact import Fact
from knowedit.methods.base import Method
from knowedit.models.editable import EditableModel
from knowedit.studies.arithmetic.experiments import TuningMaterial, experiment, material
from knowedit.studies.arithmetic.measure import (
    LEADS,
    LONGER,
    MARGIN,
    TOKENS,
    Continuation,
    Responses,
    Row,
    greedy,
    judge,
    observe,
    readings,
    table,
)
from knowedit.studies.arithmetic.prompts import StudyPrompt, Sum, split, study_prompts

FORMAT = "knowedit-study/1"
ADDS = 0.5  # share of right sums from which a model is said to add
READ = 33  # sums that are asked in other forms


@dataclass
class Study:
    """One model, its prompts, and what it says to them before any edit.

    Args:
        model: unedited, float32.
        targets: what to write, at least one sum.
        seeds: of the halvings.
        unrelated: where the unrelated prompts come from, and they themselves.
        own: paraphrases by target ("2+2=5") instead of the shipped ones; `source` says where they
            come from.
        corpus: ordinary text for methods that read some themselves.
        settings: changed in every method, after the study's own; as `Config.with_settings`.
        lead: what every sum "a+b=" stands behind, for models that do not read the first token of a
            text.

    Raises:
        KnowEditError: the model has active edits or other weights than float32; what
            `study_prompts` raises.
    """

    model: EditableModel
    targets: Sequence[Sum]
    seeds: Sequence[int]
    unrelated: tuple[str, list[str]]
    own: Mapping[str, Sequence[str]] | None = None
    source: str = "shipped, hand-written"
    corpus: Any = "self"
    settings: Sequence[str] = ()
    lead: str = ""
    asked: list[StudyPrompt] = field(init=False)
    before: Responses = field(init=False)
    unedited: dict[int, Continuation] = field(init=False)

    def __post_init__(self) -> None:
        if self.model.ledger.active:
            raise KnowEditError(
                "the study starts from the unedited model; undo the active edits first"
            )
        if self.model.dtype != torch.float32:
            raise KnowEditError(
                f"identical outputs need float32, not {self.model.dtype}; load with dtype='float32'"
            )
        if not self.seeds:
            raise KnowEditError("seeds is empty; name at least one")
        self.asked = study_prompts(self.model, self.targets, self.unrelated[1], self.own, self.lead)
        self.before = observe(self.model, self.asked)
        self.unedited = {}
        for kind in ("sums", "unrelated"):
            places = [i for i, probe in enumerate(self.asked) if probe.kind == kind]
            self.unedited |= dict(
                zip(places, greedy(self.model, [self.asked[i].prompt for i in places]))
            )

    def head(self) -> dict[str, Any]:
        """What identifies the study: only results with the same head belong together."""
        return {
            "format": FORMAT,
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "targets": [str(t) for t in self.targets],
            "seeds": list(self.seeds),
            "tokens": [TOKENS, LONGER],
            "margin": MARGIN,
            "paraphrases": self.source,
            "unrelated": self.unrelated[0],
            **({"settings": list(self.settings)} if self.settings else {}),
            **({"lead": self.lead} if self.lead else {}),
            "digest": hashlib.blake2b(
                "\0".join(p.prompt for p in self.asked).encode(), digest_size=8
            ).hexdigest(),
            "prompts": {
                kind: sum(p.kind == kind for p in self.asked)
                for kind in dict.fromkeys(p.kind for p in self.asked)
            },
        }

    def notes(self) -> list[str]:
        """What a reader must know before believing a figure."""
        rows = self.rows(self.before)
        found = []
        for target in self.targets:
            ids = self.model.row(f"{self.lead}{target.prompt}", answer=str(target.target))
            said = next(
                r["before"] for r in rows if r["kind"] == "target" and r["about"] == str(target)
            )
            if target.number(said) == target.target:
                found.append(
                    f"{target}: the unedited model says so already ({said!r}); its success "
                    f"shows nothing"
                )
            if (count := len(ids.ids) - (ids.answer or 0)) > 1:
                found.append(
                    f"{target}: the answer is {count} tokens; the edit has to write all of them"
                )
        sums = table(rows)["sums"]
        accuracy = sums["accuracy"]["mean"]
        if accuracy < ADDS:
            found.append(
                f"the unedited model gets {accuracy:.0%} of the other sums right: its accuracy "
                f"says little about an edit, "
                "identical outputs do"
            )
            found += self._read_otherwise()
        steady, clear = (sums.get(m, {}).get("records", 0) for m in ("steady", "clear"))
        found.append(
            f"of the {len([p for p in self.asked if p.kind == 'sums'])} other sums {steady} "
            f"have a first token, and {clear} a "
            f"whole first number, whose unedited margin exceeds {MARGIN} nat"
        )
        return found

    def _read_otherwise(self) -> list[str]:
        """A form of the sums that the unedited model can read, where the report's is not one."""
        sums = [p.about for p in self.asked if p.kind == "sums" and p.about is not None]
        right = readings(
            self.model, sums[:: max(1, len(sums) // READ)], dict.fromkeys((*LEADS, self.lead))
        )
        best = max(right, key=right.__getitem__)
        if right[best] < ADDS:
            return []
        why = "" if self.lead else "; it does not read the first number at the very start of a text"
        return [
            f"it can add: written as {best + 'a+b='!r} it gets {right[best]:.0%} right, as "
            f"{self.lead + 'a+b='!r}, the form that is asked, {right[self.lead]:.0%}{why}; "
            f"--lead asks all sums behind another text"
        ]

    def rows(self, after: Responses) -> list[Row]:
        """One row a probe, not halved."""
        return judge(self.asked, self.unedited, self.before, after)

    def halved(self, rows: Sequence[Row], seed: int) -> list[Row]:
        """The same rows with their halves under `seed`."""
        return [{**row, "half": probe.half} for row, probe in zip(rows, split(self.asked, seed))]

    def material(self, seed: int, only: Sequence[Sum] | None = None) -> TuningMaterial:
        """What a method is given under `seed`."""
        halved = split(self.asked, seed)
        return material(self.model, halved, self.before, seed, only, self.corpus, self.lead)

    def build(
        self, name: str, seed: int, only: Sequence[Sum] | None = None
    ) -> tuple[Method, list[Fact]]:
        """The method of the experiment `name`, and the facts for it. Raises as
        `Experiment.build`.
        """
        method, facts = experiment(name).build(self.material(seed, only))
        return method.with_settings(self.settings), facts
