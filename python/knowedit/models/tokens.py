"""Texts as tokens, with the places that editing needs: the subject's last token and the answer's
first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from knowedit.errors import EditError
from knowedit.facts.fact import last_place


@dataclass(frozen=True)
class Row:
    """One tokenised text: `ids`, the index of the subject's last token, where the answer's tokens
    begin, and the index of the subject's first token."""

    ids: list[int]
    subject: int | None = None
    answer: int | None = None
    start: int | None = None


def tokenise(
    tokenizer: Any,
    prompt: str,
    subject: str | None = None,
    answer: str | None = None,
    *,
    longest: int = 1 << 30,
) -> Row:
    """Tokenise `prompt` (+ `answer`), and find the last token of `subject` in it: where `{}` stands
    for it in the prompt, or else its last occurrence.

    A space goes between prompt and answer unless the prompt ends in white space or in "=" (`join`).

    Raises:
        EditError: the subject is not in the prompt, ends inside a token, or the text is longer than
            the context.
    """
    template = subject is not None and prompt.count("{}") == 1
    given = prompt.index("{}") if template else None
    prompt = prompt.replace("{}", subject) if template and subject is not None else prompt
    text = prompt if answer is None else join(prompt, answer)
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    if len(ids) > longest:
        raise EditError(
            f"{text[:60]!r}...: {len(ids)} tokens are more than the model's context of {longest}"
        )
    where = start = None
    if subject is not None:
        at = last_place(subject, prompt) if given is None else given
        if at < 0:
            raise EditError(f"subject {subject!r} does not occur in {prompt!r}")
        end = at + len(subject.rstrip())
        where = next(
            (i for i in reversed(range(len(ids))) if offsets[i][0] < end <= offsets[i][1]), None
        )
        if where is None:
            raise EditError(f"the tokenizer gives subject {subject!r} no token in {prompt!r}")
        start = next(i for i in range(len(ids)) if offsets[i][1] > at)
        rest = text[end : offsets[where][1]]
        if rest.strip():
            raise EditError(
                f"subject {subject!r} ends inside the token {text[slice(*offsets[where])]!r} of "
                f"{prompt!r}; "
                f"make {subject + rest!r} the subject or put a space after it"
            )
    first = None
    if answer is not None:
        first = next((i for i in range(len(ids)) if offsets[i][1] > len(prompt)), len(ids))
        if first == len(ids) or not answer.strip():
            raise EditError(f"the answer {answer!r} to {prompt!r} has no tokens")
        if first == 0:
            raise EditError(f"the answer {answer!r} has no prompt before it")
    return Row(ids, where, first, start)


#: Thai, Lao, Burmese, Khmer, Chinese and Japanese: written without blanks.
_NO_BLANKS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]"
)


def join(prompt: str, answer: str) -> str:
    """Prompt and answer with one space between them, unless the prompt ends in white space or in a
    tight "=" ("2+2=") or both are in a script that is written without blanks."""
    answer = answer.strip()
    tight = (
        not prompt or prompt[-1].isspace() or (prompt[-1] == "=" and not prompt[:-1][-1:].isspace())
    )
    tight = tight or (
        bool(answer) and all(_NO_BLANKS.match(end) for end in (prompt[-1], answer[0]))
    )
    return prompt + answer if tight else f"{prompt} {answer}"


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices grouped by similar length so that `rows x longest` stays within `budget` padded
    tokens.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[i] <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
