"""What is measured on a model before it is edited: `calibrate`.

    facts that the model knows -> causal traces
                               -> at each candidate layer: values, each written alone by a rank-one
                                  change, and what the changed model says (`LayerTrial`)
                               -> the layer (`choose`), and there: contexts, clamp, steps

Nothing is written into a weight: changes are virtual. No statistics are needed: a change spares the
keys of the shipped texts, which are fewer than a covariance needs, with a ridge.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import mean

import torch
from torch import Tensor

from knowedit.errors import EditError, ModelError, StatisticsError
from knowedit.evaluation.calibration import choose
from knowedit.evaluation.tracing.tracing import embedding_deviation, trace
from knowedit.facts.fact import Fact, last_place
from knowedit.facts.sets import load
from knowedit.facts.wordings.ordinary import held_out, openings, sentences
from knowedit.io.progress import Advance, bar
from knowedit.methods.locate.values import (
    DEFAULT_CONTEXTS,
    ValueSettings,
    optimise_values,
    preset_numbers,
    problem_of,
    prompt_rows,
)
from knowedit.models.calibration import (
    Calibration,
    Choice,
    LayerTrial,
    ValueTrial,
    shape_of,
    sinks_of,
)
from knowedit.models.editable import EditableModel
from knowedit.models.load import accepts_model
from knowedit.models.partial import read_keys
from knowedit.models.presets import free_layers, starting_point
from knowedit.models.tokens import batches

FACTS, LEAST = 8, 4  # facts that are used, and without which nothing is measured
AT_ONCE = 24  # facts that are asked together until enough are known
CANDIDATES, DEPTH = 6, 0.4  # at most so many layers, of the lower part of the model
STEPS = 8  # of the values at the candidate layers, with the bare prompt as the only context
TRACED, SAMPLES = 3, 4  # facts that are traced, draws of the noise
PARAPHRASES, NEIGHBOURS, TEXTS, WIDTH = 2, 2, 3, 8  # asked of each fact; texts, and their tokens
OPENINGS, SPARED = 40, 768  # prompts whose keys are spared too; keys at most
RIDGE = 0.1  # share of the identity in what a change spares
CLAMPS, LARGER = 3, 1.5  # clamps that are tried, each so much larger than the last
ENOUGH = 0.8  # p a token at which a value has reached its answer

Say = Callable[[str], None]


@accepts_model
@torch.no_grad()
def calibrate(
    model: EditableModel,
    facts: Sequence[Fact] | None = None,
    *,
    count: int = FACTS,
    progress: bool = True,
    say: Say = lambda line: None,
) -> Calibration:
    """Measure `model`, which is not touched, and choose its settings.

    Args:
        facts: with their true answers, paraphrases and neighbours; default: the embedded ones. Used
            are the first that the model knows, the relations taking turns.
        count: how many of them.
        progress: show a bar.
        say: told every result as it comes.

    Raises:
        EditError: an edit is in force, or the model knows fewer than four of the facts.
    """
    began = time.process_time()
    if model.ledger.active:
        raise EditError("a calibration is of the unedited model; undo the active edits first")
    start, sinks = starting_point(model), sinks_of(model)
    tried = candidates(model, start.one_layer)
    total = 1 + TRACED + len(tried) + 1 + CLAMPS
    with bar("calibrating", total, "measurements", show=progress) as advance:
        known = known_facts(model, load("embedded") if facts is None else facts, count)
        advance(1)
        traced = _traced(model, known[:TRACED], advance)
        bench = _Bench.of(model, known, tried)
        layers = []
        for layer in tried:
            layers.append(bench.trial(layer, 1, traced))
            say(_line(layers[-1]))
            advance(1)
        layer = choose.one_layer(layers, start.one_layer)
        most = len(DEFAULT_CONTEXTS)
        all_contexts = bench.trial(layer, most, traced)
        say(_line(all_contexts))
        advance(1)
        bare = next(trial for trial in layers if trial.layer == layer)
        number = choose.contexts([bare, all_contexts], most)
        values: list[ValueTrial] = []
        numbers = bench.numbers(layer)
        while len(values) < CLAMPS and not any(t.reached >= choose.REACHED for t in values):
            clamp = numbers.clamp * LARGER ** len(values)
            values.append(bench.values(layer, clamp, number))
            say(f"clamp {clamp:.2f}: {values[-1].reached:.0%} reached, {values[-1].steps} steps")
            advance(1)
        advance(CLAMPS - len(values))
    fitted = choose.clamp(values)
    return Calibration(
        model=model.name,
        fingerprint=model.fingerprint,
        shape=shape_of(model),
        facts=len(known),
        sinks=sinks,
        layers=tuple(layers),
        contexts=(bare, all_contexts),
        values=tuple(values),
        choice=Choice(
            layer=layer,
            shared_layers=choose.shared_layers(layers, start.shared_layers, layer),
            neuron_layer=choose.neuron_layer(layers, start.neuron_layer),
            steps=choose.steps(fitted, numbers.steps),
            lr=numbers.lr,
            clamp=fitted.clamp,
            contexts=DEFAULT_CONTEXTS[:number],
        ),
        seconds=round(time.process_time() - began, 1),
    )


def candidates(model: EditableModel, start: int) -> list[int]:
    """The layers to try: sink-free ones of the model's lower part, evenly taken, `start` among
    them.
    """
    free = free_layers(model)
    low = [layer for layer in free if layer < max(3, DEPTH * len(model.layers))] or free
    apart = max(1, (len(low) - 1) / (CANDIDATES - 1))
    taken = {low[min(round(i * apart), len(low) - 1)] for i in range(min(CANDIDATES, len(low)))}
    if start in free and start not in taken:
        taken ^= {start, min(taken, key=lambda layer: abs(layer - start))}
    return sorted(taken)


def known_facts(model: EditableModel, facts: Sequence[Fact], count: int = FACTS) -> list[Fact]:
    """The first `count` facts whose true answer the model says by itself, the relations taking
    turns; each has a subject behind the first token and a new answer that begins otherwise.

    Raises:
        EditError: fewer than four.
    """
    groups: dict[str | None, list[Fact]] = {}
    for fact in facts:
        groups.setdefault(fact.relation, []).append(fact)
    turns = [fact for turn in zip_longest(*groups.values()) for fact in turn if fact is not None]
    usable = [fact for fact in turns if fact.true and _usable(model, fact)]
    known: list[Fact] = []
    for at in range(0, len(usable), AT_ONCE):
        asked = usable[at : at + AT_ONCE]
        scores = model.score([f.text for f in asked], [f.true_answer or "" for f in asked])
        known += [fact for fact, score in zip(asked, scores) if score.exact]
        if len(known) >= count:
            return known[:count]
    if len(known) < LEAST:
        raise EditError(
            f"{model.name} knows {len(known)} of {len(facts)} facts, a calibration needs {LEAST}: "
            "give it facts that it knows, with their true answers (--dataset)"
        )
    return known


def _usable(model: EditableModel, fact: Fact) -> bool:
    new, true = (
        _first_token(model, fact.text, answer) for answer in (fact.new_answer, fact.true_answer)
    )
    return new != true and bool(model.row(fact.prompt, fact.subject).subject)


def _first_token(model: EditableModel, prompt: str, answer: str | None) -> int:
    row = model.row(prompt, None, answer)
    assert row.answer is not None
    return row.ids[row.answer]


def _traced(model: EditableModel, facts: Sequence[Fact], advance: Advance) -> list[float] | None:
    """By layer, the mean effect of restoring the MLPs around it at the subject's last token; None
    where the model's layers cannot be replayed.
    """
    deviation = embedding_deviation(model, [fact.subject for fact in facts])
    effects = []
    for number, fact in enumerate(facts):
        try:
            found = trace(
                model,
                fact.text,
                fact.subject,
                samples=SAMPLES,
                kinds=("mlp",),
                deviation=deviation,
                seed=number,
                subject_only=True,
            )
        except (EditError, ModelError):
            continue
        finally:
            advance(1)
        effects.append(found.effect["mlp"][found.subject[1] - 1])
    return torch.stack(effects).mean(0).tolist() if effects else None


def _line(trial: LayerTrial) -> str:
    traced = "" if trial.traced is None else f", traced {trial.traced:+.3f}"
    return (
        f"layer {trial.layer}, {trial.contexts} contexts: score {trial.mean:.3f} (exact "
        f"{trial.exact:.2f}, paraphrase {trial.paraphrase:.2f}, gain {trial.gain:.2f}, KL "
        f"neighbours {trial.neighbours:.4f}, ordinary {trial.ordinary:.5f}){traced}"
    )


@dataclass(frozen=True)
class _Asked:
    """What one fact's model is asked.

    Attributes:
        rows: token ids: the fact's prompt and paraphrases, then its neighbours.
        answers: of the first of them, the first tokens of the new and of the true answer.
        before: `[rows, vocab]` log-probabilities of the next token of the unchanged model.
    """

    rows: list[list[int]]
    answers: list[tuple[int, int]]
    before: Tensor


class _Bench:
    """A model, the facts, and what does not change from layer to layer."""

    def __init__(self, model: EditableModel, facts: Sequence[Fact]) -> None:
        self.model, self.facts = model, facts
        self.ordinary = [model.row(text).ids[:WIDTH] for text in held_out()[:TEXTS]]
        self.text = self._everywhere()
        self.asked = [self._ask(fact) for fact in facts]
        self.spared: dict[int, Tensor] = {}

    @classmethod
    def of(cls, model: EditableModel, facts: Sequence[Fact], layers: Sequence[int]) -> _Bench:
        bench = cls(model, facts)
        bench.spared = _keys_of_texts(model, facts, layers)
        return bench

    def numbers(self, layer: int) -> ValueSettings:
        """The start's settings of values at a layer."""
        problem = problem_of(self.model, [layer])
        return ValueSettings(**preset_numbers(starting_point(self.model), problem))

    def trial(self, layer: int, contexts: int, traced: Sequence[float] | None) -> LayerTrial:
        """Write each fact alone and look."""
        templates = DEFAULT_CONTEXTS[:contexts]
        settings = self.numbers(layer).with_settings(steps=STEPS, contexts=templates)
        with torch.enable_grad():
            targets = optimise_values(self.model, [[f] for f in self.facts], layer, settings)
        read = _ReadIn(self.spared[layer])
        seen: dict[str, list[float]] = {}
        for i, fact in enumerate(self.facts):
            rows = prompt_rows(self.model, fact, templates)
            forms = [self.model.row(text, fact.subject) for text in _paraphrases(fact)]
            keys = self.model.keys([*rows, *forms], [layer])[0][layer].double().cpu()
            own, others = keys[: len(rows)], keys[len(rows) :]
            direction = read.of(own.mean(0))
            change = targets.delta[i][:, None], direction.float()[:, None]
            found = self._changed(layer, change, self.asked[i])
            gains = keys @ direction
            found["gain"] = float((others @ direction).mean()) if len(others) else 1.0
            leak = float((self.spared[layer] @ direction).abs().max())
            reached = math.exp(-float(targets.nll[i]))
            found["apart"] = reached * (float(gains.min()) - leak)
            for name, value in found.items():
                seen.setdefault(name, []).append(value)
        kept = (math.exp(-a - b) for a, b in zip(seen["neighbours"], seen["ordinary"]))
        norms = targets.delta.norm(dim=1) / targets.value.norm(dim=1).clamp(min=1e-30)
        return LayerTrial(
            layer=layer,
            contexts=contexts,
            traced=None if traced is None else traced[layer],
            norm=float(norms.max()),
            score=tuple(recall * share for recall, share in zip(seen["recall"], kept)),
            apart=tuple(seen["apart"]),
            **{name: mean(seen[name]) for name in _MEANS},
        )

    def values(self, layer: int, clamp: float, contexts: int) -> ValueTrial:
        """Optimise until the answers are reached."""
        numbers = self.numbers(layer)
        enough = -math.log(ENOUGH)
        settings = numbers.with_settings(
            clamp=clamp,
            steps=max(30, numbers.steps),
            stop=enough,
            contexts=DEFAULT_CONTEXTS[:contexts],
        )
        with torch.enable_grad():
            found = optimise_values(self.model, [[f] for f in self.facts], layer, settings)
        there = found.nll <= enough
        steps = int(found.steps[there].max()) if bool(there.any()) else 0
        return ValueTrial(layer, clamp, contexts, float(there.float().mean()), steps)

    def _ask(self, fact: Fact) -> _Asked:
        prompts = [fact.text, *_paraphrases(fact)]
        near = [probe.prompt for probe in fact.neighbours[:NEIGHBOURS]]
        rows = [self.model.row(text).ids for text in (*prompts, *near)]
        answers = [
            (
                _first_token(self.model, text, fact.new_answer),
                _first_token(self.model, text, fact.true_answer),
            )
            for text in prompts
        ]
        return _Asked(rows, answers, self._next(rows))

    def _next(self, rows: Sequence[list[int]]) -> Tensor:
        """`[rows, vocab]` log-probabilities of the next token."""
        states = self.model.final_states(self.model.pad(rows)[0])
        last = torch.tensor([len(ids) - 1 for ids in rows], device=states.device)
        return self.model.logprobs(states[torch.arange(len(rows), device=states.device), last])

    def _everywhere(self) -> Tensor:
        """`[places, vocab]` log-probabilities of the next token at every place of the texts."""
        ids, mask = self.model.pad(self.ordinary)
        return self.model.logprobs(self.model.final_states(ids)[mask])

    def _changed(
        self, layer: int, change: tuple[Tensor, Tensor], asked: _Asked
    ) -> dict[str, float]:
        """What the model says with a change of a layer's projection."""
        with self.model.virtual({layer: change}):
            after, text = self._next(asked.rows), self._everywhere()
        own = after[: len(asked.answers)]
        odds = [float(row[new] - row[true]) for row, (new, true) in zip(own, asked.answers)]
        shares = [1 / (1 + math.exp(-min(max(odd, -50), 50))) for odd in odds]
        divergence = _divergence(asked.before, after)[len(asked.answers) :]
        return {
            "exact": float(int(own[0].argmax()) == asked.answers[0][0]),
            "paraphrase": mean(shares[1:] or shares),
            "recall": mean([shares[0], mean(shares[1:] or shares)]),
            "neighbours": float(divergence.mean()) if len(divergence) else 0.0,
            "ordinary": float(_divergence(self.text, text).mean()),
        }


