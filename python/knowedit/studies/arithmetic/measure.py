"""What is measured in the arithmetic study, prompt by prompt.

Greedy continuations of six tokens, before and after the edit in the very same batches, so that
identical outputs mean identical computations; float32. By kind of prompt:

* target:     success = the first number of the answer is the target; starts = the text begins with
    it ("5555" does).
* paraphrase: success, likewise; longer = within sixteen tokens, for answers that begin with a
    sentence.
* sums:       accuracy = the first number is the true sum (said of the edited model; small models
  cannot add); identical; steady; clear; kl.
* unrelated:  identical (the report's locality); steady; kl.

`identical` compares the whole texts. Many of a small model's choices are coin flips: with a
smallest top-1/top-2 margin of 0.01 nat any change of the weights may turn one. So two measures look
only where the unedited margin exceeds `MARGIN`: `steady` = the same text up to the first token with
a smaller margin (defined where the first token has a larger one); `clear` = the same first number,
of the sums where every token of that number, and the one after it, has a larger one. `kl` =
KL(unedited || edited) of the next token in nats, which needs no threshold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knowedit.evaluation.evaluation import plain
from knowedit.evaluation.intervals import estimates
from knowedit.evaluation.measures.drift import divergence
from knowedit.models import generation
from knowedit.models.editable import EditableModel
from knowedit.studies.arithmetic.prompts import StudyPrompt, Sum, first_number, number_span

TOKENS, LONGER = 6, 16
#: What a sum may stand behind; the first is the report's own form.
LEADS = ("", "\n", "Sum: ")
BATCH = 16
MARGIN = 0.2
SEED = 42  # of the intervals
SHARES = ("success", "longer", "starts", "accuracy", "identical", "steady", "clear")  # yes or no
#: (kind, measure), what must be reached on the judging half, and whether at least or at most that.
GOAL = (
    (("target", "success"), 1.0),
    (("paraphrase", "success"), 0.85),
    (("unrelated", "identical"), 0.95),
    (("sums", "clear"), 0.95),
    (("sums", "steady"), 0.95),
    (("sums", "kl"), 0.1),
)
Rates = dict[str, dict[str, dict[str, float]]]  # {kind: {measure: an Estimate as JSON has it}}
Row = dict[str, Any]


@dataclass(frozen=True)
class Continuation:
    """A greedy continuation and what is clear in it.

    Attributes:
        text: the whole continuation.
        steady: its part before the first token with a small margin.
        clear: every token of its first number, and the one after it, has a large margin.
        margin: the smallest of those tokens' margins, nats; of all tokens where there is no number.
    """

    text: str
    steady: str
    clear: bool
    margin: float


@dataclass(frozen=True)
class Responses:
    """What the model says to every probe; of paraphrases also the longer answers `{probe: text}`;
    log-probabilities `[probes with a KL, vocab]` of the next token."""

    texts: list[str]
    longer: dict[int, str]
    logprobs: Tensor


def observe(model: EditableModel, asked: Sequence[StudyPrompt]) -> Responses:
    """Ask everything of the model as it is now, with whatever edit is applied."""
    texts: list[str] = []
    for kind in dict.fromkeys(probe.kind for probe in asked):  # probes of a kind stand together
        texts += model.generate([p.prompt for p in asked if p.kind == kind], TOKENS, batch=BATCH)
    places = [i for i, probe in enumerate(asked) if probe.kind == "paraphrase"]
    longer = model.generate([asked[i].prompt for i in places], LONGER, batch=BATCH)
    return Responses(
        texts,
        dict(zip(places, longer)),
        model.next_logprobs([p.prompt for p in asked if has_kl(p)]),
    )


def readings(
    model: EditableModel, sums: Sequence[Sum], leads: Iterable[str] = LEADS
) -> dict[str, float]:
    """`{text in front of "a+b=": share of the sums that the model gets right}`: some models do not
    read the first token of a text, and seem not to add (Qwen2.5-Coder: 7 of 34, behind a new line
    33).
    """
    found = {}
    for lead in leads:
        said = model.generate([f"{lead}{one.prompt}" for one in sums], TOKENS, batch=BATCH)
        right = [one.number(text) == one.true for one, text in zip(sums, said)]
        found[lead] = sum(right) / max(1, len(right))
    return found


def has_kl(prompt: StudyPrompt) -> bool:
    return prompt.kind in ("sums", "unrelated")


@torch.no_grad()
def greedy(
    model: EditableModel, prompts: Sequence[str], tokens: int = TOKENS
) -> list[Continuation]:
    """`EditableModel.generate`, in the same batches, with the margins between the two likeliest
    tokens.
    """
    ends = generation.end_tokens(model)
    found = []
    for new, _, logits in generation.greedy(model, prompts, tokens, BATCH, logits=True):
        assert logits is not None
        best = logits.float().topk(2, -1).values
        for line, margins in zip(new.tolist(), (best[..., 0] - best[..., 1]).tolist()):
            stop = next((i + 1 for i, token in enumerate(line) if token in ends), len(line))
            found.append(_said(model, line[:stop], margins[:stop]))
    return found


def _said(model: EditableModel, ids: Sequence[int], margins: Sequence[float]) -> Continuation:
    parts = [model.tokenizer.decode(ids[:n], skip_special_tokens=True) for n in range(len(ids) + 1)]
    text = parts[-1]
    unclear = next((i for i, margin in enumerate(margins) if margin <= MARGIN), len(ids))
    span = number_span(text)
    if span is None:
        return Continuation(text, parts[unclear], False, min(margins))
    needed = next((n for n, part in enumerate(parts) if len(part) > span[1]), len(ids))
    margin = min(margins[:needed])
    return Continuation(text, parts[unclear], margin > MARGIN, margin)


def judge(
    asked: Sequence[StudyPrompt],
    unedited: Mapping[int, Continuation],
    before: Responses,
    after: Responses,
) -> list[Row]:
    """One row a probe: prompt, kind, half, texts before and after, `ok`, and its measures (only
    where they are defined).

    Args:
        unedited: `greedy` of the sums and unrelated prompts, by probe.
    """
    moved = divergence(before.logprobs, after.logprobs).clamp(min=0).tolist()
    kl = dict(zip((i for i, probe in enumerate(asked) if has_kl(probe)), moved))
    rows = []
    for i, probe in enumerate(asked):
        was, now = before.texts[i], after.texts[i]
        measures: dict[str, float] = {}
        if probe.kind in ("target", "paraphrase"):
            assert probe.about is not None
            target = probe.about.target
            measures["success"] = float(probe.about.number(now) == target)
            if probe.kind == "paraphrase":
                measures["longer"] = float(probe.about.number(after.longer[i]) == target)
                was, now = before.longer[i], after.longer[i]
            else:
                measures["starts"] = float(now.lstrip().startswith(str(target)))
        else:
            if probe.about is not None:
                measures["accuracy"] = float(probe.about.number(now) == probe.about.true)
            measures["identical"] = float(was == now)
            if (said := unedited[i]).steady:
                measures["steady"] = float(now.startswith(said.steady))
            if probe.kind == "sums" and said.clear:
                measures["clear"] = float(first_number(was) == first_number(now))
            measures["kl"] = kl[i]
        ok = bool(measures.get("success", measures.get("identical")))
        about = str(probe.about) if probe.kind in ("target", "paraphrase") else None
        margin = unedited[i].margin if probe.kind == "sums" else None
        row = {
            "prompt": probe.prompt,
            "kind": probe.kind,
            "about": about,
            "half": probe.half,
            "before": was,
            "after": now,
        }
        rows.append({**row, "ok": ok, "margin": margin, "measures": measures})
    return rows


def table(
    rows: Iterable[Mapping[str, Any]], half: str | None = None, about: str | None = None
) -> Rates:
    """Means with 95 % bootstrap intervals, `{kind: {measure: {mean, low, high, records}}}`.

    Args:
        rows: of one edit or of several (seeds); a prompt's rows are resampled together.
        half: only those, and the targets; about: only the rows about that target.
    """
    chosen = (
        row
        for row in rows
        if (half is None or row["half"] in ("", half)) and (about is None or row["about"] == about)
    )
    values = (
        (row["kind"], m, row["prompt"], v) for row in chosen for m, v in row["measures"].items()
    )
    return plain(estimates(values, SEED, SHARES))


def reached(found: Rates, end: str = "mean") -> dict[tuple[str, str], bool]:
    """Which of the goals a table meets; `end` "mean", or "bound" for the pessimistic end of each
    interval.

    A goal on something that does not occur (no clear sum) counts as not met.
    """
    met = {}
    for (kind, measure), goal in GOAL:
        most = measure == "kl"
        name = end if end == "mean" else "high" if most else "low"
        value = found.get(kind, {}).get(measure, {}).get(name, math.nan)
        met[kind, measure] = value <= goal if most else value >= goal
    return met
