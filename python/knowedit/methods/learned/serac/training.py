"""Training SERAC's two parts: a gate that tells rephrasings from neighbours, and a reader of the
fact in view.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from knowedit.facts.fact import Fact
from knowedit.io.config import Config
from knowedit.io.memory import peak_memory
from knowedit.io.progress import bar
from knowedit.io.ranges import Count, NotNegative, Whole
from knowedit.methods.learned.examples import Example, drawn, examples, placed, split
from knowedit.methods.learned.loop import Plan, stamp, train
from knowedit.methods.learned.networks import default_file
from knowedit.methods.learned.serac.network import LowRankAdapter, Scope, SeracNetwork, in_view
from knowedit.models.editable import EditableModel
from knowedit.models.load import accepts_model
from knowedit.models.partial import layer_outputs
from knowedit.models.structure import linears
from knowedit.models.texts import Texts
from knowedit.models.tokens import Row


@dataclass(frozen=True)
class SeracTraining(Config):
    """Settings of the training.

    Attributes:
        layer: whose output the classifier reads; None: a third of the way up.
        first: the first layer with low-rank additions (attention and MLP) of rank `rank`; None:
            halfway up.
        locality: weight of the KL that keeps neighbours as they are where the wrong fact is in
            view.
        rank: of the low-rank additions.
        gate_facts, reader_facts: facts a step of the one and the other training.
        gate, reader: of the two trainings.
    """

    layer: Whole | None = None
    first: Whole | None = None
    rank: Count = 8
    locality: NotNegative = 1.0
    gate_facts: Count = 32
    reader_facts: Count = 8
    gate: Plan = field(default_factory=lambda: Plan(steps=400, lr=1e-3, validate=50))
    reader: Plan = field(default_factory=lambda: Plan(steps=80, lr=1e-3, validate=40))


@accepts_model
def train_serac(
    model: EditableModel,
    facts: Sequence[Fact],
    settings: SeracTraining | None = None,
    output: str | Path | None = None,
    *,
    progress: bool = True,
) -> SeracNetwork:
    """Train both parts on `facts`, on a bfloat16 draft of the model, and save them (default: in the
    cache folder).

    Interrupted, or out of minutes, it goes on where it was when called again with the same
    arguments.

    Raises:
        EditError: too few facts, facts without other wordings or neighbours, a checkpoint of
            another training.
    """
    settings = settings or SeracTraining()
    path = Path(output) if output is not None else default_file("serac", model)
    depth, seed = len(model.layers), settings.gate.seed
    layer = depth // 3 if settings.layer is None else settings.layer
    first = max(1, depth // 2 if settings.first is None else settings.first)
    model.check_layers([layer, first])
    some, others = split(facts, seed)
    training, held_out = examples(some, seed=seed), examples(others, some, seed=seed)
    named, draft = stamp(model.fingerprint, settings, training, held_out), model.draft()
    checkpoints = [path.with_name(f"{path.name}.{part}") for part in ("gate", "reader")]
    start, cpu = time.monotonic(), time.process_time()
    with peak_memory(model.device) as peak:
        gate = _Gate(draft, layer, training, held_out, settings, progress)
        prepared, used = time.monotonic() - start, time.process_time() - cpu
        parameters = dict(gate.scope.named_parameters())
        gated = train(
            parameters,
            gate.loss,
            gate.validation,
            settings.gate,
            checkpoints[0],
            named,
            keep=True,
            title="training the gate",
            progress=progress,
        )
        threshold, rates = gate.threshold()
        reader = _Reader(draft, first, training, held_out, settings)
        read = train(
            reader.parameters,
            reader.loss,
            reader.validation,
            settings.reader,
            checkpoints[1],
            named,
            keep=True,
            title="training the reader",
            progress=progress,
        )
    numbers = [sum(p.numel() for p in part.values()) for part in (parameters, reader.parameters)]
    report = {
        "settings": settings.to_dict(),
        "facts": {"training": len(training), "validation": len(held_out)},
        "trainable_parameters": sum(numbers),
        "gate_parameters": numbers[0],
        "reader_parameters": numbers[1],
        "seconds": prepared + gated.seconds + read.seconds,
        "cpu_seconds": used + gated.cpu_seconds + read.cpu_seconds,
        "preparation_seconds": prepared,
        "peak_memory_bytes": peak(),
        "validation": {**rates, "reader_loss": read.best},
        "gate_curve": gated.curve,
        "reader_curve": read.curve,
    }
    network = SeracNetwork(gate.scope, layer, reader.adapter, model.fingerprint, threshold, report)
    network.setup = model.setup
    network.save(path)
    if (gated.steps, read.steps) == (settings.gate.steps, settings.reader.steps):
        for checkpoint in checkpoints:
            checkpoint.unlink()
    return network


class _Gate:
    """The classifier, on states computed once."""

    def __init__(
        self,
        draft: EditableModel,
        layer: int,
        training: Sequence[Example],
        held_out: Sequence[Example],
        settings: SeracTraining,
        progress: bool,
    ) -> None:
        self.settings, seed = settings, settings.gate.seed
        rows: list[Row] = []
        self.examples = {"training": training, "held_out": held_out}
        self.places = {
            name: placed(draft, part, rows, answers=False) for name, part in self.examples.items()
        }
        inputs = [row.ids for row in rows]
        self.states: list[Tensor] = [torch.empty(0)] * len(rows)
        with bar("reading the texts", len(rows), "texts", show=progress) as advance:
            for group, states in layer_outputs(draft, inputs, layer):
                for line, i in enumerate(group):
                    self.states[i] = states[line, : len(inputs[i])].clone()
                advance(len(group))
        self.scope = Scope(draft.hidden, torch.Generator().manual_seed(seed)).to(draft.device)

    def loss(self, step: int) -> Tensor:
        size = min(self.settings.gate_facts, len(self.places["training"]))
        return self._objective(
            "training", drawn(self.settings.gate.seed, step, size, len(self.places["training"]))
        )

    @torch.no_grad()
    def validation(self) -> float:
        return float(self._objective("held_out", range(len(self.places["held_out"]))))

    def _embed(self, rows: Sequence[int]) -> Tensor:
        states = [self.states[i] for i in rows]
        lengths = torch.tensor([len(part) for part in states], device=states[0].device)
        return self.scope(nn.utils.rnn.pad_sequence(states, batch_first=True), lengths)

    def _logits(self, part: str, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of all texts of some examples with all of their facts, `[texts, facts]`, and the right
        fact, or `facts`: none.

        A text in which the subject of somebody else's fact occurs may ask for that fact too; the
        pair is left out (-inf).
        """
        places, examples = (
            [self.places[part][i] for i in which],
            [self.examples[part][i] for i in which],
        )
        rows, right, texts = [], [], []
        for number, (place, example) in enumerate(zip(places, examples)):
            inside = [example.fact.text, *example.rephrasings]
            rows += [place.edit, *place.rephrasings, *place.neighbours]
            right += [number] * len(inside) + [len(which)] * len(place.neighbours)
            texts += [
                (number, text)
                for text in (*inside, *(probe.prompt for probe in example.neighbours))
            ]
        logits = self.scope.logits(self._embed(rows), self._embed([place.edit for place in places]))
        unsure = [
            [n != owner and e.fact.subject in text for n, e in enumerate(examples)]
            for owner, text in texts
        ]
        logits = logits.masked_fill(torch.tensor(unsure, device=logits.device), -torch.inf)
        return logits, torch.tensor(right, device=logits.device)

    def _objective(self, part: str, which: Sequence[int]) -> Tensor:
        """Cross-entropy over the stored facts and "none of them" (logit 0); questions in and out of
        scope count alike.
        """
        logits, right = self._logits(part, which)
        losses = nn.functional.cross_entropy(
            torch.cat([logits, logits.new_zeros(len(logits), 1)], 1), right, reduction="none"
        )
        outside = right == len(which)
        return 0.5 * (losses[outside].mean() + losses[~outside].mean())

    @torch.no_grad()
    def threshold(self) -> tuple[float, dict[str, float]]:
        """The logit that tells the validation texts apart best with all validation facts stored,
        and how well it does.
        """
        places = self.places["held_out"]
        logits, right = self._logits("held_out", range(len(places)))
        best, which = logits.max(1)
        outside, found = right == len(places), which == right
        tried = best.sort().values
        inside_rate = torch.stack([((best > t) & found)[~outside].double().mean() for t in tried])
        outside_rate = torch.stack([(best <= t)[outside].double().mean() for t in tried])
        at = int((inside_rate + outside_rate).argmax())
        rates = {
            "in_scope_found": float(inside_rate[at]),
            "out_of_scope_left": float(outside_rate[at]),
        }
        return float(tried[at]), {**rates, "stored": len(places)}


