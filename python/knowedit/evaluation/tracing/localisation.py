"""Where a model keeps what it knows: causal traces of many facts, averaged by the role of the token
(ROME, figure 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knowedit.errors import EditError
from knowedit.evaluation.intervals import TAILS, draws
from knowedit.evaluation.tracing.tracing import KINDS, Trace, embedding_deviation, trace
from knowedit.facts.fact import Fact
from knowedit.io.progress import bar
from knowedit.models.editable import EditableModel
from knowedit.models.load import accepts_model
from knowedit.models.presets import preset_for

ROLES = ("first subject", "middle subject", "last subject", "next", "further", "last")
SHARE = 0.8  # of the strongest effect: a layer that has so much of it carries the fact


@dataclass(frozen=True)
class Advice:
    """Which layers' MLPs, restored at the subject's last token, bring most of the answer back.

    Windows with layer 0 do not count: its MLP sees little but the token itself, so that restoring
    it restores the token.

    Attributes:
        peak: the layer (centre of a window) with the largest mean effect, `effect`; `low` and
            `high`: the middle 95 % of the peaks of bootstrap samples of the facts.
        carriers: the layers with at least `SHARE` of it.
        first: the largest mean effect of a window with layer 0.
        preset, preset_effect: the layers that the preset edits, and the mean effect at each.
    """

    peak: int
    low: int
    high: int
    effect: float
    carriers: list[int]
    first: float
    preset: list[int]
    preset_effect: list[float]

    def __str__(self) -> str:
        shares = ", ".join(
            f"{layer} ({e / self.effect:.0%})" for layer, e in zip(self.preset, self.preset_effect)
        )
        return (
            f"MLPs at the subject's last token: strongest around layer {self.peak} (95 %: "
            f"{self.low} to {self.high}), "
            f"p {self.effect:+.3f}; at least {SHARE:.0%} of that at layers "
            f"{', '.join(map(str, self.carriers))}; "
            f"the preset edits {shares}; windows with layer 0, which restore the token itself: "
            f"{self.first:+.3f}"
        )


@dataclass(frozen=True)
class AverageTrace:
    """Indirect effects of many facts.

    Attributes:
        rows: the roles that occur. A one-token subject is a "last subject", a token that follows
            the subject and ends the prompt a "last".
        counts: facts that have the role, by row.
        effect, low, high: `{kind: [roles][layers]}`, mean over facts (of the mean over the role's
            tokens) and the ends of its 95 % percentile bootstrap interval over facts.
        facts: prompt, subject, answer, clean and corrupted probability of each.
        unknown, unusable: facts left out: the true answer's first token is not the model's next
            one; the subject cannot be traced.
        advice: None without the kind mlp, or without an effect above layer 0.
        window, deviation, samples, seed: as in `Trace`.
    """

    model: str
    rows: list[str]
    counts: list[int]
    effect: dict[str, list[list[float]]]
    low: dict[str, list[list[float]]]
    high: dict[str, list[list[float]]]
    facts: list[dict[str, Any]]
    unknown: int
    unusable: int
    advice: Advice | None
    window: int
    deviation: float
    samples: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for `report.plots.trace`."""
        return {**vars(self), "advice": vars(self.advice) if self.advice else None}