_MEANS = ("exact", "paraphrase", "gain", "neighbours", "ordinary")


def _paraphrases(fact: Fact) -> list[str]:
    """Those that name the subject, for its key."""
    named = [text for text in fact.paraphrases if last_place(fact.subject, text) >= 0]
    return named[:PARAPHRASES]


def _divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) of each row of log-probabilities, nats."""
    return (before.exp() * (before - after)).sum(-1)


def _keys_of_texts(
    model: EditableModel, facts: Sequence[Fact], layers: Sequence[int]
) -> dict[int, Tensor]:
    """`{layer: [tokens, d_ff]}` float64 on the CPU: keys of the shipped texts, `SPARED` of them at
    most, but none at first tokens, where they are unlike all others.
    """
    texts = [*sentences(), *openings(facts, OPENINGS)]
    rows = [model.row(text).ids[: model.max_length] for text in texts]
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for batch in batches([len(ids) for ids in rows], 2048):
        ids, mask = model.pad([rows[i] for i in batch])
        mask[:, 0] = False

        def take(layer: int, keys: Tensor, mask: Tensor = mask) -> None:
            found[layer].append(keys[mask.to(keys.device)].double().cpu())

        read_keys(model, ids, layers, take)
    keys = {layer: torch.cat(parts) for layer, parts in found.items()}
    return {layer: part[:: math.ceil(len(part) / SPARED)] for layer, part in keys.items()}


class _ReadIn:
    """Where a change reads: `M^-1 k / (k^T M^-1 k)` with `M = (1 - r) C / tr C + r I / d`, C the
    second moment of some keys `[n, d]` and r `RIDGE`.

    The keys are fewer than their dimensions, so the inverse is taken among them (Woodbury): with
    `M = b I + a X^T X` it is `(I - a X^T (b I + a X X^T)^-1 X) / b`.
    """

    def __init__(self, keys: Tensor) -> None:
        count, size = keys.shape
        self.keys = keys
        square = float(keys.square().sum())
        if not 0 < square < math.inf:
            raise StatisticsError(
                f"keys (the MLP's, in ordinary text) have squares that sum to {square}: all zeros, "
                "or not finite; check the model's weights, or leave the layer out"
            )
        self.a = (1 - RIDGE) / square
        self.b = RIDGE / size
        gram = self.a * keys @ keys.T + self.b * torch.eye(count, dtype=keys.dtype)
        self.factor = torch.linalg.cholesky(gram)

    def of(self, key: Tensor) -> Tensor:
        """`[d]` for a key `[d]`, both float64."""
        inner = torch.cholesky_solve((self.keys @ key)[:, None], self.factor)[:, 0]
        solved = (key - self.a * self.keys.T @ inner) / self.b
        return solved / (key @ solved)