class _Reader:
    """The counterfactual model: low-rank additions to the base, trained on questions with their
    fact in view.
    """

    def __init__(
        self,
        draft: EditableModel,
        first: int,
        training: Sequence[Example],
        held_out: Sequence[Example],
        settings: SeracTraining,
    ) -> None:
        self.draft, self.first, self.training, self.held_out, self.settings = (
            draft,
            first,
            training,
            held_out,
            settings,
        )
        generator = torch.Generator().manual_seed(settings.reader.seed)
        self.parameters: dict[str, nn.Parameter] = {}
        for index in range(first, len(draft.layers)):
            for name, (width_in, width_out) in linears(draft, index).items():
                right = torch.randn(width_in, settings.rank, generator=generator) / width_in**0.5
                self.parameters[f"{name}.U"] = nn.Parameter(
                    torch.zeros(width_out, settings.rank, device=draft.device)
                )
                self.parameters[f"{name}.V"] = nn.Parameter(right.to(draft.device))

    @property
    def adapter(self) -> LowRankAdapter:
        names = [name[:-2] for name in self.parameters if name.endswith(".U")]
        return {
            name: (self.parameters[f"{name}.U"], self.parameters[f"{name}.V"]) for name in names
        }

    def loss(self, step: int) -> Tensor:
        seed = self.settings.reader.seed
        chosen = drawn(
            seed, step, min(self.settings.reader_facts, len(self.training)), len(self.training)
        )
        return self._objective(
            [self.training[i] for i in chosen], random.Random(f"{seed} step {step}")
        )

    @torch.no_grad()
    def validation(self) -> float:
        size, total = self.settings.reader_facts, 0.0
        for start in range(0, len(self.held_out), size):
            part = self.held_out[start : start + size]
            total += float(self._objective(part, random.Random(start))) * len(part)
        return total / len(self.held_out)

    def _objective(self, chosen: Sequence[Example], rng: random.Random) -> Tensor:
        """NLL of the target after a question with its fact in view, plus KL(base || now) after a
        neighbour with it in view.
        """
        row, said, seen, plain = self.draft.row, [], [], []
        for example in chosen:
            fact, about = example.fact, (example.fact.text, example.fact.target)
            said.append(
                row(
                    in_view(*about, rng.choice([fact.text, *example.rephrasings])),
                    answer=fact.target,
                )
            )
            probe = rng.choice(example.neighbours)
            seen.append(row(in_view(*about, probe.prompt)))
            plain.append(row(probe.prompt))
        every = range(len(chosen))
        clean = Texts(self.draft, plain, self.first).batch(every).clean
        asked, kept = (Texts(self.draft, rows, self.first, clean=False) for rows in (said, seen))
        with self.draft.virtual(self.adapter):
            nll = asked.nll(asked.batch(every))
            kl = kept.kl(kept.batch(every), clean)
        return (nll + self.settings.locality * kl) / len(chosen)
