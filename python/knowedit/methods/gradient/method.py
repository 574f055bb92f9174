"""What the gradient methods have in common; a method is a subclass with its trainable part and its
defaults (`named/`, one file a method).

* Trainable part: whole weights (`trainable.WholeWeights`) or a LoRA adapter
  (`trainable.LoRAAdapter`).
* Losses: the answers' NLL, always; the NLL of texts that should stay (`stability`); the KL
  divergence from the unedited model (`kl`).
* Constraint: none, or a largest change of any weight.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from knowedit.edits.changes import change_of, relative_norm
from knowedit.edits.edit import Edit
from knowedit.edits.history import History
from knowedit.edits.report import EditReport
from knowedit.facts.fact import Fact, Probe
from knowedit.facts.wordings.ordinary import openings, sentences
from knowedit.io.memory import peak_memory
from knowedit.io.ranges import Count, NotNegative, Positive, Whole
from knowedit.methods.base import Method
from knowedit.methods.gradient.descent import descend, measured
from knowedit.methods.gradient.terms import AnswerTerm, KeepTerm, LossTerm, continued
from knowedit.methods.gradient.trainable import Trainable
from knowedit.models.editable import EditableModel
from knowedit.statistics import KeyStatistics


@dataclass(frozen=True)
class GradientMethod(Method, abstract=True):
    """Gradient descent on the facts' answers; `part` says on what.

    Attributes:
        layers: to train; None: the method's own choice.
        steps, lr, decay: AdamW's steps at most, its step size, and its weight decay.
        stop: a fact counts as learned, and has no gradient, while the NLL of its answer (nats a
            token) is below this. Training ends when all facts are learned and there is no other
            loss. None: no such criterion.
        margin: a fact counts as learned only while every token of its answer leads the best other
            token by so many nats. None: no such criterion. With neither, all steps are taken.
        stability: weight of the NLL of texts that should stay as they are.
        stable: those texts: prompts (the model's own greedy continuation is kept), or `Probe` with
            an answer to keep; None: shipped openings about other subjects.
        kl: weight of KL(clean || edited), mean over every token of the context texts.
        context: those texts; None: shipped openings and sentences.
        batch, draw: facts, and texts of each other kind, a step; None: all.
        seed: of the draws, of the choice among the shipped texts, and of an adapter's start.
        budget: padded tokens run at once (memory).
    """

    layers: tuple[int, ...] | None = None
    steps: Count = 50
    lr: Positive = 1e-4
    decay: NotNegative = 0.0
    stop: NotNegative | None = 0.05
    margin: NotNegative | None = None
    stability: NotNegative = 0.0
    stable: tuple[str | Probe, ...] | None = None
    kl: NotNegative = 0.0
    context: tuple[str, ...] | None = None
    batch: Count | None = 32
    draw: Count | None = 8
    seed: Whole = 0
    budget: Count = 256

    @abstractmethod
    def part(self, model: EditableModel) -> Trainable:
        """What is trained, with its constraint."""

    def terms(self, model: EditableModel, facts: Sequence[Fact]) -> dict[str, LossTerm]:
        """The losses by name; the first is the answers'."""
        rows = [model.row(fact.text, answer=fact.new_answer) for fact in facts]
        found: dict[str, LossTerm] = {
            "answers": AnswerTerm(model, rows, 1.0, self.batch, self.budget)
        }
        if self.stability:
            texts = openings(facts, seed=self.seed) if self.stable is None else self.stable
            found["stability"] = AnswerTerm(
                model, continued(model, texts, 6), self.stability, self.draw, self.budget
            )
        if self.kl:
            shipped = [*sentences(), *openings(facts, len(sentences()), self.seed)]
            rows = [model.row(text) for text in (shipped if self.context is None else self.context)]
            found["kl"] = KeepTerm(model, rows, self.kl, self.draw, self.budget)
        return found

    def _compute(
        self,
        model: EditableModel,
        facts: list[Fact],
        statistics: KeyStatistics | None,
        history: History | None,
        progress: bool,
    ) -> Edit:
        """As `Method.compute`; there are no keys, so a history's facts are only checked, and
        statistics not used.

        Raises:
            EditError: also for a loss that is not finite; the message has the step.
        """
        fingerprint = model.fingerprint  # before anything is put into the model
        begun = time.perf_counter()
        with model.evaluating(), peak_memory(model.device) as peak:
            terms = self.terms(model, facts)
            with self.part(model) as part:
                steps = descend(self, part, terms, progress)
                found = {name: measured(part, term) for name, term in terms.items()}
                changes, trained = part.changes(), part.size
            memory = peak()
        matrices = {
            name: weight
            for name, weight in model.hf.named_parameters()
            if name in changes and weight.ndim == 2
        }
        loss, lead = found["answers"]
        report = EditReport(
            relative_norm={
                name: relative_norm(weight, changes[name]) for name, weight in matrices.items()
            },
            steps=steps,
            seconds=time.perf_counter() - begun,
            details={
                "settings": self.to_dict(),
                "trainable": trained,
                "peak_memory_bytes": memory,
                "loss": loss,
                "lead": lead,
                "terms": {name: loss for name, (loss, _) in found.items()},
            },
        )
        if lead <= 0:
            report.warnings = [
                f"not every answer comes first (mean NLL {loss:.2f}): more steps or a larger lr"
            ]
        named = {name: change_of(change) for name, change in changes.items()}
        return Edit(self.name, named, facts, fingerprint, report)
