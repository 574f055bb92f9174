"""Training MEND's hyper-network: edits that must be said, generalise, and leave their neighbours
alone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.io.config import Config
from knowedit.io.memory import peak_memory
from knowedit.io.progress import bar
from knowedit.io.ranges import Count, NotNegative, Whole
from knowedit.methods.learned.examples import ExampleRows, drawn, examples, placed, split
from knowedit.methods.learned.loop import Plan, stamp, train
from knowedit.methods.learned.mend.network import MendNetwork, token_factors
from knowedit.methods.learned.networks import default_file
from knowedit.models.editable import EditableModel
from knowedit.models.load import accepts_model
from knowedit.models.texts import Texts
from knowedit.models.tokens import Row

RATES = tuple(10 ** (-k / 2) for k in range(2, 12))  # 0.1 ... 3e-6


@dataclass(frozen=True)
class MendTraining(Config):
    """Settings of the training.

    Attributes:
        layers: whose MLP weights are edited; None: the last three.
        rank: of the hyper-network.
        edit, locality: weights of the NLL of edits and rephrasings and of the KL on neighbours
            (published: 1 to 10).
        facts: a step.
        together: how many of them are written in one edit, step by step in turn.
        rephrasings, neighbours: of each fact in a step.
    """

    layers: tuple[int, ...] | None = None
    rank: Count = 128
    edit: NotNegative = 1.0
    locality: NotNegative = 3.0
    facts: Count = 8
    together: tuple[Count, ...] = (1, 1, 4)
    rephrasings: Whole = 2
    neighbours: Whole = 2
    plan: Plan = field(default_factory=lambda: Plan(steps=300, lr=1e-3, validate=50))


@accepts_model
def train_mend(
    model: EditableModel,
    facts: Sequence[Fact],
    settings: MendTraining | None = None,
    output: str | Path | None = None,
    *,
    progress: bool = True,
) -> MendNetwork:
    """Train a network on `facts`, on a bfloat16 draft of the model, and save it (default: in the
    cache folder).

    Interrupted, or out of minutes, it goes on where it was when called again with the same
    arguments.

    Raises:
        EditError: too few facts, facts without other wordings or neighbours, a checkpoint of
            another training.
    """
    settings = settings or MendTraining()
    path = Path(output) if output is not None else default_file("mend", model)
    start, cpu = time.monotonic(), time.process_time()
    with peak_memory(model.device) as peak:
        task = _Task(model, facts, settings, progress)
        task.calibrate()
        prepared, used = time.monotonic() - start, time.process_time() - cpu
        log = train(
            task.network.parameters,
            task.loss,
            task.validation,
            settings.plan,
            path.with_name(path.name + ".checkpoint"),
            task.stamp,
            title="training MEND",
            progress=progress,
        )
    task.network.report = {
        "settings": settings.to_dict(),
        "facts": task.counts,
        "trainable_parameters": task.network.trainable,
        "steps": log.steps,
        "seconds": prepared + log.seconds,
        "cpu_seconds": used + log.cpu_seconds,
        "preparation_seconds": prepared,
        "peak_memory_bytes": peak(),
        "start_rate": task.rate,
        "validation": {"loss": log.best},
        "curve": log.curve,
    }
    task.network.save(path)
    return task.network


class _Task:
    def __init__(
        self, model: EditableModel, facts: Sequence[Fact], settings: MendTraining, progress: bool
    ) -> None:
        self.settings, self.progress, plan = settings, progress, settings.plan
        layers = settings.layers or tuple(range(max(1, len(model.layers) - 3), len(model.layers)))
        self.network = MendNetwork.new(model, layers, settings.rank, plan.seed)
        self.draft = model.draft()
        rows: list[Row] = []
        some, others = split(facts, plan.seed)
        training, held_out = examples(some, seed=plan.seed), examples(others, some, seed=plan.seed)
        self.training, self.held_out = (
            placed(self.draft, part, rows) for part in (training, held_out)
        )
        if len(self.training) < settings.facts:
            raise EditError(
                f"{len(self.training)} training facts are fewer than the {settings.facts} of a "
                f"step; give more facts"
            )
        self.counts = {"training": len(training), "validation": len(held_out)}
        self.texts = Texts(
            self.draft, rows, self.network.first, title="reading the texts", progress=progress
        )
        self.stamp = stamp(model.fingerprint, settings, [row.ids for row in rows])
        self.rate = 1.0

    def calibrate(self) -> None:
        """The normalisation, from one pass over the training facts; then the rate at which the
        identity does best.
        """
        sums: dict[str, Tensor] = {}
        size = self.settings.facts
        with bar("measuring gradients", len(self.training), "facts", show=self.progress) as advance:
            for start in range(0, len(self.training), size):
                part = self.training[start : start + size]
                tokens = token_factors(
                    self.texts, self.texts.batch([p.edit for p in part]), self.network.weights
                )
                for name, (x, delta, _) in tokens.items():
                    rows = torch.cat([x, delta], 1).double()
                    seen = torch.stack(
                        [torch.full_like(rows[0], len(rows)), rows.sum(0), (rows * rows).sum(0)]
                    )
                    sums[name] = sums[name] + seen if name in sums else seen
                advance(len(part))
        self.network.normalise(sums)
        losses = {}
        for rate in RATES:
            self.network.start_at(rate)
            losses[rate] = self._mean(self.training[: 2 * size])
        self.rate = min(losses, key=losses.__getitem__)
        self.network.start_at(self.rate)

    def loss(self, step: int) -> Tensor:
        """Of the step's facts; a new order every epoch."""
        seed, together = (
            self.settings.plan.seed,
            self.settings.together[step % len(self.settings.together)],
        )
        chosen = [
            self.training[i] for i in drawn(seed, step, self.settings.facts, len(self.training))
        ]
        return self._objective(chosen, together, random.Random(f"{seed} step {step}"))

    def validation(self) -> float:
        return self._mean(self.held_out)

    @torch.no_grad()
    def _mean(self, places: Sequence[ExampleRows]) -> float:
        """Mean loss of single edits, always of the same texts."""
        total, size = 0.0, self.settings.facts
        for start in range(0, len(places), size):
            part = places[start : start + size]
            total += float(self._objective(part, 1, random.Random(start))) * len(part)
        return total / len(places)

    def _objective(
        self, chosen: Sequence[ExampleRows], together: int, rng: random.Random
    ) -> Tensor:
        settings, texts = self.settings, self.texts
        groups = torch.arange(len(chosen), device=self.draft.device) // together
        tokens = token_factors(texts, texts.batch([p.edit for p in chosen]), self.network.weights)
        factors = self.network.factors(tokens, groups)
        said = [
            [p.edit, *rng.sample(p.rephrasings, min(settings.rephrasings, len(p.rephrasings)))]
            for p in chosen
        ]
        kept = [
            rng.sample(p.neighbours, min(settings.neighbours, len(p.neighbours))) for p in chosen
        ]
        losses = []
        for rows, measure in ((said, texts.nll), (kept, texts.kl)):
            owner = torch.tensor(
                [i for i, mine in enumerate(rows) for _ in mine], device=groups.device
            )
            whose = groups[owner]
            with self.draft.virtual(
                {name: (left[whose], right[whose]) for name, (left, right) in factors.items()}
            ):
                losses.append(
                    measure(texts.batch([row for mine in rows for row in mine])) / len(owner)
                )
        return settings.edit * losses[0] + settings.locality * losses[1]