@accepts_model
def trace_many(
    model: EditableModel,
    facts: Sequence[Fact],
    limit: int | None = None,
    *,
    kinds: Sequence[str] = KINDS,
    noise: float = 3.0,
    samples: int = 10,
    window: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> AverageTrace:
    """Trace the first `limit` facts whose true answer begins with the model's own next token;
    arguments as for `trace`.

    One standard deviation of noise is that of the embeddings of all subjects in `facts`.

    Raises:
        EditError: fewer than two facts are known to the model, or as `trace`.
    """
    deviation = embedding_deviation(model, [fact.subject for fact in facts])
    traces: list[Trace] = []
    unknown = unusable = 0
    with bar("tracing", min(limit or len(facts), len(facts)), "facts", show=progress) as advance:
        for number, fact in enumerate(facts):
            if len(traces) == limit:
                break
            try:
                known = _knows(model, fact)
                if known:
                    traces.append(
                        trace(
                            model,
                            fact.text,
                            fact.subject,
                            noise=noise,
                            samples=samples,
                            kinds=kinds,
                            window=window,
                            deviation=deviation,
                            seed=seed + number,
                            progress=advance,
                        )
                    )
            except EditError:
                unusable += 1
            else:
                unknown += not known
    if len(traces) < 2:
        raise EditError(
            f"the model knows {len(traces)} of {len(facts)} facts, {unusable} cannot be traced; "
            f"give it others"
        )
    return _average(model, traces, unknown, unusable, seed)


def _knows(model: EditableModel, fact: Fact) -> bool:
    row = model.row(fact.prompt, fact.subject, fact.true_answer or fact.new_answer)
    assert row.answer is not None
    return int(model.next_logprobs([fact.text])[0].argmax()) == row.ids[row.answer]


def roles(found: Trace) -> list[str]:
    """The role of each token of the prompt; "" before the subject, where nothing was corrupted."""
    begin, end = found.subject
    names = (
        [""] * begin + ["middle subject"] * (end - begin) + ["further"] * (len(found.tokens) - end)
    )
    names[begin], names[end], names[end - 1], names[-1] = (
        "first subject",
        "next",
        "last subject",
        "last",
    )
    return names


def _average(
    model: EditableModel, traces: Sequence[Trace], unknown: int, unusable: int, seed: int
) -> AverageTrace:
    named = [roles(found) for found in traces]
    rows = [role for role in ROLES if any(role in names for names in named)]
    tables: dict[str, dict[str, list[list[float]]]] = {
        name: {k: [] for k in traces[0].effect} for name in _TABLES
    }
    advice = None
    for role in rows:
        mine = [
            (found, [n == role for n in names])
            for found, names in zip(traces, named)
            if role in names
        ]
        for kind in traces[0].effect:
            values = np.stack(
                [found.effect[kind][at].mean(0).double().numpy() for found, at in mine]
            )
            means = draws(len(values), seed) @ values / len(values)
            for name, row in zip(_TABLES, (values.mean(0), *np.quantile(means, TAILS, axis=0))):
                tables[name][kind].append(row.tolist())
            if (role, kind) == ("last subject", "mlp"):
                advice = _advice(model, values.mean(0), means, traces[0].window)
    facts = [
        {n: getattr(f, n) for n in ("prompt", "subject", "tokens", "answer", "clean", "corrupted")}
        for f in traces
    ]
    counts = [sum(role in names for names in named) for role in rows]
    first = traces[0]
    return AverageTrace(
        model.name,
        rows,
        counts,
        tables["effect"],
        tables["low"],
        tables["high"],
        facts,
        unknown,
        unusable,
        advice,
        first.window,
        first.deviation,
        first.samples,
        seed,
    )


_TABLES = ("effect", "low", "high")


def _advice(
    model: EditableModel, mean: NDArray[np.float64], means: NDArray[np.float64], window: int
) -> Advice | None:
    least = window // 2 + 1  # the first layer whose window is above layer 0
    if least >= len(mean) or mean[least:].max() <= 0:
        return None
    peak = least + int(mean[least:].argmax())
    low, high = np.quantile(least + means[:, least:].argmax(1), TAILS, method="nearest")
    carriers = (least + np.flatnonzero(mean[least:] >= SHARE * mean[peak])).tolist()
    preset, first = preset_for(model).layers, float(mean[:least].max())
    return Advice(
        peak,
        int(low),
        int(high),
        float(mean[peak]),
        carriers,
        first,
        [*preset],
        [float(mean[i]) for i in preset],
    )
