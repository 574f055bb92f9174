"""Probability tests: the logits at the tokens that are scored, and no others.

CounterFact's test (`test_batch_prediction`) asks for two answers to each prompt, EasyEdit's
(`test_prediction_acc`) which tokens win.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from knowedit.errors import KnowEditError
from knowedit.integrations.discovery import Signature, mentions
from knowedit.integrations.hosts import Host
from knowedit.integrations.replacements.base import NotOurs, Replacement, editable, own_way
from knowedit.integrations.replacements.states import BUDGET, tokens_of
from knowedit.models.editable import EditableModel
from knowedit.models.linear import fast_linear
from knowedit.models.packed import beginnings, packed
from knowedit.models.partial import texts_in_a_row
from knowedit.models.tokens import batches


@torch.no_grad()
def logits_at(
    view: EditableModel, rows: Sequence[list[int]], places: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Logits `[places, vocab]` of each row, float32 at least. A row that another one begins with is
    read from that one, and what rows begin with in common, as a prompt's two answers do, is run
    once.
    """
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    texts = [tuple(row[: max(where, default=0) + 1]) for row, where in zip(rows, places)]
    holders = holding(texts)
    whole = list(holders)
    for group in batches([len(text) for text in whole], BUDGET):
        run = [whole[i] for i in group]
        own = [i for text in run for i in holders[text]]
        lines = [line for line, text in enumerate(run) for _ in holders[text]]
        with fast_linear():
            states, at = states_of_texts(view, run)
            wanted = [at[line, list(places[i])] for line, i in zip(lines, own)]
            # two answers' first tokens are scored at the same place
            asked, which = torch.cat(wanted).unique(return_inverse=True)
            logits = view.head(states[asked])[which]
        for i, part in zip(own, logits.split([len(one) for one in wanted])):
            found[i] = part.float() if part.dtype in (torch.float16, torch.bfloat16) else part
    return found


def states_of_texts(view: EditableModel, texts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Final hidden states `[n, hidden]`, and which of them each token's is, `[texts, T]`."""
    if (row := texts_in_a_row(view, texts)) is not None:
        return row.run(), row.of
    ids, mask = view.pad([list(text) for text in texts])
    once = beginnings(texts, ids.shape[1])
    with packed(mask.bool(), once) if view.replays else nullcontext():
        states = view.final_states(ids)
    return states.flatten(0, 1), torch.arange(ids.numel(), device=ids.device).view_as(ids)


def holding(texts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
    """Each text that no other one begins with, and the numbers of those that are read from it: its
    own, and those of its beginnings.
    """
    found: dict[tuple[int, ...], list[int]] = {}
    last: tuple[int, ...] = ()
    # backwards, what begins with a text stands right in front of it
    for i in sorted(range(len(texts)), key=texts.__getitem__, reverse=True):
        last = last if last[: len(texts[i])] == texts[i] else texts[i]
        found.setdefault(last, []).append(i)
    return found


# -- CounterFact: two answers to each prompt


def _make_pairs(original: FunctionType, host: Host) -> Callable[..., Any]:
    def test_batch_prediction(
        model: Any,
        tok: Any,
        prefixes: list[str],
        which_correct: Any,
        target_new: str,
        target_true: str,
    ) -> Any:
        try:
            view = editable(model, tok)
            marked = mentions(original, "llama") and "llama" in model.config._name_or_path.lower()
            return _pairs(view, prefixes, which_correct, (target_new, target_true), int(marked))
        except (NotOurs, KnowEditError) as reason:
            own_way(original, reason)
            return original(model, tok, prefixes, which_correct, target_new, target_true)

    return test_batch_prediction


def _pairs(
    view: EditableModel,
    prefixes: Sequence[str],
    which_correct: Sequence[int],
    answers: tuple[str, str],
    marks: int,
) -> tuple[list[dict[str, float]], list[bool]]:
    """`marks`: special tokens in front of an answer, which are no part of it."""
    tok = view.tokenizer
    begin = [len(ids) for ids in tokens_of(tok, prefixes)]
    rows = tokens_of(tok, [f"{prefix} {answer}" for prefix in prefixes for answer in answers])
    if tok.padding_side == "left" and len(set(map(len, rows))) > 1:
        raise NotOurs("prompts of different lengths are padded on the left")
    wanted = [ids[marks:] for ids in tokens_of(tok, [f" {answer}" for answer in answers])]
    places = [[begin[i // 2] + j - 1 for j in range(len(wanted[i % 2]))] for i in range(len(rows))]
    if any(not 0 <= place < len(row) for row, where in zip(rows, places) for place in where):
        raise NotOurs("an answer is scored outside its text")
    logits = logits_at(view, rows, places)
    losses, correct = [], []
    for i, seen in enumerate(logits):
        tokens = torch.tensor(wanted[i % 2], device=seen.device)
        chosen = seen.log_softmax(-1).gather(1, tokens[:, None])
        losses.append(float(-chosen.mean()))
        if which_correct[i // 2] == i % 2:
            correct.append(bool((seen.argmax(-1) == tokens).all()))
    pairs = [
        {"target_new": new, "target_true": true} for new, true in zip(losses[::2], losses[1::2])
    ]
    return pairs, correct


PAIRS = Replacement(
    "logits at the answers' tokens only",
    Signature(
        "test_batch_prediction",
        ("model", "tok", "prefixes", "which_correct", "target_new", "target_true"),
    ),
    _make_pairs,
)


# -- EasyEdit: which tokens win


def _make_accuracy(original: FunctionType, host: Host) -> Callable[..., Any]:
    def test_prediction_acc(
        model: Any,
        tok: Any,
        hparams: Any,
        prompts: Any,
        targets: Any,
        device: Any,
        locality: bool = False,
        vanilla_generation: bool = False,
    ) -> Any:
        try:
            if vanilla_generation or getattr(hparams, "use_chat_template", False):
                raise NotOurs("answers are generated, or prompts are chats")
            texts = [prompts] if isinstance(prompts, str) else list(prompts)
            answers = [targets] if isinstance(targets, str) else list(targets)
            said, labels = _said(editable(model, tok), texts, answers)
        except (NotOurs, KnowEditError) as reason:
            own_way(original, reason)
            return original(
                *(model, tok, hparams, prompts, targets, device, locality, vanilla_generation)
            )
        if locality:
            return said
        means = [sum(map(int.__eq__, a, b)) / len(b) if b else None for a, b in zip(said, labels)]
        if len(means) == 1:
            return [float("nan") if means[0] is None else means[0]]
        return [mean for mean in means if mean is not None]

    return test_prediction_acc


def _said(
    view: EditableModel, prompts: Sequence[str], answers: Sequence[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """The likeliest tokens where each answer stands, and the answer's own tokens."""
    tok = view.tokenizer
    rows = tokens_of(tok, [f"{prompt} {answer}" for prompt, answer in zip(prompts, answers)])
    fronts = tokens_of(tok, prompts)
    rotary = getattr(view.hf.config, "rope_parameters", None) or getattr(
        view.hf.config, "rope_theta", None
    )
    if len(set(map(len, rows))) > 1 and not rotary:
        raise NotOurs("prompts of different lengths are padded on the left of absolute positions")
    pad = tok.pad_token_id
    begin = [
        sum(token == pad for token in row) + sum(token != pad for token in front)
        for row, front in zip(rows, fronts)
    ]
    if any(not 0 < first <= len(row) for first, row in zip(begin, rows)):
        raise NotOurs("an answer begins outside its text")
    places = [list(range(first - 1, len(row) - 1)) for first, row in zip(begin, rows)]
    logits = logits_at(view, rows, places)
    said = [seen.argmax(-1).tolist() if where else [] for seen, where in zip(logits, places)]
    return said, [row[first:] for first, row in zip(begin, rows)]


ACCURACY = Replacement(
    "logits at the answer's tokens only",
    Signature(
        "test_prediction_acc",
        ("model", "tok", "hparams", "prompts", "targets", "device"),
        ("locality", "vanilla_generation"),
    ),
    _make_accuracy,
)
